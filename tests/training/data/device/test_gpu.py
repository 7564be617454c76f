"""The device path on a GPU. With -s, a table of what each part takes."""

import io
import statistics
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from runs import DRAWN, MODEL, QUICK, ROOT, assert_same_run, load_script, signal_at
from training.data.device.pictures import epoch, jpeg, levels, loader, photographs, write

from evavit.errors import PREEMPTED, run_script
from evavit.training import data
from evavit.training.data.decode import Jpeg, decode
from evavit.training.data.device import pipeline
from evavit.training.data.device.decode import Decoder
from evavit.training.distributed import Process
from evavit.training.sections import BatchConfig

pytestmark = pytest.mark.gpu

RECIPE = dict(aa='rand-m9-mstd0.5-inc1', train_interpolation='bicubic', scale=[0.08, 1.0], reprob=0.25)
FULL = dict(size=(3, 224, 224), batch_size=256, workers=8)


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    return write(tmp_path_factory.mktemp('photos'), 24, sizes=((500, 375), (375, 500), (333, 500), (90, 90)))


@pytest.fixture(scope='module')
def many(tmp_path_factory):
    """Photographs of ImageNet's usual size, as the loader's benchmark reads them."""
    root = tmp_path_factory.mktemp('many')
    subprocess.run([sys.executable, ROOT / 'tools' / 'build_photos.py', root, '--images', '512'], check=True)
    return root


def epoch_of(loading, number, batch_size=256):
    process = Process(torch.device('cuda'), 0, 0, 1)
    return data.epoch_batches(loading, BatchConfig(batch_size=batch_size), seed=3, process=process, epoch=number)


def test_nvjpeg_beside_pillow():
    """The decoders' own difference: 8-bit levels, by subsampling."""
    decoder = Decoder(torch.device('cuda'))
    for subsampling, bound in ((0, 1), (1, 4), (2, 4)):
        files = [jpeg(image, subsampling=subsampling) for image in photographs(500, 375, 8)]
        assert all(isinstance(decode(io.BytesIO(file), 'RGB', jpeg_as='file'), Jpeg) for file in files)
        made = decoder([torch.frombuffer(bytearray(file), dtype=torch.uint8) for file in files])
        for file, image in zip(files, made, strict=True):
            expected = np.array(Image.open(io.BytesIO(file)).convert('RGB')).astype(int)
            difference = np.abs(image.permute(1, 2, 0).cpu().numpy() - expected)
        print(f'\nnvJPEG, subsampling {subsampling}: mean {difference.mean():.3f}, most {difference.max()}')
        assert difference.mean() < bound


def test_batches_beside_the_cpu_path(photos):
    """Image by image: what is left is the decoder's difference, and what operations make of it."""
    settings = dict(size=(3, 224, 224), batch_size=8, aa=RECIPE['aa'], train_interpolation='bicubic')
    ours = epoch(loader(photos, 'cuda', device='cuda', workers=2, **settings), device='cuda', batch_size=8)
    theirs = epoch(loader(photos, 'cpu', **settings), batch_size=8)
    apart = []
    for (images, target), (expected, labels) in zip(ours, theirs, strict=True):
        assert torch.equal(target, labels)
        apart += levels(images, expected).flatten(1).mean(1).tolist()
    print(f'\nimages beside the CPU path, levels: median {statistics.median(apart):.3f}, most {max(apart):.2f}')
    assert statistics.median(apart) < 2 and max(apart) < 25  # equalize and solarize enlarge a level's difference


def test_two_passes_are_equal_to_the_bit_from_any_place(photos):
    settings = dict(device='cuda', size=(3, 224, 224), batch_size=4, **{**RECIPE, 'reprob': 0.9})
    whole = epoch(loader(photos, 'cuda', workers=2, **settings), device='cuda')
    for workers, first in ((2, 0), (0, 0), (4, 3)):
        rest = epoch(loader(photos, 'cuda', workers=workers, **settings), first=first, device='cuda')
        for (images, target), (expected, labels) in zip(rest, whole[first:], strict=True):
            assert torch.equal(images, expected) and torch.equal(target, labels)


