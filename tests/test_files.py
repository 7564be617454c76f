"""What a failed write leaves behind: the file or folder as it was, and nothing beside it. What a changed bit does."""

import hashlib
import multiprocessing
import os
import re
import resource
import socket
import zipfile

import pytest
import safetensors.torch
import torch
from timm.models import load_state_dict

from evavit import files
from evavit.errors import UserError
from evavit.files import BLANK, is_stamped, new_folder, replacing, replacing_in, stamp, unpack
from evavit.models import read_weights
from evavit.training.distributed import log_to
from evavit.training.run_folder import locked_folder


@pytest.mark.parametrize('options', [{}, dict(durable=True)], ids=str)
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


def test_files_of_others_beside_one_that_is_written_stay(tmp_path):
    """Whatever they are called; what a killed process left goes a day later."""
    names = (
        'file.partial',
        f'file.{os.getpid()}.partial',
        'folder.partial',
        '.evavit-1-a.partial',
        '.evavit-2-b.partial',
    )
    for name in names:
        (tmp_path / name).write_text('mine')
    os.utime(tmp_path / names[-1], (0, 0))
    for path in (tmp_path / 'file', tmp_path / 'other'):
        with replacing(path) as partial, replacing(path) as another:
            assert partial != another and not partial.exists()
            partial.write_text('new')
            another.write_text('older')
        assert path.read_text() == 'new'
    with replacing(tmp_path / 'folder') as partial:
        partial.mkdir()
    left = {path.name: path.read_text() for path in tmp_path.iterdir() if path.name in names}
    assert left == dict.fromkeys(names[:-1], 'mine') and len(list(tmp_path.iterdir())) == len(left) + 3


@pytest.mark.parametrize('name', ['file', 'folder', 'link'])
def test_a_folder_takes_no_other_s_place(tmp_path, name):
    """Only that of an empty one: what a folder holds is the user's."""
    path = tmp_path / 'folder'
    path.mkdir()
    (path / 'precious').touch()
    path = tmp_path / name
    if name == 'link':
        path.symlink_to('folder')
    elif name == 'file':
        path.write_text('precious')
    before = sorted(tmp_path.iterdir())
    with pytest.raises(OSError), replacing(path) as partial:
        partial.mkdir()
    with pytest.raises(UserError, match='is a file; name' if name == 'file' else 'is there already; name'):
        new_folder(path).__enter__()
    assert sorted(tmp_path.iterdir()) == before and [file.name for file in (tmp_path / 'folder').iterdir()]
    assert name != 'file' or path.read_text() == 'precious'


@pytest.mark.parametrize('name', ['new', 'deep/new', 'empty', 'link'])
def test_a_folder_that_a_user_names_is_made(tmp_path, name):
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'link').symlink_to('empty')
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / name) as partial:
        partial.mkdir()
        raise KeyboardInterrupt
    assert not list(tmp_path.rglob('*.partial'))
    with new_folder(tmp_path / name) as partial:
        partial.mkdir()
        (partial / 'file').touch()
    assert [path.name for path in (tmp_path / name).iterdir()] == ['file'] and (tmp_path / 'link').is_symlink()


def test_a_folder_that_cannot_be_made_is_a_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'file').touch()
    for path, words in (('.', 'that you are not in'), ('file/new', 'cannot be written (File exists)')):
        with pytest.raises(UserError, match=re.escape(words)), new_folder(path) as partial:
            partial.mkdir()
    assert [path.name for path in tmp_path.iterdir()] == ['file']


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


def test_a_link_to_the_same_file_leaves_nothing_beside_it(tmp_path):
    """Renaming one name of a file to another of the same file does nothing, and says nothing."""
    path = tmp_path / 'file'
    path.write_text('one')
    with replacing(path) as partial:
        os.link(path, partial)
    assert [file.name for file in tmp_path.iterdir()] == ['file'] and path.read_text() == 'one'


