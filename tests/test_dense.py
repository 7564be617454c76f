"""Backbones for detection: maps of the right sizes, at sizes of every kind, and features that follow the image."""

import json

import pytest
import timm
import torch
import torchvision

import evavit  # noqa: F401
from evavit import dense
from evavit.dense import DetectionBackbone, SimpleFeaturePyramid
from evavit.models import write_weights

PYRAMID = dict(depths=(1, 1, 1, 1), embed_dims=(16, 32, 48, 64), num_heads=(1, 2, 3, 4))
PLAIN = dict(depth=2, embed_dim=48, num_heads=3)


@pytest.mark.parametrize(
    'name, kwargs',
    [('eva_pvt_v2_b3', PYRAMID), ('eva_deit_tiny', dict(PLAIN, dynamic_img_size=True, out_indices=(0, 1)))],
)
@pytest.mark.parametrize('height, width', [(96, 160), (32, 64), (224, 96)])
def test_maps_of_detection(name, kwargs, height, width):
    backbone = DetectionBackbone(timm.create_model(name, features_only=True, **kwargs), 24).eval()
    with torch.no_grad():
        maps = backbone(torch.randn(1, 3, height, width))
    assert list(maps) == ['0', '1', '2', '3', 'pool']
    for stride, x in zip((4, 8, 16, 32, 64), maps.values(), strict=True):
        assert x.shape == (1, 24, -(-height // stride), -(-width // stride)) and torch.isfinite(x).all()


@pytest.mark.parametrize('patch_size', [8, 12, 14])
@pytest.mark.parametrize('height, width', [(96, 160), (224, 448), (640, 32)])
def test_maps_of_patches_that_are_no_power_of_two(patch_size, height, width):
    """torchvision infers strides from the maps' sizes, and rounds them."""
    free = dict(dynamic_img_size=True, dynamic_img_pad=True, features_only=True, out_indices=1)
    plain = timm.create_model('eva_deit_tiny', patch_size=patch_size, img_size=10 * patch_size, **free, **PLAIN)
    backbone = DetectionBackbone(plain, 8).eval()
    with torch.no_grad():
        maps = list(backbone(torch.randn(1, 3, height, width)).values())
    first = 4 if patch_size > 8 else 2
    for i, x in enumerate(maps[:4]):
        assert x.shape[-2:] == (height // first // 2**i, width // first // 2**i)


@pytest.mark.parametrize('stride, target', [(3.5, 4), (7, 8), (28, 32), (24, 32)])
def test_a_resized_map_is_centred_where_it_was(stride, target):
    length = 3200
    places = (torch.arange(-(-length // stride)) + 0.5) * stride  # pixels
    x = places.expand(1, 1, len(places), -1)
    made = dense._at_power_of_two(x, stride, (length, length))
    assert made.shape[-2:] == (length // target, length // target)
    expected = (torch.arange(length // target) + 0.5) * target
    assert (made[0, 0, 0] - expected)[1:-1].abs().max() < 1e-2
    y = dense._at_power_of_two(x.transpose(2, 3), stride, (length, length))
    assert torch.equal(y, made.transpose(2, 3))


def test_a_box_is_pooled_from_its_own_pixels():
    """Of patches of 14, through torchvision's own choice of map and scale."""
    model = timm.create_model('eva_deit_tiny', patch_size=14, features_only=True, out_indices=1, **PLAIN)
    pool = torchvision.ops.MultiScaleRoIAlign(['0', '1', '2', '3'], 3, 2)

    class Places(torch.nn.Module):  # each token says where it is
        feature_info = model.feature_info

        def forward(self, images):
            rows, columns = (-(-side // 14) for side in images.shape[-2:])
            return [((torch.arange(rows) + 0.5) * 14).view(1, 1, -1, 1).expand(1, 48, -1, columns)]

    backbone = DetectionBackbone(Places(), 4)
    # Without weights: only what brings a map to four strides.
    resized = [torch.nn.Upsample(scale_factor=factor, mode='bilinear') for factor in (4, 2, 1, 0.5)]
    backbone.simple.scales = torch.nn.ModuleList(resized)
    for top, bottom in ((570, 630), (100, 300), (10, 600)):
        boxes = torch.tensor([[50.0, top, 500.0, bottom]])
        (found,) = pool(backbone(torch.zeros(1, 3, 640, 640)), [boxes], [(640, 640)])
        thirds = top + (torch.arange(3) + 0.5) * (bottom - top) / 3
        # By torchvision's convention half of the stride of the chosen map, 8 or 16 pixels, off.
        assert (found[0, :, 1] - thirds).abs().max() < 16.5


def test_every_scale_of_the_simple_pyramid_learns():
    pyramid = SimpleFeaturePyramid(16, 8)
    x = torch.randn(2, 16, 6, 4, requires_grad=True)
    maps = pyramid(x)
    assert [tuple(y.shape[2:]) for y in maps] == [(24, 16), (12, 8), (6, 4), (3, 2)]
    for y in maps:
        (gradient,) = torch.autograd.grad(y.square().sum(), x, retain_graph=True)
        assert gradient.abs().sum() > 0


def test_a_pyramid_without_its_first_map_is_refused():
    features = timm.create_model('eva_pvt_v2_b3', features_only=True, out_indices=(1, 2, 3), **PYRAMID)
    with pytest.raises(ValueError, match=r'\[8, 16, 32\].*out_indices=\(0, 1, 2, 3\)'):
        DetectionBackbone(features)


def test_a_model_that_gives_no_maps_is_refused():
    for model in (timm.create_model('eva_deit_tiny', depth=1), timm.create_model('resnet18')):
        with pytest.raises(ValueError, match=r'gives no maps: make it with features_only=True, .*load_converted'):
            DetectionBackbone(model)


@pytest.mark.parametrize('maps', [dict(features_only=True, out_indices=(0, 1)), {}], ids=['maps', 'whole'])
@pytest.mark.parametrize('name, kwargs', [('eva_pvt_v2_b3', PYRAMID), ('eva_deit_tiny', PLAIN)])
def test_a_run_says_how_images_of_its_model_are_prepared(tmp_path, name, kwargs, maps):
    """What a detector, decoder or classifier normalises by: the run's own, unless the overlay says otherwise.
    segmentation_models.pytorch makes its plain encoders without features_only."""
    file = tmp_path / 'last.safetensors'

    def data(**overlay):
        model = timm.create_model(
            name, pretrained=True, pretrained_cfg_overlay=dict(file=str(file), **overlay), **kwargs, **maps
        )
        return timm.data.resolve_data_config(model=model)

    weights = timm.create_model(name, **kwargs).state_dict()
    args = dict(model=name, mean=[0.1, 0.2, 0.3], std=[0.5, 0.6, 0.7], interpolation='bilinear', crop_pct=None)
    write_weights(weights, file, dict(args=json.dumps(args)))
    found = data()
    assert found['mean'] == [0.1, 0.2, 0.3] and found['std'] == [0.5, 0.6, 0.7]
    assert found['interpolation'] == 'bilinear' and found['crop_pct'] == 0.875
    found = data(mean=(0.4, 0.4, 0.4))
    assert found['mean'] == (0.4, 0.4, 0.4) and found['std'] == [0.5, 0.6, 0.7]
    write_weights(weights, file, dict(args=json.dumps({**args, 'mean': 'x'})))
    with pytest.raises(ValueError, match=r"last.safetensors: its settings are damaged .mean 'x'"):
        data()
    for others in ({}, dict(args='--mean 0.1'), dict(args='[1]'), dict(args='[' * 20000), dict(args='{"mean": "x"}')):
        write_weights(weights, file, others)
        assert data()['mean'] == timm.data.IMAGENET_DEFAULT_MEAN


@pytest.mark.parametrize('height, width', [(33, 65), (97, 51), (224, 100), (64, 448)])
def test_pyramid_features_at_any_size(height, width):
    """Odd sizes too; the whole model's intermediates are the feature backbone's maps."""
    torch.manual_seed(0)
    whole = timm.create_model('eva_pvt_v2_b3', **PYRAMID).eval()
    backbone = timm.create_model('eva_pvt_v2_b3', features_only=True, **PYRAMID).eval()
    backbone.load_state_dict(
        {
            name.replace('stages.', 'stages_'): value
            for name, value in whole.state_dict().items()
            if not name.startswith('head')
        }
    )
    images = torch.randn(2, 3, height, width)
    with torch.no_grad():
        maps, intermediates = backbone(images), whole.forward_intermediates(images, intermediates_only=True)
    for stride, a, b in zip((4, 8, 16, 32), maps, intermediates, strict=True):
        assert a.shape[2:] == (-(-height // stride), -(-width // stride))
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize('height, width', [(33, 65), (97, 51)])
def test_maps_of_a_plain_model_at_any_size(height, width):
    """`features_only` gives what `forward_intermediates` does."""
    torch.manual_seed(0)
    backbone = timm.create_model(
        'eva_deit_tiny', dynamic_img_size=True, features_only=True, out_indices=(0, 1), **PLAIN
    ).eval()
    images = torch.randn(2, 3, height, width)
    with torch.no_grad():
        maps = backbone(images)
        expected = backbone.model.forward_intermediates(images, indices=[0, 1], intermediates_only=True)
    assert backbone.feature_info.reduction() == [16, 16]
    for a, b in zip(maps, expected, strict=True):
        assert a.shape == (2, 48, -(-height // 16), -(-width // 16))
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize('height, width', [(33, 65), (97, 51), (224, 100)])
def test_plain_features_at_any_size(height, width):
    torch.manual_seed(0)
    whole = timm.create_model('eva_deit_tiny', dynamic_img_size=True, **PLAIN).eval()
    images = torch.randn(2, 3, height, width)
    with torch.no_grad():
        final, maps = whole.forward_intermediates(images, indices=[0, 1], norm=True)
    grid = (-(-height // 16), -(-width // 16))
    assert [tuple(x.shape) for x in maps] == [(2, 48, *grid)] * 2
    torch.testing.assert_close(maps[1].flatten(2).transpose(1, 2), final)
