"""Data sets: timm's, with the checks that timm leaves out.

A folder without images of a class, or a validation folder with classes that the training folder lacks, would change the
labels without a word: here each is a UserError (`folders`). An image that cannot be read is counted (`images`).
"""

import gzip
import hashlib
import io
import logging
import os
import zlib
from contextlib import nullcontext
from itertools import zip_longest
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import torch
from timm.data import ImageDataset, ImageNetInfo, IterableImageDataset, create_dataset, infer_imagenet_subset
from torchvision.datasets import CIFAR10, MNIST, QMNIST, INaturalist

from evavit.arguments import nearest
from evavit.errors import UserError, first_line, printable, reason_of
from evavit.files import open_regular, replacing
from evavit.training.config import DataConfig
from evavit.training.data.folders import (
    SPLIT_NAMES,
    SPLITS,
    ClassFolders,
    check_classes_alone,
    check_links,
    find_split,
    find_undivided,
    hold_out,
)
from evavit.training.data.hub import ADDRESS, cast_by_us, network
from evavit.training.data.images import CheckedImages, CheckedStream
from evavit.training.data.shards import check_shards, shard_root
from evavit.training.data.tars import ClassTar

log = logging.getLogger(__name__)

LARGEST_RAW = 2**30  # bytes of an unpacked file of MNIST and its like; EMNIST's pictures are half of it
KINDS = ('torch', 'hfds', 'hfids', 'tfds', 'wds')
TORCH_DATASETS = (
    'cifar10',
    'cifar100',
    'mnist',
    'kmnist',
    'fashion_mnist',
    'qmnist',
    'imagenet',
    'inaturalist',
    'places365',
    'image_folder',
)
FOLDERS = ('imagenet', 'inaturalist', 'inat', 'image_folder', 'folder')  # of which torchvision walks the files
MOST_IMAGES = 10**10  # of a stream, which are nowhere counted
Checked = Union[CheckedImages, CheckedStream]


def open_dataset(
    config: DataConfig,
    split: str,
    *,
    batch_size: int,
    seed: int = 42,
    is_training: bool = False,
    class_names: Optional[List[str]] = None,
    in_chans: int = 3,
    num_samples: Optional[int] = None,
) -> Tuple[Checked, Optional[List[str]]]:
    """The data set of one split, and the names of its classes (None where the data set does not know them).

    Args:
        config: Where the data is.
        split: Name of the split.
        batch_size: Images of a batch, which timm's streams share among their workers.
        seed: Order of a stream, what takes the place of unreadable images, what `val_fraction` holds out.
        is_training: Another image takes the place of one that cannot be read.
        class_names: Those that the training split or a checkpoint has: the labels then follow them.
        in_chans: 3 for colour, 1 for grey.
        num_samples: Images of a stream that does not say.

    Raises:
        UserError: The data is not there, or is not what `config` says.
    """
    mode = 'RGB' if in_chans == 3 else 'L'
    prefix = check_name(config.dataset)
    if not prefix:
        dataset, names = _open_folder(config, split, class_names, seed)
        return _checked(dataset, mode, config.max_bad_images, seed if is_training else None), names
    if config.class_map and prefix == 'torch':  # timm would leave it out without a word
        raise UserError(
            f'--class-map {config.class_map}: {config.dataset} has an order of its own; leave the map out, or give a '
            f'folder of class folders without --dataset'
        )
    # timm's annotation leaves out that it takes a file as well, in which it would not leave out the mark of Windows
    class_map: Any = read_class_map(config.class_map, config.data_dir) if config.class_map else None
    if num_samples and prefix == 'tfds':
        raise UserError(
            f'{num_samples} images: {config.dataset} says itself how many are in {split}; leave --train-num-samples, '
            f'--val-num-samples and --num-samples out'
        )
    root = shard_root(config.data_dir or '.', split) if prefix == 'wds' else config.data_dir
    if prefix == 'torch':
        _unpack_raw_files(root)
        name = config.dataset.partition('/')[2].lower()
        if name in FOLDERS and os.path.isdir(root or ''):
            check_links(Path(root or ''))
            if name.endswith('folder'):  # of which timm takes all, splits for classes, where the split is missing
                root = str(find_split(Path(root or ''), split))
                check_classes_alone(Path(root))
    try:
        with (
            network(config) if prefix in ('hfds', 'hfids') else nullcontext(),
            cast_by_us('label') if prefix == 'hfds' else nullcontext(),
        ):
            dataset = create_dataset(
                config.dataset.replace(ADDRESS, ''),
                root=root,
                split=split,
                search_split=False,
                class_map=class_map,
                is_training=is_training,
                download=config.dataset_download,
                batch_size=batch_size,
                num_samples=num_samples,
                seed=seed,
                input_img_mode=mode,
            )
        if prefix == 'wds':
            check_shards(dataset.reader)
        _check_number(dataset)
        _check_arrays(dataset)
    except Exception as error:  # each kind has its own errors for what is missing or damaged
        raise UserError(
            f'dataset {config.dataset}, {split}, in {config.data_dir}: {first_line(error)[:400]}'
        ) from error
    labels: Dict[str, int] = getattr(getattr(dataset, 'reader', None), 'class_to_idx', None) or {}
    if isinstance(dataset, INaturalist):
        dataset.index.sort()  # it lists folders in the order of the disk, which is another on each machine
        level = dataset.target_type[0]
        labels = dataset.categories_index.get(level) or {name: i for i, name in enumerate(dataset.all_categories)}
    found = getattr(dataset, 'classes', None) or sorted(labels, key=labels.__getitem__)
    checked = _checked(dataset, mode, config.max_bad_images, seed if is_training else None)
    return checked, list(map(str, found)) if found else None


