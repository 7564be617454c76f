"""benchmark.py on a CPU: rows, checks, files, faults; and the arithmetic of what only a GPU reports."""

import csv
import math

import pytest
import torch
import torch.nn.functional as F
from runs import MODEL as TINY
from runs import QUICK

from evavit.bench import models as benchmarking
from evavit.bench.models import COLUMNS, Setting, bench_layer, bench_model, bench_op, is_done, store_rows, traffic

FEW = ['--device', 'cpu', '--repeats', '2', '--warmup', '1']
MODEL = 'eva_deit_tiny:depth=1:embed_dim=32:num_heads=2'


def read(path):
    with open(path, newline='') as stream:
        return list(csv.DictReader(stream))


@pytest.fixture
def bench(call, tmp_path):
    """bench(*flags) → (exit code, error lines, rows of the results file)."""

    def bench(*flags):
        path = tmp_path / 'new' / 'results.csv'
        try:
            code, _, err = call('benchmark', *FEW, '--results-file', path, *flags)
        except SystemExit as stop:  # a wrong result
            code, err = stop.code, ''
        return code, err, read(path) if path.exists() else []

    return bench


@pytest.mark.parametrize('kind', ['op', 'layer'])
def test_attention(bench, kind):
    code, err, rows = bench('--bench', kind, '--grid', '5', '8', '-b', '2', '--dim', '32', '--num-heads', '2')
    assert code == 0, err
    assert [(row['tokens'], row['backend']) for row in rows] == [
        ('25', 'plain'),
        ('25', 'sdpa'),
        ('64', 'plain'),
        ('64', 'sdpa'),
    ]
    for row in rows:
        assert row['status'] == 'ok' and row['width'] == '32' and row['amp_dtype'] == 'float32'
        assert 0 < float(row['error']) < 1e-5 and float(row['forward_ms']) > 0 and float(row['ms']) > 0
        assert row['device'] and row['torch'] == torch.__version__ and row['commit'] and row['date']
        assert row['peak_memory_mib'] == row['forward_of_copy'] == ''  # a GPU's columns


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_models(bench, dtype):
    code, err, rows = bench(
        '--bench', 'train', 'infer', '--model', 'eva_deit_tiny', '--img-size', '32', '-b', '2', '--amp-dtype', dtype
    )
    assert code == 0, err
    assert [(row['bench'], row['attention'], row['backend']) for row in rows] == [
        (kind, *contender) for kind in ('train', 'infer') for contender in (('eva', 'plain'), ('softmax', 'sdpa'))
    ]
    for row in rows:
        assert row['status'] == 'ok' and row['img_size'] == '32' and row['torchcompile'] == 'no'
        assert float(row['img_per_s']) == pytest.approx(2e3 / float(row['ms']), rel=1e-2, abs=0.06)
    assert rows[1]['model'] == 'deit_tiny_patch16_224:class_token=False:global_pool=avg'


def test_all_contenders_are_compiled(bench, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, 'compile', lambda model, mode: compiled.append((type(model).__name__, mode)) or model)
    code, err, rows = bench(
        '--bench', 'train', '--model', 'eva_deit_tiny', '--img-size', '32', '-b', '2', '--torchcompile', 'max-autotune'
    )
    assert code == 0, err
    assert [row['torchcompile'] for row in rows] == ['max-autotune'] * 2
    assert compiled == [('GridVisionTransformer', 'max-autotune'), ('VisionTransformer', 'max-autotune')]


def test_model_lists(bench, tmp_path):
    listed = tmp_path / 'models.txt'
    listed.write_text(f'{MODEL}\nresnet10t\n')
    code, err, rows = bench(
        '--bench', 'infer', '--model-list', listed, '--img-size', '32', '-b', '2', '--backend', 'plain'
    )
    assert code == 0, err
    assert [row['model'] for row in rows] == [MODEL]  # no softmax backend was asked for, and the ResNet has no other


