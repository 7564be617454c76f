"""What benchmark.py measures: attention alone, attention layers and whole models, EVA beside softmax attention.

A *comparison* is one setting and the contenders measured on it, in one process and on the same data: EVA's plain path
and its kernels, PyTorch's scaled_dot_product_attention with each of its backends forced, timm's softmax model. Each
contender is first held against float64; one whose result is off has a row that says so, and no figure.

On a CUDA device attention and layers are timed as replays of a CUDA graph, each after a write that empties the L2
cache, so that neither Python nor a warm cache is measured (`eager_*`: without a graph); models are timed call after
call, as they run. On a CPU the contenders take turns.
"""

import ast
import contextlib
import copy
import csv
import functools
import re
import statistics
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import timm
import torch
import torch.nn.functional as F
from timm.data import resolve_model_data_config
from timm.layers import RelPosBias
from timm.models import resolve_model_input_args
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from evavit.arguments import nearest
from evavit.errors import UserError, first_line
from evavit.layers import EvaAttention, SoftmaxAttention
from evavit.ops import eva_attention, eva_attention_packed, eva_backend, eva_num_cells

__all__ = [
    'BACKENDS',
    'COLUMNS',
    'GRIDS',
    'HARMLESS',
    'SOFTMAX_MODELS',
    'Setting',
    'bench_layer',
    'bench_model',
    'bench_op',
    'copy_rate',
    'default_batch',
    'input_size',
    'is_done',
    'median_seconds',
    'parse_model',
    'read_rows',
    'store_rows',
    'traffic',
]

EVA_BACKENDS = ('triton', 'plain')
SDPA_BACKENDS = {
    'flash': SDPBackend.FLASH_ATTENTION,
    'cudnn': SDPBackend.CUDNN_ATTENTION,
    'efficient': SDPBackend.EFFICIENT_ATTENTION,
}
# 'sdpa' leaves the choice to PyTorch.
BACKENDS = (*EVA_BACKENDS, *SDPA_BACKENDS, 'sdpa')

# Sides of the token grid and images a batch. From 28 × 28 to 224 × 224 every batch has 100,352 tokens or nearly so.
GRIDS = {14: 256, 28: 128, 56: 32, 80: 16, 112: 8, 160: 4, 224: 2, 256: 2}
TOKENS = 100_352

# Attention weights that the float64 reference of softmax holds at one time: half a GiB.
BLOCK_ELEMENTS = 2**26

# timm's softmax models that stand beside EVA's: mean pooling, no class token.
DEIT = dict(class_token=False, global_pool='avg')
SOFTMAX_MODELS: Dict[str, Tuple[str, Dict[str, Any]]] = {
    'eva_deit_tiny': ('deit_tiny_patch16_224', DEIT),
    'eva_deit_small': ('deit_small_patch16_224', DEIT),
    'eva_deit_tiny_784': ('deit_tiny_patch16_224', dict(patch_size=8, **DEIT)),
    'eva_pvt_v2_b3': ('pvt_v2_b3', {}),
}

# Relative RMS against float64 that no output and no gradient of tokens may pass. Kernels are held to the first line;
# the plain path rounds between its operators, a layer in its projections too, a model in every layer.
ERROR_BOUNDS = {
    'op': {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 5e-3},
    'plain': {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2},
    'layer': {torch.float32: 5e-5, torch.bfloat16: 2e-2, torch.float16: 1e-2},
    'model': {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-2},
}

COLUMNS = (
    'bench',
    'case',
    'model',
    'attention',
    'backend',
    'batch_size',
    'img_size',
    'tokens',
    'width',
    'heads',
    'amp_dtype',
    'torchcompile',
    'status',
    'error',
    'forward_ms',
    'ms',
    'eager_forward_ms',
    'eager_ms',
    'img_per_s',
    'peak_memory_mib',
    'forward_of_copy',
    'backward_of_copy',
    'copy_gb_per_s',
    'device',
    'torch',
    'timm',
    'evavit',
    'commit',
    'date',
)
# What a comparison is known by in a results file.
KEY = ('bench', 'case', 'batch_size', 'img_size', 'tokens', 'width', 'heads', 'amp_dtype', 'torchcompile', 'device')

