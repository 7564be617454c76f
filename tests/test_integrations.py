"""Other packages' calls on these models: what docs/integrations.md says beyond its blocks, which tests/docs runs."""

import importlib.util
import json
import os
import re
import struct
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import timm
import torch
from runs import CLASSES, MODEL, QUICK, write_images

import evavit
from evavit import export
from evavit.errors import run_script
from evavit.hub import save_folder
from evavit.layers import ATTENTIONS

ROOT = Path(__file__).parents[1]
NEEDS = 'needs evavit[integrations]'
PYRAMID = dict(depths=(1, 1, 1, 1), embed_dims=(16, 32, 48, 64), num_heads=(1, 2, 3, 4))
READOUT = dict(DPT=dict(decoder_readout='ignore'))  # there is no class token to read
PLAIN = dict(img_size=32, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=3)


def test_the_extra_allows_the_versions_that_the_table_names():
    from packaging.requirements import Requirement

    rows = [row for row in (ROOT / 'docs/integrations.md').read_text().splitlines() if row.startswith('| ')]
    text = (ROOT / 'pyproject.toml').read_text()
    extra = re.findall(r'^ +"([^"]+)"', text[text.index('integrations = [') :].split(']\n')[0], re.MULTILINE)
    packages = [Requirement(line) for line in extra if not line.startswith('evavit')]
    assert len(packages) == 8
    for package in packages:
        (version,) = [row.split('|')[3].strip() for row in rows if package.name in row.lower()]
        assert package.specifier.contains(version), package


# segmentation_models.pytorch


@pytest.mark.parametrize(
    'decoder, side',
    [(name, 32) for name in ('UnetPlusPlus', 'MAnet', 'Linknet', 'FPN', 'UPerNet', 'Segformer')]
    + [('Unet', 1), ('PSPNet', 8), ('DPT', 32)],
)
def test_decoders_on_a_pyramid(decoder, side):
    smp = pytest.importorskip('segmentation_models_pytorch', reason='needs evavit[dense]')
    model = smp.create_model(
        decoder, 'tu-eva_pvt_v2_b3', encoder_weights=None, classes=3, **PYRAMID, **READOUT.get(decoder, {})
    )
    height, width = (65, 97) if side == 1 else (64 + side, 128)
    output = model(torch.randn(2, 3, height, width))
    assert output.shape == (2, 3, height, width)
    output.square().mean().backward()
    left_out = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not [name for name in left_out if 'encoder.model.head' not in name]  # the classifier, which DPT leaves there
    if side > 1:
        with pytest.raises(RuntimeError, match=f'divisible by {side}'):
            model(torch.randn(2, 3, 65, 96))


@pytest.mark.parametrize('decoder', ['PAN', 'DeepLabV3', 'DeepLabV3Plus'])
@pytest.mark.parametrize('encoder', ['tu-eva_pvt_v2_b3', 'tu-pvt_v2_b0'])
def test_decoders_that_want_another_stride(decoder, encoder):
    smp = pytest.importorskip('segmentation_models_pytorch', reason='needs evavit[dense]')
    with pytest.raises(TypeError, match='output_stride'):
        smp.create_model(decoder, encoder, encoder_weights=None, classes=3)


def test_decoders_of_a_plain_model():
    smp = pytest.importorskip('segmentation_models_pytorch', reason='needs evavit[dense]')
    arguments = dict(encoder_weights=None, classes=3, decoder_readout='ignore')
    for size in (dict(img_size=(64, 96)), dict(dynamic_img_size=True)):
        model = smp.DPT('tu-eva_deit_tiny', **arguments, **size).eval()
        with torch.no_grad():
            assert model(torch.randn(1, 3, 64, 96)).shape == (1, 3, 64, 96)
    with pytest.raises(ValueError, match='Unsupported model downsampling pattern'):
        smp.Unet('tu-eva_deit_tiny', encoder_weights=None)


# transformers


