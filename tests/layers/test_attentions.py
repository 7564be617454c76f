"""What every attention of the table does, and the layers on random features against the loops."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from references import eva_loop, lara_loop, performer_loop, scatterbrain_loop
from torch.utils.checkpoint import checkpoint

from evavit.layers import (
    ATTENTIONS,
    GridAttention,
    LaraAttention,
    LocalAttention,
    PerformerAttention,
    ScatterbrainAttention,
    SoftmaxAttention,
    attention_layer,
)
from evavit.ops.grid import cell_shape

each_attention = pytest.mark.parametrize('name', ATTENTIONS)
GRIDS = [(14, 14), (13, 9), (7, 20), (5, 3), (1, 1)]
each_grid = pytest.mark.parametrize('feat_size', GRIDS)


def make(name, feat_size=(14, 14), dim=48, num_heads=3, **kwargs):
    return attention_layer(name, feat_size)(dim, num_heads, **kwargs)


def randomise(layer, std=0.5):
    """Weights of a size that makes every term count."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=std)
    return layer


def softmax_like(layer):
    """A softmax layer with the projections of another one."""
    other = SoftmaxAttention(layer.qkv.in_features, layer.num_heads, dtype=layer.qkv.weight.dtype)
    other.load_state_dict({key: layer.state_dict()[key] for key in other.state_dict()})
    return other.eval()


@each_attention
def test_options_are_keyword_only_with_the_shared_ones_among_them(name):
    own = inspect.signature(ATTENTIONS[name]).parameters
    shared = inspect.signature(GridAttention).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in own.values()):
        assert set(shared) <= set(own)
    assert [key for key, parameter in own.items() if parameter.kind is parameter.POSITIONAL_OR_KEYWORD] == [
        'dim',
        'num_heads',
    ]
    for key, parameter in shared.items():
        assert key not in own or own[key].default == parameter.default


@each_attention
@each_grid
def test_any_grid_in_training_and_evaluation(name, feat_size):
    layer, x = make(name, feat_size), torch.randn(2, feat_size[0] * feat_size[1], 48, requires_grad=True)
    for mode in (True, False):
        layer.zero_grad()
        y = layer.train(mode)(x, feat_size)
        assert y.shape == x.shape and y.dtype == x.dtype and y.isfinite().all()
        y.square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in [x, *layer.parameters()])


@each_attention
def test_another_number_of_tokens_than_the_grid_is_refused(name):
    if name == 'softmax':
        pytest.skip('softmax attention does not look at the grid')
    with pytest.raises(ValueError, match=r'feat_size|grid'):
        make(name)(torch.randn(1, 195, 48), (14, 14))


@each_attention
def test_a_grid_of_three_numbers_is_refused(name):
    if name == 'softmax':
        pytest.skip('softmax attention does not look at the grid')
    with pytest.raises(ValueError, match=r'feat_size must be \(height, width\)'):
        make(name, (3, 4))(torch.randn(1, 12, 48), (3, 4, 1))


@each_attention
def test_a_seed_reproduces_training_and_evaluation_draws_nothing(name):
    layer, x = randomise(make(name), 0.1).train(), torch.randn(2, 196, 48)

    def run(seed):
        torch.manual_seed(seed)
        return layer(x, (14, 14))

    assert torch.equal(run(1), run(1))
    layer.eval()
    first = run(1)
    state = torch.get_rng_state()
    assert torch.equal(first, layer(x, (14, 14)))
    assert torch.equal(torch.get_rng_state(), state)
    again = make(name).eval()
    again.load_state_dict(layer.state_dict())
    assert torch.equal(first, again(x, (14, 14)))  # nothing that counts is missing from a checkpoint


@each_attention
def test_both_dropouts(name):
    x = torch.randn(1, 196, 48)
    plain = randomise(make(name), 0.1)
    for rate in ('attn_drop', 'proj_drop'):
        dropping = make(name, **{rate: 0.5})
        dropping.load_state_dict(plain.state_dict())
        outputs = []
        for layer in (dropping.train(), plain.train()):
            torch.manual_seed(1)  # the same noise, which is drawn before anything is dropped
            outputs.append(layer(x, (14, 14)))
        assert not torch.allclose(*outputs)
        torch.testing.assert_close(dropping.eval()(x, (14, 14)), plain.eval()(x, (14, 14)))


