import pytest
import torch
import torch.nn.functional as F
from helpers import GRIDS, assert_matches, grid_windows, heads_of, in_order, randomise, split, window_bias

from evavit.layers import CombinerAttention, EvaAttention, SoftmaxAttention


def combiner_loop(q, k, v, feat_size, bias_table=None, window_size=7, projections=None):
    """Combiner-Fixed: one span of queries after the other, every other span summarised by a maximum; of the ReLU of
    projections (W_q, W_k) for DeepSets-Max."""
    s = q.shape[-1] ** -0.5
    spans = grid_windows(feat_size, window_size)
    parts = list(zip(split(q, spans), split(k, spans), split(v, spans), strict=True))
    keys, values = [], []
    W_q, W_k = (None, None) if projections is None else projections

    def pooled(x, W):
        return (x if W is None else F.relu(x @ W.T)).max(2, keepdim=True).values

    for q_m, k_m, v_m in parts:
        inside = torch.softmax(s * pooled(q_m, W_q) @ k_m.transpose(2, 3), -1)
        keys.append(pooled(k_m, W_k))
        values.append(inside @ v_m)
    outputs = []
    for number, (tokens, (q_n, k_m, v_m)) in enumerate(zip(spans, parts, strict=True)):
        others = [r for r in range(len(spans)) if r != number]
        logits = [s * q_n @ k_m.transpose(2, 3) + window_bias(bias_table, tokens, feat_size[1], window_size)]
        logits += [s * q_n @ keys[r].transpose(2, 3) for r in others]
        weights = torch.softmax(torch.cat(logits, -1), -1)
        outputs.append(weights @ torch.cat([v_m, *(values[r] for r in others)], 2))
    return in_order(outputs, spans)


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
