"""What docs/transfer.md says of the starts of converted networks is in the rows."""

from statistics import mean

import pytest
from programs import load_program

starts = load_program('docs/make/starts.py')


def test_every_start_has_every_count_and_a_commit():
    run = load_program('experiments/softmax_to_eva/run.py')
    assert starts.OURS == run.AS_CONVERTED and list(starts.NETWORKS) == [of[-1] for of in run.CONVERTED.values()]
    for rows in starts.measured().values():
        seeds = {row['seed'] for row in rows}
        keys = {(row['start'], row['count_cells']) for row in rows}
        assert seeds == {'0', '1', '2'} and len(rows) == len(keys) * len(seeds) and len(keys) == 1 + 3 * 6
        assert all(row['commit'] and row['date'] and row['device'] for row in rows)


def test_firsts_counts_the_seeds():
    rows = [
        dict(seed=seed, start=start, count_cells=count, output=error)
        for seed, errors in (('0', '0123'), ('1', '2103'))
        for (start, count), error in zip(
            (('softmax', ''), (starts.OURS, 'outside'), (starts.OURS, 'all'), ('as from nothing', 'outside')),
            errors,
            strict=True,
        )
    ]
    assert starts.firsts(rows, 'output') == '1 of 2'
    assert starts.figures(rows, 'output', start='as from nothing') == [3, 3]


@pytest.mark.parametrize('network', starts.NETWORKS.values())
def test_what_the_page_says(network):
    rows = starts.measured()[network]

    def figure(name, start, count='outside'):
        return mean(starts.figures(rows, name, start=start, count_cells=count))

    one, all_starts = 'projection 1, LayerNorm weight 1', {row['start'] for row in rows} - {'softmax'}
    assert starts.firsts(rows, 'attention') == '3 of 3'
    for start in all_starts:
        assert figure('attention', start) < figure('attention', start, 'all') < figure('attention', start, 'one')
    for name in ('attention', 'output'):
        assert figure(name, one, 'one') < figure(name, starts.OURS, 'one')
    rotary = network == 'rotary'
    assert (figure('output', one) < figure('output', starts.OURS)) == rotary
    assert (figure('top1', one) > figure('top1', starts.OURS)) == rotary
    pairs = zip(
        *(starts.figures(rows, 'output', start=of, count_cells='outside') for of in (one, starts.OURS)), strict=True
    )
    assert not rotary or sum(a < b for a, b in pairs) == 2
    third = [row for row in rows if row['seed'] == '2']
    assert rotary or min(float(row['output']) for row in third if row['count_cells']) > 0.6
    assert rotary or [f'{float(row["top1"]):.1f}' for row in third if not row['count_cells']] == ['61.9']
