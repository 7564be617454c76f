"""EVA: exact attention inside a query's window, one key and one control variate per cell of the grid elsewhere.

Paper: `Efficient Attention via Control Variates`, Zheng et al., ICLR 2023 - https://arxiv.org/abs/2302.04542
"""

import logging
from typing import Any, Final, List, Optional, Tuple, Union

import torch
import torch.nn.functional as F
from timm.layers import RelPosBias, register_notrace_module, trunc_normal_, use_fused_attn
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from evavit.ops import (
    eva_attention,
    eva_attention_mass,
    eva_attention_packed,
    eva_attention_variant,
    eva_num_cells,
    halo_size,
)
from evavit.ops.backends import autocast_dtype
from evavit.ops.checks import check_int, check_number
from evavit.ops.eva import EVA, eva_attention_projected
from evavit.ops.eva.case import EvaCase, EvaOptions, SummaryTensors, as_summary
from evavit.ops.eva.checks import check_partition
from evavit.ops.grid import accumulation_dtype, static_size

from .attention import GridAttention, check_flags
from .mlp import is_hooked

__all__ = ['EvaAttention', 'HaloRelPosBias', 'eva_layer_case']

_logger = logging.getLogger(__name__)


class _HeldLinear(nn.Linear):
    """A Linear that stays in floating point: `quantize_dynamic` exchanges nn.Linear alone."""


_PLAIN = frozenset((_HeldLinear, nn.Linear, nn.LayerNorm))
_EPS = 1e-5  # of the LayerNorms that the operators apply
_PROBE = 256.0  # length of the rows that a projection is tried on


def _own(module: nn.Module, name: str) -> Any:
    """A parameter of a module, without the search of `nn.Module.__getattr__` where it is one of its own."""
    found = module._parameters.get(name)
    return getattr(module, name) if found is None else found


def _is_plain(module: nn.Module) -> bool:
    """Whether a module is a weight and a bias and nothing else: no adapter, no hook, no quantized or computed weight,
    no other eps."""
    if type(module) not in _PLAIN or is_hooked(module) or module.__dict__.get('eps', _EPS) != _EPS:
        return False
    weight = _own(module, 'weight')
    if weight is None or _own(module, 'bias') is None:
        return False
    return type(weight) is nn.Parameter or not is_traceable_wrapper_subclass(weight)


def _eps(norm: nn.Module) -> float:
    """That of a LayerNorm, in a wrapper or not. ValueError where there is none: the operators apply nothing else."""
    found = {module.eps for module in norm.modules() if isinstance(module, nn.LayerNorm)}
    if len(found) != 1 or min(found) <= 0:
        raise ValueError(f'the norm of a summary must be a LayerNorm with an eps above 0, got {norm}')
    return min(found)


