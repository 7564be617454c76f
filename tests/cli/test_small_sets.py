"""train.py on a folder of few images without splits: what is held out, short runs, the log, other formats of files."""

import json
import os
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from programs import load_program
from runs import CLASSES, MODEL, assert_same_run, command, rows, signal_at, words, write_images
from timm.data.readers.img_extensions import get_img_extensions

from evavit.errors import PREEMPTED
from evavit.training import distributed
from evavit.training.config import DataConfig, parse_settings
from evavit.training.data import open_training_sets
from evavit.training.data.folders import ClassFolders, hold_out

FLAGS = words('-b 4 --lr 1e-3 --workers 0 --device cpu --log-interval 3 --val-fraction 0.25 --epochs 2')


@pytest.fixture
def undivided(tmp_path):
    """Class folders alone: 10, 6 and 1 images, of five formats."""
    write_images(tmp_path / 'few', dict(zip(CLASSES, (10, 6, 1), strict=True)))
    kinds = [('.webp', dict(lossless=True)), ('.BMP', {}), ('.jpg', {}), ('.jpeg', {}), ('.png', {})]
    for number, path in enumerate(sorted((tmp_path / 'few').rglob('*.png'))):
        ending, options = kinds[number % len(kinds)]
        image = Image.open(path).copy()
        path.unlink()
        image.save(path.with_suffix(ending), **options)
    return tmp_path / 'few'


@pytest.fixture
def run(call, undivided, tmp_path):
    def run(name, *flags, data=undivided):
        place = ['--data-dir', data, '--output', tmp_path, '--experiment', name]
        return call('train', *MODEL, *FLAGS, *place, *flags)

    return run


def parts(folder, fraction=0.25, seed=42):
    """The names of the images that are held out, and of all."""
    reader = ClassFolders(folder)
    held = hold_out(reader.samples, folder, fraction, seed)
    names = [path.removeprefix(f'{folder}/') for path, _ in reader.samples]
    return {names[number] for number in held}, set(names)


def test_what_is_held_out(undivided, tmp_path):
    held, names = parts(undivided)
    assert len(names) == 17  # WebP and BMP among them
    assert {name: sum(path.startswith(name) for path in held) for name in CLASSES} == dict(apple=2, pear=2, plum=0)
    assert held == parts(shutil.copytree(undivided, tmp_path / 'copy'))[0] != parts(undivided, seed=1)[0]
    assert len(parts(undivided, 0.001)[0]) == 2 and len(parts(undivided, 0.999)[0]) == 9 + 5
    for number in range(3):
        Image.new('RGB', (16, 16)).save(undivided / 'apple' / f'new{number}.png')
    more, _ = parts(undivided)
    assert {name for name in held if 'pear' in name} <= more  # of the other classes the same


def test_a_small_run_tells_what_it_does_and_is_judged_by_what_it_held_out(run, call, undivided, tmp_path):
    code, out, err = run('run')
    assert code == 0, out + err
    lines = out.splitlines()
    assert any('4 of its 17 images are held out for validation' in line for line in lines)
    assert 'warm-up shortened from 5 to 0 of the 2 epochs; --warmup-epochs N sets it' in lines
    assert any(line.startswith('warning: 3 updates an epoch (13 images') and '-b' in line for line in lines)
    best = max(float(row['eval_top1']) for row in rows(tmp_path / 'run'))
    assert lines[-1] == f'best top1 {best:.2f}'
    assert 'warmup_epochs: 0\n' in (tmp_path / 'run' / 'args.yaml').read_text()

    flags = [
        '--checkpoint',
        tmp_path / 'run' / 'last.safetensors',
        '--workers',
        '0',
        '--results-file',
        tmp_path / 'r.json',
    ]
    code, out, err = call('validate', *flags, '--data-dir', undivided)
    assert code == 0, err
    row = json.loads((tmp_path / 'r.json').read_text())
    assert row['images'] == 4 and row['top1'] == pytest.approx(float(rows(tmp_path / 'run')[-1]['eval_top1']), abs=1e-3)
    moved = shutil.copytree(undivided, tmp_path / 'moved' / 'pictures').parent
    assert run('other', '--train-split', 'pictures', data=moved)[0] == 0
    other = ['--checkpoint', tmp_path / 'other' / 'last.pth.tar', '--workers', '0', '--data-dir', moved]
    code, out, err = call('validate', *other)
    assert code == 0 and '(4 images)' in out, err
    copy = shutil.copytree(undivided, tmp_path / 'copy')
    code, out, err = call('validate', *flags, '--data-dir', copy)
    assert '(17 images)' in out and 'if it is a copy, add --val-fraction 0.25\n' in out
    code, out, err = call('validate', *flags, '--data-dir', copy, '--val-fraction', '0.25')
    assert '(4 images)' in out and 'has seen' not in out


