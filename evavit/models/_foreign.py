"""Foreign checkpoints, made to fit the modules of this package. Plain dictionaries in and out; no model is needed."""

import math
import re
from typing import Dict, Iterable, List, NamedTuple, Optional, Tuple

import torch

__all__ = [
    'PUBLISHED_EVA_KWARGS',
    'PUBLISHED_PERFORMER_KWARGS',
    'Change',
    'changes_table',
    'convert_published_eva',
    'convert_softmax',
    'is_published_eva',
    'linear_summary',
    'weight_sources',
]

# Constructor arguments with which this package's layers evaluate weights of the published implementation. Its noise,
# used in training only, has a standard deviation of head_dim^(-1/4) in our units.
PUBLISHED_EVA_KWARGS = {'proposal_scale': 0.5}
# Likewise for weights of its Performer, whose features have constants beside them.
PUBLISHED_PERFORMER_KWARGS = {'feature_kind': 'stabilised'}

_RENAMED = (
    ('.attn_fn.', '.'),
    ('adaptive_mu_q.0.', 'summary_q.proj.'),
    ('adaptive_mu_q.1.', 'summary_q.norm.'),
    ('adaptive_mu_k.0.', 'summary_k.proj.'),
    ('adaptive_mu_k.1.', 'summary_k.norm.'),
    ('q_bar_gen.2.', 'landmarks_q.proj.'),
    ('q_bar_gen.3.', 'landmarks_q.norm.'),
    ('k_bar_gen.2.', 'landmarks_k.proj.'),
    ('k_bar_gen.3.', 'landmarks_k.norm.'),
    ('.eval_proj', '.directions.fixed'),
    ('local_relative_position_bias_table', 'rel_pos.relative_position_bias_table'),
    ('norm_before_pooling.', 'norm.'),
    ('dwconv.dwconv.', 'dwconv.'),
)


# What stands in the names of the published implementation alone, of one or several of its attentions.
_PUBLISHED_NAMES = re.compile(
    r'(^|\.)(adaptive_mu_q\.|local_relative_position_bias_table$|[qk]_bar_gen\.|eval_proj$|norm_before_pooling\.)'
)


def is_published_eva(state_dict: Dict[str, torch.Tensor]) -> bool:
    """Whether the names are those of the published EVA implementation, with any of its attentions."""
    return any(_PUBLISHED_NAMES.search(name) for name in state_dict)


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
    for prefix, template in (
        ('patch_embed', 'stages.{}.downsample'),
        ('block', 'stages.{}.blocks'),
        ('norm', 'stages.{}.norm'),
    ):
        number = head.removeprefix(prefix)
        if number != head and number.isdigit():
            stage = int(number) - 1
            new_head = 'patch_embed' if prefix == 'patch_embed' and stage == 0 else template.format(stage)
            return f'{new_head}.{tail}'
    return name


def _published_name(name: str) -> Optional[str]:
    """Our name of a tensor of the published implementation, None for one that has no counterpart."""
    if name.endswith('relative_position_index'):
        return None
    for old, new in _RENAMED:
        name = name.replace(old, new)
    return _stage_name(name)


