"""The errors by `count_cells` in the documentation are those of the code."""

import pytest
from programs import load_program


def test_results_are_of_this_code():
    pytest.importorskip('sklearn')
    counts = load_program('docs/make/counts.py')
    stored = counts.pages.read_results(counts.RESULTS)
    measured = counts.measure()
    assert len(stored) == len(measured) == len(counts.COUNTS) * len(counts.WINDOWS)
    for row, fresh in zip(stored, measured, strict=True):
        assert (row['count_cells'], int(row['tokens_in_E'])) == (fresh['count_cells'], fresh['tokens_in_E'])
        assert float(row['error']) == pytest.approx(float(fresh['error']), abs=5e-4)
    errors = {(row['count_cells'], row['tokens_in_E']): float(row['error']) for row in measured}
    assert errors['one', 0] < errors['one', 4] < errors['one', 49]  # as the pages say
    assert errors['outside', 0] > errors['outside', 49] > errors['outside', 196] == 0
