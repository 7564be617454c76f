"""docs/reliability.md names tests that exist, one or more for each promise, and `pytest -m soak` runs them."""

import re
import subprocess
import sys
from pathlib import Path

import conftest
import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / 'docs' / 'reliability.md').read_text(encoding='utf-8')
PROMISES = [line for line in PAGE.splitlines() if line.startswith('| ') and not line.startswith('| promise |')]


def test_every_test_that_the_page_names_exists():
    tests = [path.read_text(encoding='utf-8') for path in ROOT.glob('tests/**/test_*.py')]
    defined = {name for text in tests for name in re.findall(r'^def (test_\w+)', text, re.MULTILINE)}
    named = conftest.promised()
    files = {name for name in named if name.endswith('.py')}
    assert len(named) > 30 and named - files <= defined, named - files - defined
    assert files and all((ROOT / name).is_file() for name in files), files


@pytest.mark.parametrize('line', PROMISES)
def test_every_promise_names_a_test(line):
    assert conftest.promised(line.split('|')[2]), line


def test_the_marker_selects_what_the_page_names():
    files = ['tests/ops/eva/test_mass.py', 'tests/training/test_loop.py', 'tests/test_soak.py']
    done = subprocess.run(
        [sys.executable, '-m', 'pytest', '--collect-only', '-q', '-m', 'soak', '-p', 'no:cacheprovider', *files],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    selected = {line.partition('[')[0] for line in done.stdout.splitlines() if '::' in line}
    of_loop = {line.partition('::')[2] for line in selected if 'test_loop' in line}
    assert of_loop == {'test_a_step_that_is_not_finite_changes_nothing', 'test_adversarial_images_for_200_steps'}
    assert any('test_mass.py' in line for line in selected) and not any('test_soak' in line for line in selected)
