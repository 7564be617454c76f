"""Peers: attentions of linear cost from PyTorch and other packages that stand beside EVA's op, in the same run.

None of them computes EVA: `computes` says what each does. A result is held against a float64 form of that function, on
the first head of the first image, because no peer mixes images or heads. Windows divide the grid.
"""

import functools
import importlib
from typing import Any, Callable, Dict, List, NamedTuple, Sequence, Tuple

import torch
import torch.nn.functional as F

from evavit.ops.grid import from_windows, to_windows

__all__ = ['PEERS', 'Peer', 'flex_mask']

Attend = Callable[
    ..., torch.Tensor
]  # q, k, v of shape (B, h, N, d); FlexAttention's k, v have the cells behind the tokens
BLOCK = 128  # queries and keys of a block of FlexAttention


class Peer(NamedTuple):
    """An attention to compare with.

    Args:
        attention: Its name in the column of results files.
        computes: What it does, for tables.
        why_not: From (side of the grid, side of a window) to why it does not run, '' where it does.
        make: From (side, side of a window, cells, device) to the function that is timed.
        exact: The same in plain operations, for float64.
        cells: Whether keys and values have those of the cells behind those of the tokens.
        cuda: Whether it needs a CUDA device.
    """

    attention: str
    computes: str
    why_not: Callable[[int, int], str]
    make: Callable[[int, int, int, torch.device], Attend]
    exact: Callable[[int, int], Attend]
    cells: bool = False
    cuda: bool = True


def _divides(side: int, window: int) -> str:
    return f'windows of {window} × {window} do not divide {side} × {side} tokens' if side % window else ''


def _needs(module: str, package: str) -> Callable[[int, int], str]:
    """Why a peer from another package does not run: it is not there, or does not load."""

    def why_not(side: int, window: int) -> str:
        try:
            importlib.import_module(module)
        except Exception as error:  # a package built for another PyTorch has errors of its own
            missing = isinstance(error, ModuleNotFoundError)
            return (
                f'no {module} here (pip install {package})' if missing else f'{module} does not load: {error!r}'[:200]
            )
        return ''

    return why_not


# ----------------------------------------------------------------------------------------------------------------------
# Windows, and windows with cells
# ----------------------------------------------------------------------------------------------------------------------


