"""Scatterbrain: random features, corrected inside the query's window so that the tokens there count exactly.

Paper: `Scatterbrain: Unifying Sparse and Low-rank Attention Approximation`, Chen et al., NeurIPS 2021 -
https://arxiv.org/abs/2110.15343; with windows as the sparse part as in EVA's paper, Appendix E.1 and G.5
"""

from typing import List

import torch
from timm.layers import RelPosBias, register_notrace_module

from evavit.ops import scatterbrain_attention
from evavit.ops.checks import check_whole

from .attention import GridAttention
from .random_directions import RandomDirections

__all__ = ['ScatterbrainAttention']


@register_notrace_module
class ScatterbrainAttention(GridAttention):
    """Multi-head Scatterbrain on tokens `(B, N, C)` with their grid, `forward(x, feat_size)`.

    With s = d^(-½), E^n the tokens of the window of query n, b the bias of an offset and φ positive random features:

               Σ_{m ∈ E^n} exp(s q_n·k_m + b(n, m)) v_m + Σ_{m ∉ E^n} φ(q̂_n)·φ(k̂_m) v_m
        y_n = ---------------------------------------------------------------------------
               Σ_{m ∈ E^n} exp(s q_n·k_m + b(n, m))     + Σ_{m ∉ E^n} φ(q̂_n)·φ(k̂_m)

    (`evavit.ops.scatterbrain_attention`). Time and memory grow with N·(num_features + window_size²), on any grid. A
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
        qkv_bias: Bias of the q, k, v projection.
        proj_bias: Bias of the output projection.
        attn_drop: Dropout rate of the attention weights, of tokens and directions alike.
        proj_drop: Dropout rate after the output projection.

    Raises:
        ValueError: num_heads does not divide dim; num_features, window_size or redraw_interval that are no whole
            numbers of at least 1, 1 and 0; a dropout rate outside 0 to 1.
    """

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
        qkv_bias: bool = True,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__(
            dim, num_heads, qkv_bias=qkv_bias, proj_bias=proj_bias, attn_drop=attn_drop, proj_drop=proj_drop, **dd
        )
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
            rel_pos_bias=self.rel_pos.get_bias().squeeze(0) if self.rel_pos is not None else None,
            window_size=self.window_size,
            dropout_p=self.attn_drop.p if self.training else 0.0,
        )
