"""How the package holds together: imports run one way, and an import changes nothing outside of the package."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / 'evavit').rglob('*.py'))
# A room of evavit/, a file or a folder, imports from itself and from floors below its own.
FLOORS = (
    ('errors', 'version'),
    ('files',),
    ('arguments',),
    ('ops',),
    ('layers',),
    ('models',),
    ('card',),
    ('convert', 'dense', 'export', 'hub', 'maps'),
    ('exporting',),  # the former name of export
    ('training',),
    ('bench',),
    ('cli',),
    ('compare', 'timm', ''),  # `python -m evavit.compare` and `evavit.timm`, and the package itself: evavit/__init__.py
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
PRIVATE = 'evavit/ops/common/'  # the only place that touches torch._C
MOST_LINES = 600


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix('').parts
    return parts[:-1] if parts[-1] == '__init__' else parts


def room_of(module):
    """The room of evavit/ that a module is in, given as the parts of its name; '' is the package itself."""
    return module[1] if len(module) > 1 and module[1] in FLOOR else ''


def imported(tree, path):
    """(line, parts of the module's name) of each import in a file, those in functions too."""
    package = module_of(path) if path.name == '__init__.py' else module_of(path)[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, tuple(alias.name.split('.'))
        elif isinstance(node, ast.ImportFrom):
            module = tuple(node.module.split('.')) if node.module else ()
            if node.level:
                module = (*package[: len(package) - node.level + 1], *module)
            for alias in node.names:  # a name of the module, or a module of the package: `from evavit import ops`
                yield node.lineno, (*module, alias.name)


@pytest.fixture(scope='module')
def trees():
    return {path: ast.parse(path.read_text(encoding='utf-8'), str(path)) for path in FILES}


def test_every_room_has_a_floor():
    there = {module_of(path)[1] for path in FILES if len(module_of(path)) > 1}
    assert there == FLOOR.keys() - {''}, 'FLOORS lists what is in evavit/: give a new room its floor'


def test_imports_run_one_way(trees):
    upwards = []
    for path, tree in trees.items():
        room = room_of(module_of(path))
        for line, module in imported(tree, path):
            other = room_of(module)
            if module[0] == 'evavit' and other != room and FLOOR[other] >= FLOOR[room]:
                upwards.append(f'{name_of(path)}:{line} imports {".".join(module)}')
    assert not upwards, '\n'.join(upwards)


def test_private_bindings_of_torch_are_used_in_one_place(trees):
    used = []
    for path, tree in trees.items():
        lines = [line for line, module in imported(tree, path) if module[:2] == ('torch', '_C')]
        attributes = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute))
        lines += [node.lineno for node in attributes if ast.unparse(node) == 'torch._C']
        used += [f'{name_of(path)}:{line}' for line in lines if not name_of(path).startswith(PRIVATE)]
    assert not used, '\n'.join(used)


def test_no_file_holds_more_than_one_idea():
    lines = {name_of(path): len(path.read_text(encoding='utf-8').splitlines()) for path in FILES}
    assert not {name: count for name, count in lines.items() if count > MOST_LINES}


def test_an_import_changes_nothing_outside():
    done = subprocess.run(
        [sys.executable, ROOT / 'tests' / 'import_effects.py'],
        capture_output=True,
        text=True,
        env={**os.environ, 'PYTHONPATH': str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stdout.strip(), done.stdout
