"""What all tests share."""

import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # tests are small, and several of them run side by side

GOLDEN = Path(__file__).resolve().parents[2] / 'shared' / 'golden'


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def golden():
    """Reads a file of outputs of the published implementation: (tensors, published state dict, metadata)."""
    safetensors = pytest.importorskip('safetensors')
    if not GOLDEN.is_dir():
        pytest.skip('shared/golden, outputs of the published implementation, is not beside the checkout')

    def read(name):
        with safetensors.safe_open(GOLDEN / f'{name}.safetensors', 'pt') as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            metadata = file.metadata()
        state = {key.removeprefix('state.'): value for key, value in tensors.items() if key.startswith('state.')}
        return tensors, state, metadata

    return read


@pytest.fixture
def poison():
    """torch.empty holds NaN, so that what a kernel leaves unwritten shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


def pytest_collection_modifyitems(items):
    """Under `tools/soak.py` no test has a time limit of its own: it may run on a busy machine for hours."""
    if 'EVAVIT_PATIENCE' in os.environ:
        for item in items:
            item.add_marker(pytest.mark.timeout(0), append=False)
