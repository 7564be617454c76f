"""experiments/tiny_imagenet from end to end with a model of one block: folders, packed files, runs, a stop, a table."""

import csv
import json
import math
import os
import re
import zipfile
from types import SimpleNamespace

import pytest
import safetensors.torch
import timm
import torch
from programs import load_program
from runs import ROOT, signal_at, words, write_images

from evavit.errors import run_script
from evavit.training.config import parse_settings

CLASSES = ('n01', 'n02')
SMALL = words(
    '--device cpu --no-amp -b 4 --global-batch-size 4 --workers 0 --num-classes 2 --epochs 1 --warmup-epochs 0 '
    '--augment-device cpu --no-cache-device --model-kwargs depth=1 embed_dim=16 num_heads=2'
)


@pytest.fixture
def build(monkeypatch, request):
    monkeypatch.syspath_prepend(request.config.rootpath / 'experiments' / 'tiny_imagenet')
    return load_program('experiments/tiny_imagenet/build.py')


@pytest.fixture
def source(tmp_path):
    """The publisher's layout with a few pictures of noise."""
    place = tmp_path / 'tiny-imagenet-200'
    write_images(tmp_path / 'pictures', dict.fromkeys(CLASSES, 10), side=64)
    (place / 'val' / 'images').mkdir(parents=True)
    lines = []
    for name in CLASSES:
        (place / 'train' / name / 'images').mkdir(parents=True)
        for number, path in enumerate(sorted((tmp_path / 'pictures' / name).iterdir())):
            if number < 8:
                path.rename(place / 'train' / name / 'images' / f'{name}_{number}.JPEG')
            else:
                path.rename(place / 'val' / 'images' / f'{name}_{number}.JPEG')
                lines.append(f'{name}_{number}.JPEG\t{name}\t0\t0\t63\t63\n')
    (place / 'val' / 'val_annotations.txt').write_text(''.join(lines))
    return place


def caller(driver, tmp_path, capsys):
    """call(*flags) → what the driver prints, of the pictures in `tiny` and the runs in `runs`."""

    def call(*more):
        capsys.readouterr()
        flags = ['--data-dir', tmp_path / 'tiny', '--output', tmp_path / 'runs', *more]
        assert run_script(driver.main, list(map(str, flags))) == 0, capsys.readouterr()
        return capsys.readouterr().out

    return call


def content(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.glob('*/*/*')}


def test_pictures_are_sorted_packed_and_unpacked(build, source, tmp_path, capsys):
    def call(folder, *flags):
        return run_script(build.main, [str(tmp_path / folder), *map(str, flags)])

    assert call('tiny', '--source', source, '--held', '0.25') == 0, capsys.readouterr()
    found = content(tmp_path / 'tiny')
    counts = {split: sum(name.startswith(f'{split}/') for name in found) for split in build.SPLITS}
    assert counts == dict(train=12, held=4, val=4)
    for name in CLASSES:  # each class gives its share, and a picture is in one split
        assert sum(key.startswith(f'held/{name}/') for key in found) == 2
    assert len({key.rsplit('/', 1)[1] for key in found}) == 20
    assert all((source / 'train' / key.split('/')[1] / 'images' / key.split('/')[2]).read_bytes() == value
               for key, value in found.items() if not key.startswith('val/'))  # fmt: skip
    assert call('again', '--source', source, '--held', '0.25') == 0
    assert call('tiny', '--source', source, '--held', '0.5') == 2 and 'is there already' in capsys.readouterr().err
    assert content(tmp_path / 'again') == content(tmp_path / 'tiny') == found
    os.utime(next((tmp_path / 'tiny').rglob('*.JPEG')), (0, 0))  # before zip files have dates
    assert call('tiny', '--pack', tmp_path / 'packed', '--files', '3') == 0
    files = sorted((tmp_path / 'packed').iterdir())
    sizes = [path.stat().st_size for path in files]
    assert len(files) == 3 and max(sizes) < 1.3 * min(sizes)
    assert call('tiny', '--pack', tmp_path / 'packed') == 2 and 'tiny-0.zip is there already' in capsys.readouterr().err
    assert call('tiny', '--pack', files[0]) == 2 and 'tiny-0.zip: is no folder' in capsys.readouterr().err
    assert call('moved', '--unpack', *files[:2]) == 0
    assert '2 of 3 packed files' in capsys.readouterr().out
    assert call('moved', '--unpack', *files) == 0
    assert content(tmp_path / 'moved') == found and build.missing(tmp_path / 'moved') is None


