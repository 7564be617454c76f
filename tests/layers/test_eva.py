import pytest
import timm
import torch
from ops.eva.references import eva_loop, mass_loop
from timm.layers import AttentionRope, RotaryEmbeddingCat, apply_rot_embed_cat
from torch import nn

from evavit import export as exporting
from evavit.convert import PUBLISHED_EVA_KWARGS, convert_published_eva
from evavit.layers import EvaAttention, LocalAttention, PerformerAttention, ReformerAttention, SoftmaxAttention

STATE = {
    'qkv.weight',
    'qkv.bias',
    'proj.weight',
    'proj.bias',
    'rel_pos.relative_position_bias_table',
    *(f'summary_{x}.{part}.{name}' for x in 'qk' for part in ('proj', 'norm') for name in ('weight', 'bias')),
}


def randomise(layer):
    """Weights of a size that makes every term count."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.5)
    return layer


def layer_loop(layer, x, feat_size, noise=None):
    """The layer, with the loop over the definition between its projections."""
    B, N, C = x.shape
    h = layer.num_heads
    q, k, v = layer.qkv(x).view(B, N, 3, h, C // h).permute(2, 0, 3, 1, 4)
    summaries = [
        (s.proj.weight, s.proj.bias, s.norm.weight, s.norm.bias) if s is not None else None
        for s in (layer.summary_q, layer.summary_k)
    ]
    table = layer.rel_pos.relative_position_bias_table if layer.rel_pos is not None else None
    sizes = layer.window_size, layer.partition_grid, layer.proposal_scale
    y = eva_loop(q, k, v, feat_size, *summaries, table, *sizes, noise, layer.count_cells)
    return layer.proj(y.transpose(1, 2).reshape(B, N, C))


@pytest.mark.parametrize('feat_size', [(14, 14), (13, 13), (7, 50), (5, 3), (1, 1)])
@pytest.mark.parametrize(
    'kwargs',
    [
        {},
        dict(window_size=4, partition_grid=3),
        dict(window_size=0),
        dict(partition_grid=0),
        dict(rel_pos_bias=False, proposal_scale=0.5),
        dict(qkv_bias=False, proj_bias=False),
        dict(count_cells='all'),
        dict(count_cells='outside', window_size=5, partition_grid=6),
    ],
)
def test_output_and_gradients_match_the_loop(feat_size, kwargs):
    layer = randomise(EvaAttention(24, 3, **kwargs, dtype=torch.float64)).train()
    x = torch.randn(2, feat_size[0] * feat_size[1], 24, dtype=torch.float64, requires_grad=True)
    leaves = [x, *layer.parameters()]

    torch.manual_seed(1)
    output = layer(x, feat_size)
    torch.manual_seed(1)  # the layer's noise is the first draw of the default generator
    noise = None
    if layer.partition_grid:
        cells = [-(-size // -(-size // layer.partition_grid)) for size in feat_size]
        noise = torch.randn(2, 3, cells[0] * cells[1], 8, dtype=torch.float64)
    expected = layer_loop(layer, x, feat_size, noise)

    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-12)
    grad = torch.randn_like(output)
    for value, reference in zip(
        torch.autograd.grad(output, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True
    ):
        assert (value - reference).norm() <= 1e-10 * max(reference.norm().item(), 0.01 * grad.norm().item())


def test_state_dict_names_are_fixed():
    assert set(EvaAttention(48, 3).state_dict()) == STATE
    no_cells = EvaAttention(48, 3, partition_grid=0)
    assert set(no_cells.state_dict()) == {name for name in STATE if not name.startswith('summary')}
    assert not any('rel_pos' in name for name in EvaAttention(48, 3, window_size=0).state_dict())
    assert not any('rel_pos' in name for name in EvaAttention(48, 3, rel_pos_bias=False).state_dict())


def test_noise_in_training_follows_the_seed_and_evaluation_is_deterministic():
    layer, x = randomise(EvaAttention(48, 3)), torch.randn(2, 196, 48)

    def run(seed):
        torch.manual_seed(seed)
        return layer(x, (14, 14))

    layer.train()
    assert torch.equal(run(1), run(1))
    assert not torch.allclose(run(1), run(2))
    layer.noise_std = 0.0
    assert torch.equal(run(1), run(2))
    layer.noise_std = 1.0
    layer.eval()
    state = torch.get_rng_state()
    assert torch.equal(run(1), layer(x, (14, 14)))
    torch.set_rng_state(state)
    layer(x, (14, 14))
    assert torch.equal(torch.get_rng_state(), state)  # evaluation draws nothing


def test_attention_and_projection_dropout():
    x = torch.randn(1, 196, 48)
    plain = randomise(EvaAttention(48, 3, noise_std=0.0))
    for name in ('attn_drop', 'proj_drop'):
        dropping = EvaAttention(48, 3, noise_std=0.0, **{name: 0.5})
        dropping.load_state_dict(plain.state_dict())
        assert not torch.allclose(dropping.train()(x, (14, 14)), plain(x, (14, 14)))
        torch.testing.assert_close(dropping.eval()(x, (14, 14)), plain(x, (14, 14)))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_layer(dtype):
    layer, x = randomise(EvaAttention(48, 3)).eval(), torch.randn(2, 13 * 9, 48)
    expected = layer(x, (13, 9))
    with torch.autocast('cpu', dtype):
        mixed = layer(x, (13, 9))
    pure = layer.to(dtype)(x.to(dtype), (13, 9))
    assert pure.dtype == mixed.dtype == dtype
    for output in (mixed, pure):
        assert (output.float() - expected).norm() < 0.03 * expected.norm()


def test_device_and_dtype_reach_every_parameter_and_buffer():
    layer = EvaAttention(48, 3, device='meta', dtype=torch.float64)
    assert all(tensor.is_meta for tensor in [*layer.parameters(), *layer.buffers()])
    assert all(parameter.dtype == torch.float64 for parameter in layer.parameters())
    layer = layer.to_empty(device='cpu')
    for module in layer.modules():
        if hasattr(module, 'reset_parameters'):
            module.reset_parameters()
    assert layer(torch.randn(1, 20, 48, dtype=torch.float64), (4, 5)).isfinite().all()


@pytest.mark.parametrize(
    'args, kwargs, message',
    [
        ((48, 5), {}, 'num_heads 5 does not divide dim 48'),
        ((48.0, 3), {}, 'dim must be a whole number'),
        ((0, 3), {}, 'dim must be a whole number of at least 1, got 0'),
        ((48, 3), dict(window_size=0, partition_grid=0), 'nothing to attend to'),
        ((48, 3), dict(window_size=-7), 'window_size must be'),
        ((48, 3), dict(noise_std=-1.0), 'noise_std must be'),
        ((48, 3), dict(partition_grid=2.5), 'partition_grid must be a whole number, got 2.5'),
        ((48, 3), dict(window_size=True), 'window_size must be a whole number, got True'),
        ((48, 3), dict(noise_std=float('nan')), 'noise_std must be a finite number, got nan'),
        ((48, 3), dict(proposal_scale='1'), "proposal_scale must be a finite number, got '1'"),
        ((48, 3), dict(count_cells='some'), "count_cells must be one of one, all, outside, got 'some'"),
        (
            (48, 3),
            dict(count_cells='all', partition_grid=0),
            "count_cells 'all' is about cells, and partition_grid 0 has none; leave it out",
        ),
        ((48, 3), dict(attn_drop=1.0), 'attn_drop must be'),
    ],
)
def test_bad_arguments(args, kwargs, message):
    with pytest.raises(ValueError, match=message):
        EvaAttention(*args, **kwargs)


def test_a_grid_without_tokens_is_refused():
    with pytest.raises(ValueError, match=r'feat_size \(0, 5\)'):
        EvaAttention(48, 3).train()(torch.zeros(1, 0, 48), (0, 5))


def test_repr_names_the_settings():
    assert 'window_size=7, partition_grid=3, proposal_scale=0.5' in repr(
        EvaAttention(48, 3, partition_grid=3, proposal_scale=0.5)
    )
    assert 'count_cells' not in repr(EvaAttention(48, 3))
    assert 'noise_std=1, count_cells=outside, backend=' in repr(EvaAttention(48, 3, count_cells='outside'))


@pytest.mark.parametrize('count_cells', ['all', 'outside'])
def test_counted_cells_script_trace_compile_and_export(count_cells):
    layer = randomise(EvaAttention(24, 3, window_size=4, partition_grid=5, count_cells=count_cells)).eval()
    x = torch.randn(2, 9 * 7, 24)
    expected = layer(x, [9, 7])
    one = EvaAttention(24, 3, window_size=4, partition_grid=5).eval()
    one.load_state_dict(layer.state_dict())
    assert (one(x, [9, 7]) - expected).norm() > 0.01 * expected.norm()
    torch.testing.assert_close(torch.jit.script(layer)(x, [9, 7]), expected)
    torch.compiler.reset()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(x, [9, 7]), expected)
    torch.testing.assert_close(compiled(x[:, :42], [6, 7]), layer(x[:, :42], [6, 7]))
    assert len(graphs) == 2
    dynamic = ({0: torch.export.Dim('batch', max=64)}, [None, None])
    program = torch.export.export(layer, (x, [9, 7]), dynamic_shapes=dynamic)
    torch.testing.assert_close(program.module()(x[:1], [9, 7]), expected[:1])


def test_counted_cells_in_onnx(tmp_path):
    for package in ('onnx', 'onnxscript', 'onnxruntime'):
        pytest.importorskip(package)
    options = dict(depth=1, img_size=80, num_classes=3, window_size=2, partition_grid=4, count_cells='outside')
    model = randomise(timm.create_model('eva_deit_tiny', **options)).eval()
    exporting.to_onnx(model, tmp_path / 'model.onnx', (3, 80, 80))
    assert not exporting.tensorrt_objections(tmp_path / 'model.onnx')
    images = torch.randn(3, 3, 80, 80)
    with torch.no_grad():
        expected = model(images)
    torch.testing.assert_close(exporting.load_exported(tmp_path / 'model.onnx')(images), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('name', ['eva_layer_14x14', 'eva_layer_28x28', 'eva_layer_56x56'])
def test_published_layers(golden, name):
    tensors, state, metadata = golden(name)
    B, H, W, C = tensors['input'].shape
    layer = EvaAttention(C, int(metadata['num_heads']), **PUBLISHED_EVA_KWARGS).eval()
    layer.load_state_dict(convert_published_eva(state))
    output = layer(tensors['input'].flatten(1, 2), (H, W)).view(B, H, W, C)
    assert (output - tensors['output']).norm() <= 1e-5 * tensors['output'].norm()


@pytest.mark.parametrize('attention', [EvaAttention, LocalAttention, SoftmaxAttention])
@pytest.mark.parametrize('rotate_half', [False, True])
@pytest.mark.parametrize('P', [0, 5])
def test_limit_of_timm_s_attention_with_prefix_tokens_norms_and_rotations(attention, rotate_half, P):
    options = dict(num_prefix_tokens=P, rotate_half=rotate_half, qk_norm=True, scale_norm=True, norm_layer=nn.LayerNorm)
    timm_s = randomise(AttentionRope(32, 2, **options)).double()
    sizes = {} if attention is SoftmaxAttention else dict(window_size=6, rel_pos_bias=False)
    cells = dict(partition_grid=3, count_cells='outside') if attention is EvaAttention else {}
    ours = attention(32, 2, **options, **sizes, **cells).double()
    missing = ours.load_state_dict(timm_s.state_dict(), strict=False)
    assert all(name.startswith('summary_') for name in missing.missing_keys) and not missing.unexpected_keys
    rope = RotaryEmbeddingCat(16, in_pixels=False, feat_shape=(5, 6)).get_embed().double()
    x = torch.randn(2, P + 30, 32, dtype=torch.float64)
    torch.testing.assert_close(ours(x, [5, 6], rope), timm_s(x, rope), rtol=1e-10, atol=1e-12)
    assert not torch.allclose(ours(x, [5, 6]), timm_s(x, rope))


def test_prefix_tokens_script_compile_and_export():
    layer = EvaAttention(32, 2, window_size=3, partition_grid=2, num_prefix_tokens=2, qk_norm=True).eval()
    x = torch.randn(2, 22, 32)
    expected = layer(x, [4, 5])
    torch.testing.assert_close(torch.jit.script(layer)(x, [4, 5]), expected)
    torch.testing.assert_close(torch.compile(layer, backend='aot_eager', fullgraph=True)(x, [4, 5]), expected)
    torch.testing.assert_close(torch.export.export(layer, (x, [4, 5])).module()(x, [4, 5]), expected)


def test_prefix_tokens_that_an_attention_does_not_take():
    message = (
        'PerformerAttention is made for a grid alone and takes no class or register tokens, got num_prefix_tokens 1'
    )
    with pytest.raises(ValueError, match=message):
        PerformerAttention(32, 2, num_prefix_tokens=1)
    with pytest.raises(ValueError, match='num_prefix_tokens 1: the ablations'):
        EvaAttention(32, 2, num_prefix_tokens=1, overlap=True)
    with pytest.raises(ValueError, match='ReformerAttention has no qk_norm and no scale_norm'):
        ReformerAttention(32, 2, qk_norm=True)
    with pytest.raises(ValueError, match='ReformerAttention has no rotary embeddings; leave rotate_half out'):
        ReformerAttention(32, 2, rotate_half=True)


@pytest.mark.parametrize('options', [{}, dict(qk_norm=True, num_prefix_tokens=2), dict(rotate_half=True)])
@pytest.mark.parametrize('turned', [False, True])
def test_attention_mass_is_that_of_the_loop(options, turned):
    P = options.get('num_prefix_tokens', 0)
    layer = randomise(EvaAttention(16, 2, window_size=2, partition_grid=2, **options)).double()
    rope = RotaryEmbeddingCat(8, in_pixels=False, feat_shape=[4, 5]).get_embed().double() if turned else None
    x = torch.randn(2, P + 20, 16, dtype=torch.float64)
    q, k, _ = layer.qkv(x).view(2, P + 20, 3, 2, 8).permute(2, 0, 3, 1, 4)
    q, k = layer.q_norm(q).detach().clone(), layer.k_norm(k).detach().clone()
    if turned:
        for tokens in (q, k):
            tokens[:, :, P:] = apply_rot_embed_cat(tokens[:, :, P:], rope, half=layer.rotate_half)
    table = layer.rel_pos.relative_position_bias_table
    expected = mass_loop(q, k, (4, 5), layer.summary_k(), table, 2, 2, num_prefix_tokens=P)
    for found, values in zip(layer.attention_mass(x, [4, 5], rope), expected, strict=True):
        torch.testing.assert_close(found, values)
