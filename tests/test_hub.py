"""Weights out: a folder for the Hugging Face Hub and back, exactly; its card; torch.hub."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from PIL import Image
from runs import CLASSES, MODEL, QUICK, load_script, words, write_images
from timm.models.vision_transformer import VisionTransformer

import evavit
from evavit.card import model_card
from evavit.errors import UserError
from evavit.hub import load_converted, publish, save_folder, source_folder
from evavit.models import write_weights
from evavit.training.build import build_model
from evavit.training.config import ModelConfig, parse_settings
from evavit.training.contents import complete_from_checkpoint, learnt_classes

ROOT = Path(__file__).parents[1]
PLAIN = (
    'eva_deit_tiny',
    dict(
        img_size=(32, 48),
        patch_size=4,
        embed_dim=32,
        depth=2,
        num_heads=2,
        window_size=4,
        partition_grid=4,
        in_chans=1,
        num_classes=3,
        proposal_scale=0.5,
    ),
)
SMALL = dict(img_size=32, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=3)
PYRAMID = (
    'eva_pvt_v2_b3',
    dict(
        depths=(1, 1, 1, 1), embed_dims=(16, 32, 48, 64), num_heads=(1, 2, 3, 4), mlp_ratios=(2, 2, 2, 2), num_classes=3
    ),
)


@pytest.mark.parametrize('name, kwargs', [PLAIN, PYRAMID], ids=['plain', 'pyramid'])
def test_a_folder_gives_the_same_model_back(tmp_path, name, kwargs):
    model = timm.create_model(name, **kwargs).eval()
    folder = save_folder(
        model,
        tmp_path / 'mine',
        data='Digits',
        licence='bsd-3-clause',
        label_names=['a', 'b', 'c'],
        data_config=dict(mean=(0.3,) * kwargs.get('in_chans', 3), crop_pct=1.0),
    )
    assert sorted(path.name for path in folder.iterdir()) == ['README.md', 'config.json', 'model.safetensors']
    again = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    x = torch.randn(2, kwargs.get('in_chans', 3), *kwargs.get('img_size', (64, 64)))
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
    config = timm.data.resolve_data_config(model=again)
    assert config['mean'][0] == 0.3 and config['crop_pct'] == 1.0
    assert again.pretrained_cfg['label_names'] == ['a', 'b', 'c']
    assert again.pretrained_cfg['license'] == 'bsd-3-clause'
    other = timm.create_model(f'local-dir:{folder}', pretrained=True, num_classes=7)
    assert other.head.weight.shape[0] == 7 and torch.equal(
        other.state_dict()[next(iter(model.state_dict()))], next(iter(model.state_dict().values()))
    )


def test_a_folder_gives_a_converted_model_back(tmp_path):
    """Its size, classes and pooling too, which were changed after it was made; the card's own lines do the same."""
    parent = timm.create_model(
        'vit_base_patch14_reg4_dinov2', img_size=56, embed_dim=32, depth=2, num_heads=2, num_classes=0
    )
    model = evavit.convert_vit(parent, window_size=3, noise_std=0.5).eval()
    model.set_input_size((70, 84))
    model.reset_classifier(3, 'avg')
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    folder = save_folder(model, tmp_path / 'mine', data='Digits', licence='cc0-1.0', label_names=['a', 'b', 'c'])
    x = torch.randn(2, 3, 70, 84)
    again = evavit.load_converted(folder).eval()
    with torch.no_grad():
        assert type(again) is type(model) and torch.equal(again(x), model(x))
    assert again.conversion == model.conversion and again.blocks[0].attn.noise_std == 0.5
    card = (folder / 'README.md').read_text()
    assert f'evavit.load_converted({str(folder)!r})' in card and 'of timm, converted to eva attention' in card
    lines = re.search(r'```python\n(import safetensors.*?)```', card, re.S)[1].replace('"model.safetensors"', 'file')
    scope = dict(timm=timm, evavit=evavit, safetensors=safetensors, file=folder / 'model.safetensors')
    exec(lines, scope)
    with torch.no_grad():
        assert torch.equal(scope['model'].eval()(x), model(x))


def test_a_converted_folder_gives_maps(tmp_path):
    """As `timm.create_model(..., features_only=True)` and a conversion would, with the folder's weights."""
    model = evavit.convert_vit(small_vit(patch_size=8, depth=3), window_size=2, partition_grid=2).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    given = dict(data='Digits', licence='cc0-1.0', data_config=dict(mean=[0.1, 0.2, 0.3]))
    folder = save_folder(model, tmp_path / 'mine', **given)
    images = torch.randn(2, 3, 32, 32)
    net = load_converted(folder, features_only=True, out_indices=[0, 1]).eval()
    assert len(net.model.blocks) == 2 and net.feature_info.reduction() == [8, 8]
    with torch.no_grad():
        wanted = model.forward_intermediates(images, indices=[0, 1], intermediates_only=True)
        assert all(torch.equal(mine, other) for mine, other in zip(net(images), wanted, strict=True))
    larger = torch.randn(2, 3, 48, 64)
    sized = load_converted(folder, img_size=(48, 64), features_only=True, out_indices=1).eval()
    free = load_converted(folder, dynamic_img_size=True, drop_path_rate=0.1).eval()
    model.set_input_size((48, 64))
    with torch.no_grad():
        (last,) = model.forward_intermediates(larger, indices=1, intermediates_only=True)
        torch.testing.assert_close(sized(larger)[0], last)
        torch.testing.assert_close(free(larger), model(larger))
    assert timm.data.resolve_data_config(model=sized)['input_size'] == (3, 48, 64)
    assert sized.pretrained_cfg['input_size'] == (3, 48, 64) and sized.pretrained_cfg['mean'] == [0.1, 0.2, 0.3]


