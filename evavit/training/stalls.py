"""A watchdog: a run that waits too long for data or for its other processes ends with a line.

PyTorch has time limits too, and each does a part of this. `DataLoader(timeout=)` takes no `--workers 0`, and does not
know which worker reads what. The limit of a process group is an error of gloo's and an abort of NCCL's, and takes a
process that compiles or writes for one that hangs. Here a thread looks at what each process does. PyTorch's own limit
comes after it, for a main thread that lets no other one run.
"""

import contextlib
import json
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Tuple, Type

import torch
import torch.distributed as dist

from evavit.errors import end_now, launched
from evavit.training.sections import MOST_WORKERS

AT_WORK = 6  # times the limit for which a process that computes, compiles or writes may keep the others waiting
PAUSE = 5.0  # seconds between two looks, at most


class Reading:
    """Which image each loading process is at, and how many it has read, in memory that `share` lets them reach.

    Place 0 is the main process, which reads itself with `--workers 0`, place n + 1 is worker n.
    """

    IDLE = -1

    def __init__(self) -> None:
        self.table = torch.zeros(MOST_WORKERS + 1, 2, dtype=torch.int64)
        self.table[:, 0] = self.IDLE

    @contextlib.contextmanager
    def image(self, index: int) -> Iterator[None]:
        """Around the reading of an image in the process that reads it."""
        worker = torch.utils.data.get_worker_info()
        place = self.table[(0 if worker is None else worker.id + 1) % len(self.table)]
        place[0] = index
        try:
            yield
        finally:
            place[0] = self.IDLE
            place[1] += 1

    def stream(self, items: Iterable[Any]) -> Iterator[Any]:
        """The items, each with the wait for it noted."""
        iterator, end, count = iter(items), object(), 0
        while True:
            with self.image(count):
                item = next(iterator, end)
            if item is end:
                return
            count += 1
            yield item

    def moves(self) -> bytes:
        """A value that changes with each image that is read."""
        return self.table.numpy().tobytes()

    def tell(self, name: Callable[[int], str]) -> str:
        """Who reads what, 'worker 1 reads apple/3.png'. `name` says it of an index."""
        at = [(place, index) for place, (index, _) in enumerate(self.table.tolist()) if index != self.IDLE]
        who = [f'{f"worker {place - 1}" if place else "this process"} reads {name(index)}' for place, index in at[:3]]
        more = f' and {len(at) - 3} more' if len(at) > 3 else ''
        return ', '.join(who) + more if who else 'no worker reads one'


@dataclass(eq=False)
class Stage:
    """What a process does since when. Of a wait `what` says what for, and `moves` gives a value that changes as long as
    that goes on."""

    what: Callable[[], str]
    waits: bool
    since: float
    moves: Callable[[], Any] = bool

    def tell(self) -> str:
        return f'waits for {self.what()}' if self.waits else self.what()


