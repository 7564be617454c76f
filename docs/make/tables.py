#!/usr/bin/env python3
"""Write the tables and plots of the documentation: python tools/tables.py [--check]

Parameters and multiply-adds are counted on the code, by `zoo.py` beside this file; the paper's numbers stand beside
them. Measured figures come from results/, by `performance.py`; the plot carries a digest of its figures. A table goes
between two markers such as `<!-- models -->` and `<!-- /models -->`. With --check nothing is written; the exit code is
1 if a table or the plot is stale.
"""

import argparse
import sys
from pathlib import Path

import attentions
import elpv
import export_figures
import performance
import timm
import torch
import zoo

import evavit  # noqa: F401  (registers the models)

ROOT = Path(__file__).resolve().parent.parent

# Tables 6 and 8 of the paper, both with DeiT-Tiny-784: what is set, the keywords of the model, top-1; Table 2 prints
# parameters (M) and FLOPs (G) of some of these.
ABLATIONS = [
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


def shape(model: torch.nn.Module) -> tuple:
    """Tokens at 224 × 224, width, depth and heads as text; one number a stage for a pyramid."""
    if hasattr(model, 'stages'):
        blocks = [list(stage.blocks) for stage in model.stages]
        tokens = [(224 // info['reduction']) ** 2 for info in model.feature_info]
    else:
        blocks, tokens = [list(model.blocks)], [model.patch_embed.num_patches]
    rows = (
        tokens,
        [b[0].norm1.normalized_shape[0] for b in blocks],
        [len(b) for b in blocks],
        [b[0].attn.num_heads for b in blocks],
    )
    return tuple(' / '.join(f'{value:,}' for value in row) for row in rows)


def models() -> str:
    """The registered models, counted, beside the paper's numbers."""
    lines = [
        '| model | tokens | width | depth | heads | parameters | paper | multiply-adds | paper | top-1 in the paper | '
        'with softmax |',
        '|---|---|---|---|---|---|---|---|---|---|---|',
    ]
    for variant, paper in zoo.PAPER.items():
        name = f'eva_{variant}'
        paper_parameters, paper_flops, top1 = paper['eva']
        softmax = paper['softmax'][2] + (' †' if 'pvt' in variant else '')
        model = timm.create_model(name, device='meta')
        parameters, multiply_adds = zoo.count(name)
        lines.append(
            '| '
            + ' | '.join(
                [
                    f'`{name}`',
                    *shape(model),
                    f'{parameters / 1e6:.2f} M',
                    f'{paper_parameters} M',
                    f'{multiply_adds / 1e9:.2f} G',
                    f'{paper_flops} G',
                    top1,
                    softmax,
                ]
            )
            + ' |'
        )
    return '\n'.join(lines)


def ablations() -> str:
    """The paper's ablations of EVA, with the keywords that make each, counted."""
    lines = [
        '| table | what is set | keywords of `eva_deit_tiny_784` | parameters | paper | multiply-adds | paper | '
        'top-1 in the paper |',
        '|---|---|---|---|---|---|---|---|',
    ]
    for table, what, kwargs, top1, paper in ABLATIONS:
        parameters, multiply_adds = zoo.count('eva_deit_tiny_784', **kwargs)
        paper_parameters, paper_flops = (f'{paper[0]} M', f'{paper[1]} G') if paper else ('–', '–')
        keywords = ', '.join(f'`{key}={value!r}`' for key, value in kwargs.items()) or '–'
        lines.append(
            f'| {table} | {what} | {keywords} | {parameters / 1e6:.2f} M | {paper_parameters} | '
            f'{multiply_adds / 1e9:.2f} G | {paper_flops} | {top1} |'
        )
    return '\n'.join(lines)


PERFORMANCE = 'docs/performance.md'
ATTENTIONS = 'docs/attentions.md'
TABLES = {
    'attentions': (attentions.table, (ATTENTIONS,)),
    'errors': (attentions.error_table, (ATTENTIONS,)),
    'gallery': (attentions.gallery, (ATTENTIONS,)),
    'models': (models, ('README.md', 'docs/models.md')),
    'ablations': (ablations, ('docs/ablations.md',)),
    'options': (zoo.options, ('docs/zoo.md',)),
    'zoo': (zoo.tables, ('docs/zoo.md',)),
    'steps': (zoo.steps, ('docs/zoo.md',)),
    'measured': (performance.gpu_models, (PERFORMANCE,)),
    'compiled': (performance.best_models, ('README.md',)),
    'reach': (performance.reach, (PERFORMANCE,)),
    'op': (performance.op, (PERFORMANCE,)),
    'layer': (performance.layer, (PERFORMANCE,)),
    'cpu': (performance.cpu_models, (PERFORMANCE,)),
    'exported': (export_figures.table, ('docs/deploy.md',)),
    'operators': (export_figures.operators_table, ('docs/deploy.md',)),
    'precision': (export_figures.precision_table, ('docs/deploy.md',)),
    'elpv': (elpv.table, ('docs/transfer.md',)),
}


def replace(text: str, marker: str, generated: str) -> str:
    """The text with what stands between the two markers replaced."""
    begin, end = f'<!-- {marker} -->', f'<!-- /{marker} -->'
    if text.count(begin) != 1 or text.count(end) != 1:
        raise SystemExit(f'error: a page needs one {begin} and one {end}')
    return f'{text.split(begin)[0]}{begin}\n{generated}\n{end}{text.split(end)[1]}'


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--check', action='store_true', help='write nothing, fail if a table is stale')
    check = parser.parse_args().check
    stale = False
    for marker, (make, pages) in TABLES.items():
        generated = make()
        for name in pages:
            path = ROOT / name
            text = path.read_text(encoding='utf-8')
            fresh = replace(text, marker, generated)
            if fresh == text:
                print(f'{name}: {marker} up to date')
            elif check:
                stale = True
                print(f'{name}: the table {marker} is stale; run python tools/tables.py')
            else:
                path.write_text(fresh, encoding='utf-8')
                print(f'{name}: {marker} written')
    plot = performance.PLOT.relative_to(ROOT)
    if performance.plot_is_fresh():
        print(f'{plot}: up to date')
    elif check:
        stale = True
        print(f'{plot}: stale; run python tools/tables.py')
    else:
        performance.draw()
        print(f'{plot}: drawn')
    return int(stale)


if __name__ == '__main__':
    sys.exit(main())
