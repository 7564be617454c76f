"""Data sets and loaders: timm's, with the checks that timm leaves out.

A folder without images of a class, or a validation folder with classes that the training folder lacks, would change the
labels without a word: here each is a UserError (`folders`). An image that cannot be read is counted (`images`).
"""

import gzip
import logging
import os
import shutil
import signal
import tarfile
import threading
from itertools import islice
from pathlib import Path

import torch
from PIL import Image
from timm.data import (
    ImageDataset,
    IterableImageDataset,
    auto_augment,
    create_dataset,
    create_loader,
    resolve_data_config,
)
from timm.data.readers.class_map import load_class_map
from timm.models import get_model_input_config

from evavit.errors import UserError, first_line
from evavit.training.data.folders import SPLIT_NAMES, ClassFolders, find_split
from evavit.training.data.images import CheckedImages, CheckedStream
from evavit.training.config import nearest
from evavit.training.distributed import Draw, seed_at, seed_sample
from evavit.training.build import image_channels

log = logging.getLogger(__name__)

TORCH_DATASETS = (
    "cifar10", "cifar100", "mnist", "kmnist", "fashion_mnist", "qmnist", "imagenet", "inaturalist", "places365",
    "image_folder")


class SeededDataset(torch.utils.data.Dataset):
    """A data set asked by (index, seed of the draw): what is drawn for an image depends on nothing that came before."""

    def __init__(self, dataset):
        self.dataset = dataset

    @property
    def transform(self):
        return self.dataset.transform

    @transform.setter
    def transform(self, transform):
        self.dataset.transform = transform

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, draw):
        index, seed = draw
        seed_sample(seed)
        return self.dataset[index]


class Draws(torch.utils.data.Sampler):
    """A sampler's indices from any place of the epoch to its last update's, each with the seed of its draw.

    The seed follows from the image's place among those of all processes: a global batch is augmented alike however many
    processes and workers share it.
    """

    def __init__(self, sampler, seed, rank, world_size):
        self.sampler, self.seed, self.rank, self.world_size = sampler, seed, rank, world_size
        self.epoch, self.first, self.last = 0, 0, None

    def __len__(self):
        return len(self.sampler)

    def __iter__(self):
        for place, index in islice(enumerate(self.sampler), self.first, self.last):
            yield index, seed_at(self.seed, Draw.IMAGE, self.epoch, place * self.world_size + self.rank)


class SeededErasing:
    """timm's random erasing of a batch on the device, whose draws follow from the batch's place in the epoch."""

    def __init__(self, erasing, seed, process):
        self.erasing, self.seed, self.process = erasing, seed, process
        self.epoch = self.batch = 0

    def __call__(self, images):
        self.process.seed(self.seed, Draw.ERASING, self.epoch, self.batch)
        self.batch += 1
        return self.erasing(images)


def _start_worker(info):
    """A worker heeds SIGTERM from its own main process alone. Schedulers send it to every process of a job, and a run
    that is to save needs its workers for the update under way."""
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM,))
    threading.Thread(target=_wait_for_parents_signal, args=(os.getppid(),), daemon=True).start()
    return info.seed


def _wait_for_parents_signal(parent):
    while signal.sigwaitinfo((signal.SIGTERM,)).si_pid != parent:
        pass
    os._exit(0)


def _posterize(image, bits_to_keep, **_):
    """timm's posterize; RandAugment asks it for no bits at all now and then, which Pillow refuses since version 13."""
    return auto_augment.posterize(image, bits_to_keep) if bits_to_keep > 0 else Image.new(image.mode, image.size)


auto_augment.NAME_TO_OP.update(dict.fromkeys(("Posterize", "PosterizeIncreasing", "PosterizeOriginal"), _posterize))


def open_dataset(settings, split, *, is_training=False, class_names=None, in_chans=3, num_samples=None):
    """The data set of one split, and the names of its classes (None where the data set does not know them).

    `class_names` are those that the training split or a checkpoint has: the labels then follow them.
    """
    mode = "RGB" if in_chans == 3 else "L"
    prefix = check_name(settings.dataset)
    if not prefix:
        dataset, names = _open_folder(settings, split, class_names)
        return _checked(dataset, mode, settings, is_training), names
    if settings.class_map:
        read_class_map(settings.class_map, settings.data_dir)
    if prefix == "torch":
        _unpack_raw_files(settings.data_dir)
    try:
        dataset = create_dataset(
            settings.dataset,
            root=settings.data_dir,
            split=split,
            class_map=settings.class_map,
            is_training=is_training,
            download=settings.dataset_download,
            batch_size=settings.batch_size,
            num_samples=num_samples,
            seed=getattr(settings, "seed", 42),
            input_img_mode=mode)
    except (AssertionError, RuntimeError, ValueError, OSError, ImportError) as error:
        raise UserError(f"dataset {settings.dataset}, {split}, in {settings.data_dir}: {first_line(error)}") from error
    labels = getattr(getattr(dataset, "reader", None), "class_to_idx", None) or {}
    names = getattr(dataset, "classes", None) or sorted(labels, key=labels.get)
    return _checked(dataset, mode, settings, is_training), list(map(str, names)) if names else None


