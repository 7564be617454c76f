"""Loaders: timm's, which start at any batch of an epoch and draw there what they would have drawn without a stop."""

import copy
from contextlib import suppress
from itertools import islice
from typing import Any, Dict, Iterator, Optional, Sequence, Tuple

import torch
from PIL import Image
from timm.data import IterableImageDataset, create_loader, resolve_data_config
from timm.data.loader import fast_collate
from timm.models import get_model_input_config

from evavit.arguments import PREPARATION, per_channel
from evavit.errors import LocalError, UserError, first_line
from evavit.training.config import AugmentConfig, BatchConfig, MachineConfig, ModelConfig
from evavit.training.data.augment import SeededErasing, repair_posterize
from evavit.training.data.device import DeviceLoader, Draws, Maker, Sample, cached, collate
from evavit.training.data.transforms import speed_up
from evavit.training.distributed import Draw, Process, seed_at, seed_sample
from evavit.training.signals import start_worker
from evavit.training.stalls import Watchdog

FILES, FILES_PER_WORKER = 32, 4  # that a process has open at least, and for each loading process: pipes and batches
Batches = Iterator[Tuple[torch.Tensor, torch.Tensor]]


class Around(torch.utils.data.Dataset):
    """A data set around another one, whose transform and length it has."""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    @property
    def transform(self) -> Any:
        return self.dataset.transform

    @transform.setter
    def transform(self, transform: Any) -> None:
        self.dataset.transform = transform

    def __len__(self) -> int:
        return len(self.dataset)


class SeededDataset(Around):
    """A data set asked by (index, place of the draw in the run): what is drawn depends on nothing that came before."""

    def __getitem__(self, draw: Tuple[int, Tuple[int, ...]]) -> Any:
        index, place = draw
        seed_sample(seed_at(*place))  # here, in the loading process
        return self.dataset[index]


class Numbered(Around):
    """A data set whose samples, of `Draws`, know their index."""

    def __getitem__(self, draw: Any) -> Any:
        sample, target = self.dataset[draw]
        return sample._replace(number=draw[0] if isinstance(draw, tuple) else draw), target


class SeededSampler(torch.utils.data.Sampler):
    """A sampler's indices from any place of the epoch to its last update's, each with the place of its draw in the run.

    That is the image's place among those of all processes: a global batch is augmented alike however many processes and
    workers share it.
    """

    def __init__(self, sampler: Any, seed: int, rank: int, world_size: int):
        self.sampler, self.seed, self.rank, self.world_size = sampler, seed, rank, world_size
        self.epoch, self.first = 0, 0
        self.last: Optional[int] = None

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Tuple[int, Tuple[int, ...]]]:
        for place, index in islice(enumerate(self.sampler), self.first, self.last):
            yield index, (self.seed, int(Draw.IMAGE), self.epoch, place * self.world_size + self.rank)


def _collate(samples: Sequence[Tuple[Any, int]]) -> Tuple[torch.Tensor, ...]:
    """timm's collation, or that of the device path. In a worker the batch is put in shared memory here: where that is
    full, the thread that else does so prints a traceback and loses the batch, for which the run then waits for ever."""
    batch = collate(samples) if isinstance(samples[0][0], Sample) else fast_collate(samples)
    if torch.utils.data.get_worker_info() is not None:
        try:
            for tensor in batch:
                tensor.share_memory_()
        except (OSError, RuntimeError) as error:
            raise LocalError(_no_shared_memory(first_line(error))) from error
    return batch


def _no_shared_memory(why: str) -> str:
    return (
        f'loading processes need more shared memory than /dev/shm gives ({why[:200]}); enlarge it (docker run '
        f'--shm-size=8g), or give --workers 0'
    )


def _check_workers(dataset: Any, workers: int) -> None:
    """LocalError where as many loading processes cannot hand over what they read."""
    with suppress(ImportError):  # of a system without such limits
        import resource

        needed, (limit, _) = FILES + FILES_PER_WORKER * workers, resource.getrlimit(resource.RLIMIT_NOFILE)
        if workers and limit != resource.RLIM_INFINITY and limit < needed:
            raise LocalError(
                f'--workers {workers} needs at least {needed} open files, and the system allows {limit}; raise that '
                f'(ulimit -n {max(1024, 2 * needed)}), or give --workers 0'
            )
    bad = getattr(dataset, 'bad', None)  # only a data set of `open_dataset` shares a count between processes
    if workers and bad is not None and bad.unshared:
        raise LocalError(_no_shared_memory(bad.unshared))


def _on_gpu(machine: MachineConfig) -> bool:
    """Whether images are augmented there."""
    if machine.cache_device and machine.augment_device == 'cpu':
        raise UserError('cache_device does nothing without augment_device cuda; add --augment-device cuda')
    return machine.augment_device != 'cpu'


