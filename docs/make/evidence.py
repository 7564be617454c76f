#!/usr/bin/env python3
"""What docs/evidence.md says of EVA among the eleven attentions, from results/: python docs/make/evidence.py

Draws docs/images/evidence.svg, which carries a digest of its data. `tables.py` writes the tables, and draws the plot
where it is stale. Needs matplotlib.
"""

import argparse
import math
from statistics import mean
from typing import Dict, List, NamedTuple

import approximation
import attentions
import converted
import counts
import elpv
import pages
import performance
import transfer
import zoo
from pages import Row

from evavit.layers import ATTENTIONS

SCRATCH = 'attentions_h200.csv'  # the other files are those of the programs beside this one
FASHION = 'fashion_mnist_validation_h100.csv'
WEIGHTS = 'softmax_to_eva.csv'
PLOT = pages.ROOT / 'docs' / 'images' / 'evidence.svg'
TOKENS = 784  # of the paper's Table 2, at which errors are quoted
PAPER = {name: float(row[2]) for name, row in zoo.PAPER['deit_tiny_784'].items()}
COLOURS, OTHER = {'eva': '#d1495b', 'softmax': '#30638e'}, '#7f8c99'


class Experiment(NamedTuple):
    """Runs that answer a question. `factor` is the time of one over that of 30 epochs at 256 tokens: 2 for half of the
    epochs at four times the tokens, 0.5 for half of the pictures. `time` is what is known where that is no measure."""

    question: str
    command: str
    files: tuple = ()
    group: str = ''
    runs: int = 0
    factor: float = 0
    time: str = ''


ATTENTIONS_PY = 'experiments/tiny_imagenet/attentions.py'
TRANSFER_PY = 'experiments/transfer/run.py'
EXPERIMENTS = (
    Experiment('Which of the eleven learns best?', f'{ATTENTIONS_PY} --only table2', (SCRATCH,), 'table2', 25, 1),
    Experiment('And at 1,024 tokens?', f'{ATTENTIONS_PY} --only long-', (SCRATCH,), 'long', 8, 2),
    Experiment('Which windows and cells?', f'{ATTENTIONS_PY} --only cells', (SCRATCH,), 'cells', 15, 0.5),
    Experiment("The paper's ablations", f'{ATTENTIONS_PY} --only table8', (SCRATCH,), 'table8', 12, 0.5),
    Experiment(
        'More seeds and sizes of converted networks',
        'experiments/tiny_imagenet/run.py',
        (converted.ACCURACY,),
        runs=44,
        factor=0.6,  # of those to come 14 have 20 epochs, the others 5 or 1
    ),
    Experiment(
        'How near is each to a trained softmax?',
        'experiments/tiny_imagenet/approximation.py',
        (approximation.FILE,),
        runs=53,
        time='minutes, nothing is trained; it needs the weights of `table2-softmax-s0`, a run of the first row',
    ),
    Experiment(
        'Long Range Arena, Image and Pathfinder',
        'experiments/lra/run.py',
        ('lra_h200.csv',),
        runs=36,
        time='not measured; 6 to 12 h if 10,000 to 20,000 pictures a second are reached',
    ),
    Experiment(
        'Causal EVA on the bytes of CIFAR-10',
        'experiments/causal_cifar/run.py',
        ('causal_cifar_h200.csv',),
        runs=6,
        time='1 h a run, which is its budget',
    ),
    Experiment(
        'Weights of our own to transfer from',
        f'{TRANSFER_PY} --only pretrain',
        (transfer.FILE,),
        'pretrain',
        3,
        100 / 30,
    ),
    Experiment(
        'Transfer from weights of our own',
        f'{TRANSFER_PY} --only finetune linear knn',
        (transfer.FILE,),
        'transfer',
        100,
        0.3,  # a minute of training, and as much for compiling, reading and judging; neighbours are quicker
    ),
)


def one(name: str, **wanted) -> Row:
    """The first row of a results file with these values."""
    return pages.pick(pages.read_results(name), **wanted)[0]


