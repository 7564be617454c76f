"""Precision, recall, F1 and the confusion matrix against scikit-learn; calibration against its definition."""

import csv
import math

import numpy as np
import pytest
import torch
from PIL import Image

from evavit.cli.validate import check_report_file
from evavit.errors import UserError
from evavit.training import report
from evavit.training.distributed import Process

CLASSES = 7


@pytest.fixture
def predictions():
    """Of 200 images of six classes; class 5 has no image but predictions, class 6 neither."""
    rng = np.random.default_rng(0)
    target = rng.integers(0, 5, 200)
    label = np.where(rng.random(200) < 0.6, target, rng.integers(0, 6, 200))
    return report.Predictions(target, label, rng.uniform(0.2, 1, 200), (label == target) | (rng.random(200) < 0.5))


@pytest.mark.parametrize('average', ['macro', 'micro', 'weighted'])
def test_averages_are_those_of_scikit_learn(predictions, average):
    metrics = pytest.importorskip('sklearn.metrics')
    expected = metrics.precision_recall_fscore_support(
        predictions.target, predictions.label, average=average, zero_division=0
    )
    found = report.averages(report.class_metrics(predictions, CLASSES), average)
    np.testing.assert_allclose(list(found.values()), expected[:3], rtol=1e-12)
    assert list(found) == ['precision', 'recall', 'f1_score']


def test_classes_and_matrix_are_those_of_scikit_learn(predictions):
    metrics = pytest.importorskip('sklearn.metrics')
    labels = range(CLASSES)
    expected = metrics.precision_recall_fscore_support(
        predictions.target, predictions.label, labels=labels, zero_division=np.nan
    )
    found = report.class_metrics(predictions, CLASSES)
    for value, other in zip((found.precision, found.recall, found.images), (*expected[:2], expected[3]), strict=True):
        np.testing.assert_allclose(value, other)
    assert np.isnan(found.f1_score[6]) and found.f1_score[5] == 0  # scikit-learn has NaN for class 5, too
    np.testing.assert_allclose(found.f1_score[:5], expected[2][:5])
    matrix = metrics.confusion_matrix(predictions.target, predictions.label, labels=labels)
    np.testing.assert_array_equal(report.confusion_matrix(predictions, CLASSES), matrix)


def test_calibration_error_by_its_definition(predictions):
    bins = report.calibration(predictions)
    error = 0.0
    for number in range(15):
        inside = (predictions.chance > number / 15) & (predictions.chance <= (number + 1) / 15)
        if inside.any():
            accuracy = (predictions.target == predictions.label)[inside].mean()
            error += inside.mean() * abs(accuracy - predictions.chance[inside].mean())
        assert bins[number].images == inside.sum()
    assert report.calibration_error(bins) == pytest.approx(error)
    sure = predictions._replace(chance=np.ones(200))  # always certain: off by the share of errors
    wrong = (predictions.target != predictions.label).mean()
    assert report.calibration_error(report.calibration(sure)) == pytest.approx(wrong)


def test_the_evaluator_keeps_what_it_saw():
    evaluator = report.PredictionEvaluator('cpu')
    logits, target = torch.randn(10, 8), torch.randint(0, 8, (10,))
    evaluator.update(logits[:7], target[:7])
    evaluator.update(logits[7:], target[7:])
    found = evaluator.predictions(Process(torch.device('cpu'), 0, 0, 1))
    assert found.target.tolist() == target.tolist() and found.label.tolist() == logits.argmax(-1).tolist()
    np.testing.assert_allclose(found.chance, logits.softmax(-1).amax(-1), rtol=1e-6)
    top5 = evaluator.compute()['top5']
    assert 100 * found.top5.mean() == pytest.approx(top5)


def test_files(predictions, tmp_path):
    names = [f'class {label}' for label in range(CLASSES)]
    report.write_report(tmp_path / 'deep' / 'report', predictions, names, check_report_file)
    with open(tmp_path / 'deep' / 'report' / 'classes.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert [row['class'] for row in rows] == names and sum(int(row['images']) for row in rows) == 200
    assert rows[6]['precision'] == rows[6]['top1'] == '' and rows[5]['precision'] == '0.0000'
    right = sum(int(row['images']) * float(row['top1'] or 0) / 100 for row in rows)
    assert right == pytest.approx((predictions.target == predictions.label).sum(), abs=0.01)
    with open(tmp_path / 'deep' / 'report' / 'confusion.csv', newline='') as file:
        header, *lines = csv.reader(file)
    assert header[1:] == names and [line[0] for line in lines] == names
    np.testing.assert_array_equal(
        np.array([line[1:] for line in lines], int), report.confusion_matrix(predictions, CLASSES)
    )
    with open(tmp_path / 'deep' / 'report' / 'calibration.csv', newline='') as file:
        bins = list(csv.DictReader(file))
    assert float(bins[0]['above']) == 0 and float(bins[-1]['up_to']) == 100  # in percent, as the probabilities
    for each in bins:
        assert not each['probability'] or float(each['above']) <= float(each['probability']) <= float(each['up_to'])
    with Image.open(tmp_path / 'deep' / 'report' / 'confusion.png') as picture:
        assert picture.size[1] > CLASSES * 40
    (tmp_path / 'file').touch()
    with pytest.raises(UserError, match=r'--report-dir .*file: cannot be written'):
        report.write_report(tmp_path / 'file', predictions, names, check_report_file)
    with pytest.raises(UserError, match=r'21,841 classes, above 5,000'):
        report.check_report('here', 21_841)


def test_a_report_s_name_that_somebody_took_meanwhile_stays(predictions, tmp_path, caplog):
    """An earlier report's files are written anew."""
    names, tables = list(map(str, range(CLASSES))), [*report.TABLES, report.PICTURE]
    assert [report.write_report(tmp_path, predictions, names, check_report_file) for _ in range(2)] == [tables, tables]
    (tmp_path / 'classes.csv').write_text('mine')
    (tmp_path / 'confusion.png').write_text('mine')
    caplog.clear()
    written = report.write_report(tmp_path, predictions, names, check_report_file)
    assert written == ['classes-1.csv', 'confusion.csv', 'calibration.csv', 'confusion-1.png']
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted({*tables, *written})
    assert (tmp_path / 'classes.csv').read_text() == (tmp_path / 'confusion.png').read_text() == 'mine'
    assert [f'the results are in {tmp_path / name}' in caplog.text for name in written] == [True, False, False, True]


def test_names_of_classes_are_drawn_on_one_line(predictions, tmp_path):
    names = ['a\nb', '\x1b[31mred', *'cdefghijklm'][:CLASSES]
    report.write_report(tmp_path, predictions, names, check_report_file)
    assert (tmp_path / 'confusion.png').exists()


@pytest.mark.parametrize('classes', [2, 60, 61, 1000])
def test_the_picture_is_dark_where_the_images_are(classes):
    matrix = 3 * np.eye(classes, dtype=int)
    picture = np.asarray(report.draw_confusion(matrix, list(map(str, range(classes)))), int)
    cell = max(1, min(40, 960 // classes))
    blue = (picture == [0, 63, 165]).all(-1)
    assert classes * cell**2 * 0.5 < blue.sum() <= classes * cell**2
    assert math.isclose(blue.nonzero()[0].mean() - blue.nonzero()[1].mean(), 16, abs_tol=1)  # along the diagonal
