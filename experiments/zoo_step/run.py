#!/usr/bin/env python3
"""Memory and time of a training step with each attention: python experiments/zoo_step/run.py --results-file FILE.csv

Table 6 of the paper on a GPU, as in results/zoo_h100.csv. Runs `benchmark.py --bench train` on every `*_deit_tiny_784`
model: first as they are, one after the other, then under torch.compile, some of them compiling side by side while one
at a time is measured. The rows have benchmark.py's columns and are written as they come: a run cut short leaves what it
measured, and the same line goes on from there. A model that fails has a row that says why, and the exit code is 1.
"""

import argparse
import fnmatch
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import timm

import evavit  # noqa: F401  registers the models

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from evavit.bench.results import check_writable, read_rows, store_rows  # noqa: E402
from evavit.errors import UserError, run_script  # noqa: E402


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', default='*_deit_tiny_784', help='wildcard (default: *_deit_tiny_784)')
    parser.add_argument('-b', '--batch-size', default='128')
    parser.add_argument('--amp-dtype', default='bfloat16')
    parser.add_argument('--device', default='cuda')
    parser.add_argument('--repeats', default='20')
    parser.add_argument('--jobs', type=int, default=4, help='models that compile side by side (default: 4)')
    parser.add_argument('--eager-only', action='store_true', help='leave torch.compile out')
    parser.add_argument(
        '--lock',
        type=Path,
        help='one measurement at a time by this file, for other processes that '
        'measure on the same device (default: one of its own)',
    )
    parser.add_argument('--results-file', type=Path, default=ROOT / 'results' / 'zoo_h100.csv')
    args = parser.parse_args(argv)
    check_writable(args.results_file)
    read_rows(args.results_file)
    models = fnmatch.filter(timm.list_models(), args.model)
    if not models:
        raise UserError(f'no model is called {args.model}')
    base = [
        sys.executable,
        str(ROOT / 'benchmark.py'),
        '--bench',
        'train',
        '-b',
        args.batch_size,
        '--amp-dtype',
        args.amp_dtype,
        '--device',
        args.device,
        '--repeats',
        args.repeats,
        '--warmup',
        '3',
        '--resume',
    ]

    with tempfile.TemporaryDirectory() as folder:
        base += ['--lock', str(args.lock or Path(folder, 'lock'))]
        failed = (
            subprocess.run(
                [*base, '--model', *models, '--results-file', str(args.results_file)], cwd=ROOT, check=False
            ).returncode
            != 0
        )
        if args.eager_only:
            raise SystemExit(int(failed))
        storing = threading.Lock()

        def compiled(model):
            """A process and a file a model: side by side they would write over each other's rows."""
            file = Path(folder, f'{model}.csv')
            with storing:
                store_rows(file, [row for row in read_rows(args.results_file) if row['case'] == model])
            done = subprocess.run(
                [*base, '--model', model, '--torchcompile', 'default', '--results-file', str(file)],
                cwd=ROOT,
                check=False,
            )
            with storing:
                store_rows(args.results_file, read_rows(file))
            return done.returncode != 0

        with ThreadPoolExecutor(args.jobs) as pool:
            failed |= any(list(pool.map(compiled, models)))
    raise SystemExit(int(failed))


if __name__ == '__main__':
    sys.exit(run_script(main))
