"""tools/avg_checkpoints.py and save_for_hub.py on a run of train.py."""

import argparse
import errno
import hashlib
import json
import os
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from programs import load_program
from runs import CLASSES, MODEL, QUICK, load_script, rows, weights, write_bad_weights, write_images

from evavit.errors import UserError, run_script
from evavit.files import is_stamped
from evavit.models import write_weights

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
    bad = tmp_path / 'bad.pth'
    torch.save(dict(weight=torch.tensor([1.0, float('nan')])), bad)
    (tmp_path / 'link.pth').symlink_to(tmp_path / 'nowhere')
    capsys.readouterr()
    for flags, word in (
        (['--input', run, '--output', out], 'exists'),
        (['--input', run, '--output', tmp_path / 'link.pth'], 'exists'),
        (['--input', tmp_path / 'no'], 'no file'),
        (['--input', run, '--output', tmp_path / 'x.pth', '-n', '0'], '-n 0'),
        (['--input', run, '--filter', '/x'], "--filter '/x': Non-relative patterns"),
        (['--input', run, '--filter', ''], "--filter '': Unacceptable pattern"),
        (['--input', bad, '--output', tmp_path / 'x.pth'], f'{bad}: its weights are not finite (weight has NaN'),
    ):
        assert tool('avg_checkpoints')(*flags) == 2
        line = capsys.readouterr().err.strip()
        assert word in line and '\n' not in line


def test_an_epoch_of_several_names_counts_once(run, tmp_path, capsys):
    """Links and copies of it: last, best and previous, also as weights alone."""
    one, all_names = tmp_path / 'one.safetensors', tmp_path / 'all.safetensors'
    assert tool('avg_checkpoints')('--input', run, '--output', one) == 0
    capsys.readouterr()
    assert tool('avg_checkpoints')('--input', run, '--output', all_names, '--filter', '*.[ps][ta][hf]*') == 0
    out = capsys.readouterr().out
    for name in ('last.pth.tar', 'last.safetensors'):
        assert f'{name} holds the weights of checkpoint-1.pth.tar, and is left out' in out
    expected = weights(one)
    for name, value in weights(all_names).items():
        torch.testing.assert_close(value, expected[name])


def test_an_epoch_of_several_starts_counts_once(tmp_path, capsys):
    """Its settings say by which flags the run went on; what is trained by them is the same."""
    for name, value, resume in (('last', 1.0, 'auto'), ('previous', 1.0, None), ('model_best', 4.0, None)):
        about = argparse.Namespace(model='x', resume=resume, workers=len(name))
        torch.save(dict(state_dict={'weight': torch.full((2,), value)}, args=about), tmp_path / f'{name}.pth.tar')
    out = tmp_path / 'mean.pth'
    assert tool('avg_checkpoints')('--input', tmp_path, '--output', out, '--filter', '*.tar') == 0
    assert 'previous.pth.tar holds the weights of last.pth.tar, and is left out' in capsys.readouterr().out
    assert torch.equal(torch.load(out)['weight'], torch.full((2,), 2.5))


def test_the_best_by_loss_has_the_smallest(tmp_path, capsys):
    for number, metric in enumerate((0.5, 0.2, 0.9)):
        about = dict(args=argparse.Namespace(model='x', eval_metric='loss'), metric=metric, epoch=number)
        torch.save(
            {'state_dict': {'weight': torch.full((2,), metric)}, **about}, tmp_path / f'checkpoint-{number}.pth.tar'
        )
    out = tmp_path / 'best.pth'
    assert tool('avg_checkpoints')('--input', tmp_path, '--output', out, '-n', '1') == 0, capsys.readouterr().err
    assert torch.equal(torch.load(out)['weight'], torch.full((2,), 0.2))
    about['args'].eval_metric = 'top1'
    torch.save({'state_dict': {'weight': torch.zeros(2)}, **about}, tmp_path / 'checkpoint-3.pth.tar')
    assert tool('avg_checkpoints')('--input', tmp_path, '--output', tmp_path / 'x.pth') == 2
    assert 'its files were ranked by loss and top1; name those of one with --filter' in capsys.readouterr().err


