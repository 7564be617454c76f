"""A program for tests: fails where importing the training package changes another library's tables or a signal."""

import importlib
import logging
import pkgutil
import signal

import timm
from timm.data import auto_augment
from torch.distributed.rendezvous import _rendezvous_handlers


def state():
    return (
        dict(auto_augment.NAME_TO_OP),
        dict(auto_augment.LEVEL_TO_ARG),
        dict(_rendezvous_handlers),
        [signal.getsignal(number) for number in signal.valid_signals()],
        list(logging.getLogger().handlers),
    )


if __name__ == '__main__':
    import evavit.cli
    import evavit.training

    timm.list_models()
    before = state()
    for package in (evavit.training, evavit.cli):
        for module in pkgutil.walk_packages(package.__path__, f'{package.__name__}.'):
            importlib.import_module(module.name)
    assert state() == before
