"""Data sets: Fashion-MNIST's files without a download, class order, splits, input settings."""

import contextlib
import gzip
import os
import random
import sys
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo
from timm.utils.misc import natural_key as timm_key

from evavit.errors import UserError
from evavit.training import data
from evavit.training.config import DataConfig, ModelConfig
from evavit.training.data.folders import ClassFolders, natural_key
from evavit.training.data.pictures import Pictures
from evavit.training.signals import start_worker


def open_dataset(config, split, **rest):
    return data.open_dataset(config, split, batch_size=4, seed=0, **rest)


def write_idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + b''.join(int(n).to_bytes(4, 'big') for n in array.shape)
    with gzip.open(path, 'wb') as file:
        file.write(header + array.astype(np.uint8).tobytes())


@pytest.fixture
def fashion(tmp_path):
    raw = tmp_path / 'FashionMNIST' / 'raw'
    raw.mkdir(parents=True)
    for prefix, count in (('train', 20), ('t10k', 10)):
        write_idx(raw / f'{prefix}-images-idx3-ubyte.gz', np.random.default_rng(0).integers(0, 256, (count, 28, 28)))
        write_idx(raw / f'{prefix}-labels-idx1-ubyte.gz', np.arange(count) % 10)
    return tmp_path


@pytest.mark.parametrize('in_chans, mode', [(1, 'L'), (3, 'RGB')])
def test_packed_files_are_read_without_a_download(fashion, in_chans, mode):
    settings = DataConfig(max_bad_images=0.0, dataset='torch/fashion_mnist', data_dir=str(fashion))
    for split, count in (('train', 20), ('validation', 10)):
        dataset, names = open_dataset(settings, split, in_chans=in_chans)
        assert len(dataset) == count and len(names) == 10
        image, target = dataset[3]
        assert image.mode == mode and target == 3
    assert not list(fashion.rglob('*.partial'))


def test_a_broken_packed_file_is_named(fashion):
    broken = fashion / 'FashionMNIST' / 'raw' / 't10k-images-idx3-ubyte.gz'
    broken.write_bytes(broken.read_bytes()[:100])
    with pytest.raises(UserError, match='t10k-images'):
        open_dataset(DataConfig(max_bad_images=0.0, dataset='torch/fashion_mnist', data_dir=str(fashion)), 'train')


@pytest.mark.parametrize('fault, words', [('bomb', 'more than 20,000 bytes'), ('damaged', 'cannot be unpacked')])
def test_a_hostile_packed_file_is_named(fault, words, fashion, monkeypatch):
    monkeypatch.setattr('evavit.training.data.datasets.LARGEST_RAW', 20_000)
    packed = fashion / 'FashionMNIST' / 'raw' / 't10k-images-idx3-ubyte.gz'
    content = bytearray(gzip.compress(bytes(10**6)))
    content[10] |= 6 if fault == 'damaged' else 0  # the kind of the first block, which is none then
    packed.write_bytes(content)
    with pytest.raises(UserError, match=words) as told:
        open_dataset(DataConfig(max_bad_images=0.0, dataset='torch/fashion_mnist', data_dir=str(fashion)), 'train')
    assert str(packed) in str(told.value) and not packed.with_suffix('').exists()
    assert not list(fashion.rglob('*.partial'))


def test_files_of_arrays_that_do_not_fit_are_named(fashion):
    settings = DataConfig(max_bad_images=0.0, dataset='torch/fashion_mnist', data_dir=str(fashion))
    labels = fashion / 'FashionMNIST' / 'raw' / 'train-labels-idx1-ubyte.gz'
    write_idx(labels, np.arange(15) % 10)
    with pytest.raises(UserError, match='20 images and 15 labels; the files are damaged'):
        open_dataset(settings, 'train')
    for name in ('train-labels-idx1-ubyte.gz', 'train-labels-idx1-ubyte'):
        (labels.parent / name).unlink()
        os.mkfifo(labels.parent / name)
        with pytest.raises(UserError, match=f'{name}: not a regular file'):
            open_dataset(settings, 'train')
        (labels.parent / name).unlink()
        write_idx(labels, np.arange(15) % 10) if name.endswith('ubyte') else (labels.parent / name[:-3]).touch()


PICTURES, NUMBERS = torch.zeros(20, 28, 28, dtype=torch.uint8), torch.arange(20) % 10
ARRAYS = {
    'images without a side': (torch.zeros(20), NUMBERS),
    'images of numbers': (torch.zeros(20, 28, 28), NUMBERS),
    'images of colours': (torch.zeros(20, 28, 28, 3, dtype=torch.uint8), NUMBERS),
    'images of no size': (torch.zeros(20, 0, 28, dtype=torch.uint8), NUMBERS),
    'images that are listed': ([1] * 20, NUMBERS),
    'images without zeros': (PICTURES.to_sparse(), NUMBERS),
    'labels of fractions': (PICTURES, torch.rand(20)),
    'labels of yes and no': (PICTURES, NUMBERS > 4),
    'labels of two': (PICTURES, torch.stack([NUMBERS, NUMBERS], 1)),
    'labels that are listed': (PICTURES, ['a'] * 20),
    'names': {'a' * 20: 1, 'b' * 20: 2},
}


