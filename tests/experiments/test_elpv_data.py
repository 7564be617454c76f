"""tools/build_elpv.py on a small data set of ELPV's form, and the table of docs/transfer.md from results."""

import csv
import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evavit.errors import run_script

ROOT = Path(__file__).parents[2]


def load(path):
    spec = importlib.util.spec_from_file_location(f'evavit_{path.parent.name}_{path.stem}', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
    tool = load(ROOT / 'tools' / 'build_elpv.py')
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


@pytest.mark.parametrize(
    'fault, words',
    [
        ('none', ['labels.csv']),
        ('broken', ['labels.csv', 'file probability type']),
        ('picture', ['cell0003.png', 'cannot be read']),
    ],
)
def test_a_source_that_is_none(source, tmp_path, capsys, fault, words):
    tool = load(ROOT / 'tools' / 'build_elpv.py')
    if fault == 'none':
        (source / 'labels.csv').unlink()
    elif fault == 'broken':
        (source / 'labels.csv').write_text('cell0001.png;1\n')
    else:
        (source / 'images' / 'cell0003.png').write_bytes(b'no picture')
    assert run_script(tool.main, [str(tmp_path / 'elpv'), '--source', str(source)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith('error: ') and all(word in line for word in words), line
    assert not (tmp_path / 'elpv').exists()


@pytest.fixture
def tables(tmp_path, monkeypatch):
    module = load(ROOT / 'tools' / 'elpv.py')
    monkeypatch.setattr(module, 'ROOT', tmp_path)
    return module


def store(folder, rows):
    example = load(ROOT / 'examples' / 'elpv.py')
    for row in rows:
        example.add_row(folder / 'results' / 'elpv_h100.csv', dict.fromkeys(example.COLUMNS, '') | row)


def row(task, model, start, seed, score, **more):
    return (
        dict(
            task=task,
            model=model,
            start=start,
            seed=seed,
            epochs=10,
            batch_size=64,
            train_images=2144,
            images=480,
            top1=score,
            balanced_accuracy=score - 10,
            macro_f1=score - 20,
            majority=60,
            device='H100',
            torch='2.11',
            timm='1.0',
            evavit='0.1',
            commit='abc',
            date='2026-01-01',
        )
        | more
    )


def test_no_figures_yet(tables):
    assert tables.table().startswith('Not measured yet')


def test_the_table(tables, tmp_path):
    store(
        tmp_path,
        [
            row('fashion_mnist', 'eva_deit_tiny', 'scratch', 0, 85, epochs=5, train_images=60000, images=10000),
            *(row('defect', 'eva_deit_tiny', 'fashion_mnist', seed, score) for seed, score in enumerate((70, 72, 74))),
            row('defect', 'resnet18', 'scratch', 0, 65),
        ],
    )
    text = tables.table()
    cells = [[cell.strip() for cell in line.strip('|').split('|')] for line in text.splitlines() if line[:1] == '|'][2:]
    assert [line[2:] for line in cells] == [
        ['3', '72.0 ± 2.0', '62.0 ± 2.0', '52.0 ± 2.0'],
        ['–', 'not measured', '–', '–'],  # a start without a run
        ['1', '65.0', '55.0', '45.0'],
        ['–', 'not measured', '–', '–'],
        ['–', '60.0', '25.0', '18.8'],
    ]  # F1 of the largest class: 2 · 0.6 / 1.6, a fourth of it
    assert re.search(r'10 epochs of 2144 pictures in batches of 64, judged on 480\. .*5 epochs, top-1 85\.0', text)
    assert 'H100; torch 2.11, timm 1.0, evavit 0.1 abc, 2026-01-01' in text


def test_rows_are_read_back(tmp_path):
    example = load(ROOT / 'examples' / 'elpv.py')
    store(tmp_path, [row('type', 'resnet18', 'scratch', seed, 50 + seed) for seed in range(2)])
    path = tmp_path / 'results' / 'elpv_h100.csv'
    assert [line['top1'] for line in example.read_rows(path)] == ['50', '51']
    (line,) = example.summary(example.read_rows(path))
    assert 'top1 50.5 ± 0.7' in line and '2 seeds' in line
    with open(path, newline='') as file:
        assert tuple(next(csv.reader(file))) == example.COLUMNS