@pytest.mark.parametrize('bias', [False, True])
def test_a_converted_folder_with_more_cells(tmp_path, bias):
    """Larger images can have more cells: the weights are those of any number."""
    options = dict(window_size=2, rel_pos_bias=bias)
    model = evavit.convert_vit(small_vit(patch_size=4), partition_grid=2, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    folder = save_folder(model, tmp_path / 'mine', data='Digits', licence='cc0-1.0')
    more = evavit.convert_vit(evavit.revert_vit(model), partition_grid=4, **options)
    more.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, 32, 32)
    again = load_converted(folder, partition_grid=4).eval()
    assert again.conversion['partition_grid'] == again.blocks[0].attn.partition_grid == 4
    with torch.no_grad():
        assert torch.equal(again(images), more.eval()(images)) and not torch.equal(again(images), model(images))
    maps = load_converted(folder, partition_grid=3, features_only=True, out_indices=1)
    assert maps.model.conversion['partition_grid'] == 3


def test_arguments_that_do_not_fit_a_converted_folder(tmp_path):
    folder = save_folder(evavit.convert_vit(small_vit(), window_size=1), tmp_path / 'mine', data='x', licence='mit')
    for kwargs, message in (
        (dict(pretrained=True), 'load_converted takes no pretrained: model and weights are those of'),
        (dict(num_classes=5), 'not the weights of config.json with num_classes=5: .*head'),
        (dict(partition_grid=0), 'not the weights of config.json with partition_grid=0: .*summary'),
        (dict(partition_grid=-1), 'config.json with partition_grid=-1 makes no model: .*partition_grid'),
        (dict(windw_size=5), 'config.json with windw_size=5 makes no model: .*windw_size'),
        (
            dict(features_only=True, out_indices=[9]),
            r'config.json with out_indices=\[9\], features_only=True makes no m',
        ),
    ):
        with pytest.raises((ValueError, RuntimeError), match=message) as caught:
            load_converted(folder, **kwargs)
        assert '\n' not in str(caught.value)


def test_names_of_the_classes_decide_the_labels(tmp_path, monkeypatch):
    """Of a folder and of a repository, however its kind is written."""
    names = list(reversed(CLASSES))
    model = timm.create_model(PLAIN[0], **{**PLAIN[1], 'num_classes': len(names)})
    folder = save_folder(model, tmp_path / 'mine', data='x', licence='mit', label_names=names)
    monkeypatch.setattr('evavit.hub.download_from_hf', lambda name, file: str(folder / file))
    places = f'local-dir:{folder}', f'LOCAL-DIR:{folder}', 'hf-hub:me/mine', 'HF_HUB:me/mine'
    for flags in (['--checkpoint', str(folder)], *(['--model', place, '--pretrained'] for place in places)):
        for script in ('validate', 'export'):
            assert complete_from_checkpoint(*parse_settings(script, flags)) == names
    config = json.loads((folder / 'config.json').read_text())
    for damaged in (names[:2], 5, [1, 2, 3], ['a', 'a', 'b']):
        (folder / 'config.json').write_text(json.dumps({**config, 'label_names': damaged}))
        with pytest.raises(UserError, match=r'label_names in its config\.json: .*; give --class-map FILE'):
            complete_from_checkpoint(*parse_settings('validate', ['--checkpoint', str(folder)]))


