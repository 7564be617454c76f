"""timm's vision transformers on EVA: the softmax model at the exact limit, near it elsewhere, and else unchanged."""

import copy
import logging
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import timm
import torch
from timm.layers import HybridEmbed, PatchEmbed
from timm.models._manipulate import reinit_non_persistent_buffers
from timm.models.eva import Eva
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import prune

import evavit
from evavit.hub import save_folder
from evavit.layers import EvaAttention
from evavit.layers.converted import ConvertedAttention, GridSize
from evavit.models._converted import _warn_of_window
from evavit.models._grid import _warn_of_cut

TINY = dict(depth=2, embed_dim=64, num_heads=2, num_classes=10)
# 6 × 6 or 7 × 7 tokens each. What is special about it stands beside each.
MODELS = {
    'vit_tiny_patch16_224': {},  # a class token
    'vit_base_patch14_reg4_dinov2': {},  # registers, LayerScale, positions of the grid alone
    'vit_base_patch16_clip_224': {},  # norm_pre
    'vit_base_patch16_siglip_224': {},  # attention pooling, no class token
    'vit_base_patch16_siglip_gap_224': {},
    'deit_tiny_distilled_patch16_224': {},  # two tokens, two heads
    'deit3_small_patch16_224': {},
    'vit_wee_patch16_reg1_gap_256': {},  # fc_norm, another block than the usual, a register without a class token
    'vit_base_patch16_18x2_224': {},  # two attentions a block
    'vit_base_patch32_plus_256': dict(qk_norm=True, scale_attn_norm=True, patch_size=16),
    'vit_base_patch16_rope_reg1_gap_256': {},  # rotary
    'vit_small_patch16_rope_mixed_ape_224': {},  # rotary, of each layer and head its own
    'eva02_tiny_patch14_224': dict(swiglu_mlp=True),  # projections apart, rotary and learned positions
    'eva_giant_patch14_224': {},  # biases of q and v beside a packed projection
    'vit_pe_core_tiny_patch16_384': {},  # rotary, norm_pre, attention pooling
    'vit_small_patch16_dinov3': {},  # rotary halves, registers
    'vit_base_patch16_sapiens2': dict(num_kv_heads=1),  # keys that two heads share, norms of q and k
}
each_model = pytest.mark.parametrize('name', MODELS)


def side_of(name):
    return 98 if 'patch14' in name else 96


