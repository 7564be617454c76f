"""The fast mode, CUDA graphs, with all that a run has: its curves are those of the same run without it.

Noise and drop path are off: compiled code draws other numbers. What is left is the rounding of bfloat16, or float16.
"""

import re

import pytest
import torch
from runs import PLAIN, QUICK, command, rows, scalars, signal_at, words

from evavit.training import loop

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')]

KWARGS = dict(img_size=56, patch_size=4, embed_dim=64, depth=2, num_heads=2, noise_std=0)  # the kernels run
NET = ['--model', 'eva_deit_tiny', '--model-kwargs', *(f'{key}={value}' for key, value in KWARGS.items())]
SOFTMAX = ['--model', 'deit_tiny_patch16_224', '--model-kwargs']
SOFTMAX += [f'{key}={value}' for key, value in KWARGS.items() if key != 'noise_std']
CONVERT = words('--convert eva --convert-kwargs window_size=7 partition_grid=7 noise_std=0 --kd-model-name parent')
ON_GPU = [*PLAIN, '--device', 'cuda', '--amp']
FAST = ['--torchcompile']
AVERAGE = words('--grad-accum-steps 2 -b 2 --model-ema --model-ema-decay 0.8')
MIXED = words('--mixup 0.8 --cutmix 1 --clip-grad 1')
HALF = words('--amp-dtype float16')
# 13 images to validate on: 5, 5, 3 of them in a batch, or 4, 4, 4, 1
ALL = [*AVERAGE, *MIXED, '--grad-checkpointing', '--validation-batch-size', '5', '--sched-on-updates']
NCCL = pytest.mark.skipif(torch.cuda.device_count() < 2, reason='needs two GPUs')


@pytest.fixture(autouse=True)
def graphs(monkeypatch):
    """Counts what is recorded and replayed; forgets what was compiled for other runs."""
    torch.compiler.reset()
    counted = dict(recorded=0, replayed=0)

    def count(name, what):
        call = getattr(torch.cuda.CUDAGraph, name)

        def counting(*args, **kwargs):
            counted[what] += 1
            return call(*args, **kwargs)

        monkeypatch.setattr(torch.cuda.CUDAGraph, name, counting)

    count('capture_begin', 'recorded')
    count('replay', 'replayed')
    yield counted
    torch.compiler.reset()


def assert_same_curves(one, other, average=False, scaled=False):
    """Losses within 5 %, norms of the gradient within 20 %. With float16's scaler within 10 %, and no norms: whether an
    early update overflows is a matter of rounding too."""
    tolerances = dict.fromkeys(['train/loss', 'eval/loss'] + ['eval/raw_loss'] * average, 0.05)
    tolerances = dict.fromkeys(tolerances, 0.1) if scaled else tolerances | {'train/grad_norm': 0.2}
    for name, tolerance in tolerances.items():
        a, b = scalars(one, name), scalars(other, name)
        assert a.keys() == b.keys()
        a, b = (torch.tensor(list(curve.values())) for curve in (a, b))
        torch.testing.assert_close(a, b, rtol=tolerance, atol=1e-3, equal_nan=True, msg=f'{name}: {a}, {b}')


@pytest.mark.parametrize(
    'flags',
    [
        [],
        AVERAGE,
        [*AVERAGE, '--opt', 'lamb'],
        MIXED,
        [*AVERAGE, *HALF],
        ['--grad-checkpointing', '--channels-last'],
        ALL,
    ],
    ids=' '.join,
)
def test_curves_of_an_eager_run(train, graphs, flags, record_property):
    average = '--model-ema' in flags
    eager = train('eager', *ON_GPU, *flags, model=NET)
    assert not graphs['replayed']
    fast = train('fast', *ON_GPU, *flags, *FAST, model=NET)
    assert_same_curves(eager, fast, average, scaled=flags[-2:] == HALF)
    # Forward, backward and validation, and an empty one of PyTorch's. The first of 12 passes and more are no replays.
    assert graphs['replayed'] >= 12 and 3 <= graphs['recorded'] <= 6
    record_property('figure', f'{" ".join(flags)}: {graphs["recorded"]} graphs, replayed {graphs["replayed"]} times')


