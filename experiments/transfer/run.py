#!/usr/bin/env python3
"""Does pretraining of our own help on other pictures? python experiments/transfer/run.py --data-dir DIR …

    python experiments/tiny_imagenet/build.py DIR --source tiny-imagenet-200
    python experiments/elpv/build_data.py ELPV
    python experiments/transfer/run.py --data-dir DIR --clothing CLOTHING --cifar100 CIFAR100 --cifar10 CIFAR10 \
        --elpv ELPV --seconds 500 --augment-device cuda --cache-device
    python experiments/transfer/run.py --data-dir DIR --only pretrain --augment-device cuda --cache-device
    python experiments/transfer/run.py --list
    python experiments/transfer/run.py --report --results-file FILE.csv

pretrain: EVA, softmax and a DeiT with a class token learn Tiny-ImageNet at 64 px by one recipe, once each
    (experiments/tiny_imagenet/parent.yaml with --pretrain-epochs).
finetune: from these weights, and EVA from none, with one budget for all: configs/finetune_64.yaml for CIFAR, whose
    pictures are enlarged to 64 px, configs/finetune_64_at_224.yaml for clothes and solar cells. `converted` is the
    DeiT, made an EVA network by `evavit.convert_vit` and not trained in between.
linear: the classifier alone (configs/linear_probe.yaml).
knn: the 20 nearest neighbours (examples/knn.py, needs scikit-learn), of random weights too. Nothing is drawn: one run.

A name such as cifar100-linear-eva-s0 says: pictures, how, from what, seed; `--only cifar10-` are those of CIFAR-10
alone. CLOTHING is alexeygrigorev/clothing-dataset-small of GitHub (CC0), of which train and test are used; CIFAR10 and
CIFAR100 hold PNG files, {train,test}/CLASS/NAME.png; ELPV is what build_data.py wrote, of which the four grades of
defect are learnt. The pictures that are judged choose nothing: they are looked at when a run is at its end, and the
figure is that of the last weights.

Every run is one of train.py, judged by validate.py. The runs come in the order of --list, a row of --results-file each;
what needs weights waits for their run in --output, whose folders pretrain-* go along to another machine. After a stop
(SIGTERM, or --seconds are over) the same command goes on within the epoch. Several processes may share the runs (one a
GPU, by CUDA_VISIBLE_DEVICES). Flags that the driver does not know go to train.py.
"""

import importlib.util
import sys
import time
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

from evavit.bench.results import read_rows
from evavit.errors import UserError, run_script
from evavit.training.checkpoint import remove_checkpoints
from evavit.training.config import parse_settings
from evavit.training.data.folders import find_split
from evavit.training.distributed import start_process

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path += [str(HERE.parent), str(ROOT / 'examples')]

from driver import (  # noqa: E402
    ABOUT,
    about,
    check_data,
    chosen,
    drive,
    finished,
    judge,
    judging,
    make_output,
    of_training,
    parse,
    parser_of,
    rows_to_report,
    state_of,
    train_to_end,
)

NETWORKS = dict(eva='eva_deit_tiny', softmax='softmax_deit_tiny', parent='deit_tiny_patch16_224')  # that are pretrained
STARTS = dict(eva='eva', softmax='softmax', scratch='', converted='parent')  # whose weights each begins with
HOWS = ('finetune', 'linear', 'knn')
SEEDS, NEIGHBOURS = 3, 20
WINDOWS = dict(finetune_64=4, finetune_64_at_224=7)  # side of EVA's windows, in tokens, and of its grid of cells


class Task(NamedTuple):
    """Pictures to learn: the recipe, epochs of a linear probe, what lies below the user's folder, the split that is
    judged, and flags of fine-tuning."""

    recipe: str
    probe_epochs: int
    place: str = ''
    split: str = 'test'
    flags: tuple = ()


TASKS = dict(
    clothing=Task('finetune_64_at_224', 100),
    cifar100=Task('finetune_64', 10),
    cifar10=Task('finetune_64', 10),
    # a defect is small: crops must keep it, and no other picture may cover it
    elpv=Task(
        'finetune_64_at_224',
        100,
        'defect',
        'validation',
        ('--scale', '0.7', '1', '--mixup', '0', '--cutmix', '0', '--vflip', '0.5'),
    ),
)
FIRST, LATER = ('clothing', 'cifar100'), ('cifar10', 'elpv')
COLUMNS = (
    'run',
    'group',
    'task',
    'how',
    'start',
    'model',
    'pretrain_epochs',
    'epochs',
    'seed',
    'top1',
    'balanced_accuracy',
    'images',
    'train_seconds',
    'train_images_per_second',
    'seconds',
    *ABOUT,
)


