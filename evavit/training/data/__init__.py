"""Data sets and loaders: what is read (`datasets`, `folders`, `images`, `pictures`), drawn (`augment`), batched."""

from .augment import check_filter, operations
from .datasets import (
    check_division,
    check_labels,
    check_name,
    class_count,
    held_out,
    open_dataset,
    open_training_sets,
    other_classes,
    read_class_map,
    unnamed,
)
from .device import Draws, cache_size
from .hub import may_download, without_download
from .loader import (
    Around,
    Batches,
    epoch_batches,
    eval_loader,
    resolve_input,
    train_loader,
    transform_arguments,
    updates_per_epoch,
)
from .pictures import open_pictures

__all__ = [
    'Around',
    'Batches',
    'Draws',
    'cache_size',
    'check_division',
    'check_filter',
    'check_labels',
    'check_name',
    'class_count',
    'epoch_batches',
    'eval_loader',
    'held_out',
    'may_download',
    'open_dataset',
    'open_pictures',
    'open_training_sets',
    'operations',
    'other_classes',
    'read_class_map',
    'resolve_input',
    'train_loader',
    'transform_arguments',
    'unnamed',
    'updates_per_epoch',
    'without_download',
]
