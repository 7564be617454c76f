#!/usr/bin/env python3
"""Measure every figure of docs/performance.md on a machine with a CUDA device, then check the kernels: make gpu

Steps, what says most first, each on its own with --steps; those that measure write one file a table, such as
results/op_h200.csv. The step page makes the tables anew, test runs the tests marked gpu, sanitize the kernels under
compute-sanitizer. A stop at any time keeps what was measured, and the same line goes on from there: logs and rows of
this code are in a folder of output/gpu. A results file has rows of this code alone: it is written, in place of what was
there, once all tasks of its table are done. COMMIT in the environment names the commit where there is no git.
"""

import argparse
import contextlib
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the package may not be installed here

from evavit.bench.convert import VITS  # noqa: E402
from evavit.bench.results import HARMLESS, Row, check_writable, read_rows, write_rows  # noqa: E402
from evavit.errors import UserError  # noqa: E402
from evavit.files import append_to  # noqa: E402
from evavit.layers import ATTENTIONS  # noqa: E402

# Processes that compile side by side: more would not fit the memory of the device.
JOBS = 7
ENVIRONMENT = {
    'PYTHONPATH': os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')])),
    'PYTHONUNBUFFERED': '1',
    'OMP_NUM_THREADS': '2',
    'TORCHINDUCTOR_COMPILE_THREADS': '2',
}
BACKENDS = ('--backend', 'gluon', 'triton', 'flash', 'cudnn', 'efficient')
PEERS = ('--backend', 'gluon', 'triton', 'cudnn', 'flash', 'flex', 'windows', 'linear', 'natten')
FEW = ('--repeats', '20', '--warmup', '3')
GRAPHS = ('--torchcompile', 'reduce-overhead')
LENGTHS = ('14', '28', '56', '112', '256')


class Task(NamedTuple):
    """One run of benchmark.py.

    Args:
        name: Of its log and rows.
        flags: Of benchmark.py.
        seconds: About how long it takes on an H200 with 16 cores.
        compiles: It may compile beside others; they measure one at a time.
        instead_of: It runs only where the task of this name failed.
        warms: It fills the compiler's cache for those after it, and its rows go nowhere.
    """

    name: str
    flags: Tuple[str, ...]
    seconds: int
    compiles: bool = False
    instead_of: str = ''
    warms: bool = False


def _words(text: str) -> Tuple[str, ...]:
    return tuple(text.split())


SIZES = {  # model, batch, side of the images if not the model's, seconds to compile training; the longest first
    'pvt': ('pvt_v2_b3', '128', '', 120),
    'small': ('deit_small', '256', '', 50),
    '784': ('deit_tiny_784', '128', '', 50),
    'tiny': ('deit_tiny', '256', '', 50),
    '448': ('deit_tiny_784', '32', '448', 50),
    '896': ('deit_tiny_784', '8', '896', 50),
}


def _graphs() -> List[Task]:
    """EVA's model beside timm's softmax model, and our own softmax model, a process each."""
    tasks = []
    for size, (name, batch, side, seconds) in SIZES.items():
        for bench, share in (('train', 1.0), ('infer', 0.6)):
            for attention, models in (('eva', 2), ('softmax', 1)):
                flags = ['--bench', bench, '--model', f'{attention}_{name}', '-b', batch, *GRAPHS, *FEW]
                flags += ['--img-size', side] if side else []
                needed = int(20 + share * seconds * models)
                tasks.append(Task(f'{size}_{attention}_{bench}', tuple(flags), needed, True))
    return tasks


def _modes() -> List[Task]:
    """The same in eager mode and in the default mode, where Python is in the times: nothing else runs meanwhile."""
    sizes = {size: values for size, values in SIZES.items() if not values[2]}
    default = ('--torchcompile', 'default')

    def tasks(mode: str, seconds: int, *flags: str) -> List[Task]:
        return [
            Task(
                f'{size}_{mode}',
                ('--bench', 'train', 'infer', '--model', f'eva_{name}', f'softmax_{name}', '-b', batch, *flags, *FEW),
                seconds,
            )
            for size, (name, batch, *_) in sizes.items()
        ]

    warm = [
        Task(
            f'{size}_{attention}_{bench}_warm',
            ('--bench', bench, '--model', f'{attention}_{name}', '-b', batch, *default, '--repeats', '1'),
            20 + seconds,
            compiles=True,
            warms=True,
        )
        for size, (name, batch, _, seconds) in sizes.items()
        for bench in ('train', 'infer')
        for attention in ('eva', 'softmax')
    ]
    return [*tasks('eager', 35), *warm, *tasks('default', 60, *default)]


