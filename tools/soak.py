#!/usr/bin/env python3
"""Check every promise of docs/reliability.md: python tools/soak.py [--afresh] [WORD …]

One line a promise: whether it holds, the figure that its test measured, the seconds it took, and those of processor
time. With words, only the promises that contain one of them. Exit code 1 where one does not hold.

A promise that held with the code as it is is not checked again: its line of before is printed, with the date. A soak
that was ended on the way therefore goes on. `--afresh` checks all. No test's own time limit holds here, so that a busy
machine makes it slower and nothing else; what has not ended after LIMIT seconds is said to hang.
"""

import hashlib
import json
import os
import resource
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / '.soak.json'  # promises that held: a key of promise and code → when, figure, seconds
LIMIT = 3 * 3600
CODE = ('*.py', 'evavit/**/*.py', 'tests/**/*.py', 'tools/*.py', 'configs/*.yaml', 'pyproject.toml', 'results/h100.csv')


class Promise(NamedTuple):
    """What holds, and the tests that show it; a test gives its figure by pytest's `record_property("figure", text)`."""

    text: str
    tests: str  # arguments of pytest, as they would follow on a command line


RESUME, DISTRIBUTED, STATE = 'tests/cli/test_resume.py', 'tests/cli/test_distributed.py', 'tests/training/test_state.py'

PROMISES = (
    # kill and resume
    Promise('kill -9 at 20 random moments, resumed each time, ends as the run left alone', f'{RESUME} -k kill_9'),
    Promise(
        'a stop at any update changes nothing, with every generator drawing, two workers and accumulation',
        f'{RESUME} -k changes_nothing',
    ),
    Promise(
        "other flags than the checkpoint's hold and are told, and a folder is one run's",
        f"{STATE} {RESUME} -k 'flags or two_runs or another_run'",
    ),
    Promise("float16's scale goes on too", f'{RESUME} -k float16'),
    Promise('checkpoints within an epoch come at the updates or minutes asked for', f'{RESUME} -k checkpoints_within'),
    Promise('an epoch goes on at any batch, augmented as before', "tests/training/test_recipe.py -k 'goes_on'"),
    # checkpoints are safe
    Promise('a kill between any two files of an epoch is made good', f'{STATE} -k made_good'),
    Promise(
        'a full disk leaves the last checkpoint whole',
        f"{STATE} {RESUME} -k 'full_disk or failed_write or curves_fill or kept_aside'",
    ),
    Promise(
        'a damaged, cut or foreign file is named, --resume auto takes the one before, and it stays whole',
        f'{STATE} -k damaged',
    ),
    Promise(
        'a checkpoint that carries code is refused, and its code never runs',
        'tests/cli/test_bad_input.py -k carries_code',
    ),
    # several processes
    Promise('processes that share a global batch give the result of one', f'{DISTRIBUTED} -k equal_one'),
    Promise('a killed process ends the others, and fewer processes resume', f'{DISTRIBUTED} -k stops_the_others'),
    Promise('torchrun --max-restarts goes on after a kill', f'{DISTRIBUTED} -k restarted_by'),
    Promise('a NaN in one process stops all of them, with the last good checkpoint', f'{DISTRIBUTED} -k nan_in_one'),
    # numbers go bad
    Promise(
        'a loss or gradient that is not finite is skipped, in any precision',
        "tests/training/test_loop.py -k 'step_that or norm'",
    ),
    Promise(
        'after --max-skipped in a row the run stops, naming update, lr and gradient norm',
        "tests/cli/test_bad_input.py -k 'not_finite or weights_that_break'",
    ),
    Promise('adversarial images in half precision for 200 steps', 'tests/training/test_loop.py -k adversarial'),
    Promise('weights or statistics that are not finite are never saved', f"{STATE} -k 'statistics or numbers_are_bad'"),
    # data and settings go bad
    Promise('a loading process that is killed ends the run with a line', f'{RESUME} -k loading_process'),
    Promise(
        '500 mutated image files: each is read or refused, and a run over them ends',
        'tests/cli/test_bad_images.py tests/training/test_images.py',
    ),
    Promise(
        '1,000 bad settings: one line each, before data is read or a device touched',
        "tests/cli/test_bad_settings.py -k '1000_bad or good_settings or dry_run'",
    ),
    Promise("--dry-run's memory is what the profiler and an H100 measured", 'tests/cli/test_bad_settings.py -k memory'),
    Promise(
        'folders, tar, shards and Hugging Face data sets are read, their bad images counted',
        'tests/training/test_readers.py tests/training/test_data.py',
    ),
    # a long run is watchable
    Promise(
        'SIGTERM and SIGUSR1 save and end with code 75, all processes and workers together',
        f'{RESUME} {DISTRIBUTED} -k signal',
    ),
    Promise(
        "TensorBoard has curves, EVA's health and samples with predictions; the log says how long it still takes",
        'tests/cli/test_journal.py',
    ),
    Promise("the attention's mass on window and cells is that of the definition", 'tests/ops/test_eva_mass.py'),
)


