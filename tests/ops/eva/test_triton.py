"""EVA's Triton kernels against plain PyTorch in float64, and what PyTorch builds on an operator."""

import pytest
import torch
from ops.eva.cases import COUNTED_SHAPES, COUNTS, PREFIX_SHAPES, SHAPES, SMALL_CASES, check, check_small, make_case, run
from ops.kernels import DTYPES, gpu, graphs_of, interpreter, on_either, relative_rms
from torch.utils.checkpoint import checkpoint

from evavit.layers import EvaAttention
from evavit.ops import eva_backend
from evavit.ops.eva import EVA


class TestKernels:
    pytestmark = gpu

    @pytest.mark.parametrize('shape', SHAPES, ids=str)
    @pytest.mark.parametrize('dtype', DTYPES, ids=str)
    def test_shapes(self, shape, dtype, poison):
        check(make_case(*shape, dtype), shape, dtype)

    @pytest.mark.parametrize('count_cells', COUNTS)
    @pytest.mark.parametrize('shape', COUNTED_SHAPES, ids=str)
    @pytest.mark.parametrize('dtype', DTYPES, ids=str)
    def test_counted_cells(self, shape, dtype, count_cells, poison):
        check(make_case(*shape, dtype), shape, dtype, count_cells=count_cells)

    @pytest.mark.parametrize('count_cells', ['one', 'outside'])
    @pytest.mark.parametrize('shape', PREFIX_SHAPES, ids=str)
    @pytest.mark.parametrize('dtype', DTYPES, ids=str)
    def test_prefix_tokens(self, shape, dtype, count_cells, poison):
        *shape, P = shape
        case = make_case(*shape, dtype, d=64, P=P, bias=count_cells == 'one')  # a converted network has no bias
        check(case, shape, dtype, count_cells=count_cells)

    @pytest.mark.parametrize('layout', ['projection', 'views', 'contiguous', 'transposed'])
    @pytest.mark.parametrize('d', [32, 48, 128])
    def test_layouts_with_prefix_tokens(self, layout, d, poison):
        shape = ((14, 9), 7, 5)
        check(make_case(*shape, torch.bfloat16, d=d, P=5), shape, torch.bfloat16, layout, count_cells='outside')

    @pytest.mark.parametrize('dtype', DTYPES, ids=str)
    def test_a_window_over_the_grid_is_softmax_with_prefix_tokens(self, dtype):
        qkv, *rest = make_case((16, 13), 16, 7, dtype, d=64, bias=False, P=5)
        found = run((qkv, *rest), (16, 13), 16, 7, fused=True, count_cells='outside')
        expected = torch.nn.functional.scaled_dot_product_attention(*qkv.double().permute(2, 0, 3, 1, 4))
        assert relative_rms(found['out'], expected) < (1e-5 if dtype == torch.float32 else 5e-3)

    @pytest.mark.parametrize('dtype', DTYPES, ids=str)
    def test_a_window_over_the_grid_is_softmax(self, dtype):
        """Cells that count outside drop out, and everything that is theirs gets no gradient."""
        qkv, *rest = make_case((16, 13), 16, 7, dtype, d=64, bias=False)
        found = run((qkv, *rest), (16, 13), 16, 7, fused=True, count_cells='outside')
        expected = torch.nn.functional.scaled_dot_product_attention(*qkv.double().permute(2, 0, 3, 1, 4))
        assert relative_rms(found['out'], expected) < (1e-5 if dtype == torch.float32 else 5e-3)
        assert not any(value.count_nonzero() for name, value in found.items() if '.' in name)

    @pytest.mark.parametrize('d', [16, 48, 64, 80, 96, 128])
    @pytest.mark.parametrize('dtype', DTYPES, ids=str)
    def test_head_dims(self, d, dtype, poison):
        shape = ((13, 14), 7, 7)
        check(make_case(*shape, dtype, d=d), shape, dtype)

    @pytest.mark.parametrize('layout', ['projection', 'views', 'contiguous', 'transposed'])
    @pytest.mark.parametrize(('bias', 'noise'), [(True, False), (False, True)])
    def test_layouts(self, layout, bias, noise, poison):
        shape = ((14, 9), 7, 3)
        check(make_case(*shape, torch.bfloat16, bias=bias, noise=noise), shape, torch.bfloat16, layout)

    @pytest.mark.parametrize('dtype', DTYPES, ids=str)
    def test_large_inputs_stay_finite(self, dtype):
        shape = ((28, 28), 7, 7)
        for name, value in run(make_case(*shape, dtype, d=64, factor=30.0), *shape, fused=True).items():
            assert value.isfinite().all(), name

    def test_one_image_does_not_see_another(self):
        shape = ((14, 14), 7, 7)
        case = make_case(*shape, torch.float32)
        alone = [x[:1] if x is not None and i in (0, 3, 4) else x for i, x in enumerate(case)]
        both, one = run(case, *shape, fused=True), run(alone, *shape, fused=True)
        for name in ('out', 'q', 'k', 'v'):
            torch.testing.assert_close(both[name][:1], one[name], rtol=0, atol=1e-6)


