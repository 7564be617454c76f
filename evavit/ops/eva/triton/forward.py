"""The forward kernels: `forward_cells`, then one of `forward_windows` and `forward_tokens`.

`forward_windows` is for windows and shared keys that fit one tile each, `forward_tokens` for more tiles and for no
windows. pieces.py says how to read the signatures.
"""

import triton
import triton.language as tl

from .pieces import (
    LOG2E,
    bias_tile,
    cell_tokens,
    count_tile,
    load_cells,
    load_rows,
    log_weights,
    next_weights,
    split_bias,
    split_program,
    store_rows,
    summarise,
    window_rows,
    window_start,
)


@triton.jit
def forward_cells(
    q, k, v,  # (B, heads, N, D), dtype; the caller
    sqb, sqh, sqn, sqd, skb, skh, skn, skd, svb, svh, svn, svd,
    w_q, b_q, g_q, o_q,  # of q's summary: W (D, D), b, weight and bias of LayerNorm (D), any float dtype; the caller
    w_k, b_k, g_k, o_k,  # of k's summary
    noise,  # if NOISE: noise_std · ε (B, heads, cells, D), any float dtype; the caller
    k_tilde, beta,  # writes k̃ and β (B, heads, rows, D), dtype
    omega,  # if SAVE: writes ω (B, heads, cells, D) float32
    means,  # if SAVE: writes q̄ and k̄ (2, B, heads, cells, D) float32
    heads, H, W, n_cx, cells, ch, cw, cells_total, rows,
    scale_half, proposal_scale,
    eps,  # of LayerNorm
    D: tl.constexpr, BD: tl.constexpr,
    G: tl.constexpr, T: tl.constexpr,  # cells of a program, and tokens of each that it loads at a time
    ONCE: tl.constexpr,  # whether T holds a whole cell, so that k is loaded once
    NOISE: tl.constexpr,
    SAVE: tl.constexpr,  # whether there will be a backward
    PREC: tl.constexpr,
):  # fmt: skip
    """k̃, ω and β of the cells. Programs: (B · heads, tiles of G cells)."""
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

    n, valid = cell_tokens(y0, x0, cell_valid, 0, H, W, ch, cw, T)
    k_tile = load_cells(k, n, valid, skn, skd, D, BD)
    q_sum = tl.sum(load_cells(q, n, valid, sqn, sqd, D, BD), 1)
    k_sum = tl.sum(k_tile, 1)
    if not ONCE:
        for t0 in range(T, ch * cw, T):
            n, valid = cell_tokens(y0, x0, cell_valid, t0, H, W, ch, cw, T)
            q_sum += tl.sum(load_cells(q, n, valid, sqn, sqd, D, BD), 1)
            k_sum += tl.sum(load_cells(k, n, valid, skn, skd, D, BD), 1)
    q_mean = q_sum / count[:, None]
    k_mean = k_sum / count[:, None]
    kt = summarise(k_mean, w_k, b_k, g_k, o_k, eps, D, BD, PREC)
    om = proposal_scale * scale_half * (summarise(q_mean, w_q, b_q, g_q, o_q, eps, D, BD, PREC) + kt)

    row = (image * heads + head) * cells + c
    to = (image * heads + head) * rows + c
    if NOISE:
        om += load_rows(noise, row, cell_valid, D, 1, D, BD).to(tl.float32)
    store_rows(k_tilde, to, cell_valid, D, 1, kt, D, BD)
    if SAVE:
        store_rows(omega, row, cell_valid, D, 1, om, D, BD)
        store_rows(means, row, cell_valid, D, 1, q_mean, D, BD)
        store_rows(means, cells_total + row, cell_valid, D, 1, k_mean, D, BD)

    # β: the values of a cell, weighed by the softmax of log ξ.
    if ONCE:
        log_xi = log_weights(k_tile, om, valid, scale_half)
        top = tl.where(cell_valid, tl.max(log_xi, 1), 0.0)
        xi = tl.exp2((log_xi - top[:, None]) * LOG2E)
        total = tl.where(cell_valid, tl.sum(xi, 1), 1.0)
        acc = tl.sum(xi[:, :, None] * load_cells(v, n, valid, svn, svd, D, BD), 1)
    else:
        top = tl.full([G], float('-inf'), tl.float32)
        total = tl.zeros([G], tl.float32)
        acc = tl.zeros([G, BD], tl.float32)
        for t0 in range(0, ch * cw, T):
            n, valid = cell_tokens(y0, x0, cell_valid, t0, H, W, ch, cw, T)
            k_t = load_cells(k, n, valid, skn, skd, D, BD)
            v_t = load_cells(v, n, valid, svn, svd, D, BD)
            log_xi = log_weights(k_t, om, valid, scale_half)
            top, decay, xi = next_weights(log_xi, top)
            total = total * decay + tl.sum(xi, 1)
            acc = acc * decay[:, None] + tl.sum(xi[:, :, None] * v_t, 1)
        total = tl.where(cell_valid, total, 1.0)
    store_rows(beta, to, cell_valid, D, 1, acc / total[:, None], D, BD)


