import pytest
import torch
from helpers import (
    GRIDS,
    assert_agree,
    assert_finite,
    assert_matches,
    heads_of,
    random_qkv,
    randomise,
    softmax_like,
)
from layers.references import phi, scaled

from evavit.layers import PerformerAttention, SoftmaxAttention
from evavit.layers.performer import random_feature_attention
from evavit.layers.random_directions import orthogonal_directions

each_grid = pytest.mark.parametrize('feat_size', [*GRIDS, (13, 9)])


def stabilised_loop(q, k, v, directions):
    """Features divided by their largest, plus 1e-4; sums of weights below 1e-2 count as 1e-2."""
    q, k = scaled(q, k)
    largest = [(x[:, :, :, None] * directions[:, None]).sum(-1).detach() for x in (q, k)]  # (B, h, N, S)
    q_features = phi(q, directions) / largest[0].amax(-1, keepdim=True).exp() + 1e-4
    k_features = phi(k, directions) / largest[1].flatten(2).amax(-1)[:, :, None, None].exp() + 1e-4
    outputs = []
    for w in q_features.unbind(2):
        similarity = (w[:, :, None] * k_features).sum(-1, keepdim=True)
        outputs.append((similarity * v).sum(2) / similarity.sum(2).clamp(min=1e-2))
    return torch.stack(outputs, 2)


def performer_loop(q, k, v, directions, kind='positive'):
    """φ(q)·φ(k) in place of exp(q·k), one query after the other."""
    if kind == 'stabilised':
        return stabilised_loop(q, k, v, directions)
    q, k = scaled(q, k)
    weights, keys = phi(q, directions, kind), phi(k, directions, kind)
    outputs = []
    for w in weights.unbind(2):
        similarity = (w[:, :, None] * keys).sum(-1, keepdim=True)
        outputs.append((similarity * v).sum(2) / similarity.sum(2))
    return torch.stack(outputs, 2)


@each_grid
@pytest.mark.parametrize('kind', ['positive', 'stabilised', 'relu'])
def test_the_function_matches_the_loop(feat_size, kind):
    q, k, v = random_qkv(feat_size)
    directions = torch.randn(2, 11, 8, dtype=torch.float64, requires_grad=True)
    assert_agree(
        random_feature_attention(q, k, v, feat_size, directions, kind),
        performer_loop(q, k, v, directions, kind),
        [q, k, v, directions],
    )


@each_grid
@pytest.mark.parametrize('kind', ['positive', 'stabilised', 'relu'])
def test_the_layer_matches_the_loop_in_evaluation(feat_size, kind):
    layer = randomise(PerformerAttention(24, 3, num_features=13, feature_kind=kind, dtype=torch.float64), 0.3).eval()
    assert_matches(layer, lambda layer, x: performer_loop(*heads_of(layer, x), layer.directions.fixed, kind), feat_size)


def test_training_draws_normal_directions():
    layer = PerformerAttention(24, 3, num_features=13, orthogonal=False, redraw_interval=1, dtype=torch.float64)
    assert_matches(
        randomise(layer, 0.3).train(),
        lambda layer, x: performer_loop(*heads_of(layer, x), torch.randn(3, 13, 8).double()),
        (5, 4),
    )


@pytest.mark.parametrize('orthogonal', [True, False])
def test_the_error_against_softmax_falls_as_the_root_of_the_number_of_features(orthogonal):
    q, k, v = (x.detach() for x in random_qkv((6, 6), B=1, std=0.4))  # small: large logits need more features to begin
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    counts, errors = torch.tensor([64.0, 256.0, 1024.0]), []
    for count in counts.int().tolist():
        squares = []
        for _ in range(40):
            directions = torch.randn(2, count, 8, dtype=torch.float64)
            directions = orthogonal_directions(directions) if orthogonal else directions
            squares.append((random_feature_attention(q, k, v, [6, 6], directions) - exact).square().mean())
        errors.append(torch.stack(squares).mean().sqrt())
    log_counts, log_errors = counts.log(), torch.stack(errors).log()
    slope = ((log_counts - log_counts.mean()) * (log_errors - log_errors.mean())).sum() / log_counts.var() / 2
    assert -0.6 < slope < -0.4
    assert errors[-1] < 0.1 * exact.std()


