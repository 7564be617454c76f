"""EVA from its definition: one cell, one window at a time, in float64."""

import math

import torch
import torch.nn.functional as F
from helpers import axis_cells, bias_rows, grid_cells, grid_windows, in_order, split


def sigma(mean, summary):
    """σ of (26): the identity, a projection, or that and LayerNorm, for no, two or four tensors."""
    if summary:
        mean = mean @ summary[0].T + summary[1]
    return F.layer_norm(mean, mean.shape[-1:], *summary[2:]) if len(summary) == 4 else mean


def count_of(cell, E, count_cells):
    """How often a cell counts for queries with this E, both lists of tokens."""
    return {'one': 1, 'all': len(cell), 'outside': len(set(cell) - set(E))}[count_cells]


def eva_loop(
    q,
    k,
    v,
    feat_size,
    summary_q=None,
    summary_k=None,
    bias_table=None,
    window_size=7,
    partition_grid=7,
    proposal_scale=1.0,
    noise=None,
    count_cells='one',
    num_prefix_tokens=0,
):
    """EVA for q, k, v `(B, h, P + N, d)`: one cell after the other, then one window of queries after the other, and
    before them one prefix query after the other.

    summary_q, summary_k: (W, b, LayerNorm weight, LayerNorm bias); bias_table `((2·window_size - 1)², h)`; noise
    `(B, h, C_p, d)`, which stands for noise_std · ε.
    """
    P, d = num_prefix_tokens, q.shape[-1]
    s = d**-0.5
    exact = [torch.softmax(s * (q[:, :, p, None] @ k.mT), -1) @ v for p in range(P)]
    k_prefix, v_prefix = k[:, :, :P], v[:, :, :P]
    q, k, v = q[:, :, P:], k[:, :, P:], v[:, :, P:]
    k_tildes, betas = [], []
    cells = grid_cells(feat_size, partition_grid)
    if cells:
        (W_q, b_q, g_q, o_q), (W_k, b_k, g_k, o_k) = summary_q, summary_k
        noises = [0.0] * len(cells) if noise is None else noise.unbind(2)
        for q_c, k_c, v_c, noise_c in zip(split(q, cells), split(k, cells), split(v, cells), noises, strict=True):
            q_tilde = F.layer_norm(q_c.mean(2) @ W_q.T + b_q, (d,), g_q, o_q)
            k_tilde = F.layer_norm(k_c.mean(2) @ W_k.T + b_k, (d,), g_k, o_k)
            omega = s**0.5 * proposal_scale * (q_tilde + k_tilde) + noise_c
            k_hat = s**0.5 * k_c
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
        counts = [count_of(cell, tokens if window_size else [], count_cells) for cell in cells]
        kept = [c for c, count in enumerate(counts) if count]
        keys = torch.cat([k_E, summaries[0][:, :, kept], k_prefix], 2)
        values = torch.cat([v_E, summaries[1][:, :, kept], v_prefix], 2)
        logits = s * q_E @ keys.transpose(2, 3)
        extra = [0.0] * k_E.shape[2] + [math.log(counts[c]) for c in kept] + [0.0] * P
        logits = logits + torch.tensor(extra, dtype=q.dtype)
        if bias_table is not None:
            bias = bias_table[bias_rows(tokens, feat_size[1], window_size)].permute(2, 0, 1)
            logits = logits + F.pad(bias, [0, len(kept) + P])
        outputs.append(torch.softmax(logits, -1) @ values)
    return torch.cat([*exact, in_order(outputs, groups)], 2)


def cells_across(width, partition_grid):
    """Number of cells along a row of the grid."""
    return len(axis_cells(width, partition_grid))


