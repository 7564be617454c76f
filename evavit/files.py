"""Files that a crash or a full disk leaves as they were, and that tell whether a bit of them has changed since."""

import errno
import functools
import hashlib
import itertools
import json
import logging
import os
import secrets
import shutil
import stat
import time
import zipfile
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Callable, Iterator, Optional, Pattern, Sequence, TextIO, Union

from evavit.errors import UserError, reason_of

__all__ = [
    'BLANK',
    'DamagedError',
    'append_to',
    'file_digest',
    'holds',
    'is_stamped',
    'new_folder',
    'open_own',
    'open_regular',
    'place_after',
    'remove_marked',
    'replacing',
    'replacing_in',
    'set_aside',
    'stamp',
    'stored_digest',
    'sync_folder',
    'unpack',
    'why_no_file',
]

log = logging.getLogger(__name__)

RUN_WEIGHTS = ('model_best.safetensors', 'last.safetensors')  # of a run's folder, the best first
WEIGHTS = (*RUN_WEIGHTS, 'model.safetensors')  # as runs and save_folder call them
DAY = 24 * 60 * 60  # seconds


def why_no_file(path: Union[str, Path], names: Sequence[str] = WEIGHTS, what: str = 'file') -> str:
    """What to say of a path that should be a file: that there is none, or that it is a folder, with the first of
    `names` that is in it."""
    if not os.path.isdir(path):
        return f'no such {what}'
    inside = next((name for name in names if os.path.isfile(os.path.join(path, name))), None)
    return 'is a folder; give a file' + (f', such as {os.path.join(path, inside)}' if inside else '')


@contextmanager
def replacing(path: Union[str, Path], durable: bool = False, new: bool = False) -> Iterator[Path]:
    """Yields the name of a file or folder to make, which then takes the place of `path`, whole or not at all.

    Args:
        path: Where it belongs. The new one is made beside it under a name that nobody has, `.evavit-*.partial`. What a
            killed process left under such a name goes a day later: until then it may be another one's work.
        durable: A file is on the disk before this returns, so that a loss of power does not take it either.
        new: A file takes the place of none: FileExistsError where there is one by then.

    Raises:
        Whatever the body or the system raises. The partial file is then gone, and `path` is as it was.
    """
    folder = Path(path).parent
    _remove_left_overs(os.path.realpath(folder))
    partial = folder / f'.evavit-{os.getpid()}-{secrets.token_hex(8)}.partial'
    try:
        yield partial
        if durable and not partial.is_dir():
            with open(partial, 'rb+') as file:
                os.fsync(file.fileno())
        if new:
            _reserve(Path(path))
        os.replace(partial, path)  # a folder only in the place of none, or of an empty one
        partial.unlink(missing_ok=True)  # still there where both were names of one file
        if durable:
            sync_folder(folder)
    except BaseException:
        with suppress(OSError):
            _remove(partial)
        raise


def _reserve(path: Path) -> None:
    """Make an empty file, as only one process can."""
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))


@functools.lru_cache(1024)  # once a process: a folder of many files takes long to list
def _remove_left_overs(folder: str) -> None:
    for left in Path(folder).glob('.evavit-*.partial'):
        with suppress(OSError):
            if time.time() - left.lstat().st_mtime > DAY:
                _remove(left)


def open_own(path: Union[str, Path]) -> int:
    """The descriptor of a file that is read and added to where it lies, made where it is not there.

    What else may be called so is not opened: behind a link another file would be written to, and a pipe waits for ever.

    Raises:
        OSError: It is none, or cannot be opened.
    """
    path = Path(path)
    strange = OSError(errno.EINVAL, f'{path.name} is a link or no file; take it away')
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise strange
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, 'O_NOFOLLOW', 0) | getattr(os, 'O_NONBLOCK', 0)
    descriptor = os.open(path, flags, 0o666)
    about = os.fstat(descriptor)
    if not stat.S_ISREG(about.st_mode) or about.st_nlink > 1:
        os.close(descriptor)
        raise strange
    return descriptor


def append_to(path: Union[str, Path]) -> TextIO:
    """`open_own` as text that is added to the file: a log, or a lock. Raises OSError."""
    return open(path, 'a', encoding='utf-8', opener=lambda *_: open_own(path))


