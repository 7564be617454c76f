"""What stands in the place of a summary's projection or norm counts as it computes: adapters, pruning, quantization."""

import copy

import pytest
import timm
import torch
import torch.distributed as dist
from helpers import randomise
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations, prune

import evavit  # noqa: F401
from evavit.layers import ATTENTIONS, EvaAttention, EvaAttention1d, attention_layer
from evavit.layers.eva import Summary

SMALL = dict(img_size=32, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=5, window_size=4)


def model_and_images(seed=0, **kwargs):
    torch.manual_seed(seed)
    return randomise(timm.create_model('eva_deit_tiny', **SMALL, **kwargs), 0.4).eval(), torch.randn(2, 3, 32, 32)


def two_ddp_steps(model, images):
    """Two updates of a process group of one, where a parameter without a gradient ends the second."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, 0.1)
    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    try:
        parallel = DistributedDataParallel(model.train(), find_unused_parameters=False, init_sync=False)
        for _ in range(2):
            optimizer.zero_grad()
            parallel(images).square().mean().backward()
            assert all(parameter.grad is not None for parameter in trained)
            optimizer.step()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize('kind', ['linear_ln', 'linear'])
def test_effective_parameters_are_those_of_the_modules(kind):
    """A wrapped projection and a wrapped norm, and a gradient through both."""
    summary = randomise(Summary(8, kind, dtype=torch.float64))
    plain = copy.deepcopy(summary)
    x = torch.randn(5, 8, dtype=torch.float64)

    def apply(parameters):
        y = nn.functional.linear(x, *parameters[:2])
        return nn.functional.layer_norm(y, [8], *parameters[2:]) if kind == 'linear_ln' else y

    summary.proj = nn.Sequential(summary.proj)
    if kind == 'linear_ln':
        summary.norm = nn.Sequential(summary.norm)
    for ours, theirs in zip(summary(), plain(), strict=True):
        torch.testing.assert_close(ours, theirs)
    for module in (summary, plain):
        apply(module()).square().sum().backward()
    for ours, theirs in zip(summary.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize(
    'norm',
    [
        *(nn.LayerNorm(8, eps=eps, dtype=torch.float64) for eps in (1e-12, 1e-6, 10.0)),
        nn.LayerNorm(8, eps=10.0, bias=False, dtype=torch.float64),
        nn.LayerNorm(8, elementwise_affine=False),
        nn.Sequential(nn.LayerNorm(8, eps=10.0, dtype=torch.float64)),
        timm.layers.LayerNorm(8, eps=10.0, dtype=torch.float64),
    ],
)
def test_another_layer_norm_counts_as_it_computes(norm):
    """Its eps, and what it lacks of weight and bias."""
    summary, x = Summary(8, dtype=torch.float64), torch.randn(5, 8, dtype=torch.float64)
    summary.norm = norm
    randomise(summary)
    weight, bias, norm_weight, norm_bias = summary()
    ours = nn.functional.layer_norm(nn.functional.linear(x, weight, bias), [8], norm_weight, norm_bias)
    expected = norm(summary.proj(x))
    torch.testing.assert_close(ours, expected)
    parameters = list(summary.parameters())
    grads = [torch.autograd.grad(y.square().sum(), parameters) for y in (ours, expected)]
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_projection_without_a_bias():
    summary = Summary(8)
    summary.proj = nn.Linear(8, 8, bias=False)
    weight, bias, *_ = summary()
    torch.testing.assert_close(weight, summary.proj.weight)
    assert not bias.any()


@pytest.mark.parametrize('eps', [1e-5, 10.0])
@pytest.mark.parametrize('make', [EvaAttention, EvaAttention1d])
def test_compiled_and_scripted_layers_see_another_norm(make, eps):
    sizes, args = (dict(cell_size=2), ()) if make is EvaAttention1d else (dict(partition_grid=2), ([4, 4],))
    layer, x = randomise(make(16, 2, window_size=2, **sizes)).eval(), torch.randn(1, 16, 16)
    before = layer(x, *args)
    layer.summary_k.norm.eps = eps
    after = layer(x, *args)
    assert torch.allclose(after, before) == (eps == 1e-5)
    if make is EvaAttention:  # the other is not written for TorchScript
        torch.testing.assert_close(torch.jit.script(layer)(x, *args), after)
    layer.summary_q.norm = nn.Sequential(layer.summary_q.norm)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: layer(x, *args), backend='aot_eager', fullgraph=True)
    torch.testing.assert_close(compiled(x), after)


@pytest.mark.parametrize('norm', [nn.RMSNorm(8), nn.Identity(), nn.LayerNorm(8, eps=0.0)], ids=str)
def test_a_norm_that_the_operators_cannot_apply_is_an_error(norm):
    layer = EvaAttention(16, 2, window_size=2, partition_grid=2)
    layer.summary_q.norm = norm
    with pytest.raises(ValueError, match=r'must be a LayerNorm with an eps above 0, got (RMS|Iden|LayerNorm)'):
        layer(torch.randn(1, 16, 16), (4, 4))


def test_plain_parameters_are_handed_on_as_they_are():
    summary = Summary(8)
    assert all(a is b for a, b in zip(summary(), summary.parameters(), strict=True))


@pytest.mark.parametrize('make', [EvaAttention, EvaAttention1d])
@pytest.mark.parametrize('options', [{}, dict(summary='linear')])
def test_every_layer_sees_a_hook(make, options):
    if make is EvaAttention1d:
        layer, args, options = EvaAttention1d(16, 2, window_size=4, cell_size=2), (), {}
    else:
        layer, args = EvaAttention(16, 2, window_size=2, partition_grid=2, **options), ((4, 4),)
    layer, x = randomise(layer).eval(), torch.randn(1, 16, 16)
    before = layer(x, *args)
    layer.summary_k.proj.register_forward_hook(lambda module, inputs, output: 2 * output)
    with torch.no_grad():
        expected = copy.deepcopy(layer)
        expected.summary_k.proj._forward_hooks.clear()
        expected.summary_k.proj.weight.mul_(2)
        expected.summary_k.proj.bias.mul_(2)
    torch.testing.assert_close(layer(x, *args), expected(x, *args))
    if options:
        assert not torch.allclose(layer(x, *args), before)


def test_pruned_projections_train():
    """A pruned weight is made anew from weight_orig in front of each call."""
    model, images = model_and_images()
    for name in ('summary_q', 'summary_k'):
        for block in model.blocks:
            prune.random_unstructured(getattr(block.attn, name).proj, 'weight', 0.5)
    with torch.no_grad():
        before = model(images)
        for block in model.blocks:
            block.attn.summary_k.proj.weight_orig.mul_(-1)
        assert not torch.allclose(model(images), before)
    two_ddp_steps(model, images)


def test_a_parametrized_projection_trains():
    model, images = model_and_images()
    for block in model.blocks:
        parametrizations.weight_norm(block.attn.summary_k.proj)
    two_ddp_steps(model, images)


def test_quantized_projections():
    quantization = pytest.importorskip('torchao.quantization', reason='needs evavit[export]')
    model, images = model_and_images()
    small = copy.deepcopy(model)
    quantization.quantize_(small, quantization.Int8WeightOnlyConfig(version=2))
    parameters = small.blocks[0].attn.summary_q()
    assert all(type(value) in (torch.Tensor, nn.Parameter) for value in parameters)  # which kernels can read
    torch.testing.assert_close(parameters[0], small.blocks[0].attn.summary_q.proj.weight.dequantize())
    with torch.no_grad():
        torch.testing.assert_close(small(images), model(images), rtol=0.1, atol=0.1)


def test_a_wrapped_projection_compiles():
    layer = randomise(EvaAttention(16, 2, window_size=2, partition_grid=2)).eval()
    layer.summary_q.proj = nn.Sequential(layer.summary_q.proj)
    x = torch.randn(1, 16, 16)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: layer(x, (4, 4)), backend='aot_eager', fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x, (4, 4)))


def adapted(model, peft, **kwargs):
    """A model with adapters that do something, all in float32."""
    model = peft.get_peft_model(model, kwargs.pop('config', peft.LoraConfig)(**kwargs))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and 'magnitude' not in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


METHODS = {
    'lora': dict(r=4, target_modules='all-linear'),
    'lora of every proj': dict(r=4, target_modules=['qkv', 'proj']),
    'dora': dict(r=4, use_dora=True, target_modules=r'.*(qkv|summary_[qk]\.proj|fc[12])'),
    'ia3': dict(target_modules=r'.*(qkv|summary_[qk]\.proj|fc[12])', feedforward_modules=r'.*fc2'),
}


@pytest.mark.filterwarnings('ignore')  # PEFT's, about models that are not of transformers
@pytest.mark.parametrize('method', METHODS)
def test_adapters_train_and_merge(method):
    peft = pytest.importorskip('peft', reason='needs evavit[test]')
    config = peft.IA3Config if method == 'ia3' else peft.LoraConfig
    model, images = model_and_images()
    with torch.no_grad():
        before = model(images)
    model = adapted(model, peft, config=config, **METHODS[method])
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert any('summary_k.proj' in name for name in names)
    two_ddp_steps(model, images)
    model.eval()
    with torch.no_grad():
        expected = model(images)
        # what the summaries' adapters alone do
        for name, module in model.named_modules():
            if name.endswith(('summary_q.proj', 'summary_k.proj')):
                module.enable_adapters(False)
        assert relative(model(images), expected) > 1e-3
        for name, module in model.named_modules():
            if name.endswith(('summary_q.proj', 'summary_k.proj')):
                module.enable_adapters(True)
        merged = model.merge_and_unload()
        assert relative(expected, before) > 1e-2
        assert relative(merged(images), expected) <= 1e-6


@pytest.mark.filterwarnings('ignore')
def test_tuned_norms_train():
    peft = pytest.importorskip('peft', reason='needs evavit[test]')
    model, images = model_and_images()
    model = adapted(model, peft, config=peft.LNTuningConfig, target_modules=r'.*summary_[qk]\.norm')
    assert any('summary_k.norm' in name for name, parameter in model.named_parameters() if parameter.requires_grad)
    two_ddp_steps(model, images)
    with torch.no_grad():
        expected = model.eval()(images)
        assert relative(model.merge_and_unload()(images), expected) <= 1e-5


@pytest.mark.filterwarnings('ignore')
def test_adapters_on_a_quantized_base():
    """Weights of int8, adapters beside them: all of them train, and the output is that of the weights as they are."""
    peft = pytest.importorskip('peft', reason='needs evavit[test]')
    quantization = pytest.importorskip('torchao.quantization', reason='needs evavit[export]')
    model, images = model_and_images()
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig(version=2))
    model = adapted(model, peft, r=4, target_modules='all-linear')
    two_ddp_steps(model, images)
    with torch.no_grad():
        expected = model.eval()(images)
        for module in model.modules():
            weight = module._parameters.get('weight') if isinstance(module, nn.Linear) else None
            if hasattr(weight, 'dequantize') and type(weight) is not nn.Parameter:
                module.weight = nn.Parameter(weight.dequantize(), requires_grad=False)
        assert relative(model(images), expected) <= 1e-5


@pytest.mark.filterwarnings('ignore:.*deprecated')
@pytest.mark.parametrize('name', ATTENTIONS)
def test_every_attention_takes_quantized_linears(name):
    layer, x = randomise(attention_layer(name, (4, 4))(16, 2), 0.3).eval(), torch.randn(1, 16, 16)
    small = torch.ao.quantization.quantize_dynamic(layer, {nn.Linear})
    assert type(small.proj) is not nn.Linear
    assert relative(small(x, (4, 4)), layer(x, (4, 4))) < 0.2


@pytest.mark.parametrize('dtype, bound', [(torch.float16, 2e-3), (torch.bfloat16, 1.6e-2)])
def test_an_adapter_in_half_precision_keeps_the_weights_beside_a_large_bias(dtype, bound):
    """As `convert_vit` starts them: a bias near 1 beside much smaller weights."""
    summary = Summary(64)
    nn.init.normal_(summary.proj.weight, std=0.01)
    nn.init.constant_(summary.proj.bias, 1.0)
    summary.to(dtype)
    weight = summary.proj.weight.detach().float()
    summary.proj = nn.Sequential(summary.proj)
    found = summary()[0].detach().float()
    assert (found - weight).norm() < bound * weight.norm()
