"""A softmax attention of timm's, with its own weights, on one of the attentions of `evavit.layers.ATTENTIONS`.

timm's blocks hand a mask on to their attention. A converted model has no mask and hands the size of the grid on in its
place, as a `GridSize`: an argument of each call, so that threads, compilers and exports see nothing else change.
"""

import inspect
from typing import Any, Dict, List, NamedTuple, Optional, Set, Tuple, Type, TypeVar, cast

import torch
from timm.layers import register_notrace_module
from torch import nn
from torch.nn import functional as F

from .attention import GridAttention
from .mlp import is_hooked

__all__ = ['ConvertedAttention', 'Derived', 'GridSize', 'derive', 'given_tokens', 'revert_attention']


class GridSize(NamedTuple):
    """What stands where timm's blocks take a mask."""

    height: int  # of the grid, in tokens
    width: int
    checkpoint: bool = False  # the block recomputes its activations in the backward pass


class Derived:
    """Base of what stands before a class in `derive`: its objects are pickled and copied as any other's."""

    made_of: Tuple[type, type]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return (_blank, self.made_of, *object.__reduce_ex__(self, 2)[2:])


Class = TypeVar('Class', bound=type)
_MADE: Dict[Tuple[type, type], type] = {}


def derive(front: Class, base: type) -> Class:
    """The class of both, `front` first; always the same one."""
    if (front, base) not in _MADE:
        name = front.__name__.removesuffix('Attention').removesuffix('Model').removesuffix('Block') + base.__name__
        made = type(name, (front, base), {'made_of': (front, base), '__doc__': front.__doc__})
        if issubclass(made, GridAttention):
            register_notrace_module(made)
        _MADE.setdefault((front, base), made)  # of another thread's
    return cast(Class, _MADE[front, base])


def _blank(front: type, base: type) -> Any:
    made: Any = derive(front, base)
    return made.__new__(made)


def _hooks(module: nn.Module) -> Dict[str, Any]:
    """What users hung on a module."""
    return {key: value for key, value in module.__dict__.items() if key.startswith('_') and 'hook' in key}


