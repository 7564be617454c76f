#!/usr/bin/env python3
"""Write the tables of docs/scaling.md from what one GPU reached: python docs/make/scaling.py [--check]

Measured are results/scale.csv, updates on one GPU and several of one host (tools/scale.py), and results/data_cpu.csv,
what a CPU core prepares. All else is arithmetic over the assumptions below, each of which is a flag. With --check
nothing is written; the exit code is 1 if a table is stale.
"""

import argparse
import functools
import itertools
import math
import sys

import pages
import timm

import evavit  # noqa: F401  (registers the models)

MODELS = ('eva_deit_tiny', 'eva_deit_small', 'eva_deit_tiny_784', 'eva_pvt_v2_b3')
GPUS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
IMAGES, EPOCHS = 1_281_167, 300
MODES = {'no': 'eager', 'default': 'default', 'reduce-overhead': 'CUDA graphs'}  # of tools/scale.py, and in words
NOISE = 0.05  # of an update, by which two measurements of the same one differ


def assumptions():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--check', action='store_true', help='write nothing, fail if a table is stale')
    parser.add_argument('--node', type=int, default=8, help='GPUs of one machine')
    parser.add_argument('--node-gb', type=float, default=300, help='GB/s a GPU sends within a machine (NVLink 4: 450)')
    parser.add_argument('--net-gb', type=float, default=40, help='GB/s a GPU sends between machines (400 Gbit/s: 50)')
    parser.add_argument('--latency', type=float, default=15, help='microseconds of one hop of an all-reduce')
    parser.add_argument('--buckets', type=int, default=0, help="all-reduces a step; 0: one for each 25 MiB, DDP's way")
    parser.add_argument('--overlap', type=float, default=0.7, help='share of the backward pass that hides them')
    parser.add_argument('--backward', type=float, default=2 / 3, help='share of the step that is backward pass')
    parser.add_argument('--kilobytes', type=float, default=110, help='of one ImageNet JPEG')
    parser.add_argument(
        '--loader',
        type=float,
        default=loader_rate(),
        help='images a second that a CPU core prepares; measured in results/data_cpu.csv',
    )
    parser.add_argument('--price', type=float, default=2.5, help='dollars of a GPU for an hour')
    parser.add_argument('--fixed', type=float, default=5, help='ms of a step that do not shrink with the batch')
    parser.add_argument(
        '--ddp',
        type=float,
        default=1.5,
        help='ms that a step in CUDA graphs gains on several GPUs (0.3 to 1.7 measured, 5 on a busy host)',
    )
    return parser.parse_args()


def loader_rate():
    """Images a second of one core, from the processor time an image takes."""
    return 1e3 / float(
        [row['cpu_ms_per_img'] for row in pages.read_results('data_cpu.csv') if row['cpu_ms_per_img']][-1]
    )


def scaled():
    """Rows of tools/scale.py, less those with flags of their own for train.py."""
    return pages.pick(pages.read_results('scale.csv'), flags='')


def one_gpu():
    """{model: its fastest row of one GPU with the batch of the recipe}"""
    rows = scaled()
    return {model: fastest(rows, bench='weak', model=model, gpus=1) for model in MODELS}


def origin(steps, a):
    """Where the seconds of one GPU's step come from."""
    return f'One GPU: {pages.origins(one_gpu().values())}'


def measured():
    """{model: (batch, seconds of its step)} on one GPU."""
    return {
        model: (batch := int(row['batch_size']), batch / float(row['img_per_s'])) for model, row in one_gpu().items()
    }


@functools.cache
def gradient_bytes(model):
    """float32 gradients: DDP sends them as they are, under bfloat16 autocast too."""
    return 4 * sum(p.numel() for p in timm.create_model(model, device='meta').parameters())


def all_reduce(size, gpus, a):
    """Seconds of one step's all-reduces. Within a machine a ring over NVLink; between machines NCCL reduces within each
    machine first, every GPU then sends its share over its own network card, a tree for the latency."""
    if gpus == 1:
        return 0.0
    inside = min(gpus, a.node)
    machines = math.ceil(gpus / a.node)
    seconds = 2 * (inside - 1) / inside * size / (a.node_gb * 1e9)
    hops = 2 * (inside - 1)
    if machines > 1:
        seconds += 2 * (machines - 1) / machines * size / inside / (a.net_gb * 1e9)
        hops += 2 * math.ceil(math.log2(machines))
    buckets = a.buckets or math.ceil(size / (25 * 2**20))
    return seconds + buckets * hops * a.latency * 1e-6


