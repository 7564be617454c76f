"""What CONTRIBUTING.md says a new size, family and attention cost, counted in a copy of the repository."""

import filecmp
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ADDITIONS = Path(__file__).parent / 'additions'
EVERY_ATTENTION = ROOT / 'tests' / 'layers' / 'test_every_attention.py'
SIZE = "'deit_nano': variant('DeiT-Nano', 'deit_tiny_patch16_224', patch_size=16, embed_dim=48, depth=2, num_heads=3),"


def add_line(path, after, line):
    text = path.read_text()
    assert text.count(after) == 1
    path.write_text(text.replace(after, after + line))


def differing(comparison, below=''):
    """Files that are new or changed on the right side, by their path."""
    changed = {below + name for name in (*comparison.right_only, *comparison.diff_files)}
    return changed.union(*(differing(part, f'{below}{name}/') for name, part in comparison.subdirs.items()))


def test_a_size_is_a_line_a_family_a_file_and_an_attention_a_file_and_two_lines(tmp_path):
    for name in ('evavit', 'tools', 'docs'):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns('__pycache__', 'images', '*.so'))
    shutil.copy(ROOT / 'hubconf.py', tmp_path)

    add_line(tmp_path / 'evavit/models/eva_deit.py', 'embed_dim=384, depth=12, num_heads=6),\n', f'    {SIZE}\n')
    shutil.copy(ADDITIONS / 'eva_toy.py', tmp_path / 'evavit/models')
    shutil.copy(ADDITIONS / 'toy.py', tmp_path / 'evavit/layers')
    layers = tmp_path / 'evavit/layers/__init__.py'
    add_line(layers, 'from .softmax import SoftmaxAttention\n', 'from .toy import ToyAttention\n')
    add_line(layers, 'ATTENTIONS: Dict[str, Type[GridAttention]] = {\n', "    'toy': ToyAttention,\n")
    assert differing(filecmp.dircmp(ROOT / 'evavit', tmp_path / 'evavit', ignore=['__pycache__'])) == {
        'models/eva_deit.py',
        'models/eva_toy.py',
        'layers/toy.py',
        'layers/__init__.py',
    }

    found = subprocess.run(
        [sys.executable, '-B', ADDITIONS / 'found.py'], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stdout + found.stderr
    # The tests that every attention passes, on the copy.
    common = subprocess.run(
        [sys.executable, '-B', '-m', 'pytest', '-q', '-p', 'no:cacheprovider', '-k', 'toy', EVERY_ATTENTION],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert common.returncode == 0, common.stdout + common.stderr
