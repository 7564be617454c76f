"""Folders, tar files, WebDataset shards and Hugging Face data sets, by timm's readers: trained, counted, judged."""

import gzip
import io
import json
import os
import re
import shutil
import socket
import tarfile

import faults
import pytest
import torch
import torch.distributed as dist
from PIL import EpsImagePlugin, ImageFile
from runs import CLASSES, MODEL, QUICK, load_script, write_images
from training.data import fake_tfds
from training.data.hostile_tars import bomb, hostile_header, little_memory, wounds

from evavit.errors import LocalError, UserError, run_script
from evavit.training import data
from evavit.training.config import parse_settings
from evavit.training.data import folders
from evavit.training.distributed import Process


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


@pytest.fixture
def tfds(images, monkeypatch):
    fake_tfds.install(monkeypatch)
    return ['--dataset', 'tfds/fruit', '--data-dir', images]


@pytest.mark.parametrize('kind, workers', [('tars', 2), ('shards', 2), ('hfds', 2), ('hfids', 0), ('tfds', 2)])
def test_a_run(kind, workers, request, tmp_path, capfd, monkeypatch):
    """Two epochs end, the broken image is named and counted once, and each image of validation counts once."""
    place = list(map(str, request.getfixturevalue(kind)))
    (tmp_path / 'cache').mkdir()
    flags = [*MODEL, *QUICK, *place, '--workers', str(workers), '--max-bad-images', '0.05', '-b', '4']
    capfd.readouterr()
    code = run_script(load_script('train').main, [*flags, '--output', str(tmp_path), '--experiment', 'run'])
    out, err = capfd.readouterr()
    assert code == 0, err
    warnings = [line for line in out.splitlines() if 'is not a readable image' in line]
    name = 'an image without a name' if kind == 'tfds' else 'pear'
    assert len(warnings) == 1 and name in warnings[0] and '1 of 24' in warnings[0], out
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


def test_what_a_tfds_set_says_of_itself(tfds):
    """Names and numbers are its own; another number of images is a line."""
    settings, _ = parse_settings('train', [*map(str, tfds), '--max-bad-images', '1'])
    train_set, eval_set, names = data.open_training_sets(settings.data, in_chans=1, batch_size=4, seed=0)
    assert names == list(CLASSES) and (len(train_set), len(eval_set)) == (24, 12)
    found = [(image.mode, label) for image, label in eval_set]
    assert found == [('L', label) for label in (0, 1, 2) for _ in range(4)]
    settings.data.train_num_samples = 5
    with pytest.raises(UserError, match='5 images: tfds/fruit says itself how many are in train; leave --train-num'):
        data.open_training_sets(settings.data, in_chans=3, batch_size=4, seed=0)


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


@pytest.mark.timeout(30)
@pytest.mark.parametrize('dataset', ['torch/image_folder', 'Torch/ImageNet', 'torch/folder'])
def test_torchvision_follows_no_circle(images, dataset):
    """Of two links it would try all ways, 40 folders deep."""
    place = images / 'train' / 'pear'
    for name in ('a', 'b'):
        (place / name).symlink_to(place, target_is_directory=True)
    settings, _ = parse_settings('train', ['--data-dir', str(images), '--dataset', dataset])
    with pytest.raises(UserError, match='pear/a: a link that leads back to a folder around it'):
        data.open_dataset(settings.data, 'train', batch_size=4)


@pytest.mark.parametrize('dataset', ['', 'torch/image_folder', 'torch/folder'])
def test_splits_are_not_taken_for_classes(images, dataset):
    """Nor is a class called like the split taken for it."""

    def opened(place, split):
        settings, _ = parse_settings('train', ['--data-dir', str(place), '--dataset', dataset])
        return data.open_dataset(settings.data, split, batch_size=4)

    for place, split, told in (
        (images, 'test', 'no folder test, but train, validation'),
        (images, 'trian', 'no folder trian, but train, validation'),
        (images / 'train', 'train', 'is itself a split; give the folder around it'),
    ):
        with pytest.raises(UserError, match=told):
            opened(place, split)
    assert opened(images, 'eval')[1] == opened(images / 'validation', 'validation')[1] == list(CLASSES)
    (images / 'train' / CLASSES[0]).rename(images / 'train' / 'train')
    assert opened(images, 'train')[1] == [*CLASSES[1:], 'train']


