"""Checkpoints: what is written, how it is written so that a crash leaves the last one whole, and how a run continues.

A run's folder holds `last.pth.tar` and the one before it, `previous.pth.tar`; `model_best.pth.tar` and the best few
`checkpoint-EPOCH.pth.tar` (weights, average, optimizer, scaler, settings, position); and the weights alone as
`last.safetensors` and `model_best.safetensors`: the averaged ones where the run keeps an average. Every draw follows
from the run's seed and position (see `loop.Position`), so a run continues alike without the state of any generator.
"""

import argparse
import dataclasses
import json
import logging
import math
import os
import shutil
import socket
import zipfile
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Set, Tuple, Union

import safetensors
import safetensors.torch
import torch
from timm.models import clean_state_dict
from timm.utils import CheckpointSaver, load_checkpoint_metadata, unwrap_model
from torch import nn

from evavit.errors import LocalError, UserError, first_line, reason_of
from evavit.files import replacing, sync_folder
from evavit.training.build import check_fit, load_weights, read_weights
from evavit.training.config import ExportConfig, ValidateConfig, WeightsConfig
from evavit.training.loop import Position, Run, weights_are_finite

log = logging.getLogger(__name__)

# What tells how a checkpoint is to be used, wherever no flag says otherwise.
FROM_CHECKPOINT = (
    'model',
    'num_classes',
    'in_chans',
    'img_size',
    'input_size',
    'crop_pct',
    'mean',
    'std',
    'interpolation',
)


