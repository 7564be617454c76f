"""When a run saves within an epoch, and when it stops: an interval of the user's, and SIGTERM, SIGINT or SIGUSR1, which
loading processes do not heed."""

import logging
import os
import re
import signal
import socket
import sys
import threading
import time
from types import TracebackType
from typing import Any, Dict, Optional, Tuple, Type

import torch

from evavit.arguments import shown
from evavit.errors import UserError, end_now

log = logging.getLogger(__name__)

SIGNALS = tuple(
    getattr(signal, name) for name in ('SIGTERM', 'SIGINT', 'SIGUSR1') if hasattr(signal, name)
)  # Windows lacks SIGUSR1
ENDING = (signal.SIGTERM, signal.SIGINT)  # of which the second ends the process
COPIES = 1.0  # seconds within which another one is a copy of the first, which torchrun has passed on


def parse_interval(text: Optional[str]) -> Tuple[Optional[int], Optional[float]]:
    """(updates, seconds) between checkpoints, of which one is None: '500' updates or '10m' minutes. UserError else."""
    if not text:  # None, or the empty text of an older args.yaml
        return None, None
    number = re.fullmatch(r'([0-9]{1,9})(m?)|([0-9]{1,9}\.[0-9]{1,9})(m)', text)
    value = float(number[1] or number[3]) if number else 0.0
    if number is None or not value:
        raise UserError(f'checkpoint_interval {shown(text)}: takes a number of updates (500) or of minutes (10m)')
    return (None, 60 * value) if number[2] or number[4] else (int(value), None)


def start_worker(_: Any) -> int:
    """What a loading process begins with; returns its seed. It heeds no signal but its main process's own SIGTERM:
    schedulers and terminals send them to every process of a job, and a run that is to save needs its workers for the
    update under way. Of a main process that ends while it takes a batch the worker says nothing: that one has told why.
    """
    hook = sys.excepthook

    def tell(kind: Type[BaseException], error: BaseException, trace: Optional[TracebackType]) -> None:
        if not issubclass(kind, (ConnectionError, EOFError)):
            hook(kind, error, trace)

    sys.excepthook = tell
    if hasattr(signal, 'sigwaitinfo'):  # not on every system
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        threading.Thread(target=_wait_for_parents_signal, args=(os.getppid(),), daemon=True).start()
    info: Any = torch.utils.data.get_worker_info()
    return info.seed


def _wait_for_parents_signal(parent: int) -> None:
    while signal.sigwaitinfo((signal.SIGTERM,)).si_pid != parent:
        pass
    os._exit(0)


class SignalHandler:
    """As a context it catches the signals: `poll` says after each update whether to save and whether to stop.

    A second SIGTERM or SIGINT ends the process at once, with exit code 128 plus its number. A thread waits for it, as
    Python calls handlers between two steps of the main thread, which may be stuck in one.

    Args:
        interval: See `parse_interval`; None saves only after epochs.
        primary: Whether this process is the one that asks for checkpoints.

    Raises:
        UserError: An interval of another form.
    """

    def __init__(self, interval: Optional[str], primary: bool = True):
        self.updates, self.seconds = parse_interval(interval)
        self.primary = primary
        self.stop = False
        self.saved = time.monotonic()
        self.handlers: Dict[int, Any] = {}  # what handled the signals before

    def __enter__(self) -> 'SignalHandler':
        receiver, self.sender = socket.socketpair()  # not a pipe, which Windows takes for no wake-up
        self.sender.setblocking(False)
        self.woken = signal.set_wakeup_fd(self.sender.fileno(), warn_on_full_buffer=False)
        if hasattr(os, 'register_at_fork'):
            os.register_at_fork(after_in_child=self._forked)
        threading.Thread(target=self._listen, args=(receiver,), daemon=True, name='signals').start()
        self.handlers = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: Optional[Type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self.woken)
        self.sender.shutdown(socket.SHUT_RDWR)  # ends the thread, also where a loading process has it open
        self.sender.close()

    def _handle(self, *_: Any) -> None:
        self.stop = True

    def _forked(self) -> None:
        """A loading process does not tell this one's thread of the signals that it gets itself."""
        if self.sender.fileno() >= 0:
            signal.set_wakeup_fd(-1)

    def _listen(self, receiver: socket.socket) -> None:
        first = None
        with receiver:
            while numbers := receiver.recv(64):  # one byte a signal, nothing where the context has ended
                for number in set(numbers).intersection(ENDING):
                    name, now = signal.Signals(number).name, time.monotonic()
                    if first is None:
                        first = now
                        log.info(f'{name}: the run saves at the next update and stops; a second one ends it at once')
                    elif now - first > COPIES:
                        end_now(128 + number, f'{name} for the second time: ended at once, nothing more is saved')

    def poll(self, update: int, last: bool) -> Tuple[bool, bool]:
        """(save, stop) after `update` updates of the run. `last` is one before a validation, and saved."""
        due = (self.updates is not None and (last or update % self.updates == 0)) or (
            self.seconds is not None and (last or time.monotonic() - self.saved >= self.seconds)
        )
        if due:
            self.saved = time.monotonic()
        return due and self.primary, self.stop
