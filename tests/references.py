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
    return [
        [y * W + x for y in rows for x in cols]
        for rows in axis_cells(H, partition_grid)
        for cols in axis_cells(W, partition_grid)
    ]


def grid_windows(feat_size, window_size):
    """Token numbers of every window, windows in raster order."""
    H, W = feat_size
    return [
        [y * W + x for y in range(top, min(top + window_size, H)) for x in range(left, min(left + window_size, W))]
        for top in range(0, H, window_size)
        for left in range(0, W, window_size)
    ]


def bias_rows(tokens, width, window_size):
    """Rows of the bias table for every query (first) and key (second) among tokens of a grid of that width."""
    y, x = torch.tensor(tokens) // width, torch.tensor(tokens) % width
    dy, dx = y[:, None] - y, x[:, None] - x
    return (dy + window_size - 1) * (2 * window_size - 1) + dx + window_size - 1


def split(x, groups):
    """The tokens of `(B, h, N, d)` by group, one tensor a group. One gather: autograd is slow with a gather each."""
    return x[:, :, list(chain(*groups))].split([len(group) for group in groups], 2)


def scaled(*tensors):
    """x̂ = d^(-¼) x."""
    return [x * x.shape[-1] ** -0.25 for x in tensors]


def xi(x, omega):
    """ξ(x, ω) = exp(ω·x - ½‖x‖²) of x `(…, d)` for one direction ω, `(d)` or as x."""
    return torch.exp((x * omega).sum(-1) - 0.5 * (x * x).sum(-1))


def phi(x, directions, kind='positive'):
    """Random features `(B, h, N, S)` of x `(B, h, N, d)`, one direction of `(h, S, d)` after the other."""
    S = directions.shape[1]
    omegas = [omega[None, :, None] for omega in directions.unbind(1)]
    if kind == 'relu':
        return torch.stack([((x * omega).sum(-1) / S**0.5).relu() + 1e-3 for omega in omegas], -1)
    return torch.stack([xi(x, omega) for omega in omegas], -1) / S**0.5


def performer_loop(q, k, v, directions, kind='positive'):
    """φ(q)·φ(k) in place of exp(q·k), one query after the other."""
    q, k = scaled(q, k)
    weights, keys = phi(q, directions, kind), phi(k, directions, kind)
    outputs = []
    for w in weights.unbind(2):
        similarity = (w[:, :, None] * keys).sum(-1, keepdim=True)
        outputs.append((similarity * v).sum(2) / similarity.sum(2))
    return torch.stack(outputs, 2)


def lara_loop(q, k, v, landmarks_q, landmarks_k, weighting, noise=None):
    """Importance sampling from C proposals, by their densities, one sample after the other; noise `(B, h, C, S, d)`."""
    s = q.shape[-1] ** -0.5
    affinity = torch.softmax(s * landmarks_q @ q.transpose(2, 3), -1)  # (B, h, C, N), over the queries
    q, k, landmarks_q, landmarks_k = scaled(q, k, landmarks_q, landmarks_k)
    means = (landmarks_q + landmarks_k).unbind(2)
    noise = torch.zeros_like(landmarks_q).unsqueeze(3) if noise is None else noise

    def density(omega, mean):
        return torch.exp(-0.5 * ((omega - mean) ** 2).sum(-1))

    numerator, denominator = 0.0, 0.0
    for c, mean in enumerate(means):
        for eps in noise[:, :, c].unbind(2):
            omega = mean + eps
            keys = xi(k, omega[:, :, None])
            f = (keys[..., None] * v).sum(2) / keys.sum(2)[..., None]
            target = density(omega, 0.0)[..., None] * xi(q, omega[:, :, None]) * keys.sum(2)[..., None]  # (B, h, N)
            balance = density(omega, mean) / sum(density(omega, other) for other in means)
            if weighting == 'optimal':
                alpha = (balance[..., None] + affinity[:, :, c] - affinity.mean(2)).clamp(min=1e-8)
            elif weighting == 'biased':
                alpha = balance[..., None] * torch.exp((q * mean[:, :, None]).sum(-1))
            else:
                alpha = balance[..., None]
            w = alpha * target / density(omega, mean)[..., None]
            numerator = numerator + w[..., None] * f[:, :, None]
            denominator = denominator + w[..., None]
    return numerator / denominator


def scatterbrain_loop(q, k, v, feat_size, directions, bias_table=None, window_size=7):
    """exp(s q·k + b) for the tokens of the query's window and φ(q)·φ(k) for all others, one window after the other."""
    s = q.shape[-1] ** -0.5
    similarity = phi(*scaled(q), directions) @ phi(*scaled(k), directions).transpose(2, 3)
    exact = torch.exp(s * q @ k.transpose(2, 3))
    for tokens in grid_windows(feat_size, window_size):
        window = exact[:, :, tokens][..., tokens]
        if bias_table is not None:
            window = window * torch.exp(bias_table[bias_rows(tokens, feat_size[1], window_size)].permute(2, 0, 1))
        rows, cols = torch.tensor(tokens)[:, None], torch.tensor(tokens)
        similarity = similarity.index_put(
            (torch.arange(q.shape[0])[:, None, None, None], torch.arange(q.shape[1])[:, None, None], rows, cols), window
        )
    return similarity @ v / similarity.sum(-1, keepdim=True)


