#!/usr/bin/env python3
"""What docs/evidence.md says of EVA among the eleven attentions, from results/: python docs/make/evidence.py

Draws docs/images/evidence.svg, which carries a digest of its data. `tables.py` writes the tables, and draws the plot
where it is stale. Needs matplotlib.
"""

import argparse
import math
from itertools import combinations
from statistics import mean
from typing import Dict, List, NamedTuple

import ablations
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
LONGER = 'attentions_30_h200.csv'  # softmax with twice the epochs
FASHION = 'fashion_mnist_validation_h100.csv'
WEIGHTS = 'softmax_to_eva.csv'
PLOT = pages.ROOT / 'docs' / 'images' / 'evidence.svg'
TOKENS = 784  # of the paper's Table 2, at which errors are quoted
PAPER = {name: float(row[2]) for name, row in zoo.PAPER['deit_tiny_784'].items()}
COLOURS, OTHER = {'eva': '#d1495b', 'softmax': '#30638e'}, '#7f8c99'
TIMED, AT_ONCE = '5a336f6', 3  # commit of the runs of SCRATCH that estimate times, and how many shared their GPU


class Experiment(NamedTuple):
    """Runs that answer a question. `factor` is the time of one over that of 15 epochs at 256 tokens: 4 for four times
    the tokens, 0.5 for a third of the updates and as much compiling. `time` is what is known where none is measured."""

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
    Experiment('And at 1,024 tokens?', f'{ATTENTIONS_PY} --only long-', (SCRATCH,), 'long', 8, 4),
    Experiment('Which windows and cells?', f'{ATTENTIONS_PY} --only cells', (SCRATCH,), 'cells', 15, 0.5),
    Experiment("The paper's ablations", f'{ATTENTIONS_PY} --only table8', (SCRATCH,), 'table8', 12, 0.5),
    Experiment(
        'More seeds and sizes of converted networks',
        'experiments/tiny_imagenet/run.py',
        (converted.ACCURACY, converted.OTHER_SIZES),
        runs=46,
        factor=0.75,  # of the 25 to come 11 have 20 epochs, the others 5 or 1
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
        100 / 15,
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
    """Each attention that was trained from scratch on Tiny-ImageNet to its rows, a seed each."""
    rows = pages.pick(pages.read_results(SCRATCH), group='table2')
    found = {name: pages.pick(rows, attention=name) for name in ATTENTIONS}
    return {name: of_name for name, of_name in found.items() if of_name}


def longer() -> Dict[str, List[Row]]:
    """The same with 30 epochs. EVA's row is that of experiments/tiny_imagenet/run.py, whose settings are the same."""
    return dict(softmax=pages.read_results(LONGER), eva=[one(converted.ACCURACY, run='scratch-s0')])


def parents() -> List[Row]:
    """The runs of the softmax network with a class token, same seed."""
    first, second = (one(name, run='parent-s0') for name in (converted.ACCURACY, converted.OTHER_SIZES))
    return [first, *pages.read_results(converted.PARENTS), second]


def rate(row: Row) -> float:
    return float(row['train_images_per_second'])


def apart(a: List[Row], b: List[Row]) -> float:
    """How many points the first have more, as means of their seeds."""
    return mean(converted.tops(a)) - mean(converted.tops(b))


def error_apart(a: List[Row], b: List[Row]) -> float:
    """The standard error of `apart`, from the number of pictures alone, as if each had others."""
    return math.hypot(pages.standard_error(a[0]), pages.standard_error(b[0]))


def groups() -> List[List[str]]:
    """The attentions from scratch, best first, parted where the next is 1.96 standard errors behind."""
    found, parted = from_scratch(), []
    for name in sorted(found, key=lambda name: -mean(converted.tops(found[name]))):
        pair = [found[other] for other in (parted[-1][-1] if parted else name, name)]
        if parted and apart(*pair) < 1.96 * error_apart(*pair):
            parted[-1].append(name)
        else:
            parted.append([name])
    return parted


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
        f'top-1 here, Tiny-ImageNet, {found["softmax"][0]["epochs"]} epochs',
        f'error against softmax, {TOKENS} tokens, untrained',
        'class and register tokens',
        'fused',
    ]
    good = [name for name in sorted(PAPER, key=lambda name: -PAPER[name]) if name != 'softmax']
    near = sorted(good, key=errors.__getitem__)
    return (
        f'{pages.table(columns, lines)}\n\n'
        f'{order()}\n'
        f'* Nearness is not accuracy. Of the {len(good)} of linear time in the paper, `{near[0]}` comes nearest to '
        f'softmax and is number\n  {good.index(near[0]) + 1} by accuracy; `{good[1]}`, number 2 by accuracy, is number '
        f'{near.index(good[1]) + 1} by nearness.\n\n'
        f'From scratch: {pages.origins([row for rows in found.values() for row in rows])}'
    )


