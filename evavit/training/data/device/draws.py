"""What is drawn for an image, without the image: its crop, its flips, its operations, the boxes that are erased.

timm's own transforms draw, from the generators that the CPU path seeds for the image; only what they would do to its
pixels is written down instead. So both paths draw the same, whatever the policy.
"""

import math
import random
from enum import IntEnum
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from PIL import Image
from timm.data import auto_augment, transforms
from timm.data.random_erasing import RandomErasing
from torchvision import transforms as torchvision_transforms

from evavit.errors import UserError
from evavit.training.data.augment import check_filter, crop_params
from evavit.training.data.decode import Jpeg

FILTERS = {'nearest': 0, 'bilinear': 1, 'bicubic': 2, 'lanczos': 3}  # as the windows below name them
PILLOW = (Image.Resampling.NEAREST, Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS)
GREY = (19595, 38470, 7471)  # of 65536: Pillow's weights of red, green and blue
STEP = 8  # numbers of a step: operator, filter, six arguments


class Op(IntEnum):
    """The operators that a step can name."""

    NONE = 0
    POINT_INVERT = 1
    POINT_POSTERIZE = 2
    POINT_SOLARIZE = 3
    POINT_SOLARIZE_ADD = 4
    POINT_BRIGHTNESS = 5
    AUTOCONTRAST = 6
    EQUALIZE = 7
    CONTRAST = 8
    COLOR = 9
    SHARPNESS = 10
    AFFINE = 11
    BLUR = 12


class Window(NamedTuple):
    """How an image becomes one of the batch: its box (left, top, width, height) is resized to `full_width` ×
    `full_height`, of which the part at (`x`, `y`) is kept, black where it lies outside, then flipped."""

    left: int
    top: int
    width: int
    height: int
    full_width: int
    full_height: int
    x: int
    y: int
    flip_x: int
    flip_y: int
    filter: int


class Stored(NamedTuple):
    """An image that is on the device already: its number there, and its size."""

    number: int
    size: Tuple[int, int]


class Sample(NamedTuple):
    """An image for the batch. `content` is a JPEG file, the number of a stored image, or the pixels (channels, height,
    width) where the CPU has made the window already."""

    content: Union[bytes, int, np.ndarray]
    window: Window
    steps: List[Tuple[float, ...]]
    boxes: List[Tuple[int, int, int, int]]  # erased: top, left, height, width
    size: Tuple[int, int]  # of the whole image
    number: int = -1  # in the data set, which a stream does not have
    name: str = ''  # in a stream


class _Plan:
    """Stands for the image where timm's operations work on it: they leave their steps."""

    def __init__(self, size: Tuple[int, int]):
        self.size = size
        self.steps: List[Tuple[float, ...]] = []

    def add(self, op: Op, *arguments: float, filter: int = 0) -> '_Plan':
        step = (float(op), float(filter), *map(float, arguments))
        self.steps.append(step + (0.0,) * (STEP - len(step)))
        return self


class _Erased:
    """Stands for the image where timm's RandomErasing fills boxes of it: they are written down."""

    dtype = torch.float32

    def __init__(self, shape: Tuple[int, ...]):
        self.shape = shape
        self.boxes: List[Tuple[int, int, int, int]] = []

    def size(self) -> Tuple[int, ...]:
        return self.shape

    def __setitem__(self, place: Tuple[slice, slice, slice], value: torch.Tensor) -> None:
        _, rows, columns = place
        self.boxes.append((rows.start, columns.start, rows.stop - rows.start, columns.stop - columns.start))


def _affine(plan: _Plan, matrix: Sequence[float], resample: Any) -> _Plan:
    choice = random.choice(resample) if isinstance(resample, (list, tuple)) else resample
    if choice == Image.Resampling.NEAREST and (matrix[1] or matrix[3]):
        matrix = [*_in_steps(*matrix[:3]), *_in_steps(*matrix[3:])]
    return plan.add(Op.AFFINE, *matrix, filter=PILLOW.index(choice))


def _in_steps(x: float, y: float, start: float) -> List[float]:
    """A row of a matrix in steps of 2⁻¹⁶, in which Pillow counts places for NEAREST from the first pixel's centre."""
    x_step, y_step, first = (math.floor(value * 65536 + 0.5) / 65536 for value in (x, y, start + x * 0.5 + y * 0.5))
    return [x_step, y_step, first - 0.5 * (x_step + y_step)]


def _rotation(size: Tuple[int, int], degrees: float) -> List[float]:
    """The matrix of Image.rotate, which maps places of the output to the input."""
    angle = -math.radians(degrees % 360.0)
    cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
    x, y = size[0] / 2, size[1] / 2
    return [cos, sin, -x * cos - y * sin + x, -sin, cos, x * sin - y * cos + y]


