"""EVA as fused CUDA kernels in Triton, forward and backward, behind `evavit.ops.eva_attention`.

Memory traffic bounds EVA: at 49 keys a window and 49 cells the arithmetic takes a fraction of the bytes' time. In
units of one `(B, N, C)` tensor the kernels move

    forward    cells:   q, k, v in                                  -> k̃, β                             3
               windows: q, k, v in                                  -> y, log-sum-exp                   4
    backward   shared:  q, y, dy in                                 -> dk̃, dβ of the logits, y·dy       3
               weights: k, v in                                     -> ξ, d log ξ, dω                   2
               summary: the cells' tensors alone                    -> dq̄, dk̄, parameters              0
               tokens:  q, k, v, dy in                              -> dq, dk, dv, bias                 7

where 4 and 8 are the floors. The kernel that writes dq, dk and dv comes last, when everything that reaches a token
through its cell is known: so each gradient is written once and read never.

Every sum runs in one fixed order, in a program or over partial sums in memory: no atomics, two runs agree to the bit.
Products of half-precision tensors accumulate in float32, float32 tensors are multiplied in full float32.

On Hopper `eva_gluon.py` has faster kernels for three of these, for the default windows and cells (`_Plan.gluon`).
"""

import functools
import math
import warnings
from typing import Dict, List, Optional, Tuple

import torch
import triton
import triton.language as tl

from evavit.ops.common.launch import Launcher, ceil_div, on_device, register_op, sum_parts
from evavit.ops.grid import block_counts, cell_shape, window_shape

__all__ = ['eva_attention_fused']

LN2 = math.log(2)
LOG2E = tl.constexpr(1 / LN2)  # the kernels' exponentials are powers of 2


# --------------------------------------------------------------------------------------------------------------------
# Pieces of kernels. n, y, x, c are the numbers of tokens, rows, columns and cells; `valid` says which are real.
# --------------------------------------------------------------------------------------------------------------------


@triton.jit
def _load_rows(base, row, valid, stride_row, stride_dim, D: tl.constexpr, BD: tl.constexpr):
    """Rows `(R)` of a `(.., D)` tensor as a tile `(R, BD)`; zero where there is no row or no column."""
    dim = tl.arange(0, BD)
    mask = valid[:, None] if D == BD else valid[:, None] & (dim < D)[None, :]
    return tl.load(base + (row[:, None] * stride_row + dim[None, :] * stride_dim), mask=mask, other=0.0)


