"""What tables.py puts into docs/performance.md: tables of what was measured, the plot. The goals are in goals.py."""

from typing import Dict, List, Optional, Sequence, Tuple

import pages
from pages import Row, origins, pick

from evavit.bench.peers import PEERS
from evavit.bench.results import ADDED, KEY
from evavit.models import softmax_twin

PLOT = pages.ROOT / 'docs' / 'images' / 'performance.svg'

# Images a second of the published code on an H100 (torch 2.11, bfloat16 autocast; it does not compile): training,
# inference. Measured before this code was written, with the published code's own modules, not by benchmark.py.
PUBLISHED = {'eva_deit_tiny': (2446, 6817), 'eva_deit_tiny_784': (993, 2821), 'eva_pvt_v2_b3': (248, 1127)}
COLOURS = {'triton': '#d1495b', 'plain': '#e9a6ae', 'flash': '#2e5e8c', 'cudnn': '#5b9bd5', 'efficient': '#9aa5b1'}
UNMEASURED = 'Not measured yet.'
SETTING = ('batch_size', 'img_size', 'torchcompile', 'amp_dtype')
KINDS = {'train': 'training', 'infer': 'inference'}
COMPILED = ('default', 'reduce-overhead')
MODES = {'no': 'eager', 'default': 'compiled', 'reduce-overhead': 'compiled, CUDA graphs'}
NAMES = {
    'triton': 'EVA, kernels',
    'plain': 'EVA, plain PyTorch',
    'flash': 'SDPA, flash',
    'cudnn': 'SDPA, cuDNN',
    'efficient': 'SDPA, memory-efficient',
}


def load(name: str) -> List[Row]:
    """Rows of a results file that were measured without a fault."""
    return [ADDED | row for row in pages.read_results(name) if row['status'] == 'ok']


def kernels(rows: List[Row]) -> List[Row]:
    """Rows in which Gluon's kernels, which run by themselves where they can, have taken the place of Triton's."""

    def comparison(row: Row) -> Tuple[str, ...]:
        return tuple(row.get(column, '') for column in KEY)  # older files have no columns of windows

    gluon = {comparison(row) for row in rows if row['backend'] == 'gluon'}
    rows = [row for row in rows if row['backend'] != 'triton' or comparison(row) not in gluon]
    return [row | {'backend': 'triton'} if row['backend'] == 'gluon' else row for row in rows]


def made(table: str) -> List[Row]:
    """Rows of a table of `make gpu` on an H200; none where it has not run."""
    return kernels(load(f'{table}_h200.csv'))


def gpu_rows() -> List[Row]:
    """Attention, the layer, whole models."""
    return [*made('op'), *made('layer'), *whole_models()]


def whole_models() -> List[Row]:
    """Whole models: with CUDA graphs, in eager mode, and in the default mode of torch.compile."""
    return [*made('models'), *made('modes')]


def cpu_rows() -> List[Row]:
    return load('cpu.csv')


def attention(rows: List[Row], bench: str, tokens: Optional[int] = None) -> List[Row]:
    """Rows of attention or the layer in bfloat16, of 3 heads of 64 channels."""
    rows = pick(rows, bench=bench, amp_dtype='bfloat16', width=192, heads=3)
    return rows if tokens is None else pick(rows, tokens=tokens)


def number(rows: List[Row], column: str, best=min) -> Optional[float]:
    """The best of a column; None where there is none."""
    return best((float(row[column]) for row in rows if row[column]), default=None)


def ratio(a: Optional[float], b: Optional[float]) -> Optional[float]:
    return None if a is None or b is None else a / b


def speed_up(rows: List[Row], bench: str, tokens: int, column: str = 'ms') -> Optional[float]:
    """Time of the best SDPA backend over the kernels', by default of forward and backward."""
    return over_best(attention(rows, bench, tokens), column)


def over_best(rows: List[Row], column: str = 'ms') -> Optional[float]:
    """The same of rows of one comparison."""
    return ratio(number(pick(rows, attention='softmax'), column), number(pick(rows, backend='triton'), column))


def models(
    rows: List[Row], bench: str, case: str, img_size: int, modes: Sequence[str] = COMPILED, column: str = 'img_per_s'
) -> Tuple[Optional[float], Optional[float]]:
    """A column of (EVA's model, timm's softmax model beside it), each in the fastest of the modes."""
    rows = [row for row in pick(rows, bench=bench, case=case, img_size=img_size) if row['torchcompile'] in modes]
    eva, softmax = (number(pick(rows, attention=which), column, max) for which in ('eva', 'softmax'))
    return eva, softmax


