"""Checkpoints: what is written, how it is written so that a crash leaves the last one whole, and how a run continues.

A run's folder holds `last.pth.tar` and the one before it, `previous.pth.tar`; `model_best.pth.tar` and the best few
`checkpoint-EPOCH.pth.tar` (weights, average, optimizer, scaler, settings, position); and the weights alone as
`last.safetensors` and `model_best.safetensors`: the averaged ones where the run keeps an average. Every draw follows
from the run's seed and position (see `loop.Position`), so a run continues alike without the state of any generator.
"""

import argparse
import contextlib
import copy
import dataclasses
import json
import logging
import math
import os
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple, Union

import torch
from timm.models import clean_state_dict
from timm.utils import CheckpointSaver, unwrap_model

from evavit.arguments import shown
from evavit.errors import LocalError, UserError, first_line, reason_of
from evavit.files import RUN_WEIGHTS, replacing, set_aside, stamp, sync_folder
from evavit.models import write_weights
from evavit.models._weights import other_kinds
from evavit.training import data
from evavit.training.build import check_fit
from evavit.training.contents import KEPT, has_metadata
from evavit.training.loop import Position, Run, Stepper, weights_are_finite
from evavit.training.optimizer_state import fit_state
from evavit.training.run_folder import (
    BEST,
    check_furthest,
    digest_of,
    epoch_of,
    files_from,
    furthest_whole,
    is_copy,
    is_of,
    remedy,
)
from evavit.training.sections import is_number, is_whole

log = logging.getLogger(__name__)

BEHIND = 'is no part of what this run goes on from'


@contextlib.contextmanager
def saving(path: Union[str, Path]) -> Iterator[Path]:
    """`files.replacing`, on the disk before it returns; errors of the write become a LocalError that names the file."""
    with _written(path), replacing(path, durable=True) as partial:
        yield partial


@contextlib.contextmanager
def _written(path: Union[str, Path]) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:  # PyTorch's own for a write that fails
        told = f'{path}: cannot be written ({reason_of(error)})'
        raise LocalError(f'{told}; {remedy(Path(path).parent, error)}') from error


