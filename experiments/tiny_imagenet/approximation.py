#!/usr/bin/env python3
"""How near does each attention come to a trained softmax? python experiments/tiny_imagenet/approximation.py …

    python experiments/tiny_imagenet/attentions.py --data-dir DIR --only table2-softmax-s0 --epochs 30 \
        --warmup-epochs 4 --output output/attentions_30
    python experiments/tiny_imagenet/approximation.py --checkpoint output/attentions_30/table2-softmax-s0 \
        --data-dir DIR --results-file FILE.csv
    python experiments/tiny_imagenet/approximation.py --report --results-file FILE.csv

Queries, keys and values are those of every layer of a trained network with softmax attention, for --pictures of the
validation split (128). Each attention of `evavit.compare` takes them, and its error is the relative RMS of its output
against softmax attention, over all these pictures. What an attention learns is not trained, as in `python -m
evavit.compare`: the projection of EVA's summaries is the identity, those of Linformer and Long-Short are random, parts
that softmax attention lacks are left out. `mean` gives every token the same weight.

A row of --results-file an attention and size: the error of each layer, and their mean. A name says the windows and
cells in tokens and number: eva-E16-C64. `eva` is the paper's, whose summaries LayerNorm scales; `eva_converted` has the
means of queries and keys as they are, and a cell counts for its tokens outside of the window, as `convert_vit` starts.
The others have three sizes each, E4, E16 and E64: their windows or landmarks, and features in proportion.
"""

import hashlib
import json
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

from evavit.bench.compare import make_attention, relative_rms, softmax_exactly
from evavit.bench.results import ORIGIN, origin, read_rows
from evavit.errors import UserError, run_script
from evavit.layers import SoftmaxAttention
from evavit.training import build, checks, contents, data
from evavit.training.config import parse_settings
from evavit.training.distributed import start_process

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))

from driver import check_data, chosen, drive, link_pictures, make_output, parse, parser_of, rows_to_report, save_plot  # noqa: E402
from tiny_imagenet.attentions import SIDES, TABLE2  # noqa: E402

EVA = {  # how a cell's summary is made, and how often it counts
    'eva': {},
    'eva_converted': dict(summary='identity', count_cells='outside'),
}
COLUMNS = (
    'run',
    'attention',
    'arguments',
    'tokens_in_E',
    'cells',
    'error',
    'layers',
    'pictures',
    'checkpoint',
    'checkpoint_sha256',
    'seconds',
    *ORIGIN,
)


class Job(NamedTuple):
    """An attention, its `arguments` as JSON, and the sides of its windows and its grid of cells, 0 for none."""

    name: str
    attention: str
    arguments: str = '{}'
    window: int = 0
    cells: int = 0


def all_jobs():
    """Every attention and size."""
    yield Job('mean', 'mean')
    for kind, options in EVA.items():
        for window in SIDES:
            for cells in SIDES[1:]:
                sizes = dict(window_size=window, partition_grid=cells)
                yield Job(
                    f'{kind}-E{window**2}-C{cells**2}', 'eva', json.dumps(sizes | options), window=window, cells=cells
                )
    for name, arguments in TABLE2.items():
        if name != 'eva':
            for side in SIDES[1:] if arguments else (0,):
                size = f'-E{side**2}' if side else ''
                yield Job(f'{name}{size}', name, json.dumps(scaled(arguments, side)), window=side)


def scaled(arguments, side):
    """Arguments for windows and landmarks of 4 a side, at another side; what is a number of tokens in proportion."""
    sides = ('window_size', 'landmark_grid')
    return {key: side if key in sides else max(1, round(value * side**2 / 16)) for key, value in arguments.items()}


