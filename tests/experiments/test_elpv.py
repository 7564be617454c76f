"""experiments/elpv from end to end with a model of one block: pretraining, fine-tuning, rows."""

import contextlib
import csv
import gzip
import re
import struct
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip('sklearn')
from programs import load_program
from runs import write_images

from evavit.errors import Preempted, UserError, run_script


def write_fashion_mnist(folder, count=20):
    """The four files with a few pictures of noise, packed as they are published."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split in ('train', 't10k'):
        for kind, head, content in (
            ('images-idx3', (2051, count, 28, 28), rng.integers(0, 255, count * 784)),
            ('labels-idx1', (2049, count), np.arange(count) % 10),
        ):
            data = struct.pack(f'>{len(head)}I', *head) + content.astype(np.uint8).tobytes()
            (folder / f'{split}-{kind}-ubyte.gz').write_bytes(gzip.compress(data))


def test_the_comparison_at_a_small_size(tmp_path, monkeypatch, capsys):
    example = load_program('experiments/elpv/run.py')
    monkeypatch.setattr(example, 'ARMS', tuple(arm for arm in example.ARMS if arm[0] == 'eva_deit_tiny'))
    write_fashion_mnist(tmp_path / 'FashionMNIST' / 'raw')
    for task, names in (('type', ('mono', 'poly')), ('defect', ('p000', 'p033', 'p067'))):
        for split in ('train', 'validation'):
            write_images(tmp_path / 'elpv' / task / split, dict.fromkeys(names, 3))
    flags = [
        '--data-dir',
        tmp_path / 'elpv',
        '--fashion-mnist',
        tmp_path,
        '--output',
        tmp_path / 'runs',
        '--results-file',
        tmp_path / 'rows.csv',
        '--seeds',
        '1',
        '--epochs',
        '1',
        '--pretrain-epochs',
        '1',
        '--workers',
        '0',
        '--pretrain-workers',
        '0',
        '--device',
        'cpu',
        '--no-amp',
        '-b',
        '3',
        '--min-lr',
        '0',
        '--global-batch-size',
        '3',
        '--model-kwargs',
        'depth=1',
        'embed_dim=16',
        'num_heads=2',
    ]
    assert run_script(example.main, list(map(str, flags))) == 0, capsys.readouterr()
    with open(tmp_path / 'rows.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert sorted((row['task'], row['start']) for row in rows) == [
        ('defect', 'fashion_mnist'),
        ('defect', 'scratch'),
        ('fashion_mnist', 'scratch'),
        ('type', 'fashion_mnist'),
        ('type', 'scratch'),
    ]
    assert all(0 <= float(row['balanced_accuracy']) <= 100 and row['date'] for row in rows)
    assert {row['majority'] for row in rows if row['task'] == 'defect'} == {'33.333'}
    # The patches of 2 pixels and one channel came along, resampled to 16; the weights of a finished run are gone.
    log = (tmp_path / 'runs' / 'type-eva_deit_tiny-fashion_mnist-0.log').read_text()
    assert re.search(r'resized +1 +patch_embed\.proj +16×1×2×2 to 16×1×16×16', log), log
    assert not list((tmp_path / 'runs' / 'type-eva_deit_tiny-scratch-0').glob('*.pth.tar'))
    # Once more: nothing is left to do.
    capsys.readouterr()
    run = example.run
    monkeypatch.setattr(example, 'run', lambda *_: pytest.fail('a run was made again'))
    assert run_script(example.main, list(map(str, flags))) == 0
    assert 'balanced_accuracy' in capsys.readouterr().out
    flags[flags.index('--pretrain-epochs') + 1] = '2'
    assert run_script(example.main, list(map(str, flags))) == 2
    assert '--pretrain-epochs 2: ' in (line := capsys.readouterr().err) and ' is of 1; give that' in line
    monkeypatch.setattr(example, 'run', run)
    flags[flags.index('--pretrain-epochs') + 1] = '1'
    flags[flags.index('--epochs') + 1] = '2'
    (tmp_path / 'rows.csv').write_text(''.join((tmp_path / 'rows.csv').read_text().splitlines(True)[:2]))
    assert run_script(example.main, list(map(str, flags))) == 2
    assert 'type-eva_deit_tiny-scratch-0 is of 1 epochs; give that, or name another' in capsys.readouterr().out


def test_data_that_is_not_there(tmp_path, capsys):
    example = load_program('experiments/elpv/run.py')
    flags = ['--data-dir', str(tmp_path), '--fashion-mnist', str(tmp_path)]
    assert run_script(example.main, flags) == 2
    assert 'experiments/elpv/build_data.py' in capsys.readouterr().err


FLAGS = dict.fromkeys(('epochs', 'pretrain_epochs', 'workers', 'pretrain_workers'), 1)
OTHERS = dict.fromkeys(('data_dir', 'fashion_mnist'), Path())


def test_a_signal_ends_all_runs(monkeypatch, tmp_path):
    example, begun = load_program('experiments/elpv/run.py'), []
    jobs = [('type', 'resnet18', 'scratch', seed) for seed in range(3)]

    def run(job, args):
        begun.append(job)
        raise Preempted('asked to stop') if job[3] else ValueError('a run of its own')

    monkeypatch.setattr(example, 'run', run)
    args = SimpleNamespace(output=tmp_path, flags=[], **FLAGS, **OTHERS)
    with pytest.raises(Preempted):
        example.work(args, jobs, lambda job: True)
    assert begun == jobs[:2]
    for job in (jobs[0], example.FIRST):  # and go on
        flags = example.flags_of(job, args)
        assert flags[flags.index('--resume') + 1] == 'auto'


def test_processes_share_the_runs(monkeypatch, tmp_path):
    """A run of another process is left to it; what needs the pretraining waits for that, and a failed one ends it."""
    example, made = load_program('experiments/elpv/run.py'), []
    later, alone, other = [('type', 'eva_deit_tiny', start, 0) for start in (example.PRETRAINING, 'scratch', 'x')]
    rows = {other}
    args = SimpleNamespace(output=tmp_path)

    def of_other(seconds):
        assert made == [alone]
        rows.add(example.FIRST)
        stack.close()

    monkeypatch.setattr(example, 'make', lambda job, args, failed: made.append(job))
    monkeypatch.setattr(example.time, 'sleep', of_other)
    with contextlib.ExitStack() as stack:
        stack.enter_context(example.alone(tmp_path / f'{example.name_of(example.FIRST)}.lock'))
        assert example.work(args, [example.FIRST, later, alone, other], lambda job: job not in rows) == []
    assert made == [alone, later]
    monkeypatch.setattr(example, 'make', lambda job, args, failed: failed.append(job))
    assert example.work(args, [example.FIRST, later], lambda job: True) == [example.FIRST]


def test_weights_are_there_until_the_row_is(monkeypatch, tmp_path):
    example, job = load_program('experiments/elpv/run.py'), ('type', 'resnet18', 'scratch', 0)
    weights = tmp_path / example.name_of(job) / 'last.safetensors'
    weights.parent.mkdir()
    weights.touch()
    monkeypatch.setattr(example, 'run', lambda *_: dict.fromkeys(example.COLUMNS, 1))
    monkeypatch.setattr(example, 'remove_checkpoints', lambda folder, weights: (folder / 'last.safetensors').unlink())
    (tmp_path / 'rows.csv').mkdir()
    args = SimpleNamespace(output=tmp_path, results_file=tmp_path / 'rows.csv')
    with pytest.raises((OSError, UserError)):
        example.make(job, args, [])
    assert weights.exists()
    example.make(job, SimpleNamespace(output=tmp_path, results_file=tmp_path / 'r.csv'), [])
    assert not weights.exists() and (tmp_path / 'r.csv').exists()
