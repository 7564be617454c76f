"""Data sets whose images may be bad: what is left out, counted and named, and when that is too much.

timm's ImageDataset takes the next image where one cannot be read, and says so in a worker's log; a PNG of 16 bits turns
white in it. Here every source hands over bytes, which `decode` alone reads, and an image that cannot be read is counted
in memory that the loader's workers share; in training another takes its place, which depends on its index and the seed
alone, in validation it is left out. More of them in an epoch than `max_bad_images` allows stop the run.
"""

import dataclasses
import functools
import io
import json
import logging
import math
import multiprocessing
import numbers
import random
import re
import tarfile
import zlib
from contextlib import nullcontext
from types import MappingProxyType
from typing import Any, Dict, Iterator, List, Mapping, Optional, Set, Tuple

import torch
from PIL import Image
from timm.data import ImageDataset, IterableImageDataset
from timm.data.readers.class_map import remap_target

from evavit.errors import LocalError, SharedError, UserError, first_line, printable
from evavit.training.data.decode import (
    BadImageError,
    Decoded,
    Jpeg,
    JpegAs,
    bad_image,
    decode,
    read_file,
    reason,
    to_mode,
)
from evavit.training.data.hub import undecoded
from evavit.training.data.shards import samples
from evavit.training.distributed import Process
from evavit.training.stalls import Reading

log = logging.getLogger(__name__)

SHARD_ENDINGS = ('jpeg', 'bmp')  # of images in shards, as in folders, beside those of timm's reader
ATTEMPTS = 10  # as many as timm's ImageDataset makes
UNREADABLE = -1  # target of an image of validation that could not be read


def substitute(index: int, attempt: int, seed: int, count: int) -> int:
    """The image that is read in place of image `index` at this attempt (1, 2, …): a pure function of its arguments."""
    return random.Random(f'{seed}/{index}/{attempt}').randrange(count)


class BadImages:
    """The images of the running epoch that could not be read: their number and names, shared with loader workers.

    Args:
        images: images in the data set.
        share: how many of them may be bad in an epoch, as a share; a whole number of images follows, rounded down.

        indexed: images have an index; a stream's have none, and checksums of names and contents stand for it.

    An image that is drawn twice counts once.
    """

    LINE, LINES = 512, 1000  # bytes kept of a name and its reason; names kept of an epoch, the rest is only counted

    def __init__(self, images: int, share: float, indexed: bool = True):
        self.images, self.share = images, share
        self.limit = math.floor(share * images + 1e-9)
        self.lock: Any = nullcontext()
        self.counter = torch.zeros(1, dtype=torch.int64)
        self.marks = torch.zeros(max(images if indexed else min(images, 2**24), 2**16), dtype=torch.bool)
        self.indices = images if indexed else len(self.marks)  # an image's is below
        self.lines = torch.zeros(min(self.limit + 1, self.LINES), self.LINE, dtype=torch.uint8)
        self.reading = Reading()
        self.unshared = ''  # why loading processes cannot reach the count; without them it does as it is
        try:
            self.lock = multiprocessing.Lock()
            for tensor in (self.counter, self.marks, self.lines, self.reading.table):
                tensor.share_memory_()
        except (OSError, RuntimeError) as error:
            self.lock, self.unshared = nullcontext(), reason(error)
        self.read = 0  # marks that this process has taken note of
        self.found: Dict[
            int, str
        ] = {}  # index → "name\nreason", '' where no name was kept; of all processes since they agreed
        self.reported: Set[str] = set()  # of these lines what a warning of this run has told

    @property
    def count(self) -> int:
        """Bad images that this process and its workers met since the epoch, or the rest of it, began."""
        return int(self.counter)

    def begin(self, found: Mapping[int, str] = MappingProxyType({})) -> None:
        """A new epoch, before its workers start; or the rest of one, with the bad images `found` so far."""
        self.counter.zero_()
        self.marks.zero_()
        self.read, self.found = 0, dict(found)
        self.reported.update(self.found.values())
        self.marks[[index for index in self.found if index < len(self.marks)]] = True

    def mark(self, index: Optional[int], name: str, why: str, content: bytes = b'') -> None:
        """Note an image, in the process that tried to read it. Where `index` is None, since images have none, `content`
        tells those of one name apart."""
        if index is None:
            index = zlib.crc32(content, zlib.crc32(name.encode(errors='replace'))) % len(self.marks)
        with self.lock:
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
        for name, why in [] if alone else self._unreported():
            log.warning(
                printable(
                    f'warning: {name} is not a readable image ({why}); left out, {count} of {self.images} in '
                    f'this epoch, {self.limit} allowed'
                )
            )
        if count > self.limit:
            enough = math.ceil(100 * count / max(self.images, count)) / 100
            name, _, why = next((line for line in reversed(self.found.values()) if line), '').rpartition('\n')
            raise (LocalError if alone else SharedError)(
                f'{name or "an image"} is not a readable image ({why or "no name kept"}); {count} of {self.images} in '
                f'this epoch are not, --max-bad-images {self.share:g} allows {self.limit}; repair them, take '
                f'them away, or allow more (--max-bad-images {enough:g})'
            )
        return count

    def news(self) -> List[Tuple[str, str]]:
        """(name, reason) of the images of this process that have turned out bad since the last call or review."""
        self._look()
        return self._unreported()

    def _unreported(self) -> List[Tuple[str, str]]:
        new = [line for line in dict.fromkeys(self.found.values()) if line and line not in self.reported]
        self.reported.update(new)
        return [(line.rpartition('\n')[0], line.rpartition('\n')[2]) for line in new]

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