@pytest.mark.parametrize('name', [f'{name}_deit_tiny' for name in ATTENTIONS] + ['eva_pvt_v2_b3'])
def test_automodel_gives_the_same_logits(tmp_path, name):
    """What is no weight too, such as a fixed projection, which transformers makes on no device first."""
    transformers = pytest.importorskip('transformers', reason=NEEDS)
    model = timm.create_model(name, **(dict(PYRAMID, num_classes=3) if 'pvt' in name else PLAIN)).eval()
    folder = save_folder(model, tmp_path / 'mine', data='x', licence='mit', label_names=['a', 'b', 'c'])
    again = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again(images).logits, model(images))
    assert again.config.id2label == {0: 'a', 1: 'b', 2: 'c'}
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    assert processor.data_config['mean'] == timm.data.resolve_data_config(model=model)['mean']


def test_automodel_builds_a_converted_model_with_softmax(tmp_path):
    """It knows nothing of conversions, and says what weights it leaves out."""
    transformers = pytest.importorskip('transformers', reason=NEEDS)
    vit = timm.create_model('vit_tiny_patch16_224', **{**PLAIN, 'patch_size': 16})
    model = evavit.convert_vit(vit, window_size=1).eval()
    folder = save_folder(model, tmp_path / 'mine', data='x', licence='mit')
    other, report = transformers.AutoModelForImageClassification.from_pretrained(folder, output_loading_info=True)
    assert any('summary_q' in name for name in report['unexpected_keys'])
    assert not any(isinstance(module, evavit.EvaAttention) for module in other.modules())
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(evavit.load_converted(folder).eval()(images), model(images))


def test_a_model_without_a_classifier_is_a_folder_too(tmp_path):
    model = timm.create_model('eva_deit_tiny', **{**PLAIN, 'num_classes': 0}).eval()
    folder = save_folder(model, tmp_path / 'mine', data='x', licence='mit')
    config = json.loads((folder / 'config.json').read_text())
    assert config['num_classes'] == 0 and 'num_classes' not in config['model_args']
    again = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again(images), model(images))


# torch.fx, torchao


def test_an_extractor_of_a_pyramid():
    from timm.models import get_notrace_functions, get_notrace_modules
    from torchvision.models.feature_extraction import create_feature_extractor

    tracer = dict(leaf_modules=get_notrace_modules(), autowrap_functions=get_notrace_functions())
    pyramid = timm.create_model('eva_pvt_v2_b3', **PYRAMID).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        (found,) = create_feature_extractor(pyramid, ['stages.1'], tracer_kwargs=tracer)(images).values()
        assert torch.equal(found, pyramid.forward_intermediates(images, [1], intermediates_only=True)[0])


def test_int8_arithmetic():
    quantization = pytest.importorskip('torchao.quantization', reason='needs evavit[export]')
    torch.manual_seed(0)
    model = timm.create_model('eva_deit_tiny', **PLAIN).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(images)
        quantization.quantize_(model, quantization.Int8DynamicActivationInt8WeightConfig(version=2))
        assert (model(images) - expected).norm() / expected.norm() < 0.05


# torch.onnx.export(dynamo=False)


def older_onnx(model, side, path, batch=2):
    axes = dict(images={0: 'batch'}, logits={0: 'batch'})
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        torch.onnx.export(
            model.eval(),
            torch.randn(batch, 3, side, side),
            path,
            dynamo=False,
            input_names=['images'],
            output_names=['logits'],
            dynamic_axes=axes,
        )


def holds_for_every_batch(model, side, path):
    onnxruntime = pytest.importorskip('onnxruntime', reason='needs evavit[export]')
    older_onnx(model, side, path)
    session = onnxruntime.InferenceSession(path)
    for batch in (1, 5):
        images = torch.randn(batch, 3, side, side)
        (logits,) = session.run(None, dict(images=images.numpy()))
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(logits), model(images), atol=1e-4, rtol=1e-4)


ONE_BATCH = {'scatterbrain', 'combiner', 'long_short', 'reformer'}


@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')
@pytest.mark.parametrize('name', ATTENTIONS)
def test_older_onnx_files_hold_for_every_batch_or_are_not_written(tmp_path, name):
    model = timm.create_model(f'{name}_deit_tiny', **{**PLAIN, 'depth': 1})
    if name in ONE_BATCH:
        with pytest.raises(RuntimeError, match=r'would fail at another batch size.*dynamo=True') as caught:
            older_onnx(model, 32, tmp_path / 'model.onnx')
        assert '\n' not in str(caught.value)
        with torch.no_grad():
            torch.jit.trace(model, torch.randn(2, 3, 32, 32), check_trace=False)  # which is no export
    else:
        holds_for_every_batch(model, 32, tmp_path / 'model.onnx')