def from_scratch() -> Dict[str, List[Row]]:
    """Each attention that was trained from scratch on Tiny-ImageNet to its rows, a seed each. EVA's first is that of
    experiments/tiny_imagenet/run.py, whose settings are the same, until attentions.py has made its own."""
    rows = {'table2-eva-s0': dict(one(converted.ACCURACY, run='scratch-s0'), attention='eva')}
    rows |= {row['run']: row for row in pages.pick(pages.read_results(SCRATCH), group='table2')}
    found = {name: [row for row in rows.values() if row['attention'] == name] for name in ATTENTIONS}
    return {name: of_name for name, of_name in found.items() if of_name}


def parents() -> List[Row]:
    """The runs of the softmax network with a class token, same seed."""
    return [one(converted.ACCURACY, run='parent-s0'), *pages.read_results(converted.PARENTS)]


def rate(row: Row) -> float:
    return float(row['train_images_per_second'])


def standard_error(row: Row) -> float:
    """Of top-1 in percent, from the number of pictures alone: another run would add its own."""
    share = float(row['top1']) / 100
    return 100 * math.sqrt(share * (1 - share) / int(row['images']))


def nearness() -> Dict[str, float]:
    """Each attention's relative error against softmax, untrained, at TOKENS."""
    rows = attentions.errors()
    return {name: float(rows[name, TOKENS]['error']) for name in ATTENTIONS}


def eleven() -> str:
    """Every attention, in the order of the paper's accuracies: accuracies, nearness, and what it can be used for."""
    found, errors, lines = from_scratch(), nearness(), []
    for name in sorted(ATTENTIONS, key=lambda name: -PAPER.get(name, 0)):
        here = f'{elpv.spread(converted.tops(found[name]), 2)} %, seeds: {len(found[name])}' if name in found else '–'
        paper = f'{PAPER[name]:.2f} %' if name in PAPER else '–'
        prefix = 'yes' if ATTENTIONS[name].takes_prefix_tokens else 'no'
        lines.append([f'`{name}`', paper, here, f'{errors[name]:.2f}', prefix, attentions.facts(name)[2]])
    columns = [
        'attention',
        'top-1 in the paper, ImageNet',
        'top-1 here, Tiny-ImageNet',
        f'error against softmax, {TOKENS} tokens, untrained',
        'class and register tokens',
        'fused',
    ]
    good = [name for name in sorted(PAPER, key=lambda name: -PAPER[name]) if name != 'softmax']
    near = sorted(good, key=errors.__getitem__)
    return (
        f'{pages.table(columns, lines)}\n\n'
        f'{len(ATTENTIONS) - len(found)} of the {len(ATTENTIONS)} have no figure here. Nearness is not accuracy: of '
        f'the {len(good)} of linear time in the paper, `{near[0]}` comes nearest to softmax and is number '
        f'{good.index(near[0]) + 1} by accuracy; `{good[1]}`, number 2 by accuracy, is number '
        f'{near.index(good[1]) + 1} by nearness.\n\n'
        f'From scratch: {pages.origins([row for rows in found.values() for row in rows])}'
    )


def verdict() -> str:
    """How far apart softmax and EVA from scratch are, and how far apart chance brings two networks."""
    found, same = from_scratch(), parents()
    softmax, eva = (found[name][0] for name in ('softmax', 'eva'))
    apart = mean(converted.tops(found['softmax'])) - mean(converted.tops(found['eva']))
    error = math.hypot(standard_error(softmax), standard_error(eva))
    reading = mean(converted.tops(found['softmax'])) - mean(converted.tops(same))
    return (
        f'* The difference is {apart:.1f} points. Seeds: {len(found["softmax"])} and {len(found["eva"])}.\n'
        f'* {int(eva["images"]):,} pictures decide. They alone give a figure a standard error of '
        f'{standard_error(eva):.1f} points, and the difference\n  of two networks one of up to {error:.1f}: it is '
        f'{apart / error:.1f} of those.\n'
        f'* The softmax network with a class token came to {", ".join(row["top1"] for row in same)} % in '
        f'{len(same)} runs with the same seed and settings; another,\n  of which no row was kept, to 40.45 %.\n'
        f'* Those are {reading:.1f} points less than softmax without a class token. How the tokens are read weighs '
        f'more here than\n  which of the two attentions mixes them.\n'
        f'* EVA was not faster: {rate(eva):,.0f} images a second in training (commit {eva["commit"]}), softmax '
        f'{rate(softmax):,.0f} (commit\n  {softmax["commit"]}), both in CUDA graphs. At 256 tokens it has nothing to '
        f'gain.'
    )


def claims() -> str:
    """What a reader may want to hear of EVA, what was found, and whether it holds."""
    found, errors, parent = from_scratch(), nearness(), converted.tops(parents())[0]
    good = sorted(PAPER, key=lambda name: -PAPER[name])
    nearest = min((name for name in ATTENTIONS if name != 'softmax'), key=errors.__getitem__)
    of_trained = approximation.errors(16)
    untrained = dict(epochs=0, count_cells='outside')
    eighth, half = (
        parent - float(one(converted.ACCURACY, window_size=side, partition_grid=side, **untrained)['top1'])
        for side in (4, 8)
    )
    trained = converted.longest()
    wide, narrow = (
        [dict(converted.ratios(converted.measured(), width, '49 cells', column))[side] for column in converted.COLUMNS]
        for width, side in ((768, 1022), (192, 224))
    )
    own = performance.ratio(*performance.models(performance.gpu_rows(), 'train', 'eva_deit_tiny', 224))
    cosines = [float(row['patch_cosine']) for row in pages.pick(pages.read_results(converted.FOREIGN), updates=0)]
    weights = one(WEIGHTS, weights='ViT-S/14, 196 tokens', start='**linear summary, as converted**')
    none, window, outside = (
        float(one(counts.RESULTS, count_cells=count, tokens_in_E=size)['error'])
        for count, size in (('one', 0), ('one', 49), ('outside', 49))
    )
    grades = [
        elpv.spread(
            converted.tops(pages.pick(pages.read_results(elpv.FILE), task='defect', start='scratch', model=model))
        )
        for model in ('eva_deit_tiny', 'deit_tiny_patch16_224', 'resnet18')
    ]
    convert = '[convert](convert.md#how-near-it-is)'
    lines = [
        (
            'It is the best of the ten that are not softmax',
            f'first of {len(good) - 1} in the paper, {PAPER["eva"]:.2f} %, before `{good[2]}`, {PAPER[good[2]]:.2f} %; '
            f'here {len(ATTENTIONS) - len(found)} of {len(ATTENTIONS)} attentions have no figure',
            '**not tested**',
            '[below](#the-eleven-beside-each-other)',
        ),
        (
            'From scratch it learns as well as softmax',
            f'Tiny-ImageNet: {elpv.spread(converted.tops(found["eva"]), 2)} % against '
            f'{elpv.spread(converted.tops(found["softmax"]), 2)} %; '
            f'seeds: {len(found["eva"])} and {len(found["softmax"])}',
            '**open**',
            '[below](#one-seed-is-no-verdict)',
        ),
        (
            'A converted ViT keeps its accuracy, untrained',
            f'Tiny-ImageNet: {half:.2f} points lost where a query sees half of the tokens, {eighth:.2f} where it sees '
            f'an eighth',
            'nearly, one network',
            convert,
        ),
        (
            'Training gives back what a conversion loses',
            f'{elpv.spread(converted.tops(trained), 2)} % after {trained[0]["epochs"]} epochs, with an eighth of the '
            f'tokens, seeds: {len(trained)}; its parent, without these epochs, has {parent:.2f} %',
            'holds, one network',
            convert,
        ),
        (
            'The features of a foreign ViT survive, untrained',
            f'ViT-S/14: cosine of patches {min(cosines):.2f} to {max(cosines):.2f}; on crops of two photographs the '
            f'features are {100 * float(weights["output"]):.0f} % off',
            'in part',
            f'{convert}, [transfer](transfer.md#how-eva-starts-from-softmax)',
        ),
        (
            'It is faster on large images, in wide networks',
            f'width 768, 1,022 px: {wide[0]:.2f}× in inference, {wide[1]:.2f}× in training, eager',
            'holds',
            '[convert](convert.md#when-it-pays)',
        ),
        (
            'It is faster on small images, in narrow networks',
            f'width 192, 224 px: converted {narrow[0]:.2f}× and {narrow[1]:.2f}×, eager; `eva_deit_tiny` {own:.2f}× in '
            f'training, in CUDA graphs',
            '**only in CUDA graphs**',
            '[convert](convert.md#when-it-pays), [performance](performance.md)',
        ),
        (
            'It comes nearest to softmax, untrained',
            f'error {errors["eva"]:.2f} at {TOKENS} tokens, `{nearest}` {errors[nearest]:.2f}',
            '**does not hold**',
            '[attentions](attentions.md#how-near-they-come-to-softmax-attention)',
        ),
        (
            'It comes nearest to a trained softmax',
            f'256 tokens, 16 of them and 16 cells: error {of_trained["eva"]:.2f}, as `convert_vit` starts '
            f'{of_trained["eva_converted"]:.2f}, `{nearest}` {of_trained[nearest]:.2f}',
            '**does not hold**',
            '[below](#against-a-trained-softmax)',
        ),
        (
            'A larger window brings it nearer, untrained',
            f'as published from {none:.3f} without a window to {window:.3f} with 49 of 196 tokens; with '
            f"`count_cells='outside'` to {outside:.3f}",
            '**not as published**',
            '[attentions](attentions.md#a-larger-window-is-not-always-nearer)',
        ),
        (
            'It learns small tasks as well as others do',
            f'four grades of solar cells, five seeds: EVA {grades[0]} %, DeiT {grades[1]} %, ResNet-18 {grades[2]} %; '
            f'none learns the rare grades',
            'no difference seen',
            '[transfer](transfer.md#shown-on-solar-cells)',
        ),
        (
            'It learns Fashion-MNIST',
            f'{one(FASHION)["top1"]} %, one run, no other attention beside it',
            'compares nothing',
            '`results/README.md`',
        ),
    ]
    return pages.table(['claim', 'what was found', 'verdict', 'more'], lines)


