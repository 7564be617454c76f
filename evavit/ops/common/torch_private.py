"""All that evavit takes from PyTorch's private C++ bindings, in one place: a new release of torch may break it here."""

from typing import Any

import torch

__all__ = ['below_autograd', 'current_raw_stream', 'is_exporting', 'is_forward_mode', 'is_transforming']

# with below_autograd(): an operator that is called inside computes its result and records no derivative.
below_autograd = torch._C._AutoDispatchBelowAutograd

# current_raw_stream(device index): the CUDA stream that PyTorch launches on, as a number. A torch built without CUDA
# has no such function, and no device to ask it for.
current_raw_stream: Any = getattr(torch._C, '_cuda_getCurrentRawStream', None)


def is_exporting() -> bool:
    """Whether torch.export is at work. Torch 2.11's `torch.compiler.is_exporting` is True in torch.compile, too."""
    return bool(getattr(torch.compiler, '_is_exporting_flag', False))


def is_transforming() -> bool:
    """Whether a transform of torch.func is at work: grad, vmap, jvp, ..."""
    return torch._C._are_functorch_transforms_active()


def is_forward_mode() -> bool:
    """Whether forward-mode differentiation is at work."""
    return torch.autograd.forward_ad._current_level >= 0
