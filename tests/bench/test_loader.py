"""What `benchmark.py --bench data` stores; tests/cli/test_benchmark.py has its rates."""

import multiprocessing
from types import SimpleNamespace

import pytest
import torch
from programs import ROOT

from evavit.bench import loader
from evavit.bench.results import ORIGIN, read_rows, store_rows
from evavit.errors import UserError

COLUMNS = [*loader.COLUMNS, *ORIGIN]


def _store(path, model):
    def measured(settings, *_):
        return dict.fromkeys(loader.COLUMNS, '') | dict(model=model, workers=settings.machine.workers)

    loader.measure = measured
    loader.start_process = lambda *_, **__: SimpleNamespace(device=torch.device('cpu'))  # a fork makes no group
    torch.distributed.destroy_process_group = lambda: None
    flags = ['--model', model, '--num-classes', '3', '--data-dir', 'none', '--device', 'cpu', '--loader-only']
    loader.main([*flags, '--workers-list', *map(str, range(30)), '--results-file', str(path)])


def test_programs_side_by_side_lose_no_row(tmp_path):
    path, models = tmp_path / 'data.csv', ('eva_deit_tiny', 'softmax_deit_tiny', 'lara_deit_tiny')
    jobs = [multiprocessing.get_context('fork').Process(target=_store, args=(path, model)) for model in models]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    found = {(row['model'], row['workers']) for row in read_rows(path, COLUMNS)}
    assert [job.exitcode for job in jobs] == [0, 0, 0] and found == {(m, str(n)) for m in models for n in range(30)}


def test_a_file_of_before_the_image_size_is_read(tmp_path):
    path, columns = tmp_path / 'data.csv', [*loader.COLUMNS, *loader.STEP_COLUMNS, *ORIGIN]
    path.write_text((ROOT / 'results' / 'data_cpu.csv').read_text())
    before = len(read_rows(path, columns, loader.ADDED))
    store_rows(path, [dict(model='eva_deit_tiny', img_size=64)], columns, key=columns, added=loader.ADDED)
    rows = read_rows(path, columns)
    assert [row['img_size'] for row in rows] == [*[''] * before, '64'] and rows[0]['device']


@pytest.mark.parametrize('device', ['cpu', 'cuda'])
def test_both_places_with_a_cache(device, monkeypatch):
    """The cache is the GPU's part; without a GPU nothing is measured first."""
    measured = []

    def measure(settings, *_):
        measured.append((settings.machine.augment_device, settings.machine.cache_device))
        return {}

    monkeypatch.setattr(loader, 'measure', measure)
    monkeypatch.setattr(loader, 'start_process', lambda *_, **__: SimpleNamespace(device=torch.device(device)))
    monkeypatch.setattr(loader, 'origin', lambda _: {})
    monkeypatch.setattr(torch.distributed, 'destroy_process_group', lambda: None)
    flags = ['--model', 'eva_deit_tiny', '--num-classes', '3', '--data-dir', 'none', '--device', 'cpu', '--loader-only']
    flags += ['--augment-devices', 'cpu', 'cuda', '--cache-device']
    if device == 'cuda':
        loader.main(flags)
        assert measured == [('cpu', False), ('cuda', True)]
    else:
        with pytest.raises(UserError, match='--augment-devices cuda needs a GPU, and this run is on cpu; leave it out'):
            loader.main(flags)
        assert not measured


@pytest.mark.parametrize(
    ('flags', 'line'),
    [
        (['--repeats', '0'], '--repeats 0: give at least 1'),
        (['--seconds', '0'], '--seconds 0.0: give at least 0.01'),
        (['--seconds', '-1'], '--seconds -1.0: give at least 0.01'),
        (['--seconds', 'nan'], 'nan'),
        (['--workers-list', '2', '-1'], '--workers-list -1: give at least 0'),
    ],
)
def test_flags_that_cannot_be_are_a_line(flags, line):
    with pytest.raises(UserError, match=line):
        loader.parse([*flags, '--model', 'eva_deit_tiny', '--num-classes', '3', '--data-dir', 'none'])
