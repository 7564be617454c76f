"""The backbones, registered with timm on import: every file `eva_*.py` of this folder is a family.

The entry points of all models are here too, as `evavit.models.eva_deit_tiny`.
"""

import importlib
import pkgutil
from typing import Any, Callable

from timm.models import model_entrypoint

from ._converted import ConvertedModel, convert_vit, revert_vit
from ._grid import Family, Variant, families, list_models, model_names, softmax_twin, variants
from ._weights import fit_checkpoint, fit_strictly, read_weights, write_weights

for _module in pkgutil.iter_modules(__path__):
    if _module.name.startswith('eva_'):
        importlib.import_module(f'{__name__}.{_module.name}')

from .eva_deit import GridVisionTransformer  # noqa: E402
from .eva_pvt_v2 import GridPyramidVisionTransformerV2  # noqa: E402

__all__ = [
    'ConvertedModel',
    'Family',
    'GridPyramidVisionTransformerV2',
    'GridVisionTransformer',
    'Variant',
    'convert_vit',
    'families',
    'fit_checkpoint',
    'fit_strictly',
    'list_models',
    'model_names',
    'read_weights',
    'revert_vit',
    'softmax_twin',
    'variants',
    'write_weights',
]
__all__ += [name for name in model_names() if name.startswith('eva_')]


def __getattr__(name: str) -> Callable[..., Any]:
    """The entry point of a model."""
    if name in model_names():
        return model_entrypoint(name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