class Labels:
    """What the labels of a data set may be: class numbers, below `num_classes` once that is known.

    Args:
        reader: timm's reader; where it has a class map, labels go through that here.
    """

    def __init__(self, reader: Any = None):
        self.num_classes: Optional[int] = None
        self.map: Optional[Dict[Any, int]] = reader.class_to_idx if getattr(reader, 'remap_class', False) else None
        self.names = getattr(reader, '_source_names', None)
        if self.map is not None:
            reader.remap_class = False

    def check(self, label: Any, name: str) -> int:
        """The class number of a label, of the image `name`. Another one stops the run: its images are not bad."""
        shown = f'{name}: its label is {str(label)[:40] or "empty"}'
        if self.map is not None:
            try:
                label = remap_target(label, self.map, self.names)
            except (KeyError, TypeError) as error:
                raise LocalError(f'{shown}, which --class-map does not have') from error
        count = self.num_classes
        if not isinstance(label, numbers.Integral) or not 0 <= int(label) < (count or 2**31):
            known = f'the {count} classes have the numbers 0 to {count - 1}' if count else 'classes have numbers from 0'
            text = isinstance(label, str) and self.map is None
            kind, remedy = (' (a text)', 'name all texts by --class-map') if text else ('', '--num-classes')
            raise LocalError(f'{shown}{kind}, but {known}; correct it, or {remedy}')
        return int(label)


