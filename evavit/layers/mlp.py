"""timm's MLP with fused kernels for its hidden layer."""

from typing import Any, Final, Optional

import torch
from timm.layers import GELU, Mlp, use_fused_attn
from torch import nn

from evavit.ops import mlp_gelu
from evavit.ops.backends import autocast_dtype
from evavit.ops.mlp import MLP, MlpCase

__all__ = ['FusedMlp', 'is_exact_gelu', 'is_hooked']


def is_exact_gelu(act: nn.Module) -> bool:
    """Whether a module is PyTorch's or timm's GELU without an approximation; a subclass may be anything."""
    return type(act) in (nn.GELU, GELU) and getattr(act, 'approximate', 'none') == 'none'


def is_hooked(module: nn.Module) -> bool:
    """Whether a call of a module does more than its class says: hooks, or a `forward` put on the module itself."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or 'forward' in module.__dict__
    )


class FusedMlp(Mlp):
    """timm's `Mlp`, fc1, activation, dropout, norm, fc2, dropout, on tokens `(B, N, C)`.

    With the exact GELU, two plain linears with biases, no norm and no active dropout, fused CUDA kernels run where they
    can (`evavit.ops.mlp_gelu_backend`), unless timm's switch is off when the layer is made
    (`timm.layers.set_fused_attn(False)`, or TIMM_FUSED_ATTN=0 in the environment) or the layer's `fused_mlp` is set to
    False. What hangs on the layers inside, as a hook, an adapter or quantized weights, is kept: such a layer is timm's
    step by step. `backend` names the code that runs, and `extra_repr` why no faster one does.

    Args:
        *args: Arguments of timm's Mlp.
        **kwargs: Likewise.
    """

    fused_mlp: Final[bool]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fused_mlp = use_fused_attn()

    @property
    @torch.jit.unused
    def backend(self) -> str:
        """The code that runs where the layer is, in its mode and under autocast as it is now: 'triton' or 'plain'."""
        if not self.fused_mlp or not self._fits():
            return 'plain'
        return MLP.name(self._case(autocast_dtype(self.fc1.weight)))

    @torch.jit.unused
    def _case(self, dtype: torch.dtype) -> MlpCase:
        weight = self.fc1.weight
        return MlpCase(weight.device, dtype, weight.shape[1], weight.shape[0], self.fc2.weight.shape[0])

    @torch.jit.ignore
    def extra_repr(self) -> str:
        reason = self._why_not() if self.fused_mlp else 'fused_mlp is False'
        if reason is not None:
            return f'backend=plain ({reason})'
        dtype = self.fc1.weight.dtype
        if dtype != torch.float32:
            return f'backend={MLP.describe(self._case(dtype))}'
        case = self._case(torch.bfloat16)
        name, text = MLP.name(case), MLP.describe(case)
        return f'backend={text}' if name == 'plain' else f'backend={name} under autocast{text.removeprefix(name)}'

    @torch.jit.unused
    def _fits(self) -> bool:
        """No step but those of `evavit.ops.mlp_gelu`, and nothing that sees or changes a step."""
        return self._why_not() is None

    @torch.jit.unused
    def _why_not(self) -> Optional[str]:
        """Why the layer is not `evavit.ops.mlp_gelu` alone, or None."""
        if self.training and (self.drop1.p > 0 or self.drop2.p > 0):
            return 'dropout'
        if not is_exact_gelu(self.act):
            return 'another activation than the exact GELU'
        if any(is_hooked(module) for module in (self.fc1, self.act, self.drop1, self.norm, self.fc2, self.drop2)):
            return 'a layer inside has hooks or a forward of its own'
        for linear in (self.fc1, self.fc2):
            if type(linear) is not nn.Linear or type(linear.weight) not in (torch.Tensor, nn.Parameter):
                return 'a layer inside is no plain Linear'
            if linear.bias is None:
                return 'a Linear without bias'
        return None if type(self.norm) is nn.Identity else 'a norm of the hidden layer'

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():  # noqa: SIM102, TorchScript skips this block, but not a longer condition
            if self.fused_mlp and not isinstance(x, torch.fx.Proxy) and self._fits():
                return mlp_gelu(x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias, fused=True)
        x = self.fc1(x)
        x = self.act(x)
        x = self.drop1(x)
        x = self.norm(x)
        x = self.fc2(x)
        return self.drop2(x)
