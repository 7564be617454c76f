"""What the attentions share: the projections around a function of q, k, v on the token grid."""

import copy
import functools
import logging
from typing import Any, Callable, ClassVar, Dict, List, Optional, Sequence, Tuple, Type

import torch
from timm.layers import apply_rot_embed_cat
from torch import nn

from evavit.ops.checks import check_whole
from evavit.ops.rows import attention_rows

__all__ = ['GridAttention', 'check_flags', 'check_heads', 'device_and_dtype']

_logger = logging.getLogger(__name__)


def check_heads(dim: int, num_heads: int) -> None:
    """Raise ValueError unless dim is a whole number of at least 1 that num_heads divides."""
    check_whole('dim', dim, 1)
    if not isinstance(num_heads, int) or num_heads < 1 or dim % num_heads:
        raise ValueError(f'num_heads {num_heads} does not divide dim {dim}; choose a divisor')


@functools.cache
def _tell_of_maps(kind: str) -> None:
    """Once for each class: what a hook waits for in vain, such as that of timm's `AttentionExtract`."""
    _logger.warning(
        'attn_drop of %s has a hook and is never called: no N × N weights are formed. '
        'evavit.attention_maps(model, images) gives them',
        kind,
    )


def check_flags(**flags: object) -> None:
    """Raise ValueError unless all are True or False: text such as 'no' would count as True."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ValueError(f'{name} must be True or False, got {value!r}')


def device_and_dtype(kwargs: Dict[str, Any]) -> Dict[str, Any]:
    """device and dtype of a `GridAttention`'s keyword arguments, for the parameters that a subclass adds."""
    return {key: kwargs.get(key) for key in ('device', 'dtype')}


