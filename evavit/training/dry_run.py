"""What can be known of a run before it starts: whether its settings fit together, and what they come to.

Models, optimizers and schedules are built on the meta device, where tensors have shapes and no content: no data is
read, no device is touched, no memory is filled.
"""

import importlib.util
import logging
import os
import weakref
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from timm.data import create_transform
from timm.data.distributed_sampler import RepeatAugSampler
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DistributedSampler
from torch.utils.flop_counter import FlopCounterMode

from evavit.errors import UserError, first_line

from . import build, data
from .distributed import check_device

log = logging.getLogger(__name__)

HUBS = ('hfds', 'hfids', 'tfds')  # kinds of data sets that are found by their name alone
PACKAGES = dict(wds='webdataset', hfds='datasets', hfids='datasets', tfds='tensorflow_datasets')
ROUND = 512  # bytes: PyTorch's CUDA allocator gives memory in multiples of it


@dataclass(frozen=True)
class Rehearsal:
    """A run's settings, checked against each other."""

    batch: build.BatchPlan
    model: torch.nn.Module  # on the meta device, or where it cannot be built there, on the CPU
    data_config: dict
    optimizer: torch.optim.Optimizer


def rehearse(settings, processes):
    """Build all that a run is made of except its data. Raises UserError for whatever does not fit together.

    Args:
        settings: of train.py.
        processes: number of processes of the run.
    """
    build.check_settings(settings)
    check_device(settings.device)
    batch = build.plan_batch(settings, processes)
    if settings.min_lr > batch.lr and settings.sched not in ('none', 'constant'):
        raise UserError(
            f'min_lr {settings.min_lr:g} is above the learning rate {batch.lr:g} ({batch.lr_rule}); lower --min-lr'
        )
    _check_names(settings)
    _check_paths(settings)
    _check_source(settings)
    classes = settings.num_classes or 2
    try:
        model = build.build_model(settings, classes, device='meta')
        data_config = data.resolve_input(settings, model)
        build.try_model(model, data_config['input_size'], settings)
    except UserError:
        # Either a fault of the settings or a model that needs real tensors: on the CPU the first shows again.
        model = build.build_model(settings, classes, device='cpu')
        data_config = data.resolve_input(settings, model)
        build.try_model(model, data_config['input_size'], settings)
    optimizer = build.build_optimizer(model, settings, batch.lr)
    build.build_schedule(optimizer, settings, updates_per_epoch=1000)
    if settings.num_classes:
        build.build_mixup(settings, settings.num_classes)
    build.build_task(model, SimpleNamespace(**{**vars(settings), 'model_ema': False}), torch.device('cpu'))
    _check_augmentation(settings, data_config)
    return Rehearsal(batch, model, data_config, optimizer)


def _check_names(settings):
    """Names that no file system takes; the rest of the checks can then ask for them."""
    for name in (
        'data_dir',
        'output',
        'experiment',
        'resume',
        'pretrained_path',
        'initial_checkpoint',
        'class_map',
        'train_split',
        'val_split',
    ):
        path = getattr(settings, name) or ''
        try:
            os.lstat(path or '.')
        except FileNotFoundError:  # what comes after a missing folder has not been looked at
            longest = max(len(os.fsencode(part)) for part in Path(path).parts)
            fault = 'a name of more than 255 bytes' if longest > 255 else None
        except (NotADirectoryError, PermissionError):
            continue
        except (OSError, ValueError) as error:
            fault = getattr(error, 'strerror', None) or first_line(error)
        else:
            continue
        if fault:
            raise UserError(f'{name} {path[:100]!r}: not a path ({fault})')


def _check_paths(settings):
    for name in ('pretrained_path', 'initial_checkpoint', 'resume'):
        path = getattr(settings, name)
        if path and not (name == 'resume' and path == 'auto') and not Path(path).is_file():
            raise UserError(f'--{name.replace("_", "-")} {path}: no such file')
    place = Path(settings.output, settings.experiment or '')
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise UserError(
            f'--output {Path(settings.output, settings.experiment or "")}: cannot be written, {place} is '
            f'{"not writable" if place.is_dir() else "no folder"}'
        )
    if settings.class_map:
        data.read_class_map(settings.class_map, settings.data_dir)


