"""What tables.py puts into docs/performance.md: what was to be reached and what was measured, tables, the plot."""

from typing import Dict, List, Optional, Tuple

import pages
from pages import Row, origins, pick

from evavit.bench.results import ADDED, KEY
from evavit.models import softmax_twin

PLOT = pages.ROOT / 'docs' / 'images' / 'performance.svg'

# Images a second of the published code on an H100 (torch 2.11, bfloat16 autocast; it does not compile): training,
# inference. Measured before this code was written, with the published code's own modules, not by benchmark.py.
PUBLISHED = {'eva_deit_tiny': (2446, 6817), 'eva_deit_tiny_784': (993, 2821), 'eva_pvt_v2_b3': (248, 1127)}
COLOURS = {'triton': '#d1495b', 'plain': '#e9a6ae', 'flash': '#2e5e8c', 'cudnn': '#5b9bd5', 'efficient': '#9aa5b1'}
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


def gpu_rows() -> List[Row]:
    """Rows of the H100. Gluon's kernels, which run by themselves where they can, take the place of Triton's."""
    rows = [row for row in load('h100.csv') if 'H100' in row['device']]

    def comparison(row: Row) -> Tuple[str, ...]:
        return tuple(row.get(column, '') for column in KEY)  # older files have no columns of windows

    gluon = {comparison(row) for row in rows if row['backend'] == 'gluon'}
    rows = [row for row in rows if row['backend'] != 'triton' or comparison(row) not in gluon]
    return [row | {'backend': 'triton'} if row['backend'] == 'gluon' else row for row in rows]


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


def speed_up(rows: List[Row], bench: str, tokens: int) -> Optional[float]:
    """Time of the best SDPA backend over the kernels', forward and backward."""
    rows = attention(rows, bench, tokens)
    return ratio(number(pick(rows, attention='softmax'), 'ms'), number(pick(rows, backend='triton'), 'ms'))


def models(rows: List[Row], bench: str, case: str, img_size: int, compiled: bool = True, column: str = 'img_per_s'):
    """A column of (EVA's model, the softmax model beside it), each in the faster of the measured modes."""
    rows = [
        row
        for row in pick(rows, bench=bench, case=case, img_size=img_size)
        if (row['torchcompile'] != 'no') == compiled
    ]
    return tuple(number(pick(rows, attention=which), column, max) for which in ('eva', 'softmax'))


def spread(rows: List[Row], bench: str) -> Optional[float]:
    """How much longer a token takes at the worst length than at the best, of 784 to 65,536; None unless both ends are
    there."""
    times = {
        int(row['tokens']): float(row['ms']) / (int(row['batch_size']) * int(row['tokens']))
        for row in attention(rows, bench)
        if row['backend'] == 'triton' and int(row['tokens']) >= 784
    }
    return max(times.values()) / min(times.values()) - 1 if {784, 65536} <= times.keys() else None


