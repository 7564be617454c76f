"""docs/make/gallery.py: its pictures, and its table from the rows that it writes."""

import csv

import pytest
import timm
from PIL import Image
from programs import ROOT, load_program

from evavit.errors import run_script
from evavit.models import write_weights

pytest.importorskip('skimage', reason='needs evavit[dense]')

SMALL = dict(embed_dim=24, depth=2, num_heads=2)
SIDES = (98, 112)  # 7 × 7 patches, one window; 8 × 8, four of them


@pytest.fixture(scope='module')
def gallery():
    return load_program('docs/make/gallery.py')


@pytest.fixture(scope='module')
def made(gallery, tmp_path_factory):
    """A folder with the pictures and the rows of a small model."""
    folder = tmp_path_factory.mktemp('gallery')
    (folder / 'results').mkdir()
    weights = folder / 'weights.safetensors'
    write_weights(timm.create_model(gallery.MODEL, img_size=98, **SMALL).state_dict(), weights, {})
    gallery.make(weights, folder, folder / 'results' / gallery.RESULTS, SIDES, layer=2, **SMALL)
    return folder


def test_pictures(gallery, made):
    step = gallery.TILE + gallery.GAP
    for side in SIDES:
        with Image.open(made / f'gallery_{side}.jpg') as sheet:
            assert sheet.size == (5 * step - gallery.GAP, gallery.HEAD + 4 * step - gallery.GAP)
            second = sheet.crop((0, gallery.HEAD + step, gallery.TILE, gallery.HEAD + step + gallery.TILE))
            photograph = gallery.photograph('coffee', side).resize(second.size)
            difference = Image.blend(second.convert('L'), photograph.convert('L').point(lambda v: 255 - v), 0.5)
            low, high = difference.reduce(20).getextrema()
            assert high - low < 20  # the photograph, but for the JPEG's loss


def test_rows_and_table(gallery, made, monkeypatch):
    with open(made / 'results' / gallery.RESULTS, newline='') as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(SIDES) * len(gallery.PHOTOGRAPHS) * SMALL['depth']
    for row in rows:
        patches, class_token = float(row['patches']), float(row['class_token'])
        if row['img_size'] == '98':  # a window over the whole grid is softmax
            assert patches == class_token == 1
        elif row['layer'] == '1':  # the same input, and the class token attends exactly
            assert class_token == 1 and 0.5 < patches < 1
    monkeypatch.setattr(gallery.pages, 'ROOT', made)
    lines = gallery.table().splitlines()
    assert lines[0] == '| layer | patches, 98 px | class token, 98 px | patches, 112 px | class token, 112 px |'
    assert lines[2].startswith('| 1 | 100 % | 100 % | ') and lines[2].endswith('| 100 % |')


def test_committed_pictures_are_small():
    sizes = [path.stat().st_size for path in (ROOT / 'docs' / 'images').glob('gallery_*.jpg')]
    assert len(sizes) == 2 and sum(sizes) < 600_000


def test_wrong_file(gallery, tmp_path, capsys):
    assert run_script(gallery.main, ['--weights', str(tmp_path / 'nowhere')]) == 2
    assert 'experiments/vit_small_14/build.py' in capsys.readouterr().err
