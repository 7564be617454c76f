"""experiments/export: top-1 of a run of train.py in every precision, by the reader and decoder of the scripts."""

import os
import pickle

import pytest
from programs import load_program
from runs import CLASSES, MODEL, QUICK, load_script, write_images

pytest.importorskip('torchao', reason='needs evavit[export]')

from evavit.bench.results import read_rows
from evavit.errors import run_script


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp('run')
    for split, count in (('train', 8), ('validation', 4)):
        write_images(root / 'images' / split, dict.fromkeys(CLASSES, count))
    flags = [*MODEL, *QUICK, '--data-dir', root / 'images', '--output', root, '--experiment', 'run']
    assert run_script(load_script('train').main, [str(flag) for flag in flags]) == 0
    return root


def call(*flags):
    program = load_program('experiments/export/run.py')
    return run_script(program.main, [*map(str, flags), '--repeats', '0'])


def test_top1_of_a_run(place, tmp_path, capsys):
    flags = ['--checkpoint', place / 'run' / 'last.safetensors', '--data-dir', place / 'images']
    program = load_program('experiments/export/run.py')
    for _ in range(2):  # the same rows take the place of those before
        assert call(*flags, '--results-file', tmp_path / 'rows.csv') == 0, capsys.readouterr()
    rows = read_rows(tmp_path / 'rows.csv', program.COLUMNS)
    assert [row['precision'] for row in rows] == list(program.exporting.PRECISIONS)
    assert all(row['images'] == str(4 * len(CLASSES)) and 0 <= float(row['top1']) <= 100 for row in rows)


class Payload:
    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_a_pickle_with_code_is_a_line(place, tmp_path, capsys):
    payload = Payload()
    payload.folder = str(tmp_path / 'ran')
    (tmp_path / 'bad.pth').write_bytes(pickle.dumps(payload))
    flags = ['--checkpoint', tmp_path / 'bad.pth', '--data-dir', place / 'images']
    assert call(*flags, '--results-file', tmp_path / 'rows.csv') == 2
    err = capsys.readouterr().err
    assert err.startswith('error: ') and err.count('\n') == 1 and 'bad.pth' in err
    assert not (tmp_path / 'ran').exists() and not (tmp_path / 'rows.csv').exists()


def test_a_file_of_other_columns_stays(tmp_path, capsys):
    (tmp_path / 'mine.csv').write_text('name,age\nA,3\n')
    assert call('--results-file', tmp_path / 'mine.csv') == 2
    assert 'has other columns; name another file' in capsys.readouterr().err
    assert (tmp_path / 'mine.csv').read_text() == 'name,age\nA,3\n'
