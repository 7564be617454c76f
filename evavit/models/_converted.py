"""timm's vision transformers with their weights and tokens, on another attention: `convert_vit` and back.

A converted model is of a class derived from its own (`evavit.layers.converted.derive`). Nothing of timm's forward is
written again: the class hands the size of the grid on where timm hands a mask on, and timm's blocks bring it to the
attentions.
"""

import copy
import functools
import inspect
import logging
import math
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Set, Tuple, Union, cast

import numpy as np
import torch
from timm.layers import Attention, AttentionRope, DiffAttention
from timm.models import checkpoint
from timm.models._features import FeatureGetterNet
from timm.models.beit import Beit
from timm.models.eva import Eva, EvaBlock, EvaBlockPostNorm
from timm.models.eva import EvaAttention as TimmEvaAttention
from timm.models.naflexvit import NaFlexVit
from timm.models.vision_transformer import Block, ParallelThingsBlock, ResPostBlock, VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from evavit.arguments import nearest
from evavit.layers import ATTENTIONS, pop_attention_kwargs
from evavit.layers.attention import check_flags
from evavit.layers.converted import ConvertedAttention, Derived, GridSize, derive, revert_attention
from evavit.layers.eva import EvaAttention
from evavit.ops.grid import fix_image_size, static_size

from ._foreign import Moments, near_identity, normed_moments, projection_moments
from ._grid import GridModel, bias_tables, warn_of_cut
from ._stems import grid_size, stem_rounding

__all__ = ['ConvertedModel', 'convert_vit', 'revert_vit', 'why_not_converted']

_logger = logging.getLogger(__name__)

CELL = 3  # tokens a side of a cell, unless partition_grid says otherwise
MOST_CELLS = 16  # a side; 256 are what the fast kernels hold beside 16 prefix tokens


class ConvertedModel(Derived, nn.Module):
    """Stands before a class of timm's: hands the size of the grid on to the blocks where timm hands a mask on.

    `conversion` has the arguments that `convert_vit` makes the same model with again, `stem_rounding` what
    `_stems.stem_rounding` found.
    """

    conversion: Dict[str, Any]
    stem_rounding: Optional[Tuple[int, int]] = None

    def _grid(self, images: torch.Tensor, attn_mask: Any, is_causal: bool) -> GridSize:
        if attn_mask is not None or is_causal:
            raise ValueError(
                'attn_mask and is_causal: a converted model cuts windows and cells from whole images and takes no '
                'masks; leave them out, or use evavit.revert_vit(model)'
            )
        fix_image_size(images)
        model = cast(VisionTransformer, self)
        size = grid_size(model.patch_embed, images, self.stem_rounding, model.dynamic_img_size)
        height, width = static_size(size)
        # timm's Eva puts checkpoints around its blocks whatever they are called with, its VisionTransformer does not.
        return GridSize(height, width, bool(model.grad_checkpointing) and isinstance(self, VisionTransformer))

    def init_weights(self, *args: Any, **kwargs: Any) -> None:
        """As timm's; what the conversion added starts near softmax attention, as in `convert_vit`."""
        super().init_weights(*args, **kwargs)  # type: ignore[misc]
        for holder, norm in _places(self):
            _start(cast(ConvertedAttention, holder.attn), norm)

    def forward_features(self, x: torch.Tensor, attn_mask: Any = None, is_causal: bool = False) -> Any:
        """As timm's, without masks."""
        return super().forward_features(x, attn_mask=self._grid(x, attn_mask, is_causal))  # type: ignore[misc]

    def forward_intermediates(
        self, x: torch.Tensor, *args: Any, attn_mask: Any = None, is_causal: bool = False, **kwargs: Any
    ) -> Any:
        """As timm's, without masks."""
        grid = self._grid(x, attn_mask, is_causal)
        return super().forward_intermediates(x, *args, attn_mask=grid, **kwargs)  # type: ignore[misc]

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        """Parameters without weight decay: timm's, and the tables of relative position biases."""
        return set(super().no_weight_decay()) | bias_tables(self)  # type: ignore[misc]


class CheckpointBlock(Derived, nn.Module):
    """Stands before the blocks of timm's VisionTransformer: recomputes activations where the model asks for it."""

    def forward(self, x: torch.Tensor, attn_mask: Any = None, is_causal: bool = False) -> torch.Tensor:
        if isinstance(attn_mask, GridSize) and attn_mask.checkpoint:
            return checkpoint(super().forward, x, attn_mask, is_causal)
        return super().forward(x, attn_mask, is_causal)


