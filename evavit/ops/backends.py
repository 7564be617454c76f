"""Backends: the pieces of code that compute one operator, and which of them a call takes.

EVA, the MLP and the depthwise convolution own a `Registry` each: `evavit.ops.eva.EVA`, `evavit.ops.mlp.MLP` and
`evavit.ops.dwconv.DWCONV`. A new backend is its folder and one line:

    EVA.register(Backend('name', why_not, run), before='gluon')

Backends are asked in the order of registration; the first one whose `why_not(case)` has no objection runs. The last is
plain PyTorch, which takes every case. Graphs that are traced or exported, `torch.func` and forward-mode differentiation
always take it.

`EVAVIT_BACKEND=plain|triton|gluon` in the environment, read when evavit is imported, or `use_backend(name)` around some
code, puts that backend first in every operator that has it. Where it cannot run, one line of the log says why, once for
each reason, and the usual choice runs. A name that no operator has is a ValueError, from a script one line. Nothing is
chosen where timm's switch is off (`set_fused_attn(False)`) or a function is called with `fused=False`: that is plain
PyTorch, whatever the variable says.

Tests run kernels on a machine without their device: `why_not` is skipped inside `with EVA.forced('triton'):`.
"""

import contextlib
import functools
import importlib
import logging
import os
from typing import Any, Callable, Dict, Iterator, NamedTuple, Optional, Set, Tuple

import torch

from evavit.ops.common.torch_private import is_exporting, is_forward_mode, is_transforming

__all__ = ['Backend', 'Registry', 'autocast_dtype', 'check_environment', 'has_kernels', 'needs_plain', 'use_backend']

_logger = logging.getLogger(__name__)
_registries: Dict[str, 'Registry'] = {}
_preferred: Optional[str] = os.environ.get('EVAVIT_BACKEND') or None
_said: Set[Tuple[str, str]] = set()  # operators and reasons that have been warned of


class Backend(NamedTuple):
    """One way to compute an operator.

    Attributes:
        name: As in `EVAVIT_BACKEND`.
        why_not: `why_not(case)` is None, or one line on why it cannot compute the case, for a user to read. It is asked
            once for each case. It looks at the case first and imports what the backend needs last.
        run: Computes the operator; what it takes is up to the operator.
    """

    name: str
    why_not: Callable[[Any], Optional[str]]
    run: Callable[..., torch.Tensor]


class Registry:
    """The backends of one operator, the preferred ones first.

    Args:
        op: The operator's name, for messages.
        case_type: The NamedTuple passed to each `why_not`: device, dtype and numbers, no tensors.
    """

    def __init__(self, op: str, case_type: Callable[..., Any]) -> None:
        self.op, self.case_type = op, case_type
        self.backends: Dict[str, Backend] = {}
        self.forced_name: Optional[str] = None
        _registries[op] = self

    def register(self, backend: Backend, before: Optional[str] = None) -> None:
        """Add a backend behind the others, or in front of the one named `before`.

        Raises:
            ValueError: the name is taken.
        """
        if backend.name in self.backends:
            raise ValueError(f'{self.op} has a backend {backend.name!r} already; choose another name')
        order = list(self.backends.values())
        order.insert(len(order) if before is None else list(self.backends).index(before), backend)
        self.backends = {x.name: x for x in order}
        _decide.cache_clear()

    def unregister(self, name: str) -> None:
        """Take a backend out."""
        del self.backends[name]
        _decide.cache_clear()

    def choose(self, fields: Tuple[Any, ...]) -> Backend:
        """The backend of a call. Takes the fields of a case as a plain tuple, which torch.compile knows for a constant;
        its graph keeps the choice."""
        return self.backends[_constant_choice(self.op, fields, needs_plain())]

    def name(self, case: Tuple[Any, ...]) -> str:
        """The name of the backend that computes a case outside of graphs that need plain PyTorch."""
        return _decide(self.op, case, None)

    def describe(self, case: Tuple[Any, ...]) -> str:
        """That name and, where it is not the first backend, why the one before it does not run."""
        name = self.name(case)
        if name in (self.forced_name, _preferred):
            return f'{name} (chosen)'
        place = list(self.backends).index(name)
        if place == 0:
            return name
        faster = list(self.backends.values())[place - 1]
        return f'{name} ({faster.name}: {faster.why_not(case)})'

    @contextlib.contextmanager
    def forced(self, name: str) -> Iterator[None]:
        """Run this backend without asking it, except in graphs that need plain PyTorch: for tests."""
        before, self.forced_name = self.forced_name, self.backends[name].name
        _decide.cache_clear()
        try:
            yield
        finally:
            self.forced_name = before
            _decide.cache_clear()


@contextlib.contextmanager
def use_backend(name: Optional[str]) -> Iterator[None]:
    """As `EVAVIT_BACKEND=name` around some code; None for the usual choice. A graph that torch.compile made before
    keeps the backend that it was made with."""
    global _preferred
    if name is not None:
        check_name(name, 'use_backend')
    before, _preferred = _preferred, name
    _decide.cache_clear()
    try:
        yield
    finally:
        _preferred = before
        _decide.cache_clear()


def check_name(name: str, where: str) -> None:
    """ValueError unless an operator has a backend of this name."""
    known = sorted({each for registry in _registries.values() for each in registry.backends})
    if name not in known:
        raise ValueError(f'{where} is {name!r}; choose from {", ".join(known)}')


def check_environment() -> None:
    """ValueError for an EVAVIT_BACKEND that no operator has."""
    if _preferred is not None:
        check_name(_preferred, 'EVAVIT_BACKEND')


@functools.lru_cache(maxsize=1024)
def _decide(op: str, fields: Tuple[Any, ...], graph: Optional[str]) -> str:
    """The name of the backend; `graph` is the reason of `needs_plain`, or None."""
    registry = _registries[op]
    case = registry.case_type(*fields)
    last = next(reversed(registry.backends))
    if registry.forced_name is not None:
        return registry.forced_name if graph is None else last
    if _preferred is not None:
        check_environment()
        if _preferred in registry.backends:
            reason = None if _preferred == last else graph or registry.backends[_preferred].why_not(case)
            if reason is None:
                return _preferred
            if (op, reason) not in _said:
                _said.add((op, reason))
                _logger.warning(f'backend {_preferred}: {op} cannot take it: {reason}')
    if graph is not None:
        return last
    return next((name for name, each in registry.backends.items() if each.why_not(case) is None), last)


@torch.compiler.assume_constant_result
def _constant_choice(op: str, fields: Tuple[Any, ...], graph: Optional[str]) -> str:
    return _decide(op, fields, graph)


@functools.cache
def has_kernels(module: str) -> bool:
    """Whether a module of kernels in this folder can be imported, which registers its operators: Triton is there."""
    try:
        importlib.import_module(f'.{module}', __package__)
    except ImportError:
        return False
    return True


def needs_plain() -> Optional[str]:
    """Why only PyTorch's own operators will do just now, or None.

    Traced and exported graphs run where this package is not installed. `torch.func` and forward-mode differentiation
    would take the kernels' derivative for zero.
    """
    if torch.jit.is_tracing():
        return 'the graph is being traced'
    if is_exporting():
        return 'the graph is being exported'
    if is_transforming():
        return 'a transform of torch.func is active'
    if is_forward_mode():
        return 'forward-mode differentiation is active'
    return None


def autocast_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype in which kernels take x: that of autocast for float32 under CUDA's autocast, or its own."""
    if x.dtype == torch.float32 and torch.is_autocast_enabled('cuda'):
        return torch.get_autocast_dtype('cuda')
    return x.dtype