class Saver(CheckpointSaver):
    """timm's CheckpointSaver; every file appears whole or not at all, and weights are also written as safetensors."""

    def __init__(self, run: Run, settings: Dict[str, Any], class_names: Optional[List[str]], folder: Path):
        super().__init__(
            model=unwrap_model(run.task.get_eval_model()),
            optimizer=run.optimizer,
            args=argparse.Namespace(**settings, class_names=class_names),
            amp_scaler=run.stepper if run.stepper.scaling else None,
            checkpoint_dir=str(folder),
            recovery_dir=str(folder),
            decreasing=run.config.eval_metric == 'loss',
            max_history=run.config.checkpoint_hist,
            task=run.task,
        )
        self.batches = batches_of(run)
        self.position = Position()
        self.last = Path(folder, 'last.pth.tar')
        self.place = _identity(folder)
        self.written = False  # the checkpoint of the epoch that is being saved is there already

    def check_folder(self) -> None:
        """LocalError where another folder has the name of this run's, or another file that of its lock: those of
        another run. Some network disks number folders and files anew; the time of the lock then is the same."""
        folder = self.last.parent
        place, lock = _identity(folder) if folder.is_dir() else self.place
        same = place[:2] == self.place[0][:2]
        if place == self.place[0] or (lock is None and same) or (lock is not None and lock == self.place[1]):
            return
        if lock is None and not any(folder.iterdir()):  # a new folder, in which nothing is
            self.place = place, lock
            return
        if same:
            raise LocalError(
                f'{folder}: the .lock of this run was removed, and another run has begun there; nothing more is written'
            )
        raise LocalError(
            f'{folder}: this run began in another folder of that name, which was moved or removed; what it saved '
            f'is there, and nothing more is written'
        )

    def save_epoch(self, position: Position, metric: float) -> Tuple[float, int]:
        """Write the state at the start of an epoch, with the metric of the one before; returns the best and its epoch.

        A kill on the way leaves what `finish_epoch` makes up for.
        """
        self.position, epoch = position, position.epoch - 1
        if not math.isfinite(metric):
            raise UserError(f'{self.args.eval_metric} {metric:g} after epoch {epoch}: not saved')
        best = self.save_checkpoint(epoch, metric)
        model = unwrap_model(self.task.get_eval_model(ema=self.task.has_ema()))
        self._save_weights(model.state_dict(), epoch, metric, vars(self.args))
        return best

    def finish_epoch(self, path: Path, checkpoint: Dict[str, Any]) -> None:
        """What comes after an epoch's checkpoint (the best few, their ranking, the weights alone), made from that file
        where a kill left it undone. A file that is right already is not touched."""
        epoch, metric = checkpoint['epoch'], checkpoint['metric']
        self.written = True
        self.save_checkpoint(epoch, metric)
        self._save_weights(_exported(checkpoint), epoch, metric, _args(checkpoint))
        self.written = False

    def go_on(self, path: Path, checkpoint: Dict[str, Any], position: Position) -> None:
        """Take over the ranking of a checkpoint of this folder, up to the epoch that it ends."""
        here, there = self.max_history, _args(checkpoint).get('checkpoint_hist')
        if is_whole(there):  # where it kept more, timm would make room for its epoch
            self.max_history = max(here, there)
        self.load_state_dict(checkpoint['saver'])
        if position.epoch and not position.update and checkpoint.get('metric') is not None:
            self.finish_epoch(path, checkpoint)
        # What --checkpoint-hist keeps no more stays in the folder: timm would remove a better one with it.
        self.max_history, self.checkpoint_files = here, self.checkpoint_files[:here]

    def begin_from(self, path: Path, epoch: int) -> None:
        """Make a checkpoint of this folder its last one, and set aside what is there of epochs that it has not."""
        for file in files_from(self.last.parent, epoch):
            self._leave(file, BEHIND)
        if not is_copy(self.last, path):  # it was damaged, or another one was asked for
            whole = str(self.last.with_name('tmp.pth.tar'))
            self._duplicate(path, whole)
            self._replace(whole, str(self.last))

    def _leave(self, path: Path, why: str) -> None:
        log.warning(f'warning: {path} {why}: it is {set_aside(path, "before").name} now')

    def restore_best(self, position: Position) -> None:
        """Make `model_best` that of the ranking's best epoch where it is not: from what is left of that epoch, else of
        the best one that is left. What stood in its place is set aside."""
        if self.best_epoch is None:
            self.leave_best(f'{BEHIND}, and none is ranked yet')
            return
        wrong = self._not_best()
        path, checkpoint = self._best_left(position.epoch) if wrong else (self.last, {})
        if wrong and checkpoint.get('epoch') != self.best_epoch:
            gone = f'no checkpoint of epoch {self.best_epoch}, its best, is left'
            whole, alone = (self.last.with_name(name) for name in BEST)
            if alone not in wrong:  # the best epoch's weights alone are worth more than another epoch
                log.warning(f'warning: {whole} is missing or damaged, and {gone}: {alone.name} has its weights')
                return
            self.best_epoch, self.best_metric = checkpoint.get('epoch'), checkpoint.get('metric')
            other = 'the next one validated' if self.best_epoch is None else f'epoch {self.best_epoch}, of those left,'
            log.warning(f'warning: {whole.parent}: {gone}: {other} is the best')
            wrong = self._not_best()
        for file in wrong:
            if os.path.lexists(file):
                self._leave(file, 'is damaged, or not of the best epoch')
            if not checkpoint:
                continue
            log.warning(f'warning: {file} is missing: epoch {self.best_epoch}, its best, takes its place')
            if file.name == BEST[0]:
                self._duplicate(path, file)
            else:
                self._export(file, _exported(checkpoint), checkpoint['epoch'], checkpoint['metric'], _args(checkpoint))

    def leave_best(self, why: str) -> None:
        """Set `model_best` aside, which the next best epoch would replace."""
        for path in (self.last.with_name(name) for name in BEST):
            if os.path.lexists(path):
                self._leave(path, why)

    def _not_best(self) -> List[Path]:
        """The files of `model_best` that are missing, or not of the best epoch."""
        whole, alone = (self.last.with_name(name) for name in BEST)
        best, kept = (self.best_epoch, self.best_metric), Path(self._checkpoint_path(self.best_epoch))
        linked = kept.exists() and whole.exists() and kept.samefile(whole)
        wrong = [] if linked or epoch_of(whole)[0] == best else [whole]
        return wrong if has_metadata(alone, dict(epoch=str(best[0]), metric=str(best[1]))) else [*wrong, alone]

    def _best_left(self, end: int) -> Tuple[Path, Dict[str, Any]]:
        """The best checkpoint that is left of the epochs before this one, and its content: nothing where none is."""
        names = (BEST[0], 'last.pth.tar', 'previous.pth.tar')
        places = (Path(self._checkpoint_path(self.best_epoch)), *(self.last.with_name(name) for name in names))
        for path in places:
            about, checkpoint = epoch_of(path)
            if about == (self.best_epoch, self.best_metric):
                return path, checkpoint
        best: Tuple[Path, Dict[str, Any]] = self.last, {}
        for path in (*(Path(name) for name, _ in self.checkpoint_files), *places[2:]):
            about, checkpoint = epoch_of(path)
            metric = about[1] if about and None not in about and about[0] < end else None
            if metric is not None and (not best[1] or self.cmp(metric, best[1]['metric'])):
                best = path, checkpoint
        return best

    def save_position(self, position: Position) -> None:
        """Write the state within an epoch, or after one that is not validated, unless its weights have gone bad.
        Skipped updates left them as they were."""
        if not weights_are_finite(self.task):
            log.warning(f'update {position.update} of epoch {position.epoch} is not saved: its weights are not finite')
            return
        self.position = position
        whole = str(self.last.with_name('tmp.pth.tar'))
        self._save(whole, position.epoch - 1)
        self._replace(whole, str(self.last))

    def state_dict(self, epoch: Optional[int] = None, metric: Optional[float] = None) -> Dict[str, Any]:
        position = dataclasses.asdict(self.position)
        if not position['parts']:  # without a teacher files are as they were before there was one
            del position['parts']
        return {
            **super().state_dict(epoch, metric),
            'position': position,
            'plan': self.batches,
        }  # 'plan' is the format's word

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        super().load_state_dict({**state_dict, 'pending': (None, None)})

    def _save_weights(self, weights: Dict[str, Any], epoch: int, metric: float, settings: Dict[str, Any]) -> None:
        for name in ('last.safetensors', *['model_best.safetensors'] * (self.best_epoch == epoch)):
            self._export(self.last.with_name(name), weights, epoch, metric, settings)

    def _export(self, path: Path, weights: Dict[str, Any], epoch: int, metric: float, settings: Dict[str, Any]) -> None:
        about = dict(epoch=str(epoch), metric=str(metric), args=json.dumps(settings))
        if not self.written or not has_metadata(path, about):
            with saving(path) as partial:
                write_weights(weights, partial, about)

    def _save(self, save_path: str, epoch: int, metric: Optional[float] = None) -> None:
        if self.written:
            return
        with saving(save_path) as partial:
            # An open file: given a name, torch up to 2.8 says nothing of a disk that fills with the last 8 KiB.
            with open(partial, 'wb') as file:
                super()._save(file, epoch, metric)
            stamp(partial)

    def _replace(self, src: str, dst: str) -> None:
        if self.written:
            return
        if os.path.exists(dst):
            self._duplicate(dst, self.last.with_name('previous.pth.tar'))
        with _written(dst):
            os.replace(src, dst)
        sync_folder(self.checkpoint_dir)

    def _duplicate(self, src: Union[str, Path], dst: Union[str, Path]) -> None:
        if os.path.exists(dst) and os.path.samefile(src, dst):
            return
        with saving(dst) as partial:
            super()._duplicate(os.path.realpath(src), partial)  # of a link what it leads to