class CheckedImages(torch.utils.data.Dataset):
    """A map-style data set whose unreadable images are counted, and in training replaced.

    Args:
        dataset: timm's ImageDataset (folder, tar, hfds) or a torchvision data set. Where that one reads files, it reads
            them with `read_file`; others (MNIST, CIFAR) make images of arrays.
        mode: mode of the images, RGB or L.
        share: see BadImages.
        seed: decides, with the index, which image takes the place of a bad one. None: none does; the target of a bad
            image is then UNREADABLE.
    """

    def __init__(self, dataset: Any, mode: str, share: float, seed: Optional[int] = None):
        self.dataset, self.mode, self.seed, self.transform = dataset, mode, seed, None
        self.bad, self.labels = BadImages(len(dataset), share), Labels(getattr(dataset, 'reader', None))
        self.jpeg_as: JpegAs = 'image'  # see `decode`; what is done to an image has to take that
        if hasattr(dataset, 'loader'):
            dataset.loader = self._read_file

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Tuple[Any, int]:
        image, target = self.fetch(index)
        return self.transform(image) if self.transform else image, target

    def fetch(self, index: int, whole: bool = False) -> Tuple[Any, int]:
        """(image, label), of another image where this one cannot be read. With `whole` it is never a `Jpeg`."""
        with self.bad.reading.image(index):
            return self._fetch(index, whole)

    def _fetch(self, index: int, whole: bool) -> Tuple[Any, int]:
        source = index
        for attempt in range(1, ATTEMPTS + 1):
            try:
                image, target = self.load(source)
                if whole and isinstance(image, Jpeg):
                    image = decode(io.BytesIO(image.content), self.mode)
                return image, self.labels.check(target, self.name(source))
            except BadImageError as error:
                why = str(error)
                self.bad.mark(source, self.name(source), why)
            if self.seed is None:
                return Image.new(self.mode, (8, 8)), UNREADABLE
            source = substitute(index, attempt, self.seed, len(self))
        raise LocalError(
            f'{self.name(source)} is not a readable image ({why}), nor are {ATTEMPTS - 1} others drawn in '
            f'its place; check the data set'
        )

    def _read_file(self, path: str) -> Decoded:
        return read_file(path, self.mode, self.jpeg_as)

    def replace(self, file: Jpeg, index: int, label: int) -> Tuple[Image.Image, int]:
        """In place of a file that a GPU's decoder refuses: what the CPU path reads."""
        return self.fetch(index % len(self), whole=True)

    def load(self, index: int) -> Tuple[Decoded, Any]:
        """(image, label). Raises BadImageError."""
        if not isinstance(self.dataset, ImageDataset):
            try:
                image, target = self.dataset[index]
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                raise bad_image(error) from None
            return to_mode(image, self.mode) if isinstance(image, Image.Image) else image, target
        reader: Any = self.dataset.reader
        try:
            if hasattr(reader, 'image_key'):  # hfds, which would open a file by itself
                item = reader.dataset[index]
                return _decode_item(item[reader.image_key], self.mode, self.jpeg_as), reader._get_target(item)
            stream, target, *_ = reader[index]
        except (OSError, tarfile.TarError, zlib.error) as error:
            raise bad_image(error) from None
        except KeyError as error:
            raise LocalError(f'the data set has no column {error}') from error
        return decode(stream, self.mode, self.jpeg_as), target

    def name(self, index: int) -> str:
        if isinstance(self.dataset, ImageDataset) and not hasattr(self.dataset.reader, 'image_key'):
            return self.dataset.filename(index, absolute=True) or f'image {index}'
        if isinstance(self.dataset, ImageDataset):
            image = self.dataset.reader.dataset[index][self.dataset.reader.image_key]
            return (image and image.get('path')) or f'image {index}'
        files = getattr(self.dataset, 'imgs', None)  # of torchvision's folders
        return str(files[index][0]) if files else f'image {index}'

    def place(self, index: int) -> str:
        """The image's name where that is known without reading, to say it while reading hangs."""
        return f'image {index}' if hasattr(getattr(self.dataset, 'reader', None), 'image_key') else self.name(index)


def _decode_item(item: Any, mode: str, jpeg_as: JpegAs) -> Decoded:
    """The image of a record {bytes, path}, of which one may be missing. Raises BadImageError."""
    if not isinstance(item, dict) or not (item.get('bytes') or item.get('path')):
        raise BadImageError('no image in this record')
    if item.get('missing'):
        raise BadImageError(item['missing'])
    if item.get('bytes'):
        return decode(io.BytesIO(item['bytes']), mode, jpeg_as)
    return read_file(item['path'], mode, jpeg_as)


