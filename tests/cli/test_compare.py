"""python -m evavit.compare: rows and files, and every fault is one line."""

import csv
import subprocess
import sys

import pytest
import torch
from PIL import Image

from evavit.bench import compare as attentions
from evavit.cli import compare
from evavit.errors import UserError, run_script
from evavit.training.distributed import start_process


def call(capsys, *flags):
    code = run_script(compare.main, [str(flag) for flag in flags])
    out, err = capsys.readouterr()
    return code, out, err


def test_a_table_and_a_file(capsys, tmp_path):
    pytest.importorskip('sklearn')
    path = tmp_path / 'new' / 'rows.csv'
    code, out, err = call(
        capsys,
        '--tokens',
        49,
        '5x9',
        '--attentions',
        'softmax',
        'eva',
        'reformer',
        '--repeats',
        1,
        '--warmup',
        1,
        '-b',
        2,
        '--results-file',
        path,
        '--device',
        'cpu',
    )
    assert code == 0, err
    with open(path, newline='') as stream:
        rows = list(csv.DictReader(stream))
    assert [(row['tokens'], row['attention']) for row in rows] == [
        (tokens, name) for tokens in ('49', '5x9') for name in ('mean', 'softmax', 'eva', 'reformer')
    ]
    by_name = {row['attention']: row for row in rows[:4]}
    assert float(by_name['softmax']['error']) < 1e-4 < float(by_name['eva']['error']) < float(by_name['mean']['error'])
    for row in rows:
        assert row['batch_size'] == '2' and row['torch'] == torch.__version__ and row['device'] and row['commit']
        if row['attention'] != 'mean':
            assert float(row['forward_backward_ms']) > 0 and float(row['memory_mib']) > 0
    assert all(f'{row["attention"]:>14}{row["error"]:>8}' in out for row in rows)
    again = ['--tokens', 4, '--attentions', 'softmax', '--repeats', 1, '--device', 'cpu', '--results-file', path]
    for _ in range(2):  # rows of other comparisons stay, those of the same one are replaced
        assert call(capsys, *again)[0] == 0
        with open(path, newline='') as stream:
            found = list(csv.DictReader(stream))
        assert found[:-2] == rows and [(row['tokens'], row['attention']) for row in found[-2:]] == [
            ('4', 'mean'),
            ('4', 'softmax'),
        ]


def test_half_precision_and_a_picture_of_ones_own(capsys, tmp_path):
    Image.radial_gradient('L').save(tmp_path / 'mine.png')
    code, out, err = call(
        capsys,
        '--tokens',
        49,
        '--attentions',
        'softmax',
        '--repeats',
        1,
        '--warmup',
        1,
        '--dtype',
        'bfloat16',
        '--image',
        tmp_path / 'mine.png',
        '--device',
        'cpu',
    )
    assert code == 0, err
    error = float(out.splitlines()[-1].split()[2])
    assert 1e-4 < error < 1e-2  # rounding alone