def _check_source(settings):
    """The data set's name, and that something is there; nothing of it is read."""
    prefix = data.check_name(settings.dataset)
    package = PACKAGES.get(prefix)
    if package and importlib.util.find_spec(package) is None:
        raise UserError(
            f'dataset {settings.dataset} needs the package {package}, which is not installed: pip install {package}'
        )
    if not settings.data_dir:
        if prefix not in HUBS and not settings.dry_run:
            raise UserError(
                'no data: give --data-dir DIR, a folder of images sorted into class folders'
                if not prefix
                else f'dataset {settings.dataset}: say with --data-dir where it lies'
            )
    elif '://' not in settings.data_dir and not settings.dataset_download and not Path(settings.data_dir).exists():
        raise UserError(f'{settings.data_dir}: no such folder (--data-dir)')
    if settings.aug_repeats and prefix in ('wds', 'hfids', 'tfds'):
        raise UserError(
            f'aug_repeats {settings.aug_repeats} needs a data set with an index; {settings.dataset} is '
            f'read as a stream: set --aug-repeats 0'
        )


def _check_augmentation(settings, data_config):
    try:
        create_transform(
            data_config['input_size'],
            is_training=True,
            no_aug=settings.no_aug,
            scale=settings.scale,
            ratio=settings.ratio,
            hflip=settings.hflip,
            vflip=settings.vflip,
            color_jitter=settings.color_jitter,
            auto_augment=settings.aa,
            interpolation=settings.train_interpolation or data_config['interpolation'],
            mean=data_config['mean'],
            std=data_config['std'],
            crop_pct=data_config['crop_pct'],
            use_prefetcher=True,
        )
    except (AssertionError, IndexError, KeyError, TypeError, ValueError) as error:
        raise UserError(f'augmentation (aa {settings.aa}): timm does not take it, {first_line(error)}') from error


def output_folder(settings, data_config):
    """Where the run writes: output/experiment, or a name of time, model and image size."""
    name = settings.experiment or (
        f'{datetime.now():%Y%m%d-%H%M%S}-{settings.model.replace("/", "_")}-{data_config["input_size"][-1]}'
    )
    return Path(settings.output, name)


def describe(settings, rehearsal):
    """The lines of --dry-run. The number of images needs a look at the data set's listing; no image is read."""
    batch, model, size = rehearsal.batch, rehearsal.model, rehearsal.data_config['input_size']
    lines = [('model', f'{settings.model}, input {"×".join(map(str, size))}')]
    images = None
    if settings.data_dir or data.check_name(settings.dataset) in HUBS:
        train_set, eval_set, names = data.open_training_sets(settings)
        classes = data.class_count(settings, names)
        if classes != model.num_classes:
            settings.num_classes = classes
            rehearsal = rehearse(settings, batch.processes)
            model = rehearsal.model
        images = len(train_set)
        lines.append(('data', f'{images:,} images to train on, {len(eval_set):,} to validate on, {classes} classes'))
    else:
        lines.append(
            (
                'data',
                'not given (--data-dir)'
                + (f', {settings.num_classes} classes' if settings.num_classes else ', counted as 2 classes'),
            )
        )
    parameters = sum(p.numel() for p in model.parameters())
    lines += [
        ('parameters', f'{parameters / 1e6:.2f} M'),
        ('multiply-adds', f'{multiply_adds(model, size) / 1e9:.3g} G for one image, forward'),
        ('global batch', str(batch).split('; lr ')[0].removeprefix('global batch ')),
        ('learning rate', f'{batch.lr:g} ({batch.lr_rule}), {settings.opt}, {settings.sched}'),
    ]
    _, epochs = build.build_schedule(rehearsal.optimizer, settings, updates_per_epoch=1)
    if images is None:
        lines.append(('steps', f'unknown without data; {epochs} epochs'))
    else:
        updates = _batches(train_set, settings, batch) // settings.grad_accum_steps
        if not updates:
            raise UserError(
                f"the training split has {images} images, less than one update's {batch.total}; lower -b "
                f'or --grad-accum-steps'
            )
        lines.append(('steps', f'{epochs} epochs of {updates:,} updates, {epochs * updates:,} in all'))
    warmup = (
        'none'
        if not settings.warmup_epochs or settings.sched == 'none'
        else (
            f'{settings.warmup_epochs} epochs from {settings.warmup_lr:g}, '
            f'{"before" if settings.warmup_prefix else "among"} the {settings.epochs}'
        )
    )
    lines += [
        ('warm-up', warmup),
        ('output', str(output_folder(settings, rehearsal.data_config))),
        (
            'memory',
            f'{step_memory(settings, rehearsal) / 2**30:.2f} GiB of tensors on each device at the peak of a '
            f'training step, by a simulated step{"" if settings.amp else " in float32"}; the CUDA context and '
            f"the allocator's gaps come on top",
        ),
    ]
    return [f'{name:<14} {text}' for name, text in lines]


