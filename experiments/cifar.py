"""CIFAR-10 from either of two forms of the published pictures; neither is a pickle, which could run code.

The binary version, cifar-10-binary.tar.gz unpacked: data_batch_1.bin to data_batch_5.bin and test_batch.bin. Or PNG
files in class folders: train/CLASS/NAME.png and test/CLASS/NAME.png.
"""

from pathlib import Path

import numpy as np

from evavit.errors import UserError
from evavit.training.data.decode import BadImageError, read_file

CLASSES = ('airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck')
SIDE = 32
RECORD = 1 + 3 * SIDE**2  # bytes: the label, then the red, green and blue pixels in raster order
FILES = dict(train=[f'data_batch_{number}.bin' for number in range(1, 6)], test=['test_batch.bin'])


def read_cifar10(folder, split):
    """Pictures `(N, 32, 32, 3)` and labels `(N)` of a split, both uint8 on the CPU.

    Args:
        folder: One of the two forms, see above.
        split: 'train' or 'test'.

    Raises:
        UserError: Neither form is there, or a file is not of that form.
    """
    folder = Path(folder)
    if (folder / FILES[split][0]).exists():
        return read_binary([folder / name for name in FILES[split]])
    if (folder / split).is_dir():
        return read_folders(folder / split)
    raise UserError(
        f'{folder}: neither {FILES[split][0]} nor a folder {split}; name the unpacked binary version of CIFAR-10, or '
        f'a folder with {split}/CLASS/NAME.png'
    )


def read_binary(paths):
    records = []
    for path in paths:
        content = np.fromfile(path, dtype=np.uint8) if path.is_file() else np.empty(0, np.uint8)
        whole = content.size and content.size % RECORD == 0
        if not whole or content[::RECORD].max() >= len(CLASSES):
            raise UserError(f"{path}: no whole file of CIFAR-10's binary version; unpack cifar-10-binary.tar.gz anew")
        records.append(content.reshape(-1, RECORD))
    records = np.concatenate(records)
    pictures = records[:, 1:].reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(pictures), records[:, 0].copy()


def read_folders(folder):
    pictures, labels = [], []
    for label, name in enumerate(CLASSES):
        files = sorted((folder / name).glob('*.png'))
        if not files:
            raise UserError(f'{folder / name}: no PNG file in it; CIFAR-10 has the classes {", ".join(CLASSES)}')
        for path in files:
            try:
                picture = np.asarray(read_file(path, 'RGB'))
            except BadImageError as error:
                raise UserError(f'{path}: cannot be read ({error})') from error
            if picture.shape != (SIDE, SIDE, 3):
                raise UserError(f"{path}: {picture.shape[1]} × {picture.shape[0]} pixels, CIFAR-10's are 32 × 32")
            pictures.append(picture)
        labels += [label] * len(files)
    return np.stack(pictures), np.array(labels, dtype=np.uint8)
