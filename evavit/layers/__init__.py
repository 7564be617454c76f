"""The attentions, one a file, every one `forward(x, feat_size)` on tokens `(B, N, C)`; and the MLP beside them."""

import inspect
from functools import partial
from typing import Any, Callable, Dict, Optional, Sequence, Type

from .attention import GridAttention, check_heads
from .combiner import CombinerAttention
from .eva import EvaAttention
from .eva_1d import EvaAttention1d
from .lara import LaraAttention
from .linformer import LinformerAttention
from .local import LocalAttention
from .long_short import LongShortAttention
from .mlp import FusedMlp
from .nystromformer import NystromformerAttention
from .performer import PerformerAttention
from .reformer import ReformerAttention
from .scatterbrain import ScatterbrainAttention
from .softmax import SoftmaxAttention

__all__ = [
    'ATTENTIONS',
    'CombinerAttention',
    'EvaAttention',
    'EvaAttention1d',
    'FusedMlp',
    'GridAttention',
    'LaraAttention',
    'LinformerAttention',
    'LocalAttention',
    'LongShortAttention',
    'NystromformerAttention',
    'PerformerAttention',
    'ReformerAttention',
    'ScatterbrainAttention',
    'SoftmaxAttention',
    'attention_layer',
    'check_heads',
    'pop_attention_kwargs',
]

ATTENTIONS: Dict[str, Type[GridAttention]] = {
    'eva': EvaAttention,
    'softmax': SoftmaxAttention,
    'local': LocalAttention,
    'performer': PerformerAttention,
    'lara': LaraAttention,
    'scatterbrain': ScatterbrainAttention,
    'nystromformer': NystromformerAttention,
    'combiner': CombinerAttention,
    'long_short': LongShortAttention,
    'linformer': LinformerAttention,
    'reformer': ReformerAttention,
}


def pop_attention_kwargs(name: str, kwargs: Dict[str, Any]) -> Dict[str, Any]:
    """Take an attention's own options out of kwargs: its keyword-only arguments that `GridAttention` does not have.

    Args:
        name: A key of `ATTENTIONS`.
        kwargs: Keyword arguments of a model; those that the attention takes are removed.

    Raises:
        ValueError: no such attention.
    """
    if name not in ATTENTIONS:
        raise ValueError(f'unknown attention {name!r}; choose from {", ".join(ATTENTIONS)}')
    own = inspect.signature(ATTENTIONS[name]).parameters
    shared = inspect.signature(GridAttention).parameters
    return {
        key: kwargs.pop(key)
        for key, parameter in own.items()
        if parameter.kind is parameter.KEYWORD_ONLY and key not in shared and key != 'feat_size' and key in kwargs
    }


def attention_layer(
    name: str, feat_size: Optional[Sequence[int]] = None, **options: Any
) -> Callable[..., GridAttention]:
    """A constructor for the layers of a model, to call with dim and num_heads: an attention with its options set.

    Args:
        name: A key of `ATTENTIONS`.
        feat_size: Grid (H, W) of the model, for an attention that is made for one grid.
        **options: The attention's own options.
    """
    attention = ATTENTIONS[name]
    if attention.fixed_grid:
        options['feat_size'] = feat_size
    return partial(attention, **options)
