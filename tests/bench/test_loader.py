"""What `benchmark.py --bench data` stores; tests/cli/test_benchmark.py has its rates."""

import multiprocessing
from types import SimpleNamespace

import torch

from evavit.bench import loader
from evavit.bench.results import ORIGIN, read_rows

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
