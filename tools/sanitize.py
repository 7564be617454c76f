#!/usr/bin/env python3
"""Run the fused kernels under compute-sanitizer: python tools/sanitize.py

Forward and backward on small cases with odd grids, short windows, prefix tokens, many cells, both precisions, one
window a program or several, and the MLP's and the depthwise convolution's kernels, under memcheck and racecheck; a
Hopper runs kernels in Gluon for some of them. Needs a CUDA device and NVIDIA's compute-sanitizer (part of the CUDA
toolkit) on the path. The exit code is 1 where a tool reports an error.
"""

import argparse
import os
import shutil
import subprocess
import sys
from typing import Sequence

import torch

from evavit.ops import depthwise_gelu, eva_attention_packed, eva_backend, eva_num_cells, mlp_gelu

TOOLS = ('memcheck', 'racecheck')
# height, width, window_size, partition_grid, head dim, dtype, programs that are enough, count_cells, prefix tokens
CASES = (
    (9, 11, 7, 7, 32, torch.bfloat16, 768, 'one', 0),
    (14, 14, 7, 7, 64, torch.bfloat16, 768, 'one', 0),
    (5, 16, 7, 3, 48, torch.float16, 768, 'one', 0),
    (9, 11, 7, 7, 64, torch.float32, 768, 'one', 0),
    (20, 18, 16, 16, 16, torch.bfloat16, 768, 'one', 0),
    (8, 7, 0, 7, 32, torch.bfloat16, 768, 'one', 0),
    (8, 7, 7, 0, 32, torch.bfloat16, 768, 'one', 0),
    (9, 11, 4, 3, 32, torch.bfloat16, 4, 'one', 0),
    (21, 21, 7, 7, 64, torch.bfloat16, 4, 'one', 0),
    (17, 20, 6, 7, 64, torch.float16, 4, 'one', 0),
    (16, 24, 8, 8, 64, torch.bfloat16, 4, 'one', 0),
    (7, 7, 7, 7, 64, torch.float16, 4, 'one', 0),
    (14, 21, 7, 7, 32, torch.bfloat16, 4, 'one', 0),
    (13, 15, 7, 3, 32, torch.float16, 4, 'one', 0),
    (9, 11, 7, 7, 32, torch.bfloat16, 768, 'all', 0),
    (9, 11, 7, 7, 64, torch.float32, 768, 'outside', 0),
    (21, 21, 7, 7, 64, torch.bfloat16, 4, 'outside', 0),
    (21, 21, 7, 7, 64, torch.bfloat16, 4, 'outside', 5),
    (9, 11, 7, 3, 64, torch.float16, 768, 'one', 1),
    (9, 11, 4, 4, 32, torch.float32, 768, 'all', 9),
    (37, 37, 7, 13, 64, torch.bfloat16, 768, 'outside', 5),
)
# Rows, and features in, hidden and out.
MLPS = (77, 48, 192, 48), (129, 192, 768, 192)
# Height, width and channels.
CONVOLUTIONS = (5, 7, 40), (14, 14, 128)


def run_cases() -> None:
    """Every case once. Inputs are drawn on the CPU: little but our kernels runs on the device."""
    from evavit.ops.eva.triton import plan as eva_triton

    in_gluon = 0
    for height, width, window_size, partition_grid, d, dtype, programs, count_cells, prefix in CASES:
        torch.manual_seed(0)
        eva_triton.PROGRAMS = programs
        feat_size = [height, width]
        qkv = torch.randn(2, prefix + height * width, 3, 2, d).to('cuda', dtype).requires_grad_()
        leaves = [qkv]
        options = dict(window_size=window_size, partition_grid=partition_grid, count_cells=count_cells)
        options['num_prefix_tokens'] = prefix
        for name in ('summary_q', 'summary_k') if partition_grid else ():
            options[name] = tuple(
                x.cuda().requires_grad_()
                for x in (torch.randn(d, d) * d**-0.5, torch.zeros(d), torch.ones(d), torch.zeros(d))
            )
            leaves += options[name]
        if partition_grid:
            options['noise'] = torch.randn(2, 2, eva_num_cells(feat_size, partition_grid), d).cuda()
        if window_size:
            options['rel_pos_bias'] = torch.randn((2 * window_size - 1) ** 2, 2).cuda().requires_grad_()
            leaves.append(options['rel_pos_bias'])
        if eva_backend(qkv.device, dtype, d, window_size, partition_grid, num_prefix_tokens=prefix) == 'plain':
            raise SystemExit('error: the fused kernels do not run here')
        packed = qkv.permute(2, 0, 3, 1, 4)
        tokens = packed[:, :, :, prefix:].unbind(0)
        in_gluon += eva_triton.takes_gluon(*tokens, feat_size, window_size, partition_grid)
        _step(eva_attention_packed(packed, feat_size, fused=True, **options), leaves)
    from evavit.ops.mlp import triton as mlp_triton

    mlp_triton.WHOLE_PROGRAMS = 1  # also where two kernels would be faster
    for M, K, N, C in MLPS:
        shapes = (M, K), (N, K), (N,), (C, N), (C,)
        leaves = [torch.randn(shape).to('cuda', torch.bfloat16).requires_grad_() for shape in shapes]
        _step(mlp_gelu(*leaves, fused=True), leaves)
        with torch.no_grad():
            assert mlp_gelu(*leaves, fused=True).cpu().isfinite().all()
    for height, width, channels in CONVOLUTIONS:
        shapes = (2, height * width, channels), (channels, 1, 3, 3), (channels,)
        leaves = [torch.randn(shape).to('cuda', torch.bfloat16).requires_grad_() for shape in shapes]
        _step(depthwise_gelu(*leaves, [height, width], fused=True), leaves)
    print(f'{len(CASES) + len(MLPS) + len(CONVOLUTIONS)} cases ran, {in_gluon} of them with kernels in Gluon')


def _step(out: torch.Tensor, leaves: Sequence[torch.Tensor]) -> None:
    """The backward; output and gradients are finite."""
    grads = torch.autograd.grad(out, leaves, torch.randn(out.shape).to(out))
    torch.cuda.synchronize()
    assert all(x.cpu().isfinite().all() for x in (out, *grads))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--run', action='store_true', help='run the cases in this process, under no tool')
    if parser.parse_args().run:
        run_cases()
        return 0
    sanitizer = shutil.which('compute-sanitizer')
    if not torch.cuda.is_available() or sanitizer is None:
        print(
            'error: ' + ('compute-sanitizer is not on the path' if torch.cuda.is_available() else 'no CUDA device'),
            file=sys.stderr,
        )
        return 2
    this = [sys.executable, __file__, '--run']
    if subprocess.run(this).returncode:  # compiles the kernels, too
        return 1
    failed = False
    for tool in TOOLS:
        # Without PyTorch's cache every tensor has an allocation of its own, whose ends memcheck knows.
        done = subprocess.run(
            [sanitizer, '--tool', tool, '--error-exitcode', '9', *this],
            capture_output=True,
            text=True,
            env={**os.environ, 'PYTORCH_NO_CUDA_MEMORY_CACHING': '1'},
        )
        print(f'{tool}: ' + (done.stdout.strip() or done.stderr.strip())[-4000:], flush=True)
        failed |= done.returncode != 0
    return int(failed)


if __name__ == '__main__':
    sys.exit(main())
