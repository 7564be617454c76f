"""Train an image classifier: python train.py -c configs/eva_deit_tiny.yaml --data-dir DIR

Several GPUs of a machine: torchrun --nproc-per-node 8 train.py -c … --data-dir DIR
"""

import logging
import sys
from contextlib import ExitStack

import torch
from timm.utils import world_info_from_env

from evavit.errors import Preempted, run_script
from evavit.training import build, checkpoint, data, dry_run, loop
from evavit.training.config import parse_settings
from evavit.training.distributed import start_process
from evavit.training.metrics import Journal
from evavit.training.signals import Requests

log = logging.getLogger('evavit.train')


def main(argv=None):
    settings, _ = parse_settings('train', argv, __doc__)
    _, rank, processes = world_info_from_env()
    rehearsal = dry_run.rehearse(settings, processes)
    if settings.dry_run:
        if rank == 0:
            print('\n'.join(dry_run.describe(settings, rehearsal)))
        return
    # From here on: a signal while the run starts is heeded after the first update, when there is something to save.
    with Requests(settings.checkpoint_interval, rank == 0) as requests, ExitStack() as claims:
        run_training(settings, rehearsal.batch, requests, claims)


def run_training(settings, batch, requests, claims):
    """The whole run. What it must hold until its end goes to `claims`."""
    process = start_process(settings.device)
    train_set, eval_set, class_names = data.open_training_sets(settings)
    settings.num_classes = data.class_count(settings, class_names)
    process.seed(settings.seed)  # every process draws the same weights
    model = build.build_model(settings, settings.num_classes)
    data_config = data.resolve_input(settings, model)
    build.try_model(model, data_config['input_size'], settings)
    model.to(process.device, memory_format=torch.channels_last if settings.channels_last else torch.preserve_format)
    train_loader = data.train_loader(train_set, settings, data_config, process)
    eval_loader = data.eval_loader(
        eval_set, settings, data_config, process.device, settings.validation_batch_size or settings.batch_size
    )
    updates_per_epoch = data.updates_per_epoch(train_loader, settings, batch)

    optimizer = build.build_optimizer(model, settings, batch.lr)
    schedule, epochs = build.build_schedule(optimizer, settings, updates_per_epoch)
    task = build.build_task(model, settings, process.device)
    run = loop.Run(
        task=task,
        optimizer=optimizer,
        stepper=loop.Stepper(settings, process.device),
        schedule=schedule,
        mixup=build.build_mixup(settings, model.num_classes),
        settings=settings,
        process=process,
        bad=train_set.bad,
        updates_per_epoch=updates_per_epoch,
        epochs=epochs,
        images_per_update=batch.total,
    )

    folder = dry_run.output_folder(settings, data_config)
    if process.primary:
        claims.enter_context(checkpoint.claimed(folder))
    checkpoints = checkpoint.find_resume(settings, folder)
    saver = checkpoint.Saver(run, class_names, folder) if process.primary else None
    position = checkpoint.resume(checkpoints, run, saver)
    build.compile_and_distribute(task, settings, process)
    if schedule is not None and checkpoints:
        schedule.step_update(run.done(position))
        schedule.step(position.epoch)

    log.info(f'{settings.model}: {build.model_line(model)}; on {process.device}, {process.world_size} processes')
    log.info(f'{batch}')
    log.info(f'{len(train_set)} images, {updates_per_epoch} updates an epoch, {epochs} epochs; output in {folder}')
    journal = Journal(folder, run, [str(batch)], position, class_names, data_config) if process.primary else None
    try:
        while position.epoch < epochs:
            position = train_epoch(run, position, train_loader, eval_loader, requests, journal, saver)
    finally:
        if journal is not None:
            journal.close()
    if process.primary:
        log.info(f'done: best {settings.eval_metric} {saver.best_metric} in epoch {saver.best_epoch}; {folder}')


def train_epoch(run, position, train_loader, eval_loader, requests, journal, saver):
    """Train to the end of the epoch, judge, save. Returns the start of the next one."""
    settings, process = run.settings, run.process

    def keep(position):
        if saver is not None:
            journal.flush()
            saver.save_position(position)

    run.bad.begin(position.bad)
    batches = data.epoch_batches(
        train_loader, settings, process, position.epoch, position.update * settings.grad_accum_steps
    )
    trained = loop.train_epoch(
        run, position, batches, requests, journal.scalar if journal else lambda *scalar: None, keep
    )
    judged = evaluate(run, eval_loader, journal.samples if journal else None)
    loop.check_finite(run.task, judged, process, position.epoch, position.lr)
    following = position.next_epoch()
    if run.schedule is not None:
        run.schedule.step(following.epoch)
    if process.primary:
        # The journal first: a run that dies between the two writes the epoch again, and loses no row.
        journal.epoch(following, trained, judged, position.lr)
        best, best_epoch = saver.save_epoch(following, judged[settings.eval_metric])
        log.info(
            f'epoch {position.epoch}: '
            + '  '.join(f'{name} {value:.4g}' for name, value in judged.items())
            + f'  (best {settings.eval_metric} {best:.4g} in epoch {best_epoch})'
        )
    if following.epoch < run.epochs and process.any(requests.stop):
        raise Preempted(f'asked to stop: epoch {position.epoch} is complete; go on with --resume auto')
    return following


def evaluate(run, loader, first_batch):
    """Metrics of the weights that the run is judged by; with an average, those of the plain weights are raw_*."""
    task = run.task

    def judge(ema=False):
        metrics, _ = loop.evaluate(
            task.get_eval_model(ema=ema),
            loader,
            task.create_evaluator,
            run.settings,
            run.process,
            first_batch=first_batch,
        )
        return metrics

    judged = judge()
    if not task.has_ema():
        return judged
    raw = {f'raw_{name}': value for name, value in judged.items()}
    return {**judge(ema=True), **raw}


if __name__ == '__main__':
    sys.exit(run_script(main))
