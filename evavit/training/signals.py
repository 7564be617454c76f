"""What is asked of a run while it trains: a checkpoint every so often, and by SIGTERM or SIGUSR1 to save and stop."""

import re
import signal
import time

from evavit.errors import UserError

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Requests:
    """As a context it takes the two signals; `now` tells after each update whether to save, and whether to stop.

    Args:
        interval: A number of updates such as '500', or of minutes such as '10m'; None saves only after epochs.
        primary: Whether this process is the one that asks for checkpoints.

    Raises:
        UserError: an interval of another form.
    """

    def __init__(self, interval, primary=True):
        number = re.fullmatch(r'(\d+)(m?)|(\d+\.\d+)(m)', interval or '1')
        value = float(number[1] or number[3]) if number else 0.0
        if not value:
            raise UserError(f'checkpoint_interval {interval!r}: takes a number of updates (500) or of minutes (10m)')
        minutes = bool(number[2] or number[4])
        self.updates = int(value) if interval and not minutes else None
        self.seconds = 60 * value if interval and minutes else None
        self.primary = primary
        self.stop = False
        self.saved = time.monotonic()
        self.handlers = {}

    def __enter__(self):
        self.handlers = {number: signal.signal(number, self._stop) for number in SIGNALS}
        return self

    def __exit__(self, *_):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def _stop(self, *_):
        self.stop = True

    def now(self, update, last):
        """(save, stop) after `update` updates of the run; `last` is the epoch's last one, saved before validation."""
        due = (self.updates is not None and (last or update % self.updates == 0)) or (
            self.seconds is not None and (last or time.monotonic() - self.saved >= self.seconds)
        )
        if due:
            self.saved = time.monotonic()
        return due and self.primary, self.stop
