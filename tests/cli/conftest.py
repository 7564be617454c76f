"""The scripts on tiny image folders."""

import pytest
import torch
from runs import CLASSES, MODEL, QUICK, load_script, write_images

from evavit.errors import SMALLER, run_script


@pytest.fixture(scope='session')
def images(tmp_path_factory):
    """24 images to train on and 13 to validate on: batches of 4 and two processes do not divide them evenly."""
    root = tmp_path_factory.mktemp('images')
    write_images(root / 'train', dict.fromkeys(CLASSES, 8))
    write_images(root / 'val', dict(zip(CLASSES, (5, 4, 4), strict=True)))
    return root


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def call(capfd):
    """call(script, *flags) → (exit code, output, error lines), in this process."""

    def call(script, *flags):
        capfd.readouterr()
        code = run_script(load_script(script).main, [str(flag) for flag in flags], SMALLER)
        out, err = capfd.readouterr()
        return code, out, err

    return call


@pytest.fixture
def train(call, images, tmp_path):
    """train(name, *flags) → the folder of a finished run of the tiny model."""

    def train(name, *flags, model=MODEL):
        place = ['--data-dir', images, '--output', tmp_path, '--experiment', name]
        code, out, err = call('train', *model, *QUICK, *place, *flags)
        assert code == 0, out + err
        return tmp_path / name

    return train
