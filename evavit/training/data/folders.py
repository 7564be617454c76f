"""Image folders: DIR/SPLIT/CLASS/IMAGE, walked once and checked on the way; where a split lies (for tar files: `tars`).

timm's reader makes classes of images that lie elsewhere, passes over other formats and follows a link in a circle; here
the first two are mistakes, and the link is left out with a warning.
"""

import hashlib
import itertools
import logging
import os
import re
import stat
from pathlib import Path
from typing import IO, Any, Callable, Dict, Iterable, Iterator, List, Optional, Sequence, Set, Tuple

from timm.data.readers.reader_image_folder import ReaderImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from evavit.arguments import nearest
from evavit.errors import UserError
from evavit.files import open_regular
from evavit.training.data.endings import image_endings, is_image

log = logging.getLogger(__name__)

MOST_LINKS = 100_000  # to folders: those that lead from one to another can make up any number of paths
SPLIT_NAMES = (('train', 'training'), ('validation', 'val', 'valid', 'eval', 'evaluation'))
SPLITS = tuple(itertools.chain(*SPLIT_NAMES))


def natural_key(name: str) -> Tuple[Tuple[Any, ...], str]:
    """By which names are sorted with their numbers as numbers, 2 before 10. As timm's, but no two names have one key,
    so that the order follows from the names alone, and none is an error, such as that of a superscript digit."""
    parts = re.split(r'(\d+)', name.lower())  # every second one is a number
    numbers = (part.lstrip('0') for part in parts[1::2])
    rest = ((len(number), number, text) for number, text in zip(numbers, parts[2::2], strict=True))
    return (parts[0], *rest), name


def find_split(root: Path, split: str) -> Path:
    """root/split or root/split.tar, or under its other usual name; for validation also root itself, where it holds
    classes and no split."""
    if place := split_in(root, split):
        return place
    inside, folders = _listed(root)
    there = [name for name in folders if name in SPLITS and not _is_class(root / name, folders)]
    if split in SPLIT_NAMES[1] and folders and not there and not any(f'{name}.tar' in inside for name in SPLITS):
        log.info(f'{root} has no folder for a split: all of its images are taken for {split}')
        return root
    _check_around(root, folders)
    raise UserError(
        f'{root}: no folder {split}, but {", ".join(folders[:8]) or "none at all"}; images belong in '
        f'{root / split}/CLASS/, or hold out a part of a folder without splits with --val-fraction 0.2'
    )


def split_in(root: Path, split: str) -> Optional[Path]:
    """root/split or root/split.tar, or under its other usual name, where there is one."""
    inside, folders = _listed(root)
    synonyms = next((names for names in SPLIT_NAMES if split in names), ())
    for name in (split, *synonyms):
        if name in folders and not _is_class(root / name, folders):
            return root / name
        if f'{name}.tar' in inside:
            return root / f'{name}.tar'
    return None


def _listed(root: Path) -> Tuple[List[str], List[str]]:
    """The names in a folder, and which of them are folders."""
    try:
        inside = sorted(os.listdir(root))
    except OSError as error:
        raise UserError(f'{root}: cannot be read ({error.strerror})') from error
    return inside, [name for name in inside if os.path.isdir(root / name)]


def _is_class(folder: Path, beside: Sequence[str]) -> bool:
    """Whether a folder that is called as a split is a class, as a train among vehicles: it holds images and no folders,
    and is one of the folders `beside` it, of which others are called otherwise."""
    if all(name in SPLITS or is_hidden(name) for name in beside):
        return False
    inside, folders = _listed(folder)
    return not folders and any(os.path.splitext(name)[1].lower() in image_endings() for name in inside)


def _check_around(root: Path, folders: Sequence[str]) -> None:
    """UserError where a folder is a class's or a split's, and the one around it is meant."""
    name = root.resolve().name
    if not folders and any(os.path.splitext(path)[1].lower() in image_endings() for path in os.listdir(root)):
        what = 'holds images and no class folders'
    elif folders and any(name in names for names in SPLIT_NAMES):
        what = 'is itself a split'
    else:
        return
    raise UserError(f'{root}: {what}; give the folder around it, --data-dir {os.path.relpath(root.parent.resolve())}')


