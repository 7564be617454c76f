"""Pure tensor functions: no parameters, no state."""
from .eva import eva_attention, eva_attention_packed, eva_backend, eva_num_cells
from .lara import lara_attention
from .random_features import random_feature_attention
from .scatterbrain import scatterbrain_attention

__all__ = [
    'eva_attention', 'eva_attention_packed', 'eva_backend', 'eva_num_cells', 'lara_attention',
    'random_feature_attention', 'scatterbrain_attention',
]