def _exported(checkpoint: Dict[str, Any]) -> Dict[str, Any]:
    """What the files of weights alone hold of a checkpoint."""
    return clean_state_dict(checkpoint.get('state_dict_ema') or checkpoint['state_dict'])


def _identity(folder: Path) -> Tuple[Tuple[int, ...], Optional[int]]:
    """Which folder has this name, with which lock, and when a run locked it: to open the lock would give it up."""
    about, lock = os.stat(folder), folder / '.lock'
    held = os.stat(lock) if lock.is_file() else None
    return (about.st_dev, about.st_ino, held.st_ino if held else 0), held.st_mtime_ns if held else None


def batches_of(run: Run) -> Dict[str, int]:
    """What decides which images an update sees; a checkpoint holds it under the key `plan`."""
    return dict(
        images_per_update=run.images_per_update,
        updates_per_epoch=run.updates_per_epoch,
        processes=run.process.world_size,
        **(dict(images=run.bad.images) if run.bad is not None else {}),
    )


def remove_checkpoints(folder: Path, weights: bool = False) -> None:
    """Remove what a finished run's folder has to go on from, with `weights` its exported weights too: the files of the
    names that `Saver` writes, and no others."""
    names = {f'{name}.pth.tar' for name in ('last', 'previous', 'model_best')}
    names |= set(RUN_WEIGHTS if weights else ())
    for path in folder.iterdir():
        if (path.name in names or KEPT.fullmatch(path.name)) and path.is_file():
            path.unlink()


