"""Weights from elsewhere: softmax models, other sizes, wrong files, and what became of each tensor."""

import logging
import os
import zipfile
from collections import Counter

import pytest
import timm
import torch
from runs import write_bad_weights
from safetensors.torch import save_file

import evavit
from evavit.convert import changes_table, convert_softmax, linear_summary
from evavit.models import fit_checkpoint, read_weights
from evavit.models._saved import config_beside, trained_size

SMALL = dict(img_size=32, patch_size=4, embed_dim=32, depth=2, num_heads=2)
EVA = dict(window_size=4, partition_grid=4)
PYRAMID = dict(depths=(1, 1, 1, 1), embed_dims=(16, 32, 48, 64), num_heads=(1, 2, 3, 4), mlp_ratios=(2, 2, 2, 2))


def image(side=32):
    return torch.randn(2, 3, side, side)


def randomise(model):
    """Biases and norms that are not 0 and 1."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def overlay(name, state, tmp_path, **kwargs):
    torch.save(state, tmp_path / 'file.pth')
    return timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / 'file.pth')), **kwargs
    ).eval()


def counts(changes):
    return Counter(change.action for change in changes)


def test_softmax_without_a_class_token_is_the_same_network(tmp_path):
    """timm's ViT with mean pooling has every tensor of ours with softmax attention, under the same names."""
    source = randomise(
        timm.create_model('deit_tiny_patch16_224', class_token=False, global_pool='avg', fc_norm=False, **SMALL)
    )
    model = overlay('softmax_deit_tiny', source.state_dict(), tmp_path, num_classes=1000, **SMALL)
    x = image()
    with torch.no_grad():
        torch.testing.assert_close(model(x), source(x))
    assert counts(fit_checkpoint(source.state_dict(), model)[1]).keys() == {'taken'}


@pytest.mark.parametrize(
    'name, extra',
    [
        ('deit_tiny_patch16_224', {'cls_token'}),
        ('deit_tiny_distilled_patch16_224', {'cls_token', 'dist_token', 'head_dist.weight', 'head_dist.bias'}),
    ],
)
def test_deit_with_a_class_token(name, extra):
    source = timm.create_model(name, **SMALL).state_dict()
    model = timm.create_model('eva_deit_tiny', **{**SMALL, 'img_size': 48}, **EVA)
    fitted, changes = fit_checkpoint({'model': source}, model)
    model.load_state_dict(fitted)
    assert {change.name for change in changes if change.action == 'dropped'} == extra
    assert {change.name for change in changes if change.action == 'resized'} == {'pos_embed'}
    assert {change.name.split('.attn.')[1].split('.')[0] for change in changes if change.action == 'fresh'} == {
        'summary_q',
        'summary_k',
        'rel_pos',
    }
    assert {change.name for change in changes if change.action != 'dropped'} == set(model.state_dict())
    assert torch.equal(fitted['blocks.1.mlp.fc2.weight'], source['blocks.1.mlp.fc2.weight'])
    # At the file's own size the positions of the patches are taken as they are.
    same, _ = fit_checkpoint(source, timm.create_model('eva_deit_tiny', **SMALL, **EVA))
    assert torch.equal(same['pos_embed'], source['pos_embed'][:, len(extra & {'cls_token', 'dist_token'}) :])


@pytest.mark.parametrize('no_embed_class', [False, True])
@pytest.mark.parametrize('file_has', [False, True])
def test_class_and_register_tokens_are_taken_where_the_model_has_them(no_embed_class, file_has):
    """With their positions, which go into the tokens where the model has none for them."""
    tokens = dict(reg_tokens=2, qk_norm=True, scale_attn_norm=True, **SMALL)
    source = randomise(timm.create_model('vit_tiny_patch16_224', no_embed_class=not file_has, **tokens))
    own = dict(class_token=True, global_pool='token', no_embed_class=no_embed_class, **tokens)
    exact = dict(window_size=8, count_cells='outside')
    x = image()
    for name, options in (('softmax_deit_tiny', {}), ('eva_deit_tiny', exact)):
        model = timm.create_model(name, **own, **options).eval()
        fitted, changes = fit_checkpoint(source.state_dict(), model)
        model.load_state_dict(fitted)
        with torch.no_grad():
            torch.testing.assert_close(model(x), source(x), rtol=1e-4, atol=1e-5)
        assert not any(change.action == 'dropped' for change in changes)
    larger = timm.create_model('eva_deit_tiny', **{**own, 'img_size': 48})
    larger.load_state_dict(fit_checkpoint(source.state_dict(), larger)[0])
    oblong = timm.create_model('eva_deit_tiny', **{**own, 'img_size': (32, 48)})
    again = timm.create_model('eva_deit_tiny', **{**own, 'img_size': (32, 48)})
    again.load_state_dict(fit_checkpoint(oblong.state_dict(), again)[0])
    assert torch.equal(again.pos_embed, oblong.pos_embed)


