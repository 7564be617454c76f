"""Three kernels of `triton/` in Gluon, for Hopper and the default windows and cells.

Triton's compiler chooses where a tile is kept and when its copy is waited for. Its assembly showed what that costs
here: what it calls a pipeline waits for the copies of a window right after they are issued, a latency of DRAM for
each window and one more for a gather; and what a loop does not change (64-bit pointers, descriptors of shared
memory, the bias) waits in registers, until those that change spill. In Gluon both are said. The arithmetic is the
same, and these kernels

* copy the next window's tokens into a second buffer while they work on this one, and wait where they want them;
* read the operands of products from shared memory, or from registers that hold them already;
* load the bias, padded in the order of the accumulator's fragments, into the accumulator of q·kᵀ: exact, and the
  mask too;
* take what reaches a token through its cell from a product with the 0/1 matrix of the few cells that meet a window,
  where a gather loads a row for each token;
* add a zero that the compiler does not know to what it would keep in registers (`zero`).

One tile of 64 rows holds a window, another the cells; both have the head's columns, 32 or 64.
`triton.operator._Plan.gluon` checks what tensors these kernels take.

Shared memory: a copy is seen by all threads after `wait_group` and the barrier that Triton puts behind it. Products
read through another proxy: a fence stands between them and what threads or copies wrote. A buffer is written again
after the wait at the top of the loop: whatever product reads it has been waited for by then, by every warp.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

__all__ = ['backward_shared_gluon', 'backward_tokens_gluon', 'forward_windows_gluon']

LOG2E = gl.constexpr(1.4426950408889634)
# Triton renamed it between 3.6 and 3.9.
_copy = getattr(async_copy, 'async_load', None) or async_copy.async_copy_global_to_shared


@gluon.jit
def _window_start(win, n_wx, H, W, y, x, WH: gl.constexpr, WW: gl.constexpr, EDGE: gl.constexpr):
    """The first token of a window, and which of its places (y, x) hold a token."""
    y0, x0 = (win // n_wx) * WH, (win % n_wx) * WW
    valid = y < WH
    if EDGE:
        valid = valid & (y0 + y < H) & (x0 + x < W)
    return y0 * W + x0, valid


@gluon.jit
def _bias_fragments(bias, mma: gl.constexpr):
    """A bias that `pad_bias_fragments` wrote, as an accumulator (64, 64): 16 bytes a load, no value changes hands."""
    four: gl.constexpr = gl.BlockedLayout([1, 4], [32, 1], [4, 1], [1, 0])
    i = gl.arange(0, 1024, layout=gl.SliceLayout(1, four))
    j = gl.arange(0, 4, layout=gl.SliceLayout(0, four))
    x = gl.load(bias + (i[:, None] * 4 + j[None, :]))
    x = gl.permute(gl.reshape(x, (8, 4, 8, 4, 2, 2)), (1, 4, 2, 0, 3, 5))
    return gl.convert_layout(gl.reshape(x, (64, 64)), mma, assert_trivial=True)


@gluon.jit
def forward_windows_gluon(
    q,
    k,
    v,
    sqb,
    sqh,
    sqn,
    skb,
    skh,
    skn,
    svb,
    svh,
    svn,
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
    D: gl.constexpr,
    WH: gl.constexpr,
    WW: gl.constexpr,
    PER_PROGRAM: gl.constexpr,
    EDGE: gl.constexpr,
    BIAS: gl.constexpr,
    SAVE: gl.constexpr,
):
    """(16) for PER_PROGRAM windows of one (image, head)."""
    dtype: gl.constexpr = q.dtype.element_ty
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    thin: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    dot_a: gl.constexpr = gl.DotOperandLayout(0, thin, 2)
    flat: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, D], dtype)

    head = gl.program_id(0) % heads
    chunk = (gl.program_id(0) // heads) % chunks
    image = (gl.program_id(0) // (heads * chunks)).to(gl.int64)
    pair = image * heads + head
    q += image * sqb + head * sqh
    k += image * skb + head * skh
    v += image * svb + head * svh
    out += image * H * W * heads * D + head * D
    lse += pair * H * W
    k_tilde += pair * cells * D
    beta += pair * cells * D
    bias += head * (64 * 64)
    qk_scale = scale * LOG2E

    # Places of a window as rows of an accumulator (r, y, x) and of a copy (fr, fy, fx).
    r = gl.arange(0, 64, layout=gl.SliceLayout(1, mma))
    y, x = r // WW, r % WW
    n = y * W + x
    fr = gl.arange(0, 64, layout=gl.SliceLayout(1, flat))
    fy, fx = fr // WW, fr % WW
    fn_0 = (fy * W + fx)[:, None]
    dim = gl.arange(0, D, layout=gl.SliceLayout(0, flat))[None, :]
    j = gl.arange(0, 64, layout=gl.SliceLayout(0, mma))
    zeros = gl.zeros([64, D], gl.float32, layout=thin)
    zeros_64 = gl.zeros([64, 64], gl.float32, layout=mma)

    kt_s = gl.allocate_shared_memory(dtype, [1, 64, D], tile)
    bt_s = gl.allocate_shared_memory(dtype, [1, 64, D], tile)
    q_s = gl.allocate_shared_memory(dtype, [2, 64, D], tile)
    k_s = gl.allocate_shared_memory(dtype, [2, 64, D], tile)
    v_s = gl.allocate_shared_memory(dtype, [2, 64, D], tile)
    at_c = fr[:, None] * D + dim
    _copy(kt_s.index(0), k_tilde + at_c, mask=(fr < cells)[:, None])
    _copy(bt_s.index(0), beta + at_c, mask=(fr < cells)[:, None])
    first = chunk * PER_PROGRAM
    last = gl.minimum(first + PER_PROGRAM, n_win)
    n0, inside = _window_start(first, n_wx, H, W, fy, fx, WH, WW, EDGE)
    inside = inside[:, None]
    _copy(q_s.index(0), q + ((fn_0 * sqn + dim) + n0 * sqn), mask=inside)
    _copy(k_s.index(0), k + ((fn_0 * skn + dim) + n0 * skn), mask=inside)
    _copy(v_s.index(0), v + ((fn_0 * svn + dim) + n0 * svn), mask=inside)
    async_copy.commit_group()

    for win in range(first, last):
        # The compiler does not know that it is 0: sums with it are made when wanted and not kept in registers.
        zero = win >> 30
        fn = fn_0 + zero
        now = (win - first) % 2
        async_copy.wait_group(0)
        m0, coming = _window_start(win + 1, n_wx, H, W, fy, fx, WH, WW, EDGE)
        coming = (coming & (win + 1 < last))[:, None]
        if PER_PROGRAM > 1:  # else the second buffer is dead, its memory another's, and zeros would be copied there
            _copy(q_s.index(1 - now), q + ((fn * sqn + dim) + m0 * sqn), mask=coming)
            _copy(k_s.index(1 - now), k + ((fn * skn + dim) + m0 * skn), mask=coming)
            _copy(v_s.index(1 - now), v + ((fn * svn + dim) + m0 * svn), mask=coming)
        async_copy.commit_group()
        q_i, k_i, v_i = q_s.index(now + zero), k_s.index(now + zero), v_s.index(now + zero)

        fence_async_shared()
        if BIAS:
            s = _bias_fragments(bias, mma)
        else:
            s = gl.zeros([64, 64], gl.float32, layout=mma)
        s = warpgroup_mma(q_i, k_i.permute((1, 0)), s, is_async=True)
        t = warpgroup_mma(q_i, kt_s.index(zero).permute((1, 0)), zeros_64, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(1, deps=[s])
        if EDGE or not BIAS:
            _, seen = _window_start(win, n_wx, H, W, j // WW, j % WW, WH, WW, EDGE)
            s = gl.where(seen[None, :], s, float('-inf'))
        top = gl.max(s, 1)
        t = warpgroup_mma_wait(0, deps=[t])
        t = gl.where((j < cells)[None, :], t, float('-inf'))
        top = gl.maximum(top, gl.max(t, 1)) * qk_scale
        s = gl.exp2(s * qk_scale - top[:, None])
        total = gl.sum(s, 1)
        p = gl.convert_layout(s.to(dtype), dot_a, assert_trivial=True)
        acc = warpgroup_mma(p, v_i, zeros, use_acc=False, is_async=True)
        t = gl.exp2(t * qk_scale - top[:, None])
        total += gl.sum(t, 1)
        p = gl.convert_layout(t.to(dtype), dot_a, assert_trivial=True)
        acc = warpgroup_mma(p, bt_s.index(zero), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        acc = acc * gl.convert_layout(1.0 / total, gl.SliceLayout(1, thin), assert_trivial=True)[:, None]
        n0, inside = _window_start(win, n_wx, H, W, fy, fx, WH, WW, EDGE)
        inside = inside[:, None]
        at = (fn * (heads * D) + dim) + n0 * (heads * D)
        gl.store(out + at, gl.convert_layout(acc.to(dtype), flat), mask=inside)
        if SAVE:  # in units of log 2, as the backward's exp2 takes it
            _, valid = _window_start(win, n_wx, H, W, y, x, WH, WW, EDGE)
            gl.store(lse + (n0 + n), top + gl.log2(total), mask=valid)
    async_copy.wait_group(0)


@gluon.jit
def backward_shared_gluon(
    q,
    out,
    grad,
    sqb,
    sqh,
    sqn,
    sgb,
    sgh,
    sgn,
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
    D: gl.constexpr,
    T: gl.constexpr,
):
    """δ, and the part of dk̃ and dβ that comes through (16), from per_split tokens of an (image, head), T at a time.

    Products are transposed, (cells, tokens): the weights of a tile are then operands as they are.
    """
    dtype: gl.constexpr = q.dtype.element_ty
    wide: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, T, 16])
    dot_a: gl.constexpr = gl.DotOperandLayout(0, wide, 2)
    flat: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    col: gl.constexpr = gl.SliceLayout(0, mma)
    tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([T, D], dtype)
    cell_tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, D], dtype)

    head = gl.program_id(0) % heads
    split = (gl.program_id(0) // heads) % splits
    image = (gl.program_id(0) // (heads * splits)).to(gl.int64)
    pair = image * heads + head
    q += image * sqb + head * sqh
    grad += image * sgb + head * sgh
    out += image * N * heads * D + head * D
    lse += pair * N
    delta += pair * N
    k_tilde += pair * cells * D
    beta += pair * cells * D
    qk_scale = scale * LOG2E
    dim = gl.arange(0, D, layout=gl.SliceLayout(0, flat))[None, :]
    f_0 = gl.arange(0, T, layout=gl.SliceLayout(1, flat))
    j_0 = gl.arange(0, T, layout=col)
    fc = gl.arange(0, 64, layout=gl.SliceLayout(1, flat))

    kt_s = gl.allocate_shared_memory(dtype, [1, 64, D], cell_tile)
    bt_s = gl.allocate_shared_memory(dtype, [1, 64, D], cell_tile)
    q_s = gl.allocate_shared_memory(dtype, [2, T, D], tile)
    g_s = gl.allocate_shared_memory(dtype, [2, T, D], tile)
    at_c = fc[:, None] * D + dim
    _copy(kt_s.index(0), k_tilde + at_c, mask=(fc < cells)[:, None])
    _copy(bt_s.index(0), beta + at_c, mask=(fc < cells)[:, None])
    first = split * per_split
    last = gl.minimum(first + per_split, N)
    f = f_0 + first
    _copy(q_s.index(0), q + (f[:, None] * sqn + dim), mask=(f < last)[:, None])
    _copy(g_s.index(0), grad + (f[:, None] * sgn + dim), mask=(f < last)[:, None])
    async_copy.commit_group()
    y_next = gl.load(out + (f[:, None] * (heads * D) + dim), mask=(f < last)[:, None], other=0.0)
    acc_b = gl.zeros([64, D], gl.float32, layout=wide)
    acc_k = gl.zeros([64, D], gl.float32, layout=wide)
    zeros = gl.zeros([64, T], gl.float32, layout=mma)

    for n0 in range(first, last, T):
        zero = n0 >> 30  # see forward_windows_gluon
        now = ((n0 - first) // T) % 2
        j = j_0 + (zero + n0)
        lse_n = gl.load(lse + j, mask=j < last, other=float('inf'))  # no weight where there is no token
        async_copy.wait_group(0)
        f = f_0 + (zero + n0 + T)
        _copy(q_s.index(1 - now), q + (f[:, None] * sqn + dim), mask=(f < last)[:, None])
        _copy(g_s.index(1 - now), grad + (f[:, None] * sgn + dim), mask=(f < last)[:, None])
        async_copy.commit_group()
        q_i, g_i = q_s.index(now + zero), g_s.index(now + zero)
        fence_async_shared()
        s = warpgroup_mma(kt_s.index(zero), q_i.permute((1, 0)), zeros, use_acc=False, is_async=True)
        dp = warpgroup_mma(bt_s.index(zero), g_i.permute((1, 0)), zeros, use_acc=False, is_async=True)
        d = gl.sum(y_next.to(gl.float32) * g_i.load(flat).to(gl.float32), 1)
        y_next = gl.load(out + (f[:, None] * (heads * D) + dim), mask=(f < last)[:, None], other=0.0)
        gl.store(delta + (f - T), d, mask=f - T < last)
        d = gl.convert_layout(d, col)
        s = warpgroup_mma_wait(1, deps=[s])
        p = gl.exp2(s * qk_scale - lse_n[None, :])
        dp = warpgroup_mma_wait(0, deps=[dp])
        acc_b = warpgroup_mma(gl.convert_layout(p.to(dtype), dot_a), g_i, acc_b, is_async=True)
        ds = p * (dp - d[None, :])
        acc_k = warpgroup_mma(gl.convert_layout(ds.to(dtype), dot_a), q_i, acc_k, is_async=True)
        acc_b, acc_k = warpgroup_mma_wait(0, deps=[acc_b, acc_k])
    async_copy.wait_group(0)
    c = gl.arange(0, 64, layout=gl.SliceLayout(1, wide))[:, None]
    at = (split.to(gl.int64) * cells_total + pair * cells + c) * D
    at = at + gl.arange(0, D, layout=gl.SliceLayout(0, wide))[None, :]
    gl.store(dk_tilde + at, acc_k * scale, mask=c < cells)
    gl.store(dbeta + at, acc_b, mask=c < cells)


@gluon.jit
def backward_tokens_gluon(
    q,
    k,
    v,
    grad,
    sqb,
    sqh,
    sqn,
    skb,
    skh,
    skn,
    svb,
    svh,
    svn,
    sgb,
    sgh,
    sgn,
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
    D: gl.constexpr,
    WH: gl.constexpr,
    WW: gl.constexpr,
    CH: gl.constexpr,
    CW: gl.constexpr,
    KE: gl.constexpr,
    NCX: gl.constexpr,
    NCY: gl.constexpr,
    PER_PROGRAM: gl.constexpr,
    EDGE: gl.constexpr,
    BIAS: gl.constexpr,
):
    """dq, dk, dv of the tokens of PER_PROGRAM windows of one (image, head), and their part of the bias's gradient.

    A window meets NCY × NCX cells, rows of tiles of KE. omega is ω / s^½ in the dtype of q.
    """
    dtype: gl.constexpr = q.dtype.element_ty
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    thin: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    dot_a: gl.constexpr = gl.DotOperandLayout(0, thin, 2)
    flat: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    col: gl.constexpr = gl.SliceLayout(0, mma)
    tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, D], dtype)
    square: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 64], dtype)
    few: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KE, D], dtype)

    head = gl.program_id(0) % heads
    chunk = (gl.program_id(0) // heads) % chunks
    image = (gl.program_id(0) // (heads * chunks)).to(gl.int64)
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
    bias += head * (64 * 64)
    dbias += ((image * chunks + chunk) * heads + head) * (64 * 64)
    qk_scale = scale * LOG2E
    n_cy = cells // n_cx

    # Places of a window as rows of products of 64 columns (r, ry, rx) and of D columns (ty, tx), of a copy (fr, fy, fx)
    # and of an operand (ay, ax).
    r = gl.arange(0, 64, layout=gl.SliceLayout(1, mma))
    ry, rx = r // WW, r % WW
    n_0 = ry * W + rx
    tr = gl.arange(0, 64, layout=gl.SliceLayout(1, thin))
    ty, tx = tr // WW, tr % WW
    tn_0 = ty * W + tx
    fr = gl.arange(0, 64, layout=gl.SliceLayout(1, flat))
    fy, fx = fr // WW, fr % WW
    fn_0 = (fy * W + fx)[:, None]
    dim = gl.arange(0, D, layout=gl.SliceLayout(0, flat))[None, :]
    ar = gl.arange(0, 64, layout=gl.SliceLayout(1, dot_a))
    ay, ax = ar // WW, ar % WW
    ac = gl.arange(0, KE, layout=gl.SliceLayout(0, dot_a))[None, :]
    er = gl.arange(0, KE, layout=gl.SliceLayout(1, flat))
    ey, ex = er // NCX, er % NCX
    zeros = gl.zeros([64, D], gl.float32, layout=thin)
    zeros_64 = gl.zeros([64, 64], gl.float32, layout=mma)
    if BIAS:
        sum_bias = gl.zeros([64, 64], gl.float32, layout=mma)

    kt_s = gl.allocate_shared_memory(dtype, [1, 64, D], tile)
    bt_s = gl.allocate_shared_memory(dtype, [1, 64, D], tile)
    q_s = gl.allocate_shared_memory(dtype, [2, 64, D], tile)
    k_s = gl.allocate_shared_memory(dtype, [2, 64, D], tile)
    g_s = gl.allocate_shared_memory(dtype, [2, 64, D], tile)
    v_s = gl.allocate_shared_memory(dtype, [2, 64, D], tile)
    db_s = gl.allocate_shared_memory(dtype, [1, KE, D], few)
    om_s = gl.allocate_shared_memory(dtype, [1, KE, D], few)
    dmk_s = gl.allocate_shared_memory(dtype, [1, KE, D], few)
    dmq_s = gl.allocate_shared_memory(dtype, [1, KE, D], few)
    at_c = fr[:, None] * D + dim
    _copy(kt_s.index(0), k_tilde + at_c, mask=(fr < cells)[:, None])
    _copy(bt_s.index(0), beta + at_c, mask=(fr < cells)[:, None])
    first = chunk * PER_PROGRAM
    last = gl.minimum(first + PER_PROGRAM, n_win)
    n0, inside = _window_start(first, n_wx, H, W, fy, fx, WH, WW, EDGE)
    inside = inside[:, None]
    _copy(q_s.index(0), q + ((fn_0 * sqn + dim) + n0 * sqn), mask=inside)
    _copy(k_s.index(0), k + ((fn_0 * skn + dim) + n0 * skn), mask=inside)
    _copy(g_s.index(0), grad + ((fn_0 * sgn + dim) + n0 * sgn), mask=inside)
    _copy(v_s.index(0), v + ((fn_0 * svn + dim) + n0 * svn), mask=inside)
    async_copy.commit_group()
    _, valid = _window_start(first, n_wx, H, W, ry, rx, WH, WW, EDGE)
    lse_next = gl.load(lse + (n0 + n_0), mask=valid, other=float('inf'))
    delta_next = gl.load(delta + (n0 + n_0), mask=valid, other=0.0)
    _, valid = _window_start(first, n_wx, H, W, ty, tx, WH, WW, EDGE)
    xi_next = gl.load(xi + (n0 + tn_0), mask=valid, other=0.0)
    dlog_xi_next = gl.load(dlog_xi + (n0 + tn_0), mask=valid, other=0.0)

    for win in range(first, last):
        zero = win >> 30  # see forward_windows_gluon
        fn = fn_0 + zero
        n, tn = n_0 + zero, tn_0 + zero
        now = (win - first) % 2
        y0, x0 = (win // n_wx) * WH, (win % n_wx) * WW
        cy0, cx0 = y0 // CH, x0 // CW
        n0, inside = _window_start(win, n_wx, H, W, fy, fx, WH, WW, EDGE)
        inside = inside[:, None]
        async_copy.wait_group(0)
        # This window's cells, wanted later, and then the next window, wanted in the next turn.
        at_e = ((ey * n_cx + ex)[:, None] + zero) * D + dim
        at_e += (cy0 * n_cx + cx0) * D
        e_valid = ((ey < NCY) & (cy0 + ey < n_cy) & (cx0 + ex < n_cx))[:, None]
        _copy(db_s.index(0), dbeta + at_e, mask=e_valid)
        _copy(om_s.index(0), omega + at_e, mask=e_valid)
        _copy(dmk_s.index(0), dmean_k + at_e, mask=e_valid)
        _copy(dmq_s.index(0), dmean_q + at_e, mask=e_valid)
        async_copy.commit_group()
        m0, coming = _window_start(win + 1, n_wx, H, W, fy, fx, WH, WW, EDGE)
        coming = (coming & (win + 1 < last))[:, None]
        if PER_PROGRAM > 1:  # see forward_windows_gluon
            _copy(q_s.index(1 - now), q + ((fn * sqn + dim) + m0 * sqn), mask=coming)
            _copy(k_s.index(1 - now), k + ((fn * skn + dim) + m0 * skn), mask=coming)
            _copy(g_s.index(1 - now), grad + ((fn * sgn + dim) + m0 * sgn), mask=coming)
            _copy(v_s.index(1 - now), v + ((fn * svn + dim) + m0 * svn), mask=coming)
        async_copy.commit_group()
        # The window's vectors came in the turn before, the next one's are asked for now.
        lse_i, delta_i, w, dl = lse_next, delta_next * scale, xi_next, dlog_xi_next * scale
        _, valid = _window_start(win + 1, n_wx, H, W, ry, rx, WH, WW, EDGE)
        valid = valid & (win + 1 < last)
        lse_next = gl.load(lse + (m0 + n), mask=valid, other=float('inf'))
        delta_next = gl.load(delta + (m0 + n), mask=valid, other=0.0)
        _, valid = _window_start(win + 1, n_wx, H, W, ty, tx, WH, WW, EDGE)
        valid = valid & (win + 1 < last)
        xi_next = gl.load(xi + (m0 + tn), mask=valid, other=0.0)
        dlog_xi_next = gl.load(dlog_xi + (m0 + tn), mask=valid, other=0.0)
        q_i, k_i, g_i, v_i = q_s.index(now + zero), k_s.index(now + zero), g_s.index(now + zero), v_s.index(now + zero)

        # Keys of the window. The scale of q·kᵀ is in ds, so in dq and dk, and until the end in the bias's gradient.
        fence_async_shared()
        if BIAS:
            s = _bias_fragments(bias, mma)
        else:
            s = gl.zeros([64, 64], gl.float32, layout=mma)
        s = warpgroup_mma(q_i, k_i.permute((1, 0)), s, is_async=True)
        dp = warpgroup_mma(g_i, v_i.permute((1, 0)), zeros_64, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(1, deps=[s])
        if EDGE or not BIAS:
            j = gl.arange(0, 64, layout=col)
            _, seen = _window_start(win, n_wx, H, W, j // WW, j % WW, WH, WW, EDGE)
            s = gl.where(seen[None, :], s, float('-inf'))
        p = gl.exp2(s * qk_scale - lse_i[:, None])
        p_s = gl.allocate_shared_memory(dtype, [64, 64], square, p.to(dtype))
        dp = warpgroup_mma_wait(0, deps=[dp])
        ds = p * (dp * scale - delta_i[:, None])
        ds_s = gl.allocate_shared_memory(dtype, [64, 64], square, ds.to(dtype))
        fence_async_shared()
        mine = ((y0 + ay) // CH - cy0) * NCX + (x0 + ax) // CW - cx0
        member = gl.where(gl.where(ay < WH, mine, -1)[:, None] == ac, 1.0, 0.0).to(dtype)
        async_copy.wait_group(1)  # the cells are here; the next window may be under way
        fence_async_shared()

        # One sum is finished and written before the next begins: registers are scarce.
        acc = warpgroup_mma(member, db_s.index(zero), zeros, use_acc=False)
        acc = acc * w[:, None]
        acc = warpgroup_mma(p_s.permute((1, 0)), g_i, acc)
        gl.store(dv + ((fn * sdn + dim) + n0 * sdn), gl.convert_layout(acc.to(dtype), flat), mask=inside)

        # By log ξ = s^½ k·ω - ½ s ‖k‖² and by the mean.
        acc = warpgroup_mma(member, om_s.index(zero), zeros, use_acc=False)
        acc = (acc - k_i.load(thin).to(gl.float32)) * dl[:, None]
        acc = warpgroup_mma(member, dmk_s.index(zero), acc, is_async=True)
        acc = warpgroup_mma(ds_s.permute((1, 0)), q_i, acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        gl.store(dk + ((fn * sdn + dim) + n0 * sdn), gl.convert_layout(acc.to(dtype), flat), mask=inside)

        # No logit passes the log-sum-exp but those of cells that are none, whose k̃ is 0.
        s = warpgroup_mma(q_i, kt_s.index(zero).permute((1, 0)), zeros_64, use_acc=False, is_async=True)
        dp = warpgroup_mma(g_i, bt_s.index(zero).permute((1, 0)), zeros_64, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(1, deps=[s])
        p = gl.exp2(gl.minimum(s * qk_scale - lse_i[:, None], 0.0))
        dp = warpgroup_mma_wait(0, deps=[dp])
        ds = p * (dp * scale - delta_i[:, None])
        acc = warpgroup_mma(ds_s, k_i, zeros, use_acc=False, is_async=True)
        acc = warpgroup_mma(member, dmq_s.index(zero), acc, is_async=True)
        ds = gl.convert_layout(ds.to(dtype), dot_a, assert_trivial=True)
        acc = warpgroup_mma(ds, kt_s.index(zero), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        if BIAS:
            # Late, and read back: a sum of the registers above is put off to the end of the loop by the assembler,
            # which then keeps p and dp, 64 registers of a thread, until there.
            sum_bias += ds_s.load(mma).to(gl.float32)
        gl.store(dq + ((fn * sdn + dim) + n0 * sdn), gl.convert_layout(acc.to(dtype), flat), mask=inside)
    async_copy.wait_group(0)
    if BIAS:
        at = r[:, None] * 64 + gl.arange(0, 64, layout=col)[None, :]
        gl.store(dbias + at, sum_bias / scale)
