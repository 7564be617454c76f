#!/usr/bin/env python3
"""Does a converted ViT get its accuracy back? python experiments/tiny_imagenet/run.py --data-dir DIR

    python experiments/tiny_imagenet/build.py DIR --source tiny-imagenet-200
    python experiments/tiny_imagenet/run.py --data-dir DIR --list
    python experiments/tiny_imagenet/run.py --data-dir DIR --seconds 500 --results-file FILE.csv
    python experiments/tiny_imagenet/run.py --report --results-file FILE.csv

A DeiT-Tiny with a class token is trained (parent.yaml), converted to EVA at three sizes of windows and cells, each with
every way to count the cells, and trained on (convert.yaml) on the labels alone, with the parent's logits, or with its
logits and tokens. E256-C0 is the parent itself, trained on alike. EVA from scratch has the parent's budget. A name
such as E16-C64-outside-logit-5-s0 says: windows of 16 tokens, 64 cells, count_cells, what is compared with the parent,
epochs, seed.

Every run is one of train.py, judged by validate.py on the publisher's validation pictures once, at its end; a row of
--results-file is written then. The runs come in the order of --list. After a stop (SIGTERM, or --seconds are over) the
same command goes on within the epoch. Several processes may share the runs (one a GPU, by CUDA_VISIBLE_DEVICES): each
takes the next that no other has. Flags that the driver does not know go to train.py; --epochs is the budget of the
parent and of EVA from scratch, a converted network's is in its run's name.
"""

import csv
import sys
import time
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

from evavit.errors import run_script
from evavit.training.checkpoint import remove_checkpoints
from evavit.training.config import parse_settings
from evavit.training.distributed import start_process

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))

from driver import (  # noqa: E402
    ABOUT,
    about,
    check_data,
    chosen,
    drive,
    finished,
    judge,
    make_output,
    parse,
    parser_of,
    read_number,
    rows_to_report,
    save_plot,
    state_of,
    train_to_end,
)

CELLS = {'E16-C16': (4, 4), 'E16-C64': (4, 8), 'E64-C64': (8, 8)}  # window side, cells a side; the grid has 16 × 16
WHOLE = {'E256-C0': (16, 0)}  # softmax as before: the parent trained on as long as a conversion is
SIZES = CELLS | WHOLE
COUNTS = ('outside', 'one', 'all')  # count_cells; the first is the default
KINDS = {  # what is compared with the parent
    'ce': [],
    'logit': ['--kd-model-name', 'parent', '--kd-distill-type', 'logit', '--kd-temperature', '2'],
    'both': [
        *('--kd-model-name', 'parent', '--kd-distill-type', 'logit+feature', '--kd-temperature', '2'),
        *('--kd-feature-level', 'tokens'),
    ],
}
LONG = 20  # epochs after a conversion, where the most is asked
SHORT = 5
BEST = 'best'  # of KINDS, by the held pictures after SHORT epochs with the fewest tokens and cells
COLUMNS = (
    'run',
    'model',
    'window_size',
    'partition_grid',
    'count_cells',
    'kind',
    'epochs',
    'seed',
    'top1',
    'top5',
    'held_top1',
    'images',
    'train_seconds',
    'train_images_per_second',
    'seconds',
    *ABOUT,
)


class Job(NamedTuple):
    """A run. `epochs` 0 is a conversion that is judged as it is; `None` are as many as the YAML file says."""

    name: str
    file: str  # with the settings
    cells: str = ''  # of SIZES
    count: str = ''
    kind: str = ''
    epochs: object = None
    seed: int = 0


def converted(cells, kind, epochs, count=COUNTS[0], seed=0):
    name = f'{cells}-{count}-{kind}-{epochs}-s{seed}' if epochs else f'{cells}-{count}-0'
    return Job(name, 'convert.yaml', cells, count, kind, epochs, seed)


PARENT = Job('parent-s0', 'parent.yaml')