def spread(rows: List[Row], bench: str) -> Optional[float]:
    """How much longer a token takes at the worst length than at the best, of 784 to 65,536; None unless both ends are
    there."""
    times = {
        int(row['tokens']): float(row['ms']) / (int(row['batch_size']) * int(row['tokens']))
        for row in attention(rows, bench)
        if row['backend'] == 'triton' and int(row['tokens']) >= 784
    }
    return max(times.values()) / min(times.values()) - 1 if {784, 65536} <= times.keys() else None


def _pair(row: Row) -> str:
    return f'{float(row["forward_ms"]):.3f} / {float(row["ms"]):.3f}'


def _times(bench: str) -> str:
    rows = attention(gpu_rows(), bench)
    if not rows:
        return UNMEASURED
    names = {backend: name for backend, name in NAMES.items() if pick(rows, backend=backend)}
    extra = ['over the best SDPA', *(['share of a copy'] if bench == 'op' else ['MiB, EVA', 'MiB, flash'])]
    lines = []
    for tokens in sorted({int(row['tokens']) for row in rows}):
        here = pick(rows, tokens=tokens)
        cells = [_pair(found[0]) if found else '–' for found in (pick(here, backend=backend) for backend in names)]
        over = speed_up(rows, bench, tokens, 'forward_ms'), speed_up(rows, bench, tokens)
        cells.append(' / '.join('–' if value is None else f'{value:.2f}×' for value in over))
        fused, flash = pick(here, backend='triton'), pick(here, backend='flash')
        if bench == 'op':
            cells.append(
                ' / '.join(f'{100 * float(fused[0][f"{way}_of_copy"]):.0f} %' for way in ('forward', 'backward'))
                if fused and fused[0]['forward_of_copy']
                else '–'
            )
        else:
            cells += [f'{float(found[0]["peak_memory_mib"]):.0f}' if found else '–' for found in (fused, flash)]
        lines.append([f'{here[0]["batch_size"]} × {tokens:,}', *cells])
    return pages.table(['batch × tokens', *names.values(), *extra], lines) + '\n\n' + origins(rows)


def op() -> str:
    """Attention alone: milliseconds forward / forward + backward."""
    return _times('op')


def layer() -> str:
    """The layer: milliseconds forward / forward + backward."""
    return _times('layer')


def _short(row: Row) -> str:
    """A softmax model without the arguments that all of them have."""
    shared = [f'{key}={value}' for key, value in softmax_twin('eva_deit_tiny')[1].items()]
    return ':'.join(part for part in row['model'].split(':') if part not in shared)


def _ours(case: str) -> str:
    """Our softmax model of the size of a model with EVA."""
    return 'softmax' + case.removeprefix('eva')


def _speed(rows: List[Row], **wanted: object) -> Optional[float]:
    return number(pick(rows, **wanted), 'img_per_s', max)


def _model_table(rows: List[Row], gpu: bool) -> str:
    rows = [row for row in rows if row['bench'] in ('train', 'infer')]
    if not rows:
        return UNMEASURED
    compared = list(dict.fromkeys((row['bench'], row['case'], *(row[name] for name in SETTING)) for row in rows))
    ours = any(row['case'].startswith('softmax_') for row in rows)
    lines: List[List[str]] = []
    for bench, case, *values in compared:
        setting = dict(zip(SETTING, values, strict=True))
        here = pick(rows, bench=bench, case=case, **setting)
        for eva in pick(here, attention='eva'):
            softmax = pick(here, attention='softmax')
            speeds = [float(eva['img_per_s']), _speed(softmax)]
            speeds += [_speed(rows, bench=bench, case=_ours(case), **setting)] if ours else []
            digits = 0 if gpu else 1
            cells = [f'{speeds[0]:,.{digits}f}']
            for other in speeds[1:]:
                cells += ['–', '–'] if other is None else [f'{other:,.{digits}f}', f'{speeds[0] / other:.2f}']
            if gpu:
                cells += [
                    f'{float(found["peak_memory_mib"]) / 1024:.1f}' if found and found['peak_memory_mib'] else '–'
                    for found in (eva, softmax[0] if softmax else None)
                ]
                published = PUBLISHED.get(case) if setting['img_size'] == '224' else None
                cells.append(f'{published[bench == "infer"]:,}' if published else '–')
            lines.append(
                [
                    f'`{case}`' + (', plain' if gpu and eva['backend'] == 'plain' else ''),
                    setting['img_size'],
                    setting['batch_size'],
                    f'{KINDS[bench]}, {MODES[setting["torchcompile"]]}',
                    *cells,
                    f'`{_short(softmax[0])}`' if softmax else '–',
                ]
            )
    columns = ['model', 'images', 'batch', 'what', 'EVA, img/s', "timm's softmax, img/s", 'ratio']
    columns += ['our softmax, img/s', 'ratio'] if ours else []
    columns += ['EVA, GiB', 'softmax, GiB', 'published EVA, img/s'] if gpu else []
    return pages.table([*columns, "timm's model"], lines) + '\n\n' + origins(rows)


