"""The settings behind results/fashion_mnist_h100.csv are settings that train.py takes."""

import yaml
from programs import ROOT

from evavit.training.checks import global_batch
from evavit.training.config import parse_settings

FILE = ROOT / 'experiments' / 'fashion_mnist' / 'fashion_mnist.yaml'


def test_the_settings_are_taken_and_no_key_is_there_twice():
    settings, given = parse_settings('train', ['-c', str(FILE), '--data-dir', '.'])
    text = FILE.read_text()
    keys = [line.split(':')[0] for line in text.splitlines() if line[:1].isalpha()]
    assert len(keys) == len(set(keys)) and set(keys) == set(yaml.safe_load(text)) <= set(given)
    assert settings.model.model == 'eva_deit_tiny' and global_batch(settings.batch, settings.schedule, processes=1)
