#!/usr/bin/env python3
"""Evaluate a classifier: python validate.py --help. The program is evavit/cli/validate.py."""

import sys

try:
    from evavit.cli.scripts import validate
except KeyboardInterrupt:  # Ctrl-C while the libraries load
    sys.exit(130)

if __name__ == '__main__':
    sys.exit(validate())
