"""PVT v2 with an attention that sees the token grid, in place of attention over downsampled keys and values

Papers:
  * `Efficient Attention via Control Variates` - https://arxiv.org/abs/2302.04542 (settings: Appendix E.2)
  * `PVT v2: Improved Baselines with Pyramid Vision Transformer` - https://arxiv.org/abs/2106.13797

The model is timm's PyramidVisionTransformerV2 with the attention of every block replaced: the chosen one in the first
stages and softmax in the last, whose 49 tokens at 224 × 224 are one window. timm's blocks already hand `feat_size` to
their attention. The only other change makes the MLP faster.
"""

from typing import Any, Dict, Final, List, Optional, Tuple, Union

import torch
from timm.layers import to_2tuple, to_ntuple, use_fused_attn
from timm.models._input import update_model_input_size
from timm.models.pvt_v2 import MlpWithDepthwiseConv, PyramidVisionTransformerV2
from torch import nn

from evavit.layers import ATTENTIONS, GridAttention, attention_layer, check_heads, pop_attention_kwargs
from evavit.layers.mlp import is_exact_gelu, is_hooked
from evavit.ops import depthwise_gelu
from evavit.ops.dwconv import DWCONV, DepthwiseCase
from evavit.ops.grid import fix_image_size

from ._grid import GridModel, Variant, build_grid_model, grid_cfgs, register_family, variant
from ._weights import pretrained_filter

__all__ = ['FusedMlpWithDepthwiseConv', 'GridPyramidVisionTransformerV2']


class FusedMlpWithDepthwiseConv(MlpWithDepthwiseConv):
    """timm's MLP of PVT v2 with its depthwise convolution and exact GELU as one operator, `evavit.ops.depthwise_gelu`.

    That is one CUDA kernel where there can be one, unless timm's switch is off when the layer is made
    (`timm.layers.set_fused_attn(False)`, or TIMM_FUSED_ATTN=0 in the environment) or the layer's `fused_mlp` is set to
    False; `backend` names the code that runs, and `extra_repr` why no faster one does. Under TorchScript and torch.fx,
    with another activation or another convolution in the place of `dwconv`, and while `relu`, `dwconv` or `act` have
    hooks or a `forward` of their own, the modules are called one by one, as in timm.

    Args:
        mlp: timm's MLP, whose modules this one takes over: parameters, their names and values stay.
    """

    fused_mlp: Final[bool]

    def __init__(self, mlp: MlpWithDepthwiseConv) -> None:
        nn.Module.__init__(self)
        for name, module in mlp.named_children():
            setattr(self, name, module)
        self.fused_mlp = use_fused_attn()

    @torch.jit.ignore
    def _one_operator(self) -> bool:
        """Whether `depthwise_gelu` does what is between the linears, and no hook needs the values in between."""
        return self._why_not() is None

    @torch.jit.unused
    def _why_not(self) -> Optional[str]:
        """Why it is not, or None."""
        if any(is_hooked(module) for module in (self.relu, self.dwconv, self.act)):
            return 'a layer inside has hooks or a forward of its own'
        if not is_exact_gelu(self.act) or type(self.relu) is not nn.Identity:
            return 'another activation than the exact GELU'
        conv = self.dwconv
        fits = (
            type(conv) is nn.Conv2d
            and conv.stride == conv.dilation == conv.padding == (1, 1)
            and conv.padding_mode == 'zeros'
            and conv.kernel_size == (3, 3)
            and conv.groups == conv.in_channels == conv.out_channels
            and conv.bias is not None
        )
        return None if fits else 'another convolution'

    @torch.jit.unused
    def _case(self) -> DepthwiseCase:
        return DepthwiseCase(self.dwconv.weight.device, self.dwconv.weight.dtype)

    @property
    @torch.jit.unused
    def backend(self) -> str:
        """The code that runs where the layer is: 'triton' or 'plain'."""
        return DWCONV.name(self._case()) if self.fused_mlp and self._one_operator() else 'plain'

    @torch.jit.ignore
    def extra_repr(self) -> str:
        reason = self._why_not() if self.fused_mlp else 'fused_mlp is False'
        return f'backend={DWCONV.describe(self._case())}' if reason is None else f'backend=plain ({reason})'

    def forward(self, x: torch.Tensor, feat_size: List[int]) -> torch.Tensor:
        """Tokens `(B, N, C)` in raster order of a grid of `feat_size` (H, W) to tokens `(B, N, out_features)`."""
        x = self.fc1(x)
        if not torch.jit.is_scripting():  # noqa: SIM102, TorchScript skips this block, but not a longer condition
            if isinstance(x, torch.Tensor) and self._one_operator():  # under torch.fx x is a proxy
                bias = self.dwconv.bias
                assert bias is not None  # _one_operator has seen it
                x = depthwise_gelu(x, self.dwconv.weight, bias, feat_size, self.fused_mlp)
                return self.drop(self.fc2(self.drop(x)))
        B, _, C = x.shape
        x = self.relu(x.transpose(1, 2).view(B, C, feat_size[0], feat_size[1]))
        x = self.act(self.dwconv(x).flatten(2).transpose(1, 2))
        return self.drop(self.fc2(self.drop(x)))


