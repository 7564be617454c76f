"""Runs that hang: the watchdog ends them with a line, or a second signal does."""

import re
import signal
import time
from pathlib import Path

import pytest
from runs import MODEL, PATIENCE, QUICK, ranks, start

from evavit.training.signals import COPIES

STUCK = Path(__file__).with_name('stuck_train.py')
LIMIT = ['--stall-timeout', '3']
AT_ONCE = 60 * PATIENCE  # of a run that would hang for minutes


@pytest.fixture
def flags(images, tmp_path):
    return [*MODEL, *QUICK, '-b', '2', '--data-dir', images, '--output', tmp_path, '--experiment', 'run']


@pytest.mark.parametrize(
    'point, workers, told',
    [
        ('image', 2, r'worker [01] reads .*\.png'),
        pytest.param('tenth_image', 0, r'this process reads .*\.png', marks=pytest.mark.slow),
    ],
)
def test_an_image_that_is_never_read_ends_the_run_with_a_line(flags, point, workers, told):
    job = start(STUCK, point, 0, 300, *flags, *LIMIT, '--workers', workers)
    _, err = job.communicate(timeout=AT_ONCE)
    assert job.returncode == 2 and err.count('\n') == 1, err
    assert re.match(f'error: rank 0 has waited [0-9]+ s for a batch: {told}: stopped by --stall-timeout 3', err), err


@pytest.mark.slow
def test_a_second_signal_ends_a_run_whose_loader_is_stuck(flags):
    """The first one waits for the update under way, which does not come."""
    job = start(STUCK, 'image', 0, 300, *flags, '--workers', 2)
    for line in job.stdout:
        if 'updates an epoch' in line:
            break
    job.send_signal(signal.SIGTERM)
    assert job.stdout.readline().startswith('SIGTERM: the run saves at the next update')
    time.sleep(COPIES + 0.5)
    job.send_signal(signal.SIGINT)
    _, err = job.communicate(timeout=AT_ONCE)
    assert job.returncode == 128 + signal.SIGINT, err
    assert err == 'error: SIGINT for the second time: ended at once, nothing more is saved\n'


@pytest.mark.parametrize('rank', [0, pytest.param(1, marks=pytest.mark.slow)])
def test_processes_that_do_not_come_are_a_line(flags, rank):
    job = start('train', *flags, *LIMIT, variables=ranks(2)[rank])
    _, err = job.communicate(timeout=AT_ONCE)
    assert job.returncode == 2 and err.count('\n') == 1, err
    assert re.match(f'error: rank {rank} has waited [0-9]+ s for all 2 processes to meet at 127.0.0.1:[0-9]+: ', err)


@pytest.mark.slow
def test_a_process_without_data_is_told_of_by_all(flags):
    jobs = [start(STUCK, 'tenth_image', 1, 300, *flags, *LIMIT, variables=variables) for variables in ranks(2)]
    told = [job.communicate(timeout=AT_ONCE)[1] for job in jobs]
    assert [job.returncode for job in jobs] == [2, 2], told
    reads = r'rank 1 has waited [0-9]+ s for a batch: this process reads .*\.png'
    assert re.search(f'{reads}(; rank 0 waits for the other processes .*)?: stopped', told[1]), told
    waits = r'rank 0 has waited [0-9]+ s for the other processes \(the gradients of epoch 0, update [0-9]+\)'
    first = 'another process of this run has ended, and tells the reason itself'  # on a busy machine
    what = 'rank 1 (waits for a batch: this process reads .*png|is silent)'
    assert first in told[0] or re.search(f'{waits}.*; {what}: stopped', told[0]), told


@pytest.mark.slow
@pytest.mark.parametrize('point, rank, seconds', [('checkpoint', 0, 8), ('every_image', 1, 1)])
def test_slow_work_of_one_process_is_no_stall(flags, point, rank, seconds):
    """A checkpoint that takes longer to write than the limit, and an epoch of data and validation that does."""
    slow = [*flags, *LIMIT, '--epochs', '1', '--checkpoint-interval', '4']
    jobs = [start(STUCK, point, rank, seconds, *slow, variables=variables) for variables in ranks(2)]
    told = [job.communicate(timeout=4 * AT_ONCE) for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], told
