"""Contenders of a comparison, and the checks and clocks that they go through; attention alone and attention layers.

A *comparison* is one setting and the contenders measured on it, in one process and on the same data: EVA's plain path
and each of its kernels, PyTorch's scaled_dot_product_attention with each of its backends forced, timm's softmax model.
Each contender is first held against float64. Where it is off, its row says so and has no times.

On a CUDA device attention and layers are timed as replays of a CUDA graph, so that Python is not measured (`eager_*`:
without a graph). Models are timed call after call, as they run (`models.py`).
"""

import contextlib
import copy
import traceback
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, ContextManager, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from timm.layers import RelPosBias
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from evavit.errors import UserError, tell
from evavit.files import append_to
from evavit.layers import EvaAttention, SoftmaxAttention
from evavit.ops import eva_attention, eva_attention_packed, eva_num_cells
from evavit.ops.backends import use_backend
from evavit.ops.eva import EVA
from evavit.ops.eva.case import EvaCase

from .clocks import Call, graphed, host_seconds, median_seconds, peak_bytes
from .peers import PEERS, Peer, first_head
from .results import HARMLESS, Row

__all__ = [
    'ERROR_BOUNDS',
    'GRIDS',
    'SDPA_BACKENDS',
    'Contender',
    'NotAvailable',
    'Setting',
    'Sizes',
    'WrongResult',
    'attention_backends',
    'backend_names',
    'bench_layer',
    'bench_op',
    'check_backend',
    'default_batch',
    'force',
    'measure',
    'traffic',
    'within',
    'worst_error',
]

SDPA_BACKENDS = {
    'flash': SDPBackend.FLASH_ATTENTION,
    'cudnn': SDPBackend.CUDNN_ATTENTION,
    'efficient': SDPBackend.EFFICIENT_ATTENTION,
}


def backend_names() -> Tuple[str, ...]:
    """All contenders: EVA's registered backends, SDPA's, 'sdpa', which leaves the choice to PyTorch, and peers."""
    return (*EVA.backends, *SDPA_BACKENDS, 'sdpa', *PEERS)


# Sides of the token grid and images a batch. From 28 × 28 to 224 × 224 every batch has 100,352 tokens or nearly so.
GRIDS = {14: 256, 28: 128, 56: 32, 80: 16, 112: 8, 160: 4, 224: 2, 256: 2}
TOKENS = 100_352

Tensors = Tuple[torch.Tensor, ...]

# Attention weights that the float64 reference of softmax holds at one time: half a GiB.
BLOCK_ELEMENTS = 2**26

# Relative RMS against float64 that no output and no gradient of tokens may pass. Kernels are held to the first line;
# the plain path rounds between its operators, a layer in its projections too, a model in every layer. Peers may take
# TF32 for float32.
ERROR_BOUNDS = {
    'op': {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 5e-3},
    'plain': {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2},
    'peer': {torch.float32: 5e-3, torch.bfloat16: 2e-2, torch.float16: 2e-2},
    'layer': {torch.float32: 5e-5, torch.bfloat16: 2e-2, torch.float16: 1e-2},
    'model': {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-2},
}


class WrongResult(RuntimeError):
    """A contender's result is off: it is not timed."""


class NotAvailable(RuntimeError):
    """A backend does not take this device, dtype or shape."""


