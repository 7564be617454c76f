"""Launches of Triton kernels, their registration as operators, and sums of their partial sums. Imports Triton."""

import functools
import math
import operator
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
import triton
import triton.language as tl

from .torch_private import below_autograd, current_device, current_raw_stream, is_dispatched, static_launch

__all__ = ['Launches', 'Memory', 'Pointer', 'ceil_div', 'register_op', 'sum_parts']

LIBRARY = torch.library.Library('evavit', 'FRAGMENT')
# PyTorch's own tensors, and what else operators take.
PLAIN = frozenset((torch.Tensor, torch.nn.Parameter, int, float, bool, str, list, type(None)))


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def register_op(
    short: str,
    function: Callable,
    fake: Callable,
    setup_context: Optional[Callable] = None,
    backward: Optional[Callable] = None,
) -> Callable:
    """Register `torch.ops.evavit.<short>`, with a derivative where `backward` is given, and return how to call it.

    What is returned computes the same on plain tensors that nothing traces, without PyTorch's dispatcher, which takes
    as long as the kernels' launches.

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
    op = getattr(torch.ops.evavit, short).default
    direct = function
    if setup_context is not None and backward is not None:

        def below(*inputs: Any) -> Any:
            with below_autograd():
                return op(*inputs)

        LIBRARY.impl(short, _with_gradient(name, below, setup_context, backward), 'Autograd')
        direct = _with_gradient(name, function, setup_context, backward)

    def call(*inputs: Any) -> Any:
        return direct(*inputs) if _is_eager(inputs) else op(*inputs)

    return call


def _is_eager(inputs: Tuple[Any, ...]) -> bool:
    """Whether these are PyTorch's own tensors, and no compiler, tracer or counter has to see what is called."""
    if torch.compiler.is_compiling() or is_dispatched():
        return False
    return PLAIN.issuperset(map(type, inputs)) or not any(
        isinstance(x, torch.Tensor) and type(x) not in PLAIN for x in inputs
    )


def _with_gradient(name: str, function: Callable, setup_context: Callable, backward: Callable) -> Callable:
    """A function with its derivative."""

    def forward(ctx: Any, *inputs: Any) -> Any:
        output = function(*inputs)
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
        f'{name.replace("::", "_")}_function',
        (torch.autograd.Function,),
        {'forward': staticmethod(forward), 'backward': staticmethod(backward_once)},
    )

    def with_gradient(*inputs: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs):
            return differentiable.apply(*inputs)
        return function(*inputs)

    return with_gradient


class Pointer(NamedTuple):
    """A place in one of a call's tensors: what a kernel gets for a tensor before there is one."""

    tensor: int  # which of the call's tensors; -1 for the scratch memory
    offset: int  # bytes behind its first element
    dtype: torch.dtype  # as which the kernel sees it

    def at(self, elements: int) -> 'Pointer':
        """The place that many elements further."""
        return self._replace(offset=self.offset + elements * self.dtype.itemsize)


