import pytest
import torch
from helpers import relative_errors
from ops.eva.references import eva_1d_loop

from evavit.layers import EvaAttention1d
from evavit.layers.eva_1d import T5RelPosBias

LAYERS = [
    dict(window_size=4, cell_size=2, causal=True),
    dict(window_size=6, cell_size=3, causal=True, overlap=True),
    dict(window_size=5, cell_size=3, overlap=True),
    dict(window_size=0, cell_size=4),
    dict(window_size=4, cell_size=0, rel_pos_bias=False, proposal_scale=0.5),
]


def make_layer(**kwargs):
    layer = EvaAttention1d(16, 2, num_buckets=8, max_distance=9, **kwargs, dtype=torch.float64)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.5)
    return layer


@pytest.mark.parametrize('kwargs', LAYERS)
def test_output_and_gradients_match_the_loop(kwargs):
    layer = make_layer(**kwargs).train()
    x = torch.randn(2, 13, 16, dtype=torch.float64, requires_grad=True)
    padding = torch.zeros(2, 13, dtype=torch.bool)
    padding[1, 10:] = True
    torch.manual_seed(1)
    output = layer(x, padding)
    torch.manual_seed(1)  # the layer's noise is the first draw of the default generator
    noise = torch.randn(2, 2, -(-13 // layer.cell_size), 1, 8, dtype=torch.float64) if layer.cell_size else None

    q, k, v = layer.qkv(x).view(2, 13, 3, 2, 8).permute(2, 0, 3, 1, 4)
    bias = (
        None
        if layer.rel_pos is None
        else (lambda n, m: layer.rel_pos.relative_position_bias_table[layer.rel_pos.bucket_of(m - n)])
    )
    y = eva_1d_loop(
        q,
        k,
        v,
        *(s() if s is not None else None for s in (layer.summary_q, layer.summary_k)),
        bias,
        layer.window_size,
        layer.cell_size,
        layer.causal,
        layer.overlap,
        padding,
        layer.proposal_scale,
        noise,
    )
    expected = layer.proj(y.transpose(1, 2).reshape(2, 13, 16))
    leaves = dict(layer.named_parameters(), x=x)
    found = relative_errors(output, leaves, expected, leaves)
    assert max(found.values()) <= 1e-10, found


@pytest.mark.parametrize('kwargs', LAYERS[:2])
def test_steps_reproduce_forward(kwargs):
    layer, cache = make_layer(**kwargs).eval(), None
    x = torch.randn(2, 15, 16, dtype=torch.float64)
    expected = layer(x)
    for n in range(15):
        y, cache = layer.step(x[:, n : n + 1], cache)
        torch.testing.assert_close(y, expected[:, n : n + 1], rtol=1e-11, atol=1e-12)
    fork, _ = layer.step(x[:, 3:4], cache)  # a cache is not changed by a step: two continuations of one text
    again, _ = layer.step(x[:, 3:4], cache)
    assert torch.equal(fork, again)


@pytest.mark.parametrize('kwargs', [{}, dict(causal=True, overlap=True)])
def test_an_empty_batch(kwargs):
    layer, x = EvaAttention1d(48, 3, window_size=8, cell_size=2, **kwargs), torch.randn(0, 21, 48)
    assert layer(x).shape == layer(x, torch.zeros(0, 21, dtype=torch.bool)).shape == x.shape
    if layer.causal:
        y, cache = layer.step(x[:, :1])
        assert layer.step(x[:, 1:2], cache)[0].shape == y.shape == (0, 1, 48)


def test_only_a_causal_layer_steps():
    with pytest.raises(ValueError, match='only a causal layer goes step by step'):
        make_layer(window_size=4, cell_size=2).step(torch.zeros(1, 1, 16, dtype=torch.float64))


def test_buckets_are_those_of_t5():
    """First distances of the buckets for T5's 32 buckets and distance 128, in both directions and causal."""
    both = T5RelPosBias(1, (0, 0), 1)
    starts = [0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 23, 32, 46, 64, 91]
    for distance in range(300):
        bucket = max(i for i, start in enumerate(starts) if start <= distance)
        assert both.bucket_of(-distance) == bucket
        assert distance == 0 or both.bucket_of(distance) == bucket + 16
    causal = T5RelPosBias(1, (0, 0), 1, causal=True)
    assert [causal.bucket_of(-n) for n in range(20)] == [*range(17), 16, 16, 17]
    assert causal.bucket_of(-113) == 31 and causal.bucket_of(-(10**6)) == 31 and causal.bucket_of(5) == 0


def test_seed_evaluation_and_dropout():
    layer, x = make_layer(window_size=4, cell_size=2), torch.randn(1, 9, 16, dtype=torch.float64)
    layer.train()
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    layer.attn_drop.p = 0.5
    assert torch.equal(layer(x), layer(x))
    layer.noise_std = 0.0
    assert not torch.equal(layer.train()(x), layer(x))


def test_compiles_in_one_graph():
    layer = make_layer(window_size=4, cell_size=2, causal=True, overlap=True).eval()
    x, padding = torch.randn(2, 13, 16, dtype=torch.float64), torch.zeros(2, 13, dtype=torch.bool)
    padding[0, 11:] = True
    compiled = torch.compile(layer, backend='eager', fullgraph=True)
    torch.testing.assert_close(compiled(x, padding), layer(x, padding))


def test_device_and_dtype_reach_everything():
    layer = EvaAttention1d(48, 3, device='meta', dtype=torch.float64)
    assert all(tensor.is_meta for tensor in [*layer.parameters(), *layer.buffers()])
    assert all(parameter.dtype == torch.float64 for parameter in layer.parameters())
    layer = layer.to_empty(device='cpu')
    for module in layer.modules():
        if hasattr(module, 'reset_parameters'):
            module.reset_parameters()
    assert layer(torch.randn(1, 20, 48, dtype=torch.float64)).isfinite().all()
    assert 'window_size=128, cell_size=8, causal=False' in repr(layer)


@pytest.mark.parametrize(
    'kwargs, message',
    [
        (dict(window_size=6, cell_size=4, causal=True), 'cell_size 4 does not divide window_size 6'),
        (dict(window_size=0, cell_size=0), 'window_size 0 leaves'),
        (dict(noise_std=-1.0), 'noise_std must be'),
        (dict(window_size=4.5), 'window_size must be a whole number of at least 0, got 4.5'),
        (dict(cell_size=2.0), 'cell_size must be a whole number'),
        (dict(num_buckets=2), 'max_distance must be above 0 for num_buckets 2'),
        (dict(max_distance=8), 'max_distance must be above 8 for num_buckets 32'),
        (dict(qk_norm=True), 'EvaAttention1d has no qk_norm and no scale_norm; leave them out'),
        (dict(scale_norm=True), 'EvaAttention1d has no qk_norm and no scale_norm; leave them out'),
        (dict(rotate_half=True), 'EvaAttention1d has no rotary embeddings; leave rotate_half out'),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        EvaAttention1d(48, 3, **kwargs)
