"""Softmax attention of a few queries or to a few keys, with PyTorch's fused operator or without."""

import torch
import torch.nn.functional as F

from evavit.ops.common.torch_private import is_forward_mode, is_transforming
from evavit.ops.grid import accumulation_dtype

__all__ = ['softmax_attention']


def softmax_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, dropout_p: float, fused: bool
) -> torch.Tensor:
    """softmax(scale · q kᵀ) v for `(B, h, ..., d)`, in q's dtype; written for TorchScript as well.

    Args:
        q: Queries.
        k: Keys, in q's dtype.
        v: Values, in q's dtype.
        scale: Factor of the logits.
        dropout_p: Probability to drop a weight.
        fused: Take `scaled_dot_product_attention`, which has first derivatives of reverse mode alone, unless a
            transform of torch.func or forward-mode differentiation is at work. False for products, which have all.
    """
    if not torch.jit.is_scripting():
        fused = fused and not is_transforming() and not is_forward_mode()
    if fused:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, scale=scale)
    dtype = accumulation_dtype(q)
    # float16 ends at 65,504, before the logits do; bfloat16 has the range of float32.
    logit_dtype = dtype if q.dtype == torch.float16 else q.dtype
    logits = (scale * q.to(logit_dtype)) @ k.to(logit_dtype).transpose(-2, -1)
    attn = logits.to(dtype).softmax(-1).to(q.dtype)
    if dropout_p > 0.0:
        attn = F.dropout(attn, dropout_p)
    return attn @ v
