"""How long a call takes and how much memory it needs.

On a CUDA device `triton.testing.do_bench` times each call by events, after a write that empties the L2 cache. A call
may be the replay of a CUDA graph, so that Python is not measured; `graphed` is ours because `do_bench_cudagraph` never
empties the cache. On a CPU the calls that are compared take turns, which no timer of PyTorch does.
"""

import statistics
import time
from typing import Callable, List, Optional, Sequence

import torch

from evavit.errors import UserError

__all__ = ['Call', 'copy_rate', 'graphed', 'host_seconds', 'median_seconds', 'peak_bytes']

Call = Callable[[], object]


def _cuda_seconds(call: Call, repeats: int, warmup: int) -> float:
    """Median seconds of a call on the current CUDA device, of so many calls as fit into 3 s, but of 10 at least."""
    try:
        from triton.testing import do_bench
    except ImportError:
        raise UserError(
            'timing on a CUDA device needs Triton: pip install triton (on Windows triton-windows)'
        ) from None
    each = do_bench(call, warmup=0, rep=0, return_mode='median')  # milliseconds; one call after five that estimate it
    repeats = min(repeats, max(10, int(3e3 / max(each, 1e-3))))
    # It takes milliseconds and we take numbers of calls, as on a CPU.
    return do_bench(call, warmup=warmup * each, rep=repeats * each, return_mode='median') / 1e3


def median_seconds(calls: Sequence[Call], device: torch.device, repeats: int, warmup: int) -> List[float]:
    """Median seconds of each call.

    Args:
        calls: On a CPU they take turns, so that what slows the machine slows them alike.
        device: Where they run.
        repeats: Measured calls of each; on CUDA about so many, and fewer of calls that take long.
        warmup: Calls before them.
    """
    if device.type == 'cuda':
        return [_cuda_seconds(call, repeats, warmup) for call in calls]
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
    return 2 * source.numel() / _cuda_seconds(lambda: target.copy_(source), 30, 5) / 1e9


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