def order() -> str:
    """What the order of the attentions from scratch says, and whether it is the paper's."""
    found, parted, lines = from_scratch(), groups(), []
    for group in parted:
        tops = [mean(converted.tops(found[name])) for name in group]
        ends = dict.fromkeys(f'{top:.2f}' for top in (tops[-1], tops[0]))
        text = f'{", ".join(f"`{name}`" for name in group)}: {" to ".join(ends)} %'
        if len(group) > 1:
            error = error_apart(found[group[0]], found[group[-1]])
            text += (
                f'. The first and the last are {tops[0] - tops[-1]:.1f} points apart,\n  '
                f'{(tops[0] - tops[-1]) / error:.1f} standard errors of {error:.2f} points'
            )
        lines.append(f'* {text}.')
    pairs = list(combinations([name for name in found if name in PAPER], 2))
    same = [pair for pair in pairs if apart(*(found[name] for name in pair)) * (PAPER[pair[0]] - PAPER[pair[1]]) > 0]
    within = [pair for pair in pairs if pair not in same and any(set(pair) <= set(group) for group in parted)]
    tau, others = (2 * len(same) - len(pairs)) / len(pairs), len(pairs) - len(same)
    lines.append(
        f"* {len(same)} of {len(pairs)} pairs are in the paper's order: Kendall's τ is {tau:.2f}. Of the other "
        f'{others}, {len(within)} are within a line above.'
    )
    return '\n'.join(lines)


def ahead(of: Dict[str, List[Row]]) -> str:
    """Which of softmax and EVA is ahead, and by how much."""
    points = apart(of['eva'], of['softmax'])
    figures = ' and '.join(
        f'{name} {elpv.spread(converted.tops(of[key]), 2)} % (seeds: {len(of[key])})'
        for key, name in (('softmax', 'softmax'), ('eva', 'EVA'))
    )
    who = 'EVA' if points > 0 else 'softmax'
    return f'* With {of["eva"][0]["epochs"]} epochs {figures}: {who} is {abs(points):.1f} points ahead.'


def verdict() -> str:
    """How far apart softmax and EVA from scratch are, and how far apart chance brings two networks."""
    short, long, same = from_scratch(), longer(), parents()
    softmax, eva = (long[name][0] for name in ('softmax', 'eva'))
    errors = [error_apart(of['softmax'], of['eva']) for of in (long, short)]
    times = [abs(apart(of['softmax'], of['eva'])) / error for of, error in zip((long, short), errors, strict=True)]
    reading = apart(long['softmax'], same)
    return (
        f'{ahead(long)}\n{ahead(short)}\n'
        f'* {int(eva["images"]):,} pictures decide. They alone give a figure a standard error of '
        f'{pages.standard_error(eva):.1f} points, and the difference\n  of two networks one of up to '
        f'{max(errors):.1f}: the two differences are {times[0]:.1f} and {times[1]:.1f} of those.\n'
        f'* The softmax network with a class token came to {", ".join(row["top1"] for row in same)} % with '
        f'{same[0]["epochs"]} epochs in {len(same)} runs\n  with the same seed and settings; another, of which no row '
        f'was kept, to 40.45 %.\n'
        f'* Those are {reading:.1f} points less than softmax without a class token. How the tokens are read weighs '
        f'more here than\n  which of the two attentions mixes them.\n'
        f'* EVA was not faster: {rate(eva):,.0f} images a second in training (commit {eva["commit"]}), softmax '
        f'{rate(softmax):,.0f} (commit\n  {softmax["commit"]}), both in CUDA graphs and {eva["epochs"]} epochs. At 256 '
        f'tokens it has nothing to gain.'
    )