def test_clean(run, tmp_path, capsys):
    one = ('--input', run / 'last.pth.tar', '--output')
    assert tool('avg_checkpoints')(*one, tmp_path / 'mine.pth', '--hash') == 0
    (file,) = tmp_path.iterdir()
    assert file.name == f'mine-{hashlib.sha256(file.read_bytes()).hexdigest()[:8]}.pth'
    clean, last = torch.load(file), weights(run / 'last.safetensors')
    assert clean.keys() == last.keys() and all(torch.equal(clean[name], last[name]) for name in last)
    capsys.readouterr()
    for path, words in write_bad_weights(tmp_path).items():
        assert tool('avg_checkpoints')('--input', path, '--output', tmp_path / 'x.pth') == 2
        err = capsys.readouterr().err
        assert err.count('\n') == 1 and all(word in err for word in words), err


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
    assert 'ece: ' in card and 'model_ema_decay' not in card and 'warmup_epochs' not in card
    plain = [
        '--checkpoint',
        run / 'last.safetensors',
        '--output',
        tmp_path / 'plain',
        '--data',
        'x',
        '--licence',
        'mit',
    ]
    assert save(*plain) == 0
    (top1,) = (line for line in (tmp_path / 'plain' / 'README.md').read_text().splitlines() if 'top1: ' in line)
    assert float(top1.split(': ')[1]) == pytest.approx(float(rows(run)[-1]['eval_top1']), abs=1e-3)
    plain[1] = run
    assert save(*plain) == 0
    best = weights(run / 'model_best.safetensors')
    assert torch.equal(weights(tmp_path / 'plain' / 'model.safetensors')['head.weight'], best['head.weight'])
    torch.save(model.state_dict(), tmp_path / 'bare.pth')
    capsys.readouterr()
    bare = ['--checkpoint', tmp_path / 'bare.pth', '--output', tmp_path / 'no']
    assert save(*bare, '--data', 'x', '--licence', 'x') == 2
    assert 'holds no settings' in capsys.readouterr().err


def test_a_folder_says_the_size_of_its_images(tmp_path):
    """Also of a model that takes images of any size, and so has no record of its own."""
    kwargs = dict(depths=(1, 1, 1, 1), embed_dims=(16, 16, 16, 16), num_heads=(1, 1, 1, 1))
    settings = dict(model='eva_pvt_v2_b3', model_kwargs=kwargs, num_classes=2, img_size=64)
    path, hub = tmp_path / 'last.safetensors', tmp_path / 'hub'
    model = timm.create_model('eva_pvt_v2_b3', num_classes=2, **kwargs)
    write_weights(model.state_dict(), path, dict(args=json.dumps(settings)))
    assert tool('save_for_hub')('--checkpoint', path, '--output', hub, '--data', 'x', '--licence', 'mit') == 0
    assert 'Image size: 64 x 64' in (hub / 'README.md').read_text()
    model = timm.create_model(f'local-dir:{hub}', pretrained=True)
    assert timm.data.resolve_data_config(model=model)['input_size'] == (3, 64, 64)


@pytest.mark.parametrize(
    'name, text',
    [
        ('deep.json', '[' * 100_000),
        ('big.csv', 'top1,top5,loss,images\n"' + '9' * 200_000 + '",1,1,1\n'),
        ('nan.json', '{"top1": NaN, "top5": 1, "loss": 1, "images": 1}'),
        ('list.json', '{"top1": 1, "top5": [1], "loss": 1, "images": 1}'),
        ('text.json', '{"top1": 1, "top5": 1, "loss": 1, "images": "x\\n# evil"}'),
    ],
)
def test_results_that_validate_does_not_write(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=f'{name}: not what validate.py writes'):
        load_program('tools/save_for_hub.py').read_metrics(tmp_path / name, tmp_path / 'x.safetensors')


def changed(run, path, **settings):
    """A file of the run's weights with other settings."""
    with safetensors.safe_open(run / 'last.safetensors', 'pt') as file:
        about = file.metadata()
    about['args'] = json.dumps({**json.loads(about['args']), **settings})
    write_weights(weights(run / 'last.safetensors'), path, about)
    return path


def test_metrics_of_other_weights_are_not_taken(run, tmp_path, capsys):
    other = changed(run, tmp_path / 'other.safetensors', seed=4)
    flags = ['--data-dir', run.parent / 'images', '--workers', '0', '--device', 'cpu']
    validate = load_script('validate').main
    for name, source in (('own', run / 'last.safetensors'), ('other', other)):
        words = ['--checkpoint', source, *flags, '--results-file', tmp_path / f'{name}.csv']
        assert run_script(validate, [str(word) for word in words]) == 0
    hub = ['--output', tmp_path / 'hub', '--data', 'x', '--licence', 'mit', '--checkpoint', run / 'last.safetensors']
    capsys.readouterr()
    assert tool('save_for_hub')(*hub, '--results-file', tmp_path / 'other.csv') == 2
    line = capsys.readouterr().err
    assert 'other.csv: of other weights' in line and line.count('\n') == 1 and not (tmp_path / 'hub').exists()
    assert tool('save_for_hub')(*hub, '--results-file', tmp_path / 'own.csv') == 0


