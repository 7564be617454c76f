"""Pure tensor functions: no parameters, no state."""
from .eva import eva_attention, eva_attention_packed, eva_backend, eva_num_cells
from .eva_mass import eva_attention_mass

__all__ = ['eva_attention', 'eva_attention_mass', 'eva_attention_packed', 'eva_backend', 'eva_num_cells']