def test_validation_takes_what_the_run_held_out_whatever_it_is_called(run, call, undivided, tmp_path):
    """The flags of the training, repeated, take the same images; others that would mix in seen ones are told of."""
    assert run('run', '--seed', '5')[0] == 0
    flags = ['--checkpoint', tmp_path / 'run' / 'last.safetensors', '--workers', '0', '--data-dir', undivided]
    expected = float(rows(tmp_path / 'run')[-1]['eval_loss'])
    for more in ([], ['--val-fraction', '0.25'], ['--split', 'validation'], ['--split', 'val', '--seed', '5']):
        code, out, err = call('validate', *flags, *more, '--results-file', tmp_path / 'r.json')
        assert code == 0 and '(4 images)' in out and 'has seen' not in out, err
        assert json.loads((tmp_path / 'r.json').read_text())['loss'] == pytest.approx(expected, abs=1e-3)
    code, out, err = call('validate', *flags, '--val-fraction', '0.5')
    assert code == 0 and 'the run held out 0.25 with seed 5: of these images it has seen some' in out, err


def test_a_split_that_is_asked_for_is_judged_whatever_the_run_held_out(run, call, undivided, tmp_path):
    folder = tmp_path / 'splits'
    shutil.copytree(undivided, folder / 'train')
    write_images(folder / 'test', dict.fromkeys(CLASSES, 1))
    assert run('run', '--epochs', '1', data=folder)[0] == 0

    def judge(*flags):
        place = '--checkpoint', tmp_path / 'run', '--workers', '0', '--data-dir', folder
        code, out, err = call('validate', *place, *flags)
        return re.findall(r'\((\d+) images\)', out) if code == 0 else err

    for split, images in dict(test='3', train='13', training='13', val='4').items():
        assert judge('--split', split) == [images], split
    assert 'no folder nonsense, but test, train' in judge('--split', 'nonsense')
    both = '--split', 'test', '--val-fraction', '0.25'
    assert '--val-fraction divides the training split, and test is another one; leave' in judge(*both)
    write_images(folder / 'validation', dict.fromkeys(CLASSES, 2))
    line = judge()
    assert 'has validation to validate on, and the run held out' in line and line.count('\n') == 1
    assert judge(*re.findall('give (--split) (validation),', line)[0]) == ['6']
    assert judge('--split', 'test') == ['3']
    line = judge('--split', 'train')
    assert f'divided train when it had none; give --data-dir {folder}/train to judge it whole' in line, line
    place = '--checkpoint', tmp_path / 'run', '--workers', '0', '--data-dir', folder / 'train'
    code, out, err = call('validate', *place)
    assert code == 0 and '(17 images)' in out and 'of these images it has seen most' in out + err, out + err
    assert 'another folder' not in out + err
    assert run('flat', '--epochs', '1', data=undivided)[0] == 0
    write_images(undivided / 'val', dict.fromkeys(CLASSES, 2))
    place = '--checkpoint', tmp_path / 'flat', '--workers', '0', '--data-dir', undivided
    line = call('validate', *place, '--split', 'train')[2]
    assert 'divided train when it had none; take val away to judge' in line and '--data-dir' not in line, line


def test_a_folder_for_the_hub_knows_what_the_run_held_out(run, call, undivided, tmp_path):
    """As the run's own folder does, and without the place of the data, which is nobody else's business."""
    assert run('run', '--seed', '5')[0] == 0
    folder, told = tmp_path / 'hub', ['--data', 'fruit', '--licence', 'mit']
    save = load_program('tools/save_for_hub.py').main
    save(['--checkpoint', str(tmp_path / 'run' / 'last.safetensors'), '--output', str(folder), *told])
    assert str(tmp_path) not in (folder / 'config.json').read_text()
    expected = float(rows(tmp_path / 'run')[-1]['eval_loss'])
    link = tmp_path / 'link'
    link.symlink_to(undivided)
    for flags in (['--checkpoint', folder], ['--model', f'local-dir:{folder}', '--pretrained']):
        flags += ['--workers', '0', '--results-file', tmp_path / 'r.json']
        for data in (undivided, link):
            code, out, err = call('validate', *flags, '--data-dir', data)
            assert code == 0 and '(4 images)' in out and 'warning' not in out, out + err
            assert json.loads((tmp_path / 'r.json').read_text())['loss'] == pytest.approx(expected, abs=1e-3)
        code, out, err = call('validate', *flags, '--data-dir', undivided, '--val-fraction', '0.5')
        assert code == 0 and 'the run held out 0.25 with seed 5: of these images it has seen some' in out, err
    copy = shutil.copytree(undivided, tmp_path / 'copy')
    code, out, err = call('validate', *flags, '--data-dir', copy)
    assert '(17 images)' in out and 'if it is a copy, add --val-fraction 0.25\n' in out
    code, out, err = call('validate', *flags, '--data-dir', copy, '--val-fraction', '0.25')
    assert '(4 images)' in out and 'has seen' not in out
    config = json.loads((folder / 'config.json').read_text())
    for held, line in ((dict(val_fraction=2), '2 does not fit val_fraction'), ([], 'holds no entries); save')):
        (folder / 'config.json').write_text(json.dumps({**config, 'evavit_held_out': held}))
        code, _, err = call('validate', *flags, '--data-dir', undivided)
        assert code == 2 and line in err and err.count('\n') == 1, err


