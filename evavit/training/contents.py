"""What a checkpoint holds, believed only after it has been checked.

A file may be damaged, of another program, or made to do harm. So its digest comes first (see `evavit.files`), nothing
but tensors and plain values is unpickled, and each value must be one that `checkpoint.Saver` writes. Whether the
tensors fit a run's model and optimizer is for `checkpoint.resume` to say.
"""

import argparse
import contextlib
import dataclasses
import json
import logging
import math
import os
import re
import zipfile
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Set, Tuple, Union

import safetensors
import torch
from timm.models._hub import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME
from timm.utils import load_checkpoint_metadata
from torch import nn

from evavit.arguments import PREPARATION, shown
from evavit.errors import UserError, first_line, reason_of
from evavit.files import RUN_WEIGHTS, check_parts, is_stamped, why_no_file
from evavit.hub import held_out, saved_config, source_folder, source_of
from evavit.models import model_names
from evavit.models._saved import HELD_OUT, config_beside, folder_settings
from evavit.models._weights import strange
from evavit.training.build import keep_cells, load_weights, read_weights, try_model
from evavit.training.config import (
    ExportConfig,
    InferenceConfig,
    ModelConfig,
    TrainConfig,
    ValidateConfig,
    WeightsConfig,
    options_of,
)
from evavit.training.data import resolve_input
from evavit.training.held_out import take_held_out
from evavit.training.loop import Position
from evavit.training.optimizer_state import judged_optimizer
from evavit.training.sections import is_number, is_plain, is_whole

log = logging.getLogger(__name__)

Loaded = Union[ValidateConfig, ExportConfig, InferenceConfig]

# What tells how a checkpoint is to be used, wherever no flag says otherwise.
FROM_CHECKPOINT = (
    'model',
    'num_classes',
    'in_chans',
    'img_size',
    'input_size',
    *PREPARATION,
    'convert',
    'convert_kwargs',
)
DIVISION = ('val_fraction', 'seed', 'train_split', 'data_dir')  # which images a run held out
KEPT = re.compile(r'checkpoint-([0-9]{1,9})\.pth\.tar')  # the names of the best few checkpoints in a run's folder
PLAN = {'images_per_update', 'updates_per_epoch', 'processes'}  # and images, which earlier versions did not write
MOST_EPOCHS = 1_000_000  # where the settings of the run do not say


def read_checkpoint(path: Path) -> Dict[str, Any]:
    """A checkpoint of a run, whole, whose every value is one that a run can have written.

    Files from before there were digests are judged by the checksums of their parts, which do not cover the directory of
    the archive: in that, some single changed bits go unnoticed.

    Raises:
        UserError: The file is cut short, damaged, of another kind, carries code, or holds what no run writes.
    """
    if path.suffix == '.safetensors':
        raise UserError(
            f'--resume {path}: holds weights alone, no epoch or optimizer to continue from; start from '
            f'them with --initial-checkpoint'
        )
    checkpoint = read_archive(path)
    state = checkpoint.get('state_dict') if isinstance(checkpoint, dict) else None
    if not is_weights(state):
        fault = next(_strange_in(state), 'it has no state_dict of tensors by name')
        raise UserError(f'{path}: not a checkpoint of train.py ({fault})')
    for name, value, right in _judged(checkpoint):
        if not right:
            raise UserError(f'{path}: not a checkpoint of this train.py (its {name} is {_shown(value)})')
    return checkpoint


def read_archive(path: Path) -> Any:
    """What `torch.save` wrote, tensors and plain values alone, on the CPU. UserError of `read_checkpoint`."""
    try:
        if not path.is_file():
            raise FileNotFoundError(why_no_file(path, what='checkpoint'))
        check_parts(path, sums=not is_stamped(path))
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location='cpu', weights_only=True)
    except PermissionError as error:
        raise UserError(f'{path}: cannot be read ({reason_of(error)})') from error
    except Exception as error:  # each format has its own errors for a broken file
        why = first_line(error)
        if 'weights_only' in why or 'Weights only' in why:  # PyTorch's own, with the advice to load it all the same
            why = 'it carries more than tensors and plain values, which may be code, so none of it is loaded'
        raise UserError(f'{path}: not a readable checkpoint ({why[:200]})') from error


