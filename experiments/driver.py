"""What drivers of experiments share: runs of train.py in an order, and a row of a CSV file for each.

After a stop (SIGTERM, or --seconds are over) the same command goes on within the epoch. Several processes may share
the runs (one a GPU, by CUDA_VISIBLE_DEVICES): each takes the next that no other has. A run is a job: anything that can
be hashed and has a `name`. Its state is `done`, `to do`, `started`, or one line on what it waits for.
"""

import contextlib
import csv
import functools
import gc
import hashlib
import itertools
import json
import os
import platform
import signal
import threading
import time
from pathlib import Path

import torch
from tiny_imagenet.build import missing  # beside this file, where whoever imports it looks

from evavit.arguments import Parser
from evavit.bench.results import ORIGIN, check_writable, origin, read_rows, store_rows
from evavit.cli import train, validate
from evavit.errors import Preempted, UserError, reason_of
from evavit.files import append_to, open_regular, replacing
from evavit.training.distributed import start_process
from evavit.training.run_folder import has_begun

ABOUT = ('settings', 'settings_sha256', 'python', *ORIGIN)  # the last columns of every row, see `about`


def parser_of(text, output, data='what experiments/tiny_imagenet/build.py wrote'):
    """A parser with the flags of every driver. What it does not know is for train.py: see `parse`."""
    parser = Parser(description=text.splitlines()[0])
    parser.add_argument('--data-dir', type=Path, help=data)
    parser.add_argument('--output', type=Path, default=Path(output), help=f'folder of the runs ({output})')
    parser.add_argument('--results-file', type=Path, metavar='CSV', help='(runs.csv in --output)')
    parser.add_argument('--only', nargs='+', default=[], metavar='TEXT', help='runs with one of these in their name')
    parser.add_argument('--seconds', type=float, help='stop in good order after so many')
    parser.add_argument(
        '--least', type=float, default=15, help='start no run with less of --seconds left than this (15)'
    )
    parser.add_argument('--list', action='store_true', help='show every run and its state')
    return parser


def parse(parser, argv):
    """The flags of a parser of `parser_of`, with the default of --results-file; `flags` are those for train.py."""
    args, args.flags = parser.parse_known_args(argv)
    args.results_file = args.results_file or args.output / 'runs.csv'
    return args


def chosen(jobs, args):
    """The jobs that --only names."""
    jobs = list(jobs)
    unknown = [text for text in args.only if not any(text in job.name for job in jobs)]
    if unknown:
        raise UserError(f'--only {unknown[0]}: no run has that in its name; --list shows them')
    return [job for job in jobs if not args.only or any(text in job.name for text in args.only)]


def check_data(args):
    """UserError unless --data-dir is what experiments/tiny_imagenet/build.py wrote, whole."""
    if args.data_dir is None:
        raise UserError('give --data-dir DIR, what experiments/tiny_imagenet/build.py wrote')
    if lacks := missing(args.data_dir):
        raise UserError(lacks)


def link_pictures(folder, paths):
    """A folder of links to pictures DIR/SPLIT/CLASS/NAME, made where it is not there."""
    with alone(folder.with_name(f'{folder.name}.lock'), wait=True):
        if not folder.is_dir():
            with replacing(folder) as partial:
                for path in paths:
                    link = partial / path.parent.parent.name / path.parent.name / path.name
                    link.parent.mkdir(parents=True, exist_ok=True)
                    link.symlink_to(path.resolve())
    return folder


def rows_to_report(args, columns):
    """The rows of --results-file, of which --report makes its tables; UserError where there are none."""
    rows = read_rows(args.results_file, columns)
    if not rows:
        raise UserError(f'--results-file {args.results_file}: no rows to report; give a file that has some')
    return rows


def drive(args, jobs, columns, run, says, state=None, tidy=lambda job: None):
    """What --list asks for, or the runs. Arguments are those of `work`, and `state` is `state_of` unless some wait for
    others; UserError where a run failed."""
    state = state or (lambda job, rows: state_of(job, rows, args.output))
    if args.list:
        rows = read_rows(args.results_file, columns)
        for job in jobs:
            print(f'{job.name:28} {state(job, rows)}')
    elif failed := work(args, jobs, columns, state, run, says, tidy):
        raise UserError(f'{failed} runs failed; the same command makes them again')


