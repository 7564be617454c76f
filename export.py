#!/usr/bin/env python3
"""Write a classifier in a form that runs elsewhere: python export.py --help. The program is evavit/cli/export.py."""

import sys

from evavit.cli.export import main
from evavit.errors import run_script

if __name__ == '__main__':
    sys.exit(run_script(main))
