"""The grid that the stem of one of timm's vision transformers makes of an image.

timm's `PatchEmbed` says it itself. Its `HybridEmbed` does not: it takes images of any size, and its `dynamic_feat_size`
rounds down where convolutions round up.
"""

import copy
from typing import Any, Callable, Dict, List, Optional, Tuple

import torch
from timm.layers import HybridEmbed, PatchEmbed
from torch import nn

from evavit.ops.grid import static_size

__all__ = ['grid_size', 'stem_rounding']

FAR = 1 << 16  # pixels, of tensors without memory


def grid_size(stem: Any, images: torch.Tensor, rounding: Optional[Tuple[int, int]], dynamic: bool) -> List[int]:
    """Height and width in tokens of what `stem` makes of `(B, C, height, width)`.

    Args:
        stem: The model's `patch_embed`.
        images: What it is given.
        rounding: From `stem_rounding`.
        dynamic: The model was made for images of any size.

    Raises:
        ValueError: one line: a stem of another kind, and images that are not of its own size.
    """
    stem = getattr(stem, '_orig_mod', stem)  # of torch.compile
    own: Optional[Tuple[int, int]] = getattr(stem, 'img_size', None)
    of_patches = type(stem).forward is PatchEmbed.forward
    if of_patches and stem.strict_img_size and own is not None:  # the stem refuses others itself
        return list(stem.dynamic_feat_size(own))
    height, width = static_size(list(images.shape[-2:]))
    if of_patches:
        return list(stem.dynamic_feat_size((height, width)))
    if type(stem).forward is HybridEmbed.forward and rounding is not None:
        add, stride = rounding
        patch = (1, 1) if isinstance(stem.proj, nn.Identity) else stem.patch_size
        rows = [(side + add) // stride for side in (height, width)]
        return [-(-n // p) if stem.dynamic_img_pad else n // p for n, p in zip(rows, patch, strict=True)]
    if own is not None and (height, width) == tuple(own):
        return list(stem.grid_size)
    if dynamic and not isinstance(stem, HybridEmbed) and hasattr(stem, 'dynamic_feat_size'):
        return list(stem.dynamic_feat_size((height, width)))
    raise ValueError(
        f'images of {height} × {width}: {type(stem).__name__} does not say what grid it makes of them; call '
        f"model.set_input_size(({height}, {width})) before, or give images of the model's own size, {own}"
    )


def stem_rounding(stem: Any) -> Optional[Tuple[int, int]]:
    """(add, stride): the network before a `HybridEmbed` makes `(side + add) // stride` rows and columns of an image's.

    Layers that pad and stride come to this form one after another, whichever way each rounds. The numbers are found by
    passes of a copy without memory. None for a stem that is no such network, such as one that pools to a fixed size.
    """
    stem = getattr(stem, '_orig_mod', stem)
    if type(stem).forward is not HybridEmbed.forward:
        return None
    try:
        rows = _rows_of(stem)
        start = max(stem.img_size)
        low, far = rows(start, start + FAR)
        stride = round(FAR / (far - low))
        for add in (stride - 1, 0, *range(1, stride - 1)):  # up and down first, as nearly all networks round
            first = (low + 1) * stride - add  # side with one row more
            sides = (start, start + FAR), (first - 1, first), (first, first - 1), (first + FAR, first + FAR - 1)
            if all(rows(*pair) == tuple((side + add) // stride for side in pair) for pair in sides):
                return add, stride
    except Exception:  # networks that ask tensors for values, or have other shapes; `grid_size` says so
        pass
    return None


def _rows_of(stem: Any) -> Callable[[int, int], Tuple[int, ...]]:
    """A function from the size of images to that of the features before the stem's projection."""
    tensors: List[torch.Tensor] = [*stem.backbone.parameters(), *stem.backbone.buffers()]
    memo: Dict[int, torch.Tensor] = {}
    for tensor in tensors:
        without = torch.empty_like(tensor, device='meta')
        memo[id(tensor)] = nn.Parameter(without, False) if isinstance(tensor, nn.Parameter) else without
    network = copy.deepcopy(stem.backbone, memo).eval()
    for module in network.modules():
        module._forward_hooks.clear()  # which are the user's, for passes of images
        module._forward_pre_hooks.clear()
    dtype = next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), torch.float32)

    @torch.no_grad()
    def rows(height: int, width: int) -> Tuple[int, ...]:
        features: Any = network(torch.empty(1, stem.in_chans, height, width, device='meta', dtype=dtype))
        return tuple((features[-1] if isinstance(features, (list, tuple)) else features).shape[-2:])

    return rows
