#!/usr/bin/env python3
"""Check every promise of docs/reliability.md: python tools/soak.py [WORD …]

One line a promise: whether it holds, the figure that its test measured, the seconds it took. With words, only the
promises that contain one of them. Exit code 1 where one does not hold.
"""

import os
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


PROMISES = (
)


def check(promise):
    """(whether all tests passed, the figures that they gave, the last lines of the output of a failure)."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-n", "0", "-m", "not gpu", "-o", "addopts=--import-mode=importlib",
             f"--junit-xml={report}", *promise.tests.split()],
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
