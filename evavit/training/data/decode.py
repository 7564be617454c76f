"""The one decoder of images, for every source: what is an image, and how much it may cost to read.

Only the formats below are tried, by content: for some others Pillow starts a program. No file costs much more than the
largest image that is allowed: its bytes, pixels, pieces and scans are counted before, or while, it is read.
"""

import io
import math
import os
import re
import warnings
from dataclasses import dataclass
from typing import IO, Any, Literal, Tuple, Union

import numpy as np
import torch
from PIL import ExifTags, Image
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.functional import pil_to_tensor

from evavit.errors import MANY_FILES, first_line
from evavit.files import open_regular

FORMATS = ('JPEG', 'PNG', 'GIF', 'BMP', 'WEBP', 'TIFF', 'PPM', 'JPEG2000')
LONGEST = 100  # sides beyond 100:1: validation resizes by the shorter one, the other would then fill the memory
SCANS = 10  # of a progressive JPEG, as the usual ones have, at the largest size; more of them where it is smaller
SEGMENTS = 10_000  # of a JPEG: tables, metadata and scans
METADATA = 2**24  # bytes before the first scan of a JPEG
READ = 2**20  # bytes that are read at first, enough for nearly every image
READS = 200_000  # pieces that Pillow may take a file in; an image of any format has fewer, or more bytes in each
SLOW_PIXELS = 2**21  # of forms that Pillow decodes in Python, such as compressed BMP: a full-HD screen
LARGEST_JPEG = 2**24  # pixels of an image that is left to a GPU's decoder, so that a batch of them is bounded
MANY_PIECES = 'made of more pieces than an image is'
_MARKER = re.compile(rb'\xff([^\x00\x01\xd0-\xd8\xff])')  # one that has a length, or ends the image


class BadImageError(Exception):
    """An image that cannot be read; the text is the reason, in a few words."""


@dataclass(frozen=True)
class Jpeg:
    """A colour image that passed the checks and is left as it was read, for a GPU's decoder."""

    content: bytes
    size: Tuple[int, int]  # width, height
    name: str = ''  # in a stream, where no index leads to it


Decoded = Union[Image.Image, Jpeg, torch.Tensor]
JpegAs = Literal['image', 'file', 'tensor']


class _Content(io.BytesIO):
    """A file's bytes, which are given out in a bounded number of pieces: a small file can hold millions of chunks."""

    def __init__(self, content: bytes):
        super().__init__(content)
        self.left = READS + len(content) // 1024

    def read(self, size: Any = -1) -> bytes:
        self.left -= 1
        if self.left < 0:
            raise BadImageError(MANY_PIECES)
        return super().read(size)


def read_file(path: Union[str, os.PathLike], mode: str, jpeg_as: JpegAs = 'image') -> Decoded:
    """`decode` of a file. Raises BadImageError."""
    try:
        return decode(open_regular(path), mode, jpeg_as)
    except OSError as error:
        raise bad_image(error) from None


def decode(stream: IO[bytes], mode: str, jpeg_as: JpegAs = 'image') -> Decoded:
    """An image of `mode` (RGB or L) from an open file, closed afterwards. Raises BadImageError.

    What nvJPEG takes (a JPEG in colour, of one scan, with its end, in a usual form) is a `Jpeg` instead with `jpeg_as`
    'file', and with 'tensor' the same pixels as (3, H, W) of uint8, for which torchvision needs less memory.
    """
    try:
        with stream, warnings.catch_warnings():
            warnings.simplefilter('ignore')  # what matters is counted; Pillow's hints on metadata do not
            content = _read(stream)
            scans, whole = _count_scans(content) if content.startswith(b'\xff\xd8') else (0, False)
            pieces = _Content(content)
            image = Image.open(pieces, formats=FORMATS)
            check_size(image)
            _check_cost(image, scans, pieces)
            if jpeg_as != 'image' and whole and scans == 1 and mode == 'RGB' and _is_usual(image):
                return Jpeg(content, image.size) if jpeg_as == 'file' else _to_tensor(content, image)
            image.load()
            return to_mode(image, mode)
    except BadImageError:
        raise
    except Exception as error:  # each format has its own errors for broken content
        raise bad_image(error) from None


def _to_tensor(content: bytes, image: Image.Image) -> torch.Tensor:
    try:
        return decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), mode=ImageReadMode.RGB)
    except RuntimeError:  # the file is damaged, and Pillow says how; or this torchvision was built without libjpeg
        return pil_to_tensor(image)


def _read(stream: IO[bytes]) -> bytes:
    if not Image.MAX_IMAGE_PIXELS:
        return stream.read()
    content = stream.read(READ)  # Python would make room for all that it is asked to read
    if len(content) == READ:
        content += stream.read(4 * Image.MAX_IMAGE_PIXELS + 1 - READ)
    check_bytes(len(content))
    return content


def check_bytes(count: int) -> None:
    most = 4 * (Image.MAX_IMAGE_PIXELS or math.inf)
    if count > most:
        raise BadImageError(f'more than {most:,} bytes, four for each pixel of the largest image')


