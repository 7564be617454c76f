"""experiments/loaders on a CPU: the contenders that need no GPU, and one line for what is not there."""

import csv
import sys

import pytest
from PIL import Image
from programs import load_program

from evavit.errors import run_script


@pytest.fixture
def photos(tmp_path):
    for number in range(4):
        path = tmp_path / 'data' / ('validation' if number < 2 else 'train') / str(number % 2) / f'{number}.jpg'
        path.parent.mkdir(parents=True)
        Image.effect_noise((90, 60), 40).convert('RGB').save(path)
    return tmp_path / 'data'


def test_a_row_for_each_contender(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'kornia.augmentation', None)
    program, file = load_program('experiments/loaders/run.py'), tmp_path / 'rows.csv'
    flags = ['-b', '2', '--workers', '1', '--held', '1', '--seconds', '0.1', '--repeats', '1', '--device', 'cpu']
    contenders = ['--contenders', 'cpu', 'cuda', 'torchvision', 'kornia']
    command = ['--data-dir', photos, '--results-file', file, *flags, *contenders]
    assert run_script(program.main, list(map(str, command))) == 0
    out = capsys.readouterr().out
    assert 'cuda: needs a GPU' in out and 'kornia: not installed' in out
    with open(file, newline='') as stream:
        rows = {row['contender']: row for row in csv.DictReader(stream)}
    assert list(rows) == ['cpu', 'torchvision'] and all(float(row['images_per_second']) > 0 for row in rows.values())


def test_no_photographs_are_a_line(photos, tmp_path, capsys):
    main = load_program('experiments/loaders/run.py').main
    assert run_script(main, ['--data-dir', str(tmp_path)]) == 2
    assert 'tools/build_photos.py' in capsys.readouterr().err
    for path in photos.rglob('*.jpg'):
        path.rename(path.with_suffix('.png'))
    command = ['--data-dir', photos, '--results-file', tmp_path / 'rows.csv', '--device', 'cpu', '-b', '2']
    assert run_script(main, [*map(str, command), '--contenders', 'torchvision']) == 2
    assert 'no *.jpg in train, which these contenders decode' in capsys.readouterr().err


@pytest.mark.parametrize('flags', ['--workers 1_0', '--seconds inf', '--seconds -1', '-b ２', '--repeats 0', '--hel 3'])
def test_flags_that_cannot_be_are_a_line(photos, capsys, flags):
    command = ['--data-dir', str(photos), '--device', 'cpu', '--contenders', 'cuda', *flags.split()]
    assert run_script(load_program('experiments/loaders/run.py').main, command) == 2
    err = capsys.readouterr().err
    assert err.startswith('error: ') and err.count('\n') == 1 and flags.split()[0] in err, err
