"""Pure tensor functions: no parameters, no state."""

from .dwconv import depthwise_gelu, depthwise_gelu_backend
from .eva import eva_attention, eva_attention_packed, eva_backend, eva_num_cells
from .eva.exact import control_variate_coefficients, eva_estimator
from .eva.mass import eva_attention_mass
from .eva.sequence import Eva1dCache, eva_attention_1d, eva_attention_1d_step
from .eva.variants import eva_attention_variant, halo_size
from .mlp import mlp_gelu, mlp_gelu_backend

__all__ = [
    'Eva1dCache',
    'control_variate_coefficients',
    'depthwise_gelu',
    'depthwise_gelu_backend',
    'eva_attention',
    'eva_attention_1d',
    'eva_attention_1d_step',
    'eva_attention_mass',
    'eva_attention_packed',
    'eva_attention_variant',
    'eva_backend',
    'eva_estimator',
    'eva_num_cells',
    'halo_size',
    'mlp_gelu',
    'mlp_gelu_backend',
]
