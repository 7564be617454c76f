"""Where a figure comes from: what every row of a results file says beside it."""

import contextlib
import datetime
import os
import platform
import subprocess
from pathlib import Path
from typing import Dict

import timm
import torch

from evavit.version import __version__

__all__ = ['origin']


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path('/proc/cpuinfo').read_text().splitlines():
            if line.startswith('model name'):
                return line.partition(':')[2].strip()
    return f'{platform.machine()} CPU'


def origin(device: torch.device) -> Dict[str, str]:
    """Device, versions, commit and date, for every row; COMMIT in the environment where there is no checkout."""
    commit = os.environ.get('COMMIT', '')
    if not commit:
        with contextlib.suppress(OSError):  # no git
            commit = subprocess.run(
                ['git', 'rev-parse', '--short', 'HEAD'],
                cwd=Path(__file__).parent,
                capture_output=True,
                text=True,
                check=False,
            ).stdout.strip()
    name = (
        torch.cuda.get_device_name(device)
        if device.type == 'cuda'
        else f'{_cpu_name()}, {torch.get_num_threads()} threads'
    )
    return dict(
        device=name,
        torch=torch.__version__,
        timm=timm.__version__,
        evavit=__version__,
        commit=commit or 'unknown',
        date=datetime.date.today().isoformat(),
    )
