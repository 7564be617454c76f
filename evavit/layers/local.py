"""Local attention: softmax inside the query's own window, nothing outside of it.

Papers: `Generating Long Sequences with Sparse Transformers`, Child et al., 2019 - https://arxiv.org/abs/1904.10509; in
two dimensions with a relative position bias as in `Swin Transformer` (windows never shifted), Liu et al., 2021 -
https://arxiv.org/abs/2103.14030
"""

from typing import Any, Final, List, Optional

import torch
from timm.layers import RelPosBias, register_notrace_module, use_fused_attn

from evavit.ops import eva_attention_packed
from evavit.ops.checks import check_whole
from evavit.ops.eva import EVA

from .attention import GridAttention, check_flags
from .eva import eva_layer_case

__all__ = ['LocalAttention']


@register_notrace_module
class LocalAttention(GridAttention):
    """Multi-head attention inside windows, on tokens `(B, N, C)` with their grid, `forward(x, feat_size)`.

    With s = d^(-½), E^n the tokens of the window of query n and b the bias of the offset between two tokens:

        y_n = Σ_m softmax over m ∈ E^n of (s q_n·k_m + b(n, m)) · v_m

    This is EVA without cells (`evavit.ops.eva_attention`), whose kernels run where they can; `backend` and `extra_repr`
    say which. Any grid, where a window that runs over the edge holds its real tokens only. Prefix tokens are seen by
    all and see all. Time and memory grow with N·window_size². A window over the whole grid without a bias is softmax
    attention.

    Args:
        dim: Channels C.
        num_heads: Heads h; must divide dim.
        window_size: Side of the windows in tokens, at least 1.
        rel_pos_bias: Learned relative position bias inside the window.
        **kwargs: qkv_bias, proj_bias, attn_drop, proj_drop, device and dtype of `GridAttention`.

    Raises:
        ValueError: num_heads does not divide dim; a window_size that is not a whole number of at least 1; a dropout
            rate outside 0 to 1.
    """

    fused_attn: Final[bool]
    takes_prefix_tokens = True

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        window_size: int = 7,
        rel_pos_bias: bool = True,
        device: Optional[torch.device] = None,
        dtype: Optional[torch.dtype] = None,
        **kwargs: Any,
    ) -> None:
        dd: Any = {'device': device, 'dtype': dtype}
        super().__init__(dim, num_heads, **kwargs, **dd)
        check_flags(rel_pos_bias=rel_pos_bias)
        check_whole('window_size', window_size, 1)
        self.window_size = window_size
        self.fused_attn = use_fused_attn()  # the kernels of EVA
        self.rel_pos = RelPosBias((window_size, window_size), num_heads, **dd) if rel_pos_bias else None

    @property
    @torch.jit.unused
    def backend(self) -> str:
        """The code that runs where the layer is, as in `EvaAttention`: 'triton' or 'plain'."""
        return EVA.name(eva_layer_case(self, self.window_size, 0)) if self.fused_attn else 'plain'

    def extra_repr(self) -> str:
        case = eva_layer_case(self, self.window_size, 0)
        backend = EVA.describe(case) if self.fused_attn else 'plain (fused_attn is False)'
        return f'num_heads={self.num_heads}, window_size={self.window_size}, backend={backend}'

    def attend(self, qkv: torch.Tensor, feat_size: List[int]) -> torch.Tensor:
        return eva_attention_packed(
            qkv,
            feat_size,
            rel_pos_bias=self.rel_pos.relative_position_bias_table if self.rel_pos is not None else None,
            window_size=self.window_size,
            partition_grid=0,
            dropout_p=self.drop_rate(),
            fused=self.fused_attn,
            num_prefix_tokens=self.num_prefix_tokens,
        )