_Record = Callable[..., _Plan]
# timm's operations by the functions that they call, each with what it leaves of its arguments
_RECORDS: Dict[str, _Record] = {
    'Rotate': lambda plan, degrees, resample, **_: _affine(plan, _rotation(plan.size, degrees), resample),
    'ShearX': lambda plan, factor, resample, **_: _affine(plan, (1, factor, 0, 0, 1, 0), resample),
    'ShearY': lambda plan, factor, resample, **_: _affine(plan, (1, 0, 0, factor, 1, 0), resample),
    'TranslateX': lambda plan, pixels, resample, **_: _affine(plan, (1, 0, pixels, 0, 1, 0), resample),
    'TranslateY': lambda plan, pixels, resample, **_: _affine(plan, (1, 0, 0, 0, 1, pixels), resample),
    'TranslateXRel': lambda plan, part, resample, **_: _affine(plan, (1, 0, part * plan.size[0], 0, 1, 0), resample),
    'TranslateYRel': lambda plan, part, resample, **_: _affine(plan, (1, 0, 0, 0, 1, part * plan.size[1]), resample),
    'AutoContrast': lambda plan, **_: plan.add(Op.AUTOCONTRAST),
    'Equalize': lambda plan, **_: plan.add(Op.EQUALIZE),
    'Invert': lambda plan, **_: plan.add(Op.POINT_INVERT),
    'Posterize': lambda plan, bits, **_: plan.add(Op.POINT_POSTERIZE, bits),
    'Solarize': lambda plan, thresh, **_: plan.add(Op.POINT_SOLARIZE, thresh),
    'SolarizeAdd': lambda plan, add, **_: plan.add(Op.POINT_SOLARIZE_ADD, add),
    'Color': lambda plan, factor, **_: plan.add(Op.COLOR, factor),
    'Contrast': lambda plan, factor, **_: plan.add(Op.CONTRAST, factor),
    'Brightness': lambda plan, factor, **_: plan.add(Op.POINT_BRIGHTNESS, factor),
    'Sharpness': lambda plan, factor, **_: plan.add(Op.SHARPNESS, factor),
    'Desaturate': lambda plan, factor, **_: plan.add(Op.COLOR, min(1.0, max(0.0, 1.0 - factor))),
    'GaussianBlur': lambda plan, radius, **_: plan.add(Op.BLUR, radius),
    'GaussianBlurRand': lambda plan, factor, **_: plan.add(Op.BLUR, random.uniform(0.1, 2.0 * factor)),
}


def _record_of(name: str) -> Optional[_Record]:
    for ending in ('', 'Increasing', 'Original'):
        if name.endswith(ending) and name[: len(name) - len(ending)] in _RECORDS:
            return _RECORDS[name[: len(name) - len(ending)]]
    return None


