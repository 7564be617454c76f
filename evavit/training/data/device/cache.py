"""A data set that is decoded once and kept on the device (`--cache-device`)."""

import copy
import logging
from typing import Any, Dict, List, NamedTuple, Sequence, Set, Tuple

import numpy as np
import torch

from evavit.errors import UserError
from evavit.training.data.decode import BadImageError, Jpeg
from evavit.training.data.device.decode import Decoder, pieces
from evavit.training.data.device.draws import Stored
from evavit.training.signals import start_worker
from evavit.training.stalls import Watchdog

log = logging.getLogger(__name__)

READ = 256  # images that are read and decoded together
PROBED = 64  # images whose sizes tell how much a data set takes


class _Read(NamedTuple):
    content: Any  # a Jpeg, or (C, H, W) of uint8 in NumPy: a tensor would take a file descriptor of the process
    label: int
    bad: List[Tuple[Any, str, str]]  # what was marked on the way to it


class _Marks:
    """Takes the place of BadImages while an image is read, so that every epoch can mark it."""

    def __init__(self, dataset: Any) -> None:
        self.taken: List[Tuple[Any, str, str]] = []
        self.reading = dataset.bad.reading

    def mark(self, index: Any, name: str, why: str) -> None:
        self.taken.append((index, name, why))


class _Reading(torch.utils.data.Dataset):
    """The images of a data set as they are, with their labels."""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> _Read:
        noting = copy.copy(self.dataset)
        noting.bad = _Marks(self.dataset)
        image, label = noting.fetch(index)
        return _Read(image if isinstance(image, Jpeg) else _pixels(image), label, noting.bad.taken)


def _pixels(image: Any) -> np.ndarray:
    pixels = np.array(image)
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


class Cached(torch.utils.data.Dataset):
    """A data set whose images are on the device: what it hands over are their numbers, sizes and labels.

    Args:
        dataset: The `CheckedImages` that was read.
        sizes: Width and height that each image is drawn for: the stored one has another size where it takes the place
            of a file that the decoder refused.
        labels: Their labels.
        bad: {number: what was marked when it was read}.
    """

    def __init__(self, dataset: Any, sizes: List[Tuple[int, int]], labels: List[int], bad: Dict[int, List[Any]]):
        self.dataset, self.sizes, self.labels, self.lost, self.transform = dataset, sizes, labels, bad, None
        self.jpeg_as = 'image'  # nothing is read any more

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> Any:
        for mark in self.lost.get(index, ()):
            self.dataset.bad.mark(*mark)
        image: Any = Stored(index, self.sizes[index])
        return self.transform(image) if self.transform else image, self.labels[index]

    def replace(self, file: Jpeg, index: int, label: int) -> Any:
        return self.dataset.replace(file, index, label)


class Store:
    """Images on the device, by their numbers."""

    def __init__(self) -> None:
        self.all: List[torch.Tensor] = []
        self.replaced: Set[int] = set()  # numbers of those that are in the place of a file that the decoder refused
        self.bytes = 0

    def add(self, images: Sequence[torch.Tensor]) -> None:
        joined = torch.cat([image.flatten() for image in images])
        parts = joined.split([image.numel() for image in images])
        self.all += [part.view(image.shape) for part, image in zip(parts, images, strict=True)]
        self.bytes += joined.numel()

    def images(self, numbers: torch.Tensor) -> List[torch.Tensor]:
        return [self.all[number] for number in numbers.tolist()]


def cached(dataset: Any, device: torch.device, workers: int, watchdog: Watchdog) -> Tuple[Cached, Store]:
    """Read a data set to the device: what the loader then loads, and the images.

    Raises:
        UserError: It does not fit.
    """
    _check_index(dataset)
    loader: Any = torch.utils.data.DataLoader(
        _Reading(dataset),
        batch_size=READ,
        num_workers=workers,
        collate_fn=list,
        worker_init_fn=start_worker,  # type: ignore[arg-type]  # the seed that it returns is for timm
    )
    decoder, store = Decoder(device), Store()
    sizes: List[Tuple[int, int]] = []
    labels: List[int] = []
    bad: Dict[int, List[Any]] = {}
    try:
        for batch in watchdog.batches(loader, dataset):
            images = [_sent(item.content, device) for item in batch]
            files = [number for number, item in enumerate(batch) if isinstance(item.content, Jpeg)]
            for part in pieces([batch[number].content.size[0] * batch[number].content.size[1] for number in files]):
                contents = [_bytes(batch[number].content) for number in files[part]]
                for number, image in zip(files[part], decoder(contents) if contents else (), strict=True):
                    images[number] = image
            for number, item in enumerate(batch):
                marks, label = item.bad, item.label
                if not isinstance(images[number], torch.Tensor):  # the decoder refused it
                    store.replaced.add(len(labels))
                    noting = copy.copy(dataset)
                    noting.bad = _Marks(dataset)
                    image, label = noting.replace(item.content, len(labels), label)
                    images[number], marks = _sent(_pixels(image), device), marks + noting.bad.taken
                if marks:
                    bad[len(labels)] = marks
                labels.append(label)
                # As without a cache, a crop is drawn on the file's size, also where another image takes its place.
                read = item.content
                sizes.append(read.size if isinstance(read, Jpeg) else (read.shape[2], read.shape[1]))
            store.add(images)
            decoder.hold(images)
    except torch.OutOfMemoryError:
        raise UserError(
            f'--cache-device: {device} is full after {len(labels):,} of {len(dataset):,} images, '
            f'{store.bytes / 2**30:.1f} GiB; leave it out'
        ) from None
    log.info(f'{len(labels):,} images on {device}, {store.bytes / 2**30:.2f} GiB')
    return Cached(dataset, sizes, labels, bad), store


def _bytes(file: Jpeg) -> torch.Tensor:
    return torch.frombuffer(bytearray(file.content), dtype=torch.uint8)


def _sent(content: Any, device: torch.device) -> Any:
    return content if isinstance(content, Jpeg) else torch.from_numpy(content).to(device, non_blocking=True)


def _check_index(dataset: Any) -> None:
    if not hasattr(dataset, 'fetch'):
        raise UserError('--cache-device needs a data set with an index, which a stream has not; leave it out')


def cache_size(dataset: Any) -> int:
    """Bytes that a data set takes on the device, by the sizes of `PROBED` of its images. UserError for a stream."""
    _check_index(dataset)
    step = max(1, len(dataset) // PROBED)
    found = []
    for index in range(0, len(dataset), step):
        try:
            image, _ = dataset.load(index)
        except BadImageError:
            continue
        found.append(image.size[0] * image.size[1] * (1 if dataset.mode == 'L' else 3))
    return int(np.mean(found or [0]) * len(dataset))
