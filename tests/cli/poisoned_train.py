"""train.py, whose second process meets images that are NaN after its first update: poisoned_train.py FLAG…"""

import os
import sys

from evavit.cli import train
from evavit.errors import run_script
from evavit.training import loop

step, calls = loop._forward_backward, 0


def poisoned(run, images, target):
    global calls
    calls += 1
    return step(run, images * float('nan') if os.environ['RANK'] == '1' and calls > 1 else images, target)


if __name__ == '__main__':
    loop._forward_backward = poisoned
    sys.exit(run_script(train.main, sys.argv[1:]))
