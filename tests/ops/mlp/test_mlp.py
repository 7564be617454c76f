"""The MLP's fused kernels against PyTorch in float64."""

import pytest
import timm
import torch
import torch.nn.functional as F
from ops.kernels import gpu, graphs_of, on_either, relative_rms
from timm.layers import Mlp, SwiGLU
from torch import nn
from torch.utils.checkpoint import checkpoint

from evavit.layers import FusedMlp
from evavit.ops import mlp_gelu, mlp_gelu_backend
from evavit.ops.mlp import MLP

NAMES = ['out', 'x', 'weight1', 'bias1', 'weight2', 'bias2']
HALVES = [torch.bfloat16, torch.float16]
# Rows, and features in, hidden and out: odd numbers of rows, widths of few and of many tiles.
SHAPES = [
    (1, 16, 64, 16),
    (77, 48, 192, 48),
    (77, 48, 80, 32),
    (1000, 192, 768, 192),
    (1000, 384, 1536, 384),
    (129, 80, 208, 192),
    (4096, 192, 768, 192),
]


def make_case(M, K, N, C, dtype, *, factor=1.0, device='cuda'):
    """x, W₁, b₁, W₂, b₂ and a gradient of the output."""
    x, grad = factor * torch.randn(M, K), torch.randn(M, C)
    weights = torch.randn(N, K) * K**-0.5, torch.randn(N), torch.randn(C, N) * N**-0.5, torch.randn(C)
    return [t.to(device, dtype) for t in (x, *weights, grad)]


def run(case, *, fused, dtype=None):
    """The output and all gradients, by NAMES."""
    *leaves, grad = [t.detach().to(dtype or t.dtype).requires_grad_() for t in case]
    out = mlp_gelu(*leaves, fused=fused)
    return dict(zip(NAMES, [out.detach(), *torch.autograd.grad(out, leaves, grad.detach())], strict=True))


def check(case):
    reference, plain = run(case, fused=False, dtype=torch.float64), run(case, fused=False)
    for name, value in run(case, fused=True).items():
        assert value.dtype == case[0].dtype
        error, of_plain = relative_rms(value, reference[name]), relative_rms(plain[name], reference[name])
        # A bias2's gradient of one row is copied, without error.
        assert error <= min(5e-3, 2 * of_plain + 1e-7), f'{name}: {error:.1e}, plain {of_plain:.1e}'


class TestKernels:
    pytestmark = gpu

    @pytest.mark.parametrize('shape', SHAPES, ids=str)
    @pytest.mark.parametrize('dtype', HALVES, ids=str)
    def test_against_float64(self, shape, dtype, poison):
        check(make_case(*shape, dtype))

    @pytest.mark.parametrize('dtype', HALVES, ids=str)
    def test_large_inputs_stay_finite(self, dtype, poison):
        case = make_case(200, 192, 768, 192, dtype, factor=30.0)
        check(case)
        for name, value in run(case, fused=True).items():
            assert value.isfinite().all(), name

    @pytest.mark.parametrize('dtype', HALVES, ids=str)
    def test_one_kernel_without_gradients(self, dtype, poison):
        """Of the size at which it is taken, and of one where the last tile has a row."""
        from evavit.ops.mlp import triton as kernels

        many = 64 * kernels.WHOLE_PROGRAMS
        case = make_case(many + 1, 192, 768, 192, dtype)
        for M in (many, many + 1):
            x, *weights, _ = (case[0][:M], *case[1:])
            before = kernels._forward_launches.cache_info()
            with torch.no_grad():
                fused, again, plain = (mlp_gelu(x, *weights, fused=fused) for fused in (True, True, False))
                reference = mlp_gelu(*[t.double() for t in (x, *weights)])
            assert kernels._forward_launches.cache_info() == before
            assert torch.equal(fused, again)
            assert relative_rms(fused, reference) <= 2 * relative_rms(plain, reference)

    def test_two_runs_agree_to_the_bit(self):
        case = make_case(5000, 192, 768, 192, torch.bfloat16)
        one, other = run(case, fused=True), run(case, fused=True)
        assert all(torch.equal(value, other[name]) for name, value in one.items())

    @pytest.mark.parametrize(
        'view',
        [
            lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
            lambda x: x.repeat(1, 2)[:, : x.shape[1]],
            lambda x: x[:, None].unbind(1)[0],
        ],
    )
    def test_strides(self, view):
        x, *rest = make_case(77, 48, 192, 48, torch.bfloat16)
        weights, grad = rest[:-1], rest[-1]
        expected = run([x, *weights, grad], fused=True)
        leaf = x.clone().requires_grad_()
        out = mlp_gelu(view(leaf), *weights, fused=True)
        assert torch.equal(out, expected['out'])
        assert torch.equal(torch.autograd.grad(out, leaf, view(grad))[0], expected['x'])

    def test_keeps_no_more_than_the_plain_path(self):
        case = make_case(1000, 192, 768, 192, torch.bfloat16)

        def saved(fused):
            kept = {}

            def pack(t):
                kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
                return t

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                out = mlp_gelu(*[t.requires_grad_() for t in case[:-1]], fused=fused)
            return sum(kept.values()), out

        assert saved(True)[0] <= saved(False)[0]


