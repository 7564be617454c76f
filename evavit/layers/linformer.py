"""Linformer: softmax attention over a learned, fixed projection of the keys and values along the tokens.

Paper: `Linformer: Self-Attention with Linear Complexity`, Wang et al., 2020 - https://arxiv.org/abs/2006.04768
"""

from typing import Any, ClassVar, Final, List, Sequence, Tuple

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module, use_fused_attn
from torch import nn

from evavit.ops.checks import check_grid, check_tokens, check_whole
from evavit.ops.grid import static_size
from evavit.ops.softmax import softmax_attention

from .attention import GridAttention, check_flags, device_and_dtype

__all__ = ['LinformerAttention', 'TokenProjection', 'resize_token_projection']


def resize_token_projection(weight: torch.Tensor, feat_size: Sequence[int]) -> torch.Tensor:
    """A projection `(r, H, W)` on another grid `(H', W')`: bicubic with antialiasing, as timm's position embeddings.

    Scaled by H·W / (H'·W'), so that sums over more or fewer tokens keep their size.
    """
    if tuple(weight.shape[1:]) == tuple(feat_size):
        return weight
    resized = F.interpolate(weight.unsqueeze(0).float(), size=list(feat_size), mode='bicubic', antialias=True)
    factor = weight.shape[1] * weight.shape[2] / (feat_size[0] * feat_size[1])
    return (factor * resized.squeeze(0)).to(weight.dtype)


class TokenProjection(nn.Module):
    """The N tokens of a grid to r combinations of them: `(B, h, N, d)` to `(B, h, r, d)`, one matrix for all heads."""

    def __init__(self, projection_dim: int, feat_size: Tuple[int, int], **dd: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(projection_dim, feat_size[0], feat_size[1], **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal with variance 1 / N: a sum over all tokens is then as large as one token."""
        nn.init.normal_(self.weight, std=(self.weight.shape[1] * self.weight.shape[2]) ** -0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight.flatten(1) @ x


@register_notrace_module
class LinformerAttention(GridAttention):
    """Multi-head Linformer attention on tokens `(B, N, C)` of one grid, `forward(x, feat_size)`.

    With learned projections E, F (r × N) shared by the heads of the layer and s = d^(-½):

        Y = softmax(s Q (E K)ᵀ) (F V)

    Time and memory grow with N·r. E and F have a column for each token, so a layer is made for one grid and refuses any
    other; `set_feat_size` resamples them to another grid (`resize_token_projection`), which the models do in
    `set_input_size`. With r = N and E = F = I this is softmax attention.

    Args:
        dim: Channels C.
        num_heads: Heads h; must divide dim.
        feat_size: The grid (H, W) that the layer is made for; the models give theirs.
        projection_dim: r; 128 as in the paper's model for 512 tokens. The EVA paper has no Linformer on images; it
            uses 256 for its language model.
        share_kv: One projection for keys and values, E = F ("key-value sharing").
        **kwargs: Arguments of `GridAttention`.

    Raises:
        ValueError: num_heads does not divide dim; projection_dim is not a whole number of at least 1; feat_size is not
            two positive numbers; a dropout rate outside 0 to 1. In the forward pass: another grid than feat_size.
    """

    fused_attn: Final[bool]
    fixed_grid: ClassVar[bool] = True

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        feat_size: Sequence[int] = (14, 14),
        projection_dim: int = 128,
        share_kv: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(dim, num_heads, **kwargs)
        check_flags(share_kv=share_kv)
        dd = device_and_dtype(kwargs)
        check_whole('projection_dim', projection_dim, 1)
        check_grid(list(feat_size))
        self.fused_attn = use_fused_attn()  # PyTorch's own
        self.projection_dim = projection_dim
        self.feat_size: Tuple[int, int] = (feat_size[0], feat_size[1])
        self.project_k = TokenProjection(projection_dim, self.feat_size, **dd)
        self.project_v = None if share_kv else TokenProjection(projection_dim, self.feat_size, **dd)

    def extra_repr(self) -> str:
        return (
            f'num_heads={self.num_heads}, feat_size={self.feat_size}, projection_dim={self.projection_dim}, '
            f'share_kv={self.project_v is None}'
        )

    @torch.jit.ignore
    def set_feat_size(self, feat_size: Sequence[int]) -> None:
        """Resample the projections to another grid (H, W)."""
        check_grid(list(feat_size))
        for projection in (self.project_k, self.project_v):
            if projection is not None:
                weight = resize_token_projection(projection.weight.detach(), feat_size)
                projection.weight = nn.Parameter(weight, requires_grad=projection.weight.requires_grad)
        self.feat_size = (feat_size[0], feat_size[1])

    def attend(self, qkv: torch.Tensor, feat_size: List[int]) -> torch.Tensor:
        q, k, v = qkv.unbind(0)
        feat_size = static_size(feat_size)
        check_tokens(q, k, v, feat_size)
        if feat_size[0] != self.feat_size[0] or feat_size[1] != self.feat_size[1]:
            raise ValueError(
                f'this Linformer is made for a grid of {self.feat_size[0]} × {self.feat_size[1]} tokens, '
                f'got {feat_size[0]} × {feat_size[1]}; call set_feat_size, or set_input_size of the model'
            )
        k = self.project_k(k)
        v = self.project_v(v) if self.project_v is not None else self.project_k(v)
        return softmax_attention(q.to(v.dtype), k, v, self.head_dim**-0.5, self.drop_rate(), self.fused_attn)