def _read_for(dataset: Any, machine: MachineConfig, device: torch.device, watchdog: Watchdog) -> Tuple[Any, Any]:
    """What is loaded for the device path, with files as they are or from a cache on the device, and that cache."""
    if machine.augment_device == 'cuda' != device.type:  # tests have the same operators work on CPU tensors
        raise UserError(f'--augment-device cuda needs a GPU, and this run is on {device}; leave it out')
    if not hasattr(dataset, 'jpeg_as'):  # it goes through another one again and again
        outer = copy.copy(dataset)
        outer.dataset, store = _read_for(dataset.dataset, machine, device, watchdog)
        return outer, store
    dataset.jpeg_as = 'file'
    return cached(dataset, device, machine.workers, watchdog) if machine.cache_device else (dataset, None)


def _innermost(dataset: Any) -> Any:
    """The data set that reads, of one that may be around it."""
    while isinstance(dataset, Around):
        dataset = dataset.dataset
    return dataset


def _on_device(
    loader: Any, read: Any, store: Any, opened: Any, data_config: Dict[str, Any], device: torch.device, **rest: Any
) -> DeviceLoader:
    """The loader of the device path, made of timm's: only what is done to an image changes."""
    loaded, erasing = loader.loader, rest.pop('erasing', {})
    draws = Draws(loaded.dataset.transform, data_config['input_size'], erasing)
    loaded.dataset.transform = draws
    maker = Maker(draws, data_config, device, erasing.get('mode', 'const'), _innermost(read).replace, store)
    return DeviceLoader(loaded, opened, maker, **rest)


def resolve_input(config: ModelConfig, model: torch.nn.Module) -> Dict[str, Any]:
    """timm's data settings (input size, mean, std, crop, interpolation) for the model as it was built."""
    names = ('in_chans', 'img_size', 'input_size', *PREPARATION)
    given = {name: getattr(config, name) for name in names}
    if given['input_size'] is None and given['img_size'] is None:
        given['input_size'] = get_model_input_config(model)['input_size']
    channels = given['input_size'][0] if given['input_size'] else given['in_chans'] or 3
    for key in ('mean', 'std'):
        if given[key] is not None and len(given[key]) not in (1, channels):
            raise UserError(
                f'{key} {given[key]} has {len(given[key])} numbers for images of {channels} channels; give one for '
                f'each, or one for all'
            )
    resolved = resolve_data_config(given, model=model)
    height, width = resolved['input_size'][-2:]
    if Image.MAX_IMAGE_PIXELS and height * width > Image.MAX_IMAGE_PIXELS:
        raise UserError(
            f'images of {height} × {width} are larger than any that is read ({Image.MAX_IMAGE_PIXELS:,} pixels); lower '
            f'--img-size, or img_size in --model-kwargs'
        )
    for key in ('mean', 'std'):
        resolved[key] = per_channel(resolved[key], channels)
    return resolved


def train_loader(
    dataset: Any,
    augment: AugmentConfig,
    data_config: Dict[str, Any],
    *,
    batch_size: int,
    machine: MachineConfig,
    seed: int,
    process: Process,
) -> Any:
    """Batches of augmented images on the process's device, for `epoch_batches` to start an epoch of.

    Args:
        dataset: From `open_dataset`.
        augment: What is done to the images.
        data_config: From `resolve_input`.
        batch_size: Images of a batch.
        machine: Loading processes and memory.
        seed: The run's.
        process: This process.
    """
    device = process.device
    _check_workers(dataset, machine.workers)
    opened, store, on_device = dataset, None, _on_gpu(machine)
    if on_device:
        dataset, store = _read_for(dataset, machine, device, process.watchdog)
    read = dataset
    if not isinstance(dataset, IterableImageDataset):
        dataset = Numbered(SeededDataset(dataset)) if on_device else SeededDataset(dataset)
    try:
        loader = create_loader(
            dataset,
            input_size=data_config['input_size'],
            batch_size=batch_size,
            is_training=True,
            no_aug=augment.no_aug,
            re_prob=augment.reprob,
            re_mode=augment.remode,
            re_count=augment.recount,
            num_aug_repeats=augment.aug_repeats,
            num_workers=machine.workers,
            distributed=True,
            pin_memory=machine.pin_mem and device.type == 'cuda' and not on_device,
            device=device,
            persistent_workers=False,
            collate_fn=_collate,
            worker_seeding=start_worker,  # type: ignore[arg-type]  # timm takes a function too
            **transform_arguments(augment, data_config),
        )
    except (AssertionError, IndexError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f'augmentation (aa {augment.aa}, aug_repeats {augment.aug_repeats}): timm does not take it, '
            f'{first_line(error)}'
        ) from error
    if on_device:
        erasing = dict(probability=augment.reprob, mode=augment.remode, max_count=augment.recount)
        erasing = erasing if augment.reprob and not augment.no_aug else {}
        rest: Dict[str, Any] = dict(erasing=erasing, seed=seed, rank=process.rank)
        loader = _on_device(loader, read, store, opened, data_config, device, **rest)
    else:
        repair_posterize(dataset.transform)
        _innermost(dataset).jpeg_as = 'tensor' if speed_up(dataset.transform) else 'image'
    if not isinstance(dataset, IterableImageDataset):
        loader.batch_sampler.sampler = SeededSampler(loader.sampler, seed, process.rank, process.world_size)
    if loader.random_erasing is not None and not on_device:
        loader.random_erasing = SeededErasing(loader.random_erasing, seed, process)
    return loader