def test_a_step_that_keeps_the_gpu_busy_changes_nothing(photos):
    """Memory of batches under way is not written over, by the decoder's stream or by the step's."""
    settings = dict(device='cuda', size=(3, 224, 224), batch_size=4, workers=2, **RECIPE)
    whole = epoch(loader(photos, 'cuda', **settings), device='cuda')
    busy = torch.randn(4096, 4096, device='cuda')
    seen = []
    loading = loader(photos, 'cuda', **settings)
    for images, _ in epoch_of(loading, 1, batch_size=4):
        for _ in range(20):
            busy = torch.nn.functional.normalize(busy @ busy)
        seen.append(images + 0 * busy[0, 0])
        del images
    for images, (expected, _) in zip(seen, whole, strict=True):
        assert torch.equal(images.cpu(), expected)


def test_kill_and_resume(tmp_path, capfd, monkeypatch):
    """train.py stops in an epoch and goes on: the same run, to the bit, as one that was left alone."""
    images = write(tmp_path / 'images', 24)
    flags = [*MODEL, *QUICK, *DRAWN, '--device', 'cuda', '--augment-device', 'cuda', '--resume', 'auto']
    flags += ['--data-dir', str(images), '--output', str(tmp_path), '--num-classes', '2', '--epochs', '2']

    def train(name):
        return run_script(load_script('train').main, [*flags, '--experiment', name])

    torch.use_deterministic_algorithms(True, warn_only=True)
    assert train('whole') == 0, capfd.readouterr()
    signal_at(monkeypatch, [8])
    assert train('parts') == PREEMPTED
    monkeypatch.undo()
    assert train('parts') == 0, capfd.readouterr()
    torch.use_deterministic_algorithms(False)
    assert_same_run(tmp_path / 'whole', tmp_path / 'parts')


def test_what_each_part_takes(many):
    """Images a second of the loader alone, and milliseconds that the host and the GPU spend on a batch of 256."""
    loading = loader(many, 'cuda', device='cuda', **FULL, **RECIPE, least=8 * 256)
    maker, raw = loading.maker, []
    for batch in loading.loader:
        raw.append(batch)
        if len(raw) == 8:
            break
    table = {}

    def timed(name, function):
        def call(*args):
            torch.cuda.synchronize()
            begun = time.perf_counter()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            made = function(*args)
            end.record()
            host = time.perf_counter() - begun
            torch.cuda.synchronize()
            table.setdefault(name, []).append((1e3 * host, start.elapsed_time(end)))
            return made

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(maker.decode, 'start', timed('decode', maker.decode.start))
        patch.setattr(maker, '_resampled', timed('crop and resize', maker._resampled))
        patch.setattr(pipeline, 'apply_steps', timed('operations', pipeline.apply_steps))
        patch.setattr(pipeline, 'normalise', timed('normalise, erase', pipeline.normalise))
        for batch in raw * 2:
            maker(batch, 0)
    print('\npart                 host ms   GPU ms   of a batch of 256')
    for name, values in table.items():
        host, device = (statistics.median(column) for column in zip(*values[4:], strict=True))
        print(f'{name:20} {host:7.2f} {device:8.2f}')
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for batch in raw * 4:
        maker(batch, 0)
    torch.cuda.synchronize()
    print(f'one after the other, files at hand: {32 * 256 / (time.perf_counter() - begun):.0f} images a second')
    for workers in (8, 14):
        loading = loader(many, 'cuda', device='cuda', **{**FULL, 'workers': workers, 'least': 40_000}, **RECIPE)
        begun, held = 0.0, 2 * workers + 4
        for number, _ in enumerate(epoch_of(loading, 1)):
            if number == held:
                torch.cuda.synchronize()
                begun = time.perf_counter()
        torch.cuda.synchronize()
        rate = (number - held) * 256 / (time.perf_counter() - begun)
        print(f'loader alone, {workers} workers: {rate:.0f} images a second')
    assert rate > 1000