class GridAttention(nn.Module):
    """Base class of the multi-head attentions: `forward(x, feat_size)` on tokens `(B, P + N, C)`, N = H·W a grid.

    Projects to q, k, v, hands them to `attend` as one tensor, merges the heads and projects back. A subclass implements
    `attend`. Its own options are keyword-only, as the models take them by their names; it hands on all others.

    A subclass whose weights hold for one grid alone sets `fixed_grid`. The models then give it their grid as the
    keyword-only argument `feat_size`, call `set_feat_size(feat_size)` to change it, and refuse images of any size; its
    `attend` refuses any other grid with a message that names both. One with other defaults in a pyramid sets
    `pyramid_options`, option → default. One whose `attend` takes prefix tokens, which belong to no place of the grid,
    sets `takes_prefix_tokens`. One with a `forward` of its own, without norms and rotary embeddings, unsets
    `takes_qk_norm`. One of which PyTorch's older ONNX exporter makes a graph for one batch size unsets
    `traces_any_batch`.

    Args:
        dim: Channels C.
        num_heads: Heads h; must divide dim.
        num_prefix_tokens: P, the class, register and other tokens before those of the grid.
        rotate_half: Whether rotary embeddings turn a channel with that of the other half, not with its neighbour.
        qkv_bias: Bias of the q, k, v projection.
        qk_norm: Normalise each query and key, over the channels of its head.
        scale_norm: Normalise the output before its projection.
        norm_layer: Makes these norms.
        proj_bias: Bias of the output projection.
        attn_drop: Dropout rate of the attention weights.
        proj_drop: Dropout rate after the output projection.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: num_heads does not divide dim; a dropout rate outside 0 to 1; prefix tokens, norms or rotary
            embeddings that the attention does not take.
    """

    fixed_grid: ClassVar[bool] = False
    takes_prefix_tokens: ClassVar[bool] = False
    takes_qk_norm: ClassVar[bool] = True
    traces_any_batch: bool = True
    pyramid_options: ClassVar[Dict[str, Any]] = {}

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_prefix_tokens: int = 0,
        rotate_half: bool = False,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        scale_norm: bool = False,
        norm_layer: Type[nn.Module] = nn.LayerNorm,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device: Optional[torch.device] = None,
        dtype: Optional[torch.dtype] = None,
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        check_flags(
            rotate_half=rotate_half, qkv_bias=qkv_bias, qk_norm=qk_norm, scale_norm=scale_norm, proj_bias=proj_bias
        )
        for name, rate in (('attn_drop', attn_drop), ('proj_drop', proj_drop)):
            if not 0 <= rate < 1:
                raise ValueError(f'{name} must be at least 0 and below 1, got {rate}')
        check_whole('num_prefix_tokens', num_prefix_tokens, 0)
        if num_prefix_tokens and not self.takes_prefix_tokens:
            raise ValueError(
                f'{type(self).__name__} is made for a grid alone and takes no class or register tokens, got '
                f'num_prefix_tokens {num_prefix_tokens}; EvaAttention, LocalAttention and SoftmaxAttention take them'
            )
        if (qk_norm or scale_norm) and not self.takes_qk_norm:
            raise ValueError(f'{type(self).__name__} has no qk_norm and no scale_norm; leave them out')
        if rotate_half and not self.takes_qk_norm:
            raise ValueError(f'{type(self).__name__} has no rotary embeddings; leave rotate_half out')
        dd: Dict[str, Any] = {'device': device, 'dtype': dtype}
        self.num_prefix_tokens = num_prefix_tokens
        self.rotate_half = rotate_half
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.q_norm = norm_layer(self.head_dim, **dd) if qk_norm else nn.Identity()
        self.k_norm = norm_layer(self.head_dim, **dd) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(attn_drop)
        self.norm = norm_layer(dim, **dd) if scale_norm else nn.Identity()
        self.qk_norm = qk_norm
        self.proj = nn.Linear(dim, dim, bias=proj_bias, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def set_feat_size(self, feat_size: Sequence[int]) -> None:
        """Bring the weights to another grid (H, W), in an attention whose `fixed_grid` is true."""
        raise NotImplementedError

    def attend(self, qkv: torch.Tensor, feat_size: List[int]) -> torch.Tensor:
        """Attention of queries, keys and values `(3, B, h, P + N, d)`, a view of the projection; returns
        `(B, h, P + N, d)`."""
        raise NotImplementedError

    def attend_apart(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, feat_size: List[int]) -> torch.Tensor:
        """`attend` of queries, keys and values `(B, h, P + N, d)` that are three tensors."""
        return self.attend(torch.stack([q, k, v]), feat_size)

    def attend_projected(self, qkv: torch.Tensor, feat_size: List[int]) -> torch.Tensor:
        """`attend` of a projection `(B, P + N, 3·C)`; returns `(B, P + N, C)`."""
        return self.attend_by_heads(qkv, feat_size)

    def attend_by_heads(self, qkv: torch.Tensor, feat_size: List[int]) -> torch.Tensor:
        """`attend_projected` by `attend`, for a subclass that has another way for some calls."""
        qkv = qkv.unflatten(-1, [3, self.num_heads, self.head_dim]).permute(2, 0, 3, 1, 4)
        return self.attend(qkv, feat_size).transpose(1, 2).flatten(2)

    def drop_rate(self) -> float:
        """Dropout rate of the attention weights in this pass, for an attention that does not call `attn_drop`."""
        if not torch.jit.is_scripting():
            drop = self.attn_drop
            if drop._forward_hooks or drop._forward_pre_hooks:
                _tell_of_maps(type(self).__name__)
            return drop.p if self.training else 0.0
        return self.attn_drop.p if self.training else 0.0

    @torch.jit.unused
    def check_tracing(self) -> None:
        """RuntimeError under PyTorch's older ONNX exporter, where its file would fail at another batch size."""
        if torch.jit.is_tracing() and torch.onnx.is_in_onnx_export() and not self.traces_any_batch:
            raise RuntimeError(
                f'{type(self).__name__}: the ONNX file of torch.onnx.export(dynamo=False) would fail at another batch '
                f'size, whatever dynamic_axes says; use dynamo=True, or evavit.export.to_onnx'
            )

    def rotate(self, x: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
        """Queries or keys `(B, h, P + N, d)` with those of the grid turned by rotary embeddings, in their dtype."""
        P = self.num_prefix_tokens
        if P == 0:
            return apply_rot_embed_cat(x, rope, half=self.rotate_half).to(x.dtype)
        turned = apply_rot_embed_cat(x[:, :, P:], rope, half=self.rotate_half)
        return torch.cat([x[:, :, :P], turned.to(x.dtype)], 2)

    def project_tokens(
        self, x: torch.Tensor, rope: Optional[torch.Tensor] = None
    ) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values `(B, h, P + N, d)` of tokens `(B, P + N, C)`, normalised and turned."""
        qkv = self.qkv(x).unflatten(-1, [3, self.num_heads, self.head_dim]).permute(2, 0, 3, 1, 4)
        v = qkv[2]
        q, k = self.q_norm(qkv[0]).to(v.dtype), self.k_norm(qkv[1]).to(v.dtype)
        if rope is not None:
            q, k = self.rotate(q, rope), self.rotate(k, rope)
        return q, k, v

    def forward(self, x: torch.Tensor, feat_size: List[int], rope: Optional[torch.Tensor] = None) -> torch.Tensor:
        """Attend over tokens `(B, P + N, C)`: prefix tokens, and a grid of `feat_size` (H, W) in raster order, N = H·W.

        `rope` are timm's rotary embeddings of the grid's tokens, sines and cosines `(N, 2·d)` or broadcast to
        `(B, h, N, 2·d)`, as `timm.layers.apply_rot_embed_cat` takes them.
        """
        if not torch.jit.is_scripting():
            self.check_tracing()
        if self.qk_norm or rope is not None:
            q, k, v = self.project_tokens(x, rope)
            x = self.attend_apart(q, k, v, feat_size).transpose(1, 2).flatten(2)
        else:
            x = self.attend_projected(self.qkv(x), feat_size)
        return self.proj_drop(self.proj(self.norm(x)))

    @torch.jit.ignore
    def function_of_values(
        self, x: torch.Tensor, feat_size: List[int], rope: Optional[torch.Tensor]
    ) -> Tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor]:
        """The attention of these tokens as a function of values `(B, h, P + N, d)`, and the values that it is given."""
        q, k, v = self.project_tokens(x, rope)
        return lambda values: self.attend_apart(q, k, values, feat_size), v

    @torch.jit.ignore
    def attention_rows(
        self,
        x: torch.Tensor,
        feat_size: List[int],
        rope: Optional[torch.Tensor] = None,
        queries: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        """Effective attention, the weight of each token's value in what a query gets: `(B, h, Q, P + N)`.

        Of evaluation, in plain PyTorch, whatever mode and backend the layer is in; see `evavit.ops.rows`.

        Args:
            x, feat_size, rope: As in `forward`.
            queries: Numbers of the tokens to give rows for, int64 `(Q)`, or weights to add rows up with, `(Q, P + N)`;
                None for all.

        Raises:
            ValueError: the output is no sum of values with weights.
        """
        layer = copy.copy(self)  # shares everything but these two
        layer.training, layer.fused_attn = False, False  # type: ignore[assignment]
        with torch.inference_mode(False), torch.no_grad():
            attend, v = layer.function_of_values(x, feat_size, rope)
        return attention_rows(attend, v, queries)
