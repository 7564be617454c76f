"""Tar files are read as the folders they hold: the same classes, images and mistakes."""

import gzip
import io
import os
import pickle
import shutil
import tarfile
import tempfile

import pytest
import torch
from PIL import Image
from runs import CLASSES, write_images
from training.data.hostile_tars import hostile_header, little_memory, wounds

from evavit.errors import LocalError, UserError
from evavit.training import data
from evavit.training.config import parse_settings
from evavit.training.data.decode import BadImageError
from evavit.training.data.tars import ClassTar


@pytest.fixture
def images(tmp_path):
    for split, count in dict(train=4, validation=2).items():
        write_images(tmp_path / 'images' / split, dict.fromkeys(CLASSES, count))
    return tmp_path / 'images'


def pack(images, target, order=sorted):
    """Each folder of `images` as a tar file of the folder `target`."""
    target.mkdir()
    for folder in images.iterdir():
        with tarfile.open(target / f'{folder.name}.tar', 'w', format=tarfile.GNU_FORMAT) as archive:
            for path in order(folder.rglob('*')):
                archive.add(path, path.relative_to(folder), recursive=False)
    return target


def enlarge(path, size=11 * 2**30):
    """Add a file that is no image and takes no room on the disk: it is a hole."""
    with tarfile.open(path) as archive:
        end = archive.members[-1].offset_data + -(-archive.members[-1].size // 512) * 512 if archive.getmembers() else 0
    large = tarfile.TarInfo('hole')
    large.size = size
    with open(path, 'r+b') as file:
        file.seek(end)
        file.write(large.tobuf(tarfile.GNU_FORMAT))
        file.truncate(end + 512 + size + 1024)


def add(archive, name, content=b'', **about):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for key, value in about.items():
        setattr(member, key, value)
    archive.addfile(member, io.BytesIO(content))


def open_both(place):
    settings, _ = parse_settings('train', ['--data-dir', str(place), '--max-bad-images', '1'])
    train_set, eval_set, names = data.open_training_sets(settings.data, in_chans=3, batch_size=4, seed=0)
    assert names == list(CLASSES)
    return [
        [(image.tobytes(), label) for image, label in (one[i] for i in range(len(one)))]
        for one in (train_set, eval_set)
    ]


@pytest.mark.parametrize('order', [sorted, lambda paths: sorted(paths, reverse=True)])
def test_a_tar_is_the_folder_in_it(images, tmp_path, order):
    assert open_both(images) == open_both(pack(images, tmp_path / 'tars', order))


def test_what_jupyter_and_macos_leave_is_no_class_and_no_image(images, tmp_path):
    expected = open_both(images)
    for name in ('train/.ipynb_checkpoints/0-checkpoint.png', 'train/pear/._0.png', 'validation/.hidden/deep/0.png'):
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(images / 'train' / 'pear' / '0.png', images / name)
    assert open_both(images) == expected
    assert open_both(pack(images, tmp_path / 'tars')) == expected


MISTAKES = {
    'another class': ('validation/zebra/0.png', 'class zebra is not among the 3 known classes'),
    'no class': ('train/0.png', 'an image outside of the class folders'),
    'another format': ('train/pear/0.gif', r'only \.png, \.jpg, \.jpeg, \.webp, \.bmp are read'),
    'two depths': ('train/pear/more/0.png', 'holds both images .0.png and 3 more. and folders .more.'),
    'an empty class': ('train/zebra', 'zebra: class folder without an image'),
}


@pytest.mark.parametrize('mistake', MISTAKES)
def test_what_is_a_mistake_in_a_folder_is_one_in_a_tar(images, tmp_path, mistake):
    name, words = MISTAKES[mistake]
    (images / name).parent.mkdir(exist_ok=True)
    if os.path.splitext(name)[1]:
        shutil.copy(images / 'train' / 'pear' / '0.png', images / name)
    else:
        (images / name).mkdir()
    for place in (images, pack(images, tmp_path / 'tars')):
        with pytest.raises(UserError, match=words):
            open_both(place)


def test_nothing_beside_a_large_tar_is_read_or_written(images, tmp_path):
    """timm keeps there where the images of a tar file of 10 GiB lie, and gives another file's images their names."""
    expected, tars = open_both(images), pack(images, tmp_path / 'tars')
    enlarge(tars / 'train.tar')
    assert open_both(tars) == expected and sorted(os.listdir(tars)) == ['train.tar', 'validation.tar']
    pack(images, tmp_path / 'other', lambda paths: sorted(paths, reverse=True))
    shutil.move(tmp_path / 'other' / 'train.tar', tars / 'train.tar')
    enlarge(tars / 'train.tar')
    assert open_both(tars) == expected
    os.mkfifo(tars / '_train_tarinfos.pickle')
    assert open_both(tars) == expected


def test_a_damaged_entry_is_not_the_end(images, tmp_path):
    """Python's tarfile takes the first entry that it cannot read for the end of the file, and a block of zeros."""
    archive = pack(images, tmp_path / 'tars') / 'train.tar'
    whole = archive.read_bytes()
    for content in wounds(whole, whole.index(b'plum/2.png')).values():
        archive.write_bytes(content)
        with pytest.raises(
            UserError, match=r'train\.tar: not a readable tar file .*damaged or cut short at byte'
        ) as error:
            open_both(tmp_path / 'tars')
        assert '\n' not in str(error.value)


def test_a_download_that_was_broken_off_is_no_end(images, tmp_path):
    """Whoever writes a file in pieces makes room for all of it first: what did not come is zeros."""
    archive = pack(images, tmp_path / 'tars') / 'train.tar'
    enlarge(archive, 2**22)
    content = archive.read_bytes()
    place = content.index(b'plum/2.png')
    archive.write_bytes(content[:place] + bytes(len(content) - place))
    with pytest.raises(UserError, match=r'train\.tar: not a readable tar file .*damaged or cut short at byte'):
        open_both(tmp_path / 'tars')


def test_a_tar_of_tars_with_links_and_versions(images, tmp_path):
    """A tar file for each class in it, a link to an image, and an image that a newer one of its name replaces."""
    expected, tars = open_both(images), pack(images, tmp_path / 'tars')
    with tarfile.open(tars / 'train.tar', 'w') as archive:
        for name in CLASSES:
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode='w') as one:
                add(one, './3.png', b'an old version')
                for number in range(3):
                    add(one, f'./{number}.png', (images / 'train' / name / f'{number}.png').read_bytes())
                add(one, './original', (images / 'train' / name / '3.png').read_bytes())
                add(one, '3.png', (images / 'train' / name / '3.png').read_bytes())
                add(one, 'fifo.png', type=tarfile.FIFOTYPE)
            add(archive, f'{name}.tar', inner.getvalue())
    assert open_both(tars) == expected
    shutil.copy(images / 'train' / 'pear' / '1.png', images / 'train' / 'pear' / '9.png')
    with tarfile.open(tars / 'train.tar', 'a') as archive:
        add(archive, 'pear/9.png', type=tarfile.LNKTYPE, linkname='pear/1.png')
    assert open_both(tars) == open_both(images)