def claims() -> str:
    """What a reader may want to hear of EVA, what was found, and whether it holds."""
    found, twice, errors = from_scratch(), longer(), nearness()
    top = {name: elpv.spread(converted.tops(rows), 2) for name, rows in found.items()}
    parent, *_, again = converted.tops(parents())
    good = sorted(PAPER, key=lambda name: -PAPER[name])
    here = [name for group in groups() for name in group if name != 'softmax']
    nearest = min((name for name in ATTENTIONS if name != 'softmax'), key=errors.__getitem__)
    of_trained = approximation.errors(16)
    untrained = dict(epochs=0, count_cells='outside')
    eighth, half = (
        parent - float(one(converted.ACCURACY, window_size=side, partition_grid=side, **untrained)['top1'])
        for side in (4, 8)
    )
    trained = converted.longest()
    third, half_on, itself = (
        one(converted.OTHER_SIZES, window_size=window, partition_grid=cells, epochs=trained[0]['epochs'])['top1']
        for window, cells in ((4, 8), (8, 8), (16, 0))
    )
    wide, narrow = (
        [dict(converted.ratios(converted.measured(), width, '49 cells', column))[side] for column in converted.COLUMNS]
        for width, side in ((768, 1022), (192, 224))
    )
    speeds = performance.gpu_rows()
    own = performance.ratio(*performance.models(speeds, 'train', 'eva_deit_tiny', 224))
    ours = performance.over_ours(speeds, 'train', 'eva_deit_tiny')
    cosines = [float(row['patch_cosine']) for row in pages.pick(pages.read_results(converted.FOREIGN), updates=0)]
    weights = one(WEIGHTS, weights='ViT-S/14, 196 tokens', start='**linear summary, as converted**')
    none, window, outside = (
        float(one(counts.RESULTS, count_cells=count, tokens_in_E=size)['error'])
        for count, size in (('one', 0), ('one', 49), ('outside', 49))
    )
    of_grid = {sides: ablations.top(row) for sides, row in ablations.grid().items()}
    many = [top1 for (_, cells), top1 in of_grid.items() if cells >= 4]
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
            f'here number {here.index("eva") + 1} of {len(here)}, `{here[0]}` {top[here[0]]} %, EVA {top["eva"]} %; '
            f'seeds: {len(found["eva"])}',
            '**does not hold here**',
            '[below](#the-eleven-beside-each-other)',
        ),
        (
            'From scratch it learns better than local attention and Performer',
            f'{found["eva"][0]["epochs"]} epochs: EVA {top["eva"]} %, '
            f'{", ".join(f"`{name}` {top[name]} %" for name in ("local", "performer"))}; seeds: {len(found["eva"])}',
            'holds, one network',
            '[below](#the-eleven-beside-each-other)',
        ),
        (
            'From scratch it learns as well as softmax',
            '; '.join(
                f'{of["eva"][0]["epochs"]} epochs: {elpv.spread(converted.tops(of["eva"]), 2)} % against '
                f'{elpv.spread(converted.tops(of["softmax"]), 2)} %, seeds: {len(of["eva"])} and {len(of["softmax"])}'
                for of in (found, twice)
            ),
            'no difference seen',
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
            f'tokens, seeds: {len(trained)}; its parent, without these epochs, has {parent:.2f} %. Another parent, '
            f'{again:.2f} %: {third} % with a third, {half_on} % with a half, and {itself} % itself, trained on alike',
            'holds, two networks',
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
            f'width 192, 224 px: converted {narrow[0]:.2f}× and {narrow[1]:.2f}×, eager; `eva_deit_tiny` in training, '
            f"in CUDA graphs: {own:.2f}× of timm's softmax model, {ours:.2f}× of ours",
            '**does not hold**',
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
            'Its cells are worth more than a larger window',
            f'half of the pictures, 10 epochs: a window of 64 tokens alone {of_grid[8, 0]:.1f} %, 4 cells alone '
            f'{of_grid[0, 2]:.1f} %; with 16 cells or more every window has {min(many):.1f} to {max(many):.1f} %',
            'holds, one network',
            '[ablations](ablations.md#trained)',
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
    timed = [row for rows in from_scratch().values() for row in pages.pick(rows, commit=TIMED)]
    minutes = [float(row['seconds']) / 60 for row in timed]
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
        f'Times are estimates. The {len(minutes)} runs of {timed[0]["epochs"]} epochs of commit {TIMED} took '
        f'{min(minutes):.1f} to {max(minutes):.1f} minutes each, with compiling and judging,\nwhile {AT_ONCE} at once '
        f'shared a GPU with a training of another kind. So a GPU makes {AT_ONCE} in that time. The experiments that\n'
        f'are measured by them are {hours(known, minutes)} together, and longer where an attention without kernels is '
        f'slower.'
    )


def hours(runs: float, minutes: List[float]) -> str:
    return f'{runs * min(minutes) / 60 / AT_ONCE:.1f} to {runs * max(minutes) / 60 / AT_ONCE:.1f} h'


