"""The second signal; the first is in tests/cli/test_resume.py."""

import signal
import subprocess
import sys
import time
from pathlib import Path

from runs import PATIENCE

from evavit.training import signals
from evavit.training.signals import SignalHandler

STUCK = Path(__file__).with_name('stuck.py')


def test_a_second_signal_ends_a_process_that_is_stuck():
    job = subprocess.Popen(
        [sys.executable, STUCK], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=STUCK.parents[2]
    )
    assert job.stdout.readline() == 'ready\n'
    job.send_signal(signal.SIGTERM)
    time.sleep(0.1)
    job.send_signal(signal.SIGTERM)  # as torchrun passes on what the scheduler has sent to all
    time.sleep(signals.COPIES + 0.5)
    assert job.poll() is None
    job.send_signal(signal.SIGTERM)
    _, err = job.communicate(timeout=10 * PATIENCE)
    assert job.returncode == 128 + signal.SIGTERM
    assert err == 'error: SIGTERM for the second time: ended at once, nothing more is saved\n'


def test_a_handler_leaves_the_process_as_it_was():
    before = [signal.getsignal(number) for number in signals.SIGNALS]
    with SignalHandler(None) as handler:
        assert signal.getsignal(signal.SIGINT) == handler._handle
        signal.raise_signal(signal.SIGINT)
        assert handler.stop
    assert [signal.getsignal(number) for number in signals.SIGNALS] == before
    woken = signal.set_wakeup_fd(-1)
    assert woken == -1
