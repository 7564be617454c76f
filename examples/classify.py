#!/usr/bin/env python3
"""Classify pictures with a file of export.py: python examples/classify.py MODEL.onnx PICTURE_OR_FOLDER ...

Needs onnxruntime, NumPy and Pillow, and neither PyTorch nor timm nor this package: what the pictures must look like and
what the classes are called stands in the file. With PyTorch at hand, inference.py does more.
"""

import argparse
import json
import math
import signal
import sys
import warnings
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image

LONGEST = 100  # sides beyond 100:1 would fill the memory: pictures are resized by the shorter one
FORMATS = ('JPEG', 'PNG', 'GIF', 'BMP', 'WEBP', 'TIFF', 'PPM', 'JPEG2000')  # for some others Pillow starts a program


def to_8_bits(picture: Image.Image) -> Image.Image:
    """A picture whose 16 bits, which Pillow would cut at 255, are scaled; ValueError where its range is not known."""
    tags = getattr(picture, 'tag_v2', {})
    bits, kinds = tags.get(258, (16,))[0], tags.get(339, (1,))  # BitsPerSample, SampleFormat
    if tags.get(284) == 2 and tags.get(277, 1) > 1 and bits > 8:  # PlanarConfiguration, SamplesPerPixel
        raise ValueError(f'{bits} bits in a plane for each channel, which Pillow takes for 8')
    if picture.mode == 'F':
        raise ValueError('floating-point pixels, whose range is not known')
    if kinds[0] != 1:
        raise ValueError('pixels with a sign, whose range is not known')
    if not picture.mode.startswith('I'):
        return picture
    if bits > 16:
        raise ValueError(f'integers of {bits} bits, whose range is not known')
    pixels = np.asarray(picture).clip(0, 2**bits - 1).astype(np.uint16) >> (bits - 8)
    return Image.fromarray(pixels.astype(np.uint8) ^ np.uint8(255 * (tags.get(262) == 0)))  # WhiteIsZero


