"""A run of one small layer, without data, for tests of checkpoints."""

import torch
from timm.task import ClassificationTask

from evavit.training import checkpoint, loop
from evavit.training.config import parse_settings
from evavit.training.distributed import Process

ONE = Process(torch.device('cpu'), 0, 0, 1)


def settings_of(*flags):
    return parse_settings('train', ['--model', 'tiny', '--checkpoint-hist', '2', *flags])[0]


def run_of(*flags):
    settings = settings_of(*flags)
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.zero_grad()
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    return loop.Run(
        task=ClassificationTask(model, verbose=False),
        optimizer=optimizer,
        stepper=loop.Stepper(settings.machine, settings.optim, ONE.device),
        schedule=None,
        mixup=None,
        process=ONE,
        bad=None,
        machine=settings.machine,
        config=settings.run,
        updates_per_epoch=10,
        epochs=3,
        images_per_update=4,
    )


def saver_of(run, folder):
    return checkpoint.Saver(run, settings_of().flat(), ['a', 'b'], folder)


def resume(candidates, run, saver=None, flags=()):
    return checkpoint.resume(candidates, run, settings_of(*flags).flat(), saver)


def rewritten(path, change):
    content = torch.load(path, weights_only=False)
    change(content)
    torch.save(content, path)


def state(name, value):
    return lambda content: content['optimizer']['state'][0].update({name: value})
