"""Publish weights: a folder in the layout of the Hugging Face Hub, with a model card, or an upload to it."""

import contextlib
import hashlib
import inspect
import json
import logging
import os
import re
import tempfile
from pathlib import Path
from typing import Any, Dict, Optional, Sequence, Tuple, Union, cast

import timm
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import (
    EntryNotFoundError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from timm.layers import to_2tuple
from timm.models import build_model_with_cfg, get_model_args, get_model_input_config, resolve_model_input_args
from timm.models._features import FeatureGetterNet
from timm.models._hub import (
    HF_SAFE_WEIGHTS_NAME,
    HF_WEIGHTS_NAME,
    download_from_hf,
    generate_readme,
    save_config_for_hf,
)
from timm.models._input import update_model_input_size
from timm.utils import unwrap_model

from evavit.arguments import per_channel, shown, too_large, wrong_preparation
from evavit.card import model_card
from evavit.errors import first_line
from evavit.files import RUN_WEIGHTS, DamagedError, is_stamped, replacing_in
from evavit.models import ConvertedModel, convert_vit, model_names, read_weights, write_weights
from evavit.models._saved import CONVERSION, HELD_OUT, saved_args, saved_preparation
from evavit.models._weights import check_kinds, disk_errors, folder_weights
from evavit.version import __version__

__all__ = ['load_converted', 'publish', 'save_folder', 'saved_config']

log = logging.getLogger(__name__)

_HUB = 'hf-hub:'
_CARD = 'evavit_card_sha256'  # the entry of config.json with the digest of the README.md that was written with it

_MAKERS = timm.create_model, build_model_with_cfg
_NOT_OF_A_MODEL = {'device', 'dtype', *(name for maker in _MAKERS for name in inspect.signature(maker).parameters)}
_NOT_OF_A_MODEL -= {'kwargs'}


def held_out(settings: Dict[str, Any]) -> Dict[str, Any]:
    """What a run of train.py held out of an undivided folder, by its settings or a `config.json`, {} for nothing.

    The keys are val_fraction, seed, train_split, which of the images they were, and data_dir_sha256, of which folder: a
    digest of where it lay, which others can compare and not read. Newer runs also say what `val_fraction` came to, in
    the keys of `training.data.held_out`.
    """
    if HELD_OUT in settings:
        return settings[HELD_OUT]
    if settings.get('val_fraction') is None:
        return {}
    found = {name: settings.get(name) for name in ('val_fraction', 'seed', 'train_split')}
    found |= {name: settings[name] for name in ('held_out_of', 'held_out_sha256') if name in settings}
    return {**found, 'data_dir_sha256': folder_digest(settings.get('data_dir') or '')}


def folder_digest(path: str) -> str:
    """SHA-256 of where a folder lies."""
    with contextlib.suppress(ValueError):  # of a name that no file system takes
        path = os.path.realpath(path)
    return hashlib.sha256(path.encode(errors='surrogatepass')).hexdigest()


def _config(
    model: torch.nn.Module,
    label_names: Optional[Sequence[str]],
    readme: bytes,
    licence: str,
    recipe: Optional[Dict[str, Any]] = None,
    **_: Any,
) -> Dict[str, Any]:
    config: Dict[str, Any] = {'pretrained_cfg': {'license': licence}, _CARD: hashlib.sha256(readme).hexdigest()}
    if isinstance(model, ConvertedModel):
        config[CONVERSION] = model.conversion
    if held := held_out(recipe or {}):
        config[HELD_OUT] = held
    return {**config, 'label_names': list(label_names)} if label_names else config


def _own_names(model: torch.nn.Module) -> Optional[Sequence[str]]:
    names = (getattr(model, 'pretrained_cfg', None) or {}).get('label_names')
    names = _in_order(names)
    return names if names and len(names) == getattr(model, 'num_classes', None) else None


def _without_num_classes(path: Path) -> None:
    """`config.json` with num_classes at its top alone, where timm and transformers look for it: transformers' AutoModel
    hands it to the model beside model_args, and refuses it there."""
    config = json.loads(path.read_text(encoding='utf-8'))
    config.get('model_args', {}).pop('num_classes', None)
    path.write_text(json.dumps(config, indent=2), encoding='utf-8')


def _check_card(
    model: torch.nn.Module,
    label_names: Optional[Sequence[str]],
    data_config: Optional[Dict[str, Any]],
    card: Dict[str, Any],
) -> None:
    """ValueError, one line, where the card lacks what it must say, the names are not those of the classes, images
    cannot be prepared so, or weights are not finite."""
    for name, example, form in (
        ('data', 'ImageNet-1k', r'[^\r\n]*\S[^\r\n]*'),
        ('licence', 'apache-2.0', r'\w[\w.+() -]*'),
    ):
        if name not in card:
            wrong = 'license' if name == 'licence' and 'license' in card else ''
            raise ValueError(f'{wrong or name}: the model card needs {name}={example!r}' + ', spelt so' * bool(wrong))
        if not isinstance(card[name], str) or not re.fullmatch(form, card[name]):
            raise ValueError(f'{name} {shown(card[name])}: must be a line of text, such as {name}={example!r}')
    if label_names is not None:
        named = isinstance(label_names, (list, tuple)) and all(isinstance(name, str) for name in label_names)
        if not named or len(set(label_names)) < len(label_names):
            raise ValueError(f'label_names {shown(label_names)}: must be a list of names that differ, one a class')
    classes = getattr(model, 'num_classes', None)
    if label_names and classes and len(label_names) != classes:
        raise ValueError(f'label_names has {len(label_names)} names, the model {classes} classes')
    try:
        about = json.loads(json.dumps(data_config or {}))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f'data_config: must hold plain numbers and names ({first_line(error)[:200]})') from error
    if unfit := wrong_preparation(about, getattr(model, 'in_chans', None)):
        raise ValueError(f'data_config: {unfit}')
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not value.isfinite().all():
            raise ValueError(f'the weights are not finite ({name} has NaN or infinite values); save others')


