"""Pure tensor functions: no parameters, no state."""
from .eva import eva_attention, eva_num_cells

__all__ = ['eva_attention', 'eva_num_cells']
