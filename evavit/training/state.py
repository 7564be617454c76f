"""Checkpoints: what is written, how it is written so that a crash leaves the last one whole, and how a run continues.

A run's folder holds `last.pth.tar`, `model_best.pth.tar` and the best few `checkpoint-EPOCH.pth.tar` (weights, average,
optimizer, scaler, settings), and the weights alone as `last.safetensors` and `model_best.safetensors`: the averaged
ones where the run keeps an average. Every epoch draws from seeds of its own, so a run continues alike without the
state of any random generator.
"""

import argparse
import json
import logging
import math
import os
import shutil
from pathlib import Path

import safetensors
import safetensors.torch
from timm.task import load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import CheckpointSaver, load_checkpoint_metadata, unwrap_model

from .errors import UserError, first_line
from .recipe import check_fit, read_weights

log = logging.getLogger(__name__)


class Saver(CheckpointSaver):
    """timm's CheckpointSaver; every file appears whole or not at all, and weights are also written as safetensors."""

    def __init__(self, task, optimizer, stepper, settings, class_names, folder):
        super().__init__(
            model=unwrap_model(task.get_trainable_module()),
            optimizer=optimizer,
            args=argparse.Namespace(**vars(settings), class_names=class_names),
            amp_scaler=stepper if stepper.scaling else None,
            checkpoint_dir=str(folder),
            recovery_dir=str(folder),
            decreasing=settings.eval_metric == "loss",
            max_history=settings.checkpoint_hist,
            task=task)

    def save_epoch(self, epoch, metric):
        """Write the state after `epoch`; returns the best metric and its epoch."""
        if not math.isfinite(metric):
            raise UserError(f"{self.args.eval_metric} {metric:g} after epoch {epoch}: not saved")
        best = self.save_checkpoint(epoch, metric)
        self._save_weights("last.safetensors", epoch, metric)
        if self.best_epoch == epoch:
            self._save_weights("model_best.safetensors", epoch, metric)
        return best

    def _save_weights(self, name, epoch, metric):
        model = unwrap_model(self.task.get_trainable_module(ema=self.task.has_ema()))
        weights = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
        path = Path(self.checkpoint_dir, name)
        partial = path.with_name(name + ".partial")
        about = dict(format="pt", epoch=str(epoch), metric=str(metric), args=json.dumps(vars(self.args)))
        safetensors.torch.save_file(weights, str(partial), metadata=about)
        # safetensors makes a file that only its owner can read
        shutil.copymode(Path(self.checkpoint_dir, "last.pth.tar"), partial)
        _flush(partial)
        os.replace(partial, path)

    def _save(self, save_path, epoch, metric=None):
        super()._save(save_path, epoch, metric)
        _flush(save_path)

    def _replace(self, src, dst):
        os.replace(src, dst)

    def _duplicate(self, src, dst):
        partial = f"{dst}.partial"
        Path(partial).unlink(missing_ok=True)
        super()._duplicate(src, partial)
        os.replace(partial, dst)


def _flush(path):
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def find_resume(settings, folder):
    """The checkpoint to continue from, or None for a fresh start. A folder that holds a run is not overwritten."""
    last = Path(folder, "last.pth.tar")
    if settings.resume and settings.resume != "auto":
        if not Path(settings.resume).is_file():
            raise UserError(f"--resume {settings.resume}: no such checkpoint")
        return Path(settings.resume)
    if settings.resume == "auto":
        log.info(f"resuming from {last}" if last.is_file() else f"no checkpoint in {folder} yet: starting fresh")
        return last if last.is_file() else None
    if last.exists():
        raise UserError(f"{folder} already holds a run: continue it with --resume auto, or choose another --experiment")
    return None


def resume(path, task, optimizer, stepper, saver, settings):
    """Restore weights, average, optimizer and scaler. Returns the epoch to go on with."""
    check_fit(unwrap_model(task.get_trainable_module()), read_weights(path, use_ema=False), path)
    full = not settings.no_resume_opt
    try:
        if full:
            _check_optimizer(path, settings)
        epoch = resume_task_checkpoint(
            task, str(path),
            optimizer=optimizer if full else None,
            loss_scaler=stepper if full and stepper.scaling else None,
            log_info=False)
        if task.has_ema():
            load_task_ema_checkpoint(task, str(path))
    except (KeyError, RuntimeError, ValueError) as error:
        raise UserError(f"{path} does not fit this run: {first_line(error)[:300]}; resume with the settings it was "
                        f"written with, or the weights alone with --no-resume-opt") from error
    if saver is not None and path.resolve().parent == Path(saver.checkpoint_dir).resolve():
        saver.load_state_dict_from_checkpoint(str(path))
        if saver.best_metric is not None and math.isnan(saver.best_metric):
            saver.best_metric = saver.best_epoch = None
    return epoch or 0


def _check_optimizer(path, settings):
    """Weights alone, or another optimizer's state, are nothing to continue from."""
    saved = {} if path.suffix == ".safetensors" else load_checkpoint_metadata(str(path))
    if not isinstance(saved, dict) or "epoch" not in saved or "optimizer" not in saved:
        raise UserError(f"--resume {path}: holds weights alone, no epoch or optimizer to continue from; start from "
                        f"them with --initial-checkpoint")
    before = getattr(saved.get("args"), "opt", settings.opt)
    if before != settings.opt:
        raise UserError(f"{path} was written with opt {before}, this run has {settings.opt}; continue with --opt "
                        f"{before}, or take the weights alone with --no-resume-opt")


def saved_settings(path):
    """The settings that train.py stored in a checkpoint, {} for a file of other origin."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such checkpoint")
    path = str(path)
    try:
        if path.endswith(".safetensors"):
            with safetensors.safe_open(path, framework="pt") as file:
                return json.loads((file.metadata() or {}).get("args", "{}"))
        checkpoint = load_checkpoint_metadata(path)
    except Exception as error:  # each format has its own errors for a broken file
        raise UserError(f"{path}: not a readable checkpoint ({first_line(error)[:200]})") from error
    args = checkpoint.get("args") if isinstance(checkpoint, dict) else None
    return vars(args) if isinstance(args, argparse.Namespace) else {}


def has_average(path):
    return load_checkpoint_metadata(str(path)).get("state_dict_ema") is not None
