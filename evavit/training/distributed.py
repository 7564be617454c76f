"""The processes of a run: one, or those that torchrun or SLURM started. A single process, too, forms a process group.

With a group timm's samplers work in the same way everywhere: the order of the images depends on seed and epoch alone,
and repeated augmentation works in a single process.
"""

import contextlib
import functools
import logging
import os
import random
import sys
import warnings
from dataclasses import dataclass, field
from enum import IntEnum
from io import TextIOWrapper
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any, Callable, Iterator, List, Optional

import numpy as np
import torch
import torch.distributed as dist
from timm.utils import random_seed
from timm.utils.distributed import init_distributed_device_so

from evavit.arguments import find_device
from evavit.errors import LocalError, SharedError, UserError, launched, one_line, printable, reason_of
from evavit.files import open_own
from evavit.ops.backends import check_environment
from evavit.training.stalls import Watchdog

log = logging.getLogger(__name__)
RESTARTS = 'TORCHELASTIC_RESTART_COUNT'


class Draw(IntEnum):
    """What random numbers are drawn for, so that no two things share a seed."""

    EPOCH = 1
    STEP = 2
    ERASING = 3
    IMAGE = 4


@dataclass(frozen=True)
class Process:
    """This process of a run: its device, its rank among all and on its machine, and how many there are."""

    device: torch.device
    rank: int
    local_rank: int
    world_size: int
    watchdog: Watchdog = field(default_factory=Watchdog)

    @property
    def primary(self) -> bool:
        return self.rank == 0

    @property
    def distributed(self) -> bool:
        return self.world_size > 1

    def waiting(self, what: str) -> Any:
        """A context around a collective operation, for the watchdog; `what` names it."""
        if not self.distributed:
            return contextlib.nullcontext()
        return self.watchdog.waiting(lambda: f'the other processes ({what})')

    def mean(self, tensor: torch.Tensor) -> torch.Tensor:
        """The mean of a tensor over all processes. If one has a NaN, all get it."""
        if self.distributed:
            with self.waiting('all_reduce'):
                dist.all_reduce(tensor)
            tensor = tensor / self.world_size
        return tensor

    def gather(self, item: Any) -> List[Any]:
        """The items of all processes, in the order of their ranks."""
        items = [item] * self.world_size
        if self.distributed:
            with self.waiting('all_gather'):
                dist.all_gather_object(items, item)
        return items

    def check_equal(self, value: Any, message: Callable[[List[Any]], str]) -> None:
        """SharedError with `message(values)` in all processes, unless `value` is the same in each."""
        values = self.gather(value)
        if any(other != values[0] for other in values):
            raise SharedError(message(values))

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        with self.waiting('all_reduce'):
            return self.mean(torch.tensor(float(flag), device=self.device)).item() > 0

    def barrier(self) -> None:
        """Wait until all processes are here."""
        if self.distributed:
            with self.waiting('barrier'):
                dist.barrier()

    def seed(self, seed: int, *place: int) -> None:
        """Seed every generator. Without a place all processes get the same seed, as for the weights; with one, each its
        own.

        A place says what is drawn (a `Draw`) and where in the run (numbers such as epoch and step). What was drawn
        before does not matter: a run that resumes at a place draws what an uninterrupted one draws there.
        """
        random_seed(seed_at(seed, *place, self.rank) if place else seed)


def seed_at(seed: int, *place: int) -> int:
    """A number of 32 bits that follows from the run's seed and a place in the run, see `Process.seed`."""
    return int(np.random.SeedSequence((seed, *place)).generate_state(1)[0])


def seed_sample(seed: int) -> None:
    """Seed what draws the augmentation of one image: Python's, NumPy's and PyTorch's generators of this CPU process."""
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)


def _restarted_rendezvous(_: str, **kwargs: Any) -> Iterator[Any]:
    """env://, with keys of its own for each restart by torchrun: its store still holds the addresses of the processes
    that died, and new ones would wait for those."""
    for store, rank, world_size in dist.rendezvous('env://', **kwargs):
        yield dist.PrefixStore(f'restart {os.environ[RESTARTS]}', store), rank, world_size


@functools.cache  # PyTorch takes a scheme once
def _rendezvous_url() -> str:
    dist.register_rendezvous_handler('evavit-restarted', _restarted_rendezvous)
    return 'evavit-restarted://'


def check_backend() -> None:
    """UserError for an EVAVIT_BACKEND that no operator has."""
    try:
        check_environment()
    except ValueError as error:
        raise UserError(str(error)) from error