def test_wildcards(call):
    code, out, _ = call(
        'benchmark',
        *FEW,
        '--bench',
        'infer',
        '--model-list',
        'eva_deit_t*y,resnet10?',
        '-b',
        '1',
        '--img-size',
        '32',
        '--backend',
        'plain',
    )
    assert code == 0 and 'model eva_deit_tiny ' in out and 'eva_deit_small' not in out


def test_wrong_result_has_no_figures(bench, monkeypatch):
    attend = benchmarking.eva_attention
    monkeypatch.setattr(
        benchmarking,
        'eva_attention',
        lambda q, *args, **kwargs: attend(q if q.dtype == torch.float64 else 1.01 * q, *args, **kwargs),
    )
    code, _, rows = bench('--bench', 'op', '--grid', '5', '-b', '2', '--dim', '32', '--num-heads', '2')
    assert code == 1
    assert 'from float64' in rows[0]['status'] and float(rows[0]['error']) > 1e-3 and rows[0]['ms'] == ''
    assert rows[1]['status'] == 'ok' and rows[1]['ms']


def test_nan_is_a_wrong_result(bench, monkeypatch):
    monkeypatch.setattr(F, 'scaled_dot_product_attention', lambda q, k, v, **kwargs: q * float('nan'))
    code, _, rows = bench('--bench', 'layer', '--grid', '5', '-b', '2', '--dim', '32', '--num-heads', '2')
    assert code == 1 and [row['status'][:3] for row in rows] == ['ok', 'nan'] and rows[1]['forward_ms'] == ''


def test_resume_and_replace(bench, monkeypatch):
    flags = ['--bench', 'op', '--grid', '5', '-b', '2', '--dim', '32', '--num-heads', '2', '--backend', 'plain']
    monkeypatch.setenv('COMMIT', 'abc')
    _, _, first = bench(*flags)
    assert [row['commit'] for row in first] == ['abc']
    assert bench(*flags, '--resume')[2] == first
    monkeypatch.setenv('COMMIT', 'def')  # the code has changed
    assert [row['commit'] for row in bench(*flags, '--resume')[2]] == ['def']
    assert len(bench(*flags, '--dim', '16')[2]) == 2


def test_failures_are_measured_again(tmp_path):
    path = tmp_path / 'results.csv'
    row = dict(bench='op', case='5x5', tokens=25, device='cpu', commit='abc', status='2e-1 from float64')
    store_rows(path, [row])
    assert not is_done(path, row)
    store_rows(path, [dict(row, status='ok')])
    assert is_done(path, row) and len(read(path)) == 1 and not is_done(path, dict(row, tokens=36))
    assert tuple(read(path)[0]) == COLUMNS


BAD = {
    'unknown model': (['--model', 'eva_deit_tin'], ['eva_deit_tin', 'eva_deit_tiny']),
    'argument without a value': (['--model', 'eva_deit_tiny:depth'], ['depth', 'key=value']),
    'unknown argument of the model': (['--model', 'eva_deit_tiny:windows=3'], ['windows']),
    'images smaller than a patch': (['--model', 'eva_deit_tiny', '--img-size', '8'], ['eva_deit_tiny']),
    'no model of that pattern': (['--model-list', 'eva_resnet*'], ['eva_resnet*']),
    'no such device': (['--device', 'gpu'], ['gpu', 'cuda']),
    'device that is not measured': (['--device', 'meta'], ['meta', 'cuda']),
    'device that is not there': (['--device', 'cuda:64'], ['cuda:64', 'CUDA devices']),
    'kernels on a CPU': (['--bench', 'op', '--backend', 'triton'], ['triton', 'CUDA']),
    'heads that do not divide': (['--bench', 'op', '--num-heads', '5'], ['5', '192']),
    'no batch': (['-b', '0'], ['-b', '0']),
    'no such bench': (['--bench', 'speed'], ['speed', 'infer']),
    'unknown flag': (['--batches', '3'], ['--batches']),
    'resume of nothing': (['--resume'], ['--results-file']),
}