def state_of(job, rows, output):
    """The state of a job that waits for no other."""
    if job.name in {row['run'] for row in rows}:
        return 'done'
    return 'started' if (output / job.name / 'last.pth.tar').exists() else 'to do'


def work(args, jobs, columns, state, run, says, tidy):
    """The runs in their order, until the time is over. Returns the number that failed.

    Args:
        args: Of `parser_of`.
        jobs: Those to do.
        columns: Of the results file; `run` is one of them, the job's name.
        state: From a job and the file's rows to its state.
        run: From a job, the rows and the seconds left (None: no end) to its row.
        says: From a row to what is printed of it.
        tidy: Removes what a job's folder has that is of no use once its row is stored.
    """
    check_writable(args.results_file)
    beside(args, 'settings')
    end = time.monotonic() + args.seconds if args.seconds else None
    failed = []
    while True:
        rows = read_rows(args.results_file, columns)
        states = {job: state(job, rows) for job in jobs if job.name not in failed}
        ready = [job for job, what in states.items() if what in ('to do', 'started')]
        left = end - time.monotonic() if end else None
        if ready and left is not None and left < args.least:
            print(f'{ready[0].name} and what follows: no time left, the same command goes on', flush=True)
            break
        for job in ready:
            with alone(args.output / f'{job.name}.lock') as free:
                rows = read_rows(args.results_file, columns)
                if free and job.name not in {row['run'] for row in rows}:
                    try:
                        row = attempt(job, args, functools.partial(run, job, rows, left))
                    except Preempted as error:
                        print(f'{job.name}: {error}', flush=True)
                        return len(failed)
                    if row is None:
                        failed.append(job.name)
                        break
                    store_rows(args.results_file, [row], columns, key=['run'])
                    print(f'{job.name}: {says(row)}', flush=True)
                    tidy(job)
                    break
        else:  # every one of them is another process's, or there is none
            if not ready:
                for job, what in states.items():
                    print(f'{job.name}: {what}', flush=True)
                break
            time.sleep(2)
    return len(failed)


def attempt(job, args, run):
    """The row of one run, whose output goes to a log file; None where it failed, so that the other runs go on."""
    began = time.monotonic()
    before = args.output / job.name / 'seconds_before'
    log = args.output / f'{job.name}.log'
    try:
        with append_to(log) as file, contextlib.redirect_stdout(file):
            return run()
    except Preempted:
        write_number(before, read_number(before) + time.monotonic() - began)
        raise
    except Exception as error:
        print(f'{job.name}: failed, {type(error).__name__}: {str(error)[:400]}; see {log}', flush=True)
        return None
    finally:
        torch._dynamo.reset()  # compiled code and CUDA graphs of a run are of no use to the next
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def train_to_end(flags, folder, seconds_left):
    """Train with these flags of train.py unless that is done and the weights are there still. Raises Preempted where
    the time is over before."""
    if finished(folder) and (folder / 'last.safetensors').is_file():
        return
    began = time.monotonic()
    with stopping_after(seconds_left):
        train.main(flags)
    seconds = time.monotonic() - began + read_number(folder / 'seconds_before')
    write_number(folder / 'train_seconds', seconds)


def of_training(job, args, settings, began):
    """Of a run that has come to its end: the rows of its summary.csv, and columns of times with `ABOUT`."""
    folder = args.output / job.name
    with open(folder / 'summary.csv', newline='') as file:
        epochs = list(csv.DictReader(file))
    return epochs, dict(
        train_seconds=read_number(folder / 'train_seconds'),
        train_images_per_second=max(float(row['train_images_per_second']) for row in epochs),
        seconds=round(time.monotonic() - began, 1),
        **about(job, folder / 'args.yaml', args, start_process(settings.machine.device).device),
    )


