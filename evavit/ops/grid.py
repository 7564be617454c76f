"""The 2D token grid: how its tokens fall into windows and cells, and attention inside windows.

Tokens come as `(B, h, N, d)` with `feat_size = (H, W)` and N = H·W in raster order. A *block* is a rectangle of
`(bh, bw)` tokens; blocks start at multiples of its size from the top-left corner, and those at the bottom and right
edge may be short: zeros fill them up, and a mask says where. In this order:

    sizes      of the grid, of a window (fixed), of a cell (it follows the grid), numbers of blocks
    blocks     tokens by block and back; windows are blocks in one axis
    bands      rows of blocks, for sums over cells without a copy
    halos      blocks with tokens of context around them
    attention  inside windows: precision, relative position bias, logits, softmax

Everything is written for TorchScript as well.
"""

import operator
from typing import List, Optional, Tuple

import torch
import torch.nn.functional as F

from .checks import check_int

__all__ = [
    'accumulation_dtype',
    'band_cells',
    'block_counts',
    'block_mask',
    'cell_means',
    'cell_shape',
    'crop_bias',
    'fix_image_size',
    'from_blocks',
    'from_windows',
    'halo_mask',
    'joint_attention',
    'relative_position_index',
    'softmax',
    'static_size',
    'table_bias',
    'to_bands',
    'to_blocks',
    'to_halos',
    'to_windows',
    'window_logits',
    'window_mask',
    'window_shape',
]


def static_size(feat_size: List[int]) -> List[int]:
    """The grid's size as plain numbers, so that torch.compile makes one graph per size.

    Symbolic sizes would run through every ceiling division below into guards that take minutes to prove.

    Raises:
        ValueError: a size that is no whole number.
    """
    if torch.jit.is_scripting():
        return feat_size
    else:
        if isinstance(feat_size, (int, float)):
            raise ValueError(f'feat_size must be (height, width) in tokens, got {feat_size}')
        for size in feat_size:
            if not isinstance(size, torch.Tensor):  # as which torch.jit.trace has sizes
                check_int('feat_size', size)
        return [operator.index(size) for size in feat_size]


def fix_image_size(images: torch.Tensor) -> None:
    """Under torch.compile, make height and width of `(B, C, height, width)` plain numbers: one graph per image size.

    Symbolic ones cannot be differentiated through a resampling, and take minutes to compile.
    """
    if not torch.jit.is_scripting():  # noqa: SIM102  TorchScript skips this block, but not a longer condition
        if torch.compiler.is_compiling():
            static_size(list(images.shape[2:]))


def window_shape(feat_size: List[int], window_size: int) -> Tuple[int, int]:
    """Size of a window in tokens: `window_size` along each axis, or the whole axis where that is shorter."""
    return min(window_size, feat_size[0]), min(window_size, feat_size[1])


