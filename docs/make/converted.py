#!/usr/bin/env python3
"""When a converted ViT pays, and how near it is to its parent: python docs/make/converted.py

Draws docs/images/converted.svg from results/convert_h200.csv, which `benchmark.py --bench convert` wrote. `tables.py`
writes the tables, those of accuracies and of features from results/tiny_imagenet_h200.csv, tiny_imagenet_sizes_h200.csv
and vit_small_14_h200.csv (experiments/). Needs matplotlib.
"""

import argparse
from statistics import mean

import elpv
import pages
import performance

SPEED, GRAPHS, ALONE = 'convert_h200.csv', 'convert_graphs_h200.csv', 'op_cells_h200.csv'
ACCURACY, PARENTS = 'tiny_imagenet_h200.csv', 'tiny_imagenet_parents_h200.csv'  # of the second the parents alone
OTHER_SIZES = 'tiny_imagenet_sizes_h200.csv'  # of a parent of its own
FOREIGN = 'vit_small_14_h200.csv'
PICTURE = pages.ROOT / 'docs' / 'images' / 'converted.svg'
COLOURS = {192: '#edae49', 384: '#00798c', 768: '#d1495b', 1024: '#30638e'}
CELLS = {'49 cells': 'o', 'cells of 3': 's'}
LINES = {'o': '-', 's': '--'}
LEGEND = {'49 cells': '49 summaries an image', 'cells of 3': 'a summary for each 3 × 3 patches,\nat most 256'}
DEFAULT = 'cells of 3'  # what convert_vit makes unless it is told otherwise
OWN, OWN_SIDES = 'eva_deit_tiny_784', (224, 448, 896)  # of our own models in README.md
COLUMNS = {'forward_ms': 'inference', 'ms': 'training'}
WHOLE = '16, 0'  # window and cells a side of what sees all tokens
SIZES = {
    WHOLE: 'all 256 tokens: the parent, trained on alike',
    '4, 4': '16 tokens, 16 cells: an eighth of 256',
    '4, 8': '16 tokens, 64 cells: a third',
    '8, 8': '64 tokens, 64 cells: a half',
}


def ratios(rows: list, width: int, cells: str, column: str) -> list:
    """(side, softmax's time over the converted model's) of a width."""
    found = []
    for row in pages.pick(rows, width=width, model=cells):
        softmax = pages.pick(rows, width=width, model='softmax', img_size=row['img_size'])
        found += [(int(row['img_size']), float(softmax[0][column]) / float(row[column]))]
    return sorted(found)


def measured(file: str = SPEED) -> list:
    return pages.pick(pages.read_results(file), status='ok')


def speed() -> str:
    """Speed over softmax, eager: a row for each width and side."""
    return _speed(measured())


def compiled() -> str:
    """The same in CUDA graphs, as torch.compile makes them. What they allocate they keep: no memory."""
    return _speed(measured(GRAPHS), memory=False)


def _speed(rows: list, memory: bool = True) -> str:
    lines = []
    names = ('softmax', *CELLS)
    for width in sorted({int(row['width']) for row in rows}):
        found = {(cells, column): dict(ratios(rows, width, cells, column)) for cells in CELLS for column in COLUMNS}
        for side in sorted({side for of in found.values() for side in of}):
            peaks = [pages.pick(rows, width=width, img_size=side, model=name)[0]['peak_memory_mib'] for name in names]
            times = [f'{of[side]:.2f}×' if side in of else '–' for of in found.values()]
            peaks = ' / '.join(f'{float(peak) / 1024:.1f}' for peak in peaks)
            lines.append([str(width), str(side), *times, *[peaks] * memory])
    columns = ['width', 'side, px', *(f'{cells}, {kind}' for cells in CELLS for kind in COLUMNS.values())]
    columns += [f'training, GiB: {" / ".join(names)}'] * memory
    return pages.table(columns, lines) + f'\n\n{pages.origins(rows)}'


def alone() -> str:
    """Attention alone over the best backend of softmax: a row for each size."""
    rows = pages.pick(pages.read_results(ALONE), status='ok')
    sizes = {(row['tokens'], row['partition_grid'], row['num_prefix_tokens']): row for row in rows}
    lines = []
    for (tokens, cells, prefix), row in sorted(sizes.items(), key=lambda size: (int(size[0][0]), int(size[0][2]))):
        of_size = pages.pick(rows, tokens=tokens, partition_grid=cells, num_prefix_tokens=prefix)
        best = {
            (name, column): min(float(row[column]) for row in of_size if row['attention'] == name)
            for name in ('eva', 'softmax')
            for column in ('forward_ms', 'ms')
        }
        times = [f'{best["softmax", column] / best["eva", column]:.2f}×' for column in ('forward_ms', 'ms')]
        lines.append([tokens, f'{cells} × {cells}', prefix, row['batch_size'], *times])
    columns = ['tokens', 'cells', 'prefix tokens', 'batch', 'forward', 'forward + backward']
    return pages.table(columns, lines) + f'\n\n{pages.origins(rows)}'


