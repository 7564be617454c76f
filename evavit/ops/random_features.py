"""Positive random features, and the attention that stands on them alone.

A feature is ξ(x, ω) = exp(ω·x - ½‖x‖²), with E[ξ(x, ω) ξ(y, ω)] = exp(x·y) over ω ~ N(0, I) (Choromanski et al., ICLR
2021, arXiv 2009.14794). Random feature attention puts the mean over S directions in place of exp(s q·k). As an
importance sampler (Zheng et al., ICML 2022, arXiv 2204.04667) that is, for each direction ω_j,

    f(ω_j) = Σ_m softmax_m(log ξ(k̂_m, ω_j)) v_m,    y_n = Σ_j softmax_j(log w_nj) f(ω_j),

with q̂, k̂ = s^½ q, s^½ k and log w_nj = log ξ(q̂_n, ω_j) + log Σ_m ξ(k̂_m, ω_j). All is computed in this form, in
logarithms: a maximum is subtracted wherever something is exponentiated, no sum is ever 0, and none needs an ε.
Everything is written for TorchScript as well.
"""

from typing import List, Optional, Tuple

import torch
import torch.nn.functional as F

from .checks import check_directions, check_dropout, check_tokens
from .grid import accumulation_dtype

__all__ = [
    'feature_averages',
    'log_positive_features',
    'log_relu_features',
    'orthogonal_directions',
    'random_feature_attention',
    'weigh_samples',
]


def orthogonal_directions(gaussian: torch.Tensor) -> torch.Tensor:
    """Independent standard normal rows `(..., S, d)` made orthogonal in blocks of d, each still N(0, I) on its own.

    Gram-Schmidt inside each block (the last may be short), then each row gets its old length back: length and
    direction of a normal vector are independent. Orthogonal directions lower the variance of random features. In
    float64, through a Cholesky factor, which a GPU does in one go: G = L Q with orthonormal rows Q for L Lᵀ = G Gᵀ.
    """
    d = gaussian.shape[-1]
    rows = gaussian.double()
    length = rows.norm(2, -1, True)
    unit = rows / length
    blocks: List[torch.Tensor] = []
    for block in unit.split(d, -2):
        factor, _ = torch.linalg.cholesky_ex(block @ block.transpose(-2, -1))
        blocks.append(torch.linalg.solve_triangular(factor, block, upper=False))
    return (length * torch.cat(blocks, -2)).to(gaussian.dtype)


def log_positive_features(x: torch.Tensor, directions: torch.Tensor, scale: float) -> torch.Tensor:
    """log ξ(scale^½ x, ω) = scale^½ ω·x - ½ scale ‖x‖² of x `(B, h, N, d)` for ω `(h, S, d)` or `(B, h, S, d)`.

    Returns:
        `(B, h, N, S)` in the accumulation dtype: float32, or float64 for float64.
    """
    dtype = accumulation_dtype(x)
    x = scale**0.5 * x.to(dtype)
    return x @ directions.to(dtype).transpose(-2, -1) - 0.5 * (x * x).sum(-1, keepdim=True)


def log_relu_features(x: torch.Tensor, directions: torch.Tensor, scale: float, eps: float = 1e-3) -> torch.Tensor:
    """log(ReLU(ω·scale^½ x / S^½) + eps): the generalised attention of the Performer's paper, which is no softmax."""
    dtype = accumulation_dtype(x)
    projected = (scale**0.5 * x.to(dtype)) @ directions.to(dtype).transpose(-2, -1)
    return ((directions.shape[-2] ** -0.5 * projected).relu() + eps).log()


def feature_averages(log_features: torch.Tensor, v: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """The keys' total log Σ_m ξ_mj and their values' average f(ω_j), for log ξ `(B, h, N, S)` and v `(B, h, N, d)`.

    Returns:
        `(B, h, 1, S)` in the dtype of log_features, and `(B, h, S, d)` in v's.
    """
    peak = log_features.detach().amax(-2, keepdim=True)
    weights = (log_features - peak).exp()
    total = weights.sum(-2, keepdim=True)
    averages = (weights / total).to(v.dtype).transpose(-2, -1) @ v
    return peak + total.log(), averages


def weigh_samples(log_weights: torch.Tensor, averages: torch.Tensor, dropout_p: float) -> torch.Tensor:
    """Self-normalised importance sampling: log w `(B, h, N, S)` and f(ω) `(B, h, S, d)` to y `(B, h, N, d)`."""
    attn = log_weights.softmax(-1).to(averages.dtype)
    if dropout_p > 0.0:
        attn = F.dropout(attn, dropout_p)
    return attn @ averages


def _random_feature_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    directions: torch.Tensor,
    kind: str,
    scale: float,
    dropout_p: float,
) -> torch.Tensor:
    if kind == 'relu':
        log_q, log_k = log_relu_features(q, directions, scale), log_relu_features(k, directions, scale)
    else:
        log_q, log_k = log_positive_features(q, directions, scale), log_positive_features(k, directions, scale)
    total, averages = feature_averages(log_k, v)
    return weigh_samples(log_q + total, averages, dropout_p)


def random_feature_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    feat_size: List[int],
    directions: torch.Tensor,
    kind: str = 'positive',
    scale: Optional[float] = None,
    dropout_p: float = 0.0,
) -> torch.Tensor:
    """Attention through random features (Performer), Equation (4) of the EVA paper.

        y_n = Σ_m φ(q̂_n)·φ(k̂_m) v_m / Σ_m φ(q̂_n)·φ(k̂_m),    φ(x) = S^(-½) [ξ(x, ω_1), …, ξ(x, ω_S)]

    computed as the importance sampler above. Time and memory grow with N·S. With positive features and ω ~ N(0, I) the
    error against softmax attention falls as S^(-½).

    Args:
        q: Queries `(B, h, N, d)`, any strides.
        k: Keys, like q.
        v: Values, like q.
        feat_size: Grid `(H, W)` with N = H·W; only checked, order and neighbourhood play no part.
        directions: ω, `(h, S, d)`.
        kind: 'positive' for ξ, or 'relu' for ReLU(ω·x) with a small constant.
        scale: s; d^(-½) if None.
        dropout_p: Probability to drop a direction's weight for a query; the rest is scaled up.

    Returns:
        `(B, h, N, d)` in q's dtype.

    Raises:
        ValueError: arguments that do not fit each other, or an unknown kind.
    """
    check_tokens(q, k, v, feat_size)
    check_directions(q, directions)
    check_dropout(dropout_p)
    if kind != 'positive' and kind != 'relu':
        raise ValueError(f"kind must be 'positive' or 'relu', got '{kind}'")
    if scale is None:
        scale = q.shape[-1] ** -0.5
    if not torch.jit.is_scripting():  # noqa: SIM102, TorchScript skips this block, but not a longer condition
        if not q.is_meta and torch.is_autocast_enabled(q.device.type):
            with torch.autocast(q.device.type, enabled=False):  # the precision of every step is chosen here
                return _random_feature_attention(q, k, v, directions, kind, scale, dropout_p)
    return _random_feature_attention(q, k, v, directions, kind, scale, dropout_p)
