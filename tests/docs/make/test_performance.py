"""docs/performance.md: what was measured from rows, verdicts, plots that know their data."""

import pytest
from programs import load_program

from evavit.bench.results import COLUMNS, store_rows, write_rows


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


def store(performance, rows, name=''):
    """Rows in the file of their table, or in one of this name."""
    for number, row in enumerate(rows):  # a comparison each
        row = dict.fromkeys(COLUMNS, '') | row | dict(device=f'H200 {number}')
        table = row['bench'] if row['bench'] in ('op', 'layer') else 'models'
        store_rows(performance.pages.ROOT / 'results' / (name or f'{table}_h200.csv'), [row])


@pytest.fixture
def goals(performance, monkeypatch):
    module = load_program('docs/make/goals.py')
    monkeypatch.setattr(module, 'performance', performance)
    return module


def measured(goals):
    return {what: (value, goals.verdict(sense, goal, value)) for what, sense, goal, value, _ in goals.goals()}


def test_what_was_measured_beside_the_goals(performance, goals):
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
    found = measured(goals)

    def of(*words):
        (line,) = [value for what, value in found.items() if all(word in what for word in words)]
        return pytest.approx(line[0], rel=1e-6), line[1]

    assert of('alone, forward +', ' 784 ') == (2.5, 'reached')  # the best backend, and no row that failed
    assert of('layer', ' 784 ', 'speed') == (1.3, '**short**')
    assert of('alone, forward,', ' 784 ') == (61, 'reached') and of('alone, backward,', ' 784 ') == (49.9, '**short**')
    assert of('memory', ' 784 ') == (0.9, 'reached')
    assert of('`eva_deit_tiny` at 224', 'training') == (0.9784, '**short**')  # compiled beside compiled
    assert of('`eva_deit_tiny`,', 'training', 'default mode') == (0.9784, '**short**')
    tokens = 100_352 // 784 * 784, 100_352 // 65536 * 65536
    assert of('alone', 'per token')[0] == 100 * ((0.62 / tokens[1]) / (0.5 / tokens[0]) - 1)
    assert of('`eva_deit_tiny` on 2 CPU') == (0.8, 'reached')
    assert found["`eva_pvt_v2_b3` on 2 CPU cores, inference: time over timm's softmax model"] == (None, 'not measured')
    assert '| not measured |' in goals.reach() and ' lines: 4 reached, ' in goals.reach()


def test_nothing_measured(performance, goals):
    assert {verdict for _, verdict in measured(goals).values()} == {'not measured'}
    names = 'gains best_models modes op cells peers layer host gpu_models wide cpu_models'
    assert {getattr(performance, name)() for name in names.split()} == {'Not measured yet.'}


def h200(performance, name, rows):
    """A file as tools/gpu.py writes it."""
    where = dict(device='NVIDIA H200', torch='2.11.0', timm='1.0.31', commit='abc1234', date='2026-12-01')
    rows = [dict.fromkeys(COLUMNS, '') | row | where for row in rows]
    write_rows(performance.pages.ROOT / 'results' / f'{name}_h200.csv', rows)


def test_a_file_a_table(performance):
    h200(performance, 'op', [attention_row('op', name, 784, ms) for name, ms in (('gluon', 0.4), ('cudnn', 1.0))])
    assert performance.speed_up(performance.gpu_rows(), 'op', 784) == 2.5 and performance.op().count('abc1234') == 1
    assert '| batch × tokens | EVA, kernels | SDPA, cuDNN | over the best SDPA | share of a copy |' in performance.op()
    assert '| 128 × 784 | 0.100 / 0.400 | 0.250 / 1.000 | 2.50× / 2.50× | – |' in performance.op()
    new = [attention_row('layer', name, 784, ms) for name, ms in (('gluon', 0.5), ('flash', 2.0))]
    h200(performance, 'layer', [row | dict(peak_memory_mib=100) for row in new])
    assert 'abc1234' in performance.layer() and performance.speed_up(performance.gpu_rows(), 'layer', 784) == 4


def test_models_beside_both_softmax_models(performance, goals):
    rows = []
    for mode, speeds in {'no': (95, 100, 110), 'default': (120, 100, 100), 'reduce-overhead': (200, 160, 125)}.items():
        eva, timm, ours = speeds
        for which, speed in (('eva', eva), ('softmax', timm)):
            rows.append(model_row('train', 'eva_deit_tiny', which, speed, torchcompile=mode, backend='gluon'))
        rows.append(model_row('train', 'softmax_deit_tiny', '', ours, torchcompile=mode))
    h200(performance, 'models', rows)
    assert '| `eva_deit_tiny` | training | 0.95× / 0.86× | 1.20× / 1.20× | 1.25× / 1.60× |' in performance.modes()
    (line,) = [line for line in performance.best_models().splitlines() if line.startswith('| `')]
    assert '| 200 | 160 | 1.25 | 125 | 1.60 |' in line
    assert performance.gpu_models().count('\n| `eva_deit_tiny` |') == 3
    found = measured(goals)
    assert found["`eva_deit_tiny`, training, eager: speed over timm's softmax model"] == (0.95, 'reached')
    assert (
        found["`eva_deit_tiny`, training, default mode of `torch.compile`: speed over timm's softmax model"][0] == 1.2
    )


