"""One epoch of training from any update of it, and one pass of evaluation."""

import contextlib
import dataclasses
import logging
import math
import resource
import sys
import time
from datetime import timedelta
from typing import Any

import torch
from timm.task import evaluation_sample_limit
from timm.utils import NativeScaler, dispatch_clip_grad
from torch.nn.parallel import DistributedDataParallel

from evavit.errors import Preempted, UserError
from evavit.training.data.images import UNREADABLE

from .distributed import Draw

log = logging.getLogger(__name__)


@dataclasses.dataclass
class Position:
    """Where a run stands and what its epoch has added up so far; a checkpoint holds all of it.

    With the run's seed it decides every draw to come: the order of the images, their augmentation, erasing, mixup, drop
    path and EVA's noise start anew from (seed, epoch, place in the epoch), so no generator's state has to be kept.
    """

    epoch: int = 0
    update: int = 0  # updates of this epoch that are done, skipped ones too
    lr: float = 0.0  # learning rate of the epoch's first update
    loss: float = 0.0  # sums over the updates that were not skipped
    grad_norm: float = 0.0
    skipped: int = 0  # updates of this epoch whose loss or gradient was not finite
    streak: int = 0  # the same, in a row up to now
    bad: dict = dataclasses.field(default_factory=dict)  # unreadable images of this epoch, see `images.BadImages.met`
    seconds: float = 0.0  # time spent in this epoch, and the part of it in which the host waited for data
    waited: float = 0.0

    def next_epoch(self):
        return Position(epoch=self.epoch + 1, streak=self.streak)


@dataclasses.dataclass
class Run:
    """What the loop works with."""

    task: Any
    optimizer: Any
    stepper: Any
    schedule: Any
    mixup: Any
    settings: Any
    process: Any
    bad: Any  # the training set's `images.BadImages`
    updates_per_epoch: int
    epochs: int
    images_per_update: int

    def done(self, position):
        """Updates since the run's first one."""
        return position.epoch * self.updates_per_epoch + position.update


class Stepper(NativeScaler):
    """timm's NativeScaler with the gradient norm as its result. A step that is not finite is skipped in any precision;
    the scale moves under float16 and is 1 otherwise."""

    def __init__(self, settings, device):
        self.scaling = settings.amp and settings.amp_dtype == 'float16'
        self.clip_grad, self.clip_mode = settings.clip_grad, settings.clip_mode
        self._scaler = torch.amp.GradScaler(device.type, **({} if self.scaling else dict(init_scale=1.0)))

    def backward(self, loss):
        self._scaler.scale(loss).backward()

    def step(self, optimizer, loss, parameters, clip_parameters):
        """Clip, update, clear the gradients; returns the norm of the gradient before clipping.

        A loss or gradient that is not finite leaves the weights and the optimizer's state as they are. The host does
        not wait for that answer where the optimizer is fused (see `recipe.build_optimizer`).
        """
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        # The scaler looks at gradients alone: one of them tells it of a loss or norm that is not finite.
        gradients[0].add_(0 * (loss + norm))
        scale = self._scaler.scale(torch.ones_like(norm))
        self._scaler.unscale_(optimizer)
        if self.clip_grad is not None:
            dispatch_clip_grad(clip_parameters, self.clip_grad, mode=self.clip_mode)
        self._scaler.step(optimizer)
        self._scaler.update(None if self.scaling else 1.0)
        optimizer.zero_grad()
        return norm / scale


class Figures:
    """Figures of an update, read back one update late on a GPU, so that the host never waits for the step under way."""

    def __init__(self):
        self.pending = None

    def put(self, about, values):
        """Hand in the figures of an update; returns those that are ready, as (about, list of floats), or None."""
        if values.device.type != 'cuda':
            return about, values.tolist()
        ready = self.take()
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        self.pending = about, host, copied
        return ready

    def take(self):
        if self.pending is None:
            return None
        about, host, copied = self.pending
        self.pending = None
        copied.synchronize()
        return about, host.tolist()


class Progress:
    """One line that renews itself on a terminal, a line every `interval` steps elsewhere."""

    def __init__(self, total, interval, shown):
        self.total, self.interval, self.shown = total, interval, shown
        self.live = shown and sys.stdout.isatty()
        self.last = 0.0

    def show(self, done, text):
        text = f'{text[0]} {done}/{self.total}  {text[1]}'
        if self.live and (time.monotonic() - self.last > 0.1 or done == self.total):
            self.last = time.monotonic()
            print(f'\r\033[K{text}', end='\n' if done == self.total else '', flush=True)
        elif self.shown and not self.live and (done % self.interval == 0 or done == self.total):
            log.info(text)


def autocast(settings, device):
    return torch.autocast(device.type, dtype=getattr(torch, settings.amp_dtype), enabled=settings.amp)


