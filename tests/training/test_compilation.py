"""What --torchcompile and its mode mean on each device, and what runs where something is missing."""

import importlib.util
import logging
from types import SimpleNamespace

import pytest
import torch
from timm.task import ClassificationTask
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters

from evavit.errors import LocalError, UserError
from evavit.training import compilation, loop
from evavit.training.compilation import AS_IS, FAST, Compilation, choose_compilation, report_skips
from evavit.training.config import parse_settings

CPU, CUDA = torch.device('cpu'), torch.device('cuda')


@pytest.fixture(autouse=True)
def triton(monkeypatch):
    """Triton is there, whatever this machine has; triton(False) takes it away."""
    find = importlib.util.find_spec

    def there(answer):
        monkeypatch.setattr(
            compilation.importlib.util, 'find_spec', lambda name: answer or None if name == 'triton' else find(name)
        )

    there(True)
    return there


@pytest.mark.parametrize(
    'flags, cpu, cuda',
    [
        ([], AS_IS, AS_IS),
        (['--torchcompile', 'none'], AS_IS, AS_IS),
        (['--torchcompile', 'auto'], AS_IS, Compilation('inductor', FAST, True)),
        (['--torchcompile'], Compilation('inductor'), Compilation('inductor', FAST, True)),
        (['--torchcompile', 'inductor'], Compilation('inductor'), Compilation('inductor', FAST, True)),
        (['--torchcompile', 'default'], *[Compilation('inductor', 'default')] * 2),
        (['--torchcompile', '--torchcompile-mode', 'default'], *[Compilation('inductor', 'default')] * 2),
        (['--torchcompile', 'auto', '--torchcompile-mode', 'default'], AS_IS, Compilation('inductor', 'default')),
        *[
            (flags, Compilation('inductor', mode), Compilation('inductor', mode, graphs))
            for mode, graphs in (
                ('reduce-overhead', True),
                ('max-autotune', True),
                ('max-autotune-no-cudagraphs', False),
            )
            for flags in (['--torchcompile', mode], ['--torchcompile', '--torchcompile-mode', mode])
        ],
        (['--torchcompile', 'aot_eager'], *[Compilation('aot_eager')] * 2),
    ],
    ids=lambda value: ' '.join(value) if isinstance(value, list) else None,
)
@pytest.mark.parametrize('script', ['train', 'validate'])
def test_one_meaning(script, flags, cpu, cuda):
    """A mode's name in place of the backend is the mode; without a mode the fastest one."""
    machine = parse_settings(script, flags)[0].machine
    for device, wanted in ((CPU, cpu), (CUDA, cuda)):
        chosen = choose_compilation(machine.torchcompile, machine.torchcompile_mode, device)
        assert chosen == wanted and (chosen.mode or 'no') in str(chosen) + 'no'
        assert ('CUDA graphs' in str(chosen)) == chosen.graphs and ('not compiled' in str(chosen)) == (chosen == AS_IS)


def test_the_recipes_are_fast_on_cuda_and_plain_on_a_cpu():
    for recipe in ('eva_deit_tiny', 'eva_deit_small', 'eva_deit_tiny_784', 'eva_pvt_v2_b3', 'finetune', 'finetune_384'):
        for flags, wanted in (([], Compilation('inductor', FAST, True)), (['--torchcompile', 'none'], AS_IS)):
            machine = parse_settings('train', ['-c', recipe, *flags])[0].machine
            assert choose_compilation(machine.torchcompile, machine.torchcompile_mode, CUDA) == wanted
            assert choose_compilation(machine.torchcompile, machine.torchcompile_mode, CPU) == AS_IS


@pytest.mark.parametrize(
    'torchcompile, mode, words',
    [
        ('inductr', None, ['inductr', 'did you mean inductor?']),
        ('reduce-overhed', None, ['did you mean reduce-overhead?']),
        ('reduce-overhead', 'default', ['torchcompile_mode default', 'reduce-overhead', 'leave it out']),
        ('aot_eager', 'default', ['aot_eager', 'leave it out']),
        ('none', 'default', ['none', 'leave it out']),
        (None, 'default', ['torchcompile_mode default', 'add --torchcompile']),
    ],
)
def test_settings_that_name_nothing(torchcompile, mode, words):
    with pytest.raises(UserError) as fault:
        choose_compilation(torchcompile, mode, CPU)
    assert all(word in str(fault.value) for word in words)


def test_without_triton(triton, caplog):
    """The recipe's choice falls back, and the log says what that costs; what the user named is an error."""
    triton(False)
    with caplog.at_level(logging.WARNING):
        assert choose_compilation('auto', None, CUDA) == AS_IS
    assert 'not compiled' in caplog.text and 'images a second' in caplog.text
    with pytest.raises(UserError, match='pip install triton'):
        choose_compilation('inductor', None, CUDA)
    assert choose_compilation('aot_eager', None, CUDA) == Compilation('aot_eager')
    assert choose_compilation('inductor', None, CPU) == Compilation('inductor')


def test_what_is_not_replayed_is_told_once(caplog):
    counters['inductor']['cudagraph_skips'] = 2
    report_skips(Compilation('inductor', 'default'))
    assert not caplog.text
    for _ in range(2):
        report_skips(Compilation('inductor', FAST, True))
    assert caplog.text.count('2 parts of the compiled model are not replayed') == 1


def test_a_compiler_that_fails_is_a_line():
    with pytest.raises(LocalError) as fault, Compilation('inductor', 'default').step():
        raise BackendCompilerFailed(lambda: None, RuntimeError('no\ncompiler'), None)
    line = str(fault.value)
    assert line.startswith('torch.compile, default: ') and '--torchcompile none' in line and '\n' not in line
    with pytest.raises(ZeroDivisionError), Compilation('inductor', 'default').step():
        raise ZeroDivisionError


def test_gradients_do_not_stay_in_the_memory_of_a_graph(monkeypatch):
    """Each replay writes over what it returned before: what the first batch left there is gone before the second."""
    batches = [(torch.randn(4, 3), torch.randint(2, (4,))) for _ in range(3)]
    pass_through = loop._forward_backward

    def sums(graphs):
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        run = SimpleNamespace(
            task=ClassificationTask(model, verbose=False),
            machine=parse_settings('train', [])[0].machine,
            process=SimpleNamespace(device=CPU),
            stepper=SimpleNamespace(backward=lambda loss: loss.backward()),
            grad_accum_steps=3,
            compilation=Compilation('eager', None, graphs),
            exchanges=False,
            parts={},
        )
        returned = []

        def replay(*args):
            if returned and graphs:
                for gradient in returned:
                    gradient.fill_(float('nan'))
            loss = pass_through(*args)
            returned[:] = returned or [p.grad for p in model.parameters()]
            return loss

        monkeypatch.setattr(loop, '_forward_backward', replay)
        for step, (images, target) in enumerate(batches):
            loop.micro_step(run, images, target, step)
        return [p.grad for p in model.parameters()]

    torch.testing.assert_close(sums(True), sums(False))
