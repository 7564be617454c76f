#!/usr/bin/env python3
"""Train an image classifier: python train.py --help. The program is evavit/cli/train.py."""

import sys

from evavit.cli.scripts import train

if __name__ == '__main__':
    sys.exit(train())
