"""Files of weights, fitted to a model of any family, with a report of what was done to each tensor."""

import contextlib
import logging
import math
import re
import zipfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, Iterator, List, Mapping, Optional, Tuple, Union, cast

import safetensors.torch
import torch
from timm.layers import RelPosBias, resize_rel_pos_bias_table
from timm.models import adapt_input_conv, clean_state_dict, load_state_dict
from timm.models._hub import _EXT_PRIORITY, _PREFERRED_FILES
from torch import nn

from evavit.errors import reason_of
from evavit.files import BLANK, DamagedError, check_parts, is_stamped, stamp, why_no_file
from evavit.layers.eva import EvaAttention, HaloRelPosBias
from evavit.layers.linformer import TokenProjection, resize_token_projection
from evavit.layers.performer import PerformerAttention
from evavit.layers.random_directions import RandomDirections
from evavit.ops.grid import cell_shape

from ._foreign import (
    PREFIX_TOKENS,
    PUBLISHED_EVA_KWARGS,
    PUBLISHED_PERFORMER_KWARGS,
    Change,
    changes_table,
    convert_published_eva,
    convert_softmax,
    is_published_eva,
    near_identity,
    normed_moments,
    projection_moments,
    weight_sources,
)
from ._saved import saved_anew

if TYPE_CHECKING:  # which imports this file
    from ._grid import GridModel

__all__ = ['fit_checkpoint', 'fit_strictly', 'pretrained_filter', 'read_weights', 'readable', 'write_weights']

_logger = logging.getLogger(__name__)

Weights = Dict[str, torch.Tensor]


def read_weights(path: Union[str, Path], use_ema: bool = True) -> Weights:
    """The tensors of a file by name, as timm reads them: .safetensors, or what `torch.save` wrote.

    Args:
        path: The file.
        use_ema: The moving average, where a checkpoint holds one.

    Raises:
        RuntimeError: one line that names the file and what is wrong with it: not there, empty, cut short, damaged since
            this package wrote it (see `evavit.files.stamp`), no weights, a tensor that is none of numbers in memory
            (see `strange`), one of several files that are the weights together, softmax of what stands beside it as a
            conversion (see `saved_anew`), or a pickle that carries more than tensors, of which nothing is run.
    """
    try:
        if not Path(path).is_file():  # timm would log a line of its own
            raise FileNotFoundError(path)
        stamped = is_stamped(path)
        if zipfile.is_zipfile(path):
            check_parts(path, sums=not stamped)
        weights = load_state_dict(str(path), use_ema=use_ema)
        tensors = _unwrap(weights)
        if not tensors:
            raise TypeError('no tensors')
        for name, value in tensors.items():
            if not isinstance(value, torch.Tensor):
                raise TypeError(f'{name} is no tensor')
    except Exception as error:  # each format has its own errors, which name neither the file nor, often, the fault
        raise RuntimeError(f'{path}: {_fault(Path(path), error)}') from error
    if fault := next((f'its {name} is {why}' for name, value in tensors.items() if (why := strange(value))), None):
        raise RuntimeError(f'{path}: not a readable checkpoint: {fault}; save it with plain tensors')
    if (part := re.search(r'-\d{5}-of-(\d{5})\.', Path(path).name)) and int(part[1]) > 1:  # as transformers names them
        raise RuntimeError(
            f'{path}: one of {int(part[1])} files that are the weights together; save them as one, with transformers '
            f"by save_pretrained(FOLDER, max_shard_size='100GB')"
        )
    if anew := saved_anew(path, tensors):
        raise RuntimeError(f'{path}: {anew}')
    return weights


NUMBERS = {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}  # which PyTorch computes with
NUMBERS |= {torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128}


def strange(value: torch.Tensor) -> Optional[str]:
    """What a tensor of a file is instead of one of numbers in memory, in a few words; None for such a one."""
    if value.is_nested or type(value) not in (torch.Tensor, nn.Parameter):
        return 'nested' if value.is_nested else f'of the kind {type(value).__name__}'
    if value.layout is not torch.strided:
        return 'sparse'
    if value.device.type != 'cpu':
        return f'without content, on the device {value.device.type}'
    if value.is_quantized or value.dtype not in NUMBERS:
        return f'of {str(value.dtype)[6:]}, another type of number than weights have'
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():  # as of `expand`: a small file
        return f'of {_size(value.shape)} numbers, more than the file has'
    return None


