import itertools

import numpy as np
import pytest
import torch
from helpers import grid_cells, grid_windows
from ops.eva.references import eva_loop
from timm.layers import RelPosBias

from evavit.ops import (
    eva_attention,
    eva_attention_1d,
    eva_attention_1d_step,
    eva_attention_mass,
    eva_attention_packed,
    eva_attention_variant,
    eva_num_cells,
)
from evavit.ops.eva import eva_attention_projected
from evavit.ops.eva.case import EvaOptions, as_summary
from evavit.ops.eva.counts import log_counts

GRIDS = [(14, 14), (28, 28), (13, 13), (24, 24), (7, 50), (50, 7), (1, 1), (5, 3)]
WINDOWS = [1, 4, 7, 'larger']  # than the grid
PARTITIONS = [0, 1, 3, 7]


def make_inputs(B, h, d, feat_size, window_size, partition_grid, *, bias=True, noise=True, P=0, dtype=torch.float64):
    """Leaf tensors by name: one qkv tensor whose views are q, k, v; both summaries; the bias table; the noise."""

    def normal(*shape):
        return torch.randn(*shape, dtype=dtype, requires_grad=True)

    leaves = {'qkv': normal(B, P + feat_size[0] * feat_size[1], 3, h, d)}
    if partition_grid:
        for name in ('summary_q', 'summary_k'):
            leaves |= {
                f'{name}.weight': normal(d, d),
                f'{name}.bias': normal(d),
                f'{name}.norm_weight': normal(d),
                f'{name}.norm_bias': normal(d),
            }
    if bias and window_size:
        leaves['table'] = normal((2 * window_size - 1) ** 2, h)
    cells = eva_num_cells(feat_size, partition_grid)
    return leaves, torch.randn(B, h, cells, d, dtype=dtype) if noise and cells else None


def arguments(leaves):
    """q, k, v and the summaries, from the leaves."""
    q, k, v = leaves['qkv'].permute(2, 0, 3, 1, 4).unbind(0)
    summaries = [
        tuple(value for key, value in leaves.items() if key.startswith(name)) or None
        for name in ('summary_q', 'summary_k')
    ]
    return q, k, v, summaries


def run_loop(leaves, noise, feat_size, window_size, partition_grid, **kwargs):
    q, k, v, summaries = arguments(leaves)
    return eva_loop(
        q, k, v, feat_size, *summaries, leaves.get('table'), window_size, partition_grid, noise=noise, **kwargs
    )


def bias_from_table(table, window_size, num_heads):
    index = RelPosBias((window_size, window_size), num_heads).relative_position_index
    return table[index].view(window_size**2, window_size**2, num_heads).permute(2, 0, 1)


def run_op(leaves, noise, feat_size, window_size, partition_grid, **kwargs):
    q, k, v, summaries = arguments(leaves)
    bias = leaves.get('table')
    return eva_attention(q, k, v, feat_size, *summaries, bias, window_size, partition_grid, noise=noise, **kwargs)


def cast(leaves, dtype):
    return {name: value.detach().to(dtype).requires_grad_() for name, value in leaves.items()}


def relative_error(value, reference, floor=0.0):
    """‖value - reference‖ / ‖reference‖ in float64, the denominator at least floor."""
    reference = reference.double()
    return ((value.double() - reference).norm() / reference.norm().clamp(min=max(floor, 1e-30))).item()


def errors(output, leaves, expected, expected_leaves):
    """Relative errors of the output and of the gradient of every leaf, by name.

    A gradient that is zero in exact arithmetic (one token and its cell have one value) is measured against 1 % of the
    gradient that comes in.
    """
    grad = torch.randn(expected.shape, dtype=torch.float64)
    grads = torch.autograd.grad(output, list(leaves.values()), grad.to(output.dtype))
    expected_grads = torch.autograd.grad(expected, list(expected_leaves.values()), grad, retain_graph=True)
    found = {'output': relative_error(output.detach(), expected.detach())}
    for name, value, reference in zip(leaves, grads, expected_grads, strict=True):
        found[name] = relative_error(value, reference, floor=0.01 * grad.norm())
    return found