class Place(NamedTuple):
    """Where an attention is: `holder.attn`, behind `norm` if the block normalises first."""

    holder: nn.Module
    norm: Optional[nn.Module]


def _pre_norm(block: Any) -> List[Place]:
    return [Place(block, block.norm1)]


def _post_norm(block: Any) -> List[Place]:
    return [Place(block, None)]


def _parallel(block: Any) -> List[Place]:
    return [Place(branch, branch.norm) for branch in block.attns]


# timm's blocks by their forward, which is what has to hand the grid on, and where they have their attentions.
_PLACES: Dict[Callable[..., Any], Callable[[Any], List[Place]]] = {
    Block.forward: _pre_norm,
    ResPostBlock.forward: _post_norm,
    ParallelThingsBlock.forward: _parallel,
    EvaBlock.forward: _pre_norm,
    EvaBlockPostNorm.forward: _post_norm,
}
_FEATURES = (VisionTransformer.forward_features, Eva.forward_features)
_ATTENTIONS = (Attention.forward, AttentionRope.forward, TimmEvaAttention.forward)


def _why_not_class(model: nn.Module) -> Optional[str]:
    """Why no model of this class can be converted."""
    kind = type(model).__name__
    if isinstance(model, ConvertedModel):
        return 'it is converted already; evavit.revert_vit(model) gives the softmax model back'
    if isinstance(model, GridModel):
        return f'{kind} is a model of this package; choose its attention by name, as in eva_deit_tiny'
    if isinstance(model, (Beit, VisionTransformerRelPos)):
        return f'{kind} has a relative position bias between all tokens, which no window and no cell can stand for'
    if isinstance(model, VisionTransformerSAM):
        return f'{kind} has windows and relative position biases of its own'
    if isinstance(model, NaFlexVit):
        return f'{kind} packs the patches of images of any shape into sequences with a mask, which form no grid'
    if hasattr(model, '_orig_mod') or isinstance(model, nn.parallel.DistributedDataParallel):
        return f'{kind} wraps the model; convert the model itself, then compile or distribute it'
    if isinstance(model, str):
        return f'{model[:100]!r} is a name; give the model, timm.create_model({model[:100]!r})'
    if not isinstance(model, (VisionTransformer, Eva)):
        return f"{kind} is none of timm's plain vision transformers (its classes VisionTransformer and Eva)"
    if type(model).forward_features not in _FEATURES or 'forward_features' in model.__dict__:
        return f'{kind} has a forward_features of its own, which may not hand the grid on to the blocks'
    return None


def _is_quantised(weight: Any) -> bool:
    """Whether a weight is that of PyTorch's quantised layers, or of torchao's."""
    own = weight.data if isinstance(weight, nn.Parameter) else weight
    return callable(weight) or 'torchao' in type(own).__module__


_COMPUTED = 'computes its weights anew in each pass (pruning, weight norm); make them permanent first'


def _computed_weights(model: nn.Module) -> Optional[str]:
    """Which part computes its weights by hooks, and what to do about it; None where none does."""
    for name, part in model.named_modules():
        if isinstance(vars(part).get('weight', vars(part).get('bias')), torch.Tensor):  # and no parameter of the module
            return f'{name} {_COMPUTED}, with prune.remove or remove_weight_norm'
    return None


