#!/usr/bin/env python3
"""Sort Tiny-ImageNet for train.py: python experiments/tiny_imagenet/build.py DIR --source tiny-imagenet-200

    build.py DIR --source FOLDER        the publisher's layout → DIR/{train,held,val}/CLASS/NAME.JPEG
    build.py DIR --pack OUT --files 5   the same pictures as 5 zip files of like size, to move them
    build.py DIR --unpack ZIP …         those files back into DIR, all at once or one after another

A tenth of the publisher's training pictures, drawn within each class by --seed, is held for choices (`held`); `val` are
the publisher's labelled validation pictures, to be read once a run, at its end. The JPEG files stay as they are. Their
terms are ImageNet's: research, and no passing on.
"""

import hashlib
import json
import os
import random
import shutil
import sys
import zipfile
from pathlib import Path

from evavit.arguments import Parser
from evavit.errors import UserError, reason_of, run_script
from evavit.files import append_to, new_folder, open_regular, replacing
from evavit.files import unpack as add_members

SPLITS = ('train', 'held', 'val')
MOST_FILES = 1000  # of a pack


def source_pictures(source, held, seed):
    """(split, class, path) of every picture in the publisher's layout."""
    folders = sorted(path for path in Path(source, 'train').glob('*') if path.is_dir())
    labels = Path(source, 'val', 'val_annotations.txt')
    if not folders or not labels.is_file():
        raise UserError(
            f'--source {source}: no train/CLASS folders or no val/val_annotations.txt in it; name tiny-imagenet-200'
        )
    for folder in folders:
        found = sorted((folder / 'images').glob('*.JPEG'))
        if not found:
            raise UserError(f'{folder / "images"}: no *.JPEG in it')
        kept = set(random.Random(f'{seed} {folder.name}').sample(found, round(held * len(found))))
        for path in found:
            yield 'held' if path in kept else 'train', folder.name, path
    classes = {folder.name for folder in folders}
    try:
        with open_regular(labels) as file:
            lines = file.read().decode().splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f'{labels}: cannot be read ({reason_of(error)})') from error
    if not lines:
        raise UserError(f'{labels}: is empty, so there are no pictures to judge by; take the whole data set')
    seen = set()
    for number, line in enumerate(lines, 1):
        name, label, *_ = [*line.split('\t'), '', '']
        if label not in classes or Path(name).name != name or name in seen:
            raise UserError(f'{labels}: line {number} is no new picture and a class of train/, {line[:100]!r}')
        seen.add(name)
        yield 'val', label, Path(source, 'val', 'images', name)


def build(folder, source, held, seed):
    with new_folder(folder) as partial:
        for split, label, path in [*source_pictures(source, held, seed)]:  # all of them, before one is copied
            target = Path(partial, split, label, path.name)
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                with open_regular(path) as picture, open(target, 'wb') as copy:
                    shutil.copyfileobj(picture, copy)
            except OSError as error:
                raise UserError(f'{path}: cannot be copied ({reason_of(error)})') from error


def pictures_of(folder):
    return sorted(path for split in SPLITS for path in Path(folder, split).glob('*/*'))


def pack(folder, out, files):
    """Zip files that hold the pictures as they are, each about as large as the others."""
    pictures = pictures_of(folder)
    if not pictures:
        raise UserError(f'{folder}: no pictures; make it with --source or --unpack')
    sizes, shares = [0] * files, [[] for _ in range(files)]
    for path in pictures:
        place = sizes.index(min(sizes))
        shares[place].append(path)
        sizes[place] += path.stat().st_size
    if files > len(pictures):
        raise UserError(f'--files {files}: {folder} has {len(pictures)} pictures; give fewer')
    names = [out / f'tiny-{number}.zip' for number in range(files)]
    if there := next(filter(os.path.lexists, names), None):
        raise UserError(f'{there} is there already; name another folder')
    if out.exists() and not out.is_dir():
        raise UserError(f'--pack {out}: is no folder; name another one')
    out.mkdir(parents=True, exist_ok=True)
    listed = [[path.relative_to(folder).as_posix(), path.stat().st_size] for path in pictures]
    own = hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:16]
    for number, (name, share) in enumerate(zip(names, shares, strict=True)):
        with replacing(name) as partial, zipfile.ZipFile(partial, 'w', strict_timestamps=False) as file:
            file.comment = json.dumps(dict(part=number, parts=files, pictures=len(pictures), pack=own)).encode()
            for path in share:
                file.write(path, path.relative_to(folder).as_posix())
        print(f'{name}: {len(share)} pictures, {name.stat().st_size / 2**20:.1f} MiB')


