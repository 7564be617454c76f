"""The attentions' options, and the paper's Tables 1, 2 and 6 on our models, for `tables.py` beside this file.

Parameters and multiply-adds are counted on the code. Memory and time come from results/zoo_h200.csv, which tools/gpu.py
measures. Where a count differs from the paper's in a digit that the paper prints, `REASONS` says why; a difference
without a reason and a reason without a difference are errors.
"""

import inspect
from functools import lru_cache, partial

import pages
import performance
import timm
import torch
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from evavit.layers import ATTENTIONS, EvaAttention, GridAttention
from evavit.models import model_names, softmax_twin, variants
from evavit.ops.grid import block_counts, cell_shape

# Tables 1 and 2 of the paper: parameters (M), FLOPs (G, multiply-adds), top-1 on ImageNet-1k.
PAPER = {
    'deit_tiny': {
        'local': (5.7, 1.1, '67.10'),
        'performer': (5.7, 1.2, '65.92'),
        'lara': (5.8, 1.2, '71.48'),
        'eva': (5.8, 1.2, '73.00'),
        'softmax': (5.7, 1.3, '72.98'),
    },
    'deit_small': {
        'local': (22.0, 4.3, '74.06'),
        'performer': (22.0, 4.4, '74.29'),
        'lara': (22.2, 4.5, '79.48'),
        'eva': (22.2, 4.4, '80.65'),
        'softmax': (22.0, 4.6, '80.36'),
    },
    'deit_tiny_784': {
        'performer': (5.7, 4.9, '67.19'),
        'local': (5.7, 4.4, '70.62'),
        'scatterbrain': (5.7, 5.2, '73.50'),
        'nystromformer': (5.7, 4.8, '74.20'),
        'lara': (5.8, 4.6, '75.02'),
        'combiner': (5.7, 4.7, '75.56'),
        'long_short': (6.1, 5.0, '76.41'),
        'eva': (5.8, 4.6, '76.67'),
        'softmax': (5.7, 7.0, '77.16'),
    },
    'pvt_v2_b3': {
        'local': (36.0, 7.2, '83.34'),
        'performer': (36.0, 8.2, '82.40'),
        'lara': (39.9, 7.7, '83.47'),
        'eva': (36.1, 7.4, '83.71'),
        'softmax': (45.2, 6.9, '83.14'),
    },
}
# Table 6: memory (G) and milliseconds an iteration, of training DeiT-Tiny-784 on V100s.
PAPER_STEP = {'performer': (8.1, 87), 'local': (7.8, 65), 'eva': (9.9, 94), 'softmax': (17.7, 99)}
STEPS = 'zoo_h200.csv'
GRAPHS = ('reduce-overhead', 'default')  # modes of torch.compile, the one to show first
UNITS = {'parameters': 'M', 'multiply-adds': 'G'}