class CheckedStream(IterableImageDataset):
    """timm's data set of shards (wds, hfids, tfds), whose unreadable images are counted.

    In training those before or after in the stream take their places; in validation their target is UNREADABLE. timm's
    readers would decode images themselves; here they hand over bytes.

    Args:
        reader: timm's reader, as yet unused.
        mode, share: see CheckedImages.
    """

    def __init__(self, reader: Any, mode: str, share: float):
        super().__init__(None, reader=reader)
        self.mode, self.labels = mode, Labels(reader)
        self.jpeg_as: JpegAs = 'image'  # as in CheckedImages
        self.bad = BadImages(reader.num_samples or 0, share, indexed=False)
        reader.input_img_mode = ''  # what the reader hands over is no image yet
        if hasattr(reader, '_input_decoders'):
            reader._input_decoders = functools.partial(_without_decoding, reader)

    def __iter__(self) -> Iterator[Tuple[Any, int]]:
        return self.bad.reading.stream(self._read())

    def place(self, _: int) -> str:
        return 'the stream'

    def _read(self) -> Iterator[Tuple[Any, int]]:
        owed, good = 0, None  # a reader has counted an image before it is decoded: another takes its place in training
        for number, (item, label) in enumerate(self._items()):
            record = item if isinstance(item, dict) else dict(bytes=item)
            content, placed = record.get('bytes') or b'', 'place' in record  # which tells it from others in each pass
            worker = getattr(self.reader, 'global_worker_id', 0)
            place = f'record {record.get("place", number)} of loading process {worker}'
            name = record.get('path') or ('an image without a name' if content and not placed else place)
            known = content if isinstance(content, bytes) and content and not placed else place.encode()
            label = self.labels.check(label, name)
            try:
                image = _decode_item(record, self.mode, self.jpeg_as)
            except BadImageError as error:
                self.bad.mark(None, name, str(error), known)
                if self.reader.is_training:
                    owed += 1
                else:
                    yield self._transformed(Image.new(self.mode, (8, 8)), UNREADABLE)
            else:
                if isinstance(image, Jpeg):  # whose decoder may still refuse it: see `replace`
                    image = dataclasses.replace(image, name=f'{name}\n{place}' if placed else name)
                good = image, label
                yield self._transformed(*good)
            while owed and good:
                owed -= 1
                yield self._transformed(*good)

    def _items(self) -> Iterator[Tuple[Any, Any]]:
        """What the reader hands over; where it cannot go on, as with a damaged table, the run ends with a line."""
        try:
            if getattr(self.reader, 'ds', None) is None and hasattr(self.reader, '_lazy_init'):
                self.reader._lazy_init()  # in the worker, as the reader itself would
                self._watch()
            yield from self.reader if self.reader.is_training or not hasattr(self.reader, 'ds') else self._once()
        except UserError:
            raise
        except Exception as error:  # each library has its own errors
            raise LocalError(
                f'the data set cannot be read on ({type(error).__name__}: {first_line(error)[:300]})'
            ) from error

    def _once(self) -> Iterator[Tuple[Any, Any]]:
        """A split from its beginning to its end, whatever part of it this process has. To several processes timm's
        readers of wds and tfds hand over as many images each, some twice and others never; no validation needs that."""
        reader = self.reader
        image, label = ('image', 'target') if hasattr(reader.ds, 'pipeline') else (reader.input_key, reader.target_key)
        for sample in reader.ds:
            yield sample[image], sample[label]

    def replace(self, file: Jpeg, index: int, label: int) -> Tuple[Any, int]:
        """In place of a file that a GPU's decoder refuses: the CPU's image of it. Where it has none either, None in
        training, for which another one of the batch has to serve."""
        try:
            return decode(io.BytesIO(file.content), self.mode), label
        except BadImageError as error:
            name, *place = re.split(r'\n(?=record \d+ of loading process \d+\Z)', file.name)
            self.bad.mark(None, name, str(error), place[0].encode() if place else file.content)
        return (None, label) if self.reader.is_training else (Image.new(self.mode, (8, 8)), UNREADABLE)

    def _transformed(self, image: Any, target: int) -> Tuple[Any, int]:
        return self.transform(image) if self.transform else image, target

    def _watch(self) -> None:
        """Have the reader hand over bytes, and tell of what it cannot read."""
        reader = self.reader
        if hasattr(reader.ds, 'cast_column'):
            reader.ds = _Numbered(undecoded(reader.ds, reader.input_key, reader.target_key), reader.input_key)
        for stage in getattr(reader.ds, 'pipeline', ()):
            if 'handler' in getattr(stage, 'kw', {}):
                stage.kw['handler'] = self._broken_shard
            if getattr(getattr(stage, 'f', None), '__name__', '') == 'tarfile_samples':
                label = 'json' if reader.split_info.alt_label else 'cls'
                stage.f = functools.partial(samples, images=self._image_endings(), label=label)
            if callable(next(iter(getattr(stage, 'args', ())), None)):
                stage.args = (self._record, *stage.args[1:])

    def _record(self, sample: Dict[str, Any]) -> Optional[Dict[str, Any]]:
        """What timm's reader makes of a sample of a shard, but with the image's bytes, and the label as it is."""
        name = f'{sample.get("__url__")}: {sample.get("__key__")}'
        endings = self._image_endings()
        content = next((sample[key] for key in endings if key in sample), None)
        field = self.reader.split_info.alt_label
        try:
            label = json.loads(sample['json'])[field] if field else _number(sample['cls'])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise LocalError(f'{name}: no label, neither .cls nor a field of .json as _info.json names it') from error
        if field and isinstance(label, int) and label < 0:  # left out, as by timm
            return None
        image: Dict[str, Any] = dict(bytes=content, path=name)
        if content is None:
            there = ', '.join(f'.{key}' for key in sample if not key.startswith('__'))
            image['missing'] = f'none of {", ".join(f".{key}" for key in endings)}, only {there}'
        elif isinstance(content, str):  # why `shards` has not read it
            image['missing'] = content
        return dict(jpg=image, target=label)

    def _image_endings(self) -> Tuple[str, ...]:
        """Of images in shards, the first of a sample first."""
        return tuple(dict.fromkeys((*self.reader.input_key.split(';'), *SHARD_ENDINGS)))

    def _broken_shard(self, error: BaseException) -> bool:
        if isinstance(error, (TypeError, LocalError)):
            raise error if isinstance(error, LocalError) else LocalError(first_line(error))
        if isinstance(error, BadImageError):
            self.bad.mark(None, error.args[1], error.args[0])
            return True
        url = next((part for part in reversed(error.args) if isinstance(part, str)), 'a shard')
        error.args = tuple(part for part in error.args if isinstance(part, (int, str)) and part != url)
        self.bad.mark(None, url, f'the rest of the shard is lost: {reason(error)}')
        return True


class _Numbered:
    """A table of `datasets` that timm's reader passes through, in training several times in one epoch and each time in
    the same order: the `image` of a record has the record's `place` in it."""

    def __init__(self, table: Any, image: str):
        self.table, self.image = table, image

    def __getattr__(self, name: str) -> Any:
        return getattr(self.table, name)

    def __iter__(self) -> Iterator[Dict[str, Any]]:
        for place, record in enumerate(self.table):
            image = record[self.image]
            image = image if isinstance(image, dict) else dict(bytes=image)
            yield {**record, self.image: {**image, 'place': place}}


def _number(text: bytes) -> Any:
    """The whole number that a .cls file holds, or its text where that is none."""
    shown = text.decode(errors='replace').strip()
    return int(shown) if re.fullmatch('-?[0-9]{1,99}', shown) else shown


def _without_decoding(reader: Any) -> Dict[str, Any]:
    """For tfds: its image feature as bytes."""
    import tensorflow_datasets  # type: ignore[import-not-found]

    decoders: Any = tensorflow_datasets.decode.SkipDecoding()
    for part in reversed(reader.input_key.split('/')):
        decoders = {part: decoders}
    return decoders
