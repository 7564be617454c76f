"""Foreign checkpoints, made to fit the modules of this package. Plain dictionaries in and out; no model is needed."""
import math
from typing import Dict

import torch

__all__ = ['PUBLISHED_EVA_KWARGS', 'convert_published_eva', 'is_published_eva']

# Constructor arguments with which this package's layers evaluate weights of the published implementation. Its noise,
# used in training only, has a standard deviation of head_dim^(-1/4) in our units.
PUBLISHED_EVA_KWARGS = {'proposal_scale': 0.5}

_RENAMED = (
    ('.attn_fn.', '.'),
    ('adaptive_mu_q.0.', 'summary_q.proj.'),
    ('adaptive_mu_q.1.', 'summary_q.norm.'),
    ('adaptive_mu_k.0.', 'summary_k.proj.'),
    ('adaptive_mu_k.1.', 'summary_k.norm.'),
    ('local_relative_position_bias_table', 'rel_pos.relative_position_bias_table'),
    ('norm_before_pooling.', 'norm.'),
    ('dwconv.dwconv.', 'dwconv.'),
)


def is_published_eva(state_dict: Dict[str, torch.Tensor]) -> bool:
    """Whether the names are those of the published EVA implementation."""
    return any('adaptive_mu_q.' in name or 'local_relative_position_bias_table' in name for name in state_dict)


def _expand_bias_table(table: torch.Tensor) -> torch.Tensor:
    """One row for every offset, from a published table in which offsets share rows.

    Published row of offset (dy, dx) in a window of w: (dy + w - 1)·w + dx + w - 1, so 2w² - 1 rows.
    """
    rows = table.shape[0]
    window = math.isqrt((rows + 1) // 2)
    if 2 * window * window - 1 != rows:
        raise ValueError(f'a published bias table has 2·window² - 1 rows, this one has {rows}')
    offset = torch.arange(2 * window - 1, device=table.device)
    return table[(offset[:, None] * window + offset).flatten()]


def _stage_name(name: str) -> str:
    """The published PVT counts stages from 1 in its names; timm's PVT nests them from 0."""
    head, _, tail = name.partition('.')
    for prefix, template in (('patch_embed', 'stages.{}.downsample'), ('block', 'stages.{}.blocks'),
                             ('norm', 'stages.{}.norm')):
        number = head.removeprefix(prefix)
        if number != head and number.isdigit():
            stage = int(number) - 1
            new_head = 'patch_embed' if prefix == 'patch_embed' and stage == 0 else template.format(stage)
            return f'{new_head}.{tail}'
    return name


def convert_published_eva(state_dict: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    """Names and layouts of the published EVA implementation to ours: a layer, a DeiT or a PVT.

    The bias table is expanded without loss (offsets that shared a row get a copy each), the position embedding becomes
    a sequence, index buffers are dropped. Create the model with `PUBLISHED_EVA_KWARGS` to get equal outputs.

    Args:
        state_dict: Tensors by published name.

    Returns:
        Tensors by this package's name.
    """
    converted = {}
    for name, value in state_dict.items():
        if name.endswith('relative_position_index'):
            continue
        for old, new in _RENAMED:
            name = name.replace(old, new)
        name = _stage_name(name)
        if name.endswith('relative_position_bias_table'):
            value = _expand_bias_table(value)
        elif name == 'pos_embed' and value.ndim == 4:
            value = value.flatten(1, 2)
        converted[name] = value
    return converted
