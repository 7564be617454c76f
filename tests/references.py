"""References written as loops over the definition, one query and one cell at a time, for float64."""
import math

import torch
import torch.nn.functional as F


def axis_cells(length, partition_grid):
    """Token ranges of the cells along one axis: ceil(length / partition_grid) tokens each, the last may be short."""
    size = math.ceil(length / partition_grid)
    return [range(start, min(start + size, length)) for start in range(0, length, size)]


def grid_cells(feat_size, partition_grid):
    """Lists of token numbers, one per cell, cells in raster order."""
    if partition_grid == 0:
        return []
    H, W = feat_size
    return [[y * W + x for y in rows for x in cols]
            for rows in axis_cells(H, partition_grid) for cols in axis_cells(W, partition_grid)]


def window_of(n, feat_size, window_size):
    """Token numbers that share query n's window."""
    H, W = feat_size
    if window_size == 0:
        return []
    top, left = (n // W) // window_size * window_size, (n % W) // window_size * window_size
    return [y * W + x for y in range(top, min(top + window_size, H)) for x in range(left, min(left + window_size, W))]


def bias_row(n, m, feat_size, window_size):
    """Row of the bias table for query n and key m."""
    W = feat_size[1]
    dy, dx = n // W - m // W, n % W - m % W
    return (dy + window_size - 1) * (2 * window_size - 1) + dx + window_size - 1


def eva_loop(q, k, v, feat_size, summary_q=None, summary_k=None, bias_table=None, window_size=7, partition_grid=7,
             proposal_scale=1.0, noise=None):
    """EVA on one image and head after another; q, k, v `(B, h, N, d)`, bias_table `((2 window_size - 1)², h)`."""
    B, h, N, d = q.shape
    s = d ** -0.5
    cells = grid_cells(feat_size, partition_grid)
    images = []
    for b in range(B):
        heads = []
        for i in range(h):
            qi, ki, vi = q[b, i], k[b, i], v[b, i]
            k_hat = s ** 0.5 * ki
            k_tildes, betas = [], []
            for c, members in enumerate(cells):
                q_mean = sum(qi[m] for m in members) / len(members)
                k_mean = sum(ki[m] for m in members) / len(members)
                Wq, bq, gq, oq = summary_q
                Wk, bk, gk, ok = summary_k
                q_tilde = F.layer_norm(Wq @ q_mean + bq, (d,), gq, oq)
                k_tilde = F.layer_norm(Wk @ k_mean + bk, (d,), gk, ok)
                omega = s ** 0.5 * proposal_scale * (q_tilde + k_tilde)
                if noise is not None:
                    omega = omega + noise[b, i, c]
                log_xi = torch.stack([omega @ k_hat[m] - 0.5 * k_hat[m] @ k_hat[m] for m in members])
                weight = torch.softmax(log_xi, 0)
                betas.append(sum(weight[j] * vi[m] for j, m in enumerate(members)))
                k_tildes.append(k_tilde)
            rows = []
            for n in range(N):
                local = window_of(n, feat_size, window_size)
                logits = []
                for m in local:
                    logit = s * qi[n] @ ki[m]
                    if bias_table is not None:
                        logit = logit + bias_table[bias_row(n, m, feat_size, window_size), i]
                    logits.append(logit)
                logits += [s * qi[n] @ k_tilde for k_tilde in k_tildes]
                attn = torch.softmax(torch.stack(logits), 0)
                rows.append(attn @ torch.stack([vi[m] for m in local] + betas))
            heads.append(torch.stack(rows))
        images.append(torch.stack(heads))
    return torch.stack(images)
