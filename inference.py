#!/usr/bin/env python3
"""Classify pictures: python inference.py --help. The program is evavit/cli/inference.py."""

import sys

try:
    from evavit.cli.scripts import inference
except KeyboardInterrupt:  # Ctrl-C while the libraries load
    sys.exit(130)

if __name__ == '__main__':
    sys.exit(inference())
