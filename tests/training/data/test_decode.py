"""The decoder: odd images are read as what they show, broken and costly ones have a reason."""

import ast
import io
import os
import socket
import struct
import time
import warnings

import faults
import numpy as np
import pytest
import torch
from PIL import Image
from programs import ROOT
from timm.data import create_transform

from evavit.files import open_regular
from evavit.training.data.decode import BadImageError, decode, is_turned, read_file

GOOD, BAD, BOMBS = faults.good_files(), faults.bad_files(), faults.bombs()


def read(content, mode='RGB'):
    return np.asarray(decode(io.BytesIO(content), mode)).astype(float)


@pytest.mark.parametrize('mode', ['RGB', 'L'])
@pytest.mark.parametrize('name', GOOD)
def test_odd_images_are_read(name, mode):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        image = decode(io.BytesIO(GOOD[name]), mode)
    assert image.mode == mode
    for training in (True, False):
        channels = len(image.getbands())
        transform = create_transform(
            (channels, 32, 32), is_training=training, mean=(0.5,) * channels, std=(0.5,) * channels
        )
        assert transform(image).shape[1:] == (32, 32)


@pytest.mark.parametrize('built_without_libjpeg', [False, True])
def test_jpegs_as_tensors_have_the_same_pixels(monkeypatch, built_without_libjpeg):
    """Those of usual forms; what else there is stays an image. A file that torchvision refuses is Pillow's."""
    if built_without_libjpeg:
        monkeypatch.setattr('evavit.training.data.decode.decode_jpeg', lambda *_, **__: refuse())
    picture = faults.picture(side=61)
    for options in (dict(subsampling=0), dict(subsampling=1), dict(subsampling=2), dict(quality=30, comment=b'\xff')):
        content = faults.encode(picture, 'JPEG', **options)
        made = decode(io.BytesIO(content), 'RGB', 'tensor')
        assert made.dtype == torch.uint8 and np.array_equal(made.permute(1, 2, 0).numpy(), read(content))
    for content in (GOOD['plain.png'], GOOD['cmyk.jpg'], faults.encode(picture, 'JPEG', progressive=True)):
        assert np.array_equal(np.asarray(decode(io.BytesIO(content), 'RGB', 'tensor')), read(content))
    assert isinstance(decode(io.BytesIO(faults.encode(picture, 'JPEG')), 'L', 'tensor'), Image.Image)


def refuse():
    raise RuntimeError('decode_jpeg: torchvision not compiled with libjpeg support')


@pytest.mark.parametrize('jpeg_as', ['image', 'tensor'])
@pytest.mark.parametrize('name', BAD)
def test_broken_images_have_a_reason(name, jpeg_as):
    content, words = BAD[name]
    with pytest.raises(BadImageError) as error:
        decode(io.BytesIO(content), 'RGB', jpeg_as)
    assert words in str(error.value) and '\n' not in str(error.value) and '0x' not in str(error.value)


def test_odd_images_show_what_they_hold():
    plain = read(GOOD['plain.png'])
    for name in ('png_called.jpg', 'tiff_called.png', 'bmp_called.png'):
        assert np.array_equal(read(GOOD[name]), plain), name
    # Pillow's own convert gives white for nearly all of 16 bits; ink and light are not mixed up in CMYK.
    ramp = read(GOOD['sixteen.png'])[:, 0, 0]
    assert np.abs(ramp - np.linspace(0, 255, len(ramp))).max() <= 1
    assert np.abs(read(GOOD['cmyk.jpg']) - plain).mean() < 12
    palette = Image.open(io.BytesIO(GOOD['palette.png']))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        assert np.array_equal(read(GOOD['palette.png']), np.asarray(palette.convert('RGB')).astype(float))
    assert read(GOOD['one_pixel.png']).tolist() == [[[200, 100, 50]]]


