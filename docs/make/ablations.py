#!/usr/bin/env python3
"""The paper's ablations of EVA: counted, and trained on half of Tiny-ImageNet: python docs/make/ablations.py

The figures are those of results/attentions_h200.csv. Draws docs/images/ablations.svg, which carries a digest of its
data. `tables.py` writes the tables, and draws the plot where it is stale. Needs matplotlib.
"""

import argparse
import json
import math
from itertools import combinations
from statistics import mean
from typing import Dict, List, Tuple

import converted
import elpv
import pages
import zoo
from pages import Row

FILE = 'attentions_h200.csv'
PLOT = pages.ROOT / 'docs' / 'images' / 'ablations.svg'
SIDES = (0, 2, 4, 8)  # of windows and of cells
COLOURS = dict(zip(SIDES, ('#7f8c99', '#30638e', '#edae49', '#d1495b'), strict=True))  # by the side of windows

# Tables 6 and 8 of the paper, both with DeiT-Tiny-784: what is set, the keywords of the model, top-1; Table 2 prints
# parameters (M) and FLOPs (G) of some of these.
PAPER = [
    ('6', 'E 49, C 0: local attention', dict(partition_grid=0), '70.62', (5.7, 4.4)),
    ('6', 'E 0, C 49', dict(window_size=0), '74.33', None),
    ('6', 'E 49, C 1', dict(partition_grid=1), '74.10', None),
    ('6', 'E 49, C 16', dict(partition_grid=4), '75.83', None),
    ('6, 8', 'E 49, C 49: the default', {}, '76.67', (5.8, 4.6)),
    ('6', 'E 49, C 196', dict(partition_grid=14), '77.10', None),
    ('6', 'E 196, C 49', dict(window_size=14), '77.36', None),
    ('8', 'cells over the tokens outside E', dict(partition='complement'), '76.53', None),
    ('8', 'σ the identity', dict(summary='identity'), '75.95', None),
    ('8', 'C 1, 49 samples', dict(partition_grid=1, num_samples=49), '76.39', None),
    ('8', 'C 49, 49 samples', dict(num_samples=49), '76.75', None),
    ('8', 'proposal around q̃', dict(proposal='q'), '76.77', None),
    ('8', 'proposal around 0', dict(proposal='zero'), '76.24', None),
    ('8', 'proposal around parameters', dict(proposal='learned'), '76.39', None),
    ('–', 'σ a projection without LayerNorm', dict(summary='linear'), '–', None),
    ('–', 'overlapping windows', dict(overlap=True), '–', None),
]
SAME_SHARE = {0: 0, 4: 2, 7: 4, 14: 8}  # sides of 28 × 28 tokens to those of 16 × 16 that are as large a share, nearly
ALSO = {  # trained here, and not in the paper
    'noise_std': "no noise: ω is the proposal's mean",
    'num_samples': '4 samples',
    'count_cells=all': "`'all'`: cells count as often as they have tokens",
    'count_cells=outside': "`'outside'`: as often as they have tokens outside of E",
}


def counted() -> str:
    """The paper's ablations of EVA, with the keywords that make each, counted."""
    columns = 'table, what is set, keywords of `eva_deit_tiny_784`, parameters, paper, multiply-adds, paper'
    rows = []
    for table, what, kwargs, top1, paper in PAPER:
        parameters, multiply_adds = zoo.count('eva_deit_tiny_784', **kwargs)
        paper_parameters, paper_flops = (f'{paper[0]} M', f'{paper[1]} G') if paper else ('–', '–')
        keywords = ', '.join(f'`{key}={value!r}`' for key, value in kwargs.items()) or '–'
        numbers = [f'{parameters / 1e6:.2f} M', paper_parameters, f'{multiply_adds / 1e9:.2f} G', paper_flops]
        rows.append([table, what, keywords, *numbers, top1])
    return pages.table([*columns.split(', '), 'top-1 in the paper'], rows)


def grid() -> Dict[Tuple[int, int], Row]:
    """The run of each side of windows and of cells."""
    found = {}
    for row in pages.pick(pages.read_results(FILE), group='cells'):
        arguments = json.loads(row['arguments'])
        found[arguments['window_size'], arguments['partition_grid']] = row
    return found


def published() -> Dict[Tuple[int, int], float]:
    """The paper's top-1 for windows and cells that are as large a share of its 784 tokens as these of 256."""
    found = {}
    for table, _, kwargs, top1, _ in PAPER:
        sides = [SAME_SHARE.get(kwargs.get(key, 7)) for key in ('window_size', 'partition_grid')]
        if '6' in table and None not in sides:
            found[tuple(sides)] = float(top1)
    return found


def top(row: Row) -> float:
    return float(row['top1'])


