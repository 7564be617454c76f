"""Run in the copy that `test_additions.py` makes: whatever lists models has what was added."""

import os
import pickle
import sys
from pathlib import Path

os.environ['CONTRACT'] = '{}'
ROOT = Path.cwd()
sys.path[:0] = [str(ROOT), str(ROOT / 'tools'), str(ROOT / 'docs' / 'make')]

import contract  # noqa: E402
import timm  # noqa: E402
import timm_backend  # noqa: E402, F401  changes timm.list_models
import torch  # noqa: E402
import zoo  # noqa: E402

import evavit  # noqa: E402
import hubconf  # noqa: E402
from evavit.models import families, model_names, softmax_twin, variants  # noqa: E402

assert Path(evavit.__file__).is_relative_to(ROOT)
assert list(families())[-1] == 'eva_toy' and {'deit_nano', 'toy_nano'} <= set(variants())

# By family, size and attention, and each with each.
ADDED = ('eva_toy_nano', 'softmax_toy_nano', 'eva_deit_nano', 'performer_deit_nano', 'toy_deit_tiny', 'toy_pvt_v2_b3')
assert {*ADDED, 'toy_toy_nano'} <= set(model_names())
for name in ADDED:
    assert getattr(hubconf, name).__doc__ == timm.model_entrypoint(name).__doc__
    assert pickle.loads(pickle.dumps(timm.model_entrypoint(name))) is timm.model_entrypoint(name)
model = hubconf.eva_toy_nano(num_classes=5)
assert type(model).__name__ == 'ToyVisionTransformer' and model(torch.randn(1, 3, 224, 224)).shape == (1, 5)
assert evavit.eva_toy_nano is timm.model_entrypoint('eva_toy_nano')
assert timm.create_model('toy_toy_nano', factor=3.0).blocks[0].attn.factor == 3

# timm's tests: in full with EVA, the cheap ones in the first size with another attention.
chosen = contract.chosen()
assert chosen['eva_toy_nano'] is None and chosen['eva_deit_nano'] is None and chosen['toy_deit_tiny'] == contract.CHEAP
assert 'test_model_default_cfgs_non_std[1-eva_toy_nano]' in contract.tests_of('eva_toy_nano')
assert set(ADDED[:5]) <= set(timm.list_models(module='vision_transformer'))
assert 'toy_pvt_v2_b3' in timm.list_models(module='pvt_v2')
assert 'performer_deit_nano' in timm.list_models('deit*') and 'softmax_toy_nano' in timm.list_models('vit_*')

# The benchmark's softmax models.
assert softmax_twin('eva_toy_nano') == ('vit_tiny_patch16_224', dict(global_pool='avg'))
assert softmax_twin('eva_deit_nano') == ('deit_tiny_patch16_224', dict(class_token=False, global_pool='avg'))

# The zoo's tables, which count a model at its own depth.
for name in ('eva_toy_nano', 'toy_deit_nano'):
    made = timm.create_model(name, device='meta')
    assert zoo.count(name)[0] == sum(parameter.numel() for parameter in made.parameters())
zoo.count, zoo.PAPER, zoo.REASONS = (lambda *args, **kwargs: (1, 1)), {}, {}
tables = zoo.tables()
assert all(f'`{name}`' in tables for name in (*ADDED, 'toy_toy_nano'))
assert '| `toy` | `ToyAttention` | `factor=2.0` | any |' in zoo.options()
