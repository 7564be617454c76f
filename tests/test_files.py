"""What a failed write leaves behind: the file or folder as it was, and nothing beside it."""

import multiprocessing
import resource

import pytest

from evavit.files import replacing


@pytest.mark.parametrize('options', [{}, dict(durable=True), dict(shared=True)], ids=str)
def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, options):
    path = tmp_path / 'file'
    path.write_text('before')
    with pytest.raises(RuntimeError), replacing(path, **options) as partial:
        partial.write_text('half')
        assert path.read_text() == 'before'
        raise RuntimeError
    assert [file.name for file in tmp_path.iterdir()] == ['file'] and path.read_text() == 'before'
    with replacing(path, **options) as partial:
        partial.write_text('after')
    assert [file.name for file in tmp_path.iterdir()] == ['file'] and path.read_text() == 'after'


def test_what_a_killed_process_left_is_no_hindrance(tmp_path):
    (tmp_path / 'file.partial').write_text('half of a long text')
    with replacing(tmp_path / 'file') as partial:
        assert not partial.exists()
        partial.write_text('new')
    assert (tmp_path / 'file').read_text() == 'new'


def test_a_folder_takes_the_place_of_one_that_is_not_empty(tmp_path):
    folder = tmp_path / 'folder'
    folder.mkdir()
    (folder / 'old').touch()
    with pytest.raises(KeyboardInterrupt), replacing(folder) as partial:
        partial.mkdir()
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ['folder'] and (folder / 'old').exists()
    with replacing(folder) as partial:
        partial.mkdir()
        (partial / 'new').touch()
    assert [path.name for path in folder.iterdir()] == ['new']


def test_a_full_disk_leaves_the_file(tmp_path):
    """A process whose files may hold 1,000 bytes."""
    path = tmp_path / 'file'
    path.write_text('before')

    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        with pytest.raises(OSError), replacing(path, durable=True) as partial:
            partial.write_bytes(bytes(5000))

    child = multiprocessing.get_context('fork').Process(target=fill)
    child.start()
    child.join()
    assert child.exitcode == 0
    assert [file.name for file in tmp_path.iterdir()] == ['file'] and path.read_text() == 'before'
