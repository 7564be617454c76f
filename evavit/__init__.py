"""Vision backbones with EVA, efficient attention via control variates, as timm models.

Importing this package registers the models, so that `timm.create_model('eva_deit_tiny')` finds them. The models with
EVA are functions of the package too: `evavit.eva_deit_tiny(...)`.
"""

from typing import TYPE_CHECKING, Any, Callable, List

from .arguments import asks_for_help, running
from .errors import quiet_start
from .version import __version__

__all__ = ['__version__']

quiet_start(running())  # in a program of ours, before PyTorch, which takes seconds to load

if TYPE_CHECKING or not asks_for_help():
    from . import models
    from .hub import load_converted
    from .layers import EvaAttention
    from .maps import attention_maps, attention_rollout, overlay_attention
    from .models import convert_vit, list_models, revert_vit
    from .ops import eva_attention

    __all__ += [
        'EvaAttention',
        'attention_maps',
        'attention_rollout',
        'convert_vit',
        'eva_attention',
        'list_models',
        'load_converted',
        'overlay_attention',
        'revert_vit',
    ]
    __all__ += [name for name in models.model_names() if name.startswith('eva_')]


def __dir__() -> List[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Callable[..., Any]:
    """The entry point of a model with EVA."""
    if name in __all__:
        return getattr(models, name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
