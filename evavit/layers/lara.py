"""LARA, linear randomized attention: random features whose directions follow the input.

Paper: `Linear Complexity Randomized Self-attention Mechanism`, Zheng et al., ICML 2022 -
https://arxiv.org/abs/2204.04667
"""

import math
from typing import Any, ClassVar, Dict, List, Optional

import torch
from timm.layers import register_notrace_module
from torch import nn

from evavit.ops.checks import check_dropout, check_tokens, check_whole
from evavit.ops.grid import accumulation_dtype, cell_means, cell_shape, softmax, static_size
from evavit.ops.random_features import feature_averages, log_positive_features, weigh_samples

from .attention import GridAttention, check_flags, device_and_dtype

__all__ = ['LaraAttention', 'lara_attention']


def check_landmarks(
    q: torch.Tensor, landmarks_q: torch.Tensor, landmarks_k: torch.Tensor, noise: Optional[torch.Tensor]
) -> None:
    """Landmarks are `(B, h, C, d)`, the noise of their samples `(B, h, C, S, d)`."""
    B, h, d = q.shape[0], q.shape[1], q.shape[3]
    if (
        landmarks_q.dim() != 4
        or landmarks_q.shape != landmarks_k.shape
        or list(landmarks_q.shape) != [B, h, landmarks_q.shape[2], d]
    ):
        raise ValueError(
            f'landmarks_q and landmarks_k must be (batch, heads, landmarks, head_dim) = ({B}, {h}, C, '
            f'{d}), got {list(landmarks_q.shape)} and {list(landmarks_k.shape)}'
        )
    C = landmarks_q.shape[2]
    if noise is not None and (noise.dim() != 5 or list(noise.shape) != [B, h, C, noise.shape[3], d]):
        raise ValueError(
            f'noise must be (batch, heads, landmarks, samples, head_dim) = ({B}, {h}, {C}, S, {d}), '
            f'got {list(noise.shape)}'
        )