PERFORMER = (
    '128 features cost 4·N·128·C a layer: features of q and of k, keys by values, the output. {} features '
    "would give the paper's figure; it names their number (128, Table 9) for DeiT-Tiny-784 alone, and the launch "
    'that was published has 64.'
)
REASONS = {
    ('softmax_deit_tiny', 'multiply-adds'): "timm's `deit_tiny_patch16_224`, with a class token, is {deit_tiny_g} G.",
    ('local_deit_small', 'parameters'): "22.050 M are softmax's, 0.012 M are bias tables.",
    ('performer_deit_tiny', 'multiply-adds'): PERFORMER.format('45 to 99'),
    ('performer_deit_small', 'multiply-adds'): PERFORMER.format('36 to 63'),
    (
        'performer_deit_tiny_784',
        'multiply-adds',
    ): '128 features (Table 9) cost 4·N·128·C a layer: features of q and of k, keys by values, the output. The '
    "paper's figure is three of these products.",
    ('performer_pvt_v2_b3', 'multiply-adds'): PERFORMER.format('141 to 152'),
    (
        'softmax_pvt_v2_b3',
        'parameters',
    ): "The paper's row is the original, with downsampled keys and values: timm's `pvt_v2_b3` has {pvt_m} M.",
    ('softmax_pvt_v2_b3', 'multiply-adds'): "Likewise: timm's `pvt_v2_b3` is {pvt_g} G.",
    (
        'scatterbrain_deit_tiny_784',
        'multiply-adds',
    ): 'Keys by values are summed by window once, and the sums outside of a window are sums of those. The same '
    'product once more over all tokens gives 5.24 G.',
    (
        'nystromformer_deit_tiny_784',
        'multiply-adds',
    ): "The pseudo-inverse meets the m landmarks' values, m × d; by the N × m weights first, it is 4.78 G.",
    (
        'lara_deit_tiny_784',
        'multiply-adds',
    ): 'The density of each sample under each proposal is 0.006 G of it, the mixing of the landmark keys 0.011 G; '
    'without both, 4.648 G.',
    (
        'combiner_deit_tiny_784',
        'parameters',
    ): 'DeepSets-Max (Table 9) projects the queries and keys of a head, 2·64² weights a layer. Without '
    "(`pooling='max'`) it is {combiner_m} M, but then {combiner_g} G.",
    (
        'long_short_deit_tiny_784',
        'parameters',
    ): 'Table 9 gives a dynamic projection of 16; with 49 (`projection_dim=49`) it is {long_short_m} M.',
    ('long_short_deit_tiny_784', 'multiply-adds'): 'Likewise: with 49 it is {long_short_g} G.',
}


class WithoutValues(TorchFunctionMode):
    """What draws a weight is left out: on the meta device it has no values, and it took most of a count's time."""

    DRAWING = frozenset(getattr(torch.Tensor, name) for name in ('uniform_', 'erfinv_', 'mul_', 'add_', 'clamp_'))

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return args[0] if func in self.DRAWING else func(*args, **(kwargs or {}))


