#!/usr/bin/env python3
"""Check every promise of docs/reliability.md: python tools/soak.py [WORD …]

One line a promise: whether it holds, the figure that its test measured, the seconds it took. With words, only the
promises that contain one of them. Exit code 1 where one does not hold.
"""

import os
import shlex
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Promise(NamedTuple):
    """What holds, and the tests that show it; a test gives its figure by pytest's `record_property("figure", text)`."""

    text: str
    tests: str  # arguments of pytest, as they would follow on a command line


RESUME, DISTRIBUTED, STATE = "tests/cli/test_resume.py", "tests/cli/test_distributed.py", "tests/training/test_state.py"

PROMISES = (
    # kill and resume
    Promise("kill -9 at 20 random moments, resumed each time, ends as the run left alone", f"{RESUME} -k kill_9"),
    Promise("a stop at any update changes nothing, with every generator drawing, two workers and accumulation",
            f"{RESUME} -k changes_nothing"),
    Promise("float16's scale goes on too", f"{RESUME} -k float16"),
    Promise("checkpoints within an epoch come at the updates or minutes asked for", f"{RESUME} -k checkpoints_within"),
    Promise("an epoch goes on at any batch, augmented as before", "tests/training/test_recipe.py -k 'goes_on'"),
    # checkpoints are safe
    Promise("a kill between any two files of an epoch is made good", f"{STATE} -k made_good"),
    Promise("a full disk leaves the last checkpoint whole", f"{STATE} -k 'full_disk or failed_write'"),
    Promise("a damaged, cut or foreign file is named, and --resume auto takes the one before", f"{STATE} -k damaged"),
    Promise("a checkpoint that carries code is refused, and its code never runs",
            "tests/cli/test_bad_input.py -k carries_code"),
    # several processes
    Promise("processes that share a global batch give the result of one", f"{DISTRIBUTED} -k equal_one"),
    Promise("a killed process ends the others, and fewer processes resume", f"{DISTRIBUTED} -k stops_the_others"),
    Promise("torchrun --max-restarts goes on after a kill", f"{DISTRIBUTED} -k restarted_by"),
    Promise("a NaN in one process stops all of them, with the last good checkpoint", f"{DISTRIBUTED} -k nan_in_one"),
    # numbers go bad
    Promise("a loss or gradient that is not finite is skipped, in any precision",
            "tests/training/test_loop.py -k 'step_that or norm'"),
    Promise("after --max-skipped in a row the run stops, naming update, lr and gradient norm",
            "tests/cli/test_bad_input.py -k 'not_finite or weights_that_break'"),
    Promise("adversarial images in half precision for 200 steps", "tests/training/test_loop.py -k adversarial"),
    # data and settings go bad
    Promise("500 mutated image files: each is read or refused, and a run over them ends",
            "tests/cli/test_bad_images.py tests/training/test_images.py"),
    Promise("1,000 bad settings: one line each, before data is read or a device touched",
            "tests/cli/test_bad_settings.py -k settings"),
    Promise("--dry-run's memory is what the profiler and an H100 measured", "tests/cli/test_bad_settings.py -k memory"),
    Promise("folders, tar, shards and Hugging Face data sets are read, their bad images counted",
            "tests/training/test_readers.py tests/training/test_data.py"),
    # a long run is watchable
    Promise("SIGTERM and SIGUSR1 save and end with code 75, all processes and workers together",
            f"{RESUME} {DISTRIBUTED} -k signal"),
    Promise("TensorBoard has curves, EVA's health and samples with predictions; the log says how long it still takes",
            "tests/cli/test_journal.py"),
    Promise("the attention's mass on window and cells is that of the definition", "tests/ops/test_eva_mass.py"),
)


def check(promise):
    """(whether all tests passed, the figures that they gave, the last lines of the output of a failure)."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-n", "0", "-m", "not gpu", "-o", "junit_family=xunit1",
             f"--junit-xml={report}", *shlex.split(promise.tests)],
            cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        figures, passed = [], 0
        if report.is_file():
            suite = ElementTree.parse(report).getroot().find("testsuite")
            passed = int(suite.get("tests")) - sum(int(suite.get(kind)) for kind in ("errors", "failures", "skipped"))
            figures = [item.get("value") for item in suite.iter("property") if item.get("name") == "figure"]
    whole = done.returncode == 0 and passed > 0
    return whole, "; ".join(figures) or f"{passed} tests", done.stdout[-4000:] + done.stderr[-2000:]


def main(words):
    chosen = [promise for promise in PROMISES if not words or any(word in " ".join(promise) for word in words)]
    start, broken = time.monotonic(), 0
    for promise in chosen:
        began = time.monotonic()
        whole, figure, output = check(promise)
        broken += not whole
        print(f"{'holds ' if whole else 'BROKEN'}  {promise.text}: {figure}  ({time.monotonic() - began:.0f} s)",
              flush=True)
        if not whole:
            print(output, file=sys.stderr, flush=True)
    print(f"{len(chosen) - broken} of {len(chosen)} promises hold, {(time.monotonic() - start) / 60:.1f} minutes")
    return 0 if chosen and not broken else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
