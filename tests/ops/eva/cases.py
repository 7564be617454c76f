"""Cases of EVA for the tests of its kernels, and their comparison with plain PyTorch in float64.

test_attention.py holds plain PyTorch against a loop over the definition.
"""

import pytest
import torch
from ops.kernels import relative_rms

from evavit.ops import eva_attention, eva_attention_packed, eva_num_cells
from evavit.ops.eva import EVA, eva_attention_projected
from evavit.ops.eva.case import EvaOptions, as_summary

NAMES = [
    'out',
    'q',
    'k',
    'v',
    *(f'{s}.{p}' for s in ('summary_q', 'summary_k') for p in ('weight', 'bias', 'norm_weight', 'norm_bias')),
    'rel_pos_bias',
]
# Odd, short, non-square and padded grids; windows and cells of every kind.
SHAPES = [
    # feat_size, window_size, partition_grid
    ((14, 14), 7, 7),
    ((28, 28), 7, 7),
    ((13, 9), 7, 7),
    ((29, 17), 4, 3),
    ((16, 31), 14, 14),
    ((5, 5), 7, 1),
    ((7, 24), 0, 3),
    ((13, 9), 0, 7),
    ((16, 31), 7, 0),
    ((14, 14), 14, 0),
    ((5, 3), 1, 1),
    ((37, 33), 16, 16),
]


def small(name, *shape, **options):
    return pytest.param(shape, options, id=name)


# For the interpreter, which takes seconds for what a GPU does in microseconds. The options are those of `make_case`,
# `layout` and `count_cells` of `run`, and `programs`, how many keep a device busy: where few do, each walks several
# windows.
SMALL_CASES = [
    small('odd and not square', (9, 7), 4, 3),
    small('several windows a program', (9, 7), 4, 3, programs=1),
    small('no bias', (5, 6), 3, 2, bias=False),
    small('no noise', (5, 6), 3, 2, noise=False),
    small('no bias, no noise', (5, 6), 3, 2, bias=False, noise=False),
    small('a projection', (5, 6), 3, 2, layout='projection'),
    small('a projection, prefix tokens, no bias', (5, 6), 3, 2, P=2, layout='projection', bias=False),
    small('separate views', (5, 6), 3, 2, layout='views'),
    small('separate tensors', (5, 6), 3, 2, layout='contiguous'),
    small('channels apart in memory', (5, 6), 3, 2, layout='transposed'),
    small('48 channels in tiles of 64', (3, 4), 3, 2, d=48),
    small('grid smaller than a window', (3, 3), 7, 2),
    small('grid smaller than a window, no bias', (2, 5), 7, 3, bias=False),
    small('one token', (1, 1), 7, 7),
    small('windows of one token', (3, 2), 1, 1),
    small('cells of one token', (3, 4), 3, 7),
    small('windows of two tiles', (10, 4), 9, 1),
    small('windows of two tiles, several a program', (10, 8), 9, 1, programs=1),
    small('two tiles of cells', (9, 7), 3, 7),
    small('no window', (5, 6), 0, 3),
    small('no window, two tiles of cells', (7, 6), 0, 7),
    small('no window, cells of many tokens', (12, 12), 0, 1, h=1),
    small('no window, no noise, halves', (5, 6), 0, 3, noise=False, dtype=torch.float16),
    small('no bias, halves', (5, 6), 3, 2, bias=False, dtype=torch.float16),
    small('no cells', (6, 5), 5, 0),
    small('no cells, no bias', (6, 5), 5, 0, bias=False),
    small('no cells, windows of two tiles', (9, 5), 9, 0),
    small('all count', (9, 7), 4, 3, count_cells='all'),
    small('outside counts', (9, 7), 4, 3, count_cells='outside'),
    small('outside counts, several windows a program', (8, 12), 4, 4, programs=1, count_cells='outside'),
    small('outside counts, no bias, halves', (9, 7), 4, 4, bias=False, dtype=torch.float16, count_cells='outside'),
    small('outside counts, all cells drop out', (3, 4), 7, 2, count_cells='outside'),
    small('all cells drop out, windows of two tiles', (9, 4), 9, 3, count_cells='outside'),
    small('outside counts, windows of two tiles', (10, 8), 9, 4, count_cells='outside'),
    small('outside counts, two tiles of cells', (9, 7), 3, 7, count_cells='outside'),
    small('all count, two tiles of cells', (9, 7), 3, 7, count_cells='all'),
    small('outside counts, no window', (5, 6), 0, 3, count_cells='outside'),
    small('all count, no window, two tiles of cells', (7, 6), 0, 7, count_cells='all'),
    small('outside counts, no cells', (6, 5), 5, 0, count_cells='outside'),
    small('a class token', (9, 7), 4, 3, P=1),
    small('a class token, several windows and parts', (9, 7), 4, 3, P=1, programs=1),
    small('prefix tokens, outside counts', (9, 7), 4, 3, P=5, count_cells='outside'),
    small('prefix tokens, separate views, no bias', (5, 6), 3, 2, P=2, layout='views', bias=False),
    small('prefix tokens, no bias, halves', (5, 6), 3, 2, P=9, bias=False, dtype=torch.float16),
    small('prefix tokens, no cells', (6, 5), 5, 0, P=5),
    small('prefix tokens, no cells, windows of two tiles', (9, 5), 9, 0, P=2),
    small('prefix tokens, no window, all count', (5, 6), 0, 3, P=5, count_cells='all'),
    small('prefix tokens, grid smaller than a window', (2, 5), 7, 3, P=16, count_cells='outside'),
    small('prefix tokens, two tiles of cells', (9, 7), 3, 7, P=5, count_cells='outside'),
    small('prefix tokens that need a second tile', (8, 8), 4, 4, P=16, d=32),
    small('parts of the keys of prefix queries', (20, 15), 7, 3, P=2, h=1, programs=8),
    small('prefix tokens, no bias, many tokens and one cell', (20, 15), 7, 1, P=2, h=1, bias=False),
]
# Of the same kinds as SHAPES, and where cells drop out: in pairs of windows and cells, and all of them.
COUNTED_SHAPES = [
    ((14, 14), 7, 7),
    ((28, 28), 8, 7),
    ((13, 9), 7, 7),
    ((29, 17), 4, 3),
    ((37, 37), 7, 13),
    ((16, 31), 14, 14),
    ((5, 5), 7, 3),
    ((9, 9), 16, 4),
    ((13, 9), 0, 7),
    ((16, 31), 7, 0),
]
COUNTS = ['all', 'outside']
# Prefix tokens, and cells that need one to five tiles beside them.
PREFIX_SHAPES = [
    # feat_size, window_size, partition_grid, P
    ((14, 14), 7, 7, 1),
    ((13, 9), 7, 7, 5),
    ((28, 28), 8, 7, 2),
    ((29, 17), 4, 3, 9),
    ((37, 37), 7, 13, 5),
    ((37, 33), 7, 16, 16),
    ((5, 5), 7, 3, 1),
    ((9, 9), 16, 4, 5),
    ((13, 9), 0, 7, 5),
    ((16, 31), 7, 0, 1),
    ((64, 64), 7, 16, 5),
    ((73, 73), 7, 7, 5),
]


