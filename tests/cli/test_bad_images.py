"""train.py and validate.py on folders with unreadable images: counted, named, alike in all processes and restarts."""

import errno
import os
import re
import shutil
import signal
import subprocess
import time
from multiprocessing import resource_sharer

import faults
import numpy as np
import pytest
import torch
from runs import (
    DRAWN,
    MODEL,
    QUICK,
    assert_same_run,
    command_line,
    load_script,
    scalars,
    signal_at,
    together,
    weights,
    write_images,
)

from evavit.errors import INTERRUPTED, PREEMPTED
from evavit.training import checkpoint, contents
from evavit.training.data import folders as folders_module
from evavit.training.data import images as images_module

ALLOW = ['--max-bad-images', '0.2']


@pytest.fixture
def folder(tmp_path):
    """24 images to train on, of which two are broken, and 13 to validate on, of which one is."""
    root = tmp_path / 'data'
    write_images(root / 'train', dict(apple=8, pear=8, plum=8))
    write_images(root / 'val', dict(apple=5, pear=4, plum=4))
    bad = faults.bad_files()
    (root / 'train' / 'pear' / '3.png').write_bytes(bad['truncated.png'][0])
    (root / 'train' / 'plum' / '5.png').write_bytes(bad['bomb.png'][0])
    (root / 'val' / 'apple' / '2.png').write_bytes(bad['zeros.jpg'][0])
    return root


@pytest.fixture
def train(call, folder, tmp_path):
    def train(name, *flags):
        return call('train', *MODEL, *QUICK, '--data-dir', folder, '--output', tmp_path, '--experiment', name, *flags)

    return train


@pytest.mark.parametrize('workers', [0, 2])
def test_a_few_are_named_and_replaced(train, call, folder, tmp_path, workers):
    code, out, err = train('run', *ALLOW, '--workers', workers)
    assert code == 0 and err == '', err
    warnings = [line for line in out.splitlines() if 'is not a readable image' in line]
    assert len(warnings) == 3  # once a run, not once an epoch
    assert all(any(name in line for line in warnings) for name in ('pear/3.png', 'plum/5.png', 'apple/2.png'))
    assert re.search(r'left out, 2 of 24 in this epoch, 4 allowed', out)
    header, *rows = (tmp_path / 'run' / 'summary.csv').read_text().splitlines()
    column = header.split(',').index('train_bad_images')
    assert [row.split(',')[column] for row in rows] == ['2', '2']
    code, out, err = call(
        'validate',
        '--checkpoint',
        tmp_path / 'run' / 'last.safetensors',
        '--data-dir',
        folder,
        *ALLOW,
        '--workers',
        workers,
    )
    assert code == 0 and '(12 images)' in out and 'apple/2.png' in out, err


def test_workers_and_restarts_see_the_same_images(train, tmp_path, monkeypatch):
    flags = [*ALLOW, '--epochs', '3', '--aa', 'rand-m9-mstd0.5-inc1', '--workers', '2']
    assert train('whole', *flags)[0] == 0
    save_epoch = checkpoint.Saver.save_epoch

    def stop_after_one(saver, epoch, metric):
        save_epoch(saver, epoch, metric)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.Saver, 'save_epoch', stop_after_one)
    assert train('parts', *flags)[0] == INTERRUPTED
    monkeypatch.undo()
    assert train('parts', *flags, '--resume', 'auto')[0] == 0
    a, b = (weights(tmp_path / name / 'last.safetensors') for name in ('whole', 'parts'))
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(
    'flags, moments',
    [
        (['-b', '2', '--grad-accum-steps', '5'], (1, 4)),  # two batches of twelve are left over in each epoch
        (['-b', '4', '--aug-repeats', '3'], (2, 9)),
    ],
)  # an image before the stop comes again after it
def test_a_stop_with_bad_images_changes_nothing(train, tmp_path, monkeypatch, flags, moments):
    flags = [*DRAWN, *ALLOW, '--epochs', '3', '--resume', 'auto', *flags]
    assert train('whole', *flags)[0] == 0
    known = []
    for moment in moments:
        signal_at(monkeypatch, [moment])
        assert train('parts', *flags)[0] == PREEMPTED
        monkeypatch.undo()
        known += contents.read_checkpoint(tmp_path / 'parts' / 'last.pth.tar')['saver']['position']['bad'].values()
    assert any('pear/3.png' in line or 'plum/5.png' in line for line in known)
    assert train('parts', *flags)[0] == 0
    assert_same_run(tmp_path / 'whole', tmp_path / 'parts')