def goals() -> List[tuple]:
    """(what, at least or at most, goal, what was measured or None, unit) of all that this code was built to reach."""
    gpu, cpu, lines = gpu_rows(), cpu_rows(), []
    lengths = (196, 784, 3136, 12544)

    def percent(value: Optional[float]) -> Optional[float]:
        return None if value is None else 100 * value

    for bench, what, targets in (
        ('op', 'attention alone', (1.3, 2.5, 6, 18)),
        ('layer', 'the layer', (1.1, 1.4, 2, 4)),
    ):
        for tokens, goal in zip(lengths, targets, strict=True):
            what_here = f'{what}, forward + backward, {tokens:,} tokens: speed over the best SDPA backend'
            lines.append((what_here, '≥', goal, speed_up(gpu, bench, tokens), '×'))
    for direction, goal in (('forward', 60), ('backward', 50)):
        for tokens in lengths:
            share = number(pick(attention(gpu, 'op', tokens), backend='triton'), f'{direction}_of_copy')
            what = f"attention alone, {direction}, {tokens:,} tokens: share of a copy's bandwidth"
            lines.append((what, '≥', goal, percent(share), ' %'))
    for tokens in lengths:
        rows = attention(gpu, 'layer', tokens)
        peaks = (number(pick(rows, backend=name), 'peak_memory_mib') for name in ('triton', 'flash'))
        what = f"the layer, {tokens:,} tokens: peak memory of forward + backward over Flash SDPA's"
        lines.append((what, '≤', 1, ratio(*peaks), '×'))
    for case, img_size, bench, goal in (
        ('eva_deit_tiny_784', 224, 'train', 1.35),
        ('eva_deit_tiny_784', 224, 'infer', 1.5),
        ('eva_deit_tiny', 224, 'train', 1.05),
        ('eva_deit_tiny', 224, 'infer', 1.0),
        ('eva_pvt_v2_b3', 224, 'train', 1.2),
        ('eva_pvt_v2_b3', 224, 'infer', 1.1),
        ('eva_deit_tiny_784', 448, 'train', 3),
        ('eva_deit_tiny_784', 448, 'infer', 3),
        ('eva_deit_tiny_784', 896, 'train', 8),
        ('eva_deit_tiny_784', 896, 'infer', 8),
    ):
        kind = 'training' if bench == 'train' else 'inference'
        what = f"`{case}` at {img_size} px, {kind}, both compiled: speed over timm's softmax model"
        lines.append((what, '≥', goal, ratio(*models(gpu, bench, case, img_size)), '×'))
    for case, (published, _) in PUBLISHED.items():
        speed = ratio(models(gpu, 'train', case, 224)[0], published)
        lines.append((f'`{case}`, training: speed over the published code', '≥', 4, speed, '×'))
    for bench, what in (('op', 'attention alone'), ('layer', 'the layer')):
        what = f'{what}: difference in time per token, 784 to 65,536 tokens'
        lines.append((what, '≤', 20, percent(spread(gpu, bench)), ' %'))
    for case, bench, goal in (
        ('eva_deit_tiny_784', 'infer', 0.6),
        ('eva_deit_tiny_784', 'train', 0.75),
        ('eva_deit_tiny', 'infer', 1.05),
        ('eva_pvt_v2_b3', 'infer', 1.0),
    ):
        kind = 'training step' if bench == 'train' else 'inference'
        what = f"`{case}` on 2 CPU cores, {kind}: time over timm's softmax model"
        lines.append((what, '≤', goal, ratio(*models(cpu, bench, case, 224, compiled=False, column='ms')), '×'))
    return lines


def verdict(sense: str, goal: float, value: Optional[float]) -> str:
    if value is None:
        return 'not measured'
    return 'reached' if (value >= goal if sense == '≥' else value <= goal) else '**short**'


def reach() -> str:
    """The goals, each with what was measured."""
    rows = []
    for what, sense, goal, value, unit in goals():
        shown = '–' if value is None else f'{value:.0f}{unit}' if unit == ' %' else f'{value:.2f}{unit}'
        rows.append([what, f'{sense} {goal:g}{unit}', shown, verdict(sense, goal, value)])
    verdicts = [row[-1] for row in rows]
    return pages.table(['what', 'goal', 'measured', ''], rows) + (
        f'\n\n{len(verdicts)} lines: {verdicts.count("reached")} reached, '
        f'{verdicts.count("**short**")} short, {verdicts.count("not measured")} not measured.'
    )


def _times(bench: str) -> str:
    rows = attention(gpu_rows(), bench)
    if not rows:
        return 'Not measured yet.'
    extra = ['share of a copy'] if bench == 'op' else ['MiB, EVA', 'MiB, flash']
    lines = []
    for tokens in sorted({int(row['tokens']) for row in rows}):
        here = pick(rows, tokens=tokens)
        cells = []
        for backend in NAMES:
            found = pick(here, backend=backend)
            cells.append(f'{float(found[0]["forward_ms"]):.3f} / {float(found[0]["ms"]):.3f}' if found else '–')
        kernels, flash = pick(here, backend='triton'), pick(here, backend='flash')
        if bench == 'op':
            cells.append(
                ' / '.join(f'{100 * float(kernels[0][f"{way}_of_copy"]):.0f} %' for way in ('forward', 'backward'))
                if kernels and kernels[0]['forward_of_copy']
                else '–'
            )
        else:
            cells += [f'{float(found[0]["peak_memory_mib"]):.0f}' if found else '–' for found in (kernels, flash)]
        lines.append([f'{here[0]["batch_size"]} × {tokens:,}', *cells])
    return pages.table(['batch × tokens', *NAMES.values(), *extra], lines) + '\n\n' + origins(rows)


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


