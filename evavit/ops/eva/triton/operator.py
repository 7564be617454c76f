"""The operators evavit::eva and evavit::eva_backward, and the launches behind them.

Their schemas hold tensors and numbers one by one, which PyTorch asks for; a packed call has no k and v. Above them,
`eva_attention_fused` takes what all backends of EVA take.
"""

from typing import Any, List, Optional, Tuple

import torch

from evavit.ops.common.launch import ceil_div, on_device, register_op
from evavit.ops.eva.case import EvaOptions
from evavit.ops.grid import block_counts, cell_shape

from .backward import backward_shared, backward_summary, backward_tokens, backward_weights
from .forward import forward_cells, forward_tokens, forward_windows
from .pieces import LN2
from .plan import WINDOWS_BACKWARD, WINDOWS_FORWARD, _Plan, _plan
from .prefix import backward_prefix, combine_prefix, forward_prefix

__all__ = ['eva_attention_fused']

Outputs = Tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _unpack(
    q: torch.Tensor, k: Optional[torch.Tensor], v: Optional[torch.Tensor]
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if k is None or v is None:
        return q[0], q[1], q[2]
    return q, k, v


def _tokens_like(q: torch.Tensor) -> torch.Tensor:
    """An empty `(B, h, N, d)` whose memory is `(B, N, h, d)`."""
    B, h, N, d = q.shape
    return q.new_empty(B, N, h, d).transpose(1, 2)


def _without_prefix(num_prefix_tokens: int, *tokens: torch.Tensor) -> Tuple[torch.Tensor, ...]:
    """The grid's part of tensors `(B, h, P + N, d)`."""
    return tuple(x[:, :, num_prefix_tokens:] for x in tokens) if num_prefix_tokens else tokens


def _forward_outputs(q: torch.Tensor, cells: int, num_prefix_tokens: int, save: bool) -> Outputs:
    B, h, N, d = q.shape
    saved_tokens, saved_cells = (N, cells) if save else (0, 0)
    return (
        _tokens_like(q),
        q.new_empty(B * h * saved_tokens, dtype=torch.float32),
        q.new_empty(B, h, cells + num_prefix_tokens, d),
        q.new_empty(B, h, cells + num_prefix_tokens, d),
        q.new_empty(B, h, saved_cells, d, dtype=torch.float32),
        q.new_empty(2, B, h, saved_cells, d, dtype=torch.float32),
    )


def _forward_prefix(
    plan: _Plan,
    tokens: Tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    strides: Tuple[int, ...],
    outputs: Outputs,
    scale: float,
    save: bool,
) -> None:
    """The prefix tokens' part of the outputs of `_eva`: y, log-sum-exp, and what all windows see of them."""
    out, lse, k_tilde, beta, *_ = outputs
    T, P, D, pairs = plan.P + plan.N, plan.P, plan.D, plan.pairs
    splits, per_split = plan.split(T)
    acc_parts = torch.empty(splits, pairs, P, D, dtype=torch.float32, device=out.device)
    stat_parts = torch.empty(splits, pairs, 2, P, dtype=torch.float32, device=out.device)
    plan.launch(
        forward_prefix,
        (pairs * splits, 1, 1),
        *(*tokens, *strides, k_tilde, beta, acc_parts, stat_parts),
        *(plan.heads, T, plan.cells, plan.rows, pairs, splits, per_split, scale),
        **plan.prefix,
        BM=32 if plan.small else 64,
        PREC=plan.prec,
    )
    plan.launch(
        combine_prefix,
        (pairs, 1, 1),
        *(acc_parts, stat_parts, out, out.stride(0), lse[pairs * plan.N :], plan.heads, pairs, splits),
        **plan.prefix,
        SAVE=save,
    )


def _backward_prefix(
    plan: _Plan,
    whole: Tuple[torch.Tensor, ...],
    lse: torch.Tensor,
    parts: Tuple[torch.Tensor, ...],
    grads: Tuple[torch.Tensor, ...],
    scale: float,
) -> None:
    """Add to the gradients of k and v what comes through prefix queries, and write those of the prefix tokens."""
    q, k, v, grad, out = whole
    dq, dk, dv = grads
    T, P, D, pairs = plan.P + plan.N, plan.P, plan.D, plan.pairs
    splits, per_split = plan.split(T)
    dq_parts = torch.empty(splits, plan.B, plan.heads, P, D, dtype=torch.float32, device=q.device)
    plan.launch(
        backward_prefix,
        (pairs * splits, 1, 1),
        *(q, k, v, grad, *q.stride(), *k.stride(), *v.stride(), *grad.stride()),
        *(out, out.stride(0), lse[pairs * plan.N :], *parts, dk, dv, *dk.stride()[:3], dq_parts),
        *(plan.heads, T, plan.cells, plan.rows, plan.rows_total, pairs, parts[0].shape[0], splits, per_split, scale),
        **plan.prefix,
        BM=32 if plan.small else 64,
        PREC=plan.prec,
    )
    dq[:, :, :P] = plan.sum(dq_parts)


def _eva(
    q: torch.Tensor,
    k: Optional[torch.Tensor],
    v: Optional[torch.Tensor],
    feat_size: List[int],
    w_q: Optional[torch.Tensor],
    b_q: Optional[torch.Tensor],
    g_q: Optional[torch.Tensor],
    o_q: Optional[torch.Tensor],
    w_k: Optional[torch.Tensor],
    b_k: Optional[torch.Tensor],
    g_k: Optional[torch.Tensor],
    o_k: Optional[torch.Tensor],
    rel_pos_bias: Optional[torch.Tensor],
    noise: Optional[torch.Tensor],
    window_size: int,
    partition_grid: int,
    count_cells: str,
    num_prefix_tokens: int,
    scale: float,
    proposal_scale: float,
    norm_eps: float,
    save: bool,
    gluon: bool,
) -> Outputs:
    """Forward: y, and for the backward the log-sum-exps, k̃ and β `(B, h, C_p + P, d)`, ω `(B, h, C_p, d)`, means
    `(2, B, h, C_p, d)`.

    All but y, k̃ and β are float32: the LayerNorm of rounded means is not that of the forward. Behind k̃ and β are k and
    v of the P prefix tokens. The log-sum-exps are in one axis, `(B, h, N)` of the grid's and `(B, h, P)` of the prefix.

    q, k, v are `(B, h, P + N, d)`; or q is all three, `(3, B, h, P + N, d)`, and k and v are None: then their gradient
    comes back in one piece too, which spares a copy of it. Without `save` the tensors for the backward alone are empty.
    The summaries' parameters come one by one, since autograd takes a list of tensors apart and together in Python.
    `gluon` lets the kernels in Gluon run where they take these tensors.
    """
    q, k, v = _unpack(q, k, v)
    P = num_prefix_tokens
    plan = _plan(q, feat_size, window_size, partition_grid, count_cells, P)
    out, lse, k_tilde, beta, omega, means = outputs = _forward_outputs(q, plan.cells, P, save)
    if out.numel() == 0:
        return outputs
    strides = (*q.stride(), *k.stride(), *v.stride())
    with on_device(q):
        if P:
            _forward_prefix(plan, (q, k, v), strides, outputs, scale, save)
            q, k, v, out = _without_prefix(P, q, k, v, out)
        if plan.cells:
            plan.launch(
                forward_cells,
                (plan.pairs, ceil_div(plan.cells, plan.cell_tiles[0]['G']), 1),
                *(q, k, v, *strides),
                *(w_q, b_q, g_q, o_q, w_k, b_k, g_k, o_k),
                noise if noise is not None else q,
                *(k_tilde, beta, omega, means),
                *plan.cell_sizes,
                *(scale**0.5, proposal_scale, norm_eps),
                **plan.options['forward_cells'],
                NOISE=noise is not None,
                SAVE=save,
            )
        per_program = plan.per_program(WINDOWS_FORWARD)
        chunks = ceil_div(plan.n_win, per_program)
        module = plan.gluon(strides, q, k, v) if gluon else None
        bias = rel_pos_bias if plan.local else None
        padded = q
        if bias is not None:
            pad = plan.pad_bias if module is None else plan.pad_bias_fragments
            padded = pad(bias, scale if plan.one_tile else LN2)
        grid = plan.B * chunks * plan.heads, 1, 1
        sizes = plan.heads, plan.H, plan.W, plan.n_wx, plan.n_win, plan.rows, chunks
        log_count = plan.log_counts(module is not None, scale, q.device)
        args = (k_tilde, beta, padded, log_count, out, out.stride(0), lse, *sizes, scale)
        options = dict(PER_PROGRAM=per_program, BIAS=bias is not None, SAVE=save)
        if module is not None:
            tokens = (q, k, v, *strides[:3], *strides[4:7], *strides[8:11])
            plan.launch(
                module.forward_windows_gluon, grid, *tokens, *args, **options, **plan.options['forward_windows_gluon']
            )
        elif plan.one_tile:
            options['PACKED'] = strides[:4] == strides[4:8] == strides[8:]
            plan.launch(forward_windows, grid, q, k, v, *strides, *args, **options, **plan.options['forward_windows'])
        else:
            plan.launch(forward_tokens, grid, q, k, v, *strides, *args, **options, **plan.options['forward_tokens'])
    return outputs


def _eva_fake(
    q: torch.Tensor, k: Optional[torch.Tensor], v: Optional[torch.Tensor], feat_size: List[int], *rest: Any
) -> Outputs:
    *_, partition_grid, _count_cells, num_prefix_tokens, _scale, _proposal_scale, _norm_eps, save, _gluon = rest
    q, k, v = _unpack(q, k, v)
    cells = 0
    if partition_grid > 0:
        rows, cols = block_counts(feat_size, cell_shape(feat_size, partition_grid))
        cells = rows * cols
    return _forward_outputs(q, cells, num_prefix_tokens, save)


def _token_grads(
    q: torch.Tensor, k: Optional[torch.Tensor], v: Optional[torch.Tensor]
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Empty gradients of q, k, v; of a packed q, in memory `(B, P + N, 3, h, d)`, and two empty tensors."""
    if k is None or v is None:
        _, B, h, N, d = q.shape
        return q.new_empty(B, N, 3, h, d).permute(2, 0, 3, 1, 4), q.new_empty(0), q.new_empty(0)
    return _tokens_like(q), _tokens_like(q), _tokens_like(q)


def _eva_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: Optional[torch.Tensor],
    v: Optional[torch.Tensor],
    out: torch.Tensor,
    lse: torch.Tensor,
    k_tilde: torch.Tensor,
    beta: torch.Tensor,
    omega: torch.Tensor,
    means: torch.Tensor,
    feat_size: List[int],
    summary: List[torch.Tensor],
    rel_pos_bias: Optional[torch.Tensor],
    window_size: int,
    partition_grid: int,
    count_cells: str,
    num_prefix_tokens: int,
    scale: float,
    proposal_scale: float,
    norm_eps: float,
    gluon: bool,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v (of a packed q: of all, and two empty tensors), of the summaries' parameters, float32
    `(2, d² + 3d)` packed, and of the bias, float32."""
    inputs = q, k, v
    q, k, v = _unpack(q, k, v)
    P = num_prefix_tokens
    plan = _plan(q, feat_size, window_size, partition_grid, count_cells, P)
    D, cells, pairs = plan.D, plan.cells, plan.pairs
    bias = rel_pos_bias if plan.local else None
    dbias_shape = rel_pos_bias.shape if rel_pos_bias is not None else (0,)
    if q.numel() == 0:
        return (
            *_token_grads(*inputs),
            q.new_zeros((2, D * D + 3 * D) if cells else (0, 0), dtype=torch.float32),
            q.new_zeros(dbias_shape, dtype=torch.float32),
        )

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=q.device)

    whole = q, k, v, grad, out
    q, k, v, grad, out = _without_prefix(P, *whole)
    q_strides, grad_strides = q.stride(), grad.stride()
    strides = (*q_strides, *k.stride(), *v.stride(), *grad_strides)
    module = plan.gluon(strides, q, k, v, grad, k_tilde, beta) if gluon else None
    splits, per_split = plan.split(plan.N if module is not None else plan.places)
    delta = empty(plan.B, plan.heads, plan.N)
    dk_tilde_parts, dbeta_parts = empty(splits, plan.rows_total, D), empty(splits, plan.rows_total, D)
    with on_device(q):
        log_count = plan.log_counts(module is not None, scale, q.device)
        shared = (
            *(lse, delta, k_tilde, beta, log_count, dk_tilde_parts, dbeta_parts),
            *(plan.heads, plan.N, plan.rows, splits, per_split, plan.rows_total, scale),
        )
        by_window = plan.count == 2
        if module is not None:
            plan.launch(
                module.backward_shared_gluon,
                (pairs * splits, 1, 1),
                *(q, out, out.stride(0), grad, *q_strides[:3], *grad_strides[:3]),
                *shared,
                *((plan.W, plan.n_wx) if by_window else (None, None)),
                **plan.options['backward_shared_gluon'],
            )
        else:
            plan.launch(
                backward_shared,
                (pairs * splits, max(plan.NC, 1), 1),
                *(q, out, out.stride(0), grad, *q_strides, *grad_strides),
                *shared,
                *((plan.H, plan.W, plan.n_wx, plan.n_win) if by_window else (None,) * 4),
                **plan.options['backward_shared'],
            )
        xi = dlog_xi = domega = dbeta = omega_half = dmeans = delta
        if cells:
            xi, dlog_xi = torch.empty_like(delta), torch.empty_like(delta)
            domega, dbeta = empty(plan.cells_total, D), empty(plan.cells_total, D, dtype=q.dtype)
            omega_half = empty(plan.cells_total, D, dtype=q.dtype) if module is not None else dbeta
            plan.launch(
                backward_weights,
                (pairs, ceil_div(cells, plan.cell_tiles[1]['G']), 1),
                *(k, v, *strides[4:12]),
                *(omega, dbeta_parts, dbeta, omega_half, domega, xi, dlog_xi),
                *plan.cell_sizes,
                *(splits, plan.rows_total, scale**0.5),
                **plan.options['backward_weights'],
                OMEGA_HALF=module is not None,
            )
            programs = min(ceil_div(plan.cells_total, plan.options['backward_summary']['R']), 128)
            dparams = empty(programs, 2, D * D + 3 * D)
            dmeans = empty(2, plan.cells_total, D, dtype=q.dtype)
            w_q, b_q, g_q, _, w_k, b_k, g_k, _ = summary
            plan.launch(
                backward_summary,
                (programs, 2, 1),
                *(means, domega, dk_tilde_parts),
                *(w_q, b_q, g_q, w_k, b_k, g_k),
                *(dmeans, dparams),
                *(plan.cells_total, splits, plan.H, plan.W, plan.n_cx, cells, plan.ch, plan.cw),
                *(plan.rows, plan.rows_total),
                *(scale**0.5 * proposal_scale, norm_eps),
                **plan.options['backward_summary'],
            )
            dparams = plan.sum(dparams)
        else:
            dparams = empty(0, 0)
        # The peak of memory is next: what is read no more goes first.
        prefix_parts = (dk_tilde_parts, dbeta_parts) if P else ()
        del dk_tilde_parts, dbeta_parts, domega, shared
        grads = _token_grads(*inputs)
        whole_grads = grads[0].unbind(0) if inputs[1] is None else grads
        dq, dk, dv = _without_prefix(P, *whole_grads)

        per_program = plan.per_program(WINDOWS_BACKWARD)
        chunks = ceil_div(plan.n_win, per_program)
        dbias_parts, padded = delta, q
        if bias is not None:
            # Registers hold the sum over one tile; the sum over more is kept in memory, from zero.
            side = plan.NT * plan.BM
            make = torch.empty if plan.NT == 1 else torch.zeros
            dbias_parts = make((plan.B * chunks, plan.heads, side, side), dtype=torch.float32, device=q.device)
            padded = plan.pad_bias(bias, LN2) if module is None else plan.pad_bias_fragments(bias, scale)
        grid = plan.B * chunks * plan.heads, 1, 1
        saved = lse, delta, k_tilde, beta, padded, log_count
        through_cells = dbeta, dmeans, xi, dlog_xi
        written = dq, dk, dv, *dq.stride()[:3], dbias_parts
        sizes = plan.heads, plan.H, plan.W, plan.n_wx, plan.n_win, plan.n_cx, cells, plan.rows, chunks, plan.cells_total
        options = dict(PER_PROGRAM=per_program, BIAS=bias is not None)
        if module is not None:
            plan.launch(
                module.backward_tokens_gluon,
                grid,
                *(q, k, v, grad, *strides[:3], *strides[4:7], *strides[8:11], *strides[12:15]),
                *(*saved, omega_half, *through_cells, *written, *sizes, scale),
                **options,
                **plan.options['backward_tokens_gluon'],
            )
        else:
            plan.launch(
                backward_tokens,
                grid,
                *(q, k, v, grad, *strides),
                *(*saved, omega, *through_cells, *written, *sizes, scale, scale**0.5),
                **options,
                **plan.options['backward_tokens'],
            )
        if prefix_parts:
            _backward_prefix(plan, whole, lse, prefix_parts, whole_grads, scale)
        if bias is not None:
            dbias = plan.bias_grad(plan.sum(dbias_parts))
        else:
            dbias = torch.zeros(dbias_shape, dtype=torch.float32, device=q.device)
    return (*grads, dparams, dbias)


def _eva_backward_fake(
    grad: torch.Tensor, q: torch.Tensor, k: Optional[torch.Tensor], v: Optional[torch.Tensor], *rest: Any
) -> Tuple[torch.Tensor, ...]:
    rel_pos_bias, _window_size, partition_grid = rest[-9:-6]
    D = q.shape[-1]
    params = (2, D * D + 3 * D) if partition_grid > 0 else (0, 0)
    dbias_shape = rel_pos_bias.shape if rel_pos_bias is not None else (0,)
    return (
        *_token_grads(q, k, v),
        q.new_empty(params, dtype=torch.float32),
        q.new_empty(dbias_shape, dtype=torch.float32),
    )


def _setup_context(ctx: Any, inputs: Tuple[Any, ...], output: Tuple[torch.Tensor, ...]) -> None:
    q, k, v, feat_size, *summary, rel_pos_bias, _noise, window_size, partition_grid = inputs[:16]
    *options, save, gluon = inputs[16:]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, rel_pos_bias, *output, *summary)
    ctx.options = feat_size, window_size, partition_grid, *options, gluon
    ctx.saved = save