def _in_window_order(window: int) -> Attend:
    """Softmax of tokens sorted by window over their own window and, if keys go on behind the tokens, over these."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        N, n = q.shape[2], window**2
        q_BhWnd, k_BhWnd, v_BhWnd = (x[:, :, :N].unflatten(2, (-1, n)) for x in (q, k, v))
        cells = k[:, :, None, N:].transpose(-2, -1)
        logits = torch.cat([q_BhWnd @ k_BhWnd.transpose(-2, -1), q_BhWnd @ cells], -1) * q.shape[-1] ** -0.5
        weights = logits.softmax(-1)
        return (weights[..., :n] @ v_BhWnd + weights[..., n:] @ v[:, :, None, N:]).flatten(2, 3)

    return attend


def flex_mask(N: int, window: int, cells: int, device: torch.device) -> Any:
    """FlexAttention's block mask of N queries, sorted by window, over their windows and all cells.

    `create_block_mask` would fill an N × (N + C) table; here the blocks are named.
    """
    from torch.nn.attention.flex_attention import BlockMask

    n = window**2
    start = torch.arange(0, N, BLOCK)
    first, last = start // n * n // BLOCK, ((start + BLOCK).clamp(max=N) - 1) // n * n + n - 1
    block = torch.arange(-(-(N + cells) // BLOCK))
    needed = (block >= first[:, None]) & (block <= (last // BLOCK)[:, None])
    if cells:
        needed |= block >= N // BLOCK
    indices = needed.to(torch.int32).argsort(dim=-1, descending=True, stable=True).to(torch.int32)

    def mask(b: torch.Tensor, h: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (query // n == key // n) | (key >= N)

    return BlockMask.from_kv_blocks(
        needed.sum(-1, dtype=torch.int32)[None, None].to(device),
        indices[None, None].to(device),
        BLOCK_SIZE=BLOCK,
        mask_mod=mask,
        seq_lengths=(N, N + cells),
    )


@functools.lru_cache(maxsize=1)  # it is made once for the check and once for the clock
def _flex(side: int, window: int, cells: int, device: torch.device) -> Attend:
    from torch.nn.attention.flex_attention import flex_attention

    torch.compiler.reset()  # each size is compiled by itself
    attend = torch.compile(flex_attention, dynamic=False)
    mask = flex_mask(side * side, window, cells, device)
    return lambda q, k, v: attend(q, k, v, block_mask=mask)


def _by_window(side: int, window: int, attend: Attend) -> Attend:
    """From attention of `(B · windows, h, tokens of a window, d)` to that of a grid."""

    def whole(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        feat_size, shape = [side, side], (window, window)
        parts = [to_windows(x, feat_size, shape).transpose(1, 2) for x in (q, k, v)]
        y = attend(*(x.flatten(0, 1) for x in parts)).unflatten(0, parts[0].shape[:2])
        return from_windows(y.transpose(1, 2), feat_size, shape)

    return whole


# ----------------------------------------------------------------------------------------------------------------------
# Other packages
# ----------------------------------------------------------------------------------------------------------------------


def _linear(side: int, window: int, cells: int, device: torch.device) -> Attend:
    chunk_linear_attn = importlib.import_module('fla.ops.linear_attn').chunk_linear_attn

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return chunk_linear_attn(*(x.transpose(1, 2) for x in (q, k, v)), normalize=False)[0].transpose(1, 2)

    return attend


def _linear_exact(side: int, window: int) -> Attend:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        outputs: List[torch.Tensor] = []
        state = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1])
        for a, b, c in zip(*(x.split(256, 2) for x in (q, k, v)), strict=True):
            outputs.append(((a @ b.transpose(-2, -1)).tril() @ c + a @ state) * q.shape[-1] ** -0.5)
            state = state + b.transpose(-2, -1) @ c
        return torch.cat(outputs, 2)

    return attend


def _neighbours(side: int, window: int, cells: int, device: torch.device) -> Attend:
    na2d = importlib.import_module('natten').na2d

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        grids = [x.transpose(1, 2).unflatten(1, (side, side)) for x in (q, k, v)]
        return na2d(*grids, kernel_size=window).flatten(1, 2).transpose(1, 2)

    return attend


def _neighbours_exact(side: int, window: int) -> Attend:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        start = (torch.arange(side, device=q.device) - window // 2).clamp(0, side - window)
        line = start[:, None] + torch.arange(window, device=q.device)  # (side, window): rows, or columns, of a token
        key = (line[:, None, :, None] * side + line[None, :, None, :]).flatten(2).flatten(0, 1)  # (N, window²)
        logits = (q[:, :, :, None] * k[:, :, key]).sum(-1) * q.shape[-1] ** -0.5
        return (logits.softmax(-1)[..., None] * v[:, :, key]).sum(-2)

    return attend


def _why_no_natten(side: int, window: int) -> str:
    reason = _needs('natten', 'natten')(side, window)
    if not reason and not getattr(importlib.import_module('natten'), 'HAS_LIBNATTEN', True):
        return 'NATTEN is here without its CUDA library (build it where nvcc is)'
    return reason


PEERS: Dict[str, Peer] = {
    'flex': Peer(
        'window + cells',
        "FlexAttention, compiled: EVA's last softmax over window and cells; tokens come sorted by window, summaries "
        'are given, no positions',
        _divides,
        _flex,
        lambda side, window: _in_window_order(window),
        cells=True,
    ),
    'windows': Peer(
        'windows',
        'softmax within windows through SDPA, as Swin does: nothing beyond the window',
        _divides,
        lambda side, window, cells, device: _by_window(side, window, F.scaled_dot_product_attention),
        lambda side, window: _by_window(side, window, _in_window_order(window)),
        cuda=False,
    ),
    'linear': Peer(
        'linear',
        'flash-linear-attention: linear attention, causal, no softmax',
        _needs('fla.ops.linear_attn', 'flash-linear-attention'),
        _linear,
        _linear_exact,
    ),
    'natten': Peer(
        'neighbourhood',
        'NATTEN: softmax over the tokens around each, nothing beyond them',
        _why_no_natten,
        _neighbours,
        _neighbours_exact,
    ),
}


def first_head(tensors: Sequence[torch.Tensor]) -> Tuple[torch.Tensor, ...]:
    """Of `(B, h, N, d)`, the first head of the first image."""
    return tuple(x[:1, :1] for x in tensors)
