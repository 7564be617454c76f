"""Runs of train.py and validate.py for tests: tiny image folders, a tiny model, scripts as functions or commands."""

import csv
import importlib
import importlib.util
import io
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import warnings
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
from PIL import Image

from evavit.errors import run_script
from evavit.training.signals import SignalHandler

ROOT = Path(__file__).parents[1]
CLASSES = ('apple', 'pear', 'plum')


def words(flags):
    """The words of a command line without quotes."""
    return flags.split()


def write_images(folder, counts, side=16):
    """counts: {class: images}. Each class has a colour of its own, each image its own noise."""
    rng = np.random.default_rng(0)
    for index, (name, count) in enumerate(counts.items()):
        target = Path(folder, name)
        target.mkdir(parents=True)
        for number in range(count):
            pixels = rng.integers(0, 120, (side, side, 3))
            pixels[..., index % 3] += 120
            Image.fromarray(pixels.astype(np.uint8)).save(target / f'{number}.png')


def write_shards(folder, images, sizes):
    """WebDataset shards of so many of the images, (path, label) each. Returns the name of their split."""
    images = iter(images)
    Path(folder).mkdir()
    for number, size in enumerate(sizes):
        with tarfile.open(Path(folder, f'x-{number:04d}.tar'), 'w') as archive:
            for key, (path, label) in enumerate(islice(images, size)):
                for ending, content in (('png', path.read_bytes()), ('cls', str(label).encode())):
                    member = tarfile.TarInfo(f'{key}.{ending}')
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    return f'x-{{0000..{len(sizes) - 1:04d}}}.tar|{sum(sizes)}'


KWARGS = dict(img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, window_size=2, partition_grid=2)
SOFTMAX = {key: value for key, value in KWARGS.items() if key not in ('window_size', 'partition_grid')}
MODEL = ['--model', 'eva_deit_tiny', '--model-kwargs', *(f'{key}={value}' for key, value in KWARGS.items())]
QUICK = words('-b 4 --epochs 2 --warmup-epochs 0 --lr 1e-3 --workers 0 --device cpu --log-interval 1')
DRAWN = words(  # every generator draws
    '--aa rand-m9-mstd0.5-inc1 --mixup 0.8 --cutmix 1 --reprob 0.25 --drop-path 0.2 --workers 2 --model-ema '
    '--model-ema-decay 0.9'
)
PLAIN = ['--no-aug', '--hflip', '0', '--color-jitter', '0', '--drop-path', '0']  # only the images' order is drawn


PATIENCE = float(os.environ.get('EVAVIT_PATIENCE', 1))  # times the waiting that takes a run to hang, see `make soak`


class Code:
    """What a pickle runs on loading."""

    def __reduce__(self):
        return print, ('this must not run',)


def write_bad_weights(folder):
    """Files that are no weights: {path: words of the line that says so}."""
    whole = {ending: Path(folder, f'whole.{ending}') for ending in ('pth', 'safetensors')}
    state = {'weight': torch.randn(64, 64)}
    torch.save(state, whole['pth'])
    safetensors.torch.save_file(state, whole['safetensors'])
    files = {}

    def bad(name, content, *words):
        path = Path(folder, name)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path, _use_new_zipfile_serialization='old' not in name)
        files[path] = (name, *words)

    for ending, file in whole.items():
        content = file.read_bytes()
        bad(f'half.{ending}', content[: len(content) // 2], 'cut short')
        bad(f'empty.{ending}', b'', 'empty')
        bad(f'page.{ending}', b'<html>not found</html>', 'not' if ending == 'pth' else 'too large')
    bad('code.pth', dict(state_dict=dict(weight=Code())), 'more than tensors (builtins.print)', 'safetensors')
    bad('old_code.pth', dict(state_dict=dict(weight=Code())), 'more than tensors', 'safetensors')
    bad('list.pth', [1, 2], 'no dictionary')
    for name, value, words in (
        ('sparse', torch.eye(64).to_sparse(), 'sparse'),
        ('meta', torch.empty(64, 64, device='meta'), 'without content'),
        ('eight_bits', torch.eye(64).to(torch.float8_e4m3fn), 'float8_e4m3fn'),
        ('expanded', torch.zeros(1).expand(10**9, 10**9), 'more than the file has'),
    ):
        bad(f'{name}.pth', dict(weight=value), words)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of what is a prototype, and what is going to go
        nested = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])
        bad('nested.pth', dict(weight=nested), 'nested')
        bad('quantized.pth', dict(weight=torch.quantize_per_tensor(torch.eye(64), 0.1, 0, torch.quint8)), 'quint8')
    for file in whole.values():
        file.unlink()
    return files


def load_script(name):
    """The module of a script's program."""
    return importlib.import_module(f'evavit.cli.{name}')


def unwritable(kind):
    """The number of a stream that takes nothing: 'full', a disk without room, or 'broken', a pipe that nobody reads."""
    if kind == 'full':
        return os.open('/dev/full', os.O_WRONLY)
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def command_line(script, *flags, processes=1, launcher_flags=(), variables=()):
    """The words and the environment that start a script as a user does, with torchrun for several processes.

    A script is a name of ours, or the path of another program; `variables` are added to the environment.
    """
    launcher = [sys.executable]
    if processes > 1:
        launcher += ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(processes), *launcher_flags]
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'TORCH_CPP_LOG_LEVEL': 'ERROR', 'PYTHONUNBUFFERED': '1'}
    environment.update({name: str(value) for name, value in dict(variables).items()})
    program = script if isinstance(script, Path) else ROOT / f'{script}.py'
    return [*launcher, str(program), *map(str, flags)], environment