def test_a_member_has_one_name_however_it_is_written(images, tmp_path):
    """As in the folder that the tar file unpacks to, the last one of a name counts; no part of a name is hidden that
    its path does not go through."""
    names = ['0.png', './/1.png', 'sub/../2.png', './.hidden/../3.png']
    expected, tars = open_both(images), pack(images, tmp_path / 'tars')
    with tarfile.open(tars / 'train.tar', 'w') as archive:
        for old in (True, False):
            for label in CLASSES:
                for name in names:
                    content = (images / 'train' / label / os.path.basename(name)).read_bytes()
                    add(archive, f'{label}/{os.path.basename(name) if old else name}', b'old' if old else content)
    assert open_both(tars) == expected
    ours, theirs = (data.open_pictures(str(place)) for place in (tars / 'train.tar', images / 'train'))
    assert [ours[i] for i in range(len(ours))] == [theirs[i] for i in range(len(theirs))]


@pytest.mark.parametrize('name', ['../0.png', './../0.png', '/../0.png', 'pear/../../0.png'])
def test_a_member_outside_of_its_tar_is_a_line(images, tmp_path, name):
    tars = pack(images, tmp_path / 'tars')
    with tarfile.open(tars / 'train.tar', 'a') as archive:
        add(archive, name, (images / 'train' / 'pear' / '0.png').read_bytes())
    with pytest.raises(UserError, match=r'train\.tar: .*its member .*0\.png lies outside of it'):
        open_both(tars)


def test_a_tar_that_is_replaced_under_way(images, tmp_path):
    tars = pack(images, tmp_path / 'tars')
    settings, _ = parse_settings('train', ['--data-dir', str(tars)])
    opened, _ = data.open_dataset(settings.data, 'train', batch_size=4)
    shutil.move(tars / 'validation.tar', tars / 'train.tar')
    with pytest.raises(LocalError, match=r'train\.tar: the file was changed after this run began'):
        opened[0]


