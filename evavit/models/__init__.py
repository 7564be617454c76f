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


def softmax_twin(name):
    """Stands in for the registry of models until that is merged: to be dropped with it."""
    size = name.partition('_')[2]
    deit = dict(class_token=False, global_pool='avg')
    return {
        'deit_tiny': ('deit_tiny_patch16_224', deit),
        'deit_small': ('deit_small_patch16_224', deit),
        'deit_tiny_784': ('deit_tiny_patch16_224', dict(patch_size=8, **deit)),
        'pvt_v2_b3': ('pvt_v2_b3', {}),
    }.get(size) if name.split('_')[0] in ('eva', 'softmax', 'local') else None


def model_names():
    """Likewise."""
    return ['eva_deit_tiny', 'eva_deit_small', 'eva_deit_tiny_784', 'eva_pvt_v2_b3']
