"""experiments/tiny_imagenet from end to end with a model of one block: folders, packed files, runs, a stop, a table."""

import csv
import re

import pytest
from programs import load_program
from runs import write_images, words

from evavit.errors import run_script

CLASSES = ('n01', 'n02')
SMALL = words(
    '--device cpu --no-amp --torchcompile-mode default -b 4 --global-batch-size 4 --workers 0 --num-classes 2 '
    '--mixup 0 --cutmix 0 --model-kwargs depth=1 embed_dim=16 num_heads=2'
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
    assert content(tmp_path / 'again') == found
    assert call('tiny', '--pack', tmp_path / 'packed', '--files', '3') == 0
    files = sorted((tmp_path / 'packed').iterdir())
    sizes = [path.stat().st_size for path in files]
    assert len(files) == 3 and max(sizes) < 1.3 * min(sizes)
    capsys.readouterr()
    assert call('moved', '--unpack', *files[:2]) == 0
    assert '2 of 3 packed files' in capsys.readouterr().out or build.missing(tmp_path / 'moved')
    assert call('moved', '--unpack', *files) == 0
    assert content(tmp_path / 'moved') == found and build.missing(tmp_path / 'moved') is None


def test_another_folder_is_a_line(build, tmp_path, capsys):
    assert run_script(build.main, [str(tmp_path / 'a'), '--source', str(tmp_path)]) == 2
    assert 'name tiny-imagenet-200' in capsys.readouterr().err


def test_the_runs_at_a_small_size(build, source, tmp_path, monkeypatch, capsys):
    driver = load_program('experiments/tiny_imagenet/run.py')
    assert run_script(build.main, [str(tmp_path / 'tiny'), '--source', str(source), '--held', '0.25']) == 0
    flags = ['--data-dir', tmp_path / 'tiny', '--output', tmp_path / 'runs']
    # Compilation is the GPU tests' and takes minutes.
    file = driver.HERE / 'parent.yaml'
    for name in ('parent.yaml', 'convert.yaml'):
        text = (driver.HERE / name).read_text()
        text = re.sub(r'torchcompile\w*: .*\n', '', text).replace('epochs: 40', 'epochs: 2')
        (tmp_path / name).write_text(text.replace('warmup_epochs: 4', 'warmup_epochs: 0'))
    monkeypatch.setattr(driver, 'HERE', tmp_path)
    assert file.exists()
    small = [flag for flag in SMALL if flag not in ('--torchcompile-mode', 'default')]

    def call(*more):
        capsys.readouterr()
        code = run_script(driver.main, [*map(str, flags), *small, *more])
        return code, capsys.readouterr()

    def rows():
        with open(tmp_path / 'runs' / 'runs.csv', newline='') as stream:
            return {row['run']: row for row in csv.DictReader(stream)}

    _, listed = call('--list')
    assert re.search(r'^parent-s0 +to do$', listed.out, re.M) and 'waits for parent-s0' in listed.out
    monkeypatch.setattr(driver, 'stopping_after', lambda _: driver_stop(driver))
    code, stopped = call('--only', 'parent')
    monkeypatch.undo()
    assert code == 0 and 'asked to stop' in stopped.out, stopped
    monkeypatch.setattr(driver, 'HERE', tmp_path)
    assert re.search(r'^parent-s0 +started$', call('--list')[1].out, re.M)
    wanted = ['parent', 'E16-C16-outside-0', *(f'E16-C16-outside-{kind}-5' for kind in driver.KINDS)]
    code, out = call('--only', *wanted, '--epochs', '1')
    assert code == 0 and list(rows()) == ['parent-s0', 'E16-C16-outside-0'] + [
        f'E16-C16-outside-{kind}-5-s0' for kind in ('both', 'ce', 'logit')
    ], out
