"""What is done with a converted model: compiled, exported, copied, pickled, adapted, saved."""

import copy
import io
import pickle

import pytest
import torch
from helpers import randomise
from models.test_converted import images, original

import evavit
from evavit.export import load_exported, relative_error, to_onnx, to_program

NAMES = ['vit_base_patch14_reg4_dinov2', 'vit_base_patch16_siglip_224', 'eva02_tiny_patch14_224']
NAMES += ['vit_small_patch16_rope_mixed_ape_224', 'vit_small_patch16_dinov3']
each_kind = pytest.mark.parametrize('name', NAMES)


def converted(name, **kwargs):
    return evavit.convert_vit(original(name, **kwargs), window_size=3)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


@pytest.mark.parametrize(
    'name, checkpointing',
    [
        pytest.param('vit_base_patch14_reg4_dinov2', True, marks=pytest.mark.slow),
        ('vit_small_patch16_dinov3', False),
        pytest.param('vit_base_patch14_reg4_dinov2', False, marks=pytest.mark.slow),
        pytest.param('vit_base_patch16_siglip_224', True, marks=pytest.mark.slow),
        pytest.param('vit_small_patch16_rope_mixed_ape_224', True, marks=pytest.mark.slow),
        pytest.param('eva02_tiny_patch14_224', True, marks=pytest.mark.slow),
    ],
)
def test_compile_fullgraph(name, checkpointing):
    """One graph, forward and backward."""
    model = converted(name, depth=1)
    model.set_grad_checkpointing(checkpointing)
    x = images(model)
    gradients = []
    for call in (model, torch.compile(model, backend='aot_eager', fullgraph=True)):
        model.zero_grad()
        call(x).square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_compiled_images_of_any_size():
    """One graph for each size, none for a size seen before."""
    model = converted('vit_base_patch14_reg4_dinov2', depth=1, dynamic_img_size=True)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for size, count in (((98, 98), 1), ((70, 112), 2), ((98, 98), 2)):
        x = torch.randn(2, 3, *size)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
        assert len(graphs) == count
    with pytest.raises(ValueError, match='convert the model itself'):
        evavit.convert_vit(compiled)


@pytest.mark.slow
@each_kind
def test_compile_with_inductor(name):
    model = converted(name)
    x = images(model)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x), rtol=1e-3, atol=1e-4)


@pytest.mark.slow  # docs/convert.md exports too
@pytest.mark.parametrize('name', ['vit_base_patch14_reg4_dinov2', 'eva02_tiny_patch14_224'])
def test_export_with_any_batch(name):
    model = converted(name, depth=1)
    program = to_program(model, (3, *model.patch_embed.img_size))
    x = images(model, 5)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow  # likewise
@pytest.mark.parametrize('name', ['vit_base_patch14_reg4_dinov2', 'vit_small_patch16_dinov3'])
def test_onnx(name, tmp_path, recwarn):
    pytest.importorskip('onnxruntime', reason='needs evavit[export]')
    pytest.importorskip('onnxscript', reason='needs evavit[export]')
    model = converted(name, depth=1)
    to_onnx(model, tmp_path / 'model.onnx', (3, *model.patch_embed.img_size))
    assert not [it for it in recwarn if 'divide by zero' in str(it.message)]
    x = images(model, 3)
    with torch.no_grad():
        assert relative_error(load_exported(tmp_path / 'model.onnx')(x), model(x)) < 1e-4


def test_trace():
    model = converted('vit_base_patch14_reg4_dinov2')
    with pytest.warns(torch.jit.TracerWarning):  # tracing fixes the grid, as it should
        traced = torch.jit.trace(model, images(model))
    x = images(model, 3)
    torch.testing.assert_close(traced(x), model(x), rtol=1e-4, atol=1e-5)


@each_kind
def test_copies_and_state_dicts(name):
    model = converted(name)
    x = images(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    fresh = randomise(converted(name))
    fresh.load_state_dict(model.state_dict())
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False), fresh]
    with torch.no_grad():
        expected = model(x)
        for other in copies:
            assert type(other) is type(model) and torch.equal(other(x), expected)
            assert other.conversion == model.conversion
            other.set_grad_checkpointing()
            assert torch.equal(evavit.revert_vit(other)(x), evavit.revert_vit(model)(x))
    assert not model.grad_checkpointing


@pytest.mark.parametrize('name', ['vit_base_patch14_reg4_dinov2', 'eva_giant_patch14_224', 'eva02_tiny_patch14_224'])
def test_adapters(name):
    """LoRA on every Linear, the summaries' too, trains and merges; timm's own separate biases count."""
    peft = pytest.importorskip('peft', reason='needs evavit[test]')
    model = evavit.convert_vit(original(name), window_size=3, noise_std=0.0)
    x = images(model)
    with torch.no_grad():
        expected = model(x)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules='all-linear'))
    with torch.no_grad():
        torch.testing.assert_close(adapted(x), expected, rtol=1e-4, atol=1e-5)
    adapted.train()
    for _ in range(2):
        adapted.zero_grad()
        adapted(x).square().mean().backward()
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data -= 0.3 * parameter.grad.sign() * 0.1
    wanted = [key for key, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert any('summary_k.proj' in key for key in wanted)
    adapted.eval()
    with torch.no_grad():
        found = adapted(x)
        assert (found - expected).norm() > 1e-3 * expected.norm()
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(x), found, rtol=1e-3, atol=1e-4)
    assert evavit.revert_vit(merged)(x).isfinite().all()
