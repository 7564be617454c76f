"""LARA, linear randomized attention: random features whose directions follow the input.

Paper: `Linear Complexity Randomized Self-attention Mechanism`, Zheng et al., ICML 2022 -
https://arxiv.org/abs/2204.04667
"""

from typing import List, Optional

import torch
from timm.layers import register_notrace_module
from torch import nn

from evavit.ops import lara_attention
from evavit.ops.checks import check_tokens, check_whole
from evavit.ops.grid import accumulation_dtype, cell_means, cell_shape, static_size

from .attention import GridAttention

__all__ = ['LaraAttention']


class Landmarks(nn.Module):
    """Landmarks `(B, h, C, d)` of tokens `(B, h, N, d)`: the mean of each cell of the grid, projected and normalised.

    Args:
        dim: Channels that the projection sees: a head's, one projection shared by the heads, or all heads' together.
        landmark_grid: Cells asked for along each axis.
    """

    def __init__(self, dim: int, landmark_grid: int, device=None, dtype=None) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.dim = dim
        self.landmark_grid = landmark_grid
        self.proj = nn.Linear(dim, dim, **dd)
        self.norm = nn.LayerNorm(dim, **dd)

    def forward(self, x: torch.Tensor, feat_size: List[int]) -> torch.Tensor:
        means = cell_means(x, feat_size, cell_shape(feat_size, self.landmark_grid)).to(self.proj.weight.dtype)
        if self.dim == x.shape[-1]:
            return self.norm(self.proj(means))
        means = self.norm(self.proj(means.transpose(1, 2).flatten(2)))
        return means.unflatten(-1, [x.shape[1], x.shape[3]]).transpose(1, 2)


@register_notrace_module
class LaraAttention(GridAttention):
    """Multi-head LARA on tokens `(B, N, C)` with their grid, `forward(x, feat_size)`; see `evavit.ops.lara_attention`.

        q̃_c, k̃_c = LN(W · mean of q, k over cell c + b)
        y_n = Σ_c w_nc f(ω_c) / Σ_c w_nc,    ω_c ~ q_c = N(d^(-¼) (q̃_c + k̃_c), I),
        w_nc = α_nc N(ω_c; 0, I) ξ(q̂_n, ω_c) Σ_m ξ(k̂_m, ω_c) / q_c(ω_c)

    The cells are EVA's: ceil(L / landmark_grid) tokens along an axis of L tokens, on any grid. Time and memory grow
    with N·C. In training the samples come from the default generator of the input's device; evaluation takes the
    proposals' means.

    Args:
        dim: Channels C.
        num_heads: Heads h; must divide dim.
        landmark_grid: Landmarks asked for along each axis: 7 is at most 49 landmarks.
        landmark_proj: 'head' for one projection of a head's channels, shared by the heads, or 'channels' for one of all
            channels, which the pyramid has by default.
        weighting: α of the proposals: 'optimal', 'balance' or 'biased'.
        num_samples: Samples of each proposal in training.
        antithetic: Draw them in pairs μ ± ε; num_samples must then be even.
        qkv_bias: Bias of the q, k, v projection.
        proj_bias: Bias of the output projection.
        attn_drop: Dropout rate of a query's weights of the samples.
        proj_drop: Dropout rate after the output projection.

    Raises:
        ValueError: num_heads does not divide dim; landmark_grid or num_samples that are no whole numbers of at least 1,
            or an odd num_samples with antithetic; an unknown landmark_proj or weighting; a dropout rate outside 0 to 1.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        landmark_grid: int = 7,
        landmark_proj: str = 'head',
        weighting: str = 'optimal',
        num_samples: int = 1,
        antithetic: bool = False,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__(
            dim, num_heads, qkv_bias=qkv_bias, proj_bias=proj_bias, attn_drop=attn_drop, proj_drop=proj_drop, **dd
        )
        check_whole('landmark_grid', landmark_grid, 1)
        check_whole('num_samples', num_samples, 1)
        for name, value, choices in (
            ('landmark_proj', landmark_proj, ('head', 'channels')),
            ('weighting', weighting, ('optimal', 'balance', 'biased')),
        ):
            if value not in choices:
                raise ValueError(f'{name} must be one of {", ".join(choices)}, got {value!r}')
        if antithetic and num_samples % 2:
            raise ValueError(f'antithetic draws samples in pairs: num_samples must be even, got {num_samples}')
        self.weighting = weighting
        self.num_samples = num_samples
        self.antithetic = antithetic
        self.landmark_grid = landmark_grid
        landmark_dim = dim if landmark_proj == 'channels' else self.head_dim
        self.landmarks_q = Landmarks(landmark_dim, landmark_grid, **dd)
        self.landmarks_k = Landmarks(landmark_dim, landmark_grid, **dd)

    def extra_repr(self) -> str:
        return (
            f'num_heads={self.num_heads}, landmark_grid={self.landmark_grid}, weighting={self.weighting}, '
            f'num_samples={self.num_samples}, antithetic={self.antithetic}'
        )

    def attend(self, qkv: torch.Tensor, feat_size: List[int]) -> torch.Tensor:
        q, k, v = qkv.unbind(0)
        feat_size = static_size(feat_size)
        check_tokens(q, k, v, feat_size)
        landmarks_q, landmarks_k = self.landmarks_q(q, feat_size), self.landmarks_k(k, feat_size)
        noise: Optional[torch.Tensor] = None
        if self.training:
            shape = landmarks_q.shape
            dtype = accumulation_dtype(q)
            drawn = self.num_samples // 2 if self.antithetic else self.num_samples
            noise = torch.randn([shape[0], shape[1], shape[2], drawn, shape[3]], dtype=dtype, device=q.device)
            if self.antithetic:
                noise = torch.cat([noise, -noise], 3)
        return lara_attention(
            q,
            k,
            v,
            feat_size,
            landmarks_q,
            landmarks_k,
            self.weighting,
            noise,
            dropout_p=self.attn_drop.p if self.training else 0.0,
        )
