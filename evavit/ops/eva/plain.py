"""EVA in PyTorch's own operators, on any device; written for TorchScript as well."""

from typing import List, Optional, Tuple

import torch
import torch.nn.functional as F

from evavit.ops.grid import (
    accumulation_dtype,
    band_cells,
    block_counts,
    cell_shape,
    crop_bias,
    from_windows,
    table_bias,
    to_bands,
    to_windows,
    window_mask,
    window_shape,
)
from evavit.ops.softmax import softmax_attention

from .case import EvaOptions, Summary
from .counts import log_counts

__all__ = ['eva_plain', 'split_packed', 'summarise']


def summarise(cell_means: torch.Tensor, summary: Summary, norm_eps: float) -> torch.Tensor:
    """Equation (26): LayerNorm(W · mean of a cell + b) for means `(..., d)`, in their dtype."""
    dtype = cell_means.dtype
    projected = F.linear(cell_means.to(summary.weight.dtype), summary.weight, summary.bias).to(dtype)
    norm_weight, norm_bias = summary.norm_weight.to(dtype), summary.norm_bias.to(dtype)
    return F.layer_norm(projected, [cell_means.shape[-1]], norm_weight, norm_bias, norm_eps)


def _control_variates(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, summary_q: Summary, summary_k: Summary, options: EvaOptions
) -> Tuple[torch.Tensor, torch.Tensor]:
    """The cells' keys k̃_c and control variates β_c, each `(B, h, C_p, d)` in the accumulation dtype.

    A row of cells is a contiguous band of tokens. Sums over the cells of a band, and what is handed from cells to
    their tokens, are products with one small 0/1 matrix for all channels: many times faster on a CPU than sums over
    the inner axes of blocks, forward and backward, and without a copy where q, k, v are views of one projection.

    The batch's size is never written out: PyTorch's older ONNX exporter would put it into the file as a constant.
    """
    feat_size, scale, noise = options.feat_size, options.scale, options.noise
    dtype = accumulation_dtype(q)
    h, d = q.shape[1], q.shape[3]
    cell = cell_shape(feat_size, options.partition_grid)
    nH, nW = block_counts(feat_size, cell)
    in_cell = band_cells(feat_size, cell, q.device)  # (1 or nH, nW, tokens of a band)
    tokens_per_cell = in_cell.sum(-1, dtype=dtype).expand(nH, nW).reshape(nH, nW, 1, 1)
    sum_cells = band_cells([cell[0], feat_size[1]], cell, q.device).to(dtype)

    q_bands = to_bands(q, feat_size, cell).to(dtype)
    k_bands = to_bands(k, feat_size, cell).to(dtype)
    q_means = (sum_cells @ q_bands).unflatten(2, [h, d]).unflatten(0, [-1, nH]) / tokens_per_cell
    k_means = (sum_cells @ k_bands).unflatten(2, [h, d]).unflatten(0, [-1, nH]) / tokens_per_cell
    q_tilde = summarise(q_means, summary_q, options.norm_eps)
    k_tilde = summarise(k_means, summary_k, options.norm_eps)

    omega = scale**0.5 * options.proposal_scale * (q_tilde + k_tilde)  # the mean of the proposal, (28)
    if noise is not None:
        omega = omega + noise.to(dtype).transpose(1, 2).unflatten(1, [nH, nW])

    # log ξ(k̂_m, ω_c) = ω_c · k̂_m - ½ ‖k̂_m‖² with k̂ = s^½ k; its softmax over a cell weighs the values of β_c.
    omega = (scale**0.5 * omega).flatten(3).flatten(0, 1)
    log_xi = k_bands * torch.add(sum_cells.transpose(1, 2) @ omega, k_bands, alpha=-0.5 * scale)
    log_xi = log_xi.unflatten(2, [h, d]).unflatten(0, [-1, nH]).sum(-1)
    log_xi = log_xi.transpose(2, 3).unsqueeze(3)  # (B, nH, h, 1, tokens of a band)
    xi = log_xi.masked_fill(~in_cell.unsqueeze(1), float('-inf')).softmax(-1).sum(3)
    xi = xi.transpose(2, 3).flatten(0, 1).unsqueeze(3)
    weighted = to_bands(v, feat_size, cell).unflatten(2, [h, d]) * xi
    beta = sum_cells @ weighted.flatten(2)
    beta = beta.unflatten(2, [h, d]).unflatten(0, [-1, nH]).flatten(1, 2).transpose(1, 2)
    return k_tilde.flatten(1, 2).transpose(1, 2), beta


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: EvaOptions, fused: bool) -> torch.Tensor:
    """`eva_plain` outside of autocast."""
    feat_size, window_size, rel_pos_bias = options.feat_size, options.window_size, options.rel_pos_bias
    scale, dropout_p, P = options.scale, options.dropout_p, options.num_prefix_tokens
    dtype = accumulation_dtype(q)
    prefix: List[torch.Tensor] = []  # their output, keys and values
    if P > 0:
        exact = softmax_attention(q[:, :, :P], k, v, scale, dropout_p, fused)
        prefix = [exact, k[:, :, :P], v[:, :, :P]]
        q, k, v = q[:, :, P:], k[:, :, P:], v[:, :, P:]
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
            bias = crop_bias(table_bias(rel_pos_bias, window_size), window_size, window).to(dtype).unsqueeze(1)
            # The gradient of a tensor that is expanded here is summed axis by axis, several times faster on a CPU.
            local = torch.add(bias.expand(-1, local.shape[2], -1, -1), local, alpha=scale)
        else:
            local = scale * local
        mask = window_mask(feat_size, window, q.device)
        if mask is not None:
            local = local.masked_fill_(~mask.unsqueeze(1), float('-inf'))
        logits.append(local)

    # What all windows share: keys and values of cells and prefix tokens, and how often each counts.
    shared_k: List[torch.Tensor] = []
    shared_v: List[torch.Tensor] = []
    counts: Optional[torch.Tensor] = None
    summary_q, summary_k = options.summary_q, options.summary_k
    if summary_q is not None and summary_k is not None and options.partition_grid > 0:
        k_tilde, beta = _control_variates(q, k, v, summary_q, summary_k, options)
        shared_k.append(k_tilde)
        shared_v.append(beta)
        if options.count_cells != 'one':
            cell, outside = cell_shape(feat_size, options.partition_grid), options.count_cells == 'outside' and area > 0
            counts = F.pad(log_counts(feat_size, cell, window, (0, 0), outside, dtype, q.device).unsqueeze(1), [0, P])
    if P > 0:
        shared_k.append(prefix[1].to(dtype))
        shared_v.append(prefix[2].to(dtype))
    if len(shared_k) > 0:
        # One product for all queries of an (image, head).
        keys = torch.cat(shared_k, 2) if len(shared_k) > 1 else shared_k[0]
        shared = queries.flatten(2, 3) @ (scale * keys).to(logit_dtype).transpose(-2, -1)
        shared = shared.to(dtype).unflatten(2, [queries.shape[2], queries.shape[3]])
        logits.append(shared if counts is None else shared + counts)

    attn = torch.cat(logits, -1).softmax(-1).to(q.dtype)
    if dropout_p > 0.0:
        attn = F.dropout(attn, dropout_p)

    attn_local, attn_shared = attn.split([area, attn.shape[-1] - area], -1)
    out: Optional[torch.Tensor] = None
    if len(shared_v) > 0:
        values = (torch.cat(shared_v, 2) if len(shared_v) > 1 else shared_v[0]).to(q.dtype)
        out = attn_shared.flatten(2, 3) @ values
    if window_size > 0:
        local = attn_local @ to_windows(v, feat_size, window)
        if out is not None:
            local = local + out.view_as(local)  # not in place: under vmap either part may be the batched one
        out = from_windows(local, feat_size, window)
    assert out is not None
    if P > 0:
        out = torch.cat([prefix[0].transpose(1, 2), out.transpose(1, 2)], 1).transpose(1, 2)
    return out


def split_packed(qkv: torch.Tensor) -> List[torch.Tensor]:
    """q, k, v of `(3, B, h, N, d)`, so that their three gradients are put together as `(B, N, 3, h, d)` at once."""
    return [x.transpose(1, 2) for x in qkv.permute(1, 3, 0, 2, 4).unbind(2)]


def eva_plain(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: EvaOptions, fused: bool = False
) -> torch.Tensor:
    """`evavit.ops.eva_attention` for arguments that have been checked; with `fused` the prefix tokens' own queries take
    PyTorch's fused attention."""
    if not torch.jit.is_scripting():  # noqa: SIM102, TorchScript skips this block, but not a longer condition
        if not q.is_meta and torch.is_autocast_enabled(q.device.type):
            with torch.autocast(q.device.type, enabled=False):  # the precision of every step is chosen above
                return _attend(q, k, v, options, fused)
    return _attend(q, k, v, options, fused)