def check_checkpoint(args):
    """Make --checkpoint a file and note its digest; UserError where there is none, or the rows are of another one."""
    if args.checkpoint is None:
        raise UserError('give --checkpoint RUN, the folder of a run of softmax_deit_tiny')
    if args.checkpoint.is_dir():
        args.checkpoint /= 'last.safetensors'
    if not args.checkpoint.is_file():
        raise UserError(f'--checkpoint {args.checkpoint}: no such file; name the folder of a run of softmax_deit_tiny')
    args.digest = hashlib.sha256(args.checkpoint.read_bytes()).hexdigest()[:16]
    for row in read_rows(args.results_file, COLUMNS):
        if (row['checkpoint_sha256'], row['pictures']) != (args.digest, str(args.pictures)):
            raise UserError(f'{args.results_file}: its rows are of another checkpoint or --pictures; name another file')


def chosen_pictures(folder, count):
    """`count` pictures of the validation split, spread over all of it."""
    found = sorted((folder / 'val').glob('*/*'))
    if count > len(found):
        raise UserError(f'--pictures {count}: {folder / "val"} has {len(found)}')
    return [found[number * len(found) // count] for number in range(count)]


@torch.no_grad()
def trained_qkv(args, pictures):
    """The layers' `(3, B, h, N, d)` in float32 on the device, and the grid."""
    flags = ['--checkpoint', args.checkpoint, '--data-dir', pictures, '--split', 'val', '--workers', 0, '-b', 32]
    settings, given = parse_settings('validate', [*map(str, flags), *args.flags])
    device = start_process(settings.machine.device).device
    contents.complete_from_checkpoint(settings, given)
    in_chans = checks.image_channels(settings.model)
    dataset, _ = data.open_dataset(settings.data, 'val', batch_size=settings.batch.batch_size, in_chans=in_chans)
    model = build.build_model(settings.model, settings.model.num_classes)
    config = contents.finish_model(model, settings)
    layers = [module for module in model.modules() if isinstance(module, SoftmaxAttention)]
    if not layers or any(layer.num_prefix_tokens for layer in layers):
        raise UserError(
            f'--checkpoint {args.checkpoint}: its model {settings.model.model} has no softmax attention on a '
            f'grid alone; name a run of softmax_deit_tiny'
        )
    grids, found = set(), [[] for _ in layers]
    for layer, seen in zip(layers, found, strict=True):

        def look(layer, inputs, seen=seen):
            x, feat_size = inputs
            grids.add(tuple(feat_size))
            seen.append(torch.stack(layer.project_tokens(x)))

        layer.register_forward_pre_hook(look)
    model = model.to(device).eval()
    load = dict(batch_size=settings.batch.batch_size, machine=settings.machine, device=device)
    for images, _ in data.eval_loader(dataset, config, **load):
        model(images)
    return [torch.cat(seen, 1) for seen in found], list(grids.pop())


@torch.no_grad()
def errors(job, layers, feat_size):
    """The relative RMS of each layer."""
    for qkv in layers:
        if job.attention == 'mean':
            output = qkv[2].mean(2, keepdim=True).expand_as(qkv[2])
        else:
            _, _, heads, _, d = qkv.shape
            sizes = dict(dim=heads * d, num_heads=heads)
            layer = make_attention(job.attention, feat_size, **sizes, **json.loads(job.arguments))
            output = layer.to(qkv.device).attend(qkv, feat_size)
        yield round(relative_rms(output, softmax_exactly(qkv)), 5)


def run(job, args, layers, feat_size):
    """The row of one attention and size."""
    began = time.monotonic()
    found = list(errors(job, layers, feat_size))
    return dict(
        run=job.name,
        attention=job.attention,
        arguments=job.arguments,
        tokens_in_E=job.window**2,
        cells=job.cells**2,
        error=round(sum(found) / len(found), 5),
        layers=json.dumps(found),
        pictures=layers[0].shape[1],
        checkpoint=args.checkpoint.parent.name,
        checkpoint_sha256=args.digest,
        seconds=round(time.monotonic() - began, 1),
        **origin(layers[0].device),
    )


def table(rows):
    """Markdown: the mean error of EVA over windows and cells, and that of the others by size."""
    errors = {row['run']: float(row['error']) for row in rows}
    for kind in EVA:
        yield f'\n| `{kind}` | ' + ' | '.join(f'C {side**2}' for side in SIDES[1:]) + ' |'
        yield '|---|' + '---|' * len(SIDES[1:])
        for window in SIDES:
            names = [f'{kind}-E{window**2}-C{cells**2}' for cells in SIDES[1:]]
            yield f'| E {window**2} | ' + ' | '.join(shown(errors.get(name)) for name in names) + ' |'
    yield '\n| | ' + ' | '.join(f'size {side**2}' for side in SIDES[1:]) + ' |'
    yield '|---|' + '---|' * len(SIDES[1:])
    for name, arguments in (('mean', {}), *TABLE2.items()):
        if name != 'eva':
            names = [f'{name}-E{side**2}' if arguments else name for side in SIDES[1:]]
            yield f'| `{name}` | ' + ' | '.join(shown(errors.get(name)) for name in names) + ' |'


def shown(error):
    return '–' if error is None else f'{error:.3f}'


def plot(rows, results):
    """The error by layer at the sizes of Table 2; and that of EVA over its windows, a line a number of cells."""
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        1, 1 + len(EVA), figsize=(14, 4), sharey=True, layout='constrained', width_ratios=[1.6, 1, 1]
    )
    by_name = {row['run']: row for row in rows}
    panels[0].set_prop_cycle(color=plt.colormaps['tab20'].colors)
    panels[0].xaxis.get_major_locator().set_params(integer=True)
    for name in (*(f'{kind}-E16-C16' for kind in EVA), *(f'{name}-E16' for name in TABLE2), 'mean'):
        if name in by_name:
            style = (
                dict(color='black', linestyle=':')
                if name == 'mean'
                else dict(linewidth=2.5 if name[:3] == 'eva' else 1)
            )
            found = json.loads(by_name[name]['layers'])
            panels[0].plot(range(1, len(found) + 1), found, marker='.', label=name.split('-')[0], **style)
    panels[0].set(title='16 tokens in E, 16 cells or landmarks', xlabel='layer', ylabel='relative error', yscale='log')
    panels[0].set_yticks([0.2, 0.3, 0.5, 1, 1.5], ['0.2', '0.3', '0.5', '1', '1.5'])
    panels[0].minorticks_off()
    panels[0].legend(fontsize=7, loc='center left', bbox_to_anchor=(1, 0.5))
    for panel, kind in zip(panels[1:], EVA, strict=True):
        for cells in SIDES[1:]:
            names = {window**2: f'{kind}-E{window**2}-C{cells**2}' for window in SIDES}
            points = {tokens: float(by_name[name]['error']) for tokens, name in names.items() if name in by_name}
            panel.plot(list(points), list(points.values()), marker='o', label=f'C {cells**2}')
        panel.set(title=kind, xlabel='tokens in E')
        panel.legend()
    save_plot(figure, results)


def main(argv=None):
    parser = parser_of(__doc__, 'output/tiny_imagenet_approximation')
    parser.add_argument('--checkpoint', type=Path, metavar='RUN', help='folder of a trained run, or its weights')
    parser.add_argument('--pictures', type=int, default=128, help='of the validation split (128)')
    parser.add_argument(
        '--report', action='store_true', help='print the tables and draw the plot beside --results-file'
    )
    args = parse(parser, argv)
    jobs = chosen(all_jobs(), args)
    if args.report and not args.list:
        rows = rows_to_report(args, COLUMNS)
        print('\n'.join(table(rows)))
        plot(rows, args.results_file)
        return
    layers = feat_size = None
    if not args.list:
        check_data(args)
        check_checkpoint(args)
        make_output(args)
        pictures = args.output / f'pictures-{args.pictures}'
        layers, feat_size = trained_qkv(args, link_pictures(pictures, chosen_pictures(args.data_dir, args.pictures)))
    drive(
        args,
        jobs,
        COLUMNS,
        run=lambda job, rows, left: run(job, args, layers, feat_size),
        says=lambda row: f'error {row["error"]}, {row["seconds"]} s',
    )


if __name__ == '__main__':
    sys.exit(run_script(main))
