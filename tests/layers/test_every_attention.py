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
def test_batch_entries_do_not_mix(name):
    layer, x = make(name).double().eval(), tokens(batch=3, dtype=torch.float64)
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
    layer, x = make(name, **kwargs), tokens(batch=0, requires_grad=True)
    for mode in (True, False):
        y = layer.train(mode)(x, FEAT_SIZE)
        assert y.shape == x.shape
        y.sum().backward()
    assert x.grad.shape == x.shape and not any(p.grad.any() for p in layer.parameters())


@pytest.mark.parametrize('name', ['eva', 'softmax', 'combiner', 'reformer'])
def test_weights_add_up_to_one_and_under_dropout_in_the_mean(name):
    layer = make(name, attn_drop=0.3).double()
    qkv = torch.randn(3, 30, 3, FEAT_SIZE[0] * FEAT_SIZE[1], 16, dtype=torch.float64)
    qkv[2] = 1.0
    torch.testing.assert_close(layer.eval().attend(qkv, FEAT_SIZE), qkv[2])
    output = layer.train().attend(qkv, FEAT_SIZE)
    assert output.std() > 0.005 and abs(output.mean() - 1) < 0.01


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
