import pytest
import torch
from references import lara_loop, performer_loop, scatterbrain_loop
from timm.layers import RelPosBias

from evavit.layers.lara import lara_attention
from evavit.layers.performer import random_feature_attention
from evavit.layers.random_directions import orthogonal_directions
from evavit.layers.scatterbrain import scatterbrain_attention
from evavit.ops.random_features import log_positive_features

GRIDS = [(14, 14), (13, 9), (7, 20), (5, 3), (1, 1)]
each_grid = pytest.mark.parametrize('feat_size', GRIDS)


def tokens(feat_size, count=3, B=2, h=2, d=8, std=1.0):
    shape = (B, h, feat_size[0] * feat_size[1], d)
    return [torch.randn(shape, dtype=torch.float64).mul_(std).requires_grad_() for _ in range(count)]


def agree(output, expected, leaves, tolerance=1e-10):
    """The output and the gradient of every leaf, relative to their size."""
    assert (output - expected).norm() <= tolerance * expected.norm()
    grad = torch.randn_like(output)
    for value, reference in zip(
        torch.autograd.grad(output, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True
    ):
        assert (value - reference).norm() <= tolerance * max(reference.norm().item(), 0.01 * grad.norm().item())


def bias(window_size, h=2):
    """A bias table, and the bias of a whole window made from it by timm."""
    layer = RelPosBias((window_size, window_size), h).double()
    with torch.no_grad():
        layer.relative_position_bias_table.normal_()
    return layer.relative_position_bias_table, layer.get_bias().squeeze(0)


def landmarks(C, B=2, h=2, d=8):
    return [torch.randn(B, h, C, d, dtype=torch.float64, requires_grad=True) for _ in range(2)]


@each_grid
@pytest.mark.parametrize('kind', ['positive', 'relu'])
def test_random_features_match_the_loop(feat_size, kind):
    q, k, v = tokens(feat_size)
    directions = torch.randn(2, 11, 8, dtype=torch.float64, requires_grad=True)
    leaves = [q, k, v, directions]
    agree(
        random_feature_attention(q, k, v, feat_size, directions, kind),
        performer_loop(q, k, v, directions, kind),
        leaves,
    )


@each_grid
@pytest.mark.parametrize('weighting', ['optimal', 'balance', 'biased'])
@pytest.mark.parametrize('samples', [0, 1, 3])
def test_lara_matches_the_loop(feat_size, weighting, samples):
    q, k, v = tokens(feat_size)
    means = landmarks(5)
    noise = torch.randn(2, 2, 5, samples, 8, dtype=torch.float64) if samples else None
    agree(
        lara_attention(q, k, v, feat_size, *means, weighting, noise),
        lara_loop(q, k, v, *means, weighting, noise),
        [q, k, v, *means],
    )


@each_grid
@pytest.mark.parametrize('window_size', [7, 4, 1])
@pytest.mark.parametrize('with_bias', [True, False])
def test_scatterbrain_matches_the_loop(feat_size, window_size, with_bias):
    q, k, v = tokens(feat_size)
    directions = torch.randn(2, 11, 8, dtype=torch.float64, requires_grad=True)
    table, rel_pos_bias = bias(window_size) if with_bias else (None, None)
    leaves = [q, k, v, *([table] if with_bias else [])]
    if max(feat_size) > window_size:
        leaves.append(directions)  # else the window is the whole grid, and the features play no part
    agree(
        scatterbrain_attention(q, k, v, feat_size, directions, rel_pos_bias, window_size),
        scatterbrain_loop(q, k, v, feat_size, directions, table, window_size),
        leaves,
    )


@pytest.mark.parametrize('feat_size', [(5, 7), (7, 7), (3, 2)])
def test_scatterbrain_with_a_window_over_the_grid_is_softmax(feat_size):
    q, k, v = tokens(feat_size, std=3.0)
    output = scatterbrain_attention(q, k, v, feat_size, torch.randn(2, 4, 8, dtype=torch.float64), window_size=7)
    agree(output, torch.nn.functional.scaled_dot_product_attention(q, k, v), [q, k, v])


@pytest.mark.parametrize('orthogonal', [True, False])
def test_the_error_against_softmax_falls_as_the_root_of_the_number_of_features(orthogonal):
    q, k, v = (x.detach() for x in tokens((6, 6), B=1, std=0.4))  # small: large logits need more features to begin
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
    q, k, v = (x.detach() for x in tokens((6, 6), B=1, std=0.4))
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


def calls(feat_size, factor, dtype=torch.float32):
    """The three functions on tokens of a size that overflows an exponential."""
    q, k, v = (x.detach().mul_(factor).to(dtype).requires_grad_() for x in tokens(feat_size))
    directions = torch.randn(2, 11, 8).to(dtype)
    means = [x.detach().to(dtype) for x in landmarks(5)]
    return (q, k, v), {
        'performer': lambda: random_feature_attention(q, k, v, feat_size, directions),
        **{
            f'lara {name}': lambda name=name: lara_attention(q, k, v, feat_size, *means, name)
            for name in ('optimal', 'balance', 'biased')
        },
        'scatterbrain': lambda: scatterbrain_attention(q, k, v, feat_size, directions, window_size=4),
    }


@pytest.mark.parametrize('factor', [1e-3, 30.0, 1000.0])
def test_logits_of_any_size_give_finite_answers_and_gradients(factor):
    leaves, functions = calls((9, 5), factor)
    for name, function in functions.items():
        output = function()
        assert output.isfinite().all(), name
        assert all(grad.isfinite().all() for grad in torch.autograd.grad(output.sum(), leaves)), name


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    torch.manual_seed(1)
    _, functions = calls((9, 5), 1.0)
    torch.manual_seed(1)
    _, half = calls((9, 5), 1.0, dtype)
    for name, function in functions.items():
        exact, output = function(), half[name]()
        assert output.dtype == dtype and (output.float() - exact).norm() < 0.03 * exact.norm(), name


@pytest.mark.parametrize(
    'message, call',
    [
        (r'directions must be .* = \(2, S, 8\)', lambda q, k, v: random_feature_attention(q, k, v, [3, 2], q[0, :1])),
        (r'feat_size \(3, 3\) does not hold', lambda q, k, v: random_feature_attention(q, k, v, [3, 3], q[0])),
        ("kind must be .*, got 'cosine'", lambda q, k, v: random_feature_attention(q, k, v, [3, 2], q[0], 'cosine')),
        ('dropout_p must be', lambda q, k, v: random_feature_attention(q, k, v, [3, 2], q[0], dropout_p=1.0)),
        ('landmarks_q and landmarks_k must be', lambda q, k, v: lara_attention(q, k, v, [3, 2], q, k[:, :, :1])),
        ('noise must be', lambda q, k, v: lara_attention(q, k, v, [3, 2], q, k, noise=q)),
        ("weighting must be .*, got 'best'", lambda q, k, v: lara_attention(q, k, v, [3, 2], q, k, 'best')),
        (
            'window_size must be at least 1, got 0',
            lambda q, k, v: scatterbrain_attention(q, k, v, [3, 2], q[0], window_size=0),
        ),
        ('rel_pos_bias must be', lambda q, k, v: scatterbrain_attention(q, k, v, [3, 2], q[0], q[0])),
    ],
)
def test_bad_arguments(message, call):
    with pytest.raises(ValueError, match=message):
        call(*tokens((3, 2)))
