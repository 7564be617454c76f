#!/usr/bin/env python3
"""Does pretraining help on few pictures? python experiments/elpv/run.py --data-dir data/elpv --fashion-mnist DIR

    python experiments/elpv/build_data.py data/elpv
    python experiments/elpv/run.py --data-dir data/elpv --fashion-mnist DIR --jobs 12 --results-file FILE.csv

An EVA model (`eva_deit_tiny`) is trained on Fashion-MNIST at 28 pixels with patch 2, then fine-tuned on ELPV at 224
with patch 16: the same 196 tokens, the patches resampled. Beside it the same model, timm's `resnet18` and timm's
`deit_tiny_patch16_224` from scratch. All have one budget, configs/finetune_small.yaml, on two tasks, with --seeds
seeds; they differ in where they start and in nothing else. The last weights are judged, not the best: the pictures of
the validation are the test here. Needs scikit-learn.

Every run is one of train.py; its scores are a row of --results-file as soon as it ends, and a second call makes the
rows that are missing. DIR/FashionMNIST/raw holds the four published files. Other flags go to train.py.
"""

import contextlib
import multiprocessing
import platform
import sys
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path
from statistics import mean, stdev

import torch

from evavit.arguments import Parser
from evavit.bench.results import check_writable, origin, read_rows, store_rows
from evavit.cli import train
from evavit.errors import Preempted, UserError, reason_of, run_script
from evavit.files import append_to
from evavit.training import build, checks, data, loop
from evavit.training.checkpoint import remove_checkpoints
from evavit.training.config import parse_settings
from evavit.training.distributed import start_process

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
    torch.set_num_threads(1)  # several runs share the cores
    flags = flags_of(job, args)
    settings, _ = parse_settings('train', flags)
    folder = Path(settings.run.output, settings.run.experiment)
    with append_to(folder.with_suffix('.log')) as log, contextlib.redirect_stdout(log):
        train.main(flags)
        row, device = judge(folder)
    if job != FIRST:  # the checkpoints of 40 runs are gigabytes
        remove_checkpoints(folder, weights=True)
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


def fork_loaders():
    """In a process of the pool: loaders fork. Its own way, a fork server, would import it all again for every epoch."""
    multiprocessing.set_start_method('fork', force=True)


def work(args, first, later):
    """(job, its row or the exception that it ended with) as they end; `later` waits for a pretraining among `first`."""
    if args.jobs == 1:
        for job in (*first, *later):
            try:
                yield job, run(job, args)
            except Preempted:  # by a signal, which is meant for all
                raise
            except Exception as error:  # the other runs go on
                yield job, error
        return
    context = multiprocessing.get_context('forkserver')  # its children have all of this imported, and no CUDA
    context.set_forkserver_preload(['evavit.bench.results', 'evavit.training.data', 'sklearn.metrics'])
    with ProcessPoolExecutor(args.jobs, context, fork_loaders) as pool:
        pending = {pool.submit(run, job, args): job for job in first}
        if FIRST not in first:
            pending |= {pool.submit(run, job, args): job for job in later}
        try:
            while pending:
                for future in wait(pending, return_when=FIRST_COMPLETED).done:
                    job = pending.pop(future)
                    if job == FIRST:
                        pending |= {pool.submit(run, job, args): job for job in later}
                    yield job, future.exception() or future.result()
        finally:
            pool.shutdown(cancel_futures=True)  # after a stop


def parse(argv):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument('--data-dir', type=Path, required=True, help='what experiments/elpv/build_data.py wrote')
    parser.add_argument('--fashion-mnist', type=Path, required=True, metavar='DIR', help='holds FashionMNIST/raw')
    parser.add_argument('--output', type=Path, default=Path('output/elpv'), help='folder of the runs (output/elpv)')
    parser.add_argument('--results-file', type=Path, default=Path('output/elpv.csv'), metavar='CSV')
    parser.add_argument('--seeds', type=int, default=5, help='(5)')
    parser.add_argument('--epochs', type=int, default=10, help='of every run on ELPV (10)')
    parser.add_argument('--pretrain-epochs', type=int, default=5, help='on Fashion-MNIST (5)')
    parser.add_argument('--jobs', type=int, default=1, help='runs side by side (1)')
    parser.add_argument('--workers', type=int, default=1, help='loading processes of each (1)')
    parser.add_argument('--pretrain-workers', type=int, default=6, help='loading processes of the pretraining (6)')
    args, args.flags = parser.parse_known_args(argv)
    if min(args.seeds, args.jobs, args.pretrain_epochs, args.epochs) < 1:
        raise UserError('--seeds, --jobs, --epochs and --pretrain-epochs must be at least 1')
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
    done = {tuple(row[name] for name in KEY) for row in read_rows(args.results_file, COLUMNS)}

    def missing(job):
        epochs = args.pretrain_epochs if job == FIRST else args.epochs
        return tuple(map(str, (*job, epochs, commit))) not in done

    jobs = [(task, *arm, seed) for seed in range(args.seeds) for task in TASKS for arm in ARMS]
    todo = list(filter(missing, jobs))
    later = [job for job in todo if job[2] == PRETRAINING]
    if missing(FIRST) or (later and not Path(args.output, name_of(FIRST), 'last.safetensors').exists()):
        todo = [FIRST, *todo]
    failed = 0
    check_writable(args.results_file)
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f'--output {args.output}: cannot be made ({reason_of(error)}); name another folder') from error
    for job, row in work(args, [job for job in todo if job not in later], later):
        name = ' '.join(map(str, job))
        if isinstance(row, Preempted):
            raise row
        if isinstance(row, BaseException):
            failed += 1
            print(f'{name}: failed, {type(row).__name__}: {row}', flush=True)
            continue
        if missing(job):
            store_rows(args.results_file, [row], COLUMNS, KEY)
        print(
            f'{name}: top-1 {row["top1"]}  balanced accuracy {row["balanced_accuracy"]}  macro F1 {row["macro_f1"]}  '
            f'{row["seconds"]} s',
            flush=True,
        )
    print('\n'.join(summary(read_rows(args.results_file, COLUMNS))))
    if failed:
        raise UserError(f'{failed} runs failed; the same command makes them again')


if __name__ == '__main__':
    sys.exit(run_script(main))
