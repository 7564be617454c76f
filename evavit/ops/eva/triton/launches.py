"""The launches of a call: of the forward, and of the backward in two parts."""

import functools
import math
from typing import Any, NamedTuple, Optional, Sequence, Tuple

import torch

from evavit.ops.common.launch import Launches, Memory, Pointer, ceil_div, sum_parts
from evavit.ops.eva.case import eva_num_cells
from evavit.ops.grid import window_shape

from .backward import backward_shared, backward_summary, backward_tokens, backward_weights
from .forward import forward_cells, forward_tokens, forward_windows
from .pieces import LN2
from .plan import WINDOWS_BACKWARD, WINDOWS_FORWARD, Plan, cached_plan, window_tiles
from .prefix import backward_prefix, combine_prefix, forward_prefix

__all__ = ['Backward', 'Case', 'Kept', 'backward_launches', 'forget', 'forward_launches', 'keep']


class Kept(NamedTuple):
    """What the forward writes beside y, in one allocation of `size` bytes: k̃ and β, and for a backward the rest.

    All but k̃ and β are float32: the LayerNorm of rounded means is not that of the forward. Behind k̃ and β are k and v
    of the P prefix tokens. The log-sum-exps are in one axis, `(B, h, N)` of the grid's and `(B, h, P)` of the prefix.
    """

    k_tilde: Pointer  # (B, h, C_p + P, d), dtype
    beta: Pointer  # likewise
    padded: Optional[Pointer]  # the padded bias, only for the forward, where it is small
    lse: Pointer  # (B · h · (P + N))
    omega: Pointer  # (B, h, C_p, d)
    means: Pointer  # (2, B, h, C_p, d)
    size: Any


def keep(
    shape: Tuple[Any, ...],
    dtype: torch.dtype,
    feat_size: Sequence[int],
    window_size: int,
    partition_grid: int,
    num_prefix_tokens: int,
    has_bias: bool,
    save: bool,
    tensor: int = 0,
) -> Kept:
    """Places in the call's tensor of this number; the batch of `shape` `(B, h, P + N, d)` may be a symbol."""
    B, h, T, D = shape
    grid, memory, f32 = list(feat_size), Memory(), torch.float32
    cells = eva_num_cells(grid, partition_grid)
    k_tilde, beta = (memory.place(tensor, dtype, B, h, cells + num_prefix_tokens, D) for _ in range(2))
    padded = None
    if has_bias and window_size > 0:
        side = math.prod(window_tiles(math.prod(window_shape(grid, window_size)), dtype == f32))
        if side <= 64:
            padded = memory.place(tensor, f32, h, side, side)
    lse = omega = means = k_tilde._replace(dtype=f32)  # where nothing is written
    if save:
        lse = memory.place(tensor, f32, B, h, T)
        omega, means = (memory.place(tensor, f32, n, B, h, cells, D) for n in (1, 2))
    return Kept(k_tilde, beta, padded, lse, omega, means, memory.size)


class Case(NamedTuple):
    """All that decides on the launches of a call, but for the alignment of its tensors."""

    shape: Tuple[int, int, int, int]  # of q, (B, h, P + N, d)
    strides: Tuple[int, ...]  # of q, k and v, four each
    apart: Optional[int]  # elements from q to k and from k to v where they are one tensor
    dtype: torch.dtype
    device: int
    feat_size: Tuple[int, ...]
    window_size: int
    partition_grid: int
    count_cells: str
    num_prefix_tokens: int
    scale: float
    proposal_scale: float
    norm_eps: float
    learned: Tuple[Optional[torch.dtype], ...]  # of the summaries' eight parameters and of the bias
    gluon: bool  # whether the kernels in Gluon may run: not where q, k or v is not aligned to 16 bytes

    def plan(self) -> Plan:
        """Sizes and tiles."""
        full = self.dtype == torch.float32
        return cached_plan(
            *(tuple(self.shape), full, self.feat_size, self.window_size, self.partition_grid),
            *(self.count_cells, self.num_prefix_tokens),
        )

    def keep(self, run: Launches, save: bool) -> Kept:
        """What the forward writes beside y, the next tensor of a call."""
        sizes = self.feat_size, self.window_size, self.partition_grid, self.num_prefix_tokens
        tensor = run.tensor(torch.uint8).tensor
        return keep(self.shape, self.dtype, *sizes, self.learned[-1] is not None, save, tensor)

    def tokens(self, run: Launches) -> Tuple[Pointer, Pointer, Pointer]:
        """q, k and v, the next three tensors of a call."""
        q, k, v = (run.tensor(self.dtype) for _ in range(3))
        apart = self.apart or 0
        return q, k.at(apart), v.at(2 * apart)

    def of_learned(self, run: Launches) -> Tuple[Pointer, ...]:
        """The summaries' eight parameters and the bias, the next nine tensors of a call."""
        return tuple(run.tensor(dtype or self.dtype) for dtype in self.learned)


