"""Crop and resize of many images at once, to the last bit as Pillow does it.

Pillow resizes along x, rounds to 8 bits, then along y, with weights of 22 bits after the point, of which it makes whole
numbers. The same whole numbers give the same pixels on any device.
"""

from typing import List, Sequence, Tuple

import torch

from .draws import FILTERS, Window

SUPPORT = (0.0, 1.0, 2.0, 3.0)  # of the filters, in pixels of the smaller image
BITS = 22
WIDTH, FULL, OFFSET, FLIP, FILTER = (
    Window._fields.index(name) for name in ('width', 'full_width', 'x', 'flip_x', 'filter')
)  # columns of windows; that of the other axis follows


def reach(windows: torch.Tensor, axis: int) -> torch.Tensor:
    """(B,) int64: weights that an output pixel of each window needs at most along the axis, see `taps`."""
    scale = windows[:, WIDTH + axis].double() / windows[:, FULL + axis]
    support = torch.tensor(SUPPORT, dtype=torch.float64).to(windows.device, non_blocking=True)[windows[:, FILTER]]
    return 2 * (support * scale.clamp(min=1)).ceil().long() + 1


def taps(windows: torch.Tensor, axis: int, count: int, most: int) -> Tuple[torch.Tensor, torch.Tensor]:
    """Where each pixel along an axis begins to read, (B, count), and its weights of 2²², (B, most, count); int32.

    Args:
        windows: (B, 11) of int64: a `draws.Window` for each image.
        axis: 0 is x, 1 is y.
        count: Output pixels.
        most: The largest `reach`.
    """
    device = windows.device
    size, full, offset, flip = (windows[:, first + axis, None] for first in (WIDTH, FULL, OFFSET, FLIP))
    filter = windows[:, FILTER, None]
    place = torch.arange(count, device=device).unsqueeze(0)
    place = torch.where(flip > 0, count - 1 - place, place) + offset
    scale = size.double() / full
    widened = scale.clamp(min=1)
    support = torch.tensor(SUPPORT, dtype=torch.float64).to(device, non_blocking=True)[filter] * widened
    centre = (place + 0.5) * scale
    first = (centre - support + 0.5).long().clamp_(min=0)
    last = torch.minimum((centre + support + 0.5).long(), size)
    nearest = filter == FILTERS['nearest']
    first = torch.where(nearest, centre.long(), first).clamp(min=0).minimum(size - 1)
    outside = (place < 0) | (place >= full)  # of the image: black
    step = torch.arange(most, device=device).view(1, -1, 1)
    x = (((step + first.unsqueeze(1)) - centre.unsqueeze(1) + 0.5) / widened.unsqueeze(1)).abs()
    which = filter.unsqueeze(2)
    weights = torch.where(
        which == FILTERS['bicubic'],
        torch.where(x < 1, (1.5 * x - 2.5) * x * x + 1, torch.where(x < 2, ((2.5 - 0.5 * x) * x - 4) * x + 2, 0.0)),
        torch.where(which == FILTERS['bilinear'], (1 - x).clamp(min=0), torch.sinc(x) * torch.sinc(x / 3) * (x < 3)),
    )
    weights = torch.where(step < (last - first).unsqueeze(1), weights, 0.0)
    weights = torch.where(nearest.unsqueeze(2), (step == 0).double(), weights)
    weights = torch.where(outside.unsqueeze(1), 0.0, weights / weights.sum(1, keepdim=True))
    whole = weights * 2**BITS
    return first.int(), (whole + torch.where(whole < 0, -0.5, 0.5)).int()


def resample(sources: Sequence[torch.Tensor], windows: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The windows of images, (B, C, height, width) of uint8 on their device.

    Args:
        sources: Whole images, (C, H, W) of uint8 each, of any sizes; the last axis is contiguous.
        windows: (B, 11) of int64 on the CPU: a `draws.Window` for each.
        height, width: Of the output.
    """
    device = sources[0].device
    most = [int(reach(windows, axis).max()) for axis in (0, 1)]
    moved = windows.to(device, non_blocking=True)
    x_taps, y_taps = taps(moved, 0, width, most[0]), taps(moved, 1, height, most[1])
    if device.type == 'cuda':
        from .kernels import resample_boxes

        return resample_boxes(sources, windows, x_taps, y_taps)
    images: List[torch.Tensor] = []
    for number, (source, window) in enumerate(zip(sources, windows.tolist(), strict=True)):
        left, top, box_w, box_h = window[:4]
        box = source[:, top : top + box_h, left : left + box_w].int()
        for dim, (first, weights) in ((2, x_taps), (1, y_taps)):
            box = along(box, dim, first[number], weights[number])
        images.append(box.byte())
    return torch.stack(images)


def along(image: torch.Tensor, dim: int, first: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """One pass of one image, (C, H, W) of int32: the weighted sum of the pixels from `first` on, along `dim`."""
    total: torch.Tensor = torch.full((), 2 ** (BITS - 1), dtype=torch.int32)
    shape = (-1, 1) if dim == 1 else (-1,)
    for step, weight in enumerate(weights):
        pixels = image.index_select(dim, (first + step).clamp(max=image.shape[dim] - 1))
        total = total + pixels * weight.view(shape)
    return (total >> BITS).clamp_(0, 255)