def missing() -> str:
    """The runs that would answer what is open: how many there are figures of, and what the others take."""
    stored = [*parents(), *(row for rows in from_scratch().values() for row in rows)]
    minutes = [float(row['seconds']) / 60 for row in stored if row['epochs'] == '30']
    lines, known = [], 0.0
    for experiment in EXPERIMENTS:
        rows = [row for name in experiment.files for row in pages.read_results(name)]
        done = len({row['run'] for row in rows if row.get('group', '').startswith(experiment.group)})
        cost = (experiment.runs - done) * experiment.factor
        known += cost
        time = '–' if done == experiment.runs else experiment.time or hours(cost, minutes)
        lines.append([experiment.question, f'`python {experiment.command}`', f'{done} of {experiment.runs}', time])
    columns = ['question', 'command', 'runs with figures', 'time of the others, one H200']
    return (
        f'{pages.table(columns, lines)}\n\n'
        f'Times are estimates. The {len(minutes)} stored runs of 30 epochs at 256 tokens took {min(minutes):.1f} to '
        f'{max(minutes):.1f} minutes each, with compiling and judging. The experiments that '
        f'are measured by them are {hours(known, minutes)} together, and longer where an attention without kernels is '
        f'slower.'
    )


def hours(runs: float, minutes: List[float]) -> str:
    return f'{runs * min(minutes) / 60:.1f} to {runs * max(minutes) / 60:.1f} h'


