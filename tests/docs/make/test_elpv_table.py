"""The table of docs/transfer.md, from rows as experiments/elpv writes them."""

import csv
import re

import pytest
from programs import load_program


@pytest.fixture
def tables(tmp_path, monkeypatch):
    module = load_program('docs/make/elpv.py')
    monkeypatch.setattr(module.pages, 'ROOT', tmp_path)
    return module


def store(folder, rows):
    example = load_program('experiments/elpv/run.py')
    whole = [dict.fromkeys(example.COLUMNS, '') | row for row in rows]
    example.store_rows(folder / 'results' / 'elpv_h100.csv', whole, example.COLUMNS, example.KEY)


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


def test_nothing_measured_yet(tables):
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
    example = load_program('experiments/elpv/run.py')
    store(tmp_path, [row('type', 'resnet18', 'scratch', seed, 50 + seed) for seed in range(2)])
    path = tmp_path / 'results' / 'elpv_h100.csv'
    assert [line['top1'] for line in example.read_rows(path, example.COLUMNS)] == ['50', '51']
    (line,) = example.summary(example.read_rows(path, example.COLUMNS))
    assert 'top1 50.5 ± 0.7' in line and '2 seeds' in line
    with open(path, newline='') as file:
        assert tuple(next(csv.reader(file))) == example.COLUMNS
