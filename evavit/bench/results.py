"""Results files: the columns of benchmark.py's rows, what a row says of its origin, reading and storing."""

import contextlib
import csv
import datetime
import errno
import io
import itertools
import json
import logging
import math
import os
import platform
import subprocess
import tempfile
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, Callable, Dict, Iterator, List, Mapping, Sequence, Tuple

import timm
import torch

from evavit.errors import UserError, reason_of
from evavit.files import open_regular, place_after, replacing
from evavit.version import __version__

__all__ = [
    'COLUMNS',
    'HARMLESS',
    'KEY',
    'ORIGIN',
    'Row',
    'check_replaced',
    'check_writable',
    'is_done',
    'origin',
    'place_of',
    'read_rows',
    'store_rows',
    'write_rows',
]

log = logging.getLogger(__name__)

Row = Dict[str, Any]

ORIGIN = ('device', 'torch', 'timm', 'evavit', 'commit', 'date')
COLUMNS = (
    'bench',
    'case',
    'model',
    'attention',
    'backend',
    'batch_size',
    'img_size',
    'tokens',
    'width',
    'heads',
    'window_size',
    'partition_grid',
    'num_prefix_tokens',
    'count_cells',
    'amp_dtype',
    'torchcompile',
    'status',
    'error',
    'forward_ms',
    'ms',
    'eager_forward_ms',
    'eager_ms',
    'img_per_s',
    'peak_memory_mib',
    'forward_of_copy',
    'backward_of_copy',
    'copy_gb_per_s',
    *ORIGIN,
)
# What a comparison is known by in a results file.
KEY = (
    'bench',
    'case',
    'batch_size',
    'img_size',
    'tokens',
    'width',
    'heads',
    'window_size',
    'partition_grid',
    'num_prefix_tokens',
    'count_cells',
    'amp_dtype',
    'torchcompile',
    'device',
)
# Columns that older files lack, and what attention was measured with then.
ADDED = dict(window_size='7', partition_grid='7', num_prefix_tokens='0', count_cells='one')

LOOKED_AT = 100  # rows of a Parquet file that may be replaced

# A row with another status is a failure, and is measured again.
HARMLESS = ('ok', 'not available')


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path('/proc/cpuinfo').read_text().splitlines():
            if line.startswith('model name'):
                return line.partition(':')[2].strip()
    return f'{platform.machine()} CPU'


def origin(device: torch.device) -> Dict[str, str]:
    """The columns `ORIGIN`, for every row: device, versions, commit and date.

    COMMIT in the environment names the commit where there is no checkout.
    """
    commit = os.environ.get('COMMIT', '')
    if not commit:
        with contextlib.suppress(OSError):  # no git
            commit = subprocess.run(
                ['git', 'rev-parse', '--short', 'HEAD'],
                cwd=Path(__file__).parent,
                capture_output=True,
                text=True,
                check=False,
            ).stdout.strip()
    if device.type == 'cuda':
        name = torch.cuda.get_device_name(device)
    else:
        name = f'{_cpu_name()}, {torch.get_num_threads()} threads'
    date = datetime.date.today().isoformat()
    return dict(
        zip(ORIGIN, (name, torch.__version__, timm.__version__, __version__, commit or 'unknown', date), strict=True)
    )


def _key(row: Row, key: Sequence[str] = KEY) -> Tuple[str, ...]:
    return tuple(str(row.get(column, '')) for column in key)


def read_rows(
    path: Path, columns: Sequence[str] = COLUMNS, added: Mapping[str, str] = MappingProxyType(ADDED)
) -> List[Row]:
    """The rows of a CSV file; none where there is no file. Those of an older file get the columns `added`.

    Raises:
        UserError: the file cannot be read, or has other columns, the same in another order, or a row with more cells or
            fewer, as where it was cut short.
    """
    if not path.exists():
        return []
    try:
        with open_regular(path) as file:
            reader = csv.DictReader(io.TextIOWrapper(file, encoding='utf-8-sig', newline=''))
            found, rows = tuple(reader.fieldnames or ()), list(reader)
    except (UnicodeDecodeError, csv.Error):  # no table at all
        found, rows = (), []
    except OSError as error:
        raise UserError(f'{path}: cannot be read ({reason_of(error)}); name another file') from error
    older = tuple(column for column in columns if column not in added)
    if not found or found not in (tuple(columns), older):
        fault = 'has other columns' if path.stat().st_size else 'is empty'
        raise UserError(f'{path} {fault}; name another file')
    for number, row in enumerate(rows, 1):
        if None in row or None in row.values():
            cells = 'more' if None in row else 'fewer'
            raise UserError(f'{path}: row {number} has {cells} cells than columns; mend it, or name another file')
    if found == tuple(columns):
        return rows
    none = dict.fromkeys(added, '')
    return [{**(added if row['bench'] in ('op', 'layer') else none), **row} for row in rows]


def write_rows(path: Path, rows: Sequence[Row], columns: Sequence[str] = COLUMNS) -> None:
    """Write a CSV file of these columns anew, in a folder that is made if missing. UserError where that fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        place = os.path.realpath(path)  # of a link the file that it leads to
        with replacing(place) as partial, open(partial, 'w', newline='', encoding='utf-8') as stream:
            writer = csv.DictWriter(stream, columns, lineterminator='\n')
            writer.writeheader()
            writer.writerows(rows)
    except OSError as error:
        raise UserError(f'{path}: cannot be written ({reason_of(error)})') from error


def check_writable(path: Path) -> None:
    """Find out before anything is measured whether its rows can be stored. The folder is made if missing.

    Raises:
        UserError: the file or its folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(path) and not path.is_file():  # a pipe would be waited for, a link to nowhere replaced
            raise OSError(errno.EINVAL, 'it is no file')
        if path.exists() and not os.access(path, os.W_OK):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        with tempfile.TemporaryFile(dir=path.parent):  # at `path` itself another program may store rows by now
            pass
    except OSError as error:
        raise UserError(f'--results-file {path} cannot be written ({error.strerror}); name another file') from None