def _by_model(row: Row) -> tuple:
    return row['case'], int(row['img_size'] or 0), row['bench'], list(MODES).index(row['torchcompile'])


def gpu_models() -> str:
    """Whole models on the GPU."""
    rows = [row for row in gpu_rows() if row['bench'] in ('train', 'infer')]
    return _model_table(sorted(rows, key=_by_model), gpu=True)


def best_rows() -> List[Row]:
    """Whole models with CUDA graphs, which suit EVA best, and the softmax models beside them."""
    return sorted(pick(made('models'), torchcompile='reduce-overhead'), key=_by_model)


def over_ours(rows: List[Row], bench: str, case: str, img_size: int = 224) -> Optional[float]:
    """Speed over our own softmax model, each compiled in its fastest mode."""
    rows = [row for row in pick(rows, bench=bench, img_size=img_size) if row['torchcompile'] in COMPILED]
    return ratio(_speed(rows, case=case, attention='eva'), _speed(rows, case=_ours(case)))


def best_models() -> str:
    """Whole models on the GPU, compiled, with CUDA graphs."""
    return _model_table(best_rows(), gpu=True)


def cpu_models() -> str:
    """Whole models on the CPU."""
    return _model_table(cpu_rows(), gpu=False)


# --------------------------------------------------------------------------------------------------------------------
# Plots
# --------------------------------------------------------------------------------------------------------------------


def plotted() -> List[Row]:
    columns = (
        'bench',
        'backend',
        'batch_size',
        'tokens',
        'ms',
        'peak_memory_mib',
        'forward_of_copy',
        'backward_of_copy',
    )
    return [{name: row[name] for name in columns} for bench in ('op', 'layer') for row in attention(gpu_rows(), bench)]


def plot_is_fresh() -> bool:
    return pages.plot_is_fresh(PLOT, plotted())


def draw() -> None:
    """Time and memory a token against tokens, and the achieved fraction of a copy's bandwidth."""
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            'svg.hashsalt': 'evavit',
            'font.size': 9,
            'axes.spines.top': False,
            'axes.spines.right': False,
            'axes.grid': True,
            'grid.alpha': 0.25,
        }
    )
    figure, axes = plt.subplots(2, 2, figsize=(9.6, 6.8))

    def curves(ax, bench, column, scale):
        for backend, name in NAMES.items():
            rows = sorted(pick(plotted(), bench=bench, backend=backend), key=lambda row: int(row['tokens']))
            rows = [row for row in rows if row[column]]
            if not rows:
                continue
            ax.plot(
                [int(row['tokens']) for row in rows],
                [scale * float(row[column]) / (int(row['batch_size']) * int(row['tokens'])) for row in rows],
                'o-',
                color=COLOURS[backend],
                label=name,
                markersize=3.5,
                linewidth=1.6,
                zorder=3 if backend == 'triton' else 2,
            )

    for ax, bench, title in ((axes[0, 0], 'op', 'Attention alone'), (axes[0, 1], 'layer', 'The layer')):
        curves(ax, bench, 'ms', 1e6)
        ax.set(title=title, ylabel='forward + backward, ns a token', yscale='log')
    curves(axes[1, 0], 'layer', 'peak_memory_mib', 1024)
    axes[1, 0].set(title='The layer', ylabel='peak memory, KiB a token', ylim=(0, None))
    rows = sorted(pick(plotted(), bench='op', backend='triton'), key=lambda row: int(row['tokens']))
    for way, goal, style in (('forward', 60, '-'), ('backward', 50, '--')):
        known = [row for row in rows if row[f'{way}_of_copy']]
        axes[1, 1].plot(
            [int(row['tokens']) for row in known],
            [100 * float(row[f'{way}_of_copy']) for row in known],
            'o',
            linestyle=style,
            color=COLOURS['triton'],
            label=f'{way}',
            markersize=3.5,
            linewidth=1.6,
        )
        axes[1, 1].axhline(goal, color='#555555', linestyle=style, linewidth=0.8)
        axes[1, 1].annotate(
            f'goal, {way}',
            (1, goal),
            xycoords=('axes fraction', 'data'),
            ha='right',
            va='bottom',
            fontsize=8,
            color='#555555',
        )
    axes[1, 1].set(title="EVA's kernels", ylabel='bandwidth, % of a copy', ylim=(0, 100))
    for ax in axes.flat:
        ax.set(xscale='log', xlabel='tokens an image')
        ax.set_xticks([196, 784, 3136, 12544, 65536], ['196', '784', '3,136', '12,544', '65,536'])
        ax.minorticks_off()
        ax.set_xlim(160, 80_000)
    axes[0, 0].legend(frameon=False, fontsize=8)
    axes[1, 1].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    pages.save_plot(figure, PLOT, plotted())
    plt.close(figure)


