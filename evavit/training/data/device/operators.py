"""Pillow's operations on a batch of uint8 images, each image with its own arguments.

torchvision.transforms.v2 and kornia do not serve here: v2 draws one set of arguments for a whole batch, kornia computes
in floating point. These operators round and cut as Pillow does, on any device. On a GPU a step of all images is two
launches (`kernels`), and one pass over each kind of operator elsewhere.
"""

import math
from typing import Any, Callable, List, Sequence, Tuple

import numpy as np
import torch

from .draws import GREY, Op


def apply_steps(images: torch.Tensor, steps: torch.Tensor, fill: Sequence[int]) -> torch.Tensor:
    """Do to each image its steps, in their order.

    Args:
        images: (B, C, H, W) of uint8, changed in place.
        steps: (B, S, 8) of float64 on the CPU, as `draws.Sample.steps`, filled up with `Op.NONE`.
        fill: A value for each channel, for what a geometric operation brings in from outside.
    """
    if images.device.type == 'cuda' and images.shape[1] in (1, 3):
        return _apply_on_gpu(images, steps, fill)
    jobs: List[Tuple[Callable[..., torch.Tensor], int]] = []
    rows, arguments = [np.zeros(0, np.int64)], [np.zeros((0, steps.shape[-1]))]
    table = steps.numpy()
    for layer in range(table.shape[1]):
        codes = table[:, layer, 0].astype(np.int64)
        for operator, members in _OPERATORS:
            chosen = np.flatnonzero(np.isin(codes, members))
            if len(chosen):
                jobs.append((operator, len(chosen)))
                rows.append(chosen)
                arguments.append(table[chosen, layer])
    # one copy to the device for all of them
    index = torch.from_numpy(np.concatenate(rows)).to(images.device, non_blocking=True)
    values = torch.from_numpy(np.concatenate(arguments))
    moved = values.to(images.device, non_blocking=True)
    start = 0
    for operator, count in jobs:
        part = slice(start, start + count)
        chosen_images = images.index_select(0, index[part])
        images.index_copy_(0, index[part], operator(chosen_images, moved[part], values[part], fill))
        start += count
    return images


def _apply_on_gpu(images: torch.Tensor, steps: torch.Tensor, fill: Sequence[int]) -> torch.Tensor:
    from .kernels import operate

    moved = steps.to(images.device, non_blocking=True)
    for layer, codes in enumerate(steps[:, :, 0].unbind(1)):
        if not codes.any():
            continue
        images = operate(images, moved, layer, fill)
        blurred = (codes == Op.BLUR).nonzero().flatten()
        if len(blurred):
            index, arguments = blurred.to(images.device, non_blocking=True), steps[blurred, layer]
            images.index_copy_(0, index, _blur(images.index_select(0, index), moved, arguments, fill))
    return images


def _grey(images: torch.Tensor) -> torch.Tensor:
    """(n, 1, H, W) of int32: Image.convert('L')."""
    if images.shape[1] == 1:
        return images.int()
    red, green, blue = images.int().unbind(1)
    return ((red * GREY[0] + green * GREY[1] + blue * GREY[2] + 0x8000) >> 16).unsqueeze(1)


