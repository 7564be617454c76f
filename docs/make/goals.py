"""The table of goals at the end of docs/performance.md: what was to be reached, and what was measured."""

from typing import List, Optional

import pages
import performance
from performance import attention, models, number, over_best, pick, ratio, speed_up, spread

LENGTHS = (196, 784, 3136, 12544)
COMPILED = (  # model, side of its images, training and inference over timm's softmax model in the faster compiled mode
    ('eva_deit_tiny_784', 224, 1.35, 1.5),
    ('eva_deit_tiny', 224, 1.05, 1.0),
    ('eva_pvt_v2_b3', 224, 1.2, 1.1),
    ('eva_deit_tiny_784', 448, 3, 3),
    ('eva_deit_tiny_784', 896, 8, 8),
)
BY_MODE = (  # mode, model, what, over timm's softmax model
    ('no', 'eva_deit_tiny', 'train', 0.95),
    ('no', 'eva_deit_tiny', 'infer', 0.95),
    ('no', 'eva_deit_tiny_784', 'train', 1.2),
    ('no', 'eva_deit_tiny_784', 'infer', 1.2),
    ('no', 'eva_pvt_v2_b3', 'train', 1.0),
    ('default', 'eva_deit_tiny', 'train', 1.0),
    ('default', 'eva_deit_tiny', 'infer', 1.0),
    ('default', 'eva_deit_tiny_784', 'train', 1.3),
    ('default', 'eva_deit_tiny_784', 'infer', 1.3),
)
CPU = (  # model, what, time over timm's softmax model
    ('eva_deit_tiny_784', 'infer', 0.75),
    ('eva_deit_tiny_784', 'train', 0.75),
    ('eva_deit_tiny', 'infer', 1.0),
    ('eva_pvt_v2_b3', 'infer', 1.1),
)


def _percent(value: Optional[float]) -> Optional[float]:
    return None if value is None else 100 * value


def goals() -> List[tuple]:
    """(what, at least or at most, goal, what was measured or None, unit) of all that this code was built to reach."""
    gpu, cpu, lines = performance.gpu_rows(), performance.cpu_rows(), []
    for bench, what, targets in (
        ('op', 'attention alone', (1, 2.5, 7, 22)),
        ('layer', 'the layer', (1.1, 1.4, 2, 4)),
    ):
        for tokens, goal in zip(LENGTHS, targets, strict=True):
            what_here = f'{what}, forward + backward, {tokens:,} tokens: speed over the best SDPA backend'
            lines.append((what_here, '≥', goal, speed_up(gpu, bench, tokens), '×'))
    many = pick(performance.made('op_cells'), partition_grid=16, num_prefix_tokens=0)
    for tokens, goal in ((4096, 2.5), (16384, 8)):
        what = f'attention alone, 256 cells, forward + backward, {tokens:,} tokens: speed over the best SDPA backend'
        lines.append((what, '≥', goal, over_best(pick(many, tokens=tokens)), '×'))
    for bench, what in (('op', 'attention alone'), ('layer', 'the layer')):
        what = f'{what}: difference in time per token, 784 to 65,536 tokens'
        lines.append((what, '≤', 20, _percent(spread(gpu, bench)), ' %'))
    for direction, goal in (('forward', 60), ('backward', 50)):
        for tokens in LENGTHS:
            share = number(pick(attention(gpu, 'op', tokens), backend='triton'), f'{direction}_of_copy')
            what = f"attention alone, {direction}, {tokens:,} tokens: share of a copy's bandwidth"
            lines.append((what, '≥', goal, _percent(share), ' %'))
    for tokens in LENGTHS:
        rows = attention(gpu, 'layer', tokens)
        peaks = (number(pick(rows, backend=name), 'peak_memory_mib') for name in ('triton', 'flash'))
        what = f"the layer, {tokens:,} tokens: peak memory of forward + backward over Flash SDPA's"
        lines.append((what, '≤', 1, ratio(*peaks), '×'))
    host = performance.made('host')
    for column, what in (('forward_ms', 'inference'), ('ms', 'forward + backward')):
        times = (number(pick(host, attention=name), column) for name in ('eva', 'softmax'))
        lines.append((f"the layer, {what}: the processor's time over SDPA's", '≤', 1.15, ratio(*times), '×'))
    for mode, case, bench, goal in BY_MODE:
        what = f"`{case}`, {performance.KINDS[bench]}, {NAMES[mode]}: speed over timm's softmax model"
        lines.append((what, '≥', goal, ratio(*models(gpu, bench, case, 224, [mode])), '×'))
    for case, img_size, *targets in COMPILED:
        for bench, goal in zip(('train', 'infer'), targets, strict=True):
            kind = performance.KINDS[bench]
            what = f"`{case}` at {img_size} px, {kind}, both compiled: speed over timm's softmax model"
            lines.append((what, '≥', goal, ratio(*models(gpu, bench, case, img_size)), '×'))
    wide = performance.made('wide')
    best = number([row for row in wide if row['attention'] == 'eva'], 'forward_ms')
    speed = ratio(number(pick(wide, attention='softmax'), 'forward_ms'), best)
    lines.append(('a ViT of width 384 at 518 px, converted, inference, eager: speed over softmax', '≥', 1, speed, '×'))
    for case, bench, goal in CPU:
        kind = 'training step' if bench == 'train' else 'inference'
        what = f"`{case}` on 2 CPU cores, {kind}: time over timm's softmax model"
        lines.append((what, '≤', goal, ratio(*models(cpu, bench, case, 224, ['no'], 'ms')), '×'))
    return lines


NAMES = {'no': 'eager', 'default': 'default mode of `torch.compile`'}


def verdict(sense: str, goal: float, value: Optional[float]) -> str:
    if value is None:
        return 'not measured'
    return 'reached' if (value >= goal if sense == '≥' else value <= goal) else '**short**'


def reach() -> str:
    """The goals, each with what was measured."""
    rows = []
    for what, sense, goal, value, unit in goals():
        shown = '–' if value is None else f'{value:.0f}{unit}' if unit == ' %' else f'{value:.2f}{unit}'
        rows.append([what, f'{sense} {goal:g}{unit}', shown, verdict(sense, goal, value)])
    verdicts = [row[-1] for row in rows]
    return pages.table(['what', 'goal', 'measured', ''], rows) + (
        f'\n\n{len(verdicts)} lines: {verdicts.count("reached")} reached, '
        f'{verdicts.count("**short**")} short, {verdicts.count("not measured")} not measured.'
    )
