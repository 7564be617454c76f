"""Tables of Hugging Face with more columns than an image and its label."""

import os
import socket

import faults
import pytest
from PIL import EpsImagePlugin

from evavit.errors import UserError
from evavit.training import data
from evavit.training.config import parse_settings

datasets = pytest.importorskip('datasets')
pyarrow = pytest.importorskip('pyarrow')
parquet = pytest.importorskip('pyarrow.parquet')

PICTURE = faults.encode(faults.picture(side=16), 'PNG')
IMAGE, CLASS = datasets.Image(), datasets.ClassLabel(names=['apple', 'pear'])
COSTLY = {
    'drawing': dict(bytes=faults.postscript(), path=None),
    'damaged': dict(bytes=b'no image', path=None),
    'hub': dict(bytes=None, path='hf://datasets/owner/name/x.png'),
    'web': dict(bytes=None, path='http://host/x.png'),
}
FEATURES = {
    'image': (IMAGE, lambda record: record),
    'list': (datasets.Sequence(IMAGE), lambda record: [record]),
    'struct': ({'deep': {'image': IMAGE}}, lambda record: {'deep': {'image': record}}),
    'audio': (datasets.Audio(), lambda record: record),
}
if hasattr(datasets, 'Video'):
    FEATURES['video'] = (datasets.Video(), lambda record: record)


def write_table(folder, **columns):
    """columns: name → (feature, value of each row), beside image and label, which they may replace."""
    columns = {'image': (IMAGE, dict(bytes=PICTURE, path='a.png')), 'label': (CLASS, 1), **columns}
    features = datasets.Features({name: feature for name, (feature, _) in columns.items()})
    row = {name: value for name, (_, value) in columns.items()}
    table = pyarrow.Table.from_pylist([row] * 8, schema=features.arrow_schema)  # `datasets` itself would read the files
    folder.mkdir()
    for split in ('train', 'validation'):
        parquet.write_table(table, str(folder / f'{split}-00000-of-00001.parquet'))


def opened(kind, folder, cache):
    place = ['--dataset', f'{kind}/{folder}', '--data-dir', str(cache), '--num-classes', '2']
    settings, _ = parse_settings('train', [*place, '--max-bad-images', '1'])
    return data.open_dataset(settings.data, 'train', is_training=True, batch_size=4, num_samples=8)[0]


def read(kind, dataset):
    return [image.size for image, _ in (iter(dataset) if kind == 'hfids' else map(dataset.__getitem__, range(8)))]


@pytest.mark.parametrize('feature', FEATURES)
@pytest.mark.parametrize('kind', ['hfds', 'hfids'])
def test_no_other_column_is_decoded(kind, feature, tmp_path, monkeypatch):
    """Nor starts Ghostscript, nor is fetched: `datasets` would decode all that it knows in a record that is read."""
    (tmp_path / 'bin').mkdir()
    (tmp_path / 'bin' / 'gs').write_text(f'#!/bin/sh\ntouch {tmp_path}/started\n')
    (tmp_path / 'bin' / 'gs').chmod(0o755)
    monkeypatch.setenv('PATH', f'{tmp_path}/bin:{os.environ["PATH"]}')
    monkeypatch.setattr(EpsImagePlugin, 'gs_binary', None)
    asked = []
    monkeypatch.setattr(socket, 'getaddrinfo', lambda host, *_, **__: asked.append(host) or 1 / 0)
    of, form = FEATURES[feature]
    write_table(tmp_path / 'table', **{name: (of, form(record)) for name, record in COSTLY.items()})
    dataset = opened(kind, tmp_path / 'table', tmp_path / 'cache')
    assert read(kind, dataset) == [(16, 16)] * 8 and dataset.bad.count == 0
    assert not asked and not (tmp_path / 'started').exists()


@pytest.mark.parametrize('feature', ['image', 'list'])
@pytest.mark.parametrize('kind', ['hfds', 'hfids'])
def test_a_label_that_is_an_image_is_a_line(kind, feature, tmp_path, monkeypatch):
    monkeypatch.setattr(EpsImagePlugin, 'Ghostscript', lambda *_: pytest.fail('it was decoded'))
    of, form = FEATURES[feature]
    write_table(tmp_path / 'table', label=(of, form(COSTLY['drawing'])))
    with pytest.raises(UserError, match=r'its column label holds .*, not a number of a class') as error:
        read(kind, opened(kind, tmp_path / 'table', tmp_path / 'cache'))
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('column', ['image', 'label'])
@pytest.mark.parametrize('kind', ['hfds', 'hfids'])
def test_a_table_without_a_column_that_is_read_is_a_line(kind, column, tmp_path):
    """timm's reader of hfds adds a column of images, with nothing in it."""
    write_table(tmp_path / 'table', kind=(CLASS, 1))
    for path in (tmp_path / 'table').iterdir():
        parquet.write_table(parquet.read_table(path).drop_columns([column]), str(path))
    with pytest.raises(UserError, match=rf"it needs the columns image and label: .*'{column}'") as error:
        read(kind, opened(kind, tmp_path / 'table', tmp_path / 'cache'))
    there = ({'image', 'label'} - {column}).pop()
    assert '\n' not in str(error.value) and there in str(error.value).partition('olumns in the dataset')[2]