class TestOperator:
    """What PyTorch builds on an operator, and the layer."""

    pytestmark = gpu

    def layer(self):
        return FusedMlp(96, 384, device='cuda').train(), torch.randn(2, 77, 96, device='cuda', requires_grad=True)

    def step(self, layer, x, call=None, dtype=torch.bfloat16):
        with torch.autocast('cuda', dtype):
            out = (layer if call is None else call)(x)
        return [out, *torch.autograd.grad(out.float().square().sum(), [x, *layer.parameters()])]

    def test_opcheck(self):
        leaves = [t.requires_grad_() for t in make_case(33, 48, 80, 32, torch.float16)[:-1]]
        torch.library.opcheck(torch.ops.evavit.mlp.default, (*leaves, True))

    @pytest.mark.parametrize('dtype', HALVES, ids=str)
    def test_autocast_agrees_with_timm(self, dtype, poison):
        layer, x = self.layer()
        plain = Mlp(96, 384, device='cuda')
        plain.load_state_dict(layer.state_dict())
        exact = Mlp(96, 384, device='cuda').double()
        exact.load_state_dict(layer.state_dict())
        fused, timms = self.step(layer, x, dtype=dtype), self.step(plain, x, dtype=dtype)
        out = exact(x.double())
        reference = [out, *torch.autograd.grad(out.square().sum(), [x, *exact.parameters()])]
        for a, b, c in zip(fused, timms, reference, strict=True):
            assert a.dtype == b.dtype
            assert relative_rms(a, c.double()) <= max(2 * relative_rms(b, c.double()), 2.5e-3)

    def test_layer_names_its_backend(self):
        layer, _ = self.layer()
        assert 'backend=triton under autocast' in repr(layer)
        assert 'backend=triton\n' in repr(layer.bfloat16())
        assert 'backend=plain' in repr(layer.double())

    @pytest.mark.parametrize('mode', ['default', 'reduce-overhead'])
    def test_compiles_into_one_graph(self, mode):
        layer, x = self.layer()
        torch.compiler.reset()
        compiled = torch.compile(layer, fullgraph=True, mode=mode)
        for _ in range(3):
            expected, got = self.step(layer, x), [t.clone() for t in self.step(layer, x, compiled)]
        for a, b in zip(expected, got, strict=True):
            assert relative_rms(b, a.double()) < 1e-2

    def test_checkpointing_changes_nothing(self):
        layer, x = self.layer()
        again = self.step(layer, x, lambda y: checkpoint(layer, y, use_reentrant=False))
        assert all(torch.equal(a, b) for a, b in zip(self.step(layer, x), again, strict=True))

    def test_frozen_weights(self):
        layer, x = self.layer()
        expected = self.step(layer, x)
        for p in layer.parameters():
            p.requires_grad_(False)
        with torch.autocast('cuda', torch.bfloat16):
            (dx,) = torch.autograd.grad(layer(x).float().square().sum(), x)
        assert torch.equal(dx, expected[1])

    def test_export_takes_the_plain_path(self):
        layer, x = self.layer()
        exported = torch.export.export(layer.half().eval(), (x.detach().half(),))
        assert 'evavit' not in str(exported.graph)

    @pytest.mark.parametrize('dtype', HALVES, ids=str)
    def test_model(self, dtype, monkeypatch):
        """A model's logits with the kernels and without them, beside float32's."""
        from evavit.ops.mlp import triton as kernels

        model = timm.create_model('eva_deit_tiny', depth=3, num_classes=10).cuda().eval()
        x = torch.randn(4, 3, 224, 224, device='cuda')
        calls, launches = [], kernels._forward_launches

        def counted(*args):
            calls.append(args)
            return launches(*args)

        monkeypatch.setattr(kernels, '_forward_launches', counted)

        def logits(fused):
            for block in model.blocks:
                block.mlp.fused_mlp = fused
            with torch.no_grad(), torch.autocast('cuda', dtype):
                return model(x).double()

        fused, of_fused, plain = logits(True), len(calls), logits(False)
        with torch.no_grad():
            exact = model(x).double()
        assert of_fused == len(calls) == 3  # one a block, and none on the plain path
        assert relative_rms(fused, exact) <= 2 * relative_rms(plain, exact)