class Ledger:
    """Enters the figures of each update into the position, shows them, and stops a run that has lost its numbers."""

    def __init__(self, run, position, write):
        self.run, self.position, self.write = run, position, write
        self.progress = Progress(run.updates_per_epoch, run.settings.log_interval, run.process.primary)
        self.began = self.mark = self.entered = time.monotonic()
        self.first = self.marked = position.update
        self.waited = self.waited_before = 0.0

    @contextlib.contextmanager
    def waiting(self):
        start = time.monotonic()
        yield
        self.waited += time.monotonic() - start

    def enter(self, ready):
        """Take in the figures of one update, if there are any. Returns what was asked for with it: (save, stop)."""
        if ready is None:
            return False, False
        (update, lr), (loss, norm, save, stop) = ready
        run, position, settings = self.run, self.position, self.run.settings
        now = time.monotonic()
        position.update = done = update + 1
        position.seconds += now - self.entered
        position.waited += self.waited
        self.waited_before += self.waited
        self.entered, self.waited = now, 0.0
        if math.isfinite(loss) and math.isfinite(norm):
            position.loss, position.grad_norm, position.streak = position.loss + loss, position.grad_norm + norm, 0
        else:
            self._skip(update, lr, loss, norm)
        window = max(now - self.mark, 1e-9)
        rate, share = (done - self.marked) * run.images_per_update / window, self.waited_before / window
        if done % settings.log_interval == 0 or done == run.updates_per_epoch:
            scalars = dict(
                loss=loss,
                lr=lr,
                grad_norm=norm,
                images_per_second=rate,
                data_wait=share,
                memory_gib=memory(run.process.device),
                skipped=position.skipped,
            )
            for name, value in scalars.items():
                self.write(run.done(position), f'train/{name}', value)
        per_update = (now - self.began) / (done - self.first)
        left = timedelta(seconds=round(per_update * (run.epochs * run.updates_per_epoch - run.done(position))))
        self.progress.show(
            done,
            (
                f'epoch {position.epoch}',
                f'loss {loss:.4f}  lr {lr:.3g}  gradient {norm:.3g}  {rate:.0f} img/s  data '
                f'{100 * share:.0f} %  {left} left',
            ),
        )
        if done % settings.log_interval == 0:
            self.mark, self.marked, self.waited_before = now, done, 0.0
        return save > 0, stop > 0

    def _skip(self, update, lr, loss, norm):
        position, limit = self.position, self.run.settings.max_skipped
        position.skipped, position.streak = position.skipped + 1, position.streak + 1
        where = (
            f'loss {loss:g}, gradient norm {norm:g} in update {update} of epoch {position.epoch} (update '
            f'{self.run.done(position) - 1} of the run, lr {lr:g})'
        )
        if position.streak < limit:
            log.warning(f'{where}: skipped, {position.streak} in a row')
            return
        raise UserError(
            f'{where}, {position.streak} in a row: stopped, the last checkpoint is kept; try a lower --lr, '
            f'--clip-grad, or --amp-dtype bfloat16'
        )