@each_attention
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision(name, dtype):
    layer, x = randomise(make(name, (13, 9)), 0.2).eval(), torch.randn(2, 13 * 9, 48)
    expected = layer(x, (13, 9))
    with torch.autocast('cpu', dtype):
        mixed = layer(x, (13, 9))
    pure = layer.to(dtype)(x.to(dtype), (13, 9))
    assert pure.dtype == mixed.dtype == dtype
    for output in (mixed, pure):
        assert (output.float() - expected).norm() < 0.05 * expected.norm()


@each_attention
def test_device_and_dtype_reach_every_parameter_and_buffer(name):
    layer = make(name, (4, 5), device='meta', dtype=torch.float64)
    assert all(tensor.is_meta for tensor in [*layer.parameters(), *layer.buffers()])
    assert all(
        tensor.dtype == torch.float64
        for tensor in [*layer.parameters(), *layer.buffers()]
        if tensor.is_floating_point()
    )
    layer = layer.to_empty(device='cpu')
    for module in layer.modules():
        if hasattr(module, 'reset_parameters'):
            module.reset_parameters()
    x = torch.randn(1, 20, 48, dtype=torch.float64)
    assert layer(x, (4, 5)).isfinite().all()
    fresh = make(name, (4, 5), dtype=torch.float64)
    assert all(torch.equal(a, b) for a, b in zip(layer.buffers(), fresh.buffers(), strict=True))


@each_attention
def test_checkpointing_sees_the_same_randomness(name):
    layer, x = randomise(make(name), 0.1).train(), torch.randn(2, 196, 48)
    gradients = []
    for run in (layer, lambda *args: checkpoint(layer, *args, use_reentrant=False)):
        layer.zero_grad()
        torch.manual_seed(1)
        run(x, (14, 14)).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in layer.parameters()])
    torch.testing.assert_close(*gradients)


def check_layer(layer, x, feat_size, attention, draws=lambda: None):
    """A layer in float64 against its projections around a loop: output, and gradients of x and every parameter.

    draws() makes what the layer draws first, from the default generator.
    """

    def around(noise):
        B, N, C = x.shape
        q, k, v = layer.qkv(x).view(B, N, 3, layer.num_heads, C // layer.num_heads).permute(2, 0, 3, 1, 4)
        return layer.proj(attention(q, k, v, noise).transpose(1, 2).reshape(B, N, C))

    torch.manual_seed(1)
    output = layer(x, feat_size)
    torch.manual_seed(1)
    expected = around(draws())
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-10)
    leaves, grad = [x, *layer.parameters()], torch.randn_like(output)
    for value, reference in zip(
        torch.autograd.grad(output, leaves, grad),
        torch.autograd.grad(expected, leaves, grad, allow_unused=True),
        strict=True,
    ):
        reference = torch.zeros_like(value) if reference is None else reference
        assert (value - reference).norm() <= 1e-9 * max(reference.norm().item(), 0.01 * grad.norm().item())


def input_of(feat_size, dim=24):
    return torch.randn(2, feat_size[0] * feat_size[1], dim, dtype=torch.float64, requires_grad=True)


@each_grid
@pytest.mark.parametrize('kwargs', [{}, dict(window_size=4), dict(rel_pos_bias=False)])
def test_local(feat_size, kwargs):
    layer = randomise(LocalAttention(24, 3, **kwargs, dtype=torch.float64))
    table = layer.rel_pos.relative_position_bias_table if layer.rel_pos is not None else None
    check_layer(
        layer,
        input_of(feat_size),
        feat_size,
        lambda q, k, v, _: eva_loop(
            q, k, v, feat_size, bias_table=table, window_size=layer.window_size, partition_grid=0
        ),
    )


@each_grid
@pytest.mark.parametrize('kind', ['positive', 'relu'])
def test_performer_in_evaluation(feat_size, kind):
    layer = randomise(PerformerAttention(24, 3, num_features=13, feature_kind=kind, dtype=torch.float64), 0.3).eval()
    check_layer(
        layer, input_of(feat_size), feat_size, lambda q, k, v, _: performer_loop(q, k, v, layer.directions.fixed, kind)
    )