def test_tokens_and_norms_that_one_side_lacks():
    plain = timm.create_model('vit_tiny_patch16_224', class_token=False, global_pool='avg', **SMALL).state_dict()
    normed = timm.create_model('vit_tiny_patch16_224', qk_norm=True, scale_attn_norm=True, **SMALL).state_dict()
    model = timm.create_model('eva_deit_tiny', class_token=True, global_pool='token', **SMALL)
    with pytest.raises(RuntimeError, match='the file has no cls_token, which the model has'):
        fit_checkpoint(plain, model)
    with pytest.raises(RuntimeError, match=r'has, unlike the model, .*check qk_norm and scale_attn_norm'):
        fit_checkpoint(normed, model)
    model = timm.create_model('eva_deit_tiny', qk_norm=True, scale_attn_norm=True, **SMALL)
    with pytest.raises(RuntimeError, match=r'lacks .*check qk_norm and scale_attn_norm'):
        fit_checkpoint(plain, model)


def test_a_summary_that_lost_a_tensor_is_not_filled_up():
    """With what begins near softmax beside what was trained it would be neither."""
    model = timm.create_model('eva_deit_tiny', **SMALL, **EVA)
    state = model.state_dict()
    del state['blocks.1.attn.summary_q.proj.weight']
    with pytest.raises(RuntimeError, match=r'lacks blocks\.1\.attn\.summary_q\.proj\.weight'):
        model.load_state_dict(fit_checkpoint(state, model)[0])


def test_the_start_is_near_softmax_attention():
    """The same weights, the tables apart: far nearer to the softmax network than EVA as it is initialised."""
    source = randomise(timm.create_model('softmax_deit_tiny', **SMALL))
    fresh = timm.create_model('eva_deit_tiny', **SMALL, **EVA).eval()
    start, _ = fit_checkpoint(source.state_dict(), fresh)
    x = image()
    with torch.no_grad():
        target = source(x)

        def error(state):
            fresh.load_state_dict(state)
            return ((fresh(x) - target).norm() / target.norm()).item()

        near = error(start)
        usual = error(
            {
                **fresh.state_dict(),
                **source.state_dict(),
                **{
                    name: value
                    for name, value in timm.create_model('eva_deit_tiny', **SMALL, **EVA).state_dict().items()
                    if 'summary' in name or 'rel_pos' in name
                },
            }
        )
    assert near < 0.7 * usual


def test_linear_summary_is_the_identity_less_two_directions():
    heads, d = 3, 64
    weight, bias = torch.randn(heads * d, heads * d) / 14, torch.randn(d).repeat(heads)
    part = linear_summary(weight, bias, heads)
    x = bias[:d] + torch.randn(100, d)
    y = torch.nn.functional.layer_norm(
        x @ part['proj.weight'].T + part['proj.bias'], [d], part['norm.weight'], part['norm.bias']
    )
    lost = (y - x).norm() / (x - bias[:d]).norm()
    assert lost < 1.3 * (2 / d) ** 0.5


def test_a_cell_counts_as_many_tokens_as_it_has():
    """q = 0 weighs all keys alike: one window and one cell that tell of all tokens alike give their mean."""
    source = timm.create_model('softmax_deit_tiny', **SMALL).state_dict()
    fitted, _ = fit_checkpoint(source, timm.create_model('eva_deit_tiny', **SMALL, **EVA))
    table = fitted['blocks.0.attn.rel_pos.relative_position_bias_table']
    torch.testing.assert_close(table, torch.full_like(table, -torch.tensor(4.0).log().item()))  # cells of 2 × 2


