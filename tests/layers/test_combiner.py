import pytest
import torch
from layer_checks import GRIDS, assert_matches, heads_of, randomise
from references import combiner_loop

from evavit.layers import CombinerAttention, EvaAttention, SoftmaxAttention


@pytest.mark.parametrize('feat_size', GRIDS)
@pytest.mark.parametrize(
    'kwargs',
    [
        {},
        dict(window_size=4, qkv_bias=False),
        dict(window_size=3, rel_pos_bias=False),
        dict(window_size=4, pooling='max'),
    ],
)
def test_output_and_gradients_match_the_loop(feat_size, kwargs):
    layer = randomise(CombinerAttention(24, 3, dtype=torch.float64, **kwargs))

    def loop(layer, x):
        table = layer.rel_pos.relative_position_bias_table if layer.rel_pos is not None else None
        projections = (layer.pool_q.weight, layer.pool_k.weight) if layer.pooling == 'deepsets_max' else None
        return combiner_loop(*heads_of(layer, x), feat_size, table, layer.window_size, projections)

    assert_matches(layer, loop, feat_size)


@pytest.mark.parametrize('window_size, pooling', [(1, 'max'), (20, 'max'), (20, 'deepsets_max')])
def test_spans_of_one_token_or_one_span_are_softmax(window_size, pooling):
    combiner = randomise(
        CombinerAttention(24, 3, window_size=window_size, rel_pos_bias=False, pooling=pooling, dtype=torch.float64)
    )
    softmax = SoftmaxAttention(24, 3, dtype=torch.float64)
    softmax.load_state_dict({key: value for key, value in combiner.state_dict().items() if 'pool' not in key})
    x = torch.randn(2, 63, 24, dtype=torch.float64)
    torch.testing.assert_close(combiner(x, (7, 9)), softmax(x, (7, 9)))


def test_one_span_with_bias_is_a_window_with_bias():
    combiner = randomise(CombinerAttention(24, 3, window_size=9, pooling='max', dtype=torch.float64))
    window = EvaAttention(24, 3, window_size=9, partition_grid=0, dtype=torch.float64)
    window.load_state_dict(combiner.state_dict())
    x = torch.randn(2, 63, 24, dtype=torch.float64)
    torch.testing.assert_close(combiner(x, (7, 9)), window(x, (7, 9)))


def test_deepsets_with_the_identity_are_the_maximum_of_what_is_positive():
    layer = CombinerAttention(24, 3, window_size=3, dtype=torch.float64)
    plain = CombinerAttention(24, 3, window_size=3, pooling='max', dtype=torch.float64)
    plain.load_state_dict({key: value for key, value in layer.state_dict().items() if 'pool' not in key})
    for pool in (layer.pool_q, layer.pool_k):
        torch.nn.init.eye_(pool.weight)
    qkv = torch.randn(3, 2, 3, 63, 8, dtype=torch.float64)
    qkv[:2].abs_()
    torch.testing.assert_close(layer.attend(qkv, [7, 9]), plain.attend(qkv, [7, 9]))


def test_an_unknown_pooling():
    with pytest.raises(ValueError, match="pooling must be 'deepsets_max' or 'max', got 'mean'"):
        CombinerAttention(48, 3, pooling='mean')


def test_a_window_size_that_is_none():
    with pytest.raises(ValueError, match='window_size must be a whole number of at least 1, got 0'):
        CombinerAttention(48, 3, window_size=0)
