"""Small sets in the forms of CIFAR-10 that experiments/cifar.py reads."""

import numpy as np
from PIL import Image

CLASSES = ('airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck')


def noise(counts):
    rng = np.random.default_rng(0)
    pictures = {split: rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8) for split, count in counts.items()}
    return pictures, {split: np.sort(np.arange(count) % 10).astype(np.uint8) for split, count in counts.items()}


def write_binary(folder, counts):
    """The binary version with `counts` pictures a split, of all ten classes; pictures and labels by split."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures, labels = noise(counts)
    for split, found in pictures.items():
        planes = found.transpose(0, 3, 1, 2).reshape(len(found), -1)
        records = np.concatenate([labels[split][:, None], planes], 1)
        names = [f'data_batch_{number}.bin' for number in range(1, 6)] if split == 'train' else ['test_batch.bin']
        for name, part in zip(names, np.array_split(records, len(names)), strict=True):
            part.tofile(folder / name)
    return pictures, labels


def write_folders(folder, counts):
    """The same as PNG files in class folders."""
    pictures, labels = noise(counts)
    for split, found in pictures.items():
        for number, (pixels, label) in enumerate(zip(found, labels[split], strict=True)):
            place = folder / split / CLASSES[label]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(place / f'{number:04}.png')
    return pictures, labels