@pytest.mark.parametrize('name', ['local', 'performer', 'lara', 'linformer', 'long_short'])
def test_other_attentions_take_what_they_share(name):
    source = timm.create_model('deit_tiny_patch16_224', **SMALL).state_dict()
    model = timm.create_model(f'{name}_deit_tiny', **SMALL)
    fitted, _ = fit_checkpoint(source, model)
    model.load_state_dict(fitted)
    assert torch.equal(model.blocks[0].attn.qkv.weight, source['blocks.0.attn.qkv.weight'])


def test_pvt_of_timm():
    source = randomise(timm.create_model('pvt_v2_b3', **PYRAMID))
    model = timm.create_model('eva_pvt_v2_b3', img_size=64, **PYRAMID)
    fitted, changes = fit_checkpoint(source.state_dict(), model)
    model.load_state_dict(fitted)
    attn = source.stages[0].blocks[0].attn
    assert torch.equal(model.stages[0].blocks[0].attn.qkv.weight, torch.cat([attn.q.weight, attn.kv.weight]))
    dropped = {change.name for change in changes if change.action == 'dropped'}
    assert dropped == {name for name in source.state_dict() if '.attn.sr.' in name or '.attn.norm.' in name}
    # The last stage is softmax in both: the same function.
    x = torch.randn(2, 9, 64)
    with torch.no_grad():
        ours, theirs = (network.stages[3].blocks[0].attn for network in (model, source))
        torch.testing.assert_close(ours(x, [3, 3]), theirs(x, [3, 3]))


def test_sizes_of_our_own_weights(tmp_path):
    source = randomise(timm.create_model('eva_deit_tiny', num_classes=5, **SMALL, **EVA))
    model = overlay(
        'eva_deit_tiny',
        source.state_dict(),
        tmp_path,
        num_classes=5,
        **{**SMALL, 'img_size': 64, 'patch_size': 8},
        window_size=3,
        partition_grid=4,
    )
    _, changes = fit_checkpoint(source.state_dict(), model)
    assert {change.name.split('.')[-1] for change in changes if change.action == 'resized'} == {
        'weight',
        'relative_position_bias_table',
    }
    # timm's own resampling makes a patch of twice the side see the same picture at twice the size
    x = image()
    with torch.no_grad():
        big = torch.nn.functional.interpolate(x, scale_factor=2, mode='nearest')
        small_tokens, big_tokens = source.patch_embed(x), model.patch_embed(big)
    assert torch.nn.functional.cosine_similarity(small_tokens, big_tokens, dim=-1).mean() > 0.9
    pyramid = timm.create_model('eva_pvt_v2_b3', **PYRAMID, window_size=5)
    _, changes = fit_checkpoint(timm.create_model('eva_pvt_v2_b3', **PYRAMID).state_dict(), pyramid)
    assert counts(changes)['resized'] == 3


def test_classes_of_the_file_decide(tmp_path):
    """Not those of the configuration, 1,000: a classifier that fits is kept, another one starts anew, and is named."""
    state = randomise(timm.create_model('eva_deit_tiny', num_classes=5, **SMALL, **EVA)).state_dict()
    kept = overlay('eva_deit_tiny', state, tmp_path, num_classes=5, **SMALL, **EVA)
    assert torch.equal(kept.head.weight, state['head.weight'])
    other = overlay('eva_deit_tiny', state, tmp_path, num_classes=1000, **SMALL, **EVA)
    assert torch.equal(other.norm.weight, state['norm.weight'])
    _, changes = fit_checkpoint(state, other)
    assert ('head.weight', 'fresh', 'the file has 5 classes') in changes
    headless = overlay('eva_deit_tiny', state, tmp_path, num_classes=0, **SMALL, **EVA)
    assert torch.equal(headless.norm.weight, state['norm.weight'])


def test_grey_images(tmp_path):
    state = timm.create_model('deit_tiny_patch16_224', **SMALL).state_dict()
    model = overlay('eva_deit_tiny', state, tmp_path, in_chans=1, **SMALL, **EVA)
    torch.testing.assert_close(model.patch_embed.proj.weight, state['patch_embed.proj.weight'].sum(1, keepdim=True))


