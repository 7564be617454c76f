"""Write a classifier in a form that runs elsewhere: export.py OUT.onnx --checkpoint FILE

The end of the name chooses the form: .onnx for onnxruntime and TensorRT, .pt2 for a package compiled ahead of time,
which PyTorch runs without this code. Model, classes and image settings come from the checkpoint, where train.py wrote
it; flags win. Flags are those of timm's onnx_export.py.
"""

import importlib.util
import json
import logging
import os
import sys
import zipfile
from pathlib import Path, PurePosixPath
from typing import IO, Any, Dict, List, Optional, Sequence

import numpy as np
import torch
from timm.utils.model import reparameterize_model
from torch import nn

from evavit import export as exporting
from evavit.errors import UserError, reason_of
from evavit.files import open_regular, place_after, replacing_in
from evavit.training import build, checks, contents
from evavit.training.config import ExportConfig, parse_settings
from evavit.training.distributed import start_process

log = logging.getLogger('evavit.export')

NEEDS = {'.onnx': ['onnx', 'onnxscript', 'onnxruntime'], '.pt2': []}  # packages, by the end of the file's name
TOLERANCE = {'float32': 1e-4, 'int8': 1e-4, 'bfloat16': 3e-2, 'float16': 5e-3}  # of the file against PyTorch


def main(argv: Optional[Sequence[str]] = None) -> None:
    words = list(sys.argv[1:] if argv is None else argv)
    output = Path(words.pop(0)) if words and not words[0].startswith('-') else None
    config, given = parse_settings('export', words, __doc__)
    if output is None:
        raise UserError('no output: the first word is the file to write, MODEL.onnx or MODEL.pt2')
    check_settings(config, output)
    process = start_process(config.machine.device if output.suffix == '.pt2' else 'cpu', alone='export.py')
    class_names = contents.complete_from_checkpoint(config, given)
    contents.check_source(config)

    torch.manual_seed(0)
    model = build.build_model(config.model, config.model.num_classes, new_head=False)
    data_config = contents.finish_model(model, config)
    if not config.weights.checkpoint and not config.model.pretrained:
        log.warning('no --checkpoint: the weights are random, good for timing only')
    if config.export.reparam:
        model = reparameterize_model(model)
    if config.export.dynamic_size and exporting.fixed_image_size(model):
        raise UserError(
            f'--dynamic-size: a graph of {config.model.model} holds for one size of image, for which its '
            f'windows and cells are cut; write a file for each size, with --img-size N'
        )
    model = exporting.lower_precision(model.eval(), config.export.precision).to(process.device)

    output = write(model, output, data_config, class_names, config)
    log.info(
        f'{output}: {config.model.model}, {output.stat().st_size / 2**20:.1f} MiB, images '
        f'{"×".join(map(str, data_config["input_size"]))} in {config.export.precision}, any batch'
    )
    if output.suffix == '.onnx':
        report_operators(output)
    if config.export.check_forward:
        check_forward(model, output, data_config['input_size'], config)


def check_settings(config: ExportConfig, output: Path) -> None:
    if output.suffix not in NEEDS:
        raise UserError(
            f'{output}: the name must end in .onnx (for onnxruntime, TensorRT) or .pt2 (a compiled package)'
        )
    if not output.parent.is_dir():
        raise UserError(f'{output}: there is no folder {output.parent}; make it first')
    checks.given_channels(config.model)
    precision = config.export.precision
    if output.suffix != '.onnx':
        for name in ('opset', 'keep_init', 'dynamic_size'):
            if getattr(config.export, name):
                raise UserError(f'--{name.replace("_", "-")} is for ONNX files; {output.name} is a compiled package')
    elif precision in ('bfloat16', 'int8'):
        raise UserError(f'--precision {precision} is for .pt2 packages; ONNX files take float32 or float16')
    needed = NEEDS[output.suffix] + (['torchao'] if precision == 'int8' else [])
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f'{" and ".join(missing)} not installed: pip install {" ".join(missing)}')
    check_place(output)


