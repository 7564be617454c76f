"""From settings to what is trained: model, task, optimizer, learning rate, mixup."""

import logging
import math
import sys
from pathlib import Path
from typing import Any, Callable, Dict, Mapping, Optional, Sequence, Set, Tuple, Union

import timm
import torch
from timm.data import Mixup
from timm.layers import resample_abs_pos_embed
from timm.models import resolve_model_input_args
from timm.models._hub import HF_SAFE_WEIGHTS_NAME
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler_factory import scheduler_kwargs
from timm.task import ClassificationTask, TrainingTask
from torch import nn

from evavit import models
from evavit.arguments import PREPARATION, nearest, per_channel, shown, too_large
from evavit.errors import UserError, first_line
from evavit.hub import lost_conversion, saved_config, source_folder, source_of, source_weights, why_not_fetched
from evavit.models import (
    ConvertedModel,
    GridPyramidVisionTransformerV2,
    GridVisionTransformer,
    convert_vit,
    fit_strictly,
    revert_vit,
)
from evavit.models._grid import bias_tables, warn_of_cut
from evavit.models._saved import as_trained, saved_conversion, trained_size
from evavit.models._weights import check_kinds, folder_weights, noting_missing, other_kinds
from evavit.training.checks import check_conversion, check_source, mixes
from evavit.training.compilation import Compilation
from evavit.training.config import EmaConfig, LossConfig, ModelConfig, OptimConfig, ScheduleConfig
from evavit.training.distributed import Process

log = logging.getLogger(__name__)


# arguments of timm.create_model that are not the model's own → the option to use
OWN_OPTIONS = dict(
    num_classes='--num-classes',
    drop_rate='--drop',
    drop_path_rate='--drop-path',
    device='--device',
    dtype='--amp',
    pretrained='--pretrained',
    checkpoint_path='--initial-checkpoint in train.py, --checkpoint in validate.py',
    pretrained_cfg='--pretrained-path in train.py, --checkpoint in validate.py',
    pretrained_cfg_overlay='--pretrained-path in train.py, --checkpoint in validate.py',
    pretrained_strict='--initial-checkpoint in train.py, --checkpoint in validate.py',
    cache_dir='HF_HUB_CACHE in the environment',
)
FUSED = ('adam', 'adamw', 'sgd', 'nesterov', 'momentum')  # timm's names of optimizers that PyTorch fuses
OURS = (GridVisionTransformer, GridPyramidVisionTransformerV2)
LARGE = 200e6  # parameters above which no trial pass is made on the CPU
LARGE_IMAGE = 3 * 2048**2  # values of an image above which none is made either