def _zoo() -> List[Task]:
    models = [f'{attention}_deit_tiny_784' for attention in ATTENTIONS]
    few = ('-b', '128', '--repeats', '10', '--warmup', '3')
    tasks = [Task('zoo_eager', ('--bench', 'train', '--model', *models, *few), 90)]
    for mode in ('reduce-overhead', 'default'):
        for model in models:
            flags = ('--bench', 'train', 'infer', '--model', model, '--torchcompile', mode, *few)
            failed = f'{model}_reduce-overhead' if mode == 'default' else ''
            tasks.append(Task(f'{model}_{mode}', flags, 0 if failed else 110, True, failed))
    for size, batch in (('deit_tiny', '256'), ('deit_small', '256'), ('pvt_v2_b3', '128')):
        family = [f'{attention}_{size}' for attention in ('local', 'performer', 'lara')]
        tasks.append(
            Task(f'{size}_family', ('--bench', 'train', 'infer', '--model', *family, '-b', batch, *few[2:]), 50)
        )
    return tasks


def _converted_graphs() -> List[Task]:
    flags = (*_words('--bench convert --repeats 6 --warmup 2'), *GRAPHS)
    return [
        Task(f'convert_{number}_{side}_graphs', (*flags, '--model', vit, '--img-size', side), 150, True)
        for side in ('518', '1022', '224')
        for number, vit in reversed(list(enumerate(VITS)))
    ]


# The tables, what says most first.
TABLES: Dict[str, List[Task]] = {
    'op': [Task('op', ('--bench', 'op', '--grid', *LENGTHS, *BACKENDS, *FEW), 100)],
    'host': [Task('host', _words('--bench host --repeats 300 --warmup 30'), 25)],
    'models': _graphs(),
    'modes': _modes(),
    'layer': [Task('layer', ('--bench', 'layer', '--grid', *LENGTHS, *BACKENDS, *FEW), 90)],
    'cells': [
        Task(
            'cells',
            (
                *_words('--bench op --grid 64 128 37 28 --partition-grid 16 16 13 7 --num-prefix-tokens 0 5'),
                *_words('--count-cells outside --dim 768 --num-heads 12'),
                *BACKENDS,
                *FEW,
            ),
            100,
        )
    ],
    'wide': [
        Task('wide', _words('--bench convert --model vit_small_patch14_reg4_dinov2 --img-size 518 -b 32'), 35),
    ],
    'peers': [Task('peers', ('--bench', 'op', '--grid', '14', '28', '56', '112', '224', *PEERS, *FEW), 170)],
    'zoo': _zoo(),
    'convert': [Task('convert', _words('--bench convert --img-size 224 518 1022 2044 --repeats 10 --warmup 2'), 230)],
    'convert_graphs': _converted_graphs(),
}
FILES = {'cells': 'op_cells'}  # where the file is not called as the step
# What rows depend on, and what the steps test and sanitize do.
MEASURED = tuple(f'evavit/{room}' for room in ('ops/**/*', 'layers/**/*', 'models/**/*', 'bench/**/*'))
MEASURED += ('evavit/training/compilation', 'evavit/cli/benchmark')
CHECKED = ('*', 'evavit/**/*', 'tests/**/*', 'tools/*')
STEPS = (*TABLES, 'page', 'test', 'sanitize')
DEFAULT = tuple(step for step in STEPS if 'convert' not in step)  # timm's ViTs, docs/convert.md: nine minutes more


def digest_of(parts: Sequence[str]) -> str:
    """Of the content of Python files, by patterns without their ending."""
    digest = hashlib.sha256()
    for path in sorted(path for part in parts for path in ROOT.glob(f'{part}.py')):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def work_folder() -> Path:
    """Where this code's logs and rows are: other code of what is measured starts with nothing done."""
    return ROOT / 'output' / 'gpu' / digest_of(MEASURED)


