"""Evaluate a classifier: validate.py --checkpoint output/RUN/model_best.pth.tar --data-dir DIR

Model, classes and image settings come from the checkpoint, where train.py wrote it; flags win. Any timm model:
validate.py --model NAME --pretrained --data-dir DIR
"""

import csv
import json
import logging
import math
import os
import re
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Set

import torch

from evavit.bench.clocks import median_seconds
from evavit.bench.results import check_place, check_replaced, place_of
from evavit.errors import LocalError, SharedError, UserError, encodable, reason_of
from evavit.files import replacing, stored_digest
from evavit.training import build, checks, contents, data, held_out, loop, report
from evavit.training.agreement import check_agreement
from evavit.training.compilation import Compilation, check_compilation
from evavit.training.config import MachineConfig, ValidateConfig, parse_settings
from evavit.training.distributed import start_process
from evavit.training.stalls import Watchdog

log = logging.getLogger('evavit.validate')

COLUMNS = (  # of a results file
    *('model', 'top1', 'top1_err', 'top5', 'top5_err', 'param_count', 'img_size', 'crop_pct', 'interpolation'),
    *('loss', 'images', 'checkpoint', 'checkpoint_sha256'),
)
OPTIONAL = re.compile('use_ema|ece|(macro|micro|weighted)_(precision|recall|f1_score)|(batch_)?latency_ms')


def main(argv: Optional[Sequence[str]] = None) -> None:
    config, given = parse_settings('validate', argv, __doc__)
    with Watchdog(config.run.stall_timeout) as watchdog:
        judge(config, given, watchdog)


def judge(config: ValidateConfig, given: Set[str], watchdog: Watchdog) -> None:
    """Evaluate what the settings name; `given` are those that flags or a YAML file gave."""
    process = start_process(config.machine.device, watchdog)
    class_names = contents.complete_from_checkpoint(config, given)
    check_settings(config)

    learnt = class_names
    dataset, class_names = data.open_dataset(
        config.data,
        config.data.split,
        class_names=class_names,
        in_chans=checks.image_channels(config.model),
        num_samples=config.data.num_samples,
        batch_size=config.batch.batch_size,
        seed=config.run.seed,
    )
    data.check_labels(learnt, class_names, 'the checkpoint', config.data.class_map)
    held_out.warn_of_held_out(config, data.held_out(dataset))
    digest = checkpoint_digest(config)
    model: Any = build.build_model(config.model, config.model.num_classes, new_head=False)
    data.class_count(config.data, model.num_classes, class_names, dataset)
    report.check_report(config.run.report_dir, model.num_classes)
    data_config = contents.finish_model(model, config)
    if checkpoint_digest(config) != digest:
        raise LocalError(f'{config.weights.checkpoint}: another file took its place while it was read; start again')
    machine = config.machine
    loader = data.eval_loader(
        dataset,
        data_config,
        batch_size=config.batch.batch_size,
        machine=machine,
        device=process.device,
        watchdog=process.watchdog,
    )

    check_agreement(process, config, images=len(dataset), batches=len(loader), class_names=class_names)
    about = build.model_line(model, data_config['input_size'])
    log.info(f'{config.model.model}: {about}; on {process.device}, {process.world_size} processes')
    parameters, classes = sum(p.numel() for p in model.parameters()), model.num_classes
    model, compilation = loop.place_model(model, machine, process.device)

    evaluator = report.PredictionEvaluator(process.device)
    metrics, images = loop.evaluate(
        model,
        loader,
        lambda max_samples: evaluator,
        machine,
        config.run.log_interval,
        process,
        compilation=compilation,
    )
    if not all(map(math.isfinite, metrics.values())):
        told = ', '.join(f'{name} {value:g}' for name, value in metrics.items() if not math.isfinite(value))
        raise SharedError(f'{told}: no result; the outputs of the model are not finite in {_precision(machine)}')
    top5 = f'  top-5 {metrics["top5"]:.2f} %' if classes > 5 else ''  # of five or fewer classes it is always 100
    log.info(f'top-1 {metrics["top1"]:.2f} %{top5}  loss {metrics["loss"]:.4f}  ({images} images)')
    predictions = evaluator.predictions(process)
    more = detailed_metrics(predictions, classes, config.run.metrics_avg)
    if not process.primary:
        return
    if config.run.latency:
        size = data_config['input_size']
        more |= latency(model, size, config.batch.batch_size, process.device, machine, compilation)
    if config.run.results_file:
        row = result_row(config, metrics, images, parameters, data_config, digest)
        judged = dict(use_ema=True) if config.weights.use_ema else {}
        write_results(Path(config.run.results_file), {**row, **judged, **more})
    if config.run.report_dir:
        known = class_names or []
        names = [*map(encodable, known), *map(str, range(len(known), classes))]
        files = report.write_report(Path(config.run.report_dir), predictions, names, check_report_file)
        log.info(f'{", ".join(files[:-1])} and {files[-1]} are in {config.run.report_dir}')


def detailed_metrics(predictions: report.Predictions, classes: int, average: Optional[str]) -> Dict[str, float]:
    """The calibration error, and with `average` precision, recall and F1, in percent; told to the log."""
    found = dict(ece=report.calibration_error(report.calibration(predictions)))
    if average:
        means = report.averages(report.class_metrics(predictions, classes), average)
        found |= {f'{average}_{name}': value for name, value in means.items()}  # timm's names of columns
        log.info(f'{average}: ' + '  '.join(f'{name} {100 * value:.2f} %' for name, value in means.items()))
    log.info(f'calibration error {100 * found["ece"]:.2f} %, over {report.BINS} bins')
    return {name: round(100 * value, 4) for name, value in found.items()}


