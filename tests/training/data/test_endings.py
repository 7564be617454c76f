"""Which names are those of images: no picture is passed over without a word, in training and inference alike."""

import pytest
from PIL import Image
from runs import write_images

from evavit.errors import UserError
from evavit.training.data.decode import FORMATS
from evavit.training.data.endings import OTHERS, image_endings, is_image, read_endings
from evavit.training.data.folders import ClassFolders
from evavit.training.data.pictures import Pictures

NO_PICTURES = ('BUFR', 'GRIB', 'HDF5', 'MPEG', 'PDF')  # of which Pillow reads none, or hands them to others


def test_every_ending_that_pillow_knows_is_one():
    known = Image.registered_extensions()
    formats = {form for form in known.values() if form in FORMATS}
    assert formats == set(FORMATS)
    assert {ending for ending, form in known.items() if form in FORMATS} <= set(read_endings())
    others = {ending for ending, form in known.items() if form not in (*FORMATS, *NO_PICTURES)}
    assert others - OTHERS == set() and not OTHERS & set(read_endings())


@pytest.mark.parametrize(
    'name', ['x.tiff', 'x.heif', 'x.jxl', 'x.JPE', 'x.svg', 'x.psd', 'x.eps', 'x.ico', 'x.j2k', 'x.cr2']
)
def test_an_image_that_is_not_trained_on_is_named(tmp_path, name):
    write_images(tmp_path, dict(apple=1, pear=1))
    for other in ('notes.txt', 'paper.pdf', 'features.h5', 'clip.mp4', 'noending'):
        (tmp_path / 'pear' / other).touch()
    assert len(ClassFolders(tmp_path).samples) == 2 == len(Pictures(tmp_path))
    (tmp_path / 'pear' / name).touch()
    with pytest.raises(UserError, match=f'pear/{name}: only .png, .jpg, .jpeg, .webp, .bmp are read'):
        ClassFolders(tmp_path)
    assert len(Pictures(tmp_path)) == 3 and is_image(name) and not set(image_endings()) & OTHERS
