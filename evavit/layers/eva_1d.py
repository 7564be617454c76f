"""EVA on sequences, in both directions or causal, with T5's relative position bias inside a chunk.

Papers:
  * `Efficient Attention via Control Variates`, Zheng et al., ICLR 2023 - https://arxiv.org/abs/2302.04542 (Appendix D)
  * `Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer`, Raffel et al., JMLR 2020 -
    https://arxiv.org/abs/1910.10683 (the buckets of the bias)
"""

import math
from typing import Any, Dict, Optional, Tuple

import torch
from timm.layers import trunc_normal_
from torch import nn

from evavit.ops import Eva1dCache, eva_attention_1d, eva_attention_1d_step, halo_size
from evavit.ops.checks import check_number, check_whole
from evavit.ops.eva.checks import check_chunks
from evavit.ops.grid import accumulation_dtype

from .attention import GridAttention, check_flags
from .eva import Summary

__all__ = ['EvaAttention1d', 'T5RelPosBias']


class T5RelPosBias(nn.Module):
    """T5's relative position bias between the tokens of a chunk and those of the chunk with its context.

    Offsets, key minus query, fall into buckets: half of them for one offset each from 0 on, the other half in
    logarithmic steps up to `max_distance` and beyond. Unless causal, half of all buckets are for keys that come later.

    Args:
        window_size: Tokens of a chunk.
        context: Tokens of context before and after the chunk.
        num_heads: Heads.
        num_buckets: Rows of `relative_position_bias_table`; T5 has 32.
        max_distance: Offsets from here on share the last bucket; T5 has 128.
        causal: No buckets for keys that come later.
    """

    bucket: torch.Tensor

    def __init__(
        self,
        window_size: int,
        context: Tuple[int, int],
        num_heads: int,
        *,
        num_buckets: int = 32,
        max_distance: int = 128,
        causal: bool = False,
        device: Optional[torch.device] = None,
        dtype: Optional[torch.dtype] = None,
    ) -> None:
        super().__init__()
        exact = num_buckets // (2 if causal else 4)
        if exact < 1 or max_distance <= exact:
            raise ValueError(
                f'max_distance must be above {exact} for num_buckets {num_buckets}, which must be at '
                f'least {2 if causal else 4}; got max_distance {max_distance}'
            )
        self.window_size, self.context, self.causal = window_size, context, causal
        self.num_buckets, self.max_distance = num_buckets, max_distance
        self.relative_position_bias_table = nn.Parameter(
            torch.empty(num_buckets, num_heads, device=device, dtype=dtype)
        )
        self.register_buffer(
            'bucket',
            torch.empty(window_size, sum(context) + window_size, dtype=torch.long, device=device),
            persistent=False,
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the table and the buckets."""
        trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.init_non_persistent_buffers()

    def init_non_persistent_buffers(self) -> None:
        """Fill in the buckets."""
        w, (before, after) = self.window_size, self.context
        self.bucket.copy_(
            torch.tensor(
                [[self.bucket_of(key - query) for key in range(-before, w + after)] for query in range(w)]
            ).view_as(self.bucket)
        )

    def bucket_of(self, offset: int) -> int:
        """The bucket of an offset, key minus query."""
        buckets = self.num_buckets if self.causal else self.num_buckets // 2
        first = buckets if offset > 0 and not self.causal else 0
        distance = max(-offset, 0) if self.causal else abs(offset)
        exact = buckets // 2
        if distance < exact:
            return first + distance
        steps = math.log(distance / exact) / math.log(self.max_distance / exact) * (buckets - exact)
        return first + min(exact + int(steps + 1e-9), buckets - 1)  # a distance on a bucket's edge is in it

    def get_bias(self) -> torch.Tensor:
        """The bias `(h, window_size, tokens of the chunk with its context)`."""
        return self.relative_position_bias_table[self.bucket].permute(2, 0, 1)


class EvaAttention1d(GridAttention):
    """Multi-head EVA on sequences `(B, N, C)`; see `evavit.ops.eva_attention_1d`.

    The projections and dropouts are `GridAttention`'s; a sequence has no grid, so `forward` takes a padding mask in its
    place. Time and memory are O(N · (window_size + C_p)) for C_p = ceil(N / cell_size) cells.

    Args:
        dim: Channels C.
        num_heads: Heads h; must divide dim.
        window_size: Tokens of a chunk, |E| in the paper; 0 for none, if not causal.
        cell_size: Tokens of a cell: ceil(length / C) for C cells; 0 for none. If causal, must divide window_size.
        causal: No token sees what comes after it (Algorithm 2). `step` then generates one token after the other.
        overlap: E is the chunk and half a chunk of context on each side, before it only if causal.
        rel_pos_bias: Learned T5 relative position bias inside E.
        num_buckets: Buckets of the bias.
        max_distance: Distance in tokens from which on offsets share the last bucket.
        proposal_scale: As in `EvaAttention`.
        noise_std: As in `EvaAttention`.
        **kwargs: qkv_bias, proj_bias, attn_drop, proj_drop, device and dtype of `GridAttention`.

    Raises:
        ValueError: num_heads does not divide dim; sizes that are no whole numbers or negative, both 0, or do not divide
            if causal; a negative noise_std; a dropout rate outside 0 to 1; a max_distance too small for num_buckets;
            another option of `GridAttention`, which it does not take.
    """

    takes_qk_norm = False

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        window_size: int = 128,
        cell_size: int = 8,
        causal: bool = False,
        overlap: bool = False,
        proposal_scale: float = 1.0,
        noise_std: float = 1.0,
        rel_pos_bias: bool = True,
        num_buckets: int = 32,
        max_distance: int = 128,
        device: Optional[torch.device] = None,
        dtype: Optional[torch.dtype] = None,
        **kwargs: Any,
    ) -> None:
        dd: Any = {'device': device, 'dtype': dtype}
        super().__init__(dim, num_heads, **kwargs, **dd)
        check_flags(causal=causal, overlap=overlap, rel_pos_bias=rel_pos_bias)
        for name, value, least in (
            ('window_size', window_size, 0),
            ('cell_size', cell_size, 0),
            ('num_buckets', num_buckets, 1),
        ):
            check_whole(name, value, least)
        check_chunks(window_size, cell_size, causal, overlap)
        check_number('proposal_scale', proposal_scale)
        check_number('noise_std', noise_std)
        if noise_std < 0:
            raise ValueError(f'noise_std must be 0 (no noise) or more, got {noise_std}')
        self.window_size = window_size
        self.cell_size = cell_size
        self.causal = causal
        self.overlap = overlap
        self.proposal_scale = proposal_scale
        self.noise_std = noise_std
        self.summary_q = Summary(self.head_dim, **dd) if cell_size else None
        self.summary_k = Summary(self.head_dim, **dd) if cell_size else None
        halo = halo_size(window_size) if overlap else 0
        self.rel_pos = (
            T5RelPosBias(
                window_size,
                (halo, 0 if causal else halo),
                num_heads,
                num_buckets=num_buckets,
                max_distance=max_distance,
                causal=causal,
                **dd,
            )
            if window_size and rel_pos_bias
            else None
        )

    @property
    @torch.jit.unused
    def backend(self) -> str:
        """The code that runs: always 'plain', sequences have no kernels."""
        return 'plain'

    def extra_repr(self) -> str:
        return (
            f'num_heads={self.num_heads}, window_size={self.window_size}, cell_size={self.cell_size}, '
            f'causal={self.causal}, overlap={self.overlap}, proposal_scale={self.proposal_scale:g}, '
            f'noise_std={self.noise_std:g}, backend=plain (sequences have no kernels)'
        )

    # A sequence has no grid. (TorchScript reads nothing behind a type comment.)
    def forward(  # type: ignore[override]
        self, x: torch.Tensor, key_padding_mask: Optional[torch.Tensor] = None
    ) -> torch.Tensor:
        """Attend over tokens `(B, N, C)`.

        Args:
            x: Tokens.
            key_padding_mask: Bool `(B, N)`, true where a position is padding: nothing sees it.
        """
        q, k, v = self._project(x)
        noise: Optional[torch.Tensor] = None
        if self.training and self.noise_std > 0 and self.cell_size:
            dtype = accumulation_dtype(q)
            shape = [q.shape[0], q.shape[1], -(-q.shape[2] // self.cell_size), 1, q.shape[3]]
            noise = self.noise_std * torch.randn(shape, dtype=dtype, device=q.device)
        x = eva_attention_1d(
            q,
            k,
            v,
            **self._shared(),
            causal=self.causal,
            key_padding_mask=key_padding_mask,
            noise=noise,
            dropout_p=self.drop_rate(),
        )
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))

    def step(self, x: torch.Tensor, cache: Optional[Eva1dCache] = None) -> Tuple[torch.Tensor, Eva1dCache]:
        """The next token of a causal sequence, as in evaluation: O(window_size + C_p) time.

        Args:
            x: The token `(B, 1, C)`.
            cache: What the last step returned; None for the first token.

        Returns:
            Its output `(B, 1, C)`, to rounding that of `forward` on the whole sequence, and the new cache.
        """
        if not self.causal:
            raise ValueError('only a causal layer goes step by step; make it with causal=True')
        q, k, v = self._project(x)
        y, cache = eva_attention_1d_step(q, k, v, cache, **self._shared())
        return self.proj(y.transpose(1, 2).flatten(2)), cache

    def _project(self, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values `(B, h, N, d)`."""
        qkv = self.qkv(x).unflatten(-1, [3, self.num_heads, self.head_dim]).permute(2, 0, 3, 1, 4)
        return qkv.unbind(0)

    def _shared(self) -> Dict[str, Any]:
        """Arguments of the whole sequence and of a step alike."""
        return dict(
            summary_q=self.summary_q() if self.summary_q is not None else None,
            summary_k=self.summary_k() if self.summary_k is not None else None,
            rel_pos_bias=self.rel_pos.get_bias() if self.rel_pos is not None else None,
            window_size=self.window_size,
            cell_size=self.cell_size,
            overlap=self.overlap,
            proposal_scale=self.proposal_scale,
        )
