"""Runs of train.py and validate.py for tests: tiny image folders, a tiny model, scripts as functions or commands."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import safetensors.torch
from PIL import Image

ROOT = Path(__file__).parents[1]
CLASSES = ("apple", "pear", "plum")


def write_images(folder, counts, side=16):
    """counts: {class: images}. Each class has a colour of its own, each image its own noise."""
    rng = np.random.default_rng(0)
    for index, (name, count) in enumerate(counts.items()):
        target = Path(folder, name)
        target.mkdir(parents=True)
        for number in range(count):
            pixels = rng.integers(0, 120, (side, side, 3))
            pixels[..., index % 3] += 120
            Image.fromarray(pixels.astype(np.uint8)).save(target / f"{number}.png")


KWARGS = dict(img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, window_size=2, partition_grid=2)
MODEL = ["--model", "eva_deit_tiny", "--model-kwargs", *(f"{key}={value}" for key, value in KWARGS.items())]
QUICK = ["-b", "4", "--epochs", "2", "--warmup-epochs", "0", "--lr", "1e-3", "--workers", "0", "--device", "cpu",
         "--log-interval", "1"]
PLAIN = ["--no-aug", "--hflip", "0", "--color-jitter", "0", "--drop-path", "0"]  # only the images' order is drawn


def load_script(name):
    spec = importlib.util.spec_from_file_location(f"evavit_script_{name}", ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def command(script, *flags, processes=1):
    """Run a script as a user does, with torchrun where there are several processes."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    return subprocess.run([*launcher, str(ROOT / f"{script}.py"), *map(str, flags)], capture_output=True, text=True,
                          env=environment, timeout=240)


def weights(path):
    return safetensors.torch.load_file(str(path))


def scalars(folder, name):
    """{step: value} of a TensorBoard scalar."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(name)}