def stirred(model):
    """In evaluation mode, its biases, norms and LayerScales not 0, 1 and 1e-5."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def original(name, **kwargs):
    torch.manual_seed(0)
    return stirred(timm.create_model(name, **{**TINY, 'img_size': side_of(name), **MODELS[name], **kwargs}))


def images(model, batch=2):
    return torch.randn(batch, 3, *model.patch_embed.img_size)


def trained(model, x):
    """Names of the parameters that a step moves."""
    model.train()
    model.zero_grad()
    out = model(x)
    sum(part.square().mean() for part in (out if isinstance(out, tuple) else (out,))).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)
    return {name for name, parameter in model.named_parameters() if parameter.grad is not None and parameter.grad.any()}


@each_model
def test_with_a_window_over_the_grid_it_is_the_softmax_model(name):
    model = original(name)
    x = images(model)
    with torch.no_grad():
        expected = model(x)
        for kwargs in (dict(partition_grid=0), dict(), dict(partition_grid=2, rel_pos_bias=True)):
            converted = evavit.convert_vit(model, window_size=8, **kwargs)
            torch.testing.assert_close(converted(x), expected, rtol=1e-5, atol=1e-5)
            cells = [attn.summary_k is not None for attn in converted.modules() if isinstance(attn, EvaAttention)]
            assert cells and all(has == (kwargs.get('partition_grid') != 0) for has in cells)


@each_model
def test_with_small_windows_it_is_near_and_trains(name):
    model = original(name)
    x = images(model)
    before = copy.deepcopy(model.state_dict())
    converted = evavit.convert_vit(model, window_size=3)
    assert isinstance(converted, type(model)) and not any(isinstance(m, ConvertedAttention) for m in model.modules())
    own = converted.state_dict()
    assert all(torch.equal(value, own[key]) for key, value in before.items())
    assert all('.summary_' in key for key in own.keys() - before.keys()) and len(own) > len(before)
    with torch.no_grad():
        expected, found = model(x), converted(x)
        assert 1e-6 < (found - expected).norm() / expected.norm() < 0.3
        assert torch.equal(converted(x), found)
    moved = trained(converted, x)
    assert trained(model, x) <= moved
    assert all(parameter.grad is not None for parameter in converted.parameters() if parameter.requires_grad)
    # Where a class token alone is read, queries of the last block's grid are not.
    assert {key for key in own if '.summary_' in key and not key.startswith('blocks.1.')} <= moved
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())


@each_model
def test_and_back(name):
    model = original(name)
    x = images(model)
    converted = evavit.convert_vit(model, window_size=3)
    reverted = evavit.revert_vit(converted)
    assert type(reverted) is type(model) and str(reverted) == str(model) and not hasattr(reverted, 'conversion')
    assert [name for name, _ in reverted.named_modules()] == [name for name, _ in model.named_modules()]
    assert list(reverted.state_dict()) == list(model.state_dict())
    with torch.no_grad():
        assert torch.equal(reverted(x), model(x))
    assert not torch.equal(converted(x), model(x))
    trained(reverted, x)  # it has its dropouts and modes, and shares nothing with the converted one
    again = evavit.convert_vit(reverted, inplace=True, **converted.conversion)
    assert again is reverted and torch.equal(again.eval()(x), converted(x))


def test_the_start_is_nearer_than_a_summary_as_it_is_initialised():
    """Also behind norms of single queries and keys and rotary embeddings, which the summaries' means count in."""
    for name in ('vit_tiny_patch16_224', 'vit_base_patch32_plus_256', 'vit_small_patch16_rope_mixed_ape_224'):
        model = original(name, img_size=192)
        x = images(model)
        near = evavit.convert_vit(model, window_size=2)
        usual = copy.deepcopy(near)
        for module in usual.modules():
            if isinstance(module, EvaAttention):
                for part in (module.summary_q, module.summary_k):
                    part.proj.reset_parameters()
                    part.norm.reset_parameters()
        with torch.no_grad():
            expected = model.forward_features(x)
            errors = [(other.forward_features(x) - expected).norm().item() for other in (near, usual)]
        assert errors[0] < 0.8 * errors[1], name


def test_cells_of_three_tokens_and_no_more_than_256():
    for side, cells in ((96, 2), (160, 4), (768, 16), (1024, 16)):
        model = timm.create_model('vit_tiny_patch16_224', img_size=side, **TINY)
        assert evavit.convert_vit(model).conversion['partition_grid'] == cells


def test_what_timm_does_with_a_model_it_does_with_a_converted_one():
    model = original('vit_base_patch14_reg4_dinov2', dynamic_img_size=True)
    model.patch_embed.requires_grad_(False)
    model.blocks[0].attn.qkv.requires_grad_(False)
    converted = evavit.convert_vit(model.train(), window_size=9)
    assert all(module.training for module in converted.modules())
    assert not converted.patch_embed.proj.weight.requires_grad and not converted.blocks[0].attn.qkv.weight.requires_grad
    assert converted.blocks[0].attn.proj.weight.requires_grad and converted.pretrained_cfg == model.pretrained_cfg
    model.eval(), converted.eval()
    assert not any(module.training for module in converted.modules())
    x, oblong = torch.randn(2, 3, 98, 98), torch.randn(2, 3, 112, 70)

    def same(call):
        with torch.no_grad():
            for ours, theirs in zip(*(call(m) for m in (converted, model)), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)

    same(lambda m: [m.forward_features(x), m(oblong), m.forward_head(m.forward_features(oblong), pre_logits=True)])
    same(lambda m: m.forward_intermediates(oblong, indices=[0, 1], norm=True, intermediates_only=True))
    same(lambda m: m.forward_intermediates(x, 1, True, stop_early=True, intermediates_only=True)[0])
    same(lambda m: m.get_intermediate_layers(x, 2, reshape=True))
    for pool in ('avg', 'token', 'max', ''):
        for m in (model, converted):
            m.reset_classifier(0, pool)
        same(lambda m: [m(x)])
    for m in (model, converted):
        m.set_input_size((126, 98))
        m.prune_intermediate_layers(1)
    same(lambda m: [m(torch.randn(1, 3, 126, 98, generator=torch.Generator().manual_seed(0)))])
    assert len(converted.blocks) == len(model.blocks)


