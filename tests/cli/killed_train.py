"""train.py, killed at a place in its course: killed_train.py POINT COUNT FLAG…

The whole process group gets SIGKILL when the first process comes to a point of `POINTS` for the COUNT-th time: where
that falls depends on the run's progress, and not on how fast a machine is.
"""

import io
import os
import signal
import sys

import safetensors.torch
import torch
from torch.utils.tensorboard import SummaryWriter

from evavit.cli import train
from evavit.errors import run_script
from evavit.training import loop, metrics

# Each is a function that the run calls: the kill comes before it, after it, or when half of its file is written.
POINTS = dict(
    gradients=(loop.Stepper, 'step', 'before'),
    step=(loop.Stepper, 'step', 'after'),
    half_checkpoint=(torch, 'save', 'half'),
    half_weights=(safetensors.torch, 'save_file', 'half'),
    unsynced=(os, 'fsync', 'before'),
    unnamed=(os, 'replace', 'before'),
    named=(os, 'replace', 'after'),
    validation=(torch.nn.Module, 'eval', 'after'),
    summary=(metrics, 'update_summary', 'after'),
    curves=(SummaryWriter, 'flush', 'before'),
)


def die():
    os.killpg(0, signal.SIGKILL)


def killed(function, count, when):
    """`function`, whose call number `count` in this process is the last thing that it does."""
    main, calls = os.getpid(), 0

    def called(*args, **kwargs):
        nonlocal calls
        calls += os.getpid() == main
        if calls != count or os.getpid() != main:
            return function(*args, **kwargs)
        if when == 'after':
            function(*args, **kwargs)
        elif when == 'half':
            if hasattr(args[1], 'write'):
                content = io.BytesIO()
                function(args[0], content)
                args[1].write(content.getvalue()[: len(content.getvalue()) // 2])
                args[1].flush()
            else:
                function(*args, **kwargs)
                os.truncate(args[1], os.path.getsize(args[1]) // 2)
        die()

    return called


if __name__ == '__main__':
    assert os.getpgid(0) == os.getpid(), 'start it as a process group of its own: it kills the whole group'
    owner, name, when = POINTS[sys.argv[1]]
    setattr(owner, name, killed(getattr(owner, name), int(sys.argv[2]), when))
    sys.exit(run_script(train.main, sys.argv[3:]))
