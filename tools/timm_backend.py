"""A pytest plugin for timm's tests: makes our models members of timm's families.

timm picks tests by the last part of the module's name and by how a model's name begins. A model of ours joins the
family whose classes it is made of, and its name is taken for that family's: what holds for `deit*` holds for
`performer_deit_tiny`. So the tests of the family run on it. CONTRACT in the environment, JSON of models and the tests
wanted of each (null: all that timm has), leaves the rest out.
"""

import json
import os

import timm
from timm.models import _registry

import evavit  # noqa: F401  registers the models

FAMILIES = {'eva_deit': 'vision_transformer', 'eva_pvt_v2': 'pvt_v2'}
NAMES = {'deit*': '*_deit_*'}

for module, family in FAMILIES.items():
    _registry._module_to_models[family].update(_registry._module_to_models[module])

list_models = timm.list_models


def widened(patterns):
    """The patterns, and ours beside those that stand for a family of ours."""
    patterns = [patterns] if patterns and isinstance(patterns, str) else list(patterns)
    return patterns and patterns + [ours for theirs, ours in NAMES.items() if theirs in patterns]


def list_models_with_ours(filter='', module='', pretrained=False, exclude_filters='', **kwargs):
    """timm.list_models for timm's tests."""
    return list_models(widened(filter), module, pretrained, widened(exclude_filters), **kwargs)


timm.list_models = list_models_with_ours


def pytest_collection_modifyitems(config, items):
    wanted = json.loads(os.environ['CONTRACT'])
    kept, left_out = [], []
    for item in items:
        model = item.callspec.params.get('model_name') if hasattr(item, 'callspec') else None
        keep = model in wanted and (wanted[model] is None or item.originalname in wanted[model])
        (kept if keep else left_out).append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept
