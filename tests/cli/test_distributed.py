"""Several processes: the result of one, and an end together."""

import csv
import os
import re
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from programs import load_program
from runs import (
    MODEL,
    PATIENCE,
    QUICK,
    command,
    load_script,
    ranks,
    rows,
    scalars,
    start,
    together,
    wait_for,
    weights,
)

from evavit.training import loop

NCCL = [  # the same on two GPUs
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason='needs two GPUs'),
]
DEVICES = ['cpu', pytest.param('cuda', marks=NCCL)]

AUGMENTED = ['--aa', 'rand-m9-mstd0.5-inc1', '--drop-path', '0', '--model-ema', '--model-ema-decay', '0.8']
STILL = [*MODEL, 'noise_std=0']  # what a process draws for itself is off: noise, drop path, mixup, erasing


@pytest.mark.parametrize(
    'flags, processes, tolerance',
    [
        (['--aug-repeats', '3'], 2, 1e-4),
        pytest.param([], 2, 1e-4, marks=pytest.mark.slow),
        pytest.param(['--aug-repeats', '3'], 3, 1e-4, marks=pytest.mark.slow),
        pytest.param(['--device', 'cuda'], 2, 2e-3, marks=NCCL),
        pytest.param(
            ['--device', 'cuda', '--amp'], 2, 5e-2, marks=NCCL
        ),  # products of bfloat16, 8 bits, in other orders
    ],
    ids=['repeated', 'plain', 'three', 'nccl', 'nccl bfloat16'],
)
def test_several_processes_equal_one_with_the_same_global_batch(
    train, images, tmp_path, flags, processes, tolerance, record_property
):
    """Augmented alike, with accumulation and average; 13 validation images, of which no process has as many."""
    batch = 2 * processes
    flags = [*AUGMENTED, *flags, '--global-batch-size', batch]
    one = train('one', *flags, '-b', batch, model=STILL)
    done = command(
        'train',
        *STILL,
        *QUICK,
        *flags,
        '-b',
        '1',
        '--grad-accum-steps',
        '2',
        '--data-dir',
        images,
        '--output',
        tmp_path,
        '--experiment',
        'more',
        processes=processes,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('epoch 1: ') == 1  # only the first process reports
    more, worst = tmp_path / 'more', 0.0
    exact = tolerance == 1e-4
    names = ['train/loss', 'train/grad_norm', 'eval/loss', 'eval/raw_loss']
    for name in names + ['eval/top1', 'eval/raw_top1'] * exact:  # one image of 13 that changes sides is 8 %
        a, b = scalars(one, name), scalars(more, name)
        assert a.keys() == b.keys()
        torch.testing.assert_close(list(a.values()), list(b.values()), rtol=tolerance, atol=1e-6)
        worst = max(worst, *(abs(a[key] - b[key]) / abs(a[key]) for key in a))
    if exact:
        a, b = weights(one / 'last.safetensors'), weights(more / 'last.safetensors')
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    record_property(
        'figure',
        f'{processes} processes{", repeated" if "--aug-repeats" in flags else ""}: losses, '
        f'gradients and accuracies within {worst:.0e}',
    )


@pytest.mark.slow
def test_batch_norm_is_judged_by_the_statistics_that_are_saved(call, images, tmp_path):
    """Those of the first process, for weights and average alike; each process has its own while it trains."""
    model = ['--model', 'resnet10t', '--img-size', '32', '--model-ema', '--model-ema-decay', '0.5']
    done = command(
        'train', *model, *QUICK, '-b', '2', '--lr', '1e-2', '--data-dir', images, '--output', tmp_path, processes=2
    )
    assert done.returncode == 0, done.stderr
    run = next(tmp_path.glob('*/last.safetensors')).parent
    flags = ['--data-dir', images, '--workers', '0', '--results-file', tmp_path / 'found.csv']
    assert call('validate', '--checkpoint', run / 'last.safetensors', *flags)[0] == 0
    (found,) = csv.DictReader((tmp_path / 'found.csv').read_text().splitlines())
    assert float(found['loss']) == pytest.approx(float(rows(run)[-1]['eval_loss']), abs=1e-4)


@pytest.mark.parametrize(
    'flags, told',
    [
        pytest.param(['-b', '4'], 'batch_size is 2 on rank 0 and 4 on rank 1', marks=pytest.mark.slow),
        pytest.param(['--grad-accum-steps', '2'], 'grad_accum_steps is 1 on rank 0 and 2', marks=pytest.mark.slow),
        pytest.param(['--lr', '0.1'], 'lr is 0.001 on rank 0 and 0.1 on rank 1', marks=pytest.mark.slow),
        pytest.param(['--seed', '7'], 'seed is 42 on rank 0 and 7 on rank 1', marks=pytest.mark.slow),
        (['--val-fraction', '0.3', '--data-dir', 'renamed'], 'held out images is '),
        (['--lr', '0.1', '--data-dir', 'fewer'], 'lr is 0.001 on rank 0 and 0.1 on rank 1; training images is 24'),
    ],
)
def test_processes_that_differ_stop_before_the_first_update(images, tmp_path, flags, told):
    """With one line, all of them. One has fewer images where its flags say so."""
    if 'fewer' in flags:
        shutil.copytree(images, tmp_path / 'fewer')
        (tmp_path / 'fewer' / 'train' / 'plum' / '7.png').unlink()
        flags = [tmp_path / 'fewer' if flag == 'fewer' else flag for flag in flags]
    own = []
    if 'renamed' in flags:  # as many images under other names
        shutil.copytree(images / 'train', tmp_path / 'renamed')
        shutil.copytree(images / 'train', tmp_path / 'first')
        for picture in sorted((tmp_path / 'renamed').glob('*/*.png')):
            picture.rename(picture.with_name(f'z{picture.name}'))
        flags = [tmp_path / 'renamed' if flag == 'renamed' else flag for flag in flags]
        own = ['--val-fraction', '0.3', '--data-dir', tmp_path / 'first']
    place = ['-b', '2', '--data-dir', images, '--output', tmp_path, '--experiment', 'run', '--stall-timeout', '60']
    jobs = [
        start('train', *MODEL, *QUICK, *place, *those, variables=variables)
        for those, variables in zip((own, flags), ranks(2), strict=True)
    ]
    results = [job.communicate(timeout=60 * PATIENCE) for job in jobs]
    assert [job.returncode for job in jobs] == [2, 2], results
    assert results[0][1].startswith(f'error: the processes disagree: {told}') and results[0][1].count('\n') == 1
    assert results[1][1] == '' and not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_checkpoints_of_one_name_that_differ(images, tmp_path, monkeypatch):
    """Two machines, each with a disk and a run of its own: alike in name and place, but not in weights."""
    jobs, flags = [], [*MODEL, *QUICK, '--data-dir', images, '--output', 'out', '--experiment', 'run']
    for rank, variables in enumerate(ranks(2)):
        (tmp_path / str(rank)).mkdir()
        monkeypatch.chdir(tmp_path / str(rank))
        assert command('train', *flags, '--epochs', '1', '--seed', rank).returncode == 0
        jobs.append(partial(start, 'train', *flags, '-b', '2', '--resume', 'auto', variables=variables))
    for rank, job in enumerate(jobs):
        monkeypatch.chdir(tmp_path / str(rank))
        jobs[rank] = job()
    results = [job.communicate(timeout=60 * PATIENCE) for job in jobs]
    assert [job.returncode for job in jobs] == [2, 2], results
    assert results[0][1].startswith('error: the processes would continue from different checkpoints (out/run/last')
    assert results[0][1].count('\n') == 1 and results[1][1] == ''


@pytest.mark.parametrize(
    'flags, told',
    [
        pytest.param(
            ['--resume', 'never.pth.tar'],
            'error: rank 1: --resume never.pth.tar: no such file',
            marks=pytest.mark.slow,
        ),
        ([], 'run already holds a run: continue it with --resume auto'),
    ],
)
def test_a_fault_of_one_process_is_told(train, images, tmp_path, flags, told):
    """Each process has its own lines; the other one, which has lost it, says so, and neither a traceback."""
    train('run', '--epochs', '1')
    place = ['-b', '2', '--data-dir', images, '--output', tmp_path, '--experiment', 'run', '--stall-timeout', '60']
    jobs = [
        start('train', *MODEL, *QUICK, *place, *own, variables=variables)
        for own, variables in zip((['--resume', 'auto'], flags), ranks(2), strict=True)
    ]
    if 'never.pth.tar' in flags:  # the other one waits for it
        told_by = [jobs[1].communicate(timeout=60 * PATIENCE)]
        os.killpg(jobs[0].pid, signal.SIGKILL)
        jobs[0].communicate()
    else:
        told_by = [job.communicate(timeout=60 * PATIENCE) for job in jobs]
        assert told_by[0][1].startswith('error: another process of this run has ended') and jobs[0].returncode == 2
    assert jobs[1].returncode == 2 and all(err.count('\n') == 1 for _, err in told_by), told_by
    assert told in told_by[-1][1]


def ranks_of(job):
    """{rank: process id} of the processes that torchrun started, from the environment each was given."""
    found = {}
    for process in Path('/proc').iterdir():
        try:
            parent = (process / 'stat').read_text().rsplit(')', 1)[1].split()[1]
            if int(parent) == job.pid:
                environment = (process / 'environ').read_text().split('\0')
                words = dict(word.split('=', 1) for word in environment if '=' in word)
                found[int(words['RANK'])] = int(process.name)
        except (OSError, KeyError, ValueError, IndexError):
            continue  # not a process, or gone
    return found


LONG = [*QUICK, '-b', '2', '--epochs', '300', '--checkpoint-interval', '3', '--resume', 'auto']


@pytest.mark.parametrize('device', DEVICES)
def test_a_killed_process_stops_the_others_and_a_restart_resumes(call, images, tmp_path, device, record_property):
    """Two processes go on as one: with the same global batch at the update, with another one at the epoch's start."""
    place = ['--data-dir', images, '--output', tmp_path, '--experiment', 'run', '--device', device]
    job = start('train', *MODEL, *LONG, *place, processes=2)
    wait_for(tmp_path / 'run' / 'previous.pth.tar', job)
    os.kill(ranks_of(job)[1], signal.SIGKILL)
    began = time.monotonic()
    job.communicate(timeout=60)
    seconds = time.monotonic() - began
    assert job.returncode != 0
    last = torch.load(tmp_path / 'run' / 'last.pth.tar', weights_only=False)
    epoch = last['saver']['position']['epoch']
    last['saver']['position']['update'] = 3  # wherever the kill was: within the epoch
    for batch, expected in (('4', 'go on in the same order'), ('2', f'restarts at epoch {epoch}')):
        torch.save(last, tmp_path / 'run' / 'last.pth.tar')
        code, out, err = call('train', *MODEL, *LONG, *place, '-b', batch, '--epochs', epoch + 1)
        assert code == 0 and 'resuming from' in out and expected in out, out + err
        assert f'epoch {epoch} {4 if batch == "4" else 1}/' in out
    record_property('figure', f'the others ended {seconds:.0f} s after a kill -9; resumed with 1 process')


@pytest.mark.parametrize('device', [pytest.param('cpu', marks=pytest.mark.slow), DEVICES[1]])
def test_a_killed_process_is_restarted_by_torchrun(images, tmp_path, device):
    flags = [*MODEL, *LONG, '--epochs', '12', '--data-dir', images, '--output', tmp_path, '--experiment', 'run']
    flags += ['--device', device]
    job = start('train', *flags, processes=2, launcher_flags=['--max-restarts', '1'])
    wait_for(tmp_path / 'run' / 'previous.pth.tar', job)
    os.kill(ranks_of(job)[1], signal.SIGKILL)
    out, err = job.communicate(timeout=180 * PATIENCE)
    assert job.returncode == 0, err
    assert out.count('resuming from') == 1 and 'done: epoch' in out
    assert [row['epoch'] for row in rows(tmp_path / 'run')] == [str(epoch) for epoch in range(12)]


@pytest.mark.parametrize(
    'whom, device',
    [
        pytest.param('torchrun', 'cpu', marks=pytest.mark.slow),
        ('one process', 'cpu'),
        pytest.param('torchrun', 'cuda', marks=NCCL),
        pytest.param('one process', 'cuda', marks=NCCL),
    ],
)
def test_a_signal_stops_all_processes_with_a_checkpoint(images, tmp_path, whom, device):
    place = ['--data-dir', images, '--output', tmp_path, '--experiment', 'run', '--device', device]
    job = start('train', *MODEL, *LONG, '--checkpoint-interval', '1000', *place, processes=2, session=False)
    wait_for(tmp_path / 'run' / 'last.pth.tar', job)
    os.kill(job.pid if whom == 'torchrun' else ranks_of(job)[1], signal.SIGTERM)
    _, err = job.communicate(timeout=60 * PATIENCE)
    assert job.returncode != 0 and err.count('asked to stop: epoch') == 1
    if whom != 'torchrun':
        assert len(set(re.findall(r'exitcode *: *(\d+)', err))) == 1 and re.search(r'exitcode *: 75', err)
    stopped = re.search(r'asked to stop: epoch (\d+), update (\d+)', err) or re.search(r'epoch (\d+) is complete', err)
    saved = torch.load(tmp_path / 'run' / 'last.pth.tar', weights_only=False)['saver']['position']
    assert [saved['epoch'], saved['update']] in ([int(n) for n in stopped.groups()], [int(stopped.group(1)) + 1, 0])


def test_a_nan_in_one_process_stops_all(images, tmp_path, monkeypatch):
    """The second process alone meets it: its images are NaN after the first update."""
    flags = [*MODEL, *QUICK, '-b', '2', '--data-dir', images, '--output', tmp_path, '--experiment', 'nan']
    flags += ['--max-skipped', '3', '--checkpoint-interval', '1']
    step, calls = loop._forward_backward, []

    def poisoned(run, images, target):
        calls.append(1)
        nan = os.environ['RANK'] == '1' and len(calls) > 1
        return step(run, images * float('nan') if nan else images, target)

    monkeypatch.setattr(loop, '_forward_backward', poisoned)
    done = together(load_script('train').main, *flags)
    assert done.returncodes == [2, 2], done.stderr
    assert done.stderr.count('error: loss nan') == 1 and '3 in a row' in done.stderr
    assert done.stdout.count('skipped, ') == 2
    last = torch.load(tmp_path / 'nan' / 'last.pth.tar', weights_only=False)
    assert last['saver']['position']['update'] == 1 and all(v.isfinite().all() for v in last['state_dict'].values())


@pytest.mark.parametrize(
    'program, flags',
    [
        ('evavit/cli/inference.py', []),
        ('evavit/cli/export.py', ['model.pt2']),
        ('evavit/cli/benchmark.py', ['--bench', 'data', *MODEL, *QUICK, '--num-classes', '3', '--data-dir', 'none']),
        ('tools/avg_checkpoints.py', ['--input', 'none']),
        ('tools/save_for_hub.py', ['--checkpoint', 'none', '--output', 'mine', '--data', 'x', '--licence', 'mit']),
        ('examples/knn.py', MODEL),
        ('examples/demo.py', MODEL),
    ],
)
def test_a_program_of_one_process_says_so_to_a_launcher(program, flags):
    """Each process would judge, time or write what the other does, or half of it."""
    pytest.importorskip('sklearn')
    done = together(load_program(program).main, *flags)
    line = f'error: {Path(program).name} is one process, and a launcher started 2; start it without a launcher\n'
    assert done.returncodes == [2, 2] and done.stderr == line, done
