"""Runs that are stopped or killed in an epoch go on as if nothing had been, and a stop is orderly."""

import errno
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import (
    DRAWN,
    KWARGS,
    MODEL,
    PATIENCE,
    QUICK,
    ROOT,
    assert_same_run,
    command,
    rows,
    scalars,
    signal_at,
    start,
    wait_for,
    words,
)
from torch.utils.tensorboard import SummaryWriter

from evavit.errors import PREEMPTED, LocalError
from evavit.training import checkpoint, data, loop, metrics
from evavit.training.signals import SIGNALS

RESUMED = [
    *DRAWN,
    '--epochs',
    '3',
    '--warmup-epochs',
    '1',
    '--sched-on-updates',
    '--grad-accum-steps',
    '2',
    '-b',
    '2',
    '--clip-grad',
    '1',
    '--resume',
    'auto',
]


def test_a_stop_within_an_epoch_changes_nothing(train, call, images, tmp_path, monkeypatch):
    """Stops in the first update, within an epoch, at the end of one, in the middle of the last."""
    whole = train('whole', *RESUMED)
    place = ['--data-dir', images, '--output', tmp_path, '--experiment', 'parts']
    for number, moment in enumerate((1, 3, 6, 15)):
        signal_at(monkeypatch, [moment], SIGNALS[number % len(SIGNALS)])
        code, _, err = call('train', *MODEL, *QUICK, *place, *RESUMED)
        monkeypatch.undo()
        assert code == PREEMPTED and '--resume auto' in err and err.count('\n') == 1
        torch.rand(7)  # whatever the process draws before it resumes is of no effect
    parts = train('parts', *RESUMED)
    assert_same_run(whole, parts)


@pytest.mark.parametrize(
    'schedule',
    [
        '--sched multistep --decay-milestones 1',
        '--sched multistep --decay-milestones 1 --sched-on-updates',
        '--sched tanh',
    ],
)
def test_a_stop_within_an_epoch_changes_no_learning_rate(schedule, train, call, images, tmp_path, monkeypatch):
    """A run begins at lr, or warmup_lr, where timm's schedule itself may say another rate for its first moment."""
    flags = ['--model-ema', *words(schedule), '--resume', 'auto']
    whole = train('whole', *flags)
    place = ['--data-dir', images, '--output', tmp_path, '--experiment', 'parts']
    for moment in (2, 8):  # of the first epoch, and of the second
        with monkeypatch.context() as patch:
            signal_at(patch, [moment])
            code, _, _ = call('train', *MODEL, *QUICK, *place, *flags)
        assert code == PREEMPTED
    assert_same_run(whole, train('parts', *flags))


def checkpoints_of(folder):
    return {
        path.name: path.read_bytes() for path in folder.iterdir() if '.pth.tar' in path.name or '.safe' in path.name
    }


def test_a_resume_at_an_epoch_s_start_writes_nothing_of_its_own(train, call, images, tmp_path, monkeypatch):
    """After a signal in a validation, of the first epoch and of the second, and after the end of the run."""
    whole, seen, sent = train('whole', *RESUMED), [], []

    def stop_in_validation(*args, **kwargs):
        if not sent:  # an average is validated too, and a second signal a second later ends the process at once
            os.kill(os.getpid(), signal.SIGTERM)
        sent.append(args)
        return evaluate(*args, **kwargs)

    def resume_and_look(*args):
        before = checkpoints_of(tmp_path / 'parts') if (tmp_path / 'parts').is_dir() else {}
        position = resume(*args)
        assert checkpoints_of(tmp_path / 'parts') == before
        seen.append((position.epoch, position.update, len(before)))
        return position

    evaluate, resume = loop.evaluate, checkpoint.resume
    monkeypatch.setattr(loop, 'evaluate', stop_in_validation)
    monkeypatch.setattr(checkpoint, 'resume', resume_and_look)
    place = ['--data-dir', images, '--output', tmp_path, '--experiment', 'parts']
    for epoch in range(2):
        sent.clear()
        code, _, err = call('train', *MODEL, *QUICK, *place, *RESUMED)
        assert code == PREEMPTED and f'epoch {epoch} is complete' in err
    monkeypatch.setattr(loop, 'evaluate', evaluate)
    parts = train('parts', *RESUMED)
    assert_same_run(whole, parts)
    ended = checkpoints_of(parts)
    train('parts', *RESUMED)
    assert checkpoints_of(parts) == ended
    assert [place[:2] for place in seen] == [(0, 0), (1, 0), (2, 0), (3, 0)]