def make_case(
    feat_size,
    window_size,
    partition_grid,
    dtype,
    *,
    B=2,
    h=3,
    d=32,
    bias=True,
    noise=True,
    factor=1.0,
    P=0,
    device='cuda',
):
    """qkv `(B, P + N, 3, h, d)`, the eight parameters, the table of biases, the noise and a gradient of the output."""
    N, cells = feat_size[0] * feat_size[1], eva_num_cells(list(feat_size), partition_grid)
    qkv = (factor * torch.randn(B, P + N, 3, h, d)).to(dtype)
    summary = [
        t
        for _ in range(2 if partition_grid else 0)
        for t in (torch.randn(d, d) * d**-0.5, *(x + 0.1 * torch.randn(d) for x in (0, 1, 0)))
    ]
    rel_pos_bias = torch.randn((2 * window_size - 1) ** 2, h) if bias and window_size else None
    epsilon = torch.randn(B, h, cells, d) if noise and cells else None
    grad = torch.randn(B, P + N, h, d).to(dtype).transpose(1, 2)

    def move(x):
        return None if x is None else x.to(device)

    return move(qkv), [move(x) for x in summary], move(rel_pos_bias), move(epsilon), move(grad)


def _options(feat_size, d, *, summary_q, summary_k, fused, count_cells='one', **options):
    """`EvaOptions` of a call of `eva_attention`."""
    summaries = as_summary(summary_q), as_summary(summary_k)
    defaults = dict(scale=d**-0.5, proposal_scale=1.0, dropout_p=0.0, norm_eps=1e-5, count_cells=count_cells)
    return EvaOptions(list(feat_size), *summaries, **defaults, **options)