@pytest.mark.parametrize('fault', BAD)
def test_refuses(fault, call):
    flags, words = BAD[fault]
    code, _, err = call('benchmark', *FEW, '-b', '1', *flags)
    lines = err.splitlines()
    assert code == 2 and len(lines) == 1 and lines[0].startswith('error: '), err
    assert all(word in err for word in words), err


def test_foreign_results_file(call, tmp_path):
    path = tmp_path / 'results.csv'
    path.write_text('model,top1\na,1\n')
    code, _, err = call('benchmark', *FEW, '--bench', 'op', '--grid', '3', '-b', '1', '--results-file', path)
    assert code == 2 and str(path) in err and path.read_text() == 'model,top1\na,1\n'


def test_traffic_is_the_issue_of_bandwidth():
    """128 images of 784 tokens, 192 channels: 154 MB for q, k, v and o in half precision, twice that backward."""
    forward, backward = traffic(128, 784, 192, torch.bfloat16)
    assert forward == 154_140_672 and backward == 2 * forward
    assert traffic(128, 784, 192, torch.float32)[0] == 2 * forward


def test_fractions_of_a_copy():
    setting = Setting(torch.device('cpu'), torch.float32, ('plain',), repeats=2, warmup=0, copy_gb_per_s=10.0)
    (row,) = bench_op(setting, batch=2, side=5, heads=2, head_dim=16)
    forward, backward = traffic(2, 25, 32, torch.float32)
    assert row['forward_of_copy'] == pytest.approx(forward / (row['forward_ms'] * 1e-3) / 10e9, abs=1e-4)
    assert row['backward_of_copy'] == pytest.approx(
        backward / ((row['ms'] - row['forward_ms']) * 1e-3) / 10e9, abs=1e-4
    )
    assert row['copy_gb_per_s'] == 10.0


@pytest.fixture
def like_cuda(monkeypatch):
    """A CPU that goes the way of a CUDA device, with calls in place of graphs and a memory of 3 MiB."""
    monkeypatch.setattr(Setting, 'cuda', property(lambda self: True))
    monkeypatch.setattr(benchmarking, '_graphed', lambda call: (call(), call)[1])
    monkeypatch.setattr(benchmarking, '_peak_mib', lambda call, device: (call(), 3.0)[1])
    monkeypatch.setattr(torch.cuda, 'empty_cache', lambda: None)
    return Setting(torch.device('cpu'), torch.bfloat16, repeats=2, warmup=1, copy_gb_per_s=10.0)


@pytest.mark.parametrize('measure', [bench_op, bench_layer])
def test_contenders_of_a_gpu(like_cuda, measure):
    rows = {row['backend']: row for row in measure(like_cuda, 2, 5, 2, 16)}
    assert {name: row['status'] for name, row in rows.items()} == {
        'triton': 'not available',
        'plain': 'ok',
        'flash': 'ok',
        'cudnn': 'not available',
        'efficient': 'not available',
    }
    for row in (rows['plain'], rows['flash']):
        assert all(row[name] > 0 for name in ('forward_ms', 'ms', 'eager_forward_ms', 'eager_ms'))
        assert row['peak_memory_mib'] == 3.0 and row['copy_gb_per_s'] == 10.0
        assert ('forward_of_copy' in row) == (measure is bench_op)
    assert 'ms' not in rows['triton'] and 'error' not in rows['cudnn']


def test_forced_backends_of_models(like_cuda):
    like_cuda.backends = ('triton', 'plain', 'flash', 'cudnn')
    rows = bench_model(like_cuda, 'infer', 'eva_deit_tiny', 1, 32)
    assert [(row['attention'], row['backend'], row['status']) for row in rows] == [
        ('eva', 'triton', 'not available'),
        ('eva', 'plain', 'ok'),
        ('softmax', 'flash', 'ok'),
        ('softmax', 'cudnn', 'not available'),
    ]


