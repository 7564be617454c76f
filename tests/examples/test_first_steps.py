"""examples/first_steps.ipynb: every cell runs, in order, on a small slice."""

import csv
import json

import pytest
from programs import ROOT
from runs import CLASSES, write_images

CELLS = json.loads((ROOT / 'examples/first_steps.ipynb').read_text(encoding='utf-8'))['cells']
SMALL = dict(MODEL='vit_tiny_patch16_224', IMG_SIZE=48, PRETRAINED=False, EPOCHS=2, BATCH_SIZE=4)


def run_cells(codes, folder, monkeypatch, pictures=9):
    """The names that these cells define, where the first one's settings are those of a small slice."""
    assert codes[0]['metadata'] == {'tags': ['parameters']}
    for split in ('train', 'validation'):
        write_images(folder / 'pictures of mine' / split, dict.fromkeys(CLASSES, pictures))
    monkeypatch.chdir(folder)
    names = {}
    for number, cell in enumerate(codes):
        exec(compile(''.join(cell['source']), f'first_steps.ipynb, cell {number}', 'exec'), names)
        if not number:
            assert set(SMALL) < set(names)
            names.update(SMALL, DATA='pictures of mine')
    return names


def test_it_converts_and_looks(tmp_path, monkeypatch, capsys):
    codes = [cell for cell in CELLS if cell['cell_type'] == 'code']
    names = run_cells(codes[:3], tmp_path, monkeypatch)
    assert names['both'].size == (96, 48)  # softmax beside EVA
    assert len(names['images']) == 27 and capsys.readouterr().out == '100% of 27 pictures\n'  # the grid is one window
    assert len(run_cells(codes[:3], tmp_path / 'more', monkeypatch, pictures=30)['images']) == 18  # of 90


def test_training_again_has_a_folder_of_its_own(tmp_path, monkeypatch):
    def train(flags):
        (tmp_path / 'output' / flags[flags.index('--experiment') + 1]).mkdir(parents=True)

    monkeypatch.setattr('evavit.cli.train.main', train)
    codes = [cell for cell in CELLS if cell['cell_type'] == 'code']
    names = run_cells([codes[0], codes[3], codes[3]], tmp_path, monkeypatch)
    assert str(names['RUN']) == 'output/first_steps-2'


@pytest.mark.slow  # trains, and writes ONNX
def test_every_cell_runs(tmp_path, monkeypatch, capsys):
    pytest.importorskip('onnxruntime', reason='needs evavit[export]')
    names = run_cells([cell for cell in CELLS if cell['cell_type'] == 'code'], tmp_path, monkeypatch)
    assert names['logits'].shape == (2, len(CLASSES))
    assert (tmp_path / 'output/first_steps-1/model_best.safetensors').exists()
    with open(tmp_path / 'first_steps.csv', newline='') as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 9 * len(CLASSES)
    assert f'{names["right"]} of {len(rows)} are right' in capsys.readouterr().out


def test_it_is_committed_without_outputs():
    assert all(cell['outputs'] == [] for cell in CELLS if cell['cell_type'] == 'code')
