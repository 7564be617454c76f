"""The directions of random features as a part of a layer: drawn anew in training, fixed in evaluation."""

from typing import Any, Dict, List, Optional

import torch
from torch import nn

from evavit.ops.checks import check_whole

from .attention import check_flags

__all__ = ['RandomDirections', 'orthogonal_directions']


def orthogonal_directions(gaussian: torch.Tensor) -> torch.Tensor:
    """Independent standard normal rows `(..., S, d)` made orthogonal in blocks of d, each still N(0, I) on its own.

    Gram-Schmidt inside each block (the last may be short), then each row gets its old length back: length and
    direction of a normal vector are independent. Orthogonal directions lower the variance of random features. In
    float64, through a Cholesky factor, which a GPU does in one go: G = L Q with orthonormal rows Q for L Lᵀ = G Gᵀ.
    """
    d = gaussian.shape[-1]
    rows = gaussian.double()
    length = rows.norm(2, -1, True)
    unit = rows / length
    blocks: List[torch.Tensor] = []
    for block in unit.split(d, -2):
        factor, _ = torch.linalg.cholesky_ex(block @ block.transpose(-2, -1))
        blocks.append(torch.linalg.solve_triangular(factor, block, upper=False))
    return (length * torch.cat(blocks, -2)).to(gaussian.dtype)


class RandomDirections(nn.Module):
    """Directions ω `(h, S, d)` of S random features for each head, ω ~ N(0, I).

    In evaluation they are always the same, drawn once from a seed that never changes: outputs are deterministic, and a
    checkpoint, which does not hold them, evaluates as it did when it was saved. Weights of other programs may bring
    their own, as `fixed` in a state dict: evaluation then takes these, and the layer's state dict holds them. In
    training directions come from the default generator of their device, so a seed reproduces them, and gradient
    checkpointing, which restores it, sees the same.

    Args:
        num_heads: Heads h, each with directions of its own.
        num_features: Directions S of each head.
        head_dim: Their size d.
        orthogonal: Make them orthogonal in blocks of d (`orthogonal_directions`).
        redraw_interval: Training steps between two draws, on average: each step redraws with probability
            1 / redraw_interval, which needs no counter of steps. 1 draws in each step; 0 trains with the directions of
            evaluation. Above 1 the directions in use are in the state dict, `kept`, so that a run goes on with them
            after a stop; weights with and without them load into one another.
    """

    fixed: torch.Tensor
    kept: Optional[torch.Tensor]

    def __init__(
        self,
        num_heads: int,
        num_features: int,
        head_dim: int,
        orthogonal: bool = True,
        redraw_interval: int = 1,
        device: Optional[torch.device] = None,
        dtype: Optional[torch.dtype] = None,
    ) -> None:
        super().__init__()
        check_flags(orthogonal=orthogonal)
        check_whole('num_features', num_features, 1)
        check_whole('redraw_interval', redraw_interval, 0)
        self.orthogonal = orthogonal
        self.redraw_interval = redraw_interval
        shape = (num_heads, num_features, head_dim)
        self.register_buffer('fixed', torch.empty(shape, device=device, dtype=dtype), persistent=False)
        kept = torch.empty(shape, device=device, dtype=dtype) if redraw_interval > 1 else None
        self.register_buffer('kept', kept)
        self.reset_parameters()

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """Fill the buffers: there are no parameters."""
        self.init_non_persistent_buffers()
        if self.kept is not None:
            self.kept.copy_(self.fixed)

    @torch.jit.ignore
    def init_non_persistent_buffers(self) -> None:
        """Fill the directions of evaluation; a layer on the meta device has nothing to fill."""
        if self.fixed.is_meta:
            return
        self.fixed.copy_(self.drawn_from_seed())

    @torch.jit.ignore
    def drawn_from_seed(self) -> torch.Tensor:
        """The directions of evaluation of a layer that no file gave others to, in float64 on the CPU."""
        drawn = torch.randn(self.fixed.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        return self._shaped(drawn)

    def _load_from_state_dict(self, state_dict: Dict[str, Any], prefix: str, *args: Any) -> None:
        key = f'{prefix}kept'
        if self.kept is None:
            state_dict.pop(key, None)  # of a run that kept its directions; evaluation has others anyway
        else:
            state_dict.setdefault(key, self.kept)
        if f'{prefix}fixed' in state_dict:
            self.register_buffer('fixed', self.fixed, persistent=True)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return (
            f'num_features={self.fixed.shape[1]}, orthogonal={self.orthogonal}, redraw_interval={self.redraw_interval}'
        )

    def _shaped(self, gaussian: torch.Tensor) -> torch.Tensor:
        return orthogonal_directions(gaussian) if self.orthogonal else gaussian

    def forward(self) -> torch.Tensor:
        if not self.training or self.redraw_interval == 0:
            return self.fixed
        drawn = self._shaped(torch.randn(self.fixed.shape, device=self.fixed.device)).to(self.fixed.dtype)
        kept = self.kept
        if kept is None:
            return drawn
        due = torch.rand([], device=drawn.device) * self.redraw_interval < 1
        drawn = torch.where(due, drawn, kept)
        kept.copy_(drawn)
        return drawn