def _checked(dataset, mode, settings, is_training):
    """The data set with a count of its unreadable images; in training others take their place."""
    if isinstance(dataset, IterableImageDataset):
        return CheckedStream(dataset.reader, mode, settings.max_bad_images)
    return CheckedImages(dataset, mode, settings.max_bad_images, settings.seed if is_training else None)


def _open_folder(settings, split, class_names):
    """timm's data set of a folder or tar file, and the names of its classes."""
    if not settings.data_dir:
        raise UserError("no data: give --data-dir DIR, a folder of images sorted into class folders")
    root = Path(settings.data_dir)
    if not root.exists():
        raise UserError(f"{root}: no such folder (--data-dir)")
    if root.is_file() and split in SPLIT_NAMES[0]:
        raise UserError(f"{root}: a tar file holds one split; to train, give a folder with {split}.tar, or with "
                        f"{split}/CLASS/IMAGE files")
    if root.is_dir():
        root = find_split(root, split)
    class_to_idx = read_class_map(settings.class_map, settings.data_dir) if settings.class_map else None
    if class_names is not None and class_to_idx is None:
        class_to_idx = {name: index for index, name in enumerate(class_names)}
    if root.is_dir():
        reader = ClassFolders(root, class_to_idx)
        class_to_idx = reader.class_to_idx
        dataset = ImageDataset(str(root), reader=reader)
    else:
        try:
            dataset = create_dataset("", root=str(root), class_map=class_to_idx or "")
        except (AssertionError, ValueError, OSError, tarfile.TarError) as error:
            raise UserError(f"{root}: not a readable tar file of CLASS/IMAGE files ({first_line(error)})") from error
        class_to_idx = dataset.reader.class_name_to_idx
    return dataset, sorted(class_to_idx, key=class_to_idx.get)


def read_class_map(path, root):
    """{class: label} of a text file, which lies at `path` or, as in timm, in the folder `root`."""
    if Path(path).suffix.lower() != ".txt":
        raise UserError(f"--class-map {path}: must be a .txt file with one class name a line")
    try:
        file = path if os.path.exists(path) else Path(root or "", path)
        lines = [line.strip() for line in Path(file).read_text(encoding="utf-8").splitlines()]
        seen = {""}
        for number, name in enumerate(lines, 1):
            if name in seen:
                raise UserError(f"--class-map {path}: line {number} {f'repeats {name}' if name else 'is empty'}; it "
                                f"should hold each class name once, one a line")
            seen.add(name)
        return load_class_map(path, str(root or ""))
    except (AssertionError, OSError, ValueError) as error:
        raise UserError(f"--class-map {path}: {first_line(error)}") from error


def check_name(dataset):
    """The kind of a data set, '' for a folder or tar file. An unknown name is a UserError."""
    prefixes = ("torch", "hfds", "hfids", "tfds", "wds")
    prefix, slash, name = dataset.partition("/")
    prefix = prefix.lower()
    if not slash:
        if prefix:
            raise UserError(f"unknown dataset {dataset}: leave --dataset empty for an image folder, or write "
                            f"{', '.join(f'{kind}/NAME' for kind in prefixes)}")
        return ""
    if prefix not in prefixes:
        raise UserError(f"unknown dataset {dataset}{nearest(prefix, prefixes)}: it must begin with "
                        f"{', '.join(prefixes)}")
    if prefix == "torch" and name.lower() not in (*TORCH_DATASETS, "inat", "folder"):
        raise UserError(f"unknown dataset {dataset}{nearest(name.lower(), TORCH_DATASETS)}: timm reads torch/ data "
                        f"sets {', '.join(TORCH_DATASETS)}")
    return prefix


def _unpack_raw_files(root):
    """Unpack the .gz files of MNIST-like data sets where they lie: torchvision only unpacks what it downloads."""
    for packed in sorted(Path(root or ".").glob("*/raw/*-ubyte.gz")):
        plain = packed.with_suffix("")
        if plain.exists():
            continue
        partial = plain.with_name(f"{plain.name}.{os.getpid()}.partial")
        try:
            with gzip.open(packed, "rb") as source, open(partial, "wb") as target:
                shutil.copyfileobj(source, target)
        except (OSError, EOFError) as error:
            raise UserError(f"{packed}: cannot be unpacked ({first_line(error)})") from error
        os.replace(partial, plain)


def resolve_input(settings, model):
    """timm's data settings (input size, mean, std, crop, interpolation) for the model as it was built."""
    names = ("in_chans", "img_size", "input_size", "mean", "std", "interpolation", "crop_pct")
    given = {name: getattr(settings, name) for name in names}
    if given["input_size"] is None and given["img_size"] is None:
        given["input_size"] = get_model_input_config(model)["input_size"]
    channels = given["input_size"][0] if given["input_size"] else given["in_chans"] or 3
    for key in ("mean", "std"):
        if given[key] is not None and len(given[key]) not in (1, channels):
            raise UserError(f"{key} {given[key]} has {len(given[key])} numbers for images of {channels} channels")
    config = resolve_data_config(given, model=model)
    for key in ("mean", "std"):  # ImageNet's three numbers do for grey images as their average
        if len(config[key]) != channels:
            config[key] = (sum(config[key]) / len(config[key]),) * channels
    return config


