"""Whether fused kernels can run: what the operators share that have some beside a path in plain PyTorch."""

import functools
import importlib

import torch

__all__ = ['has_kernels', 'needs_plain']


@functools.cache
def _loads(module: str) -> bool:
    try:
        importlib.import_module(f'.{module}', __package__)
    except ImportError:
        return False
    return True


@torch.compiler.assume_constant_result
def has_kernels(module: str) -> bool:
    """Whether this folder's module of kernels could be imported, which registers its operators: Triton is there."""
    return _loads(module)


def needs_plain() -> bool:
    """Whether only PyTorch's own operators will do: a graph is traced or exported, or torch.func or forward-mode
    differentiation is at work, which would take the kernels' derivative for zero.

    A graph then runs where this package is not installed. The flag is read and `torch.compiler.is_exporting` not
    called: torch 2.11 says True to it under every torch.compile.
    """
    return (
        torch.jit.is_tracing()
        or getattr(torch.compiler, '_is_exporting_flag', False)
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    )
