"""LARA, linear randomized attention (Zheng et al., ICML 2022, arXiv 2204.04667): random features that follow the input.

Everything is written for TorchScript as well.
"""

from typing import List, Optional

import torch

from .checks import check_dropout, check_landmarks, check_tokens
from .grid import accumulation_dtype
from .random_features import feature_averages, log_positive_features, weigh_samples

__all__ = ['lara_attention']


def _lara_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    landmarks_q: torch.Tensor,
    landmarks_k: torch.Tensor,
    weighting: str,
    noise: Optional[torch.Tensor],
    scale: float,
    dropout_p: float,
) -> torch.Tensor:
    dtype = accumulation_dtype(q)
    landmarks_q, landmarks_k = landmarks_q.to(dtype), landmarks_k.to(dtype)
    mean = scale**0.5 * (landmarks_q + landmarks_k)  # μ_c
    proposals, samples = mean.shape[2], 1
    omega = mean
    if noise is not None:
        samples = noise.shape[3]
        omega = (mean.unsqueeze(3) + noise.to(dtype)).flatten(2, 3)  # all samples of a proposal, then the next one's

    total, averages = feature_averages(log_positive_features(k, omega, scale), v)
    log_weights = log_positive_features(q, omega, scale) + total  # the target p_n over N(0, I), up to a constant of n
    # log q_c(ω) / N(ω; 0, I) of every sample under every proposal, (B, h, C·S, C)
    log_proposals = omega @ mean.transpose(-2, -1) - 0.5 * (mean * mean).sum(-1).unsqueeze(-2)
    log_mixture = log_proposals.logsumexp(-1)
    if weighting == 'optimal':
        own = log_proposals.unflatten(2, [proposals, samples]).diagonal(0, 2, 4).transpose(-2, -1).flatten(2)
        # How much more than other queries' a landmark is this query's, against the mean over the landmarks.
        affinity = (scale * q.to(dtype) @ landmarks_q.transpose(-2, -1)).softmax(-2)
        affinity = affinity - affinity.mean(-1, keepdim=True)
        if samples > 1:
            affinity = affinity.repeat_interleave(samples, -1)
        alpha = (own - log_mixture).exp().unsqueeze(-2) + affinity
        log_weights = log_weights + alpha.clamp(min=1e-8).log() - own.unsqueeze(-2)
    else:
        log_weights = log_weights - log_mixture.unsqueeze(-2)
        if weighting == 'biased':
            affinity = scale**0.5 * q.to(dtype) @ mean.transpose(-2, -1)
            log_weights = log_weights + (affinity.repeat_interleave(samples, -1) if samples > 1 else affinity)
    return weigh_samples(log_weights, averages, dropout_p)


def lara_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    feat_size: List[int],
    landmarks_q: torch.Tensor,
    landmarks_k: torch.Tensor,
    weighting: str = 'optimal',
    noise: Optional[torch.Tensor] = None,
    scale: Optional[float] = None,
    dropout_p: float = 0.0,
) -> torch.Tensor:
    """LARA, linear randomized attention (Zheng et al., ICML 2022, arXiv 2204.04667): random features whose directions
    come from C proposals that follow the input, weighted by multiple importance sampling.

        μ_c   = s^½ (q̃_c + k̃_c),    ω_cj ~ q_c = N(μ_c, I)  (ω_c = μ_c without noise)
        w_ncj = α_nc(ω_cj) · N(ω_cj; 0, I) ξ(q̂_n, ω_cj) Σ_m ξ(k̂_m, ω_cj) / q_c(ω_cj)
        y_n   = Σ_cj w_ncj f(ω_cj) / Σ_cj w_ncj

    with one of three weightings of the proposals:

        'balance'  α_c  = q_c(ω) / Σ_c' q_c'(ω), the balance heuristic
        'optimal'  α_nc = q_c(ω) / Σ_c' q_c'(ω) + r_nc - mean_c'(r_nc'), at least 1e-8, with
                   r_nc = softmax over the queries n of s q_n·q̃_c: an approximation of the weights of least variance
        'biased'   α_nc = exp(q̂_n·μ_c) q_c(ω) / Σ_c' q_c'(ω), whose α_nc do not add up to 1

    r_nc is normalised over the queries, as in the code that the authors published. Time and memory grow with N·C·S.

    Args:
        q: Queries `(B, h, N, d)`, any strides.
        k: Keys, like q.
        v: Values, like q.
        feat_size: Grid `(H, W)` with N = H·W; only checked.
        landmarks_q: q̃, `(B, h, C, d)`.
        landmarks_k: k̃, likewise.
        weighting: 'optimal', 'balance' or 'biased'.
        noise: ω_cj - μ_c, `(B, h, C, S, d)` for S samples of each proposal; None in evaluation.
        scale: s; d^(-½) if None.
        dropout_p: Probability to drop a sample's weight for a query; the rest is scaled up.

    Returns:
        `(B, h, N, d)` in q's dtype.

    Raises:
        ValueError: arguments that do not fit each other, or an unknown weighting.
    """
    check_tokens(q, k, v, feat_size)
    check_landmarks(q, landmarks_q, landmarks_k, noise)
    check_dropout(dropout_p)
    if weighting != 'optimal' and weighting != 'balance' and weighting != 'biased':
        raise ValueError(f"weighting must be 'optimal', 'balance' or 'biased', got '{weighting}'")
    if scale is None:
        scale = q.shape[-1] ** -0.5
    if not torch.jit.is_scripting():  # noqa: SIM102
        if not q.is_meta and torch.is_autocast_enabled(q.device.type):
            with torch.autocast(q.device.type, enabled=False):
                return _lara_attention(q, k, v, landmarks_q, landmarks_k, weighting, noise, scale, dropout_p)
    return _lara_attention(q, k, v, landmarks_q, landmarks_k, weighting, noise, scale, dropout_p)
