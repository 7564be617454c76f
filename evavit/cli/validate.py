"""Judge a classifier: python validate.py --checkpoint output/RUN/model_best.pth.tar --data-dir DIR

Model, classes and image settings come from the checkpoint, where train.py wrote it; flags win. Any timm model:
python validate.py --model NAME --pretrained --data-dir DIR
"""

import csv
import json
import logging
import os
import sys
from pathlib import Path

import torch
from timm.task import ClassificationEvaluator

from evavit.errors import UserError, run_script
from evavit.training import build, checkpoint, data, loop
from evavit.training.config import parse_settings
from evavit.training.distributed import start_process

log = logging.getLogger('evavit.validate')


def main(argv=None):
    settings, given = parse_settings('validate', argv, __doc__)
    process = start_process(settings.device)
    class_names = checkpoint.complete_from_checkpoint(settings, given)
    if settings.class_map:
        class_names = None
    check_settings(settings)

    dataset, class_names = data.open_dataset(
        settings,
        settings.split,
        class_names=class_names,
        in_chans=build.image_channels(settings),
        num_samples=settings.num_samples,
    )
    model = build.build_model(settings, settings.num_classes)
    settings.num_classes = model.num_classes
    data.class_count(settings, class_names)
    if settings.checkpoint:
        checkpoint.load_checkpoint(model, settings)
    data_config = data.resolve_input(settings, model)
    build.try_model(model, data_config['input_size'], settings)
    loader = data.eval_loader(dataset, settings, data_config, process.device, settings.batch_size)

    log.info(f'{settings.model}: {build.model_line(model)}; on {process.device}, {process.world_size} processes')
    parameters = sum(p.numel() for p in model.parameters())
    model.to(process.device, memory_format=torch.channels_last if settings.channels_last else torch.preserve_format)
    if settings.torchcompile:
        build.check_compile_backend(settings.torchcompile)
        model = torch.compile(model, backend=settings.torchcompile, mode=settings.torchcompile_mode)

    def evaluator_of(max_samples):
        return ClassificationEvaluator(process.device, max_samples=max_samples)

    metrics, images = loop.evaluate(model, loader, evaluator_of, settings, process)
    log.info(
        f'top-1 {metrics["top1"]:.2f} %  top-5 {metrics["top5"]:.2f} %  loss {metrics["loss"]:.4f}  ({images} images)'
    )
    if settings.results_file and process.primary:
        write_results(settings.results_file, result_row(settings, metrics, images, parameters, data_config))


def check_settings(settings):
    if not settings.model:
        raise UserError('no model: give --model NAME, or --checkpoint FILE of a run of train.py')
    if settings.checkpoint and settings.pretrained:
        raise UserError('--pretrained and --checkpoint both name weights: give one of them')
    if not settings.checkpoint and not settings.pretrained:
        raise UserError('no weights to judge: give --checkpoint FILE, or --pretrained for those that timm publishes')
    if settings.use_ema and str(settings.checkpoint).endswith('.safetensors'):
        raise UserError(
            f'--use-ema: {settings.checkpoint} holds one set of weights, the averaged one where the run '
            f'kept an average; leave the flag out'
        )
    if settings.results_file and Path(settings.results_file).suffix not in ('.csv', '.json'):
        raise UserError(f'--results-file {settings.results_file}: the name must end in .csv or .json')


def result_row(settings, metrics, images, parameters, data_config):
    top1, top5 = round(metrics['top1'], 4), round(metrics['top5'], 4)
    return dict(
        model=settings.model,
        top1=top1,
        top1_err=round(100 - top1, 4),
        top5=top5,
        top5_err=round(100 - top5, 4),
        param_count=round(parameters / 1e6, 2),
        img_size=data_config['input_size'][-1],
        crop_pct=data_config['crop_pct'],
        interpolation=data_config['interpolation'],
        loss=round(metrics['loss'], 6),
        images=images,
        checkpoint=settings.checkpoint or '',
    )


def write_results(path, row):
    path = Path(path)
    partial = path.with_name(path.name + '.partial')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, 'w', encoding='utf-8', newline='') as file:
            if path.suffix == '.json':
                json.dump(row, file, indent=2)
            else:
                writer = csv.DictWriter(file, fieldnames=row)
                writer.writeheader()
                writer.writerow(row)
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f'--results-file {path}: cannot be written ({error.strerror})') from error


if __name__ == '__main__':
    sys.exit(run_script(main))
