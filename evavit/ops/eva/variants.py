"""EVA as the paper's ablations ask for it (Table 8, Appendix C): other partitions, summaries, proposals, more samples.

`eva_attention` is the default of all of them, and the fast one. Here every step is general and in plain PyTorch:

    summarise_cells   groups of tokens to what queries need of them: k̃, samples ω, their log-weights, values β
    attend            windows of queries to their E and to the cells, (16) for any number of samples

`eva_attention_variant` puts them on the 2D grid, `evavit/ops/eva/sequence.py` on a sequence.
"""

from typing import List, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F

from evavit.ops.checks import check_bool
from evavit.ops.grid import (
    accumulation_dtype,
    block_counts,
    block_mask,
    cell_shape,
    crop_bias,
    from_blocks,
    halo_mask,
    static_size,
    table_bias,
    to_blocks,
    to_halos,
    window_shape,
)

from .case import Summary, VariantOptions
from .checks import check_partition, check_variant, softmax_scale
from .counts import log_counts
from .plain import summarise

__all__ = ['CellSummaries', 'Proposal', 'attend', 'eva_attention_variant', 'halo_size', 'summarise_cells']


class Proposal(NamedTuple):
    """How the samples of a cell are drawn, and its key: parameters and options of `summarise_cells`."""

    summary_q: Optional[List[torch.Tensor]]  # of σ, see `_sigma`
    summary_k: List[torch.Tensor]
    kind: str  # 'qk', 'q', 'zero' or 'learned'
    mean: Optional[torch.Tensor]  # of a learned proposal, broadcasts to `(B, h, G, d)`
    scale: float
    proposal_scale: float
    noise: Optional[torch.Tensor]  # noise_std · ε, broadcasts to `(B, h, G, S, d)`; None for the mean alone
    noise_std: float
    norm_eps: float


class CellSummaries(NamedTuple):
    """What queries need of the cells. G cells, S samples; accumulation dtype."""

    key: torch.Tensor  # k̃ `(B, h, G, d)`
    omega: torch.Tensor  # ω `(B, h, G, S, d)`
    log_weight: torch.Tensor  # log of N(ω; 0, I) / q(ω) · Σ_m ξ(k̂_m, ω), up to a constant of the cell, `(B, h, G, S)`
    value: torch.Tensor  # Σ_m ξ(k̂_m, ω) v_m / Σ_m ξ(k̂_m, ω) `(B, h, G, S, d)`


