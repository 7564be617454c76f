"""Faults that a user can mend end in one line and exit code 2: a missing folder, a misspelt key, a loss that is NaN.

A run that a signal asked to stop ends with `PREEMPTED` instead: its state is saved, and the same command resumes it.
"""

import errno
import io
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import traceback
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Callable, Iterator, NoReturn, Optional, Sequence, Set, TextIO, Tuple, cast

INTERRUPTED = 130  # as a shell has it for Ctrl-C
PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: try again later
ALONE = 3.0  # seconds after which a process takes a fault for its own, where a launcher has not ended it by then
PLACES = (  # what launchers call a process's place in a run; timm reads the first that is set of each line
    ('LOCAL_RANK', 'MPI_LOCALRANKID', 'SLURM_LOCALID', 'OMPI_COMM_WORLD_LOCAL_RANK'),
    ('RANK', 'PMI_RANK', 'SLURM_PROCID', 'OMPI_COMM_WORLD_RANK'),
    ('WORLD_SIZE', 'PMI_SIZE', 'SLURM_NTASKS', 'OMPI_COMM_WORLD_SIZE'),
)


class UserError(Exception):
    """A fault that the user can mend. The text is one line that names the value and the remedy.

    Most are found by all processes of a run, each for itself: the first one prints it. Another one prints it where it
    still lives after a while: what the first one meets ends all of them, so that one has not met it.
    """


class SharedError(UserError):
    """A fault that the processes have found together: the first one prints it."""


class LocalError(UserError):
    """A fault that one process alone may have met, such as an image that cannot be read: that process prints it."""


class Preempted(Exception):
    """A signal asked the run to stop, and it has saved its state. All processes raise it together."""


def printable(text: str) -> str:
    """Text on one line that a terminal only shows: control characters, as in a file's name, become \\x1b, \\n, …"""
    return ''.join(char if char.isprintable() else char.encode('unicode_escape').decode() for char in text)


def encodable(text: str) -> str:
    """Text that any file or terminal takes: a name of a file or folder may be none of Unicode."""
    return text.encode(errors='backslashreplace').decode()


def one_line(error: BaseException) -> str:
    """An exception's text, without the traceback that a data loader's worker puts before it."""
    text = str(error)
    if text.startswith('Caught ') and '\nOriginal Traceback' in text:
        text = text.rpartition(f'\n{type(error).__module__}.{type(error).__name__}: ')[2]
    return printable(text.strip()) or type(error).__name__


def first_line(error: BaseException) -> str:
    """The whole text of a library's exception, joined to one line; the exception's name where it has no text. That of
    a KeyError may be the key alone."""
    text = ' '.join(str(error).split()) or type(error).__name__
    return f'it has no {text}' if isinstance(error, KeyError) and ' ' not in text else text


FULL = {getattr(errno, name) for name in ('ENOSPC', 'EDQUOT') if hasattr(errno, name)}  # Windows lacks EDQUOT
MANY_FILES = {errno.EMFILE, errno.ENFILE}
MANY_WORDS = 'Too many open files'
MORE_FILES = 'raise the number of open files (ulimit -n 65536)'


def _numbers(error: BaseException) -> Set[int]:
    """The system's numbers of an error and of those that it came from."""
    numbers, seen = set(), set()
    fault: Optional[BaseException] = error
    while fault is not None and id(fault) not in seen:  # one that is raised twice may be its own cause
        told = re.search(r'os error (\d+)', str(fault))  # safetensors tells the system's number as text
        numbers.add(getattr(fault, 'errno', None) or int(told[1] if told else 0))  # PyTorch's own covers the system's
        seen.add(id(fault))
        fault = fault.__cause__ or fault.__context__
    return numbers


def reason_of(error: BaseException) -> str:
    """Why a file could not be read or written: the system's words, or the first 200 characters of the library's."""
    numbers = _numbers(error)
    if full := FULL & numbers:
        return f'the disk is full: {os.strerror(full.pop())}'
    if errno.EFBIG in numbers:
        return os.strerror(errno.EFBIG)
    if numbers & MANY_FILES:
        return f'{MANY_WORDS}, see ulimit -n'
    return getattr(error, 'strerror', None) or first_line(error)[:200]


