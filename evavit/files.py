"""Writing files so that a crash or a full disk leaves what was there before."""

import os
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Iterator, Union

__all__ = ['replacing', 'sync_folder']


@contextmanager
def replacing(path: Union[str, Path], durable: bool = False, shared: bool = False) -> Iterator[Path]:
    """Yields the name of a file or folder to make, which then takes the place of `path`, whole or not at all.

    Args:
        path: Where it belongs. The new one is made beside it, with `.partial` at the end of its name.
        durable: It is on the disk before this returns, so that a loss of power does not take it either.
        shared: Several processes may make it at once: each works under a name of its own, the last one's stays.

    Raises:
        Whatever the body or the system raises. The partial file is then gone, and `path` is as it was.
    """
    partial = Path(f'{path}.{os.getpid()}.partial' if shared else f'{path}.partial')
    _remove(partial)  # what a killed process left
    try:
        yield partial
        if durable:
            with open(partial, 'rb+') as file:
                os.fsync(file.fileno())
        if partial.is_dir():
            _remove(Path(path))  # a folder takes the place of an empty one or of none
        os.replace(partial, path)
        if durable:
            sync_folder(partial.parent)
    except BaseException:
        with suppress(OSError):
            _remove(partial)
        raise


def sync_folder(folder: Union[str, Path]) -> None:
    """Bring the names in a folder to the disk, on systems that can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
