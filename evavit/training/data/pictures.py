"""Pictures without labels, for inference: those of a folder and the folders in it, of a tar file, or a single one."""

import contextlib
import io
import logging
import mmap
import os
import shutil
import tarfile
import tempfile
from pathlib import Path
from typing import IO, Any, Dict, List, Optional, Tuple

from PIL import Image
from timm.data import ImageDataset
from timm.data.readers.reader import Reader

from evavit.errors import UserError, first_line, reason_of
from evavit.files import holds, open_regular
from evavit.training.data.decode import BadImageError, check_bytes, is_turned
from evavit.training.data.endings import is_image, read_endings
from evavit.training.data.folders import is_hidden, natural_key, tree, warn_of_circles
from evavit.training.data.images import CheckedImages
from evavit.training.data.tars import (
    Member,
    check_gain,
    check_links,
    check_version,
    entries,
    linked,
    unpacked_name,
    version_of,
)

log = logging.getLogger(__name__)

SOFTWARE = 'evavit inference.py --include-attention'  # in the text of this name of the PNGs that it draws
MARK = 37, b'tEXtSoftware\0' + SOFTWARE.encode()  # where that begins: after signature, IHDR and its own length
DRAWN = '.attention'  # how the names of their folders end
ARCHIVES = ('.tar', '.tar.gz', '.tgz', '.tar.bz2', '.tar.xz')