def plotted() -> dict:
    """The data of the three panels."""
    trained = {**from_scratch(), 'softmax, class token': parents()}
    rows = pages.read_results(converted.ACCURACY)
    untrained = pages.pick(rows, epochs=0)
    tuned = [row for row in rows if row['kind'] == 'logit' and row['seed'] == '0']
    errors = nearness()
    return dict(
        speed={
            # Some runs shared their GPU: the quickest shows the speed.
            name: [(max(map(rate, rows)), float(row['top1']), 1.96 * standard_error(row)) for row in rows]
            for name, rows in trained.items()
        },
        seen={
            count: sorted((tokens_seen(row), float(row['top1'])) for row in pages.pick(untrained, count_cells=count))
            for count in counts.COUNTS
        },
        tuned=[
            (tokens_seen(row), float(row['top1']), f'{row["epochs"]} epoch{"s" * (row["epochs"] != "1")}')
            for row in tuned
        ],
        parent=converted.tops(parents())[0],
        near=[(name, errors[name], top1) for name, top1 in PAPER.items()],
    )


def tokens_seen(row: Row) -> int:
    """Tokens of the window and cells that a query sees."""
    return int(row['window_size']) ** 2 + int(row['partition_grid']) ** 2


def plot_is_fresh() -> bool:
    return pages.plot_is_fresh(PLOT, plotted())


def draw() -> None:
    """Accuracy over speed, over the tokens that a converted network sees, and the paper's over nearness."""
    import matplotlib

    matplotlib.use('Agg')
    matplotlib.rcParams['svg.hashsalt'] = 'evidence'  # the same file from the same numbers
    import matplotlib.pyplot as plt

    data = plotted()
    figure, (speed, seen, near) = plt.subplots(1, 3, figsize=(11.5, 3.6))

    def label(axes, text, x, y, shift=(6, -3)):
        axes.annotate(text, (x, y), xytext=shift, textcoords='offset points', fontsize=8)

    for name, points in data['speed'].items():
        x, y, bars = zip(*points, strict=True)
        speed.errorbar(x, y, yerr=bars, fmt='o', capsize=3, color=COLOURS.get(name, OTHER))
        label(speed, name, x[0], y[0], (6, 4))
    speed.margins(x=0.4)
    speed.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4))
    speed.xaxis.set_major_formatter('{x:,.0f}')
    speed.set_title('from scratch, Tiny-ImageNet', fontsize=10)
    speed.set_xlabel('images a second in training')
    speed.set_ylabel('top-1, %')
    for count, colour in counts.COUNTS.items():
        seen.plot(*zip(*data['seen'][count], strict=True), marker='o', color=colour, label=f"count_cells='{count}'")
    for x, y, text in data['tuned']:
        seen.plot(x, y, marker='*', markersize=9, color=counts.COUNTS['outside'])
        label(seen, text, x, y, (7, -10))
    seen.axhline(data['parent'], color=OTHER, linewidth=1)
    label(seen, 'its parent, softmax', 130, data['parent'], (0, 4))
    seen.set_xlim(20, 200)
    seen.set_title('converted: untrained (lines), trained (stars)', fontsize=10)
    seen.set_xlabel('tokens and cells that a query sees, of 256')
    seen.legend(frameon=False, fontsize=8, loc='lower right')
    for name, x, y in data['near']:
        near.plot(x, y, marker='o', color=COLOURS.get(name, OTHER))
        label(near, name, x, y)
    near.set_xlim(-0.02, 0.55)
    near.set_title("the paper's, ImageNet", fontsize=10)
    near.set_xlabel(f'error against softmax, {TOKENS} tokens, untrained')
    for axes in (speed, seen, near):
        axes.spines[['top', 'right']].set_visible(False)
    figure.tight_layout()
    pages.save_plot(figure, PLOT, data)
    plt.close(figure)


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    draw()
    for table in (claims, eleven, verdict, missing):
        print(table(), end='\n\n')


if __name__ == '__main__':
    main()
