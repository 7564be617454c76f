"""Argument checks of the tensor functions, in one place, with messages that name the value and the remedy."""

from typing import List, Optional, Tuple

import torch

__all__ = [
    'check_bias',
    'check_chunks',
    'check_dropout',
    'check_eva_1d_args',
    'check_eva_args',
    'check_eva_variant_args',
    'check_grid',
    'check_partition',
    'check_tokens',
    'check_whole',
]


def _shape(x: torch.Tensor) -> str:
    return str(list(x.shape))


def check_grid(feat_size: List[int]) -> None:
    """The grid is two positive numbers."""
    if len(feat_size) != 2:
        raise ValueError(f'feat_size must be (height, width) in tokens, got {feat_size}')
    if feat_size[0] < 1 or feat_size[1] < 1:
        raise ValueError(f'feat_size ({feat_size[0]}, {feat_size[1]}): both must be at least 1')


def check_tokens(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, feat_size: List[int]) -> None:
    """q, k, v are `(B, h, N, d)` of one shape, dtype and device, and N = H·W."""
    if q.dim() != 4:
        raise ValueError(f'q must be (batch, heads, tokens, head_dim), got shape {_shape(q)}')
    if k.shape != q.shape or v.shape != q.shape:
        raise ValueError(f'q, k and v must have one shape, got {_shape(q)}, {_shape(k)} and {_shape(v)}')
    if k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(f'q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}')
    if not q.is_floating_point():
        raise ValueError(f'q, k and v must be floating point, got {q.dtype}')
    check_grid(feat_size)
    H, W = feat_size[0], feat_size[1]
    if q.shape[2] != H * W:
        raise ValueError(f'feat_size ({H}, {W}) does not hold the {q.shape[2]} tokens of q')


def check_partition(window_size: int, partition_grid: int) -> None:
    """A query must see something: a window, cells, or both."""
    if window_size < 0:
        raise ValueError(f'window_size must be 0 (no window) or more, got {window_size}')
    if partition_grid < 0:
        raise ValueError(f'partition_grid must be 0 (no cells) or more, got {partition_grid}')
    if window_size == 0 and partition_grid == 0:
        raise ValueError('window_size 0 and partition_grid 0 leave a query nothing to attend to; set one of them')


def check_dropout(dropout_p: float) -> None:
    """A dropout probability is at least 0 and below 1."""
    if dropout_p < 0.0 or dropout_p >= 1.0:
        raise ValueError(f'dropout_p must be at least 0 and below 1, got {dropout_p}')


def check_bias(num_heads: int, window_size: int, rel_pos_bias: Optional[torch.Tensor]) -> None:
    """A relative position bias is `(h, window_size², window_size²)`."""
    if rel_pos_bias is not None:
        area = window_size * window_size
        if list(rel_pos_bias.shape) != [num_heads, area, area]:
            raise ValueError(
                f'rel_pos_bias must be (heads, window_size², window_size²) = ({num_heads}, {area}, '
                f'{area}), got {_shape(rel_pos_bias)}'
            )


def check_eva_args(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    feat_size: List[int],
    summary_q: Optional[Tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]],
    summary_k: Optional[Tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]],
    rel_pos_bias: Optional[torch.Tensor],
    noise: Optional[torch.Tensor],
    window_size: int,
    partition_grid: int,
    num_cells: int,
    dropout_p: float,
) -> None:
    """Checks of `evavit.ops.eva_attention`; raises ValueError."""
    check_tokens(q, k, v, feat_size)
    B, h, d = q.shape[0], q.shape[1], q.shape[3]
    if partition_grid > 0:
        if summary_q is None or summary_k is None:
            raise ValueError(f'partition_grid {partition_grid} needs summary_q and summary_k; got None')
        for name, summary in (('summary_q', summary_q), ('summary_k', summary_k)):
            weight, bias, norm_weight, norm_bias = summary
            if (
                list(weight.shape) != [d, d]
                or list(bias.shape) != [d]
                or list(norm_weight.shape) != [d]
                or list(norm_bias.shape) != [d]
            ):
                raise ValueError(
                    f'{name} must hold a ({d}, {d}) weight and three vectors of {d} for head_dim {d}, got '
                    f'{_shape(weight)}, {_shape(bias)}, {_shape(norm_weight)} and {_shape(norm_bias)}'
                )
        if noise is not None and list(noise.shape) != [B, h, num_cells, d]:
            raise ValueError(
                f'noise must be (batch, heads, cells, head_dim) = ({B}, {h}, {num_cells}, {d}), got {_shape(noise)}'
            )
    if rel_pos_bias is not None and rel_pos_bias.dim() == 2:
        places = (2 * window_size - 1) * (2 * window_size - 1)
        if list(rel_pos_bias.shape) != [places, h]:
            raise ValueError(
                f'rel_pos_bias, as a table, must be ((2·window_size - 1)², heads) = ({places}, {h}), got '
                f'{_shape(rel_pos_bias)}'
            )
    else:
        check_bias(h, window_size, rel_pos_bias)
    check_dropout(dropout_p)


