"""The backbones, registered with timm on import."""

from ._weights import fit_checkpoint, fit_strictly, read_weights
from .eva_deit import GridVisionTransformer, eva_deit_small, eva_deit_tiny, eva_deit_tiny_784
from .eva_pvt_v2 import GridPyramidVisionTransformerV2, eva_pvt_v2_b3

__all__ = [
    'GridPyramidVisionTransformerV2',
    'GridVisionTransformer',
    'eva_deit_small',
    'eva_deit_tiny',
    'eva_deit_tiny_784',
    'eva_pvt_v2_b3',
    'fit_checkpoint',
    'fit_strictly',
    'read_weights',
]
