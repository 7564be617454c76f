"""The device path on CPU tensors: the images of the CPU path one by one, from any place, with any number of workers."""

import io
import os
import signal
import threading
from multiprocessing import active_children

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from training.data.device.pictures import config, epoch, jpeg, levels, loader, photographs, undecodable, write

from evavit.errors import UserError
from evavit.training import data
from evavit.training.data.decode import Jpeg, decode
from evavit.training.data.device import Draws
from evavit.training.data.device import decode as device_decode
from evavit.training.data.device.resample import resample
from evavit.training.data.images import CheckedImages
from evavit.training.sections import DataConfig, MachineConfig
from evavit.training.stalls import Watchdog

DEVICES = ['cpu', pytest.param('cuda', marks=pytest.mark.gpu)]
RECIPE = dict(aa='rand-m9-mstd0.5-inc1', train_interpolation='bicubic', scale=[0.08, 1.0])


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    return write(tmp_path_factory.mktemp('photos'), 13)


@pytest.mark.parametrize(
    'augment',
    [
        RECIPE,
        dict(aa='rand-n3-p0.8-mstd101-mmax12-tweights', train_interpolation='random', vflip=0.5),
        dict(aa='original-mstd0.5', train_interpolation='bilinear'),
        dict(aa='3a', color_jitter=0.3),
        dict(color_jitter=0.4, ratio=[0.5, 2.0]),
        dict(no_aug=True),
    ],
    ids=lambda augment: '-'.join(map(str, augment.values())),
)
def test_every_image_is_the_cpu_path_s(photos, augment):
    """Same crop, flips, operations and magnitudes; pixels to within what the operators' tests say."""
    ours, theirs = (epoch(loader(photos, where, **augment)) for where in ('any', 'cpu'))
    assert len(ours) == len(theirs) == 3
    for (images, target), (expected, labels) in zip(ours, theirs, strict=True):
        assert torch.equal(target, labels)
        assert levels(images, expected).flatten(1).mean(1).max() < 0.05


@pytest.mark.parametrize('size', [(3, 64, 64), (3, 48, 64)])
def test_validation_is_the_cpu_path_s(photos, size):
    made = []
    for where in ('any', 'cpu'):
        dataset, _ = data.open_dataset(DataConfig(data_dir=str(photos)), 'validation', batch_size=5)
        machine = MachineConfig(workers=0, augment_device=where)
        rest = dict(batch_size=5, machine=machine, device=torch.device('cpu'))
        made.append(list(data.eval_loader(dataset, config(size), **rest)))
    for (images, target), (expected, labels) in zip(*made, strict=True):
        assert torch.equal(target, labels) and torch.equal(images, expected)


def test_any_place_any_workers_any_processes(photos):
    """With erasing: boxes follow from the image's place, what fills them from the batch's."""
    erasing = dict(reprob=0.9, remode='pixel', recount=2)
    whole = epoch(loader(photos, 'any', **RECIPE, **erasing))
    for workers, first in ((2, 1), (1, 0), (0, 2)):
        rest = epoch(loader(photos, 'any', workers=workers, **RECIPE, **erasing), first=first)
        for (images, target), (expected, labels) in zip(rest, whole[first:], strict=True):
            assert torch.equal(images, expected) and torch.equal(target, labels)
    alike = epoch(loader(photos, 'any', **RECIPE))
    boxes = [(one != other).flatten(1).any(1) for (one, _), (other, _) in zip(whole, alike, strict=True)]
    assert torch.cat(boxes).any(), 'nothing was erased'


def test_the_cpu_path_where_pytorch_resizes(photos):
    """Images large enough for it: the same batches from any place with any workers, and the device path's within what
    rounds in another way."""
    settings = dict(size=(3, 112, 112), **RECIPE)
    whole, device = (epoch(loader(photos, where, **settings)) for where in ('cpu', 'any'))
    for workers, first in ((2, 1), (1, 0), (0, 2)):
        rest = epoch(loader(photos, 'cpu', workers=workers, **settings), first=first)
        for (images, target), (expected, labels) in zip(rest, whole[first:], strict=True):
            assert torch.equal(images, expected) and torch.equal(target, labels)
    apart = torch.cat(
        [levels(one, other).flatten(1).mean(1) for (one, _), (other, _) in zip(whole, device, strict=True)]
    )
    assert apart.mean() < 0.05 and apart.max() < 0.3


