"""What every attention of the table has to do, whatever it computes."""
import pytest
import torch
from layer_checks import randomise
from torch import fx

from evavit.layers import ATTENTIONS

each_attention = pytest.mark.parametrize('name', ATTENTIONS)
FEAT_SIZE = (13, 9)


def make(name, dim=48, num_heads=3, feat_size=FEAT_SIZE, **kwargs):
    attention = ATTENTIONS[name]
    return attention(dim, num_heads, **(dict(feat_size=feat_size) if attention.fixed_grid else {}), **kwargs)


def tokens(feat_size=FEAT_SIZE, batch=2, dim=48, **kwargs):
    return torch.randn(batch, feat_size[0] * feat_size[1], dim, **kwargs)


@each_attention
@pytest.mark.parametrize('feat_size', [(14, 14), (5, 3), (1, 30), (1, 1)])
def test_any_grid(name, feat_size):
    layer = randomise(make(name, feat_size=feat_size), 0.2)
    for training in (True, False):
        x = tokens(feat_size, requires_grad=True)
        y = layer.train(training)(x, feat_size)
        assert y.shape == x.shape and y.isfinite().all()
        y.square().sum().backward()
        assert x.grad.isfinite().all()


@each_attention
def test_evaluation_is_deterministic_and_draws_nothing(name):
    layer, x = make(name).eval(), tokens()
    state = torch.get_rng_state()
    assert torch.equal(layer(x, FEAT_SIZE), layer(x, FEAT_SIZE))
    assert torch.equal(torch.get_rng_state(), state)


@each_attention
def test_batch_entries_do_not_mix(name):
    layer, x = make(name).double().eval(), tokens(batch=3, dtype=torch.float64)
    torch.testing.assert_close(layer(x, FEAT_SIZE)[1:2], layer(x[1:2], FEAT_SIZE))


@each_attention
def test_dropout_of_weights_and_of_the_output(name):
    x = tokens()
    plain = randomise(make(name), 0.2).eval()
    for rate in ('attn_drop', 'proj_drop'):
        dropping = make(name, **{rate: 0.5})
        dropping.load_state_dict(plain.state_dict())
        torch.manual_seed(1)
        one = dropping.train()(x, FEAT_SIZE)
        torch.manual_seed(2)
        assert not torch.allclose(one, dropping(x, FEAT_SIZE))
        torch.testing.assert_close(dropping.eval()(x, FEAT_SIZE), plain(x, FEAT_SIZE))


@pytest.mark.parametrize('name', ['eva', 'softmax', 'combiner', 'reformer'])
def test_weights_add_up_to_one_and_under_dropout_in_the_mean(name):
    layer = make(name, attn_drop=0.3).double()
    qkv = torch.randn(3, 30, 3, FEAT_SIZE[0] * FEAT_SIZE[1], 16, dtype=torch.float64)
    qkv[2] = 1.
    torch.testing.assert_close(layer.eval().attend(qkv, FEAT_SIZE), qkv[2])
    output = layer.train().attend(qkv, FEAT_SIZE)
    assert output.std() > 0.005 and abs(output.mean() - 1) < 0.01


@each_attention
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision(name, dtype):
    torch.manual_seed(0)
    layer, x = make(name).eval(), tokens()
    expected = layer(x, FEAT_SIZE)
    with torch.autocast('cpu', dtype):
        mixed = layer(x, FEAT_SIZE)
    pure = layer.to(dtype)(x.to(dtype), FEAT_SIZE)
    assert pure.dtype == mixed.dtype == dtype
    for output in (mixed, pure):  # the hashes of Reformer are discrete: a rounded one moves a token to another bucket
        assert (output.float() - expected).norm() < (0.5 if name == 'reformer' else 0.05) * expected.norm()


@each_attention
def test_device_and_dtype_reach_every_parameter_and_buffer(name):
    layer = make(name, device='meta', dtype=torch.float64)
    assert all(tensor.is_meta for tensor in [*layer.parameters(), *layer.buffers()])
    assert all(parameter.dtype == torch.float64 for parameter in layer.parameters())
    layer = layer.to_empty(device='cpu')
    with torch.no_grad():
        for tensor in [*layer.parameters(), *layer.buffers()]:
            tensor.fill_(float('nan') if tensor.is_floating_point() else -10 ** 9)
    for module in layer.modules():
        if hasattr(module, 'reset_parameters'):
            module.reset_parameters()
    assert layer.eval()(tokens(dtype=torch.float64), FEAT_SIZE).isfinite().all()


@each_attention
def test_torchscript_and_fx(name):
    layer, x = randomise(make(name), 0.2).eval(), tokens()
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


@pytest.mark.parametrize('name', [name for name in ATTENTIONS if name != 'softmax'])  # that one needs no grid
def test_a_grid_that_does_not_hold_the_tokens(name):
    with pytest.raises(ValueError, match=r'feat_size \(5, 5\) does not hold the 117 tokens of q'):
        make(name)(tokens(), (5, 5))


@each_attention
def test_the_heads_must_divide_the_channels(name):
    with pytest.raises(ValueError, match='num_heads 5 does not divide dim 48'):
        make(name, num_heads=5)
