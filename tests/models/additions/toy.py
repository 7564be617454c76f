"""An attention, as `test_additions.py` puts it into a copy of `evavit/layers/`."""

from typing import Any, List

import torch
from timm.layers import register_notrace_module

from evavit.ops.checks import check_tokens
from evavit.ops.grid import static_size

from .attention import GridAttention


@register_notrace_module
class ToyAttention(GridAttention):
    """The values, times a factor."""

    def __init__(self, dim: int, num_heads: int, *, factor: float = 2.0, **kwargs: Any) -> None:
        super().__init__(dim, num_heads, **kwargs)
        self.factor = factor

    def attend(self, qkv: torch.Tensor, feat_size: List[int]) -> torch.Tensor:
        q, k, v = qkv.unbind(0)
        check_tokens(q, k, v, static_size(feat_size))
        return self.factor * self.attn_drop(v)
