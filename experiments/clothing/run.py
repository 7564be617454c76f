#!/usr/bin/env python3
"""Does the path of the images change what is learnt? python experiments/clothing/run.py --data-dir DIR

A network trained from scratch on photographs of clothes, by clothing.yaml, its images made by the CPU and by the GPU
(--augment-device), with the same seeds. The photographs are alexeygrigorev/clothing-dataset-small on GitHub (CC0):
train, validation and test with ten folders each. The test pictures are looked at once an epoch and choose nothing: the
figure is the last epoch's.

The runs come in the order of --list, a row of --results-file each. After a stop (SIGTERM, or --seconds are over) the
same command goes on within the epoch. Several processes may share the runs (one a GPU, by CUDA_VISIBLE_DEVICES). Flags
that the driver does not know go to train.py.
"""

import sys
import time
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

from evavit.bench.results import read_rows
from evavit.errors import UserError, run_script
from evavit.training.config import parse_settings

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))

from driver import ABOUT, chosen, drive, make_output, of_training, parse, parser_of, train_to_end  # noqa: E402

COLUMNS = (
    'run',
    'augment_device',
    'seed',
    'epochs',
    'top1',
    'top5',
    'train_seconds',
    'train_images_per_second',
    'seconds',
    *ABOUT,
)


class Job(NamedTuple):
    """A run."""

    augment_device: str
    seed: int

    @property
    def name(self):
        return f'{self.augment_device}-s{self.seed}'


def run(job, args, seconds_left):
    """Train, and return the row."""
    began, folder = time.monotonic(), args.output / job.name
    flags = ['-c', HERE / 'clothing.yaml', '--data-dir', args.data_dir, '--augment-device', job.augment_device]
    flags += ['--seed', job.seed, '--output', args.output, '--experiment', job.name, '--resume', 'auto', *args.flags]
    flags = list(map(str, flags))
    settings, _ = parse_settings('train', flags)
    train_to_end(flags, folder, seconds_left)
    epochs, measured = of_training(job, args, settings, began)
    return dict(
        run=job.name,
        augment_device=job.augment_device,
        seed=job.seed,
        epochs=len(epochs),
        top1=epochs[-1]['eval_top1'],
        top5=epochs[-1]['eval_top5'],
        **measured,
    )


def summary(rows):
    for device in dict.fromkeys(row['augment_device'] for row in rows):
        values = [float(row['top1']) for row in rows if row['augment_device'] == device]
        spread = f' ± {stdev(values):.2f}' if len(values) > 1 else ''
        yield f'{device}: top-1 {mean(values):.2f}{spread}, {len(values)} seeds'


def main(argv=None):
    parser = parser_of(__doc__, 'output/clothing', data='clothing-dataset-small')
    parser.add_argument('--augment-devices', nargs='+', default=['cpu', 'cuda'], choices=('cpu', 'cuda'))
    parser.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2])
    args = parse(parser, argv)
    jobs = chosen((Job(device, seed) for device in args.augment_devices for seed in args.seeds), args)
    if not args.list:
        if args.data_dir is None or not (args.data_dir / 'train').is_dir():
            raise UserError(f'--data-dir {args.data_dir}: no folder train in it; name clothing-dataset-small')
        make_output(args)
    drive(
        args,
        jobs,
        COLUMNS,
        run=lambda job, rows, left: run(job, args, left),
        says=lambda row: f'top-1 {row["top1"]}, {row["seconds"]} s',
    )
    if not args.list:
        for line in summary(read_rows(args.results_file, COLUMNS)):
            print(line)


if __name__ == '__main__':
    sys.exit(run_script(main))
