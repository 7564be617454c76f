"""DeiT with an attention that sees the token grid: EVA and the attentions it is compared with

Papers:
  * `Efficient Attention via Control Variates` - https://arxiv.org/abs/2302.04542 (settings: Appendix E.2)
  * `Training data-efficient image transformers & distillation through attention` - https://arxiv.org/abs/2012.12877

The model is timm's VisionTransformer, by default without a class token and with mean pooling after the final LayerNorm.
Two additions connect it to an attention that needs the grid:

  * `GridBlock` hands `feat_size` on to its attention: `block(x, feat_size)`, as the blocks of timm's PVT do.
  * `GridVisionTransformer` knows `feat_size` after the patch embedding and passes it to every block.

A third is for speed: `PatchProjection` computes the patch embedding's convolution as a matrix product.

Tokens stay `(B, P + N, C)` between the blocks: P class and register tokens, for the attentions that take them, and the
grid. What does not fit a grid (patch dropout, attention masks) is refused.
"""

from typing import Any, Callable, Dict, List, Literal, Optional, Tuple, Type, Union

import torch
from timm.layers import LayerNorm, PatchEmbed, to_2tuple
from timm.models import checkpoint
from timm.models._features import feature_take_indices
from timm.models.vision_transformer import Block, VisionTransformer
from timm.models.vision_transformer import checkpoint_filter_fn as vit_checkpoint_filter_fn
from torch import nn
from torch.nn import functional as F

from evavit.layers import ATTENTIONS, FusedMlp, GridAttention, attention_layer, pop_attention_kwargs
from evavit.ops.grid import fix_image_size

from ._grid import GridModel, Variant, build_grid_model, grid_cfgs, register_family, variant, warn_of_cut
from ._weights import pretrained_filter

__all__ = ['GridBlock', 'GridPatchEmbed', 'GridVisionTransformer', 'PatchProjection']


class PatchProjection(nn.Conv2d):
    """A convolution of patches that do not overlap, `stride == kernel_size`, as one matrix product of all patches.

    Parameters and result are the convolution's: `(B, in_chans, height, width)` to `(B, C, H, W)`. Pixels at the right
    and bottom that do not fill a patch are left out. The output lies in memory as `(B, H, W, C)`, the order of the
    tokens. Convolutions of three channels are slow: cuDNN's takes 15 % of an inference of `eva_deit_tiny` on an H100.
    Another number of channels is an AssertionError, as another image size is in timm.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch._assert(
            x.shape[1] == self.in_channels,  # which torch.fx can trace
            f'Input channels ({x.shape[1]}) do not match the model ({self.in_channels}).',
        )
        ph, pw = self.kernel_size
        H, W = x.shape[2] // ph, x.shape[3] // pw
        x = x[:, :, : H * ph, : W * pw].reshape(x.shape[0], self.in_channels, H, ph, W, pw)
        x = x.permute(0, 2, 4, 1, 3, 5).flatten(3)
        return F.linear(x, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class GridPatchEmbed(PatchEmbed):
    """timm's PatchEmbed on a `PatchProjection`; arguments as there."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.proj = self._as_product(self.proj)

    def set_input_size(
        self,
        img_size: Optional[Union[int, Tuple[int, int]]] = None,
        patch_size: Optional[Union[int, Tuple[int, int]]] = None,
    ) -> None:
        """As in timm, which makes a new convolution for another patch size."""
        super().set_input_size(img_size, patch_size)
        self.proj = self._as_product(self.proj)

    @staticmethod
    def _as_product(conv: nn.Conv2d) -> nn.Conv2d:
        if isinstance(conv, PatchProjection):
            return conv
        size = (conv.kernel_size[0], conv.kernel_size[1])
        bias = conv.bias is not None
        proj = PatchProjection(conv.in_channels, conv.out_channels, size, size, bias=bias, device='meta')
        proj.weight, proj.bias = conv.weight, conv.bias
        return proj.train(conv.training)


