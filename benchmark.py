#!/usr/bin/env python3
"""Time EVA beside softmax attention: python benchmark.py --help. The program is evavit/cli/benchmark.py."""

import sys

try:
    from evavit.cli.scripts import benchmark
except KeyboardInterrupt:  # Ctrl-C while the libraries load
    sys.exit(130)

if __name__ == '__main__':
    sys.exit(benchmark())