@pytest.mark.parametrize('name', ['vit_tiny_patch16_224', 'vit_base_patch16_18x2_224', 'vit_small_patch16_dinov3'])
def test_gradient_checkpointing_changes_memory_alone(name):
    converted = evavit.convert_vit(original(name), window_size=3, noise_std=0.0)
    x = images(converted)
    counted = []
    converted.blocks[0].norm1.register_forward_hook(lambda *_: counted.append(1)) if 'x2' not in name else None
    gradients = []
    for enable in (False, True):
        converted.set_grad_checkpointing(enable)
        converted.zero_grad()
        converted.forward_intermediates(x, intermediates_only=True)[-1].mean().backward()
        converted(x).square().mean().backward()
        gradients.append([p.grad.clone() for p in converted.parameters() if p.grad is not None])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert 'x2' in name or len(counted) == 2 + 4


def test_features_only():
    for name in ('vit_tiny_patch16_224', 'eva02_tiny_patch14_224'):
        net = timm.create_model(name, features_only=True, out_indices=[0, 1], img_size=112, **TINY).eval()
        x = torch.randn(1, 3, 112, 112)
        converted = evavit.convert_vit(net, window_size=8)
        assert type(converted) is type(net) and converted.feature_info.channels() == [64, 64]
        with torch.no_grad():
            for ours, theirs in zip(converted(x), net(x), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
            for ours, theirs in zip(evavit.revert_vit(converted)(x), net(x), strict=True):
                assert torch.equal(ours, theirs)


@pytest.mark.parametrize('attention', ['softmax', 'local', 'performer', 'lara', 'scatterbrain', 'nystromformer'])
def test_other_attentions(attention):
    """Class tokens where the attention takes them; norms of q and k, and rotary embeddings, with each."""
    prefix = attention in ('softmax', 'local')
    model = stirred(Eva(
        img_size=64, patch_size=8, embed_dim=64, depth=2, num_heads=2, class_token=prefix, num_reg_tokens=2 * prefix,
        num_classes=5, qk_norm=True, use_rot_pos_emb=True, scale_attn_inner=True, qkv_fused=False,
    )).eval()  # fmt: skip
    converted = evavit.convert_vit(model, attention=attention)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected, found = model(x), converted(x)
        assert found.isfinite().all() and torch.equal(converted(x), found)
        if attention == 'softmax':
            torch.testing.assert_close(found, expected)
        torch.testing.assert_close(evavit.convert_vit(model, attention='softmax')(x), expected)
    assert trained(model, x) <= trained(converted, x)
    if not prefix:
        with pytest.raises(ValueError, match='takes no class or register tokens, and the model has 1'):
            evavit.convert_vit(original('vit_tiny_patch16_224'), attention=attention)


def test_threads_with_images_of_different_sizes():
    converted = evavit.convert_vit(original('vit_base_patch14_reg4_dinov2', dynamic_img_size=True), window_size=3)
    sizes = [(98, 98), (42, 140), (140, 42), (56, 112)]
    inputs = [torch.randn(1, 3, *size) for size in sizes]
    with torch.no_grad():
        expected = [converted(x) for x in inputs]
    wrong = []

    def work(x, reference):
        with torch.no_grad():
            wrong.extend(1 for _ in range(15) if not torch.allclose(converted(x), reference, atol=1e-5))

    threads = [threading.Thread(target=work, args=pair) for pair in zip(inputs, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_dtypes_and_devices():
    model = original('vit_small_patch16_dinov3')
    for dtype in (torch.float64, torch.bfloat16):
        converted = evavit.convert_vit(copy.deepcopy(model).to(dtype), window_size=8)
        assert {parameter.dtype for parameter in converted.parameters()} == {dtype}
        x = images(model).to(dtype)
        with torch.no_grad():
            error = (converted(x) - model.to(dtype)(x)).norm() / model(x).norm()
        assert error < (1e-9 if dtype == torch.float64 else 0.05)
    with torch.device('meta'):
        meta = timm.create_model('vit_tiny_patch16_224', **TINY)
    converted = evavit.convert_vit(meta)
    assert all(parameter.is_meta for parameter in converted.parameters())
    assert converted(torch.empty(1, 3, 224, 224, device='meta')).shape == (1, 10)


def test_hooks_stay():
    model = original('vit_tiny_patch16_224')
    seen = []
    model.blocks[0].attn.register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape)))
    x = images(model)
    for other in (evavit.convert_vit(model), evavit.revert_vit(evavit.convert_vit(model))):
        other(x)
    assert seen == 2 * [(2, 37, 64)]


