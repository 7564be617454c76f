"""experiments/causal_cifar with a small network: causal, a budget of seconds, a stop, the table and the plot."""

import csv
import itertools
import os

import pytest
import torch
import yaml
from experiments.cifar_files import write_folders
from programs import load_program
from runs import signal_at

from evavit.errors import UserError, run_script

SIZES = dict(dim=16, depth=1, num_heads=2, window_size=192, cell_size=24, drop=0.1)


@pytest.fixture
def driver(monkeypatch, request):
    monkeypatch.syspath_prepend(request.config.rootpath / 'experiments')
    return load_program('experiments/causal_cifar/run.py')


@pytest.fixture
def call(driver, tmp_path, monkeypatch, capsys):
    """call(output, *flags) → what the driver prints; a round of updates takes one second."""
    write_folders(tmp_path / 'cifar', dict(train=20, test=10))
    monkeypatch.setattr(driver, 'clock', itertools.count().__next__)
    with open(driver.HERE / 'causal_cifar.yaml') as file:
        settings = yaml.safe_load(file) | SIZES | dict(batch_size=2, log_updates=1, lr=1e-2)
    (tmp_path / 'small.yaml').write_text(yaml.safe_dump(settings))

    def call(output, *more):
        capsys.readouterr()
        flags = ['--data-dir', tmp_path / 'cifar', '--output', tmp_path / output, '--device', 'cpu']
        flags += ['-c', tmp_path / 'small.yaml', '--budget', 5, *more]
        assert run_script(driver.main, list(map(str, flags))) == 0, capsys.readouterr()
        return capsys.readouterr().out

    return call


def weights(folder):
    return torch.load(folder / 'last.pth.tar', weights_only=True)['model']


@pytest.mark.parametrize('attention', ['eva', 'softmax'])
def test_no_byte_sees_itself_or_what_follows(driver, attention):
    torch.manual_seed(0)
    model = driver.ByteModel(attention, **SIZES).eval()
    pictures = torch.randint(256, (1, driver.TOKENS))
    for place in (0, 1000, 1151, 3071):
        changed = pictures.clone()
        changed[0, place] = (changed[0, place] + 1) % 256
        with torch.no_grad():
            differs = (model(pictures) - model(changed)).abs().amax(-1)[0] > 1e-6
        assert not differs[: place + 1].any()
        assert place == 3071 or differs[place + 1 :].any()


def test_both_have_one_size_and_start_at_8_bits(driver):
    sizes = dict(driver.yaml.safe_load((driver.HERE / 'causal_cifar.yaml').read_text()))
    models = [driver.ByteModel(name, **{key: sizes[key] for key in driver.SIZES}) for name in driver.ATTENTIONS]
    counts = [sum(p.numel() for p in model.parameters()) for model in models]
    assert abs(counts[0] / counts[1] - 1) < 0.01
    picture = torch.randint(256, (1, driver.TOKENS), dtype=torch.uint8)
    small = driver.ByteModel('eva', **SIZES).eval()
    assert abs(driver.bits(small, picture).item() - 8) < 0.1


def test_the_rate_follows_the_budget(driver):
    settings = dict(lr=2.0, warmup=0.1)
    assert [driver.rate(share, settings) for share in (0, 0.05, 0.1)] == pytest.approx([0.2, 1.1, 2])
    assert driver.rate(1.0, settings) == pytest.approx(0.2) and driver.rate(1.2, settings) == pytest.approx(0.2)


def test_a_stopped_run_ends_as_one_that_was_not(driver, call, tmp_path, monkeypatch):
    out = call('whole', '--only', 's0')
    assert 'bits a dimension' in out
    with monkeypatch.context() as patch:
        signal_at(patch, [2])
        assert 'asked to stop after 2 of 5 s' in call('parts', '--only', 'eva-5s-s0')
    assert call('parts', '--list', '--only', 's0').split() == ['eva-5s-s0', 'started', 'softmax-5s-s0', 'to', 'do']
    call('parts', '--only', 'eva-5s-s0')
    whole, parts = (weights(tmp_path / name / 'eva-5s-s0') for name in ('whole', 'parts'))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    with open(tmp_path / 'whole' / 'runs.csv', newline='') as file:
        rows = {row['run']: row for row in csv.DictReader(file)}
    assert list(rows) == ['eva-5s-s0', 'softmax-5s-s0']
    row = rows['eva-5s-s0']
    assert (row['updates'], row['tokens'], row['epochs'], row['images']) == ('5', str(10 * 3072), '0.5', '10')
    assert 6 < float(row['test_bits']) < 9 and row['tokens_per_second'] == str(2 * 3072) and row['commit']
    with open(tmp_path / 'whole' / 'curves' / 'eva-5s-s0.csv', newline='') as file:
        assert [float(point['seconds']) for point in csv.DictReader(file)] == [1, 2, 3, 4, 5]
    assert 'budget: 5' in (tmp_path / 'whole' / 'settings' / 'eva-5s-s0.yaml').read_text()
    pytest.importorskip('matplotlib')
    assert '| softmax | 5 | 0 |' in call('whole', '--report')
    assert (tmp_path / 'whole' / 'runs.svg').stat().st_size > 1000


