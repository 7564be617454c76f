"""Checks of arguments that several operators and layers need: ValueErrors that name the value and the remedy."""

import math
import numbers
from typing import List, Optional

import torch

__all__ = [
    'check_bias_table',
    'check_bool',
    'check_count_of_tokens',
    'check_dropout',
    'check_grid',
    'check_int',
    'check_number',
    'check_tensor',
    'check_tokens',
    'check_whole',
    'shape_of',
]


def shape_of(x: torch.Tensor) -> str:
    """A tensor's shape for a message."""
    return str(list(x.shape))


def check_grid(feat_size: List[int]) -> None:
    """The grid is two positive numbers."""
    if len(feat_size) != 2:
        raise ValueError(f'feat_size must be (height, width) in tokens, got {feat_size}')
    if feat_size[0] < 1 or feat_size[1] < 1:
        raise ValueError(f'feat_size ({feat_size[0]}, {feat_size[1]}): both must be at least 1')


def check_tokens(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, feat_size: List[int], num_prefix_tokens: int = 0
) -> None:
    """q, k, v are `(B, h, P + N, d)` of one shape and dtype, floating point, and N = H·W."""
    check_tensor('q', q)
    check_tensor('k', k)
    check_tensor('v', v)
    if q.dim() != 4:
        raise ValueError(f'q must be (batch, heads, tokens, head_dim), got shape {shape_of(q)}')
    if k.shape != q.shape or v.shape != q.shape:
        raise ValueError(f'q, k and v must have one shape, got {shape_of(q)}, {shape_of(k)} and {shape_of(v)}')
    if k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(f'q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}')
    if not q.is_floating_point():
        raise ValueError(f'q, k and v must be floating point, got {q.dtype}')
    check_count_of_tokens('q', q.shape[2], feat_size, num_prefix_tokens)


def check_tensor(name: str, value: torch.Tensor) -> None:
    """TypeError of one line unless it is a tensor."""
    if not torch.jit.is_scripting():  # noqa: SIM102
        if not isinstance(value, torch.Tensor):
            raise TypeError(f'{name} must be a tensor, got {type(value).__name__}')


def check_count_of_tokens(name: str, tokens: int, feat_size: List[int], num_prefix_tokens: int) -> None:
    """The tokens are those of the grid and the prefix tokens before them."""
    check_grid(feat_size)
    check_int('num_prefix_tokens', num_prefix_tokens)
    if num_prefix_tokens < 0:
        raise ValueError(f'num_prefix_tokens must be 0 or more, got {num_prefix_tokens}')
    H, W = feat_size[0], feat_size[1]
    if tokens != num_prefix_tokens + H * W:
        holds = f'and {num_prefix_tokens} prefix tokens do not make' if num_prefix_tokens > 0 else 'does not hold'
        raise ValueError(f'feat_size ({H}, {W}) {holds} the {tokens} tokens of {name}')


def check_int(name: str, value: int) -> None:
    """A whole number, and no bool."""
    if not torch.jit.is_scripting():  # noqa: SIM102, TorchScript skips this block, but not a longer condition
        if type(value) is not int and (
            isinstance(value, bool) or not isinstance(value, (numbers.Integral, torch.SymInt))
        ):
            raise ValueError(f'{name} must be a whole number, got ' + repr(value))  # TorchScript reads no !r


def _check_real(name: str, value: float, what: str) -> None:
    """A number, and no bool."""
    if not torch.jit.is_scripting():  # noqa: SIM102
        if type(value) is not float and (
            isinstance(value, bool) or not isinstance(value, (numbers.Real, torch.SymInt, torch.SymFloat))
        ):
            raise ValueError(f'{name} must be {what}, got ' + repr(value))


def check_bool(name: str, value: bool) -> None:
    """True or False: text such as 'no' would count as True."""
    if not torch.jit.is_scripting():  # noqa: SIM102, TorchScript skips this block, but not a longer condition
        if not isinstance(value, bool):
            raise ValueError(f'{name} must be True or False, got ' + repr(value))


def check_number(name: str, value: float, above_zero: bool = False) -> None:
    """A finite number, above 0 if asked."""
    what = 'a finite number above 0' if above_zero else 'a finite number'
    _check_real(name, value, what)
    lowest = 0.0 if above_zero else -math.inf
    if not (value > lowest and value < math.inf):  # NaN is neither
        raise ValueError(f'{name} must be {what}, got {value}')


def check_dropout(dropout_p: float) -> None:
    """A dropout probability is at least 0 and below 1."""
    _check_real('dropout_p', dropout_p, 'at least 0 and below 1')
    if not (dropout_p >= 0.0 and dropout_p < 1.0):  # NaN is neither
        raise ValueError(f'dropout_p must be at least 0 and below 1, got {dropout_p}')


def check_bias_table(num_heads: int, window_size: int, rel_pos_bias: Optional[torch.Tensor], halo: int = 0) -> None:
    """A relative position bias is the table `((2·(window_size + halo) - 1)², h)`."""
    if rel_pos_bias is None:
        return
    side = 2 * (window_size + halo) - 1
    if list(rel_pos_bias.shape) == [side * side, num_heads]:
        return
    rows = '(2·(window_size + halo) - 1)²' if halo > 0 else '(2·window_size - 1)²'
    remedy = '; pass relative_position_bias_table, not get_bias()' if rel_pos_bias.dim() == 3 else ''
    raise ValueError(
        f'rel_pos_bias must be the table ({rows}, heads) = ({side * side}, {num_heads}), got '
        f'{shape_of(rel_pos_bias)}{remedy}'
    )


def check_whole(name: str, value: int, least: int) -> None:
    """A layer's option is a whole number of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f'{name} must be a whole number of at least {least}, got {value!r}')
