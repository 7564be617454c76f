"""timm's attentions on ours: every argument that they have, against themselves at the exact limit."""

import copy
import pickle
from unittest.mock import patch

import pytest
import torch
from helpers import randomise
from ops.eva.references import mass_loop
from timm.layers import Attention, AttentionRope, RmsNorm, RotaryEmbeddingCat
from timm.models.eva import EvaAttention as TimmEvaAttention
from torch import nn

from evavit.layers import EvaAttention, LocalAttention
from evavit.layers.converted import ConvertedAttention, GridSize, derive, revert_attention

NORMS = dict(qk_norm=True, scale_norm=True, norm_layer=nn.LayerNorm)
CASES = {
    'plain': (Attention, {}),
    'no biases': (Attention, dict(qkv_bias=False, proj_bias=False)),
    'gate, norms, wide heads': (Attention, dict(attn_head_dim=12, qkv_bias=True, gated=True, dim_out=20, **NORMS)),
    'rope': (AttentionRope, {}),
    'rope, halves': (AttentionRope, dict(rotate_half=True, gated=True, qkv_bias=False, **NORMS)),
    'rope, apart': (AttentionRope, dict(qkv_fused=False, attn_head_dim=8, qk_norm=True, norm_layer=RmsNorm)),
    'rope, shared keys': (AttentionRope, dict(qkv_fused=False, num_kv_heads=2, **NORMS)),
    'eva': (TimmEvaAttention, dict(scale_norm=False)),
    'eva, biases apart': (TimmEvaAttention, dict(scale_norm=False, qkv_bias_separate=True)),
    'eva, apart': (TimmEvaAttention, dict(qkv_fused=False, gated=True, **NORMS)),
}


def pair(case, prefix=2, **options):
    kind, kwargs = CASES[case]
    if kind is not Attention:
        kwargs = {'num_prefix_tokens': prefix, **kwargs}
    torch.manual_seed(0)
    attn = randomise(kind(16, num_heads=4, **kwargs).double(), 0.3).eval()
    return attn, derive(ConvertedAttention, EvaAttention)(copy.deepcopy(attn), prefix, rel_pos_bias=False, **options)


@pytest.mark.parametrize('training', [True, False])
def test_parts_keep_their_modes(training):
    """As a dropout or adapter that is switched off by itself."""
    attn = Attention(16, num_heads=4, proj_drop=0.5).train(training)
    attn.proj_drop.train(not training)
    converted = derive(ConvertedAttention, EvaAttention)(attn, 0, window_size=2)
    for found in (converted, revert_attention(converted)):
        assert found.training is training and found.proj_drop.training is not training
    assert {part.training for part in converted.modules() if part is not converted.proj_drop} == {training}


@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('prefix', [0, 2])
def test_a_window_over_the_grid_is_timms_attention(case, prefix):
    attn, converted = pair(case, prefix, window_size=5, count_cells='outside')
    x = torch.randn(2, prefix + 20, 16, dtype=torch.float64, requires_grad=True)
    head_dim = attn.head_dim
    rope = {} if CASES[case][0] is Attention else dict(
        rope=RotaryEmbeddingCat(head_dim, in_pixels=False, feat_shape=[4, 5]).get_embed().double()
    )  # fmt: skip
    out, expected = converted(x, attn_mask=GridSize(4, 5), **rope), attn(x, **rope)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    grad = torch.randn_like(out)
    own = dict(converted.named_parameters())
    ours = torch.autograd.grad(out, [x, *(own[name] for name, _ in attn.named_parameters())], grad)
    theirs = torch.autograd.grad(expected, [x, *attn.parameters()], grad)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize('case', CASES)
def test_attention_mass_is_that_of_the_loop(case):
    """Over the queries and keys that timm's attention compares: normalised, turned, of all heads."""
    attn, converted = pair(case, window_size=2, partition_grid=2)
    x, rope = torch.randn(2, 22, 16, dtype=torch.float64), None
    if CASES[case][0] is not Attention:
        rope = RotaryEmbeddingCat(attn.head_dim, in_pixels=False, feat_shape=[4, 5]).get_embed().double()
    seen = []
    attn.fused_attn = False
    with patch.object(torch.Tensor, '__matmul__', lambda a, b: seen.append((a, b)) or torch.matmul(a, b)):
        attn(x) if rope is None else attn(x, rope=rope)
    q, k = attn.head_dim**0.5 * seen[0][0], seen[0][1].transpose(-2, -1)
    expected = mass_loop(q, k, (4, 5), converted.summary_k(), None, 2, 2, num_prefix_tokens=2)
    for found, values in zip(converted.attention_mass(x, [4, 5], rope), expected, strict=True):
        torch.testing.assert_close(found, values)


@pytest.mark.parametrize('case', CASES)
def test_and_back(case):
    attn, converted = pair(case)
    assert set(attn.state_dict()) <= set(converted.state_dict())
    reverted = revert_attention(converted)
    assert type(reverted) is type(attn) and reverted.__dict__.keys() == attn.__dict__.keys()
    assert str(reverted) == str(attn)
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    assert torch.equal(reverted(x), attn(x))


def test_dropouts_are_timms():
    attn = Attention(16, 4, attn_drop=0.5, proj_drop=0.5)
    converted = derive(ConvertedAttention, LocalAttention)(attn, 0, window_size=3)
    assert converted.attn_drop is attn.attn_drop and converted.proj_drop is attn.proj_drop
    x, grid = torch.randn(1, 9, 16), GridSize(3, 3)
    assert not torch.equal(converted(x, attn_mask=grid), converted(x, attn_mask=grid))
    converted.eval()
    assert torch.equal(converted(x, attn_mask=grid), converted(x, attn_mask=grid))


def test_under_autocast_keys_and_values_have_one_dtype():
    attn, converted = pair('rope, shared keys', window_size=5, count_cells='outside')
    attn, converted = attn.float(), converted.float()
    x = torch.randn(2, 22, 16)
    rope = RotaryEmbeddingCat(attn.head_dim, in_pixels=False, feat_shape=[4, 5]).get_embed()
    with torch.autocast('cpu', torch.bfloat16):
        out, expected = converted(x, rope, GridSize(4, 5)), attn(x, rope)
    assert out.dtype == expected.dtype and (out - expected).norm() < 0.02 * expected.norm()


def test_classes_are_made_once_and_copied_and_pickled():
    front = derive(ConvertedAttention, EvaAttention)
    assert front is derive(ConvertedAttention, EvaAttention) and front.__name__ == 'ConvertedEvaAttention'
    converted = pair('gate, norms, wide heads')[1]
    x, grid = torch.randn(2, 22, 16, dtype=torch.float64), GridSize(4, 5)
    for other in (copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):
        assert type(other) is front and torch.equal(other(x, attn_mask=grid), converted(x, attn_mask=grid))
        with torch.no_grad():
            other.proj.weight.zero_()
        assert converted.proj.weight.any()


def test_its_backend_is_told():
    for case in CASES:
        assert 'backend=plain' in str(pair(case)[1])
