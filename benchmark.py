#!/usr/bin/env python3
"""Time EVA beside softmax attention: python benchmark.py --help. The program is evavit/cli/benchmark.py."""

import sys

from evavit.cli.benchmark import main
from evavit.errors import run_script

if __name__ == '__main__':
    sys.exit(run_script(main))
