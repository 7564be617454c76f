"""Train an image classifier: train.py -c eva_deit_tiny --data-dir DIR

Several GPUs of a machine: torchrun --nproc-per-node 8 train.py -c … --data-dir DIR
"""

import logging
import shlex
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Callable, Dict, Optional, Sequence

import torch
from timm.utils import distribute_bn, unwrap_model, world_info_from_env

from evavit.errors import Preempted, UserError, begun, reason_of
from evavit.training import build, checkpoint, checks, data, distillation, dry_run, loop, run_folder
from evavit.training.agreement import check_agreement, code_version
from evavit.training.compilation import choose_compilation
from evavit.training.config import TrainConfig, parse_settings
from evavit.training.distributed import log_to, start_log, start_process
from evavit.training.metrics import MetricsWriter
from evavit.training.signals import SignalHandler
from evavit.training.stalls import Watchdog

log = logging.getLogger('evavit.train')


def main(argv: Optional[Sequence[str]] = None) -> None:
    config, _ = parse_settings('train', argv, __doc__)
    _, rank, processes = world_info_from_env()
    if not config.run.dry_run:
        start_log(rank == 0, for_file=True)  # the first process alone tells what becomes of the weights to start from
        log.debug(f'{code_version()}; {shlex.join(sys.argv)}')  # the first line of train.log, by which a run knows it
    checked = dry_run.check_run(config, processes)
    if config.run.dry_run:
        if rank == 0:
            print('\n'.join(dry_run.describe(config, checked)))
        return
    begun()
    # A signal during the start takes effect after the first update, when there is something to save.
    with SignalHandler(config.run.checkpoint_interval, rank == 0) as handler, ExitStack() as held:
        run_training(config, checked, handler, held)


def run_training(config: TrainConfig, checked: dry_run.CheckedRun, handler: SignalHandler, held: ExitStack) -> None:
    """The whole run. `held` takes what must last until its end."""
    watchdog = held.enter_context(Watchdog(config.run.stall_timeout))
    process, batch = start_process(config.machine.device, watchdog), checked.batch
    compilation = choose_compilation(config.machine.torchcompile, config.machine.torchcompile_mode, process.device)
    if compilation.backend:
        held.enter_context(watchdog.compiling())
    train_set, eval_set, class_names = data.open_training_sets(
        config.data,
        in_chans=checks.image_channels(config.model),
        batch_size=config.batch.batch_size,
        seed=config.run.seed,
    )
    classes = config.model.num_classes = data.class_count(
        config.data, config.model.num_classes, class_names, train_set, eval_set
    )
    dry_run.check_metric(config, classes)
    if checked.ready:
        model, data_config = checked.model, checked.data_config
    else:
        model, data_config = dry_run.initial_model(config, classes)
    channels_last = config.machine.channels_last
    teacher = distillation.build_teacher(config, model, data_config)
    distillation.check_classes(teacher, class_names)
    modules: Any = [model] if teacher is None else [model, teacher]
    for module in modules:
        module.to(process.device, memory_format=torch.channels_last if channels_last else torch.preserve_format)
    train_loader = data.train_loader(
        train_set,
        config.augment,
        data_config,
        batch_size=config.batch.batch_size,
        machine=config.machine,
        seed=config.run.seed,
        process=process,
    )
    eval_loader = data.eval_loader(
        eval_set,
        data_config,
        batch_size=config.batch.validation_batch_size or config.batch.batch_size,
        machine=config.machine,
        device=process.device,
        watchdog=process.watchdog,
    )
    check_agreement(
        process,
        config,
        training_images=len(train_set),
        validation_images=len(eval_set),
        training_batches=len(train_loader),
        validation_batches=len(eval_loader),
        class_names=class_names,
        held_out_images=data.held_out(eval_set).get('held_out_sha256'),
        teacher=' '.join(map(str, teacher.identity.values())) if teacher else None,
    )
    updates_per_epoch = data.updates_per_epoch(train_loader, batch.accumulated, batch.total)

    process.seed(config.run.seed)  # a projection of features is drawn
    kind = distillation.task_kind(config.distil, teacher)
    task = build.build_task(model, config.loss, process.device, config.ema, kind)
    optimizer = build.build_optimizer(task.get_trainable_module() or model, config.optim, batch.lr)
    schedule, epochs = build.build_schedule(optimizer, config.schedule, updates_per_epoch)
    run = loop.Run(
        task=task,
        optimizer=optimizer,
        stepper=loop.Stepper(config.machine, config.optim, process.device),
        schedule=schedule,
        mixup=build.build_mixup(config.loss, model.num_classes),
        process=process,
        bad=train_set.bad,
        machine=config.machine,
        config=config.run,
        updates_per_epoch=updates_per_epoch,
        epochs=epochs,
        images_per_update=batch.total,
        grad_accum_steps=batch.accumulated,
        mixup_off_epoch=config.loss.mixup_off_epoch,
        frozen_in_eval=config.model.linear_probe,
        compilation=compilation,
        parts=distillation.loss_parts(config.distil, teacher),
    )

    folder = dry_run.output_folder(config, data_config)
    if process.primary:
        held.enter_context(run_folder.locked_folder(folder))
    checkpoints = run_folder.find_resume(config.run.resume, folder)
    if process.primary:
        held.enter_context(log_to(folder / 'train.log'))
    for line in dry_run.other_start(config, classes, class_names) if not checkpoints else ():
        log.warning(f'warning: {line}')
    settings = {
        **config.flat(),
        **data.held_out(train_set),
        'kd_teacher': teacher.identity if teacher else None,
    }
    saver = checkpoint.Saver(run, settings, class_names, folder) if process.primary else None
    position = checkpoint.resume(checkpoints, run, settings, saver, class_names)
    build.compile_and_distribute(task, compilation, process)
    if schedule is not None and run.done(position):
        schedule.step_update(run.done(position))
        if position.epoch:  # a new run does not ask for its first epoch, where timm's may say another rate than lr
            schedule.step(position.epoch)

    about = build.model_line(model, data_config['input_size'])
    log.info(f'{config.model.model}: {about}; on {process.device}, {process.world_size} processes')
    log.info(f'{compilation}')
    if teacher is not None:
        log.info(f'teacher {distillation.teacher_line(teacher)}')
    log.info(f'{batch}')
    for note in config.notes:
        log.info(note)
    if few := dry_run.few_updates(updates_per_epoch, len(train_set), batch):
        log.warning(f'warning: {few}')
    if single := dry_run.one_class(classes, class_names):
        log.warning(f'warning: {single}')
    log.info(f'{len(train_set)} images, {updates_per_epoch} updates an epoch, {epochs} epochs; output in {folder}')
    writer = None
    if process.primary:
        save_settings(config, folder, str(batch))
        writer = MetricsWriter(folder, run, position, class_names, data_config, settings)

    def batches(position: loop.Position) -> data.Batches:
        first = position.update * batch.accumulated
        of_epoch = data.epoch_batches(
            train_loader, config.batch, seed=config.run.seed, process=process, epoch=position.epoch, first=first
        )
        return watchdog.batches(of_epoch, train_set)

    try:
        while position.epoch < epochs:
            position = train_epoch(run, position, batches, eval_loader, handler, writer, saver)
        if writer is not None:
            writer.finish()
    finally:
        if writer is not None:
            writer.close()
    if saver is not None and saver.best_metric is None:  # resumed where another folder's run had ended
        log.info(f'done: no epoch was left to train; {folder}')
    elif saver is not None:
        log.info(f'done: epoch {saver.best_epoch} is the best; {folder}')
        metric = config.run.eval_metric
        log.info(f'best {metric} {saver.best_metric:.{4 if metric == "loss" else 2}f}')