def latency(
    model: Any,
    input_size: Sequence[int],
    batch_size: int,
    device: torch.device,
    machine: MachineConfig,
    compilation: Compilation,
) -> Dict[str, float]:
    """Median milliseconds of a forward pass of one image and of a batch, in the run's precision; told to the log."""

    def forward(count: int) -> Callable[[], object]:
        order = torch.channels_last if machine.channels_last else torch.contiguous_format
        images = torch.zeros(count, *input_size, device=device).contiguous(memory_format=order)

        def call() -> object:
            with torch.no_grad(), compilation.step(), loop.autocast(machine, device):
                return model(images)

        return call

    seconds: List[float] = [
        *median_seconds([forward(1)], device, repeats=30, warmup=5),
        *median_seconds([forward(batch_size)], device, repeats=5, warmup=1),
    ]
    one, batch = (1e3 * value for value in seconds)
    log.info(
        f'latency {one:.3g} ms for one image, {batch:.3g} ms for {batch_size} '
        f'({1e3 * batch_size / batch:.0f} images a second)'
    )
    return dict(latency_ms=round(one, 4), batch_latency_ms=round(batch, 4))


def _precision(machine: MachineConfig) -> str:
    return f'{machine.amp_dtype}; leave --amp out, or choose another --amp-dtype' if machine.amp else 'float32'


def check_settings(config: ValidateConfig) -> None:
    path, results = config.weights.checkpoint, config.run.results_file
    data.check_division(config.data)
    check_compilation(config.machine.torchcompile, config.machine.torchcompile_mode)
    contents.check_source(config)
    if not path and not config.model.pretrained:
        raise UserError('no weights to judge: give --checkpoint FILE, or --pretrained for those that timm publishes')
    if results and Path(results).suffix not in ('.csv', '.json'):
        raise UserError(f'--results-file {results}: the name must end in .csv or .json')
    if results:
        check_place(Path(results))
        check_replaced(Path(results), _is_own)
    if config.run.report_dir:
        if os.path.lexists(config.run.report_dir) and not os.path.isdir(config.run.report_dir):
            raise UserError(f'--report-dir {config.run.report_dir}: is no folder; name another one')
        check_place(Path(config.run.report_dir, report.PICTURE))
        for name in (*report.TABLES, report.PICTURE):
            check_report_file(Path(config.run.report_dir, name))
        if results and Path(results).resolve() in [
            Path(config.run.report_dir, name).resolve() for name in report.TABLES
        ]:
            raise UserError(f'--results-file {results}: a table of the report has that name; name another file')


def check_report_file(path: Path) -> None:
    """UserError where a file of this name, one of a report's, is there that no report wrote."""
    if path.suffix == '.csv':
        first = next(first for name, first in report.TABLES.items() if path.name.startswith(Path(name).stem))
        check_replaced(path, lambda names, rows: report.is_own_table(first, names, rows))
        return
    try:
        own = not os.path.lexists(path) or report.is_own_picture(path)
    except OSError as error:
        raise UserError(f'{path}: cannot be read ({reason_of(error)}); name another folder') from error
    if not own:
        raise UserError(f'{path} is there, and is no picture of a report; name another folder')


def _is_own(names: List[str], rows: List[Dict[str, Any]]) -> bool:
    """Whether a table is a results file of this program, with nothing added to it: tables of several runs are kept."""
    return (
        tuple(names[: len(COLUMNS)]) == COLUMNS
        and all(OPTIONAL.fullmatch(name) for name in names[len(COLUMNS) :])
        and len(rows) == 1
        and not any(isinstance(cell, (list, dict)) for cell in rows[0].values())
    )


def checkpoint_digest(config: ValidateConfig) -> str:
    """The start of the digest of the file of weights, '' without one: a run that goes on may replace it meanwhile."""
    return stored_digest(config.weights.checkpoint)[:16] if config.weights.checkpoint else ''


def result_row(
    config: ValidateConfig,
    metrics: Dict[str, float],
    images: int,
    parameters: int,
    data_config: Dict[str, Any],
    digest: str,
) -> Dict[str, Any]:
    """`COLUMNS`, under the names of timm's results files where it has them."""
    top1, top5 = round(metrics['top1'], 4), round(metrics['top5'], 4)
    return dict(
        model=config.model.model,
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
        checkpoint=config.weights.checkpoint or '',
        checkpoint_sha256=digest,
    )


def write_results(path: Path, row: Dict[str, Any]) -> None:
    path = place_of(path, _is_own)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with (
            replacing(os.path.realpath(path)) as partial,  # of a link the file that it leads to
            partial.open('w', encoding='utf-8', errors='backslashreplace', newline='') as file,
        ):
            if path.suffix == '.json':
                json.dump(row, file, indent=2)
            else:
                writer = csv.DictWriter(file, fieldnames=list(row))
                writer.writeheader()
                writer.writerow(row)
    except OSError as error:
        raise UserError(f'--results-file {path}: cannot be written ({reason_of(error)})') from error