def test_another_folder_is_a_line(build, tmp_path, capsys):
    assert run_script(build.main, [str(tmp_path / 'a'), '--source', str(tmp_path)]) == 2
    assert 'name tiny-imagenet-200' in capsys.readouterr().err


def test_the_runs_at_a_small_size(build, source, tmp_path, monkeypatch, capsys):
    """A stop in the first run, the same command once more, the choice of a kind, the table and the plot."""
    driver = load_program('experiments/tiny_imagenet/run.py')
    monkeypatch.setattr(driver, 'LONG', 2)
    monkeypatch.setattr(driver, 'SHORT', 1)
    assert run_script(build.main, [str(tmp_path / 'tiny'), '--source', str(source), '--held', '0.25']) == 0

    call = caller(driver, tmp_path, capsys)

    def rows():
        with open(tmp_path / 'runs' / 'runs.csv', newline='') as stream:
            return {row['run']: row for row in csv.DictReader(stream)}

    def states():
        return dict(re.split(r' {2,}', line, maxsplit=1) for line in call('--list').splitlines())

    assert states()['parent-s0'] == 'to do' and states()['E16-C16-outside-0'] == 'waits for parent-s0'
    with monkeypatch.context() as patch:
        signal_at(patch, [2])
        assert 'asked to stop: epoch 0, update 2 of 3' in call('--only', 'parent', *SMALL)
    assert states()['parent-s0'] == 'started' and not (tmp_path / 'runs' / 'runs.csv').exists()
    call('--only', 'parent', *SMALL)
    assert float(rows()['parent-s0']['train_seconds']) > 0
    assert states()['E16-C16-outside-best-2-s1'] == 'waits for the runs of 1 epochs with each kind'
    names = [f'E16-C16-outside-{name}' for name in ('0', 'both-1-s0', 'ce-1-s0', 'logit-1-s0', 'best-2-s1')]
    out = call('--only', *names, *SMALL)
    assert list(rows()) == ['parent-s0', *names], out
    for row in rows().values():
        assert 0 <= float(row['top1']) <= 100 and row['images'] == '4' and row['commit'] and row['date']
        assert (tmp_path / 'runs' / 'settings' / row['settings']).is_file()
    assert rows()['E16-C16-outside-best-2-s1']['kind'] in driver.KINDS
    settings = (tmp_path / 'runs' / 'settings' / 'E16-C16-outside-both-1-s0.yaml').read_text()
    assert 'kd_model_name: parent' in settings and 'val_split: held' in settings and 'count_cells: outside' in settings
    assert all(state == 'done' for name, state in states().items() if name in names)
    assert not list((tmp_path / 'runs' / names[1]).glob('*.pth.tar'))  # but the parent's stay
    pytest.importorskip('matplotlib')
    table = call('--report')
    assert '| E16-C16-outside-both-1 | 4 × 4 | 4 × 4 | outside | both |' in table
    assert (tmp_path / 'runs' / 'runs.svg').stat().st_size > 1000


def test_no_data_is_a_line(build, tmp_path, capsys):
    driver = load_program('experiments/tiny_imagenet/run.py')
    assert run_script(driver.main, ['--data-dir', str(tmp_path)]) == 2
    assert 'build.py' in capsys.readouterr().err
    assert run_script(driver.main, ['--data-dir', str(tmp_path), '--list', '--only', 'E99']) == 2
    assert '--only E99' in capsys.readouterr().err