@pytest.mark.parametrize('partition_grid', PARTITIONS)
@pytest.mark.parametrize('window_size', WINDOWS)
@pytest.mark.parametrize('feat_size', GRIDS, ids=lambda size: f'{size[0]}x{size[1]}')
def test_matches_the_loop(feat_size, window_size, partition_grid):
    case = list(itertools.product(GRIDS, WINDOWS, PARTITIONS)).index((feat_size, window_size, partition_grid))
    num_heads, batch = 1 + case % 4, 1 + (feat_size[0] * feat_size[1] < 100)
    bias = case % 5 > 0
    if window_size == 'larger':
        window_size = max(feat_size) + 2
        bias = bias and window_size <= 16  # the bias of a whole window has window_size⁴ entries a head
    leaves, noise = make_inputs(batch, num_heads, 8, feat_size, window_size, partition_grid, bias=bias)
    expected = run_loop(leaves, noise, feat_size, window_size, partition_grid, proposal_scale=0.7)
    for dtype, bound in ((torch.float64, 1e-10), (torch.float32, 2e-5)):
        copies = cast(leaves, dtype)
        output = run_op(
            copies,
            None if noise is None else noise.to(dtype),
            feat_size,
            window_size,
            partition_grid,
            proposal_scale=0.7,
        )
        found = errors(output, copies, expected, leaves)
        assert max(found.values()) <= bound, (dtype, found)


@pytest.mark.parametrize('num_heads', [1, 2, 3, 4])
@pytest.mark.parametrize('bias', [True, False])
def test_heads_and_bias(num_heads, bias):
    leaves, noise = make_inputs(2, num_heads, 16, (9, 11), 4, 3, bias=bias)
    expected = run_loop(leaves, noise, (9, 11), 4, 3)
    output = run_op(leaves, noise, (9, 11), 4, 3)
    assert max(errors(output, leaves, expected, leaves).values()) <= 1e-10


@pytest.mark.parametrize('partition_grid', [1, 2, 7])
@pytest.mark.parametrize('feat_size', [(6, 6), (5, 3), (13, 8)])
def test_no_window_matches_the_loop(feat_size, partition_grid):
    leaves, noise = make_inputs(2, 2, 8, feat_size, 0, partition_grid)
    expected = run_loop(leaves, noise, feat_size, 0, partition_grid)
    output = run_op(leaves, noise, feat_size, 0, partition_grid)
    assert max(errors(output, leaves, expected, leaves).values()) <= 1e-10


@pytest.mark.parametrize('count_cells', ['all', 'outside'])
@pytest.mark.parametrize(
    ('feat_size', 'window_size', 'partition_grid'),
    [
        ((14, 14), 7, 7),  # cells that windows cut
        ((12, 12), 4, 6),  # cells that lie in a window as a whole, and drop out
        ((13, 9), 4, 3),
        ((11, 20), 5, 7),
        ((10, 9), 3, 7),
        ((5, 3), 7, 2),  # smaller than a window
        ((6, 5), 0, 2),
        ((7, 5), 3, 0),
        ((1, 1), 1, 1),
    ],
    ids=str,
)
@pytest.mark.parametrize(('bias', 'noise'), [(True, True), (False, True), (True, False)])
def test_counted_cells_match_the_loop(feat_size, window_size, partition_grid, bias, noise, count_cells):
    sizes = feat_size, window_size, partition_grid
    leaves, epsilon = make_inputs(2, 2, 8, *sizes, bias=bias, noise=noise)
    expected = run_loop(leaves, epsilon, *sizes, count_cells=count_cells)
    for dtype, bound in ((torch.float64, 1e-10), (torch.float32, 2e-5)):
        copies = cast(leaves, dtype)
        output = run_op(copies, epsilon if epsilon is None else epsilon.to(dtype), *sizes, count_cells=count_cells)
        found = errors(output, copies, expected, leaves)
        assert max(found.values()) <= bound, (dtype, found)


