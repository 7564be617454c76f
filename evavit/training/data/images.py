"""Reading images that may be bad: what is decoded, what is left out, counted and named, and when that is too much.

timm's ImageDataset takes the next image where one cannot be read, and says so in a worker's log; a PNG of 16 bits turns
white in it. Here an image that cannot be read is counted in memory that the loader's workers share; in training another
takes its place, which depends on its index and the seed alone, in validation it is left out. More of them in an epoch
than `max_bad_images` allows stop the run.
"""

import functools
import io
import logging
import math
import multiprocessing
import random
import warnings
import zlib
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, Dict, Iterator, Mapping, Optional, Set, Tuple

import numpy as np
import torch
from PIL import Image
from timm.data import ImageDataset, IterableImageDataset
from timm.data.readers.reader_wds import WdsTargetKeyError

from evavit.errors import LocalError, UserError, first_line
from evavit.training.distributed import Process

log = logging.getLogger(__name__)

# By content, whatever the name says. Not all that Pillow knows: for some formats it starts other programs.
FORMATS = ('JPEG', 'PNG', 'GIF', 'BMP', 'WEBP', 'TIFF', 'PPM', 'JPEG2000')
LONGEST = 100  # sides beyond 100:1: validation resizes by the shorter one, the other would then fill the memory
ATTEMPTS = 10  # as many as timm's ImageDataset makes
UNREADABLE = -1  # target of an image of validation that could not be read


class BadImageError(Exception):
    """An image that cannot be read; the text is the reason, in a few words."""


def decode(stream: IO[bytes], mode: str) -> Image.Image:
    """An image of `mode` (RGB or L) from an open file, closed afterwards. Raises BadImageError."""
    try:
        with stream, warnings.catch_warnings():
            warnings.simplefilter('ignore')  # what matters is counted; Pillow's hints on metadata do not
            image = Image.open(stream, formats=FORMATS)
            check_size(image)
            image.load()
            return to_mode(image, mode)
    except BadImageError:
        raise
    except Exception as error:  # each format has its own errors for broken content
        raise BadImageError(reason(error)) from None


def check_size(image: Image.Image) -> None:
    width, height = image.size
    if Image.MAX_IMAGE_PIXELS and width * height > Image.MAX_IMAGE_PIXELS:
        raise BadImageError(f'{width} × {height} pixels, above the limit of {Image.MAX_IMAGE_PIXELS:,}')
    if max(width, height) > LONGEST * min(width, height):
        raise BadImageError(f'{width} × {height} pixels, sides beyond {LONGEST}:1')


def to_mode(image: Image.Image, mode: str) -> Image.Image:
    """Image.convert, but 16 bits are scaled to 8, where Pillow cuts at 255. timm, too, drops transparency."""
    if image.mode == 'F':
        raise BadImageError('floating-point pixels, whose range is not known')
    if image.mode.startswith('I'):
        pixels = np.asarray(image).clip(0, 65535).astype(np.uint16) >> 8
        image = Image.fromarray(pixels.astype(np.uint8))
    if 'transparency' in image.info and image.mode != 'RGBA':
        image = image.convert('RGBA')  # else Pillow warns, or turns a colour to transparent black
    return image.convert(mode)


def reason(error: BaseException) -> str:
    """The cause of a failed reading, in a few words."""
    text = getattr(error, 'strerror', None)
    if text is None and isinstance(error, Image.UnidentifiedImageError):
        text = 'empty, or no image of a known format'
    return text or first_line(error).split(' <')[0] or type(error).__name__


def substitute(index: int, attempt: int, seed: int, count: int) -> int:
    """The image that is read in place of image `index` at this attempt (1, 2, …): a pure function of its arguments."""
    return random.Random(f'{seed}/{index}/{attempt}').randrange(count)


