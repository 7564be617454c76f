"""An attention, as `test_additions.py` puts it into a copy of `evavit/layers/`."""

from typing import Any, List

import torch

from .attention import GridAttention


class ToyAttention(GridAttention):
    """The values, times a factor."""

    def __init__(self, dim: int, num_heads: int, *, factor: float = 2.0, **kwargs: Any) -> None:
        super().__init__(dim, num_heads, **kwargs)
        self.factor = factor

    def attend(self, qkv: torch.Tensor, feat_size: List[int]) -> torch.Tensor:
        return self.factor * qkv[2]
