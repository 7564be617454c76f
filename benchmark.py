#!/usr/bin/env python3
"""Time EVA beside softmax attention: python benchmark.py --help. The program is evavit/cli/benchmark.py."""

import sys

from evavit.cli.scripts import benchmark

if __name__ == '__main__':
    sys.exit(benchmark())
