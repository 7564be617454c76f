"""Where EVA's attention goes: the share of its mass on the window E and on the cells. For looking, not for training."""
from typing import List, Optional, Tuple

import torch

from .eva import Summary, _accumulation_dtype, _crop_bias, _summarise, _to_windows
from .grid import block_counts, block_mask, cell_shape, from_blocks, to_blocks, window_shape

__all__ = ['eva_attention_mass']


@torch.no_grad()
def eva_attention_mass(
        q: torch.Tensor,
        k: torch.Tensor,
        feat_size: List[int],
        summary_k: Optional[Summary] = None,
        rel_pos_bias: Optional[torch.Tensor] = None,
        window_size: int = 7,
        partition_grid: int = 7,
        scale: Optional[float] = None,
        norm_eps: float = 1e-5,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """How the softmax of Equation (16) divides over E^n and the cells, for every query.

    With the weights w of `eva_attention`'s softmax over [m ∈ E^n] ∪ [all c], and p_c = w_c / Σ_c w_c:

        exact = Σ_{m ∈ E^n} w_m,   cells = Σ_c w_c = 1 - exact,   effective = exp(-Σ_c p_c log p_c)

    Args:
        q, k, feat_size, summary_k, rel_pos_bias, window_size, partition_grid, scale, norm_eps: As in `eva_attention`,
            in which neither values nor noise move these weights.

    Returns:
        exact, cells, effective, each `(B, h, N)` in float32 (float64 for float64). effective, between 1 and the number
        of cells, says among how many the mass on the cells is spread; it is 0 where there are none.
    """
    dtype = _accumulation_dtype(q)
    q, k = q.to(dtype), k.to(dtype)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    window = window_shape(feat_size, window_size) if window_size > 0 else (1, 1)
    queries = scale * _to_windows(q, feat_size, window)
    exact = torch.full(queries.shape[:4], float('-inf'), dtype=dtype, device=q.device)
    if window_size > 0:
        logits = queries @ _to_windows(k, feat_size, window).transpose(-2, -1)
        if rel_pos_bias is not None:
            logits = logits + _crop_bias(rel_pos_bias, window_size, window).to(dtype).unsqueeze(1)
        mask = block_mask(feat_size, window, q.device)
        if mask is not None:
            logits = logits.masked_fill(~mask.transpose(1, 2).flatten(2, 3).flatten(0, 1).unsqueeze(1), float('-inf'))
        exact = logits.logsumexp(-1)

    cells = torch.full_like(exact, float('-inf'))
    effective = torch.zeros_like(exact)
    if partition_grid > 0 and summary_k is not None:
        cell = cell_shape(feat_size, partition_grid)
        mask = block_mask(feat_size, cell, q.device)
        count = (torch.full([1, 1], cell[0] * cell[1], dtype=dtype, device=q.device) if mask is None
                 else mask.sum((1, 3), dtype=dtype).view(-1, 1))
        k_tilde = _summarise(to_blocks(k, feat_size, cell).sum((3, 5)).flatten(2, 3) / count, summary_k, norm_eps)
        logits = queries @ k_tilde.to(dtype).unsqueeze(2).transpose(-2, -1)
        cells = logits.logsumexp(-1)
        log_p = logits.log_softmax(-1)
        effective = (-(log_p.exp() * log_p).sum(-1)).exp()

    total = torch.logaddexp(exact, cells)
    nH, nW = block_counts(feat_size, window)

    def in_order(x):
        x = x.unsqueeze(-1).unflatten(3, [window[0], window[1]]).unflatten(2, [nH, nW]).transpose(3, 4)
        return from_blocks(x, feat_size).squeeze(-1)

    return in_order((exact - total).exp()), in_order((cells - total).exp()), in_order(effective)
