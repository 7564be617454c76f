"""One epoch of training from any update of it, and one pass of evaluation."""

import contextlib
import dataclasses
import logging
import math
import sys
import time
from datetime import timedelta
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import torch
from timm.data import Mixup
from timm.task import TrainingTask, evaluation_sample_limit
from timm.utils import NativeScaler, dispatch_clip_grad
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from evavit.errors import Preempted, SharedError, UserError, printable
from evavit.training.compilation import AS_IS, Compilation, choose_compilation, report_skips
from evavit.training.config import MachineConfig, OptimConfig, RunConfig
from evavit.training.data.images import UNREADABLE, BadImages
from evavit.training.distributed import Draw, Process
from evavit.training.signals import SignalHandler
from evavit.training.stalls import Watchdog

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

log = logging.getLogger(__name__)
SILENCE = 30.0  # seconds without a line, after which a step has one

WriteScalar = Callable[[int, str, float], None]


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
    parts: Dict[str, float] = dataclasses.field(default_factory=dict)  # of the loss
    skipped: int = 0  # updates of this epoch whose loss or gradient was not finite
    streak: int = 0  # the same, in a row up to now
    bad: Dict[int, str] = dataclasses.field(default_factory=dict)  # unreadable images of this epoch: `BadImages.found`
    seconds: float = 0.0  # time spent in this epoch, and the part of it in which the host waited for data
    waited: float = 0.0

    def next_epoch(self) -> 'Position':
        return Position(epoch=self.epoch + 1, streak=self.streak)


class Stepper(NativeScaler):
    """timm's NativeScaler with the gradient norm as its result. A step that is not finite is skipped in any precision;
    the scale moves under float16 and is 1 otherwise."""

    def __init__(self, machine: MachineConfig, optim: OptimConfig, device: torch.device):
        self.scaling = machine.amp and machine.amp_dtype == 'float16'
        self.clip_grad, self.clip_mode = optim.clip_grad, optim.clip_mode
        self._scaler = torch.amp.GradScaler(device.type, init_scale=2.0**16 if self.scaling else 1.0)

    def remedy(self) -> str:
        """What to try where losses or weights are not finite."""
        clip = f'a --clip-grad below {self.clip_grad:g}' if self.clip_grad else '--clip-grad 1'
        return f'try a lower --lr, {clip}' + ', or --amp-dtype bfloat16' * self.scaling

    def backward(self, loss: torch.Tensor) -> None:
        self._scaler.scale(loss).backward()

    def step(
        self, optimizer: torch.optim.Optimizer, loss: torch.Tensor, parameters: List[Any], clip_parameters: Any
    ) -> torch.Tensor:
        """Clip, update, clear the gradients; returns the norm of the gradient before clipping.

        A loss or gradient that is not finite leaves the weights and the optimizer's state as they are. The host does
        not wait for that answer where the optimizer is fused (see `build.build_optimizer`).
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


@dataclasses.dataclass
class Run:
    """What the loop works with."""

    task: TrainingTask
    optimizer: torch.optim.Optimizer
    stepper: Stepper
    schedule: Any  # timm's, None for a constant learning rate
    mixup: Optional[Mixup]
    process: Process
    bad: BadImages  # of the training set
    machine: MachineConfig
    config: RunConfig
    updates_per_epoch: int
    epochs: int
    images_per_update: int
    grad_accum_steps: int = 1
    mixup_off_epoch: int = 0
    frozen_in_eval: bool = False  # modules without a parameter to train run in evaluation mode
    compilation: Compilation = AS_IS
    parts: Dict[str, str] = dataclasses.field(default_factory=dict)  # of the loss: name of the curve → the task's

    @property
    def exchanges(self) -> bool:
        """Whether gradients are exchanged by `exchange`, not by DistributedDataParallel."""
        return self.process.distributed and self.compilation.graphs

    def learning_rate(self) -> float:
        """That of the schedule, as the classifier has it; --layer-decay lowers that of the layers before it."""
        return max(group['lr'] for group in self.optimizer.param_groups)

    def done(self, position: Position) -> int:
        """Updates since the run's first one."""
        return position.epoch * self.updates_per_epoch + position.update

    def validates(self, epoch: int) -> bool:
        """Whether an epoch ends with a validation."""
        return (epoch + 1) % self.config.val_interval == 0 or epoch + 1 == self.epochs


