"""Folders, tar files, WebDataset shards and Hugging Face data sets, by timm's readers: trained, counted, judged."""

import io
import tarfile

import faults
import pytest
from runs import CLASSES, MODEL, QUICK, load_script, write_images

from evavit.errors import run_script
from evavit.training import data
from evavit.training.config import parse_settings


def files(root):
    return sorted(path for path in root.rglob('*.png'))


def add(archive, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


@pytest.fixture
def images(tmp_path):
    """24 images to train on, of which one is broken, and 12 to validate on."""
    write_images(tmp_path / 'images' / 'train', dict.fromkeys(CLASSES, 8))
    write_images(tmp_path / 'images' / 'validation', dict.fromkeys(CLASSES, 4))
    (tmp_path / 'images' / 'train' / 'pear' / '3.png').write_bytes(faults.bad_files()['truncated.png'][0])
    return tmp_path / 'images'


@pytest.fixture
def tars(images, tmp_path):
    (tmp_path / 'tars').mkdir()
    for split in ('train', 'validation'):
        with tarfile.open(tmp_path / 'tars' / f'{split}.tar', 'w') as archive:
            for path in files(images / split):
                add(archive, str(path.relative_to(images / split)), path.read_bytes())
    return ['--data-dir', tmp_path / 'tars']


@pytest.fixture
def shards(images, tmp_path):
    pytest.importorskip('webdataset')
    (tmp_path / 'shards').mkdir()
    for split in ('train', 'validation'):
        for number in range(4):
            with tarfile.open(tmp_path / 'shards' / f'set-{split}-{number:04d}.tar', 'w') as archive:
                for path in files(images / split)[number::4]:
                    key = f'{path.parent.name}_{path.stem}'
                    add(archive, f'{key}.png', path.read_bytes())
                    add(archive, f'{key}.cls', str(CLASSES.index(path.parent.name)).encode())
    return [
        '--dataset',
        'wds/set',
        '--data-dir',
        tmp_path / 'shards',
        '--num-classes',
        '3',
        '--train-split',
        'set-train-{0000..0003}.tar|24',
        '--val-split',
        'set-validation-{0000..0003}.tar|12',
    ]


@pytest.fixture
def parquet(images, tmp_path):
    datasets = pytest.importorskip('datasets')
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=list(CLASSES)))
    (tmp_path / 'parquet' / 'data').mkdir(parents=True)
    for split in ('train', 'validation'):
        paths = files(images / split)
        columns = dict(
            image=[dict(bytes=path.read_bytes(), path=f'{path.parent.name}_{path.name}') for path in paths],
            label=[CLASSES.index(path.parent.name) for path in paths],
        )
        datasets.Dataset.from_dict(columns, features=features).to_parquet(
            str(tmp_path / 'parquet' / 'data' / f'{split}-00000-of-00001.parquet')
        )
    return tmp_path / 'parquet'


@pytest.fixture
def hfds(parquet, tmp_path):
    return ['--dataset', f'hfds/{parquet}', '--data-dir', tmp_path / 'cache']


@pytest.fixture
def hfids(parquet, tmp_path):
    return [
        '--dataset',
        f'hfids/{parquet}',
        '--data-dir',
        tmp_path / 'cache',
        '--train-num-samples',
        '24',
        '--val-num-samples',
        '12',
        '--num-classes',
        '3',
    ]


@pytest.mark.parametrize('kind, workers', [('tars', 2), ('shards', 2), ('hfds', 2), ('hfids', 0)])
def test_a_run(kind, workers, request, tmp_path, capfd, monkeypatch):
    """Two epochs end, the broken image is named and counted once, and each image of validation counts once."""
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    place = list(map(str, request.getfixturevalue(kind)))
    (tmp_path / 'cache').mkdir()
    flags = [*MODEL, *QUICK, *place, '--workers', str(workers), '--max-bad-images', '0.05', '-b', '4']
    capfd.readouterr()
    code = run_script(load_script('train').main, [*flags, '--output', str(tmp_path), '--experiment', 'run'])
    out, err = capfd.readouterr()
    assert code == 0, err
    warnings = [line for line in out.splitlines() if line.startswith('warning: ')]
    assert len(warnings) == 1 and 'pear' in warnings[0] and '1 of 24' in warnings[0], out
    header, *rows = (tmp_path / 'run' / 'summary.csv').read_text().splitlines()
    assert len(rows) == 2 and rows[-1].split(',')[header.split(',').index('train_bad_images')] == '1'
    split = [place[place.index('--val-split') + 1]] if '--val-split' in place else ['validation']
    judge = [word for word in place if word not in ('--train-num-samples', '24')]
    judge = [word.replace('--val-num-samples', '--num-samples') for word in judge]
    for name in ('--train-split', '--val-split'):
        if name in judge:
            del judge[judge.index(name) : judge.index(name) + 2]
    judge += ['--split', *split, '--workers', '1', '-b', '5', '--device', 'cpu']
    judge += ['--checkpoint', str(tmp_path / 'run' / 'last.safetensors')]
    code = run_script(load_script('validate').main, judge)
    out, err = capfd.readouterr()
    assert code == 0 and '(12 images)' in out, err


def labels(dataset):
    return sorted(int(target) for _, target in (dataset[index] for index in range(len(dataset))))


def test_tar_and_folder_agree(images, tars):
    for split in ('train', 'validation'):
        sets = []
        for place in (['--data-dir', images], tars):
            settings, _ = parse_settings('train', [*map(str, place), '--max-bad-images', '1'])
            sets.append(data.open_dataset(settings.data, split, batch_size=4))
        assert sets[0][1] == sets[1][1] == list(CLASSES)
        assert labels(sets[0][0]) == labels(sets[1][0])


def test_a_broken_tar_is_named(tars, capfd, tmp_path):
    archive = tars[1] / 'train.tar'
    archive.write_bytes(archive.read_bytes()[:700])
    code = run_script(load_script('train').main, [*MODEL, *QUICK, *map(str, tars), '--output', str(tmp_path)])
    err = capfd.readouterr().err
    assert code == 2 and err.startswith('error: ') and err.count('\n') == 1 and 'train.tar' in err


def test_a_missing_package_is_named(monkeypatch, tmp_path, capfd):
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    for dataset, package in (('wds/x', 'webdataset'), ('hfds/x', 'datasets'), ('tfds/x', 'tensorflow_datasets')):
        code = run_script(
            load_script('train').main,
            [*MODEL, *QUICK, '--dataset', dataset, '--data-dir', str(tmp_path), '--num-classes', '3'],
        )
        err = capfd.readouterr().err
        assert code == 2 and f'needs the package {package}' in err
