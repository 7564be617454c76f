"""What a model looks at: `attention_maps` gives the weights of its attention, `overlay_attention` draws them.

In EVA no weight belongs to a single token outside of a query's window. A cell has one, and its control variate shares
it out among the tokens of the cell; see `evavit.ops.rows`. The maps hold what each token gets in this way.
"""

import contextlib
import math
import threading
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from PIL import Image, ImageDraw
from timm.layers import Attention, AttentionRope
from timm.models._features import FeatureGetterNet
from timm.models.beit import Attention as BeitAttention
from timm.models.eva import EvaAttention as TimmEvaAttention
from timm.models.vision_transformer_relpos import RelPosAttention
from timm.utils import unwrap_model
from torch import nn

from evavit.arguments import check_type, shown
from evavit.layers import EvaAttention1d, GridAttention
from evavit.layers.converted import given_tokens
from evavit.models._grid import warn_of_cut

__all__ = ['AttentionMap', 'attention_maps', 'attention_rollout', 'overlay_attention']

Layer = Union[int, str]
Query = Union[str, int, Sequence[int], Tuple[int, int]]

_ONE_CALL = threading.RLock()  # hooks and modes are of modules, which models and threads may share

# timm's softmax attentions, which hand their weights `(B, h, T, T)` to `attn_drop` where they are not fused.
_SOFTMAX = (Attention, AttentionRope, BeitAttention, RelPosAttention, TimmEvaAttention)


class AttentionMap(NamedTuple):
    """The weights of one layer.

    Attributes:
        name: Of the layer in the model, such as 'blocks.3.attn'.
        rows: `(B, h, Q, P + N)`: of each query for each token, prefix tokens first, then the grid's.
        queries: Numbers of the Q tokens that the rows are of; none of them for a mean.
        feat_size: The grid (H, W), N = H·W.
        num_prefix_tokens: P, class and register tokens.
        grid: The weights of the grid's tokens, `(B, h, Q, H, W)`.
    """

    name: str
    rows: torch.Tensor
    queries: Tuple[int, ...]
    feat_size: Tuple[int, int]
    num_prefix_tokens: int

    @property
    def grid(self) -> torch.Tensor:
        """The weights of the grid's tokens, `(B, h, Q, H, W)`, without those of prefix tokens."""
        return self.rows[..., self.num_prefix_tokens :].unflatten(-1, self.feat_size)


def attention_maps(
    model: nn.Module,
    images: torch.Tensor,
    *,
    layer: Union[Layer, Sequence[Layer], None] = None,
    query: Optional[Query] = None,
) -> List[AttentionMap]:
    """The effective attention of a model's layers and heads: what each token weighs in what a query gets.

    Times the values of the tokens, the rows are the output of the attention, to rounding. They are those of evaluation,
    without noise and dropout, in the dtype of the model. Rows of EVA, softmax and most other attentions add up to 1;
    those of Nyströmformer and Linformer do not, and have weights below 0.

    Takes the models of this package, those of `evavit.convert_vit`, and timm's ViTs with softmax attention (classes
    VisionTransformer, Eva, Beit and VisionTransformerRelPos). One pass of the images, and a backward pass through each
    attention for as many rows as its heads have channels. Calls from several threads wait for one another, and
    other threads may call the model meanwhile, but find it in evaluation mode.

    Args:
        model: The model, also compiled or in DistributedDataParallel; its mode and its gradients stay as they are.
        images: `(B, C, height, width)`, prepared for the model, on its device.
        layer: Which layers: a number, also from the end (-1), a name such as 'stages.0.blocks.1.attn', or several of
            them. None for all.
        query: Whose attention: 'class' for the class token's; 'mean' for the mean over the tokens of the grid, one row,
            which takes no more than that at any size; a token's number, or a list of them, where prefix tokens
            come first; a tuple (y, x) for the token of the grid that has this pixel of the images. None for all tokens,
            which is `(B, h, N, N)` numbers a layer.

    Returns:
        One `AttentionMap` a layer, in the model's order.

    Raises:
        ValueError: one line: no such layer or query, a model or an attention that has no such weights.
        TypeError: one line: an argument of another type, such as a picture for a tensor.
    """
    check_type(model, nn.Module, 'model must be a torch.nn.Module, such as timm.create_model makes')
    rule = 'images must be a tensor (batch, channels, height, width), such as timm.data.create_transform makes'
    check_type(images, torch.Tensor, rule)
    check_type(layer, (type(None), int, str, list, tuple), 'layer must be a number, a name or a list of them')
    kinds = (type(None), str, int, list, tuple)
    check_type(query, kinds, "query must be 'class', 'mean', a number, a list of numbers or a pixel (y, x)")
    model = unwrap_model(model)
    inner = model.model if isinstance(model, FeatureGetterNet) else model
    layers = _find_layers(model)
    names = _choose(list(layers), layer)
    if images.dim() != 4:
        raise ValueError(f'images must be (batch, channels, height, width), got shape {list(images.shape)}')
    if query == 'class' and getattr(inner, 'cls_token', None) is None:
        raise ValueError(
            f"query 'class': {type(inner).__name__} has no class token; give 'mean' for the mean over its tokens"
        )
    warn_of_cut(inner)
    found: Dict[str, AttentionMap] = {}
    caller = threading.get_ident()

    def of_this_call(look: Callable[..., None]) -> Callable[..., None]:
        return lambda *args: look(*args) if threading.get_ident() == caller else None

    with _ONE_CALL:
        modules = list(model.modules())
        modes, fused = [m.training for m in modules], {}
        hooks = []
        try:
            for name in names:
                module: Any = layers[name]
                if isinstance(module, GridAttention):
                    look = _look_at_grid(name, inner, images, query, found)
                    hooks.append(module.register_forward_pre_hook(of_this_call(look), with_kwargs=True))
                else:
                    fused[module], module.fused_attn = module.fused_attn, False
                    look = _look_at_softmax(name, inner, images, query, found)
                    hooks.append(module.attn_drop.register_forward_hook(of_this_call(look)))
            model.eval()
            with torch.no_grad(), _eager(modules):
                model(images)
        finally:
            for hook in hooks:
                hook.remove()
            for module, was in fused.items():
                module.fused_attn = was
            for module, mode in zip(modules, modes, strict=True):
                module.training = mode
    missing = [name for name in names if name not in found]
    if missing:
        raise ValueError(f'{missing[0]} was not called for these images; leave it out of layer')
    return [found[name] for name in names]


