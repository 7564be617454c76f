"""docs/make/scaling.py: what tools/scale.py measured stands beside what was predicted."""

import pytest
from programs import load_program

EMPTY = dict.fromkeys(load_program('tools/scale.py').COLUMNS, '')


def row(bench, gpus, mode, rate, **values):
    shared = dict(bench=bench, model='eva_deit_tiny', gpus=str(gpus), torchcompile=mode, img_per_s=str(rate))
    return EMPTY | shared | dict(status='ok') | values


@pytest.fixture
def table(monkeypatch):
    """table(rows) → the table of one machine."""
    scaling = load_program('docs/make/scaling.py')
    monkeypatch.setattr('sys.argv', ['scaling.py'])
    read = scaling.pages.read_results

    def table(*rows):
        found = {'scale.csv': list(rows)}
        monkeypatch.setattr(scaling.pages, 'read_results', lambda name: found[name] if name in found else read(name))
        steps = dict.fromkeys(scaling.MODELS, (256, 0.016))
        return scaling.measured_scaling(steps, scaling.assumptions())

    return table


def test_nothing_is_measured(table):
    text = table()
    assert text.count('not measured |') == 2 * 4 * 4 and text.endswith('not measured.')


def test_measured_beside_predicted(table):
    """The fastest mode counts, against one GPU in that mode; others, and failures, count as none."""
    text = table(
        row('weak', 1, 'no', 100),
        row('weak', 1, 'reduce-overhead', 400),
        row('weak', 2, 'no', 190, ms='10.5', no_sync_ms='9.0'),
        row('weak', 4, 'no', 380, ms='10.5', no_sync_ms='10.6'),
        row('strong', 2, 'no', 900, status='failed'),
        row('weak', 2, 'no', 800, flags='grad_checkpointing=True'),
        row('train', 2, 'no', 150, workers='3', augment_device='cpu', data_wait='0.25'),
    )
    one, two = (
        line.split(' | ')
        for line in text.splitlines()
        if line.startswith(('| `eva_deit_tiny` | 1', '| `eva_deit_tiny` | 2'))
    )
    assert one[3] == '400 img/s (reduce-overhead)'
    assert two[3] == '190 img/s (eager), 95 %, exchange 1.5 of 10.5 ms' and two[5] == 'not measured |'
    assert '95 %, exchange less than 0.5 of 10.5 ms' in text
    assert '2 GPUs, 3 workers each, images made by cpu' in text and '150 img/s, of which it waits 25 %' in text


def test_one_gpu_is_the_first_of_several(monkeypatch):
    """What is predicted starts at what the page has as measured: the fastest mode of tools/scale.py on one GPU."""
    scaling = load_program('docs/make/scaling.py')
    rows = scaling.pages.read_results('scale.csv')
    for model, (batch, seconds) in scaling.measured().items():
        rates = {
            row['torchcompile']: float(row['img_per_s'])
            for row in scaling.pages.pick(rows, bench='weak', model=model, gpus=1, status='ok')
        }
        assert batch / seconds == pytest.approx(max(rates.values())) == pytest.approx(rates['reduce-overhead'])
    assert 'H100' not in scaling.origin(scaling.measured(), None)
