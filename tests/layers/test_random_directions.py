"""The directions of the random features of Performer and Scatterbrain."""

import pytest
import torch
from helpers import random_qkv

from evavit.layers import PerformerAttention, ScatterbrainAttention
from evavit.layers.performer import random_feature_attention
from evavit.layers.random_directions import orthogonal_directions
from evavit.ops.random_features import log_positive_features


def test_orthogonal_directions():
    drawn = torch.randn(400, 40, 16, dtype=torch.float64)
    made = orthogonal_directions(drawn)
    torch.testing.assert_close(made.norm(dim=-1), drawn.norm(dim=-1))
    for block in made.split(16, 1):  # two whole blocks and one of 8
        unit = torch.nn.functional.normalize(block, dim=-1)
        identity = torch.eye(block.shape[1], dtype=torch.float64).expand(len(drawn), -1, -1)
        torch.testing.assert_close(unit @ unit.transpose(1, 2), identity, atol=1e-8, rtol=0)
    # Each row is N(0, I): no direction is favoured, and the features stay unbiased.
    rows = made.flatten(0, 1)
    assert rows.mean(0).abs().max() < 0.05 and (rows.T @ rows / len(rows) - torch.eye(16)).abs().max() < 0.05
    x = 0.2 * torch.randn(1, 1, 2, 16, dtype=torch.float64)
    features = log_positive_features(x, rows.unsqueeze(0), 1.0).exp()
    kernel = (features[..., 0, :] * features[..., 1, :]).mean()
    assert abs(kernel / (x[0, 0, 0] @ x[0, 0, 1]).exp() - 1) < 0.05
    assert orthogonal_directions(drawn[0, :3]).shape == (3, 16)  # fewer rows than channels
    assert orthogonal_directions(drawn.float()).dtype == torch.float32


def test_orthogonal_directions_have_less_variance():
    q, k, v = (x.detach() for x in random_qkv((6, 6), B=1, std=0.4))
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v)

    def error(shape):
        return torch.stack(
            [
                (random_feature_attention(q, k, v, [6, 6], shape(torch.randn(2, 16, 8, dtype=torch.float64))) - exact)
                .square()
                .mean()
                for _ in range(200)
            ]
        ).mean()

    assert error(orthogonal_directions) < 0.95 * error(lambda gaussian: gaussian)


@pytest.mark.parametrize('attention', [PerformerAttention, ScatterbrainAttention])
def test_directions_that_are_kept_go_on_after_a_reload(attention):
    x = torch.randn(1, 196, 48)
    layer = attention(48, 3, redraw_interval=10**6).train()
    layer.directions.kept.normal_()  # as after a draw

    def run(layer):
        torch.manual_seed(1)
        return layer(x, (14, 14))

    again, anew = attention(48, 3, redraw_interval=10**6).train(), attention(48, 3).eval()
    again.load_state_dict(layer.state_dict())
    assert torch.equal(run(again), run(layer))
    anew.load_state_dict(layer.state_dict())  # nothing that evaluation asks for
    assert torch.equal(run(anew), run(layer.eval()))
    again.load_state_dict(anew.state_dict())
    assert torch.equal(run(again.eval()), run(anew))


@pytest.mark.parametrize('attention', [PerformerAttention, ScatterbrainAttention])
def test_directions_are_redrawn_now_and_then(attention):
    x = torch.randn(1, 196, 48)

    def distinct(interval, steps=60):
        layer = attention(48, 3, num_features=8, redraw_interval=interval).train()
        outputs = torch.stack([layer(x, (14, 14)).detach().flatten() for _ in range(steps)])
        evaluation = layer.eval()(x, (14, 14)).flatten()
        return len(torch.unique(outputs, dim=0)), torch.equal(outputs[0], evaluation), layer

    assert distinct(0)[:2] == (1, True)  # never: trained as evaluated
    assert distinct(1)[0] == 60
    count, _, layer = distinct(10)
    assert 2 <= count <= 15  # 6 on average
    assert 'directions.kept' in layer.state_dict() and 'directions.fixed' not in layer.state_dict()
