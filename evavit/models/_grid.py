"""What every backbone on a token grid shares: the registry of families and sizes, and what is alike in their models.

A family is a file `eva_*.py` of this folder (`evavit.models` imports all of them). It has the model's class, a table
`VARIANTS` with one `variant(...)` for each size, `default_cfgs = grid_cfgs(VARIANTS, ...)`, and a call of
`register_family`. Every size then is a model with each attention of `evavit.layers.ATTENTIONS`, named
`{attention}_{size}`; a size with class or register tokens only with those that take them. Everything that lists models
asks here; these functions are public as `evavit.models.…`:

    families()          name of the file, such as 'eva_deit' → `Family`: class, sizes, names of its models
    variants()          name of the size, such as 'deit_tiny' → `Variant`, of all families
    model_names()       every model: 'eva_deit_tiny', 'eva_deit_small', …
    list_models(filter) those that fit a pattern
    softmax_twin(name)  timm's softmax model that the model is compared with, and its arguments; None if there is none:
                        'eva_deit_tiny_784' → ('deit_tiny_patch16_224',
                                               dict(patch_size=8, class_token=False, global_pool='avg'))

How deep a model is, it says itself: the `blocks` of a plain model, the `blocks` of each of a pyramid's `stages`.
"""

import functools
import logging
import sys
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Set, Tuple, Type, Union, get_type_hints

import torch
from timm import list_models as timm_list_models
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import PatchEmbed
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from evavit.layers import ATTENTIONS

from ._saved import as_trained
from ._weights import fit_strictly, pretrained_filter, readable

__all__ = [
    'Family',
    'GridModel',
    'Variant',
    'build_grid_model',
    'families',
    'grid_cfgs',
    'list_models',
    'model_names',
    'register_family',
    'softmax_twin',
    'variant',
    'variants',
    'warn_of_cut',
]

_logger = logging.getLogger(__name__)


class Variant(NamedTuple):
    """A size of a family.

    Attributes:
        title: As papers call it.
        model_args: Arguments of the family's class; a user's arguments override them.
        softmax: timm's softmax model of this size.
        softmax_args: Its arguments.
    """

    title: str
    model_args: Dict[str, Any]
    softmax: str
    softmax_args: Dict[str, Any]


class Family(NamedTuple):
    """A family as `register_family` enters it.

    Attributes:
        model: Its class, a subclass of one of timm's.
        variants: Its sizes by name.
        models: Names of all its models.
    """

    model: Type[nn.Module]
    variants: Dict[str, Variant]
    models: Tuple[str, ...]


_FAMILIES: Dict[str, Family] = {}


def families() -> Dict[str, Family]:
    """The families by the name of their file, in the order of registration."""
    return dict(_FAMILIES)


def variants() -> Dict[str, Variant]:
    """The sizes of all families by name, such as 'deit_tiny'."""
    return {name: size for family in _FAMILIES.values() for name, size in family.variants.items()}


def model_names() -> List[str]:
    """Names of all models, each attention's in turn."""
    names = {name for family in _FAMILIES.values() for name in family.models}
    return [
        name for name in (f'{attention}_{size}' for attention in ATTENTIONS for size in variants()) if name in names
    ]


def list_models(filter: Union[str, List[str]] = '', *, exclude_filters: Union[str, List[str]] = '') -> List[str]:
    """Names of this package's models, and none of timm's own `eva_*` and `eva02_*`, which are another method.

    Args:
        filter: A shell pattern or a list of them, as `timm.list_models` takes: `'eva_*'` for those with EVA,
            `'*_deit_tiny'` for one size with every attention. All models by default.
        exclude_filters: Patterns of names to leave out.

    Returns:
        Names for `timm.create_model`, in timm's natural order; an empty list where none fits.
    """
    ours = set(model_names())
    return [name for name in timm_list_models(filter, exclude_filters=exclude_filters) if name in ours]


def softmax_twin(name: str) -> Optional[Tuple[str, Dict[str, Any]]]:
    """timm's softmax model beside a model of this package, and its arguments for `timm.create_model`.

    Args:
        name: Of the model, such as 'eva_deit_tiny'.

    Returns:
        (name, arguments); None for a name that is not of this package.
    """
    for size_name, size in variants().items():
        if name in [f'{attention}_{size_name}' for attention in ATTENTIONS]:
            return size.softmax, dict(size.softmax_args)
    return None


def variant(title: str, softmax: str, softmax_args: Optional[Dict[str, Any]] = None, **model_args: Any) -> Variant:
    """A size of a family, a row of its `VARIANTS`.

    Args:
        title: As papers call it, for the docstring of the entry points.
        softmax: timm's softmax model of this size, which benchmarks put beside it.
        softmax_args: Arguments of that model that other sizes of the family do not have.
        **model_args: Arguments of the family's class.
    """
    return Variant(title, model_args, softmax, dict(softmax_args or {}))


def _sizes_of(attention: str, sizes: Dict[str, Variant]) -> Dict[str, Variant]:
    """The sizes that an attention can have: with class and register tokens, where it takes them."""
    return {
        name: size
        for name, size in sizes.items()
        if ATTENTIONS[attention].takes_prefix_tokens
        or not (size.model_args.get('class_token') or size.model_args.get('reg_tokens'))
    }


