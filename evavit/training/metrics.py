"""What a run leaves to read: summary.csv, TensorBoard's event files and, where asked for, a run of Weights & Biases."""

import contextlib
import csv
import importlib.util
import logging
import os
import shutil
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from timm.utils import trim_summary, unwrap_model, update_summary

from evavit.errors import LocalError, encodable, first_line, printable, reason_of
from evavit.files import free_name, set_aside
from evavit.layers import EvaAttention
from evavit.layers.converted import given_tokens
from evavit.training.checkpoint import NO_EFFECT, saving
from evavit.training.loop import Position, Run, autocast
from evavit.training.run_folder import remedy

log = logging.getLogger(__name__)

TENSORBOARD = importlib.util.find_spec('tensorboard') is not None  # a GPU machine without a network may lack it
SAMPLES = 16  # images looked at for the attention's health, and shown where classes are few
MOST_CLASSES = 32  # of which images are shown
HEALTH = ('mass_on_E', 'mass_on_cells', 'effective_cells')
ATTENTION = 'where_attention_goes'  # TensorBoard sorts its groups of charts by name: this one comes after the curves


class NoCurves:
    """In place of TensorBoard's writer where it is not installed."""

    def add_scalar(self, *args: Any, **kwargs: Any) -> None:
        pass

    add_image = add_custom_scalars = flush = close = add_scalar


def _event_writer(folder: Path, purge_step: int) -> Any:
    if not TENSORBOARD:
        log.warning('warning: tensorboard is not installed, so there are no curves; summary.csv has the metrics')
        return NoCurves()
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=purge_step)


def _start_wandb(run: Run, folder: Path, settings: Dict[str, Any]) -> Any:
    """The run of Weights & Biases that `--log-wandb` asks for, else None."""
    config = run.config
    if not config.log_wandb:
        return None
    import wandb

    going_on = dict(id=config.wandb_resume_id, resume='must') if config.wandb_resume_id else {}
    about = dict(project=config.wandb_project, name=folder.name, tags=config.wandb_tags, config=settings, **going_on)
    try:
        return wandb.init(dir=str(folder), **about)
    except (wandb.Error, OSError) as error:
        raise LocalError(
            f'--log-wandb: {first_line(error)[:400].rstrip(".")}; or set WANDB_MODE=offline to keep all in {folder}'
        ) from error