def test_a_folder_as_the_model_of_another_file(tmp_path, monkeypatch):
    """Classes are those of the weights, and so is what their own file says; the rest is as the folder says."""
    model, about = timm.create_model(PLAIN[0], **PLAIN[1]), dict(mean=(0.1,), crop_mode='squash')
    labels = dict(label_names=['a', 'b', 'c'], data_config=about)
    folder = save_folder(model, tmp_path / 'mine', data='x', licence='mit', **labels)
    softmax = save_folder(small_vit(), tmp_path / 'softmax', data='x', licence='mit')
    converted = evavit.convert_vit(small_vit(), attention='local', window_size=2)
    save_folder(converted, tmp_path / 'local', data='x', licence='mit', label_names=['a', 'b', 'c'])
    monkeypatch.setattr('evavit.hub.download_from_hf', lambda name, file: str(folder / file))

    def completed(file, *flags):
        config, given = parse_settings('validate', ['--checkpoint', str(file), *flags])
        return complete_from_checkpoint(config, given), config.model

    run = dict(model=PLAIN[0], model_kwargs=PLAIN[1], class_names=['x', 'y', 'z'], mean=[0.3])
    old = {**run, 'model': 'hf-hub:me/mine', 'model_kwargs': None, 'mean': None}  # before runs stood by themselves
    tagged = {**run, 'model': f'{PLAIN[0]}.in1k'}  # of a timm model with a tag, which its folder has not
    for name, settings in (('run', run), ('tagged', tagged), ('old', old), ('plain', {})):
        metadata = dict(args=json.dumps(settings))
        evavit.models.write_weights(model.state_dict(), tmp_path / f'{name}.safetensors', metadata)
    for place in (f'local-dir:{folder}', 'hf-hub:me/mine'):
        names, about = completed(tmp_path / 'run.safetensors', '--model', place)
        assert names == ['x', 'y', 'z'] and about.mean == [0.3] and about.model == PLAIN[0]
        assert completed(tmp_path / 'tagged.safetensors', '--model', place)[1].mean == [0.3]
        for name, wanted in (('old', ['x', 'y', 'z']), ('plain', None)):
            names, about = completed(tmp_path / f'{name}.safetensors', '--model', place)
            assert names == wanted and (about.model, about.mean, about.crop_mode) == (
                PLAIN[0],
                [0.1],
                'squash',
            )
            assert about.model_kwargs['embed_dim'] == PLAIN[1]['embed_dim']
    names, about = completed(tmp_path / 'local/model.safetensors', '--model', f'local-dir:{tmp_path / "local"}')
    assert (about.convert, about.num_classes, names) == ('local', 3, ['a', 'b', 'c'])
    with pytest.raises(
        UserError, match=r'old\.safetensors: its model hf-hub:me/mine lies elsewhere, .*; if it is not, add'
    ):
        completed(tmp_path / 'old.safetensors')
    for source in (tmp_path / 'local', tmp_path / 'local/model.safetensors'):
        with pytest.raises(
            UserError, match=r"another model than that of .* \(convert None, not 'local'\); leave --model"
        ):
            completed(source, '--model', f'local-dir:{softmax}')
    with pytest.raises(UserError, match=r"\(model 'vit_tiny_patch16_224', not 'eva_deit_tiny'\); leave --model out"):
        completed(tmp_path / 'run.safetensors', '--model', f'local-dir:{softmax}')
    save_folder(
        timm.create_model(PLAIN[0], **{**PLAIN[1], 'proposal_scale': 4.0}), tmp_path / 'x', data='x', licence='mit'
    )
    with pytest.raises(UserError, match=r'\(proposal_scale 4.0, not .*\); leave --model out'):
        completed(folder, '--model', f'local-dir:{tmp_path / "x"}')


@pytest.mark.parametrize('place', ['top', 'pretrained_cfg'])
def test_names_of_the_classes_as_timm_writes_them(tmp_path, place):
    """As {number: name}, or within pretrained_cfg: they decide the labels all the same."""
    names = list(reversed(CLASSES))
    model = timm.create_model(PLAIN[0], **{**PLAIN[1], 'num_classes': len(names)})
    folder = save_folder(model, tmp_path / 'mine', data='x', licence='mit')
    config = json.loads((folder / 'config.json').read_text())
    flags = ['--model', f'local-dir:{folder}', '--pretrained']
    for given in ({str(number): name for number, name in enumerate(names)}, names):
        changed = {**config, 'label_names': given}
        if place != 'top':
            changed = {**config, place: {**config['pretrained_cfg'], 'label_names': given}}
        (folder / 'config.json').write_text(json.dumps(changed))
        assert complete_from_checkpoint(*parse_settings('validate', ['--checkpoint', str(folder)])) == names
        assert learnt_classes(parse_settings('train', [*flags, '--data-dir', 'x'])[0].model) == names
    (folder / 'config.json').write_text(json.dumps({**config, 'label_names': {'1': 'a', '2': 'b', '3': 'c'}}))
    with pytest.raises(UserError, match=r'config\.json is damaged \(label_names are not of classes 0 to 2\)'):
        complete_from_checkpoint(*parse_settings('validate', ['--checkpoint', str(folder)]))


def test_a_pipe_in_a_folder_is_not_waited_for(tmp_path):
    (tmp_path / 'mine').mkdir()
    os.mkfifo(tmp_path / 'mine' / 'model.safetensors')
    with pytest.raises(ValueError, match=r'mine: has a model\.safetensors that save_folder did not write'):
        save_folder(timm.create_model(PLAIN[0], **PLAIN[1]), tmp_path / 'mine', data='x', licence='mit')


def test_what_is_no_folder_of_a_converted_model(tmp_path):
    folder = save_folder(timm.create_model(PLAIN[0], **PLAIN[1]), tmp_path / 'mine', data='Digits', licence='mit')
    with pytest.raises(ValueError, match=r"not a converted model; timm.create_model\('local-dir:"):
        load_converted(folder)
    with pytest.raises(ValueError, match=r'no config\.json'):
        load_converted(tmp_path)
    with pytest.raises(ValueError, match=r'vit_tiny_patch16_224: no such folder, so no model; give a folder of'):
        load_converted('vit_tiny_patch16_224')


def test_a_folder_of_timms_that_lost_the_conversion(tmp_path):
    """timm's save_for_hf has no place for it: every reader says so, and what writes it."""
    args = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=3)
    model = evavit.convert_vit(timm.create_model('vit_tiny_patch16_224', **args), window_size=2)
    folder = tmp_path / 'mine'
    timm.models.save_for_hf(model, str(folder))
    line = r'mine: its weights are of a converted model .* says no conversion: .* by evavit\.hub\.save_folder \(publish'
    with pytest.raises(ValueError, match=line) as caught:
        load_converted(folder)
    assert '\n' not in str(caught.value)
    settings = ModelConfig(model=f'local-dir:{folder}', pretrained=True)
    with pytest.raises(UserError, match=line):
        build_model(settings, 3)
    settings.convert, settings.convert_kwargs = 'eva', dict(window_size=2)
    again = build_model(settings, 3)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    (folder / 'config.json').write_text(json.dumps({'architecture': 'x', 'evavit_convert': {'model': 1}}))
    with pytest.raises(ValueError, match=r'config\.json is damaged \(evavit_convert has model\)'):
        load_converted(folder)


