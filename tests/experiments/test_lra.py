"""experiments/lra: Pathfinder's pictures are answered by their curves alone; CIFAR-10's forms; runs; the table."""

import csv
import os

import numpy as np
import pytest
import timm
import torch
from experiments.cifar_files import write_binary, write_folders
from PIL import Image
from programs import load_program
from runs import signal_at, words

from evavit.errors import run_script

SMALL = words(
    '--device cpu --no-amp -b 4 --global-batch-size 4 --workers 0 --epochs 1 --warmup-epochs 0 '
    '--torchcompile none --log-interval 1'
)


@pytest.fixture
def load(monkeypatch, request):
    """A program of the folder, whose neighbours it can import."""
    monkeypatch.syspath_prepend(request.config.rootpath / 'experiments')
    return lambda name: load_program(f'experiments/lra/{name}.py')


@pytest.fixture(scope='module')
def drawn():
    program = load_program('experiments/lra/pathfinder.py')
    return program, [program.pathfinder(0, number) for number in range(300)]


def joined_by_following(found, step):
    """Whether the discs are ends of one curve, from the places of all dashes alone: neighbours are a step apart."""
    places = np.concatenate(found.curves)
    near = np.linalg.norm(places[:, None] - places, axis=-1) < 1.1 * step
    group = np.arange(len(places))
    for _ in places:
        group = np.where(near, group, len(places)).min(1)
    ends = [np.linalg.norm(places - disc, axis=1).argmin() for disc in found.discs]
    return group[ends[0]] == group[ends[1]]


def test_following_the_curves_answers_every_picture(drawn):
    program, pictures = drawn
    assert all(joined_by_following(found, program.STEP) == found.joined for found in pictures)


def test_nothing_else_answers_it(drawn):
    """Neither the number of joined pictures or of dashes, nor the places of the discs, nor the brightness."""
    program, pictures = drawn
    joined = np.array([found.joined for found in pictures])
    assert 0.4 < joined.mean() < 0.6
    lengths = [program.DASHES] * 2 + [program.SHORT] * program.DISTRACTORS
    assert all([len(curve) for curve in found.curves] == lengths for found in pictures)
    for value in (
        [np.linalg.norm(found.discs[0] - found.discs[1]) for found in pictures],
        [np.linalg.norm(found.discs.mean(0) - program.SIDE / 2) for found in pictures],
        [found.pixels.mean() for found in pictures],
    ):
        ranks = np.argsort(np.argsort(value))
        area = (ranks[joined].mean() - ranks[~joined].mean()) / len(pictures) + 0.5  # under the ROC curve
        assert 0.4 < area < 0.6  # four standard deviations of chance are 0.13


def test_a_picture_follows_from_seed_and_number(drawn):
    program, pictures = drawn
    again = program.pathfinder(0, 7)
    assert np.array_equal(again.pixels, pictures[7].pixels) and again.joined == pictures[7].joined
    assert not np.array_equal(program.pathfinder(1, 7).pixels, again.pixels)
    for found in pictures:
        assert found.pixels.shape == (32, 32) and found.pixels.dtype == np.uint8
        assert found.pixels.max() == 255
        for x, y in found.discs.round().astype(int):  # a disc is a bright place
            assert found.pixels[y - 1 : y + 1, x - 1 : x + 1].mean() > 150


@pytest.mark.parametrize('write', [write_binary, write_folders])
def test_cifar_10_in_both_forms(load, tmp_path, write):
    pictures, labels = write(tmp_path / 'cifar', dict(train=30, test=10))
    builder = load('build')
    found = builder.read_cifar10(tmp_path / 'cifar', 'train')
    assert np.array_equal(found[0], pictures['train']) and np.array_equal(found[1], labels['train'])
    builder.build_image(tmp_path / 'image', tmp_path / 'cifar')
    files = sorted((tmp_path / 'image' / 'val').glob('*/*.png'))
    assert len(files) == 10 and len(list((tmp_path / 'image' / 'train').glob('*/*'))) == 30
    place = next(path for path in files if path.stem == '000003')
    grey = np.asarray(Image.fromarray(pictures['test'][3]).convert('L'))
    assert np.array_equal(np.asarray(Image.open(place)), grey)
    assert place.parent.name == builder.CLASSES[labels['test'][3]]


def test_a_bad_source_is_a_line(load, tmp_path, capsys):
    builder = load('build')

    def told(*flags):
        assert run_script(builder.main, [str(tmp_path / 'out'), *map(str, flags)]) == 2
        assert not (tmp_path / 'out' / 'image').exists()
        return capsys.readouterr().err

    assert 'binary version of CIFAR-10' in told('--image', tmp_path)
    write_binary(tmp_path, dict(train=30, test=10))
    (tmp_path / 'data_batch_3.bin').write_bytes(b'123')
    assert 'data_batch_3.bin: no whole file' in told('--image', tmp_path)
    assert 'at least 20' in told('--pathfinder', 3)
    assert '--jobs 0: at least one process' in told('--pathfinder', 20, '--jobs', 0)
    assert 'give --image' in told()


