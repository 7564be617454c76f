#!/usr/bin/env python3
"""The pictures and tables of docs/attentions.md: python docs/make/attentions.py

Draws docs/images/attentions/NAME.png for each attention of `evavit.layers.ATTENTIONS`: its matrix of weights on a
14 × 14 grid, and one query's weights as a map, from `evavit.bench.compare`'s queries and keys of scikit-learn's
china.jpg. Negative weights are blue. `tables.py` writes the tables, whose errors stand in
results/compare_cpu.csv. Needs matplotlib and scikit-learn, which `pip install '.[docs,quickstart]'` brings.
"""

import argparse
import inspect

import pages
import torch
import zoo
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from evavit.bench.compare import (
    DIM,
    NUM_HEADS,
    attention_matrix,
    image_qkv,
    make_attention,
    open_picture,
    relative_rms,
)
from evavit.files import replacing
from evavit.layers import ATTENTIONS, GridAttention, SoftmaxAttention, attention_layer

PICTURES = pages.ROOT / 'docs' / 'images' / 'attentions'
ERRORS = 'compare_cpu.csv'
FEAT_SIZE = [14, 14]
QUERY = (9, 4)  # row, column
HEAD = 0
# Colours: 48 for weights from 1e-5 to 1e-1 on a log scale, 16 for negative ones of the same sizes.
POSITIVE, NEGATIVE, LOWEST, HIGHEST = 48, 16, -5.0, -1.0

# What the code does not say by itself: how time grows with N, what a query n sees, and what runs it fast. w is the side
# of a window, m the tokens of a chunk.
FACTS = {
    'eva': ('N·(w² + C)', 'the tokens of its window one by one, the rest as at most 49 cells', 'Triton kernels'),
    'softmax': ('N²', 'every token one by one', '`scaled_dot_product_attention`'),
    'local': ('N·w²', 'the tokens of its window and no other', "EVA's Triton kernels"),
    'performer': ('N·S', 'every token through S = 128 random features', 'no'),
    'lara': ('N·C', 'every token through C = 49 samples, one for each landmark', 'no'),
    'scatterbrain': (
        'N·(w² + S)',
        'the tokens of its window one by one, the rest through S = 96 random features',
        'no',
    ),
    'nystromformer': ('N·C + C³', 'every token through C = 49 landmarks', 'no'),
    'combiner': ('N·(w² + N / w²)', 'the tokens of its window one by one, every other window as one', 'no'),
    'long_short': ('N·(w² + r)', 'the tokens of its window one by one, and r = 16 averages of all tokens', 'no'),
    'linformer': (
        'N·r',
        'r = 128 learned combinations of all tokens',
        '`scaled_dot_product_attention` after the projection',
    ),
    'reformer': (
        'N·R·m + N·log N',
        'tokens that share its bucket in one of R = 4 rounds of hashing, within chunks',
        'no',
    ),
}


def facts(name: str) -> tuple:
    if name not in FACTS:
        raise SystemExit(f'error: FACTS in docs/make/attentions.py has no line about {name}; add one')
    return FACTS[name]


def multiply_adds(layer: GridAttention, side: int) -> float:
    """Millions of multiply-adds between the projections, one image of side × side tokens."""
    with torch.no_grad(), FlopCounterMode(display=False) as flops:
        x = torch.empty(1, side**2, DIM, device='meta')
        layer(x, [side, side])
    of_part = flops.get_flop_counts()
    projections = sum(sum(of_part[f'{type(layer).__name__}.{part}'].values()) for part in ('qkv', 'proj'))
    return ((flops.get_total_flops() - projections) / 2 - zoo.sums_over_cells(layer, x, [side, side])) / 1e6


def own_options(name: str) -> str:
    """The options of the attention's own, with their defaults."""
    shared = inspect.signature(GridAttention).parameters
    own = {
        key: parameter.default
        for key, parameter in inspect.signature(ATTENTIONS[name]).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and key not in shared and key != 'feat_size'
    }
    return ', '.join(f'`{key}={value!r}`' for key, value in own.items()) or '–'


def table() -> str:
    """Every attention of the table: what it costs and sees."""
    columns = [
        'attention',
        'time grows with',
        'a query sees',
        'parameters beyond softmax',
        'multiply-adds, 784 tokens',
        '3,136 tokens',
        'any size',
        'fused',
    ]
    rows = []
    softmax = sum(p.numel() for p in SoftmaxAttention(DIM, NUM_HEADS, device='meta').parameters())
    for name, attention in ATTENTIONS.items():
        complexity, sees, fused = facts(name)
        layers = [attention_layer(name, [side, side])(DIM, NUM_HEADS, device='meta').eval() for side in (28, 56)]
        extra = sum(p.numel() for p in layers[0].parameters()) - softmax
        counts = [f'{multiply_adds(layer, side):,.0f} M' for layer, side in zip(layers, (28, 56), strict=True)]
        sizes = 'made for one, resampled to others' if attention.fixed_grid else 'yes'
        rows.append([f'[`{name}`](#{name})', complexity, sees, f'{extra:,}'.replace('-', '−'), *counts, sizes, fused])
    return pages.table(columns, rows)