class Draws:
    """Takes the place of a timm transform: draws what it draws, in its order, and leaves a `Sample`.

    Args:
        transform: timm's, of training or validation.
        input_size: Channels, height and width of the batch.
        erasing: Arguments of timm's RandomErasing; None erases nothing.

    Raises:
        UserError: The transform has a part that the device path does not have.
    """

    def __init__(self, transform: Any, input_size: Sequence[int], erasing: Optional[Dict[str, Any]] = None):
        self.channels, self.height, self.width = input_size
        # what it would fill with is drawn on the device
        self.erasing = RandomErasing(**{**erasing, 'mode': 'const'}, device='meta') if erasing else None
        self.fill: Tuple[int, ...] = (128,) * self.channels
        self.parts = [part for part in transform.transforms if not isinstance(part, transforms.MaybePILToTensor)]
        for part in self.parts:
            if isinstance(part, (auto_augment.RandAugment, auto_augment.AutoAugment)):
                self._prepare(part)
            elif not isinstance(part, _KNOWN):
                raise UserError(
                    f"--augment-device cuda does not have timm's {type(part).__name__}; change it, or give "
                    f'--augment-device cpu'
                )

    def _prepare(self, policy: Any) -> None:
        if isinstance(policy, auto_augment.RandAugment):
            operations = list(policy.ops)
        else:
            operations = [op for group in policy.policy for op in group]
        for operation in operations:
            record = _record_of(operation.name)
            if record is None:
                raise UserError(f'--augment-device cuda does not have {operation.name}; give --augment-device cpu')
            check_filter(operation)
            operation.aug_fn = record
            self.fill = tuple(operation.kwargs['fillcolor'])

    def __call__(self, image: Union[Jpeg, Stored, Image.Image]) -> Sample:
        window, steps = self._draw(image.size)
        erased = _Erased((self.channels, self.height, self.width))
        if self.erasing is not None:
            self.erasing(erased)
        content: Union[bytes, int, np.ndarray]
        if isinstance(image, Jpeg):
            content = image.content
        elif isinstance(image, Stored):
            content = image.number
        else:
            content = cut(image, window, (self.width, self.height))
        name = image.name.replace('\0', '') if isinstance(image, Jpeg) else ''
        return Sample(content, window, steps, erased.boxes, image.size, name=name)

    def _draw(self, size: Tuple[int, int]) -> Tuple[Window, List[Tuple[float, ...]]]:
        box, full, place, flips, filter = (0, 0, *size), size, (0, 0), [0, 0], 0
        plan = _Plan((self.width, self.height))
        for part in self.parts:
            if isinstance(part, transforms.RandomResizedCropAndInterpolation):
                top, left, height, width = crop_params(_shape(size), part.scale, part.ratio)
                box, full = (left, top, width, height), (part.size[1], part.size[0])
                filter = _filter(part.interpolation)
            elif isinstance(part, transforms.ResizeKeepRatio):
                full = part.get_params(_shape(size), part.size, part.longest)[::-1]
                filter = _filter(part.interpolation)
            elif isinstance(part, torchvision_transforms.Resize):
                full, filter = _resized(size, part.size), _filter(part.interpolation)
            elif isinstance(part, torchvision_transforms.CenterCrop):
                place = (_centred(full[0], part.size[1]), _centred(full[1], part.size[0]))
            elif isinstance(part, torchvision_transforms.RandomHorizontalFlip):
                flips[0] = int(torch.rand(1) < part.p)
            elif isinstance(part, torchvision_transforms.RandomVerticalFlip):
                flips[1] = int(torch.rand(1) < part.p)
            elif isinstance(part, torchvision_transforms.ColorJitter):
                _jitter(plan, part)
            else:
                part(plan)
        return Window(*box, *full, *place, flips[0], flips[1], filter), plan.steps


_KNOWN = (
    transforms.RandomResizedCropAndInterpolation,
    transforms.ResizeKeepRatio,
    torchvision_transforms.Resize,
    torchvision_transforms.CenterCrop,
    torchvision_transforms.RandomHorizontalFlip,
    torchvision_transforms.RandomVerticalFlip,
    torchvision_transforms.ColorJitter,
)


def _centred(full: int, size: int) -> int:
    """Where torchvision's CenterCrop begins along an axis: before it, where it pads with black."""
    return round((full - size) / 2.0) if full >= size else -((size - full) // 2)


def _shape(size: Tuple[int, int]) -> torch.Tensor:
    """An image that has a size alone."""
    return torch.empty((1, size[1], size[0]), device='meta')


def _filter(interpolation: Any) -> int:
    choice = random.choice(interpolation) if isinstance(interpolation, (tuple, list)) else interpolation
    if choice.value not in FILTERS:
        raise UserError(
            f'--augment-device cuda does not resize by {choice.value}; set --interpolation to one of '
            f'{", ".join(FILTERS)}, or give --augment-device cpu'
        )
    return FILTERS[choice.value]


def _resized(size: Tuple[int, int], target: Any) -> Tuple[int, int]:
    """(width, height) to which torchvision's Resize brings an image."""
    if not isinstance(target, int) and len(target) == 2:
        return target[1], target[0]
    target = target if isinstance(target, int) else target[0]
    short, long = min(size), int(target * max(size) / min(size))
    return (target, long) if size[0] == short else (long, target)


def _jitter(plan: _Plan, part: Any) -> None:
    order, *factors = part.get_params(part.brightness, part.contrast, part.saturation, part.hue)
    for number in order.tolist():
        if factors[number] is not None:  # timm asks for no hue
            plan.add((Op.POINT_BRIGHTNESS, Op.CONTRAST, Op.COLOR)[number], factors[number])


def cut(image: Image.Image, window: Window, size: Tuple[int, int]) -> np.ndarray:
    """The window of an image as Pillow makes it, (channels, height, width) of uint8."""
    left, top, width, height = window[:4]
    full = (window.full_width, window.full_height)
    part = image.crop((left, top, left + width, top + height)).resize(full, PILLOW[window.filter])
    part = part.crop((window.x, window.y, window.x + size[0], window.y + size[1]))
    pixels = np.asarray(part)
    pixels = pixels[:: -1 if window.flip_y else 1, :: -1 if window.flip_x else 1]
    return np.ascontiguousarray(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))
