"""Streams on the device path: what the decoder alone finds broken is counted, named and replaced image by image."""

import io
import tarfile

import pytest
import torch
from training.data.device.pictures import config, jpeg, photographs, undecodable

from evavit.errors import LocalError, UserError
from evavit.training import data
from evavit.training.data.images import UNREADABLE, CheckedStream
from evavit.training.distributed import Process
from evavit.training.sections import AugmentConfig, BatchConfig, DataConfig, MachineConfig

CPU = torch.device('cpu')


def pack(path, contents):
    """A shard of images, whose labels are 0 and 1 in turn."""
    with tarfile.open(path, 'w') as archive:
        for number, content in enumerate(contents):
            for name, part in ((f'{number}.jpg', content), (f'{number}.cls', str(number % 2).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(part)
                archive.addfile(member, io.BytesIO(part))


@pytest.fixture
def shards(tmp_path):
    """12 images to train on and 12 to validate on, every third of which has a header that is in order and no more."""
    pytest.importorskip('webdataset')
    images = enumerate(photographs(80, 60, 12))
    contents = [jpeg(image) if number % 3 else undecodable(image) for number, image in images]
    for split in ('train', 'validation'):
        pack(tmp_path / f'set-{split}-0000.tar', contents)
    return DataConfig(dataset='wds/set', data_dir=str(tmp_path), max_bad_images=1.0)


def training(shards, where, workers, batch_size=6):
    split = 'set-train-0000.tar|12'
    dataset, _ = data.open_dataset(shards, split, batch_size=batch_size, is_training=True)
    loading = data.train_loader(
        dataset,
        AugmentConfig(no_aug=True),
        config(),
        batch_size=batch_size,
        machine=MachineConfig(workers=workers, augment_device=where),
        seed=3,
        process=Process(CPU, 0, 0, 1),
    )
    rest = dict(seed=3, process=Process(CPU, 0, 0, 1), epoch=0)
    return list(data.epoch_batches(loading, BatchConfig(batch_size=batch_size), **rest)), dataset.bad


def names(bad):
    bad.news()
    return sorted(line.partition('\n')[0].rpartition('/')[2] for line in bad.found.values())


@pytest.mark.parametrize('workers', [0, 1])
def test_each_of_them_counts_in_training(shards, workers):
    """As in the CPU path, and no image is trained on that nobody has seen: one of the batch takes its place."""
    made, bad = training(shards, 'any', workers)
    _, expected = training(shards, 'cpu', workers)
    assert bad.count == expected.count == 4
    assert names(bad) == names(expected) == sorted(f'set-train-0000.tar: {number}' for number in (0, 3, 6, 9))
    for images, target in made:
        assert images.flatten(1).std(1).min() > 0.1, 'a black image'
        for image, label in zip(images, target, strict=True):
            same = (images == image).flatten(1).all(1)
            assert (target[same] == label).all()


def test_a_batch_of_nothing_else_stops_the_run(shards, tmp_path):
    pack(tmp_path / 'set-train-0000.tar', map(undecodable, photographs(80, 60, 12)))
    with pytest.raises(LocalError, match=r'none of the 6 images of a batch can be read, .*check the data set'):
        training(shards, 'any', 0)


def test_each_of_them_counts_in_validation(shards):
    found = []
    for where in ('any', 'cpu'):
        dataset, _ = data.open_dataset(shards, 'set-validation-0000.tar|12', batch_size=6)
        machine = MachineConfig(workers=1, augment_device=where)
        batches = list(data.eval_loader(dataset, config(), batch_size=6, machine=machine, device=CPU))
        target = torch.cat([labels for _, labels in batches])
        found.append((names(dataset.bad), (target == UNREADABLE).sum().item(), dataset.bad.count))
    assert found[0] == found[1] and found[0][1:] == (4, 4)


class Reader:
    """A stream that gives its images no names, as tfds and many tables of the Hub do, or all of them one."""

    is_training, num_samples = False, 6

    def __init__(self, records):
        self.records = records

    def __iter__(self):
        return iter(zip(self.records, range(len(self.records)), strict=True))


@pytest.mark.parametrize('jpeg_as', ['image', 'file'])
@pytest.mark.parametrize(
    'record', [bytes, lambda content: dict(bytes=content, path='0.jpg'), lambda _: dict(bytes=None)]
)
def test_images_without_names_count_one_by_one(record, jpeg_as):
    stream = CheckedStream(Reader([record(undecodable(image)) for image in photographs(80, 60, 6)]), 'RGB', 1.0)
    stream.jpeg_as = jpeg_as
    for _ in range(2):  # an image that comes again counts once
        for file, label in stream:
            if jpeg_as == 'file' and label != UNREADABLE:
                assert stream.replace(file, -1, label)[1] == UNREADABLE
    assert stream.bad.count == 6
    with pytest.raises(UserError, match='--cache-device needs a data set with an index'):
        data.cache_size(stream)  # in a dry run


class Table(Reader):
    """One of the Hub, whose records timm's reader passes through twice."""

    input_key, target_key, ds = 'image', 'label', None

    def _lazy_init(self):
        datasets = pytest.importorskip('datasets')
        kinds = datasets.Features(image=datasets.Image(), label=datasets.Value('int64'))
        content = dict(image=self.records, label=[0] * len(self.records))
        self.ds = datasets.Dataset.from_dict(content, features=kinds).to_iterable_dataset()

    def __iter__(self):
        for _ in range(2):
            yield from ((record['image'], record['label']) for record in self.ds)


@pytest.mark.parametrize('jpeg_as', ['image', 'file'])
@pytest.mark.parametrize('path', ['0.jpg', None])
@pytest.mark.parametrize('content', [b'<html>403 Forbidden', b'', undecodable(photographs(80, 60, 1)[0])])
def test_records_of_a_table_that_are_alike_count_one_by_one(content, path, jpeg_as):
    table = Table([dict(bytes=content, path=path)] * 6)
    table.is_training = True
    stream = CheckedStream(table, 'RGB', 1.0)
    stream.jpeg_as = jpeg_as
    for file, label in stream:
        stream.replace(file, -1, label)
    assert stream.bad.count == 6
