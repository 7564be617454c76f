"""The operators evavit::eva and evavit::eva_backward.

Their schemas hold tensors and numbers one by one, which PyTorch asks for; a packed call has no k and v. Above them,
`eva_attention_fused` takes what all backends of EVA take.
"""

from typing import Any, List, Optional, Sequence, Tuple

import torch

from evavit.ops.common.launch import register_op
from evavit.ops.eva.case import EvaOptions, eva_num_cells

from .launches import Case, backward_launches, forward_launches, keep

__all__ = ['eva_attention_fused']


def _tokens_like(q: torch.Tensor) -> torch.Tensor:
    """An empty `(B, h, P + N, d)` whose memory is `(B, P + N, h, d)`."""
    B, h, T, d = q.shape[-4:]
    return q.new_empty_strided((B, h, T, d), (T * h * d, d, h * d, 1))


def _case(
    q: torch.Tensor,
    k: Optional[torch.Tensor],
    v: Optional[torch.Tensor],
    learned: Sequence[Optional[torch.Tensor]],
    gluon: bool,
    feat_size: List[int],
    *options: Any,
) -> Case:
    shape, strides, addresses = q.shape, q.stride(), q.data_ptr()
    apart = 0
    if k is None or v is None:
        shape, apart, strides = shape[1:], strides[0], strides[1:] * 3
        addresses |= apart * q.itemsize
    else:
        strides = strides + k.stride() + v.stride()
        addresses |= k.data_ptr() | v.data_ptr()
    dtypes = tuple([None if x is None else x.dtype for x in learned])
    gluon = gluon and addresses % 16 == 0
    return Case(shape, strides, apart, q.dtype, q.get_device(), tuple(feat_size), *options, dtypes, gluon)


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
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Forward: y, and what `Kept` says, uint8, which is empty without `save`.

    q, k, v are `(B, h, P + N, d)`; or q is all three, `(3, B, h, P + N, d)`, and k and v are None: then their gradient
    comes back in one piece too, which spares a copy of it. The summaries' parameters come one by one, since autograd
    takes a list of tensors apart and together in Python. `gluon` lets the kernels in Gluon run where they take these
    tensors.
    """
    learned = w_q, b_q, g_q, o_q, w_k, b_k, g_k, o_k, rel_pos_bias
    options = window_size, partition_grid, count_cells, num_prefix_tokens, scale, proposal_scale, norm_eps
    out = _tokens_like(q)
    if out.numel() == 0:
        return out, q.new_empty(0, dtype=torch.uint8)
    case = _case(q, k, v, learned, gluon, feat_size, *options)
    run, size = forward_launches(case, None if noise is None else noise.dtype, save)
    kept = q.new_empty(size, dtype=torch.uint8)
    k, v = (q if x is None else x for x in (k, v))
    run(q, k, v, *[q if x is None else x for x in (*learned, noise)], out, kept)
    return out, kept


def _eva_fake(
    q: torch.Tensor, k: Optional[torch.Tensor], v: Optional[torch.Tensor], feat_size: List[int], *rest: Any
) -> Tuple[torch.Tensor, torch.Tensor]:
    *_, partition_grid, _count_cells, num_prefix_tokens, _scale, _proposal_scale, _norm_eps, save, _gluon = rest
    out, size = _tokens_like(q), 0
    if save and out.numel() > 0:
        size = keep(out.shape, eva_num_cells(feat_size, partition_grid), num_prefix_tokens, q.dtype).size
    return out, q.new_empty(size, dtype=torch.uint8)


def _token_grads(q: torch.Tensor, packed: bool) -> List[torch.Tensor]:
    """Empty gradients of q, k and v; one of a packed q, in memory `(B, P + N, 3, h, d)`."""
    if not packed:
        return [_tokens_like(q) for _ in range(3)]
    _, B, h, T, d = q.shape
    row = h * d
    return [q.new_empty_strided((3, B, h, T, d), (row, 3 * T * row, d, 3 * row, 1))]


def _learned_sizes(d: int, has_summary: bool, table: Optional[torch.Tensor]) -> List[int]:
    """Elements of each of the learned: the summaries' eight, and the table of biases."""
    return [*([d * d, d, d, d] * 2 if has_summary else ()), *([table.numel()] if table is not None else ())]