def transform_arguments(augment: AugmentConfig, data_config: Dict[str, Any]) -> Dict[str, Any]:
    """What timm's `create_transform` and `create_loader` both take."""
    return dict(
        scale=augment.scale,
        ratio=augment.ratio,
        hflip=augment.hflip,
        vflip=augment.vflip,
        color_jitter=augment.color_jitter,
        auto_augment=augment.aa,
        interpolation=augment.train_interpolation or data_config['interpolation'],
        mean=data_config['mean'],
        std=data_config['std'],
        crop_pct=data_config['crop_pct'],
    )


def eval_loader(
    dataset: Any,
    data_config: Dict[str, Any],
    *,
    batch_size: int,
    machine: MachineConfig,
    device: torch.device,
    watchdog: Optional[Watchdog] = None,
) -> Any:
    """Batches of images on the device, in order; the sampler knows which of them only make the processes even. The
    watchdog looks at what is read to a cache before them."""
    _check_workers(dataset, machine.workers)
    on_device = _on_gpu(machine)
    read, store = _read_for(dataset, machine, device, watchdog or Watchdog()) if on_device else (dataset, None)
    given: Any = Numbered(read) if on_device and not isinstance(read, IterableImageDataset) else read
    loader = create_loader(
        given,
        input_size=data_config['input_size'],
        batch_size=batch_size,
        is_training=False,
        collate_fn=_collate,
        worker_seeding=start_worker,  # type: ignore[arg-type]  # timm takes a function too
        interpolation=data_config['interpolation'],
        mean=data_config['mean'],
        std=data_config['std'],
        crop_pct=data_config['crop_pct'],
        crop_mode=data_config['crop_mode'],
        num_workers=machine.workers if store is None else 0,  # an image that is there is neither read nor drawn for
        distributed=True,
        pin_memory=machine.pin_mem and device.type == 'cuda' and not on_device,
        device=device,
        persistent_workers=False,
    )
    return _on_device(loader, read, store, dataset, data_config, device) if on_device else loader


def epoch_batches(
    loader: Any, batch: BatchConfig, *, seed: int, process: Process, epoch: int, first: int = 0
) -> Batches:
    """Iterator over the batches of an epoch from number `first` on.

    The order depends on seed and epoch alone, not on the number of processes. A data set that is a stream is read again
    from the epoch's start, up to the batch; its augmentation depends on the number of workers too.
    """
    order, streams = seed * 100_003 + epoch, isinstance(loader.dataset, IterableImageDataset)
    process.seed(seed, Draw.EPOCH, epoch)  # the workers' own seeds, which a stream draws from
    if loader.random_erasing is not None:
        loader.random_erasing.epoch, loader.random_erasing.batch = epoch, 0 if streams else first
    if streams:
        loader.dataset.set_epoch(order)
        return islice(iter(loader), first, None)
    loader.sampler.set_epoch(order)
    draws = loader.batch_sampler.sampler
    # Not the batches after the last update: workers would read some of them, and count the bad images there, or not.
    last = len(loader) // batch.grad_accum_steps * batch.grad_accum_steps
    draws.epoch, draws.first, draws.last = epoch, first * batch.batch_size, last * batch.batch_size
    return iter(loader)


def updates_per_epoch(loader: Any, grad_accum_steps: int, images_per_update: int) -> int:
    """Whole updates in an epoch; what is left at its end is not trained on in that epoch."""
    updates = len(loader) // grad_accum_steps
    if updates == 0:
        raise UserError(
            f"the training split has {len(loader.dataset)} images, less than one update's {images_per_update}; "
            f'lower -b or --grad-accum-steps, and --global-batch-size where a recipe sets it'
        )
    return updates
