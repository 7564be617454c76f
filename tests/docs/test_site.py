"""The site: its navigation, what its API page describes, and that a fault fails the build (extra `site`)."""

import importlib
import inspect
import logging
import re
import shutil
import subprocess
import sys

import pytest
import yaml
from programs import ROOT, load_program

import evavit

OBJECTS = re.findall(r'^::: ([\w.]+)', (ROOT / 'docs/api.md').read_text(encoding='utf-8'), re.MULTILINE)
ADDED = {'index.md', 'contributing.md', 'changelog.md', 'results.md', 'first_steps.md'}  # by docs/make/site_pages.py


class Loader(yaml.SafeLoader):
    """With the one tag of mkdocs.yml that calls Python."""


Loader.add_multi_constructor('tag:yaml.org,2002:python/', lambda loader, suffix, node: suffix)


def leaves(nav):
    if isinstance(nav, str):
        return [nav]
    return [page for entry in (nav.values() if isinstance(nav, dict) else nav) for page in leaves(entry)]


def test_the_navigation_names_every_page_once():
    pages = leaves(yaml.load((ROOT / 'mkdocs.yml').read_text(encoding='utf-8'), Loader)['nav'])
    assert sorted(pages) == sorted(ADDED | {path.name for path in ROOT.glob('docs/*.md')})


def find(name):
    module, _, attribute = name.rpartition('.')
    return getattr(importlib.import_module(module), attribute)


@pytest.mark.parametrize('name', OBJECTS)
def test_objects_of_the_api_page_have_docstrings(name):
    found = find(name)
    # A class without its own inherits one that is about something else.
    assert (found.__dict__['__doc__'] if isinstance(found, type) else found.__doc__).strip()


@pytest.mark.parametrize('module', ['', '.convert', '.dense', '.export', '.hub', '.layers', '.maps', '.models', '.ops'])
def test_the_api_page_has_what_the_package_exports(module):
    described = [find(name) for name in OBJECTS]
    names = set(importlib.import_module(f'evavit{module}').__all__) - set(evavit.list_models())
    public = [name for name in names if inspect.isroutine(f := find(f'evavit{module}.{name}')) or inspect.isclass(f)]
    assert public and [name for name in public if find(f'evavit{module}.{name}') not in described] == []


@pytest.fixture
def site():
    for package in ('mkdocs', 'material', 'mkdocstrings_handlers.python', 'latex2mathml', 'nbconvert'):
        pytest.importorskip(package, reason='needs evavit[site]')
    return load_program('docs/make/site_pages.py')


def test_links_of_pages_from_elsewhere(site, caplog):
    text = site.relink(
        '[a](docs/dense.md#maps) ![b](docs/images/c.svg) [d](LICENSE) [e](https://f.g) [h](#i)', 'README.md'
    )
    assert text == '[a](dense.md#maps) ![b](images/c.svg) d [e](https://f.g) [h](#i)' and not caplog.records
    assert site.relink('[a](../docs/math.md) [b](../README.md)', 'results/README.md') == '[a](math.md) [b](index.md)'
    with caplog.at_level(logging.WARNING):
        site.relink('[a](gone.md)', 'README.md')
    assert 'gone.md, which does not exist' in caplog.text


def test_missing_docstrings_are_found(site):
    assert site.missing_docstrings(OBJECTS) == []
    assert 'evavit.convert_vit is not described' in site.missing_docstrings(OBJECTS[:1])
    assert set(site.PUBLIC) == {'', 'convert', 'dense', 'export', 'hub', 'layers', 'maps', 'models', 'ops'}
    (problem,) = site.missing_docstrings([*OBJECTS, 'evavit.layers.EvaAttention.attend'])
    assert problem == 'evavit.layers.EvaAttention.attend has no docstring'


def build(folder):
    command = [sys.executable, '-m', 'mkdocs', 'build', '--strict', '--site-dir', folder / 'site']
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


def test_it_builds_and_faults_fail(site, tmp_path):
    for name in ('docs', 'results', 'examples'):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ('mkdocs.yml', 'README.md', 'CONTRIBUTING.md', 'CHANGELOG.md', 'LICENSE'):
        shutil.copy(ROOT / name, tmp_path)
    for name in ('evavit', 'tests'):
        (tmp_path / name).symlink_to(ROOT / name)
    built = build(tmp_path)
    assert built.returncode == 0, built.stderr
    page = (tmp_path / 'site/math.html').read_text(encoding='utf-8')
    assert page.count('<math') > 150 and 'arithmatex' not in page and '$' not in re.sub('<script.*?</script>', '', page)
    for page in (tmp_path / 'site').glob('*.html'):
        assert not re.search(r'<(script|link|img)[^>]*(src|href)="https?:', page.read_text(encoding='utf-8')), page
    with open(tmp_path / 'docs/dense.md', 'a', encoding='utf-8') as stream:
        stream.write('\n[one](gone.md) [two](math.md#gone)\n')
    with open(tmp_path / 'docs/api.md', 'a', encoding='utf-8') as stream:
        stream.write('\n::: evavit.layers.EvaAttention.attend\n')
    built = build(tmp_path)
    assert 'evavit.layers.EvaAttention.attend has no docstring' in built.stderr
    assert built.returncode == 1 and "'gone.md'" in built.stderr and "'math.md#gone'" in built.stderr