def modes() -> str:
    """Speed over the softmax models, by mode: a row for each model at its own size, training and inference."""
    rows = [row for row in whole_models() if row['img_size'] == '224']
    if not rows:
        return UNMEASURED
    lines = []
    for bench, case in dict.fromkeys((row['bench'], row['case']) for row in pick(rows, attention='eva')):
        line = [f'`{case}`', KINDS[bench]]
        for mode in MODES:
            here = pick(rows, bench=bench, torchcompile=mode)
            eva = _speed(here, case=case, attention='eva')
            others = _speed(here, case=case, attention='softmax'), _speed(here, case=_ours(case))
            over = [ratio(eva, other) for other in others]
            line.append(' / '.join('–' if value is None else f'{value:.2f}×' for value in over))
        lines.append(line)
    note = "Speed over timm's softmax model / over ours."
    return f'{pages.table(["model", "what", *MODES.values()], lines)}\n\n{note} {origins(rows)}'


def _since(over: Dict[int, float]) -> str:
    """From how many tokens on all speeds are at least 1."""
    slower = max((tokens for tokens, value in over.items() if value < 1), default=0)
    faster = [tokens for tokens in over if tokens > slower]
    return f'from {min(faster):,} tokens on' if faster else 'nowhere'


def gains() -> str:
    """What a user gains and from which size on, in sentences."""
    rows = gpu_rows()
    layer = attention(rows, 'layer')
    lengths = sorted({int(row['tokens']) for row in pick(layer, backend='triton')})
    over = {
        column: {tokens: value for tokens in lengths if (value := speed_up(rows, 'layer', tokens, column)) is not None}
        for column in ('ms', 'forward_ms')
    }
    if not over['ms']:
        return UNMEASURED
    since = [_since(over[column]) for column in ('ms', 'forward_ms')]
    text = (
        'Speed of the whole attention layer over that with the fastest softmax kernel, projections included, forward '
        f'and backward, bfloat16, {layer[0]["device"]}, by tokens: '
        f'{", ".join(f"{value:.2g}× at {tokens:,}" for tokens, value in over["ms"].items())}.\n'
        f'In training it is faster {since[0]}, without gradients {since[1]}.'
    )
    best = best_rows()
    rest = [
        f'beside {whose} softmax models they are {_slower(best, ours)}'
        for whose, ours in (("timm's", False), ('our own', True))
    ]
    return f'{text}\nWhole models gain less. With CUDA graphs, {rest[0]};\n{rest[1]}.'


def _slower(best: List[Row], ours: bool) -> str:
    """Where whole models are slower than softmax models, timm's or our own, in words."""
    slower = []
    for row in pick(best, attention='eva'):
        case, img_size, bench, _ = _by_model(row)
        other = dict(case=_ours(case)) if ours else dict(case=case, attention='softmax')
        value = ratio(float(row['img_per_s']), _speed(best, img_size=img_size, bench=bench, **other))
        if value is not None and value < 1:
            slower.append(f'`{case}` at {img_size} px, {KINDS[bench]} ({value:.2f}×)')
    return f'slower in {", ".join(slower)}, and faster in all others' if slower else 'faster in all'


def cells() -> str:
    """Attention alone with 256 cells, as in converted networks: milliseconds and speed over the best SDPA."""
    rows = pick(made('op_cells'), partition_grid=16)
    if not rows:
        return UNMEASURED
    names = {backend: name for backend, name in NAMES.items() if pick(rows, backend=backend)}
    lines = []
    for tokens, prefix in dict.fromkeys((row['tokens'], row['num_prefix_tokens']) for row in rows):
        here = pick(rows, tokens=tokens, num_prefix_tokens=prefix)
        found = [pick(here, backend=backend) for backend in names]
        over = [over_best(here, column) for column in ('forward_ms', 'ms')]
        lines.append(
            [
                f'{here[0]["batch_size"]} × {int(tokens):,}',
                prefix,
                *(_pair(row[0]) if row else '–' for row in found),
                ' / '.join('–' if value is None else f'{value:.2f}×' for value in over),
            ]
        )
    columns = ['batch × tokens', 'prefix tokens', *names.values(), 'over the best SDPA']
    return f'{pages.table(columns, lines)}\n\n{origins(rows)}'