def find_undivided(root: Path, train_split: str, val_split: str) -> Path:
    """The folder of classes that `hold_out` divides: root's training split, or root itself where it has no split."""
    inside, folders = _listed(root) if os.path.isdir(root) else ([], [])
    inside = [name for name in inside if not (name in folders and name in SPLITS and _is_class(root / name, folders))]
    for split in (val_split, *SPLIT_NAMES[1]):
        for name in (split, f'{split}.tar'):
            if name in inside:
                raise UserError(f'{root}: has {name} to validate on; leave --val-fraction out, or take {name} away')
    names = [name for name in (train_split, *SPLIT_NAMES[0]) if name in inside or f'{name}.tar' in inside]
    folder = root / names[0] if names else root
    if not folder.is_dir():
        tar = folder if folder.is_file() else folder.with_name(f'{folder.name}.tar')
        kind = 'a tar file; unpack it first' if tar.suffix.lower() == '.tar' else 'a file'
        what = f'{tar} is {kind}' if tar.is_file() else f'{folder} is none'
        raise UserError(f'--val-fraction divides a folder of class folders, and {what}')
    if not _listed(folder)[1]:
        _check_around(folder, [])
    return folder


def hold_out(samples: Sequence[Tuple[str, int]], root: Path, fraction: float, seed: int) -> Set[int]:
    """Numbers of the samples that are held out for validation: of each class its share, rounded, but one at least of
    two or more, and never all.

    Which ones follows from the seed and each image's path below `root` alone, so that every process, machine and
    restart holds out the same, and an image that is added moves few others.

    Args:
        samples: (path, label).
        root: Folder that the paths lie in.
        fraction: Share of a class, between 0 and 1.
        seed: The run's.
    """
    classes: Dict[int, List[Tuple[bytes, int]]] = {}
    for number, (path, label) in enumerate(samples):
        name = f'{seed}/{Path(path).relative_to(root).as_posix()}'
        rank = hashlib.sha256(name.encode(errors='surrogateescape')).digest()
        classes.setdefault(label, []).append((rank, number))
    held: Set[int] = set()
    for ranked in classes.values():
        count = min(max(round(fraction * len(ranked)), 1), len(ranked) - 1)
        held.update(number for _, number in sorted(ranked)[:count])
    return held


class ClassFolders(ReaderImageFolder):
    """timm's folder reader over a tree that was walked and checked here: the same images, order and labels.

    Args:
        root: Folder whose folders without subfolders are the classes.
        class_to_idx: {class: label}, where labels are fixed; None numbers the classes in natural order.

    Raises:
        UserError: An image outside of a class folder, of another format or of an unknown class; a class folder without
            an image, where that would change the labels.
    """

    held_out: Dict[str, Any]  # see `datasets.held_out`

    def __init__(self, root: Path, class_to_idx: Optional[Dict[str, int]] = None):
        self.root, self.held_out = str(root), {}
        found, empty = self.walk(Path(root))
        if empty and class_to_idx is None:
            raise UserError(
                f'{empty[0]}{_and_more(empty)}: class folder without an image '
                f'({", ".join(image_endings())}); add some, or remove it'
            )
        if empty:
            log.warning(f'warning: {empty[0]}{_and_more(empty)}: class folder without an image; its label stays unused')
        folders: Dict[str, str] = {}
        for path, name in found:
            folder = os.path.dirname(path)
            if folders.setdefault(name, folder) != folder:
                log.warning(f'warning: {folders[name]} and {folder} have one name: their images are one class, {name}')
                break
        if class_to_idx is None:
            names = sorted({name for _, name in found}, key=natural_key)
            class_to_idx = {name: index for index, name in enumerate(names)}
        for path, name in found:
            if name not in class_to_idx:
                raise UserError(
                    f'{os.path.dirname(path)}: class {name} is not among the {len(class_to_idx)} known '
                    f'classes{nearest(name, class_to_idx)}, those of training split, checkpoint or '
                    f'--class-map'
                )
        self.class_to_idx = class_to_idx
        self.samples = sorted(((path, class_to_idx[name]) for path, name in found), key=lambda it: natural_key(it[0]))
        if not self.samples:
            raise UserError(f'{root}: no class folders; it should hold CLASS/IMAGE files')

    def walk(self, root: Path) -> Tuple[List[Tuple[str, str]], List[str]]:
        """[(path, class)] of all images, and the class folders without one."""
        return _walk(root)

    def __getitem__(self, index: int) -> Tuple[IO[bytes], int]:
        path, target = self.samples[index]
        return open_regular(path), target


def _walk(root: Path) -> Tuple[List[Tuple[str, str]], List[str]]:
    found: List[Tuple[str, str]] = []
    empty: List[str] = []
    circles: List[str] = []
    strange: List[str] = []
    for folder, subfolders, files in tree(root, circles):
        images: List[str] = []
        for entry in files:
            if check_format(entry.path):
                (images if _may_be_file(entry) else strange).append(entry.path)
        check_place(folder, root, images, subfolders)
        if not images and not subfolders and folder != root:
            empty.append(str(folder))
        found += [(path, folder.name) for path in images]
    warn_of_circles(circles)
    warn_of_strange(strange)
    return found, sorted(empty)


