"""Crop, resize and flip of many images at once, to the bit as Pillow's; the Triton kernels beside the plain form."""

import numpy as np
import pytest
import torch
from training.data.device.pictures import photographs

from evavit.training.data.device.draws import FILTERS, Window, cut
from evavit.training.data.device.resample import reach, resample, taps

DEVICES = ['cpu', pytest.param('cuda', marks=pytest.mark.gpu)]


def cases(filter):
    """Images of several sizes; windows that shrink, enlarge, keep the size, flip, keep a part, and reach outside."""
    images = [image for size in ((90, 70), (31, 200), (40, 36), (90, 70)) for image in photographs(*size)]
    windows = [
        Window(3, 5, 80, 60, 40, 36, 0, 0, 0, 0, filter),
        Window(20, 11, 17, 9, 40, 36, 0, 0, 1, 0, filter),
        Window(0, 0, 31, 200, 40, 36, 0, 0, 0, 1, filter),
        Window(0, 0, 31, 200, 60, 387, 10, 175, 1, 1, filter),
        Window(0, 0, 40, 36, 40, 36, 0, 0, 0, 0, filter),
        Window(1, 1, 1, 1, 40, 36, 0, 0, 0, 0, filter),
        Window(0, 0, 90, 70, 37, 33, -1, -1, 0, 0, filter),
        Window(0, 0, 90, 70, 35, 48, -2, 6, 1, 1, filter),
    ]
    sources = [torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous() for image in images]
    return images, sources, windows


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('name', sorted(FILTERS))
def test_windows_are_pillow_s(name, device):
    images, sources, windows = cases(FILTERS[name])
    expected = np.stack([cut(image, window, (40, 36)) for image, window in zip(images, windows, strict=True)])
    made = resample([source.to(device) for source in sources], torch.tensor(windows), 36, 40).cpu().numpy()
    if name == 'nearest':  # Pillow adds up its steps: of two neighbours as near it may take the other
        assert (made != expected).mean() < 0.1
    else:
        assert np.array_equal(made, expected)


def test_filters_may_differ_within_a_batch():
    images, sources, windows = cases(0)
    windows = [window._replace(filter=1 + number % 3) for number, window in enumerate(windows)]
    expected = np.stack([cut(image, window, (40, 36)) for image, window in zip(images, windows, strict=True)])
    assert np.array_equal(resample(sources, torch.tensor(windows), 36, 40).numpy(), expected)


@pytest.mark.interpreter
def test_kernels_are_the_plain_form():
    from evavit.training.data.device.kernels import resample_boxes

    _, sources, windows = cases(2)
    windows = torch.tensor(windows)
    most = [int(reach(windows, axis).max()) for axis in (0, 1)]
    made = resample_boxes(sources, windows, taps(windows, 0, 40, most[0]), taps(windows, 1, 36, most[1]))
    assert torch.equal(made, resample(sources, windows, 36, 40))
