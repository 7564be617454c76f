"""Runs that hang: the watchdog ends them with a line, or a second signal does."""

import os
import re
import signal
import socket
import time
from pathlib import Path

import pytest
from runs import MODEL, PATIENCE, QUICK, command_line, start, wait_for, words

STUCK = Path(__file__).with_name('stuck_train.py')
LIMIT = ['--stall-timeout', '3']


@pytest.fixture
def flags(images, tmp_path):
    return [*MODEL, *QUICK, *LIMIT, '--data-dir', images, '--output', tmp_path, '--experiment', 'run']


def rank(number, port, script, *flags, processes=2):
    """One process of a run of several, without torchrun."""
    line, environment = command_line(script, *flags)
    about = dict(RANK=number, LOCAL_RANK=number, WORLD_SIZE=processes, MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
    return line, environment | {name: str(value) for name, value in about.items()}


def free_port():
    with socket.socket() as place:
        place.bind(('127.0.0.1', 0))
        return place.getsockname()[1]


@pytest.mark.parametrize(
    'point, workers, told',
    [('image', 2, 'worker [01] reads .*png'), ('tenth_image', 0, 'this process reads .*png')],
)
def test_an_image_that_is_never_read_ends_the_run_with_a_line(flags, point, workers, told):
    job = start(STUCK, point, 0, 300, *flags, '--workers', workers)
    _, err = job.communicate(timeout=60 * PATIENCE)
    assert job.returncode == 2 and err.count('\n') == 1
    assert re.match(f'error: rank 0 has waited [0-9]+ s for a batch: {told}: stopped by --stall-timeout 3', err), err