class BadImages:
    """The images of the running epoch that could not be read: their number and names, shared with loader workers.

    Args:
        images: images in the data set.
        share: how many of them may be bad in an epoch, as a share; a whole number of images follows, rounded down.

    An image that is drawn twice counts once. Those of a stream have no index: their names' checksums stand for it.
    """

    LINE, LINES = 512, 1000  # bytes kept of a name and its reason; names kept of an epoch, the rest is only counted

    def __init__(self, images: int, share: float):
        self.images, self.share = images, share
        self.limit = math.floor(share * images + 1e-9)
        self.lock = multiprocessing.Lock()
        self.counter = torch.zeros(1, dtype=torch.int64).share_memory_()
        self.marks = torch.zeros(max(images, 2**16), dtype=torch.bool).share_memory_()
        self.lines = torch.zeros(min(self.limit + 1, self.LINES), self.LINE, dtype=torch.uint8).share_memory_()
        self.read = 0  # marks that this process has taken note of
        self.found: Dict[
            int, str
        ] = {}  # index → "name\nreason", '' where no name was kept; of all processes since they agreed
        self.reported: Set[int] = set()  # indices that a warning of this run has named

    @property
    def count(self) -> int:
        """Bad images that this process and its workers met since the epoch, or the rest of it, began."""
        return int(self.counter)

    def begin(self, found: Mapping[int, str] = MappingProxyType({})) -> None:
        """A new epoch, before its workers start; or the rest of one in which the images `found` had turned out bad."""
        self.counter.zero_()
        self.marks.zero_()
        self.read, self.found = 0, dict(found)
        self.reported.update(self.found)
        self.marks[[index for index in self.found if index < len(self.marks)]] = True

    def mark(self, index: Optional[int], name: str, why: str) -> None:
        """Note an image, in the process that tried to read it. `index` is None where images have none."""
        with self.lock:
            index = zlib.crc32(name.encode(errors='replace')) % len(self.marks) if index is None else index
            if self.marks[index]:
                return
            self.marks[index] = True
            place = self.count
            self.counter += 1
            if place < len(self.lines):
                number, line = f'{index}\n'.encode(), f'{name}\n{why}'.encode(errors='replace')
                if len(number + line) > self.LINE:  # the end of a path tells more than its beginning
                    line = b'...' + line[3 + len(number) - self.LINE :]
                line = number + line
                self.lines[place] = 0
                self.lines[place, : len(line)] = torch.tensor(list(line), dtype=torch.uint8)

    def review(self, process: Process, together: bool = True) -> int:
        """Tell of images that have turned out bad since the last review; too many of them are a UserError.

        With `together`, which all processes give at the same step, they agree on names and number, and `found` is the
        same in all of them. Without, each process looks at its own images alone. Returns the number.
        """
        self._look()
        alone = process.distributed and not together
        if process.distributed and together:
            for found in process.gather(self.found):
                for index, line in found.items():
                    self.found[index] = self.found.get(index) or line
        count = len(self.found)
        for index, line in self.found.items():
            if line and index not in self.reported and not alone:
                self.reported.add(index)
                name, _, why = line.rpartition('\n')
                log.warning(
                    f'warning: {name} is not a readable image ({why}); left out, {count} of {self.images} in '
                    f'this epoch, {self.limit} allowed'
                )
        if count > self.limit:
            name, _, why = next((line for line in reversed(self.found.values()) if line), '').rpartition('\n')
            raise (LocalError if alone else UserError)(
                f'{name or "an image"} is not a readable image ({why or "no name kept"}); {count} of {self.images} in '
                f'this epoch are not, --max-bad-images {self.share:g} allows {self.limit}; repair them or take them '
                f'away'
            )
        return count

    def _look(self) -> None:
        """Take note of what this process and its workers have marked since the last look."""
        with self.lock:
            before, self.read = self.read, self.count
            for place in range(before, min(self.read, len(self.lines))):
                line = bytes(self.lines[place].tolist()).rstrip(b'\0').decode(errors='replace')
                index, _, line = line.partition('\n')
                self.found[int(index)] = line
            if self.read > max(before, len(self.lines)):  # beyond the names that are kept
                for index in self.marks.nonzero().flatten().tolist():
                    self.found.setdefault(index, '')