@triton.jit
def add_keys(s, values, top, total, acc, PREC: tl.constexpr):
    """One step of a running softmax: its maximum, its sum of weights and its weighted sum of values after the keys with
    logits s. The first keys of a query include a real one, so that no maximum is -inf."""
    new_top = tl.maximum(top, tl.max(s, 1))
    decay = tl.exp2(top - new_top)
    p = tl.exp2(s - new_top[:, None])
    total = total * decay + tl.sum(p, 1)
    acc = tl.dot(p.to(values.dtype), values, acc * decay[:, None], input_precision=PREC)
    return new_top, total, acc


@triton.jit
def forward_tokens(
    q, k, v,  # (B, heads, N, D), dtype; the caller
    sqb, sqh, sqn, sqd, skb, skh, skn, skd, svb, svh, svn, svd,
    k_tilde, beta,  # (B, heads, rows, D), dtype; forward_cells and forward_prefix
    bias,  # if BIAS: (heads, S, S) float32 in units of log 2; pad_bias
    log_count,  # if COUNT: (1 or n_win, NC · BC) float32 in units of log 2; log_counts
    out, sob,  # writes y, an image (N, heads, D) in memory, dtype
    lse,  # if SAVE: writes the log-sum-exp of a token's logits (B, heads, N) float32
    heads, H, W, n_wx, n_win, rows,
    chunks,  # programs that share the windows of an (image, head)
    scale,
    D: tl.constexpr, BD: tl.constexpr,
    WH: tl.constexpr, WW: tl.constexpr,
    BM: tl.constexpr, NT: tl.constexpr, BC: tl.constexpr, NC: tl.constexpr,
    PER_PROGRAM: tl.constexpr,  # windows of a program
    LOCAL: tl.constexpr,  # whether there are windows; without them, n_win counts tiles of tokens
    BIAS: tl.constexpr, COUNT: tl.constexpr,
    SAVE: tl.constexpr,  # whether there will be a backward
    PREC: tl.constexpr,
):  # fmt: skip
    """(16) for any number of tiles of tokens and shared keys, by a running softmax. Programs: (B · chunks · heads)."""
    head, chunk, image = split_program(heads, chunks)
    q += image * sqb + head * sqh
    k += image * skb + head * skh
    v += image * svb + head * svh
    out += image * sob + head * D
    lse += (image * heads + head) * H * W
    k_tilde += (image * heads + head) * rows * D
    beta += (image * heads + head) * rows * D
    bias += head * (NT * BM * NT * BM)
    qk_scale = scale * LOG2E
    c = tl.arange(0, BC)

    for win in range(chunk * PER_PROGRAM, tl.minimum(chunk * PER_PROGRAM + PER_PROGRAM, n_win)):
        for i in range(NT):
            n, _, valid = window_rows(win, i, H, W, n_wx, 1, WH, WW, 1, 1, LOCAL, BM)
            q_i = load_rows(q, n, valid, sqn, sqd, D, BD)
            top = tl.full([BM], float('-inf'), tl.float32)
            total = tl.zeros([BM], tl.float32)
            acc = tl.zeros([BM, BD], tl.float32)
            if LOCAL:
                for j in range(NT):
                    n_j, _, valid_j = window_rows(win, j, H, W, n_wx, 1, WH, WW, 1, 1, LOCAL, BM)
                    k_j = load_rows(k, n_j, valid_j, skn, skd, D, BD)
                    v_j = load_rows(v, n_j, valid_j, svn, svd, D, BD)
                    s = tl.dot(q_i, tl.trans(k_j), input_precision=PREC) * qk_scale
                    if BIAS:
                        s += tl.load(bias_tile(bias, i, j, BM, NT))
                    s = tl.where(valid_j[None, :], s, float('-inf'))
                    top, total, acc = add_keys(s, v_j, top, total, acc, PREC)
            for t in range(NC):
                c_t = t * BC + c
                kt = load_rows(k_tilde, c_t, c_t < rows, D, 1, D, BD)
                bt = load_rows(beta, c_t, c_t < rows, D, 1, D, BD)
                s = tl.dot(q_i, tl.trans(kt), input_precision=PREC) * qk_scale
                if COUNT:  # -inf beyond the last key
                    s += tl.load(count_tile(log_count, win, c_t[None, :], NC * BC, COUNT))
                else:
                    s = tl.where((c_t < rows)[None, :], s, float('-inf'))
                top, total, acc = add_keys(s, bt, top, total, acc, PREC)
            store_rows(out, n, valid, heads * D, 1, acc / total[:, None], D, BD)
            if SAVE:
                tl.store(lse + n, top + tl.log2(total), mask=valid)


