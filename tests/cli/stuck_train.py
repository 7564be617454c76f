"""train.py, stuck at a place in its course: stuck_train.py POINT RANK SECONDS FLAG…

The process of that rank, or a loading process of it, sleeps for that long when it comes to a point of `POINTS`.
"""

import os
import sys
import time

from evavit.cli import train
from evavit.errors import run_script
from evavit.training import loop
from evavit.training.checkpoint import Saver
from evavit.training.data.images import CheckedImages

POINTS = dict(  # functions that the run calls, and the call before which it sleeps
    image=(CheckedImages, 'load', 1),
    tenth_image=(CheckedImages, 'load', 10),
    every_image=(CheckedImages, 'load', 0),
    step=(loop.Stepper, 'step', 2),
    checkpoint=(Saver, 'save_position', 1),
)


def stuck(function, count, seconds):
    calls = 0

    def called(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == count or not count:
            time.sleep(seconds)
        return function(*args, **kwargs)

    return called


if __name__ == '__main__':
    owner, name, count = POINTS[sys.argv[1]]
    if os.environ.get('RANK', '0') == sys.argv[2]:
        setattr(owner, name, stuck(getattr(owner, name), count, float(sys.argv[3])))
    sys.exit(run_script(train.main, sys.argv[4:]))