def memory(device):
    """Most memory in use so far, in GiB: the tensors' on a GPU, else the process's."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == 'darwin' else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def train_epoch(run, position, batches, requests, write, keep):
    """Train from `position` to the end of its epoch, moving `position` along. Returns the epoch's figures.

    `batches` begins with the position's, and `run.bad` with the bad images that the position knows.
    `write(update, name, value)` takes the scalars every `log_interval` updates, `keep(position)` saves where `requests`
    asks for it, which all processes learn in the same update. An update that is not finite is skipped.

    Raises:
        UserError: `max_skipped` updates in a row were not finite, too many images were unreadable, or the data ended.
        Preempted: a signal asked to stop; the state has been kept.
    """
    task, settings, process = run.task, run.settings, run.process
    task.train()
    if settings.linear_probe:
        # The frozen parts give the features that they give in use: no noise, no dropped paths, no new statistics.
        for module in task.get_trainable_module().modules():
            if not any(p.requires_grad for p in module.parameters()):
                module.eval()
    if run.mixup is not None and settings.mixup_off_epoch:
        run.mixup.mixup_enabled = position.epoch < settings.mixup_off_epoch
    parameters = list(task.get_trainable_module().parameters())
    epoch, steps = position.epoch, settings.grad_accum_steps
    ledger, figures = Ledger(run, position, write), Figures()
    if position.update == 0:
        position.lr = run.optimizer.param_groups[0]['lr']

    def serve(asked):
        if not any(asked):
            return
        ledger.enter(figures.take())  # everything that the weights have seen is in the position
        run.bad.review(process)
        position.bad = dict(run.bad.met)
        keep(position)
        if asked[1]:
            process.wait()  # for the first process to have written
            raise Preempted(
                f'asked to stop: epoch {epoch}, update {position.update} of {run.updates_per_epoch}; go on '
                f'with --resume auto'
            )

    for update in range(position.update, run.updates_per_epoch):
        loss = torch.zeros((), device=process.device)
        for step in range(steps):
            with ledger.waiting():
                images, target = next(batches, (None, None))
            if images is None:
                raise UserError(
                    f'the training data ended before update {update} of {run.updates_per_epoch}; '
                    f'set --train-num-samples'
                )
            process.seed(settings.seed, Draw.STEP, epoch, update * steps + step)
            if settings.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            if run.mixup is not None:
                images, target = run.mixup(images, target)
            with task.no_sync() if step + 1 < steps else contextlib.nullcontext():
                loss += _forward_backward(run, images, target)
        asked = requests.now(epoch * run.updates_per_epoch + update + 1, update + 1 == run.updates_per_epoch)
        loss, save, stop = process.mean(torch.stack((loss, *(loss.new_full((), float(flag)) for flag in asked))))
        norm = run.stepper.step(
            run.optimizer, loss, parameters, task.get_clip_parameters(exclude_head='agc' in settings.clip_mode)
        )
        task.update_ema(step=epoch * run.updates_per_epoch + update + 1)
        about = update, run.optimizer.param_groups[0]['lr']
        if run.schedule is not None:
            run.schedule.step_update(epoch * run.updates_per_epoch + update + 1)
        done = update + 1
        run.bad.review(process, together=done % settings.log_interval == 0 or done == run.updates_per_epoch)
        serve(ledger.enter(figures.put(about, torch.stack((loss, norm.float(), save, stop)))))
    serve(ledger.enter(figures.take()))
    counted, seconds = position.update - position.skipped, max(position.seconds, 1e-9)
    return dict(
        loss=position.loss / counted if counted else math.nan,
        grad_norm=position.grad_norm / counted if counted else math.nan,
        skipped=position.skipped,
        bad_images=len(run.bad.met),
        images_per_second=position.update * run.images_per_update / seconds,
        data_wait=position.waited / seconds,
    )


def weights_are_finite(task):
    """Of parameters and buffers, such as the running statistics of a batch norm; those of the average too."""
    modules = [task.get_trainable_module()] + ([task.get_trainable_module(ema=True)] if task.has_ema() else [])
    return torch.stack(
        [
            value.isfinite().all()
            for module in modules
            for value in module.state_dict().values()
            if value.is_floating_point()
        ]
    ).all()


def check_finite(task, judged, process, epoch, lr):
    """After an epoch, before it is saved: figures or weights that are not finite are a UserError in all processes.

    The update that breaks the weights shows in the next one's loss; the last of an epoch has no next one.
    """
    bad = [f'validation {name} {value:g}' for name, value in judged.items() if not math.isfinite(value)]
    if process.mean(weights_are_finite(task).float()) < 1:
        bad.append('weights that are not finite')
    if bad:
        raise UserError(
            f'{", ".join(bad)} after epoch {epoch} (lr {lr:g}): stopped, the last checkpoint is kept; try '
            f'a lower --lr, --clip-grad, or --amp-dtype bfloat16'
        )


def _forward_backward(run, images, target):
    with autocast(run.settings, run.process.device):
        loss = run.task(images, target)['loss'] / run.settings.grad_accum_steps
    run.stepper.backward(loss)
    return loss.detach()


@torch.no_grad()
def evaluate(model, loader, evaluator_of, settings, process, name='validation', first_batch=None):
    """Loss, top-1 and top-5 (percent) over every image once, whatever the number of processes. Unreadable images are
    left out: the number of images that comes back with the metrics is without them.

    `first_batch(images, target, output)` is called with the first batch.
    """
    model.eval()
    if isinstance(model, DistributedDataParallel):
        model = model.module
    evaluator = evaluator_of(max_samples=None)
    bad, left = loader.dataset.bad, evaluation_sample_limit(loader)
    bad.begin()
    progress = Progress(len(loader), settings.log_interval, process.primary)
    for step, (images, target) in enumerate(loader, 1):
        if settings.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with autocast(settings, process.device):
            output = model(images)
        if left is not None:  # what comes after it makes the processes even
            images, output, target, left = images[:left], output[:left], target[:left], max(0, left - len(target))
        if bad.count:
            readable = target != UNREADABLE
            images, output, target = images[readable], output[readable], target[readable]
            bad.review(process, together=False)
        evaluator.update(output, target)
        if first_batch is not None and len(images):
            first_batch(images, target, output)
            first_batch = None
        if progress.live:
            running = evaluator.summary()
            progress.show(step, (name, f'loss {running["loss"]:.4f}  top-1 {running["top1"]:.2f}'))
    bad.review(process)
    images = evaluator.counts[0].clone()
    if process.distributed:
        torch.distributed.all_reduce(images)
    if not images:
        raise UserError(f'{name}: none of its {len(loader.dataset)} images can be read; there is nothing to judge by')
    return dict(evaluator.compute(distributed=process.distributed)), int(images)