def build_model(
    config: ModelConfig, num_classes: Optional[int], device: Optional[str] = None, new_head: bool = True
) -> nn.Module:
    """The model by its name, with the weights it starts from and converted where `config` says so; whatever timm or
    the model refuses is a UserError.

    With a device, such as meta, it is built there without those weights: to look at, not to train. Where `config.model`
    is a folder or repository with a converted network, `config` then names its parts, see `name_converted`. Without
    `new_head`, for a model that is not to be trained, the weights of such a place must have a classifier, and those of
    a file all else.
    """
    check_source(config)
    if num_classes is not None or not config.convert:
        name_converted(config)
    check_conversion(config)
    kwargs = dict(config.model_kwargs or {})
    for name, instead in OWN_OPTIONS.items():
        if name in kwargs:
            raise UserError(f'model_kwargs: {name} has an option of its own, {instead}')
    for kind, given in dict(model_kwargs=kwargs, convert_kwargs=config.convert_kwargs or {}).items():
        if excess := too_large(given):
            raise UserError(f'{kind}: {excess}; lower it')
    name = config.model or ''
    if ':' not in name and not timm.is_model(name.split('.')[0]):
        raise UserError(f'unknown model {name}{nearest(name, timm.list_models())}')
    try:
        if start := config.initial_checkpoint or config.pretrained_path:
            _prepare_as(config, as_trained(dict(file=start)))
        source, place = source_of(name)
        if source == 'local-dir':
            folder = Path(place)
            saved_config(folder)
            if config.pretrained and (reason := lost_conversion(folder)):
                raise UserError(reason)
            if config.pretrained and not folder_weights(folder):
                raise UserError(
                    f'--pretrained: {folder} has no weights; leave it out, or put model.safetensors there, which '
                    f'evavit.hub.save_folder writes beside config.json'
                )
        if config.pretrained and ':' not in name and not has_weights(name):
            raise UserError(
                f'--pretrained: timm publishes no weights for {name}; leave it out, or start from a file with '
                f'--pretrained-path'
            )
        arguments = resolve_model_input_args(
            name,
            args={name: getattr(config, name) for name in ('in_chans', 'img_size', 'input_size')},
            num_classes=num_classes,
            drop_rate=config.drop,
            drop_path_rate=config.drop_path,
            **(dict(device=device) if device else _pretrained_file(config)),
            **kwargs,
        )
        file = source_weights(name) if config.pretrained and not device else None
        same = num_classes in (None, arguments['pretrained_cfg'].get('num_classes'))
        strict = file is not None and same and not new_head and arguments['model_name'] in models.model_names()
        if strict:  # in these models timm's reader makes a classifier that the file lacks
            arguments['pretrained'] = False
        loaded = None if strict else file or (config.pretrained_path if arguments.get('pretrained') else None)
        weights = read_weights(loaded) if loaded else {}
        with noting_missing() as missing:
            model: Any = timm.create_model(**arguments)
        check_kinds(weights, model)
        if weights and missing:
            _check_missing(model, missing, str(loaded), new_head and not config.linear_probe)
        if not hasattr(model, 'num_classes'):
            raise UserError(
                f'model {name}{_shown(kwargs)}: it has no classes; leave features_only out of --model-kwargs'
            )
        warn_of_cut(model)
        if config.grad_checkpointing:
            model.set_grad_checkpointing(True)
        if config.convert:
            model = convert_vit(model, inplace=True, **{**(config.convert_kwargs or {}), 'attention': config.convert})
    except UserError:
        raise
    except Exception as error:  # each model has its own errors for arguments that do not fit
        about = {name: getattr(config, name) for name in ('img_size', 'input_size', 'convert_kwargs')}
        about['weights'] = None if device else config.pretrained_path
        asked = ''.join(f', {name} {value}' for name, value in about.items() if value)
        why = why_not_fetched(error, 'by --pretrained-path FILE in train.py, --checkpoint FILE in the other programs')
        raise UserError(f'model {name}{_shown(kwargs)}{asked}: {why}') from error
    if strict and file is not None:
        load_weights(model, file)
    elif config.initial_checkpoint and not device:
        load_weights(model, config.initial_checkpoint)
    elif config.pretrained_path and not device and _are_fitted_here(config.pretrained_path, config):
        load_weights(model, config.pretrained_path, new_head=True)
    elif (config.pretrained or config.pretrained_path) and not device:
        check_finite(model.state_dict(), config.pretrained_path or file or f'the published weights of {name}')
    if config.linear_probe:
        freeze_body(model)
    return model


def _check_missing(model: nn.Module, missing: Sequence[str], path: str, trained: bool) -> None:
    """UserError where a file lacks weights of the model's body. What classifies may begin anew, and with a warning
    norms, and in a body that is `trained` what pools."""
    own, heads = model.state_dict(), tuple(f'{head}.' for head in _heads_of(model))
    lacking = [name for name in missing if name in own and not name.startswith(heads)]
    more = f'{lacking[0]} and {len(lacking) - 1} more' if len(lacking) > 1 else ''.join(lacking)
    if any(own[name].ndim > 1 and not (trained and name.startswith('attn_pool.')) for name in lacking):
        raise UserError(
            f'{path} does not fit the model: it lacks {more}; check --model, --model-kwargs and the names in the file'
        )
    if lacking:
        log.warning(f'warning: {path} lacks {more}: they begin anew')


