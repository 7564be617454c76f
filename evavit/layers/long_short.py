"""Long-Short attention of Transformer-LS: a local window and a dynamic low-rank projection of all tokens.

Paper: `Long-Short Transformer: Efficient Transformers for Language and Vision`, Zhu et al., NeurIPS 2021 -
https://arxiv.org/abs/2107.02192
"""

from typing import Any, Callable, List, Optional, Tuple

import torch
from timm.layers import RelPosBias, register_notrace_module
from torch import nn

from evavit.ops.checks import check_tokens, check_whole
from evavit.ops.grid import from_windows, joint_attention, softmax, static_size, to_windows, window_logits, window_shape

from .attention import GridAttention, check_flags, device_and_dtype

__all__ = ['LongShortAttention']


def _merge_heads(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).flatten(2)


def _split_heads(rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Rows `(B·N, C)` in the shape and dtype of `like`, `(B, h, N, d)`."""
    B, h, N, d = like.shape
    return rows.to(like.dtype).view(B, N, h, d).transpose(1, 2)


@register_notrace_module  # torch.fx keeps it as one node: windows follow the size of the grid
class LongShortAttention(GridAttention):
    """Multi-head long-short attention on tokens `(B, N, C)` of any grid, `forward(x, feat_size)`.

    With X the layer's input, P (N × r) the dynamic projection of a head, W^P its C × r part of one linear, E^n the
    tokens of query n's window_size × window_size window and s = d^(-½):

        K', V' = LN_L(K), LN_L(V)
        P      = softmax over the tokens of X W^P
        K̄, V̄   = LN_G(Pᵀ K'), LN_G(Pᵀ V')                                   r keys and values for the whole image
        y_n    = softmax over [s q_n·k'_m + b(n, m)  for m ∈ E^n] ∪ [s q_n·k̄_j  for j = 1..r]
                 applied to the values [v'_m] ∪ [v̄_j]

    That is the form of Zhu et al.'s own code for ImageNet. LN_L and LN_G are their DualLN, one LayerNorm over all
    heads' channels for each of the two sets: averages are much smaller than single keys. Time and memory grow with
    N·(window_size² + r). As in the EVA paper, windows do not overlap (Zhu et al. extend each by half a window) and have
    a relative position bias b. Of its own version that paper says no more: neither what P is made of, nor whether
    norms come before the averages. If one window holds the whole grid, y differs from softmax attention only by the r
    further keys.

    Args:
        dim: Channels C.
        num_heads: Heads h; must divide dim.
        window_size: Side of the windows in tokens; 7 gives the EVA paper's 49.
        projection_dim: r; 16 in the EVA paper's Table 9. The parameters and FLOPs of its Table 2 are those of 49.
        projection_source: What P is made of: 'input' as above, or 'keys' for softmax(K W^P), with averages of keys and
            values before LN_L. Weights of one form load into the other, which is another function of them.
        dual_ln: Normalise keys and values as above; the identity in place of LN_L and LN_G if not.
        rel_pos_bias: Learned relative position bias inside the window.
        **kwargs: Arguments of `GridAttention`; attn_drop drops the weights of both sets.

    Raises:
        ValueError: num_heads does not divide dim; window_size or projection_dim is not a whole number of at least 1;
            an unknown projection_source; a dropout rate outside 0 to 1.
    """

    takes_qk_norm = False
    traces_any_batch = False

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        window_size: int = 7,
        projection_dim: int = 16,
        projection_source: str = 'input',
        dual_ln: bool = True,
        rel_pos_bias: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(dim, num_heads, **kwargs)
        check_flags(dual_ln=dual_ln, rel_pos_bias=rel_pos_bias)
        dd = device_and_dtype(kwargs)
        check_whole('window_size', window_size, 1)
        check_whole('projection_dim', projection_dim, 1)
        if projection_source not in ('input', 'keys'):
            raise ValueError(f"projection_source must be 'input' or 'keys', got {projection_source!r}")
        self.window_size = window_size
        self.projection_source = projection_source
        self.projection_dim = projection_dim
        self.projection = nn.Linear(dim, num_heads * projection_dim, **dd)
        self.norm_local = nn.LayerNorm(dim, **dd) if dual_ln else None
        self.norm_global = nn.LayerNorm(dim, **dd) if dual_ln else None
        self.rel_pos = RelPosBias((window_size, window_size), num_heads, **dd) if rel_pos_bias else None

    def extra_repr(self) -> str:
        return (
            f'num_heads={self.num_heads}, window_size={self.window_size}, projection_dim={self.projection_dim}, '
            f'projection_source={self.projection_source}'
        )

    # DualLN works on rows, not on `(B, N, C)`: torch.compile with backend 'aot_eager' plans the gradient of a LayerNorm
    # with other strides than it gets where images are not the outermost axis in memory.
    def _normalise_local(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.norm_local is None else _split_heads(self.norm_local(_merge_heads(x).flatten(0, 1)), x)

    def _normalise_global(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.norm_global is None else _split_heads(self.norm_global(_merge_heads(x).flatten(0, 1)), x)

    def forward(self, x: torch.Tensor, feat_size: List[int], rope: Optional[torch.Tensor] = None) -> torch.Tensor:
        if rope is not None:
            raise ValueError('this attention takes no rotary embeddings; leave rope out')
        if not torch.jit.is_scripting():
            self.check_tracing()
        B, N, C = x.shape
        qkv = self.qkv(x).unflatten(-1, [3, self.num_heads, self.head_dim]).permute(2, 0, 3, 1, 4)
        source = x if self.projection_source == 'input' else _merge_heads(qkv[1])
        x = self._attend(qkv, source, feat_size).transpose(1, 2).reshape(B, N, C)
        return self.proj_drop(self.proj(x))

    def attend(self, qkv: torch.Tensor, feat_size: List[int]) -> torch.Tensor:
        """As in `GridAttention`, with projection_source 'keys': queries, keys and values do not tell the input."""
        if self.projection_source == 'input':
            raise ValueError("attend needs projection_source='keys': the dynamic projection is of the layer's input")
        return self._attend(qkv, _merge_heads(qkv[1]), feat_size)

    @torch.jit.ignore
    def function_of_values(
        self, x: torch.Tensor, feat_size: List[int], rope: Optional[torch.Tensor]
    ) -> Tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor]:
        if self.norm_global is not None:
            raise ValueError(
                'LongShortAttention normalises averages of values (dual_ln): its output is no sum of values with '
                'weights, so it has no attention map; make it with dual_ln=False, or choose another attention'
            )
        q, k, v = self.project_tokens(x, rope)
        source = x if self.projection_source == 'input' else _merge_heads(k)
        return lambda values: self._attend(torch.stack([q, k, values]), source, feat_size), v

    def _attend(self, qkv: torch.Tensor, source: torch.Tensor, feat_size: List[int]) -> torch.Tensor:
        q, k, v = qkv.unbind(0)
        feat_size = static_size(feat_size)
        check_tokens(q, k, v, feat_size)
        projected = self.projection(source).transpose(1, 2).unflatten(1, [self.num_heads, self.projection_dim])
        p = softmax(projected, v)  # (B, h, r, N)
        k_local, v_local = self._normalise_local(k), self._normalise_local(v)
        if self.projection_source == 'input':
            k, v = k_local, v_local
        k_bar, v_bar = self._normalise_global(p @ k), self._normalise_global(p @ v)
        k, v = k_local, v_local

        window = window_shape(feat_size, self.window_size)
        q = to_windows(q * self.head_dim**-0.5, feat_size, window)
        v = to_windows(v, feat_size, window)
        local = window_logits(
            q,
            to_windows(k, feat_size, window),
            feat_size,
            window,
            self.rel_pos.relative_position_bias_table if self.rel_pos is not None else None,
            self.window_size,
        )
        shared = (q.flatten(2, 3) @ k_bar.transpose(-2, -1)).unflatten(2, [q.shape[2], q.shape[3]])
        out = joint_attention(local, shared, v, v_bar, self.drop_rate())
        return from_windows(out, feat_size, window)
