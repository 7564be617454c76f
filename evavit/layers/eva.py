"""EVA: exact attention inside a query's window, one key and one control variate per cell of the grid elsewhere.

Paper: `Efficient Attention via Control Variates`, Zheng et al., ICLR 2023 - https://arxiv.org/abs/2302.04542
"""
from typing import Final, List, Optional, Tuple

import torch
from timm.layers import RelPosBias, register_notrace_module, use_fused_attn
from torch import nn

from evavit.ops import eva_attention_mass, eva_attention_packed, eva_backend, eva_num_cells
from evavit.ops.checks import check_partition

from .attention import GridAttention

__all__ = ['EvaAttention']


class Summary(nn.Module):
    """σ of Equation (26): the projection and LayerNorm that turn a cell's mean into its summary.

    Holds the parameters; `evavit.ops.eva_attention` applies them.
    """

    def __init__(self, head_dim: int, device=None, dtype=None) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.proj = nn.Linear(head_dim, head_dim, **dd)
        self.norm = nn.LayerNorm(head_dim, **dd)

    def forward(self) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.proj.weight, self.proj.bias, self.norm.weight, self.norm.bias


@register_notrace_module  # torch.fx keeps it as one node: windows and cells follow the size of the grid
class EvaAttention(GridAttention):
    """Multi-head EVA on tokens `(B, N, C)` with their grid, `forward(x, feat_size)`; see `evavit.ops.eva_attention`.

    Time and memory grow linearly with N. In training, the noise ε of the proposal comes from the default generator of
    the input's device, so a seed reproduces it; evaluation is deterministic.

    Fused CUDA kernels are experimental: `timm.layers.set_fused_attn(True, experimental=True)`, or TIMM_FUSED_ATTN=2 in
    the environment, before the layer is made chooses them where they can run; `extra_repr` says which code runs.

    Args:
        dim: Channels C.
        num_heads: Heads h; must divide dim.
        window_size: Side of the windows in tokens (the set E); 0 for no window.
        partition_grid: Cells asked for along each axis; 0 for no cells. The layer then has no summaries.
        qkv_bias: Bias of the q, k, v projection.
        proj_bias: Bias of the output projection.
        proposal_scale: Factor of the proposal's mean; ½ evaluates weights of the published implementation.
        noise_std: Standard deviation of the proposal's noise in training; 0 for none. The published implementation
            has head_dim^(-¼) in these units.
        rel_pos_bias: Learned relative position bias inside the window.
        attn_drop: Dropout rate of the attention weights, of tokens and cells alike.
        proj_drop: Dropout rate after the output projection.

    Raises:
        ValueError: num_heads does not divide dim; a window_size or partition_grid that is not a whole number of at
            least 0, or both 0; a negative noise_std; a dropout rate outside 0 to 1.
    """
    fused_attn: Final[bool]

    def __init__(
            self,
            dim: int,
            num_heads: int,
            *,
            window_size: int = 7,
            partition_grid: int = 7,
            qkv_bias: bool = True,
            proj_bias: bool = True,
            proposal_scale: float = 1.0,
            noise_std: float = 1.0,
            rel_pos_bias: bool = True,
            attn_drop: float = 0.,
            proj_drop: float = 0.,
            device=None,
            dtype=None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__(dim, num_heads, qkv_bias=qkv_bias, proj_bias=proj_bias,
                         attn_drop=attn_drop, proj_drop=proj_drop, **dd)
        for name, value in (('window_size', window_size), ('partition_grid', partition_grid)):
            if not isinstance(value, int):
                raise ValueError(f'{name} must be a whole number, got {value!r}')
        check_partition(window_size, partition_grid)
        if noise_std < 0:
            raise ValueError(f'noise_std must be 0 (no noise) or more, got {noise_std}')
        self.window_size = window_size
        self.partition_grid = partition_grid
        self.proposal_scale = proposal_scale
        self.noise_std = noise_std
        self.fused_attn = use_fused_attn(experimental=True)
        self.summary_q = Summary(self.head_dim, **dd) if partition_grid else None
        self.summary_k = Summary(self.head_dim, **dd) if partition_grid else None
        self.rel_pos = RelPosBias((window_size, window_size), num_heads, **dd) if window_size and rel_pos_bias else None

    def extra_repr(self) -> str:
        weight = self.qkv.weight
        backend = eva_backend(weight.device, weight.dtype, self.head_dim, self.window_size, self.partition_grid,
                              self.attn_drop.p if self.training else 0.) if self.fused_attn else 'plain'
        return (f'num_heads={self.num_heads}, window_size={self.window_size}, partition_grid={self.partition_grid}, '
                f'proposal_scale={self.proposal_scale:g}, noise_std={self.noise_std:g}, backend={backend}')

    def attend(self, qkv: torch.Tensor, feat_size: List[int]) -> torch.Tensor:
        summary_q: Optional[Tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]] = None
        summary_k: Optional[Tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]] = None
        noise: Optional[torch.Tensor] = None
        if self.summary_q is not None and self.summary_k is not None:
            summary_q, summary_k = self.summary_q(), self.summary_k()
            if self.training and self.noise_std > 0:
                dtype = torch.float64 if qkv.dtype == torch.float64 else torch.float32
                shape = [qkv.shape[1], qkv.shape[2], eva_num_cells(feat_size, self.partition_grid), qkv.shape[4]]
                noise = self.noise_std * torch.randn(shape, dtype=dtype, device=qkv.device)
        return eva_attention_packed(
            qkv, feat_size,
            summary_q,
            summary_k,
            rel_pos_bias=self.rel_pos.get_bias().squeeze(0) if self.rel_pos is not None else None,
            window_size=self.window_size,
            partition_grid=self.partition_grid,
            proposal_scale=self.proposal_scale,
            noise=noise,
            dropout_p=self.attn_drop.p if self.training else 0.,
            fused=self.fused_attn,
        )

    @torch.jit.ignore
    def attention_mass(self, x: torch.Tensor, feat_size: List[int]) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What share of its attention each query of tokens `(B, N, C)` gives to E and to the cells, and how many cells
        share the latter: three tensors `(B, h, N)`, see `evavit.ops.eva_attention_mass`."""
        q, k, _ = self.qkv(x).unflatten(-1, [3, self.num_heads, self.head_dim]).permute(2, 0, 3, 1, 4)
        return eva_attention_mass(
            q, k, feat_size,
            self.summary_k() if self.summary_k is not None else None,
            self.rel_pos.get_bias().squeeze(0) if self.rel_pos is not None else None,
            self.window_size,
            self.partition_grid,
        )
