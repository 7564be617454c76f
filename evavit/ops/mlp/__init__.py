"""The MLP of a transformer's block: two linears and the exact GELU between them."""

import operator
from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F

from evavit.ops.backends import Backend, Registry, has_kernels

__all__ = ['MLP', 'MlpCase', 'mlp_gelu', 'mlp_gelu_backend']


class MlpCase(NamedTuple):
    """What a backend of the MLP is asked about."""

    device: torch.device
    dtype: Optional[torch.dtype]  # of the products: autocast's under autocast; None for tensors of several
    in_features: int
    hidden_features: int
    out_features: int


def _why_not_triton(case: MlpCase) -> Optional[str]:
    if case.device.type != 'cuda':
        return 'no CUDA device'
    if case.dtype is None:
        return 'tensors of several dtypes'
    if case.dtype == torch.float32:
        return 'float32, where there is nothing to win'
    if case.dtype not in (torch.bfloat16, torch.float16):
        return f'{str(case.dtype).removeprefix("torch.")} is not bfloat16 or float16'
    for features in (case.in_features, case.hidden_features, case.out_features):
        if features % 16:
            return f'16 does not divide {features} features'
    return None if has_kernels('mlp.triton') else 'Triton is not installed'


def _run_triton(
    x: torch.Tensor, weight1: torch.Tensor, bias1: torch.Tensor, weight2: torch.Tensor, bias2: torch.Tensor
) -> torch.Tensor:
    from .triton import mlp_fused

    # As autocast would cast them, but for the first bias: the kernels add it as it is.
    if torch.is_autocast_enabled('cuda'):
        dtype = torch.get_autocast_dtype('cuda')
        x, weight1, weight2, bias2 = (t.to(dtype) for t in (x, weight1, weight2, bias2))
    return mlp_fused(x, weight1, bias1, weight2, bias2)


def _run_plain(
    x: torch.Tensor, weight1: torch.Tensor, bias1: torch.Tensor, weight2: torch.Tensor, bias2: torch.Tensor
) -> torch.Tensor:
    return F.linear(F.gelu(F.linear(x, weight1, bias1)), weight2, bias2)


MLP = Registry('mlp_gelu', MlpCase)
MLP.register(Backend('triton', _why_not_triton, _run_triton))
MLP.register(Backend('plain', lambda case: None, _run_plain))


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
        fused: Take the backend that `mlp_gelu_backend` names, which may be kernels; False for plain PyTorch.

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
        if fused and bias1 is not None and bias2 is not None and x.numel() > 0:  # or there is nothing to launch for
            dtype = _dtype(x, weight1, bias1, weight2, bias2)
            case = (x.device, dtype, operator.index(K), operator.index(N), operator.index(C))
            return MLP.choose(case).run(x, weight1, bias1, weight2, bias2)
    return F.linear(F.gelu(F.linear(x, weight1, bias1)), weight2, bias2)


def mlp_gelu_backend(
    device: torch.device, dtype: torch.dtype, in_features: int, hidden_features: int, out_features: int
) -> str:
    """Which backend `mlp_gelu` takes for such arguments with `fused`: 'triton' or 'plain'.

    Triton wants a CUDA device, bfloat16 or float16 (autocast's dtype under autocast), and features that 16 divides. In
    float32 the products take longer than the bytes, so that there is nothing to win. `EVAVIT_BACKEND` has a say, see
    `evavit/ops/backends.py`.
    """
    return MLP.name(MlpCase(device, dtype, in_features, hidden_features, out_features))


def _dtype(
    x: torch.Tensor, weight1: torch.Tensor, bias1: torch.Tensor, weight2: torch.Tensor, bias2: torch.Tensor
) -> Optional[torch.dtype]:
    """That of the products; None for several without autocast, which `F.linear` refuses in its own words."""
    if x.device.type == 'cuda' and torch.is_autocast_enabled('cuda') and x.dtype != torch.float64:
        return torch.get_autocast_dtype('cuda')
    return x.dtype if x.dtype == weight1.dtype == bias1.dtype == weight2.dtype == bias2.dtype else None