def open_regular(path: Union[str, os.PathLike]) -> IO[bytes]:
    """A regular file, open for reading. What is none is not opened, and a pipe that takes its place does not block.

    Raises:
        OSError: It cannot be opened, or is a pipe, a socket, a device, a folder or, as /proc/kmsg, of the kernel.
    """
    strange = OSError(errno.EINVAL, 'not a regular file')
    if not _is_regular(os.stat(path), path):
        raise strange
    descriptor = os.open(path, os.O_RDONLY | getattr(os, 'O_NONBLOCK', 0) | getattr(os, 'O_BINARY', 0))
    if not _is_regular(os.fstat(descriptor), descriptor):
        os.close(descriptor)
        raise strange
    return open(descriptor, 'rb')


def _is_regular(about: os.stat_result, place: Union[str, os.PathLike, int]) -> bool:
    """What has no size and lies on no disk the kernel makes up while it is read: it may have no end."""
    made_up = not about.st_size and hasattr(os, 'statvfs') and not os.statvfs(place).f_blocks
    return stat.S_ISREG(about.st_mode) and not made_up


def holds(path: Union[str, Path], place: int, mark: bytes) -> bool:
    """Whether a regular file, and no link to one, has these bytes at this place. False where it cannot be read."""
    with suppress(OSError):
        if stat.S_ISREG(os.lstat(path).st_mode):
            with open_regular(path) as file:
                return file.read(place + len(mark))[place:] == mark
    return False


def remove_marked(folder: Path, name: Pattern[str], place: int, mark: bytes) -> None:
    """Remove the files of a folder that are called so and have these bytes at this place, see `holds`."""
    for path in sorted(folder.iterdir()):
        if name.fullmatch(path.name) and holds(path, place, mark):
            path.unlink()


def check_parts(path: Union[str, Path], sums: bool = False) -> None:
    """ValueError unless the parts of an archive of `torch.save` are plain files, not compressed: a small one fills no
    memory. With `sums` also where the checksum of one is wrong; PyTorch can be told to write none."""
    with zipfile.ZipFile(path) as file:
        for part in file.infolist():
            if part.external_attr or part.compress_type:  # torch.save writes plain files, not compressed
                raise ValueError(f'the entry of its part {part.filename} is damaged')
        damaged = file.testzip() if sums and any(part.CRC for part in file.infolist()) else None
    if damaged:
        raise ValueError(f'its part {damaged} is damaged')


def unpack(archive: zipfile.ZipFile, folder: Union[str, Path]) -> None:
    """Add the members of a zip archive to a folder as files, each whole; one that is there with its content stays.

    Members are stored, not compressed, and together no longer than the archive: a small one fills no disk.

    Raises:
        ValueError: They are not, one leads out of the folder, or something else has its name there.
        OSError, zipfile.BadZipFile: It cannot be read or written, or is damaged.
    """
    members = [member for member in archive.infolist() if not member.is_dir()]
    size = os.fstat(archive.fp.fileno()).st_size if archive.fp else 0
    if any(member.compress_type for member in members) or sum(member.file_size for member in members) > size:
        raise ValueError('its members are compressed, or longer than the file')
    root = Path(os.path.realpath(folder))
    for member in members:
        place = root / member.filename
        if '..' in place.parts or root not in place.parents or Path(os.path.realpath(place.parent)) != place.parent:
            raise ValueError(f'{member.filename} leads out of {folder}')
        content = archive.read(member)
        if os.path.lexists(place):
            if place.is_symlink() or not place.is_file() or place.read_bytes() != content:
                raise ValueError(f'{place} is there already, and is not its {member.filename}')
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        with replacing(place) as partial:
            partial.write_bytes(content)


@contextmanager
def new_folder(path: Union[str, Path]) -> Iterator[Path]:
    """`replacing` for a folder that a user names: one that is not there yet, or is empty.

    Raises:
        UserError: It holds something, which would be lost, or cannot be made.
    """
    place = Path(os.path.realpath(path))  # of a link the folder that it leads to
    try:
        if place.is_dir() and (any(place.iterdir()) or place == Path.cwd()):
            raise UserError(f'{path} is there already; name a folder that is new, or an empty one that you are not in')
        if place.exists() and not place.is_dir():
            raise UserError(f'{path} is a file; name a folder')
        place.parent.mkdir(parents=True, exist_ok=True)
        with replacing(place) as partial:
            yield partial
    except OSError as error:
        raise UserError(f'{path}: cannot be written ({reason_of(error)})') from error


