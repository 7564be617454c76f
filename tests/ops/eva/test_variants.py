"""EVA's ablations against the loop over the definition, and against each other where they must agree."""

import pytest
import torch
from helpers import relative_errors, saved_bytes
from ops.eva.references import eva_loop, eva_variant_loop

from evavit.ops import eva_attention_variant, eva_num_cells, halo_size

KINDS = {'linear_ln': 4, 'linear': 2, 'identity': 0}  # tensors of a summary


def make_case(
    feat_size,
    window_size=4,
    partition_grid=3,
    *,
    B=2,
    h=2,
    d=8,
    summary='linear_ln',
    num_samples=1,
    overlap=False,
    bias=True,
    noise=True,
    noise_std=0.8,
    **options,
):
    """(leaves, arguments that need no gradient) in float64; leaves hold qkv, summaries, table, learned proposal."""

    def normal(*shape, std=1.0):
        return (std * torch.randn(*shape, dtype=torch.float64)).requires_grad_()

    leaves = {'qkv': normal(3, B, h, feat_size[0] * feat_size[1], d)}
    proposal = options.get('proposal', 'qk')
    if partition_grid:
        for name in ('summary_q', 'summary_k')[proposal in ('zero', 'learned') :]:
            shapes = [(d, d), (d,), (d,), (d,)][: KINDS[summary]]
            leaves |= {f'{name}.{i}': normal(*shape, std=0.5) for i, shape in enumerate(shapes)}
        if proposal == 'learned':
            leaves['proposal_mean'] = normal(h, partition_grid, partition_grid, d)
    if bias and window_size:
        reach = window_size + (halo_size(window_size) if overlap else 0)
        leaves['table'] = normal((2 * reach - 1) ** 2, h)
    cells = eva_num_cells(feat_size, partition_grid)
    options |= dict(
        feat_size=feat_size,
        window_size=window_size,
        partition_grid=partition_grid,
        overlap=overlap,
        noise_std=noise_std,
    )
    if noise and cells:
        options['noise'] = noise_std * torch.randn(B, h, cells, num_samples, d, dtype=torch.float64)
    return leaves, options


def tensors(leaves, options):
    """Arguments of op and loop alike: q, k, v, the summaries, the learned proposal."""
    arguments = dict(zip('qkv', leaves['qkv'], strict=True))
    if options['partition_grid']:
        arguments |= {
            name: [value for key, value in leaves.items() if key.startswith(name)]
            for name in ('summary_q', 'summary_k')
        }
        arguments['proposal_mean'] = leaves.get('proposal_mean')
    return arguments


def run_op(leaves, options):
    return eva_attention_variant(**tensors(leaves, options), rel_pos_bias=leaves.get('table'), **options)


def check(leaves, options, bound=1e-10):
    expected = eva_variant_loop(**tensors(leaves, options), bias_table=leaves.get('table'), **options)
    found = relative_errors(run_op(leaves, options), leaves, expected, leaves)
    assert max(found.values()) <= bound, found


GRIDS = [(8, 8), (7, 10), (11, 5), (3, 2), (1, 1)]
VARIANTS = [
    dict(),
    dict(partition='complement'),
    dict(overlap=True),
    dict(partition='complement', overlap=True),
    dict(summary='linear'),
    dict(summary='identity'),
    dict(num_samples=5),
    dict(proposal='q'),
    dict(proposal='zero'),
    dict(proposal='learned'),
    dict(proposal='q', summary='identity', noise=False),
    dict(num_samples=3, partition='complement', proposal='learned', overlap=True, summary='linear'),
    dict(num_samples=3, partition='complement', proposal_scale=0.5, bias=False),
]
COUNTED = [
    dict(count_cells='all'),
    dict(count_cells='outside'),
    dict(count_cells='outside', overlap=True),
    dict(count_cells='all', partition='complement'),
    dict(count_cells='outside', partition='complement', overlap=True),
    dict(count_cells='outside', num_samples=3, proposal='learned', summary='identity', bias=False, noise_std=0.5),
]


