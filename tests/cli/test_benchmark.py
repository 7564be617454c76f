"""benchmark.py on a CPU: rows, files, faults; and on a GPU."""

import csv
import os

import pytest
import torch
import torch.nn.functional as F
from runs import KWARGS, QUICK, words
from runs import MODEL as TINY

from evavit.bench import contenders
from evavit.bench.contenders import Setting
from evavit.bench.models import describe
from evavit.ops.eva import EVA

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


def test_the_host(bench):
    """The layers as they run, each with the backend that it takes by itself."""
    code, err, rows = bench('--bench', 'host', '-b', '2', '--dim', '32', '--num-heads', '2')
    assert (code, err) == (0, '')
    assert [(row['attention'], row['backend'], row['tokens'], row['status']) for row in rows] == [
        ('eva', 'plain', '196', 'ok'),
        ('softmax', 'sdpa', '196', 'ok'),
    ]
    assert all(float(row['forward_ms']) > 0 and float(row['ms']) > 0 for row in rows)


def test_attention_of_converted_networks(bench):
    """Other windows and cells, prefix tokens, a count: one number of cells for each grid, each with each prefix."""
    flags = words('--bench op --grid 5 8 --window-size 3 --partition-grid 2 4 --num-prefix-tokens 0 2 -b 1 --dim 32')
    code, err, rows = bench(*flags, *words('--num-heads 2 --count-cells outside'))
    assert code == 0, err
    columns = ('tokens', 'partition_grid', 'num_prefix_tokens', 'backend')
    assert [tuple(row[column] for column in columns) for row in rows] == [
        (tokens, cells, prefix, backend)
        for tokens, cells in (('25', '2'), ('64', '4'))
        for prefix in '02'
        for backend in ('plain', 'sdpa')
    ]
    for row in rows:
        assert row['window_size'] == '3' and row['count_cells'] == 'outside' and row['status'] == 'ok'
        assert float(row['error']) < 1e-5 and float(row['forward_ms']) > 0 and float(row['ms']) > 0
    assert len(bench(*flags, *words('--num-heads 2 --count-cells all'))[2]) == 16  # beside the others


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


BESIDE = {
    'eva_deit_tiny:patch_size=8:depth=1:embed_dim=32:num_heads=2:mlp_ratio=2:num_classes=5:window_size=2': (
        'deit_tiny_patch16_224:class_token=False:global_pool=avg:patch_size=8:depth=1:embed_dim=32:num_heads=2'
        ':mlp_ratio=2:num_classes=5'
    ),
    'eva_deit_tiny_784:depth=1:patch_size=None:class_token=True:count_cells=outside:noise_std=0': (
        'deit_tiny_patch16_224:class_token=True:global_pool=avg:patch_size=8:depth=1'
    ),
    'softmax_deit_tiny:attn_layer=eva:depth=1:partition_grid=2': (
        'deit_tiny_patch16_224:class_token=False:global_pool=avg:depth=1'
    ),
    'eva_pvt_v2_b3:depths=[1,1,1,1]:window_size=2': 'pvt_v2_b3:depths=[1, 1, 1, 1]',
}


@pytest.mark.parametrize('text', BESIDE)
def test_the_model_beside_a_model_has_its_arguments(bench, text):
    code, err, rows = bench('--bench', 'infer', '--model', text, '--img-size', '32', '-b', '1')
    assert (code, err) == (0, '')
    assert [(row['case'], row['attention'], row['status']) for row in rows] == [
        (text, 'eva', 'ok'),
        (text, 'softmax', 'ok'),
    ]
    assert rows[1]['model'] == BESIDE[text]


def test_a_model_that_does_not_take_an_argument_is_left_out(bench):
    text = 'eva_pvt_v2_b3:depths=[1,1,1,1]:dynamic_img_size=True'
    code, err, rows = bench('--bench', 'infer', '--model', text, '--img-size', '32', '-b', '1')
    assert code == 0 and [row['attention'] for row in rows] == ['eva']
    assert "timm's softmax model beside eva_pvt_v2_b3" in err and 'dynamic_img_size' in err.partition('left out: ')[2]
    assert err.count('\n') == 1


def test_all_contenders_are_compiled(bench, monkeypatch):
    compiled = []
    monkeypatch.setattr(
        torch,
        'compile',
        lambda model, mode, **kwargs: compiled.append((type(model).__name__, mode)) or model,
    )
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