def test_erased_boxes_have_timm_s_distribution(photos):
    """Share of images, share of pixels: 0.25 and, of those, 2 % to a third of the image."""
    batches = epoch(loader(photos, 'any', reprob=0.5, remode='const', color_jitter=0.0, scale=[1.0, 1.0]), epoch=1)
    for number in range(2, 12):
        batches += epoch(loader(photos, 'any', reprob=0.5, remode='const', color_jitter=0.0), epoch=number)
    shares = torch.cat([(images == 0).all(1).float().mean((1, 2)) for images, _ in batches])
    erased = shares[shares > 0.015]
    assert 0.3 < len(erased) / len(shares) < 0.7 and erased.max() < 0.37


def test_repeated_augmentation(photos):
    ours, theirs = (epoch(loader(photos, where, aug_repeats=3, **RECIPE)) for where in ('any', 'cpu'))
    for (images, target), (expected, labels) in zip(ours, theirs, strict=True):
        assert torch.equal(target, labels) and levels(images, expected).mean() < 0.05


def test_what_goes_to_the_decoder():
    image = photographs(48, 40)[0]

    def kept(content):
        return isinstance(decode(io.BytesIO(content), 'RGB', jpeg_as='file'), Jpeg)

    for subsampling in (0, 1, 2):
        assert kept(jpeg(image, subsampling=subsampling))
    assert kept(jpeg(image) + b'more') and kept(jpeg(image, comment=b'\xff\xd9'))
    assert not kept(jpeg(image, progressive=True)) and not kept(jpeg(image.convert('L')))
    assert not kept(jpeg(image.convert('CMYK'))) and not kept(jpeg(image, keep_rgb=True))
    png = io.BytesIO()
    image.save(png, 'PNG')
    assert not kept(png.getvalue())
    with pytest.raises(Exception, match='truncated'):
        decode(io.BytesIO(jpeg(image)[:-200]), 'RGB', jpeg_as='file')
    assert isinstance(decode(io.BytesIO(jpeg(image)), 'L', jpeg_as='file'), Image.Image)


def test_other_formats_and_bad_images_join_the_batch(tmp_path):
    """What nvJPEG does not take is the CPU's work; what nobody reads is counted and replaced, as in the CPU path."""
    root = write(tmp_path, 8)
    photographs(50, 60)[0].save(root / 'train' / '0' / '100.png')
    (root / 'train' / '0' / '101.jpg').write_bytes(jpeg(photographs(60, 50)[1], progressive=True))
    (root / 'train' / '1' / '102.jpg').write_bytes(jpeg(photographs(60, 50)[1])[:300])
    (root / 'train' / '1' / '103.jpg').write_bytes(jpeg(photographs(60, 50)[1].convert('CMYK')))
    both = [loader(root, where, **RECIPE) for where in ('any', 'cpu')]
    ours, theirs = (epoch(one) for one in both)
    for (images, target), (expected, labels) in zip(ours, theirs, strict=True):
        assert torch.equal(target, labels) and levels(images, expected).flatten(1).mean(1).max() < 0.05
    assert both[0].dataset.bad.count == 1


def test_files_that_the_decoder_refuses(photos, monkeypatch):
    """They are read again by the CPU; one that it cannot read either is counted, and another takes its place."""
    expected = epoch(loader(photos, 'any', **RECIPE))
    refused = []

    def fragile(file):
        if len(refused) < 2:
            refused.append(file)
            return RuntimeError('nvJPEG says no')
        return with_pillow(file)

    with_pillow = device_decode._with_pillow
    monkeypatch.setattr(device_decode, '_with_pillow', fragile)
    again = epoch(loader(photos, 'any', **RECIPE))
    for (images, _), (others, _) in zip(again, expected, strict=True):
        assert torch.equal(images, others)
    assert len(refused) == 2


@pytest.mark.parametrize('device', DEVICES)
def test_a_file_that_nobody_decodes_is_counted_and_replaced(device, tmp_path):
    root, broken = write(tmp_path, 6), undecodable(photographs(80, 60)[0])
    (root / 'train' / '0' / '100.jpg').write_bytes(broken)
    assert isinstance(decode(io.BytesIO(broken), 'RGB', jpeg_as='file'), Jpeg)
    loading = loader(root, 'any', device=device, workers=1, batch_size=7, **RECIPE)
    batches = epoch(loading, device=device, batch_size=7)
    assert len(batches) == 1 and batches[0][0].isfinite().all()
    assert loading.dataset.bad.count == 1


