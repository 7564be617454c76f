from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from helpers import GRIDS, assert_matches, grid_cells, heads_of, randomise

from evavit.layers import NystromformerAttention, SoftmaxAttention
from evavit.layers.nystromformer import iterative_pseudo_inverse


def pseudo_inverse_loop(x, iterations):
    """Razavi's iteration on one matrix."""
    identity = torch.eye(len(x), dtype=x.dtype)
    z = x.T / (x.abs().sum(0).max() * x.abs().sum(1).max())
    for _ in range(iterations):
        inner = 7 * identity - x @ z
        inner = 15 * identity - x @ z @ inner
        inner = 13 * identity - x @ z @ inner
        z = z @ inner / 4
    return z


def nystromformer_loop(q, k, v, feat_size, landmark_grid=7, iterations=6, kernels=None):
    """Nyström attention: one head of one image after the other; kernels `(h, length)` of the convolution."""
    s = q.shape[-1] ** -0.5
    cells = grid_cells(feat_size, landmark_grid)
    images = []
    for image in range(q.shape[0]):
        heads = []
        for head in range(q.shape[1]):
            Q, K, V = q[image, head], k[image, head], v[image, head]
            Q_l = torch.stack([Q[cell].mean(0) for cell in cells])
            K_l = torch.stack([K[cell].mean(0) for cell in cells])
            left, right = torch.softmax(s * Q @ K_l.T, 1), torch.softmax(s * Q_l @ K.T, 1)
            y = left @ pseudo_inverse_loop(torch.softmax(s * Q_l @ K_l.T, 1), iterations) @ right @ V
            if kernels is not None:
                reach = kernels.shape[1] // 2
                padded = F.pad(V, [0, 0, reach, reach])
                y = y + sum(weight * padded[j : j + len(V)] for j, weight in enumerate(kernels[head]))
            heads.append(y)
        images.append(torch.stack(heads))
    return torch.stack(images)


@pytest.mark.parametrize('feat_size', GRIDS)
@pytest.mark.parametrize(
    'kwargs', [{}, dict(conv_kernel_size=0, landmark_grid=3, pinv_iterations=3), dict(landmark_grid=50, qkv_bias=False)]
)
def test_output_and_gradients_match_the_loop(feat_size, kwargs):
    layer = randomise(NystromformerAttention(24, 3, dtype=torch.float64, **kwargs))

    def loop(layer, x):
        kernels = layer.conv.weight[:, 0, :, 0] if layer.conv is not None else None
        return nystromformer_loop(*heads_of(layer, x), feat_size, layer.landmark_grid, layer.pinv_iterations, kernels)

    assert_matches(layer, loop, feat_size, tolerance=1e-9)


def kernel(condition, size=49, batch=4):
    """Random matrices with singular values from 1 down to 1 / condition."""
    u, _, v = torch.linalg.svd(torch.randn(batch, size, size, dtype=torch.float64))
    return u * torch.logspace(0, -torch.tensor(condition).log10().item(), size, dtype=torch.float64) @ v


def error(x, iterations):
    exact = torch.linalg.pinv(x)
    return (
        ((iterative_pseudo_inverse(x, iterations) - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1))
        .max()
        .item()
    )


@pytest.mark.parametrize(
    'condition, iterations, bound',
    [(2.0, 6, 1e-3), (2.0, 9, 1e-10), (10.0, 6, 0.5), (10.0, 10, 1e-10), (1e3, 20, 1e-6)],
)
def test_pseudo_inverse_against_linalg(condition, iterations, bound):
    assert error(kernel(condition), iterations) < bound


def test_pseudo_inverse_of_an_attention_matrix():
    """The kernels of the layer, softmax(q kᵀ) of landmarks, with the paper's 6 iterations and in the limit."""
    q, k = torch.randn(2, 8, 16, 64, dtype=torch.float64)
    x = torch.softmax(3 * q[:, :, :16] @ k[:, :, :16].transpose(1, 2) / 8, -1)
    errors = [error(x, iterations) for iterations in (2, 6, 12, 30)]
    assert all(later <= earlier for earlier, later in pairwise(errors)) and errors[-1] < 1e-8


def test_pseudo_inverse_of_a_singular_matrix():
    """Landmarks that are equal: rank 3 of 6."""
    x = torch.softmax(torch.randn(3, 3, dtype=torch.float64), -1).repeat_interleave(2, 0).repeat_interleave(2, 1) / 2
    torch.testing.assert_close(iterative_pseudo_inverse(x, 20), torch.linalg.pinv(x, rtol=1e-10), rtol=1e-6, atol=1e-6)


def test_entries_of_a_batch_do_not_mix():
    x = kernel(5.0, size=9)
    alone = torch.stack([iterative_pseudo_inverse(matrix, 4) for matrix in x])
    torch.testing.assert_close(iterative_pseudo_inverse(x, 4), alone)


@pytest.mark.parametrize('feat_size', [(7, 7), (5, 3)])
def test_every_token_a_landmark_is_softmax(feat_size):
    nystrom = randomise(NystromformerAttention(24, 3, pinv_iterations=40, conv_kernel_size=0, dtype=torch.float64), 0.3)
    softmax = SoftmaxAttention(24, 3, dtype=torch.float64)
    softmax.load_state_dict(nystrom.state_dict())
    x = torch.randn(2, feat_size[0] * feat_size[1], 24, dtype=torch.float64)
    torch.testing.assert_close(nystrom(x, feat_size), softmax(x, feat_size), rtol=1e-6, atol=1e-6)


def test_more_landmarks_come_closer():
    torch.manual_seed(0)
    x = torch.randn(1, 196, 24, dtype=torch.float64)
    softmax = SoftmaxAttention(24, 3, dtype=torch.float64)
    errors = []
    for landmark_grid in (2, 7, 14):
        layer = NystromformerAttention(
            24, 3, landmark_grid=landmark_grid, conv_kernel_size=0, pinv_iterations=30, dtype=torch.float64
        )
        layer.load_state_dict(softmax.state_dict())
        errors.append((layer(x, (14, 14)) - softmax(x, (14, 14))).norm().item())
    assert errors[2] < 1e-3 * errors[0] and errors[1] < 1.1 * errors[0]


@pytest.mark.parametrize(
    'kwargs, message',
    [
        (dict(landmark_grid=0), 'landmark_grid must be a whole number of at least 1, got 0'),
        (dict(pinv_iterations=1.5), 'pinv_iterations must be a whole number'),
        (dict(conv_kernel_size=4), 'conv_kernel_size must be odd, or 0 for no convolution, got 4'),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        NystromformerAttention(48, 3, **kwargs)