def in_order(outputs, groups):
    """Outputs of groups of tokens, back in raster order."""
    return torch.cat(outputs, 2)[:, :, torch.tensor(list(chain(*groups))).argsort()]


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
):
    """EVA for q, k, v `(B, h, N, d)`: one cell after the other, then one window of queries after the other.

    summary_q, summary_k: (W, b, LayerNorm weight, LayerNorm bias); bias_table `((2·window_size - 1)², h)`; noise
    `(B, h, C_p, d)`, which stands for noise_std · ε.
    """
    d = q.shape[-1]
    s = d**-0.5
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
        keys, values = torch.cat([k_E, summaries[0]], 2), torch.cat([v_E, summaries[1]], 2)
        logits = s * q_E @ keys.transpose(2, 3)
        if bias_table is not None:
            bias = bias_table[bias_rows(tokens, feat_size[1], window_size)].permute(2, 0, 1)
            logits = logits + F.pad(bias, [0, len(betas)])
        outputs.append(torch.softmax(logits, -1) @ values)
    return in_order(outputs, groups)


def merge_heads(x):
    """`(B, h, N, d)` to `(B, N, h·d)`."""
    return x.transpose(1, 2).flatten(2)


def pseudo_inverse_loop(x, iterations):
    """Razavi's iteration on one matrix."""
    identity = torch.eye(len(x), dtype=x.dtype)
    z = x.T / (x.abs().sum(0).max() * x.abs().sum(1).max())
    for _ in range(iterations):
        inner = 7 * identity - x @ z
        inner = 15 * identity - x @ z @ inner
        inner = 13 * identity - x @ z @ inner
        z = z @ inner / 4
    return z


def nystromformer_loop(q, k, v, feat_size, landmark_grid=7, iterations=6, kernels=None):
    """Nyström attention: one head of one image after the other; kernels `(h, length)` of the convolution."""
    s = q.shape[-1] ** -0.5
    cells = grid_cells(feat_size, landmark_grid)
    images = []
    for image in range(q.shape[0]):
        heads = []
        for head in range(q.shape[1]):
            Q, K, V = q[image, head], k[image, head], v[image, head]
            Q_l = torch.stack([Q[cell].mean(0) for cell in cells])
            K_l = torch.stack([K[cell].mean(0) for cell in cells])
            left, right = torch.softmax(s * Q @ K_l.T, 1), torch.softmax(s * Q_l @ K.T, 1)
            y = left @ pseudo_inverse_loop(torch.softmax(s * Q_l @ K_l.T, 1), iterations) @ right @ V
            if kernels is not None:
                reach = kernels.shape[1] // 2
                padded = F.pad(V, [0, 0, reach, reach])
                y = y + sum(weight * padded[j : j + len(V)] for j, weight in enumerate(kernels[head]))
            heads.append(y)
        images.append(torch.stack(heads))
    return torch.stack(images)


def window_bias(table, tokens, width, window_size):
    """Bias `(h, queries, keys)` among tokens of a window, or 0 without a table."""
    return 0.0 if table is None else table[bias_rows(tokens, width, window_size)].permute(2, 0, 1)


def combiner_loop(q, k, v, feat_size, bias_table=None, window_size=7, projections=None):
    """Combiner-Fixed: one span of queries after the other, every other span summarised by a maximum; of the ReLU of
    projections (W_q, W_k) for DeepSets-Max."""
    s = q.shape[-1] ** -0.5
    spans = grid_windows(feat_size, window_size)
    parts = list(zip(split(q, spans), split(k, spans), split(v, spans), strict=True))
    keys, values = [], []
    W_q, W_k = (None, None) if projections is None else projections

    def pooled(x, W):
        return (x if W is None else F.relu(x @ W.T)).max(2, keepdim=True).values

    for q_m, k_m, v_m in parts:
        inside = torch.softmax(s * pooled(q_m, W_q) @ k_m.transpose(2, 3), -1)
        keys.append(pooled(k_m, W_k))
        values.append(inside @ v_m)
    outputs = []
    for number, (tokens, (q_n, k_m, v_m)) in enumerate(zip(spans, parts, strict=True)):
        others = [r for r in range(len(spans)) if r != number]
        logits = [s * q_n @ k_m.transpose(2, 3) + window_bias(bias_table, tokens, feat_size[1], window_size)]
        logits += [s * q_n @ keys[r].transpose(2, 3) for r in others]
        weights = torch.softmax(torch.cat(logits, -1), -1)
        outputs.append(weights @ torch.cat([v_m, *(values[r] for r in others)], 2))
    return in_order(outputs, spans)