def eva_variant_loop(
    q,
    k,
    v,
    feat_size,
    summary_q=None,
    summary_k=None,
    bias_table=None,
    window_size=7,
    partition_grid=7,
    partition='all',
    proposal='qk',
    proposal_mean=None,
    overlap=False,
    proposal_scale=1.0,
    noise=None,
    noise_std=1.0,
    count_cells='one',
):
    """EVA's ablations: window by window, cell by cell, sample by sample, with plain exponentials.

    summary_q, summary_k: the tensors of `sigma`; bias_table `((2·(window_size + halo) - 1)², h)`; noise
    `(B, h, C_p, S, d)`, which stands for noise_std · ε.
    """
    (N, d), W = q.shape[2:], feat_size[1]
    s = d**-0.5
    halo = max(1, window_size // 2) if overlap else 0
    outputs = torch.zeros_like(q)
    for window in grid_windows(feat_size, window_size) if window_size else [list(range(N))]:
        E = []
        if window_size:
            ys, xs = [n // W for n in window], [n % W for n in window]
            E = [
                y * W + x
                for y in range(
                    max(0, min(ys) // window_size * window_size - halo), min(feat_size[0], min(ys) + window_size + halo)
                )
                for x in range(max(0, min(xs) - halo), min(W, min(xs) + window_size + halo))
            ]
        q_W = q[:, :, window]
        logits, values = [], []
        for m in E:
            logit = s * (q_W * k[:, :, m : m + 1]).sum(-1)
            if bias_table is not None:
                reach = window_size + halo
                rows = [(n // W - m // W + reach - 1) * (2 * reach - 1) + n % W - m % W + reach - 1 for n in window]
                logit = logit + bias_table[rows].T
            logits.append(logit)
            values.append(v[:, :, m : m + 1].expand_as(q_W))
        for c, cell in enumerate(grid_cells(feat_size, partition_grid)):
            kept = [m for m in cell if partition == 'all' or m not in E]
            count = count_of(kept, E, count_cells)
            if not kept or not count:
                continue
            k_tilde = sigma(k[:, :, kept].mean(2), summary_k)
            mean = {
                'qk': lambda: sigma(q[:, :, kept].mean(2), summary_q) + k_tilde,  # noqa: B023
                'q': lambda: sigma(q[:, :, kept].mean(2), summary_q),  # noqa: B023
                'zero': lambda: torch.zeros_like(k_tilde),  # noqa: B023
                'learned': lambda: proposal_mean[
                    :,
                    c // cells_across(W, partition_grid),  # noqa: B023
                    c % cells_across(W, partition_grid),  # noqa: B023
                ],
            }[proposal]()
            mu = s**0.5 * proposal_scale * mean
            q_hat, k_hat = s**0.5 * q_W, s**0.5 * k[:, :, kept]
            numerator = denominator = 0.0
            for i in range(1 if noise is None else noise.shape[3]):
                eps = torch.zeros_like(mu) if noise is None else noise[:, :, c, i]
                omega = mu + eps
                # N(ω; 0, I) / N(ω; μ, noise_std² I) without the constants that the ratio loses
                weight = torch.exp(-0.5 * omega.square().sum(-1) + 0.5 * eps.square().sum(-1) / noise_std**2)
                xi_q = torch.exp(torch.einsum('bhd,bhad->bha', omega, q_hat) - 0.5 * q_hat.square().sum(-1))
                xi_k = torch.exp(torch.einsum('bhd,bhmd->bhm', omega, k_hat) - 0.5 * k_hat.square().sum(-1))
                scores = weight[..., None] * xi_q
                numerator = numerator + scores[..., None] * (xi_k[..., None] * v[:, :, kept]).sum(2)[:, :, None]
                denominator = denominator + (scores * xi_k.sum(-1)[..., None])[..., None]
            logits.append(s * (q_W * k_tilde[:, :, None]).sum(-1) + math.log(count))
            values.append(numerator / denominator)
        weights = torch.stack(logits, -1).softmax(-1)
        y = (weights[..., None] * torch.stack(values, 3)).sum(3)
        outputs = outputs.index_copy(2, torch.tensor(window), y)
    return outputs


def estimator_loop(q, k, v, cells, omega, log_ratio):
    """Equation (15), query by query, token by token: g_m and h_m with plain exponentials. cells `(N, M)`."""
    (B, h, N, d), M = q.shape, k.shape[2]
    s = d**-0.5
    q, k_hat = s**0.5 * q, s**0.5 * k
    outputs = []
    for n in range(N):
        kernel = torch.stack([torch.exp((q[:, :, n] * k_hat[:, :, m]).sum(-1)) for m in range(M)], -1)
        Z, y = kernel.sum(-1), 0.0
        for c in range(-1, int(cells.max()) + 1):
            tokens = [m for m in range(M) if cells[n, m] == c]
            if c == -1:
                y = y + sum((kernel[:, :, m] / Z)[..., None] * v[:, :, m] for m in tokens)
            elif tokens:
                g, h_sum = torch.zeros(B, h, d, dtype=q.dtype), torch.zeros(B, h, 1, dtype=q.dtype)
                for sample in range(omega.shape[3]):
                    w = omega[:, :, c, sample]
                    xi_q = torch.exp((w * q[:, :, n]).sum(-1) - 0.5 * q[:, :, n].square().sum(-1))
                    for m in tokens:
                        xi_k = torch.exp((w * k_hat[:, :, m]).sum(-1) - 0.5 * k_hat[:, :, m].square().sum(-1))
                        h_m = (torch.exp(log_ratio[:, :, c, sample]) * xi_q * xi_k / Z)[..., None]
                        g, h_sum = g + h_m * v[:, :, m], h_sum + h_m
                y = y + (kernel[:, :, tokens].sum(-1) / Z)[..., None] * g / h_sum
        outputs.append(y)
    return torch.stack(outputs, 2)


def eva_1d_loop(
    q,
    k,
    v,
    summary_q=None,
    summary_k=None,
    bias=None,
    window_size=4,
    cell_size=2,
    causal=False,
    overlap=False,
    padding=None,
    proposal_scale=1.0,
    noise=None,
):
    """EVA on sequences, sequence by sequence, token by token, over lists of positions.

    bias: function of (query's position, key's position) to a logit for each head; padding: bool `(B, N)`.
    """
    (B, h, N, d), s = q.shape, q.shape[-1] ** -0.5
    half = max(1, window_size // 2) if overlap else 0
    outputs = []
    for b in range(B):
        real = [n for n in range(N) if padding is None or not padding[b, n]]
        summaries = []  # of cells: last position, k̃, β
        for c in range(math.ceil(N / cell_size) if cell_size else 0):
            tokens = [m for m in real if m // cell_size == c]
            if not tokens:
                continue
            k_tilde = sigma(k[b, :, tokens].mean(1), summary_k)
            omega = s**0.5 * proposal_scale * (sigma(q[b, :, tokens].mean(1), summary_q) + k_tilde)
            omega = omega + (0 if noise is None else noise[b, :, c, 0])
            xi = [
                torch.exp((omega * s**0.5 * k[b, :, m]).sum(-1) - 0.5 * s * k[b, :, m].square().sum(-1)) for m in tokens
            ]
            beta = sum(x[:, None] * v[b, :, m] for x, m in zip(xi, tokens, strict=True)) / sum(xi)[:, None]
            summaries.append(((c + 1) * cell_size - 1, k_tilde, beta))
        rows = []
        for n in range(N):
            if n not in real:
                rows.append(torch.zeros(h, d, dtype=q.dtype))
                continue
            logits, values = [], []
            first = n // window_size * window_size if window_size else 0
            for m in real if window_size else []:
                if (m <= n if causal else m < first + window_size + half) and m >= first - half:
                    logits.append(s * (q[b, :, n] * k[b, :, m]).sum(-1) + (0 if bias is None else bias(n, m)))
                    values.append(v[b, :, m])
            for last, k_tilde, beta in summaries:
                if not causal or last < first:
                    logits.append(s * (q[b, :, n] * k_tilde).sum(-1))
                    values.append(beta)
            rows.append((torch.stack(logits, -1).softmax(-1)[..., None] * torch.stack(values, 1)).sum(1))
        outputs.append(torch.stack(rows, 1))
    return torch.stack(outputs)


@torch.no_grad()
def mass_loop(
    q, k, feat_size, summary_k, bias_table, window_size, partition_grid, count_cells='one', num_prefix_tokens=0
):
    """`eva_attention_mass` of q, k `(B, h, P + N, d)`: one query after the other."""
    P, (B, h, T, d) = num_prefix_tokens, q.shape
    out = torch.zeros(3, B, h, T - P, dtype=torch.float64)
    cells = grid_cells(feat_size, partition_grid) if partition_grid else []
    windows = grid_windows(feat_size, window_size) if window_size else [[n] for n in range(T - P)]
    for b in range(B):
        for head in range(h):
            prefix, keys = k[b, head, :P], k[b, head, P:]
            k_tilde = [sigma(keys[cell].mean(0), summary_k) for cell in cells]
            for window in windows:
                E = window if window_size else []
                rows = bias_rows(window, feat_size[1], window_size) if window_size else None
                for place, n in enumerate(window):
                    query = d**-0.5 * q[b, head, P + n]
                    exact = [(query @ key).exp() for key in prefix]
                    for other, m in enumerate(E):
                        bias = bias_table[rows[place, other], head] if bias_table is not None else 0
                        exact.append((query @ keys[m] + bias).exp())
                    counts = [count_of(cell, E, count_cells) for cell in cells]
                    summary = [count * (query @ key).exp() for count, key in zip(counts, k_tilde, strict=True) if count]
                    total = sum(exact) + sum(summary)
                    p = [float(w / sum(summary)) for w in summary]
                    out[0, b, head, n] = sum(exact) / total
                    out[1, b, head, n] = sum(summary) / total
                    out[2, b, head, n] = torch.tensor([x**-x for x in p], dtype=torch.float64).prod() if p else 0
    return out