def test_the_folder_of_a_converted_run(tmp_path, monkeypatch):
    """train.py --convert, then the network in Python: its weights, its size, how its images are prepared."""
    write_images(tmp_path / 'data/train', dict.fromkeys(CLASSES, 4))
    write_images(tmp_path / 'data/validation', dict.fromkeys(CLASSES, 2))
    flags = words(
        '--data-dir data --model vit_tiny_patch16_224 --img-size 32 --convert eva --convert-kwargs window_size=1'
    )
    flags += words('--model-kwargs patch_size=8 embed_dim=32 depth=2 num_heads=2 --mean 0.1 0.2 0.3 --crop-pct 1')
    monkeypatch.chdir(tmp_path)
    load_script('train').main([*flags, *QUICK, '--experiment', 'mine'])
    load_script('train').main(['--data-dir', 'data', *MODEL, *QUICK, '--experiment', 'plain'])
    run = tmp_path / 'output' / 'mine'
    model = load_converted(run)
    assert model.conversion['window_size'] == 1 and model.patch_embed.grid_size == (4, 4) and model.num_classes == 3
    best = evavit.models.read_weights(run / 'model_best.safetensors')
    assert all(torch.equal(value, best[name]) for name, value in model.state_dict().items())
    config = timm.data.resolve_data_config(model=model)
    assert [*config['mean']] == [0.1, 0.2, 0.3] and config['crop_pct'] == 1 and config['input_size'] == (3, 32, 32)
    assert model.pretrained_cfg['label_names'] == list(CLASSES)
    folder = save_folder(model, tmp_path / 'folder', data='x', licence='mit')  # with the run's names, while they fit
    assert json.loads((folder / 'config.json').read_text())['label_names'] == list(CLASSES)
    assert load_converted(folder).pretrained_cfg['label_names'] == list(CLASSES)
    model.reset_classifier(5)
    assert 'label_names' not in json.loads(
        (save_folder(model, tmp_path / 'five', data='x', licence='mit') / 'config.json').read_text()
    )
    net = load_converted(run, features_only=True, out_indices=1, img_size=48)
    assert [*timm.data.resolve_data_config(model=net)['mean']] == [0.1, 0.2, 0.3]
    assert torch.equal(net.model.blocks[1].attn.qkv.weight, best['blocks.1.attn.qkv.weight'])
    assert net(torch.randn(1, 3, 48, 48))[0].shape == (1, 32, 6, 6)
    last = load_converted(str(run / 'last.safetensors'))
    assert torch.equal(last.head.weight, evavit.models.read_weights(run / 'last.safetensors')['head.weight'])
    for source, message in (
        (
            tmp_path / 'output' / 'plain',
            r"plain: not a converted model; timm.create_model\('eva_deit_tiny', checkpoint_path=",
        ),
        (run / 'last.pth.tar', 'is a file; give its folder, or a .safetensors file'),
        (tmp_path / 'data', r'no config\.json, so no model; give a folder of evavit.hub.save_folder, or of a run'),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            load_converted(source)
        assert '\n' not in str(caught.value)
    with pytest.raises(ValueError, match=r"features_only=True, pretrained=True, pretrained_cfg_overlay=dict\(file='"):
        load_converted(tmp_path / 'output' / 'plain', features_only=True)
    with pytest.raises(ValueError, match=r'--pretrained-path .*/model_best\.safetensors .* as --checkpoint .*/mine$'):
        source_folder(f'local-dir:{run}')
    with pytest.raises(ValueError, match=r'mine: the folder of a run, which wrote model_best\.safetensors; give an'):
        save_folder(model, run, data='x', licence='mit', overwrite=True)
    with safetensors.safe_open(run / 'last.safetensors', 'pt') as file:
        saved = json.loads(file.metadata()['args'])
    for changed, message in (
        ({'model_kwargs': {**saved['model_kwargs'], 'num_classes': 3}}, 'model_kwargs num_classes'),
        ({'model_kwargs': {**saved['model_kwargs'], 'args': {}}}, 'model_kwargs args'),
        ({'class_names': 5}, 'its settings are damaged .class_names are no list of names'),
        ({'mean': 'x'}, "its settings are damaged .mean 'x'"),
        ({'interpolation': 'zz'}, "its settings are damaged .interpolation 'zz'"),
    ):
        metadata = {'args': json.dumps({**saved, **changed})}
        safetensors.torch.save_file(model.state_dict(), tmp_path / 'x.safetensors', metadata)
        with pytest.raises(ValueError, match=message):
            load_converted(tmp_path / 'x.safetensors')
    evavit.models.write_weights(model.state_dict(), run / 'last.safetensors')
    with pytest.raises(ValueError, match=r'holds no settings of train\.py'):
        load_converted(run / 'last.safetensors')
    # A folder of an earlier version that holds both: the run's own weights are taken.
    shutil.move(save_folder(model, tmp_path / 'hub', data='x', licence='mit') / 'config.json', run)
    settings, given = parse_settings('validate', ['--checkpoint', str(run), '--data-dir', 'data'])
    complete_from_checkpoint(settings, given)
    assert settings.weights.checkpoint == str(run / 'model_best.safetensors')


def small_vit(**kwargs):
    return timm.create_model(
        'vit_tiny_patch16_224', img_size=32, **{**dict(embed_dim=32, depth=2, num_heads=2, num_classes=3), **kwargs}
    )


# entries of pretrained_cfg that no image can be prepared by
WRONG_PREPARATION = dict(
    mean=['x', [0.5] * 7, [math.nan] * 3, [2, 2, 2]],
    std=[0.5, [0, 0, 0], [True] * 3],
    crop_pct=[-1, 0, 1e-9, 'x', [0.9], math.nan],
    interpolation=['zzz', 5, ['bicubic']],
    crop_mode=['zzz', 5],
    input_size=['x', [3, 224], [3, 0, 224], [3, 224.5, 224]],
)


def test_damaged_folders_and_other_weights_are_one_line(tmp_path):
    folder = save_folder(evavit.convert_vit(small_vit(), window_size=1), tmp_path / 'mine', data='x', licence='mit')
    config = json.loads((folder / 'config.json').read_text())
    assert load_converted(folder).conversion['noise_std'] == 0
    for text, message in (
        ('{"architecture"', 'config.json is damaged'),
        ('[1]', 'config.json is damaged'),
        (json.dumps({**config, 'evavit_convert': []}), 'config.json is damaged'),
        (json.dumps({**config, 'evavit_convert': {'windw_size': 1}}), 'did you mean window_size'),
        (json.dumps({**config, 'architecture': 'vit_of_mine'}), 'config.json makes no model'),
        *(
            (json.dumps({**config, 'architecture': value}), 'damaged .architecture .* is no name of a model')
            for value in (5, '/tmp/x', '../x', 'hf-hub:evil/x', 'local-dir:x', 'a\nb')
        ),
        (json.dumps({**config, 'model_args': {**config['model_args'], 'depth': 1}}), 'not the weights of config.json'),
        (
            json.dumps({**config, 'model_args': {**config['model_args'], 'device': 'meta'}}),
            'device in model_args is no',
        ),
        *(
            (json.dumps({**config, 'model_args': {**config['model_args'], name: 'x'}}), f'{name} in model_args is no')
            for name in ('dtype', 'pretrained_strict', 'cache_dir')
        ),
        (json.dumps({**config, 'model_args': dict(checkpoint_path='x')}), 'checkpoint_path in model_args is no'),
        (
            json.dumps({**config, 'model_args': {**config['model_args'], 'depth': 10**7}}),
            'depth asks for 10000000, more than 1,000',
        ),
        (json.dumps({**config, 'model_args': [1]}), 'config.json is damaged'),
        (json.dumps({**config, 'pretrained_cfg': 5}), 'pretrained_cfg: holds no entries'),
        *(
            (
                json.dumps({**config, 'pretrained_cfg': {**config['pretrained_cfg'], name: value}}),
                f'cfg: {name} .* is n',
            )
            for name, values in WRONG_PREPARATION.items()
            for value in values
        ),
        *(
            (
                json.dumps({**config, 'pretrained_cfg': {**config['pretrained_cfg'], name: value}}),
                f'config.json is damaged .pretrained_cfg: {name} .* is no name of a module',
            )
            for name in ('classifier', 'first_conv')
            for value in (5, True, [1, 2], {'a': 1})
        ),
        ('[' * 100_000, f'{re.escape(str(folder))}: config.json is damaged'),
    ):
        (folder / 'config.json').write_text(text)
        with pytest.raises((ValueError, RuntimeError), match=message) as caught:
            load_converted(folder)
        assert '\n' not in str(caught.value)
    for name in ('x' * 5000, 'a\0b'):
        with pytest.raises(ValueError, match='no such folder, so no model'):
            load_converted(name)
    with pytest.raises(ValueError, match=r"^hf-hub:: .*; give a folder, or 'hf-hub:owner/name'$") as caught:
        load_converted('hf-hub:')
    assert '\n' not in str(caught.value)


def test_converted_weights_of_another_kind_of_number_are_one_line(tmp_path):
    folder = save_folder(evavit.convert_vit(small_vit(), window_size=1), tmp_path / 'mine', data='x', licence='mit')
    state = load_converted(folder).state_dict()
    safetensors.torch.save_file({**state, 'pos_embed': state['pos_embed'] > 0}, folder / 'model.safetensors')
    with pytest.raises(RuntimeError, match='has in another type of number pos_embed') as error:
        load_converted(folder)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    'error, message',
    [
        (LocalEntryNotFoundError('a long\ntext'), 'the Hugging Face Hub cannot be reached, .* fetched elsewhere'),
        (OfflineModeIsEnabled('offline'), 'the Hugging Face Hub cannot be reached'),
        (RuntimeError('no\nspace'), 'no space'),
    ],
)
def test_the_hub_that_cannot_be_reached_is_one_line(monkeypatch, error, message):
    def fail(*_):
        raise error

    monkeypatch.setattr('evavit.hub.download_from_hf', fail)
    with pytest.raises(ValueError, match=f"^hf-hub:x/y: {message}.*; give a folder, or 'hf-hub:owner/name'$") as caught:
        load_converted('hf-hub:x/y')
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('change', [evavit.convert_vit, lambda model: model], ids=['converted', 'plain'])
def test_what_cannot_be_made_again_is_not_saved(tmp_path, change):
    pruned = change(small_vit())
    pruned.prune_intermediate_layers([0], prune_norm=False, prune_head=False)
    by_hand = VisionTransformer(img_size=32, embed_dim=32, depth=1, num_heads=2, num_classes=3)
    for model, message in (
        (pruned, r'blocks\.1\..* differs, as after prune_intermediate_layers; make it with its own depth'),
        (change(small_vit(features_only=True, out_indices=[1])), 'features_only=True cannot be saved'),
        (change(by_hand), 'has no pretrained_cfg.*timm.create_model'),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            save_folder(model, tmp_path / 'mine', data='x', licence='mit')
        assert '\n' not in str(caught.value) and not (tmp_path / 'mine').exists()


def test_an_argument_that_is_no_name_is_not_saved(tmp_path):
    model = small_vit(act_layer=torch.nn.ReLU)
    with pytest.raises(ValueError, match=r"^act_layer <class.*: config\.json cannot hold .* as act_layer='relu'"):
        save_folder(model, tmp_path / 'mine', data='x', licence='mit')
    named = small_vit(act_layer='relu', norm_layer='layernorm')
    save_folder(named, tmp_path / 'mine', data='x', licence='mit')


def test_the_card_says_what_the_weights_are(tmp_path, monkeypatch):
    name, kwargs = PLAIN
    model = timm.create_model(name, **kwargs)
    folder = save_folder(
        model,
        tmp_path / 'mine',
        data='Digits: 1,437 scans',
        licence='bsd-3-clause',
        recipe=dict(epochs=20, lr=2.5e-3, mixup=0.0, workers=4),
        metrics=dict(top1=96.1),
    )
    card = (folder / 'README.md').read_text()
    head = card.split('---')[1]
    assert 'license: bsd-3-clause' in head and '- evavit' in head
    for text in ('Digits: 1,437 scans', 'epochs: 20', 'lr: 0.0025', 'top1: 96.1', 'Image size: 32 x 48', 'zheng2023'):
        assert text in card
    assert 'workers' not in card  # no part of a recipe
    # The code on the card runs.
    from PIL import Image

    Image.new('RGB', (40, 40)).save(tmp_path / 'picture.jpg')
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(re.search(r'```python\n(.*?)```', card, re.DOTALL).group(1), scope)
    assert scope['probabilities'].shape == (1, 3)


def test_a_card_without_figures_says_so():
    details = model_card(timm.create_model(PLAIN[0], **PLAIN[1]), source='hf-hub:me/mine', data='x', licence='mit')[
        'details'
    ]
    assert details['Recipe'] == details['Metrics'] == 'not given'


def test_the_card_lists_what_was_used_alone():
    model = timm.create_model(PLAIN[0], **PLAIN[1])
    recipe = dict(lr=None, lr_base=1e-3, lr_base_size=1024, lr_base_scale='linear', grad_accum_steps=1, mixup=0.0)
    recipe |= dict(model_ema=False, model_ema_decay=0.9998, kd_model_name=None, kd_distill_type='logit', sched='none')
    recipe |= dict(warmup_epochs=5, pretrained_path='/home/me/weights.pth', aa='', no_aug=False)
    details = model_card(model, source='hf-hub:me/mine', data='x', licence='mit', recipe=recipe)['details']
    used = dict(lr_base=1e-3, lr_base_size=1024, lr_base_scale='linear', pretrained_path='weights.pth')
    assert details['Recipe'] == used
    recipe |= dict(lr=0.1, model_ema=True, kd_model_name='parent', sched='cosine', grad_accum_steps=2)
    details = model_card(model, source='hf-hub:me/mine', data='x', licence='mit', recipe=recipe)['details']
    used = dict(lr=0.1, model_ema=True, model_ema_decay=0.9998, kd_model_name='parent', kd_distill_type='logit')
    used |= dict(sched='cosine', warmup_epochs=5, grad_accum_steps=2, pretrained_path='weights.pth')
    assert details['Recipe'] == used


@pytest.mark.parametrize('attention', ['softmax', 'performer'])
def test_a_card_without_eva_does_not_speak_of_it(attention):
    kwargs = {key: value for key, value in PLAIN[1].items() if key in ('img_size', 'patch_size', 'embed_dim', 'depth')}
    model = timm.create_model(f'{attention}_deit_tiny', num_heads=2, num_classes=3, **kwargs)
    card = model_card(model, source='hf-hub:me/mine', data='x', licence='mit')
    assert 'citation' not in card and 'Papers' not in card['details'] and 'EVA' not in card['description']


def test_upload_is_the_same_folder(tmp_path, monkeypatch):
    """The Hub taken away: what would be uploaded loads as the local folder does."""
    uploaded = tmp_path / 'uploaded'

    class Api:
        def __init__(self, **kwargs):
            pass

        def create_repo(self, repo_id, **kwargs):
            return type('Url', (), {'repo_id': repo_id})

        def file_exists(self, **kwargs):
            return False

        def upload_folder(self, folder_path, **kwargs):
            import shutil

            shutil.copytree(folder_path, uploaded)

    monkeypatch.setattr('evavit.hub.HfApi', Api)
    model = timm.create_model(PLAIN[0], **PLAIN[1]).eval()
    publish(model, 'me/mine', data='Digits', licence='bsd-3-clause')
    x = torch.randn(1, 1, 32, 48)
    with torch.no_grad():
        assert torch.equal(timm.create_model(f'local-dir:{uploaded}', pretrained=True).eval()(x), model(x))
    assert "'hf-hub:me/mine'" in (uploaded / 'README.md').read_text()
    assert json.loads((uploaded / 'config.json').read_text())['architecture'] == 'eva_deit_tiny'


def test_a_card_that_was_edited_stays(tmp_path, caplog):
    model, card = small_vit(), dict(data='x', licence='mit')
    folder = save_folder(model, tmp_path / 'mine', metrics=dict(top1=1.5), **card)
    save_folder(model, folder, metrics=dict(top1=2.5), **card)
    assert 'top1: 2.5' in (folder / 'README.md').read_text() and not caplog.records
    (folder / 'README.md').write_text('---\nlicense: mit\n---\nmy own words')
    for _ in range(2):
        with torch.no_grad():
            model.head.weight.add_(1)
        save_folder(model, folder, **card)
        assert torch.equal(evavit.models.read_weights(folder / 'model.safetensors')['head.weight'], model.head.weight)
        assert (folder / 'README.md').read_text().endswith('my own words')
        assert f'{folder}/README.md is not what save_folder wrote there, and stays' in caplog.records.pop().message
    (folder / 'README.md').unlink()
    save_folder(model, folder, **card)
    (folder / 'README.md').write_text('my own words')
    save_folder(model, folder, overwrite=True, **card)
    assert 'evavit' in (folder / 'README.md').read_text() and not caplog.records


def test_averaged_weights_beside_files_of_others_are_not_a_folder_of_ours(tmp_path):
    model = small_vit()
    write_weights(model.state_dict(), tmp_path / 'model.safetensors')
    (tmp_path / 'README.md').write_text('---\nlicense: mit\n---\nmy own words')
    (tmp_path / 'config.json').write_text('{"architecture": "mine"}')
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match='did not write; give another folder, or overwrite=True'):
        save_folder(model, tmp_path, data='x', licence='mit')
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    save_folder(model, tmp_path, data='x', licence='mit', overwrite=True)
    assert json.loads((tmp_path / 'config.json').read_text())['architecture'] == 'vit_tiny_patch16_224'


