"""The operators evavit::eva and evavit::eva_backward.

Their schemas hold tensors and numbers one by one, which PyTorch asks for; a packed call has no k and v. Above them,
`eva_attention_fused` takes what all backends of EVA take.
"""

from typing import Any, List, Optional, Sequence, Tuple

import torch

from evavit.ops.common.launch import register_op
from evavit.ops.eva.case import EvaOptions

from .launches import Case, backward_launches, forward_launches, keep

__all__ = ['eva_attention_fused']


def _shape(q: torch.Tensor, packed: bool, num_heads: int) -> Tuple[int, int, int, int]:
    """(B, h, P + N, d)."""
    if num_heads:
        B, T, C = q.shape
        return B, num_heads, T, C // (3 * num_heads)
    B, h, T, d = q.shape[1:] if packed else q.shape
    return B, h, T, d


def _heads_apart(grad: torch.Tensor, num_heads: int) -> Tuple[int, ...]:
    """The strides of y or its gradient as of `(B, h, P + N, d)`."""
    if not num_heads:
        return grad.stride()
    sb, sn, sd = grad.stride()
    return sb, grad.shape[-1] // num_heads * sd, sn, sd


def _case(
    tokens: Tuple[torch.Tensor, Optional[torch.Tensor], Optional[torch.Tensor]],
    learned: Sequence[Optional[torch.Tensor]],
    gluon: bool,
    feat_size: List[int],
    num_heads: int,
    *options: Any,
) -> Case:
    q, k, v = tokens
    shape, strides, addresses, apart = _shape(q, k is None, num_heads), q.stride(), q.data_ptr(), None
    if k is not None and v is not None:
        strides += k.stride() + v.stride()
        addresses |= k.data_ptr() | v.data_ptr()
    elif num_heads:
        sb, sn, sd = strides
        apart, strides = num_heads * shape[3] * sd, (sb, shape[3] * sd, sn, sd) * 3
    else:
        apart, strides = strides[0], strides[1:] * 3
    if gluon and (addresses | (apart or 0) * q.itemsize) % 16:
        gluon = False
    dtypes = tuple([None if x is None else x.dtype for x in learned])
    sizes = shape, strides, apart, q.dtype, q.get_device(), tuple(feat_size)
    return Case._make((*sizes, *options, dtypes, gluon))


def _output(q: torch.Tensor, packed: bool, num_heads: int) -> torch.Tensor:
    """An empty y, in memory `(B, P + N, h, d)`."""
    B, h, T, d = _shape(q, packed, num_heads)
    if num_heads:
        return q.new_empty((B, T, h * d))
    return q.new_empty_strided((B, h, T, d), (T * h * d, d, h * d, 1))


