"""The training step: numbers that go bad are skipped, and adversarial images do not make them go bad."""

import importlib.util
from pathlib import Path

import pytest
import torch

from evavit.errors import run_script
from evavit.training.build import build_optimizer, build_task, compile_and_distribute
from evavit.training.compilation import AS_IS
from evavit.training.config import parse_settings
from evavit.training.distributed import Process
from evavit.training.loop import ProgressLine, Run, Stepper, exchange, micro_step

ROOT = Path(__file__).parents[2]


def parts(*flags):
    settings, _ = parse_settings('train', list(flags))
    model = torch.nn.Linear(3, 2)
    stepper = Stepper(settings.machine, settings.optim, torch.device('cpu'))
    return model, torch.optim.AdamW(model.parameters(), lr=0.1), stepper


def step(model, optimizer, stepper, images, loss=None):
    value = model(images).square().mean()
    stepper.backward(value)
    parameters = list(model.parameters())
    return stepper.step(optimizer, value.detach() if loss is None else torch.tensor(loss), parameters, parameters)


@pytest.mark.parametrize('flags', [[], ['--amp'], ['--amp', '--amp-dtype', 'float16']], ids=['plain', 'bf16', 'fp16'])
@pytest.mark.parametrize('fault', ['image', 'gradient', 'loss'])
def test_a_step_that_is_not_finite_changes_nothing(flags, fault):
    model, optimizer, stepper = parts('--clip-grad', '1', *flags)
    step(model, optimizer, stepper, torch.ones(2, 3))
    before = [value.clone() for value in model.parameters()]
    moments = [value.clone() for state in optimizer.state.values() for value in state.values()]
    if fault == 'gradient':
        hook = model.bias.register_hook(lambda gradient: gradient * float('inf'))
    norm = step(
        model,
        optimizer,
        stepper,
        torch.full((2, 3), float('nan') if fault == 'image' else 1.0),
        loss=float('inf') if fault == 'loss' else None,
    )
    assert norm.isfinite() == (fault == 'loss')
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    now = [value for state in optimizer.state.values() for value in state.values()]
    assert all(torch.equal(a, b) for a, b in zip(moments, now, strict=True))
    if fault == 'gradient':
        hook.remove()
    step(model, optimizer, stepper, torch.ones(2, 3))
    assert not torch.equal(before[0], model.weight)
    assert stepper._scaler.get_scale() == (2.0**15 if 'float16' in flags else 1.0)


def test_the_norm_is_that_of_the_gradient_before_scale_and_clipping():
    for flags in ([], ['--amp', '--amp-dtype', 'float16']):
        torch.manual_seed(0)
        model, optimizer, stepper = parts('--clip-grad', '0.001', *flags)
        gradient = torch.autograd.grad(model(torch.ones(2, 3)).square().mean(), list(model.parameters()))
        norm = step(model, optimizer, stepper, torch.ones(2, 3))
        torch.testing.assert_close(norm, torch.cat([g.flatten() for g in gradient]).norm())


@pytest.mark.gpu
@pytest.mark.parametrize('flags', [[], ['--amp'], ['--amp', '--amp-dtype', 'float16']], ids=['plain', 'bf16', 'fp16'])
def test_a_fused_optimizer_skips_without_the_host_waiting(flags):
    settings, _ = parse_settings('train', ['--clip-grad', '1', '--opt', 'adamw', *flags])
    model = torch.nn.Linear(3, 2).cuda()
    optimizer = build_optimizer(model, settings.optim, 0.1)
    stepper, parameters = Stepper(settings.machine, settings.optim, torch.device('cuda')), list(model.parameters())
    bad = torch.full((2, 3), float('nan'), device='cuda')
    for images in (torch.ones_like(bad), bad, torch.ones_like(bad)):
        before = [value.clone() for value in parameters]
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode('error')
        try:
            loss = model(images).square().mean()
            stepper.backward(loss)
            stepper.step(optimizer, loss.detach(), parameters, parameters)
        finally:
            torch.cuda.set_sync_debug_mode('default')
        assert all(torch.equal(a, b) for a, b in zip(before, parameters, strict=True)) == (images is bad)


