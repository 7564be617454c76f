"""timm's samplers ask the process group."""

import pytest
import torch.distributed as dist


@pytest.fixture(autouse=True)
def group():
    if dist.is_initialized():  # a script that another test called left it
        dist.destroy_process_group()
    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    yield
    if dist.is_initialized():  # a script that a test calls ends it
        dist.destroy_process_group()