def test_the_recipe_is_what_was_measured():
    """configs/convert.yaml says of each setting that is not the experiment's that it was not measured."""
    recipe = ROOT / 'configs' / 'convert.yaml'
    kind = load_program('experiments/tiny_imagenet/run.py').KINDS['logit']
    measured = ROOT / 'experiments' / 'tiny_imagenet' / 'convert.yaml'
    own, theirs = (
        parse_settings('train', ['-c', str(file), '--convert', 'eva', *flags])[0].flat()
        for file, flags in (
            (recipe, []),
            (measured, [*kind, '--convert-kwargs', 'count_cells=outside', 'window_size=4']),
        )
    )
    lines = {line.split(':')[0].strip(): line for line in recipe.read_text().splitlines()}
    about_it = {name for name, line in lines.items() if 'not measured' in line and not name.startswith('#')}
    data = {'model', 'model_kwargs', 'num_classes', 'train_split', 'val_split', 'mean', 'std'}
    batch = {
        'batch_size',
        'grad_accum_steps',
        'global_batch_size',
        'workers',
        'seed',
        'log_interval',
        'checkpoint_hist',
    }
    kwargs = [settings.pop('convert_kwargs') for settings in (own, theirs)]
    defaults = {'opt_betas', 'opt_eps', 'task_loss_weight', 'distill_loss_weight'}  # which one of the files spells out
    pairs = [(name, own[name], theirs[name]) for name in own.keys() - data - batch - defaults - {'epochs'}]
    pairs += [(name, *(settings.get(name) for settings in kwargs)) for name in kwargs[0]]
    assert {name for name, ours, other in pairs if ours != other} == about_it


def test_attentions_at_a_small_size(build, source, tmp_path, monkeypatch, capsys):
    """A run on all pictures, one on half of them, the tables, and what every run asks for is a model."""
    driver = load_program('experiments/tiny_imagenet/attentions.py')
    for asked in driver.all_jobs():
        kwargs = dict(img_size=64, patch_size=4, num_classes=2, depth=1, device='meta') | json.loads(asked.arguments)
        timm.create_model(f'{asked.attention}_deit_tiny', **kwargs)
    one = dict(depth=1, embed_dim=16, num_heads=2)
    monkeypatch.setattr(driver, 'TABLE2', {name: arguments | one for name, arguments in driver.TABLE2.items()})
    assert run_script(build.main, [str(tmp_path / 'tiny'), '--source', str(source), '--held', '0.25']) == 0

    call = caller(driver, tmp_path, capsys)

    names = ('table2-softmax-s0', 'table8-noise_0-s0')
    small = [flag for flag in SMALL if '=' not in flag and flag != '--model-kwargs']  # the arguments are the run's
    assert call('--list', '--only', *names).splitlines() == [f'{name:28} to do' for name in names]
    call('--only', *names, *small)
    with open(tmp_path / 'runs' / 'runs.csv', newline='') as stream:
        rows = {row['run']: row for row in csv.DictReader(stream)}
    assert list(rows) == list(names)
    assert [(row['pictures'], row['epochs']) for row in rows.values()] == [('all', '1'), ('half', '1')]
    assert len(list((tmp_path / 'runs' / 'half' / 'train').glob('*/*'))) == 6
    assert 'window_size: 4' in (tmp_path / 'runs' / 'settings' / 'table8-noise_0-s0.yaml').read_text()
    out = call('--report')
    assert '| `softmax` |' in out and '77.16' in out and '| `noise_0` |' in out


def test_epochs_of_the_attentions(tmp_path, monkeypatch):
    """Each group has its budget without a flag; flags win."""
    driver = load_program('experiments/tiny_imagenet/attentions.py')
    monkeypatch.setattr(driver, 'link_pictures', lambda folder, paths: folder)

    def budgets(*flags):
        args = SimpleNamespace(data_dir=tmp_path, output=tmp_path, flags=[*flags])
        for asked in driver.all_jobs():
            schedule = parse_settings('train', driver.flags_of(asked, args))[0].schedule
            yield asked.group, (schedule.epochs, schedule.warmup_epochs)

    of_groups = dict(table2=(15, 2), long=(15, 2), cells=(10, 1), table8=(10, 1))
    assert set(budgets()) == set(of_groups.items())
    assert {budget for _, budget in budgets('--epochs', '30', '--warmup-epochs', '4')} == {(30, 4)}


