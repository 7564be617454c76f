#!/usr/bin/env python3
"""Which attention learns best? python experiments/tiny_imagenet/attentions.py --data-dir DIR

    python experiments/tiny_imagenet/build.py DIR --source tiny-imagenet-200
    python experiments/tiny_imagenet/attentions.py --data-dir DIR --list
    python experiments/tiny_imagenet/attentions.py --data-dir DIR --seconds 500 --results-file FILE.csv
    python experiments/tiny_imagenet/attentions.py --report --results-file FILE.csv

Networks from scratch by parent.yaml, without a class token. A name such as table2-eva-s0 says: group, what, seed.

table2: all attentions at 256 tokens. What Table 9 of the paper gives for 784 tokens is scaled to 256: windows, cells
    and landmarks of 49 are 16, of 128 features 42 are left. Three seeds for those of Table 2, one for the others.
long: patch 2, 1,024 tokens; accuracy and hours.
cells, table8: EVA on half of the pictures: windows and cells of 0, 2, 4 and 8 a side, and the ablations of Tables 6
    and 8.

table2 and long have 15 epochs, 2 of them warm-up; cells and table8 have 10 and 1. --epochs and --warmup-epochs change
that for every run: with 30 and 4 it is the budget of run.py beside this file, and asks for another --output.

Every run is one of train.py, judged by validate.py on the publisher's validation pictures once, at its end. --only
takes a group or a name. Stops, several processes and other flags are as in run.py beside this file.
"""

import json
import sys
import time
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

from evavit.errors import run_script
from evavit.training.checkpoint import remove_checkpoints
from evavit.training.config import parse_settings

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))

from driver import (  # noqa: E402
    ABOUT,
    check_data,
    chosen,
    drive,
    judge,
    link_pictures,
    make_output,
    of_training,
    parse,
    parser_of,
    rows_to_report,
    train_to_end,
)