def test_a_kill_between_the_curves_and_the_checkpoint(train, call, images, tmp_path, monkeypatch):
    """The epoch's validation is drawn already when it comes again, with all of it or the first point on the disk."""
    flags = [*RESUMED, '--checkpoint-interval', '6']
    whole = train('whole', *flags)

    class Killed(BaseException):
        pass

    def killed(*_):
        raise Killed

    place = ['--data-dir', images, '--output', tmp_path, '--experiment', 'parts']
    add = SummaryWriter.add_scalar

    def add_one(writer, name, *args, **kwargs):
        add(writer, name, *args, **kwargs)
        if name.startswith('eval/'):
            writer.flush()
            raise Killed

    for owner, name, kill in ((checkpoint.Saver, 'save_epoch', killed), (SummaryWriter, 'add_scalar', add_one)):
        for _ in range(2):
            with monkeypatch.context() as patch, pytest.raises(Killed):
                patch.setattr(owner, name, kill)
                call('train', *MODEL, *QUICK, *place, *flags)
    assert len(list((tmp_path / 'parts').glob('events.*'))) == 4
    assert_same_run(whole, train('parts', *flags))


def test_epochs_without_validation(train, call, images, tmp_path, monkeypatch):
    """Every second epoch is validated, and the last: stopped and killed at the edges of the others, the run is the one
    left alone. Those have a row without validation and `last.pth.tar`, and no other checkpoint."""
    flags = [*RESUMED, '--epochs', '5', '--val-interval', '2']
    whole = train('whole', *flags)
    assert [row['eval_raw_top1'] != '' for row in rows(whole)] == [False, True, False, True, True]
    assert all(float(row['train_loss']) and float(row['lr']) for row in rows(whole))
    assert list(scalars(whole, 'eval/top1')) == [12, 24, 30] and len(scalars(whole, 'train/loss')) == 30
    assert {path.name for path in whole.glob('checkpoint-*')} == {f'checkpoint-{epoch}.pth.tar' for epoch in (1, 3, 4)}

    class Killed(BaseException):
        pass

    def killed(after):
        def save(saver, position):
            if after:
                save_position(saver, position)
            raise Killed

        return save

    save_position, place = checkpoint.Saver.save_position, ['--data-dir', images, '--output', tmp_path]
    for moment in (6, 15):  # at the end of an epoch without validation, and within one
        with monkeypatch.context() as patch:
            signal_at(patch, [moment])
            code, _, _ = call('train', *MODEL, *QUICK, *place, '--experiment', 'parts', *flags)
        assert code == PREEMPTED
    for after in (False, True):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(checkpoint.Saver, 'save_position', killed(after))
            call('train', *MODEL, *QUICK, *place, '--experiment', 'parts', *flags)
    content = torch.load(tmp_path / 'parts' / 'last.pth.tar', weights_only=False)
    assert content['epoch'] == 2 and 'metric' not in content
    assert_same_run(whole, train('parts', *flags))


@pytest.mark.parametrize('flags', ['', '-b 24 --val-interval 2 --epochs 4'], ids=['within', 'ends'])
def test_a_stop_in_an_update_that_is_skipped(flags, train, call, images, tmp_path, monkeypatch):
    """As float16's first ones are. It is saved, and the updates that were skipped in a row count on."""
    flags = [*words(flags), *words('--amp --amp-dtype float16 --resume auto')]
    stepper = loop.Stepper.__init__

    def too_large(self, *args):
        stepper(self, *args)
        self._scaler = torch.amp.GradScaler('cpu', init_scale=2.0**22)

    monkeypatch.setattr(loop.Stepper, '__init__', too_large)
    whole = train('whole', *flags)
    place = ['--data-dir', images, '--output', tmp_path, '--experiment', 'parts']
    for moment in (1, 2):
        with monkeypatch.context() as patch:
            signal_at(patch, [moment])
            code, out, _ = call('train', *MODEL, *QUICK, *place, *flags)
        assert code == PREEMPTED and f'{moment} in a row' in out and 'not saved' not in out
        position = torch.load(tmp_path / 'parts' / 'last.pth.tar', weights_only=False)['saver']['position']
        assert position['streak'] == moment
    parts = train('parts', *flags)
    for name in ('last.pth.tar', 'model_best.pth.tar'):
        one, other = (torch.load(folder / name, weights_only=False) for folder in (whole, parts))
        assert one[loop.Stepper.state_dict_key] == other[loop.Stepper.state_dict_key]
        assert all(torch.equal(value, other['state_dict'][key]) for key, value in one['state_dict'].items())
    assert rows(whole) == rows(parts)