@contextlib.contextmanager
def _eager(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Parts that are compiled run as they are written: what was compiled before does not call hooks that came since."""
    kept = [(module, dict(module.__dict__)) for module in modules if _is_compiled(module)]
    try:
        for module, _ in kept:
            module.__dict__['_compiled_call_impl'] = None  # of `module.compile()`
            if '_orig_mod' in module._modules:
                module.__dict__['forward'] = module._modules['_orig_mod']
        yield
    finally:
        for module, before in kept:
            for name in ('_compiled_call_impl', 'forward'):
                module.__dict__.pop(name, None)
                module.__dict__.update({name: before[name]} if name in before else {})


def _is_compiled(module: nn.Module) -> bool:
    return module.__dict__.get('_compiled_call_impl') is not None or '_orig_mod' in module._modules


def _find_layers(model: nn.Module) -> Dict[str, nn.Module]:
    """The attentions that can be asked, by name."""
    layers: Dict[str, nn.Module] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (GridAttention, *_SOFTMAX)) and not isinstance(module, EvaAttention1d)
    }
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no attention that can be asked for its weights; this package's models, those "
            f"of evavit.convert_vit and timm's ViTs with softmax attention have one"
        )
    return layers


def _choose(names: List[str], layer: Union[Layer, Sequence[Layer], None]) -> List[str]:
    if layer is None:
        return names
    if not isinstance(layer, (int, str)) and not layer:
        raise ValueError('layer [] names no layer; leave it out for all')
    chosen = set()
    for one in [layer] if isinstance(layer, (int, str)) else layer:
        if type(one) is int and -len(names) <= one < len(names):
            chosen.add(names[one])
        elif one in names:
            chosen.add(str(one))
        else:
            raise ValueError(
                f'layer {one!r}: the model has {len(names)} layers that can be asked, 0 to {len(names) - 1}, by name '
                f'{names[0]} to {names[-1]}'
            )
    return [name for name in names if name in chosen]


def _is_pixel(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(isinstance(part, (int, float)) for part in value)


def _place(model: Any, pixel: Tuple[int, int], feat_size: Tuple[int, int], images: torch.Tensor) -> Tuple[int, ...]:
    """Row and column of the token of a grid that has a pixel. Images that patches do not divide are padded, or lose
    their last rows and columns: the grid's share of them is not their own."""
    embed: Any = getattr(model, 'patch_embed', None)
    sides = images.shape[-2:]
    if hasattr(embed, 'feat_ratio'):
        steps = embed.feat_ratio(as_scalar=False)
    else:  # a stage of a pyramid, which halves the grid before it, rounded up
        steps = [2 ** math.ceil(math.log2(side / count)) for side, count in zip(sides, feat_size, strict=True)]
    place = tuple(int(at // step) for at, step in zip(pixel, steps, strict=True))
    if any(at >= count for at, count in zip(place, feat_size, strict=True)):
        seen = ' × '.join(str(count * step) for count, step in zip(feat_size, steps, strict=True))
        raise ValueError(f'query {pixel!r}: no patch has this pixel; the model sees {seen} of {sides[0]} × {sides[1]}')
    return place


def _numbers(
    model: Any,
    query: Optional[Query],
    feat_size: Tuple[int, int],
    num_prefix_tokens: int,
    images: torch.Tensor,
) -> List[int]:
    """Numbers of the tokens that a query means, in a layer with this grid; none for their mean."""
    (H, W), P = feat_size, num_prefix_tokens
    if query == 'mean':
        return []
    if query is None:
        return list(range(P + H * W))
    if query == 'class':
        if P == 0:
            raise ValueError("query 'class': a layer sees no class token; choose other layers, or another query")
        return [0]
    if isinstance(query, tuple):
        height, width = images.shape[-2:]
        if not _is_pixel(query) or not (0 <= query[0] < height and 0 <= query[1] < width):
            raise ValueError(f'query {query!r}: a tuple is a pixel (y, x) of images of {height} × {width}')
        row, column = _place(model, query, feat_size, images)
        return [P + row * W + column]
    numbers = [query] if isinstance(query, int) else query
    if isinstance(numbers, str) or not all(type(n) is int and 0 <= n < P + H * W for n in numbers) or not numbers:
        raise ValueError(
            f"query {query!r}: takes 'class', 'mean', a pixel (y, x), or numbers of tokens, here 0 to {P + H * W - 1}"
        )
    return list(numbers)


def _look_at_grid(
    name: str, model: Any, images: torch.Tensor, query: Optional[Query], found: Dict[str, AttentionMap]
) -> Any:
    """A hook that asks an attention of this package before it is called."""

    def look(layer: Any, args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> None:
        x, (H, W), rope = given_tokens(layer, args, kwargs)
        feat_size, P = (H, W), layer.num_prefix_tokens
        numbers = _numbers(model, query, feat_size, P, images)
        queries = torch.tensor(numbers)
        if not numbers:
            queries = torch.cat([torch.zeros(1, P), torch.full((1, H * W), 1 / (H * W))], 1)
        rows = layer.attention_rows(x, [H, W], rope, queries)
        found[name] = AttentionMap(name, rows, tuple(numbers), feat_size, P)

    return look


def _look_at_softmax(
    name: str, model: Any, images: torch.Tensor, query: Optional[Query], found: Dict[str, AttentionMap]
) -> Callable[..., None]:
    """A hook that takes the weights that an attention of timm's hands to its dropout."""

    def look(dropout: nn.Module, args: Tuple[Any, ...], weights: torch.Tensor) -> None:
        P = getattr(model, 'num_prefix_tokens', 0)
        embed: Any = getattr(model, 'patch_embed', None)
        size = embed.dynamic_feat_size(tuple(images.shape[-2:])) if hasattr(embed, 'dynamic_feat_size') else (0, 0)
        feat_size, T = (int(size[0]), int(size[1])), P + math.prod(size)
        if tuple(weights.shape[-2:]) != (T, T) or weights.shape[0] != len(images):
            raise ValueError(
                f'{name}: its weights {list(weights.shape)} are not those of all tokens of a grid, which '
                f'{type(model).__name__} would have to say the size of'
            )
        numbers = _numbers(model, query, feat_size, P, images)
        rows = weights[:, :, numbers] if numbers else weights[:, :, P:].mean(2, keepdim=True)
        found[name] = AttentionMap(name, rows, tuple(numbers), feat_size, P)

    return look


def attention_rollout(maps: Sequence[AttentionMap]) -> AttentionMap:
    """Attention through all layers: what each token of the image weighs in a token after the last one.

    A layer mixes tokens by the mean of its heads' weights A and hands each one on beside that: the product over layers
    of ½ (A + I). Paper: `Quantifying Attention Flow in Transformers`, Abnar and Zuidema, 2020 -
    https://arxiv.org/abs/2005.00928

    Args:
        maps: Of all layers, from `attention_maps(model, images)`.

    Returns:
        A map with one head, `rows` of shape `(B, 1, P + N, P + N)`, whose rows add up to 1.

    Raises:
        ValueError: one line: rows are missing, grids differ as in a pyramid, or weights are not those of an average.
        TypeError: what is given is not a list of maps.
    """
    if isinstance(maps, AttentionMap) or not all(isinstance(one, AttentionMap) for one in maps):
        raise TypeError('maps must be the list that attention_maps gives, of all layers')
    if not maps:
        raise ValueError('a rollout needs the maps of all layers, got none')
    T = maps[0].rows.shape[-1]
    product = torch.eye(T, device=maps[0].rows.device, dtype=torch.float32)
    for one in maps:
        if one.feat_size != maps[0].feat_size or one.rows.shape[-1] != T:
            raise ValueError(
                f'{one.name} has a grid of {one.feat_size}, {maps[0].name} one of {maps[0].feat_size}: a rollout needs '
                f'layers on one grid; give it those of one stage of a pyramid'
            )
        if one.queries != tuple(range(T)):
            raise ValueError(f'{one.name}: a rollout needs the rows of all tokens; leave query out of attention_maps')
        rows = one.rows.float().mean(1)
        if rows.min() < -1e-3 or (rows.sum(-1) - 1).abs().max() > 0.05:
            raise ValueError(
                f'{one.name}: its rows are no averages (they do not add up to 1, or have weights below 0), of which '
                f'alone a rollout makes sense'
            )
        product = 0.5 * (rows @ product + product)
    return maps[-1]._replace(name='rollout', rows=product.unsqueeze(1))


# Colours from no weight to the largest one, near matplotlib's `inferno`, which few have installed with PyTorch.
_COLOURS = np.array([(0, 0, 4), (66, 10, 104), (147, 38, 103), (221, 81, 58), (252, 165, 10), (252, 255, 164)])


def overlay_attention(
    picture: Image.Image, weights: torch.Tensor, *, opacity: float = 0.6, mark: Optional[Tuple[int, int]] = None
) -> Image.Image:
    """A picture under the weights of its parts, bright where they are large.

    Args:
        picture: What the model saw, of any size and any mode of 8 bits: the part that its transform leaves, and of that
            what lies in patches, where they do not divide it.
        weights: `(H, W)`, at least 0, such as `attention_maps(...)[-1].grid[0, :, 0].mean(0)`. The largest is the
            brightest.
        opacity: Of the colours, 0 to 1.
        mark: A pixel (y, x) to draw a ring around, such as the query's.

    Returns:
        An RGB picture of the same size.

    Raises:
        ValueError: weights of another shape, below 0 or not finite; an opacity outside 0 to 1; a mark that is no pixel
            of the picture; a picture of 16 or 32 bits, or without pixels.
        TypeError: no picture of Pillow's, or weights that are no tensor.
    """
    check_type(picture, Image.Image, "picture must be one of Pillow's, such as Image.open(FILE)")
    check_type(weights, torch.Tensor, 'weights must be a tensor (H, W), such as maps[-1].grid[0, :, 0].mean(0)')
    check_type(opacity, (int, float), 'opacity must be a number')
    width, height = picture.size
    if not width * height or picture.mode[0] in 'IF':
        raise ValueError(
            f'picture of mode {picture.mode}, {height} × {width}: must have pixels of 8 bits; of 16 bits give '
            f"Image.fromarray((np.asarray(picture) >> 8).astype('uint8'))"
        )
    if mark is not None and not (_is_pixel(mark) and 0 <= mark[0] < height and 0 <= mark[1] < width):
        raise ValueError(f'mark {shown(mark)}: must be a pixel (y, x) of the picture, which is {height} × {width}')
    if weights.dim() != 2 or not weights.numel():
        raise ValueError(f'weights must be one map (H, W), got shape {list(weights.shape)}; choose an image and a head')
    if not 0 <= opacity <= 1:
        raise ValueError(f'opacity must be 0 to 1, got {opacity}')
    values = weights.detach().float().cpu()
    if not values.isfinite().all() or values.min() < 0:
        raise ValueError('weights must be finite and at least 0; a map with others has no brightness')
    picture = picture.convert('RGB')
    levels = (values / values.max().clamp(min=torch.finfo(torch.float32).tiny)).numpy()
    large = np.asarray(Image.fromarray(levels).resize(picture.size, Image.Resampling.BICUBIC)).clip(0, 1)
    places = np.linspace(0, 1, len(_COLOURS))
    colours = np.stack([np.interp(large, places, channel) for channel in _COLOURS.T], -1)
    mixed = (1 - opacity) * np.asarray(picture, dtype=np.float32) + opacity * colours
    result = Image.fromarray(mixed.round().astype(np.uint8))
    if mark is not None:
        y, x = mark
        r = max(3, min(picture.size) // 40)
        ImageDraw.Draw(result).ellipse((x - r, y - r, x + r, y + r), outline='white', width=max(1, r // 3))
    return result
