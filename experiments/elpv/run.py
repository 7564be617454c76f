#!/usr/bin/env python3
"""Does pretraining help on few pictures? python experiments/elpv/run.py --data-dir data/elpv --fashion-mnist DIR

    python experiments/elpv/build_data.py data/elpv
    python experiments/elpv/run.py --data-dir data/elpv --fashion-mnist DIR --results-file FILE.csv

An EVA model (`eva_deit_tiny`) is trained on Fashion-MNIST at 28 pixels with patch 2, then fine-tuned on ELPV at 224
with patch 16: the same 196 tokens, the patches resampled. Beside it the same model, timm's `resnet18` and timm's
`deit_tiny_patch16_224` from scratch. All have one budget, configs/finetune_small.yaml, on two tasks, with --seeds
seeds; they differ in where they start and in nothing else. The last weights are judged, not the best: the pictures of
the validation are the test here. Needs scikit-learn.

Every run is one of train.py; its scores are a row of --results-file as soon as it ends, and a second call makes the
rows that are missing. Several processes with the same flags share the runs, on one GPU too: each takes the next that
no other has. DIR/FashionMNIST/raw holds the four published files. Other flags go to train.py.
"""

import contextlib
import platform
import sys
import time
from pathlib import Path
from statistics import mean, stdev

import torch

from evavit.arguments import Parser
from evavit.bench.results import check_writable, origin, read_rows, store_rows
from evavit.cli import train
from evavit.errors import Preempted, UserError, run_script
from evavit.files import append_to
from evavit.training import build, checks, data, loop
from evavit.training.checkpoint import remove_checkpoints
from evavit.training.config import parse_settings
from evavit.training.distributed import start_process

sys.path.append(str(Path(__file__).resolve().parent.parent))

from driver import alone, make_output

ROOT = Path(__file__).resolve().parents[2]
TASKS = ('type', 'defect')
PRETRAINING = 'fashion_mnist'
ARMS = (  # model, what it starts from
    ('eva_deit_tiny', PRETRAINING),
    ('eva_deit_tiny', 'scratch'),
    ('resnet18', 'scratch'),
    ('deit_tiny_patch16_224', 'scratch'),
)
FIRST = (PRETRAINING, 'eva_deit_tiny', 'scratch', 0)  # the pretraining
GREY = ['--in-chans', '1', '--mean', '0.597', '--std', '0.164']  # of the training pictures, values in 0…1
KEY = ('task', 'model', 'start', 'seed', 'epochs', 'commit')
COLUMNS = (
    'task',
    'model',
    'start',
    'seed',
    'epochs',
    'batch_size',
    'train_images',
    'images',
    'top1',
    'balanced_accuracy',
    'macro_f1',
    'majority',
    'seconds',
    'device',
    'python',
    'torch',
    'timm',
    'evavit',
    'commit',
    'date',
)


def name_of(job):
    return '-'.join(map(str, job))


def flags_of(job, args):
    """The flags of train.py that make a run."""
    task, model, start, seed = job
    epochs = args.pretrain_epochs if task == PRETRAINING else args.epochs
    flags = [
        '--model',
        model,
        '--seed',
        str(seed),
        '--output',
        str(args.output),
        '--experiment',
        name_of(job),
        '--epochs',
        str(epochs),
        '--warmup-epochs',
        str(int(epochs > 1)),
        '--resume',
        'auto',
    ]
    if task == PRETRAINING:
        return [
            '-c',
            str(ROOT / 'experiments/fashion_mnist/fashion_mnist.yaml'),
            '--data-dir',
            str(args.fashion_mnist),
            *flags,
            '--workers',
            str(args.pretrain_workers),
            *args.flags,
        ]
    weights = ['--pretrained-path', str(args.output / name_of(FIRST) / 'last.safetensors')]
    return [
        '-c',
        str(ROOT / 'configs/finetune_small.yaml'),
        '--data-dir',
        str(args.data_dir / task),
        *flags,
        *GREY,
        '--vflip',
        '0.5',
        '--workers',
        str(args.workers),
        *(weights if start == PRETRAINING else []),
        *args.flags,
    ]


