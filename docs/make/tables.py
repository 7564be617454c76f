#!/usr/bin/env python3
"""Write the tables and the plots of the documentation: python docs/make/tables.py [--check]

Parameters and multiply-adds are counted on the code (`zoo.py`), and the paper's numbers stand beside them. What was
measured comes from results/ (`performance.py`, `goals.py`, `exported.py`, `elpv.py`, `counts.py`, `converted.py`,
`gallery.py`, `ablations.py`, `evidence.py`, `starts.py`, `transfer.py`).
A table goes between two markers such as `<!-- models -->` and `<!-- /models -->`. The plots of performance.md,
ablations.md, evidence.md and transfer.md carry a digest of what they show. With --check nothing is written, and the
exit code is 1 if a table or one of these plots is stale.
"""

import argparse
import sys

import ablations
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


TABLES = {  # of each page, by the name of its markers
    'README.md': {'evidence': converted.evidence},
    'docs/models.md': {'models': models},
    'docs/ablations.md': {
        'ablations': ablations.counted,
        'windows': ablations.windows,
        'trained': ablations.trained,
        'counts': counts.table,
    },
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
    for plotter in (ablations, performance, evidence, transfer):
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
