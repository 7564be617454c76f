"""A family, as `test_additions.py` puts it into a copy of `evavit/models/`."""

from typing import Any

from ._grid import Variant, build_grid_model, grid_cfgs, register_family, variant
from .eva_deit import GridVisionTransformer


class ToyVisionTransformer(GridVisionTransformer):
    """A class of the family's own."""


def _create_eva_toy(name: str, pretrained: bool = False, **kwargs: Any) -> ToyVisionTransformer:
    return build_grid_model(ToyVisionTransformer, name, pretrained, **kwargs)


def _describe(size: Variant, attention: str) -> str:
    return f'{size.title} with {attention}.'


VARIANTS = {'toy_nano': variant('Toy-Nano', 'vit_tiny_patch16_224', patch_size=32, embed_dim=48, depth=3, num_heads=3)}

default_cfgs = grid_cfgs(VARIANTS, fixed_input_size=True)

register_family(_create_eva_toy, VARIANTS, _describe, softmax_args=dict(global_pool='avg'))