class Summary(nn.Module):
    """σ of Equation (26): what turns a cell's mean into its summary. `forward()` gives the parameters.

    `evavit.ops.eva_attention` applies them to the means that it makes. Whatever stands in the place of `proj` counts as
    it computes: an adapter, a pruned, quantized or hooked Linear is called on the rows of the identity and on zero,
    which gives its weight and bias with their gradients, in one product of d × d. It has to be affine. Dropout in front
    of an adapter drops its input channels, the same for all cells of a call. In the place of `norm` stands a LayerNorm,
    of any eps, or one in a wrapper that scales and shifts each channel by itself.

    Args:
        head_dim: Channels of a head.
        kind: 'linear_ln' for a projection and LayerNorm (four tensors), 'linear' for the projection (two), 'identity'
            (none).
    """

    def __init__(
        self,
        head_dim: int,
        kind: str = 'linear_ln',
        device: Optional[torch.device] = None,
        dtype: Optional[torch.dtype] = None,
    ) -> None:
        super().__init__()
        dd: Any = {'device': device, 'dtype': dtype}
        self.head_dim = head_dim
        self.proj = _HeldLinear(head_dim, head_dim, **dd) if kind != 'identity' else None
        self.norm = nn.LayerNorm(head_dim, **dd) if kind == 'linear_ln' else None

    def forward(self) -> List[torch.Tensor]:
        if not torch.jit.is_scripting():
            return self._now()
        parameters: List[torch.Tensor] = []
        if self.proj is not None:
            parameters += [self.proj.weight, self.proj.bias]
        if self.norm is not None:
            if self.norm.eps != 1e-5:  # as in `_effective`
                parameters = [(1e-5 / self.norm.eps) ** 0.5 * parameter for parameter in parameters]
            parameters += [self.norm.weight, self.norm.bias]
        return parameters

    @torch.jit.unused
    def _now(self) -> List[torch.Tensor]:
        parameters: List[torch.Tensor] = []
        for module in self._modules.values():  # proj and norm, in this order
            if module is not None:
                if not _is_plain(module):
                    return self._effective()
                parameters += _own(module, 'weight'), _own(module, 'bias')
        return parameters

    @torch.jit.unused
    def _effective(self) -> List[torch.Tensor]:
        """The parameters of a projection and a norm that compute what `proj` and `norm` do."""
        like = next((p for p in self.parameters() if p.is_floating_point()), torch.empty(0))
        # Rows so large that a bias beside them does not round the weights away in 16 bits.
        rows = _PROBE * torch.eye(self.head_dim + 1, self.head_dim, dtype=like.dtype, device=like.device)
        parameters: List[torch.Tensor] = []
        with torch.autocast(rows.device.type, enabled=False):
            if self.proj is not None:
                weight, bias = self.proj(rows).split([self.head_dim, 1])
                parameters += [(weight - bias).t() / _PROBE, bias[0]]
            if self.norm is not None:
                if _is_plain(self.norm):
                    return [*parameters, self.norm.weight, self.norm.bias]
                # LN of x with another eps is LN of x · (1e-5 / eps)^½ with 1e-5.
                eps = _eps(self.norm)
                parameters = [(_EPS / eps) ** 0.5 * parameter for parameter in parameters]
                # Two opposite vectors, far from each other.
                signs = 1.0 - 2.0 * (torch.arange(self.head_dim, device=rows.device) % 2).to(rows.dtype)
                rows = 100.0 * torch.stack([signs - signs.mean(), signs.mean() - signs])
                normal = F.layer_norm(rows[0], [self.head_dim], eps=eps)
                up, down = self.norm(rows)
                parameters += [(up - down) / (2 * normal), (up + down) / 2]
        return parameters