def test_metrics_are_of_the_weights_that_are_saved(run, tmp_path, capsys):
    """Of a checkpoint with an average that one, which is judged by a flag."""
    checkpoint = torch.load(run / 'last.pth.tar', weights_only=False)
    checkpoint['state_dict_ema'] = {name: 0.9 * x for name, x in checkpoint['state_dict'].items()}
    path = tmp_path / 'averaged.pth.tar'
    torch.save(checkpoint, path)
    flags = ['--checkpoint', path, '--data-dir', run.parent / 'images', '--workers', '0', '--device', 'cpu']
    hub = ['--output', tmp_path / 'hub', '--data', 'x', '--licence', 'mit', '--checkpoint', path]
    for name, more in (('plain', []), ('average', ['--use-ema'])):
        words = [*flags, *more, '--results-file', tmp_path / f'{name}.csv']
        assert run_script(load_script('validate').main, [str(word) for word in words]) == 0
    capsys.readouterr()
    assert tool('save_for_hub')(*hub, '--results-file', tmp_path / 'plain.csv') == 2
    line = capsys.readouterr().err
    assert 'not of the averaged weights' in line and '--use-ema' in line and not (tmp_path / 'hub').exists()
    assert tool('save_for_hub')(*hub, '--results-file', tmp_path / 'average.csv') == 0


def test_settings_that_no_card_can_have(run, tmp_path, capsys):
    hub = ['--output', tmp_path / 'hub', '--data', 'x', '--licence', 'mit', '--checkpoint']
    assert tool('save_for_hub')(*hub, changed(run, tmp_path / 'a.safetensors', eval_metric=['top1'])) == 2
    line = capsys.readouterr().err
    assert "its eval_metric is ['top1']" in line and line.count('\n') == 1 and not (tmp_path / 'hub').exists()
    wrong = dict(opt='sgd\n\n# Download', eval_metric='top1\n# Now', kd_model_name='\r## From')
    assert tool('save_for_hub')(*hub, changed(run, tmp_path / 'b.safetensors', **wrong)) == 0
    card = (tmp_path / 'hub' / 'README.md').read_text()
    assert 'opt: sgd # Download' in card
    assert not any(line.startswith(('# Download', '# Now', '## From')) for line in card.splitlines())


def test_runs_of_other_classes_have_no_mean(run, tmp_path, capsys):
    for name, names in (('a', CLASSES), ('b', CLASSES[::-1])):
        changed(run, tmp_path / f'{name}.safetensors', class_names=[*names])
    flags = ['--input', tmp_path, '--filter', '?.safetensors', '--output', tmp_path / 'mean.pth']
    for more in ([], ['--no-sort']):
        assert tool('avg_checkpoints')(*flags, *more) == 2
        line = capsys.readouterr().err
        assert "class 0 is 'plum', and 'apple' in" in line or "class 0 is 'apple', and 'plum' in" in line
        assert line.count('\n') == 1 and not (tmp_path / 'mean.pth').exists()


def test_other_conversions_have_no_mean(run, tmp_path, capsys):
    """Their tensors are of the same shapes. Rates of dropout may differ."""
    flags = ['--input', tmp_path, '--filter', '?.safetensors', '--output', tmp_path / 'mean.pth']
    changed(run, tmp_path / 'a.safetensors')
    for about in (dict(convert='local'), dict(convert_kwargs=dict(window_size=3)), dict(model_kwargs=dict(depth=7))):
        changed(run, tmp_path / 'b.safetensors', **about)
        assert tool('avg_checkpoints')(*flags) == 2
        line = capsys.readouterr().err
        assert f'b.safetensors: {next(iter(about))} is' in line and line.count('\n') == 1, line
    with safetensors.safe_open(run / 'last.safetensors', 'pt') as file:
        kwargs = json.loads(file.metadata()['args'])['model_kwargs']
    changed(run, tmp_path / 'b.safetensors', model_kwargs={**kwargs, 'drop_path_rate': 0.3})
    assert tool('avg_checkpoints')(*flags) == 0


