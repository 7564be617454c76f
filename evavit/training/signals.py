"""When a run saves within an epoch, and when it stops: an interval of the user's, and SIGTERM or SIGUSR1."""

import re
import signal
import time
from types import TracebackType
from typing import Any, Dict, Optional, Tuple, Type

from evavit.arguments import shown
from evavit.errors import UserError

SIGNALS = tuple(
    getattr(signal, name) for name in ('SIGTERM', 'SIGUSR1') if hasattr(signal, name)
)  # Windows lacks SIGUSR1


def parse_interval(text: Optional[str]) -> Tuple[Optional[int], Optional[float]]:
    """(updates, seconds) between checkpoints, of which one is None: '500' updates or '10m' minutes. UserError else."""
    if not text:  # None, or the empty text of an older args.yaml
        return None, None
    number = re.fullmatch(r'([0-9]{1,9})(m?)|([0-9]{1,9}\.[0-9]{1,9})(m)', text)
    value = float(number[1] or number[3]) if number else 0.0
    if number is None or not value:
        raise UserError(f'checkpoint_interval {shown(text)}: takes a number of updates (500) or of minutes (10m)')
    return (None, 60 * value) if number[2] or number[4] else (int(value), None)


class SignalHandler:
    """As a context it catches the two signals. `poll` says after each update whether to save and whether to stop.

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
        self.handlers = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: Optional[Type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def _handle(self, *_: Any) -> None:
        self.stop = True

    def poll(self, update: int, last: bool) -> Tuple[bool, bool]:
        """(save, stop) after `update` updates of the run. `last` is the epoch's last one, saved before validation."""
        due = (self.updates is not None and (last or update % self.updates == 0)) or (
            self.seconds is not None and (last or time.monotonic() - self.saved >= self.seconds)
        )
        if due:
            self.saved = time.monotonic()
        return due and self.primary, self.stop
