"""A process that waits in one system call, for another process that does not come, until two signals end it.

Before that a process of its own gets as many, which end neither.
"""

import multiprocessing
import os
import signal
import time
from datetime import timedelta

import torch.distributed as dist

from evavit.training.signals import SignalHandler


def signal_itself():
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1.2)


if __name__ == '__main__':
    with SignalHandler(None):
        child = multiprocessing.get_context('fork').Process(target=signal_itself)
        child.start()
        child.join()
        print('ready', flush=True)
        dist.TCPStore('127.0.0.1', 0, 2, is_master=True, timeout=timedelta(seconds=60))
