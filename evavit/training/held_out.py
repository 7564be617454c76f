"""To judge a model by the images that its run held out: of the same folder these, of another one a word."""

import logging
from pathlib import Path
from typing import Any, Dict, Set

from evavit.errors import UserError
from evavit.hub import folder_digest
from evavit.training.config import ValidateConfig
from evavit.training.data.folders import SPLIT_NAMES, SPLITS, split_in

log = logging.getLogger(__name__)


def take_held_out(config: ValidateConfig, given: Set[str], held: Dict[str, Any]) -> None:
    """Of the folder that a run divided, validate on what it held out (`hub.held_out`): the rest are the images that it
    has seen. Not where a split is asked for that is another. UserError where the folder has one to validate on by now,
    and nothing says which of the two is meant."""
    share, seed = held.get('val_fraction'), held.get('seed')
    if 'dataset' in given or not share:
        return
    same = bool(config.data.data_dir) and folder_digest(config.data.data_dir or '') == held.get('data_dir_sha256')
    train_split = held.get('train_split') or config.data.train_split
    if same and 'val_fraction' not in given and not _is_another_split(config, train_split, 'split' in given):
        config.data.val_fraction, config.data.train_split = share, train_split
    if config.data.val_fraction is None:
        folder = Path(config.data.data_dir or '').absolute()
        if folder.name == train_split and folder_digest(str(folder.parent)) == held.get('data_dir_sha256'):
            log.warning(f'warning: the run divided {folder}: of these images it has seen most in training')
        elif 'split' not in given:
            log.warning(
                f'warning: the run held out {share:g} of its data for validation, and this is another folder, taken '
                f'whole; if it is a copy, add --val-fraction {share:g}'
            )
        return
    if 'seed' not in given and seed is not None:
        config.run.seed = seed
    if (config.data.val_fraction, config.run.seed) != (share, seed):
        log.warning(
            f'warning: the run held out {share:g} with seed {seed}: of these images it has seen some in '
            f'training; leave --val-fraction and --seed out'
        )


def _is_another_split(config: ValidateConfig, train_split: str, asked: bool) -> bool:
    split, root = config.data.split, Path(config.data.data_dir or '')
    there = split_in(root, SPLIT_NAMES[1][0]) if root.is_dir() else None
    begins = f'{root}: has {there.name} to validate on' if there else ''
    if there and not asked:
        raise UserError(
            f'{begins}, and the run held out a part of its images when it had none; give --split {there.stem}, or take '
            f'{there.name} away'
        )
    if there and split in (train_split, *SPLIT_NAMES[0]):
        divided = root / train_split  # not of a folder whose classes lie in it directly
        whole = f'give --data-dir {divided} to judge it whole, or ' if divided.is_dir() else ''
        raise UserError(
            f'{begins}, and the run divided {train_split} when it had none; {whole}take {there.name} away to judge '
            f'what was trained on'
        )
    return bool(there and split in SPLIT_NAMES[1]) or split not in (train_split, *SPLITS)


def warn_of_held_out(config: ValidateConfig, here: Dict[str, Any]) -> None:
    """A warning where a folder is divided as the run did it, and has other images since: `here` is `data.held_out`."""
    before, digest = config.held_out, 'held_out_sha256'
    same = (config.data.val_fraction, config.run.seed) == (before.get('val_fraction'), before.get('seed'))
    if same and digest in before and digest in here and before[digest] != here[digest]:
        log.warning(
            f'warning: the run held out a part of {before.get("held_out_of")} images, and the folder has '
            f'{here["held_out_of"]} now: of those that are held out here it may have seen some in training'
        )
