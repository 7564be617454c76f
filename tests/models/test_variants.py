"""Every attention of the table is a model of every variant, with its own options, and softmax is timm's DeiT."""

import importlib

import pytest
import timm
import torch
from timm.models import get_pretrained_cfg
from timm.models.pvt_v2 import PyramidVisionTransformerV2
from timm.models.vision_transformer import VisionTransformer

import evavit  # noqa: F401
from evavit import layers
from evavit.layers import ATTENTIONS, GridAttention, pop_attention_kwargs
from evavit.models import families, model_names, softmax_twin, variants

VARIANTS = variants()
DEIT = families()['eva_deit'].variants
each_attention = pytest.mark.parametrize('attention', ATTENTIONS)


class OneGrid(GridAttention):
    """An attention with a weight per token."""

    fixed_grid = True

    def __init__(self, dim, num_heads, *, feat_size, factor=1.0, **kwargs):
        super().__init__(dim, num_heads, **kwargs)
        self.factor = factor
        self.set_feat_size(feat_size)

    def set_feat_size(self, feat_size):
        self.feat_size = list(feat_size)
        self.per_token = torch.nn.Parameter(torch.ones(feat_size[0] * feat_size[1], 1))

    def attend(self, qkv, feat_size):
        if list(feat_size) != self.feat_size:
            raise ValueError(f'made for the grid {self.feat_size}, not for {list(feat_size)}')
        return self.factor * self.per_token * qkv[2]


@pytest.fixture
def one_grid(monkeypatch):
    monkeypatch.setitem(layers.ATTENTIONS, 'one_grid', OneGrid)


def test_every_attention_in_every_variant():
    """But class and register tokens only where the attention takes them."""
    for variant in VARIANTS:
        fits = [
            name for name, attention in ATTENTIONS.items() if attention.takes_prefix_tokens or 'reg4' not in variant
        ]
        assert set(timm.list_models(f'*_{variant}')) == {f'{name}_{variant}' for name in fits}


@pytest.mark.parametrize('name', model_names())
def test_entry_point(name):
    attention = max((key for key in ATTENTIONS if name.startswith(f'{key}_')), key=len)
    variant = name.removeprefix(f'{attention}_')
    entry_point = timm.model_entrypoint(name)
    module = importlib.import_module(f'evavit.models.{"eva_deit" if variant in DEIT else "eva_pvt_v2"}')
    assert getattr(module, name) is entry_point and entry_point.__name__ == name
    assert ATTENTIONS[attention].__name__ in entry_point.__doc__
    assert get_pretrained_cfg(name).architecture == name
    model = timm.create_model(name, device='meta', **(dict(depth=2) if variant in DEIT else {}))
    made = [module for module in model.modules() if isinstance(module, GridAttention)]
    if variant not in DEIT:
        assert all(type(attn) is ATTENTIONS[attention] for attn in made[:-3])
        assert all(type(attn) is ATTENTIONS['softmax'] for attn in made[-3:])
    else:
        assert all(type(attn) is ATTENTIONS[attention] for attn in made)


def shape(model):
    """Width and depth of each stage."""
    stages = [stage.blocks for stage in model.stages] if hasattr(model, 'stages') else [model.blocks]
    return [(blocks[0].norm1.normalized_shape[0], len(blocks)) for blocks in stages]


@pytest.mark.parametrize('variant', VARIANTS)
def test_the_softmax_model_beside_a_model_has_its_size(variant):
    name, kwargs = softmax_twin(f'eva_{variant}')
    ours, theirs = timm.create_model(f'eva_{variant}', device='meta'), timm.create_model(name, device='meta', **kwargs)
    assert shape(ours) == shape(theirs)
    tokens = [getattr(model.patch_embed, 'num_patches', model.patch_embed.proj.stride) for model in (ours, theirs)]
    assert tokens[0] == tokens[1]
    assert getattr(ours, 'num_prefix_tokens', 0) == getattr(theirs, 'num_prefix_tokens', 0)


