#!/usr/bin/env python3
"""Evaluate a classifier: python validate.py --help. The program is evavit/cli/validate.py."""

import sys

from evavit.cli.scripts import validate

if __name__ == '__main__':
    sys.exit(validate())
