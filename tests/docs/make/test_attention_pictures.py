"""docs/attentions.md shows what the code computes today."""

import numpy as np
import pytest
import torch
from PIL import Image
from programs import load_program

from evavit.bench import compare
from evavit.layers import ATTENTIONS

each_attention = pytest.mark.parametrize('name', ATTENTIONS)


@pytest.fixture(scope='module')
def tool():
    pytest.importorskip('sklearn')
    return load_program('docs/make/attentions.py')


@each_attention
def test_picture_is_fresh(name, tool):
    pytest.importorskip('matplotlib')
    with Image.open(tool.PICTURES / f'{name}.png') as stored:
        stored = np.asarray(stored.convert('RGB')).astype(int)
    drawn = np.asarray(tool.picture(name).convert('RGB')).astype(int)
    assert stored.shape == drawn.shape
    # Another machine rounds otherwise, and a weight on an edge between two colours takes the other one.
    assert (abs(stored - drawn).max(-1) > 30).mean() < 0.02, 'run python docs/make/attentions.py'


def test_no_picture_without_an_attention_and_not_too_large(tool):
    pictures = list(tool.PICTURES.iterdir())
    assert {path.stem for path in pictures} == set(ATTENTIONS)
    assert sum(path.stat().st_size for path in pictures) < 600_000


@each_attention
def test_errors_are_fresh(name, tool):
    stored = float(tool.errors()[name, 196]['error'])
    qkv = compare.image_qkv(compare.open_picture(), (14, 14))
    with torch.no_grad():
        output = compare.make_attention(name, (14, 14)).attend(qkv, [14, 14])
    error = compare.relative_rms(output, compare.softmax_exactly(qkv))
    remedy = f'run python -m evavit.compare --results-file results/{tool.ERRORS}, then docs/make/tables.py'
    assert abs(error - stored) < 0.005 + 0.02 * stored, remedy
