#!/usr/bin/env python3
"""Train an image classifier: python train.py --help. The program is evavit/cli/train.py."""

import sys

try:
    from evavit.cli.scripts import train
except KeyboardInterrupt:  # Ctrl-C while the libraries load
    sys.exit(130)

if __name__ == '__main__':
    sys.exit(train())
