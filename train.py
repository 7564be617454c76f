#!/usr/bin/env python3
"""Train an image classifier: python train.py -c configs/eva_deit_tiny.yaml --data-dir DIR

Several GPUs of a machine: torchrun --nproc-per-node 8 train.py -c … --data-dir DIR
"""

import logging
import sys

import torch
from timm.utils import trim_summary, update_summary, world_info_from_env

from evavit.training import data, loop, plan, recipe, state
from evavit.training.errors import UserError, run_script
from evavit.training.options import parse_settings, save_settings
from evavit.training.process import start_process

log = logging.getLogger("evavit.train")


def main(argv=None):
    settings, _ = parse_settings("train", argv, __doc__)
    _, rank, processes = world_info_from_env()
    rehearsal = plan.rehearse(settings, processes)
    if settings.dry_run:
        if rank == 0:
            print("\n".join(plan.describe(settings, rehearsal)))
        return
    batch = rehearsal.batch
    process = start_process(settings.device)

    train_set, eval_set, class_names = data.open_training_sets(settings)
    settings.num_classes = data.class_count(settings, class_names)
    process.seed(settings.seed)  # every process draws the same weights
    model = recipe.build_model(settings, settings.num_classes)
    data_config = data.resolve_input(settings, model)
    recipe.try_model(model, data_config["input_size"], settings)
    model.to(process.device, memory_format=torch.channels_last if settings.channels_last else torch.preserve_format)
    train_loader = data.train_loader(train_set, settings, data_config, process.device)
    eval_loader = data.eval_loader(
        eval_set, settings, data_config, process.device, settings.validation_batch_size or settings.batch_size)
    updates_per_epoch = data.updates_per_epoch(train_loader, settings, batch)

    optimizer = recipe.build_optimizer(model, settings, batch.lr)
    schedule, epochs = recipe.build_schedule(optimizer, settings, updates_per_epoch)
    stepper = loop.Stepper(settings, process.device)
    mixup = recipe.build_mixup(settings, model.num_classes)
    task = recipe.build_task(model, settings, process.device)

    folder = plan.output_folder(settings, data_config)
    checkpoint = state.find_resume(settings, folder)
    saver = state.Saver(task, optimizer, stepper, settings, class_names, folder) if process.primary else None
    first_epoch = state.resume(checkpoint, task, optimizer, stepper, saver, settings) if checkpoint else 0
    recipe.compile_and_distribute(task, settings, process)
    if schedule is not None and first_epoch:
        schedule.step_update(first_epoch * updates_per_epoch)
        schedule.step(first_epoch)

    log.info(f"{settings.model}: {recipe.model_line(model)}; on {process.device}, {process.world_size} processes")
    log.info(f"{batch}")
    log.info(f"{len(train_set)} images, {updates_per_epoch} updates an epoch, {epochs} epochs; output in {folder}")
    journal = Journal(folder, settings, [str(batch)], first_epoch, updates_per_epoch) if process.primary else None
    for epoch in range(first_epoch, epochs):
        process.seed(settings.seed, epoch)
        data.start_epoch(train_loader, epoch, settings.seed)
        lr = optimizer.param_groups[0]["lr"]
        trained = loop.train_epoch(
            task, train_loader, optimizer, stepper, schedule, mixup, settings, process, epoch, updates_per_epoch,
            journal.scalar if journal else lambda *scalar: None)
        judged = evaluate(task, eval_loader, settings, process)
        loop.check_finite(task, judged, process, epoch, lr)
        if schedule is not None:
            schedule.step(epoch + 1)
        if process.primary:
            # The journal first: a run that dies between the two writes the epoch again, and loses no row.
            journal.epoch(epoch, trained, judged, lr, (epoch + 1) * updates_per_epoch)
            best, best_epoch = saver.save_epoch(epoch, judged[settings.eval_metric])
            log.info(f"epoch {epoch}: " + "  ".join(f"{name} {value:.4g}" for name, value in judged.items())
                     + f"  (best {settings.eval_metric} {best:.4g} in epoch {best_epoch})")
    if process.primary:
        journal.close()
        log.info(f"done: best {settings.eval_metric} {saver.best_metric} in epoch {saver.best_epoch}; {folder}")


def evaluate(task, loader, settings, process):
    """Metrics of the weights that the run is judged by; with an average, those of the plain weights are raw_*."""
    judged, _ = loop.evaluate(task.get_eval_model(), loader, task.create_evaluator, settings, process)
    if not task.has_ema():
        return judged
    raw = {f"raw_{name}": value for name, value in judged.items()}
    judged, _ = loop.evaluate(task.get_eval_model(ema=True), loader, task.create_evaluator, settings, process)
    return {**judged, **raw}


class Journal:
    """What a run leaves to read: args.yaml, summary.csv, TensorBoard's event files."""

    def __init__(self, folder, settings, remarks, first_epoch, updates_per_epoch):
        from torch.utils.tensorboard import SummaryWriter

        try:
            folder.mkdir(parents=True, exist_ok=True)
            save_settings(settings, folder / "args.yaml", remarks)
        except OSError as error:
            raise UserError(f"--output {folder}: cannot be written ({error.strerror})") from error
        self.summary = str(folder / "summary.csv")
        trim_summary(self.summary, first_epoch)
        purge = first_epoch * updates_per_epoch + 1 if first_epoch else None
        self.writer = SummaryWriter(str(folder), purge_step=purge)

    def scalar(self, update, name, value):
        self.writer.add_scalar(name, value, update)

    def epoch(self, epoch, trained, judged, lr, update):
        update_summary(epoch, trained, judged, filename=self.summary, lr=lr)
        for name, value in judged.items():
            self.writer.add_scalar(f"eval/{name}", value, update)
        self.writer.flush()

    def close(self):
        self.writer.close()


if __name__ == "__main__":
    sys.exit(run_script(main))