def check_place(output: Path) -> None:
    """UserError where the output, or the file of its large weights, would take another file's place."""
    check_output(output)
    check_output_data(output)


def check_output(output: Path) -> None:
    """UserError where a file is there, not an empty one, that is none of its name's form."""
    try:
        if not os.path.lexists(output):
            return
        with open_regular(output) as file:
            if not os.fstat(file.fileno()).st_size:
                return
            own = output.suffix != '.pt2' or is_package(file)
    except OSError as error:
        raise UserError(f'{output}: cannot be written ({reason_of(error)}); name another file') from error
    if output.suffix == '.onnx':
        try:
            exporting.onnx_operators(output)
        except ValueError:
            own = False
    if not own:
        raise UserError(f'{output} is there, and is no {output.suffix} file; name another one')


def check_output_data(output: Path) -> None:
    """UserError where the file that an ONNX file's large weights would go to is there, and the ONNX file that is to be
    replaced has none in it."""
    path = output.with_name(f'{output.name}.data')
    if output.suffix != '.onnx' or not os.path.lexists(path):
        return
    if not output.is_file() or path.name.encode() not in output.read_bytes():
        raise UserError(f'{path} is there, and holds no weights of {output}; take it away, or name another file')


def is_package(file: IO[bytes]) -> bool:
    """Whether a file is a zip archive that says that it is one of PyTorch's packages."""
    try:
        with zipfile.ZipFile(file) as archive:
            return any(PurePosixPath(name).name == 'archive_format' for name in archive.namelist())
    except (ValueError, NotImplementedError, zipfile.BadZipFile):
        return False


def write(
    model: nn.Module, output: Path, data_config: Dict[str, Any], class_names: Optional[List[str]], config: ExportConfig
) -> Path:
    """Write the file. Returns its name, which is another where a file of others has that of `output` by now."""
    input_size = data_config['input_size']
    try:
        with replacing_in(output.parent) as folder:
            made = folder / output.name
            if output.suffix == '.pt2':
                exporting.to_package(model, made, input_size)
            else:
                keys = ('input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode')
                about = {key: json.dumps(data_config[key]) for key in keys}
                about |= dict(model=str(config.model.model), class_names=json.dumps(class_names))
                exporting.to_onnx(
                    model,
                    made,
                    input_size,
                    config.export.opset,
                    config.export.keep_init,
                    config.export.dynamic_size,
                    about,
                    config.export.verbose,
                )
            place = place_after(output, check_place)
            if place != output:
                exporting.rename_exported(made, place.name)
            return place
    except Exception as error:  # exporters and compilers have errors of every kind
        if config.export.verbose:
            raise
        raise UserError(
            f'{output}: {config.model.model} could not be exported ({reason_of(error)}); --verbose shows where'
        ) from error


def report_operators(output: Path) -> None:
    operators = exporting.onnx_operators(output)
    log.info('operators: ' + ', '.join(f'{name} ×{count}' for name, count in sorted(operators.items())))
    objections = exporting.tensorrt_objections(output)
    if objections:
        log.warning(f"TensorRT's parser may not read {', '.join(objections)}")


def check_forward(model: nn.Module, output: Path, input_size: Sequence[int], config: ExportConfig) -> None:
    weight = next(model.parameters())
    run, errors = exporting.load_exported(output), []
    dtype = torch.float32 if config.export.precision == 'int8' else weight.dtype
    for batch in sorted({1, 3, config.export.batch_size}):
        images = torch.randn(batch, *input_size).to(weight.device, dtype)
        with torch.no_grad():
            errors.append(exporting.relative_error(run(images), model(images)))
    bound, worst = TOLERANCE[config.export.precision], float(np.max(errors))  # NaN, where one is
    if not worst <= bound:
        raise UserError(
            f"{output}: its output differs from PyTorch's by {worst:.1e}, more than {bound:g}; do not use it"
        )
    log.info(f'agrees with PyTorch to {worst:.1e}')
