"""The processes of a run: one, or those that torchrun or SLURM started. One process is a group of one.

A group of one lets timm's samplers work alike everywhere: the order of the images depends on seed and epoch alone, and
repeated augmentation works without several processes.
"""

import logging
import re
import sys
from dataclasses import dataclass

import torch
import torch.distributed as dist
from timm.utils import random_seed
from timm.utils.distributed import init_distributed_device_so

from .errors import UserError

log = logging.getLogger(__name__)


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

    def seed(self, seed, epoch=None):
        """Seed every generator. Within an epoch each process draws its own numbers; the weights are drawn alike."""
        if epoch is None:
            random_seed(seed)
        else:
            random_seed((seed + 1_000_003 * (epoch + 1)) % 2**31, self.rank)


def check_device(device):
    if device and not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise UserError(f"--device {device}: takes cpu, cuda or cuda:N")


def start_process(device=None):
    """Choose the device, join the group, and let only the first process log."""
    check_device(device)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    kind = device.split(":")[0]
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {device}: PyTorch sees no CUDA device here; use --device cpu")
    try:
        joined = init_distributed_device_so(device)
    except (ValueError, RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device}: {' '.join(str(error).split())[:300]}") from error
    if not joined["distributed"] and not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    process = Process(torch.device(joined["device"]), joined["global_rank"], joined["local_rank"], joined["world_size"])
    _start_log(process.primary)
    return process


def _start_log(primary):
    """Lines of this package go to standard output of the first process; libraries only warn."""
    package = logging.getLogger("evavit")
    package.handlers.clear()
    package.propagate = False
    if primary:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(message)s"))
        package.addHandler(handler)
        package.setLevel(logging.INFO)
    else:
        package.addHandler(logging.NullHandler())
