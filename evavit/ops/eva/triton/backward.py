"""The backward kernels, in the order in which they run: `backward_shared`, `_weights`, `_summary`, `_tokens`.

With p a weight of (16), dp = dy · value and δ = y · dy, the gradient of its logit is p (dp - δ). pieces.py says how to
read the signatures. In them "parts" are partial sums, one for each program, which sum_parts or the next kernel adds up.
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
    load_weight,
    log_weights,
    next_weights,
    normalise,
    split_program,
    store_rows,
    window_rows,
)


@triton.jit
def backward_shared(
    q,  # (B, heads, N, D), dtype; the caller
    out, sob,  # y, an image (N, heads, D) in memory, dtype; forward_windows, forward_tokens or forward_windows_gluon
    grad,  # dy (B, heads, N, D), dtype; autograd
    sqb, sqh, sqn, sqd, sgb, sgh, sgn, sgd,
    lse,  # (B, heads, N) float32; forward_windows, forward_tokens or forward_windows_gluon
    delta,  # writes δ (B, heads, N) float32
    k_tilde, beta,  # (B, heads, rows, D), dtype; forward_cells and forward_prefix
    log_count,  # if COUNT: (1 or n_win, tiles · BC) float32 in units of log 2; log_counts
    dk_tilde_parts, dbeta_parts,  # if SHARED: writes (splits, B, heads, rows, D) float32
    heads, N, rows,
    splits, per_split,  # programs that share the tokens of an (image, head), and tokens, or places, of each
    rows_total, scale,
    H, W, n_wx, n_win,  # if COUNT is 2, else None
    D: tl.constexpr, BD: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr,  # tokens and shared keys of a tile
    WH: tl.constexpr, WW: tl.constexpr, NT: tl.constexpr,  # if COUNT is 2
    SHARED: tl.constexpr,  # whether there are shared keys
    COUNT: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """δ, and the part of dk̃ and dβ that comes through (16). Programs: (B · splits · heads, tiles of BC shared keys).

    Tokens come in raster order; if COUNT is 2, window by window, so that those of a tile share their counts.
    """
    head, split, image = split_program(heads, splits)
    pair = image * heads + head
    q += image * sqb + head * sqh
    grad += image * sgb + head * sgh
    out += image * sob + head * D
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    key_valid = c < rows
    if SHARED:
        kt = load_rows(k_tilde + pair * rows * D, c, key_valid, D, 1, D, BD)
        bt = load_rows(beta + pair * rows * D, c, key_valid, D, 1, D, BD)
        acc_k = tl.zeros([BC, BD], tl.float32)
        acc_b = tl.zeros([BC, BD], tl.float32)
    places = N
    if COUNT == 2:
        places = n_win * (NT * BM)
    for n0 in range(split * per_split, tl.minimum(split * per_split + per_split, places), BM):
        win = n0 // (NT * BM)
        if COUNT == 2:
            n, _, valid = window_rows(win, n0 // BM % NT, H, W, n_wx, 1, WH, WW, 1, 1, True, BM)
        else:
            n = n0 + tl.arange(0, BM)
            valid = n < N
        y = load_rows(out, n, valid, heads * D, 1, D, BD).to(tl.float32)
        dy = load_rows(grad, n, valid, sgn, sgd, D, BD)
        delta_n = tl.sum(y * dy.to(tl.float32), 1)
        if tl.program_id(1) == 0:
            tl.store(delta + pair * N + n, delta_n, mask=valid)
        if SHARED:
            q_n = load_rows(q, n, valid, sqn, sqd, D, BD)
            lse_n = tl.load(lse + pair * N + n, mask=valid, other=0.0)
            # Transposed, (keys, tokens): the sums over tokens are then plain products.
            s = tl.dot(kt, tl.trans(q_n), input_precision=PREC) * (scale * LOG2E)
            if COUNT:
                s += tl.load(count_tile(log_count, win, c[:, None], tl.num_programs(1) * BC, COUNT))
            p = tl.where(key_valid[:, None] & valid[None, :], tl.exp2(s - lse_n[None, :]), 0.0)
            dp = tl.dot(bt, tl.trans(dy), input_precision=PREC)
            ds = p * (dp - delta_n[None, :])
            acc_b = tl.dot(p.to(dy.dtype), dy, acc_b, input_precision=PREC)
            acc_k = tl.dot(ds.to(q_n.dtype), q_n, acc_k, input_precision=PREC)
    if SHARED:
        row = split * rows_total + pair * rows + c
        store_rows(dk_tilde_parts, row, key_valid, D, 1, acc_k * scale, D, BD)
        store_rows(dbeta_parts, row, key_valid, D, 1, acc_b, D, BD)


@triton.jit
def backward_weights(
    k, v,  # (B, heads, N, D), dtype; the caller
    skb, skh, skn, skd, svb, svh, svn, svd,
    omega,  # (B, heads, cells, D) float32; forward_cells
    dbeta_parts,  # (splits, B, heads, rows, D) float32; backward_shared or backward_shared_gluon
    dbeta,  # writes the cells' sum (B, heads, cells, D), dtype
    omega_half,  # if OMEGA_HALF: writes ω / s^½ (B, heads, cells, D), dtype, for backward_tokens_gluon
    domega,  # writes (B, heads, cells, D) float32
    xi, dlog_xi,  # writes ξ and d log ξ of each token in its cell (B, heads, N) float32
    heads, H, W, n_cx, cells, ch, cw, cells_total, rows,
    splits,  # parts
    rows_total,
    scale_half,
    D: tl.constexpr, BD: tl.constexpr,
    G: tl.constexpr, T: tl.constexpr,  # cells of a program, and tokens of each that it loads at a time
    ONCE: tl.constexpr,  # whether T holds a whole cell, so that k and v are loaded once
    OMEGA_HALF: tl.constexpr,
):  # fmt: skip
    """Through β = Σ ξ v: ξ and d log ξ of every token, dω of every cell. Programs: (B · heads, tiles of G cells)."""
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
    om = load_rows(omega, row, cell_valid, D, 1, D, BD)
    db = tl.zeros([G, BD], tl.float32)
    for i in range(splits):
        db += load_rows(dbeta_parts, i * rows_total + pair * rows + c, cell_valid, D, 1, D, BD)
    store_rows(dbeta, row, cell_valid, D, 1, db, D, BD)
    if OMEGA_HALF:
        store_rows(omega_half, row, cell_valid, D, 1, om / scale_half, D, BD)

    if ONCE:
        n, valid = cell_tokens(y0, x0, cell_valid, 0, H, W, ch, cw, T)
        k_t = load_cells(k, n, valid, skn, skd, D, BD)
        log_xi = log_weights(k_t, om, valid, scale_half)
        top = tl.where(cell_valid, tl.max(log_xi, 1), 0.0)
        w = tl.exp2((log_xi - top[:, None]) * LOG2E)
        w = w / tl.where(cell_valid, tl.sum(w, 1), 1.0)[:, None]
        dw = tl.sum(load_cells(v, n, valid, svn, svd, D, BD) * db[:, None, :], 2)
        dl = w * (dw - tl.sum(w * dw, 1)[:, None])
        tl.store(xi + n, w, mask=valid)
        tl.store(dlog_xi + n, dl, mask=valid)
        dom = tl.sum(dl[:, :, None] * k_t, 1)
    else:
        top = tl.full([G], float('-inf'), tl.float32)
        total = tl.zeros([G], tl.float32)
        mean_dw = tl.zeros([G], tl.float32)
        for t0 in range(0, ch * cw, T):
            n, valid = cell_tokens(y0, x0, cell_valid, t0, H, W, ch, cw, T)
            k_t = load_cells(k, n, valid, skn, skd, D, BD)
            dw = tl.sum(load_cells(v, n, valid, svn, svd, D, BD) * db[:, None, :], 2)
            log_xi = log_weights(k_t, om, valid, scale_half)
            top, decay, w = next_weights(log_xi, top)
            total = total * decay + tl.sum(w, 1)
            mean_dw = mean_dw * decay + tl.sum(w * dw, 1)
        top = tl.where(cell_valid, top, 0.0)
        total = tl.where(cell_valid, total, 1.0)
        mean_dw = mean_dw / total
        dom = tl.zeros([G, BD], tl.float32)
        for t0 in range(0, ch * cw, T):
            n, valid = cell_tokens(y0, x0, cell_valid, t0, H, W, ch, cw, T)
            k_t = load_cells(k, n, valid, skn, skd, D, BD)
            dw = tl.sum(load_cells(v, n, valid, svn, svd, D, BD) * db[:, None, :], 2)
            log_xi = log_weights(k_t, om, valid, scale_half)
            w = tl.exp2((log_xi - top[:, None]) * LOG2E) / total[:, None]
            dl = w * (dw - mean_dw[:, None])
            tl.store(xi + n, w, mask=valid)
            tl.store(dlog_xi + n, dl, mask=valid)
            dom += tl.sum(dl[:, :, None] * k_t, 1)
    store_rows(domega, row, cell_valid, D, 1, dom * scale_half, D, BD)


@triton.jit
def backward_summary(
    means,  # q̄ and k̄ (2, B, heads, cells, D) float32; forward_cells
    domega,  # (B, heads, cells, D) float32; backward_weights
    dk_tilde_parts,  # (splits, B, heads, rows, D) float32; backward_shared or backward_shared_gluon
    w_q, b_q, g_q,  # of q's summary: W (D, D), b, weight of LayerNorm (D), any float dtype; the caller
    w_k, b_k, g_k,  # of k's summary
    dmeans,  # writes (2, B, heads, cells, D), dtype: what each token of a cell gets through its mean
    dparams_parts,  # writes (programs, 2, D² + 3 D) float32: dW, db, and of LayerNorm's weight and bias
    cells_total,
    splits,  # parts of dk̃
    H, W, n_cx, cells, ch, cw, rows, rows_total,
    omega_scale,  # s^½ · proposal_scale, by which (28) multiplies q̃ + k̃
    eps,  # of LayerNorm
    D: tl.constexpr, BD: tl.constexpr,
    R: tl.constexpr,  # cells of a tile
    PREC: tl.constexpr,
):  # fmt: skip
    """Through the summaries (26): the gradients of q̄ and k̄ and of the parameters. Programs: (any number, 2).

    Axis 1 is 0 for q's summary and 1 for k's; the programs of axis 0 share the cells of all images and heads.
    """
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
    w = load_weight(weight, D, BD)
    w_half = w.to(dtype)
    sum_w = tl.zeros([BD, BD], tl.float32)
    sum_b = tl.zeros([BD], tl.float32)
    sum_g = tl.zeros([BD], tl.float32)
    sum_o = tl.zeros([BD], tl.float32)
    for r0 in range(tl.program_id(0) * R, cells_total, tl.num_programs(0) * R):
        row = r0 + tl.arange(0, R)
        valid = row < cells_total
        mean = load_rows(means, which * cells_total + row, valid, D, 1, D, BD)
        z = tl.dot(mean, tl.trans(w), input_precision=PREC) + b[None, :]
        z_hat, inv = normalise(z, eps, D, BD)
        d = omega_scale * load_rows(domega, row, valid, D, 1, D, BD)
        c = row % cells
        if which == 1:
            shared = row // cells * rows + c
            for i in range(splits):
                d += load_rows(dk_tilde_parts, i * rows_total + shared, valid, D, 1, D, BD)
        sum_g += tl.sum(d * z_hat, 0)
        sum_o += tl.sum(d, 0)
        d = d * g[None, :]
        dz = d - tl.sum(d, 1)[:, None] / D - z_hat * (tl.sum(d * z_hat, 1) / D)[:, None]
        dz = tl.where(inside[None, :], dz * inv[:, None], 0.0)
        sum_b += tl.sum(dz, 0)
        dz = dz.to(dtype)
        sum_w = tl.dot(tl.trans(dz), mean.to(dtype), sum_w, input_precision=PREC)
        count = tl.minimum(ch, H - (c // n_cx) * ch) * tl.minimum(cw, W - (c % n_cx) * cw)
        dmean = tl.dot(dz, w_half, input_precision=PREC) / count.to(tl.float32)[:, None]
        store_rows(dmeans, which * cells_total + row, valid, D, 1, dmean, D, BD)
    dparams_parts += (tl.program_id(0) * 2 + which) * (D * D + 3 * D)
    tl.store(dparams_parts + dim[:, None] * D + dim[None, :], sum_w, mask=inside[:, None] & inside[None, :])
    tl.store(dparams_parts + D * D + dim, sum_b, mask=inside)
    tl.store(dparams_parts + D * D + D + dim, sum_g, mask=inside)
    tl.store(dparams_parts + D * D + 2 * D + dim, sum_o, mask=inside)


@triton.jit
def _logit_grad(q_i, k_j, v_j, dy, lse, delta, bias, valid, valid_j, qk_scale, BIAS: tl.constexpr, PREC: tl.constexpr):
    """The weights p of queries i for keys j, and the gradients p (dp - δ) of their logits. `bias` points to a tile, or
    to a row for all queries."""
    s = tl.dot(q_i, tl.trans(k_j), input_precision=PREC) * qk_scale
    if BIAS:
        s += tl.load(bias)
    p = tl.where(valid[:, None] & valid_j[None, :], tl.exp2(s - lse[:, None]), 0.0)
    dp = tl.dot(dy, tl.trans(v_j), input_precision=PREC)
    return p, p * (dp - delta[:, None])


@triton.jit
def _key_grad_through_cells(k_j, omega, dmean, dlog_xi, c, valid, scale, scale_half, D: tl.constexpr, BD: tl.constexpr):
    """What reaches keys k through their cells c: by the mean, and by log ξ = s^½ k·ω - ½ s ‖k‖²."""
    om = load_rows(omega, c, valid, D, 1, D, BD).to(tl.float32)
    dm = load_rows(dmean, c, valid, D, 1, D, BD).to(tl.float32)
    return dm + dlog_xi[:, None] * (scale_half * om - scale * k_j.to(tl.float32))


@triton.jit
def backward_tokens(
    q, k, v,  # (B, heads, N, D), dtype; the caller
    grad,  # dy (B, heads, N, D), dtype; autograd
    sqb, sqh, sqn, sqd, skb, skh, skn, skd, svb, svh, svn, svd, sgb, sgh, sgn, sgd,
    lse,  # (B, heads, N) float32; forward_windows, forward_tokens or forward_windows_gluon
    delta,  # δ (B, heads, N) float32; backward_shared or backward_shared_gluon
    k_tilde, beta,  # (B, heads, rows, D), dtype; forward_cells and forward_prefix
    bias,  # if BIAS: (heads, S, S) float32 in units of log 2; pad_bias
    log_count,  # if COUNT: (1 or n_win, NC · BC) float32 in units of log 2; log_counts
    omega,  # (B, heads, cells, D) float32; forward_cells
    dbeta,  # (B, heads, cells, D), dtype; backward_weights
    dmeans,  # (2, B, heads, cells, D), dtype; backward_summary
    xi, dlog_xi,  # (B, heads, N) float32; backward_weights
    dq, dk, dv,  # writes (B, heads, N, D), dtype; the stride of channels is 1
    sdb, sdh, sdn,
    dbias_parts,  # if BIAS: writes (B, chunks, heads, S, S) float32; zero before where NT > 1
    heads, H, W, n_wx, n_win, n_cx, cells, rows,
    chunks,  # programs that share the windows of an (image, head)
    cells_total, scale, scale_half,
    D: tl.constexpr, BD: tl.constexpr,
    WH: tl.constexpr, WW: tl.constexpr, CH: tl.constexpr, CW: tl.constexpr,
    BM: tl.constexpr, NT: tl.constexpr, BC: tl.constexpr, NC: tl.constexpr,
    PER_PROGRAM: tl.constexpr,  # windows of a program
    LOCAL: tl.constexpr,  # whether there are windows; without them, n_win counts tiles of tokens
    CELLS: tl.constexpr,  # whether there are cells
    BIAS: tl.constexpr, COUNT: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """dq, dk and dv, all that reaches them, and the gradient of the bias. Programs: (B · chunks · heads)."""
    head, chunk, image = split_program(heads, chunks)
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
    k_tilde += pair * rows * D
    beta += pair * rows * D
    omega += pair * cells * D
    dbeta += pair * cells * D
    dmean_q = dmeans + pair * cells * D
    dmean_k = dmean_q + cells_total * D
    bias += head * (NT * BM * NT * BM)
    dbias_parts += ((image * chunks + chunk) * heads + head) * (NT * BM * NT * BM)
    qk_scale = scale * LOG2E
    c0 = tl.arange(0, BC)
    if NC == 1:
        kt_0 = load_rows(k_tilde, c0, c0 < rows, D, 1, D, BD)
        beta_0 = load_rows(beta, c0, c0 < rows, D, 1, D, BD)
    if LOCAL and BIAS and NT == 1:
        sum_bias = tl.zeros([BM, BM], tl.float32)

    for win in range(chunk * PER_PROGRAM, tl.minimum(chunk * PER_PROGRAM + PER_PROGRAM, n_win)):
        for i in range(NT):
            n, c, valid = window_rows(win, i, H, W, n_wx, n_cx, WH, WW, CH, CW, LOCAL, BM)
            q_i = load_rows(q, n, valid, sqn, sqd, D, BD)
            dy = load_rows(grad, n, valid, sgn, sgd, D, BD)
            if NT == 1:
                k_i = load_rows(k, n, valid, skn, skd, D, BD)
                v_i = load_rows(v, n, valid, svn, svd, D, BD)
            lse_i = tl.load(lse + n, mask=valid, other=0.0)
            delta_i = tl.load(delta + n, mask=valid, other=0.0)
            if NT == 1 and CELLS:
                w = tl.load(xi + n, mask=valid, other=0.0)
                dl = tl.load(dlog_xi + n, mask=valid, other=0.0)
            acc = tl.zeros([BM, BD], tl.float32)
            for t in range(NC):
                c_t = t * BC + c0
                if NC == 1:
                    kt, bt = kt_0, beta_0
                else:
                    kt = load_rows(k_tilde, c_t, c_t < rows, D, 1, D, BD)
                    bt = load_rows(beta, c_t, c_t < rows, D, 1, D, BD)
                real, count = c_t < rows, bias
                if COUNT:
                    count = count_tile(log_count, win, c_t[None, :], NC * BC, COUNT)
                p, ds = _logit_grad(q_i, kt, bt, dy, lse_i, delta_i, count, valid, real, qk_scale, COUNT > 0, PREC)
                acc = tl.dot(ds.to(kt.dtype), kt, acc, input_precision=PREC)
            if LOCAL and NT > 1:
                for j in range(NT):
                    n_j, c_j, valid_j = window_rows(win, j, H, W, n_wx, n_cx, WH, WW, CH, CW, LOCAL, BM)
                    k_j = load_rows(k, n_j, valid_j, skn, skd, D, BD)
                    v_j = load_rows(v, n_j, valid_j, svn, svd, D, BD)
                    b_ij = bias_tile(bias, i, j, BM, NT)
                    p, ds = _logit_grad(q_i, k_j, v_j, dy, lse_i, delta_i, b_ij, valid, valid_j, qk_scale, BIAS, PREC)
                    acc = tl.dot(ds.to(k_j.dtype), k_j, acc, input_precision=PREC)
                    if BIAS:  # several tiles are too many for registers: added up in this program's part in memory
                        ptr = bias_tile(dbias_parts, i, j, BM, NT)
                        tl.store(ptr, tl.load(ptr) + ds)
            if LOCAL and NT == 1:
                b_ij = bias_tile(bias, 0, 0, BM, NT)
                p, ds = _logit_grad(q_i, k_i, v_i, dy, lse_i, delta_i, b_ij, valid, valid, qk_scale, BIAS, PREC)
                if BIAS:
                    sum_bias += ds
                ds = ds.to(q_i.dtype)
                p = p.to(dy.dtype)
                acc = tl.dot(ds, k_i, acc, input_precision=PREC)
            acc = acc * scale
            if CELLS:
                acc += load_rows(dmean_q, c, valid, D, 1, D, BD).to(tl.float32)
            store_rows(dq, n, valid, sdn, 1, acc, D, BD)
            if NT == 1:  # each sum is written before the next begins, which saves registers
                acc_v = tl.zeros([BM, BD], tl.float32)
                acc_k = tl.zeros([BM, BD], tl.float32)
                if LOCAL:
                    acc_v = tl.dot(tl.trans(p), dy, input_precision=PREC)
                if CELLS:
                    acc_v += w[:, None] * load_rows(dbeta, c, valid, D, 1, D, BD).to(tl.float32)
                store_rows(dv, n, valid, sdn, 1, acc_v, D, BD)
                if LOCAL:
                    acc_k = tl.dot(tl.trans(ds), q_i, input_precision=PREC) * scale
                if CELLS:
                    acc_k += _key_grad_through_cells(k_i, omega, dmean_k, dl, c, valid, scale, scale_half, D, BD)
                store_rows(dk, n, valid, sdn, 1, acc_k, D, BD)
        if LOCAL and NT > 1:
            for j in range(NT):
                n_j, c_j, valid_j = window_rows(win, j, H, W, n_wx, n_cx, WH, WW, CH, CW, LOCAL, BM)
                k_j = load_rows(k, n_j, valid_j, skn, skd, D, BD)
                v_j = load_rows(v, n_j, valid_j, svn, svd, D, BD)
                acc_k = tl.zeros([BM, BD], tl.float32)
                acc_v = tl.zeros([BM, BD], tl.float32)
                for i in range(NT):
                    n, c, valid = window_rows(win, i, H, W, n_wx, n_cx, WH, WW, CH, CW, LOCAL, BM)
                    q_i = load_rows(q, n, valid, sqn, sqd, D, BD)
                    dy = load_rows(grad, n, valid, sgn, sgd, D, BD)
                    lse_i = tl.load(lse + n, mask=valid, other=0.0)
                    delta_i = tl.load(delta + n, mask=valid, other=0.0)
                    b_ij = bias_tile(bias, i, j, BM, NT)
                    p, ds = _logit_grad(q_i, k_j, v_j, dy, lse_i, delta_i, b_ij, valid, valid_j, qk_scale, BIAS, PREC)
                    acc_k = tl.dot(tl.trans(ds.to(q_i.dtype)), q_i, acc_k, input_precision=PREC)
                    acc_v = tl.dot(tl.trans(p.to(dy.dtype)), dy, acc_v, input_precision=PREC)
                acc_k = acc_k * scale
                if CELLS:
                    w = tl.load(xi + n_j, mask=valid_j, other=0.0)
                    dl = tl.load(dlog_xi + n_j, mask=valid_j, other=0.0)
                    acc_v += w[:, None] * load_rows(dbeta, c_j, valid_j, D, 1, D, BD).to(tl.float32)
                    acc_k += _key_grad_through_cells(k_j, omega, dmean_k, dl, c_j, valid_j, scale, scale_half, D, BD)
                store_rows(dk, n_j, valid_j, sdn, 1, acc_k, D, BD)
                store_rows(dv, n_j, valid_j, sdn, 1, acc_v, D, BD)

    if LOCAL and BIAS and NT == 1:
        tl.store(bias_tile(dbias_parts, 0, 0, BM, NT), sum_bias)
