#!/usr/bin/env python3
"""Size, CPU time and error of models in every form: python experiments/export/run.py --results-file FILE.csv

On one CPU core and one image at a time, EVA beside timm's softmax model. Time is that of the processor in this process,
which other work on the machine changes less than the clock's; the error is that of the logits of a photograph against
float32 in PyTorch, relative to the largest. With --checkpoint FILE … and --data-dir: top-1 of trained models in every
precision.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import timm
import torch
from PIL import Image
from timm.models import resolve_model_input_args

from evavit import export as exporting
from evavit.bench.results import check_writable, origin, read_rows, store_rows
from evavit.errors import UserError, run_script
from evavit.models import model_names, softmax_twin
from evavit.training import build, checks, contents, data
from evavit.training.config import parse_settings
from evavit.training.data.images import UNREADABLE
from evavit.training.distributed import start_process

COLUMNS = (
    'model',
    'form',
    'precision',
    'img_size',
    'size_mib',
    'cpu_ms',
    'error',
    'top1',
    'images',
    'device',
    'torch',
    'timm',
    'evavit',
    'commit',
    'date',
)
OPERATOR_COLUMNS = (
    'model',
    'precision',
    'img_size',
    'operators',
    'tensorrt',
    'torch',
    'timm',
    'evavit',
    'commit',
    'date',
)
KEY = ('model', 'precision', 'img_size', 'form', 'device', 'torch', 'commit')  # as far as a file has them
FORMS = {'pytorch': exporting.PRECISIONS, 'onnx': ('float32', 'float16'), 'aoti': exporting.PRECISIONS}


def photograph(size: int) -> torch.Tensor:
    """A photograph that comes with scikit-learn, `(1, 3, size, size)`, normalised."""
    from sklearn.datasets import load_sample_image

    pixels = np.asarray(Image.fromarray(load_sample_image('china.jpg')).resize((size, size)), dtype=np.float32)
    return (torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255 - 0.45) / 0.23


def cpu_ms(call, repeats: int) -> float:
    """Median CPU time of a call in milliseconds, after a third as many for warming up."""
    times = []
    for _ in range(repeats + repeats // 3):
        begin = time.process_time()
        call()
        times.append(1000 * (time.process_time() - begin))
    return median(times[repeats // 3 :])


@torch.no_grad()
def measure(
    name: str, model: torch.nn.Module, size: int, form: str, precision: str, folder: Path, repeats: int
) -> dict:
    """A model in one form and precision, on images of `size` pixels a side; an ONNX file with its operators, too."""
    images = photograph(size)
    expected = model(images)
    lower = exporting.lower_precision(model, precision)
    file = folder / f'model.{"onnx" if form == "onnx" else "pt2"}'
    if form == 'pytorch':
        run = lower
        torch.save(lower.state_dict(), file)
    else:
        (exporting.to_onnx if form == 'onnx' else exporting.to_package)(lower, file, (3, size, size))
        run = exporting.load_exported(file)
    if precision != 'int8':
        images = images.to(getattr(torch, precision))
    row = dict(model=name, form=form, precision=precision, img_size=size)
    if form == 'onnx':
        row['operators'] = ' '.join(f'{name}:{count}' for name, count in sorted(exporting.onnx_operators(file).items()))
        row['tensorrt'] = '; '.join(exporting.tensorrt_objections(file))
    return dict(
        row,
        size_mib=f'{file.stat().st_size / 2**20:.1f}',
        error=f'{exporting.relative_error(run(images), expected):.1e}',
        cpu_ms=f'{cpu_ms(lambda: run(images), repeats):.1f}',
    )


@torch.no_grad()
def judge(checkpoint: str, data_dir: str) -> list:
    """Top-1 of a trained model on the validation split, in every precision."""
    flags = ['--checkpoint', checkpoint, '--data-dir', data_dir, '--split', 'validation', '--workers', '0']
    settings, given = parse_settings('validate', [*flags, '--device', 'cpu', '--no-amp'])
    names = contents.complete_from_checkpoint(settings, given)
    if not settings.model.model:
        build.read_weights(checkpoint)  # says what is wrong with a file that cannot be read
        raise UserError(f'--checkpoint {checkpoint}: holds no settings of train.py; name a file that it wrote')
    device, batch = start_process(settings.machine.device).device, settings.batch.batch_size
    in_chans = checks.image_channels(settings.model)
    dataset, found = data.open_dataset(
        settings.data, 'validation', class_names=names, in_chans=in_chans, batch_size=batch, seed=settings.run.seed
    )
    data.check_labels(names, found, 'the checkpoint', settings.data.class_map)
    model = build.build_model(settings.model, settings.model.num_classes)
    config = contents.finish_model(model, settings)
    model.eval()
    loader = data.eval_loader(dataset, config, batch_size=batch, machine=settings.machine, device=device)
    images, labels = map(torch.cat, zip(*loader, strict=True))
    images, labels = images[labels != UNREADABLE], labels[labels != UNREADABLE]
    expected, rows = model(images), []
    for precision in exporting.PRECISIONS:
        logits = exporting.lower_precision(model, precision)(
            images if precision == 'int8' else images.to(getattr(torch, precision))
        ).float()
        rows.append(
            dict(
                model=f'{settings.model.model}, depth {len(model.blocks)}',
                form='pytorch',
                precision=precision,
                img_size=images.shape[-1],
                error=f'{exporting.relative_error(logits, expected):.1e}',
                top1=f'{100 * (logits.argmax(1) == labels).double().mean():.2f}',
                images=len(images),
            )
        )
    return rows


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--model', nargs='+', default=['eva_deit_tiny', 'eva_pvt_v2_b3'], choices=model_names())
    parser.add_argument('--form', nargs='+', default=list(FORMS), choices=list(FORMS))
    parser.add_argument('--precision', nargs='+', choices=exporting.PRECISIONS, help='default: all that a form has')
    parser.add_argument('--checkpoint', nargs='*', default=[], help='trained models, whose top-1 is taken')
    parser.add_argument('--data-dir', help='their data')
    parser.add_argument('--img-size', type=int, default=224)
    parser.add_argument('--repeats', type=int, default=15)
    parser.add_argument('--results-file', type=Path, required=True, help='CSV; replaces rows of the same measurement')
    parser.add_argument('--operators-file', type=Path, help='CSV for the operators of ONNX files')
    args = parser.parse_args(argv)
    if args.checkpoint and not args.data_dir:
        raise UserError('--checkpoint needs --data-dir DIR, with a split validation')
    for path, columns in ((args.results_file, COLUMNS), (args.operators_file, OPERATOR_COLUMNS)):
        if path:
            check_writable(path)
            read_rows(path, columns)
    torch.set_num_threads(1)
    where = origin(torch.device('cpu'))

    def put(path, columns, row):
        told = row | where
        store_rows(path, [{name: told.get(name, '') for name in columns}], columns, KEY)

    def store(row):
        put(args.results_file, COLUMNS, row)
        if 'operators' in row and args.operators_file:
            put(args.operators_file, OPERATOR_COLUMNS, row)
        print(row, flush=True)

    for checkpoint in args.checkpoint:
        for row in judge(checkpoint, args.data_dir):
            store(row)
    for form in args.form:
        for ours in args.model if args.repeats else ():
            for name, kwargs in ((ours, {}), softmax_twin(ours)):
                torch.manual_seed(0)
                kwargs = resolve_model_input_args(name, args=dict(img_size=args.img_size), **kwargs)
                model = timm.create_model(**kwargs).eval()
                for precision in args.precision or FORMS[form]:
                    with tempfile.TemporaryDirectory() as folder:
                        store(measure(name, model, args.img_size, form, precision, Path(folder), args.repeats))


if __name__ == '__main__':
    sys.exit(run_script(main))
