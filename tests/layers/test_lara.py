import pytest
import torch
from helpers import GRIDS, assert_agree, assert_finite, assert_matches, grid_cells, heads_of, random_qkv, randomise
from layers.references import scaled, xi

from evavit.layers import LaraAttention
from evavit.layers.lara import lara_attention

each_grid = pytest.mark.parametrize('feat_size', [*GRIDS, (13, 9)])


def lara_loop(q, k, v, landmarks_q, landmarks_k, weighting, noise=None, alpha_coeff=2.0):
    """Importance sampling from C proposals, by their densities, one sample after the other; noise `(B, h, C, S, d)`."""
    s = q.shape[-1] ** -0.5
    affinity = torch.softmax(s * landmarks_q @ q.transpose(2, 3), -1)  # (B, h, C, N), over the queries
    q, k, landmarks_q, landmarks_k = scaled(q, k, landmarks_q, landmarks_k)
    means = (landmarks_q + landmarks_k).unbind(2)
    noise = torch.zeros_like(landmarks_q).unsqueeze(3) if noise is None else noise

    def density(omega, mean):
        return torch.exp(-0.5 * ((omega - mean) ** 2).sum(-1))

    numerator, denominator = 0.0, 0.0
    for c, mean in enumerate(means):
        for eps in noise[:, :, c].unbind(2):
            omega = mean + eps
            keys = xi(k, omega[:, :, None])
            f = (keys[..., None] * v).sum(2) / keys.sum(2)[..., None]
            target = density(omega, 0.0)[..., None] * xi(q, omega[:, :, None]) * keys.sum(2)[..., None]  # (B, h, N)
            balance = density(omega, mean) / sum(density(omega, other) for other in means)
            if weighting == 'optimal':
                alpha = balance[..., None] + alpha_coeff * (affinity[:, :, c] - affinity.mean(2))
                alpha = alpha.clamp(min=1e-8)
            elif weighting == 'biased':
                alpha = balance[..., None] * torch.exp((q * mean[:, :, None]).sum(-1))
            else:
                alpha = balance[..., None]
            w = alpha * target / density(omega, mean)[..., None]
            numerator = numerator + w[..., None] * f[:, :, None]
            denominator = denominator + w[..., None]
    return numerator / denominator


def landmarks(C, B=2, h=2, d=8):
    return [torch.randn(B, h, C, d, dtype=torch.float64, requires_grad=True) for _ in range(2)]


@each_grid
@pytest.mark.parametrize('weighting', ['optimal', 'balance', 'biased'])
@pytest.mark.parametrize('samples', [0, 1, 3])
def test_the_function_matches_the_loop(feat_size, weighting, samples):
    q, k, v = random_qkv(feat_size)
    means = landmarks(5)
    noise = torch.randn(2, 2, 5, samples, 8, dtype=torch.float64) if samples else None
    assert_agree(
        lara_attention(q, k, v, feat_size, *means, weighting, noise=noise),
        lara_loop(q, k, v, *means, weighting, noise),
        [q, k, v, *means],
    )


@each_grid
@pytest.mark.parametrize(
    'kwargs',
    [
        dict(landmark_grid=2),
        dict(landmark_grid=3, landmark_proj='channels', weighting='biased'),
        dict(landmark_grid=2, weighting='balance', num_samples=3),
        dict(landmark_grid=2, num_samples=4, antithetic=True),
        dict(landmark_grid=2, landmark_mixing=False, alpha_coeff=1.0, noise_std=1.0),
    ],
)
def test_the_layer_matches_the_loop_in_training(feat_size, kwargs):
    layer = randomise(LaraAttention(24, 3, **kwargs, dtype=torch.float64), 0.3).train()
    cells = grid_cells(feat_size, layer.landmark_grid)

    def cell_landmarks(x, part):
        means = torch.stack([x[:, :, cell].mean(2) for cell in cells], 2)
        if kwargs.get('landmark_proj') == 'channels':
            made = part.norm(part.proj(means.transpose(1, 2).reshape(2, len(cells), 24)))
            return made.view(2, len(cells), 3, 8).transpose(1, 2)
        return part.norm(part.proj(means))

    def loop(layer, x):
        drawn = layer.num_samples // 2 if layer.antithetic else layer.num_samples
        noise = torch.randn(2, 3, len(cells), drawn, 8, dtype=torch.float64)
        noise = kwargs.get('noise_std', 8**-0.25) * noise
        noise = torch.cat([noise, -noise], 3) if layer.antithetic else noise
        q, k, v = heads_of(layer, x)
        landmarks_q, landmarks_k = cell_landmarks(q, layer.landmarks_q), cell_landmarks(k, layer.landmarks_k)
        if kwargs.get('landmark_mixing', True):
            keys = landmarks_k.unbind(2)
            weights = [
                torch.softmax(torch.stack([8**-0.5 * (key * other).sum(-1) for other in keys], -1), -1) for key in keys
            ]
            landmarks_k = torch.stack(
                [sum(w[..., i, None] * other for i, other in enumerate(keys)) for w in weights], 2
            )
        return lara_loop(q, k, v, landmarks_q, landmarks_k, layer.weighting, noise, kwargs.get('alpha_coeff', 2.0))

    assert_matches(layer, loop, feat_size)


each_weighting = pytest.mark.parametrize('weighting', ['optimal', 'balance', 'biased'])


@each_weighting
@pytest.mark.parametrize('factor', [1e-3, 30.0, 1000.0])
def test_logits_of_any_size_give_finite_answers_and_gradients(factor, weighting):
    qkv, means = random_qkv((9, 5), std=factor), [x.detach().float() for x in landmarks(5)]
    assert_finite(
        lambda q, k, v: lara_attention(q, k, v, (9, 5), *means, weighting),
        [x.detach().float().requires_grad_() for x in qkv],
    )


@each_weighting
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision(dtype, weighting):
    qkv, means = ([x.detach().float() for x in made] for made in (random_qkv((9, 5)), landmarks(5)))
    exact = lara_attention(*qkv, (9, 5), *means, weighting)
    output = lara_attention(*(x.to(dtype) for x in qkv), (9, 5), *(x.to(dtype) for x in means), weighting)
    assert output.dtype == dtype and (output.float() - exact).norm() < 0.03 * exact.norm()


@pytest.mark.parametrize(
    'message, call',
    [
        ('landmarks_q and landmarks_k must be', lambda q, k, v: lara_attention(q, k, v, [3, 2], q, k[:, :, :1])),
        ('noise must be', lambda q, k, v: lara_attention(q, k, v, [3, 2], q, k, noise=q)),
        ("weighting must be .*, got 'best'", lambda q, k, v: lara_attention(q, k, v, [3, 2], q, k, 'best')),
    ],
)
def test_bad_arguments(message, call):
    with pytest.raises(ValueError, match=message):
        call(*random_qkv((3, 2)))


@pytest.mark.parametrize(
    'kwargs, message',
    [
        (dict(weighting='best'), "weighting must be one of optimal, balance, biased, got 'best'"),
        (dict(landmark_proj='all'), "landmark_proj must be one of head, channels, got 'all'"),
        (dict(antithetic=True), 'num_samples must be even, got 1'),
        (dict(alpha_coeff=-1.0), 'alpha_coeff must be a number of at least 0, got -1.0'),
        (dict(noise_std=float('nan')), 'noise_std must be a number of at least 0, got nan'),
        (dict(landmark_grid=0), 'landmark_grid must be a whole number of at least 1, got 0'),
    ],
)
def test_bad_options(kwargs, message):
    with pytest.raises(ValueError, match=message):
        LaraAttention(48, 3, **kwargs)