class Watchdog:
    """As a context it ends the process, with exit code 2, when it waits too long; with a limit of 0 it does nothing.

    Args:
        limit: Seconds that a wait may last.

    A wait for data begins anew with each image that is read. A wait for other processes goes on as long as one of them
    has begun what it does within the limit, or is at work, and not itself waiting, for no more than `AT_WORK` times it.
    """

    def __init__(self, limit: float = 0):
        self.limit, self.pause = limit, min(PAUSE, limit / 10)
        self.stages = [Stage(lambda: 'is at work', False, time.monotonic())]
        self.ended = threading.Event()
        self.rank, self.beat = 0, 0
        self.others: List[int] = []  # the ranks of the other processes
        self.store: Optional[dist.Store] = None
        self.heard: List[Dict[str, Any]] = []  # what they told last
        self.last: Dict[int, Tuple[int, float]] = {}  # rank → the last beat that it told, and when that was new

    def __enter__(self) -> 'Watchdog':
        if self.limit:
            _, self.rank, _ = launched()
            threading.Thread(target=self._watch, daemon=True, name='stalls').start()
            threading.Thread(target=self._exchange, daemon=True, name='stalls of others').start()
        return self

    def __exit__(
        self, kind: Optional[Type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        self.ended.set()

    def joined(self) -> None:
        """Called once the process group is there: from then on the processes tell each other what they do."""
        if not self.limit or not dist.is_initialized() or dist.get_world_size() == 1:
            return
        self.others = [rank for rank in range(dist.get_world_size()) if rank != self.rank]
        later = timedelta(seconds=(AT_WORK + 1) * self.limit)
        # the public name is younger than the oldest PyTorch that is allowed
        (getattr(dist, 'set_timeout', None) or dist.distributed_c10d._set_pg_timeout)(later)
        store = dist.distributed_c10d._get_default_store().clone()  # the main thread may hold its own in a wait
        store.set_timeout(timedelta(seconds=max(1.0, self.pause)))
        self._tell(store, self.stages[-1])
        self.store = store

    @contextlib.contextmanager
    def doing(self, stage: Stage) -> Iterator[None]:
        self.stages.append(stage)
        try:
            yield
        finally:
            self.stages.remove(stage)
            self.stages[-1].since = time.monotonic()

    def waiting(self, what: Callable[[], str], moves: Callable[[], Any] = bool) -> Any:
        """A context around a wait for something else than this process; see `Stage`."""
        return self.doing(Stage(what, True, time.monotonic(), moves))

    def batches(self, batches: Iterable[Any], dataset: Any) -> Iterator[Any]:
        """The batches of a data set of `data.open_dataset`, with each wait for one watched."""
        reading: Reading = dataset.bad.reading
        iterator, end = iter(batches), object()
        while True:
            with self.waiting(lambda: f'a batch: {reading.tell(dataset.place)}', reading.moves):
                batch = next(iterator, end)
            if batch is end:
                return
            yield batch

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """Within it what torch.compile does is work, also where it comes in the midst of a wait for gradients."""
        from torch._dynamo import callback  # no public module tells of it

        under_way = contextlib.ExitStack()

        def start(_: Any) -> None:
            under_way.enter_context(self.doing(Stage(lambda: 'compiles', False, time.monotonic())))

        def end(_: Any) -> None:
            under_way.close()

        callback.on_compile_start(start)
        callback.on_compile_end(end)
        try:
            yield
        finally:
            callback.callback_handler.remove_start_callback(start)
            callback.callback_handler.remove_end_callback(end)

    def _watch(self) -> None:
        last: Tuple[Optional[Stage], Any] = (None, None)
        looked = time.monotonic()
        while not self.ended.wait(self.pause):
            stage, now = self.stages[-1], time.monotonic()
            stage.since += max(0.0, now - looked - self.pause)  # in which this process was itself stopped (SIGSTOP)
            looked = now
            seen = stage, stage.moves()
            if last[0] is stage and seen != last:
                stage.since = now
            last = seen
            age = now - stage.since
            if not stage.waits or age <= self.limit / 2:
                continue
            others = self.heard
            if age > self.limit and not any(self._moves(other) for other in others):
                known = [f'; rank {other["rank"]} {self._doing(other)}' for other in others]
                end_now(
                    2,
                    f'rank {self.rank} has waited {age:.0f} s for {stage.what()}{"".join(known[:3])}: stopped by '
                    f'--stall-timeout {self.limit:g}',
                )
                return

    def _exchange(self) -> None:
        """In a thread of its own: where the machine that keeps the store is gone, a call does not come back."""
        while not self.ended.wait(self.pause):
            stage = self.stages[-1]
            if self.store is not None:
                self._tell(self.store, stage)
                if stage.waits and time.monotonic() - stage.since > self.limit / 2:  # to see who still tells something
                    self.heard = self._heard()

    def _tell(self, store: dist.Store, stage: Stage) -> None:
        self.beat += 1
        told = dict(rank=self.rank, beat=self.beat, doing=stage.tell()[:300], waits=stage.waits)
        told['age'] = time.monotonic() - stage.since
        with contextlib.suppress(RuntimeError):  # the process that keeps the store is gone: nobody is heard any more
            store.set(self._key(self.rank), json.dumps(told))

    def _heard(self) -> List[Dict[str, Any]]:
        """What the other processes told last."""
        keys = [self._key(rank) for rank in self.others]
        others: List[Dict[str, Any]] = []
        with contextlib.suppress(RuntimeError):
            if self.store is not None and self.store.check(keys):
                others = [json.loads(told) for told in self.store.multi_get(keys)]
        for other in others:
            if self.last.get(other['rank'], (-1, 0.0))[0] != other['beat']:
                self.last[other['rank']] = other['beat'], time.monotonic()
        return others

    @staticmethod
    def _key(rank: int) -> str:
        return f'stalls/{rank}'

    def _silent(self, other: Dict[str, Any]) -> bool:
        return time.monotonic() - self.last[other['rank']][1] > self.limit / 4

    def _moves(self, other: Dict[str, Any]) -> bool:
        return not self._silent(other) and other['age'] <= self.limit * (1 if other['waits'] else AT_WORK)

    def _doing(self, other: Dict[str, Any]) -> str:
        return 'is silent' if self._silent(other) else other['doing']