def resume(
    candidates: List[Path],
    run: Run,
    settings: Dict[str, Any],
    saver: Optional[Saver],
    class_names: Optional[Sequence[str]] = None,
) -> Position:
    """Restore weights, average, optimizer and scaler from the candidate of `furthest_whole`.

    Args:
        candidates: From `find_resume`.
        run: The run to go on with.
        settings: All of its settings by their names, to tell which have changed.
        saver: That of the first process, whose ranking of checkpoints is restored; None in the others.
        class_names: Of this run, by label, where they are known.

    Returns:
        Where the run goes on: its beginning where there is no candidate.

    Raises:
        UserError: None is whole, one does not fit this run, or the processes do not see the same one.
    """
    if not candidates:
        _check_same(run, None, '', Position())
        return Position()
    path, checkpoint, damaged = furthest_whole(candidates)
    task, full = run.task, not run.config.no_resume_opt
    weights = clean_state_dict(checkpoint['state_dict'])
    average = clean_state_dict(checkpoint.get('state_dict_ema') or {}) or weights  # a run may begin to keep one
    for state in (weights, average):
        check_fit(unwrap_model(task.get_eval_model()), state, path)
    position = _position(path, checkpoint, run)
    check_division(path, checkpoint, settings)
    other = check_classes(path, checkpoint, class_names, weights_alone=not full)
    if saver is not None:
        folder = Path(saver.checkpoint_dir)
        check_ranking(path, checkpoint, run.config.eval_metric, folder)
        for beside, fault in check_furthest(path, checkpoint, folder).items():
            if beside not in damaged:
                log.warning(f'warning: {fault}: it is set aside')
                damaged.append(beside)
    with fitting(path):
        for name in ('task_state', 'task_state_ema'):
            for part, state in (checkpoint.get(name) or {}).items():
                if wrong := other_kinds(state, task.get_task_state().get(part, {})):
                    raise ValueError(f'its {name} has in another type of number {part}.{wrong[0]}')
        if full:
            check_training(path, checkpoint, settings['opt'], settings.get('kd_teacher'))
            _load_optimizer(run, checkpoint)
        task.load_checkpoint_state(weights, checkpoint.get('task_state'))
        if task.has_ema():
            task.load_checkpoint_state(average, checkpoint.get('task_state_ema'), ema=True)
    if not weights_are_finite(task):
        raise UserError(f'{path}: not a checkpoint of train.py (its weights are not finite)')
    _check_same(run, path, digest_of(path), position)
    log.info(f'resuming from {path}: epoch {position.epoch}, update {position.update} of {run.updates_per_epoch}')
    _warn_of_changes(path, checkpoint, settings)
    learnt = _args(checkpoint).get('class_names')
    if line := other or data.unnamed(learnt, class_names, str(path), settings.get('class_map')):
        log.warning(f'warning: {line}')
    if saver is None:
        return position
    for before in damaged:
        set_aside(before)  # the next save would put it in the place of the whole one before it
    if is_of(path, saver.checkpoint_dir):
        saver.begin_from(path, position.epoch)
        if not other and checkpoint.get('saver'):
            saver.go_on(path, checkpoint, position)
            saver.restore_best(position)
        elif position.epoch < run.epochs:
            saver.leave_best('is the best of a ranking with which this run does not go on')
    return position


@contextlib.contextmanager
def fitting(path: Path) -> Iterator[None]:
    """What a checkpoint has other than the run becomes a UserError that names it."""
    try:
        yield
    except (KeyError, RuntimeError, ValueError) as error:
        raise UserError(
            f'{path} does not fit this run: {first_line(error)[:300]}; resume with the settings it was '
            f'written with, or the weights alone with --no-resume-opt'
        ) from error


def _args(checkpoint: Dict[str, Any]) -> Dict[str, Any]:
    """The settings that a checkpoint was written with."""
    return vars(checkpoint.get('args') or argparse.Namespace())


