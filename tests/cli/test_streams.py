"""Standard output that is closed, full or broken, too few open files, and Ctrl-C while the libraries load."""

import os
import signal
import subprocess
import sys

import pytest
from runs import MODEL, PATIENCE, QUICK, ROOT, command_line, rows, unwritable, wait_for

resource = pytest.importorskip('resource')


def run(flags, **about):
    words, environment = command_line('train', *MODEL, *QUICK, '--epochs', '1', *flags)
    return subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True, **about)


@pytest.mark.parametrize('kind', ['closed', 'full', 'broken'])
def test_a_run_goes_on_without_standard_output(kind, images, tmp_path):
    """With one line, where it is full or nobody reads it any more."""
    flags, reader = ['--data-dir', images, '--output', tmp_path, '--experiment', 'run'], None
    if kind == 'closed':
        process = run(flags, preexec_fn=lambda: os.close(1))
    elif kind == 'full':
        with open('/dev/full', 'w') as full:
            process = run(flags, stdout=full)
    else:
        reader, writer = os.pipe()
        process = run(flags, stdout=writer)
        os.close(writer)
        os.close(reader)
    _, err = process.communicate(timeout=240 * PATIENCE)
    assert process.returncode == 0 and [row['epoch'] for row in rows(tmp_path / 'run')] == ['0'], err
    if kind == 'closed':
        assert not err
    else:
        assert err.startswith('warning: standard output is not written any more (') and err.count('\n') == 1


@pytest.mark.parametrize('kind', [pytest.param('full', marks=pytest.mark.slow), 'broken'])
def test_what_is_printed_changes_no_exit_code(kind, tmp_path):
    """Of benchmark.py all rows are stored, of a tool the folder is whole, as with `| head`; also in one flush at the
    end, as without PYTHONUNBUFFERED."""
    file, folder = tmp_path / 'bench.csv', tmp_path / 'digits'
    measure = '--bench op --grid 4 8 --window-size 2 --partition-grid 2 --repeats 1 --warmup 1 --device cpu'
    for program, flags in (
        ('benchmark', [*measure.split(), '--results-file', file]),
        (ROOT / 'tools' / 'build_digits.py', [folder]),
        (ROOT / 'tools' / 'build_digits.py', ['--help']),
    ):
        stream = unwritable(kind)
        line, environment = command_line(program, *flags, variables=dict(PYTHONUNBUFFERED='', PYTHONPATH=ROOT))
        done = subprocess.run(
            line, env=environment, stdout=stream, stderr=subprocess.PIPE, text=True, timeout=240 * PATIENCE
        )
        os.close(stream)
        assert done.returncode == 0, done.stderr
        assert done.stderr.startswith('warning: standard output is not written any more (')
        assert done.stderr.count('\n') == 1, done.stderr
    assert len(file.read_text().splitlines()) == 5 and len(list(folder.glob('*/*'))) == 20


@pytest.mark.parametrize('kind', [pytest.param('full', marks=pytest.mark.slow), 'broken'])
def test_a_run_goes_on_where_neither_stream_is_written(kind, images, tmp_path):
    """As with `> FILE 2>&1` on a disk that is full, or `2>&1 | head`. Exit codes are those of any run."""
    stream = unwritable(kind)
    flags = ['--output', tmp_path, '--experiment', 'run', '--data-dir']
    words, environment = command_line('train', *MODEL, *QUICK, *flags, images, '--epochs', '1000')
    process = subprocess.Popen(words, env=environment, stdout=stream, stderr=stream)
    wait_for(tmp_path / 'run' / 'last.safetensors', process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(240 * PATIENCE) == 75
    words, environment = command_line('train', *MODEL, *QUICK, *flags, tmp_path / 'none')
    wrong = subprocess.run(words, env=environment, stdout=subprocess.PIPE, stderr=stream, timeout=240 * PATIENCE)
    assert wrong.returncode == 2
    os.close(stream)


def test_too_few_open_files_are_a_line(images, tmp_path):
    flags = ['--data-dir', images, '--output', tmp_path, '--experiment', 'run', '--workers', '4']
    process = run(
        flags, stdout=subprocess.DEVNULL, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
    )
    _, err = process.communicate(timeout=240 * PATIENCE)
    assert process.returncode == 2 and err.count('\n') == 1, err
    assert err.startswith(
        'error: --workers 4 needs at least 48 open files, and the system allows 40; raise that (ulimit'
    )


@pytest.mark.parametrize('program', ['train', 'validate', 'inference', 'benchmark', 'export'])
@pytest.mark.parametrize('kind', ['clone', 'installed'])
def test_a_signal_while_the_libraries_load_is_quiet(kind, program, tmp_path):
    """Where NumPy would make an ImportError of Ctrl-C, and others an abort. A run that has not begun ends as others."""
    (tmp_path / 'torch.py').write_text("import time\nprint('loading', flush=True)\ntime.sleep(600)\n")
    script = ROOT / f'{program}.py'
    if kind == 'installed':
        script = tmp_path / f'evavit-{program}'
        script.write_text(f'import sys\nfrom evavit.cli.scripts import {program}\nsys.exit({program}())\n')
    asked = {signal.SIGINT: (130, '')}
    if program == 'train':
        told = 'asked to stop before the run began: nothing is saved; the same command begins it\n'
        asked |= {signal.SIGTERM: (75, told), signal.SIGUSR1: (75, told)}
    for number, (code, told) in asked.items():
        process = subprocess.Popen(
            [sys.executable, script],
            env={**os.environ, 'PYTHONPATH': f'{tmp_path}:{ROOT}'},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout.readline() == 'loading\n'
        process.send_signal(number)
        assert process.communicate(timeout=60 * PATIENCE) == ('', told) and process.returncode == code
