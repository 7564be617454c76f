"""The operators of the device path beside Pillow: every operation of timm's at many magnitudes, on photographs."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment
from training.data.device.pictures import photographs, tensor

from evavit.training.data.augment import posterize
from evavit.training.data.device.draws import Op, _Plan, _record_of
from evavit.training.data.device.operators import apply_steps

Resampling = Image.Resampling
FILL = (124, 116, 104)
MAGNITUDES = (0, 0.4, 1, 3.3, 5, 7.7, 9, 10)
GEOMETRY = ('Rotate', 'ShearX', 'ShearY', 'TranslateX', 'TranslateY', 'TranslateXRel', 'TranslateYRel')
# Mean absolute difference in 8-bit levels; 0 is equal to the bit. Places are float64 and values float32, Pillow's are
# all double: where a value is whole, one of the two may cut it down.
BOUNDS = {Resampling.BILINEAR: 0.02, Resampling.BICUBIC: 0.02, Resampling.NEAREST: 0}
DEVICES = ['cpu', pytest.param('cuda', marks=pytest.mark.gpu)]


def operation(name, magnitude, interpolation):
    hparams = dict(img_mean=FILL, interpolation=interpolation, translate_const=28)
    operation = auto_augment.AugmentOp(name, prob=1.0, magnitude=magnitude, hparams=hparams)
    if name.startswith('Posterize'):
        operation.aug_fn = posterize
    return operation


def both(name, interpolation, images, device):
    """What Pillow and what the operators make of images at every magnitude: two arrays."""
    expected, inputs, steps = [], [], []
    for seed, magnitude in enumerate(MAGNITUDES):
        of_pillow, recorded = operation(name, magnitude, interpolation), operation(name, magnitude, interpolation)
        recorded.aug_fn = _record_of(name)
        for image in images:
            random.seed(seed)
            expected.append(np.array(of_pillow(image)))
            random.seed(seed)
            steps.append(recorded(_Plan(image.size)).steps)
            inputs.append(image)
    made = apply_steps(tensor(inputs, device), torch.tensor(steps, dtype=torch.float64), FILL)
    return np.stack(expected).astype(int), made.permute(0, 2, 3, 1).cpu().numpy().astype(int)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('name', sorted(auto_augment.NAME_TO_OP))
def test_each_operation_is_pillow_s(name, device):
    odd = [
        Image.new('RGB', (64, 48), (7, 200, 255)),
        Image.fromarray(np.arange(9216, dtype=np.uint8).reshape(48, 64, 3)),
    ]
    images = [*photographs(64, 48), *odd]
    for interpolation in BOUNDS if name in GEOMETRY else [Resampling.BICUBIC]:
        expected, made = both(name, interpolation, images, device)
        difference = np.abs(expected - made)
        print(f'{name} {interpolation.name}: mean {difference.mean():.5f}, most {difference.max()}')
        if name in GEOMETRY:
            assert difference.mean() <= BOUNDS[interpolation]
            assert difference.max() <= 1
        else:
            assert not difference.any()


@pytest.mark.parametrize('device', DEVICES)
def test_grey_images(device):
    image = photographs(40, 32)[0].convert('L')
    for name in ('Color', 'Contrast', 'Equalize', 'AutoContrast', 'Sharpness', 'Solarize', 'Rotate'):
        hparams = dict(img_mean=(120,), interpolation=Resampling.BICUBIC, translate_const=20)
        plain, recorded = (auto_augment.AugmentOp(name, prob=1.0, magnitude=7, hparams=hparams) for _ in range(2))
        plain.kwargs['fillcolor'], recorded.aug_fn = 120, _record_of(name)
        random.seed(0)
        expected = np.array(plain(image)).astype(int)
        random.seed(0)
        steps = torch.tensor([recorded(_Plan(image.size)).steps], dtype=torch.float64)
        made = apply_steps(torch.from_numpy(np.array(image))[None, None].to(device), steps, (120,))
        assert np.abs(made[0, 0].cpu().numpy() - expected).mean() <= (0.02 if name == 'Rotate' else 0)


def test_a_step_works_on_the_images_that_drew_it():
    images = tensor(photographs(32, 24, 3))
    steps = torch.zeros(3, 2, 8, dtype=torch.float64)
    steps[1, 0, 0] = 1.0  # inverted once
    steps[2, :, 0] = 1.0  # inverted twice
    made = apply_steps(images.clone(), steps, FILL)
    assert torch.equal(made[0], images[0]) and torch.equal(made[1], 255 - images[1]) and torch.equal(made[2], images[2])


@pytest.mark.interpreter
@pytest.mark.parametrize('channels', [1, 3])
def test_kernels_are_the_plain_form(channels, monkeypatch):
    """Every operator but the blur, at odd sizes, some of them on images of one colour, to the bit."""
    from evavit.training.data.device import kernels

    monkeypatch.setattr(kernels, 'PIXELS', 1024)  # two programs an image are enough here
    images = torch.stack([tensor(photographs(37, 29), 'cpu')[0], torch.full((3, 29, 37), 200, dtype=torch.uint8)])
    draw = random.Random(0)
    pool, steps = [], []
    for name in sorted(auto_augment.NAME_TO_OP):
        record = _record_of(name)
        for interpolation in BOUNDS if name in ('Rotate', 'TranslateX') else [Resampling.BICUBIC]:
            made = operation(name, draw.choice(MAGNITUDES[1:]), interpolation)
            made.aug_fn = record
            for image in images:
                pool.append(image[:channels])
                steps.append(made(_Plan((37, 29))).steps)
    steps = torch.tensor([step or [(0.0,) * 8] for step in steps], dtype=torch.float64)
    kept, steps = steps[:, 0, 0] != Op.BLUR, steps[:, [0]]
    images, steps = torch.stack(pool)[kept], steps[kept]
    assert set(steps[:, 0, 0].int().tolist()) >= set(range(1, Op.AFFINE + 1))
    expected = apply_steps(images.clone(), steps, FILL[:channels])
    for code in steps[:, 0, 0].unique():
        rows = steps[:, 0, 0] == code
        assert torch.equal(kernels.operate(images[rows], steps[rows], 0, FILL[:channels]), expected[rows]), Op(
            int(code)
        )


@pytest.mark.parametrize('channels', [1, 3])
def test_kernels_compile_for_a_gpu(channels):
    """The interpreter takes what Triton's compiler refuses, such as a name of two types."""
    pytest.importorskip('triton')
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from evavit.training.data.device import kernels

    for kernel in (kernels._measure, kernels._operate):
        types = dict(images='*u8', tables='*u8', made='*u8', steps='*fp64', means='*fp32')
        fixed = dict(CHANNELS=channels, PIXELS=256)
        signature = {name: 'constexpr' if name in fixed else types.get(name, 'i32') for name in kernel.arg_names}
        options = dict(enable_fp_fusion=False)
        made = triton.compile(ASTSource(kernel, signature, fixed), target=GPUTarget('cuda', 90, 32), options=options)
        assert 'fma.rn' not in made.asm['ptx']