class Driver:
    """Runs commands with their output in logs, until it is stopped.

    Args:
        work: The folder of logs, rows and marks of what is done. It is made if missing.
    """

    def __init__(self, work: Path) -> None:
        work.mkdir(parents=True, exist_ok=True)
        self.work, self.begin, self.stopped = work, time.monotonic(), False
        self.printing, self.running = threading.Lock(), set()

    @contextlib.contextmanager
    def until(self, seconds: Optional[float]) -> Iterator[None]:
        """Within it a signal stops this, and so does the end of the time. After it signals are whose they were."""
        clock = threading.Timer(seconds or 0, self.stop)
        clock.daemon = True
        if seconds is not None:
            clock.start()
        before = {number: signal.signal(number, self.stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            clock.cancel()
            for number, handler in before.items():
                signal.signal(number, handler)

    def stop(self, *_: object) -> None:
        """End what runs, and begin nothing more. A signal handler, too."""
        self.stopped = True
        for process in list(self.running):
            with contextlib.suppress(ProcessLookupError):  # it has ended
                os.killpg(process.pid, signal.SIGTERM)  # with those that compile for it

    def say(self, text: str) -> None:
        with self.printing:
            print(f'[{time.monotonic() - self.begin:4.0f} s] {text}', flush=True)

    def once(self, name: str, command: List[str]) -> bool:
        """Run a command unless it ended well before; whether it has. Each row that it prints is a line here too."""
        done = self.work / f'{name}.done'
        if done.exists():
            self.say(f'{name}: done before')
            return True
        if self.stopped:
            self.say(f'{name}: stopped before; the same line goes on')
            return False
        begin = time.monotonic()
        with append_to(self.work / f'{name}.log') as log:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env={**os.environ, **ENVIRONMENT},
                encoding='utf-8',
                errors='replace',
                start_new_session=True,
            )
            self.running.add(process)
            if self.stopped:  # meanwhile
                self.stop()
            tail: List[str] = []
            for line in process.stdout or ():
                log.write(line)
                tail = [*tail[-20:], line.rstrip()]
                if line.startswith('bench '):
                    self.say(f'{name}: {tail[-1].removeprefix("bench ")}')
            code = process.wait()
            self.running.discard(process)
        if code == 0:
            append_to(done).close()
        elif not self.stopped:
            self.say('\n'.join([f'{name}: exit code {code}, its end:', *tail]))
        self.say(f'{name}: {"done" if code == 0 else "not done"}, {time.monotonic() - begin:.0f} s')
        return code == 0

    def rows(self, name: str) -> List[Row]:
        return read_rows(self.work / f'{name}.csv')

    def measure(self, task: Task) -> bool:
        """benchmark.py with a task's flags, and rows in a file of its own."""
        if task.instead_of and all(row['status'] in HARMLESS for row in self.rows(task.instead_of)):
            return True
        lock = ('--lock', str(self.work / 'lock')) if task.compiles else ()
        flags = [*task.flags, *lock, '--resume', '--results-file', str(self.work / f'{task.name}.csv')]
        return self.once(task.name, [sys.executable, 'benchmark.py', *flags])

    def measure_all(self, tasks: List[Task]) -> bool:
        """One after the other, those that compile side by side; whether all figures are there."""
        good = {}
        for (compiles, instead), group in groupby(tasks, lambda task: (task.compiles, bool(task.instead_of))):
            group = list(group)
            with ThreadPoolExecutor(min(JOBS, -(-(os.cpu_count() or 1) // 2)) if compiles else 1) as pool:
                good.update(zip((task.name for task in group), pool.map(self.measure, group), strict=True))
            good.update({task.instead_of: good[task.name] for task in group if instead})
        return all(good.values())


def expected(tasks: List[Task]) -> float:
    """Seconds that tasks take."""
    alone = sum(task.seconds for task in tasks if not task.compiles)
    together = [task.seconds for task in tasks if task.compiles]
    return alone + max(sum(together) / JOBS, max(together, default=0))


def store(driver: Driver, tasks: List[Task], target: Path) -> None:
    """Put the rows of this code into a results file, in place of all that it had, once all are there."""
    done = {task.name for task in tasks if (driver.work / f'{task.name}.done').exists()}
    done |= {task.instead_of for task in tasks if task.instead_of and task.name in done}
    left = sum(not done & {task.name, task.instead_of} for task in tasks)
    if left:
        driver.say(f'{target.name} stays as it is: {left} tasks of its table are left; rows are in {driver.work}')
        return
    rows = [row for task in tasks if not task.warms for row in driver.rows(task.name)]
    failed = {task.instead_of for task in tasks if task.instead_of and driver.rows(task.name)}
    dropped = [row for name in failed for row in driver.rows(name) if row['status'] not in HARMLESS]
    write_rows(target, [row for row in rows if row not in dropped])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--steps',
        nargs='+',
        choices=STEPS,
        default=DEFAULT,
        metavar='STEP',
        help=f'{", ".join(STEPS)} (default: all but the two of convert)',
    )
    parser.add_argument('--only', nargs='+', metavar='WORD', help='tasks whose name has one of these words')
    parser.add_argument('--list', action='store_true', help='say what would be measured, and how long it should take')
    parser.add_argument('--seconds', type=float, help='stop after so many; the same line goes on')
    parser.add_argument('--results-folder', type=Path, default=ROOT / 'results')
    parser.add_argument('--name', help="the device's name in names of files (default: its last word, such as h200)")
    args = parser.parse_args()
    work = work_folder()
    tables = {
        step: [task for task in tasks if not args.only or any(word in task.name for word in args.only)]
        for step, tasks in TABLES.items()
        if step in args.steps
    }
    if tables and not any(tables.values()):
        print(f'error: --only {" ".join(args.only)}: no task has such a name; --list names them', file=sys.stderr)
        return 2
    total = sum(map(expected, tables.values()))
    for step, tasks in tables.items():
        done = sum((work / f'{task.name}.done').exists() for task in tasks)
        print(f'{step}: {len(tasks)} tasks, {done} done, {expected(tasks):.0f} s in all')
    print(f'About {total / 60:.0f} minutes on an H200 with 16 cores; page, test and sanitize beside that.', flush=True)
    if args.list:
        for tasks in tables.values():
            for task in tasks:
                print(f'{task.name}: benchmark.py {" ".join(task.flags)}')
        return 0
    if args.steps != ['page'] and not torch.cuda.is_available():  # a CPU's rows have no place among the GPU's
        print('error: no CUDA device here; --steps page needs none, make cpu-bench measures a CPU', file=sys.stderr)
        return 2

    name = args.name or re.sub('[^a-z0-9]', '', torch.cuda.get_device_name().split()[-1].lower()) if tables else ''
    targets = {step: args.results_folder / f'{FILES.get(step, step)}_{name}.csv' for step in tables}
    try:
        for target in targets.values():
            check_writable(target)
            read_rows(target)
    except UserError as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    good, driver, checked = True, Driver(work), digest_of(CHECKED)
    with driver.until(args.seconds):
        for step in (step for step in STEPS if step in args.steps):
            if step in tables:
                try:
                    good &= driver.measure_all(tables[step])
                finally:
                    store(driver, TABLES[step], targets[step])
            elif driver.stopped:
                driver.say(f'{step}: stopped before; the same line goes on')
                good = False
            elif step == 'page':
                good &= not subprocess.run([sys.executable, 'docs/make/tables.py'], cwd=ROOT, check=False).returncode
            elif step == 'test':
                flags = _words('-q -m gpu -n 12 --dist worksteal --durations 5')
                good &= driver.once(f'test_{checked}', [sys.executable, '-m', 'pytest', *flags])
            elif shutil.which('compute-sanitizer') is None:
                driver.say('sanitize: compute-sanitizer is not on the path; left out')
            else:
                good &= driver.once(f'sanitize_{checked}', [sys.executable, 'tools/sanitize.py'])
    return int(not good)


if __name__ == '__main__':
    sys.exit(main())