def _without_prefix(plan: Plan, strides: Tuple[int, ...], *tokens: Pointer) -> Tuple[Pointer, ...]:
    """The grid's part of tensors `(B, h, P + N, d)`, whose strides are four each."""
    return tuple(x.at(plan.P * stride) for x, stride in zip(tokens, strides[2::4], strict=True))


@functools.lru_cache(maxsize=256)
def forward_launches(case: Case, noise_dtype: Optional[torch.dtype], save: bool) -> Tuple[Launches, int]:
    """The launches of the forward, and how many bytes it keeps with `save`.

    Their tensors are q, k, v, the eight parameters and the bias, the noise, y and what is kept. Any tensor does where
    one is None.
    """
    plan, run, scale = case.plan(), Launches(), case.scale
    _, heads, T, D = case.shape
    q, k, v = case.tokens(run)
    *summary, table = case.of_learned(run)
    noise, out = run.tensor(noise_dtype or case.dtype), run.tensor(case.dtype)
    k_tilde, beta, padded, lse, omega, means, size = case.keep(run, save)
    sob = T * heads * D
    if plan.P:
        _forward_prefix(plan, run, (q, k, v), out, sob, (k_tilde, beta, lse), case, save)
        q, k, v, out = _without_prefix(plan, (*case.strides, sob, D, heads * D, 1), q, k, v, out)
    if plan.cells:
        run.launch(
            forward_cells,
            (plan.pairs, ceil_div(plan.cells, plan.cell_tiles[0]['G']), 1),
            *(q, k, v, *case.strides),
            *summary,
            *(noise, k_tilde, beta, omega, means),
            *plan.cell_sizes,
            *(scale**0.5, case.proposal_scale, case.norm_eps),
            **plan.options['forward_cells'],
            NOISE=noise_dtype is not None,
            SAVE=save,
        )
    per_program = plan.per_program(WINDOWS_FORWARD)
    chunks = ceil_div(plan.n_win, per_program)
    module = plan.gluon(case.strides, case.device) if case.gluon else None
    has_bias = case.learned[-1] is not None and plan.local
    if has_bias:
        padded = padded or run.scratch(torch.float32, heads, plan.bias_tile, plan.bias_tile)
        pad = plan.pad_bias if module is None else plan.pad_bias_fragments
        pad(run, table, padded, scale if plan.one_tile else LN2)
    log_count = plan.log_counts(run, module is not None, scale)
    grid = plan.B * chunks * heads, 1, 1
    sizes = heads, plan.H, plan.W, plan.n_wx, plan.n_win, plan.rows, chunks
    args = k_tilde, beta, padded or q, log_count, out, sob, lse, *sizes, scale
    options: Any = dict(PER_PROGRAM=per_program, BIAS=has_bias, SAVE=save)
    if module is not None:
        strides = case.strides[:3] + case.strides[4:7] + case.strides[8:11]
        options.update(plan.options['forward_windows_gluon'])
        run.launch(module.forward_windows_gluon, grid, q, k, v, *strides, *args, **options)
    elif plan.one_tile:
        packed = case.strides[:4] == case.strides[4:8] == case.strides[8:]
        options.update(plan.options['forward_windows'], PACKED=packed)
        run.launch(forward_windows, grid, q, k, v, *case.strides, *args, **options)
    else:
        options.update(plan.options['forward_tokens'])
        run.launch(forward_tokens, grid, q, k, v, *case.strides, *args, **options)
    return run, size


def _forward_prefix(
    plan: Plan,
    run: Launches,
    tokens: Tuple[Pointer, Pointer, Pointer],
    out: Pointer,
    sob: int,
    written: Tuple[Pointer, Pointer, Pointer],
    case: Case,
    save: bool,
) -> None:
    """The prefix tokens' part of the outputs: y, log-sum-exp, and what all windows see of them."""
    k_tilde, beta, lse = written
    T, P, D, pairs = plan.P + plan.N, plan.P, plan.D, plan.pairs
    splits, per_split = plan.split(T)
    acc_parts, stat_parts = (run.scratch(torch.float32, splits, pairs, P, n) for n in (D, 2))
    run.launch(
        forward_prefix,
        (pairs * splits, 1, 1),
        *(*tokens, *case.strides, k_tilde, beta, acc_parts, stat_parts),
        *(plan.heads, T, plan.cells, plan.rows, pairs, splits, per_split, case.scale),
        **plan.prefix,
        BM=32 if plan.small else 64,
        PREC=plan.prec,
    )
    run.launch(
        combine_prefix,
        (pairs, 1, 1),
        *(acc_parts, stat_parts, out, sob, lse.at(pairs * plan.N) if save else lse, plan.heads, pairs, splits),
        **plan.prefix,
        SAVE=save,
    )