def why_not_converted(model: nn.Module) -> Optional[str]:
    """One line on why `convert_vit` cannot convert a model, None where it can."""
    if isinstance(model, FeatureGetterNet):
        model = model.model
    reason = _why_not_class(model)
    if reason is not None:
        return reason
    rate = getattr(getattr(model, 'patch_drop', None), 'prob', 0.0)
    if rate > 0:
        return f'patch_drop_rate {rate:g} takes tokens out of the grid in training; make the model without it'
    computed = _computed_weights(model)
    if computed is not None:
        return computed
    seen: Set[int] = set()
    for number, block in enumerate(cast(Any, model).blocks):
        kind = type(block).__name__
        if any(name in block._modules for name in _WRAPPED):
            return f'its blocks are wrapped ({kind}); convert the model first, then wrap them'
        if type(block).forward not in _PLACES or 'forward' in block.__dict__:
            return f'its blocks ({kind}) have a forward of their own, in which no attention can be exchanged'
        for holder, _ in _PLACES[type(block).forward](block):
            attn: Any = holder.attn
            if id(attn) in seen:
                return (
                    f'block {number} has the attention of an earlier one; give each block its own, with copy.deepcopy'
                )
            seen.add(id(attn))
            if isinstance(attn, DiffAttention):
                return f'{type(attn).__name__} is a difference of two softmaxes, which EVA does not approximate'
            if type(attn).forward not in _ATTENTIONS or 'forward' in attn.__dict__:
                return f'{type(attn).__name__} is no softmax attention that this package knows'
            if any(is_parametrized(part) for part in attn.modules()):
                return f'its attention {_COMPUTED}, with parametrize.remove_parametrizations'
            if any(_is_quantised(getattr(part, 'weight', None)) for part in attn.modules()):
                return 'its attention is quantised, and has no weights to start from; convert first, then quantise'
            for name in ('qkv', 'q_proj', 'k_proj', 'v_proj', 'proj'):
                part = getattr(attn, name, None)
                if part is not None and not isinstance(getattr(part, 'weight', None), torch.Tensor):
                    return f'its {name} is in a {type(part).__name__}, which has no weight; convert first, then wrap it'
            if not math.isclose(attn.scale, attn.head_dim**-0.5):
                return f'its attention has a scale of its own, {attn.scale:g}, where timm has {attn.head_dim**-0.5:g}'
    return None


def _places(model: nn.Module) -> Iterator[Place]:
    for block in _blocks(model):
        kind: Any = block.made_of[1] if isinstance(block, CheckpointBlock) else type(block)
        if kind.forward not in _PLACES:
            raise ValueError(
                f'a block of the model is in a {kind.__name__}, which this package does not know; take the blocks out '
                f'of it, or revert the model before they are wrapped'
            )
        yield from _PLACES[kind.forward](block)


# Where what wraps a module has it: torch.compile, checkpoint_wrapper, FullyShardedDataParallel, others.
_WRAPPED = ('_orig_mod', '_checkpoint_wrapped_module', '_fsdp_wrapped_module')


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The blocks, those that are wrapped too."""
    for block in cast(Any, model).blocks:
        while inner := next((block._modules[name] for name in _WRAPPED if name in block._modules), None):
            block = inner
        yield block


# What convert_vit has an argument for, with the default that stands in its signature.
_DEFAULTS = {'window_size': 7, 'partition_grid': None, 'rel_pos_bias': False, 'count_cells': 'outside'}


def _options(attention: str, vit: VisionTransformer, given: Dict[str, Any]) -> Dict[str, Any]:
    """The attention's options: those of the arguments that it has, and an error for others that were given."""
    if not isinstance(attention, str) or attention not in ATTENTIONS:
        raise ValueError(f'unknown attention {attention!r}; choose from {", ".join(ATTENTIONS)}')
    layer = ATTENTIONS[attention]
    if layer.fixed_grid:
        raise ValueError(f'{layer.__name__} is made for one size of grid and converts no model; choose another one')
    if not layer.takes_qk_norm:
        raise ValueError(f"{layer.__name__} has projections of its own, which timm's cannot replace; choose another")
    if vit.num_prefix_tokens and not layer.takes_prefix_tokens:
        raise ValueError(
            f'{layer.__name__} takes no class or register tokens, and the model has {vit.num_prefix_tokens}; choose '
            + ', '.join(name for name, other in ATTENTIONS.items() if other.takes_prefix_tokens)
        )
    rest = dict(given)
    options = pop_attention_kwargs(attention, rest)
    foreign = [name for name, value in rest.items() if name not in _DEFAULTS or value != _DEFAULTS[name]]
    if foreign:
        known = pop_attention_kwargs(attention, dict.fromkeys(inspect.signature(layer).parameters))
        raise ValueError(f'{layer.__name__} has no option {foreign[0]}{nearest(foreign[0], known)}; leave it out')
    if issubclass(layer, EvaAttention):
        options.setdefault('noise_std', 0.0)  # the model that was trained answers without noise
    if options.get('partition_grid', 0) is None:
        if issubclass(layer, EvaAttention):
            options['partition_grid'] = min(MOST_CELLS, math.ceil(max(vit.patch_embed.grid_size) / CELL))
        else:
            del options['partition_grid']
    if options.get('partition_grid') == 0 and options.get('count_cells') == _DEFAULTS['count_cells']:
        del options['count_cells']  # there are no cells to count
    return options