def mend_of(error: BaseException) -> str:
    """What to do so that a file can be written the next time."""
    numbers = _numbers(error)
    return 'make room' if numbers & {*FULL, errno.EFBIG} else MORE_FILES if numbers & MANY_FILES else 'mend that'


NO_MEMORY = re.compile(  # the words of Python, PyTorch, CUDA's libraries, C++ and onnxruntime
    "[^\n]*(out of memory|can't allocate memory|not enough memory|Unable to allocate|Cannot allocate memory|"
    'Failed to allocate memory|ALLOC_FAILED|bad_alloc|bad allocation)[^\n]*'
)


SMALLER = 'lower the batch size (-b) or the image size (--img-size)'  # in programs that have these flags
MORE_MEMORY = 'end other programs, or take a machine with more'  # in those that have nothing to lower


def _no_memory(error: Exception, remedy: str) -> Optional[LocalError]:
    """One line where memory was asked for, of the CPU or a GPU, and there is none; else None."""
    found = NO_MEMORY.search(str(error))
    if not (found or isinstance(error, MemoryError)):
        return None
    told = ' '.join(found[0].split()) if found else first_line(error)
    return LocalError(f'no memory is left ({told[:200]}): {remedy}')


# A path of the user's that leads nowhere: through a closed folder, one that is a file, links in a circle, ….
PATHS = {getattr(errno, name) for name in ('EACCES', 'EPERM', 'EROFS', 'ENAMETOOLONG', 'ELOOP', 'ENOTDIR')}


def _expected(error: Exception, no_memory: str) -> Optional[LocalError]:
    """One line on what is raised where a loading process is lost, memory or a disk is full, no more files can be
    opened, or a path cannot be followed; None of other errors."""
    lost = _lost_worker(error) if isinstance(error, (RuntimeError, OSError, EOFError)) else None
    if lost or (lost := _no_memory(error, no_memory)):
        return lost
    if isinstance(error, OSError) and error.errno in FULL:
        return LocalError(f'{error.filename or "a file"}: cannot be written ({reason_of(error)})')
    if isinstance(error, (RuntimeError, OSError)) and (_numbers(error) & MANY_FILES or MANY_WORDS in str(error)):
        return LocalError(f'{MANY_WORDS}: {MORE_FILES}, or lower --workers')
    if isinstance(error, OSError) and error.errno in PATHS and error.filename is not None:
        return LocalError(f'{str(error.filename)[:500]}: cannot be reached ({error.strerror})')
    return None


def _lost_worker(error: Exception) -> Optional[LocalError]:
    """What PyTorch raises where a loading process, or another process of the run, is lost, as one line.

    A process that dies while it hands over a batch shows as a broken connection. The error of a worker that lives comes
    from there too, as a text that begins with 'Caught'.
    """
    text, remedy = first_line(error), 'where the system ran out of memory, lower --workers or -b'
    if 'Bus error' in text:
        remedy = 'its shared memory is full; enlarge /dev/shm (docker run --shm-size=8g), or give --workers 0'
    if MANY_WORDS in text:
        remedy = f'{MORE_FILES}, or lower --workers'
        text = text.partition(MANY_WORDS)[0] + MANY_WORDS  # without the advice of PyTorch
    if text.startswith(('DataLoader worker', 'Pin memory thread')):
        return LocalError(f'{text.split(" It is possible")[0].rstrip(". ")}: {remedy}')
    places = {
        (frame.f_globals.get('__name__'), frame.f_code.co_name) for frame, _ in traceback.walk_tb(error.__traceback__)
    }
    if ('torch.utils.data.dataloader', '_try_get_data') in places and not text.startswith('Caught '):
        return LocalError(f'DataLoader worker lost while it handed over a batch ({text[:200]}): {remedy}')
    if ('torch.utils.data.dataloader', '_get_iterator') in places:
        return LocalError(f'--workers: loading processes do not start ({text[:200]}); lower it, or give 0')
    if _in_a_group() and re.search('Connection (closed|reset) by peer|Broken pipe|Socket closed', text):
        told = text.partition('. ')[0][-100:]  # gloo adds advice
        return LocalError(
            f'another process of this run has ended, and tells the reason itself unless it was killed ({told})'
        )
    return None


