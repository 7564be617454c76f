#!/usr/bin/env python3
"""Judge a classifier: python validate.py --help. The program is evavit/cli/validate.py."""

import sys

from evavit.cli.validate import main
from evavit.errors import run_script

if __name__ == '__main__':
    sys.exit(run_script(main))
