"""Checks of EVA's arguments: ValueErrors of one line that name the value and the remedy."""

from typing import List, Optional

import torch

from evavit.ops.checks import (
    check_bias_table,
    check_count_of_tokens,
    check_dropout,
    check_int,
    check_number,
    check_tensor,
    check_tokens,
    shape_of,
)

from .case import EvaOptions, SequenceOptions, Summary, VariantOptions, eva_num_cells

__all__ = [
    'check_chunks',
    'check_count',
    'check_count_of_tokens',
    'check_eva_options',
    'check_four',
    'check_packed_tokens',
    'check_partition',
    'check_sequence',
    'check_tokens',
    'check_variant',
    'softmax_scale',
]


def softmax_scale(scale: Optional[float], q: torch.Tensor) -> float:
    """The scale s of an argument that may be None: d^(-½) then, of queries `(…, d)`."""
    check_tensor('q', q)
    head_dim = q.shape[-1]
    if head_dim < 1:
        raise ValueError(f'head_dim must be at least 1, got {head_dim}')
    if scale is None:
        return head_dim**-0.5
    check_number('scale', scale, above_zero=True)
    return scale


def check_count(count_cells: str) -> None:
    """How a cell counts in the softmax."""
    if count_cells not in ('one', 'all', 'outside'):
        raise ValueError(f"count_cells must be 'one', 'all' or 'outside', got '{count_cells}'")


def check_partition(window_size: int, partition_grid: int) -> None:
    """Sizes are whole numbers, and a query must see something: a window, cells, or both."""
    check_int('window_size', window_size)
    check_int('partition_grid', partition_grid)
    if window_size < 0:
        raise ValueError(f'window_size must be 0 (no window) or more, got {window_size}')
    if partition_grid < 0:
        raise ValueError(f'partition_grid must be 0 (no cells) or more, got {partition_grid}')
    if window_size == 0 and partition_grid == 0:
        raise ValueError('window_size 0 and partition_grid 0 leave a query nothing to attend to; set one of them')


def check_packed_tokens(qkv: torch.Tensor, feat_size: List[int], num_prefix_tokens: int = 0) -> None:
    """qkv is `(3, B, h, P + N, d)`, floating point, and N = H·W."""
    check_tensor('qkv', qkv)
    if qkv.dim() != 5 or qkv.shape[0] != 3:
        raise ValueError(f'qkv must be (3, batch, heads, tokens, head_dim), got shape {shape_of(qkv)}')
    if not qkv.is_floating_point():
        raise ValueError(f'qkv must be floating point, got {qkv.dtype}')
    check_count_of_tokens('qkv', qkv.shape[3], feat_size, num_prefix_tokens)


def check_four(name: str, summary: Summary, d: int) -> None:
    """A summary's weight, bias and the two vectors of its norm fit the head dim."""
    weight, bias, norm_weight, norm_bias = summary
    if not torch.jit.is_scripting():  # noqa: SIM102, TorchScript skips this block, but not a longer condition
        if weight.shape == (d, d) and bias.shape == norm_weight.shape == norm_bias.shape == (d,):
            return  # without the time that lists take
    if (
        list(weight.shape) != [d, d]
        or list(bias.shape) != [d]
        or list(norm_weight.shape) != [d]
        or list(norm_bias.shape) != [d]
    ):
        raise ValueError(
            f'{name} must hold a ({d}, {d}) weight and three vectors of {d} for head_dim {d}, got '
            f'{shape_of(weight)}, {shape_of(bias)}, {shape_of(norm_weight)} and {shape_of(norm_bias)}'
        )


def check_eva_options(batch: int, heads: int, head_dim: int, options: EvaOptions) -> None:
    """Options of `evavit.ops.eva_attention` for `(batch, heads, N, head_dim)`; raises ValueError."""
    summary_q, summary_k, noise = options.summary_q, options.summary_k, options.noise
    if options.partition_grid > 0:
        if summary_q is None or summary_k is None:
            raise ValueError(f'partition_grid {options.partition_grid} needs summary_q and summary_k; got None')
        check_four('summary_q', summary_q, head_dim)
        check_four('summary_k', summary_k, head_dim)
        if noise is not None:
            cells = eva_num_cells(options.feat_size, options.partition_grid)
            if list(noise.shape) != [batch, heads, cells, head_dim]:
                raise ValueError(
                    f'noise must be (batch, heads, cells, head_dim) = ({batch}, {heads}, {cells}, {head_dim}), got '
                    f'{shape_of(noise)}'
                )
    check_bias_table(heads, options.window_size, options.rel_pos_bias)
    check_number('proposal_scale', options.proposal_scale)
    check_number('norm_eps', options.norm_eps, above_zero=True)
    check_dropout(options.dropout_p)
    check_count(options.count_cells)


def _check_summary(name: str, summary: List[torch.Tensor], d: int) -> None:
    fits = len(summary) == 0 or len(summary) == 2 or len(summary) == 4
    for i, tensor in enumerate(summary):
        fits = fits and list(tensor.shape) == ([d, d] if i == 0 else [d])
    if not fits:
        raise ValueError(
            f'{name} must hold no tensor, a ({d}, {d}) weight and a vector of {d}, or these and two more '
            f'vectors for head_dim {d}, got {[list(tensor.shape) for tensor in summary]}'
        )


