"""The sizes and launches of a call of the kernels, and whether those in Gluon run."""

import functools
import warnings
from types import ModuleType
from typing import Any, Dict, List, Optional, Tuple

import torch
import triton

from evavit.ops.common.launch import Launches, Memory, Pointer, ceil_div
from evavit.ops.grid import block_counts, cell_shape, window_shape

from . import why_not_gluon_sizes
from .forward import forward_windows
from .pieces import LN2, log_counts, pad_bias, pad_bias_fragments, table_grad

# Programs that keep a large GPU busy; a constant, so that sums are split alike on every device.
PROGRAMS = 768
# By measurement on an H100.
LAUNCH = {
    'forward_windows': dict(num_warps=4, num_stages=3),
    'forward_tokens': dict(num_warps=4, num_stages=2),
    'backward_shared': dict(num_warps=4, num_stages=3),
    'backward_summary': dict(num_warps=4, num_stages=1),
    'backward_tokens': dict(num_warps=4, num_stages=2),
    'gluon': dict(num_warps=4),
}
# The releases of Triton whose Gluon the kernels of `gluon.py` are written in and compile with.
GLUON_VERSIONS = (3, 6), (3, 9)


def why_not_gluon_device(device: int) -> Optional[str]:
    """Why the kernels in Gluon do not run on this CUDA device (-1 for the CPU), or None.

    Warns where it is Triton's release alone: another one would be faster.
    """
    if not isinstance(forward_windows, triton.runtime.JITFunction):
        return "Triton's interpreter has no Gluon"
    if device < 0:
        return 'no CUDA device'
    if torch.version.hip or torch.cuda.get_device_capability(device)[0] != 9:
        return 'the GPU is no Hopper'
    version = tuple(int(part) for part in triton.__version__.split('.')[:2])
    try:
        if not GLUON_VERSIONS[0] <= version <= GLUON_VERSIONS[1]:
            raise ImportError('not a release that they were tried with')
        from evavit.ops.eva import gluon  # noqa: F401
    except (ImportError, AttributeError) as error:
        warnings.warn(
            f'EVA takes its slower kernels, without Gluon: Triton is {triton.__version__} ({error}), '
            f'Triton 3.6 to 3.9 has the faster ones',
            stacklevel=2,
        )
        return f'Triton is {triton.__version__}, not 3.6 to 3.9'
    return None


@functools.cache
def _gluon(device: int) -> Optional[ModuleType]:
    """The module of kernels in Gluon where the device runs them, or None."""
    if why_not_gluon_device(device) is not None:
        return None
    from evavit.ops.eva import gluon

    return gluon


def window_tiles(tokens: int, full: bool) -> Tuple[int, int]:
    """Rows of a tile of tokens of a window, and tiles of the window; `full` for float32."""
    rows = min(32 if full else 64, max(16, triton.next_power_of_2(tokens)))
    return rows, ceil_div(tokens, rows)