def errors() -> dict:
    """(attention, tokens) to the row of results/compare_cpu.csv."""
    return {(row['attention'], int(row['tokens'])): row for row in pages.read_results(ERRORS)}


def error_table() -> str:
    """Error and memory by number of tokens."""
    rows = errors()
    counts = sorted({tokens for _, tokens in rows})
    lines = []
    for name in ('mean', *ATTENTIONS):
        cells = [rows[name, count] for count in counts]
        shown = [f'`{name}`' if name in ATTENTIONS else 'mean of the values']
        lines.append(
            [*shown, *(f'{float(row["error"]):.2f}' for row in cells), *(row['memory_mib'] or '–' for row in cells)]
        )
    columns = [f'{what}, {count:,} tokens' for what in ('error', 'MiB') for count in counts]
    row = rows['mean', counts[0]]
    return pages.table(['attention', *columns], lines) + f'\n\n{row["device"]}, torch {row["torch"]}, {row["date"]}.'


def gallery() -> str:
    """A section with the picture of each attention."""
    rows = errors()
    sections = []
    for name, attention in ATTENTIONS.items():
        error = float(rows[name, FEAT_SIZE[0] * FEAT_SIZE[1]]['error'])
        lines = [f'`{attention.__name__}`: a query sees {facts(name)[1]}.']
        if name != 'softmax':
            lines.append(f'Error against softmax on this picture: {error:.2f}.')
        lines.append(f'Options: {own_options(name)}.')
        sections.append(
            f'### {name}\n\n' + '\n'.join(lines) + f'\n\n![Weights of {name}](images/attentions/{name}.png)'
        )
    return '\n\n'.join(sections)


def weights(name: str) -> torch.Tensor:
    """The matrix of weights of one head, `(N, N)`, checked against the attention's output on the picture's values."""
    qkv = image_qkv(open_picture(), FEAT_SIZE)
    layer = make_attention(name, FEAT_SIZE)

    def attend(qkv):
        return layer.attend(qkv, FEAT_SIZE)

    matrix = attention_matrix(attend, qkv)
    with torch.no_grad():
        gap = relative_rms(matrix @ qkv[2, 0], attend(qkv)[0])
    if gap > 1e-3:
        raise SystemExit(f'error: {name}: its matrix gives an output that is off by {gap:.1e}')
    return matrix[HEAD]


def colours(matrix: torch.Tensor) -> torch.Tensor:
    """Weights to numbers of the palette."""
    level = ((matrix.abs().clamp(min=1e-30).log10() - LOWEST) / (HIGHEST - LOWEST)).clamp(0, 1)
    positive = (level * (POSITIVE - 1)).round()
    negative = POSITIVE + (level * (NEGATIVE - 1)).round()
    return torch.where((matrix < 0) & (level > 0), negative, positive).to(torch.uint8)


def palette() -> list:
    import matplotlib

    magma, blues = matplotlib.colormaps['magma'], matplotlib.colormaps['Blues']
    colors = [magma(i / (POSITIVE - 1)) for i in range(POSITIVE)]
    colors += [blues(0.35 + 0.65 * i / (NEGATIVE - 1)) for i in range(NEGATIVE)]
    return [round(255 * part) for color in [*colors, (1.0, 1.0, 1.0, 1.0)] for part in color[:3]]


def picture(name: str) -> Image.Image:
    """The matrix, two pixels a weight, and the map of one query, whose place is outlined."""
    H, W = FEAT_SIZE
    numbers = colours(weights(name))
    left = numbers.repeat_interleave(2, 0).repeat_interleave(2, 1)
    size = left.shape[0] // H
    right = numbers[QUERY[0] * W + QUERY[1]].view(H, W).repeat_interleave(size, 0).repeat_interleave(size, 1).clone()
    white = POSITIVE + NEGATIVE
    y, x = QUERY[0] * size, QUERY[1] * size
    inside = right[y + 2 : y + size - 2, x + 2 : x + size - 2].clone()
    right[y : y + size, x : x + size] = white
    right[y + 2 : y + size - 2, x + 2 : x + size - 2] = inside
    whole = torch.cat([left, torch.full((left.shape[0], 10), white, dtype=torch.uint8), right], 1)
    image = Image.frombytes('P', (whole.shape[1], whole.shape[0]), bytes(whole.flatten().tolist()))
    image.putpalette(palette())
    return image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.parse_args()
    PICTURES.mkdir(parents=True, exist_ok=True)
    for name in ATTENTIONS:
        path = PICTURES / f'{name}.png'
        with replacing(path) as partial:
            picture(name).save(partial, format='PNG', optimize=True)
        print(f'{path.relative_to(pages.ROOT)}: {path.stat().st_size / 1024:.0f} KB')


if __name__ == '__main__':
    main()
