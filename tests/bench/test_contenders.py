"""Contenders: their checks against float64, which backend they take, shares of a copy's bandwidth, turns."""

import math

import pytest
import torch
import torch.nn.functional as F

from evavit.bench import contenders
from evavit.bench.contenders import GRIDS, Setting, SoftmaxExact, bench_layer, bench_op, traffic, worst_error
from evavit.bench.models import bench_model
from evavit.bench.results import is_done, store_rows


def test_traffic():
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
    monkeypatch.setattr(contenders, 'graphed', lambda call: (call(), call)[1])
    monkeypatch.setattr(contenders, 'peak_bytes', lambda call, device: (call(), 3 * 2**20)[1])
    monkeypatch.setattr(torch.cuda, 'empty_cache', lambda: None)
    return Setting(torch.device('cpu'), torch.bfloat16, repeats=2, warmup=1, copy_gb_per_s=10.0)


@pytest.mark.parametrize('measure', [bench_op, bench_layer])
def test_contenders_of_a_gpu(like_cuda, measure):
    rows = {row['backend']: row for row in measure(like_cuda, 2, 5, 2, 16)}
    assert {name: row['status'] for name, row in rows.items()} == {
        'gluon': 'not available',
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


def test_reference_in_blocks(monkeypatch):
    """The float64 reference of softmax, whatever the number of queries it takes at a time."""
    qkv = [torch.randn(2, 1, 9, 3, dtype=torch.double, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(SoftmaxExact.apply, qkv)
    torch.testing.assert_close(SoftmaxExact.apply(*qkv), F.scaled_dot_product_attention(*qkv))
    whole = torch.autograd.grad(SoftmaxExact.apply(*qkv).square().sum(), qkv)
    monkeypatch.setattr(contenders, 'BLOCK_ELEMENTS', 2 * 1 * 9 * 2)
    blocks = torch.autograd.grad(SoftmaxExact.apply(*qkv).square().sum(), qkv)
    assert len(list(SoftmaxExact._weights(*qkv[:2]))) == 5
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


def test_worst_error():
    a, b = torch.ones(3, dtype=torch.double), torch.tensor([1.0, 1.0, 2.0], dtype=torch.double)
    assert worst_error([a, a], [a, b]) == pytest.approx(1 / math.sqrt(6))
    assert math.isnan(worst_error([a, a * float('nan')], [b, b]))


def test_batches_hold_one_number_of_tokens():
    """At least 28 × 28: within a third of one another (a batch is whole images)."""
    tokens = [side**2 * batch for side, batch in GRIDS.items() if side >= 28]
    assert all(100_000 <= count <= 131_072 for count in tokens)
    assert {14: 256, 28: 128, 56: 32, 112: 8}.items() <= GRIDS.items() and 256 in GRIDS


@pytest.mark.gpu
def test_host_of_a_gpu():
    """The processor's time: less than that of all, for the device has far more to do than to launch."""
    setting = Setting(torch.device('cuda'), torch.bfloat16, repeats=5, warmup=2)
    rows = bench_layer(setting, 64, 56, host=True)
    assert [row['attention'] for row in rows] == ['eva', 'softmax'] and {row['status'] for row in rows} == {'ok'}
    setting.backends = ('sdpa',)
    (whole,) = bench_layer(setting, 64, 56)
    assert rows[1]['ms'] < whole['eager_ms']
