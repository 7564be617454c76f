"""export.py: files with the answers of the model that they came from; one line on a mistake."""

import contextlib
import errno
import importlib.util
import json
import os
import re
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from programs import load_program
from runs import KWARGS, MODEL, load_script
from timm.data import create_transform, resolve_data_config

from evavit import export as exporting
from evavit.cli.export import check_forward, check_output, check_output_data
from evavit.errors import UserError, run_script
from evavit.hub import save_folder
from evavit.training import config, contents


def needs(*packages):
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f'{", ".join(missing)} missing: pip install evavit[export]')


needs_onnx = needs('onnx', 'onnxscript', 'onnxruntime')
# The flags of timm's onnx_export.py, without --aten-fallback and --training of its older exporter.
TIMM = (
    'model',
    'opset',
    'keep_init',
    'dynamic_size',
    'check_forward',
    'batch_size',
    'img_size',
    'mean',
    'std',
    'num_classes',
    'checkpoint',
    'reparam',
    'verbose',
)


def test_flags_are_timms():
    known = config.options_of('export')
    assert set(TIMM) <= set(known)
    assert known['model'].short == '-m' and known['batch_size'].short == '-b' and known['batch_size'].default == 1


NAN, INF = float('nan'), float('inf')


@pytest.mark.parametrize('got', [[1.0, NAN], [NAN, NAN], [INF, 1.0], [1.0, INF], [1.0, 2.1]])
def test_outputs_that_differ_are_no_agreement(got, tmp_path, monkeypatch):
    """NaN and infinity differ from all numbers, and themselves."""
    model = torch.nn.Linear(2, 2)
    torch.nn.init.zeros_(model.weight)
    model.bias = torch.nn.Parameter(torch.tensor([1.0, 2.0] if got[0] == 1 else got))
    monkeypatch.setattr(exporting, 'load_exported', lambda path: lambda images: torch.tensor([got] * len(images)))
    settings = config.parse_settings('export', [])[0]
    with pytest.raises(UserError, match='its output differs from PyTorch'):
        check_forward(model, tmp_path / 'model.onnx', (2,), settings)
    zero = torch.zeros(2, 3)
    for other in (zero[:1], zero[0], zero[:0]):
        with pytest.raises(ValueError, match=r'must be of one shape, and not empty$'):
            exporting.relative_error(other, zero if len(other) else other)
    assert exporting.relative_error(zero, zero) == 0 and exporting.relative_error(zero + 1, zero) == 1


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
    assert not exporting.tensorrt_objections(path)

    # examples/classify.py reads pictures, classes and weights from the file alone.
    picture = Image.fromarray(torch.randint(256, (40, 30, 3), dtype=torch.uint8).numpy())
    classify = load_program('examples/classify.py')
    session, about = classify.load(str(path))
    with torch.no_grad():
        config = resolve_data_config(dict(input_size=(3, 16, 16)), model=model)
        expected = model(create_transform(**config)(picture)[None]).softmax(1)
    assert about['class_names'] == ['apple', 'pear', 'plum']
    got = torch.from_numpy(classify.classify(session, about, [picture])).float()
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@needs_onnx
@pytest.mark.parametrize('mode', ['squash', pytest.param('border', marks=pytest.mark.slow)])
def test_an_onnx_file_says_how_images_are_cropped(call, tmp_path, mode):
    model = timm.create_model('eva_deit_tiny', num_classes=3, **KWARGS).eval()
    torch.nn.init.normal_(model.head.weight)
    folder = save_folder(model, tmp_path / 'hub', data='x', licence='mit', data_config=dict(crop_mode=mode))
    code, out, err = call('export', tmp_path / 'm.onnx', '--checkpoint', folder)
    assert code == 0, out + err
    picture = Image.fromarray(torch.randint(256, (40, 90, 3), dtype=torch.uint8).numpy())
    classify = load_program('examples/classify.py')
    session, about = classify.load(str(tmp_path / 'm.onnx'))
    config = resolve_data_config(model=timm.create_model(f'local-dir:{folder}'))
    assert about['crop_mode'] == config['crop_mode'] == mode
    with torch.no_grad():
        expected = model(create_transform(**config)(picture)[None]).softmax(1)
    got = torch.from_numpy(classify.classify(session, about, [picture])).float()
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@needs_onnx
@pytest.mark.parametrize(
    'node, extra, objections',
    [
        (('Relu', ['x'], ['y']), {}, []),
        (('Resize', ['x', '', 'scales'], ['y']), dict(mode='cubic'), ['Resize']),
        (('ReduceSum', ['x', 'axes'], ['y']), dict(keepdims=1), []),
        (('ReduceSum', ['x', 'free'], ['y']), dict(keepdims=1), ['INT8', 'ReduceSum (axes must be constant)']),
        (('Det', ['x'], ['y']), {}, ['Det']),
        (('FusedGelu', ['x'], ['y']), dict(domain='com.microsoft'), ['com.microsoft::FusedGelu']),
    ],
)
def test_objections_of_tensorrt(tmp_path, node, extra, objections):
    """Operators that its table lacks, restricted ones, other domains, and types of numbers."""
    import onnx
    from onnx import TensorProto, helper

    inputs = [helper.make_tensor_value_info('x', TensorProto.FLOAT, [1, 1, 4, 4])]
    if 'free' in node[1]:
        inputs += [
            helper.make_tensor_value_info('free', TensorProto.INT64, [1]),
            helper.make_tensor_value_info('unused', TensorProto.INT8, [1]),
        ]
    constants = [
        helper.make_tensor('axes', TensorProto.INT64, [1], [2]),
        helper.make_tensor('scales', TensorProto.FLOAT, [4], [1, 1, 2, 2]),
    ]
    graph = helper.make_graph(
        [helper.make_node(*node, **extra)],
        'g',
        inputs,
        [helper.make_tensor_value_info('y', TensorProto.FLOAT, None)],
        constants,
    )
    domains = [helper.make_opsetid('', 20), helper.make_opsetid('com.microsoft', 1)]
    onnx.save(helper.make_model(graph, opset_imports=domains), tmp_path / 'm.onnx')
    assert exporting.tensorrt_objections(tmp_path / 'm.onnx') == objections


