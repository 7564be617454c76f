"""export.py: files with the answers of the model that they came from; one line on a mistake."""
import importlib.util
import json

import pytest
import timm
import torch
from runs import KWARGS, MODEL

from evavit import exporting
from evavit.training import options


def needs(*packages):
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f'{", ".join(missing)} missing: pip install evavit[export]')


needs_onnx = needs('onnx', 'onnxscript', 'onnxruntime')
# The flags of timm's onnx_export.py.
TIMM = ('model', 'opset', 'keep_init', 'aten_fallback', 'dynamic_size', 'check_forward', 'batch_size', 'img_size',
        'mean', 'std', 'num_classes', 'checkpoint', 'reparam', 'training', 'verbose')


def test_flags_are_timms():
    known = options.options_of('export')
    assert set(TIMM) <= set(known)
    assert known['model'].short == '-m' and known['batch_size'].short == '-b' and known['batch_size'].default == 1


@needs_onnx
def test_checkpoint_to_onnx(train, call, tmp_path):
    """Model, classes and image settings come from the checkpoint; the file says them; any batch does."""
    import onnx
    checkpoint = train('run') / 'last.safetensors'
    path = tmp_path / 'model.onnx'
    code, out, err = call('export', path, '--checkpoint', checkpoint, '--check-forward', '-b', '5')
    assert code == 0, out + err
    assert 'agrees with PyTorch' in out and 'operators: Add ×' in out and 'TensorRT' not in out
    model = timm.create_model('eva_deit_tiny', num_classes=3, checkpoint_path=str(checkpoint), **KWARGS).eval()
    run = exporting.load_exported(path)
    for batch in (1, 2, 7):
        images = torch.randn(batch, 3, 16, 16)
        with torch.no_grad():
            torch.testing.assert_close(run(images), model(images), atol=1e-4, rtol=1e-4)
    about = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert about['model'] == 'eva_deit_tiny' and json.loads(about['class_names']) == ['apple', 'pear', 'plum']
    assert json.loads(about['input_size']) == [3, 16, 16] and len(json.loads(about['mean'])) == 3
    assert set(exporting.onnx_operators(path)) <= exporting.TENSORRT_OPERATORS


@needs_onnx
def test_pyramid_in_float16(call, tmp_path):
    """Windows and cells that do not divide the grid: padding and masks are in ONNX's operators, too."""
    path = tmp_path / 'model.onnx'
    code, out, err = call('export', path, '-m', 'eva_pvt_v2_b3', '--num-classes', '5', '--precision', 'float16',
                          '--img-size', '72', '--check-forward', '--model-kwargs', 'depths=(1,1,1,1)',
                          'embed_dims=(16,32,48,64)', 'num_heads=(1,2,3,4)', 'window_size=4', 'partition_grid=4')
    assert code == 0, out + err
    assert 'random' in out and 'float16' in out and 'agrees with PyTorch' in out
    assert set(exporting.onnx_operators(path)) <= exporting.TENSORRT_OPERATORS


@needs_onnx
def test_timms_flags_on_a_model_without_windows(call, tmp_path):
    """Any image size where the model allows it; the version of the operators; weights as inputs."""
    import onnx
    path = tmp_path / 'model.onnx'
    code, out, err = call('export', path, '-m', 'test_byobnet', '--num-classes', '5', '--dynamic-size', '--opset', '20',
                          '--keep-init')
    assert code == 0, out + err
    file = onnx.load(path)
    assert file.opset_import[0].version == 20
    assert len(file.graph.input) > 1
    assert exporting.load_exported(path)(torch.randn(3, 3, 96, 160)).shape == (3, 5)


def test_int8_takes_a_quarter():
    pytest.importorskip('torchao', reason='needs evavit[export]')
    torch.manual_seed(0)
    model = timm.create_model('eva_deit_tiny', depth=1, img_size=28, patch_size=4, window_size=3).eval()
    images = torch.randn(2, 3, 28, 28)
    small = exporting.lower_precision(model, 'int8')
    with torch.no_grad():
        error = exporting.relative_error(small(images), model(images))
    assert 0 < error < 0.05
    weight = small.blocks[0].mlp.fc1.weight
    assert weight.qdata.dtype == torch.int8 and model.blocks[0].mlp.fc1.weight.dtype == torch.float32


@pytest.mark.parametrize('precision, bound', [('bfloat16', 0.05), ('float16', 0.01)])
def test_half_precision(precision, bound):
    torch.manual_seed(0)
    model = timm.create_model('eva_deit_tiny', **KWARGS).eval()
    images = torch.randn(2, 3, 16, 16)
    lower = exporting.lower_precision(model, precision)
    with torch.no_grad():
        logits = lower(images.to(getattr(torch, precision)))
        assert logits.dtype == getattr(torch, precision)
        assert 0 < exporting.relative_error(logits, model(images)) < bound
    with pytest.raises(ValueError, match='precision int4 is not one of'):
        exporting.lower_precision(model, 'int4')


@pytest.mark.slow
@pytest.mark.parametrize('precision', exporting.PRECISIONS)
def test_package(call, tmp_path, precision):
    path = tmp_path / 'model.pt2'
    code, out, err = call('export', path, *MODEL, '--num-classes', '3', '--precision', precision, '--check-forward',
                          '--device', 'cpu')
    assert code == 0, out + err
    assert 'agrees with PyTorch' in out
    if precision == 'float32':
        run, images = exporting.load_exported(path), torch.randn(3, 3, 16, 16)
        torch.testing.assert_close(run(images.to(memory_format=torch.channels_last)), run(images))


@pytest.mark.parametrize('flags, message', [
    ([], 'no output: the first word is the file to write'),
    (['--model', 'eva_deit_tiny'], 'no output'),
    (['m.tflite'], 'must end in .onnx'),
    (['nowhere/m.onnx'], 'no folder nowhere'),
    (['m.pt2'], 'no model: give --model NAME'),
    (['m.pt2', '--opset', '18'], '--opset is for ONNX files'),
    (['m.pt2', '--dynamic-size'], '--dynamic-size is for ONNX files'),
    (['m.onnx', '--opset', '9'], 'opset, which takes a whole number ≥ 18'),
    (['m.onnx', '--precision', 'int8'], '--precision int8 is for .pt2 packages'),
    (['m.onnx', '--precision', 'int4'], 'one of float32'),
    (['m.onnx', '--training'], '--training belongs to'),
    (['m.onnx', '--aten-fallback'], '--aten-fallback belongs to'),
    (['m.pt2', '--pretrained', '--checkpoint', 'x.pth'], 'both name weights'),
    (['m.pt2', '--checkpoint', 'none.pth'], 'none.pth: no such checkpoint'),
    (['m.pt2', '-m', 'eva_deit_tinny'], 'did you mean eva_deit_tiny?'),
    (['m.pt2', '--quiet'], 'unknown flag --quiet'),
    (['m.onnx', *MODEL, '--dynamic-size'], 'write a file for each size, with --img-size N'),
])
def test_mistakes(call, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    if importlib.util.find_spec('onnx') is None and flags and flags[0] == 'm.onnx':
        pytest.skip('needs evavit[export]')
    code, _, err = call('export', *flags)
    assert code == 2 and message in err and len(err.splitlines()) == 1, err
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named(call, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name, package=None: None if name == 'onnxscript' else True)
    code, _, err = call('export', tmp_path / 'm.onnx', *MODEL)
    assert code == 2 and err == "error: onnxscript not installed: pip install 'evavit[export]'\n"
