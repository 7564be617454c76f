"""experiments/driver.py: what drivers write and remove is their runs' own, whatever lies in its place."""

import hashlib
import json
import os
from argparse import Namespace
from typing import NamedTuple

import pytest
from programs import load_program

from evavit.errors import UserError, run_script


class Job(NamedTuple):
    name: str


@pytest.fixture
def driver(monkeypatch, request):
    monkeypatch.syspath_prepend(request.config.rootpath / 'experiments')
    return load_program('experiments/driver.py')


@pytest.fixture
def args(tmp_path):
    (tmp_path / 'runs').mkdir()
    return Namespace(output=tmp_path / 'runs', results_file=tmp_path / 'rows.csv', seconds=None, least=1, list=False)


def drive(driver, args, run, **more):
    driver.drive(args, [Job('a')], ('run', 'top1'), run, says=lambda row: row['top1'], **more)


def test_a_log_is_written_behind_no_link(driver, args, tmp_path, capsys):
    (tmp_path / 'letter.txt').write_text('precious')
    (args.output / 'a.log').symlink_to(tmp_path / 'letter.txt')
    with pytest.raises(UserError, match='1 runs failed'):
        drive(driver, args, lambda job, rows, left: print('told') or dict(run=job.name, top1='1'))
    assert 'a.log is a link or no file; take it away' in capsys.readouterr().out
    assert (tmp_path / 'letter.txt').read_text() == 'precious'


@pytest.mark.timeout(30)
@pytest.mark.parametrize('kind', ['pipe', 'link', 'folder'])
def test_a_lock_that_is_no_file_is_a_line(driver, args, tmp_path, kind):
    lock = args.output / 'a.lock'
    dict(pipe=os.mkfifo, link=lambda path: path.symlink_to(tmp_path / 'new'), folder=os.mkdir)[kind](lock)
    with pytest.raises(UserError, match=r'a\.lock: cannot be locked'):
        drive(driver, args, lambda job, rows, left: pytest.fail('it ran'))
    assert not (tmp_path / 'new').exists()


@pytest.mark.timeout(30)
def test_rows_in_a_pipe_are_a_line(driver, args):
    os.mkfifo(args.results_file)
    args.list = True
    with pytest.raises(UserError, match=r'rows\.csv: cannot be read \(not a regular file\)'):
        drive(driver, args, None)


def keep_settings(driver, args, folder, text):
    """What `about` says of a run `a` with these settings."""
    (folder / 'args.yaml').write_text(text)
    found = driver.about(Job('a'), folder / 'args.yaml', args, driver.torch.device('cpu'))
    kept = (folder / 'settings' / found['settings']).read_bytes()
    assert kept.decode() == text and hashlib.sha256(kept).hexdigest().startswith(found['settings_sha256'])
    return found['settings']


def test_a_folder_is_tidied_once_its_row_is_stored(driver, args):
    tidied = []
    row = dict(run='a', top1=1)
    drive(driver, args, lambda *_: row, tidy=lambda job: tidied.append(args.results_file.exists()))
    assert tidied == [True]


def test_settings_are_kept_behind_no_link(driver, args, tmp_path):
    (tmp_path / 'letter.txt').write_text('epochs: 1')
    (tmp_path / 'settings').mkdir()
    (tmp_path / 'settings' / 'a.yaml').symlink_to(tmp_path / 'letter.txt')
    assert keep_settings(driver, args, tmp_path, 'epochs: 1') == 'a-1.yaml'
    assert (tmp_path / 'settings' / 'a.yaml').is_symlink() and (tmp_path / 'letter.txt').read_text() == 'epochs: 1'


def test_settings_take_no_other_settings_place(driver, args, tmp_path):
    (tmp_path / 'settings').mkdir()
    (tmp_path / 'settings' / 'a.yaml').write_text('precious')
    assert keep_settings(driver, args, tmp_path, 'epochs: 15') == 'a-1.yaml'
    args.results_file = tmp_path / 'others.csv'
    assert keep_settings(driver, args, tmp_path, 'epochs: 30') == 'a-2.yaml'
    written = (tmp_path / 'settings' / 'a-1.yaml').stat()
    assert keep_settings(driver, args, tmp_path, 'epochs: 15') == 'a-1.yaml'
    assert (tmp_path / 'settings' / 'a-1.yaml').stat().st_ino == written.st_ino  # left as it is
    assert (tmp_path / 'settings' / 'a.yaml').read_text() == 'precious'
    assert sorted(os.listdir(tmp_path / 'settings')) == ['a-1.yaml', 'a-2.yaml', 'a.yaml']


