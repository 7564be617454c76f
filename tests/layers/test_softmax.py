import pytest
import torch
from timm.layers import Attention, set_fused_attn

from evavit.layers import SoftmaxAttention


@pytest.mark.parametrize('fused', [True, False])
def test_equals_timm(fused):
    set_fused_attn(fused)
    try:
        ours, theirs = SoftmaxAttention(48, 3).eval(), Attention(48, 3, qkv_bias=True).eval()
    finally:
        set_fused_attn(True)
    assert ours.fused_attn == fused
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 20, 48)
    torch.testing.assert_close(ours(x, (4, 5)), theirs(x))
