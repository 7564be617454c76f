"""The attentions, one a file, every one `forward(x, feat_size)` on tokens `(B, N, C)`."""
import inspect
from typing import Any, Dict, Type

from .attention import GridAttention, check_heads
from .eva import EvaAttention
from .eva_1d import EvaAttention1d
from .softmax import SoftmaxAttention

__all__ = ['ATTENTIONS', 'EvaAttention', 'EvaAttention1d', 'GridAttention', 'SoftmaxAttention', 'check_heads',
           'pop_attention_kwargs']

ATTENTIONS: Dict[str, Type[GridAttention]] = {
    'eva': EvaAttention,
    'softmax': SoftmaxAttention,
}


def pop_attention_kwargs(name: str, kwargs: Dict[str, Any]) -> Dict[str, Any]:
    """Take out of kwargs the options of the attention's own: keyword-only arguments that `GridAttention` lacks.

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
    return {key: kwargs.pop(key) for key, parameter in own.items()
            if parameter.kind is parameter.KEYWORD_ONLY and key not in shared and key in kwargs}