def run(job, args):
    """Train, judge the last weights on the validation split, and return the row."""
    began = time.monotonic()
    flags = flags_of(job, args)
    settings, _ = parse_settings('train', flags)
    folder = Path(settings.run.output, settings.run.experiment)
    if (file := folder / 'args.yaml').exists():
        begun = parse_settings('train', ['-c', str(file)])[0].schedule.epochs
        if begun != settings.schedule.epochs:
            raise UserError(f'{folder} is of {begun} epochs; give that, or name another --output')
    with append_to(folder.with_suffix('.log')) as log, contextlib.redirect_stdout(log):
        train.main(flags)
        row, device = judge(folder)
    if device.type == 'cuda':
        torch.cuda.empty_cache()  # this process stays, and its next run may need less
    return dict(
        zip(KEY, job, strict=False),
        epochs=settings.schedule.epochs,
        batch_size=settings.batch.batch_size,
        **row,
        seconds=round(time.monotonic() - began, 1),
        python=platform.python_version(),
        **origin(device),
    )


@torch.no_grad()
def judge(folder):
    """Scores of a finished run's last weights on its validation split, in percent, and the device."""
    from sklearn.metrics import balanced_accuracy_score, f1_score

    settings, _ = parse_settings('train', ['-c', str(folder / 'args.yaml')])
    settings.model.pretrained_path = None
    device = start_process(settings.machine.device).device
    size = settings.batch.batch_size
    channels = checks.image_channels(settings.model)
    train_set, eval_set, names = data.open_training_sets(
        settings.data, in_chans=channels, batch_size=size, seed=settings.run.seed
    )
    model = build.build_model(settings.model, len(names))
    build.load_weights(model, folder / 'last.safetensors')
    model.to(device).eval()
    config = data.resolve_input(settings.model, model)
    loader = data.eval_loader(eval_set, config, batch_size=size, machine=settings.machine, device=device)
    truth, predicted = [], []
    for images, target in loader:
        with loop.autocast(settings.machine, device):
            predicted.append(model(images).argmax(-1).cpu())
        truth.append(target.cpu())
    truth, predicted = torch.cat(truth), torch.cat(predicted)
    scores = dict(
        top1=(truth == predicted).double().mean().item(),
        balanced_accuracy=balanced_accuracy_score(truth, predicted),
        macro_f1=f1_score(truth, predicted, average='macro', zero_division=0),
        majority=truth.bincount().max().item() / len(truth),
    )
    return dict(
        train_images=len(train_set),
        images=len(truth),
        **{name: round(100 * value, 3) for name, value in scores.items()},
    ), device


def summary(rows):
    """Lines of a table: mean and standard deviation over the seeds."""
    groups = {}
    for row in rows:
        groups.setdefault((row['task'], row['model'], row['start']), []).append(row)
    for (task, model, start), found in sorted(groups.items()):
        scores = [
            f'{name} {spread([float(row[name]) for row in found])}'
            for name in ('top1', 'balanced_accuracy', 'macro_f1')
        ]
        yield (
            f'{task:13} {model:21} from {start:13} {"  ".join(scores)}  ({len(found)} seeds, majority '
            f'{float(found[0]["majority"]):.1f})'
        )


def spread(values):
    """Mean ± standard deviation (of a sample; of one value there is none)."""
    return f'{mean(values):.1f}' + (f' ± {stdev(values):.1f}' if len(values) > 1 else '')


def work(args, todo, missing):
    """Make the rows of `todo` that are `missing` in the results file. Returns the jobs that failed."""
    todo, failed = list(todo), []

    def ready(job):
        return job[2] != PRETRAINING or FIRST not in (*todo, *failed)

    while any(map(ready, todo)):
        for job in filter(ready, todo):
            with alone(args.output / f'{name_of(job)}.lock') as free:
                if not free:
                    continue
                if missing(job):
                    make(job, args, failed)
                todo.remove(job)
                break
        else:  # every one of them is another process's
            time.sleep(2)
    return failed


