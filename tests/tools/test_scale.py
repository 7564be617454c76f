"""tools/scale.py on CPU processes: its rows, and what is left out."""

import csv
import itertools
import os
import time
import types

import pytest
import torch
from programs import ROOT, load_program
from runs import KWARGS, PATIENCE, command, ranks, start, write_images

from evavit.errors import UserError

SMALL = ['--models', 'eva_deit_tiny', '--device', 'cpu', '-b', '4', '--no-amp', '--model-kwargs']
SMALL += [f'{key}={value}' for key, value in KWARGS.items()]


def read(path):
    with open(path, newline='') as stream:
        return list(csv.DictReader(stream))


def test_updates_of_one_and_two_processes(tmp_path):
    """Weak and strong, with and without exchange; a second run replaces what it measures again."""
    rows = tmp_path / 'rows.csv'
    flags = [*SMALL, '--global-batch-size', '16', '--row-seconds', '0.01', '--results-file', rows]
    variants = ['--ddp', 'default', 'gradient_as_bucket_view,static_graph,bucket_cap_mb=1', 'no_such_argument']
    # No forks, in which a backward pass may fail once this process has made one.
    words = [ROOT / 'tools' / 'scale.py', *flags, '--gpus', '1', '2', *variants]
    jobs = [start(*words, variables=variables) for variables in ranks(2)]
    told = [job.communicate(timeout=120 * PATIENCE) for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], told
    made = read(rows)
    assert not any(row['error'] for row in made[:-2]), [row['error'] for row in made]
    assert [(row['bench'], row['gpus'], row['grad_accum_steps'], row['status']) for row in made] == [
        ('weak', '1', '1', 'ok'),
        ('strong', '1', '4', 'ok'),
        *[('weak', '2', '1', 'ok'), ('strong', '2', '2', 'ok')] * 2,
        ('weak', '2', '1', 'failed'),
        ('strong', '2', '2', 'failed'),
    ]
    assert 'no_such_argument' in made[-1]['error'] and made[-1]['ddp'] == 'no_such_argument'
    for row in made[:-2]:
        assert row['global_batch_size'] == str(4 * int(row['gpus']) if row['bench'] == 'weak' else 16)
        assert float(row['ms']) > 0 and float(row['gradient_mb']) > 0
        assert row['device'] and row['torch'] == torch.__version__ and row['commit'] and row['date']
        alone = row['gpus'] == '1'
        assert (row['no_sync_ms'] == '') == (row['all_reduce_ms'] == '') == (row['communication'] == '') == alone


FAULT = """
import os, sys
from programs import load_program
from evavit.errors import run_script

scale = load_program('tools/scale.py')
scale.ALONE = 3
update = scale.Update.__call__

def broken(self, exchange=True):
    if {where}:
        raise RuntimeError('CUDA out of memory (of the test)')
    return update(self, exchange)

scale.Update.__call__ = broken
sys.exit(run_script(scale.main))
"""


def broken(folder, where):
    """tools/scale.py with updates that fail under a condition, and its environment."""
    program = folder / 'broken.py'
    program.write_text(FAULT.format(where=where))
    paths = [ROOT, ROOT / 'tests', *filter(None, [os.environ.get('PYTHONPATH')])]
    return program, dict(PYTHONPATH=os.pathsep.join(map(str, paths)))


@pytest.mark.slow
def test_a_failed_row_keeps_the_others_and_is_replaced(tmp_path):
    """What was measured before stays, the row names its bench, and a good row takes its place."""
    rows = tmp_path / 'rows.csv'
    flags = [*SMALL, '--global-batch-size', '16', '--row-seconds', '0.01', '--results-file', rows]
    program, variables = broken(tmp_path, 'self.run.grad_accum_steps > 1')
    done = command(program, *flags, variables=variables)
    assert done.returncode == 0, done.stderr
    assert [(row['bench'], row['status']) for row in read(rows)] == [('weak', 'ok'), ('strong', 'failed')]
    assert 'out of memory' in read(rows)[1]['error']
    assert command(ROOT / 'tools' / 'scale.py', *flags).returncode == 0
    assert [(row['bench'], row['status']) for row in read(rows)] == [('weak', 'ok'), ('strong', 'ok')]


@pytest.mark.slow
def test_a_fault_of_one_process_ends_all_with_a_line(tmp_path):
    rows = tmp_path / 'rows.csv'
    program, variables = broken(tmp_path, "os.environ['RANK'] == '1' and self.run.grad_accum_steps > 1")
    flags = [*SMALL, '--global-batch-size', '16', '--row-seconds', '0.01', '--results-file', rows]
    done = command(program, *flags, processes=2, variables=variables)
    assert done.returncode and 'error: rank 1: CUDA out of memory' in done.stderr, done.stderr
    assert read(rows)[0]['bench'] == 'weak' and read(rows)[0]['status'] == 'ok'