def test_a_stop_with_weights_that_are_not_finite_is_no_checkpoint(call, images, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, 'weights_are_finite', lambda task: torch.tensor(False))
    place = ['--data-dir', images, '--output', tmp_path, '--experiment', 'run']
    signal_at(monkeypatch, [2])
    code, _, err = call('train', *MODEL, *QUICK, *place)
    assert code == 2 and 'weights that are not finite after update 2 of epoch 0' in err and err.count('\n') == 1
    assert not (tmp_path / 'run' / 'last.pth.tar').exists()


def test_a_resumed_float16_run_keeps_its_scale(train, call, images, tmp_path, monkeypatch):
    flags = ['--amp', '--amp-dtype', 'float16', '--resume', 'auto']
    whole = train('whole', *flags)
    signal_at(monkeypatch, [8])
    place = ['--data-dir', images, '--output', tmp_path, '--experiment', 'parts']
    code, _, _ = call('train', *MODEL, *QUICK, *place, *flags)
    assert code == PREEMPTED
    monkeypatch.undo()
    parts = train('parts', *flags)
    assert rows(whole) == rows(parts)
    a, b = (torch.load(folder / 'last.pth.tar', weights_only=False)['amp_scaler'] for folder in (whole, parts))
    assert a == b and a['scale'] != 1


def test_random_features_that_are_kept_go_on(train, call, images, tmp_path, monkeypatch):
    """An attention that draws in some updates and keeps what it drew in others."""
    kwargs = [f'{key}={value}' for key, value in KWARGS.items() if key not in ('window_size', 'partition_grid')]
    model = ['--model', 'performer_deit_tiny', '--model-kwargs', *kwargs, 'redraw_interval=4', 'num_features=8']
    flags = ['--model-ema', '--model-ema-decay', '0.9', '--resume', 'auto']
    whole = train('whole', *flags, model=model)
    signal_at(monkeypatch, [8])
    place = ['--data-dir', images, '--output', tmp_path, '--experiment', 'parts']
    code, _, _ = call('train', *model, *QUICK, *place, *flags)
    assert code == PREEMPTED
    monkeypatch.undo()
    assert_same_run(whole, train('parts', *flags, model=model))


def test_checkpoints_within_an_epoch(train, tmp_path, monkeypatch):
    """Every 4 updates of 6 an epoch, and at an epoch's last one, before its validation."""
    saved = []
    save = checkpoint.Saver.save_position
    monkeypatch.setattr(
        checkpoint.Saver,
        'save_position',
        lambda saver, position: (saved.append((position.epoch, position.update)), save(saver, position)),
    )
    train('steps', '--checkpoint-interval', '4')
    assert saved == [(0, 4), (0, 6), (1, 2), (1, 6)]
    saved.clear()
    train('minutes', '--checkpoint-interval', '0.0001m')
    assert saved == [(epoch, update) for epoch in (0, 1) for update in range(1, 7)]
    saved.clear()
    train('interval', '--checkpoint-interval', '4', '--val-interval', '2')
    assert saved == [(0, 4), (1, 0), (1, 2), (1, 6)]


