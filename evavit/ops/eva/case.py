"""What travels from EVA's public functions down: the options of a call, and what decides on its backend."""

import operator
from typing import Any, List, NamedTuple, Optional, Tuple

import torch

from evavit.ops.backends import autocast_dtype
from evavit.ops.checks import check_grid, check_int
from evavit.ops.grid import block_counts, cell_shape, static_size

__all__ = [
    'EvaCase',
    'EvaOptions',
    'SequenceOptions',
    'Summary',
    'SummaryTensors',
    'VariantOptions',
    'as_summary',
    'eva_case',
    'eva_num_cells',
]

# A summary as the public functions take it: any tuple in the order of `Summary`.
SummaryTensors = Tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


class Summary(NamedTuple):
    """Parameters of σ in (26), shared by the heads."""

    weight: torch.Tensor  # of the projection, `(d, d)`
    bias: torch.Tensor  # `(d)`
    norm_weight: torch.Tensor  # of the LayerNorm, `(d)`
    norm_bias: torch.Tensor  # `(d)`


class EvaOptions(NamedTuple):
    """A call of `evavit.ops.eva_attention` but for its q, k, v; that function says what each field is."""

    feat_size: List[int]
    summary_q: Optional[Summary]
    summary_k: Optional[Summary]
    rel_pos_bias: Optional[torch.Tensor]
    window_size: int
    partition_grid: int
    scale: float
    proposal_scale: float
    noise: Optional[torch.Tensor]
    dropout_p: float
    norm_eps: float
    count_cells: str
    num_prefix_tokens: int


class VariantOptions(NamedTuple):
    """A call of `evavit.ops.eva_attention_variant` but for its q, k, v; that function says what each field is."""

    feat_size: List[int]
    summary_q: Optional[List[torch.Tensor]]
    summary_k: Optional[List[torch.Tensor]]
    rel_pos_bias: Optional[torch.Tensor]
    window_size: int
    partition_grid: int
    partition: str
    proposal: str
    proposal_mean: Optional[torch.Tensor]
    halo: int  # tokens of context on each side of a window; 0 without overlap
    scale: float
    proposal_scale: float
    noise: Optional[torch.Tensor]
    noise_std: float
    dropout_p: float
    norm_eps: float
    count_cells: str


class SequenceOptions(NamedTuple):
    """A call of `evavit.ops.eva_attention_1d` but for its q, k, v; that function says what each field is."""

    summary_q: Optional[List[torch.Tensor]]
    summary_k: Optional[List[torch.Tensor]]
    rel_pos_bias: Optional[torch.Tensor]
    window_size: int
    cell_size: int
    causal: bool
    halo: int  # tokens of context on each side of a chunk; 0 without overlap
    key_padding_mask: Optional[torch.Tensor]
    scale: float
    proposal_scale: float
    noise: Optional[torch.Tensor]
    dropout_p: float
    norm_eps: float


class EvaCase(NamedTuple):
    """What a backend of EVA is asked about."""

    device: torch.device
    dtype: torch.dtype  # of the products: autocast's under autocast
    head_dim: int
    window_size: int
    partition_grid: int
    feat_size: Optional[Tuple[int, int]] = None  # None for any grid that windows and cells divide
    dropout: bool = False  # of attention weights
    noise_grad: bool = False  # whether the noise wants a gradient
    variant: bool = False  # whether it is one of the ablations of `eva_attention_variant`
    count_cells: str = 'one'
    num_prefix_tokens: int = 0


def as_summary(summary: Optional[SummaryTensors]) -> Optional[Summary]:
    """A summary by names; raises ValueError unless there are four tensors."""
    if summary is None:
        return None
    if len(summary) != 4:
        raise ValueError(f'a summary is (weight, bias, norm_weight, norm_bias), four tensors; got {len(summary)}')
    return Summary(summary[0], summary[1], summary[2], summary[3])


def eva_num_cells(feat_size: List[int], partition_grid: int) -> int:
    """Number of cells C_p on a grid of `feat_size` (H, W) tokens; at most `partition_grid`², and none for 0."""
    check_int('partition_grid', partition_grid)
    if partition_grid < 0:
        raise ValueError(f'partition_grid must be 0 (no cells) or more, got {partition_grid}')
    if partition_grid == 0:
        return 0
    feat_size = static_size(feat_size)
    check_grid(feat_size)
    rows, cols = block_counts(feat_size, cell_shape(feat_size, partition_grid))
    return rows * cols


def eva_case(x: torch.Tensor, head_dim: int, options: EvaOptions) -> Tuple[Any, ...]:
    """The fields of `EvaCase` for tokens x with these options, which are no variant."""
    # torch.compile may pass symbolic numbers; index() and the comparison turn them into constants.
    index, noise = operator.index, options.noise
    return (
        x.device,
        autocast_dtype(x),
        index(head_dim),
        index(options.window_size),
        index(options.partition_grid),
        (options.feat_size[0], options.feat_size[1]),
        True if options.dropout_p > 0.0 else False,  # noqa: SIM210
        noise is not None and noise.requires_grad,
        False,
        options.count_cells,
        index(options.num_prefix_tokens),
    )
