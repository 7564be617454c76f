"""A depthwise 3 × 3 convolution and GELU as fused kernels in Triton, behind `evavit.ops.depthwise_gelu`.

Memory traffic limits both kernels; the number of instructions is nearly as tight. In units of one `(B, N, C)` tensor
the kernels move

    forward               x in              -> gelu(z)                           2
    backward   of z:      x, dy in          -> dz, partial sums of parameters    3
               of x:      dz in             -> dx                                2

where z = conv(x) + b is computed again. A lane of a tile holds some channels of one column of a strip of R rows, and
walks down the strip. So a program loads a row at three columns for each output row, not at nine places; what
neighbouring lanes load as well comes from the L1 cache. And the lanes are the columns of all strips and images in one
row, so that a tile has no idle lanes at a grid's edge, whatever the grid.

Every sum runs in one fixed order, without atomics, so two runs agree to the bit. Products and sums are float32.

The legend of each kernel is its signature: behind an argument stand its shape, its dtype and who writes it; `writes`
marks what the kernel writes itself. "dtype" is that of x. H, W and C are rows, columns and channels; BC and P the
channels and lanes of a tile, R the rows of a strip; lanes = B · strips · W in all, and a program has per_program tiles
of them.
"""

import functools
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import torch
import triton
import triton.language as tl

from evavit.ops.common.gelu import gelu, gelu_slope
from evavit.ops.common.launch import Launches, Pointer, ceil_div, register_op, sum_parts

__all__ = ['depthwise_gelu_fused']


@triton.jit
def _weights(weight, c, flip: tl.constexpr, C: tl.constexpr, BC: tl.constexpr):
    """The nine taps of weight `(9, C)`, each `(1, BC)`; with `flip` in reverse, for the transposed convolution."""
    mask = (c < C)[None, :] if C % BC else None
    other = 0.0 if C % BC else None
    w = weight + c[None, :]
    if flip:
        w += 8 * C
    step: tl.constexpr = -C if flip else C
    return (
        tl.load(w, mask, other).to(tl.float32),
        tl.load(w + step, mask, other).to(tl.float32),
        tl.load(w + 2 * step, mask, other).to(tl.float32),
        tl.load(w + 3 * step, mask, other).to(tl.float32),
        tl.load(w + 4 * step, mask, other).to(tl.float32),
        tl.load(w + 5 * step, mask, other).to(tl.float32),
        tl.load(w + 6 * step, mask, other).to(tl.float32),
        tl.load(w + 7 * step, mask, other).to(tl.float32),
        tl.load(w + 8 * step, mask, other).to(tl.float32),
    )


@triton.jit
def _lanes(tile, lanes, H: tl.constexpr, W: tl.constexpr, R: tl.constexpr, P: tl.constexpr):
    """For the P lanes of a tile: the first row, the token there, and whether the columns left of it, its own
    and right of it exist. `(P)` each."""
    strips: tl.constexpr = (H + R - 1) // R
    f = tile * P + tl.arange(0, P)
    strip, column = f // W, f % W
    image, y = strip // strips, (strip % strips) * R
    real = f < lanes
    return y, image.to(tl.int64) * (H * W) + (y * W + column), real & (column > 0), real, real & (column < W - 1)


@triton.jit
def _row(x, y, left, here, right, inside, H: tl.constexpr, C: tl.constexpr):
    """Row y of x at the columns left of each lane, its own and right of it; x points at its own. `(P, BC)` each."""
    row = (y >= 0) & (y < H)
    return (
        tl.load(x - C, (left & row)[:, None] & inside, 0.0),
        tl.load(x, (here & row)[:, None] & inside, 0.0),
        tl.load(x + C, (right & row)[:, None] & inside, 0.0),
    )


@triton.jit
def _taps(z, x0, x1, x2, w0, w1, w2):
    """z plus one row of the convolution: three columns times three taps."""
    return x0.to(tl.float32) * w0 + (x1.to(tl.float32) * w1 + (x2.to(tl.float32) * w2 + z))


