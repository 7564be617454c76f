"""Batches from files to the step: read and drawn in the loading processes, decoded and augmented on the device.

A thread takes what the loading processes hand over, another has the device decode the next batch while the first
augments this one on a side stream and keeps `AHEAD` batches ready. They draw from generators of their own: the training
step's are not touched.
"""

import gc
import queue
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable, Dict, Iterator, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch
from PIL import Image

from evavit.errors import LocalError
from evavit.training.data.decode import Jpeg
from evavit.training.data.device.decode import Decoder, pieces
from evavit.training.data.device.draws import STEP, Draws, Sample, Window, cut
from evavit.training.data.device.operators import apply_steps, normalise
from evavit.training.data.device.resample import resample
from evavit.training.distributed import Draw, seed_at

AHEAD = 2  # batches on the device that wait for the training step


class Batch(NamedTuple):
    """What the loading processes hand over, B images of which n are JPEG files."""

    files: torch.Tensor  # the files one after the other, uint8
    sizes: torch.Tensor  # (n,) bytes of each
    kinds: torch.Tensor  # (B,) 0: a file, 1: pixels, 2: stored on the device
    stored: torch.Tensor  # numbers of the stored images
    pixels: torch.Tensor  # (…, C, H, W) uint8: images that the CPU has brought to size
    windows: torch.Tensor  # (B, 11) int64
    whole: torch.Tensor  # (B, 2) int64: width and height of the whole images
    number: torch.Tensor  # (B,) int64: in the data set, −1 in a stream
    names: torch.Tensor  # in a stream, uint8, a 0 behind each
    steps: torch.Tensor  # (B, S, 8) float64
    boxes: torch.Tensor  # (B, R, 4) int64
    target: torch.Tensor  # (B,) int64


def collate(samples: Sequence[Tuple[Sample, int]]) -> Batch:
    """Samples of `Draws` and their labels as one `Batch`."""
    drawn = [sample for sample, _ in samples]
    files = [sample.content for sample in drawn if isinstance(sample.content, bytes)]
    pixels = [sample.content for sample in drawn if isinstance(sample.content, np.ndarray)]
    kinds = [
        0 if isinstance(item.content, bytes) else 1 if isinstance(item.content, np.ndarray) else 2 for item in drawn
    ]
    steps = np.zeros((len(drawn), max(len(sample.steps) for sample in drawn), STEP))
    boxes = np.zeros((len(drawn), max(len(sample.boxes) for sample in drawn), 4), np.int64)
    for number, sample in enumerate(drawn):
        if sample.steps:
            steps[number, : len(sample.steps)] = sample.steps
        if sample.boxes:
            boxes[number, : len(sample.boxes)] = sample.boxes
    return Batch(
        files=_joined(files),
        sizes=torch.tensor([len(file) for file in files], dtype=torch.int64),
        kinds=torch.tensor(kinds),
        stored=torch.tensor([item.content for item in drawn if isinstance(item.content, int)], dtype=torch.int64),
        pixels=torch.from_numpy(np.stack(pixels) if pixels else np.zeros((0, 1, 1, 1), np.uint8)),
        windows=torch.tensor([sample.window for sample in drawn], dtype=torch.int64),
        whole=torch.tensor([sample.size for sample in drawn], dtype=torch.int64),
        number=torch.tensor([sample.number for sample in drawn], dtype=torch.int64),
        names=_joined([sample.name.encode(errors='replace') + b'\0' for sample in drawn]),
        steps=torch.from_numpy(steps),
        boxes=torch.from_numpy(boxes),
        target=torch.tensor([label for _, label in samples], dtype=torch.int64),
    )


def _joined(files: Sequence[bytes]) -> torch.Tensor:
    joined = torch.empty(max(1, sum(map(len, files))), dtype=torch.uint8)
    view, start = joined.numpy(), 0
    for file in files:
        view[start : start + len(file)] = np.frombuffer(file, np.uint8)
        start += len(file)
    return joined


class Maker:
    """Makes batches on the device of what the loading processes hand over.

    Args:
        draws: What the loading processes draw with.
        data_config: timm's data settings: input size, mean, std.
        device: Where the batches are made.
        mode: What erased boxes are filled with, timm's const, rand or pixel.
        replace: `replace(file, index, label)` is the image and label in place of a file that the decoder refuses; where
            the image is None, the nearest one of the batch serves.
        store: Images that are on the device, see `cache`.
    """

    def __init__(
        self,
        draws: Draws,
        data_config: Dict[str, Any],
        device: torch.device,
        mode: str,
        replace: Callable[[Jpeg, int, int], Tuple[Optional[Image.Image], int]],
        store: Any = None,
    ):
        self.device, self.mode, self.replace, self.store, self.fill = device, mode, replace, store, draws.fill
        self.size = tuple(data_config['input_size'])
        self.mean, self.std = (
            torch.tensor([255 * value for value in data_config[name]], device=device).view(1, -1, 1, 1)
            for name in ('mean', 'std')
        )
        self.decode = Decoder(device)
        self.generator = torch.Generator(device)

    def start(self, batch: Batch) -> Any:
        """Decode the first piece of a batch's files, which mostly are all of them: what a call takes as `started`."""
        sizes = batch.whole[batch.kinds == 0].prod(1).tolist()
        part = next(pieces(sizes))
        return self.decode.start(batch.files.split(batch.sizes.tolist())[part]) if sizes else None

    def __call__(self, batch: Batch, seed: int, started: Any = None) -> Tuple[torch.Tensor, torch.Tensor]:
        """(images, target) on the device. `seed` draws what erased boxes are filled with."""
        images, target = self._images(batch, started or self.start(batch))
        images = apply_steps(images, batch.steps, self.fill)
        self.generator.manual_seed(seed)
        values = normalise(images, self.mean, self.std, batch.boxes, self.mode, self.generator)
        return values, target.to(self.device, non_blocking=True)

    def _images(self, batch: Batch, started: Any) -> Tuple[torch.Tensor, torch.Tensor]:
        files, ready, stored = ((batch.kinds == kind).nonzero().flatten() for kind in range(3))
        images = torch.empty(len(batch.kinds), *self.size, dtype=torch.uint8, device=self.device)
        if len(ready):
            images[ready.to(self.device, non_blocking=True)] = batch.pixels.to(self.device, non_blocking=True)
        if len(stored):
            kept, windows = self.store.images(batch.stored), batch.windows[stored]
            for row, number in enumerate(batch.stored.tolist()):
                if number in self.store.replaced:
                    whole, size = batch.whole[stored[row]].tolist(), kept[row].shape[:0:-1]
                    windows[row] = torch.tensor(_scaled(Window(*windows[row].tolist()), whole, size))
            images[stored.to(self.device, non_blocking=True)] = self._resampled(kept, windows)
        if not len(files):
            return images, batch.target
        target, contents, lost = batch.target.clone(), batch.files.split(batch.sizes.tolist()), []
        for part in pieces(batch.whole[files].prod(1).tolist()):
            places, refused = files[part], []
            decoded = self.decode.ready(started or self.decode.start(contents[part]))
            started = None
            for number, image in enumerate(decoded):
                if not isinstance(image, torch.Tensor):
                    refused.append(number)
            good = torch.tensor([number for number in range(len(decoded)) if number not in refused], dtype=torch.int64)
            if len(good):
                tensors = [decoded[number] for number in good.tolist()]
                made = self._resampled(tensors, batch.windows[places[good]])
                images[places[good].to(self.device, non_blocking=True)] = made
                self.decode.hold(tensors)
            for number in refused:
                place = int(places[number])
                name = bytes(batch.names.numpy()).split(b'\0')[place].decode()
                file = Jpeg(bytes(contents[part][number].numpy()), tuple(batch.whole[place].tolist()), name)
                image, target[place] = self.replace(file, int(batch.number[place]), int(target[place]))
                if image is None:
                    lost.append(place)
                    continue
                window = _scaled(Window(*batch.windows[place].tolist()), batch.whole[place].tolist(), image.size)
                pixels = cut(image, window, (self.size[2], self.size[1]))
                images[place] = torch.from_numpy(pixels).to(self.device, non_blocking=True)
        if len(lost) == len(images):
            raise LocalError(
                f'none of the {len(lost)} images of a batch can be read, {name} the last, and none stands in for them; '
                f'raise --batch-size, or check the data set'
            )
        for place in lost:
            seen = (number for number in range(len(images)) if number not in lost)
            other = min(seen, key=lambda number: abs(number - place))
            images[place], target[place] = images[other], target[other]
        return images, target

    def _resampled(self, sources: Sequence[torch.Tensor], windows: torch.Tensor) -> torch.Tensor:
        return resample(sources, windows, *self.size[1:])


def _scaled(window: Window, old: Sequence[int], new: Sequence[int]) -> Window:
    """The window of an image of another size, at the same place."""
    if tuple(old) == tuple(new):
        return window
    x, y = new[0] / old[0], new[1] / old[1]
    width, height = max(1, int(window.width * x)), max(1, int(window.height * y))
    return window._replace(left=int(window.left * x), top=int(window.top * y), width=width, height=height)