def test_files_that_belong_together_come_in_their_order(tmp_path, monkeypatch):
    (tmp_path / 'model').write_text('old')
    with pytest.raises(OSError), replacing_in(tmp_path) as partial:
        (partial / 'model').write_text('half')
        raise OSError
    assert [file.name for file in tmp_path.iterdir()] == ['model'] and (tmp_path / 'model').read_text() == 'old'
    with replacing_in(tmp_path) as partial:
        for name in ('model', 'model.data'):
            (partial / name).write_text('new')
        order = []
        monkeypatch.setattr(files.os, 'replace', lambda src, dst: order.append(dst.name))
    assert order == ['model.data', 'model']


def write(path):
    """A small file of weights with its digest."""
    weights = {'weight': torch.arange(6.0).view(2, 3), 'bias': torch.ones(2)}
    if path.suffix == '.safetensors':
        about = {
            'digest': BLANK,
            'args': '{"digest": "sha256:' + '0' * 64 + '"}',
        }  # what looks like it does not confuse
        safetensors.torch.save_file(weights, path, about)
    else:
        torch.save(dict(state_dict=weights, epoch=3), path)
    stamp(path)
    return weights


@pytest.mark.parametrize('name', ['file.pth', 'file.safetensors'])
def test_a_file_with_a_digest_reads_as_before(tmp_path, name):
    path = tmp_path / name
    weights = write(path)
    assert is_stamped(path)
    read = [load_state_dict(str(path))]
    if path.suffix == '.safetensors':
        read.append(safetensors.torch.load_file(path))
    else:
        read += [torch.load(path, mmap=mmap)['state_dict'] for mmap in (False, True)]
        with zipfile.ZipFile(path) as file:
            assert file.testzip() is None
            assert b'SHA-256' in file.comment
        content = path.read_bytes()
        assert hashlib.sha256(content[:-64] + b'0' * 64).hexdigest().encode() == content[-64:]  # as the comment says
    for state in read:
        assert all(torch.equal(value, weights[key]) for key, value in state.items()) and state.keys() == weights.keys()


