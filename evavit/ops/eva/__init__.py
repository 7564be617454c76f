"""EVA, efficient attention via control variates (Zheng et al., ICLR 2023, arXiv 2302.04542), on a 2D token grid.

A query attends exactly to the tokens of its own window, the set E, and to one summary of each cell P_c of the grid:
a key k̃_c in place of the cell's keys and a control variate β_c in place of its values. Equation numbers are the
paper's; docs/math.md goes from the control variate to these lines.

Here are the arguments and the choice of a backend: `plain.py`, with `cpu.py` for a CPU without gradients, or kernels
in `triton/` and `gluon.py`. The public functions are written for TorchScript as well, which takes the plain path.
"""

from typing import List, Optional, Tuple

import torch

from evavit.ops.backends import Backend, Registry
from evavit.ops.grid import static_size

from .case import EvaCase, EvaOptions, SummaryTensors, as_summary, eva_case, eva_num_cells
from .checks import (
    check_count_of_tokens,
    check_eva_options,
    check_packed_tokens,
    check_partition,
    check_tokens,
    softmax_scale,
)
from .cpu import eva_cpu, takes_eva_cpu
from .plain import eva_plain, split_packed
from .triton import GLUON, TRITON

__all__ = [
    'EVA',
    'eva_attention',
    'eva_attention_packed',
    'eva_attention_projected',
    'eva_backend',
    'eva_num_cells',
]


def _run_plain(tokens: Tuple[torch.Tensor, ...], options: EvaOptions) -> torch.Tensor:
    if takes_eva_cpu(tokens, options):
        return eva_cpu(tokens[0], options)
    q, k, v = tokens if len(tokens) == 3 else split_packed(tokens[0])
    return eva_plain(q, k, v, options, fused=True)


# `run(tokens, options)` of these takes (q, k, v), or one tensor with all three, and arguments that have been checked.
EVA = Registry('eva_attention', EvaCase)
EVA.register(GLUON)
EVA.register(TRITON)
EVA.register(Backend('plain', lambda case: None, _run_plain))


def _run(tokens: Tuple[torch.Tensor, ...], options: EvaOptions) -> torch.Tensor:
    if tokens[0].shape[-4] == 0:  # an empty batch has nothing to launch a kernel for
        return _run_plain(tokens, options)
    return EVA.choose(eva_case(tokens[0], tokens[0].shape[-1], options)).run(tokens, options)


def eva_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    feat_size: List[int],
    summary_q: Optional[SummaryTensors] = None,
    summary_k: Optional[SummaryTensors] = None,
    rel_pos_bias: Optional[torch.Tensor] = None,
    window_size: int = 7,
    partition_grid: int = 7,
    scale: Optional[float] = None,
    proposal_scale: float = 1.0,
    noise: Optional[torch.Tensor] = None,
    dropout_p: float = 0.0,
    norm_eps: float = 1e-5,
    fused: bool = False,
    count_cells: str = 'one',
    num_prefix_tokens: int = 0,
) -> torch.Tensor:
    """Efficient attention via control variates, Equation (16): in plain PyTorch, or with `fused` by CUDA kernels.

    With s the scale, E^n the window of query n, and q̄_c, k̄_c the means of q, k over the tokens of cell P_c:

        q̃_c, k̃_c = LN_q(W_q q̄_c + b_q), LN_k(W_k k̄_c + b_k)                                    (26)
        ω_c      = s^½ · proposal_scale · (q̃_c + k̃_c) + noise_c                                  (28), Algorithm 1
        β_c      = Σ_m softmax_m(ω_c · s^½ k_m - ½ s ‖k_m‖²) v_m,  m ∈ P_c
        y_n      = softmax([s q_n·k_m + b(n, m)  for m ∈ E^n] ∪ [s q_n·k̃_c + log n_c  for all c])
                   applied to the values [v_m] ∪ [β_c]                                            (16)

    The paper has n_c = 1: a cell counts once. `count_cells` lets it count as its tokens do in softmax attention.

    Prefix tokens, such as a class token, come before the N tokens of the grid and belong to no window and no cell.
    Every query of the grid attends to them one by one, without a bias; their own queries attend to all P + N tokens
    exactly, as in softmax attention.

    Windows and cells start at the top-left corner; where one runs over the edge it holds its real tokens only. Sums
    over tokens, the softmaxes and LayerNorm accumulate in float32 for half-precision inputs (float64 for float64).
    Time and memory grow linearly with N.

    Args:
        q: Queries `(B, h, P + N, d)`, any strides; views of one qkv projection are fine.
        k: Keys, like q.
        v: Values, like q.
        feat_size: Grid `(H, W)` with N = H·W, its tokens in raster order.
        summary_q: Parameters of q's summary: projection weight `(d, d)` and bias `(d)`, LayerNorm weight `(d)` and
            bias `(d)`, shared by the heads. Needed unless partition_grid is 0.
        summary_k: The same for k's summary.
        rel_pos_bias: The table of b, `((2·window_size - 1)², h)`, as `timm.layers.RelPosBias` keeps it: with w the
            window_size and (dy, dx) the query's place minus the key's, row (dy + w - 1)·(2w - 1) + dx + w - 1. None
            for no bias.
        window_size: Side of a window in tokens; 0 leaves E empty.
        partition_grid: Cells asked for along each axis: a cell is ceil(L / partition_grid) tokens along an axis of L
            tokens; 0 for no cells.
        scale: s; d^(-½) if None.
        proposal_scale: Factor of the proposal's mean (1 is the paper, ½ the published implementation).
        noise: noise_std · ε with ε ~ N(0, I), `(B, h, C_p, d)`, C_p from `eva_num_cells`. None in evaluation.
        dropout_p: Probability to drop an attention weight, of tokens and cells alike; the rest is scaled up.
        norm_eps: LayerNorm's ε.
        fused: Take the backend that `eva_backend` names, which may be kernels; False for plain PyTorch.
        count_cells: 'one' for n_c = 1; 'all' for the tokens of the cell, n_c = |P_c|; 'outside' for those that are not
            in the query's window, n_c = |P_c| - |P_c ∩ E^n|: a cell that lies wholly in the window drops out.
        num_prefix_tokens: P.

    Returns:
        `(B, h, P + N, d)` in q's dtype, in memory `(B, P + N, h, d)` where there is a window: merging heads copies
        nothing.

    Raises:
        ValueError: arguments that do not fit each other; the message names the value.
        TypeError: q, k or v is no tensor.
    """
    feat_size = static_size(feat_size)
    check_partition(window_size, partition_grid)
    check_tokens(q, k, v, feat_size, num_prefix_tokens)
    options = EvaOptions(
        feat_size,
        as_summary(summary_q),
        as_summary(summary_k),
        rel_pos_bias,
        window_size,
        partition_grid,
        softmax_scale(scale, q),
        proposal_scale,
        noise,
        dropout_p,
        norm_eps,
        count_cells,
        num_prefix_tokens,
    )
    check_eva_options(q.shape[0], q.shape[1], q.shape[3], options)
    if not torch.jit.is_scripting():  # noqa: SIM102, TorchScript skips this block, but not a longer condition
        if fused:
            return _run((q, k, v), options)
    return eva_plain(q, k, v, options, fused)


