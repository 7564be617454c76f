"""A pytest plugin for timm's tests: makes our models members of timm's families.

timm picks tests by the last part of the module's name and by patterns of names. A model of ours joins the family of
timm whose class it is made of, and a pattern that holds for timm's softmax model beside it holds for it: 'deit*' holds
for `performer_deit_tiny`. So the tests of the family run on it. CONTRACT in the environment, JSON of models and the
tests wanted of each (null: all that timm has), leaves the rest out.
"""

import fnmatch
import json
import os

import timm
from timm.models import _registry

from evavit.models import families, model_names, softmax_twin


def timm_family(model):
    """The family of timm whose class a class of ours is made of, such as 'vision_transformer'."""
    modules = [base.__module__ for base in model.__mro__]
    return next(module for module in modules if module.startswith('timm.models.')).rpartition('.')[2]


for family in families().values():
    _registry._module_to_models[timm_family(family.model)].update(family.models)

list_models = timm.list_models


def widened(patterns):
    """The patterns, and our models beside those that hold for their softmax models."""
    patterns = [patterns] if patterns and isinstance(patterns, str) else list(patterns)
    return patterns + [
        name for name in model_names() if any(fnmatch.fnmatch(softmax_twin(name)[0], pattern) for pattern in patterns)
    ]


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
