"""WebDataset shards: what is settled before timm's reader and webdataset see a name.

webdataset opens what it is given: `pipe:` starts a command, a pipe blocks, and `{0..99999999}` becomes a list. It reads
what a shard is said to hold, terabytes of nothing too; here a shard is read by the rules of `tars`.
"""

import bz2
import contextlib
import gzip
import io
import json
import lzma
import math
import os
import re
import stat
import tarfile
from pathlib import Path
from typing import Any, Callable, Container, Dict, Iterable, Iterator, Match, Optional, Tuple, Union

from evavit.arguments import shown
from evavit.errors import UserError, reason_of
from evavit.files import open_regular
from evavit.training.data.decode import BadImageError, check_bytes
from evavit.training.data.tars import Member, entries

MOST_SHARDS = 1_000_000
LONGEST_SPLIT = 10_000  # characters
MOST_ENDINGS = 100  # of a sample that are named, beside those that are read
PACKED: Dict[bytes, Any] = {
    b'\x1f\x8b': lambda file: gzip.GzipFile(fileobj=file),
    b'BZh': bz2.BZ2File,
    b'\xfd7zXZ': lzma.LZMAFile,
}
LARGEST_INFO = 2**28  # bytes of a description of a million shards


def shard_root(data_dir: str, split: str) -> str:
    """Where the shards of a split lie: a web address as it is, or an absolute path, which no name in it turns into a
    command. UserError where the split has too many of them, or their description cannot be read."""
    if len(split) > LONGEST_SPLIT or _count(split.split('|')[0]) > MOST_SHARDS:
        raise UserError(
            f'{split[:200]}: names more than {MOST_SHARDS:,} shards, or takes too many words to do so; give fewer'
        )
    if re.match('https?://', data_dir):
        return data_dir
    root = Path(os.path.abspath(data_dir))
    if not root.is_dir():
        raise UserError(
            f'{data_dir[:200]}: shards lie in a folder, or at an address that begins with https:// (--data-dir)'
        )
    for name in ('_info.json', 'info.json'):
        if os.path.lexists(root / name):
            _check_info(root / name)
            break
    else:
        if 'tar' not in split and '..' not in split:  # timm's rule for what names shards
            raise UserError(
                f'{root}: no _info.json says what its split {split} is; name the shards, as in train-{{0000..0009}}.tar'
            )
    return str(root)


def check_shards(reader: Any) -> None:
    """UserError where a shard that should lie here is no file, or a server names one that lies here."""
    for name in reader.split_info.filenames:
        if '://' in reader.root:
            if os.path.isabs(name):
                raise UserError(f'{reader.root}: its shard {shown(name)} is a file of this machine, which is not read')
            continue
        shard = os.path.join(reader.root, name)
        if not os.path.isfile(shard):
            raise UserError(f'{shard[:500]}: {"not a regular file" if os.path.exists(shard) else "no such shard"}')


def samples(
    shards: Iterable[Dict[str, Any]], handler: Callable[[Exception], bool], images: Container[str], label: str
) -> Iterator[Dict[str, Any]]:
    """webdataset's `tarfile_samples`, {key, address, ending: bytes}, by the rules of `tars`. What is not read is a text
    that says why, empty where its ending is neither `label` nor one of `images`. The handler gets BadImageError(reason,
    name) of a file that is left out, else what ends a shard."""
    from webdataset.tariterators import group_by_keys, url_opener

    return group_by_keys(_files(url_opener(shards, handler=handler), handler, images, label), handler=handler)


