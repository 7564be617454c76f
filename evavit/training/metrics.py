"""What a run leaves to read: summary.csv and TensorBoard's event files."""

import contextlib
import csv
import importlib.util
import logging
import os
import shutil
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from timm.utils import trim_summary, unwrap_model, update_summary

from evavit.errors import LocalError, reason_of
from evavit.layers import EvaAttention
from evavit.layers.converted import ConvertedAttention
from evavit.training.checkpoint import remedy, saving
from evavit.training.loop import Position, Run, autocast

log = logging.getLogger(__name__)

TENSORBOARD = importlib.util.find_spec('tensorboard') is not None  # a GPU machine without a network may lack it
SAMPLES = 16  # images shown with their predictions, and looked at for the attention's health


class NoCurves:
    """In place of TensorBoard's writer where it is not installed."""

    def add_scalar(self, *args: Any, **kwargs: Any) -> None:
        pass

    add_image = flush = close = add_scalar


def _event_writer(folder: Path, purge_step: int) -> Any:
    if not TENSORBOARD:
        log.warning('warning: tensorboard is not installed, so there are no curves; summary.csv has the metrics')
        return NoCurves()
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=purge_step)


class MetricsWriter:
    """Writes a run's metrics to a folder; on a resume what was written after the position is dropped.

    Args:
        folder: The run's folder.
        run: A `loop.Run`.
        position: Where the run goes on.
        class_names: Names by label, or None.
        data_config: Mean and standard deviation that the images were normalised with.
    """

    def __init__(
        self,
        folder: Path,
        run: Run,
        position: Position,
        class_names: Optional[List[str]],
        data_config: Dict[str, Any],
    ):
        self.run, self.class_names, self.data_config = run, class_names, data_config
        self.summary = folder / 'summary.csv'
        self.shown: Optional[Tuple[torch.Tensor, List[int], List[int], List[float]]] = None
        if self.summary.exists():
            self._trim_summary(position.epoch)
        update = run.done(position)
        # At an epoch's last update its validation is still to come. A run that was killed after that has drawn it
        # already: all points of the update go, and those of training come again.
        points = train_points(folder, update) if TENSORBOARD and position.update == run.updates_per_epoch else []
        with self._disk_errors():
            self.writer = _event_writer(folder, update if points else update + 1)
            for name, value, when in points:
                self.writer.add_scalar(name, value, update, walltime=when)

    def _trim_summary(self, epoch: int) -> None:
        try:
            self._rewrite_summary(lambda name: trim_summary(name, epoch))
        except (ValueError, csv.Error) as error:  # no reason to stop the run: TensorBoard has the metrics so far too
            damaged = f'{self.summary}.damaged'
            log.warning(f'warning: {self.summary} is no summary of a run ({str(error)[:80]}): kept as {damaged}')
            os.replace(self.summary, damaged)

    def _fit_summary(self, name: str, columns: List[str]) -> None:
        """Columns that the new settings of a resumed run lack move to the end."""
        if not os.path.exists(name):
            return
        with open(name, newline='', encoding='utf-8') as file:
            rows = list(csv.DictReader(file))
        if rows and list(rows[0]) != columns:
            with open(name, 'w', newline='', encoding='utf-8') as file:
                others = [key for key in rows[0] if key not in columns]
                writer = csv.DictWriter(file, columns + others, extrasaction='ignore')
                writer.writeheader()
                writer.writerows(rows)

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        """TensorBoard's writer reports a full disk at any later call: here as one line."""
        try:
            yield
        except OSError as error:
            folder = self.summary.parent
            raise LocalError(
                f'{folder}: the curves cannot be written ({reason_of(error)}); {remedy(folder)}'
            ) from error

    def _rewrite_summary(self, change: Callable[[str], None]) -> None:
        with saving(self.summary) as partial:
            if self.summary.exists():
                shutil.copy(self.summary, partial)
            change(str(partial))

    def scalar(self, update: int, name: str, value: float) -> None:
        with self._disk_errors():
            self.writer.add_scalar(name, value, update)

    def samples(self, images: torch.Tensor, target: torch.Tensor, output: torch.Tensor) -> None:
        """Keep the first batch of a validation for `epoch` to show."""
        chances, labels = output[:SAMPLES].float().softmax(-1).max(-1)
        self.shown = images[:SAMPLES], target[:SAMPLES].tolist(), labels.tolist(), chances.tolist()

    def epoch(
        self, position: Position, train_metrics: Dict[str, float], eval_metrics: Dict[str, float], lr: float
    ) -> None:
        """Write the epoch that ends at `position`, the start of the next one."""
        columns = ['epoch', *(f'train_{name}' for name in train_metrics), *(f'eval_{name}' for name in eval_metrics)]

        def add_row(name: str) -> None:
            self._fit_summary(name, [*columns, 'lr'])
            update_summary(position.epoch - 1, train_metrics, eval_metrics, filename=name, lr=lr)

        self._rewrite_summary(add_row)
        update = self.run.done(position)
        for name, value in eval_metrics.items():
            self.scalar(update, f'eval/{name}', value)
        if self.shown:  # None where none of this process's share of the images can be read
            with self._disk_errors():
                self.writer.add_image('validation', self._picture(*self.shown), update)
            for layer, masses in attention_health(self.run, self.shown[0]).items():
                for name, value in masses.items():
                    self.scalar(update, f'{name}/{layer}', value)
        self.shown = None
        self.flush()

    def flush(self) -> None:
        """Bring the curves to the disk: a run that resumes from a checkpoint does not draw what came before it."""
        with self._disk_errors():
            self.writer.flush()

    def close(self) -> None:
        with self._disk_errors():
            self.writer.close()

    def _name(self, label: int) -> str:
        return self.class_names[label] if self.class_names else str(label)

    def _picture(
        self, images: torch.Tensor, target: Sequence[int], labels: Sequence[int], chances: Sequence[float]
    ) -> np.ndarray:
        """Images `(n, C, H, W)` side by side, under each what was predicted, and the truth where that is wrong."""
        device = images.device
        mean, std = (torch.tensor(self.data_config[key], device=device).view(-1, 1, 1) for key in ('mean', 'std'))
        pixels = ((images.float() * std + mean).clamp(0, 1) * 255).byte().expand(-1, 3, -1, -1)
        side, caption, columns = 128, 26, 4
        rows = -(-len(pixels) // columns)
        sheet = Image.new('RGB', (columns * side, rows * (side + caption)))
        draw = ImageDraw.Draw(sheet)
        for number, (image, truth, label, chance) in enumerate(zip(pixels, target, labels, chances, strict=True)):
            left, top = number % columns * side, number // columns * (side + caption)
            picture = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
            sheet.paste(picture.resize((side, side), Image.Resampling.BILINEAR), (left, top))
            right, colour = truth == label, (120, 255, 120) if truth == label else (255, 120, 120)
            lines = [f'{self._name(label)} {100 * chance:.0f} %', '' if right else f'is {self._name(truth)}']
            for line, text in enumerate(lines):
                draw.text((left + 2, top + side + 12 * line), text[:20], fill=colour)
        return np.asarray(sheet).transpose(2, 0, 1)


def train_points(folder: Path, update: int) -> List[Tuple[str, float, float]]:
    """(name, value, time) of the scalars of training that a run's newest event file with that update has."""
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    for path in sorted(folder.glob('events.out.tfevents.*'), reverse=True):
        events = (event for event in LegacyEventFileLoader(str(path)).Load() if event.step == update)
        found = [(value.tag, value.simple_value, event.wall_time) for event in events for value in event.summary.value]
        points = [point for point in found if point[0].startswith('train/')]
        if points:
            return points
    return []


@torch.no_grad()
def attention_health(run: Run, images: torch.Tensor) -> Dict[str, Dict[str, float]]:
    """{layer: {name: value}} of the EVA layers: where attention goes, as a mean over images, heads and queries.

    The images pass through the weights in training, in evaluation mode. `evavit.layers.EvaAttention.attention_mass`
    defines the values. Layers with an ablation have other weights, converted ones another call: they are left out.
    """
    model: Any = unwrap_model(run.task.get_eval_model())
    layers = {
        module: name
        for name, module in model.named_modules()
        if isinstance(module, EvaAttention) and not isinstance(module, ConvertedAttention) and not module.variant
    }
    found: Dict[str, Dict[str, float]] = {}

    def look(layer: Any, args: Tuple[torch.Tensor, ...]) -> None:
        exact, cells, effective = layer.attention_mass(*args)
        found[layers[layer]] = dict(
            mass_on_E=exact.mean().item(), mass_on_cells=cells.mean().item(), effective_cells=effective.mean().item()
        )

    hooks = [layer.register_forward_pre_hook(look) for layer in layers]
    training = model.training
    try:
        model.eval()
        with autocast(run.machine, run.process.device):
            model(images)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return found
