"""tools/scale.py on CPU processes: its rows, and what is left out."""

import csv

import pytest
import torch
from programs import ROOT, load_program
from runs import KWARGS, PATIENCE, ranks, start, write_images

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
    assert not any(row['error'] for row in made[:-1]), [row['error'] for row in made]
    assert [(row['bench'], row['gpus'], row['grad_accum_steps'], row['status']) for row in made] == [
        ('weak', '1', '1', 'ok'),
        ('strong', '1', '4', 'ok'),
        *[('weak', '2', '1', 'ok'), ('strong', '2', '2', 'ok')] * 2,
        ('weak', '2', '', 'failed'),
    ]
    assert 'no_such_argument' in made[-1]['error'] and made[-1]['ddp'] == 'no_such_argument'
    for row in made[:-1]:
        assert row['global_batch_size'] == str(4 * int(row['gpus']) if row['bench'] == 'weak' else 16)
        assert float(row['ms']) > 0 and float(row['gradient_mb']) > 0
        assert row['device'] and row['torch'] == torch.__version__ and row['commit'] and row['date']
        alone = row['gpus'] == '1'
        assert (row['no_sync_ms'] == '') == (row['all_reduce_ms'] == '') == (row['communication'] == '') == alone


@pytest.mark.slow
def test_train_py_and_the_budget(tmp_path, capfd):
    scale, rows = load_program('tools/scale.py'), tmp_path / 'rows.csv'
    write_images(tmp_path / 'photos' / 'train', dict(a=8, b=8))
    write_images(tmp_path / 'photos' / 'validation', dict(a=3, b=2))
    flags = [*SMALL, '--results-file', str(rows), '--data-dir', str(tmp_path / 'photos'), '--train-workers', '0']
    scale.main(['--bench', 'train', *flags])
    (row,) = read(rows)
    assert (row['bench'], row['status'], row['gpus'], row['workers']) == ('train', 'ok', '1', '0'), capfd.readouterr()
    assert float(row['img_per_s']) > 0 and 0 <= float(row['data_wait']) <= 1 and float(row['run_s']) > 0
    scale.main(['--bench', 'train', '--seconds', '0', *flags])
    assert 'are over' in capfd.readouterr().out


@pytest.mark.parametrize(
    'flags, words',
    [
        (['--gpus', '3'], ['--gpus 3', '--nproc-per-node']),
        (['--ddp', 'bucket_cap_mb=one'], ['bucket_cap_mb=one']),
        (['--bench', 'train'], ['--data-dir']),
    ],
)
def test_faults_are_a_line(flags, words):
    with pytest.raises(UserError) as fault:
        load_program('tools/scale.py').main([*SMALL, *flags])
    assert all(word in str(fault.value) for word in words)


def test_a_folder_without_pictures_is_a_line(tmp_path):
    with pytest.raises(UserError, match='no folder train in it'):
        load_program('tools/scale.py').main([*SMALL, '--bench', 'train', '--data-dir', str(tmp_path)])
