"""The processes of a run: one, or those that torchrun or SLURM started. One process is a group of one.

A group of one lets timm's samplers work alike everywhere: the order of the images depends on seed and epoch alone, and
repeated augmentation works without several processes.
"""

import logging
import os
import random
import re
import sys
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
import torch.distributed as dist
from timm.utils import random_seed
from timm.utils.distributed import init_distributed_device_so

from evavit.errors import UserError

log = logging.getLogger(__name__)
RESTARTS = 'TORCHELASTIC_RESTART_COUNT'


class Draw(IntEnum):
    """What is drawn at a place of the run, so that no two things share a seed."""

    EPOCH = 1
    STEP = 2
    ERASING = 3
    IMAGE = 4


@dataclass(frozen=True)
class Process:
    device: torch.device
    rank: int
    local_rank: int
    world_size: int

    @property
    def primary(self):
        return self.rank == 0

    @property
    def distributed(self):
        return self.world_size > 1

    def mean(self, tensor):
        """The mean of a tensor over all processes. A NaN of one is then a NaN of all."""
        if self.distributed:
            dist.all_reduce(tensor)
            tensor = tensor / self.world_size
        return tensor

    def gather(self, item):
        """The items of all processes, in the order of their ranks."""
        items = [item] * self.world_size
        if self.distributed:
            dist.all_gather_object(items, item)
        return items

    def agree(self, value, remark):
        """UserError with `remark(values)` in all processes, unless `value` is the same in each."""
        values = self.gather(value)
        if any(other != values[0] for other in values):
            raise UserError(remark(values))

    def any(self, flag):
        """Whether the flag is set in any process."""
        return self.mean(torch.tensor(float(flag), device=self.device)).item() > 0

    def wait(self):
        """Wait until all processes are here."""
        if self.distributed:
            dist.barrier()

    def seed(self, seed, *place):
        """Seed every generator: for the weights alike in all processes, for a place in each its own way.

        A place is what is drawn there, a `Draw`, and whole numbers such as epoch and step.
        Whatever was drawn before is then of no effect: a run that begins at a place draws as one that came there.
        """
        random_seed(seed_at(seed, *place, self.rank) if place else seed)


def seed_at(seed, *place):
    """A number of 32 bits that follows from the run's seed and a place in the run, see `Process.seed`."""
    return int(np.random.SeedSequence((seed, *place)).generate_state(1)[0])


def seed_sample(seed):
    """Seed what draws the augmentation of one image: Python's, NumPy's and PyTorch's generators of this CPU process."""
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)


def _restarted_rendezvous(_, **kwargs):
    """env://, with keys of its own for each restart by torchrun: its store still holds the addresses of the processes
    that died, and new ones would wait for those."""
    for store, rank, world_size in dist.rendezvous('env://', **kwargs):
        yield dist.PrefixStore(f'restart {os.environ[RESTARTS]}', store), rank, world_size


dist.register_rendezvous_handler('restarted', _restarted_rendezvous)


def check_device(device):
    if device and not re.fullmatch(r'cpu|cuda(:\d+)?', device):
        raise UserError(f'--device {device}: takes cpu, cuda or cuda:N')


def start_process(device=None):
    """Choose the device, join the group, and let only the first process log."""
    check_device(device)
    device = device or ('cuda' if torch.cuda.is_available() else 'cpu')
    kind = device.split(':')[0]
    if kind == 'cuda' and not torch.cuda.is_available():
        raise UserError(f'--device {device}: PyTorch sees no CUDA device here; use --device cpu')
    try:
        joined = init_distributed_device_so(device, dist_url='restarted://' if RESTARTS in os.environ else None)
    except (ValueError, RuntimeError, AssertionError) as error:
        raise UserError(f'--device {device}: {" ".join(str(error).split())[:300]}') from error
    if not joined['distributed'] and not dist.is_initialized():
        dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    process = Process(torch.device(joined['device']), joined['global_rank'], joined['local_rank'], joined['world_size'])
    _start_log(process.primary)
    return process


def _start_log(primary):
    """Lines of this package go to standard output of the first process; libraries only warn."""
    package = logging.getLogger('evavit')
    package.handlers.clear()
    package.propagate = False
    if primary:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter('%(message)s'))
        package.addHandler(handler)
        package.setLevel(logging.INFO)
    else:
        package.addHandler(logging.NullHandler())
