"""Peers: what each computes, FlexAttention's blocks against its mask, and rows of those that are not there."""

import importlib
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from evavit.bench import contenders, peers
from evavit.bench.contenders import Setting, bench_layer, bench_op
from evavit.bench.peers import PEERS, flex_mask

CPU = torch.device('cpu')
ANYWHERE = ('windows', 'linear', 'natten')  # FlexAttention has no backward on a CPU


def qkv(side, cells=0, heads=2, d=16):
    q = torch.randn(2, heads, side**2, d)
    k, v = torch.randn(2, 2, heads, side**2 + cells, d)
    return q, k, v


@pytest.mark.parametrize('side, window, cells', [(14, 7, 49), (21, 7, 9), (14, 7, 0), (12, 2, 4)])
def test_blocks_of_flex_attention(side, window, cells):
    """Block by block what PyTorch finds by looking at every pair of a query and a key."""
    N = side**2
    ours = flex_mask(N, window, cells, CPU)
    theirs = create_block_mask(ours.mask_mod, 1, 1, N, N + cells, device='cpu')
    assert torch.equal(ours.to_dense(), theirs.to_dense()) and ours.shape == (1, 1, N, N + cells)


@pytest.mark.parametrize('cells', [0, 49])
def test_flex_attention_computes_windows_and_cells(cells):
    q, k, v = qkv(14, cells)
    expected = PEERS['flex'].exact(14, 7)(q, k, v)
    mask = flex_mask(196, 7, cells, CPU)
    torch.testing.assert_close(flex_attention(q, k, v, block_mask=mask), expected)
    query, key = torch.arange(196)[:, None], torch.arange(196 + cells)
    seen = (query // 49 == key // 49) | (key >= 196)
    torch.testing.assert_close(F.scaled_dot_product_attention(q, k, v, attn_mask=seen), expected)


@pytest.mark.slow
def test_flex_attention_compiled():
    q, k, v = qkv(14, 49)
    with torch.no_grad():
        torch.testing.assert_close(PEERS['flex'].make(14, 7, 49, CPU)(q, k, v), PEERS['flex'].exact(14, 7)(q, k, v))


def test_windows():
    q, k, v = qkv(6)
    row, column = torch.arange(36) // 6 // 3, torch.arange(36) % 6 // 3
    seen = (row[:, None] == row) & (column[:, None] == column)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    for attend in (PEERS['windows'].make(6, 3, 0, CPU), PEERS['windows'].exact(6, 3)):
        torch.testing.assert_close(attend(q, k, v), expected)


def test_linear_attention_in_chunks():
    q, k, v = qkv(18)  # 324 tokens: two chunks
    expected = (q @ k.transpose(-2, -1)).tril() @ v * 16**-0.5
    torch.testing.assert_close(PEERS['linear'].exact(18, 7)(q, k, v), expected, rtol=1e-4, atol=1e-4)


def test_neighbours():
    """A token sees the window around it, moved inside of the grid at its edges."""
    q, k, v = qkv(5)
    start = (torch.arange(5) - 1).clamp(0, 2)
    near = (torch.arange(5) >= start[:, None]) & (torch.arange(5) < start[:, None] + 3)
    seen = (near[:, None, :, None] & near[None, :, None, :]).flatten(2).flatten(0, 1)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    torch.testing.assert_close(PEERS['natten'].exact(5, 3)(q, k, v), expected)


def test_rows_beside_eva(capsys):
    setting = Setting(CPU, torch.float32, ('plain', *ANYWHERE), repeats=1, warmup=0)
    rows = {row['backend']: row for row in bench_op(setting, 2, 14, 2, 16)}
    assert rows['plain']['attention'] == 'eva'
    assert {row['attention'] for name, row in rows.items() if name != 'plain'} == {
        PEERS[name].attention for name in ANYWHERE
    }
    assert rows['windows']['status'] == 'ok' and float(rows['windows']['error']) < 1e-6 and rows['windows']['ms'] > 0
    assert rows['linear']['status'] == rows['natten']['status'] == 'not available' and 'ms' not in rows['linear']
    err = capsys.readouterr().err.splitlines()
    assert 'linear is left out: no fla.ops.linear_attn here (pip install flash-linear-attention)' in err
    assert 'natten is left out: no natten here (pip install natten)' in err

    assert {row['status'] for row in bench_layer(Setting(CPU, torch.float32, tuple(PEERS)), 1, 14, 2, 16)} == {
        'not available'
    }


def test_where_windows_do_not_fit(capsys):
    (row,) = bench_op(Setting(CPU, torch.float32, ('windows',), repeats=1, warmup=0), 1, 8, 2, 16)
    assert row['status'] == 'not available'
    assert capsys.readouterr().err == 'windows is left out: windows of 7 × 7 do not divide 8 × 8 tokens\n'


def test_packages_that_do_not_load(monkeypatch):
    def broken(name):
        raise OSError('undefined symbol')

    with monkeypatch.context() as patch:
        patch.setattr(peers.importlib, 'import_module', broken)
        assert 'fla.ops.linear_attn does not load' in PEERS['linear'].why_not(14, 7)
    monkeypatch.setattr(importlib, 'import_module', lambda name: SimpleNamespace(HAS_LIBNATTEN=False))
    assert 'without its CUDA library' in PEERS['natten'].why_not(14, 7)


def test_a_peer_that_is_off_is_not_timed(monkeypatch):
    wrong = PEERS['windows']._replace(make=lambda side, window, cells, device: lambda q, k, v: q + k + v)
    monkeypatch.setitem(contenders.PEERS, 'windows', wrong)
    (row,) = bench_op(Setting(CPU, torch.float32, ('windows',), repeats=1, warmup=0), 1, 14, 2, 16)
    assert 'from float64' in row['status'] and 'ms' not in row


@pytest.mark.gpu
@pytest.mark.parametrize('side', [14, 28])
def test_peers_on_a_gpu(side):
    """All that are here are right, forward and backward, and timed."""
    setting = Setting(torch.device('cuda'), torch.bfloat16, tuple(PEERS), repeats=2, warmup=1)
    for row in bench_op(setting, 4, side):
        assert row['status'] in ('ok', 'not available') and (row['status'] == 'ok') == ('ms' in row)
        assert row['status'] == 'ok' or row['backend'] not in ('flex', 'windows')
