"""The CPU path's transform beside timm's own, on photographs: the same draws, and pixels within stated bounds."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment, create_transform
from timm.data.transforms import RandomResizedCropAndInterpolation
from training.data.device.pictures import MEAN, STD, photographs, tensor

from evavit.training.data.augment import crop_params, operations, repair_posterize
from evavit.training.data.transforms import SHIFTS, VECTORS, FastCrop, shift, speed_up
from evavit.training.distributed import seed_sample

SIZES = ((500, 375), (375, 500), (1200, 900), (120, 90))
POLICIES = ('rand-m9-mstd0.5-inc1', 'original-mstd0.5', '3a', 'augmix-m5-w4-d2', None)


def both(size=224, **settings):
    """timm's transform, and ours."""
    made = []
    for _ in range(2):
        settings = dict(interpolation='bicubic', scale=(0.08, 1.0), color_jitter=0.3) | settings
        rest = dict(mean=MEAN, std=STD, is_training=True, use_prefetcher=True)
        made.append(create_transform((3, size, size), **rest, **settings))
        repair_posterize(made[-1])
    speed_up(made[1])
    return made


def seeded(function, image, seed):
    """What a function makes of an image, and the next draw of each generator."""
    seed_sample(seed)
    return function(image), (random.random(), np.random.rand(), float(torch.rand(1)))


def apart(one, other):
    return np.abs(np.asarray(one).astype(int) - np.asarray(other).astype(int))


@pytest.fixture(scope='module')
def images():
    return [image for size in SIZES for image in photographs(*size, 8)]


@pytest.mark.skipif(not VECTORS, reason='there Pillow resizes')
@pytest.mark.parametrize('interpolation', ['bilinear', 'bicubic', 'random'])
def test_a_crop_differs_by_rounding_alone(images, interpolation):
    theirs, ours = (transform.transforms[0] for transform in both(interpolation=interpolation))
    assert isinstance(ours, FastCrop)
    means = []
    for seed, image in enumerate(images):
        (expected, draws), (made, same) = seeded(theirs, image, seed), seeded(ours, image, seed)
        assert made.mode == 'RGB' and draws == same
        difference = apart(made, expected)
        assert difference.max() <= 2
        means.append(difference.mean())
    assert 0 < np.mean(means) < 0.01 and max(means) < 0.05


@pytest.mark.skipif(not VECTORS, reason='there Pillow resizes')
def test_a_crop_of_a_tensor_is_that_of_the_image(images):
    for interpolation in ('bicubic', 'random'):
        _, ours = both(interpolation=interpolation)
        for seed, image in enumerate(images):
            (expected, draws), (made, same) = (
                seeded(ours.transforms[0], given, seed) for given in (image, tensor([image])[0])
            )
            assert draws == same and not apart(made, expected).any()


@pytest.mark.parametrize('policy', POLICIES)
def test_the_whole_transform_beside_timm_s(images, policy):
    """Operations such as equalize and solarize enlarge a level's difference: of few images, by little on average."""
    theirs, ours = both(auto_augment=policy)
    means = []
    for seed, image in enumerate(images * 2):
        (expected, draws), (made, same) = seeded(theirs, image, seed), seeded(ours, image, seed)
        assert draws == same and made.shape == expected.shape and made.is_contiguous()
        means.append(apart(made, expected).mean())
    assert np.mean(means) < 0.02 and max(means) < 0.3


@pytest.mark.parametrize(
    'settings, mode',
    [
        (dict(), 'L'),
        (dict(interpolation='lanczos', auto_augment=None), 'RGB'),  # which Pillow's affine does not have
        (dict(size=64), 'RGB'),  # Tiny-ImageNet's, CIFAR's
        (dict(scale=(1.0, 1.0), ratio=(1.0, 1.0)), 'whole'),  # no resizing: all other parts are Pillow's to the bit
    ],
)
def test_what_else_is_timm_s_to_the_bit(images, settings, mode):
    theirs, ours = both(**dict(auto_augment=POLICIES[0]) | settings)
    for seed, image in enumerate(images):
        image = image.resize((224, 224)) if mode == 'whole' else image.convert(mode)
        if mode == 'L':
            for operation in (*operations(theirs), *operations(ours)):
                operation.kwargs['fillcolor'] = (124,)
        (expected, draws), (made, same) = seeded(theirs, image, seed), seeded(ours, image, seed)
        assert torch.equal(made, expected) and draws == same


@pytest.mark.parametrize('side', [8, 224])
@pytest.mark.parametrize('size', [(1, 1), (1, 60), (40, 40)])
def test_a_crop_has_a_pixel(size, side):
    """timm's asks for none of a small image, or by a small scale."""
    image = Image.new('RGB', size, (200, 100, 0))
    scale = (1e-9, 1e-8) if size == (40, 40) else (0.08, 1.0)
    crop = FastCrop(RandomResizedCropAndInterpolation((side, side), scale, interpolation='bicubic'))
    for seed in range(60):
        seed_sample(seed)
        assert crop(image).getpixel((0, 0)) == (200, 100, 0)
        top, left, height, width = crop_params(image, scale, (0.01, 0.02))
        assert 0 <= left < left + width <= size[0] and 0 <= top < top + height <= size[1]


@pytest.mark.parametrize('mode, fill', [('RGB', (124, 116, 104)), ('L', (120,))])
@pytest.mark.parametrize('amount', [0.0, 0.3, -0.3, 0.1234, -0.0071, 1.0])
def test_shears_and_translations_are_pillow_s(mode, fill, amount):
    """Shears of any factor; translations by part of the width, which at 1 leaves nothing."""
    for image in (image.convert(mode) for image in (*photographs(224, 224), *photographs(200, 131))):
        width, height = image.size
        for matrix in (
            (1, amount, 0, 0, 1, 0),
            (1, 0, 0, amount, 1, 0),
            (1, 0, amount * width, 0, 1, 0),
            (1, 0, 0, 0, 1, amount * height),
        ):
            expected = image.transform(
                image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=fill
            )
            assert not apart(shift(image, matrix, fill), expected).any(), matrix


def test_all_of_timm_s_shears_and_translations_are_replaced():
    names = {name for name in auto_augment.NAME_TO_OP if name.startswith(('Shear', 'Translate'))}
    assert {auto_augment.NAME_TO_OP[name] for name in names} == set(SHIFTS)
    _, ours = both(auto_augment='rand-m9')
    assert sum(operation.aug_fn not in auto_augment.NAME_TO_OP.values() for operation in operations(ours)) == 5
