"""Three of EVA's kernels in Gluon, for Hopper and the usual windows and cells: the same arithmetic in less time.

In Triton the compiler decides where a tile is kept and when its copy is waited for. Its assembly showed what that costs
here. What Triton calls a pipeline waits for the copies of a window right after it has issued them: a latency of DRAM
for each window, and one more for a gather. And it keeps in registers what a loop does not change (64-bit pointers,
descriptors of shared memory, the bias), until those that do change spill. In Gluon the code decides both. These kernels

* copy the next window's tokens into a second buffer while they work on this window, and wait where they need them;
* read the operands of products from shared memory, or from registers that hold them anyway;
* start the accumulator of q·kᵀ from the bias, whose padded copy is in the order of the accumulator's registers: this
  adds the bias exactly, and masks the keys that do not exist;
* compute what reaches a token through its cell as a product with the 0/1 matrix of the few cells that meet a window,
  where a gather would load a row for each token;
* add a zero that the compiler cannot see through (`zero`) to what it would otherwise keep in registers.

A tile of 64 rows holds a window, another one the cells and prefix tokens; both have the head's D = 32 or 64 columns.
`Plan.gluon` in triton/plan.py checks which tensors these kernels take. triton/pieces.py says how to read the
signatures; here all tensors are contiguous in their channels, which have no strides.

Shared memory: all threads see a copy after `wait_group` and the barrier that Triton puts behind it. Products read
shared memory by another path, the async proxy, so a fence stands between them and what threads or copies have written.
A buffer is written again only after the wait at the top of the loop: by then every warp has waited for the products
that read it.
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
# Triton 3.6 and 3.9 have it by different names.
_copy = getattr(async_copy, 'async_load', None) or async_copy.async_copy_global_to_shared


@gluon.jit
def _window_start(win, n_wx, H, W, y, x, WH: gl.constexpr, WW: gl.constexpr, EDGE: gl.constexpr):
    """The first token of a window, and which of its places (y, x) hold a token. EDGE: windows overhang the grid."""
    y0, x0 = (win // n_wx) * WH, (win % n_wx) * WW
    valid = y < WH
    if EDGE:
        valid = valid & (y0 + y < H) & (x0 + x < W)
    return y0 * W + x0, valid


@gluon.jit
def _bias_fragments(bias, mma: gl.constexpr):
    """One head's bias from `pad_bias_fragments` as an accumulator (64, 64). Each thread loads its own values, four at a
    time."""
    four: gl.constexpr = gl.BlockedLayout([1, 4], [32, 1], [4, 1], [1, 0])
    i = gl.arange(0, 1024, layout=gl.SliceLayout(1, four))
    j = gl.arange(0, 4, layout=gl.SliceLayout(0, four))
    x = gl.load(bias + (i[:, None] * 4 + j[None, :]))
    x = gl.permute(gl.reshape(x, (8, 4, 8, 4, 2, 2)), (1, 4, 2, 0, 3, 5))
    return gl.convert_layout(gl.reshape(x, (64, 64)), mma, assert_trivial=True)


@gluon.jit
def _count_tile(log_count, win, c, COUNT: gl.constexpr):
    """Pointers to what is added to the logits of shared keys c in windows `win`, from `log_counts`."""
    if COUNT == 2:
        log_count += win * 64
    return log_count + c


@gluon.jit
def forward_windows_gluon(
    q, k, v,  # (B, heads, N, D), dtype; the caller
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn,
    k_tilde, beta,  # (B, heads, rows, D), dtype; forward_cells and forward_prefix
    bias,  # if BIAS: (heads, 4096) float32 in units of q·kᵀ; pad_bias_fragments
    log_count,  # if COUNT: (1 or n_win, 64) float32 in units of q·kᵀ; log_counts
    out, sob,  # writes y, an image (N, heads, D) in memory, dtype
    lse,  # if SAVE: writes the log-sum-exp of a token's logits (B, heads, N) float32
    heads, H, W, n_wx, n_win, rows,
    chunks,  # programs that share the windows of an (image, head)
    scale,
    D: gl.constexpr, WH: gl.constexpr, WW: gl.constexpr,
    PER_PROGRAM: gl.constexpr,  # windows of a program
    EDGE: gl.constexpr,  # whether windows overhang the grid
    BIAS: gl.constexpr, COUNT: gl.constexpr,
    SAVE: gl.constexpr,  # whether there will be a backward
):  # fmt: skip
    """(16), as `forward_windows`. Programs: (B · chunks · heads)."""
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
    out += image * sob + head * D
    lse += pair * H * W
    k_tilde += pair * rows * D
    beta += pair * rows * D
    bias += head * (64 * 64)
    qk_scale = scale * LOG2E

    # The places of a window: as rows of an accumulator (r, y, x), and as rows of a copy (fr, fy, fx).
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
    _copy(kt_s.index(0), k_tilde + at_c, mask=(fr < rows)[:, None])
    _copy(bt_s.index(0), beta + at_c, mask=(fr < rows)[:, None])
    first = chunk * PER_PROGRAM
    last = gl.minimum(first + PER_PROGRAM, n_win)
    n0, inside = _window_start(first, n_wx, H, W, fy, fx, WH, WW, EDGE)
    inside = inside[:, None]
    _copy(q_s.index(0), q + ((fn_0 * sqn + dim) + n0 * sqn), mask=inside)
    _copy(k_s.index(0), k + ((fn_0 * skn + dim) + n0 * skn), mask=inside)
    _copy(v_s.index(0), v + ((fn_0 * svn + dim) + n0 * svn), mask=inside)
    async_copy.commit_group()

    for win in range(first, last):
        # Always 0, which the compiler does not know. So it computes sums with it where they are used, in each turn of
        # the loop, and keeps none of them in registers.
        zero = win >> 30
        fn = fn_0 + zero
        now = (win - first) % 2
        async_copy.wait_group(0)
        m0, coming = _window_start(win + 1, n_wx, H, W, fy, fx, WH, WW, EDGE)
        coming = (coming & (win + 1 < last))[:, None]
        if PER_PROGRAM > 1:  # else nothing reads the second buffer, and its memory is in other use
            _copy(q_s.index(1 - now), q + ((fn * sqn + dim) + m0 * sqn), mask=coming)
            _copy(k_s.index(1 - now), k + ((fn * skn + dim) + m0 * skn), mask=coming)
            _copy(v_s.index(1 - now), v + ((fn * svn + dim) + m0 * svn), mask=coming)
        async_copy.commit_group()
        q_i, k_i, v_i = q_s.index(now + zero), k_s.index(now + zero), v_s.index(now + zero)

        if COUNT:  # early, since it waits for memory
            count = gl.load(_count_tile(log_count, win, j + zero, COUNT))
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
        if COUNT:  # -inf beyond the last key
            t += count[None, :]
        else:
            t = gl.where((j < rows)[None, :], t, float('-inf'))
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
        if SAVE:
            _, valid = _window_start(win, n_wx, H, W, y, x, WH, WW, EDGE)
            gl.store(lse + (n0 + n), top + gl.log2(total), mask=valid)
    async_copy.wait_group(0)


@gluon.jit
def backward_shared_gluon(
    q,  # (B, heads, N, D), dtype; the caller
    out, sob,  # y, an image (N, heads, D) in memory, dtype; forward_windows_gluon
    grad,  # dy (B, heads, N, D), dtype; autograd
    sqb, sqh, sqn, sgb, sgh, sgn,
    lse,  # (B, heads, N) float32; forward_windows_gluon
    delta,  # writes δ (B, heads, N) float32
    k_tilde, beta,  # (B, heads, rows, D), dtype; forward_cells and forward_prefix
    log_count,  # if COUNT: (1 or n_win, 64) float32 in units of q·kᵀ; log_counts
    dk_tilde_parts, dbeta_parts,  # writes (splits, B, heads, rows, D) float32
    heads, N, rows,
    splits, per_split,  # programs that share the tokens of an (image, head), and tokens of each
    rows_total, scale,
    W, n_wx,  # if COUNT is 2, else None
    D: gl.constexpr,
    WH: gl.constexpr, WW: gl.constexpr,  # if COUNT is 2
    T: gl.constexpr,  # tokens of a tile
    COUNT: gl.constexpr,
):  # fmt: skip
    """δ, and the part of dk̃ and dβ that comes through (16), as `backward_shared`. Programs: (B · splits · heads).

    Products are transposed, (keys, tokens): so the weights of a tile are operands of the next products as they are.
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
    out += image * sob + head * D
    lse += pair * N
    delta += pair * N
    k_tilde += pair * rows * D
    beta += pair * rows * D
    qk_scale = scale * LOG2E
    dim = gl.arange(0, D, layout=gl.SliceLayout(0, flat))[None, :]
    f_0 = gl.arange(0, T, layout=gl.SliceLayout(1, flat))
    j_0 = gl.arange(0, T, layout=col)
    fc = gl.arange(0, 64, layout=gl.SliceLayout(1, flat))
    cells_0 = gl.arange(0, 64, layout=gl.SliceLayout(1, mma))[:, None]

    kt_s = gl.allocate_shared_memory(dtype, [1, 64, D], cell_tile)
    bt_s = gl.allocate_shared_memory(dtype, [1, 64, D], cell_tile)
    q_s = gl.allocate_shared_memory(dtype, [2, T, D], tile)
    g_s = gl.allocate_shared_memory(dtype, [2, T, D], tile)
    at_c = fc[:, None] * D + dim
    _copy(kt_s.index(0), k_tilde + at_c, mask=(fc < rows)[:, None])
    _copy(bt_s.index(0), beta + at_c, mask=(fc < rows)[:, None])
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
        lse_n = gl.load(lse + j, mask=j < last, other=float('inf'))  # weights are 0 where there is no token
        if COUNT:
            win = j
            if COUNT == 2:
                real = gl.minimum(j, N - 1)
                win = (real // W // WH) * n_wx + real % W // WW
            count = gl.load(_count_tile(log_count, win[None, :], cells_0 + zero, COUNT))
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
        if COUNT:
            s += count
        p = gl.exp2(s * qk_scale - lse_n[None, :])
        dp = warpgroup_mma_wait(0, deps=[dp])
        acc_b = warpgroup_mma(gl.convert_layout(p.to(dtype), dot_a), g_i, acc_b, is_async=True)
        ds = p * (dp - d[None, :])
        acc_k = warpgroup_mma(gl.convert_layout(ds.to(dtype), dot_a), q_i, acc_k, is_async=True)
        acc_b, acc_k = warpgroup_mma_wait(0, deps=[acc_b, acc_k])
    async_copy.wait_group(0)
    c = gl.arange(0, 64, layout=gl.SliceLayout(1, wide))[:, None]
    at = (split.to(gl.int64) * rows_total + pair * rows + c) * D
    at = at + gl.arange(0, D, layout=gl.SliceLayout(0, wide))[None, :]
    gl.store(dk_tilde_parts + at, acc_k * scale, mask=c < rows)
    gl.store(dbeta_parts + at, acc_b, mask=c < rows)


@gluon.jit
def backward_tokens_gluon(
    q, k, v,  # (B, heads, N, D), dtype; the caller
    grad,  # dy (B, heads, N, D), dtype; autograd
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sgb, sgh, sgn,
    lse,  # (B, heads, N) float32; forward_windows_gluon
    delta,  # δ (B, heads, N) float32; backward_shared_gluon
    k_tilde, beta,  # (B, heads, rows, D), dtype; forward_cells and forward_prefix
    bias,  # if BIAS: (heads, 4096) float32 in units of q·kᵀ; pad_bias_fragments
    log_count,  # if COUNT: (1 or n_win, 64) float32 in units of q·kᵀ; log_counts
    omega_half,  # ω / s^½ (B, heads, cells, D), dtype; backward_weights
    dbeta,  # (B, heads, cells, D), dtype; backward_weights
    dmeans,  # (2, B, heads, cells, D), dtype; backward_summary
    xi, dlog_xi,  # (B, heads, N) float32; backward_weights
    dq, dk, dv,  # writes (B, heads, N, D), dtype
    sdb, sdh, sdn,
    dbias_parts,  # if BIAS: writes (B, chunks, heads, 64, 64) float32
    heads, H, W, n_wx, n_win, n_cx, cells, rows,
    chunks,  # programs that share the windows of an (image, head)
    cells_total, scale,
    D: gl.constexpr, WH: gl.constexpr, WW: gl.constexpr, CH: gl.constexpr, CW: gl.constexpr,
    KE: gl.constexpr,  # rows of a tile that holds the cells of a window
    NCX: gl.constexpr, NCY: gl.constexpr,  # columns and rows of cells that a window meets at most
    PER_PROGRAM: gl.constexpr,  # windows of a program
    EDGE: gl.constexpr,  # whether windows overhang the grid
    BIAS: gl.constexpr, COUNT: gl.constexpr,
):  # fmt: skip
    """dq, dk and dv, and the gradient of the bias, as `backward_tokens`. Programs: (B · chunks · heads)."""
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
    k_tilde += pair * rows * D
    beta += pair * rows * D
    omega_half += pair * cells * D
    dbeta += pair * cells * D
    dmean_q = dmeans + pair * cells * D
    dmean_k = dmean_q + cells_total * D
    bias += head * (64 * 64)
    dbias_parts += ((image * chunks + chunk) * heads + head) * (64 * 64)
    qk_scale = scale * LOG2E
    n_cy = cells // n_cx

    # The places of a window: as rows of products of 64 columns (r, ry, rx) and of D columns (ty, tx), as rows of a copy
    # (fr, fy, fx) and of an operand (ay, ax).
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
    _copy(kt_s.index(0), k_tilde + at_c, mask=(fr < rows)[:, None])
    _copy(bt_s.index(0), beta + at_c, mask=(fr < rows)[:, None])
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
        # Copies of this window's cells, for later in this turn, and of the next window, for the next turn.
        at_e = ((ey * n_cx + ex)[:, None] + zero) * D + dim
        at_e += (cy0 * n_cx + cx0) * D
        e_valid = ((ey < NCY) & (cy0 + ey < n_cy) & (cx0 + ex < n_cx))[:, None]
        _copy(db_s.index(0), dbeta + at_e, mask=e_valid)
        _copy(om_s.index(0), omega_half + at_e, mask=e_valid)
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
        # The vectors of this window were loaded in the last turn; now those of the next are.
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

        # Keys of the window. ds includes the scale s, as dq and dk need it; the bias's gradient is divided by it at the
        # end.
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

        # Each sum is written before the next begins, which saves registers.
        acc = warpgroup_mma(member, db_s.index(zero), zeros, use_acc=False)
        acc = acc * w[:, None]
        acc = warpgroup_mma(p_s.permute((1, 0)), g_i, acc)
        gl.store(dv + ((fn * sdn + dim) + n0 * sdn), gl.convert_layout(acc.to(dtype), flat), mask=inside)

        # dk: through log ξ = s^½ k·ω - ½ s ‖k‖², through the mean, and through the window's logits.
        acc = warpgroup_mma(member, om_s.index(zero), zeros, use_acc=False)
        acc = (acc - k_i.load(thin).to(gl.float32)) * dl[:, None]
        acc = warpgroup_mma(member, dmk_s.index(zero), acc, is_async=True)
        acc = warpgroup_mma(ds_s.permute((1, 0)), q_i, acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        gl.store(dk + ((fn * sdn + dim) + n0 * sdn), gl.convert_layout(acc.to(dtype), flat), mask=inside)

        # dq. A logit is never above the log-sum-exp, except for rows past the last key: their k̃ is 0 and so is their
        # logit.
        s = warpgroup_mma(q_i, kt_s.index(zero).permute((1, 0)), zeros_64, use_acc=False, is_async=True)
        dp = warpgroup_mma(g_i, bt_s.index(zero).permute((1, 0)), zeros_64, use_acc=False, is_async=True)
        if COUNT:
            j = gl.arange(0, 64, layout=col)
            count = gl.load(_count_tile(log_count, win, j + zero, COUNT))
        s = warpgroup_mma_wait(1, deps=[s])
        if COUNT:
            s += count[None, :]
        p = gl.exp2(gl.minimum(s * qk_scale - lse_i[:, None], 0.0))
        dp = warpgroup_mma_wait(0, deps=[dp])
        ds = p * (dp * scale - delta_i[:, None])
        acc = warpgroup_mma(ds_s, k_i, zeros, use_acc=False, is_async=True)
        acc = warpgroup_mma(member, dmq_s.index(zero), acc, is_async=True)
        ds = gl.convert_layout(ds.to(dtype), dot_a, assert_trivial=True)
        acc = warpgroup_mma(ds, kt_s.index(zero), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        if BIAS:
            # Read back from shared memory. Were it added above, from registers, the assembler would still put the sum
            # off until here, and would keep p and dp, 64 registers of each thread, that long.
            sum_bias += ds_s.load(mma).to(gl.float32)
        gl.store(dq + ((fn * sdn + dim) + n0 * sdn), gl.convert_layout(acc.to(dtype), flat), mask=inside)
    async_copy.wait_group(0)
    if BIAS:
        at = r[:, None] * 64 + gl.arange(0, 64, layout=col)[None, :]
        gl.store(dbias_parts + at, sum_bias / scale)
