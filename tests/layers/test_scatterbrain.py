import pytest
import torch
from helpers import (
    GRIDS,
    assert_agree,
    assert_finite,
    assert_matches,
    bias_rows,
    grid_windows,
    heads_of,
    random_qkv,
    randomise,
    softmax_like,
)
from layers.references import phi, scaled

from evavit.layers import ScatterbrainAttention
from evavit.layers.scatterbrain import scatterbrain_attention

each_grid = pytest.mark.parametrize('feat_size', [*GRIDS, (13, 9)])


def scatterbrain_loop(q, k, v, feat_size, directions, bias_table=None, window_size=7):
    """exp(s q·k + b) for the tokens of the query's window and φ(q)·φ(k) for all others, one window after the other."""
    s = q.shape[-1] ** -0.5
    similarity = phi(*scaled(q), directions) @ phi(*scaled(k), directions).transpose(2, 3)
    exact = torch.exp(s * q @ k.transpose(2, 3))
    for tokens in grid_windows(feat_size, window_size):
        window = exact[:, :, tokens][..., tokens]
        if bias_table is not None:
            window = window * torch.exp(bias_table[bias_rows(tokens, feat_size[1], window_size)].permute(2, 0, 1))
        rows, cols = torch.tensor(tokens)[:, None], torch.tensor(tokens)
        similarity = similarity.index_put(
            (torch.arange(q.shape[0])[:, None, None, None], torch.arange(q.shape[1])[:, None, None], rows, cols), window
        )
    return similarity @ v / similarity.sum(-1, keepdim=True)


def bias_table(window_size, h=2):
    return torch.randn((2 * window_size - 1) ** 2, h, dtype=torch.float64, requires_grad=True)


@each_grid
@pytest.mark.parametrize('window_size', [7, 4, 1])
@pytest.mark.parametrize('with_bias', [True, False])
def test_the_function_matches_the_loop(feat_size, window_size, with_bias):
    q, k, v = random_qkv(feat_size)
    directions = torch.randn(2, 11, 8, dtype=torch.float64, requires_grad=True)
    table = bias_table(window_size) if with_bias else None
    leaves = [q, k, v, *([table] if with_bias else [])]
    if max(feat_size) > window_size:
        leaves.append(directions)  # else the window is the whole grid, and the features play no part
    assert_agree(
        scatterbrain_attention(q, k, v, feat_size, directions, table, window_size),
        scatterbrain_loop(q, k, v, feat_size, directions, table, window_size),
        leaves,
    )


@pytest.mark.parametrize('feat_size', [(5, 7), (7, 7), (3, 2)])
def test_the_function_with_a_window_over_the_grid_is_softmax(feat_size):
    q, k, v = random_qkv(feat_size, std=3.0)
    output = scatterbrain_attention(q, k, v, feat_size, torch.randn(2, 4, 8, dtype=torch.float64), window_size=7)
    assert_agree(output, torch.nn.functional.scaled_dot_product_attention(q, k, v), [q, k, v])


@each_grid
@pytest.mark.parametrize('kwargs', [{}, dict(window_size=4), dict(window_size=3, rel_pos_bias=False)])
def test_the_layer_matches_the_loop_in_evaluation(feat_size, kwargs):
    layer = randomise(ScatterbrainAttention(24, 3, num_features=13, **kwargs, dtype=torch.float64), 0.3).eval()
    table = layer.rel_pos.relative_position_bias_table if layer.rel_pos is not None else None
    assert_matches(
        layer,
        lambda layer, x: scatterbrain_loop(
            *heads_of(layer, x), feat_size, layer.directions.fixed, table, layer.window_size
        ),
        feat_size,
    )


@pytest.mark.parametrize('feat_size', [(7, 7), (5, 6)])
def test_a_window_over_the_grid_without_bias_is_softmax(feat_size):
    layer, x = (
        randomise(ScatterbrainAttention(48, 3, rel_pos_bias=False)),
        torch.randn(2, feat_size[0] * feat_size[1], 48),
    )
    torch.testing.assert_close(layer(x, feat_size), softmax_like(layer)(x, feat_size))
    biased = ScatterbrainAttention(48, 3)  # and with a bias of 0
    biased.load_state_dict(layer.state_dict(), strict=False)
    torch.nn.init.zeros_(biased.rel_pos.relative_position_bias_table)
    torch.testing.assert_close(biased(x, feat_size), layer(x, feat_size))


@pytest.mark.parametrize('factor', [1e-3, 30.0, 1000.0])
def test_logits_of_any_size_give_finite_answers_and_gradients(factor):
    qkv, directions = random_qkv((9, 5), std=factor), torch.randn(2, 11, 8)
    assert_finite(
        lambda q, k, v: scatterbrain_attention(q, k, v, (9, 5), directions, window_size=4),
        [x.detach().float().requires_grad_() for x in qkv],
    )


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    *qkv, directions = *(x.detach().float() for x in random_qkv((9, 5))), torch.randn(2, 11, 8)
    exact = scatterbrain_attention(*qkv, (9, 5), directions, window_size=4)
    output = scatterbrain_attention(*(x.to(dtype) for x in qkv), (9, 5), directions.to(dtype), window_size=4)
    assert output.dtype == dtype and (output.float() - exact).norm() < 0.03 * exact.norm()


@pytest.mark.parametrize(
    'message, call',
    [
        (
            'window_size must be at least 1, got 0',
            lambda q, k, v: scatterbrain_attention(q, k, v, [3, 2], q[0], window_size=0),
        ),
        ('rel_pos_bias must be', lambda q, k, v: scatterbrain_attention(q, k, v, [3, 2], q[0], q[0])),
    ],
)
def test_bad_arguments(message, call):
    with pytest.raises(ValueError, match=message):
        call(*random_qkv((3, 2)))


@pytest.mark.parametrize(
    'kwargs, message',
    [
        (dict(window_size=0), 'window_size must be a whole number of at least 1, got 0'),
    ],
)
def test_bad_options(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ScatterbrainAttention(48, 3, **kwargs)