def test_flags_of_train_py_are_in_the_row(tmp_path):
    """Measurements that they make another one stand side by side."""
    scale, rows = load_program('tools/scale.py'), tmp_path / 'rows.csv'
    flags = [*SMALL, '--bench', 'weak', '--row-seconds', '0.01', '--results-file', str(rows)]
    other = ['--model-kwargs', 'depth=1', '--opt', 'sgd']
    for more in ([], [*other, '--workers', '1'], other):
        scale.main([*flags, *more])
    one, other = read(rows)
    assert 'opt=' not in one['flags'] and "'depth': 2" in one['flags']
    assert 'opt=sgd' in other['flags'] and "'depth': 1" in other['flags'] and 'workers' not in other['flags']


@pytest.mark.slow
def test_train_py(tmp_path, capfd):
    """The row says what train.py did, also where its flags say otherwise than this program."""
    scale, rows = load_program('tools/scale.py'), tmp_path / 'rows.csv'
    write_images(tmp_path / 'photos' / 'train', dict(a=8, b=8))
    write_images(tmp_path / 'photos' / 'validation', dict(a=3, b=2))
    flags = [*SMALL, '--results-file', str(rows), '--data-dir', str(tmp_path / 'photos')]
    scale.main(['--bench', 'train', *flags, '--workers', '0', '--grad-accum-steps', '2', '--global-batch-size', '8'])
    (row,), told = read(rows), capfd.readouterr()
    assert (row['bench'], row['status'], row['gpus'], row['images']) == ('train', 'ok', '1', '16'), told
    assert 'global batch 8 = 4 per process × 1 processes × 2 accumulated' in told.out
    sizes = [row[name] for name in ('workers', 'batch_size', 'grad_accum_steps', 'global_batch_size')]
    assert sizes == ['0', '4', '2', '8']
    assert float(row['img_per_s']) > 0 and 0 <= float(row['data_wait']) <= 1 and float(row['run_s']) > 0


def test_one_budget_for_all(tmp_path, capfd, monkeypatch):
    """What the updates took is gone for train.py."""
    scale, now = load_program('tools/scale.py'), itertools.count(0, 100)
    write_images(tmp_path / 'photos' / 'train', dict(a=8))
    monkeypatch.setattr(scale, 'time', types.SimpleNamespace(monotonic=now.__next__, perf_counter=time.perf_counter))
    flags = [*SMALL, '--row-seconds', '0.01', '--data-dir', str(tmp_path / 'photos')]
    scale.main([*flags, '--bench', 'weak', 'train', '--seconds', '150'])
    told = capfd.readouterr().out
    assert 'bench weak' in told and 'train.py no eva_deit_tiny on 1 and what follows are not run' in told


@pytest.mark.parametrize(
    'flags, words',
    [
        (['--gpus', '3'], ['--gpus 3', '--nproc-per-node']),
        (['--ddp', 'bucket_cap_mb=one'], ['bucket_cap_mb=one']),
        (['--bench', 'train'], ['--data-dir']),
        (['--bench', 'train', '--ddp', 'static_graph'], ['--ddp static_graph', 'train.py']),
        (['--gpus', '0'], ['--gpus 0', 'below 1']),
        (['--gpus', '1', '-1'], ['--gpus -1', 'below 1']),
        (['-b', '0'], ['-b 0', 'below 1']),
        (['--bench', 'train', '--images', '0'], ['--images 0', 'below 1']),
        (['--torchcompile', 'default'], ['--torchcompile', '--modes']),
        (['--grad-accum-steps', '2'], ['--grad-accum-steps 2', 'strong']),
        (['--global-batch-size', '6'], ['--global-batch-size 6', 'multiple of 4']),
        (['--bench', 'train', '--data-dir', 'PHOTOS', '--global-batch-size', '6'], ['global_batch_size 6']),
    ],
)
def test_faults_are_a_line(flags, words, tmp_path):
    (tmp_path / 'train' / 'a').mkdir(parents=True)
    with pytest.raises(UserError) as fault:
        load_program('tools/scale.py').main([*SMALL, *(str(tmp_path) if it == 'PHOTOS' else it for it in flags)])
    assert all(word in str(fault.value) for word in words)


def test_a_folder_without_pictures_is_a_line(tmp_path):
    with pytest.raises(UserError, match='no folder train in it'):
        load_program('tools/scale.py').main([*SMALL, '--bench', 'train', '--data-dir', str(tmp_path)])


def test_photographs_that_are_not_made_are_a_line(tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(UserError, match='does not make it'):
        load_program('tools/scale.py').main([*SMALL, '--bench', 'train', '--data-dir', str(tmp_path / 'file' / 'new')])