def check_alone(program: str) -> None:
    """SharedError where a launcher has started a program that several processes would run by halves, or twice."""
    world_size = launched()[2]
    if world_size > 1:
        raise SharedError(f'{program} is one process, and a launcher started {world_size}; start it without a launcher')


def start_process(
    device: Optional[str] = None, watchdog: Optional[Watchdog] = None, *, alone: Optional[str] = None
) -> Process:
    """Choose the device, join the process group, and let only the first process log. A stall ends it where `watchdog`,
    a context that has been entered, has a limit. `alone` names a program for `check_alone`."""
    check_backend()
    name, watchdog = str(find_device(device)), watchdog or Watchdog()
    place = f'{os.environ.get("MASTER_ADDR")}:{os.environ.get("MASTER_PORT")}'
    _, rank, world_size = launched()
    if alone:
        check_alone(alone)
    try:
        with watchdog.waiting(lambda: f'all {world_size} processes to meet at {place}'):
            joined = init_distributed_device_so(name, dist_url=_rendezvous_url() if RESTARTS in os.environ else None)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        raise LocalError(
            f'rank {rank} of {world_size} processes did not meet the others at {place}: '
            f'{" ".join(str(error).split())[:300]}'
        ) from error
    except (ValueError, RuntimeError, AssertionError) as error:
        own = world_size == 1 or dist.is_initialized()
        told = f'{f"--device {name}" if own else "environment of a launcher"}: {" ".join(str(error).split())[:300]}'
        remedy = f'; start {world_size} processes with torchrun or srun, or one without SLURM_NTASKS and WORLD_SIZE'
        raise UserError(told + remedy * (not own)) from error
    if not joined['distributed'] and not dist.is_initialized():
        dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    watchdog.joined()
    process = Process(
        torch.device(joined['device']), joined['global_rank'], joined['local_rank'], joined['world_size'], watchdog
    )
    start_log(process.primary)
    return process


class _LineFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


class _LogFile(logging.FileHandler):
    """A file of lines with their times. One that cannot be written any more is given up with a warning: what else does
    not fit on the disk stops the run by itself."""

    def __init__(self, path: Path):
        super().__init__(path, encoding='utf-8', errors='backslashreplace')
        self.setFormatter(_LineFormatter('%(asctime)s %(message)s'))
        self.path = path

    def _open(self) -> TextIOWrapper:
        return open(open_own(self.baseFilename), 'a', encoding=self.encoding, errors=self.errors)

    def handleError(self, record: logging.LogRecord) -> None:
        logging.getLogger('evavit').removeHandler(self)
        log.warning(f'warning: {self.path} is not written any more ({reason_of(sys.exc_info()[1] or OSError())})')


def start_log(primary: bool, for_file: bool = False) -> None:
    """Lines of this package go to standard output of the first process, with `for_file` also to `log_to` once that is
    entered; libraries only warn."""
    warnings.filterwarnings('ignore', 'This DataLoader will create')  # --workers has a bound of its own
    package = logging.getLogger('evavit')
    kept = [MemoryHandler(1000)] if for_file else [it for it in package.handlers if isinstance(it, MemoryHandler)]
    package.handlers.clear()
    package.propagate = False
    if primary:
        screen = logging.StreamHandler(sys.stdout)
        screen.setFormatter(_LineFormatter('%(message)s'))
        screen.setLevel(logging.INFO)
        package.handlers += [screen, *kept]
        package.setLevel(logging.DEBUG)
    else:
        package.addHandler(logging.NullHandler())


@contextlib.contextmanager
def log_to(path: Path) -> Iterator[None]:
    """While the context lasts, add what is logged to a file, with the lines since `start_log(for_file=True)` and the
    exception that ends it, each with its time.

    Raises:
        LocalError: The file cannot be opened.
    """
    package = logging.getLogger('evavit')
    try:
        file = _LogFile(path)
    except OSError as error:
        raise LocalError(f'{path}: cannot be written ({reason_of(error)})') from error
    kept = [it for it in package.handlers if isinstance(it, MemoryHandler)]
    package.handlers = [it for it in package.handlers if it not in kept] + [file]
    for handler in kept:
        for record in handler.buffer:
            if file in package.handlers:
                file.handle(record)
    try:
        yield
    except BaseException as error:
        if file in package.handlers:
            file.handle(log.makeRecord(log.name, logging.ERROR, __file__, 0, one_line(error), (), None))
        raise
    finally:
        package.removeHandler(file)
        with contextlib.suppress(OSError):  # of a disk that is full
            file.close()
