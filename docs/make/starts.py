"""How near a converted network with class token starts, plain and rotary, for docs/transfer.md, from
results/softmax_to_eva.csv (experiments/softmax_to_eva/run.py --convert). `tables.py` writes the table.
"""

from statistics import mean
from typing import Dict, List

import elpv
import pages

FILE = 'softmax_to_eva.csv'
NETWORKS = {'Digits, class token, 1 + 64 tokens': 'ViT', 'Digits, class token, rotary, 1 + 64 tokens': 'rotary'}
OURS = '**linear summary, as converted**'
COUNTS = ('outside', 'all', 'one')
FIGURES = {'attention': ('attention', 3), 'output': ('logits', 3), 'top1': ('top-1', 1)}  # name, digits


def measured() -> Dict[str, List[pages.Row]]:
    """The rows of each network, by its short name."""
    rows = pages.read_results(FILE)
    return {name: pages.pick(rows, weights=network) for network, name in NETWORKS.items()}


def figures(rows: List[pages.Row], figure: str, **wanted: str) -> List[float]:
    """A figure of these rows, a seed each."""
    return [float(row[figure]) for row in pages.pick(rows, **wanted)]


def firsts(rows: List[pages.Row], figure: str) -> str:
    """In how many seeds `OURS` with 'outside' is nearer than every other start with every count."""
    seeds = sorted({row['seed'] for row in rows})
    best = [
        min(
            (row for row in pages.pick(rows, seed=seed) if row['count_cells']),
            key=lambda row: float(row[figure]),
        )
        for seed in seeds
    ]
    ours = [row for row in best if (row['start'], row['count_cells']) == (OURS, COUNTS[0])]
    return f'{len(ours)} of {len(seeds)}'


def table() -> str:
    """Means over the seeds: a row a start, in each cell a figure for each of `COUNTS`; then what is nearest."""
    found = measured()
    lines = []
    for start in dict.fromkeys(row['start'] for row in found['ViT'] if row['count_cells']):
        cells = [
            ' / '.join(f'{mean(figures(rows, figure, start=start, count_cells=count)):.{digits}f}' for count in COUNTS)
            for rows in found.values()
            for figure, (_, digits) in FIGURES.items()
        ]
        lines.append([start, *cells])
    columns = [f'{network}: {name}' for network in found for name, _ in FIGURES.values()]
    parents = ', '.join(
        f'{network} {elpv.spread(figures(rows, "top1", start="softmax"))} %' for network, rows in found.items()
    )
    nearest = '; '.join(
        f'{network}, by attention {firsts(rows, "attention")}, by logits {firsts(rows, "output")}'
        for network, rows in found.items()
    )
    return (
        f'{pages.table(["start", *columns], lines)}\n\n'
        f'In each cell {" / ".join(f"`{count!r}`" for count in COUNTS)}, means of the seeds. The parents: {parents}.\n'
        f"Seeds in which the start as converted, with `'outside'`, is the nearest of all {len(lines) * len(COUNTS)}:\n"
        f'{nearest}.\n\n{pages.origins(row for rows in found.values() for row in rows)}'
    )