def _parent(rows: list) -> dict:
    return pages.pick(rows, run='parent-s0')[0]


def _with_parent(rows: list) -> list:
    """All rows but that of EVA from scratch, which is of another run of the experiment."""
    return [row for row in rows if row['run'] != 'scratch-s0']


def accuracy() -> str:
    """Top-1 before any training: a row for each size of windows and cells."""
    rows, lines = pages.read_results(ACCURACY), []
    parent, of_run = _parent(rows), _with_parent(rows)
    for sizes, text in SIZES.items():
        window_size, partition_grid = sizes.split(', ')
        of_size = pages.pick(rows, window_size=window_size, partition_grid=partition_grid, epochs='0')
        if of_size:
            top1 = {row['count_cells']: row['top1'] for row in of_size}
            lines.append([text, *(f'{top1[count]} %' for count in ('outside', 'all', 'one'))])
    columns = ['a query attends to', "`count_cells='outside'`", "`'all'`", "`'one'`"]
    scratch = pages.pick(rows, run='scratch-s0')[0]
    return (
        f'The parent has {parent["top1"]} %.\n\n{pages.table(columns, lines)}\n\n{pages.origins(of_run)} One run of '
        f'the parent: {parent["epochs"]} epochs, {float(parent["train_seconds"]) / 60:.0f} minutes. EVA trained from '
        f'scratch as long, with windows of 4 × 4 and 4 × 4 cells, but without a class token, has {scratch["top1"]} % '
        f'(commit {scratch["commit"]}).'
    )


KINDS = {'ce': 'the labels alone', 'logit': "labels and the parent's logits", 'both': 'labels, logits and tokens'}


def trained() -> str:
    """Top-1 after training on: a row for each size and kind, a column for each number of epochs."""
    rows, lines = pages.read_results(ACCURACY), []
    parent, start = _parent(rows), pages.pick(rows, epochs='0', count_cells='outside')
    epochs, several = sorted({int(row['epochs']) for row in rows if row['kind']}), set()
    for first in start:
        keys = {key: first[key] for key in ('window_size', 'partition_grid')}
        for kind, text in KINDS.items():
            runs = {count: pages.pick(rows, kind=kind, epochs=str(count), **keys) for count in epochs}
            if any(runs.values()):
                several |= {len(of) for of in runs.values()} - {0, 1}
                after = [f'{elpv.spread(tops(of), 2)} %' if of else '–' for of in runs.values()]
                lines.append([SIZES[', '.join(keys.values())], text, f'{first["top1"]} %', *after])
    after = [f'{count} epoch{"s" * (count > 1)}' for count in epochs]
    columns = ['a query attends to', 'compared with', 'before training', *after]
    seeds = ''.join(
        f'; a figure with ± is the mean of {count} seeds, then their standard deviation' for count in sorted(several)
    )
    return (
        f'The parent has {parent["top1"]} %.\n\n{pages.table(columns, lines)}\n\n'
        f'{pages.origins(_with_parent(rows))} One seed{seeds}.'
    )


def sizes() -> str:
    """Top-1 of each size, and of the parent itself, trained on with the parent's logits: a row a size."""
    rows, lines = pages.read_results(OTHER_SIZES), []
    parent = _parent(rows)
    before = {_size(row): row for row in pages.pick(rows, epochs='0')} | {WHOLE: parent}  # it is not judged again
    trained = {_size(row): row for row in rows if row['kind'] == 'logit'}
    for size in (size for size in SIZES if size in trained):
        row, others = trained[size], (parent, trained[WHOLE])
        gained = [f'{float(row["top1"]) - float(other["top1"]):+.2f}' if other is not row else '–' for other in others]
        lines.append([SIZES[size], f'{before[size]["top1"]} %', f'{row["top1"]} %', *gained])
    epochs = trained[WHOLE]['epochs']
    columns = [
        'a query attends to',
        'before training',
        f'{epochs} epochs',
        'less the parent',
        'less the parent, trained on',
    ]
    return f'The parent has {parent["top1"]} %.\n\n{pages.table(columns, lines)}\n\n{pages.origins(rows)} One seed.'


def _size(row: dict) -> str:
    return f'{row["window_size"]}, {row["partition_grid"]}'


def tops(rows: list) -> list:
    return [float(row['top1']) for row in rows]


