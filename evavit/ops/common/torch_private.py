"""All that evavit takes from PyTorch's private C++ bindings, in one place: a new release of torch may break it here."""

from typing import Any, Optional

import torch

__all__ = [
    'below_autograd',
    'current_device',
    'current_raw_stream',
    'is_dispatched',
    'is_exporting',
    'is_forward_mode',
    'is_transforming',
    'static_launch',
]

# with below_autograd(): an operator that is called inside computes its result and records no derivative.
below_autograd = torch._C._AutoDispatchBelowAutograd

# current_raw_stream(device index): the CUDA stream that PyTorch launches on, as a number. A torch built without CUDA
# has no such function, and no device to ask it for.
current_raw_stream: Any = getattr(torch._C, '_cuda_getCurrentRawStream', None)

# current_device(): the index of the current CUDA device, without the look whether CUDA has begun.
current_device: Any = getattr(torch._C, '_cuda_getDevice', None)


def _static_launch() -> Optional[Any]:
    """The launch function of Inductor's static launcher, or None where this torch lacks it or calls it otherwise.

    `launch(function, x, y, z, num_warps, shared, types, args, stream)` launches a CUDA function, a number, on x · y · z
    programs: `types` has a letter for each of the tuple args. No programs are no launch, so that a call without a
    device tells whether these are its arguments.
    """
    launch = getattr(getattr(torch._C, '_StaticCudaLauncher', None), '_launch_kernel', None)
    if launch is None or torch.version.hip is not None:
        return None
    try:
        launch(0, 0, 1, 1, 1, 0, 'Oif', (None, 0, 0.0), 0)
    except Exception:  # whatever a later release raises
        return None
    return launch


static_launch = _static_launch()


def is_exporting() -> bool:
    """Whether torch.export is at work. Torch 2.11's `torch.compiler.is_exporting` is True in torch.compile, too."""
    return bool(getattr(torch.compiler, '_is_exporting_flag', False))


def is_transforming() -> bool:
    """Whether a transform of torch.func is at work: grad, vmap, jvp, ..."""
    return torch._C._are_functorch_transforms_active()


def is_forward_mode() -> bool:
    """Whether forward-mode differentiation is at work."""
    return torch.autograd.forward_ad._current_level >= 0


def is_dispatched() -> bool:
    """Whether Python code waits for the operators that are called: a counter of operations, fake tensors, a tracer."""
    return torch._C._len_torch_dispatch_stack() > 0
