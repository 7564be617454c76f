"""docs/zoo.md: what is counted, and the table of training steps, from rows as tools/gpu.py has them."""

import pytest
import timm
import torch
from programs import load_program
from torch.utils.flop_counter import FlopCounterMode

from evavit.bench.results import COLUMNS, store_rows
from evavit.layers import ATTENTIONS


@pytest.fixture
def zoo(tmp_path, monkeypatch):
    module = load_program('docs/make/zoo.py')
    monkeypatch.setattr(module.pages, 'ROOT', tmp_path)
    module.file = tmp_path / 'results' / module.STEPS
    return module


def step(name, mode='no', **more):
    case = f'{name}_deit_tiny_784'
    return (
        dict.fromkeys(COLUMNS, '')
        | dict(
            bench='train',
            case=case,
            model=case,
            batch_size=128,
            img_size=224,
            amp_dtype='bfloat16',
            torchcompile=mode,
            status='ok',
            ms='81.234',
            peak_memory_mib='8294.4',
            device='NVIDIA H100',
            torch='2.11.0',
            timm='1.0.31',
            commit='abc1234',
            date='2026-01-02',
        )
        | more
    )


def test_without_a_file_nothing_is_measured(zoo):
    assert zoo.steps() == zoo.families() == 'Not measured yet.'


def test_a_line_an_attention(zoo):
    store_rows(
        zoo.file,
        [
            step('performer'),
            step('performer', 'default', ms='40', peak_memory_mib='4096'),
            step('eva', attention='eva', backend='triton'),
            step('eva', attention='softmax', backend='sdpa', model='deit_tiny_patch16_224', ms='1'),
            step('reformer', status='out of memory', ms='', peak_memory_mib=''),
            step('local', 'default', status='RuntimeError: a | b', ms='', peak_memory_mib=''),
        ],
    )
    head, _, *rows, empty, origin = zoo.steps().splitlines()
    assert [row.split('`')[1] for row in rows] == [f'{attention}_deit_tiny_784' for attention in ATTENTIONS]
    assert all(row.count('|') == head.count('|') for row in rows) and not empty
    assert '| `performer_deit_tiny_784` | 8.1 | 81.2 | 40.0 | not measured | 8.1 | 87 | 67.19 |' in rows
    assert '| `eva_deit_tiny_784` | 8.1 | 81.2 | not measured | not measured | 9.9 | 94 | 76.67 |' in rows
    assert '| `reformer_deit_tiny_784` | – | out of memory | not measured | not measured | – | – | – |' in rows
    assert (
        '| `local_deit_tiny_784` | – | not measured | RuntimeError: a / b | not measured | 7.8 | 65 | 70.62 |' in rows
    )
    assert origin.startswith('Batch 128, bfloat16 autocast, compiled in the default mode. NVIDIA H100, torch 2.11.0')
    assert origin.count('abc1234') == 1


def test_in_graphs_and_at_other_sizes(zoo):
    graphs = 'reduce-overhead'
    rows = [
        step('performer'),
        step('performer', graphs, ms='30', peak_memory_mib=''),
        step('performer', graphs, bench='infer', ms='10', img_per_s='12800'),
        step('reformer', graphs, status='RuntimeError: no graph', ms=''),
        step('reformer', 'default', ms='50'),
        *(
            step('lara', bench=bench, case='lara_deit_small', batch_size=256, img_per_s=speed)
            for bench, speed in (('train', '1000'), ('infer', '4000'))
        ),
    ]
    for row in rows:  # a comparison each
        store_rows(zoo.file, [row])
    found = zoo.steps().splitlines()
    assert '| `performer_deit_tiny_784` | 8.1 | 81.2 | 30.0 | 12,800 | 8.1 | 87 | 67.19 |' in found
    assert '| `reformer_deit_tiny_784` | – | not measured | 50.0 * | not measured | – | – | – |' in found
    assert 'compiled in CUDA graphs, * in the default mode' in found[-1] and 'lara_deit_small' not in '\n'.join(found)
    assert '| `lara_deit_small` | 256 | 1,000 | 4,000 |' in zoo.families()
    zoo.file.unlink()
    store_rows(zoo.file, rows[:3])
    assert 'compiled in CUDA graphs. NVIDIA' in zoo.steps()


@pytest.mark.parametrize('other', [dict(batch_size=64), dict(device='NVIDIA H200')])
def test_rows_that_do_not_belong_together(zoo, other):
    store_rows(zoo.file, [step('performer'), step('local', **other)])
    with pytest.raises(SystemExit, match='mixes batch sizes'):
        zoo.steps()


@pytest.mark.parametrize(
    'name, kwargs',
    [
        ('softmax_deit_tiny', dict(depth=3)),
        ('deit_tiny_patch16_224', {}),
        ('softmax_pvt_v2_b3', dict(depths=(1, 3, 2, 1))),
    ],
)
def test_a_model_is_counted_at_its_own_depth(zoo, name, kwargs):
    model = timm.create_model(name, device='meta', **kwargs).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as flops:
        model(torch.empty(1, 3, 224, 224, device='meta'))
    assert zoo.count(name, **kwargs) == (sum(p.numel() for p in model.parameters()), flops.get_total_flops() // 2)
