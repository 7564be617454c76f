"""The steps of `make gpu`, and tools/sanitize.py where there is no GPU."""

import csv
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from programs import load_program

from evavit.bench.results import store_rows
from evavit.cli import benchmark
from evavit.errors import run_script


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    """tools/gpu.py in a folder of its own, with its commands recorded and not run; `fails` names those that fail."""
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    module = load_program('tools/gpu.py')
    module.commands, module.fails = {}, set()
    monkeypatch.setattr(module, 'WORK', tmp_path)
    monkeypatch.setattr(module.shutil, 'which', lambda name: f'/bin/{name}')

    def run(command, stdout, **kwargs):
        name = Path(stdout.name).stem
        module.commands[name] = command
        return SimpleNamespace(returncode=int(name in module.fails))

    def steps(*flags):
        module.commands.clear()
        monkeypatch.setattr(sys, 'argv', ['gpu.py', *flags, '--results-file', str(tmp_path / 'all' / 'rows.csv')])
        return module.main()

    monkeypatch.setattr(module, 'subprocess', SimpleNamespace(run=run, STDOUT=subprocess.STDOUT))
    module.call = steps
    return module


def test_steps_of_a_gpu_machine(gpu, capsys):
    store_rows(gpu.WORK / 'op.csv', [dict(bench='op', case='14x14', status='ok')])
    gpu.fails = {'test'}
    assert gpu.call() == 1
    assert list(gpu.commands)[:4] == ['test', 'sanitize', 'op', 'layer'] and list(gpu.commands)[-1] == 'page'
    assert set(gpu.commands) - {'test', 'sanitize', 'op', 'layer', 'page'} == {
        f'{name}_{mode}' for name in gpu.MODELS for mode in ('default', 'reduce-overhead')
    }
    with open(gpu.WORK / 'all' / 'rows.csv', newline='') as stream:
        assert [row['case'] for row in csv.DictReader(stream)] == ['14x14']

    gpu.fails = set()
    assert gpu.call('--steps', 'test', 'sanitize') == 0
    assert list(gpu.commands) == ['test']  # the one that failed
    assert gpu.call('--steps', 'models', '--models', 'tiny', '896', '--torchcompile', 'reduce-overhead') == 0
    assert set(gpu.commands) == {'tiny_reduce-overhead', '896_reduce-overhead'}
    assert 'done before' in capsys.readouterr().out


def test_its_benches_parse(gpu):
    assert gpu.call('--steps', 'op', 'layer', 'models') == 0
    assert all(command[1] == 'benchmark.py' for command in gpu.commands.values())
    parsed = {name: benchmark.parse(command[2:]) for name, command in gpu.commands.items()}
    assert all(args.resume and args.results_file.parent == gpu.WORK for args in parsed.values())
    assert len({args.results_file for args in parsed.values()}) == len(parsed)  # they run side by side
    models = {name: args for name, args in parsed.items() if name not in ('op', 'layer')}
    assert all(
        args.torchcompile == name.partition('_')[2] and args.bench == ['train', 'infer'] and args.lock
        for name, args in models.items()
    )
    assert {(args.model[0], *(args.img_size or [None])) for args in models.values()} == {
        ('eva_deit_tiny', None),
        ('eva_deit_small', None),
        ('eva_pvt_v2_b3', None),
        ('eva_deit_tiny_784', None),
        ('eva_deit_tiny_784', 448),
        ('eva_deit_tiny_784', 896),
    }


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
@pytest.mark.parametrize('program', ['tools/gpu.py', 'experiments/zoo_step/run.py'])
def test_results_that_cannot_be_are_a_line(gpu, program, tmp_path, monkeypatch, capsys):
    os.mkfifo(tmp_path / 'pipe.csv')
    (tmp_path / 'mine.csv').write_text('name,age\nA,3\n')
    for name, words in (('pipe.csv', 'it is no file'), ('mine.csv', 'has other columns')):
        if program == 'tools/gpu.py':
            monkeypatch.setattr(sys, 'argv', ['gpu.py', '--results-file', str(tmp_path / name)])
            assert gpu.main() == 2 and not gpu.commands
        else:
            assert run_script(load_program(program).main, ['--results-file', str(tmp_path / name)]) == 2
        err = capsys.readouterr().err
        assert words in err and err.startswith('error: ') and err.count('\n') == 1
    assert (tmp_path / 'mine.csv').read_text() == 'name,age\nA,3\n'
