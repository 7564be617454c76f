"""EVA's loops and what they share, under the name by which its tests import them."""

from helpers import bias_rows, grid_cells, grid_windows, relative_errors, saved_bytes  # noqa: F401
from ops.eva.references import estimator_loop, eva_1d_loop, eva_loop, eva_variant_loop  # noqa: F401
