"""docs/attentions.md shows what the code computes today."""

import csv
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from evavit.bench import compare
from evavit.layers import ATTENTIONS

ROOT = Path(__file__).resolve().parents[2]
each_attention = pytest.mark.parametrize('name', ATTENTIONS)


@pytest.fixture(scope='module')
def tool():
    pytest.importorskip('sklearn')
    spec = importlib.util.spec_from_file_location('attention_pictures', ROOT / 'tools' / 'attentions.py')
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@each_attention
def test_picture_is_fresh(name, tool):
    pytest.importorskip('matplotlib')
    with Image.open(tool.PICTURES / f'{name}.png') as stored:
        stored = np.asarray(stored.convert('RGB')).astype(int)
    drawn = np.asarray(tool.picture(name).convert('RGB')).astype(int)
    assert stored.shape == drawn.shape
    # Another machine rounds otherwise, and a weight on an edge between two colours takes the other one.
    assert (abs(stored - drawn).max(-1) > 30).mean() < 0.02, 'run python tools/attentions.py'


def test_no_picture_without_an_attention_and_not_too_large(tool):
    pictures = list(tool.PICTURES.iterdir())
    assert {path.stem for path in pictures} == set(ATTENTIONS)
    assert sum(path.stat().st_size for path in pictures) < 600_000


@each_attention
def test_errors_are_fresh(name, tool):
    with open(tool.ERRORS, newline='') as stream:
        stored = {row['attention']: float(row['error']) for row in csv.DictReader(stream) if row['tokens'] == '196'}
    qkv = compare.image_qkv(compare.open_picture(), (14, 14))
    with torch.no_grad():
        output = compare.make_attention(name, (14, 14)).attend(qkv, [14, 14])
    error = compare.relative_rms(output, compare.softmax_exactly(qkv))
    remedy = f'run python -m evavit.bench.compare --results-file {tool.ERRORS.relative_to(ROOT)}, then tools/tables.py'
    assert abs(error - stored[name]) < 0.005 + 0.02 * stored[name], remedy
