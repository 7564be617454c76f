"""Performer: attention through random features.

Paper: `Rethinking Attention with Performers`, Choromanski et al., ICLR 2021 - https://arxiv.org/abs/2009.14794
"""

from typing import Any, List, Optional

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module

from evavit.ops.checks import check_dropout, check_tokens
from evavit.ops.grid import accumulation_dtype
from evavit.ops.random_features import check_directions, feature_averages, log_positive_features, weigh_samples

from .attention import GridAttention, device_and_dtype
from .random_directions import RandomDirections

__all__ = ['PerformerAttention', 'random_feature_attention']


def log_relu_features(x: torch.Tensor, directions: torch.Tensor, scale: float, eps: float = 1e-3) -> torch.Tensor:
    """log(ReLU(ω·scale^½ x / S^½) + eps): the generalised attention of the Performer's paper, which is no softmax."""
    dtype = accumulation_dtype(x)
    projected = (scale**0.5 * x.to(dtype)) @ directions.to(dtype).transpose(-2, -1)
    return ((directions.shape[-2] ** -0.5 * projected).relu() + eps).log()


def _stabilised_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    directions: torch.Tensor,
    scale: float,
    dropout_p: float,
    eps: float = 1e-4,
    least: float = 1e-2,
) -> torch.Tensor:
    """`random_feature_attention` of kind 'stabilised'."""
    dtype = accumulation_dtype(q)
    ratio = directions.shape[-2] ** -0.5
    # ω·x̂ and log ξ. The maximum, unlike one that cancels, counts beside the constants; as Choromanski et al., without
    # a gradient of its own.
    q_hat, k_hat = scale**0.5 * q.to(dtype), scale**0.5 * k.to(dtype)
    q_projected = q_hat @ directions.to(dtype).transpose(-2, -1)
    k_projected = k_hat @ directions.to(dtype).transpose(-2, -1)
    q_peak = q_projected.detach().amax(-1, keepdim=True)
    k_peak = k_projected.detach().amax([-2, -1], keepdim=True)
    q_features = ratio * (q_projected - 0.5 * (q_hat * q_hat).sum(-1, keepdim=True) - q_peak).exp() + eps
    k_features = ratio * (k_projected - 0.5 * (k_hat * k_hat).sum(-1, keepdim=True) - k_peak).exp() + eps
    total = q_features @ k_features.sum(-2).unsqueeze(-1)
    weights = q_features / total.clamp(min=least)
    if dropout_p > 0.0:
        weights = F.dropout(weights, dropout_p)
    return (weights @ (k_features.transpose(-2, -1) @ v.to(dtype))).to(q.dtype)


def _random_feature_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    directions: torch.Tensor,
    kind: str,
    scale: float,
    dropout_p: float,
) -> torch.Tensor:
    if kind == 'stabilised':
        return _stabilised_attention(q, k, v, directions, scale, dropout_p)
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

    computed as the importance sampler of `evavit.ops.random_features`. Time and memory grow with N·S. With positive
    features and ω ~ N(0, I) the error against softmax attention falls as S^(-½).

    'stabilised' is what the published code of the EVA paper computes. There constants count beside small features, so
    large queries and keys give a mean of all values near zero:

        φ(q̂_n) = S^(-½) ξ(q̂_n, ω) / exp(max over ω of ω·q̂_n) + 10^(-4)
        φ(k̂_m) = S^(-½) ξ(k̂_m, ω) / exp(max over ω and all keys of ω·k̂) + 10^(-4)
        y_n    = Σ_m φ(q̂_n)·φ(k̂_m) v_m / max(10^(-2), Σ_m φ(q̂_n)·φ(k̂_m))

    Args:
        q: Queries `(B, h, N, d)`, any strides.
        k: Keys, like q.
        v: Values, like q.
        feat_size: Grid `(H, W)` with N = H·W; only checked, order and neighbourhood play no part.
        directions: ω, `(h, S, d)`.
        kind: 'positive' for ξ, 'stabilised' as above, or 'relu' for ReLU(ω·x) with a small constant.
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
    if kind != 'positive' and kind != 'stabilised' and kind != 'relu':
        raise ValueError(f"kind must be 'positive', 'stabilised' or 'relu', got '{kind}'")
    if scale is None:
        scale = q.shape[-1] ** -0.5
    if not torch.jit.is_scripting():  # noqa: SIM102, TorchScript skips this block, but not a longer condition
        if not q.is_meta and torch.is_autocast_enabled(q.device.type):
            with torch.autocast(q.device.type, enabled=False):  # the precision of every step is chosen here
                return _random_feature_attention(q, k, v, directions, kind, scale, dropout_p)
    return _random_feature_attention(q, k, v, directions, kind, scale, dropout_p)


@register_notrace_module
class PerformerAttention(GridAttention):
    """Multi-head attention through random features on tokens `(B, N, C)`, `forward(x, feat_size)`.

    With φ the features of S directions ω (see `random_feature_attention`) and q̂, k̂ = d^(-¼) q, d^(-¼) k:

        y_n = Σ_m φ(q̂_n)·φ(k̂_m) v_m / Σ_m φ(q̂_n)·φ(k̂_m)

    Time and memory grow with N·S; the grid plays no part. The parameters are softmax attention's. With positive
    features the error against softmax attention falls as S^(-½).

    Args:
        dim: Channels C.
        num_heads: Heads h; must divide dim.
        num_features: S, for each head.
        feature_kind: 'positive' for exp(ω·x - ½‖x‖²), 'stabilised' for the same with the constants of the published
            code, whose weights want it, or 'relu' for ReLU(ω·x).
        orthogonal: Directions orthogonal in blocks of the head dim.
        redraw_interval: Training steps between two draws of the directions, on average; 1 draws in each step, 0 never.
            Evaluation always has the same directions.
        **kwargs: Arguments of `GridAttention`; attn_drop drops a query's weights of the directions.

    Raises:
        ValueError: num_heads does not divide dim; num_features or redraw_interval that are no whole numbers of at least
            1 and 0; an unknown feature_kind; a dropout rate outside 0 to 1.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_features: int = 128,
        feature_kind: str = 'positive',
        orthogonal: bool = True,
        redraw_interval: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(dim, num_heads, **kwargs)
        dd = device_and_dtype(kwargs)
        if feature_kind not in ('positive', 'stabilised', 'relu'):
            raise ValueError(f"feature_kind must be 'positive', 'stabilised' or 'relu', got {feature_kind!r}")
        self.feature_kind = feature_kind
        self.directions = RandomDirections(num_heads, num_features, self.head_dim, orthogonal, redraw_interval, **dd)

    def extra_repr(self) -> str:
        return f'num_heads={self.num_heads}, feature_kind={self.feature_kind}'

    def attend(self, qkv: torch.Tensor, feat_size: List[int]) -> torch.Tensor:
        q, k, v = qkv.unbind(0)
        return random_feature_attention(
            q,
            k,
            v,
            feat_size,
            self.directions(),
            self.feature_kind,
            dropout_p=self.drop_rate(),
        )