def name_converted(config: ModelConfig, softmax_too: bool = False) -> None:
    """Of a folder or repository with a converted network, which timm alone would make with softmax, or with one that
    is to be converted: put architecture, conversion, image settings and the file of its weights in the place of its
    name. So a run's checkpoints say them. Of a conversion, what `config` says goes before what is there. With
    `softmax_too` any other network is one, whose place may hold another when the run goes on.
    """
    weights = None
    try:
        folder = source_folder(config.model or '')
        content, conversion = saved_config(folder) if folder else ({}, None)
        if folder is None or (conversion is None and not (config.convert or softmax_too)):
            return
        if config.pretrained:
            weights = source_weights(config.model or '') if conversion is None else folder / HF_SAFE_WEIGHTS_NAME
    except ValueError as error:
        raise UserError(f'model {error}') from error
    softmax = conversion is None and not config.convert
    try:
        reason = lost_conversion(folder) if softmax and config.pretrained else None
    except RuntimeError as error:
        raise UserError(str(error)) from error
    if reason:
        raise UserError(reason)
    if config.pretrained and weights is None:
        return
    arguments = dict(content.get('model_args') or {})
    arguments.pop('num_classes', None)  # which timm's save_for_hf has there
    if config.img_size or config.input_size:
        arguments.pop('img_size', None)
    if config.in_chans or config.input_size:
        arguments.pop('in_chans', None)
    kwargs = {**arguments, **(config.model_kwargs or {})}
    known, config.model, config.model_kwargs = config.model, content.get('architecture'), kwargs
    if not timm.is_model((config.model or '').split('.')[0]):
        raise UserError(f'model {known}: its config.json names {config.model}, which timm does not have')
    attention = (conversion or {}).pop('attention', 'eva')
    if conversion is not None and config.convert in (None, attention):
        config.convert, config.convert_kwargs = attention, {**conversion, **(config.convert_kwargs or {})}
    published = content.get('pretrained_cfg', content)  # timm's older form has all in one place
    _prepare_as(config, published)
    size = published.get('input_size')
    if softmax and size and not (config.img_size or config.input_size or 'img_size' in kwargs):
        config.input_size = [config.in_chans or size[0], *size[1:]]  # of models of any size there is no other record
    if config.pretrained:
        config.pretrained, config.pretrained_path = False, str(weights)


def _prepare_as(config: ModelConfig, about: Mapping[str, Any]) -> None:
    """Have images prepared as a `pretrained_cfg` says, where `config` says nothing."""
    channels = config.input_size[0] if config.input_size else config.in_chans
    for name in PREPARATION:
        value = about.get(name)
        if name in ('mean', 'std') and value and channels is not None:
            value = [*per_channel(value, channels)]
        if getattr(config, name) is None:
            setattr(config, name, value)


def keep_cells(config: ModelConfig, saved: Mapping[str, Any], given: Set[str]) -> None:
    """Give the conversion of a run as many cells as it chose for its images, where a flag gives the images another
    size, as `evavit.load_converted` does. `saved` are the run's settings, `given` the names of the flags."""
    sized, kwargs = given & {'img_size', 'input_size', 'model_kwargs'}, saved.get('convert_kwargs') or {}
    own = config.model != saved.get('model') or given & {'convert', 'convert_kwargs'}
    if not sized or own or not saved.get('convert') or kwargs.get('partition_grid') is not None:
        return
    names = ('model', 'model_kwargs', 'img_size', 'input_size', 'in_chans', 'convert', 'convert_kwargs')
    about: Dict[str, Any] = {name: saved.get(name) for name in names}
    trained = build_model(ModelConfig(**about), saved.get('num_classes'), 'meta')
    cells = trained.conversion.get('partition_grid')  # type: ignore[union-attr, operator]
    if cells is not None:
        config.convert_kwargs = {**kwargs, 'partition_grid': cells}
        log.info(f'{cells} cells along each axis, as in training; --convert-kwargs, with all arguments, gives others')


def has_weights(name: str) -> bool:
    """Whether timm knows where weights of the model are; whether they can be had is not asked."""
    published = timm.get_pretrained_cfg(name)
    return published is not None and bool(published.has_weights)