def _judged(checkpoint: Dict[str, Any]) -> Iterator[Tuple[str, Any, bool]]:
    """(name, value, whether a run can have written it) of what is in a checkpoint beside the weights."""
    args, epoch, metric = (checkpoint.get(name) for name in ('args', 'epoch', 'metric'))
    yield 'args', args, args is None or (type(args) is argparse.Namespace and is_plain(vars(args)))
    yield from _judged_settings(vars(args) if args else {})
    yield 'epoch', epoch, epoch is None or is_whole(epoch, -1, _most_epochs(args) - 1)
    yield 'metric', metric, metric is None or is_number(metric)
    average, scaler, optimizer = (checkpoint.get(name) for name in ('state_dict_ema', 'amp_scaler', 'optimizer'))
    yield 'state_dict_ema', average, average is None or is_weights(average)
    if average is None:
        yield 'state_dict_ema', average, not getattr(args, 'model_ema', False)
    for name in ('task_state', 'task_state_ema'):  # the projection of a distillation of features
        state = checkpoint.get(name)
        yield name, state, state is None or (isinstance(state, dict) and all(map(is_weights, state.values())))
    yield 'amp_scaler', scaler, scaler is None or (isinstance(scaler, dict) and all(map(is_number, scaler.values())))
    yield from judged_optimizer(optimizer)
    saved = checkpoint.get('saver')
    yield 'saver', saved, saved is None or isinstance(saved, dict)
    if not saved:
        return
    yield 'saver.checkpoint_files', saved.get('checkpoint_files'), _is_ranking(saved.get('checkpoint_files', []))
    yield 'saver.best_epoch', saved.get('best_epoch'), saved.get('best_epoch') is None or is_whole(saved['best_epoch'])
    best = saved.get('best_metric')
    yield 'saver.best_metric', best, best is None or is_number(best)
    if 'position' not in saved:  # one of timm's train.py
        return
    plan, position = saved.get('plan'), saved['position']
    yield 'saver.plan', plan, isinstance(plan, dict) and plan.keys() - {'images'} == PLAN
    for name, value in plan.items():
        yield f'saver.plan.{name}', value, is_whole(value, 1)
    fields = {field.name for field in dataclasses.fields(Position)}
    yield 'saver.position', position, isinstance(position, dict) and position.keys() | {'parts'} == fields
    for name in ('lr', 'loss', 'grad_norm', 'seconds', 'waited'):
        value, least = position[name], -math.inf if name == 'loss' else 0
        yield f'saver.position.{name}', value, is_number(value) and value >= least
    yield 'saver.position.epoch', position['epoch'], is_whole(position['epoch']) and position['epoch'] - 1 == epoch
    yield 'saver.position.update', position['update'], is_whole(position['update'], 0, plan['updates_per_epoch'])
    yield 'saver.position.skipped', position['skipped'], is_whole(position['skipped'], 0, position['update'])
    yield 'saver.position.streak', position['streak'], is_whole(position['streak'])
    parts = position.get('parts', {})  # with a teacher alone
    yield 'saver.position.parts', parts, isinstance(parts, dict) and all(map(is_number, parts.values()))
    bad = position['bad']
    yield (
        'saver.position.bad',
        bad,
        isinstance(bad, dict) and all(is_whole(index) and isinstance(line, str) for index, line in bad.items()),
    )


