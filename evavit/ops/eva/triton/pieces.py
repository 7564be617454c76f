"""What the kernels of forward.py and backward.py share, and the kernels that lay out the table of biases.

The legend of each kernel is its signature: behind an argument stand its shape, its dtype and the kernel that writes it;
`writes` marks what this kernel writes itself. "dtype" is that of q. Tensors are contiguous unless strides are passed.
In all signatures

    B, heads, H, W, N   images, heads, rows and columns of the grid, tokens of the grid (N = H · W)
    P                   prefix tokens; q, k, v and grad begin at the first token of the grid, unless a kernel says else
    D, BD               channels of a head, and columns of its tile: the next power of 2, at least 16
    cells, cells_total  cells of an image (C_p), and B · heads · cells
    rows, rows_total    keys that all windows share, cells + P: first the cells' k̃ and β, then the prefix tokens' k and
                        v; and B · heads · rows
    n_cx, ch, cw        cells side by side, and height and width of a cell in tokens; CH, CW where they are constants
    n_win, n_wx         windows of an image, and windows side by side
    WH, WW, SIDE        height and width of a window in tokens; window_size, which a small grid cuts to WH × WW
    BM, NT              rows of a tile of tokens, and tiles of a window; S = NT · BM
    BC, NC              rows of a tile of shared keys, and tiles that hold all of them; NC = 0 without any
    sqb, sqh, sqn, sqd  strides of q over images, heads, tokens and channels, in elements; sk. of k, sv. of v, sg. of
                        grad, sd. of dq, dk and dv; sob of out over images
    scale, scale_half   the softmax scale s, and s^½
    PREC                how float32 tiles are multiplied: 'ieee' or 'tf32'
    COUNT               how often a cell counts: 0 for once, and log_count is None; 1 for log_count with one row for all
                        windows; 2 for a row for each window

and in the code `n`, `y`, `x` and `c` are numbers of tokens, rows, columns and cells, `valid` says which of them exist,
and `pair` is image · heads + head. Logits and log-sum-exps are in units of log 2: every exponential is a power of 2.
"""

import math

import triton
import triton.language as tl

LN2 = math.log(2)
LOG2E = tl.constexpr(1 / LN2)


@triton.jit
def load_rows(base, row, valid, stride_row, stride_dim, D: tl.constexpr, BD: tl.constexpr):
    """Rows `(R)` of a `(.., D)` tensor as a tile `(R, BD)`, zero where `valid` is false and beyond D."""
    dim = tl.arange(0, BD)
    mask = valid[:, None] if D == BD else valid[:, None] & (dim < D)[None, :]
    return tl.load(base + (row[:, None] * stride_row + dim[None, :] * stride_dim), mask=mask, other=0.0)


@triton.jit
def store_rows(base, row, valid, stride_row, stride_dim, x, D: tl.constexpr, BD: tl.constexpr):
    """The inverse of `load_rows`: a tile x `(R, BD)` into the valid rows of a tensor of any dtype."""
    dim = tl.arange(0, BD)
    mask = valid[:, None] if D == BD else valid[:, None] & (dim < D)[None, :]
    tl.store(base + (row[:, None] * stride_row + dim[None, :] * stride_dim), x.to(base.dtype.element_ty), mask=mask)