def other_kinds(state: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]) -> List[str]:
    """The names of a state dict whose tensors PyTorch would convert without a word, as truth values to weights.

    What a model `own` has must be of its kind of number: floating point, complex or neither. Of other names, which a
    reader of timm's may change, weights and biases must be of floating point.
    """

    def fits(name: str, value: torch.Tensor) -> bool:
        if name in own:
            return _kind(value) == _kind(own[name])
        return _kind(value) == (True, False) or not name.endswith(('weight', 'bias'))

    return [name for name, value in state.items() if not fits(name, value)]


def _kind(value: torch.Tensor) -> Tuple[bool, bool]:
    return value.is_floating_point() and value.element_size() > 1, value.is_complex()  # eight bits are no weights


def check_kinds(state_dict: Weights, model: nn.Module) -> None:
    """RuntimeError, one line, on weights of `other_kinds` than those of the model into which timm has loaded them."""
    _check_kinds(other_kinds(_unwrap(state_dict), model.state_dict()), type(model).__name__)


def _check_kinds(names: List[str], kind: str) -> None:
    if names:
        more = f' and {len(names) - 1} more' if len(names) > 1 else ''
        raise RuntimeError(
            f'the file does not fit this {kind}: it has in another type of number {names[0]}{more}; save its weights '
            f'in floating point'
        )


@contextlib.contextmanager
def noting_missing() -> Iterator[List[str]]:
    """The names of what timm does not find in the file of a pretrained model, of which it logs where nobody sees it."""
    names: List[str] = []

    def note(record: logging.LogRecord) -> bool:
        if found := re.match(r'Missing keys \((.*)\) discovered', record.getMessage()):
            names.extend(found[1].split(', '))
        return record.levelno > logging.INFO

    logger = logging.getLogger('timm.models._builder')
    level = logger.level
    logger.addFilter(note)
    logger.setLevel(logging.INFO)
    try:
        yield names
    finally:
        logger.removeFilter(note)
        logger.setLevel(level)


def folder_weights(folder: Union[str, Path]) -> Optional[Path]:
    """The file from which timm takes the weights of 'local-dir:FOLDER'; None where there is none."""
    found = [path for name in _PREFERRED_FILES if (path := Path(folder, name)).exists()]
    found += [path for ending in _EXT_PRIORITY for path in sorted(Path(folder).glob(f'*{ending}'))]
    return next(iter(found), None)


@contextlib.contextmanager
def disk_errors() -> Iterator[None]:
    """What the safetensors library raises where a file cannot be written is an OSError, as that of others."""
    try:
        yield
    except safetensors.SafetensorError as error:
        raise OSError(reason_of(error)) from error


def write_weights(weights: Weights, path: Union[str, Path], metadata: Optional[Dict[str, str]] = None) -> None:
    """A safetensors file that tells whether it is whole, with metadata beside the weights.

    Raises:
        OSError: It cannot be written.
    """
    path = Path(path)
    path.unlink(missing_ok=True)
    path.touch()
    mode = path.stat().st_mode
    tensors = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    places = Counter(value.untyped_storage().data_ptr() for value in tensors.values())
    for name, value in tensors.items():  # tied weights are written under each of their names
        if places[value.untyped_storage().data_ptr()] > 1:
            tensors[name] = value.clone()
    with disk_errors():
        safetensors.torch.save_file(tensors, str(path), {'format': 'pt', 'digest': BLANK, **(metadata or {})})
    path.chmod(mode)  # that of any new file: safetensors makes one that only its owner can read
    stamp(path)