class GridPyramidVisionTransformerV2(GridModel, PyramidVisionTransformerV2):
    """timm's PyramidVisionTransformerV2 on full-length keys and values; images of any size.

    Args:
        attn_layer: Name of the attention of all stages but the last, a key of `evavit.layers.ATTENTIONS`.
        embed_dims: Channels of each stage.
        num_heads: Heads of each stage; must divide its channels.
        qkv_bias: Bias of the q, k, v projections.
        attn_drop_rate: Dropout rate of the attention weights.
        proj_drop_rate: Dropout rate after the attention's projection and in the MLP.
        img_size: Nominal image size; see `set_input_size`.
        dynamic_img_size: A pyramid takes any image size; False is refused.
        **kwargs: Options of the attention (for EVA: window_size, partition_grid, proposal_scale, noise_std,
            rel_pos_bias; see the classes in `evavit.layers`) and further arguments of timm's model.
    """

    def __init__(
        self,
        *,
        attn_layer: str = 'eva',
        embed_dims: Tuple[int, ...] = (64, 128, 320, 512),
        num_heads: Union[int, Tuple[int, ...]] = (2, 4, 10, 16),
        qkv_bias: bool = True,
        attn_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        img_size: Optional[Union[int, Tuple[int, int]]] = None,
        dynamic_img_size: bool = True,
        device: Optional[torch.device] = None,
        dtype: Optional[torch.dtype] = None,
        **kwargs: Any,
    ) -> None:
        if not dynamic_img_size:
            raise ValueError('dynamic_img_size=False: this model takes images of any size; leave the argument out')
        for name in ('sr_ratios', 'linear'):
            if name in kwargs:
                raise ValueError(f'{name}={kwargs[name]}: keys and values are not downsampled here; leave it out')
        dd: Dict[str, Any] = {'device': device, 'dtype': dtype}
        attn_kwargs = pop_attention_kwargs(attn_layer, kwargs)
        attn_kwargs = {**ATTENTIONS[attn_layer].pyramid_options, **attn_kwargs}
        heads = to_ntuple(len(embed_dims))(num_heads)
        for dim, stage_heads in zip(embed_dims, heads, strict=True):
            check_heads(dim, stage_heads)
        super().__init__(
            embed_dims=embed_dims,
            num_heads=heads,
            sr_ratios=(1,) * len(embed_dims),
            qkv_bias=qkv_bias,
            proj_drop_rate=proj_drop_rate,
            **kwargs,
            **dd,
        )
        stage: Any  # Module says nothing of what it holds
        for i, (stage, feat_size) in enumerate(zip(self.stages, self._feat_sizes(img_size or 224), strict=True)):
            last = i == len(self.stages) - 1
            layer = attention_layer('softmax') if last else attention_layer(attn_layer, feat_size, **attn_kwargs)
            for block in stage.blocks:
                block.attn = layer(
                    embed_dims[i], heads[i], qkv_bias=qkv_bias, attn_drop=attn_drop_rate, proj_drop=proj_drop_rate, **dd
                )
                block.attn.apply(self._init_weights)
                block.mlp = FusedMlpWithDepthwiseConv(block.mlp)
        self.nominal_size = to_2tuple(img_size or 224)
        if img_size is not None:
            self.set_input_size(img_size)

    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialise all parameters and buffers, as for a model that came empty from the meta device."""
        for module in self.modules():
            reset = getattr(module, 'reset_parameters', None)
            if needs_reset and reset is not None:
                reset()
            self._init_weights(module)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images `(B, in_chans, height, width)` to the last stage's map `(B, C, H, W)`."""
        fix_image_size(x)
        return self.stages(self.patch_embed(x))

    def _feat_sizes(self, img_size: Union[int, Tuple[int, int]]) -> List[List[int]]:
        """Grid of tokens of each stage."""
        return [[-(-size // info['reduction']) for size in to_2tuple(img_size)] for info in self.feature_info]

    @torch.jit.ignore
    def set_input_size(self, img_size: Union[int, Tuple[int, int]]) -> None:
        """Record the nominal image size (height, width) for data configuration.

        Weights depend on it only with an attention that is made for one grid, whose weights are fitted to the new one.
        """
        for stage, feat_size in zip(self.stages, self._feat_sizes(img_size), strict=True):
            for attn in stage.modules():
                if isinstance(attn, GridAttention) and attn.fixed_grid:
                    attn.set_feat_size(feat_size)
        self.nominal_size = to_2tuple(img_size)
        update_model_input_size(self, img_size)

    @torch.jit.ignore
    def block_grid(self, name: str) -> List[int]:
        """Size of the token grid that a submodule `stages.S.…` sees, at the model's nominal image size."""
        return self._feat_sizes(self.nominal_size)[int(name.split('.')[1])]

    @torch.jit.ignore
    def resample_weights(self, state_dict: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
        """A state dict as it is: no embedding of a pyramid follows the size of images or patches."""
        return state_dict


checkpoint_filter_fn = pretrained_filter  # the name that timm's own files have for it


def _create_eva_pvt_v2(name: str, pretrained: bool = False, **kwargs: Any) -> GridPyramidVisionTransformerV2:
    feature_cfg = dict(flatten_sequential=True, out_indices=kwargs.pop('out_indices', (0, 1, 2, 3)))
    return build_grid_model(GridPyramidVisionTransformerV2, name, pretrained, feature_cfg=feature_cfg, **kwargs)


def _describe(size: Variant, attention: str) -> str:
    return (
        f'{size.title} with {attention} in stages 1-3 and softmax in stage 4; head dim 32, 3,136 tokens in stage 1 at '
        '224 × 224.'
    )


VARIANTS = {
    'pvt_v2_b3': variant(
        'PVT-v2-b3', 'pvt_v2_b3', depths=(3, 4, 18, 3), embed_dims=(64, 128, 320, 512), num_heads=(2, 4, 10, 16)
    ),
}

default_cfgs = grid_cfgs(VARIANTS, pool_size=(7, 7))

register_family(_create_eva_pvt_v2, VARIANTS, _describe)
