"""Faults are one line, whatever is in the names and in the words of libraries."""

import errno
import io
import multiprocessing
import os
import re
import subprocess
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import unwritable
from safetensors import SafetensorError

from evavit.arguments import Parser
from evavit.cli import scripts
from evavit.errors import (
    ALONE,
    INTERRUPTED,
    MORE_MEMORY,
    PLACES,
    LocalError,
    SharedError,
    UserError,
    begun,
    end_now,
    launched,
    mend_of,
    one_line,
    printable,
    reason_of,
    run_script,
)
from evavit.training.distributed import start_process


def test_control_characters_are_written_out():
    name = 'a\x1b[2J\r\n\x00\x9b\u202e\udcff.png'
    assert printable(f'größe → 猫 {name}') == 'größe → 猫 a\\x1b[2J\\r\\n\\x00\\x9b\\u202e\\udcff.png'
    assert printable('plain, with ‘quotes’ and spaces') == 'plain, with ‘quotes’ and spaces'


def test_a_fault_is_one_line_whatever_a_file_is_called(capsys):
    def main(argv):
        raise UserError('two\nlines\x1b[31m: no such file')

    assert run_script(main) == 2
    assert capsys.readouterr().err == 'error: two\\nlines\\x1b[31m: no such file\n'


@pytest.mark.parametrize(
    'local_rank, kind, waits, told',
    [
        (0, UserError, [ALONE], 'error: rank 2: no such folder\n'),
        (1, UserError, [2 * ALONE], 'error: rank 2: no such folder\n'),
        (0, LocalError, [], 'error: no such folder\n'),
        (0, SharedError, [], ''),
    ],
)
def test_a_fault_that_another_process_has_not_met(local_rank, kind, waits, told, monkeypatch, capsys):
    """A launcher ends a process within that time, if the first one has met it too."""
    slept, codes = [], []
    for name, value in dict(LOCAL_RANK=local_rank, RANK=2, WORLD_SIZE=4).items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr('time.sleep', slept.append)
    monkeypatch.setattr('os._exit', codes.append)

    def main(argv):
        raise kind('no such folder')

    run_script(main)
    assert capsys.readouterr().err == told and slept == waits and codes == [2]


def test_ctrl_c_is_a_line(capsys):
    def main(argv):
        raise KeyboardInterrupt

    assert run_script(main) == INTERRUPTED == 130 and capsys.readouterr().err == 'error: interrupted\n'


def test_a_process_that_is_stuck_ends_without_standard_error(monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, 'write', full)
    monkeypatch.setattr(os, '_exit', sys.exit)
    with pytest.raises(SystemExit, match='143'):
        end_now(143, 'SIGTERM for the second time')


def _start(path):
    with subprocess.Popen(['sleep', '600'], close_fds=True) as started:
        path.with_suffix('.new').write_text(str(started.pid))
        path.with_suffix('.new').rename(path)


@pytest.mark.skipif(not Path('/proc/self/task').exists(), reason='Linux alone says what a process started')
def test_what_a_loading_process_started_ends_with_it(monkeypatch, tmp_path):
    """Such as curl, which would hold the streams of a run that has ended."""
    worker = multiprocessing.Process(target=_start, args=(tmp_path / 'pid',))
    worker.start()
    while not (tmp_path / 'pid').exists():
        time.sleep(0.01)
    monkeypatch.setattr(os, '_exit', sys.exit)
    with pytest.raises(SystemExit, match='75'):
        end_now(75, 'no image came')
    worker.join()
    place = Path('/proc', (tmp_path / 'pid').read_text(), 'stat')
    for _ in range(500):
        if not place.exists() or place.read_text().split()[2] == 'Z':
            return
        time.sleep(0.01)
    pytest.fail('it still runs')


def test_a_full_disk_is_a_line(tmp_path, capsys):
    """Whatever program meets it, with whatever file; a file that is missing is a fault of the program."""

    def main(argv):
        raise OSError(number, os.strerror(number), 'x.csv')

    number = errno.ENOSPC
    assert run_script(main) == 2
    line = f'error: x.csv: cannot be written (the disk is full: {os.strerror(errno.ENOSPC)})\n'
    assert capsys.readouterr().err == line
    number = errno.ENOENT
    with pytest.raises(FileNotFoundError):
        run_script(main)


