import pytest
import torch
import torch.nn.functional as F
from helpers import GRIDS, assert_matches, heads_of, randomise, softmax_like
from ops.eva.references import eva_loop

from evavit.layers import LocalAttention


@pytest.mark.parametrize('feat_size', [*GRIDS, (13, 9)])
@pytest.mark.parametrize('kwargs', [{}, dict(window_size=4), dict(rel_pos_bias=False)])
def test_output_and_gradients_match_the_loop(feat_size, kwargs):
    """EVA's loop without cells."""

    def loop(layer, x):
        table = layer.rel_pos.relative_position_bias_table if layer.rel_pos is not None else None
        options = dict(bias_table=table, window_size=layer.window_size, partition_grid=0)
        return eva_loop(*heads_of(layer, x), feat_size, **options)

    assert_matches(randomise(LocalAttention(24, 3, **kwargs, dtype=torch.float64)), loop, feat_size)


@pytest.mark.parametrize('feat_size', [(7, 7), (5, 6)])
def test_a_window_over_the_grid_without_bias_is_softmax(feat_size):
    layer = randomise(LocalAttention(48, 3, rel_pos_bias=False))
    x = torch.randn(2, feat_size[0] * feat_size[1], 48)
    torch.testing.assert_close(layer(x, feat_size), softmax_like(layer)(x, feat_size))
    biased = LocalAttention(48, 3)  # and with a bias of 0
    biased.load_state_dict(layer.state_dict(), strict=False)
    torch.nn.init.zeros_(biased.rel_pos.relative_position_bias_table)
    torch.testing.assert_close(biased(x, feat_size), layer(x, feat_size))


def test_equals_torch_inside_each_window():
    layer, x = randomise(LocalAttention(48, 3, window_size=3, rel_pos_bias=False)), torch.randn(1, 18, 48)
    q, k, v = layer.qkv(x).view(1, 18, 3, 3, 16).permute(2, 0, 3, 1, 4).unflatten(3, (3, 6)).unbind(0)
    halves = [
        F.scaled_dot_product_attention(*(t[:, :, :, part].flatten(2, 3) for t in (q, k, v))).unflatten(2, (3, 3))
        for part in (slice(0, 3), slice(3, 6))
    ]
    expected = layer.proj(torch.cat(halves, 3).flatten(2, 3).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x, (3, 6)), expected)


@pytest.mark.parametrize(
    'kwargs, message',
    [
        (dict(window_size=0), 'window_size must be a whole number of at least 1, got 0'),
    ],
)
def test_bad_options(kwargs, message):
    with pytest.raises(ValueError, match=message):
        LocalAttention(48, 3, **kwargs)