def launched() -> Tuple[int, int, int]:
    """(local rank, rank, number of processes) as a launcher set them in the environment, (0, 0, 1) without one.
    UserError where they cannot be meant."""
    from timm.utils import world_info_from_env  # here: --help needs neither it nor PyTorch, which take seconds to load

    named = [next((name for name in names if name in os.environ), names[0]) for names in PLACES]
    for name in named:
        if not re.fullmatch('[0-9]{1,9}', os.environ.get(name, '0')):
            raise UserError(
                f'{name}={os.environ[name][:40]} in the environment is no whole number; a launcher such as torchrun '
                f'sets it, alone a script needs none: unset it'
            )
    local_rank, rank, world_size = world_info_from_env()
    if not 0 <= max(local_rank, rank) < world_size:
        shown = ', '.join(f'{name}={os.environ.get(name, "unset")}' for name in named)
        raise UserError(
            f'{shown} in the environment: of N processes the ranks are 0 to N - 1, and N is at least 1; a launcher '
            f'such as torchrun sets them, alone a script needs none: unset them'
        )
    return local_rank, rank, world_size


def _interrupted(*_: Any) -> NoReturn:
    os._exit(INTERRUPTED)


def _not_begun(*_: Any) -> NoReturn:
    with suppress(OSError):
        os.write(2, b'asked to stop before the run began: nothing is saved; the same command begins it\n')
    os._exit(PREEMPTED)


def quiet_start(program: Optional[str]) -> None:
    """While libraries load Ctrl-C ends a program at once, where NumPy makes an ImportError of a KeyboardInterrupt, and
    SIGTERM and SIGUSR1 end train.py with PREEMPTED. What ignores a signal, as nohup does, still does."""
    elsewhere = threading.current_thread() is not threading.main_thread() or multiprocessing.parent_process()
    if program is None or elsewhere:  # no program of ours, or a thread or process that its signals are not for
        return
    for name in ('SIGINT', *(('SIGTERM', 'SIGUSR1') if program == 'train' else ())):
        number = getattr(signal, name, None)  # Windows lacks SIGUSR1
        if number and signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, _interrupted if name == 'SIGINT' else _not_begun)


def loaded() -> None:
    """From here on Ctrl-C is a KeyboardInterrupt."""
    if signal.getsignal(signal.SIGINT) is _interrupted:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def begun() -> None:
    """From here on SIGTERM and SIGUSR1 are for `SignalHandler`, and do as usual after it."""
    for name in ('SIGTERM', 'SIGUSR1'):
        number = getattr(signal, name, None)
        if number and signal.getsignal(number) is _not_begun:
            signal.signal(number, signal.SIG_DFL)


def end_now(code: int, line: str) -> NoReturn:
    """Print the line and end this process and its loading processes, from any thread: the main one may be stuck."""
    with suppress(OSError):  # of a standard error that takes no more
        os.write(2, f'error: {printable(line)}\n'.encode(errors='replace'))
    for child in multiprocessing.active_children():
        with suppress(OSError, ValueError):  # what it started, such as curl, would hold our streams open (Linux alone)
            for started in Path('/proc', str(child.pid), 'task', str(child.pid), 'children').read_text().split():
                os.kill(int(started), signal.SIGKILL)
        child.kill()
    os._exit(code)


@contextmanager
def _quiet_children() -> Iterator[None]:
    """PyTorch raises an error in the handler of SIGCHLD, which must not interrupt what is told of the first one."""
    if not hasattr(signal, 'SIGCHLD') or threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, handler)