def test_errors_against_a_trained_softmax(build, source, tmp_path, monkeypatch, capsys):
    """A row of each attention and size on q, k, v of a softmax network, in two calls; the tables and the plot."""
    assert run_script(build.main, [str(tmp_path / 'tiny'), '--source', str(source), '--held', '0.25']) == 0
    sizes = dict(depth=2, embed_dim=32, num_heads=2, img_size=64, patch_size=4)
    model = timm.create_model('softmax_deit_tiny', **sizes, num_classes=2)
    for block in model.blocks:  # an attention that looks somewhere, as a trained one does
        torch.nn.init.normal_(block.attn.qkv.weight, std=0.3)
    (tmp_path / 'run').mkdir()
    safetensors.torch.save_file(model.state_dict(), tmp_path / 'run' / 'last.safetensors')
    driver = load_program('experiments/tiny_imagenet/approximation.py')
    call = caller(driver, tmp_path, capsys)

    flags = ('--checkpoint', tmp_path / 'run', '--pictures', 3, '--results-file', tmp_path / 'rows.csv')
    flags += ('--device', 'cpu', '--model', 'softmax_deit_tiny', '--num-classes', 2)  # a run of train.py says these
    flags += ('--model-kwargs', *(f'{key}={value}' for key, value in sizes.items()))
    call(*flags, '--only', 'mean', 'softmax')
    names = ['mean', 'softmax', *(f'{name}-E{size}-C{size}' for name in driver.EVA for size in (4, 64))]
    names += [f'{name}-E16' for name in driver.TABLE2 if name not in ('eva', 'softmax')] + ['local-E64']
    assert call(*flags, '--list', '--only', 'mean', 'local-E4').split() == ['mean', 'done', 'local-E4', 'to', 'do']
    call(*flags, '--only', *names)
    with open(tmp_path / 'rows.csv', newline='') as stream:
        rows = {row['run']: row for row in csv.DictReader(stream)}
    assert rows.keys() == set(names)
    errors = {name: json.loads(row['layers']) for name, row in rows.items()}
    assert all(len(errors[name]) == 2 and rows[name]['pictures'] == '3' for name in rows)
    assert max(errors['softmax']) < 1e-5 < min(errors['mean'])
    for more, less in (('local-E64', 'local-E16'), ('eva_converted-E64-C64', 'eva_converted-E4-C4')):
        assert float(rows[more]['error']) < float(rows[less]['error'])
    assert float(rows['mean']['error']) == pytest.approx(sum(errors['mean']) / 2, abs=1e-5)
    again = ['--data-dir', tmp_path / 'tiny', *flags, '--pictures', 2]
    assert run_script(driver.main, list(map(str, again))) == 2
    assert 'rows are of another checkpoint or --pictures' in capsys.readouterr().err
    pytest.importorskip('matplotlib')
    assert '| `nystromformer` |' in call(*flags, '--report')
    assert (tmp_path / 'rows.svg').stat().st_size > 1000


def test_every_attention_and_size_has_an_error():
    driver = load_program('experiments/tiny_imagenet/approximation.py')
    qkv = torch.randn(3, 1, 2, 256, 16)
    for job in driver.all_jobs():
        assert 0 <= next(driver.errors(job, [qkv], [16, 16])) < math.inf, job


def test_a_network_without_softmax_has_no_errors(build, source, tmp_path, capsys):
    assert run_script(build.main, [str(tmp_path / 'tiny'), '--source', str(source), '--held', '0.25']) == 0
    driver = load_program('experiments/tiny_imagenet/approximation.py')
    file = tmp_path / 'local.pth'
    sizes = dict(depth=1, embed_dim=16, num_heads=2, img_size=64, patch_size=4)
    torch.save(timm.create_model('local_deit_tiny', **sizes, num_classes=2).state_dict(), file)

    def told(*more):
        flags = ['--data-dir', tmp_path / 'tiny', '--output', tmp_path / 'out', '--device', 'cpu', *more]
        assert run_script(driver.main, list(map(str, flags))) == 2
        return capsys.readouterr().err

    assert 'give --checkpoint RUN' in told()
    assert 'elsewhere: no such file' in told('--checkpoint', 'elsewhere')
    assert '--pictures 9' in told('--checkpoint', file, '--pictures', 9)
    model = ('--model', 'local_deit_tiny', '--num-classes', 2)
    kwargs = ('--model-kwargs', *(f'{key}={value}' for key, value in sizes.items()))
    assert 'no softmax attention' in told('--checkpoint', file, '--pictures', 3, *model, *kwargs)


def test_kendall_s_tau():
    driver = load_program('experiments/tiny_imagenet/attentions.py')
    assert driver.kendall([1, 2, 3, 4], [10, 20, 30, 40]) == 1
    assert driver.kendall([1, 2, 3, 4], [1, 2, 4, 3]) == pytest.approx(2 / 3)
    assert driver.kendall([1, 2, 3], [3, 2, 1]) == -1


