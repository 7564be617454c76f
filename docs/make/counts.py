#!/usr/bin/env python3
"""The error of EVA by `count_cells` as windows grow: python docs/make/counts.py

Measures, on a CPU, the relative RMS of EVA's output against softmax attention on `evavit.bench.compare`'s queries, keys
and values of scikit-learn's china.jpg, 14 × 14 tokens: 7 × 7 cells, σ the identity, no bias, no noise. Writes
results/counts_cpu.csv and docs/images/counts.svg; `tables.py` writes the table. Needs matplotlib and scikit-learn,
which `pip install '.[docs,quickstart]'` brings.
"""

import argparse

import pages
import torch

from evavit.bench.compare import image_qkv, open_picture, relative_rms, softmax_exactly
from evavit.bench.results import ORIGIN, origin, write_rows
from evavit.ops import eva_attention_variant

RESULTS = 'counts_cpu.csv'
PICTURE = pages.ROOT / 'docs' / 'images' / 'counts.svg'
FEAT_SIZE, CELLS = [14, 14], 7
WINDOWS = (0, 1, 2, 7, 14)  # they divide the grid, so that every query has as many tokens in E
COUNTS = {'one': '#d1495b', 'all': '#edae49', 'outside': '#00798c'}


def measure() -> list:
    """A row for each way to count and each window."""
    qkv = image_qkv(open_picture(), FEAT_SIZE)
    expected = softmax_exactly(qkv)
    shared = dict(summary_q=[], summary_k=[], partition_grid=CELLS)
    return [
        dict(
            count_cells=count,
            tokens_in_E=window**2,
            error=f'{relative_rms(eva(qkv, window, count, shared), expected):.4f}',
            **origin(torch.device('cpu')),
        )
        for count in COUNTS
        for window in WINDOWS
    ]


@torch.no_grad()
def eva(qkv: torch.Tensor, window: int, count: str, shared: dict) -> torch.Tensor:
    return eva_attention_variant(*qkv.unbind(0), FEAT_SIZE, window_size=window, count_cells=count, **shared)


def table() -> str:
    """The errors as measured: a row for each way to count."""
    rows = pages.read_results(RESULTS)
    sizes = sorted({int(row['tokens_in_E']) for row in rows})
    lines = []
    for count in COUNTS:
        of_count = [pages.pick(rows, count_cells=count, tokens_in_E=size)[0] for size in sizes]
        lines.append([f"`'{count}'`", *(f'{float(row["error"]):.3f}' for row in of_count)])
    return (
        pages.table(['`count_cells`', *(f'{size} tokens in E' for size in sizes)], lines) + f'\n\n{pages.origins(rows)}'
    )


def draw(rows: list) -> None:
    plt = pages.pyplot('counts')
    figure, axes = plt.subplots(figsize=(6, 3.2))
    for count, colour in COUNTS.items():
        errors = [float(row['error']) for row in pages.pick(rows, count_cells=count)]
        axes.plot(range(len(WINDOWS)), errors, marker='o', color=colour, label=f"count_cells='{count}'")
    axes.set_xticks(range(len(WINDOWS)), [str(window**2) for window in WINDOWS])
    axes.set_xlabel('tokens in E, of 196')
    axes.set_ylabel('error against softmax')
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    axes.spines[['top', 'right']].set_visible(False)
    figure.tight_layout()
    pages.save_plot(figure, PICTURE)


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    rows = measure()
    write_rows(pages.ROOT / 'results' / RESULTS, rows, ['count_cells', 'tokens_in_E', 'error', *ORIGIN])
    draw(rows)
    print(table())


if __name__ == '__main__':
    main()