def test_performer_in_training_draws_normal_directions():
    layer = PerformerAttention(24, 3, num_features=13, orthogonal=False, redraw_interval=1, dtype=torch.float64)
    randomise(layer, 0.3).train()
    check_layer(
        layer,
        input_of((5, 4)),
        (5, 4),
        lambda q, k, v, directions: performer_loop(q, k, v, directions),
        draws=lambda: torch.randn(3, 13, 8).double(),
    )


@each_grid
@pytest.mark.parametrize(
    'kwargs',
    [
        dict(landmark_grid=2),
        dict(landmark_grid=3, landmark_proj='channels', weighting='biased'),
        dict(landmark_grid=2, weighting='balance', num_samples=3),
        dict(landmark_grid=2, num_samples=4, antithetic=True),
    ],
)
def test_lara_in_training(feat_size, kwargs):
    layer = randomise(LaraAttention(24, 3, **kwargs, dtype=torch.float64), 0.3).train()
    cell = cell_shape(feat_size, layer.landmark_grid)
    count = -(-feat_size[0] // cell[0]) * -(-feat_size[1] // cell[1])

    def landmarks(x, part):
        grid = x.unflatten(2, feat_size)
        means = torch.stack(
            [
                grid[:, :, top : top + cell[0], left : left + cell[1]].mean((2, 3))
                for top in range(0, feat_size[0], cell[0])
                for left in range(0, feat_size[1], cell[1])
            ],
            2,
        )
        if kwargs.get('landmark_proj') == 'channels':
            made = part.norm(part.proj(means.transpose(1, 2).reshape(2, count, 24)))
            return made.view(2, count, 3, 8).transpose(1, 2)
        return part.norm(part.proj(means))

    def draws():
        if layer.antithetic:
            noise = torch.randn(2, 3, count, layer.num_samples // 2, 8, dtype=torch.float64)
            return torch.cat([noise, -noise], 3)
        return torch.randn(2, 3, count, layer.num_samples, 8, dtype=torch.float64)

    check_layer(
        layer,
        input_of(feat_size),
        feat_size,
        lambda q, k, v, noise: lara_loop(
            q, k, v, landmarks(q, layer.landmarks_q), landmarks(k, layer.landmarks_k), layer.weighting, noise
        ),
        draws,
    )


@each_grid
@pytest.mark.parametrize('kwargs', [{}, dict(window_size=4), dict(window_size=3, rel_pos_bias=False)])
def test_scatterbrain_in_evaluation(feat_size, kwargs):
    layer = randomise(ScatterbrainAttention(24, 3, num_features=13, **kwargs, dtype=torch.float64), 0.3).eval()
    table = layer.rel_pos.relative_position_bias_table if layer.rel_pos is not None else None
    check_layer(
        layer,
        input_of(feat_size),
        feat_size,
        lambda q, k, v, _: scatterbrain_loop(q, k, v, feat_size, layer.directions.fixed, table, layer.window_size),
    )


@pytest.mark.parametrize('name', ['local', 'scatterbrain'])
@pytest.mark.parametrize('feat_size', [(7, 7), (5, 6)])
def test_a_window_over_the_grid_without_bias_is_softmax(name, feat_size):
    layer, x = randomise(make(name, rel_pos_bias=False)), torch.randn(2, feat_size[0] * feat_size[1], 48)
    torch.testing.assert_close(layer(x, feat_size), softmax_like(layer)(x, feat_size))
    biased = make(name)  # and with a bias of 0
    biased.load_state_dict(layer.state_dict(), strict=False)
    torch.nn.init.zeros_(biased.rel_pos.relative_position_bias_table)
    torch.testing.assert_close(biased(x, feat_size), layer(x, feat_size))


@pytest.mark.parametrize('name', ['performer', 'scatterbrain'])
def test_directions_that_are_kept_go_on_after_a_reload(name):
    x = torch.randn(1, 196, 48)
    layer = make(name, redraw_interval=10**6).train()
    layer.directions.kept.normal_()  # as after a draw

    def run(layer):
        torch.manual_seed(1)
        return layer(x, (14, 14))

    again, anew = make(name, redraw_interval=10**6).train(), make(name).eval()
    again.load_state_dict(layer.state_dict())
    assert torch.equal(run(again), run(layer))
    anew.load_state_dict(layer.state_dict())  # nothing that evaluation asks for
    assert torch.equal(run(anew), run(layer.eval()))
    again.load_state_dict(anew.state_dict())
    assert torch.equal(run(again.eval()), run(anew))


def test_performer_approaches_softmax():
    x = torch.randn(2, 36, 48)
    few, many = (make('performer', num_features=count).eval() for count in (16, 16384))
    many.load_state_dict(few.state_dict())
    exact = softmax_like(few)(x, (6, 6))
    errors = [(layer(x, (6, 6)) - exact).norm() / exact.norm() for layer in (few, many)]
    assert errors[1] < 0.05 and errors[1] < errors[0] / 8  # 1,024 times as many features: about a 32nd


def test_performer_has_the_parameters_of_softmax():
    make('performer').load_state_dict(make('softmax').state_dict(), strict=True)


@pytest.mark.parametrize('name', ['performer', 'scatterbrain'])
def test_directions_are_redrawn_now_and_then(name):
    x = torch.randn(1, 196, 48)

    def distinct(interval, steps=60):
        layer = make(name, num_features=8, redraw_interval=interval).train()
        outputs = torch.stack([layer(x, (14, 14)).detach().flatten() for _ in range(steps)])
        evaluation = layer.eval()(x, (14, 14)).flatten()
        return len(torch.unique(outputs, dim=0)), torch.equal(outputs[0], evaluation), layer

    assert distinct(0)[:2] == (1, True)  # never: trained as evaluated
    assert distinct(1)[0] == 60
    count, _, layer = distinct(10)
    assert 2 <= count <= 15  # 6 on average
    assert 'directions.kept' in layer.state_dict() and 'directions.fixed' not in layer.state_dict()


def test_the_redraws_survive_a_graph_and_a_checkpoint():
    """Directions that are kept in a buffer: the backward pass sees those of its forward pass."""
    layer, x = make('performer', num_features=8, redraw_interval=2).train(), torch.randn(1, 196, 48)
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


@pytest.mark.parametrize(
    'name, kwargs, message',
    [
        ('local', dict(window_size=0), 'window_size must be a whole number of at least 1, got 0'),
        ('performer', dict(num_features=1.5), 'num_features must be a whole number of at least 1, got 1.5'),
        ('performer', dict(redraw_interval=-1), 'redraw_interval must be a whole number of at least 0, got -1'),
        ('performer', dict(feature_kind='cosine'), "feature_kind must be 'positive' or 'relu', got 'cosine'"),
        ('lara', dict(weighting='best'), "weighting must be one of optimal, balance, biased, got 'best'"),
        ('lara', dict(landmark_proj='all'), "landmark_proj must be one of head, channels, got 'all'"),
        ('lara', dict(antithetic=True), 'num_samples must be even, got 1'),
        ('lara', dict(landmark_grid=0), 'landmark_grid must be a whole number of at least 1, got 0'),
        ('scatterbrain', dict(window_size=0), 'window_size must be a whole number of at least 1, got 0'),
    ],
)
def test_bad_arguments(name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make(name, **kwargs)


def test_local_equals_torch_inside_each_window():
    layer, x = randomise(LocalAttention(48, 3, window_size=3, rel_pos_bias=False)), torch.randn(1, 18, 48)
    q, k, v = layer.qkv(x).view(1, 18, 3, 3, 16).permute(2, 0, 3, 1, 4).unflatten(3, (3, 6)).unbind(0)
    halves = [
        F.scaled_dot_product_attention(*(t[:, :, :, part].flatten(2, 3) for t in (q, k, v))).unflatten(2, (3, 3))
        for part in (slice(0, 3), slice(3, 6))
    ]
    expected = layer.proj(torch.cat(halves, 3).flatten(2, 3).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x, (3, 6)), expected)