STEMS = {  # timm's hybrids: a ResNet that rounds up, convolutions and patches after them, ViTamin, no padding
    'vit_small_r26_s32_224': dict(embed_dim=64, num_heads=2),
    'vit_base_resnet26d_224': dict(embed_dim=64, num_heads=2),
    'vit_tiny_r_s16_p8_224': dict(embed_dim=64, num_heads=2),
    'vit_base_mci_224': {},
    'vitamin_small_224': {},
}


def hybrid(name, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **{**dict(depth=1, num_classes=5, img_size=96), **STEMS[name], **kwargs}).eval()


@pytest.mark.parametrize('name', STEMS)
def test_a_convolutional_stem_with_images_of_any_size(name):
    """Its grid is the one that it makes, rounded up or down, also of images as wide as the model's are high."""
    free = hybrid(name, dynamic_img_size=True)
    exact, near = (evavit.convert_vit(free, window_size=size) for size in (9, 2))
    seen = []
    near.patch_embed.register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape[1:3])))
    hook = lambda module, args, kwargs: seen.append((kwargs['attn_mask'].height, kwargs['attn_mask'].width))  # noqa: E731
    near.blocks[0].register_forward_pre_hook(hook, with_kwargs=True)
    with torch.no_grad():
        for size in ((96, 96), (100, 128), (130, 100), (70, 95), (33, 129)):
            x = torch.randn(1, 3, *size)
            torch.testing.assert_close(exact(x), free(x), rtol=1e-5, atol=1e-5)
            near(x)
            assert seen.pop() == seen.pop()
    oblong = {size: hybrid(name, img_size=size) for size in ((64, 128), (128, 64))}
    for model in oblong.values():
        model.load_state_dict(oblong[64, 128].state_dict())
    wide, tall = (evavit.convert_vit(model, window_size=2) for model in oblong.values())
    with torch.no_grad():
        for size in oblong:
            x = torch.randn(1, 3, *size)
            torch.testing.assert_close(wide.forward_features(x), tall.forward_features(x))
    assert not hasattr(evavit.revert_vit(wide), 'stem_rounding')