class Job(NamedTuple):
    """A run: of HOWS with a task of TASKS and a start of STARTS, or `pretrain` with a start of NETWORKS."""

    how: str
    start: str
    task: str = ''
    seed: int = 0

    @property
    def name(self):
        if not self.task:
            return f'{self.how}-{self.start}'
        return f'{self.task}-{self.how}-{self.start}' + f'-s{self.seed}' * (self.how != 'knn')

    @property
    def group(self):
        return 'transfer' if self.task else self.how

    @property
    def weights(self):
        """The run of whose weights it begins, None where it begins with none."""
        return Job('pretrain', STARTS[self.start]) if self.task and STARTS[self.start] else None


def all_jobs():
    """Every run, the most telling first."""
    trained, converted = ('eva', 'softmax', 'scratch'), ('converted',)
    yield from (Job('pretrain', 'eva'), Job('pretrain', 'softmax'))
    for seed in range(SEEDS):
        yield from learning(FIRST, trained, seed)
    yield Job('pretrain', 'parent')
    for seed in range(SEEDS):
        yield from learning(FIRST, converted, seed)
    for seed in range(SEEDS):
        yield from learning(LATER, trained + converted, seed)


def learning(tasks, starts, seed):
    for how in HOWS:
        for task in tasks:
            for start in starts:
                # neighbours need no seed; a classifier on random features is no probe, and train.py makes none
                if not (how == 'knn' and seed) and not (how == 'linear' and start == 'scratch'):
                    yield Job(how, start, task, seed)


def state(job, rows, output):
    found = state_of(job, rows, output)
    if found != 'done' and job.weights and not finished(output / job.weights.name):
        return f'waits for {output / job.weights.name}'
    if found != 'done' and job.how == 'knn' and importlib.util.find_spec('sklearn') is None:
        return 'waits for scikit-learn: pip install scikit-learn'
    return found


def flags_of(job, args):
    """The flags of train.py. None of them is left to a default that the YAML file or the name does not say."""
    flags = ['--output', args.output, '--experiment', job.name, '--resume', 'auto', '--seed', job.seed]
    if not job.task:
        flags += ['-c', HERE.parent / 'tiny_imagenet' / 'parent.yaml', '--data-dir', args.data_dir]
        flags += [*network(job.start, 4), '--val-interval', 10, *args.flags, '--epochs', args.pretrain_epochs]
        return list(map(str, flags))
    task = TASKS[job.task]
    recipe = ROOT / 'configs' / f'{task.recipe}.yaml'
    flags += network(job.start, WINDOWS[task.recipe])
    flags += ['--data-dir', folder_of(job.task, args), '--train-split', 'train', '--val-split', task.split]
    flags += ['--val-interval', 1000]  # the last epoch alone
    if job.weights:
        flags += ['--pretrained-path', args.output / job.weights.name / 'last.safetensors']
    if job.how == 'finetune':
        flags += ['-c', recipe, *task.flags]
    else:  # the model's size and the pictures' are those of fine-tuning
        flags += ['-c', ROOT / 'configs' / 'linear_probe.yaml', '--epochs', task.probe_epochs]
        tuned = parse_settings('train', ['-c', str(recipe)])[0]
        flags += ['--model-kwargs', *(f'{key}={value}' for key, value in tuned.model.model_kwargs.items())]
        flags += ['--crop-pct', tuned.model.crop_pct, '--mean', *tuned.model.mean, '--std', *tuned.model.std]
        flags += ['-b', tuned.batch.batch_size, '--workers', tuned.machine.workers]
    return list(map(str, [*flags, *args.flags]))


def network(start, window):
    """The flags of a model, with windows and a grid of cells of this side where it has them."""
    sizes = [f'window_size={window}', f'partition_grid={window}']
    flags = ['--model', NETWORKS[STARTS.get(start, start) or 'eva']]
    if start == 'converted':  # as experiments/tiny_imagenet/convert.yaml
        return [*flags, '--convert', 'eva', '--convert-kwargs', *sizes, 'count_cells=outside', 'noise_std=0']
    return [*flags, '--model-kwargs', *sizes] if start in ('eva', 'scratch') else flags


def folder_of(task, args):
    return getattr(args, task) / TASKS[task].place