def step(model, gpus, per_gpu, steps, a):
    """(compute, communication, what nothing hides), seconds of one step of `per_gpu` images on each GPU.

    Compute: the measured seconds an image, and never less than the fixed time of a step's kernels and host."""
    batch, seconds = steps[model]
    fixed = a.fixed * 1e-3
    compute = fixed + per_gpu * max(0.0, seconds - fixed) / batch
    sent = all_reduce(gradient_bytes(model), gpus, a)
    return compute, sent, max(0.0, sent - a.overlap * a.backward * compute) + (1e-3 * a.ddp if gpus > 1 else 0.0)


def strong(steps, a):
    """The recipe's global batch of 1,024, spread over the GPUs."""
    columns, rows = ['GPUs', 'images a GPU', *(f'`{model}`' for model in MODELS)], []
    for gpus in GPUS:
        cells = []
        for model in MODELS:
            compute, sent, open_ = step(model, gpus, 1024 / gpus, steps, a)
            cells.append(
                f'{1e3 * compute:.1f} + {1e3 * open_:.1f} ({1e3 * sent:.1f}), '
                f'{100 * step(model, 1, 1024, steps, a)[0] / gpus / (compute + open_):.0f} %'
            )
        rows.append([gpus, f'{1024 / gpus:g}', *cells])
    return pages.table(columns, rows)


def weak(steps, a):
    """The measured batch on each GPU: the global batch grows."""
    columns, rows = ['GPUs', *(f'`{model}` ({steps[model][0]} a GPU)' for model in MODELS)], []
    for gpus in GPUS:
        cells = []
        for model in MODELS:
            compute, sent, open_ = step(model, gpus, steps[model][0], steps, a)
            rate = gpus * steps[model][0] / (compute + open_)
            cells.append(f'{rate:,.0f} img/s, {100 * compute / (compute + open_):.0f} % ({100 * sent / compute:.1f} %)')
        rows.append([gpus, *cells])
    return pages.table(columns, rows)


def fastest(rows, **wanted):
    """Of the rows of tools/scale.py with these values in these columns the fastest one; None where there is none."""
    rows = pages.pick(rows, status='ok', **wanted)
    return max(rows, key=lambda row: float(row['img_per_s']), default=None)


def efficiency(rows, bench, model, gpus):
    """Images a second over those of one GPU times their number, and what the exchange of gradients costs, as text."""
    here = fastest(rows, bench=bench, model=model, gpus=gpus)
    if not here:
        return 'not measured'
    alone = fastest(rows, bench=bench, model=model, gpus=1, torchcompile=here['torchcompile'])
    mode = 'eager' if here['torchcompile'] == 'no' else here['torchcompile']
    text = f'{float(here["img_per_s"]):,.0f} img/s ({mode})'
    if gpus > 1 and alone:
        share = float(here['img_per_s']) / gpus / float(alone['img_per_s'])
        text += f', {100 * share:.0f} %'
    if here['no_sync_ms']:
        whole, alone = float(here['ms']), float(here['no_sync_ms'])
        exchange = f'{whole - alone:.1f}' if whole - alone > NOISE * whole else f'less than {NOISE * whole:.1f}'
        text += f', exchange {exchange} of {whole:.1f} ms'
    return text


def measured_scaling(steps, a):
    """One host: what is predicted beside what tools/scale.py measured."""
    rows, table = scaled(), []
    for model, gpus in itertools.product(MODELS, (1, 2, 4, 8)):
        cells = []
        for bench, per_gpu in (('weak', steps[model][0]), ('strong', 1024 / gpus)):
            compute, _, open_ = step(model, gpus, per_gpu, steps, a)
            one = step(model, 1, per_gpu if bench == 'weak' else 1024, steps, a)[0]
            share = one / (compute + open_) / (1 if bench == 'weak' else gpus)
            cells += [f'{100 * share:.0f} %, exchange {1e3 * open_:.1f} ms', efficiency(rows, bench, model, gpus)]
        table.append([f'`{model}`', gpus, *cells])
    columns = ['model', 'GPUs', 'its batch on each: predicted', 'measured', '1,024 in all: predicted', 'measured']
    text = pages.table(columns, table) + '\n\n`train.py` itself, its second epoch: '
    whole = [
        f'`{row["model"]}`, {row["gpus"]} GPUs, {row["workers"]} workers each, images made by {row["augment_device"]}: '
        f'{float(row["img_per_s"]):,.0f} img/s, of which it waits {100 * float(row["data_wait"]):.0f} % for data'
        for row in pages.pick(rows, bench='train', status='ok')
    ]
    text += '; '.join(whole or ['not measured']) + '.'
    return f'{text} Measured on {pages.origins(rows)}' if rows else text