def _judged_settings(settings: Dict[str, Any]) -> Iterator[Tuple[str, Any, bool]]:
    """As `_judged`, the settings that no flag gives: the names of the classes, and what the run held out."""
    names, total, digest = (settings.get(name) for name in ('class_names', 'held_out_of', 'held_out_sha256'))
    right = names is None or (isinstance(names, list) and all(isinstance(name, str) for name in names))
    yield 'class_names', names, right
    yield 'held_out_of', total, total is None or is_whole(total)
    yield 'held_out_sha256', digest, digest is None or isinstance(digest, str)
    yield 'evavit_held_out', (of_hub := settings.get('evavit_held_out')), of_hub is None  # of a folder for the Hub


def _most_epochs(args: Any) -> int:
    counts: List[Any] = [getattr(args, name, None) for name in ('epochs', 'warmup_epochs', 'cooldown_epochs')]
    return sum(counts) if all(map(is_whole, counts)) else MOST_EPOCHS  # the two last may come on top


def _is_ranking(files: Any) -> bool:
    """Names that `Saver` itself gives, each with a metric. The worst of these files is deleted when a better one comes:
    timm's own saver deletes whatever name is here, of any folder."""
    return (
        isinstance(files, (list, tuple))
        and all(isinstance(entry, (list, tuple)) and len(entry) == 2 for entry in files)
        and all(isinstance(name, str) and KEPT.fullmatch(name) and is_number(metric) for name, metric in files)
        and len({name for name, _ in files}) == len(files)
    )


def is_weights(state: Any) -> bool:
    return (
        isinstance(state, dict)
        and bool(state)
        and all(isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items())
        and not any(_strange_in(state))
    )


def _strange_in(state: Any) -> Iterator[str]:
    """What is wrong with tensors of a state dict: a file can hold sparse ones, and such without content."""
    for name, value in state.items() if isinstance(state, dict) else ():
        if isinstance(value, torch.Tensor) and (why := strange(value)):
            yield f'its state_dict.{name} is {why}'


def _shown(value: Any) -> str:
    plain = value is None or type(value) in (bool, float, str) or is_whole(value, -(2**63))
    return repr(value)[:60] if plain else f'of the kind {type(value).__name__}, with what a run does not write'


def _archive(path: Union[str, Path]) -> Dict[str, Any]:
    """What is in a file of torch.save, its tensors not yet read; nothing where it is of another kind.

    What train.py writes is a zip archive. Anything else, older files of PyTorch's too, has no settings; whether it has
    weights is for who reads those to say.
    """
    if not Path(path).is_file():
        raise UserError(f'{path}: {why_no_file(path, what="checkpoint")}')
    try:
        is_stamped(path)
        content = load_checkpoint_metadata(str(path)) if zipfile.is_zipfile(path) else {}
    except Exception as error:  # each format has its own errors for a broken file
        read_weights(path)
        raise UserError(f'{path}: not a readable checkpoint ({first_line(error)[:200]})') from error
    return content if isinstance(content, dict) else {}


def _metadata(path: Union[str, Path]) -> Dict[str, str]:
    """What is in a safetensors file beside the tensors."""
    if not Path(path).is_file():
        raise UserError(f'{path}: {why_no_file(path, what="checkpoint")}')
    try:
        is_stamped(path)
        with safetensors.safe_open(str(path), framework='pt') as file:
            return file.metadata() or {}
    except Exception as error:
        read_weights(path)
        raise UserError(f'{path}: not a readable checkpoint ({first_line(error)[:200]})') from error


def saved_settings(path: Union[str, Path]) -> Dict[str, Any]:
    """The settings that train.py stored in a checkpoint, {} for a file of other origin.

    Raises:
        UserError: The file is not there or damaged, or its settings are none that train.py takes.
    """
    if str(path).endswith('.safetensors'):
        try:
            settings = json.loads(_metadata(path).get('args', '{}'))
        except (ValueError, RecursionError) as error:
            raise UserError(f'{path}: not a checkpoint of train.py (its settings are no JSON: {error})') from error
    else:
        args = _archive(path).get('args')
        settings = vars(args) if isinstance(args, argparse.Namespace) else {}
    other = isinstance(settings, dict) and 'convert' not in settings and not str(path).endswith('.safetensors')
    try:
        _check_settings(settings, path)
    except UserError:
        if other:  # of another program, such as DeiT's, which means something else by these names
            return {}
        raise
    return settings