def test_an_epoch_that_is_left_ends_its_thread(photos):
    def threads():
        return [thread for thread in threading.enumerate() if 'fill' in repr(getattr(thread, '_target', ''))]

    loading = loader(photos, 'any', workers=1, **RECIPE)
    batches = iter(loading)
    next(batches)
    assert len(threads()) == 1
    del batches
    assert not threads()
    assert len(epoch(loading)) == 3 and not threads()


def test_an_error_of_the_thread_reaches_the_loop(photos, monkeypatch):
    loading = loader(photos, 'any', workers=1, **RECIPE)
    monkeypatch.setattr(loading.maker, 'decode', None)
    with pytest.raises(AttributeError):
        epoch(loading)


def test_a_batch_is_decoded_in_bounded_pieces(photos, monkeypatch):
    expected = epoch(loader(photos, 'any', **RECIPE))
    assert list(device_decode.pieces([5, 5, 5])) == [slice(0, 3)]
    monkeypatch.setattr(device_decode, 'PIXELS', 20_000)
    assert list(device_decode.pieces([30_000, 10_000, 10_000, 1])) == [slice(0, 1), slice(1, 3), slice(3, 4)]
    for (images, _), (others, _) in zip(epoch(loader(photos, 'any', **RECIPE)), expected, strict=True):
        assert torch.equal(images, others)


@pytest.mark.parametrize(
    'augment, words, remedy',
    [
        (dict(aa='augmix-m5'), 'AugMixAugment', '--augment-device cpu'),
        (dict(aa='rand-m9', train_interpolation='lanczos'), 'lanczos', '--train-interpolation bicubic'),
    ],
)
def test_what_the_device_path_does_not_have_is_a_line(photos, augment, words, remedy):
    with pytest.raises(UserError, match=words) as error:
        loader(photos, 'any', **augment)
    assert remedy in str(error.value) and '\n' not in str(error.value)


def test_without_a_gpu_it_is_a_line(photos):
    with pytest.raises(UserError, match='needs a GPU') as error:
        loader(photos, 'cuda', **RECIPE)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('device', DEVICES)
def test_a_cache_changes_nothing(device, tmp_path):
    """Images of several sizes and formats, two of which are bad, one for the decoder alone: the same batches, the same
    count in each epoch. The crop of an image in another's place is drawn on the size of the one that is bad."""
    root = write(tmp_path, 9)
    photographs(50, 60)[0].save(root / 'train' / '0' / '100.png')
    (root / 'train' / '0' / '101.jpg').write_bytes(undecodable(photographs(200, 40)[0]))
    (root / 'train' / '1' / '102.jpg').write_bytes(jpeg(photographs(60, 50)[1])[:300])
    settings = dict(device=device, **RECIPE, reprob=0.5)
    plain, kept = loader(root, 'any', **settings), loader(root, 'any', workers=1, cache=True, **settings)
    counts = []
    for number in range(3):
        for loading in (plain, kept):
            loading.dataset.bad.begin()
        expected, made = (epoch(loading, epoch=number, device=device) for loading in (plain, kept))
        assert len(made) == len(expected) == 3
        for (images, target), (others, labels) in zip(made, expected, strict=True):
            assert torch.equal(images, others) and torch.equal(target, labels)
        counts.append(kept.dataset.bad.count)
        assert counts[-1] == plain.dataset.bad.count
    assert max(counts) == 2


def test_a_cache_that_fills_the_device_is_a_line(photos, monkeypatch):
    """Memory mostly ends in the decoder."""

    def full(files, **_):
        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 MiB')

    monkeypatch.setattr(device_decode, 'decode_jpeg', full)
    monkeypatch.setattr(device_decode.Decoder, 'start', lambda self, files: (self._decode(list(files)), None))
    with pytest.raises(UserError, match=r'--cache-device: cpu is full after 0 of 13 images, 0\.0 GiB; leave it out$'):
        loader(photos, 'any', cache=True)


