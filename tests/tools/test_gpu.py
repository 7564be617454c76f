"""The steps of `make gpu`, and tools/sanitize.py where there is no GPU."""

import contextlib
import csv
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from programs import ROOT, load_program

from evavit.bench.contenders import backend_names
from evavit.bench.results import store_rows
from evavit.cli import benchmark
from evavit.layers import ATTENTIONS


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    """tools/gpu.py in a folder of its own. Its commands are recorded; benchmark.py stores the rows of `answer`."""
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda: 'NVIDIA H200')
    module = load_program('tools/gpu.py')
    module.commands, module.fails, module.status = {}, set(), {}
    monkeypatch.setattr(module, 'work_folder', lambda: tmp_path)
    monkeypatch.setattr(module.shutil, 'which', lambda name: f'/bin/{name}')

    class Process:
        def __init__(self, command, **kwargs):
            name = Path(command[-1]).stem if command[1] == 'benchmark.py' else command[1]
            module.commands[name] = command
            self.code = int(name in module.fails)
            self.stdout = ['a warning\n', 'bench of a row\n']
            if command[1] == 'benchmark.py':
                status = module.status.get(name, 'ok')
                store_rows(Path(command[-1]), [dict(bench='op', case=name, status=status)])
                self.code |= status != 'ok'

        def wait(self):
            return self.code

    def steps(*flags):
        module.commands.clear()
        monkeypatch.setattr(sys, 'argv', ['gpu.py', *flags, '--results-folder', str(tmp_path / 'all')])
        return module.main()

    def run(command, **kwargs):
        module.commands[Path(command[1]).stem] = command
        return SimpleNamespace(returncode=0)

    names = dict(Popen=Process, run=run, PIPE=subprocess.PIPE, STDOUT=subprocess.STDOUT)
    monkeypatch.setattr(module, 'subprocess', SimpleNamespace(**names))
    module.call = steps
    return module


def cases(path):
    with open(path, newline='') as stream:
        return [row['case'] for row in csv.DictReader(stream)]


def test_steps_of_a_gpu_machine(gpu, capsys):
    """Every table has its file, what is done is not done again, and what failed is."""
    gpu.fails = {'host'}
    assert gpu.call() == 1
    names = list(gpu.commands)
    assert names[:2] == ['op', 'host'] and names[-3:] == ['tables', '-m', 'tools/sanitize.py']
    measured = [task.name for step in gpu.DEFAULT if step in gpu.TABLES for task in gpu.TABLES[step]]
    assert set(names[:-3]) == {name for name in measured if not name.endswith('784_default') or name[0] == '7'}
    files = {path.name for path in (gpu.work_folder() / 'all').iterdir()}
    assert files == {
        f'{name}_h200.csv' for name in ('op', 'models', 'modes', 'layer', 'op_cells', 'wide', 'peers', 'zoo')
    }
    out = capsys.readouterr().out
    assert 'minutes on an H200' in out and ' op: of a row\n' in out and 'host: exit code 1' in out

    gpu.fails = set()
    assert gpu.call('--steps', 'op', 'host', 'sanitize') == 0
    assert list(gpu.commands) == ['host']  # the one that failed
    assert gpu.call('--steps', 'models', '--only', '896_eva', 'pvt_eager') == 0 and not gpu.commands
    assert cases(gpu.work_folder() / 'all' / 'op_h200.csv') == ['op']
    assert len(cases(gpu.work_folder() / 'all' / 'models_h200.csv')) == len(gpu.TABLES['models'])
    assert 'op: done before' in capsys.readouterr().out


def test_rows_of_older_code_go(gpu):
    file = gpu.work_folder() / 'all' / 'op_h200.csv'
    store_rows(file, [dict(bench='op', case='older', status='ok')])
    assert gpu.call('--steps', 'op') == 0 and cases(file) == ['op']


def test_a_zoo_without_graphs_is_compiled_without_them(gpu):
    gpu.status = {'reformer_deit_tiny_784_reduce-overhead': 'RuntimeError: no graph'}
    assert gpu.call('--steps', 'zoo') == 0
    assert [name for name in gpu.commands if name.endswith('784_default')] == ['reformer_deit_tiny_784_default']
    found = cases(gpu.work_folder() / 'all' / 'zoo_h200.csv')
    assert 'reformer_deit_tiny_784_default' in found and 'reformer_deit_tiny_784_reduce-overhead' not in found


