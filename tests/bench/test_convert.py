import pytest
import torch

from evavit.bench.contenders import Setting
from evavit.bench.convert import CONVERTED, SIDES, VITS, bench_convert, fit_side
from evavit.errors import UserError

SETTING = Setting(torch.device('cpu'), torch.float32, repeats=1, warmup=0)


def test_a_vit_as_it_is_and_converted():
    rows = bench_convert(SETTING, 'vit_tiny_patch16_224:depth=1:embed_dim=32:num_heads=2', 1, 64)
    assert [row['model'] for row in rows] == list(CONVERTED)
    assert all(row['status'] == 'ok' and float(row['error']) < 1e-4 for row in rows)
    assert all(row['forward_ms'] > 0 and row['ms'] > 0 and row['tokens'] == 16 and row['width'] == 32 for row in rows)
    assert [row['backend'] for row in rows] == ['sdpa', 'plain', 'plain']


def test_sides_are_whole_patches_and_batches_have_as_many_tokens():
    assert fit_side('vit_tiny_patch16_224', 1022) == (1008, 8)
    assert {fit_side(VITS[0], side)[0] for side in SIDES} == set(SIDES)
    assert fit_side(VITS[0], 2044)[1] == 1


def test_a_model_that_cannot_be_built_is_a_line():
    with pytest.raises(UserError, match='vit_tiny_patch16_224:depth=x, images of 64: '):
        bench_convert(SETTING, 'vit_tiny_patch16_224:depth=x', 1, 64)
