"""experiments/clothing with a model of one block: a row a run, and no run twice."""

import csv

from programs import load_program
from runs import words, write_images

from evavit.errors import run_script

SMALL = words(
    '--device cpu --no-amp -b 4 --global-batch-size 4 --workers 0 --num-classes 2 --epochs 1 --warmup-epochs 0 '
    '--img-size 32 --model-kwargs depth=1 embed_dim=16 num_heads=2 patch_size=8 window_size=2'
)


def test_two_seeds(tmp_path, capsys):
    driver = load_program('experiments/clothing/run.py')
    for split, count in dict(train=4, test=2).items():
        write_images(tmp_path / 'data' / split, dict(hat=count, shoes=count))
    flags = ['--data-dir', tmp_path / 'data', '--output', tmp_path / 'out', '--augment-devices', 'cpu', '--seeds']

    def call(*seeds):
        assert run_script(driver.main, list(map(str, [*flags, *seeds, *SMALL]))) == 0, capsys.readouterr()
        with open(tmp_path / 'out' / 'runs.csv', newline='') as file:
            return list(csv.DictReader(file))

    first = call(0)
    both = call(0, 1)
    assert both[0] == first[0] and [row['seed'] for row in both] == ['0', '1']
    assert all(0 <= float(row['top1']) <= 100 and row['epochs'] == '1' for row in both)
    assert '2 seeds' in capsys.readouterr().out


def test_no_data_is_a_line(tmp_path, capsys):
    driver = load_program('experiments/clothing/run.py')
    assert run_script(driver.main, ['--data-dir', str(tmp_path)]) == 2
    assert 'clothing-dataset-small' in capsys.readouterr().err