def test_compiled_models_and_tied_weights_are_saved(tmp_path):
    model = small_vit()
    model.blocks[1].attn.qkv.weight = model.blocks[0].attn.qkv.weight
    folder = save_folder(torch.compile(model, backend='eager'), tmp_path / 'mine', data='x', licence='mit')
    again = timm.create_model(f'local-dir:{folder}', pretrained=True)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_files_of_others_are_not_replaced(tmp_path):
    """A folder that save_folder wrote is written anew; one with other people's files only if the user says so."""
    model, card = small_vit(), dict(data='x', licence='mit')
    folder = save_folder(model, tmp_path / 'mine', **card)
    assert save_folder(model, folder, **card) == folder
    for name in ('README.md', 'config.json', 'model.safetensors'):
        other = tmp_path / name.partition('.')[0]
        other.mkdir()
        (other / name).write_text('mine')
        with pytest.raises(ValueError, match=f'has a {re.escape(name)} that save_folder did not write') as caught:
            save_folder(model, other, **card)
        assert (other / name).read_text() == 'mine' and '\n' not in str(caught.value)
    save_folder(model, other, overwrite=True, **card)
    assert (other / 'config.json').is_file()


def test_torch_hub(tmp_path):
    """In a process of its own, so that nothing is imported or registered beforehand."""
    name, kwargs = PLAIN
    model = timm.create_model(name, **kwargs)
    torch.save(model.state_dict(), tmp_path / 'mine.pth')
    save_folder(model, tmp_path / 'folder', data='x', licence='mit')
    words = [ROOT / 'tests' / 'torch_hub.py', ROOT, tmp_path / 'mine.pth', tmp_path / 'folder', json.dumps(kwargs)]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize('fault, words', [('flipped', 'damaged'), ('text', 'nor written by torch.save')])