@triton.jit
def forward_windows(
    q, k, v,  # (B, heads, N, D), dtype; the caller
    sqb, sqh, sqn, sqd, skb, skh, skn, skd, svb, svh, svn, svd,
    k_tilde, beta,  # (B, heads, rows, D), dtype; forward_cells and forward_prefix
    bias,  # if BIAS: (heads, BM, BM) float32 in units of q·kᵀ; pad_bias
    log_count,  # if COUNT: (1 or n_win, BC) float32 in units of log 2; log_counts
    out, sob,  # writes y, an image (N, heads, D) in memory, dtype
    lse,  # if SAVE: writes the log-sum-exp of a token's logits (B, heads, N) float32
    heads, H, W, n_wx, n_win, rows,
    chunks,  # programs that share the windows of an (image, head)
    scale,
    D: tl.constexpr, BD: tl.constexpr,
    WH: tl.constexpr, WW: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr,
    PER_PROGRAM: tl.constexpr,  # windows of a program
    PACKED: tl.constexpr,  # whether q, k and v have equal strides
    EDGE: tl.constexpr,  # whether windows overhang the grid
    SHARED: tl.constexpr,  # whether there are shared keys
    BIAS: tl.constexpr, COUNT: tl.constexpr,
    SAVE: tl.constexpr,  # whether there will be a backward
    PREC: tl.constexpr,
):  # fmt: skip
    """(16) where one tile holds a window and one all shared keys. Programs: (B · chunks · heads)."""
    if PACKED:  # so the compiler keeps one set of offsets, not three
        skb, skh, skn, skd, svb, svh, svn, svd = sqb, sqh, sqn, sqd, sqb, sqh, sqn, sqd
    head, chunk, image = split_program(heads, chunks)
    q += image * sqb + head * sqh
    k += image * skb + head * skh
    v += image * svb + head * svh
    out += image * sob + head * D
    lse += (image * heads + head) * H * W
    qk_scale = scale * LOG2E
    r = tl.arange(0, BM)
    ry, rx = r // WW, r % WW
    n = ry * W + rx
    if BIAS:
        high, low, eye = split_bias(bias + head * (BM * BM), q.dtype.element_ty, BM)
    if SHARED:
        c = tl.arange(0, BC)
        kt = load_rows(k_tilde + (image * heads + head) * rows * D, c, c < rows, D, 1, D, BD)
        bt = load_rows(beta + (image * heads + head) * rows * D, c, c < rows, D, 1, D, BD)

    for win in range(chunk * PER_PROGRAM, tl.minimum(chunk * PER_PROGRAM + PER_PROGRAM, n_win)):
        n0, valid = window_start(win, n_wx, W, H, ry, rx, WH, WW, EDGE)
        q_i = load_rows(q + n0 * sqn, n, valid, sqn, sqd, D, BD)
        k_i = load_rows(k + n0 * skn, n, valid, skn, skd, D, BD)
        v_i = load_rows(v + n0 * svn, n, valid, svn, svd, D, BD)
        if BIAS:
            s = tl.dot(eye, low, input_precision=PREC)
            s = tl.dot(eye, high, s, input_precision=PREC)
            s = tl.dot(q_i, tl.trans(k_i), s, input_precision=PREC) * qk_scale
        else:
            s = tl.dot(q_i, tl.trans(k_i), input_precision=PREC) * qk_scale
        s = tl.where(valid[None, :], s, float('-inf'))
        top = tl.max(s, 1)
        if SHARED:
            s_c = tl.dot(q_i, tl.trans(kt), input_precision=PREC) * qk_scale
            if COUNT:  # -inf beyond the last key
                s_c += tl.load(count_tile(log_count, win, c[None, :], BC, COUNT))
            else:
                s_c = tl.where((c < rows)[None, :], s_c, float('-inf'))
            top = tl.maximum(top, tl.max(s_c, 1))
        p = tl.exp2(s - top[:, None])
        total = tl.sum(p, 1)
        acc = tl.dot(p.to(v_i.dtype), v_i, input_precision=PREC)
        if SHARED:
            p = tl.exp2(s_c - top[:, None])
            total += tl.sum(p, 1)
            acc = tl.dot(p.to(bt.dtype), bt, acc, input_precision=PREC)
        store_rows(out + n0 * (heads * D), n, valid, heads * D, 1, acc / total[:, None], D, BD)
        if SAVE:
            tl.store(lse + n0 + n, top + tl.log2(total), mask=valid)
