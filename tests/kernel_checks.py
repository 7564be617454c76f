"""What tests of kernels share; the fixture `poison` is in conftest.py."""

import os
import subprocess
import sys

import pytest
import torch

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def relative_rms(value, reference):
    return ((value.double() - reference).norm() / reference.norm().clamp_min(1e-30)).item()


def agrees_in_the_interpreter(code, **names):
    """Run code that ends with 'agree' in Triton's interpreter, which is chosen per process: so this starts one.

    `{tests}` in it is this folder, the others are `names`.
    """
    tests = os.path.dirname(os.path.abspath(__file__))
    done = subprocess.run(
        [sys.executable, '-c', code.format(tests=tests, **names)],
        text=True,
        capture_output=True,
        env={**os.environ, 'TRITON_INTERPRET': '1'},
        check=False,
    )
    assert done.stdout.strip().endswith('agree'), done.stdout + done.stderr
