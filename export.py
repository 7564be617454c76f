#!/usr/bin/env python3
"""Write a classifier in a form that runs elsewhere: python export.py --help. The program is evavit/cli/export.py."""

import sys

from evavit.cli.scripts import export

if __name__ == '__main__':
    sys.exit(export())
