"""EVA as fused CUDA kernels in Triton, forward and backward, behind `evavit.ops.eva_attention`.

Memory traffic bounds EVA: at 49 keys a window and 49 cells the arithmetic takes a fraction of the bytes' time. In
units of one `(B, N, C)` tensor the kernels move

    forward    cells:   q, k, v in                                  -> k̃, β                             3
               windows: q, k, v in                                  -> y, log-sum-exp                   4
    backward   shared:  q, y, dy in                                 -> dk̃, dβ of the logits, y·dy       3
               weights: k, v in                                     -> ξ, d log ξ, dω                   2
               summary: the cells' tensors alone                    -> dq̄, dk̄, parameters              0
               tokens:  q, k, v, dy in                              -> dq, dk, dv, bias                 7

The minimum is 4 forward and 8 backward. The kernel that writes dq, dk and dv comes last, when everything that reaches
a token through its cell is known, so each gradient is written once and never read.

Every sum runs in one fixed order, without atomics: two runs agree to the bit.
Products of half-precision tensors accumulate in float32, float32 tensors are multiplied in full float32.

On Hopper `evavit/ops/eva/gluon.py` has faster kernels for three of these, for the default windows and cells. The
backend 'gluon' takes these three and Triton's for the rest; 'triton' takes Triton's for all. Triton is imported for the
first case on a CUDA device, not with this module.
"""

import functools
from typing import Optional, Tuple

import torch

from evavit.ops.backends import Backend, autocast_dtype, has_kernels
from evavit.ops.eva.case import EvaCase, EvaOptions, eva_num_cells
from evavit.ops.grid import window_shape

__all__ = ['GLUON', 'TRITON', 'why_not_gluon_sizes']

HEAD_DIMS = (16, 32, 48, 64, 80, 96, 128)
GLUON_HEAD_DIMS = (32, 64)


def _why_not_triton(case: EvaCase) -> Optional[str]:
    if case.variant:
        return 'the ablations run in plain PyTorch'
    if case.device.type != 'cuda':
        return 'no CUDA device'
    if case.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f'{_short(case.dtype)} is not float32, bfloat16 or float16'
    if case.head_dim not in HEAD_DIMS:
        return f'head_dim {case.head_dim} is not one of {", ".join(map(str, HEAD_DIMS))}'
    if case.window_size > 16:
        return f'window_size {case.window_size} is above 16'
    if case.partition_grid > 16:
        return f'partition_grid {case.partition_grid} is above 16'
    if case.num_prefix_tokens > 16:
        return f'num_prefix_tokens {case.num_prefix_tokens} is above 16'
    if case.dropout:
        return 'dropout of attention weights'
    if case.noise_grad:
        return 'the noise wants a gradient'
    return None if has_kernels('eva.triton.operator') else 'Triton is not installed'


def why_not_gluon_sizes(dtype: torch.dtype, head_dim: int, tokens: int, rows: int) -> Optional[str]:
    """Why the kernels in Gluon do not take this dtype, head dim, tokens of a window, and cells and prefix tokens
    together, or None."""
    if dtype == torch.float32:
        return 'float32 is not bfloat16 or float16, which autocast gives'
    if head_dim not in GLUON_HEAD_DIMS:
        return f'head_dim {head_dim} is not {" or ".join(map(str, GLUON_HEAD_DIMS))}'
    if not 33 <= tokens <= 64:
        return f'a window has {tokens} tokens, not 33 to 64'
    if not 1 <= rows <= 64:
        return f'{rows} cells and prefix tokens are not 1 to 64'
    return None


def _why_not_gluon(case: EvaCase) -> Optional[str]:
    reason = _why_not_triton(case)
    if reason is not None:
        return reason
    side, cells = case.window_size, case.partition_grid**2
    window = (side, side)
    if case.feat_size is not None:
        window = window_shape([*case.feat_size], side)
        cells = eva_num_cells([*case.feat_size], case.partition_grid)
    if not cells:
        return 'there are no cells'
    reason = why_not_gluon_sizes(case.dtype, case.head_dim, window[0] * window[1], cells + case.num_prefix_tokens)
    if reason is not None:
        return reason
    from .plan import why_not_gluon_device

    index = case.device.index
    if index is None:
        index = torch.cuda.current_device() if torch.cuda.is_available() else -1
    return why_not_gluon_device(index)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix('torch.')


def _run(tokens: Tuple[torch.Tensor, ...], options: EvaOptions, num_heads: int = 0, *, gluon: bool) -> torch.Tensor:
    """As the operator's `eva_attention_fused`, under autocast."""
    # Kept in no global variable, which torch.compile would see change, and compile the whole model a second time.
    from .operator import eva_attention_fused

    dtype, kernels = tokens[0].dtype, autocast_dtype(tokens[0])
    if kernels == dtype:
        return eva_attention_fused(tokens, options, gluon, num_heads)
    tokens = tuple(x.to(kernels) for x in tokens)  # as autocast would cast a matrix product
    return eva_attention_fused(tokens, options, gluon, num_heads).to(dtype)


TRITON = Backend('triton', _why_not_triton, functools.partial(_run, gluon=False))
GLUON = Backend('gluon', _why_not_gluon, functools.partial(_run, gluon=True))