@pytest.mark.parametrize('count_cells', ['all', 'outside'])
@pytest.mark.parametrize(('dtype', 'bound'), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_counted_cells_in_half_precision(dtype, bound, count_cells):
    sizes = (13, 9), 4, 7
    leaves, noise = make_inputs(2, 2, 32, *sizes, dtype=torch.float32)
    rounded = {name: value.detach().to(dtype).double().requires_grad_() for name, value in leaves.items()}
    expected = run_loop(rounded, noise.double(), *sizes, count_cells=count_cells)
    copies = cast(leaves, dtype)
    output = run_op(copies, noise, *sizes, count_cells=count_cells)
    assert output.dtype == dtype
    found = errors(output, copies, expected, rounded)
    assert found.pop('output') <= bound and max(found.values()) <= 10 * bound, found


@pytest.mark.parametrize('P', [1, 2, 5, 9])
@pytest.mark.parametrize(
    ('feat_size', 'window_size', 'partition_grid', 'options'),
    [
        ((14, 14), 7, 7, {}),
        ((13, 9), 4, 3, dict(count_cells='outside')),
        ((5, 3), 7, 2, dict(count_cells='outside')),  # smaller than a window
        ((11, 20), 5, 7, dict(count_cells='all')),
        ((6, 5), 0, 2, dict(count_cells='all')),
        ((7, 5), 3, 0, {}),
        ((1, 1), 1, 1, {}),
    ],
    ids=str,
)
def test_prefix_tokens_match_the_loop(feat_size, window_size, partition_grid, options, P):
    sizes = feat_size, window_size, partition_grid
    leaves, noise = make_inputs(2, 2, 8, *sizes, bias=P % 2 > 0, P=P)
    expected = run_loop(leaves, noise, *sizes, num_prefix_tokens=P, **options)
    for dtype, bound in ((torch.float64, 1e-10), (torch.float32, 2e-5)):
        copies = cast(leaves, dtype)
        cast_noise = noise if noise is None else noise.to(dtype)
        output = run_op(copies, cast_noise, *sizes, num_prefix_tokens=P, **options)
        found = errors(output, copies, expected, leaves)
        assert max(found.values()) <= bound, (dtype, found)


@pytest.mark.parametrize(('dtype', 'bound'), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_prefix_tokens_in_half_precision(dtype, bound):
    sizes = (13, 9), 4, 7
    leaves, noise = make_inputs(2, 2, 32, *sizes, P=5, dtype=torch.float32)
    rounded = {name: value.detach().to(dtype).double().requires_grad_() for name, value in leaves.items()}
    expected = run_loop(rounded, noise.double(), *sizes, num_prefix_tokens=5)
    copies = cast(leaves, dtype)
    output = run_op(copies, noise, *sizes, num_prefix_tokens=5)
    assert output.dtype == dtype
    found = errors(output, copies, expected, rounded)
    assert found.pop('output') <= bound and max(found.values()) <= 10 * bound, found


@pytest.mark.parametrize('partition_grid', [0, 3])
def test_limit_a_window_over_the_grid_is_softmax_with_prefix_tokens(partition_grid):
    leaves, noise = make_inputs(2, 2, 8, (5, 8), 9, partition_grid, bias=False, P=3)
    q, k, v, _ = arguments(leaves)
    output = run_op(leaves, noise, (5, 8), 9, partition_grid, count_cells='outside', num_prefix_tokens=3)
    assert relative_error(output, torch.nn.functional.scaled_dot_product_attention(q, k, v)) < 1e-14


@pytest.mark.parametrize(
    ('prefix', 'message'),
    [
        (2, r'feat_size (5, 4) and 2 prefix tokens do not make the 21 tokens of q'),
        (0, r'feat_size (5, 4) does not hold the 21 tokens of q'),
        (-1, 'num_prefix_tokens must be 0 or more, got -1'),
        (1.0, 'num_prefix_tokens must be a whole number, got 1.0'),
    ],
)
def test_prefix_tokens_that_do_not_fit(prefix, message):
    leaves, noise = make_inputs(1, 1, 8, (5, 4), 2, 2, P=1)
    with pytest.raises(ValueError) as error:
        run_op(leaves, noise, (5, 4), 2, 2, num_prefix_tokens=prefix)
    assert str(error.value) == message


@pytest.mark.parametrize('partition_grid', [1, 3, 7])
@pytest.mark.parametrize('window_size', [9, 12])
@pytest.mark.parametrize('feat_size', [(9, 9), (5, 8), (1, 1)])
def test_limit_a_window_over_the_grid_whose_cells_count_outside_is_softmax(feat_size, window_size, partition_grid):
    """Whatever the cells are: each drops out, and its summary, its noise and its β with it."""
    leaves, noise = make_inputs(2, 2, 8, feat_size, window_size, partition_grid, bias=False)
    noise.requires_grad_()
    q, k, v, _ = arguments(leaves)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    output = run_op(leaves, noise, feat_size, window_size, partition_grid, count_cells='outside')
    assert relative_error(output, expected) < 1e-14
    grad = torch.randn_like(output)
    qkv, *rest = torch.autograd.grad(output, [*leaves.values(), noise], grad)
    assert relative_error(qkv, torch.autograd.grad(expected, leaves['qkv'], grad)[0], 1e-9 * grad.norm()) < 1e-12
    assert not any(x.count_nonzero() for x in rest)
    for other in ('one', 'all'):
        counted = run_op(leaves, noise, feat_size, window_size, partition_grid, count_cells=other)
        assert feat_size == (1, 1) or relative_error(counted, expected) > 1e-3


def test_a_cell_that_drops_out_gets_no_gradient_from_the_window():
    leaves, noise = make_inputs(1, 2, 8, (8, 8), 4, 4)  # a window holds four cells
    noise.requires_grad_()
    output = run_op(leaves, noise, (8, 8), 4, 4, count_cells='outside')
    window = grid_windows((8, 8), 4)[0]
    (grad,) = torch.autograd.grad(output[:, :, window].square().sum(), noise)
    inside = [set(cell) <= set(window) for cell in grid_cells((8, 8), 4)]
    assert sum(inside) == 4
    assert (grad != 0).all(-1)[0, 0].tolist() == [not x for x in inside]


def test_where_counts_agree():
    def run(*sizes):
        leaves, noise = make_inputs(2, 2, 8, *sizes)
        return [run_op(leaves, noise, *sizes, count_cells=count) for count in ('one', 'all', 'outside')]

    one, every, outside = run((7, 6), 0, 3)  # E is empty
    assert torch.equal(every, outside) and not torch.allclose(one, every)
    one, every, outside = run((5, 4), 2, 0)  # no cells
    assert torch.equal(one, every) and torch.equal(one, outside)
    one, every, outside = run((5, 4), 2, 7)  # cells of one token
    assert torch.equal(one, every) and not torch.allclose(one, outside)


@pytest.mark.parametrize(('feat_size', 'window', 'halo', 'cell'), [((13, 9), 4, 0, (2, 3)), ((10, 11), 3, 2, (4, 2))])
def test_counts_are_those_of_the_tokens(feat_size, window, halo, cell):
    device = torch.device('cpu')
    sizes = list(feat_size), cell, (window, window), (halo, halo)
    every = log_counts(*sizes, False, torch.float64, device).exp()
    outside = log_counts(*sizes, True, torch.float64, device).exp()
    H, W = feat_size
    cells = [
        {(y, x) for y in range(top, min(top + cell[0], H)) for x in range(left, min(left + cell[1], W))}
        for top in range(0, H, cell[0])
        for left in range(0, W, cell[1])
    ]
    windows = [
        {(y, x) for y in range(top - halo, top + window + halo) for x in range(left - halo, left + window + halo)}
        for top in range(0, H, window)
        for left in range(0, W, window)
    ]
    torch.testing.assert_close(every, torch.tensor([[len(c) for c in cells]]).double())
    torch.testing.assert_close(outside, torch.tensor([[len(c - E) for c in cells] for E in windows]).double())


@pytest.mark.parametrize('dtype, bound', [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize('feat_size', [(14, 14), (13, 9)])
def test_half_precision(feat_size, dtype, bound):
    leaves, noise = make_inputs(2, 2, 32, feat_size, 7, 7, dtype=torch.float32)
    rounded = {name: value.detach().to(dtype).double().requires_grad_() for name, value in leaves.items()}
    expected = run_loop(rounded, noise.double(), feat_size, 7, 7)
    copies = cast(leaves, dtype)
    output = run_op(copies, noise, feat_size, 7, 7)
    assert output.dtype == dtype
    assert max(errors(output, copies, expected, rounded).values()) <= bound


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    leaves, noise = make_inputs(2, 2, 32, (13, 9), 7, 7, dtype=torch.float32)
    expected = run_op(leaves, noise, (13, 9), 7, 7)
    with torch.autocast('cpu', dtype):
        output = run_op(leaves, noise, (13, 9), 7, 7)
    assert output.dtype == torch.float32  # the input's
    assert relative_error(output.detach(), expected.detach()) < (2e-2 if dtype == torch.bfloat16 else 3e-3)
    output.sum().backward()
    assert all(value.grad.dtype == torch.float32 and value.grad.isfinite().all() for value in leaves.values())


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('feat_size', [(14, 14), (13, 9)])
def test_huge_logits_stay_finite(feat_size, dtype):
    leaves, noise = make_inputs(1, 2, 16, feat_size, 7, 7, dtype=torch.float64)
    with torch.no_grad():
        q, k, _, _ = arguments(leaves)
        logits = 16**-0.5 * (q @ k.transpose(-2, -1))
        leaves['qkv'][:, :, :2] *= (1e4 / logits.abs().max()).sqrt()  # the largest logit is ±1e4
    copies = cast(leaves, dtype)
    output = run_op(copies, noise.to(dtype), feat_size, 7, 7)
    assert output.isfinite().all()
    grads = torch.autograd.grad(output.sum(), list(copies.values()))
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize('autocast', [False, True])
@pytest.mark.parametrize('window_size, partition_grid', [(7, 7), (3, 2), (7, 0), (0, 7)])
def test_logits_beyond_float16(window_size, partition_grid, autocast):
    leaves, noise = make_inputs(1, 1, 64, (7, 9), window_size, partition_grid, dtype=torch.float32)
    with torch.no_grad():
        leaves['qkv'][:, :, :2] = 200 * leaves['qkv'][:, :, :2].sign()  # logits up to 64 · 200² / 8 = 320,000
    copies = leaves if autocast else cast(leaves, torch.float16)
    with torch.autocast('cpu', torch.float16, enabled=autocast):
        output = run_op(copies, noise, (7, 9), window_size, partition_grid)
    assert output.isfinite().all()
    grads = torch.autograd.grad(output.float().sum(), list(copies.values()))
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize('bias', [True, False])
def test_limit_one_window_is_softmax_attention(bias):
    leaves, _ = make_inputs(2, 2, 8, (6, 9), 9, 0, bias=bias)
    q, k, v, _ = arguments(leaves)
    mask = None
    if bias:
        whole = bias_from_table(leaves['table'], 9, 2).unflatten(2, (9, 9)).unflatten(1, (9, 9))
        mask = whole[:, :6, :9, :6, :9].flatten(3, 4).flatten(1, 2)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert relative_error(run_op(leaves, None, (6, 9), 9, 0), expected) < 1e-14


def test_limit_one_cell_without_window_is_random_feature_attention():
    leaves, noise = make_inputs(2, 2, 8, (6, 5), 0, 1)
    q, k, v, (summary_q, summary_k) = arguments(leaves)
    s = 8**-0.5

    def summarise(x, summary):
        weight, bias, norm_weight, norm_bias = summary
        return torch.nn.functional.layer_norm(x.mean(2) @ weight.T + bias, (8,), norm_weight, norm_bias)

    omega = s**0.5 * (summarise(q, summary_q) + summarise(k, summary_k)) + noise[:, :, 0]

    def xi(x):  # the positive random feature of every token, at this one ω
        x = s**0.5 * x
        return torch.exp((x @ omega.unsqueeze(-1)).squeeze(-1) - 0.5 * x.square().sum(-1))

    kernel = xi(q).unsqueeze(-1) * xi(k).unsqueeze(-2)
    expected = kernel @ v / kernel.sum(-1, keepdim=True)
    assert relative_error(run_op(leaves, noise, (6, 5), 0, 1), expected) < 1e-13


def test_limit_order_inside_a_cell_and_batch_independence():
    feat_size, window_size, partition_grid = (12, 12), 4, 3  # cells of 4 × 4, aligned with the windows
    leaves, noise = make_inputs(2, 2, 8, feat_size, window_size, partition_grid)
    output = run_op(leaves, noise, feat_size, window_size, partition_grid)
    cell = grid_cells(feat_size, partition_grid)[4]
    permuted = {name: value.detach().clone() for name, value in leaves.items()}
    permuted['qkv'][0, cell] = permuted['qkv'][0, cell[::-1]]
    changed = run_op(permuted, noise, feat_size, window_size, partition_grid)
    outside = [n for window in grid_windows(feat_size, window_size) for n in window if not set(window) & set(cell)]
    assert relative_error(changed[0][:, outside], output[0][:, outside]) < 1e-14
    assert relative_error(changed[0][:, cell], output[0][:, cell]) > 1e-3  # where E sees the change, it is there
    assert torch.equal(changed[1], output[1])


def test_dropout_drops_tokens_and_cells_alike():
    """With one-hot values the output is the attention itself: the share of zeros is p, the rest is scaled up."""
    feat_size = (4, 4)
    q, k = torch.randn(2, 256, 1, 16, 32, dtype=torch.float64)
    v = torch.zeros_like(q)
    v[..., :16] = torch.eye(16, dtype=torch.float64)
    identity = (torch.eye(32).double(), torch.zeros(32).double(), torch.ones(32).double(), torch.zeros(32).double())
    for window_size, partition_grid in ((4, 0), (0, 4)):  # 16 tokens of one window; 16 cells of one token
        args = (q, k, v, feat_size, identity, identity, None, window_size, partition_grid)
        attn = eva_attention(*args)[..., :16]
        dropped = eva_attention(*args, dropout_p=0.25)[..., :16]
        kept = dropped != 0
        assert abs((~kept).double().mean().item() - 0.25) < 0.01
        torch.testing.assert_close(dropped[kept], attn[kept] / 0.75)


def test_strides_of_one_projection_need_no_copy_to_be_right():
    leaves, noise = make_inputs(2, 3, 8, (13, 9), 4, 3)
    q, k, v, (summary_q, summary_k) = arguments(leaves)
    assert not q.is_contiguous()
    strided = eva_attention(q, k, v, (13, 9), summary_q, summary_k, None, 4, 3, noise=noise)
    packed = eva_attention(
        q.contiguous(), k.contiguous(), v.contiguous(), (13, 9), summary_q, summary_k, None, 4, 3, noise=noise
    )
    assert torch.equal(strided, packed)
    assert strided.transpose(1, 2).is_contiguous()  # merging the heads is a view


def test_memory_for_the_backward_pass_is_linear():
    """Bytes that autograd keeps per token, from 32 × 32 to 128 × 128 tokens."""

    def saved_bytes_per_token(side):
        leaves, noise = make_inputs(1, 1, 16, (side, side), 7, 7, dtype=torch.float32)
        storages = {}

        def pack(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = run_op(leaves, noise, (side, side), 7, 7)
        del output
        return sum(storages.values()) / side**2

    small, large = saved_bytes_per_token(32), saved_bytes_per_token(128)
    assert large < 1.2 * small


def test_packed_is_the_same():
    leaves, noise = make_inputs(2, 3, 8, (13, 9), 4, 3)
    q, k, v, summaries = arguments(leaves)
    args = (*summaries, leaves['table'], 4, 3)
    apart = eva_attention(q, k, v, (13, 9), *args, noise=noise)
    packed = eva_attention_packed(leaves['qkv'].permute(2, 0, 3, 1, 4), (13, 9), *args, noise=noise)
    torch.testing.assert_close(packed, apart, rtol=0, atol=0)
    grads = [torch.autograd.grad(out.square().sum(), list(leaves.values())) for out in (packed, apart)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def _apart(qkv, summaries, **kwargs):
    return eva_attention(*qkv, (4, 4), *summaries, window_size=2, partition_grid=0, **kwargs)


def _packed(qkv, summaries, **kwargs):
    return eva_attention_packed(qkv, (4, 4), *summaries, window_size=2, partition_grid=0, **kwargs)


def _projected(qkv, summaries, num_prefix_tokens=0):
    summaries = [as_summary(summary) for summary in summaries]
    options = EvaOptions([4, 4], *summaries, None, 2, 0, 8**-0.5, 1.0, None, 0.0, 1e-5, 'one', num_prefix_tokens)
    return eva_attention_projected(qkv.permute(1, 3, 0, 2, 4).flatten(2), 2, options)


def _variant(qkv, summaries):
    return eva_attention_variant(*qkv, (4, 4), *summaries, window_size=2, partition_grid=0)


def _mass(qkv, summaries, **kwargs):
    return torch.stack(eva_attention_mass(*qkv[:2], (4, 4), summaries[1], window_size=2, partition_grid=0, **kwargs))


def _sequence(qkv, summaries):
    return eva_attention_1d(*qkv, *summaries, window_size=4, cell_size=0)


def _step(qkv, summaries):
    return eva_attention_1d_step(*qkv[:, :, :, :1], None, *summaries, window_size=4, cell_size=0)[0]


@pytest.mark.parametrize(
    'of, options',
    [
        *((of, dict(fused=fused)) for of in (_apart, _packed) for fused in (False, True)),
        *((of, dict(fused=True, num_prefix_tokens=2)) for of in (_apart, _packed)),
        *((of, dict(num_prefix_tokens=P)) for of in (_projected, _mass) for P in (0, 2)),
        *((of, {}) for of in (_variant, _sequence, _step)),
    ],
)
@pytest.mark.parametrize('grad', [False, True])
def test_without_cells_summaries_are_not_read(of, options, grad):
    qkv = torch.randn(3, 2, 2, 16 + options.get('num_prefix_tokens', 0), 8, requires_grad=grad)
    summary = torch.randn(8, 8), *torch.randn(3, 8)
    torch.testing.assert_close(of(qkv, [summary] * 2, **options), of(qkv, [None] * 2, **options), rtol=0, atol=0)


@pytest.mark.parametrize(
    'qkv, message',
    [
        (torch.zeros(1, 2, 16, 8), r'qkv must be \(3, batch, heads, tokens, head_dim\), got shape \[1, 2, 16, 8\]'),
        (torch.zeros(2, 1, 2, 16, 8), r'qkv must be .* got shape \[2, 1, 2, 16, 8\]'),
        (torch.zeros(3, 1, 2, 15, 8), r'feat_size \(4, 4\) does not hold the 15 tokens of qkv'),
        (torch.zeros(3, 1, 2, 16, 8, dtype=torch.long), 'qkv must be floating point'),
    ],
)
@pytest.mark.parametrize('fused', [True, False])
def test_bad_packed_tokens(qkv, message, fused):
    with pytest.raises(ValueError, match=message):
        eva_attention_packed(qkv, [4, 4], partition_grid=0, fused=fused)


@pytest.mark.parametrize('of', [eva_attention_packed, eva_attention_1d, eva_attention_variant])
def test_no_tensor_at_all_is_a_line(of):
    rest = ([4, 4],) if of is eva_attention_packed else (None, None, *([[4, 4]] if of is eva_attention_variant else []))
    with pytest.raises(TypeError, match=r'^(q|qkv) must be a tensor, got NoneType$'):
        of(None, *rest)


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(window_size=0, partition_grid=0), 'nothing to attend to'),
        (dict(window_size=-1), 'window_size must be 0'),
        (dict(partition_grid=-2), 'partition_grid must be 0'),
        (dict(feat_size=(3, 5)), r'feat_size \(3, 5\) does not hold the 16 tokens'),
        (dict(summary_q=None), 'needs summary_q and summary_k'),
        (
            dict(rel_pos_bias=torch.zeros(2, 16, 16)),
            r'rel_pos_bias must be the table .* = \(49, 2\), got \[2, 16, 16\]; '
            r'pass relative_position_bias_table, not get_bias\(\)$',
        ),
        (dict(rel_pos_bias=torch.zeros(25, 2)), r'rel_pos_bias must be the table .* = \(49, 2\), got \[25, 2\]$'),
        (dict(summary_k=(torch.eye(8), torch.zeros(8))), 'four tensors; got 2'),
        (dict(summary_k=(torch.eye(8), *torch.zeros(3, 7))), r'summary_k must hold a \(8, 8\) weight'),
        (dict(noise=torch.zeros(1, 2, 3, 8)), r'noise must be .*\(1, 2, 16, 8\)'),
        (dict(dropout_p=1.0), 'dropout_p must be'),
        (dict(k=torch.zeros(1, 2, 15, 8)), 'must have one shape'),
        (dict(v=torch.zeros(1, 2, 16, 8).double()), 'must have one dtype'),
        (dict(q=None), '^q must be a tensor, got NoneType$'),
        (dict(k=np.zeros((1, 2, 16, 8))), '^k must be a tensor, got ndarray$'),
        (dict.fromkeys('qkv', torch.zeros(1, 2, 16, 0)), 'head_dim must be at least 1, got 0'),
        (dict(q=torch.zeros(2, 16, 8)), r'q must be \(batch, heads, tokens, head_dim\)'),
        (dict(window_size=3.0), 'window_size must be a whole number, got 3.0'),
        (dict(window_size=True), 'window_size must be a whole number, got True'),
        (dict(window_size='7'), "window_size must be a whole number, got '7'"),
        (dict(partition_grid=2.5), 'partition_grid must be a whole number, got 2.5'),
        (dict(partition_grid=torch.tensor(4)), r'partition_grid must be a whole number, got tensor\(4\)'),
        (dict(feat_size=(4.0, 4)), 'feat_size must be a whole number, got 4.0'),
        (dict(feat_size=16), r'feat_size must be \(height, width\) in tokens, got 16'),
        (dict(scale=-0.5), 'scale must be a finite number above 0, got -0.5'),
        (dict(scale=0), 'scale must be a finite number above 0, got 0'),
        (dict(scale=float('inf')), 'scale must be a finite number above 0, got inf'),
        (dict(scale='1'), "scale must be a finite number above 0, got '1'"),
        (dict(proposal_scale=float('nan')), 'proposal_scale must be a finite number, got nan'),
        (dict(proposal_scale=True), 'proposal_scale must be a finite number, got True'),
        (dict(dropout_p=float('nan')), 'dropout_p must be at least 0 and below 1, got nan'),
        (dict(dropout_p=None), 'dropout_p must be at least 0 and below 1, got None'),
        (dict(norm_eps=0.0), 'norm_eps must be a finite number above 0, got 0.0'),
        (dict(norm_eps=-1e-5), 'norm_eps must be a finite number above 0, got -1e-05'),
        (dict(norm_eps=float('nan')), 'norm_eps must be a finite number above 0, got nan'),
        (dict(count_cells='some'), "count_cells must be 'one', 'all' or 'outside', got 'some'"),
        (dict(count_cells=1), "count_cells must be 'one', 'all' or 'outside', got '1'"),
    ],
)
def test_bad_arguments_name_the_value(change, message):
    tokens = torch.randn(3, 1, 2, 16, 8)
    summary = (torch.eye(8), torch.zeros(8), torch.ones(8), torch.zeros(8))
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
    for fused in (False, True):
        with pytest.raises((TypeError, ValueError), match=message) as caught:
            eva_attention(**(args | change), fused=fused)
        assert '\n' not in str(caught.value)


def test_numbers_of_other_types_are_taken():
    """Whole numbers of NumPy, and whole numbers where any number will do."""
    leaves, noise = make_inputs(1, 2, 8, (4, 4), 2, 2)
    expected = run_op(leaves, noise, (4, 4), 2, 2, scale=1.0, proposal_scale=1.0)
    sizes = (np.int64(4), np.int32(4)), np.int64(2), np.int64(2)
    assert torch.equal(run_op(leaves, noise, *sizes, scale=1, proposal_scale=np.float32(1)), expected)


@pytest.mark.parametrize('num_prefix_tokens', [0, 2])
@pytest.mark.parametrize('count_cells', ['one', 'outside'])
def test_several_draws_of_one_input(num_prefix_tokens, count_cells):
    """vmap over the noise alone, as an ensemble of one input has it."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 16 + num_prefix_tokens, 8, dtype=torch.float64)
    summary = [torch.eye(8, dtype=torch.float64), *torch.randn(3, 8, dtype=torch.float64)]
    noise = torch.randn(3, 2, 2, 4, 8, dtype=torch.float64)
    options = dict(window_size=2, partition_grid=2, count_cells=count_cells, num_prefix_tokens=num_prefix_tokens)

    def draw(noise):
        return eva_attention(q, k, v, (4, 4), summary, summary, noise=noise, **options)

    expected = torch.stack([draw(one) for one in noise])
    torch.testing.assert_close(torch.func.vmap(draw)(noise), expected)


def test_numbers_of_cells_that_cannot_be():
    for number, words in ((-1, r'must be 0 \(no cells\) or more, got -1'), (2.5, 'must be a whole number, got 2.5')):
        with pytest.raises(ValueError, match=f'partition_grid {words}'):
            eva_num_cells((4, 4), number)