def test_no_picture_of_a_tar_that_is_replaced_has_another_ones_name(images, tmp_path):
    names = [f'{number}.png' for number in range(4)]
    for tar, order in dict(first=names, second=names[::-1]).items():
        with tarfile.open(tmp_path / f'{tar}.tar', 'w') as archive:
            for name in order:
                add(archive, name, (images / 'train' / CLASSES[0] / name).read_bytes())
    place, other = tmp_path / 'first.tar', tmp_path / 'second.tar'
    expected, pictures = data.open_pictures(str(images / 'train' / CLASSES[0])), data.open_pictures(str(place))
    assert pictures[0] == expected[0]
    place.unlink()
    shutil.copy(other, place)
    assert [pictures[i] for i in range(4)] == [expected[i] for i in range(4)]  # of the old file, which is still open
    pictures = data.open_pictures(str(place))
    shutil.move(other, place)  # before this process opens it, as a loading process that starts later
    with pytest.raises(LocalError, match=r'first\.tar: the file was changed after this run began'):
        pictures[0]
    pictures = data.open_pictures(str(place))
    assert pictures[0] == expected[0]
    place.write_bytes(place.read_bytes()[::-1])  # in its place
    with pytest.raises(LocalError, match=r'first\.tar: the file was changed after this run began'):
        pictures[1]


class Counted(io.FileIO):
    count = 0

    def readinto(self, place):
        found = super().readinto(place)
        Counted.count += found
        return found


def test_a_compressed_tar_is_unpacked_once(images, tmp_path, monkeypatch):
    """In whatever order its pictures lie in it: to seek back in it unpacks it from its start."""
    place, folder = tmp_path / 'in.tar.gz', images / 'train' / CLASSES[0]
    with tarfile.open(place, 'w:gz') as archive:
        for name in ('3.png', '1.png', '0.png', '2.png'):
            add(archive, name, (folder / name).read_bytes())
            add(archive, f'{name}.txt', os.urandom(2**18))
        add(archive, '4.png', type=tarfile.LNKTYPE, linkname='1.png')
        add(archive, '5.png', bytes(2**12))
    monkeypatch.setattr('PIL.Image.MAX_IMAGE_PIXELS', 2**10 - 1)  # an image has less than 4 KiB
    monkeypatch.setattr('evavit.training.data.pictures.open_regular', lambda path: io.BufferedReader(Counted(path)))
    pictures, expected = data.open_pictures(str(place)), data.open_pictures(str(folder))
    assert [pictures[i] for i in range(5)] == [expected[i] for i in (0, 1, 2, 3, 1)]
    assert pictures[5][1] == -1 and pictures.bad.news()[0][1].startswith('more than 4,092 bytes')
    assert Counted.count < 3 * place.stat().st_size


def test_a_compressed_tar_that_is_replaced(images, tmp_path):
    """Its pictures are those that were walked; a loading process that does not share them says so."""
    place, folder = tmp_path / 'in.tar.gz', images / 'train' / CLASSES[0]
    with tarfile.open(place, 'w:gz') as archive:
        archive.add(folder / '0.png', '0.png')
    pictures, expected = data.open_pictures(str(place)), data.open_pictures(str(folder))
    shared = torch.utils.data.DataLoader(pictures, batch_size=None, num_workers=1, multiprocessing_context='fork')
    other, late = (pickle.loads(pickle.dumps(pictures.dataset.reader)) for _ in range(2))
    assert other[0][0].read() == (folder / '0.png').read_bytes()
    place.write_bytes(gzip.compress(b''))
    assert [pictures[0], *map(tuple, shared)] == [expected[0], expected[0]]
    with pytest.raises(LocalError, match=r'in\.tar\.gz: the file was changed after this run began'):
        late[0]


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='/dev/full, a disk that is full, is of Linux')
def test_a_disk_that_a_compressed_tar_fills_is_a_line(images, tmp_path, monkeypatch):
    with tarfile.open(tmp_path / 'in.tar.gz', 'w:gz') as archive:
        add(archive, '0.png', bytes(2**16))
    monkeypatch.setattr(tempfile, 'TemporaryFile', lambda: io.FileIO('/dev/full', 'w'))
    with pytest.raises(UserError, match=r'in\.tar\.gz: its pictures cannot be unpacked .*\(the disk is full: .*TMPDIR'):
        data.open_pictures(str(tmp_path / 'in.tar.gz'))