def _batches(train_set, settings, batch):
    """Batches of one process in an epoch, as the loader's sampler counts them."""
    if isinstance(train_set, torch.utils.data.IterableDataset):
        return len(train_set) // (batch.per_process * batch.processes)
    if settings.aug_repeats:
        sampler = RepeatAugSampler(train_set, batch.processes, 0, num_repeats=settings.aug_repeats)
    else:
        sampler = DistributedSampler(train_set, batch.processes, 0)
    return len(sampler) // batch.per_process


def multiply_adds(model, input_size):
    """Multiply-adds of the forward pass of one image (torch.utils.flop_counter)."""
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as flops:
        model(torch.zeros(1, *input_size, device=device))
    model.train(training)
    return flops.get_total_flops() // 2


class LiveMemory(TorchDispatchMode):
    """Adds up the storages that live while it is on, and keeps the largest sum (`peak`, bytes)."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.known = {}

    def note(self, tensor):
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.known:
            size = -(-storage.nbytes() // ROUND) * ROUND
            self.known[key] = weakref.finalize(storage, self._drop, key, size)
            self.live += size
            self.peak = max(self.peak, self.live)

    def _drop(self, key, size):
        self.known.pop(key, None)
        self.live -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for item in tree_leaves(out):
            if isinstance(item, torch.Tensor):
                self.note(item)
        return out


def step_memory(settings, rehearsal):
    """Bytes of tensors at the peak of a training step on one device: weights, gradients, the optimizer's state, moving
    average, activations and what the kernels' inputs and outputs need in between.

    One step is run on fake tensors, which have shapes and no content, and the storages alive are added up. Autocast is
    the CPU's, whose choice of low precision is nearly CUDA's. What a kernel allocates inside itself is not seen.
    """
    size = (settings.batch_size, *rehearsal.data_config['input_size'])
    model = build.build_model(settings, rehearsal.model.num_classes, device='meta').train()
    mixing = build.mixes(settings)
    with ExitStack() as modes:
        modes.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        model = model.to_empty(device='cpu')
        weights = sum(t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers()))
        gradients = sum(p.untyped_storage().nbytes() for p in model.parameters() if p.requires_grad)
        optimizer = build.build_optimizer(model, settings, rehearsal.batch.lr)
        images = torch.empty(size)
        target = torch.empty(size[0], model.num_classes) if mixing else torch.zeros(size[0], dtype=torch.long)
        memory = LiveMemory()
        for tensor in (*model.parameters(), *model.buffers(), images, target):
            memory.note(tensor)
        with memory:
            with torch.autocast('cpu', getattr(torch, settings.amp_dtype), enabled=settings.amp):
                logits = model(images)
                loss = F.cross_entropy(logits, target)
            loss.backward()
            before = memory.live
            optimizer.step()
        state = max(0, memory.live - before)  # made by the first step, there from the beginning of the next
    copies = (weights if settings.model_ema else 0) + (gradients if settings.grad_accum_steps > 1 else 0)
    buckets = gradients if rehearsal.batch.processes > 1 else 0  # DistributedDataParallel sends copies
    return memory.peak + state + copies + buckets