def test_a_signal_to_every_process_of_the_job(call, images, tmp_path):
    """As schedulers send it: the loader's workers get it too, and must not take the run down before it has saved."""
    place = ['--data-dir', images, '--output', tmp_path, '--experiment', 'job']
    flags = [*MODEL, *QUICK, *place, *DRAWN, '--epochs', '300', '--checkpoint-interval', '3', '--resume', 'auto']
    job = start('train', *flags)
    wait_for(tmp_path / 'job' / 'last.pth.tar', job)
    os.killpg(job.pid, signal.SIGTERM)
    _, err = job.communicate(timeout=60 * PATIENCE)
    assert job.returncode == PREEMPTED, err
    assert err.startswith('asked to stop: epoch') and err.count('\n') == 1
    code, out, err = call('train', *flags, '--epochs', '1')
    assert code == 0 and 'resuming from' in out, err


def test_a_signal_while_the_run_starts(call, images, tmp_path, monkeypatch):
    """It is heeded as soon as there is something to save."""
    open_sets = data.open_training_sets

    def signalled(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return open_sets(*args, **kwargs)

    monkeypatch.setattr(data, 'open_training_sets', signalled)
    place = ['--data-dir', images, '--output', tmp_path, '--experiment', 'run']
    code, _, err = call('train', *MODEL, *QUICK, *place)
    assert code == PREEMPTED and err.startswith('asked to stop: epoch 0, update 1 of 6')
    assert (tmp_path / 'run' / 'last.pth.tar').is_file()


def test_a_resumed_run_with_other_flags(train, tmp_path, capfd):
    """They hold, the log says so, and the rows of summary.csv keep their columns."""
    folder = train('run', '--epochs', '2')
    train('run', '--epochs', '3', '--resume', 'auto', '--model-ema', '--sched', 'none', '--lr', '0.002')
    one, two, three = rows(folder)
    assert one['eval_raw_top1'] == two['eval_raw_top1'] == '' and float(three['eval_raw_top1']) >= 0
    assert float(two['lr']) < 1e-3 and float(three['lr']) == 2e-3
    for epochs in '45':
        train('run', '--epochs', epochs, '--resume', 'auto')  # without an average again
    assert rows(folder)[:3] == [one, two, three] and len(rows(folder)) == 5, list(folder.iterdir())
    assert all(row['eval_raw_top1'] == '' and float(row['eval_top1']) >= 0 for row in rows(folder)[3:])


def test_labels_that_mean_other_classes(train, call, images, tmp_path):
    """A class folder that is renamed takes another place in the order of names."""
    for split in ('train', 'val'):
        shutil.copytree(images / split, tmp_path / 'data' / split)
    place = ['--data-dir', tmp_path / 'data']
    folder = train('run', *place)
    for split in ('train', 'val'):
        (tmp_path / 'data' / split / 'apple').rename(tmp_path / 'data' / split / 'quince')
    place += ['--output', tmp_path, '--experiment', 'run', '--epochs', '3', '--resume', 'auto']
    for dry in ([], ['--dry-run']):
        code, _, err = call('train', *MODEL, *QUICK, *place, *dry)
        line = f'error: {folder / "last.pth.tar"} has learnt other classes: class 0 was called apple, and is pear in'
        assert code == 2 and err.startswith(line) and err.count('\n') == 1
    code, out, err = call('train', *MODEL, *QUICK, *place, '--no-resume-opt')
    assert code == 0 and 'has learnt other classes: class 0 was called apple' in out and 'epoch 2 is the best' in out, (
        err
    )
    turned = tmp_path / 'map.txt'
    turned.write_text('\n'.join(('quince', 'plum', 'pear')))
    for dry in ([], ['--dry-run']):
        code, _, err = call('train', *MODEL, *QUICK, *place, '--no-resume-opt', '--class-map', turned, *dry)
        assert code == 2 and 'quince is class 0 of this data, and class 2 of ' in err and err.count('\n') == 1, err


@pytest.mark.timeout(60)
def test_a_summary_that_is_none_is_kept_aside(train):
    folder = train('run')
    summary = folder / 'summary.csv'
    whole = summary.read_text()
    others = [bytes(range(256)), b'patient,score\n1,0.5\n', re.sub(r'^0,', '1e999,', whole, flags=re.M).encode()]
    for number, content in enumerate([*others, None]):
        summary.unlink()
        os.mkfifo(summary) if content is None else summary.write_bytes(content)
        train('run', '--epochs', str(number + 3), '--resume', 'auto')
        kept = folder / f'summary.csv.damaged{number or ""}'
        assert kept.is_fifo() if content is None else kept.read_bytes() == content
        assert [row['epoch'] for row in rows(folder)] == [str(number + 2)]


def test_a_summary_that_may_not_be_read_stays_where_it_is(tmp_path, monkeypatch):
    """It may be whole, as may a checkpoint."""
    writer = object.__new__(metrics.MetricsWriter)
    writer.summary = tmp_path / 'summary.csv'
    writer.summary.write_text('epoch,train_loss\n0,2\n')

    def refused(*_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(metrics, 'open', refused, raising=False)
    with pytest.raises(LocalError, match=r'summary\.csv: cannot be read \(Permission denied\)'):
        writer._trim_summary(1)
    assert [path.name for path in tmp_path.iterdir()] == ['summary.csv']


def test_a_summary_that_was_cut_loses_no_row(train):
    """Where the last newline alone is missing, it is added; a file that lacks more is kept aside."""
    folder = train('run', '--epochs', '1')
    summary = folder / 'summary.csv'
    (first,) = rows(folder)
    for epochs, lost in enumerate((2, 1), 2):
        summary.write_bytes(summary.read_bytes()[:-lost])
        train('run', '--epochs', str(epochs), '--resume', 'auto')
        assert (folder / 'train.log').read_text().count('its last line had no end') == 1  # not where half of it is
        assert rows(folder)[0] == first and [row['epoch'] for row in rows(folder)] == [*map(str, range(epochs))]
    short = summary.read_bytes().rstrip().rpartition(b',')[0]
    summary.write_bytes(short)
    train('run', '--epochs', '4', '--resume', 'auto')
    assert (folder / 'summary.csv.damaged').read_bytes() == short and [row['epoch'] for row in rows(folder)] == ['3']


@pytest.mark.parametrize(
    'content', ['patient,score\n1,0.5\n2,0.7\n', 'epoch,train_loss\n0,2\n1,1\n', 'epoch,train_loss\n0,2\n']
)
def test_a_fresh_run_keeps_what_another_one_told(train, tmp_path, content):
    """But one row is what a kill leaves of this run before its first checkpoint."""
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / 'summary.csv').write_text(content)
    folder = train('run', '--resume', 'auto')
    kept = [path.read_text() for path in folder.glob('summary.csv.*')]
    assert kept == [content] * (content.count('\n') > 2) and [row['epoch'] for row in rows(folder)] == ['0', '1']


def test_a_branch_without_a_checkpoint_yet_is_told_of(train):
    """It was killed before its first one; --resume auto knows no file to go on from."""
    folder, line = train('run', '--epochs', '1'), 'went on from a file; --resume FILE again does so'
    branch = train('branch', '--epochs', '2', '--resume', folder / 'last.pth.tar')
    for path in [*branch.glob('*.pth.tar'), *branch.glob('*.safetensors')]:
        path.unlink()
    train('branch', '--epochs', '1', '--resume', 'auto')
    assert line in (branch / 'train.log').read_text() and line not in (folder / 'train.log').read_text()


def test_rows_of_later_epochs_than_the_checkpoint_are_kept_aside(train):
    """Where an older checkpoint was put back. One row more is what a kill before the checkpoint leaves."""
    folder = train('run', '--epochs', '1', '--resume', 'auto')
    older, summary, kept = (folder / name for name in ('last.pth.tar', 'summary.csv', 'summary.csv.before'))
    older = older.read_bytes()
    for epochs in (2, 3):
        train('run', '--epochs', str(epochs), '--resume', 'auto')
        told = summary.read_bytes()
        (folder / 'last.pth.tar').unlink()
        (folder / 'last.pth.tar').write_bytes(older)
        train('run', '--epochs', str(epochs), '--resume', 'auto')
        assert [row['epoch'] for row in rows(folder)] == [*map(str, range(epochs))]
        assert kept.exists() == (epochs == 3)
    assert kept.read_bytes() == told and (folder / 'train.log').read_text().count('which come again: kept as') == 1


@pytest.mark.timeout(60)
@pytest.mark.parametrize('writes', [0, 5, 9, 20])
def test_a_disk_that_the_curves_fill_ends_the_run_with_a_line(call, images, tmp_path, monkeypatch, writes):
    """Be it the run that meets it, or TensorBoard's own thread, whose error is raised again and again."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    error, left = OSError(28, 'No space left on device'), [writes]

    def limited(call):
        def write(writer, *data):
            left[0] -= 1
            if left[0] < 0:
                raise error
            return call(writer, *data)

        return write

    for name in ('write', 'flush'):
        monkeypatch.setattr(RecordWriter, name, limited(getattr(RecordWriter, name)))
    code, _, err = call('train', *MODEL, *QUICK, '--data-dir', images, '--output', tmp_path, '--experiment', 'run')
    assert code == 2 and err.count('\n') == 1, err
    assert 'the curves cannot be written (the disk is full: No space left on device)' in err


def test_a_loading_process_that_is_killed_ends_the_run_with_a_line(call, images, tmp_path, monkeypatch):
    """As the kernel does where memory runs out."""
    from evavit.training.data.images import CheckedImages

    main, read = os.getpid(), CheckedImages.__getitem__

    def killed(dataset, index):
        if os.getpid() != main:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(dataset, index)

    monkeypatch.setattr(CheckedImages, '__getitem__', killed)
    code, _, err = call(
        'train', *MODEL, *QUICK, '--data-dir', images, '--output', tmp_path, '--experiment', 'run', '--workers', '2'
    )
    assert code == 2 and err.startswith('error: DataLoader worker') and 'lower --workers' in err.splitlines()[0]


@pytest.fixture(scope='session')
def digits(tmp_path_factory):
    pytest.importorskip('sklearn')
    folder = tmp_path_factory.mktemp('digits')
    subprocess.run([sys.executable, ROOT / 'tools' / 'build_digits.py', folder], check=True, capture_output=True)
    for kept in folder.glob('*/*'):  # a sixth of each class does, so that 20 kills fit
        for number, image in enumerate(sorted(kept.iterdir())):
            if number % 6:
                image.unlink()
    return folder


MOMENTS = dict(  # how often a run comes to a point of killed_train.py at most before it is killed there
    gradients=8,
    half_checkpoint=2,
    unnamed=6,
    validation=5,
    step=8,
    unsynced=8,
    half_weights=2,
    named=6,
    curves=3,
    summary=1,
)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_kill_9_at_20_random_moments(digits, tmp_path, record_property):
    """One run killed 20 times, in its steps, its validations and the writing of its files, against one left alone."""
    kwargs = words('img_size=8 patch_size=2 embed_dim=32 depth=2 num_heads=2 window_size=2 partition_grid=2')
    flags = ['--model', 'eva_deit_tiny', '--model-kwargs', *kwargs, *DRAWN, '--data-dir', digits, '--output', tmp_path]
    flags += words('--in-chans 1 -b 16 --epochs 12 --warmup-epochs 2 --sched-on-updates --lr 2e-3 --device cpu')
    flags += words('--log-interval 1 --checkpoint-interval 4 --resume auto')
    done = command('train', *flags, '--experiment', 'whole')
    assert done.returncode == 0, done.stderr
    chance, folder = random.Random(20), tmp_path / 'parts'
    program = Path(__file__).with_name('killed_train.py')
    left, writing, places = set(), 0, set()
    for kill in range(20):
        point, most = list(MOMENTS.items())[kill % len(MOMENTS)]
        moment = [point, chance.randint(1, most)]
        job = start(program, *moment, *flags, '--experiment', 'parts')
        out, err = job.communicate(timeout=240 * PATIENCE)
        assert job.returncode == -signal.SIGKILL, f'kill {kill}, {moment}: {job.returncode}, {err}'
        writing += not left.issuperset(folder.glob('*.partial'))
        left.update(folder.glob('*.partial'))
        places.update(re.findall(r'^epoch \d+ \d+/', out, re.MULTILINE)[-1:])
    done = command('train', *flags, '--experiment', 'parts')
    assert done.returncode == 0, done.stderr
    compared = assert_same_run(tmp_path / 'whole', folder)
    updates = len(scalars(folder, 'train/loss'))
    assert writing >= 2 and len(places) > 10 and len(rows(folder)) == 12
    record_property(
        'figure',
        f'20 kills, {writing} with a file half written, after {len(places)} different ones of '
        f'{updates} updates; {compared:,} numbers of the finished run bit-identical',
    )
