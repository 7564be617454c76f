import pytest
import torch
import torch.nn.functional as F
from helpers import GRIDS, assert_matches, grid_windows, heads_of, in_order, randomise, window_bias

from evavit.layers import EvaAttention, LongShortAttention


def merge_heads(x):
    """`(B, h, N, d)` to `(B, N, h·d)`."""
    return x.transpose(1, 2).flatten(2)


def long_short_loop(x, q, k, v, feat_size, projection, norms=None, bias_table=None, window_size=7, source='input'):
    """Long-short attention; projection (W `(h·r, C)`, b), norms ((weight, bias) of LN_L, of LN_G) over C channels."""
    B, h, _, d = q.shape
    s = d**-0.5
    logits = (x if source == 'input' else merge_heads(k)) @ projection[0].T + projection[1]
    r = logits.shape[-1] // h
    P = torch.stack([torch.softmax(logits[..., head * r : (head + 1) * r], 1) for head in range(h)], 1)  # (B, h, N, r)

    def normalise(x, norm):
        return x if norm is None else F.layer_norm(merge_heads(x), (h * d,), *norm).view(B, -1, h, d).transpose(1, 2)

    local, shared = (None, None) if norms is None else norms
    k_local, v_local = normalise(k, local), normalise(v, local)
    if source == 'input':  # averages of normalised keys and values
        k, v = k_local, v_local
    k_bar, v_bar = (normalise(P.transpose(2, 3) @ x, shared) for x in (k, v))
    k, v = k_local, v_local
    windows = grid_windows(feat_size, window_size)
    outputs = []
    for tokens in windows:
        local = s * q[:, :, tokens] @ k[:, :, tokens].transpose(2, 3)
        local = local + window_bias(bias_table, tokens, feat_size[1], window_size)
        weights = torch.softmax(torch.cat([local, s * q[:, :, tokens] @ k_bar.transpose(2, 3)], -1), -1)
        outputs.append(weights @ torch.cat([v[:, :, tokens], v_bar], 2))
    return in_order(outputs, windows)


@pytest.mark.parametrize('feat_size', GRIDS)
@pytest.mark.parametrize(
    'kwargs', [{}, dict(window_size=4, dual_ln=False), dict(projection_dim=3, rel_pos_bias=False, qkv_bias=False)]
)
@pytest.mark.parametrize('source', ['input', 'keys'])
def test_output_and_gradients_match_the_loop(feat_size, kwargs, source):
    layer = randomise(LongShortAttention(24, 3, projection_source=source, dtype=torch.float64, **kwargs))

    def loop(layer, x):
        norms = None
        if layer.norm_local is not None:
            norms = [(norm.weight, norm.bias) for norm in (layer.norm_local, layer.norm_global)]
        table = layer.rel_pos.relative_position_bias_table if layer.rel_pos is not None else None
        return long_short_loop(
            x,
            *heads_of(layer, x),
            feat_size,
            (layer.projection.weight, layer.projection.bias),
            norms,
            table,
            layer.window_size,
            source,
        )

    assert_matches(layer, loop, feat_size)


def test_where_the_projected_keys_do_not_count_it_is_the_window():
    """LN_G with weight 0 and a bias of which every query has a hugely negative product: only the window is left."""
    layer = LongShortAttention(24, 3, dtype=torch.float64)
    window = EvaAttention(24, 3, partition_grid=0, dtype=torch.float64)
    with torch.no_grad():
        layer.qkv.weight[:24] = 0
        layer.qkv.bias[:24] = 1
        layer.norm_global.weight.zero_()
        layer.norm_global.bias.fill_(-1e4)
        window.load_state_dict({key: value for key, value in layer.state_dict().items() if key in window.state_dict()})
    layer.norm_local = None
    x = torch.randn(2, 130, 24, dtype=torch.float64)
    torch.testing.assert_close(layer(x, (13, 10)), window(x, (13, 10)))


def test_projected_keys_reach_the_whole_image():
    """A token outside of a query's window changes its output, through the projection alone."""
    layer = randomise(LongShortAttention(24, 3, dtype=torch.float64))
    x = torch.randn(1, 196, 24, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x, (14, 14))[0, 0].sum(), x)
    assert (gradient[0].norm(dim=-1) > 0).all()


@pytest.mark.parametrize('kwargs', [dict(window_size=0), dict(projection_dim=0), dict(projection_dim=True)])
def test_bad_arguments(kwargs):
    with pytest.raises(ValueError, match=f'{next(iter(kwargs))} must be a whole number of at least 1'):
        LongShortAttention(48, 3, **kwargs)


def test_another_source_is_refused():
    with pytest.raises(ValueError, match="projection_source must be 'input' or 'keys', got 'values'"):
        LongShortAttention(48, 3, projection_source='values')
    with pytest.raises(ValueError, match="attend needs projection_source='keys'"):
        LongShortAttention(48, 3).attend(torch.randn(3, 1, 3, 4, 16), [2, 2])