def test_torch_hub_names_a_file_that_is_none(fault, words, tmp_path):
    name, kwargs = PLAIN
    path = tmp_path / 'mine.safetensors' if fault == 'flipped' else tmp_path / 'mine.pth'
    write_weights(timm.create_model(name, **kwargs).state_dict(), path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content if fault == 'flipped' else b'text')
    with pytest.raises(RuntimeError, match=words) as told:
        torch.hub.load(str(ROOT), name, source='local', checkpoint_path=str(path), **kwargs)
    assert str(path) in str(told.value) and '\n' not in str(told.value)


@pytest.mark.parametrize('name', ['eva_deit_tiny', 'vit_tiny_patch16_224'])
def test_torch_hub_and_timm_name_a_damaged_folder(name, tmp_path):
    """timm alone finds it where the model is of this package."""
    folder = save_folder(timm.create_model(name, **SMALL), tmp_path / 'mine', data='x', licence='mit')
    path = folder / 'model.safetensors'
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    calls = [lambda: torch.hub.load(str(ROOT), 'timm_model', f'local-dir:{folder}', source='local', pretrained=True)]
    file = dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(path)))
    calls += [lambda: torch.hub.load(str(ROOT), 'timm_model', name, source='local', **file, **SMALL)]
    calls += [lambda: timm.create_model(f'local-dir:{folder}', pretrained=True)] if name.startswith('eva') else []
    for call in calls:
        with pytest.raises(RuntimeError, match='damaged: its SHA-256') as told:
            call()
        assert str(path) in str(told.value) and '\n' not in str(told.value)


