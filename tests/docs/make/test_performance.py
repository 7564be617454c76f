"""docs/performance.md: what was measured from rows, verdicts, plots that know their data."""

import pytest
from programs import load_program

from evavit.bench.results import COLUMNS, store_rows


def attention_row(bench, backend, tokens, ms, **more):
    return dict(
        bench=bench,
        backend=backend,
        attention='eva' if backend in ('gluon', 'triton', 'plain') else 'softmax',
        batch_size=100_352 // tokens,
        tokens=tokens,
        width=192,
        heads=3,
        amp_dtype='bfloat16',
        status='ok',
        case='x',
        forward_ms=ms / 4,
        ms=ms,
        **more,
    )


def model_row(bench, case, attention, speed, **more):
    return (
        dict(
            bench=bench,
            case=case,
            model=case,
            attention=attention,
            batch_size=8,
            img_size=224,
            status='ok',
            amp_dtype='bfloat16',
            torchcompile='default',
            img_per_s=speed,
            ms=8e3 / speed,
        )
        | more
    )


@pytest.fixture
def performance(tmp_path, monkeypatch):
    module = load_program('docs/make/performance.py')
    monkeypatch.setattr(module.pages, 'ROOT', tmp_path)
    monkeypatch.setattr(module, 'PLOT', tmp_path / 'performance.svg')
    return module


def store(performance, rows, name='h100.csv'):
    for number, row in enumerate(rows):  # a comparison each
        row = dict.fromkeys(COLUMNS, '') | row | dict(device=f'H100 {number}')
        store_rows(performance.pages.ROOT / 'results' / name, [row])


def measured(performance):
    return {
        what: (value, performance.verdict(sense, goal, value)) for what, sense, goal, value, _ in performance.goals()
    }


def test_what_was_measured_beside_the_goals(performance):
    store(
        performance,
        [
            attention_row('op', 'triton', 784, 0.5, forward_of_copy=0.61, backward_of_copy=0.499),
            attention_row('op', 'flash', 784, 1.5),
            attention_row('op', 'cudnn', 784, 1.25),
            attention_row('op', 'triton', 65536, 0.62),
            attention_row('op', 'efficient', 784, 0.1) | {'status': 'nan'},
            attention_row('layer', 'triton', 784, 1.0, peak_memory_mib=90),
            attention_row('layer', 'sdpa', 784, 1.3),
            attention_row('layer', 'flash', 784, 2.0, peak_memory_mib=100),
            model_row('train', 'eva_deit_tiny', 'eva', 9784),
            model_row('train', 'eva_deit_tiny', 'softmax', 10000),
            model_row('train', 'eva_deit_tiny', 'softmax', 20000, torchcompile='no'),
        ],
    )
    store(
        performance,
        [
            model_row('infer', 'eva_deit_tiny', 'eva', 10, torchcompile='no'),
            model_row('infer', 'eva_deit_tiny', 'softmax', 8, torchcompile='no'),
        ],
        'cpu.csv',
    )
    found = measured(performance)

    def of(*words):
        (line,) = [value for what, value in found.items() if all(word in what for word in words)]
        return pytest.approx(line[0], rel=1e-6), line[1]

    assert of('alone, forward +', ' 784 ') == (2.5, 'reached')  # the best backend, and no row that failed
    assert of('layer', ' 784 ', 'speed') == (1.3, '**short**')
    assert of('alone, forward,', ' 784 ') == (61, 'reached') and of('alone, backward,', ' 784 ') == (49.9, '**short**')
    assert of('memory', ' 784 ') == (0.9, 'reached')
    assert of('`eva_deit_tiny` at 224', 'training') == (0.9784, '**short**')  # compiled beside compiled
    assert of('`eva_deit_tiny`,', 'published') == (4.0, 'reached')
    tokens = 100_352 // 784 * 784, 100_352 // 65536 * 65536
    assert of('alone', 'per token')[0] == 100 * ((0.62 / tokens[1]) / (0.5 / tokens[0]) - 1)
    assert of('`eva_deit_tiny` on 2 CPU') == (0.8, 'reached')
    assert found["`eva_pvt_v2_b3` on 2 CPU cores, inference: time over timm's softmax model"] == (None, 'not measured')
    assert '| not measured |' in performance.reach() and ' lines: 5 reached, ' in performance.reach()


def test_nothing_measured(performance):
    assert {verdict for _, verdict in measured(performance).values()} == {'not measured'}
    assert performance.op() == performance.gpu_models() == performance.cpu_models() == 'Not measured yet.'


def test_tables(performance):
    store(
        performance,
        [
            attention_row('op', 'triton', 784, 0.5, forward_of_copy=0.61, backward_of_copy=0.499),
            attention_row('op', 'plain', 784, 5.0),
            model_row('train', 'eva_deit_tiny_784', 'eva', 3000, peak_memory_mib=2048, backend='triton'),
            model_row(
                'train',
                'eva_deit_tiny_784',
                'softmax',
                2000,
                peak_memory_mib=1024,
                model='deit_tiny_patch16_224:patch_size=8:class_token=False:global_pool=avg',
            ),
        ],
    )
    assert '| 128 × 784 | 0.125 / 0.500 | 1.250 / 5.000 | – | – | – | 61 % / 50 % |' in performance.op()
    assert (
        '| `eva_deit_tiny_784` | 224 | 8 | training, compiled | 3,000 | 2,000 | 1.50 | 2.0 | 1.0 | 993 | '
        '`deit_tiny_patch16_224:patch_size=8` |'
    ) in performance.gpu_models()


def test_gluon_stands_for_the_kernels_where_it_was_measured(performance):
    for tokens, times in ((784, {'triton': 0.8, 'gluon': 0.5, 'flash': 1.0}), (196, {'triton': 0.8, 'flash': 1.0})):
        rows = [attention_row('op', backend, tokens, ms) | dict(device='H100') for backend, ms in times.items()]
        store_rows(performance.pages.ROOT / 'results' / 'h100.csv', [dict.fromkeys(COLUMNS, '') | row for row in rows])
    assert [performance.speed_up(performance.gpu_rows(), 'op', tokens) for tokens in (784, 196)] == [2.0, 1.25]


def test_the_mode_that_suits_eva_best(performance):
    store(
        performance,
        [
            model_row('train', 'eva_deit_tiny', which, speed, torchcompile=mode)
            for which, mode, speed in (
                ('eva', 'default', 3000),
                ('softmax', 'default', 4000),
                ('eva', 'reduce-overhead', 5000),
                ('softmax', 'reduce-overhead', 4500),
                ('eva', 'no', 9000),
                ('softmax', 'no', 100),
            )
        ],
    )
    (row,) = [line for line in performance.best_models().splitlines() if 'eva_deit_tiny' in line]
    assert '| training, compiled, CUDA graphs | 5,000 | 4,500 | 1.11 |' in row


def test_plot_knows_its_data(performance):
    pytest.importorskip('matplotlib')
    store(
        performance,
        [
            attention_row(bench, backend, tokens, 0.5, forward_of_copy=0.6, backward_of_copy=0.5, peak_memory_mib=100)
            for bench in ('op', 'layer')
            for backend in ('triton', 'flash')
            for tokens in (784, 12544)
        ],
    )
    assert not performance.plot_is_fresh()
    performance.draw()
    first = performance.PLOT.read_bytes()
    assert performance.plot_is_fresh()
    performance.draw()
    assert performance.PLOT.read_bytes() == first
    store(performance, [attention_row('op', 'triton', 784, 0.4)])
    assert not performance.plot_is_fresh()
