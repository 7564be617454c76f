"""Combiner: full attention as a conditional expectation over a partition of the tokens.

Paper: `Combiner: Full Attention Transformer with Sparse Computation Cost`, Ren et al., NeurIPS 2021 -
https://arxiv.org/abs/2107.05768
"""

from typing import Any, List

import torch
from timm.layers import RelPosBias, register_notrace_module
from torch import nn

from evavit.ops.checks import check_tokens, check_whole
from evavit.ops.grid import (
    from_windows,
    joint_attention,
    softmax,
    static_size,
    to_windows,
    window_logits,
    window_mask,
    window_shape,
)

from .attention import GridAttention, check_flags, device_and_dtype

__all__ = ['CombinerAttention']


@register_notrace_module  # torch.fx keeps it as one node: spans follow the size of the grid
class CombinerAttention(GridAttention):
    """Multi-head Combiner-Fixed attention with DeepSets-Max summaries, `forward(x, feat_size)`, any grid.

    The grid is cut into spans Ω of window_size × window_size tokens (short ones at the bottom and right edge). A query
    n sees the tokens of its own span Ω(n) directly and each other span through the expectation of its values under a
    distribution that the span's queries share, without a causal mask. With s = d^(-½):

        q_Ω, k_Ω = max over m ∈ Ω of ReLU(W_q q_m), of ReLU(W_k k_m)           per channel (DeepSets-Max)
        v_Ω      = Σ_m p(m | Ω) v_m,  p(m | Ω) = softmax over m ∈ Ω of s q_Ω·k_m      local expectation
        y_n      = softmax over [s q_n·k_m + b(n, m)  for m ∈ Ω(n)] ∪ [s q_n·k_Ω  for Ω ≠ Ω(n)]
                   applied to the values [v_m] ∪ [v_Ω]

    W_q and W_k are d × d, without a bias, shared by the heads. Every token has a weight for every query. Time and
    memory grow with N·(A + N / A) for spans of A tokens: quadratic with a small factor at a fixed A, N^(3/2) at A = √N.
    One span over the grid is softmax attention, and so are spans of one token with `pooling='max'`. The bias b is the
    EVA paper's addition to every attention with a local part.

    Args:
        dim: Channels C.
        num_heads: Heads h; must divide dim.
        window_size: Side of the spans in tokens; 7 gives spans of 49, the EVA paper's number.
        rel_pos_bias: Learned relative position bias inside the span.
        pooling: 'deepsets_max' for q_Ω and k_Ω as above, or 'max' for the maximum alone: W the identity, no ReLU.
        **kwargs: Arguments of `GridAttention`; attn_drop drops the weights of tokens and of spans.

    Raises:
        ValueError: num_heads does not divide dim; window_size is not a whole number of at least 1; an unknown pooling;
            a dropout rate outside 0 to 1.
    """

    traces_any_batch = False

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        window_size: int = 7,
        rel_pos_bias: bool = True,
        pooling: str = 'deepsets_max',
        **kwargs: Any,
    ) -> None:
        super().__init__(dim, num_heads, **kwargs)
        check_flags(rel_pos_bias=rel_pos_bias)
        dd = device_and_dtype(kwargs)
        check_whole('window_size', window_size, 1)
        if pooling not in ('deepsets_max', 'max'):
            raise ValueError(f"pooling must be 'deepsets_max' or 'max', got {pooling!r}")
        self.window_size = window_size
        self.pooling = pooling
        projected = pooling == 'deepsets_max'
        self.pool_q = nn.Linear(self.head_dim, self.head_dim, bias=False, **dd) if projected else None
        self.pool_k = nn.Linear(self.head_dim, self.head_dim, bias=False, **dd) if projected else None
        self.rel_pos = RelPosBias((window_size, window_size), num_heads, **dd) if rel_pos_bias else None

    def extra_repr(self) -> str:
        return f'num_heads={self.num_heads}, window_size={self.window_size}, pooling={self.pooling}'

    def attend(self, qkv: torch.Tensor, feat_size: List[int]) -> torch.Tensor:
        q, k, v = qkv.unbind(0)
        feat_size = static_size(feat_size)
        check_tokens(q, k, v, feat_size)
        window = window_shape(feat_size, self.window_size)
        q = to_windows(q * self.head_dim**-0.5, feat_size, window)
        k = to_windows(k, feat_size, window)
        v = to_windows(v, feat_size, window)
        local = window_logits(
            q,
            k,
            feat_size,
            window,
            self.rel_pos.relative_position_bias_table if self.rel_pos is not None else None,
            self.window_size,
        )

        mask = window_mask(feat_size, window, q.device)
        pool_q, pool_k = q, k  # the scale is in q already: W and ReLU hand it on
        if self.pool_q is not None and self.pool_k is not None:
            pool_q, pool_k = self.pool_q(q).relu().to(q.dtype), self.pool_k(k).relu().to(k.dtype)
        if mask is not None:
            pool_q = pool_q.masked_fill(~mask.unsqueeze(-1), float('-inf'))
            pool_k = pool_k.masked_fill(~mask.unsqueeze(-1), float('-inf'))
        q_span, k_span = pool_q.amax(3), pool_k.amax(3)  # (B, h, spans, d)
        inside = (k @ q_span.unsqueeze(-1)).squeeze(-1)  # (B, h, spans, area)
        if mask is not None:
            inside = inside.masked_fill(~mask, float('-inf'))
        v_span = (softmax(inside, v).unsqueeze(-2) @ v).squeeze(-2)

        spans = (q.flatten(2, 3) @ k_span.transpose(-2, -1)).unflatten(2, [q.shape[2], q.shape[3]])
        own = torch.eye(q.shape[2], dtype=torch.bool, device=q.device).unsqueeze(1)
        spans = spans.masked_fill(own, float('-inf'))
        out = joint_attention(local, spans, v, v_span, self.drop_rate())
        return from_windows(out, feat_size, window)
