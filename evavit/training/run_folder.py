"""The folder of a run: whose it is, the lock on it, and the checkpoints in it."""

import contextlib
import json
import logging
import os
import re
import socket
from pathlib import Path
from typing import IO, Any, Dict, Iterator, List, Optional, Sequence, Tuple, Union

from timm.utils import load_checkpoint_metadata

from evavit.errors import LocalError, UserError, mend_of, reason_of
from evavit.files import file_digest, open_own, open_regular, stored_digest
from evavit.training.contents import KEPT, metadata_of, read_checkpoint
from evavit.training.sections import is_whole

log = logging.getLogger(__name__)

BEST = ('model_best.pth.tar', 'model_best.safetensors')

# What a run's own files hold: the lock, and the line of `agreement.code_version` in train.log with its time.
LOCK = re.compile(rb'(process [0-9]+ on [^\n]+)?')
LOG = re.compile(rb'^[-0-9]{10} [:,0-9]{12} evavit [^ ]+ \([0-9a-f]{12}\), torch ', re.MULTILINE)


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """While the context lasts, or until this process ends in whatever way, no other run can lock the folder.

    The loading processes that it starts do not hold the lock.

    Raises:
        UserError: The folder cannot be made.
        LocalError: Another run is writing there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open_own(folder / '.lock')
    except OSError as error:
        raise UserError(f'--output {folder}: cannot be written ({reason_of(error)})') from error
    with open(lock, 'rb+', buffering=0) as file:  # nothing is left to write when it closes
        try:
            import fcntl  # not on every system

            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            other = (file.read(200) or b'').decode(errors='replace')
            raise LocalError(
                f'{folder}: another run is writing there ({other}); let it end, or give another --experiment'
            ) from None
        except (ImportError, OSError):  # a system, or a file system, without locks
            log.debug(f'{folder} cannot be locked')
        check_lock(folder, file)
        try:
            file.truncate(0)
            file.write(f'process {os.getpid()} on {socket.gethostname()}'.encode())
        except OSError as error:
            raise LocalError(f'{folder}: cannot be written ({reason_of(error)}); {remedy(folder, error)}') from error
        yield


def check_lock(folder: Path, file: Optional[IO[bytes]] = None) -> None:
    """UserError where the `.lock` of a folder, open as `file` or not, is none of a run's, which one would write over.
    Not without `file` where this process has locked the folder: to close another one unlocks it."""
    lock = folder / '.lock'
    if file is None and not lock.is_file():
        return
    try:
        with contextlib.nullcontext(file) if file else open_regular(lock) as opened:
            content = opened.read(400)
    except OSError as error:
        raise UserError(f'{lock}: cannot be read ({reason_of(error)})') from error
    if not LOCK.fullmatch(content):
        raise UserError(_others(folder, lock.name, 'write over'))


def _begun(folder: Path) -> bytes:
    """How a folder's train.log begins; b'' where there is none."""
    try:
        if (folder / 'train.log').is_file():  # which a run begins before it writes anything else
            with open_regular(folder / 'train.log') as file:
                return file.read(2**16)
    except OSError as error:
        raise UserError(f'{folder / "train.log"}: cannot be read ({reason_of(error)})') from error
    return b''


def has_begun(folder: Path) -> bool:
    """Whether a run has begun in a folder, as its train.log says; UserError where that cannot be read."""
    return bool(LOG.search(_begun(folder)))


def _check_others(folder: Path) -> None:
    """UserError where a folder without checkpoints holds what this run would change, and no run has left there."""
    begun = _begun(folder)
    if LOG.search(begun):
        return
    if begun:
        raise UserError(_others(folder, 'train.log', 'add to'))
    for name in ('args.yaml', 'tmp.pth.tar'):
        if os.path.lexists(folder / name):
            raise UserError(_others(folder, name, 'write over'))


def _others(folder: Path, name: str, change: str) -> str:
    return (
        f'{folder} holds {name}, which no run has left there, and this run would {change} it: choose another '
        f'--experiment, or move {name}'
    )


def find_resume(resume: Optional[str], folder: Path) -> List[Path]:
    """The checkpoints to continue from, in the order to try them; none for a fresh start.

    A folder that holds a run, or what is left of one, is not overwritten, unless the run goes on from one of its own
    checkpoints.
    """
    found = checkpoints_in(folder)
    kept = (path for _, path in kept_in(folder) if path not in found)
    left = [*found, *(folder / f'{name}.safetensors' for name in ('last', 'model_best')), *kept]
    left = [path for path in left if path.is_file() or path.is_symlink()]  # also one to a disk that is not there
    if not left:
        _check_others(folder)
    if resume and resume != 'auto':
        chosen = Path(resume)
        if not chosen.is_file():
            raise UserError(f'--resume {chosen}: no such checkpoint')
        if left and not is_of(chosen, folder):
            raise UserError(
                f'{folder} holds another run than --resume {chosen}, or one that went on from it: continue that with '
                f'--resume auto, or choose another --experiment'
            )
        return [chosen]
    if left and not found:
        raise UserError(
            f'{folder} holds {left[0].name} of a run, and no checkpoint to continue from: choose another --experiment'
        )
    if found and resume != 'auto':
        raise UserError(f'{folder} already holds a run: continue it with --resume auto, or choose another --experiment')
    if not found and resume == 'auto':
        log.info(f'no checkpoint in {folder} yet: starting fresh')
        if b' resuming from ' in _begun(folder):
            log.warning(f'warning: the run that began in {folder} went on from a file; --resume FILE again does so')
    return found


def is_of(path: Path, folder: Union[str, Path]) -> bool:
    """Whether a checkpoint is one of the folder's: there it may be a link to another disk, elsewhere one that leads
    there."""
    return Path(folder).resolve() in (path.parent.resolve(), path.resolve().parent)


