"""The tables of docs/deploy.md about models in other forms, from what experiments/export measured."""

import pages
from pages import origins

from evavit import export as exporting

FORM_NAMES = {'pytorch': 'PyTorch', 'onnx': 'onnxruntime', 'aoti': 'package'}


def _error(row: pages.Row) -> str:
    return row['error'] if float(row['error']) else '–'


def table() -> str:
    """Size, time and error of each form."""
    rows = [row for row in pages.read_results('export_cpu.csv') if row['cpu_ms']]
    lines = [
        [
            f'`{row["model"]}`',
            FORM_NAMES[row['form']],
            row['precision'],
            row['size_mib'],
            f'{float(row["cpu_ms"]):,.0f}',
            _error(row),
        ]
        for row in rows
    ]
    return pages.table(['model', 'form', 'precision', 'MiB', 'CPU ms', 'error'], lines) + '\n\n' + origins(rows)


def operators_table() -> str:
    """How often each ONNX operator stands in each exported model, and what TensorRT's parser asks of it."""
    rows = pages.read_results('onnx_operators.csv')
    counts = [dict(entry.rsplit(':', 1) for entry in row['operators'].split()) for row in rows]
    heads = [f'`{row["model"]}`, {row["precision"]}, {row["img_size"]}' for row in rows]
    lines = []
    for name in sorted(set().union(*counts)):
        rule = exporting.TENSORRT_OPERATORS.get(name)
        reads = 'not known' if rule is None else f'yes; {rule}' if rule else 'yes'
        lines.append([name, *(count.get(name, '–') for count in counts), reads])
    refused = {row['tensorrt'] for row in rows} - {''}
    verdict = (
        f"TensorRT's parser may not read: {'; '.join(sorted(refused))}."
        if refused
        else "Nothing in these files that TensorRT's parser does not read, by its table, restrictions and types "
        'included.'
    )
    return pages.table(['operator', *heads, 'in TensorRT'], lines) + '\n\n' + verdict


def precision_table() -> str:
    """Top-1 of trained models in each precision."""
    rows = [row for row in pages.read_results('export_cpu.csv') if row['top1']]
    lines = [[row['model'], row['precision'], row['top1'], _error(row)] for row in rows]
    return pages.table(['model', 'precision', 'top-1', 'error of the logits'], lines) + '\n\n' + origins(rows)
