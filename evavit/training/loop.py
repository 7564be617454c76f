"""One epoch of training, and one pass of evaluation."""

import logging
import math
import sys
import time

import torch
from timm.task import evaluation_sample_limit
from timm.utils import NativeScaler, dispatch_clip_grad
from torch.nn.parallel import DistributedDataParallel

from .errors import UserError
from .images import UNREADABLE

log = logging.getLogger(__name__)


class Stepper(NativeScaler):
    """timm's NativeScaler with the gradient norm as its result; without float16 it scales by 1 and skips no step."""

    def __init__(self, settings, device):
        self.scaling = settings.amp and settings.amp_dtype == "float16"
        self.clip_grad, self.clip_mode = settings.clip_grad, settings.clip_mode
        self._scaler = torch.amp.GradScaler(device.type, enabled=self.scaling)

    def backward(self, loss):
        self._scaler.scale(loss).backward()

    def step(self, optimizer, parameters, clip_parameters):
        """Clip, update, clear the gradients. Returns the norm of the gradient before clipping."""
        self._scaler.unscale_(optimizer)
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.clip_grad is not None:
            dispatch_clip_grad(clip_parameters, self.clip_grad, mode=self.clip_mode)
        self._scaler.step(optimizer)
        self._scaler.update()
        optimizer.zero_grad()
        return norm


class Figures:
    """Figures of an update, read back one update late on a GPU, so that the host never waits for the step under way."""

    def __init__(self):
        self.pending = None

    def put(self, update, values):
        """Hand in the figures of this update; returns those that are ready, as (update, list of floats), or None."""
        if values.device.type != "cuda":
            return update, values.tolist()
        ready = self.take()
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        self.pending = update, host, copied
        return ready

    def take(self):
        if self.pending is None:
            return None
        update, host, copied = self.pending
        self.pending = None
        copied.synchronize()
        return update, host.tolist()


class Progress:
    """One line that renews itself on a terminal, a line every `interval` steps elsewhere."""

    def __init__(self, total, interval, shown):
        self.total, self.interval, self.shown = total, interval, shown
        self.live = shown and sys.stdout.isatty()
        self.last = 0.0

    def show(self, done, text):
        text = f"{text[0]} {done}/{self.total}  {text[1]}"
        if self.live and (time.monotonic() - self.last > 0.1 or done == self.total):
            self.last = time.monotonic()
            print(f"\r\033[K{text}", end="\n" if done == self.total else "", flush=True)
        elif self.shown and not self.live and (done % self.interval == 0 or done == self.total):
            log.info(text)


def autocast(settings, device):
    return torch.autocast(device.type, dtype=getattr(torch, settings.amp_dtype), enabled=settings.amp)