def test_what_a_user_gains(performance):
    rows = [
        attention_row('layer', name, tokens, ms) | dict(forward_ms=forward)
        for name, tokens, ms, forward in (
            ('gluon', 196, 1.0, 0.5),
            ('flash', 196, 1.2, 0.4),
            ('gluon', 784, 1.0, 0.5),
            ('flash', 784, 2.0, 1.0),
        )
    ]
    h200(performance, 'layer', rows)
    h200(
        performance,
        'models',
        [
            model_row('infer', 'eva_pvt_v2_b3', which, speed, torchcompile=mode)
            for mode, speeds in (('default', (80, 120)), ('reduce-overhead', (99, 100)))
            for which, speed in zip(('eva', 'softmax'), speeds, strict=True)
        ]
        + [model_row('infer', 'softmax_pvt_v2_b3', '', 90, torchcompile='reduce-overhead')],
    )
    text = performance.gains()
    assert 'NVIDIA H200, by tokens: 1.2× at 196, 2× at 784.' in text
    assert 'In training it is faster from 196 tokens on, without gradients from 784 tokens on.' in text
    assert "timm's softmax models they are slower in `eva_pvt_v2_b3` at 224 px, inference (0.99×), and faster" in text
    assert 'our own softmax models they are faster in all' in text


def test_256_cells_and_a_wide_model(performance, goals):
    cells = dict(partition_grid=16, num_prefix_tokens=0, window_size=7)
    h200(
        performance,
        'op_cells',
        [attention_row('op', name, 4096, ms) | cells for name, ms in (('triton', 1.0), ('flash', 3.0), ('cudnn', 2.6))]
        + [attention_row('op', 'triton', 1369, 1.0) | cells | dict(partition_grid=13)],
    )
    assert '| 24 × 4,096 | 0 | 0.250 / 1.000 | 0.750 / 3.000 | 0.650 / 2.600 | 2.60× / 2.60× |' in performance.cells()
    assert '1,369' not in performance.cells()
    shared = dict(bench='convert', case='vit', batch_size=32, tokens=1369, status='ok')
    h200(
        performance,
        'wide',
        [
            shared | dict(model=name, attention=attention, forward_ms=ms, ms=4 * ms)
            for name, attention, ms in (('softmax', 'softmax', 10), ('49 cells', 'eva', 8), ('cells of 3', 'eva', 20))
        ],
    )
    assert '| 49 cells | 32 | 1369 | 8.0, 1.25× | 32.0, 1.25× |' in performance.wide()
    found = measured(goals)
    assert found['attention alone, 256 cells, forward + backward, 4,096 tokens: speed over the best SDPA backend'] == (
        2.6,
        'reached',
    )
    assert found['a ViT of width 384 at 518 px, converted, inference, eager: speed over softmax'] == (1.25, 'reached')


def test_the_host(performance, goals):
    layers = [
        attention_row('host', name, 196, ms) | dict(forward_ms=forward, batch_size=32)
        for name, ms, forward in (('gluon', 1.2, 0.2), ('sdpa', 1.0, 0.2))
    ]
    h200(performance, 'host', layers)
    assert '| EVA | 32 × 196 | 200, 1.00× | 1,200, 1.20× |' in performance.host()
    found = measured(goals)
    assert found["the layer, inference: the processor's time over SDPA's"] == (1.0, 'reached')
    assert found["the layer, forward + backward: the processor's time over SDPA's"] == (1.2, '**short**')


def test_peers(performance):
    """What each computes is said, what is not here is empty, and who is faster than EVA is bold."""
    rows = [
        attention_row('op', name, 784, ms) | dict(attention=kind)
        for name, ms, kind in (
            ('gluon', 0.4, 'eva'),
            ('cudnn', 0.8, 'softmax'),
            ('windows', 0.2, 'windows'),
            ('flex', 0.6, 'window + cells'),
        )
    ]
    h200(performance, 'peers', rows)
    lines = {line.split('|')[1].strip(): line for line in performance.peers().splitlines() if line.startswith('|')}
    assert lines['EVA, kernels'] == '| EVA, kernels | EVA | 0.100 / 0.400 |'
    assert lines['`windows`'].endswith('| **0.050 / 0.200** |') and 'as Swin does' in lines['`windows`']
    assert lines['`flex`'].endswith('| 0.150 / 0.600 |') and lines['`natten`'].endswith('| – |')


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
    assert '| 128 × 784 | 0.125 / 0.500 | 1.250 / 5.000 | – / – | 61 % / 50 % |' in performance.op()
    assert (
        '| `eva_deit_tiny_784` | 224 | 8 | training, compiled | 3,000 | 2,000 | 1.50 | 2.0 | 1.0 | 993 | '
        '`deit_tiny_patch16_224:patch_size=8` |'
    ) in performance.gpu_models()


def test_gluon_stands_for_the_kernels_where_it_was_measured(performance):
    for tokens, times in ((784, {'triton': 0.8, 'gluon': 0.5, 'flash': 1.0}), (196, {'triton': 0.8, 'flash': 1.0})):
        rows = [attention_row('op', backend, tokens, ms) | dict(device='H200') for backend, ms in times.items()]
        store_rows(performance.pages.ROOT / 'results' / 'op_h200.csv', [dict.fromkeys(COLUMNS, '') | x for x in rows])
    assert [performance.speed_up(performance.gpu_rows(), 'op', tokens) for tokens in (784, 196)] == [2.0, 1.25]


def test_whole_models_with_graphs_come_first(performance):
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
