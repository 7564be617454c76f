"""EVA, efficient attention via control variates (Zheng et al., ICLR 2023, arXiv 2302.04542), on a 2D token grid.

A query attends exactly to the tokens of its own window, the set E, and to one summary of each cell P_c of the grid:
a key k̃_c in place of the cell's keys and a control variate β_c in place of its values. Equation numbers are the
paper's; docs/math.md goes from the control variate to these lines. Everything is written for TorchScript as well.
"""

from typing import List, Optional, Tuple

import torch
import torch.nn.functional as F

from evavit.ops.backends import has_kernels, needs_plain
from evavit.ops.checks import check_eva_args, check_grid, check_partition
from evavit.ops.grid import (
    accumulation_dtype,
    band_cells,
    block_counts,
    cell_shape,
    crop_bias,
    from_windows,
    static_size,
    table_bias,
    to_bands,
    to_windows,
    window_mask,
    window_shape,
)

__all__ = ['eva_attention', 'eva_attention_packed', 'eva_backend', 'eva_num_cells']

# The parameters of σ in (26): weight (d, d) and bias (d) of the projection, weight (d) and bias (d) of the LayerNorm.
Summary = Tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def eva_num_cells(feat_size: List[int], partition_grid: int) -> int:
    """Number of cells C_p on a grid of `feat_size` (H, W) tokens; at most `partition_grid`², and none for 0."""
    if partition_grid == 0:
        return 0
    feat_size = static_size(feat_size)
    check_grid(feat_size)
    rows, cols = block_counts(feat_size, cell_shape(feat_size, partition_grid))
    return rows * cols


def summarise(
    cell_means: torch.Tensor,
    summary: Tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    norm_eps: float,
) -> torch.Tensor:
    """Equation (26): LayerNorm(W · mean of a cell + b) for means `(..., d)`, in their dtype."""
    weight, bias, norm_weight, norm_bias = summary
    dtype = cell_means.dtype
    projected = F.linear(cell_means.to(weight.dtype), weight, bias).to(dtype)
    return F.layer_norm(projected, [cell_means.shape[-1]], norm_weight.to(dtype), norm_bias.to(dtype), norm_eps)