def train_loader(dataset, settings, data_config, process):
    """Batches of augmented images on the process's device, for `epoch_batches` to start an epoch of."""
    device = process.device
    if not isinstance(dataset, IterableImageDataset):
        dataset = SeededDataset(dataset)
    try:
        loader = create_loader(
            dataset,
            input_size=data_config["input_size"],
            batch_size=settings.batch_size,
            is_training=True,
            no_aug=settings.no_aug,
            re_prob=settings.reprob,
            re_mode=settings.remode,
            re_count=settings.recount,
            scale=settings.scale,
            ratio=settings.ratio,
            hflip=settings.hflip,
            vflip=settings.vflip,
            color_jitter=settings.color_jitter,
            auto_augment=settings.aa,
            num_aug_repeats=settings.aug_repeats,
            interpolation=settings.train_interpolation or data_config["interpolation"],
            mean=data_config["mean"],
            std=data_config["std"],
            crop_pct=data_config["crop_pct"],
            num_workers=settings.workers,
            distributed=True,
            pin_memory=settings.pin_mem and device.type == "cuda",
            device=device,
            persistent_workers=False,
            worker_seeding=_start_worker,
        )
    except (AssertionError, IndexError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"augmentation (aa {settings.aa}, aug_repeats {settings.aug_repeats}): timm does not take it, "
                        f"{first_line(error)}") from error
    if isinstance(dataset, SeededDataset):
        loader.batch_sampler.sampler = Draws(loader.sampler, settings.seed, process.rank, process.world_size)
    if loader.random_erasing is not None:
        loader.random_erasing = SeededErasing(loader.random_erasing, settings.seed, process)
    return loader


def eval_loader(dataset, settings, data_config, device, batch_size):
    """Batches of images on the device, in order; the sampler knows which of them only make the processes even."""
    return create_loader(
        dataset,
        input_size=data_config["input_size"],
        batch_size=batch_size,
        is_training=False,
        interpolation=data_config["interpolation"],
        mean=data_config["mean"],
        std=data_config["std"],
        crop_pct=data_config["crop_pct"],
        crop_mode=data_config["crop_mode"],
        num_workers=settings.workers,
        distributed=True,
        pin_memory=settings.pin_mem and device.type == "cuda",
        device=device,
        persistent_workers=False,
    )


def epoch_batches(loader, settings, process, epoch, first=0):
    """Iterator over the batches of an epoch from number `first` on.

    The order depends on seed and epoch alone, not on the number of processes. A data set that is a stream is read again
    from the epoch's start, up to the batch; its augmentation depends on the number of workers too.
    """
    order, streams = settings.seed * 100_003 + epoch, isinstance(loader.dataset, IterableImageDataset)
    process.seed(settings.seed, Draw.EPOCH, epoch)  # the workers' own seeds, which a stream draws from
    if loader.random_erasing is not None:
        loader.random_erasing.epoch, loader.random_erasing.batch = epoch, 0 if streams else first
    if streams:
        loader.dataset.set_epoch(order)
        return islice(iter(loader), first, None)
    loader.sampler.set_epoch(order)
    draws = loader.batch_sampler.sampler
    # Not the batches after the last update: workers would read some of them, and count the bad images there, or not.
    last = len(loader) // settings.grad_accum_steps * settings.grad_accum_steps
    draws.epoch, draws.first, draws.last = epoch, first * settings.batch_size, last * settings.batch_size
    return iter(loader)


def open_training_sets(settings):
    """Training split, validation split with the same classes in the same order, and their names."""
    channels = image_channels(settings)
    train_set, names = open_dataset(
        settings, settings.train_split, is_training=True, in_chans=channels, num_samples=settings.train_num_samples)
    eval_set, _ = open_dataset(
        settings, settings.val_split, class_names=names, in_chans=channels, num_samples=settings.val_num_samples)
    return train_set, eval_set, names


def class_count(settings, class_names, default=None):
    """num_classes as given, checked against the data; else as many as the data has."""
    wanted, found = settings.num_classes, len(class_names) if class_names else None
    if wanted is None:
        if found is None:
            raise UserError(f"the data set {settings.dataset} does not say how many classes it has; set --num-classes")
        return found
    if found is not None and (wanted < found or (wanted > found and not settings.class_map)):
        raise UserError(f"num_classes is {wanted}, but {settings.data_dir} has {found} classes; set --num-classes "
                        f"{found}, or give --class-map if the folder holds some of the {wanted}")
    return wanted


def updates_per_epoch(loader, settings, plan):
    """Whole updates in an epoch; what is left at its end is not trained on in that epoch."""
    updates = len(loader) // settings.grad_accum_steps
    if updates == 0:
        raise UserError(f"the training split has {len(loader.dataset)} images, less than one update's {plan.total}; "
                        f"lower -b or --grad-accum-steps")
    return updates