@lru_cache
def count(name: str, **kwargs) -> tuple:
    """Parameters and multiply-adds of a model for one 224 × 224 image: convolutions and matrix products.

    The blocks of a stage are alike: all but the first are taken out, which is counted and multiplied. Not counted are
    the sums over cells, additions that plain PyTorch is faster at as products with a matrix of 0 and 1.
    """
    with WithoutValues():
        model = timm.create_model(name, device='meta', **kwargs).eval()
    stages = {path: blocks for path, blocks in model.named_modules() if path.rpartition('.')[2] == 'blocks'}
    depths = {f'{path}.0': len(blocks) for path, blocks in stages.items()}
    for blocks in stages.values():
        del blocks[1:]
    sums = {}
    for path, module in model.named_modules():
        if isinstance(module, EvaAttention):
            module.register_forward_pre_hook(partial(_keep_sums, sums, path.rpartition('.')[0]))
    with torch.no_grad(), FlopCounterMode(display=False) as flops:
        model(torch.empty(1, 3, 224, 224, device='meta'))
    parameters = sum(p.numel() for p in model.parameters())
    multiply_adds = flops.get_total_flops() // 2 - sum(sums.values())
    for path, depth in depths.items():
        of_block = flops.get_flop_counts()[f'{type(model).__name__}.{path}']
        parameters += (depth - 1) * sum(p.numel() for p in model.get_submodule(path).parameters())
        multiply_adds += (depth - 1) * (sum(of_block.values()) // 2 - sums.get(path, 0))
    return parameters, multiply_adds


def sums_over_cells(layer: torch.nn.Module, x: torch.Tensor, feat_size: list) -> int:
    """What EVA's 0/1 products are counted as: means of q and k, ω by token, β; a band has one row of cells."""
    if not isinstance(layer, EvaAttention) or not layer.partition_grid or layer.variant:
        return 0
    cells_of_a_band = block_counts(feat_size, cell_shape(feat_size, layer.partition_grid))[1]
    return 4 * cells_of_a_band * (x.shape[1] - layer.num_prefix_tokens) * x.shape[2]


def _keep_sums(sums: dict, path: str, layer: torch.nn.Module, args: tuple) -> None:
    sums[path] = sums_over_cells(layer, *args)


def compared(ours: float, paper: float) -> tuple:
    """The difference as text, empty where the paper's digits are ours."""
    return '' if f'{ours:.1f}' == f'{paper:.1f}' else f'{ours - paper:+.2f}'


def tables() -> str:
    """A table a variant with all attentions, then the reasons of the differences."""
    facts = {}
    for key, (name, kwargs) in dict(
        deit_tiny=('deit_tiny_patch16_224', {}),  # with its class token
        pvt=softmax_twin('softmax_pvt_v2_b3'),
        combiner=('combiner_deit_tiny_784', dict(pooling='max')),
        long_short=('long_short_deit_tiny_784', dict(projection_dim=49)),
    ).items():
        parameters, multiply_adds = count(name, **kwargs)
        facts |= {f'{key}_m': f'{parameters / 1e6:.2f}', f'{key}_g': f'{multiply_adds / 1e9:.3f}'}
    lines, reasons, used = [], [], set()
    for variant in variants():
        paper = PAPER.get(variant, {})
        lines += [
            '',
            '| model | parameters | paper | difference | multiply-adds | paper | difference | top-1 in the paper |',
            '|---|---|---|---|---|---|---|---|',
        ]
        for attention in ATTENTIONS:
            name = f'{attention}_{variant}'
            if name not in model_names():
                continue
            *published, top1 = paper.get(attention, (None, None, '–'))
            cells = [f'`{name}`']
            for (what, unit), ours, theirs in zip(UNITS.items(), count(name), published, strict=True):
                ours = ours / (1e6 if unit == 'M' else 1e9)
                difference = '' if theirs is None else compared(ours, theirs)
                if difference:
                    if (name, what) not in REASONS:
                        raise SystemExit(
                            f'error: {name}: {ours:.3f} {unit} {what}, the paper has {theirs}; REASONS in '
                            f'docs/make/zoo.py does not say why'
                        )
                    used.add((name, what))
                    reasons.append(f'* `{name}`, {what}: {REASONS[name, what].format(**facts)}')
                cells += [f'{ours:.2f} {unit}', '–' if theirs is None else f'{theirs} {unit}', difference]
            lines.append('| ' + ' | '.join([*cells, top1]) + ' |')
    if unused := set(REASONS) - used:
        raise SystemExit(f'error: docs/make/zoo.py has reasons for what does not differ: {sorted(unused)}')
    return '\n'.join([*lines[1:], '', 'Where a printed digit differs:', '', *reasons])


def options() -> str:
    """A row an attention: its class, its own options with their defaults, the image sizes that it takes."""
    shared = inspect.signature(GridAttention).parameters
    rows = ['| attention | class | own options | image sizes |', '|---|---|---|---|']
    for name, attention in ATTENTIONS.items():
        own = [
            f'`{key}={parameter.default!r}`'
            for key, parameter in inspect.signature(attention).parameters.items()
            if key not in shared and key != 'feat_size' and parameter.kind is parameter.KEYWORD_ONLY
        ]
        rows.append(
            f'| `{name}` | `{attention.__name__}` | {", ".join(own)} | '
            f'{"of `img_size`, as made" if attention.fixed_grid else "any"} |'
        )
    return '\n'.join(rows)


def measured() -> list:
    """Rows of whole models with each attention. Beside EVA's stands timm's softmax model, which is none of the zoo."""
    return [row for row in pages.read_results(STEPS) if row['attention'] in ('', 'eva')]


def steps() -> str:
    """Memory and time of a training step with each attention, eager and compiled, beside the paper's Table 6."""
    rows = [row for row in measured() if row['case'].endswith('_deit_tiny_784')]
    if not rows:
        return 'Not measured yet.'
    batches = sorted({int(row['batch_size']) for row in rows})
    if len(batches) > 1 or len({row['device'] for row in rows}) > 1:
        raise SystemExit(f'error: {STEPS} mixes batch sizes {batches} or devices; keep one of each')
    columns = ['model', 'GiB, eager', 'ms, eager', 'ms, compiled', 'inference, compiled, img/s']
    lines = []
    for attention in ATTENTIONS:
        here = performance.pick(rows, case=f'{attention}_deit_tiny_784')
        train, infer = (performance.pick(here, bench=bench) for bench in ('train', 'infer'))
        compiled, speed = _compiled(train), _compiled(infer)
        line = [f'`{attention}_deit_tiny_784`' + (', plain' if any(row['backend'] == 'plain' for row in here) else '')]
        line += _step(performance.pick(train, torchcompile='no'))
        line.append(_step(compiled)[1] + _mark(compiled, rows))
        fast = performance.pick(speed, status='ok')
        line.append(f'{float(fast[0]["img_per_s"]):,.0f}{_mark(speed, rows)}' if fast else _step(speed)[1])
        line += [str(figure) for figure in PAPER_STEP.get(attention, ('–', '–'))]
        lines.append([*line, PAPER['deit_tiny_784'].get(attention, ('', '', '–'))[2]])
    graphs = any(row['torchcompile'] == GRAPHS[0] for row in rows)
    star = ', * in the default mode' if any(' *' in cell for line in lines for cell in line) else ''
    mode = f'in CUDA graphs{star}' if graphs else 'in the default mode'
    return (
        pages.table([*columns, 'G in the paper', 'ms in the paper', 'top-1 in the paper'], lines)
        + f'\n\nBatch {batches[0]}, {rows[0]["amp_dtype"]} autocast, compiled {mode}. {pages.origins(rows)}'
    )


def families() -> str:
    """Images a second, eager, of the attentions that the paper has at other sizes."""
    rows = [
        row
        for row in performance.pick(measured(), status='ok', torchcompile='no')
        if not row['case'].endswith('_deit_tiny_784')
    ]
    if not rows:
        return 'Not measured yet.'
    lines = []
    for case, batch in dict.fromkeys((row['case'], row['batch_size']) for row in rows):
        here = performance.pick(rows, case=case)
        speeds = [
            performance.number(performance.pick(here, bench=bench), 'img_per_s', max) for bench in ('train', 'infer')
        ]
        lines.append([f'`{case}`', batch, *('–' if speed is None else f'{speed:,.0f}' for speed in speeds)])
    return f'{pages.table(["model", "batch", "training, img/s", "inference, img/s"], lines)}\n\n{pages.origins(rows)}'


def _compiled(rows: list) -> list:
    """The rows of the first mode that went well; else of the first that was tried."""
    tried = [found for mode in GRAPHS if (found := performance.pick(rows, torchcompile=mode))]
    return next((found for found in tried if performance.pick(found, status='ok')), tried[0] if tried else [])


def _mark(rows: list, all_rows: list) -> str:
    """A star at a figure of the default mode in a table of CUDA graphs."""
    graphs = any(row['torchcompile'] == GRAPHS[0] for row in all_rows)
    return ' *' if graphs and any(row['torchcompile'] == GRAPHS[1] for row in rows) else ''


def _step(rows: list) -> list:
    """GiB and milliseconds of a model in one mode; what became of it where it has none."""
    figures = performance.pick(rows, status='ok')
    if figures:
        best = min(figures, key=lambda row: float(row['ms']))
        memory = f'{float(best["peak_memory_mib"]) / 1024:.1f}' if best['peak_memory_mib'] else '–'
        return [memory, f'{float(best["ms"]):.1f}']
    return ['–', rows[0]['status'].replace('|', '/') if rows else 'not measured']