def _check_number(dataset: Any) -> None:
    """Whether a stream can have as many images as it says, or as a flag does; a validation split need not say."""
    count = dataset.reader.num_samples or 0 if isinstance(dataset, IterableImageDataset) else 0
    if not isinstance(count, int) or not 0 <= count <= MOST_IMAGES:
        raise UserError(f'it is said to have {str(count)[:40]} images: give a whole number, at most {MOST_IMAGES:,}')


def _check_arrays(dataset: Any) -> None:
    """UserError where a data set of arrays, such as MNIST, has not a grey image of bytes and a whole number for each.
    What older versions of torchvision have saved it takes as it is; it compares CIFAR's files with their checksums."""
    if not isinstance(dataset, (MNIST, CIFAR10)):
        return
    images, labels = dataset.data, dataset.targets
    sides = (8,) if isinstance(dataset, QMNIST) else ()  # its label is the first of eight numbers
    whole = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
    if isinstance(dataset, MNIST) and not (
        _is_plain(images, whole[:1])
        and images.ndim == 3
        and images.shape[1:].numel()
        and _is_plain(labels, whole)
        and labels.shape[1:] == sides
    ):
        raise UserError('no images of bytes, or labels that are no whole numbers; the files are damaged, get them anew')
    if len(images) != len(labels):
        raise UserError(f'{len(images)} images and {len(labels)} labels; the files are damaged, get them anew')


def _is_plain(value: Any, kinds: Sequence[torch.dtype]) -> bool:
    """Whether a value is a tensor with content, of one of these kinds and of at least one dimension."""
    return (
        isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and value.device.type == 'cpu'
        and value.dtype in kinds
        and value.ndim > 0
    )


def _checked(dataset: Any, mode: str, max_bad_images: float, seed: Optional[int]) -> Checked:
    """The data set with a count of its unreadable images; with a seed others take their place."""
    if isinstance(dataset, IterableImageDataset):
        return CheckedStream(dataset.reader, mode, max_bad_images)
    return CheckedImages(dataset, mode, max_bad_images, seed)


def _open_folder(
    config: DataConfig, split: str, class_names: Optional[List[str]], seed: int
) -> Tuple[ImageDataset, Optional[List[str]]]:
    """timm's data set of a folder or tar file, and the names of its classes."""
    if not config.data_dir:
        raise UserError('no data: give --data-dir DIR, a folder of images sorted into class folders')
    root = Path(config.data_dir)
    if not root.exists():
        raise UserError(f'{root}: no such folder (--data-dir)')
    if config.val_fraction is not None:
        if split not in (config.train_split, config.val_split, *SPLITS):
            raise UserError(
                f'--val-fraction divides the training split, and {split} is another one; leave --val-fraction or '
                f'--split out'
            )
        root = find_undivided(root, config.train_split, config.val_split)
    elif root.is_file() and split in SPLIT_NAMES[0]:
        raise UserError(
            f'{root}: a tar file holds one split; to train, give a folder with {split}.tar, or with '
            f'{split}/CLASS/IMAGE files'
        )
    elif root.is_dir():
        root = find_split(root, split)
    if not root.is_dir() and not root.is_file():
        raise UserError(f'{root}: neither a folder nor a regular file')
    class_to_idx = read_class_map(config.class_map, config.data_dir) if config.class_map else None
    if class_names is not None and class_to_idx is None:
        class_to_idx = {name: index for index, name in enumerate(class_names)}
    reader = (ClassFolders if root.is_dir() else ClassTar)(root, class_to_idx)
    if config.val_fraction is not None:
        _keep_part(reader, config.val_fraction, seed, training=split in (config.train_split, *SPLIT_NAMES[0]))
    labels = reader.class_to_idx
    return ImageDataset(str(root), reader=reader), sorted(labels, key=labels.__getitem__)


