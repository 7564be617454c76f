"""Backbones for detection: maps at strides 4 to 64 in torchvision's form, from a pyramid or from a plain model."""

import math
from collections import OrderedDict
from typing import Dict, List, Tuple

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from timm.models import FeatureInfo
from torch import nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

__all__ = ['DetectionBackbone', 'SimpleFeaturePyramid']


class SimpleFeaturePyramid(nn.Module):
    """Maps at four strides from a plain model's last one (`Exploring Plain Vision Transformer Backbones for Object
    Detection`, arXiv 2203.16527, Section 3).

    The map at stride s is brought to s/4, s/2, s and 2s by transposed convolutions and pooling; each then takes a 1 × 1
    and a 3 × 3 convolution with LayerNorm.

    Args:
        in_channels: Channels of the map.
        out_channels: Channels of each map that comes out.
    """

    def __init__(self, in_channels: int, out_channels: int = 256) -> None:
        super().__init__()
        half, quarter = in_channels // 2, in_channels // 4
        scales: List[Tuple[List[nn.Module], int]] = [  # what resizes the map, and the channels that come out
            (
                [
                    nn.ConvTranspose2d(in_channels, half, 2, stride=2),
                    LayerNorm2d(half),
                    nn.GELU(),
                    nn.ConvTranspose2d(half, quarter, 2, stride=2),
                ],
                quarter,
            ),
            ([nn.ConvTranspose2d(in_channels, half, 2, stride=2)], half),
            ([], in_channels),
            ([nn.MaxPool2d(2)], in_channels),
        ]
        self.scales = nn.ModuleList(
            nn.Sequential(
                *resize,
                nn.Conv2d(channels, out_channels, 1, bias=False),
                LayerNorm2d(out_channels),
                nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
                LayerNorm2d(out_channels),
            )
            for resize, channels in scales
        )

    def forward(self, x: torch.Tensor) -> List[torch.Tensor]:
        """`(B, in_channels, H, W)` to four maps of out_channels: 4H × 4W, 2H × 2W, H × W and H/2 × W/2."""
        return [scale(x) for scale in self.scales]


def _at_power_of_two(x: torch.Tensor, stride: float, size: Tuple[int, int]) -> torch.Tensor:
    """A map `(B, C, H, W)` of images of `size` at the power of two that is nearest to its stride in pixels.

    torchvision takes the stride of a map for a power of two, or for a whole number of pixels. The result has
    its places where a map of that stride has them. What the model has padded is cut off, an edge that pooling dropped
    is repeated.
    """
    target = 2 ** round(math.log2(stride))
    if target == stride:
        return x
    x = F.pad(x, (0, 1, 0, 1), mode='replicate')
    x = F.interpolate(x, scale_factor=stride / target, mode='bilinear', align_corners=False)
    return x[..., : -(-size[0] // target), : -(-size[1] // target)]


class DetectionBackbone(nn.Module):
    """A timm model as a backbone of torchvision's detectors: maps '0' to '3' and 'pool', each of `out_channels`.

    Maps whose strides are no powers of two, as those of patches of 14, are resized to the nearest: 4, 8, 16, 32.

    A detector normalises images itself, by ImageNet's mean and deviation unless it is told those of the weights:
    `data = timm.data.resolve_data_config(model=features)`, then `image_mean=data['mean'], image_std=data['std']`.

    Args:
        features: A model made with `features_only=True`. The four maps of a pyramid go through a feature pyramid
            network; the last map of a plain model (made with `dynamic_img_size=True`) through a `SimpleFeaturePyramid`.
        out_channels: Channels of each map.

    Raises:
        ValueError: a model made without `features_only=True`, or a pyramid of other than four maps.
    """

    def __init__(self, features: nn.Module, out_channels: int = 256) -> None:
        super().__init__()
        info = getattr(features, 'feature_info', None)
        if not isinstance(info, FeatureInfo):
            raise ValueError(
                f'{type(features).__name__} gives no maps: make it with features_only=True, which timm.create_model '
                f'and evavit.load_converted take'
            )
        strides, channels = info.reduction(), info.channels()
        self.features = features
        self.out_channels = out_channels
        plain = len(set(strides)) == 1
        if not plain and len(strides) != 4:
            raise ValueError(f'maps at strides {strides}: a pyramid of four is needed, out_indices=(0, 1, 2, 3)')
        self.simple = SimpleFeaturePyramid(channels[-1], out_channels) if plain else None
        self.fpn = None if plain else FeaturePyramidNetwork(channels, out_channels)
        self.strides = [strides[-1] / 4 * 2**i for i in range(4)] if plain else strides
        self.pool = LastLevelMaxPool()

    def forward(self, images: torch.Tensor) -> Dict[str, torch.Tensor]:
        """Images `(B, 3, height, width)`, sides divisible by 32, to maps by their names, finest first."""
        maps = self.features(images)
        if self.simple is not None:
            maps = self.simple(maps[-1])
        elif self.fpn is not None:
            maps = list(self.fpn(OrderedDict((str(i), x) for i, x in enumerate(maps))).values())
        size = images.shape[-2], images.shape[-1]
        maps = [_at_power_of_two(x, stride, size) for x, stride in zip(maps, self.strides, strict=True)]
        maps, names = self.pool(maps, maps, [str(i) for i in range(len(maps))])
        return OrderedDict(zip(names, maps, strict=True))