def _check_settings(settings: Any, path: Union[str, Path]) -> None:
    """UserError unless these are settings that train.py takes; they are what it makes of them then."""
    if not isinstance(settings, dict) or not is_plain(settings):
        raise UserError(f'{path}: not a checkpoint of train.py (its settings are not names with plain values)')
    for name, value, right in _judged_settings(settings):
        if not right:
            raise UserError(f'{path}: not a checkpoint of train.py (its {name} is {_shown(value)})')
    _parse(settings, (*FROM_CHECKPOINT, 'model_kwargs'), path)
    if settings.get('val_fraction') is not None:
        _parse(settings, DIVISION, path)


def _parse(settings: Dict[str, Any], names: Sequence[str], path: Union[str, Path]) -> None:
    """Make of each of these settings what train.py makes of its flag; UserError of what it would refuse."""
    options = options_of('train')
    for name in names:
        if settings.get(name) not in (None, ''):  # timm's train.py stores '' for what was not given
            settings[name] = options[name].parse(settings[name], f'{path}, its settings')


def enter_run_folders(config: TrainConfig) -> None:
    """`enter_run_folder`, where a run starts from weights or a teacher has them."""
    for section, name in (
        (config.model, 'pretrained_path'),
        (config.model, 'initial_checkpoint'),
        (config.distil, 'kd_pretrained_path'),
    ):
        setattr(section, name, enter_run_folder(getattr(section, name)))


def enter_run_folder(path: Optional[str]) -> Optional[str]:
    """The file of the best weights where this is a run's folder. Other folders stay, to be refused."""
    if path and os.path.isdir(path) and any(os.path.isfile(os.path.join(path, name)) for name in BEST_FIRST):
        return str(best_weights(Path(path)))
    return path


def has_metadata(path: Path, entries: Dict[str, str]) -> bool:
    """Whether a safetensors file is there, whole, and has these entries."""
    return entries.items() <= metadata_of(path).items()


def metadata_of(path: Path) -> Dict[str, str]:
    """What a safetensors file of a run says beside its weights: nothing where it is not there or not whole."""
    try:
        return _metadata(path) if is_stamped(path) else {}
    except (OSError, ValueError, UserError):
        return {}


def has_average(path: Union[str, Path]) -> bool:
    names = 'state_dict_ema', 'model_ema'  # as timm reads them
    return not str(path).endswith('.safetensors') and any(_archive(path).get(name) is not None for name in names)


def stored_metric(path: Union[str, Path]) -> Optional[float]:
    """What a checkpoint was ranked by, None where that is not in the file."""
    if str(path).endswith('.safetensors'):
        metric: Any = _metadata(path).get('metric', 'None')
        with contextlib.suppress(ValueError):
            metric = None if metric == 'None' else float(metric)
    else:
        metric = _archive(path).get('metric')
    if metric is not None and not is_number(metric):
        raise UserError(f'{path}: not a checkpoint of train.py (its metric is {_shown(metric)})')
    return metric


def check_choice(flag: str, path: Union[str, Path]) -> None:
    """UserError where a flag chooses between the plain and the averaged weights of a file that has one set of them."""
    if str(path).endswith('.safetensors'):
        raise UserError(
            f'{flag}: {path} holds one set of weights, the averaged one where the run kept an average; leave the flag '
            f'out, or give a .pth.tar'
        )


