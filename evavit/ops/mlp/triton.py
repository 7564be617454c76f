"""The MLP of a transformer's block as fused kernels in Triton, forward and backward, behind `evavit.ops.mlp_gelu`.

The hidden layer is four times as wide as the tokens, so its elementwise steps move most of the bytes. With D the bytes
of the tokens `(M, K)` and 4D those of the hidden layer `(M, N)`, the kernels move

    forward    g = gelu(x W₁ᵀ + b₁)              x in -> g                       5D, not 13D: z stays out of memory
    backward   z = x W₁ᵀ + b₁, again             x, dy in
               dz = (dy W₂)·gelu'(z), Σ dz       -> dz, partial sums             6D, not 21D: so do z and dg

The backward keeps x and g, where PyTorch's own steps would keep x and z. The other products of matrices are cuBLAS's:
y = g W₂ᵀ + b₂, dx = dz W₁, dW₁ = dzᵀ x, dW₂ = dyᵀ g.

Without gradients, and for few features of many tokens, one kernel computes y: its programs walk along the hidden layer,
and write no g either, so that 2D bytes move where two kernels move 10D.

Every sum runs in one fixed order, without atomics, so two runs agree to the bit. Products accumulate in float32.

The legend of each kernel is its signature: behind an argument stand its shape, its dtype and who writes it; `writes`
marks what the kernel writes itself. "dtype" is that of x, bfloat16 or float16. M, K, N and C are the tokens and the
features in, hidden and out; BM, BN, BK and BC the tile of each. Where a tile overhangs M it reads the last token again;
the other tiles divide their widths.
"""

import functools
from typing import Any, Dict, Optional, Tuple

import torch
import triton
import triton.language as tl

from evavit.ops.common.gelu import gelu, gelu_slope
from evavit.ops.common.launch import Launches, ceil_div, register_op, sum_parts

__all__ = ['mlp_fused']


