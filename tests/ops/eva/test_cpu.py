"""EVA on a CPU without gradients: against the loop, and when it is taken."""

import pytest
import torch
from ops.eva.references import eva_loop
from ops.eva.test_attention import arguments, cast, make_inputs, relative_error
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from evavit.layers import EvaAttention
from evavit.ops import eva_attention_packed
from evavit.ops.eva import cpu as eva_cpu


@pytest.fixture
def calls(monkeypatch):
    """The calls that took it."""
    found, attend = [], eva_cpu._attend
    monkeypatch.setattr(eva_cpu, '_attend', lambda *args: found.append(args) or attend(*args))
    return found


def run(leaves, noise, feat_size, window_size, partition_grid, **options):
    summaries, table = arguments(leaves)[3], leaves.get('table')
    args = feat_size, *summaries, table, window_size, partition_grid
    return eva_attention_packed(leaves['qkv'].permute(2, 0, 3, 1, 4), *args, noise=noise, **options)


def loop(leaves, noise, feat_size, window_size, partition_grid, **options):
    q, k, v, summaries = arguments(leaves)
    args = feat_size, *summaries, leaves.get('table'), window_size, partition_grid
    return eva_loop(q, k, v, *args, noise=noise, **options)


@pytest.mark.parametrize('noise', [True, False])
@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('partition_grid', [1, 3, 5, 7])
@pytest.mark.parametrize(
    ('feat_size', 'window_size'),
    [((14, 14), 7), ((28, 28), 7), ((12, 20), 4), ((13, 9), 1), ((3, 14), 7), ((21, 5), 7), ((5, 3), 7), ((1, 1), 2)],
    ids=str,
)
def test_matches_the_loop(calls, feat_size, window_size, partition_grid, bias, noise):
    sizes = feat_size, window_size, partition_grid
    with torch.no_grad():
        leaves, epsilon = make_inputs(2, 3, 8, *sizes, bias=bias, noise=noise)
        expected = loop(leaves, epsilon, *sizes, proposal_scale=0.7)
        for dtype, bound in ((torch.float64, 1e-14), (torch.float32, 1e-6)):
            copies = cast(leaves, dtype)
            output = run(copies, epsilon, *sizes, proposal_scale=0.7, fused=True)
            assert output.dtype == dtype and relative_error(output, expected) <= bound
            assert output.transpose(1, 2).is_contiguous()  # merging the heads is a view
    assert len(calls) == 2


def test_its_products_are_pytorch_s_fused_ones(calls):
    leaves, noise = make_inputs(2, 3, 16, (14, 14), 7, 7, dtype=torch.float32)
    with torch.no_grad(), sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # an error where no such kernel takes the call
        run(leaves, noise, (14, 14), 7, 7, fused=True)
    assert len(calls) == 1


def test_huge_logits_stay_finite(calls):
    leaves, noise = make_inputs(1, 2, 16, (14, 14), 7, 7, dtype=torch.float32)
    with torch.no_grad():
        leaves['qkv'][:, :, :2] *= 100
        output = run(leaves, noise, (14, 14), 7, 7, fused=True)
        wide = cast(leaves, torch.float64)
        assert relative_error(output, loop(wide, noise.double(), (14, 14), 7, 7)) < 1e-4
    assert len(calls) == 1


def test_an_empty_batch(calls):
    with torch.no_grad():
        leaves, noise = make_inputs(0, 2, 8, (14, 14), 7, 7)
        assert run(leaves, noise, (14, 14), 7, 7, fused=True).shape == (0, 2, 196, 8)


@pytest.mark.parametrize(
    ('feat_size', 'window_size', 'partition_grid', 'P', 'options'),
    [
        ((14, 14), 7, 7, 0, dict(fused=False)),
        ((13, 14), 7, 7, 0, {}),  # windows that the edge cuts
        ((14, 14), 7, 7, 0, dict(count_cells='outside')),
        ((14, 14), 7, 7, 2, {}),
        ((14, 14), 7, 7, 0, dict(dropout_p=0.5)),
        ((14, 14), 0, 7, 0, {}),
        ((14, 14), 7, 0, 0, {}),
    ],
    ids=str,
)
def test_what_it_leaves_to_the_plain_path(calls, feat_size, window_size, partition_grid, P, options):
    leaves, noise = make_inputs(1, 2, 8, feat_size, window_size, partition_grid, P=P)
    with torch.no_grad():
        run(leaves, noise, feat_size, window_size, partition_grid, num_prefix_tokens=P, **dict(fused=True) | options)
    assert not calls


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_is_left_to_the_plain_path(calls, dtype):
    leaves, noise = make_inputs(1, 2, 8, (14, 14), 7, 7, dtype=torch.float32)
    with torch.no_grad():
        run(cast(leaves, dtype), noise, (14, 14), 7, 7, fused=True)
    assert not calls


@pytest.mark.parametrize('name', ['qkv', 'summary_q.weight', 'summary_k.norm_bias', 'table', 'noise'])
def test_a_gradient_is_left_to_the_plain_path(calls, name):
    leaves, noise = make_inputs(1, 2, 8, (14, 14), 7, 7)
    tensors = leaves | {'noise': noise}
    for key, value in tensors.items():
        value.requires_grad_(key == name)
    output = run(leaves, noise, (14, 14), 7, 7, fused=True)
    (grad,) = torch.autograd.grad(output.square().sum(), tensors[name])
    assert grad.norm() > 0 and not calls
    tensors[name].requires_grad_(False)
    torch.testing.assert_close(run(leaves, noise, (14, 14), 7, 7, fused=True), output)
    assert len(calls) == 1


@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')
def test_graphs_and_transforms_take_the_plain_path(calls):
    layer = EvaAttention(16, 2).eval().requires_grad_(False)
    x, tangent = torch.randn(2, 2, 196, 16)
    expected = layer(x, [14, 14])
    assert len(calls) == 1
    torch.testing.assert_close(torch.jit.trace(lambda x: layer(x, [14, 14]), x, check_trace=False)(x), expected)
    torch.testing.assert_close(torch.export.export(layer, (x, [14, 14])).module()(x, [14, 14]), expected)
    torch.testing.assert_close(torch.func.vmap(lambda x: layer(x[None], [14, 14])[0])(x), expected)
    with forward_ad.dual_level():
        dual = layer(forward_ad.make_dual(x, tangent), [14, 14])
        assert forward_ad.unpack_dual(dual).tangent.norm() > 0
    assert len(calls) == 1


def test_under_autocast_the_tokens_decide(calls):
    leaves, noise = make_inputs(1, 2, 8, (14, 14), 7, 7, dtype=torch.float32)
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        output = run(leaves, noise, (14, 14), 7, 7, fused=True)
    assert output.dtype == torch.float32 and len(calls) == 1
    wide = cast(leaves, torch.float64)
    assert relative_error(output, loop(wide, noise.double(), (14, 14), 7, 7)) < 1e-6
