"""EVA on sequences: chunks in place of windows, cells of consecutive tokens, causal if asked (Appendix D, Algorithm 2).

The steps are those of `evavit/ops/eva/variants.py`, on a grid of one row, with masks for padding and for the future.
docs/math.md, section 13, has the definition.
"""

from typing import List, NamedTuple, Optional, Tuple

import torch

from evavit.ops.checks import check_bool
from evavit.ops.grid import from_blocks, halo_mask, to_halos

from .case import SequenceOptions
from .checks import check_sequence, softmax_scale
from .variants import CellSummaries, Proposal, attend, halo_size, summarise_cells

__all__ = ['Eva1dCache', 'eva_attention_1d', 'eva_attention_1d_step']


class Eva1dCache(NamedTuple):
    """What causal EVA remembers of a sequence: the current chunk, the open cell, the summaries of finished cells.

    Attributes:
        length: Tokens so far.
        keys: Of the current chunk and its context, `(B, h, at most window + halo, d)`.
        values: The same of these tokens.
        open_cell: q, k, v of the tokens of a cell that is not complete, `(B, h, < cell_size, d)` each.
        cell_keys: k̃ of the complete cells, `(B, h, cells, d)`.
        cell_values: Their β.
    """

    length: int
    keys: torch.Tensor
    values: torch.Tensor
    open_cell: List[torch.Tensor]
    cell_keys: torch.Tensor
    cell_values: torch.Tensor


def _proposal(options: SequenceOptions, summary_k: List[torch.Tensor]) -> Proposal:
    return Proposal(
        options.summary_q,
        summary_k,
        'qk',
        None,
        options.scale,
        options.proposal_scale,
        options.noise,
        1.0,
        options.norm_eps,
    )


def _attend_1d(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: SequenceOptions) -> torch.Tensor:
    """`eva_attention_1d`; the arguments are checked, autocast is off."""
    window_size, cell_size, causal = options.window_size, options.cell_size, options.causal
    key_padding_mask, rel_pos_bias = options.key_padding_mask, options.rel_pos_bias
    N, device = q.shape[2], q.device
    row = [1, N]
    padding = key_padding_mask.view(-1, 1, N, 1) if key_padding_mask is not None else None
    if padding is not None:  # whatever stands there is not read, not even a NaN
        q, k, v = q.masked_fill(padding, 0.0), k.masked_fill(padding, 0.0), v.masked_fill(padding, 0.0)

    # Without a window the sequence is one group of queries whose E is empty.
    window = min(window_size, N) if window_size > 0 else N
    starts = torch.arange(0, N, window, device=device)
    cells: Optional[CellSummaries] = None
    cell_mask: Optional[torch.Tensor] = None
    if cell_size > 0 and options.summary_k is not None:
        block, none = (1, cell_size), (0, 0)
        tokens = halo_mask(row, block, none, device)
        if padding is not None:
            tokens = tokens & (to_halos((~padding).to(q.dtype), row, block, none).squeeze(-1) > 0)
        cells = summarise_cells(
            to_halos(q, row, block, none),
            to_halos(k, row, block, none),
            to_halos(v, row, block, none),
            tokens,
            _proposal(options, options.summary_k),
        )
        cell_mask = tokens.any(-1).unsqueeze(-2).unsqueeze(-2)
        if causal:  # cells complete where the query's chunk begins
            ends = torch.arange(1, tokens.shape[-2] + 1, device=device) * cell_size
            cell_mask = cell_mask & (ends <= starts.view(-1, 1, 1))
        elif window_size == 0:  # a sequence of nothing but padding: its output is zero in the end
            cell_mask = cell_mask | ~cell_mask.any(-1, keepdim=True)

    keys: Optional[torch.Tensor] = None
    values: Optional[torch.Tensor] = None
    mask: Optional[torch.Tensor] = None
    if window_size > 0:
        block, halo = (1, window), (0, options.halo)
        reach = window + halo[1] * (1 if causal else 2)  # no context on the right of a causal chunk
        keys, values = to_halos(k, row, block, halo)[:, :, :, :reach], to_halos(v, row, block, halo)[:, :, :, :reach]
        mask = halo_mask(row, block, halo, device)[:, :reach].unsqueeze(1)
        if causal:
            mask = mask & (
                torch.arange(-halo[1], reach - halo[1], device=device)
                <= torch.arange(window, device=device).unsqueeze(1)
            )
        if padding is not None:
            real = to_halos((~padding).to(q.dtype), row, block, halo)[:, :, :, :reach].squeeze(-1) > 0
            mask = mask & real.unsqueeze(3)
            mask = mask | ~mask.any(-1, keepdim=True)  # a query in the padding: finite, and zero in the end
        if rel_pos_bias is not None:
            rel_pos_bias = rel_pos_bias[:, :window, :reach]
    queries = to_halos(q, row, (1, window), (0, 0))
    out = attend(queries, keys, values, rel_pos_bias, mask, cells, cell_mask, options.scale, options.dropout_p)
    out = from_blocks(out.unsqueeze(2).unsqueeze(2), row)
    return out if padding is None else out.masked_fill(padding, 0.0)