@contextmanager
def saving(path: Union[str, Path]) -> Iterator[Path]:
    """`files.replacing`, on the disk before it returns; errors of the write become a LocalError that names the file."""
    try:
        with replacing(path, durable=True) as partial:
            yield partial
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:  # PyTorch's own for a write that fails
        raise LocalError(
            f'{path}: cannot be written ({reason_of(error)}); '
            f'what was saved before is whole: make room and go on with --resume auto'
        ) from error


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """While the context lasts, or until this process ends in whatever way, no other run can lock the folder.

    The loading processes that it starts do not hold the lock.

    Raises:
        UserError: The folder cannot be made.
        LocalError: Another run is writing there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / '.lock').touch()
    except OSError as error:
        raise UserError(f'--output {folder}: cannot be written ({error.strerror})') from error
    with open(folder / '.lock', 'r+', encoding='utf-8') as file:
        try:
            import fcntl  # not on every system

            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise LocalError(
                f'{folder}: another run is writing there ({file.read(200)}); let it end, or give another --experiment'
            ) from None
        except (ImportError, OSError):  # a system, or a file system, without locks
            log.debug(f'{folder} cannot be locked')
        file.truncate(0)
        file.write(f'process {os.getpid()} on {socket.gethostname()}')
        file.flush()
        yield


class Saver(CheckpointSaver):
    """timm's CheckpointSaver; every file appears whole or not at all, and weights are also written as safetensors."""

    def __init__(self, run: Run, settings: Dict[str, Any], class_names: Optional[List[str]], folder: Path):
        super().__init__(
            model=unwrap_model(run.task.get_trainable_module()),
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

    def save_epoch(self, position: Position, metric: float) -> Tuple[float, int]:
        """Write the state at the start of an epoch, with the metric of the one before; returns the best and its epoch.

        To do it twice changes nothing: a run that was killed on the way does it again when it resumes.
        """
        self.position, epoch = position, position.epoch - 1
        if not math.isfinite(metric):
            raise UserError(f'{self.args.eval_metric} {metric:g} after epoch {epoch}: not saved')
        best = self.save_checkpoint(epoch, metric)
        self._save_weights('last.safetensors', epoch, metric)
        if self.best_epoch == epoch:
            self._save_weights('model_best.safetensors', epoch, metric)
        return best

    def save_position(self, position: Position) -> None:
        """Write the state within an epoch, unless its numbers have gone bad."""
        if position.streak or not weights_are_finite(self.task):
            log.warning(
                f'update {position.update} of epoch {position.epoch} is not saved: loss, gradient or weights '
                f'are not finite'
            )
            return
        self.position = position
        whole = str(self.last.with_name('tmp.pth.tar'))
        self._save(whole, position.epoch - 1)
        self._replace(whole, str(self.last))

    def state_dict(self, epoch: Optional[int] = None, metric: Optional[float] = None) -> Dict[str, Any]:
        position = dataclasses.asdict(self.position)
        return {**super().state_dict(epoch, metric), 'position': position, 'plan': self.batches}

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        super().load_state_dict({**state_dict, 'pending': (None, None)})
        if self.best_metric is not None and math.isnan(self.best_metric):
            self.best_metric = self.best_epoch = None

    def _save_weights(self, name: str, epoch: int, metric: float) -> None:
        model = unwrap_model(self.task.get_trainable_module(ema=self.task.has_ema()))
        weights = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
        about = dict(format='pt', epoch=str(epoch), metric=str(metric), args=json.dumps(vars(self.args)))
        with saving(self.last.with_name(name)) as partial:
            safetensors.torch.save_file(weights, str(partial), metadata=about)
            shutil.copymode(self.last, partial)  # safetensors makes a file that only its owner can read

    def _save(self, save_path: str, epoch: int, metric: Optional[float] = None) -> None:
        with saving(save_path) as partial, open(partial, 'wb') as file:
            # An open file: given a name, torch up to 2.8 says nothing of a disk that fills with the last 8 KiB.
            super()._save(file, epoch, metric)

    def _replace(self, src: str, dst: str) -> None:
        if os.path.exists(dst):
            self._duplicate(dst, self.last.with_name('previous.pth.tar'))
        os.replace(src, dst)
        sync_folder(self.checkpoint_dir)

    def _duplicate(self, src: Union[str, Path], dst: Union[str, Path]) -> None:
        with saving(dst) as partial:
            super()._duplicate(src, partial)


def batches_of(run: Run) -> Dict[str, int]:
    """What decides which images an update sees; a checkpoint holds it under the key `plan`."""
    return dict(
        images_per_update=run.images_per_update,
        updates_per_epoch=run.updates_per_epoch,
        processes=run.process.world_size,
    )


def find_resume(resume: Optional[str], folder: Path) -> List[Path]:
    """The checkpoints to continue from, in the order to try them; none for a fresh start.

    A folder that holds a run is not overwritten, unless the run goes on from one of its own checkpoints.
    """
    if resume and resume != 'auto':
        chosen = Path(resume)
        if not chosen.is_file():
            raise UserError(f'--resume {chosen}: no such checkpoint')
        if (folder / 'last.pth.tar').is_file() and chosen.resolve().parent != folder.resolve():
            raise UserError(f'{folder} holds another run than --resume {chosen}: choose another --experiment')
        return [chosen]
    kept = sorted(folder.glob('checkpoint-*.pth.tar'), key=lambda path: path.stat().st_mtime, reverse=True)
    found = [path for path in (folder / 'last.pth.tar', folder / 'previous.pth.tar', *kept) if path.is_file()]
    if found and resume != 'auto':
        raise UserError(f'{folder} already holds a run: continue it with --resume auto, or choose another --experiment')
    if not found and resume == 'auto':
        log.info(f'no checkpoint in {folder} yet: starting fresh')
    return found


def resume(candidates: List[Path], run: Run, settings: Dict[str, Any], saver: Optional[Saver]) -> Position:
    """Restore weights, average, optimizer and scaler from the first candidate that is whole.

    Args:
        candidates: From `find_resume`.
        run: The run to go on with.
        settings: All of its settings by their names, to tell which have changed.
        saver: That of the first process, whose ranking of checkpoints is restored; None in the others.

    Returns:
        Where the run goes on: its beginning where there is no candidate.

    Raises:
        UserError: None is whole, one does not fit this run, or the processes do not see the same one.
    """
    if not candidates:
        _check_same(run, 'none', Position())
        return Position()
    path, checkpoint, damaged = _first_whole(candidates)
    task = run.task
    check_fit(unwrap_model(task.get_trainable_module()), clean_state_dict(checkpoint['state_dict']), path)
    full = not run.config.no_resume_opt
    if full:
        _check_optimizer(path, checkpoint, settings['opt'])
    try:
        task.load_checkpoint_state(clean_state_dict(checkpoint['state_dict']), checkpoint.get('task_state'))
        if task.has_ema():
            average = checkpoint.get('state_dict_ema') or checkpoint['state_dict']
            task.load_checkpoint_state(clean_state_dict(average), checkpoint.get('task_state_ema'), ema=True)
        if full:
            _load_optimizer(run, checkpoint)
    except (KeyError, RuntimeError, ValueError) as error:
        raise UserError(
            f'{path} does not fit this run: {first_line(error)[:300]}; resume with the settings it was '
            f'written with, or the weights alone with --no-resume-opt'
        ) from error
    position = _position(path, checkpoint, run)
    _check_same(run, path, position)
    log.info(f'resuming from {path}: epoch {position.epoch}, update {position.update} of {run.updates_per_epoch}')
    _warn_of_changes(path, checkpoint, settings)
    if saver is not None:
        _set_aside(damaged)
    if saver is not None and path.resolve().parent == Path(saver.checkpoint_dir).resolve() and 'saver' in checkpoint:
        saver.load_state_dict(checkpoint['saver'])
        if not position.update and checkpoint.get('metric') is not None:
            saver.save_epoch(position, checkpoint['metric'])
    return position


def _check_same(run: Run, path: Union[str, Path], position: Position) -> None:
    run.process.check_equal(
        (str(path), dataclasses.astuple(position)),
        lambda seen: (
            f'the processes would continue from different checkpoints '
            f'({" and ".join(sorted({one[0] for one in seen}))}): '
            f'--output must be one folder that all machines see'
        ),
    )


NO_EFFECT = {  # settings that may change from start to start without changing what is trained
    'data_dir',
    'output',
    'experiment',
    'resume',
    'no_resume_opt',
    'device',
    'workers',
    'pin_mem',
    'log_interval',
    'checkpoint_interval',
    'checkpoint_hist',
    'max_skipped',
    'max_bad_images',
    'dry_run',
    'dataset_download',
    'num_classes',
    'validation_batch_size',
}


def _warn_of_changes(path: Path, checkpoint: Dict[str, Any], settings: Dict[str, Any]) -> None:
    """A warning that names the settings which differ from the checkpoint's."""
    args = checkpoint.get('args')
    before = vars(args) if isinstance(args, argparse.Namespace) else {}
    changed = [
        f'{name} {before[name]} → {value}'
        for name, value in settings.items()
        if name in before and name not in NO_EFFECT and before[name] != value
    ]
    if changed:
        log.warning(f"warning: other settings than those of {path}, this run's hold: {', '.join(changed)}")


def _set_aside(damaged: List[Path]) -> None:
    """Else the next save would put the damaged last checkpoint in the place of the whole one before it."""
    for path in damaged:
        os.replace(path, f'{path}.damaged')


def _first_whole(candidates: List[Path]) -> Tuple[Path, Dict[str, Any], List[Path]]:
    """The path and content of the first whole checkpoint, and the paths before it."""
    for number, path in enumerate(candidates):
        try:
            return path, read_checkpoint(path), candidates[:number]
        except UserError as error:
            if number + 1 == len(candidates):
                raise
            log.warning(f'{error}: going back to {candidates[number + 1].name}, the one before')
    raise ValueError('no candidates')


def read_checkpoint(path: Path) -> Dict[str, Any]:
    """A checkpoint of a run, whole: every part of the file has the checksum that was written with it.

    Raises:
        UserError: The file is cut short, damaged, of another kind, or carries code.
    """
    if path.suffix == '.safetensors':
        raise UserError(
            f'--resume {path}: holds weights alone, no epoch or optimizer to continue from; start from '
            f'them with --initial-checkpoint'
        )
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()
        if damaged:
            raise UserError(f'{path}: not a readable checkpoint (its part {damaged} is damaged)')
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except UserError:
        raise
    except Exception as error:  # each format has its own errors for a broken file
        raise UserError(f'{path}: not a readable checkpoint ({first_line(error)[:200]})') from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get('state_dict'), dict):
        raise UserError(f'{path}: not a checkpoint of train.py (it has no state_dict)')
    saved = checkpoint.get('saver') or {}
    try:
        if 'position' in saved:
            Position(**saved['position'])
            changed: Any = saved['plan'].keys() ^ {'images_per_update', 'updates_per_epoch', 'processes'}
        else:
            changed = set() if isinstance(checkpoint.get('epoch', -1), int) else {'epoch'}
    except (AttributeError, KeyError, TypeError) as error:
        changed = first_line(error)
    if changed:
        raise UserError(f'{path}: not a checkpoint of this train.py (its position is of another form: {changed})')
    return checkpoint


