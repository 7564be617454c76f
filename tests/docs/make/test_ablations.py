"""docs/ablations.md: what was trained here, beside the paper's, and what the page says of it in words."""

import pytest
from programs import load_program


@pytest.fixture(scope='module')
def ablations():
    return load_program('docs/make/ablations.py')


def test_windows_and_cells_stand_beside_the_papers_of_the_same_share(ablations):
    lines = ablations.windows().splitlines()
    assert lines[2].split(' | ')[1:4] == ['–', '17.46', '17.93 (74.33)']  # neither is nothing to attend to
    assert ablations.published() == {
        (4, 0): 70.62,
        (0, 4): 74.33,
        (4, 2): 75.83,
        (4, 4): 76.67,
        (4, 8): 77.10,
        (8, 4): 77.36,
    }
    assert set(ablations.published()) <= set(ablations.grid()) and len(ablations.grid()) == 15


def test_the_figures_bear_out_the_words(ablations):
    """Of ablations.md and evidence.md."""
    found = {sides: ablations.top(row) for sides, row in ablations.grid().items()}
    error = 2**0.5 * ablations.pages.standard_error(ablations.grid()[4, 4])
    assert found[2, 0] < found[4, 0] < found[8, 0] < found[0, 2] - 1.96 * error
    many = [top1 for (_, cells), top1 in found.items() if cells >= 4]
    assert max(many) - min(many) < 1.96 * error
    (_, _, default, _), *others = ablations.settings()
    middle = sum(map(ablations.top, default)) / len(default)
    apart = {keywords: ablations.top(runs[0]) - middle for _, keywords, runs, _ in others}
    worse = {keywords for keywords, points in apart.items() if points < -1.96 * error}
    assert worse == {"`summary='linear'`", "`proposal='learned'`"}
    nothing = apart.keys() - worse - {"`summary='identity'`"}
    assert all(abs(apart[keywords]) <= error for keywords in nothing) and len(default) == 3
