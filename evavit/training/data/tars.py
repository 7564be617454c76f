"""Tar files of CLASS/IMAGE, as a folder is read: walked once at each start, checked on the way.

timm's reader passes over images of unknown classes and what comes after a damaged header, and beside a large file it
keeps where the images lie in it, which it then believes of any other file of that name.
"""

import io
import os
import posixpath
import sys
import tarfile
from collections import ChainMap
from pathlib import Path
from typing import IO, Any, Container, Dict, Iterator, List, Mapping, Optional, Set, Tuple, Union

from evavit.errors import LocalError, UserError, reason_of
from evavit.files import open_regular
from evavit.training.data.decode import BadImageError, check_bytes
from evavit.training.data.folders import ClassFolders, check_format, check_place, is_hidden, warn_of_strange

EXTENSIONS = (  # kinds of headers that Python reads whole, before the file that they are of
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
)
LARGEST_EXTENSION = 2**20  # bytes: names and times of one file
MOST_HEADERS = 1000
LARGEST_GAIN, LITTLE = 1000, 2**30  # a compressed file unpacks to so many times its bytes, or to so many bytes
END = 2**21  # bytes of zeros behind the end, at most: writers fill up a block, of 10 KiB mostly


class ClassTar(ClassFolders):
    """`ClassFolders` of a tar file. A tar file in it counts as the folder of its name.

    Raises:
        UserError: As `ClassFolders`, and where the file is damaged or cut short.
        LocalError: While reading, the file is another one than that which was walked.
    """

    def walk(self, root: Path) -> Tuple[List[Tuple[str, str]], List[str]]:
        content = _Content()
        try:
            with open_regular(root) as file:
                self.version = version_of(file)
                content.add(file, str(root))
        except UserError:
            raise
        except Exception as error:  # hostile headers bring all kinds
            raise UserError(f'{root}: not a readable tar file of CLASS/IMAGE files ({reason_of(error)})') from error
        check_links(content.links, ChainMap(content.places, content.files), root)
        warn_of_strange([*content.strange])
        self.places = content.places
        images: Dict[str, List[str]] = {folder: [] for folder in content.folders}
        for path in sorted(self.places):
            images[os.path.dirname(path)].append(path)
        found, empty = [], []
        for folder, inside in content.folders.items():
            check_place(Path(folder), root, images[folder], inside)
            found += [(path, os.path.basename(folder)) for path in images[folder]]
            if not images[folder] and not inside and folder != str(root):
                empty.append(folder)
        return found, sorted(empty)

    def __getitem__(self, index: int) -> Tuple[IO[bytes], int]:
        path, target = self.samples[index]
        first, size = self.places[path]
        check_bytes(size)
        with open_regular(self.root) as file:
            check_version(file, self.version, self.root)
            file.seek(first)
            content = file.read(size)
        if len(content) < size:
            raise BadImageError('the tar file is cut short')
        return io.BytesIO(content), target


class Member(tarfile.TarInfo):
    """For `tarfile.open(tarinfo=Member)`: a header of any size would fill the memory, and a damaged one that is not the
    first would count as the end."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> 'Member':
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # a block of zeros, the end
            raise
        except tarfile.HeaderError as error:
            if archive.offset == 0:
                raise
            raise tarfile.ReadError(_damaged(archive)) from error

    @classmethod
    def frombuf(cls, buf: Any, encoding: str, errors: str) -> 'Member':
        member = super().frombuf(buf, encoding, errors)
        if member.type in EXTENSIONS and not 0 <= member.size <= LARGEST_EXTENSION:
            raise tarfile.ReadError(f'a header of {member.size:,} bytes, where {LARGEST_EXTENSION:,} would do')
        return member


def entries(archive: tarfile.TarFile, packed: Optional[int] = None) -> Iterator[tarfile.TarInfo]:
    """The entries of a tar file in their order; `packed` is the bytes of a compressed one. Raises all kinds of errors
    where it is damaged, unpacks to far more than pictures do, which would take hours, or goes on after its end: zeros,
    as of a bad sector or of a download that was broken off, look like the end."""
    while (member := archive.next()) is not None:
        check_gain(archive.offset, packed)
        archive.members.clear()  # type: ignore[attr-defined]  # a million of them would fill the memory
        whole = archive.pax_headers  # of those that hold for all that follows
        if len(whole) > MOST_HEADERS or sum(map(len, whole.values())) > LARGEST_EXTENSION:
            raise tarfile.ReadError('more headers for the whole file than any program writes')
        if member.size < 0:  # Python before 3.13.6 goes round in a circle
            raise tarfile.ReadError(f'the entry of {member.name} is damaged')
        yield member
    stream: Any = archive.fileobj  # after a block of zeros
    rest = stream.read(END)
    if len(rest) == END or rest.strip(b'\0'):
        raise tarfile.ReadError(f'{_damaged(archive)}, or several tar files in one')


def check_gain(count: int, packed: Optional[int]) -> None:
    """ReadError where a compressed file of so many bytes, None for a plain one, unpacks to far more of them."""
    if count > (max(LARGEST_GAIN * packed, LITTLE) if packed else sys.maxsize):
        raise tarfile.ReadError(f'unpacks to more than {LARGEST_GAIN:,} times its size; unpack it first')


def _damaged(archive: tarfile.TarFile) -> str:
    return f'damaged or cut short at byte {archive.offset}'


def unpacked_name(name: str) -> str:
    """The one name that a member has in the folder that its tar file unpacks to: a/1.png for ./a/1.png, a//1.png and
    a/b/../1.png. One that begins with `..` leads out of that folder."""
    return posixpath.normpath(f'./{name}')


def linked(path: str, target: str) -> str:
    """Where a symbolic link in a tar file leads to, as a name of it if that is inside."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(path), target))