def code():
    """A checksum of everything that the tests run and read, with the versions of what they stand on."""
    sum_ = hashlib.sha256(' '.join([sys.version, *(version(name) for name in ('torch', 'timm', 'pillow'))]).encode())
    for path in sorted({path for pattern in CODE for path in ROOT.glob(pattern)} - {Path(__file__).resolve()}):
        sum_.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return sum_.hexdigest()


def check(promise):
    """(whether all tests passed, the figures that they gave, the last lines of the output of a failure)."""
    with tempfile.TemporaryDirectory() as folder:
        report, output = Path(folder, 'report.xml'), Path(folder, 'output')
        with open(output, 'w') as file:
            job = subprocess.Popen(
                [
                    sys.executable,
                    '-m',
                    'pytest',
                    '-q',
                    '-n',
                    '0',
                    '-m',
                    'not gpu',
                    '-o',
                    'junit_family=xunit1',
                    f'--junit-xml={report}',
                    *shlex.split(promise.tests),
                ],
                cwd=ROOT,
                env={**os.environ, 'OMP_NUM_THREADS': '1', 'EVAVIT_PATIENCE': '20'},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                job.wait(LIMIT)
            finally:  # of a soak that is ended, too, nothing runs on
                if job.poll() is None:
                    os.killpg(job.pid, signal.SIGKILL)
                    job.wait()
        figures, passed = [], 0
        if report.is_file():
            suite = ElementTree.parse(report).getroot().find('testsuite')
            passed = int(suite.get('tests')) - sum(int(suite.get(kind)) for kind in ('errors', 'failures', 'skipped'))
            figures = [item.get('value') for item in suite.iter('property') if item.get('name') == 'figure']
        tail = output.read_text(errors='replace')[-6000:]
    return job.returncode == 0 and passed > 0, '; '.join(figures) or f'{passed} tests', tail


def read_kept():
    try:
        return json.loads(KEPT.read_text(encoding='utf-8'))
    except (OSError, ValueError):
        return {}


def keep(key, line):
    """Only what held with the code as it is stays."""
    kept = {old: line for old, line in read_kept().items() if old.startswith(key.split()[0])} | {key: line}
    partial = KEPT.with_name(f'{KEPT.name}.partial')
    partial.write_text(json.dumps(kept, indent=1, ensure_ascii=False), encoding='utf-8')
    os.replace(partial, KEPT)


def processor_seconds():
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main(words):
    afresh, words = '--afresh' in words, [word for word in words if word != '--afresh']
    chosen = [promise for promise in PROMISES if not words or any(word in ' '.join(promise) for word in words)]
    start, broken, kept, now = time.monotonic(), 0, {} if afresh else read_kept(), code()
    for promise in chosen:
        key = f'{now} {promise.tests}'
        if key in kept:
            print(f'holds   {promise.text}: {kept[key]}', flush=True)
            continue
        began, used = time.monotonic(), processor_seconds()
        try:
            whole, figure, output = check(promise)
        except subprocess.TimeoutExpired:
            whole, figure, output = False, 'hangs', ''
        figure += f'  ({time.monotonic() - began:.0f} s, {processor_seconds() - used:.0f} s of processor time)'
        broken += not whole
        print(f'{"holds " if whole else "BROKEN"}  {promise.text}: {figure}', flush=True)
        if whole and code() == now:
            keep(key, f'{figure}, checked {datetime.now():%Y-%m-%d %H:%M}')
        if not whole:
            print(output, file=sys.stderr, flush=True)
    print(f'{len(chosen) - broken} of {len(chosen)} promises hold, {(time.monotonic() - start) / 60:.1f} minutes')
    return 0 if chosen and not broken else 1


if __name__ == '__main__':
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C: the part under way is ended too
    sys.exit(main(sys.argv[1:]))