def test_a_stem_without_positions_takes_images_of_any_size():
    vit = hybrid('vitamin_small_224', pos_embed='none')
    loose = original('vit_tiny_patch16_224', embed_layer=partial(PatchEmbed, strict_img_size=False), pos_embed='none')
    for model in (vit, loose):
        converted = evavit.convert_vit(model, window_size=9)
        with torch.no_grad():
            for size in ((64, 144), (144, 64), (48, 48)):
                x = torch.randn(1, 3, *size)
                torch.testing.assert_close(converted(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('dynamic', [False, True])
def test_a_convolutional_stem_compiled_exported_copied_and_in_threads(dynamic):
    converted = evavit.convert_vit(hybrid('vit_tiny_r_s16_p8_224', dynamic_img_size=dynamic), window_size=2)
    sizes = [(65, 129), (129, 65), (96, 96)] if dynamic else [(96, 96)]
    inputs = [torch.randn(1, 3, *size) for size in sizes]
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(converted), fullgraph=True, backend='aot_eager')
    with torch.no_grad(), ThreadPoolExecutor(3) as pool:
        expected = [converted(x) for x in inputs]
        for x, wanted in zip(inputs, expected, strict=True):
            exported = torch.export.export(converted, (x,)).module()
            for call in (compiled, exported, pickle.loads(pickle.dumps(converted))):
                torch.testing.assert_close(call(x), wanted)
        for found, wanted in zip(pool.map(torch.no_grad()(converted), 5 * inputs), 5 * expected, strict=True):
            torch.testing.assert_close(found, wanted)


class FixedStem(nn.Module):
    """A stem that makes 6 × 6 features of any image."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 64, 16, 16)

    def forward(self, x):
        return nn.functional.adaptive_avg_pool2d(self.conv(x), 6)


def test_a_grid_that_cannot_be_known_is_one_line():
    vit = original('vit_tiny_patch16_224', embed_layer=partial(HybridEmbed, backbone=FixedStem()), patch_size=1)
    converted = evavit.convert_vit(vit, window_size=9)
    x = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        torch.testing.assert_close(converted(x), vit(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r'images of 192 × 48: HybridEmbed .* model\.set_input_size') as caught:
        converted(torch.randn(2, 3, 192, 48))
    assert '\n' not in str(caught.value)
    converted.set_input_size((192, 48))
    assert converted(torch.randn(2, 3, 192, 48)).shape == (2, 10)


def test_blocks_that_were_wrapped_since():
    model = original('vit_tiny_patch16_224')
    x = images(model)

    def in_place(block):
        block.compile(backend='eager')
        return block

    for wrap in (partial(torch.compile, backend='eager'), checkpoint_wrapper, in_place):
        converted = evavit.convert_vit(model, window_size=2)
        for number in range(2):
            converted.blocks[number] = wrap(converted.blocks[number])
        with torch.no_grad():
            converted(x)
            torch.testing.assert_close(evavit.revert_vit(converted)(x), model(x))
            torch.testing.assert_close(evavit.revert_vit(converted, inplace=True)(x), model(x))
        if wrap is not in_place:
            with pytest.raises(ValueError, match=r'its blocks are wrapped \(.*\); convert the model first'):
                evavit.convert_vit(converted)
    converted = evavit.convert_vit(model)
    converted.blocks[1] = nn.Sequential(converted.blocks[1])
    with pytest.raises(ValueError, match='is in a Sequential, which this package does not know') as caught:
        evavit.revert_vit(converted, inplace=True)
    assert '\n' not in str(caught.value) and isinstance(converted.blocks[0].attn, ConvertedAttention)


@pytest.mark.parametrize('name', ['vit_tiny_patch16_224', 'vit_small_patch16_dinov3'])
def test_weights_that_are_drawn_anew_start_near_softmax(name):
    converted = evavit.convert_vit(original(name), window_size=2, rel_pos_bias=True)
    stirred(converted)
    converted.init_weights()
    again = evavit.convert_vit(evavit.revert_vit(converted), **converted.conversion).state_dict()
    for key, value in converted.state_dict().items():
        assert torch.equal(value, again[key]), key


def test_heads_of_width_one():
    model = original('vit_tiny_patch16_224', embed_dim=8, num_heads=8)
    converted = evavit.convert_vit(model, window_size=2)
    x = images(model)
    with torch.no_grad():
        expected = model.forward_features(x)
        assert (converted.forward_features(x) - expected).norm() / expected.norm() < 0.3
    assert trained(model, x) <= trained(converted, x)


REFUSED = {
    'beit_base_patch16_224': 'relative position bias between all tokens',
    'vit_relpos_base_patch16_224': 'relative position bias between all tokens',
    'samvit_base_patch16': 'windows and relative position biases of its own',
    'naflexvit_base_patch16_gap': 'which form no grid',
    'swin_tiny_patch4_window7_224': "none of timm's plain vision transformers",
    'resnet18': "none of timm's plain vision transformers",
    'eva_deit_tiny': 'choose its attention by name',
    'vit_dwee_patch16_reg1_gap_256': 'difference of two softmaxes',
    'vit_dpwee_patch16_reg1_gap_256': 'have a forward of their own',
}


def test_a_name_is_no_model():
    with pytest.raises(ValueError, match=r"'resnet18' is a name; give the model, timm\.create_model\('resnet18'\)"):
        evavit.convert_vit('resnet18')


@pytest.mark.parametrize('name', REFUSED)
def test_models_that_cannot_be_converted(name):
    with torch.device('meta'):
        model = timm.create_model(name)
    with pytest.raises(ValueError, match=REFUSED[name]) as caught:
        evavit.convert_vit(model)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
    'kwargs, message',
    [
        (dict(attention='linformer'), 'made for one size of grid'),
        (dict(attention='long_short'), 'projections of its own'),
        (dict(attention='flash'), 'unknown attention'),
        (dict(attention='softmax', window_size=9), 'SoftmaxAttention has no option window_size'),
        (dict(attention='local', count_cells='one'), 'LocalAttention has no option count_cells'),
        (
            dict(attention='performer'),
            'PerformerAttention takes no class .* the model has 1; choose eva, softmax, local$',
        ),
        (dict(cells=3), 'EvaAttention has no option cells'),
        (dict(windw_size=3), r'has no option windw_size \(did you mean window_size\?\); leave it out'),
        (dict(inplace='False'), "inplace must be True or False, got 'False'"),
        (dict(overlap=1), 'overlap must be True or False, got 1'),
        (dict(rel_pos_bias='no'), "rel_pos_bias must be True or False, got 'no'"),
        (dict(window_size=-1), 'window_size'),
        (dict(window_size=0, partition_grid=0), 'window_size'),
        (dict(partition_grid=-1), 'partition_grid'),
        (dict(count_cells='some'), 'count_cells must be one of'),
        (dict(summary='linear'), 'num_prefix_tokens 1'),
    ],
)
def test_options_that_do_not_fit(kwargs, message):
    model = original('vit_tiny_patch16_224')
    with pytest.raises(ValueError, match=message) as caught:
        evavit.convert_vit(model, **{'inplace': True, **kwargs})
    assert '\n' not in str(caught.value)
    model(images(model))  # nothing was changed


def test_training_passes_are_alike_unless_noise_is_asked_for():
    model = original('vit_tiny_patch16_224')
    x = images(model)
    for kwargs, alike in (dict(), True), (dict(noise_std=1.0), False):
        converted = evavit.convert_vit(model, window_size=2, **kwargs).train()
        assert converted.conversion['noise_std'] == converted.blocks[0].attn.noise_std == kwargs.get('noise_std', 0)
        assert torch.equal(converted(x), converted(x)) == alike


def test_misuse():
    model = original('vit_tiny_patch16_224')
    x = images(model)
    converted = evavit.convert_vit(model)
    for call in (converted, converted.forward_features, converted.forward_intermediates):
        for mask in (dict(attn_mask=torch.ones(37, 37, dtype=torch.bool)), dict(is_causal=True)):
            with pytest.raises(ValueError, match='takes no masks'):
                call(x, **mask)
    with pytest.raises(ValueError, match='converted already'):
        evavit.convert_vit(converted)
    with pytest.raises(ValueError, match='VisionTransformer is not a converted model'):
        evavit.revert_vit(model)
    with pytest.raises(ValueError, match='needs the size of its grid'):
        converted.blocks[0].attn(torch.randn(1, 37, 64))
    assert converted.blocks[0].attn(torch.randn(1, 37, 64), attn_mask=GridSize(6, 6)).shape == (1, 37, 64)
    with pytest.raises(ValueError, match=r'patch_drop_rate 0\.5'):
        evavit.convert_vit(original('vit_tiny_patch16_224', patch_drop_rate=0.5))
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    with pytest.raises(ValueError, match=r'is quantised, .*; convert first, then quantise'):
        evavit.convert_vit(quantised)
    with pytest.raises(ValueError, match='Sequential is none of'):
        evavit.convert_vit(nn.Sequential(model))


def _shares(model):
    model.blocks[1] = model.blocks[0]


def _shares_attention(model):
    model.blocks[1].attn = model.blocks[0].attn


class Wrapped(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def _wraps(model):
    model.blocks[1].attn.qkv = Wrapped(model.blocks[1].attn.qkv)


def _quantises(model):
    """As torchao does it: a parameter of a kind of its own."""
    kind = type('Int8Tensor', (torch.Tensor,), {'__module__': 'torchao.quantization'})
    weight = model.blocks[0].attn.qkv.weight.data.as_subclass(kind)
    model.blocks[0].attn.qkv.weight = nn.Parameter(weight)


def _scales(model):
    model.blocks[0].attn.scale = 0.5


@pytest.mark.filterwarnings('ignore::FutureWarning')
@pytest.mark.parametrize(
    'change, message',
    [
        (_wraps, 'its qkv is in a Wrapped, which has no weight; convert first, then wrap it'),
        (_quantises, 'its attention is quantised, and has no weights to start from; convert first, then quantise'),
        (_scales, r'its attention has a scale of its own, 0\.5, where timm has'),
        (_shares, 'block 1 has the attention of an earlier one'),
        (_shares_attention, 'block 1 has the attention of an earlier one'),
        (lambda m: prune.l1_unstructured(m.blocks[0].attn.qkv, 'weight', 0.5), r'blocks\.0\.attn\.qkv computes its'),
        (lambda m: prune.l1_unstructured(m.head, 'bias', 0.5), 'head computes its weights anew .* with prune.remove'),
        (lambda m: nn.utils.weight_norm(m.blocks[0].mlp.fc1), 'mlp.fc1 computes its weights anew'),
        (lambda m: nn.utils.parametrizations.weight_norm(m.blocks[0].attn.qkv), 'with parametrize.remove_param'),
    ],
)
def test_other_weights_and_scales_are_one_line(change, message):
    model = original('vit_tiny_patch16_224')
    change(model)
    for inplace in (False, True):
        with pytest.raises(ValueError, match=message) as error:
            evavit.convert_vit(model, inplace=inplace)
        assert '\n' not in str(error.value)


def test_a_converted_model_that_was_pruned_is_reverted_in_place_alone():
    model = evavit.convert_vit(original('vit_tiny_patch16_224'), window_size=2)
    prune.l1_unstructured(model.blocks[0].attn.qkv, 'weight', 0.5)
    with pytest.raises(ValueError, match=r'qkv computes its weights anew .* prune\.remove .*; or pass inplace=True'):
        evavit.revert_vit(model)
    x = images(model)
    weight = model.blocks[0].attn.qkv.weight
    reverted = evavit.revert_vit(model, inplace=True)
    assert reverted(x).isfinite().all() and torch.equal(reverted.blocks[0].attn.qkv.weight, weight)


def test_a_default_dtype_of_float64():
    """Of weights in float32 and in float64."""
    models = [original('vit_tiny_patch16_224'), original('vit_tiny_patch16_224').double()]
    torch.set_default_dtype(torch.float64)
    try:
        for model in models:
            converted = evavit.convert_vit(model, window_size=2)
            assert {p.dtype for p in converted.parameters()} == {model.pos_embed.dtype}
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize('name', ['eva02_tiny_patch14_224', 'vit_small_patch16_dinov3_qkvb', 'vit_tiny_patch16_224'])
def test_all_of_a_converted_model_is_initialised(name):
    """What timm's attention holds itself, and buffers that no state dict has, as after `to_empty`."""
    kwargs = dict(depth=1, img_size=56 if 'eva02' in name else 64, num_classes=3)
    with torch.device('meta'):
        empty = evavit.convert_vit(timm.create_model(name, **kwargs), window_size=2)
    empty = empty.to_empty(device='cpu')
    with torch.no_grad():
        for value in (*empty.parameters(), *empty.buffers()):
            value.fill_(77)
    loaded, model = copy.deepcopy(empty), evavit.convert_vit(timm.create_model(name, **kwargs), window_size=2).eval()
    empty.init_weights()
    for key, value in (*empty.named_parameters(), *empty.named_buffers()):
        assert not (value == 77).any(), key
    loaded.load_state_dict(model.state_dict())
    reinit_non_persistent_buffers(loaded)
    x = images(model)
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(x), model(x))


