"""The soak's table and docs/reliability.md name tests that exist, the same ones."""
import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding='utf-8')
         for path in ROOT.glob('tests/**/test_*.py')}


def soak():
    spec = importlib.util.spec_from_file_location('soak', ROOT / 'tools' / 'soak.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_test_that_the_page_names_exists():
    named = set(re.findall(r'`(test_\w+)`', (ROOT / 'docs' / 'reliability.md').read_text(encoding='utf-8')))
    defined = {name for text in TESTS.values() for name in re.findall(r'^def (test_\w+)', text, re.MULTILINE)}
    assert len(named) > 15 and named <= defined


def test_every_promise_selects_tests():
    """Each -k word stands in a test's name of a file that the promise names."""
    promises = soak().PROMISES
    assert len(promises) > 15
    for promise in promises:
        files, _, words = promise.tests.partition(' -k ')
        names = [name for file in files.split() for name in re.findall(r'^def (test_\w+)', TESTS[file], re.MULTILINE)]
        for word in re.split(r' or ', words.strip("'")):
            assert any(word in name for name in names), promise


def test_a_broken_promise_is_said(monkeypatch, capsys, tmp_path):
    module = soak()
    for name, body in (('kept', 'record_property("figure", "42 of 42")'), ('broken', 'assert False')):
        (tmp_path / f'test_{name}.py').write_text(f'def test_it(record_property):\n    {body}\n')
    monkeypatch.setattr(module, 'PROMISES', [module.Promise(f'{name} promise', str(tmp_path / f'test_{name}.py'))
                                             for name in ('kept', 'broken')])
    assert module.main(['kept']) == 0 and 'holds   kept promise: 42 of 42' in capsys.readouterr().out
    assert module.main(['broken']) == 1 and 'BROKEN  broken promise' in capsys.readouterr().out
    assert module.main(['no such word']) == 1
