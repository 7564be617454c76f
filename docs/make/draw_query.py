#!/usr/bin/env python3
"""Draw what one query attends to: python docs/make/draw_query.py [docs/images/query.png]

Left, the sets: the tokens of the query's window and the cells of the grid, taken from `evavit.ops.grid`. Right, the
weights: how much each token's value counts in the query's output, by a random `EvaAttention` (queries and keys through
the same projection) on a smooth random input. Needs matplotlib, which `pip install '.[docs]'` brings.
"""

import argparse
from pathlib import Path

import pages
import torch
import torch.nn.functional as F

from evavit.layers import EvaAttention
from evavit.ops.grid import block_counts, cell_shape, to_blocks, window_shape

SIDE = 28
QUERY = (16, 11)  # row, column
WINDOW_SIZE = PARTITION_GRID = 7
ORANGE, BLUE, GREY, INK = '#e8743b', '#2f6db3', '#eef0f2', '#222222'


def block_of_tokens(feat_size, block):
    """Number of the block that each token lies in, `(H, W)`, blocks in raster order."""
    tokens = torch.arange(feat_size[0] * feat_size[1])
    blocks = to_blocks(tokens.view(1, 1, -1, 1), feat_size, block).transpose(3, 4).flatten(4).flatten(2, 3)[0, 0]
    numbers = torch.empty_like(tokens)
    numbers[blocks.flatten()] = torch.arange(len(blocks)).repeat_interleave(blocks.shape[1])
    return numbers.view(feat_size[0], feat_size[1])


def token_weights(feat_size, query):
    """Weight of every token's value in the query's output, `(H, W)`; they add up to 1.

    The output is linear in the values once queries and keys are given, so its derivative by them is the weight.
    """
    torch.manual_seed(3)
    dim = 64
    attention = EvaAttention(dim, 1, window_size=WINDOW_SIZE, partition_grid=PARTITION_GRID).double().eval()
    # Smooth, so that neighbours look alike, as in a picture.
    picture = F.interpolate(torch.randn(1, dim, 9, 9, dtype=torch.double), size=feat_size, mode='bicubic')
    x = F.layer_norm(picture.flatten(2).transpose(1, 2), [dim])
    torch.nn.init.orthogonal_(attention.qkv.weight[:dim].detach(), gain=0.75)
    attention.qkv.weight.data[dim : 2 * dim] = attention.qkv.weight.data[:dim]  # like attends to like
    kept = {}
    attend = attention.attend

    def attend_to(q, k, v, feat_size):
        kept['v'] = v.detach().requires_grad_()
        kept['y'] = attend(q.detach(), k.detach(), kept['v'], feat_size)
        return kept['y']

    attention.attend = attend_to
    attention(x, feat_size)
    n = query[0] * feat_size[1] + query[1]
    (weights,) = torch.autograd.grad(kept['y'][0, 0, n, 0], kept['v'])
    return weights[0, 0, :, 0].view(feat_size[0], feat_size[1])


def draw(path):
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    from matplotlib.colors import LogNorm
    from matplotlib.lines import Line2D
    from matplotlib.patches import Rectangle

    feat_size = [SIDE, SIDE]
    windows = block_of_tokens(feat_size, window_shape(feat_size, WINDOW_SIZE))
    cell = cell_shape(feat_size, PARTITION_GRID)
    rows, cols = block_counts(feat_size, cell)
    cells = block_of_tokens(feat_size, cell)
    local = windows == windows[QUERY]
    weights = token_weights(feat_size, QUERY)

    plt.rcParams.update({'font.family': 'DejaVu Sans', 'font.size': 9})
    figure, (sets, heat) = plt.subplots(1, 2, figsize=(9.2, 4.9), dpi=140, gridspec_kw=dict(wspace=0.06))
    for axes in (sets, heat):
        axes.set(xlim=(-0.15, SIDE + 0.15), ylim=(SIDE + 0.15, -0.15), aspect='equal', xticks=[], yticks=[])
        axes.set_frame_on(False)

    for y in range(SIDE):
        for x in range(SIDE):
            sets.add_patch(
                Rectangle((x + 0.09, y + 0.09), 0.82, 0.82, linewidth=0, facecolor=ORANGE if local[y, x] else GREY)
            )
    for number in range(rows * cols):
        y, x = (cells == number).nonzero().double().mean(0).add(0.5).tolist()
        sets.plot(x, y, 'o', color=BLUE, markersize=6.5, markeredgecolor='white', markeredgewidth=0.8, zorder=4)
    heat.pcolormesh(weights.numpy(), norm=LogNorm(weights.min().item(), weights.max().item()), cmap='magma')

    top, left = local.nonzero().min(0).values.tolist()
    bottom, right = (local.nonzero().max(0).values + 1).tolist()
    for axes, line in ((sets, BLUE), (heat, 'white')):
        for number in range(rows * cols):
            inside = (cells == number).nonzero()
            (y, x), (h, w) = inside.min(0).values.tolist(), (inside.max(0).values - inside.min(0).values + 1).tolist()
            axes.add_patch(
                Rectangle(
                    (x, y),
                    w,
                    h,
                    fill=False,
                    edgecolor=line,
                    linewidth=1.1 if axes is sets else 0.35,
                    alpha=0.85 if axes is sets else 0.6,
                    zorder=2,
                )
            )
        axes.add_patch(
            Rectangle((left, top), right - left, bottom - top, fill=False, linewidth=2, edgecolor=ORANGE, zorder=3)
        )
        axes.plot(
            QUERY[1] + 0.5,
            QUERY[0] + 0.5,
            '*',
            color=INK if axes is sets else 'white',
            markersize=11,
            markeredgecolor='white' if axes is sets else INK,
            markeredgewidth=0.8,
            zorder=5,
        )
    sets.set_title(f'A query attends to {int(local.sum())} tokens and {rows * cols} cells', pad=6)
    heat.set_title(f'The weights of all {SIDE} × {SIDE} tokens, log scale', pad=6)
    sets.legend(
        handles=[
            Line2D([], [], marker='*', color=INK, linestyle='', markersize=10, label='the query'),
            Line2D(
                [],
                [],
                marker='s',
                color=ORANGE,
                linestyle='',
                markersize=8,
                label=f'tokens of its {WINDOW_SIZE} × {WINDOW_SIZE} window, one by one',
            ),
            Line2D(
                [],
                [],
                marker='o',
                color=BLUE,
                linestyle='',
                markersize=6.5,
                label=f'cells of {cell[0]} × {cell[1]} tokens, each as one key and value',
            ),
        ],
        loc='upper left',
        bbox_to_anchor=(-0.02, 0.005),
        frameon=False,
        borderpad=0.2,
        labelspacing=0.35,
    )
    heat.text(
        0,
        SIDE + 0.75,
        'A random layer on a smooth random input. Token by token\n'
        'in the window, through the control variates elsewhere;\n'
        f'from {weights.min():.0e} to {weights.max():.1g}, and all together 1.',
        va='top',
        color=INK,
        linespacing=1.45,
    )
    pages.save_plot(figure, path, bbox_inches='tight', pad_inches=0.08, facecolor='white')
    print(f'{path}: {path.stat().st_size / 1024:.0f} KB')


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(__file__).resolve().parents[1] / 'images' / 'query.png'
    parser.add_argument('path', type=Path, nargs='?', default=default)
    draw(parser.parse_args().path)


if __name__ == '__main__':
    main()
