"""The depthwise convolution and GELU: the plain path against a loop in float64, the kernels against the plain path."""

import math

import pytest
import timm
import torch
from ops.kernels import DTYPES, gpu, graphs_of, interpreter, relative_rms
from timm.layers import set_fused_attn
from torch import nn
from torch.utils.checkpoint import checkpoint

import evavit  # noqa: F401
from evavit.models.eva_pvt_v2 import FusedMlpWithDepthwiseConv
from evavit.ops import depthwise_gelu, depthwise_gelu_backend
from evavit.ops.dwconv import DWCONV

NAMES = ['out', 'x', 'weight', 'bias']


def make_case(feat_size, C, dtype=torch.float32, *, B=2, factor=1.0, device='cpu'):
    """x, weight, bias and a gradient of the output."""
    tokens = B, feat_size[0] * feat_size[1], C
    case = factor * torch.randn(tokens), torch.randn(C, 1, 3, 3) / 3, torch.randn(C), torch.randn(tokens)
    return [t.to(device, dtype if i in (0, 3) else torch.float32) for i, t in enumerate(case)]


def run(case, feat_size, *, dtype=None, function=depthwise_gelu, **kwargs):
    """The output and the gradients, by NAMES."""
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in case[:3]]
    out = function(*leaves, list(feat_size), **kwargs)
    return dict(zip(NAMES, [out.detach(), *torch.autograd.grad(out, leaves, case[3].to(out.dtype))], strict=True))


def loop(x, weight, bias, feat_size):
    """The definition, one token at a time."""
    H, W = feat_size
    out = []
    for y in range(H):
        for column in range(W):
            z = bias
            for i in range(3):
                for j in range(3):
                    row, col = y + i - 1, column + j - 1
                    if 0 <= row < H and 0 <= col < W:
                        z = z + weight[:, 0, i, j] * x[:, row * W + col]
            out.append(z * 0.5 * (1 + torch.erf(z / math.sqrt(2))))
    return torch.stack(out, 1)


@pytest.mark.parametrize('feat_size', [(1, 1), (1, 7), (5, 3), (4, 6)], ids=str)
def test_the_definition(feat_size):
    case = make_case(feat_size, 5)
    expected = run(case, feat_size, dtype=torch.float64, function=loop)
    for name, value in run(case, feat_size, dtype=torch.float64).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    'shapes, message',
    [
        (((2, 6, 4), (4, 1, 3, 3), (4,)), '6 tokens are not a grid of feat_size 2 x 2'),
        (((2, 4, 4), (5, 1, 3, 3), (4,)), r'4 channels need weight \[4, 1, 3, 3\] and bias \[4\], got \[5, 1, 3, 3\]'),
        (((2, 4, 4), (4, 1, 3, 3), (3,)), r'and \[3\]'),
    ],
)
def test_arguments_that_do_not_fit(shapes, message):
    with pytest.raises(ValueError, match=message):
        depthwise_gelu(*(torch.zeros(shape) for shape in shapes), [2, 2])


def test_backend():
    pytest.importorskip('triton')
    cuda = torch.device('cuda')
    assert [depthwise_gelu_backend(cuda, dtype) for dtype in (*DTYPES, torch.float64)] == 3 * ['triton'] + ['plain']
    assert depthwise_gelu_backend(torch.device('cpu'), torch.float32) == 'plain'


