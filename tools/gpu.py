#!/usr/bin/env python3
"""Check and measure the fused kernels on a machine with a CUDA device: make gpu

Steps, in this order, each on its own with --steps: the tests marked gpu, the kernels under compute-sanitizer, attention
alone, the layer, whole models, the page docs/performance.md with its plots. What has been done with this code on this
machine is not done again: after a stop, the same line goes on. Logs and rows are in a folder of output/gpu, and the
rows go from there into the results file, in place of those of the same comparisons. COMMIT in the environment names
the commit where there is no git.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the package may not be installed here

from evavit.bench.results import check_writable, read_rows, store_rows  # noqa: E402
from evavit.errors import UserError  # noqa: E402
from evavit.files import append_to  # noqa: E402

GATHERING = threading.Lock()
MODELS = {  # the longest to compile first
    'pvt': ('--model', 'eva_pvt_v2_b3', '-b', '128'),
    '784': ('--model', 'eva_deit_tiny_784', '-b', '128'),
    'tiny': ('--model', 'eva_deit_tiny', '-b', '256'),
    '448': ('--model', 'eva_deit_tiny_784', '-b', '32', '--img-size', '448'),
    '896': ('--model', 'eva_deit_tiny_784', '-b', '8', '--img-size', '896'),
    'small': ('--model', 'eva_deit_small', '-b', '256'),
}
# Four models compile at one time, with workers of their own.
ENVIRONMENT = {
    'PYTHONPATH': os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')])),
    'PYTHONUNBUFFERED': '1',
    'TORCHINDUCTOR_COMPILE_THREADS': '4',
}
# The second replays CUDA graphs: there the processor's launches are in no figure.
MODES = ('default', 'reduce-overhead')
STEPS = ('test', 'sanitize', 'op', 'layer', 'models', 'page')


def work_folder() -> Path:
    """Where this code's logs and rows are: other code starts with nothing done."""
    digest = hashlib.sha256()
    for path in sorted([*ROOT.glob('*.py'), *ROOT.glob('evavit/**/*.py'), *ROOT.glob('tests/**/*.py')]):
        digest.update(path.read_bytes())
    folder = ROOT / 'output' / 'gpu' / digest.hexdigest()[:12]
    folder.mkdir(parents=True, exist_ok=True)
    return folder


WORK = work_folder()


def start(name: str, command) -> bool:
    """Run a command with its output in a log; whether it ended well."""
    begin = time.monotonic()
    with append_to(WORK / f'{name}.log') as log:
        code = subprocess.run(
            command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **ENVIRONMENT}
        ).returncode
    text = (WORK / f'{name}.log').read_text()
    print(f'== {name}: exit code {code}, {time.monotonic() - begin:.0f} s\n{text[-3000:]}', flush=True)
    return code == 0


def once(name: str, command) -> bool:
    """`start`, unless it ended well before."""
    done = WORK / f'{name}.done'
    if done.exists():
        print(f'== {name}: done before', flush=True)
    elif start(name, command):
        append_to(done).close()
    return done.exists()


def measure(name: str, flags, target: Path) -> bool:
    """`start` benchmark.py with these flags, then put its rows into the results file."""
    rows = WORK / f'{name}.csv'
    good = start(name, [sys.executable, 'benchmark.py', *flags, '--resume', '--results-file', str(rows)])
    with GATHERING:
        store_rows(target, read_rows(rows))
    return good


def measure_models(names, modes, target: Path) -> bool:
    """Models compile side by side and are measured one at a time; more at once would not fit the memory."""

    def one(task):
        name, mode = task
        return measure(
            f'{name}_{mode}',
            ['--bench', 'train', 'infer', '--torchcompile', mode, '--lock', str(WORK / 'lock'), *MODELS[name]],
            target,
        )

    with ThreadPoolExecutor(4) as pool:
        return all(list(pool.map(one, [(name, mode) for mode in modes for name in names])))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--steps', nargs='+', choices=STEPS, default=STEPS)
    parser.add_argument('--models', nargs='+', choices=MODELS, default=list(MODELS))
    parser.add_argument('--torchcompile', nargs='+', choices=MODES, default=MODES, help='modes of the models')
    parser.add_argument('--results-file', type=Path, default=ROOT / 'results' / 'h100.csv')
    args = parser.parse_args()
    if args.steps != ['page'] and not torch.cuda.is_available():  # a CPU's rows have no place among the GPU's
        print('error: no CUDA device here; --steps page needs none, make cpu-bench measures a CPU', file=sys.stderr)
        return 2

    try:
        check_writable(args.results_file)
        read_rows(args.results_file)
    except UserError as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    good = True
    for step in (step for step in STEPS if step in args.steps):
        if step == 'test':
            good &= once('test', [sys.executable, '-m', 'pytest', '-q', '-m', 'gpu', '-n', '6'])
        elif step == 'sanitize' and shutil.which('compute-sanitizer') is None:
            print('== sanitize: compute-sanitizer is not on the path; left out', flush=True)
        elif step == 'sanitize':
            good &= once('sanitize', [sys.executable, 'tools/sanitize.py'])
        elif step in ('op', 'layer'):
            good &= measure(step, ['--bench', step], args.results_file)
        elif step == 'models':
            good &= measure_models(args.models, args.torchcompile, args.results_file)
        elif step == 'page':
            good &= start('page', [sys.executable, 'docs/make/tables.py'])
    return int(not good)


if __name__ == '__main__':
    sys.exit(main())
