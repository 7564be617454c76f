"""What tests of kernels share. The fixture `poison`, which fills fresh memory with NaN, is in tests/conftest.py.

Tests marked `gpu` run on a GPU. Tests marked `interpreter` check the same kernels on any machine: Triton's interpreter
executes them with NumPy. Triton reads the environment for it when it is imported, so these tests need a process of
their own, the second line of `make test`:

    TRITON_INTERPRET=1 pytest -m interpreter tests/ops

The interpreter multiplies bfloat16 as if its bits were integers, and rounds towards zero where it stores halves. So
interpreted tests use float32, or float16 with a wider bound. `with EVA.forced('triton'):` and the like make CPU tensors
take the kernels.
"""

import os

import pytest
import torch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')]
interpreter = [
    pytest.mark.interpreter,
    pytest.mark.skipif(os.environ.get('TRITON_INTERPRET') != '1', reason='needs TRITON_INTERPRET=1'),
]
# For tests that take the device as an argument: one case, checked in the interpreter and on a GPU.
on_either = pytest.mark.parametrize(
    'device', [pytest.param('cpu', marks=interpreter, id='interpreter'), pytest.param('cuda', marks=gpu, id='gpu')]
)


def relative_rms(value, reference):
    """‖value - reference‖ / ‖reference‖, in float64."""
    return ((value.double() - reference).norm() / reference.norm().clamp_min(1e-30)).item()


def graphs_of(function, *args):
    """What torch.compile makes of a function, as text: of the first call, since a second one makes nothing anew. The
    graphs are not run, since a CPU cannot run the kernels."""
    graphs = []

    def backend(graph, _):
        graphs.append(str(graph.graph))
        return lambda *_: [args[0]]

    torch.compiler.reset()
    compiled = torch.compile(function, backend=backend, fullgraph=True)
    compiled(*args)
    count = len(graphs)
    compiled(*args)
    assert len(graphs) == count, 'the second call compiled anew'
    return graphs