def _blend(low: torch.Tensor, images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Image.blend in float32: low + factor · (image − low), cut to 0…255 and down to whole numbers."""
    low = low.float()
    return (low + factor * (images.float() - low)).clamp_(0, 255).byte()


def _factor(arguments: torch.Tensor) -> torch.Tensor:
    return arguments[:, 2].float().view(-1, 1, 1, 1)


def _look_up(images: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
    """Values of (n, C or 1, 256) tables in place of the images' own."""
    n, channels = images.shape[:2]
    flat = images.reshape(n, channels, -1).long()
    return tables.expand(n, channels, 256).gather(2, flat).view_as(images)


def _histogram(images: torch.Tensor) -> torch.Tensor:
    """(n, C, 256): how often each value occurs."""
    n, channels = images.shape[:2]
    flat = images.reshape(n, channels, -1).long()
    counts = torch.zeros(n, channels, 256, dtype=torch.int64, device=images.device)
    return counts.scatter_add_(2, flat, torch.ones((), dtype=torch.int64, device=images.device).expand_as(flat))


def _point_table(code: int, value: float) -> np.ndarray:
    x = np.arange(256)
    if code == Op.POINT_INVERT:
        table = 255 - x
    elif code == Op.POINT_POSTERIZE:
        bits = min(8, max(0, int(value)))
        table = x & (256 - 2 ** (8 - bits))
    elif code == Op.POINT_SOLARIZE:
        table = np.where(x < value, x, 255 - x)
    elif code == Op.POINT_SOLARIZE_ADD:
        table = np.where(x < 128, np.minimum(255, x + int(value)), x)
    else:  # brightness
        table = (np.float32(value) * x.astype(np.float32)).clip(0, 255)
    return table.astype(np.uint8)


def _point(images: torch.Tensor, _: torch.Tensor, arguments: torch.Tensor, fill: Sequence[int]) -> torch.Tensor:
    tables = np.stack([_point_table(int(code), value) for code, _, value, *_ in arguments.tolist()])
    return _look_up(images, torch.from_numpy(tables).to(images.device, non_blocking=True).unsqueeze(1))


def _autocontrast(images: torch.Tensor, *_: Any) -> torch.Tensor:
    n, channels = images.shape[:2]
    flat = images.reshape(n, channels, -1)
    low, high = (value.double().unsqueeze(2) for value in (flat.amin(2), flat.amax(2)))
    span = (high - low).clamp(min=1)
    scale = torch.full_like(span, 255.0) / span  # `255.0 / span` would multiply by a rounded reciprocal
    values = torch.arange(256, dtype=torch.float64, device=images.device)
    tables = (values * scale + -low * scale).clamp(0, 255)
    return _look_up(images, torch.where(high > low, tables, values).byte())


def _equalize(images: torch.Tensor, *_: Any) -> torch.Tensor:
    counts = _histogram(images)
    values = torch.arange(256, device=images.device)
    last = (values * (counts > 0)).amax(2, keepdim=True)
    step = (counts.sum(2, keepdim=True) - counts.gather(2, last)) // 255
    before = counts.cumsum(2) - counts
    tables = (step // 2 + before) // step.clamp(min=1)
    return _look_up(images, torch.where(step > 0, tables.clamp(max=255), values).byte())


def _contrast(images: torch.Tensor, arguments: torch.Tensor, *_: Any) -> torch.Tensor:
    grey = _grey(images)
    mean = (grey.sum((1, 2, 3)).double() / grey[0].numel() + 0.5).floor().view(-1, 1, 1, 1)
    return _blend(mean, images, _factor(arguments))


def _color(images: torch.Tensor, arguments: torch.Tensor, *_: Any) -> torch.Tensor:
    return _blend(_grey(images), images, _factor(arguments))


def _sharpness(images: torch.Tensor, arguments: torch.Tensor, *_: Any) -> torch.Tensor:
    """The smooth image is ImageFilter.SMOOTH: nine pixels, the middle one five times, over 13; the border as it is."""
    smooth = images.int()
    if min(images.shape[2:]) > 2:
        rows = smooth[:, :, :, :-2] + smooth[:, :, :, 1:-1] + smooth[:, :, :, 2:]
        middle = smooth[:, :, 1:-1, 1:-1]
        total = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:] + 4 * middle
        smooth = smooth.clone()
        smooth[:, :, 1:-1, 1:-1] = (2 * total + 13).div(26, rounding_mode='floor')
    return _blend(smooth, images, _factor(arguments))


def _affine(images: torch.Tensor, arguments: torch.Tensor, _: torch.Tensor, fill: Sequence[int]) -> torch.Tensor:
    """Image.transform(AFFINE) with NEAREST, BILINEAR or BICUBIC; what lies outside takes the fill."""
    n, channels, height, width = images.shape
    filter = arguments[:, 1].view(-1, 1, 1)
    a, b, c, d, e, f = arguments[:, 2:].view(n, 6, 1, 1).unbind(1)
    x = torch.arange(width, dtype=torch.float64, device=images.device) + 0.5
    y = (torch.arange(height, dtype=torch.float64, device=images.device) + 0.5).unsqueeze(1)
    x, y = a * x + b * y + c, d * x + e * y + f
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    shift = torch.where(filter == 0, 0.0, 0.5)
    x, y = x - shift, y - shift
    left, top = x.floor(), y.floor()
    dx, dy = ((full - whole).float() * (filter > 0) for full, whole in ((x, left), (y, top)))
    columns = [(left.long() + step).clamp_(0, width - 1) for step in (-1, 0, 1, 2)]
    rows = [(top.long() + step).clamp_(0, height - 1) * width for step in (-1, 0, 1, 2)]
    flat, cubic = images.reshape(n, channels, -1), filter == 2
    dx, dy, cubic = (item.reshape(n, 1, -1) for item in (dx, dy, cubic.expand_as(dx)))

    def along(values: List[torch.Tensor], part: torch.Tensor) -> torch.Tensor:
        first, second, third, fourth = values
        straight = second + part * (third - second)
        bend = 2 * (first - second) + third - fourth
        curve = second + part * (third - first + part * (bend + part * (second - first + fourth - third)))
        return torch.where(cubic, curve, straight)

    lines = []
    for row in rows:
        places = ((row + column).view(n, 1, -1).expand(n, channels, -1) for column in columns)
        lines.append(along([flat.gather(2, place).float() for place in places], dx))
    values = along(lines, dy).clamp_(0, 255).byte().view_as(images)
    outside = torch.tensor(list(fill), dtype=torch.uint8).to(images.device, non_blocking=True).view(1, -1, 1, 1)
    return torch.where(inside.unsqueeze(1), values, outside)


def _box_weights(radius: float) -> List[int]:
    """Pillow's weights of one pass of its Gaussian blur, three box filters in a row, of 2²⁴."""
    variance = np.float32(radius) * np.float32(radius) / np.float32(3)
    length = np.float32(math.sqrt(12.0 * variance + 1.0))
    whole = math.floor((length - 1.0) / 2.0)
    part = (2 * whole + 1) * (whole * (whole + 1) - 3.0 * variance) / (6.0 * (variance - (whole + 1) * (whole + 1)))
    box = float(np.float32(whole + part))
    inner = int(2**24 / (2 * box + 1))
    outer = (2**24 - (2 * int(box) + 1) * inner) // 2
    return [outer, *[inner] * (2 * int(box) + 1), outer]


def _blur(images: torch.Tensor, _: torch.Tensor, arguments: torch.Tensor, fill: Sequence[int]) -> torch.Tensor:
    """ImageFilter.GaussianBlur: three box filters along each axis, rounded after each."""
    tables = [_box_weights(radius) for radius in arguments[:, 2].tolist()]
    reach = max(len(table) for table in tables) // 2
    filled = [[0] * (reach - len(table) // 2) + table + [0] * (reach - len(table) // 2) for table in tables]
    weights = torch.tensor(filled).to(images.device, non_blocking=True).view(len(tables), -1, 1, 1, 1)
    height, width = images.shape[2:]
    values = images.long()
    for axis, size in ((3, width), (2, height)):
        place = torch.arange(size, device=images.device)
        for _pass in range(3):
            total = torch.full_like(values, 2**23)
            for tap in range(2 * reach + 1):
                total += weights[:, tap] * values.index_select(axis, (place + tap - reach).clamp_(0, size - 1))
            values = total >> 24
    return values.byte()


_OPERATORS: Tuple[Tuple[Callable[..., torch.Tensor], Tuple[int, ...]], ...] = (
    (
        _point,
        (Op.POINT_INVERT, Op.POINT_POSTERIZE, Op.POINT_SOLARIZE, Op.POINT_SOLARIZE_ADD, Op.POINT_BRIGHTNESS),
    ),
    (_autocontrast, (Op.AUTOCONTRAST,)),
    (_equalize, (Op.EQUALIZE,)),
    (_contrast, (Op.CONTRAST,)),
    (_color, (Op.COLOR,)),
    (_sharpness, (Op.SHARPNESS,)),
    (_affine, (Op.AFFINE,)),
    (_blur, (Op.BLUR,)),
)


def normalise(
    images: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, boxes: torch.Tensor, mode: str, generator: Any
) -> torch.Tensor:
    """Images as float32, normalised, with the boxes erased.

    Args:
        images: (B, C, H, W) of uint8.
        mean: (1, C, 1, 1), of values in 0…255.
        std: As `mean`.
        boxes: (B, R, 4) of int64 on the CPU: top, left, height and width, a height of 0 erases nothing.
        mode: What boxes are filled with, timm's const, rand or pixel.
        generator: Draws the filling, on the images' device.
    """
    values = images.float().sub_(mean).div_(std)
    chosen = boxes[:, :, 2].amax(1).nonzero().flatten() if boxes.shape[1] else boxes.new_zeros(0)
    if not len(chosen):
        return values
    index = chosen.to(values.device, non_blocking=True)
    part = values.index_select(0, index)
    y = torch.arange(values.shape[2], device=values.device).view(1, 1, -1, 1)
    x = torch.arange(values.shape[3], device=values.device).view(1, 1, 1, -1)
    for place in boxes[chosen].to(values.device, non_blocking=True).unbind(1):  # a later box lies over an earlier one
        top, left, height, width = place.view(-1, 4, 1, 1, 1).unbind(1)
        inside = (y >= top) & (y < top + height) & (x >= left) & (x < left + width)
        shape = {'pixel': part.shape, 'rand': (*part.shape[:2], 1, 1), 'const': (1, 1, 1, 1)}[mode]
        filling = torch.zeros(shape, device=values.device)
        if mode != 'const':
            filling.normal_(generator=generator)
        part = torch.where(inside, filling, part)
    return values.index_copy_(0, index, part)
