"""The contract of timm's models where timm's own suite leaves names that begin with `eva_` out, and beyond it.

`make contract` runs timm's suite itself. Small versions of the models serve where size does not matter.
"""

import copy

import pytest
import timm
import torch
from timm.models import get_model_args, get_model_input_config
from timm.optim import create_optimizer_v2
from torch import nn

import evavit  # noqa: F401
from evavit.layers import EvaAttention
from evavit.models import eva_deit, eva_pvt_v2, families
from evavit.models.eva_deit import PatchProjection

SMALL = {
    'eva_deit_tiny': dict(embed_dim=48, depth=3, num_heads=3),
    'eva_deit_small': dict(embed_dim=48, depth=3, num_heads=6),
    'eva_deit_tiny_784': dict(embed_dim=48, depth=3, num_heads=3),
    'eva_vit_base_patch14_reg4': dict(embed_dim=48, depth=3, num_heads=3),
    'eva_pvt_v2_b3': dict(embed_dims=(16, 32, 48, 64), depths=(1, 1, 2, 1), num_heads=(1, 2, 3, 4)),
}
PLAIN = [name for name in SMALL if name in families()['eva_deit'].models]
DEIT = [name for name in PLAIN if 'deit' in name]
each_model = pytest.mark.parametrize('name', SMALL)


def create(name, **kwargs):
    return timm.create_model(name, **{**SMALL[name], **kwargs}).eval()


def run(model, size=(224, 224), batch=1):
    with torch.no_grad():
        return model(torch.randn(batch, 3, *size))


@pytest.mark.parametrize(
    'name, parameters',
    [
        ('eva_deit_tiny', '5.8'),
        ('eva_deit_small', '22.2'),
        ('eva_deit_tiny_784', '5.8'),
        ('eva_deit_base', '86.7'),
        ('eva_deit3_large', '304.6'),
        ('eva_vit_base_patch14_reg4', '86.6'),
        ('eva_vit_large_patch14_reg4', '304.5'),
        ('eva_pvt_v2_b3', '36.1'),
    ],
)
def test_published_parameters(name, parameters):
    """The multiply-adds are held against the paper by docs/make/zoo.py, which tests/docs runs."""
    model = timm.create_model(name, device='meta')
    assert f'{sum(p.numel() for p in model.parameters()) / 1e6:.1f}' == parameters


def test_registered():
    assert set(SMALL) <= set(timm.list_models('eva_*'))
    assert not set(SMALL) & {name.partition('.')[0] for name in timm.list_models(pretrained=True)}


def test_heads_and_kinds_of_attention():
    model = timm.create_model('eva_pvt_v2_b3', device='meta')
    kinds = [(type(stage.blocks[0].attn).__name__, stage.blocks[0].attn.num_heads) for stage in model.stages]
    assert kinds == [('EvaAttention', 2), ('EvaAttention', 4), ('EvaAttention', 10), ('SoftmaxAttention', 16)]
    for name in DEIT:
        model = timm.create_model(name, device='meta')
        assert model.head_hidden_size // model.blocks[0].attn.num_heads == 64
        assert model.pos_embed.shape[1] == (784 if name.endswith('784') else 196)
        assert not model.has_class_token and isinstance(model.norm, torch.nn.LayerNorm)


@each_model
def test_attention_options_reach_every_layer(name):
    options = dict(window_size=5, partition_grid=3, proposal_scale=0.5, noise_std=0.25, rel_pos_bias=False)
    model = create(name, attn_drop_rate=0.1, proj_drop_rate=0.2, qkv_bias=False, **options)
    layers = [module for module in model.modules() if isinstance(module, EvaAttention)]
    assert layers
    for layer in layers:
        assert {key: getattr(layer, key) for key in options if key != 'rel_pos_bias'} == {
            key: value for key, value in options.items() if key != 'rel_pos_bias'
        }
        assert layer.rel_pos is None and layer.qkv.bias is None
        assert (layer.attn_drop.p, layer.proj_drop.p) == (0.1, 0.2)