def name_of(options):
    return '-'.join(f'{value}' if isinstance(value, str) else f'{key}={value}' for key, value in options.items())


@pytest.mark.parametrize('variant', VARIANTS, ids=name_of)
@pytest.mark.parametrize('feat_size', GRIDS, ids=lambda size: f'{size[0]}x{size[1]}')
def test_matches_the_loop(feat_size, variant):
    check(*make_case(feat_size, **variant))


@pytest.mark.parametrize('variant', VARIANTS[1:4] + VARIANTS[-2:], ids=name_of)
@pytest.mark.parametrize('window_size, partition_grid', [(2, 2), (3, 7), (5, 1), (9, 2), (1, 2)])
def test_windows_and_cells_of_other_sizes(window_size, partition_grid, variant):
    check(*make_case((5, 7), window_size, partition_grid, B=1, **variant))


@pytest.mark.parametrize(
    'variant', [dict(num_samples=4), dict(proposal='learned', num_samples=2), dict(partition='complement')], ids=name_of
)
@pytest.mark.parametrize('partition_grid', [1, 3])
def test_no_window(partition_grid, variant):
    check(*make_case((5, 6), 0, partition_grid, **variant))


@pytest.mark.parametrize('variant', COUNTED, ids=name_of)
@pytest.mark.parametrize(
    ('feat_size', 'window_size', 'partition_grid'),
    [((8, 8), 4, 4), ((7, 10), 4, 3), ((11, 5), 2, 7), ((3, 2), 4, 2), ((1, 1), 4, 3), ((5, 6), 0, 2)],
    ids=str,
)
def test_counted_cells_match_the_loop(feat_size, window_size, partition_grid, variant):
    if window_size == 0:
        variant = {key: value for key, value in variant.items() if key != 'overlap'}
    check(*make_case(feat_size, window_size, partition_grid, **variant))


def test_cells_less_the_window_count_what_is_left_of_them():
    leaves, options = make_case((7, 10), partition='complement', overlap=True)
    one, every, outside = (run_op(leaves, options | dict(count_cells=count)) for count in ('one', 'all', 'outside'))
    assert torch.equal(every, outside) and not torch.allclose(one, every)


@pytest.mark.parametrize('bias', [True, False])
def test_overlap_without_cells(bias):
    check(*make_case((7, 10), 4, 0, overlap=True, bias=bias))


@pytest.mark.parametrize('variant', VARIANTS, ids=name_of)
def test_single_precision(variant):
    leaves, options = make_case((7, 10), **variant)
    expected = run_op(leaves, options)
    copies = {name: value.detach().float().requires_grad_() for name, value in leaves.items()}
    found = relative_errors(run_op(copies, options), copies, expected, leaves)
    assert max(found.values()) <= 5e-5, found


@pytest.mark.parametrize('dtype, bound', [(torch.bfloat16, 4e-2), (torch.float16, 6e-3)])
@pytest.mark.parametrize('variant', VARIANTS[-2:], ids=name_of)
def test_half_precision_and_autocast(variant, dtype, bound):
    leaves, options = make_case((7, 10), d=16, **variant)
    rounded = {name: value.detach().to(dtype).double() for name, value in leaves.items()}
    expected = run_op(rounded, options)
    output = run_op({name: value.to(dtype) for name, value in rounded.items()}, options)
    assert output.dtype == dtype
    assert (output.double() - expected).norm() <= bound * expected.norm()
    with torch.autocast('cpu', dtype):
        output = run_op({name: value.float() for name, value in rounded.items()}, options)
    assert output.dtype == torch.float32
    assert (output.double() - expected).norm() <= bound * expected.norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