def windows() -> str:
    """Top-1 by windows and cells, and what it says."""
    found, paper = grid(), published()

    def cell(window: int, cells: int) -> str:
        if (window, cells) not in found:
            return '–'
        beside = f' ({paper[window, cells]:.2f})' if (window, cells) in paper else ''
        return f'{top(found[window, cells]):.2f}{beside}'

    lines = [[window**2 or 'none', *(cell(window, cells) for cells in SIDES)] for window in SIDES]
    columns = ['tokens of the window', *(f'{cells**2 or "no"} cells' for cells in SIDES)]
    rise = [top(found[window, 2]) - top(found[window, 0]) for window in SIDES[1:]]
    many = {key: top(row) for key, row in found.items() if key[1] >= 4}
    low, high = min(many, key=many.__getitem__), max(many, key=many.__getitem__)
    error = math.hypot(pages.standard_error(found[low]), pages.standard_error(found[high]))
    pairs = list(combinations([key for key in paper if key in found], 2))
    same = sum((top(found[a]) - top(found[b])) * (paper[a] - paper[b]) > 0 for a, b in pairs)
    alone = [top(found[window, 0]) for window in SIDES[1:]]
    return (
        f'{pages.table(columns, lines)}\n\n'
        f'* Without cells a larger window helps: {alone[0]:.1f}, {alone[1]:.1f}, {alone[2]:.1f} %.\n'
        f'* Four cells add {min(rise):.1f} to {max(rise):.1f} points, most to the smallest window. Without any window '
        f'they come to {top(found[0, 2]):.1f} %.\n'
        f'* With 16 cells or more all {len(many)} lie between {many[low]:.2f} and {many[high]:.2f} %: '
        f'{(many[high] - many[low]) / error:.1f} standard errors of\n  {error:.2f} points. Which window is best beside '
        f'them these runs do not tell.\n'
        f"* {same} of the {len(pairs)} pairs with a figure of the paper are in its order: Kendall's τ is "
        f'{2 * same / len(pairs) - 1:.2f}.\n\n'
        f'{pages.origins(found.values())}'
    )


def settings() -> List[Tuple[str, str, List[Row], str]]:
    """What was set, as keywords, the runs, a seed each, and the paper's top-1; the default first."""
    rows, names = pages.pick(pages.read_results(FILE), group='table8'), {}
    for row in rows:
        names.setdefault(row['run'].split('-')[1], []).append(row)
    default = json.loads(names['default'][0]['arguments'])
    found = []
    for runs in names.values():
        arguments = json.loads(runs[0]['arguments'])
        changed = {key: value for key, value in arguments.items() if default.get(key) != value}
        known = [(what, top1) for _, what, kwargs, top1, _ in PAPER if kwargs == changed]
        told = next((f'{key}={value}' for key, value in changed.items()), '')
        what, top1 = known[0] if known else (ALSO.get(told, ALSO.get(told.split('=')[0], told)), '–')
        keywords = ', '.join(f'`{key}={value!r}`' for key, value in changed.items()) or '–'
        found.append((what if changed else 'the default, E 16, C 16', keywords, runs, top1))
    return sorted(found, key=lambda one: (one[1] != '–', -mean(converted.tops(one[2]))))


def trained() -> str:
    """The ablations, trained, and what they say."""
    (_, _, default, _), *others = found = settings()
    middle = mean(converted.tops(default))
    error = math.sqrt(2) * pages.standard_error(default[0])
    lines = []
    for what, keywords, runs, top1 in found:
        apart = mean(converted.tops(runs)) - middle
        told = '–' if runs is default else f'{apart:+.2f}'
        lines.append([what, keywords, f'{elpv.spread(converted.tops(runs), 2)}', len(runs), told, top1])
    columns = ['what is set', 'keywords', 'top-1, %', 'seeds', 'points from the default', 'the paper, ImageNet']
    behind = [(what, (mean(converted.tops(runs)) - middle) / error) for what, _, runs, _ in others]
    clear = [f'{what} ({times:+.1f})' for what, times in behind if abs(times) > 1.96]
    return (
        f'{pages.table(columns, lines)}\n\n'
        f'* A difference has a standard error of {error:.2f} points from the {int(default[0]["images"]):,} pictures. '
        f'Of {len(behind)} these are more than 1.96 of those:\n  {", ".join(clear) or "none"}.\n\n'
        f'{pages.origins([row for _, _, runs, _ in found for row in runs])}'
    )


def plotted() -> dict:
    """The data of both panels."""
    return dict(
        grid=[(*sides, top(row), pages.standard_error(row)) for sides, row in sorted(grid().items())],
        settings=[(keywords, converted.tops(runs)) for _, keywords, runs, _ in settings()],
    )


def plot_is_fresh() -> bool:
    return pages.plot_is_fresh(PLOT, plotted())


def draw() -> None:
    """Top-1 over cells, a line for each window, and of each ablation."""
    plt = pages.pyplot('ablations')
    data = plotted()
    figure, (over, beside) = plt.subplots(1, 2, figsize=(10, 3.6))
    for side, colour in COLOURS.items():
        points = [(SIDES.index(cells), y, 1.96 * e) for window, cells, y, e in data['grid'] if window == side]
        x, y, bars = zip(*points, strict=True)
        what = f'window of {side**2}' if side else 'no window'
        over.errorbar(x, y, yerr=bars, marker='o', capsize=3, color=colour, label=what)
    over.set_xticks(range(len(SIDES)), [side**2 for side in SIDES])
    over.set_xlabel('cells')
    over.set_ylabel('top-1, %')
    over.legend(frameon=False, fontsize=8, loc='lower right')
    over.set_title('windows and cells', fontsize=10)
    error = 1.96 * next(e for window, cells, _, e in data['grid'] if window == cells == 4)
    names = ['default' if keywords == '–' else keywords.strip('`') for keywords, _ in data['settings']]
    for place, (_, tops) in enumerate(reversed(data['settings'])):
        colour = COLOURS[8] if place == len(names) - 1 else COLOURS[0]
        beside.plot(tops, [place] * len(tops), 'o', color=colour)
        beside.errorbar(mean(tops), place, xerr=error, capsize=3, color=colour)
    beside.set_yticks(range(len(names)), reversed(names), fontsize=8)
    beside.set_xlabel('top-1, %')
    beside.set_title('one thing set otherwise; windows of 16, 16 cells', fontsize=10)
    for axes in (over, beside):
        axes.spines[['top', 'right']].set_visible(False)
    figure.tight_layout()
    pages.save_plot(figure, PLOT, data)
    plt.close(figure)


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    draw()
    for table in (counted, windows, trained):
        print(table(), end='\n\n')


if __name__ == '__main__':
    main()
