"""tools/avg_checkpoints.py and save_for_hub.py on a run of train.py."""

import hashlib
import json
from pathlib import Path

import pytest
import timm
import torch
from programs import load_program
from runs import CLASSES, MODEL, QUICK, load_script, weights, write_images

from evavit.errors import run_script

TOOLS = Path(__file__).parents[2] / 'tools'


def tool(name):
    module = load_program(f'tools/{name}.py')
    return lambda *flags: run_script(module.main, [str(flag) for flag in flags])


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A finished run of two epochs, its images beside it."""
    root = tmp_path_factory.mktemp('run')
    write_images(root / 'images' / 'train', dict.fromkeys(CLASSES, 8))
    write_images(root / 'images' / 'val', dict.fromkeys(CLASSES, 4))
    flags = [*MODEL, *QUICK, '--data-dir', root / 'images', '--output', root, '--experiment', 'run', '--seed', '3']
    assert run_script(load_script('train').main, [str(flag) for flag in flags]) == 0
    return root / 'run'


def test_average(run, tmp_path, capsys):
    out = tmp_path / 'mean.safetensors'
    assert tool('avg_checkpoints')('--input', run, '--output', out) == 0
    states = [torch.load(path, weights_only=False)['state_dict'] for path in sorted(run.glob('checkpoint-*.pth.tar'))]
    assert len(states) == 2 and not torch.equal(states[0]['norm.weight'], states[1]['norm.weight'])
    mean = weights(out)
    for name, value in mean.items():
        torch.testing.assert_close(value, sum(state[name] for state in states) / 2)
    best = tmp_path / 'best.pth'
    assert tool('avg_checkpoints')('--input', run, '--output', best, '-n', '1') == 0
    best_state = torch.load(run / 'model_best.pth.tar', weights_only=False)['state_dict']
    assert all(torch.equal(value, best_state[name]) for name, value in torch.load(best).items())
    capsys.readouterr()
    for flags, word in (
        (['--input', run, '--output', out], 'exists'),
        (['--input', tmp_path / 'no'], 'no file'),
        (['--input', run, '--output', tmp_path / 'x.pth', '-n', '0'], '-n 0'),
    ):
        assert tool('avg_checkpoints')(*flags) == 2
        line = capsys.readouterr().err.strip()
        assert word in line and '\n' not in line


def test_clean(run, tmp_path, capsys):
    one = ('--input', run / 'last.pth.tar', '--output')
    assert tool('avg_checkpoints')(*one, tmp_path / 'mine.pth', '--hash') == 0
    (file,) = tmp_path.iterdir()
    assert file.name == f'mine-{hashlib.sha256(file.read_bytes()).hexdigest()[:8]}.pth'
    clean, last = torch.load(file), weights(run / 'last.safetensors')
    assert clean.keys() == last.keys() and all(torch.equal(clean[name], last[name]) for name in last)
    (tmp_path / 'cut.pth').write_bytes(file.read_bytes()[:1000])
    capsys.readouterr()
    assert tool('avg_checkpoints')('--input', tmp_path / 'cut.pth', '--output', tmp_path / 'x.pth') == 2
    assert 'cut.pth: not a readable checkpoint' in capsys.readouterr().err


def test_folder_for_the_hub(run, tmp_path, capsys):
    results = tmp_path / 'validation.csv'
    flags = [
        '--checkpoint',
        run / 'last.safetensors',
        '--data-dir',
        run.parent / 'images',
        '--workers',
        '0',
        '--device',
        'cpu',
        '--results-file',
        results,
    ]
    assert run_script(load_script('validate').main, [str(flag) for flag in flags]) == 0
    save = tool('save_for_hub')
    assert (
        save(
            '--checkpoint',
            run / 'last.safetensors',
            '--output',
            tmp_path / 'hub',
            '--data',
            'three fruits',
            '--licence',
            'mit',
            '--results-file',
            results,
        )
        == 0
    )
    model = timm.create_model(f'local-dir:{tmp_path / "hub"}', pretrained=True)
    ours = weights(run / 'last.safetensors')
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in ours.items())
    config = json.loads((tmp_path / 'hub' / 'config.json').read_text())
    assert config['label_names'] == list(CLASSES)
    card = (tmp_path / 'hub' / 'README.md').read_text()
    assert 'three fruits' in card and 'seed: 3' in card and 'top1: ' in card and 'epochs: 2' in card
    torch.save(model.state_dict(), tmp_path / 'bare.pth')
    capsys.readouterr()
    bare = ['--checkpoint', tmp_path / 'bare.pth', '--output', tmp_path / 'no']
    assert save(*bare, '--data', 'x', '--licence', 'x') == 2
    assert 'holds no settings' in capsys.readouterr().err


def test_outputs_that_cannot_be_written(run, tmp_path, capsys):
    (tmp_path / 'file').touch()
    checkpoint = run / 'last.safetensors'
    for name, flags, word in (
        (
            'save_for_hub',
            ['--checkpoint', checkpoint, '--output', tmp_path / 'file', '--data', 'x', '--licence', 'x'],
            'cannot be written',
        ),
        ('avg_checkpoints', ['--input', run, '--output', tmp_path / 'file' / 'mean.pth'], 'cannot be written'),
        ('avg_checkpoints', ['--input', run, '--output', tmp_path / 'mean.txt'], '.pth or .safetensors'),
        ('avg_checkpoints', ['--input', checkpoint, '--output', tmp_path / 'mean.txt'], '.pth or .safetensors'),
    ):
        assert tool(name)(*flags) == 2
        line = capsys.readouterr().err.strip()
        assert line.startswith('error: --output') and word in line and '\n' not in line
