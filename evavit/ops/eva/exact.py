"""EVA before its approximations, Equations (13) and (15): for study, in time and memory that grow with N · M.

Random-feature attention is one cell and an empty E (Appendix G.1), softmax attention one cell for each token. What
`eva_attention` replaces to be linear are the cells' weights, Σ exp(q·k_m), and one sample for all queries.
"""

from typing import List, Optional, Tuple

import torch

from .checks import softmax_scale

__all__ = ['control_variate_coefficients', 'eva_estimator']


def _check(q: torch.Tensor, k: torch.Tensor, cells: torch.Tensor) -> None:
    N, M = q.shape[2], k.shape[2]
    if cells.is_floating_point() or list(cells.shape) not in ([M], [N, M]) or int(cells.min()) < -1:
        raise ValueError(
            f'cells must be whole numbers from -1 (for E), one for each of {M} keys or for each of ({N}, '
            f'{M}) pairs, got {cells.dtype} of shape {list(cells.shape)}'
        )


def _coefficients(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cells: torch.Tensor,
    omega: Optional[torch.Tensor],
    log_ratio: Optional[torch.Tensor],
    scale: float,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits `(B, h, N, M)`, log Σ_{P_c} exp(q·k) `(B, h, N, C)` and β `(B, h, N, C, d)`; -∞ and 0 for an empty P_c."""
    logits = scale * q @ k.transpose(-2, -1)
    log_sums: List[torch.Tensor] = []
    betas: List[torch.Tensor] = []
    for c in range(int(cells.max()) + 1):
        inside = (cells == c).view(-1, k.shape[2])  # for every query, or for each
        empty = ~inside.any(-1, keepdim=True)
        in_cell = logits.masked_fill(~(inside | empty), float('-inf'))
        log_sums.append(in_cell.logsumexp(-1).masked_fill(empty.squeeze(-1), float('-inf')))
        if omega is None:
            beta = in_cell.softmax(-1) @ v
        else:
            of_cell = omega[:, :, min(c, omega.shape[2] - 1)]
            k_hat, q_hat = scale**0.5 * k, scale**0.5 * q
            log_xi = of_cell @ k_hat.transpose(-2, -1) - 0.5 * (k_hat * k_hat).sum(-1).unsqueeze(-2)
            log_xi = log_xi.unsqueeze(2).masked_fill(~(inside | empty).unsqueeze(-2), float('-inf'))
            # g and h of a sample share the factors N(ω; 0, I) ξ(q_n, ω) / (Z q(ω)): those weigh the samples.
            log_h = q_hat @ of_cell.transpose(-2, -1) + log_xi.logsumexp(-1)
            if log_ratio is not None:
                log_h = log_h + log_ratio[:, :, min(c, log_ratio.shape[2] - 1)].unsqueeze(2)
            beta = (log_h.softmax(-1).unsqueeze(-1) * (log_xi.softmax(-1) @ v.unsqueeze(2))).sum(-2)
        betas.append(beta.masked_fill(empty, 0.0))
    if not betas:
        return logits, logits[..., :0], v[:, :, :0].unsqueeze(2).expand(-1, -1, q.shape[2], -1, -1)
    return logits, torch.stack(log_sums, -1), torch.stack(betas, 3)


def control_variate_coefficients(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cells: torch.Tensor,
    omega: Optional[torch.Tensor] = None,
    log_ratio: Optional[torch.Tensor] = None,
    scale: Optional[float] = None,
) -> torch.Tensor:
    """Coefficients β_c of every query: the best, β*_c of (10), or their estimate β̂_c by samples.

    Arguments as in `eva_estimator`. Returns `(B, h, N, C, d)`; zeros for a P_c without tokens.
    """
    _check(q, k, cells)
    return _coefficients(q, k, v, cells, omega, log_ratio, softmax_scale(scale, q))[2]


def eva_estimator(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cells: torch.Tensor,
    omega: Optional[torch.Tensor] = None,
    log_ratio: Optional[torch.Tensor] = None,
    scale: Optional[float] = None,
) -> torch.Tensor:
    """The estimator that EVA approximates, Equation (13), the same as (15):

        y_n = Σ_{m∈E} exp(s q_n·k_m) / Z v_m + Σ_c Σ_{m∈P_c} exp(s q_n·k_m) / Z β_c
        β_c = Σ_{m∈P_c} g_m(ω) / Σ_{m∈P_c} h_m(ω)

    With β*_c, that is without samples, it is softmax attention; with one token in each cell too, whatever the samples
    are. With one cell and an empty E it is random-feature attention (4).

    Args:
        q: Queries `(B, h, N, d)`.
        k: Keys `(B, h, M, d)`.
        v: Values `(B, h, M, d)`.
        cells: The cell of each key, `(M)`, or of each key for each query, `(N, M)`: 0 to C - 1, or -1 for keys of E.
        omega: Samples ω of the proposal, for keys of scale s^½: `(B, h, C, S, d)`, where B, h and C may be 1. None for
            β*_c.
        log_ratio: log N(ω; 0, I) / q(ω), `(B, h, C, S)`, where B, h and C may be 1, up to a constant for each cell.
            None for the proposal N(0, I).
        scale: s; d^(-½) if None.

    Returns:
        `(B, h, N, d)`.

    Raises:
        ValueError: cells of another shape, not whole numbers, or below -1.
    """
    _check(q, k, cells)
    scale = softmax_scale(scale, q)
    logits, log_sums, beta = _coefficients(q, k, v, cells, omega, log_ratio, scale)
    logits = logits.masked_fill((cells != -1).view(-1, k.shape[2]), float('-inf'))
    attn = torch.cat([logits, log_sums], -1).softmax(-1)
    return attn[..., : k.shape[2]] @ v + (attn[..., k.shape[2] :].unsqueeze(-1) * beta).sum(-2)
