"""References written from the definition: one cell, one window at a time, in float64."""
import math
from itertools import chain

import torch
import torch.nn.functional as F


def axis_cells(length, partition_grid):
    """Token ranges of the cells along one axis: ceil(length / partition_grid) tokens each, the last may be short."""
    size = math.ceil(length / partition_grid)
    return [range(start, min(start + size, length)) for start in range(0, length, size)]


def grid_cells(feat_size, partition_grid):
    """Token numbers of every cell, cells in raster order."""
    if partition_grid == 0:
        return []
    H, W = feat_size
    return [[y * W + x for y in rows for x in cols]
            for rows in axis_cells(H, partition_grid) for cols in axis_cells(W, partition_grid)]


def grid_windows(feat_size, window_size):
    """Token numbers of every window, windows in raster order."""
    H, W = feat_size
    return [[y * W + x for y in range(top, min(top + window_size, H)) for x in range(left, min(left + window_size, W))]
            for top in range(0, H, window_size) for left in range(0, W, window_size)]


def bias_rows(tokens, width, window_size):
    """Rows of the bias table for every query (first) and key (second) among tokens of a grid of that width."""
    y, x = torch.tensor(tokens) // width, torch.tensor(tokens) % width
    dy, dx = y[:, None] - y, x[:, None] - x
    return (dy + window_size - 1) * (2 * window_size - 1) + dx + window_size - 1


def split(x, groups):
    """The tokens of `(B, h, N, d)` by group, one tensor a group. One gather: autograd is slow with a gather each."""
    return x[:, :, list(chain(*groups))].split([len(group) for group in groups], 2)


def eva_loop(q, k, v, feat_size, summary_q=None, summary_k=None, bias_table=None, window_size=7, partition_grid=7,
             proposal_scale=1.0, noise=None):
    """EVA for q, k, v `(B, h, N, d)`: one cell after the other, then one window of queries after the other.

    summary_q, summary_k: (W, b, LayerNorm weight, LayerNorm bias); bias_table `((2·window_size - 1)², h)`; noise
    `(B, h, C_p, d)`, which stands for noise_std · ε.
    """
    d = q.shape[-1]
    s = d ** -0.5
    k_tildes, betas = [], []
    cells = grid_cells(feat_size, partition_grid)
    if cells:
        (W_q, b_q, g_q, o_q), (W_k, b_k, g_k, o_k) = summary_q, summary_k
        noises = [0.] * len(cells) if noise is None else noise.unbind(2)
        for q_c, k_c, v_c, noise_c in zip(split(q, cells), split(k, cells), split(v, cells), noises, strict=True):
            q_tilde = F.layer_norm(q_c.mean(2) @ W_q.T + b_q, (d,), g_q, o_q)
            k_tilde = F.layer_norm(k_c.mean(2) @ W_k.T + b_k, (d,), g_k, o_k)
            omega = s ** 0.5 * proposal_scale * (q_tilde + k_tilde) + noise_c
            k_hat = s ** 0.5 * k_c
            log_xi = torch.einsum('bhd,bhmd->bhm', omega, k_hat) - 0.5 * k_hat.square().sum(-1)
            betas.append(torch.einsum('bhm,bhmd->bhd', torch.softmax(log_xi, -1), v_c))
            k_tildes.append(k_tilde)

    summaries = [torch.stack(k_tildes, 2), torch.stack(betas, 2)] if cells else [k[:, :, :0], v[:, :, :0]]
    # Without a window queries differ in nothing but themselves: one group, whose E is empty.
    groups = grid_windows(feat_size, window_size) if window_size else [list(range(q.shape[2]))]
    outputs = []
    for tokens, q_E, k_E, v_E in zip(groups, split(q, groups), split(k, groups), split(v, groups), strict=True):
        if window_size == 0:
            k_E, v_E = k_E[:, :, :0], v_E[:, :, :0]
        keys, values = torch.cat([k_E, summaries[0]], 2), torch.cat([v_E, summaries[1]], 2)
        logits = s * q_E @ keys.transpose(2, 3)
        if bias_table is not None:
            bias = bias_table[bias_rows(tokens, feat_size[1], window_size)].permute(2, 0, 1)
            logits = logits + F.pad(bias, [0, len(betas)])
        outputs.append(torch.softmax(logits, -1) @ values)
    return torch.cat(outputs, 2)[:, :, torch.tensor(list(chain(*groups))).argsort()]