def test_a_teacher_that_held_out_images_is_no_other_folder(run, tmp_path):
    """What it held out is asked for where it is validated."""
    assert run('teacher', '--epochs', '1')[0] == 0
    flags = ['--kd-model-name', MODEL[1], '--kd-pretrained-path', tmp_path / 'teacher' / 'last.safetensors']
    code, out, err = run('run', '--epochs', '1', *flags)
    assert code == 0 and 'teacher' in out and 'another folder' not in out, out + err


def test_the_log_file_has_what_was_printed_with_its_time(run, tmp_path):
    code, out, _ = run('run')
    lines = (tmp_path / 'run' / 'train.log').read_text().splitlines()
    times = [re.match(r'\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} ', line) for line in lines]
    assert all(times) and out.splitlines() == [line[24:] for line in lines if ' evavit 0.' not in line]
    code, _, err = run('run')  # refused: the run is there
    assert code == 2 and (tmp_path / 'run' / 'train.log').read_text().splitlines() == lines
    code, _, err = run('run', '--resume', 'auto', '--epochs', '3', '--lr', '1e30')
    more = (tmp_path / 'run' / 'train.log').read_text().splitlines()
    assert more[: len(lines)] == lines and code == 2 and more[-1].endswith(err.removeprefix('error: ').strip())


@pytest.mark.skipif(not Path('/dev/full').exists(), reason='/dev/full, a disk that is full, is of Linux')
def test_a_log_that_cannot_be_written_is_given_up(run, monkeypatch):
    monkeypatch.setattr(distributed, 'open_own', lambda path: os.open('/dev/full', os.O_WRONLY))
    code, out, err = run('run')
    assert code == 0 and not err
    assert out.count('train.log is not written any more (the disk is full: No space left on device)') == 1
    assert out.splitlines()[-1].startswith('best top1')


def test_a_small_run_that_is_stopped_goes_on_to_the_bit(run, tmp_path, monkeypatch):
    whole = [*words('--model-ema --resume auto --checkpoint-interval 1')]
    assert run('whole', *whole)[0] == 0
    for moment in (1, 4):
        signal_at(monkeypatch, [moment])
        assert run('parts', *whole)[0] == PREEMPTED
        monkeypatch.undo()
        assert (tmp_path / 'parts' / 'train.log').read_text().splitlines()[-1].endswith('go on with --resume auto')
        torch.rand(3)
    assert run('parts', *whole)[0] == 0
    assert assert_same_run(tmp_path / 'whole', tmp_path / 'parts') > 1000


def test_a_resume_holds_out_the_same_or_not_at_all(run, tmp_path, undivided):
    assert run('run')[0] == 0
    for flags in (['--seed', '1'], ['--val-fraction', '0.5'], ['--seed', '1', '--dry-run']):
        code, _, err = run('run', '--resume', 'auto', '--epochs', '3', *flags)
        assert code == 2 and 'images that it has seen' in err and err.count('\n') == 1
    copy = shutil.copytree(undivided, tmp_path / 'copy')
    code, out, err = run('run', '--resume', 'auto', '--epochs', '3', data=copy)
    assert code == 0 and '4 of its 17 images are held out' in out, err