@pytest.mark.parametrize('dataset', ['torch/image_folder', 'torch/folder'])
def test_torchvision_passes_over_no_image_and_takes_no_hidden_folder_for_a_class(images, dataset):
    settings, _ = parse_settings('train', ['--data-dir', str(images), '--dataset', dataset])
    for name, told in (
        ('plum/a.heic', 'a.heic: only .jpg, .* are read; convert such images to PNG or JPEG'),
        ('a.png', 'a.png: an image outside of the class folders'),
        ('.ipynb_checkpoints/', r'\.ipynb_checkpoints: would be taken for a class; take it away'),
    ):
        place = images / 'train' / name
        place.mkdir() if name.endswith('/') else place.touch()
        with pytest.raises(UserError, match=told):
            data.open_dataset(settings.data, 'train', batch_size=4)
        place.rmdir() if name.endswith('/') else place.unlink()
    assert data.open_dataset(settings.data, 'train', batch_size=4)[1] == list(CLASSES)


@pytest.mark.timeout(30)
@pytest.mark.parametrize('dataset', ['', 'torch/image_folder'])
def test_links_that_make_up_too_many_paths(images, dataset, monkeypatch):
    """No circle: each of 40 folders is in the one before it, twice."""
    monkeypatch.setattr(folders, 'MOST_LINKS', 1000)
    for number in range(40):
        (images / 'train' / f'd{number}').mkdir()
        for name in ('a', 'b') if number else ():
            (images / 'train' / f'd{number - 1}' / name).symlink_to(images / 'train' / f'd{number}')
    settings, _ = parse_settings('train', ['--data-dir', str(images), '--dataset', dataset])
    with pytest.raises(UserError, match='more than 1,000 links to folders, such as '):
        data.open_dataset(settings.data, 'train', batch_size=4)


def _rewrite_shard(path, change):
    """Replace each member of a shard by change(name, content)."""
    with tarfile.open(path) as archive:
        members = [(member.name, archive.extractfile(member).read()) for member in archive]
    with tarfile.open(path, 'w') as archive:
        for name, content in members:
            add(archive, name, change(name, content))


@pytest.fixture
def torch_folder(images):
    return ['--dataset', 'torch/image_folder', '--data-dir', images]


@pytest.fixture
def folder(images):
    return ['--data-dir', images]


SOURCES = ['folder', 'torch_folder', 'tars', 'shards', 'hfds', 'hfids']
HOSTILE = {'gs': faults.postscript(), 'pixels': faults.bomb(13_000, 13_000)}


@pytest.mark.parametrize('content', HOSTILE)
@pytest.mark.parametrize('kind', SOURCES)
def test_no_source_decodes_by_itself(kind, content, images, tmp_path, monkeypatch, request):
    """A drawing called pear/3.png starts no Ghostscript, and 169 million pixels are not decoded, whoever reads them."""
    (tmp_path / 'bin').mkdir()
    (tmp_path / 'bin' / 'gs').write_text(f'#!/bin/sh\ntouch {tmp_path}/started\n')
    (tmp_path / 'bin' / 'gs').chmod(0o755)
    monkeypatch.setenv('PATH', f'{tmp_path}/bin:{os.environ["PATH"]}')
    monkeypatch.setattr(EpsImagePlugin, 'gs_binary', None)
    loaded, load = [], ImageFile.ImageFile.load
    monkeypatch.setattr(ImageFile.ImageFile, 'load', lambda image: loaded.append(image.size) or load(image))
    (images / 'train' / 'pear' / '3.png').write_bytes(HOSTILE[content])
    place = request.getfixturevalue(kind)
    (tmp_path / 'cache').mkdir()
    settings, _ = parse_settings('train', [*map(str, place), '--max-bad-images', '1'])
    opened, _, _ = data.open_training_sets(settings.data, in_chans=3, batch_size=4, seed=0)
    read = iter(opened) if kind in ('shards', 'hfids') else (opened[index] for index in range(24))
    assert sum(image.size == (16, 16) for image, _ in read) == 24
    assert opened.bad.count == 1 and not (tmp_path / 'started').exists() and set(loaded) <= {(16, 16)}
    why = dict(gs='no image of a known format', pixels='13000 × 13000 pixels, above the limit')[content]
    opened.bad._look()
    (line,) = opened.bad.found.values()
    assert why in line