def _tell_thread(args: 'threading.ExceptHookArgs') -> None:
    """Of the threads that pin batches or write curves say nothing: the main thread meets what ends them, and tells."""
    thread = args.thread
    if thread is None or ('_pin_memory_loop' not in thread.name and type(thread).__name__ != '_AsyncWriterThread'):
        threading.__excepthook__(args)


class _Stdout:
    """Standard output that is given up where it takes no more: what a program does, and its exit code, do not depend on
    who reads it. Of files that a program writes the errors stay."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except OSError as error:
            _give_up_stdout(error)
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError as error:
            _give_up_stdout(error)


def print_anything() -> None:
    """Standard output takes what its encoding has no character for, as that of standard error. One that is closed leads
    nowhere, or the next file that is opened would take its number. One that takes no more is given up."""
    for name in ('stdout', 'stderr'):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, 'w'))  # noqa: SIM115  it stays open
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors='backslashreplace')
    if not isinstance(sys.stdout, _Stdout):
        sys.stdout = cast(Any, _Stdout(sys.stdout))  # to the end, as Python flushes it once more


def tell(line: str) -> None:
    """A line on standard error. One that takes no more, as it may be where standard output goes, leads nowhere from
    then on: what a program does and its exit code do not depend on who reads it."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        _lead_nowhere(sys.stderr)


def _give_up_stdout(error: BaseException) -> None:
    """Of a standard output that takes no more, as a full disk or a pipe that nobody reads: a line, and what else goes
    there is lost."""
    _lead_nowhere(sys.stdout)
    tell(f'warning: standard output is not written any more ({reason_of(error)})')


def _lead_nowhere(stream: TextIO) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _flush() -> None:
    """At its end Python would make another exit code of what cannot be written."""
    sys.stdout.flush()
    try:
        sys.stderr.flush()
    except OSError:
        _lead_nowhere(sys.stderr)


def run_script(
    main: Callable[[Optional[Sequence[str]]], None],
    argv: Optional[Sequence[str]] = None,
    no_memory: str = MORE_MEMORY,
) -> int:
    """Call `main(argv)`; the exit code is 0, 2 after one line on an expected fault, PREEMPTED after a signal that
    saves, INTERRUPTED after Ctrl-C where nothing is saved. `no_memory` is what to do where memory ends."""
    code, local_rank, rank, world_size = 0, 0, 0, 1
    threading.excepthook = _tell_thread
    print_anything()
    try:
        local_rank, rank, world_size = launched()
        main(argv)
    except Preempted as stop:
        code = PREEMPTED
        if rank == 0:
            tell(one_line(stop))
    except Exception as error:
        code = 2
        with _quiet_children():
            fault = error if isinstance(error, UserError) else _expected(error, no_memory)
            if fault is None:
                raise
            if rank and not isinstance(fault, (LocalError, SharedError)):
                time.sleep(ALONE if local_rank == 0 else 2 * ALONE)  # of a machine's processes one tells
                tell(f'error: rank {rank}: {one_line(fault)}')
            elif rank == 0 or isinstance(fault, LocalError):
                tell(f'error: {one_line(fault)}')
            if world_size > 1:
                # The other processes may wait for this one in a collective: leave without waiting for them,
                # torchrun then ends them.
                _flush()
                os._exit(code)
            # End the loading processes that are left, whose own end is no error. The garbage collector would first
            # close the queues by which they are told to end, and then wait 5 seconds for each.
            traceback.clear_frames(error.__traceback__)
    except KeyboardInterrupt:
        code = INTERRUPTED
        if rank == 0:
            tell('error: interrupted')
        if world_size > 1:
            os._exit(code)
    _flush()
    if _in_a_group():
        sys.modules['torch.distributed'].destroy_process_group()
    return code


def _in_a_group() -> bool:
    """Whether this process belongs to PyTorch's group of processes. --help does without PyTorch."""
    dist: Any = sys.modules.get('torch.distributed')
    return dist is not None and dist.is_initialized()
