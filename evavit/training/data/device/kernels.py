"""Triton kernels of `resample`: a launch for each axis, whatever the number and the sizes of the images.

sources     (B,) int64: address of the first pixel of each image's box, uint8
shapes      (B, 6) int64: of each box: height, width, bytes from row to row, from channel to channel, and its first row
            in `lines`; taps along x and y in one number, x + 2³² · y
x_first     (B, W) int32, x_weights (B, most, W) int32: as `resample.taps` returns them; y_first, y_weights: along y
lines       (sum of C · height, W) uint8: the boxes resized along x
images      (B, C, H, W) uint8
"""

from typing import Any, Sequence, Tuple

import torch
import triton
import triton.language as tl

from .resample import BITS, reach

ROWS = 8  # that a program makes


@triton.jit(do_not_specialize=['most'])
def _along_x(
    sources,
    shapes,
    x_first,
    x_weights,
    lines,
    channels,
    width,
    most,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BITS: tl.constexpr,
):
    image, channel = tl.program_id(0) // channels, tl.program_id(0) % channels
    shape = shapes + image * 6
    height, box_width = tl.load(shape), tl.load(shape + 1)
    y = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    if tl.program_id(1) * ROWS < height:
        x = tl.arange(0, COLUMNS)
        source = tl.load(sources + image).to(tl.pointer_type(tl.uint8)) + channel * tl.load(shape + 3)
        source += y.to(tl.int64)[:, None] * tl.load(shape + 2)
        first = tl.load(x_first + image * width + x, mask=x < width, other=0)
        total = tl.full((ROWS, COLUMNS), 1 << (BITS - 1), tl.int32)
        for step in range(0, (tl.load(shape + 5) % 4294967296).to(tl.int32)):
            weight = tl.load(x_weights + (image * most + step) * width + x, mask=x < width, other=0)
            there = (first + step < box_width) & (x < width)
            pixel = tl.load(source + (first + step)[None, :], mask=there[None, :] & (y < height)[:, None], other=0)
            total += pixel.to(tl.int32) * weight[None, :]
        value = tl.minimum(tl.maximum(total >> BITS, 0), 255).to(tl.uint8)
        line = tl.load(shape + 4) + channel * height + y
        tl.store(lines + line[:, None] * width + x[None, :], value, mask=(y < height)[:, None] & (x < width)[None, :])


@triton.jit(do_not_specialize=['most'])
def _along_y(
    shapes,
    y_first,
    y_weights,
    lines,
    images,
    channels,
    height,
    width,
    most,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BITS: tl.constexpr,
):
    image, channel = tl.program_id(0) // channels, tl.program_id(0) % channels
    shape = shapes + image * 6
    box_height = tl.load(shape)
    y, x = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    line = tl.load(shape + 4) + channel * box_height
    first = tl.load(y_first + image * height + y, mask=y < height, other=0)
    total = tl.full((ROWS, COLUMNS), 1 << (BITS - 1), tl.int32)
    for step in range(0, (tl.load(shape + 5) // 4294967296).to(tl.int32)):
        weight = tl.load(y_weights + (image * most + step) * height + y, mask=y < height, other=0)
        there = (first + step < box_height) & (y < height)
        place = (line + first + step)[:, None] * width + x[None, :]
        pixel = tl.load(lines + place, mask=there[:, None] & (x < width)[None, :], other=0)
        total += pixel.to(tl.int32) * weight[:, None]
    value = tl.minimum(tl.maximum(total >> BITS, 0), 255).to(tl.uint8)
    place = (tl.program_id(0).to(tl.int64) * height + y)[:, None] * width + x[None, :]
    tl.store(images + place, value, mask=(y < height)[:, None] & (x < width)[None, :])


def resample_boxes(
    sources: Sequence[torch.Tensor],
    windows: torch.Tensor,
    x_taps: Tuple[torch.Tensor, torch.Tensor],
    y_taps: Tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """See `resample.resample`."""
    device, channels = x_taps[0].device, sources[0].shape[0]
    (x_first, x_weights), (y_first, y_weights) = x_taps, y_taps
    count, width, height = len(windows), x_first.shape[1], y_first.shape[1]
    left, top, box_width, box_height = windows[:, :4].unbind(1)
    strides = torch.tensor([(source.data_ptr(), *source.stride()[:2]) for source in sources])
    address = strides[:, 0] + top * strides[:, 2] + left
    both = reach(windows, 0) + reach(windows, 1) * 2**32
    rows = channels * box_height
    starts = rows.cumsum(0) - rows
    about = torch.stack((address, box_height, box_width, strides[:, 2], strides[:, 1], starts, both), 1)
    about = about.to(device, non_blocking=True)
    shapes, addresses = about[:, 1:].contiguous(), about[:, 0].contiguous()
    lines = torch.empty(int(rows.sum()), width, dtype=torch.uint8, device=device)
    images = torch.empty(count, channels, height, width, dtype=torch.uint8, device=device)
    shared: Any = dict(ROWS=ROWS, COLUMNS=triton.next_power_of_2(width), BITS=BITS)
    grid = (count * channels, triton.cdiv(int(box_height.max()), ROWS))
    _along_x[grid](addresses, shapes, x_first, x_weights, lines, channels, width, x_weights.shape[1], **shared)
    grid = (count * channels, triton.cdiv(height, ROWS))
    _along_y[grid](shapes, y_first, y_weights, lines, images, channels, height, width, y_weights.shape[1], **shared)
    return images
