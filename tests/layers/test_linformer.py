import pytest
import timm
import torch
from helpers import GRIDS, assert_matches, heads_of, randomise

import evavit  # noqa: F401
from evavit.layers import LinformerAttention, SoftmaxAttention
from evavit.layers.linformer import resize_token_projection


def linformer_loop(q, k, v, E, F_v):
    """Linformer with projections `(r, N)`: each projected key and value is a sum over the tokens."""
    keys = torch.stack([(E[j, :, None] * k).sum(2) for j in range(len(E))], 2)
    values = torch.stack([(F_v[j, :, None] * v).sum(2) for j in range(len(F_v))], 2)
    return torch.softmax(q.shape[-1] ** -0.5 * q @ keys.transpose(2, 3), -1) @ values


@pytest.mark.parametrize('feat_size', GRIDS)
@pytest.mark.parametrize('share_kv', [False, True])
def test_output_and_gradients_match_the_loop(feat_size, share_kv):
    layer = LinformerAttention(24, 3, feat_size=feat_size, projection_dim=11, share_kv=share_kv, dtype=torch.float64)
    randomise(layer, 0.3)

    def loop(layer, x):
        projections = (layer.project_k, layer.project_k if share_kv else layer.project_v)
        return linformer_loop(*heads_of(layer, x), *(p.weight.flatten(1) for p in projections))

    assert_matches(layer, loop, feat_size)


def test_the_identity_for_a_projection_is_softmax():
    linformer = LinformerAttention(24, 3, feat_size=(7, 9), projection_dim=63, dtype=torch.float64)
    for projection in (linformer.project_k, linformer.project_v):
        projection.weight.data = torch.eye(63, dtype=torch.float64).view(63, 7, 9)
    softmax = SoftmaxAttention(24, 3, dtype=torch.float64)
    softmax.load_state_dict({k: v for k, v in linformer.state_dict().items() if not k.startswith('project')})
    x = torch.randn(2, 63, 24, dtype=torch.float64)
    torch.testing.assert_close(linformer(x, (7, 9)), softmax(x, (7, 9)))


def test_another_grid_is_refused_with_the_remedy():
    layer = LinformerAttention(24, 3, feat_size=(4, 6))
    with pytest.raises(ValueError, match=r'made for a grid of 4 × 6 tokens, got 6 × 4; call set_feat_size, or'):
        layer(torch.zeros(1, 24, 24), (6, 4))


def test_projections_are_resampled():
    layer = LinformerAttention(24, 3, feat_size=(4, 6), projection_dim=5)
    layer.project_k.weight.data.fill_(1 / 24)  # sums that become means
    layer.set_feat_size((8, 9))
    assert layer.project_k.weight.shape == (5, 8, 9) and layer.feat_size == (8, 9)
    tokens = torch.randn(2, 3, 72, 8)
    expected = tokens.mean(2, keepdim=True).expand(-1, -1, 5, -1)
    torch.testing.assert_close(layer.project_k(tokens), expected)
    assert layer(torch.randn(1, 72, 24), (8, 9)).shape == (1, 72, 24)
    weight = torch.randn(5, 4, 6)
    assert resize_token_projection(weight, (4, 6)) is weight


def test_a_model_hands_its_grid_on_and_resamples():
    model = timm.create_model('linformer_deit_tiny', depth=1, img_size=(64, 96)).eval()
    assert model.blocks[0].attn.feat_size == (4, 6)
    model.set_input_size(img_size=(96, 64))
    assert model(torch.randn(1, 3, 96, 64)).shape == (1, 1000)
    with pytest.raises(ValueError, match='leave it out and give img_size'):
        timm.create_model('linformer_deit_tiny', dynamic_img_size=True)


@pytest.mark.parametrize(
    'name, size',
    [
        ('linformer_deit_tiny', dict(depth=1)),
        ('linformer_pvt_v2_b3', dict(embed_dims=(16, 16, 16, 16), depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1))),
    ],
)
def test_a_checkpoint_of_another_image_size_is_resampled(name, size, tmp_path):
    small, large = (timm.create_model(name, img_size=side, **size) for side in (64, 96))
    torch.save(small.state_dict(), tmp_path / 'small.pth')
    loaded = timm.create_model(
        name, img_size=96, pretrained=True, **size, pretrained_cfg_overlay=dict(file=str(tmp_path / 'small.pth'))
    )
    small.set_input_size(img_size=96)
    for (key, value), fresh in zip(loaded.state_dict().items(), large.state_dict().values(), strict=True):
        torch.testing.assert_close(value, small.state_dict()[key], msg=key)
        assert value.shape == fresh.shape


@pytest.mark.parametrize(
    'kwargs, message',
    [
        (dict(projection_dim=0), 'projection_dim must be a whole number of at least 1, got 0'),
        (dict(feat_size=(0, 3)), r'feat_size \(0, 3\)'),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        LinformerAttention(48, 3, **kwargs)