class CheckedImages(torch.utils.data.Dataset):
    """A map-style data set whose unreadable images are counted, and in training replaced.

    Args:
        dataset: timm's ImageDataset (folder, tar, hfds) or a torchvision data set.
        mode: mode of the images, RGB or L.
        share: see BadImages.
        seed: decides, with the index, which image takes the place of a bad one. None: none does; the target of a bad
            image is then UNREADABLE.
    """

    def __init__(self, dataset: Any, mode: str, share: float, seed: Optional[int] = None):
        self.dataset, self.mode, self.seed, self.transform = dataset, mode, seed, None
        self.bad = BadImages(len(dataset), share)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Tuple[Any, int]:
        source = index
        for attempt in range(1, ATTEMPTS + 1):
            try:
                image, target = self.load(source)
                return self.transform(image) if self.transform else image, target
            except BadImageError as error:
                why = str(error)
                self.bad.mark(source, self.name(source), why)
            if self.seed is None:
                image = Image.new(self.mode, (8, 8))
                return self.transform(image) if self.transform else image, UNREADABLE
            source = substitute(index, attempt, self.seed, len(self))
        raise LocalError(
            f'{self.name(source)} is not a readable image ({why}), nor are {ATTEMPTS - 1} others drawn in '
            f'its place; check the data set'
        )

    def load(self, index: int) -> Tuple[Image.Image, int]:
        """(image, target). Raises BadImageError."""
        if not isinstance(self.dataset, ImageDataset):
            try:
                image, target = self.dataset[index]
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                raise BadImageError(reason(error)) from None
            return to_mode(image, self.mode), target
        try:
            stream, target, *_ = self.dataset.reader[index]
        except OSError as error:
            raise BadImageError(reason(error)) from None
        return decode(stream, self.mode), target

    def name(self, index: int) -> str:
        if isinstance(self.dataset, ImageDataset):
            return self.dataset.filename(index, absolute=True) or f'image {index}'
        return f'image {index}'


class CheckedStream(IterableImageDataset):
    """timm's data set of shards (wds, hfids), whose unreadable images are counted and left out.

    In training others take their place: the one before or after in the stream (hfids), one more of the shards (wds).
    timm's readers of shards either stop at such an image (hfids) or pass over it (wds); here they hand over what they
    read, and it is decoded or converted under count.

    Args:
        reader: timm's reader, as yet unused.
        mode, share: see CheckedImages.
    """

    def __init__(self, reader: Any, mode: str, share: float):
        super().__init__(None, reader=reader)
        self.mode = mode
        self.bad = BadImages(reader.num_samples or 0, share)
        reader.input_img_mode = ''  # modes are converted here, for 16 bits

    def __iter__(self) -> Iterator[Tuple[Any, int]]:
        if getattr(self.reader, 'ds', None) is None and hasattr(self.reader, '_lazy_init'):
            self.reader._lazy_init()  # in the worker, as the reader itself would
            self._watch()
        owed, good = 0, None  # hfids has counted an image before it is decoded: another takes its place in training
        for image, target in self.reader:
            name = 'an image without a name'
            try:
                if isinstance(image, dict):
                    name = image['path'] or name
                    image = decode(io.BytesIO(image['bytes'] or Path(name).read_bytes()), self.mode)
                else:
                    check_size(image)
                    image = to_mode(image, self.mode)
            except (BadImageError, OSError) as error:
                self.bad.mark(None, name, reason(error))
                owed += self.reader.is_training
            else:
                good = image, target
                yield self._transformed(*good)
            while owed and good:
                owed -= 1
                yield self._transformed(*good)

    def _transformed(self, image: Any, target: int) -> Tuple[Any, int]:
        return self.transform(image) if self.transform else image, target

    def _watch(self) -> None:
        """Put the count between the reader and what it reads with."""
        reader = self.reader
        if hasattr(reader.ds, 'cast_column'):
            import datasets

            reader.ds = reader.ds.cast_column(reader.input_key, datasets.Image(decode=False))
        for stage in getattr(reader.ds, 'pipeline', ()):
            if 'handler' in getattr(stage, 'kw', {}):
                stage.kw['handler'] = self._broken_shard
            if callable(next(iter(getattr(stage, 'args', ())), None)):
                stage.args = (functools.partial(self._named, stage.args[0]), *stage.args[1:])

    def _named(self, decode_sample: Any, sample: Dict[str, Any]) -> Any:
        try:
            return decode_sample(sample)
        except (TypeError, WdsTargetKeyError):  # faults of the settings, not of one image; timm's reader stops too
            raise
        except Exception as error:  # each format has its own errors for broken content
            self.bad.mark(None, f'{sample.get("__url__")}: {sample.get("__key__")}', reason(error))
            return None

    def _broken_shard(self, error: BaseException) -> bool:
        if isinstance(error, (TypeError, WdsTargetKeyError)):
            raise LocalError(first_line(error))
        url = next((part for part in reversed(error.args) if isinstance(part, str)), 'a shard')
        self.bad.mark(None, url, f'the rest of the shard is lost: {reason(error)}')
        return True