def longest() -> list:
    """The runs with the fewest tokens and cells that were trained on for longest, a seed each."""
    return [
        row
        for row in pages.read_results(ACCURACY)
        if row['window_size'] == '4' == row['partition_grid'] and row['epochs'] == '20'
    ]


def foreign() -> str:
    """Cosines of a converted ViT-S/14's features with the original's: a row for each side and cells."""
    rows, lines = pages.read_results(FOREIGN), []
    for first in pages.pick(rows, updates='0'):
        keys = {key: first[key] for key in ('img_size', 'partition_grid')}
        then = [row for row in pages.pick(rows, **keys) if row['updates'] != '0']
        cosines = [[f'{float(row[key]):.3f}' for key in ('patch_cosine', 'class_cosine')] for row in [first, *then[:1]]]
        cells = f'{first["partition_grid"]} × {first["partition_grid"]}'
        after = ' / '.join(cosines[1]) if then else 'not measured'
        lines.append([first['img_size'], first['tokens'], cells, ' / '.join(cosines[0]), after])
    lines.sort(key=lambda line: (int(line[0]), line[2]))
    columns = ['side, px', 'tokens', 'cells', 'before training: patches / class token', 'after 2,000 updates']
    return pages.table(columns, lines) + f'\n\n{pages.origins(rows)}'


def evidence() -> str:
    """The README's figures: speed of a wide network and of one of our own, accuracy after conversion."""
    width, side, rows = 768, 1022, measured()
    forward, training = (dict(ratios(rows, width, DEFAULT, column))[side] for column in COLUMNS)
    rows, runs = pages.read_results(ACCURACY), longest()
    parent = _parent(rows)['top1']
    half = pages.pick(rows, window_size=8, partition_grid=8, epochs='0', count_cells='outside')[0]['top1']
    where, made = 'docs/convert.md', performance.whole_models()
    own = [performance.ratio(*performance.models(made, 'train', OWN, side)) for side in OWN_SIDES]
    times, sides = ', '.join(f'{value:.2f}' for value in own), ', '.join(map(str, OWN_SIDES))
    return (
        f'* **Speed**: at {side:,} × {side:,} pixels a converted ViT of width {width} answers {forward:.2f} times as '
        f'fast as with softmax, and\n  trains {training:.2f} times as fast ([convert]({where}#when-it-pays)). `{OWN}` '
        f"trains {times} times\n  as fast as timm's softmax model at {sides} pixels "
        f'([performance](docs/performance.md)).\n'
        f'* **Accuracy**: a DeiT-Tiny with {parent} % top-1 on Tiny-ImageNet has {half} % right after its conversion, '
        f'untrained.\n  Each patch then looks at 64 patches and 64 summaries, not at all 256 patches. With 16 patches '
        f'and 16 summaries\n  it has {mean(tops(runs)):.1f} % after {runs[0]["epochs"]} epochs of distillation '
        f'({len(runs)} seeds; [convert]({where}#how-near-it-is)).'
    )


def draw() -> None:
    plt = pages.pyplot('converted')
    rows = measured()
    widths = sorted({int(row['width']) for row in rows})
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    for axes, (column, kind) in zip(panels, COLUMNS.items(), strict=True):
        for width in widths:
            for cells, marker in CELLS.items():
                points = ratios(rows, width, cells, column)
                axes.plot(*zip(*points, strict=True), color=COLOURS[width], marker=marker, linestyle=LINES[marker])
        axes.axhline(1, color='#9aa5b1', linewidth=1)
        axes.set_xscale('log', base=2)
        axes.set_yscale('log', base=2)
        axes.set_xticks([224, 518, 1022, 2044], ['224', '518', '1,022', '2,044'])
        axes.set_yticks([0.5, 1, 2, 4], ['0.5×', '1×', '2×', '4×'])
        axes.minorticks_off()
        axes.set_xlabel('side of the image, px (patches of 14)')
        axes.set_title(kind, fontsize=10)
        axes.spines[['top', 'right']].set_visible(False)
    panels[0].set_ylabel('speed over softmax')
    handles = [plt.Line2D([], [], color=COLOURS[width], label=f'width {width}') for width in widths]
    handles += [
        plt.Line2D([], [], color='#52606d', marker=marker, linestyle=LINES[marker], label=LEGEND[cells])
        for cells, marker in CELLS.items()
    ]
    panels[1].legend(handles=handles, frameon=False, fontsize=7.5, labelspacing=0.25, loc='upper left')
    figure.tight_layout()
    pages.save_plot(figure, PICTURE)


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    draw()
    print(speed())
    print(accuracy())


if __name__ == '__main__':
    main()
