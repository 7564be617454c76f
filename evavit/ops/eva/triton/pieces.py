"""Pieces of kernels. n, y, x, c are the numbers of tokens, rows, columns and cells; `valid` says which are real."""

import math

import triton
import triton.language as tl

LN2 = math.log(2)
LOG2E = tl.constexpr(1 / LN2)  # the kernels' exponentials are powers of 2


@triton.jit
def load_rows(base, row, valid, stride_row, stride_dim, D: tl.constexpr, BD: tl.constexpr):
    """Rows `(R)` of a `(.., D)` tensor as a tile `(R, BD)`; zero where there is no row or no column."""
    dim = tl.arange(0, BD)
    mask = valid[:, None] if D == BD else valid[:, None] & (dim < D)[None, :]
    return tl.load(base + (row[:, None] * stride_row + dim[None, :] * stride_dim), mask=mask, other=0.0)


@triton.jit
def store_rows(base, row, valid, stride_row, stride_dim, x, D: tl.constexpr, BD: tl.constexpr):
    dim = tl.arange(0, BD)
    mask = valid[:, None] if D == BD else valid[:, None] & (dim < D)[None, :]
    tl.store(base + (row[:, None] * stride_row + dim[None, :] * stride_dim), x.to(base.dtype.element_ty), mask=mask)


@triton.jit
def window_rows(
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
def bias_tile(bias, i, j, BM: tl.constexpr, NT: tl.constexpr):
    """Pointers to the tile (i, j) of a padded bias `(NT · BM, NT · BM)`."""
    r = tl.arange(0, BM)
    return bias + (i * BM + r)[:, None] * (NT * BM) + (j * BM + r)[None, :]


@triton.jit
def window_start(win, n_wx, W, H, ry, rx, WH: tl.constexpr, WW: tl.constexpr, EDGE: tl.constexpr):
    """The first token of a window, and which of its places (ry, rx) hold a token."""
    y0, x0 = (win // n_wx) * WH, (win % n_wx) * WW
    valid = ry < WH
    if EDGE:
        valid = valid & (y0 + ry < H) & (x0 + rx < W)
    return y0.to(tl.int64) * W + x0, valid


@triton.jit
def split_bias(bias, dtype: tl.constexpr, BM: tl.constexpr):
    """A padded bias, in units of q·kᵀ, as two half-precision matrices high + low, and the unit matrix that brings them
    into a sum of products: they wait in shared memory, where float32 would take registers that the kernel lacks."""
    r = tl.arange(0, BM)
    x = tl.load(bias_tile(bias, 0, 0, BM, 1))
    kind: tl.constexpr = tl.float32 if dtype == tl.float32 else tl.bfloat16
    high = x.to(kind)
    return high, (x - high.to(tl.float32)).to(kind), (r[:, None] == r[None, :]).to(kind)


@triton.jit
def _bias_at(table, i, j, mask, SIDE: tl.constexpr, WW: tl.constexpr):
    """The bias of queries i and keys j of a window with rows of WW, for one head: the program's axis 2. The table is
    `(differences of places, heads)`."""
    place = (i // WW - j // WW + SIDE - 1) * (2 * SIDE - 1) + i % WW - j % WW + SIDE - 1
    return tl.load(table + place * tl.num_programs(2) + tl.program_id(2), mask=mask, other=0.0).to(tl.float32)


@triton.jit
def pad_bias(
    bias,
    padded,
    unit,
    S,
    SIDE: tl.constexpr,
    WH: tl.constexpr,
    WW: tl.constexpr,
    TILE: tl.constexpr,
):
    """The bias of a window of WH × WW in a unit, padded with zeros to `(S, S)`."""
    i = (tl.program_id(0) * TILE + tl.arange(0, TILE))[:, None]
    j = (tl.program_id(1) * TILE + tl.arange(0, TILE))[None, :]
    x = _bias_at(bias, i, j, (i < WH * WW) & (j < WH * WW), SIDE, WW) / unit
    tl.store(padded + tl.program_id(2) * S * S + i * S + j, x)


@triton.jit
def pad_bias_fragments(bias, padded, unit, SIDE: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr):
    """`pad_bias` for one tile of 64, in the order in which the 128 threads of a warp group hold a tile of products: 4
    values of a thread, threads, eighths of the columns. Keys that are none get what no logit outweighs."""
    m = tl.program_id(0) * 256 + tl.arange(0, 256)
    i = (m >> 7 & 3) * 16 + (m >> 1 & 1) * 8 + (m >> 4 & 7)
    j = (m >> 9) * 8 + (m >> 2 & 3) * 2 + (m & 1)
    key = j < WH * WW
    x = _bias_at(bias, i, j, key & (i < WH * WW), SIDE, WW) / unit
    tl.store(padded + tl.program_id(2) * 4096 + m, tl.where(key, x, -(2.0**100)))


@triton.jit
def table_grad(
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
def cell_tokens(y0, x0, cell_valid, t0, H, W, ch, cw, T: tl.constexpr):
    """Token numbers and validity `(G, T)` of the tokens t0.. of cells whose corners are y0, x0 `(G)`."""
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
def load_weight(weight, D: tl.constexpr, BD: tl.constexpr):
    """W of (26), `(out, in)`."""
    dim = tl.arange(0, BD)
    return load_rows(weight, dim, dim < D, D, 1, D, BD).to(tl.float32)


@triton.jit
def normalise(z, eps, D: tl.constexpr, BD: tl.constexpr):
    """LayerNorm without its affine part, and 1/σ, over the D real columns."""
    inside = (tl.arange(0, BD) < D)[None, :]
    centred = tl.where(inside, z - tl.sum(z, 1)[:, None] / D, 0.0)
    inv = 1.0 / tl.sqrt_rn(tl.sum(centred * centred, 1) / D + eps)
    return centred * inv[:, None], inv


@triton.jit
def summarise(mean, weight, bias, norm_weight, norm_bias, eps, D: tl.constexpr, BD: tl.constexpr, PREC: tl.constexpr):
    """σ of (26)."""
    dim = tl.arange(0, BD)
    w = load_weight(weight, D, BD)
    b = tl.load(bias + dim, mask=dim < D, other=0.0).to(tl.float32)
    z_hat, _ = normalise(tl.dot(mean, tl.trans(w), input_precision=PREC) + b[None, :], eps, D, BD)
    g = tl.load(norm_weight + dim, mask=dim < D, other=0.0).to(tl.float32)
    o = tl.load(norm_bias + dim, mask=dim < D, other=0.0).to(tl.float32)
    return z_hat * g[None, :] + o[None, :]