# Modes of torch.compile that replay CUDA graphs.
CUDA_GRAPHS = ('reduce-overhead', 'max-autotune')

# A row with another status is a failure, and is measured again.
HARMLESS = ('ok', 'not available')

Row = Dict[str, Any]


class WrongResult(RuntimeError):
    """A contender's result is off: no figure is given for it."""


class NotAvailable(RuntimeError):
    """A backend does not take this device, dtype or shape."""


@dataclass
class Setting:
    """What all comparisons of a run share.

    Args:
        device: Where to measure.
        dtype: Of attention's tensors, and of autocast for layers and models (float32: no autocast).
        backends: Names of `BACKENDS`; () for those that the device has.
        repeats: Measured calls of each contender; fewer of calls that take long, on CUDA.
        warmup: Calls before them.
        copy_gb_per_s: Bytes read and written a second by a copy, see `copy_rate`; None leaves the bandwidth out.
        lock: A file. Processes that name the same one compile and check side by side and measure one at a time.
    """

    device: torch.device
    dtype: torch.dtype
    backends: Sequence[str] = ()
    repeats: int = 30
    warmup: int = 5
    copy_gb_per_s: Optional[float] = None
    lock: Optional[Path] = None

    @property
    def cuda(self) -> bool:
        return self.device.type == 'cuda'

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix('torch.')

    @contextlib.contextmanager
    def turn(self, alone: bool) -> Iterator[None]:
        """With a lock: wait until nobody measures or, to be alone, until nobody else works on the device."""
        if self.lock is None:
            yield
        else:
            import fcntl  # not on every system

            with open(self.lock, 'a') as stream:
                fcntl.flock(stream, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
                yield

    def autocast(self, **kwargs):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32, **kwargs)


@dataclass
class Contender:
    """One of a comparison: what identifies its row, a check that returns its error, and the calls to time.

    `calls` are made by `prepare`, after the check; their names are columns.
    """

    row: Row
    check: Callable[[], float]
    prepare: Callable[[], Dict[str, Callable[[], object]]]
    context: Callable[[], Any] = contextlib.nullcontext
    calls: Dict[str, Callable[[], object]] = field(default_factory=dict)


# --------------------------------------------------------------------------------------------------------------------
# Clocks
# --------------------------------------------------------------------------------------------------------------------


def _cuda_seconds(call: Callable[[], object], repeats: int, warmup: int, flush: bool) -> float:
    """Median seconds of a call on the current CUDA device; with flush, the cache is emptied before each."""
    scratch = torch.empty(2**26 if flush else 0, dtype=torch.int32, device='cuda')
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(warmup):
        call()
    torch.cuda.synchronize()
    each = (time.perf_counter() - start) / max(warmup, 1)
    repeats = min(repeats, max(10, int(3 / max(each, 1e-6))))
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for begin, end in events:
        if flush:
            scratch.zero_()
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events) / 1e3


def median_seconds(
    calls: Sequence[Callable[[], object]], device: torch.device, repeats: int, warmup: int, flush: bool = False
) -> List[float]:
    """Median seconds of each call. On a CPU the calls take turns, so that what slows the machine slows them alike."""
    if device.type == 'cuda':
        return [_cuda_seconds(call, repeats, warmup, flush) for call in calls]
    for _ in range(warmup):
        for call in calls:
            call()
    seconds: List[List[float]] = [[] for _ in calls]
    for _ in range(repeats):
        for call, kept in zip(calls, seconds, strict=True):
            start = time.perf_counter()
            call()
            kept.append(time.perf_counter() - start)
    return [statistics.median(kept) for kept in seconds]