class ConvertedAttention(Derived, GridAttention):
    """Stands before one of the attentions: its `attend` between timm's own projections, norms, gate and dropouts.

    All modules, parameters and buffers of timm's attention keep their names; what the attention adds stands beside
    them.

    Args:
        attn: timm's `Attention`, `AttentionRope` or `EvaAttention`, whose modules become this one's.
        num_prefix_tokens: Class, register and other tokens before those of the grid.
        **options: Of the attention.
    """

    def __init__(self, attn: nn.Module, num_prefix_tokens: int, **options: Any) -> None:
        given = cast(Any, attn)
        weight = given.proj.weight
        super().__init__(
            given.num_heads * given.head_dim,
            given.num_heads,
            num_prefix_tokens=num_prefix_tokens,
            rotate_half=getattr(given, 'rotate_half', False),
            attn_drop=given.attn_drop.p,
            device=weight.device,
            dtype=weight.dtype,
            **options,
        )
        for name in ('qkv', 'q_norm', 'k_norm', 'attn_drop', 'norm', 'proj', 'proj_drop'):
            delattr(self, name)
        plain = {key: value for key, value in attn.__dict__.items() if not key.startswith('_') and key != 'training'}
        self.original: Tuple[Type[nn.Module], Dict[str, Any]] = type(attn), plain
        self.original_names: Dict[str, List[str]] = {}
        for kind in ('_modules', '_parameters', '_buffers'):
            own, theirs = self.__dict__[kind], attn.__dict__[kind]
            self.original_names[kind] = list(theirs)
            self.__dict__[kind] = type(own)({**theirs, **own})
        self._non_persistent_buffers_set = attn._non_persistent_buffers_set | self._non_persistent_buffers_set
        for key, value in plain.items():
            self.__dict__.setdefault(key, value)
        self.__dict__.update(_hooks(attn))
        self.num_kv_groups = getattr(given, 'num_kv_groups', 1)
        self.qk_norm = not (isinstance(given.q_norm, nn.Identity) and isinstance(given.k_norm, nn.Identity))
        given_parts = set(attn.modules())  # each in a mode of its own, as a dropout or adapter that is switched off
        for module in set(self.modules()) - given_parts:
            module.training = attn.training

    def reset_parameters(self) -> None:
        """Initialise what either attention holds itself."""
        self._initialise('reset_parameters')

    def init_non_persistent_buffers(self) -> None:
        """Fill the buffers of either attention that no state dict has, as after `to_empty`."""
        self._initialise('init_non_persistent_buffers')

    def _initialise(self, method: str) -> None:
        getattr(super(), method, lambda: None)()
        if 'original' in self.__dict__:  # while this is made, timm's attention has its values
            getattr(revert_attention(self), method, lambda: None)()

    def _packed(self, x: torch.Tensor) -> torch.Tensor:
        """Queries, keys and values `(3, B, h, P + N, d)`."""
        q_bias: Optional[torch.Tensor] = getattr(self, 'q_bias', None)
        if q_bias is None:
            qkv = self.qkv(x)
        else:
            given = cast(Any, self)
            bias = torch.cat((q_bias, given.k_bias, given.v_bias))
            if type(self.qkv) is nn.Linear and not given.qkv_bias_separate and not is_hooked(self.qkv):
                qkv = F.linear(x, self.qkv.weight, bias)
            else:  # an adapter, or as timm has it
                qkv = self.qkv(x) + bias
        return qkv.unflatten(-1, [3, self.num_heads, self.head_dim]).permute(2, 0, 3, 1, 4)

    def project_tokens(
        self, x: torch.Tensor, rope: Optional[torch.Tensor] = None
    ) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        given = cast(Any, self)
        if given.qkv is not None:
            q, k, v = self._packed(x).unbind(0)
        else:
            q, k, v = (
                layer(x).unflatten(-1, [-1, self.head_dim]).transpose(1, 2)
                for layer in (given.q_proj, given.k_proj, given.v_proj)
            )
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = self.rotate(q, rope), self.rotate(k, rope)
        if self.num_kv_groups > 1:
            k, v = (tokens.repeat_interleave(self.num_kv_groups, 1) for tokens in (k, v))
        return q.to(v.dtype), k.to(v.dtype), v

    def forward(  # type: ignore[override]
        self,
        x: torch.Tensor,
        rope: Optional[torch.Tensor] = None,
        attn_mask: Optional[GridSize] = None,
        is_causal: bool = False,
    ) -> torch.Tensor:
        """Attend over tokens `(B, P + N, C)`, called as timm's blocks call their attention.

        `rope` are the rotary embeddings as there, and `attn_mask` is the size of the grid.
        """
        if not isinstance(attn_mask, GridSize) or is_causal:
            raise ValueError(
                'a converted attention takes no mask and needs the size of its grid, which the converted model hands '
                'on to it; call the model, or give attn_mask=GridSize(height, width)'
            )
        self.check_tracing()
        feat_size = [attn_mask.height, attn_mask.width]
        given = cast(Any, self)
        gate = given.gate(x).sigmoid() if given.gate is not None else None
        if given.qkv is not None and rope is None and not self.qk_norm:
            out = self.attend(self._packed(x), feat_size)
        else:
            q, k, v = self.project_tokens(x, rope)
            out = self.attend_apart(q, k, v, feat_size)
        out = self.norm(out.transpose(1, 2).flatten(2))
        if gate is not None:
            out = out * gate
        return self.proj_drop(self.proj(out))


def given_tokens(
    layer: GridAttention, args: Tuple[Any, ...], kwargs: Dict[str, Any]
) -> Tuple[torch.Tensor, List[int], Optional[torch.Tensor]]:
    """Tokens, size of the grid and rotary embeddings that a call of an attention is given, converted or not. For hooks,
    which have its arguments as they were written."""
    given = inspect.signature(type(layer).forward).bind(layer, *args, **kwargs).arguments
    height, width = given['feat_size'] if 'feat_size' in given else given['attn_mask'][:2]
    return given['x'], [int(height), int(width)], given.get('rope')


def revert_attention(attn: ConvertedAttention) -> nn.Module:
    """timm's attention that a converted one was made from, with the weights that it has now."""
    made_by, plain = attn.original
    original = made_by.__new__(made_by)
    nn.Module.__init__(original)
    original.__dict__.update(plain)
    names: Set[str] = set()
    for kind, kept in attn.original_names.items():
        original.__dict__[kind].update({name: attn.__dict__[kind][name] for name in kept})
        names |= set(kept)
    original._non_persistent_buffers_set = attn._non_persistent_buffers_set & names
    original.__dict__.update(_hooks(attn))
    original.training = attn.training
    return original