class DelayedRead:
    """Numbers of an update, read back one update late on a GPU, so that the host never waits for the step under way."""

    def __init__(self, watchdog: Watchdog) -> None:
        self.watchdog = watchdog
        self.pending: Any = None

    def push(self, about: Any, values: torch.Tensor) -> Optional[Tuple[Any, List[float]]]:
        """Hand in the numbers of an update; returns those that are ready, as (about, list of floats), or None."""
        if values.device.type != 'cuda':
            return about, values.tolist()
        ready = self.pop()
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        self.pending = about, host, copied
        return ready

    def pop(self) -> Optional[Tuple[Any, List[float]]]:
        """The numbers that are still under way, waited for, or None."""
        if self.pending is None:
            return None
        about, host, copied = self.pending
        self.pending = None
        with self.watchdog.waiting(lambda: 'the device, which works on an update'):
            copied.synchronize()
        return about, host.tolist()


class ProgressLine:
    """One line that renews itself on a terminal, elsewhere a line every `interval` steps, or `SILENCE` seconds."""

    def __init__(self, total: int, interval: int, shown: bool):
        self.total, self.interval, self.shown = total, interval, shown
        self.live = shown and sys.stdout.isatty()
        self.last = 0.0
        self.told = time.monotonic()

    def show(self, done: int, label: str, text: str) -> None:
        line = f'{label} {done}/{self.total}  {text}'
        if self.live and (time.monotonic() - self.last > 0.1 or done == self.total):
            self.last = time.monotonic()
            print(f'\r\033[K{line}', end='\n' if done == self.total else '', flush=True)
        slow = not self.live and time.monotonic() - self.told > SILENCE
        if self.shown and (done % self.interval == 0 or done == self.total or slow):
            self.told = time.monotonic()
            log.log(logging.DEBUG if self.live else logging.INFO, line)  # the log file has the first kind too


def autocast(machine: MachineConfig, device: torch.device) -> torch.autocast:
    """The context of mixed precision that the settings ask for."""
    return torch.autocast(device.type, dtype=getattr(torch, machine.amp_dtype), enabled=machine.amp)


class EpochTracker:
    """Adds the numbers of each update to the position, shows them, and stops a run whose numbers are not finite."""

    def __init__(self, run: Run, position: Position, write: WriteScalar):
        self.run, self.position, self.write = run, position, write
        self.line = ProgressLine(run.updates_per_epoch, run.config.log_interval, run.process.primary)
        self.began = self.mark = self.added = time.monotonic()
        self.first = self.marked = position.update
        self.waited = self.waited_before = 0.0
        if not position.update:
            position.parts = dict.fromkeys(run.parts, 0.0)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        start = time.monotonic()
        yield
        self.waited += time.monotonic() - start

    def add(self, ready: Optional[Tuple[Any, List[float]]]) -> Tuple[bool, bool]:
        """Take in the numbers of one update, if there are any. Returns what was asked for with it: (save, stop)."""
        if ready is None:
            return False, False
        (update, lr), (loss, norm, save, stop, *rest) = ready
        parts = dict(zip(self.run.parts, rest, strict=True))
        run, position, interval = self.run, self.position, self.run.config.log_interval
        now = time.monotonic()
        position.update = done = update + 1
        position.seconds += now - self.added
        position.waited += self.waited
        self.waited_before += self.waited
        self.added, self.waited = now, 0.0
        if math.isfinite(loss) and math.isfinite(norm):
            position.loss, position.grad_norm, position.streak = position.loss + loss, position.grad_norm + norm, 0
            position.parts = {name: total + parts[name] for name, total in position.parts.items() if name in parts}
        else:
            self._skip(update, lr, loss, norm)
        window = max(now - self.mark, 1e-9)
        rate, share = (done - self.marked) * run.images_per_update / window, self.waited_before / window
        if done % interval == 0 or done == run.updates_per_epoch:
            scalars = dict(
                **parts,
                loss=loss,
                lr=lr,
                grad_norm=norm,
                images_per_second=rate,
                data_wait=share,
                memory_gib=peak_memory(run.process.device),
                skipped=position.skipped,
            )
            for name, value in scalars.items():
                if value is not None:
                    self.write(run.done(position), f'train/{name}', value)
        per_update = (now - self.began) / (done - self.first)
        left = timedelta(seconds=round(per_update * (run.epochs * run.updates_per_epoch - run.done(position))))
        self.line.show(
            done,
            f'epoch {position.epoch}',
            f'loss {loss:.4f}  lr {lr:.3g}  gradient {norm:.3g}  {rate:.0f} img/s  data {100 * share:.0f} %  '
            f'{left} left',
        )
        if done % interval == 0:
            self.mark, self.marked, self.waited_before = now, done, 0.0
        return save > 0, stop > 0

    def _skip(self, update: int, lr: float, loss: float, norm: float) -> None:
        position, limit = self.position, self.run.config.max_skipped
        position.skipped, position.streak = position.skipped + 1, position.streak + 1
        where = (
            f'loss {loss:g}, gradient norm {norm:g} in update {update} of epoch {position.epoch} (update '
            f'{self.run.done(position) - 1} of the run, lr {lr:g})'
        )
        if position.streak < limit:
            log.warning(f'{where}: skipped, {position.streak} in a row')
            return
        raise SharedError(
            f'{where}, {position.streak} in a row: stopped, and nothing more is saved; {self.run.stepper.remedy()}'
        )

    def metrics(self) -> Dict[str, float]:
        """Of the epoch up to now."""
        position, run = self.position, self.run
        counted, seconds = position.update - position.skipped, max(position.seconds, 1e-9)
        return dict(
            loss=position.loss / counted if counted else math.nan,
            **{name: position.parts.get(name, math.nan) / counted if counted else math.nan for name in run.parts},
            grad_norm=position.grad_norm / counted if counted else math.nan,
            skipped=position.skipped,
            bad_images=len(run.bad.found),
            images_per_second=position.update * run.images_per_update / seconds,
            data_wait=position.waited / seconds,
        )