def make(job, args, failed):
    """One run and its row; where it fails it is one more of `failed`."""
    name = ' '.join(map(str, job))
    try:
        row = run(job, args)
    except Preempted:  # by a signal, which is meant for all
        raise
    except Exception as error:  # the other runs go on
        failed.append(job)
        print(f'{name}: failed, {type(error).__name__}: {error}', flush=True)
        return
    store_rows(args.results_file, [row], COLUMNS, KEY)
    if job != FIRST:  # the checkpoints of 40 runs are gigabytes
        remove_checkpoints(args.output / name_of(job), weights=True)
    print(
        f'{name}: top-1 {row["top1"]}  balanced accuracy {row["balanced_accuracy"]}  macro F1 {row["macro_f1"]}  '
        f'{row["seconds"]} s',
        flush=True,
    )


def parse(argv):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument('--data-dir', type=Path, required=True, help='what experiments/elpv/build_data.py wrote')
    parser.add_argument('--fashion-mnist', type=Path, required=True, metavar='DIR', help='holds FashionMNIST/raw')
    parser.add_argument('--output', type=Path, default=Path('output/elpv'), help='folder of the runs (output/elpv)')
    parser.add_argument('--results-file', type=Path, default=Path('output/elpv.csv'), metavar='CSV')
    parser.add_argument('--seeds', type=int, default=5, help='(5)')
    parser.add_argument('--epochs', type=int, default=10, help='of every run on ELPV (10)')
    parser.add_argument('--pretrain-epochs', type=int, default=5, help='on Fashion-MNIST (5)')
    parser.add_argument('--workers', type=int, default=1, help='loading processes of each (1)')
    parser.add_argument('--pretrain-workers', type=int, default=6, help='loading processes of the pretraining (6)')
    args, args.flags = parser.parse_known_args(argv)
    if min(args.seeds, args.pretrain_epochs, args.epochs) < 1:
        raise UserError('--seeds, --epochs and --pretrain-epochs must be at least 1')
    for task in TASKS:
        if not (args.data_dir / task / 'validation').is_dir():
            raise UserError(
                f'--data-dir {args.data_dir}: no {task}/validation in it; make it with '
                f'experiments/elpv/build_data.py {args.data_dir}'
            )
    if not (args.fashion_mnist / 'FashionMNIST' / 'raw').is_dir():
        raise UserError(f'--fashion-mnist {args.fashion_mnist}: no FashionMNIST/raw in it, with the four files')
    return args


def main(argv=None):
    args = parse(argv)
    commit = origin(torch.device('cpu'))['commit']

    def missing(job):
        """No row yet; of the pretraining also where a run to come needs its weights, and they are gone."""
        done = {tuple(row[name] for name in KEY) for row in read_rows(args.results_file, COLUMNS)}
        epochs = args.pretrain_epochs if job == FIRST else args.epochs
        own = tuple(map(str, (*job, epochs, commit)))
        if job == FIRST:  # its weights stay, so they are those of the commit that trained them
            done, own = {key[:-1] for key in done}, own[:-1]
        if own not in done:
            return True
        weights = args.output / name_of(FIRST) / 'last.safetensors'
        return job == FIRST and not weights.exists() and any(job[2] == PRETRAINING for job in filter(missing, jobs))

    jobs = [(task, *arm, seed) for seed in range(args.seeds) for task in TASKS for arm in ARMS]
    check_writable(args.results_file)
    make_output(args)
    known = {int(row['epochs']) for row in read_rows(args.results_file, COLUMNS) if row['task'] == PRETRAINING}
    if other := known - {args.pretrain_epochs}:
        raise UserError(
            f'--pretrain-epochs {args.pretrain_epochs}: {args.results_file} is of {min(other)}; give that, or name '
            f'another file and --output'
        )
    failed = work(args, filter(missing, [FIRST, *jobs]), missing)
    print('\n'.join(summary(read_rows(args.results_file, COLUMNS))))
    if failed:
        raise UserError(f'{len(failed)} runs failed; the same command makes them again')


if __name__ == '__main__':
    sys.exit(run_script(main))