def test_a_wrong_result_has_no_times(bench, monkeypatch):
    attend = contenders.eva_attention
    monkeypatch.setattr(
        contenders,
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


OP = words('--bench op --grid 5 -b 2 --dim 32 --num-heads 2')
INFER = ['--bench', 'infer', '--model', MODEL, *words('--img-size 32 -b 1')]


@pytest.mark.parametrize('flags', [OP, INFER])
def test_backends_that_a_file_lacks_are_measured(bench, flags, monkeypatch):
    """Beside those that it has of this commit; of another commit all rows of the comparison go."""
    monkeypatch.setenv('COMMIT', 'abc')
    (plain,) = bench(*flags, '--backend', 'plain')[2]
    rows = bench(*flags, '--backend', 'sdpa', '--resume')[2]
    assert rows[0] == plain and [row['backend'] for row in rows] == ['plain', 'sdpa']
    for named in (['--backend', 'plain'], ['--backend', 'sdpa', 'plain'], []):
        assert bench(*flags, *named, '--resume')[2] == rows
    monkeypatch.setenv('COMMIT', 'def')
    assert [row['backend'] for row in bench(*flags, '--backend', 'sdpa')[2]] == ['sdpa']
    assert [row['backend'] for row in bench(*flags, '--resume')[2]] == ['plain', 'sdpa']


def test_a_model_with_nothing_beside_it_is_done(bench, monkeypatch):
    """Where timm has no softmax model of its size, that backend is not waited for."""
    monkeypatch.setattr('evavit.bench.models._twin', lambda *_: None)
    flags = [*INFER, '--backend', 'plain', 'sdpa']
    rows = bench(*flags)[2]
    assert [row['backend'] for row in rows] == ['plain'] and bench(*flags, '--resume')[2] == rows


BAD = {
    'unknown model': (['--model', 'eva_deit_tin'], ['eva_deit_tin', 'eva_deit_tiny']),
    'argument of another type': (['--model', 'eva_deit_tiny:depth=x', '--bench', 'infer'], ['(depth is text; give']),
    'argument without a value': (['--model', 'eva_deit_tiny:depth'], ['depth', 'key=value']),
    'unknown argument of the model': (['--model', 'eva_deit_tiny:windows=3'], ['windows']),
    'images smaller than a patch': (['--model', 'eva_deit_tiny', '--img-size', '8'], ['eva_deit_tiny']),
    'no model of that pattern': (['--model-list', 'eva_resnet*'], ['eva_resnet*']),
    'a list that is no text': (['--model-list', 'BYTES'], ['--model-list', 'cannot be read']),
    'a list that is a pipe': (['--results-file', 'PIPE'], ['--results-file', 'it is no file']),
    'blocks without end': (['--model', 'resnet18:layers=[10000000000,1,1,1]'], ['layers asks for', 'more than 1,000']),
    'no such device': (['--device', 'gpu'], ['gpu', 'cuda']),
    'device that is not measured': (['--device', 'meta'], ['meta', 'cuda']),
    'device that is not there': (['--device', 'cuda:64'], ['cuda:64', 'CUDA device']),
    'kernels on a CPU': (['--bench', 'op', '--backend', 'triton'], ['triton', 'CUDA']),
    'a peer on a CPU': (['--bench', 'op', '--backend', 'flex'], ['flex', 'CUDA']),
    'backends of the host': (['--bench', 'host', '--backend', 'sdpa'], ['host', 'leave out --backend']),
    'cells of the host': (['--bench', 'host', '--partition-grid', '8'], ['host', '7 × 7 cells']),
    'other kernels on a CPU': (['--bench', 'op', '--backend', 'gluon'], ['gluon', 'CUDA']),
    'heads that do not divide': (['--bench', 'op', '--num-heads', '5'], ['5', '192']),
    'cells of too few grids': (['--bench', 'op', '--partition-grid', '7', '8', '9'], ['--partition-grid', '2 grids']),
    'cells of a layer': (['--bench', 'layer', '--partition-grid', '8'], ['layer', '7 × 7 cells']),
    'no cells': (['--bench', 'op', '--partition-grid', '0'], ['--partition-grid', '0']),
    'no number of prefix tokens': (['--bench', 'op', '--num-prefix-tokens', '-1'], ['-1']),
    'no batch': (['-b', '0'], ['-b', '0']),
    'no such bench': (['--bench', 'speed'], ['speed', 'infer']),
    'unknown flag': (['--batches', '3'], ['--batches']),
    'resume of nothing': (['--resume'], ['--results-file']),
    'sides below a patch': (['--bench', 'convert', '--model', 'vit_tiny_patch16_224', '--img-size', '1'], ['16 × 16']),
    'no ViT': (['--bench', 'convert', '--model', 'resnet18'], ['resnet18', "none of timm's plain vision"]),
    'too many tokens': (['--bench', 'op', '--grid', '100000'], ['op 100000x100000', 'lower its sizes']),
    'a lock that is a pipe': (['--bench', 'op', '--lock', 'PIPE'], ['--lock', 'is a link or no file']),
    'no ASCII': (['--repeats', '２'], ['--repeats', '２']),
    'without end': (['--repeats', '9' * 30], ['--repeats', 'below 10⁹']),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize('fault', BAD)
def test_refuses(fault, call, tmp_path):
    flags, words = BAD[fault]
    (tmp_path / 'bytes').write_bytes(bytes(range(256)))
    os.mkfifo(tmp_path / 'pipe')
    stand = dict(BYTES=tmp_path / 'bytes', PIPE=tmp_path / 'pipe')
    code, _, err = call('benchmark', *FEW, '-b', '1', *(stand.get(flag, flag) for flag in flags))
    lines = err.splitlines()
    assert code == 2 and len(lines) == 1 and lines[0].startswith('error: '), err
    assert all(word in err for word in words), err


def test_foreign_results_file(call, tmp_path):
    path = tmp_path / 'results.csv'
    path.write_text('model,top1\na,1\n')
    code, _, err = call('benchmark', *FEW, '--bench', 'op', '--grid', '3', '-b', '1', '--results-file', path)
    assert code == 2 and str(path) in err and path.read_text() == 'model,top1\na,1\n'


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
@pytest.mark.parametrize('kind', ['op', 'layer'])
def test_attention_on_a_gpu(call, tmp_path, kind):
    path = tmp_path / 'results.csv'
    code, _, err = call(
        'benchmark', '--bench', kind, '--grid', '14', '-b', '4', '--repeats', '3', '--results-file', path
    )
    rows = read(path)
    assert code == 0 and [row['backend'] for row in rows] == [*EVA.backends, *contenders.SDPA_BACKENDS], err
    assert [row['backend'] for row in rows if row['status'] == 'not available'] in ([], ['gluon'])
    for row in rows:
        if row['status'] == 'not available':  # Gluon's kernels are for Hopper
            continue
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
    assert code == 0 and [row['attention'] for row in rows] == ['eva', 'softmax'] * 2, err
    assert {row['backend'] for row in rows[::2]} in ({'gluon'}, {'triton'}) and rows[1]['backend'] == 'sdpa'
    assert all(float(row['peak_memory_mib']) > 0 and float(row['img_per_s']) > 0 for row in rows)


def test_loader_and_step(call, images, tmp_path, monkeypatch):
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
    assert {(row['img_size'], row['torchcompile']) for row in rows} == {('16', 'no')}
    assert {row['model'] for row in rows} == {describe('eva_deit_tiny', KWARGS)}
    (tmp_path / 'other.csv').write_text('a,b\n')
    monkeypatch.setattr('evavit.bench.loader.measure', None)  # known before anything is measured
    code, _, err = call('benchmark', '--bench', 'data', *flags[:-1], tmp_path / 'other.csv', '--loader-only')
    assert code == 2 and 'other columns' in err and err.count('\n') == 1


def test_results_files_that_cannot_be_written(call, tmp_path):
    """Said before anything is measured."""
    other = tmp_path / 'other.csv'
    other.write_text('a,b\n1,2\n')
    for path, message in [
        (tmp_path, 'cannot be written'),
        (other / 'mine.csv', 'cannot be written'),
        (other, 'has other columns'),
    ]:
        code, out, err = call('benchmark', '--bench', 'op', '--device', 'cpu', '--results-file', path)
        assert (code, out) == (2, '')
        assert err.startswith('error: ') and f'{path} {message}' in err and err.count('\n') == 1
    assert other.read_text() == 'a,b\n1,2\n'