def _autograd_backward(ctx: Any, grad: Optional[torch.Tensor], *_: Any) -> Tuple[Optional[torch.Tensor], ...]:
    nones: List[Optional[torch.Tensor]] = [None] * 23
    if grad is None:
        return (*nones,)
    if not ctx.saved:
        raise RuntimeError('the fused EVA ran without keeping what its backward needs; this is a fault of evavit')
    q, k, v, rel_pos_bias, out, lse, k_tilde, beta, omega, means, *summary = ctx.saved_tensors
    feat_size, *options = ctx.options
    partition_grid = options[1]
    dq, dk, dv, dparams, dbias = torch.ops.evavit.eva_backward(
        *(grad, q, k, v, out, lse, k_tilde, beta, omega, means),
        *(feat_size, summary if partition_grid else [], rel_pos_bias),
        *options,
    )
    dsummary = nones[:8]
    if partition_grid:
        d = q.shape[-1]
        parts = [part.split([d * d, d, d, d]) for part in dparams.unbind(0)]
        dsummary = [g.to(p.dtype).view(p.shape) for g, p in zip((*parts[0], *parts[1]), summary, strict=True)]
    packed = k is None
    return (
        *(dq, None if packed else dk, None if packed else dv, None),
        *dsummary,
        None if rel_pos_bias is None else dbias.to(rel_pos_bias.dtype),
        *nones[13:],
    )