def plotted() -> dict:
    """The data of the three panels."""
    short, errors = from_scratch(), nearness()
    scratch = [*short.items(), *longer().items(), ('softmax, class token', parents())]
    rows, second = pages.read_results(converted.ACCURACY), pages.read_results(converted.OTHER_SIZES)
    untrained = pages.pick(rows, epochs=0)
    names = sorted(short, key=lambda name: PAPER.get(name, 0))
    return dict(
        names=['softmax, class token', *names],  # from below
        scratch=[
            (row['epochs'], name, float(row['top1']), 1.96 * pages.standard_error(row))
            for name, of in scratch
            for row in of
        ],
        seen={
            count: sorted((tokens_seen(row), float(row['top1'])) for row in pages.pick(untrained, count_cells=count))
            for count in counts.COUNTS
        },
        tuned=[
            (tokens_seen(row), float(row['top1']), f'{row["epochs"]} epoch{"s" * (row["epochs"] != "1")}')
            for row in rows
            if row['kind'] == 'logit' and row['seed'] == '0'
        ],
        again=sorted((tokens_seen(row), float(row['top1'])) for row in pages.pick(second, kind='logit')),
        parents=[
            float(of[0]['top1']) for of in (pages.pick(rows, run='parent-s0'), pages.pick(second, run='parent-s0'))
        ],
        near=[(name, errors[name], top1) for name, top1 in PAPER.items()],
    )


def tokens_seen(row: Row) -> int:
    """Tokens of the window and cells that a query sees."""
    return int(row['window_size']) ** 2 + int(row['partition_grid']) ** 2


def plot_is_fresh() -> bool:
    return pages.plot_is_fresh(PLOT, plotted())


def draw() -> None:
    """Accuracy of each attention, over the tokens that a converted network sees, and the paper's over nearness."""
    plt = pages.pyplot('evidence')
    data = plotted()
    figure, (scratch, seen, near) = plt.subplots(1, 3, figsize=(12.5, 3.8), width_ratios=[1.1, 1, 1])

    def label(axes, text, x, y, shift=(6, -3), **how):
        axes.annotate(text, (x, y), xytext=shift, textcoords='offset points', fontsize=8, **how)

    for epochs, name, x, bar in data['scratch']:
        colour = COLOURS.get(name, OTHER)
        fill = colour if epochs == data['scratch'][0][0] else 'white'
        place = data['names'].index(name)
        scratch.errorbar(x, place, xerr=bar, fmt='o', capsize=3, color=colour, markerfacecolor=fill)
    scratch.set_yticks(range(len(data['names'])), data['names'], fontsize=8)
    scratch.margins(x=0.1, y=0.1)
    epochs = dict.fromkeys(point[0] for point in data['scratch'])
    handles = [
        plt.Line2D([], [], color=OTHER, marker='o', linestyle='', markerfacecolor=fill, label=f'{count} epochs')
        for count, fill in zip(epochs, (OTHER, 'white'), strict=True)
    ]
    scratch.legend(handles=handles, frameon=False, fontsize=8, loc='center right')
    scratch.set_title('from scratch, Tiny-ImageNet', fontsize=10)
    scratch.set_xlabel("top-1, %; from above in the paper's order")
    for count, colour in counts.COUNTS.items():
        seen.plot(*zip(*data['seen'][count], strict=True), marker='o', color=colour, label=f"count_cells='{count}'")
    for x, y, text in data['tuned']:
        seen.plot(x, y, marker='*', markersize=9, color=counts.COUNTS['outside'])
        label(seen, text, x, y, (7, -10))
    for x, y in data['again']:
        seen.plot(x, y, marker='*', markersize=9, color=counts.COUNTS['outside'], markerfacecolor='white')
    label(seen, 'itself, trained on', *data['again'][-1], (4, 6), ha='right')
    for parent, line, shift, text in zip(
        data['parents'], '-:', ((-2, 3), (-2, -10)), ('its parent, softmax', 'another parent'), strict=True
    ):
        seen.axhline(parent, color=OTHER, linewidth=1, linestyle=line)
        label(seen, text, 262, parent, shift, ha='right')
    seen.set_xlim(20, 268)
    seen.set_title('converted: untrained (lines), trained (stars)', fontsize=10)
    seen.set_xlabel('tokens and cells that a query sees, of 256')
    seen.set_ylabel('top-1, %')
    seen.legend(frameon=False, fontsize=8, loc='lower right')
    for name, x, y in data['near']:
        near.plot(x, y, marker='o', color=COLOURS.get(name, OTHER))
        label(near, name, x, y)
    near.set_ylabel('top-1, %')
    near.set_xlim(-0.02, 0.55)
    near.set_title("the paper's, ImageNet", fontsize=10)
    near.set_xlabel(f'error against softmax, {TOKENS} tokens, untrained')
    for axes in (scratch, seen, near):
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
