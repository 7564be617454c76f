"""The soak's table and docs/reliability.md name tests that exist, the same ones."""

import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding='utf-8') for path in ROOT.glob('tests/**/test_*.py')
}


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


def test_every_test_that_the_page_names_is_in_the_soak():
    page = (ROOT / 'docs' / 'reliability.md').read_text(encoding='utf-8')
    selected = set()
    for promise in soak().PROMISES:
        files, _, words = promise.tests.partition(' -k ')
        words = re.split(r' or ', words.strip("'"))
        selected |= {
            name
            for file in files.split()
            for name in re.findall(r'^def (test_\w+)', TESTS[file], re.MULTILINE)
            if any(word in name for word in words)
        }
    assert not set(re.findall(r'`(test_\w+)`', page)) - selected


def test_a_broken_promise_is_said(monkeypatch, capsys, tmp_path):
    module = soak()
    for name, body in (('kept', 'record_property("figure", "42 of 42")'), ('broken', 'assert False')):
        (tmp_path / f'test_{name}.py').write_text(f'def test_it(record_property):\n    {body}\n')
    monkeypatch.setattr(
        module,
        'PROMISES',
        [module.Promise(f'{name} promise', str(tmp_path / f'test_{name}.py')) for name in ('kept', 'broken')],
    )
    monkeypatch.setattr(module, 'KEPT', tmp_path / 'soak.json')
    assert module.main(['kept']) == 0 and 'holds   kept promise: 42 of 42' in capsys.readouterr().out
    assert module.main(['broken']) == 1 and 'BROKEN  broken promise' in capsys.readouterr().out
    assert module.main(['no such word']) == 1


def test_a_promise_that_held_is_not_checked_again(monkeypatch, capsys, tmp_path):
    """Until its code changes, or it is asked for."""
    module = soak()
    ran, holds, version = [], [True], ['1']
    monkeypatch.setattr(module, 'KEPT', tmp_path / 'soak.json')
    monkeypatch.setattr(module, 'PROMISES', [module.Promise(f'promise {n}', f'test {n}') for n in (1, 2)])
    monkeypatch.setattr(module, 'code', lambda: version[0])
    monkeypatch.setattr(module, 'check', lambda promise: (ran.append(promise.tests), (holds[0], '7 of 7', ''))[1])
    assert module.main(['1']) == 0 and ran == ['test 1']
    assert module.main([]) == 0 and ran == ['test 1', 'test 2']
    capsys.readouterr()
    assert module.main([]) == 0 and len(ran) == 2
    assert capsys.readouterr().out.count('7 of 7') == 2
    assert module.main(['--afresh', '2']) == 0 and len(ran) == 3
    version[0], holds[0] = '2', False
    assert module.main([]) == 1 and len(ran) == 5
    assert module.main([]) == 1 and len(ran) == 7  # what was broken is checked again


def test_the_code_of_a_promise_is_what_it_runs():
    module = soak()
    found = {path for pattern in module.CODE for path in ROOT.glob(pattern)}
    for name in ('train.py', 'evavit/training/checkpoint.py', 'tests/cli/test_resume.py', 'tools/adversarial.py'):
        assert ROOT / name in found
    assert module.code() == module.code()