def judge(weights, data_dir, settings, folder, extra=(), split='val'):
    """What validate.py says of weights on the pictures in DIR/SPLIT, with the settings of their training."""
    flags = ['--checkpoint', weights, '--results-file', folder / 'val.json', *extra]
    validate.main([*judging(data_dir, split, settings), *map(str, flags)])
    return json.loads((folder / 'val.json').read_text())


def judging(data_dir, split, settings):
    """Flags of validate.py: pictures, and the machine of a training, its decoder too."""
    machine = settings.machine
    flags = ['--data-dir', data_dir, '--split', split, '--workers', machine.workers, '-b', settings.batch.batch_size]
    flags += ['--device', machine.device] * bool(machine.device) + ['--amp' if machine.amp else '--no-amp']
    return list(map(str, [*flags, '--augment-device', machine.augment_device]))


def finished(folder, begun=has_begun):
    """Whether training has come to the run's end, which is when its time is noted. UserError where the folder has a
    time, and none of a run's that has `begun` there."""
    if not os.path.lexists(folder / 'train_seconds'):
        return False
    if not begun(folder):
        raise UserError(
            f'{folder} holds train_seconds, which no run has left there; name another --output, or move train_seconds'
        )
    return True


def read_number(path):
    return float(path.read_text()) if path.exists() else 0.0


def write_number(path, value, digits=1):
    with replacing(path) as partial:
        partial.write_text(f'{value:.{digits}f}')


def make_output(args):
    """UserError where --output cannot be made."""
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f'--output {args.output}: cannot be made ({reason_of(error)}); name another folder') from error


def beside(args, name):
    """The folder of this name beside the results file; UserError where it is a link or a file."""
    folder = Path(args.results_file).parent / name
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UserError(f'{folder}: is a link or no folder; take it away, or name another --results-file')
    return folder


def save_plot(figure, results_file):
    """A figure of Matplotlib as SVG beside the results file."""
    path = results_file.with_suffix('.svg')
    try:
        if os.path.lexists(path):
            with open_regular(path) as file:
                if b'Matplotlib v' not in file.read(2000):  # as it says itself
                    raise UserError(f'{path} is there, and is no plot of Matplotlib; move it, or the results file')
        with replacing(path) as partial:
            figure.savefig(partial, format='svg', metadata=dict(Date=None))
    except OSError as error:
        raise UserError(f'{path}: cannot be written ({reason_of(error)})') from error


@contextlib.contextmanager
def stopping_after(seconds):
    """SIGTERM to this process when the time is over: train.py saves, and stops in good order."""
    timer = threading.Timer(max(1.0, seconds), os.kill, (os.getpid(), signal.SIGTERM)) if seconds is not None else None
    if timer:
        timer.daemon = True
        timer.start()
    try:
        yield
    finally:
        if timer:
            timer.cancel()


@contextlib.contextmanager
def alone(path, wait=False):
    """Whether no other process of this driver is where this one wants to be; it is let in when this one is out."""
    import fcntl  # not on every system

    try:
        lock = append_to(path)
    except OSError as error:
        raise UserError(f'{path}: cannot be locked ({reason_of(error)})') from error
    with lock as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


def about(job, file, args, device):
    """The columns `ABOUT`. The settings of the run, `file`, are kept beside the results file."""
    content = file.read_bytes()
    return dict(
        settings=keep(content, beside(args, 'settings'), f'{job.name}.yaml').name,
        settings_sha256=hashlib.sha256(content).hexdigest()[:16],
        python=platform.python_version(),
        **origin(device),
    )


def keep(content, folder, name):
    """The file that holds what a run leaves beside its results: NAME, or where that is another's, the first of NAME-1,
    NAME-2, … (before the ending) that nobody has, or that holds the same."""
    folder.mkdir(parents=True, exist_ok=True)
    stem, dot, ending = name.rpartition('.')
    names = (f'{stem}-{number}{dot}{ending}' if number else name for number in itertools.count())
    for kept in map(folder.joinpath, names):
        if not os.path.lexists(kept):
            with contextlib.suppress(FileExistsError), replacing(kept, new=True) as partial:
                partial.write_bytes(content)
        if kept.is_file() and not kept.is_symlink() and kept.read_bytes() == content:
            return kept
