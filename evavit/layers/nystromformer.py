"""Nyströmformer: softmax attention through landmarks, by the Nyström method.

Paper: `Nyströmformer: A Nyström-Based Algorithm for Approximating Self-Attention`, Xiong et al., AAAI 2021 -
https://arxiv.org/abs/2102.03902
"""

from typing import Any, List, Optional

import torch
from timm.layers import register_notrace_module
from torch import nn

from evavit.ops.checks import check_tokens, check_whole
from evavit.ops.grid import accumulation_dtype, cell_means, cell_shape, softmax, static_size

from .attention import GridAttention, device_and_dtype

__all__ = ['NystromformerAttention', 'iterative_pseudo_inverse']


def iterative_pseudo_inverse(x: torch.Tensor, iterations: int) -> torch.Tensor:
    """Moore-Penrose pseudo-inverse of square matrices `(..., m, m)` by the third-order iteration of Razavi et al.

        Z_0 = Xᵀ / (‖X‖_1 ‖X‖_∞),    Z_{j+1} = ¼ Z_j (13 I - X Z_j (15 I - X Z_j (7 I - X Z_j)))

    Each matrix has its own Z_0, so that the entries of a batch do not mix. For a singular value σ, X Z grows from
    σ² / (‖X‖_1 ‖X‖_∞) by at most 13/4 an iteration until it is near 1, and converges cubically from there: 6 iterations
    invert singular values down to about 1/30 of the norms, the smaller ones in part.
    """
    magnitude = x.abs()
    z = x.transpose(-2, -1) / (magnitude.sum(-2).amax(-1) * magnitude.sum(-1).amax(-1)).unsqueeze(-1).unsqueeze(-1)
    eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    for _ in range(iterations):
        xz = x @ z
        z = 0.25 * z @ (13 * eye - xz @ (15 * eye - xz @ (7 * eye - xz)))
    return z


@register_notrace_module  # torch.fx keeps it as one node: cells follow the size of the grid
class NystromformerAttention(GridAttention):
    """Multi-head Nyström attention on tokens `(B, N, C)` of any grid, `forward(x, feat_size)`.

    The landmarks q̃, k̃ are the means of q, k over the segments of a sequence; on a grid, over its cells: along an axis
    of L tokens a cell is ceil(L / landmark_grid) tokens, as EVA's are. With m landmarks, s = d^(-½) and X⁺ the
    pseudo-inverse after `pinv_iterations` steps of `iterative_pseudo_inverse`:

        Y = softmax(s Q K̃ᵀ) · softmax(s Q̃ K̃ᵀ)⁺ · (softmax(s Q̃ Kᵀ) V) + DConv(V)

    DConv is the paper's skip connection, a depthwise convolution of the values along the sequence with one kernel a
    head; here the sequence is the grid in raster order. Time grows with N·m + m³, memory with N·m. With every token a
    landmark, no convolution and enough iterations this is softmax attention.

    Args:
        dim: Channels C.
        num_heads: Heads h; must divide dim.
        landmark_grid: Landmarks asked for along each axis; 7 gives at most 49, the EVA paper's number.
        pinv_iterations: Steps of the pseudo-inverse; 6 in the paper.
        conv_kernel_size: Length of DConv's kernels in tokens, odd; 33 in the authors' code, 0 for no convolution.
        **kwargs: Arguments of `GridAttention`; attn_drop drops the queries' weights of the landmarks, softmax(s Q K̃ᵀ).

    Raises:
        ValueError: num_heads does not divide dim; landmark_grid or pinv_iterations that are not whole numbers of at
            least 1; an even conv_kernel_size; a dropout rate outside 0 to 1.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        landmark_grid: int = 7,
        pinv_iterations: int = 6,
        conv_kernel_size: int = 33,
        **kwargs: Any,
    ) -> None:
        super().__init__(dim, num_heads, **kwargs)
        dd = device_and_dtype(kwargs)
        check_whole('landmark_grid', landmark_grid, 1)
        check_whole('pinv_iterations', pinv_iterations, 1)
        check_whole('conv_kernel_size', conv_kernel_size, 0)
        if conv_kernel_size and conv_kernel_size % 2 == 0:
            raise ValueError(f'conv_kernel_size must be odd, or 0 for no convolution, got {conv_kernel_size}')
        self.landmark_grid = landmark_grid
        self.pinv_iterations = pinv_iterations
        self.conv = (
            nn.Conv2d(
                num_heads,
                num_heads,
                (conv_kernel_size, 1),
                padding=(conv_kernel_size // 2, 0),
                groups=num_heads,
                bias=False,
                **dd,
            )
            if conv_kernel_size
            else None
        )

    def extra_repr(self) -> str:
        return f'num_heads={self.num_heads}, landmark_grid={self.landmark_grid}, pinv_iterations={self.pinv_iterations}'

    def _landmark_values(self, q_l: torch.Tensor, k_l: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """softmax(Q̃ K̃ᵀ)⁺ · (softmax(Q̃ Kᵀ) V), `(B, h, m, d)`: small matrices, at least float32 throughout."""
        dtype = accumulation_dtype(v)
        kernel = softmax((q_l @ k_l.transpose(-2, -1)).to(dtype), q_l.to(dtype))
        # The order of the products keeps every one of them small: the pseudo-inverse meets m × d, not N × m.
        values = softmax(q_l @ k.transpose(-2, -1), v) @ v
        return iterative_pseudo_inverse(kernel, self.pinv_iterations) @ values.to(dtype)

    def attend(self, qkv: torch.Tensor, feat_size: List[int]) -> torch.Tensor:
        q, k, v = qkv.unbind(0)
        feat_size = static_size(feat_size)
        check_tokens(q, k, v, feat_size)
        q = q * self.head_dim**-0.5
        cell = cell_shape(feat_size, self.landmark_grid)
        q_l, k_l = cell_means(q, feat_size, cell), cell_means(k, feat_size, cell)

        values: Optional[torch.Tensor] = None
        if not torch.jit.is_scripting():  # noqa: SIM102, TorchScript skips this block, but not a longer condition
            if not qkv.is_meta and torch.is_autocast_enabled(qkv.device.type):
                with torch.autocast(qkv.device.type, enabled=False):  # an inverse needs all digits of float32
                    values = self._landmark_values(q_l, k_l, k, v)
        if values is None:
            values = self._landmark_values(q_l, k_l, k, v)
        out = self.attn_drop(softmax(q @ k_l.transpose(-2, -1), v)) @ values.to(v.dtype)
        if self.conv is not None:
            out = out + self.conv(v)  # heads are its channels, tokens its rows
        return out
