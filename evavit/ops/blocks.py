"""What several attentions do with the blocks of the grid: windows, logits and softmax in them, means of cells."""
from typing import List, Optional, Tuple

import torch
import torch.nn.functional as F

from .grid import block_counts, block_mask, from_blocks, to_blocks

__all__ = [
    'accumulation_dtype', 'cell_means', 'crop_bias', 'from_windows', 'joint_attention', 'relative_position_index',
    'softmax', 'table_bias', 'to_windows', 'window_logits', 'window_mask',
]


def accumulation_dtype(x: torch.Tensor) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def softmax(logits: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Softmax over the last axis, accumulated in at least float32, in the dtype of `like`."""
    return logits.softmax(-1, dtype=accumulation_dtype(logits)).to(like.dtype)


def to_windows(x: torch.Tensor, feat_size: List[int], window: Tuple[int, int]) -> torch.Tensor:
    """Tokens `(B, h, N, d)` by window: `(B, h, windows, tokens of a window, d)`; zeros fill up short windows."""
    return to_blocks(x, feat_size, window).transpose(3, 4).flatten(4, 5).flatten(2, 3)


def from_windows(x: torch.Tensor, feat_size: List[int], window: Tuple[int, int]) -> torch.Tensor:
    """Inverse of `to_windows`, without what filled up short windows."""
    nH, nW = block_counts(feat_size, window)
    x = x.unflatten(3, [window[0], window[1]]).unflatten(2, [nH, nW]).transpose(3, 4)
    return from_blocks(x, feat_size)


def window_mask(feat_size: List[int], window: Tuple[int, int], device: torch.device) -> Optional[torch.Tensor]:
    """Which places of the windows hold a token: bool `(windows, tokens of a window)`, or None where all do."""
    mask = block_mask(feat_size, window, device)
    return mask if mask is None else mask.transpose(1, 2).flatten(2, 3).flatten(0, 1)


def relative_position_index(window_size: int, halo: int, device: torch.device) -> torch.Tensor:
    """Which row of a table of biases belongs to each pair of a query of a window and a key of the same window with
    `halo` tokens of context on every side: with r = window_size + halo and (dy, dx) query minus key, row
    (dy + r - 1)·(2r - 1) + dx + r - 1. `(window_size² · (window_size + 2·halo)²)`, in raster order, queries first."""
    reach = window_size + halo
    query, key = torch.arange(window_size, device=device), torch.arange(-halo, reach, device=device)
    step = query.unsqueeze(1) - key + reach - 1
    return (step[:, None, :, None] * (2 * reach - 1) + step[None, :, None, :]).flatten()


def table_bias(table: torch.Tensor, window_size: int) -> torch.Tensor:
    """The bias `(h, window_size², window_size²)` by a table `((2·window_size - 1)², h)` of differences of places."""
    area = window_size * window_size  # TorchScript's ** is a float
    index = relative_position_index(window_size, 0, table.device)
    return table[index].view(area, area, -1).permute(2, 0, 1)


def crop_bias(bias: torch.Tensor, window_size: int, window: Tuple[int, int]) -> torch.Tensor:
    """The bias `(h, window_size², window_size²)` of a window that the grid cuts to `window` tokens along both axes."""
    if window[0] == window_size and window[1] == window_size:
        return bias
    side = [window_size, window_size]
    bias = bias.unflatten(2, side).unflatten(1, side)[:, :window[0], :window[1], :window[0], :window[1]]
    return bias.flatten(3, 4).flatten(1, 2)


def window_logits(
        q: torch.Tensor,
        k: torch.Tensor,
        feat_size: List[int],
        window: Tuple[int, int],
        rel_pos_bias: Optional[torch.Tensor],
        window_size: int,
) -> torch.Tensor:
    """Logits q·k + b inside windows, -inf for places without a token.

    Args:
        q: Scaled queries by window, `(B, h, windows, area, d)`, from `to_windows`.
        k: Keys, likewise.
        feat_size: Grid (H, W).
        window: Window in tokens, from `window_shape`: shorter than window_size where the grid is.
        rel_pos_bias: b, `(h, window_size², window_size²)`, or None.
        window_size: Side of the windows that the bias is for.

    Returns:
        `(B, h, windows, area, area)`, in at least float32.
    """
    dtype = accumulation_dtype(q)
    logits = (q @ k.transpose(-2, -1)).to(dtype)
    if rel_pos_bias is not None:
        logits = logits + crop_bias(rel_pos_bias, window_size, window).to(dtype).unsqueeze(1)
    mask = window_mask(feat_size, window, q.device)
    return logits if mask is None else logits.masked_fill(~mask.unsqueeze(1), float('-inf'))


def joint_attention(
        local: torch.Tensor,
        shared: torch.Tensor,
        v_local: torch.Tensor,
        v_shared: torch.Tensor,
        dropout_p: float,
) -> torch.Tensor:
    """One softmax over the tokens of a query's window and over what all windows share.

    Args:
        local: Logits inside windows, `(B, h, windows, area, area)`.
        shared: Logits of the shared keys, `(B, h, windows, area, G)`.
        v_local: Values by window, `(B, h, windows, area, d)`.
        v_shared: Shared values, `(B, h, G, d)`.
        dropout_p: Probability to drop a weight; the rest is scaled up.

    Returns:
        `(B, h, windows, area, d)`.
    """
    area = local.shape[-1]
    attn = softmax(torch.cat([local, shared.to(local.dtype)], -1), v_local)
    if dropout_p > 0.0:
        attn = F.dropout(attn, dropout_p)
    # All windows share the other values: one product for all queries of an (image, head).
    out = (attn[..., area:].flatten(2, 3) @ v_shared).unflatten(2, [attn.shape[2], attn.shape[3]])
    return attn[..., :area] @ v_local + out


def cell_means(x: torch.Tensor, feat_size: List[int], cell: Tuple[int, int]) -> torch.Tensor:
    """Mean of the tokens `(B, h, N, d)` of each cell: `(B, h, cells, d)` in x's dtype, summed in at least float32."""
    dtype = accumulation_dtype(x)
    total = to_blocks(x, feat_size, cell).sum((3, 5), dtype=dtype).flatten(2, 3)
    mask = block_mask(feat_size, cell, x.device)
    if mask is None:
        return (total / (cell[0] * cell[1])).to(x.dtype)
    return (total / mask.sum((1, 3), dtype=dtype).view(-1, 1)).to(x.dtype)
