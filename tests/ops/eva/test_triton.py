"""The fused kernels against plain PyTorch in float64, which test_eva.py holds against the loop."""

import pytest
import torch
from kernel_checks import DTYPES, agrees_in_the_interpreter, gpu, relative_rms
from torch.utils.checkpoint import checkpoint

from evavit.layers import EvaAttention
from evavit.ops import eva_attention, eva_attention_packed, eva_backend, eva_num_cells
from evavit.ops.eva import EVA

NAMES = [
    'out',
    'q',
    'k',
    'v',
    *(f'{s}.{p}' for s in ('summary_q', 'summary_k') for p in ('weight', 'bias', 'norm_weight', 'norm_bias')),
    'rel_pos_bias',
]
# Odd, short, non-square and padded grids; windows and cells of every kind.
SHAPES = [
    # feat_size, window_size, partition_grid
    ((14, 14), 7, 7),
    ((28, 28), 7, 7),
    ((13, 9), 7, 7),
    ((29, 17), 4, 3),
    ((16, 31), 14, 14),
    ((5, 5), 7, 1),
    ((7, 24), 0, 3),
    ((13, 9), 0, 7),
    ((16, 31), 7, 0),
    ((14, 14), 14, 0),
    ((5, 3), 1, 1),
    ((37, 33), 16, 16),
]


def make_case(
    feat_size, window_size, partition_grid, dtype, *, B=2, h=3, d=32, bias=True, noise=True, factor=1.0, device='cuda'
):
    """qkv `(B, N, 3, h, d)`, the eight parameters, the table of biases, the noise and a gradient of the output."""
    N, cells = feat_size[0] * feat_size[1], eva_num_cells(list(feat_size), partition_grid)
    qkv = (factor * torch.randn(B, N, 3, h, d)).to(dtype)
    summary = [
        t
        for _ in range(2 if partition_grid else 0)
        for t in (torch.randn(d, d) * d**-0.5, *(x + 0.1 * torch.randn(d) for x in (0, 1, 0)))
    ]
    rel_pos_bias = torch.randn((2 * window_size - 1) ** 2, h) if bias and window_size else None
    epsilon = torch.randn(B, h, cells, d) if noise and cells else None
    grad = torch.randn(B, N, h, d).to(dtype).transpose(1, 2)

    def move(x):
        return None if x is None else x.to(device)

    return move(qkv), [move(x) for x in summary], move(rel_pos_bias), move(epsilon), move(grad)


def run(case, feat_size, window_size, partition_grid, *, fused, dtype=None, layout='packed', **kwargs):
    """The output and the gradients of qkv, the parameters and the bias, in the order of NAMES."""
    qkv, summary, rel_pos_bias, noise, grad = case

    def leaf(x):
        return None if x is None else x.detach().to(dtype or x.dtype).requires_grad_()

    qkv, summary, rel_pos_bias = leaf(qkv), [leaf(x) for x in summary], leaf(rel_pos_bias)
    options = dict(
        summary_q=tuple(summary[:4]) or None,
        summary_k=tuple(summary[4:]) or None,
        rel_pos_bias=rel_pos_bias,
        window_size=window_size,
        partition_grid=partition_grid,
        noise=noise if noise is None or dtype is None else noise.to(dtype),
        fused=fused,
        **kwargs,
    )
    views = qkv.permute(2, 0, 3, 1, 4)
    if layout == 'packed':
        out = eva_attention_packed(views, list(feat_size), **options)
    else:
        change = {
            'views': lambda x: x,
            'contiguous': torch.Tensor.contiguous,
            'transposed': lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
        }[layout]
        out = eva_attention(*(change(x) for x in views.unbind(0)), list(feat_size), **options)
    leaves = [qkv, *summary, *([rel_pos_bias] if rel_pos_bias is not None else [])]
    grads = torch.autograd.grad(out, leaves, grad.to(out.dtype))
    names = [name for name in NAMES if partition_grid or '.' not in name]
    return dict(zip(names, [out.detach(), *grads[0].unbind(2), *grads[1:]], strict=False))


def check(case, shape, dtype, layout='packed'):
    reference = run(case, *shape, fused=False, dtype=torch.float64)
    if dtype == torch.float32:
        plain = run(case, *shape, fused=False)
    else:
        with torch.autocast('cuda', dtype):
            plain = run(case, *shape, fused=False)
    fused = run(case, *shape, fused=True, layout=layout)
    again = run(case, *shape, fused=True, layout=layout)
    for name, value in fused.items():
        assert torch.equal(value, again[name]), f'{name} differs between two runs'
        # A gradient that is zero but for rounding, as of a constant added to all logits, is measured against its terms.
        if reference[name].norm() < 1e-9 * reference['v'].norm():
            continue
        error, allowed = relative_rms(value, reference[name]), 1e-5 if dtype == torch.float32 else 5e-3
        of_plain = relative_rms(plain[name], reference[name])
        # Sums that cancel, as d LayerNorm bias without a window, keep the rounding of half-precision operands: there
        # the plain path is beyond the bound itself.
        assert error <= max(allowed, 1.25 * of_plain), f'{name}: {error:.1e}, plain {of_plain:.1e}'
        assert error <= max(2 * of_plain, allowed / 2), f'{name}: {error:.1e} is over twice plain {of_plain:.1e}'


