"""EVA's ablations as arguments of the layer and of the models."""

import math

import pytest
import timm
import torch
from helpers import relative_errors
from ops.eva.references import eva_variant_loop

import evavit
from evavit.layers import EvaAttention
from evavit.ops import eva_backend, eva_num_cells
from evavit.ops.backends import use_backend

VARIANTS = [
    dict(partition='complement'),
    dict(summary='linear'),
    dict(summary='identity'),
    dict(num_samples=4),
    dict(proposal='q'),
    dict(proposal='zero'),
    dict(proposal='learned'),
    dict(overlap=True),
    dict(
        overlap=True,
        rel_pos_bias=False,
        proposal_scale=0.5,
        noise_std=0.5,
        num_samples=2,
        proposal='learned',
        partition='complement',
        summary='linear',
    ),
    dict(overlap=True, partition_grid=0),
    dict(window_size=0, num_samples=3),
    dict(overlap=True, count_cells='outside'),
]
IDS = ['-'.join(f'{key}={value}' for key, value in variant.items()) for variant in VARIANTS]


def make_layer(**kwargs):
    layer = EvaAttention(16, 2, **dict(dict(window_size=3, partition_grid=3), **kwargs), dtype=torch.float64)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.5)
    return layer


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('kwargs', VARIANTS, ids=IDS)
def test_output_and_gradients_match_the_loop(kwargs, training):
    layer, feat_size = make_layer(**kwargs).train(training), (5, 7)
    x = torch.randn(2, 35, 16, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(1)
    output = layer(x, feat_size)

    torch.manual_seed(1)  # the layer's noise is the first draw of the default generator
    noise = None
    if layer.partition_grid:
        cells = eva_num_cells(feat_size, layer.partition_grid)
        noise = layer.noise_std * torch.randn(2, 2, cells, layer.num_samples, 8, dtype=torch.float64)
        if not training:
            noise = (
                0 * noise
                if layer.num_samples == 1
                else layer.noise_std * layer.eval_noise.double().expand(2, 2, cells, -1, -1)
            )
    q, k, v = layer.qkv(x).view(2, 35, 3, 2, 8).permute(2, 0, 3, 1, 4)
    y = eva_variant_loop(
        q,
        k,
        v,
        feat_size,
        *(s() if s is not None else None for s in (layer.summary_q, layer.summary_k)),
        layer.rel_pos.relative_position_bias_table if layer.rel_pos is not None else None,
        layer.window_size,
        layer.partition_grid,
        layer.partition,
        layer.proposal,
        layer.proposal_mean,
        layer.overlap,
        layer.proposal_scale,
        noise,
        layer.noise_std,
        layer.count_cells,
    )
    expected = layer.proj(y.transpose(1, 2).reshape(2, 35, 16))
    leaves = dict(layer.named_parameters(), x=x)
    found = relative_errors(output, leaves, expected, leaves)
    assert max(found.values()) <= 1e-10, found


@pytest.mark.parametrize('kwargs', VARIANTS, ids=IDS)
def test_scripts_and_says_what_it_runs(kwargs):
    layer = make_layer(**kwargs).eval()
    assert layer.backend == 'plain'
    assert repr(layer).split('\n')[1].endswith('backend=plain (triton: the ablations run in plain PyTorch)')
    assert ', '.join(f'{key}={value}' for key, value in kwargs.items() if key == 'partition') in repr(layer)
    x = torch.randn(1, 20, 16, dtype=torch.float64)
    torch.testing.assert_close(torch.jit.script(layer)(x, [4, 5]), layer(x, (4, 5)))


@pytest.mark.parametrize('kwargs', [VARIANTS[0], VARIANTS[8]], ids=['complement', 'everything'])
def test_compiles_in_one_graph(kwargs):
    layer, x = make_layer(**kwargs).eval(), torch.randn(1, 20, 16, dtype=torch.float64)
    compiled = torch.compile(layer, backend='eager', fullgraph=True)
    torch.testing.assert_close(compiled(x, (4, 5)), layer(x, (4, 5)))


def test_backend_of_a_variant_is_plain_where_the_default_is_fused(monkeypatch):
    monkeypatch.setattr('evavit.ops.eva.triton.has_kernels', lambda module: True)
    with use_backend(None):  # forgets what was chosen before
        assert eva_backend(torch.device('cuda'), torch.float32, 64) == 'triton'
        assert eva_backend(torch.device('cuda'), torch.float32, 64, variant=True) == 'plain'


def names(**kwargs):
    return {name for name in EvaAttention(48, 3, **kwargs).state_dict() if name.split('.')[0] not in ('qkv', 'proj')}


def test_parameters_are_those_that_are_used():
    proj = {f'summary_{x}.proj.{name}' for x in 'qk' for name in ('weight', 'bias')}
    norm = {f'summary_{x}.norm.{name}' for x in 'qk' for name in ('weight', 'bias')}
    table = {'rel_pos.relative_position_bias_table'}
    of_k = {name for name in proj | norm if name.startswith('summary_k')}
    for kwargs in ({}, dict(partition='complement'), dict(num_samples=7), dict(overlap=True), dict(proposal='q')):
        assert names(**kwargs) == table | proj | norm
    assert names(summary='linear') == table | proj
    assert names(summary='identity') == table
    assert names(proposal='zero') == table | of_k
    assert names(proposal='learned') == table | of_k | {'proposal_mean'}
    assert EvaAttention(48, 3, overlap=True).rel_pos.relative_position_bias_table.shape == (19**2, 3)


def test_evaluation_of_samples_is_deterministic_and_follows_no_seed():
    layer, x = make_layer(num_samples=5).eval(), torch.randn(1, 20, 16, dtype=torch.float64)
    first = layer(x, (4, 5))
    torch.manual_seed(7)
    assert torch.equal(first, layer(x, (4, 5)))
    assert torch.equal(layer.eval_noise, make_layer(num_samples=5).eval_noise)
    torch.testing.assert_close(layer.eval_noise.sum(0), torch.zeros(8), atol=1e-5, rtol=0)


def test_device_and_dtype_reach_everything():
    kwargs = dict(num_samples=3, proposal='learned', overlap=True)
    layer = EvaAttention(48, 3, **kwargs, device='meta', dtype=torch.float64)
    assert all(tensor.is_meta for tensor in [*layer.parameters(), *layer.buffers()])
    assert all(parameter.dtype == torch.float64 for parameter in layer.parameters())
    layer = layer.to_empty(device='cpu')
    for module in layer.modules():
        if hasattr(module, 'reset_parameters'):
            module.reset_parameters()
    reference = EvaAttention(48, 3, **kwargs)
    assert torch.equal(layer.eval_noise, reference.eval_noise)


@pytest.mark.parametrize(
    'kwargs, message',
    [
        (dict(partition='rest'), "partition must be one of all, complement, got 'rest'"),
        (dict(summary='mlp'), "summary must be one of linear_ln, linear, identity, got 'mlp'"),
        (dict(proposal='k'), "proposal must be one of qk, q, zero, learned, got 'k'"),
        (dict(proposal='zero', partition_grid=0), "proposal 'zero' is about cells, and partition_grid 0 has none"),
        (dict(num_samples=0), 'num_samples must be at least 1, got 0'),
        (dict(num_samples=2.0), 'num_samples must be a whole number, got 2.0'),
        (dict(num_samples=2, noise_std=0.0), 'num_samples 2 needs cells and a noise_std above 0'),
        (dict(num_samples=2, partition_grid=0), 'num_samples 2 needs cells'),
        (dict(overlap=True, window_size=0), 'overlap needs windows; got window_size 0'),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        EvaAttention(48, 3, **kwargs)


@pytest.mark.parametrize(
    'name, kwargs',
    [
        ('eva_deit_tiny', dict(depth=1, img_size=80, window_size=3, partition_grid=2)),
        ('eva_pvt_v2_b3', dict(depths=(1, 1, 1, 1), embed_dims=(16, 16, 16, 16), num_heads=(2, 2, 2, 2))),
    ],
)
def test_models_take_every_ablation_and_train(name, kwargs):
    ablations = dict(partition='complement', summary='linear', num_samples=2, proposal='learned', overlap=True)
    model = timm.create_model(name, num_classes=3, **kwargs, **ablations).train()
    model(torch.randn(2, 3, 80, 80)).sum().backward()
    missing = [key for key, parameter in model.named_parameters() if parameter.grad is None]
    assert not missing


def test_tables_of_overlapping_windows_are_resized_from_a_checkpoint():
    small, large = (
        timm.create_model('eva_deit_tiny', depth=1, num_classes=0, overlap=True, window_size=w) for w in (5, 7)
    )
    filtered = evavit.models.eva_deit.checkpoint_filter_fn(small.state_dict(), large)
    large.load_state_dict(filtered)
    old = small.blocks[0].attn.rel_pos.relative_position_bias_table.view(13, 13, 3)
    new = large.blocks[0].attn.rel_pos.relative_position_bias_table.view(19, 19, 3)
    torch.testing.assert_close(new[9, 9], old[6, 6], rtol=0.3, atol=0.02)  # the centre stays the centre
    assert math.isclose(new.mean().item(), old.mean().item(), abs_tol=0.01)
