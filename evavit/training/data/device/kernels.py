"""Triton kernels of `resample` and of the operators: few launches, whatever the number and the sizes of the images.

Products and sums are kept apart (`enable_fp_fusion=False`), so that values are those of the plain forms to the bit.

sources     (B,) int64: address of the first pixel of each image's box, uint8
shapes      (B, 6) int64: of each box: height, width, bytes from row to row, from channel to channel, and its first row
            in `lines`; taps along x and y in one number, x + 2³² · y
x_first     (B, W) int32, x_weights (B, most, W) int32: as `resample.taps` returns them; y_first, y_weights: along y
lines       (sum of C · height, W) uint8: the boxes resized along x
images      (B, C, H, W) uint8
steps       (B, S, 8) float64, as `draws.Sample.steps`; tables (B, C, 256) uint8: a value for each value
means       (B,) float32: of the grey image
"""

from typing import Any, Sequence, Tuple

import torch
import triton
import triton.language as tl

from .draws import GREY, STEP, Op
from .resample import BITS, reach

ROWS = 8  # that a program makes
PIXELS = 256  # that a program of an operator makes
MEASURED = 2048  # that a program which measures reads at once
STEP_SIZE = tl.constexpr(STEP)
(
    NONE,
    INVERT,
    POSTERIZE,
    SOLARIZE,
    SOLARIZE_ADD,
    BRIGHTNESS,
    AUTOCONTRAST,
    EQUALIZE,
    CONTRAST,
    COLOR,
    SHARPNESS,
    AFFINE,
) = (tl.constexpr(int(op)) for op in Op if op != Op.BLUR)
RED, GREEN, BLUE = (tl.constexpr(weight) for weight in GREY)


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


@triton.jit
def _grey(source, place, mask, pixels, CHANNELS: tl.constexpr):
    """int32: Image.convert('L') of the pixels at `place`."""
    grey = tl.load(source + place, mask=mask, other=0).to(tl.int32)
    if CHANNELS == 3:
        green = tl.load(source + pixels + place, mask=mask, other=0).to(tl.int32)
        blue = tl.load(source + 2 * pixels + place, mask=mask, other=0).to(tl.int32)
        grey = (grey * RED + green * GREEN + blue * BLUE + 0x8000) >> 16
    return grey


@triton.jit
def _cut(value):
    return tl.minimum(tl.maximum(value, 0.0), 255.0).to(tl.int32).to(tl.uint8)


