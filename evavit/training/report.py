"""What a classifier does right and wrong, class by class, and how well its probabilities are calibrated.

All of it is sums over predictions, in NumPy: scikit-learn or torchmetrics would be a dependency of every installation
for them. `tests/training/test_report.py` compares with scikit-learn.
"""

import csv
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, Mapping, NamedTuple, Optional, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw
from timm.task import ClassificationEvaluator

from evavit.errors import UserError, printable, reason_of
from evavit.files import open_regular, place_after, replacing
from evavit.training.distributed import Process

BINS = 15  # of the probability in the calibration error, as in Guo et al., 2017 (arXiv:1706.04599)
MOST_CLASSES = 5000  # of a confusion matrix: beyond, its file would be larger than the data set's
NAMED = 60  # most classes whose names fit beside the picture
CONFUSION = 'confusion.csv'
TABLES = {  # files of a report and how their first rows begin
    'classes.csv': ['label', 'class', 'images', 'predicted', 'top1', 'top5', 'precision', 'recall', 'f1_score'],
    CONFUSION: ['label \\ predicted'],
    'calibration.csv': ['above', 'up_to', 'images', 'probability', 'accuracy'],
}
PICTURE = 'confusion.png'
MARK = ('Software', 'evavit')  # in the picture's text


class Predictions(NamedTuple):
    """Of each image, `(n,)`: its label, the one predicted, that one's probability, whether its own is in the first
    five."""

    target: np.ndarray
    label: np.ndarray
    chance: np.ndarray
    top5: np.ndarray


class PredictionEvaluator(ClassificationEvaluator):
    """timm's evaluator, which also keeps every prediction."""

    def reset(self) -> None:
        super().reset()
        self.kept: List[torch.Tensor] = []

    def update(self, output: torch.Tensor, target: torch.Tensor) -> None:
        """Take in logits `(n, classes)` and labels `(n,)`."""
        super().update(output, target)
        chances = output.float().softmax(-1)
        first = chances.topk(min(5, output.shape[-1]), dim=-1)
        hit = (first.indices == target[:, None]).any(-1)
        self.kept.append(torch.stack((target, first.indices[:, 0], first.values[:, 0], hit), dim=0).double())

    def predictions(self, process: Process) -> Predictions:
        """Those of all processes."""
        own = torch.cat(self.kept, 1) if self.kept else torch.zeros(4, 0)
        target, label, chance, hit = np.concatenate(process.gather(own.cpu().numpy()), 1)
        return Predictions(target.astype(int), label.astype(int), chance, hit.astype(bool))


class ClassMetrics(NamedTuple):
    """Of each class, `(classes,)` each: images with its label, images predicted to have it, and shares between 0 and 1.
    A share of no image is NaN."""

    images: np.ndarray
    predicted: np.ndarray
    top5: np.ndarray
    precision: np.ndarray
    recall: np.ndarray  # also the accuracy on the images of the class
    f1_score: np.ndarray


def class_metrics(predictions: Predictions, classes: int) -> ClassMetrics:
    right = predictions.target == predictions.label
    images, predicted, hits, in_five = (
        np.bincount(labels, minlength=classes)
        for labels in (
            predictions.target,
            predictions.label,
            predictions.target[right],
            predictions.target[predictions.top5],
        )
    )
    with np.errstate(invalid='ignore', divide='ignore'):
        return ClassMetrics(
            images, predicted, in_five / images, hits / predicted, hits / images, 2 * hits / (images + predicted)
        )


def averages(metrics: ClassMetrics, average: str) -> Dict[str, float]:
    """Precision, recall and F1 between 0 and 1, averaged over the classes that were seen or predicted.

    Args:
        metrics: Of each class; what is undefined counts as 0.
        average: 'macro', their mean; 'weighted', by their images; 'micro', over all images, where each of the three is
            the accuracy.
    """
    there = metrics.images + metrics.predicted > 0
    values = {name: np.nan_to_num(getattr(metrics, name)[there]) for name in ('precision', 'recall', 'f1_score')}
    images = metrics.images[there]
    if average == 'micro':
        accuracy = float((values['recall'] * images).sum() / images.sum())
        return dict.fromkeys(values, accuracy)
    weights = images if average == 'weighted' else np.ones(len(images))
    return {name: float((value * weights).sum() / weights.sum()) for name, value in values.items()}


class Bin(NamedTuple):
    """Images whose prediction has a probability in (low, high]: their number, mean probability and accuracy, 0 to 1."""

    low: float
    high: float
    images: int
    chance: float
    accuracy: float


def calibration(predictions: Predictions) -> List[Bin]:
    """`BINS` bins of equal width; NaN where one is empty."""
    place = np.clip(np.ceil(predictions.chance * BINS).astype(int) - 1, 0, BINS - 1)
    right = predictions.target == predictions.label
    images, chances, hits = (
        np.bincount(place, weights=weights, minlength=BINS) for weights in (None, predictions.chance, right)
    )
    with np.errstate(invalid='ignore', divide='ignore'):
        means = zip(images.tolist(), (chances / images).tolist(), (hits / images).tolist(), strict=True)
    return [Bin(number / BINS, (number + 1) / BINS, *mean) for number, mean in enumerate(means)]


def calibration_error(bins: Iterable[Bin]) -> float:
    """The expected calibration error: the mean over images of |accuracy - probability| of their bin, 0 to 1."""
    full = [each for each in bins if each.images]
    return sum(each.images * abs(each.accuracy - each.chance) for each in full) / sum(each.images for each in full)