def _check_same(run: Run, path: Optional[Path], digest: str, position: Position) -> None:
    """SharedError unless all processes go on from the same bytes: a folder may have other names on other machines."""

    def differs(_: List[Any]) -> str:
        found = run.process.gather(f'{path}, {digest[:8]}' if path else 'none')
        return (
            f'the processes would continue from different checkpoints ({" and ".join(sorted(set(found)))}): '
            f'--output must be one folder that all machines see'
        )

    run.process.check_equal((digest, dataclasses.astuple(position)), differs)


NO_EFFECT = {  # settings that may change from start to start without changing what is trained
    'data_dir',
    'output',
    'experiment',
    'resume',
    'no_resume_opt',
    'device',
    'workers',
    'pin_mem',
    'stall_timeout',
    'log_interval',
    'log_wandb',
    'wandb_project',
    'wandb_tags',
    'wandb_resume_id',
    'checkpoint_interval',
    'checkpoint_hist',
    'val_interval',
    'max_skipped',
    'max_bad_images',
    'dry_run',
    'dataset_download',
    'num_classes',
    'validation_batch_size',
}


def _warn_of_changes(path: Path, checkpoint: Dict[str, Any], settings: Dict[str, Any]) -> None:
    """A warning that names the settings which differ from the checkpoint's."""
    before = _args(checkpoint)
    changed = [
        f'{name} {before[name]} → {value}'
        for name, value in settings.items()
        if name in before and name not in NO_EFFECT and before[name] != value
    ]
    if changed:
        log.warning(f"warning: other settings than those of {path}, this run's hold: {', '.join(changed)}")


def check_division(path: Path, checkpoint: Dict[str, Any], settings: Dict[str, Any]) -> None:
    """UserError where images that the run has seen would be held out for validation now."""
    before = _args(checkpoint)
    if before.get('val_fraction') is None and settings.get('val_fraction') is None:
        return
    held, now = ([about.get(name) for name in ('val_fraction', 'seed')] for about in (before, settings))
    if held != now:
        raise UserError(
            f'{path} held out val_fraction {held[0]} with seed {held[1]}, and this run would hold out {now[0]} with '
            f'seed {now[1]}, images that it has seen; give both as they were, or start a new run'
        )
    digests = [about['held_out_sha256'] for about in (before, settings) if 'held_out_sha256' in about]
    if len(set(digests)) > 1:
        raise UserError(
            f'{path} held out a part of {before.get("held_out_of")} images, and the folder has '
            f'{settings.get("held_out_of")} now: this run would hold out others, which it may have seen; give the '
            f'images as they were, or start a new run'
        )


def check_classes(
    path: Path, checkpoint: Dict[str, Any], class_names: Optional[Sequence[str]], weights_alone: bool = False
) -> Optional[str]:
    """A line, mostly None, on labels that mean other classes than those that the checkpoint has learnt. UserError
    where they are the same ones in another order, or where the run would go on with more than the weights."""
    other = data.other_classes(_args(checkpoint).get('class_names'), class_names, str(path))
    if not other:
        return None
    line = f'{path} has learnt other classes: {other}'
    if not weights_alone:
        raise UserError(
            f'{line}; continue with the data that it was written with, or take the weights alone with --no-resume-opt'
        )
    return f'{line}; the run goes on with its classifier, and ranks its epochs anew'


def check_ranking(path: Path, checkpoint: Dict[str, Any], eval_metric: str, folder: Path) -> None:
    """UserError where a run would compare its epochs with some that another metric has judged."""
    before = _args(checkpoint).get('eval_metric', eval_metric)
    judged = (checkpoint.get('metric'), (checkpoint.get('saver') or {}).get('best_metric'))
    if is_of(path, folder) and before != eval_metric and judged != (None, None):
        raise UserError(
            f'{path}: its epochs were judged by {before}, this run has --eval-metric {eval_metric}; continue with '
            f'--eval-metric {before}, or elsewhere with --resume {path} and another --experiment'
        )


def check_training(path: Path, checkpoint: Dict[str, Any], opt: str, teacher: Optional[Dict[str, Any]]) -> None:
    """UserError where a checkpoint was written with another optimizer or teacher (`Teacher.identity`) than this."""
    _check_optimizer(path, checkpoint, opt)
    _check_teacher(path, checkpoint, teacher)