def eva_attention_packed(
    qkv: torch.Tensor,
    feat_size: List[int],
    summary_q: Optional[SummaryTensors] = None,
    summary_k: Optional[SummaryTensors] = None,
    rel_pos_bias: Optional[torch.Tensor] = None,
    window_size: int = 7,
    partition_grid: int = 7,
    scale: Optional[float] = None,
    proposal_scale: float = 1.0,
    noise: Optional[torch.Tensor] = None,
    dropout_p: float = 0.0,
    norm_eps: float = 1e-5,
    fused: bool = False,
    count_cells: str = 'one',
    num_prefix_tokens: int = 0,
) -> torch.Tensor:
    """`eva_attention` of q, k, v in one tensor `(3, B, h, P + N, d)`, any strides.

    The fused backward then writes one gradient, in memory `(B, P + N, 3, h, d)`, where three would be copied into one.
    """
    feat_size = static_size(feat_size)
    check_partition(window_size, partition_grid)
    check_packed_tokens(qkv, feat_size, num_prefix_tokens)
    options = EvaOptions(
        feat_size,
        as_summary(summary_q),
        as_summary(summary_k),
        rel_pos_bias,
        window_size,
        partition_grid,
        softmax_scale(scale, qkv),
        proposal_scale,
        noise,
        dropout_p,
        norm_eps,
        count_cells,
        num_prefix_tokens,
    )
    check_eva_options(qkv.shape[1], qkv.shape[2], qkv.shape[4], options)
    if not torch.jit.is_scripting():  # noqa: SIM102
        if fused:
            return _run((qkv,), options)
    q, k, v = split_packed(qkv)
    return eva_plain(q, k, v, options, fused)


def eva_attention_projected(qkv: torch.Tensor, num_heads: int, options: EvaOptions) -> torch.Tensor:
    """`eva_attention_packed` with `fused` for a layer: of a projection `(B, P + N, 3·h·d)`, to `(B, P + N, h·d)`.

    The kernels find the heads in memory, which takes no views and no derivatives of views.
    """
    B, T, C = qkv.shape
    d = C // (3 * num_heads)
    check_partition(options.window_size, options.partition_grid)
    check_count_of_tokens('qkv', T, options.feat_size, options.num_prefix_tokens)
    check_eva_options(B, num_heads, d, options)
    if B > 0:
        backend = EVA.choose(eva_case(qkv, d, options))
        if backend is GLUON or backend is TRITON:
            return backend.run((qkv,), options, num_heads)
    return _run((qkv.unflatten(-1, [3, num_heads, d]).permute(2, 0, 3, 1, 4),), options).transpose(1, 2).flatten(2)


def eva_backend(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    window_size: int = 7,
    partition_grid: int = 7,
    dropout_p: float = 0.0,
    variant: bool = False,
    num_prefix_tokens: int = 0,
) -> str:
    """Which backend `eva_attention` takes for such arguments with `fused`: 'gluon', 'triton' or 'plain'.

    Triton wants a CUDA device, float32, bfloat16 or float16, a head dim of 16, 32, 48, 64, 80, 96 or 128, windows and
    grids of at most 16 × 16, at most 16 prefix tokens, and no dropout of attention weights. Gluon wants, besides, a
    Hopper GPU, Triton 3.6 to 3.9, bfloat16 or float16, a head dim of 32 or 64, windows of 33 to 64 tokens, and cells,
    at most 64 of them and prefix tokens together. A `variant`, which `eva_attention_variant` computes, is always plain.
    `EVAVIT_BACKEND` has a say, see `evavit/ops/backends.py`.
    """
    dropout = dropout_p > 0.0
    sizes = head_dim, window_size, partition_grid
    case = EvaCase(device, dtype, *sizes, dropout=dropout, variant=variant, num_prefix_tokens=num_prefix_tokens)
    return EVA.name(case)
