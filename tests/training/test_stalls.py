"""The watchdog within one process; tests/cli/test_stalls.py has runs that hang."""

import json
import threading
import time
from contextlib import ExitStack

import pytest
import torch
import torch.distributed as dist

from evavit.training import stalls
from evavit.training.stalls import Reading, Stage, Watchdog

LIMIT = 0.4


@pytest.fixture
def ended(monkeypatch):
    """The lines with which a watchdog would have ended the process."""
    lines = []
    monkeypatch.setattr(stalls, 'end_now', lambda code, line: lines.append(line))
    return lines


def wait_until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def test_a_long_wait_ends_the_process_and_work_does_not(ended):
    with Watchdog(LIMIT) as watchdog:
        time.sleep(2 * LIMIT)  # a write, a compilation
        for _ in range(8):
            with watchdog.waiting(lambda: 'a short wait'):
                time.sleep(LIMIT / 4)
        assert not ended
        with watchdog.waiting(lambda: 'the moon'):
            assert wait_until(lambda: ended)
    assert ended[0].startswith('rank 0 has waited') and 'for the moon: stopped by --stall-timeout 0.4' in ended[0]


def test_without_a_limit_nothing_is_watched(ended):
    threads = threading.active_count()
    with Watchdog(0) as watchdog, watchdog.waiting(lambda: 'ever'):
        assert threading.active_count() == threads
        time.sleep(0.2)
    assert not ended


def test_a_wait_that_moves_goes_on(ended):
    """As batches whose images take long, or a stream that is read again up to its place."""
    reading = Reading()
    with Watchdog(LIMIT) as watchdog, watchdog.waiting(lambda: reading.tell('image {}'.format), reading.moves):
        for index in range(12):
            with reading.image(index):
                time.sleep(LIMIT / 4)
        assert not ended
        with reading.image(77):
            assert wait_until(lambda: ended)
    assert 'this process reads image 77' in ended[0]


def test_a_process_that_was_itself_stopped_has_not_waited(ended, monkeypatch):
    """As by SIGSTOP, or a machine that sleeps: the clock goes on."""
    clock = time.monotonic
    with Watchdog(10 * LIMIT) as watchdog, watchdog.waiting(lambda: 'a batch'):
        time.sleep(LIMIT)
        monkeypatch.setattr(stalls.time, 'monotonic', lambda: clock() + 1000)
        time.sleep(4 * LIMIT)
        assert not ended
        assert wait_until(lambda: ended)


def test_who_reads_what():
    reading = Reading()
    assert reading.tell(str) == 'no worker reads one'
    reading.table[2:7, 0] = torch.arange(5)
    told = reading.tell('{}.png'.format)
    assert told == 'worker 1 reads 0.png, worker 2 reads 1.png, worker 3 reads 2.png and 2 more'
    items = reading.stream(iter('abc'))
    assert next(items) == 'a' and reading.table[0].tolist() == [Reading.IDLE, 1] and [*items] == ['b', 'c']


def test_compilation_is_work_in_the_midst_of_a_wait(ended):
    """As the backward pass is compiled while the other processes wait for its gradients."""

    def slow(graph, inputs):
        time.sleep(3 * LIMIT)
        return graph.forward

    torch.compile(lambda x: x - 1, backend='eager')(torch.ones(2))  # imports what compiles
    with Watchdog(LIMIT) as watchdog, watchdog.compiling(), watchdog.waiting(lambda: 'gradients'):
        torch.compile(lambda x: x + 1, backend=slow)(torch.ones(2))
        assert len(watchdog.stages) == 2
    assert not ended
    torch.compiler.reset()


WORKS, WAITS = dict(doing='writes', waits=False, age=0.0), dict(doing='waits for a batch', waits=True, age=0.1)
CASES = [  # what the other process told last, whether it goes on, and what is told of it where that ends the wait
    (WORKS, True, None),
    (WORKS | dict(age=5.0), True, None),
    (WORKS | dict(age=7.0), True, '; rank 1 writes'),
    (WAITS, True, None),
    (WAITS | dict(age=2.0), True, '; rank 1 waits for a batch'),
    (WORKS, False, '; rank 1 is silent'),
    ({}, False, ''),
]


def test_what_the_other_process_does_counts(ended):
    """With a limit of one second. The cases run side by side: the process of each has a rank of its own."""
    with ExitStack() as stack:
        stores = [dist.HashStore() for _ in CASES]
        for rank, (store, (other, _, _)) in enumerate(zip(stores, CASES, strict=True), 2):
            watchdog = stack.enter_context(Watchdog(1.0))
            watchdog.rank, watchdog.others, watchdog.store = rank, [1], store
            if other:
                store.set('stalls/1', json.dumps(dict(rank=1, beat=0, **other)))
            stack.enter_context(watchdog.waiting(lambda: 'all_reduce'))
        for beat in range(1, 126):
            time.sleep(0.02)
            for store, (other, goes_on, _) in zip(stores, CASES, strict=True):
                if goes_on:
                    store.set('stalls/1', json.dumps(dict(rank=1, beat=beat, **other)))
    for rank, (_, _, about) in enumerate(CASES, 2):
        lines = [line for line in ended if line.startswith(f'rank {rank} ')]
        assert len(lines) == (about is not None), ended
        assert all(f'for all_reduce{about}: stopped' in line for line in lines), lines
    told = json.loads(stores[0].get('stalls/2'))
    assert told['rank'] == 2 and told['doing'] == 'waits for all_reduce' and told['waits']


def test_a_store_that_does_not_answer_holds_nobody_up(ended):
    class Frozen:
        def set(self, *_):
            threading.Event().wait()

    with Watchdog(LIMIT) as watchdog:
        watchdog.others, watchdog.store = [1], Frozen()
        with watchdog.waiting(lambda: 'all_reduce'):
            assert wait_until(lambda: ended, seconds=5)
    assert 'for all_reduce: stopped by --stall-timeout' in ended[0]


def test_stages_end_in_any_order():
    watchdog = Watchdog()
    first, second = (Stage(lambda: 'x', True, 0.0) for _ in range(2))
    outer, inner = watchdog.doing(first), watchdog.doing(second)
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)
    assert watchdog.stages[-1] is second
    inner.__exit__(None, None, None)
    assert len(watchdog.stages) == 1
