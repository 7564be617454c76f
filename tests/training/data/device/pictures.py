"""Photographs that scikit-learn carries, and what one loader makes of them beside another."""

import io

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from evavit.bench.loader import Repeated
from evavit.training import data
from evavit.training.distributed import Process
from evavit.training.sections import AugmentConfig, BatchConfig, DataConfig, MachineConfig

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZE = (3, 64, 64)


def photographs(width, height, count=2):
    """Parts of the two photographs, mirrored in turn, resized."""
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    rng = np.random.default_rng(0)
    images = []
    for number in range(count):
        left, top = rng.integers(0, 200), rng.integers(0, 120)
        part = photos[number % 2].crop((left, top, left + 420, top + 300)).resize((width, height))
        images.append(part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if number % 4 > 1 else part)
    return images


def tensor(images, device='cpu'):
    return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images]).contiguous().to(device)


def jpeg(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, 'JPEG', **{'quality': 90, **options})
    return buffer.getvalue()


def undecodable(image):
    """A JPEG whose header is in order and whose Huffman table is not: that shows in the decoder alone."""
    broken = bytearray(jpeg(image))
    table = broken.index(b'\xff\xc4')
    broken[table + 5 : table + 21] = bytes([255] * 16)  # no table has so many codes
    return bytes(broken)


def write(root, count, sizes=((160, 120), (120, 150), (90, 90))):
    """DIR/train and DIR/validation with two classes of JPEGs, of several sizes."""
    for split in ('train', 'validation'):
        for number in range(count):
            target = root / split / str(number % 2)
            target.mkdir(parents=True, exist_ok=True)
            image = photographs(*sizes[number % len(sizes)], number % 7 + 1)[-1]
            (target / f'{number:03d}.jpg').write_bytes(jpeg(image))
    return root


def config(size=SIZE, **rest):
    return dict(input_size=size, mean=MEAN, std=STD, interpolation='bicubic', crop_pct=0.875, crop_mode='center') | rest


def loader(
    root,
    augment_device,
    *,
    device='cpu',
    workers=0,
    batch_size=4,
    size=SIZE,
    seed=3,
    rank=0,
    world=1,
    least=0,
    cache=False,
    **augment,
):
    """A training loader; the private augment_device `any` has the device path work where the process is. `least`:
    images of an epoch, for which the folder's come again and again."""
    where = DataConfig(data_dir=str(root), max_bad_images=1.0)
    dataset, _ = data.open_dataset(where, 'train', batch_size=batch_size, seed=seed, is_training=True)
    dataset = Repeated(dataset, least) if least else dataset
    machine = MachineConfig(workers=workers, augment_device=augment_device, cache_device=cache)
    process = Process(torch.device(device), rank, rank, world)
    settings = AugmentConfig(**augment)
    return data.train_loader(
        dataset, settings, config(size), batch_size=batch_size, machine=machine, seed=seed, process=process
    )


def epoch(loader, *, epoch=1, first=0, seed=3, device='cpu', batch_size=4, most=None):
    process = Process(torch.device(device), 0, 0, 1)
    batches = data.epoch_batches(
        loader, BatchConfig(batch_size=batch_size), seed=seed, process=process, epoch=epoch, first=first
    )
    return [
        (images.cpu(), target.cpu()) for number, (images, target) in enumerate(batches) if most is None or number < most
    ]


def levels(one, other):
    """|one − other| of two normalised batches, in 8-bit levels."""
    return ((one - other) * 255 * torch.tensor(STD).view(1, 3, 1, 1)).abs()
