"""Vision backbones with EVA, efficient attention via control variates, as timm models.

Importing this package registers the models, so that `timm.create_model('eva_deit_tiny')` finds them.
"""

from .layers import EvaAttention
from .models import eva_deit_small, eva_deit_tiny, eva_deit_tiny_784, eva_pvt_v2_b3
from .ops import eva_attention
from .version import __version__

__all__ = [
    'EvaAttention',
    '__version__',
    'eva_attention',
    'eva_deit_small',
    'eva_deit_tiny',
    'eva_deit_tiny_784',
    'eva_pvt_v2_b3',
]