def check_source(config: Loaded) -> None:
    """UserError unless the settings, completed from a checkpoint, name a model and weights that there are."""
    path = config.weights.checkpoint
    if not config.model.model and path:
        read_weights(path)  # says what is wrong with a file that is no checkpoint
        raise UserError(f'{path}: does not say of which model it is; give --model NAME')
    if not config.model.model:
        raise UserError('no model: give --model NAME, or --checkpoint FILE of a run of train.py')
    if config.weights.use_ema and path:
        check_choice('--use-ema', path)


# Of a run's folder, the first that is there. A safetensors file holds the averaged weights, where the run kept some.
BEST_FIRST = (*RUN_WEIGHTS, 'model_best.pth.tar', 'last.pth.tar')


def _enter_folder(config: Loaded, given: Set[str]) -> Dict[str, Any]:
    """Put the file that is meant in the place of a folder: a run's best weights, or those of `hub.save_folder`, with
    the model that its config.json makes unless --model names one. Returns what makes that model, {} of others."""
    folder = Path(config.weights.checkpoint or '')
    try:
        os.listdir(folder)
    except OSError as error:
        raise UserError(f'{folder}: cannot be read ({reason_of(error)})') from error
    if (folder / 'config.json').exists() and not any((folder / name).is_file() for name in RUN_WEIGHTS):
        content, conversion = _config_of(folder)
        names: Tuple[str, ...] = (HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME)
        name = next((name for name in names if (folder / name).is_file()), None)
        if name is None:
            raise UserError(f'{folder}: no {" or ".join(names)} beside its config.json; save the folder anew')
        config.weights.checkpoint = str(folder / name)
        if 'model' not in given:
            config.model.model = f'local-dir:{folder}'
            channels = (content.get('model_args') or {}).get('in_chans')
            if 'in_chans' not in given and channels in (1, 3):  # images are opened before there is a model
                config.model.in_chans = channels
            attention = (conversion or {}).pop('attention', 'eva')
            if conversion is not None and config.model.convert in (None, attention):
                config.model.convert = attention
                config.model.convert_kwargs = {**conversion, **(config.model.convert_kwargs or {})}
            return content
        return {}
    config.weights.checkpoint = str(best_weights(folder, config.weights.use_ema))
    return {}


def _check_convertible(name: Optional[str], source: Union[str, Path, None], architecture: Optional[str]) -> None:
    """UserError where --model names a model of this package for what holds a converted model of timm's."""
    if name in model_names():
        raise UserError(
            f'--model {name}: {source} is a converted {architecture}; leave --model out, the checkpoint names it'
        )


def _config_of(folder: Path) -> Tuple[Dict[str, Any], Optional[Dict[str, Any]]]:
    """`hub.saved_config`, with a UserError."""
    try:
        return saved_config(folder)
    except ValueError as error:
        raise UserError(str(error)) from error


def best_weights(folder: Path, use_ema: bool = False) -> Path:
    """The best weights in the folder of a run, with `use_ema` of the files that may hold an average beside others.
    UserError where there are none."""
    names = tuple(name for name in BEST_FIRST if not use_ema or name.endswith('.pth.tar'))
    name = next((name for name in names if (folder / name).is_file()), None)
    if name is None:
        if (folder / 'config.json').is_file():
            raise UserError(f'{folder}: the folder of save_folder, not of a run; give a file of weights, or a run')
        raise UserError(
            f"{folder}: a folder without weights, neither a run's ({', '.join(names)}) nor one of save_folder "
            f'(config.json); give the folder of a run, or a file'
        )
    log.info(f'{folder}: {name} of this run')
    return folder / name


def _enter_converted(config: Loaded, given: Set[str]) -> Set[str]:
    """Take `--model local-dir:FOLDER` or hf-hub: of a converted network for `--checkpoint FOLDER`; returns what is
    given then. timm alone would make the network with softmax."""
    fetched = isinstance(config, InferenceConfig) or config.model.pretrained
    name = config.model.model or ''
    if config.weights.checkpoint or not (fetched or source_of(name)[0] == 'local-dir'):
        return given
    try:
        folder = source_folder(name)
        converted = folder is not None and saved_config(folder)[1] is not None
    except ValueError as error:
        raise UserError(f'--model {error}') from error
    if not converted:
        return given
    config.weights.checkpoint, config.model.pretrained = str(folder), False
    return given - {'model'}


