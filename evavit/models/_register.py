"""Entry points for every attention of the table: `{attention}_{variant}`."""

import sys
from typing import Any, Callable, Dict

from timm.models import register_model

from evavit.layers import ATTENTIONS

__all__ = ['register_variants']


def register_variants(
    create: Callable[..., Any],
    variants: Dict[str, Dict[str, Any]],
    descriptions: Dict[str, str],
) -> None:
    """Register a family's variants with timm, once for each attention of `evavit.layers.ATTENTIONS`.

    The entry points become functions of the family's module, whose `default_cfgs` has their names.

    Args:
        create: The family's `_create_*`: `create(name, pretrained=..., attn_layer=..., **model_args)`.
        variants: Model arguments of each variant; a user's own come before them.
        descriptions: Docstring of each variant, with `{}` where the attention's class stands.
    """
    module = sys.modules[create.__module__]
    for attention in ATTENTIONS:
        for variant, model_args in variants.items():
            entry_point = _entry_point(create, attention, variant, model_args)
            entry_point.__doc__ = descriptions[variant].format(ATTENTIONS[attention].__name__)
            setattr(module, entry_point.__name__, register_model(entry_point))


def _entry_point(
    create: Callable[..., Any],
    attention: str,
    variant: str,
    model_args: Dict[str, Any],
) -> Callable[..., Any]:
    name = f'{attention}_{variant}'

    def entry_point(pretrained: bool = False, **kwargs):
        return create(name, pretrained=pretrained, **{**model_args, 'attn_layer': attention, **kwargs})

    entry_point.__module__ = create.__module__  # where timm looks for default_cfgs, and pickle for the function
    entry_point.__name__ = entry_point.__qualname__ = name
    entry_point.__annotations__['return'] = create.__annotations__['return']
    return entry_point