def check_place(path: Path) -> None:
    """UserError where a file of this name could not be written: its folder, or the one to make that in, is none or may
    not be written to. Nothing is made."""
    folder = next(parent for parent in Path(os.path.abspath(path)).parents if os.path.lexists(parent))
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        why = 'may not be written to' if folder.is_dir() else 'is no folder'
        raise UserError(f'{path}: cannot be written ({folder} {why}); name another place')


def check_replaced(path: Path, is_own: Callable[[List[str], List[Row]], bool]) -> None:
    """Find out before anything is computed whether a table may take the place of the file that has its name.

    Args:
        path: A .csv, .json or .parquet file. Of JSON each row is an object, one a line or one a key, or there is a list
            `columns`.
        is_own: Whether a table of these columns, with these first rows, is an earlier output of the program.

    Raises:
        UserError: there is a file, not an empty one, that is no such table.
    """
    try:
        if not os.path.lexists(path):
            return
        with open_regular(path) as file:
            own = not os.fstat(file.fileno()).st_size or is_own(*_table_of(file, path.suffix))
    except OSError as error:
        raise UserError(f'{path}: cannot be read ({reason_of(error)}); name another file') from error
    except (ValueError, TypeError, AttributeError, LookupError, RuntimeError, csv.Error):  # no table at all
        own = False
    if not own:
        raise UserError(f'{path} is there, with other content than is written to it; name another file')


def place_of(path: Path, is_own: Callable[[List[str], List[Row]], bool]) -> Path:
    """Where a table goes after the work: `path`; or, where a file of others has that name meanwhile, the first of
    NAME-1, NAME-2, … that nobody has. The log says what becomes of a file that is there."""
    place = place_after(path, lambda place: check_replaced(place, is_own))
    if place.exists():
        log.info(f'{path}: written anew')
    return place


def _table_of(file: IO[bytes], suffix: str) -> Tuple[List[str], List[Row]]:
    """The names of a table's columns, and its rows; of Parquet the first. ValueError and its like where it is none, as
    where somebody has added to a row."""
    if suffix == '.parquet':
        import pyarrow.parquet

        table = pyarrow.parquet.ParquetFile(file)
        batches = itertools.islice(table.iter_batches(LOOKED_AT), 1)
        return list(table.schema_arrow.names), [row for batch in batches for row in batch.to_pylist()]
    if suffix == '.csv':
        reader = csv.reader(io.TextIOWrapper(file, encoding='utf-8', newline=''))
        names = next(reader, [])
        return names, [dict(zip(names, row, strict=True)) for row in reader]
    try:
        content = json.load(file)
    except json.JSONDecodeError:
        file.seek(0)
        content = {str(number): json.loads(line) for number, line in enumerate(file)}
    if isinstance(content.get('columns'), list):
        names, data = content['columns'], content.pop('data')
        if len(content) > 1:
            raise ValueError('more than columns and data')
        return names, [dict(zip(names, row, strict=True)) for row in data]
    rows = list(content.values())
    rows = rows if rows and all(isinstance(row, dict) for row in rows) else [content]
    names = list(rows[0])
    if any(list(row) != names for row in rows):
        raise ValueError('rows of other columns')
    return names, rows


def _is_whole(row: Row) -> bool:
    """Whether a row is no failure and, where it was measured, has its time."""
    if row['status'] != 'ok':
        return row['status'] in HARMLESS
    try:
        return math.isfinite(float(row['ms']))
    except ValueError:
        return False


def is_done(path: Path, key: Row, backends: Callable[[], Sequence[str]] = tuple) -> bool:
    """Whether a file has the rows of a comparison (columns of `KEY`) at this commit, all of them whole: of the
    backends that the function tells, or all that are there if it tells none."""
    rows = [row for row in read_rows(path) if _key(row) == _key(key) and row['commit'] == key['commit']]
    wanted = set(backends()) if rows else set()  # to tell them a model is built
    rows = [row for row in rows if not wanted or row['backend'] in wanted]
    return bool(rows) and {row['backend'] for row in rows} >= wanted and all(map(_is_whole, rows))


def store_rows(
    path: Path,
    rows: List[Row],
    columns: Sequence[str] = COLUMNS,
    key: Sequence[str] = KEY,
    beside: Callable[[Row], bool] = lambda _: False,
    added: Mapping[str, str] = MappingProxyType(ADDED),
) -> None:
    """Put the rows of comparisons into a CSV file, in place of earlier rows of the same ones.

    Args:
        path: The file.
        rows: What was measured.
        columns: Of the file.
        key: Those of them by which a comparison is known.
        beside: Whether an earlier row stays beside the new ones of its comparison.
        added: As `read_rows` takes it.

    Raises:
        UserError: the file has other columns.
    """
    new = {_key(row, key) for row in rows}
    with _locked(path):
        kept = [row for row in read_rows(path, columns, added) if _key(row, key) not in new or beside(row)]
        write_rows(path, kept + rows, columns)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Programs that store rows in one file, such as those of one `--lock`, do so one after the other."""
    try:
        import fcntl
    except ImportError:  # not on every system
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)  # the file itself is replaced
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)
