#!/usr/bin/env python3
"""The two tasks of Long Range Arena that are pictures, as folders: python experiments/lra/build.py DIR …

    python experiments/lra/build.py DIR --image CIFAR10           # DIR/image
    python experiments/lra/build.py DIR --pathfinder 200000       # DIR/pathfinder

Grey PNG files of 32 × 32 pixels, {train,held,val}/CLASS/NAME.png. CIFAR10 is CIFAR-10 in one of the forms that
experiments/cifar.py reads: its test pictures are `val`, every tenth training picture of a class is `held`. Pathfinder's
pictures are drawn (pathfinder.py), by number from --seed: eight tenths are `train`, one each `held` and `val`. 200,000
take some minutes on 16 cores.
"""

import functools
import os
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from PIL import Image

from evavit.arguments import Parser
from evavit.errors import LocalError, UserError, run_script
from evavit.files import new_folder

sys.path.append(str(Path(__file__).resolve().parents[1]))

from cifar import CLASSES, read_cifar10
from lra.pathfinder import pathfinder

SPLITS = ('train', 'held', 'val')
ANSWERS = ('apart', 'joined')  # classes of Pathfinder


def write(folder, split, label, number, pixels):
    place = folder / split / label
    place.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).convert('L').save(place / f'{number:06}.png')


def build_image(folder, source):
    for split, ours in dict(train='train', test='val').items():
        pictures, labels = read_cifar10(source, split)
        seen = Counter()
        for number, (pixels, label) in enumerate(zip(pictures, labels, strict=True)):
            held = ours == 'train' and seen[label] % 10 == 9
            seen[label] += 1
            write(folder, 'held' if held else ours, CLASSES[label], number, pixels)


def build_pathfinder(folder, count, seed, jobs):
    draw = functools.partial(draw_one, folder, count, seed)
    try:
        with ProcessPoolExecutor(jobs) as pool:
            for _ in pool.map(draw, range(count), chunksize=100):
                pass
    except BrokenProcessPool:
        raise LocalError('a drawing process was killed, perhaps for want of memory; lower --jobs') from None


def draw_one(folder, count, seed, number):
    found = pathfinder(seed, number)
    split = SPLITS[max(0, number * 10 // count - 7)]
    write(folder, split, ANSWERS[found.joined], number, found.pixels)


def main(argv=None):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument('folder', type=Path, metavar='DIR')
    parser.add_argument('--image', type=Path, metavar='CIFAR10', help='make DIR/image of these pictures')
    parser.add_argument('--pathfinder', type=int, metavar='COUNT', help='make DIR/pathfinder of so many pictures')
    parser.add_argument('--seed', type=int, default=0, help="of Pathfinder's pictures (0)")
    parser.add_argument('--jobs', type=int, default=os.cpu_count(), help='processes that draw (all cores)')
    args = parser.parse_args(argv)
    if args.image is None and args.pathfinder is None:
        raise UserError('give --image CIFAR10, --pathfinder COUNT, or both')
    if args.pathfinder is not None and args.pathfinder < 20:
        raise UserError(f'--pathfinder {args.pathfinder}: at least 20, so that every split has pictures')
    if args.jobs < 1:
        raise UserError(f'--jobs {args.jobs}: at least one process draws')
    makers = dict(
        image=args.image and functools.partial(build_image, source=args.image),
        pathfinder=args.pathfinder
        and functools.partial(build_pathfinder, count=args.pathfinder, seed=args.seed, jobs=args.jobs),
    )
    for name, make in makers.items():
        place = args.folder / name
        if make:
            with new_folder(place) as partial:
                make(partial)
            counts = {split: len(list((place / split).glob('*/*'))) for split in SPLITS}
            print(f'{place}: ' + ', '.join(f'{split} {count}' for split, count in counts.items()))


if __name__ == '__main__':
    sys.exit(run_script(main))
