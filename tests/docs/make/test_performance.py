"""docs/performance.md: figures from rows, verdicts, plots that know their data; and the steps of `make gpu`."""

import csv
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from evavit.bench.models import COLUMNS, store_rows

ROOT = Path(__file__).resolve().parents[2]


def load(path):
    spec = importlib.util.spec_from_file_location(f'evavit_tools_{path.stem}', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def attention_row(bench, backend, tokens, ms, **more):
    return dict(
        bench=bench,
        backend=backend,
        attention='eva' if backend in ('triton', 'plain') else 'softmax',
        batch_size=100_352 // tokens,
        tokens=tokens,
        width=192,
        heads=3,
        amp_dtype='bfloat16',
        status='ok',
        case='x',
        forward_ms=ms / 4,
        ms=ms,
        **more,
    )


def model_row(bench, case, attention, speed, **more):
    return (
        dict(
            bench=bench,
            case=case,
            model=case,
            attention=attention,
            batch_size=8,
            img_size=224,
            status='ok',
            amp_dtype='bfloat16',
            torchcompile='default',
            img_per_s=speed,
            ms=8e3 / speed,
        )
        | more
    )


@pytest.fixture
def performance(tmp_path, monkeypatch):
    module = load(ROOT / 'tools' / 'performance.py')
    monkeypatch.setattr(module, 'ROOT', tmp_path)
    monkeypatch.setattr(module, 'PLOT', tmp_path / 'performance.svg')
    return module


def store(performance, rows, name='h100.csv'):
    for number, row in enumerate(rows):  # a comparison each
        row = dict.fromkeys(COLUMNS, '') | row | dict(device=f'H100 {number}')
        store_rows(performance.ROOT / 'results' / name, [row])


def figures(performance):
    return {
        what: (figure, performance.verdict(sense, goal, figure)) for what, sense, goal, figure, _ in performance.goals()
    }


def test_figures_of_the_goals(performance):
    store(
        performance,
        [
            attention_row('op', 'triton', 784, 0.5, forward_of_copy=0.61, backward_of_copy=0.499),
            attention_row('op', 'flash', 784, 1.5),
            attention_row('op', 'cudnn', 784, 1.25),
            attention_row('op', 'triton', 65536, 0.62),
            attention_row('op', 'efficient', 784, 0.1) | {'status': 'nan'},
            attention_row('layer', 'triton', 784, 1.0, peak_memory_mib=90),
            attention_row('layer', 'sdpa', 784, 1.3),
            attention_row('layer', 'flash', 784, 2.0, peak_memory_mib=100),
            model_row('train', 'eva_deit_tiny', 'eva', 9784),
            model_row('train', 'eva_deit_tiny', 'softmax', 10000),
            model_row('train', 'eva_deit_tiny', 'softmax', 20000, torchcompile='no'),
        ],
    )
    store(
        performance,
        [
            model_row('infer', 'eva_deit_tiny', 'eva', 10, torchcompile='no'),
            model_row('infer', 'eva_deit_tiny', 'softmax', 8, torchcompile='no'),
        ],
        'cpu.csv',
    )
    found = figures(performance)

    def of(*words):
        (line,) = [value for what, value in found.items() if all(word in what for word in words)]
        return pytest.approx(line[0], rel=1e-6), line[1]

    assert of('alone, forward +', ' 784 ') == (2.5, 'reached')  # the best backend, and no row that failed
    assert of('layer', ' 784 ', 'speed') == (1.3, '**short**')
    assert of('alone, forward,', ' 784 ') == (61, 'reached') and of('alone, backward,', ' 784 ') == (49.9, '**short**')
    assert of('memory', ' 784 ') == (0.9, 'reached')
    assert of('`eva_deit_tiny` at 224', 'training') == (0.9784, '**short**')  # compiled beside compiled
    assert of('`eva_deit_tiny`,', 'published') == (4.0, 'reached')
    tokens = 100_352 // 784 * 784, 100_352 // 65536 * 65536
    assert of('alone', 'per token')[0] == 100 * ((0.62 / tokens[1]) / (0.5 / tokens[0]) - 1)
    assert of('`eva_deit_tiny` on 2 CPU') == (0.8, 'reached')
    assert found["`eva_pvt_v2_b3` on 2 CPU cores, inference: time over timm's softmax model"] == (None, 'not measured')
    assert '| not measured |' in performance.reach() and ' lines: 5 reached, ' in performance.reach()


def test_nothing_measured(performance):
    assert {verdict for _, verdict in figures(performance).values()} == {'not measured'}
    assert performance.op() == performance.gpu_models() == performance.cpu_models() == 'Not measured yet.'


def test_tables(performance):
    store(
        performance,
        [
            attention_row('op', 'triton', 784, 0.5, forward_of_copy=0.61, backward_of_copy=0.499),
            attention_row('op', 'plain', 784, 5.0),
            model_row('train', 'eva_deit_tiny_784', 'eva', 3000, peak_memory_mib=2048, backend='triton'),
            model_row(
                'train',
                'eva_deit_tiny_784',
                'softmax',
                2000,
                peak_memory_mib=1024,
                model='deit_tiny_patch16_224:patch_size=8:class_token=False:global_pool=avg',
            ),
        ],
    )
    assert '| 128 × 784 | 0.125 / 0.500 | 1.250 / 5.000 | – | – | – | 61 % / 50 % |' in performance.op()
    assert (
        '| `eva_deit_tiny_784` | 224 | 8 | training, compiled | 3,000 | 2,000 | 1.50 | 2.0 | 1.0 | 993 | '
        '`deit_tiny_patch16_224:patch_size=8` |'
    ) in performance.gpu_models()


def test_the_mode_that_suits_eva_best(performance):
    store(
        performance,
        [
            model_row('train', 'eva_deit_tiny', which, speed, torchcompile=mode)
            for which, mode, speed in (
                ('eva', 'default', 3000),
                ('softmax', 'default', 4000),
                ('eva', 'reduce-overhead', 5000),
                ('softmax', 'reduce-overhead', 4500),
                ('eva', 'no', 9000),
                ('softmax', 'no', 100),
            )
        ],
    )
    (row,) = [line for line in performance.best_models().splitlines() if 'eva_deit_tiny' in line]
    assert '| training, compiled, CUDA graphs | 5,000 | 4,500 | 1.11 |' in row


def test_plot_knows_its_data(performance):
    pytest.importorskip('matplotlib')
    store(
        performance,
        [
            attention_row(bench, backend, tokens, 0.5, forward_of_copy=0.6, backward_of_copy=0.5, peak_memory_mib=100)
            for bench in ('op', 'layer')
            for backend in ('triton', 'flash')
            for tokens in (784, 12544)
        ],
    )
    assert not performance.plot_is_fresh()
    performance.draw()
    first = performance.PLOT.read_bytes()
    assert performance.plot_is_fresh()
    performance.draw()
    assert performance.PLOT.read_bytes() == first
    store(performance, [attention_row('op', 'triton', 784, 0.4)])
    assert not performance.plot_is_fresh()


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    """tools/gpu.py in a folder of its own, with its commands recorded and not run; `fails` names those that fail."""
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    module = load(ROOT / 'tools' / 'gpu.py')
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
    benchmark = load(ROOT / 'evavit' / 'cli' / 'benchmark.py')
    assert all(command[1] == 'benchmark.py' for command in gpu.commands.values())
    parsed = {name: benchmark.parse(command[2:]) for name, command in gpu.commands.items()}
    assert all(args.resume and args.results_file.parent == gpu.WORK for args in parsed.values())
    assert len({args.results_file for args in parsed.values()}) == len(parsed)  # they run side by side
    models = {name: args for name, args in parsed.items() if name not in ('op', 'layer')}
    assert all(
        args.torchcompile == name.partition('_')[2] and args.bench == ['train', 'infer'] and args.lock
        for name, args in models.items()
    )
    assert {(args.model[0], args.img_size) for args in models.values()} == {
        ('eva_deit_tiny', None),
        ('eva_deit_small', None),
        ('eva_pvt_v2_b3', None),
        ('eva_deit_tiny_784', None),
        ('eva_deit_tiny_784', 448),
        ('eva_deit_tiny_784', 896),
    }


def test_sanitize_needs_a_gpu():
    if torch.cuda.is_available():
        pytest.skip('a GPU is there')
    done = subprocess.run(
        [sys.executable, str(ROOT / 'tools' / 'sanitize.py')],
        capture_output=True,
        text=True,
        env={'PYTHONPATH': str(ROOT)},
    )
    assert done.returncode == 2 and done.stderr == 'error: no CUDA device\n'


def test_bench_refuses_a_results_file_before_it_measures(tmp_path):
    other = tmp_path / 'other.csv'
    other.write_text('a,b\n1,2\n')
    for path, message in [
        (tmp_path, 'cannot be written'),
        (other / 'mine.csv', 'cannot be written'),
        (other, 'has other columns'),
    ]:
        done = subprocess.run(
            [
                sys.executable,
                str(ROOT / 'benchmark.py'),
                '--bench',
                'op',
                '--device',
                'cpu',
                '--results-file',
                str(path),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stdout) == (2, '')
        assert done.stderr.startswith('error: ')
        assert f'{path} {message}' in done.stderr and done.stderr.count('\n') == 1
    assert other.read_text() == 'a,b\n1,2\n'


def test_gpu_steps_need_a_device():
    done = subprocess.run(
        [sys.executable, str(ROOT / 'tools' / 'gpu.py'), '--steps', 'op'],
        capture_output=True,
        text=True,
        env={**os.environ, 'CUDA_VISIBLE_DEVICES': ''},
        check=False,
    )
    assert done.returncode == 2
    assert 'no CUDA device here' in done.stderr