def host() -> str:
    """The processor's time of the layer: a row a layer."""
    rows = made('host')
    if not rows:
        return UNMEASURED
    best = [number(pick(rows, attention='softmax'), column) for column in ('forward_ms', 'ms')]
    lines = []
    for row in rows:
        times = [float(row['forward_ms']), float(row['ms'])]
        over = [
            f'{1e3 * time:,.0f}' + ('' if sdpa is None else f', {time / sdpa:.2f}×')
            for time, sdpa in zip(times, best, strict=True)
        ]
        layer = 'EVA' if row['attention'] == 'eva' else 'softmax, SDPA'
        lines.append([layer, f'{row["batch_size"]} × {row["tokens"]}', *over])
    columns = ['layer', 'batch × tokens', 'inference, µs, over SDPA', 'forward + backward, µs, over SDPA']
    return f'{pages.table(columns, lines)}\n\n{origins(rows)}'


def wide() -> str:
    """A ViT of width 384 at 518 pixels, eager: softmax, and converted to EVA."""
    rows = made('wide')
    if not rows:
        return UNMEASURED
    lines = []
    for row in rows:
        over = [
            ratio(number(pick(rows, model='softmax'), column), float(row[column])) for column in ('forward_ms', 'ms')
        ]
        times = [
            f'{float(row[column]):.1f}' + ('' if value is None else f', {value:.2f}×')
            for column, value in zip(('forward_ms', 'ms'), over, strict=True)
        ]
        lines.append([row['model'], row['batch_size'], row['tokens'], *times])
    columns = ['attention', 'batch', 'tokens', 'inference, ms, speed over softmax', 'forward + backward']
    return f'{pages.table(columns, lines)}\n\n{origins(rows)}'


def peers() -> str:
    """Attention alone beside other attentions of linear cost: a row each, a column for each number of tokens."""
    rows = made('peers')
    if not rows:
        return UNMEASURED
    computes = {'triton': 'EVA', 'flash': 'softmax over all tokens', 'cudnn': 'softmax over all tokens'}
    computes |= {name: peer.computes for name, peer in PEERS.items()}
    sizes = list(dict.fromkeys((row['batch_size'], row['tokens']) for row in rows))
    lines = []
    for backend, what in computes.items():
        times = []
        for _, tokens in sizes:
            found, ours = pick(rows, tokens=tokens, backend=backend), pick(rows, tokens=tokens, backend='triton')
            wins = found and ours and float(found[0]['ms']) < float(ours[0]['ms'])
            text = _pair(found[0]) if found else '–'
            times.append(f'**{text}**' if wins else text)
        lines.append([NAMES.get(backend, f'`{backend}`'), what, *times])
    columns = ['contender', 'what it computes', *(f'{batch} × {int(tokens):,}' for batch, tokens in sizes)]
    return f'{pages.table(columns, lines)}\n\nBold: faster than EVA, forward and backward. {origins(rows)}'


def fed() -> str:
    """The loader of --augment-device, alone and beside the training step."""
    rows, lines = pages.read_results('data_h200.csv'), []
    for row in rows:
        share = float(row['both_img_per_s']) / float(row['step_img_per_s'])
        rates = [f'{float(row[key]):,.0f}' for key in ('img_per_s', 'step_img_per_s', 'both_img_per_s')]
        lines.append([f'`{row["model"]}`', row['augment_device'], *rates, f'{100 * share:.0f} %', row['commit']])
    columns = ['model', 'augmented by', 'loader alone', 'step alone', 'both', 'of the step', 'commit']
    return f'{pages.table(columns, lines)}\n\n{origins(rows)}'


LOADERS = {
    'cuda': "`--augment-device cuda`: timm's draws, Pillow's result",
    'dali': 'NVIDIA DALI, its own RandAugment',
    'kornia': 'nvJPEG, then kornia by batch',
    'cpu': "the CPU path: timm's transforms in 14 processes",
    'torchvision': 'nvJPEG, then torchvision.transforms.v2 image by image',
}


def loaders() -> str:
    """The libraries of experiments/loaders/run.py, the fastest first."""
    rows = sorted(pages.read_results('loaders_h200.csv'), key=lambda row: -float(row['images_per_second']))
    lines = [
        [LOADERS[row['contender']], row['version'] or '–', f'{float(row["images_per_second"]):,.0f}'] for row in rows
    ]
    return f'{pages.table(["batches by", "version", "images a second"], lines)}\n\n{origins(rows)}'
