"""Run by test_backends.py with EVAVIT_BACKEND set: what two layers take, and whether Triton was imported for it."""

import sys

import torch

from evavit.layers import EvaAttention, FusedMlp

layer, mlp = EvaAttention(32, 2), FusedMlp(32, 64)
for _ in range(2):
    mlp(layer(torch.randn(1, 20, 32), [4, 5]))
print(layer.backend)
print('with Triton' if 'evavit.ops.common.launch' in sys.modules else 'without Triton')