@pytest.mark.parametrize('name', ['mnist', 'qmnist'])
@pytest.mark.parametrize('arrays', ARRAYS)
def test_arrays_of_another_form_are_named(arrays, name, tmp_path):
    """In the files of older versions, which torchvision takes as they are."""
    folder = tmp_path / dict(mnist='MNIST', qmnist='QMNIST')[name] / 'processed'
    folder.mkdir(parents=True)
    settings = DataConfig(max_bad_images=0.0, dataset=f'torch/{name}', data_dir=str(tmp_path))
    for content in ((PICTURES, NUMBERS if name == 'mnist' else NUMBERS[:, None].expand(20, 8).clone()), ARRAYS[arrays]):
        for file in ('training.pt', 'test.pt', 'train.pt'):
            torch.save(content, folder / file)
        if content is not ARRAYS[arrays]:
            assert labels(open_dataset(settings, 'train')[0]) == NUMBERS.tolist()
    with pytest.raises(UserError, match='the files are damaged, get them anew') as told:
        open_dataset(settings, 'train')
    assert '\n' not in str(told.value)


def write_folder(root, *classes):
    for index, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        Image.new('RGB', (8, 8), (40 * index, 0, 0)).save(root / name / 'image.png')


def labels(dataset):
    return [dataset[index][1] for index in range(len(dataset))]


def test_validation_has_the_labels_of_training(tmp_path):
    write_folder(tmp_path / 'train', 'a2', 'a10', 'b')
    write_folder(tmp_path / 'val', 'b', 'a10')
    settings = DataConfig(max_bad_images=0.0, data_dir=str(tmp_path))
    train, names = open_dataset(settings, 'train')
    assert names == ['a2', 'a10', 'b'] and labels(train) == [0, 1, 2]  # natural order
    validation, known = open_dataset(settings, 'validation', class_names=names)
    assert labels(validation) == [1, 2] and known == names


def test_class_map_fixes_the_order(tmp_path):
    write_folder(tmp_path / 'train', 'a', 'b')
    (tmp_path / 'classes.txt').write_text('c\nb\na\n')
    settings = DataConfig(max_bad_images=0.0, data_dir=str(tmp_path), class_map=str(tmp_path / 'classes.txt'))
    dataset, names = open_dataset(settings, 'train')
    assert names == ['c', 'b', 'a'] and labels(dataset) == [2, 1]
    assert data.class_count(settings, None, names) == 3
    settings.class_map = str(tmp_path / 'nowhere.txt')
    with pytest.raises(UserError, match='nowhere'):
        open_dataset(settings, 'train')


def test_a_folder_of_classes_alone_is_validated_whole(tmp_path):
    write_folder(tmp_path, 'a', 'b')
    dataset, _ = open_dataset(DataConfig(max_bad_images=0.0, data_dir=str(tmp_path)), 'validation')
    assert len(dataset) == 2
    with pytest.raises(UserError, match='no folder train'):
        open_dataset(DataConfig(max_bad_images=0.0, data_dir=str(tmp_path)), 'train')


def test_grey_images_load_in_one_channel(tmp_path):
    write_folder(tmp_path / 'train', 'a')
    dataset, _ = open_dataset(DataConfig(max_bad_images=0.0, data_dir=str(tmp_path)), 'train', in_chans=1)
    assert dataset[0][0].mode == 'L'


@pytest.mark.parametrize(
    'given, size, mean',
    [
        (dict(), (3, 32, 32), 3),
        (dict(in_chans=1), (1, 32, 32), 1),
        (dict(in_chans=1, mean=[0.3]), (1, 32, 32), 1),
        (dict(img_size=64), (3, 64, 64), 3),
        (dict(input_size=[3, 48, 64]), (3, 48, 64), 3),
    ],
)
def test_input_settings_follow_the_model(given, size, mean):
    kwargs = dict(img_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=2, in_chans=given.get('in_chans', 3))
    model = timm.create_model('vit_tiny_patch16_224', **kwargs)
    config = data.resolve_input(ModelConfig(**given), model)
    assert tuple(config['input_size']) == size and len(config['mean']) == len(config['std']) == mean


def test_images_that_no_file_may_have():
    model = timm.create_model('vit_tiny_patch16_224', img_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=2)
    with pytest.raises(UserError, match=r'images of 30000 × 30000 are larger than any that is read'):
        data.resolve_input(ModelConfig(img_size=30000), model)