@triton.jit
def _store_rows(base, row, valid, stride_row, stride_dim, x, D: tl.constexpr, BD: tl.constexpr):
    dim = tl.arange(0, BD)
    mask = valid[:, None] if D == BD else valid[:, None] & (dim < D)[None, :]
    tl.store(base + (row[:, None] * stride_row + dim[None, :] * stride_dim), x.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _window_rows(
    win,
    tile,
    H,
    W,
    n_wx,
    n_cx,
    WH: tl.constexpr,
    WW: tl.constexpr,
    CH: tl.constexpr,
    CW: tl.constexpr,
    LOCAL: tl.constexpr,
    BM: tl.constexpr,
):
    """Token numbers, cells and validity of the tile-th BM tokens of a window; of the grid if there is no LOCAL."""
    r = tile * BM + tl.arange(0, BM)
    if LOCAL:
        y, x = (win // n_wx) * WH + r // WW, (win % n_wx) * WW + r % WW
        n, valid = y * W + x, (r < WH * WW) & (y < H) & (x < W)
    else:
        n = win * BM + r
        y, x, valid = n // W, n % W, n < H * W
    return n, (y // CH) * n_cx + x // CW, valid


@triton.jit
def _bias_tile(bias, i, j, BM: tl.constexpr, NT: tl.constexpr):
    """Pointers to the tile (i, j) of a padded bias `(NT · BM, NT · BM)`."""
    r = tl.arange(0, BM)
    return bias + (i * BM + r)[:, None] * (NT * BM) + (j * BM + r)[None, :]


@triton.jit
def _window_start(win, n_wx, W, H, ry, rx, WH: tl.constexpr, WW: tl.constexpr, EDGE: tl.constexpr):
    """The first token of a window, and which of its places (ry, rx) hold a token."""
    y0, x0 = (win // n_wx) * WH, (win % n_wx) * WW
    valid = ry < WH
    if EDGE:
        valid = valid & (y0 + ry < H) & (x0 + rx < W)
    return y0.to(tl.int64) * W + x0, valid


@triton.jit
def _split_bias(bias, dtype: tl.constexpr, BM: tl.constexpr):
    """A padded bias, in units of q·kᵀ, as two half-precision matrices high + low, and the unit matrix that brings them
    into a sum of products: they wait in shared memory, where float32 would take registers that the kernel lacks."""
    r = tl.arange(0, BM)
    x = tl.load(_bias_tile(bias, 0, 0, BM, 1))
    kind: tl.constexpr = tl.float32 if dtype == tl.float32 else tl.bfloat16
    high = x.to(kind)
    return high, (x - high.to(tl.float32)).to(kind), (r[:, None] == r[None, :]).to(kind)


@triton.jit
def _bias_at(bias, i, j, mask, SIDE: tl.constexpr, WW: tl.constexpr, TABLE: tl.constexpr):
    """The bias of queries i and keys j of a window with rows of WW, for one head: the program's axis 2."""
    head = tl.program_id(2)
    if TABLE:  # (differences of places, heads)
        place = (i // WW - j // WW + SIDE - 1) * (2 * SIDE - 1) + i % WW - j % WW + SIDE - 1
        offset = place * tl.num_programs(2) + head
    else:  # (heads, SIDE², SIDE²)
        offset = ((head * SIDE * SIDE + (i // WW) * SIDE + i % WW) * SIDE + j // WW) * SIDE + j % WW
    return tl.load(bias + offset, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _pad_bias(
    bias,
    padded,
    unit,
    S,
    SIDE: tl.constexpr,
    WH: tl.constexpr,
    WW: tl.constexpr,
    TABLE: tl.constexpr,
    TILE: tl.constexpr,
):
    """The bias of a window of WH × WW in a unit, padded with zeros to `(S, S)`."""
    i = (tl.program_id(0) * TILE + tl.arange(0, TILE))[:, None]
    j = (tl.program_id(1) * TILE + tl.arange(0, TILE))[None, :]
    x = _bias_at(bias, i, j, (i < WH * WW) & (j < WH * WW), SIDE, WW, TABLE) / unit
    tl.store(padded + tl.program_id(2) * S * S + i * S + j, x)


@triton.jit
def _pad_bias_fragments(
    bias, padded, unit, SIDE: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr, TABLE: tl.constexpr
):
    """`_pad_bias` for one tile of 64, in the order in which the 128 threads of a warp group hold a tile of products: 4
    values of a thread, threads, eighths of the columns. Keys that are none get what no logit outweighs."""
    m = tl.program_id(0) * 256 + tl.arange(0, 256)
    i = (m >> 7 & 3) * 16 + (m >> 1 & 1) * 8 + (m >> 4 & 7)
    j = (m >> 9) * 8 + (m >> 2 & 3) * 2 + (m & 1)
    key = j < WH * WW
    x = _bias_at(bias, i, j, key & (i < WH * WW), SIDE, WW, TABLE) / unit
    tl.store(padded + tl.program_id(2) * 4096 + m, tl.where(key, x, -(2.0**100)))


@triton.jit
def _table_grad(
    dbias, dtable, S, heads, SIDE: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr, E: tl.constexpr, I: tl.constexpr
):
    """The gradient of a table of biases: its entry for a difference of places is the sum over the pairs of places of
    a window of WH × WW that are so far apart, in one fixed order."""
    e = tl.program_id(0) * E + tl.arange(0, E)
    head = tl.program_id(1)
    dy, dx = e // (2 * SIDE - 1) - (SIDE - 1), e % (2 * SIDE - 1) - (SIDE - 1)
    acc = tl.zeros([E, I], tl.float32)
    for i0 in range(0, WH * WW, I):
        i = i0 + tl.arange(0, I)
        y, x = (i // WW)[None, :] - dy[:, None], (i % WW)[None, :] - dx[:, None]  # the key's place
        mask = (i < WH * WW)[None, :] & (y >= 0) & (y < WH) & (x >= 0) & (x < WW)
        acc += tl.load(dbias + (head * S + i[None, :]) * S + y * WW + x, mask=mask, other=0.0)
    tl.store(dtable + e * heads + head, tl.sum(acc, 1), mask=e < (2 * SIDE - 1) * (2 * SIDE - 1))


@triton.jit
def _cell_tokens(y0, x0, cell_valid, t0, H, W, ch, cw, T: tl.constexpr):
    """Token numbers and validity `(G, T)` of the tokens t0.. of cells whose corners are y0, x0 `(G)`."""
    t = t0 + tl.arange(0, T)
    y = y0[:, None] + (t // cw)[None, :]
    x = x0[:, None] + (t % cw)[None, :]
    valid = cell_valid[:, None] & (t < ch * cw)[None, :] & (y < H) & (x < W)
    return y * W + x, valid


@triton.jit
def _load_cells(base, n, valid, stride_row, stride_dim, D: tl.constexpr, BD: tl.constexpr):
    """Tokens n `(G, T)` as a float32 tile `(G, T, BD)`."""
    dim = tl.arange(0, BD)
    mask = valid[:, :, None] if D == BD else valid[:, :, None] & (dim < D)[None, None, :]
    ptr = base + n[:, :, None] * stride_row + dim[None, None, :] * stride_dim
    return tl.load(ptr, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _load_weight(weight, D: tl.constexpr, BD: tl.constexpr):
    """W of (26), `(out, in)`."""
    dim = tl.arange(0, BD)
    return _load_rows(weight, dim, dim < D, D, 1, D, BD).to(tl.float32)


@triton.jit
def _normalise(z, eps, D: tl.constexpr, BD: tl.constexpr):
    """LayerNorm without its affine part, and 1/σ, over the D real columns."""
    inside = (tl.arange(0, BD) < D)[None, :]
    centred = tl.where(inside, z - tl.sum(z, 1)[:, None] / D, 0.0)
    inv = 1.0 / tl.sqrt_rn(tl.sum(centred * centred, 1) / D + eps)
    return centred * inv[:, None], inv


@triton.jit
def _summary(mean, weight, bias, norm_weight, norm_bias, eps, D: tl.constexpr, BD: tl.constexpr, PREC: tl.constexpr):
    """σ of (26)."""
    dim = tl.arange(0, BD)
    w = _load_weight(weight, D, BD)
    b = tl.load(bias + dim, mask=dim < D, other=0.0).to(tl.float32)
    z_hat, _ = _normalise(tl.dot(mean, tl.trans(w), input_precision=PREC) + b[None, :], eps, D, BD)
    g = tl.load(norm_weight + dim, mask=dim < D, other=0.0).to(tl.float32)
    o = tl.load(norm_bias + dim, mask=dim < D, other=0.0).to(tl.float32)
    return z_hat * g[None, :] + o[None, :]


# --------------------------------------------------------------------------------------------------------------------
# Forward
# --------------------------------------------------------------------------------------------------------------------


@triton.jit
def _forward_cells(
    q,
    k,
    v,
    sqb,
    sqh,
    sqn,
    sqd,
    skb,
    skh,
    skn,
    skd,
    svb,
    svh,
    svn,
    svd,
    w_q,
    b_q,
    g_q,
    o_q,
    w_k,
    b_k,
    g_k,
    o_k,
    noise,
    k_tilde,
    beta,
    omega,
    means,
    heads,
    H,
    W,
    n_cx,
    cells,
    ch,
    cw,
    cells_total,
    scale_half,
    proposal_scale,
    eps,
    D: tl.constexpr,
    BD: tl.constexpr,
    G: tl.constexpr,
    T: tl.constexpr,
    ONCE: tl.constexpr,
    NOISE: tl.constexpr,
    SAVE: tl.constexpr,
    PREC: tl.constexpr,
):
    """k̃ and β of G cells of one (image, head). ONCE: T holds a whole cell, so that k is read once."""
    head = tl.program_id(0) % heads
    image = (tl.program_id(0) // heads).to(tl.int64)
    c = tl.program_id(1) * G + tl.arange(0, G)
    cell_valid = c < cells
    y0, x0 = (c // n_cx) * ch, (c % n_cx) * cw
    count = tl.minimum(ch, H - y0) * tl.minimum(cw, W - x0)
    count = tl.where(cell_valid, count, 1).to(tl.float32)
    q += image * sqb + head * sqh
    k += image * skb + head * skh
    v += image * svb + head * svh

    n, valid = _cell_tokens(y0, x0, cell_valid, 0, H, W, ch, cw, T)
    k_tile = _load_cells(k, n, valid, skn, skd, D, BD)
    q_sum = tl.sum(_load_cells(q, n, valid, sqn, sqd, D, BD), 1)
    k_sum = tl.sum(k_tile, 1)
    if not ONCE:
        for t0 in range(T, ch * cw, T):
            n, valid = _cell_tokens(y0, x0, cell_valid, t0, H, W, ch, cw, T)
            q_sum += tl.sum(_load_cells(q, n, valid, sqn, sqd, D, BD), 1)
            k_sum += tl.sum(_load_cells(k, n, valid, skn, skd, D, BD), 1)
    q_mean = q_sum / count[:, None]
    k_mean = k_sum / count[:, None]
    kt = _summary(k_mean, w_k, b_k, g_k, o_k, eps, D, BD, PREC)
    om = proposal_scale * scale_half * (_summary(q_mean, w_q, b_q, g_q, o_q, eps, D, BD, PREC) + kt)

    row = (image * heads + head) * cells + c
    if NOISE:
        om += _load_rows(noise, row, cell_valid, D, 1, D, BD).to(tl.float32)
    _store_rows(k_tilde, row, cell_valid, D, 1, kt, D, BD)
    if SAVE:
        _store_rows(omega, row, cell_valid, D, 1, om, D, BD)
        _store_rows(means, row, cell_valid, D, 1, q_mean, D, BD)
        _store_rows(means, cells_total + row, cell_valid, D, 1, k_mean, D, BD)

    # log ξ = s^½ k·ω - ½ s ‖k‖² = s^½ k·(ω - ½ s^½ k); the softmax over a cell weighs the values.
    if ONCE:
        log_xi = scale_half * tl.sum(k_tile * (om[:, None, :] - 0.5 * scale_half * k_tile), 2)
        log_xi = tl.where(valid, log_xi, float('-inf'))
        top = tl.where(cell_valid, tl.max(log_xi, 1), 0.0)
        xi = tl.exp2((log_xi - top[:, None]) * LOG2E)
        total = tl.where(cell_valid, tl.sum(xi, 1), 1.0)
        acc = tl.sum(xi[:, :, None] * _load_cells(v, n, valid, svn, svd, D, BD), 1)
    else:
        top = tl.full([G], float('-inf'), tl.float32)
        total = tl.zeros([G], tl.float32)
        acc = tl.zeros([G, BD], tl.float32)
        for t0 in range(0, ch * cw, T):
            n, valid = _cell_tokens(y0, x0, cell_valid, t0, H, W, ch, cw, T)
            k_t = _load_cells(k, n, valid, skn, skd, D, BD)
            v_t = _load_cells(v, n, valid, svn, svd, D, BD)
            log_xi = scale_half * tl.sum(k_t * (om[:, None, :] - 0.5 * scale_half * k_t), 2)
            log_xi = tl.where(valid, log_xi, float('-inf'))
            new_top = tl.maximum(top, tl.max(log_xi, 1))
            # A short cell may have none of these tokens, a cell past the last has none at all.
            safe = tl.where(new_top == float('-inf'), 0.0, new_top)
            decay = tl.exp2((top - safe) * LOG2E)
            xi = tl.exp2((log_xi - safe[:, None]) * LOG2E)
            total = total * decay + tl.sum(xi, 1)
            acc = acc * decay[:, None] + tl.sum(xi[:, :, None] * v_t, 1)
            top = new_top
        total = tl.where(cell_valid, total, 1.0)
    _store_rows(beta, row, cell_valid, D, 1, acc / total[:, None], D, BD)


@triton.jit
def _forward_tokens(
    q,
    k,
    v,
    sqb,
    sqh,
    sqn,
    sqd,
    skb,
    skh,
    skn,
    skd,
    svb,
    svh,
    svn,
    svd,
    k_tilde,
    beta,
    bias,
    out,
    lse,
    heads,
    H,
    W,
    n_wx,
    n_win,
    cells,
    chunks,
    scale,
    D: tl.constexpr,
    BD: tl.constexpr,
    WH: tl.constexpr,
    WW: tl.constexpr,
    BM: tl.constexpr,
    NT: tl.constexpr,
    BC: tl.constexpr,
    NC: tl.constexpr,
    PER_PROGRAM: tl.constexpr,
    LOCAL: tl.constexpr,
    BIAS: tl.constexpr,
    SAVE: tl.constexpr,
    PREC: tl.constexpr,
):
    """`_forward_windows` for what takes more than one tile, NT of BM tokens or NC of BC cells, or has no windows."""
    head = tl.program_id(0) % heads
    chunk = (tl.program_id(0) // heads) % chunks
    image = (tl.program_id(0) // (heads * chunks)).to(tl.int64)
    q += image * sqb + head * sqh
    k += image * skb + head * skh
    v += image * svb + head * svh
    out += image * H * W * heads * D + head * D
    lse += (image * heads + head) * H * W
    k_tilde += (image * heads + head) * cells * D
    beta += (image * heads + head) * cells * D
    bias += head * (NT * BM * NT * BM)
    qk_scale = scale * LOG2E
    c = tl.arange(0, BC)

    for win in range(chunk * PER_PROGRAM, tl.minimum(chunk * PER_PROGRAM + PER_PROGRAM, n_win)):
        for i in range(NT):
            n, _, valid = _window_rows(win, i, H, W, n_wx, 1, WH, WW, 1, 1, LOCAL, BM)
            q_i = _load_rows(q, n, valid, sqn, sqd, D, BD)
            top = tl.full([BM], float('-inf'), tl.float32)
            total = tl.zeros([BM], tl.float32)
            acc = tl.zeros([BM, BD], tl.float32)
            if LOCAL:
                for j in range(NT):
                    n_j, _, valid_j = _window_rows(win, j, H, W, n_wx, 1, WH, WW, 1, 1, LOCAL, BM)
                    k_j = _load_rows(k, n_j, valid_j, skn, skd, D, BD)
                    v_j = _load_rows(v, n_j, valid_j, svn, svd, D, BD)
                    s = tl.dot(q_i, tl.trans(k_j), input_precision=PREC) * qk_scale
                    if BIAS:
                        s += tl.load(_bias_tile(bias, i, j, BM, NT))
                    s = tl.where(valid_j[None, :], s, float('-inf'))
                    # The first tile holds the window's first token, so that no maximum is -inf.
                    new_top = tl.maximum(top, tl.max(s, 1))
                    decay = tl.exp2(top - new_top)
                    p = tl.exp2(s - new_top[:, None])
                    total = total * decay + tl.sum(p, 1)
                    acc = tl.dot(p.to(v_j.dtype), v_j, acc * decay[:, None], input_precision=PREC)
                    top = new_top
            for t in range(NC):
                c_t = t * BC + c
                kt = _load_rows(k_tilde, c_t, c_t < cells, D, 1, D, BD)
                bt = _load_rows(beta, c_t, c_t < cells, D, 1, D, BD)
                s = tl.dot(q_i, tl.trans(kt), input_precision=PREC) * qk_scale
                s = tl.where((c_t < cells)[None, :], s, float('-inf'))
                new_top = tl.maximum(top, tl.max(s, 1))
                decay = tl.exp2(top - new_top)
                p = tl.exp2(s - new_top[:, None])
                total = total * decay + tl.sum(p, 1)
                acc = tl.dot(p.to(bt.dtype), bt, acc * decay[:, None], input_precision=PREC)
                top = new_top
            _store_rows(out, n, valid, heads * D, 1, acc / total[:, None], D, BD)
            if SAVE:  # in units of log 2, as the backward's exp2 takes it
                tl.store(lse + n, top + tl.log2(total), mask=valid)


@triton.jit
def _forward_windows(
    q,
    k,
    v,
    sqb,
    sqh,
    sqn,
    sqd,
    skb,
    skh,
    skn,
    skd,
    svb,
    svh,
    svn,
    svd,
    k_tilde,
    beta,
    bias,
    out,
    lse,
    heads,
    H,
    W,
    n_wx,
    n_win,
    cells,
    chunks,
    scale,
    D: tl.constexpr,
    BD: tl.constexpr,
    WH: tl.constexpr,
    WW: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    PER_PROGRAM: tl.constexpr,
    PACKED: tl.constexpr,
    EDGE: tl.constexpr,
    CELLS: tl.constexpr,
    BIAS: tl.constexpr,
    SAVE: tl.constexpr,
    PREC: tl.constexpr,
):
    """(16) where one tile holds a window and one the cells, for PER_PROGRAM windows of one (image, head)."""
    if PACKED:  # equal strides, told to the compiler: one set of offsets
        skb, skh, skn, skd, svb, svh, svn, svd = sqb, sqh, sqn, sqd, sqb, sqh, sqn, sqd
    head = tl.program_id(0) % heads
    chunk = (tl.program_id(0) // heads) % chunks
    image = (tl.program_id(0) // (heads * chunks)).to(tl.int64)
    q += image * sqb + head * sqh
    k += image * skb + head * skh
    v += image * svb + head * svh
    out += image * H * W * heads * D + head * D
    lse += (image * heads + head) * H * W
    qk_scale = scale * LOG2E
    r = tl.arange(0, BM)
    ry, rx = r // WW, r % WW
    n = ry * W + rx
    if BIAS:
        high, low, eye = _split_bias(bias + head * (BM * BM), q.dtype.element_ty, BM)
    if CELLS:
        c = tl.arange(0, BC)
        kt = _load_rows(k_tilde + (image * heads + head) * cells * D, c, c < cells, D, 1, D, BD)
        bt = _load_rows(beta + (image * heads + head) * cells * D, c, c < cells, D, 1, D, BD)

    for win in range(chunk * PER_PROGRAM, tl.minimum(chunk * PER_PROGRAM + PER_PROGRAM, n_win)):
        n0, valid = _window_start(win, n_wx, W, H, ry, rx, WH, WW, EDGE)
        q_i = _load_rows(q + n0 * sqn, n, valid, sqn, sqd, D, BD)
        k_i = _load_rows(k + n0 * skn, n, valid, skn, skd, D, BD)
        v_i = _load_rows(v + n0 * svn, n, valid, svn, svd, D, BD)
        if BIAS:
            s = tl.dot(eye, low, input_precision=PREC)
            s = tl.dot(eye, high, s, input_precision=PREC)
            s = tl.dot(q_i, tl.trans(k_i), s, input_precision=PREC) * qk_scale
        else:
            s = tl.dot(q_i, tl.trans(k_i), input_precision=PREC) * qk_scale
        s = tl.where(valid[None, :], s, float('-inf'))
        top = tl.max(s, 1)
        if CELLS:
            s_c = tl.dot(q_i, tl.trans(kt), input_precision=PREC) * qk_scale
            s_c = tl.where((c < cells)[None, :], s_c, float('-inf'))
            top = tl.maximum(top, tl.max(s_c, 1))
        p = tl.exp2(s - top[:, None])
        total = tl.sum(p, 1)
        acc = tl.dot(p.to(v_i.dtype), v_i, input_precision=PREC)
        if CELLS:
            p = tl.exp2(s_c - top[:, None])
            total += tl.sum(p, 1)
            acc = tl.dot(p.to(bt.dtype), bt, acc, input_precision=PREC)
        _store_rows(out + n0 * (heads * D), n, valid, heads * D, 1, acc / total[:, None], D, BD)
        if SAVE:  # in units of log 2, as the backward's exp2 takes it
            tl.store(lse + n0 + n, top + tl.log2(total), mask=valid)


# --------------------------------------------------------------------------------------------------------------------
# Backward. With p a weight of (16), dp = dy · value and δ = y · dy, the gradient of its logit is p (dp - δ).
# --------------------------------------------------------------------------------------------------------------------


@triton.jit
def _backward_shared(
    q,
    out,
    grad,
    sqb,
    sqh,
    sqn,
    sqd,
    sgb,
    sgh,
    sgn,
    sgd,
    lse,
    delta,
    k_tilde,
    beta,
    dk_tilde,
    dbeta,
    heads,
    N,
    cells,
    splits,
    per_split,
    cells_total,
    scale,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    CELLS: tl.constexpr,
    PREC: tl.constexpr,
):
    """δ, and the part of dk̃ and dβ that comes through (16), of BC cells from per_split tokens of an (image, head)."""
    head = tl.program_id(0) % heads
    split = (tl.program_id(0) // heads) % splits
    image = (tl.program_id(0) // (heads * splits)).to(tl.int64)
    pair = image * heads + head
    q += image * sqb + head * sqh
    grad += image * sgb + head * sgh
    out += image * N * heads * D + head * D
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    cell_valid = c < cells
    if CELLS:
        kt = _load_rows(k_tilde + pair * cells * D, c, cell_valid, D, 1, D, BD)
        bt = _load_rows(beta + pair * cells * D, c, cell_valid, D, 1, D, BD)
        acc_k = tl.zeros([BC, BD], tl.float32)
        acc_b = tl.zeros([BC, BD], tl.float32)
    for n0 in range(split * per_split, tl.minimum(split * per_split + per_split, N), BM):
        n = n0 + tl.arange(0, BM)
        valid = n < N
        y = _load_rows(out, n, valid, heads * D, 1, D, BD).to(tl.float32)
        dy = _load_rows(grad, n, valid, sgn, sgd, D, BD)
        delta_n = tl.sum(y * dy.to(tl.float32), 1)
        if tl.program_id(1) == 0:
            tl.store(delta + pair * N + n, delta_n, mask=valid)
        if CELLS:
            q_n = _load_rows(q, n, valid, sqn, sqd, D, BD)
            lse_n = tl.load(lse + pair * N + n, mask=valid, other=0.0)
            # Transposed, (cells, tokens): the sums over tokens are then plain products.
            s = tl.dot(kt, tl.trans(q_n), input_precision=PREC) * (scale * LOG2E)
            p = tl.where(cell_valid[:, None] & valid[None, :], tl.exp2(s - lse_n[None, :]), 0.0)
            dp = tl.dot(bt, tl.trans(dy), input_precision=PREC)
            ds = p * (dp - delta_n[None, :])
            acc_b = tl.dot(p.to(dy.dtype), dy, acc_b, input_precision=PREC)
            acc_k = tl.dot(ds.to(q_n.dtype), q_n, acc_k, input_precision=PREC)
    if CELLS:
        row = split * cells_total + pair * cells + c
        _store_rows(dk_tilde, row, cell_valid, D, 1, acc_k * scale, D, BD)
        _store_rows(dbeta, row, cell_valid, D, 1, acc_b, D, BD)


@triton.jit
def _backward_weights(
    k,
    v,
    skb,
    skh,
    skn,
    skd,
    svb,
    svh,
    svn,
    svd,
    omega,
    dbeta_parts,
    dbeta,
    omega_half,
    domega,
    xi,
    dlog_xi,
    heads,
    H,
    W,
    n_cx,
    cells,
    ch,
    cw,
    cells_total,
    splits,
    scale_half,
    D: tl.constexpr,
    BD: tl.constexpr,
    G: tl.constexpr,
    T: tl.constexpr,
    ONCE: tl.constexpr,
    OMEGA_HALF: tl.constexpr,
):
    """Through β = Σ ξ v: ξ and d log ξ of every token, dω of G cells of one (image, head).

    OMEGA_HALF: ω / s^½ in the dtype of the products of `eva_gluon` is written too.
    """
    head = tl.program_id(0) % heads
    image = (tl.program_id(0) // heads).to(tl.int64)
    pair = image * heads + head
    c = tl.program_id(1) * G + tl.arange(0, G)
    cell_valid = c < cells
    y0, x0 = (c // n_cx) * ch, (c % n_cx) * cw
    k += image * skb + head * skh
    v += image * svb + head * svh
    xi += pair * H * W
    dlog_xi += pair * H * W
    row = pair * cells + c
    om = _load_rows(omega, row, cell_valid, D, 1, D, BD)
    db = tl.zeros([G, BD], tl.float32)
    for i in range(splits):
        db += _load_rows(dbeta_parts, i * cells_total + row, cell_valid, D, 1, D, BD)
    _store_rows(dbeta, row, cell_valid, D, 1, db, D, BD)
    if OMEGA_HALF:
        _store_rows(omega_half, row, cell_valid, D, 1, om / scale_half, D, BD)

    if ONCE:
        n, valid = _cell_tokens(y0, x0, cell_valid, 0, H, W, ch, cw, T)
        k_t = _load_cells(k, n, valid, skn, skd, D, BD)
        log_xi = scale_half * tl.sum(k_t * (om[:, None, :] - 0.5 * scale_half * k_t), 2)
        log_xi = tl.where(valid, log_xi, float('-inf'))
        top = tl.where(cell_valid, tl.max(log_xi, 1), 0.0)
        w = tl.exp2((log_xi - top[:, None]) * LOG2E)
        w = w / tl.where(cell_valid, tl.sum(w, 1), 1.0)[:, None]
        dw = tl.sum(_load_cells(v, n, valid, svn, svd, D, BD) * db[:, None, :], 2)
        dl = w * (dw - tl.sum(w * dw, 1)[:, None])
        tl.store(xi + n, w, mask=valid)
        tl.store(dlog_xi + n, dl, mask=valid)
        dom = tl.sum(dl[:, :, None] * k_t, 1)
    else:
        top = tl.full([G], float('-inf'), tl.float32)
        total = tl.zeros([G], tl.float32)
        mean_dw = tl.zeros([G], tl.float32)
        for t0 in range(0, ch * cw, T):
            n, valid = _cell_tokens(y0, x0, cell_valid, t0, H, W, ch, cw, T)
            k_t = _load_cells(k, n, valid, skn, skd, D, BD)
            dw = tl.sum(_load_cells(v, n, valid, svn, svd, D, BD) * db[:, None, :], 2)
            log_xi = scale_half * tl.sum(k_t * (om[:, None, :] - 0.5 * scale_half * k_t), 2)
            log_xi = tl.where(valid, log_xi, float('-inf'))
            new_top = tl.maximum(top, tl.max(log_xi, 1))
            safe = tl.where(new_top == float('-inf'), 0.0, new_top)
            decay = tl.exp2((top - safe) * LOG2E)
            w = tl.exp2((log_xi - safe[:, None]) * LOG2E)
            total = total * decay + tl.sum(w, 1)
            mean_dw = mean_dw * decay + tl.sum(w * dw, 1)
            top = new_top
        top = tl.where(cell_valid, top, 0.0)
        total = tl.where(cell_valid, total, 1.0)
        mean_dw = mean_dw / total
        dom = tl.zeros([G, BD], tl.float32)
        for t0 in range(0, ch * cw, T):
            n, valid = _cell_tokens(y0, x0, cell_valid, t0, H, W, ch, cw, T)
            k_t = _load_cells(k, n, valid, skn, skd, D, BD)
            dw = tl.sum(_load_cells(v, n, valid, svn, svd, D, BD) * db[:, None, :], 2)
            log_xi = scale_half * tl.sum(k_t * (om[:, None, :] - 0.5 * scale_half * k_t), 2)
            log_xi = tl.where(valid, log_xi, float('-inf'))
            w = tl.exp2((log_xi - top[:, None]) * LOG2E) / total[:, None]
            dl = w * (dw - mean_dw[:, None])
            tl.store(xi + n, w, mask=valid)
            tl.store(dlog_xi + n, dl, mask=valid)
            dom += tl.sum(dl[:, :, None] * k_t, 1)
    _store_rows(domega, row, cell_valid, D, 1, dom * scale_half, D, BD)


@triton.jit
def _backward_summary(
    means,
    domega,
    dk_tilde,
    w_q,
    b_q,
    g_q,
    w_k,
    b_k,
    g_k,
    dmeans,
    dparams,
    cells_total,
    splits,
    H,
    W,
    n_cx,
    cells,
    ch,
    cw,
    omega_scale,
    eps,
    D: tl.constexpr,
    BD: tl.constexpr,
    R: tl.constexpr,
    PREC: tl.constexpr,
):
    """Through σ of (26), for q (program 0 of axis 1) or k (1): the gradient that each token of a cell gets through its
    mean, and partial sums of the parameters' gradients, packed weight, bias, LayerNorm weight, LayerNorm bias."""
    which = tl.program_id(1)
    if which == 0:
        weight, bias, norm_weight = w_q, b_q, g_q
    else:
        weight, bias, norm_weight = w_k, b_k, g_k
    dim = tl.arange(0, BD)
    inside = dim < D
    dtype: tl.constexpr = dmeans.dtype.element_ty
    g = tl.load(norm_weight + dim, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(bias + dim, mask=inside, other=0.0).to(tl.float32)
    w = _load_weight(weight, D, BD)
    w_half = w.to(dtype)
    sum_w = tl.zeros([BD, BD], tl.float32)
    sum_b = tl.zeros([BD], tl.float32)
    sum_g = tl.zeros([BD], tl.float32)
    sum_o = tl.zeros([BD], tl.float32)
    for r0 in range(tl.program_id(0) * R, cells_total, tl.num_programs(0) * R):
        row = r0 + tl.arange(0, R)
        valid = row < cells_total
        mean = _load_rows(means, which * cells_total + row, valid, D, 1, D, BD)
        z = tl.dot(mean, tl.trans(w), input_precision=PREC) + b[None, :]
        z_hat, inv = _normalise(z, eps, D, BD)
        d = omega_scale * _load_rows(domega, row, valid, D, 1, D, BD)
        if which == 1:
            for i in range(splits):
                d += _load_rows(dk_tilde, i * cells_total + row, valid, D, 1, D, BD)
        sum_g += tl.sum(d * z_hat, 0)
        sum_o += tl.sum(d, 0)
        d = d * g[None, :]
        dz = d - tl.sum(d, 1)[:, None] / D - z_hat * (tl.sum(d * z_hat, 1) / D)[:, None]
        dz = tl.where(inside[None, :], dz * inv[:, None], 0.0)
        sum_b += tl.sum(dz, 0)
        dz = dz.to(dtype)
        sum_w = tl.dot(tl.trans(dz), mean.to(dtype), sum_w, input_precision=PREC)
        c = row % cells
        count = tl.minimum(ch, H - (c // n_cx) * ch) * tl.minimum(cw, W - (c % n_cx) * cw)
        dmean = tl.dot(dz, w_half, input_precision=PREC) / count.to(tl.float32)[:, None]
        _store_rows(dmeans, which * cells_total + row, valid, D, 1, dmean, D, BD)
    dparams += (tl.program_id(0) * 2 + which) * (D * D + 3 * D)
    tl.store(dparams + dim[:, None] * D + dim[None, :], sum_w, mask=inside[:, None] & inside[None, :])
    tl.store(dparams + D * D + dim, sum_b, mask=inside)
    tl.store(dparams + D * D + D + dim, sum_g, mask=inside)
    tl.store(dparams + D * D + 2 * D + dim, sum_o, mask=inside)


@triton.jit
def _logit_grad(q_i, k_j, v_j, dy, lse, delta, bias, valid, valid_j, qk_scale, BIAS: tl.constexpr, PREC: tl.constexpr):
    """The weights p and the gradients p (dp - δ) of the logits of queries i and keys j."""
    s = tl.dot(q_i, tl.trans(k_j), input_precision=PREC) * qk_scale
    if BIAS:
        s += tl.load(bias)
    p = tl.where(valid[:, None] & valid_j[None, :], tl.exp2(s - lse[:, None]), 0.0)
    dp = tl.dot(dy, tl.trans(v_j), input_precision=PREC)
    return p, p * (dp - delta[:, None])


@triton.jit
def _key_grad_through_cells(k_j, omega, dmean, dlog_xi, c, valid, scale, scale_half, D: tl.constexpr, BD: tl.constexpr):
    """What reaches keys k through their cells c: by log ξ = s^½ k·ω - ½ s ‖k‖² and by the mean."""
    om = _load_rows(omega, c, valid, D, 1, D, BD).to(tl.float32)
    dm = _load_rows(dmean, c, valid, D, 1, D, BD).to(tl.float32)
    return dm + dlog_xi[:, None] * (scale_half * om - scale * k_j.to(tl.float32))


@triton.jit
def _backward_tokens(
    q,
    k,
    v,
    grad,
    sqb,
    sqh,
    sqn,
    sqd,
    skb,
    skh,
    skn,
    skd,
    svb,
    svh,
    svn,
    svd,
    sgb,
    sgh,
    sgn,
    sgd,
    lse,
    delta,
    k_tilde,
    beta,
    bias,
    omega,
    dbeta,
    dmeans,
    xi,
    dlog_xi,
    dq,
    dk,
    dv,
    sdb,
    sdh,
    sdn,
    dbias,
    heads,
    H,
    W,
    n_wx,
    n_win,
    n_cx,
    cells,
    chunks,
    cells_total,
    scale,
    scale_half,
    D: tl.constexpr,
    BD: tl.constexpr,
    WH: tl.constexpr,
    WW: tl.constexpr,
    CH: tl.constexpr,
    CW: tl.constexpr,
    BM: tl.constexpr,
    NT: tl.constexpr,
    BC: tl.constexpr,
    NC: tl.constexpr,
    PER_PROGRAM: tl.constexpr,
    LOCAL: tl.constexpr,
    BIAS: tl.constexpr,
    PREC: tl.constexpr,
):
    """dq, dk, dv of the tokens of PER_PROGRAM windows of one (image, head), and their part of the bias's gradient."""
    head = tl.program_id(0) % heads
    chunk = (tl.program_id(0) // heads) % chunks
    image = (tl.program_id(0) // (heads * chunks)).to(tl.int64)
    pair = image * heads + head
    q += image * sqb + head * sqh
    k += image * skb + head * skh
    v += image * svb + head * svh
    grad += image * sgb + head * sgh
    dq += image * sdb + head * sdh
    dk += image * sdb + head * sdh
    dv += image * sdb + head * sdh
    lse += pair * H * W
    delta += pair * H * W
    xi += pair * H * W
    dlog_xi += pair * H * W
    k_tilde += pair * cells * D
    beta += pair * cells * D
    omega += pair * cells * D
    dbeta += pair * cells * D
    dmean_q = dmeans + pair * cells * D
    dmean_k = dmean_q + cells_total * D
    bias += head * (NT * BM * NT * BM)
    dbias += ((image * chunks + chunk) * heads + head) * (NT * BM * NT * BM)
    qk_scale = scale * LOG2E
    c0 = tl.arange(0, BC)
    if NC == 1:
        kt_0 = _load_rows(k_tilde, c0, c0 < cells, D, 1, D, BD)
        beta_0 = _load_rows(beta, c0, c0 < cells, D, 1, D, BD)
    if LOCAL and BIAS and NT == 1:
        sum_bias = tl.zeros([BM, BM], tl.float32)

    for win in range(chunk * PER_PROGRAM, tl.minimum(chunk * PER_PROGRAM + PER_PROGRAM, n_win)):
        for i in range(NT):
            n, c, valid = _window_rows(win, i, H, W, n_wx, n_cx, WH, WW, CH, CW, LOCAL, BM)
            q_i = _load_rows(q, n, valid, sqn, sqd, D, BD)
            dy = _load_rows(grad, n, valid, sgn, sgd, D, BD)
            if NT == 1:
                k_i = _load_rows(k, n, valid, skn, skd, D, BD)
                v_i = _load_rows(v, n, valid, svn, svd, D, BD)
            lse_i = tl.load(lse + n, mask=valid, other=0.0)
            delta_i = tl.load(delta + n, mask=valid, other=0.0)
            if NT == 1 and NC > 0:
                w = tl.load(xi + n, mask=valid, other=0.0)
                dl = tl.load(dlog_xi + n, mask=valid, other=0.0)
            acc = tl.zeros([BM, BD], tl.float32)
            for t in range(NC):
                c_t = t * BC + c0
                if NC == 1:
                    kt, bt = kt_0, beta_0
                else:
                    kt = _load_rows(k_tilde, c_t, c_t < cells, D, 1, D, BD)
                    bt = _load_rows(beta, c_t, c_t < cells, D, 1, D, BD)
                p, ds = _logit_grad(q_i, kt, bt, dy, lse_i, delta_i, bias, valid, c_t < cells, qk_scale, False, PREC)
                acc = tl.dot(ds.to(kt.dtype), kt, acc, input_precision=PREC)
            if LOCAL and NT > 1:
                for j in range(NT):
                    n_j, c_j, valid_j = _window_rows(win, j, H, W, n_wx, n_cx, WH, WW, CH, CW, LOCAL, BM)
                    k_j = _load_rows(k, n_j, valid_j, skn, skd, D, BD)
                    v_j = _load_rows(v, n_j, valid_j, svn, svd, D, BD)
                    p, ds = _logit_grad(
                        q_i,
                        k_j,
                        v_j,
                        dy,
                        lse_i,
                        delta_i,
                        _bias_tile(bias, i, j, BM, NT),
                        valid,
                        valid_j,
                        qk_scale,
                        BIAS,
                        PREC,
                    )
                    acc = tl.dot(ds.to(k_j.dtype), k_j, acc, input_precision=PREC)
                    if BIAS:  # too large for registers: summed in this program's own part of memory
                        ptr = _bias_tile(dbias, i, j, BM, NT)
                        tl.store(ptr, tl.load(ptr) + ds)
            if LOCAL and NT == 1:
                p, ds = _logit_grad(
                    q_i,
                    k_i,
                    v_i,
                    dy,
                    lse_i,
                    delta_i,
                    _bias_tile(bias, 0, 0, BM, NT),
                    valid,
                    valid,
                    qk_scale,
                    BIAS,
                    PREC,
                )
                if BIAS:
                    sum_bias += ds
                ds = ds.to(q_i.dtype)
                p = p.to(dy.dtype)
                acc = tl.dot(ds, k_i, acc, input_precision=PREC)
            acc = acc * scale
            if NC > 0:
                acc += _load_rows(dmean_q, c, valid, D, 1, D, BD).to(tl.float32)
            _store_rows(dq, n, valid, sdn, 1, acc, D, BD)
            if NT == 1:  # one sum finished and written before the next begins: registers are scarce
                acc_v = tl.zeros([BM, BD], tl.float32)
                acc_k = tl.zeros([BM, BD], tl.float32)
                if LOCAL:
                    acc_v = tl.dot(tl.trans(p), dy, input_precision=PREC)
                if NC > 0:
                    acc_v += w[:, None] * _load_rows(dbeta, c, valid, D, 1, D, BD).to(tl.float32)
                _store_rows(dv, n, valid, sdn, 1, acc_v, D, BD)
                if LOCAL:
                    acc_k = tl.dot(tl.trans(ds), q_i, input_precision=PREC) * scale
                if NC > 0:
                    acc_k += _key_grad_through_cells(k_i, omega, dmean_k, dl, c, valid, scale, scale_half, D, BD)
                _store_rows(dk, n, valid, sdn, 1, acc_k, D, BD)
        if LOCAL and NT > 1:
            for j in range(NT):
                n_j, c_j, valid_j = _window_rows(win, j, H, W, n_wx, n_cx, WH, WW, CH, CW, LOCAL, BM)
                k_j = _load_rows(k, n_j, valid_j, skn, skd, D, BD)
                v_j = _load_rows(v, n_j, valid_j, svn, svd, D, BD)
                acc_k = tl.zeros([BM, BD], tl.float32)
                acc_v = tl.zeros([BM, BD], tl.float32)
                for i in range(NT):
                    n, c, valid = _window_rows(win, i, H, W, n_wx, n_cx, WH, WW, CH, CW, LOCAL, BM)
                    q_i = _load_rows(q, n, valid, sqn, sqd, D, BD)
                    dy = _load_rows(grad, n, valid, sgn, sgd, D, BD)
                    lse_i = tl.load(lse + n, mask=valid, other=0.0)
                    delta_i = tl.load(delta + n, mask=valid, other=0.0)
                    p, ds = _logit_grad(
                        q_i,
                        k_j,
                        v_j,
                        dy,
                        lse_i,
                        delta_i,
                        _bias_tile(bias, i, j, BM, NT),
                        valid,
                        valid_j,
                        qk_scale,
                        BIAS,
                        PREC,
                    )
                    acc_k = tl.dot(tl.trans(ds.to(q_i.dtype)), q_i, acc_k, input_precision=PREC)
                    acc_v = tl.dot(tl.trans(p.to(dy.dtype)), dy, acc_v, input_precision=PREC)
                acc_k = acc_k * scale
                if NC > 0:
                    w = tl.load(xi + n_j, mask=valid_j, other=0.0)
                    dl = tl.load(dlog_xi + n_j, mask=valid_j, other=0.0)
                    acc_v += w[:, None] * _load_rows(dbeta, c_j, valid_j, D, 1, D, BD).to(tl.float32)
                    acc_k += _key_grad_through_cells(k_j, omega, dmean_k, dl, c_j, valid_j, scale, scale_half, D, BD)
                _store_rows(dk, n_j, valid_j, sdn, 1, acc_k, D, BD)
                _store_rows(dv, n_j, valid_j, sdn, 1, acc_v, D, BD)

    if LOCAL and BIAS and NT == 1:
        tl.store(_bias_tile(dbias, 0, 0, BM, NT), sum_bias)


# --------------------------------------------------------------------------------------------------------------------
# Launches
# --------------------------------------------------------------------------------------------------------------------

# Programs that keep a large GPU busy; a constant, so that sums are split alike on every device.
PROGRAMS = 768
# By measurement on an H100.
LAUNCH = {
    'forward_windows': dict(num_warps=4, num_stages=3),
    'forward_tokens': dict(num_warps=4, num_stages=2),
    'backward_shared': dict(num_warps=4, num_stages=3),
    'backward_summary': dict(num_warps=4, num_stages=1),
    'backward_tokens': dict(num_warps=4, num_stages=2),
    'gluon': dict(num_warps=4),
}
# The releases of Triton whose Gluon the kernels of `eva_gluon` are written in and compile with.
GLUON_VERSIONS = (3, 6), (3, 9)


@functools.cache
def _gluon(device: int):
    """The module `eva_gluon` where the CUDA device has Hopper's products and Triton has its Gluon, or None."""
    if device < 0 or not isinstance(_forward_windows, triton.runtime.JITFunction):  # the CPU, Triton's interpreter
        return None
    if torch.version.hip or torch.cuda.get_device_capability(device)[0] != 9:
        return None
    version = tuple(int(part) for part in triton.__version__.split('.')[:2])
    try:
        if not GLUON_VERSIONS[0] <= version <= GLUON_VERSIONS[1]:
            raise ImportError('not a release that they were tried with')
        from evavit.ops.eva import gluon as eva_gluon
    except (ImportError, AttributeError) as error:
        warnings.warn(
            f'EVA takes its slower kernels, without Gluon: Triton is {triton.__version__} ({error}), '
            f'Triton 3.6 to 3.9 has the faster ones',
            stacklevel=2,
        )
        return None
    return eva_gluon


class _Plan:
    """Sizes of the grid, the tiles and the launches for one shape of arguments."""

    def __init__(
        self,
        shape: Tuple[int, int, int, int],
        full: bool,
        feat_size: Tuple[int, int],
        window_size: int,
        partition_grid: int,
    ) -> None:
        self.B, self.heads, self.N, self.D = shape
        self.H, self.W = feat_size
        self.BD = max(16, triton.next_power_of_2(self.D))
        # float32 products go through shared memory, which half-sized tiles do not overrun.
        self.full = full
        tile = 32 if full else 64
        # 'ieee' is full float32; the kernels of halves multiply float32 in the summaries alone, where tf32 keeps more
        # bits than the operands that autocast would give, as the gradients' error bound needs.
        self.prec, self.summary_prec = 'ieee', 'ieee' if full else 'tf32'

        self.local = window_size > 0
        self.side = max(window_size, 1)
        self.wh, self.ww = window_shape(feat_size, window_size) if self.local else (1, 1)
        if self.local:
            n_wy, self.n_wx = block_counts(feat_size, (self.wh, self.ww))
            self.n_win = n_wy * self.n_wx
            self.BM = min(tile, max(16, triton.next_power_of_2(self.wh * self.ww)))
            self.NT = ceil_div(self.wh * self.ww, self.BM)
        else:
            self.BM, self.NT, self.n_wx = tile, 1, 1
            self.n_win = ceil_div(self.N, tile)

        self.cells, self.n_cx, self.ch, self.cw, self.BC, self.NC = 0, 1, 1, 1, 16, 0
        if partition_grid > 0:
            self.ch, self.cw = cell_shape(feat_size, partition_grid)
            n_cy, self.n_cx = block_counts(feat_size, (self.ch, self.cw))
            self.cells = n_cy * self.n_cx
            self.BC = min(tile, max(16, triton.next_power_of_2(self.cells)))
            self.NC = ceil_div(self.cells, self.BC)
        self.rows = self.B * self.heads * self.cells

        # The default windows and cells in half precision: the forward's fast case.
        self.one_tile = self.local and self.NT == 1 and self.NC <= 1
        self.edge = self.H % self.wh > 0 or self.W % self.ww > 0
        # What `eva_gluon` takes, but for the device and the strides.
        self.gluon_sizes = self.one_tile and not full and self.D in (32, 64) and self.BM == 64 and self.cells > 0
        self.gluon_strides: Dict[tuple, bool] = {}
        self.launch = Launcher()

    def gluon(self, strides: Tuple[int, ...], *tensors: torch.Tensor):
        """The module `eva_gluon` where its kernels take these tensors, or None; strides are of those `(B, h, N, d)`.

        They take half precision, heads of 32 or 64 channels, windows of 33 to 64 places (6 to 8 a side), 1 to 64 cells.
        They copy 16 bytes at a time: channels are next to each other, other strides are multiples of 16, as Triton
        tells the compiler, and tensors start at multiples of 16 bytes. Offsets inside an image are 32 bits.
        """
        if not self.gluon_sizes:
            return None
        module = _gluon(tensors[0].get_device())
        if module is None:
            return None
        if strides not in self.gluon_strides:
            self.gluon_strides[strides] = (
                all(x == 1 for x in strides[3::4])
                and all(self.N * x < 2**31 for x in strides[2::4])
                and not any(x % 16 for i, x in enumerate(strides) if i % 4 != 3)
            )
        addresses = 0
        for x in tensors:
            addresses |= x.data_ptr()
        return module if self.gluon_strides[strides] and addresses % 16 == 0 else None

    @functools.cached_property
    def window_cells(self) -> dict:
        """The most rows and columns of cells that a window meets, and the tile that holds them."""

        def spanned(tokens: int, cell: int, cells: int) -> int:
            return min(ceil_div(tokens - 1, cell) + 1, cells)

        rows, cols = spanned(self.wh, self.ch, self.cells // self.n_cx), spanned(self.ww, self.cw, self.n_cx)
        return dict(NCY=rows, NCX=cols, KE=max(16, triton.next_power_of_2(rows * cols)))

    @functools.cached_property
    def cell_tiles(self) -> Tuple[dict, dict]:
        """Tiles of the two cell kernels: G cells, T tokens of each; ONCE if that is all of their tokens.

        The forward takes many cells and few tokens, so that weights are loaded and projections done for many cells at
        once, as long as programs are enough. The backward takes whole cells, and few. All by measurement on an H100.

        No tile has fewer elements than threads, unless it has one warp: several would hold the same elements, and write
        them to the same places of shared memory at the same time.
        """
        area, pairs = self.ch * self.cw, self.B * self.heads
        tokens, cells = triton.next_power_of_2(area), triton.next_power_of_2(max(self.cells, 1))
        shrink = max(64, self.BD) // 64 * (2 if self.full else 1)
        narrow = self.BD <= 32 and not self.full

        def tile(warps: int, G: int, T: int) -> dict:
            warps = min(warps, max(1, G * T * self.BD // 32))
            return dict(G=G, T=T, ONCE=area <= T, num_warps=warps, num_stages=1)

        T = min(tokens, 4 if narrow else 8)
        few = tokens <= 4 and shrink == 1 and not narrow
        if narrow:
            warps, G = (8, 64) if pairs >= PROGRAMS // 2 else (1, 8)
        elif few:
            warps, G = 4, 16
        else:
            warps = 16 if pairs >= PROGRAMS // 2 else 8 if pairs >= PROGRAMS // 16 else 4
            G = (512 if warps == 16 else 256) // shrink // T
        G = min(G, cells)
        while warps == 4 and G > 1 and pairs * ceil_div(self.cells, G) < PROGRAMS // 4:
            G, T = G // 2, min(T * 2, tokens)
        forward = tile(warps, G, T)
        if warps == 16 or (warps == 8 and shrink == 1) or few:  # what registers allow, or for one program more
            forward['maxnreg'] = 128

        T = min(tokens, 256 // shrink)
        G = min(max(1, 32 // T), cells)
        warps = 1 if narrow else 2 if T * G <= 32 else 4
        return forward, tile(warps, G, T)

    def per_program(self, windows: int) -> int:
        """Windows that one program walks: at most `windows`, fewer where the card would stay empty."""
        enough = max(1, self.B * self.heads * self.n_win // PROGRAMS)
        return min(windows, triton.next_power_of_2(enough), self.n_win)

    def pad_bias(self, bias: torch.Tensor, unit: float) -> torch.Tensor:
        """The bias `(h, NT · BM, NT · BM)` of this grid's windows, aligned to tiles; from a table as well."""
        side = self.NT * self.BM
        padded = torch.empty(self.heads, side, side, dtype=torch.float32, device=bias.device)
        self.launch(
            _pad_bias,
            (side // 16, side // 16, self.heads),
            bias.contiguous(),
            padded,
            unit,
            side,
            SIDE=self.side,
            WH=self.wh,
            WW=self.ww,
            TABLE=bias.dim() == 2,
            TILE=16,
        )
        return padded

    def pad_bias_fragments(self, bias: torch.Tensor, unit: float) -> torch.Tensor:
        """`pad_bias` in the order in which `eva_gluon` loads it."""
        padded = torch.empty(self.heads, 64, 64, dtype=torch.float32, device=bias.device)
        self.launch(
            _pad_bias_fragments,
            (16, 1, self.heads),
            bias.contiguous(),
            padded,
            unit,
            SIDE=self.side,
            WH=self.wh,
            WW=self.ww,
            TABLE=bias.dim() == 2,
        )
        return padded

    def sum(self, parts: torch.Tensor) -> torch.Tensor:
        """Sum over the first axis of a float32 tensor."""
        return sum_parts(self.launch, parts)

    def bias_grad(self, dbias: torch.Tensor, table: bool) -> torch.Tensor:
        """The adjoint of `pad_bias`, but for the unit: the gradient of the bias, or of its table."""
        h, side, (wh, ww) = self.heads, self.side, (self.wh, self.ww)
        if table:
            entries = (2 * side - 1) ** 2
            dtable = torch.empty(entries, h, dtype=dbias.dtype, device=dbias.device)
            self.launch(
                _table_grad,
                (ceil_div(entries, 16), h, 1),
                dbias,
                dtable,
                dbias.shape[-1],
                h,
                SIDE=side,
                WH=wh,
                WW=ww,
                E=16,
                I=64,
            )
            return dtable
        dbias = dbias[:, : wh * ww, : wh * ww]
        if wh < side or ww < side:
            whole = dbias.new_zeros(h, side, side, side, side)
            whole[:, :wh, :ww, :wh, :ww] = dbias.reshape(h, wh, ww, wh, ww)
            dbias = whole.view(h, side * side, side * side)
        return dbias.contiguous()


@functools.lru_cache(maxsize=256)
def _cached_plan(shape, full, feat_size, window_size, partition_grid) -> _Plan:
    return _Plan(shape, full, feat_size, window_size, partition_grid)


def _plan(q: torch.Tensor, feat_size: List[int], window_size: int, partition_grid: int) -> _Plan:
    return _cached_plan(tuple(q.shape), q.dtype == torch.float32, tuple(feat_size), window_size, partition_grid)


def takes_gluon(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, feat_size: List[int], window_size: int, partition_grid: int
) -> bool:
    """Whether `eva_attention_fused` runs the kernels of `eva_gluon` on these tensors, with a gradient like them."""
    strides = (*q.stride(), *k.stride(), *v.stride())
    return _plan(q, feat_size, window_size, partition_grid).gluon(strides, q, k, v) is not None


# By measurement on an H100.
WINDOWS_FORWARD = 4
WINDOWS_BACKWARD = 8


def _unpack(q: torch.Tensor, k: Optional[torch.Tensor], v: Optional[torch.Tensor]):
    if k is None or v is None:
        return q[0], q[1], q[2]
    return q, k, v


def _tokens_like(q: torch.Tensor) -> torch.Tensor:
    """An empty `(B, h, N, d)` whose memory is `(B, N, h, d)`."""
    B, h, N, d = q.shape
    return q.new_empty(B, N, h, d).transpose(1, 2)


def _forward_outputs(q, cells: int, save: bool) -> Tuple[torch.Tensor, ...]:
    B, h, N, d = q.shape
    saved_tokens, saved_cells = (N, cells) if save else (0, 0)
    return (
        _tokens_like(q),
        q.new_empty(B, h, saved_tokens, dtype=torch.float32),
        q.new_empty(B, h, cells, d),
        q.new_empty(B, h, cells, d),
        q.new_empty(B, h, saved_cells, d, dtype=torch.float32),
        q.new_empty(2, B, h, saved_cells, d, dtype=torch.float32),
    )


def _eva(
    q: torch.Tensor,
    k: Optional[torch.Tensor],
    v: Optional[torch.Tensor],
    feat_size: List[int],
    w_q: Optional[torch.Tensor],
    b_q: Optional[torch.Tensor],
    g_q: Optional[torch.Tensor],
    o_q: Optional[torch.Tensor],
    w_k: Optional[torch.Tensor],
    b_k: Optional[torch.Tensor],
    g_k: Optional[torch.Tensor],
    o_k: Optional[torch.Tensor],
    rel_pos_bias: Optional[torch.Tensor],
    noise: Optional[torch.Tensor],
    window_size: int,
    partition_grid: int,
    scale: float,
    proposal_scale: float,
    norm_eps: float,
    save: bool,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Forward: y, and for the backward log-sum-exp `(B, h, N)`, k̃, β, ω `(B, h, C_p, d)`, means `(2, B, h, C_p, d)`.

    All but y, k̃ and β are float32: the LayerNorm of rounded means is not that of the forward.

    q, k, v are `(B, h, N, d)`; or q is all three, `(3, B, h, N, d)`, and k and v are None: then their gradient comes
    back in one piece too, which spares a copy of it. Without `save` the tensors for the backward alone are empty. The
    summaries' parameters come one by one, since autograd takes a list of tensors apart and together in Python.
    """
    q, k, v = _unpack(q, k, v)
    plan = _plan(q, feat_size, window_size, partition_grid)
    out, lse, k_tilde, beta, omega, means = outputs = _forward_outputs(q, plan.cells, save)
    if out.numel() == 0:
        return outputs
    strides = (*q.stride(), *k.stride(), *v.stride())
    with on_device(q):
        if plan.cells:
            tile = plan.cell_tiles[0]
            plan.launch(
                _forward_cells,
                (plan.B * plan.heads, ceil_div(plan.cells, tile['G']), 1),
                q,
                k,
                v,
                *strides,
                w_q,
                b_q,
                g_q,
                o_q,
                w_k,
                b_k,
                g_k,
                o_k,
                noise if noise is not None else q,
                k_tilde,
                beta,
                omega,
                means,
                plan.heads,
                plan.H,
                plan.W,
                plan.n_cx,
                plan.cells,
                plan.ch,
                plan.cw,
                plan.rows,
                scale**0.5,
                proposal_scale,
                norm_eps,
                D=plan.D,
                BD=plan.BD,
                **tile,
                NOISE=noise is not None,
                SAVE=save,
                PREC=plan.summary_prec,
            )
        has_bias = plan.local and rel_pos_bias is not None
        per_program = plan.per_program(WINDOWS_FORWARD)
        chunks = ceil_div(plan.n_win, per_program)
        gluon = plan.gluon(strides, q, k, v)
        padded = q
        if has_bias:
            pad = plan.pad_bias if gluon is None else plan.pad_bias_fragments
            padded = pad(rel_pos_bias, scale if plan.one_tile else LN2)
        args = (
            k_tilde,
            beta,
            padded,
            out,
            lse,
            plan.heads,
            plan.H,
            plan.W,
            plan.n_wx,
            plan.n_win,
            plan.cells,
            chunks,
            scale,
        )
        options = dict(D=plan.D, WH=plan.wh, WW=plan.ww, PER_PROGRAM=per_program, BIAS=has_bias, SAVE=save)
        tiles = dict(BD=plan.BD, BM=plan.BM, BC=plan.BC, PREC=plan.prec)
        grid = plan.B * chunks * plan.heads, 1, 1
        if gluon is not None:
            plan.launch(
                gluon._forward_windows_gluon,
                grid,
                q,
                k,
                v,
                *strides[:3],
                *strides[4:7],
                *strides[8:11],
                *args,
                **options,
                EDGE=plan.edge,
                **LAUNCH['gluon'],
            )
        elif plan.one_tile:
            plan.launch(
                _forward_windows,
                grid,
                q,
                k,
                v,
                *strides,
                *args,
                **options,
                **tiles,
                PACKED=strides[:4] == strides[4:8] == strides[8:],
                EDGE=plan.edge,
                CELLS=plan.cells > 0,
                **LAUNCH['forward_windows'],
            )
        else:
            plan.launch(
                _forward_tokens,
                grid,
                q,
                k,
                v,
                *strides,
                *args,
                **options,
                **tiles,
                NT=plan.NT,
                NC=plan.NC,
                LOCAL=plan.local,
                **LAUNCH['forward_tokens'],
            )
    return outputs


def _eva_fake(
    q,
    k,
    v,
    feat_size,
    w_q,
    b_q,
    g_q,
    o_q,
    w_k,
    b_k,
    g_k,
    o_k,
    rel_pos_bias,
    noise,
    window_size,
    partition_grid,
    scale,
    proposal_scale,
    norm_eps,
    save,
):
    q, k, v = _unpack(q, k, v)
    cells = 0
    if partition_grid > 0:
        rows, cols = block_counts(feat_size, cell_shape(feat_size, partition_grid))
        cells = rows * cols
    return _forward_outputs(q, cells, save)


def _token_grads(q, k, v) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Empty gradients of q, k, v; of a packed q, in memory `(B, N, 3, h, d)`, and two empty tensors."""
    if k is None or v is None:
        _, B, h, N, d = q.shape
        return q.new_empty(B, N, 3, h, d).permute(2, 0, 3, 1, 4), q.new_empty(0), q.new_empty(0)
    return _tokens_like(q), _tokens_like(q), _tokens_like(q)


def _eva_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: Optional[torch.Tensor],
    v: Optional[torch.Tensor],
    out: torch.Tensor,
    lse: torch.Tensor,
    k_tilde: torch.Tensor,
    beta: torch.Tensor,
    omega: torch.Tensor,
    means: torch.Tensor,
    feat_size: List[int],
    summary: List[torch.Tensor],
    rel_pos_bias: Optional[torch.Tensor],
    window_size: int,
    partition_grid: int,
    scale: float,
    proposal_scale: float,
    norm_eps: float,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v (of a packed q: of all, and two empty tensors), of the summaries' parameters, float32
    `(2, d² + 3d)` packed, and of the bias, float32."""
    inputs = q, k, v
    q, k, v = _unpack(q, k, v)
    plan = _plan(q, feat_size, window_size, partition_grid)
    D, cells = plan.D, plan.cells
    bias = rel_pos_bias if plan.local else None
    dbias_shape = rel_pos_bias.shape if rel_pos_bias is not None else (0,)
    if q.numel() == 0:
        return (
            *_token_grads(*inputs),
            q.new_zeros((2, D * D + 3 * D) if cells else (0, 0), dtype=torch.float32),
            q.new_zeros(dbias_shape, dtype=torch.float32),
        )

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device=q.device)

    pairs = plan.B * plan.heads
    # Tokens of one image and head are split over programs until the card is full; a part is at least 256 tokens.
    splits = max(1, min(ceil_div(PROGRAMS, pairs), ceil_div(plan.N, 256)))
    per_split = ceil_div(ceil_div(plan.N, splits), 64) * 64
    splits = ceil_div(plan.N, per_split)
    delta = empty(plan.B, plan.heads, plan.N)
    dk_tilde_parts, dbeta_parts = empty(splits, plan.rows, D), empty(splits, plan.rows, D)
    q_strides, grad_strides = q.stride(), grad.stride()
    strides = (*q_strides, *k.stride(), *v.stride(), *grad_strides)
    gluon = plan.gluon(strides, q, k, v, grad, k_tilde, beta)
    with on_device(q):
        shared = (
            lse,
            delta,
            k_tilde,
            beta,
            dk_tilde_parts,
            dbeta_parts,
            plan.heads,
            plan.N,
            cells,
            splits,
            per_split,
            plan.rows,
            scale,
        )
        if gluon is not None:
            plan.launch(
                gluon._backward_shared_gluon,
                (pairs * splits, 1, 1),
                q,
                out,
                grad,
                *q_strides[:3],
                *grad_strides[:3],
                *shared,
                D=D,
                T=32,
                **LAUNCH['gluon'],
            )
        else:
            plan.launch(
                _backward_shared,
                (pairs * splits, max(plan.NC, 1), 1),
                q,
                out,
                grad,
                *q_strides,
                *grad_strides,
                *shared,
                D=D,
                BD=plan.BD,
                BM=min(64, 32 if plan.BD > 64 or q.dtype == torch.float32 else 64),
                BC=plan.BC,
                CELLS=cells > 0,
                PREC=plan.prec,
                **LAUNCH['backward_shared'],
            )
        xi = dlog_xi = domega = dbeta = omega_half = dmeans = delta
        if cells:
            xi, dlog_xi = torch.empty_like(delta), torch.empty_like(delta)
            domega, dbeta = empty(plan.rows, D), empty(plan.rows, D, dtype=q.dtype)
            omega_half = empty(plan.rows, D, dtype=q.dtype) if gluon is not None else dbeta
            tile = plan.cell_tiles[1]
            plan.launch(
                _backward_weights,
                (pairs, ceil_div(cells, tile['G']), 1),
                k,
                v,
                *strides[4:12],
                omega,
                dbeta_parts,
                dbeta,
                omega_half,
                domega,
                xi,
                dlog_xi,
                plan.heads,
                plan.H,
                plan.W,
                plan.n_cx,
                cells,
                plan.ch,
                plan.cw,
                plan.rows,
                splits,
                scale**0.5,
                D=D,
                BD=plan.BD,
                OMEGA_HALF=gluon is not None,
                **tile,
            )
            R = 32 if plan.BD > 64 or q.dtype == torch.float32 else 64
            programs = min(ceil_div(plan.rows, R), 128)
            dparams = empty(programs, 2, D * D + 3 * D)
            dmeans = empty(2, plan.rows, D, dtype=q.dtype)
            w_q, b_q, g_q, _, w_k, b_k, g_k, _ = summary
            plan.launch(
                _backward_summary,
                (programs, 2, 1),
                means,
                domega,
                dk_tilde_parts,
                w_q,
                b_q,
                g_q,
                w_k,
                b_k,
                g_k,
                dmeans,
                dparams,
                plan.rows,
                splits,
                plan.H,
                plan.W,
                plan.n_cx,
                cells,
                plan.ch,
                plan.cw,
                scale**0.5 * proposal_scale,
                norm_eps,
                D=D,
                BD=plan.BD,
                R=R,
                PREC=plan.summary_prec,
                **LAUNCH['backward_summary'],
            )
            dparams = plan.sum(dparams)
        else:
            dparams = empty(0, 0)
        # The peak of memory is next: what is read no more goes first.
        del dk_tilde_parts, dbeta_parts, domega
        grads = _token_grads(*inputs)
        dq, dk, dv = grads[0] if inputs[1] is None else grads

        per_program = plan.per_program(WINDOWS_BACKWARD)
        chunks = ceil_div(plan.n_win, per_program)
        dbias_parts = delta
        if bias is not None:
            # Registers hold the sum over one tile; the sum over more is kept in memory, from zero.
            side = plan.NT * plan.BM
            make = torch.empty if plan.NT == 1 else torch.zeros
            dbias_parts = make((plan.B * chunks, plan.heads, side, side), dtype=torch.float32, device=q.device)
        padded = q
        if bias is not None:
            padded = plan.pad_bias(bias, LN2) if gluon is None else plan.pad_bias_fragments(bias, scale)
        grid = plan.B * chunks * plan.heads, 1, 1
        sizes = plan.heads, plan.H, plan.W, plan.n_wx, plan.n_win, plan.n_cx, cells, chunks, plan.rows, scale
        options = dict(
            D=D, WH=plan.wh, WW=plan.ww, CH=plan.ch, CW=plan.cw, PER_PROGRAM=per_program, BIAS=bias is not None
        )
        if gluon is not None:
            plan.launch(
                gluon._backward_tokens_gluon,
                grid,
                q,
                k,
                v,
                grad,
                *strides[:3],
                *strides[4:7],
                *strides[8:11],
                *strides[12:15],
                lse,
                delta,
                k_tilde,
                beta,
                padded,
                omega_half,
                dbeta,
                dmeans,
                xi,
                dlog_xi,
                dq,
                dk,
                dv,
                *dq.stride()[:3],
                dbias_parts,
                *sizes,
                **options,
                **plan.window_cells,
                EDGE=plan.edge,
                **LAUNCH['gluon'],
            )
        else:
            plan.launch(
                _backward_tokens,
                grid,
                q,
                k,
                v,
                grad,
                *strides,
                lse,
                delta,
                k_tilde,
                beta,
                padded,
                omega,
                dbeta,
                dmeans,
                xi,
                dlog_xi,
                dq,
                dk,
                dv,
                *dq.stride()[:3],
                dbias_parts,
                *sizes,
                scale**0.5,
                **options,
                BD=plan.BD,
                BM=plan.BM,
                NT=plan.NT,
                BC=plan.BC,
                NC=plan.NC,
                LOCAL=plan.local,
                PREC=plan.prec,
                **LAUNCH['backward_tokens'],
            )
        if bias is not None:
            dbias = plan.bias_grad(plan.sum(dbias_parts), bias.dim() == 2)
        else:
            dbias = torch.zeros(dbias_shape, dtype=torch.float32, device=q.device)
    return (*grads, dparams, dbias)


def _eva_backward_fake(
    grad,
    q,
    k,
    v,
    out,
    lse,
    k_tilde,
    beta,
    omega,
    means,
    feat_size,
    summary,
    rel_pos_bias,
    window_size,
    partition_grid,
    scale,
    proposal_scale,
    norm_eps,
):
    D = q.shape[-1]
    params = (2, D * D + 3 * D) if partition_grid > 0 else (0, 0)
    dbias_shape = rel_pos_bias.shape if rel_pos_bias is not None else (0,)
    return (
        *_token_grads(q, k, v),
        q.new_empty(params, dtype=torch.float32),
        q.new_empty(dbias_shape, dtype=torch.float32),
    )


def _setup_context(ctx, inputs, output) -> None:
    (
        q,
        k,
        v,
        feat_size,
        *summary,
        rel_pos_bias,
        _,
        window_size,
        partition_grid,
        scale,
        proposal_scale,
        norm_eps,
        save,
    ) = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, rel_pos_bias, *output, *summary)
    ctx.options = feat_size, window_size, partition_grid, scale, proposal_scale, norm_eps
    ctx.saved = save


def _autograd_backward(ctx, grad, *_):
    nones = [None] * 20
    if grad is None:
        return (*nones,)
    if not ctx.saved:
        raise RuntimeError('the fused EVA ran without keeping what its backward needs; this is a fault of evavit')
    q, k, v, rel_pos_bias, out, lse, k_tilde, beta, omega, means, *summary = ctx.saved_tensors
    feat_size, window_size, partition_grid, scale, proposal_scale, norm_eps = ctx.options
    dq, dk, dv, dparams, dbias = torch.ops.evavit.eva_backward(
        grad,
        q,
        k,
        v,
        out,
        lse,
        k_tilde,
        beta,
        omega,
        means,
        feat_size,
        summary if partition_grid else [],
        rel_pos_bias,
        window_size,
        partition_grid,
        scale,
        proposal_scale,
        norm_eps,
    )
    dsummary = nones[:8]
    if partition_grid:
        d = q.shape[-1]
        parts = [part.split([d * d, d, d, d]) for part in dparams.unbind(0)]
        dsummary = [g.to(p.dtype).view(p.shape) for g, p in zip((*parts[0], *parts[1]), summary, strict=True)]
    packed = k is None
    return (
        dq,
        None if packed else dk,
        None if packed else dv,
        None,
        *dsummary,
        None if rel_pos_bias is None else dbias.to(rel_pos_bias.dtype),
        *nones[13:],
    )


register_op('eva', _eva, _eva_fake, _setup_context, _autograd_backward)
register_op('eva_backward', _eva_backward, _eva_backward_fake)


def eva_attention_fused(
    q: torch.Tensor,
    k: Optional[torch.Tensor],
    v: Optional[torch.Tensor],
    feat_size: List[int],
    summary_q: Optional[Tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]] = None,
    summary_k: Optional[Tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]] = None,
    rel_pos_bias: Optional[torch.Tensor] = None,
    window_size: int = 7,
    partition_grid: int = 7,
    scale: Optional[float] = None,
    proposal_scale: float = 1.0,
    noise: Optional[torch.Tensor] = None,
    norm_eps: float = 1e-5,
) -> torch.Tensor:
    """`evavit.ops.eva_attention` without dropout, by the kernels; arguments have been checked.

    q may hold all three, `(3, B, h, N, d)`, with k and v None.
    """
    summary: List[Optional[torch.Tensor]] = [None] * 8
    if partition_grid > 0 and summary_q is not None and summary_k is not None:
        summary = [x.contiguous() for x in (*summary_q, *summary_k)]
        noise = noise.contiguous() if noise is not None else None
    else:
        noise = None
    tensors = [x for x in (q, k, v, rel_pos_bias, *summary) if x is not None]
    save = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    return torch.ops.evavit.eva(
        q,
        k,
        v,
        feat_size,
        *summary,
        rel_pos_bias,
        noise,
        window_size,
        partition_grid,
        q.shape[-1] ** -0.5 if scale is None else scale,
        proposal_scale,
        norm_eps,
        save,
    )[0]