@each_model
def test_default_cfg(name):
    model = create(name)
    cfg = model.pretrained_cfg
    assert cfg['input_size'] == (3, 224, 224) and cfg['crop_pct'] == 0.875 and cfg['interpolation'] == 'bicubic'
    names = model.state_dict()
    assert f'{cfg["classifier"]}.weight' in names and f'{cfg["first_conv"]}.weight' in names
    assert model.get_classifier() is model.head
    features = model.forward_features(torch.randn(1, 3, 224, 224))
    pooled = model.forward_head(features, pre_logits=True)
    if name in PLAIN:
        assert features.shape == (1, model.num_prefix_tokens + model.patch_embed.num_patches, model.num_features)
    else:
        assert features.shape == (1, model.num_features, *cfg['pool_size'])
    assert pooled.shape == (1, model.head_hidden_size)

    x = torch.randn(2, 3, 224, 224)
    logits = model(x)
    model.reset_classifier(0)
    assert model.num_classes == 0 and model(x).shape == (2, model.head_hidden_size)
    model.reset_classifier(0, '')
    assert model(x).shape == (2, *features.shape[1:])
    model.reset_classifier(7, 'avg')
    assert model(x).shape == (2, 7) != logits.shape
    assert run(create(name, num_classes=0)).shape == (1, model.num_features)
    assert run(create(name, num_classes=0, global_pool='')).shape == features.shape


@each_model
@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_reset_classifier_keeps_dtype_device_and_mode(name, dtype):
    model = create(name).to('meta', dtype).eval()
    model.reset_classifier(3)
    head = model.get_classifier()
    assert head.weight.is_meta and head.weight.dtype == dtype and not head.training


@each_model
def test_dtype_change_after_a_forward(name):
    model = create(name)
    run(model)
    model.to(torch.bfloat16)
    with torch.no_grad():
        assert model(torch.randn(1, 3, 224, 224).bfloat16()).dtype == torch.bfloat16


@each_model
def test_created_on_meta_and_initialised_again_from_empty(name):
    model = create(name, device='meta', dtype=torch.float64)
    assert all(t.is_meta for t in [*model.parameters(), *model.buffers()])
    assert all(p.dtype == torch.float64 for p in model.parameters())
    model = model.to_empty(device='cpu')
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.fill_(float('nan') if tensor.is_floating_point() else -(10**9))
    model.init_weights()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    fresh = create(name, dtype=torch.float64)
    for (key, value), (other, expected) in zip(model.named_buffers(), fresh.named_buffers(), strict=True):
        assert key == other and torch.equal(value, expected)
    for (key, value), (_, expected) in zip(model.named_parameters(), fresh.named_parameters(), strict=True):
        assert abs(value.std() - expected.std()) < 0.01 + 0.2 * expected.std(), key
    assert model(torch.randn(1, 3, 224, 224, dtype=torch.float64)).isfinite().all()
    assert not any('index' in key for key in model.state_dict())  # buffers are rebuilt, not stored


@each_model
def test_unknown_keyword(name):
    with pytest.raises(TypeError, match='not_a_model_arg'):
        create(name, not_a_model_arg=1)


@pytest.mark.parametrize(
    'name, kwargs',
    [
        *(
            (name, kwargs)
            for name in DEIT[:1]
            for kwargs in (
                dict(patch_drop_rate=0.1),
                dict(attn_layer='nothing'),
                dict(num_heads=5),
                dict(window_size=0, partition_grid=0),
            )
        ),
        *(
            ('eva_pvt_v2_b3', kwargs)
            for kwargs in (
                dict(dynamic_img_size=False),
                dict(sr_ratios=(8, 4, 2, 1)),
                dict(linear=True),
                dict(num_heads=(5, 4, 4, 4)),
                dict(attn_layer='nothing'),
            )
        ),
    ],
)
def test_arguments_that_cannot_be_honoured_are_refused(name, kwargs):
    with pytest.raises(ValueError, match=r'leave it out|leave them out|leave the argument out|choose|set one of them'):
        create(name, **kwargs)


@pytest.mark.parametrize('kwargs', [dict(class_token=True), dict(reg_tokens=4)])
def test_tokens_that_an_attention_does_not_take_are_refused(kwargs):
    with pytest.raises(ValueError, match='PerformerAttention is made for a grid alone and takes no class or register'):
        timm.create_model('performer_deit_tiny', depth=1, **kwargs)


@each_model
def test_no_weight_decay_and_groups(name):
    model = create(name)
    exempt = model.no_weight_decay()
    tables = [key for key, _ in model.named_parameters() if key.endswith('relative_position_bias_table')]
    assert tables and set(tables) <= exempt
    assert ('pos_embed' in exempt) == (name in PLAIN)
    optimizer = create_optimizer_v2(model, opt='adamw', weight_decay=0.05)
    decayed = {id(p) for group in optimizer.param_groups if group['weight_decay'] for p in group['params']}
    for key, parameter in model.named_parameters():
        assert (id(parameter) in decayed) == (parameter.ndim > 1 and key not in exempt), key
    scales = {
        group['lr_scale'] for group in create_optimizer_v2(model, opt='adamw', lr=1e-3, layer_decay=0.5).param_groups
    }
    assert len(scales) > 2


