"""Results files: rows that replace one another, failures that are measured again, files of other columns."""

import multiprocessing
import os
from pathlib import Path

import pytest
import torch

from evavit.bench.results import (
    ADDED,
    COLUMNS,
    ORIGIN,
    check_place,
    check_replaced,
    check_writable,
    is_done,
    origin,
    read_rows,
    store_rows,
    write_rows,
)
from evavit.errors import UserError


def test_failures_are_measured_again(tmp_path):
    path = tmp_path / 'results.csv'
    row = dict(bench='op', case='5x5', tokens=25, device='cpu', commit='abc', status='2e-1 from float64')
    store_rows(path, [row])
    assert not is_done(path, row)
    for ms in ('', 'nan', '1.5x'):
        store_rows(path, [dict(row, status='ok', ms=ms)])
        assert not is_done(path, row)
    store_rows(path, [dict(row, status='ok', ms=1.5)])
    assert is_done(path, row) and len(read_rows(path)) == 1 and not is_done(path, dict(row, tokens=36))
    assert tuple(read_rows(path)[0]) == COLUMNS


def test_a_file_of_other_columns_stays(tmp_path):
    path = tmp_path / 'rows.csv'
    path.write_text('a,b\n1,2\n')
    for refused in (lambda: read_rows(path), lambda: store_rows(path, [])):
        with pytest.raises(UserError, match='other columns'):
            refused()
    assert path.read_text() == 'a,b\n1,2\n'
    assert read_rows(path, ('a', 'b')) == [{'a': '1', 'b': '2'}] and read_rows(tmp_path / 'none.csv') == []


def test_a_file_that_is_empty_or_begins_with_a_mark(tmp_path):
    path = tmp_path / 'rows.csv'
    path.touch()
    with pytest.raises(UserError, match=r'rows\.csv is empty; name another file'):
        read_rows(path, ('a', 'b'))
    path.write_text('a,b\n1,2\n', encoding='utf-8-sig')  # as spreadsheets write it
    assert read_rows(path, ('a', 'b')) == [{'a': '1', 'b': '2'}]


def _store(path, name):
    for number in range(20):
        store_rows(path, [dict(bench='op', case=f'{name} {number}', status='ok')])


def test_programs_side_by_side_lose_no_row(tmp_path):
    path = tmp_path / 'rows.csv'
    jobs = [multiprocessing.get_context('fork').Process(target=_store, args=(path, name)) for name in 'abc']
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert [job.exitcode for job in jobs] == [0, 0, 0] and len(read_rows(path)) == 60


@pytest.mark.parametrize('cells, line', [('more', '4,5,6\n'), ('fewer', '4')])
def test_a_row_of_more_cells_or_fewer_is_a_line(tmp_path, cells, line):
    path = tmp_path / 'rows.csv'
    path.write_text(f'a,b\n1,2\n{line}')
    for refused in (lambda: read_rows(path, ('a', 'b')), lambda: store_rows(path, [], ('a', 'b'), ('a',))):
        with pytest.raises(UserError, match=rf'rows\.csv: row 2 has {cells} cells than columns; mend it, or name'):
            refused()
    assert path.read_text() == f'a,b\n1,2\n{line}'


def test_a_file_of_before_the_sizes_is_read(tmp_path):
    """Attention was measured at one size then, and a comparison of it is still the same one."""
    path = tmp_path / 'rows.csv'
    old = [dict(bench='op', case='5x5', commit='a'), dict(bench='train', case='eva_deit_tiny', commit='a')]
    write_rows(path, old, [column for column in COLUMNS if column not in ADDED])
    assert [{key: row[key] for key in ADDED} for row in read_rows(path)] == [ADDED, dict.fromkeys(ADDED, '')]
    sizes = dict(window_size=7, partition_grid=7, num_prefix_tokens=0, count_cells='one')
    store_rows(path, [dict(bench='op', case='5x5', commit='b', **sizes)])
    store_rows(path, [dict(bench='op', case='5x5', commit='c', **sizes | dict(num_prefix_tokens=5))])
    assert [row['commit'] for row in read_rows(path)] == ['a', 'b', 'c']


def test_a_write_that_fails_leaves_the_rows(tmp_path):
    path = tmp_path / 'rows.csv'
    write_rows(path, [{'a': 1}], ['a'])
    with pytest.raises(ValueError):  # of csv: a row with a column too many
        write_rows(path, [{'a': 2}, {'b': 3}], ['a'])
    assert read_rows(path, ['a']) == [{'a': '1'}] and list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_written_is_known_before(tmp_path):
    path = tmp_path / 'new' / 'rows.csv'
    check_writable(path)
    assert path.parent.is_dir() and not path.exists()
    path.write_text('kept')
    check_writable(path)
    assert path.read_text() == 'kept'
    for bad in (tmp_path, path / 'rows.csv'):
        with pytest.raises(UserError, match='cannot be written'):
            check_writable(bad)