def test_out_of_memory_is_said_and_is_a_failure(like_cuda, monkeypatch, tmp_path):
    def fails(self, alone):
        raise torch.OutOfMemoryError('CUDA out of memory')

    monkeypatch.setattr(Setting, 'turn', fails)
    rows = bench_op(like_cuda, 1, 5, 2, 16)
    assert {row['status'] for row in rows} == {'out of memory'}
    store_rows(tmp_path / 'rows.csv', [row | {'commit': 'abc'} for row in rows])
    assert not is_done(tmp_path / 'rows.csv', rows[0] | {'commit': 'abc'})


def test_clock_of_a_gpu(monkeypatch):
    """The median of as many calls as three seconds hold, each after the cache is emptied; at least ten."""
    now, log = [0.0], []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.time = now[0]

        def elapsed_time(self, end):
            return 1e3 * (end.time - self.time)

    class Scratch:
        def zero_(self):
            now[0] += 1.0
            log.append('flush')

    def call():
        now[0] += 0.25 if len(log) % 2 else 0.2
        log.append('call')

    monkeypatch.setattr(torch.cuda, 'Event', Event)
    monkeypatch.setattr(torch.cuda, 'synchronize', lambda: None)
    monkeypatch.setattr(torch, 'empty', lambda *args, **kwargs: Scratch())
    monkeypatch.setattr(benchmarking.time, 'perf_counter', lambda: now[0])
    assert benchmarking._cuda_seconds(call, repeats=30, warmup=2, flush=True) == pytest.approx(0.25)
    assert log == ['call'] * 2 + ['flush', 'call'] * 13  # 0.225 s each in the warm-up