def cell_shape(feat_size: List[int], partition_grid: int) -> Tuple[int, int]:
    """Size of a cell in tokens: ceil(L / partition_grid) along an axis of L tokens."""
    return -(-feat_size[0] // partition_grid), -(-feat_size[1] // partition_grid)


def block_counts(feat_size: List[int], block: Tuple[int, int]) -> Tuple[int, int]:
    """Number of blocks along each axis; a short last block counts."""
    return -(-feat_size[0] // block[0]), -(-feat_size[1] // block[1])


def to_blocks(x: torch.Tensor, feat_size: List[int], block: Tuple[int, int]) -> torch.Tensor:
    """Split tokens `(B, h, N, d)` into blocks `(B, h, nH, bh, nW, bw, d)`.

    The result is a view of `x`, whatever its strides, unless a last block is short: then zeros fill it up.
    """
    H, W = feat_size[0], feat_size[1]
    nH, nW = block_counts(feat_size, block)
    pad_h, pad_w = nH * block[0] - H, nW * block[1] - W
    x = x.transpose(1, 2)  # so that the gradient comes back as (B, N, h, d) in memory, the layout of a projection
    if pad_w > 0:
        x = F.pad(x.unflatten(1, [H, W]), [0, 0, 0, 0, 0, pad_w, 0, pad_h]).flatten(1, 2)
    elif pad_h > 0:
        x = F.pad(x, [0, 0, 0, 0, 0, pad_h * W])
    return x.unflatten(1, [nH, block[0], nW, block[1]]).permute(0, 5, 1, 2, 3, 4, 6)


def from_blocks(x: torch.Tensor, feat_size: List[int]) -> torch.Tensor:
    """Inverse of `to_blocks`: `(B, h, nH, bh, nW, bw, d)` to `(B, h, N, d)`, without what filled up short blocks.

    The memory of the result is laid out as `(B, N, h, d)`, so that merging the heads into channels copies nothing.
    """
    x = x.permute(0, 2, 3, 4, 5, 1, 6)
    x = x.flatten(3, 4).flatten(1, 2)[:, : feat_size[0], : feat_size[1]]
    return x.flatten(1, 2).transpose(1, 2)


def block_mask(feat_size: List[int], block: Tuple[int, int], device: torch.device) -> Optional[torch.Tensor]:
    """Which places of the blocks hold a token: bool `(nH, bh, nW, bw)`, or None where all do."""
    H, W = feat_size[0], feat_size[1]
    nH, nW = block_counts(feat_size, block)
    if nH * block[0] == H and nW * block[1] == W:
        return None
    rows = torch.arange(nH * block[0], device=device) < H
    cols = torch.arange(nW * block[1], device=device) < W
    return rows.view(nH, block[0], 1, 1) & cols.view(nW, block[1])


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


def to_bands(x: torch.Tensor, feat_size: List[int], block: Tuple[int, int]) -> torch.Tensor:
    """Split tokens `(B, h, N, d)` into bands, one a row of blocks: `(B·nH, bh·W, h·d)`, heads side by side.

    The result is a view of `x` where that is a view of tokens `(B, N, h·d)`, unless the last band is short: then zeros
    fill it up.
    """
    x = x.transpose(1, 2).flatten(2)
    pad = -feat_size[0] % block[0]
    if pad > 0:
        x = F.pad(x, [0, 0, 0, pad * feat_size[1]])
    return x.unflatten(1, [-1, block[0] * feat_size[1]]).flatten(0, 1)


def band_cells(feat_size: List[int], block: Tuple[int, int], device: torch.device) -> torch.Tensor:
    """Which tokens of a band are in which of its blocks: bool `(nH, nW, bh·W)`, or `(1, nW, bh·W)` for all bands alike.

    What fills up a short last band is in no block.
    """
    H, W = feat_size[0], feat_size[1]
    nH, nW = block_counts(feat_size, block)
    block_of_column = torch.arange(W, device=device).div(block[1], rounding_mode='floor')
    in_block = (block_of_column == torch.arange(nW, device=device).unsqueeze(1)).repeat(1, block[0]).unsqueeze(0)
    if H % block[0] > 0:
        in_grid = torch.arange(nH * block[0] * W, device=device) < H * W
        in_block = in_block & in_grid.view(nH, 1, -1)
    return in_block


def cell_means(x: torch.Tensor, feat_size: List[int], cell: Tuple[int, int]) -> torch.Tensor:
    """Mean of the tokens `(B, h, N, d)` of each cell: `(B, h, cells, d)` in x's dtype, summed in at least float32."""
    dtype = accumulation_dtype(x)
    total = to_blocks(x, feat_size, cell).sum((3, 5), dtype=dtype).flatten(2, 3)
    mask = block_mask(feat_size, cell, x.device)
    if mask is None:
        return (total / (cell[0] * cell[1])).to(x.dtype)
    return (total / mask.sum((1, 3), dtype=dtype).view(-1, 1)).to(x.dtype)


def to_halos(x: torch.Tensor, feat_size: List[int], block: Tuple[int, int], halo: Tuple[int, int]) -> torch.Tensor:
    """Blocks of `(B, h, N, d)` with `halo` tokens of context on every side: `(B, h, blocks, area, d)`.

    Blocks as in `to_blocks`, in raster order, with their tokens in raster order: area is (bh + 2·halo_h)·(bw +
    2·halo_w). Zeros stand where the grid has no token; `halo_mask` tells where.
    """
    H, W = feat_size[0], feat_size[1]
    nH, nW = block_counts(feat_size, block)
    pad_h, pad_w = nH * block[0] - H, nW * block[1] - W
    x = F.pad(x.unflatten(2, [H, W]), [0, 0, halo[1], halo[1] + pad_w, halo[0], halo[0] + pad_h])
    if halo[0] > 0:
        x = x.unfold(2, block[0] + 2 * halo[0], block[0]).permute(0, 1, 2, 5, 3, 4)
    else:  # the same, but its backward is faster
        x = x.unflatten(2, [nH, block[0]])
    if halo[1] > 0:
        x = x.unfold(4, block[1] + 2 * halo[1], block[1]).transpose(5, 6)
    else:
        x = x.unflatten(4, [nW, block[1]])
    return x.transpose(3, 4).flatten(4, 5).flatten(2, 3)


def halo_mask(
    feat_size: List[int], block: Tuple[int, int], halo: Tuple[int, int], device: torch.device
) -> torch.Tensor:
    """Which places of `to_halos` hold a token: bool `(blocks, area)`."""
    tokens = torch.ones([1, 1, feat_size[0] * feat_size[1], 1], device=device)
    return to_halos(tokens, feat_size, block, halo)[0, 0, :, :, 0] > 0


def accumulation_dtype(x: torch.Tensor) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def softmax(logits: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Softmax over the last axis, accumulated in at least float32, in the dtype of `like`."""
    return logits.softmax(-1, dtype=accumulation_dtype(logits)).to(like.dtype)


def relative_position_index(window_size: int, halo: int, device: torch.device) -> torch.Tensor:
    """Which row of a table of biases belongs to each query of a window and each key of that window with `halo` tokens
    of context on every side.

    With r = window_size + halo and (dy, dx) the query's place minus the key's, row (dy + r - 1)·(2r - 1) + dx + r - 1.
    `(window_size² · (window_size + 2·halo)²)`, places in raster order, queries first.
    """
    reach = window_size + halo
    query = torch.arange(reach - 1, reach - 1 + window_size, device=device)
    step = query.unsqueeze(1) - torch.arange(-halo, reach, device=device)
    return ((step * (2 * reach - 1))[:, None, :, None] + step[None, :, None, :]).flatten()


def table_bias(table: torch.Tensor, window_size: int, halo: int = 0) -> torch.Tensor:
    """The bias `(h, window_size², (window_size + 2·halo)²)` from its table `((2·(window_size + halo) - 1)², h)`."""
    index = relative_position_index(window_size, halo, table.device)
    # The gradient of index_select is the faster one on a CPU; on CUDA only that of indexing sums in one fixed order.
    rows = table[index] if table.is_cuda else table.index_select(0, index)
    return rows.unflatten(0, [window_size * window_size, -1]).permute(2, 0, 1)


def crop_bias(bias: torch.Tensor, window_size: int, window: Tuple[int, int], halo: int = 0) -> torch.Tensor:
    """The bias of `table_bias` for a window that the grid cuts to `window` tokens along both axes."""
    if window[0] == window_size and window[1] == window_size:
        return bias
    reach = window_size + 2 * halo
    bias = bias.unflatten(2, [reach, reach]).unflatten(1, [window_size, window_size])
    bias = bias[:, : window[0], : window[1], : window[0] + 2 * halo, : window[1] + 2 * halo]
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
        rel_pos_bias: The table of b, `((2·window_size - 1)², h)`, or None.
        window_size: Side of the windows that the table is for.

    Returns:
        `(B, h, windows, area, area)`, in at least float32.
    """
    dtype = accumulation_dtype(q)
    logits = (q @ k.transpose(-2, -1)).to(dtype)
    if rel_pos_bias is not None:
        bias = crop_bias(table_bias(rel_pos_bias, window_size), window_size, window)
        logits = logits + bias.to(dtype).unsqueeze(1)
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
