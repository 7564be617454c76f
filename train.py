#!/usr/bin/env python3
"""Train an image classifier: python train.py --help. The program is evavit/cli/train.py."""

import sys

from evavit.cli.train import main
from evavit.errors import run_script

if __name__ == '__main__':
    sys.exit(run_script(main))
