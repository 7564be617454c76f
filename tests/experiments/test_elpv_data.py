"""experiments/elpv/build_data.py on a small data set of ELPV's form."""

import numpy as np
import pytest
from PIL import Image
from programs import load_program

from evavit.errors import run_script


@pytest.fixture
def source(tmp_path):
    """40 cells of 20 × 20 pixels, in a labels.csv like the package's."""
    folder = tmp_path / 'source'
    (folder / 'images').mkdir(parents=True)
    chances, rng = ('0.0', '0.3333333333333333', '0.6666666666666666', '1.0'), np.random.default_rng(0)
    lines = []
    for number in range(40):
        name = f'images/cell{number + 1:04d}.png'
        Image.fromarray(rng.integers(0, 255, (20, 20), dtype=np.uint8)).save(folder / name)
        lines.append(f'{name}  {chances[number % 4]}   {"mono" if number % 2 else "poly"}')
    (folder / 'labels.csv').write_text('\n'.join(lines) + '\n')
    return folder


def test_blocks_stay_together(source, tmp_path, monkeypatch, capsys):
    tool = load_program('experiments/elpv/build_data.py')
    monkeypatch.setattr(tool, 'BLOCK', 4)
    assert run_script(tool.main, [str(tmp_path / 'elpv'), '--source', str(source), '--side', '16']) == 0
    for task, classes in (('type', {'mono', 'poly'}), ('defect', {'p000', 'p033', 'p067', 'p100'})):
        place = {
            split: {path.stem: path.parent.name for path in (tmp_path / 'elpv' / task / split).glob('*/*.jpg')}
            for split in ('train', 'validation')
        }
        assert len(place['train']) == 32 and set(place['train'].values()) == classes
        # Every fifth block of four: the cells 17 to 20 and 37 to 40.
        assert set(place['validation']) == {f'cell{n:04d}' for n in (*range(17, 21), *range(37, 41))}
    image = Image.open(tmp_path / 'elpv' / 'defect' / 'train' / 'p033' / 'cell0002.jpg')
    assert image.mode == 'L' and image.size == (16, 16)
    assert '; always poly: 50.0 %' in capsys.readouterr().out
    assert run_script(tool.main, [str(tmp_path / 'few'), '--source', str(source), '--images', '2']) == 0
    assert len(list((tmp_path / 'few' / 'defect' / 'train').glob('*/*'))) == 8
    assert run_script(tool.main, [str(tmp_path), '--source', str(source)]) == 2
    assert 'is there already' in capsys.readouterr().err and source.is_dir()


@pytest.mark.parametrize(
    'fault, words',
    [
        ('few', ['labels.csv has 40 pictures', 'begins after 240']),
        ('twice', ['labels.csv has 2 pictures called cell0001']),
        ('none', ['labels.csv']),
        ('broken', ['labels.csv', 'file probability type']),
        ('picture', ['cell0003.png', 'cannot be read']),
    ],
)
def test_a_source_that_is_none(source, tmp_path, monkeypatch, capsys, fault, words):
    tool = load_program('experiments/elpv/build_data.py')
    if fault != 'few':
        monkeypatch.setattr(tool, 'BLOCK', 4)
    if fault == 'twice':
        with open(source / 'labels.csv', 'a') as file:
            file.write('images/cell0001.jpg 0.0 mono\n')
    elif fault == 'none':
        (source / 'labels.csv').unlink()
    elif fault == 'broken':
        (source / 'labels.csv').write_text('cell0001.png;1\n')
    elif fault == 'picture':
        (source / 'images' / 'cell0003.png').write_bytes(b'no picture')
    assert run_script(tool.main, [str(tmp_path / 'elpv'), '--source', str(source)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith('error: ') and all(word in line for word in words), line
    assert not (tmp_path / 'elpv').exists()


@pytest.mark.parametrize('about', ['0.0 ../../../escaped', '7 mono', 'inf mono'])
def test_a_class_that_is_none_is_a_line(source, tmp_path, capsys, about):
    """A class is a folder's name: one of another kind would lead out of the folder that is made."""
    tool = load_program('experiments/elpv/build_data.py')
    with open(source / 'labels.csv', 'a') as file:
        file.write(f'images/cell0041.png {about}\n')
    Image.new('L', (20, 20)).save(source / 'images' / 'cell0041.png')
    before = sorted(path.name for path in tmp_path.iterdir())
    assert run_script(tool.main, [str(tmp_path / 'new'), '--source', str(source), '--side', '16']) == 2
    err = capsys.readouterr().err
    assert 'file probability type' in err and err.count('\n') == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == before
