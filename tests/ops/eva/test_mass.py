"""Where EVA's attention goes, against a loop over the definition, and by what the attention itself puts out."""

import pytest
import torch
from helpers import grid_windows
from ops.eva.references import mass_loop

from evavit.layers import EvaAttention
from evavit.ops import eva_attention, eva_attention_mass


@pytest.mark.parametrize(
    'feat_size, window_size, partition_grid',
    [((4, 4), 2, 2), ((5, 7), 3, 2), ((3, 5), 4, 3), ((5, 4), 0, 2), ((5, 3), 2, 0)],
)
@pytest.mark.parametrize('count_cells', ['one', 'all', 'outside'])
def test_against_the_definition(feat_size, window_size, partition_grid, count_cells):
    N, d = feat_size[0] * feat_size[1], 4
    q, k = torch.randn(2, 2, 3, N, d, dtype=torch.float64).unbind(0)
    layer = EvaAttention(12, 3, window_size=max(window_size, 1), partition_grid=2).double()
    torch.nn.init.normal_(layer.rel_pos.relative_position_bias_table)
    summary_k = layer.summary_k()
    bias = layer.rel_pos.relative_position_bias_table if window_size else None
    found = eva_attention_mass(
        q,
        k,
        feat_size,
        summary_k if partition_grid else None,
        bias,
        window_size,
        partition_grid,
        count_cells=count_cells,
    )
    expected = mass_loop(
        q, k, feat_size, summary_k, layer.rel_pos.relative_position_bias_table, window_size, partition_grid, count_cells
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_it_is_the_mass_of_the_attention_itself():
    """Values of 1 outside of a window reach its queries through the cells alone."""
    feat_size, layer = (6, 6), EvaAttention(8, 2, window_size=3, partition_grid=2).double().eval()
    x = torch.randn(1, 36, 8, dtype=torch.float64)
    q, k, _ = layer.qkv(x).unflatten(-1, [3, 2, 4]).permute(2, 0, 3, 1, 4)
    window = grid_windows(feat_size, 3)[0]
    v = torch.ones_like(q)
    v[:, :, window] = 0  # window and cell 0 hold the same tokens: what comes through are the other cells
    bias = layer.rel_pos.relative_position_bias_table
    out = eva_attention(q, k, v, feat_size, layer.summary_q(), layer.summary_k(), bias, 3, 2)
    exact, cells, effective = layer.attention_mass(x, feat_size)
    through = out[:, :, window, 0]
    assert (through < cells[:, :, window]).all() and (through > 0).all()
    torch.testing.assert_close(exact + cells, torch.ones_like(exact))
    assert (effective > 1).all() and (effective <= 4 + 1e-9).all()


def test_a_bias_that_is_no_table_is_refused():
    q, k = torch.randn(2, 1, 2, 9, 4)
    with pytest.raises(ValueError, match=r'rel_pos_bias must be the table .* pass relative_position_bias_table'):
        eva_attention_mass(q, k, (3, 3), None, torch.zeros(2, 9, 9), 3, 0)


def test_cells_without_a_summary_and_numbers_that_cannot_be_are_refused():
    q, k = torch.randn(2, 1, 2, 9, 4)
    for change, message in (
        (dict(partition_grid=3), 'partition_grid 3 needs summary_k; got None'),
        (dict(window_size=True), 'window_size must be a whole number, got True'),
        (dict(norm_eps=0.0), 'norm_eps must be a finite number above 0, got 0.0'),
        (dict(count_cells='some'), "count_cells must be 'one', 'all' or 'outside', got 'some'"),
    ):
        with pytest.raises(ValueError, match=message):
            eva_attention_mass(q, k, (3, 3), **(dict(window_size=3, partition_grid=0) | change))


@pytest.mark.parametrize(
    'change, words',
    [
        (dict(feat_size=(3, 4)), r'feat_size \(3, 4\) does not hold the 9 tokens'),
        (dict(num_prefix_tokens=1), 'and 1 prefix tokens do not make the 9 tokens'),
        (dict(num_prefix_tokens=-9), 'num_prefix_tokens must be 0 or more, got -9'),
        (dict(k=torch.zeros(1, 1, 9, 4)), 'must have one shape'),
        (dict(k=torch.zeros(1, 2, 9, 4).double()), 'must have one dtype'),
        (dict(summary_k=[torch.zeros(5, 5), *[torch.zeros(5)] * 3]), r'summary_k must hold a \(4, 4\) weight'),
    ],
    ids=str,
)
def test_tokens_and_summaries_that_do_not_fit_are_refused(change, words):
    q = torch.zeros(1, 2, 9, 4)
    given = dict(q=q, k=q, feat_size=(3, 3), summary_k=[torch.zeros(4, 4), *[torch.zeros(4)] * 3], window_size=3)
    with pytest.raises(ValueError, match=words):
        eva_attention_mass(**(given | change))