def test_origin_names_the_commit_of_the_environment(monkeypatch):
    monkeypatch.setenv('COMMIT', 'abc')
    found = origin(torch.device('cpu'))
    assert tuple(found) == ORIGIN and found['commit'] == 'abc' and found['torch'] == torch.__version__
    assert found['device'].endswith(' threads')


@pytest.mark.timeout(30)
def test_a_pipe_is_a_line(tmp_path):
    os.mkfifo(tmp_path / 'rows.csv')
    with pytest.raises(UserError, match=r'rows\.csv: cannot be read \(not a regular file\)'):
        read_rows(tmp_path / 'rows.csv')


def test_rows_of_another_program_stay(tmp_path, monkeypatch):
    """While one looks whether it can write the file, another one stores its first rows in it."""
    path, stored = tmp_path / 'rows.csv', []
    monkeypatch.setattr(Path, 'touch', lambda self: stored.append(self.write_text('rows')))
    check_writable(path)
    assert path.exists() == bool(stored) and len(list(tmp_path.iterdir())) == len(stored)


def test_a_write_that_fails_is_a_line(tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(UserError, match=r'rows\.csv: cannot be written \('):
        write_rows(tmp_path / 'file' / 'rows.csv', [])


SPLIT = '{"columns": ["x", "y"], "data": [], "notes": 1}'
LINES = '{"x": 1, "y": 2}\n{"x": 3, "y": 4, "note": 5}\n'
TWO = '{"one": {"x": 1, "y": 2}, "two": {"x": 1, "y": 2, "checked": "by hand"}}'


@pytest.mark.parametrize(
    'name, own, others',
    [
        ('a.csv', 'x,y\n1,2\n', ['a,y\n1,2\n', 'notes', '\x00', 'x\n', 'x,y\n1,2\n1,2,mine\n', 'x,y\n1\n']),
        ('a.json', '{"x": 1, "y": 2}', ['{"a": 1}', 'notes', '[1]', '3', '[' * 10**5]),
        ('a.json', '{"one": {"x": 1, "y": 2}}', ['{"one": {"a": 1}}', '{"one": {"x": 1, "y": 2}, "b": 3}', TWO]),
        (
            'a.json',
            '{"columns": ["x", "y"], "data": []}',
            ['{"columns": ["a"], "data": []}', '{"columns": ["x", "y"], "data": [], "notes": 1}'],
        ),
        (
            'a.json',
            '{"x": 1, "y": 2}\n{"x": 3, "y": 4}\n',
            ['{"a": 1}\n{"a": 2}\n', LINES],
        ),
    ],
)
def test_what_a_table_may_replace(tmp_path, name, own, others):
    path = tmp_path / name
    check_replaced(path, lambda names, _: names == ['x', 'y'])
    for content in ('', own):
        path.write_text(content)
        check_replaced(path, lambda names, _: names == ['x', 'y'])
    for content in others:
        path.write_text(content)
        with pytest.raises(UserError, match='is there, with other content than is written to it; name another file'):
            check_replaced(path, lambda names, _: names == ['x', 'y'])


def test_of_a_link_the_file_is_written_that_it_leads_to(tmp_path):
    path, target = tmp_path / 'link.csv', tmp_path / 'disk' / 'rows.csv'
    target.parent.mkdir()
    target.touch()
    path.symlink_to(target)
    write_rows(path, [dict(x=1)], ['x'])
    assert path.is_symlink() and target.read_text() == 'x\n1\n'


def test_a_link_that_leads_nowhere_is_not_replaced(tmp_path):
    """As to a disk that is not there."""
    for ending in ('csv', 'json', 'parquet'):
        path = tmp_path / f'link.{ending}'
        path.symlink_to(tmp_path / 'nowhere')
        for check in (check_writable, lambda path: check_replaced(path, lambda *_: True)):
            with pytest.raises(UserError, match=f'link.{ending}'):
                check(path)


def test_a_place_that_cannot_be_written_is_told_at_once(tmp_path, monkeypatch):
    check_place(tmp_path / 'new' / 'newer' / 'x.csv')
    assert not list(tmp_path.iterdir())
    (tmp_path / 'file').touch()
    with pytest.raises(UserError, match=r'x\.csv: cannot be written \(.*/file is no folder\); name another place'):
        check_place(tmp_path / 'file' / 'new' / 'x.csv')
    monkeypatch.setattr(os, 'access', lambda *_: False)  # root may write everywhere
    with pytest.raises(UserError, match=r'may not be written to\)'):
        check_place(tmp_path / 'x.csv')