def convert_vit(
    model: nn.Module,
    *,
    attention: str = 'eva',
    window_size: int = 7,
    partition_grid: Optional[int] = None,
    rel_pos_bias: bool = False,
    count_cells: str = 'outside',
    inplace: bool = False,
    **options: Any,
) -> nn.Module:
    """A vision transformer of timm's on EVA, with every weight and every token that it has.

    Takes timm's `VisionTransformer` and `Eva`: ViT, DeiT, DeiT III, DINOv2 and DINOv3, CLIP, SigLIP, EVA-02, PE, with
    class, register and distillation tokens, learned or rotary positions and any pooling; also what
    `timm.create_model(..., features_only=True)` makes of them. The result is of a class derived from the model's and
    behaves like it. Its state dict has all names of the model's and, in each attention, EVA's own beside them, which
    start so that a cell is the mean of its tokens (`evavit.convert.linear_summary`).

    With window_size at least as large as the grid it *is* the softmax model. Else it is near it, the nearer the
    smaller the cells are, and training brings it nearer; docs/convert.md has figures.

    Args:
        model: The model, with weights or without.
        attention: A key of `evavit.layers.ATTENTIONS`. With class or register tokens 'eva', 'local' or 'softmax';
            none that is made for one grid.
        window_size: Side of the windows in tokens.
        partition_grid: Cells asked for along each axis, 0 for none. None takes cells of 3 tokens along the longer side,
            at most 16 × 16 of them, for the model's own image size. The number stays: of larger images
            (`set_input_size`, `dynamic_img_size`) it makes larger cells.
        rel_pos_bias: Add a table of relative position biases inside the window, which starts at 0.
        count_cells: How often a cell counts in the softmax, see `evavit.layers.EvaAttention`. 'outside' is nearest to
            softmax attention.
        inplace: Change the model that is given. By default it stays as it is and its weights are copied.
        **options: Further options of the attention. Of EVA's, noise_std is 0 unless it is given: training passes do
            not draw either.

    Returns:
        The model, on its device, in its dtype and mode. Parameters that were frozen stay so; new ones are not frozen.

    Raises:
        ValueError: one line on why the model cannot be converted, or on an option that does not fit.
    """
    check_flags(inplace=inplace)
    reason = why_not_converted(model)
    if reason is not None:
        raise ValueError(f'cannot convert this model: {reason}')
    model = model if inplace else copy.deepcopy(model)
    vit: Any = model.model if isinstance(model, FeatureGetterNet) else model
    warn_of_cut(vit)
    given: Dict[str, Any] = dict(window_size=window_size, partition_grid=partition_grid, rel_pos_bias=rel_pos_bias)
    given |= dict(count_cells=count_cells, **options)
    plain = {name: value.item() if isinstance(value, np.generic) else value for name, value in given.items()}
    chosen = _options(attention, vit, plain)
    front = derive(ConvertedAttention, ATTENTIONS[attention])
    made = [(place, front(cast(Any, place.holder.attn), vit.num_prefix_tokens, **chosen)) for place in _places(vit)]
    for place, attn in made:  # all before any has its place: what fails leaves the model as it was
        _start(attn, place.norm)
    for place, attn in made:
        place.holder.attn = attn
    if isinstance(vit, VisionTransformer):
        for block in vit.blocks:
            block.__class__ = derive(CheckpointBlock, type(block))
    vit.conversion = {'attention': attention, **chosen}
    if (rounding := stem_rounding(vit.patch_embed)) is not None:
        vit.stem_rounding = rounding
    vit.__class__ = derive(ConvertedModel, type(vit))
    of_window = all(chosen.get(name, of_softmax) == of_softmax for name, of_softmax in _OF_SOFTMAX.items())
    if of_window and not vit.dynamic_img_size:  # whose images are not known yet
        _warn_of_window(
            plain['window_size'] if attention in ('eva', 'local') else 0, tuple(vit.patch_embed.grid_size or ())
        )
    return model