@each_attention
def test_an_attention_by_argument_is_the_attention_by_name(attention):
    one, other = (
        timm.create_model(name, device='meta', **kwargs).state_dict()
        for name, kwargs in ((f'{attention}_deit_tiny', {}), ('eva_deit_tiny', dict(attn_layer=attention)))
    )
    assert {key: value.shape for key, value in one.items()} == {key: value.shape for key, value in other.items()}


@each_attention
def test_a_small_pyramid_trains_and_scripts(attention):
    model = timm.create_model(
        f'{attention}_pvt_v2_b3',
        img_size=64,
        embed_dims=(16, 32, 48, 64),
        depths=(1, 1, 1, 1),
        num_heads=(1, 2, 3, 4),
        num_classes=5,
    )
    x = torch.randn(2, 3, 64, 64)
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.script(model)(x), model(x))


@each_attention
def test_a_small_deit_compiles_in_one_graph(attention):
    torch._dynamo.reset()
    model = timm.create_model(f'{attention}_deit_tiny', img_size=48, patch_size=8, embed_dim=48, depth=1, num_classes=5)
    compiled = torch.compile(model, backend='aot_eager', fullgraph=True)
    compiled(torch.randn(2, 3, 48, 48)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize('variant', DEIT)
def test_softmax_deit_is_timms_deit_with_mean_pooling(variant):
    """Where it has no class token of its own; the large ones narrower."""
    small = dict(depth=3, embed_dim=min(DEIT[variant].model_args['embed_dim'], 384), num_heads=6)
    ours = timm.create_model(f'softmax_{variant}', **small).eval()
    pooled = dict(class_token=False, global_pool='avg', fc_norm=False)
    theirs = VisionTransformer(**{**pooled, **DEIT[variant].model_args, **small}).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():  # biases and norms too
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(ours.forward_features(x), theirs.forward_features(x))
        torch.testing.assert_close(ours(x), theirs(x))


def test_softmax_pyramid_is_timms_without_downsampling():
    sizes = dict(embed_dims=(16, 32, 48, 64), depths=(1, 1, 2, 1), num_heads=(1, 2, 3, 4))
    ours = timm.create_model('softmax_pvt_v2_b3', **sizes).eval()
    theirs = PyramidVisionTransformerV2(**sizes, sr_ratios=1).eval()
    state = {}
    for key, value in theirs.state_dict().items():
        if '.attn.q.' in key:
            state[key.replace('.q.', '.qkv.')] = torch.cat([value, theirs.state_dict()[key.replace('.q.', '.kv.')]])
        elif '.attn.kv.' not in key:
            state[key] = value
    ours.load_state_dict(state, strict=True)
    x = torch.randn(1, 3, 97, 161)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))


def test_an_attention_made_for_one_grid_gets_it(one_grid):
    model = timm.create_model('eva_deit_tiny', attn_layer='one_grid', factor=2.0, depth=1, img_size=(64, 96)).eval()
    assert model.blocks[0].attn.feat_size == [4, 6] and model.blocks[0].attn.factor == 2
    model.set_input_size(img_size=(32, 48))
    assert model.blocks[0].attn.feat_size == [2, 3]
    assert model(torch.randn(1, 3, 32, 48)).shape == (1, 1000)
    with pytest.raises(ValueError, match='leave it out and give img_size'):
        timm.create_model('eva_deit_tiny', attn_layer='one_grid', dynamic_img_size=True)

    small = dict(embed_dims=(16, 16, 16, 16), depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1))
    model = timm.create_model('eva_pvt_v2_b3', attn_layer='one_grid', img_size=(100, 64), **small).eval()
    grids = [[25, 16], [13, 8], [7, 4]]
    assert [stage.blocks[0].attn.feat_size for stage in model.stages[:3]] == grids
    assert model(torch.randn(1, 3, 100, 64)).shape == (1, 1000)
    model.set_input_size(64)
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 1000)
    with pytest.raises(ValueError, match='made for the grid'):
        model(torch.randn(1, 3, 96, 64))


def test_the_grid_is_the_models_to_give(one_grid):
    assert pop_attention_kwargs('one_grid', kwargs := dict(feat_size=(2, 2), factor=3.0)) == dict(factor=3.0)
    assert kwargs == dict(feat_size=(2, 2))
