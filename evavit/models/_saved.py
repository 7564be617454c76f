"""What stands beside weights in a file: the settings of the run that wrote it."""

import contextlib
import json
import zipfile
from pathlib import Path
from typing import Any, Dict, Mapping, Optional, Tuple, Union

import safetensors
from timm.models._hub import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME
from timm.utils import load_checkpoint_metadata

from evavit.arguments import PREPARATION, wrong_preparation
from evavit.errors import first_line
from evavit.files import open_regular

__all__ = ['as_trained', 'saved_args', 'saved_conversion', 'saved_preparation', 'trained_size']


def saved_args(file: Union[str, Path]) -> Any:
    """The settings that train.py wrote beside the tensors of a `.safetensors` file, {} where there are none."""
    with safetensors.safe_open(str(file), framework='pt') as opened:
        return json.loads((opened.metadata() or {}).get('args', '{}'))


def saved_conversion(file: Union[str, Path]) -> Optional[str]:
    """The attention to which the run that wrote a file of `read_weights` converted its network, '' where it left
    softmax, None where the file does not say."""
    saved = _settings_of_run(file)
    if not isinstance(saved.get('model'), str):
        return None
    if 'convert' not in saved and not str(file).endswith('.safetensors'):  # of another program, such as DeiT's
        return None
    convert = saved.get('convert')
    return convert if isinstance(convert, str) and convert != 'softmax' else ''


def trained_size(file: Union[str, Path]) -> Optional[Tuple[int, int]]:
    """Height and width of the images that the weights of a file were trained on, None where neither the settings of a
    run in it nor the config.json beside it say."""
    saved, beside = _settings_of_run(file), Path(file).parent / 'config.json'
    sizes = [saved.get('input_size'), saved.get('img_size'), saved.get('model_kwargs')]
    if not saved and Path(file).name in (HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME):
        with contextlib.suppress(OSError, ValueError, AttributeError, RecursionError):
            with open_regular(beside) as stream:
                content = json.load(stream)
            sizes = [content.get('pretrained_cfg', content).get('input_size'), content.get('model_args')]
    for size in sizes:
        size = size.get('img_size') if isinstance(size, dict) else size
        size = [size, size] if isinstance(size, int) else size
        if isinstance(size, (list, tuple)) and len(size) >= 2 and all(isinstance(side, int) for side in size):
            return size[-2], size[-1]
    return None


def _settings_of_run(file: Union[str, Path]) -> Dict[str, Any]:
    """The settings in a file of `read_weights` that train.py wrote, {} where there are none."""
    saved: Any = None
    with contextlib.suppress(Exception):  # settings of others, of any kind
        if str(file).endswith('.safetensors'):
            saved = saved_args(file)
        elif zipfile.is_zipfile(file):
            saved = vars(load_checkpoint_metadata(str(file))['args'])
    return saved if isinstance(saved, dict) else {}


def saved_preparation(args: Any) -> Dict[str, Any]:
    """How the images were prepared by such settings, as entries of a `pretrained_cfg`; ValueError where none can be."""
    about = {name: args[name] for name in PREPARATION if args.get(name) is not None}
    if wrong := wrong_preparation(about, args.get('in_chans')):
        raise ValueError(wrong)
    return about


def as_trained(overlay: Mapping[str, Any]) -> Dict[str, Any]:
    """A `pretrained_cfg_overlay` with how images were prepared by the run of train.py that wrote its file, if it does
    not say. ValueError where the run's settings are none by which images can be prepared."""
    file = str(overlay.get('file'))
    saved = _settings_of_run(file) if file.endswith('.safetensors') else {}
    if not isinstance(saved.get('model'), str):  # no file, or one of others
        return dict(overlay)
    try:
        return {**saved_preparation(saved), **overlay}
    except ValueError as error:
        raise ValueError(f'{file}: its settings are damaged ({first_line(error)[:200]})') from error
