#!/usr/bin/env python3
"""Does the path of the images change what is learnt? python experiments/clothing/run.py --data-dir DIR

A network trained from scratch on photographs of clothes, by clothing.yaml, its images made by the CPU and by the GPU
(--augment-device), with the same seeds. A row of --results-file a run; what has a row is not run again. The photographs
are alexeygrigorev/clothing-dataset-small on GitHub (CC0): train, validation and test with ten folders each. The test
pictures are looked at once an epoch and choose nothing: the figure is the last epoch's. Other flags go to train.py.
"""

import argparse
import csv
import sys
import time
from pathlib import Path
from statistics import mean, stdev

from evavit.bench.results import ORIGIN, check_writable, origin, read_rows, write_rows
from evavit.cli import train
from evavit.errors import UserError, run_script
from evavit.training.distributed import start_process

HERE = Path(__file__).resolve().parent
COLUMNS = ('augment_device', 'seed', 'epochs', 'top1', 'top5', 'train_images_per_second', 'seconds', *ORIGIN)


def run(device, seed, args):
    began, name = time.monotonic(), f'{device}-s{seed}'
    flags = ['-c', HERE / 'clothing.yaml', '--data-dir', args.data_dir, '--augment-device', device, '--seed', seed]
    flags += ['--output', args.output, '--experiment', name, '--resume', 'auto', *args.flags]
    train.main(list(map(str, flags)))
    with open(args.output / name / 'summary.csv', newline='') as file:
        epochs = list(csv.DictReader(file))
    return dict(
        augment_device=device,
        seed=seed,
        epochs=len(epochs),
        top1=epochs[-1]['eval_top1'],
        top5=epochs[-1]['eval_top5'],
        train_images_per_second=max(float(row['train_images_per_second']) for row in epochs),
        seconds=round(time.monotonic() - began, 1),
        **origin(start_process(None).device),
    )


def summary(rows):
    for device in dict.fromkeys(row['augment_device'] for row in rows):
        values = [float(row['top1']) for row in rows if row['augment_device'] == device]
        spread = f' ± {stdev(values):.2f}' if len(values) > 1 else ''
        yield f'{device}: top-1 {mean(values):.2f}{spread}, {len(values)} seeds'


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument('--data-dir', type=Path, required=True, help='clothing-dataset-small')
    parser.add_argument('--output', type=Path, default=Path('output/clothing'), help='folder of the runs')
    parser.add_argument('--results-file', type=Path, metavar='CSV', help='(runs.csv in --output)')
    parser.add_argument('--augment-devices', nargs='+', default=['cpu', 'cuda'], choices=('cpu', 'cuda'))
    parser.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2])
    args, args.flags = parser.parse_known_args(argv)
    args.results_file = args.results_file or args.output / 'runs.csv'
    if not (args.data_dir / 'train').is_dir():
        raise UserError(f'--data-dir {args.data_dir}: no folder train in it; name clothing-dataset-small')
    args.output.mkdir(parents=True, exist_ok=True)
    check_writable(args.results_file)
    for device in args.augment_devices:
        for seed in args.seeds:
            rows = read_rows(args.results_file, COLUMNS)
            if not any((row['augment_device'], row['seed']) == (device, str(seed)) for row in rows):
                write_rows(args.results_file, [*rows, run(device, seed, args)], COLUMNS)
    print('\n'.join(summary(read_rows(args.results_file, COLUMNS))))


if __name__ == '__main__':
    sys.exit(run_script(main))