@pytest.mark.parametrize('ending', ['pth', 'safetensors'])
def test_checkpoint_path_takes_the_same_files(tmp_path, ending, caplog):
    source = timm.create_model('deit_tiny_patch16_224', **SMALL)
    path = tmp_path / f'deit.{ending}'
    (torch.save if ending == 'pth' else save_file)(source.state_dict(), path)
    with caplog.at_level(logging.WARNING, 'evavit'):
        model = timm.create_model('eva_deit_tiny', checkpoint_path=str(path), **SMALL, **EVA)
    assert torch.equal(model.blocks[1].attn.qkv.weight, source.blocks[1].attn.qkv.weight)
    assert 'cls_token' in caplog.text and 'starts near softmax' in caplog.text


def test_a_file_that_fits_is_not_touched(tmp_path, caplog):
    source = randomise(timm.create_model('eva_deit_tiny', **SMALL, **EVA))
    model = timm.create_model('eva_deit_tiny', **SMALL, **EVA)
    with caplog.at_level(logging.INFO, 'evavit'):
        model.load_state_dict(source.state_dict())
        partial = model.load_state_dict({'norm.weight': source.norm.weight}, strict=False)
    assert not caplog.text and 'blocks.0.attn.qkv.weight' in partial.missing_keys
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), source.state_dict().values(), strict=True)
    )


def one_line(error):
    text = str(error.value)
    assert '\n' not in text, text
    return text


def test_a_wrong_file_is_one_line(tmp_path):
    model = timm.create_model('eva_deit_tiny', **SMALL, **EVA)
    wide = timm.create_model('deit_tiny_patch16_224', **{**SMALL, 'embed_dim': 48})
    deep = timm.create_model('deit_tiny_patch16_224', **{**SMALL, 'depth': 3})
    scaled = timm.create_model('deit_tiny_patch16_224', init_values=1e-5, **SMALL)
    faults = [
        (timm.create_model('resnet10t').state_dict(), 'none of the'),
        (wide.state_dict(), '48'),
        (deep.state_dict(), 'blocks.2.'),
        (scaled.state_dict(), 'init_values'),
        ({}, 'no dictionary of tensors'),
        ({'optimizer': 3}, 'no dictionary of tensors'),
    ]
    for state, word in faults:
        with pytest.raises(RuntimeError) as error:
            fit_checkpoint(state, model)
        assert word in one_line(error)
    path = tmp_path / 'classes.pth'
    torch.save(timm.create_model('eva_deit_tiny', num_classes=3, **SMALL, **EVA).state_dict(), path)
    with pytest.raises(RuntimeError) as error:
        timm.create_model('eva_deit_tiny', num_classes=4, checkpoint_path=str(path), **SMALL, **EVA)
    assert '3 classes' in one_line(error) and '4' in one_line(error)


@pytest.mark.parametrize('model', ['deit_tiny_patch16_224', 'eva_deit_tiny'])
@pytest.mark.parametrize(
    'name', ['cls_token', 'patch_embed.proj.weight', 'blocks.0.attn.rel_pos.relative_position_bias_table']
)
def test_tensors_of_other_axes_are_one_line(model, name):
    file = timm.create_model(model, depth=1, img_size=32).state_dict()
    for value in (torch.zeros(3), torch.zeros(())):
        with pytest.raises(RuntimeError, match=f'the file has {name} of .*: no model has it in') as error:
            fit_checkpoint({**file, name: value}, timm.create_model('eva_deit_tiny', depth=1, img_size=32))
        assert '\n' not in str(error.value)


