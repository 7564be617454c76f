#!/usr/bin/env python3
"""Write scikit-learn's Digits as an image folder: python tools/build_digits.py DIR

1,797 scans of handwritten digits, 8 × 8 grey, enlarged to 32 × 32; DIR/train (1,437) and DIR/validation (360) by a
fixed, stratified split. A folder that is complete is left as it is, one that holds anything else, too.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from evavit.arguments import Parser
from evavit.errors import UserError, printable, run_script
from evavit.files import new_folder

SIDE = 32
COUNTS = {'train': 1437, 'validation': 360}


def build(folder):
    if {split: len(list(folder.glob(f'{split}/*/*.png'))) for split in COUNTS} == COUNTS:
        return False
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ModuleNotFoundError:
        raise UserError(
            'the Digits are part of scikit-learn, which is not installed: pip install scikit-learn'
        ) from None
    digits = load_digits()
    indices = np.arange(len(digits.target))
    train, validation = train_test_split(
        indices, test_size=COUNTS['validation'], random_state=0, stratify=digits.target
    )
    with new_folder(folder) as partial:
        for split, members in (('train', train), ('validation', validation)):
            for index in members:
                target = partial / split / str(digits.target[index])
                target.mkdir(parents=True, exist_ok=True)
                image = Image.fromarray((digits.images[index] * (255 / 16)).round().astype(np.uint8))  # values: 0…16
                image.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(target / f'{index:04d}.png')
    return True


def main(argv=None):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument('folder', type=Path)
    folder = parser.parse_args(argv).folder
    done = 'built' if build(folder) else 'already there'
    print(printable(f'{folder}: {" + ".join(map(str, COUNTS.values()))} images, {done}'))


if __name__ == '__main__':
    sys.exit(run_script(main))
