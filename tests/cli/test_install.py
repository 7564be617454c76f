"""The package as it is installed: a wheel, in an environment and a folder where the repository is not."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from runs import CLASSES, PATIENCE, QUICK, ROOT, write_images


def run(words, **options):
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=300 * PATIENCE, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_an_editable_clone_called_evavit_is_found_from_the_folder_above(tmp_path):
    clone = tmp_path / 'evavit'
    clone.mkdir()
    for name in ('pyproject.toml', 'setup.py', 'README.md', 'LICENSE'):
        shutil.copy(ROOT / name, clone)
    (clone / 'configs').mkdir()
    (clone / 'configs' / 'mine.yaml').write_text('epochs: 3\n')
    (clone / 'evavit').mkdir()
    (clone / 'evavit' / '__init__.py').write_text('found = True\n')  # a package that loads at once
    shutil.copy(ROOT / 'evavit' / 'version.py', clone / 'evavit')
    venv.create(tmp_path / 'env')
    paths = sysconfig.get_paths('venv', vars=dict.fromkeys(('base', 'platbase'), str(tmp_path / 'env')))
    python = Path(paths['scripts']) / Path(sys.executable).name
    (Path(paths['purelib']) / 'others.pth').write_text(sysconfig.get_path('purelib') + '\n')  # setuptools
    pip = [sys.executable, '-m', 'pip', '--quiet', '--python', python]
    run([*pip, 'install', '--no-deps', '--no-index', '--no-build-isolation', '--editable', clone])
    environment = {key: value for key, value in os.environ.items() if key != 'PYTHONPATH'}
    # Above the clone and elsewhere: the same package, not the clone as a namespace.
    for place in (tmp_path, tmp_path / 'env'):
        out = run([python, '-c', 'import evavit; print(evavit.found, evavit.__file__)'], cwd=place, env=environment)
        assert out.split() == ['True', str(clone / 'evavit' / '__init__.py')]


@pytest.fixture
def programs(tmp_path):
    """The folder of commands of a fresh environment with the wheel, and what else is installed here behind it."""
    source = tmp_path / 'source'
    source.mkdir()
    for name in ('pyproject.toml', 'setup.py', 'README.md', 'LICENSE'):
        shutil.copy(ROOT / name, source)
    for name in ('evavit', 'configs'):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns('__pycache__'))
    pip = [sys.executable, '-m', 'pip', '--quiet']
    run([*pip, 'wheel', '--no-deps', '--no-build-isolation', '--wheel-dir', tmp_path / 'wheels', source])
    shutil.rmtree(source)
    venv.create(tmp_path / 'env')
    paths = sysconfig.get_paths('venv', vars=dict.fromkeys(('base', 'platbase'), str(tmp_path / 'env')))
    scripts, packages = Path(paths['scripts']), Path(paths['purelib'])
    (wheel,) = (tmp_path / 'wheels').glob('*.whl')
    run([*pip, '--python', scripts / Path(sys.executable).name, 'install', '--no-deps', '--no-index', wheel])
    # Behind the environment's own packages, and as a plain path: an editable install there is not seen.
    (packages / 'others.pth').write_text(sysconfig.get_path('purelib') + '\n')
    return scripts


@pytest.mark.slow
def test_a_wheel_trains_validates_and_exports(programs, tmp_path):
    pytest.importorskip('onnxruntime')
    write_images(tmp_path / 'images' / 'train', dict.fromkeys(CLASSES, 8))
    write_images(tmp_path / 'images' / 'validation', dict.fromkeys(CLASSES, 4))
    (tmp_path / 'empty').mkdir()
    environment = {key: value for key, value in os.environ.items() if key != 'PYTHONPATH'}
    environment |= dict(OMP_NUM_THREADS='1')

    def start(name, *words):
        return run([programs / f'evavit-{name}', *words], cwd=tmp_path / 'empty', env=environment)

    flags = ['-c', 'quickstart', *QUICK, '--data-dir', tmp_path / 'images', '--experiment', 'run']
    assert 'best top1' in start('train', *flags, '--model-kwargs', 'depth=1')
    weights = 'output/run/last.safetensors'
    out = start('validate', '--checkpoint', weights, '--data-dir', tmp_path / 'images', '--workers', '0')
    assert '(12 images)' in out
    out = start('inference', '--checkpoint', 'output/run', '--data-dir', tmp_path / 'images', '--workers', '0')
    assert '36 pictures classified, 0 not readable' in out
    assert 'agrees with PyTorch' in start('export', 'model.onnx', '--checkpoint', weights, '--check-forward')
    for name in ('train', 'validate', 'inference', 'export', 'benchmark'):
        assert start(name, '--help').startswith(f'usage: evavit-{name} ')
    where = run([programs / 'python', '-c', 'import evavit; print(evavit.__file__)'], cwd=tmp_path, env=environment)
    assert Path(where).is_relative_to(tmp_path / 'env')