def _eva(
    q: torch.Tensor,
    k: Optional[torch.Tensor],
    v: Optional[torch.Tensor],
    num_heads: int,
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
    """Forward: y, and what `Kept` says, uint8; with `save` for a backward.

    q, k, v are `(B, h, P + N, d)`, as y. Or q is all three and k and v are None: then their gradient comes back in one
    piece too, which spares a copy of it. Such a q is `(3, B, h, P + N, d)` and num_heads is 0; or it is a projection
    `(B, P + N, 3·h·d)` with this num_heads, and y is `(B, P + N, h·d)`. The summaries' parameters come one by one,
    since autograd takes a list of tensors apart and together in Python. `gluon` lets the kernels in Gluon run where
    they take these tensors.
    """
    learned = w_q, b_q, g_q, o_q, w_k, b_k, g_k, o_k, rel_pos_bias
    options = window_size, partition_grid, count_cells, num_prefix_tokens, scale, proposal_scale, norm_eps
    out = _output(q, k is None, num_heads)
    if out.numel() == 0:
        return out, q.new_empty(0, dtype=torch.uint8)
    case = _case((q, k, v), learned, gluon, feat_size, num_heads, *options)
    run, size = forward_launches(case, None if noise is None else noise.dtype, save)
    kept = q.new_empty(size, dtype=torch.uint8)
    run(*[q if x is None else x for x in (q, k, v, *learned, noise)], out, kept)
    return out, kept


def _eva_fake(
    q: torch.Tensor, k: Optional[torch.Tensor], v: Optional[torch.Tensor], num_heads: int, *rest: Any
) -> Tuple[torch.Tensor, torch.Tensor]:
    feat_size, *_, table, _noise, window_size, partition_grid, _count, num_prefix_tokens = rest[:15]
    sizes = feat_size, window_size, partition_grid, num_prefix_tokens, table is not None, rest[-2]
    size = keep(_shape(q, k is None, num_heads), q.dtype, *sizes).size if q.numel() > 0 else 0
    return _output(q, k is None, num_heads), q.new_empty(size, dtype=torch.uint8)


def _token_grads(q: torch.Tensor, packed: bool, num_heads: int) -> List[torch.Tensor]:
    """Empty gradients of q, k and v; one of a q that is all three, in memory `(B, P + N, 3, h, d)`."""
    if num_heads:
        return [q.new_empty(q.shape)]
    if not packed:
        return [_output(q, False, 0) for _ in range(3)]
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
    num_heads: int,
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
    learned: Tuple[Optional[torch.Tensor], ...] = *(summary or (None,) * 8), rel_pos_bias
    options = window_size, partition_grid, count_cells, num_prefix_tokens, scale, proposal_scale, norm_eps
    packed, f32 = k is None, torch.float32
    B, h, _, d = _shape(q, packed, num_heads)
    size = sum(_learned_sizes(d, bool(summary), rel_pos_bias))
    if q.numel() == 0:
        return [*_token_grads(q, packed, num_heads), q.new_zeros(size, dtype=f32)]
    # Without a window the table has no part in the output.
    dlearned = (q.new_zeros if window_size == 0 else q.new_empty)(size, dtype=f32)
    case = _case((q, k, v), learned, gluon and grad.data_ptr() % 16 == 0, feat_size, num_heads, *options)
    backward = backward_launches(case, _heads_apart(grad, num_heads))
    workspace = q.new_empty(backward.workspace, dtype=torch.uint8)
    read = [q if x is None else x for x in (q, k, v, grad, out, kept, *learned)]
    backward.cells(workspace, *read, dlearned)
    # The peak of memory is next: what is read no more has gone.
    grads = _token_grads(q, packed, num_heads)
    if backward.zeros is not None:
        workspace[slice(*backward.zeros)].zero_()
    dq_prefix = [q.new_empty((B, h, num_prefix_tokens, d), dtype=f32)] if num_prefix_tokens else []
    backward.tokens(workspace, *read, dlearned, *(grads * 3 if packed else grads), *dq_prefix)
    if num_prefix_tokens:
        dq = grads[0]
        if num_heads:
            dq = dq.unflatten(-1, [3, h, d]).permute(2, 0, 3, 1, 4)
        (dq[0] if packed else dq)[:, :, :num_prefix_tokens] = dq_prefix[0]
    return [*grads, dlearned]


def _eva_backward_fake(
    grad: torch.Tensor, q: torch.Tensor, k: Optional[torch.Tensor], v: Optional[torch.Tensor], *rest: Any
) -> List[torch.Tensor]:
    _out, _kept, num_heads, _feat_size, summary, rel_pos_bias = rest[:6]
    size = sum(_learned_sizes(_shape(q, k is None, num_heads)[3], bool(summary), rel_pos_bias))
    return [*_token_grads(q, k is None, num_heads), q.new_empty(size, dtype=torch.float32)]


def _setup_context(ctx: Any, inputs: Tuple[Any, ...], output: Tuple[torch.Tensor, torch.Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:3], *output, *inputs[5:14])
    *options, save, gluon = inputs[15:]
    ctx.saved, ctx.options = save, (*inputs[3:5], *options, gluon)


def _autograd_backward(ctx: Any, grad: Optional[torch.Tensor], *_: Any) -> Tuple[Optional[torch.Tensor], ...]:
    if grad is None:
        return (None,) * 24
    if not ctx.saved:
        raise RuntimeError('the fused EVA ran without keeping what its backward needs; this is a fault of evavit')
    q, k, v, out, kept, *summary, table = ctx.saved_tensors
    num_heads, feat_size, *options = ctx.options
    if summary[0] is None:
        summary = []
    *dtokens, learned = eva_backward(grad, q, k, v, out, kept, num_heads, feat_size, summary, table, *options)
    like = summary if table is None else [*summary, table]
    sizes = _learned_sizes(_shape(q, k is None, num_heads)[3], bool(summary), table)
    grads: List[Optional[torch.Tensor]] = []
    for x, p in zip(learned.split_with_sizes(sizes) if sizes else (), like, strict=True):
        x = x if p.dim() == 1 else x.view(p.shape)
        grads.append(x if p.dtype == torch.float32 else x.to(p.dtype))
    if k is None:
        dtokens += None, None
    if table is None:
        grads.append(None)
    # Behind the tokens' three num_heads and feat_size, and behind the table's the noise and the options.
    return *dtokens, None, None, *(() if summary else (None,) * 8), *grads, *(None,) * 10


eva = register_op('eva', _eva, _eva_fake, _setup_context, _autograd_backward)
eva_backward = register_op('eva_backward', _eva_backward, _eva_backward_fake)


def eva_attention_fused(
    tokens: Tuple[torch.Tensor, ...], options: EvaOptions, gluon: bool, num_heads: int = 0
) -> torch.Tensor:
    """`evavit.ops.eva_attention` without dropout, by the kernels; arguments have been checked.

    Args:
        tokens: q, k, v `(B, h, P + N, d)`, or one tensor with all three, `(3, B, h, P + N, d)`, or with num_heads
            `(B, P + N, 3·h·d)`; then the output is `(B, P + N, h·d)`.
        options: Of the call.
        gluon: Whether the kernels in Gluon run where they take these tensors.
        num_heads: h, where the heads are not an axis of their own.
    """
    q, k, v = tokens if len(tokens) == 3 else (tokens[0], None, None)
    summary: List[Optional[torch.Tensor]] = [None] * 8
    noise = None
    if options.partition_grid > 0 and options.summary_q is not None and options.summary_k is not None:
        summary = [x.contiguous() for x in (*options.summary_q, *options.summary_k)]
        noise = options.noise.contiguous() if options.noise is not None else None
    table = options.rel_pos_bias.contiguous() if options.rel_pos_bias is not None else None
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (*tokens, table, *summary))
    return eva(
        *(q, k, v, num_heads, options.feat_size),
        *summary,
        *(table, noise, options.window_size, options.partition_grid, options.count_cells),
        *(options.num_prefix_tokens, options.scale, options.proposal_scale, options.norm_eps, save, gluon),
    )[0]