def test_the_watchdog_looks_at_what_a_cache_reads(photos):
    """Where an image never comes, --stall-timeout names it there too."""
    watched = []

    class Noting(Watchdog):
        def batches(self, batches, dataset):
            watched.append(dataset.place(0))
            return batches

    dataset, _ = data.open_dataset(DataConfig(data_dir=str(photos)), 'train', batch_size=4)
    machine = MachineConfig(workers=0, augment_device='any', cache_device=True)
    rest = dict(batch_size=4, machine=machine, device=torch.device('cpu'), watchdog=Noting())
    data.eval_loader(dataset, config(), **rest)
    assert watched == [dataset.place(0)]


def test_a_signal_to_what_reads_a_cache_does_no_harm(photos, monkeypatch):
    """Schedulers send SIGTERM to every process of a job, and the run has still to save."""
    fetch = CheckedImages.fetch

    def signalled(dataset, index):
        if torch.utils.data.get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGTERM)
        return fetch(dataset, index)

    monkeypatch.setattr(CheckedImages, 'fetch', signalled)
    assert len(loader(photos, 'any', workers=1, cache=True).dataset) == 13


def test_a_cached_validation_is_the_same(tmp_path):
    """A bad image is counted in each validation. Where all is on the device no loading processes start."""
    root = write(tmp_path, 9)
    (root / 'validation' / '1' / '102.jpg').write_bytes(jpeg(photographs(60, 50)[1])[:300])
    where = DataConfig(data_dir=str(root), max_bad_images=1.0)
    made, counts, children = [], [], []
    for cache in (False, True):
        dataset, _ = data.open_dataset(where, 'validation', batch_size=4)
        machine = MachineConfig(workers=2, augment_device='any', cache_device=cache)
        loading = data.eval_loader(dataset, config(), batch_size=4, machine=machine, device=torch.device('cpu'))
        for _ in range(2):
            loading.dataset.bad.begin()
            batches = Watchdog(60).batches(loading, loading.dataset)
            first = next(batches)
            children.append(len(active_children()))
            made.append([first, *batches])
            counts.append(loading.dataset.bad.count)
    assert children == [2, 2, 0, 0] and counts == [1] * 4
    for batches in made[1:]:
        for (images, target), (expected, labels) in zip(batches, made[0], strict=True):
            assert torch.equal(images, expected) and torch.equal(target, labels)


@pytest.mark.parametrize('crop_pct', [0.9, 1.0, 1.15])
@pytest.mark.parametrize('size', [(500, 375), (375, 500), (61, 60), (90, 31)])
def test_validation_crops_where_timm_does(crop_pct, size):
    """A crop_pct above 1 makes the image smaller than the crop, which torchvision pads with black."""
    image = photographs(*size)[0]
    transform = timm.data.create_transform((3, 64, 64), crop_pct=crop_pct, interpolation='bicubic', use_prefetcher=True)
    expected = image
    for part in transform.transforms[:2]:
        expected = part(expected)
    sample = Draws(transform, (3, 64, 64))(image)
    assert np.array_equal(sample.content, np.asarray(expected).transpose(2, 0, 1))
    source = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    assert np.array_equal(resample([source], torch.tensor([sample.window]), 64, 64)[0].numpy(), sample.content)


def test_a_cache_needs_few_open_files(tmp_path):
    """Of images that nvJPEG does not take; a tensor that a loading process hands over is an open file."""
    resource = pytest.importorskip('resource')
    root = write(tmp_path, 3)
    for label in '01':
        for number in range(100, 250):
            image = photographs(40, 30)[number % 2]
            image.save(root / 'train' / label / f'{number}.png')
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir('/dev/fd'))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 100, before[1]))
    try:
        loading = loader(root, 'any', workers=2, cache=True)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert len(loading.dataset) == 303


def test_a_filter_that_the_device_has_not():
    transform = timm.data.create_transform((3, 64, 64), interpolation='hamming', use_prefetcher=True)
    with pytest.raises(
        UserError, match=r'does not resize by hamming; set --interpolation to one of nearest, .*or give'
    ):
        Draws(transform, (3, 64, 64))(photographs(90, 70)[0])


def test_what_a_cache_will_take(photos):
    dataset, _ = data.open_dataset(DataConfig(data_dir=str(photos)), 'validation', batch_size=5)
    sizes = [dataset.load(index)[0].size for index in range(len(dataset))]
    assert data.cache_size(dataset) == pytest.approx(sum(3 * width * height for width, height in sizes), abs=3)


def test_a_cache_needs_the_device_path(photos):
    with pytest.raises(UserError, match='--augment-device cuda'):
        loader(photos, 'cpu', cache=True)
