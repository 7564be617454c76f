"""Launches of Triton's kernels, and sums of their partial sums; imported only where Triton is."""
from typing import Any, Dict, Tuple

import torch
import triton
import triton.language as tl

__all__ = ['Launcher', 'ceil_div', 'on_device', 'register_op', 'sum_parts']


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def on_device(x: torch.Tensor):
    """Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else torch.cuda.device(-1)


def register_op(name: str, function, fake) -> None:
    """Make a function an operator of PyTorch, with a fake one for tensors without data."""
    # Not torch.library.custom_op: what it wraps around each call costs the processor as much as a launch.
    torch.library.define(name, torch.library.infer_schema(function, mutates_args=()))
    torch.library.impl(name, ('cuda', 'cpu'), function)  # 'cpu' serves Triton's interpreter
    torch.library.register_fake(name, fake)


class Launcher:
    """launcher(kernel, grid, *args, **options): kernel[grid](*args, **options) at less of the processor's time.

    The options are the kernel's constexprs and Triton's own. Triton looks into every argument of every launch to find
    the compiled kernel, which takes the processor longer than most of these kernels take the GPU. What it found is kept
    for the next launch of the same kind.
    """

    def __init__(self) -> None:
        self.compiled: Dict[tuple, Any] = {}

    def __call__(self, kernel, grid: Tuple[int, int, int], *args, **options) -> None:
        passed, key = [], [id(kernel), args[0].get_device(), *options.values()]
        for x in args:
            if isinstance(x, torch.Tensor):
                address = x.data_ptr()
                passed.append(address)
                key += (x.dtype, address % 16)
            else:
                passed.append(x)
                key.append(x)
        key = tuple(key)
        if key in self.compiled:
            compiled, constants = self.compiled[key]
            compiled[grid](*passed, *constants)
        else:
            compiled = kernel[grid](*args, **options)
            if compiled is not None:  # None in Triton's interpreter
                self.compiled[key] = compiled, [options[name] for name in kernel.arg_names[len(args):]]


@triton.jit
def _sum_parts(parts, total, count, width, ROWS: tl.constexpr, COLS: tl.constexpr):
    """total[j] = Σ_i parts[i, j], in one fixed order."""
    j = tl.program_id(0) * COLS + tl.arange(0, COLS)
    acc = tl.zeros([ROWS, COLS], tl.float32)
    for i0 in range(0, count, ROWS):
        i = i0 + tl.arange(0, ROWS)
        acc += tl.load(parts + i[:, None].to(tl.int64) * width + j[None, :],
                       mask=(i < count)[:, None] & (j < width)[None, :], other=0.0)
    tl.store(total + j, tl.sum(acc, 0), mask=j < width)


def sum_parts(launch: Launcher, parts: torch.Tensor) -> torch.Tensor:
    """Sum over the first axis of a float32 tensor."""
    total = torch.empty(parts.shape[1:], dtype=parts.dtype, device=parts.device)
    width = total.numel()
    launch(_sum_parts, (ceil_div(width, 32), 1, 1), parts, total, parts.shape[0], width, ROWS=64, COLS=32)
    return total
