"""Softmax attention over the whole grid, through PyTorch's scaled_dot_product_attention."""

from typing import Any, Final, List

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module, use_fused_attn

from .attention import GridAttention

__all__ = ['SoftmaxAttention']


@register_notrace_module
class SoftmaxAttention(GridAttention):
    """Multi-head softmax attention on tokens `(B, P + N, C)`, `forward(x, feat_size)`; time grows with N².

    Arguments are those of `GridAttention`. `timm.layers.set_fused_attn` chooses between
    `scaled_dot_product_attention` and the explicit softmax.
    """

    fused_attn: Final[bool]
    takes_prefix_tokens = True

    def __init__(self, dim: int, num_heads: int, **kwargs: Any) -> None:
        super().__init__(dim, num_heads, **kwargs)
        self.fused_attn = use_fused_attn()

    def attend(self, qkv: torch.Tensor, feat_size: List[int]) -> torch.Tensor:
        q, k, v = qkv.unbind(0)
        return self.attend_apart(q, k, v, feat_size)

    def attend_apart(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, feat_size: List[int]) -> torch.Tensor:
        if self.fused_attn:
            return F.scaled_dot_product_attention(q, k, v, dropout_p=self.drop_rate())
        attn = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)
        return self.attn_drop(attn.softmax(-1)) @ v