class Memory:
    """Places of contiguous tensors in one allocation of `size` bytes. Sizes may be torch.compile's symbols."""

    def __init__(self) -> None:
        self.size: Any = 0

    def place(self, tensor: int, dtype: torch.dtype, *shape: Any) -> Pointer:
        """Where the next one begins, if the call's tensor of this number is the allocation."""
        pointer = Pointer(tensor, self.size, dtype)
        self.size += -(-math.prod(shape) * dtype.itemsize // 128) * 128
        return pointer


class Launches:
    """The launches of an operator, put together once for each case and run with the tensors of each call.

        run = Launches()
        x, y = run.tensor(torch.float16), run.tensor(torch.float16)
        parts = run.scratch(torch.float32, 64, 32)
        run.launch(first_kernel, (64, 1, 1), x, parts, 1000, BLOCK=128)
        run.launch(second_kernel, (1, 1, 1), parts, y, 64, ROWS=16)
        run(x_tensor, y_tensor)

    All but addresses belongs to the case: sizes, strides, dtypes, options. Triton inspects each argument of each launch
    to find the compiled kernel, which takes longer than most of these kernels run on the GPU. Here the first call on a
    device finds it, and later ones fill in addresses. They go through Inductor's static launcher; or through Triton's
    own, where this torch has none, or it lacks what a kernel needs.
    """

    def __init__(self) -> None:
        self.count = 0  # tensors of a call
        self.memory = Memory()  # of the scratch tensors
        self.steps: List[Tuple[Any, Tuple[int, int, int], Tuple[Any, ...], Dict[str, Any]]] = []
        # What kernels get, numbered: the tensors' addresses, those some bytes behind them, and all other arguments.
        self.behind: Dict[Tuple[int, int], int] = {}
        self.compiled: List[Any] = []
        # Device and alignment of the tensors -> the other arguments, and for each step a function of all values and the
        # stream. Each binding has its own arguments, since several threads may bind at the same time.
        self.bound: Dict[tuple, Tuple[List[Any], List[Callable[[List[Any], int], Any]]]] = {}

    def tensor(self, dtype: torch.dtype) -> Pointer:
        """The next tensor of a call."""
        self.count += 1
        return Pointer(self.count - 1, 0, dtype)

    def scratch(self, dtype: torch.dtype, *shape: int) -> Pointer:
        """A contiguous tensor that these kernels alone see. One allocation holds all of them."""
        return self.memory.place(-1, dtype, *shape)

    def launch(self, kernel: Any, grid: Tuple[int, int, int], *args: Any, **options: Any) -> None:
        """Add `kernel[grid](*args, **options)`.

        Args:
            kernel: A function decorated with `triton.jit` or `gluon.jit`.
            grid: The number of programs along three axes.
            args: The arguments that are no constexprs, by position; pointers for tensors.
            options: All of the kernel's constexprs, and Triton's num_warps, num_stages and maxnreg.
        """
        self.steps.append((kernel, grid, args, options))
        for x in args:
            if isinstance(x, Pointer) and (x.offset or x.tensor < 0):
                self.behind.setdefault((x.tensor, x.offset), len(self.behind))

    def __call__(self, *tensors: torch.Tensor) -> None:
        device = tensors[0].get_device()
        if device >= 0 and device != current_device():  # Triton compiles and launches on the current one
            with torch.cuda.device(device):
                return self(*tensors)
        if self.memory.size:
            tensors += (tensors[0].new_empty(self.memory.size, dtype=torch.uint8),)
        addresses = [x.data_ptr() for x in tensors]
        # Triton compiles a kernel of its own for addresses that are not multiples of 16.
        odd = tuple([x % 16 for x in addresses]) if functools.reduce(operator.or_, addresses) % 16 else ()
        bound = self.bound.get((device, odd))
        if bound is None or _is_hooked():
            return self._launch_by_triton(tensors, (device, odd))
        addresses += [addresses[tensor] + offset for tensor, offset in self.behind]
        constants, steps = bound
        addresses += constants
        stream = current_raw_stream(device)
        for step in steps:
            step(addresses, stream)
        return None

    def _launch_by_triton(self, tensors: Tuple[torch.Tensor, ...], key: tuple) -> None:
        """Launch as Triton does, and bind what it launched, which is nothing in its interpreter."""
        found = []
        for kernel, grid, args, options in self.steps:
            passed = [_as_tensor(x, tensors) if isinstance(x, Pointer) else x for x in args]
            found.append(launch_kernel(kernel, grid, passed, options))
        if all(compiled is not None for compiled in found):
            constants: List[Any] = []
            steps = [self._bind(*of_step, constants) for of_step in zip(found, self.steps, strict=True)]
            self.bound[key] = constants, steps

    def _bind(self, compiled: Any, step: Tuple[Any, ...], constants: List[Any]) -> Callable[[List[Any], int], Any]:
        kernel, grid, args, options = step
        letters = static_letters(compiled, kernel.arg_names[: len(args)]) if static_launch is not None else None
        if letters is None:
            run, rest = compiled[grid], [options[name] for name in kernel.arg_names[len(args) :]]
            pick = self._picker([*args, *rest], constants)
            return lambda values, stream: run(*pick(values), stream=stream)
        hidden = [None] * (len(letters) - len(args))
        pick = self._picker([x for x, letter in zip([*args, *hidden], letters, strict=True) if letter], constants)
        launch: Any = static_launch
        function, types = compiled.function, ''.join(letters)
        head = function, *grid, compiled.metadata.num_warps, compiled.metadata.shared, types

        def static(values: List[Any], stream: int) -> None:
            launch(*head, pick(values), stream)

        self.compiled.append(compiled)  # its function lives as long as it
        return static

    def _picker(self, args: List[Any], constants: List[Any]) -> Callable[[List[Any]], Tuple[Any, ...]]:
        """A function that picks these arguments, which are two at least, from all values; adds to the constants."""
        places, tensors = [], self.count + (self.memory.size > 0)
        for x in args:
            if not isinstance(x, Pointer):
                places.append(tensors + len(self.behind) + len(constants))
                constants.append(x)
            elif x.offset or x.tensor < 0:
                places.append(tensors + self.behind[x.tensor, x.offset])
            else:
                places.append(x.tensor)
        return operator.itemgetter(*places)


def launch_kernel(kernel: Any, grid: Tuple[int, int, int], args: List[Any], options: Dict[str, Any]) -> Any:
    """`kernel[grid](*args, **options)`: the compiled kernel, or None in Triton's interpreter."""
    return kernel[grid](*args, **options)


def _as_tensor(pointer: Pointer, tensors: Tuple[torch.Tensor, ...]) -> torch.Tensor:
    """A tensor that begins where a pointer points, in one axis unless it is one of `tensors`."""
    x = tensors[pointer.tensor]
    if pointer.offset == 0 and pointer.dtype == x.dtype:
        return x
    storage, item = x.untyped_storage(), pointer.dtype.itemsize
    first = (x.storage_offset() * x.itemsize + pointer.offset) // item
    view = torch.empty(0, dtype=pointer.dtype, device=x.device)
    return view.set_(storage, first, (storage.nbytes() // item - first,), (1,))


# A kernel's argument in the static launcher's letters, by Triton's name of its type.
STATIC_LETTERS = {'i32': 'i', 'i64': 'l', 'u32': 'I', 'u64': 'K', 'fp32': 'f', 'fp64': 'd', 'constexpr': ''}


def static_letters(compiled: Any, names: Sequence[str]) -> Optional[List[str]]:
    """How the static launcher passes a compiled kernel its arguments of these names, a letter for each, empty for what
    is compiled in, and for those that Triton adds; or None where it cannot launch the kernel."""
    metadata = compiled.metadata
    if metadata.num_ctas != 1 or any(
        getattr(metadata, name, False) for name in ('launch_cooperative_grid', 'launch_pdl')
    ):
        return None
    letters = []
    for name in names:
        kind = compiled.src.signature.get(name)
        letter = 'O' if isinstance(kind, str) and kind.startswith('*') else STATIC_LETTERS.get(kind)
        if letter is None:
            return None
        letters.append(letter)
    for name in ('global_scratch_size', 'profile_scratch_size'):
        if hasattr(metadata, name):  # memory that Triton would allocate; a pointer to none
            if getattr(metadata, name):
                return None
            letters.append('O')
    return letters if 2 <= len(''.join(letters)) <= 120 else None


def _is_hooked() -> bool:
    """Whether a profiler, as Triton's Proton, wants to know of each launch."""
    hook = triton.knobs.runtime.launch_enter_hook
    return hook is not None and bool(getattr(hook, 'calls', True))


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


def sum_parts(run: Launches, parts: Pointer, total: Pointer, count: int, width: int) -> None:
    """The sum over the first axis of float32 `(count, width)`, contiguous; equal to the bit on every run."""
    run.launch(_sum_parts, (ceil_div(width, 32), 1, 1), parts, total, count, width, ROWS=64, COLS=32)