def tiff(values, order='<', photometric=1, bits=16, kind=1):
    """A TIFF of one row of grey pixels."""
    data = np.asarray(values).astype(f'{order}{"iu"[kind == 1]}{bits // 8}').tobytes()
    if bits == 12:
        data = bytes.fromhex(''.join(f'{value:03x}' for value in values))
    tags = {
        256: len(values),
        257: 1,
        258: bits,
        259: 1,
        262: photometric,
        273: 8,
        277: 1,
        278: 1,
        279: len(data),
        339: kind,
    }
    place = 8 + len(data) + len(data) % 2
    content = [b'II*\0' if order == '<' else b'MM\0*', struct.pack(f'{order}I', place), data.ljust(place - 8, b'\0')]
    content += [struct.pack(f'{order}H', len(tags))]
    content += [struct.pack(f'{order}HHII', tag, 4, 1, value) for tag, value in tags.items()]
    return b''.join(content) + bytes(4)


def planes(bits):
    """A TIFF of two pixels, black and red, each channel in a plane of its own."""
    kind = f'<u{bits // 8}'
    data = np.array([[0, 2**bits - 1], [0, 0], [0, 0]], kind).tobytes()
    size, many = len(data) // 3, 8 + len(data)  # where the values lie that are three
    extra = np.array([bits] * 3, '<u4').tobytes() + np.array([8, 8 + size, 8 + 2 * size, *[size] * 3], '<u4').tobytes()
    tags = [(256, 1, 2), (257, 1, 1), (258, 3, many), (259, 1, 1), (262, 1, 2), (273, 3, many + 12)]
    tags += [(277, 1, 3), (278, 1, 1), (279, 3, many + 24), (284, 1, 2)]
    content = b'II*\0' + struct.pack('<I', many + len(extra)) + data + extra + struct.pack('<H', len(tags))
    return content + b''.join(struct.pack('<HHII', tag, 4, count, value) for tag, count, value in tags) + bytes(4)


def test_planes_of_a_tiff():
    """Pillow takes those of 16 bits for 8."""
    assert read(planes(8)).tolist() == [[[0, 0, 0], [255, 0, 0]]]
    with pytest.raises(BadImageError, match='16 bits in a plane for each channel'):
        read(planes(16))


def test_other_forms_of_sixteen_bits():
    values, shown = [0, 256, 32768, 65535], [[0, 1, 128, 255]]
    assert read(tiff(values), 'L').tolist() == read(tiff(values, '>'), 'L').tolist() == shown
    assert read(tiff([0, 65535], photometric=0), 'L').tolist() == [[255, 0]]  # as of 8 bits
    assert read(tiff([0, 255], photometric=0, bits=8), 'L').tolist() == [[255, 0]]
    assert read(tiff([0, 16, 2048, 4095], bits=12), 'L').tolist() == shown
    pgm = b'P5 4 1 65535\n' + np.array(values, '>u2').tobytes()
    assert read(pgm, 'L').tolist() == shown
    assert read(b'P2 2 1 1023\n0 1023\n', 'L').tolist() == [[0, 255]]
    image = Image.frombytes('I;16', (4, 1), np.array(values, '<u2').tobytes())
    for form, options in dict(PNG={}, JPEG2000=dict(irreversible=False), TIFF=dict(compression='tiff_lzw')).items():
        assert read(faults.encode(image, form, **options), 'L').tolist() == shown, form


@pytest.mark.parametrize(
    'values, about, words',
    [
        ([0, 63], dict(bits=32), 'integers of 32 bits'),
        ([0, 2**32 - 1], dict(bits=32), 'integers of 32 bits'),
        ([-1000, 1000], dict(bits=16, kind=2), 'pixels with a sign'),
        ([-1000, 1000], dict(bits=32, kind=2, order='>'), 'pixels with a sign'),
        ([-100, 100], dict(bits=8, kind=2), 'pixels with a sign'),
        ([0, 65535], dict(order='>', photometric=0), 'known format'),
    ],
)
def test_pixels_whose_range_is_not_known_are_refused(values, about, words):
    with pytest.raises(BadImageError, match=words):
        read(tiff(values, **about))


def outcome(content, jpeg_as):
    """What a file shows, (H, W, 3), or why it is not read."""
    try:
        image = decode(io.BytesIO(content), 'RGB', jpeg_as)
    except BadImageError as error:
        return str(error)
    assert image.dtype == torch.uint8 if isinstance(image, torch.Tensor) else image.mode == 'RGB'
    pixels = np.asarray(image.permute(1, 2, 0) if isinstance(image, torch.Tensor) else image)
    assert pixels.ndim == 3
    return pixels