class TestKernels:
    pytestmark = gpu

    @pytest.mark.parametrize('shape', SHAPES, ids=str)
    @pytest.mark.parametrize('dtype', DTYPES, ids=str)
    def test_shapes(self, shape, dtype, poison):
        check(make_case(*shape, dtype), shape, dtype)

    @pytest.mark.parametrize('d', [16, 48, 64, 80, 96, 128])
    @pytest.mark.parametrize('dtype', DTYPES, ids=str)
    def test_head_dims(self, d, dtype, poison):
        shape = ((13, 14), 7, 7)
        check(make_case(*shape, dtype, d=d), shape, dtype)

    @pytest.mark.parametrize('layout', ['views', 'contiguous', 'transposed'])
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

    def layer(self):
        layer = EvaAttention(96, 3, device='cuda').train()
        layer.fused_attn = True
        return layer, torch.randn(2, 196, 96, device='cuda', requires_grad=True)

    def step(self, layer, x, call=None):
        torch.manual_seed(1)
        with torch.autocast('cuda', torch.bfloat16):
            out = (layer if call is None else call)(x, [14, 14])
        return [out, *torch.autograd.grad(out.float().square().sum(), [x, *layer.parameters()])]

    def test_opcheck(self):
        qkv, summary, bias, noise, _ = make_case(*self.shape, torch.float32, d=16)
        leaves = [x.requires_grad_() for x in (qkv, *summary, bias)]
        packed = leaves[0].permute(2, 0, 3, 1, 4)
        rest = ([14, 14], *leaves[1:9], bias, noise, 7, 7, 0.25, 1.0, 1e-5, True, False)
        torch.library.opcheck(torch.ops.evavit.eva.default, (packed, None, None, *rest))
        torch.library.opcheck(torch.ops.evavit.eva.default, (*packed.unbind(0), *rest))

    def test_layer_names_its_backend(self):
        layer, _ = self.layer()
        assert layer.backend == 'triton' and 'backend=triton (gluon: float32 is not' in layer.extra_repr()
        layer.fused_attn = False
        assert layer.backend == 'plain' and 'backend=plain (fused_attn is False)' in layer.extra_repr()

    @pytest.mark.parametrize('mode', ['default', 'reduce-overhead'])
    def test_compiles_into_one_graph(self, mode):
        layer, x = self.layer()
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

    def test_cuda_graph(self):
        layer, x = self.layer()
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


INTERPRETED = """
import sys, torch
sys.path[:0] = [{tests!r}]
from evavit.ops.eva import EVA
from kernel_checks import relative_rms
from ops.eva.test_triton import make_case, run
torch.manual_seed(0)
for shape in [((9, 7), 4, 3), ((5, 6), 0, 3), ((6, 5), 5, 0), ((3, 3), 7, 2), ((10, 4), 9, 1)]:
    case = make_case(*shape, torch.float32, B=1, h=2, d=16, device='cpu')
    reference = run(case, *shape, fused=False, dtype=torch.float64)
    with EVA.forced('triton'):
        fused = run(case, *shape, fused=True)
    for name, value in fused.items():
        error = relative_rms(value, reference[name])
        assert error < 1e-5, (shape, name, error)
print('agree')
"""


def test_kernels_in_the_interpreter():
    """Triton's interpreter runs the kernels' arithmetic without a GPU; it is chosen per process, so this starts one."""
    pytest.importorskip('triton')
    agrees_in_the_interpreter(INTERPRETED)


def test_compiled_graphs_hold_the_kernels_and_exported_ones_do_not():
    pytest.importorskip('triton')
    layer, x = EvaAttention(32, 2).train(), torch.randn(1, 12, 32)
    layer.fused_attn = True
    graphs = []

    def backend(graph, _):
        graphs.append(str(graph.graph))
        return lambda *args: [x]  # a CPU cannot run them

    torch.compiler.reset()
    with EVA.forced('triton'):
        torch.compile(layer, backend=backend, fullgraph=True)(x, [3, 4])
        assert 'evavit.eva' in graphs[0]
        assert 'evavit' not in str(torch.export.export(layer, (x, [3, 4])).graph)


DERIVATIVES = """
import sys, torch
from evavit.layers import EvaAttention
from evavit.ops.eva import EVA
kernels = EVA.forced('triton')
kernels.__enter__()
torch.manual_seed(0)
layer = EvaAttention(32, 2, window_size=3, partition_grid=2).eval()
layer.fused_attn = True
x, tangent = torch.randn(1, 20, 32, requires_grad=True), torch.randn(1, 20, 32)
loss = lambda x: layer(x, [5, 4]).square().sum()
expected, = torch.autograd.grad(loss(x), x)
try:
    torch.autograd.grad(loss(x), x, create_graph=True)
except RuntimeError as error:
    assert 'evavit::eva has no second derivative' in str(error), error
else:
    raise AssertionError('a second derivative would leave out the kernels')
point = x.detach()
torch.testing.assert_close(torch.func.grad(loss)(point), expected, rtol=1e-4, atol=1e-5)
slope = (expected * tangent).sum()
torch.testing.assert_close(torch.func.jvp(loss, (point,), (tangent,))[1], slope, rtol=1e-4, atol=1e-5)
forward = torch.autograd.forward_ad
with forward.dual_level():
    got = forward.unpack_dual(loss(forward.make_dual(point, tangent))).tangent
torch.testing.assert_close(got, slope, rtol=1e-4, atol=1e-5)
print('agree')
"""


def test_other_derivatives_are_right_or_refused():
    """torch.func and forward mode take the plain path; a second derivative through the kernels says what to do."""
    pytest.importorskip('triton')
    agrees_in_the_interpreter(DERIVATIVES)