def long_short_loop(q, k, v, feat_size, projection, norms=None, bias_table=None, window_size=7):
    """Long-short attention; projection (W `(h·r, C)`, b), norms ((weight, bias) of LN_L, of LN_G) over C channels."""
    B, h, _, d = q.shape
    s = d**-0.5
    logits = merge_heads(k) @ projection[0].T + projection[1]
    r = logits.shape[-1] // h
    P = torch.stack([torch.softmax(logits[..., head * r : (head + 1) * r], 1) for head in range(h)], 1)  # (B, h, N, r)
    k_bar, v_bar = P.transpose(2, 3) @ k, P.transpose(2, 3) @ v
    if norms is not None:

        def normalise(x, norm):
            return F.layer_norm(merge_heads(x), (h * d,), *norm).view(B, -1, h, d).transpose(1, 2)

        k, v, k_bar, v_bar = (
            normalise(x, norm)
            for x, norm in zip((k, v, k_bar, v_bar), (norms[0], norms[0], norms[1], norms[1]), strict=True)
        )
    windows = grid_windows(feat_size, window_size)
    outputs = []
    for tokens in windows:
        local = s * q[:, :, tokens] @ k[:, :, tokens].transpose(2, 3)
        local = local + window_bias(bias_table, tokens, feat_size[1], window_size)
        weights = torch.softmax(torch.cat([local, s * q[:, :, tokens] @ k_bar.transpose(2, 3)], -1), -1)
        outputs.append(weights @ torch.cat([v[:, :, tokens], v_bar], 2))
    return in_order(outputs, windows)


def linformer_loop(q, k, v, E, F_v):
    """Linformer with projections `(r, N)`: each projected key and value is a sum over the tokens."""
    keys = torch.stack([(E[j, :, None] * k).sum(2) for j in range(len(E))], 2)
    values = torch.stack([(F_v[j, :, None] * v).sum(2) for j in range(len(F_v))], 2)
    return torch.softmax(q.shape[-1] ** -0.5 * q @ keys.transpose(2, 3), -1) @ values


def reformer_loop(q, v, rotations, chunk_size):
    """LSH attention over the union of what a query meets in any round; rotations `(rounds, d, buckets / 2)`."""
    N = q.shape[2]
    images = []
    for image in range(q.shape[0]):
        heads = []
        for head in range(q.shape[1]):
            Q, V = q[image, head], v[image, head]
            sees = torch.zeros(N, N, dtype=torch.bool)
            for R in rotations:
                bucket = [int(torch.cat([x @ R, -(x @ R)]).argmax()) for x in Q.detach()]
                place = {n: i for i, n in enumerate(sorted(range(N), key=lambda n: (bucket[n], n)))}
                for n in range(N):
                    for m in range(N):
                        if bucket[m] == bucket[n] and place[n] // chunk_size - place[m] // chunk_size in (0, 1):
                            sees[n, m] = n != m
            for n in range(N):
                if not sees[n].any():
                    sees[n, n] = True
            keys = torch.stack([x / x.norm() for x in Q])
            heads.append(torch.softmax((Q @ keys.T).masked_fill(~sees, -math.inf), 1) @ V)
        images.append(torch.stack(heads))
    return torch.stack(images)


def sigma(mean, summary):
    """σ of (26): the identity, a projection, or that and LayerNorm, for no, two or four tensors."""
    if summary:
        mean = mean @ summary[0].T + summary[1]
    return F.layer_norm(mean, mean.shape[-1:], *summary[2:]) if len(summary) == 4 else mean


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
            if not kept:
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
            logits.append(s * (q_W * k_tilde[:, :, None]).sum(-1))
            values.append(numerator / denominator)
        weights = torch.stack(logits, -1).softmax(-1)
        y = (weights[..., None] * torch.stack(values, 3)).sum(3)
        outputs = outputs.index_copy(2, torch.tensor(window), y)
    return outputs


def cells_across(width, partition_grid):
    """Number of cells along a row of the grid."""
    return len(axis_cells(width, partition_grid))


def relative_errors(output, leaves, expected, expected_leaves):
    """Relative errors of the output and of the gradient of every leaf, by name.

    leaves are dictionaries of the same names. A gradient that is zero in exact arithmetic is measured against 1 % of
    the gradient that comes in.
    """
    grad = torch.randn(expected.shape, dtype=torch.float64)
    grads = torch.autograd.grad(output, list(leaves.values()), grad.to(output.dtype))
    references = torch.autograd.grad(expected, list(expected_leaves.values()), grad, materialize_grads=True)
    found = {'output': ((output.detach() - expected.detach()).norm() / expected.detach().norm()).item()}
    for name, value, reference in zip(leaves, grads, references, strict=True):
        found[name] = ((value - reference).norm() / reference.norm().clamp(min=0.01 * grad.norm())).item()
    return found


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


def saved_bytes(function):
    """Bytes of the storages that autograd keeps for the backward pass of function()."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = function()  # until counted: memory that is freed may be given out again at the same address
    total = sum(storages.values())
    del kept
    return total
