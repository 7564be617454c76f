"""Local attention: softmax inside the query's own window, nothing outside of it.

Papers: `Generating Long Sequences with Sparse Transformers`, Child et al., 2019 - https://arxiv.org/abs/1904.10509; in
two dimensions with a relative position bias as in `Swin Transformer` (windows never shifted), Liu et al., 2021 -
https://arxiv.org/abs/2103.14030
"""

from typing import Final, List

import torch
from timm.layers import RelPosBias, register_notrace_module, use_fused_attn

from evavit.ops import eva_attention_packed
from evavit.ops.checks import check_whole

from .attention import GridAttention

__all__ = ['LocalAttention']


@register_notrace_module
class LocalAttention(GridAttention):
    """Multi-head attention inside windows, on tokens `(B, N, C)` with their grid, `forward(x, feat_size)`.

    With s = d^(-½), E^n the tokens of the window of query n and b the bias of the offset between two tokens:

        y_n = Σ_m softmax over m ∈ E^n of (s q_n·k_m + b(n, m)) · v_m

    This is EVA without cells (`evavit.ops.eva_attention`): any grid, where a window that runs over the edge holds its
    real tokens only. Time and memory grow with N·window_size². A window over the whole grid without a bias is softmax
    attention.

    Args:
        dim: Channels C.
        num_heads: Heads h; must divide dim.
        window_size: Side of the windows in tokens, at least 1.
        rel_pos_bias: Learned relative position bias inside the window.
        qkv_bias: Bias of the q, k, v projection.
        proj_bias: Bias of the output projection.
        attn_drop: Dropout rate of the attention weights.
        proj_drop: Dropout rate after the output projection.

    Raises:
        ValueError: num_heads does not divide dim; a window_size that is not a whole number of at least 1; a dropout
            rate outside 0 to 1.
    """

    fused_attn: Final[bool]

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        window_size: int = 7,
        rel_pos_bias: bool = True,
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
        self.fused_attn = use_fused_attn()  # the kernels of EVA
        self.rel_pos = RelPosBias((window_size, window_size), num_heads, **dd) if rel_pos_bias else None

    def extra_repr(self) -> str:
        return f'num_heads={self.num_heads}, window_size={self.window_size}'

    def attend(self, qkv: torch.Tensor, feat_size: List[int]) -> torch.Tensor:
        return eva_attention_packed(
            qkv,
            feat_size,
            rel_pos_bias=self.rel_pos.get_bias().squeeze(0) if self.rel_pos is not None else None,
            window_size=self.window_size,
            partition_grid=0,
            dropout_p=self.attn_drop.p if self.training else 0.0,
            fused=self.fused_attn,
        )