def test_rows_of_what_only_warms_go_nowhere(gpu):
    """The default mode is measured with nothing beside it, once its code is in the compiler's cache."""
    assert gpu.call('--steps', 'modes') == 0
    found = cases(gpu.work_folder() / 'all' / 'modes_h200.csv')
    assert found == [f'{size}_{mode}' for mode in ('eager', 'default') for size in ('pvt', 'small', '784', 'tiny')]
    default = [name for name in gpu.commands if name.endswith(('_warm', '_default'))]
    assert len(default) == 20 and default[-4:] == found[-4:]


def test_checks_are_done_anew_where_what_they_check_changed(gpu, monkeypatch):
    for digest, commands in (('one', ['-m', 'tools/sanitize.py']), ('one', []), ('two', ['-m', 'tools/sanitize.py'])):
        monkeypatch.setattr(gpu, 'digest_of', lambda parts, digest=digest: digest)
        assert gpu.call('--steps', 'test', 'sanitize') == 0 and list(gpu.commands) == commands


def test_a_file_is_replaced_once_its_table_is_whole(gpu, capsys):
    file, names = gpu.work_folder() / 'all' / 'models_h200.csv', [task.name for task in gpu.TABLES['models']]
    store_rows(file, [dict(bench='train', case='older', status='ok')])
    assert gpu.call('--steps', 'models', '--only', 'tiny_eva_train') == 0 and cases(file) == ['older']
    line = f'models_h200.csv stays as it is: {len(names) - 1} tasks of its table are left; rows are in '
    assert line in capsys.readouterr().out
    gpu.fails = {names[-1]}
    assert gpu.call('--steps', 'models') == 1 and cases(file) == ['older']
    gpu.fails = set()
    assert gpu.call('--steps', 'models') == 0 and cases(file) == names


def test_when_it_is_stopped(gpu, monkeypatch, capsys):
    def stopped(driver, tasks):
        driver.stop()
        return driver.measure(tasks[0])

    monkeypatch.setattr(gpu.Driver, 'measure_all', stopped)
    assert gpu.call('--steps', 'op', 'page') == 1 and not gpu.commands
    assert 'op: stopped before; the same line goes on' in capsys.readouterr().out
    assert not (gpu.work_folder() / 'all' / 'op_h200.csv').exists()  # a table of nothing is none


def test_a_page_that_is_not_made_says_so(gpu, monkeypatch, capsys):
    monkeypatch.setattr(gpu.Driver, 'until', lambda driver, _: driver.stop() or contextlib.nullcontext())
    assert gpu.call('--steps', 'page', '--seconds', '0') == 1 and not gpu.commands
    assert 'page: stopped before; the same line goes on' in capsys.readouterr().out


