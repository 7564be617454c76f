#!/usr/bin/env python3
"""Write photographs of ImageNet's usual size as an image folder: python tools/build_photos.py DIR [--images 256]

JPEGs of 500 × 375 pixels, about 62 KiB each: crops, mirrored and tinted, of the two photographs that scikit-learn
carries. DIR/train and DIR/validation, ten classes without meaning. They are for timing the loader, not for learning.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from evavit.arguments import Parser, shown
from evavit.errors import UserError, printable, run_script
from evavit.files import new_folder

WIDTH, HEIGHT, CLASSES = 500, 375, 10
MOST = 10**6  # images: 60 GB


def write(folder, count, seed):
    try:
        from sklearn.datasets import load_sample_images
    except ModuleNotFoundError:
        raise UserError(
            'the photographs are part of scikit-learn, which is not installed: pip install scikit-learn'
        ) from None
    photos = load_sample_images().images
    rng = np.random.default_rng(seed)
    for number in range(count):
        target = folder / f'{number % CLASSES}'
        target.mkdir(parents=True, exist_ok=True)
        photo = photos[number % len(photos)]
        top, left = rng.integers(photo.shape[0] - HEIGHT + 1), rng.integers(photo.shape[1] - WIDTH + 1)
        crop = photo[top : top + HEIGHT, left : left + WIDTH][:, :: rng.choice((-1, 1))]
        tinted = (crop * rng.uniform(0.8, 1.2, 3) + rng.normal(0, 4, crop.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(tinted).save(target / f'{number:05d}.jpg', quality=90)


def main(argv=None):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument('folder', type=Path)
    parser.add_argument('--images', type=int, default=256, help='images to train on; an eighth as many to validate on')
    args = parser.parse_args(argv)
    if not CLASSES <= args.images <= MOST:  # one of each
        raise UserError(f'--images {shown(args.images)}: must be {CLASSES} to {MOST:,}')
    with new_folder(args.folder) as folder:
        for split, count in (('train', args.images), ('validation', max(CLASSES, args.images // 8))):
            write(folder / split, count, seed=len(split))
    sizes = [path.stat().st_size for path in args.folder.glob('train/*/*.jpg')]
    line = f'{args.folder}: {len(sizes)} images to train on, {np.mean(sizes) / 1024:.0f} KiB on average'
    print(printable(line))


if __name__ == '__main__':
    sys.exit(run_script(main))