def test_approaches_softmax():
    x = torch.randn(2, 36, 48)
    few, many = (PerformerAttention(48, 3, num_features=count).eval() for count in (16, 16384))
    many.load_state_dict(few.state_dict())
    exact = softmax_like(few)(x, (6, 6))
    errors = [(layer(x, (6, 6)) - exact).norm() / exact.norm() for layer in (few, many)]
    assert errors[1] < 0.05 and errors[1] < errors[0] / 8  # 1,024 times as many features: about a 32nd


def test_has_the_parameters_of_softmax():
    PerformerAttention(48, 3).load_state_dict(SoftmaxAttention(48, 3).state_dict(), strict=True)


def test_the_redraws_survive_a_graph_and_a_checkpoint():
    """Directions that are kept in a buffer: the backward pass sees those of its forward pass."""
    layer, x = PerformerAttention(48, 3, num_features=8, redraw_interval=2).train(), torch.randn(1, 196, 48)
    losses = [layer(x, (14, 14)).square().sum() for _ in range(4)]
    for loss in losses:
        loss.backward()
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    outputs = torch.stack([compiled(x, (14, 14)).detach().flatten() for _ in range(20)])
    assert len(graphs) == 1 and 2 <= len(torch.unique(outputs, dim=0)) <= 19


@pytest.mark.parametrize('factor', [1e-3, 30.0, 1000.0])
@pytest.mark.parametrize('kind', ['positive', 'stabilised'])
def test_logits_of_any_size_give_finite_answers_and_gradients(factor, kind):
    qkv, directions = random_qkv((9, 5), std=factor), torch.randn(2, 11, 8)
    assert_finite(
        lambda q, k, v: random_feature_attention(q, k, v, (9, 5), directions, kind),
        [x.detach().float().requires_grad_() for x in qkv],
    )


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    *qkv, directions = *(x.detach().float() for x in random_qkv((9, 5))), torch.randn(2, 11, 8)
    exact = random_feature_attention(*qkv, (9, 5), directions)
    output = random_feature_attention(*(x.to(dtype) for x in qkv), (9, 5), directions.to(dtype))
    assert output.dtype == dtype and (output.float() - exact).norm() < 0.03 * exact.norm()


@pytest.mark.parametrize(
    'message, call',
    [
        (r'directions must be .* = \(2, S, 8\)', lambda q, k, v: random_feature_attention(q, k, v, [3, 2], q[0, :1])),
        (r'feat_size \(3, 3\) does not hold', lambda q, k, v: random_feature_attention(q, k, v, [3, 3], q[0])),
        ("kind must be .*, got 'cosine'", lambda q, k, v: random_feature_attention(q, k, v, [3, 2], q[0], 'cosine')),
        ('dropout_p must be', lambda q, k, v: random_feature_attention(q, k, v, [3, 2], q[0], dropout_p=1.0)),
    ],
)
def test_bad_arguments(message, call):
    with pytest.raises(ValueError, match=message):
        call(*random_qkv((3, 2)))


@pytest.mark.parametrize(
    'kwargs, message',
    [
        (dict(num_features=1.5), 'num_features must be a whole number of at least 1, got 1.5'),
        (dict(redraw_interval=-1), 'redraw_interval must be a whole number of at least 0, got -1'),
        (dict(feature_kind='cosine'), "feature_kind must be 'positive', 'stabilised' or 'relu', got 'cosine'"),
    ],
)
def test_bad_options(kwargs, message):
    with pytest.raises(ValueError, match=message):
        PerformerAttention(48, 3, **kwargs)