@pytest.mark.parametrize('name', ['blocks.0.attn.qkv.weight', 'pos_embed', 'head.bias'])
@pytest.mark.parametrize('dtype', [torch.bool, torch.int64, torch.complex64])
def test_weights_of_another_kind_of_number_are_one_line(tmp_path, name, dtype):
    """PyTorch would convert them without a word; those of other precision it may."""
    state = timm.create_model('eva_deit_tiny', num_classes=3, **SMALL, **EVA).state_dict()
    path = tmp_path / 'file.pth'
    for kwargs in (dict(checkpoint_path=str(path)), dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(path)))):
        torch.save({**state, name: state[name].to(dtype)}, path)
        with pytest.raises(RuntimeError, match=f'has in another type of number {name}') as error:
            timm.create_model('eva_deit_tiny', num_classes=3, **kwargs, **SMALL, **EVA)
        assert len(str(error.value).splitlines()) == 1
        torch.save({**state, name: state[name].to(torch.float16)}, path)
        timm.create_model('eva_deit_tiny', num_classes=3, **kwargs, **SMALL, **EVA)


def test_bad_files_are_one_line_that_says_why(tmp_path, capfd):
    for path, words in write_bad_weights(tmp_path).items():
        with pytest.raises(RuntimeError) as error:
            read_weights(path)
        assert all(word in one_line(error) for word in words), path
        with pytest.raises(RuntimeError) as other:
            timm.create_model('eva_deit_tiny', pretrained=True, pretrained_cfg_overlay=dict(file=str(path)), **SMALL)
        assert str(other.value) == str(error.value)
        with pytest.raises(Exception):  # noqa: B017  (timm reads it, and says so in its own words)
            timm.create_model('eva_deit_tiny', checkpoint_path=str(path), **SMALL)
    with pytest.raises(RuntimeError, match=r'nowhere\.pth: no such checkpoint'):
        timm.create_model('eva_pvt_v2_b3', pretrained=True, pretrained_cfg_overlay=dict(file='nowhere.pth'))
    assert 'must not run' not in capfd.readouterr().out


@pytest.mark.parametrize(
    'name, source, kwargs',
    [('eva_deit_tiny', 'deit_tiny_patch16_224', {**SMALL, **EVA}), ('eva_pvt_v2_b3', 'pvt_v2_b3', PYRAMID)],
)
def test_a_converted_model_is_scripted_and_compiled(name, source, kwargs, tmp_path):
    """Its `load_state_dict` is our own."""
    softmax = timm.create_model(source, **{key: value for key, value in kwargs.items() if key not in EVA})
    torch.save(softmax.state_dict(), tmp_path / 'softmax.pth')
    model = timm.create_model(name, checkpoint_path=str(tmp_path / 'softmax.pth'), **kwargs).eval()
    scripted = torch.jit.script(model)
    compiled = torch.compile(model, backend='aot_eager', fullgraph=True)
    x = image()
    with torch.no_grad():
        output = model(x)
        for other in (scripted, compiled):
            torch.testing.assert_close(other(x), output)
            other.load_state_dict(other.state_dict())
            torch.testing.assert_close(other(x), output)


def test_the_table_groups_blocks():
    source = timm.create_model('deit_tiny_patch16_224', **SMALL).state_dict()
    _, changes = fit_checkpoint(source, timm.create_model('eva_deit_tiny', **SMALL, **EVA))
    table = changes_table(changes).splitlines()
    assert table[0].split() == ['action', 'tensors', 'name']
    row = next(line for line in table if 'blocks.*.attn.qkv' in line)
    assert row.split() == ['taken', '4', 'blocks.*.attn.qkv']
    assert len(table) < 25 and evavit.__version__


def test_softmax_names_are_left_alone():
    state = timm.create_model('eva_deit_tiny', **SMALL, **EVA).state_dict()
    assert list(convert_softmax(state)) == list(state)


@pytest.mark.parametrize('name', ['softmax_deit_tiny', 'eva_deit_tiny'])
def test_a_norm_after_the_pooling_stays_there(name, tmp_path):
    source = randomise(
        timm.create_model('deit_tiny_patch16_224', class_token=False, global_pool='avg', fc_norm=True, **SMALL)
    )
    model = overlay(name, source.state_dict(), tmp_path, fc_norm=True, num_classes=1000, **SMALL)
    assert torch.equal(model.fc_norm.weight, source.fc_norm.weight)
    x = image()
    if name == 'softmax_deit_tiny':
        with torch.no_grad():
            torch.testing.assert_close(model(x), source(x))


