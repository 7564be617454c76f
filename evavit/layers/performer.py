"""Performer: attention through random features.

Paper: `Rethinking Attention with Performers`, Choromanski et al., ICLR 2021 - https://arxiv.org/abs/2009.14794
"""

from typing import List

import torch
from timm.layers import register_notrace_module

from evavit.ops import random_feature_attention

from .attention import GridAttention
from .random_directions import RandomDirections

__all__ = ['PerformerAttention']


@register_notrace_module
class PerformerAttention(GridAttention):
    """Multi-head attention through random features on tokens `(B, N, C)`, `forward(x, feat_size)`.

    With φ the features of S directions ω (see `evavit.ops.random_feature_attention`) and q̂, k̂ = d^(-¼) q, d^(-¼) k:

        y_n = Σ_m φ(q̂_n)·φ(k̂_m) v_m / Σ_m φ(q̂_n)·φ(k̂_m)

    Time and memory grow with N·S, on any grid, which plays no part. No parameters beyond softmax attention's. With
    positive features it approaches softmax attention as S^(-½).

    Args:
        dim: Channels C.
        num_heads: Heads h; must divide dim.
        num_features: S, for each head.
        feature_kind: 'positive' for exp(ω·x - ½‖x‖²), or 'relu' for ReLU(ω·x).
        orthogonal: Directions orthogonal in blocks of the head dim.
        redraw_interval: Training steps between two draws of the directions, on average; 1 draws in each step, 0 never.
            Evaluation always has the same directions.
        qkv_bias: Bias of the q, k, v projection.
        proj_bias: Bias of the output projection.
        attn_drop: Dropout rate of a query's weights of the directions.
        proj_drop: Dropout rate after the output projection.

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
        if feature_kind not in ('positive', 'relu'):
            raise ValueError(f"feature_kind must be 'positive' or 'relu', got {feature_kind!r}")
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
            dropout_p=self.attn_drop.p if self.training else 0.0,
        )