class TestInTheInterpreter:
    pytestmark = interpreter

    # In the last two a program has several tiles, which rows and channels do not fill. The parameters are float32, as
    # under autocast.
    @pytest.mark.parametrize(
        ('feat_size', 'C', 'dtype', 'bound'),
        [
            ((1, 1), 8, torch.float32, 1e-6),
            ((1, 7), 40, torch.float32, 1e-6),
            ((5, 3), 16, torch.float16, 1e-3),
            ((9, 11), 24, torch.float32, 1e-6),
            ((16, 2), 20, torch.float32, 1e-6),
        ],
        ids=str,
    )
    def test_shapes(self, feat_size, C, dtype, bound, poison, monkeypatch):
        from evavit.ops.dwconv import triton as kernels

        tiles = dict(BC=16, P=4, programs=8)
        monkeypatch.setattr(kernels, 'LAUNCH', {name: {**launch, **tiles} for name, launch in kernels.LAUNCH.items()})
        launches = kernels._forward_launches, kernels._backward_launches
        for cache in launches:
            cache.cache_clear()
        case = make_case(feat_size, C, dtype)
        reference = run(case, feat_size, dtype=torch.float64)
        fused, again = (run(case, feat_size, function=kernels.depthwise_gelu_fused) for _ in range(2))
        for cache in launches:
            cache.cache_clear()
        for name, value in fused.items():
            assert relative_rms(value, reference[name]) < bound, name
            assert torch.equal(value, again[name]), f'{name} differs between two runs'

    def test_opcheck(self):
        import evavit.ops.dwconv.triton  # noqa: F401, registers the operators

        x, weight, bias, _ = make_case((3, 4), 8)
        leaves = x.requires_grad_(), weight.reshape(8, 9).t().contiguous().requires_grad_(), bias.requires_grad_()
        torch.library.opcheck(torch.ops.evavit.depthwise_gelu.default, (*leaves, [3, 4]))


def make_mlp(act_layer=nn.GELU, device='cpu', **kwargs):
    mlp = timm.models.pvt_v2.MlpWithDepthwiseConv(12, 40, act_layer=act_layer, device=device, **kwargs)
    return mlp, FusedMlpWithDepthwiseConv(mlp)


class TestMlp:
    @pytest.mark.parametrize(
        'kwargs',
        [
            {},
            dict(extra_relu=True),
            dict(act_layer=nn.SiLU),
            dict(drop=0.3),
            dict(act_layer=lambda: nn.GELU(approximate='tanh')),
        ],
        ids=['default', 'relu', 'silu', 'dropout', 'tanh'],
    )
    def test_is_timm_s(self, kwargs):
        theirs, ours = make_mlp(**kwargs)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        x, results = torch.randn(2, 15, 12, requires_grad=True), []
        for mlp in (theirs, ours, torch.jit.script(ours)):
            torch.manual_seed(1)
            out = mlp(x, [5, 3])
            results.append([out, *torch.autograd.grad(out.square().sum(), [x, *mlp.parameters()])])
        for other in results[1:]:
            for a, b in zip(results[0], other, strict=True):
                torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-7)

    def test_hooks_see_what_they_are_for(self):
        _, mlp = make_mlp()
        x, seen = torch.randn(1, 15, 12), []
        expected = mlp(x, [5, 3])
        for module in (mlp.relu, mlp.dwconv, mlp.act):
            handle = module.register_forward_hook(lambda module, args, out: seen.append(out))
            torch.testing.assert_close(mlp(x, [5, 3]), expected)
            handle.remove()
        assert [tuple(out.shape) for out in seen] == 2 * [(1, 40, 5, 3)] + [(1, 15, 40)]

    def test_what_is_called_is_what_stands_there(self):
        """Another convolution or activation in the place of the own one, as of dilated or adapted networks."""
        x, convs = torch.randn(1, 15, 12), []
        for options in (
            dict(padding=2, dilation=2),
            dict(padding=1, padding_mode='circular'),
            dict(padding=2),
            dict(padding=1, bias=False),
            dict(padding=1, groups=1),
            dict(padding='same'),
        ):
            size = 5 if options == dict(padding=2) else 3
            convs.append(nn.Conv2d(40, 40, size, **{'groups': 40, **options}))
        for conv in (*convs, nn.Sequential(convs[0])):
            theirs, ours = make_mlp()
            theirs.dwconv = ours.dwconv = conv
            assert 'backend=plain' in repr(ours)
            torch.testing.assert_close(ours(x, [5, 3]), theirs(x, [5, 3]))

        class Doubled(nn.GELU):
            def forward(self, x):
                return 2 * super().forward(x)

        theirs, ours = make_mlp(Doubled)
        torch.testing.assert_close(ours(x, [5, 3]), theirs(x, [5, 3]))

        theirs, ours = make_mlp()
        ours.dwconv.forward = lambda x: torch.zeros_like(x)  # so offloaded weights are fetched, for one
        torch.testing.assert_close(ours(x, [5, 3]), ours.fc2.bias.expand(1, 15, 12))

    def test_in_every_attention_s_pyramid(self):
        for name in ('eva_pvt_v2_b3', 'performer_pvt_v2_b3'):
            model = timm.create_model(name, depths=(1, 2, 1, 1), device='meta')
            mlps = [block.mlp for stage in model.stages for block in stage.blocks]
            assert [type(mlp) for mlp in mlps] == 5 * [FusedMlpWithDepthwiseConv]

    def test_initial_weights_are_timm_s(self):
        small = dict(depths=(1, 1, 1, 1), embed_dims=(16, 16, 16, 16), num_heads=(1, 1, 1, 1), num_classes=2)
        states = []
        for function in (
            lambda: timm.models.pvt_v2.PyramidVisionTransformerV2(sr_ratios=1, **small),
            lambda: timm.create_model('eva_pvt_v2_b3', **small),
        ):
            torch.manual_seed(0)
            states.append({name: t for name, t in function().state_dict().items() if '.mlp.' in name})
        assert list(states[0]) == list(states[1])
        assert len(states[0]) == 24
        assert all(torch.equal(t, states[1][name]) for name, t in states[0].items())

    def test_timm_s_switch(self):
        try:
            set_fused_attn(False)
            assert not make_mlp()[1].fused_mlp
        finally:
            set_fused_attn(True)
        assert make_mlp()[1].fused_mlp
        assert 'backend=plain' in make_mlp()[1].extra_repr()

    @pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')  # tracing fixes the grid, as it should
    def test_compiled_graphs_hold_the_kernels_and_exported_ones_do_not(self):
        pytest.importorskip('triton')
        _, mlp = make_mlp()
        x = torch.randn(1, 15, 12)
        with DWCONV.forced('triton'):
            assert 'evavit.depthwise_gelu' in graphs_of(mlp, x, [5, 3])[0]
            assert 'evavit' not in str(torch.export.export(mlp, (x, [5, 3])).graph)
            mlp.requires_grad_(False)
            assert 'evavit::' not in str(torch.jit.trace(lambda x: mlp(x, [5, 3]), x, check_trace=False).graph)