# Options with which nothing but the window counts where it covers the grid; there are no cells to count without them.
_OF_SOFTMAX = {'count_cells': 'outside', 'rel_pos_bias': False}


@functools.cache
def _warn_of_window(window_size: int, grid: Tuple[int, ...]) -> None:
    """A line in the log, once for each size, where a conversion changes nothing."""
    if grid and window_size >= max(grid):
        _logger.warning(
            f'warning: one window of {window_size} × {window_size} covers all {grid[0]} × {grid[1]} tokens, so the '
            f'converted model computes softmax attention, as before; give a smaller window_size, or larger images'
        )


def revert_vit(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """The softmax model behind a converted one, with the weights that it has now: a teacher, or for comparison.

    Args:
        model: From `convert_vit`. Blocks may be wrapped since, by torch.compile or PyTorch's `checkpoint_wrapper`; they
            stay so.
        inplace: Change the model that is given. By default it stays as it is and its weights are copied.

    Raises:
        ValueError: the model is not a converted one, has blocks in a wrapper that is not known, or was pruned since,
            which PyTorch does not copy.
    """
    check_flags(inplace=inplace)
    inner = model.model if isinstance(model, FeatureGetterNet) else model
    if not isinstance(inner, ConvertedModel):
        raise ValueError(f'{type(inner).__name__} is not a converted model; evavit.convert_vit makes one')
    computed = None if inplace else _computed_weights(model)
    if computed is not None:
        raise ValueError(f'{computed}; or pass inplace=True')
    model = model if inplace else copy.deepcopy(model)
    vit: Any = model.model if isinstance(model, FeatureGetterNet) else model
    for holder, _ in list(_places(vit)):
        holder.attn = revert_attention(cast(ConvertedAttention, holder.attn))
    for block in _blocks(vit):
        if isinstance(block, CheckpointBlock):
            block.__class__ = block.made_of[1]
    del vit.conversion
    vit.__dict__.pop('stem_rounding', None)
    vit.__class__ = vit.made_of[1]
    return model


def _weight_and_bias(norm: Optional[nn.Module]) -> Optional[Tuple[torch.Tensor, torch.Tensor]]:
    weight: Optional[torch.Tensor] = getattr(norm, 'weight', None)
    if weight is None:
        return None
    bias: Optional[torch.Tensor] = getattr(norm, 'bias', None)
    return weight, torch.zeros_like(weight) if bias is None else bias


def _moments(attn: Any, part: int, norm: Optional[nn.Module]) -> Moments:
    """Of the queries, part 0, or the keys, part 1, of a converted attention.

    Rotary embeddings are left out: with what they turn away counted, errors of random networks, with large biases too,
    were the same to two digits.
    """
    name = 'qk'[part]
    bias: Optional[torch.Tensor]
    if attn.qkv is not None:
        weight, packed = attn.qkv.weight.chunk(3)[part], attn.qkv.bias
        bias = getattr(attn, f'{name}_bias', None) if packed is None else packed.chunk(3)[part]
    else:
        layer = getattr(attn, f'{name}_proj')
        weight, bias = layer.weight, layer.bias
    moments = projection_moments(weight, bias, weight.shape[0] // attn.head_dim, _weight_and_bias(norm))
    inner = getattr(attn, f'{name}_norm')
    if isinstance(inner, nn.Identity):
        return moments
    weight, bias = getattr(inner, 'weight', None), getattr(inner, 'bias', None)
    return normed_moments(moments, weight, bias, isinstance(inner, nn.LayerNorm))


@torch.no_grad()
def _start(attn: ConvertedAttention, norm: Optional[nn.Module]) -> None:
    """Start what the attention adds so that it is near softmax attention."""
    table: Union[nn.Module, None] = getattr(attn, 'rel_pos', None)
    if table is not None:
        nn.init.zeros_(cast(Any, table).relative_position_bias_table)
    if not isinstance(attn, EvaAttention):
        return
    for part, summary in enumerate((attn.summary_q, attn.summary_k)):
        if summary is None or summary.proj is None:
            continue
        if summary.norm is None:  # it can be the identity itself
            nn.init.eye_(summary.proj.weight)
            nn.init.zeros_(summary.proj.bias)
            continue
        start = near_identity(_moments(attn, part, norm), torch.float32)
        for name, parameter in summary.named_parameters():
            parameter.copy_(start[name])