@pytest.fixture(scope='module')
def adversarial():
    spec = importlib.util.spec_from_file_location('adversarial', ROOT / 'experiments' / 'adversarial' / 'run.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    'flags, remedy',
    [
        ('', 'try a lower --lr, --clip-grad 1'),
        ('--amp --clip-grad 5', 'try a lower --lr, a --clip-grad below 5'),
        ('--amp --amp-dtype float16', 'try a lower --lr, --clip-grad 1, or --amp-dtype bfloat16'),
    ],
)
def test_the_remedy_is_one_that_was_not_taken(flags, remedy):
    settings, _ = parse_settings('train', flags.split())
    assert Stepper(settings.machine, settings.optim, torch.device('cpu')).remedy() == remedy


@pytest.mark.parametrize('flags', ['--steps 0', '--steps 2_0', '--device foo'])
def test_flags_of_adversarial_images_that_cannot_be_are_a_line(adversarial, capsys, flags):
    assert run_script(adversarial.main, ['--small', *flags.split()]) == 2
    err = capsys.readouterr().err
    assert err.startswith('error: ') and flags.split()[0] in err and err.count('\n') == 1, err


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
@pytest.mark.parametrize('name', ['eva_deit_tiny', 'eva_pvt_v2_b3'])
def test_adversarial_images_in_half_precision(adversarial, name, dtype):
    result = adversarial.train(name, dtype, 'cpu', steps=3, small=True)
    assert result.bad == 0, result


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_adversarial_images_for_200_steps(adversarial, record_property):
    results = [
        adversarial.train(name, dtype, 'cpu', steps=200, small=True)
        for name in adversarial.MODELS
        for dtype in adversarial.DTYPES
    ]
    assert all(result.bad == 0 for result in results), results
    skipped = sum(result.skipped for result in results)
    record_property(
        'figure',
        f'{len(results)} runs of 200 steps of small models: every loss and weight finite, '
        f'{skipped} float16 steps skipped while the scale settled',
    )


def gradients_of(graphs, rank):
    """Of an update in two batches, and the running statistics after it."""
    settings, _ = parse_settings('train', ['--smoothing', '0', '--mixup', '0', '--cutmix', '0'])
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 3))
    process, compilation = Process(torch.device('cpu'), rank, rank, 2), AS_IS._replace(graphs=graphs)
    task = build_task(model, settings.loss, process.device, settings.ema)
    stepper = Stepper(settings.machine, settings.optim, process.device)
    rest = dict(bad=None, config=settings.run, updates_per_epoch=1, epochs=1, images_per_update=16, grad_accum_steps=2)
    run = Run(task, None, stepper, None, None, process, machine=settings.machine, compilation=compilation, **rest)
    compile_and_distribute(task, compilation, process)
    images = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    for number in range(2):
        micro_step(run, images[rank, number], torch.arange(4) % 3, number)
    assert run.exchanges == graphs
    module = task.get_trainable_module()
    if graphs:
        exchange(module, process)
    else:
        module._sync_buffers()  # what the next forward pass begins with
    return [p.grad for p in module.parameters()], list(module.buffers())


def compare_exchanges(rank, file):
    torch.distributed.init_process_group('gloo', init_method=f'file://{file}', rank=rank, world_size=2)
    (ours, statistics), (theirs, expected) = gradients_of(True, rank), gradients_of(False, rank)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(statistics, expected, strict=True))
    assert not torch.equal(ours[0], torch.zeros_like(ours[0]))
    torch.distributed.destroy_process_group()


def test_gradients_of_graphs_are_exchanged_as_distributed_data_parallel_does(tmp_path):
    torch.multiprocessing.spawn(compare_exchanges, (tmp_path / 'meet',), nprocs=2)


def test_slow_steps_have_a_line_before_the_interval(monkeypatch, caplog):
    caplog.set_level('INFO', logger='evavit')
    for silence, lines in ((30.0, ['epoch 0 4/9  x', 'epoch 0 8/9  x', 'epoch 0 9/9  x']), (-1.0, None)):
        monkeypatch.setattr('evavit.training.loop.SILENCE', silence)
        caplog.clear()
        line = ProgressLine(9, 4, shown=True)
        line.live = False
        for done in range(1, 10):
            line.show(done, 'epoch 0', 'x')
        assert len(caplog.messages) == 9 if lines is None else caplog.messages == lines