class TestOperator:
    """What PyTorch builds on an operator."""

    pytestmark = gpu
    shape = ((14, 14), 7, 7)

    def layer(self, **kwargs):
        layer = EvaAttention(96, 3, **kwargs, device='cuda').train()
        layer.fused_attn = True
        return layer, torch.randn(2, 196, 96, device='cuda', requires_grad=True)

    def step(self, layer, x, call=None):
        torch.manual_seed(1)
        with torch.autocast('cuda', torch.bfloat16):
            out = (layer if call is None else call)(x, [14, 14])
        return [out, *torch.autograd.grad(out.float().square().sum(), [x, *layer.parameters()])]

    def test_layer_names_its_backend(self):
        layer, _ = self.layer()
        assert layer.backend == 'triton' and 'backend=triton (gluon: float32 is not' in layer.extra_repr()
        layer.fused_attn = False
        assert layer.backend == 'plain' and 'backend=plain (fused_attn is False)' in layer.extra_repr()

    @pytest.mark.parametrize('count_cells', ['one', 'outside'])
    @pytest.mark.parametrize('mode', ['default', 'reduce-overhead'])
    def test_compiles_into_one_graph(self, mode, count_cells):
        layer, x = self.layer(count_cells=count_cells)
        layer.noise_std = 0.0
        compiled = torch.compile(layer, fullgraph=True, mode=mode)
        for _ in range(3):
            expected, got = self.step(layer, x), [t.clone() for t in self.step(layer, x, compiled)]
        for a, b in zip(expected, got, strict=True):
            assert relative_rms(b, a.double()) < 1e-2

    def test_checkpointing_changes_nothing(self):
        layer, x = self.layer()
        again = self.step(layer, x, lambda *args: checkpoint(layer, *args, use_reentrant=False))
        assert all(torch.equal(a, b) for a, b in zip(self.step(layer, x), again, strict=True))

    @pytest.mark.parametrize('count_cells', ['one', 'outside'])
    def test_cuda_graph(self, count_cells):
        layer, x = self.layer(count_cells=count_cells)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                expected = layer.eval()(x, [14, 14])
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):  # fails on any wait for the device
            out = layer(x, [14, 14])
            grads = torch.autograd.grad(out.sum(), [x, *layer.parameters()])
        graph.replay()
        assert torch.equal(out, expected)
        eager = torch.autograd.grad(layer(x, [14, 14]).sum(), [x, *layer.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(grads, eager, strict=True))

    def test_export_takes_the_plain_path(self):
        layer, x = self.layer()
        exported = torch.export.export(layer.eval(), (x.detach(), [14, 14]))
        assert 'evavit' not in str(exported.graph)
        torch.testing.assert_close(exported.module()(x, [14, 14]), layer(x, [14, 14]), rtol=1e-3, atol=1e-3)

    def test_noise_is_the_same_on_both_paths(self):
        layer, x = self.layer()
        fused = self.step(layer, x)[0]
        layer.fused_attn = False
        assert relative_rms(fused, self.step(layer, x)[0].double()) < 1e-2


def test_plain_path_without_a_device():
    assert eva_backend(torch.device('cpu'), torch.float32, 64) == 'plain'
    assert 'backend=plain' in EvaAttention(32, 2).extra_repr()


@on_either
@pytest.mark.parametrize(('shape', 'options'), SMALL_CASES)
def test_small_cases(shape, options, device, poison, monkeypatch):
    check_small(shape, options, device, monkeypatch)


@on_either
@pytest.mark.parametrize(('grid', 'P', 'count_cells'), [((4, 8), 0, 'one'), ((4, 7), 4, 'outside')])
def test_opcheck(grid, P, count_cells, device):
    import evavit.ops.eva.triton.operator  # noqa: F401, registers the operators

    # It compares all bytes of what is kept for the backward: of 32 tokens, no parts of it have a gap between them.
    shape = grid, 3, 2
    qkv, summary, bias, noise, _ = make_case(*shape, torch.float32, d=16, B=1, h=2, P=P, device=device)
    leaves = [x.requires_grad_() for x in (qkv, *summary, bias)]
    packed = leaves[0].permute(2, 0, 3, 1, 4)
    rest = list(grid), *leaves[1:], noise, 3, 2, count_cells, P, 0.25, 1.0, 1e-5, True, False
    for tokens in (packed, None, None, 0), (leaves[0].flatten(2), None, None, 2), (*packed.unbind(0), 0):
        torch.library.opcheck(torch.ops.evavit.eva.default, (*tokens, *rest))


def test_compiled_graphs_hold_the_kernels_and_exported_ones_do_not():
    pytest.importorskip('triton')
    layer, x = EvaAttention(32, 2).train(), torch.randn(1, 12, 32)
    layer.fused_attn = True
    with EVA.forced('triton'):
        assert 'evavit.eva' in graphs_of(layer, x, [3, 4])[0]
        assert 'evavit' not in str(torch.export.export(layer, (x, [3, 4])).graph)


class TestDerivatives:
    pytestmark = interpreter

    def test_other_derivatives_are_right_or_refused(self):
        """torch.func and forward mode take the plain path; a second derivative through the kernels says what to do."""
        layer = EvaAttention(32, 2, window_size=3, partition_grid=2).eval()
        layer.fused_attn = True
        x, tangent = torch.randn(1, 20, 32, requires_grad=True), torch.randn(1, 20, 32)

        def loss(x):
            return layer(x, [5, 4]).square().sum()

        with EVA.forced('triton'):
            (expected,) = torch.autograd.grad(loss(x), x)
            with pytest.raises(RuntimeError, match='evavit::eva has no second derivative'):
                torch.autograd.grad(loss(x), x, create_graph=True)
            point = x.detach()
            torch.testing.assert_close(torch.func.grad(loss)(point), expected, rtol=1e-4, atol=1e-5)
            slope = (expected * tangent).sum()
            torch.testing.assert_close(torch.func.jvp(loss, (point,), (tangent,))[1], slope, rtol=1e-4, atol=1e-5)
            forward = torch.autograd.forward_ad
            with forward.dual_level():
                got = forward.unpack_dual(loss(forward.make_dual(point, tangent))).tangent
            torch.testing.assert_close(got, slope, rtol=1e-4, atol=1e-5)
