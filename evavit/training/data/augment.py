"""Augmentation as timm draws it, with seeds that follow from the place in the run."""

from itertools import chain
from typing import Any, Iterator

import torch
from PIL import Image
from timm.data import auto_augment

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


def posterize(image: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    """timm's posterize, and black for no bits at all: RandAugment asks for that now and then, and Pillow refuses it
    since version 13."""
    return auto_augment.posterize(image, bits_to_keep) if bits_to_keep > 0 else Image.new(image.mode, image.size)


def repair_posterize(transform: Any) -> None:
    """Let the operations of a transform of timm's posterize with the function above."""
    for operation in operations(transform):
        if operation.name.startswith('Posterize'):
            operation.aug_fn = posterize


def operations(transform: Any) -> Iterator[auto_augment.AugmentOp]:
    """The operations of the policies in a transform of timm's."""
    for part in getattr(transform, 'transforms', ()):
        yield from getattr(part, 'ops', ())  # RandAugment, AugMix
        yield from chain.from_iterable(getattr(part, 'policy', ()))  # AutoAugment