def _check_remade(model: torch.nn.Module) -> None:
    """ValueError unless `config.json` makes the model again, which is tried without memory for its weights."""
    if isinstance(model, FeatureGetterNet):
        raise ValueError('a model of features_only=True cannot be saved; save the one that is made without it')
    if not getattr(model, 'pretrained_cfg', None):
        raise ValueError(
            f'{type(model).__name__} has no pretrained_cfg, which says how to make it again; make it with '
            f'timm.create_model'
        )
    for name, value in get_model_args(model).items():
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f'{name} {shown(value)}: config.json cannot hold this argument of the model; make it with a '
                f"name that timm knows, as act_layer='relu' or norm_layer='layernorm', and load the weights into it"
            ) from error
    with tempfile.TemporaryDirectory() as folder, torch.device('meta'):
        save_config_for_hf(model, str(Path(folder) / 'config.json'))
        _without_num_classes(Path(folder) / 'config.json')
        again: torch.nn.Module = timm.create_model(f'local-dir:{folder}')
        if isinstance(model, ConvertedModel):
            again = convert_vit(again, inplace=True, **model.conversion)
    own, made = ({key: value.shape for key, value in m.state_dict().items()} for m in (model, again))
    other = [key for key in {**own, **made} if own.get(key) != made.get(key)]
    if other:
        raise ValueError(
            f'the arguments that the model was made with do not make it again: {other[0]} differs, as after '
            f'prune_intermediate_layers; make it with its own depth and parts in timm.create_model, load the weights '
            f'and save that'
        )


def _has_own_card(folder: Path) -> bool:
    """Whether a folder's README.md is somebody's own: it has changed since `save_folder` wrote it, or is there alone,
    as in a new repository of the Hub. ValueError, one line, where a file that `save_folder` writes is of others."""
    weights, config, card = (folder / name for name in (HF_SAFE_WEIGHTS_NAME, 'config.json', 'README.md'))
    there = [path.name for path in (weights, config, card) if os.path.lexists(path)]
    found = card.read_bytes() if card.is_file() else None
    written = None
    with contextlib.suppress(OSError, ValueError, AttributeError, RecursionError):
        written = json.loads(config.read_bytes()).get(_CARD) if config.is_file() else None
    try:
        own = not os.path.lexists(weights) or (weights.is_file() and is_stamped(weights))
    except DamagedError:
        own = True
    alone = there == [card.name] and found is not None and found.startswith(b'---')
    if there and not alone and not (own and written and (found is not None or card.name not in there)):
        raise ValueError(
            f'{folder}: has a {there[0]} that save_folder did not write; give another folder, or overwrite=True'
        )
    return found is not None and hashlib.sha256(found).hexdigest() != written


def save_folder(
    model: torch.nn.Module,
    folder: Union[str, Path],
    *,
    data_config: Optional[Dict[str, Any]] = None,
    label_names: Optional[Sequence[str]] = None,
    overwrite: bool = False,
    **card: Any,
) -> Path:
    """Write weights (`model.safetensors`), `config.json` and the model card `README.md` to a folder, each file whole or
    not at all.

    `timm.create_model('local-dir:FOLDER', pretrained=True)` makes the same model again, `load_converted` one that was
    converted, and the folder can be uploaded as it is.

    Args:
        model: A model from `timm.create_model`, or what `evavit.convert_vit` made of one.
        folder: Folder to write to; made if it is missing. One that this function wrote is written anew, as
            transformers' `save_pretrained` does, but for a card that was edited since: it stays, and a warning says so.
            Files of the same names that others wrote are not replaced.
        data_config: How images are prepared (mean, std, interpolation, crop_pct …); by default the model's own.
        label_names: Names of the classes, in their order; by default those that a model of a run or of such a folder
            brings, while it has as many classes.
        overwrite: Replace files that others wrote, and an edited card, too.
        **card: data, licence, recipe, metrics and description of `model_card`. Of a recipe with `val_fraction`,
            `config.json` keeps what validate.py needs to find the images that the run held out.

    Raises:
        ValueError: one line on a folder of a run, or with files that others wrote; on a model that could not be made
            again: of features_only=True, pruned, or made without timm.create_model; on weights that are not finite; on
            a card without a line of data or licence, on names that are not those of the classes, or on a data_config
            that prepares no images.
    """
    model = unwrap_model(model)
    label_names = label_names or _own_names(model)
    _check_card(model, label_names, data_config, card)
    _check_remade(model)
    path = Path(folder)
    for name in RUN_WEIGHTS:
        if (path / name).is_file():  # one of the two would be taken for the other
            raise ValueError(f'{folder}: the folder of a run, which wrote {name}; give another folder')
    keep_card = not overwrite and _has_own_card(path)
    path.mkdir(parents=True, exist_ok=True)
    with replacing_in(path) as partial, disk_errors():
        readme = generate_readme(model_card(model, **{'source': f'local-dir:{path}', **card}), path.name).encode()
        config = _config(model, label_names, readme, **card)
        save_config_for_hf(model, str(partial / 'config.json'), config, data_config=data_config)
        _without_num_classes(partial / 'config.json')
        write_weights(model.state_dict(), partial / HF_SAFE_WEIGHTS_NAME)
        if not keep_card:
            (partial / 'README.md').write_bytes(readme)
    if keep_card:
        log.warning(
            f'{path}/README.md is not what save_folder wrote there, and stays; overwrite=True writes a new card'
        )
    return path


def saved_config(folder: Path) -> Tuple[Dict[str, Any], Optional[Dict[str, Any]]]:
    """The `config.json` of a folder, and in it the arguments of `evavit.convert_vit`, None for a model that was not
    converted.

    Raises:
        ValueError: one line: no config.json, or a damaged one.
    """
    try:
        there = 'no config.json' if folder.exists() else 'no such folder'
        missing = None if (folder / 'config.json').is_file() else there
    except (OSError, ValueError):  # a name that no file system takes
        missing = 'no such folder'
    if missing:
        raise ValueError(
            f'{str(folder)[:500]}: {missing}, so no model; give a folder of evavit.hub.save_folder, or of a run '
            f'of train.py'
        )
    try:
        config = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
        conversion, arguments = config.get(CONVERSION), config.get('model_args') or {}
        own = sorted(_NOT_OF_A_MODEL & arguments.keys())
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(
            f'{folder}: config.json is damaged ({first_line(error)[:200]}); save the folder anew'
        ) from error
    if own:
        raise ValueError(f'{folder}: config.json makes no model: {", ".join(own)} in model_args is no argument of one')
    if conversion is not None and not isinstance(conversion, dict):
        raise ValueError(f'{folder}: config.json is damaged ({CONVERSION} holds no arguments); save the folder anew')
    if foreign := sorted({'model', 'inplace'} & (conversion or {}).keys()):
        raise ValueError(f'{folder}: config.json is damaged ({CONVERSION} has {foreign[0]}); save the folder anew')
    if excess := too_large(arguments) or too_large(conversion or {}):
        raise ValueError(f'{folder}: config.json makes no model: {excess}')
    architecture = config.get('architecture')
    if architecture is not None and not (isinstance(architecture, str) and re.fullmatch(r'[\w.]+', architecture)):
        raise ValueError(
            f'{folder}: config.json is damaged (architecture {shown(architecture)} is no name of a model); save the '
            f'folder anew'
        )
    if not isinstance(held_out(config), dict):
        raise ValueError(f'{folder}: config.json is damaged ({HELD_OUT} holds no entries); save the folder anew')
    about = config.get('pretrained_cfg', config)  # timm's older form has all in one place
    if wrong := wrong_preparation(about, arguments.get('in_chans')):
        raise ValueError(f'{folder}: config.json is damaged (pretrained_cfg: {wrong}); save the folder anew')
    for name in ('classifier', 'first_conv'):  # one module, or several
        modules = about.get(name)
        if modules is not None and not (isinstance(modules, str) or _is_texts(modules)):
            told = f'pretrained_cfg: {name} {shown(modules)} is no name of a module'
            raise ValueError(f'{folder}: config.json is damaged ({told}); save the folder anew')
    if names := config.get('label_names') or (about or {}).get('label_names'):
        try:
            config['label_names'] = _in_order(names)
        except ValueError as error:
            raise ValueError(f'{folder}: config.json is damaged ({error}); save the folder anew') from error
    return config, conversion


def lost_conversion(folder: Path) -> Optional[str]:
    """One line where the weights of a folder are of a converted model and its config.json does not say so, None else.

    Raises:
        RuntimeError: one line: its weights cannot be read.
    """
    config, conversion = saved_config(folder)
    file = folder_weights(folder)
    if conversion is not None or file is None or config.get('architecture') in model_names():
        return None
    name = next((name for name in read_weights(file) if '.attn.summary_' in name), None)
    return name and (
        f'{folder}: its weights are of a converted model (they have {name}), but its config.json says no conversion: '
        f"timm's save_for_hf and push_to_hf_hub write none; save the model anew by evavit.hub.save_folder (publish for "
        f'the Hub)'
    )


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _in_order(names: Any) -> Any:
    """Names of classes as a list, of which timm also writes {number: name}. ValueError of other numbers."""
    if not isinstance(names, dict):
        return names
    of_class = {str(number): name for number, name in names.items()}
    if of_class.keys() != set(map(str, range(len(names)))):
        raise ValueError(f'label_names are not of classes 0 to {len(names) - 1}')
    return [of_class[str(number)] for number in range(len(names))]


def load_converted(
    source: Union[str, Path],
    *,
    img_size: Union[int, Tuple[int, int], None] = None,
    features_only: bool = False,
    partition_grid: Optional[int] = None,
    **kwargs: Any,
) -> torch.nn.Module:
    """A model that was converted, by `evavit.convert_vit` or `train.py --convert`, with its weights.

    `timm.data.resolve_data_config(model=model)` says how its images are prepared, as for any model of timm's. The
    keywords are those of `timm.create_model`.

    Args:
        source: A folder of `save_folder`, 'hf-hub:owner/name', the folder of a run of train.py, of which the best
            weights are taken (the average where it kept one), or one of the run's `.safetensors` files.
        img_size: Side, or height and width, of the images in pixels; by default as trained. Position embeddings are
            resampled by the model's `set_input_size`; the number of cells stays, so larger images have larger ones.
        features_only: A backbone that gives a list of maps `(B, C, height, width)`; `out_indices` says of which blocks.
        partition_grid: Cells asked for along each axis, by default as trained. No weight depends on their number, so
            larger images can have more of them: cells of 3 tokens where it is a third of the tokens along a side.
        **kwargs: Arguments of the model that leave its weights their shapes, such as dynamic_img_size=True,
            dynamic_img_pad=True or drop_path_rate=0.1.

    Raises:
        ValueError: one line: no such folder or repository, damaged settings, no converted model in it, or arguments
            that do not fit.
        RuntimeError: one line on weights that cannot be read, or that are not of the model.
    """
    name = str(source).removeprefix('local-dir:')
    folder = source_folder(name) or Path(name)
    file = _weights_of_run(folder)
    if file is None:
        settings, file = 'config.json', folder / HF_SAFE_WEIGHTS_NAME
        arguments: Dict[str, Any] = dict(model_name=f'local-dir:{folder}')
        conversion = saved_config(folder)[1]
        instead = f"timm.create_model('local-dir:{folder}', pretrained=True)"
    else:
        settings = 'its settings'
        arguments, conversion = _settings_of_run(file)
        maps = f"features_only=True, pretrained=True, pretrained_cfg_overlay=dict(file='{file}')"
        how = maps if features_only else f"checkpoint_path='{file}'"  # which has the names of timm's wrapper
        instead = f'timm.create_model({arguments["model_name"]!r}, {how}, …)'
    if conversion is None:
        if settings == 'config.json' and (reason := lost_conversion(folder)):
            raise ValueError(reason)
        raise ValueError(f'{name}: not a converted model; {instead} loads it')
    if own := ', '.join(sorted(_NOT_OF_A_MODEL & kwargs.keys())):
        raise ValueError(f'load_converted takes no {own}: model and weights are those of {name}; leave it out')
    kwargs = {**kwargs, **({'features_only': True} if features_only else {})}
    cells = {} if partition_grid is None else dict(partition_grid=partition_grid)
    if given := {**kwargs, **cells}:
        settings += ' with ' + ', '.join(f'{key}={shown(value)}' for key, value in given.items())
    try:
        made = timm.create_model(**{**resolve_model_input_args(**arguments), **kwargs})
        model = convert_vit(made, inplace=True, **{**conversion, **cells})
    except Exception as error:  # each model has its own errors for arguments that do not fit
        raise ValueError(f'{name}: {settings} makes no model: {first_line(error)[:400]}') from error
    vit: Any = model.model if features_only else model
    weights, there = read_weights(file), vit.state_dict()
    if features_only:  # the blocks behind the last map and the classifier are not
        weights = {key: value for key, value in weights.items() if key in there}
    try:
        check_kinds(weights, vit)
        vit.load_state_dict(weights)
    except RuntimeError as error:
        raise RuntimeError(f'{file}: not the weights of {settings}: {first_line(error)[:400]}') from error
    if img_size is not None:
        size, patch = to_2tuple(img_size), vit.patch_embed.patch_size
        if len(size) != 2 or not all(
            type(side) is int and side >= step for side, step in zip(size, patch, strict=True)
        ):
            raise ValueError(
                f'img_size {shown(img_size)}: takes a side, or height and width, in pixels, of at least a patch'
            )
        vit.set_input_size(size)
        update_model_input_size(model, vit.patch_embed.img_size)  # of features_only=True too, which has its own record
    cfg: Dict[str, Any] = cast(Any, model).pretrained_cfg
    cfg['input_size'] = get_model_input_config(model)['input_size']
    for key in ('mean', 'std'):  # of grey images timm keeps the three numbers of colours
        cfg[key] = per_channel(cfg[key], cfg['input_size'][0])
    return model


def source_of(name: Optional[str]) -> Tuple[str, str]:
    """('local-dir', folder) or ('hf-hub', repository) of a model's name, as timm reads it; ('', '') for one of its
    list."""
    source, _, rest = (name or '').partition(':')
    source = source.lower().replace('_', '-')
    return (source, rest) if source in ('local-dir', 'hf-hub') else ('', '')


def source_folder(name: str) -> Optional[Path]:
    """The folder that 'local-dir:FOLDER' names, or the one of the Hub's cache that holds 'hf-hub:owner/name', which is
    downloaded where it is not there; None for a name of timm's list.

    Raises:
        ValueError: one line on what cannot be had from the Hub.
    """
    source, rest = source_of(name)
    if source == 'local-dir':
        if not os.path.isdir(rest):
            raise ValueError(f'{name}: no such folder')
        run = _weights_of_run(Path(rest))
        if run is not None:
            raise ValueError(
                f'{name}: the folder of a run, not one of save_folder; train.py goes on from it with --pretrained-path '
                f"{run} and the run's --model and --convert, the other programs take it as --checkpoint {rest}"
            )
        return Path(rest)
    if source != 'hf-hub':
        return None
    try:
        folder = Path(download_from_hf(rest, 'config.json')).parent
        if saved_config(folder)[1] is not None:
            download_from_hf(rest, HF_SAFE_WEIGHTS_NAME)
        return folder
    except Exception as error:  # the Hub's client has many
        raise ValueError(f"{name}: {why_not_fetched(error)}; give a folder, or 'hf-hub:owner/name'") from error


def source_weights(name: str) -> Optional[Path]:
    """The file from which timm takes the weights of what `source_folder` names, downloaded where it is not there; None
    for a name of timm's list, and where only timm finds it. Whoever lets timm read it reads it with `read_weights`
    before: timm looks at no digest.

    Raises:
        ValueError: one line on what cannot be had from the Hub.
    """
    folder = source_folder(name)
    source, repository = source_of(name)
    if folder is None or source == 'local-dir':
        return folder and folder_weights(folder)
    content = saved_config(folder)[0]
    own = content.get('pretrained_cfg', content).get('hf_hub_filename')
    for file in (own,) if own else (HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME):
        try:
            return Path(download_from_hf(repository, file))
        except EntryNotFoundError:
            continue
        except Exception as error:  # the Hub's client has many
            raise ValueError(f'{name}: {why_not_fetched(error)}') from error
    return None


