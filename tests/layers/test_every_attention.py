"""What every attention of the table has to do, whatever it computes."""

import inspect
import math

import pytest
import torch
from helpers import GRIDS, randomise
from torch import fx
from torch.utils.checkpoint import checkpoint

from evavit.layers import ATTENTIONS, GridAttention, attention_layer

each_attention = pytest.mark.parametrize('name', ATTENTIONS)
each_grid = pytest.mark.parametrize('feat_size', [*GRIDS, (13, 9)])
FEAT_SIZE = (13, 9)


def make(name, feat_size=(14, 14), dim=48, num_heads=3, **kwargs):
    return attention_layer(name, feat_size)(dim, num_heads, **kwargs)


def tokens(feat_size=FEAT_SIZE, batch=2, dim=48, **kwargs):
    return torch.randn(batch, feat_size[0] * feat_size[1], dim, **kwargs)


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


def flags(name):
    shared, own = (inspect.signature(kind).parameters for kind in (GridAttention, ATTENTIONS[name]))
    return sorted(key for key, parameter in {**shared, **own}.items() if parameter.annotation is bool)


@pytest.mark.parametrize('name, flag', [(name, flag) for name in ATTENTIONS for flag in flags(name)])
def test_a_flag_is_true_or_false(name, flag):
    for value in ('no', 'yes', None, 0, math.nan):
        with pytest.raises(ValueError, match=f'{flag} must be True or False, got {value!r}'):
            make(name, **{flag: value})


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
@pytest.mark.parametrize('fused', [True, False])
def test_all_derivatives_are_there(name, fused):
    """Forward mode and, with timm's switch off, second derivatives: with prefix tokens too."""
    if name == 'softmax' and fused:
        pytest.skip("PyTorch's fused attention has neither, in timm's ViTs as well")
    prefix = 2 if ATTENTIONS[name].takes_prefix_tokens else 0
    layer = randomise(make(name, FEAT_SIZE, **(dict(num_prefix_tokens=prefix) if prefix else {}))).double().eval()
    if hasattr(layer, 'fused_attn'):
        layer.fused_attn = fused
    x = torch.randn(1, prefix + FEAT_SIZE[0] * FEAT_SIZE[1], 48, dtype=torch.float64, requires_grad=True)
    direction, weights = torch.randn_like(x), torch.randn_like(x)

    def loss(x):
        return (weights * layer(x, FEAT_SIZE)).sum()

    (gradient,) = torch.autograd.grad(loss(x), x, create_graph=not fused)
    expected = (gradient * direction).sum()
    torch.testing.assert_close(torch.func.jvp(loss, (x.detach(),), (direction,))[1], expected.detach())
    with torch.autograd.forward_ad.dual_level():
        dual = loss(torch.autograd.forward_ad.make_dual(x.detach(), direction))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, expected.detach())
    if not fused:
        (second,) = torch.autograd.grad(expected, x, materialize_grads=True)  # zeros of one that is linear in x
        ahead, behind = (
            torch.autograd.grad(loss(moved), moved)[0]
            for moved in ((x.detach() + step * direction).requires_grad_() for step in (1e-5, -1e-5))
        )
        torch.testing.assert_close(second, (ahead - behind) / 2e-5, rtol=1e-3, atol=1e-4)


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


@each_attention
def test_batch_entries_do_not_mix(name):
    layer, x = make(name, FEAT_SIZE).double().eval(), tokens(batch=3, dtype=torch.float64)
    torch.testing.assert_close(layer(x, FEAT_SIZE)[1:2], layer(x[1:2], FEAT_SIZE))


@pytest.mark.parametrize(
    'name, kwargs',
    [
        *((name, {}) for name in ATTENTIONS),
        ('eva', dict(window_size=0)),
        ('eva', dict(overlap=True)),
        ('eva', dict(num_samples=2)),
        ('eva', dict(partition='complement')),
    ],
)
def test_an_empty_batch(name, kwargs):
    layer, x = make(name, FEAT_SIZE, **kwargs), tokens(batch=0, requires_grad=True)
    for mode in (True, False):
        y = layer.train(mode)(x, FEAT_SIZE)
        assert y.shape == x.shape
        y.sum().backward()
    assert x.grad.shape == x.shape and not any(p.grad.any() for p in layer.parameters())


@pytest.mark.parametrize('name', ['eva', 'softmax', 'combiner', 'reformer'])
def test_weights_add_up_to_one_and_under_dropout_in_the_mean(name):
    layer = make(name, FEAT_SIZE, attn_drop=0.3).double()
    qkv = torch.randn(3, 30, 3, FEAT_SIZE[0] * FEAT_SIZE[1], 16, dtype=torch.float64)
    qkv[2] = 1.0
    torch.testing.assert_close(layer.eval().attend(qkv, FEAT_SIZE), qkv[2])
    output = layer.train().attend(qkv, FEAT_SIZE)
    assert output.std() > 0.005 and abs(output.mean() - 1) < 0.01


@each_attention
def test_torchscript_and_fx(name):
    layer, x = randomise(make(name, FEAT_SIZE), 0.2).eval(), tokens()
    expected = layer(x, FEAT_SIZE)
    torch.testing.assert_close(torch.jit.script(layer)(x, FEAT_SIZE), expected)

    class Root(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = layer

        def forward(self, x):
            return self.attn(x, FEAT_SIZE)

    from timm.models._features_fx import get_notrace_modules

    class Tracer(fx.Tracer):
        def is_leaf_module(self, m, name):
            return type(m) in get_notrace_modules() or super().is_leaf_module(m, name)

    root = Root().eval()
    graph = Tracer().trace(root)
    torch.testing.assert_close(fx.GraphModule(root, graph)(x), expected)


@each_attention
@pytest.mark.parametrize('feat_size', [(13, 9), (1, 1)], ids=str)
def test_rows_times_values_are_the_output_or_a_line_says_why_not(name, feat_size):
    layer = randomise(make(name, feat_size).double())
    x = tokens(feat_size, dtype=torch.float64)
    try:
        attend, v = layer.eval().function_of_values(x, list(feat_size), None)
    except ValueError as error:
        assert 'no sum of values with weights' in str(error) and '\n' not in str(error)
        return
    rows = layer.attention_rows(x, list(feat_size))
    torch.testing.assert_close(rows @ v, attend(v), rtol=1e-9, atol=1e-9)
    out = layer.proj((rows @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(out, layer(x, list(feat_size)), rtol=1e-9, atol=1e-9)
    assert (
        rows.shape == (2, 3, x.shape[1], x.shape[1])
        and layer.train().attention_rows(x, list(feat_size)).isfinite().all()
    )