def _control_variates(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    feat_size: List[int],
    summary_q: Tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    summary_k: Tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    partition_grid: int,
    scale: float,
    proposal_scale: float,
    noise: Optional[torch.Tensor],
    norm_eps: float,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """The cells' keys k̃_c and control variates β_c, each `(B, h, C_p, d)` in the accumulation dtype.

    A row of cells is a contiguous band of tokens. Sums over the cells of a band, and what is handed from cells to
    their tokens, are products with one small 0/1 matrix for all channels: many times faster on a CPU than sums over
    the inner axes of blocks, forward and backward, and without a copy where q, k, v are views of one projection.
    """
    dtype = accumulation_dtype(q)
    B, h, d = q.shape[0], q.shape[1], q.shape[3]
    cell = cell_shape(feat_size, partition_grid)
    nH, nW = block_counts(feat_size, cell)
    in_cell = band_cells(feat_size, cell, q.device)  # (1 or nH, nW, tokens of a band)
    tokens_per_cell = in_cell.sum(-1, dtype=dtype).expand(nH, nW).reshape(nH, nW, 1, 1)
    sum_cells = band_cells([cell[0], feat_size[1]], cell, q.device).to(dtype).expand(B * nH, -1, -1)

    q_bands = to_bands(q, feat_size, cell).to(dtype)
    k_bands = to_bands(k, feat_size, cell).to(dtype)
    q_means = torch.bmm(sum_cells, q_bands).view(B, nH, nW, h, d) / tokens_per_cell
    k_means = torch.bmm(sum_cells, k_bands).view(B, nH, nW, h, d) / tokens_per_cell
    q_tilde = summarise(q_means, summary_q, norm_eps)
    k_tilde = summarise(k_means, summary_k, norm_eps)

    omega = scale**0.5 * proposal_scale * (q_tilde + k_tilde)  # the mean of the proposal, (28)
    if noise is not None:
        omega = omega + noise.to(dtype).transpose(1, 2).view(B, nH, nW, h, d)

    # log ξ(k̂_m, ω_c) = ω_c · k̂_m - ½ ‖k̂_m‖² with k̂ = s^½ k; its softmax over a cell weighs the values of β_c.
    omega = (scale**0.5 * omega).view(B * nH, nW, h * d)
    log_xi = k_bands * torch.baddbmm(k_bands, sum_cells.transpose(1, 2), omega, beta=-0.5 * scale)
    band = cell[0] * feat_size[1]  # written out: in an empty batch -1 could be anything
    log_xi = log_xi.view(B, nH, band, h, d).sum(-1).transpose(2, 3).unsqueeze(3)  # (B, nH, h, 1, band)
    xi = log_xi.masked_fill(~in_cell.unsqueeze(1), float('-inf')).softmax(-1).sum(3)
    xi = xi.transpose(2, 3).reshape(B * nH, band, h, 1)
    weighted = to_bands(v, feat_size, cell).unflatten(2, [h, d]) * xi
    beta = torch.bmm(sum_cells, weighted.flatten(2))
    return k_tilde.flatten(1, 2).transpose(1, 2), beta.view(B, nH * nW, h, d).transpose(1, 2)


def _plain(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    feat_size: List[int],
    summary_q: Optional[Tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]],
    summary_k: Optional[Tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]],
    rel_pos_bias: Optional[torch.Tensor],
    window_size: int,
    partition_grid: int,
    scale: float,
    proposal_scale: float,
    noise: Optional[torch.Tensor],
    dropout_p: float,
    norm_eps: float,
) -> torch.Tensor:
    """`eva_attention` in PyTorch's own operators; the arguments are checked, autocast is off."""
    dtype = accumulation_dtype(q)
    window = window_shape(feat_size, window_size) if window_size > 0 else (1, 1)
    area = window[0] * window[1] if window_size > 0 else 0
    # float16 ends at 65,504, before the logits do; bfloat16 has the range of float32.
    logit_dtype = dtype if q.dtype == torch.float16 else q.dtype
    queries = (to_windows(q, feat_size, window) if window_size > 0 else q.unsqueeze(2)).to(logit_dtype)

    logits: List[torch.Tensor] = []
    if window_size > 0:
        keys = to_windows(k, feat_size, window).to(logit_dtype)
        # On a CPU a product of small matrices by a transposed view takes longer than the copy and the product together.
        local = (queries @ keys.transpose(-2, -1).contiguous()).to(dtype)
        if rel_pos_bias is not None:
            bias = rel_pos_bias if rel_pos_bias.dim() == 3 else table_bias(rel_pos_bias, window_size)
            bias = crop_bias(bias, window_size, window).to(dtype).unsqueeze(1)
            # The gradient of a tensor that is expanded here is summed axis by axis, several times faster on a CPU.
            local = torch.add(bias.expand(-1, local.shape[2], -1, -1), local, alpha=scale)
        else:
            local = scale * local
        mask = window_mask(feat_size, window, q.device)
        if mask is not None:
            local = local.masked_fill_(~mask.unsqueeze(1), float('-inf'))
        logits.append(local)

    beta: Optional[torch.Tensor] = None
    if summary_q is not None and summary_k is not None and partition_grid > 0:
        k_tilde, beta = _control_variates(
            q, k, v, feat_size, summary_q, summary_k, partition_grid, scale, proposal_scale, noise, norm_eps
        )
        # All windows share the cells: one product for all queries of an (image, head).
        cells = queries.flatten(2, 3) @ (scale * k_tilde).to(logit_dtype).transpose(-2, -1)
        logits.append(cells.to(dtype).unflatten(2, [queries.shape[2], queries.shape[3]]))

    attn = torch.cat(logits, -1).softmax(-1).to(q.dtype)
    if dropout_p > 0.0:
        attn = F.dropout(attn, dropout_p)

    if window_size == 0:
        assert beta is not None
        return (attn.flatten(2, 3) @ beta.to(q.dtype)).to(q.dtype)
    attn_local, attn_cells = attn.split([area, attn.shape[-1] - area], -1)
    out = attn_local @ to_windows(v, feat_size, window)
    if beta is not None:
        out += (attn_cells.flatten(2, 3) @ beta.to(q.dtype)).view_as(out)
    return from_windows(out, feat_size, window).to(q.dtype)