def test_plain_path():
    case = make_case(7, 16, 24, 12, torch.float64, device='cpu')
    x, weight1, bias1, weight2, bias2, _ = case
    expected = F.gelu(x @ weight1.t() + bias1) @ weight2.t() + bias2
    torch.testing.assert_close(mlp_gelu(x, weight1, bias1, weight2, bias2, fused=True), expected)
    torch.testing.assert_close(mlp_gelu(x, weight1, None, weight2, None), F.gelu(x @ weight1.t()) @ weight2.t())
    with pytest.raises(ValueError, match=r'\[7, 16\] need weight1 \(N, 16\)'):
        mlp_gelu(x, weight2, bias1, weight2, bias2)
    with pytest.raises(ValueError, match=r'need biases \(24\) and \(12\), got \[12\]'):
        mlp_gelu(x, weight1, bias2, weight2, bias2)


def test_backend_by_arguments():
    assert mlp_gelu_backend(torch.device('cpu'), torch.bfloat16, 192, 768, 192) == 'plain'
    pytest.importorskip('triton')
    cuda = torch.device('cuda')
    assert mlp_gelu_backend(cuda, torch.bfloat16, 192, 768, 192) == 'triton'
    assert mlp_gelu_backend(cuda, torch.float32, 192, 768, 192) == 'plain'
    for features in ((24, 768, 192), (192, 760, 192), (192, 768, 1000 - 1)):
        assert mlp_gelu_backend(cuda, torch.bfloat16, *features) == 'plain'


def test_layer_is_timms_where_steps_differ():
    assert FusedMlp(16, 32)._fits()
    assert FusedMlp(16, 32, drop=0.1).eval()._fits()
    for other in (
        FusedMlp(16, 32, drop=0.1),
        FusedMlp(16, 32, act_layer=nn.ReLU),
        FusedMlp(16, 32, use_conv=True),
        FusedMlp(16, 32, norm_layer=nn.LayerNorm),
        FusedMlp(16, 32, act_layer=lambda: nn.GELU(approximate='tanh')),
    ):
        assert not other._fits()
    hooked = FusedMlp(16, 32)
    handle = hooked.act.register_forward_hook(lambda *args: None)
    assert not hooked._fits()
    handle.remove()
    assert hooked._fits()
    hooked.fc2.forward = lambda x: x  # as tools do that fetch offloaded weights
    assert not hooked._fits()
    del hooked.fc2.forward
    assert hooked._fits()
    hooked.fc1 = nn.Sequential(hooked.fc1)  # as an adapter
    assert not hooked._fits()