def _check_optimizer(path: Path, checkpoint: Dict[str, Any], opt: str) -> None:
    """Weights alone, or another optimizer's state, are nothing to continue from."""
    if 'epoch' not in checkpoint or 'optimizer' not in checkpoint:
        raise UserError(
            f'--resume {path}: holds weights alone, no epoch or optimizer to continue from; start from '
            f'them with --initial-checkpoint'
        )
    before = getattr(checkpoint.get('args'), 'opt', opt)
    if before != opt:
        raise UserError(
            f'{path} was written with opt {before}, this run has {opt}; continue with --opt '
            f'{before}, or take the weights alone with --no-resume-opt'
        )


# What the flags decide in an optimizer; "fused" follows the device, see `build.build_optimizer`.
FROM_FLAGS = ('lr', 'initial_lr', 'weight_decay', 'betas', 'eps', 'momentum', 'fused')


def _load_optimizer(run: Run, checkpoint: Dict[str, Any]) -> None:
    state, groups = checkpoint['optimizer'], run.optimizer.param_groups
    if len(groups) != len(state['param_groups']):
        raise ValueError(
            f'it has {len(state["param_groups"])} groups of parameters, this run {len(groups)} '
            f'(--layer-decay, --weight-decay 0)'
        )
    for group, saved in zip(groups, state['param_groups'], strict=True):
        saved.update((name, group[name]) for name in FROM_FLAGS if name in group)
    run.optimizer.load_state_dict(state)
    scaler = checkpoint.get(run.stepper.state_dict_key)
    if run.stepper.scaling and scaler is not None:
        run.stepper.load_state_dict(scaler)


