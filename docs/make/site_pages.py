"""What mkdocs does besides its own (mkdocs.yml names this file): pages from elsewhere, formulas, missing docstrings."""

import html
import logging
import posixpath
import re
from pathlib import Path

import griffe
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parents[2]
log = logging.getLogger('mkdocs.hooks.site_pages')  # with --strict a warning fails the build

# Files of the repository → their pages.
PAGES = {
    'README.md': 'index.md',
    'CONTRIBUTING.md': 'contributing.md',
    'CHANGELOG.md': 'changelog.md',
    'results/README.md': 'results.md',
    'examples/first_steps.ipynb': 'first_steps.md',
}
# What latex2mathml has no word for, or browsers no picture: they have given up MathML's mathvariant.
SPELLING = {
    r'\mathcal N': '𝒩',
    r'\mathbb E': '𝔼',
    r'\lVert': r'\|',
    r'\rVert': r'\|',
    r'{aligned}': r'{align*}',
    r'\_': '_',
    r'\log': r'\log\,',
}
# The modules whose __all__ the API page describes; '' is the package itself.
PUBLIC = ('', 'convert', 'dense', 'export', 'hub', 'layers', 'maps', 'models', 'ops')
# A directive of mkdocstrings: a public object and what is said of it.
OBJECT = re.compile(r'^::: (evavit[\w.]*)', re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie outside of docs/."""
    for source, page in PAGES.items():
        if source.endswith('.ipynb'):
            text, resources = MarkdownExporter().from_filename(ROOT / source)
            for name, content in resources['outputs'].items():  # pictures that the notebook shows
                files.append(File.generated(config, name, content=content))
        else:
            text = (ROOT / source).read_text(encoding='utf-8')
        files.append(File.generated(config, page, content=relink(text, source)))
    return files


def relink(text: str, source: str) -> str:
    """Links of a file of the repository as links of its page. What is no page of the site keeps its words alone."""

    def link(match: re.Match) -> str:
        picture, words, target, anchor = match.groups(default='')
        if '://' in target or not target:
            return match.group()
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if path in PAGES:
            return f'{picture}[{words}]({PAGES[path]}{anchor})'
        if path.startswith('docs/'):
            return f'{picture}[{words}]({path.removeprefix("docs/")}{anchor})'
        if (ROOT / path).exists():
            return words
        log.warning('%s: a link to %s, which does not exist', source, target)
        return match.group()

    return re.sub(r'(!?)\[([^\]]*)\]\(([^)\s#]*)(#[^)\s]*)?\)', link, text)


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Fail where an object that the page describes has no docstring, or a public name is not described."""
    if page.file.src_uri == 'api.md':
        described = OBJECT.findall(markdown)
        for problem in missing_docstrings(described):
            log.warning('api.md: %s', problem)
    return markdown


def missing_docstrings(described: list) -> list:
    """What keeps these names, such as 'evavit.convert_vit', from being the whole documentation, a line each."""
    package = griffe.load('evavit', search_paths=[ROOT])
    targets = {name: _target(package, name) for name in described}
    problems = [f'{name} has no docstring' for name, found in targets.items() if not found.has_docstring]
    paths = {found.path for found in targets.values()}
    for module in PUBLIC:
        exports = map(str, (package[module] if module else package).exports)
        for name in (f'evavit.{module}.{name}' if module else f'evavit.{name}' for name in exports):
            found = _target(package, name)
            if (found.is_function or found.is_class) and found.path not in paths:
                problems.append(f'{name} is not described')
    return problems


def _target(package: griffe.Module, name: str) -> griffe.Object:
    found = package[name.removeprefix('evavit.')]
    return found.final_target if found.is_alias else found


def on_page_content(content: str, page: Page, **_: object) -> str:
    """Formulas as MathML, which browsers show by themselves."""

    def formula(match: re.Match) -> str:
        display = match.group(1) == 'div'
        latex = html.unescape(match.group(2)).strip()[2:-2].strip()
        for theirs, ours in SPELLING.items():
            latex = latex.replace(theirs, ours)
        latex = re.sub(r'\\tag\{(\w+)\}', r'\\qquad\\text{(\1)}', latex)
        return convert(latex, display='block' if display else 'inline')

    return re.sub(r'<(span|div) class="arithmatex">(.*?)</\1>', formula, content, flags=re.DOTALL)