def check_variant(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: VariantOptions) -> None:
    """Checks of `evavit.ops.eva_attention_variant`; raises ValueError."""
    check_tokens(q, k, v, options.feat_size)
    B, h, d = q.shape[0], q.shape[1], q.shape[3]
    partition_grid, proposal, noise = options.partition_grid, options.proposal, options.noise
    summary_q, summary_k, proposal_mean = options.summary_q, options.summary_k, options.proposal_mean
    if options.partition not in ('all', 'complement'):
        raise ValueError(f"partition must be 'all' or 'complement', got '{options.partition}'")
    if proposal not in ('qk', 'q', 'zero', 'learned'):
        raise ValueError(f"proposal must be 'qk', 'q', 'zero' or 'learned', got '{proposal}'")
    if options.halo > 0 and options.window_size == 0:
        raise ValueError('overlap needs windows; got window_size 0')
    if partition_grid > 0:
        if summary_k is None:
            raise ValueError(f'partition_grid {partition_grid} needs summary_k; got None')
        if summary_q is None and proposal in ('qk', 'q'):
            raise ValueError(f"proposal '{proposal}' needs summary_q; got None")
        if summary_q is not None:
            _check_summary('summary_q', summary_q, d)
        _check_summary('summary_k', summary_k, d)
        if proposal == 'learned':
            expected = [h, partition_grid, partition_grid, d]
            if proposal_mean is None:
                raise ValueError(f"proposal 'learned' needs proposal_mean {expected}; got None")
            if list(proposal_mean.shape) != expected:
                raise ValueError(
                    'proposal_mean must be (heads, partition_grid, partition_grid, head_dim) = '
                    f'{expected}, got {shape_of(proposal_mean)}'
                )
        if noise is not None:
            cells = eva_num_cells(options.feat_size, partition_grid)
            if not _broadcasts(noise, B, h, cells, d) or noise.shape[3] < 1:
                raise ValueError(
                    'noise must be (batch, heads, cells, samples, head_dim) = '
                    f'({B}, {h}, {cells}, any, {d}), the first three or 1, got {shape_of(noise)}'
                )
            if options.noise_std <= 0.0 and noise.shape[3] > 1:
                raise ValueError(f'{noise.shape[3]} samples need a noise_std above 0, got {options.noise_std}')
    check_bias_table(h, options.window_size, options.rel_pos_bias, options.halo)
    check_number('proposal_scale', options.proposal_scale)
    check_number('noise_std', options.noise_std)
    check_number('norm_eps', options.norm_eps, above_zero=True)
    check_dropout(options.dropout_p)
    check_count(options.count_cells)


def _broadcasts(noise: torch.Tensor, B: int, h: int, cells: int, d: int) -> bool:
    """Whether noise broadcasts to `(B, h, cells, its samples, d)`, the first three axes alone."""
    return (
        noise.dim() == 5
        and noise.shape[0] in (1, B)
        and noise.shape[1] in (1, h)
        and noise.shape[2] in (1, cells)
        and noise.shape[4] == d
    )


def check_sequence(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: SequenceOptions) -> None:
    """Checks of `evavit.ops.eva_attention_1d`; raises ValueError."""
    if q.dim() != 4:
        raise ValueError(f'q must be (batch, heads, tokens, head_dim), got shape {shape_of(q)}')
    if q.shape[2] < 1:
        raise ValueError(f'a sequence needs a token, got q of shape {shape_of(q)}')
    B, h, N, d = q.shape
    window_size, cell_size, halo, noise = options.window_size, options.cell_size, options.halo, options.noise
    rel_pos_bias, key_padding_mask = options.rel_pos_bias, options.key_padding_mask
    check_tokens(q, k, v, [1, N])
    check_chunks(window_size, cell_size, options.causal, halo > 0)
    if cell_size > 0:
        if options.summary_q is None or options.summary_k is None:
            raise ValueError(f'cell_size {cell_size} needs summary_q and summary_k; got None')
        _check_summary('summary_q', options.summary_q, d)
        _check_summary('summary_k', options.summary_k, d)
        if noise is not None:
            cells = -(-N // cell_size)
            if not _broadcasts(noise, B, h, cells, d) or noise.shape[3] != 1:
                raise ValueError(
                    f'noise must be (batch, heads, cells, 1, head_dim) = ({B}, {h}, {cells}, 1, {d}), '
                    f'the first three or 1, got {shape_of(noise)}'
                )
    if rel_pos_bias is not None:
        reach = window_size + halo * (1 if options.causal else 2)
        if list(rel_pos_bias.shape) != [h, window_size, reach]:
            raise ValueError(
                f'rel_pos_bias must be (heads, window_size, reach) = ({h}, {window_size}, {reach}), got '
                f'{shape_of(rel_pos_bias)}'
            )
    if key_padding_mask is not None and (
        list(key_padding_mask.shape) != [B, N] or key_padding_mask.dtype != torch.bool
    ):
        raise ValueError(
            f'key_padding_mask must be bool (batch, tokens) = ({B}, {N}), true where a position is '
            f'padding, got {key_padding_mask.dtype} {shape_of(key_padding_mask)}'
        )
    check_number('proposal_scale', options.proposal_scale)
    check_number('norm_eps', options.norm_eps, above_zero=True)
    check_dropout(options.dropout_p)


def check_chunks(window_size: int, cell_size: int, causal: bool, overlap: bool) -> None:
    """Chunks and cells of a sequence: a query must see something, and a causal one every token before it."""
    check_int('window_size', window_size)
    check_int('cell_size', cell_size)
    if window_size < 0:
        raise ValueError(f'window_size must be 0 (no chunks) or more, got {window_size}')
    if cell_size < 0:
        raise ValueError(f'cell_size must be 0 (no cells) or more, got {cell_size}')
    if window_size == 0 and (causal or overlap or cell_size == 0):
        raise ValueError(
            'window_size 0 leaves a causal query, overlapping chunks or no cells nothing to attend to; set it'
        )
    if causal and cell_size > 0 and window_size % cell_size != 0:
        raise ValueError(
            f'causal cells must divide a chunk: cell_size {cell_size} does not divide window_size {window_size}'
        )
