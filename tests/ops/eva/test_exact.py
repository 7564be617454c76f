"""The estimator of Equations (13) and (15): against the loop, its exact limits, and Proposition 2."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers import relative_errors
from ops.eva.references import estimator_loop

from evavit.ops import control_variate_coefficients, eva_estimator


def make(B=2, h=2, N=7, M=7, d=4):
    return {
        x: torch.randn(B, h, n, d, dtype=torch.float64, requires_grad=True) for x, n in (('q', N), ('k', M), ('v', M))
    }


@pytest.mark.parametrize('kind', ['for each query', 'common', 'no E'])
def test_matches_the_loop(kind):
    leaves = make(N=5)
    cells = torch.randint(0 if kind == 'no E' else -1, 3, (7,) if kind == 'common' else (5, 7))
    omega = torch.randn(2, 2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    log_ratio = torch.randn(2, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    leaves |= dict(omega=omega, log_ratio=log_ratio)
    expected = estimator_loop(leaves['q'], leaves['k'], leaves['v'], cells.expand(5, 7), omega, log_ratio)
    output = eva_estimator(leaves['q'], leaves['k'], leaves['v'], cells, omega, log_ratio)
    found = relative_errors(output, leaves, expected, leaves)
    assert max(found.values()) <= 1e-11, found


@pytest.mark.parametrize('lowest, cells', [(-1, 3), (0, 1), (0, 5), (-1, 0)])
def test_limit_best_coefficients_are_softmax_attention(lowest, cells):
    """Limit 4: Eq. (13) with β*, whatever the partition and E are."""
    leaves = make()
    expected = F.scaled_dot_product_attention(*leaves.values())
    output = eva_estimator(**leaves, cells=torch.randint(lowest, cells, (7, 7)))
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)


def test_limit_one_token_a_cell_is_softmax_attention_whatever_the_samples():
    leaves = make()
    expected = F.scaled_dot_product_attention(*leaves.values())
    omega = 5 * torch.randn(1, 1, 1, 2, 4, dtype=torch.float64)
    torch.testing.assert_close(
        eva_estimator(**leaves, cells=torch.arange(7), omega=omega), expected, rtol=1e-12, atol=1e-12
    )


def test_one_cell_is_random_feature_attention():
    """Appendix G.1: |E| = 0 and C = 1, with the proposal N(0, I)."""
    leaves = make(N=5)
    omega = torch.randn(1, 1, 1, 16, 4, dtype=torch.float64)

    def phi(x):
        x = 4**-0.25 * x
        return torch.exp(x @ omega[0, 0, 0].T - 0.5 * x.square().sum(-1, keepdim=True))

    kernel = phi(leaves['q']) @ phi(leaves['k']).transpose(-2, -1)
    output = eva_estimator(**leaves, cells=torch.zeros(7, dtype=torch.long), omega=omega)
    torch.testing.assert_close(output, kernel @ leaves['v'] / kernel.sum(-1, keepdim=True), rtol=1e-12, atol=1e-12)


def weighted_error(q, k, v, cells, beta):
    """J of (9) for every query, from coefficients `(B, h, N, C, d)`."""
    weights = (q.shape[-1] ** -0.5 * q @ k.transpose(-2, -1)).softmax(-1)
    distance = (beta[:, :, :, cells] - v.unsqueeze(2)).square().sum(-1)
    return (weights * distance).sum(-1)


def test_proposition_2_refining_a_partition_never_raises_the_weighted_error():
    q, k, v = make(B=3, N=6, M=24).values()
    cells = torch.zeros(24, dtype=torch.long)
    errors = [weighted_error(q, k, v, cells, control_variate_coefficients(q, k, v, cells))]
    for c in range(1, 24):  # split a cell of at least two tokens at random
        largest = torch.bincount(cells).argmax()
        members = torch.nonzero(cells == largest).flatten()
        cells = cells.index_fill(0, members[torch.randperm(len(members))[: max(1, len(members) // 2)]], c)
        beta = control_variate_coefficients(q, k, v, cells)
        errors.append(weighted_error(q, k, v, cells, beta))
        assert (errors[-1] <= errors[-2] + 1e-14).all()
        other = beta + 0.1 * torch.randn_like(beta)  # β* is the minimum
        assert (weighted_error(q, k, v, cells, other) > errors[-1]).all()
    assert (errors[12] < errors[0]).all() and errors[-1].abs().max() < 1e-24


def test_the_error_of_sampled_coefficients_shrinks_as_the_partition_is_refined():
    """Limit 4 with β̂ in place of β*: an average, since Proposition 2 says nothing about a single draw."""
    q, k, v = make(B=48, h=4, N=16, M=16).values()
    exact = F.scaled_dot_product_attention(q, k, v)
    omega = torch.randn(48, 4, 16, 16, 4, dtype=torch.float64)
    errors = [
        (eva_estimator(q, k, v, torch.arange(16) // size, omega) - exact).square().mean().item()
        for size in (16, 8, 4, 2, 1)
    ]
    assert all(fine < 0.95 * coarse for coarse, fine in itertools.pairwise(errors)), errors
    assert errors[-1] < 1e-24


@pytest.mark.parametrize('cells', [torch.zeros(6, dtype=torch.long), torch.zeros(7), torch.full((7,), -2)])
def test_bad_cells_are_refused(cells):
    with pytest.raises(ValueError, match='cells must be whole numbers from -1'):
        eva_estimator(**make(), cells=cells)
