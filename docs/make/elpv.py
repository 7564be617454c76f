"""The table of docs/transfer.md that compares starts on ELPV, from results/elpv_h100.csv (examples/elpv.py)."""

import csv
from pathlib import Path
from statistics import mean, stdev
from typing import Dict, List

ROOT = Path(__file__).resolve().parent.parent
FILE = 'elpv_h100.csv'

TASKS = {'type': 'mono or poly', 'defect': 'four grades of defect'}
ARMS = {  # (model, start) → the name in the table
    ('eva_deit_tiny', 'fashion_mnist'): '`eva_deit_tiny`, from Fashion-MNIST',
    ('eva_deit_tiny', 'scratch'): '`eva_deit_tiny`, from scratch',
    ('resnet18', 'scratch'): 'timm `resnet18`, from scratch',
    ('deit_tiny_patch16_224', 'scratch'): 'timm `deit_tiny_patch16_224`, from scratch',
}
FIGURES = ('top1', 'balanced_accuracy', 'macro_f1')

Row = Dict[str, str]


def load() -> List[Row]:
    path = ROOT / 'results' / FILE
    if not path.exists():
        return []
    with open(path, newline='') as stream:
        return list(csv.DictReader(stream))


def spread(values: List[float]) -> str:
    """Mean ± standard deviation of a sample."""
    return f'{mean(values):.1f}' + (f' ± {stdev(values):.1f}' if len(values) > 1 else '')


def says(rows: List[Row], *columns: str) -> str:
    """The values of some columns, each once."""
    return ', '.join(sorted({' '.join(row[column] for column in columns) for row in rows}))


def table() -> str:
    """Mean ± standard deviation over the seeds, a row a start, and where the figures are from."""
    rows = load()
    if not any(row['task'] in TASKS for row in rows):
        return f'Not measured yet: there is no `{FILE}` among the results.'
    lines = ['| task | model and start | seeds | top-1 | balanced accuracy | macro F1 |', '|---|---|---|---|---|---|']
    for task, what in TASKS.items():
        found = [row for row in rows if row['task'] == task]
        for (model, start), name in ARMS.items():
            arm = [row for row in found if (row['model'], row['start']) == (model, start)]
            if arm:
                cells = [spread([float(row[figure]) for row in arm]) for figure in FIGURES]
                lines.append(f'| {what} | {name} | {len(arm)} | {" | ".join(cells)} |')
            elif found:
                lines.append(f'| {what} | {name} | – | not measured | – | – |')
        if found:
            classes = {'type': 2, 'defect': 4}[task]
            majority = float(found[0]['majority'])
            lines.append(
                f'| {what} | always the largest class | – | {majority:.1f} | {100 / classes:.1f} | '
                f'{2 * majority / (100 + majority) * 100 / classes:.1f} |'
            )
    tuned = [row for row in rows if row['task'] in TASKS]
    before = [row for row in rows if row['task'] == 'fashion_mnist']
    lines += [
        '',
        f'{says(tuned, "epochs")} epochs of {says(tuned, "train_images")} pictures in batches of '
        f'{says(tuned, "batch_size")}, judged on {says(tuned, "images")}.'
        + (
            f' The pretraining: {says(before, "epochs")} epochs, top-1 '
            f'{float(before[-1]["top1"]):.1f} on Fashion-MNIST.'
            if before
            else ''
        )
        + f' {says(rows, "device")}; torch {says(rows, "torch")}, timm {says(rows, "timm")}, evavit '
        f'{says(rows, "evavit", "commit")}, {says(rows, "date")}.',
    ]
    return '\n'.join(lines)