class GridBlock(Block):
    """timm's pre-norm block around an attention that takes `feat_size`.

    Args:
        dim: Channels C.
        num_heads: Attention heads.
        attn_layer: Makes the attention, `attn_layer(dim, num_heads, qkv_bias=..., ...)`; its `forward(x, feat_size)`.
        qk_norm: Normalise single queries and keys.
        scale_attn_norm: Normalise the output of the attention before its projection.
        norm_layer: Makes these norms and those of the block.
        mlp_layer: Makes the MLP, with the arguments of timm's Mlp.
        **kwargs: Further arguments of timm's Block.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        attn_layer: Callable[..., nn.Module],
        qkv_bias: bool = False,
        qk_norm: bool = False,
        scale_attn_norm: bool = False,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: Type[nn.Module] = LayerNorm,
        mlp_layer: Type[nn.Module] = FusedMlp,
        device: Optional[torch.device] = None,
        dtype: Optional[torch.dtype] = None,
        **kwargs: Any,
    ) -> None:
        dd: Dict[str, Any] = {'device': device, 'dtype': dtype}
        # nn.Identity takes any arguments: no softmax attention is made only to be thrown away.
        super().__init__(
            dim,
            num_heads,
            attn_layer=nn.Identity,
            proj_bias=proj_bias,
            proj_drop=proj_drop,
            norm_layer=norm_layer,
            mlp_layer=mlp_layer,
            **kwargs,
            **dd,
        )
        self.attn = attn_layer(
            dim,
            num_heads,
            qkv_bias=qkv_bias,
            qk_norm=qk_norm,
            scale_norm=scale_attn_norm,
            norm_layer=norm_layer,
            proj_bias=proj_bias,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
            **dd,
        )

    # The grid stands where timm's blocks take a mask. No reason after the comment below: TorchScript would not read it.
    def forward(self, x: torch.Tensor, feat_size: List[int]) -> torch.Tensor:  # type: ignore[override]
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), feat_size)))
        x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return x


class GridVisionTransformer(GridModel, VisionTransformer):
    """timm's VisionTransformer whose blocks see the token grid; any image size with `dynamic_img_size`.

    Args:
        attn_layer: Name of the attention, a key of `evavit.layers.ATTENTIONS`.
        global_pool: 'avg', 'avgmax', 'max', 'token', 'map', 'prr' or ''.
        fc_norm: Final LayerNorm after the pooling instead of before it.
        class_token: Have a class token, for 'eva', 'local' and 'softmax'; global_pool='token' reads it.
        reg_tokens: Register tokens, likewise.
        patch_drop_rate: Refused above 0: the tokens that are left would not form a grid.
        dynamic_img_size: Take images of any size, with the position embedding resampled on the fly.
        dynamic_img_pad: Pad images to whole patches. By default on with dynamic_img_size.
        img_size: Image size, height and width or one number for both.
        patch_size: Patch size, likewise; their quotient is the grid.
        embed_layer: The patch embedding, called as timm's PatchEmbed.
        mlp_layer: The MLP of a block; timm's, with fused kernels where they can run, by default.
        **kwargs: Options of the attention (for EVA: window_size, partition_grid, proposal_scale, noise_std,
            rel_pos_bias; see the classes in `evavit.layers`) and further arguments of timm's VisionTransformer.
    """

    def __init__(
        self,
        *,
        attn_layer: str = 'eva',
        global_pool: Literal['', 'avg', 'avgmax', 'max', 'token', 'map', 'prr'] = 'avg',
        fc_norm: Optional[bool] = False,
        class_token: bool = False,
        reg_tokens: int = 0,
        patch_drop_rate: float = 0.0,
        dynamic_img_size: bool = False,
        dynamic_img_pad: Optional[bool] = None,
        img_size: Union[int, Tuple[int, int]] = 224,
        patch_size: Union[int, Tuple[int, int]] = 16,
        embed_layer: Callable[..., nn.Module] = GridPatchEmbed,
        mlp_layer: Type[nn.Module] = FusedMlp,
        **kwargs: Any,
    ) -> None:
        if patch_drop_rate:
            raise ValueError(
                f'patch_drop_rate={patch_drop_rate} breaks the grid of tokens that windows and cells are cut from; '
                f'leave it out'
            )
        attn_kwargs = pop_attention_kwargs(attn_layer, kwargs)
        if dynamic_img_size and ATTENTIONS[attn_layer].fixed_grid:
            raise ValueError(
                f'dynamic_img_size=True: the attention {attn_layer!r} is made for one size of image; '
                f'leave it out and give img_size'
            )
        tokens = int(class_token) + reg_tokens
        prefix = dict(num_prefix_tokens=tokens) if tokens else {}
        feat_size = [size // patch for size, patch in zip(to_2tuple(img_size), to_2tuple(patch_size), strict=True)]
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            embed_layer=embed_layer,
            attn_layer=attention_layer(attn_layer, feat_size, **prefix, **attn_kwargs),
            block_fn=GridBlock,
            mlp_layer=mlp_layer,
            global_pool=global_pool,
            fc_norm=fc_norm,
            class_token=class_token,
            reg_tokens=reg_tokens,
            dynamic_img_size=dynamic_img_size,
            dynamic_img_pad=dynamic_img_size if dynamic_img_pad is None else dynamic_img_pad,
            **kwargs,
        )
        # nn.Sequential would call a block with the tokens alone.
        self.blocks = nn.ModuleList(self.blocks)  # type: ignore[assignment]  # timm's is an nn.Sequential

    @torch.jit.ignore
    def set_input_size(
        self,
        img_size: Optional[Union[int, Tuple[int, int]]] = None,
        patch_size: Optional[Union[int, Tuple[int, int]]] = None,
    ) -> None:
        """Change the size of the images or the patches; what depends on the grid is resampled to the new one."""
        super().set_input_size(
            img_size=None if img_size is None else to_2tuple(img_size),
            patch_size=None if patch_size is None else to_2tuple(patch_size),
        )
        warn_of_cut(self)
        for attn in self.modules():
            if isinstance(attn, GridAttention) and attn.fixed_grid:
                attn.set_feat_size(list(self.patch_embed.grid_size))

    @torch.jit.ignore
    def block_grid(self, name: str) -> List[int]:
        """Size of the token grid that a submodule sees, at the model's own image size."""
        return list(self.patch_embed.grid_size)

    @torch.jit.ignore
    def resample_weights(self, state_dict: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
        """Resample the patch and position embeddings of a state dict to this model's patches and grid."""
        return vit_checkpoint_filter_fn(state_dict, self)

    def _embed(self, x: torch.Tensor) -> Tuple[torch.Tensor, List[int]]:
        """Images to tokens `(B, P + N, C)` with position, and the size of their grid."""
        fix_image_size(x)
        x = self.patch_embed(x)
        if self.dynamic_img_size:
            feat_size = [x.shape[1], x.shape[2]]
        else:
            feat_size = [self.patch_embed.grid_size[0], self.patch_embed.grid_size[1]]
        return self.norm_pre(self._pos_embed(x)), feat_size

    # None of these takes timm's mask, and with it `is_causal`.
    def forward_features(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Images `(B, in_chans, height, width)` to normalised tokens `(B, P + N, C)`."""
        x, feat_size = self._embed(x)
        for blk in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(blk, x, feat_size)
            else:
                x = blk(x, feat_size)
        return self.norm(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(  # type: ignore[override]
        self,
        x: torch.Tensor,
        indices: Optional[Union[int, List[int]]] = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Optional[torch.Tensor] = None,
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]], Dict[str, Any]]:
        """Features of chosen blocks on the way to the final ones; timm's interface.

        Args:
            x: Images `(B, in_chans, height, width)`.
            indices: The last n blocks if an int, all if None, or the blocks themselves.
            return_prefix_tokens: Return pairs of intermediates and their class and register tokens `(B, P, C)`.
            norm: Apply the final norm to the intermediates.
            stop_early: Run no block after the last one asked for.
            output_fmt: 'NCHW' for maps, 'NLC' for tokens.
            intermediates_only: Return the list of intermediates alone.
            output_dict: Return a dictionary with 'image_features', 'image_intermediates' and, with
                return_prefix_tokens, 'image_intermediates_prefix'.
            attn_mask: Refused.

        Returns:
            (final features `(B, P + N, C)`, intermediates of the grid), or as the flags say.
        """
        assert output_fmt in ('NCHW', 'NLC'), 'Output format must be one of NCHW or NLC.'
        assert attn_mask is None, 'These attentions take no mask.'
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)

        x, feat_size = self._embed(x)
        blocks = self.blocks[: max_index + 1] if stop_early and not torch.jit.is_scripting() else self.blocks
        intermediates = []
        for i, blk in enumerate(blocks):
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(blk, x, feat_size)
            else:
                x = blk(x, feat_size)
            if i in take_indices:
                intermediates.append(self.norm(x) if norm else x)
        prefix_tokens = [y[:, : self.num_prefix_tokens] for y in intermediates]
        intermediates = [y[:, self.num_prefix_tokens :] for y in intermediates]
        if output_fmt == 'NCHW':
            intermediates = [y.transpose(1, 2).unflatten(2, feat_size).contiguous() for y in intermediates]

        if output_dict:
            result = {'image_intermediates': intermediates}
            if self.num_prefix_tokens and return_prefix_tokens:
                result['image_intermediates_prefix'] = prefix_tokens
            if not intermediates_only:
                result['image_features'] = self.norm(x)
            return result
        if not torch.jit.is_scripting() and self.num_prefix_tokens and return_prefix_tokens:
            intermediates = list(zip(intermediates, prefix_tokens, strict=True))
        if intermediates_only:
            return intermediates
        return self.norm(x), intermediates


checkpoint_filter_fn = pretrained_filter  # the name that timm's own files have for it


def _create_eva_deit(name: str, pretrained: bool = False, **kwargs: Any) -> GridVisionTransformer:
    feature_cfg = dict(out_indices=kwargs.pop('out_indices', 3), feature_cls='getter')
    return build_grid_model(GridVisionTransformer, name, pretrained, feature_cfg=feature_cfg, **kwargs)


def _describe(size: Variant, attention: str) -> str:
    patch, more = size.model_args['patch_size'], ''
    if size.model_args.get('class_token'):
        more = f' and a class token and {size.model_args["reg_tokens"]} registers'
    return f'{size.title} with {attention}: {(224 // patch) ** 2} tokens (patch {patch}){more} at 224 × 224.'


# timm's vit_*_patch14_reg4_dinov2. Their attentions take class and register tokens.
_REG4 = dict(patch_size=14, class_token=True, reg_tokens=4, no_embed_class=True, global_pool='token', init_values=1e-5)
_REG4_TWIN = dict(img_size=224, class_token=True, global_pool='token')

VARIANTS = {
    'deit_tiny': variant('DeiT-Tiny', 'deit_tiny_patch16_224', patch_size=16, embed_dim=192, depth=12, num_heads=3),
    'deit_small': variant('DeiT-Small', 'deit_small_patch16_224', patch_size=16, embed_dim=384, depth=12, num_heads=6),
    'deit_tiny_784': variant(
        'DeiT-Tiny-784', 'deit_tiny_patch16_224', dict(patch_size=8), patch_size=8, embed_dim=192, depth=12, num_heads=3
    ),
    'deit_base': variant('DeiT-Base', 'deit_base_patch16_224', patch_size=16, embed_dim=768, depth=12, num_heads=12),
    'deit3_large': variant(
        'DeiT III-Large',
        'deit3_large_patch16_224',
        patch_size=16,
        embed_dim=1024,
        depth=24,
        num_heads=16,
        init_values=1e-6,
    ),
    'vit_base_patch14_reg4': variant(
        'ViT-Base/14', 'vit_base_patch14_reg4_dinov2', _REG4_TWIN, embed_dim=768, depth=12, num_heads=12, **_REG4
    ),
    'vit_large_patch14_reg4': variant(
        'ViT-Large/14', 'vit_large_patch14_reg4_dinov2', _REG4_TWIN, embed_dim=1024, depth=24, num_heads=16, **_REG4
    ),
}

default_cfgs = grid_cfgs(VARIANTS, fixed_input_size=True)

register_family(_create_eva_deit, VARIANTS, _describe, softmax_args=dict(class_token=False, global_pool='avg'))
