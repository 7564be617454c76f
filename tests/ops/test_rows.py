"""The rows of the effective attention: those of a loop over EVA's definition, and the output that they stand for."""

import pytest
import torch
from ops.eva.references import eva_loop

from evavit.ops import eva_attention
from evavit.ops.rows import attention_rows

D, HEADS = 8, 2
GRIDS = [(14, 14), (13, 13), (7, 20), (5, 3), (1, 1)]


def case(feat_size, prefix=0, dtype=torch.float64, window_size=3, partition_grid=4, **options):
    """q, k, v `(2, HEADS, P + N, D)`, and the arguments of EVA beside them."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, HEADS, prefix + feat_size[0] * feat_size[1], D, dtype=dtype).mul(1.5)
    summaries = [[torch.randn(*shape, dtype=dtype) for shape in ((D, D), (D,), (D,), (D,))] for _ in range(2)]
    table = torch.randn((2 * window_size - 1) ** 2, HEADS, dtype=dtype) if window_size else None
    sizes = dict(window_size=window_size, partition_grid=partition_grid, num_prefix_tokens=prefix)
    return (q, k, v), (list(feat_size), *(summaries if partition_grid else (None, None)), table), {**sizes, **options}


def loop_rows(qkv, args, options):
    """The loop's own weights: its output for values that are the rows of the identity."""
    T = qkv[0].shape[2]
    args = [
        [x.double() for x in arg] if isinstance(arg, list) and isinstance(arg[0], torch.Tensor) else arg for arg in args
    ]
    table = args[3] if args[3] is None else args[3].double()
    return eva_loop(
        *(x.double() for x in qkv[:2]), torch.eye(T).double().expand(2, HEADS, T, T), *args[:3], table, **options
    )


@pytest.mark.parametrize('feat_size', GRIDS)
@pytest.mark.parametrize('prefix', [0, 3])
@pytest.mark.parametrize('count_cells', ['one', 'all', 'outside'])
def test_rows_are_those_of_a_loop_over_the_definition(feat_size, prefix, count_cells):
    (q, k, v), args, options = case(feat_size, prefix, count_cells=count_cells)
    rows = attention_rows(lambda values: eva_attention(q, k, values, *args, **options), v)
    torch.testing.assert_close(rows, loop_rows((q, k, v), args, options), rtol=0, atol=1e-12)
    torch.testing.assert_close(rows.sum(-1), torch.ones(rows.shape[:3]).double())
    torch.testing.assert_close(rows @ v, eva_attention(q, k, v, *args, **options), rtol=0, atol=1e-12)


@pytest.mark.parametrize('sizes', [(3, 0), (0, 4), (7, 1), (20, 4)], ids=str)
def test_without_cells_without_windows_and_at_the_exact_limit(sizes):
    (q, k, v), args, options = case((9, 11), 1, window_size=sizes[0], partition_grid=sizes[1])
    rows = attention_rows(lambda values: eva_attention(q, k, values, *args, **options), v)
    torch.testing.assert_close(rows, loop_rows((q, k, v), args, options), rtol=0, atol=1e-12)


def test_float32_agrees_to_1e_5():
    (q, k, v), args, options = case((13, 10), 2, torch.float32, count_cells='outside')
    rows = attention_rows(lambda values: eva_attention(q, k, values, *args, **options), v)
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows.double(), loop_rows((q, k, v), args, options), rtol=0, atol=1e-5)
    torch.testing.assert_close(rows @ v, eva_attention(q, k, v, *args, **options), rtol=0, atol=1e-5)


def test_a_cell_shares_its_weight_among_its_tokens_alone():
    """One cell a quarter, no window: the tokens of a quarter have the same share of the quarter's weight for every
    query, and with a proposal at 0 and keys of one length that share is the same for all of them."""
    (q, k, v), args, options = case((4, 6), window_size=0, partition_grid=2, proposal_scale=0.0)
    k = k / k.norm(dim=-1, keepdim=True)
    rows = attention_rows(lambda values: eva_attention(q, k, values, *args, **options), v).unflatten(-1, (2, 2, 2, 3))
    quarter = rows.sum((4, 6), keepdim=True) / 6
    torch.testing.assert_close(rows, quarter.expand_as(rows))


def test_rows_asked_for():
    """In the order that they are asked for in, some twice, more of them than a head has channels."""
    (q, k, v), args, options = case((5, 6), 2)

    def attend(values):
        return eva_attention(q, k, values, *args, **options)

    every = attention_rows(attend, v)
    asked = torch.tensor([31, 0, 0, *range(20), 5])
    torch.testing.assert_close(attention_rows(attend, v, asked), every[:, :, asked])
    mix = torch.randn(11, 32, dtype=torch.float64)
    torch.testing.assert_close(attention_rows(attend, v, mix), mix @ every)
    with torch.inference_mode():
        torch.testing.assert_close(attention_rows(attend, v, asked[:1]), every[:, :, asked[:1]])