def freeze_body(model: Any) -> None:
    """Freeze all but the classifier. (timm.utils.freeze leaves out parameters of the model itself, such as
    the position embedding, and puts other modules in place of batch norms, with other names in the state dict.)"""
    model.requires_grad_(False)
    classifier = model.get_classifier()
    for part in classifier if isinstance(classifier, tuple) else (classifier,):
        part.requires_grad_(True)
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError('linear_probe: the model has no classifier to train; leave it out, or give another --model')


@torch.no_grad()
def try_model(model: Any, input_size: Sequence[int], config: ModelConfig, classifier: bool = True) -> None:
    """Pass two empty images through the model where it is: arguments that only fail then are a UserError as well.

    Without `classifier`, as for a teacher of features, the output may have any shape.
    """
    if sum(p.numel() for p in model.parameters()) > LARGE or math.prod(input_size) > LARGE_IMAGE:
        return
    training = model.training
    model.eval()
    about = f'model {config.model}{_shown(config.model_kwargs or {})}, images {_by(input_size)}'
    try:
        with torch.random.fork_rng(devices=[]):
            logits = model(torch.zeros(2, *input_size, device=next(model.parameters()).device))
    except Exception as error:  # each model has its own errors for images that do not fit
        raise UserError(f'{about}: {first_line(error)[:400]}') from error
    model.train(training)
    shape = tuple(getattr(logits, 'shape', ()))
    if classifier and shape != (2, model.num_classes):
        raise UserError(
            f"{about}: its output for 2 images has shape {shape}, a classifier's is "
            f'{(2, model.num_classes)}; check --model-kwargs'
        )


def _shown(kwargs: Dict[str, Any]) -> str:
    return ' with ' + ' '.join(f'{key}={shown(value)}' for key, value in kwargs.items())[:400] if kwargs else ''


def _pretrained_file(config: ModelConfig) -> Dict[str, Any]:
    """timm loads a file as the model's pretrained weights: positions and channels adapt, another head is made anew."""
    path = config.pretrained_path
    if not path:
        return dict(pretrained=config.pretrained)
    name = config.model or ''
    if is_converted(path, name) and not config.convert:
        raise UserError(
            f'{path} is of a converted model: add --convert and its --convert-kwargs, or give weights from before the '
            f'conversion'
        )
    if _are_fitted_here(path, config):
        return {}
    classes = head_classes(name, read_weights(path))
    return dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(path), num_classes=classes or -1))


def _are_fitted_here(path: str, config: ModelConfig) -> bool:
    """Whether the weights of a --pretrained-path are loaded once the model is there, and converted: of images that
    are no square, before or now, timm would mistake the positions."""
    sizes = trained_size(path), (config.input_size or ())[-2:], (config.model_kwargs or {}).get('img_size')
    oblong = any(isinstance(size, (list, tuple)) and len(set(size)) > 1 for size in sizes)
    return (oblong and sizes[0] is not None) or is_converted(path, config.model or '')


def is_converted(path: str, name: str) -> bool:
    """Whether a file has weights of a model of timm's that was converted to EVA."""
    if timm.is_model(name) and timm.model_entrypoint(name).__module__.startswith('evavit.'):
        return False
    weights, convert = read_weights(path), saved_conversion(path)
    return any('.attn.summary_' in key for key in weights) if convert is None else bool(convert)


def head_classes(name: str, state: Mapping[str, torch.Tensor]) -> Optional[int]:
    """Classes of weights of the model, None where they lack its classifier, or one of its two."""
    weights = [state.get(f'{head}.weight') for head in _heads(timm.get_pretrained_cfg_value(name, 'classifier'))]
    counts = {weight.shape[0] if weight is not None and weight.ndim else None for weight in weights}
    return counts.pop() if len(counts) == 1 else None


def _heads(classifier: Union[str, Sequence[str], None]) -> Tuple[str, ...]:
    """The modules that timm's `pretrained_cfg` names as the classifier: two of a distilled DeiT."""
    return (classifier,) if isinstance(classifier, str) else tuple(classifier or ('head',))


def _heads_of(model: nn.Module) -> Tuple[str, ...]:
    return _heads((getattr(model, 'pretrained_cfg', None) or {}).get('classifier'))