def _fault(path: Path, error: Exception) -> str:
    if isinstance(error, OSError) and error.errno is not None:
        return f'cannot be read ({reason_of(error)})'
    if not path.is_file():
        return why_no_file(path, what='checkpoint')
    with open(path, 'rb') as file:
        head = file.read(10)
    if not head:
        return 'not a readable checkpoint: the file is empty'
    text = ' '.join(str(error).split())
    if isinstance(error, DamagedError):
        return f'not a readable checkpoint: {text}'
    if path.suffix == '.safetensors':
        return f'not a readable checkpoint: cut short, or not of the safetensors format ({text[:200]})'
    if head[8:] == b'{"':  # after the eight bytes of its header's length
        return 'not read: it is of the safetensors format, and its name has to end in .safetensors'
    # A zip archive and a pickle (from protocol 2 on) begin so; anything else was never written by torch.save.
    if not head.startswith((b'PK\x03\x04', b'\x80')):
        return 'not a readable checkpoint: neither of the safetensors format nor written by torch.save'
    if 'weights_only' in text or 'Weights only' in text:
        carried = re.search(r'[Uu]nsupported globals?: (.+?)\. |GLOBAL (\S+)', text)
        names = f' ({carried[1] or carried[2]})' if carried else ''
        return (
            f'not a readable checkpoint: it carries more than tensors{names}, and what a pickle carries may be '
            f'code, so none of it is loaded; ask for the weights as .safetensors'
        )
    if isinstance(error, (AttributeError, TypeError)):
        return 'not a readable checkpoint: it holds no dictionary of tensors by name'
    return f'not a readable checkpoint: damaged, or of another kind ({text[:200] or type(error).__name__})'


@contextlib.contextmanager
def readable(overlay: Optional[Mapping[str, Any]], cfg: Any = None) -> Iterator[None]:
    """Raise the errors of `read_weights` on the file of a `pretrained_cfg_overlay`, or of a folder that is the source
    of a `pretrained_cfg`: before timm reads it, and where timm does not find it."""
    file = overlay and overlay.get('file')
    if not file and isinstance(cfg, dict) and cfg.get('source') == 'local-dir':
        file = folder_weights(cfg['file'])
    if file and Path(file).is_file():
        read_weights(file)  # timm looks at no digest, and resamples what memory does not hold
    try:
        yield
    except Exception:
        if file:
            try:
                read_weights(file)
            except RuntimeError as clear:
                raise clear from None
        raise


def fit_bias_tables(state_dict: Weights, model: nn.Module) -> Weights:
    """Resize the relative position bias tables of a checkpoint to the windows of a model."""
    fitted = dict(state_dict)
    for name, module in model.named_modules():
        key = f'{name}.relative_position_bias_table'
        if isinstance(module, (RelPosBias, HaloRelPosBias)) and key in fitted:
            fitted[key] = resize_rel_pos_bias_table(
                fitted[key],
                new_window_size=module.window_size,
                new_bias_shape=module.relative_position_bias_table.shape,
            )
    return fitted


def fit_token_projections(state_dict: Weights, model: nn.Module) -> Weights:
    """Resample Linformer's projections of a checkpoint to the grids of a model."""
    fitted = dict(state_dict)
    for name, module in model.named_modules():
        key = f'{name}.weight'
        if isinstance(module, TokenProjection) and key in fitted:
            fitted[key] = resize_token_projection(fitted[key], module.weight.shape[1:])
    return fitted


def _unwrap(state_dict: Weights) -> Weights:
    """The tensors of a checkpoint, without what a training script puts around them."""
    for key in ('model', 'state_dict'):
        inner = state_dict.get(key)
        state_dict = inner if isinstance(inner, dict) else state_dict
    return clean_state_dict(state_dict)


def _start_attention(name: str, attn: EvaAttention, state: Weights, feat_size: List[int]) -> Weights:
    """Start values, by name within the layer, of what softmax attention lacks; EVA then begins close to it."""
    start: Weights = {}
    weight, bias = state[f'{name}.qkv.weight'], state.get(f'{name}.qkv.bias')
    block = name.rpartition('.')[0]
    gamma, beta = (state.get(f'{block}.norm1.{part}') for part in ('weight', 'bias'))
    norm = None if gamma is None or beta is None else (gamma, beta)
    for i, summary in enumerate(('summary_q', 'summary_k')):
        if getattr(attn, summary) is None:
            continue
        moments = projection_moments(
            weight.chunk(3)[i], None if bias is None else bias.chunk(3)[i], attn.num_heads, norm
        )
        if attn.qk_norm:
            inner = f'{name}.{"qk"[i]}_norm'
            centred = isinstance(getattr(attn, f'{"qk"[i]}_norm'), nn.LayerNorm)
            moments = normed_moments(moments, state.get(f'{inner}.weight'), state.get(f'{inner}.bias'), centred)
        part = near_identity(moments, weight.dtype)
        own = getattr(attn, summary).state_dict()
        if 'norm.weight' not in own and 'proj.weight' in own:  # summary='linear' can be the identity itself
            part = {'proj.weight': torch.eye(attn.head_dim).to(weight), 'proj.bias': weight.new_zeros(attn.head_dim)}
        start.update({f'{summary}.{key}': value for key, value in part.items() if key in own})
    if attn.rel_pos is not None:
        # A cell stands for all of its tokens. Where it has the weight of one, the bias takes the logarithm of their
        # number off the tokens of the window instead.
        counts_once = attn.partition_grid and attn.count_cells == 'one'
        tokens = math.prod(cell_shape(feat_size, attn.partition_grid)) if counts_once else 1
        table = attn.rel_pos.relative_position_bias_table
        start['rel_pos.relative_position_bias_table'] = weight.new_full(table.shape, -math.log(tokens))
    return start