def eva_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    feat_size: List[int],
    summary_q: Optional[Tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]] = None,
    summary_k: Optional[Tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]] = None,
    rel_pos_bias: Optional[torch.Tensor] = None,
    window_size: int = 7,
    partition_grid: int = 7,
    scale: Optional[float] = None,
    proposal_scale: float = 1.0,
    noise: Optional[torch.Tensor] = None,
    dropout_p: float = 0.0,
    norm_eps: float = 1e-5,
    fused: bool = False,
) -> torch.Tensor:
    """Efficient attention via control variates, Equation (16): in plain PyTorch, or with `fused` by CUDA kernels.

    With s the scale, E^n the window of query n, and q̄_c, k̄_c the means of q, k over the tokens of cell P_c:

        q̃_c, k̃_c = LN_q(W_q q̄_c + b_q), LN_k(W_k k̄_c + b_k)                                    (26)
        ω_c      = s^½ · proposal_scale · (q̃_c + k̃_c) + noise_c                                  (28), Algorithm 1
        β_c      = Σ_m softmax_m(ω_c · s^½ k_m - ½ s ‖k_m‖²) v_m,  m ∈ P_c
        y_n      = softmax([s q_n·k_m + b(n, m)  for m ∈ E^n] ∪ [s q_n·k̃_c  for all c])
                   applied to the values [v_m] ∪ [β_c]                                            (16)

    Windows and cells start at the top-left corner; where one runs over the edge it holds its real tokens only. Sums
    over tokens, the softmaxes and LayerNorm accumulate in float32 for half-precision inputs (float64 for float64).
    Time and memory grow linearly with N.

    Args:
        q: Queries `(B, h, N, d)`, any strides; views of one qkv projection are fine.
        k: Keys, like q.
        v: Values, like q.
        feat_size: Grid `(H, W)` with N = H·W, tokens in raster order.
        summary_q: Parameters of q's summary: projection weight `(d, d)` and bias `(d)`, LayerNorm weight `(d)` and
            bias `(d)`, shared by the heads. Needed unless partition_grid is 0.
        summary_k: The same for k's summary.
        rel_pos_bias: b, `(h, window_size², window_size²)`: [head, query's place, key's place] in raster order of a
            whole window; or `((2·window_size - 1)², h)`, the table of `timm.layers.RelPosBias` that b is taken from by
            the difference of places, which spares the kernels the way through b. None for no bias.
        window_size: Side of a window in tokens; 0 leaves E empty.
        partition_grid: Cells asked for along each axis: a cell is ceil(L / partition_grid) tokens along an axis of L
            tokens; 0 for no cells.
        scale: s; d^(-½) if None.
        proposal_scale: Factor of the proposal's mean (1 is the paper, ½ the published implementation).
        noise: noise_std · ε with ε ~ N(0, I), `(B, h, C_p, d)`, C_p from `eva_num_cells`. None in evaluation.
        dropout_p: Probability to drop an attention weight, of tokens and cells alike; the rest is scaled up.
        norm_eps: LayerNorm's ε.
        fused: Use the Triton kernels where `eva_backend` has them, plain PyTorch elsewhere.

    Returns:
        `(B, h, N, d)` in q's dtype, in memory `(B, N, h, d)` where there is a window: merging heads copies nothing.

    Raises:
        ValueError: arguments that do not fit each other; the message names the value.
    """
    feat_size = static_size(feat_size)
    check_partition(window_size, partition_grid)
    check_eva_args(
        q,
        k,
        v,
        feat_size,
        summary_q,
        summary_k,
        rel_pos_bias,
        noise,
        window_size,
        partition_grid,
        eva_num_cells(feat_size, partition_grid),
        dropout_p,
    )
    if scale is None:
        scale = q.shape[-1] ** -0.5
    if not torch.jit.is_scripting():  # noqa: SIM102, TorchScript skips this block, but not a longer condition
        if fused and _runs_fused(q, window_size, partition_grid, dropout_p, noise):
            return _fused(
                q,
                k,
                v,
                feat_size,
                summary_q,
                summary_k,
                rel_pos_bias,
                window_size,
                partition_grid,
                scale,
                proposal_scale,
                noise,
                norm_eps,
            )

    if not torch.jit.is_scripting():  # noqa: SIM102
        if not q.is_meta and torch.is_autocast_enabled(q.device.type):
            with torch.autocast(q.device.type, enabled=False):  # the precision of every step is chosen below
                return _plain(
                    q,
                    k,
                    v,
                    feat_size,
                    summary_q,
                    summary_k,
                    rel_pos_bias,
                    window_size,
                    partition_grid,
                    scale,
                    proposal_scale,
                    noise,
                    dropout_p,
                    norm_eps,
                )
    return _plain(
        q,
        k,
        v,
        feat_size,
        summary_q,
        summary_k,
        rel_pos_bias,
        window_size,
        partition_grid,
        scale,
        proposal_scale,
        noise,
        dropout_p,
        norm_eps,
    )