class Plan:
    """Sizes of the grid, the tiles and the launches for one shape of arguments."""

    def __init__(
        self,
        shape: Tuple[int, int, int, int],
        full: bool,
        feat_size: Tuple[int, int],
        window_size: int,
        partition_grid: int,
        count_cells: str = 'one',
        num_prefix_tokens: int = 0,
    ) -> None:
        self.B, self.heads, tokens, self.D = shape
        self.P, self.N = num_prefix_tokens, tokens - num_prefix_tokens
        self.pairs = self.B * self.heads
        self.H, self.W = feat_size
        grid = [self.H, self.W]
        self.BD = max(16, triton.next_power_of_2(self.D))
        # float32 products go through shared memory, which half-sized tiles do not overrun.
        self.full = full
        tile = 32 if full else 64
        # 'ieee' is full float32; the kernels of halves multiply float32 in the summaries alone, where tf32 keeps more
        # bits than the operands that autocast would give, as the gradients' error bound needs.
        self.prec, self.summary_prec = 'ieee', 'ieee' if full else 'tf32'

        self.local = window_size > 0
        self.side = max(window_size, 1)
        self.wh, self.ww = window_shape(grid, window_size) if self.local else (1, 1)
        if self.local:
            n_wy, self.n_wx = block_counts(grid, (self.wh, self.ww))
            self.n_win = n_wy * self.n_wx
            self.BM, self.NT = window_tiles(self.wh * self.ww, full)
        else:
            self.BM, self.NT, self.n_wx = tile, 1, 1
            self.n_win = ceil_div(self.N, tile)

        self.cells, self.n_cx, self.ch, self.cw = 0, 1, 1, 1
        if partition_grid > 0:
            self.ch, self.cw = cell_shape(grid, partition_grid)
            n_cy, self.n_cx = block_counts(grid, (self.ch, self.cw))
            self.cells = n_cy * self.n_cx
        self.rows = self.cells + self.P
        self.BC = min(tile, max(16, triton.next_power_of_2(self.rows))) if self.rows else 16
        self.NC = ceil_div(self.rows, self.BC)
        self.cells_total, self.rows_total = self.pairs * self.cells, self.pairs * self.rows
        # As two of the kernels take them.
        self.cell_sizes = (
            *(self.heads, self.H, self.W, self.n_cx, self.cells, self.ch, self.cw, self.cells_total, self.rows),
        )

        self.count = 0  # COUNT of the kernels
        if count_cells != 'one' and self.cells:
            self.count = 2 if count_cells == 'outside' and self.local else 1

        self.small = self.BD > 64 or self.full
        self.shared_tile = dict(BM=32 if self.small else 64, WH=1, WW=1, NT=1)  # of backward_shared
        self.places = self.N
        if self.count == 2:
            BM = min(32, self.BM)  # rows of windows take more registers: at 64 they spill
            NT = ceil_div(self.wh * self.ww, BM)
            self.shared_tile = dict(BM=BM, WH=self.wh, WW=self.ww, NT=NT)
            self.places = self.n_win * NT * BM

        # The default windows and cells: the forward's fast case.
        self.one_tile = self.local and self.NT == 1 and self.NC <= 1
        self.edge = self.H % self.wh > 0 or self.W % self.ww > 0
        self.bias_sizes = dict(SIDE=self.side, WH=self.wh, WW=self.ww)
        dtype = torch.float32 if full else torch.bfloat16  # of halves, either
        tokens = self.wh * self.ww if self.local else 0
        self.gluon_sizes = self.cells > 0 and why_not_gluon_sizes(dtype, self.D, tokens, self.rows) is None

    def gluon(self, strides: Tuple[int, ...], device: int) -> Optional[ModuleType]:
        """The module of kernels in Gluon where they take tensors `(B, h, N, d)` of these strides, or None.

        Of sizes see `why_not_gluon_sizes`. The kernels copy 16 bytes at a time: channels are next to each other, other
        strides are multiples of 16, as Triton tells the compiler, and tensors start at multiples of 16 bytes, which the
        caller sees to. Offsets inside an image are 32 bits.
        """
        fits = (
            self.gluon_sizes
            and all(x == 1 for x in strides[3::4])
            and all(self.N * x < 2**31 for x in strides[2::4])
            and not any(x % 16 for i, x in enumerate(strides) if i % 4 != 3)
        )
        return _gluon(device) if fits else None

    @functools.cached_property
    def window_cells(self) -> Dict[str, int]:
        """The most rows and columns of cells that a window meets, and the tile that holds them."""

        def spanned(tokens: int, cell: int, cells: int) -> int:
            return min(ceil_div(tokens - 1, cell) + 1, cells)

        rows, cols = spanned(self.wh, self.ch, self.cells // self.n_cx), spanned(self.ww, self.cw, self.n_cx)
        return dict(NCY=rows, NCX=cols, KE=max(16, triton.next_power_of_2(rows * cols)))

    @functools.cached_property
    def cell_tiles(self) -> Tuple[dict, dict]:
        """Tiles of the two cell kernels: G cells, T tokens of each; ONCE if that is all of their tokens.

        The forward takes many cells and few tokens, so that weights are loaded and projections done for many cells at
        once, as long as programs are enough. The backward takes whole cells, and few. All by measurement on an H100.

        No tile has fewer elements than threads, unless it has one warp: several would hold the same elements, and write
        them to the same places of shared memory at the same time.
        """
        area, pairs = self.ch * self.cw, self.pairs
        tokens, cells = triton.next_power_of_2(area), triton.next_power_of_2(max(self.cells, 1))
        shrink = max(64, self.BD) // 64 * (2 if self.full else 1)
        narrow = self.BD <= 32 and not self.full

        def tile(warps: int, G: int, T: int) -> dict:
            warps = min(warps, max(1, G * T * self.BD // 32))
            return dict(G=G, T=T, ONCE=area <= T, num_warps=warps, num_stages=1)

        T = min(tokens, 4 if narrow else 8)
        few = tokens <= 4 and shrink == 1 and not narrow
        if narrow:
            warps, G = (8, 64) if pairs >= PROGRAMS // 2 else (1, 8)
        elif few:
            warps, G = 4, 16
        else:
            warps = 16 if pairs >= PROGRAMS // 2 else 8 if pairs >= PROGRAMS // 16 else 4
            G = (512 if warps == 16 else 256) // shrink // T
        G = min(G, cells)
        while warps == 4 and G > 1 and pairs * ceil_div(self.cells, G) < PROGRAMS // 4:
            G, T = G // 2, min(T * 2, tokens)
        forward = tile(warps, G, T)
        if warps == 16 or (warps == 8 and shrink == 1) or few:  # what registers allow, or for one program more
            forward['maxnreg'] = 128

        T = min(tokens, 256 // shrink)
        G = min(max(1, 32 // T), cells)
        warps = 1 if narrow else 2 if T * G <= 32 else 4
        return forward, tile(warps, G, T)

    @functools.cached_property
    def options(self) -> Dict[str, Dict[str, Any]]:
        """What the kernels' launches have in common for this plan: constexprs and Triton's own options."""
        sizes = dict(D=self.D, BD=self.BD)
        tiles = dict(**sizes, BM=self.BM, BC=self.BC, PREC=self.prec)
        many = dict(**tiles, NT=self.NT, NC=self.NC, LOCAL=self.local)
        window = dict(WH=self.wh, WW=self.ww)
        count = dict(COUNT=self.count)
        both = dict(**window, CH=self.ch, CW=self.cw)
        forward_tile, backward_tile = self.cell_tiles
        options: Dict[str, Dict[str, Any]] = {
            'forward_cells': dict(**sizes, **forward_tile, PREC=self.summary_prec),
            'forward_windows': dict(**tiles, **window, **count, EDGE=self.edge, SHARED=self.rows > 0),
            'forward_windows_gluon': dict(**window, **count, D=self.D, EDGE=self.edge),
            'forward_tokens': dict(**many, **window, **count),
            'backward_shared': dict(
                **self.shared_tile, **count, D=self.D, BD=self.BD, BC=self.BC, SHARED=self.rows > 0, PREC=self.prec
            ),
            'backward_shared_gluon': dict(**(window if self.count == 2 else dict(WH=1, WW=1)), **count, D=self.D, T=32),
            'backward_weights': dict(**sizes, **backward_tile),
            'backward_summary': dict(**sizes, R=32 if self.small else 64, PREC=self.summary_prec),
            'backward_tokens': dict(**many, **both, **count, CELLS=self.cells > 0),
            'backward_tokens_gluon': dict(**both, **count, **self.window_cells, D=self.D, EDGE=self.edge),
        }
        for name, of_kernel in options.items():
            of_kernel.update(LAUNCH.get(name, LAUNCH['gluon'] if name.endswith('_gluon') else {}))
        if self.NC > 1:  # tiles of other keys run beside it: less to wait for, and registers are what it lacks
            options['backward_shared']['num_stages'] = 2
        return options

    def split(self, tokens: int) -> Tuple[int, int]:
        """How many programs share the tokens of an (image, head), so that the card is full, and the tokens of each: a
        multiple of 64, and no fewer than 256 unless that is all."""
        splits = max(1, min(ceil_div(PROGRAMS, self.pairs), ceil_div(tokens, 256)))
        per_split = ceil_div(ceil_div(tokens, splits), 64) * 64
        return ceil_div(tokens, per_split), per_split

    @functools.cached_property
    def prefix(self) -> Dict[str, Any]:
        """What the launches of the prefix tokens' kernels have in common."""
        return dict(P=self.P, BP=16, D=self.D, BD=self.BD, num_warps=4, num_stages=3)

    def per_program(self, windows: int) -> int:
        """Windows that one program walks: at most `windows`, fewer where the card would stay empty."""
        enough = max(1, self.pairs * self.n_win // PROGRAMS)
        return min(windows, triton.next_power_of_2(enough), self.n_win)

    @property
    def bias_tile(self) -> int:
        """Rows and columns of a head's padded bias."""
        return self.NT * self.BM

    def pad_bias(self, run: Launches, table: Pointer, padded: Pointer, unit: float) -> None:
        """Write the bias `(h, bias_tile, bias_tile)` of this grid's windows from its table, aligned to tiles."""
        grid, sizes = (self.bias_tile // 16, self.bias_tile // 16, self.heads), self.bias_sizes
        run.launch(pad_bias, grid, table, padded, unit, self.bias_tile, **sizes, TILE=16)

    def pad_bias_fragments(self, run: Launches, table: Pointer, padded: Pointer, unit: float) -> None:
        """`pad_bias` in the order in which the kernels in Gluon load it."""
        run.launch(pad_bias_fragments, (16, 1, self.heads), table, padded, unit, **self.bias_sizes)

    def bias_grad(self, run: Launches, dbias: Pointer, table: Pointer) -> None:
        """The adjoint of `pad_bias`, but for the unit: write the gradient of the table."""
        grid = ceil_div((2 * self.side - 1) ** 2, 16), self.heads, 1
        run.launch(table_grad, grid, dbias, table, self.bias_tile, self.heads, **self.bias_sizes, E=16, I=64)

    def log_counts(
        self, run: Launches, gluon: bool, scale: float, memory: Optional[Memory] = None
    ) -> Optional[Pointer]:
        """What the number of its tokens adds to a cell's logits, by window, or None where each cell counts once; in
        scratch memory, or in a memory that is the call's first tensor."""
        if self.count == 0:
            return None
        rows, tiles, BC = self.n_win if self.count == 2 else 1, 1 if gluon else self.NC, 64 if gluon else self.BC
        shape = torch.float32, rows, tiles * BC
        log_count = run.scratch(*shape) if memory is None else memory.place(0, *shape)
        sizes = self.H, self.W, self.n_wx, self.n_cx, self.cells, self.rows, self.ch, self.cw
        options = dict(WH=self.wh, WW=self.ww, BC=BC, COUNT=self.count)
        run.launch(log_counts, (rows, tiles, 1), log_count, scale if gluon else LN2, *sizes, **options, num_warps=1)
        return log_count


@functools.lru_cache(maxsize=256)
def cached_plan(
    shape: Tuple[int, int, int, int],
    full: bool,
    feat_size: Tuple[int, int],
    window_size: int,
    partition_grid: int,
    count_cells: str = 'one',
    num_prefix_tokens: int = 0,
) -> Plan:
    return Plan(shape, full, feat_size, window_size, partition_grid, count_cells, num_prefix_tokens)


def takes_gluon(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, feat_size: List[int], window_size: int, partition_grid: int
) -> bool:
    """Whether the backend 'gluon' runs its kernels on these tensors, with a gradient like them."""
    if any(x.data_ptr() % 16 for x in (q, k, v)):
        return False
    plan = cached_plan(tuple(q.shape), q.dtype == torch.float32, tuple(feat_size), window_size, partition_grid)
    return plan.gluon((*q.stride(), *k.stride(), *v.stride()), q.get_device()) is not None


# By measurement on an H200.
WINDOWS_FORWARD = 8
WINDOWS_BACKWARD = 8
