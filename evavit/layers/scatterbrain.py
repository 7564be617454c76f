"""Scatterbrain: random features, corrected inside the query's window so that the tokens there count exactly.

Paper: `Scatterbrain: Unifying Sparse and Low-rank Attention Approximation`, Chen et al., NeurIPS 2021 -
https://arxiv.org/abs/2110.15343; with windows as the sparse part as in EVA's paper, Appendix E.1 and G.5
"""

import math
from typing import Any, List, Optional

import torch
import torch.nn.functional as F
from timm.layers import RelPosBias, register_notrace_module

from evavit.ops.checks import check_bias_table, check_dropout, check_tokens, check_whole
from evavit.ops.grid import (
    accumulation_dtype,
    from_windows,
    static_size,
    to_windows,
    window_logits,
    window_mask,
    window_shape,
)
from evavit.ops.random_features import check_directions, log_positive_features

from .attention import GridAttention, check_flags, device_and_dtype
from .random_directions import RandomDirections

__all__ = ['ScatterbrainAttention', 'scatterbrain_attention']


def _sum_of_others(x: torch.Tensor) -> torch.Tensor:
    """For each window of `(B, h, windows, …)` the sum over all other windows; adds only, so that no digits cancel."""
    first = torch.zeros_like(x[:, :, :1])
    before = torch.cat([first, x[:, :, :-1].cumsum(2)], 2)
    after = torch.cat([x[:, :, 1:].flip(2).cumsum(2).flip(2), first], 2)
    return before + after


def _scatterbrain_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    feat_size: List[int],
    directions: torch.Tensor,
    rel_pos_bias: Optional[torch.Tensor],
    window_size: int,
    scale: float,
    dropout_p: float,
) -> torch.Tensor:
    dtype = accumulation_dtype(q)
    window = window_shape(feat_size, window_size)
    area = window[0] * window[1]
    log_k = log_positive_features(k, directions, scale)
    log_q = log_positive_features(q, directions, scale)
    peak = log_k.detach().amax(-2).unsqueeze(2).unsqueeze(2)  # (B, h, 1, 1, S)
    xi = (to_windows(log_k, feat_size, window) - peak).exp()  # (B, h, windows, area, S)
    mask = window_mask(feat_size, window, q.device)
    if mask is not None:
        xi = xi.masked_fill(~mask.unsqueeze(-1), 0.0)
    values = to_windows(v, feat_size, window)

    # What each direction sees outside of a window: the keys' total and their values' average.
    total = _sum_of_others(xi.sum(3))
    averages = _sum_of_others(xi.transpose(-2, -1) @ values.to(dtype))
    least = 1e-30  # the largest weight is 1
    averages = averages / total.clamp(min=least).unsqueeze(-1)
    log_total = total.clamp(min=least).log().masked_fill(total < least, float('-inf'))

    # φ(q)·φ(k) is a mean over the directions, which counts beside exact weights: hence - log S.
    far = to_windows(log_q, feat_size, window) + (log_total.unsqueeze(3) + peak - math.log(directions.shape[-2]))
    logit_dtype = dtype if q.dtype == torch.float16 else q.dtype  # float16 ends at 65,504, before the logits do
    near = window_logits(
        scale * to_windows(q, feat_size, window).to(logit_dtype),
        to_windows(k, feat_size, window).to(logit_dtype),
        feat_size,
        window,
        rel_pos_bias,
        window_size,
    )
    attn = torch.cat([near, far], -1).softmax(-1).to(q.dtype)
    if dropout_p > 0.0:
        attn = F.dropout(attn, dropout_p)
    out = attn[..., :area] @ values + attn[..., area:] @ averages.to(q.dtype)
    return from_windows(out, feat_size, window)