def _keep_part(reader: ClassFolders, fraction: float, seed: int, training: bool) -> None:
    """Leave a reader of an undivided folder with the images to train on, or with those that are held out."""
    held = hold_out(reader.samples, Path(reader.root), fraction, seed)
    if not held:
        raise UserError(
            f'--val-fraction {fraction:g}: no class of {reader.root} has two images, to hold out one; '
            f'add images, or a validation split'
        )
    if not training:
        log.info(
            f'{reader.root}: {len(held)} of its {len(reader.samples)} images are held out for validation '
            f'(--val-fraction {fraction:g}, by class, seed {seed})'
        )
    names = sorted(Path(reader.samples[number][0]).relative_to(reader.root).as_posix() for number in held)
    digest = hashlib.sha256('\n'.join(names).encode(errors='surrogateescape')).hexdigest()
    reader.held_out = dict(held_out_of=len(reader.samples), held_out_sha256=digest)
    reader.samples = [sample for number, sample in enumerate(reader.samples) if (number in held) != training]


def held_out(dataset: Checked) -> Dict[str, Any]:
    """Of a folder that `val_fraction` divided: the number of its images, and a digest of the names of those that are
    held out, which follow from all of them. {} of other data sets."""
    return getattr(getattr(getattr(dataset, 'dataset', None), 'reader', None), 'held_out', {})


def check_division(config: DataConfig) -> None:
    """UserError where `val_fraction` would divide what is no folder of images."""
    if config.val_fraction is not None and config.dataset:
        raise UserError(
            f'val_fraction {config.val_fraction:g} divides a folder of images, and {config.dataset} is none: it has '
            f'splits of its own; leave --val-fraction out, or --dataset where it is a folder of class folders'
        )


def read_class_map(path: str, root: Optional[str]) -> Dict[str, int]:
    """{class: label} of a text file, which lies at `path` or, as in timm, in the folder `root`."""
    if Path(path).suffix.lower() != '.txt':
        raise UserError(f'--class-map {path}: must be a .txt file with one class name a line')
    try:
        file = Path(path) if Path(path).exists() else Path(root or '', path)
        # programs of Windows begin a text with a mark
        with io.TextIOWrapper(open_regular(file), encoding='utf-8-sig') as opened:
            lines = [line.strip() for line in opened]
        seen = {''}
        for number, name in enumerate(lines, 1):
            if name in seen:
                raise UserError(
                    f'--class-map {path}: line {number} {f"repeats {name}" if name else "is empty"}; it '
                    f'should hold each class name once, one a line'
                )
            seen.add(name)
        return {name: label for label, name in enumerate(lines)}
    except (OSError, ValueError) as error:
        raise UserError(f'--class-map {path}: {reason_of(error)}') from error


def check_name(dataset: str) -> str:
    """The kind of a data set, '' for a folder or tar file. An unknown name is a UserError."""
    prefix, slash, name = dataset.partition('/')
    prefix = prefix.lower()
    if not slash:
        if prefix:
            raise UserError(
                f'unknown dataset {dataset}: leave --dataset empty for an image folder, or write '
                f'{", ".join(f"{kind}/NAME" for kind in KINDS)}'
            )
        return ''
    if prefix not in KINDS:
        raise UserError(f'unknown dataset {dataset}{nearest(prefix, KINDS)}: it must begin with {", ".join(KINDS)}')
    if prefix == 'torch' and name.lower() not in (*TORCH_DATASETS, 'inat', 'folder'):
        raise UserError(
            f'unknown dataset {dataset}{nearest(name.lower(), TORCH_DATASETS)}: timm reads torch/ data '
            f'sets {", ".join(TORCH_DATASETS)}'
        )
    return prefix