def _add_fresh(state: Weights, model: 'GridModel', new_head: bool) -> Dict[str, str]:
    """Add to a state dict what the model has beside it: name → why it starts so."""
    own = model.state_dict()
    fresh: Dict[str, str] = {}
    for name, attn in model.named_modules():
        if f'{name}.qkv.weight' not in state or not hasattr(attn, 'attend'):
            continue
        given, within = ([key[len(name) + 1 :] for key in keys if key.startswith(f'{name}.')] for keys in (state, own))
        # A part, such as summary_q, is added whole: of one that is there a tensor was lost.
        there = {key.partition('.')[0] for key in given}
        missing = [key for key in within if key.partition('.')[0] not in there]
        start: Weights = {}
        if isinstance(attn, EvaAttention) and missing:
            start = _start_attention(name, attn, state, model.block_grid(name))
        for part in missing:
            key = f'{name}.{part}'
            if part in start:
                state[key], fresh[key] = start[part], 'starts near softmax attention'
            elif not part.startswith(('qkv.', 'proj.', 'q_norm.', 'k_norm.', 'norm.')):
                state[key], fresh[key] = own[key].clone(), 'as the model initialises it'
    if new_head:
        head = [key for key in own if key.startswith('head.')]
        differs = [key for key in head if key in state and state[key].shape[:1] != own[key].shape[:1]]
        count = file_classes(state)
        classes = f'the file has {count} classes' if differs and count else 'the file has no classifier'
        if differs or not any(key in state for key in head):
            for key in head:
                state[key], fresh[key] = own[key].clone(), classes
    return fresh


# The number of axes of tensors that follow the size of images, patches or windows. Old stems are products.
_AXES = {**dict.fromkeys(PREFIX_TOKENS, (3,)), 'relative_position_bias_table': (2,), 'patch_embed.proj.weight': (2, 4)}


