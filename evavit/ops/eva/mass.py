"""Where EVA's attention goes: the share of its mass on the window E and on the cells. For looking, not for training."""

from typing import List, Optional, Tuple

import torch

from evavit.ops.checks import check_bias_table, check_number
from evavit.ops.grid import (
    accumulation_dtype,
    cell_means,
    cell_shape,
    from_windows,
    static_size,
    to_windows,
    window_logits,
    window_shape,
)

from .case import SummaryTensors, as_summary
from .checks import check_count, check_four, check_partition, check_tokens, softmax_scale
from .counts import log_counts
from .plain import summarise

__all__ = ['eva_attention_mass']


@torch.no_grad()
def eva_attention_mass(
    q: torch.Tensor,
    k: torch.Tensor,
    feat_size: List[int],
    summary_k: Optional[SummaryTensors] = None,
    rel_pos_bias: Optional[torch.Tensor] = None,
    window_size: int = 7,
    partition_grid: int = 7,
    scale: Optional[float] = None,
    norm_eps: float = 1e-5,
    count_cells: str = 'one',
    num_prefix_tokens: int = 0,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """How the softmax of Equation (16) divides over E^n and the cells, for every query.

    With the weights w of `eva_attention`'s softmax over single tokens m, which are E^n and the prefix tokens, and over
    all cells c, and p_c = w_c / Σ_c w_c:

        exact = Σ_m w_m,   cells = Σ_c w_c = 1 - exact,   effective = exp(-Σ_c p_c log p_c)

    The arguments are as in `eva_attention`, in which neither values nor noise move these weights.

    Returns:
        exact, cells, effective of the grid's queries, each `(B, h, N)` in float32 (float64 for float64). effective,
        between 1 and the number of cells, says among how many the mass on the cells is spread; it is 0 where there are
        none, or where `count_cells='outside'` leaves none.

    Raises:
        ValueError: tokens that are not those of the grid, a rel_pos_bias of another shape, a summary_k that is not
            four tensors of its shapes, a number that cannot be.
    """
    feat_size = static_size(feat_size)
    check_tokens(q, k, k, feat_size, num_prefix_tokens)
    check_partition(window_size, partition_grid)
    check_number('norm_eps', norm_eps, above_zero=True)
    check_count(count_cells)
    check_bias_table(q.shape[1], window_size, rel_pos_bias)
    summary = as_summary(summary_k)
    if partition_grid > 0 and summary is None:
        raise ValueError(f'partition_grid {partition_grid} needs summary_k; got None')
    if partition_grid > 0 and summary is not None:
        check_four('summary_k', summary, q.shape[3])
    dtype = accumulation_dtype(q)
    prefix = k[:, :, :num_prefix_tokens].to(dtype)
    q, k = q[:, :, num_prefix_tokens:].to(dtype), k[:, :, num_prefix_tokens:].to(dtype)
    scale = softmax_scale(scale, q)
    window = window_shape(feat_size, window_size) if window_size > 0 else (1, 1)
    queries = scale * to_windows(q, feat_size, window)
    exact = torch.full(queries.shape[:4], float('-inf'), dtype=dtype, device=q.device)
    if window_size > 0:
        keys = to_windows(k, feat_size, window)
        exact = window_logits(queries, keys, feat_size, window, rel_pos_bias, window_size).logsumexp(-1)

    if num_prefix_tokens > 0:
        one_by_one = (queries @ prefix.unsqueeze(2).transpose(-2, -1)).logsumexp(-1)
        exact = torch.logaddexp(exact, one_by_one)

    cells = torch.full_like(exact, float('-inf'))
    effective = torch.zeros_like(exact)
    if partition_grid > 0 and summary is not None:
        cell, outside = cell_shape(feat_size, partition_grid), count_cells == 'outside' and window_size > 0
        k_tilde = summarise(cell_means(k, feat_size, cell), summary, norm_eps)
        logits = queries @ k_tilde.unsqueeze(2).transpose(-2, -1)
        if count_cells != 'one':
            logits = logits + log_counts(feat_size, cell, window, (0, 0), outside, dtype, q.device).unsqueeze(1)
        cells = logits.logsumexp(-1)
        p = (logits - cells.unsqueeze(-1)).exp()  # NaN in a window that all cells drop out of
        effective = torch.special.entr(p).sum(-1).exp().masked_fill(cells.isneginf(), 0.0)

    total = torch.logaddexp(exact, cells)

    def in_order(x: torch.Tensor) -> torch.Tensor:
        return from_windows(x.unsqueeze(-1), feat_size, window).squeeze(-1)

    return in_order((exact - total).exp()), in_order((cells - total).exp()), in_order(effective)