@triton.jit
def split_program(heads, parts):
    """The head, the part of an image and the image (int64) of a program; on axis 0 heads change fastest."""
    program = tl.program_id(0)
    return program % heads, (program // heads) % parts, (program // (heads * parts)).to(tl.int64)


@triton.jit
def window_rows(
    win, tile,  # number of a window of the image, and of a tile in it
    H, W, n_wx, n_cx,
    WH: tl.constexpr, WW: tl.constexpr, CH: tl.constexpr, CW: tl.constexpr,
    LOCAL: tl.constexpr,  # whether there are windows; without them, the tiles of the grid in raster order
    BM: tl.constexpr,
):  # fmt: skip
    """Tokens, their cells and which are real, `(BM)` each, of one tile of a window."""
    r = tile * BM + tl.arange(0, BM)
    if LOCAL:
        y, x = (win // n_wx) * WH + r // WW, (win % n_wx) * WW + r % WW
        n, valid = y * W + x, (r < WH * WW) & (y < H) & (x < W)
    else:
        n = win * BM + r
        y, x, valid = n // W, n % W, n < H * W
    return n, (y // CH) * n_cx + x // CW, valid


@triton.jit
def window_start(win, n_wx, W, H, ry, rx, WH: tl.constexpr, WW: tl.constexpr, EDGE: tl.constexpr):
    """The first token of a window, and which of its places (ry, rx) hold a token. EDGE: windows overhang the grid."""
    y0, x0 = (win // n_wx) * WH, (win % n_wx) * WW
    valid = ry < WH
    if EDGE:
        valid = valid & (y0 + ry < H) & (x0 + rx < W)
    return y0.to(tl.int64) * W + x0, valid


@triton.jit
def bias_tile(bias, i, j, BM: tl.constexpr, NT: tl.constexpr):
    """Pointers to the tile (i, j) of one head's padded bias `(S, S)`."""
    r = tl.arange(0, BM)
    return bias + (i * BM + r)[:, None] * (NT * BM) + (j * BM + r)[None, :]


@triton.jit
def split_bias(bias, dtype: tl.constexpr, BM: tl.constexpr):
    """A padded bias `(BM, BM)`, in units of q·kᵀ, as the sum high + low of two bfloat16 matrices, and the unit matrix.

    unit · high + unit · low adds the bias to q·kᵀ. Operands of products wait in shared memory; a float32 bias would
    wait in registers, of which the kernel has too few. For float32 tokens all three are float32, and low is zero.
    """
    r = tl.arange(0, BM)
    x = tl.load(bias_tile(bias, 0, 0, BM, 1))
    kind: tl.constexpr = tl.float32 if dtype == tl.float32 else tl.bfloat16
    high = x.to(kind)
    return high, (x - high.to(tl.float32)).to(kind), (r[:, None] == r[None, :]).to(kind)


@triton.jit
def _bias_at(table, i, j, mask, SIDE: tl.constexpr, WW: tl.constexpr):
    """The bias of queries i and keys j of a window with rows of WW. Axis 2 of the programs is the head."""
    head = tl.program_id(2)
    place = (i // WW - j // WW + SIDE - 1) * (2 * SIDE - 1) + i % WW - j % WW + SIDE - 1
    offset = place * tl.num_programs(2) + head
    return tl.load(table + offset, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def pad_bias(
    table,  # ((2 SIDE - 1)², heads), any float dtype; rel_pos_bias
    padded,  # writes (heads, S, S) float32
    unit,  # what the bias is divided by: s for units of q·kᵀ, log 2 for units of log 2
    S,
    SIDE: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr,
    TILE: tl.constexpr,  # rows and columns of a program
):  # fmt: skip
    """The bias between the places of a window, zero where there is none. Programs: (S / TILE, S / TILE, heads)."""
    i = (tl.program_id(0) * TILE + tl.arange(0, TILE))[:, None]
    j = (tl.program_id(1) * TILE + tl.arange(0, TILE))[None, :]
    x = _bias_at(table, i, j, (i < WH * WW) & (j < WH * WW), SIDE, WW) / unit
    tl.store(padded + tl.program_id(2) * S * S + i * S + j, x)


@triton.jit
def pad_bias_fragments(
    table,  # ((2 SIDE - 1)², heads), any float dtype; rel_pos_bias
    padded,  # writes (heads, 4096) float32
    unit,  # what the bias is divided by: s
    SIDE: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr,
):  # fmt: skip
    """`pad_bias` for windows of one tile of 64 and the kernels in Gluon. Programs: (16, 1, heads).

    The order is the one in which the 128 threads of a warp group hold a product `(64, 64)`: eighths of the columns,
    threads, 4 values of a thread. Keys that do not exist get a bias that no logit outweighs.
    """
    m = tl.program_id(0) * 256 + tl.arange(0, 256)
    i = (m >> 7 & 3) * 16 + (m >> 1 & 1) * 8 + (m >> 4 & 7)
    j = (m >> 9) * 8 + (m >> 2 & 3) * 2 + (m & 1)
    key = j < WH * WW
    x = _bias_at(table, i, j, key & (i < WH * WW), SIDE, WW) / unit
    tl.store(padded + tl.program_id(2) * 4096 + m, tl.where(key, x, -(2.0**100)))


@triton.jit
def table_grad(
    dbias,  # (heads, S, S) float32; backward_tokens or backward_tokens_gluon, its parts summed by sum_parts
    dtable,  # writes ((2 SIDE - 1)², heads) float32
    S, heads,
    SIDE: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr,
    E: tl.constexpr, I: tl.constexpr,  # entries of a program, and queries added at a time
):  # fmt: skip
    """The gradient of the table of biases. Programs: (tiles of entries, heads).

    An entry belongs to a difference of places. Its gradient is the sum over all pairs of places of a window with that
    difference, always added in the same order.
    """
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
def log_counts(
    log_count,  # writes (programs of axis 0, columns) float32
    unit,  # what the logarithms are divided by: s for units of q·kᵀ, log 2 for units of log 2
    H, W, n_wx, n_cx, cells, rows, ch, cw,
    WH: tl.constexpr, WW: tl.constexpr,
    BC: tl.constexpr,
    COUNT: tl.constexpr,  # 1 or 2
):  # fmt: skip
    """log of the tokens of each cell, less those in the window if COUNT is 2; 0 for prefix tokens; -inf for cells
    without such a token and beyond the last key. Programs: (rows of log_count, tiles of BC columns)."""
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    y0, x0 = (c // n_cx) * ch, (c % n_cx) * cw
    y1, x1 = tl.minimum(y0 + ch, H), tl.minimum(x0 + cw, W)
    count = (y1 - y0) * (x1 - x0)
    if COUNT == 2:
        wy, wx = (tl.program_id(0) // n_wx) * WH, (tl.program_id(0) % n_wx) * WW
        dy = tl.minimum(y1, wy + WH) - tl.maximum(y0, wy)
        dx = tl.minimum(x1, wx + WW) - tl.maximum(x0, wx)
        count -= tl.maximum(dy, 0) * tl.maximum(dx, 0)
    count = tl.where(c < cells, count, tl.where(c < rows, 1, 0))
    x = tl.where(count > 0, tl.log(tl.maximum(count, 1).to(tl.float32)) / unit, float('-inf'))
    tl.store(log_count + tl.program_id(0) * tl.num_programs(1) * BC + c, x)


@triton.jit
def count_tile(log_count, win, c, columns, COUNT: tl.constexpr):
    """Pointers to what is added to the logits of shared keys c in windows `win`, from `log_counts`."""
    if COUNT == 2:
        log_count += win * columns
    return log_count + c


@triton.jit
def cell_tokens(y0, x0, cell_valid, t0, H, W, ch, cw, T: tl.constexpr):
    """Numbers of the T tokens from t0 on of cells whose corners are y0, x0 `(G)`, and which exist: `(G, T)` each."""
    t = t0 + tl.arange(0, T)
    y = y0[:, None] + (t // cw)[None, :]
    x = x0[:, None] + (t % cw)[None, :]
    valid = cell_valid[:, None] & (t < ch * cw)[None, :] & (y < H) & (x < W)
    return y * W + x, valid


@triton.jit
def load_cells(base, n, valid, stride_row, stride_dim, D: tl.constexpr, BD: tl.constexpr):
    """Tokens n `(G, T)` as a float32 tile `(G, T, BD)`."""
    dim = tl.arange(0, BD)
    mask = valid[:, :, None] if D == BD else valid[:, :, None] & (dim < D)[None, None, :]
    ptr = base + n[:, :, None] * stride_row + dim[None, None, :] * stride_dim
    return tl.load(ptr, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def log_weights(k, omega, valid, scale_half):
    """log ξ = s^½ k·ω - ½ s ‖k‖² = s^½ k·(ω - ½ s^½ k) of keys k `(G, T, BD)` of cells with ω `(G, BD)`; -inf for keys
    that do not exist."""
    log_xi = scale_half * tl.sum(k * (omega[:, None, :] - 0.5 * scale_half * k), 2)
    return tl.where(valid, log_xi, float('-inf'))


@triton.jit
def next_weights(log_xi, top):
    """One step of a softmax over the tokens of cells: the new maxima `(G)`, the factors `(G)` that scale old sums, and
    the weights `(G, T)` of these tokens, not yet divided by their total."""
    new_top = tl.maximum(top, tl.max(log_xi, 1))
    # A short cell may have none of these tokens, and a cell past the last has none at all.
    safe = tl.where(new_top == float('-inf'), 0.0, new_top)
    return new_top, tl.exp2((top - safe) * LOG2E), tl.exp2((log_xi - safe[:, None]) * LOG2E)


@triton.jit
def load_weight(weight, D: tl.constexpr, BD: tl.constexpr):
    """W of (26), `(out, in)`, as a float32 tile `(BD, BD)`."""
    dim = tl.arange(0, BD)
    return load_rows(weight, dim, dim < D, D, 1, D, BD).to(tl.float32)


@triton.jit
def normalise(z, eps, D: tl.constexpr, BD: tl.constexpr):
    """LayerNorm of z `(R, BD)` over its D real columns, without weight and bias; and 1/σ `(R)`."""
    inside = (tl.arange(0, BD) < D)[None, :]
    centred = tl.where(inside, z - tl.sum(z, 1)[:, None] / D, 0.0)
    inv = 1.0 / tl.sqrt_rn(tl.sum(centred * centred, 1) / D + eps)
    return centred * inv[:, None], inv


@triton.jit
def summarise(mean, weight, bias, norm_weight, norm_bias, eps, D: tl.constexpr, BD: tl.constexpr, PREC: tl.constexpr):
    """LN(W mean + b) of (26) for means `(R, BD)` in float32: q̃ or k̃."""
    dim = tl.arange(0, BD)
    w = load_weight(weight, D, BD)
    b = tl.load(bias + dim, mask=dim < D, other=0.0).to(tl.float32)
    z_hat, _ = normalise(tl.dot(mean, tl.trans(w), input_precision=PREC) + b[None, :], eps, D, BD)
    g = tl.load(norm_weight + dim, mask=dim < D, other=0.0).to(tl.float32)
    o = tl.load(norm_bias + dim, mask=dim < D, other=0.0).to(tl.float32)
    return z_hat * g[None, :] + o[None, :]