def grid_cfgs(sizes: Dict[str, Variant], **cfg: Any) -> Dict[str, Any]:
    """timm's `default_cfgs` of a family's models, without weights: 224 × 224, ImageNet's normalisation.

    Args:
        sizes: The family's `VARIANTS`.
        **cfg: What differs. By default images may have any size unless the attention is made for one grid.
    """
    common = {
        'url': '',
        'num_classes': 1000,
        'input_size': (3, 224, 224),
        'pool_size': None,
        'crop_pct': 0.875,
        'interpolation': 'bicubic',
        'mean': IMAGENET_DEFAULT_MEAN,
        'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'patch_embed.proj',
        'classifier': 'head',
        'license': 'apache-2.0',
    }
    return generate_default_cfgs(
        {
            f'{name}_{size}': {**common, 'fixed_input_size': attention.fixed_grid, **cfg}
            for name, attention in ATTENTIONS.items()
            for size in _sizes_of(name, sizes)
        }
    )


def register_family(
    create: Callable[..., nn.Module],
    sizes: Dict[str, Variant],
    describe: Callable[[Variant, str], str],
    softmax_args: Optional[Dict[str, Any]] = None,
) -> None:
    """Register a family and, with timm, each of its sizes with each attention of `evavit.layers.ATTENTIONS`.

    The entry points become functions of the family's module, where timm looks for `default_cfgs` and pickle for the
    function.

    Args:
        create: The family's `_create_*`: `create(name, pretrained=..., attn_layer=..., **model_args)`, annotated with
            the class that it returns.
        sizes: The family's `VARIANTS`.
        describe: From a size and the name of the attention's class to the docstring of an entry point.
        softmax_args: Arguments that timm's softmax model has beside every size, unless the size has others.
    """
    module = sys.modules[create.__module__]
    names = []
    for attention in ATTENTIONS:
        for name, size in _sizes_of(attention, sizes).items():
            entry_point = _entry_point(create, attention, f'{attention}_{name}', size.model_args)
            entry_point.__doc__ = describe(size, ATTENTIONS[attention].__name__)
            names.append(entry_point.__name__)
            setattr(module, entry_point.__name__, register_model(entry_point))
    twins = {
        name: size._replace(softmax_args={**(softmax_args or {}), **size.softmax_args}) for name, size in sizes.items()
    }
    family = create.__module__.rpartition('.')[2]
    _FAMILIES[family] = Family(get_type_hints(create)['return'], twins, tuple(names))


def _entry_point(
    create: Callable[..., nn.Module],
    attention: str,
    name: str,
    model_args: Dict[str, Any],
) -> Callable[..., nn.Module]:
    def entry_point(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return create(name, pretrained=pretrained, **{**model_args, 'attn_layer': attention, **kwargs})

    entry_point.__module__ = create.__module__
    entry_point.__name__ = entry_point.__qualname__ = name
    entry_point.__annotations__['return'] = get_type_hints(create)['return']
    return entry_point


def build_grid_model(model: Type[nn.Module], name: str, pretrained: bool, **kwargs: Any) -> Any:
    """timm's `build_model_with_cfg` for a family's class: files are fitted to the model, unreadable ones named.

    Args:
        model: The class.
        name: Of the model, a key of the family's `default_cfgs`.
        pretrained: Load the file of `pretrained_cfg_overlay=dict(file=…)`. `pretrained_cfg` then has mean, std,
            interpolation and crop_pct of the run that wrote it, unless the overlay has its own.
        **kwargs: `feature_cfg` and arguments of the class.
    """
    overlay = kwargs.get('pretrained_cfg_overlay')
    with readable(overlay, kwargs.get('pretrained_cfg') if pretrained else None):
        if pretrained and overlay:
            kwargs['pretrained_cfg_overlay'] = as_trained(overlay)
        made = build_model_with_cfg(model, name, pretrained, pretrained_filter_fn=pretrained_filter, **kwargs)
        warn_of_cut(made)
        return made


def warn_of_cut(model: Any) -> None:
    """A line in the log, once for each size, where a model was made for images whose last rows or columns are in no
    patch. timm leaves them out without a word."""
    embed = getattr(model, 'patch_embed', None)
    if isinstance(embed, PatchEmbed) and embed.img_size is not None and not embed.dynamic_img_pad:
        _warn_of_cut(type(model).__name__, tuple(embed.img_size), tuple(embed.patch_size))


@functools.cache
def _warn_of_cut(kind: str, size: Tuple[int, int], patch: Tuple[int, int]) -> None:
    seen = [side - side % p for side, p in zip(size, patch, strict=True)]
    if seen != list(size) and all(seen):  # a patch above the image is refused
        _logger.warning(
            f'warning: {kind} sees {seen[0]} × {seen[1]} pixels of images of {size[0]} × {size[1]}: patches of '
            f'{patch[0]} × {patch[1]} do not divide them, and the last rows or columns are left out; choose a multiple'
        )


def bias_tables(model: nn.Module) -> Set[str]:
    """Names of the tables of relative position biases."""
    return {name for name, _ in model.named_parameters() if name.endswith('relative_position_bias_table')}


class GridModel(nn.Module):
    """What the families' classes have in common, to stand before timm's class among their bases.

    A family implements `block_grid` and `resample_weights`, with which files are fitted to its models.
    """

    @torch.jit.ignore
    def block_grid(self, name: str) -> List[int]:
        """Size (H, W) of the token grid that the submodule of that name sees, at the model's own image size."""
        raise NotImplementedError

    @torch.jit.ignore
    def resample_weights(self, state_dict: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
        """A state dict with what follows the size of images and patches resampled to this model's."""
        raise NotImplementedError

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        """Parameters without weight decay: those of timm's model, and the tables of relative position biases."""
        return set(super().no_weight_decay()) | bias_tables(self)  # type: ignore[misc]  # timm's, {} in some of its models

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As in PyTorch; a strict load fits what does not fit as it is, see `evavit.models.fit_checkpoint`."""
        return super().load_state_dict(fit_strictly(state_dict, self) if strict else state_dict, strict, assign)
