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

    header = struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
    return (
        b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(bytes(1000))) + chunk(b'IEND', b'')
    )


def chunk(kind, content=b''):
    return struct.pack('>I', len(content)) + kind + content + struct.pack('>I', zlib.crc32(kind + content))


def postscript():
    """A drawing that Pillow has Ghostscript read, where it may."""
    return b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\nshowpage\n%%EOF\n'


def many_scans(side, number):
    """A progressive JPEG whose last scan comes again and again."""
    content = encode(Image.new('RGB', (side, side)), 'JPEG', progressive=True)
    last, end = content.rindex(b'\xff\xda'), content.rindex(b'\xff\xd9')
    return content[:end] + content[last:end] * number + content[end:]


def put(content, extra, before):
    place = content.index(before)
    return content[:place] + extra + content[place:]


def tiles(side, number):
    """A compressed TIFF of 10 × 10 pixels, in tiles of side × side."""
    entries = [(256, 10), (257, 10), (258, 8), (259, 8), (262, 1), (277, 1), (322, side), (323, side)]
    offset = 8 + 2 + 12 * (len(entries) + 2) + 4
    content = zlib.compress(bytes(side * side), 9)
    entries += [(324, offset), (325, len(content))]
    directory = b''.join(struct.pack('<HHII', tag, 4, 1, value) for tag, value in entries)
    return b'II*\0' + struct.pack('<IH', 8, len(entries)) + directory + bytes(4) + content


def pairs(side):
    """A BMP of runs of one pixel."""
    content = (b'\1\1' * side + b'\0\0') * side + b'\0\1'
    header = struct.pack('<IiiHHIIiiII', 40, side, side, 1, 8, 1, len(content), 0, 0, 256, 0)
    return b'BM' + struct.pack('<IHHI', 1078 + len(content), 0, 0, 1078) + header + bytes(1024) + content


def bombs():
    """{name: (function that makes the content, words of the reason)} of small files that are costly to decode."""
    png, gif = encode(picture(), 'PNG'), encode(picture().quantize(16), 'GIF')
    jpeg = encode(picture(), 'JPEG')
    return {
        'scans.jpg': (lambda: many_scans(2000, 500), '510 scans'),
        'segments.jpg': (lambda: jpeg[:2] + b'\xff\xee\0\2' * 2_000_000 + jpeg[2:], 'segments'),
        'metadata.jpg': (lambda: jpeg[:2] + (b'\xff\xed\xff\xff' + bytes(65533)) * 400 + jpeg[2:], 'metadata'),
        'chunks.png': (lambda: png[:33] + chunk(b'abCd') * 1_000_000 + png[33:], 'pieces'),
        'texts.png': (lambda: png[:33] + chunk(b'tEXt', b'a\0b') * 1_000_000 + png[33:], 'pieces'),
        'empty_data.png': (lambda: png[:33] + chunk(b'IDAT') * 1_000_000 + png[33:], 'pieces'),
        'text.png': (lambda: png[:33] + chunk(b'zTXt', b'a\0\0' + zlib.compress(bytes(2**27))) + png[33:], 'too large'),
        'comments.gif': (lambda: put(gif, b'!\xfe\x01x\0' * 2_000_000, b','), 'pieces'),
        'tiles.tif': (lambda: tiles(20_000, 1), 'tiles of 20000 × 20000'),
        'pairs.bmp': (lambda: pairs(2000), 'too long in this form of BMP'),
        'plain.ppm': (lambda: b'P3\n2000 2000\n255\n' + b'1 ' * 12_000_000, 'too long in this form of PPM'),
        'comment.ppm': (lambda: b'P6\n#' + b'x' * 5_000_000 + b'\n8 8\n255\n' + bytes(192), 'pieces'),
    }


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