def test_a_name_of_no_task_is_a_line_and_leaves_no_folder(gpu, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(gpu, 'work_folder', lambda: tmp_path / 'work')
    assert gpu.call('--list', '--only', 'zzz') == 2
    assert capsys.readouterr() == ('', 'error: --only zzz: no task has such a name; --list names them\n')
    assert gpu.call('--list') == 0 and not (tmp_path / 'work').exists()
    assert gpu.call('--steps', 'op') == 0 and (tmp_path / 'work' / 'op.done').exists()


STOPPED = """
import sys
sys.path.insert(0, 'tests')
from pathlib import Path
import torch
from programs import load_program
gpu, folder = load_program('tools/gpu.py'), Path(sys.argv[1])
gpu.ROOT, gpu.work_folder = folder, lambda: folder
torch.cuda.is_available, torch.cuda.get_device_name = lambda: True, lambda: 'NVIDIA H200'
sys.argv = ['gpu.py', '--steps', 'op', 'host', '--results-folder', str(folder / 'all'), *sys.argv[2:]]
sys.exit(gpu.main())
"""
BENCHMARK = """
import shutil, subprocess, sys, time
shutil.copy('ready.csv', sys.argv[-1])
print('bench first', flush=True)
subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])  # as what compiles, it holds the output
time.sleep(600)
"""


@pytest.mark.parametrize('flags', [['--seconds', '3'], []])
def test_a_run_that_is_stopped_keeps_its_rows(tmp_path, flags):
    """With real processes, by the clock or by a signal: what was told before is kept, and nothing more begins."""
    (tmp_path / 'benchmark.py').write_text(BENCHMARK)
    store_rows(tmp_path / 'ready.csv', [dict(bench='op', case='first', status='ok')])
    start, lines = time.monotonic(), []
    command = [sys.executable, '-c', STOPPED, str(tmp_path), *flags]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            lines.append(line)
            if 'op: first' in line and not flags:
                process.terminate()
    assert process.returncode == 1 and time.monotonic() - start < 300
    assert any('host: stopped before' in line for line in lines) and any('op: not done' in line for line in lines)
    assert (tmp_path / 'op.log').read_text() == 'bench first\n' and not (tmp_path / 'op.done').exists()
    assert cases(tmp_path / 'op.csv') == ['first'] and not (tmp_path / 'all' / 'op_h200.csv').exists()


def test_its_benches_parse(gpu):
    assert gpu.call('--steps', *gpu.TABLES) == 0
    parsed = {name: benchmark.parse(command[2:]) for name, command in gpu.commands.items() if name != '-m'}
    assert all(args.resume and args.results_file.parent == gpu.work_folder() for args in parsed.values())
    assert len({args.results_file for args in parsed.values()}) == len(parsed)  # they run side by side
    for args in parsed.values():
        benchmark.find_models(args)
    assert {name for name, args in parsed.items() if args.lock} == {
        name for name, args in parsed.items() if args.torchcompile not in (None, 'default')
    } | {task.name for task in gpu.TABLES['modes'] if task.warms}
    models = {
        (model, args.batch_size, *(args.img_size or [None]), bench, args.torchcompile)
        for task in (*gpu.TABLES['models'], *gpu.TABLES['modes'])
        for args in [parsed[task.name]]
        for model in args.model
        for bench in args.bench
    }
    for bench in ('train', 'infer'):
        for mode in (None, 'default', 'reduce-overhead'):
            for size, batch in (('deit_tiny', 256), ('deit_tiny_784', 128), ('pvt_v2_b3', 128), ('deit_small', 256)):
                assert {(f'{kind}_{size}', batch, None, bench, mode) for kind in ('eva', 'softmax')} <= models
        for side, batch in ((448, 32), (896, 8)):
            assert ('eva_deit_tiny_784', batch, side, bench, 'reduce-overhead') in models
    zoo = [parsed[task.name] for task in gpu.TABLES['zoo'] if task.name in parsed]
    assert {f'{attention}_deit_tiny_784' for attention in ATTENTIONS} <= {
        model for args in zoo if args.torchcompile == 'reduce-overhead' for model in args.model
    }
    for step in ('op', 'layer', 'cells', 'peers'):
        assert not set(parsed[step].backend) - set(backend_names()) and 'plain' not in parsed[step].backend


def test_a_list_needs_no_gpu(gpu, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert gpu.call('--list') == 0 and not gpu.commands
    out = capsys.readouterr().out
    assert 'op: benchmark.py --bench op --grid 14' in out and 'convert_' not in out
    minutes = int(out.split('About ')[1].split()[0])
    assert 15 <= minutes <= 35  # of an H200


@pytest.mark.parametrize(
    'name, flags, line',
    [
        ('sanitize.py', [], 'error: no CUDA device'),
        (
            'gpu.py',
            ['--steps', 'op'],
            'error: no CUDA device here; --steps page needs none, make cpu-bench measures a CPU',
        ),
    ],
)
def test_without_a_gpu_they_say_so(name, flags, line, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(sys, 'argv', [name, *flags])
    assert load_program(f'tools/{name}').main() == 2
    assert capsys.readouterr().err == f'{line}\n'


@pytest.mark.timeout(60)
def test_results_that_cannot_be_are_a_line(gpu, tmp_path, capsys):
    folder = tmp_path / 'all'
    folder.mkdir()
    os.mkfifo(folder / 'op_h200.csv')
    (folder / 'host_h200.csv').write_text('name,age\nA,3\n')
    for step, words in (('op', 'it is no file'), ('host', 'has other columns')):
        assert gpu.call('--steps', step) == 2 and not gpu.commands
        err = capsys.readouterr().err
        assert words in err and err.startswith('error: ') and err.count('\n') == 1
    assert (folder / 'host_h200.csv').read_text() == 'name,age\nA,3\n'
