"""EVA on a CPU where nothing is differentiated: two calls of PyTorch's fused attention in place of `plain.py`.

β is softmax attention itself: of the ω_c, to the tokens of their cells, with -½‖k̂_m‖² as an additive mask. The output
is that of the queries of a window, to its tokens and the cells, with the position bias as one. No logit is written to
memory.
"""

from typing import Tuple

import torch
import torch.nn.functional as F

from evavit.ops.backends import needs_plain
from evavit.ops.grid import (
    band_cells,
    block_counts,
    cell_shape,
    crop_bias,
    from_windows,
    table_bias,
    to_bands,
    to_blocks,
    window_shape,
)

from .case import EvaOptions
from .plain import summarise

__all__ = ['eva_cpu', 'takes_eva_cpu']


def takes_eva_cpu(tokens: Tuple[torch.Tensor, ...], options: EvaOptions) -> bool:
    """Whether `eva_cpu` computes a call, and faster than `eva_plain`.

    What it leaves gains less than 5 %, or loses: q, k, v apart, which would be copied into one tensor; half precision,
    whose products are not the bottleneck; windows that differ in what their queries attend to; prefix tokens, which
    come with such windows.
    """
    x, feat_size, window_size = tokens[0], options.feat_size, options.window_size
    if len(tokens) > 1 or x.device.type != 'cpu' or x.dtype not in (torch.float32, torch.float64):
        return False
    if window_size == 0 or options.partition_grid == 0:  # without cells, summaries may be given all the same
        return False
    if options.count_cells != 'one' or options.num_prefix_tokens > 0:
        return False
    if any(size % min(size, window_size) for size in feat_size) or options.dropout_p > 0.0:
        return False
    if needs_plain() is not None:
        return False
    parts = (x, *(options.summary_q or ()), *(options.summary_k or ()), options.rel_pos_bias, options.noise)
    return not (torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in parts))


def eva_cpu(qkv: torch.Tensor, options: EvaOptions) -> torch.Tensor:
    """`evavit.ops.eva_attention_packed` where `takes_eva_cpu`."""
    with torch.autocast('cpu', enabled=False):  # as in the other backends, the precision of the tokens is that of all
        return _attend(qkv.permute(1, 3, 0, 2, 4).contiguous(), options)


def _cells(x: torch.Tensor, options: EvaOptions) -> torch.Tensor:
    """k̃_c and β_c side by side, `(B, C_p, 2, h, d)`, for tokens `(B, N, 3, h, d)`."""
    summary_q, summary_k, feat_size, scale = options.summary_q, options.summary_k, options.feat_size, options.scale
    assert summary_q is not None and summary_k is not None
    B, _, _, h, d = x.shape
    cell = cell_shape(feat_size, options.partition_grid)
    nH, nW = block_counts(feat_size, cell)
    channels = x.flatten(2)
    # Pooling knows short last cells, and with channels last it takes half the time of any sum over the axes of a cell.
    means = F.avg_pool2d(
        channels.unflatten(1, feat_size).permute(0, 3, 1, 2), cell, cell, ceil_mode=True, count_include_pad=False
    )
    q_means, k_means, _ = means.permute(0, 2, 3, 1).reshape(B, nH * nW, 3, h, d).unbind(2)
    q_tilde = summarise(q_means.contiguous(), summary_q, options.norm_eps)
    k_tilde = summarise(k_means.contiguous(), summary_k, options.norm_eps)
    omega = (scale**0.5 * options.proposal_scale) * (q_tilde + k_tilde)  # the mean of the proposal, (28)
    if options.noise is not None:
        omega = omega + options.noise.to(omega.dtype).transpose(1, 2)

    # A row of cells is one batch: a contiguous band of tokens, where the mask keeps each ω to those of its own cell.
    _, k, v = to_bands(channels.unsqueeze(1), feat_size, cell).unflatten(-1, [3, h, d]).transpose(1, 3).unbind(2)
    mask = k.square().sum(-1).mul_(-0.5 * scale).unflatten(0, [B, nH]).unsqueeze(3)
    mask = mask.masked_fill(~band_cells(feat_size, cell, x.device).unsqueeze(1), float('-inf')).flatten(0, 1)
    omega = omega.view(B * nH, nW, h, d).transpose(1, 2)
    beta = F.scaled_dot_product_attention(omega, k, v, attn_mask=mask, scale=scale**0.5)
    return torch.stack([k_tilde, beta.transpose(1, 2).reshape(k_tilde.shape)], 2)


def _bias(options: EvaOptions, like: torch.Tensor) -> torch.Tensor:
    """What is added to the logits of the tokens of a window, `(h or 1, A, A)`."""
    window = window_shape(options.feat_size, options.window_size)
    if options.rel_pos_bias is None:
        return like.new_zeros([1, window[0] * window[1], window[0] * window[1]])
    return crop_bias(table_bias(options.rel_pos_bias, options.window_size), options.window_size, window).to(like.dtype)


def _attend(x: torch.Tensor, options: EvaOptions) -> torch.Tensor:
    feat_size = options.feat_size
    window = window_shape(feat_size, options.window_size)
    area, (B, _, _, h, d) = window[0] * window[1], x.shape
    cells = _cells(x, options)
    # Queries by window; keys and values by window, with those of the cells behind them.
    windows = to_blocks(x.flatten(2).unsqueeze(1), feat_size, window)[:, 0].transpose(2, 3).unflatten(-1, [3, h, d])
    nH, nW = windows.shape[1:3]
    q = windows[..., 0, :, :].reshape(B * nH * nW, area, h, d)
    kv = x.new_empty([B, nH, nW, area + cells.shape[1], 2, h, d])
    kv[:, :, :, :area].unflatten(3, window).copy_(windows[..., 1:, :, :])
    kv[:, :, :, area:].copy_(cells[:, None, None])
    k, v = kv.flatten(0, 2).transpose(1, 3).unbind(2)
    bias = F.pad(_bias(options, x), [0, cells.shape[1]])[None]
    y = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=bias, scale=options.scale)
    return from_windows(y.unflatten(0, [B, nH * nW]).transpose(1, 2), feat_size, window)