def test_a_folder_that_has_grown_holds_out_others(run, call, undivided, tmp_path):
    """A resume stops, validation warns, of the run's files and of a folder for the Hub."""
    assert run('run')[0] == 0
    files, told = [tmp_path / 'run', tmp_path / 'hub'], ['--data', 'fruit', '--licence', 'mit']
    load_program('tools/save_for_hub.py').main(['--checkpoint', str(files[0]), '--output', str(files[1]), *told])
    line = 'the run held out a part of 17 images, and the folder has 37 now: of those'
    for file in files:
        flags = ['--checkpoint', file, '--workers', '0', '--data-dir', undivided]
        assert line not in call('validate', *flags)[1]
    for number in range(20):
        shutil.copy(next((undivided / 'plum').iterdir()), undivided / 'pear' / f'new{number}.png')
    for file in files:
        code, out, err = call('validate', '--checkpoint', file, '--workers', '0', '--data-dir', undivided)
        assert code == 0 and out.count(line) == 1, out + err
    for dry in ([], ['--dry-run']):
        code, _, err = run('run', '--resume', 'auto', '--epochs', '3', *dry)
        assert code == 2 and 'held out a part of 17 images, and the folder has 37 now' in err, err


def test_a_tar_file_of_webp_and_bmp(undivided, tmp_path):
    before = get_img_extensions()
    for split in ('train', 'validation'):
        with tarfile.open(tmp_path / f'{split}.tar', 'w') as tar:
            for name in CLASSES:
                tar.add(undivided / name, name)
    config = DataConfig(data_dir=str(tmp_path))
    train_set, _, names = open_training_sets(config, in_chans=3, batch_size=4, seed=0)
    colours = [int(np.asarray(train_set[index][0]).mean((0, 1)).argmax()) for index in range(17)]
    assert names == [*CLASSES] and colours == [0] * 10 + [1] * 6 + [2] and get_img_extensions() == before


def test_two_processes_hold_out_the_same(undivided, tmp_path):
    flags = [*MODEL, *FLAGS, '-b', '2', '--data-dir', undivided, '--output', tmp_path, '--experiment', 'two']
    done = command('train', *flags, processes=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('4 of its 17 images are held out') == 1
    log = (tmp_path / 'two' / 'train.log').read_text()
    assert (
        log.count('4 of its 17 images are held out') == 1 and log.count('best top1') == 3
    )  # of two epochs, and at the end


@pytest.mark.parametrize(
    'flags, epochs, expected',
    [
        ([], 300, 5),
        (['--epochs', '9'], 9, 1),
        (['--epochs', '10'], 10, 5),
        (['--epochs', '4', '--warmup-epochs', '3'], 4, 3),
        (['-c', 'eva_deit_tiny', '--epochs', '4'], 4, 0),
    ],
)
def test_warm_up_of_few_epochs(flags, epochs, expected):
    config, _ = parse_settings('train', flags)
    assert (config.schedule.epochs, config.schedule.warmup_epochs) == (epochs, expected)
    assert len(config.notes) == (expected < 3)


def test_one_class_is_told_of(run, undivided, tmp_path):
    shutil.copytree(undivided / 'apple', tmp_path / 'one' / 'apple')
    for flags, line in (
        (['--dry-run'], 'one class, apple: there'),
        ([], 'warning: one class, apple: there is nothing'),
    ):
        code, out, err = run('run', *flags, data=tmp_path / 'one')
        assert code == 0 and line in out, err
    assert 'top1 100' in out and 'top5' not in out


def test_what_cannot_be_divided_is_one_line(run, call, images, undivided, tmp_path):
    code, _, err = run('run', data=images)
    assert code == 2 and 'has val to validate on; leave --val-fraction out' in err and err.count('\n') == 1
    (tmp_path / 'single').mkdir()
    for name in CLASSES:
        (tmp_path / 'single' / name).mkdir()
        shutil.copy(next((undivided / 'apple').iterdir()), tmp_path / 'single' / name)
    code, _, err = run('run', data=tmp_path / 'single')
    assert code == 2 and 'no class of' in err and err.count('\n') == 1
    code, _, err = run('run', '--dataset', 'torch/fashion_mnist')
    assert code == 2 and 'splits of its own' in err and err.count('\n') == 1
    code, _, err = call('train', *MODEL, '--data-dir', undivided, '--output', tmp_path, '--device', 'cpu')
    assert code == 2 and '--val-fraction 0.2' in err and err.count('\n') == 1
    (tmp_path / 'half').mkdir()
    shutil.copytree(undivided, tmp_path / 'half' / 'train')  # a training split alone is divided too
    code, out, err = run('half-run', '--dry-run', data=tmp_path / 'half')
    assert code == 0 and '13 images to train on, 4 to validate on' in out and 'warm-up shortened' in out
    assert re.search(r'^warning +3 updates an epoch', out, re.M)
