#!/usr/bin/env python3
"""Write the tables and the plots of the documentation: python docs/make/tables.py [--check]

Parameters and multiply-adds are counted on the code (`zoo.py`), and the paper's numbers stand beside them. What was
measured comes from results/ (`performance.py`, `goals.py`, `exported.py`, `elpv.py`, `counts.py`, `converted.py`,
`gallery.py`, `evidence.py`, `starts.py`, `transfer.py`).
A table goes between two markers such as `<!-- models -->` and `<!-- /models -->`. The plots of
performance.md and evidence.md carry a digest of what they show. With --check nothing is written, and the exit code is 1
if a table or one of these plots is stale.
"""

import argparse
import sys

import approximation
import attentions
import converted
import counts
import elpv
import evidence
import exported
import gallery
import goals
import pages
import performance
import starts
import timm
import torch
import transfer
import zoo

import evavit  # noqa: F401  (registers the models)

REMEDY = 'python docs/make/tables.py'

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
    columns = 'model, tokens, width, depth, heads, parameters, paper, multiply-adds, paper, top-1 in the paper'
    rows = []
    for variant, paper in zoo.PAPER.items():
        name = f'eva_{variant}'
        paper_parameters, paper_flops, top1 = paper['eva']
        # † where the paper's softmax model is not our attention in the same place.
        softmax = paper['softmax'][2] + (' †' if (f'softmax_{variant}', 'parameters') in zoo.REASONS else '')
        parameters, multiply_adds = zoo.count(name)
        rows.append(
            [
                f'`{name}`',
                *shape(timm.create_model(name, device='meta')),
                f'{parameters / 1e6:.2f} M',
                f'{paper_parameters} M',
                f'{multiply_adds / 1e9:.2f} G',
                f'{paper_flops} G',
                top1,
                softmax,
            ]
        )
    return pages.table([*columns.split(', '), 'with softmax'], rows)


def ablations() -> str:
    """The paper's ablations of EVA, with the keywords that make each, counted."""
    columns = 'table, what is set, keywords of `eva_deit_tiny_784`, parameters, paper, multiply-adds, paper'
    rows = []
    for table, what, kwargs, top1, paper in ABLATIONS:
        parameters, multiply_adds = zoo.count('eva_deit_tiny_784', **kwargs)
        paper_parameters, paper_flops = (f'{paper[0]} M', f'{paper[1]} G') if paper else ('–', '–')
        keywords = ', '.join(f'`{key}={value!r}`' for key, value in kwargs.items()) or '–'
        counted = [f'{parameters / 1e6:.2f} M', paper_parameters, f'{multiply_adds / 1e9:.2f} G', paper_flops]
        rows.append([table, what, keywords, *counted, top1])
    return pages.table([*columns.split(', '), 'top-1 in the paper'], rows)


TABLES = {  # of each page, by the name of its markers
    'README.md': {'evidence': converted.evidence},
    'docs/models.md': {'models': models},
    'docs/ablations.md': {'ablations': ablations, 'counts': counts.table},
    'docs/attentions.md': {
        'attentions': attentions.table,
        'errors': attentions.error_table,
        'gallery': attentions.gallery,
        'counts': counts.table,
    },
    'docs/zoo.md': {'options': zoo.options, 'zoo': zoo.tables, 'steps': zoo.steps, 'families': zoo.families},
    'docs/performance.md': {
        'gains': performance.gains,
        'compiled': performance.best_models,
        'modes': performance.modes,
        'op': performance.op,
        'cells': performance.cells,
        'peers': performance.peers,
        'layer': performance.layer,
        'host': performance.host,
        'measured': performance.gpu_models,
        'wide': performance.wide,
        'cpu': performance.cpu_models,
        'reach': goals.reach,
        'loaders': performance.loaders,
    },
    'docs/training.md': {'fed': performance.fed},
    'docs/deploy.md': {
        'exported': exported.table,
        'operators': exported.operators_table,
        'precision': exported.precision_table,
    },
    'docs/transfer.md': {'elpv': elpv.table, 'starts': starts.table},
    'docs/evidence.md': {
        'claims': evidence.claims,
        'eleven': evidence.eleven,
        'verdict': evidence.verdict,
        'approximation': approximation.table,
        'missing': evidence.missing,
        'transfer': transfer.section,
    },
    'docs/gallery.md': {'shared': gallery.table},
    'docs/convert.md': {
        'speed': converted.speed,
        'compiled': converted.compiled,
        'alone': converted.alone,
        'accuracy': converted.accuracy,
        'trained': converted.trained,
        'sizes': converted.sizes,
        'foreign': converted.foreign,
    },
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--check', action='store_true', help='write nothing, fail if a table is stale')
    check = parser.parse_args().check
    fresh = True
    for page, makers in TABLES.items():
        fresh &= pages.update(page, {marker: make() for marker, make in makers.items()}, check, REMEDY)
    for plotter in (performance, evidence, transfer):
        plot = plotter.PLOT.relative_to(pages.ROOT)
        if plotter.plot_is_fresh():
            print(f'{plot}: up to date')
        elif check:
            fresh = False
            print(f'{plot}: stale; run {REMEDY}')
        else:
            plotter.draw()
            print(f'{plot}: drawn')
    return int(not fresh)


if __name__ == '__main__':
    sys.exit(main())