@contextmanager
def replacing_in(folder: Union[str, Path], make: bool = False) -> Iterator[Path]:
    """Yields an empty folder whose files then take the places of their names in `folder`, each of them whole.

    For writers that go by a file's ending, or write several files: the last names of the alphabet come first, so that
    `model.onnx.data` is there before `model.onnx`, which refers to it. If the body raises, or a file cannot take its
    place, `folder` is as it was; a kill between two of them leaves new ones beside old ones.
    What a killed process left goes a day later: until then it may be another one's work. With `make` the folder itself
    is made, and removed where it stays empty.
    """
    with ExitStack() as stack:
        if make:
            os.makedirs(folder, exist_ok=True)
            stack.callback(_remove_empty, folder)
        _remove_left_overs(os.path.realpath(folder))
        name = stack.enter_context(TemporaryDirectory(prefix='.evavit-', suffix='.partial', dir=folder))
        yield Path(name)
        files, old, done = sorted(Path(name).iterdir(), reverse=True), Path(name, '.old'), []
        old.mkdir()
        try:
            for file in files:
                place = Path(folder, file.name)
                done.append((place, _second_name(place, old / file.name)))
                os.replace(file, place)
        except BaseException:
            for place, before in reversed(done):
                if before is not None:
                    os.replace(before, place)
                elif not place.is_dir():
                    place.unlink(missing_ok=True)
            raise


def _remove_empty(folder: Union[str, Path]) -> None:
    with suppress(OSError):
        os.rmdir(folder)


def _second_name(path: Path, other: Path) -> Optional[Path]:
    """Give a file another name to come back from, and return that; None where there is no file."""
    if not os.path.lexists(path) or (path.is_dir() and not path.is_symlink()):
        return None
    try:
        os.link(path, other, follow_symlinks=False)
    except (NotImplementedError, OSError):  # a file system without hard links
        shutil.copy2(path, other, follow_symlinks=False)
    return other


def place_after(path: Path, check: Callable[[Path], None]) -> Path:
    """Where a file goes after the work: `path`; or, where `check` refuses that with a UserError by now, the first of
    NAME-1, NAME-2, … that nobody has. The log says so."""

    def refused(place: Path) -> bool:
        try:
            check(place)
        except UserError:
            return True
        return False

    if not refused(path):
        return path
    others = (path.with_name(f'{path.stem}-{number}{path.suffix}') for number in itertools.count(1))
    other = next(other for other in others if not os.path.lexists(other) and not refused(other))
    log.warning(f'warning: another file is called {path} meanwhile; the results are in {other}')
    return other


def set_aside(path: Union[str, Path], ending: str = 'damaged') -> Path:
    """Rename what another file is going to replace to `.damaged`, `.damaged1`, …: the first name that nobody has."""
    kept = free_name(path, ending)
    os.replace(path, kept)
    return kept


def free_name(path: Union[str, Path], ending: str) -> Path:
    """The first of `PATH.ENDING`, `PATH.ENDING1`, … that nobody has."""
    names = (Path(f'{path}.{ending}{number or ""}') for number in itertools.count())
    return next(name for name in names if not os.path.lexists(name))


def sync_folder(folder: Union[str, Path]) -> None:
    """Bring the names in a folder to the disk, on systems that can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# A file's digest is in the file: a second file beside it would be lost by a copy, and wrong after a kill between the
# two. It is the SHA-256 of the whole file with the digest's own 64 digits as zeros. What `torch.save` wrote has it in
# the comment that ends a zip archive, a safetensors file in its metadata as `digest`. Neither is in a reader's way.
DIGITS = 64
BLANK = 'sha256:' + '0' * DIGITS  # `digest` in the metadata of a safetensors file that is going to be stamped
_COMMENT = b'SHA-256 of this file with these 64 digits as zeros: '
_ARCHIVE, _END = b'PK\x03\x04', b'PK\x05\x06'  # how a zip archive begins, and its last record
_END_SIZE = 22  # of that record, whose last two bytes are the length of the comment
_MOST_HEADER = 100_000_000  # bytes of a safetensors header, the library's own bound


class DamagedError(ValueError):
    """A file is not as it was written. The text is one line, without the file's name."""