register_op('eva', _eva, _eva_fake, _setup_context, _autograd_backward)
register_op('eva_backward', _eva_backward, _eva_backward_fake)


def eva_attention_fused(tokens: Tuple[torch.Tensor, ...], options: EvaOptions, gluon: bool) -> torch.Tensor:
    """`evavit.ops.eva_attention` without dropout, by the kernels; arguments have been checked.

    Args:
        tokens: q, k, v `(B, h, P + N, d)`, or one tensor with all three, `(3, B, h, P + N, d)`.
        options: Of the call.
        gluon: Whether the kernels in Gluon run where they take these tensors.
    """
    q, k, v = tokens if len(tokens) == 3 else (tokens[0], None, None)
    summary: List[Optional[torch.Tensor]] = [None] * 8
    noise = None
    if options.partition_grid > 0 and options.summary_q is not None and options.summary_k is not None:
        summary = [x.contiguous() for x in (*options.summary_q, *options.summary_k)]
        noise = options.noise.contiguous() if options.noise is not None else None
    learned = [x for x in (*tokens, options.rel_pos_bias, *summary) if x is not None]
    save = torch.is_grad_enabled() and any(x.requires_grad for x in learned)
    return torch.ops.evavit.eva(
        *(q, k, v, options.feat_size),
        *summary,
        *(options.rel_pos_bias, noise, options.window_size, options.partition_grid, options.count_cells),
        *(options.num_prefix_tokens, options.scale, options.proposal_scale, options.norm_eps, save, gluon),
    )[0]