def modes(steps, a):
    """Images a second of each mode with the recipe's batch on each GPU, and efficiency: a row a model and mode."""
    rows = pages.pick(scaled(), ddp='')
    lines = []
    for model, (mode, text) in itertools.product(MODELS, MODES.items()):
        found = {gpus: fastest(rows, bench='weak', model=model, gpus=gpus, torchcompile=mode) for gpus in (1, 2, 4)}
        rates = {gpus: float(row['img_per_s']) for gpus, row in found.items() if row}
        cells = [f'{rates[gpus]:,.0f}' if gpus in rates else '–' for gpus in found]
        shares = [f', {100 * rates[k] / k / rates[1]:.0f} %' if {1, k} <= rates.keys() and k > 1 else '' for k in found]
        lines.append([f'`{model}`', text, *map(str.__add__, cells, shares)])
    return pages.table(['model', 'mode', '1 GPU, img/s', '2 GPUs', '4 GPUs'], lines)


def runs(steps, a):
    """The published recipe of 300 epochs at a global batch of 1,024: hours and dollars."""
    columns, rows = ['model', 'gradients', *(f'{gpus} GPU{"s" * (gpus > 1)}' for gpus in (1, 8, 16, 32, 64))], []
    for model in MODELS:
        cells = []
        for gpus in (1, 8, 16, 32, 64):
            # One GPU accumulates over batches of the measured size; several have 1,024 / GPUs at once.
            per_gpu = min(1024 / gpus, steps[model][0])
            compute, _, open_ = step(model, gpus, per_gpu, steps, a)
            updates = EPOCHS * (IMAGES // 1024)
            hours = updates * (1024 / gpus / per_gpu * compute + open_) / 3600
            cells.append(f'{hours:,.1f} h, ${hours * gpus * a.price:,.0f}')
        rows.append([f'`{model}`', f'{gradient_bytes(model) / 1e6:.1f} MB', *cells])
    return pages.table(columns, rows)


def inputs(steps, a):
    """What a GPU and a machine of `node` GPUs must be fed with at the measured rate."""
    columns = ['model', 'img/s a GPU', 'MB/s a GPU', f'MB/s a machine of {a.node}', 'cores a GPU', 'GB/s of 1,024 GPUs']
    rows = []
    for model in MODELS:
        batch, seconds = steps[model]
        rate = batch / seconds
        read = rate * a.kilobytes * 1e3
        rows.append(
            [
                f'`{model}`',
                f'{rate:,.0f}',
                f'{read / 1e6:,.0f}',
                f'{a.node * read / 1e6:,.0f}',
                f'{rate / a.loader:.0f}',
                f'{1024 * read / 1e9:,.0f}',
            ]
        )
    return pages.table(columns, rows)


def stated(steps, a):
    """The assumptions, as the tables above were made with."""
    columns, rows = ['assumption', 'flag', 'value'], []
    for flag, unit in (
        ('node', 'GPUs a machine'),
        ('node_gb', 'GB/s a GPU sends within a machine'),
        ('net_gb', 'GB/s a GPU sends between machines'),
        ('latency', 'µs a hop of an all-reduce'),
        ('overlap', 'of the backward pass hides communication'),
        ('backward', 'of a step is backward pass'),
        ('fixed', 'ms of a step do not shrink'),
        ('ddp', 'ms beside the exchange, several GPUs'),
        ('kilobytes', 'kB a JPEG'),
        ('loader', 'img/s a CPU core prepares'),
        ('price', '$ a GPU hour'),
    ):
        rows.append([unit, f'`--{flag.replace("_", "-")}`', f'{getattr(a, flag):.3g}'])
    return pages.table(columns, rows)


TABLES = {
    'origin': origin,
    'assumptions': stated,
    'measured': measured_scaling,
    'modes': modes,
    'runs': runs,
    'strong': strong,
    'weak': weak,
    'inputs': inputs,
}


def main() -> int:
    a = assumptions()
    steps = measured()
    made = {marker: make(steps, a) for marker, make in TABLES.items()}
    return int(not pages.update('docs/scaling.md', made, a.check, 'python docs/make/scaling.py'))


if __name__ == '__main__':
    sys.exit(main())
