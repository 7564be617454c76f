"""The registry of backends: who is asked, what a user is told, how the environment and a new backend have a say."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from timm.layers import set_fused_attn

from evavit.cli import benchmark, scripts
from evavit.layers import EvaAttention, EvaAttention1d, FusedMlp, LocalAttention
from evavit.ops import backends, eva_attention, eva_attention_packed, eva_backend, mlp_gelu_backend
from evavit.ops.backends import Backend, use_backend
from evavit.ops.dwconv import DWCONV, DepthwiseCase
from evavit.ops.eva import EVA
from evavit.ops.eva.case import EvaCase
from evavit.ops.eva.plain import eva_plain, split_packed
from evavit.ops.mlp import MLP, MlpCase

CUDA, CPU = torch.device('cuda', 0), torch.device('cpu')


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """No choice and no warning of another test."""
    monkeypatch.setattr(backends, '_said', set())
    with use_backend(None):
        yield


@pytest.fixture
def said(monkeypatch):
    """What the log is told."""
    lines = []
    monkeypatch.setattr(backends._logger, 'warning', lines.append)
    return lines


@pytest.fixture
def hopper(monkeypatch):
    """As where Triton is installed and the GPU is a Hopper."""
    pytest.importorskip('triton')
    for op in ('eva.triton', 'mlp', 'dwconv'):
        monkeypatch.setattr(f'evavit.ops.{op}.has_kernels', lambda module: True)
    monkeypatch.setattr('evavit.ops.eva.triton.plan.why_not_gluon_device', lambda device: None)


def case(**change):
    return EvaCase(**(dict(device=CUDA, dtype=torch.bfloat16, head_dim=64, window_size=7, partition_grid=7) | change))


@pytest.mark.parametrize(
    'change, name, reason',
    [
        ({}, 'gluon', None),
        (dict(feat_size=(14, 14)), 'gluon', None),
        (dict(dtype=torch.float32), 'triton', 'gluon: float32 is not bfloat16 or float16'),
        (dict(head_dim=48), 'triton', 'gluon: head_dim 48 is not 32 or 64'),
        (dict(window_size=5), 'triton', 'gluon: a window has 25 tokens, not 33 to 64'),
        (dict(feat_size=(4, 14)), 'triton', 'gluon: a window has 28 tokens'),
        (dict(partition_grid=9), 'triton', 'gluon: 81 cells and prefix tokens are not 1 to 64'),
        (dict(partition_grid=9, feat_size=(14, 14)), 'gluon', None),  # 7 × 7 cells of 2 × 2
        (dict(partition_grid=0), 'triton', 'gluon: there are no cells'),
        (dict(dtype=torch.float64), 'plain', 'triton: float64 is not float32, bfloat16 or float16'),
        (dict(head_dim=40), 'plain', 'triton: head_dim 40 is not one of 16, 32, 48, 64, 80, 96, 128'),
        (dict(window_size=20), 'plain', 'triton: window_size 20 is above 16'),
        (dict(partition_grid=17), 'plain', 'triton: partition_grid 17 is above 16'),
        (dict(dropout=True), 'plain', 'triton: dropout of attention weights'),
        (dict(noise_grad=True), 'plain', 'triton: the noise wants a gradient'),
        (dict(variant=True), 'plain', 'triton: the ablations run in plain PyTorch'),
        (dict(device=CPU), 'plain', 'triton: no CUDA device'),
    ],
)
def test_eva_says_what_runs_and_why_no_faster_one(change, name, reason, hopper):
    asked = case(**change)
    assert EVA.name(asked) == name == EVA.choose(tuple(asked)).name
    assert EVA.describe(asked).startswith(name if reason is None else f'{name} ({reason}')


def test_without_triton(monkeypatch):
    for op in ('eva.triton', 'mlp', 'dwconv'):
        monkeypatch.setattr(f'evavit.ops.{op}.has_kernels', lambda module: False)
    asked = {EVA: case(), MLP: MlpCase(CUDA, torch.bfloat16, 64, 64, 64), DWCONV: DepthwiseCase(CUDA, torch.float32)}
    for registry, of in asked.items():
        assert registry.describe(of) == 'plain (triton: Triton is not installed)'


@pytest.mark.parametrize(
    'change, reason',
    [
        ({}, None),
        (dict(dtype=torch.float32), 'float32, where there is nothing to win'),
        (dict(dtype=torch.float64), 'float64 is not bfloat16 or float16'),
        (dict(dtype=None), 'tensors of several dtypes'),
        (dict(hidden_features=100), '16 does not divide 100 features'),
        (dict(device=CPU), 'no CUDA device'),
    ],
)
def test_mlp_says_why_not(change, reason, hopper):
    asked = MlpCase(**(dict(zip(MlpCase._fields, (CUDA, torch.float16, 64, 128, 64), strict=True)) | change))
    assert MLP.describe(asked) == ('triton' if reason is None else f'plain (triton: {reason})')


def test_devices_without_gluon(monkeypatch):
    triton = pytest.importorskip('triton')
    plan = pytest.importorskip('evavit.ops.eva.triton.plan')
    if os.environ.get('TRITON_INTERPRET') == '1':
        pytest.skip("Triton's interpreter has no devices")
    monkeypatch.setattr(torch.version, 'hip', None)
    assert plan.why_not_gluon_device(-1) == 'no CUDA device'
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (8, 0))
    assert plan.why_not_gluon_device(0) == 'the GPU is no Hopper'
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (9, 0))
    if plan.GLUON_VERSIONS[0] <= tuple(map(int, triton.__version__.split('.')[:2])) <= plan.GLUON_VERSIONS[1]:
        assert plan.why_not_gluon_device(0) is None
    monkeypatch.setattr('triton.__version__', '3.5.1')
    with pytest.warns(UserWarning, match='Triton is 3.5.1'):
        assert plan.why_not_gluon_device(0) == 'Triton is 3.5.1, not 3.6 to 3.9'


@pytest.mark.parametrize('name', ['plain', 'triton', 'gluon'])
def test_a_preferred_backend_runs(name, hopper):
    with use_backend(name):
        assert EVA.name(case()) == name
        assert EVA.describe(case()) == f'{name} (chosen)'
        others = 'plain' if name == 'plain' else 'triton'  # the MLP has no Gluon, and keeps its own choice
        assert mlp_gelu_backend(CUDA, torch.bfloat16, 64, 64, 64) == others
    assert EVA.name(case()) == 'gluon'


def test_a_preferred_backend_that_cannot_run_is_named_once_for_each_reason(hopper, said):
    with use_backend('gluon'):
        assert EVA.name(case(head_dim=48)) == 'triton'
        assert EVA.name(case(head_dim=48, window_size=8)) == 'triton'
        assert EVA.name(case(device=CPU)) == 'plain'
    head_dim, device = said
    assert head_dim.startswith('backend gluon: eva_attention cannot take it: head_dim 48 is')
    assert device == 'backend gluon: eva_attention cannot take it: no CUDA device'


def test_an_unknown_backend_is_refused(monkeypatch):
    with (
        pytest.raises(ValueError, match=r"^use_backend is 'cudnn'; choose from gluon, plain, triton$"),
        use_backend('cudnn'),
    ):
        pass
    monkeypatch.setattr(backends, '_preferred', 'cudnn')
    backends._decide.cache_clear()
    with pytest.raises(ValueError, match=r"^EVAVIT_BACKEND is 'cudnn'; choose from gluon, plain, triton$"):
        EVA.name(case())


@pytest.mark.parametrize('script', ['train', 'benchmark'])
def test_an_unknown_backend_is_one_line_of_a_script(script, monkeypatch, capsys):
    monkeypatch.setattr(backends, '_preferred', 'tritn')
    monkeypatch.setattr(scripts, 'quiet_start', lambda program: None)  # signals stay the tests'
    assert getattr(scripts, script)() == 2
    assert capsys.readouterr().err == "error: EVAVIT_BACKEND is 'tritn'; choose from gluon, plain, triton\n"


def test_graphs_that_leave_take_plain(hopper, said, monkeypatch):
    monkeypatch.setattr(backends, 'is_exporting', lambda: True)
    assert EVA.choose(tuple(case())).name == 'plain'
    with EVA.forced('triton'):
        assert EVA.choose(tuple(case())).name == 'plain'
    with use_backend('triton'):
        assert EVA.choose(tuple(case())).name == 'plain'
    assert said == ['backend triton: eva_attention cannot take it: the graph is being exported']


@pytest.mark.parametrize('name', ['plain', 'triton'])
def test_the_environment_chooses(name):
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name('environment.py')],
        text=True,
        capture_output=True,
        env={**os.environ, 'EVAVIT_BACKEND': name},
        check=True,
    )
    assert done.stdout.splitlines() == ['plain', 'without Triton']
    reasons = [f'backend triton: {op} cannot take it: no CUDA device' for op in ('eva_attention', 'mlp_gelu')]
    assert done.stderr.splitlines() == (reasons if name == 'triton' else [])


@pytest.fixture
def throwaway():
    """A backend of EVA from outside: this function and one call of `register`."""
    seen = []

    def run(tokens, options):
        seen.append((len(tokens), options.window_size))
        q, k, v = tokens if len(tokens) == 3 else split_packed(tokens[0])
        return eva_plain(q, k, v, options)

    reason = 'head dims above 16'
    EVA.register(Backend('throwaway', lambda case: None if case.head_dim <= 16 else reason, run), before='gluon')
    yield seen
    EVA.unregister('throwaway')


def test_a_new_backend_costs_one_call(throwaway, said):
    assert list(EVA.backends) == ['throwaway', 'gluon', 'triton', 'plain']
    qkv = torch.randn(3, 2, 2, 20, 8, requires_grad=True)
    options = dict(window_size=3, partition_grid=0)
    got = eva_attention_packed(qkv, [4, 5], **options, fused=True)
    torch.testing.assert_close(got, eva_attention_packed(qkv, [4, 5], **options))
    torch.testing.assert_close(got, eva_attention(*qkv.unbind(0), [4, 5], **options, fused=True))
    assert throwaway == [(1, 3), (3, 3)]

    layer, x = EvaAttention(32, 2), torch.randn(1, 20, 32)
    assert layer.backend == 'throwaway' == eva_backend(CPU, torch.float32, 16)
    assert layer.extra_repr().endswith('backend=throwaway')
    assert EvaAttention(64, 2).backend == 'plain'
    torch.compiler.reset()
    compiled = torch.compile(layer.eval(), backend='eager', fullgraph=True)
    torch.testing.assert_close(compiled(x, [4, 5]), layer(x, [4, 5]))
    with use_backend('throwaway'):
        eva_attention_packed(torch.randn(3, 1, 1, 20, 32), [4, 5], **options, fused=True)
    assert said == ['backend throwaway: eva_attention cannot take it: head dims above 16']
    with pytest.raises(ValueError, match="eva_attention has a backend 'throwaway' already"):
        EVA.register(Backend('throwaway', lambda case: None, eva_plain))


def test_benchmark_measures_a_new_backend_beside_the_others(throwaway, capsys):
    flags = '--grid 4 -b 1 --dim 32 --num-heads 2 --device cpu --repeats 1 --warmup 1 --backend throwaway plain'
    benchmark.main(['--bench', 'layer', *flags.split()])
    rows = capsys.readouterr().out.splitlines()
    assert [row.split('backend ')[1].split()[0] for row in rows] == ['throwaway', 'plain']
    assert all('status ok' in row for row in rows) and throwaway


def test_the_switch_keeps_its_meaning(throwaway):
    qkv = torch.randn(3, 1, 2, 20, 8)
    eva_attention_packed(qkv, [4, 5], partition_grid=0)  # not fused
    try:
        set_fused_attn(False)
        layer = EvaAttention(32, 2)
    finally:
        set_fused_attn(True)
    layer(torch.randn(1, 20, 32), [4, 5])
    with use_backend('throwaway'):
        assert layer.backend == 'plain' and layer.extra_repr().endswith('backend=plain (fused_attn is False)')
    assert throwaway == []


def test_an_empty_batch_takes_plain(throwaway):
    assert eva_attention_packed(torch.randn(3, 0, 2, 20, 8), [4, 5], partition_grid=0, fused=True).shape == (
        0,
        2,
        20,
        8,
    )
    assert throwaway == []


def test_layers_name_their_backend():
    for layer in (EvaAttention(32, 2), LocalAttention(32, 2), FusedMlp(32, 64)):
        assert layer.backend == 'plain'
        assert layer.extra_repr().endswith('backend=plain (triton: no CUDA device)')
    assert EvaAttention1d(32, 2).backend == 'plain'
    assert 'backend=plain (sequences have no kernels)' in repr(EvaAttention1d(32, 2))
    assert FusedMlp(32, 64, drop=0.1).extra_repr() == 'backend=plain (dropout)'
    off = FusedMlp(32, 64)
    off.fused_mlp = False
    assert off.extra_repr() == 'backend=plain (fused_mlp is False)'
    dropping = EvaAttention(32, 2, attn_drop=0.1)
    assert dropping.train()._case().dropout and not dropping.eval()._case().dropout
