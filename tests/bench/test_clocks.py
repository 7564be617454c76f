"""Clocks and memory: medians, turns, as many calls as were asked for."""

import pytest
import torch

from evavit.bench import clocks

CPU = torch.device('cpu')


def test_calls_take_turns_on_a_cpu(monkeypatch):
    """And each has the median of its own times."""
    now, log = [0.0], []

    def call(name, seconds):
        def call():
            log.append(name)
            now[0] += next(seconds)

        return call

    monkeypatch.setattr(clocks.time, 'perf_counter', lambda: now[0])
    calls = [call('a', iter([9.0, 1.0, 2.0, 4.0])), call('b', iter([9.0, 3.0, 3.0, 5.0]))]
    assert clocks.median_seconds(calls, CPU, repeats=3, warmup=1) == [2.0, 3.0]
    assert log == ['a', 'b'] * 4


@pytest.mark.parametrize('each, count', [(1.0, 30), (200.0, 15), (900.0, 10)])
def test_numbers_of_calls_on_a_gpu(monkeypatch, each, count):
    """As many as were asked for, fewer where these take long, 10 at least; in turns."""
    log, now = [], [0.0]

    class Event:
        def __init__(self, enable_timing):
            self.at = None

        def record(self):
            self.at = now[0]

        def elapsed_time(self, end):
            return end.at - self.at

    def call(name, ms):
        def call():
            log.append(name)
            now[0] += ms

        return call

    monkeypatch.setattr(torch.cuda, 'Event', Event)
    monkeypatch.setattr(torch.cuda, 'synchronize', lambda: None)
    monkeypatch.setattr(torch, 'empty', lambda *args, **kwargs: torch.zeros(1))
    calls = [call('a', each), call('b', 1.0)]
    assert clocks._cuda_seconds(calls, repeats=30, warmup=2) == pytest.approx([each / 1e3, 1e-3])
    assert log[: 4 * (1 + count)] == [*'abab', *'aabb' * count]  # each timed call after one of its own
    assert [log.count(name) for name in 'ab'] == [2 + 2 * (1 + count), 64]  # two to warm up, and the first


def test_no_copy_rate_of_a_cpu():
    assert clocks.copy_rate(CPU) is None


def test_peak_of_memory():
    mib = 2**20 // 4

    def run():
        first = torch.zeros(3 * mib)
        second = first + 1
        del first
        return second + 1  # three of the four are alive at no time

    assert 5.9 * 2**20 < clocks.peak_bytes(run, CPU) < 6.5 * 2**20


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_a_graph_takes_as_long_as_its_kernels():
    """A copy of 256 MiB, called and replayed: the device is busy and Python is not seen. And nothing is faster than a
    copy of 1 GiB, by much."""
    device = torch.device('cuda')
    source = torch.empty(2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    called, replayed = clocks.median_seconds(
        [lambda: target.copy_(source), clocks.graphed(lambda: target.copy_(source))], device, repeats=10, warmup=3
    )
    assert replayed == pytest.approx(called, rel=0.1)
    assert 2 * source.numel() / called / 1e9 == pytest.approx(clocks.copy_rate(device), rel=0.25)
