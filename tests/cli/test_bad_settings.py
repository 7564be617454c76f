"""Settings gone bad: one line and exit code 2, before data is read or a device touched. And what --dry-run prints."""

import csv
import json
import socket
import time

import mutations
import pytest
import timm
import torch
from runs import MODEL, QUICK, ROOT, load_script, words, write_bad_weights, write_images

from evavit import hub
from evavit.errors import run_script
from evavit.training import data, dry_run
from evavit.training.config import parse_settings
from evavit.training.data import images as images_module


class ReachedError(Exception):
    """The settings were taken: the next step would have opened data or a device."""


@pytest.fixture
def start(monkeypatch, images, tmp_path, capfd):
    """start(YAML text or None, flags) → (exit code, lines of stderr) of train.py, stopped once it takes them."""
    script = load_script('train')

    def reached(*args, **kwargs):
        raise ReachedError

    monkeypatch.setattr(script, 'start_process', reached)
    monkeypatch.setattr(data, 'open_training_sets', reached)
    monkeypatch.setattr(torch.cuda, 'init', reached)
    monkeypatch.chdir(tmp_path)

    def start(text, flags):
        if text is not None:
            (tmp_path / 'bad.yaml').write_text(text)
            flags = ['-c', 'bad.yaml', *flags]
        capfd.readouterr()
        code = run_script(
            script.main, [*MODEL, *QUICK, '--data-dir', str(images), '--output', str(tmp_path / 'out'), *flags]
        )
        out, err = capfd.readouterr()
        assert not out and not (tmp_path / 'out').exists()
        return code, [line for line in err.splitlines() if line]

    return start


def check(start, cases):
    """All cases; returns how many there were. What is not one line and exit code 2 is listed."""
    wrong = []
    for name, text, flags in cases:
        try:
            code, lines = start(text, flags)
        except ReachedError:
            wrong.append(f'taken: {name}')
        except BaseException as error:
            wrong.append(f'traceback {type(error).__name__}: {str(error)[:80]}: {name}')
        else:
            if code != 2 or len(lines) != 1 or not lines[0].startswith('error: ') or len(lines[0]) > 700:
                wrong.append(f'code {code}, {lines}: {name}')
    assert not wrong, '\n'.join([f'{len(wrong)} of {len(cases)}:', *wrong])
    return len(cases)


