"""What the comparison of attentions measures is what it says."""

import pytest
import torch
from PIL import Image

from evavit.bench import compare
from evavit.layers import ATTENTIONS

each_attention = pytest.mark.parametrize('name', ATTENTIONS)


@pytest.fixture(scope='module')
def picture():
    pytest.importorskip('sklearn')
    return compare.open_picture()


def test_qkv_of_a_picture(picture):
    qkv = compare.image_qkv(picture, (9, 14), logit_std=1.5)
    assert qkv.shape == (3, 1, 3, 126, 64) and qkv.dtype == torch.float32 and qkv.isfinite().all()
    logits = qkv[0] @ qkv[1].transpose(2, 3) / 8
    assert abs(logits.std(-1, correction=0).mean() - 1.5) < 1e-4
    assert torch.equal(qkv, compare.image_qkv(picture, (9, 14), logit_std=1.5))
    assert not torch.equal(qkv, compare.image_qkv(picture, (9, 14), logit_std=1.5, seed=1))
    assert not torch.allclose(qkv, compare.image_qkv(picture.rotate(180), (9, 14), logit_std=1.5))


def test_a_picture_of_one_colour_gives_numbers():
    assert compare.image_qkv(Image.new('RGB', (9, 9), 'red'), (1, 1)).isfinite().all()


@each_attention
def test_matrix_times_values_is_the_output(name, picture):
    qkv = compare.image_qkv(picture, (9, 14))
    layer = compare.make_attention(name, (9, 14))
    matrix = compare.attention_matrix(lambda qkv: layer.attend(qkv, [9, 14]), qkv)
    assert matrix.shape == (3, 126, 126)
    with torch.no_grad():
        assert compare.relative_rms(matrix @ qkv[2, 0], layer.attend(qkv, [9, 14])[0]) < 1e-4
    if name == 'softmax':
        torch.testing.assert_close(matrix, (qkv[0, 0] @ qkv[1, 0].transpose(1, 2) / 8).softmax(-1))


def test_an_attention_of_another_width_and_with_options():
    layer = compare.make_attention('eva', (8, 8), dim=32, num_heads=2, window_size=4, partition_grid=2)
    assert (layer.head_dim, layer.window_size, layer.partition_grid, layer.rel_pos) == (16, 4, 2, None)
    qkv = torch.randn(3, 2, 2, 64, 16)
    whole = compare.make_attention('eva', (8, 8), dim=32, num_heads=2, window_size=8, partition_grid=0)
    assert compare.relative_rms(whole.attend(qkv, [8, 8]), compare.softmax_exactly(qkv)) < 1e-5
    assert compare.relative_rms(layer.attend(qkv, [8, 8]), compare.softmax_exactly(qkv)) > 0.01