def test_labels_of_the_publisher_that_are_no_class(build, source, tmp_path, capsys):
    for line in ('n01_9.JPEG\t../../../escaped\t0', 'n01_9.JPEG\tn03\t0', '../n01_9.JPEG\tn01', 'n01_9.JPEG'):
        (source / 'val' / 'val_annotations.txt').write_text(line + '\n')
        assert run_script(build.main, [str(tmp_path / 'new'), '--source', str(source)]) == 2
        err = capsys.readouterr().err
        assert 'line 1 is no new picture and a class of train/' in err and err.count('\n') == 1
        assert not (tmp_path / 'new').exists() and not (tmp_path / 'escaped').exists()


def test_labels_of_no_picture_are_a_line(build, source, tmp_path, capsys):
    (source / 'val' / 'val_annotations.txt').write_text('')
    assert run_script(build.main, [str(tmp_path / 'new'), '--source', str(source)]) == 2
    err = capsys.readouterr().err
    assert 'val_annotations.txt: is empty' in err and err.count('\n') == 1 and not (tmp_path / 'new').exists()


def test_parts_of_two_packs_are_a_line(build, source, tmp_path, capsys):
    """Of other numbers of files, or of other pictures."""

    def call(folder, *flags):
        return run_script(build.main, [str(tmp_path / folder), *map(str, flags)])

    assert call('tiny', '--source', source) == call('more', '--source', source) == 0
    (tmp_path / 'more' / 'train' / 'n01' / 'new.JPEG').write_bytes(b'x')
    assert call('tiny', '--pack', tmp_path / 'two', '--files', 2) == 0
    assert call('tiny', '--pack', tmp_path / 'three', '--files', 3) == 0
    assert call('more', '--pack', tmp_path / 'other', '--files', 2) == 0
    assert call('a', '--unpack', tmp_path / 'two' / 'tiny-0.zip', tmp_path / 'three' / 'tiny-0.zip') == 2
    err = capsys.readouterr().err
    assert 'three/tiny-0.zip: is of another pack than part-0-of-2' in err and err.count('\n') == 1
    assert call('b', '--unpack', tmp_path / 'two' / 'tiny-0.zip', tmp_path / 'other' / 'tiny-1.zip') == 2
    err = capsys.readouterr().err
    assert 'other/tiny-1.zip: is of another pack than part-0-of-2' in err and err.count('\n') == 1
    for files in ('0', '1001', '21', '２'):
        assert call('tiny', '--pack', tmp_path / 'many', '--files', files) == 2
        err = capsys.readouterr().err
        assert '--files' in err and err.count('\n') == 1 and not (tmp_path / 'many').exists()


@pytest.mark.timeout(30)
@pytest.mark.parametrize('fault', ['mark', 'bomb', 'climbs', 'link', 'own', 'pipe', 'text'])
def test_hostile_files_to_unpack(build, fault, tmp_path, capsys):
    """Nothing is written outside of the folder, over what is there, or beyond the size of the file."""
    name, about = 'train/n01/a.JPEG', dict(part=0, parts=1)
    if fault == 'mark':
        about['part'] = '/../../escaped'
    if fault == 'climbs':
        name = '/train/../escaped'
    (tmp_path / 'data').mkdir()
    (tmp_path / 'outside' / 'n01').mkdir(parents=True)
    if fault == 'link':
        (tmp_path / 'data' / 'train').symlink_to(tmp_path / 'outside')
    if fault == 'own':
        (tmp_path / 'data' / 'train' / 'n01').mkdir(parents=True)
        (tmp_path / 'data' / 'train' / 'n01' / 'a.JPEG').write_text('precious')
    path = tmp_path / 'file.zip'
    if fault in ('pipe', 'text'):
        os.mkfifo(path) if fault == 'pipe' else path.write_text('text')
    else:
        with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED if fault == 'bomb' else zipfile.ZIP_STORED) as file:
            file.comment = json.dumps(about).encode()
            file.writestr(name, bytes(10**6))
    assert run_script(build.main, [str(tmp_path / 'data'), '--unpack', str(path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f'error: {path}: ') and err.count('\n') == 1
    assert not list(tmp_path.rglob('*escaped*')) and not list((tmp_path / 'outside').glob('*/*'))
    own = tmp_path / 'data' / 'train' / 'n01' / 'a.JPEG'
    assert own.read_text() == 'precious' if fault == 'own' else not own.exists()
