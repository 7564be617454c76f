"""Image files that are odd or broken, for tests: what a folder of ten years' collecting holds."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

SIDE = 24


def picture(mode='RGB', side=SIDE, seed=0):
    """Noise over a gradient, in an 8-bit mode."""
    rng = np.random.default_rng(seed)
    channels = len(Image.new(mode, (1, 1)).getbands())
    ramp = np.linspace(0, 200, side)[:, None, None] + rng.integers(0, 55, (side, side, channels))
    return Image.fromarray(ramp.astype(np.uint8).squeeze(), mode if channels > 1 else None).convert(mode)


def encode(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def bomb(width=20_000, height=20_000):
    """A PNG of some hundred bytes that says it has 400 million pixels."""

    def chunk(kind, content):
        return struct.pack('>I', len(content)) + kind + content + struct.pack('>I', zlib.crc32(kind + content))

    header = struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
    return (
        b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(bytes(1000))) + chunk(b'IEND', b'')
    )


def sixteen_bits(side=SIDE):
    """Values 0…65535 in rows, as a PNG of 16 bits."""
    values = np.linspace(0, 65535, side).round().astype(np.uint16)
    return encode(Image.fromarray(np.repeat(values[:, None], side, 1)), 'PNG')


def palette_with_transparency():
    image = picture().quantize(16)
    image.info['transparency'] = bytes(range(0, 160, 10))
    return encode(image, 'PNG', transparency=image.info['transparency'])


def good_files():
    """{name: content} of files that are odd, but images."""
    return {
        'plain.png': encode(picture(), 'PNG'),
        'plain.jpg': encode(picture(side=64), 'JPEG', quality=95),
        'png_called.jpg': encode(picture(), 'PNG'),
        'jpeg_called.png': encode(picture(side=64), 'JPEG', quality=95),
        'webp_called.jpg': encode(picture(side=64), 'WEBP', lossless=True),
        'tiff_called.png': encode(picture(), 'TIFF'),
        'bmp_called.png': encode(picture(), 'BMP'),
        'gif_called.png': encode(picture().quantize(32), 'GIF'),
        'cmyk.jpg': encode(picture().convert('CMYK'), 'JPEG', quality=95),
        'grey.png': encode(picture('L'), 'PNG'),
        'grey_alpha.png': encode(picture('LA'), 'PNG'),
        'alpha.png': encode(picture('RGBA'), 'PNG'),
        'bits.png': encode(picture('L').convert('1'), 'PNG'),
        'sixteen.png': sixteen_bits(),
        'palette.png': palette_with_transparency(),
        'one_pixel.png': encode(Image.new('RGB', (1, 1), (200, 100, 50)), 'PNG'),
        'strip.png': encode(picture(side=100).resize((100, 1)), 'PNG'),
        'no_end.jpg': encode(picture(side=64), 'JPEG', quality=95)[:-2],  # the end marker alone is missing
        'UPPER.JPEG': encode(picture(side=64), 'JPEG'),
    }


def bad_files():
    """{name: (content, words of the reason)} of files that cannot be read."""
    jpeg, png = encode(picture(side=64), 'JPEG', quality=95), encode(picture(), 'PNG')
    return {
        'truncated.jpg': (jpeg[: len(jpeg) // 2], 'truncated'),
        'header_only.jpg': (jpeg[:20], ''),
        'truncated.png': (png[: len(png) // 2], ''),
        'empty.png': (b'', 'empty'),
        'zeros.jpg': (bytes(4096), 'no image of a known format'),
        'text.png': (b'<html>404 Not Found</html>', 'no image of a known format'),
        'postscript.png': (b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n', 'no image of a known'),
        'bomb.png': (bomb(), 'pixels'),
        'big.png': (bomb(10_000, 10_000), 'above the limit'),
        'sliver.png': (encode(Image.new('RGB', (5000, 1)), 'PNG'), 'beyond 100:1'),
        'float.png': (encode(Image.fromarray(np.random.default_rng(0).random((8, 8), np.float32)), 'TIFF'), 'floating'),
    }


def mutate(content, rng):
    """A copy of a file's bytes with one kind of damage: cut, bits, blocks, zeros, a repeated piece, a wild length."""
    data = bytearray(content)
    size = len(data)
    for _ in range(int(rng.integers(1, 4))):
        kind, place = int(rng.integers(7)), int(rng.integers(max(1, len(data))))
        length = int(rng.integers(1, 1 + max(1, size // 4)))
        if kind == 0:
            del data[place:]
        elif kind == 1:
            for spot in rng.integers(max(1, len(data)), size=int(rng.integers(1, 20))):
                if spot < len(data):
                    data[spot] ^= 1 << int(rng.integers(8))
        elif kind == 2:
            data[place : place + length] = rng.bytes(min(length, max(0, len(data) - place)))
        elif kind == 3:
            data[place : place + length] = bytes(min(length, max(0, len(data) - place)))
        elif kind == 4:
            data[place:place] = data[place : place + length]
        elif kind == 5:  # lengths and sizes stand in the first bytes of most formats
            spot = int(rng.integers(min(64, max(1, len(data)))))
            data[spot : spot + 4] = int(rng.choice([0, 1, 255, 2**16, 2**24, 2**31, 2**32 - 1])).to_bytes(4, 'big')
        else:
            del data[place : place + length]
    return bytes(data)