def _lara_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    landmarks_q: torch.Tensor,
    landmarks_k: torch.Tensor,
    weighting: str,
    alpha_coeff: float,
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
        alpha = (own - log_mixture).exp().unsqueeze(-2) + alpha_coeff * affinity
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
    alpha_coeff: float = 2.0,
    noise: Optional[torch.Tensor] = None,
    scale: Optional[float] = None,
    dropout_p: float = 0.0,
) -> torch.Tensor:
    """LARA, linear randomized attention (Zheng et al., ICML 2022, arXiv 2204.04667): random features whose directions
    come from C proposals that follow the input, weighted by multiple importance sampling.

        μ_c   = s^½ (q̃_c + k̃_c),    ω_cj = μ_c + noise,    q_c = N(μ_c, I)  (ω_c = μ_c without noise)
        w_ncj = α_nc(ω_cj) · N(ω_cj; 0, I) ξ(q̂_n, ω_cj) Σ_m ξ(k̂_m, ω_cj) / q_c(ω_cj)
        y_n   = Σ_cj w_ncj f(ω_cj) / Σ_cj w_ncj

    with one of three weightings of the proposals:

        'balance'  α_c  = q_c(ω) / Σ_c' q_c'(ω), the balance heuristic
        'optimal'  α_nc = q_c(ω) / Σ_c' q_c'(ω) + a (r_nc - mean_c'(r_nc')), at least 1e-8, with a = alpha_coeff and
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
        alpha_coeff: a of 'optimal'; 2 as the authors launched it on ImageNet.
        noise: ω_cj - μ_c, `(B, h, C, S, d)` for S samples of each proposal; None in evaluation. The densities q_c stay
            of unit variance, whatever the noise's is.
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
                return _lara_attention(
                    q, k, v, landmarks_q, landmarks_k, weighting, alpha_coeff, noise, scale, dropout_p
                )
    return _lara_attention(q, k, v, landmarks_q, landmarks_k, weighting, alpha_coeff, noise, scale, dropout_p)


class Landmarks(nn.Module):
    """Landmarks `(B, h, C, d)` of tokens `(B, h, N, d)`: the mean of each cell of the grid, projected and normalised.

    Args:
        dim: Channels that the projection sees: a head's, one projection shared by the heads, or all heads' together.
        landmark_grid: Cells asked for along each axis.
    """

    def __init__(self, dim: int, landmark_grid: int, **dd: Any) -> None:
        super().__init__()
        self.dim = dim
        self.landmark_grid = landmark_grid
        self.proj = nn.Linear(dim, dim, **dd)
        self.norm = nn.LayerNorm(dim, **dd)

    def forward(self, x: torch.Tensor, feat_size: List[int]) -> torch.Tensor:
        means = cell_means(x, feat_size, cell_shape(feat_size, self.landmark_grid)).to(self.norm.weight.dtype)
        if self.dim == x.shape[-1]:
            return self.norm(self.proj(means))
        means = self.norm(self.proj(means.transpose(1, 2).flatten(2)))
        return means.unflatten(-1, [x.shape[1], x.shape[3]]).transpose(1, 2)


def mix_landmarks(landmarks: torch.Tensor) -> torch.Tensor:
    """Softmax attention of landmarks `(B, h, C, d)` to themselves, Σ_c' softmax_c'(d^(-½) k̃_c·k̃_c') k̃_c'."""
    logits = landmarks.shape[-1] ** -0.5 * landmarks @ landmarks.transpose(-2, -1)
    return softmax(logits, landmarks) @ landmarks


@register_notrace_module
class LaraAttention(GridAttention):
    """Multi-head LARA on tokens `(B, N, C)` with their grid, `forward(x, feat_size)`; see `lara_attention`.

        q̃_c, k̃_c = LN(W · mean of q, k over cell c + b)
        k̃_c ← Σ_c' softmax_c'(d^(-½) k̃_c·k̃_c') k̃_c'                        with landmark_mixing
        y_n = Σ_c w_nc f(ω_c) / Σ_c w_nc,    ω_c = μ_c + noise_std · ε,    q_c = N(μ_c, I),    μ_c = d^(-¼) (q̃_c + k̃_c)
        w_nc = α_nc N(ω_c; 0, I) ξ(q̂_n, ω_c) Σ_m ξ(k̂_m, ω_c) / q_c(ω_c)

    The defaults are what the authors launched on ImageNet, for the rows of the EVA paper's Tables 1 and 2: 'optimal'
    weights with a coefficient of 2, landmark keys that attend to one another, and noise of d^(-¼) in these units. The
    pyramids have one projection of all channels and no mixing. LARA as its paper writes it, without mixing, is
    `landmark_mixing=False, alpha_coeff=1.0, noise_std=1.0`.

    The cells are EVA's: ceil(L / landmark_grid) tokens along an axis of L tokens, on any grid. Time and memory grow
    with N·C. In training the samples come from the default generator of the input's device; evaluation takes the
    proposals' means.

    Args:
        dim: Channels C.
        num_heads: Heads h; must divide dim.
        landmark_grid: Landmarks asked for along each axis: 7 is at most 49 landmarks.
        landmark_proj: 'head' for one projection of a head's channels, shared by the heads, or 'channels' for one of all
            channels, which pyramids have by default.
        landmark_mixing: Let the landmark keys attend to one another; pyramids do not by default.
        weighting: α of the proposals: 'optimal', 'balance' or 'biased'.
        alpha_coeff: How much the queries' affinities count in 'optimal', at least 0.
        noise_std: Standard deviation of the noise in training, at least 0; head_dim^(-¼) if None.
        num_samples: Samples of each proposal in training.
        antithetic: Draw them in pairs μ ± ε; num_samples must then be even.
        **kwargs: Arguments of `GridAttention`; attn_drop drops a query's weights of the samples.

    Raises:
        ValueError: num_heads does not divide dim; landmark_grid or num_samples that are no whole numbers of at least 1,
            or an odd num_samples with antithetic; an unknown landmark_proj or weighting; a negative alpha_coeff or
            noise_std; a dropout rate outside 0 to 1.
    """

    pyramid_options: ClassVar[Dict[str, Any]] = {
        'landmark_proj': 'channels',
        'landmark_mixing': False,
    }  # the published 39.9 M

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        landmark_grid: int = 7,
        landmark_proj: str = 'head',
        landmark_mixing: bool = True,
        weighting: str = 'optimal',
        alpha_coeff: float = 2.0,
        noise_std: Optional[float] = None,
        num_samples: int = 1,
        antithetic: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(dim, num_heads, **kwargs)
        check_flags(landmark_mixing=landmark_mixing, antithetic=antithetic)
        dd = device_and_dtype(kwargs)
        check_whole('landmark_grid', landmark_grid, 1)
        check_whole('num_samples', num_samples, 1)
        for name, value, choices in (
            ('landmark_proj', landmark_proj, ('head', 'channels')),
            ('weighting', weighting, ('optimal', 'balance', 'biased')),
        ):
            if value not in choices:
                raise ValueError(f'{name} must be one of {", ".join(choices)}, got {value!r}')
        noise_std = self.head_dim**-0.25 if noise_std is None else noise_std
        for name, number in (('alpha_coeff', alpha_coeff), ('noise_std', noise_std)):
            if not 0 <= number < math.inf:
                raise ValueError(f'{name} must be a number of at least 0, got {number}')
        if antithetic and num_samples % 2:
            raise ValueError(f'antithetic draws samples in pairs: num_samples must be even, got {num_samples}')
        self.landmark_mixing = landmark_mixing
        self.weighting = weighting
        self.alpha_coeff = float(alpha_coeff)
        self.noise_std = float(noise_std)
        self.num_samples = num_samples
        self.antithetic = antithetic
        self.landmark_grid = landmark_grid
        landmark_dim = dim if landmark_proj == 'channels' else self.head_dim
        self.landmarks_q = Landmarks(landmark_dim, landmark_grid, **dd)
        self.landmarks_k = Landmarks(landmark_dim, landmark_grid, **dd)

    def extra_repr(self) -> str:
        return (
            f'num_heads={self.num_heads}, landmark_grid={self.landmark_grid}, landmark_mixing={self.landmark_mixing}, '
            f'weighting={self.weighting}, alpha_coeff={self.alpha_coeff:g}, noise_std={self.noise_std:g}, '
            f'num_samples={self.num_samples}, antithetic={self.antithetic}'
        )

    def attend(self, qkv: torch.Tensor, feat_size: List[int]) -> torch.Tensor:
        q, k, v = qkv.unbind(0)
        feat_size = static_size(feat_size)
        check_tokens(q, k, v, feat_size)
        landmarks_q, landmarks_k = self.landmarks_q(q, feat_size), self.landmarks_k(k, feat_size)
        if self.landmark_mixing:
            landmarks_k = mix_landmarks(landmarks_k)
        noise: Optional[torch.Tensor] = None
        if self.training and self.noise_std > 0.0:
            shape = landmarks_q.shape
            dtype = accumulation_dtype(q)
            drawn = self.num_samples // 2 if self.antithetic else self.num_samples
            noise = self.noise_std * torch.randn(
                [shape[0], shape[1], shape[2], drawn, shape[3]], dtype=dtype, device=q.device
            )
            if self.antithetic:
                noise = torch.cat([noise, -noise], 3)
        return lara_attention(
            q,
            k,
            v,
            feat_size,
            landmarks_q,
            landmarks_k,
            self.weighting,
            self.alpha_coeff,
            noise,
            dropout_p=self.drop_rate(),
        )