def test_good_settings_are_taken(start):
    """The base of all mutations, and each published recipe: else the refusals below would say little."""
    for flags in ([], ['--mixup', '0.2'], ['--sched', 'multistep', '--decay-milestones', '1']):
        with pytest.raises(ReachedError):
            start(None, flags)
    for name in ('eva_deit_tiny', 'eva_pvt_v2_b3', 'quickstart'):
        settings, _ = parse_settings('train', ['-c', str(ROOT / 'configs' / f'{name}.yaml'), '--data-dir', str(ROOT)])
        batch = settings.batch
        dry_run.check_run(settings, (batch.global_batch_size or batch.batch_size) // batch.batch_size)


@pytest.mark.timeout(120)
def test_300_bad_settings(start):
    assert check(start, mutations.mutations(300)) == 300


@pytest.mark.parametrize('name', ['model_kwargs', 'convert_kwargs', 'kd_model_kwargs'])
def test_arguments_that_no_checkpoint_keeps(start, name):
    for value in (
        '99999999999999999999',
        '[1, 9223372036854775808]',
        '{1}',
        "b'x'",
        '1j',
        '...',
        '{1: 2}',
        '{"a": {1}}',
    ):
        code, lines = start(None, [f'--{name.replace("_", "-")}', f'qkv_bias={value}'])
        assert code == 2 and len(lines) == 1, lines
        assert lines[0].startswith(f'error: {name}: qkv_bias=') and 'is nothing that a checkpoint keeps' in lines[0]
    for value in ('2026-11-30', '[2026-11-30 10:00:00]', '!!binary aGk=', '!!set {a}'):
        code, lines = start(f'{name}:\n  qkv_bias: {value}\n', [])
        assert code == 2 and len(lines) == 1 and f'{name}: qkv_bias=' in lines[0], lines


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_1000_bad_settings(start, record_property):
    begin = time.process_time()
    count = check(start, mutations.mutations(1000, seed=1))
    record_property(
        'figure',
        f'{count} bad settings refused with one line, no data read, no device touched, '
        f'{time.process_time() - begin:.0f} s',
    )


def test_dry_run_reads_no_image(call, images, tmp_path, monkeypatch):
    monkeypatch.setattr(images_module.CheckedImages, '__getitem__', None)
    monkeypatch.setenv('WORLD_SIZE', '2')
    monkeypatch.setenv('RANK', '0')
    script = ['train', *MODEL, *QUICK, '--data-dir', images, '--output', tmp_path / 'out', '--dry-run']
    code, out, err = call(
        *script,
        '--experiment',
        'mine',
        '--warmup-epochs',
        '1',
        '--epochs',
        '5',
        '--lr-base',
        '0.1',
        '--lr-base-size',
        '64',
        '-b',
        '4',
        '--grad-accum-steps',
        '2',
        '--val-interval',
        '2',
    )
    assert code == 0 and not err and not (tmp_path / 'out').exists(), err
    lines = dict(
        line.split(maxsplit=1)
        for line in out.replace('global batch', 'global_batch').replace('learning rate', 'learning_rate').splitlines()
    )
    assert 'eva_deit_tiny, input 3×16×16' in lines['model']
    assert '24 images to train on, 13 to validate on, 3 classes' in lines['data']
    assert lines['global_batch'] == '16 = 4 per process × 2 processes × 2 accumulated'
    assert lines['learning_rate'].startswith('0.001 (as given), adamw, cosine')
    steps = '5 epochs of 1 updates, 5 in all'  # 12 images a process, 3 batches, 1 update of 2
    assert lines['steps'] == f'{steps}; validation after every 2 epochs, and after the last'
    assert lines['warm-up'] == '1 epochs from 1e-06, among the 5'
    assert lines['output'] == str(tmp_path / 'out' / 'mine')
    model = dry_run.check_run(parse_settings('train', [*map(str, script[1:]), '--num-classes', '3'])[0], 1).model
    assert lines['parameters'] == f'{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M'
    assert 'GiB of tensors' in lines['memory']


@pytest.mark.parametrize('flags', [[], ['--dataset', 'torch/fashion_mnist'], ['--dataset', 'wds/x']])
def test_dry_run_without_data(call, flags):
    code, out, err = call('train', *MODEL, *QUICK, *flags, '--dry-run')
    assert code == 0 and 'unknown without data' in out, err


def test_dry_run_of_a_pooling_by_attention(call):
    """Its latent is a parameter that a module is given."""
    code, out, err = call('train', *MODEL, 'global_pool=map', *QUICK, '--num-classes', '3', '--dry-run')
    assert code == 0 and 'multiply-adds' in out, err


@pytest.mark.parametrize('flag', ['--output', '--experiment'])
def test_a_folder_whose_name_is_no_text(call, tmp_path, flag):
    """TensorBoard cannot write there: the run would end in its midst."""
    name = tmp_path / 'a\udcff' if flag == '--output' else 'a\udcff'
    code, _, err = call('train', *MODEL, *QUICK, '--num-classes', '3', '--dry-run', flag, name)
    assert code == 2 and err.startswith(f'error: {flag[2:]} ') and 'not a path' in err and err.count('\n') == 1, err


@pytest.mark.parametrize('opt', ['muon', 'adamp', 'sgdp', 'novograd', 'kron'])
def test_dry_run_of_an_optimizer_that_asks_for_values(call, opt):
    code, out, err = call('train', *MODEL, *QUICK, '--num-classes', '3', '--dry-run', '--opt', opt)
    assert code == 0 and 'GiB of tensors' in out and f'without the state of {opt}, which asks' in out, err


SIZES = ['reg_tokens', 'embed_dim', 'depth', 'num_classes', 'img_size', 'partition_grid', 'window_size', 'mlp_ratio']


@pytest.mark.timeout(120)
@pytest.mark.parametrize('size', SIZES)
def test_a_size_that_cannot_be_is_a_line_in_every_program(call, images, tmp_path, size):
    """It names the size and its value: PyTorch's own words tell of bytes."""
    value = 10**9
    own, of_convert = size in ('num_classes', 'img_size'), size in ('partition_grid', 'window_size')
    model = ['--model', 'vit_tiny_patch16_224']
    given = [f'--{size.replace("_", "-")}', value] if own else ['--model-kwargs', f'{size}={value}']
    if of_convert:
        given = ['--convert', 'eva', '--convert-kwargs', f'{size}={value}']
    programs = dict(
        train=[*model, '--dry-run', *given],
        validate=[*model, '--pretrained', '--data-dir', images, *given],
        export=[tmp_path / 'a.onnx', *model, '--device', 'cpu', *given],
        benchmark=['--bench', 'infer', '--device', 'cpu', '--model', f'eva_deit_tiny:{size}={value}'],
    )
    for program, flags in programs.items():
        code, _, err = call(program, *flags)
        assert code == 2 and err.count('\n') == 1 and size in err and str(value) in err, (program, err)


def test_sizes_that_cannot_be_together_are_a_line(call):
    given = ['reg_tokens=1000000', 'embed_dim=1000000', 'num_heads=2', 'mlp_ratio=1000000']
    code, _, err = call('train', '--model', 'eva_deit_tiny', '--dry-run', '--model-kwargs', *given)
    assert code == 2 and err.count('\n') == 1 and 'mlp_ratio=1000000: ' in err and 'lower some of them' in err, err


def test_dry_run_tells_the_size_of_the_cache(call, images):
    flags = ['--data-dir', images, *words('--augment-device cuda --cache-device --dry-run')]
    code, out, err = call('train', *MODEL, *QUICK, *flags)
    assert code == 0 and 'GiB of images on each GPU' in out and 'multiply-adds' in out, err


@pytest.fixture
def both(call, images, tmp_path, monkeypatch):
    """both(flags) → the one line with which the dry run and the run both refuse the flags, without the network."""

    def no_network(*args, **kwargs):
        pytest.fail('a look into the network')

    monkeypatch.setattr(socket, 'getaddrinfo', no_network)

    def both(*flags):
        place = ['--data-dir', images, '--output', tmp_path / 'out', '--experiment', 'run']
        lines = []
        for dry in (['--dry-run'], []):
            code, out, err = call('train', *MODEL, *QUICK, *place, *flags, *dry)
            assert code == 2 and not out and err.startswith('error: ') and err.count('\n') == 1, out + err
            lines.append(err)
        assert lines[0] == lines[1]
        return lines[0]

    return both


def test_the_dry_run_refuses_what_the_run_refuses(both, train, tmp_path):
    assert 'no weights for eva_deit_tiny' in both('--pretrained')
    assert 'Hugging Face Hub' in both('--model', 'hf-hub:someone/model')
    run = train('out/run')
    assert 'already holds a run' in both()
    other = ['--experiment', 'other']
    for flag in ('--initial-checkpoint', '--pretrained-path'):
        for path, parts in write_bad_weights(tmp_path).items():
            for classes in ([], ['--num-classes', '3']):
                line = both(flag, path, *other, *classes)
                assert all(part in line for part in parts), line
        line = both(flag, run / 'last.safetensors', '--model-kwargs', 'depth=3', *other)
        assert 'last.safetensors: the file does not fit' in line
    write_images(tmp_path / 'two' / 'train', dict(apple=4, pear=4))
    write_images(tmp_path / 'two' / 'val', dict(apple=4, pear=4))
    two = ['--data-dir', tmp_path / 'two']
    assert '3 classes' in both('--initial-checkpoint', run / 'last.safetensors', *two, *other)
    assert '3 classes' in both('--resume', run / 'last.pth.tar', *two, *other)
    assert 'written with opt adamw' in both('--resume', run / 'last.pth.tar', '--opt', 'sgd', *other)
    (tmp_path / 'half.pth.tar').write_bytes((run / 'last.pth.tar').read_bytes()[:5000])
    assert 'half.pth.tar' in both('--resume', tmp_path / 'half.pth.tar', *other)


@pytest.mark.parametrize('flag', ['--train-interpolation', '--interpolation'])
def test_a_policy_that_pillow_cannot_carry_out(both, train, flag):
    for aa, operation in (('rand-m9-mstd0.5-inc1', 'Rotate'), ('original', 'Rotate'), ('augmix-m5', 'Rotate')):
        line = both(flag, 'lanczos', '--aa', aa)
        assert f'aa: Pillow has no {operation} with lanczos; give --train-interpolation bicubic' in line
    train('plain', flag, 'lanczos', '--epochs', '1')
    train('colours', flag, 'lanczos', '--epochs', '1', '--aa', '3a')
    train('other', '--interpolation', 'lanczos', '--train-interpolation', 'bicubic', '--epochs', '1', '--aa', 'rand-m9')


def test_a_metric_that_tells_nothing_apart_and_a_model_of_the_hub(both, call, images, monkeypatch):
    assert '--eval-metric top5 says nothing of 3 classes: it is always 100; give top1' in both('--eval-metric', 'top5')
    asked = []
    monkeypatch.setattr(hub, 'download_from_hf', lambda *name: asked.append(name))
    code, _, err = call('train', '--model', 'hf-hub:x/y', '--pretrained', '--data-dir', images, '--dry-run')
    assert code == 2 and 'hf-hub:x/y lies on the Hugging Face Hub, and a dry run fetches nothing' in err and not asked


def test_the_dry_run_takes_what_the_run_takes(train, call, images, tmp_path):
    run = train('run')
    place = ['--data-dir', images, '--output', tmp_path]
    for flags in (
        ['--resume', 'auto', '--experiment', 'run'],
        ['--resume', 'auto', '--experiment', 'run', '--opt', 'sgd', '--no-resume-opt'],
        ['--resume', 'auto', '--experiment', 'new'],
        ['--initial-checkpoint', run / 'last.safetensors'],
        ['--pretrained-path', run / 'last.safetensors', '--num-classes', '3'],
    ):
        for given in (place, place[2:]):
            code, out, err = call('train', *MODEL, *QUICK, *given, *flags, '--dry-run')
            assert code == 0 and 'parameters' in out and not err, err
    assert {path.name for path in tmp_path.iterdir()} == {'run'}


def estimate(*flags, processes=1):
    settings, _ = parse_settings('train', list(map(str, flags)))
    settings.run.dry_run = True
    return dry_run.step_memory(settings, dry_run.check_run(settings, processes))[0]


def test_memory_estimate_against_the_profiler(tmp_path):
    """A small case on the CPU: what PyTorch's allocator counted over two steps."""
    kwargs = dict(img_size=64, patch_size=8, embed_dim=64, depth=2, num_heads=2, num_classes=10)
    flags = [
        '--model',
        'eva_deit_tiny',
        '--model-kwargs',
        *(f'{key}={value}' for key, value in kwargs.items() if key != 'num_classes'),
        '--num-classes',
        10,
        '-b',
        16,
    ]
    guess = estimate(*flags)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model = timm.create_model('eva_deit_tiny', **kwargs)
        optimizer = torch.optim.AdamW(model.parameters())
        images, target = torch.randn(16, 3, 64, 64), torch.zeros(16, dtype=torch.long)
        for _ in range(2):
            torch.nn.functional.cross_entropy(model(images), target).backward()
            optimizer.step()
            optimizer.zero_grad()
    profile.export_chrome_trace(str(tmp_path / 'trace.json'))
    events = json.loads((tmp_path / 'trace.json').read_text())['traceEvents']
    measured = max(event['args']['Total Allocated'] for event in events if event.get('name') == '[memory]')
    assert guess == pytest.approx(measured, rel=0.1)
    assert estimate(*flags, '--model-ema') > guess
    assert estimate(*flags, processes=2) > guess
    assert estimate(*flags, '--grad-checkpointing') < 0.75 * guess


@pytest.mark.parametrize(
    'model',
    [
        'eva_deit_tiny',
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in (
                'deit_tiny_patch16_224',
                'eva_deit_small',
                'deit_small_patch16_224',
                'eva_pvt_v2_b3',
            )
        ),
    ],
)
def test_memory_estimate_against_the_gpu(model, record_property):
    """The peaks that benchmark.py read on an H100, eager in bfloat16, EVA's plain backend."""
    with open(ROOT / 'results' / 'memory_h100.csv', newline='') as file:
        row = next(
            row
            for row in csv.DictReader(file)
            if row['bench'] == 'train'
            and row['model'] == model
            and row['backend'] in ('plain', 'sdpa')
            and row['torchcompile'] == 'no'
        )
    guess = estimate('--model', model, '--num-classes', 1000, '-b', row['batch_size'], '--amp') / 2**20
    measured = float(row['peak_memory_mib'])
    record_property('figure', f'{model} {guess:,.0f} MiB, measured {measured:,.0f}, {guess / measured - 1:+.1%}')
    assert guess == pytest.approx(measured, rel=0.08)