@dataclass
class Setting:
    """What all comparisons of a run share.

    Args:
        device: Where to measure.
        dtype: Of attention's tensors, and of autocast for layers and models (float32: no autocast).
        backends: Names from `backend_names`; () for those that the device has.
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

            try:
                stream = append_to(self.lock)
            except OSError as error:
                raise UserError(f'--lock {self.lock}: cannot be opened ({error.strerror})') from error
            with stream:
                fcntl.flock(stream, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
                yield

    def autocast(self, **kwargs: Any) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32, **kwargs)


@dataclass
class Contender:
    """One of a comparison.

    Args:
        row: What identifies its row.
        check: Returns its error against float64, see `worst_error`.
        prepare: Makes the calls to time, by column, once the check is passed.
        context: What the check and the first calls run in.
    """

    row: Row
    check: Callable[[], float]
    prepare: Callable[[], Dict[str, Call]]
    context: Callable[[], ContextManager] = contextlib.nullcontext
    calls: Dict[str, Call] = field(default_factory=dict)


def worst_error(got: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
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


def measure(
    setting: Setting,
    contenders: List[Contender],
    bound: Callable[[Row], float],
    clock: Callable[..., List[float]] = median_seconds,
) -> List[Row]:
    """Check, then time every contender; a row each, in their order.

    Args:
        setting: Device, repeats, lock.
        contenders: What is compared.
        bound: From a contender's row to the largest error that it may have.
        clock: `median_seconds`, or `host_seconds`.
    """
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
                for call in contender.calls.values():  # what fails is this contender's
                    call()
                if setting.cuda:
                    # A graph allocates when it is made, not when it is replayed.
                    call = contender.calls.get('eager_ms', contender.calls['ms'])
                    call()
                    row['peak_memory_mib'] = round(peak_bytes(call, setting.device) / 2**20, 1)
            ready.append(contender)
        except Exception as error:
            row['status'] = _reason(error)
            if row['status'] not in HARMLESS and not isinstance(error, WrongResult):
                traceback.print_exc()
        if setting.cuda:
            torch.cuda.empty_cache()
    for column in ready[0].calls if ready else ():
        calls = [contender.calls[column] for contender in ready]
        with setting.turn(alone=True):
            seconds = clock(calls, setting.device, setting.repeats, setting.warmup)
        for contender, value in zip(ready, seconds, strict=True):
            contender.row[column] = round(1e3 * value, 4)
    return [contender.row for contender in contenders]


def force(backend: str) -> Callable[[], ContextManager]:
    """A context in which EVA, or scaled_dot_product_attention, takes one backend where it can."""
    if backend in SDPA_BACKENDS:
        return lambda: sdpa_kernel(SDPA_BACKENDS[backend])
    return (lambda: use_backend(backend)) if backend in EVA.backends else contextlib.nullcontext


def within(context: Callable[[], ContextManager], call: Call) -> Call:
    """The call inside of a context that is entered for each."""

    def inside() -> object:
        with context():
            return call()

    return inside


def _timed_calls(setting: Setting, context: Callable[[], ContextManager], forward: Call, step: Call) -> Dict[str, Call]:
    """The columns of a forward without gradients and of forward and backward."""
    infer, step = within(context, torch.no_grad()(forward)), within(context, step)
    if not setting.cuda:
        return {'forward_ms': infer, 'ms': step}
    with torch.no_grad():
        replay = graphed(infer)
    return {'eager_forward_ms': infer, 'eager_ms': step, 'forward_ms': replay, 'ms': graphed(step)}


class SoftmaxExact(torch.autograd.Function):
    """Softmax attention in blocks of queries: float64 references at lengths whose N × N weights fit no memory."""

    @staticmethod
    def _weights(q: torch.Tensor, k: torch.Tensor) -> Iterator[Tuple[slice, torch.Tensor]]:
        rows = max(1, BLOCK_ELEMENTS // (k.shape[0] * k.shape[1] * k.shape[2]))
        for start in range(0, q.shape[2], rows):
            block = slice(start, start + rows)
            yield block, (q[:, :, block] * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1)

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(q, k, v)
        return torch.cat([weights @ v for _, weights in SoftmaxExact._weights(q, k)], 2)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Tuple[torch.Tensor, ...]:
        q, k, v = ctx.saved_tensors
        dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
        for block, weights in SoftmaxExact._weights(q, k):
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


def attention_backends(setting: Setting) -> Sequence[str]:
    """The contenders of `bench_op` and `bench_layer`."""
    return setting.backends or ((*EVA.backends, *SDPA_BACKENDS) if setting.cuda else ('plain', 'sdpa'))


class Sizes(NamedTuple):
    """Of EVA in a comparison: what its rows are known by beside the grid, under the names of `eva_attention`.

    With `count_cells` 'one', the paper's, it has a table of positions and noise as in training from scratch. Else it
    has neither, as in a converted network.
    """

    window_size: int = 7
    partition_grid: int = 7
    num_prefix_tokens: int = 0
    count_cells: str = 'one'


def _row(
    bench: str,
    backend: str,
    batch: int,
    side: int,
    heads: int,
    width: int,
    sizes: Sizes = Sizes(),  # noqa: B008
) -> Row:
    return dict(
        bench=bench,
        case=f'{side}x{side}',
        attention='eva' if backend in EVA.backends else PEERS[backend].attention if backend in PEERS else 'softmax',
        backend=backend,
        batch_size=batch,
        tokens=side * side,
        width=width,
        heads=heads,
        **sizes._asdict(),
    )


def traffic(batch: int, tokens: int, width: int, dtype: torch.dtype) -> Tuple[int, int]:
    """Bytes that attention has to move: forward q, k, v in, o out; backward q, k, v, o, do in, dq, dk, dv out."""
    tensor = batch * tokens * width * dtype.itemsize
    return 4 * tensor, 8 * tensor


def check_backend(contender: str, taken: Callable[[], str]) -> None:
    """Raises NotAvailable where EVA takes another backend than the one that its contender is named after."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of a choice that cannot be obeyed: the row says so
        if contender in EVA.backends and taken() != contender:
            raise NotAvailable


