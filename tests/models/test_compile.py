"""torch.compile, torch.export and TorchScript agree with eager, and a compiled model takes a second image size."""

import pytest
import timm
import torch

from evavit.models import GridPyramidVisionTransformerV2, families, variants

# The large ones differ from the base ones in width and depth alone, and these from DeiT-Tiny.
WIDER = ('eva_deit_small', 'eva_deit_base')
MODELS = [f'eva_{name}' for name, size in variants().items() if size.model_args.get('embed_dim') != 1024]
PYRAMIDS = [
    name
    for family in families().values()
    if issubclass(family.model, GridPyramidVisionTransformerV2)
    for name in family.models
]
SHALLOW = {name: dict(depths=(1, 1, 1, 1)) if name in PYRAMIDS else dict(depth=2) for name in MODELS}
pytestmark = pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')  # tracing fixes the grid, as it should
each_model = pytest.mark.parametrize('name', [name for name in MODELS if name not in WIDER])


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


def agree(one, other, size=(224, 224), batch=2, tolerance=1e-5):
    x = torch.randn(batch, 3, *size)
    with torch.no_grad():
        a, b = one(x), other(x)
    assert (a - b).norm() <= tolerance * b.norm()


@each_model
def test_compile_fullgraph(name):
    """One graph, then one more for a second grid, and none for a size seen before."""
    kwargs = {} if name in PYRAMIDS else dict(dynamic_img_size=True)
    model = timm.create_model(name, **SHALLOW[name], **kwargs).eval()
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for size, expected in (((224, 224), 1), ((224, 224), 1), ((160, 96), 2), ((224, 224), 2)):
        agree(compiled, model, size)
        assert len(graphs) == expected, size


@pytest.mark.parametrize(
    'name',
    ['eva_deit_tiny', *(pytest.param(name, marks=pytest.mark.slow) for name in ('eva_deit_tiny_784', 'eva_pvt_v2_b3'))],
)
def test_compiled_training_steps_on_two_sizes(name):
    """With the gradient of a position embedding that is resampled to the second size."""
    kwargs = dict(num_classes=10) if name in PYRAMIDS else dict(num_classes=10, dynamic_img_size=True)
    model = timm.create_model(name, **SHALLOW[name], **kwargs).train()
    compiled = torch.compile(model, backend='aot_eager', fullgraph=True)
    for size in ((64, 64), (48, 96)):
        model.zero_grad()
        compiled(torch.randn(2, 3, *size)).square().mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize('name', MODELS)
def test_compile_with_inductor(name):
    kwargs = {} if name in PYRAMIDS else dict(dynamic_img_size=True)
    model = timm.create_model(name, **kwargs).eval()
    compiled = torch.compile(model, fullgraph=True)
    for size in ((224, 224), (97, 161)):
        agree(compiled, model, size)


@each_model
def test_export_with_any_batch(name):
    model = timm.create_model(name, **SHALLOW[name]).eval()
    program = torch.export.export(
        model, (torch.randn(2, 3, 224, 224),), dynamic_shapes=({0: torch.export.Dim('batch', max=64)},)
    )
    agree(program.module(), model, batch=5)


@each_model
def test_trace_and_script(name):
    model = timm.create_model(name, **SHALLOW[name]).eval()
    agree(torch.jit.trace(model, torch.randn(2, 3, 224, 224)), model, batch=3)
    scripted = torch.jit.script(model)
    agree(scripted, model)
    if name in PYRAMIDS:
        agree(scripted, model, (97, 161))  # a scripted pyramid takes any size