def _epoch_named(name: str) -> Optional[int]:
    """The epoch in the name of one of the best few checkpoints, None of another name."""
    kept = KEPT.fullmatch(name)
    return int(kept[1]) if kept else None


def kept_in(folder: Path) -> List[Tuple[int, Path]]:
    """(epoch, path) of the best few checkpoints in a folder, by epoch, the newest first: a copy may lose times."""
    found = ((_epoch_named(path.name), path) for path in folder.glob('checkpoint-*.pth.tar'))
    kept = [(epoch, path) for epoch, path in found if epoch is not None]
    return sorted(kept, key=lambda one: one[0], reverse=True)


def epoch_of(path: Path) -> Tuple[Optional[Tuple[Any, Any]], Dict[str, Any]]:
    """The epoch and metric of a checkpoint, and its content; None and nothing where it is not whole."""
    try:
        checkpoint = read_checkpoint(path)
    except UserError:
        return None, {}
    return (checkpoint.get('epoch'), checkpoint.get('metric')), checkpoint


def _epoch_told(path: Path) -> Optional[int]:
    """The epoch that a file of a run says, None where it does not. This is quick and judges no digest: it is for
    whether a file keeps its name, not for what goes on from it."""
    try:
        told = json.loads(metadata_of(path)['epoch']) if path.suffix == '.safetensors' else None
        told = load_checkpoint_metadata(str(path)).get('epoch') if path.suffix == '.tar' else told
    except Exception:  # each format has its own errors for a broken file
        return None
    return told if is_whole(told) else None


def digest_of(path: Path) -> str:
    """The digest that a file holds, whether it is right or not, or else that of its content."""
    return stored_digest(path) or file_digest(path)


def is_copy(one: Path, other: Path) -> bool:
    """Whether two files are the same, or one a copy of the other."""
    try:
        return one.samefile(other) or (other.is_file() and digest_of(one) == digest_of(other))
    except (OSError, ValueError):  # a link that leads nowhere, a file that may not be read, or one that is damaged
        return False


def files_from(folder: Path, epoch: int) -> List[Path]:
    """What a folder has of this epoch and later ones beside `last.pth.tar`."""
    names = (*BEST, 'last.safetensors', 'previous.pth.tar')
    found = [(_epoch_told(file), file) for name in names if (file := folder / name).exists()]
    return [file for told, file in [*found, *kept_in(folder)] if told is not None and told >= epoch]


def checkpoints_in(folder: Path) -> List[Path]:
    """A run's checkpoints, the newest first, and the best."""
    kept = [path for _, path in kept_in(folder) if path.is_file()]
    last, *others = (folder / f'{name}.pth.tar' for name in ('last', 'previous', 'model_best'))
    found = (last, others[0], *kept, others[1])
    return [path for path in found if path.is_file() or path.is_symlink()]  # also one to a disk that is not there


def furthest_whole(candidates: Sequence[Path]) -> Tuple[Path, Dict[str, Any], List[Path]]:
    """The last of the checkpoints to go on from, or where it is damaged or missing the whole one that comes furthest,
    with its content and those that are damaged, which a warning names.

    Raises:
        UserError: None is whole, or one may not be read, which may be whole.
    """
    found, damaged = _furthest(candidates)
    if found is None:
        raise damaged[candidates[-1]]
    for fault in damaged.values():
        log.warning(f'{fault}: going back to {found[0].name}')
    return (*found, [*damaged])


def _furthest(candidates: Sequence[Path]) -> Tuple[Optional[Tuple[Path, Dict[str, Any]]], Dict[Path, UserError]]:
    damaged: Dict[Path, UserError] = {}
    found: Optional[Tuple[Path, Dict[str, Any]]] = None
    for path in candidates:
        try:
            content = read_checkpoint(path)
        except UserError as error:
            if isinstance(error.__cause__, PermissionError):
                raise
            damaged[path] = error
            continue
        if found is None or _place(content) > _place(found[1]):
            found = path, content
        if path.name == 'last.pth.tar':
            break
    return found, damaged


def check_furthest(path: Path, checkpoint: Dict[str, Any], folder: Path) -> Dict[Path, UserError]:
    """The damaged checkpoints of a folder beside the one of its own that a run would go on from.

    Raises:
        UserError: `--resume auto` would go on from another one, and what follows from here would mix with that.
    """
    last = folder / 'last.pth.tar'
    if not is_of(path, folder) or (last.exists() and last.samefile(path)):
        return {}
    found, damaged = _furthest(checkpoints_in(folder))
    if found and not is_copy(found[0], path):
        epochs, update = _place(found[1])
        within = f', {update} updates' * bool(update)
        raise UserError(
            f'--resume {path}: the run in this folder goes on from {found[0].name} ({epochs} epochs{within}); do so '
            f'with --resume auto, or go on from this file in a folder of its own, with another --experiment'
        )
    return damaged


def _place(content: Dict[str, Any]) -> Tuple[int, int]:
    """The epoch and update at which a checkpoint goes on."""
    position = (content.get('saver') or {}).get('position') or {}
    return position.get('epoch', content.get('epoch', -1) + 1), position.get('update', 0)


def remedy(folder: Path, error: BaseException) -> str:
    """What to do after a write that failed in a run's folder."""
    if not folder.is_dir():
        return 'the folder is gone: bring it back with what was saved in it, and go on with --resume auto'
    try:
        saved = bool(checkpoints_in(folder))
    except OSError:  # such as too many open files; --resume auto finds what there is
        saved = True
    if saved:
        return f'what was saved before is whole: {mend_of(error)} and go on with --resume auto'
    return f'nothing was saved before: {mend_of(error)} and start again'