def _eva_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: Optional[torch.Tensor],
    v: Optional[torch.Tensor],
    out: torch.Tensor,
    kept: torch.Tensor,
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
) -> List[torch.Tensor]:
    """Gradients of q, k, v, or of a packed q, and in one axis, float32, those of the summaries' parameters and of the
    bias."""
    learned = [*summary, rel_pos_bias] if summary else [None] * 8 + [rel_pos_bias]
    options = window_size, partition_grid, count_cells, num_prefix_tokens, scale, proposal_scale, norm_eps
    size = sum(_learned_sizes(q.shape[-1], bool(summary), rel_pos_bias))
    f32 = torch.float32
    if q.numel() == 0:
        return [*_token_grads(q, k is None), q.new_zeros(size, dtype=f32)]
    # Without a window the table has no part in the output.
    dlearned = (q.new_zeros if window_size == 0 else q.new_empty)(size, dtype=f32)
    gluon = gluon and grad.data_ptr() % 16 == 0
    backward = backward_launches(_case(q, k, v, learned, gluon, feat_size, *options), grad.stride())
    workspace = q.new_empty(backward.workspace, dtype=torch.uint8)
    tensors = q, *(q if x is None else x for x in (k, v)), grad, out, kept
    tensors = workspace, *tensors, *[q if x is None else x for x in learned], dlearned
    backward.cells(*tensors)
    # The peak of memory is next: what is read no more has gone.
    grads = _token_grads(q, k is None)
    if backward.zeros is not None:
        workspace[slice(*backward.zeros)].zero_()
    if num_prefix_tokens:
        B, h, _, d = out.shape
        dq_prefix = q.new_empty((B, h, num_prefix_tokens, d), dtype=f32)
        backward.tokens(*tensors, *(grads if k is not None else grads * 3), dq_prefix)
        dq = grads[0] if k is not None else grads[0][0]
        dq[:, :, :num_prefix_tokens] = dq_prefix
    else:
        backward.tokens(*tensors, *(grads if k is not None else grads * 3))
    return [*grads, dlearned]


def _eva_backward_fake(
    grad: torch.Tensor, q: torch.Tensor, k: Optional[torch.Tensor], v: Optional[torch.Tensor], *rest: Any
) -> List[torch.Tensor]:
    summary, rel_pos_bias = rest[3:5]
    size = sum(_learned_sizes(q.shape[-1], bool(summary), rel_pos_bias))
    return [*_token_grads(q, k is None), q.new_empty(size, dtype=torch.float32)]


def _setup_context(ctx: Any, inputs: Tuple[Any, ...], output: Tuple[torch.Tensor, torch.Tensor]) -> None:
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
    q, k, v, rel_pos_bias, out, kept, *summary = ctx.saved_tensors
    feat_size, *options = ctx.options
    if summary[0] is None:
        summary = []
    *tokens, learned = eva_backward(grad, q, k, v, out, kept, feat_size, summary, rel_pos_bias, *options)
    dq, dk, dv = tokens if k is not None else (tokens[0], None, None)
    sizes = _learned_sizes(q.shape[-1], bool(summary), rel_pos_bias)
    like = summary if rel_pos_bias is None else [*summary, rel_pos_bias]
    grads: List[Optional[torch.Tensor]] = []
    for x, p in zip(learned.split_with_sizes(sizes) if sizes else (), like, strict=True):
        x = x if p.dim() == 1 else x.view(p.shape)
        grads.append(x if p.dtype == torch.float32 else x.to(p.dtype))
    if not summary:
        grads = nones[:8] + grads
    if rel_pos_bias is None:
        grads.append(None)
    return dq, dk, dv, None, *grads, *nones[13:]


eva = register_op('eva', _eva, _eva_fake, _setup_context, _autograd_backward)
eva_backward = register_op('eva_backward', _eva_backward, _eva_backward_fake)


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
    table = options.rel_pos_bias.contiguous() if options.rel_pos_bias is not None else None
    save = torch.is_grad_enabled() and any([x is not None and x.requires_grad for x in (*tokens, table, *summary)])
    return eva(
        *(q, k, v, options.feat_size),
        *summary,
        *(table, noise, options.window_size, options.partition_grid, options.count_cells),
        *(options.num_prefix_tokens, options.scale, options.proposal_scale, options.norm_eps, save, gluon),
    )[0]