def test_grids_that_are_not_square(tmp_path):
    """6 × 8 patches and a class token are 49 positions, which are not 7 × 7 patches."""
    wide = {**SMALL, 'img_size': (24, 32)}
    source = timm.create_model('deit_tiny_patch16_224', **wide).state_dict()
    fitted, _ = fit_checkpoint(source, timm.create_model('eva_deit_tiny', **wide, **EVA))
    assert torch.equal(fitted['pos_embed'], source['pos_embed'][:, 1:])
    own = timm.create_model('eva_deit_tiny', **wide, **EVA)
    with pytest.raises(RuntimeError, match=r'pos_embed of 1×48×32, the model 1×64×32; .*set_input_size') as error:
        fit_checkpoint(own.state_dict(), timm.create_model('eva_deit_tiny', **SMALL, **EVA))
    assert '\n' not in str(error.value)
    own.set_input_size(img_size=32)
    assert own.pos_embed.shape == (1, 64, 32)


def test_a_table_of_no_window_is_one_line():
    state = timm.create_model('eva_deit_tiny', **SMALL, **EVA).state_dict()
    state['blocks.0.attn.rel_pos.relative_position_bias_table'] = torch.zeros(50, 2)
    with pytest.raises(RuntimeError, match='does not fit'):
        fit_checkpoint(state, timm.create_model('eva_deit_tiny', **SMALL, **EVA))


def test_a_missing_file_is_told_of_once(caplog):
    with pytest.raises(RuntimeError, match='no such checkpoint'):
        read_weights('nowhere.pth')
    assert not caplog.records


def test_a_file_of_the_safetensors_format_with_another_name_is_called_so(tmp_path):
    save_file({'weight': torch.zeros(1)}, tmp_path / 'weights.pth')
    with pytest.raises(RuntimeError, match=r'weights\.pth: not read: it is of the safetensors format'):
        read_weights(tmp_path / 'weights.pth')


def test_a_flipped_bit_in_a_file_of_another_program_is_found(tmp_path):
    path = tmp_path / 'weights.pth'
    torch.save({'weight': torch.zeros(1000)}, path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # in the tensor
    path.write_bytes(content)
    with pytest.raises(RuntimeError, match=r'weights\.pth: not a readable checkpoint: .*its part .* is damaged'):
        read_weights(path)


def test_a_file_without_checksums_is_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({'weight': torch.ones(3)}, tmp_path / 'weights.pth')
    finally:
        torch.serialization.set_crc32_options(True)
    assert read_weights(tmp_path / 'weights.pth')['weight'].tolist() == [1, 1, 1]


def test_a_compressed_archive_fills_no_memory(tmp_path, monkeypatch):
    torch.save({'weight': torch.zeros(10_000)}, tmp_path / 'plain.pth')
    with zipfile.ZipFile(tmp_path / 'plain.pth') as plain, zipfile.ZipFile(tmp_path / 'small.pth', 'w') as small:
        for part in plain.namelist():
            small.writestr(part, plain.read(part), zipfile.ZIP_DEFLATED)
    monkeypatch.setattr(torch, 'load', lambda *args, **kwargs: pytest.fail('the file is unpacked'))
    with pytest.raises(RuntimeError, match=r'small\.pth: not a readable checkpoint: .*its part .* is damaged'):
        read_weights(tmp_path / 'small.pth')


def test_a_config_json_of_another_program_is_none_of_a_model(tmp_path):
    save_file({'weight': torch.zeros(1)}, tmp_path / 'model.safetensors')
    for text in ('{"model": "x", "mean": 0.5}', '[1, 2]', '{"architectures": ["ViT"], "image_size": 32}'):
        (tmp_path / 'config.json').write_text(text)
        assert config_beside(tmp_path / 'model.safetensors') is None
    for text in ('{"architecture": "x", "pretrained_cfg": {}}', '{"architecture": "x", "input_size": [3, 8, 8]}', '{'):
        (tmp_path / 'config.json').write_text(text)
        assert config_beside(tmp_path / 'model.safetensors') == tmp_path / 'config.json'


def test_a_pipe_beside_weights_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / 'config.json')
    save_file({'weight': torch.zeros(1)}, tmp_path / 'model.safetensors')
    assert trained_size(tmp_path / 'model.safetensors') is None
