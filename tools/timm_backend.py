"""Loaded by timm's tests through TORCH_BACKEND: makes our models members of timm's families.

timm groups its registry by the last part of the module's name and picks tests per group. A model of ours joins the
group whose classes it is made of, so that the tests of that family run on it.
"""
from timm.models import _registry

import evavit  # noqa: F401  registers the models

FAMILIES = {'eva_deit': 'vision_transformer', 'eva_pvt_v2': 'pvt_v2'}

for module, family in FAMILIES.items():
    _registry._module_to_models[family].update(_registry._module_to_models[module])