@pytest.mark.parametrize('label', ['99', '-1', str(10**30), 'pear', '', '1.5', '9' * 5000])
@pytest.mark.parametrize('workers', ['0', '2'])
def test_a_label_that_is_no_class_stops_with_a_line(label, workers, shards, tmp_path, capfd):
    for shard in (tmp_path / 'shards').glob('set-train-*.tar'):
        _rewrite_shard(shard, lambda name, content: label.encode() if name == 'pear_3.cls' else content)
    place = [*map(str, shards), '--output', str(tmp_path), '--workers', workers, '--max-bad-images', '1']
    capfd.readouterr()
    code = run_script(load_script('train').main, [*MODEL, *QUICK, *place])
    err = capfd.readouterr().err
    assert code == 2 and err.startswith('error: ') and err.count('\n') == 1, err
    assert '.tar: pear_3: ' in err and (label[:40] or 'empty') in err and 'the 3 classes have the numbers 0 to 2' in err
    assert ('by --class-map' in err) == (label not in ('99', '-1', str(10**30)))  # those are numbers


def _rename(path, old, new):
    with tarfile.open(path) as archive:
        members = [(member.name, archive.extractfile(member).read()) for member in archive]
    with tarfile.open(path, 'w') as archive:
        for name, content in members:
            add(archive, name.replace(old, new), content)


@pytest.mark.parametrize('ending', ['.jpeg', '.BMP', '.gif'])
def test_endings_of_images_in_shards(ending, shards, tmp_path, capfd):
    for shard in (tmp_path / 'shards').glob('*.tar'):
        _rename(shard, '.png', ending)
    place = [*map(str, shards), '--output', str(tmp_path), '--workers', '0', '--max-bad-images', '1']
    code = run_script(load_script('train').main, [*MODEL, *QUICK, *place])
    out, err = capfd.readouterr()
    if ending != '.gif':
        assert code == 0, err
        return
    assert re.search(r'\.tar: \w+ is not a readable image \(none of \.jpg, .*, \.bmp, only \.gif, \.cls\)', out), out
    assert code == 2 and err.startswith('error: ') and 'as many shards as processes × --workers' in err


def _sparse(name, size):
    """A file that has 4 bytes in the archive and `size` bytes when it is read."""
    member = tarfile.TarInfo(name)
    told = dict(major='0', minor='1', size=str(size), map='0,4', name=name)
    member.pax_headers = {f'GNU.sparse.{key}': value for key, value in told.items()}
    member.size = 4
    return member


def test_a_small_shard_that_unpacks_to_terabytes_is_a_bad_image(shards, tmp_path, monkeypatch):
    monkeypatch.setattr('evavit.training.data.tars.LITTLE', 2**20)
    bomb(tmp_path / 'shards' / 'set-train-0000.tar', 2**26)
    settings, _ = parse_settings('train', [*map(str, shards), '--max-bad-images', '1'])
    opened, _, _ = data.open_training_sets(settings.data, in_chans=3, batch_size=4, seed=0)
    with little_memory():
        assert sum(1 for _ in opened) == 24
    opened.bad._look()
    assert any('unpacks to more than 1,000 times its size' in line for line in opened.bad.found.values())


@pytest.mark.parametrize('kind', ['sparse', 'header'])
@pytest.mark.parametrize('compressed', [False, True])
def test_no_shard_fills_the_memory(kind, compressed, shards, tmp_path):
    """A file of little that is read as much, and a header of any length, are a bad image each."""
    path = tmp_path / 'shards' / 'set-train-0000.tar'
    if kind == 'header':
        hostile_header(path)
    else:
        with tarfile.open(path, 'a', format=tarfile.PAX_FORMAT) as archive:
            archive.addfile(_sparse('pear_x.png', 2**27), io.BytesIO(b'abcd'))
            add(archive, 'pear_x.cls', b'0')
    if compressed:
        path.write_bytes(gzip.compress(path.read_bytes()))
    settings, _ = parse_settings('train', [*map(str, shards), '--max-bad-images', '1'])
    opened, _, _ = data.open_training_sets(settings.data, in_chans=3, batch_size=4, seed=0)
    with little_memory():
        assert sum(1 for _ in opened) == 24
    opened.bad._look()
    told = dict(sparse='a sparse file', header='a header of 67,108,864 bytes')[kind]
    assert sorted(told in line for line in opened.bad.found.values()) == [False, True]  # the other one is pear_3