@pytest.mark.parametrize(
    'name', [name if name == 'reformer' else pytest.param(name, marks=pytest.mark.slow) for name in sorted(ONE_BATCH)]
)
def test_the_newer_exporter_does_what_the_older_one_cannot(tmp_path, name):
    pytest.importorskip('onnxruntime', reason='needs evavit[export]')
    model = timm.create_model(f'{name}_deit_tiny', **{**PLAIN, 'depth': 1}).eval()
    export.to_onnx(model, tmp_path / 'model.onnx', (3, 32, 32))
    images = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        assert export.relative_error(export.load_exported(tmp_path / 'model.onnx')(images), model(images)) < 1e-4


@pytest.mark.parametrize('options', [dict(window_size=3, partition_grid=3), dict(class_token=True, reg_tokens=2)])
def test_older_onnx_files_of_eva(tmp_path, options):
    """Short windows and cells, prefix tokens."""
    model = timm.create_model('eva_deit_tiny', **{**PLAIN, 'depth': 1}, **options)
    holds_for_every_batch(model, 32, tmp_path / 'model.onnx')


def test_older_onnx_files_of_other_models(tmp_path):
    holds_for_every_batch(timm.create_model('eva_pvt_v2_b3', num_classes=3, **PYRAMID), 64, tmp_path / 'pyramid.onnx')
    vit = timm.create_model('vit_tiny_patch16_224', img_size=64, embed_dim=32, depth=1, num_heads=2, num_classes=3)
    holds_for_every_batch(evavit.convert_vit(vit, window_size=3), 64, tmp_path / 'converted.onnx')
    with pytest.raises(RuntimeError, match=r'EvaAttention: .*would fail at another batch size'):
        older_onnx(timm.create_model('eva_deit_tiny', **PLAIN, overlap=True), 32, tmp_path / 'overlap.onnx')


# timm's scripts: its package does not hold them, so these are stand-ins with their calls

SCRIPT = """
import argparse, json, sys, timm
parser = argparse.ArgumentParser()
parser.add_argument('--model')
args = parser.parse_args()
model = timm.create_model(args.model, depth=1, embed_dim=32, num_heads=2)
print('--result'); print(json.dumps(dict(model=args.model, kind=type(model).__name__, main=__name__)))
"""
BULK = """
import os, subprocess, sys
command = os.getenv('PYTHON_EXEC', sys.executable)
output = subprocess.check_output((command, '-u', *sys.argv[1:], '--model', 'eva_deit_tiny')).decode()
print(output.split('--result')[-1].strip())
print(subprocess.check_output([sys.executable, '-c', 'import sys; print(len(sys.modules))']).decode())
"""


def timm_script(folder, *words):
    environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
    line = [sys.executable, '-m', 'evavit.timm', *map(str, words)]
    return subprocess.run(line, capture_output=True, text=True, cwd=folder, env=environment, check=False)


def test_scripts_of_timm_and_the_processes_that_they_start(tmp_path):
    (tmp_path / 'script.py').write_text(SCRIPT)
    (tmp_path / 'bulk.py').write_text(BULK)
    done = timm_script(tmp_path, 'bulk.py', 'script.py')
    assert done.returncode == 0, done.stderr
    result, modules = done.stdout.strip().splitlines()
    assert json.loads(result) == dict(model='eva_deit_tiny', kind='GridVisionTransformer', main='__main__')
    assert int(modules) < 300  # any other process of Python is left as it is


def test_errors_of_scripts_are_their_own(tmp_path):
    (tmp_path / 'script.py').write_text(SCRIPT)
    done = timm_script(tmp_path, 'script.py', '--model', 'eva_deit_tin')
    assert done.returncode == 1 and 'Traceback' in done.stderr and 'Unknown model (eva_deit_tin)' in done.stderr