@pytest.mark.parametrize(
    'fault, told',
    [
        (lambda: torch.empty(2**50), 'tried to allocate 4503599627370496 bytes'),
        (lambda: np.zeros(2**55, np.uint8), 'Unable to allocate 32.0 PiB'),
        (lambda: _raise(torch.OutOfMemoryError('CUDA out of memory. Tried 2 GiB.\nmore')), 'Tried 2 GiB.):'),
        (lambda: _raise(RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling')), 'ALLOC_FAILED'),
        (lambda: _raise(Exception('[ONNXRuntimeError] : 6 : Failed to allocate memory for requested')), 'requested):'),
        (lambda: _raise(MemoryError()), '(MemoryError):'),
    ],
)
def test_no_memory_is_a_line(fault, told, capsys):
    """Of the CPU or a GPU, whoever asks for it; other errors of the same kinds are faults of the program."""
    for remedy, given in (MORE_MEMORY, {}), ('lower -n', dict(no_memory='lower -n')):
        assert run_script(lambda argv: fault(), **given) == 2
        err = capsys.readouterr().err
        assert err.startswith('error: no memory is left (') and told in err and err.count('\n') == 1, err
        assert err.endswith(f': {remedy}\n')
    for other in (RuntimeError('shapes differ'), ValueError('none'), Exception('none')):
        with pytest.raises(type(other), match=str(other)):
            run_script(lambda argv, other=other: _raise(other))


@pytest.mark.parametrize('name', ['train', 'validate', 'inference', 'export'])
def test_the_line_on_memory_names_flags_of_the_program(name, monkeypatch, capsys):
    monkeypatch.setattr(f'evavit.cli.{name}.main', lambda argv: _raise(MemoryError()))
    monkeypatch.setattr(sys, 'argv', [name])
    try:
        assert getattr(scripts, name)() == 2
    finally:
        begun()  # train.py's own signals
    flags = re.findall(r'\((-[-a-z]+)\)', capsys.readouterr().err)
    monkeypatch.setattr(sys, 'argv', [name, '--help'])
    with pytest.raises(SystemExit):
        scripts._list_flags(name)
    told = capsys.readouterr().out
    assert flags == ['-b', '--img-size'] and all(f' {flag} ' in told for flag in flags)


def _raise(error):
    raise error


def test_a_terminal_without_a_character_is_shown_its_code(monkeypatch):
    content = io.BytesIO()
    monkeypatch.setattr('sys.stdout', io.TextIOWrapper(content, encoding='ascii', write_through=True))
    assert run_script(lambda argv: print('2 × 3')) == 0
    assert content.getvalue() == b'2 \\xd7 3\n'


@pytest.mark.parametrize('kind', ['full', 'broken'])
def test_a_script_goes_on_where_standard_output_takes_no_more(kind, monkeypatch, capsys):
    """Each line of it fails, or the last flush; a file that cannot be written is still a fault."""
    number = unwritable(kind)

    def main(argv):
        for _ in range(9):
            print('a line', flush=True)
        done.append(sys.stdout.isatty())
        print('the rest')
        if argv:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), 'x.csv')

    for argv, code, told in (([], 0, []), (['x'], 2, ['error: x.csv: cannot be written'])):
        done = []
        with os.fdopen(os.dup(number), 'w') as stream:
            monkeypatch.setattr('sys.stdout', stream)
            assert run_script(main, argv) == code and done == [False]
        lines = capsys.readouterr().err.splitlines()
        expected = ['warning: standard output is not written any more (', *told]
        assert len(lines) == len(expected), lines
        assert all(line.startswith(words) for line, words in zip(lines, expected, strict=True)), lines
    os.close(number)