def complete_from_checkpoint(config: Loaded, given: Set[str]) -> Optional[List[str]]:
    """Fill in what no flag said from the settings that the checkpoint carries, or its folder. Returns the names of its
    classes, if any."""
    if config.weights.checkpoint and config.model.pretrained:
        raise UserError('--pretrained and --checkpoint both name weights: give one of them')
    given, content = _enter_converted(config, given), {}
    if config.weights.checkpoint and Path(config.weights.checkpoint).is_dir():
        content = _enter_folder(config, given)
    model, path = config.model, config.weights.checkpoint
    saved = origin(path) if path and not content else {}
    if path and not content and source_of(model.model)[0]:
        saved, given = _of_both(path, saved, model), given - {'model'}
    if 'model' not in given and source_of(saved.get('model'))[0]:
        raise UserError(
            f'{path}: its model {saved["model"]} lies elsewhere, where it may be another by now; if it is not, add '
            f'--model {saved["model"]}'
        )
    kwargs = dict(saved.get('model_kwargs') or {})
    if given & {'img_size', 'input_size'}:  # either says the size, of which the run may have told the model itself
        given = given | {'img_size', 'input_size'}
        kwargs.pop('img_size', None)
    if 'convert' in given and model.convert != saved.get('convert'):  # the run's options are another attention's
        given = given | {'convert_kwargs'}
    if saved.get('convert') and 'convert' not in given:
        _check_convertible(model.model, path, saved.get('model'))
    for name in FROM_CHECKPOINT:
        if name not in given and name in saved:
            setattr(model, name, saved[name])
    keep_cells(model, saved, given)
    name = model.model or ''
    if isinstance(config, InferenceConfig):  # which has more names
        content = {}
    elif model.pretrained:
        content = origin(None, name)
    if isinstance(config, ValidateConfig) and (held := held_out(saved or content)):
        _parse(held, ('val_fraction', 'seed', 'train_split'), path or name)
        config.held_out = held
        take_held_out(config, given, held)
    if not saved or saved.get('model') in (model.model, name.split('.')[0]):
        model.model_kwargs = {**kwargs, **(model.model_kwargs or {})}
    content = saved or content
    if isinstance(config, ValidateConfig) and not config.data.class_map:
        _check_label_names(content, path or name)
    return _class_names(content)


def _of_both(path: str, saved: Dict[str, Any], model: ModelConfig) -> Dict[str, Any]:
    """The settings in a checkpoint, `saved`, where --model is a folder or repository: of another model than theirs is a
    UserError. What they leave open is as that place says, except its classes and images, which are of its own weights.
    """
    place = {name: value for name, value in origin(None, model.model).items() if name not in ('label_names', HELD_OUT)}
    if not saved.get('model') or source_of(saved['model'])[0]:  # weights alone, or of a run that named a place
        told = {name: value for name, value in saved.items() if value is not None}
        kwargs = dict(place['model_kwargs'])
        if told.keys() & {'img_size', 'input_size'}:
            place.pop('input_size', None)
            kwargs.pop('img_size', None)
        kwargs |= told.get('model_kwargs', {})
        return {**place, **told, 'model': place['model'], 'model_kwargs': kwargs}

    def parts(settings: Dict[str, Any]) -> Dict[str, Any]:
        conversion = {'convert': settings.get('convert'), **(settings.get('convert_kwargs') or {})}
        return {
            'model': settings['model'].split('.')[0],  # a tag says which weights, and those of the file are used
            **(settings.get('model_kwargs') or {}),
            **({} if model.convert else conversion),
        }

    own, other = parts(saved), parts(place)
    flags = {'img_size', *(model.model_kwargs or ()), *(model.convert_kwargs or ())}
    for name in own:
        if name in other and name not in flags and own[name] != other[name]:
            raise UserError(
                f'{model.model} is another model than that of {path} ({name} {shown(other[name])}, not '
                f'{shown(own[name])}); leave --model out, or name {saved["model"]}'
            )
    return saved