def test_weights_of_another_image_size(tmp_path, monkeypatch, capsys):
    """The position embedding of a plain model is resampled as timm does it, which the table says, once."""
    written = []
    script = load_script('export')
    monkeypatch.setattr(
        script, 'write', lambda model, output, *rest: (written.append(model), output.touch(), output)[-1]
    )
    torch.save(timm.create_model('eva_deit_tiny', num_classes=3, **KWARGS).state_dict(), tmp_path / 'w.pth')
    kwargs = [f'{key}={value}' for key, value in KWARGS.items() if key != 'img_size']
    flags = [
        tmp_path / 'm.pt2',
        '-m',
        'eva_deit_tiny',
        '--model-kwargs',
        *kwargs,
        '--num-classes',
        '3',
        '--checkpoint',
        tmp_path / 'w.pth',
        '--input-size',
        '3',
        '20',
        '28',
        '--device',
        'cpu',
    ]
    assert run_script(script.main, [str(flag) for flag in flags]) == 0
    told = capsys.readouterr()
    lines = [line for line in (told.out + told.err).splitlines() if 'pos_embed' in line]
    assert len(lines) == 1 and lines[0].startswith('resized') and '1×16×16 to 1×35×16' in lines[0]
    sized = timm.create_model(
        'eva_deit_tiny',
        num_classes=3,
        **{**KWARGS, 'img_size': (20, 28)},
        pretrained=True,
        pretrained_cfg_overlay=dict(file=str(tmp_path / 'w.pth'), num_classes=3),
    ).eval()
    images = torch.randn(2, 3, 20, 28)
    with torch.no_grad():
        torch.testing.assert_close(written[0](images), sized(images))


def test_a_flag_for_the_size_wins_over_the_checkpoints(train, tmp_path):
    """In whichever way a size was given in training: as either flag, or to the model."""
    run = train('run', '--input-size', '3', '16', '16')
    flags = ['--checkpoint', str(run / 'last.safetensors'), '--img-size', '20']
    settings, given = config.parse_settings('export', flags)
    contents.complete_from_checkpoint(settings, given)
    assert settings.model.img_size == 20 and settings.model.input_size is None
    assert settings.model.model_kwargs == {key: value for key, value in KWARGS.items() if key != 'img_size'}


@needs_onnx
@pytest.mark.slow
def test_pyramid_in_float16(call, tmp_path):
    """Windows and cells that do not divide the grid: padding and masks are in ONNX's operators, too."""
    path = tmp_path / 'model.onnx'
    code, out, err = call(
        'export',
        path,
        '-m',
        'eva_pvt_v2_b3',
        '--num-classes',
        '5',
        '--precision',
        'float16',
        '--img-size',
        '72',
        '--check-forward',
        '--model-kwargs',
        'depths=(1,1,1,1)',
        'embed_dims=(16,32,48,64)',
        'num_heads=(1,2,3,4)',
        'window_size=4',
        'partition_grid=4',
    )
    assert code == 0, out + err
    assert 'random' in out and 'float16' in out and 'agrees with PyTorch' in out
    assert not exporting.tensorrt_objections(path)