@pytest.mark.parametrize('words, line', [((), 'no script is named'), (('nothing.py',), 'nothing.py: no such script')])
def test_no_script_is_one_line(capsys, words, line):
    from evavit.timm import main

    assert main(list(words)) == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith(f"error: {line}; give the path of one in a clone of timm's repository")


# Weights & Biases


def train(tmp_path, *flags):
    from evavit.cli.train import main

    write_images(tmp_path / 'images' / 'train', dict.fromkeys(CLASSES, 8))
    write_images(tmp_path / 'images' / 'val', dict.fromkeys(CLASSES, 4))
    place = ['--data-dir', tmp_path / 'images', '--output', tmp_path / 'output', '--experiment', 'run']
    return run_script(main, list(map(str, [*MODEL, *QUICK, *place, *flags])))


def records_of_wandb(file):
    """The records of a .wandb file: a log as LevelDB writes it behind 7 bytes, in blocks of 32 KiB. Headers of parts:
    checksum (4 bytes), length (2), kind (1) for whole, first, middle or last."""
    from wandb.proto import wandb_internal_pb2

    data, place, parts = file.read_bytes(), 7, []
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        length, kind = struct.unpack('<HB', data[place + 4 : place + 7])
        parts.append(data[place + 7 : place + 7 + length])
        place += 7 + length
        if kind in (1, 4):
            yield wandb_internal_pb2.Record.FromString(b''.join(parts))
            parts = []


def test_wandb_has_the_settings_and_the_rows_of_the_summary(tmp_path, monkeypatch):
    """Offline: what it would send."""
    pytest.importorskip('wandb', reason=NEEDS)

    monkeypatch.setenv('WANDB_MODE', 'offline')
    monkeypatch.setenv('WANDB_SILENT', 'true')
    assert train(tmp_path, '--log-wandb', '--wandb-project', 'fruit', '--wandb-tags', 'small', 'test') == 0
    (file,) = (tmp_path / 'output' / 'run' / 'wandb').glob('offline-run-*/*.wandb')
    records = list(records_of_wandb(file))
    run = next(record.run for record in records if record.HasField('run'))
    history = [record.history.item for record in records if record.HasField('history')]
    rows = [{'.'.join(it.nested_key) or it.key: json.loads(it.value_json) for it in items} for items in history]
    settings = {item.key: item.value_json for item in run.config.update}
    assert (run.project, run.display_name, list(run.tags)) == ('fruit', 'run', ['small', 'test'])
    assert json.loads(settings['lr']) == 1e-3 and json.loads(settings['model']) == 'eva_deit_tiny'
    header, *lines = (tmp_path / 'output' / 'run' / 'summary.csv').read_text().splitlines()
    assert len(rows) == len(lines) == 2
    for row, line in zip(rows, lines, strict=True):
        for name, value in zip(header.split(','), line.split(','), strict=True):
            assert row[name] == pytest.approx(float(value)), name


@pytest.mark.parametrize(
    'flags, line',
    [
        (['--log-wandb'], 'log_wandb needs the package wandb, which is not installed: pip install wandb'),
        (['--wandb-project', 'x'], 'wandb_project does nothing without log_wandb; add --log-wandb'),
        (
            ['--log-wandb', '--wandb-resume-id', 'x'],
            'wandb_resume_id x: goes on with a run that is resumed; add --resume',
        ),
    ],
)
def test_mistakes_with_wandb_are_one_line(tmp_path, monkeypatch, capsys, flags, line):
    found = importlib.util.find_spec
    monkeypatch.setattr('importlib.util.find_spec', lambda name, *args: None if name == 'wandb' else found(name, *args))
    assert train(tmp_path, *flags) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f'error: {line}'
    assert not (tmp_path / 'output').exists()


def test_wandb_that_is_not_logged_in_is_one_line(tmp_path, monkeypatch, capsys):
    wandb = pytest.importorskip('wandb', reason=NEEDS)

    def refuse(**kwargs):
        raise wandb.errors.UsageError('No API key configured.\nUse `wandb login`.')

    monkeypatch.setattr(wandb, 'init', refuse)
    assert train(tmp_path, '--log-wandb') == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith('error: --log-wandb: No API key configured.') and 'WANDB_MODE=offline' in told