def test_numbers_of_numpy_and_tied_weights(tmp_path):
    """They are what Python's are, on the disk too."""
    model = original('vit_tiny_patch16_224')
    model.blocks[1].attn.qkv.weight = model.blocks[0].attn.qkv.weight
    options = dict(window_size=np.int64(3), noise_std=np.float32(0.5), rel_pos_bias=np.bool_(True))
    converted = evavit.convert_vit(model, **options).eval()
    assert type(converted.conversion['window_size']) is int
    folder = save_folder(converted, tmp_path / 'mine', data='x', licence='mit')
    x = images(model)
    with torch.no_grad():
        assert torch.equal(evavit.load_converted(folder).eval()(x), converted(x))


def test_tables_and_one_dimensional_parameters_do_not_decay():
    converted = evavit.convert_vit(original('vit_tiny_patch16_224'), rel_pos_bias=True)
    tables = {f'blocks.{i}.attn.rel_pos.relative_position_bias_table' for i in range(2)}
    assert converted.no_weight_decay() == {'pos_embed', 'cls_token', 'reg_token', 'dist_token'} | tables


def test_images_that_patches_do_not_divide_are_told_of(caplog):
    """timm leaves the last rows and columns out without a word."""
    _warn_of_cut.cache_clear()
    vit = timm.create_model('vit_tiny_patch16_224', img_size=(230, 224), depth=1)
    with caplog.at_level(logging.WARNING, 'evavit'):
        evavit.convert_vit(timm.create_model('vit_tiny_patch16_224', depth=1))
        timm.create_model('vit_tiny_patch16_224', img_size=230, dynamic_img_pad=True, depth=1)
        assert not caplog.records
        for tell, kind, sizes in (
            (lambda: evavit.convert_vit(vit), 'VisionTransformer', '224 × 224 pixels of images of 230 × 224'),
            (lambda: timm.create_model('eva_deit_tiny', img_size=50, depth=1), 'GridVisionTransformer', '48 × 48'),
        ):
            caplog.clear()
            tell()
            tell()
            (record,) = caplog.records
            assert f'{kind} sees {sizes}' in record.message and 'choose a multiple' in record.message
        caplog.clear()
        _warn_of_cut.cache_clear()
        evavit.attention_maps(vit, torch.zeros(1, 3, 230, 224), layer=0, query='class')
        assert 'VisionTransformer sees 224 × 224' in caplog.text