def test_averages_and_plain_weights_have_no_mean(run, tmp_path, capsys):
    for name, kept in (('a', True), ('b', False)):
        changed(run, tmp_path / f'{name}.safetensors', model_ema=kept)
    flags = ['--input', tmp_path, '--filter', '?.safetensors', '--output', tmp_path / 'mean.pth']
    assert tool('avg_checkpoints')(*flags) == 2
    line = capsys.readouterr().err
    assert f'{tmp_path}/a.safetensors has a moving average, {tmp_path}/b.safetensors has none' in line
    assert line.count('\n') == 1 and not (tmp_path / 'mean.pth').exists()


def test_plain_weights_are_not_taken_from_a_file_of_averages(run, tmp_path, capsys):
    """A .safetensors of a run with an average holds that alone, and says nothing of the plain weights."""
    checkpoint = torch.load(run / 'last.pth.tar', weights_only=False)
    checkpoint['state_dict_ema'] = {name: 0.9 * x for name, x in checkpoint['state_dict'].items()}
    torch.save(checkpoint, tmp_path / 'a.pth.tar')
    changed(run, tmp_path / 'b.safetensors', model_ema=True)
    out = tmp_path / 'out.pth'
    for flags in (['--input', tmp_path / 'b.safetensors'], ['--input', tmp_path, '--filter', '[ab].*']):
        assert tool('avg_checkpoints')(*flags, '--no-use-ema', '--output', out) == 2
        line = capsys.readouterr().err
        assert line.startswith(f'error: --no-use-ema: {tmp_path}/b.safetensors holds one set of weights, the averaged')
        assert line.count('\n') == 1 and not out.exists()
    assert tool('avg_checkpoints')('--input', tmp_path / 'a.pth.tar', '--no-use-ema', '--output', out) == 0
    assert all(torch.equal(value, checkpoint['state_dict'][name]) for name, value in torch.load(out).items())


def test_names_reach_the_terminal_without_control_characters(run, tmp_path, capsys):
    output = tmp_path / '\x1b[31mred.pth'
    assert tool('avg_checkpoints')('--input', run / 'last.pth.tar', '--output', output) == 0
    flags = ['--checkpoint', run, '--output', tmp_path / '\x1b[31mhub', '--data', 'x', '--licence', 'mit']
    assert tool('save_for_hub')(*flags) == 0
    out = capsys.readouterr().out
    assert '\x1b' not in out and '\\x1b[31mred.pth: weights of' in out and '\\x1b[31mhub: README.md' in out


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


def test_what_the_tools_write_tells_whether_it_is_whole(run, tmp_path, capsys):
    folder = tmp_path / 'hub'
    hub = ('--checkpoint', run / 'last.safetensors', '--output', folder, '--data', 'x', '--licence', 'mit')
    assert tool('save_for_hub')(*hub) == 0
    written = [folder / 'model.safetensors']
    for name in ('mean.safetensors', 'mean.pth'):
        assert tool('avg_checkpoints')('--input', run, '--output', tmp_path / name) == 0
        written.append(tmp_path / name)
    for path in written:
        assert is_stamped(path) and path.stat().st_mode & 0o077 == (folder / 'README.md').stat().st_mode & 0o077
        content = bytearray(path.read_bytes())
        content[-2000] ^= 4
        path.write_bytes(content)
        capsys.readouterr()
        assert tool('avg_checkpoints')('--input', path, '--output', tmp_path / 'x.pth') == 2
        assert f'{path}: not a readable checkpoint: damaged' in capsys.readouterr().err


@pytest.mark.parametrize('count', [2, 4])
def test_names_of_the_classes_for_the_hub(run, tmp_path, capsys, count):
    """Of --class-map there may be fewer than classes; more are a line."""
    with safetensors.safe_open(run / 'last.safetensors', 'pt') as file:
        about = file.metadata()
    names = ['apple', 'pear', 'plum', 'quince'][:count]
    about['args'] = json.dumps({**json.loads(about['args']), 'class_names': names, 'num_classes': 3})
    write_weights(weights(run / 'last.safetensors'), tmp_path / 'x.safetensors', about)
    flags = (
        '--checkpoint',
        tmp_path / 'x.safetensors',
        '--output',
        tmp_path / 'hub',
        '--data',
        'x',
        '--licence',
        'mit',
    )
    code, err = tool('save_for_hub')(*flags), capsys.readouterr().err
    if count == 4:
        assert code == 2 and 'x.safetensors: not saved, label_names has 4 names' in err and err.count('\n') == 1
    else:
        assert code == 0, err
        assert json.loads((tmp_path / 'hub' / 'config.json').read_text())['label_names'] == ['apple', 'pear', '2']


