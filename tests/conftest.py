"""What all tests share."""

import os
import re
import signal
from pathlib import Path

import pytest
import torch

from evavit.training.signals import SIGNALS

torch.set_num_threads(1)  # tests are small, and several of them run side by side

PAGE = Path(__file__).resolve().parents[1] / 'docs' / 'reliability.md'
GOLDEN = Path(__file__).resolve().parents[2] / 'shared' / 'golden'


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def handlers():
    """A test leaves signals as they were: a process that a later one forks and ends would else not end."""
    before = [signal.getsignal(number) for number in SIGNALS]
    yield
    assert before == [signal.getsignal(number) for number in SIGNALS]
    assert not hasattr(signal, 'pthread_sigmask') or not signal.pthread_sigmask(signal.SIG_BLOCK, ())


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


def promised(text=None):
    """Names of tests, and paths of files of tests, in a text: by default docs/reliability.md."""
    return set(re.findall(r'`([\w/]*\btest_\w+(?:\.py)?)`', PAGE.read_text(encoding='utf-8') if text is None else text))


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items):
    """The marker `soak` on each test of a promise. Under `make soak` a test may take hours on a busy machine."""
    names = promised()
    for item in items:
        path = os.path.relpath(item.path, PAGE.parents[1]).replace(os.sep, '/')
        if not names.isdisjoint((getattr(item, 'originalname', None), path)):
            item.add_marker(pytest.mark.soak)
        if 'EVAVIT_PATIENCE' in os.environ:
            item.add_marker(pytest.mark.timeout(0), append=False)


def pytest_terminal_summary(terminalreporter):
    """What tests measured, by `record_property(name, text)`."""
    for report in terminalreporter.getreports('passed'):
        for _, value in report.user_properties:
            terminalreporter.write_line(f'{report.nodeid}: {value}')