@pytest.mark.parametrize('variant', VARIANTS, ids=name_of)
@pytest.mark.parametrize('dtype, bound', [(torch.float64, 1e-10), (torch.float32, 1e-3), (torch.bfloat16, 5e-2)])
def test_cuda(variant, dtype, bound):
    leaves, options = make_case((29, 17), 7, 7, d=32, **variant)
    rounded = {name: value.detach().to(dtype).double().requires_grad_() for name, value in leaves.items()}
    expected = run_op(rounded, options)
    copies = {name: value.detach().to('cuda', dtype).requires_grad_() for name, value in rounded.items()}
    if 'noise' in options:
        options['noise'] = options['noise'].cuda()
    output = run_op(copies, options)
    assert output.dtype == dtype
    output, expected = output.double().cpu(), expected.detach()
    assert (output - expected).norm() <= bound * expected.norm()
    grads = torch.autograd.grad(output.sum(), list(copies.values()))
    assert all(grad.isfinite().all() for grad in grads)


def test_defaults_are_eva():
    leaves, options = make_case((7, 10))
    arguments = tensors(leaves, options)
    expected = eva_loop(
        *(arguments[x] for x in 'qkv'),
        (7, 10),
        arguments['summary_q'],
        arguments['summary_k'],
        leaves['table'],
        4,
        3,
        noise=options['noise'][:, :, :, 0],
    )
    torch.testing.assert_close(run_op(leaves, options), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('overlap', [False, True])
def test_limit_cells_of_one_token_outside_of_the_window_are_softmax_attention(overlap):
    """Limit 3: σ the identity, one token a cell, the complement: whatever ω is, with any number of samples."""
    leaves, options = make_case(
        (6, 5), 2, 6, summary='identity', partition='complement', num_samples=3, bias=False, overlap=overlap
    )
    expected = torch.nn.functional.scaled_dot_product_attention(*leaves['qkv'])
    torch.testing.assert_close(run_op(leaves, options), expected, rtol=1e-12, atol=1e-12)
    options['partition'] = 'all'  # tokens of the window count twice: not softmax
    assert (run_op(leaves, options) - expected).norm() > 0.01 * expected.norm()
    options['count_cells'] = 'outside'  # tokens of the window have no cell any more: softmax
    torch.testing.assert_close(run_op(leaves, options), expected, rtol=1e-12, atol=1e-12)


def test_limit_a_window_over_the_grid_leaves_no_cell():
    leaves, options = make_case((6, 5), 6, 3, partition='complement', bias=False)
    expected = torch.nn.functional.scaled_dot_product_attention(*leaves['qkv'])
    output = run_op(leaves, options)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(output.sum(), list(leaves.values())))


def test_limit_many_samples_of_one_cell_are_random_feature_attention():
    """Appendix G.1: no window, one cell, proposal N(0, I): Performer's attention with the same draws."""
    leaves, options = make_case((5, 6), 0, 1, summary='identity', proposal='zero', num_samples=16, noise_std=1.0)
    q, k, v = leaves['qkv'] * 8**-0.25
    omega = options['noise'][:, :, 0]

    def phi(x):
        return torch.exp(x @ omega.transpose(-2, -1) - 0.5 * x.square().sum(-1, keepdim=True))

    kernel = phi(q) @ phi(k).transpose(-2, -1)
    expected = kernel @ (v * 8**0.25) / kernel.sum(-1, keepdim=True)
    torch.testing.assert_close(run_op(leaves, options), expected, rtol=1e-11, atol=1e-11)


def test_more_samples_come_closer_to_the_optimal_coefficients():
    """One cell, no window: the estimate's mean squared error against softmax falls about as 1 / S."""
    leaves, options = make_case((4, 4), 0, 1, B=64, h=4, summary='identity', noise_std=1.0, noise=False)
    with torch.no_grad():
        leaves['qkv'] *= 0.5
    expected = torch.nn.functional.scaled_dot_product_attention(*leaves['qkv'])

    def error(samples):
        noise = torch.randn(64, 4, 1, samples, 8, dtype=torch.float64)
        return (run_op(leaves, options | dict(noise=noise)) - expected).square().mean().item()

    errors = [error(samples) for samples in (1, 16, 256)]
    assert errors[1] < errors[0] / 6 and errors[2] < errors[1] / 6, errors


