"""Entry points of torch.hub: torch.hub.load(REPOSITORY or folder, 'eva_deit_tiny', …, source='local' for a folder).

Arguments are those of `timm.create_model`: `checkpoint_path`, `pretrained_cfg_overlay`, `num_classes`, …; there is
an entry point for every model of the package. `timm_model` takes the name as an argument, such as 'local-dir:FOLDER'.
"""

dependencies = ['timm', 'torch']

import timm as _timm  # noqa: E402

from evavit.hub import load_converted as _load_converted  # noqa: E402
from evavit.hub import lost_conversion as _lost_conversion  # noqa: E402
from evavit.hub import saved_config as _saved_config  # noqa: E402
from evavit.hub import source_folder as _source_folder  # noqa: E402
from evavit.hub import source_weights as _source_weights  # noqa: E402
from evavit.models import model_names as _model_names  # noqa: E402
from evavit.models import read_weights as _read_weights  # noqa: E402
from evavit.models._weights import check_kinds as _check_kinds  # noqa: E402


def _create(name, pretrained, kwargs):
    overlay = kwargs.get('pretrained_cfg_overlay') or {}
    files = [kwargs.get('checkpoint_path'), *([overlay.get('file'), _source_weights(name)] if pretrained else [])]
    paths = [path for path in map(str, filter(None, files)) if not path.endswith(('.npy', '.npz'))]  # which timm reads
    weights = [_read_weights(path) for path in paths]  # says what is wrong with a file; timm looks at no digest
    model = _timm.create_model(name, pretrained=pretrained, **kwargs)
    for state in weights:  # which timm has converted without a word
        _check_kinds(state, model)
    return model


def _entry_point(name):
    def entry_point(pretrained=False, **kwargs):
        return _create(name, pretrained, kwargs)

    entry_point.__name__ = name
    entry_point.__doc__ = _timm.models.model_entrypoint(name).__doc__
    return entry_point


for _name in _model_names():
    globals()[_name] = _entry_point(_name)


def timm_model(name, pretrained=False, **kwargs):
    """A model by any name that `timm.create_model` takes, with the models of this package registered. What
    `evavit.load_converted` takes is loaded so, with its arguments: timm alone would make the network with softmax."""
    folder = _source_folder(name)
    if folder is not None and _saved_config(folder)[1] is not None:
        if not pretrained:
            raise ValueError(f'{name}: a converted model, which comes with its weights alone; add pretrained=True')
        return _load_converted(name, **kwargs)
    if folder is not None and pretrained and (reason := _lost_conversion(folder)):
        raise ValueError(reason)
    return _create(name, pretrained, kwargs)
