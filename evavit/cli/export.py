"""Write a classifier in a form that runs elsewhere: python export.py OUT.onnx --checkpoint FILE

The end of the name chooses the form: .onnx for onnxruntime and TensorRT, .pt2 for a package compiled ahead of time,
which PyTorch runs without this code. Model, classes and image settings come from the checkpoint, where train.py wrote
it; flags win. Flags are those of timm's onnx_export.py.
"""

import importlib.util
import json
import logging
import sys
from pathlib import Path

import torch
from timm.utils.model import reparameterize_model

from evavit import export as exporting
from evavit.errors import UserError, first_line, run_script
from evavit.training import build, checkpoint, data
from evavit.training.config import parse_settings
from evavit.training.distributed import start_process

log = logging.getLogger('evavit.export')

NEEDS = {'.onnx': ('onnx', 'onnxscript', 'onnxruntime'), '.pt2': ()}
TOLERANCE = {'float32': 1e-4, 'int8': 1e-4, 'bfloat16': 3e-2, 'float16': 5e-3}  # of the file against PyTorch


def main(argv=None):
    words = list(sys.argv[1:] if argv is None else argv)
    output = Path(words.pop(0)) if words and not words[0].startswith('-') else None
    settings, given = parse_settings('export', words, __doc__)
    check_settings(settings, output)
    process = start_process(settings.device if output.suffix == '.pt2' else 'cpu')
    class_names = checkpoint.complete_from_checkpoint(settings, given)
    if not settings.model:
        raise UserError('no model: give --model NAME, or --checkpoint FILE of a run of train.py')

    torch.manual_seed(0)
    model = build.build_model(settings, settings.num_classes)
    if settings.checkpoint:
        checkpoint.load_checkpoint(model, settings)
    elif not settings.pretrained:
        log.warning('no --checkpoint: the weights are random, good for timing only')
    data_config = data.resolve_input(settings, model)
    build.try_model(model, data_config['input_size'], settings)
    if settings.reparam:
        model = reparameterize_model(model)
    if settings.dynamic_size and exporting.fixed_image_size(model):
        raise UserError(
            f'--dynamic-size: a graph of {settings.model} holds for one size of image, for which its '
            f'windows and cells are cut; write a file for each size, with --img-size N'
        )
    model = exporting.lower_precision(model.eval(), settings.precision).to(process.device)

    write(model, output, data_config, class_names, settings)
    log.info(
        f'{output}: {settings.model}, {output.stat().st_size / 2**20:.1f} MiB, images '
        f'{"×".join(map(str, data_config["input_size"]))} in {settings.precision}, any batch'
    )
    if output.suffix == '.onnx':
        report_operators(output)
    if settings.check_forward:
        check_forward(model, output, data_config['input_size'], settings)


def check_settings(settings, output):
    if output is None:
        raise UserError('no output: the first word is the file to write, MODEL.onnx or MODEL.pt2')
    if output.suffix not in NEEDS:
        raise UserError(
            f'{output}: the name must end in .onnx (for onnxruntime, TensorRT) or .pt2 (a compiled package)'
        )
    if not output.parent.is_dir():
        raise UserError(f'{output}: there is no folder {output.parent}; make it first')
    if settings.checkpoint and settings.pretrained:
        raise UserError('--pretrained and --checkpoint both name weights: give one of them')
    build.image_channels(settings)
    if settings.aten_fallback or settings.training:
        flag = '--aten-fallback' if settings.aten_fallback else '--training'
        raise UserError(
            f"{flag} belongs to timm's TorchScript exporter; here PyTorch's newer one writes graphs for "
            f"inference in ONNX's own operators: leave it out"
        )
    if output.suffix != '.onnx':
        for name in ('opset', 'keep_init', 'dynamic_size'):
            if getattr(settings, name):
                raise UserError(f'--{name.replace("_", "-")} is for ONNX files; {output.name} is a compiled package')
    elif settings.precision in ('bfloat16', 'int8'):
        raise UserError(f'--precision {settings.precision} is for .pt2 packages; ONNX files take float32 or float16')
    needed = NEEDS[output.suffix] + (('torchao',) if settings.precision == 'int8' else ())
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{' and '.join(missing)} not installed: pip install 'evavit[export]'")


def write(model, output, data_config, class_names, settings):
    input_size = data_config['input_size']
    try:
        if output.suffix == '.pt2':
            exporting.to_package(model, output, input_size)
        else:
            about = {
                key: json.dumps(data_config[key]) for key in ('input_size', 'mean', 'std', 'interpolation', 'crop_pct')
            }
            about |= dict(model=settings.model, class_names=json.dumps(class_names))
            exporting.to_onnx(
                model,
                output,
                input_size,
                settings.opset,
                settings.keep_init,
                settings.dynamic_size,
                about,
                settings.verbose,
            )
    except Exception as error:  # exporters and compilers have errors of every kind
        if settings.verbose:
            raise
        raise UserError(
            f'{output}: {settings.model} could not be exported ({first_line(error)[:300]}); --verbose shows where'
        ) from error


def report_operators(output):
    operators = exporting.onnx_operators(output)
    log.info('operators: ' + ', '.join(f'{name} ×{count}' for name, count in sorted(operators.items())))
    objections = exporting.tensorrt_objections(output)
    if objections:
        log.warning(f"TensorRT's parser may not read {', '.join(objections)}")


def check_forward(model, output, input_size, settings):
    weight = next(model.parameters())
    run, worst = exporting.load_exported(output), 0.0
    dtype = torch.float32 if settings.precision == 'int8' else weight.dtype
    for batch in sorted({1, 3, settings.batch_size}):
        images = torch.randn(batch, *input_size).to(weight.device, dtype)
        with torch.no_grad():
            worst = max(worst, exporting.relative_error(run(images), model(images)))
    bound = TOLERANCE[settings.precision]
    if not worst <= bound:
        raise UserError(
            f"{output}: its output differs from PyTorch's by {worst:.1e}, more than {bound:g}; do not use it"
        )
    log.info(f'agrees with PyTorch to {worst:.1e}')


if __name__ == '__main__':
    sys.exit(run_script(main))
