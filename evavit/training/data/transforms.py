"""timm's training transform with its slow parts replaced, for the CPU path.

timm's classes and functions still draw, and in their order. PyTorch resizes the random crop, of an image or of a tensor
that torchvision has decoded, and rounds in another way than Pillow does; all else gives Pillow's bytes.
"""

import random
from functools import partial
from typing import Any, Callable, Sequence, Union

import numpy as np
import torch
from PIL import Image
from timm.data import auto_augment
from timm.data.transforms import MaybePILToTensor, RandomResizedCropAndInterpolation
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resized_crop

from evavit.training.data.augment import crop_params, operations

_BOTH = (InterpolationMode.BILINEAR, InterpolationMode.BICUBIC)
RESIZED = (*_BOTH, _BOTH)  # interpolations that PyTorch has for bytes; of a tuple, timm draws one
VECTORS = torch.backends.cpu.get_cpu_capability() in ('AVX2', 'AVX512')  # without them PyTorch is the slower one
SMALL = 2**13  # pixels of an output up to which Pillow is about as fast
SHIFTS = (
    auto_augment.shear_x,
    auto_augment.shear_y,
    auto_augment.translate_x_abs,
    auto_augment.translate_y_abs,
    auto_augment.translate_x_rel,
    auto_augment.translate_y_rel,
)


def speed_up(transform: Any) -> bool:
    """Replace the slow parts of a training transform of timm's. Returns whether it then takes RGB images as tensors
    (3, H, W) of uint8, too."""
    for place, part in enumerate(transform.transforms):
        if isinstance(part, RandomResizedCropAndInterpolation):
            transform.transforms[place] = FastCrop(part)
        elif isinstance(part, MaybePILToTensor):
            transform.transforms[place] = to_planes
    for operation in operations(transform):
        if operation.aug_fn in SHIFTS:
            operation.aug_fn = partial(_with_shift, operation.aug_fn)  # type: ignore[assignment]
    return isinstance(transform.transforms[0], FastCrop) and transform.transforms[0].here


class FastCrop:
    """timm's random resized crop, which PyTorch resizes where it is the faster one: in whole numbers, so that all
    processors that do so give the same bytes."""

    def __init__(self, crop: RandomResizedCropAndInterpolation):
        self.crop = crop
        self.here = VECTORS and crop.interpolation in RESIZED and crop.size[0] * crop.size[1] > SMALL

    def __call__(self, image: Union[Image.Image, torch.Tensor]) -> Image.Image:
        top, left, height, width = crop_params(image, self.crop.scale, self.crop.ratio)
        choice = self.crop.interpolation
        filter = random.choice(choice) if isinstance(choice, tuple) else choice
        if isinstance(image, Image.Image) and not (self.here and image.mode == 'RGB'):
            return resized_crop(image, top, left, height, width, self.crop.size, filter)
        if isinstance(image, torch.Tensor):
            pixels = image[:, top : top + height, left : left + width].permute(1, 2, 0)
        else:
            pixels = torch.from_numpy(np.array(image.crop((left, top, left + width, top + height))))
        channels_last = pixels[None].permute(0, 3, 1, 2)
        resized = torch.nn.functional.interpolate(channels_last, self.crop.size, mode=filter.value, antialias=True)
        return Image.fromarray(resized[0].permute(1, 2, 0).numpy())


def to_planes(image: Image.Image) -> torch.Tensor:
    """(C, H, W) of uint8, contiguous: a batch is then put together by copies of whole images."""
    planes = bytearray(b''.join(image.tobytes('raw', band) for band in image.getbands()))
    return torch.frombuffer(planes, dtype=torch.uint8).view(-1, image.height, image.width)


class _Shifted:
    """Stands for the image in timm's shears and translations, which call its `transform`."""

    def __init__(self, image: Image.Image):
        self.image, self.size = image, image.size

    def transform(self, size: Any, method: Any, matrix: Any, resample: Any, fillcolor: Any) -> Image.Image:
        large = self.size[0] * self.size[1] > SMALL
        if large and resample == Image.Resampling.BICUBIC and self.image.mode in ('L', 'RGB'):
            return shift(self.image, matrix, fillcolor)
        return self.image.transform(size, method, matrix, resample=resample, fillcolor=fillcolor)


def _with_shift(operation: Callable[..., Image.Image], image: Image.Image, *arguments: Any, **rest: Any) -> Image.Image:
    return operation(_Shifted(image), *arguments, **rest)


def shift(image: Image.Image, matrix: Sequence[float], fill: Sequence[int]) -> Image.Image:
    """`Image.transform(AFFINE, BICUBIC)` of a matrix that moves rows along x or columns along y, to the last bit.

    Pillow weighs 16 pixels for each, of which 12 have the weight 0 here.

    Args:
        image: RGB or L.
        matrix: (1, b, c, 0, 1, 0) or (1, 0, 0, d, 1, f).
        fill: A value for each channel, for what comes from outside.
    """
    width, height = image.size
    _, b, c, d, _, f = matrix
    x, y = np.arange(width), np.arange(height)[:, None]
    along_x = not (d or f)
    # Where each pixel is taken from, in double and in the order of Pillow's sums; pixels have their centres at halves.
    place = ((x + 0.5) + b * (y + 0.5)) + c if along_x else (d * (x + 0.5) + (y + 0.5)) + f
    size = width if along_x else height
    outside = (place < 0) | (place >= size)
    moved = np.floor(b * (y + 0.5) + c if along_x else d * (x + 0.5) + f)
    part = torch.from_numpy(place - 0.5 - (moved + (x if along_x else y)))
    reach, moved = np.arange(-1, size + 2), moved.astype(np.int64)
    if along_x:
        index = np.clip(reach + moved, 0, width - 1) + width * y
    else:
        index = width * np.clip(reach[:, None] + moved, 0, height - 1) + x
    planes, values = [], torch.empty(height, width, dtype=torch.float64)
    for plane, value in zip(to_planes(image).flatten(1).numpy(), fill, strict=True):
        near = torch.from_numpy(plane.take(index)).short()
        first, second, third, fourth = (near.narrow(1 if along_x else 0, step, size) for step in range(4))
        left, right = first - second, third - fourth
        values.copy_(left + right).neg_()
        for term in (left.mul_(2).add_(right), third - first, second):
            values.mul_(part).add_(term)
        made = values.clamp_(0, 255).numpy().astype(np.uint8)  # cut, as by Pillow
        made[outside] = value
        planes.append(Image.fromarray(made))
    return Image.merge(image.mode, planes)