def _unpack_raw_files(root: Optional[str]) -> None:
    """Unpack the .gz files of MNIST-like data sets where they lie: torchvision only unpacks what it downloads."""
    for path in Path(root or '.').glob('*/raw/*-ubyte*'):
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise UserError(f'{path}: not a regular file')
    for packed in sorted(Path(root or '.').glob('*/raw/*-ubyte.gz')):
        plain = packed.with_suffix('')
        if plain.exists():
            continue
        try:
            with (
                replacing(plain) as partial,
                gzip.open(packed, 'rb') as source,
                open(partial, 'wb') as file,
            ):
                while block := source.read(2**20):
                    if file.tell() + len(block) > LARGEST_RAW:
                        raise OSError(f'more than {LARGEST_RAW:,} bytes, so no file of MNIST and its like')
                    file.write(block)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f'{packed}: cannot be unpacked ({first_line(error)})') from error


def open_training_sets(
    config: DataConfig, *, in_chans: int, batch_size: int, seed: int
) -> Tuple[Checked, Checked, Optional[List[str]]]:
    """Training split, validation split with the same classes in the same order, and their names."""
    shared: Dict[str, Any] = dict(in_chans=in_chans, batch_size=batch_size, seed=seed)
    train_set, names = open_dataset(
        config, config.train_split, is_training=True, num_samples=config.train_num_samples, **shared
    )
    eval_set, eval_names = open_dataset(
        config, config.val_split, class_names=names, num_samples=config.val_num_samples, **shared
    )
    check_labels(names, eval_names, 'the training split', config.class_map)
    return train_set, eval_set, names


def check_labels(
    learnt: Optional[Sequence[str]], here: Optional[Sequence[str]], whose: str, class_map: Optional[str] = None
) -> None:
    """UserError where a data set, which may have an order of its own, gives a class another label than was learnt.
    Where classes are called otherwise altogether, or on one side alone (`unnamed`), a warning. `whose` says where they
    were learnt."""
    if line := unnamed(learnt, here, whose, class_map):
        log.warning(f'warning: {line}')
    labels = {name: label for label, name in enumerate(learnt or ())}
    for label, name in enumerate(here or ()):
        same = label < len(learnt or ()) and name == (learnt or ())[label]  # two classes may have one name
        if not same and labels.get(name, label) != label:
            raise UserError(
                f'{name} is class {label} of this data, and class {labels[name]} of {whose}; give the data as a '
                f'folder of class folders, with no --class-map or one in the order of {whose}'
            )
    for label, (old, new) in enumerate(zip(learnt or (), here or ())):  # noqa: B905, one may have fewer
        if old != new:
            log.warning(
                printable(
                    f'warning: class {label} of this data is called {new}, and {old} in {whose}; labels are '
                    f'taken for the same'
                )
            )
            return


def unnamed(
    learnt: Optional[Sequence[str]], here: Optional[Sequence[str]], whose: str, class_map: Optional[str]
) -> Optional[str]:
    """A line where classes have names in a data set alone, or alone where they were learnt, so that nothing compares
    them. None where --class-map says their order, and where the names are ImageNet's in the order that all keep."""
    names = list(learnt or here or ())
    subset = infer_imagenet_subset({'num_classes': len(names)})
    usual = subset and names == ImageNetInfo(subset).label_names()
    if bool(learnt) == bool(here) or class_map or usual:
        return None
    return printable(
        f'nothing says what the classes of {"this data" if learnt else whose} are called; labels are taken as numbers, '
        f'0 for {names[0]}'
    )


def other_classes(learnt: Optional[Sequence[str]], here: Optional[Sequence[str]], whose: str) -> Optional[str]:
    """A few words on the first class of a data set that was learnt as another one, None where all are the same or not
    known. UserError of `check_labels` where they are the same ones in another order."""
    if not learnt or not here or list(learnt) == list(here):
        return None
    if sorted(learnt) == sorted(here):
        check_labels(learnt, here, whose)
    pairs = enumerate(zip_longest(learnt, here, fillvalue='nothing'))
    label, (old, new) = next((label, pair) for label, pair in pairs if pair[0] != pair[1])
    return f'class {label} was called {old}, and is {new} in this data'


def class_count(
    config: DataConfig, num_classes: Optional[int], class_names: Optional[List[str]], *datasets: Checked
) -> int:
    """num_classes as given, checked against the data; else as many as the data has. `datasets` are held to it."""
    found = len(class_names) if class_names else None
    if num_classes is None:
        if found is None:
            raise UserError(f'the data set {config.dataset} does not say how many classes it has; set --num-classes')
        num_classes = found
    if found is not None and (num_classes < found or (num_classes > found and not config.class_map)):
        raise UserError(
            f'num_classes is {num_classes}, but {config.data_dir} has {found} classes; set --num-classes '
            f'{found}, or give --class-map if the folder holds some of the {num_classes}'
        )
    for dataset in datasets:
        dataset.labels.num_classes = num_classes
    return num_classes
