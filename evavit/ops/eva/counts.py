"""How many tokens a cell counts as in the softmax of Equation (16): `count_cells`. Written for TorchScript as well."""

from typing import List, Tuple

import torch

__all__ = ['log_counts']


def _shared(length: int, window: int, halo: int, cell: int, device: torch.device) -> torch.Tensor:
    """How many tokens each window with its halo shares with each cell along an axis: `(windows, cells)`."""
    window_start = torch.arange(0, length, window, device=device).unsqueeze(1)
    cell_start = torch.arange(0, length, cell, device=device)
    end = torch.minimum(window_start + window + halo, (cell_start + cell).clamp(max=length))
    return (end - torch.maximum(window_start - halo, cell_start)).clamp(min=0)


def log_counts(
    feat_size: List[int],
    cell: Tuple[int, int],
    window: Tuple[int, int],
    halo: Tuple[int, int],
    outside: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    """log of the tokens of each cell, `(1, C_p)`; or, if `outside`, of those outside of a window's E, `(windows, C_p)`.

    The second is -∞ for a cell that lies wholly in E. A window's E is the window and the halo on each of its sides.
    """
    H, W = feat_size[0], feat_size[1]
    rows, cols = _shared(H, H, 0, cell[0], device), _shared(W, W, 0, cell[1], device)
    counts = (rows.transpose(0, 1) * cols).view(1, -1)
    if outside:
        rows, cols = _shared(H, window[0], halo[0], cell[0], device), _shared(W, window[1], halo[1], cell[1], device)
        counts = counts - (rows[:, None, :, None] * cols[:, None, :]).flatten(2).flatten(0, 1)
    return counts.to(dtype).log()