@pytest.mark.parametrize('kind', ['hfds', 'hfids'])
def test_a_column_of_lists_of_images_is_named(kind, tmp_path):
    cast = datasets.Dataset.cast_column
    write_table(tmp_path / 'table', image=(datasets.Sequence(IMAGE), [dict(bytes=PICTURE, path=None)] * 2))
    with pytest.raises(UserError, match=r'its column image holds .*Image.*, not an image in each record') as error:
        read(kind, opened(kind, tmp_path / 'table', tmp_path / 'cache'))
    assert '\n' not in str(error.value) and datasets.Dataset.cast_column is cast


SWAPPED = datasets.ClassLabel(names=['pear', 'apple'])
ABOUT = """---
dataset_info:
  features:
  - name: image
    dtype: image
  - name: label
    dtype:
      class_label:
        names: {'0': apple, '1': pear}
---
"""
PARTS = """---
configs:
- {config_name: default, data_files: [{split: train, path: a/train*}, {split: validation, path: a/val*}]}
- {config_name: other, data_files: [{split: train, path: b/train*}, {split: validation, path: b/val*}]}
---
"""


def write_part(path, label):
    """A table with this feature for its labels, in the format that the name says."""
    features = datasets.Features(image=IMAGE, label=label)
    row = dict(image=dict(bytes=PICTURE, path='a.png'), label=1)
    table = pyarrow.Table.from_pylist([row] * 8, schema=features.arrow_schema)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == '.arrow':
        kind = pyarrow.ipc.new_stream if path.stem == 'train' else pyarrow.ipc.new_file
        with kind(str(path), table.schema) as file:
            file.write_table(table)
    else:
        parquet.write_table(table, str(path))


@pytest.mark.parametrize('kind', ['hfds', 'hfids'])
@pytest.mark.parametrize(
    'names',
    [
        ('train/0000.parquet', 'validation/0000.parquet'),
        ('train.arrow', 'validation.arrow'),
        ('README.md', 'train/0000.parquet', 'validation/0000.parquet'),
    ],
)
def test_no_split_gives_classes_other_labels(kind, names, tmp_path):
    """In whatever folders and files they lie: `datasets` takes the names of the first one for all."""
    *about, train, other = names
    for name in about:
        (tmp_path / 'table').mkdir()
        (tmp_path / 'table' / name).write_text(ABOUT)
    write_part(tmp_path / 'table' / train, SWAPPED if about else CLASS)
    write_part(tmp_path / 'table' / other, SWAPPED)
    with pytest.raises(UserError, match=r'its classes \(label\) are .*; encode all splits with') as error:
        opened(kind, tmp_path / 'table', tmp_path / 'cache')
    assert '\n' not in str(error.value)
    for name in (train, other):
        write_part(tmp_path / 'table' / name, CLASS)
    assert read(kind, opened(kind, tmp_path / 'table', tmp_path / 'again')) == [(16, 16)] * 8


@pytest.mark.parametrize('kind', ['hfds', 'hfids'])
def test_tables_elsewhere_that_a_readme_names_are_compared_too(kind, tmp_path):
    (tmp_path / 'table').mkdir()
    (tmp_path / 'table' / 'README.md').write_text(PARTS.replace('path: ', 'path: ../other/'))
    for split, label in (('train', CLASS), ('val', SWAPPED)):
        write_part(tmp_path / 'other' / 'a' / f'{split}.parquet', label)
    with pytest.raises(UserError, match=r'its classes \(label\) are .*; encode all splits with'):
        opened(kind, tmp_path / 'table', tmp_path / 'cache')


NUMBER = datasets.Value('int64')


@pytest.mark.parametrize('label, other, about', [(NUMBER, CLASS, ''), (CLASS, NUMBER, ''), (CLASS, CLASS, 'int64')])
@pytest.mark.parametrize('kind', ['hfds', 'hfids'])
def test_names_that_only_some_files_say(kind, label, other, about, tmp_path):
    """`datasets` drops them, or takes them for all, as an earlier reading in its cache does."""
    write_part(tmp_path / 'table' / 'train.parquet', label)
    write_part(tmp_path / 'table' / 'validation.parquet', other)
    if about:
        text = ABOUT.partition('    dtype:\n      class')[0] + f'    dtype: {about}\n---\n'
        (tmp_path / 'table' / 'README.md').write_text(text)
    datasets.load_dataset(str(tmp_path / 'table'), cache_dir=str(tmp_path / 'cache'))
    without = 'README.md' if about else 'train.parquet' if label is NUMBER else 'validation.parquet'
    with pytest.raises(UserError, match=rf'{without}: its classes .* are without names, those of .*apple') as error:
        opened(kind, tmp_path / 'table', tmp_path / 'cache')
    assert '\n' not in str(error.value) and 'encode all splits with the same names' in str(error.value)


@pytest.mark.parametrize('kind', ['hfds', 'hfids'])
def test_a_readme_names_the_classes_of_files_that_do_not(kind, tmp_path):
    for split, label in (('train', NUMBER), ('validation', CLASS)):
        write_part(tmp_path / 'table' / f'{split}.parquet', label)
    (tmp_path / 'table' / 'README.md').write_text(ABOUT)
    assert read(kind, opened(kind, tmp_path / 'table', tmp_path / 'cache')) == [(16, 16)] * 8


@pytest.mark.parametrize('kind', ['hfds', 'hfids'])
def test_another_part_of_a_folder_may_have_other_classes(kind, tmp_path):
    for part, label in (('a', CLASS), ('b', SWAPPED)):
        for split in ('train', 'val'):
            write_part(tmp_path / 'table' / part / f'{split}.parquet', label)
    (tmp_path / 'table' / 'README.md').write_text(PARTS)
    assert read(kind, opened(kind, tmp_path / 'table', tmp_path / 'cache')) == [(16, 16)] * 8
