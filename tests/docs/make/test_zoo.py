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
    monkeypatch.setattr(module, 'STEPS', tmp_path / 'zoo_h100.csv')
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
    assert zoo.steps() == 'Not measured yet.'


def test_a_line_an_attention(zoo):
    store_rows(
        zoo.STEPS,
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
    assert '| `performer_deit_tiny_784` | 8.1 | 81.2 | 4.0 | 40.0 | 8.1 | 87 | 67.19 |' in rows
    assert '| `eva_deit_tiny_784` | 8.1 | 81.2 | – | not measured | 9.9 | 94 | 76.67 |' in rows
    assert '| `reformer_deit_tiny_784` | – | out of memory | – | not measured | – | – | – |' in rows
    assert '| `local_deit_tiny_784` | – | not measured | – | RuntimeError: a / b | 7.8 | 65 | 70.62 |' in rows
    assert origin.startswith('Batch 128, bfloat16 autocast. NVIDIA H100, torch 2.11.0') and origin.count('abc1234') == 1


@pytest.mark.parametrize('other', [dict(batch_size=64), dict(device='NVIDIA H200')])
def test_rows_that_do_not_belong_together(zoo, other):
    store_rows(zoo.STEPS, [step('performer'), step('local', **other)])
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
