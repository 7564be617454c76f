"""The MLP of a transformer's block: two linears and the exact GELU between them."""

from typing import Optional

import torch
import torch.nn.functional as F

from evavit.ops.backends import has_kernels, needs_plain

__all__ = ['mlp_gelu', 'mlp_gelu_backend']


def mlp_gelu(
    x: torch.Tensor,
    weight1: torch.Tensor,
    bias1: Optional[torch.Tensor],
    weight2: torch.Tensor,
    bias2: Optional[torch.Tensor],
    fused: bool = False,
) -> torch.Tensor:
    """y = gelu(x W₁ᵀ + b₁) W₂ᵀ + b₂ with the exact gelu(z) = z·Φ(z), Φ the standard normal's distribution function.

    The kernels accumulate in float32 and never write z or the gradient of the hidden layer to memory; for the backward
    they keep x and gelu(z). Under autocast they compute in its dtype, as `F.linear` does.

    Args:
        x: `(.., K)`.
        weight1: W₁ `(N, K)`, as of `nn.Linear(K, N)`.
        bias1: b₁ `(N)`, or None.
        weight2: W₂ `(C, N)`.
        bias2: b₂ `(C)`, or None.
        fused: Use the Triton kernels where `mlp_gelu_backend` has them, plain PyTorch elsewhere.

    Returns:
        `(.., C)`, in the dtype that `F.linear` gives.

    Raises:
        ValueError: weights or biases that do not fit x or each other; the message names the shapes.
    """
    K, N, C = x.shape[-1], weight1.shape[0], weight2.shape[0]
    if list(weight1.shape) != [N, K] or list(weight2.shape) != [C, N]:
        raise ValueError(
            f'tokens {list(x.shape)} need weight1 (N, {K}) and weight2 (C, N), got '
            f'{list(weight1.shape)} and {list(weight2.shape)}'
        )
    for bias, size in ((bias1, N), (bias2, C)):
        if bias is not None and list(bias.shape) != [size]:
            raise ValueError(
                f'weights {list(weight1.shape)} and {list(weight2.shape)} need biases ({N}) and ({C}), '
                f'got {list(bias.shape)}'
            )
    if not torch.jit.is_scripting():  # noqa: SIM102, TorchScript skips this block, but not a longer condition
        if fused and bias1 is not None and bias2 is not None and _runs_fused(x, weight1, bias1, weight2, bias2):
            return _fused(x, weight1, bias1, weight2, bias2)
    return F.linear(F.gelu(F.linear(x, weight1, bias1)), weight2, bias2)


def mlp_gelu_backend(
    device: torch.device, dtype: torch.dtype, in_features: int, hidden_features: int, out_features: int
) -> str:
    """Which code `mlp_gelu` takes for such arguments, `fused` permitting: 'triton' or 'plain'.

    Triton wants a CUDA device, bfloat16 or float16 (autocast's dtype under autocast), and features that 16 divides. In
    float32 the products take longer than the bytes, so that there is nothing to win.
    """
    fits = (
        device.type == 'cuda'
        and dtype in (torch.bfloat16, torch.float16)
        and in_features % 16 == 0
        and hidden_features % 16 == 0
        and out_features % 16 == 0
    )
    return 'triton' if fits and has_kernels('mlp.triton') else 'plain'


def _runs_fused(
    x: torch.Tensor, weight1: torch.Tensor, bias1: torch.Tensor, weight2: torch.Tensor, bias2: torch.Tensor
) -> bool:
    if needs_plain():
        return False
    dtype = x.dtype
    if x.device.type == 'cuda' and torch.is_autocast_enabled('cuda') and dtype != torch.float64:
        dtype = torch.get_autocast_dtype('cuda')
    elif not x.dtype == weight1.dtype == bias1.dtype == weight2.dtype == bias2.dtype:
        return False  # `F.linear` says what it thinks of that
    # An empty batch has nothing to launch a kernel for.
    return (
        x.numel() > 0 and mlp_gelu_backend(x.device, dtype, x.shape[-1], weight1.shape[0], weight2.shape[0]) == 'triton'
    )


def _fused(
    x: torch.Tensor, weight1: torch.Tensor, bias1: torch.Tensor, weight2: torch.Tensor, bias2: torch.Tensor
) -> torch.Tensor:
    from .triton import mlp_fused

    # As autocast would cast them, but for the first bias: the kernels add it as it is.
    if torch.is_autocast_enabled('cuda'):
        dtype = torch.get_autocast_dtype('cuda')
        x, weight1, weight2, bias2 = (t.to(dtype) for t in (x, weight1, weight2, bias2))
    return mlp_fused(x, weight1, bias1, weight2, bias2)