@each_model
@pytest.mark.parametrize('kwargs', [dict(in_chans=1), dict(drop_rate=0.2, drop_path_rate=0.3), dict(num_classes=3)])
def test_common_arguments(name, kwargs):
    model = create(name, **kwargs)
    assert model(torch.randn(1, kwargs.get('in_chans', 3), 224, 224)).shape == (1, kwargs.get('num_classes', 1000))
    if 'drop_path_rate' in kwargs:
        rates = [m.drop_prob for m in model.modules() if type(m).__name__ == 'DropPath']
        assert max(rates) == pytest.approx(0.3) and model.head_drop.p == 0.2


@each_model
@pytest.mark.parametrize('size', [(224, 224), (256, 256), (384, 384), (97, 161)])
def test_any_image_size(name, size):
    assert run(create(name, **(dict(dynamic_img_size=True) if name in PLAIN else {})), size).isfinite().all()


def test_detection_size():
    features = run(create('eva_pvt_v2_b3', features_only=True), (800, 1333))
    assert [f.shape[-2:] for f in features] == [(200, 334), (100, 167), (50, 84), (25, 42)]


@each_model
def test_set_input_size(name):
    model = create(name)
    model.set_input_size(img_size=(96, 160))
    assert get_model_input_config(model)['input_size'] == (3, 96, 160)
    assert run(model, (96, 160)).shape == (1, 1000)
    again = timm.create_model(name, **get_model_args(model))
    again.load_state_dict(model.state_dict())
    if name in PLAIN:
        patch = model.patch_embed.patch_size[0]
        assert model.patch_embed.grid_size == (96 // patch, 160 // patch)
        with pytest.raises(AssertionError):
            run(model, (224, 224))


def test_set_patch_size():
    model = create('eva_deit_tiny')
    model.set_input_size(patch_size=(8, 8))
    assert model.pos_embed.shape[1] == 784 and run(model).shape == (1, 1000)


@pytest.mark.parametrize('size', [(32, 48), (35, 50)], ids=str)
def test_patch_projection_is_the_convolution(size):
    torch.manual_seed(0)
    proj = PatchProjection(3, 8, kernel_size=(8, 16), stride=(8, 16), dtype=torch.float64)
    conv = nn.Conv2d(3, 8, (8, 16), (8, 16), dtype=torch.float64)
    conv.load_state_dict(proj.state_dict())
    x, y = (
        torch.randn(2, 3, *size, dtype=torch.float64, generator=torch.manual_seed(1)).requires_grad_() for _ in range(2)
    )
    a, b = proj(x), conv(y)
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(a)
    for left, right in zip(
        torch.autograd.grad(a, [x, *proj.parameters()], grad),
        torch.autograd.grad(b, [y, *conv.parameters()], grad),
        strict=True,
    ):
        torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)


def test_images_of_other_channels():
    model = create('eva_deit_tiny', img_size=32)
    for other in (model, torch.jit.script(model)):
        with pytest.raises((AssertionError, torch.jit.Error), match=r'channels \(1\) do not match the model \(3\)'):
            other(torch.randn(2, 1, 32, 32))