@pytest.mark.parametrize('log', [None, 'my notes'])
def test_a_folder_with_a_time_is_no_finished_run(driver, args, log):
    folder = args.output / 'a'
    folder.mkdir()
    assert not driver.finished(folder)
    (folder / 'train_seconds').write_text('7')
    if log:
        (folder / 'train.log').write_text(log)
    with pytest.raises(UserError, match='holds train_seconds, which no run has left there; name another --output'):
        driver.train_to_end([], folder, None)
    assert (folder / 'train_seconds').read_text() == '7'
    (folder / 'train.log').write_text(f'2026-12-01 08:00:00,000 evavit 0.1.0 ({"0" * 12}), torch 2.11.0\n')
    assert driver.finished(folder)


@pytest.mark.parametrize('kind', ['link', 'file'])
def test_a_folder_of_settings_that_is_none_is_a_line(driver, args, tmp_path, kind):
    (tmp_path / 'home').mkdir()
    settings = tmp_path / 'settings'
    settings.symlink_to(tmp_path / 'home') if kind == 'link' else settings.write_text('precious')
    with pytest.raises(UserError, match='settings: is a link or no folder'):
        drive(driver, args, lambda job, rows, left: pytest.fail('it ran'))
    assert not os.listdir(tmp_path / 'home')


def test_a_plot_takes_no_drawing_s_place(driver, args):
    plots = pytest.importorskip('matplotlib.figure', reason='needs matplotlib')
    path = args.results_file.with_suffix('.svg')
    for _ in range(2):
        driver.save_plot(plots.Figure(), args.results_file)
    path.write_text('<svg>precious</svg>')
    with pytest.raises(UserError, match=r'rows\.svg is there, and is no plot'):
        driver.save_plot(plots.Figure(), args.results_file)
    assert path.read_text() == '<svg>precious</svg>'


def test_a_number_that_is_not_written_leaves_the_one_before(driver, tmp_path, monkeypatch):
    driver.write_number(tmp_path / 'train_seconds', 2.5)

    def fail(*_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr('pathlib.Path.write_text', fail)
    with pytest.raises(OSError, match='No space'):
        driver.write_number(tmp_path / 'train_seconds', 7)
    assert driver.read_number(tmp_path / 'train_seconds') == 2.5


@pytest.mark.parametrize('name', ['tiny_imagenet/attentions', 'lra/run', 'clothing/run'])
def test_an_output_that_is_a_file_is_a_line(name, monkeypatch, request, tmp_path, capsys):
    monkeypatch.syspath_prepend(request.config.rootpath / 'experiments')
    program = load_program(f'experiments/{name}.py')
    for split in ('train', 'held', 'val', 'image', 'pathfinder'):
        (tmp_path / 'data' / split).mkdir(parents=True)
    (tmp_path / 'file').write_text(json.dumps('precious'))
    flags = ['--data-dir', str(tmp_path / 'data'), '--output', str(tmp_path / 'file')]
    assert run_script(program.main, flags) == 2
    err = capsys.readouterr().err
    assert err.startswith(f'error: --output {tmp_path}/file: cannot be made (') and err.count('\n') == 1


@pytest.mark.parametrize(
    'name',
    [
        'causal_cifar/run',
        'lra/run',
        'tiny_imagenet/approximation',
        'tiny_imagenet/attentions',
        'tiny_imagenet/run',
        'transfer/run',
        'vit_small_14/run',
    ],
)
def test_a_report_of_no_rows_is_a_line(driver, name, tmp_path, capsys):
    program = load_program(f'experiments/{name}.py')
    assert run_script(program.main, ['--report', '--results-file', str(tmp_path / 'missing.csv')]) == 2
    err = capsys.readouterr().err
    assert 'missing.csv: no rows to report; give a file that has some' in err and err.count('\n') == 1
    assert not os.listdir(tmp_path)
