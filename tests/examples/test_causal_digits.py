"""The autoregressive image model learns, and draws pixel by pixel what it learned."""

import os
import re
import subprocess
import sys

import pytest
import torch

pytest.importorskip('sklearn')
from programs import ROOT, load_program
from runs import PATIENCE, unwritable

from evavit.errors import run_script

SCRIPT = ROOT / 'examples' / 'causal_digits.py'
causal_digits = load_program('examples/causal_digits.py')


def test_a_short_training_beats_the_unigram_model():
    images, test = causal_digits.load()
    assert images.shape == (1437, 64) and test.shape == (360, 64) and images.max() == 16
    unigram = causal_digits.unigram_bits_per_pixel(images, test)
    model = causal_digits.PixelModel(dim=32, depth=1)
    assert causal_digits.bits_per_pixel(model, test) > unigram
    causal_digits.train(model, images, epochs=2)
    assert causal_digits.bits_per_pixel(model, test) < unigram - 0.1


def test_sampling_draws_from_the_logits_of_the_whole_sequence():
    """A peaked head makes sampling deterministic: each pixel is then the argmax given those before it."""
    model = causal_digits.PixelModel(dim=16, depth=2, num_heads=2).eval()
    with torch.no_grad():
        model.head.weight.mul_(1e4)
    images = model.sample(3, torch.Generator().manual_seed(0))
    assert images.shape == (3, 64) and len(set(images.flatten().tolist())) > 3
    assert torch.equal(model(images).argmax(-1), images)
    assert len(causal_digits.draw(images).splitlines()) == 8


@pytest.mark.parametrize(
    'flags', [('--epochs', '0'), ('--epochs', '-1'), ('--samples', '-1'), ('--seed', '9' * 20), ('--seed', '9' * 23)]
)
def test_flags_out_of_range_are_a_line_before_the_training(flags, monkeypatch, capsys):
    monkeypatch.setattr(causal_digits, 'train', lambda *_: pytest.fail('trained'))
    assert run_script(causal_digits.main, flags) == 2
    err = capsys.readouterr().err
    assert err.startswith('error: ') and flags[0] in err and err.count('\n') == 1


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='/dev/full, a disk that is full, is of Linux')
def test_a_training_is_not_lost_with_standard_output():
    stream = unwritable('full')
    words = [sys.executable, SCRIPT, '--epochs', '1', '--samples', '0']
    done = subprocess.run(words, stdout=stream, stderr=subprocess.PIPE, text=True, timeout=240 * PATIENCE)
    os.close(stream)
    assert done.returncode == 0 and done.stderr.startswith('warning: standard output is not written any more (')
    assert done.stderr.count('\n') == 1, done.stderr


@pytest.mark.slow
def test_the_example_beats_every_model_of_single_pixels():
    done = subprocess.run([sys.executable, SCRIPT, '--samples', '1'], capture_output=True, text=True, check=True)
    ours, by_position, unigram = map(float, re.findall(r'(\d\.\d+)(?:,|$)', done.stdout.splitlines()[1]))
    assert ours < by_position - 0.2 and by_position < unigram
