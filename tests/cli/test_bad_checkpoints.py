"""The scripts on checkpoints that are damaged, or made to do harm: one line, exit code 2, nothing believed."""

import json

import pytest
import safetensors.torch
import timm
import torch
from runs import MODEL, QUICK, weights

import evavit
from evavit.hub import save_folder


@pytest.fixture
def offline(monkeypatch):
    """Whoever asks for a file of the network fails the test."""

    def fetch(*_, **__):
        raise AssertionError('it goes to the network')

    monkeypatch.setattr('timm.models._hub.hf_hub_download', fetch)


def loaders(path, images, folder):
    """The command lines that read a checkpoint's settings: {script: words}."""
    return {
        'validate': ['--checkpoint', path, '--data-dir', images, '--device', 'cpu', '--workers', '0'],
        'export': [folder / 'model.pt2', '--checkpoint', path, '--device', 'cpu'],
    }


@pytest.mark.parametrize(
    'settings, words',
    [
        ([1, 2], 'its settings are not names with plain values'),
        (dict(model='hf-hub:x/y', num_classes=3), 'its model hf-hub:x/y lies elsewhere'),
        (dict(model='eva_deit_tiny', num_classes=-3), 'does not fit num_classes'),
        (dict(model='eva_deit_tiny', num_classes=3, model_kwargs=dict(features_only=True)), 'it has no classes'),
        (dict(model='eva_deit_tiny', class_names={'a': 1}), 'its class_names is'),
    ],
)
def test_settings_that_no_run_has(call, images, tmp_path, offline, settings, words):
    path = tmp_path / 'file.safetensors'
    safetensors.torch.save_file({'weight': torch.ones(2)}, path, dict(args=json.dumps(settings)))
    for script, flags in loaders(path, images, tmp_path).items():
        code, _, err = call(script, *flags)
        assert code == 2 and len(err.splitlines()) == 1 and words in err, err
        assert str(path) in err or 'model_kwargs' in settings
    assert not (tmp_path / 'model.pt2').exists()


def test_a_converted_checkpoint_under_the_name_of_a_model_of_ours(call, images, tmp_path):
    path = tmp_path / 'file.safetensors'
    args = dict(model='vit_tiny_patch16_224', convert='eva', num_classes=3)
    safetensors.torch.save_file({'weight': torch.ones(2)}, path, dict(args=json.dumps(args)))
    vit = timm.create_model('vit_tiny_patch16_224', img_size=32, depth=1, num_classes=3)
    folder = save_folder(evavit.convert_vit(vit, window_size=1), tmp_path / 'mine', data='x', licence='mit')
    for source, file in ((path, path), (folder, folder / 'model.safetensors')):
        for script, flags in loaders(source, images, tmp_path).items():
            code, _, err = call(script, *flags, '--model', 'eva_deit_tiny')
            assert code == 2 and err == (
                f'error: --model eva_deit_tiny: {file} is a converted vit_tiny_patch16_224; leave --model out, the '
                f'checkpoint names it\n'
            )


@pytest.mark.parametrize('dtype', [torch.complex64, torch.int8])
def test_weights_of_another_kind_of_number(train, call, images, tmp_path, dtype):
    """PyTorch would take the real part, or the whole numbers, without a word."""
    state = weights(train('run') / 'last.safetensors')
    torch.save({name: value.to(dtype) for name, value in state.items()}, tmp_path / 'file.pth')
    place = [*MODEL, *QUICK, '--data-dir', images, '--output', tmp_path, '--experiment', 'new']
    for script, *flags in (
        ('validate', *MODEL, '--num-classes', '3', *loaders(tmp_path / 'file.pth', images, tmp_path)['validate']),
        ('train', *place, '--initial-checkpoint', tmp_path / 'file.pth'),
        ('train', *place, '--pretrained-path', tmp_path / 'file.pth'),
    ):
        code, _, err = call(script, *flags)
        assert code == 2 and 'has in another type of number' in err and len(err.splitlines()) == 1, err