@pytest.mark.parametrize('script', ['train', 'validate'])
def test_too_many_stop_with_a_line(script, train, call, folder, tmp_path):
    if script == 'train':
        code, _, err = train('run', '--max-bad-images', '0.05')
        assert '2 of 24' in err and '--max-bad-images 0.05 allows 1' in err
    else:
        assert train('run', *ALLOW)[0] == 0
        code, _, err = call(
            'validate', '--checkpoint', tmp_path / 'run' / 'last.safetensors', '--data-dir', folder, '--workers', '0'
        )
        assert '1 of 13' in err and 'apple/2.png' in err and '--max-bad-images 0.001 allows 0' in err
    assert code == 2 and err.startswith('error: ') and err.count('\n') == 1


def test_two_processes_agree(folder, tmp_path):
    """Both broken images of training and the one of validation, each read by one process, are counted in both."""
    place = ['--data-dir', folder, '--output', tmp_path]
    train = load_script('train').main
    done = together(train, *MODEL, *QUICK, *place, '--experiment', 'two', '-b', '2', *ALLOW)
    assert done.returncodes == [0, 0], done.stderr
    warnings = [line for line in done.stdout.splitlines() if 'is not a readable image' in line]
    assert len(warnings) == 3 and '2 of 24 in this epoch' in done.stdout
    assert all(any(name in line for line in warnings) for name in ('pear/3.png', 'plum/5.png', 'apple/2.png'))
    assert list(scalars(tmp_path / 'two', 'eval/loss')) == [6, 12]
    done = together(train, *MODEL, *QUICK, *place, '--experiment', 'stop', '-b', '2', '--max-bad-images', '0.05')
    assert done.returncodes == [2, 2], done.stderr
    assert done.stderr.count('error: ') >= 1 and '2 of 24 in this epoch are not' in done.stderr


def test_a_file_that_vanishes(train, folder, monkeypatch):
    """Between two epochs, as on a shared disk that is being tidied."""
    victim = folder / 'train' / 'apple' / '6.png'
    begin = images_module.BadImages.begin
    calls = []

    def vanish(bad, *met):
        begin(bad, *met)
        calls.append(1)
        if len(calls) == 3:
            victim.unlink()

    monkeypatch.setattr(images_module.BadImages, 'begin', vanish)
    code, out, _ = train('run', *ALLOW, '--workers', '2')
    assert code == 0 and f'{victim} is not a readable image (No such file or directory); left out, ' in out


@pytest.mark.parametrize('workers', [0, 2])
def test_too_many_open_files_make_no_image_a_bad_one(train, monkeypatch, workers):
    def full(path):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path))

    monkeypatch.setattr(folders_module, 'open_regular', full)
    code, out, err = train('run', *ALLOW, '--workers', workers)
    assert code == 2 and err.count('\n') == 1 and 'readable image' not in out + err, err
    assert err.startswith('error: Too many open files: raise the number of open files (ulimit -n 65536)')


def test_a_file_that_becomes_a_pipe(train, folder, monkeypatch):
    """To open it would wait for ever."""
    victim = folder / 'train' / 'apple' / '6.png'
    begin = images_module.BadImages.begin

    def replace(bad, *met):
        begin(bad, *met)
        if not victim.is_fifo():
            victim.unlink()
            os.mkfifo(victim)

    monkeypatch.setattr(images_module.BadImages, 'begin', replace)
    code, out, _ = train('run', *ALLOW, '--workers', '2')
    assert code == 0 and f'{victim} is not a readable image (not a regular file); left out, ' in out


@pytest.mark.parametrize('place', ['train/back', 'train/pear/back'])
def test_a_circle_of_links_is_left_out(train, folder, place):
    (folder / place).symlink_to(folder / 'train', target_is_directory=True)
    (folder / 'train' / 'plum' / 'self.png').symlink_to('self.png')
    os.mkfifo(folder / 'train' / 'plum' / 'pipe.png')
    (folder / 'train' / 'plum' / 'to_pipe.png').symlink_to('pipe.png')
    (folder / 'train' / 'plum' / 'to_device.png').symlink_to('/dev/zero')
    code, out, err = train('run', *ALLOW)
    assert code == 0, err
    assert f'1 links that lead back to a folder around them, left out: {folder / place}' in out
    strange = f'{folder / "train" / "plum" / "pipe.png"} and 2 more'
    assert f'3 names of images that are no files, left out: {strange}' in out
    assert '25 images, ' in out and 'self.png is not a readable image (Too many levels of symbolic links)' in out


