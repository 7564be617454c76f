"""Timing of models and layers: medians of many runs after a warm-up, memory, and where a figure comes from."""
import csv
import datetime
import platform
import statistics
import subprocess
import time
from itertools import pairwise
from pathlib import Path
from typing import Callable, Dict, List, Tuple

import timm
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from torch import nn

from .version import __version__

__all__ = ['median_seconds', 'origin', 'training_step', 'write_rows']


def origin(device: torch.device) -> Dict[str, str]:
    """Device, versions, date and commit, for every row of a result file."""
    commit = subprocess.run(['git', 'rev-parse', '--short', 'HEAD'], cwd=Path(__file__).parent,
                            capture_output=True, text=True, check=False).stdout.strip()
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else f'{platform.machine()} CPU'
    if device.type == 'cpu':
        name += f', {torch.get_num_threads()} threads'
    return {
        'date': datetime.date.today().isoformat(), 'commit': commit or 'unknown', 'device': name,
        'torch': torch.__version__, 'timm': timm.__version__, 'evavit': __version__,
    }


def median_seconds(run: Callable[[], object], device: torch.device, repeats: int, warmup: int) -> Tuple[float, int]:
    """Median seconds of run() and, on CUDA, the peak of allocated bytes (0 on the CPU)."""
    for _ in range(warmup):
        run()
    if device.type != 'cuda':
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds), 0
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize(device)
    seconds = [a.elapsed_time(b) / 1e3 for a, b in pairwise(events)]
    return statistics.median(seconds), torch.cuda.max_memory_allocated(device)


def training_step(
        model: nn.Module,
        forward: Callable[[torch.Tensor], torch.Tensor],
        batch: torch.Tensor,
        amp_dtype: torch.dtype,
) -> Callable[[], torch.Tensor]:
    """A function that does one step on a fixed batch: forward (of the model or what torch.compile made of it),
    cross-entropy on fixed random classes, backward, AdamW; it returns the loss."""
    optimizer = create_optimizer_v2(model, opt='adamw', lr=1e-4, weight_decay=0.05)
    target = torch.randint(model.num_classes, batch.shape[:1], device=batch.device)
    amp = torch.autocast(batch.device.type, amp_dtype, enabled=amp_dtype != torch.float32)

    def step():
        optimizer.zero_grad()
        with amp:
            loss = F.cross_entropy(forward(batch), target)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def write_rows(path: str, rows: List[Dict[str, object]]) -> None:
    """Append rows to a CSV file; the header is written once and must fit."""
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    new = not file.exists()
    if not new:
        with open(file, newline='') as stream:
            header = next(csv.reader(stream), [])
        if header != list(rows[0]):
            raise ValueError(f'{path} has other columns; name another file')
    with open(file, 'a', newline='') as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]))
        if new:
            writer.writeheader()
        writer.writerows(rows)