def _check_optimizer(path: Path, checkpoint: Dict[str, Any], opt: str) -> None:
    """Weights alone, or another optimizer's state, are nothing to continue from."""
    if 'epoch' not in checkpoint or 'optimizer' not in checkpoint:
        raise UserError(
            f'--resume {path}: holds weights alone, no epoch or optimizer to continue from; start from '
            f'them with --initial-checkpoint'
        )
    before = _args(checkpoint).get('opt', opt)
    if before != opt:
        raise UserError(
            f'{path} was written with opt {before}, this run has {opt}; continue with --opt '
            f'{before}, or take the weights alone with --no-resume-opt'
        )


def _check_teacher(path: Path, checkpoint: Dict[str, Any], teacher: Optional[Dict[str, Any]]) -> None:
    before = _args(checkpoint).get('kd_teacher')
    if before != teacher:
        old, new = (' '.join(map(shown, it.values())) if isinstance(it, dict) else 'none' for it in (before, teacher))
        raise UserError(
            f'{path} was written with another teacher: {old}, and this run has {new}; continue with the same '
            f'--kd-model-name and weights, or take the weights alone with --no-resume-opt'
        )


def _load_optimizer(run: Run, checkpoint: Dict[str, Any]) -> None:
    """Optimizer and scaler. Raises ValueError, before anything is loaded, on a state that is not one of theirs."""
    check_states(checkpoint, run.optimizer, run.stepper)
    state, scaler = checkpoint['optimizer'], checkpoint.get(run.stepper.state_dict_key)
    if run.stepper.scaling and scaler is not None:
        kept = {name: scaler[name] for name in ('scale', '_growth_tracker')}
        run.stepper.load_state_dict({**run.stepper.state_dict(), **kept})
    for number, entry in state['state'].items():  # in a file two of them can share their memory
        state['state'][number] = {name: copy.deepcopy(value) for name, value in entry.items()}
    run.optimizer.load_state_dict(state)


def check_states(checkpoint: Dict[str, Any], optimizer: torch.optim.Optimizer, stepper: Stepper) -> None:
    """ValueError where the states of optimizer and scaler in a checkpoint are not those of a run with these. What the
    flags decide in it becomes the run's."""
    saved, updates, skipped = checkpoint.get('saver') or {}, checkpoint.get('epoch', -1) + 1, 0
    if 'position' in saved:
        position = Position(**saved['position'])
        updates, skipped = position.epoch * saved['plan']['updates_per_epoch'] + position.update, position.streak
    fit_state(checkpoint['optimizer'], optimizer, updates, skipped)
    scaler, before = checkpoint.get(stepper.state_dict_key), _args(checkpoint)
    if stepper.scaling and scaler is None and before.get('amp') and before.get('amp_dtype') == 'float16':
        raise ValueError('it lacks the scale of float16')
    if stepper.scaling and scaler is not None:
        scale, tracker = scaler.get('scale'), scaler.get('_growth_tracker')
        if not (is_number(scale) and 0 < scale <= torch.finfo().max and is_whole(tracker) and tracker < 2**31):
            raise ValueError(f'its scale of float16 is {scale}, after {tracker} updates')


def _position(path: Path, checkpoint: Dict[str, Any], run: Run) -> Position:
    """The place to go on from. Within an epoch it counts only where an update sees the same images as before."""
    saved = checkpoint.get('saver') or {}
    if 'position' not in saved:
        return Position(epoch=checkpoint.get('epoch', -1) + 1)
    position, then, now = Position(**saved['position']), saved['plan'], batches_of(run)
    changed = f'{path} was written by {then["processes"]} processes with {then["images_per_update"]} images an update'
    if position.update and then.get('images', now.get('images')) != now.get('images'):
        log.warning(
            f'warning: {path} was written with {then["images"]} images to train on, here there are {now["images"]}: '
            f'their order restarts at epoch {position.epoch}'
        )
        return Position(epoch=position.epoch)
    if position.update and any(then[key] != now[key] for key in ('images_per_update', 'updates_per_epoch')):
        log.info(
            f'{changed}, here {now["processes"]} have {now["images_per_update"]}: the order of the images '
            f'restarts at epoch {position.epoch}'
        )
        return Position(epoch=position.epoch)
    if run.bad is not None and any(index >= run.bad.indices for index in position.bad):
        raise UserError(
            f'{path} tells of bad image {max(position.bad)}, and this data set has {run.bad.images}: continue with the '
            f'data that it was written with'
        )
    if then['processes'] != now['processes']:
        log.info(
            f'{changed}, here there are {now["processes"]}: the images go on in the same order, what each process '
            f'draws for itself (mixup, erasing, drop path, noise) is another'
        )
    return position