@pytest.mark.parametrize('name', ['file.pth', 'file.safetensors'])
def test_one_flipped_bit_is_noticed_wherever_it_is(tmp_path, name):
    """Each bit of the first and last bytes, of the digest and of the zip directory; a seventh of the others."""
    path, other = tmp_path / name, tmp_path / f'other_{name}'
    write(path)
    content = path.read_bytes()
    directory = content.find(b'PK\x01\x02') if path.suffix == '.pth' else 0
    ends = {*range(100), *range(directory, directory + 100), *range(len(content) - 100, len(content))}
    for bit in range(8 * len(content)):
        if bit // 8 in ends or bit % 7 == 0:
            changed = bytearray(content)
            changed[bit // 8] ^= 1 << bit % 8
            other.write_bytes(changed)
            with pytest.raises(RuntimeError, match='not a readable checkpoint'):
                read_weights(other)


@pytest.mark.parametrize('name', ['file.pth', 'file.safetensors'])
def test_a_lost_end_is_noticed(tmp_path, name):
    path, other = tmp_path / name, tmp_path / f'other_{name}'
    write(path)
    content = path.read_bytes()
    for length in (*range(0, len(content) - 200, 13), *range(len(content) - 200, len(content))):
        other.write_bytes(content[:length])
        with pytest.raises(RuntimeError, match='not a readable checkpoint'):
            read_weights(other)


def test_what_other_programs_wrote_has_no_digest(tmp_path):
    weights = {'weight': torch.ones(2)}
    torch.save(weights, tmp_path / 'a.pth')
    torch.save(weights, tmp_path / 'b.pth', _use_new_zipfile_serialization=False)
    safetensors.torch.save_file(weights, tmp_path / 'c.safetensors')
    safetensors.torch.save_file(weights, tmp_path / 'd.safetensors', {'format': 'pt'})
    for path in tmp_path.iterdir():
        assert not is_stamped(path) and torch.equal(read_weights(path)['weight'], weights['weight'])
    with pytest.raises(ValueError, match='no place'):
        stamp(tmp_path / 'd.safetensors')


def test_what_a_killed_process_left_in_a_folder_goes_after_a_day(tmp_path):
    old, new, mine = (tmp_path / name for name in ('.evavit-old.partial', '.evavit-new.partial', '.mine.partial'))
    for folder in (old, new, mine):
        folder.mkdir()
        (folder / 'model.onnx').touch()
    for folder in (old, mine):
        os.utime(folder, (0, 0))
    with replacing_in(tmp_path) as folder:
        assert folder.name.startswith('.evavit-') and folder.name.endswith('.partial')
        (folder / 'model.onnx').write_text('whole')
    assert {path.name for path in tmp_path.iterdir()} == {'model.onnx', new.name, mine.name}


@pytest.mark.parametrize('links', [True, False])
def test_files_take_their_places_all_or_none(tmp_path, monkeypatch, links):
    """A folder of the first name's is in the way of the last file that moves."""
    if not links:
        monkeypatch.setattr(os, 'link', lambda *names, **_: (_ for _ in ()).throw(OSError('no hard links')))
    (tmp_path / 'a').mkdir()
    (tmp_path / 'b').write_text('old')
    (tmp_path / 'c').symlink_to('b')
    for blocked in (True, False):
        try:
            with replacing_in(tmp_path) as folder:
                for name in 'abcd':
                    (folder / name).write_text('new')
        except OSError:
            assert blocked and (tmp_path / 'b').read_text() == 'old' and os.readlink(tmp_path / 'c') == 'b'
            assert sorted(os.listdir(tmp_path)) == ['a', 'b', 'c']
            (tmp_path / 'a').rmdir()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys('abcd', 'new')
    assert not (tmp_path / 'c').is_symlink()


@pytest.mark.timeout(60)
@pytest.mark.parametrize('name', ['.lock', 'train.log'])
@pytest.mark.parametrize('kind', ['link', 'dangling link', 'hard link', 'folder', 'pipe', 'socket'])
def test_what_a_run_writes_in_place_is_a_file_of_its_own(kind, name, tmp_path):
    """A link there would have another file written to, and a pipe never opens."""
    (tmp_path / 'mine').write_text('mine')
    folder = tmp_path / 'run'
    folder.mkdir()
    file = folder / name
    with socket.socket(socket.AF_UNIX) as place:
        {
            'link': lambda: file.symlink_to(tmp_path / 'mine'),
            'dangling link': lambda: file.symlink_to(tmp_path / 'new'),
            'hard link': lambda: os.link(tmp_path / 'mine', file),
            'folder': file.mkdir,
            'pipe': lambda: os.mkfifo(file),
            'socket': lambda: place.bind(os.path.relpath(file)),
        }[kind]()
        words = rf'cannot be written \({re.escape(name)} is a link or no file; take it away'
        with pytest.raises(UserError, match=words), locked_folder(folder), log_to(folder / 'train.log'):
            pass
    assert (tmp_path / 'mine').read_text() == 'mine' and not (tmp_path / 'new').exists()


def test_an_archive_adds_files_and_touches_no_other(tmp_path):
    """Every fault but those of experiments/tiny_imagenet/build.py, which tests/experiments has."""
    with zipfile.ZipFile(tmp_path / 'a.zip', 'w') as file:
        file.writestr('a/', b'')
        file.writestr('a/b.txt', b'content')
    with zipfile.ZipFile(tmp_path / 'a.zip') as file:
        for _ in range(2):  # what is there with this content stays
            unpack(file, tmp_path / 'folder')
            assert [path.read_bytes() for path in (tmp_path / 'folder').rglob('*.txt')] == [b'content']
    for name in ('../b.txt', '/b.txt', 'a/../../b.txt', 'a'):
        with zipfile.ZipFile(tmp_path / 'b.zip', 'w') as file:
            file.writestr(name, b'other')
        with (
            zipfile.ZipFile(tmp_path / 'b.zip') as file,
            pytest.raises(ValueError, match=r'leads out|is there already'),
        ):
            unpack(file, tmp_path / 'folder')
    assert not (tmp_path / 'b.txt').exists() and len(list((tmp_path / 'folder').rglob('*'))) == 2
