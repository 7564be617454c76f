"""How long a call takes and how much memory it needs.

The calls that are compared take turns, so that what slows the machine slows them alike; `triton.testing.do_bench` and
PyTorch's timers take one at a time. On a CUDA device events time a call after another of its own, as in a loop, and
after a write that empties the L2 cache. A call may be the replay of a CUDA graph, so that Python is not measured;
`graphed` is ours because `do_bench_cudagraph` never empties the cache.
"""

import statistics
import time
from typing import Callable, List, Optional, Sequence, Tuple

import torch

__all__ = ['Call', 'copy_rate', 'graphed', 'host_seconds', 'median_seconds', 'peak_bytes']

Call = Callable[[], object]


def _cuda_seconds(calls: Sequence[Call], repeats: int, warmup: int) -> List[float]:
    """Median seconds of each call on the current CUDA device, of so many as fit into 3 s, but of 10 at least."""
    cache = torch.empty(2**28, dtype=torch.uint8, device='cuda')  # larger than any L2 cache

    def timed(call: Call) -> Tuple[torch.cuda.Event, torch.cuda.Event]:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()  # nothing of the other calls still runs while this one launches,
        call()  # but the same call before it does
        cache.zero_()
        begin.record()
        call()
        end.record()
        return begin, end

    for call in [*calls] * warmup:
        call()
    first = [timed(call) for call in calls]
    torch.cuda.synchronize()
    counts = [min(repeats, max(10, int(3e3 / max(begin.elapsed_time(end), 1e-3)))) for begin, end in first]
    times: List[List[Tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in calls]
    for turn in range(max(counts)):
        for call, count, kept in zip(calls, counts, times, strict=True):
            if turn < count:
                kept.append(timed(call))
    torch.cuda.synchronize()
    return [statistics.median(begin.elapsed_time(end) for begin, end in kept) / 1e3 for kept in times]


def median_seconds(calls: Sequence[Call], device: torch.device, repeats: int, warmup: int) -> List[float]:
    """Median seconds of each call.

    Args:
        calls: They take turns, so that what slows the machine slows them alike.
        device: Where they run.
        repeats: Measured calls of each; on CUDA about so many, and fewer of calls that take long.
        warmup: Calls before them.
    """
    if device.type == 'cuda':
        return _cuda_seconds(calls, repeats, warmup)
    return host_seconds(calls, device, repeats, warmup)


def host_seconds(calls: Sequence[Call], device: torch.device, repeats: int, warmup: int) -> List[float]:
    """Median seconds of the processor in each call, which take turns: on a CUDA device until all is launched."""
    for _ in range(warmup):
        for call in calls:
            call()
    seconds: List[List[float]] = [[] for _ in calls]
    for _ in range(repeats):
        for call, kept in zip(calls, seconds, strict=True):
            if device.type == 'cuda':
                torch.cuda.synchronize(device)  # no call waits for the launches before it
            start = time.perf_counter()
            call()
            kept.append(time.perf_counter() - start)
    return [statistics.median(kept) for kept in seconds]


def copy_rate(device: torch.device) -> Optional[float]:
    """Bytes read and written a second, in GB/s, that a copy of 1 GiB reaches on a CUDA device; None on another."""
    if device.type != 'cuda':
        return None
    source = torch.empty(2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / _cuda_seconds([lambda: target.copy_(source)], 30, 5)[0] / 1e9


def graphed(call: Call) -> Call:
    """The call as the replay of a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def peak_bytes(call: Call, device: torch.device) -> int:
    """The most bytes that were allocated during a call, beyond those before it.

    On a CPU these are the allocations that PyTorch's profiler saw.
    """
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        call()
    assert profile.kineto_results is not None
    now = peak = 0
    events = [event for event in profile.kineto_results.events() if event.name() == '[memory]']
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak
