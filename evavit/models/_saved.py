"""What stands beside weights: in their file the settings of the run that wrote it, or in a folder its config.json."""

import contextlib
import json
import zipfile
from pathlib import Path
from typing import Any, Dict, Iterable, List, Mapping, Optional, Tuple, Union

import safetensors
from timm.models._hub import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME
from timm.utils import load_checkpoint_metadata

from evavit.arguments import PREPARATION, per_channel, shown, wrong_preparation
from evavit.errors import first_line
from evavit.files import open_regular

__all__ = [
    'CONVERSION',
    'HELD_OUT',
    'as_trained',
    'config_beside',
    'folder_settings',
    'saved_anew',
    'saved_args',
    'saved_conversion',
    'saved_preparation',
    'trained_size',
]

CONVERSION = 'evavit_convert'  # the entry of config.json with the arguments of convert_vit
TIMM_S = {'pretrained_cfg', 'input_size'}  # one of them is in a config.json of timm's beside `architecture`, by its age
HELD_OUT = 'evavit_held_out'  # the one with what a run held out of its images, see `hub.held_out`
TRANSFORMERS = 'transformers_version'  # the one of transformers, which builds the model with softmax and saves that


def saved_args(file: Union[str, Path]) -> Any:
    """The settings that train.py wrote beside the tensors of a `.safetensors` file, {} where there are none."""
    with safetensors.safe_open(str(file), framework='pt') as opened:
        return json.loads((opened.metadata() or {}).get('args', '{}'))


def saved_conversion(file: Union[str, Path]) -> Optional[str]:
    """The attention to which the network of a file of `read_weights` was converted, '' where its run left softmax, None
    where nothing says."""
    saved = _settings_of(file)
    of_others = config_beside(file) or not str(file).endswith('.safetensors')  # such as timm or DeiT's program
    if not isinstance(saved.get('model'), str) or ('convert' not in saved and of_others):
        return None
    convert = saved.get('convert')
    return convert if isinstance(convert, str) and convert != 'softmax' else ''


def saved_anew(file: Union[str, Path], names: Iterable[str]) -> Optional[str]:
    """One line where what stands beside a file says a conversion, and another program has made the model, with softmax,
    and saved it: transformers, or one that left out the summaries. None else, and where summaries are among `names`."""
    saved = _settings_of(file)
    told: List[Any] = [saved.get(name) for name in ('convert', 'convert_kwargs', TRANSFORMERS)]
    convert, options, transformers = told
    summaries = convert == 'eva' and isinstance(options, dict)  # others do not say
    summaries = summaries and options.get('partition_grid') != 0 and options.get('summary') != 'identity'
    if not isinstance(convert, str) or convert in ('', 'softmax') or not (transformers or summaries):
        return None
    if any('.attn.summary_' in name for name in names):
        return None
    return (
        f'it was converted to {shown(convert)}, as stands beside it, and another program has saved it anew, with '
        f'softmax; give the file or folder from before that'
    ) + f', or take {CONVERSION} out of its config.json to use it with softmax' * bool(transformers)


def trained_size(file: Union[str, Path]) -> Optional[Tuple[int, int]]:
    """Height and width of the images that the weights of a file were trained on, None where neither the settings of a
    run in it nor the config.json beside it say."""
    saved = _settings_of(file)
    for size in (saved.get('input_size'), saved.get('img_size'), saved.get('model_kwargs')):
        size = size.get('img_size') if isinstance(size, dict) else size
        size = [size, size] if isinstance(size, int) else size
        if isinstance(size, (list, tuple)) and len(size) >= 2 and all(isinstance(side, int) for side in size):
            return size[-2], size[-1]
    return None


def config_beside(file: Union[str, Path]) -> Optional[Path]:
    """The config.json that tells of a file of `hub.save_folder` or of timm, None of others."""
    beside = Path(file).with_name('config.json')
    if Path(file).name not in (HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME) or not beside.is_file():
        return None
    with contextlib.suppress(OSError, ValueError, RecursionError), open_regular(beside) as stream:
        content = json.load(stream)
        if not isinstance(content, dict) or not TIMM_S & content.keys() or 'architecture' not in content:
            return None
    return beside


def folder_settings(content: Dict[str, Any]) -> Dict[str, Any]:
    """What a config.json tells of its model, in the words of a run's settings; classes and what was held out in its
    own."""
    about, kwargs = content.get('pretrained_cfg', content), dict(content.get('model_args') or {})
    own = {name: content[name] for name in ('num_classes', 'label_names', HELD_OUT, TRANSFORMERS) if name in content}
    size, channels = about.get('input_size'), kwargs.pop('in_chans', None)
    kwargs.pop('num_classes', None)  # which timm's save_for_hf has there
    settings = dict(model=content.get('architecture'), model_kwargs=kwargs, in_chans=channels)
    if size and 'img_size' not in kwargs:  # of models of any size there is no other record
        settings['input_size'] = [channels or size[0], *size[1:]]
    for name in PREPARATION:
        if (value := about.get(name)) is not None:
            settings[name] = [*per_channel(value, channels or 3)] if name in ('mean', 'std') else value
    conversion = dict(content.get(CONVERSION) or {})
    if conversion:
        settings |= dict(convert=conversion.pop('attention', 'eva'), convert_kwargs=conversion)
    return {**own, **settings}


def _settings_of(file: Union[str, Path]) -> Dict[str, Any]:
    """The settings in a file of `read_weights` that train.py wrote, else those of `config_beside`, {} where there are
    none."""
    saved: Any = None
    with contextlib.suppress(Exception):  # settings of others, of any kind
        if str(file).endswith('.safetensors'):
            saved = saved_args(file)
        elif zipfile.is_zipfile(file):
            saved = vars(load_checkpoint_metadata(str(file))['args'])
    with contextlib.suppress(Exception):
        if not saved and (beside := config_beside(file)):
            with open_regular(beside) as stream:
                saved = folder_settings(json.load(stream))
    return saved if isinstance(saved, dict) else {}


def saved_preparation(args: Any) -> Dict[str, Any]:
    """How the images were prepared by such settings, as entries of a `pretrained_cfg`; ValueError where none can be."""
    about = {name: args[name] for name in PREPARATION if args.get(name) is not None}
    if wrong := wrong_preparation(about, args.get('in_chans')):
        raise ValueError(wrong)
    return about


def as_trained(overlay: Mapping[str, Any]) -> Dict[str, Any]:
    """A `pretrained_cfg_overlay` with how images were prepared for the weights of its file, if it does not say.
    ValueError where the settings beside them are none by which images can be prepared."""
    file = str(overlay.get('file'))
    saved = _settings_of(file) if file.endswith('.safetensors') else {}
    if not isinstance(saved.get('model'), str):  # no file, or one of others
        return dict(overlay)
    try:
        return {**saved_preparation(saved), **overlay}
    except ValueError as error:
        raise ValueError(f'{file}: its settings are damaged ({first_line(error)[:200]})') from error
