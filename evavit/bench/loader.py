"""How many images the loader gives a second, alone and beside the training step (`benchmark.py --bench data`)."""

import argparse
import itertools
import os
import statistics
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch
from torch.utils.data import DataLoader

from evavit.arguments import Parser
from evavit.errors import UserError
from evavit.training import build, checks, data, loop
from evavit.training.compilation import Compilation, choose_compilation
from evavit.training.config import parse_settings
from evavit.training.distributed import start_process

from .models import describe
from .results import ORIGIN, Row, check_writable, origin, read_rows, store_rows

__all__ = ['Repeated', 'main', 'measure', 'parse']

Step = Callable[[torch.Tensor, torch.Tensor], None]

LEAST = 500_000  # images that a pass can draw: more than 16 processes read in half a minute

COLUMNS = (
    'bench',
    'model',
    'dataset',
    'images',
    'batch_size',
    'workers',
    'cpus',
    'augment_device',
    'aa',
    'amp',
    'img_size',
    'torchcompile',
    'img_per_s',
    'cpu_ms_per_img',
)
ADDED = dict(img_size='', torchcompile='')  # columns that older files lack
STEP_COLUMNS = ('step_img_per_s', 'step_share', 'both_img_per_s', 'wait_share')  # without --loader-only


def parse(argv: Sequence[str]) -> Tuple[argparse.Namespace, Any]:
    """The measurement's own flags, and the settings: of train.py, which say what is loaded and how."""
    parser = Parser(prog='benchmark.py --bench data', add_help=False)
    parser.add_argument('--workers-list', type=int, nargs='+', help='numbers of loader processes to measure')
    parser.add_argument(
        '--augment-devices', nargs='+', choices=('cpu', 'cuda'), help='what decodes and augments: both can be measured'
    )
    parser.add_argument('--seconds', type=float, default=10.0, help='length of each of the repeats')
    parser.add_argument('--repeats', type=int, default=3, help='rates are the medians of so many passes')
    parser.add_argument('--loader-only', action='store_true', help='leave the training step out')
    parser.add_argument('--results-file', help='CSV file to append the rows to')
    own, rest = parser.parse_known_args(argv)
    least = dict(seconds=(0.01, [own.seconds]), repeats=(1, [own.repeats]), workers_list=(0, own.workers_list or []))
    for flag, (bound, values) in least.items():
        if min(values, default=bound) < bound:
            raise UserError(f'--{flag.replace("_", "-")} {min(values)}: give at least {bound}')
    return own, parse_settings('train', rest)[0]


def main(argv: Sequence[str]) -> None:
    """Print a row for each place of augmentation and number of workers, and add it to the results file."""
    own, settings = parse(argv)
    machine = settings.machine
    places, cache = own.augment_devices or [machine.augment_device], machine.cache_device
    machine.augment_device = 'cuda' if 'cuda' in places else 'cpu'
    checks.check_settings(settings)
    columns = [*COLUMNS, *(() if own.loader_only else STEP_COLUMNS), *ORIGIN]
    if own.results_file:  # before the timing
        path = Path(own.results_file)
        check_writable(path)
        read_rows(path, columns, ADDED)
    process = start_process(settings.machine.device, alone='benchmark.py')
    if own.augment_devices and 'cuda' in places and process.device.type != 'cuda':  # before anything is measured
        raise UserError(f'--augment-devices cuda needs a GPU, and this run is on {process.device}; leave it out')
    for place, workers in itertools.product(places, own.workers_list or [machine.workers]):
        machine.augment_device, machine.workers, machine.cache_device = place, workers, cache and place != 'cpu'
        row = measure(settings, process, own.seconds, own.repeats, own.loader_only) | origin(process.device)
        print('  '.join(f'{key} {value}' for key, value in row.items()), flush=True)
        if own.results_file:
            store_rows(path, [row], columns, key=columns, added=ADDED)  # no row but its own copy is replaced
    torch.distributed.destroy_process_group()