def run(job, args, seconds_left):
    """Train what is to be trained, judge it, and return the row."""
    began, folder, flags = time.monotonic(), args.output / job.name, flags_of(job, args)
    settings, _ = parse_settings('train', flags)
    data_dir, split = (folder_of(job.task, args), TASKS[job.task].split) if job.task else (args.data_dir, 'val')
    if job.how == 'knn':
        found = neighbours(settings, data_dir, split, folder)
        device = start_process(settings.machine.device).device
        measured = dict(seconds=round(time.monotonic() - began, 1), **about(job, folder / 'args.yaml', args, device))
    else:
        train_to_end(flags, folder, seconds_left)
        result = judge(folder / 'last.safetensors', data_dir, settings, folder, ['--metrics-avg', 'macro'], split)
        found = dict(top1=result['top1'], balanced_accuracy=result['macro_recall'], images=result['images'])
        found['epochs'] = settings.schedule.epochs
        _, measured = of_training(job, args, settings, began)
    return dict(
        run=job.name,
        group=job.group,
        task=job.task,
        how=job.how,
        start=job.start,
        model=settings.model.model,
        pretrain_epochs=args.pretrain_epochs if job.weights or not job.task else '',
        seed='' if job.how == 'knn' else job.seed,
        **found,
        **measured,
    )


def tidy(job, args):
    """The checkpoints of a hundred runs are gigabytes; the pretrained weights stay."""
    if job.how != 'knn':
        remove_checkpoints(args.output / job.name, weights=bool(job.task))


def neighbours(settings, data_dir, split, folder):
    """The figures of the nearest neighbours among the features of the weights that `settings` begin with."""
    from knn import judge as judge_neighbours  # of examples, where scikit-learn is

    settings.model.linear_probe = False  # there is no classifier
    folder.mkdir(parents=True, exist_ok=True)
    settings.save(folder / 'args.yaml')
    asked, _ = parse_settings('validate', judging(data_dir, split, settings))
    asked.model = settings.model
    (top1, balanced, _), _, images = judge_neighbours(asked, NEIGHBOURS)
    return dict(top1=round(top1, 3), balanced_accuracy=round(balanced, 3), images=images)


def table(rows):
    """Markdown: top-1 by pictures, how and start, as mean ± standard deviation over the seeds."""
    yield '| pictures | how | start | top-1 | balanced | runs |'
    yield '|---|---|---|---|---|---|'
    groups = {}
    for row in rows:
        groups.setdefault((row['task'] or 'tiny-imagenet', row['how'], row['start']), []).append(row)
    for key, found in groups.items():
        columns = ([float(row[column]) for row in found] for column in ('top1', 'balanced_accuracy'))
        cells = (f'{mean(of):.2f}' + (f' ± {stdev(of):.2f}' if len(of) > 1 else '') for of in columns)
        yield f'| {" | ".join((*key, *cells))} | {len(found)} |'


def check(jobs, args):
    """UserError where pictures are not there, or where weights or rows are of another pretraining."""
    if args.pretrain_epochs < 1:
        raise UserError(f'--pretrain-epochs {args.pretrain_epochs}: must be at least 1')
    files = [args.output / Job('pretrain', start).name / 'args.yaml' for start in NETWORKS]
    known = [parse_settings('train', ['-c', str(file)])[0].schedule.epochs for file in files if file.exists()]
    known += [int(row['pretrain_epochs']) for row in read_rows(args.results_file, COLUMNS) if row['pretrain_epochs']]
    if other := set(known) - {args.pretrain_epochs}:
        raise UserError(
            f'--pretrain-epochs {args.pretrain_epochs}: {args.output} or {args.results_file} is of {min(other)}; give '
            f'that, or name another folder and file'
        )
    if any(not job.task for job in jobs):
        check_data(args)
    for task in dict.fromkeys(job.task for job in jobs if job.task):
        folder = getattr(args, task) and folder_of(task, args)
        if folder is None or not folder.is_dir():
            raise UserError(f'--{task}: no folder {folder or "is given"}; name its pictures, or other runs by --only')
        for split in ('train', TASKS[task].split):
            find_split(folder, split)


def main(argv=None):
    parser = parser_of(__doc__, 'output/transfer')
    for task, what in (
        ('clothing', 'clothing-dataset-small, with train and test'),
        ('cifar100', 'folder with {train,test}/CLASS/NAME.png'),
        ('cifar10', 'the same of CIFAR-10'),
        ('elpv', 'what experiments/elpv/build_data.py wrote'),
    ):
        parser.add_argument(f'--{task}', type=Path, metavar='DIR', help=what)
    parser.add_argument('--pretrain-epochs', type=int, default=100, help='of each pretraining (100)')
    parser.add_argument('--report', action='store_true', help='print the table of --results-file')
    args = parse(parser, argv)
    jobs = chosen(all_jobs(), args)
    if args.report and not args.list:
        print('\n'.join(table(rows_to_report(args, COLUMNS))))
        return
    if not args.list:
        check(jobs, args)
        make_output(args)
    drive(
        args,
        jobs,
        COLUMNS,
        state=lambda job, rows: state(job, rows, args.output),
        run=lambda job, rows, left: run(job, args, left),
        says=lambda row: f'top-1 {row["top1"]}, {row["seconds"]} s',
        tidy=lambda job: tidy(job, args),
    )


if __name__ == '__main__':
    sys.exit(run_script(main))
