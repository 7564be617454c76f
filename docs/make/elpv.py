"""The table of docs/transfer.md that compares starts on ELPV, from results/elpv_h100.csv (experiments/elpv)."""

from statistics import mean, stdev
from typing import List

import pages
from pages import Row

FILE = 'elpv_h100.csv'

TASKS = {'type': 'mono or poly', 'defect': 'four grades of defect'}
CLASSES = {'type': 2, 'defect': 4}
ARMS = {  # (model, start) → the name in the table
    ('eva_deit_tiny', 'fashion_mnist'): '`eva_deit_tiny`, from Fashion-MNIST',
    ('eva_deit_tiny', 'scratch'): '`eva_deit_tiny`, from scratch',
    ('resnet18', 'scratch'): 'timm `resnet18`, from scratch',
    ('deit_tiny_patch16_224', 'scratch'): 'timm `deit_tiny_patch16_224`, from scratch',
}
SCORES = ('top1', 'balanced_accuracy', 'macro_f1')


def spread(values: List[float], digits: int = 1) -> str:
    """Mean ± standard deviation of a sample."""
    return f'{mean(values):.{digits}f}' + (f' ± {stdev(values):.{digits}f}' if len(values) > 1 else '')


def says(rows: List[Row], *columns: str) -> str:
    """The values of some columns, each once."""
    return ', '.join(sorted({' '.join(row[column] for column in columns) for row in rows}))


def table() -> str:
    """Mean ± standard deviation over the seeds, a row a start, and what the rows were measured with."""
    rows = pages.read_results(FILE)
    tuned = [row for row in rows if row['task'] in TASKS]
    if not tuned:
        return f'Not measured yet: there is no `{FILE}` among the results.'
    lines = []
    for task, what in TASKS.items():
        found = pages.pick(tuned, task=task)
        if not found:
            continue
        for (model, start), name in ARMS.items():
            arm = pages.pick(found, model=model, start=start)
            cells = (
                [spread([float(row[score]) for row in arm]) for score in SCORES] if arm else ['not measured', '–', '–']
            )
            lines.append([what, name, len(arm) or '–', *cells])
        majority = float(found[0]['majority'])
        macro_f1 = 2 * majority / (100 + majority) * 100 / CLASSES[task]
        always = [f'{value:.1f}' for value in (majority, 100 / CLASSES[task], macro_f1)]
        lines.append([what, 'always the largest class', '–', *always])
    before = pages.pick(rows, task='fashion_mnist')
    columns = ['task', 'model and start', 'seeds', 'top-1', 'balanced accuracy', 'macro F1']
    return pages.table(columns, lines) + (
        f'\n\n{says(tuned, "epochs")} epochs of {says(tuned, "train_images")} pictures in batches of '
        f'{says(tuned, "batch_size")}, judged on {says(tuned, "images")}.'
        + (
            f' The pretraining: {says(before, "epochs")} epochs, top-1 '
            f'{float(before[-1]["top1"]):.1f} on Fashion-MNIST.'
            if before
            else ''
        )
        + f' {says(rows, "device")}; torch {says(rows, "torch")}, timm {says(rows, "timm")}, evavit '
        f'{says(rows, "evavit", "commit")}, {says(rows, "date")}.'
    )
