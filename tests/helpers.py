"""What several tests share: the grid as lists of tokens, errors of outputs and gradients, checks of a layer."""

import math
from itertools import chain

import torch

from evavit.layers import SoftmaxAttention

GRIDS = [(14, 14), (13, 13), (7, 20), (5, 3), (1, 1)]


def axis_cells(length, partition_grid):
    """Token ranges of the cells along one axis: ceil(length / partition_grid) tokens each, the last may be short."""
    size = math.ceil(length / partition_grid)
    return [range(start, min(start + size, length)) for start in range(0, length, size)]


def grid_cells(feat_size, partition_grid):
    """Token numbers of every cell, cells in raster order."""
    if partition_grid == 0:
        return []
    H, W = feat_size
    return [
        [y * W + x for y in rows for x in cols]
        for rows in axis_cells(H, partition_grid)
        for cols in axis_cells(W, partition_grid)
    ]


def grid_windows(feat_size, window_size):
    """Token numbers of every window, windows in raster order."""
    H, W = feat_size
    return [
        [y * W + x for y in range(top, min(top + window_size, H)) for x in range(left, min(left + window_size, W))]
        for top in range(0, H, window_size)
        for left in range(0, W, window_size)
    ]


def bias_rows(tokens, width, window_size):
    """Rows of the bias table for every query (first) and key (second) among tokens of a grid of that width."""
    y, x = torch.tensor(tokens) // width, torch.tensor(tokens) % width
    dy, dx = y[:, None] - y, x[:, None] - x
    return (dy + window_size - 1) * (2 * window_size - 1) + dx + window_size - 1


def window_bias(table, tokens, width, window_size):
    """Bias `(h, queries, keys)` among tokens of a window, or 0 without a table."""
    return 0.0 if table is None else table[bias_rows(tokens, width, window_size)].permute(2, 0, 1)


def split(x, groups):
    """The tokens of `(B, h, N, d)` by group, one tensor a group. One gather: autograd is slow with a gather each."""
    return x[:, :, list(chain(*groups))].split([len(group) for group in groups], 2)


def in_order(outputs, groups):
    """Outputs of groups of tokens, back in raster order."""
    return torch.cat(outputs, 2)[:, :, torch.tensor(list(chain(*groups))).argsort()]


def relative_errors(output, leaves, expected, expected_leaves):
    """Relative errors of the output and of the gradient of every leaf, by name.

    leaves are dictionaries of the same names. A gradient that is zero in exact arithmetic is measured against 1 % of
    the gradient that comes in.
    """
    grad = torch.randn(expected.shape, dtype=torch.float64)
    grads = torch.autograd.grad(output, list(leaves.values()), grad.to(output.dtype))
    references = torch.autograd.grad(expected, list(expected_leaves.values()), grad, materialize_grads=True)
    found = {'output': ((output.detach() - expected.detach()).norm() / expected.detach().norm()).item()}
    for name, value, reference in zip(leaves, grads, references, strict=True):
        found[name] = ((value - reference).norm() / reference.norm().clamp(min=0.01 * grad.norm())).item()
    return found


def saved_bytes(function):
    """Bytes of the storages that autograd keeps for the backward pass of function()."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = function()  # until counted: memory that is freed may be given out again at the same address
    total = sum(storages.values())
    del kept
    return total


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
    assert_agree(output, expected, leaves, tolerance)


def random_qkv(feat_size, B=2, h=2, d=8, std=1.0):
    """Queries, keys and values `(B, h, N, d)` in float64, with gradients."""
    shape = (B, h, feat_size[0] * feat_size[1], d)
    return [torch.randn(shape, dtype=torch.float64).mul_(std).requires_grad_() for _ in range(3)]


def assert_agree(output, expected, leaves, tolerance=1e-10):
    """The output and the gradient of every leaf, relative to their size."""
    errors = relative_errors(output, dict(enumerate(leaves)), expected, dict(enumerate(leaves)))
    assert max(errors.values()) <= tolerance, errors


def assert_finite(function, qkv):
    """Output and gradients of `function(q, k, v)`."""
    output = function(*qkv)
    assert output.isfinite().all()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(output.sum(), qkv))


def softmax_like(layer):
    """A softmax layer with the projections of another one."""
    other = SoftmaxAttention(layer.qkv.in_features, layer.num_heads, dtype=layer.qkv.weight.dtype)
    other.load_state_dict({key: layer.state_dict()[key] for key in other.state_dict()})
    return other.eval()