def test_models_take_it_unless_told_otherwise():
    for name in ('eva_deit_tiny', 'performer_deit_tiny'):
        assert isinstance(timm.create_model(name, depth=1).blocks[0].mlp, FusedMlp)
    assert type(timm.create_model('eva_deit_tiny', depth=1, mlp_layer=SwiGLU).blocks[0].mlp) is SwiGLU
    assert set(FusedMlp(16, 32).state_dict()) == set(Mlp(16, 32).state_dict())


@on_either
@pytest.mark.parametrize(
    'shape',
    [(1, 16, 32, 16), (77, 48, 80, 32), (130, 16, 64, 48), (128, 32, 16, 16), (129, 32, 144, 16)],
    ids=['one row', 'odd', 'two tiles of rows', 'whole tiles', 'two tiles of rows, nine of columns'],
)
def test_small_cases(shape, device, poison):
    """In float16, which the interpreter multiplies right."""
    case = make_case(*shape, torch.float16, device=device)
    reference = run(case, fused=False, dtype=torch.float64)
    with MLP.forced('triton'):
        fused = run(case, fused=True)
    for name, value in fused.items():
        assert relative_rms(value, reference[name]) < 1e-3, name


@on_either
@pytest.mark.parametrize('shape', [(70, 192, 96), (1, 64, 32), (129, 128, 64), (65, 80, 160)], ids=str)
def test_one_kernel_without_gradients(shape, device, poison, monkeypatch):
    kernels = pytest.importorskip('evavit.ops.mlp.triton')
    monkeypatch.setattr(kernels, 'WHOLE_PROGRAMS', 1)
    kernels._whole_launches.cache_clear()
    M, K, N = shape
    x, *weights, _ = make_case(M, K, N, K, torch.float16, device=device)
    reference = mlp_gelu(*[t.double() for t in (x, *weights)])
    weights[1] = weights[1].float()  # as autocast leaves it
    views = x, x.repeat(1, 2)[:, :K], x[None].expand(2, M, K)
    with MLP.forced('triton'), torch.no_grad():
        for view in views:
            monkeypatch.setattr(kernels, '_forward_launches', None)  # two kernels, which may not run
            assert relative_rms(mlp_gelu(view, *weights, fused=True), reference.expand(*view.shape)) < 1e-3
        weights = [w.repeat_interleave(2, -1)[..., ::2] for w in weights]  # the same values, apart in memory
        assert relative_rms(mlp_gelu(x, *weights, fused=True), reference) < 1e-3
    monkeypatch.undo()
    kernels._whole_launches.cache_clear()


def test_one_kernel_for_few_features_of_many_tokens_alone():
    kernels = pytest.importorskip('evavit.ops.mlp.triton')

    def whole(M, N, K, C):
        return kernels._whole_launches(M, N, K, C, K, torch.bfloat16, (torch.float32, torch.bfloat16)) is not None

    many = 64 * kernels.WHOLE_PROGRAMS
    assert whole(many, 768, 192, 192)
    assert whole(many - 63, 512, 128, 128)
    for other in ((many - 64, 768, 192, 192), (many, 1536, 384, 384), (many, 768, 192, 96), (many, 784, 192, 192)):
        assert not whole(*other)
    assert not whole(many, 448, 112, 112)  # 64 and 48 features, which is no power of 2


def test_compiled_graphs_hold_the_kernels_and_exported_ones_do_not():
    pytest.importorskip('triton')
    x, *weights, _ = make_case(8, 16, 32, 16, torch.bfloat16, device='cpu')

    class Wrapped(nn.Module):
        def forward(self, x):
            return mlp_gelu(x, *weights, fused=True)

    with MLP.forced('triton'):
        assert 'evavit.mlp' in graphs_of(Wrapped(), x)[0]
        assert 'evavit' not in str(torch.export.export(Wrapped(), (x,)).graph)