def test_a_sample_of_many_files_fills_no_memory(shards, tmp_path, monkeypatch):
    """Of one name, of one name and ending, or without one: what is kept of them all is what one image may have."""
    monkeypatch.setattr('PIL.Image.MAX_IMAGE_PIXELS', 2**19)  # an image has 2 MiB at most
    path, zeros = tmp_path / 'shards' / 'set-train-0000.tar', bytes(2**20)
    with tarfile.open(path, 'a') as archive:
        for number in range(20):
            add(archive, f'README-{number}', zeros)
            add(archive, 'a.png', zeros)
        add(archive, 'a.cls', b'0')
        for ending in ('jpg', 'png', 'webp', 'jpeg', 'bmp', *(f'x{number}' for number in range(500))):
            add(archive, f'b.{ending}', zeros if len(ending) != 4 or ending.isalpha() else b'')
        add(archive, 'b.cls', b'1')
    path.write_bytes(gzip.compress(path.read_bytes(), 1))
    settings, _ = parse_settings('train', [*map(str, shards), '--max-bad-images', '1'])
    opened, _, _ = data.open_training_sets(settings.data, in_chans=3, batch_size=4, seed=0)
    with little_memory():
        assert sum(1 for _ in opened) == 24
    opened.bad._look()
    lines = opened.bad.found.values()
    assert sum(f'{path}: a.png\nanother one of its sample has its ending' == line for line in lines) == 1
    assert sum(line.startswith((f'{path}: a\n', f'{path}: b\n')) for line in lines) == 2


@pytest.mark.parametrize('broken', ['an image', 'its label'])
@pytest.mark.parametrize('compressed', [False, True])
def test_the_rest_of_a_damaged_shard_is_a_bad_image(compressed, broken, shards, tmp_path):
    path = tmp_path / 'shards' / 'set-train-0000.tar'
    whole = path.read_bytes()
    with tarfile.open(path) as archive:
        place = archive.getmembers()[4 if broken == 'an image' else 5].offset
    settings, _ = parse_settings('train', [*map(str, shards), '--max-bad-images', '1'])
    for content in wounds(whole, place).values():
        path.write_bytes(gzip.compress(content) if compressed else content)
        opened, _, _ = data.open_training_sets(settings.data, in_chans=3, batch_size=4, seed=0)
        assert sum(1 for _ in opened) == 24
        opened.bad._look()
        told = f'{path}\nthe rest of the shard is lost: damaged or cut short at byte'
        assert any(line.startswith(told) for line in opened.bad.found.values()), opened.bad.found


def test_a_second_file_of_a_sample_is_named_with_its_shard(shards, tmp_path):
    path = tmp_path / 'shards' / 'set-train-0000.tar'
    with tarfile.open(path) as archive:
        last = archive.getmembers()[-1].name.partition('.')[0]
    with tarfile.open(path, 'a') as archive:
        add(archive, f'{last}.PNG', b'another')
    settings, _ = parse_settings('train', [*map(str, shards), '--max-bad-images', '1'])
    opened, _, _ = data.open_training_sets(settings.data, in_chans=3, batch_size=4, seed=0)
    assert sum(1 for _ in opened) == 24
    opened.bad._look()
    assert f'{path}: {last}.PNG\nanother one of its sample has its ending' in opened.bad.found.values()