@pytest.mark.parametrize('kind', ['logit', 'logit+feature'])
def test_a_converted_model_and_its_teacher(train, graphs, kind):
    """Both are compiled; the student's parent is the teacher."""
    parent = train('parent', '--epochs', '1', model=SOFTMAX) / 'last.safetensors'
    flags = [*ON_GPU, *AVERAGE, *CONVERT, '--initial-checkpoint', parent, '--kd-distill-type', kind]
    eager = train('eager', *flags, model=SOFTMAX)
    assert not graphs['replayed']
    assert_same_curves(eager, train('fast', *flags, *FAST, model=SOFTMAX), average=True)
    assert graphs['replayed'] >= 12 and graphs['recorded'] <= 8


def test_more_epochs_record_nothing_new(train, graphs):
    train('two', *ON_GPU, *ALL, *FAST, model=NET)
    recorded, graphs['recorded'] = graphs['recorded'], 0
    torch.compiler.reset()
    train('five', *ON_GPU, *ALL, *FAST, '--epochs', '5', model=NET)
    assert graphs['recorded'] == recorded


def test_an_update_that_is_skipped(train, graphs, monkeypatch):
    """The loss of the fourth batch is not finite; the update leaves no trace, and the graphs go on."""
    step = loop._forward_backward

    def run_with_fault(name, *flags):
        calls = []

        def faulty(run, images, target):
            calls.append(0)
            return step(run, images * float('nan') if len(calls) == 4 else images, target)

        monkeypatch.setattr(loop, '_forward_backward', faulty)
        return train(name, *ON_GPU, *AVERAGE, *flags, model=NET)

    eager, fast = run_with_fault('eager'), run_with_fault('fast', *FAST)
    assert [row['train_skipped'] for row in rows(fast)] == ['1', '0'] == [row['train_skipped'] for row in rows(eager)]
    assert_same_curves(eager, fast, average=True)
    assert graphs['replayed']


def test_a_stop_and_a_start(train, call, images, tmp_path, monkeypatch):
    """A run that is stopped in its second epoch goes on as if it had not been."""
    whole = train('whole', *ON_GPU, *AVERAGE, *FAST, model=NET)
    place = ['--data-dir', images, '--output', tmp_path, '--experiment', 'stopped']
    command_line = [*NET, *QUICK, *ON_GPU, *AVERAGE, *FAST, *place, '--resume', 'auto']
    with monkeypatch.context() as patch:
        signal_at(patch, [8])
        code, _, err = call('train', *command_line)
        assert code == 75, err
    torch.compiler.reset()
    code, out, err = call('train', *command_line)
    assert code == 0 and 'resuming from' in out and 'mode reduce-overhead (CUDA graphs)' in out, err
    assert_same_curves(whole, tmp_path / 'stopped', average=True)


def test_validation_by_itself(train, call, images, graphs):
    folder = train('run', *ON_GPU, model=NET)
    judge = ['--checkpoint', folder / 'last.safetensors', '--data-dir', images, '--device', 'cuda', '--amp', '-b', '5']
    losses = []
    for flags in ([], FAST, ['--torchcompile', 'reduce-overhead']):
        torch.compiler.reset()
        code, out, err = call('validate', *judge, '--workers', '0', *flags)
        assert code == 0 and '(13 images)' in out and ('CUDA graphs' in out) == bool(flags), err
        losses.append(float(re.search(r'loss ([\d.]+)', out)[1]))
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-2)
    assert graphs['replayed'] >= 2 and graphs['recorded'] <= 4


@NCCL
@pytest.mark.parametrize('flags', [[], ['--grad-checkpointing']], ids=['plain', 'checkpointing'])
def test_two_processes(train, images, tmp_path, flags):
    """With the same global batch they give the curves of one, without graphs."""
    flags = [*NET, *QUICK, *ON_GPU, *AVERAGE, *flags]
    one = train('one', *flags[len(NET) + len(QUICK) :], '-b', '4', '--global-batch-size', '8', model=NET)
    place = ['--data-dir', images, '--output', tmp_path, '--experiment', 'two', '--global-batch-size', '8']
    done = command('train', *flags, *place, *FAST, processes=2)
    assert done.returncode == 0 and 'CUDA graphs' in done.stdout, done.stderr
    assert_same_curves(one, tmp_path / 'two', average=True)