def origin(path: Optional[str], model: Optional[str] = None) -> Dict[str, Any]:
    """What tells where weights come from: the settings of the run that wrote the file, or in their words the
    `config.json` beside a file of `hub.save_folder`; without a file that of the folder that 'local-dir:FOLDER' or
    'hf-hub:owner/name' is. {} of others. UserError of what is damaged."""
    if path:
        beside = config_beside(path)
        return saved_settings(path) or (folder_settings(_config_of(beside.parent)[0]) if beside else {})
    try:
        place = source_folder(model or '')
    except ValueError as error:
        raise UserError(f'model {error}') from error
    return folder_settings(_config_of(place)[0]) if place else {}


def learnt_classes(config: ModelConfig, class_map: Optional[str] = None) -> Optional[List[str]]:
    """The names by label of the classes that the weights which a model starts from have learnt, None where nothing
    says. UserError of `origin`, and where names are damaged and no `class_map` stands for them."""
    path = config.pretrained_path or config.initial_checkpoint
    content = origin(path, config.model if config.pretrained else None)
    if not class_map:
        _check_label_names(content, path or config.model or '')
    return _class_names(content)


def _class_names(content: Dict[str, Any]) -> Optional[List[str]]:
    """The names of the classes in what `origin` gives, None where there are none, or not one for each class."""
    of_run = content.get('class_names')
    names = of_run or content.get('label_names')
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return None
    if of_run:
        return names
    return names if len(names) == len(set(names)) == content.get('num_classes', len(names)) else None


def _check_label_names(content: Dict[str, Any], source: str) -> None:
    """UserError where the names of a `config.json` are not one for each class: labels might mean other classes."""
    names = content.get('label_names')
    if content.get('class_names') or names is None or isinstance(names, dict):  # timm's, by class number
        return
    if _class_names(content) is not None:
        return
    if isinstance(names, list) and all(isinstance(name, str) for name in names):
        fault = f'{len(set(names))} different names for {content.get("num_classes", len(names))} classes'
    else:
        fault = 'damaged, no list of names'
    raise UserError(f'{source}: label_names in its config.json: {fault}; give --class-map FILE with a name for each')


def load_checkpoint(model: nn.Module, config: WeightsConfig) -> None:
    """Load the weights that the settings name, if they do, fitted to the model as `build.load_weights` does it."""
    path = config.checkpoint
    if not path:
        return
    if config.use_ema:
        read_weights(path)  # says what is wrong with a file that cannot be read
        if not has_average(path):
            raise UserError(f'--use-ema: {path} holds no averaged weights; leave the flag out')
    load_weights(model, path, use_ema=config.use_ema)


def finish_model(model: nn.Module, config: Loaded) -> Dict[str, Any]:
    """Load the weights into a model that was built, and try it. Returns timm's data settings of its images.
    UserError also where timm has put a random classifier in the place of the one of the published weights."""
    cfg: Dict[str, Any] = getattr(model, 'pretrained_cfg', None) or {}
    published, classes = cfg.get('num_classes'), getattr(model, 'num_classes', None)
    if config.model.pretrained and published is not None and published != classes:
        raise UserError(
            f'--num-classes {classes}: the weights of {config.model.model} have {published} classes, and a classifier '
            f'of {classes} would be random; leave --num-classes out, or train one first with train.py --pretrained'
        )
    load_checkpoint(model, config.weights)
    data_config = resolve_input(config.model, model)
    try_model(model, data_config['input_size'], config.model)
    return data_config
