"""As much of tensorflow and tensorflow_datasets as timm's reader of `tfds/` asks for: no test has the packages.

A data set is a folder of images, SPLIT/CLASS/IMAGE. It hands over bytes where the reader says so, and nothing else.
"""

import random
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

READER = 'timm.data.readers.reader_tfds'


class SkipDecoding:
    pass


class Dataset:
    """As of tf.data: the samples of a split, in another order each time where they are shuffled."""

    def __init__(self, samples):
        self.samples, self.endless, self.draws = samples, False, None

    def with_options(self, options):
        return self

    prefetch = with_options

    def repeat(self):
        self.endless = True
        return self

    def shuffle(self, size, seed):
        self.draws = random.Random(seed)
        return self

    def __iter__(self):
        while True:
            if self.draws:
                self.draws.shuffle(self.samples)
            yield from self.samples
            if not self.endless:
                return


class Builder:
    def __init__(self, name, data_dir):
        self.files = {split.name: sorted(split.rglob('*.png')) for split in Path(data_dir).iterdir()}
        self.names = sorted({path.parent.name for paths in self.files.values() for path in paths})
        self.info = SimpleNamespace(
            features=dict(image=SimpleNamespace(), label=SimpleNamespace(names=self.names)),
            splits={split: SimpleNamespace(num_examples=len(it), num_shards=1) for split, it in self.files.items()},
        )

    def as_dataset(self, split, shuffle_files, decoders, read_config):
        assert isinstance(decoders['image'], SkipDecoding), 'TensorFlow decodes the images'
        split, part, parts = (split, 0, 1) if isinstance(split, str) else split
        files = self.files[split][part::parts]
        return Dataset([dict(image=path.read_bytes(), label=self.names.index(path.parent.name)) for path in files])


def install(monkeypatch):
    """Put the two in the place of the packages until the test ends."""
    tensorflow, datasets = ModuleType('tensorflow'), ModuleType('tensorflow_datasets')
    tensorflow.config = SimpleNamespace(set_visible_devices=lambda devices, kind: None)
    tensorflow.data = SimpleNamespace(Options=lambda: SimpleNamespace(threading=SimpleNamespace()))
    datasets.even_splits = lambda split, n, drop_remainder=False: [(split, part, n) for part in range(n)]
    datasets.decode = SimpleNamespace(make_decoder=lambda: lambda function: function, SkipDecoding=SkipDecoding)
    datasets.builder, datasets.ReadConfig, datasets.as_numpy = Builder, SimpleNamespace, lambda found: found
    for module in (tensorflow, datasets):
        module.__spec__ = ModuleSpec(module.__name__, None)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    notf = 'tensorboard.compat.notf'  # where TensorBoard finds this, it leaves TensorFlow alone
    monkeypatch.setitem(sys.modules, notf, ModuleType(notf))
    monkeypatch.setitem(sys.modules, READER, None)  # what the test imports is forgotten with it
    del sys.modules[READER]