def test_every_logit_that_the_dtype_holds_is_finite():
    for variant in VARIANTS:
        leaves, options = make_case((7, 5), **variant)
        with torch.no_grad():
            leaves['qkv'][:2] *= 60.0
        copies = {name: value.detach().float().requires_grad_() for name, value in leaves.items()}
        output = run_op(copies, options)
        assert output.isfinite().all(), variant
        assert all(grad.isfinite().all() for grad in torch.autograd.grad(output.sum(), list(copies.values()))), variant


def saved_numbers(side, num_samples, partition_grid, d=32, **variant):
    """Numbers that autograd keeps per token."""
    leaves, options = make_case(
        (side, side), 7, partition_grid, B=1, h=1, d=d, num_samples=num_samples, bias=False, **variant
    )
    return saved_bytes(lambda: run_op(leaves, options)) / 8 / side**2


@pytest.mark.parametrize('num_samples', [1, 8])
def test_memory_is_linear_in_the_tokens(num_samples):
    assert saved_numbers(56, num_samples, 4) < 1.2 * saved_numbers(28, num_samples, 4)


def test_memory_of_samples_is_weights_of_samples_not_a_beta_for_each_query():
    """For C_p = 16 cells: the difference between 9 and 5 samples is a few times 16 · 4 numbers a token, and does not
    grow with the channels as 16 · d does."""
    narrow, wide = ((saved_numbers(28, 9, 4, d) - saved_numbers(28, 5, 4, d)) / (16 * 4) for d in (32, 128))
    assert 1 <= narrow < 8 and wide < 1.5 * narrow, (narrow, wide)


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(partition='rest'), "partition must be 'all' or 'complement', got 'rest'"),
        (dict(proposal='k'), "proposal must be .* got 'k'"),
        (dict(proposal='learned'), r"proposal 'learned' needs proposal_mean \[2, 4, 4, 8\]; got None"),
        (
            dict(proposal='learned', proposal_mean=torch.zeros(2, 3, 4, 8)),
            r'proposal_mean must be .* got \[2, 3, 4, 8\]',
        ),
        (dict(summary_q=None), "proposal 'qk' needs summary_q"),
        (dict(summary_k=None), 'partition_grid 4 needs summary_k'),
        (dict(summary_k=[torch.zeros(8)]), r'summary_k must hold .* got \[\[8\]\]'),
        (dict(noise=torch.zeros(1, 2, 3, 1, 8)), r'noise must be .*\(1, 2, 16, any, 8\)'),
        (dict(noise=torch.zeros(1, 2, 16, 2, 8), noise_std=0.0), '2 samples need a noise_std above 0, got 0'),
        (dict(overlap=True, rel_pos_bias=torch.zeros(2, 16, 16)), r'rel_pos_bias must be the table .*\(121, 2\), got'),
        (dict(overlap=True, window_size=0), 'overlap needs windows; got window_size 0'),
        (dict(dropout_p=1.0), 'dropout_p must be'),
        (dict(count_cells='none'), "count_cells must be 'one', 'all' or 'outside', got 'none'"),
        (dict(noise_std=float('nan')), 'noise_std must be a finite number, got nan'),
        (dict(window_size=3.0), 'window_size must be a whole number, got 3.0'),
        (dict(scale=-1.0), 'scale must be a finite number above 0, got -1.0'),
    ],
)
def test_bad_arguments_name_the_value(change, message):
    tokens = torch.randn(3, 1, 2, 16, 8)
    summary = [torch.eye(8), torch.zeros(8)]
    args = dict(
        q=tokens[0],
        k=tokens[1],
        v=tokens[2],
        feat_size=(4, 4),
        summary_q=summary,
        summary_k=summary,
        window_size=4,
        partition_grid=4,
    )
    with pytest.raises(ValueError, match=message):
        eva_attention_variant(**(args | change))