def stamp(path: Union[str, Path]) -> None:
    """Write its digest into a file of `torch.save`, or one of safetensors that has `digest=BLANK` in its metadata."""
    with open(path, 'rb+') as file:
        if _ends_plainly(file):
            file.seek(-2, os.SEEK_END)
            file.write((len(_COMMENT) + DIGITS).to_bytes(2, 'little') + _COMMENT + b'0' * DIGITS)
        place = _digest_place(file)
        if place is None:
            raise ValueError(f'{path} has no place for a digest')
        digest = _digest(file, place)
        file.seek(place)
        file.write(digest)


def is_stamped(path: Union[str, Path]) -> bool:
    """Whether a file holds a digest. False for what other programs wrote, and this one before it had digests.

    Raises:
        DamagedError: It holds one, and not that of its content, or it has lost its end.
    """
    with open(path, 'rb') as file:
        place = _digest_place(file)
        if place is None:
            return False
        digest = _digest(file, place)
        file.seek(place)
        if file.read(DIGITS) != digest:
            raise DamagedError('damaged: its SHA-256 is not the one that was written into it')
        return True


def file_digest(path: Union[str, Path]) -> str:
    """The SHA-256 of a file's whole content, as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def stored_digest(path: Union[str, Path]) -> str:
    """The digest that a file holds, whether it is right or not; '' for a file without one."""
    with open(path, 'rb') as file:
        place = _digest_place(file)
        if place is None:
            return ''
        file.seek(place)
        return file.read(DIGITS).decode(errors='replace')


def _digest(file: IO[bytes], place: int) -> bytes:
    total = hashlib.sha256()

    def add(size: int) -> None:
        while size > 0 and (block := file.read(min(size, 2**20))):
            total.update(block)
            size -= len(block)

    file.seek(0)
    add(place)
    total.update(b'0' * DIGITS)
    file.seek(place + DIGITS)
    add(os.fstat(file.fileno()).st_size)
    return total.hexdigest().encode()


def _digest_place(file: IO[bytes]) -> Optional[int]:
    """Where a digest begins; None in a file without one."""
    size = file.seek(0, os.SEEK_END)
    place = size - DIGITS
    file.seek(max(0, place - len(_COMMENT)))
    if file.read(len(_COMMENT)) == _COMMENT:
        return place
    file.seek(0)
    if file.read(4) != _ARCHIVE:
        return _place_in_header(file, size)
    if not _ends_plainly(file):
        raise DamagedError('the file is cut short, or damaged at its end')
    return None


def _ends_plainly(file: IO[bytes]) -> bool:
    """Whether this is a zip archive whose end has no comment, as `torch.save` writes it."""
    file.seek(max(0, file.seek(0, os.SEEK_END) - _END_SIZE))
    end = file.read()
    return len(end) == _END_SIZE and end.startswith(_END) and end.endswith(bytes(2))


def _place_in_header(file: IO[bytes], size: int) -> Optional[int]:
    """The digest's place in a safetensors file. Where there is no such header, its reader has the words for that."""
    file.seek(0)
    length = int.from_bytes(file.read(8), 'little')
    if length > min(size, _MOST_HEADER):
        return None
    header = file.read(length)
    try:
        metadata = json.loads(header)['__metadata__']
        # By either name or form, so that one changed bit does not hide it; shorter ones are another program's.
        long = {name: value for name, value in metadata.items() if 64 < len(value) <= len(BLANK)}
        marked = 'digest' in long or any(value.startswith(BLANK[:7]) for value in long.values())
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError):
        return None
    key = f'"digest":"{BLANK[:7]}'.encode()
    if marked and key not in header:
        raise DamagedError('damaged: its digest is not where it was written')
    return 8 + header.index(key) + len(key) if marked else None