def peak_memory(device: torch.device) -> Optional[float]:
    """Most memory in use so far, in GiB: of tensors on a GPU, else of the process; None where the system cannot say."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device) / 2**30
    if resource is None:
        return None
    unit = 1 if sys.platform == 'darwin' else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def train_epoch(
    run: Run,
    position: Position,
    batches: Iterator[Tuple[torch.Tensor, torch.Tensor]],
    handler: SignalHandler,
    write: WriteScalar,
    save: Callable[[Position], None],
) -> Dict[str, float]:
    """Train from `position` to the end of its epoch, moving `position` along. Returns the epoch's metrics.

    An update that is not finite is skipped.

    Args:
        run: What is trained, and how.
        position: Where to begin; `run.bad` knows the bad images that it holds.
        batches: Those of the epoch from the position on.
        handler: Says after each update whether to save and stop, which all processes learn in the same update.
        write: Takes (update, name, value) of the scalars every `log_interval` updates.
        save: Writes a checkpoint of the position.

    Raises:
        UserError: `max_skipped` updates in a row were not finite, too many images were unreadable, the data ended, or
            a signal asked to stop where the weights are not finite.
        Preempted: A signal asked to stop; the state has been saved.
    """
    task, config, process = run.task, run.config, run.process
    task.train()
    model: Any = task.get_trainable_module()
    if run.frozen_in_eval:
        # The frozen parts give the features that they give in use: no noise, no dropped paths, no new statistics.
        for module in model.modules():
            if not any(p.requires_grad for p in module.parameters()):
                module.eval()
    if run.mixup is not None and run.mixup_off_epoch:
        run.mixup.mixup_enabled = position.epoch < run.mixup_off_epoch
    parameters = list(model.parameters())
    epoch, steps = position.epoch, run.grad_accum_steps
    tracker, delayed = EpochTracker(run, position, write), DelayedRead(process.watchdog)
    if position.update == 0:
        position.lr = run.learning_rate()

    def serve(asked: Tuple[bool, bool]) -> None:
        if not any(asked):
            return
        tracker.add(delayed.pop())  # everything that the weights have seen is in the position
        run.bad.review(process)
        position.bad = dict(run.bad.found)
        stop = asked[1]
        if position.streak and not stop:  # what comes of it is not known yet, and the checkpoint that is there is good
            log.warning(f'update {position.update} of epoch {epoch} is not saved: it was skipped')
            return
        if stop:
            check_finite(run, {}, position)
        save(position)
        if stop:
            process.barrier()  # for the first process to have written
            raise Preempted(
                f'asked to stop: epoch {epoch}, update {position.update} of {run.updates_per_epoch}; go on '
                f'with --resume auto'
            )

    for update in range(position.update, run.updates_per_epoch):
        losses = torch.zeros(1 + len(run.parts), device=process.device)
        for step in range(steps):
            with tracker.waiting():
                images, target = next(batches, (None, None))
            if images is None or target is None:
                for name, why in run.bad.news():
                    log.warning(printable(f'warning: {name} is not a readable image ({why})'))
                raise UserError(
                    f'the training data ended before update {update} of {run.updates_per_epoch}; set '
                    f'--train-num-samples, and have as many shards as processes × --workers'
                )
            process.seed(config.seed, Draw.STEP, epoch, update * steps + step)
            if run.machine.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            if run.mixup is not None:
                images, target = run.mixup(images, target)
            with process.waiting(f'the gradients of epoch {epoch}, update {update}'):
                losses += micro_step(run, images, target, step)
        if run.exchanges:
            with process.waiting(f'the gradients of epoch {epoch}, update {update}'):
                exchange(model, process)
        done = update + 1
        judged = done == run.updates_per_epoch and run.validates(epoch)
        asked = handler.poll(epoch * run.updates_per_epoch + done, judged)
        flags = (losses.new_full((), float(flag)) for flag in asked)
        loss, *parts, save_now, stop = process.mean(torch.stack((*losses, *flags)))
        norm = run.stepper.step(
            run.optimizer, loss, parameters, task.get_clip_parameters(exclude_head='agc' in run.stepper.clip_mode)
        )
        task.update_ema(step=epoch * run.updates_per_epoch + done)
        about = update, run.learning_rate()
        if run.schedule is not None:
            run.schedule.step_update(epoch * run.updates_per_epoch + done)
        run.bad.review(process, together=done % config.log_interval == 0 or done == run.updates_per_epoch)
        if done == tracker.first + 3:  # of this process: by then every graph is recorded
            report_skips(run.compilation)
        serve(tracker.add(delayed.push(about, torch.stack((loss, norm.float(), save_now, stop, *parts)))))
    serve(tracker.add(delayed.pop()))
    return tracker.metrics()


def weights_are_finite(task: TrainingTask) -> torch.Tensor:
    """Of parameters and buffers, such as the running statistics of a batch norm; those of the average too."""
    modules: List[Any] = [task.get_trainable_module()] + (
        [task.get_trainable_module(ema=True)] if task.has_ema() else []
    )
    return torch.stack(
        [
            value.isfinite().all()
            for module in modules
            for value in module.state_dict().values()
            if value.is_floating_point()
        ]
    ).all()


def check_finite(run: Run, metrics: Dict[str, float], position: Position) -> None:
    """Before an epoch is saved, or a stop: metrics or weights that are not finite are a UserError in all processes.

    The update that breaks the weights shows in the next one's loss; the last of an epoch has no next one.
    """
    bad = [f'validation {name} {value:g}' for name, value in metrics.items() if not math.isfinite(value)]
    if run.process.mean(weights_are_finite(run.task).float()) < 1:
        bad.append('weights that are not finite')
    if bad:
        whole = position.update == run.updates_per_epoch
        place = f'epoch {position.epoch}' if whole else f'update {position.update} of epoch {position.epoch}'
        raise SharedError(
            f'{", ".join(bad)} after {place} (lr {position.lr:g}): stopped, and nothing more is '
            f'saved; {run.stepper.remedy()}'
        )


def micro_step(run: Run, images: torch.Tensor, target: torch.Tensor, step: int) -> torch.Tensor:
    """Forward and backward of one of an update's `grad_accum_steps` batches. Gradients add up; with the last batch the
    processes exchange them, unless that is left to `exchange`. Returns the batch's share of the loss and of its parts,
    `(1 + len(run.parts),)`."""
    last = step + 1 == run.grad_accum_steps
    with run.compilation.step(), contextlib.nullcontext() if last and not run.exchanges else run.task.no_sync():
        losses = _forward_backward(run, images, target)
    if run.compilation.graphs and step == 0 and not last:
        _own_gradients(run.task.get_trainable_module())
    return losses


def exchange(model: Any, process: Process, group: Any = None) -> None:
    """Average the gradients over the processes, and take the first one's buffers, in one operation each.

    DistributedDataParallel does so in hooks, a call for each parameter, that hide behind the backward pass. They come
    after one that a CUDA graph replays, and cost more than what they send.
    """
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.nn.utils.parameters_to_vector(gradients).div_(process.world_size)
    torch.distributed.all_reduce(flat, group=group)
    _write_back(flat, gradients)
    if buffers := [buffer for buffer in model.buffers() if buffer.is_floating_point()]:
        flat = torch.nn.utils.parameters_to_vector(buffers)
        torch.distributed.broadcast(flat, 0, group=group)
        _write_back(flat, buffers)


def _write_back(flat: torch.Tensor, tensors: List[torch.Tensor]) -> None:
    parts = flat.split([tensor.numel() for tensor in tensors])
    torch._foreach_copy_(tensors, [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)])


def _own_gradients(model: Any) -> None:
    """Copy gradients out of the memory of a CUDA graph, whose next replay writes over it. What follows is added to the
    copies."""
    held = [p for p in model.parameters() if p.grad is not None]
    for p, copy in zip(held, torch._foreach_mul([p.grad for p in held], 1.0), strict=True):
        p.grad = copy


def _forward_backward(run: Run, images: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    with autocast(run.machine, run.process.device):
        result = run.task(images, target)
        loss = result['loss'] / run.grad_accum_steps
    run.stepper.backward(loss)
    parts = (result[name] / run.grad_accum_steps for name in run.parts.values())
    return torch.stack([value.detach().float() for value in (loss, *parts)])


def place_model(model: nn.Module, machine: MachineConfig, device: torch.device) -> Tuple[Any, Compilation]:
    """A classifier on its device, in the memory order that the settings ask for, compiled where they do."""
    memory_format = torch.channels_last if machine.channels_last else torch.preserve_format
    model = model.to(device).to(memory_format=memory_format)
    compilation = choose_compilation(machine.torchcompile, machine.torchcompile_mode, device)
    if not compilation.backend:
        return model, compilation
    log.info(f'{compilation}')
    return compilation.compile(model), compilation


@torch.no_grad()
def predictions(
    classifier: Any, loader: Any, machine: MachineConfig, process: Process, compilation: Compilation = AS_IS
) -> Iterator[Tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Images, output and target of each batch of this process, in order; targets of unreadable images are UNREADABLE.

    Args: as in `evaluate`.
    """
    classifier.eval()
    loader.dataset.bad.begin()
    size, left = 0, evaluation_sample_limit(loader)
    for images, target in process.watchdog.batches(loader, loader.dataset):
        size = size or len(images)
        if compilation.backend and len(images) < size:
            images = torch.cat((images, images.new_zeros(size - len(images), *images.shape[1:])))
        if machine.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with compilation.step(), autocast(machine, process.device):
            output = classifier(images)
        images, output = images[: len(target)], output[: len(target)]
        if left is not None:  # what comes after it makes the processes even
            images, output, target, left = images[:left], output[:left], target[:left], max(0, left - len(target))
        yield images, output, target


