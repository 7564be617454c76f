"""experiments/clothing with a model of one block: a stop, and a row a run."""

import csv

from programs import load_program
from runs import signal_at, words, write_images

from evavit.errors import run_script

SMALL = words(
    '--device cpu --no-amp -b 4 --global-batch-size 4 --workers 0 --num-classes 2 --epochs 1 --warmup-epochs 0 '
    '--img-size 32 --model-kwargs depth=1 embed_dim=16 num_heads=2 patch_size=8 window_size=2'
)


def test_two_seeds(tmp_path, monkeypatch, capsys):
    """A stop in the first run, the same command once more, a second seed."""
    driver = load_program('experiments/clothing/run.py')
    for split, count in dict(train=4, test=2).items():
        write_images(tmp_path / 'data' / split, dict(hat=count, shoes=count))
    flags = ['--data-dir', tmp_path / 'data', '--output', tmp_path / 'out', '--augment-devices', 'cpu', '--seeds']

    def call(*more):
        capsys.readouterr()
        assert run_script(driver.main, list(map(str, [*flags, *more, *SMALL]))) == 0, capsys.readouterr()
        return capsys.readouterr().out

    def rows():
        with open(tmp_path / 'out' / 'runs.csv', newline='') as file:
            return list(csv.DictReader(file))

    def states():
        return dict(line.split(None, 1) for line in call(0, 1, '--list').splitlines())

    assert states() == {'cpu-s0': 'to do', 'cpu-s1': 'to do'}
    with monkeypatch.context() as patch:
        signal_at(patch, [1])
        assert 'asked to stop: epoch 0, update 1 of 2' in call(0)
    assert states() == {'cpu-s0': 'started', 'cpu-s1': 'to do'} and not (tmp_path / 'out' / 'runs.csv').exists()
    call(0)
    first = rows()
    assert '2 seeds' in call(0, 1)
    assert rows()[0] == first[0] and [row['run'] for row in rows()] == ['cpu-s0', 'cpu-s1']
    for row in rows():
        assert 0 <= float(row['top1']) <= 100 and row['epochs'] == '1' and float(row['train_seconds']) > 0
        assert 'val_split: test' in (tmp_path / 'out' / 'settings' / row['settings']).read_text() and row['commit']
    assert states() == {'cpu-s0': 'done', 'cpu-s1': 'done'}


def test_no_data_is_a_line(tmp_path, capsys):
    driver = load_program('experiments/clothing/run.py')
    assert run_script(driver.main, ['--data-dir', str(tmp_path)]) == 2
    assert 'clothing-dataset-small' in capsys.readouterr().err