def prepared(case, feat_size, window_size, partition_grid, *, fused, dtype=None, layout='packed', **kwargs):
    """A function of no arguments that computes the output, and what it has gradients of: qkv, parameters and bias."""
    qkv, summary, rel_pos_bias, noise, _ = case

    def leaf(x):
        return None if x is None else x.detach().to(dtype or x.dtype).requires_grad_()

    qkv, summary, rel_pos_bias = leaf(qkv), [leaf(x) for x in summary], leaf(rel_pos_bias)
    options = dict(
        summary_q=tuple(summary[:4]) or None,
        summary_k=tuple(summary[4:]) or None,
        rel_pos_bias=rel_pos_bias,
        window_size=window_size,
        partition_grid=partition_grid,
        noise=noise if noise is None or dtype is None else noise.to(dtype),
        fused=fused,
        num_prefix_tokens=qkv.shape[1] - feat_size[0] * feat_size[1],
        **kwargs,
    )
    views = qkv.permute(2, 0, 3, 1, 4)

    def forward():
        if layout == 'packed':
            return eva_attention_packed(views, list(feat_size), **options)
        if layout == 'projection':  # as a layer calls; always fused
            out = eva_attention_projected(qkv.flatten(2), qkv.shape[3], _options(feat_size, qkv.shape[-1], **options))
            return out.unflatten(-1, qkv.shape[3:]).transpose(1, 2)
        change = {
            'views': lambda x: x,
            'contiguous': torch.Tensor.contiguous,
            'transposed': lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
        }[layout]
        return eva_attention(*(change(x) for x in views.unbind(0)), list(feat_size), **options)

    return forward, [qkv, *summary, *([rel_pos_bias] if rel_pos_bias is not None else [])]


def run(case, feat_size, window_size, partition_grid, **kwargs):
    """The output and the gradients of qkv, the parameters and the bias, in the order of NAMES."""
    forward, leaves = prepared(case, feat_size, window_size, partition_grid, **kwargs)
    out = forward()
    grads = torch.autograd.grad(out, leaves, case[-1].to(out.dtype))
    names = [name for name in NAMES if partition_grid or '.' not in name]
    return dict(zip(names, [out.detach(), *grads[0].unbind(2), *grads[1:]], strict=False))


@torch.no_grad()
def infer(*args, **kwargs):
    """The output alone, of what `run` takes: without a gradient the kernels keep nothing for a backward."""
    return prepared(*args, **kwargs)[0]()


def check(case, shape, dtype, layout='packed', **kwargs):
    reference = run(case, *shape, fused=False, dtype=torch.float64, **kwargs)
    if dtype == torch.float32:
        plain = run(case, *shape, fused=False, **kwargs)
    else:
        with torch.autocast('cuda', dtype):
            plain = run(case, *shape, fused=False, **kwargs)
    fused = run(case, *shape, fused=True, layout=layout, **kwargs)
    again = run(case, *shape, fused=True, layout=layout, **kwargs)
    assert torch.equal(infer(case, *shape, fused=True, layout=layout, **kwargs), fused['out'])
    for name, value in fused.items():
        assert torch.equal(value, again[name]), f'{name} differs between two runs'
        # A gradient that is zero but for rounding, as of a constant added to all logits, is measured against its terms.
        if reference[name].norm() < 1e-9 * reference['v'].norm():
            continue
        error, allowed = relative_rms(value, reference[name]), 1e-5 if dtype == torch.float32 else 5e-3
        of_plain = relative_rms(plain[name], reference[name])
        # Sums that cancel, as d LayerNorm bias without a window, keep the rounding of half-precision operands: there
        # the plain path is beyond the bound itself.
        assert error <= max(allowed, 1.25 * of_plain), f'{name}: {error:.1e}, plain {of_plain:.1e}'
        assert error <= max(2 * of_plain, allowed / 2), f'{name}: {error:.1e} is over twice plain {of_plain:.1e}'


def check_small(shape, options, device, monkeypatch):
    """A case of SMALL_CASES against float64, on a GPU or in the interpreter."""
    from evavit.ops.eva.triton import launches, plan

    options = dict(B=1, h=2, d=16, dtype=torch.float32) | options
    layout, programs = options.pop('layout', 'packed'), options.pop('programs', None)
    count_cells = options.pop('count_cells', 'one')
    if programs:
        monkeypatch.setattr(plan, 'PROGRAMS', programs)
        launches.forget()
    case = make_case(*shape, **options, device=device)
    reference = run(case, *shape, fused=False, dtype=torch.float64, count_cells=count_cells)
    with EVA.forced('triton'):
        fused = run(case, *shape, fused=True, layout=layout, count_cells=count_cells)
        assert torch.equal(infer(case, *shape, fused=True, layout=layout, count_cells=count_cells), fused['out'])
    if programs:
        launches.forget()
    for name, value in fused.items():
        # A gradient that is zero but for rounding, as of a constant added to all logits, is measured against its terms.
        size = (
            reference[name].norm() if reference[name].norm() >= 1e-9 * reference['v'].norm() else reference['v'].norm()
        )
        error = (value.double() - reference[name]).norm() / size
        assert error < (1e-5 if options['dtype'] == torch.float32 else 2e-3), f'{name}: {error:.1e}'
