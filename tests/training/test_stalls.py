"""The watchdog within one process; tests/cli/test_stalls.py has runs that hang."""

import json
import threading
import time

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


OTHER = dict(rank=1, beat=0, doing='writes', waits=False, age=0.0)


@pytest.mark.parametrize(
    'other, answers, ends, about',
    [
        (OTHER, True, False, ''),
        (OTHER | dict(age=5 * LIMIT), True, False, ''),
        (OTHER | dict(age=7 * LIMIT), True, True, '; rank 1 writes'),
        (OTHER | dict(waits=True, doing='waits for a batch', age=0.1 * LIMIT), True, False, ''),
        (OTHER | dict(waits=True, doing='waits for a batch', age=2 * LIMIT), True, True, '; rank 1 waits for a batch'),
        (OTHER, False, True, '; rank 1 is silent'),
        (None, False, True, ''),
    ],
    ids=['works', 'works long', 'works too long', 'waits', 'waits too long', 'silent', 'unknown'],
)
def test_what_the_other_process_does_counts(ended, other, answers, ends, about):
    store = dist.HashStore()
    with Watchdog(LIMIT) as watchdog:
        watchdog.world_size = 2
        if other:
            store.set('stalls/1', json.dumps(other))
        watchdog.store = store
        with watchdog.waiting(lambda: 'all_reduce'):
            end = time.monotonic() + 4 * LIMIT
            while not ended and time.monotonic() < end:
                if answers:
                    other = other | dict(beat=other['beat'] + 1)
                    store.set('stalls/1', json.dumps(other))
                time.sleep(LIMIT / 20)
    assert bool(ended) == ends and all(f'for all_reduce{about}: stopped' in line for line in ended)
    told = json.loads(store.get('stalls/0'))
    assert told['rank'] == 0 and told['doing'] == 'waits for all_reduce' and told['waits']


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