def _position(path: Path, checkpoint: Dict[str, Any], run: Run) -> Position:
    """The place to go on from. Within an epoch it counts only where an update sees the same images as before."""
    saved = checkpoint.get('saver') or {}
    if 'position' not in saved:
        return Position(epoch=checkpoint.get('epoch', -1) + 1)
    position, then, now = Position(**saved['position']), saved['plan'], batches_of(run)
    changed = f'{path} was written by {then["processes"]} processes with {then["images_per_update"]} images an update'
    if position.update and any(then[key] != now[key] for key in ('images_per_update', 'updates_per_epoch')):
        log.info(
            f'{changed}, here {now["processes"]} have {now["images_per_update"]}: the order of the images '
            f'restarts at epoch {position.epoch}'
        )
        return Position(epoch=position.epoch)
    if then['processes'] != now['processes']:
        log.info(
            f'{changed}, here there are {now["processes"]}: the images go on in the same order, what each process '
            f'draws for itself (mixup, erasing, drop path, noise) is another'
        )
    return position


def saved_settings(path: Union[str, Path]) -> Dict[str, Any]:
    """The settings that train.py stored in a checkpoint, {} for a file of other origin."""
    if not Path(path).is_file():
        raise UserError(f'{path}: no such checkpoint')
    path = str(path)
    try:
        if path.endswith('.safetensors'):
            with safetensors.safe_open(path, framework='pt') as file:
                return json.loads((file.metadata() or {}).get('args', '{}'))
        # What train.py writes is a zip archive. Anything else, older files of PyTorch's too, has no settings; whether
        # it has weights is for who reads those to say.
        checkpoint = load_checkpoint_metadata(path) if zipfile.is_zipfile(path) else {}
    except Exception as error:  # each format has its own errors for a broken file
        read_weights(path)
        raise UserError(f'{path}: not a readable checkpoint ({first_line(error)[:200]})') from error
    args = checkpoint.get('args') if isinstance(checkpoint, dict) else None
    return vars(args) if isinstance(args, argparse.Namespace) else {}


def has_average(path: Union[str, Path]) -> bool:
    return zipfile.is_zipfile(path) and load_checkpoint_metadata(str(path)).get('state_dict_ema') is not None


def stored_metric(path: Union[str, Path]) -> Optional[float]:
    """What a checkpoint was ranked by, None where that is not in the file."""
    saved_settings(path)  # a file that cannot be read ends in one line here
    if str(path).endswith('.safetensors'):
        with safetensors.safe_open(str(path), framework='pt') as file:
            metric = (file.metadata() or {}).get('metric')
        return None if metric in (None, 'None') else float(metric)
    checkpoint = load_checkpoint_metadata(str(path)) if zipfile.is_zipfile(path) else {}
    return checkpoint.get('metric') if isinstance(checkpoint, dict) else None


def complete_from_checkpoint(config: Union[ValidateConfig, ExportConfig], given: Set[str]) -> Optional[List[str]]:
    """Fill in what no flag said from the settings that the checkpoint carries. Returns its class names, if any."""
    model, path = config.model, config.weights.checkpoint
    saved = saved_settings(path) if path else {}
    kwargs = dict(saved.get('model_kwargs') or {})
    if given & {'img_size', 'input_size'}:  # either says the size, of which the run may have told the model itself
        given = given | {'img_size', 'input_size'}
        kwargs.pop('img_size', None)
    for name in FROM_CHECKPOINT:
        if name not in given and name in saved:
            setattr(model, name, saved[name])
    if not saved or model.model == saved.get('model'):
        model.model_kwargs = {**kwargs, **(model.model_kwargs or {})}
    return saved.get('class_names')


def load_checkpoint(model: nn.Module, config: WeightsConfig) -> None:
    """Load the weights that the settings name, if they do, fitted to the model as `build.load_weights` does it."""
    path = config.checkpoint
    if not path:
        return
    if config.use_ema:
        read_weights(path)  # says what is wrong with a file that cannot be read
        if not has_average(path):
            raise UserError(f'--use-ema: {path} holds no averaged weights; leave the flag out')
    load_weights(model, path, use_ema=config.use_ema)
