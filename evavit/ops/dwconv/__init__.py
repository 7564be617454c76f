"""A depthwise 3 × 3 convolution and GELU on tokens of a 2D grid: what is between the linears of PVT v2's MLP."""

from typing import List

import torch
import torch.nn.functional as F

from evavit.ops.backends import has_kernels, needs_plain

__all__ = ['depthwise_gelu', 'depthwise_gelu_backend']


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
        fused: Use the Triton kernels where `depthwise_gelu_backend` has them, plain PyTorch elsewhere.

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
        if fused and _runs_fused(x, weight):
            return _fused(x, weight, bias, feat_size)
    # In memory this view is a channels-last image: there is nothing to copy.
    z = F.conv2d(x.transpose(1, 2).view(B, C, H, W), weight, bias, padding=1, groups=C)
    return F.gelu(z.flatten(2).transpose(1, 2))


def depthwise_gelu_backend(device: torch.device, dtype: torch.dtype) -> str:
    """Which code `depthwise_gelu` takes for such tokens, `fused` permitting: 'triton' or 'plain'.

    Triton wants a CUDA device and float32, bfloat16 or float16.
    """
    fits = device.type == 'cuda' and dtype in (torch.float32, torch.bfloat16, torch.float16)
    return 'triton' if fits and has_kernels('dwconv.triton') else 'plain'


def _runs_fused(x: torch.Tensor, weight: torch.Tensor) -> bool:
    if needs_plain():
        return False
    # Without autocast a convolution refuses dtypes that differ. An empty batch has nothing to launch a kernel for.
    autocast = x.device.type == 'cuda' and torch.is_autocast_enabled('cuda')
    return (
        x.numel() > 0
        and (x.dtype == weight.dtype or autocast)
        and depthwise_gelu_backend(x.device, x.dtype) == 'triton'
    )


def _fused(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, feat_size: List[int]) -> torch.Tensor:
    from .triton import depthwise_gelu_fused

    if torch.is_autocast_enabled('cuda'):
        x = x.to(torch.get_autocast_dtype('cuda'))
    return depthwise_gelu_fused(x, weight, bias, feat_size)
