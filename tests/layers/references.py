"""Random features from their definition, one direction after the other, for the loops of the attentions on them."""

import torch


def scaled(*tensors):
    """x̂ = d^(-¼) x."""
    return [x * x.shape[-1] ** -0.25 for x in tensors]


def xi(x, omega):
    """ξ(x, ω) = exp(ω·x - ½‖x‖²) of x `(…, d)` for one direction ω, `(d)` or as x."""
    return torch.exp((x * omega).sum(-1) - 0.5 * (x * x).sum(-1))


def phi(x, directions, kind='positive'):
    """Random features `(B, h, N, S)` of x `(B, h, N, d)`, one direction of `(h, S, d)` after the other."""
    S = directions.shape[1]
    omegas = [omega[None, :, None] for omega in directions.unbind(1)]
    if kind == 'relu':
        return torch.stack([((x * omega).sum(-1) / S**0.5).relu() + 1e-3 for omega in omegas], -1)
    return torch.stack([xi(x, omega) for omega in omegas], -1) / S**0.5