@pytest.mark.parametrize('kind', [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
@pytest.mark.parametrize('labels', [True, False])
def test_a_header_without_end_fills_no_memory(images, tmp_path, kind, labels):
    hostile_header(pack(images, tmp_path / 'tars') / 'train.tar', kind)
    with little_memory(), pytest.raises(UserError, match=r'train\.tar: .*\Wa header of 67,108,864 bytes') as error:
        open_both(tmp_path / 'tars') if labels else data.open_pictures(str(tmp_path / 'tars' / 'train.tar'))
    assert '\n' not in str(error.value)


def test_headers_for_the_whole_file_fill_no_memory(tmp_path):
    """Each of them is of a size that may be, and Python keeps them all."""
    archive = tmp_path / 'pictures.tar.gz'
    with gzip.open(archive, 'wb', 1) as file:
        for number in range(200):
            content = b'1048500 %04d=%s\n' % (number, b'A' * (1048500 - 14))
            header = tarfile.TarInfo('g')
            header.type, header.size = tarfile.XGLTYPE, len(content)
            file.write(header.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % 512))
            file.write(tarfile.TarInfo(f'{number}.txt').tobuf())
        file.write(bytes(1024))
    with pytest.raises(UserError, match='more headers for the whole file than any program writes'):
        data.open_pictures(str(archive))


def test_a_member_larger_than_any_image_fills_no_memory(images, tmp_path, monkeypatch):
    """It is on the disk, as far as the system says: a file with a hole."""
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 2**22)
    archive = tmp_path / 'train.tar'
    with open(archive, 'wb') as file:
        member = tarfile.TarInfo('pear/0.png')
        member.size = 2**26
        file.write(member.tobuf(tarfile.GNU_FORMAT))
        file.truncate(2**26 + 2**12)
    reader = ClassTar(archive)
    with little_memory(), pytest.raises(BadImageError, match='more than 16,777,216 bytes'):
        reader[0]


@pytest.mark.parametrize(
    'name, leads, kind',
    [
        ('zebra', 'pear', tarfile.SYMTYPE),
        ('zebra', '../pool/zebra', tarfile.SYMTYPE),
        ('zebra.tar', 'pear.tar', tarfile.SYMTYPE),
        ('zebra.tar', 'pear.tar', tarfile.LNKTYPE),
    ],
)
def test_a_link_to_a_class_is_a_line(images, tmp_path, name, leads, kind):
    """Its images would be missing without a word, and labels be others."""
    tars = pack(images, tmp_path / 'tars')
    with tarfile.open(tars / 'train.tar', 'a') as archive:
        add(archive, name, type=kind, linkname=leads)
    with pytest.raises(UserError, match=rf'train\.tar: its member {name} is a link, .*--dereference'):
        open_both(tars)


def test_links_to_other_files_are_left(images, tmp_path):
    """A link to a text, an image of which a hard link has another kind of name, an image that a later link replaces."""
    expected, tars = open_both(images), pack(images, tmp_path / 'tars')
    with tarfile.open(tars / 'train.tar', 'a') as archive:
        add(archive, 'about', b'text')
        add(archive, 'README', type=tarfile.SYMTYPE, linkname='./about')
        add(archive, 'pear/original', (images / 'train' / 'pear' / '1.png').read_bytes())
        add(archive, 'pear/1.png', type=tarfile.LNKTYPE, linkname='pear/original')
        add(archive, 'pear/8.png', (images / 'train' / 'pear' / '1.png').read_bytes())
        add(archive, 'pear/8.png', type=tarfile.SYMTYPE, linkname='nowhere.png')
        add(archive, 'LICENSE', type=tarfile.SYMTYPE, linkname='README')
        add(archive, 'config', type=tarfile.SYMTYPE, linkname='.config')
        add(archive, '.config', b'text')
        add(archive, 'more', type=tarfile.SYMTYPE, linkname='nowhere')
        add(archive, 'more', b'text')
    assert open_both(tars) == open_both(tars / '..' / tars.name) == expected


def test_a_sparse_tar_in_a_tar_is_a_line(images, tmp_path):
    """Where its members lie follows from a map of its holes."""
    tars = pack(images, tmp_path / 'tars')
    with open(tars / 'train.tar', 'rb+') as file:
        header = bytearray(tarfile.TarInfo('zebra.tar').tobuf(tarfile.GNU_FORMAT))
        header[156:157] = tarfile.GNUTYPE_SPARSE
        header[148:156] = b' ' * 8
        header[148:156] = b'%06o\0 ' % sum(header)
        content = file.read().rstrip(b'\0')
        content += bytes(-len(content) % 512) + bytes(header) + bytes(1024)
        file.seek(0)
        file.write(content)
        file.truncate()
    with pytest.raises(UserError, match=r'its member zebra\.tar is packed as a sparse file; pack it without --sparse'):
        open_both(tars)


def test_a_tar_in_a_tar_that_is_packed_anew_takes_the_place_of_the_old_one(images, tmp_path):
    """What was moved to another class since is not of both."""
    expected, tars = open_both(images), pack(images, tmp_path / 'tars')
    with tarfile.open(tars / 'train.tar', 'w') as archive:
        for old in (True, False):
            for label in CLASSES:
                inner = io.BytesIO()
                with tarfile.open(fileobj=inner, mode='w') as one:
                    for path in sorted((images / 'train' / label).iterdir()):
                        add(one, f'moved{path.name}' if old else path.name, path.read_bytes())
                add(archive, f'{label}.tar', inner.getvalue())
    assert open_both(tars) == expected
