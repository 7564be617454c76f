"""Attention maps of whole models: their rows are the attention, whoever made the model; mistakes are one line."""

import logging
import math
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.utils import AttentionExtract
from torch import nn

import evavit
from evavit.layers import ATTENTIONS, GridAttention
from evavit.layers.attention import _tell_of_maps
from evavit.maps import AttentionMap, attention_maps, attention_rollout, overlay_attention

SMALL = dict(img_size=40, patch_size=4, embed_dim=32, depth=3, num_heads=2, num_classes=5)
WINDOWS = dict(window_size=3, partition_grid=4)


def randomise(model):
    """Weights of a size at which attention is far from even."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if 'norm' not in name:
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


def make(name, **kwargs):
    return randomise(timm.create_model(name, **{**SMALL, **kwargs}))


def images(height=40, width=40, batch=2):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def outputs_of_attention(model, x):
    """{name: output `(B, h, T, d)` of the attention before norm and gate}, and {name: its values}."""
    outputs, values = {}, {}

    def watch(name, layer):
        packed, apart = layer.attend, layer.attend_apart

        def attend(qkv, feat_size):
            values[name], outputs[name] = qkv[2], packed(qkv, feat_size)
            return outputs[name]

        def attend_apart(q, k, v, feat_size):
            values[name], outputs[name] = v, apart(q, k, v, feat_size)
            return outputs[name]

        layer.attend, layer.attend_apart = attend, attend_apart

    layers = {name: m for name, m in model.named_modules() if isinstance(m, GridAttention)}
    for name, layer in layers.items():
        watch(name, layer)
    with torch.no_grad():
        model(x)
    for layer in layers.values():
        del layer.attend, layer.attend_apart
    return outputs, values


def assert_maps_are_the_attention(model, x, tolerance=1e-5):
    outputs, values = outputs_of_attention(model, x)
    maps = attention_maps(model, x)
    assert [one.name for one in maps] == list(outputs) and maps
    for one in maps:
        T = one.num_prefix_tokens + one.feat_size[0] * one.feat_size[1]
        assert one.rows.shape == (len(x), one.rows.shape[1], T, T) and not one.rows.requires_grad
        assert one.grid.shape == (*one.rows.shape[:3], *one.feat_size)
        torch.testing.assert_close(one.rows.sum(-1), torch.ones(one.rows.shape[:3]), rtol=0, atol=tolerance)
        torch.testing.assert_close(one.rows @ values[one.name], outputs[one.name], rtol=tolerance, atol=tolerance)
    return maps


@pytest.mark.parametrize('count_cells', ['one', 'all', 'outside'])
@pytest.mark.parametrize('prefix', [{}, dict(class_token=True, reg_tokens=2)], ids=['grid', 'prefix'])
@pytest.mark.parametrize('size', [(40, 40), (52, 30)], ids=['even', 'odd'])
def test_eva(count_cells, prefix, size):
    model = make('eva_deit_tiny', **WINDOWS, **prefix, count_cells=count_cells, dynamic_img_size=True)
    (first, *_) = assert_maps_are_the_attention(model, images(*size))
    assert first.num_prefix_tokens == (3 if prefix else 0) and first.feat_size == (size[0] // 4, -(-size[1] // 4))


@pytest.mark.parametrize('name', ['softmax', 'local', 'combiner', 'scatterbrain', 'performer', 'lara'])
def test_attentions_whose_rows_add_up_to_1(name):
    assert_maps_are_the_attention(make(f'{name}_deit_tiny'), images(), 1e-4)


def test_the_other_attentions_answer_or_say_why_not():
    """No weight is made up: rows times values are the output, of negative weights too."""
    for name in ('nystromformer', 'linformer'):
        model = make(f'{name}_deit_tiny')
        outputs, values = outputs_of_attention(model, images())
        for one in attention_maps(model, images()):
            torch.testing.assert_close(one.rows @ values[one.name], outputs[one.name], rtol=1e-4, atol=1e-4)
    assert [one.rows.shape for one in attention_maps(make('reformer_deit_tiny'), images())] == [(2, 2, 100, 100)] * 3
    with pytest.raises(ValueError, match='normalises averages of values'):
        attention_maps(make('long_short_deit_tiny'), images())
    plain = attention_maps(make('long_short_deit_tiny', dual_ln=False), images())
    torch.testing.assert_close(plain[1].rows.sum(-1), torch.ones(2, 2, 100))
    assert {'softmax', 'local', 'eva', 'combiner', 'scatterbrain', 'performer', 'lara'} == ATTENTIONS.keys() - {
        'nystromformer',
        'linformer',
        'reformer',
        'long_short',
    }


def test_ablations_have_maps():
    options = dict(partition='complement', num_samples=3, proposal='q', overlap=True, summary='linear')
    assert_maps_are_the_attention(make('eva_deit_tiny', **WINDOWS, **options), images())


def test_a_pyramid_has_a_grid_for_each_stage():
    size = dict(depths=(1, 1, 1, 1), embed_dims=(16, 16, 32, 32), num_heads=(1, 1, 2, 2), num_classes=5)
    model = randomise(timm.create_model('eva_pvt_v2_b3', img_size=64, **size))
    maps = assert_maps_are_the_attention(model, images(64, 96))
    assert [one.feat_size for one in maps] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    (first, *_, last) = attention_maps(model, images(64, 96), query=(63, 40))
    assert first.queries == (15 * 24 + 10,) and last.queries == (1 * 3 + 1,)
    with pytest.raises(ValueError, match='on one grid'):
        attention_rollout(attention_maps(model, images(64, 96)))


def test_a_pixel_is_in_the_patch_that_has_it():
    """Also where patches do not divide the image: it is padded, or its last rows and columns are left out."""
    size = dict(patch_size=8, embed_dim=32, depth=1, num_heads=2, class_token=False, global_pool='avg')
    padded = timm.create_model('vit_tiny_patch16_224', dynamic_img_size=True, dynamic_img_pad=True, **size)
    cut = timm.create_model('eva_deit_tiny', img_size=47, **WINDOWS, **{**size, 'depth': 1})
    for model, side, grid in ((padded, 41, 6), (evavit.convert_vit(padded, window_size=2), 41, 6), (cut, 47, 5)):
        for y, x in ((0, 39), (39, 24), (15, 16)):
            (one,) = attention_maps(model, images(side, side), query=(y, x))
            assert one.feat_size == (grid, grid) and one.queries == (y // 8 * grid + x // 8,), (side, y, x)
    (one,) = attention_maps(padded, images(41, 41), query=(40, 40))
    assert one.queries == (35,)
    with pytest.raises(ValueError, match=r'\(0, 40\): no patch has this pixel; the model sees 40 × 40 of 47 × 47'):
        attention_maps(cut, images(47, 47), query=(0, 40))
    stages = dict(depths=(1, 1, 1, 1), embed_dims=(16, 16, 32, 32), num_heads=(1, 1, 2, 2))
    maps = attention_maps(timm.create_model('eva_pvt_v2_b3', **stages), images(50, 70), query=(49, 36))
    assert [one.queries[0] for one in maps] == [12 * 18 + 9, 6 * 9 + 4, 3 * 5 + 2, 1 * 3 + 1]


CONVERTED = {
    'vit_tiny_patch16_224': {},
    'vit_small_patch16_rope_ape_224': {},
    'eva02_tiny_patch14_224': {},
    'vit_base_patch16_dinov3': {},
    'deit_tiny_distilled_patch16_224': {},
}


@pytest.mark.parametrize('name', CONVERTED)
def test_converted_networks_and_their_softmax(name):
    """Class tokens, registers, rotary embeddings. With a window over the whole grid the maps are those of softmax."""
    parent = make(name, num_classes=5)
    converted = evavit.convert_vit(parent, window_size=3, partition_grid=4)
    assert_maps_are_the_attention(converted, images())
    whole = evavit.convert_vit(parent, window_size=10, partition_grid=4)
    ours, theirs = attention_maps(whole, images()), attention_maps(parent, images())
    assert [one.name for one in ours] == [one.name for one in theirs] == [f'blocks.{i}.attn' for i in range(3)]
    for one, other in zip(ours, theirs, strict=True):
        assert one[2:] == other[2:]
        torch.testing.assert_close(one.rows, other.rows, rtol=0, atol=2e-5)
        torch.testing.assert_close(other.rows.sum(-1), torch.ones(other.rows.shape[:3]))


@pytest.mark.parametrize('name', ['beit_base_patch16_224', 'vit_relpos_small_patch16_224', 'vit_tiny_patch16_224'])
def test_softmax_models_of_timm(name):
    """Rows of the whole grid, biases between all tokens included, at an odd size where the model takes one."""
    size = dict(img_size=(28, 36)) if name.startswith('vit_tiny') else {}
    model = make(name, **size)
    x = images(*size.get('img_size', (40, 40)))
    before = model(x)
    for one in attention_maps(model, x):
        assert one.feat_size == (x.shape[2] // 4, x.shape[3] // 4) and (one.rows >= 0).all()
        (mean,) = attention_maps(model, x, layer=one.name, query='mean')
        torch.testing.assert_close(mean.rows, one.rows[:, :, one.num_prefix_tokens :].mean(2, keepdim=True))
        torch.testing.assert_close(one.rows.sum(-1), torch.ones(one.rows.shape[:3]))
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)


def test_queries_and_layers():
    model = make('eva_deit_tiny', **WINDOWS, class_token=True, reg_tokens=1)
    every = attention_maps(model, images())
    (last,) = attention_maps(model, images(), layer=-1, query='class')
    assert last.name == 'blocks.2.attn' and last.queries == (0,) and last.grid.shape == (2, 2, 1, 10, 10)
    torch.testing.assert_close(last.rows, every[2].rows[:, :, :1])
    some = attention_maps(model, images(), layer=['blocks.1.attn', 0], query=[7, 101])
    assert [one.name for one in some] == ['blocks.0.attn', 'blocks.1.attn']
    torch.testing.assert_close(some[1].rows, every[1].rows[:, :, [7, 101]])
    (mean,) = attention_maps(model, images(), layer=1, query='mean')
    assert mean.queries == () and mean.grid.shape == (2, 2, 1, 10, 10)
    torch.testing.assert_close(mean.rows, every[1].rows[:, :, 2:].mean(2, keepdim=True))
    (pixel,) = attention_maps(model, images(), layer=1, query=(39, 4))
    assert pixel.queries == (2 + 9 * 10 + 1,)


def test_the_model_is_left_as_it_was():
    """Mode of every module, hooks, fused attention, gradients; in training mode the maps are those of evaluation."""
    for model in (
        make('eva_deit_tiny', **WINDOWS, attn_drop_rate=0.5),
        make('vit_tiny_patch16_224', attn_drop_rate=0.5),
    ):
        expected = attention_maps(model, images(), layer=1)[0].rows
        model.train()
        model.blocks[0].eval()
        modes = [module.training for module in model.modules()]
        torch.testing.assert_close(attention_maps(model, images(), layer=1)[0].rows, expected)
        assert [module.training for module in model.modules()] == modes
        assert model.blocks[1].attn.fused_attn and all(p.grad is None for p in model.parameters())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        with torch.inference_mode():
            torch.testing.assert_close(attention_maps(model, images(), layer=1)[0].rows, expected)
        with pytest.raises(RuntimeError):
            attention_maps(model.double(), images())
        assert [module.training for module in model.modules()] == modes
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize('name', ['eva_deit_tiny', 'vit_tiny_patch16_224'])
def test_threads_on_one_model_get_their_own_maps(name):
    """Those that call the model itself, too; and its mode stays."""
    model = make(name).train()
    batches = [torch.randn(2, 3, 40, 40) for _ in range(4)]
    alone = [attention_maps(model, x) for x in batches]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(8) as pool, torch.no_grad():
            others = [pool.submit(model, batches[0]) for _ in range(24)]
            found = list(pool.map(lambda x: attention_maps(model, x), batches * 6))
            [other.result() for other in others]
    finally:
        sys.setswitchinterval(interval)
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    for maps, expected in zip(found, alone * 6, strict=True):
        assert all(torch.equal(one.rows, other.rows) for one, other in zip(maps, expected, strict=True))


def test_a_picture_takes_less_than_a_second():
    """Of one core, for all layers, heads and queries of a model at its own size; a first call warms up."""
    model, x = timm.create_model('eva_deit_tiny').eval(), torch.randn(1, 3, 224, 224)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        attention_maps(model, x, layer=0)
        began = time.process_time()
        assert len(attention_maps(model, x)) == 12
        assert time.process_time() - began < 1
    finally:
        torch.set_num_threads(threads)


def test_features_only_and_wrapped_models():
    plain = make('vit_tiny_patch16_224', features_only=True)
    assert attention_maps(plain, images(), layer=0, query='class')[0].queries == (0,)
    ours = make('eva_deit_tiny', features_only=True)
    assert attention_maps(ours, images(), layer=0)[0].name == 'model.blocks.0.attn'
    wrapped = torch.compile(make('eva_deit_tiny', **WINDOWS), backend='eager')
    assert len(attention_maps(wrapped, images())) == 3


@pytest.mark.parametrize(
    'words, message',
    [
        (dict(layer=3), 'layer 3: the model has 3 layers'),
        (dict(layer='blocks.9.attn'), "layer 'blocks.9.attn'"),
        (dict(query='class'), 'has no class token'),
        (dict(layer=[]), r'layer \[\] names no layer'),
        (dict(layer=True), 'layer True'),
        (dict(query=True), 'query True'),
        (dict(query=[0, True]), r'query \[0, True\]'),
        (dict(query=100), 'query 100: .* 0 to 99'),
        (dict(query=[]), 'query'),
        (dict(query='cls'), "query 'cls': takes 'class'"),
        (dict(query=(40, 0)), 'a pixel .y, x. of images of 40 × 40'),
    ],
    ids=str,
)
def test_mistakes_are_one_line(words, message):
    with pytest.raises(ValueError, match=message) as error:
        attention_maps(make('eva_deit_tiny', **WINDOWS), images(), **words)
    assert '\n' not in str(error.value)


def test_models_without_such_weights():
    with pytest.raises(ValueError, match='ResNet has no attention that can be asked'):
        attention_maps(timm.create_model('resnet18'), images())
    with pytest.raises(ValueError, match='images must be'):
        attention_maps(make('eva_deit_tiny'), images()[0])


def test_rollout():
    """Rows add up to 1, and the product is that of the definition, layer after layer."""
    maps = attention_maps(make('eva_deit_tiny', **WINDOWS, class_token=True), images())
    rollout = attention_rollout(maps)
    expected = torch.eye(101)
    for one in maps:
        expected = 0.5 * (one.rows.mean(1) + torch.eye(101)) @ expected
    torch.testing.assert_close(rollout.rows[:, 0], expected)
    torch.testing.assert_close(rollout.rows.sum(-1), torch.ones(2, 1, 101))
    assert rollout.grid.shape == (2, 1, 101, 10, 10)
    with pytest.raises(ValueError, match='rows of all tokens'):
        attention_rollout(attention_maps(make('eva_deit_tiny'), images(), query=0))
    with pytest.raises(ValueError, match='no averages'):
        attention_rollout(attention_maps(make('linformer_deit_tiny'), images()))
    with pytest.raises(ValueError, match='got none'):
        attention_rollout([])


def test_overlay_is_bright_where_the_weight_is():
    picture, weights = Image.new('L', (90, 60), 128), torch.zeros(2, 3)
    weights[1, 2] = 0.03
    drawn = overlay_attention(picture, weights)
    assert drawn.mode == 'RGB' and drawn.size == picture.size
    light = np.asarray(drawn.convert('L'), dtype=float)
    assert light[55, 85] > light[5, 5] + 60
    assert np.asarray(overlay_attention(picture, weights, opacity=0)).min() == 128
    marked = np.asarray(overlay_attention(picture, weights, mark=(30, 45)))
    assert (marked[27, 45] == 255).all() and (marked != np.asarray(drawn)).any(-1).sum() < 60
    overlay_attention(picture, torch.zeros(2, 3))
    for wrong in (torch.zeros(1, 2, 3), torch.full((2, 3), -1.0), torch.full((2, 3), torch.nan), torch.zeros(0, 2)):
        with pytest.raises(ValueError, match='weights must be'):
            overlay_attention(picture, wrong)
    with pytest.raises(ValueError, match='opacity'):
        overlay_attention(picture, weights, opacity=2)
    for mark in ((60, 0), (0, -1), (math.nan, 0), (math.inf, 0), (10**30, 0)):
        with pytest.raises(ValueError, match=r'mark .* of the picture, which is 60 × 90$'):
            overlay_attention(picture, weights, mark=mark)
    for wrong in (Image.new('I;16', (9, 6)), Image.new('F', (9, 6)), Image.new('L', (0, 6))):
        with pytest.raises(ValueError, match='must have pixels of 8 bits'):
            overlay_attention(wrong, weights)


@pytest.mark.parametrize('name', ['eva', 'softmax', 'local', 'converted'])
def test_timms_extraction_is_told_what_to_call(name, caplog):
    """Its hooks wait at modules that are never called: the dictionary is empty, and a line says so."""
    _tell_of_maps.cache_clear()
    model = evavit.convert_vit(make('vit_tiny_patch16_224')) if name == 'converted' else make(f'{name}_deit_tiny')
    with caplog.at_level(logging.WARNING, 'evavit'):
        assert not AttentionExtract(model, method='hook')(images())
    (line,) = [record.message for record in caplog.records]
    assert 'evavit.attention_maps(model, images)' in line


def test_an_attention_map_is_a_plain_tuple():
    one = AttentionMap('x', torch.ones(1, 1, 1, 7), (0,), (2, 3), 1)
    assert one.grid.shape == (1, 1, 1, 2, 3)


def test_arguments_of_another_type_are_one_line():
    model, images = timm.create_model('eva_deit_tiny', **SMALL, **WINDOWS), torch.zeros(1, 3, 40, 40)
    (last,) = attention_maps(model, images, layer=-1)
    picture, weights = Image.new('RGB', (40, 40)), last.grid[0, 0, 0]
    for call, message in (
        (lambda: attention_maps('eva_deit_tiny', images), r'^model must be a torch\.nn\.Module, .*, got str$'),
        (lambda: attention_maps(model, picture), r'^images must be a tensor .* such as timm.*, got Image$'),
        (lambda: attention_maps(model, images.numpy()), r'^images must be a tensor .*, got ndarray$'),
        (lambda: attention_maps(model, images, layer=1.0), r'^layer must be a number, a name .*, got float$'),
        (lambda: attention_maps(model, images, query=0.5), r"^query must be 'class', .*, got float$"),
        (lambda: attention_maps(model, images, query=('a', 0)), r"^query \('a', 0\): a tuple is a pixel"),
        (lambda: attention_rollout(last), r'^maps must be the list that attention_maps gives'),
        (lambda: attention_rollout(images), r'^maps must be the list that attention_maps gives'),
        (lambda: overlay_attention('a.png', weights), r"^picture must be one of Pillow's, .*, got str$"),
        (lambda: overlay_attention(picture, weights.numpy()), r'^weights must be a tensor .*, got ndarray$'),
        (lambda: overlay_attention(picture, last), r'^weights must be a tensor .*, got AttentionMap$'),
        (lambda: overlay_attention(picture, weights, mark=3), r'^mark 3: must be a pixel'),
        (lambda: overlay_attention(picture, weights, opacity='a'), r'^opacity must be a number, got str$'),
    ):
        with pytest.raises((TypeError, ValueError), match=message) as error:
            call()
        assert '\n' not in str(error.value)


def test_parts_that_are_compiled():
    """A block in torch.compile or compiled in place, before and after a pass, and the whole model."""
    x = images()

    def in_place(module):
        module.compile(backend='eager')
        return module

    for wrap in (lambda block: torch.compile(block, backend='eager'), in_place):
        for convert in (True, False):
            model = make('vit_tiny_patch16_224')
            model = evavit.convert_vit(model, window_size=3) if convert else model
            expected = attention_maps(model, x)
            out = model(x)
            for number in range(2):
                model.blocks[number] = wrap(model.blocks[number])
            model(x)
            for found, wanted in zip(attention_maps(model, x), expected, strict=True):
                torch.testing.assert_close(found.rows, wanted.rows)
            torch.testing.assert_close(model(x), out)
    whole = in_place(make('vit_tiny_patch16_224'))
    whole(x)
    assert len(attention_maps(whole, x)) == 3
    assert whole._compiled_call_impl is not None