def eva_attention_1d(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    summary_q: Optional[List[torch.Tensor]] = None,
    summary_k: Optional[List[torch.Tensor]] = None,
    rel_pos_bias: Optional[torch.Tensor] = None,
    window_size: int = 128,
    cell_size: int = 8,
    causal: bool = False,
    overlap: bool = False,
    key_padding_mask: Optional[torch.Tensor] = None,
    scale: Optional[float] = None,
    proposal_scale: float = 1.0,
    noise: Optional[torch.Tensor] = None,
    dropout_p: float = 0.0,
    norm_eps: float = 1e-5,
) -> torch.Tensor:
    """EVA on sequences, Equation (16), or its causal form (Algorithm 2), in plain PyTorch; docs/math.md, section 13.

    Chunks of `window_size` tokens and cells of `cell_size` tokens both start at token 0; the last of each may be short.
    Query n attends exactly to E^n, its chunk, with `overlap` also to half a chunk of tokens on each side, and to one
    summary of each cell. Causal: exactly to the tokens of its chunk up to n, with `overlap` to half a chunk before it,
    and to the summaries of the cells that end before its chunk begins.

    Time and memory are O(N · (window_size + C_p)) with C_p = ceil(N / cell_size) cells: linear for a given number of
    cells, that is with cell_size = ceil(length / C_p).

    Args:
        q: Queries `(B, h, N, d)`, any strides.
        k: Keys, like q.
        v: Values, like q.
        summary_q: Parameters of q's σ, see `eva_attention_variant`. Needed unless cell_size is 0.
        summary_k: The same for k's.
        rel_pos_bias: b, `(h, window_size, reach)`: [head, query's place in its chunk, key's place], where the keys are
            the chunk's, with `overlap` after `halo_size(window_size)` tokens before it, and, unless causal, before as
            many after it. None for no bias.
        window_size: Tokens of a chunk, |E|; 0 leaves E empty, if not causal.
        cell_size: Tokens of a cell; 0 for no cells. Causal cells must divide a chunk: so each token before it is in one
            that is complete.
        causal: Let no query see what comes after it.
        overlap: Let chunks overlap.
        key_padding_mask: Bool `(B, N)`, true where a position is padding, as in `torch.nn.MultiheadAttention`. Such a
            position is in no softmax, no mean, no β; its own output is zero.
        scale: s; d^(-½) if None.
        proposal_scale: Factor of the proposal's mean.
        noise: noise_std · ε, broadcasts to `(B, h, C_p, 1, d)`. None in evaluation.
        dropout_p: Probability to drop an attention weight, of tokens and cells alike; the rest is scaled up.
        norm_eps: LayerNorm's ε.

    Returns:
        `(B, h, N, d)` in q's dtype.

    Raises:
        ValueError: arguments that do not fit each other; the message names the value.
    """
    check_bool('causal', causal)
    check_bool('overlap', overlap)
    options = SequenceOptions(
        summary_q,
        summary_k,
        rel_pos_bias,
        window_size,
        cell_size,
        causal,
        halo_size(window_size) if overlap else 0,
        key_padding_mask,
        softmax_scale(scale, q),
        proposal_scale,
        noise,
        dropout_p,
        norm_eps,
    )
    check_sequence(q, k, v, options)
    if not torch.jit.is_scripting():  # noqa: SIM102, TorchScript skips this block, but not a longer condition
        if not q.is_meta and torch.is_autocast_enabled(q.device.type):
            with torch.autocast(q.device.type, enabled=False):  # the precision of every step is chosen already
                return _attend_1d(q, k, v, options)
    return _attend_1d(q, k, v, options)