def check_size(image: Image.Image) -> None:
    width, height = image.size
    if Image.MAX_IMAGE_PIXELS and width * height > Image.MAX_IMAGE_PIXELS:
        raise BadImageError(f'{width} × {height} pixels, above the limit of {Image.MAX_IMAGE_PIXELS:,}')
    if max(width, height) > LONGEST * min(width, height):
        raise BadImageError(f'{width} × {height} pixels, sides beyond {LONGEST}:1')


def _is_usual(image: Any) -> bool:
    """Whether a JPEG is of the forms that nvJPEG decodes as libjpeg does: three components of 8 bits as Y, Cb, Cr,
    4:4:4, 4:2:2 or 4:2:0, baseline."""
    from PIL import JpegImagePlugin  # an import that Pillow would note; to open a JPEG imports it too

    return (
        isinstance(image, JpegImagePlugin.JpegImageFile)
        and image.mode == 'RGB'
        and image.size[0] * image.size[1] <= LARGEST_JPEG
        and not image.info.get('progressive')
        and image.info.get('adobe_transform', 1) == 1
        and [layer[0] for layer in image.layer] != [ord(name) for name in 'RGB']
        and JpegImagePlugin.get_sampling(image) in (0, 1, 2)
    )


def _count_scans(content: bytes) -> Tuple[int, bool]:
    """The scans of a JPEG up to its end marker, found as libjpeg finds them, and whether it has that marker.
    BadImageError for too much beside them."""
    place, scans, segments = 2, 0, 0
    while match := _MARKER.search(content, place):
        kind, place = match[1][0], match.end()
        if kind == 0xD9:
            return scans, True
        scans, segments = scans + (kind == 0xDA), segments + 1
        place += max(2, int.from_bytes(content[place : place + 2], 'big'))
        if segments > SEGMENTS or (not scans and place > METADATA):
            raise BadImageError(f'more than {SEGMENTS:,} segments, or {METADATA:,} bytes of metadata')
    return scans, False


def _check_cost(image: Image.Image, scans: int, pieces: _Content) -> None:
    width, height = image.size
    most = Image.MAX_IMAGE_PIXELS or math.inf
    if scans * width * height > SCANS * most:
        raise BadImageError(f'{scans} scans of {width} × {height} pixels')
    tags = getattr(image, 'tag_v2', {})
    tile = tags.get(322, 0), tags.get(323, 0)  # TileWidth, TileLength: decoded whole, however small the image
    if not all(isinstance(side, int) for side in tile) or tile[0] * tile[1] > most:
        raise BadImageError(f'tiles of {tile[0]} × {tile[1]} pixels')
    if len(getattr(image, 'tile', ())) > READS // 2:
        raise BadImageError(MANY_PIECES)
    if any(part[0] in Image.DECODERS for part in getattr(image, 'tile', ())):
        if width * height > SLOW_PIXELS:
            raise BadImageError(f'{width} × {height} pixels, which take too long in this form of {image.format}')
        pieces.left += 4 * width * height


def is_turned(image: Image.Image) -> bool:
    """Whether an image of `decode` has an EXIF orientation by which a viewer would turn or mirror it.

    It is not applied, in training and inference alike, as in timm; a TIFF's is, by Pillow as it reads it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            return image.getexif().get(ExifTags.Base.Orientation) in range(2, 9)
    except Exception:  # damaged metadata of a readable image, of many kinds
        return False


def to_mode(image: Image.Image, mode: str) -> Image.Image:
    """Image.convert, but 16 bits are scaled to 8, where Pillow cuts at 255. timm, too, drops transparency.

    Raises BadImageError for pixels whose values do not say what is black and what is white: of a TIFF, whose tags tell,
    those with a sign and integers of 32 bits, beside floating-point ones.
    """
    tags = getattr(image, 'tag_v2', {})
    bits, kinds = tags.get(258, (16,))[0], tags.get(339, (1,))  # BitsPerSample, SampleFormat
    if tags.get(284) == 2 and tags.get(277, 1) > 1 and bits > 8:  # PlanarConfiguration, SamplesPerPixel
        raise BadImageError(f'{bits} bits in a plane for each channel, which Pillow takes for 8')
    if image.mode == 'F':
        raise BadImageError('floating-point pixels, whose range is not known')
    if kinds[0] != 1:
        raise BadImageError('pixels with a sign, whose range is not known')
    if image.mode.startswith('I'):
        if bits > 16:
            raise BadImageError(f'integers of {bits} bits, whose range is not known')
        pixels = np.asarray(image).clip(0, 2**bits - 1).astype(np.uint16) >> (bits - 8)
        image = Image.fromarray(pixels.astype(np.uint8) ^ np.uint8(255 * (tags.get(262) == 0)))  # WhiteIsZero
    if 'transparency' in image.info and image.mode != 'RGBA':
        image = image.convert('RGBA')  # else Pillow warns, or turns a colour to transparent black
    return image.convert(mode)


def bad_image(error: BaseException) -> BaseException:
    """What to raise for a failed reading: too many open files say nothing of the image, and stay what they are."""
    return error if getattr(error, 'errno', None) in MANY_FILES else BadImageError(reason(error))


def reason(error: BaseException) -> str:
    """The cause of a failed reading, in a few words."""
    text = getattr(error, 'strerror', None)
    if text is None and isinstance(error, Image.UnidentifiedImageError):
        text = 'empty, or no image of a known format'
    return text or first_line(error).split(' <')[0] or type(error).__name__