def prepare(picture: Image.Image, about: dict) -> np.ndarray:
    """A picture as the model takes it, `(1, C, H, W)`: resized, its centre cropped, normalised, as in validation.

    Args:
        picture: Any size and mode.
        about: input_size (C, H, W), crop_pct, interpolation, mean, std and, if not center, crop_mode, as in the file's
            metadata.
    """
    channels, height, width = about['input_size']
    if max(picture.size) > LONGEST * min(picture.size):
        raise ValueError(f'{picture.width} × {picture.height} pixels, sides beyond {LONGEST}:1')
    picture = to_8_bits(picture)
    picture = picture.convert('L' if channels == 1 else 'RGB')
    tall, wide = (math.floor(side / about['crop_pct']) for side in (height, width))
    ratios, fill, mode = (picture.height / tall, picture.width / wide), 0, about.get('crop_mode', 'center')
    if mode == 'center':  # the picture then covers tall × wide
        ratio, rounded = min(ratios), int if tall == wide else round
        size = [tall if side == min(picture.size) and tall == wide else rounded(side / ratio) for side in picture.size]
    elif mode == 'squash':
        size = [wide, tall]
    elif mode == 'border':
        size = [round(side / max(ratios)) for side in picture.size]
        fill = tuple(round(255 * value) for value in about['mean'])[:channels]
    else:
        raise ValueError(f'crop_mode {mode!r} is none of center, squash, border')
    picture = picture.resize(size, Image.Resampling[about['interpolation'].upper()])
    spare = (picture.width - width, picture.height - height)
    place = tuple((-side) // 2 if side < 0 else -round(side / 2) for side in spare)
    framed = Image.new(picture.mode, (width, height), fill)
    framed.paste(picture, place)
    pixels = np.asarray(framed, dtype=np.float32) / 255
    mean, std = (np.float32(about[name]) for name in ('mean', 'std'))
    return np.atleast_3d((pixels.reshape(height, width, channels) - mean) / std).transpose(2, 0, 1)[None]


def load(path: str) -> tuple:
    """The session, and what the file says of itself."""
    if Path(path).exists() and not Path(path).is_file():  # a pipe would be waited for
        raise OSError(f'{path} is not a regular file')
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    about = session.get_modelmeta().custom_metadata_map
    about = {key: value if key == 'model' else json.loads(value) for key, value in about.items()}
    check(about, session.get_inputs()[0].shape[1:])
    return session, about


def check(about: dict, shape: list) -> None:
    """ValueError where what a file says of itself is not what its graph takes, or of no use."""
    size, names, crop_pct = about['input_size'], about['class_names'], about['crop_pct']
    if not isinstance(size, list) or [type(side) for side in size] != [int] * 3 or min(size) < 1:
        raise ValueError(f'input_size {str(size)[:100]} is not three whole numbers')
    if any(isinstance(own, int) and own != side for own, side in zip(shape, size, strict=True)):
        raise ValueError(f'input_size {size} is not that of its graph, {shape}')
    if not isinstance(crop_pct, (int, float)) or not 0.01 <= crop_pct <= 2:
        raise ValueError(f'crop_pct {str(crop_pct)[:100]} is no number of 0.01 to 2')
    if math.prod(size[1:]) > Image.MAX_IMAGE_PIXELS * min(1, crop_pct) ** 2:
        raise ValueError(f'input_size {size} with crop_pct {crop_pct} are larger pictures than are read')
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ValueError(f'class_names {str(names)[:100]} are no list of names')


def classify(session: onnxruntime.InferenceSession, about: dict, pictures: list) -> np.ndarray:
    """Probabilities `(pictures, classes)`."""
    images = np.concatenate([prepare(picture, about) for picture in pictures])
    half = session.get_inputs()[0].type == 'tensor(float16)'
    logits = session.run(None, {'input0': images.astype(np.float16 if half else np.float32)})[0].astype(np.float64)
    weights = np.exp(logits - logits.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True)


def shown(text: object) -> str:
    """Text of which a terminal only shows the characters, as of a file's name that may hold others."""
    return ''.join(c if c.isprintable() else c.encode('unicode_escape', 'surrogatepass').decode() for c in str(text))


def find(paths: list) -> list:
    """The files that these paths name, and all files in folders that end like a picture."""
    found = []
    endings = {ending for ending, form in Image.registered_extensions().items() if form in FORMATS}
    for path in map(Path, paths):
        inside = (file for file in sorted(path.rglob('*')) if file.suffix.lower() in endings)
        found += inside if path.is_dir() else [path]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('model')
    parser.add_argument('pictures', nargs='+')
    args = parser.parse_args()
    try:
        session, about = load(args.model)
        names, size = about['class_names'], about['input_size']
        (row,) = classify(session, about, [Image.new('RGB', (8, 8))])
        if names and len(names) != len(row):
            raise ValueError(f'{len(names)} names of {len(row)} classes; export the model anew')
    except KeyError as error:
        parser.error(shown(f'{args.model} does not say {error}: it is no file of export.py'))
    except Exception as error:  # onnxruntime has its own for files that it cannot read
        parser.error(shown(f'{args.model}: {error}'))
    warnings.simplefilter('error', Image.DecompressionBombWarning)  # Pillow's limit, not the double of it
    done = 0
    for path in find(args.pictures):
        try:
            if path.exists() and not path.is_file():  # a pipe would be waited for
                raise OSError('not a regular file')
            with Image.open(path, formats=FORMATS) as picture:
                (row,) = classify(session, about, [picture])
        except (
            OSError,
            SyntaxError,
            ValueError,
            MemoryError,
            Image.DecompressionBombWarning,
            Image.DecompressionBombError,
        ) as error:
            print(shown(f'{path} is left out: {error or type(error).__name__}'), file=sys.stderr)
            continue
        if not np.isfinite(row).all():
            parser.error(shown(f'{args.model}: its outputs for {path} are not finite'))
        done += 1
        best = np.argsort(-row)[:3]
        shares = ', '.join(f'{names[i] if names else i} {100 * row[i]:.1f} %' for i in best)
        try:
            print(shown(f'{path}: {shares}'), flush=True)
        except OSError as error:
            sys.stdout = None  # or Python would write the line once more, at its end
            parser.error(f'standard output: {error}')
    if not done:
        parser.error(shown(f'no picture of {" ".join(args.pictures)} can be read, for images of {size}'))


if __name__ == '__main__':
    if hasattr(signal, 'SIGPIPE'):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # end as other programs do where the reader has ended: | head
    if sys.stdout:  # it is None where it is closed
        sys.stdout.reconfigure(errors='backslashreplace')  # for names that its encoding has no characters for
    sys.exit(main())