def check(case, feat_size, dtype):
    reference = run(case, feat_size, dtype=torch.float64)
    with torch.autocast('cuda', dtype, enabled=dtype != torch.float32):
        plain = run(case, feat_size)
        fused, again = run(case, feat_size, fused=True), run(case, feat_size, fused=True)
    for name, value in fused.items():
        assert torch.equal(value, again[name]), f'{name} differs between two runs'
        error, of_plain = relative_rms(value, reference[name]), relative_rms(plain[name], reference[name])
        assert error <= (1e-5 if dtype == torch.float32 else 5e-3), f'{name}: {error:.1e}, plain {of_plain:.1e}'
        assert error <= max(2 * of_plain, 1e-6), f'{name}: {error:.1e} is over twice plain {of_plain:.1e}'


class TestKernels:
    pytestmark = gpu

    @pytest.fixture(autouse=True)
    def full_float32(self):
        before = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = False
        yield
        torch.backends.cudnn.allow_tf32 = before

    @pytest.mark.parametrize('feat_size', [(1, 1), (1, 7), (5, 3), (7, 7), (14, 14), (15, 13), (57, 1)], ids=str)
    @pytest.mark.parametrize('C', [8, 40, 512])
    @pytest.mark.parametrize('dtype', DTYPES, ids=str)
    def test_shapes(self, feat_size, C, dtype, poison):
        check(make_case(feat_size, C, dtype, device='cuda'), feat_size, dtype)

    @pytest.mark.parametrize('side, C', [(56, 512), (28, 1024), (14, 1280), (7, 2048)])
    def test_the_pyramid_s_sizes(self, side, C, poison):
        check(make_case((side, side), C, torch.bfloat16, B=8, device='cuda'), (side, side), torch.bfloat16)

    def test_channels_that_vectors_do_not_divide(self, poison):
        check(make_case((6, 5), 37, torch.bfloat16, device='cuda'), (6, 5), torch.bfloat16)

    @pytest.mark.parametrize('dtype', DTYPES, ids=str)
    def test_large_inputs_stay_finite(self, dtype):
        case = make_case((9, 8), 64, dtype, factor=30.0, device='cuda')
        for name, value in run(case, (9, 8), dtype=dtype, fused=True).items():
            assert value.isfinite().all(), name

    def test_views_and_expanded_gradients(self):
        x, weight, bias, _ = make_case((6, 5), 48, device='cuda')
        view = x.transpose(0, 1).contiguous().transpose(0, 1)[:, :, :40]
        case = view, weight[:40], bias[:40], torch.ones(1, device='cuda').expand(2, 30, 40)
        reference = run(case, (6, 5), dtype=torch.float64)
        for name, value in run(case, (6, 5), fused=True).items():
            assert relative_rms(value, reference[name]) < 1e-5, name

    def test_opcheck(self):
        import evavit.ops.dwconv.triton  # noqa: F401, registers the operators

        x, weight, bias, _ = make_case((6, 5), 40, device='cuda')
        leaves = x.requires_grad_(), weight.reshape(40, 9).t().contiguous().requires_grad_(), bias.requires_grad_()
        torch.library.opcheck(torch.ops.evavit.depthwise_gelu.default, (*leaves, [6, 5]))

    def step(self, mlp, x, call=None):
        with torch.autocast('cuda', torch.bfloat16):
            out = (mlp if call is None else call)(x, [14, 14])
        return [out, *torch.autograd.grad(out.float().square().sum(), [x, *mlp.parameters()])]

    def fused_mlp(self):
        mlp = make_mlp(device='cuda')[1].train()
        mlp.fused_mlp = True
        return mlp, torch.randn(2, 196, 12, device='cuda', requires_grad=True)

    def test_mlp_names_its_backend(self):
        mlp, _ = self.fused_mlp()
        assert 'backend=triton' in mlp.extra_repr()
        mlp.fused_mlp = False
        assert 'backend=plain' in mlp.extra_repr()

    def test_mlp_is_the_same_on_both_paths(self):
        mlp, x = self.fused_mlp()
        fused = self.step(mlp, x)
        mlp.fused_mlp = False
        for a, b in zip(fused, self.step(mlp, x), strict=True):
            assert relative_rms(a, b.double()) < 1e-2

    @pytest.mark.parametrize('mode', ['default', 'reduce-overhead'])
    def test_compiles_into_one_graph(self, mode):
        mlp, x = self.fused_mlp()
        compiled = torch.compile(mlp, fullgraph=True, mode=mode)
        for _ in range(3):
            expected, got = self.step(mlp, x), [t.clone() for t in self.step(mlp, x, compiled)]
        for a, b in zip(expected, got, strict=True):
            assert relative_rms(b, a.double()) < 1e-2

    def test_checkpointing_changes_nothing(self):
        mlp, x = self.fused_mlp()
        again = self.step(mlp, x, lambda *args: checkpoint(mlp, *args, use_reentrant=False))
        assert all(torch.equal(a, b) for a, b in zip(self.step(mlp, x), again, strict=True))

    def test_the_model_is_the_same_on_both_paths(self):
        model = timm.create_model('eva_pvt_v2_b3', depths=(1, 1, 2, 1), device='cuda').eval()
        x, outs = torch.randn(2, 3, 160, 224, device='cuda'), []
        for fused in (True, False):
            for module in model.modules():
                if isinstance(module, FusedMlpWithDepthwiseConv):
                    module.fused_mlp = fused
            with torch.no_grad():
                outs.append(model(x))
        assert relative_rms(outs[0], outs[1].double()) < 1e-4
