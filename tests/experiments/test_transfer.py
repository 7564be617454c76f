"""experiments/transfer with a model of one block: a pretraining, a stop, a run of each kind, the recipes."""

import csv

import pytest

pytest.importorskip('sklearn')
from programs import load_program
from runs import signal_at, words, write_images

from evavit.errors import run_script

SMALL = words(
    '--device cpu --no-amp -b 4 --global-batch-size 4 --workers 0 --epochs 1 --warmup-epochs 0 '
    '--model-kwargs depth=1 embed_dim=16 num_heads=2'
)


@pytest.fixture
def driver(monkeypatch):
    program = load_program('experiments/transfer/run.py')
    monkeypatch.setattr(program, 'NEIGHBOURS', 3)
    return program


@pytest.fixture
def call(driver, tmp_path, capsys):
    """call(*flags, code=0) → what the driver prints, of pictures of noise in `data` and the runs in `runs`."""
    data = tmp_path / 'data'
    for place, counts in {
        'tiny': dict(train=8, held=2, val=2),
        'clothing': dict(train=4, test=2),
        'cifar100': dict(train=4, test=2),
        'cifar10': dict(train=4, test=2),
        'elpv/defect': dict(train=4, validation=2),
    }.items():
        for split, count in counts.items():
            classes = [f'n{number:03}' for number in range(200)] if place == 'tiny' else ('hat', 'shoes')
            write_images(data / place / split, dict.fromkeys(classes, 1 if place == 'tiny' else count))

    def call(*more, code=0):
        capsys.readouterr()
        flags = ['--output', tmp_path / 'runs', '--data-dir', data / 'tiny', '--pretrain-epochs', 1]
        for task in driver.TASKS:
            flags += [f'--{task}', data / task]
        assert run_script(driver.main, list(map(str, [*flags, *more]))) == code, capsys.readouterr()
        out = capsys.readouterr()
        return out.err if code else out.out

    return call


def rows(folder):
    with open(folder / 'runs' / 'runs.csv', newline='') as file:
        return {row['run']: row for row in csv.DictReader(file)}


def test_a_run_of_each_kind(call, tmp_path, monkeypatch):
    """A stop in the first run, the same command once more, what waited for it, and the table."""

    def states(*names):
        return dict(line.split(None, 1) for line in call('--list', *(['--only', *names] if names else [])).splitlines())

    of_eva = ['cifar100-finetune-eva-s0', 'clothing-linear-eva-s1', 'cifar10-knn-eva', 'elpv-finetune-eva-s0']
    waits = f'waits for {tmp_path / "runs" / "pretrain-eva"}'
    before = states()
    assert before['pretrain-eva'] == 'to do' and before['clothing-finetune-scratch-s2'] == 'to do'
    assert {before[name] for name in of_eva} == {waits}
    with monkeypatch.context() as patch:
        signal_at(patch, [2])
        assert 'asked to stop: epoch 0, update 2 of 50' in call('--only', 'pretrain-eva', *SMALL)
    assert '--pretrain-epochs 2: ' in call('--pretrain-epochs', 2, code=2)  # what is begun is of 1
    assert states('pretrain-eva') == {'pretrain-eva': 'started'} and not (tmp_path / 'runs' / 'runs.csv').exists()
    names = ['pretrain-eva', *of_eva]
    call('--only', *names, *SMALL)
    assert sorted(rows(tmp_path)) == sorted(names)
    for name, row in rows(tmp_path).items():
        assert 0 <= float(row['top1']) <= 100 and 0 <= float(row['balanced_accuracy']) <= 100
        assert row['images'] == ('200' if name == 'pretrain-eva' else '4') and row['pretrain_epochs'] == '1'
        assert row['commit'] and row['date'] and row['device'] and float(row['seconds']) >= 0
        assert (tmp_path / 'runs' / 'settings' / row['settings']).is_file()
    assert (tmp_path / 'runs' / 'pretrain-eva' / 'last.safetensors').is_file()
    assert not list((tmp_path / 'runs').glob('*-eva-s*/*.safetensors')) + list((tmp_path / 'runs').glob('*/*.pth.tar'))
    log = (tmp_path / 'runs' / 'elpv-finetune-eva-s0.log').read_text()
    for what in ('patch_embed.proj ', 'pos_embed', 'relative_position_bias_table'):
        assert any('resized' in line and what in line for line in log.splitlines()), log
    settings = (tmp_path / 'runs' / 'settings' / 'clothing-linear-eva-s1.yaml').read_text()
    assert 'linear_probe: true' in settings and 'img_size: 224' in settings and 'crop_pct: 1.0' in settings
    assert set(states(*names).values()) == {'done'}
    assert call('--only', *names, *SMALL).count('done') == len(names)
    report = call('--report')
    assert '| tiny-imagenet | pretrain | eva |' in report and '| elpv | finetune | eva |' in report
    elsewhere = ('--output', tmp_path / 'more', '--results-file', tmp_path / 'runs' / 'runs.csv')
    assert 'runs.csv is of 1; give that' in call('--pretrain-epochs', 2, *elsewhere, code=2)


