"""Tar files that say they hold more than they do, and a bound on the memory that reading them takes."""

import bz2
import tarfile
import tracemalloc
from contextlib import contextmanager


def hostile_header(path, kind=tarfile.XHDTYPE, size=2**26):
    """A tar file that begins with a header of that many bytes, all of them 0 and none on the disk."""
    with open(path, 'wb') as file:
        header = tarfile.TarInfo('x')
        header.type, header.size = kind, size
        file.write(header.tobuf(tarfile.GNU_FORMAT))
        file.truncate(size + 2**12)
    return path


def wounds(content, place):
    """A tar file whose entry at byte `place` is damaged, named by what happened to it: none of them loads as whole."""
    block = tarfile.BLOCKSIZE
    return {
        'a letter of the header': content[:place] + b'X' + content[place + 1 :],
        'a header of zeros': content[:place] + bytes(block) + content[place + block :],
        'two blocks of zeros': content[:place] + bytes(2 * block) + content[place + 2 * block :],
        'cut before the header': content[:place],
        'cut in the header': content[: place + 100],
        'two files in one': content + content,
    }


def bomb(path, size):
    """A small compressed tar file of one file of zeros."""
    member = tarfile.TarInfo('x.png')
    member.size = size
    with bz2.open(path, 'wb') as file:
        file.write(member.tobuf(tarfile.GNU_FORMAT))
        for _ in range(size // 2**20):
            file.write(bytes(2**20))
        file.write(bytes(2**10))
    return path


@contextmanager
def little_memory():
    tracemalloc.start()
    yield
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()
