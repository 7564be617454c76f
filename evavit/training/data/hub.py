"""Hugging Face's data sets, and whether the network may be asked for them: only where the user has said so.

`--dataset-download` says so, and an address: `hfids/hf://datasets/OWNER/NAME` streams from the Hub.
"""

import dataclasses
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Iterator, Optional, Set

import yaml

from evavit.errors import LocalError, UserError, first_line
from evavit.files import open_regular
from evavit.training.config import DataConfig

ADDRESS = 'hf://datasets/'
TABLES = ('.parquet', '.geoparquet', '.gpq', '.arrow')  # files that can say how they call their classes
ABOUT = ('README.md', '.huggingface.yaml')  # what may say of which files a folder's data set is


def may_download(config: DataConfig) -> bool:
    return config.dataset_download or ADDRESS in config.dataset


def without_download(config: DataConfig) -> DataConfig:
    """The same data set, as far as it is here."""
    return dataclasses.replace(config, dataset=config.dataset.replace(ADDRESS, ''), dataset_download=False)


@contextmanager
def network(config: DataConfig) -> Iterator[None]:
    """Keep `datasets` from the Hub while the context lasts, unless the settings allow it.

    What an earlier run has downloaded into --data-dir is found without it. Its own switch is an environment variable,
    which it has read by now.
    """
    import datasets
    import huggingface_hub

    name = config.dataset.partition('/')[2]
    if may_download(config):
        _check_classes(Path(name))
        yield
        return
    _check_metadata(Path(name))
    switches = [datasets.config, huggingface_hub.constants]
    before = [place.HF_HUB_OFFLINE for place in switches]
    try:
        for place in switches:
            place.HF_HUB_OFFLINE = True
        _check_classes(Path(name))
        yield
    except OSError as error:
        if Path(name).exists():
            raise
        raise UserError(
            f'{name} is neither a folder nor downloaded yet: let it be fetched with --dataset-download, or have hfids '
            f'stream it with --dataset hfids/{ADDRESS}{name}'
        ) from error
    finally:
        for place, value in zip(switches, before, strict=True):
            place.HF_HUB_OFFLINE = value


def undecoded(table: Any, image: str, label: str) -> Any:
    """A table of `datasets`, or a stream, with these two columns alone, the image as {bytes, path}.

    Whatever else a record holds would be decoded with it: by all of Pillow's formats, of which one starts Ghostscript,
    by players of audio and video, and fetched first where a record gives an address. LocalError where it has not these
    columns, or they hold something else.
    """
    import datasets

    try:
        table = table.select_columns([image, label])
    except ValueError as error:
        raise LocalError(f'it needs the columns {image} and {label}: {first_line(error)[:300]}') from error
    kinds = table.features or {}
    if not isinstance(kinds.get(label), (datasets.ClassLabel, datasets.Value, type(None))):
        raise LocalError(
            f'its column {label} holds {str(kinds[label])[:100]}, not a number of a class; give the classes in it'
        )
    try:
        if image in kinds and _is_list(kinds[image]):
            raise TypeError('a list')
        return table.cast_column(image, datasets.Image(decode=False))
    except Exception as error:  # of pyarrow and numpy too
        raise LocalError(
            f'its column {image} holds {str(kinds.get(image))[:100]}, not an image in each record '
            f'({first_line(error)[:200]})'
        ) from error


@contextmanager
def cast_by_us(label: str) -> Iterator[None]:
    """While timm's reader opens a table, it gets that of `undecoded`: its own cast would add a column of images to a
    table that has none, with nothing in it."""
    import datasets

    cast = datasets.Dataset.cast_column

    def checked(table: Any, image: str, *_: Any) -> Any:
        datasets.Dataset.cast_column = cast
        return undecoded(table, image, label)

    datasets.Dataset.cast_column = checked
    try:
        yield
    finally:
        datasets.Dataset.cast_column = cast


def _is_list(kind: Any) -> bool:
    """Whether a column holds lists of something else than numbers, which `datasets` takes for pixels."""
    import datasets

    inner = kind
    while not isinstance(inner, datasets.Value):
        deeper = inner[0] if isinstance(inner, list) else getattr(inner, 'feature', None)
        if deeper is None:
            return inner is not kind
        inner = deeper
    return False


def _check_classes(folder: Path) -> None:
    """UserError where files of a local table call its classes otherwise, or one names them and another does not:
    `datasets` takes the names of README.md or of the first file for all, or none, and a split that was encoded by
    itself would have other labels. Files without names are those that README.md names."""
    import datasets

    about = any((folder / name).is_file() for name in ABOUT)  # which may name tables elsewhere
    if not about and not any(path.suffix in TABLES for path in (folder.rglob('*') if folder.is_dir() else ())):
        return
    with TemporaryDirectory() as empty:  # in a cache are names of a file that was read before, as if README.md had them
        builder = datasets.load_dataset_builder(str(folder), cache_dir=empty)  # knows which of the files are read
    found = [('README.md', builder.info.features or {})]
    for path in (path for split in (builder.config.data_files or {}).values() for path in split):
        if Path(path).suffix in TABLES:
            with suppress(Exception):  # `datasets` says what it is
                found.append((path, datasets.Features.from_arrow_schema(_schema(Path(path)))))
    classes = [(path, getattr(features['label'], 'names', None)) for path, features in found if 'label' in features]
    first, those = next((named for named in classes if named[1]), ('', None))
    for path, names in classes:
        if names != those and (names or first != 'README.md'):
            raise UserError(
                f'{path}: its classes (label) are {str(names or "without names")[:100]}, those of {first} '
                f'{str(those)[:100]}; encode all splits with the same names'
            )


def _schema(path: Path) -> Any:
    import pyarrow.ipc
    import pyarrow.parquet

    with open_regular(path) as file:
        if path.suffix != '.arrow':
            return pyarrow.parquet.read_schema(file)
        with suppress(OSError, pyarrow.ArrowInvalid):
            return pyarrow.ipc.open_stream(file).schema
        file.seek(0)
        return pyarrow.ipc.open_file(file).schema


def _check_metadata(folder: Path) -> None:
    """A local folder's README may name files that lie elsewhere, some of which are asked for in spite of all. It is
    read as `datasets` reads it."""
    from huggingface_hub import DatasetCard

    for path in map(folder.joinpath, ABOUT):
        if not path.is_file():
            continue
        try:
            card = path.name == 'README.md'
            about = DatasetCard.load(path).data.to_dict() if card else yaml.safe_load(path.read_text(encoding='utf-8'))
        except Exception as error:  # of both libraries
            raise UserError(f'{path}: cannot be read ({first_line(error)[:200]})') from error
        found = _address(about.get('configs') if isinstance(about, dict) else None, set())
        if found:
            raise UserError(f'{path} names {found[:100]}: allow that it is fetched with --dataset-download')


def _address(value: object, seen: Set[int]) -> Optional[str]:
    """The first text with an address in what YAML holds, in which a part may stand in many places."""
    if isinstance(value, str):
        return value if '://' in value else None
    if id(value) in seen or not isinstance(value, (list, dict)):
        return None
    seen.add(id(value))
    parts = [*value, *value.values()] if isinstance(value, dict) else value
    return next((found for part in parts if (found := _address(part, seen))), None)