@triton.jit
def _convolve(
    x,  # (B, N, C), dtype; the caller; for the transposed convolution dz, from _backward_z
    weight,  # (9, C), any float dtype; the caller
    bias,  # if GELU: (C), any float dtype; the caller
    out,  # writes (B, N, C), dtype
    lanes, per_program,
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr,
    BC: tl.constexpr, P: tl.constexpr, R: tl.constexpr,
    GELU: tl.constexpr,  # which of the two: True in the forward
):  # fmt: skip
    """gelu(conv(x) + bias), or the transposed convolution of x. Programs: (groups of lanes · tiles of channels)."""
    blocks: tl.constexpr = (C + BC - 1) // BC
    c = (tl.program_id(0) % blocks) * BC + tl.arange(0, BC)
    inside = (c < C)[None, :]
    w0, w1, w2, w3, w4, w5, w6, w7, w8 = _weights(weight, c, not GELU, C, BC)
    b = tl.load(bias + c[None, :], inside, 0.0).to(tl.float32) if GELU else 0.0
    first = (tl.program_id(0) // blocks) * per_program
    for tile in range(first, tl.minimum(first + per_program, (lanes + P - 1) // P)):
        y, token, left, here, right = _lanes(tile, lanes, H, W, R, P)
        offset = token[:, None] * C + c[None, :]
        source, target = x + offset, out + offset
        down: tl.constexpr = W * C
        # A row is loaded two rows before its use: no load may be moved ahead of the stores in between.
        a0, a1, a2 = _row(source - down, y - 1, left, here, right, inside, H, C)
        b0, b1, b2 = _row(source, y, left, here, right, inside, H, C)
        c0, c1, c2 = _row(source + down, y + 1, left, here, right, inside, H, C)
        above = _taps(b, a0, a1, a2, w0, w1, w2)
        for r in tl.static_range(R):
            if r < R - 1:
                d0, d1, d2 = _row(source + (r + 2) * down, y + r + 2, left, here, right, inside, H, C)
            z = _taps(_taps(above, b0, b1, b2, w3, w4, w5), c0, c1, c2, w6, w7, w8)
            if GELU:
                z = gelu(z)
            tl.store(target + r * down, z.to(out.dtype.element_ty), (here & (y + r < H))[:, None] & inside)
            if r < R - 1:
                above = _taps(b, b0, b1, b2, w0, w1, w2)
                b0, b1, b2 = c0, c1, c2
                c0, c1, c2 = d0, d1, d2


@triton.jit
def _backward_z(
    x,  # (B, N, C), dtype; the caller
    grad,  # dy (B, N, C), dtype; autograd
    weight, bias,  # (9, C) and (C), any float dtype; the caller
    dz,  # writes (B, N, C), dtype
    parts,  # writes (groups of lanes, 10, C) float32: dweight and dbias, for sum_parts
    lanes, per_program,
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr,
    BC: tl.constexpr, P: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """dz = dy · gelu'(conv(x) + bias), dweight and dbias. Programs: (groups of lanes · tiles of channels)."""
    blocks: tl.constexpr = (C + BC - 1) // BC
    c = (tl.program_id(0) % blocks) * BC + tl.arange(0, BC)
    inside = (c < C)[None, :]
    w0, w1, w2, w3, w4, w5, w6, w7, w8 = _weights(weight, c, False, C, BC)
    b = tl.load(bias + c[None, :], inside, 0.0).to(tl.float32)
    s0 = tl.zeros([P, BC], tl.float32)
    s1 = tl.zeros([P, BC], tl.float32)
    s2 = tl.zeros([P, BC], tl.float32)
    s3 = tl.zeros([P, BC], tl.float32)
    s4 = tl.zeros([P, BC], tl.float32)
    s5 = tl.zeros([P, BC], tl.float32)
    s6 = tl.zeros([P, BC], tl.float32)
    s7 = tl.zeros([P, BC], tl.float32)
    s8 = tl.zeros([P, BC], tl.float32)
    s9 = tl.zeros([P, BC], tl.float32)
    program = tl.program_id(0) // blocks
    first = program * per_program
    for tile in range(first, tl.minimum(first + per_program, (lanes + P - 1) // P)):
        y, token, left, here, right = _lanes(tile, lanes, H, W, R, P)
        offset = token[:, None] * C + c[None, :]
        source, target, grads = x + offset, dz + offset, grad + offset
        down: tl.constexpr = W * C
        a0, a1, a2 = _row(source - down, y - 1, left, here, right, inside, H, C)
        b0, b1, b2 = _row(source, y, left, here, right, inside, H, C)
        c0, c1, c2 = _row(source + down, y + 1, left, here, right, inside, H, C)
        dy = tl.load(grads, here[:, None] & inside, 0.0)
        for r in tl.static_range(R):
            if r < R - 1:
                d0, d1, d2 = _row(source + (r + 2) * down, y + r + 2, left, here, right, inside, H, C)
                next_dy = tl.load(grads + (r + 1) * down, (here & (y + r + 1 < H))[:, None] & inside, 0.0)
            z = _taps(b, a0, a1, a2, w0, w1, w2)
            z = _taps(_taps(z, b0, b1, b2, w3, w4, w5), c0, c1, c2, w6, w7, w8)
            g = dy.to(tl.float32) * gelu_slope(z)
            tl.store(target + r * down, g.to(dz.dtype.element_ty), (here & (y + r < H))[:, None] & inside)
            s0 += g * a0.to(tl.float32)
            s1 += g * a1.to(tl.float32)
            s2 += g * a2.to(tl.float32)
            s3 += g * b0.to(tl.float32)
            s4 += g * b1.to(tl.float32)
            s5 += g * b2.to(tl.float32)
            s6 += g * c0.to(tl.float32)
            s7 += g * c1.to(tl.float32)
            s8 += g * c2.to(tl.float32)
            s9 += g
            if r < R - 1:
                a0, a1, a2 = b0, b1, b2
                b0, b1, b2 = c0, c1, c2
                c0, c1, c2 = d0, d1, d2
                dy = next_dy
    part = parts + program.to(tl.int64) * (10 * C) + c
    mask = c < C
    tl.store(part, tl.sum(s0, 0), mask)
    tl.store(part + C, tl.sum(s1, 0), mask)
    tl.store(part + 2 * C, tl.sum(s2, 0), mask)
    tl.store(part + 3 * C, tl.sum(s3, 0), mask)
    tl.store(part + 4 * C, tl.sum(s4, 0), mask)
    tl.store(part + 5 * C, tl.sum(s5, 0), mask)
    tl.store(part + 6 * C, tl.sum(s6, 0), mask)
    tl.store(part + 7 * C, tl.sum(s7, 0), mask)
    tl.store(part + 8 * C, tl.sum(s8, 0), mask)
    tl.store(part + 9 * C, tl.sum(s9, 0), mask)


# --------------------------------------------------------------------------------------------------------------------
# Launches
# --------------------------------------------------------------------------------------------------------------------

# For each kernel: BC, P and R, and the most programs. The fastest on an H100, and constants, so that sums are split
# alike on every device. P is for half precision, R at most.
LAUNCH: Dict[str, Dict[str, int]] = {
    'forward': dict(BC=64, P=8, R=7, programs=16384, num_warps=4),
    'backward_z': dict(BC=64, P=4, R=14, programs=1056, num_warps=4),
    'backward_x': dict(BC=128, P=8, R=4, programs=4096, num_warps=8),
}


class _Case(NamedTuple):
    """All that decides on the launches of a call, but for the alignment of its tensors."""

    shape: Tuple[int, int, int]  # (B, N, C)
    feat_size: Tuple[int, int]
    dtype: torch.dtype  # of the tokens
    weight: torch.dtype
    bias: torch.dtype

    def work(self, kernel: str) -> Tuple[int, Tuple[int, int, int], Tuple[int, int], Dict[str, int]]:
        """The number of groups of lanes, the grid, (lanes, per_program), and the options of a launch."""
        (B, _, C), (H, W) = self.shape, self.feat_size
        options = dict(LAUNCH[kernel])
        programs = options.pop('programs')
        options['P'] = max(1, options['P'] * 2 // self.dtype.itemsize)  # a float32 takes the registers of two halves
        # Strips of equal height, so that as few rows as possible are past the edge.
        strips = ceil_div(H, options['R'])
        options['R'] = ceil_div(H, strips)
        lanes = B * strips * W
        tiles, blocks = ceil_div(lanes, options['P']), ceil_div(C, options['BC'])
        per_program = ceil_div(tiles, max(1, min(tiles, programs // blocks)))
        groups = ceil_div(tiles, per_program)
        # Sizes as constants save a sixth of instructions and registers.
        options.update(H=H, W=W, C=C)
        return groups, (groups * blocks, 1, 1), (lanes, per_program), options

    def convolve(self, run: Launches, kernel: str, *tensors: Pointer) -> None:
        """Add `_convolve` of x, weight, bias and out: the kernel 'forward', or 'backward_x'."""
        _, grid, sizes, options = self.work(kernel)
        run.launch(_convolve, grid, *tensors, *sizes, GELU=kernel == 'forward', **options)


@functools.lru_cache(maxsize=256)
def _forward_launches(case: _Case) -> Launches:
    """The forward's, for x, weight, bias and y."""
    run = Launches()
    tensors = [run.tensor(dtype) for dtype in (case.dtype, case.weight, case.bias, case.dtype)]
    case.convolve(run, 'forward', *tensors)
    return run


@functools.lru_cache(maxsize=256)
def _backward_launches(case: _Case) -> Launches:
    """The backward's, for dy, x, weight, bias, dx and the gradient of the parameters, float32 `(10, C)`."""
    run = Launches()
    grad, x, weight, bias = (run.tensor(dtype) for dtype in (case.dtype, case.dtype, case.weight, case.bias))
    dx, dparams = run.tensor(case.dtype), run.tensor(torch.float32)
    C = case.shape[-1]
    groups, grid, sizes, options = case.work('backward_z')
    dz, parts = run.scratch(case.dtype, *case.shape), run.scratch(torch.float32, groups, 10, C)
    run.launch(_backward_z, grid, x, grad, weight, bias, dz, parts, *sizes, **options)
    sum_parts(run, parts, dparams, groups, 10 * C)
    case.convolve(run, 'backward_x', dz, weight, bias, dx)
    return run


def _case(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, feat_size: List[int]) -> _Case:
    B, N, C = x.shape
    return _Case((B, N, C), (feat_size[0], feat_size[1]), x.dtype, weight.dtype, bias.dtype)


def _forward(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, feat_size: List[int]) -> torch.Tensor:
    """gelu(conv(x) + bias) for contiguous x `(B, N, C)`, weight `(9, C)` and bias `(C)`."""
    out = torch.empty_like(x)
    _forward_launches(_case(x, weight, bias, feat_size))(x, weight, bias, out)
    return out


def _backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, feat_size: List[int]
) -> Tuple[torch.Tensor, torch.Tensor]:
    """dx, and float32 dweight and dbias in one tensor `(10, C)`."""
    dx, dparams = torch.empty_like(x), x.new_empty((10, x.shape[-1]), dtype=torch.float32)
    _backward_launches(_case(x, weight, bias, feat_size))(grad.contiguous(), x, weight, bias, dx, dparams)
    return dx, dparams


def _forward_fake(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, feat_size: List[int]) -> torch.Tensor:
    return torch.empty_like(x)


def _backward_fake(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, feat_size: List[int]
) -> Tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), x.new_empty(10, x.shape[-1], dtype=torch.float32)


def _setup_context(ctx: Any, inputs: Tuple[Any, ...], output: torch.Tensor) -> None:
    x, weight, bias, ctx.feat_size = inputs
    ctx.save_for_backward(x, weight, bias)


def _autograd_backward(ctx: Any, grad: torch.Tensor) -> Tuple[Optional[torch.Tensor], ...]:
    x, weight, bias = ctx.saved_tensors
    dx, dparams = depthwise_backward(grad, x, weight, bias, ctx.feat_size)
    return dx, dparams[:9].to(weight.dtype), dparams[9].to(bias.dtype), None


depthwise = register_op('depthwise_gelu', _forward, _forward_fake, _setup_context, _autograd_backward)
depthwise_backward = register_op('depthwise_gelu_backward', _backward, _backward_fake)


def depthwise_gelu_fused(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, feat_size: List[int]
) -> torch.Tensor:
    """`evavit.ops.depthwise_gelu` by the kernels."""
    # The kernels read a tap of many channels at a time.
    taps = weight.reshape(weight.shape[0], 9).t().contiguous()
    return depthwise(x.contiguous(), taps, bias.contiguous(), feat_size)