@pytest.mark.parametrize('options', [dict(attention='local', window_size=2), dict(window_size=2, partition_grid=2)])
def test_torch_hub_loads_a_folder_of_a_converted_model_as_load_converted_does(options, tmp_path):
    vit = timm.create_model('vit_tiny_patch16_224', **{**SMALL, 'num_classes': 3})
    torch.nn.init.normal_(vit.blocks[0].attn.qkv.weight)
    model = evavit.convert_vit(vit, **options).eval()
    name, images = (
        f'local-dir:{save_folder(model, tmp_path / "mine", data="x", licence="mit")}',
        torch.randn(2, 3, 32, 32),
    )

    def load(**kwargs):
        return torch.hub.load(str(ROOT), 'timm_model', name, source='local', **kwargs)

    torch.testing.assert_close(load(pretrained=True).eval()(images), model(images), rtol=0, atol=0)
    for kwargs, line in (
        (dict(pretrained=True, num_classes=5), 'not the weights of config.json with num_classes=5'),
        ({}, 'add pretrained=True'),
    ):
        with pytest.raises((ValueError, RuntimeError), match=re.escape(line)) as told:
            load(**kwargs)
        assert '\n' not in str(told.value)
    if 'attention' not in options:  # as timm's save_for_hf leaves it
        config = json.loads((tmp_path / 'mine' / 'config.json').read_text())
        (tmp_path / 'mine' / 'config.json').write_text(json.dumps({**config, 'evavit_convert': None}))
        with pytest.raises(ValueError, match=r'its config\.json says no conversion'):
            load(pretrained=True)