def test_the_sequence_is_not_the_grid(load):
    """A chunk is a run of pixels in raster order, and what a chunk without cells does not see does not matter."""
    load('models')
    torch.manual_seed(0)
    sizes = dict(img_size=8, patch_size=1, in_chans=1, embed_dim=16, depth=1, num_heads=2, num_classes=0)
    model = timm.create_model('raster_eva_deit_tiny', **sizes, window_size=16, cell_size=0).eval()
    images = torch.randn(1, 1, 8, 8)
    changed = images.clone()
    changed[:, :, 4:] += 1  # tokens from 32 on
    with torch.no_grad():
        same = (model.forward_features(images) == model.forward_features(changed)).all(-1)[0]
    assert same.tolist() == [True] * 32 + [False] * 32


def test_a_drawing_process_that_is_killed_is_a_line(load, tmp_path, monkeypatch, capsys):
    builder = load('build')
    monkeypatch.setattr(builder, 'pathfinder', lambda seed, number: os._exit(9))
    assert run_script(builder.main, [str(tmp_path / 'lra'), '--pathfinder', '40', '--jobs', '1']) == 2
    assert 'a drawing process was killed' in capsys.readouterr().err and not [*tmp_path.glob('*/*')]


def test_the_runs_at_a_small_size(load, tmp_path, monkeypatch, capsys):
    builder, driver = load('build'), load('run')
    write_binary(tmp_path / 'cifar', dict(train=100, test=20))
    flags = [tmp_path / 'lra', '--image', tmp_path / 'cifar', '--pathfinder', 40, '--jobs', 1]
    assert run_script(builder.main, list(map(str, flags))) == 0, capsys.readouterr()
    assert 'pathfinder: train 32, held 4, val 4' in capsys.readouterr().out
    small = {
        name: (model, arguments | dict(embed_dim=8, depth=1)) for name, (model, arguments) in driver.NETWORKS.items()
    }
    monkeypatch.setattr(driver, 'NETWORKS', small)

    def call(*more):
        capsys.readouterr()
        flags = ['--data-dir', tmp_path / 'lra', '--output', tmp_path / 'runs', *more]
        assert run_script(driver.main, list(map(str, flags))) == 0, capsys.readouterr()
        return capsys.readouterr().out

    names = ['image-eva-sequence-s0', 'pathfinder-softmax-s0', 'pathfinder-eva-grid-s0']
    assert call('--list', '--only', *names).splitlines() == [f'{name:28} to do' for name in names]
    with monkeypatch.context() as patch:
        signal_at(patch, [2])
        assert 'asked to stop' in call('--only', names[0], *SMALL)
    assert call('--list', '--only', names[0]).split()[1] == 'started'
    call('--only', *names, *SMALL)
    with open(tmp_path / 'runs' / 'runs.csv', newline='') as file:
        rows = {row['run']: row for row in csv.DictReader(file)}
    assert list(rows) == names
    assert [row['images'] for row in rows.values()] == ['20', '4', '4']
    assert rows[names[0]]['arguments'].startswith('window_size=128 cell_size=16')
    settings = (tmp_path / 'runs' / 'settings' / f'{names[0]}.yaml').read_text()
    assert 'model: raster_eva_deit_tiny' in settings and 'patch_size: 1' in settings
    report = call('--report')
    assert '| eva-sequence |' in report and '| 43.24 |' in report and 'pathfinder, 1 epochs' in report


def test_no_data_is_a_line(load, tmp_path, capsys):
    driver = load('run')
    assert run_script(driver.main, ['--data-dir', str(tmp_path), '--only', 'pathfinder']) == 2
    assert 'experiments/lra/build.py' in capsys.readouterr().err


def test_a_folder_of_pictures_takes_no_other_s_place(load, tmp_path, capsys):
    """What a killed process left is no hindrance, and what is somebody's own stays."""
    (tmp_path / 'pathfinder.partial' / 'train').mkdir(parents=True)
    flags = [str(tmp_path), '--pathfinder', '20', '--jobs', '1']
    assert run_script(load('build').main, flags) == 0, capsys.readouterr().err
    assert len(list((tmp_path / 'pathfinder').glob('*/*/*.png'))) == 20
    assert run_script(load('build').main, flags) == 2 and 'is there already' in capsys.readouterr().err
    assert len(list((tmp_path / 'pathfinder').glob('*/*/*.png'))) == 20
    (tmp_path / 'file').touch()
    assert run_script(load('build').main, [str(tmp_path / 'file'), *flags[1:]]) == 2
    err = capsys.readouterr().err
    assert 'cannot be written' in err and err.count('\n') == 1
