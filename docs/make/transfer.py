"""What docs/evidence.md says of transfer from weights of our own, from results/transfer_h200.csv
(experiments/transfer): nothing while there are no rows.

`tables.py` writes the section, and draws docs/images/transfer.svg where it is stale. Needs matplotlib.
"""

import math
from statistics import mean, stdev
from typing import Dict, List, Tuple

import elpv
import pages

FILE = 'transfer_h200.csv'
PLOT = pages.ROOT / 'docs' / 'images' / 'transfer.svg'
TASKS = {  # the name in the table, and the figure: the grades of solar cells are too uneven for top-1
    'clothing': ('clothes, 224 px', 'top1'),
    'cifar100': ('CIFAR-100', 'top1'),
    'cifar10': ('CIFAR-10', 'top1'),
    'elpv': ('solar cells, 224 px, balanced', 'balanced_accuracy'),
}
HOWS = {'finetune': 'fine-tuned', 'linear': 'linear', 'knn': '20 neighbours'}
STARTS = {  # the name in the table, and a colour
    'eva': ('EVA', '#d1495b'),
    'softmax': ('softmax', '#30638e'),
    'converted': ('converted', '#edae49'),
    'scratch': ('EVA, no weights', '#7f8c99'),
}


def figures() -> Dict[Tuple[str, str, str], List[float]]:
    """(task, how, start) to the figures of its seeds, in percent."""
    rows, found = pages.read_results(FILE), {}
    for task, (_, score) in TASKS.items():
        for row in pages.pick(rows, task=task):
            found.setdefault((task, row['how'], row['start']), []).append(float(row[score]))
    return found


def section() -> str:
    """The section with its table and picture; empty while there are no rows."""
    found, rows = figures(), pages.read_results(FILE)
    if not found:
        return ''
    lines = []
    for task, (name, _) in TASKS.items():
        for how, way in HOWS.items():
            values = [found.get((task, how, start), []) for start in STARTS]
            if any(values):
                seeds = '/'.join(str(len(of)) for of in values)
                lines.append([name, way, *(elpv.spread(of, 2) if of else '–' for of in values), seeds])
    columns = ['pictures', 'how', *(name for name, _ in STARTS.values()), 'runs']
    before = pages.pick(rows, group='pretrain')
    trained = ', '.join(f'`{row["model"]}` {float(row["top1"]):.2f} %' for row in before)
    return (
        '## Transfer from weights of our own\n\n'
        f'{pages.table(columns, lines)}\n\n'
        + ('\n'.join(gaps(found)) + '\n\n' if any(gaps(found)) else '')
        + f'![The same figures, a panel for each set of pictures](images/{PLOT.name})\n\n'
        'Percent, mean ± standard deviation over the seeds of the training: each network was pretrained once, so that '
        'what\nanother pretraining would change is not in it.'
        + (f' On Tiny-ImageNet, after {before[0]["epochs"]} epochs: {trained}.' if before else '')
        + ' Converted is a DeiT with a class token,\nnot trained between conversion and transfer. How each is learnt '
        f'is in `experiments/transfer/run.py`. {pages.origins(rows)}'
    )


def gaps(found: Dict[Tuple[str, str, str], List[float]]) -> List[str]:
    """A line for each set of pictures: fine-tuned EVA against the other starts, and whether the seeds tell them
    apart."""
    lines = []
    for task, (name, _) in TASKS.items():
        eva, parts = found.get((task, 'finetune', 'eva'), []), []
        for start in ('scratch', 'softmax', 'converted'):
            other = found.get((task, 'finetune', start), [])
            if len(eva) > 1 and len(other) > 1:
                gap = mean(eva) - mean(other)
                covered = abs(gap) <= math.hypot(stdev(eva), stdev(other))
                parts.append(f'{gap:+.2f} against {STARTS[start][0]}' + ' (within the spread)' * covered)
        if parts:
            lines.append(f'* {name}, EVA fine-tuned: {", ".join(parts)}.')
    return lines


def plot_is_fresh() -> bool:
    """Whether the plot shows the rows; without rows there is none."""
    return pages.plot_is_fresh(PLOT, figures()) if figures() else not PLOT.exists()


def draw() -> None:
    """A panel for each set of pictures, a point with its spread for each start. Without rows the plot is removed."""
    found = figures()
    if not found:
        PLOT.unlink(missing_ok=True)
        return
    plt = pages.pyplot('transfer')
    tasks = [task for task in TASKS if any(key[0] == task for key in found)]
    figure, panels = plt.subplots(1, len(tasks), figsize=(2.9 * len(tasks), 3.4), squeeze=False)
    for panel, task in zip(panels[0], tasks, strict=True):
        for shift, (start, (name, colour)) in enumerate(STARTS.items()):
            points = [(x, found[task, how, start]) for x, how in enumerate(HOWS) if (task, how, start) in found]
            panel.errorbar(
                [x + 0.15 * (shift - 1.5) for x, _ in points],
                [mean(of) for _, of in points],
                yerr=[stdev(of) if len(of) > 1 else 0 for _, of in points],
                fmt='o',
                capsize=3,
                color=colour,
                label=name,
            )
        panel.set_xticks(range(len(HOWS)), HOWS.values(), fontsize=8)
        panel.set_title(TASKS[task][0], fontsize=10)
        panel.spines[['top', 'right']].set_visible(False)
    panels[0][0].set_ylabel('%')
    panels[0][0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    pages.save_plot(figure, PLOT, found)
    plt.close(figure)