class Telling(torch.utils.data.Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        for kind in (ConnectionResetError, EOFError, KeyError):
            sys.excepthook(kind, kind(f'of {kind.__name__}'), None)  # as multiprocessing does in a thread of a worker
        return index


def test_a_worker_says_nothing_of_a_main_process_that_ends(capfd):
    list(torch.utils.data.DataLoader(Telling(), num_workers=1, worker_init_fn=start_worker))
    err = capfd.readouterr().err
    assert 'of KeyError' in err and 'of ConnectionResetError' not in err and 'of EOFError' not in err


def test_labels_of_a_data_set_are_those_that_were_learnt(caplog):
    data.check_labels(['b', 'a', 'c'], ['b', 'a'], 'the checkpoint')
    data.check_labels(['crane', 'owl', 'crane'], ['crane', 'owl', 'crane'], 'the checkpoint')
    assert not caplog.messages
    with pytest.raises(UserError, match='a is class 0 of this data, and class 1 of the checkpoint; give the data'):
        data.check_labels(['b', 'a', 'c'], ['a', 'b', 'c'], 'the checkpoint')
    data.check_labels(['n01440764', 'n01443537'], ['tench', 'goldfish'], 'the checkpoint')
    (line,) = caplog.messages
    assert line.startswith('warning: class 0 of this data is called tench, and n01440764 in the checkpoint')


def test_labels_that_only_one_side_names_are_told(caplog):
    imagenet = ImageNetInfo('imagenet-1k').label_names()
    for learnt, here in ((None, None), (imagenet, None), (None, imagenet)):
        data.check_labels(learnt, here, 'the checkpoint')
    data.check_labels(None, ['b', 'a'], 'the checkpoint', class_map='map.txt')
    assert not caplog.messages
    data.check_labels(['a', 'b'], None, 'the checkpoint')
    data.check_labels(None, imagenet[::-1], 'the checkpoint')
    line = 'warning: nothing says what the classes of {} are called; labels are taken as numbers, 0 for {}'
    assert caplog.messages == [line.format('this data', 'a'), line.format('the checkpoint', imagenet[-1])]


def test_a_split_that_lacks_a_class_shifts_no_label(tmp_path):
    write_folder(tmp_path / 'train', 'a', 'b', 'c')
    write_folder(tmp_path / 'validation', 'a', 'c')
    config = DataConfig(max_bad_images=0.0, dataset='torch/image_folder', data_dir=str(tmp_path))
    mapped = replace(config, class_map='map.txt')
    with pytest.raises(UserError, match=r'--class-map map\.txt: torch/image_folder has an order of its own; leave the'):
        data.open_training_sets(mapped, in_chans=3, batch_size=2, seed=0)
    with pytest.raises(UserError, match='c is class 1 of this data, and class 2 of the training split; give'):
        data.open_training_sets(config, in_chans=3, batch_size=2, seed=0)


@pytest.mark.parametrize('kind', ['', 'order/'])
def test_splits_of_inaturalist_are_compared_too(kind, tmp_path, monkeypatch, caplog):
    """And its files have an order of their own, not that of the disk, which is another on each machine."""
    names = ['00000_A_A_A_a_A_A_A', '00001_A_A_A_b_A_A_A']
    write_folder(tmp_path / '2021_train', *names)
    write_folder(tmp_path / '2021_valid', *names)
    for number in range(9):
        Image.new('RGB', (8, 8)).save(tmp_path / '2021_train' / names[0] / f'{number}.png')
    listed = os.listdir
    monkeypatch.setattr(os, 'listdir', lambda place: sorted(listed(place), reverse=True))
    config = DataConfig(
        max_bad_images=0.0, dataset='torch/inaturalist', data_dir=str(tmp_path), train_split=f'{kind}train'
    )
    config.val_split = f'{kind}validation'
    train, _, found = data.open_training_sets(config, in_chans=3, batch_size=2, seed=0)
    assert found == (['a', 'b'] if kind else names) and not caplog.messages
    assert train.dataset.index == sorted(train.dataset.index)
    monkeypatch.setattr(os, 'listdir', listed)
    for old, new in zip(names, ['00001_A_A_A_a_A_A_A', '00000_A_A_A_b_A_A_A'], strict=True):
        (tmp_path / '2021_valid' / old).rename(tmp_path / '2021_valid' / new)
    with pytest.raises(UserError, match='b is class 0 of this data') if kind else contextlib.nullcontext():
        data.open_training_sets(config, in_chans=3, batch_size=2, seed=0)
    assert kind or 'warning: class 0 of this data is called 00000_A_A_A_b_A_A_A' in caplog.text


def test_the_order_of_names_follows_from_them_alone(tmp_path):
    """As timm's, where that has one. Names that it takes for equal, or cannot read, have a place too."""
    names = ['2', '10', 'a1b', 'a2', 'b', 'img-9', 'img-10', 'Z', '0', '7x12', '7x3', 'é1', 'x1.5']
    assert sorted(names, key=natural_key) == sorted(names, key=timm_key)
    odd = ['a', 'A', '1', '01', '²', '1²3', '0' * 5000 + '1', '9' * 5000]
    for _ in range(10):
        random.shuffle(odd)
        assert sorted(odd, key=natural_key) == ['0' * 5000 + '1', '01', '1', '1²3', '9' * 5000, 'A', 'a', '²']
    write_folder(tmp_path, '1', '01', 'a', 'A', '²')
    assert ClassFolders(tmp_path).class_to_idx == {'01': 0, '1': 1, 'A': 2, 'a': 3, '²': 4}
    (tmp_path / '1' / '1²3.png').write_bytes(next((tmp_path / '1').iterdir()).read_bytes())
    assert len(Pictures(tmp_path).names) == len(ClassFolders(tmp_path).samples)
