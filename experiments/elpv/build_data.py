#!/usr/bin/env python3
"""Write ELPV's photographs of solar cells as image folders: python experiments/elpv/build_data.py DIR

2,624 cells in electroluminescence, grey, from the package `elpv-dataset` (91 MB: pip install elpv-dataset), or from
--source FOLDER with its labels.csv and images/. Two tasks with the same pictures: DIR/type (mono, poly) and DIR/defect
(p000, p033, p067, p100: the probability of a defect in percent), each with train/ and validation/.

The cells come from 44 modules in the order of their files, about 60 each, and no list says which. A random split would
put neighbours of one module on both sides. So every fifth block of 60 files in a row is for validation: 2,144 and 480
pictures; a module that lies across the edge of a block is still on both sides.

The pictures are CC BY-NC-SA 4.0: use them, do not pass them on. They are scaled to 224 pixels once, as JPEG, 19 MiB.
"""

import importlib.util
import os
import sys
from collections import Counter
from pathlib import Path

from PIL import Image

from evavit.arguments import Parser, to_number
from evavit.errors import UserError, run_script
from evavit.files import new_folder, open_regular
from evavit.training.data.decode import BadImageError, read_file

BLOCK, EVERY = 60, 5
TASKS = ('type', 'defect')
TYPES = ('mono', 'poly')
QUALITY = 90


def find_package():
    """The data folder of the installed package."""
    spec = importlib.util.find_spec('elpv_dataset')
    if spec is None:
        raise UserError(
            'the package elpv-dataset is not installed: pip install elpv-dataset, or --source FOLDER with '
            'its labels.csv and images/'
        )
    return Path(next(iter(spec.submodule_search_locations)), 'data')


def read_labels(source):
    """(file, {task: class}, split) of every picture, in the order of the files."""
    try:
        with open_regular(Path(source, 'labels.csv')) as file:
            lines = sorted(line.split() for line in file.read().decode().splitlines() if line.strip())
        rows = [
            (name, dict(type=kind, defect=f'p{round(100 * to_number(float, chance)):03d}'))
            for name, chance, kind in lines
        ]
        for _, labels in rows:
            if labels['type'] not in TYPES or not 0 <= int(labels['defect'][1:]) <= 100:
                raise ValueError(f'a class {labels["type"]} with {labels["defect"]}')
    except (ArithmeticError, OSError, ValueError) as error:
        raise UserError(f"{source}: no labels.csv of lines 'file probability type' ({error})") from error
    if len(rows) <= BLOCK * (EVERY - 1):
        raise UserError(
            f'{source}: labels.csv has {len(rows)} pictures, and validation begins after {BLOCK * (EVERY - 1)}; take '
            f'the whole data set'
        )
    twice, times = Counter(Path(name).stem for name, _ in rows).most_common(1)[0]
    if times > 1:
        raise UserError(f'{source}: labels.csv has {times} pictures called {twice}; rename all but one')
    return [
        (*row, 'validation' if number // BLOCK % EVERY == EVERY - 1 else 'train') for number, row in enumerate(rows)
    ]


def build(folder, source, side, images=None):
    """Write the folders, with at most `images` pictures of each class and split. Returns {(task, split): counts}."""
    counts = {(task, split): Counter() for task in TASKS for split in ('train', 'validation')}
    with new_folder(folder) as partial:
        for name, labels, split in read_labels(source):
            picture = None
            for task in TASKS:
                count = counts[task, split]
                if images is not None and count[labels[task]] >= images:
                    continue
                count[labels[task]] += 1
                target = Path(partial, task, split, labels[task], Path(name).stem + '.jpg')
                target.parent.mkdir(parents=True, exist_ok=True)
                if picture is not None:
                    os.link(picture, target)  # the same file in the other task
                    continue
                try:
                    image = read_file(source / name, 'L')
                except BadImageError as error:
                    raise UserError(f'{source / name}: cannot be read ({error})') from error
                image.resize((side, side), Image.Resampling.BICUBIC).save(target, quality=QUALITY)
                picture = target
    return counts


def main(argv=None):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument('folder', type=Path, metavar='DIR')
    parser.add_argument('--source', type=Path, help="folder of labels.csv and images/ (the installed package's)")
    parser.add_argument('--side', type=int, default=224, help='pixels (224; the photographs have 300)')
    parser.add_argument('--images', type=int, help='of each class and split at most so many, for a trial')
    args = parser.parse_args(argv)
    if args.side < 1 or (args.images is not None and args.images < 1):
        raise UserError('--side and --images must be at least 1')
    counts = build(args.folder, args.source or find_package(), args.side, args.images)
    for (task, split), count in counts.items():
        total, (name, most) = count.total(), count.most_common(1)[0]
        print(
            f'{args.folder}/{task}/{split}: {total} images, '
            + ', '.join(f'{number} {kind}' for kind, number in sorted(count.items()))
            + f'; always {name}: {100 * most / total:.1f} %'
        )


if __name__ == '__main__':
    sys.exit(run_script(main))