def confusion_matrix(predictions: Predictions, classes: int) -> np.ndarray:
    """Numbers of images `(classes, classes)`: row the label, column the prediction."""
    pairs = predictions.target * classes + predictions.label
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def check_report(folder: Optional[str], classes: int) -> None:
    """UserError where `write_report` would write too much."""
    if folder and classes > MOST_CLASSES:
        raise UserError(
            f'--report-dir {folder}: a confusion matrix of {classes:,} classes, above {MOST_CLASSES:,}; leave it out, '
            f'--metrics-avg needs none'
        )


def is_own_picture(path: Path) -> bool:
    """Whether a file is empty or a picture that `write_report` wrote. OSError where it cannot be read."""
    with open_regular(path) as file:
        head = file.read(200)
    return not head or '\0'.join(MARK).encode() in head


def is_own_table(first: List[str], names: List[str], rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a table that begins with the columns `first`, of `TABLES`, is one of a report, with nothing added."""
    if first == TABLES[CONFUSION]:
        return names[:1] == first and len(rows) == len(names) - 1
    if first == TABLES['calibration.csv']:
        return names == first and len(rows) == BINS
    return names == first and [row['label'] for row in rows] == [*map(str, range(len(rows)))]


def write_report(
    folder: Path, predictions: Predictions, names: Sequence[str], check: Callable[[Path], None]
) -> List[str]:
    """Write classes.csv, confusion.csv, confusion.png and calibration.csv; shares are in percent, undefined ones empty.

    Args:
        folder: Made where it is missing.
        predictions: Of all images.
        names: Of the classes, by label.
        check: Raises UserError for a name that a file of others has.

    Returns:
        The files' names, which are others where files of others have these by now, see `place_after`.

    Raises:
        UserError: It cannot be written.
    """
    from PIL.PngImagePlugin import PngInfo  # whose import registers a format with Pillow

    metrics, matrix = class_metrics(predictions, len(names)), confusion_matrix(predictions, len(names))
    shares = [
        [_percent(value) for value in column]
        for column in (metrics.recall, metrics.top5, metrics.precision, metrics.recall, metrics.f1_score)
    ]
    by_class = zip(range(len(names)), names, metrics.images, metrics.predicted, *shares, strict=True)
    bins = [
        (_percent(it.low), _percent(it.high), int(it.images), _percent(it.chance), _percent(it.accuracy))
        for it in calibration(predictions)
    ]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        of_names: Sequence[Sequence[str]] = ([], names, [])
        rows = (by_class, zip(names, *matrix.T, strict=True), bins)
        written = []
        for (name, header), more, lines in zip(TABLES.items(), of_names, rows, strict=True):
            written.append(place_after(folder / name, check))
            _write_csv(written[-1], [[*header, *more], *lines])
        about = PngInfo()
        about.add_text(*MARK)
        picture = draw_confusion(matrix, names)
        written.append(place_after(folder / PICTURE, check))
        with replacing(written[-1]) as partial:
            picture.save(partial, format='PNG', pnginfo=about)
    except OSError as error:
        raise UserError(f'--report-dir {folder}: cannot be written ({reason_of(error)})') from error
    return [path.name for path in written]


def _percent(value: float) -> str:
    return '' if np.isnan(value) else f'{100 * value:.4f}'


def _write_csv(path: Path, rows: Iterable[Iterable[Any]]) -> None:
    with replacing(path) as partial, open(partial, 'w', encoding='utf-8', newline='') as file:
        csv.writer(file).writerows(rows)


def draw_confusion(matrix: np.ndarray, names: Sequence[str]) -> Image.Image:
    """A confusion matrix as a picture: the darker a cell, the larger its share of the images with the row's label; with
    names and, where they fit, numbers. (matplotlib is no dependency of the package.)"""
    classes, names = len(names), [printable(name)[:24] for name in names]
    cell = max(1, min(40, 960 // classes))
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    pixels = (255 * (1 - shares[..., None] * np.array([1, 0.75, 0.35]))).astype(np.uint8)
    grid = Image.fromarray(pixels).resize((cell * classes, cell * classes), Image.Resampling.NEAREST)
    named = classes <= NAMED
    edge = 8 + (max(round(ImageDraw.Draw(grid).textlength(name)) for name in names) if named else 0)
    top = edge + 16
    picture = Image.new('RGB', (max(edge + grid.width + 8, 280), top + grid.height + 8), 'white')
    picture.paste(grid, (edge, top))
    draw = ImageDraw.Draw(picture)
    draw.text((4, 2), 'rows: label, columns: prediction', fill='black')
    draw.rectangle((edge - 1, top - 1, edge + grid.width, top + grid.height), outline='grey')
    for number, name in enumerate(names if named else ()):
        middle = number * cell + cell // 2
        draw.text((edge - 4, top + middle), name, fill='black', anchor='rm')
        column = Image.new('RGB', (edge, 12), 'white')
        ImageDraw.Draw(column).text((2, 6), name, fill='black', anchor='lm')
        column = column.rotate(90, expand=True)
        picture.paste(column, (edge + middle - 6, top - edge - 3))
    if cell >= 24:
        for row, column_number in zip(*matrix.nonzero(), strict=True):
            fill = 'white' if shares[row, column_number] > 0.5 else 'black'
            place = (edge + column_number * cell + cell // 2, top + row * cell + cell // 2)
            draw.text(place, str(matrix[row, column_number]), fill=fill, anchor='mm')
    return picture