def scatterbrain_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    feat_size: List[int],
    directions: torch.Tensor,
    rel_pos_bias: Optional[torch.Tensor] = None,
    window_size: int = 7,
    scale: Optional[float] = None,
    dropout_p: float = 0.0,
) -> torch.Tensor:
    """Scatterbrain (Chen et al., NeurIPS 2021, arXiv 2110.15343): exact inside the query's window E^n, positive random
    features elsewhere; Equation (30) of the EVA paper, Appendix G.5.

               Σ_{m ∈ E^n} exp(s q_n·k_m + b(n, m)) v_m + Σ_{m ∉ E^n} φ(q̂_n)·φ(k̂_m) v_m
        y_n = ---------------------------------------------------------------------------
               Σ_{m ∈ E^n} exp(s q_n·k_m + b(n, m))     + Σ_{m ∉ E^n} φ(q̂_n)·φ(k̂_m)

    The sums outside a window are added up from the other windows' sums and not taken as a difference, which could round
    to less than nothing. Time and memory grow with N·S and with N·window_size². A window over the whole grid makes it
    softmax attention.

    Args:
        q: Queries `(B, h, N, d)`, any strides.
        k: Keys, like q.
        v: Values, like q.
        feat_size: Grid `(H, W)` with N = H·W, tokens in raster order.
        directions: ω, `(h, S, d)`.
        rel_pos_bias: The table of b, `((2·window_size - 1)², h)`, as `timm.layers.RelPosBias` keeps it. None for no
            bias.
        window_size: Side of a window in tokens, at least 1.
        scale: s; d^(-½) if None.
        dropout_p: Probability to drop the weight of a token or a direction; the rest is scaled up.

    Returns:
        `(B, h, N, d)` in q's dtype.

    Raises:
        ValueError: arguments that do not fit each other.
    """
    feat_size = static_size(feat_size)
    check_tokens(q, k, v, feat_size)
    check_directions(q, directions)
    if window_size < 1:
        raise ValueError(f'window_size must be at least 1, got {window_size}')
    check_bias_table(q.shape[1], window_size, rel_pos_bias)
    check_dropout(dropout_p)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    if not torch.jit.is_scripting():  # noqa: SIM102
        if not q.is_meta and torch.is_autocast_enabled(q.device.type):
            with torch.autocast(q.device.type, enabled=False):
                return _scatterbrain_attention(
                    q, k, v, feat_size, directions, rel_pos_bias, window_size, scale, dropout_p
                )
    return _scatterbrain_attention(q, k, v, feat_size, directions, rel_pos_bias, window_size, scale, dropout_p)


@register_notrace_module
class ScatterbrainAttention(GridAttention):
    """Multi-head Scatterbrain on tokens `(B, N, C)` with their grid, `forward(x, feat_size)`.

    With s = d^(-½), E^n the tokens of the window of query n, b the bias of an offset and φ positive random features:

               Σ_{m ∈ E^n} exp(s q_n·k_m + b(n, m)) v_m + Σ_{m ∉ E^n} φ(q̂_n)·φ(k̂_m) v_m
        y_n = ---------------------------------------------------------------------------
               Σ_{m ∈ E^n} exp(s q_n·k_m + b(n, m))     + Σ_{m ∉ E^n} φ(q̂_n)·φ(k̂_m)

    (`scatterbrain_attention`). Time and memory grow with N·(num_features + window_size²), on any grid. A
    window over the whole grid without a bias is softmax attention.

    Args:
        dim: Channels C.
        num_heads: Heads h; must divide dim.
        num_features: Random features for each head.
        window_size: Side of the windows in tokens, at least 1.
        rel_pos_bias: Learned relative position bias inside the window; the random features have none.
        orthogonal: Directions orthogonal in blocks of the head dim.
        redraw_interval: Training steps between two draws of the directions, on average; 1 draws in each step, 0 never.
            Evaluation always has the same directions.
        **kwargs: Arguments of `GridAttention`; attn_drop drops the weights of tokens and of directions.

    Raises:
        ValueError: num_heads does not divide dim; num_features, window_size or redraw_interval that are no whole
            numbers of at least 1, 1 and 0; a dropout rate outside 0 to 1.
    """

    traces_any_batch = False

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_features: int = 96,
        window_size: int = 7,
        rel_pos_bias: bool = True,
        orthogonal: bool = True,
        redraw_interval: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(dim, num_heads, **kwargs)
        check_flags(rel_pos_bias=rel_pos_bias)
        dd = device_and_dtype(kwargs)
        check_whole('window_size', window_size, 1)
        self.window_size = window_size
        self.directions = RandomDirections(num_heads, num_features, self.head_dim, orthogonal, redraw_interval, **dd)
        self.rel_pos = RelPosBias((window_size, window_size), num_heads, **dd) if rel_pos_bias else None

    def extra_repr(self) -> str:
        return f'num_heads={self.num_heads}, window_size={self.window_size}'

    def attend(self, qkv: torch.Tensor, feat_size: List[int]) -> torch.Tensor:
        q, k, v = qkv.unbind(0)
        return scatterbrain_attention(
            q,
            k,
            v,
            feat_size,
            self.directions(),
            rel_pos_bias=self.rel_pos.relative_position_bias_table if self.rel_pos is not None else None,
            window_size=self.window_size,
            dropout_p=self.drop_rate(),
        )