def test_a_class_without_images_keeps_its_label(train, folder, tmp_path):
    """Where --class-map fixes the labels; else it is an error (test_bad_input.py)."""
    (folder / 'train' / 'cherry').mkdir()
    (tmp_path / 'classes.txt').write_text('cherry\napple\npear\nplum\n')
    code, out, err = train('run', *ALLOW, '--class-map', tmp_path / 'classes.txt')
    assert code == 0, err
    assert f'warning: {folder / "train" / "cherry"}: class folder without an image' in out
    assert weights(tmp_path / 'run' / 'last.safetensors')['head.weight'].shape[0] == 4


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_training_on_mutated_files(call, folder, tmp_path, record_property):
    """500 mutated files among 500 good ones: the run ends, and has counted what its own reader refuses."""
    rng = np.random.default_rng(2)
    contents = list(faults.good_files().values())
    for number in range(500):
        content = faults.mutate(contents[number % len(contents)], rng)
        (folder / 'train' / 'plum' / f'm{number}.png').write_bytes(content)
        shutil.copy(folder / 'train' / 'plum' / '0.png', folder / 'train' / 'plum' / f'g{number}.png')
    flags = ['-b', '16', '--epochs', '1', '--workers', '2', '--max-bad-images', '0.6']
    code, _, err = call(
        'train', *MODEL, *QUICK, '--data-dir', folder, '--output', tmp_path, '--experiment', 'run', *flags
    )
    assert code == 0, err
    header, row = (tmp_path / 'run' / 'summary.csv').read_text().splitlines()
    bad = int(row.split(',')[header.split(',').index('train_bad_images')])
    assert 300 < bad < 480
    record_property('figure', f'500 mutated image files: {bad} refused and named, no crash, no hang')


def test_a_validation_without_one_readable_image_stops_with_a_line(train, folder):
    for image in (folder / 'val').glob('*/*.png'):
        image.write_bytes(b'')
    code, _, err = train('run', '--max-bad-images', '1')
    assert code == 2 and 'validation: none of its 13 images can be read' in err and err.count('\n') == 1


@pytest.mark.timeout(60)
@pytest.mark.parametrize('answered', [True, False])
def test_a_loading_process_that_dies_while_it_hands_over(answered, train, monkeypatch):
    """The main process fetches a batch's memory over a connection, and finds it broken before it knows of the death."""

    def die(sharer):
        (sharer._listener if answered else sharer._listener._listener).accept().close()
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(resource_sharer._ResourceSharer, '_serve', die)
    code, _, err = train('run', *ALLOW, '--workers', '2')
    assert code == 2 and err.startswith('error: DataLoader worker lost while it handed over a batch'), err
    assert err.count('\n') == 1 and 'lower --workers' in err


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_loading_processes_alone_does_no_harm(train, monkeypatch, number):
    """As a scheduler sends it to every process of a job, while the run trains and while it validates."""
    main, read = os.getpid(), images_module.CheckedImages.__getitem__

    def signalled(dataset, index):
        if os.getpid() != main:
            os.kill(os.getpid(), number)
        return read(dataset, index)

    monkeypatch.setattr(images_module.CheckedImages, '__getitem__', signalled)
    code, _, err = train('run', *ALLOW, '--workers', '2')
    assert code == 0 and err == '', err


@pytest.mark.parametrize('options, workers', [('ro', 0), ('ro', 2), ('size=64k', 2), ('size=300k', 2)])
def test_shared_memory_that_is_small_or_read_only(options, workers, folder, tmp_path):
    """In a mount namespace of its own. Loading processes need it; without them a run does not."""
    inside = ['unshare', '-rm', 'sh', '-c', f'mount -t tmpfs -o {options} tmpfs /dev/shm && exec "$@"', 'sh']
    if not shutil.which('unshare') or subprocess.run([*inside, 'true'], capture_output=True).returncode:
        pytest.skip('needs the right to mount in a namespace of its own')
    flags = [*MODEL, '--model-kwargs', 'img_size=64', *QUICK, '-b', '8', *ALLOW]
    flags += ['--data-dir', folder, '--output', tmp_path, '--experiment', 'run', '--workers', workers]
    line, environment = command_line('train', *flags)
    done = subprocess.run([*inside, *line], capture_output=True, text=True, env=environment, timeout=120)
    if workers:
        assert done.returncode == 2 and done.stderr.count('\n') == 1, done.stderr
        assert '/dev/shm' in done.stderr and '--shm-size' in done.stderr and 'or give --workers 0' in done.stderr
    else:
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize('workers', [0, 2])
def test_without_shared_memory(train, monkeypatch, workers):
    """The same, where namespaces are not allowed."""

    def refuse(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(images_module.multiprocessing, 'Lock', refuse)
    code, out, err = train('run', *ALLOW, '--workers', workers)
    if workers:
        assert code == 2 and err.count('\n') == 1 and '(Read-only file system)' in err and '--workers 0' in err
    else:
        assert code == 0 and '2 of 24 in this epoch' in out
