"""The section of docs/evidence.md on transfer, from rows as experiments/transfer writes them."""

import pytest
from programs import load_program

from evavit.bench.results import write_rows


@pytest.fixture
def section(tmp_path, monkeypatch):
    module = load_program('docs/make/transfer.py')
    monkeypatch.setattr(module.pages, 'ROOT', tmp_path)
    monkeypatch.setattr(module, 'PLOT', tmp_path / 'transfer.svg')
    return module


def store(folder, *jobs):
    """Rows of (job, figure); the balanced accuracy is ten points less."""
    driver = load_program('experiments/transfer/run.py')
    rows = [
        dict.fromkeys(driver.COLUMNS, 'x')
        | {column: getattr(job, column, '') for column in ('task', 'how', 'start', 'seed', 'group')}
        | dict(run=job.name, model=driver.NETWORKS[driver.STARTS.get(job.start) or 'eva'], epochs=100)
        | dict(top1=figure, balanced_accuracy=figure - 10)
        for job, figure in ((driver.Job(*job), figure) for job, figure in jobs)
    ]
    write_rows(folder / 'results' / 'transfer_h200.csv', rows, driver.COLUMNS)


def test_nothing_before_there_are_rows(section, tmp_path):
    assert section.section() == '' and section.plot_is_fresh()
    store(tmp_path, (('pretrain', 'eva'), 48))
    assert section.section() == '' and section.plot_is_fresh()
    section.draw()
    assert not section.PLOT.exists()


def test_the_section(section, tmp_path):
    runs = [(('finetune', 'eva', 'clothing', seed), figure) for seed, figure in enumerate((70, 72, 74))]
    runs += [(('finetune', 'scratch', 'clothing', seed), figure) for seed, figure in enumerate((60, 61, 62))]
    runs += [(('finetune', 'softmax', 'clothing', seed), figure) for seed, figure in enumerate((71, 73))]
    store(tmp_path, (('pretrain', 'eva'), 48.5), *runs, (('knn', 'converted', 'elpv'), 45))
    text = section.section()
    assert '| clothes, 224 px | fine-tuned | 72.00 ± 2.00 | 72.00 ± 1.41 | – | 61.00 ± 1.00 | 3/2/0/3 |' in text
    assert '| solar cells, 224 px, balanced | 20 neighbours | – | – | 35.00 | – | 0/0/1/0 |' in text
    assert 'EVA fine-tuned: +11.00 against EVA, no weights, +0.00 against softmax (within the spread).' in text
    assert 'after 100 epochs: `eva_deit_tiny` 48.50 %.' in text
    pytest.importorskip('matplotlib')
    assert not section.plot_is_fresh()
    section.draw()
    first = section.PLOT.read_bytes()
    assert section.plot_is_fresh()
    section.draw()
    assert section.PLOT.read_bytes() == first
    store(tmp_path, *runs)
    assert not section.plot_is_fresh()


def test_its_names_are_the_experiment_s(section):
    driver = load_program('experiments/transfer/run.py')
    assert section.TASKS.keys() == driver.TASKS.keys() and section.STARTS.keys() == driver.STARTS.keys()
    assert tuple(section.HOWS) == driver.HOWS and f'{driver.NEIGHBOURS} neighbours' == section.HOWS['knn']