class DeviceLoader:
    """Stands where timm's PrefetchLoader does.

    Args:
        loader: PyTorch's loader, whose data set ends in `Draws` and whose batches `collate` makes.
        dataset: What it loads, as `open_dataset` gave it.
        maker: Makes batches of what it gives.
        seed: The run's.
        rank: This process's.
    """

    def __init__(self, loader: Any, dataset: Any, maker: Maker, seed: int = 0, rank: int = 0):
        self.loader, self.dataset, self.maker, self.seed, self.rank = loader, dataset, maker, seed, rank
        self.stream = torch.cuda.Stream(maker.device) if maker.device.type == 'cuda' else None
        self.random_erasing = self  # the epoch and the batch that `epoch_batches` begins with
        self.epoch = self.batch = 0

    def __len__(self) -> int:
        return len(self.loader)

    @property
    def sampler(self) -> Any:
        return self.loader.sampler

    @property
    def batch_sampler(self) -> Any:
        return self.loader.batch_sampler

    def __iter__(self) -> Iterator[Tuple[torch.Tensor, torch.Tensor]]:
        """The loading processes start now, and with them what this process draws for them."""
        # A fork that frees an event or a stream of CUDA, as its garbage collection may, is aborted: it gets no garbage.
        gc.collect()
        gc.freeze()
        batches = iter(self.loader)
        gc.unfreeze()
        if not self.loader.num_workers:  # an image's draws are this process's then, in turn with the training step's
            return self._make(((batch, None) for batch in batches), self.epoch, self.batch)
        made = self._make(_started(batches, self.maker), self.epoch, self.batch)
        return _Ahead(made, self.maker.device, self.stream)

    def _make(self, batches: Any, epoch: int, first: int) -> Iterator[Tuple[torch.Tensor, torch.Tensor]]:
        for number, (batch, started) in enumerate(batches, first):
            yield self.maker(batch, seed_at(self.seed, Draw.ERASING, epoch, number, self.rank), started)


def _started(batches: Any, maker: Maker) -> Iterator[Tuple[Batch, Any]]:
    """Batches with what `Maker.start` gives, each started before the one before it is handed over."""
    with ThreadPoolExecutor(1) as pool:
        before: Optional[Tuple[Batch, Any]] = None
        for batch in batches:
            started = pool.submit(maker.start, batch)
            if before is not None:
                yield before[0], before[1].result()
            before = batch, started
        if before is not None:
            yield before[0], before[1].result()


class _Ahead:
    """An iterator whose batches a thread makes, `AHEAD` of them."""

    def __init__(self, made: Iterator[Any], device: torch.device, stream: Any):
        self.device = device
        self.ready: queue.Queue[Any] = queue.Queue(AHEAD)
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=_fill, args=(made, device, stream, self.ready, self.stopped), daemon=True)
        self.thread.start()
        self.close = weakref.finalize(self, _stop, self.ready, self.stopped, self.thread)

    def __iter__(self) -> '_Ahead':
        return self

    def __next__(self) -> Tuple[torch.Tensor, torch.Tensor]:
        if self.stopped.is_set():
            raise StopIteration
        batch, event, error = self.ready.get()
        if batch is None:
            self.close()
            if error is not None:
                raise error
            raise StopIteration
        if event is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(event)
            for tensor in batch:
                tensor.record_stream(stream)  # its memory is not given out again before the step is done with it
        return batch


def _fill(made: Iterator[Any], device: torch.device, stream: Any, ready: Any, stopped: threading.Event) -> None:
    if stream is not None:
        torch.cuda.set_device(device.index or 0)
    error: Optional[BaseException] = None
    try:
        with torch.cuda.stream(stream):
            for batch in made:
                event = None if stream is None else torch.cuda.Event()
                if event is not None:
                    event.record(stream)
                if not _put(ready, (batch, event, None), stopped):
                    return
    except BaseException as caught:  # the training loop raises it
        error = caught
    _put(ready, (None, None, error), stopped)


def _put(ready: Any, item: Any, stopped: threading.Event) -> bool:
    while not stopped.is_set():
        try:
            ready.put(item, timeout=0.1)
            return True
        except queue.Full:
            pass
    return False


def _stop(ready: Any, stopped: threading.Event, thread: threading.Thread) -> None:
    stopped.set()
    if thread is not threading.current_thread():
        thread.join(timeout=60)
    while not ready.empty():
        ready.get_nowait()