@triton.jit
def _times_rows(
    x, weight,  # (.., K) with this stride of rows, (.., K)
    row, col, stride,
    K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """x[row] · weight[col]ᵀ, float32 `(BM, BN)`; STAGES steps of the loop are loaded ahead."""
    k = tl.arange(0, BK)
    x += row[:, None] * stride + k[None, :]
    weight += col[None, :] * K + k[:, None]
    acc = tl.zeros([BM, BN], tl.float32)
    for k0 in tl.range(0, K, BK, num_stages=STAGES):
        acc = tl.dot(tl.load(x + k0), tl.load(weight + k0), acc)
    return acc


@triton.jit
def _times_columns(
    x, weight,  # (.., K) with this stride of rows, (K, N)
    row, col, stride, N,
    K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """x[row] · weight[:, col], as `_times_rows`."""
    k = tl.arange(0, BK)
    x += row[:, None] * stride + k[None, :]
    weight += k[:, None] * N + col[None, :]
    acc = tl.zeros([BM, BN], tl.float32)
    for k0 in tl.range(0, K, BK, num_stages=STAGES):
        acc = tl.dot(tl.load(x + k0), tl.load(weight + k0 * N), acc)
    return acc


@triton.jit
def _forward_hidden(
    x,  # (M, K), dtype; the caller
    weight, bias,  # W₁ (N, K), dtype, and b₁ (N), any float dtype; the caller
    g,  # writes (M, N), dtype
    M, N,
    stride,  # of x's rows
    K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    STAGES: tl.constexpr,  # loads in flight
):  # fmt: skip
    """g = gelu(x W₁ᵀ + b₁). Programs: (tiles), those of the same rows together, which share x in the L2 cache."""
    tiles = N // BN
    first = (tl.program_id(0) // tiles).to(tl.int64) * BM
    row = tl.arange(0, BM)
    col = (tl.program_id(0) % tiles) * BN + tl.arange(0, BN)
    left = (M - first).to(tl.int32)
    z = _times_rows(x + first * stride, weight, tl.minimum(row, left - 1), col, stride, K, BM, BN, BK, STAGES)
    z += tl.load(bias + col).to(tl.float32)[None, :]
    out = g + first * N + row[:, None] * N + col[None, :]
    tl.store(out, gelu(z).to(g.dtype.element_ty), mask=(row < left)[:, None])


@triton.jit
def _forward_whole(
    x,  # (M, K), dtype; the caller
    weight1, bias1,  # W₁ (N, K), dtype, and b₁ (N), any float dtype; the caller
    weight2, bias2,  # W₂ (K, N), dtype, and b₂ (K), any float dtype; the caller
    y,  # writes (M, K), dtype
    M, stride,  # of x's rows
    N: tl.constexpr,
    K1: tl.constexpr, K2: tl.constexpr,  # K in two parts, each a power of 2, the second or 0
    BM: tl.constexpr, BN: tl.constexpr,
    STAGES: tl.constexpr,  # loads in flight
):  # fmt: skip
    """y = gelu(x W₁ᵀ + b₁) W₂ᵀ + b₂ of as many features out as in. Programs: (tiles of rows)."""
    K: tl.constexpr = K1 + K2
    first = tl.program_id(0).to(tl.int64) * BM
    row = tl.arange(0, BM)
    left = (M - first).to(tl.int32)
    of_x = x + first * stride + tl.minimum(row, left - 1)[:, None] * stride
    n, k1, k2 = tl.arange(0, BN), tl.arange(0, K1), K1 + tl.arange(0, K2 if K2 else 16)
    x1, acc1 = tl.load(of_x + k1[None, :]), tl.zeros([BM, K1], tl.float32)
    if K2:
        x2, acc2 = tl.load(of_x + k2[None, :]), tl.zeros([BM, K2], tl.float32)
    for n0 in tl.range(0, N, BN, num_stages=STAGES):
        of_1, of_2 = weight1 + (n0 + n)[None, :] * K, weight2 + (n0 + n)[:, None]
        z = tl.dot(x1, tl.load(of_1 + k1[:, None]))
        if K2:
            z = tl.dot(x2, tl.load(of_1 + k2[:, None]), z)
        g = gelu(z + tl.load(bias1 + n0 + n).to(tl.float32)[None, :]).to(x.dtype.element_ty)
        acc1 = tl.dot(g, tl.load(of_2 + k1[None, :] * N), acc1)
        if K2:
            acc2 = tl.dot(g, tl.load(of_2 + k2[None, :] * N), acc2)
    out, real = y + first * K + row[:, None] * K, (row < left)[:, None]
    acc1 += tl.load(bias2 + k1).to(tl.float32)[None, :]
    tl.store(out + k1[None, :], acc1.to(y.dtype.element_ty), mask=real)
    if K2:
        acc2 += tl.load(bias2 + k2).to(tl.float32)[None, :]
        tl.store(out + k2[None, :], acc2.to(y.dtype.element_ty), mask=real)


@triton.jit
def _backward_hidden(
    dy,  # (M, C), dtype; autograd
    x,  # (M, K), dtype; the caller
    weight1, bias1,  # W₁ (N, K), dtype, and b₁ (N), any float dtype; the caller
    weight2,  # W₂ (C, N), dtype; the caller
    dz,  # writes (M, N), dtype
    db_parts,  # writes (tiles of rows, N) float32: dz summed over the rows of a tile, for sum_parts
    M, N,
    stride_dy, stride_x,  # of rows
    K: tl.constexpr, C: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr,
    STAGES: tl.constexpr,  # loads in flight
):  # fmt: skip
    """dz = (dy W₂)·gelu'(x W₁ᵀ + b₁), and its sum over rows, which is db₁. Programs as in `_forward_hidden`."""
    tiles = N // BN
    m = tl.program_id(0) // tiles
    first = m.to(tl.int64) * BM
    row = tl.arange(0, BM)
    col = (tl.program_id(0) % tiles) * BN + tl.arange(0, BN)
    left = (M - first).to(tl.int32)
    near = tl.minimum(row, left - 1)
    z = _times_rows(x + first * stride_x, weight1, near, col, stride_x, K, BM, BN, BK, STAGES)
    slope = gelu_slope(z + tl.load(bias1 + col).to(tl.float32)[None, :])
    grad = _times_columns(dy + first * stride_dy, weight2, near, col, stride_dy, N, C, BM, BN, BC, STAGES) * slope
    real = (row < left)[:, None]
    tl.store(dz + first * N + row[:, None] * N + col[None, :], grad.to(dz.dtype.element_ty), mask=real)
    tl.store(db_parts + m.to(tl.int64) * N + col, tl.sum(tl.where(real, grad, 0.0), 0))


# The fastest tiles on an H100. A tile that does not divide its width shrinks.
FORWARD: Dict[str, int] = dict(BM=128, BN=128, BK=64, STAGES=3, num_warps=8)
BACKWARD: Dict[str, int] = dict(BM=128, BN=64, BK=64, STAGES=3, num_warps=4)


# By measurement on an H200, where three programs run on a processor: from this many on they fill the card. A program of
# more features has no registers for them, and is slower than two kernels.
WHOLE: Dict[str, int] = dict(BM=64, BN=32, STAGES=2, num_warps=4)
WHOLE_PROGRAMS, WHOLE_FEATURES = 3 * 132, 192


def _divisor(n: int, most: int) -> int:
    """The largest power of 2 that divides n, and at most `most`, a power of 2."""
    return min(most, n & -n)


@functools.lru_cache(maxsize=256)
def _forward_launches(M: int, N: int, K: int, stride: int, dtype: torch.dtype, bias_dtype: torch.dtype) -> Launches:
    """Those of `_forward_hidden` for x, W₁, b₁ and g."""
    run = Launches()
    x, weight, bias, g = run.tensor(dtype), run.tensor(dtype), run.tensor(bias_dtype), run.tensor(dtype)
    options = {**FORWARD, 'BN': _divisor(N, FORWARD['BN']), 'BK': _divisor(K, FORWARD['BK'])}
    grid = ceil_div(M, options['BM']) * (N // options['BN']), 1, 1
    run.launch(_forward_hidden, grid, x, weight, bias, g, M, N, stride, K=K, **options)
    return run


@functools.lru_cache(maxsize=256)
def _whole_launches(
    M: int, N: int, K: int, C: int, stride: int, dtype: torch.dtype, bias_dtypes: Tuple[torch.dtype, torch.dtype]
) -> Optional[Launches]:
    """Those of `_forward_whole` for x, W₁, b₁, W₂, b₂ and y, or None where two kernels are faster."""
    first = 1 << (K.bit_length() - 1)  # the larger part of K
    second = K - first
    few = K == C and 64 <= K <= WHOLE_FEATURES and N % WHOLE['BN'] == 0 and second & (second - 1) == 0
    if not few or ceil_div(M, WHOLE['BM']) < WHOLE_PROGRAMS:
        return None
    run = Launches()
    x, weight1, bias1 = run.tensor(dtype), run.tensor(dtype), run.tensor(bias_dtypes[0])
    weight2, bias2, y = run.tensor(dtype), run.tensor(bias_dtypes[1]), run.tensor(dtype)
    grid = ceil_div(M, WHOLE['BM']), 1, 1
    run.launch(_forward_whole, grid, x, weight1, bias1, weight2, bias2, y, M, stride, N=N, K1=first, K2=second, **WHOLE)
    return run


@functools.lru_cache(maxsize=256)
def _backward_launches(
    M: int, N: int, K: int, C: int, strides: Tuple[int, int], dtype: torch.dtype, bias_dtype: torch.dtype
) -> Launches:
    """Those of `_backward_hidden` for dy, x, W₁, b₁, W₂, dz and db₁."""
    run = Launches()
    dy, x, weight1 = (run.tensor(dtype) for _ in range(3))
    bias1, weight2, dz, db = run.tensor(bias_dtype), run.tensor(dtype), run.tensor(dtype), run.tensor(torch.float32)
    options = {
        **BACKWARD,
        'BN': _divisor(N, BACKWARD['BN']),
        'BK': _divisor(K, BACKWARD['BK']),
        'BC': _divisor(C, BACKWARD['BK']),
    }
    rows = ceil_div(M, options['BM'])
    parts = run.scratch(torch.float32, rows, N)
    grid = rows * (N // options['BN']), 1, 1
    args = dy, x, weight1, bias1, weight2, dz, parts, M, N, *strides
    run.launch(_backward_hidden, grid, *args, K=K, C=C, **options)
    sum_parts(run, parts, db, rows, N)
    return run


def _mlp(
    x: torch.Tensor,
    weight1: torch.Tensor,
    bias1: torch.Tensor,
    weight2: torch.Tensor,
    bias2: torch.Tensor,
    save: bool,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """y = gelu(x W₁ᵀ + b₁) W₂ᵀ + b₂ of x `(M, K)`, and for the backward gelu(..) `(M, N)`, empty unless `save`."""
    (M, K), (C, N) = x.shape, weight2.shape
    if not save:
        whole = _whole_launches(M, N, K, C, x.stride(0), x.dtype, (bias1.dtype, bias2.dtype))
        if whole is not None:
            y = x.new_empty(M, C)
            whole(x, weight1, bias1, weight2, bias2, y)
            return y, x.new_empty(0, N)
    g = x.new_empty(M, N)
    _forward_launches(M, N, K, x.stride(0), x.dtype, bias1.dtype)(x, weight1, bias1, g)
    return torch.addmm(bias2, g, weight2.t()), g if save else g.new_empty(0, g.shape[1])


def _mlp_fake(
    x: torch.Tensor, weight1: torch.Tensor, bias1: torch.Tensor, weight2: torch.Tensor, bias2: torch.Tensor, save: bool
) -> Tuple[torch.Tensor, torch.Tensor]:
    M, N = x.shape[0], weight1.shape[0]
    return x.new_empty(M, weight2.shape[0]), x.new_empty(M if save else 0, N)


def _mlp_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight1: torch.Tensor,
    bias1: torch.Tensor,
    weight2: torch.Tensor,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """The gradients of z = x W₁ᵀ + b₁, `(M, N)`, and of b₁, float32 `(N)`."""
    (M, K), (C, N) = x.shape, weight2.shape
    dz, db = x.new_empty(M, N), x.new_empty(N, dtype=torch.float32)
    strides = grad.stride(0), x.stride(0)
    _backward_launches(M, N, K, C, strides, x.dtype, bias1.dtype)(grad, x, weight1, bias1, weight2, dz, db)
    return dz, db


def _mlp_backward_fake(
    grad: torch.Tensor, x: torch.Tensor, weight1: torch.Tensor, bias1: torch.Tensor, weight2: torch.Tensor
) -> Tuple[torch.Tensor, torch.Tensor]:
    N = weight1.shape[0]
    return x.new_empty(x.shape[0], N), x.new_empty(N, dtype=torch.float32)


def _setup_context(ctx: Any, inputs: Tuple[Any, ...], output: Tuple[torch.Tensor, torch.Tensor]) -> None:
    x, weight1, bias1, weight2, bias2, save = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight1, bias1, weight2, output[1])
    ctx.saved, ctx.bias2_dtype = save, bias2.dtype


def _autograd_backward(ctx: Any, grad: Optional[torch.Tensor], *_: Any) -> Tuple[Optional[torch.Tensor], ...]:
    if grad is None:
        return (None,) * 6
    if not ctx.saved:
        raise RuntimeError('the fused MLP ran without keeping what its backward needs; this is a fault of evavit')
    x, weight1, bias1, weight2, g = ctx.saved_tensors
    need = ctx.needs_input_grad
    dx = dw1 = db1 = dw2 = db2 = None
    grad = grad.contiguous()
    if need[0] or need[1] or need[2]:
        dz, db1 = mlp_backward(grad, x, weight1, bias1, weight2)
        dx = dz @ weight1 if need[0] else None
        dw1 = dz.t() @ x if need[1] else None
        db1 = db1.to(bias1.dtype)
    if need[3]:
        dw2 = grad.t() @ g
    if need[4]:
        db2 = grad.sum(0, dtype=torch.float32).to(ctx.bias2_dtype)
    return dx, dw1, db1, dw2, db2, None


mlp = register_op('mlp', _mlp, _mlp_fake, _setup_context, _autograd_backward)
mlp_backward = register_op('mlp_backward', _mlp_backward, _mlp_backward_fake)


def mlp_fused(
    x: torch.Tensor, weight1: torch.Tensor, bias1: torch.Tensor, weight2: torch.Tensor, bias2: torch.Tensor
) -> torch.Tensor:
    """`evavit.ops.mlp_gelu` by the kernels.

    Arguments have been checked. All but bias1 have the same dtype, bfloat16 or float16.
    """
    tensors = [x, weight1, bias1, weight2, bias2]
    save = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    y, _ = mlp(flat, weight1.contiguous(), bias1.contiguous(), weight2.contiguous(), bias2.contiguous(), save)
    return y.view(*x.shape[:-1], weight2.shape[0])