def convert_published_eva(state_dict: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    """Names and layouts of the published EVA implementation to ours: a layer, a DeiT or a PVT.

    The attention is EVA, softmax, local, LARA or Scatterbrain, or Performer. The bias table is expanded without loss
    (offsets that shared a row get a copy each), the position embedding becomes a sequence, index buffers are dropped.
    Random directions become those of evaluation, `directions.fixed`. Create an EVA model with `PUBLISHED_EVA_KWARGS`
    and a Performer with `PUBLISHED_PERFORMER_KWARGS` to get equal outputs.

    Args:
        state_dict: Tensors by published name.

    Returns:
        Tensors by this package's name.
    """
    converted = {}
    for name, (source,) in weight_sources(state_dict).items():
        value = state_dict[source]
        if name.endswith('relative_position_bias_table'):
            value = _expand_bias_table(value)
        elif name == 'pos_embed' and value.ndim == 4:
            value = value.flatten(1, 2)
        converted[name] = value
    return converted


# Tokens that are not of the grid, in their order before it.
PREFIX_TOKENS = ('cls_token', 'dist_token', 'reg_token')
# What timm's and DeiT's softmax models have and ours may lack: such tokens and the head that reads one, and the
# convolutions with which PVT shortens keys and values, with their norm.
_NO_COUNTERPART = re.compile(
    r'^(cls_token|dist_token|reg_token|head_dist\..*)$|\.attn\.(sr|norm)\.(weight|bias)$|relative_position_index$'
)


def _softmax_sources(names: Iterable[str], own: Iterable[str]) -> Dict[str, Tuple[str, ...]]:
    sources: Dict[str, Tuple[str, ...]] = {}
    for name in names:
        if _NO_COUNTERPART.search(name) and name not in own:
            continue
        new = _stage_name(name).replace('dwconv.dwconv.', 'dwconv.')
        new = re.sub(r'^fc_norm\.', 'norm.', new) if 'norm.weight' not in names and new not in own else new
        new = re.sub(r'\.attn\.(q|kv)\.', '.attn.qkv.', new)
        sources[new] = (*sources.get(new, ()), name)
    return {new: tuple(sorted(old, key=lambda name: '.kv.' in name)) for new, old in sources.items()}


def weight_sources(
    state_dict: Dict[str, torch.Tensor],
    own: Optional[Dict[str, torch.Tensor]] = None,
) -> Dict[str, Tuple[str, ...]]:
    """This package's name of every tensor of a file that has a counterpart → the names that it is made from.

    The file is one of ours, of timm's or DeiT's softmax models, or of the published EVA implementation. `own` is the
    state dict of the model that it is for, see `convert_softmax`.
    """
    if is_published_eva(state_dict):
        renamed = ((_published_name(name), name) for name in state_dict)
        return {new: (name,) for new, name in renamed if new is not None}
    return _softmax_sources(state_dict, own or {})


def convert_softmax(
    state_dict: Dict[str, torch.Tensor],
    own: Optional[Dict[str, torch.Tensor]] = None,
    own_prefix: int = 0,
) -> Dict[str, torch.Tensor]:
    """Names and layouts of timm's or DeiT's softmax models to ours; a file of ours stays as it is.

    Queries and the keys and values of a PVT become one `qkv`. Class, distillation and register tokens that the model
    has not are dropped with their positions and the distillation head, and so are a PVT's downsampling convolutions. A
    LayerNorm after the pooling (`fc_norm`) becomes the one before it, where the file has no other. Heads are in no
    tensor: `num_heads` of the model must be that of the file. What EVA has beside these, see `linear_summary`.

    Args:
        state_dict: Tensors by timm's or DeiT's name.
        own: State dict of the model that they are for. With it, `fc_norm` stays after the pooling where the model has
            one there, its class and register tokens are taken, and as many positions as the model's and the extra
            tokens' are known to be both.
        own_prefix: How many of the model's positions belong to its class and register tokens. A token's position is
            added to the token, or is 0, where model and file differ in that.

    Returns:
        Tensors by this package's name.
    """
    converted = {}
    for name, sources in weight_sources(state_dict, own).items():
        values = [state_dict[source] for source in sources]
        converted[name] = torch.cat(values) if len(values) > 1 else values[0]
    position = converted.get('pos_embed')
    if position is not None and position.ndim == 3:
        converted.update(_place_tokens(state_dict, own or {}, position, own_prefix))
    return converted


def _place_tokens(
    file: Dict[str, torch.Tensor], own: Dict[str, torch.Tensor], position: torch.Tensor, own_prefix: int
) -> Dict[str, torch.Tensor]:
    """The positions of the grid, and the tokens before it with theirs, as a model has them."""
    tokens = {name: file[name] for name in PREFIX_TOKENS if name in file}
    counts = [token.shape[1] for token in tokens.values()]
    extra, rows = sum(counts), position.shape[1]
    # A model whose extra tokens have no position holds a row for each patch already: a square number. So may be the
    # patches of another grid and the extra tokens together: 6 × 8 + 1.
    grid = own['pos_embed'].shape[1] - own_prefix if 'pos_embed' in own else None
    with_rows = extra > 0 and rows != grid and (rows - extra == grid or math.isqrt(rows) ** 2 != rows)
    kept = [name for name in tokens if name in own]
    placed: Dict[str, torch.Tensor] = {}
    prefix: List[torch.Tensor] = []
    if with_rows:
        parts = dict(zip(tokens, position[:, :extra].split(counts, 1), strict=True))
        position = position[:, extra:]
        if own_prefix:
            prefix = [parts[name] for name in kept]
        else:
            placed = {name: tokens[name] + parts[name] for name in kept}
    elif own_prefix:
        prefix = [torch.zeros_like(tokens[name]) for name in kept]
    return {**placed, 'pos_embed': torch.cat([*prefix, position], 1)}


# Size of the constant part of the LayerNorm's input, in standard deviations of the queries or keys (see
# `linear_summary`). Above 8 the error of the attention hardly falls, and bfloat16 rounds a larger constant more.
_LINEAR_RATIO = 8.0


class Moments(NamedTuple):
    """Mean and variance of each channel of queries or keys, `(h, d)`, as far as weights tell without any image."""

    mean: torch.Tensor
    variance: torch.Tensor


def projection_moments(
    weight: torch.Tensor,
    bias: Optional[torch.Tensor],
    num_heads: int,
    norm: Optional[Tuple[torch.Tensor, torch.Tensor]] = None,
) -> Moments:
    """The moments behind a projection: of LayerNorm's output, which has mean β and, taken as white, the variances γ².

    Args:
        weight: Rows of q or k in the projection, `(h·d, C)`.
        bias: Their bias `(h·d)`, or None.
        num_heads: h.
        norm: Weight γ and bias β of the LayerNorm before the projection, `(C)` each.
    """
    weight = weight.float()
    mean = torch.zeros_like(weight[:, 0]) if bias is None else bias.float()
    variance = weight.square().sum(1)
    if norm is not None:
        mean = mean + weight @ norm[1].float()
        variance = weight.square() @ norm[0].float().square()
    return Moments(mean.view(num_heads, -1), variance.view(num_heads, -1))


def normed_moments(
    moments: Moments, weight: Optional[torch.Tensor], bias: Optional[torch.Tensor], centred: bool
) -> Moments:
    """The moments behind a norm of single queries or keys: LayerNorm where it is centred, or RMSNorm."""
    mean, variance = moments
    if centred:
        mean = mean - mean.mean(1, keepdim=True)
    square = (mean.square() + variance).mean(1, keepdim=True).clamp(min=1e-12)
    mean, variance = mean / square.sqrt(), variance / square
    if weight is not None:
        mean, variance = weight.float() * mean, weight.float().square() * variance
    return Moments(mean if bias is None else mean + bias.float(), variance)


def near_identity(moments: Moments, dtype: torch.dtype) -> Dict[str, torch.Tensor]:
    """The parameters of `linear_summary` for queries or keys of these moments, in that dtype."""
    mean, variance = moments
    d = mean.shape[1]
    # Heads differ in their mean, so the spread about the common one counts that as well.
    spread = (variance.mean() + mean.var(0, unbiased=False).mean()).clamp(min=1e-12).sqrt()
    mean = mean.mean(0)
    pattern = torch.ones_like(mean)
    pattern[1::2] = -1
    pattern = pattern - pattern.mean()
    pattern = pattern / pattern.square().mean().sqrt().clamp(min=1e-12)  # 0 in a head of width 1
    kept = torch.eye(d, dtype=mean.dtype, device=mean.device) - 1 / d - pattern[:, None] * pattern / d
    scale = _LINEAR_RATIO * spread
    proj = kept / scale
    parts = {
        'proj.weight': proj,
        'proj.bias': pattern - proj @ mean,
        'norm.weight': scale.expand(d).clone(),
        'norm.bias': mean - scale * pattern,
    }
    return {name: value.to(dtype) for name, value in parts.items()}


def linear_summary(
    weight: torch.Tensor,
    bias: Optional[torch.Tensor],
    num_heads: int,
    norm: Optional[Tuple[torch.Tensor, torch.Tensor]] = None,
) -> Dict[str, torch.Tensor]:
    """A summary σ(x) = LN(W x + b) that is nearly the identity: a cell's summary is then its mean query or key.

    LayerNorm takes the length off its input. It is nearly linear beside a large constant, though: with a fixed pattern
    p of zero mean and unit variance, and x - m small beside r,

        r · LN(p + P(x - m) / r) - r · p + m  ≈  m + P(x - m)

    P takes off two directions of d, that of the mean and that of p, which LayerNorm could not pass on linearly. m and
    r are estimated without any image, from the LayerNorm before the projection (`projection_moments`).

    Args:
        weight: Rows of q or k in the projection, `(C, C)`.
        bias: Their bias `(C)`, or None.
        num_heads: Heads, which share the summary.
        norm: Weight γ and bias β of the LayerNorm before the projection, `(C)` each.

    Returns:
        'proj.weight' `(d, d)`, 'proj.bias', 'norm.weight' and 'norm.bias' `(d)`.
    """
    return near_identity(projection_moments(weight, bias, num_heads, norm), weight.dtype)


class Change(NamedTuple):
    """What was done with a tensor: its name in the model (in the file, if it was dropped), the action, the reason.

    Actions are 'taken', 'renamed', 'merged', 'resized', 'fresh' and 'dropped'.
    """

    name: str
    action: str
    detail: str = ''


def changes_table(changes: List[Change]) -> str:
    """The changes as a text table; weight and bias, and their like in several blocks, are one row."""
    rows: Dict[Tuple[str, str, str], int] = {}
    for change in changes:
        name = re.sub(r'\.(weight|bias)$', '', re.sub(r'\.\d+\.', '.*.', change.name))
        key = (name, change.action, change.detail)
        rows[key] = rows.get(key, 0) + 1
    cells = [
        ('action', 'tensors', 'name', ''),
        *((action, str(count), name, detail) for (name, action, detail), count in rows.items()),
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return '\n'.join(
        '  '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
    )