def check_peer(backend: str, side: int, sizes: Sizes) -> None:
    """Raises NotAvailable, after a line that says why, where a peer does not run."""
    reason = PEERS[backend].why_not(side, sizes.window_size)
    if not reason and sizes.num_prefix_tokens:
        reason = 'it has no prefix tokens'
    if reason:
        tell(f'{backend} is left out: {reason}')
        raise NotAvailable


def bench_op(
    setting: Setting,
    batch: int,
    side: int,
    heads: int = 3,
    head_dim: int = 64,
    sizes: Sizes = Sizes(),  # noqa: B008, it cannot be changed
) -> List[Row]:
    """Attention alone: q, k, v and dy in; y, dq, dk, dv (for EVA also its parameters' gradients) out.

    Args:
        setting: Device, dtype, contenders.
        batch: Images.
        side: Of the square token grid.
        heads: Heads h.
        head_dim: Channels d of a head.
        sizes: Of EVA. Softmax attends over prefix tokens and grid alike.

    Returns:
        A row a contender. `forward_ms` is without, `ms` with gradients: forward and backward. `forward_of_copy` and
        `backward_of_copy` are the achieved bytes a second (`traffic`; the backward is `ms` less `forward_ms`) as a
        fraction of a copy's.
    """
    N, d, feat_size = sizes.num_prefix_tokens + side * side, head_dim, [side, side]
    device, dtype, from_scratch = setting.device, setting.dtype, sizes.count_cells == 'one'
    qkv = torch.randn(batch, N, 3, heads, d, device=device).to(dtype).permute(2, 0, 3, 1, 4)
    noise = torch.randn(batch, heads, eva_num_cells(feat_size, sizes.partition_grid), d, device=device)
    dy = torch.randn(batch, N, heads, d, device=device).to(dtype).transpose(1, 2)
    summary = [
        x.to(device)
        for _ in range(2)
        for x in (torch.randn(d, d) * d**-0.5, torch.zeros(d), torch.ones(d), torch.zeros(d))
    ]
    window = (sizes.window_size, sizes.window_size)
    own = [RelPosBias(window, heads).relative_position_bias_table.detach().to(device)] if from_scratch else []

    cells = torch.randn(2, *noise.shape, device=device)  # keys and values that a peer has behind those of the tokens

    def peer_leaves(peer: Peer, dtype: torch.dtype) -> List[torch.Tensor]:
        q, k, v = qkv.to(dtype).unbind(0)
        if peer.cells:
            k, v = (torch.cat(pair, 2) for pair in zip((k, v), cells.to(dtype).unbind(0), strict=True))
        return [x.detach().requires_grad_() for x in (q, k, v)]

    def peer_error(backend: str) -> float:
        """Of the first head of the first image, output and gradients; what a peer needs is checked before."""
        peer = PEERS[backend]
        leaves = [x.detach().requires_grad_() for x in first_head(peer_leaves(peer, torch.float64))]
        y = peer.exact(side, sizes.window_size)(*leaves)
        expected = [y.detach(), *torch.autograd.grad(y, leaves, dy[:1, :1].double())]
        return worst_error(first_head(outputs(backend, dtype)), expected)

    def calls(backend: str, dtype: torch.dtype) -> Tuple[Callable[[], torch.Tensor], Callable[[], Tensors]]:
        # The kernels take q, k, v as one tensor, as the layer has them; apart, no gradient has to be gathered.
        packed = backend in EVA.backends and backend != 'plain'
        if backend in PEERS:
            leaves = peer_leaves(PEERS[backend], dtype)
        else:
            leaves = [x.detach().to(dtype).requires_grad_() for x in ([qkv] if packed else qkv.unbind(0))]
        parameters: List[torch.Tensor] = []
        if backend in EVA.backends:
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            parameters = [x.detach().to(wide).requires_grad_() for x in (*summary, *own)]
            options: Dict[str, Any] = dict(
                summary_q=tuple(parameters[:4]),
                summary_k=tuple(parameters[4:8]),
                rel_pos_bias=parameters[8] if from_scratch else None,
                noise=noise.to(wide) if from_scratch else None,
                fused=packed,
                **sizes._asdict(),
            )

            def forward() -> torch.Tensor:
                if packed:
                    return eva_attention_packed(leaves[0], feat_size, **options)
                q, k, v = leaves
                return eva_attention(q, k, v, feat_size, **options)
        elif backend in PEERS:
            attend = PEERS[backend].make(side, sizes.window_size, cells.shape[3], device)

            def forward() -> torch.Tensor:
                return attend(*leaves)
        else:

            def forward() -> torch.Tensor:
                if dtype == torch.float64:
                    return SoftmaxExact.apply(*leaves)
                q, k, v = leaves
                return F.scaled_dot_product_attention(q, k, v)

        def step() -> Tensors:
            return torch.autograd.grad(forward(), [*leaves, *parameters], dy.to(dtype))

        return forward, step

    def outputs(backend: str, dtype: torch.dtype) -> List[torch.Tensor]:
        """The output and the gradients of tokens; parameters' sums that cancel have tests of their own."""
        forward, step = calls(backend, dtype)
        grads = step()
        return [forward().detach(), *(grads[0].unbind(0) if grads[0].dim() == 5 else grads[:3])]

    references: Dict[str, List[torch.Tensor]] = {}

    def contender(backend: str) -> Contender:
        row = _row('op', backend, batch, side, heads, heads * d, sizes)
        case = EvaCase(
            device, dtype, d, sizes.window_size, sizes.partition_grid, (side, side),
            count_cells=sizes.count_cells, num_prefix_tokens=sizes.num_prefix_tokens,
        )  # fmt: skip

        def check() -> float:
            if backend in PEERS:
                check_peer(backend, side, sizes)
                return peer_error(backend)
            check_backend(backend, lambda: EVA.name(case))
            if row['attention'] not in references:
                exact = 'plain' if backend in EVA.backends else backend
                references[row['attention']] = outputs(exact, torch.float64)
            return worst_error(outputs(backend, dtype), references[row['attention']])

        context = force(backend)
        return Contender(row, check, lambda: _timed_calls(setting, context, *calls(backend, dtype)), context)

    kinds = {'plain': 'plain', **dict.fromkeys(PEERS, 'peer')}
    rows = measure(
        setting,
        [contender(backend) for backend in attention_backends(setting)],
        lambda row: ERROR_BOUNDS[kinds.get(row['backend'], 'op')][dtype],
    )
    forward_bytes, backward_bytes = traffic(batch, N, heads * d, dtype)
    for row in rows:
        if setting.copy_gb_per_s and row['status'] == 'ok':
            copied = setting.copy_gb_per_s * 1e6  # bytes a millisecond
            row['forward_of_copy'] = round(forward_bytes / row['forward_ms'] / copied, 4)
            row['backward_of_copy'] = round(backward_bytes / (row['ms'] - row['forward_ms']) / copied, 4)
    return rows