def tree(root: Path, circles: List[str]) -> Iterator[Tuple[Path, List[str], List['os.DirEntry[str]']]]:
    """(folder, names of the folders in it, its files) of a folder and all below, through links too, less hidden
    ones. Links that lead back to a folder around them are left out and added to `circles`."""
    links = 0
    todo: List[Tuple[Path, Tuple[str, ...]]] = [(root, (os.path.realpath(root),))]
    while todo:
        folder, ancestors = todo.pop()
        subfolders: List[str] = []
        files: List[os.DirEntry[str]] = []
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            raise UserError(f'{folder}: cannot be read ({error.strerror})') from error
        for entry in entries:
            if is_hidden(entry.name):
                continue
            if not _is(entry.is_dir):
                files.append(entry)
                continue
            real = os.path.join(ancestors[-1], entry.name)
            if entry.is_symlink():
                real, links = os.path.realpath(entry.path), links + 1
            if links > MOST_LINKS:
                raise UserError(f'{root}: more than {MOST_LINKS:,} links to folders, such as {entry.path[:200]}')
            if real in ancestors:
                circles.append(entry.path)
                continue
            subfolders.append(entry.name)
            todo.append((Path(entry.path), (*ancestors, real)))
        yield folder, subfolders, files


def is_hidden(path: str) -> bool:
    """Whether a part of a path begins with a dot, as what Jupyter, macOS and editors leave."""
    return any(part.startswith('.') and part not in ('.', '..') for part in path.split('/'))


def check_links(root: Path) -> None:
    """UserError where a link leads back to a folder around it: torchvision would follow it 40 folders deep, and of two
    such links each way."""
    circles: List[str] = []
    for _ in tree(root, circles):
        if circles:
            raise UserError(f'{circles[0]}: a link that leads back to a folder around it; take it away')


def check_classes_alone(root: Path) -> None:
    """UserError where torchvision, which makes a class of each folder in `root` with all below it, would pass over an
    image or take a hidden folder for a class."""
    if not root.is_dir():
        return  # which torchvision says
    hidden = sorted(entry.name for entry in os.scandir(root) if is_hidden(entry.name) and _is(entry.is_dir))
    if hidden:
        raise UserError(f'{root / hidden[0]}: would be taken for a class; take it away, or leave --dataset out')
    for folder, _, files in tree(root, []):
        images = [entry.path for entry in files if check_format(entry.path, IMG_EXTENSIONS)]
        if folder == root:
            check_place(folder, root, images, ())


def check_format(path: str, endings: Sequence[str] = image_endings()) -> bool:
    """Whether a name is that of an image, whose ending is one of these. A format that is not read is a UserError."""
    if os.path.splitext(path)[1].lower() in endings:
        return True
    if is_image(path):
        raise UserError(
            f'{path}: only {", ".join(endings)} are read; convert such images to PNG or JPEG, or take them away'
        )
    return False


def warn_of_circles(links: Sequence[str]) -> None:
    if links:
        what = f'{len(links)} links that lead back to a folder around them'
        log.warning(f'warning: {what}, left out: {links[0]}{_and_more(links)}')


def warn_of_strange(paths: Sequence[str]) -> None:
    if paths:
        log.warning(f'warning: {len(paths)} names of images that are no files, left out: {paths[0]}{_and_more(paths)}')


def _is(kind: Callable[[], bool]) -> bool:
    """False for a link that leads to itself, where os.DirEntry raises."""
    try:
        return kind()
    except OSError:
        return False


def _may_be_file(entry: 'os.DirEntry[str]') -> bool:
    """Whether it is a file, or a link that leads to one or nowhere: an image that cannot be read. To open a pipe would
    wait for ever, to open a device may do anything."""
    try:
        return stat.S_ISREG(entry.stat().st_mode)
    except OSError:
        return True


def check_place(folder: Path, root: Path, images: Sequence[str], subfolders: Iterable[str]) -> None:
    """UserError where images are not in a class folder that holds images alone."""
    if not images:
        return
    if folder == root:
        raise UserError(
            f'{images[0]}{_and_more(images)}: an image outside of the class folders; move it to '
            f'{root}/CLASS/, or take it away'
        )
    if subfolders:
        raise UserError(
            f'{folder}: holds both images ({os.path.basename(images[0])}{_and_more(images)}) and folders '
            f'({min(subfolders)}); a class folder holds images alone'
        )


def _and_more(names: Sequence[str]) -> str:
    return f' and {len(names) - 1} more' if len(names) > 1 else ''