def halo_size(window_size: int) -> int:
    """Tokens of context on each side of a window that overlaps its neighbours: half a window, at least one."""
    return max(1, window_size // 2)


def _sigma(mean: torch.Tensor, summary: List[torch.Tensor], norm_eps: float) -> torch.Tensor:
    """σ of (26): the identity, a projection (weight, bias), or that and LayerNorm (and its weight, bias)."""
    if len(summary) == 0:
        return mean
    if len(summary) == 2:
        return F.linear(mean.to(summary[0].dtype), summary[0], summary[1]).to(mean.dtype)
    return summarise(mean, Summary(summary[0], summary[1], summary[2], summary[3]), norm_eps)


def _mean(x: torch.Tensor, mask: Optional[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """Mean over the tokens of `(B, h, G, T, d)`; zero where the mask leaves none."""
    if mask is None:
        return x.mean(3, dtype=dtype)
    x = x.masked_fill(~mask.unsqueeze(-1), 0.0)
    return x.sum(3, dtype=dtype) / mask.sum(-1, dtype=dtype).clamp(min=1.0).unsqueeze(-1)


def summarise_cells(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Optional[torch.Tensor], proposal: Proposal
) -> CellSummaries:
    """Summaries and control variates of cells, from their tokens.

    Args:
        q: Queries by cell, `(B, h, G, T, d)`; k and v likewise.
        mask: Which of them are tokens, bool, broadcasts to `(B, h, G, T)`; None for all. A cell without any gets
            finite numbers, which must be masked later.
        proposal: See `Proposal`.
    """
    scale, noise, summary_q, proposal_mean = proposal.scale, proposal.noise, proposal.summary_q, proposal.mean
    dtype = accumulation_dtype(q)
    k_tilde = _sigma(_mean(k, mask, dtype), proposal.summary_k, proposal.norm_eps)
    mean = torch.zeros_like(k_tilde)
    if proposal.kind == 'learned':
        assert proposal_mean is not None
        mean = mean + proposal_mean.to(dtype)
    elif proposal.kind != 'zero':
        assert summary_q is not None
        mean = _sigma(_mean(q, mask, dtype), summary_q, proposal.norm_eps)
        if proposal.kind == 'qk':
            mean = mean + k_tilde

    omega = (scale**0.5 * proposal.proposal_scale * mean).unsqueeze(3)
    if noise is not None:
        omega = omega + noise.to(dtype)
    k = k.to(dtype)
    log_xi = scale**0.5 * (omega @ k.transpose(-2, -1)) - 0.5 * scale * (k * k).sum(-1).unsqueeze(3)
    if mask is not None:
        # A softmax over nothing is NaN; a cell without tokens takes all its places instead, and is masked later.
        log_xi = log_xi.masked_fill(~(mask | ~mask.any(-1, keepdim=True)).unsqueeze(-2), float('-inf'))
    value = log_xi.softmax(-1) @ v.to(dtype)

    log_weight = log_xi.logsumexp(-1)
    if noise is not None and noise.shape[3] > 1:  # log N(ω; 0, I) - log N(ω; μ, noise_std² I), less a constant
        epsilon = noise.to(dtype) / proposal.noise_std
        log_weight = log_weight - 0.5 * (omega * omega).sum(-1) + 0.5 * epsilon.square().sum(-1)
    return CellSummaries(k_tilde, omega, log_weight, value)


def attend(
    queries: torch.Tensor,
    keys: Optional[torch.Tensor],
    values: Optional[torch.Tensor],
    bias: Optional[torch.Tensor],
    mask: Optional[torch.Tensor],
    cells: Optional[CellSummaries],
    cell_mask: Optional[torch.Tensor],
    scale: float,
    dropout_p: float,
    log_count: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """Attention of windows of queries to the tokens of their E and to cells, Equation (16), `(B, h, U, A, d)`.

    With several samples β_c depends on the query (Appendix C):

        β_c(q_n) = Σ_s softmax_s(ω_cs · q̂_n + log_weight_cs) value_cs

    It is never formed: weights of cells times weights of samples multiply the S values of each cell. That is
    N · C_p · S numbers a head, where a β for each query would be N · C_p · d.

    Args:
        queries: `(B, h, U, A, d)`, U windows of A tokens.
        keys, values: Of E, `(B, h, U, K, d)`; None where E is empty.
        bias: b, `(h, A, K)`.
        mask: Who sees whom in E, bool, broadcasts to `(B, h, U, A, K)`; None for everybody.
        cells: Of all windows, or G = U · C_p of them, window after window; None for no cells.
        cell_mask: Who sees which cell, bool, broadcasts to `(B, h, U, A, C_p)`.
        log_count: What is added to the logits of the cells, of that form; None for nothing.
    """
    dtype = accumulation_dtype(queries)
    # float16 ends at 65,504, before the logits do; bfloat16 has the range of float32.
    logit_dtype = dtype if queries.dtype == torch.float16 else queries.dtype
    out_dtype = queries.dtype
    B, h, U, A, d = queries.shape
    queries = scale * queries.to(logit_dtype)

    logits: List[torch.Tensor] = []
    if keys is not None:
        local = (queries @ keys.to(logit_dtype).transpose(-2, -1)).to(dtype)
        if bias is not None:
            local = local + bias.to(dtype).unsqueeze(1)
        if mask is not None:
            local = local.masked_fill(~mask, float('-inf'))
        logits.append(local)
    sets = 1  # of cells: one for all windows, or one for each
    count = 0
    if cells is not None:
        if cell_mask is not None:
            count = cell_mask.shape[-1]
        else:
            count = cells.key.shape[2]
        sets = cells.key.shape[2] // count
        queries = queries.reshape(B, h, sets, U * A // sets, d)
        k_tilde = cells.key.to(logit_dtype).unflatten(2, [sets, count])
        coarse = (queries @ k_tilde.transpose(-2, -1)).to(dtype).reshape(B, h, U, A, count)
        if log_count is not None:
            coarse = coarse + log_count
        if cell_mask is not None:
            coarse = coarse.masked_fill(~cell_mask, float('-inf'))
        logits.append(coarse)

    attn = torch.cat(logits, -1).softmax(-1)
    if dropout_p > 0.0:
        attn = F.dropout(attn, dropout_p)

    out = torch.zeros([], dtype=out_dtype, device=queries.device)
    if values is not None:
        out = attn[..., : values.shape[3]].to(out_dtype) @ values
    if cells is not None:
        weights = attn[..., attn.shape[-1] - count :].reshape(B, h, sets, U * A // sets, count)
        S = cells.value.shape[3]
        if S > 1:
            omega = cells.omega.to(logit_dtype).unflatten(2, [sets, count]).flatten(3, 4)
            samples = (scale**-0.5 * (queries @ omega.transpose(-2, -1)).to(dtype)).unflatten(-1, [count, S])
            samples = samples + cells.log_weight.unflatten(2, [sets, 1, count])
            weights = (weights.unsqueeze(-1) * samples.softmax(-1)).flatten(-2)
        beta = cells.value.to(out_dtype).unflatten(2, [sets, count]).flatten(3, 4)
        out = out + (weights.to(out_dtype) @ beta).reshape(B, h, U, A, d)
    return out


def _pairs(length: int, window: int, halo: int, cell: int) -> Tuple[List[List[int]], List[List[bool]]]:
    """Windows and cells that meet along an axis, and which places of such a cell lie outside the window's E."""
    pairs: List[List[int]] = []
    outside: List[List[bool]] = []
    for i in range(-(-length // window)):
        first, last = max(i * window - halo, 0), min((i + 1) * window + halo, length) - 1
        for j in range(first // cell, last // cell + 1):
            pairs.append([i, j])
            outside.append([not (first <= j * cell + t <= last) for t in range(cell)])
    return pairs, outside


def _complement(
    cells: CellSummaries,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    is_token: torch.Tensor,
    feat_size: List[int],
    window: Tuple[int, int],
    halo: Tuple[int, int],
    cell: Tuple[int, int],
    proposal: Proposal,
) -> Tuple[CellSummaries, torch.Tensor]:
    """One set of cells P_c less E^n for each window, and which of them have a token left, bool `(windows, 1, C_p)`.

    Only the cells that a window meets differ from the common ones; these alone are summarised again. q, k, v and
    is_token come by cell, `(B, h, C_p, T, d)` and `(C_p, T)`.
    """
    row_pairs, row_outside = _pairs(feat_size[0], window[0], halo[0], cell[0])
    col_pairs, col_outside = _pairs(feat_size[1], window[1], halo[1], cell[1])
    rows, cols = torch.tensor(row_pairs, device=q.device), torch.tensor(col_pairs, device=q.device)
    out_h, out_w = torch.tensor(row_outside, device=q.device), torch.tensor(col_outside, device=q.device)
    nH, nW = block_counts(feat_size, window)
    nC = block_counts(feat_size, cell)[1]
    of_window = (rows[:, 0].unsqueeze(1) * nW + cols[:, 0]).flatten()
    of_cell = (rows[:, 1].unsqueeze(1) * nC + cols[:, 1]).flatten()
    outside = (out_h.view(-1, 1, cell[0], 1) | out_w.view(1, -1, 1, cell[1])).flatten(2).flatten(0, 1)
    mask = is_token.index_select(0, of_cell) & outside

    mean, noise = proposal.mean, proposal.noise
    if mean is not None:
        mean = mean.index_select(2, of_cell)
    if noise is not None and noise.shape[2] > 1:
        noise = noise.index_select(2, of_cell)
    met = summarise_cells(
        q.index_select(2, of_cell),
        k.index_select(2, of_cell),
        v.index_select(2, of_cell),
        mask,
        Proposal(
            proposal.summary_q,
            proposal.summary_k,
            proposal.kind,
            mean,
            proposal.scale,
            proposal.proposal_scale,
            noise,
            proposal.noise_std,
            proposal.norm_eps,
        ),
    )

    count = q.shape[2]
    place = of_window * count + of_cell
    any_left = torch.ones([nH * nW * count], dtype=torch.bool, device=q.device).index_copy(0, place, mask.any(-1))
    return CellSummaries(
        _repeat(cells.key, nH * nW).index_copy(2, place, met.key),
        _repeat(cells.omega, nH * nW).index_copy(2, place, met.omega),
        _repeat(cells.log_weight, nH * nW).index_copy(2, place, met.log_weight),
        _repeat(cells.value, nH * nW).index_copy(2, place, met.value),
    ), any_left.view(-1, 1, count)


def _repeat(x: torch.Tensor, times: int) -> torch.Tensor:
    """The cells of `(B, h, C_p, ...)` one set after the other, `(B, h, times · C_p, ...)`."""
    return torch.stack([x] * times, 2).flatten(2, 3)


def _variant(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: VariantOptions) -> torch.Tensor:
    """`eva_attention_variant`; the arguments are checked, autocast is off."""
    feat_size, window_size, summary_k = options.feat_size, options.window_size, options.summary_k
    # Without windows all queries see the same cells: the grid is one group of them, whose E is empty.
    window = window_shape(feat_size, window_size) if window_size > 0 else (feat_size[0], feat_size[1])
    halo = (options.halo, options.halo)

    cells: Optional[CellSummaries] = None
    cell_mask: Optional[torch.Tensor] = None
    log_count: Optional[torch.Tensor] = None
    if options.partition_grid > 0 and summary_k is not None:
        cell = cell_shape(feat_size, options.partition_grid)
        rows, cols = block_counts(feat_size, cell)
        q_cells = to_blocks(q, feat_size, cell).transpose(3, 4).flatten(4, 5).flatten(2, 3)
        k_cells = to_blocks(k, feat_size, cell).transpose(3, 4).flatten(4, 5).flatten(2, 3)
        v_cells = to_blocks(v, feat_size, cell).transpose(3, 4).flatten(4, 5).flatten(2, 3)
        mask = block_mask(feat_size, cell, q.device)
        if mask is not None:
            mask = mask.transpose(1, 2).flatten(2).flatten(0, 1)
        mean = options.proposal_mean
        if mean is not None:
            mean = mean[:, :rows, :cols].flatten(1, 2).unsqueeze(0)
        proposal = Proposal(
            options.summary_q,
            summary_k,
            options.proposal,
            mean,
            options.scale,
            options.proposal_scale,
            options.noise,
            options.noise_std,
            options.norm_eps,
        )
        cells = summarise_cells(q_cells, k_cells, v_cells, mask, proposal)
        complement = options.partition == 'complement' and window_size > 0
        if options.count_cells != 'one':  # a cell less E has no token inside: 'all' and 'outside' count the same
            outside = complement or (options.count_cells == 'outside' and window_size > 0)
            log_count = log_counts(feat_size, cell, window, halo, outside, accumulation_dtype(q), q.device).unsqueeze(1)
        if complement:
            if mask is None:
                mask = torch.ones([rows * cols, cell[0] * cell[1]], dtype=torch.bool, device=q.device)
            cells, cell_mask = _complement(
                cells, q_cells, k_cells, v_cells, mask, feat_size, window, halo, cell, proposal
            )

    keys: Optional[torch.Tensor] = None
    values: Optional[torch.Tensor] = None
    local_mask: Optional[torch.Tensor] = None
    bias: Optional[torch.Tensor] = None
    rel_pos_bias = options.rel_pos_bias
    if window_size > 0:
        keys, values = to_halos(k, feat_size, window, halo), to_halos(v, feat_size, window, halo)
        if options.halo > 0 or feat_size[0] % window[0] > 0 or feat_size[1] % window[1] > 0:
            local_mask = halo_mask(feat_size, window, halo, q.device).unsqueeze(1)
        if rel_pos_bias is not None:
            bias = crop_bias(table_bias(rel_pos_bias, window_size, options.halo), window_size, window, options.halo)
    queries = to_halos(q, feat_size, window, (0, 0))
    out = attend(queries, keys, values, bias, local_mask, cells, cell_mask, options.scale, options.dropout_p, log_count)
    nH, nW = block_counts(feat_size, window)
    return from_blocks(out.unflatten(3, [window[0], window[1]]).unflatten(2, [nH, nW]).transpose(3, 4), feat_size)


def eva_attention_variant(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    feat_size: List[int],
    summary_q: Optional[List[torch.Tensor]] = None,
    summary_k: Optional[List[torch.Tensor]] = None,
    rel_pos_bias: Optional[torch.Tensor] = None,
    window_size: int = 7,
    partition_grid: int = 7,
    partition: str = 'all',
    proposal: str = 'qk',
    proposal_mean: Optional[torch.Tensor] = None,
    overlap: bool = False,
    scale: Optional[float] = None,
    proposal_scale: float = 1.0,
    noise: Optional[torch.Tensor] = None,
    noise_std: float = 1.0,
    dropout_p: float = 0.0,
    norm_eps: float = 1e-5,
    count_cells: str = 'one',
) -> torch.Tensor:
    """`eva_attention` with the paper's ablations (Table 8, Appendix C), in plain PyTorch; docs/math.md, section 12.

    With the defaults and summaries of four tensors it is `eva_attention`. What differs:

        σ      = LN(W x + b), W x + b, or x, for summaries of four, two or no tensors
        m_c    = q̃_c + k̃_c ('qk'), q̃_c ('q'), 0 ('zero') or a parameter ('learned'); μ_c = s^½ · proposal_scale · m_c
        ω_cs   = μ_c + noise_cs, s = 1..S
        β_c(q) = Σ_s w_cs Σ_m ξ(q̂, ω_cs) ξ(k̂_m, ω_cs) v_m / Σ_s w_cs Σ_m ξ(q̂, ω_cs) ξ(k̂_m, ω_cs),
                 w_cs = N(ω_cs; 0, I) / N(ω_cs; μ_c, noise_std² I)
        P_c    less the tokens of E^n for partition 'complement', in means, k̃ and β alike; a cell with no token left
               is in no softmax
        E^n    the window and half a window of context on each of its sides, with `overlap`

    Memory: N · C_p · S attention weights a head for S > 1 samples (a β for each query, N · C_p · d numbers, is never
    formed). 'complement' summarises, for every window, the cells that it meets: (H / w + P)(W / w + P) cells at most,
    of N / P² tokens each, for P = partition_grid and w = window_size.

    Arguments that are not below are as in `eva_attention`, with the E^n and P_c of here: cells less E^n count what is
    left of them for the `count_cells` 'all' and 'outside'.

    Args:
        summary_q: Parameters of q's σ: projection weight `(d, d)` and bias `(d)`, LayerNorm weight `(d)` and bias
            `(d)`; the first two; or none. Needed for the proposals 'qk' and 'q'.
        summary_k: The same for k's. Needed unless partition_grid is 0.
        rel_pos_bias: The table of b, `((2r - 1)², h)` with r = window_size, or window_size + `halo_size(window_size)`
            for `overlap`: with (dy, dx) the query's place minus the key's, row (dy + r - 1)·(2r - 1) + dx + r - 1.
        partition: 'all', cells over all tokens; or 'complement', for each query over those outside of its E.
        proposal: 'qk', 'q', 'zero' or 'learned'.
        proposal_mean: m of a learned proposal, `(h, partition_grid, partition_grid, d)`: by row and column of the cell.
        overlap: Let windows overlap.
        noise: noise_std · ε, broadcasts to `(B, h, C_p, S, d)`, S samples. None for one sample at the mean.
        noise_std: Standard deviation of the proposal, for the weights w of several samples.

    Returns:
        `(B, h, N, d)` in q's dtype.

    Raises:
        ValueError: arguments that do not fit each other; the message names the value.
    """
    feat_size = static_size(feat_size)
    check_partition(window_size, partition_grid)
    check_bool('overlap', overlap)
    options = VariantOptions(
        feat_size,
        summary_q,
        summary_k,
        rel_pos_bias,
        window_size,
        partition_grid,
        partition,
        proposal,
        proposal_mean,
        halo_size(window_size) if overlap else 0,
        softmax_scale(scale, q),
        proposal_scale,
        noise,
        noise_std,
        dropout_p,
        norm_eps,
        count_cells,
    )
    check_variant(q, k, v, options)
    if not torch.jit.is_scripting():  # noqa: SIM102, TorchScript skips this block, but not a longer condition
        if not q.is_meta and torch.is_autocast_enabled(q.device.type):
            with torch.autocast(q.device.type, enabled=False):  # the precision of every step is chosen above
                return _variant(q, k, v, options)
    return _variant(q, k, v, options)