def why_not_fetched(error: Exception, how: str = '') -> str:
    """What the Hub's client, or timm with it, could not do, in a few words; `how` a program takes a file instead."""
    if isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled)):
        return (
            'the Hugging Face Hub cannot be reached, and the cache of this machine does not have it: connect once, or '
            f'give a file that was fetched elsewhere{how and ", "}{how}'
        )
    if isinstance(error, RepositoryNotFoundError):
        return 'no such repository on the Hugging Face Hub, or one that asks for a login'
    if 'weights_only' in str(error):  # PyTorch's, with the advice to load it all the same
        return (
            'its weights carry more than tensors, which may be code, so none of it is loaded; ask for model.safetensors'
        )
    return first_line(error)[:400]


def _weights_of_run(path: Path) -> Optional[Path]:
    """The file of a run's weights, of its folder the best ones; None for a folder that has none of their names."""
    if path.suffix == '.safetensors' and not os.path.isdir(path):
        return path
    if os.path.isfile(path):
        raise ValueError(f'{path}: is a file; give its folder, or a .safetensors file of a run of train.py')
    if os.path.isfile(path / 'config.json'):
        return None
    return next((path / name for name in RUN_WEIGHTS if os.path.isfile(path / name)), None)


def _settings_of_run(file: Path) -> Tuple[Dict[str, Any], Optional[Dict[str, Any]]]:
    """What makes the model that train.py trained: arguments of timm's `resolve_model_input_args`, and those of
    `convert_vit`, None where it was not converted."""
    read_weights(file)  # says what is wrong with a file that cannot be read
    try:
        saved = saved_args(file)
        names, kwargs = saved.get('class_names'), saved.get('model_kwargs') or {}
        conversion = {**(saved.get('convert_kwargs') or {}), 'attention': saved.get('convert')}
        own = sorted((_NOT_OF_A_MODEL | {'args', 'num_classes'}) & kwargs.keys())
        if names is not None and not _is_texts(names):
            raise ValueError('class_names are no list of names')
        about = saved_preparation(saved)
    except (AttributeError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f'{file}: its settings are damaged ({first_line(error)[:200]})') from error
    if not isinstance(saved.get('model'), str):
        raise ValueError(
            f'{file}: holds no settings of train.py; give a file that it wrote, or a folder of save_folder'
        )
    if ':' in saved['model']:
        raise ValueError(
            f'{file}: its model {saved["model"]} would have to be fetched; make it with timm.create_model and '
            f'evavit.convert_vit, and load the file into it'
        )
    if why := ', '.join(own) or too_large(kwargs):
        raise ValueError(f'{file}: its settings make no model: model_kwargs {why}')
    return dict(
        model_name=saved['model'],
        args={name: saved.get(name) for name in ('in_chans', 'img_size', 'input_size')},
        num_classes=saved.get('num_classes') or len(names or ()),
        pretrained_cfg_overlay={**about, **({'label_names': names} if names else {})},
        **kwargs,
    ), conversion if saved.get('convert') else None


def publish(
    model: torch.nn.Module,
    repo_id: str,
    *,
    data_config: Optional[Dict[str, Any]] = None,
    label_names: Optional[Sequence[str]] = None,
    private: bool = False,
    **card: Any,
) -> Any:
    """Upload to the Hugging Face Hub what `save_folder` writes, with its arguments, as timm's `push_to_hf_hub` does.

    A token of the Hub's own login is used. An existing model card is left as it is. Returns
    what `huggingface_hub.HfApi.upload_folder` does.
    """
    model = unwrap_model(model)
    _check_card(model, label_names, data_config, card)
    _check_remade(model)
    api = HfApi(library_name='evavit', library_version=__version__)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as temporary:
        card = {'source': f'hf-hub:{repo_id}', **card}
        folder = Path(temporary) / repo_id.split('/')[-1]  # the card's title
        save_folder(model, str(folder), data_config=data_config, label_names=label_names, **card)
        if api.file_exists(repo_id=repo_id, filename='README.md'):
            (folder / 'README.md').unlink()
        return api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message='Add model')