class Backward(NamedTuple):
    """The launches of the backward. Between the two parts the memory of the first can be given back.

    `cells` has the tensors workspace, q, k, v, dy, y, what the forward kept, the eight parameters, the bias and the
    gradient of the learned; `tokens` the same and dq, dk, dv, and where there are prefix tokens the sum of their dq.
    Any tensor does where one is None.
    """

    cells: Launches
    tokens: Launches
    workspace: int  # bytes of what both use
    zeros: Optional[Tuple[int, int]]  # the part of it, in bytes, that has to be zero before `tokens`


@functools.lru_cache(maxsize=256)
def backward_launches(case: Case, grad_strides: Tuple[int, ...]) -> Backward:
    """The launches of the backward of a gradient of y with these strides.

    The gradient of the learned is float32: of W, b, LayerNorm weight and bias of q's summary, of k's, and of the table.
    """
    plan, scale = case.plan(), case.scale
    _, heads, T, D = case.shape
    P, cells, pairs = plan.P, plan.cells, plan.pairs
    f32 = torch.float32
    all_strides = *case.strides, *grad_strides
    module = plan.gluon(all_strides, case.device) if case.gluon else None
    has_bias = case.learned[-1] is not None and plan.local
    sob = T * heads * D

    def declare(run: Launches) -> Tuple[Any, ...]:
        run.tensor(torch.uint8)
        whole = *case.tokens(run), run.tensor(case.dtype), run.tensor(case.dtype)
        kept = case.keep(run, True)
        *summary, table = case.of_learned(run)
        return whole, kept, summary, table, run.tensor(f32)

    memory, run = Memory(), Launches()
    whole, kept, summary, table, dlearned = declare(run)
    q, k, v, grad, out = _without_prefix(plan, (*all_strides, sob, D, heads * D, 1), *whole)
    splits, per_split = plan.split(plan.N if module is not None else plan.places)
    delta = memory.place(0, f32, pairs, plan.N)
    log_count = plan.log_counts(run, module is not None, scale, memory)
    place = functools.partial(memory.place, 0) if P else run.scratch  # the prefix reads them once more
    dk_tilde_parts, dbeta_parts = (place(f32, splits, plan.rows_total, D) for _ in range(2))
    shared = (
        *(kept.lse, delta, kept.k_tilde, kept.beta, log_count, dk_tilde_parts, dbeta_parts),
        *(heads, plan.N, plan.rows, splits, per_split, plan.rows_total, scale),
    )
    by_window = plan.count == 2
    if module is not None:
        run.launch(
            module.backward_shared_gluon,
            (pairs * splits, 1, 1),
            *(q, out, sob, grad, *case.strides[:3], *grad_strides[:3]),
            *shared,
            *((plan.W, plan.n_wx) if by_window else (None, None)),
            **plan.options['backward_shared_gluon'],
        )
    else:
        run.launch(
            backward_shared,
            (pairs * splits, max(plan.NC, 1), 1),
            *(q, out, sob, grad, *case.strides[:4], *grad_strides),
            *shared,
            *((plan.H, plan.W, plan.n_wx, plan.n_win) if by_window else (None,) * 4),
            **plan.options['backward_shared'],
        )
    width, xi, dlog_xi = 0, delta, delta
    dbeta = omega_half = dmeans = delta
    if cells:
        xi, dlog_xi = (memory.place(0, f32, pairs, plan.N) for _ in range(2))
        dbeta = memory.place(0, case.dtype, plan.cells_total, D)
        omega_half = memory.place(0, case.dtype, plan.cells_total, D) if module is not None else dbeta
        dmeans = memory.place(0, case.dtype, 2, plan.cells_total, D)
        domega = run.scratch(f32, plan.cells_total, D)
        run.launch(
            backward_weights,
            (pairs, ceil_div(cells, plan.cell_tiles[1]['G']), 1),
            *(k, v, *case.strides[4:]),
            *(kept.omega, dbeta_parts, dbeta, omega_half, domega, xi, dlog_xi),
            *plan.cell_sizes,
            *(splits, plan.rows_total, scale**0.5),
            **plan.options['backward_weights'],
            OMEGA_HALF=module is not None,
        )
        programs = min(ceil_div(plan.cells_total, plan.options['backward_summary']['R']), 128)
        width = 2 * (D * D + 3 * D)
        dparams_parts = run.scratch(f32, programs, width)
        w_q, b_q, g_q, _, w_k, b_k, g_k, _ = summary
        run.launch(
            backward_summary,
            (programs, 2, 1),
            *(kept.means, domega, dk_tilde_parts),
            *(w_q, b_q, g_q, w_k, b_k, g_k),
            *(dmeans, dparams_parts),
            *(plan.cells_total, splits, plan.H, plan.W, plan.n_cx, cells, plan.ch, plan.cw),
            *(plan.rows, plan.rows_total),
            *(scale**0.5 * case.proposal_scale, case.norm_eps),
            **plan.options['backward_summary'],
        )
        sum_parts(run, dparams_parts, dlearned, programs, width)

    of_cells, run = run, Launches()
    whole, kept, _, table, dlearned = declare(run)
    q, k, v, grad, out = _without_prefix(plan, (*all_strides, sob, D, heads * D, 1), *whole)
    packed = case.apart is not None
    row = heads * D * (3 if packed else 1)
    whole_grads = [run.tensor(case.dtype).at(i * heads * D if packed else 0) for i in range(3)]
    dq, dk, dv = (x.at(P * row) for x in whole_grads)
    dstrides = T * row, D, row
    per_program = plan.per_program(WINDOWS_BACKWARD)
    chunks = ceil_div(plan.n_win, per_program)
    dbias_parts, padded, zeros = delta, q, None
    if has_bias:
        side = plan.bias_tile
        begin = memory.size
        dbias_parts = memory.place(0, f32, plan.B * chunks, heads, side, side)
        if plan.NT > 1:  # registers hold the sum over one tile; the sum over more is kept in memory, from zero
            zeros = begin, memory.size
        padded = memory.place(0, f32, heads, side, side)
        if module is not None:
            plan.pad_bias_fragments(run, table, padded, scale)
        else:
            plan.pad_bias(run, table, padded, LN2)
    grid = plan.B * chunks * heads, 1, 1
    saved = kept.lse, delta, kept.k_tilde, kept.beta, padded, log_count
    through_cells = dbeta, dmeans, xi, dlog_xi
    written = dq, dk, dv, *dstrides, dbias_parts
    sizes = heads, plan.H, plan.W, plan.n_wx, plan.n_win, plan.n_cx, cells, plan.rows, chunks, plan.cells_total
    options = dict(PER_PROGRAM=per_program, BIAS=has_bias)
    if module is not None:
        strides = all_strides[:3] + all_strides[4:7] + all_strides[8:11] + all_strides[12:15]
        run.launch(
            module.backward_tokens_gluon,
            grid,
            *(q, k, v, grad, *strides),
            *(*saved, omega_half, *through_cells, *written, *sizes, scale),
            **options,
            **plan.options['backward_tokens_gluon'],
        )
    else:
        run.launch(
            backward_tokens,
            grid,
            *(q, k, v, grad, *all_strides),
            *(*saved, kept.omega, *through_cells, *written, *sizes, scale, scale**0.5),
            **options,
            **plan.options['backward_tokens'],
        )
    if P:
        splits_P, per_split = plan.split(T)
        dq_parts = run.scratch(f32, splits_P, pairs, P, D)
        run.launch(
            backward_prefix,
            (pairs * splits_P, 1, 1),
            *(*whole[:4], *all_strides, whole[4], sob, kept.lse.at(pairs * plan.N), dk_tilde_parts, dbeta_parts),
            *(*whole_grads[1:], *dstrides, dq_parts),
            *(heads, T, cells, plan.rows, plan.rows_total, pairs, splits, splits_P, per_split, scale),
            **plan.prefix,
            BM=32 if plan.small else 64,
            PREC=plan.prec,
        )
        sum_parts(run, dq_parts, run.tensor(f32), splits_P, pairs * P * D)
    if has_bias:
        dbias = memory.place(0, f32, heads, side, side)
        sum_parts(run, dbias_parts, dbias, plan.B * chunks, heads * side * side)
        plan.bias_grad(run, dbias, dlearned.at(width))
    return Backward(of_cells, run, memory.size, zeros)


def forget() -> None:
    """Put launches together anew from now on, as after a change of a constant of theirs."""
    for cache in (cached_plan, forward_launches, backward_launches):
        cache.cache_clear()