@triton.jit(do_not_specialize=['layer', 'layers'])
def _measure(images, steps, layer, layers, tables, means, pixels, CHANNELS: tl.constexpr, PIXELS: tl.constexpr):
    """What operators need of a whole image: the table of a channel, the mean of the grey image."""
    image, channel = tl.program_id(0) // CHANNELS, tl.program_id(0) % CHANNELS
    step = steps + (image * layers + layer) * STEP_SIZE
    code, argument = tl.load(step).to(tl.int32), tl.load(step + 2)
    source = images + (image.to(tl.int64) * CHANNELS + channel) * pixels
    table, x = tables + tl.program_id(0) * 256 + tl.arange(0, 256), tl.arange(0, 256)
    if code == INVERT:
        tl.store(table, (255 - x).to(tl.uint8))
    elif code == POSTERIZE:
        bits = tl.minimum(tl.maximum(argument.to(tl.int32), 0), 8)
        tl.store(table, (x & (256 - (1 << (8 - bits)))).to(tl.uint8))
    elif code == SOLARIZE:
        tl.store(table, tl.where(x.to(tl.float64) < argument, x, 255 - x).to(tl.uint8))
    elif code == SOLARIZE_ADD:
        tl.store(table, tl.where(x < 128, tl.minimum(x + argument.to(tl.int32), 255), x).to(tl.uint8))
    elif code == BRIGHTNESS:
        tl.store(table, _cut(argument.to(tl.float32) * x.to(tl.float32)))
    elif code == AUTOCONTRAST:
        least, most = tl.full((PIXELS,), 255, tl.int32), tl.full((PIXELS,), 0, tl.int32)
        for start in range(0, pixels, PIXELS):
            place = start + tl.arange(0, PIXELS)
            least = tl.minimum(least, tl.load(source + place, mask=place < pixels, other=255).to(tl.int32))
            most = tl.maximum(most, tl.load(source + place, mask=place < pixels, other=0).to(tl.int32))
        low, high = tl.min(least, 0).to(tl.float64), tl.max(most, 0).to(tl.float64)
        scale = 255.0 / tl.maximum(high - low, 1.0)
        stretched = tl.minimum(tl.maximum(x.to(tl.float64) * scale + -low * scale, 0.0), 255.0)
        tl.store(table, tl.where(high > low, stretched, x.to(tl.float64)).to(tl.int32).to(tl.uint8))
    elif code == EQUALIZE:
        counts = tl.zeros((256,), tl.int32)
        for start in range(0, pixels, PIXELS):
            place = start + tl.arange(0, PIXELS)
            counts += tl.histogram(tl.load(source + place, mask=place < pixels, other=0).to(tl.int32), 256)
        counts -= tl.where(x == 0, tl.cdiv(pixels, PIXELS) * PIXELS - pixels, 0)  # what lies behind the end
        last = tl.max(tl.where(counts > 0, x, 0), 0)
        share = (pixels - tl.sum(tl.where(x == last, counts, 0), 0)) // 255
        before = tl.cumsum(counts, 0) - counts
        level = tl.minimum((share // 2 + before) // tl.maximum(share, 1), 255)
        tl.store(table, tl.where(share > 0, level, x).to(tl.uint8))
    elif (code == CONTRAST) & (channel == 0):
        total = tl.zeros((PIXELS,), tl.int32)
        for start in range(0, pixels, PIXELS):
            place = start + tl.arange(0, PIXELS)
            total += _grey(source, place, place < pixels, pixels, CHANNELS)
        mean = tl.sum(total.to(tl.int64), 0).to(tl.float64) / pixels
        tl.store(means + image, tl.floor(mean + 0.5).to(tl.float32))


@triton.jit
def _between(first, second, third, fourth, part, cubic):
    straight = second + part * (third - second)
    bend = 2 * (first - second) + third - fourth
    curve = second + part * (third - first + part * (bend + part * (second - first + fourth - third)))
    return tl.where(cubic, curve, straight)


@triton.jit
def _row_of(source, row, first, second, third, fourth, part, cubic, mask):
    return _between(
        tl.load(source + row + first, mask=mask, other=0).to(tl.float32),
        tl.load(source + row + second, mask=mask, other=0).to(tl.float32),
        tl.load(source + row + third, mask=mask, other=0).to(tl.float32),
        tl.load(source + row + fourth, mask=mask, other=0).to(tl.float32),
        part,
        cubic,
    )


@triton.jit
def _near(value, step: tl.constexpr, size):
    """The place `step` beside a float64 one, within the image, int32."""
    return tl.minimum(tl.maximum(value + step, 0.0), size - 1.0).to(tl.int32)


@triton.jit(do_not_specialize=['layer', 'layers', 'fill0', 'fill1', 'fill2'])
def _operate(
    images,
    steps,
    layer,
    layers,
    tables,
    means,
    made,
    height,
    width,
    fill0,
    fill1,
    fill2,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """One step of `PIXELS` pixels of an image; what has none is copied."""
    image = tl.program_id(0)
    step = steps + (image * layers + layer) * STEP_SIZE
    code, pixels = tl.load(step).to(tl.int32), height * width
    place = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)
    mask, row, column = place < pixels, place // width, place % width
    source = images + image.to(tl.int64) * CHANNELS * pixels
    target = made + image.to(tl.int64) * CHANNELS * pixels
    if (code >= INVERT) & (code <= EQUALIZE):
        for channel in tl.static_range(CHANNELS):
            own = tl.load(source + channel * pixels + place, mask=mask, other=0).to(tl.int32)
            looked_up = tl.load(tables + (image * CHANNELS + channel) * 256 + own)
            tl.store(target + channel * pixels + place, looked_up, mask=mask)
    elif code == AFFINE:
        filter = tl.load(step + 1)
        x, y = column.to(tl.float64) + 0.5, row.to(tl.float64) + 0.5
        x_in = tl.load(step + 2) * x + tl.load(step + 3) * y + tl.load(step + 4)
        y_in = tl.load(step + 5) * x + tl.load(step + 6) * y + tl.load(step + 7)
        inside = (x_in >= 0) & (x_in < width) & (y_in >= 0) & (y_in < height)
        shift = tl.where(filter == 0, 0.0, 0.5)
        x_in, y_in = x_in - shift, y_in - shift
        left, top, smooth, cubic = tl.floor(x_in), tl.floor(y_in), tl.where(filter > 0, 1.0, 0.0), filter == 2
        dx, dy = (x_in - left).to(tl.float32) * smooth, (y_in - top).to(tl.float32) * smooth
        x0, x1, x2, x3 = _near(left, -1, width), _near(left, 0, width), _near(left, 1, width), _near(left, 2, width)
        y0, y1, y2, y3 = _near(top, -1, height), _near(top, 0, height), _near(top, 1, height), _near(top, 2, height)
        for channel in tl.static_range(CHANNELS):
            plane = source + channel * pixels
            value = _between(
                _row_of(plane, y0 * width, x0, x1, x2, x3, dx, cubic, mask),
                _row_of(plane, y1 * width, x0, x1, x2, x3, dx, cubic, mask),
                _row_of(plane, y2 * width, x0, x1, x2, x3, dx, cubic, mask),
                _row_of(plane, y3 * width, x0, x1, x2, x3, dx, cubic, mask),
                dy,
                cubic,
            )
            outside = fill0 if channel == 0 else (fill1 if channel == 1 else fill2)
            turned = tl.where(inside, _cut(value).to(tl.int32), outside).to(tl.uint8)
            tl.store(target + channel * pixels + place, turned, mask=mask)
    elif (code == CONTRAST) | (code == COLOR) | (code == SHARPNESS):
        factor = tl.load(step + 2).to(tl.float32)
        level = _grey(source, place, mask, pixels, CHANNELS).to(tl.float32)
        level = tl.where(code == CONTRAST, tl.load(means + image), level)
        border = (row == 0) | (row == height - 1) | (column == 0) | (column == width - 1)
        for channel in tl.static_range(CHANNELS):
            pixel = tl.load(source + channel * pixels + place, mask=mask, other=0).to(tl.int32)
            low = level
            if code == SHARPNESS:  # ImageFilter.SMOOTH: nine pixels, the middle one five times, over 13
                total = 4 * pixel
                for beside in tl.static_range(9):
                    there = source + channel * pixels + place + (beside // 3 - 1) * width + beside % 3 - 1
                    total += tl.load(there, mask=mask & (border == 0), other=0).to(tl.int32)
                low = tl.where(border, pixel, (2 * total + 13) // 26).to(tl.float32)
            blended = _cut(low + factor * (pixel.to(tl.float32) - low))
            tl.store(target + channel * pixels + place, blended, mask=mask)
    else:
        for channel in tl.static_range(CHANNELS):
            copied = tl.load(source + channel * pixels + place, mask=mask, other=0)
            tl.store(target + channel * pixels + place, copied, mask=mask)


def operate(images: torch.Tensor, steps: torch.Tensor, layer: int, fill: Sequence[int]) -> torch.Tensor:
    """Step number `layer` of every image as new images; see `operators.apply_steps`. Blurs are left out.

    Args:
        images: (B, C, H, W) of uint8, C 1 or 3.
        steps: (B, S, 8) of float64, on their device.
        layer: Which of the S.
        fill: A value for each channel.
    """
    count, channels, height, width = images.shape
    tables = torch.empty(count, channels, 256, dtype=torch.uint8, device=images.device)
    means, made = torch.empty(count, device=images.device), torch.empty_like(images)
    sizes, shared = (layer, steps.shape[1], tables, means), dict(CHANNELS=channels, enable_fp_fusion=False)
    _measure[(count * channels,)](images, steps, *sizes, height * width, PIXELS=MEASURED, **shared)
    grid, filling = (count, triton.cdiv(height * width, PIXELS)), (*fill, 0, 0)[:3]
    _operate[grid](images, steps, *sizes, made, height, width, *filling, PIXELS=PIXELS, **shared)
    return made
