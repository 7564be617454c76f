"""The autoregressive image model learns, and draws pixel by pixel what it learned."""

import re
import subprocess
import sys

import pytest
import torch

pytest.importorskip('sklearn')
from programs import ROOT, load_program

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


@pytest.mark.slow
def test_the_example_beats_every_model_of_single_pixels():
    done = subprocess.run([sys.executable, SCRIPT, '--samples', '1'], capture_output=True, text=True, check=True)
    ours, by_position, unigram = map(float, re.findall(r'(\d\.\d+)(?:,|$)', done.stdout.splitlines()[1]))
    assert ours < by_position - 0.2 and by_position < unigram