def test_torch_hub_lists_every_model():
    scope = {}
    exec(compile((ROOT / 'hubconf.py').read_text(), 'hubconf.py', 'exec'), scope)
    for name in [*timm.list_models('*_deit_tiny', module='eva_deit'), 'eva_pvt_v2_b3']:
        assert callable(scope[name]) and scope[name].__doc__


def test_a_card_that_lacks_something_is_one_line(tmp_path):
    model = timm.create_model('eva_deit_tiny', depth=1, num_classes=3)
    for given, message in (
        (dict(licence='mit'), "data: the model card needs data='ImageNet-1k'"),
        (dict(data='x'), 'licence: the model card needs licence='),
        (dict(data='x', license='mit'), "license: the model card needs licence='apache-2.0', spelt so"),
        (dict(data='x', licence='mit', label_names=['one']), 'label_names has 1 names, the model 3 classes'),
        (dict(data='x', licence='mit', label_names='abc'), "label_names 'abc': must be a list of names that differ"),
        (dict(data='x', licence='mit', label_names=['a', 'b', 'b']), 'must be a list of names that differ'),
        (dict(data=None, licence='mit'), "data None: must be a line of text, such as data='ImageNet-1k'"),
        (dict(data=' ', licence='mit'), "data ' ': must be a line"),
        (dict(data='x', licence=3), 'licence 3: must be a line'),
        (dict(data='x', licence=''), "licence '': must be a line"),
        (dict(data='x', licence='mit\ntags: []'), 'licence .* must be a line'),
        (dict(data='x', licence='mit', data_config={'mean': 'x'}), "data_config: mean 'x' is not a number of 0 to 1"),
        (dict(data='x', licence='mit', data_config={'crop_pct': math.nan}), 'data_config: crop_pct nan'),
        (dict(data='x', licence='mit', data_config={'mean': torch.ones(3)}), 'data_config: must hold plain numbers'),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            save_folder(model, str(tmp_path / 'folder'), **given)
        assert '\n' not in str(caught.value)
    with torch.no_grad():
        model.head.bias.fill_(math.nan)
    with pytest.raises(ValueError, match=r'^the weights are not finite \(head.bias has'):
        save_folder(model, tmp_path / 'folder', data='x', licence='mit')
    assert not (tmp_path / 'folder').exists()


@pytest.mark.parametrize('name', ['README.md', 'config.json', 'model.safetensors'])
def test_a_folder_of_other_files_is_left(tmp_path, name):
    """A model that is saved anew, or into a new repository of the Hub, is not in the way."""
    model = timm.create_model(PLAIN[0], **PLAIN[1])
    (tmp_path / name).write_text('{"my": 1}')
    with pytest.raises(ValueError, match=f'has a {name} that save_folder did not write'):
        save_folder(model, tmp_path, data='x', licence='mit')
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == '{"my": 1}'
    (tmp_path / name).unlink()
    (tmp_path / 'README.md').write_text('---\nlicense: mit\n---\n')
    for _ in range(2):
        save_folder(model, tmp_path, data='x', licence='mit')
    assert (tmp_path / 'README.md').read_text() == '---\nlicense: mit\n---\n'


def test_the_run_s_images_and_sizes_that_are_none(tmp_path):
    """A grey run had one mean, the average of the three that timm knows."""
    kwargs = dict(img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2)
    model = evavit.convert_vit(timm.create_model('vit_tiny_patch16_224', in_chans=1, num_classes=3, **kwargs))
    settings = dict(model='vit_tiny_patch16_224', model_kwargs=kwargs, in_chans=1, num_classes=3, convert='eva')
    path = tmp_path / 'last.safetensors'
    evavit.models.write_weights(model.state_dict(), path, {'args': json.dumps(settings)})
    config = timm.data.resolve_data_config(model=load_converted(path))
    assert config['input_size'] == (1, 32, 32) and config['mean'] == (0.5,) and config['std'] == (0.5,)
    assert timm.data.create_transform(**config)(Image.new('L', (40, 40))).shape == (1, 32, 32)
    for size in (0, -16, 7, 1.5, '96', True, (64,), [64, 64, 64], (64, 'a')):
        with pytest.raises(ValueError, match='takes a side, or height and width, in pixels, of at least a patch'):
            load_converted(path, img_size=size)