def fit_checkpoint(
    state_dict: Weights,
    model: nn.Module,
    new_head: bool = True,
) -> Tuple[Weights, List[Change]]:
    """Make a state dict of a model from a file: ours of any size, timm's or DeiT's softmax, or the published EVA's.

    Args:
        state_dict: Tensors by name, as they are in the file.
        model: The model that they are for, of one of the families.
        new_head: Start the classifier anew where the file has other classes or none.

    Returns:
        A state dict that fits the model exactly, and what became of each tensor (see `evavit.convert.changes_table`).

    Raises:
        RuntimeError: the file is of another architecture, or has other classes and new_head is False. One line.
    """
    file = _unwrap(state_dict)
    if not file or not all(isinstance(value, torch.Tensor) for value in file.values()):
        raise RuntimeError('this is not a file of weights: it holds no dictionary of tensors by name')
    own = model.state_dict()
    for name, value in file.items():  # whose sides are compared one by one
        axes = next((axes for ending, axes in _AXES.items() if name.endswith(ending)), None)
        if axes is not None and value.ndim not in axes:
            raise RuntimeError(f'the file has {name} of {_size(value.shape)}: no model has it in {value.ndim} axes')
    sources = weight_sources(file, own)
    kind = type(model).__name__
    targets = {old: own[name] for name, names in sources.items() if name in own for old in names}
    _check_kinds(other_kinds(file, targets), kind)
    tokens: int = 0 if getattr(model, 'no_embed_class', False) else getattr(model, 'num_prefix_tokens', 0)
    state = convert_published_eva(file) if is_published_eva(file) else convert_softmax(file, own, tokens)
    if not any(name in own for name in state if not name.startswith('head')):
        raise RuntimeError(
            f'these are not the weights of a {kind}: none of the {len(file)} names in the file fits, '
            f'the first one is {next(iter(file))}'
        )
    classes = [file_classes(values) for values in (state, own)]
    if not new_head and None not in classes and classes[0] != classes[1]:
        raise RuntimeError(
            f'the file has {classes[0]} classes, the model {classes[1]}; create the model with '
            f'num_classes={classes[0]}, or load the file as pretrained_cfg_overlay=dict(file=…), which '
            f'starts the classifier anew'
        )
    if classes[1] is None:
        state = {name: value for name, value in state.items() if not name.startswith('head.')}
    for name in PREFIX_TOKENS:
        if name in own and name not in state:
            raise RuntimeError(
                f'the file has no {name}, which the model has; create it with class_token=False or reg_tokens=0'
            )
    backbone = cast('GridModel', model)
    own = _fit_directions(state, own, model)
    state = _resize(state, backbone, tokens)
    fresh = _add_fresh(state, backbone, new_head)
    _check_names(state, own, kind)
    _check_shapes(state, own)
    _warn_of_published(file, model)
    changes = []
    for name in own:
        if name in fresh:
            changes.append(Change(name, 'fresh', fresh[name]))
            continue
        if name not in sources:
            changes.append(Change(name, 'fresh', 'as the seed draws them'))
            continue
        old = sources[name]
        shape = tuple(file[old[0]].shape)
        if len(old) > 1:
            changes.append(Change(name, 'merged', ' and '.join(source.split('.')[-2] for source in old)))
        elif shape != tuple(state[name].shape):
            changes.append(Change(name, 'resized', f'{_size(shape)} to {_size(state[name].shape)}'))
        elif old[0] != name:
            changes.append(Change(name, 'renamed'))
        else:
            dropped = 'cls_token' in file and 'cls_token' not in own
            pooled = 'read the class token, now the mean of all tokens' if dropped else ''
            changes.append(Change(name, 'taken', pooled if name.startswith('head.') else ''))
    used = {source for name, names in sources.items() if name in own for source in names}
    changes += [Change(name, 'dropped', 'no counterpart') for name in file if name not in used]
    return state, changes


def _fit_directions(state: Weights, own: Weights, model: nn.Module) -> Weights:
    """The model's tensors with the directions of evaluation among them that the file brings.

    A file without them evaluates with those of the seed, which a model that took a file's own gets back.
    """
    own = dict(own)
    for name, module in model.named_modules():
        if isinstance(module, RandomDirections):
            key = f'{name}.fixed'
            if key in own and key not in state:
                state[key] = module.drawn_from_seed().to(module.fixed)
            if key in state:
                own[key] = module.fixed
    return own


def _warn_of_published(file: Weights, model: nn.Module) -> None:
    """Say with which keywords weights of the published code give its outputs, where the model was made with others."""
    for marker, kind, wanted in (
        ('.adaptive_mu_q.', EvaAttention, PUBLISHED_EVA_KWARGS),
        ('.eval_proj', PerformerAttention, PUBLISHED_PERFORMER_KWARGS),
    ):
        layer = next((module for module in model.modules() if isinstance(module, kind)), None)
        if layer is None or not any(marker in name for name in file):
            continue
        for key, value in wanted.items():
            own = getattr(layer, key)
            if own != value:
                _logger.warning(
                    'these weights of the published EVA code give its outputs with %s=%s, this model has %s: create it '
                    'with that keyword, in train.py by --model-kwargs %s=%s',
                    *(key, value, own, key, value),
                )


def _size(shape: Tuple[int, ...]) -> str:
    return '×'.join(map(str, shape)) or 'one number'


