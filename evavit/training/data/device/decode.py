"""JPEG files to tensors on the device: nvJPEG through torchvision, in bounded pieces."""

import io
from typing import Any, Iterator, List, Sequence, Tuple

import numpy as np
import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg

from evavit.errors import LocalError, first_line

PIXELS = 2**28  # decoded at once: 768 MiB


def pieces(sizes: Sequence[int]) -> Iterator[slice]:
    """Parts of a batch whose images, of `sizes` pixels, have at most `PIXELS` pixels together."""
    start, total = 0, 0
    for number, pixels in enumerate(sizes):
        if number > start and total + pixels > PIXELS:
            yield slice(start, number)
            start, total = number, 0
        total += pixels
    yield slice(start, len(sizes))


class Decoder:
    """Decodes on a stream of its own.

    torchvision lets nvJPEG write on a stream that waits for nothing. Its tensors are therefore taken from the memory of
    a stream on which nothing else works, and given back once they have been used.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == 'cuda' else None
        self.held: List[Tuple[Any, List[torch.Tensor]]] = []

    def __call__(self, files: Sequence[torch.Tensor]) -> List[Any]:
        """(3, H, W) of uint8 for each file, ready on the current stream; for one that nvJPEG refuses, its error."""
        return self.ready(self.start(files))

    def start(self, files: Sequence[torch.Tensor]) -> Tuple[List[Any], Any]:
        """What `ready` takes. One thread may start a batch while another works on the one before."""
        if self.stream is None:  # Pillow, as the CPU path: tests then see what else differs
            return [_with_pillow(file) for file in files], None
        with torch.cuda.stream(self.stream):
            images = self._decode(list(files))
            return images, self.stream.record_event()

    def ready(self, started: Tuple[List[Any], Any]) -> List[Any]:
        """The images of `start`: the current stream waits for them."""
        images, event = started
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)
        return images

    def _decode(self, files: List[torch.Tensor]) -> List[Any]:
        try:
            return list(decode_jpeg(files, mode=ImageReadMode.RGB, device=self.device))
        except RuntimeError as error:
            if len(files) > 1:  # one bad file fails all of them: find it
                half = len(files) // 2
                return self._decode(files[:half]) + self._decode(files[half:])
            if isinstance(error, torch.OutOfMemoryError):
                raise
            if 'nvJPEG support' in str(error):
                raise LocalError(f'--augment-device cuda: {first_line(error)[:300]}') from error
            return [error]

    def hold(self, images: List[torch.Tensor]) -> None:
        """Keep images until what the current stream does with them is done; waits for those before the last."""
        if self.stream is None:
            return
        used = torch.cuda.Event()
        used.record(torch.cuda.current_stream(self.device))
        self.held.append((used, images))
        while len(self.held) > 2:
            self.held.pop(0)[0].synchronize()


def _with_pillow(file: torch.Tensor) -> Any:
    try:
        image = Image.open(io.BytesIO(file.numpy().tobytes()), formats=('JPEG',))
        return torch.from_numpy(np.array(image.convert('RGB'))).permute(2, 0, 1).contiguous()
    except Exception as error:  # as many kinds as a broken file has
        return error