class HaloRelPosBias(nn.Module):
    """Table of relative position biases between a window and the same with `halo` tokens of context on every side.

    One row of `relative_position_bias_table` for each offset (dy, dx), query minus key, of 2·(window_size + halo) - 1
    along each axis: with r = window_size + halo, row (dy + r - 1)·(2r - 1) + dx + r - 1. For halo 0 that is the table
    of timm's RelPosBias.

    Args:
        window_size: Side of the windows in tokens.
        halo: Context in tokens.
        num_heads: Heads.
    """

    def __init__(
        self,
        window_size: int,
        halo: int,
        num_heads: int,
        device: Optional[torch.device] = None,
        dtype: Optional[torch.dtype] = None,
    ) -> None:
        super().__init__()
        reach = window_size + halo
        self.window_size = (reach, reach)  # of the window whose table has these rows
        self.relative_position_bias_table = nn.Parameter(
            torch.empty((2 * reach - 1) ** 2, num_heads, device=device, dtype=dtype)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the table."""
        trunc_normal_(self.relative_position_bias_table, std=0.02)


def eva_layer_case(
    layer: GridAttention, window_size: int, partition_grid: int, variant: bool = False, count_cells: str = 'one'
) -> EvaCase:
    """What a layer asks the backends of EVA about: where it is, in its mode, under autocast as it is now."""
    weight = next(layer.parameters(), torch.empty(0))  # quantized or adapted layers may have no `weight`
    dropout = layer.training and layer.attn_drop.p > 0.0
    sizes = layer.head_dim, window_size, partition_grid
    case = EvaCase(weight.device, autocast_dtype(weight), *sizes, dropout=dropout, variant=variant)
    return case._replace(count_cells=count_cells, num_prefix_tokens=layer.num_prefix_tokens)


@register_notrace_module  # torch.fx keeps it as one node: windows and cells follow the size of the grid
class EvaAttention(GridAttention):
    """Multi-head EVA on tokens `(B, P + N, C)` and their grid, `forward(x, feat_size)`; see `evavit.ops.eva_attention`.

    Time and memory grow linearly with N. In training, the noise ε of the proposal comes from the default generator of
    the input's device, so a seed reproduces it; evaluation is deterministic.

    Fused CUDA kernels run where they can (`evavit.ops.eva_backend`), unless timm's switch is off when the layer is
    made (`timm.layers.set_fused_attn(False)`, or TIMM_FUSED_ATTN=0 in the environment) or the layer's `fused_attn` is
    set to False. They have no dropout of attention weights: with attn_drop, training takes the plain path, and a log
    line says so. `backend` names the code that runs, and `extra_repr` why no faster one does.

    The ablations, the arguments from `partition` to `overlap`, run in plain PyTorch:
    `evavit.ops.eva_attention_variant`.

    Args:
        dim: Channels C.
        num_heads: Heads h; must divide dim.
        window_size: Side of the windows in tokens (the set E); 0 for no window.
        partition_grid: Cells asked for along each axis; 0 for no cells. The layer then has no summaries.
        proposal_scale: Factor of the proposal's mean; ½ evaluates weights of the published implementation.
        noise_std: Standard deviation of the proposal's noise in training; 0 for none. The published implementation
            has head_dim^(-¼) in these units.
        rel_pos_bias: Learned relative position bias inside the window.
        partition: Ablation (Table 8): 'all' for cells over all tokens, 'complement' for those outside a query's E.
        summary: Ablation (Table 8): σ is 'linear_ln', 'linear' or 'identity'.
        num_samples: Ablation (Table 8): samples S of the proposal in each cell. With more than one, β depends on the
            query. In evaluation the ε of several samples are fixed: S draws of the generator with seed 0, less their
            mean, times √(S / (S - 1)). (With one sample that is Algorithm 1: ε = 0.)
        proposal: Ablation (Table 8): mean of the proposal, q̃ + k̃ for 'qk', q̃ for 'q', 0 for 'zero', or one parameter
            for each head and cell for 'learned', `proposal_mean`.
        overlap: Ablation: E is the window and half a window of context on each of its sides.
        count_cells: How often a cell counts in the softmax: 'one' is the paper; 'all' as often as it has tokens;
            'outside' as often as it has tokens outside of the query's E. The last two are for weights that were
            trained with softmax attention.
        **kwargs: num_prefix_tokens, rotate_half, qkv_bias, qk_norm, scale_norm, norm_layer, proj_bias, attn_drop (of
            the weights of tokens and cells alike), proj_drop, device and dtype of `GridAttention`.

    Raises:
        ValueError: num_heads does not divide dim; a window_size or partition_grid that is not a whole number of at
            least 0, or both 0; a negative noise_std; a dropout rate outside 0 to 1; an ablation or a count_cells that
            does not exist or has nothing to act on.
    """

    fused_attn: Final[bool]
    variant: Final[bool]
    takes_prefix_tokens = True

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        window_size: int = 7,
        partition_grid: int = 7,
        proposal_scale: float = 1.0,
        noise_std: float = 1.0,
        rel_pos_bias: bool = True,
        partition: str = 'all',
        summary: str = 'linear_ln',
        num_samples: int = 1,
        proposal: str = 'qk',
        overlap: bool = False,
        count_cells: str = 'one',
        device: Optional[torch.device] = None,
        dtype: Optional[torch.dtype] = None,
        **kwargs: Any,
    ) -> None:
        dd: Any = {'device': device, 'dtype': dtype}
        super().__init__(dim, num_heads, **kwargs, **dd)
        check_flags(rel_pos_bias=rel_pos_bias, overlap=overlap)
        check_partition(window_size, partition_grid)
        check_int('num_samples', num_samples)
        check_number('proposal_scale', proposal_scale)
        check_number('noise_std', noise_std)
        if noise_std < 0:
            raise ValueError(f'noise_std must be 0 (no noise) or more, got {noise_std}')
        for name, choice, choices in (
            ('partition', partition, ['all', 'complement']),
            ('summary', summary, ['linear_ln', 'linear', 'identity']),
            ('proposal', proposal, ['qk', 'q', 'zero', 'learned']),
            ('count_cells', count_cells, ['one', 'all', 'outside']),
        ):
            if choice not in choices:
                raise ValueError(f'{name} must be one of {", ".join(choices)}, got {choice!r}')
            if choice != choices[0] and not partition_grid:
                raise ValueError(f'{name} {choice!r} is about cells, and partition_grid 0 has none; leave it out')
        if num_samples < 1:
            raise ValueError(f'num_samples must be at least 1, got {num_samples}')
        if num_samples > 1 and (not partition_grid or noise_std == 0):
            raise ValueError(
                f'num_samples {num_samples} needs cells and a noise_std above 0, got partition_grid '
                f'{partition_grid} and noise_std {noise_std}'
            )
        if overlap and not window_size:
            raise ValueError('overlap needs windows; got window_size 0')
        self.window_size = window_size
        self.partition_grid = partition_grid
        self.proposal_scale = proposal_scale
        self.noise_std = noise_std
        self.partition = partition
        self.summary = summary
        self.num_samples = num_samples
        self.proposal = proposal
        self.overlap = overlap
        self.count_cells = count_cells
        self.variant = (partition, summary, num_samples, proposal, overlap) != ('all', 'linear_ln', 1, 'qk', False)
        if self.variant and self.num_prefix_tokens:
            raise ValueError(
                f'num_prefix_tokens {self.num_prefix_tokens}: the ablations (partition, summary, num_samples, proposal '
                f'and overlap) are made for a grid alone; leave them at their defaults'
            )
        self.traces_any_batch = not self.variant
        self.fused_attn = use_fused_attn()
        if self.attn_drop.p > 0 and self.fused_attn:
            _logger.warning(
                'attn_drop %g: training takes plain PyTorch, the fused kernels have no such dropout', self.attn_drop.p
            )
        needs_q = partition_grid and proposal in ('qk', 'q')
        self.summary_q = Summary(self.head_dim, summary, **dd) if needs_q else None
        self.summary_k = Summary(self.head_dim, summary, **dd) if partition_grid else None
        self.rel_pos: Union[RelPosBias, HaloRelPosBias, None] = None
        if window_size and rel_pos_bias:
            self.rel_pos = (
                HaloRelPosBias(window_size, halo_size(window_size), num_heads, **dd)
                if overlap
                else RelPosBias((window_size, window_size), num_heads, **dd)
            )
        learned = (num_heads, partition_grid, partition_grid, self.head_dim)
        self.proposal_mean = nn.Parameter(torch.empty(learned, **dd)) if proposal == 'learned' else None
        eval_noise = torch.empty(num_samples, self.head_dim, device=device) if num_samples > 1 else None
        self.register_buffer('eval_noise', eval_noise, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise what this module holds itself: a learned proposal (as timm's position embeddings), fixed noise."""
        if self.proposal_mean is not None:
            trunc_normal_(self.proposal_mean, std=0.02)
        self.init_non_persistent_buffers()

    def init_non_persistent_buffers(self) -> None:
        """Draw the fixed noise of evaluation."""
        if isinstance(self.eval_noise, torch.Tensor):
            S = self.num_samples
            noise = torch.randn(S, self.head_dim, generator=torch.Generator().manual_seed(0))
            self.eval_noise.copy_((S / (S - 1)) ** 0.5 * (noise - noise.mean(0)))

    @torch.jit.unused
    def _case(self) -> EvaCase:
        return eva_layer_case(self, self.window_size, self.partition_grid, self.variant, self.count_cells)

    @property
    @torch.jit.unused
    def backend(self) -> str:
        """The code that runs where the layer is, in its mode and under autocast as it is now: 'gluon', 'triton' or
        'plain'; see `evavit/ops/backends.py`."""
        return EVA.name(self._case()) if self.fused_attn else 'plain'

    def extra_repr(self) -> str:
        backend = EVA.describe(self._case()) if self.fused_attn else 'plain (fused_attn is False)'
        ablations = f'count_cells={self.count_cells}, ' if self.count_cells != 'one' else ''
        if self.variant:
            ablations += (
                f'partition={self.partition}, summary={self.summary}, num_samples={self.num_samples}, '
                f'proposal={self.proposal}, overlap={self.overlap}, '
            )
        return (
            f'num_heads={self.num_heads}, window_size={self.window_size}, partition_grid={self.partition_grid}, '
            f'proposal_scale={self.proposal_scale:g}, noise_std={self.noise_std:g}, {ablations}'
            f'backend={backend}'
        )

    def attend_projected(self, qkv: torch.Tensor, feat_size: List[int]) -> torch.Tensor:
        if not torch.jit.is_scripting():  # noqa: SIM102, TorchScript skips this block, but not a longer condition
            if self.fused_attn and not self.variant and not isinstance(qkv, torch.fx.Proxy) and self._has_own_attend():
                return eva_attention_projected(qkv, self.num_heads, self._options(qkv, feat_size))
        return self.attend_by_heads(qkv, feat_size)

    @torch.jit.unused
    def _has_own_attend(self) -> bool:
        """Whether `attend` is this class's, and not a subclass's or one put on this object."""
        return type(self).attend is EvaAttention.attend and 'attend' not in self.__dict__

    @torch.jit.unused
    def _options(self, qkv: torch.Tensor, feat_size: List[int]) -> EvaOptions:
        """What `attend` passes on, for a projection `(B, P + N, 3·C)`."""
        feat_size, modules = static_size(feat_size), self._modules
        of_q, of_k, rel_pos = modules.get('summary_q'), modules.get('summary_k'), modules.get('rel_pos')
        summary_q = summary_k = noise = None
        if of_q is not None and of_k is not None:
            summary_q, summary_k = as_summary(of_q()), as_summary(of_k())
            if self.training and self.noise_std > 0:
                noise = self._draw_noise(qkv, qkv.shape[0], feat_size)
        return EvaOptions(
            feat_size,
            summary_q,
            summary_k,
            None if rel_pos is None else _own(rel_pos, 'relative_position_bias_table'),
            self.window_size,
            self.partition_grid,
            self.head_dim**-0.5,
            self.proposal_scale,
            noise,
            self.drop_rate(),
            1e-5,
            self.count_cells,
            self.num_prefix_tokens,
        )

    def attend(self, qkv: torch.Tensor, feat_size: List[int]) -> torch.Tensor:
        if self.variant:
            return self._attend_variant(qkv[0], qkv[1], qkv[2], feat_size)
        summary_q, summary_k, noise = self._own_tensors(qkv[0], feat_size)
        return eva_attention_packed(
            qkv,
            feat_size,
            summary_q,
            summary_k,
            rel_pos_bias=self.rel_pos.relative_position_bias_table if self.rel_pos is not None else None,
            window_size=self.window_size,
            partition_grid=self.partition_grid,
            proposal_scale=self.proposal_scale,
            noise=noise,
            dropout_p=self.drop_rate(),
            fused=self.fused_attn,
            count_cells=self.count_cells,
            num_prefix_tokens=self.num_prefix_tokens,
        )

    def attend_apart(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, feat_size: List[int]) -> torch.Tensor:
        if self.variant:
            return self._attend_variant(q, k, v, feat_size)
        summary_q, summary_k, noise = self._own_tensors(q, feat_size)
        return eva_attention(
            q,
            k,
            v,
            feat_size,
            summary_q,
            summary_k,
            rel_pos_bias=self.rel_pos.relative_position_bias_table if self.rel_pos is not None else None,
            window_size=self.window_size,
            partition_grid=self.partition_grid,
            proposal_scale=self.proposal_scale,
            noise=noise,
            dropout_p=self.drop_rate(),
            fused=self.fused_attn,
            count_cells=self.count_cells,
            num_prefix_tokens=self.num_prefix_tokens,
        )

    def _own_tensors(
        self, q: torch.Tensor, feat_size: List[int]
    ) -> Tuple[Optional[SummaryTensors], Optional[SummaryTensors], Optional[torch.Tensor]]:
        """The parameters of both summaries, and in training the noise of the proposal."""
        summary_q: Optional[SummaryTensors] = None
        summary_k: Optional[SummaryTensors] = None
        noise: Optional[torch.Tensor] = None
        if self.summary_q is not None and self.summary_k is not None:
            of_q, of_k = self.summary_q(), self.summary_k()
            summary_q, summary_k = (of_q[0], of_q[1], of_q[2], of_q[3]), (of_k[0], of_k[1], of_k[2], of_k[3])
            if self.training and self.noise_std > 0:
                noise = self._draw_noise(q, q.shape[0], feat_size)
        return summary_q, summary_k, noise

    def _draw_noise(self, like: torch.Tensor, batch: int, feat_size: List[int]) -> torch.Tensor:
        """noise_std · ε `(B, h, C_p, S, d)`, without S for one sample, the first draw of a forward pass in training."""
        shape = [batch, self.num_heads, eva_num_cells(feat_size, self.partition_grid), self.head_dim]
        if self.num_samples > 1:
            shape.insert(3, self.num_samples)
        noise = torch.randn(shape, dtype=accumulation_dtype(like), device=like.device)
        return noise if self.noise_std == 1.0 else self.noise_std * noise

    def _attend_variant(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, feat_size: List[int]) -> torch.Tensor:
        noise: Optional[torch.Tensor] = None
        if self.training and self.noise_std > 0 and self.partition_grid > 0:
            noise = self._draw_noise(q, q.shape[0], feat_size)
            if self.num_samples == 1:
                noise = noise.unsqueeze(3)
        elif isinstance(self.eval_noise, torch.Tensor):
            noise = self.noise_std * self.eval_noise.view(1, 1, 1, self.num_samples, self.head_dim)
        return eva_attention_variant(
            q,
            k,
            v,
            feat_size,
            self.summary_q() if self.summary_q is not None else None,
            self.summary_k() if self.summary_k is not None else None,
            rel_pos_bias=self.rel_pos.relative_position_bias_table if self.rel_pos is not None else None,
            window_size=self.window_size,
            partition_grid=self.partition_grid,
            partition=self.partition,
            proposal=self.proposal,
            proposal_mean=self.proposal_mean,
            overlap=self.overlap,
            proposal_scale=self.proposal_scale,
            noise=noise,
            noise_std=self.noise_std,
            dropout_p=self.drop_rate(),
            count_cells=self.count_cells,
        )

    @torch.jit.ignore
    def attention_mass(
        self, x: torch.Tensor, feat_size: List[int], rope: Optional[torch.Tensor] = None
    ) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What share of its attention each query of the grid gives to single tokens and to the cells, and how many
        cells share the latter: three tensors `(B, h, N)`, see `evavit.ops.eva_attention_mass`. The arguments are those
        of `forward`."""
        q, k, _ = self.project_tokens(x, rope)
        return eva_attention_mass(
            q,
            k,
            feat_size,
            self.summary_k() if self.summary_k is not None else None,
            self.rel_pos.relative_position_bias_table if self.rel_pos is not None else None,
            self.window_size,
            self.partition_grid,
            count_cells=self.count_cells,
            num_prefix_tokens=self.num_prefix_tokens,
        )