def eva_attention_packed(
    qkv: torch.Tensor,
    feat_size: List[int],
    summary_q: Optional[Tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]] = None,
    summary_k: Optional[Tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]] = None,
    rel_pos_bias: Optional[torch.Tensor] = None,
    window_size: int = 7,
    partition_grid: int = 7,
    scale: Optional[float] = None,
    proposal_scale: float = 1.0,
    noise: Optional[torch.Tensor] = None,
    dropout_p: float = 0.0,
    norm_eps: float = 1e-5,
    fused: bool = False,
) -> torch.Tensor:
    """`eva_attention` of q, k, v in one tensor `(3, B, h, N, d)`, any strides.

    The fused backward then writes one gradient, in memory `(B, N, 3, h, d)`, where three would be copied into one.
    """
    # In the order (B, N, 3, h, d) the three gradients are put together without a further copy.
    q, k, v = [x.transpose(1, 2) for x in qkv.permute(1, 3, 0, 2, 4).unbind(2)]
    if not torch.jit.is_scripting():  # noqa: SIM102
        if fused and _runs_fused(q, window_size, partition_grid, dropout_p, noise):
            check_partition(window_size, partition_grid)
            check_eva_args(
                q,
                k,
                v,
                feat_size,
                summary_q,
                summary_k,
                rel_pos_bias,
                noise,
                window_size,
                partition_grid,
                eva_num_cells(feat_size, partition_grid),
                dropout_p,
            )
            return _fused(
                qkv,
                None,
                None,
                feat_size,
                summary_q,
                summary_k,
                rel_pos_bias,
                window_size,
                partition_grid,
                scale,
                proposal_scale,
                noise,
                norm_eps,
            )
    return eva_attention(
        q,
        k,
        v,
        feat_size,
        summary_q,
        summary_k,
        rel_pos_bias,
        window_size,
        partition_grid,
        scale,
        proposal_scale,
        noise,
        dropout_p,
        norm_eps,
        fused,
    )


def eva_backend(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    window_size: int = 7,
    partition_grid: int = 7,
    dropout_p: float = 0.0,
    variant: bool = False,
) -> str:
    """Which code `eva_attention` takes for such arguments, `fused` permitting: 'triton' or 'plain'.

    Triton wants a CUDA device, float32, bfloat16 or float16, a head dim of 16, 32, 48, 64, 80, 96 or 128, windows and
    grids of at most 16 × 16, and no dropout of attention weights. A `variant`, which `eva_attention_variant` computes,
    is always plain.
    """
    fits = (
        not variant
        and device.type == 'cuda'
        and dtype in (torch.float32, torch.bfloat16, torch.float16)
        and head_dim in (16, 32, 48, 64, 80, 96, 128)
        and window_size <= 16
        and partition_grid <= 16
        and dropout_p == 0.0
    )
    return 'triton' if fits and has_kernels('eva.triton.operator') else 'plain'


def _runs_fused(
    q: torch.Tensor, window_size: int, partition_grid: int, dropout_p: float, noise: Optional[torch.Tensor]
) -> bool:
    if needs_plain():
        return False
    if noise is not None and noise.requires_grad:  # the kernels' backward has no gradient for it
        return False
    # An empty batch has nothing to launch a kernel for.
    return (
        q.dim() == 4
        and q.shape[0] > 0
        and eva_backend(q.device, q.dtype, q.shape[-1], window_size, partition_grid, dropout_p) == 'triton'
    )


def _fused(
    q,
    k,
    v,
    feat_size,
    summary_q,
    summary_k,
    rel_pos_bias,
    window_size,
    partition_grid,
    scale,
    proposal_scale,
    noise,
    norm_eps,
) -> torch.Tensor:
    from .triton.operator import eva_attention_fused

    dtype = q.dtype
    if dtype == torch.float32 and torch.is_autocast_enabled('cuda'):  # as autocast would cast a matrix product
        autocast = torch.get_autocast_dtype('cuda')
        q, k, v = (x if x is None else x.to(autocast) for x in (q, k, v))
    return eva_attention_fused(
        q,
        k,
        v,
        feat_size,
        summary_q,
        summary_k,
        rel_pos_bias,
        window_size,
        partition_grid,
        scale,
        proposal_scale,
        noise,
        norm_eps,
    ).to(dtype)