def check_links(links: Mapping[str, str], files: Container[str], root: Path) -> None:
    """UserError where one of the links of a tar file (name → where it leads) leads to no file in it, and so perhaps to
    a folder: its pictures would be missing without a word."""
    for name, target in links.items():
        seen = {name}
        while target in links and target not in seen:
            seen.add(target)
            target = links[target]
        if target not in files:
            raise UserError(
                f'{root}: its member {os.path.relpath(name, root) if name.startswith(str(root)) else name} is a link, '
                f'and what it leads to is not in the file; pack it with tar --dereference'
            )


def version_of(file: Any) -> Tuple[int, int]:
    """What differs where an open file is another one, or has other content."""
    about = os.fstat(file.fileno())
    return about.st_size, about.st_mtime_ns


def check_version(file: Any, version: Tuple[int, int], path: Union[str, Path]) -> None:
    """LocalError where an open file is not the one that was walked: what was found in that one lies elsewhere in it."""
    if version_of(file) != version:
        raise LocalError(f'{path}: the file was changed after this run began to read it; start again')


class _Content:
    """What a tar holds, by names that begin with its own. Of equal names the last counts, as when it is unpacked."""

    def __init__(self) -> None:
        self.places: Dict[str, Tuple[int, int]] = {}  # image → its first byte in the outermost file, number of bytes
        self.folders: Dict[str, Set[str]] = {}  # folder → names of the folders in it
        self.files: Dict[str, Tuple[int, int]] = {}  # the same of files that are not called images
        self.links: Dict[str, str] = {}  # what is not called an image and leads elsewhere → where
        self.tars: Dict[str, Tuple[int, int]] = {}  # tar file in it → its first byte in the outermost file, its size
        self.strange: Dict[str, None] = {}  # what is called an image and is no file

    def add(self, file: IO[bytes], root: str, start: int = 0) -> None:
        """Note the members of a tar file, which begins at byte `start` of the outermost one."""
        self.folders.setdefault(root, set())
        with tarfile.open(fileobj=file, mode='r:', tarinfo=Member) as archive:
            for member in entries(archive):
                self._add_member(archive, member, root, start)

    def _add_member(self, archive: tarfile.TarFile, member: tarfile.TarInfo, root: str, start: int) -> None:
        name = unpacked_name(member.name)
        path, ending = _path(root, name), os.path.splitext(name)[1].lower()
        place = (start + member.offset_data, member.size) if member.isfile() and not member.issparse() else None
        if member.islnk():
            original = _path(root, unpacked_name(member.linkname))
            place = self.places.get(original) or self.files.get(original)
        for older in (self.places, self.files, self.links, self.strange):
            older.pop(path, None)
        if is_hidden(name):
            self.files.update({path: place} if place else {})
        elif member.isdir():
            self._add_folder(path, root)
        elif ending == '.tar' and member.isfile():
            if not place:
                raise tarfile.ReadError(f'its member {name} is packed as a sparse file; pack it without --sparse')
            if path in self.tars:
                self._forget(*self.tars[path])
            self.tars[path] = place
            path = path[: -len(ending)]
            self._add_folder(path, root)
            inner: Any = archive.extractfile(member)
            self.add(inner, path, start + member.offset_data)
        elif check_format(path):
            self._add_folder(os.path.dirname(path), root)
            if place:
                self.places[path] = place
            else:
                self.strange[path] = None
        elif ending == '.tar':
            self.links[path] = ''
        elif member.issym():
            self.links[path] = os.path.join(root, linked(name, member.linkname))
        elif place:
            self.files[path] = place

    def _forget(self, start: int, size: int) -> None:
        """Drop what came of a tar file in it, which a newer one of its name replaces."""
        for found in (self.places, self.files):
            for path in [path for path, (first, _) in found.items() if start <= first < start + size]:
                del found[path]

    def _add_folder(self, path: str, root: str) -> None:
        while path not in self.folders:
            self.folders[path] = set()
            path, name = os.path.split(path)
            self.folders.setdefault(path, set()).add(name)


def _path(root: str, name: str) -> str:
    parts = name.split('/')
    if parts[0] == '..':
        raise tarfile.ReadError(f'its member {name} lies outside of it')
    return root if name == '.' else os.path.join(root, *parts)