def bench_layer(
    setting: Setting, batch: int, side: int, heads: int = 3, head_dim: int = 64, host: bool = False
) -> List[Row]:
    """A whole attention layer with its projections, parameters in float32, under autocast; arguments as `bench_op`.

    `forward_ms` is of the layer in evaluation, `ms` of forward and backward in training. The check is in evaluation.
    With `host` these are the processor's times until all is launched, of EVA and of SDPA, each with the backend that it
    takes by itself.
    """
    feat_size, device = [side, side], setting.device
    x = torch.randn(batch, side * side, heads * head_dim, device=device).to(setting.dtype).requires_grad_()
    dy = torch.randn_like(x).detach()
    references: Dict[str, List[torch.Tensor]] = {}

    def exact(layer: Any, attention: str) -> List[torch.Tensor]:
        layer.fused_attn = False
        if attention == 'softmax':
            layer.attend = lambda qkv, feat_size: SoftmaxExact.apply(*qkv.unbind(0))
        wide = x.detach().double().requires_grad_()
        y = layer(wide, feat_size)
        return [y.detach(), *torch.autograd.grad(y, wide, dy.double())]

    def contender(backend: str) -> Contender:
        row = _row('host' if host else 'layer', backend, batch, side, heads, heads * head_dim)
        context = contextlib.nullcontext if host else force(backend)
        torch.manual_seed(0)
        kind = EvaAttention if backend in EVA.backends else SoftmaxAttention
        layer: Any = kind(heads * head_dim, heads, device=device).train()
        layer.fused_attn = host or backend != 'plain'
        if host and row['attention'] == 'eva':
            with setting.autocast():
                row['backend'] = layer.backend
        judged = copy.deepcopy(layer).eval()

        def run(layer: nn.Module) -> torch.Tensor:
            with setting.autocast(cache_enabled=False):  # a graph may hold no weights cast outside of it
                return layer(x, feat_size)

        def check() -> float:
            if backend in PEERS:
                raise NotAvailable
            with setting.autocast():
                check_backend(row['backend'], lambda: layer.backend)
            if row['attention'] not in references:
                references[row['attention']] = exact(copy.deepcopy(judged).double(), row['attention'])
            y = run(judged)
            return worst_error([y.detach(), *torch.autograd.grad(y, x, dy.to(y.dtype))], references[row['attention']])

        def step() -> Tensors:
            y = run(layer)
            return torch.autograd.grad(y, [x, *layer.parameters()], dy.to(y.dtype))

        def prepare() -> Dict[str, Call]:
            if host:
                return {'forward_ms': torch.no_grad()(lambda: run(judged)), 'ms': step}
            return _timed_calls(setting, context, lambda: run(judged), step)

        return Contender(row, check, prepare, context)

    return measure(
        setting,
        [contender(backend) for backend in (('plain', 'sdpa') if host else attention_backends(setting))],
        lambda row: ERROR_BOUNDS['layer'][setting.dtype],
        host_seconds if host else median_seconds,
    )
