#!/usr/bin/env python3
"""EVA on the two tasks of Long Range Arena that are pictures: python experiments/lra/run.py --data-dir DIR

    python experiments/lra/build.py DIR --image CIFAR10 --pathfinder 200000
    python experiments/lra/run.py --data-dir DIR --list
    python experiments/lra/run.py --data-dir DIR --seconds 500 --augment-device cuda --cache-device
    python experiments/lra/run.py --report --results-file FILE.csv

image: CIFAR-10 in grey; image.yaml.
pathfinder: are two discs the ends of one dashed curve? pathfinder.yaml.

A network of two layers sees 1,024 pixels as tokens, 32 × 32 or as a sequence, one row after the other. In the paper
|E| = 128 and C = 64, a window of local attention has 128 tokens and Performer 128 features. A sequence has just that; a
window of the grid has 11 × 11 tokens, cells are 8 × 8. Softmax and Performer do not see which of the two it is: they
have one run. Table 15's figures stand beside ours; Pathfinder's pictures are not LRA's (pathfinder.py).

Every run is one of train.py, judged by validate.py on the test pictures once, at its end; a row of --results-file is
written then. After a stop (SIGTERM, or --seconds are over) the same command goes on within the epoch. Several processes
may share the runs (one a GPU, by CUDA_VISIBLE_DEVICES). --only takes a task or a name. Flags that the driver does not
know go to train.py, as --epochs for a shorter budget, which all runs of a table must share.
"""

import sys
import time
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

from evavit.errors import UserError, run_script
from evavit.training.config import parse_settings

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))

import lra.models  # noqa: E402, F401 (registers the model that reads a sequence)
from driver import (  # noqa: E402
    ABOUT,
    chosen,
    drive,
    judge,
    make_output,
    of_training,
    parse,
    parser_of,
    rows_to_report,
    train_to_end,
)

TASKS = ('image', 'pathfinder')
NETWORKS = {  # name: model and its arguments, beside those of the YAML file
    'softmax': ('softmax_deit_tiny', {}),
    'eva-grid': ('eva_deit_tiny', dict(window_size=11, partition_grid=8)),
    'eva-sequence': ('raster_eva_deit_tiny', dict(window_size=128, cell_size=16)),
    'local-grid': ('local_deit_tiny', dict(window_size=11)),
    'local-sequence': ('raster_eva_deit_tiny', dict(window_size=128, cell_size=0)),
    'performer': ('performer_deit_tiny', dict(num_features=128)),
}
PAPER = dict(  # accuracy in Table 15
    image=dict(softmax=40.61, eva=43.24, local=42.25, performer=38.29),
    pathfinder=dict(softmax=68.29, eva=70.90, local=68.46, performer=66.39),
)
SEEDS = 3
COLUMNS = (
    'run',
    'task',
    'network',
    'model',
    'arguments',
    'epochs',
    'seed',
    'top1',
    'held_top1',
    'images',
    'train_seconds',
    'train_images_per_second',
    'seconds',
    *ABOUT,
)


class Job(NamedTuple):
    task: str
    network: str
    seed: int

    @property
    def name(self):
        return f'{self.task}-{self.network}-s{self.seed}'


def all_jobs():
    """Every run, the most telling first."""
    for seed in range(SEEDS):
        for task in TASKS:
            for network in NETWORKS:
                yield Job(task, network, seed)


def arguments_of(job):
    return [f'{key}={value}' for key, value in NETWORKS[job.network][1].items()]


def flags_of(job, args):
    """The flags of train.py. None of them is left to a default that the YAML file or the name does not say."""
    flags = ['-c', str(HERE / f'{job.task}.yaml'), '--data-dir', str(args.data_dir / job.task)]
    flags += ['--output', str(args.output), '--experiment', job.name, '--resume', 'auto', '--seed', str(job.seed)]
    flags += ['--model', NETWORKS[job.network][0]]
    return [*flags, *(['--model-kwargs', *arguments_of(job)] if arguments_of(job) else []), *args.flags]


def run(job, args, seconds_left):
    """Train, judge, and return the row."""
    began, folder, flags = time.monotonic(), args.output / job.name, flags_of(job, args)
    settings, _ = parse_settings('train', flags)
    train_to_end(flags, folder, seconds_left)
    result = judge(folder / 'last.safetensors', args.data_dir / job.task, settings, folder)
    epochs, measured = of_training(job, args, settings, began)
    return dict(
        run=job.name,
        task=job.task,
        network=job.network,
        model=settings.model.model,
        arguments=' '.join(arguments_of(job)),
        epochs=settings.schedule.epochs,
        seed=job.seed,
        top1=result['top1'],
        held_top1=epochs[-1]['eval_top1'],
        images=result['images'],
        **measured,
    )


def table(rows):
    """Markdown: a table a task, top-1 as mean ± standard deviation over the seeds, and the gap to the paper's."""
    for task in dict.fromkeys(row['task'] for row in rows):
        of_task = [row for row in rows if row['task'] == task]
        yield f'\n{task}, {"/".join(sorted({row["epochs"] for row in of_task}))} epochs\n'
        yield '| | top-1 | seeds | Table 15 | less that | images a second, training |'
        yield '|---|---|---|---|---|---|'
        for network in dict.fromkeys(row['network'] for row in of_task):
            found = [row for row in of_task if row['network'] == network]
            tops = [float(row['top1']) for row in found]
            spread = f' ± {stdev(tops):.2f}' if len(tops) > 1 else ''
            paper = PAPER[task][network.split('-')[0]]
            speed = mean(float(row['train_images_per_second']) for row in found)
            yield (
                f'| {network} | {mean(tops):.2f}{spread} | {len(tops)} | {paper:.2f} | {mean(tops) - paper:+.2f} '
                f'| {speed:,.0f} |'
            )


def main(argv=None):
    parser = parser_of(__doc__, 'output/lra', 'what experiments/lra/build.py wrote')
    parser.add_argument('--report', action='store_true', help='print the tables of --results-file')
    args = parse(parser, argv)
    jobs = chosen(all_jobs(), args)
    if args.report and not args.list:
        print('\n'.join(table(rows_to_report(args, COLUMNS))))
        return
    if not args.list:
        for task in dict.fromkeys(job.task for job in jobs):
            if args.data_dir is None or not (args.data_dir / task).is_dir():
                raise UserError(
                    f'--data-dir {args.data_dir}: no folder {task} in it; make it with experiments/lra/build.py'
                )
        make_output(args)
    drive(
        args,
        jobs,
        COLUMNS,
        run=lambda job, rows, left: run(job, args, left),
        says=lambda row: f'top-1 {row["top1"]}, held {row["held_top1"]}, {row["seconds"]} s',
    )


if __name__ == '__main__':
    sys.exit(run_script(main))