def measure(settings: Any, process: Any, seconds: float, repeats: int, loader_only: bool = False) -> Row:
    """Measure the loader, alone and beside the training step.

    Args:
        settings: Of train.py.
        process: As `start_process` returns it.
        seconds: Length of each pass.
        repeats: Passes; rates are the medians.
        loader_only: Leave the training step out, and its columns.

    Returns:
        A row. `img_per_s` is the loader's rate alone, its batches on the device and normalised. `step_img_per_s` is the
        rate of the training step on one fixed batch. `step_share` is the step's rate in percent of the loader's: above
        100 the loader is the slower one. `both_img_per_s` is the rate of training from the loader, `wait_share` the
        percentage of that time in which the loop waits for a batch.
    """
    machine, batch_size, seed = settings.machine, settings.batch.batch_size, settings.run.seed
    channels = checks.image_channels(settings.model)
    opened, _, names = data.open_training_sets(settings.data, in_chans=channels, batch_size=batch_size, seed=seed)
    images = len(opened)
    classes = data.class_count(settings.data, settings.model.num_classes, names)
    model = build.build_model(settings.model, classes).to(process.device)
    model = model.to(memory_format=torch.channels_last) if machine.channels_last else model
    config = data.resolve_input(settings.model, model)
    train_set: Any = opened if isinstance(opened, torch.utils.data.IterableDataset) else Repeated(opened, LEAST)
    loader = data.train_loader(
        train_set, settings.augment, config, batch_size=batch_size, machine=machine, seed=seed, process=process
    )
    step, label = None, ''
    if not loader_only:
        compilation = choose_compilation(machine.torchcompile, machine.torchcompile_mode, process.device)
        step, label = _training_step(model, settings, process, compilation), compilation.label
    rates: Dict[str, List[float]] = {name: [] for name in ('alone', 'cpu', 'both', 'wait', 'step')}
    for epoch in range(repeats):
        rate, _, cpu = _pass(loader, settings, process, seconds, epoch)
        rates['alone'].append(rate)
        rates['cpu'].append(cpu)
        if step:
            rate, wait, _ = _pass(loader, settings, process, seconds, epoch, step)
            rates['both'].append(rate)
            rates['wait'].append(wait)
            rates['step'].append(_step_rate(step, settings, config, model, process, seconds / 3))
    median = {name: statistics.median(values) for name, values in rates.items() if values}
    asked = settings.model
    kwargs = {**(asked.model_kwargs or {}), **({'convert': asked.convert} if asked.convert else {})}
    kwargs |= asked.convert_kwargs or {}
    row: Row = {
        'bench': 'data',
        'model': describe(settings.model.model, kwargs),
        'dataset': settings.data.dataset or 'folder',
        'images': images,
        'batch_size': batch_size,
        'workers': machine.workers,
        'cpus': len(os.sched_getaffinity(0)),
        'augment_device': machine.augment_device + (', cached' if machine.cache_device else ''),
        'aa': settings.augment.aa or '',
        'amp': machine.amp_dtype if machine.amp else 'float32',
        'img_size': 'x'.join(dict.fromkeys(map(str, config['input_size'][1:]))),  # one number where it is square
        'torchcompile': label,
        'img_per_s': round(median['alone'], 1),
        # Without workers all of the work is this process's: its processor time is the same on a machine that is shared.
        'cpu_ms_per_img': '' if machine.workers else round(median['cpu'], 2),
    }
    if step:
        row |= {
            'step_img_per_s': round(median['step'], 1),
            'step_share': round(100 * median['step'] / median['alone'], 1),
            'both_img_per_s': round(median['both'], 1),
            'wait_share': round(100 * median['wait'], 1),
        }
    return row


def _training_step(model: Any, settings: Any, process: Any, compilation: Compilation) -> Step:
    optimizer = build.build_optimizer(model, settings.optim, 1e-4)
    machine = settings.machine
    mixup = build.build_mixup(settings.loss, model.num_classes)
    task = build.build_task(model.train(), settings.loss, process.device, settings.ema)
    build.compile_and_distribute(task, compilation, process)

    def step(images: torch.Tensor, target: torch.Tensor) -> None:
        if mixup is not None:
            images, target = mixup(images, target)
        with compilation.step():
            with loop.autocast(machine, process.device):
                loss = task(images, target)['loss']
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


class _OneBehind:
    """Lets the host wait for the step before the one that it has just launched, as the training loop does.

    It waits for this thread's stream alone: batches are made on others.
    """

    def __init__(self, process: Any):
        self.device: Any = process.device
        self.before: Any = None

    def wait(self) -> None:
        if self.device.type == 'cuda':
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self.device))
            if self.before is not None:
                self.before.synchronize()
            self.before = event

    def finish(self) -> None:
        if self.device.type == 'cuda':
            torch.cuda.current_stream(self.device).synchronize()


def _pass(
    loader: DataLoader, settings: Any, process: Any, seconds: float, epoch: int, step: Optional[Step] = None
) -> Tuple[float, float, float]:
    """(images a second, share of the time spent waiting, milliseconds of processor time an image) over about `seconds`.

    As many batches as the workers hold ready are not counted, since they were made before the clock ran.
    """
    held, steps = 2 * settings.machine.workers + 4, _OneBehind(process)
    done, waited, cpu = 0, 0.0, 0.0
    start: Optional[float] = None
    asked = time.perf_counter()
    batches = data.epoch_batches(loader, settings.batch, seed=settings.run.seed, process=process, epoch=epoch)
    for count, (images, target) in enumerate(batches):
        now = time.perf_counter()
        if start is not None:
            waited += now - asked
            done += len(images)
        if step is not None:
            step(images, target)
            steps.wait()
        if start is None and count >= held:
            steps.finish()
        if start is None and count >= held:
            start, cpu = time.perf_counter(), time.process_time()
        asked = time.perf_counter()
        if start is not None and asked - start > seconds:
            break
    steps.finish()
    if start is None:
        raise UserError(f'the loader gave fewer than {held + 1} batches: lower --workers or -b')
    asked = time.perf_counter()
    return done / (asked - start), waited / (asked - start), 1e3 * (time.process_time() - cpu) / max(1, done)


class Repeated(data.Around):
    """A small data set gone through again and again, so that one start of the workers serves a whole pass."""

    def __init__(self, dataset: Any, least: int) -> None:
        super().__init__(dataset)
        self.length = max(len(dataset), least)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index % len(self.dataset)]


def _step_rate(step: Step, settings: Any, config: Dict[str, Any], model: Any, process: Any, seconds: float) -> float:
    """Images a second of the training step on one fixed batch."""
    images = torch.randn(settings.batch.batch_size, *config['input_size'], device=process.device)
    target = torch.randint(model.num_classes, (settings.batch.batch_size,), device=process.device)
    steps = _OneBehind(process)
    for _ in range(3):
        step(images, target)
    steps.finish()
    start, done = time.perf_counter(), 0
    while done < 2 or time.perf_counter() - start < seconds:
        step(images.clone(), target)
        steps.wait()
        done += 1
    steps.finish()
    return done * len(images) / (time.perf_counter() - start)