def _files(
    shards: Iterable[Dict[str, Any]], handler: Callable[[Exception], bool], images: Container[str], label: str
) -> Iterator[Dict[str, Any]]:
    """Those of each whole sample; of one in which a shard breaks off a part would be told as one without a label.
    Without those that have another one's ending, of which webdataset does not say the shard."""
    from webdataset.tariterators import base_plus_ext

    for shard in shards:
        sample: Dict[str, Dict[str, Any]] = {}  # its files by their endings
        before = None
        try:
            content, packed = _unpacked(shard['stream'])
            with tarfile.open(fileobj=content, mode='r|', tarinfo=Member) as archive:
                for member in entries(archive, packed):
                    key, ending = base_plus_ext(member.name)
                    if not member.isfile() or key is None or re.match('__[^/]*__($|/)', member.name):  # as webdataset
                        continue
                    if key != before:
                        yield from sample.values()
                        before, sample = key, {}
                    ending, address = ending.lower(), shard['url']
                    if ending in sample:
                        why = 'another one of its sample has its ending'
                        if not handler(BadImageError(why, f'{address}: {member.name}')):
                            return
                    elif ending == label or ending in images:
                        kept = 0 if ending == label else sum(len(file['data']) for file in sample.values())
                        data = _content(archive, member, kept)
                        sample[ending] = dict(fname=member.name, data=data, __url__=address)
                    elif len(sample) < MOST_ENDINGS:
                        sample[ending] = dict(fname=member.name, data='', __url__=address)
            yield from sample.values()
        except Exception as error:  # hostile headers bring all kinds
            error.args = (*error.args, shard['stream'], shard['url'])  # by which webdataset's handlers know it
            if not handler(error):
                return
        yield {}  # the end of a shard is that of its last sample


class _Bytes(io.RawIOBase):
    """What a stream gives, such as one of webdataset's from a server, for `io.BufferedReader`."""

    def __init__(self, stream: Any):
        self.stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, place: Any) -> int:
        found = self.stream.read(len(place))
        place[: len(found)] = found
        return len(found)


def _unpacked(stream: Any) -> Tuple[Any, Optional[int]]:
    """The tar file in a stream, and the bytes of a compressed one where they are known, as not of one from a server.
    `tarfile` unpacks a piece of one whole, which may be gigabytes."""
    content = io.BufferedReader(_Bytes(stream))
    unpack = next((kind for begin, kind in PACKED.items() if content.peek(6).startswith(begin)), None)
    if not unpack:
        return content, None
    size = None
    with contextlib.suppress(AttributeError, OSError):
        size = os.fstat(stream.fileno()).st_size
    return unpack(content), size


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo, kept: int) -> Union[bytes, str]:
    """Its bytes, which with those `kept` of its sample are no more than an image may have; else why it is not read."""
    if member.issparse():
        return 'a sparse file, whose size means nothing'
    try:
        check_bytes(kept + member.size)
    except BadImageError as error:
        return str(error)
    file: Any = archive.extractfile(member)
    return file.read()


def _check_info(path: Path) -> None:
    """timm would pass over a file that it cannot read, and open whatever is called so."""
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode) or about.st_size > LARGEST_INFO:
            raise UserError(f'{path}: no file, or more than {LARGEST_INFO:,} bytes; it should describe the shards')
        with open_regular(path) as file:
            content = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f'{path}: cannot be read ({reason_of(error)})') from error
    if not isinstance(content, dict) or not isinstance(content.get('splits', {}), dict):
        raise UserError(f'{path}: describes no shards: it should hold {{"splits": {{NAME: …}}}}')


def _count(pattern: str) -> int:
    """How many names a pattern in braces stands for, at most: braceexpand would write them all down."""

    def product(text: str) -> int:
        return min(10**18, math.prod(int(number) for number in re.findall(r'\0(\d+)\0', text)))

    def inner(match: Match[str]) -> str:
        ends = re.fullmatch(r'(-?\d+)\.\.(-?\d+)(\.\..*)?', match[1])
        if ends:
            many = any(len(end) > 18 for end in ends.groups()[:2])
            return f'\0{10**18 if many else abs(int(ends[1]) - int(ends[2])) + 1}\0'
        letters = re.fullmatch(r'\w\.\.\w(\.\..*)?', match[1])
        return f'\0{52 if letters else sum(map(product, match[1].split(",")))}\0'

    found = 1
    while found:
        pattern, found = re.subn(r'\{([^{}]*)\}', inner, pattern)
    return product(pattern)
