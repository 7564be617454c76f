"""Publish weights: a folder in the layout of the Hugging Face Hub, with a model card, or an upload to it."""

from pathlib import Path
from typing import Any, Dict, Optional

import torch
from timm.models import get_model_input_config, push_to_hf_hub
from timm.models._hub import HF_SAFE_WEIGHTS_NAME, generate_readme, save_for_hf

from evavit.files import replacing_in
from evavit.models import write_weights
from evavit.version import __version__

__all__ = ['model_card', 'publish', 'save_folder']

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

import evavit  # registers the model

model = timm.create_model({source!r}, pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model), is_training=False)
image = Image.open("picture.jpg").convert({mode!r})
with torch.no_grad():
    probabilities = model(transform(image).unsqueeze(0)).softmax(-1)
```
"""

# Settings of train.py that the card lists as the recipe, in its order.
_RECIPE = (
    'epochs',
    'batch_size',
    'grad_accum_steps',
    'opt',
    'lr',
    'weight_decay',
    'sched',
    'warmup_epochs',
    'drop_path',
    'smoothing',
    'mixup',
    'cutmix',
    'aa',
    'reprob',
    'model_ema',
    'model_ema_decay',
    'clip_grad',
    'seed',
    'pretrained_path',
    'initial_checkpoint',
)


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
        recipe: Settings of the training by their names in `train.py`; the card lists those that matter.
        metrics: Name to value, as `validate.py` reports them.
        description: A first sentence; by default the architecture's name.
    """
    cfg: Dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]  # timm's models have one
    name = cfg['architecture']
    channels, *size = get_model_input_config(model)['input_size']
    details: Dict[str, Any] = {
        'Model Type': 'Image classification / feature backbone',
        'Model Stats': {
            'Params (M)': round(sum(p.numel() for p in model.parameters()) / 1e6, 2),
            'Image size': ' x '.join(map(str, size)),
            'Image channels': channels,
            'Classes': model.num_classes,
        },
        'Data': data,
        'Papers': ['Efficient Attention via Control Variates: https://arxiv.org/abs/2302.04542'],
        'Code': f'evavit {__version__}',
    }
    given = recipe or {}
    settings = {key: given[key] for key in _RECIPE if given.get(key) not in (None, False)}
    details['Recipe'] = settings or 'not given'
    details['Metrics'] = dict(metrics) if metrics else 'not given'
    return {
        'license': licence,
        'tags': ['image-classification', 'timm', 'evavit'],
        'description': description or f'`{name}`: a vision backbone with EVA attention (evavit, on timm).',
        'details': details,
        'usage': _USAGE.format(source=source, mode='L' if channels == 1 else 'RGB'),
        'citation': _CITATION,
    }


def _config(label_names: Optional[list], licence: str) -> Dict[str, Any]:
    config: Dict[str, Any] = {'pretrained_cfg': {'license': licence}}
    return {**config, 'label_names': list(label_names)} if label_names else config


def save_folder(
    model: torch.nn.Module,
    folder: str,
    *,
    data_config: Optional[Dict[str, Any]] = None,
    label_names: Optional[list] = None,
    **card: Any,
) -> Path:
    """Write weights (`model.safetensors`), `config.json` and the model card `README.md` to a folder, each file whole or
    not at all.

    `timm.create_model('local-dir:FOLDER', pretrained=True)` makes the same model again, and the folder can be uploaded
    as it is.

    Args:
        model: A model from `timm.create_model`.
        folder: Folder to write to; made if it is missing.
        data_config: How images are prepared (mean, std, interpolation, crop_pct …); by default the model's own.
        label_names: Names of the classes, in their order.
        **card: data, licence, recipe, metrics and description of `model_card`.
    """
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    with replacing_in(path) as partial:
        save_for_hf(
            model,
            str(partial),
            model_config=_config(label_names, card['licence']),
            safe_serialization=True,
            data_config=data_config,
        )
        write_weights(model.state_dict(), partial / HF_SAFE_WEIGHTS_NAME)
        readme = generate_readme(model_card(model, **{'source': f'local-dir:{path}', **card}), path.name)
        (partial / 'README.md').write_text(readme, encoding='utf-8')
    return path


def publish(
    model: torch.nn.Module,
    repo_id: str,
    *,
    data_config: Optional[Dict[str, Any]] = None,
    label_names: Optional[list] = None,
    private: bool = False,
    **card: Any,
) -> Any:
    """Upload to the Hugging Face Hub with the same card, through timm's `push_to_hf_hub`; see `save_folder`.

    A token of the Hub's own login is used. An existing model card is left as it is. Returns
    what timm's function does.
    """
    return push_to_hf_hub(
        model,
        repo_id,
        private=private,
        safe_serialization=True,
        data_config=data_config,
        model_config=_config(label_names, card['licence']),
        model_card=model_card(model, **{'source': f'hf-hub:{repo_id}', **card}),
    )