def test_a_label_that_is_not_read_is_a_line(shards, tmp_path):
    with tarfile.open(tmp_path / 'shards' / 'set-train-0000.tar', 'a', format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(_sparse('pear_x.cls', 2**27), io.BytesIO(b'abcd'))
    settings, _ = parse_settings('train', list(map(str, shards)))
    opened, _, _ = data.open_training_sets(settings.data, in_chans=3, batch_size=4, seed=0)
    with pytest.raises(LocalError, match=r'set-train-0000\.tar: pear_x: no label'):
        list(opened)


@pytest.mark.parametrize('label', [7, -1, None])
@pytest.mark.parametrize('kind', ['hfds', 'hfids'])
def test_a_label_of_a_table_that_is_no_class(kind, label, images, tmp_path, monkeypatch, capfd):
    datasets = pytest.importorskip('datasets')
    (tmp_path / 'parquet' / 'data').mkdir(parents=True)
    (tmp_path / 'cache').mkdir()
    paths = files(images / 'train')
    columns = dict(
        image=[dict(bytes=path.read_bytes(), path=path.name) for path in paths],
        label=[label if number == 5 else 1 for number in range(len(paths))],
    )
    features = datasets.Features(image=datasets.Image(), label=datasets.Value('int64'))
    for split in ('train', 'validation'):
        datasets.Dataset.from_dict(columns, features=features).to_parquet(
            str(tmp_path / 'parquet' / 'data' / f'{split}-00000-of-00001.parquet')
        )
    place = [f'{kind}/{tmp_path / "parquet"}', '--data-dir', str(tmp_path / 'cache'), '--num-classes', '3']
    place += ['--train-num-samples', '24', '--val-num-samples', '24', '--output', str(tmp_path), '--dataset', place[0]]
    capfd.readouterr()
    code = run_script(load_script('train').main, [*MODEL, *QUICK, *place[1:], '--max-bad-images', '1'])
    err = capfd.readouterr().err.splitlines()
    assert code == 2 and f'its label is {label}, but the 3 classes have the numbers 0 to 2' in err[-1], err


def test_a_shard_that_is_missing_or_a_pipe_is_named(shards, tmp_path):
    settings, _ = parse_settings('train', [*map(str, shards), '--max-bad-images', '1'])
    shard = tmp_path / 'shards' / 'set-train-0002.tar'
    shard.unlink()
    for words in ('no such shard', 'not a regular file'):
        with pytest.raises(UserError, match=f'set-train-0002.tar: {words}'):
            data.open_dataset(settings.data, settings.data.train_split, batch_size=4, is_training=True)
        if not shard.exists():
            os.mkfifo(shard)


@pytest.mark.parametrize('folder', ['.', 'pipe:touch started #', './pipe:touch started #'])
def test_no_name_of_a_shard_is_a_command(folder, shards, tmp_path, monkeypatch):
    """webdataset starts what follows pipe: in a name, be it in `_info.json` or the folder's own."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tmp_path / 'shards', folder, dirs_exist_ok=True)
    names = [f'set-train-{number:04d}.tar' for number in range(4)] + ['pipe:touch started'] * (folder == '.')
    split = dict(name='train', num_samples=24, filenames=names, shard_lengths=[6] * len(names))
    (tmp_path / folder / '_info.json').write_text(json.dumps(dict(splits=dict(train=split))))
    settings, _ = parse_settings('train', ['--dataset', 'wds/x', '--data-dir', folder, '--max-bad-images', '1'])
    try:
        dataset, _ = data.open_dataset(settings.data, 'train', batch_size=4, is_training=True)
        assert len(list(dataset)) == 24 and folder != '.'
    except UserError as error:
        assert 'pipe:touch started: no such shard' in str(error) and folder == '.'
    assert not (tmp_path / 'started').exists()


@pytest.mark.parametrize('place', ['pipe:touch started', 'file:///tmp', 'gs://bucket', 'scp://host/x', 'nowhere'])
def test_shards_lie_in_a_folder_or_on_the_web(place, tmp_path, monkeypatch):
    pytest.importorskip('webdataset')
    monkeypatch.chdir(tmp_path)
    settings, _ = parse_settings('train', ['--dataset', 'wds/x', '--data-dir', place])
    with pytest.raises(UserError, match='shards lie in a folder, or at an address that begins with https://'):
        data.open_dataset(settings.data, 'a.tar|4', batch_size=4, is_training=True)
    assert not (tmp_path / 'started').exists()


def test_shards_that_nothing_describes_are_named_by_a_pattern(shards):
    settings, _ = parse_settings('train', [*map(str, shards)])
    with pytest.raises(UserError, match=r'no _info\.json says what its split train is; name the shards, as in'):
        data.open_dataset(settings.data, 'train', batch_size=4, is_training=True)


@pytest.mark.parametrize('name', ['_info.json', 'info.json'])
@pytest.mark.parametrize('content', ['pipe', 'folder', '[1]', '{"splits": [1]}', '{', '[' * 100_000, b'\xff'])
def test_a_description_of_shards_that_is_none(name, content, shards, tmp_path):
    settings, _ = parse_settings('train', [*map(str, shards)])
    path = tmp_path / 'shards' / name
    if content in ('pipe', 'folder'):
        (os.mkfifo if content == 'pipe' else os.mkdir)(path)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=rf'{name}: (no file|cannot be read|describes no shards)') as error:
        data.open_dataset(settings.data, settings.data.train_split, batch_size=4, is_training=True)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('number', [10**22, 10**11, -4, 'x', float('nan'), float('inf'), 3.5, '10**15'])
def test_a_number_of_images_that_cannot_be_is_a_line(number, shards, tmp_path):
    split = dict(name='train', num_samples=number, filenames=['set-train-0000.tar'], shard_lengths=[6])
    (tmp_path / 'shards' / '_info.json').write_text(json.dumps(dict(splits=dict(train=split))))
    settings, _ = parse_settings('train', [*map(str, shards)])
    for name, given in (('train', None), (f'set-train-0000.tar|{number}', None), ('set-train-0000.tar|6', number)):
        if given is None or isinstance(given, int):
            with pytest.raises(UserError, match=r'images: give a whole number|invalid literal') as error:
                data.open_dataset(settings.data, name, batch_size=4, is_training=True, num_samples=given)
            assert '\n' not in str(error.value)


def test_the_largest_number_of_images_costs_no_memory(shards):
    settings, _ = parse_settings('train', [*map(str, shards)])
    opened, _ = data.open_dataset(settings.data, 'set-train-0000.tar|10000000000', batch_size=4, is_training=True)
    assert len(opened.bad.marks) == 2**24 and opened.bad.limit == 10**7


@pytest.mark.parametrize(
    'names',
    [
        '{0000..99999999}',
        '{0..999}{0..999}{0..9}',
        '{a..z}' * 5,
        '{a,b}' * 30,
        '{' * 5 + '{0..99},x}' * 5 + '{0..9999}' * 2,
        '{' + '{0..9999},' * 200 + 'a}',
        f'{{0..{"9" * 5000}}}',
        '{' + f'{{0..{"9" * 18}}}' * 300 + ',x}',
        '{' * 50_000 + '}' * 50_000,
    ],
)
def test_too_many_shards_are_a_line(names, shards):
    settings, _ = parse_settings('train', [*map(str, shards)])
    with pytest.raises(UserError, match='names more than 1,000,000 shards'):
        data.open_dataset(settings.data, f'x-{names}.tar|32', batch_size=4, is_training=True)


@pytest.fixture
def asked(monkeypatch):
    """The hosts whose address is asked for; none is told."""
    hosts = []

    def ask(host, *_, **__):
        hosts.append(host)
        raise RuntimeError('asked')  # an error of the network would be tried again and again

    monkeypatch.setattr(socket, 'getaddrinfo', ask)
    return hosts


@pytest.mark.parametrize('kind', ['hfds', 'hfids'])
def test_the_hub_is_asked_where_the_user_says_so(kind, asked, tmp_path):
    pytest.importorskip('datasets')
    for name, flags, online in (
        ('owner/name', [], False),
        ('buckets/a/b', [], False),
        ('owner/name', ['--dataset-download'], True),
        ('hf://datasets/owner/name', [], True),
    ):
        settings, _ = parse_settings('train', ['--dataset', f'{kind}/{name}', '--data-dir', str(tmp_path), *flags])
        with pytest.raises(UserError) as error:
            data.open_dataset(settings.data, 'train', batch_size=4, num_samples=4)
        assert bool(asked) == online and '\n' not in str(error.value), asked
        assert ('fetched with --dataset-download' in str(error.value)) != online
        asked.clear()


@pytest.mark.parametrize('kind', ['hfds', 'hfids'])
def test_splits_that_call_classes_otherwise(kind, parquet, tmp_path):
    """`datasets` takes the names of one file for all."""
    datasets = pytest.importorskip('datasets')
    settings, _ = parse_settings('train', ['--dataset', f'{kind}/{parquet}', '--data-dir', str(tmp_path / 'cache')])
    data.open_dataset(settings.data, 'train', batch_size=4, num_samples=4)
    (path,) = parquet.glob('data/validation-*.parquet')
    rows = datasets.Dataset.from_parquet(str(path), cache_dir=str(tmp_path / 'other'))
    names = sorted(CLASSES)[1:]
    rows = rows.filter(lambda row: CLASSES[row['label']] in names)
    label = [names.index(CLASSES[number]) for number in rows['label']]
    rows = (
        rows.remove_columns('label').add_column('label', label).cast_column('label', datasets.ClassLabel(names=names))
    )
    rows.to_parquet(str(path))
    with pytest.raises(UserError, match=r'validation-.*parquet: its classes \(label\) are .*; encode all splits with'):
        data.open_dataset(settings.data, 'train', batch_size=4, num_samples=4)


@pytest.mark.parametrize('name', ['README.md', '.huggingface.yaml'])
@pytest.mark.parametrize('key', ['configs', 'configs ', '"configs"', '&a configs'])
@pytest.mark.parametrize('place', ['hf://datasets/a/b/c', '[{split: train, path: ["hf\\x3a//datasets/a/b/c"]}]'])
def test_a_folder_that_names_other_places(asked, tmp_path, name, key, place):
    """However that is written in YAML."""
    pytest.importorskip('datasets')
    text = f'{key}:\n- config_name: default\n  data_files: {place}\n'
    (tmp_path / name).write_text(f'---\n{text}---\n' if name == 'README.md' else text)
    settings, _ = parse_settings('train', ['--dataset', f'hfds/{tmp_path}', '--data-dir', str(tmp_path)])
    with pytest.raises(UserError, match=f'{re.escape(name)} names hf://datasets/a/b/c: allow that it is fetched'):
        data.open_dataset(settings.data, 'train', batch_size=4)
    assert not asked


@pytest.mark.parametrize('flags', [['--num-classes', '3'], []])
def test_a_dry_run_downloads_nothing(flags, asked, tmp_path, capfd):
    for dataset in ('hfds/owner/name', 'hfids/hf://datasets/owner/name', 'torch/mnist'):
        place = ['--dataset', dataset, '--data-dir', str(tmp_path), '--dataset-download', '--output', str(tmp_path)]
        code = run_script(load_script('train').main, [*MODEL, *QUICK, *place, *flags, '--dry-run'])
        out, err = capfd.readouterr()
        assert code == 0 and 'not looked at, since a dry run downloads nothing' in out and not asked, err
        assert os.listdir(tmp_path) == []


@pytest.mark.parametrize('kind', ['hfds', 'hfids'])
def test_a_damaged_table_is_a_line(kind, parquet, request, tmp_path, monkeypatch):
    (tmp_path / 'cache').mkdir()
    place = list(map(str, request.getfixturevalue(kind)))
    for table in (parquet / 'data').glob('train*'):
        table.write_bytes(table.read_bytes()[:5000])
    settings, _ = parse_settings('train', place)
    with pytest.raises(UserError, match='dataset hfds/' if kind == 'hfds' else 'cannot be read on') as error:
        opened, _, _ = data.open_training_sets(settings.data, in_chans=3, batch_size=4, seed=0)
        list(opened)
    assert '\n' not in str(error.value)


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


@pytest.mark.parametrize('kind', ['tars', 'shards', 'hfds', 'hfids', 'tfds'])
def test_the_device_path_reads_every_source(kind, images, request, tmp_path, monkeypatch):
    """JPEG files and others from each of them: the batches of the CPU path, and its count of bad images."""
    (tmp_path / 'cache').mkdir()
    for number, path in enumerate(files(images / 'train')[::2]):
        if path.name != '3.png':
            path.write_bytes(faults.encode(faults.picture(side=40, seed=number), 'JPEG'))
    place = list(map(str, request.getfixturevalue(kind)))
    settings = parse_settings('train', [*place, '--max-bad-images', '1', '--aa', 'rand-m9-inc1'])[0]
    settings.machine.workers, settings.batch.batch_size = 0, 4
    process, both, count = Process(torch.device('cpu'), 0, 0, 1), [], None if kind == 'tfds' else 24
    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    size = dict(input_size=(3, 16, 16), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation='bicubic', crop_pct=1.0)
    for settings.machine.augment_device in ('any', 'cpu'):
        dataset, _ = data.open_dataset(
            settings.data, settings.data.train_split, batch_size=4, is_training=True, num_samples=count
        )
        loader = data.train_loader(
            dataset, settings.augment, size, batch_size=4, machine=settings.machine, seed=1, process=process
        )
        both.append(list(data.epoch_batches(loader, settings.batch, seed=1, process=process, epoch=0)))
        assert dataset.bad.count == 1
    dist.destroy_process_group()
    assert len(both[0]) == len(both[1]) == 6
    for (pixels, target), (expected, labels) in zip(*both, strict=True):
        assert torch.equal(target, labels) and 127.5 * (pixels - expected).abs().mean() < 0.05