class Fails(torch.utils.data.Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise LocalError('two\nlines: cannot be read')


def test_a_fault_of_a_loading_process_comes_without_its_traceback():
    with pytest.raises(LocalError) as error:
        next(iter(torch.utils.data.DataLoader(Fails(), num_workers=1)))
    assert str(error.value).startswith('Caught') and one_line(error.value) == 'two\\nlines: cannot be read'
    traceback.clear_frames(error.tb)  # ends the loading process; the garbage collector would wait 5 seconds for it


@pytest.mark.parametrize(
    'variables, told',
    [
        (dict(RANK='abc'), 'RANK=abc in the environment is no whole number'),
        (dict(LOCAL_RANK='x\n'), 'LOCAL_RANK=x\\n in the environment is no whole number'),
        (dict(SLURM_NTASKS='', SLURM_PROCID='0'), 'SLURM_NTASKS= in the environment is no whole number'),
        (dict(WORLD_SIZE='-2'), 'WORLD_SIZE=-2 in the environment is no whole number'),
        (dict(WORLD_SIZE='1e3'), 'WORLD_SIZE=1e3 in the environment is no whole number'),
        (dict(WORLD_SIZE='0'), 'RANK=unset, WORLD_SIZE=0 in the environment'),
        (dict(WORLD_SIZE='2', RANK='2'), 'RANK=2, WORLD_SIZE=2 in the environment'),
        (dict(WORLD_SIZE='2', RANK='1', LOCAL_RANK='5'), 'LOCAL_RANK=5, RANK=1, WORLD_SIZE=2 in the environment'),
    ],
)
def test_a_launcher_s_variables_that_cannot_be_are_a_line(monkeypatch, capsys, variables, told):
    for name in sum(PLACES, ()):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert run_script(lambda argv: pytest.fail('the script must not start')) == 2
    err = capsys.readouterr().err
    assert err.startswith('error: ') and told in err and err.count('\n') == 1 and 'unset' in err, err


def test_a_launcher_s_variables_are_read(monkeypatch):
    for name in sum(PLACES, ()):
        monkeypatch.delenv(name, raising=False)
    assert launched() == (0, 0, 1)
    for name, value in dict(SLURM_LOCALID='1', SLURM_PROCID='5', SLURM_NTASKS='8').items():
        monkeypatch.setenv(name, value)
    assert launched() == (1, 5, 8)


def test_a_launcher_without_a_place_to_meet(monkeypatch):
    """As where a script for sbatch starts Python itself."""
    for name in (*sum(PLACES, ()), 'MASTER_ADDR', 'MASTER_PORT'):
        monkeypatch.setenv(name, '')  # so that what timm sets is undone
        monkeypatch.delenv(name)
    for name, value in dict(SLURM_LOCALID='0', SLURM_PROCID='0', SLURM_NTASKS='4').items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match='MASTER_ADDR expected, but not set; start 4 processes with torchrun or srun'):
        start_process('cpu')


def test_the_reason_of_a_failed_write():
    full, text = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), os.strerror(errno.ENOSPC)
    try:
        try:
            raise full
        except OSError:
            raise RuntimeError('[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598')  # noqa: B904
    except RuntimeError as error:
        covered = error
    over_quota = SafetensorError(f'Error while serializing: I/O error: ... (os error {errno.EDQUOT})')
    told = OSError(f'the disk is full: {os.strerror(errno.EDQUOT)}')
    told.__cause__ = over_quota  # as of `disk_errors`
    assert {mend_of(error) for error in (full, covered, over_quota, told)} == {'make room'}
    large = RuntimeError('[enforce fail at inline_container.cc:659] . unexpected pos 64 vs 0')
    large.__context__ = OSError(errno.EFBIG, os.strerror(errno.EFBIG))
    for error, reason in (
        (large, os.strerror(errno.EFBIG)),
        (full, f'the disk is full: {text}'),
        (covered, f'the disk is full: {text}'),
        (over_quota, f'the disk is full: {os.strerror(errno.EDQUOT)}'),
        (PermissionError(errno.EACCES, 'Permission denied'), 'Permission denied'),
        (SafetensorError('I/O error: Permission denied (os error 13)'), 'I/O error: Permission denied (os error 13)'),
        (RuntimeError('of another\nkind'), 'of another kind'),
        (RuntimeError(), 'RuntimeError'),
    ):
        assert reason_of(error) == reason


@pytest.mark.timeout(10)
def test_an_error_that_is_its_own_cause():
    error = OSError(errno.ENOSPC, 'No space left on device')
    error.__cause__ = UserError('in other words')
    error.__cause__.__context__ = error
    assert reason_of(error.__cause__) == f'the disk is full: {os.strerror(errno.ENOSPC)}'


@pytest.mark.parametrize(
    'kind, text', [(int, '２'), (int, '2_0'), (int, ' 2'), (float, '０.５'), (float, 'nan'), (float, '1e999')]
)
def test_numbers_of_flags_are_finite_and_of_plain_digits(kind, text):
    parser = Parser()
    parser.add_argument('--n', type=kind)
    assert parser.parse_args(['--n', '20']).n == 20
    with pytest.raises(UserError, match=f'argument --n: invalid {kind.__name__} value'):
        parser.parse_args(['--n', text])