class Pictures(Reader):
    """A reader in timm's form of every file whose name ends like an image's, in natural order; all labels are 0. Names
    with a dot in front are passed over.

    timm's own readers pass over other formats without a word, and want a class folder for each image. In a tar file a
    hard link is the picture that it leads to; what else is no regular file cannot be read. Those of a compressed one
    are unpacked once, to a temporary file: each step back in the archive would unpack it from its start.

    Args:
        root: Folder, tar file or picture.

    Raises:
        UserError: There is no such thing, it cannot be read, or no picture is in it.
        LocalError: While reading, the tar file is another one than that which was walked.
    """

    def __init__(self, root: Path):
        super().__init__()
        self.root, self.compressed = root, False
        self.members = None if root.is_dir() else self._members(root)
        self.unpacked = self._unpack() if self.members and self.compressed else None
        self.tars: Dict[int, tarfile.TarFile] = {}  # by process: loading processes must not share a place in the file
        if root.is_dir():
            circles: List[str] = []
            files = [
                Path(file.path) for _, _, inside in tree(root, circles) for file in inside if _is_picture(file.name)
            ]
            drawn = {path for path in files if path.parent.name.endswith(DRAWN) and holds(path, *MARK)}
            names = [path.relative_to(root).as_posix() for path in files if path not in drawn]
            warn_of_circles(circles)
            if drawn:
                log.info(f'{len(drawn)} pictures of attention, which inference.py drew, are left out')
        elif self.members is not None:
            names = list(self.members)
        else:
            self.root, names = root.parent, [root.name]
        self.names = sorted(names, key=natural_key)
        if not self.names:
            raise UserError(f'{root}: no picture in it ({", ".join(read_endings())})')

    def _members(self, path: Path) -> Optional[Dict[str, tarfile.TarInfo]]:
        """The pictures of a tar file by name, None for a file of another kind."""
        if not path.is_file():
            what = 'neither a folder nor a regular file' if path.exists() else 'no such folder or file'
            raise UserError(f'{path}: {what} (--data-dir)')
        if not path.name.lower().endswith(ARCHIVES):
            return None
        found: Dict[str, tarfile.TarInfo] = {}
        files: Dict[str, tarfile.TarInfo] = {}  # what a hard link may lead to, which need not be called a picture
        links: Dict[str, str] = {}
        try:
            with open_regular(path) as file, tarfile.open(fileobj=file, tarinfo=Member) as tar:
                self.version, self.compressed = version_of(file), tar.fileobj is not file
                for info in entries(tar, self.version[0] if self.compressed else None):
                    name = unpacked_name(info.name)
                    if info.isdir():
                        continue
                    files[name] = files.get(unpacked_name(info.linkname), info) if info.islnk() else info
                    links.pop(name, None)
                    if _is_picture(name):
                        found[name] = files[name]
                    elif info.issym() and not is_hidden(name):
                        links[name] = linked(name, info.linkname)
            check_links(links, {name for name, info in files.items() if info.isfile()} if links else {}, path)
            return found
        except UserError:
            raise
        except Exception as error:  # hostile headers bring all kinds
            raise UserError(f'{path}: not a readable tar file ({first_line(error)[:400]})') from error

    def _unpack(self) -> Tuple[mmap.mmap, Dict[int, slice]]:
        """A file without a name, which loading processes share, with the pictures of a compressed tar file, and where
        each is in it by where it is in the archive."""
        members = {info.offset_data: info for info in (self.members or {}).values() if info.isfile()}
        places: Dict[int, slice] = {}
        try:
            with tempfile.TemporaryFile() as content, open_regular(self.root) as file:
                check_version(file, self.version, self.root)
                content.write(b'\0')  # an empty one cannot be mapped
                with tarfile.open(fileobj=file, tarinfo=Member) as tar:
                    for place in sorted(members):
                        with contextlib.suppress(BadImageError):  # which is told when it is asked for
                            check_bytes(members[place].size)
                            begin, stream = content.tell(), tar.extractfile(members[place])
                            assert stream is not None  # a regular file
                            check_gain(begin + members[place].size, self.version[0])  # of sparse files
                            shutil.copyfileobj(stream, content)
                            places[place] = slice(begin, content.tell())
                content.flush()
                return mmap.mmap(content.fileno(), 0, access=mmap.ACCESS_READ), places
        except UserError:
            raise
        except Exception as error:  # hostile headers bring all kinds
            raise UserError(
                f'{self.root}: its pictures cannot be unpacked to a temporary file ({reason_of(error)}); unpack it '
                f'first, or name another folder in TMPDIR'
            ) from error

    def __getstate__(self) -> Dict[str, Any]:  # for loading processes that do not share what is open
        return {**self.__dict__, 'unpacked': None, 'tars': {}}

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Tuple[IO[bytes], int]:
        if self.members is None:
            return open_regular(self.root / self.names[index]), 0
        member = self.members[self.names[index]]
        if not member.isfile():
            raise BadImageError('a link or no file, which in a tar file is not followed')
        if self.compressed:
            check_bytes(member.size)
            content, places = self.unpacked = self.unpacked or self._unpack()
            return io.BytesIO(content[places[member.offset_data]]), 0
        if os.getpid() not in self.tars:
            file = open_regular(self.root)
            check_version(file, self.version, self.root)
            self.tars[os.getpid()] = tarfile.open(fileobj=file, tarinfo=Member)  # noqa: SIM115  it stays open
        tar = self.tars[os.getpid()]
        check_version(tar.fileobj, self.version, self.root)
        stream = tar.extractfile(member)
        assert stream is not None  # a regular file
        return stream, 0

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        name = self.names[index]
        if basename:
            return os.path.basename(name)
        return f'{self.root / name if self.members is None else f"{self.root}: {name}"}' if absolute else name


class UnlabelledImages(CheckedImages):
    """Pictures whose label, 0 from the reader, is 1 where an EXIF orientation is not applied (see `is_turned`)."""

    def load(self, index: int) -> Tuple[Any, int]:
        image, _ = super().load(index)
        return image, int(isinstance(image, Image.Image) and is_turned(image))


def _is_picture(name: str) -> bool:
    return is_image(name) and not is_hidden(name)


def open_pictures(data_dir: Optional[str], in_chans: int = 3) -> UnlabelledImages:
    """The pictures of a folder, a tar file or one file; every one may turn out unreadable.

    Args:
        data_dir: Where they are.
        in_chans: 3 for colour, 1 for grey.

    Raises:
        UserError: see `Pictures`.
    """
    if not data_dir:
        raise UserError('no pictures: give --data-dir, a folder of pictures, a tar file or one picture')
    reader: Any = Pictures(Path(data_dir))
    return UnlabelledImages(ImageDataset(data_dir, reader=reader), 'RGB' if in_chans == 3 else 'L', share=1.0)