@torch.no_grad()
def evaluate(
    model: Optional[nn.Module],
    loader: Any,
    make_evaluator: Callable[..., Any],
    machine: MachineConfig,
    log_interval: int,
    process: Process,
    look: Optional[Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]] = None,
    compilation: Compilation = AS_IS,
) -> Tuple[Dict[str, float], int]:
    """Loss, top-1 and top-5 (percent), and the number of images: each counts once, however many processes share them.

    Unreadable images are left out, and not counted.

    Args:
        model: The classifier, such as timm's task gives it.
        loader: From `data.eval_loader`.
        make_evaluator: Makes timm's evaluator, given `max_samples`.
        machine: Precision and memory order.
        log_interval: Batches between lines of the log.
        process: This process.
        look: Called with images, target and output of each batch of this process.
        compilation: Of the classifier. One that is compiled gets batches of one size: a last one that is smaller is
            filled up with zeros, whose output is left out.

    Raises:
        UserError: No image can be read, or more are unreadable than allowed.
    """
    classifier: Any = model.module if isinstance(model, DistributedDataParallel) else model
    evaluator, bad = make_evaluator(max_samples=None), loader.dataset.bad
    line = ProgressLine(len(loader), log_interval, process.primary)
    batches = predictions(classifier, loader, machine, process, compilation)
    for step, (images, output, target) in enumerate(batches, 1):
        if bad.count:
            readable = target != UNREADABLE
            images, output, target = images[readable], output[readable], target[readable]
            bad.review(process, together=False)
        evaluator.update(output, target)
        if look is not None and len(images):
            look(images, target, output)
        if line.live:
            running = evaluator.summary()
            line.show(step, 'validation', f'loss {running["loss"]:.4f}  top-1 {running["top1"]:.2f}')
    bad.review(process)
    count = evaluator.counts[0].clone()
    if process.distributed:
        with process.waiting('all_reduce'):
            torch.distributed.all_reduce(count)
    if not count:
        raise SharedError(
            f'validation: none of its {len(loader.dataset)} images can be read; there is nothing to judge by'
        )
    with process.waiting('all_reduce of the metrics'):
        return dict(evaluator.compute(distributed=process.distributed)), int(count)