def copy_rate(device: torch.device) -> Optional[float]:
    """Bytes read and written a second, in GB/s, that a copy of 1 GiB reaches on a CUDA device; else None."""
    if device.type != 'cuda':
        return None
    source = torch.empty(2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / _cuda_seconds(lambda: target.copy_(source), 30, 5, flush=False) / 1e9


def _graphed(call: Callable[[], object]) -> Callable[[], None]:
    """The call as a replay of a CUDA graph."""
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


def _peak_mib(call: Callable[[], object], device: torch.device) -> Optional[float]:
    """Memory that a call allocates at its peak, beyond what is held before it; None on a CPU."""
    if device.type != 'cuda':
        return None
    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def traffic(batch: int, tokens: int, width: int, dtype: torch.dtype) -> Tuple[int, int]:
    """Bytes that attention has to move: forward q, k, v in, o out; backward q, k, v, o, do in, dq, dk, dv out."""
    tensor = batch * tokens * width * dtype.itemsize
    return 4 * tensor, 8 * tensor


# --------------------------------------------------------------------------------------------------------------------
# Comparing
# --------------------------------------------------------------------------------------------------------------------


def _worst_error(got: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """The largest relative RMS of any pair; NaN wins."""
    errors = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(got, expected, strict=True)]
    return float('nan') if any(error != error for error in errors) else max(errors)


def _reason(error: BaseException) -> str:
    """What a row says of a contender that could not be measured."""
    if isinstance(error, torch.OutOfMemoryError):
        return 'out of memory'
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    if isinstance(error, NotAvailable) or 'No available kernel' in text or 'No viable backend' in text:
        return 'not available'
    return text if isinstance(error, WrongResult) else f'{type(error).__name__}: {text}'[:200]


def _compare(setting: Setting, contenders: List[Contender], bound: Callable[[Row], float]) -> List[Row]:
    """Check, then time every contender; a row each, in their order."""
    ready: List[Contender] = []
    for contender in contenders:
        row = contender.row
        row.update(status='ok', amp_dtype=setting.dtype_name)
        if setting.copy_gb_per_s:
            row['copy_gb_per_s'] = round(setting.copy_gb_per_s, 1)
        try:
            with setting.turn(alone=False), contender.context():
                error, limit = contender.check(), bound(row)
                row['error'] = f'{error:.1e}'
                if not error <= limit:  # NaN too
                    raise WrongResult(f'{error:.1e} from float64, more than {limit:.0e}')
                contender.calls = contender.prepare()
                # A graph allocates when it is made, not when it is replayed.
                peak = _peak_mib(contender.calls.get('eager_ms', contender.calls['ms']), setting.device)
            if peak is not None:
                row['peak_memory_mib'] = round(peak, 1)
            ready.append(contender)
        except Exception as error:
            row['status'] = _reason(error)
            if row['status'] not in HARMLESS and not isinstance(error, WrongResult):
                traceback.print_exc()
        if setting.cuda:
            torch.cuda.empty_cache()
    for column in ready[0].calls if ready else ():
        with setting.turn(alone=True):
            seconds = median_seconds(
                [contender.calls[column] for contender in ready],
                setting.device,
                setting.repeats,
                setting.warmup,
                flush=ready[0].row['bench'] in ('op', 'layer'),
            )
        for contender, value in zip(ready, seconds, strict=True):
            contender.row[column] = round(1e3 * value, 4)
    return [contender.row for contender in contenders]


def _force(backend: str) -> Callable[[], Any]:
    """A context in which scaled_dot_product_attention takes one backend."""
    if backend in SDPA_BACKENDS:
        return lambda: sdpa_kernel(SDPA_BACKENDS[backend])
    return contextlib.nullcontext


def _within(context: Callable[[], Any], call: Callable[[], object]) -> Callable[[], object]:
    def inside():
        with context():
            return call()

    return inside


def _timed_calls(
    setting: Setting, context: Callable[[], Any], forward: Callable[[], object], step: Callable[[], object]
) -> Dict[str, Callable[[], object]]:
    """The columns of a forward without gradients and of forward and backward."""

    @torch.no_grad()
    def infer():
        return forward()

    infer, step = _within(context, infer), _within(context, step)
    if not setting.cuda:
        return {'forward_ms': infer, 'ms': step}
    with torch.no_grad():
        replay = _graphed(infer)
    return {'eager_forward_ms': infer, 'eager_ms': step, 'forward_ms': replay, 'ms': _graphed(step)}


class _Exact(torch.autograd.Function):
    """Softmax attention in blocks of queries: float64 references at lengths whose N × N weights fit no memory."""

    @staticmethod
    def _weights(q: torch.Tensor, k: torch.Tensor) -> Iterator[Tuple[slice, torch.Tensor]]:
        rows = max(1, BLOCK_ELEMENTS // (k.shape[0] * k.shape[1] * k.shape[2]))
        for start in range(0, q.shape[2], rows):
            block = slice(start, start + rows)
            yield block, (q[:, :, block] * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1)

    @staticmethod
    def forward(ctx, q, k, v):
        ctx.save_for_backward(q, k, v)
        return torch.cat([weights @ v for _, weights in _Exact._weights(q, k)], 2)

    @staticmethod
    def backward(ctx, dy):
        q, k, v = ctx.saved_tensors
        dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
        for block, weights in _Exact._weights(q, k):
            dweights = dy[:, :, block] @ v.transpose(-2, -1)
            dlogits = weights * (dweights - (weights * dweights).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
            dq[:, :, block] = dlogits @ k
            dk += dlogits.transpose(-2, -1) @ q[:, :, block]
            dv += weights.transpose(-2, -1) @ dy[:, :, block]
        return dq, dk, dv


def default_batch(side: int, device: torch.device) -> int:
    """Images a batch of a grid: at one number of tokens, a sixteenth of it on a CPU."""
    batch = GRIDS.get(side, max(1, TOKENS // side**2))
    return batch if device.type == 'cuda' else max(1, batch // 16)


def _attention_backends(setting: Setting) -> Sequence[str]:
    return setting.backends or (('triton', 'plain', *SDPA_BACKENDS) if setting.cuda else ('plain', 'sdpa'))


def _row(bench: str, backend: str, batch: int, side: int, heads: int, width: int) -> Row:
    return dict(
        bench=bench,
        case=f'{side}x{side}',
        attention='eva' if backend in EVA_BACKENDS else 'softmax',
        backend=backend,
        batch_size=batch,
        tokens=side * side,
        width=width,
        heads=heads,
    )


def bench_op(setting: Setting, batch: int, side: int, heads: int = 3, head_dim: int = 64) -> List[Row]:
    """Attention alone: q, k, v and dy in; y, dq, dk, dv (for EVA also its parameters' gradients) out.

    Args:
        setting: Device, dtype, contenders.
        batch: Images.
        side: Of the square token grid.
        heads: Heads h.
        head_dim: Channels d of a head.

    Returns:
        A row a contender. `forward_ms` is without, `ms` with gradients: forward and backward. `forward_of_copy` and
        `backward_of_copy` are the achieved bytes a second (`traffic`; the backward is `ms` less `forward_ms`) as a
        fraction of a copy's.
    """
    N, d, feat_size, device, dtype = side * side, head_dim, [side, side], setting.device, setting.dtype
    qkv = torch.randn(batch, N, 3, heads, d, device=device).to(dtype).permute(2, 0, 3, 1, 4)
    noise = torch.randn(batch, heads, eva_num_cells(feat_size, 7), d, device=device)
    dy = torch.randn(batch, N, heads, d, device=device).to(dtype).transpose(1, 2)
    summary = [
        x.to(device)
        for _ in range(2)
        for x in (torch.randn(d, d) * d**-0.5, torch.zeros(d), torch.ones(d), torch.zeros(d))
    ]
    bias = RelPosBias((7, 7), heads).get_bias().squeeze(0).detach().to(device)

    def calls(backend: str, dtype: torch.dtype):
        # The kernels take q, k, v as one tensor, as the layer has them; apart, no gradient has to be gathered.
        leaves = [x.detach().to(dtype).requires_grad_() for x in ([qkv] if backend == 'triton' else qkv.unbind(0))]
        if backend in EVA_BACKENDS:
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            parameters = [x.detach().to(wide).requires_grad_() for x in (*summary, bias)]
            options = dict(
                summary_q=tuple(parameters[:4]),
                summary_k=tuple(parameters[4:8]),
                rel_pos_bias=parameters[8],
                noise=noise.to(wide),
                fused=backend == 'triton',
            )

            def forward():
                if backend == 'triton':
                    return eva_attention_packed(leaves[0], feat_size, **options)
                return eva_attention(*leaves, feat_size, **options)
        else:
            parameters = []

            def forward():
                if dtype == torch.float64:
                    return _Exact.apply(*leaves)
                return F.scaled_dot_product_attention(*leaves)

        def step():
            return torch.autograd.grad(forward(), [*leaves, *parameters], dy.to(dtype))

        return forward, step

    references: Dict[str, List[torch.Tensor]] = {}

    def tokens(forward, step, packed):
        """The output and the gradients of tokens; parameters' sums that cancel have tests of their own."""
        grads = step()
        return [forward().detach(), *(grads[0].unbind(0) if packed else grads[:3])]

    def contender(backend: str) -> Contender:
        row = _row('op', backend, batch, side, heads, heads * d)

        def check():
            if backend == 'triton' and eva_backend(device, dtype, d) != 'triton':
                raise NotAvailable
            if row['attention'] not in references:
                references[row['attention']] = tokens(
                    *calls('plain' if backend in EVA_BACKENDS else backend, torch.float64), packed=False
                )
            return _worst_error(tokens(*calls(backend, dtype), backend == 'triton'), references[row['attention']])

        context = _force(backend)
        return Contender(row, check, lambda: _timed_calls(setting, context, *calls(backend, dtype)), context=context)

    rows = _compare(
        setting,
        [contender(backend) for backend in _attention_backends(setting)],
        lambda row: ERROR_BOUNDS['plain' if row['backend'] == 'plain' else 'op'][dtype],
    )
    forward_bytes, backward_bytes = traffic(batch, N, heads * d, dtype)
    for row in rows:
        if setting.copy_gb_per_s and row['status'] == 'ok':
            copied = setting.copy_gb_per_s * 1e6  # bytes a millisecond
            row['forward_of_copy'] = round(forward_bytes / row['forward_ms'] / copied, 4)
            row['backward_of_copy'] = round(backward_bytes / (row['ms'] - row['forward_ms']) / copied, 4)
    return rows


def bench_layer(setting: Setting, batch: int, side: int, heads: int = 3, head_dim: int = 64) -> List[Row]:
    """A whole attention layer with its projections, parameters in float32, under autocast; arguments as `bench_op`.

    `forward_ms` is of the layer in evaluation, `ms` of forward and backward in training. The check is in evaluation.
    """
    feat_size, device = [side, side], setting.device
    x = torch.randn(batch, side * side, heads * head_dim, device=device).to(setting.dtype).requires_grad_()
    dy = torch.randn_like(x).detach()
    references: Dict[str, List[torch.Tensor]] = {}

    def exact(layer, attention):
        layer.fused_attn = False
        if attention == 'softmax':
            layer.attend = lambda qkv, feat_size: _Exact.apply(*qkv.unbind(0))
        wide = x.detach().double().requires_grad_()
        y = layer(wide, feat_size)
        return [y.detach(), *torch.autograd.grad(y, wide, dy.double())]

    def contender(backend: str) -> Contender:
        row = _row('layer', backend, batch, side, heads, heads * head_dim)
        context = _force(backend)
        torch.manual_seed(0)
        layer = (EvaAttention if backend in EVA_BACKENDS else SoftmaxAttention)(
            heads * head_dim, heads, device=device
        ).train()
        layer.fused_attn = backend != 'plain'
        judged = copy.deepcopy(layer).eval()

        def run(layer):
            with setting.autocast(cache_enabled=False):  # a graph may hold no weights cast outside of it
                return layer(x, feat_size)

        def check():
            if backend in EVA_BACKENDS and _eva_backend(layer) != backend:
                raise NotAvailable
            if row['attention'] not in references:
                references[row['attention']] = exact(copy.deepcopy(judged).double(), row['attention'])
            y = run(judged)
            return _worst_error([y.detach(), *torch.autograd.grad(y, x, dy.to(y.dtype))], references[row['attention']])

        def forward():
            return run(judged)

        def step():
            y = run(layer)
            return torch.autograd.grad(y, [x, *layer.parameters()], dy.to(y.dtype))

        return Contender(row, check, lambda: _timed_calls(setting, context, forward, step), context=context)

    return _compare(
        setting,
        [contender(backend) for backend in _attention_backends(setting)],
        lambda row: ERROR_BOUNDS['layer'][setting.dtype],
    )


# --------------------------------------------------------------------------------------------------------------------
# Models
# --------------------------------------------------------------------------------------------------------------------


def parse_model(text: str) -> Tuple[str, Dict[str, Any]]:
    """'name:key=value:key=value' to a name and its arguments; UserError for a name that timm does not know."""
    name, *pairs = text.split(':')
    if not timm.is_model(name):
        raise UserError(f'unknown model {name}{nearest(name, timm.list_models())}')
    kwargs = {}
    for pair in pairs:
        key, equals, value = pair.partition('=')
        if not equals:
            raise UserError(f'{text}: {pair!r} is not key=value')
        try:
            kwargs[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            kwargs[key] = value
    return name, kwargs


def _describe(name: str, kwargs: Dict[str, Any]) -> str:
    """What `parse_model` reads."""
    return ':'.join([name, *(f'{key}={value}' for key, value in kwargs.items())])


def _build(name: str, kwargs: Dict[str, Any], img_size: Optional[int]) -> nn.Module:
    """A model for images of a size, its own if None; its weights are the same at every call."""
    torch.manual_seed(0)
    try:
        return timm.create_model(**resolve_model_input_args(name, args=dict(img_size=img_size), **kwargs))
    except Exception as error:  # each model has its own errors for arguments that do not fit
        raise UserError(f'{_describe(name, kwargs)}: {first_line(error)[:300]}') from error


@functools.lru_cache
def input_size(text: str, img_size: Optional[int] = None) -> Tuple[int, ...]:
    """Channels, height and width of the images that `bench_model` gives a model, once one has passed through it.

    Raises:
        UserError: no such model, or not with these arguments or for images of this size.
    """
    model = _build(*parse_model(text), img_size).eval()
    channels, *sides = resolve_model_data_config(model)['input_size']
    size = (channels, *((img_size, img_size) if img_size else sides))
    try:
        with torch.no_grad():
            model(torch.zeros(1, *size))
    except Exception as error:  # likewise
        raise UserError(f'{text}, images of {size[1]} × {size[2]}: {first_line(error)[:300]}') from error
    return size


def _eva_layers(module: nn.Module) -> List[EvaAttention]:
    return [layer for layer in module.modules() if isinstance(layer, EvaAttention)]


def _set_fused(model: nn.Module, fused: bool) -> None:
    for module in model.modules():
        if isinstance(module, EvaAttention):
            module.fused_attn = fused
        elif hasattr(module, 'fused_mlp'):
            module.fused_mlp = fused


def _eva_backend(module: nn.Module) -> str:
    """The code that all EVA layers of a module take where they are, as they say themselves."""
    taken = {re.search(r'backend=(\w+)', layer.extra_repr()).group(1) for layer in _eva_layers(module)}
    return taken.pop() if len(taken) == 1 else 'plain'


def _model_contenders(text: str, setting: Setting, img_size: Optional[int]) -> List[Tuple[str, Dict, str, str]]:
    """(name, arguments, attention, backend) of a model and of the softmax model beside it."""
    name, kwargs = parse_model(text)
    backends = setting.backends or ('triton' if setting.cuda else 'plain', 'sdpa')
    softmax = [backend for backend in backends if backend not in EVA_BACKENDS]
    if not _eva_layers(_build(name, kwargs, img_size)):
        return [(name, kwargs, '', backend) for backend in (softmax if setting.backends else ('',))]
    contenders = [(name, kwargs, 'eva', backend) for backend in backends if backend in EVA_BACKENDS]
    if name in SOFTMAX_MODELS:
        contenders += [(*SOFTMAX_MODELS[name], 'softmax', backend) for backend in softmax]
    return contenders


def bench_model(
    setting: Setting, kind: str, text: str, batch: int, img_size: Optional[int] = None, compile_mode: str = ''
) -> List[Row]:
    """Images a second of a model and, beside an EVA model, of timm's softmax model of its size.

    Args:
        setting: Device, dtype, contenders.
        kind: 'infer', or 'train': forward, cross-entropy, backward, AdamW on one fixed batch of noise.
        text: The model, with arguments as `parse_model` reads them.
        batch: Images.
        img_size: Side of the images; the model's own if None.
        compile_mode: A mode of torch.compile; '' leaves all models as they are.

    Raises:
        UserError: no such model, or not with these arguments or of this size.
    """
    device, size = setting.device, input_size(text, img_size)
    torch.compiler.reset()

    def contender(name: str, kwargs: Dict[str, Any], attention: str, backend: str) -> Contender:
        model = _build(name, kwargs, img_size)
        model.to(device).train(kind == 'train')
        _set_fused(model, backend == 'triton')
        row = dict(
            bench=kind,
            case=text,
            model=_describe(name, kwargs),
            attention=attention,
            backend=backend,
            batch_size=batch,
            img_size=size[1],
            torchcompile=compile_mode or 'no',
        )
        context = _force(backend)
        images = torch.randn(batch, *size, device=device)
        expected: List[torch.Tensor] = []

        def check():
            if backend in EVA_BACKENDS and _eva_backend(model) != backend:
                raise NotAvailable
            judged = copy.deepcopy(model).eval()
            reference = copy.deepcopy(judged).double()
            _set_fused(reference, False)
            with torch.no_grad():
                with sdpa_kernel(SDPBackend.MATH):  # the contender's own may not take float64
                    expected.append(reference(images[:1].double()))
                with setting.autocast():
                    return _worst_error([judged(images[:1])], expected)

        def prepare():
            run = torch.compile(model, mode=compile_mode) if compile_mode else model

            @torch.no_grad()
            def infer():
                with setting.autocast():
                    return run(images)

            if kind == 'infer':
                error, limit = _worst_error([infer()[:1]], expected), ERROR_BOUNDS['model'][setting.dtype]
                if not error <= limit:
                    raise WrongResult(f'{error:.1e} from float64 in a batch, more than {limit:.0e}')
                return {'ms': _within(context, infer)}
            target = torch.randint(model.num_classes, (batch,), device=device)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05, fused=setting.cuda)

            def train():
                with setting.autocast():
                    loss = F.cross_entropy(run(images), target)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                return loss.detach()

            if not train().isfinite():
                raise WrongResult('a loss that is not finite')
            return {'ms': _within(context, train)}

        return Contender(row, check, prepare, context)

    rows = _compare(
        setting,
        [contender(*which) for which in _model_contenders(text, setting, img_size)],
        lambda row: ERROR_BOUNDS['model'][setting.dtype],
    )
    for row in rows:
        if row['status'] == 'ok':
            row['img_per_s'] = round(1e3 * batch / row['ms'], 1)
        if compile_mode in CUDA_GRAPHS:  # what a graph allocates it keeps from one call to the next
            row.pop('peak_memory_mib', None)
    return rows


# --------------------------------------------------------------------------------------------------------------------
# Results files
# --------------------------------------------------------------------------------------------------------------------


def _key(row: Row) -> Tuple[str, ...]:
    return tuple(str(row.get(column, '')) for column in KEY)


def read_rows(path: Path) -> List[Row]:
    """The rows of a results file; none where there is no file."""
    if not path.exists():
        return []
    with open(path, newline='') as stream:
        reader = csv.DictReader(stream)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise UserError(f'{path} has other columns; name another file')
        return list(reader)


def is_done(path: Path, key: Row) -> bool:
    """Whether a file has the rows of a comparison (columns of `KEY`) at this commit, and no failure among them."""
    rows = [row for row in read_rows(path) if _key(row) == _key(key) and row['commit'] == key['commit']]
    return bool(rows) and all(row['status'] in HARMLESS for row in rows)


def store_rows(path: Path, rows: List[Row]) -> None:
    """Put the rows of comparisons into a CSV file, in place of earlier rows of the same ones."""
    new = {_key(row) for row in rows}
    kept = [row for row in read_rows(path) if _key(row) not in new]
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix('.tmp')
    with open(beside, 'w', newline='') as stream:
        writer = csv.DictWriter(stream, COLUMNS, lineterminator='\n')
        writer.writeheader()
        writer.writerows([*kept, *rows])
    beside.replace(path)