def read_weights(path: Union[str, Path], use_ema: bool = True) -> Dict[str, torch.Tensor]:
    """The weights of a checkpoint or safetensors file. Files that carry code are refused (weights_only)."""
    try:
        return models.read_weights(path, use_ema)
    except RuntimeError as error:
        raise UserError(str(error)) from error


def load_weights(model: nn.Module, path: Union[str, Path], use_ema: bool = True, new_head: bool = False) -> None:
    """Load the weights of a file with the model's classes, for train.py, validate.py and export.py alike; with
    `new_head` the model keeps its own classifier where the file has other classes. Models of evavit fit files of other
    sizes and softmax models to themselves, see `evavit.models.fit_checkpoint`; timm's take their own weights of other
    sizes; converted models take those from before the conversion too. The log says what was changed, an error what
    does not fit."""
    state = _with_positions_of(model, read_weights(path, use_ema=use_ema), path)
    if new_head:
        state = _with_head_of(model, state, path)
    check_classes(model, state, path)
    try:
        if isinstance(model, OURS):
            fitted = fit_strictly(state, model)
        elif isinstance(model, ConvertedModel):
            fitted = _converted(model, state, path)
        elif convert := saved_conversion(path):
            raise UserError(
                f'{path} is of a converted model ({convert}), and this model is not converted: add --convert {convert} '
                f'and its --convert-kwargs, or give weights from before the conversion'
            )
        else:
            fitted = _resampled(model, state)
    except UserError:
        raise
    except Exception as error:  # each model has its own errors for weights that do not fit
        raise UserError(f'{path}: {first_line(error)[:400]}') from error
    check_fit(model, fitted, path)
    model.load_state_dict(fitted)
    check_finite(model.state_dict(), path)


def _with_positions_of(
    model: nn.Module, state: Dict[str, torch.Tensor], path: Union[str, Path]
) -> Dict[str, torch.Tensor]:
    """The weights, with positions of another grid resampled to the model's, as its own `set_input_size` does it, where
    the file tells that grid and other readers would mistake it: they take positions of another number for those of a
    square, and of the same number for those of the same grid."""
    size, embed = trained_size(path), getattr(model, 'patch_embed', None)
    position, own = state.get('pos_embed'), model.state_dict().get('pos_embed')
    if size is None or position is None or own is None or not hasattr(embed, 'dynamic_feat_size'):
        return state
    before, after = embed.dynamic_feat_size(size), embed.grid_size  # type: ignore[union-attr]
    prefix = own.shape[1] - math.prod(after)
    known = position.ndim == 3 and position.shape[1] == prefix + math.prod(before)
    if not known or tuple(before) == tuple(after) or (before[0] == before[1] and position.shape != own.shape):
        return state
    log.warning(f'{path}: positions resampled from {_by(before)} patches to {_by(after)}')
    resampled = resample_abs_pos_embed(position, list(after), list(before), num_prefix_tokens=prefix)
    return {**state, 'pos_embed': resampled}


def _by(size: Sequence[int]) -> str:
    return '×'.join(map(str, size))


def _with_head_of(model: nn.Module, state: Dict[str, torch.Tensor], path: Union[str, Path]) -> Dict[str, torch.Tensor]:
    """The weights, with the model's own classifier where they have none, or one of other classes."""
    own, heads = model.state_dict(), tuple(f'{head}.' for head in _heads_of(model))
    names = [name for name in own if name.startswith(heads)]
    if all(name in state and state[name].shape == own[name].shape for name in names):
        return {name: value for name, value in state.items() if name in own or not name.startswith(heads)}
    log.info(f'{path}: the classifier is made anew, with {own[names[0]].shape[0]} classes')
    return {**state, **{name: own[name] for name in names}}


def check_finite(state: Mapping[str, torch.Tensor], source: Union[str, Path]) -> None:
    """UserError where there are weights or statistics, from `source`, of which nothing can be computed."""
    for name, value in state.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise UserError(f'{source}: its weights are not finite ({name} has NaN or infinite values)')