class Samples:
    """Images of a validation to look at, of every class, or of `MOST_CLASSES` spread over all: the first of each, which
    are the same in every epoch, the first that are predicted right, and the first that are predicted wrong.

    Args:
        classes: How many there are.
    """

    def __init__(self, classes: int):
        shown = min(classes, MOST_CLASSES)
        chosen = sorted({number * classes // shown for number in range(shown)})
        self.each = max(1, SAMPLES // (2 * shown))
        self.first: List[torch.Tensor] = []  # images (C, H, W)
        self.most_first = {label: max(1, SAMPLES // shown) for label in chosen}
        self.found: Dict[Tuple[int, bool], List[Tuple[torch.Tensor, int, float]]] = {  # by class and whether right
            (label, right): [] for label in chosen for right in (True, False)
        }

    def add(self, images: torch.Tensor, target: torch.Tensor, output: torch.Tensor) -> None:
        """Keep what is missing yet of a batch: images `(n, C, H, W)`, labels `(n,)`, logits `(n, classes)`."""
        chances, labels = output.float().softmax(-1).max(-1)
        rows = zip(target.tolist(), labels.tolist(), chances.tolist(), strict=True)
        for image, (truth, label, chance) in zip(images, rows, strict=True):
            if self.most_first.get(truth) and len(self.first) < SAMPLES:
                self.most_first[truth] -= 1
                self.first.append(image.clone())
            kept = self.found.get((truth, truth == label))
            if kept is not None and len(kept) < self.each:
                kept.append((image.clone(), label, chance))


class MetricsWriter:
    """Writes a run's metrics to a folder; on a resume what was written after the position is dropped.

    Args:
        folder: The run's folder.
        run: A `loop.Run`.
        position: Where the run goes on.
        class_names: Names by label, or None.
        data_config: Mean and standard deviation that the images were normalised with.
        settings: The run's, by their names, for TensorBoard's tab of hyperparameters.
    """

    def __init__(
        self,
        folder: Path,
        run: Run,
        position: Position,
        class_names: Optional[List[str]],
        data_config: Dict[str, Any],
        settings: Dict[str, Any],
    ):
        self.run, self.class_names, self.data_config = run, class_names, data_config
        self.summary = folder / 'summary.csv'
        self.shown: Optional[Samples] = None
        if os.path.lexists(self.summary):
            self._trim_summary(position.epoch)
        update = run.done(position)
        # At an epoch's last update its validation is still to come. A run that was killed after that has drawn it
        # already: all points of the update go, and those of training come again.
        points = train_points(folder, update) if TENSORBOARD and position.update == run.updates_per_epoch else []
        with self._disk_errors():
            self.writer = _event_writer(folder, update if points else update + 1)
            for name, value, when in points:
                self.writer.add_scalar(name, value, update, walltime=when)
            if layers := list(_health_layers(run).values()):
                charts = {name: ['Multiline', [f'{ATTENTION}/{name}/{it}' for it in layers]] for name in HEALTH}
                self.writer.add_custom_scalars({ATTENTION: charts})
            self._write_hyperparameters({key: value for key, value in settings.items() if key not in NO_EFFECT})
        self.complete = False
        self.wandb = _start_wandb(run, folder, settings)

    def _write_hyperparameters(self, settings: Dict[str, Any], ended: bool = False) -> None:
        """The beginning or the end of the run in TensorBoard's tab of hyperparameters. (SummaryWriter.add_hparams makes
        a run of its own of them, and takes its metrics at the moment of the call.)"""
        if not TENSORBOARD:
            return
        from torch.utils.tensorboard.summary import hparams

        plain = {
            key: value if isinstance(value, (int, float)) else encodable(str(value))
            for key, value in settings.items()
            if value is not None
        }
        experiment, start, end = hparams(plain, dict.fromkeys(('eval/top1', 'eval/top5', 'eval/loss'), 0))
        for part in (end,) if ended else (experiment, start):
            self.writer.file_writer.add_summary(part)

    def finish(self) -> None:
        """The run is complete."""
        self.complete = True
        with self._disk_errors():
            self._write_hyperparameters({}, ended=True)

    def _trim_summary(self, epoch: int) -> None:
        """Drop the rows from `epoch` on. A file that is not this run's is no reason to stop it, and is kept. One that
        cannot be read may be this run's."""
        try:
            if self._check_summary(epoch) > epoch:  # a kill before the checkpoint leaves that of the epoch alone
                with saving(kept := free_name(self.summary, 'before')) as partial:
                    shutil.copy(self.summary, partial)
                log.warning(f'warning: {self.summary} has epochs after {epoch - 1}, which come again: kept as {kept}')
            self._rewrite_summary(lambda name: trim_summary(name, epoch))
        except OSError as error:
            raise LocalError(f'{self.summary}: cannot be read ({reason_of(error)}); mend that or move it') from error
        except (ValueError, csv.Error) as error:
            kept = set_aside(self.summary)
            log.warning(f'warning: {self.summary} is no summary of this run ({str(error)[:80]}): kept as {kept}')

    def _check_summary(self, epoch: int) -> float:
        """The last epoch in the file, -1 of none; ValueError or csv.Error where it is not one of this run, which has
        come to `epoch`."""
        if not self.summary.is_file():
            raise ValueError('no file')
        with open(self.summary, newline='', encoding='utf-8') as file:
            reader = csv.DictReader(file)
            columns, rows = reader.fieldnames or ['epoch', 'train_loss'], list(reader)
        if columns[0] != 'epoch' or 'train_loss' not in columns:
            raise ValueError('other columns')
        if any(None in row or None in row.values() for row in rows):
            raise ValueError('a row of more or fewer cells than columns')
        if not all(float(row['epoch']).is_integer() for row in rows):
            raise ValueError('an epoch that is no whole number')
        if not epoch and len(rows) > 1:  # one is what a kill before the first checkpoint leaves
            raise ValueError('epochs of another run')
        return max((float(row['epoch']) for row in rows), default=-1)

    def _fit_summary(self, name: str, columns: List[str]) -> None:
        """Columns that the new settings of a resumed run lack move to the end; rows that lack cells get empty ones."""
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
                f'{folder}: the curves cannot be written ({reason_of(error)}); {remedy(folder, error)}'
            ) from error

    def _rewrite_summary(self, change: Callable[[str], None]) -> None:
        with saving(self.summary) as partial:
            if self.summary.exists():
                shutil.copy(self.summary, partial)
                if _end_last_line(partial):
                    log.warning(
                        f'warning: {self.summary}: its last line had no end, which is added; if the file was cut, the '
                        f'number there may be, too'
                    )
            change(str(partial))

    def scalar(self, update: int, name: str, value: float) -> None:
        with self._disk_errors():
            self.writer.add_scalar(name, value, update)

    def samples(self) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]:
        """What keeps images of the validation that begins, for `epoch` to show: takes each batch of it."""
        self.shown = Samples(unwrap_model(self.run.task.get_eval_model()).num_classes)
        return self.shown.add

    def epoch(
        self, position: Position, train_metrics: Dict[str, float], eval_metrics: Dict[str, float], lr: float
    ) -> None:
        """Write the epoch that ends at `position`, the start of the next one; without validation it has no
        `eval_metrics`."""
        names = self.run.task.create_evaluator(max_samples=None).metric_names
        blank = dict.fromkeys([*names, *(f'raw_{name}' for name in names if self.run.task.has_ema())], '')
        row = eval_metrics or blank
        columns = ['epoch', *(f'train_{name}' for name in train_metrics), *(f'eval_{name}' for name in row), 'lr']

        def add_row(name: str) -> None:
            self._fit_summary(name, columns)
            update_summary(position.epoch - 1, train_metrics, row, filename=name, lr=lr)
            self._fit_summary(name, columns)  # timm's row ends with its own columns

        self._rewrite_summary(add_row)
        if self.wandb:
            described = {f'train_{name}': value for name, value in train_metrics.items()}
            described |= {f'eval_{name}': value for name, value in eval_metrics.items()}
            self.wandb.log(dict(epoch=position.epoch - 1, **described, lr=lr))  # the names are timm's, of summary.csv
        update = self.run.done(position)
        for name, value in eval_metrics.items():
            self.scalar(update, f'eval/{name}', value)
        if self.shown and self.shown.first:  # not where none of this process's share of the images can be read
            with self._disk_errors():
                self.writer.add_image('validation', self._picture(self.shown), update)
            for layer, masses in attention_health(self.run, torch.stack(self.shown.first)).items():
                for name, value in masses.items():
                    self.scalar(update, f'{ATTENTION}/{name}/{layer}', value)
        self.shown = None
        self.flush()

    def flush(self) -> None:
        """Bring the curves to the disk: a run that resumes from a checkpoint does not draw what came before it."""
        with self._disk_errors():
            self.writer.flush()

    def close(self) -> None:
        if self.wandb:
            self.wandb.finish(exit_code=0 if self.complete else 1)
        with self._disk_errors():
            self.writer.close()

    def _name(self, label: int) -> str:
        """A class's name: its number where there is none, as where --num-classes is more than --class-map names."""
        names = self.class_names or []
        return printable(encodable(names[label])) if label < len(names) else str(label)

    def _picture(self, samples: Samples) -> np.ndarray:
        """Images class by class, right ones before wrong ones: under each what was predicted, and the truth where that
        is wrong. `(3, H, W)`, 8 bits."""
        rows = [(truth, *kept) for (truth, _), found in samples.found.items() for kept in found]
        pixels = torch.stack([image for _, image, _, _ in rows]).float()
        mean, std = (
            torch.tensor(self.data_config[key], device=pixels.device).view(-1, 1, 1) for key in ('mean', 'std')
        )
        pixels = ((pixels * std + mean).clamp(0, 1) * 255).byte().expand(-1, 3, -1, -1).cpu()
        side, caption, columns = 128, 26, 4 if len(rows) <= 16 else 8
        sheet = Image.new('RGB', (columns * side, -(-len(rows) // columns) * (side + caption)))
        draw = ImageDraw.Draw(sheet)
        for number, (image, (truth, _, label, chance)) in enumerate(zip(pixels, rows, strict=True)):
            left, top = number % columns * side, number // columns * (side + caption)
            picture = Image.fromarray(image.permute(1, 2, 0).numpy())
            sheet.paste(picture.resize((side, side), Image.Resampling.BILINEAR), (left, top))
            right, colour = truth == label, (120, 255, 120) if truth == label else (255, 120, 120)
            lines = [f'{self._name(label)} {100 * chance:.0f} %', '' if right else f'is {self._name(truth)}']
            for line, text in enumerate(lines):
                draw.text((left + 2, top + side + 12 * line), text[:20], fill=colour)
        return np.asarray(sheet).transpose(2, 0, 1)


def _end_last_line(path: Path) -> bool:
    """Add the last line's end where an editor has left it out, since rows are appended. Returns whether all of it was
    missing."""
    content = path.read_bytes()
    half = content.endswith(b'\r')
    if not content or content.endswith(b'\n'):
        return False
    path.write_bytes(content + (b'\n' if half else b'\r\n'))
    return not half


def train_points(folder: Path, update: int) -> List[Tuple[str, float, float]]:
    """(name, value, time) of the scalars of training that a run's newest event file with that update has."""
    from google.protobuf.message import DecodeError
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    for path in sorted(filter(Path.is_file, folder.glob('events.out.tfevents.*')), reverse=True):
        try:
            events = [event for event in LegacyEventFileLoader(str(path)).Load() if event.step == update]
        except DecodeError:  # a record whose checksum is right, and which is no event
            log.warning(f'warning: {path} holds what is no curve of TensorBoard; it is left out')
            continue
        found = [(value.tag, value.simple_value, event.wall_time) for event in events for value in event.summary.value]
        points = [point for point in found if point[0].startswith('train/')]
        if points:
            return points
    return []


def _health_layers(run: Run) -> Dict[Any, str]:
    """The layers that `attention_health` looks at, and their names."""
    model: Any = unwrap_model(run.task.get_eval_model())
    return {
        module: name
        for name, module in model.named_modules()
        if isinstance(module, EvaAttention) and not module.variant
    }


@torch.no_grad()
def attention_health(run: Run, images: torch.Tensor) -> Dict[str, Dict[str, float]]:
    """{layer: {name: value}} of the EVA layers: where attention goes, as a mean over images, heads and queries.

    The images pass through the weights in training, in evaluation mode. `evavit.layers.EvaAttention.attention_mass`
    defines the values. Layers with an ablation have other weights: they are left out.
    """
    model: Any = unwrap_model(run.task.get_eval_model())
    layers = _health_layers(run)
    found: Dict[str, Dict[str, float]] = {}

    def look(layer: Any, args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> None:
        exact, cells, effective = layer.attention_mass(*given_tokens(layer, args, kwargs))
        means = (value.mean().item() for value in (exact, cells, effective))
        found[layers[layer]] = dict(zip(HEALTH, means, strict=True))

    hooks = [layer.register_forward_pre_hook(look, with_kwargs=True) for layer in layers]
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
