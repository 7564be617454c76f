"""The model card of a folder for the Hub: what a model is, what it was trained on and how, and how to use it."""

from pathlib import Path
from typing import Any, Dict, Optional

import torch
from timm.models import get_model_input_config

from evavit.layers import EvaAttention
from evavit.models import ConvertedModel
from evavit.version import __version__

__all__ = ['model_card']

_CITATION = """@inproceedings{zheng2023eva,
  title     = {Efficient Attention via Control Variates},
  author    = {Zheng, Lin and Yuan, Jianbo and Wang, Chong and Kong, Lingpeng},
  booktitle = {International Conference on Learning Representations (ICLR)},
  year      = {2023},
  eprint    = {2302.04542},
  eprinttype = {arXiv}
}"""

_USAGE = """```python
import timm
import torch
from PIL import Image

import evavit{comment}

model = {make}.eval()
transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model), is_training=False)
image = Image.open("picture.jpg").convert({mode!r})
with torch.no_grad():
    probabilities = model(transform(image).unsqueeze(0)).softmax(-1)
```
"""

_CONVERTED = """
The model is timm's `{name}` with the attention that evavit puts in the place of softmax. `load_converted` does this:

```python
import safetensors.torch

model = timm.create_model({source!r})
model = evavit.convert_vit(model, {arguments})
model.load_state_dict(safetensors.torch.load_file("model.safetensors"))  # of this folder
```
"""

# Settings of train.py that the card lists as the recipe, in its order, where they were used: given, not off, and of no
# part that was off.
_RECIPE = (
    'epochs',
    'batch_size',
    'grad_accum_steps',
    'global_batch_size',
    'opt',
    'lr',
    'lr_base',
    'lr_base_size',
    'lr_base_scale',
    'weight_decay',
    'layer_decay',
    'sched',
    'warmup_epochs',
    'min_lr',
    'drop_path',
    'smoothing',
    'bce_loss',
    'mixup',
    'cutmix',
    'no_aug',
    'aa',
    'aug_repeats',
    'reprob',
    'model_ema',
    'model_ema_decay',
    'clip_grad',
    'kd_model_name',
    'kd_distill_type',
    'val_fraction',
    'seed',
    'pretrained',
    'pretrained_path',
    'initial_checkpoint',
    'linear_probe',
)
_FILES = ('pretrained_path', 'initial_checkpoint')  # of which the card has the name, not where they lie


def _used_settings(recipe: Dict[str, Any]) -> Dict[str, Any]:
    needs = dict(model_ema_decay='model_ema', kd_distill_type='kd_model_name')
    off = {name for name, needed in needs.items() if needed in recipe and not recipe[needed]}
    if recipe.get('lr') is not None:
        off |= {'lr_base', 'lr_base_size', 'lr_base_scale'}
    if recipe.get('grad_accum_steps') == 1:
        off.add('grad_accum_steps')
    if recipe.get('sched') == 'none':
        off |= {'sched', 'warmup_epochs', 'min_lr'}
    used = {key: recipe[key] for key in _RECIPE if key not in off and recipe.get(key) not in (None, False, '')}
    return _lines({key: Path(value).name if key in _FILES else value for key, value in used.items()})


def _lines(entries: Dict[str, Any]) -> Dict[str, Any]:
    """Entries that are a line of the card each: a text with a break could begin a heading."""
    return {' '.join(key.split()): ' '.join(it.split()) if isinstance(it, str) else it for key, it in entries.items()}


def model_card(
    model: torch.nn.Module,
    *,
    source: str,
    data: str,
    licence: str,
    recipe: Optional[Dict[str, Any]] = None,
    metrics: Optional[Dict[str, Any]] = None,
    description: Optional[str] = None,
) -> Dict[str, Any]:
    """The contents of a model card, in the form that timm's `generate_readme` and `push_to_hf_hub` take.

    Args:
        model: The model.
        source: Its name for `timm.create_model`, such as 'hf-hub:owner/name' or 'local-dir:FOLDER'.
        data: What it was trained on.
        licence: Of the weights, by its SPDX name in lower case. The data may have a narrower one than the code.
        recipe: Settings of the training by their names in `train.py`; the card lists those that were used.
        metrics: Name to value, as `validate.py` reports them.
        description: A first sentence; by default the architecture's name.
    """
    cfg: Dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]  # timm's models have one
    name = cfg['architecture']
    channels, *size = get_model_input_config(model)['input_size']
    has_eva = any(isinstance(module, EvaAttention) for module in model.modules())
    details: Dict[str, Any] = {
        'Model Type': 'Image classification / feature backbone',
        'Model Stats': {
            'Params (M)': round(sum(p.numel() for p in model.parameters()) / 1e6, 2),
            'Image size': ' x '.join(map(str, size)),
            'Image channels': channels,
            'Classes': model.num_classes,
        },
        'Data': data,
        **(
            {'Papers': ['Efficient Attention via Control Variates: https://arxiv.org/abs/2302.04542']}
            if has_eva
            else {}
        ),
        'Code': f'evavit {__version__}',
    }
    channels_mode = 'L' if channels == 1 else 'RGB'
    usage = _USAGE.format(
        comment='  # registers the model',
        make=f'timm.create_model({source!r}, pretrained=True)',
        mode=channels_mode,
    )
    summary = f'`{name}`: a vision backbone {"with EVA attention " if has_eva else ""}(evavit, on timm).'
    if isinstance(model, ConvertedModel):
        where = source.removeprefix('local-dir:')
        usage = _USAGE.format(comment='', make=f'evavit.load_converted({where!r})', mode=channels_mode)
        arguments = ', '.join(f'{key}={value!r}' for key, value in model.conversion.items())
        usage += _CONVERTED.format(name=name, source=source, arguments=arguments)
        summary = f'`{name}` of timm, converted to {model.conversion["attention"]} attention by evavit.'
    details['Recipe'] = _used_settings(recipe or {}) or 'not given'
    details['Metrics'] = _lines(dict(metrics)) if metrics else 'not given'
    return {
        'license': licence,
        'tags': ['image-classification', 'timm', 'evavit'],
        'description': description or summary,
        'details': details,
        'usage': usage,
        **({'citation': _CITATION} if has_eva else {}),
    }
