"""Positive random features, and what the attentions that are made of them share.

A feature is ξ(x, ω) = exp(ω·x - ½‖x‖²), with E[ξ(x, ω) ξ(y, ω)] = exp(x·y) over ω ~ N(0, I) (Choromanski et al., ICLR
2021, arXiv 2009.14794). Random feature attention puts the mean over S directions in place of exp(s q·k). As an
importance sampler (Zheng et al., ICML 2022, arXiv 2204.04667) that is, for each direction ω_j,

    f(ω_j) = Σ_m softmax_m(log ξ(k̂_m, ω_j)) v_m,    y_n = Σ_j softmax_j(log w_nj) f(ω_j),

with q̂, k̂ = s^½ q, s^½ k and log w_nj = log ξ(q̂_n, ω_j) + log Σ_m ξ(k̂_m, ω_j). All is computed in this form, in
logarithms: a maximum is subtracted wherever something is exponentiated, no sum is ever 0, and none needs an ε.
Everything is written for TorchScript as well.
"""

from typing import Tuple

import torch
import torch.nn.functional as F

from .grid import accumulation_dtype

__all__ = ['check_directions', 'feature_averages', 'log_positive_features', 'weigh_samples']


def log_positive_features(x: torch.Tensor, directions: torch.Tensor, scale: float) -> torch.Tensor:
    """log ξ(scale^½ x, ω) = scale^½ ω·x - ½ scale ‖x‖² of x `(B, h, N, d)` for ω `(h, S, d)` or `(B, h, S, d)`.

    Returns:
        `(B, h, N, S)` in the accumulation dtype: float32, or float64 for float64.
    """
    dtype = accumulation_dtype(x)
    x = scale**0.5 * x.to(dtype)
    return x @ directions.to(dtype).transpose(-2, -1) - 0.5 * (x * x).sum(-1, keepdim=True)


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


def check_directions(q: torch.Tensor, directions: torch.Tensor) -> None:
    """Directions of random features are `(h, S, d)`."""
    h, d = q.shape[1], q.shape[3]
    if directions.dim() != 3 or list(directions.shape) != [h, directions.shape[1], d]:
        raise ValueError(
            f'directions must be (heads, features, head_dim) = ({h}, S, {d}), got {list(directions.shape)}'
        )
