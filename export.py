#!/usr/bin/env python3
"""Write a classifier in a form that runs elsewhere: python export.py --help. The program is evavit/cli/export.py."""

import sys

try:
    from evavit.cli.scripts import export
except KeyboardInterrupt:  # Ctrl-C while the libraries load
    sys.exit(130)

if __name__ == '__main__':
    sys.exit(export())
