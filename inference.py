#!/usr/bin/env python3
"""Classify pictures: python inference.py --help. The program is evavit/cli/inference.py."""

import sys

from evavit.cli.scripts import inference

if __name__ == '__main__':
    sys.exit(inference())