@needs_onnx
def test_timms_flags_on_a_model_without_windows(call, tmp_path):
    """Any image size where the model allows it; the version of the operators; weights as inputs."""
    import onnx

    path = tmp_path / 'model.onnx'
    code, out, err = call(
        'export', path, '-m', 'test_byobnet', '--num-classes', '5', '--dynamic-size', '--opset', '20', '--keep-init'
    )
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
    code, out, err = call(
        'export', path, *MODEL, '--num-classes', '3', '--precision', precision, '--check-forward', '--device', 'cpu'
    )
    assert code == 0, out + err
    assert 'agrees with PyTorch' in out
    if precision == 'float32':
        run, images = exporting.load_exported(path), torch.randn(3, 3, 16, 16)
        torch.testing.assert_close(run(images.to(memory_format=torch.channels_last)), run(images))


@pytest.mark.parametrize(
    'flags, message',
    [
        ([], 'no output: the first word is the file to write'),
        (['--model', 'eva_deit_tiny'], 'no output'),
        (['m.tflite'], 'must end in .onnx'),
        (['nowhere/m.onnx'], 'no folder nowhere'),
        (['m.pt2'], 'no model: give --model NAME'),
        (['m.pt2', '--opset', '18'], '--opset is for ONNX files'),
        (['m.pt2', '--dynamic-size'], '--dynamic-size is for ONNX files'),
        (['m.onnx', '--opset', '9'], 'opset, which takes a whole number ≥ 18'),
        (['m.onnx', '--opset', '99'], "'99' does not fit opset, which takes a whole number ≥ 18 and ≤ 25"),
        (['m.onnx', '--precision', 'int8'], '--precision int8 is for .pt2 packages'),
        (['m.onnx', '--precision', 'int4'], 'one of float32'),
        (['m.onnx', '--training'], 'unknown flag --training'),
        (['m.onnx', '--aten-fallback'], 'unknown flag --aten-fallback'),
        (['m.pt2', '--pretrained', '--checkpoint', 'x.pth'], 'both name weights'),
        (['m.pt2', '--checkpoint', 'none.pth'], 'none.pth: no such checkpoint'),
        (['m.pt2', '-m', 'eva_deit_tinny'], 'did you mean eva_deit_tiny?'),
        (['m.pt2', '--quiet'], 'unknown flag --quiet'),
        (['m.onnx', *MODEL, '--dynamic-size'], 'write a file for each size, with --img-size N'),
    ],
)
def test_mistakes(call, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    if importlib.util.find_spec('onnx') is None and flags and flags[0] == 'm.onnx':
        pytest.skip('needs evavit[export]')
    code, _, err = call('export', *flags)
    assert code == 2 and message in err and len(err.splitlines()) == 1, err
    assert not list(tmp_path.iterdir())


def broken_files(folder):
    """Files that are no checkpoint of the tiny model: {name: (flags beside --checkpoint, what the line must say)}."""

    class Code:
        def __reduce__(self):
            return (print, ('this must not run',))

    tiny = timm.create_model('eva_deit_tiny', num_classes=3, **KWARGS).state_dict()
    torch.save(timm.create_model('resnet18', num_classes=3).state_dict(), folder / 'resnet.pth')
    torch.save(
        timm.create_model('eva_deit_tiny', num_classes=3, **{**KWARGS, 'depth': 3}).state_dict(), folder / 'deeper.pth'
    )
    torch.save(tiny, folder / 'tiny.pth')
    torch.save(dict(state_dict=dict(weight=Code())), folder / 'code.pth')
    safetensors.torch.save_file(tiny, folder / 'tiny.safetensors')
    for name in ('tiny.pth', 'tiny.safetensors'):
        whole = (folder / name).read_bytes()
        (folder / f'half_{name}').write_bytes(whole[: len(whole) // 2])
    (folder / 'text.pth').write_text('no weights')
    fit = [*MODEL, '--num-classes', '3']
    return {
        'resnet.pth': (fit, ['not the weights of a Grid', 'conv1.weight']),
        'deeper.pth': (fit, ['does not fit', 'blocks.2', 'arguments']),
        'tiny.pth': ([*MODEL, '--num-classes', '5'], ['has 3 classes', 'has 5', '--num-classes 3']),
        'code.pth': (fit, ['not a readable checkpoint', 'print']),
        'half_tiny.pth': (fit, ['not a readable checkpoint']),
        'half_tiny.safetensors': (fit, ['not a readable checkpoint']),
        'text.pth': (fit, ['not a readable checkpoint']),
    }


def test_bad_weights(call, tmp_path, monkeypatch):
    """Each is one line that names the file and what is wrong with it, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    for name, (flags, words) in broken_files(tmp_path).items():
        code, out, err = call('export', 'm.pt2', '--checkpoint', name, *flags)
        lines = err.splitlines()
        assert code == 2 and len(lines) == 1 and all(word in lines[0] for word in [name, *words]), err
        assert 'this must not run' not in out and not (tmp_path / 'm.pt2').exists()


@pytest.mark.parametrize(
    'flags, words',
    [
        (['--img-size', '18'], ['18']),
        (['--img-size', '0'], ['--img-size', '0', '≥ 1']),
        (['--input-size', '3', '16'], ['--input-size']),
        (['--input-size', '2', '16', '16'], ['2 image channels']),
        (['--in-chans', '1', '--mean', '0.5', '0.5'], ['mean', '1 channel']),
        (['--model-kwargs', 'num_heads=3'], ['num_heads 3']),
        (['--device', 'tpu'], ['--device tpu']),
        (['--num-classes', '0'], ['num_classes', '≥ 1']),
        (['--batch-size', '0'], ['batch_size', '≥ 1']),
        (['--opset', 'new'], ['opset', "'new'"]),
        (['--pretrained'], ['eva_deit_tiny']),
    ],
)
def test_impossible_values(call, tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    code, _, err = call('export', 'm.pt2', *MODEL, *flags)
    assert code == 2 and len(err.splitlines()) == 1 and all(word in err for word in words), err
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named(call, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name, package=None: None if name == 'onnxscript' else True)
    code, _, err = call('export', tmp_path / 'm.onnx', *MODEL)
    assert code == 2 and err == 'error: onnxscript not installed: pip install onnxscript\n'


@needs_onnx
@pytest.mark.parametrize('moment', ['export', 'metadata', 'check'])
def test_a_failed_export_leaves_the_model_that_was_there(call, tmp_path, monkeypatch, moment):
    import onnx
    from onnx import TensorProto, helper

    # What the exporter, which takes seconds, would have written is another graph here.
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in 'xy']
    graph = helper.make_graph([helper.make_node('Relu', ['x'], ['y'])], 'g', values[:1], values[1:])
    content = helper.make_model(graph).SerializeToString()
    monkeypatch.setattr(exporting, 'onnx_export', lambda _, file, *args, **kwargs: Path(file).write_bytes(content))
    path = tmp_path / 'model.onnx'
    before = helper.make_model(graph, producer_name='before').SerializeToString()
    path.write_bytes(before)

    def fail(file, *args, **kwargs):
        for target in (file, *args):
            if isinstance(target, str):
                Path(target).write_text('half')
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    owner, name = dict(export=(exporting, 'onnx_export'), metadata=(onnx, 'save'), check=(onnx.checker, 'check_model'))[
        moment
    ]
    monkeypatch.setattr(owner, name, fail)
    code, _, err = call('export', path, *MODEL, '--num-classes', '3')
    assert code == 2 and len(err.splitlines()) == 1, err
    assert err.startswith(f'error: {path}: ') and f'(the disk is full: {os.strerror(errno.ENOSPC)})' in err
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ['model.onnx']


@needs_onnx
@pytest.mark.parametrize('taken', ['m.onnx', 'm.onnx.data'])
def test_an_output_s_name_that_somebody_took_meanwhile_stays(call, tmp_path, monkeypatch, taken):
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    def export(model, file, *args, **kwargs):  # y = x + weight, with the weight in a file of its own
        values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in ('input0', 'y')]
        weight = numpy_helper.from_array(torch.arange(4.0).numpy(), 'weight')
        graph = helper.make_graph([helper.make_node('Add', ['input0', 'weight'], ['y'])], 'g', *([it] for it in values))
        graph.initializer.append(weight)
        made = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid('', 18)])
        onnx.save(made, file, save_as_external_data=True, location=f'{Path(file).name}.data', size_threshold=0)
        (tmp_path / taken).write_text('mine')

    monkeypatch.setattr(exporting, 'onnx_export', export)
    code, out, err = call('export', tmp_path / 'm.onnx', *MODEL, '--num-classes', '3')
    assert code == 0 and f'the results are in {tmp_path / "m-1.onnx"}' in out + err, out + err
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([taken, 'm-1.onnx', 'm-1.onnx.data'])
    assert (tmp_path / taken).read_text() == 'mine'
    assert exporting.load_exported(tmp_path / 'm-1.onnx')(torch.ones(4)).tolist() == [1, 2, 3, 4]


def test_a_failed_package_leaves_the_one_that_was_there(tmp_path, monkeypatch):
    path = tmp_path / 'model.pt2'
    path.write_text('the package before')

    def fail(program, package_path):
        Path(package_path).write_text('half')
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch._inductor, 'aoti_compile_and_package', fail)
    model = timm.create_model('eva_deit_tiny', num_classes=3, **KWARGS).eval()
    with pytest.raises(OSError):
        exporting.to_package(model, path, (3, 16, 16))
    assert path.read_text() == 'the package before' and [file.name for file in tmp_path.iterdir()] == ['model.pt2']


def test_arguments_of_another_type_are_one_line(tmp_path):
    model = timm.create_model('eva_deit_tiny', num_classes=3, **KWARGS).eval()
    for write in (exporting.to_onnx, exporting.to_package, lambda model, path, size: exporting.to_program(model, size)):
        for given, message in (
            (('eva_deit_tiny', tmp_path / 'x', (3, 16, 16)), r'^model must be a torch\.nn\.Module, .*, got str$'),
            ((model, tmp_path / 'x', 16), r'^input_size must be channels, height and width, .* got 16$'),
            ((model, tmp_path / 'x', (1, 3, 16, 16)), r'^input_size must be .* got \(1, 3, 16, 16\)$'),
            ((model, tmp_path / 'no' / 'x', (3, 16, 16)), r'x: there is no folder .*no; make it first$'),
        ):
            if 'no folder' in message and write not in (exporting.to_onnx, exporting.to_package):
                continue
            with pytest.raises((TypeError, ValueError, OSError), match=message) as error:
                write(*given)
            assert '\n' not in str(error.value)


def test_a_program_leaves_the_mode_of_its_model():
    model = timm.create_model('eva_deit_tiny', num_classes=3, **KWARGS).train()
    model.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    program = exporting.to_program(model, (3, 16, 16))
    assert [module.training for module in model.modules()] == modes and model.training
    x = torch.randn(3, 3, 16, 16)
    torch.testing.assert_close(program.module()(x), model.eval()(x))


@needs_onnx
@pytest.mark.parametrize('content', [None, b'', b'my notes', b'\0' * 64])
def test_files_that_are_no_export_are_a_line(tmp_path, content):
    for read, name in (
        (exporting.onnx_operators, 'a.onnx'),
        (exporting.tensorrt_objections, 'a.onnx'),
        (exporting.load_exported, 'a.onnx'),
        (exporting.load_exported, 'a.pt2'),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(FileNotFoundError if content is None else ValueError, match=re.escape(name)) as error:
            read(tmp_path / name)
        assert '\n' not in str(error.value)


def test_an_archive_of_another_program_is_no_package(tmp_path):
    for member, own in (('thesis.txt', False), ('model/archive_format', True)):
        path = tmp_path / 'm.pt2'
        with zipfile.ZipFile(path, 'w') as file:
            file.writestr(member, 'pt2')
        with contextlib.nullcontext() if own else pytest.raises(UserError, match=r'm\.pt2 is there, and is no \.pt2'):
            check_output(path)


@needs_onnx
@pytest.mark.parametrize('name', ['notes.onnx', pytest.param('notes.pt2', marks=pytest.mark.slow)])
def test_a_file_of_another_kind_is_not_replaced(call, tmp_path, name):
    (tmp_path / name).write_text('my notes')
    code, _, err = call('export', tmp_path / name, *MODEL, '--num-classes', '3')
    assert code == 2 and f'{name} is there, and is no .' in err and err.count('\n') == 1, err
    assert (tmp_path / name).read_text() == 'my notes'
    (tmp_path / name).unlink()
    weights = tmp_path / f'{name}.data'  # where large ones go
    weights.write_text('my notes')
    code, _, err = call('export', tmp_path / name, *MODEL, '--num-classes', '3')
    if name.endswith('.onnx'):
        assert code == 2 and f'{weights} is there, and holds no weights of' in err and err.count('\n') == 1, err
        (tmp_path / name).write_bytes(b'...' + weights.name.encode())  # which has its weights there
        check_output_data(tmp_path / name)
    assert weights.read_text() == 'my notes'
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).symlink_to(tmp_path / 'nowhere')
    with pytest.raises(UserError, match=name):
        check_output(tmp_path / name)
