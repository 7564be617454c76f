"""A ViT that reads its pixels as a sequence, for train.py and validate.py in the process that imports this."""

from timm import create_model
from timm.models import register_model

from evavit.layers import EvaAttention1d

__all__ = []  # `register_model` adds to it


class RasterEva(EvaAttention1d):
    """EVA on the tokens of a grid one row after the other, as if there were no grid."""

    def forward(self, x, feat_size):
        return super().forward(x)


@register_model
def raster_eva_deit_tiny(pretrained=False, *, window_size=128, cell_size=16, **kwargs):
    """`softmax_deit_tiny` with `RasterEva` in every block; the same arguments, and those of `EvaAttention1d`.

    `cell_size` 0 is attention inside of chunks alone.
    """
    model = create_model('softmax_deit_tiny', pretrained=pretrained, **kwargs)
    for block in model.blocks:
        attn = block.attn
        block.attn = RasterEva(
            attn.qkv.in_features,
            attn.num_heads,
            window_size=window_size,
            cell_size=cell_size,
            attn_drop=attn.attn_drop.p,
            proj_drop=attn.proj_drop.p,
        )
    model.init_weights()
    return model
