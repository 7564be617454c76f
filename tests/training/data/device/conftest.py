"""timm's samplers ask the process group."""

import pytest
import torch.distributed as dist


@pytest.fixture(scope='module', autouse=True)
def group():
    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
