"""What torch.compile makes of a model: what --torchcompile and --torchcompile-mode mean, in every script.

| `--torchcompile` | what runs |
|---|---|
| not given, `none` | the model as it is |
| without a value, `inductor` | Inductor in `--torchcompile-mode`, by default `FAST` on a CUDA device |
| `auto` | the same on a CUDA device, the model as it is elsewhere: what the recipes say |
| a mode, such as `reduce-overhead` | Inductor in this mode |
| another backend, such as `aot_eager` | that |

`FAST` replays CUDA graphs. Without them the GPU waits for Python, which launches each kernel by itself.
"""

import contextlib
import importlib.util
import logging
from typing import Any, Iterator, NamedTuple, Optional

import torch

from evavit.arguments import nearest
from evavit.errors import LocalError, UserError, first_line
from evavit.training.sections import MODES

__all__ = ['AS_IS', 'FAST', 'MODES', 'Compilation', 'check_compilation', 'choose_compilation', 'report_skips']

log = logging.getLogger(__name__)

# On a CUDA device the fastest mode, or within 1 % of it, of every model of ours that was measured on an H200.
FAST = 'reduce-overhead'
GRAPHS = ('reduce-overhead', 'max-autotune')  # modes that replay CUDA graphs
# results/modes_h200.csv and models_h200.csv
COST = 'an H200 trains eva_deit_tiny at 9,920 images a second as it is, at 20,422 with CUDA graphs'


class Compilation(NamedTuple):
    """How a model is compiled."""

    backend: str = ''  # '' leaves the model as it is
    mode: Optional[str] = None
    graphs: bool = False  # it replays CUDA graphs, each of which writes its results over those of its call before

    @property
    def label(self) -> str:
        """In a results file: no, a mode of Inductor, or another backend."""
        return 'no' if not self.backend else self.mode or ('default' if self.backend == 'inductor' else self.backend)

    @property
    def arguments(self) -> Any:
        """Of torch.compile. A size is compiled as it is: graphs of sizes left open would be recorded for each again."""
        return dict(backend=self.backend, mode=self.mode, dynamic=False)

    def compile(self, model: Any) -> Any:
        return torch.compile(model, **self.arguments) if self.backend else model

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Around each pass through the model: what graphs returned in passes before is not read any more. What
        torch.compile cannot do is one line, a LocalError."""
        if not self.backend:
            yield
            return
        from torch._dynamo.exc import TorchDynamoException

        if self.graphs:
            torch.compiler.cudagraph_mark_step_begin()
        try:
            yield
        except TorchDynamoException as error:
            text = f'torch.compile, {self.label}: {type(error).__name__}, {first_line(error)[:300]}'
            raise LocalError(f'{text}; --torchcompile none does without it') from error

    def __str__(self) -> str:
        if not self.backend:
            return 'the model is not compiled'
        mode = f', mode {self.mode or "default"}' if self.backend == 'inductor' else ''
        what = ' (CUDA graphs)' if self.graphs else ''
        return f'the model is compiled by {self.backend}{mode}{what}; the first batches wait for it'


AS_IS = Compilation()


def check_compilation(torchcompile: Optional[str], mode: Optional[str]) -> None:
    """UserError where the two settings name nothing, or contradict each other. No device is looked at."""
    known = ['none', 'auto', *MODES, *torch.compiler.list_backends(exclude_tags=())]
    if torchcompile and torchcompile not in known:
        raise UserError(f'unknown backend or mode of torch.compile {torchcompile}{nearest(torchcompile, known)}')
    if mode and torchcompile not in ('inductor', 'auto', mode):
        remedy = 'leave it out' if torchcompile else 'add --torchcompile'
        raise UserError(f'torchcompile_mode {mode} does nothing with torchcompile {torchcompile or "none"}; {remedy}')


def choose_compilation(torchcompile: Optional[str], mode: Optional[str], device: torch.device) -> Compilation:
    """What the two settings mean on a device.

    Raises:
        UserError: see `check_compilation`; or Inductor was asked for by name and has no Triton for this CUDA device.
    """
    check_compilation(torchcompile, mode)
    cuda = device.type == 'cuda'
    if torchcompile in (None, '', 'none') or (torchcompile == 'auto' and not cuda):
        return AS_IS
    if torchcompile not in ('auto', 'inductor', *MODES):
        return Compilation(torchcompile or '')
    if cuda and importlib.util.find_spec('triton') is None:
        need = 'torch.compile needs Triton: pip install triton (on Windows triton-windows)'
        if torchcompile != 'auto':
            raise UserError(f'{need}, or leave out --torchcompile')
        log.warning(f'{need}. The model is not compiled: {COST}')
        return AS_IS
    mode = torchcompile if torchcompile in MODES else mode or (FAST if cuda else None)
    return Compilation('inductor', mode, cuda and mode in GRAPHS)


def report_skips(compilation: Compilation) -> None:
    """Log how many parts of a compiled model Inductor could not record as CUDA graphs, if any."""
    if not compilation.graphs:
        return
    from torch._dynamo.utils import counters

    skips = counters['inductor'].pop('cudagraph_skips', 0)  # each is told once
    if skips:
        log.warning(
            f'{skips} parts of the compiled model are not replayed as CUDA graphs (TORCH_LOGS=cudagraphs,perf_hints '
            f'says why): {COST}'
        )