@pytest.mark.timeout(60)
def test_mutated_files_are_read_or_refused():
    """500 files: an image of the mode or BadImageError, nothing else, with either decoder of JPEGs."""
    rng = np.random.default_rng(1)
    contents = list(GOOD.values())
    readable = 0
    for number in range(500):
        content = faults.mutate(contents[number % len(contents)], rng)
        image, tensor = (outcome(content, jpeg_as) for jpeg_as in ('image', 'tensor'))
        assert np.array_equal(image, tensor)  # pixels, or the reason
        readable += isinstance(image, np.ndarray)
    assert 50 < readable < 450  # the damage is neither harmless nor total


@pytest.mark.timeout(60)
@pytest.mark.parametrize('name', BOMBS)
def test_costly_files_are_refused(name):
    """Most take Pillow 5 to 60 seconds, or a gigabyte."""
    build, words = BOMBS[name]
    content, start = build(), time.process_time()
    with pytest.raises(BadImageError, match=words):
        decode(io.BytesIO(content), 'RGB')
    assert time.process_time() - start < 4


def test_usual_progressive_images_are_read():
    content = faults.encode(faults.picture(side=512), 'JPEG', progressive=True)
    assert read(content).shape == (512, 512, 3)
    # Markers in metadata, and after the end marker as in a phone's moving photos, are no scans.
    metadata = b'\xff\xe5\xff\xff' + b'\xff\xda\0\0' * 16383 + b'\0'
    padded = content[:2] + metadata * 100 + content[2:] + b'\xff\xda\0\0' * 200_000
    assert np.array_equal(read(padded), read(content))


@pytest.mark.timeout(30)
def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / 'pipe.png')
    (tmp_path / 'link.png').symlink_to('pipe.png')
    (tmp_path / 'device.png').symlink_to('/dev/zero')
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / 'socket.png'))
        for name in ('pipe.png', 'link.png', 'device.png', 'socket.png', '.'):
            with pytest.raises(OSError, match='not a regular file'):
                open_regular(tmp_path / name)


@pytest.mark.timeout(30)
def test_a_pipe_that_takes_the_place_of_a_file_does_not_block(tmp_path, monkeypatch):
    """Between the look at it and the opening."""
    (tmp_path / 'file.png').write_bytes(GOOD['plain.png'])
    os.mkfifo(tmp_path / 'pipe.png')
    looked = os.stat(tmp_path / 'file.png')
    monkeypatch.setattr(os, 'stat', lambda path: looked)
    with pytest.raises(OSError, match='not a regular file'):
        open_regular(tmp_path / 'pipe.png')


def test_whoever_opens_an_image_names_formats():
    """Pillow starts Ghostscript for a PostScript file of any name, unless it is told which formats to try."""
    calls = []
    for folder in ('evavit', 'examples', 'experiments', 'tools', 'docs'):
        for path in (ROOT / folder).rglob('*.py'):
            for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
                if isinstance(node, ast.Call) and ast.unparse(node.func) == 'Image.open':
                    calls.append((path.relative_to(ROOT).as_posix(), {word.arg for word in node.keywords}))
    assert len(calls) == 3 and all('formats' in words for _, words in calls), calls


def test_an_orientation_is_seen_and_not_applied(tmp_path):
    """Pillow applies that of a TIFF; damaged metadata says nothing."""
    exif = Image.Exif()
    for orientation in (1, 6, 9):
        exif[0x0112] = orientation
        for form in ('JPEG', 'PNG', 'WEBP', 'TIFF'):
            Image.new('RGB', (40, 30)).save(tmp_path / form, format=form, exif=exif)
            image = read_file(tmp_path / form, 'RGB')
            assert image.size == ((30, 40) if form == 'TIFF' and orientation == 6 else (40, 30))
            assert is_turned(image) == (orientation == 6 and form != 'TIFF'), (form, orientation)
    image = Image.new('RGB', (4, 4))
    image.info['exif'] = b'Exif\0\0II*\0' + b'\xff' * 9
    assert not is_turned(image) and not is_turned(Image.new('L', (4, 4)))
