"""Hugging Face's data sets, and whether the network may be asked for them: only where the user has said so.

`--dataset-download` says so, and an address: `hfids/hf://datasets/OWNER/NAME` streams from the Hub.
"""

import dataclasses
import json
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, Optional, Set

import yaml

from evavit.errors import LocalError, UserError, first_line
from evavit.files import open_regular
from evavit.training.config import DataConfig

ADDRESS = 'hf://datasets/'


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
    _check_classes(Path(name))
    if may_download(config):
        yield
        return
    _check_metadata(Path(name))
    switches = [datasets.config, huggingface_hub.constants]
    before = [place.HF_HUB_OFFLINE for place in switches]
    try:
        for place in switches:
            place.HF_HUB_OFFLINE = True
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
    by players of audio and video, and fetched first where a record gives an address.
    """
    import datasets

    try:
        table = table.select_columns([image, label])
    except ValueError as error:
        raise LocalError(f'it needs the columns {image} and {label}: {first_line(error)[:300]}') from error
    kind = (table.features or {}).get(label)
    if not isinstance(kind, (datasets.ClassLabel, datasets.Value, type(None))):
        raise LocalError(f'its column {label} holds {str(kind)[:100]}, not a number of a class; give the classes in it')
    return table.cast_column(image, datasets.Image(decode=False))


def _check_classes(folder: Path) -> None:
    """UserError where Parquet files that lie together call their classes otherwise: `datasets` takes the names of one
    for all, and a split that was encoded by itself would have other labels."""
    import pyarrow.parquet

    first: Dict[Any, Any] = {}
    for path in sorted(folder.rglob('*.parquet')) if folder.is_dir() else ():
        try:
            with open_regular(path) as file:
                about = json.loads((pyarrow.parquet.read_schema(file).metadata or {}).get(b'huggingface', b'{}'))
            features = about.get('info', {}).get('features', {})
            names = {key: feature['names'] for key, feature in features.items() if 'names' in (feature or ())}
        except Exception:  # `datasets` says what it is
            continue
        for key, own in names.items():
            there, other = first.setdefault((path.parent, key), (path, own))
            if own != other:
                raise UserError(
                    f'{path}: its classes ({key}) are {str(own)[:100]}, those of {there} {str(other)[:100]}; encode '
                    f'all splits with the same names'
                )


def _check_metadata(folder: Path) -> None:
    """A local folder's README may name files that lie elsewhere, some of which are asked for in spite of all. It is
    read as `datasets` reads it."""
    from huggingface_hub import DatasetCard

    for path in (folder / 'README.md', folder / '.huggingface.yaml'):
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