def test_reference_in_blocks(monkeypatch):
    """The float64 reference of softmax, whatever the number of queries it takes at a time."""
    qkv = [torch.randn(2, 1, 9, 3, dtype=torch.double, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(benchmarking._Exact.apply, qkv)
    torch.testing.assert_close(benchmarking._Exact.apply(*qkv), F.scaled_dot_product_attention(*qkv))
    whole = torch.autograd.grad(benchmarking._Exact.apply(*qkv).square().sum(), qkv)
    monkeypatch.setattr(benchmarking, 'BLOCK_ELEMENTS', 2 * 1 * 9 * 2)
    blocks = torch.autograd.grad(benchmarking._Exact.apply(*qkv).square().sum(), qkv)
    assert len(list(benchmarking._Exact._weights(*qkv[:2]))) == 5
    torch.testing.assert_close(blocks, whole)


def test_turns(tmp_path):
    """With a lock file, work goes side by side and a measurement waits for all of it."""
    fcntl = pytest.importorskip('fcntl')
    setting = Setting(torch.device('cpu'), torch.float32, lock=tmp_path / 'lock')

    def can(kind):
        with open(setting.lock, 'a') as stream:
            try:
                fcntl.flock(stream, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
        return True

    with setting.turn(alone=False):
        assert can(fcntl.LOCK_SH) and not can(fcntl.LOCK_EX)
    with setting.turn(alone=True):
        assert not can(fcntl.LOCK_SH)
    assert can(fcntl.LOCK_EX)


def test_lock_of_a_run(bench, tmp_path, monkeypatch):
    turns = []
    turn = Setting.turn
    monkeypatch.setattr(Setting, 'turn', lambda self, alone: turns.append(alone) or turn(self, alone))
    code, err, rows = bench(
        '--bench', 'op', '--grid', '5', '-b', '1', '--dim', '32', '--num-heads', '2', '--lock', tmp_path / 'lock'
    )
    assert code == 0 and len(rows) == 2, err
    assert turns == [True, False, False, True, True]  # the copy, two checks, two columns

    turns.clear()  # models wait for nobody before they compile
    code, err, rows = bench('--bench', 'infer', '--model', MODEL, '--img-size', '32', '-b', '1', '--backend', 'plain')
    assert code == 0 and turns == [False, True], err


def test_worst_error():
    a, b = torch.ones(3, dtype=torch.double), torch.tensor([1.0, 1.0, 2.0], dtype=torch.double)
    assert benchmarking._worst_error([a, a], [a, b]) == pytest.approx(1 / math.sqrt(6))
    assert math.isnan(benchmarking._worst_error([a, a * float('nan')], [b, b]))


def test_batches_hold_one_number_of_tokens():
    """At least 28 × 28: within a third of one another (a batch is whole images)."""
    tokens = [side**2 * batch for side, batch in benchmarking.GRIDS.items() if side >= 28]
    assert all(100_000 <= count <= 131_072 for count in tokens)
    assert {14: 256, 28: 128, 56: 32, 112: 8}.items() <= benchmarking.GRIDS.items() and 256 in benchmarking.GRIDS


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
@pytest.mark.parametrize('kind', ['op', 'layer'])
def test_attention_on_a_gpu(call, tmp_path, kind):
    path = tmp_path / 'results.csv'
    code, _, err = call(
        'benchmark', '--bench', kind, '--grid', '14', '-b', '4', '--repeats', '3', '--results-file', path
    )
    rows = read(path)
    assert code == 0 and [row['backend'] for row in rows] == ['triton', 'plain', 'flash', 'cudnn', 'efficient'], err
    for row in rows:
        for column in ('forward_ms', 'ms', 'eager_forward_ms', 'eager_ms', 'peak_memory_mib'):
            assert float(row[column]) > 0
        for column in ('copy_gb_per_s', 'forward_of_copy', 'backward_of_copy'):
            assert (float(row[column]) > 0) if kind == 'op' else (row[column] == '')


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_models_on_a_gpu(call, tmp_path):
    path = tmp_path / 'results.csv'
    code, _, err = call(
        'benchmark',
        '--bench',
        'train',
        'infer',
        '--model',
        'eva_deit_tiny',
        '--img-size',
        '64',
        '-b',
        '4',
        '--repeats',
        '3',
        '--results-file',
        path,
    )
    rows = read(path)
    assert code == 0 and [row['backend'] for row in rows] == ['triton', 'sdpa'] * 2, err
    assert all(float(row['peak_memory_mib']) > 0 and float(row['img_per_s']) > 0 for row in rows)


def test_loader_and_step(call, images, tmp_path):
    """--bench data: rates of the loader alone, of the step alone, of both; a row for each number of workers."""
    flags = [
        *TINY,
        *QUICK,
        '--data-dir',
        images,
        '--num-classes',
        '3',
        '--seconds',
        '0.3',
        '--repeats',
        '1',
        '--workers-list',
        '0',
        '1',
        '--results-file',
        tmp_path / 'new' / 'data.csv',
    ]
    code, _, err = call('benchmark', '--bench', 'data', *flags)
    assert code == 0, err
    rows = read(tmp_path / 'new' / 'data.csv')
    assert [(row['bench'], row['workers'], row['batch_size'], row['images']) for row in rows] == [
        ('data', '0', '4', '24'),
        ('data', '1', '4', '24'),
    ]
    for row in rows:
        alone, step, both = (float(row[name]) for name in ('img_per_s', 'step_img_per_s', 'both_img_per_s'))
        assert min(alone, step, both) > 0 and 0 <= float(row['wait_share']) <= 100
        assert float(row['step_share']) == pytest.approx(100 * step / alone, rel=0.01)
    assert float(rows[0]['cpu_ms_per_img']) > 0 and not rows[1]['cpu_ms_per_img']
    (tmp_path / 'other.csv').write_text('a,b\n')
    code, _, err = call('benchmark', '--bench', 'data', *flags[:-1], tmp_path / 'other.csv', '--loader-only')
    assert code == 2 and 'other columns' in err and err.count('\n') == 1