def test_a_classifier_of_one_number(train, call, images, tmp_path):
    state = weights(train('run') / 'last.safetensors')
    torch.save({**state, 'head.weight': torch.tensor(1.0)}, tmp_path / 'file.pth')
    flags = [*MODEL, *QUICK, '--data-dir', images, '--output', tmp_path, '--experiment', 'new']
    code, _, err = call('train', *flags, '--initial-checkpoint', tmp_path / 'file.pth')
    assert code == 2 and 'the file has head.weight of one number' in err and len(err.splitlines()) == 1, err
    code, _, err = call('train', *flags, '--pretrained-path', tmp_path / 'file.pth')  # as one of other classes
    assert code == 0, err


@pytest.mark.parametrize('dtype', [torch.bool, torch.int64, torch.float64])
def test_weights_of_timm_of_another_kind_of_number(call, images, tmp_path, dtype):
    vit = timm.create_model('vit_tiny_patch16_224', img_size=32, depth=1, num_classes=3)
    folder = save_folder(vit, tmp_path / 'mine', data='x', licence='mit')
    state = vit.state_dict()
    name = 'pos_embed'
    torch.save({'model': {**state, name: state[name].to(dtype)}}, tmp_path / 'file.pth')
    safetensors.torch.save_file({**state, name: state[name].to(dtype)}, folder / 'model.safetensors')
    one = ['vit_tiny_patch16_224', '--model-kwargs', 'depth=1', '--pretrained-path', tmp_path / 'file.pth']
    for number, flags in enumerate((['--model', *one], ['--model', f'local-dir:{folder}', '--pretrained'])):
        place = ['--data-dir', images, '--output', tmp_path, '--experiment', str(number), '--img-size', '32']
        code, _, err = call('train', *flags, *QUICK, *place)
        if dtype is torch.float64:
            assert code == 0, err
        else:
            assert code == 2 and f'has in another type of number {name}' in err and len(err.splitlines()) == 1, err


@pytest.mark.parametrize('name', ['last.pth.tar', 'last.safetensors'])
def test_one_flipped_bit_is_noticed_by_every_script(train, call, images, tmp_path, name):
    path = train('run') / name
    content = bytearray(path.read_bytes())
    content[content.index(b'PK\x01\x02') + 38 if name.endswith('tar') else -9] ^= 0x10
    path.write_bytes(content)
    flags = loaders(path, images, tmp_path)
    place = ['--data-dir', images, '--output', tmp_path, '--experiment']
    flags['train'] = [*MODEL, *QUICK, *place, 'new', '--initial-checkpoint', path]
    for script, words in flags.items():
        code, _, err = call(script, *words)
        assert code == 2 and len(err.splitlines()) == 1, err
        assert f'{path}: not a readable checkpoint' in err and 'SHA-256' in err
    with pytest.raises(RuntimeError, match='SHA-256'):
        evavit.models.read_weights(path)


def test_a_file_s_name_does_not_reach_the_terminal_as_it_is(call, images, tmp_path):
    """It may be a command to the terminal, or look like another line of the log."""
    name = 'bad\x1b[2J\nepoch 7: done.png'
    for split in ('train', 'val'):
        for image in (images / split).rglob('*.png'):
            copy = tmp_path / 'images' / image.relative_to(images)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(image.read_bytes())
    (tmp_path / 'images' / 'train' / 'apple' / name).write_text('no image')
    flags = [*MODEL, *QUICK, '--data-dir', tmp_path / 'images', '--output', tmp_path]
    code, out, err = call('train', *flags, '--experiment', 'run', '--max-bad-images', '0.5')
    assert code == 0, err
    assert (
        '\x1b' not in out and 'bad\\x1b[2J' in out and not any(line.startswith('epoch 7') for line in out.splitlines())
    )
    code, out, err = call('train', *flags, '--experiment', 'other', '--max-bad-images', '0')
    assert code == 2 and '\x1b' not in out + err and len(err.splitlines()) == 1 and 'bad\\x1b[2J' in err, err