def _resize(state: Weights, model: 'GridModel', tokens: int) -> Weights:
    """Positions, patches, image channels, bias tables and projections of tokens in the sizes of a model.

    As many of its positions as `tokens` are those of class and register tokens.
    """
    own = model.state_dict()
    # What follows no size of grid, patch or window comes first: resampling fails on another width with its own words.
    follows = {f'{name}.weight' for name, module in model.named_modules() if isinstance(module, TokenProjection)}
    follows |= {name for name in own if name.endswith('relative_position_bias_table')}
    for name in [name for name in follows if name.endswith('table') and name in state]:
        if state[name].shape[-1] != own[name].shape[-1]:
            follows.remove(name)
    head = {name for name in own if name.startswith('head.')}
    _check_shapes(state, own, (*follows, *head, 'pos_embed', 'patch_embed.proj.weight'))
    stem, patch = 'patch_embed.proj.weight', state.get('patch_embed.proj.weight')
    if patch is not None and patch.ndim == 4 and patch.shape[1] != own[stem].shape[1]:
        try:
            patch = adapt_input_conv(own[stem].shape[1], patch, base_chans=patch.shape[1])
        except NotImplementedError as error:
            raise RuntimeError(
                f'the file is for {patch.shape[1]} image channels, the model for '
                f'{own[stem].shape[1]}; set in_chans={patch.shape[1]}'
            ) from error
        state = {**state, stem: patch}
    position = state.get('pos_embed')
    if (
        position is not None
        and 'pos_embed' in own
        and position.shape != own['pos_embed'].shape
        and (position.ndim != 3 or math.isqrt(position.shape[1] - tokens) ** 2 != position.shape[1] - tokens)
    ):
        raise RuntimeError(
            f'the file has pos_embed of {_size(position.shape)}, the model '
            f'{_size(own["pos_embed"].shape)}; positions are resampled from square grids alone: create '
            f'the model with the img_size and patch_size of the file, load it, then call '
            f'model.set_input_size(img_size=…)'
        )
    try:
        state = fit_bias_tables(model.resample_weights(state), model)
    except ValueError as error:  # timm's, on a table that belongs to no window
        raise RuntimeError(f'the file does not fit: {error}') from error
    return fit_token_projections(state, model)


def _check_shapes(state: Weights, own: Weights, skip: Tuple[str, ...] = ()) -> None:
    for name, value in state.items():
        if name in own and name not in skip and value.shape != own[name].shape:
            raise RuntimeError(
                f'the file has {name} of {_size(value.shape)}, the model {_size(own[name].shape)}; '
                f"check the model's name and its arguments (widths, heads, features, image channels)"
            )


def _check_names(state: Weights, own: Weights, kind: str) -> None:
    for names, what in (
        ([name for name in own if name not in state], 'lacks'),
        ([name for name in state if name not in own], 'has, unlike the model,'),
    ):
        if names:
            more = f' and {len(names) - 1} more' if len(names) > 1 else ''
            hint = "the model's name and its arguments"
            hint = 'init_values=1e-5, for LayerScale' if '.ls1.' in names[0] else hint
            hint = 'qk_norm and scale_attn_norm' if re.search(r'\.attn\.([qk]_)?norm\.', names[0]) else hint
            raise RuntimeError(f'the file does not fit this {kind}: it {what} {names[0]}{more}; check {hint}')


def _log(changes: List[Change]) -> None:
    quiet = all(change.action in ('taken', 'renamed', 'merged') for change in changes)
    for line in ('weights from a file:', *changes_table(changes).splitlines()):
        _logger.log(logging.INFO if quiet else logging.WARNING, '%s', line)


def pretrained_filter(state_dict: Weights, model: nn.Module) -> Weights:
    """What timm calls with a file of `pretrained_cfg_overlay=dict(file=…)`: fit it to the model, log the table."""
    fitted, changes = fit_checkpoint(state_dict, model)
    _log(changes)
    head = file_classes(state_dict)
    cfg = getattr(model, 'pretrained_cfg', None)
    if head is not None and cfg:
        # timm makes the classifier anew where this number is not the model's, and it may not be that of the file.
        cfg['num_classes'] = head
    return fitted


def file_classes(state_dict: Weights) -> Optional[int]:
    """Classes of a file, None for one without a classifier."""
    weight = _unwrap(state_dict).get('head.weight')
    return weight.shape[0] if weight is not None and weight.ndim else None


def fit_strictly(state_dict: Mapping[str, torch.Tensor], model: nn.Module) -> Mapping[str, torch.Tensor]:
    """A state dict as it is where it fits a model, and fitted to it otherwise, with the table in the log.

    The models do this in a strict `load_state_dict`. So `create_model(…, checkpoint_path=FILE)` takes the files that
    `pretrained_cfg_overlay=dict(file=FILE)` takes, except that the classes must agree.
    """
    own = model.state_dict()
    if state_dict.keys() == own.keys() and all(state_dict[name].shape == value.shape for name, value in own.items()):
        _check_kinds(other_kinds(state_dict, own), type(model).__name__)
        return state_dict
    fitted, changes = fit_checkpoint(dict(state_dict), model, new_head=False)
    _log(changes)
    return fitted