def all_jobs():
    """Every run, the most telling first."""
    yield PARENT
    for cells in CELLS:
        for count in COUNTS:
            yield converted(cells, '', 0, count)
    for cells, kind in (*((cells, 'both') for cells in CELLS), ('E16-C16', 'ce')):
        yield converted(cells, kind, LONG)
    yield Job('scratch-s0', 'parent.yaml')
    first, *others = CELLS
    for kind in ('both', 'ce', 'logit'):
        yield converted(first, kind, SHORT)
    for seed in (1, 2):
        for cells in CELLS:
            yield converted(cells, BEST, LONG, seed=seed)
    yield converted(first, 'logit', LONG)
    for kind in ('logit', 'ce'):
        yield converted(next(iter(WHOLE)), kind, LONG)
    for cells in others:
        for kind in ('both', 'ce', 'logit'):
            yield converted(cells, kind, SHORT)
        for kind in ('ce', 'logit'):
            yield converted(cells, kind, LONG)
    for cells in CELLS:
        for count in COUNTS[1:]:
            yield converted(cells, BEST, SHORT, count)
        yield converted(cells, BEST, 1)


def resolve(job, rows):
    """The job with its kind chosen, None while the runs that choose it are not there."""
    if job.kind != BEST:
        return job
    wanted = {converted(next(iter(CELLS)), kind, SHORT).name: kind for kind in KINDS}
    found = {wanted[row['run']]: float(row['held_top1']) for row in rows if row['run'] in wanted}
    return job._replace(kind=max(found, key=found.__getitem__)) if len(found) == len(KINDS) else None


def state(job, rows, output):
    found = state_of(job, rows, output)
    if found != 'done':
        if job.cells and not finished(output / PARENT.name):
            return f'waits for {PARENT.name}'
        if resolve(job, rows) is None:
            return f'waits for the runs of {SHORT} epochs with each kind'
    return found


def flags_of(job, args):
    """The flags of train.py. None of them is left to a default that the YAML file or the name does not say."""
    flags = ['-c', str(HERE / job.file), '--data-dir', str(args.data_dir), '--seed', str(job.seed)]
    flags += ['--output', str(args.output), '--experiment', job.name, '--resume', 'auto']
    if job.name.startswith('scratch'):
        flags += ['--model', 'eva_deit_tiny', '--model-kwargs', 'window_size=4', 'partition_grid=4']
    if job.cells:
        flags += ['--initial-checkpoint', str(args.output / PARENT.name / 'last.safetensors'), *convert_flags(job)]
        flags += KINDS[job.kind]
    flags += args.flags
    return flags if job.epochs is None else [*flags, '--epochs', str(job.epochs)]


def convert_flags(job):
    window, cells = SIZES[job.cells]
    return [
        *('--convert', 'eva', '--convert-kwargs'),
        *(f'window_size={window}', f'partition_grid={cells}', f'count_cells={job.count}'),
    ]


def run(job, args, seconds_left):
    """Train what is to be trained, judge it, and return the row."""
    began, folder = time.monotonic(), args.output / job.name
    settings, _ = parse_settings(
        'train', flags_of(job._replace(kind=job.kind or 'ce', epochs=job.epochs or None), args)
    )
    weights, held = folder / 'last.safetensors', ''
    if job.epochs == 0:
        weights = args.output / PARENT.name / 'last.safetensors'
        folder.mkdir(parents=True, exist_ok=True)
    else:
        train_to_end(flags_of(job, args), folder, seconds_left)
    if job.epochs != 0:
        with open(folder / 'summary.csv', newline='') as file:
            epochs = list(csv.DictReader(file))
        held = epochs[-1]['eval_top1']
    extra = convert_flags(job) if job.epochs == 0 else []
    result = judge(weights, args.data_dir, settings, folder, extra)
    device = start_process(settings.machine.device).device
    window, cells = SIZES.get(job.cells, ('', ''))
    file = HERE / job.file if job.epochs == 0 else folder / 'args.yaml'
    return dict(
        run=job.name,
        model=settings.model.model,
        window_size=window,
        partition_grid=cells,
        count_cells=job.count,
        kind=job.kind,
        epochs=0 if job.epochs == 0 else settings.schedule.epochs,
        seed=job.seed,
        top1=result['top1'],
        top5=result['top5'],
        held_top1=held,
        images=result['images'],
        train_seconds=read_number(folder / 'train_seconds'),
        train_images_per_second=max(float(row['train_images_per_second']) for row in epochs) if held else '',
        seconds=round(time.monotonic() - began, 1),
        **about(job, file, args, device),
    )


