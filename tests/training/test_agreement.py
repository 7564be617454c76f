"""What processes must have alike; tests/cli/test_distributed.py has runs that differ."""

import argparse
import threading

import pytest
import torch
import torch.distributed as dist

from evavit.errors import UserError
from evavit.training import agreement
from evavit.training.agreement import check_agreement, code_version
from evavit.training.config import TrainConfig
from evavit.training.distributed import Process


def processes_that(*settings):
    """The error of each process, whose settings, numbers and code are those given, or None."""
    gathered, meet = [None] * len(settings), threading.Barrier(len(settings), timeout=20)
    errors = [None] * len(settings)

    def gather(rank, item):
        gathered[rank] = item
        meet.wait()
        items = list(gathered)
        meet.wait()
        return items

    def run(rank, numbers):
        config = TrainConfig()
        names = config.options()
        config.update({name: value for name, value in numbers.items() if name in names})
        process = argparse.Namespace(distributed=True, gather=lambda item: gather(rank, item))
        try:
            check_agreement(process, config, **{name: value for name, value in numbers.items() if name not in names})
        except UserError as error:
            errors[rank] = str(error)

    threads = [threading.Thread(target=run, args=about) for about in enumerate(settings)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


@pytest.mark.parametrize(
    'name, values, told',
    [
        ('batch_size', (4, 4, 2), 'batch_size is 4 on ranks 0, 1 and 2 on rank 2'),
        ('grad_accum_steps', (1, 2), 'grad_accum_steps is 1 on rank 0 and 2 on rank 1'),
        ('lr', (None, 0.1), 'lr is None on rank 0 and 0.1 on rank 1'),
        ('seed', (1, 2, 3), 'seed is 1 on rank 0 and 2 on rank 1 and 3 on rank 2'),
        ('log_interval', (50, 1), 'log_interval is 50 on rank 0 and 1 on rank 1'),
        ('training_images', (24, 23), 'training images is 24 on rank 0 and 23 on rank 1'),
        ('teacher', ('vit 1', 'vit 2'), "teacher is 'vit 1' on rank 0 and 'vit 2' on rank 1"),
        ('validation_batches', (2, 3), 'validation batches is 2 on rank 0 and 3 on rank 1'),
    ],
)
def test_all_processes_tell_what_differs(name, values, told):
    errors = processes_that(*({name: value} for value in values))
    remedy = '; start all with the same settings, data and code'
    assert errors == [f'the processes disagree: {told}{remedy}'] * len(values)


def test_many_differences_are_counted():
    a, b = (dict(lr=value, seed=value, epochs=value, smoothing=value) for value in (0.1, 0.2))
    error, other = processes_that(a, b)
    assert error == other and '; 1 more differ; start' in error


def test_what_a_machine_may_have_for_itself():
    own = [
        dict(data_dir=name, kd_pretrained_path=name, workers=number, device=name, stall_timeout=number)
        for number, name in enumerate('ab')
    ]
    assert processes_that(*own) == [None, None]


def test_other_code_is_told(monkeypatch):
    version = code_version()
    assert torch.__version__ in version and code_version() == version
    versions = iter(['evavit 1', 'evavit 2'])
    monkeypatch.setattr(agreement, 'code_version', lambda: next(versions))
    errors = processes_that({}, {})
    assert "code is 'evavit" in errors[0] and errors[0] == errors[1]


def test_a_process_alone_is_asked_nothing(monkeypatch):
    monkeypatch.setattr(dist, 'all_gather_object', None)
    check_agreement(Process(torch.device('cpu'), 0, 0, 1), TrainConfig())
