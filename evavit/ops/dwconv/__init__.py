"""A depthwise 3 × 3 convolution and GELU on tokens of a 2D grid: what is between the linears of PVT v2's MLP."""

from typing import List, NamedTuple, Optional

import torch
import torch.nn.functional as F

from evavit.ops.backends import Backend, Registry, has_kernels

__all__ = ['DWCONV', 'DepthwiseCase', 'depthwise_gelu', 'depthwise_gelu_backend']


class DepthwiseCase(NamedTuple):
    """What a backend of the depthwise convolution is asked about."""

    device: torch.device
    dtype: Optional[torch.dtype]  # of the tokens; None for weights of another one without autocast


def _why_not_triton(case: DepthwiseCase) -> Optional[str]:
    if case.device.type != 'cuda':
        return 'no CUDA device'
    if case.dtype is None:
        return 'tensors of several dtypes'
    if case.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f'{str(case.dtype).removeprefix("torch.")} is not float32, bfloat16 or float16'
    return None if has_kernels('dwconv.triton') else 'Triton is not installed'


def _run_triton(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, feat_size: List[int]) -> torch.Tensor:
    from .triton import depthwise_gelu_fused

    if torch.is_autocast_enabled('cuda'):
        x = x.to(torch.get_autocast_dtype('cuda'))
    return depthwise_gelu_fused(x, weight, bias, feat_size)


def _plain(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, feat_size: List[int]) -> torch.Tensor:
    B, _, C = x.shape
    # In memory this view is a channels-last image: there is nothing to copy.
    z = F.conv2d(x.transpose(1, 2).view(B, C, feat_size[0], feat_size[1]), weight, bias, padding=1, groups=C)
    return F.gelu(z.flatten(2).transpose(1, 2))


DWCONV = Registry('depthwise_gelu', DepthwiseCase)
DWCONV.register(Backend('triton', _why_not_triton, _run_triton))
DWCONV.register(Backend('plain', lambda case: None, _plain))


def depthwise_gelu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    feat_size: List[int],
    fused: bool = False,
) -> torch.Tensor:
    """GELU of a depthwise 3 × 3 convolution with stride 1, zeros around the grid and a bias.

        y = gelu(z),  z[n, c] = bias[c] + Σ_{i, j} weight[c, 0, i, j] · x[token i - 1 rows and j - 1 columns from n, c]

    with the exact gelu(z) = z·Φ(z), Φ the standard normal's distribution function. The kernels accumulate in float32
    and leave the parameters in their dtype under autocast; they keep x for the backward, and compute z again there.

    Args:
        x: Tokens `(B, N, C)` in raster order.
        weight: `(C, 1, 3, 3)`, as of `nn.Conv2d(C, C, 3, groups=C)`.
        bias: `(C)`.
        feat_size: Grid `(H, W)` with N = H·W.
        fused: Take the backend that `depthwise_gelu_backend` names, which may be kernels; False for plain PyTorch.

    Returns:
        `(B, N, C)` in x's dtype; under autocast in autocast's, as a convolution.

    Raises:
        ValueError: arguments that do not fit each other; the message names the value.
    """
    B, N, C = x.shape
    H, W = feat_size[0], feat_size[1]
    if N != H * W:
        raise ValueError(f'{N} tokens are not a grid of feat_size {H} x {W}')
    if list(weight.shape) != [C, 1, 3, 3] or list(bias.shape) != [C]:
        raise ValueError(
            f'{C} channels need weight {[C, 1, 3, 3]} and bias {[C]}, got {list(weight.shape)} and {list(bias.shape)}'
        )
    if not torch.jit.is_scripting():  # noqa: SIM102, TorchScript skips this block, but not a longer condition
        if fused and B > 0 and N * C > 0:  # or there is nothing to launch a kernel for
            # Without autocast a convolution refuses dtypes that differ.
            autocast = x.device.type == 'cuda' and torch.is_autocast_enabled('cuda')
            case = (x.device, x.dtype if autocast or x.dtype == weight.dtype else None)
            return DWCONV.choose(case).run(x, weight, bias, feat_size)
    return _plain(x, weight, bias, feat_size)


def depthwise_gelu_backend(device: torch.device, dtype: torch.dtype) -> str:
    """Which backend `depthwise_gelu` takes for such tokens with `fused`: 'triton' or 'plain'.

    Triton wants a CUDA device and float32, bfloat16 or float16. `EVAVIT_BACKEND` has a say, see
    `evavit/ops/backends.py`.
    """
    return DWCONV.name(DepthwiseCase(device, dtype))