def _model_table(rows: List[Row], published: bool) -> str:
    rows = [row for row in rows if row['bench'] in ('train', 'infer')]
    if not rows:
        return 'Not measured yet.'
    columns = [
        'model',
        'images',
        'batch',
        'what',
        'EVA, img/s',
        'softmax, img/s',
        'ratio',
        *(['EVA, GiB', 'softmax, GiB', 'published EVA, img/s'] if published else []),
        'beside it',
    ]
    lines: List[List[str]] = []
    seen = []
    for row in rows:
        key = {name: row[name] for name in ('bench', 'case', 'batch_size', 'img_size', 'torchcompile', 'amp_dtype')}
        if key in seen:
            continue
        seen.append(key)
        for eva in pick(rows, **key, attention='eva'):
            softmax = pick(rows, **key, attention='softmax')
            what = 'training' if row['bench'] == 'train' else 'inference'
            memory = [
                f'{float(found["peak_memory_mib"]) / 1024:.1f}' if found and found['peak_memory_mib'] else '–'
                for found in (eva, softmax[0] if softmax else None)
            ]
            theirs = PUBLISHED.get(row['case']) if row['img_size'] == '224' else None
            digits = 0 if published else 1
            speeds = [float(found['img_per_s']) for found in (eva, *softmax[:1])]
            lines.append(
                [
                    f'`{row["case"]}`' + (', plain' if published and eva['backend'] == 'plain' else ''),
                    row['img_size'],
                    row['batch_size'],
                    what + (f', {MODES[row["torchcompile"]]}' if published else ''),
                    f'{speeds[0]:,.{digits}f}',
                    f'{speeds[1]:,.{digits}f}' if softmax else '–',
                    f'{speeds[0] / speeds[1]:.2f}' if softmax else '–',
                    *([*memory, f'{theirs[row["bench"] == "infer"]:,}' if theirs else '–'] if published else []),
                    f'`{_short(softmax[0])}`' if softmax else '–',
                ]
            )
    return pages.table(columns, lines) + '\n\n' + origins(rows)


def _by_model(row: Row) -> tuple:
    return row['case'], int(row['img_size'] or 0), row['bench'], list(MODES).index(row['torchcompile'])


def gpu_models() -> str:
    """Whole models on the GPU."""
    rows = [row for row in gpu_rows() if row['bench'] in ('train', 'infer')]
    return _model_table(sorted(rows, key=_by_model), published=True)


def best_models() -> str:
    """Whole models on the GPU, each compiled in the mode that suits EVA best."""
    rows = [row for row in gpu_rows() if row['bench'] in ('train', 'infer') and row['torchcompile'] != 'no']
    fastest: Dict[tuple, Row] = {}
    for row in pick(rows, attention='eva'):
        key = _by_model(row)[:3]
        fastest[key] = max(row, fastest.get(key, row), key=lambda row: float(row['img_per_s']))
    rows = [row for row in rows if row['torchcompile'] == fastest[_by_model(row)[:3]]['torchcompile']]
    return _model_table(sorted(rows, key=_by_model), published=True)


def cpu_models() -> str:
    """Whole models on the CPU."""
    return _model_table(cpu_rows(), published=False)


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


def eager() -> str:
    """Whole models in eager mode, before and after launches were bound once."""
    rows = load('eager_h200.csv')
    commits = list(dict.fromkeys(row['commit'] for row in rows))
    lines = []
    for bench, case in dict.fromkeys((row['bench'], row['case']) for row in rows):
        line = [f'`{case}`', {'train': 'training', 'infer': 'inference'}[bench]]
        for commit in commits:
            eva, softmax = (
                pick(rows, bench=bench, case=case, commit=commit, attention=name)[0] for name in ('eva', 'softmax')
            )
            line.append(f'{float(eva["ms"]):.1f}, {float(softmax["ms"]) / float(eva["ms"]):.2f}×')
        lines.append(line)
    columns = ['model', 'what', *(f'commit {commit}: ms, over softmax' for commit in commits)]
    return f'{pages.table(columns, lines)}\n\n{origins(rows)}'


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
