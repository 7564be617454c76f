"""A process that waits in one system call until two signals end it: stuck.py CHILD

It listens for another process of its run, which does not come. CHILD 'child' first has a process of its own signal itself.
"""

import multiprocessing
import os
import signal
import sys
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
        if sys.argv[1] == 'child':
            child = multiprocessing.get_context('fork').Process(target=signal_itself)
            child.start()
            child.join()
        print('ready', flush=True)
        dist.TCPStore('127.0.0.1', 0, 2, is_master=True, timeout=timedelta(seconds=60))
