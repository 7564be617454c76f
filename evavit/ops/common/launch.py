"""Launches of Triton kernels, their registration as operators, and sums of their partial sums. Imports Triton."""

from typing import Any, Callable, Dict, List, Optional, Tuple

import torch
import triton
import triton.language as tl

from .torch_private import below_autograd, current_raw_stream

__all__ = ['Launcher', 'ceil_div', 'on_device', 'register_op', 'sum_parts']

LIBRARY = torch.library.Library('evavit', 'FRAGMENT')


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def on_device(x: torch.Tensor) -> torch.cuda.device:
    """`with on_device(x):` makes x's device the current one, on which Triton launches. Does nothing for CPU tensors."""
    return torch.cuda.device(x.device) if x.is_cuda else torch.cuda.device(-1)


def register_op(
    short: str,
    function: Callable,
    fake: Callable,
    setup_context: Optional[Callable] = None,
    backward: Optional[Callable] = None,
) -> None:
    """Register `torch.ops.evavit.<short>`, with a derivative where `backward` is given.

    Args:
        short: The operator's name.
        function: Computes it. Its annotations make the operator's schema.
        fake: Takes the same arguments without data and returns empty outputs of the right shapes and dtypes.
        setup_context: `setup_context(ctx, inputs, output)`, as in `torch.autograd.Function`.
        backward: `backward(ctx, *grads)`, as in `torch.autograd.Function`. It cannot be differentiated again:
            `create_graph=True` raises RuntimeError.
    """
    # `torch.library.custom_op` and `register_autograd` would do the same, but the Python that they run around each call
    # takes longer than launching the kernels.
    name = f'evavit::{short}'
    torch.library.define(name, torch.library.infer_schema(function, mutates_args=()))
    torch.library.impl(name, ('cuda', 'cpu'), function)  # 'cpu' is for Triton's interpreter
    torch.library.register_fake(name, fake)
    if setup_context is None or backward is None:
        return
    op = getattr(torch.ops.evavit, short).default

    def forward(ctx: Any, *inputs: Any) -> Any:
        with below_autograd():
            output = op(*inputs)
        setup_context(ctx, inputs, output)
        return output

    def backward_once(ctx: Any, *grads: Optional[torch.Tensor]) -> Any:
        # Gradients are enabled here only under create_graph. Without this error the second derivative would lack the
        # operator's part, silently.
        if torch.is_grad_enabled():
            raise RuntimeError(
                f'{name} has no second derivative, which create_graph asks for; take the plain path: '
                f'fused=False, or timm.layers.set_fused_attn(False) before the model is made'
            )
        return backward(ctx, *grads)

    differentiable: Any = type(
        f'{short}_function',
        (torch.autograd.Function,),
        {'forward': staticmethod(forward), 'backward': staticmethod(backward_once)},
    )

    def with_gradient(*inputs: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs):
            return differentiable.apply(*inputs)
        with below_autograd():
            return op(*inputs)

    LIBRARY.impl(short, with_gradient, 'Autograd')


class Launcher:
    """Launches kernels, with less work on the CPU than Triton's own `kernel[grid](...)`.

    `launcher(kernel, grid, *args, **options)` computes `kernel[grid](*args, **options)`. Triton inspects every argument
    of every launch to find the compiled kernel, which takes longer than most of these kernels run on the GPU. A
    launcher remembers the compiled kernel by the arguments that decide on it: device, grid, the tensors' dtypes and
    alignment, and all other values.

    Args:
        kernel: A function decorated with `triton.jit` or `gluon.jit`.
        grid: The number of programs along three axes.
        args: The arguments that are no constexprs, by position. A kernel must get its tensors at the same positions in
            each launch.
        options: All of the kernel's constexprs, and Triton's num_warps, num_stages and maxnreg.
    """

    def __init__(self) -> None:
        self.tensors: Dict[int, List[int]] = {}  # id of a kernel -> positions of its tensors
        self.compiled: Dict[tuple, Tuple[Callable, List[Any]]] = {}  # key -> launch function, constexprs

    def __call__(self, kernel: Any, grid: Tuple[int, int, int], *args: Any, **options: Any) -> None:
        tensors = self.tensors.get(id(kernel))
        if tensors is None:
            tensors = self.tensors[id(kernel)] = [i for i, x in enumerate(args) if isinstance(x, torch.Tensor)]
        passed, kinds, bits = list(args), list(args), 0
        for i in tensors:
            x = args[i]
            passed[i] = address = x.data_ptr()
            kinds[i] = x.dtype
            bits |= address
        # Triton compiles a kernel of its own for addresses that are not multiples of 16.
        odd = tuple(passed[i] % 16 for i in tensors) if bits % 16 else ()
        device = args[tensors[0]].get_device()
        key = (id(kernel), device, grid, odd, *kinds, *options.values())
        found = self.compiled.get(key)
        if found is not None:
            run, constants = found
            run(*passed, *constants, stream=current_raw_stream(device))
        else:
            compiled = kernel[grid](*args, **options)
            if compiled is not None:  # None in Triton's interpreter
                self.compiled[key] = compiled[grid], [options[name] for name in kernel.arg_names[len(args) :]]


@triton.jit
def _sum_parts(
    parts,  # (count, width) float32; from a kernel that wrote one row a program
    total,  # writes (width) float32
    count, width,
    ROWS: tl.constexpr, COLS: tl.constexpr,  # rows of `parts` added at a time, columns of a program
):  # fmt: skip
    """total[j] = Σ_i parts[i, j], always added in the same order. Programs: (tiles of columns)."""
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
    """The sum over the first axis of a contiguous float32 tensor; equal to the bit on every run."""
    total = torch.empty(parts.shape[1:], dtype=parts.dtype, device=parts.device)
    width = total.numel()
    launch(_sum_parts, (ceil_div(width, 32), 1, 1), parts, total, parts.shape[0], width, ROWS=64, COLS=32)
    return total
