"""The MLP of a transformer's block as fused kernels in Triton, forward and backward, behind `evavit.ops.mlp_gelu`.

The hidden layer, four times as wide as the tokens, is what the elementwise steps move. With D the bytes of the tokens
`(M, K)` and 4D those of the hidden layer the steps around the products of the second linear move

    forward    g = gelu(x W₁ᵀ + b₁)              x in -> g                       5D, not 13D: no z in memory
    backward   z = x W₁ᵀ + b₁, again             x, dy in
               dz = (dy W₂)·gelu'(z), Σ dz       -> dz, partial sums             6D, not 21D: no dg, no z in memory

and the backward keeps x and g, as the steps one by one keep x and z. What is left are products of matrices, and they
are cuBLAS's: y = g W₂ᵀ + b₂, dx = dz W₁, dW₁ = dzᵀ x, dW₂ = dyᵀ g.

Every sum runs in one fixed order: no atomics, two runs agree to the bit. Products accumulate in float32.
"""

from typing import Tuple

import torch
import triton
import triton.language as tl

from evavit.ops.common.gelu import gelu, gelu_slope
from evavit.ops.common.launch import Launcher, ceil_div, on_device, register_op, sum_parts

__all__ = ['mlp_fused']


@triton.jit
def _times_rows(
    x,
    weight,
    row,
    col,
    stride,
    K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """x[row] weight[col]ᵀ of x `(.., K)` and weight `(.., K)`."""
    k = tl.arange(0, BK)
    x += row[:, None] * stride + k[None, :]
    weight += col[None, :] * K + k[:, None]
    acc = tl.zeros([BM, BN], tl.float32)
    for k0 in tl.range(0, K, BK, num_stages=STAGES):
        acc = tl.dot(tl.load(x + k0), tl.load(weight + k0), acc)
    return acc


@triton.jit
def _times_columns(
    x,
    weight,
    row,
    col,
    stride,
    N,
    K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """x[row] weight[:, col] of x `(.., K)` and weight `(K, N)`."""
    k = tl.arange(0, BK)
    x += row[:, None] * stride + k[None, :]
    weight += k[:, None] * N + col[None, :]
    acc = tl.zeros([BM, BN], tl.float32)
    for k0 in tl.range(0, K, BK, num_stages=STAGES):
        acc = tl.dot(tl.load(x + k0), tl.load(weight + k0 * N), acc)
    return acc


@triton.jit
def _forward_hidden(
    x,
    weight,
    bias,
    g,
    M,
    N,
    stride,
    K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """g = gelu(x W₁ᵀ + b₁), one tile a program; those of the same rows run together and find x in the L2 cache."""
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
def _backward_hidden(
    dy,
    x,
    weight1,
    bias1,
    weight2,
    dz,
    db_parts,
    M,
    N,
    stride_dy,
    stride_x,
    K: tl.constexpr,
    C: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BC: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dz = (dy W₂)·gelu'(x W₁ᵀ + b₁), one tile a program, and its sum over the tile's rows."""
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


# Tiles, measured on an H100; where a width is not divisible by its tile the tile shrinks.
FORWARD = dict(BM=128, BN=128, BK=64, STAGES=3, num_warps=8)
BACKWARD = dict(BM=128, BN=64, BK=64, STAGES=3, num_warps=4)
_launch = Launcher()


def _divisor(n: int, most: int) -> int:
    """The largest power of 2 up to most that divides n, a multiple of 16."""
    return min(most, n & -n)


def _hidden(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """gelu(x Wᵀ + b) `(M, N)`."""
    (M, K), N = x.shape, weight.shape[0]
    g = x.new_empty(M, N)
    options = {**FORWARD, 'BN': _divisor(N, FORWARD['BN']), 'BK': _divisor(K, FORWARD['BK'])}
    with on_device(x):
        _launch(
            _forward_hidden,
            (ceil_div(M, options['BM']) * (N // options['BN']), 1, 1),
            x,
            weight,
            bias,
            g,
            M,
            N,
            x.stride(0),
            K=K,
            **options,
        )
    return g


def _mlp(
    x: torch.Tensor,
    weight1: torch.Tensor,
    bias1: torch.Tensor,
    weight2: torch.Tensor,
    bias2: torch.Tensor,
    save: bool,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """y = gelu(x W₁ᵀ + b₁) W₂ᵀ + b₂ of x `(M, K)`, and gelu(..) `(M, N)` for the backward; empty without save."""
    g = _hidden(x, weight1, bias1)
    return torch.addmm(bias2, g, weight2.t()), g if save else g.new_empty(0, g.shape[1])


def _mlp_fake(x, weight1, bias1, weight2, bias2, save):
    M, N = x.shape[0], weight1.shape[0]
    return x.new_empty(M, weight2.shape[0]), x.new_empty(M if save else 0, N)


def _mlp_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight1: torch.Tensor,
    bias1: torch.Tensor,
    weight2: torch.Tensor,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """The gradients of z = x W₁ᵀ + b₁ `(M, N)` and of b₁, float32 `(N)`."""
    (M, K), (C, N) = x.shape, weight2.shape
    options = {
        **BACKWARD,
        'BN': _divisor(N, BACKWARD['BN']),
        'BK': _divisor(K, BACKWARD['BK']),
        'BC': _divisor(C, BACKWARD['BK']),
    }
    rows = ceil_div(M, options['BM'])
    dz = x.new_empty(M, N)
    parts = x.new_empty(rows, N, dtype=torch.float32)
    with on_device(x):
        _launch(
            _backward_hidden,
            (rows * (N // options['BN']), 1, 1),
            grad,
            x,
            weight1,
            bias1,
            weight2,
            dz,
            parts,
            M,
            N,
            grad.stride(0),
            x.stride(0),
            K=K,
            C=C,
            **options,
        )
        return dz, sum_parts(_launch, parts)


def _mlp_backward_fake(grad, x, weight1, bias1, weight2):
    N = weight1.shape[0]
    return x.new_empty(x.shape[0], N), x.new_empty(N, dtype=torch.float32)


def _setup_context(ctx, inputs, output) -> None:
    x, weight1, bias1, weight2, bias2, save = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight1, bias1, weight2, output[1])
    ctx.saved, ctx.bias2_dtype = save, bias2.dtype


def _autograd_backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 6
    if not ctx.saved:
        raise RuntimeError('the fused MLP ran without keeping what its backward needs; this is a fault of evavit')
    x, weight1, bias1, weight2, g = ctx.saved_tensors
    need = ctx.needs_input_grad
    dx = dw1 = db1 = dw2 = db2 = None
    grad = grad.contiguous()
    if need[0] or need[1] or need[2]:
        dz, db1 = torch.ops.evavit.mlp_backward(grad, x, weight1, bias1, weight2)
        dx = dz @ weight1 if need[0] else None
        dw1 = dz.t() @ x if need[1] else None
        db1 = db1.to(bias1.dtype)
    if need[3]:
        dw2 = grad.t() @ g
    if need[4]:
        db2 = grad.sum(0, dtype=torch.float32).to(ctx.bias2_dtype)
    return dx, dw1, db1, dw2, db2, None


register_op('mlp', _mlp, _mlp_fake, _setup_context, _autograd_backward)
register_op('mlp_backward', _mlp_backward, _mlp_backward_fake)


def mlp_fused(
    x: torch.Tensor, weight1: torch.Tensor, bias1: torch.Tensor, weight2: torch.Tensor, bias2: torch.Tensor
) -> torch.Tensor:
    """`evavit.ops.mlp_gelu` by the kernels; arguments have been checked and share one half-precision dtype, but for
    bias1, of any."""
    tensors = [x, weight1, bias1, weight2, bias2]
    save = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    y, _ = torch.ops.evavit.mlp(flat, weight1.contiguous(), bias1.contiguous(), weight2.contiguous(), bias2, save)
    return y.view(*x.shape[:-1], weight2.shape[0])
