"""Reformer: attention among tokens that locality-sensitive hashing puts into one bucket.

Paper: `Reformer: The Efficient Transformer`, Kitaev et al., ICLR 2020 - https://arxiv.org/abs/2001.04451
"""

from typing import Any, Callable, List, Optional, Tuple

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import nn

from evavit.ops.checks import check_tokens, check_whole
from evavit.ops.grid import accumulation_dtype, static_size

from .attention import GridAttention, device_and_dtype

__all__ = ['ReformerAttention']

MAX_BUCKETS = 128  # a bucket is then longer than a chunk from 8,192 tokens on, and chunks cut it


@register_notrace_module  # torch.fx keeps it as one node: chunks follow the number of tokens
class ReformerAttention(GridAttention):
    """Multi-head LSH attention with shared queries and keys, without a causal mask, `forward(x, feat_size)`, any grid.

    One projection makes queries and keys, k_m = q_m / ‖q_m‖, so the layer has `2·dim` rows in `qkv` (queries, values)
    where the other attentions have `3·dim`. In each of `num_hashes` rounds r, with a random rotation R_r:

        h_r(n) = argmax of [q_n R_r, -q_n R_r]                                  its bucket
        tokens sorted by (bucket, place in raster order) are cut into chunks of chunk_size, the last may be short
        P_n^r  = tokens of n's bucket in n's chunk and in the chunk before
        y_n    = Σ over the union of the P_n^r of softmax(q_n·k_m) v_m

    The union is put together from the rounds as in the paper's appendix: logits minus the log of the number of rounds
    in which the pair meets, rounds weighted by their log-sum-exp. A token attends to itself only where it meets no
    other. The number of buckets is the even number next above N / chunk_size, at most 128. The rotations are drawn anew
    in each training forward, from the default generator of the input's device; in evaluation they are fixed (a
    non-persistent buffer from a fixed seed). Time and memory grow with N·num_hashes·chunk_size, and sorting with
    N log N. It approximates softmax attention in which these shared keys take the place of keys of their own, and
    equals it when there are enough rounds for every pair to meet.

    Args:
        dim: Channels C.
        num_heads: Heads h; must divide dim.
        num_hashes: Rounds of hashing; 4 in the EVA paper's language model, its only one with Reformer.
        chunk_size: Tokens of a chunk; 64 there, as in the Reformer paper's code.
        **kwargs: Arguments of `GridAttention`.

    Raises:
        ValueError: num_heads does not divide dim; num_hashes or chunk_size is not a whole number of at least 1; a
            dropout rate outside 0 to 1.
    """

    rotations: torch.Tensor

    takes_qk_norm = False
    traces_any_batch = False

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_hashes: int = 4,
        chunk_size: int = 64,
        **kwargs: Any,
    ) -> None:
        super().__init__(dim, num_heads, **kwargs)
        dd = device_and_dtype(kwargs)
        check_whole('num_hashes', num_hashes, 1)
        check_whole('chunk_size', chunk_size, 1)
        self.num_hashes = num_hashes
        self.chunk_size = chunk_size
        self.qkv = nn.Linear(dim, 2 * dim, bias=self.qkv.bias is not None, **dd)  # queries are keys: no rows for these
        self.register_buffer(
            'rotations', torch.empty(num_hashes, self.head_dim, MAX_BUCKETS // 2, **dd), persistent=False
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fill the rotations of evaluation; the projections initialise themselves."""
        drawn = torch.randn(self.rotations.shape, generator=torch.Generator().manual_seed(0))
        self.rotations.copy_(drawn)

    def init_non_persistent_buffers(self) -> None:
        """Fill the rotations of evaluation."""
        self.reset_parameters()

    def extra_repr(self) -> str:
        return f'num_heads={self.num_heads}, num_hashes={self.num_hashes}, chunk_size={self.chunk_size}'

    def hash(self, q: torch.Tensor) -> torch.Tensor:
        """Buckets of queries `(B, h, N, d)` in every round, `(B, h, rounds, N)`."""
        dtype = accumulation_dtype(q)
        columns = min(-(-q.shape[2] // (2 * self.chunk_size)), self.rotations.shape[2])
        if self.training:
            rotations = torch.randn([self.num_hashes, self.head_dim, columns], dtype=dtype, device=q.device)
        else:
            rotations = self.rotations[:, :, :columns].to(dtype)
        rotated = q.detach().to(dtype).unsqueeze(2) @ rotations
        return torch.cat([rotated, -rotated], -1).argmax(-1)

    def attend(self, qkv: torch.Tensor, feat_size: List[int]) -> torch.Tensor:
        """As in `GridAttention`; the keys in qkv are not used, the queries take their place."""
        return self.attend_shared(qkv[0], qkv[2], feat_size)

    def attend_shared(self, q: torch.Tensor, v: torch.Tensor, feat_size: List[int]) -> torch.Tensor:
        """LSH attention of queries, which are keys as well, and values, each `(B, h, N, d)`; returns `(B, h, N, d)`."""
        feat_size = static_size(feat_size)
        check_tokens(q, q, v, feat_size)
        dtype = accumulation_dtype(q)
        N, m = feat_size[0] * feat_size[1], min(self.chunk_size, feat_size[0] * feat_size[1])
        chunks = -(-N // m)
        pad = [0, chunks * m - N]
        buckets = self.hash(q)
        order = (buckets * N + torch.arange(N, device=q.device)).argsort(-1)  # (B, h, rounds, N)
        rank = order.argsort(-1)
        # Bucket and chunk of each token in every round as one number: a query's less a key's is 0 or 1 where the key is
        # in the same bucket, and in the same chunk or the one before. (B, h, N, rounds)
        places = (buckets * (chunks + 1) + rank // m).to(torch.int32).transpose(2, 3)

        norm = q.to(dtype).square().sum(-1, keepdim=True).clamp(min=1e-12).rsqrt()
        index = F.pad(order, pad)
        q_s = self._sort(q, index, m)  # (B, h, rounds, chunks, m, d)
        k_s = self._look_back(self._sort((q.to(dtype) * norm).to(q.dtype), index, m))
        v_s = self._look_back(self._sort(v, index, m))
        places_q = self._sort(places, index, m)
        places_k = self._look_back(places_q)
        number = index.unflatten(3, [chunks, m]).unsqueeze(-1)
        is_token = (torch.arange(chunks * m, device=q.device) < N).view(1, 1, 1, chunks, m, 1)
        is_key = self._look_back(is_token).transpose(-2, -1)

        meetings = torch.zeros([1], dtype=torch.int16, device=q.device)
        for r in range(self.num_hashes):
            ahead = places_q[..., r : r + 1] - places_k[..., r : r + 1].transpose(-2, -1)
            meetings = meetings + (ahead >> 1 == 0)
        own = torch.arange(self.num_hashes, device=q.device).view(1, 1, -1, 1, 1, 1)
        place_s = torch.gather(places_q, 5, own.expand(q.shape[0], q.shape[1], -1, chunks, m, -1))
        same_bucket = (place_s - self._look_back(place_s).transpose(-2, -1)) >> 1 == 0

        logits = (q_s @ k_s.transpose(-2, -1)).to(dtype)
        # The paper's logit of a token for itself: it counts only where nothing else does.
        logits = logits.masked_fill(number == self._look_back(number).transpose(-2, -1), -1e5)
        logits = logits - meetings.to(dtype).clamp(min=1).log()  # onnxruntime has no clamp of int16
        # Finite, so that the rows that fill up the last chunk give no NaN.
        logits = logits.masked_fill(~(same_bucket & is_key), -1e30)

        attn = logits.softmax(-1)
        # log-sum-exp by way of the largest weight: the softmax is there already, and exp of -1e30 is slow on a CPU.
        largest, place = logits.max(-1, keepdim=True)
        z = largest - torch.gather(attn, -1, place).log()
        attn = self.attn_drop(attn.to(v.dtype))
        back = rank.unsqueeze(-1)
        out = (attn @ v_s).flatten(3, 4)
        out = torch.gather(out, 3, back.expand(-1, -1, -1, -1, out.shape[-1]))
        weight = torch.gather(z.flatten(3, 4), 3, back).softmax(2).to(v.dtype)
        return (weight * out).sum(2)

    @torch.jit.ignore
    def function_of_values(
        self, x: torch.Tensor, feat_size: List[int], rope: Optional[torch.Tensor]
    ) -> Tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor]:
        q, v = self._project(x)
        return lambda values: self.attend_shared(q, values, feat_size), v

    def _project(self, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Queries, which are keys as well, and values, each `(B, h, N, d)`."""
        q, v = self.qkv(x).unflatten(-1, [2, self.num_heads, self.head_dim]).permute(2, 0, 3, 1, 4).unbind(0)
        return q, v

    def forward(self, x: torch.Tensor, feat_size: List[int], rope: Optional[torch.Tensor] = None) -> torch.Tensor:
        """Attend over tokens `(B, N, C)` in raster order of a grid of `feat_size` (H, W), N = H·W."""
        if rope is not None:
            raise ValueError('this attention takes no rotary embeddings; leave rope out')
        if not torch.jit.is_scripting():
            self.check_tracing()
        B, N, C = x.shape
        q, v = self._project(x)
        x = self.attend_shared(q, v, feat_size).transpose(1, 2).reshape(B, N, C)
        return self.proj_drop(self.proj(x))

    def _sort(self, x: torch.Tensor, index: torch.Tensor, m: int) -> torch.Tensor:
        """Tokens `(B, h, N, ...)` in each round's order, by chunk: `(B, h, rounds, chunks, m, ...)`."""
        picked = index.unsqueeze(-1).expand(-1, -1, -1, -1, x.shape[-1])
        x = torch.gather(x.unsqueeze(2).expand(-1, -1, index.shape[2], -1, -1), 3, picked)
        return x.unflatten(3, [index.shape[3] // m, m])

    def _look_back(self, x: torch.Tensor) -> torch.Tensor:
        """Each chunk of `(B, h, rounds, chunks, m, ...)` behind the one before it: `(..., 2m, ...)`; zeros before the
        first. A single chunk has nothing before it."""
        if x.shape[3] == 1:
            return x
        before = torch.cat([torch.zeros_like(x[:, :, :, :1]), x[:, :, :, :-1]], 3)
        return torch.cat([before, x], 4)