def eva_attention_1d_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cache: Optional[Eva1dCache],
    summary_q: Optional[List[torch.Tensor]] = None,
    summary_k: Optional[List[torch.Tensor]] = None,
    rel_pos_bias: Optional[torch.Tensor] = None,
    window_size: int = 128,
    cell_size: int = 8,
    overlap: bool = False,
    scale: Optional[float] = None,
    proposal_scale: float = 1.0,
    norm_eps: float = 1e-5,
) -> Tuple[torch.Tensor, Eva1dCache]:
    """Causal `eva_attention_1d` in evaluation, one token after the other: O(window_size + C_p) time each.

    Arguments that are not below are as in `eva_attention_1d`, the same at every step.

    Args:
        q: Query of the next token, `(B, h, 1, d)`.
        k: Its key, `(B, h, 1, d)`.
        v: Its value, `(B, h, 1, d)`.
        cache: What the last call returned; None for the first token. It is not changed.

    Returns:
        The token's output `(B, h, 1, d)`, to rounding that of the whole sequence at once, and the new cache.

    Raises:
        ValueError: more than one token, a cache of other sequences, or arguments that do not fit each other.
    """
    check_bool('overlap', overlap)
    options = SequenceOptions(
        summary_q,
        summary_k,
        rel_pos_bias,
        window_size,
        cell_size,
        True,
        halo_size(window_size) if overlap else 0,
        None,
        softmax_scale(scale, q),
        proposal_scale,
        None,
        0.0,
        norm_eps,
    )
    check_sequence(q, k, v, options)
    if q.shape[2] != 1:
        raise ValueError(f'a step takes one token, got {q.shape[2]}')
    if cache is None:
        none = q[:, :, :0]
        cache = Eva1dCache(0, none, none, [none, none, none], none, none)
    B, h, _, d = q.shape
    of_cache = [cache.keys.shape[i] for i in (0, 1, 3)]
    if of_cache != [B, h, d]:
        raise ValueError(
            f'the cache is of (batch, heads, head_dim) = {of_cache}, the token of {[B, h, d]}; begin a '
            f'new sequence with cache None'
        )
    place = cache.length % window_size
    past = options.halo if place == 0 else cache.keys.shape[2]  # a new chunk keeps its context only
    keys = torch.cat([cache.keys[:, :, max(cache.keys.shape[2] - past, 0) :], k], 2)
    values = torch.cat([cache.values[:, :, max(cache.values.shape[2] - past, 0) :], v], 2)
    bias: Optional[torch.Tensor] = None
    if rel_pos_bias is not None:
        last = options.halo + place + 1
        bias = rel_pos_bias[:, place : place + 1, last - keys.shape[2] : last]

    cells: Optional[CellSummaries] = None
    visible = (cache.length - place) // cell_size if cell_size > 0 else 0
    if visible > 0:
        key, value = cache.cell_keys[:, :, :visible], cache.cell_values[:, :, :visible].unsqueeze(3)
        cells = CellSummaries(key, value, value[..., 0], value)  # one sample: its ω and weight are not read
    with torch.autocast(q.device.type, enabled=False):
        tokens = (q.unsqueeze(2), keys.unsqueeze(2), values.unsqueeze(2))
        out = attend(*tokens, bias, None, cells, None, options.scale, 0.0).squeeze(2)
        open_cell, cell_keys, cell_values = cache.open_cell, cache.cell_keys, cache.cell_values
        if cell_size > 0 and summary_k is not None:
            open_cell = [torch.cat([old, new], 2) for old, new in zip(open_cell, (q, k, v), strict=True)]
            if open_cell[0].shape[2] == cell_size:
                cell_q, cell_k, cell_v = [x.unsqueeze(2) for x in open_cell]
                done = summarise_cells(cell_q, cell_k, cell_v, None, _proposal(options, summary_k))
                cell_keys = torch.cat([cell_keys.to(done.key.dtype), done.key], 2)
                cell_values = torch.cat([cell_values.to(done.value.dtype), done.value.squeeze(3)], 2)
                open_cell = [tokens[:, :, :0] for tokens in open_cell]
    return out, Eva1dCache(cache.length + 1, keys, values, open_cell, cell_keys, cell_values)
