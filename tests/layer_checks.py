"""What every attention layer is held to, whatever it computes between its projections."""

import torch

GRIDS = [(14, 14), (13, 13), (7, 20), (5, 3), (1, 1)]


def randomise(layer, std=0.5):
    """Weights of a size that makes every term count."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=std)
    return layer


def heads_of(layer, x, parts=3):
    """q, k, v (or q, v) of the layer, each `(B, h, N, d)`."""
    B, N, C = x.shape
    return layer.qkv(x).view(B, N, parts, layer.num_heads, C // layer.num_heads).permute(2, 0, 3, 1, 4)


def assert_matches(layer, loop, feat_size, batch=2, tolerance=1e-10):
    """Output and every gradient of a float64 layer against `loop(layer, x)`, the attention between its projections.

    `loop` returns `(B, h, N, d)`. Both run in the mode the layer is in, each after the same seed.
    """
    x = torch.randn(batch, feat_size[0] * feat_size[1], layer.proj.in_features, dtype=torch.float64, requires_grad=True)
    leaves = [x, *layer.parameters()]
    torch.manual_seed(1)
    output = layer(x, feat_size)
    torch.manual_seed(1)
    expected = layer.proj(loop(layer, x).transpose(1, 2).reshape(x.shape))
    assert (output - expected).norm() <= tolerance * expected.norm()
    grad = torch.randn_like(output)
    for value, reference in zip(
        torch.autograd.grad(output, leaves, grad),
        torch.autograd.grad(expected, leaves, grad, materialize_grads=True),
        strict=True,
    ):
        assert (value - reference).norm() <= tolerance * max(reference.norm().item(), 0.01 * grad.norm().item())