def _converted(
    model: ConvertedModel, weights: Dict[str, torch.Tensor], path: Union[str, Path]
) -> Mapping[str, torch.Tensor]:
    """Weights of a converted model, or those from before a conversion: what this one adds to them starts anew."""
    parent, own, convert = revert_vit(model), model.state_dict(), saved_conversion(path)
    added = own.keys() - parent.state_dict().keys()
    if added.isdisjoint(weights) and weights.keys() <= parent.state_dict().keys() and (added or convert == ''):
        fitted = _resampled(parent, weights)
        check_fit(parent, fitted, path)
        parent.load_state_dict(fitted)
        before = f'of a conversion to {convert}, to which this one adds its own' if convert else 'from before the'
        log.info(f'{path}: weights {before}' + ' conversion' * (not convert))
        return convert_vit(parent, inplace=True, **model.conversion).state_dict()
    tables = {name: torch.zeros_like(own[name]) for name in sorted(bias_tables(model))}
    tables = tables if tables.keys().isdisjoint(weights) else {}
    if tables:
        log.info(f'{path}: has no tables of relative position biases; they start at 0')
    return _resampled(model, {**weights, **tables})


def _resampled(model: nn.Module, weights: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    """Weights brought to the image size of a model of timm's, by the `checkpoint_filter_fn` of its file."""
    own = model.state_dict()
    kind = type(model).made_of[1] if isinstance(model, ConvertedModel) else type(model)  # timm's class
    fit = getattr(sys.modules[kind.__module__], 'checkpoint_filter_fn', None)
    if fit is None or own.keys() != weights.keys():
        return weights  # `check_fit` says what is wrong with it
    other = [name for name in own if own[name].shape != weights[name].shape]
    if not other:
        return weights
    fitted = fit(dict(weights), model)
    for name in other:
        if name in fitted and fitted[name].shape == own[name].shape:
            log.warning(f'{name} resampled from {_by(weights[name].shape)} to {_by(own[name].shape)}')
    return fitted


def check_classes(model: nn.Module, state: Mapping[str, torch.Tensor], path: Union[str, Path]) -> None:
    own = model.state_dict()
    for name in (f'{head}.weight' for head in _heads_of(model)):
        if name in own and name in state and state[name].ndim and own[name].shape[0] != state[name].shape[0]:
            raise UserError(
                f'{path} has {state[name].shape[0]} classes, the model or data set has {own[name].shape[0]}; '
                f'give --num-classes {state[name].shape[0]} or data with as many, or start from its body with '
                f'--pretrained-path'
            )


def check_fit(model: nn.Module, state: Mapping[str, torch.Tensor], path: Union[str, Path]) -> None:
    check_classes(model, state, path)
    own = model.state_dict()
    missing, surplus = [key for key in own if key not in state], [key for key in state if key not in own]
    shared = [key for key in own if key in state]
    other = [key for key in shared if own[key].shape != state[key].shape]
    kind = other_kinds({key: state[key] for key in shared}, own)
    if surplus and not missing and not isinstance(model, ConvertedModel) and all('.attn.' in key for key in surplus):
        raise UserError(
            f'{path} is of a converted model (it has {surplus[0]}), and this model is not converted: add --convert and '
            f'its --convert-kwargs, or give weights from before the conversion'
        )
    heads = tuple(f'{head}.' for head in _heads_of(model))
    if missing and not surplus and set(missing) == {key for key in own if key.startswith(heads)}:
        raise UserError(f'{path}: weights without a classifier; train.py starts from them with --pretrained-path')
    for keys, what in (
        (missing, 'lacks'),
        (surplus, 'has, unlike the model,'),
        (other, 'has in another shape'),
        (kind, 'has in another type of number'),
    ):
        if keys:
            raise UserError(
                f'{path} does not fit the model: it {what} {keys[0]}'
                + (f' and {len(keys) - 1} more' if len(keys) > 1 else '')
                + '; check --model, --model-kwargs, '
                + ('--convert, --convert-kwargs, ' if isinstance(model, ConvertedModel) else '')
                + '--in-chans and --img-size'
            )


def build_task(
    model: nn.Module,
    loss: LossConfig,
    device: torch.device,
    ema: Optional[EmaConfig] = None,
    kind: Callable[..., TrainingTask] = ClassificationTask,
) -> TrainingTask:
    """timm's task, which holds the model, its loss and, with `ema`, the average that this asks for.

    `kind` makes one of another kind, such as `distillation.task_kind` gives it.
    """
    try:
        task = kind(
            model,
            criterion_kwargs=dict(
                loss_type='bce' if loss.bce_loss else 'ce',
                smoothing=loss.smoothing,
                soft_targets=mixes(loss),
                bce_target_thresh=loss.bce_target_thresh,
            ),
            device=device,
            verbose=False,
        )
    except ValueError as error:
        raise UserError(first_line(error)) from error
    if ema is not None and ema.model_ema:
        task.setup_ema(decay=ema.model_ema_decay, use_warmup=ema.model_ema_warmup)
    return task


def compile_and_distribute(task: TrainingTask, compilation: Compilation, process: Process, **kwargs: Any) -> None:
    """Compile the task's model; with several processes make it DistributedDataParallel, with these keyword arguments.

    The model of the moving average is not compiled: it is only used for validation. `optimize_ddp` lets torch.compile
    split the model by DistributedDataParallel's buckets. A model that CUDA graphs replay is not split by default: the
    parts would be launched one by one, and older PyTorch cannot split one that computes activations again.
    """
    split = kwargs.pop('optimize_ddp', not compilation.graphs)
    if compilation.backend:
        torch._dynamo.config.optimize_ddp = split
        task.compile(**compilation.arguments)
    if process.distributed:
        with process.waiting('DistributedDataParallel, which compares and sends the weights'):
            task.prepare_distributed([process.local_rank] if process.device.type == 'cuda' else None, **kwargs)


def build_mixup(config: LossConfig, num_classes: int) -> Optional[Mixup]:
    """What mixes images and labels of a batch, None where the settings mix nothing."""
    if not mixes(config):
        return None
    if num_classes < 2:
        raise UserError(f'mixup and cutmix need two classes or more, not {num_classes}; set --mixup 0 --cutmix 0')
    return Mixup(
        mixup_alpha=config.mixup,
        cutmix_alpha=config.cutmix,
        prob=config.mixup_prob,
        switch_prob=config.mixup_switch_prob,
        mode=config.mixup_mode,
        label_smoothing=config.smoothing,
        num_classes=num_classes,
    )


def build_optimizer(model: nn.Module, config: OptimConfig, lr: float) -> torch.optim.Optimizer:
    """timm's optimizer; on a GPU the fused one of PyTorch's, which skips a step without the host having to wait."""
    kwargs: Dict[str, Any] = dict(eps=config.opt_eps, betas=config.opt_betas, layer_decay=config.layer_decay)
    if config.opt.lower() in FUSED and next(model.parameters()).is_cuda:
        kwargs['fused'] = True
    try:
        return create_optimizer_v2(
            model,
            opt=config.opt,
            lr=lr,
            weight_decay=config.weight_decay,
            momentum=config.momentum,
            **{name: value for name, value in kwargs.items() if value is not None},
        )
    except (AssertionError, AttributeError, RuntimeError, TypeError, ValueError, ImportError) as error:
        raise UserError(f'optimizer {config.opt}: {first_line(error)}') from error


def build_schedule(optimizer: torch.optim.Optimizer, config: ScheduleConfig, updates_per_epoch: int) -> Tuple[Any, int]:
    """timm's schedule and the number of epochs to train, cool-down and prefixed warm-up included."""
    kwargs = {**scheduler_kwargs(config), 'decay_epochs': config.decay_epochs}
    try:
        return create_scheduler_v2(optimizer, **kwargs, updates_per_epoch=updates_per_epoch)
    except (AssertionError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f'schedule {config.sched}: {first_line(error)}') from error


def model_line(model: Any, input_size: Sequence[int]) -> str:
    """Parameters, input and classes of a model, for the log."""
    parameters = sum(p.numel() for p in model.parameters())
    return f'{parameters / 1e6:.2f} M parameters, input {_by(input_size)}, {model.num_classes} classes'
