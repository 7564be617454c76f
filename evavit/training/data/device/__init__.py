"""Augmentation on the device, image by image as the CPU path draws it.

`draws` takes each image's draws from timm's own transforms, in the loading processes; `resample` and `operators` do to
a batch of tensors what Pillow does to an image; `decode` has nvJPEG; `pipeline` runs all of it ahead of the training
step; `cache` keeps a whole data set on the device.
"""

from .cache import cache_size, cached
from .draws import Draws, Sample
from .pipeline import DeviceLoader, Maker, collate

__all__ = ['DeviceLoader', 'Draws', 'Maker', 'Sample', 'cache_size', 'cached', 'collate']
