"""The kernels of prefix tokens: their own queries, which see all P + N tokens exactly, forward and backward.

What the grid's queries see of them is in the other kernels, where a prefix token is one more shared key. P is small, so
the keys of an (image, head) are split over programs. Here q, k, v, out, grad, dq, dk and dv begin at the first prefix
token and T = P + N. pieces.py says how to read the signatures.
"""

import triton
import triton.language as tl

from .forward import add_keys
from .pieces import LOG2E, load_rows, split_program, store_rows


@triton.jit
def forward_prefix(
    q, k, v,  # (B, heads, T, D), dtype; the caller
    sqb, sqh, sqn, sqd, skb, skh, skn, skd, svb, svh, svn, svd,
    k_tilde, beta,  # (B, heads, rows, D), dtype: writes the rows behind the cells, the prefix tokens' k and v
    acc_parts,  # writes (splits, B, heads, P, D) float32, sums of values
    stat_parts,  # writes (splits, B, heads, 2, P) float32, maximum of the logits and sum of weights
    heads, T, cells, rows, pairs,
    splits, per_split,  # programs that share the tokens of an (image, head), and tokens of each
    scale,
    P: tl.constexpr, BP: tl.constexpr,  # prefix tokens, and rows of their tile
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """A part of the running softmax of prefix queries. Programs: (B · splits · heads)."""
    head, split, image = split_program(heads, splits)
    pair = image * heads + head
    q += image * sqb + head * sqh
    k += image * skb + head * skh
    v += image * svb + head * svh
    p = tl.arange(0, BP)
    q_p = load_rows(q, p, p < P, sqn, sqd, D, BD)
    top = tl.full([BP], float('-inf'), tl.float32)
    total = tl.zeros([BP], tl.float32)
    acc = tl.zeros([BP, BD], tl.float32)
    for n0 in range(split * per_split, tl.minimum(split * per_split + per_split, T), BM):
        n = n0 + tl.arange(0, BM)
        k_n = load_rows(k, n, n < T, skn, skd, D, BD)
        v_n = load_rows(v, n, n < T, svn, svd, D, BD)
        if n0 == 0:
            store_rows(k_tilde, pair * rows + cells + n, n < P, D, 1, k_n, D, BD)
            store_rows(beta, pair * rows + cells + n, n < P, D, 1, v_n, D, BD)
        s = tl.dot(q_p, tl.trans(k_n), input_precision=PREC) * (scale * LOG2E)
        s = tl.where((n < T)[None, :], s, float('-inf'))
        top, total, acc = add_keys(s, v_n, top, total, acc, PREC)
    part = split.to(tl.int64) * pairs + pair
    store_rows(acc_parts + part * P * D, p, p < P, D, 1, acc, D, BD)
    tl.store(stat_parts + part * 2 * P + p, top, mask=p < P)
    tl.store(stat_parts + part * 2 * P + P + p, total, mask=p < P)


@triton.jit
def combine_prefix(
    acc_parts, stat_parts,  # forward_prefix
    out, sob,  # writes y, an image (T, heads, D) in memory, dtype
    lse,  # if SAVE: writes the log-sum-exp of a prefix query's logits (B, heads, P) float32
    heads, pairs, splits,
    P: tl.constexpr, BP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    SAVE: tl.constexpr,  # whether there will be a backward
):  # fmt: skip
    """y of the prefix queries from its parts. Programs: (B · heads)."""
    pair = tl.program_id(0).to(tl.int64)
    p = tl.arange(0, BP)
    top = tl.full([BP], float('-inf'), tl.float32)
    total = tl.zeros([BP], tl.float32)
    acc = tl.zeros([BP, BD], tl.float32)
    for i in range(splits):
        part = i * pairs + pair
        top_i = tl.load(stat_parts + part * 2 * P + p, mask=p < P, other=0.0)
        total_i = tl.load(stat_parts + part * 2 * P + P + p, mask=p < P, other=1.0)
        acc_i = load_rows(acc_parts + part * P * D, p, p < P, D, 1, D, BD)
        new_top = tl.maximum(top, top_i)
        old, new = tl.exp2(top - new_top), tl.exp2(top_i - new_top)
        top, total = new_top, total * old + total_i * new
        acc = acc * old[:, None] + acc_i * new[:, None]
    out += (pair // heads) * sob + (pair % heads) * D
    store_rows(out, p, p < P, heads * D, 1, acc / total[:, None], D, BD)
    if SAVE:
        tl.store(lse + pair * P + p, top + tl.log2(total), mask=p < P)


@triton.jit
def backward_prefix(
    q, k, v,  # (B, heads, T, D), dtype; the caller
    grad,  # dy (B, heads, T, D), dtype; autograd
    sqb, sqh, sqn, sqd, skb, skh, skn, skd, svb, svh, svn, svd, sgb, sgh, sgn, sgd,
    out, sob,  # y, an image (T, heads, D) in memory, dtype; combine_prefix
    lse,  # (B, heads, P) float32; combine_prefix
    dk_tilde_parts, dbeta_parts,  # (shared_splits, B, heads, rows, D) float32; backward_shared or backward_shared_gluon
    dk, dv,  # adds to (B, heads, T, D), dtype; backward_tokens or backward_tokens_gluon; those of prefix tokens are new
    sdb, sdh, sdn,
    dq_parts,  # writes (splits, B, heads, P, D) float32
    heads, T, cells, rows, rows_total, pairs, shared_splits,
    splits, per_split,  # programs that share the tokens of an (image, head), and tokens of each
    scale,
    P: tl.constexpr, BP: tl.constexpr,  # prefix tokens, and rows of their tile
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """What dk and dv get through prefix queries, and those queries' dq. Programs: (B · splits · heads)."""
    head, split, image = split_program(heads, splits)
    pair = image * heads + head
    q += image * sqb + head * sqh
    k += image * skb + head * skh
    v += image * svb + head * svh
    grad += image * sgb + head * sgh
    out += image * sob + head * D
    dk += image * sdb + head * sdh
    dv += image * sdb + head * sdh
    p = tl.arange(0, BP)
    q_p = load_rows(q, p, p < P, sqn, sqd, D, BD)
    dy = load_rows(grad, p, p < P, sgn, sgd, D, BD)
    y = load_rows(out, p, p < P, heads * D, 1, D, BD).to(tl.float32)
    delta = tl.sum(y * dy.to(tl.float32), 1)
    lse_p = tl.load(lse + pair * P + p, mask=p < P, other=float('inf'))
    acc_q = tl.zeros([BP, BD], tl.float32)
    for n0 in range(split * per_split, tl.minimum(split * per_split + per_split, T), BM):
        n = n0 + tl.arange(0, BM)
        k_n = load_rows(k, n, n < T, skn, skd, D, BD)
        v_n = load_rows(v, n, n < T, svn, svd, D, BD)
        # Transposed, (keys, prefix queries): the sums over queries are then plain products.
        s = tl.dot(k_n, tl.trans(q_p), input_precision=PREC) * (scale * LOG2E)
        w = tl.where((n < T)[:, None], tl.exp2(s - lse_p[None, :]), 0.0)
        dw = tl.dot(v_n, tl.trans(dy), input_precision=PREC)
        ds = (w * (dw - delta[None, :])).to(q_p.dtype)
        acc_k = tl.dot(ds, q_p, input_precision=PREC) * scale
        acc_v = tl.dot(w.to(dy.dtype), dy, input_precision=PREC)
        acc_q = tl.dot(tl.trans(ds), k_n, acc_q, input_precision=PREC)
        in_grid = (n >= P) & (n < T)
        acc_k += load_rows(dk, n, in_grid, sdn, 1, D, BD).to(tl.float32)
        acc_v += load_rows(dv, n, in_grid, sdn, 1, D, BD).to(tl.float32)
        if n0 == 0:
            for i in range(shared_splits):
                row = i * rows_total + pair * rows + cells + n
                acc_k += load_rows(dk_tilde_parts, row, n < P, D, 1, D, BD)
                acc_v += load_rows(dbeta_parts, row, n < P, D, 1, D, BD)
        store_rows(dk, n, n < T, sdn, 1, acc_k, D, BD)
        store_rows(dv, n, n < T, sdn, 1, acc_v, D, BD)
    store_rows(dq_parts + (split.to(tl.int64) * pairs + pair) * P * D, p, p < P, D, 1, acc_q * scale, D, BD)