def unpack(folder, names):
    """Add the pictures of zip files of `pack` to a folder; `missing` tells whether all are there."""
    for name in names:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with open_regular(name) as stream, zipfile.ZipFile(stream) as file:
                about = json.loads(file.comment)
                number, count, own = about['part'], about['parts'], str(about.get('pack', ''))
                if type(number) is not int or type(count) is not int or not 0 <= number < count:
                    raise ValueError(f'part {number} of {count}')
                for path in folder.glob('.part-*-of-*'):
                    if not path.name.endswith(f'-of-{count}') or read_mark(path) != own:
                        raise UserError(f'{name}: is of another pack than {path.name[1:]} of {folder}; name a new one')
                mark = folder / f'.part-{number}-of-{count}'
                if mark.exists():
                    continue
                for member in file.namelist():
                    parts = member.split('/')
                    if len(parts) != 3 or parts[0] not in SPLITS or '..' in parts:
                        raise UserError(f'{name}: holds {member}, which build.py --pack does not write')
                add_members(file, folder)
            with append_to(mark) as kept:
                kept.write(own)
        except UserError:
            raise
        except Exception as error:  # hostile headers bring all kinds
            raise UserError(f'{name}: cannot be unpacked ({reason_of(error)})') from error
    print(missing(folder) or f'{folder}: {len(pictures_of(folder))} pictures')


def read_mark(path):
    """Of which pack a part was that is in the folder."""
    with open_regular(path) as file:
        return file.read(100).decode(errors='replace')


def missing(folder):
    """One line on what a folder lacks, or None."""
    for split in SPLITS:
        if not Path(folder, split).is_dir():
            return f'{folder}: no folder {split} in it yet; make it with experiments/tiny_imagenet/build.py'
    marks = [path.name for path in Path(folder).glob('.part-*-of-*')]
    if marks and len(marks) < int(marks[0].rpartition('-')[2]):
        return f'{folder}: {len(marks)} of {marks[0].rpartition("-")[2]} packed files unpacked so far'
    return None


def main(argv=None):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument('folder', type=Path, metavar='DIR')
    parser.add_argument('--source', type=Path, metavar='FOLDER', help="the publisher's tiny-imagenet-200")
    parser.add_argument('--held', type=float, default=0.1, help='share of the training pictures held for choices (0.1)')
    parser.add_argument('--seed', type=int, default=0, help='which of them (0)')
    parser.add_argument('--pack', type=Path, metavar='OUT', help='write DIR as zip files there')
    parser.add_argument('--files', type=int, default=5, help='number of those files (5)')
    parser.add_argument('--unpack', type=Path, nargs='+', metavar='ZIP', help='add the pictures of these files to DIR')
    args = parser.parse_args(argv)
    if [args.source, args.pack, args.unpack].count(None) != 2:
        raise UserError('give one of --source, --pack and --unpack')
    if not 0 < args.held < 1 or not 1 <= args.files <= MOST_FILES:
        raise UserError(f'--held must be between 0 and 1, --files 1 to {MOST_FILES}')
    if args.source:
        build(args.folder, args.source, args.held, args.seed)
        for split in SPLITS:
            found = Path(args.folder, split)
            print(f'{found}: {len(list(found.glob("*/*")))} pictures, {len(os.listdir(found))} classes')
    elif args.pack:
        pack(args.folder, args.pack, args.files)
    else:
        unpack(args.folder, args.unpack)


if __name__ == '__main__':
    sys.exit(run_script(main))