PAPER = dict(  # top-1 of Table 2, ImageNet, DeiT-Tiny-784
    softmax=77.16,
    eva=76.67,
    local=70.62,
    lara=75.02,
    performer=67.19,
    nystromformer=74.20,
    long_short=76.41,
    scatterbrain=73.50,
    combiner=75.56,
)
TABLE2 = dict(  # arguments of each attention; the first seven have three seeds
    softmax={},
    eva=dict(window_size=4, partition_grid=4),
    local=dict(window_size=4),
    lara=dict(landmark_grid=4),
    performer=dict(num_features=42),
    nystromformer=dict(landmark_grid=4),
    long_short=dict(window_size=4, projection_dim=5),
    scatterbrain=dict(window_size=4, num_features=32),
    combiner=dict(window_size=4),
    linformer=dict(projection_dim=42),
    reformer=dict(chunk_size=16),
)
SEEDS, THRICE = 3, 7
BUDGETS = dict(table2=(15, 2), long=(15, 2), cells=(10, 1), table8=(10, 1))  # epochs, and those of warm-up
LONG = ('softmax', 'eva', 'local', 'performer')
SIDES = (0, 2, 4, 8)  # of windows and of cells; neither is nothing to attend to
ABLATIONS = dict(
    default={},
    complement=dict(partition='complement'),
    overlap=dict(overlap=True),
    summary_identity=dict(summary='identity'),
    summary_linear=dict(summary='linear'),
    proposal_learned=dict(proposal='learned'),
    samples_4=dict(num_samples=4),
    noise_0=dict(noise_std=0),
    count_outside=dict(count_cells='outside'),
    count_all=dict(count_cells='all'),
)
COLUMNS = (
    'run',
    'group',
    'attention',
    'arguments',
    'patch_size',
    'pictures',
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
    """A run: `arguments` of the model as JSON, beside those of parent.yaml."""

    name: str
    attention: str
    arguments: str
    seed: int

    @property
    def group(self):
        return self.name.split('-')[0]


def job(group, what, attention, arguments, seed=0):
    return Job(f'{group}-{what}-s{seed}', attention, json.dumps(arguments), seed)


def all_jobs():
    """Every run, the most telling first."""
    for seed in range(SEEDS):
        for number, (name, arguments) in enumerate(TABLE2.items()):
            if seed == 0 or number < THRICE:
                yield job('table2', name, name, arguments, seed)
    four = TABLE2['eva']
    for window in SIDES:
        for cells in SIDES:
            if window or cells:
                yield job('cells', f'E{window**2}-C{cells**2}', 'eva', dict(window_size=window, partition_grid=cells))
    for seed in range(SEEDS):
        for name, arguments in ABLATIONS.items():
            if seed == 0 or name == 'default':
                yield job('table8', name, 'eva', four | arguments, seed)
    for seed in range(2):
        for name in LONG:
            # windows and cells of 1,024 / 16 tokens are 8 a side
            arguments = {key: 8 if value == 4 else value for key, value in TABLE2[name].items()}
            yield job('long', name, name, arguments | dict(patch_size=2), seed)


def flags_of(job, args):
    """The flags of train.py. None of them is left to a default that the YAML file or the name does not say."""
    pictures = args.data_dir
    if job.group not in ('table2', 'long'):
        pictures = link_pictures(args.output / 'half', half_of(args.data_dir))
    flags = ['-c', str(HERE / 'parent.yaml'), '--model', f'{job.attention}_deit_tiny', '--seed', str(job.seed)]
    flags += ['--data-dir', str(pictures)]
    flags += ['--output', str(args.output), '--experiment', job.name, '--resume', 'auto']
    if arguments := json.loads(job.arguments):
        flags += ['--model-kwargs', *(f'{key}={value}' for key, value in arguments.items())]
    epochs, warmup = map(str, BUDGETS[job.group])
    return [*flags, '--epochs', epochs, '--warmup-epochs', warmup, *args.flags]


def half_of(folder):
    """Every second picture to train on, and all that are held for choices."""
    for split, step in (('train', 2), ('held', 1)):
        for label in sorted((folder / split).iterdir()):
            yield from sorted(label.iterdir())[::step]


def run(job, args, seconds_left):
    """Train, judge, and return the row."""
    began, folder, flags = time.monotonic(), args.output / job.name, flags_of(job, args)
    settings, _ = parse_settings('train', flags)
    train_to_end(flags, folder, seconds_left)
    result = judge(folder / 'last.safetensors', args.data_dir, settings, folder)
    epochs, measured = of_training(job, args, settings, began)
    return dict(
        run=job.name,
        group=job.group,
        attention=job.attention,
        arguments=job.arguments,
        patch_size=settings.model.model_kwargs['patch_size'],
        pictures='half' if job.group not in ('table2', 'long') else 'all',
        epochs=settings.schedule.epochs,
        seed=job.seed,
        top1=result['top1'],
        top5=result['top5'],
        held_top1=epochs[-1]['eval_top1'],
        images=result['images'],
        **measured,
    )


def table(rows):
    """Markdown: a table for each group, top-1 as mean ± standard deviation over the seeds."""
    for group in dict.fromkeys(row['group'] for row in rows):
        of_group, found = [row for row in rows if row['group'] == group], {}
        for row in of_group:
            found.setdefault(row['run'].split('-', 1)[1].rsplit('-s', 1)[0], []).append(row)
        tops = {name: [float(row['top1']) for row in same] for name, same in found.items()}
        yield f'\n{group}, {of_group[0]["pictures"]} of the pictures, {of_group[0]["epochs"]} epochs\n'
        yield '| | top-1 | seeds | minutes of training | the paper, on ImageNet |'
        yield '|---|---|---|---|---|'
        for name, values in sorted(tops.items(), key=lambda item: -mean(item[1])):
            spread = f' ± {stdev(values):.2f}' if len(values) > 1 else ''
            minutes = mean(float(row['train_seconds']) for row in found[name]) / 60
            paper = f'{PAPER[name]:.2f}' if group in ('table2', 'long') and name in PAPER else '–'
            yield f'| `{name}` | {mean(values):.2f}{spread} | {len(values)} | {minutes:.1f} | {paper} |'
        both = [name for name in tops if name in PAPER]
        if group == 'table2' and len(both) > 2:
            tau = kendall([mean(tops[name]) for name in both], [PAPER[name] for name in both])
            yield f'\nKendall τ between the two columns, over {len(both)} attentions: {tau:.2f}.'


def kendall(a, b):
    """Kendall's τ: pairs in the same order less those in the other, over all; here rather than SciPy for five lines."""
    pairs = [(i, j) for i in range(len(a)) for j in range(i)]
    agree = [(a[i] - a[j]) * (b[i] - b[j]) for i, j in pairs]
    return sum((value > 0) - (value < 0) for value in agree) / len(pairs)


def main(argv=None):
    parser = parser_of(__doc__, 'output/tiny_imagenet_attentions')
    parser.add_argument('--report', action='store_true', help='print the tables of --results-file')
    args = parse(parser, argv)
    jobs = chosen(all_jobs(), args)
    if args.report and not args.list:
        print('\n'.join(table(rows_to_report(args, COLUMNS))))
        return
    if not args.list:
        check_data(args)
        make_output(args)
    drive(
        args,
        jobs,
        COLUMNS,
        run=lambda job, rows, left: run(job, args, left),
        says=lambda row: f'top-1 {row["top1"]}, held {row["held_top1"]}, {row["seconds"]} s',
        tidy=lambda job: remove_checkpoints(args.output / job.name),  # of 80 runs they are gigabytes
    )


if __name__ == '__main__':
    sys.exit(run_script(main))