def save_settings(config: TrainConfig, folder: Path, remark: str) -> None:
    try:
        config.save(folder / 'args.yaml', [remark])
    except OSError as error:
        raise UserError(f'--output {folder}: cannot be written ({reason_of(error)})') from error


def train_epoch(
    run: loop.Run,
    position: loop.Position,
    batches: Callable[[loop.Position], data.Batches],
    eval_loader: Any,
    handler: SignalHandler,
    writer: Optional[MetricsWriter],
    saver: Optional[checkpoint.Saver],
) -> loop.Position:
    """Train to the end of the epoch, validate where that is due, save. Returns the start of the next one.

    Writer and saver are those of the first process, None in the others.
    """
    process = run.process

    def save(position: loop.Position) -> None:
        if saver is not None and writer is not None:
            saver.check_folder()
            writer.flush()
            saver.save_position(position)

    run.bad.begin(position.bad)
    train_metrics = loop.train_epoch(
        run, position, batches(position), handler, writer.scalar if writer else lambda *scalar: None, save
    )
    eval_metrics = {}
    if run.validates(position.epoch):
        eval_metrics = evaluate(run, eval_loader, writer.samples() if writer else None)
    loop.check_finite(run, eval_metrics, position)
    following = position.next_epoch()
    if run.schedule is not None:
        run.schedule.step(following.epoch)
    if saver is not None and writer is not None:
        saver.check_folder()
        # The metrics first: a run that dies between the two writes the epoch again, and loses no row.
        writer.epoch(following, train_metrics, eval_metrics, position.lr)
        if eval_metrics:
            classes = unwrap_model(run.task.get_eval_model()).num_classes
            told = {name: value for name, value in eval_metrics.items() if classes > 5 or not name.endswith('top5')}
            best, best_epoch = saver.save_epoch(following, eval_metrics[run.config.eval_metric])
            log.info(
                f'epoch {position.epoch}: '
                + '  '.join(f'{name} {value:.4g}' for name, value in told.items())
                + f'  (best {run.config.eval_metric} {best:.4g} in epoch {best_epoch})'
            )
        else:
            saver.save_position(following)
            log.info(f'epoch {position.epoch}: training loss {train_metrics["loss"]:.4g}, not validated')
    if following.epoch < run.epochs and process.any(handler.stop):
        raise Preempted(f'asked to stop: epoch {position.epoch} is complete; go on with --resume auto')
    return following


def evaluate(run: loop.Run, loader: Any, look: Any) -> Dict[str, float]:
    """Metrics of the weights that the run is judged by, whose outputs `look` sees; with an average, those of the plain
    weights are raw_*."""
    task = run.task
    if run.process.distributed:  # statistics of a batch norm are each process's own; the first one's are saved
        with run.process.waiting('broadcast'):
            for average in (False, *[True] * task.has_ema()):
                distribute_bn(unwrap_model(task.get_eval_model(ema=average)), run.process.world_size)

    def metrics_of(ema: bool = False) -> Dict[str, float]:
        metrics, _ = loop.evaluate(
            task.get_eval_model(ema=ema),
            loader,
            task.create_evaluator,
            run.machine,
            run.config.log_interval,
            run.process,
            look=look if ema == task.has_ema() else None,
            compilation=run.compilation,
        )
        return metrics

    plain = metrics_of()
    if not task.has_ema():
        return plain
    raw = {f'raw_{name}': value for name, value in plain.items()}
    return {**metrics_of(ema=True), **raw}
