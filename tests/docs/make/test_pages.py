"""docs/make/pages.py: a page or plot that cannot be written stays as it was."""

import errno
import os

import pytest
from programs import load_program


def fail(path, *_, **__):
    with open(path, 'w') as file:
        file.write('half')
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_leaves_page_and_plot(tmp_path, monkeypatch):
    pages = load_program('docs/make/pages.py')
    monkeypatch.setattr(pages, 'ROOT', tmp_path)
    (tmp_path / 'page.md').write_text('<!-- a -->\nold\n<!-- /a -->\n')
    (tmp_path / 'plot.svg').write_text('old')
    with monkeypatch.context() as patch, pytest.raises(OSError, match='No space'):
        patch.setattr('pathlib.Path.write_text', fail)
        pages.update('page.md', dict(a='new'), check=False, remedy='')
    figure = type('Figure', (), dict(savefig=lambda self, path, **_: fail(path)))()
    with pytest.raises(OSError, match='No space'):
        pages.save_plot(figure, tmp_path / 'plot.svg')
    assert (tmp_path / 'page.md').read_text() == '<!-- a -->\nold\n<!-- /a -->\n'
    assert (tmp_path / 'plot.svg').read_text() == 'old' and len(list(tmp_path.iterdir())) == 2
    assert pages.update('page.md', dict(a='new'), check=False, remedy='')
    assert (tmp_path / 'page.md').read_text() == '<!-- a -->\nnew\n<!-- /a -->\n'
