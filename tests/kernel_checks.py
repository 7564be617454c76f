"""What tests of kernels share; the fixture `poison` is in conftest.py."""
import pytest
import torch

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def relative_rms(value, reference):
    return ((value.double() - reference).norm() / reference.norm().clamp_min(1e-30)).item()