@pytest.mark.parametrize(
    'function, error',
    [
        ('evavit.hub.generate_readme', OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))),
        ('safetensors.torch.save_file', safetensors.SafetensorError('I/O error: No space left (os error 28)')),
    ],
)
def test_a_folder_for_the_hub_is_written_whole_or_not_at_all(run, tmp_path, monkeypatch, capsys, function, error):
    folder = tmp_path / 'hub'
    folder.mkdir()
    for name in ('model.safetensors', 'config.json', 'README.md', 'notes.txt'):
        (folder / name).write_text('{"architecture": "before"}' if name == 'config.json' else 'before')
    before = {path: path.read_text() for path in folder.iterdir()}

    def full(*_, **__):
        raise error

    monkeypatch.setattr(function, full)
    hub = ('--checkpoint', run / 'last.safetensors', '--output', folder, '--data', 'x', '--licence', 'mit')
    assert tool('save_for_hub')(*hub) == 2
    line = capsys.readouterr().err
    assert f'not saved, {folder}: has a model.safetensors that save_folder did not write; give' in line
    assert line.endswith(', or --overwrite\n')
    assert tool('save_for_hub')(*hub, '--overwrite') == 2
    assert f'--output {folder}: cannot be written (the disk is full: ' in capsys.readouterr().err
    assert {path: path.read_text() for path in folder.iterdir()} == before


def test_a_checkpoint_that_names_a_model_of_the_network_is_refused(tmp_path, monkeypatch, capsys):
    def fetch(*_, **__):
        raise AssertionError('it goes to the network')

    monkeypatch.setattr('timm.models._hub.hf_hub_download', fetch)
    settings = dict(model='hf-hub:x/y', num_classes=3)
    safetensors.torch.save_file({'w': torch.ones(2)}, tmp_path / 'a.safetensors', dict(args=json.dumps(settings)))
    given = (
        '--checkpoint',
        tmp_path / 'a.safetensors',
        '--output',
        tmp_path / 'hub',
        '--data',
        'x',
        '--licence',
        'mit',
    )
    assert tool('save_for_hub')(*given) == 2
    assert 'its model hf-hub:x/y would have to be fetched' in capsys.readouterr().err
    assert not (tmp_path / 'hub').exists()


def test_a_file_that_is_there_meanwhile_stays(run, tmp_path, capsys, monkeypatch):
    program = load_program('tools/avg_checkpoints.py')
    average = program.average

    def late(*args, **kwargs):
        (tmp_path / 'w.pth').write_text('mine')
        return average(*args, **kwargs)

    monkeypatch.setattr(program, 'average', late)
    with pytest.raises(UserError, match='exists already; choose another name'):
        program.main(['--input', str(run / 'last.pth.tar'), '--output', str(tmp_path / 'w.pth')])
    assert [path.name for path in tmp_path.iterdir()] == ['w.pth'] and (tmp_path / 'w.pth').read_text() == 'mine'


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.complex128])
def test_the_mean_of_weights_that_share_a_tensor(tmp_path, dtype):
    for number in (1, 3):
        shared = torch.full((2, 2), number, dtype=dtype)
        torch.save({'a': shared, 'b': shared}, tmp_path / f'checkpoint-{number}.pth.tar')
    assert tool('avg_checkpoints')('--input', tmp_path, '--output', tmp_path / 'mean.pth') == 0
    mean = torch.load(tmp_path / 'mean.pth', weights_only=True)
    assert all((mean[name] == 2).all() for name in 'ab')


def test_a_hash_takes_no_other_s_place(run, tmp_path, capsys):
    flags = ['--input', run / 'last.pth.tar', '--hash', '--output', tmp_path / 'w.pth']
    assert tool('avg_checkpoints')(*flags) == 0
    (own,) = tmp_path.iterdir()
    own.write_text('precious')
    capsys.readouterr()
    assert tool('avg_checkpoints')(*flags) == 2
    assert capsys.readouterr().err.endswith(f'{own.name} exists already; choose another name\n')
    assert list(tmp_path.iterdir()) == [own] and own.read_text() == 'precious'
