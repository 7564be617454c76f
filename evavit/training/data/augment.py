"""Augmentation as timm draws it, with seeds that follow from the place in the run."""

from itertools import chain
from typing import Any, Iterator, Sequence, Tuple, Union

import torch
from PIL import Image
from timm.data import auto_augment
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision.transforms.functional import get_dimensions

from evavit.errors import UserError
from evavit.training.distributed import Draw, Process


class SeededErasing:
    """timm's random erasing of a batch on the device, whose draws follow from the batch's place in the epoch."""

    def __init__(self, erasing: Any, seed: int, process: Process):
        self.erasing, self.seed, self.process = erasing, seed, process
        self.epoch = self.batch = 0

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        self.process.seed(self.seed, Draw.ERASING, self.epoch, self.batch)
        self.batch += 1
        return self.erasing(images)


def crop_params(
    image: Union[Image.Image, torch.Tensor], scale: Sequence[float], ratio: Sequence[float]
) -> Tuple[int, int, int, int]:
    """(top, left, height, width) of timm's random crop, of one pixel where it would have none: of an image of one pixel
    it asks for 0.08 of that."""
    top, left, height, width = RandomResizedCropAndInterpolation.get_params(image, scale, ratio)
    _, most, widest = get_dimensions(image)
    return min(top, most - 1), min(left, widest - 1), max(1, height), max(1, width)


def posterize(image: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    """timm's posterize, and black for no bits at all: RandAugment asks for that now and then, and Pillow refuses it
    since version 13."""
    return auto_augment.posterize(image, bits_to_keep) if bits_to_keep > 0 else Image.new(image.mode, image.size)


def repair_posterize(transform: Any) -> None:
    """Let the operations of a transform of timm's posterize with the function above."""
    for operation in operations(transform):
        if operation.name.startswith('Posterize'):
            operation.aug_fn = posterize


def check_filter(operation: auto_augment.AugmentOp) -> None:
    """UserError where a policy would turn, shear or shift images by a filter that Pillow has for resizing alone."""
    filter: Any = operation.kwargs.get('resample')
    known = (Image.Resampling.NEAREST, Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)
    moves = operation.name.startswith(('Rotate', 'Shear', 'Translate')) and not isinstance(filter, tuple)
    if moves and filter not in known:
        raise UserError(
            f'aa: Pillow has no {operation.name} with {Image.Resampling(filter).name.lower()}; give '
            f'--train-interpolation bicubic, bilinear, nearest or random'
        )


def operations(transform: Any) -> Iterator[auto_augment.AugmentOp]:
    """The operations of the policies in a transform of timm's."""
    for part in getattr(transform, 'transforms', ()):
        yield from getattr(part, 'ops', ())  # RandAugment, AugMix
        yield from chain.from_iterable(getattr(part, 'policy', ()))  # AutoAugment