def command(script, *flags, **launch):
    """Run a script to its end; see `command_line`."""
    words, environment = command_line(script, *flags, **launch)
    return subprocess.run(words, capture_output=True, text=True, env=environment, timeout=240 * PATIENCE)


def wait_for(path, process, seconds=120):
    """Wait until a started run has written the file."""
    end = time.monotonic() + seconds * PATIENCE
    while not path.exists():
        assert process.poll() is None and time.monotonic() < end, f'{path} did not appear'
        time.sleep(0.02)


def start(*words, session=True, **launch):
    """A run under way, by default as a process group of its own; see `command_line`."""
    line, environment = command_line(*words, **launch)
    return subprocess.Popen(
        line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=session
    )


def ranks(count):
    """The variables of `count` processes of one run, as another launcher than torchrun gives them."""
    with socket.socket() as place:
        place.bind(('127.0.0.1', 0))
        port = place.getsockname()[1]
    about = dict(WORLD_SIZE=count, MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
    return [dict(RANK=rank, LOCAL_RANK=rank, **about) for rank in range(count)]


def _rank(main, flags, variables, folder):
    os.environ.update({name: str(value) for name, value in variables.items()})
    for number, name in ((1, 'stdout'), (2, 'stderr')):
        os.dup2(os.open(Path(folder, f'{name}{variables["RANK"]}'), os.O_WRONLY | os.O_CREAT), number)
        setattr(sys, name, os.fdopen(number, 'w', buffering=1, closefd=False))
    sys.exit(run_script(main, list(map(str, flags))))


def together(main, *flags, processes=2):
    """Run a program's main function in several processes that are one run, to its end: exit codes and what they wrote.

    They are forks, which need not import torch again; runs with torchrun are in cli/test_distributed.py.
    """
    if dist.is_initialized():  # a script that another test called left it, and forks would take it for theirs
        dist.destroy_process_group()
    fork = multiprocessing.get_context('fork')
    with tempfile.TemporaryDirectory() as folder:
        jobs = [fork.Process(target=_rank, args=(main, flags, variables, folder)) for variables in ranks(processes)]
        for job in jobs:
            job.start()
        for job in jobs:
            job.join(120 * PATIENCE)
            job.kill()  # if it hangs, which its exit code shows
            job.join()
        told = {
            name: ''.join(Path(folder, f'{name}{rank}').read_text() for rank in range(processes))
            for name in ('stdout', 'stderr')
        }
    return SimpleNamespace(returncodes=[job.exitcode for job in jobs], **told)


def signal_at(monkeypatch, moments, number=signal.SIGTERM):
    """Send this process a signal after each of these updates of the run."""
    poll = SignalHandler.poll

    def signalled(handler, update, last):
        if update in moments:
            os.kill(os.getpid(), number)
        return poll(handler, update, last)

    monkeypatch.setattr(SignalHandler, 'poll', signalled)


def rows(folder):
    """Rows of summary.csv, less the columns that tell of time."""
    timed = ('train_images_per_second', 'train_data_wait')
    with open(folder / 'summary.csv', newline='') as file:
        return [{key: value for key, value in row.items() if key not in timed} for row in csv.DictReader(file)]


def assert_same_run(a, b):
    """Two finished runs agree bit for bit: weights, average, optimizer, ranking, summary, curves, exported weights.

    Returns how many numbers were compared.
    """
    compared = 0
    assert rows(a) == rows(b)
    for name in ('last.pth.tar', 'model_best.pth.tar'):
        one, other = (torch.load(folder / name, weights_only=False) for folder in (a, b))
        assert one['epoch'] == other['epoch'] and one['metric'] == other['metric']
        for kind in ('state_dict', 'state_dict_ema'):
            assert one[kind].keys() == other[kind].keys()
            for key, value in one[kind].items():
                assert torch.equal(value, other[kind][key]), f'{name}: {key}'
                compared += value.numel()
        assert one['optimizer']['param_groups'] == other['optimizer']['param_groups']
        for key, state in one['optimizer']['state'].items():
            for part, value in state.items():
                assert torch.equal(value, other['optimizer']['state'][key][part]), f'{name}: {part} {key}'
                compared += value.numel()
        for checkpoint in (one, other):
            for timed in ('seconds', 'waited'):
                del checkpoint['saver']['position'][timed]
        assert one['saver'] == other['saver']
    for name in ('last.safetensors', 'model_best.safetensors'):
        one, other = weights(a / name), weights(b / name)
        assert all(torch.equal(one[key], other[key]) for key in one)
    for name in ('train/loss', 'train/lr', 'train/grad_norm', 'eval/loss', 'eval/top1'):
        one, other = scalars(a, name), scalars(b, name)
        assert one == other, name
        compared += len(one)
    return compared


def weights(path):
    return safetensors.torch.load_file(str(path))


def scalars(folder, name):
    """{step: value} of a TensorBoard scalar, which has one point for each step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for path in Path(folder).glob('events.out.tfevents.*'):
        # TensorBoard reads them in the order of their names, and those of one second and process end in 9, 10, …
        *name_of, number = path.name.split('.')
        path.rename(path.with_name('.'.join((*name_of, number.zfill(6)))))
    events = EventAccumulator(str(folder))
    events.Reload()
    points = events.Scalars(name)
    values = {event.step: event.value for event in points}
    assert len(values) == len(points), f'{name} has two points for a step: {[event.step for event in points]}'
    return values