def test_a_time_of_others_is_no_finished_run(call, driver, tmp_path, capsys):
    time = tmp_path / 'runs' / 'eva-5s-s0' / 'train_seconds'
    time.parent.mkdir(parents=True)
    time.write_text('7')
    flags = ['--data-dir', tmp_path / 'cifar', '--output', tmp_path / 'runs', '--device', 'cpu', '--only', 'eva-5s-s0']
    with pytest.raises(UserError, match='1 runs failed'):
        driver.main(list(map(str, [*flags, '-c', tmp_path / 'small.yaml', '--budget', 5])))
    assert time.read_text() == '7' and 'holds train_seconds, which no run has left' in capsys.readouterr().out


def test_a_mistake_is_a_line(driver, tmp_path, capsys):
    assert run_script(driver.main, ['--data-dir', str(tmp_path), '--budget', '0']) == 2
    assert '--budget 0' in capsys.readouterr().err
    (tmp_path / 'a.yaml').write_text('dim: [')
    assert run_script(driver.main, ['-c', str(tmp_path / 'a.yaml')]) == 2
    assert 'a.yaml: cannot be read' in capsys.readouterr().err
    (tmp_path / 'a.yaml').write_text('dim: 3\nwidth: 4\n')
    assert run_script(driver.main, ['-c', str(tmp_path / 'a.yaml')]) == 2
    told = capsys.readouterr().err
    assert 'no more and no less' in told and 'width' in told and 'dim,' not in told
    assert run_script(driver.main, []) == 2
    assert 'experiments/cifar.py' in capsys.readouterr().err


@pytest.mark.parametrize(
    'fault, words',
    [
        ('cut', 'not a readable checkpoint'),
        ('flipped', 'not a readable checkpoint (damaged'),
        ('nan', 'its weights are not finite'),
        ('position', 'its position is none'),
        ('other', 'not a checkpoint of this program'),
    ],
)
def test_a_checkpoint_that_is_none_is_a_line(driver, call, tmp_path, monkeypatch, fault, words):
    with monkeypatch.context() as patch:
        signal_at(patch, [1])
        call('runs', '--only', 'eva-5s-s0')
    path = tmp_path / 'runs' / 'eva-5s-s0' / 'last.pth.tar'
    content, state = bytearray(path.read_bytes()), torch.load(path, weights_only=True)
    if fault in ('cut', 'flipped'):
        content[len(content) // 2] ^= 1
        path.write_bytes(content[:1000] if fault == 'cut' else content)
    else:
        if fault == 'nan':
            next(iter(state['model'].values())).fill_(float('nan'))
        state['update'] = -1 if fault == 'position' else state['update']
        torch.save([] if fault == 'other' else state, path)
    training = driver.Training(driver.Job('eva', 5.0, 0), state['settings'], torch.device('cpu'))
    with pytest.raises(UserError) as told:
        training.load(path)
    assert words in str(told.value) and str(told.value).startswith(str(path))


@pytest.mark.timeout(30)
def test_settings_that_are_none_are_a_line(driver, tmp_path, capsys):
    own = yaml.safe_load((driver.HERE / 'causal_cifar.yaml').read_text())
    os.mkfifo(tmp_path / 'pipe.yaml')
    for name, value in (('budget', 'long'), ('dim', 3.5), ('betas', 0.9), ('lr', float('nan'))):
        (tmp_path / f'{name}.yaml').write_text(yaml.safe_dump(own | {name: value}))
    for name in ('pipe', 'budget', 'dim', 'betas', 'lr'):
        assert run_script(driver.main, ['-c', str(tmp_path / f'{name}.yaml')]) == 2
        err = capsys.readouterr().err
        assert err.startswith('error: ') and err.count('\n') == 1 and f'{name}.yaml: ' in err