def tidy(job, args):
    """The checkpoints of 40 runs are gigabytes."""
    if job.epochs != 0 and job.name != PARENT.name:
        remove_checkpoints(args.output / job.name)


def table(rows):
    """Markdown: top-1 of each size and count over kind and epochs, as mean ± standard deviation over the seeds."""
    groups = {}
    for row in rows:
        name = row['run'].rsplit('-s', 1)[0]
        groups.setdefault(name, []).append(row)
    yield '| run | windows | cells | count_cells | compared with the parent | epochs | top-1 | to the parent | seeds |'
    yield '|---|---|---|---|---|---|---|---|---|'
    parents = [float(row['top1']) for row in rows if row['run'].startswith('parent')]
    for name, found in groups.items():
        values, row = [float(row['top1']) for row in found], found[0]
        spread = f'{mean(values):.2f}' + (f' ± {stdev(values):.2f}' if len(values) > 1 else '')
        gap = f'{mean(values) - mean(parents):+.2f}' if parents else '–'
        window, cells = (f'{row[key]} × {row[key]}' if row[key] else '–' for key in ('window_size', 'partition_grid'))
        yield (
            f'| {name} | {window} | {cells} | {row["count_cells"] or "–"} | {row["kind"] or "–"} | {row["epochs"]} '
            f'| {spread} | {gap} | {len(found)} |'
        )


def plot(rows, results):
    """Accuracy over epochs, a panel a size, a line a kind; the parent and the bare conversion as level lines."""
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(CELLS), figsize=(10, 3.2), sharey=True, layout='constrained')
    for panel, (cells, (window, grid)) in zip(panels, CELLS.items(), strict=True):
        panel.set_title(f'windows {window} × {window}, cells {grid} × {grid}')
        for row in rows:
            if row['run'].startswith(('parent', 'scratch')) and row['run'].endswith('-s0'):
                style = dict(color='black', linestyle='-' if row['run'].startswith('parent') else ':')
                panel.axhline(float(row['top1']), label=row['run'][:-3], linewidth=1, **style)
        own = [row for row in rows if row['run'].startswith(f'{cells}-{COUNTS[0]}-')]
        start = [float(row['top1']) for row in own if row['epochs'] == '0']
        for kind in KINDS:
            points = {}
            for row in own:
                if row['kind'] == kind:
                    points.setdefault(int(row['epochs']), []).append(float(row['top1']))
            if points:
                points |= {0: start} if start else {}
                epochs = sorted(points)
                panel.plot(epochs, [mean(points[epoch]) for epoch in epochs], marker='o', label=kind)
        panel.set_xlabel('epochs after the conversion')
    panels[0].set_ylabel('top-1, %')
    panels[0].legend()
    save_plot(figure, results)


def main(argv=None):
    parser = parser_of(__doc__, 'output/tiny_imagenet')
    parser.add_argument('--report', action='store_true', help='print the table and draw the plot beside --results-file')
    args = parse(parser, argv)
    if args.report and not args.list:
        rows = rows_to_report(args, COLUMNS)
        print('\n'.join(table(rows)))
        plot(rows, args.results_file)
        return
    if not args.list:
        check_data(args)
        make_output(args)
    drive(
        args,
        chosen(all_jobs(), args),
        COLUMNS,
        state=lambda job, rows: state(job, rows, args.output),
        run=lambda job, rows, left: run(resolve(job, rows), args, left),
        says=lambda row: f'top-1 {row["top1"]}, held {row["held_top1"] or "-"}, {row["seconds"]} s',
        tidy=lambda job: tidy(job, args),
    )


if __name__ == '__main__':
    sys.exit(run_script(main))