def test_a_row_that_is_lost_is_made_again(call, tmp_path):
    """Its weights went when it was stored: the run is trained once more."""
    call('--only', 'cifar100-finetune-scratch-s0', *SMALL)
    folder = tmp_path / 'runs' / 'cifar100-finetune-scratch-s0'
    assert (folder / 'train_seconds').exists() and not list(folder.glob('last.*'))
    (first,) = rows(tmp_path).values()
    (tmp_path / 'runs' / 'runs.csv').unlink()
    call('--only', 'cifar100-finetune-scratch-s0', *SMALL)
    (again,) = rows(tmp_path).values()
    assert again['top1'] == first['top1'] and not list(folder.glob('last.*'))


def test_the_other_starts(call, tmp_path):
    """The softmax twin, the DeiT as it is converted, and no weights at all."""
    names = ['cifar10-finetune-softmax-s0', 'elpv-linear-converted-s0', 'cifar100-finetune-converted-s0']
    names += ['clothing-knn-converted', 'clothing-knn-scratch', 'clothing-finetune-scratch-s0']
    call('--only', 'pretrain-softmax', 'pretrain-parent', *names, *SMALL)
    found = rows(tmp_path)
    assert found.keys() == {'pretrain-softmax', 'pretrain-parent', *names}
    assert {found[name]['pretrain_epochs'] for name in names[:4]} == {'1'}
    assert {found[name]['pretrain_epochs'] for name in names[4:]} == {''}
    assert found[names[0]]['model'] == 'softmax_deit_tiny' and found[names[2]]['model'] == 'deit_tiny_patch16_224'
    for name in names[1:4]:
        settings = (tmp_path / 'runs' / 'settings' / f'{name}.yaml').read_text()
        assert 'convert: eva' in settings and 'count_cells: outside' in settings
        assert 'pretrain-parent/last.safetensors' in settings


def test_every_run_is_a_model_of_its_recipe(driver):
    """The flags of every run are taken, windows divide the grid, and the order begins with what says most."""
    args = driver.parser_of('text', 'output').parse_args(['--data-dir', 'x'])
    args.pretrain_epochs, args.flags = 100, []
    for task in driver.TASKS:
        setattr(args, task, args.data_dir)
    jobs = list(driver.all_jobs())
    assert len({job.name for job in jobs}) == len(jobs) == 3 + 48 + 36 + 16
    assert [job.name for job in jobs[:3]] == ['pretrain-eva', 'pretrain-softmax', 'clothing-finetune-eva-s0']
    assert all(not job.weights or jobs.index(job.weights) < number for number, job in enumerate(jobs))
    for job in jobs:
        settings, _ = driver.parse_settings('train', driver.flags_of(job, args))
        model = settings.model
        side, rest = divmod(model.model_kwargs['img_size'], model.model_kwargs['patch_size'])
        window = {**model.model_kwargs, **(model.convert_kwargs or {})}.get('window_size', side)
        assert not rest and side % window == 0 and settings.run.seed == job.seed
        assert model.mean and model.std and model.crop_pct == 1 and model.interpolation == 'bicubic'
    assert driver.parse_settings('train', driver.flags_of(jobs[0], args))[0].schedule.epochs == 100


def test_what_is_not_there_is_a_line(call, driver, tmp_path, monkeypatch):
    assert '--clothing: no folder elsewhere' in call('--clothing', 'elsewhere', '--only', 'clothing', code=2)
    assert 'clothing/defect; name its pictures' in call('--elpv', tmp_path / 'data' / 'clothing', code=2)
    (tmp_path / 'data' / 'elpv' / 'defect' / 'validation').rename(tmp_path / 'data' / 'elsewhere')
    assert 'no folder validation' in call('--only', 'elpv', code=2)
    assert 'build.py' in call('--data-dir', tmp_path, '--only', 'pretrain', code=2)
    assert '--pretrain-epochs 0' in call('--pretrain-epochs', 0, code=2)
    monkeypatch.setattr(driver.importlib.util, 'find_spec', lambda name: None)
    assert 'pip install scikit-learn' in call('--list', '--only', 'clothing-knn-scratch')
