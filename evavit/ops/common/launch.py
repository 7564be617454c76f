"""Launches of Triton's kernels, and sums of their partial sums; imported only where Triton is."""

from typing import Any, Callable, Dict, List, Optional, Tuple

import torch
import triton
import triton.language as tl

__all__ = ['Launcher', 'ceil_div', 'on_device', 'register_op', 'sum_parts']

LIBRARY = torch.library.Library('evavit', 'FRAGMENT')


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def on_device(x: torch.Tensor):
    """Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else torch.cuda.device(-1)


def register_op(
    short: str,
    function: Callable,
    fake: Callable,
    setup_context: Optional[Callable] = None,
    backward: Optional[Callable] = None,
) -> None:
    """Make a function an operator of PyTorch, differentiable where `backward` is given.

    Args:
        short: The operator's name in the namespace evavit.
        function: Computes it.
        fake: The same for tensors without data.
        setup_context: `setup_context(ctx, inputs, output)`, as in `torch.autograd.Function`.
        backward: `backward(ctx, *grads)`, likewise. It has no derivative itself: create_graph raises RuntimeError.
    """
    # Not torch.library.custom_op and register_autograd: what they wrap around each call takes the processor longer
    # than the launches in it.
    name = f'evavit::{short}'
    torch.library.define(name, torch.library.infer_schema(function, mutates_args=()))
    torch.library.impl(name, ('cuda', 'cpu'), function)  # 'cpu' serves Triton's interpreter
    torch.library.register_fake(name, fake)
    if backward is None:
        return
    op = getattr(torch.ops.evavit, short).default

    def forward(ctx, *inputs):
        with torch._C._AutoDispatchBelowAutograd():
            output = op(*inputs)
        setup_context(ctx, inputs, output)
        return output

    def backward_once(ctx, *grads):
        if torch.is_grad_enabled():  # with create_graph; without a word its part of a second derivative would be zero
            raise RuntimeError(
                f'{name} has no second derivative, which create_graph asks for; take the plain path: '
                f'fused=False, or timm.layers.set_fused_attn(False) before the model is made'
            )
        return backward(ctx, *grads)

    differentiable = type(
        f'{short}_function',
        (torch.autograd.Function,),
        {'forward': staticmethod(forward), 'backward': staticmethod(backward_once)},
    )

    def with_gradient(*inputs):
        if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs):
            return differentiable.apply(*inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*inputs)

    LIBRARY.impl(short, with_gradient, 'Autograd')


class Launcher:
    """launcher(kernel, grid, *args, **options): kernel[grid](*args, **options) at less of the processor's time.

    The options are the kernel's constexprs and Triton's own; a kernel takes its tensors at the same places each time.
    Triton looks into every argument of every launch to find the compiled kernel, which takes the processor longer than
    most of these kernels take the GPU. What it found is kept for the next launch of the same kind.
    """

    def __init__(self) -> None:
        self.tensors: Dict[int, List[int]] = {}
        self.compiled: Dict[tuple, Tuple[Callable, List[Any]]] = {}

    def __call__(self, kernel, grid: Tuple[int, int, int], *args, **options) -> None:
        tensors = self.tensors.get(id(kernel))
        if tensors is None:
            tensors = self.tensors[id(kernel)] = [i for i, x in enumerate(args) if isinstance(x, torch.Tensor)]
        passed, kinds, bits = list(args), list(args), 0
        for i in tensors:
            x = args[i]
            passed[i] = address = x.data_ptr()
            kinds[i] = x.dtype
            bits |= address
        # Triton compiles again for addresses that are no multiples of 16.
        odd = tuple(passed[i] % 16 for i in tensors) if bits % 16 else ()
        device = args[tensors[0]].get_device()
        key = (id(kernel), device, grid, odd, *kinds, *options.values())
        found = self.compiled.get(key)
        if found is not None:
            run, constants = found
            run(*passed, *constants, stream=torch._C._cuda_getCurrentRawStream(device))
        else:
            compiled = kernel[grid](*args, **options)
            if compiled is not None:  # None in Triton's interpreter
                self.compiled[key] = compiled[grid], [options[name] for name in kernel.arg_names[len(args) :]]


@triton.jit
def _sum_parts(parts, total, count, width, ROWS: tl.constexpr, COLS: tl.constexpr):
    """total[j] = Σ_i parts[i, j], in one fixed order."""
    j = tl.program_id(0) * COLS + tl.arange(0, COLS)
    acc = tl.zeros([ROWS, COLS], tl.float32)
    for i0 in range(0, count, ROWS):
        i = i0 + tl.arange(0, ROWS)
        acc += tl.load(
            parts + i[:, None].to(tl.int64) * width + j[None, :],
            mask=(i < count)[:, None] & (j < width)[None, :],
            other=0.0,
        )
    tl.store(total + j, tl.sum(acc, 0), mask=j < width)


def sum_parts(launch: Launcher, parts: torch.Tensor) -> torch.Tensor:
    """Sum over the first axis of a float32 tensor."""
    total = torch.empty(parts.shape[1:], dtype=parts.dtype, device=parts.device)
    width = total.numel()
    launch(_sum_parts, (ceil_div(width, 32), 1, 1), parts, total, parts.shape[0], width, ROWS=64, COLS=32)
    return total
