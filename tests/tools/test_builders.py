"""Programs that write a folder of pictures make it, and touch none that holds anything."""

import sys

import pytest
from programs import load_program

from evavit.errors import run_script


def test_digits_lie_in_a_folder_of_their_own(tmp_path, capsys):
    pytest.importorskip('sklearn')
    main = load_program('tools/build_digits.py').main
    for words in ('built', 'already there'):
        assert run_script(main, [str(tmp_path / 'digits')]) == 0
        assert words in capsys.readouterr().out
    own = tmp_path / 'digits' / 'train' / '3' / 'mine.png'
    own.touch()
    for folder in (tmp_path / 'digits', tmp_path):
        assert run_script(main, [str(folder)]) == 2
        assert capsys.readouterr().err == (
            f'error: {folder} is there already; name a folder that is new, or an empty one that you are not in\n'
        )
    assert own.exists()


@pytest.mark.parametrize('name', ['digits', 'photos'])
def test_without_scikit_learn(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, 'sklearn.datasets', None)  # as where it is not installed
    main = load_program(f'tools/build_{name}.py').main
    assert run_script(main, [str(tmp_path / 'new')]) == 2 and not (tmp_path / 'new').exists()
    assert capsys.readouterr().err.endswith('which is not installed: pip install scikit-learn\n')


def test_more_photographs_than_a_disk_holds_are_a_line(tmp_path, capsys):
    main = load_program('tools/build_photos.py').main
    for number in (9, 10**8):
        assert run_script(main, [str(tmp_path / 'photos'), '--images', str(number)]) == 2
        assert f'--images {number}: must be 10 to 1,000,000' in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_photographs_lie_in_a_folder_of_their_own(tmp_path, capsys):
    pytest.importorskip('sklearn')
    main, folder = load_program('tools/build_photos.py').main, tmp_path / 'photos'
    assert run_script(main, [str(folder), '--images', '10']) == 0
    assert len(list(folder.glob('train/*/*.jpg'))) == len(list(folder.glob('validation/*/*.jpg'))) == 10
    own = folder / 'train' / '0' / '00000.jpg'
    own.write_text('precious')
    assert run_script(main, [str(own)]) == 2 and 'is a file; name a folder' in capsys.readouterr().err
    assert run_script(main, [str(tmp_path / 'new'), '--images', '0']) == 2 and not (tmp_path / 'new').exists()
    assert run_script(main, [str(folder)]) == 2 and 'is there already' in capsys.readouterr().err
    assert own.read_text() == 'precious'
