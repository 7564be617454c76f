"""What the attentions share: the projections around a function of q, k, v on the token grid."""

from typing import Any, ClassVar, Dict, List, Optional, Sequence

import torch
from torch import nn

__all__ = ['GridAttention', 'check_heads', 'device_and_dtype']


def check_heads(dim: int, num_heads: int) -> None:
    """Raise ValueError unless num_heads divides dim."""
    if not isinstance(num_heads, int) or num_heads < 1 or dim % num_heads:
        raise ValueError(f'num_heads {num_heads} does not divide dim {dim}; choose a divisor')


def device_and_dtype(kwargs: Dict[str, Any]) -> Dict[str, Any]:
    """device and dtype of a `GridAttention`'s keyword arguments, for the parameters that a subclass adds."""
    return {key: kwargs.get(key) for key in ('device', 'dtype')}


class GridAttention(nn.Module):
    """Base class of the multi-head attentions: `forward(x, feat_size)` on tokens `(B, N, C)` of an H × W grid.

    Projects to q, k, v, hands them to `attend` as one tensor, merges the heads and projects back. A subclass implements
    `attend`. Its own options are keyword-only, as the models take them by their names; it hands on all others.

    A subclass whose weights hold for one grid alone sets `fixed_grid`. The models then give it their grid as the
    keyword-only argument `feat_size`, call `set_feat_size(feat_size)` to change it, and refuse images of any size; its
    `attend` refuses any other grid with a message that names both. One with other defaults in a pyramid sets
    `pyramid_options`, option → default.

    Args:
        dim: Channels C.
        num_heads: Heads h; must divide dim.
        qkv_bias: Bias of the q, k, v projection.
        proj_bias: Bias of the output projection.
        attn_drop: Dropout rate of the attention weights.
        proj_drop: Dropout rate after the output projection.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: num_heads does not divide dim; a dropout rate outside 0 to 1.
    """

    fixed_grid: ClassVar[bool] = False
    pyramid_options: ClassVar[Dict[str, Any]] = {}

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device: Optional[torch.device] = None,
        dtype: Optional[torch.dtype] = None,
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        for name, rate in (('attn_drop', attn_drop), ('proj_drop', proj_drop)):
            if not 0 <= rate < 1:
                raise ValueError(f'{name} must be at least 0 and below 1, got {rate}')
        dd = {'device': device, 'dtype': dtype}
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, bias=proj_bias, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def set_feat_size(self, feat_size: Sequence[int]) -> None:
        """Bring the weights to another grid (H, W), in an attention whose `fixed_grid` is true."""
        raise NotImplementedError

    def attend(self, qkv: torch.Tensor, feat_size: List[int]) -> torch.Tensor:
        """Attention of queries, keys and values `(3, B, h, N, d)`, a view of the projection; returns `(B, h, N, d)`."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor, feat_size: List[int]) -> torch.Tensor:
        """Attend over tokens `(B, N, C)` in raster order of a grid of `feat_size` (H, W), N = H·W."""
        B, N, C = x.shape
        qkv = self.qkv(x).unflatten(-1, [3, self.num_heads, self.head_dim]).permute(2, 0, 3, 1, 4)
        x = self.attend(qkv, feat_size).transpose(1, 2).reshape(B, N, C)
        return self.proj_drop(self.proj(x))