def check_whole(name: str, value: int, least: int) -> None:
    """A layer's option is a whole number of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f'{name} must be a whole number of at least {least}, got {value!r}')


def _check_summary(name: str, summary: List[torch.Tensor], d: int) -> None:
    fits = len(summary) == 0 or len(summary) == 2 or len(summary) == 4
    for i, tensor in enumerate(summary):
        fits = fits and list(tensor.shape) == ([d, d] if i == 0 else [d])
    if not fits:
        raise ValueError(
            f'{name} must hold no tensor, a ({d}, {d}) weight and a vector of {d}, or these and two more '
            f'vectors for head_dim {d}, got {[list(tensor.shape) for tensor in summary]}'
        )


def check_eva_variant_args(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    feat_size: List[int],
    summary_q: Optional[List[torch.Tensor]],
    summary_k: Optional[List[torch.Tensor]],
    rel_pos_bias: Optional[torch.Tensor],
    window_size: int,
    partition_grid: int,
    num_cells: int,
    partition: str,
    proposal: str,
    proposal_mean: Optional[torch.Tensor],
    halo: int,
    noise: Optional[torch.Tensor],
    noise_std: float,
    dropout_p: float,
) -> None:
    """Checks of `evavit.ops.eva_attention_variant`; raises ValueError."""
    check_tokens(q, k, v, feat_size)
    B, h, d = q.shape[0], q.shape[1], q.shape[3]
    if partition not in ('all', 'complement'):
        raise ValueError(f"partition must be 'all' or 'complement', got '{partition}'")
    if proposal not in ('qk', 'q', 'zero', 'learned'):
        raise ValueError(f"proposal must be 'qk', 'q', 'zero' or 'learned', got '{proposal}'")
    if halo > 0 and window_size == 0:
        raise ValueError('overlap needs windows; got window_size 0')
    if partition_grid > 0:
        if summary_k is None:
            raise ValueError(f'partition_grid {partition_grid} needs summary_k; got None')
        if summary_q is None and proposal in ('qk', 'q'):
            raise ValueError(f"proposal '{proposal}' needs summary_q; got None")
        for name, summary in (('summary_q', summary_q), ('summary_k', summary_k)):
            if summary is not None:
                _check_summary(name, summary, d)
        if proposal == 'learned':
            expected = [h, partition_grid, partition_grid, d]
            if proposal_mean is None:
                raise ValueError(f"proposal 'learned' needs proposal_mean {expected}; got None")
            if list(proposal_mean.shape) != expected:
                raise ValueError(
                    'proposal_mean must be (heads, partition_grid, partition_grid, head_dim) = '
                    f'{expected}, got {_shape(proposal_mean)}'
                )
        if noise is not None:
            if (
                noise.dim() != 5
                or noise.shape[0] not in (1, B)
                or noise.shape[1] not in (1, h)
                or noise.shape[2] not in (1, num_cells)
                or noise.shape[3] < 1
                or noise.shape[4] != d
            ):
                raise ValueError(
                    'noise must be (batch, heads, cells, samples, head_dim) = '
                    f'({B}, {h}, {num_cells}, any, {d}), the first three or 1, got {_shape(noise)}'
                )
            if noise_std <= 0.0 and noise.shape[3] > 1:
                raise ValueError(f'{noise.shape[3]} samples need a noise_std above 0, got {noise_std}')
    if rel_pos_bias is not None:
        area, reach = window_size * window_size, (window_size + 2 * halo) * (window_size + 2 * halo)
        if list(rel_pos_bias.shape) != [h, area, reach]:
            raise ValueError(
                f'rel_pos_bias must be (heads, window_size², (window_size + 2·halo)²) = ({h}, {area}, '
                f'{reach}), got {_shape(rel_pos_bias)}'
            )
    check_dropout(dropout_p)


def check_eva_1d_args(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    summary_q: Optional[List[torch.Tensor]],
    summary_k: Optional[List[torch.Tensor]],
    rel_pos_bias: Optional[torch.Tensor],
    window_size: int,
    cell_size: int,
    causal: bool,
    halo: int,
    key_padding_mask: Optional[torch.Tensor],
    noise: Optional[torch.Tensor],
    dropout_p: float,
) -> None:
    """Checks of `evavit.ops.eva_attention_1d`; raises ValueError."""
    if q.dim() != 4:
        raise ValueError(f'q must be (batch, heads, tokens, head_dim), got shape {_shape(q)}')
    if q.shape[2] < 1:
        raise ValueError(f'a sequence needs a token, got q of shape {_shape(q)}')
    B, h, N, d = q.shape
    check_tokens(q, k, v, [1, N])
    check_chunks(window_size, cell_size, causal, halo > 0)
    if cell_size > 0:
        if summary_q is None or summary_k is None:
            raise ValueError(f'cell_size {cell_size} needs summary_q and summary_k; got None')
        _check_summary('summary_q', summary_q, d)
        _check_summary('summary_k', summary_k, d)
        if noise is not None:
            cells = -(-N // cell_size)
            if (
                noise.dim() != 5
                or noise.shape[0] not in (1, B)
                or noise.shape[1] not in (1, h)
                or noise.shape[2] not in (1, cells)
                or noise.shape[3] != 1
                or noise.shape[4] != d
            ):
                raise ValueError(
                    f'noise must be (batch, heads, cells, 1, head_dim) = ({B}, {h}, {cells}, 1, {d}), '
                    f'the first three or 1, got {_shape(noise)}'
                )
    if rel_pos_bias is not None:
        reach = window_size + halo * (1 if causal else 2)
        if list(rel_pos_bias.shape) != [h, window_size, reach]:
            raise ValueError(
                f'rel_pos_bias must be (heads, window_size, reach) = ({h}, {window_size}, {reach}), got '
                f'{_shape(rel_pos_bias)}'
            )
    if key_padding_mask is not None and (
        list(key_padding_mask.shape) != [B, N] or key_padding_mask.dtype != torch.bool
    ):
        raise ValueError(
            f'key_padding_mask must be bool (batch, tokens) = ({B}, {N}), true where a position is '
            f'padding, got {key_padding_mask.dtype} {_shape(key_padding_mask)}'
        )
    check_dropout(dropout_p)


def check_chunks(window_size: int, cell_size: int, causal: bool, overlap: bool) -> None:
    """Chunks and cells of a sequence: a query must see something, and a causal one every token before it."""
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
