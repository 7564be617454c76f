"""Import every module of evavit in a fresh process and print, one a line, what that changed outside of it.

tests/test_imports.py runs this file. `import evavit` registers models and modules with timm and operators with PyTorch:
those registries alone are not looked at.
"""

import importlib
import logging
import os
import pkgutil
import signal
import sys
from contextlib import suppress
from types import ModuleType

import torch

# Whose variables are looked at, with those of their submodules. timm.layers._fx is not: it lists modules that register
# themselves as timm's own do.
WATCHED = (
    *('PIL.Image', 'PIL.ImageFile', 'torchvision.transforms'),
    *('timm.data', 'timm.layers', 'timm.loss', 'timm.optim', 'timm.scheduler', 'timm.task', 'timm.utils'),
    *('torch.distributed', 'torch.serialization', 'torch.utils.data'),
)
REGISTRIES = ('timm.layers._fx',)


def content(value):
    """What tells two states of a variable apart: a table's entries, or else which object it is."""
    if isinstance(value, dict):
        return {key: id(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [id(entry) for entry in value]
    return id(value)


def state(modules):
    """{what: content} of the variables of other libraries' modules and of the process."""
    found = {
        f'{name}.{key}': content(value)
        for name, module in modules.items()
        for key, value in vars(module).items()
        if not isinstance(value, ModuleType)  # a submodule, which its import enters
    }
    found['environment'] = dict(os.environ)
    found['signal handlers'] = {number: signal.getsignal(number) for number in signal.valid_signals()}
    found['handlers of the root logger'] = list(logging.getLogger().handlers)
    found['sys.path'] = list(sys.path)
    found['excepthook'] = sys.excepthook
    found['default dtype'] = torch.get_default_dtype()
    found['threads'] = torch.get_num_threads()
    found['deterministic'] = torch.are_deterministic_algorithms_enabled()
    found['generator'] = torch.get_rng_state().tolist()
    return found


def main():
    for name in WATCHED:
        importlib.import_module(name)
    modules = {
        name: module
        for name, module in list(sys.modules.items())
        if f'{name}.'.startswith(tuple(f'{package}.' for package in WATCHED)) and name not in REGISTRIES
    }
    before = state(modules)
    import evavit

    for module in pkgutil.walk_packages(evavit.__path__, 'evavit.'):
        with suppress(ImportError):  # of an optional library; Triton and what comes with the extras
            importlib.import_module(module.name)
    after = state(modules)
    print(*sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name)), sep='\n')


if __name__ == '__main__':
    main()