@pytest.mark.parametrize(
    'img_size, options, told',
    [
        (112, {}, True),
        (112, dict(partition_grid=0), True),
        (112, dict(attention='local'), True),
        (112, dict(attention='softmax'), False),
        (112, dict(count_cells='one'), False),
        (112, dict(rel_pos_bias=True), False),
        (112, dict(window_size=6), False),
        (128, {}, False),
    ],
)
def test_a_window_over_all_tokens_is_told_of(caplog, img_size, options, told):
    vit = timm.create_model('vit_tiny_patch16_224', img_size=img_size, depth=1, num_classes=3)
    _warn_of_window.cache_clear()
    for _ in range(2):  # once for each size
        model = evavit.convert_vit(vit, **options).eval()
    assert [record.getMessage()[:59] for record in caplog.records] == told * [
        'warning: one window of 7 × 7 covers all 7 × 7 tokens, so th'
    ]
    caplog.clear()
    _warn_of_window.cache_clear()
    free = timm.create_model('vit_tiny_patch16_224', img_size=img_size, depth=1, dynamic_img_size=True)
    evavit.convert_vit(free, **options)  # of images of any size, which may be larger
    assert not caplog.records
    images = torch.randn(2, 3, img_size, img_size)
    same = torch.allclose(model(images), vit.eval()(images), atol=1e-5)
    assert same or not told