class Adapter(nn.Module):
    """A Linear with a low-rank matrix beside it, which starts at zero."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear
        self.down, self.up = (
            nn.Linear(*sizes, bias=False) for sizes in ((linear.in_features, 2), (2, linear.out_features))
        )
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.linear(x) + self.up(self.down(x))


@pytest.mark.filterwarnings('ignore:.*deprecated')  # torch.ao's way to quantize, which is still the usual one
@pytest.mark.parametrize('name', ['eva_deit_tiny', 'eva_pvt_v2_b3'])
def test_adapters_and_quantized_layers_in_the_place_of_linears(name):
    torch.manual_seed(0)
    model, x = create(name, img_size=64, num_classes=3), torch.randn(2, 3, 64, 64)
    expected = model(x)
    small = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    torch.testing.assert_close(small(x), expected, rtol=0.1, atol=0.1 * expected.abs().max().item())
    assert 'DynamicQuantizedLinear' in repr(small)
    for module in list(model.modules()):
        for child in ('qkv', 'proj', 'fc1', 'fc2'):
            if type(getattr(module, child, None)) is nn.Linear:
                setattr(module, child, Adapter(getattr(module, child)))
    torch.testing.assert_close(model(x), expected)
    assert repr(model).count('Adapter') >= 4


def test_patch_projection_stays():
    model = create('eva_deit_tiny')
    before = set(model.state_dict())
    model.set_input_size(patch_size=(8, 8))
    assert isinstance(model.patch_embed.proj, PatchProjection) and set(model.state_dict()) == before
    assert model.patch_embed.proj.weight.requires_grad
    assert model._embed(torch.randn(1, 3, 224, 224))[0].is_contiguous()


@each_model
def test_features_only(name):
    model = create(name, features_only=True)
    x = torch.randn(1, 3, 224, 224)
    shapes = [tuple(f.shape[1:]) for f in model(x)]
    if name in PLAIN:
        side = 224 // model.model.patch_embed.patch_size[0]
        assert set(shapes) == {(48, side, side)}
    else:
        assert model.feature_info.reduction() == [4, 8, 16, 32]
        assert shapes == [(16, 56, 56), (32, 28, 28), (48, 14, 14), (64, 7, 7)]
    for f, channels, reduction in zip(
        model(x), model.feature_info.channels(), model.feature_info.reduction(), strict=True
    ):
        assert f.shape[1] == channels and f.shape[-1] == 224 // reduction


@each_model
def test_forward_intermediates(name):
    model, x = create(name), torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        final, maps = model.forward_intermediates(x)
        torch.testing.assert_close(final, model.forward_features(x))
        last = model.forward_intermediates(x, indices=1, intermediates_only=True)
        torch.testing.assert_close(last[0], maps[-1])
        first = model.forward_intermediates(x, indices=[0], stop_early=True, intermediates_only=True)
        torch.testing.assert_close(first[0], maps[0])
        if name in PLAIN:
            tokens = model.forward_intermediates(x, norm=True, output_fmt='NLC', intermediates_only=True)
            P = model.num_prefix_tokens
            torch.testing.assert_close(tokens[-1], final[:, P:])
            pairs = model.forward_intermediates(x, norm=True, return_prefix_tokens=True, intermediates_only=True)
            if P:
                torch.testing.assert_close(pairs[-1][1], final[:, :P])
                named = model.forward_intermediates(x, norm=True, return_prefix_tokens=True, output_dict=True)
                torch.testing.assert_close(named['image_intermediates_prefix'][-1], final[:, :P])
            torch.testing.assert_close(model.forward_intermediates(x, output_dict=True)['image_features'], final)
            torch.testing.assert_close(model.get_intermediate_layers(x, n=1)[0], maps[-1].flatten(2).transpose(1, 2))


@each_model
def test_prune_intermediate_layers(name):
    model, x = create(name), torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        maps = model.forward_intermediates(x, intermediates_only=True)
        pruned = copy.deepcopy(model)
        assert pruned.prune_intermediate_layers([0], prune_norm=True) == [0]
        torch.testing.assert_close(pruned.forward_intermediates(x, intermediates_only=True)[0], maps[0])
    assert sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in model.parameters())


@each_model
def test_gradient_checkpointing_changes_nothing(name):
    x, grads = torch.randn(2, 3, 224, 224), []
    model = create(name).train()
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(3)  # the noise of the two runs
        model(x).square().mean().backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(g is not None for g in grads[0])
    torch.testing.assert_close(grads[0], grads[1])


@each_model
def test_headless_checkpoint_reload(name):
    model, again = create(name, num_classes=0), create(name, num_classes=0)
    filter_fn = (eva_deit if name in PLAIN else eva_pvt_v2).checkpoint_filter_fn
    again.load_state_dict(filter_fn(dict(sorted(model.state_dict().items())), again))
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(model(x), again(x))


@each_model
def test_own_checkpoint_at_another_size(name, tmp_path):
    from safetensors.torch import save_file

    model = create(name, num_classes=5)
    save_file(model.state_dict(), tmp_path / 'model.safetensors')
    kwargs = dict(img_size=256, patch_size=32, dynamic_img_size=True) if name in PLAIN else {}
    other = create(
        name,
        num_classes=5,
        window_size=5,
        pretrained=True,
        **kwargs,
        pretrained_cfg_overlay=dict(file=str(tmp_path / 'model.safetensors'), num_classes=5),
    )
    assert run(other, (256, 256)).isfinite().all()
    torch.testing.assert_close(other.head.weight, model.head.weight)
    table = next(value for key, value in other.state_dict().items() if key.endswith('bias_table'))
    assert table.shape[0] == 81


@pytest.mark.parametrize('pool', ['avg', ''])
def test_saved_for_the_hub_and_back(pool, tmp_path):
    model = create('eva_deit_tiny', num_classes=5, window_size=5, img_size=96, global_pool=pool)
    timm.models.save_for_hf(model, tmp_path)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert again.blocks[0].attn.window_size == 5
    x = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        assert torch.equal(model(x), again(x))
