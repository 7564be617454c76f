#!/usr/bin/env python3
"""Write the tables and plots of the documentation: python tools/tables.py [--check]

Parameters and multiply-adds are counted on the code (torch.utils.flop_counter, meta device, one image of 224 × 224);
the paper's numbers stand beside them. Measured figures come from results/, by `performance.py` beside this file; the
plot carries a digest of its figures. A table goes between two markers such as `<!-- models -->` and `<!-- /models -->`.
With --check nothing is written; the exit code is 1 if a table or the plot is stale.
"""
import argparse
import sys
from pathlib import Path

import attentions
import performance
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import evavit  # noqa: F401  (registers the models)

ROOT = Path(__file__).resolve().parent.parent

# Tables 1, 2 and 10 of the paper: parameters (M), FLOPs (G, multiply-adds), top-1 with EVA and with softmax.
PAPER = {
    'eva_deit_tiny': (5.8, 1.2, '73.00', '72.98'),
    'eva_deit_small': (22.2, 4.4, '80.65', '80.36'),
    'eva_deit_tiny_784': (5.8, 4.6, '76.67', '77.16'),
    'eva_pvt_v2_b3': (36.1, 7.4, '83.71', '83.14 †'),
}

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


def count(model: torch.nn.Module) -> tuple:
    """Parameters and multiply-adds of one 224 × 224 image."""
    with torch.no_grad(), FlopCounterMode(display=False) as flops:
        model(torch.empty(1, 3, 224, 224, device='meta'))
    return sum(p.numel() for p in model.parameters()), flops.get_total_flops() // 2


def shape(model: torch.nn.Module) -> tuple:
    """Tokens at 224 × 224, width, depth and heads as text; one number a stage for a pyramid."""
    if hasattr(model, 'stages'):
        blocks = [list(stage.blocks) for stage in model.stages]
        tokens = [(224 // info['reduction']) ** 2 for info in model.feature_info]
    else:
        blocks, tokens = [list(model.blocks)], [model.patch_embed.num_patches]
    rows = (tokens, [b[0].norm1.normalized_shape[0] for b in blocks], [len(b) for b in blocks],
            [b[0].attn.num_heads for b in blocks])
    return tuple(' / '.join(f'{value:,}' for value in row) for row in rows)


def models() -> str:
    """The registered models, counted, beside the paper's numbers."""
    lines = [
        '| model | tokens | width | depth | heads | parameters | paper | multiply-adds | paper | top-1 in the paper | '
        'with softmax |',
        '|---|---|---|---|---|---|---|---|---|---|---|',
    ]
    for name, (paper_parameters, paper_flops, top1, softmax) in PAPER.items():
        model = timm.create_model(name, device='meta').eval()
        parameters, multiply_adds = count(model)
        lines.append('| ' + ' | '.join([
            f'`{name}`', *shape(model),
            f'{parameters / 1e6:.2f} M', f'{paper_parameters} M',
            f'{multiply_adds / 1e9:.2f} G', f'{paper_flops} G', top1, softmax]) + ' |')
    return '\n'.join(lines)


def ablations() -> str:
    """The paper's ablations of EVA, with the keywords that make each, counted."""
    lines = [
        '| table | what is set | keywords of `eva_deit_tiny_784` | parameters | paper | multiply-adds | paper | '
        'top-1 in the paper |',
        '|---|---|---|---|---|---|---|---|',
    ]
    for table, what, kwargs, top1, paper in ABLATIONS:
        # The blocks are alike, so one and two of them give the counts of all twelve, in a sixth of the time.
        one, two = (count(timm.create_model('eva_deit_tiny_784', device='meta', depth=depth, **kwargs).eval())
                    for depth in (1, 2))
        parameters, multiply_adds = (a + 11 * (b - a) for a, b in zip(one, two, strict=True))
        paper_parameters, paper_flops = (f'{paper[0]} M', f'{paper[1]} G') if paper else ('–', '–')
        keywords = ', '.join(f'`{key}={value!r}`' for key, value in kwargs.items()) or '–'
        lines.append(f'| {table} | {what} | {keywords} | {parameters / 1e6:.2f} M | {paper_parameters} | '
                     f'{multiply_adds / 1e9:.2f} G | {paper_flops} | {top1} |')
    return '\n'.join(lines)


PERFORMANCE = 'docs/performance.md'
ATTENTIONS = 'docs/attentions.md'
TABLES = {
    'attentions': (attentions.table, (ATTENTIONS,)),
    'errors': (attentions.error_table, (ATTENTIONS,)),
    'gallery': (attentions.gallery, (ATTENTIONS,)),
    'models': (models, ('README.md', 'docs/models.md')),
    'ablations': (ablations, ('docs/ablations.md',)),
    'measured': (performance.gpu_models, ('README.md', PERFORMANCE)),
    'reach': (performance.reach, (PERFORMANCE,)),
    'op': (performance.op, (PERFORMANCE,)),
    'layer': (performance.layer, (PERFORMANCE,)),
    'cpu': (performance.cpu_models, (PERFORMANCE,)),
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
