#!/usr/bin/env python3
"""A run's weights as a folder for the Hugging Face Hub, with a model card:
python tools/save_for_hub.py --checkpoint output/RUN/model_best.safetensors --output FOLDER --data NAME --licence SPDX

--checkpoint takes the run's folder too. Model, recipe, classes and image settings come from the checkpoint; metrics
from what validate.py wrote with --results-file, without it the one by which the run ranked this checkpoint. FOLDER
loads with timm.create_model("local-dir:FOLDER", pretrained=True), a converted model with evavit.load_converted(FOLDER).
"""

import csv
import json
import math
import re
import sys
from pathlib import Path

from evavit.arguments import PREPARATION, Parser, shown
from evavit.errors import UserError, printable, reason_of, run_script
from evavit.files import stored_digest
from evavit.hub import save_folder
from evavit.training import build, contents, data
from evavit.training.config import ModelConfig
from evavit.training.distributed import check_alone

BUILT_FROM = ('model', 'model_kwargs', 'convert', 'convert_kwargs', 'in_chans', 'img_size', 'input_size', *PREPARATION)
METRICS = ('top1', 'top5', 'loss', 'images')
MORE = re.compile(r'ece|(macro|micro|weighted)_(precision|recall|f1_score)')  # with some of validate.py's flags


def main(argv=None):
    parser = Parser(description=__doc__.partition('\n\n')[0])
    parser.add_argument('--checkpoint', required=True, metavar='PATH', help="a run's folder, or a file of its weights")
    parser.add_argument('--output', required=True, metavar='FOLDER', help='folder to write, for the Hub')
    parser.add_argument('--data', required=True, help='what the weights were trained on')
    parser.add_argument('--licence', required=True, help='of the weights, such as apache-2.0')
    parser.add_argument(
        '--results-file', help='metrics: the .csv or .json of validate.py; default: what the run measured'
    )
    parser.add_argument('--overwrite', action='store_true', help='replace files in FOLDER that others wrote')
    args = parser.parse_args(argv)
    check_alone('save_for_hub.py')
    if Path(args.checkpoint).is_dir():
        args.checkpoint = str(contents.best_weights(Path(args.checkpoint)))
    digest = stored_digest(args.checkpoint) if Path(args.checkpoint).is_file() else ''
    saved = contents.saved_settings(args.checkpoint)
    names = saved.get('class_names')
    classes = saved.get('num_classes') or len(names or ())
    fault = None if saved.get('model') and classes else 'holds no settings of train.py'
    if fault is None and ':' in saved['model']:
        fault = f'its model {saved["model"]} would have to be fetched'
    if fault:
        raise UserError(
            f'{args.checkpoint}: {fault}; take another checkpoint, or call evavit.hub.save_folder with your own model'
        )
    config = ModelConfig(**{name: saved.get(name) for name in BUILT_FROM})
    model = build.build_model(config, classes)
    build.load_weights(model, args.checkpoint)
    prepared = data.resolve_input(config, model)
    model.pretrained_cfg['input_size'] = prepared['input_size']  # a model of images of any size keeps no other record
    if args.results_file:
        metrics = read_metrics(args.results_file, args.checkpoint)
    else:
        measured, metric = contents.stored_metric(args.checkpoint), saved.get('eval_metric', 'top1')
        if not isinstance(metric, str):
            raise UserError(f'{args.checkpoint}: not a checkpoint of train.py (its eval_metric is {shown(metric)})')
        metrics = None if measured is None else {metric: round(measured, 4)}
    if stored_digest(args.checkpoint) != digest:
        raise UserError(f'{args.checkpoint}: another file took its place while it was read; start again')
    try:
        folder = save_folder(
            model.eval(),
            args.output,
            data=args.data,
            licence=args.licence,
            recipe=saved,
            label_names=names and [*names, *map(str, range(len(names), classes))],
            metrics=metrics,
            data_config={name: prepared[name] for name in (*PREPARATION, 'input_size')},
            overwrite=args.overwrite,
        )
    except ValueError as error:
        why = str(error).replace('overwrite=True', '--overwrite')
        raise UserError(f'{args.checkpoint}: not saved, {why}') from error
    except OSError as error:
        raise UserError(f'--output {args.output}: cannot be written ({reason_of(error)})') from error
    print(printable(f'{folder}: {", ".join(sorted(path.name for path in folder.iterdir()))}'))


def read_metrics(path, checkpoint):
    """The metrics in a file of validate.py; UserError where it judged other weights than the checkpoint's."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f'--results-file {path}: no such file')
    try:
        with open(path, newline='') as file:
            row = json.load(file) if path.suffix == '.json' else next(csv.DictReader(file))
        metrics = {name: row[name] for name in METRICS} | {name: row[name] for name in row if MORE.fullmatch(name)}
        if not all(math.isfinite(float(value)) for value in metrics.values()):
            raise ValueError('not finite')
    except OSError as error:
        raise UserError(f'--results-file {path}: cannot be read ({reason_of(error)})') from error
    except (ValueError, KeyError, TypeError, StopIteration, RecursionError, csv.Error) as error:
        raise UserError(f'--results-file {path}: not what validate.py writes') from error
    judged, own = row.get('checkpoint_sha256'), stored_digest(checkpoint)[:16]
    if row.get('checkpoint') == '' or (judged and own and judged != own):
        of = row.get('checkpoint') or f'the published weights of {row.get("model")}'
        raise UserError(
            f'--results-file {path}: of other weights ({shown(of)}) than {checkpoint}; let validate.py judge these'
        )
    if contents.has_average(checkpoint) and not row.get('use_ema'):
        raise UserError(
            f'--results-file {path}: not of the averaged weights of {checkpoint}, which are saved; let validate.py '
            f'judge them with --use-ema'
        )
    return metrics


if __name__ == '__main__':
    sys.exit(run_script(main))