def train_epoch(task, loader, optimizer, stepper, schedule, mixup, settings, process, epoch, updates_per_epoch, write):
    """Train for one epoch of whole updates. Returns the mean loss, mean gradient norm and images per second.

    `write(update, name, value)` takes the scalars every `log_interval` updates. A loss that is not finite, or without
    float16 a gradient that is not, is a UserError in all processes alike.
    """
    task.train()
    if mixup is not None and settings.mixup_off_epoch:
        mixup.mixup_enabled = epoch < settings.mixup_off_epoch
    model = task.get_trainable_module()
    parameters = list(model.parameters())
    steps = settings.grad_accum_steps
    images_per_update = settings.batch_size * process.world_size * steps
    progress = Progress(updates_per_epoch, settings.log_interval, process.primary)
    figures, seen, loss_sum, norm_sum = Figures(), 0, 0.0, 0.0
    start = mark = time.monotonic()
    marked = 0

    def account(ready):
        nonlocal seen, loss_sum, norm_sum, mark, marked
        if ready is None:
            return
        update, (loss, norm) = ready
        if not math.isfinite(loss) or not (stepper.scaling or math.isfinite(norm)):
            raise UserError(
                f"loss {loss:g}, gradient norm {norm:g} in update {update} of epoch {epoch} (update "
                f"{epoch * updates_per_epoch + update} of the run, lr {optimizer.param_groups[0]['lr']:g}): stopped, "
                f"the last checkpoint is kept; try a lower --lr, --clip-grad, or --amp-dtype bfloat16")
        seen, loss_sum, norm_sum = seen + 1, loss_sum + loss, norm_sum + (norm if math.isfinite(norm) else 0.0)
        done, now = update + 1, time.monotonic()
        rate = (done - marked) * images_per_update / max(now - mark, 1e-9)
        lr = optimizer.param_groups[0]["lr"]
        if done % settings.log_interval == 0 or done == updates_per_epoch:
            for name, value in dict(loss=loss, lr=lr, grad_norm=norm, images_per_second=rate).items():
                write(epoch * updates_per_epoch + done, f"train/{name}", value)
        progress.show(done, (f"epoch {epoch}", f"loss {loss:.4f}  lr {lr:.3g}  gradient {norm:.3g}  {rate:.0f} img/s"))
        if done % settings.log_interval == 0:
            mark, marked = now, done

    bad = loader.dataset.bad
    bad.begin()
    batches = iter(loader)
    for update in range(updates_per_epoch):
        loss_of_update = torch.zeros((), device=process.device)
        for step in range(steps):
            images, target = next(batches, (None, None))
            if images is None:
                raise UserError(f"the training data ended before update {update} of {updates_per_epoch}; "
                                f"set --train-num-samples")
            if settings.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            if mixup is not None:
                images, target = mixup(images, target)
            if step + 1 < steps:
                with task.no_sync():
                    loss = _forward_backward(task, images, target, stepper, settings, process)
            else:
                loss = _forward_backward(task, images, target, stepper, settings, process)
            loss_of_update += loss
        norm = stepper.step(optimizer, parameters, task.get_clip_parameters(exclude_head="agc" in settings.clip_mode))
        task.update_ema(step=epoch * updates_per_epoch + update + 1)
        loss_of_update = process.mean(loss_of_update)
        account(figures.put(update, torch.stack((loss_of_update, norm.float()))))
        bad.review(process, together=(update + 1) % settings.log_interval == 0 or update + 1 == updates_per_epoch)
        if schedule is not None:
            schedule.step_update(epoch * updates_per_epoch + update + 1)
    account(figures.take())
    seconds = time.monotonic() - start
    return dict(loss=loss_sum / seen, grad_norm=norm_sum / seen, images_per_second=seen * images_per_update / seconds,
                bad_images=len(bad.agreed))


def check_finite(task, judged, process, epoch, lr):
    """After an epoch, before it is saved: figures or weights that are not finite are a UserError in all processes.

    The update that breaks the weights shows in the next one's loss; the last of an epoch has no next one.
    """
    bad = [f"validation {name} {value:g}" for name, value in judged.items() if not math.isfinite(value)]
    modules = [task.get_trainable_module()] + ([task.get_trainable_module(ema=True)] if task.has_ema() else [])
    whole = torch.stack([parameter.isfinite().all() for module in modules for parameter in module.parameters()]).all()
    if process.mean(whole.float()) < 1:
        bad.append("weights that are not finite")
    if bad:
        raise UserError(f"{', '.join(bad)} after epoch {epoch} (lr {lr:g}): stopped, the last checkpoint is kept; try "
                        f"a lower --lr, --clip-grad, or --amp-dtype bfloat16")


def _forward_backward(task, images, target, stepper, settings, process):
    with autocast(settings, process.device):
        loss = task(images, target)["loss"] / settings.grad_accum_steps
    stepper.backward(loss)
    return loss.detach()


@torch.no_grad()
def evaluate(model, loader, evaluator_of, settings, process, name="validation"):
    """Loss, top-1 and top-5 (percent) over every image once, whatever the number of processes. Unreadable images are
    left out: the number of images that comes back with the metrics is without them."""
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
            output, target, left = output[:left], target[:left], max(0, left - len(target))
        if bad.count:
            readable = target != UNREADABLE
            output, target = output[readable], target[readable]
            bad.review(process, together=False)
        evaluator.update(output, target)
        if progress.live:
            running = evaluator.summary()
            progress.show(step, (name, f"loss {running['loss']:.4f}  top-1 {running['top1']:.2f}"))
    bad.review(process)
    metrics = dict(evaluator.compute(distributed=process.distributed))
    images = evaluator.counts[0].clone()
    if process.distributed:
        torch.distributed.all_reduce(images)
    return metrics, int(images)