@pytest.mark.parametrize(
    'flags, words',
    [
        (['--tokens', '200'], ['200', 'no square', '14x14']),
        (['--tokens', '4x'], ['4x', 'number of tokens or a grid']),
        (['--tokens', '0'], ['0', 'number of tokens or a grid']),
        (['--attentions', 'evo'], ['evo', 'eva']),
        (['--dtype', 'float8'], ['float8', 'bfloat16']),
        (['--tokens', '４９'], ['４９', 'number of tokens or a grid']),
        (['--logit-std', '1e300'], ['1e300', 'at most 1000']),
        (['--seed', '２'], ['２', 'a whole number']),
        (['--device', 'gpu'], ['gpu', 'cuda']),
        (['--device', 'cuda:99'], ['cuda:99', '--device cpu']),
        (['--image', 'nowhere.jpg'], ['--image', 'nowhere.jpg']),
        (['--image', __file__], ['--image', 'test_compare.py']),
        (['--image', '/dev/zero'], ['--image /dev/zero', 'not a regular file']),
        (['--logit-std', '0'], ['0', 'above 0']),
        (['--logit-std', 'nan'], ['nan', 'above 0']),
        (['-b', '0'], ['0', 'at least 1']),
        (['--results-file', 'rows.txt'], ['rows.txt', '.csv']),
        (['--results-file', f'{__file__}/rows.csv'], ['--results-file', 'rows.csv', 'another']),
        (['--seed', '-1'], ['-1', 'whole number']),
        (['--seed', str(10**23)], ['below 2⁶³']),
        (['--tokns', '4'], ['--tokns']),
    ],
)
def test_bad_input_is_one_line(capsys, monkeypatch, tmp_path, flags, words):
    monkeypatch.chdir(tmp_path)
    code, _, err = call(capsys, *flags)
    lines = err.splitlines()
    assert code == 2 and len(lines) == 1 and lines[0].startswith('error: ') and all(word in err for word in words), err
    assert not list(tmp_path.iterdir())


def test_no_memory_is_a_line_on_its_own_flags():
    flags = ['--tokens', '100000000x100000000', '--device', 'cpu']
    done = subprocess.run([sys.executable, '-m', 'evavit.compare', *flags], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith('error: no memory is left ('), done.stderr
    assert done.stderr.endswith(': lower the batch size (-b) or --tokens\n') and done.stderr.count('\n') == 1


def test_a_table_of_others_is_not_replaced(capsys, tmp_path):
    (tmp_path / 'own.csv').write_text('name,size\na,1\n')
    code, _, err = call(capsys, '--tokens', 4, '--attentions', 'softmax', '--results-file', tmp_path / 'own.csv')
    assert code == 2 and 'own.csv has other columns; name another file' in err and err.count('\n') == 1
    assert (tmp_path / 'own.csv').read_text() == 'name,size\na,1\n'


def test_a_backend_that_no_operator_has_is_a_line(capsys, monkeypatch):
    monkeypatch.setattr('evavit.ops.backends._preferred', 'cudnn')
    code, _, err = call(capsys, '--tokens', 4)
    assert code == 2 and err == "error: EVAVIT_BACKEND is 'cudnn'; choose from gluon, plain, triton\n"
    with pytest.raises(UserError, match="EVAVIT_BACKEND is 'cudnn'"):  # as the examples do
        start_process('cpu')


def test_a_grid_that_is_no_square_has_its_own_rows_as_they_come(capsys, monkeypatch, tmp_path):
    pytest.importorskip('sklearn')
    path = tmp_path / 'rows.csv'
    flags = ['--attentions', 'softmax', '--repeats', 1, '--warmup', 1, '--device', 'cpu', '--results-file', path]

    def stored():
        with open(path, newline='') as stream:
            return [(row['tokens'], row['attention']) for row in csv.DictReader(stream)]

    for grid in ('2x8', '4', '8x2', '16'):
        assert call(capsys, '--tokens', grid, *flags)[0] == 0
    rows = [(tokens, name) for tokens in ('2x8', '4', '8x2', '16') for name in ('mean', 'softmax')]
    assert stored() == rows
    before, made = attentions.make_attention, []

    def once(*args):
        made.append(args)
        return before(*args) if len(made) == 1 else pytest.fail('killed')

    monkeypatch.setattr(attentions, 'make_attention', once)
    with pytest.raises(BaseException, match='killed'):
        call(capsys, '--tokens', '9', '25', *flags)
    rows += [('9', 'mean'), ('9', 'softmax'), ('25', 'mean')]
    assert stored() == rows
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    for colour in ('red', 'blue'):  # pictures of one name, that of the picture by default
        Image.new('RGB', (32, 32), colour).save('china.jpg')
        assert call(capsys, '--tokens', '4', *flags, '--image', 'china.jpg')[0] == 0
        rows += [('4', 'mean'), ('4', 'softmax')]
    assert stored() == rows
