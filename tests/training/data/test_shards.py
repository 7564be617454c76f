"""How several processes, and the loading processes of each, share a validation split that is a stream."""

from itertools import product
from types import SimpleNamespace

import pytest
import torch
from runs import write_images, write_shards
from training.data import fake_tfds

from evavit.errors import UserError
from evavit.training import data
from evavit.training.config import parse_settings
from evavit.training.data.shards import check_shards

SIZES = {'uneven': (7, 4, 1, 2), 'few': (13,)}


@pytest.fixture
def wds(tmp_path):
    pytest.importorskip('webdataset')

    def make(sizes):
        write_images(tmp_path / 'images', dict(a=sum(sizes)), side=8)
        images = ((path, label) for label, path in enumerate((tmp_path / 'images').rglob('*.png')))
        split = write_shards(tmp_path / 'shards', images, sizes)
        return ['--dataset', 'wds/x', '--data-dir', tmp_path / 'shards'], split

    return make


@pytest.fixture
def hfids(tmp_path):
    datasets = pytest.importorskip('datasets')

    def make(sizes):
        write_images(tmp_path / 'images', dict(a=1), side=8)
        picture = dict(bytes=(tmp_path / 'images' / 'a' / '0.png').read_bytes(), path=None)
        features = datasets.Features(image=datasets.Image(), label=datasets.Value('int64'))
        rows = datasets.Dataset.from_dict(
            dict(image=[picture] * sum(sizes), label=[*range(sum(sizes))]), features=features
        )
        first = 0
        for number, size in enumerate(sizes):
            part = rows.select(range(first, first := first + size))
            part.to_parquet(str(tmp_path / 'table' / f'validation-{number:05d}-of-{len(sizes):05d}.parquet'))
        return ['--dataset', f'hfids/{tmp_path / "table"}', '--data-dir', tmp_path / 'cache'], 'validation'

    (tmp_path / 'table').mkdir()
    return make


@pytest.fixture
def tfds(tmp_path, monkeypatch):
    fake_tfds.install(monkeypatch)

    def make(sizes):
        write_images(tmp_path / 'validation', {f'{number:02d}': 1 for number in range(sum(sizes))}, side=8)
        return ['--dataset', 'tfds/x', '--data-dir', tmp_path], 'validation'

    return make


@pytest.mark.parametrize('sizes', SIZES)
@pytest.mark.parametrize('kind', ['wds', 'hfids', 'tfds'])
def test_each_image_is_judged_once(kind, sizes, request):
    """Of shards of several sizes, and where a process or a loading process has none."""
    place, split = request.getfixturevalue(kind)(SIZES[sizes])
    settings, _ = parse_settings('validate', [*map(str, place), '--max-bad-images', '1'])
    number = sum(SIZES[sizes])
    for processes, workers in product((1, 2, 3), (2,) if kind == 'tfds' else (0, 2)):
        found = []
        for rank in range(processes):
            about = dict(num_samples=None if kind == 'tfds' else number)
            dataset, _ = data.open_dataset(settings.data, split, batch_size=4, **about)
            dataset.reader.dist_rank, dataset.reader.dist_num_replicas = rank, processes
            dataset.set_loader_cfg(num_workers=workers)
            loader = torch.utils.data.DataLoader(dataset, num_workers=workers, batch_size=4, collate_fn=list)
            first, again = ([label for batch in loader for _, label in batch] for _ in range(2))
            assert sorted(again) == sorted(first)
            found += first
        assert sorted(found) == list(range(number)), (processes, workers)


def test_a_server_names_no_shard_of_this_machine(tmp_path):
    """Its list of shards may have any name: an absolute one would be opened here."""
    names = SimpleNamespace(filenames=['train-0.tar', str(tmp_path / 'mine.tar')])
    with pytest.raises(UserError, match=r'http://host/x: its shard .*mine\.tar. is a file of this machine'):
        check_shards(SimpleNamespace(root='http://host/x', split_info=names))
