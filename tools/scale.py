#!/usr/bin/env python3
"""Measure training on several GPUs of one host:

    torchrun --standalone --nproc-per-node 8 tools/scale.py --gpus 1 2 4 8 --results-file results/scale.csv
    python tools/scale.py --bench train --gpus 1 2 --modes reduce-overhead --data-dir data/photos \\
        --results-file results/scale.csv

weak: an update of train.py with the batch of the recipe on each GPU. strong: with its global batch shared by the GPUs,
accumulated where a share is larger than that batch. Both without the loader, on images of noise, and once more without
the all-reduce of the gradients, which gives the share of communication. train: train.py itself through torchrun, two
epochs with loader, validation and checkpoints, on the photographs of tools/build_photos.py, made if the folder is not
there. Flags that are not this program's go to train.py, and what they change is in the row. A row is in the results
file as soon as it is measured.
"""

import argparse
import ast
import contextlib
import csv
import datetime
import functools
import gc
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the package may not be installed here

from evavit.arguments import Parser  # noqa: E402
from evavit.bench.results import ORIGIN, check_writable, origin, read_rows, store_rows  # noqa: E402
from evavit.errors import LocalError, UserError, first_line, run_script  # noqa: E402
from evavit.training import build, data, loop  # noqa: E402
from evavit.training.checks import global_batch  # noqa: E402
from evavit.training.compilation import MODES, choose_compilation  # noqa: E402
from evavit.training.config import parse_settings  # noqa: E402
from evavit.training.distributed import Process, start_process  # noqa: E402

MODELS = ('eva_deit_tiny', 'eva_deit_small', 'eva_deit_tiny_784', 'eva_pvt_v2_b3')
BATCHES = dict(eva_deit_tiny=256, eva_deit_small=256)  # images a GPU; 128 of the others
SET_HERE = dict.fromkeys(('output', 'experiment'), 'leave it out') | dict.fromkeys(
    ('torchcompile', 'torchcompile_mode'), 'name it with --modes'
)
ALONE = 60  # seconds after which a process whose measurement failed takes it that the others' did not
KEY = (  # what a measurement is known by
    'bench',
    'model',
    'gpus',
    'batch_size',
    'grad_accum_steps',
    'global_batch_size',
    'amp_dtype',
    'torchcompile',
    'ddp',
    'workers',  # train: loading processes of each GPU
    'augment_device',  # train: what decodes and augments
    'images',  # train: of an epoch
    'flags',  # what flags for train.py changed besides
    'device',
)
COLUMNS = (
    *KEY[:-1],
    'img_size',
    'status',
    'error',
    'gradient_mb',
    'all_reduce_ms',  # of as many bytes at once, with nothing beside it
    'ms',  # an update
    'no_sync_ms',  # the same without the all-reduce of the gradients
    'communication',  # percent of the update by which these differ
    'img_per_s',
    'start_s',  # build, compilation and first updates
    'peak_memory_mib',
    'data_wait',  # train: share of the last epoch in which the loop waits for data
    'run_s',  # train: the whole command
    *ORIGIN,
)


def parse(argv=None):
    """The flags of this program, and those that are left for train.py."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--bench', nargs='+', choices=('weak', 'strong', 'train'), default=['weak', 'strong'], help='what to measure')
    add('--models', nargs='+', default=list(MODELS), help='models, each with the recipe of its name')
    add(
        '--modes',
        nargs='+',
        choices=('eager', *MODES),
        default=['eager'],
        help='eager, or modes of torch.compile, in this order',
    )
    add('--gpus', nargs='+', type=int, default=[], help='numbers of processes (default: those that torchrun started)')
    add(
        '--ddp',
        nargs='+',
        default=[''],
        help='arguments of DistributedDataParallel, of one measurement with commas: gradient_as_bucket_view,'
        "bucket_cap_mb=100; optimize_ddp=True or False lets torch.compile split the model by DDP's buckets or not",
    )
    add('-b', '--batch-size', type=int, help='images on each GPU (default: 256, or 128 of the larger models)')
    add('--device', help='cpu, cuda (default: cuda where there is one)')
    add('--seconds', type=float, default=1e9, help='begin no other model, mode or number of GPUs after so many seconds')
    add('--row-seconds', type=float, default=2.0, help='of the timing of one number')
    add('--results-file', type=Path, help='CSV; rows of the same measurement are replaced')
    add('--data-dir', type=Path, help='train: photographs, made here if the folder is not there')
    add('--images', type=int, default=16384, help='train: photographs to make')
    args, flags = parser.parse_known_args(argv)
    for flag, numbers in (('--gpus', args.gpus), ('-b', [args.batch_size]), ('--images', [args.images])):
        for number in numbers:
            if number is not None and number < 1:
                raise UserError(f'{flag} {number} is below 1')
    if 'train' in args.bench and args.ddp != ['']:
        raise UserError(f'--ddp {" ".join(args.ddp)}: train.py takes none of these; leave it out, or --bench train')
    return args, flags


def ddp_arguments(text):
    """'bucket_cap_mb=100,static_graph' to keyword arguments; what has no value is True."""
    pairs = (word.partition('=') for word in text.split(',') if word and word != 'default')
    try:
        return {key: ast.literal_eval(value) if equals else True for key, equals, value in pairs}
    except (ValueError, SyntaxError):
        raise UserError(
            f'--ddp {text}: takes arguments of DistributedDataParallel, such as bucket_cap_mb=100'
        ) from None


def settings_of(args, flags, model, mode, gpus, device, own=()):
    """train.py's command line, of which `flags` are the end; the settings that it reads there, and what a row has of
    them."""
    recipe = ROOT / 'configs' / f'{model}.yaml'
    words = ['-c', str(recipe)] if recipe.exists() else ['--model', model, '--num-classes', '1000']
    words += ['-b', str(args.batch_size or BATCHES.get(model, 128)), '--device', device]
    words += ['--torchcompile', 'none' if mode == 'eager' else mode, *own]
    (plain, _), (config, _) = (parse_settings('train', line) for line in (words, [*words, *flags]))
    old, new = plain.flat(), config.flat()
    changed = [name for name in new if new[name] != old[name]]
    for name in changed:
        if name in SET_HERE:
            raise UserError(f'--{name.replace("_", "-")} is for this program to give; {SET_HERE[name]}')
    row = dict(
        model=config.model.model,
        gpus=gpus,
        amp_dtype=config.machine.amp_dtype if config.machine.amp else 'float32',
        torchcompile='no' if mode == 'eager' else mode,
        flags=' '.join(f'{name}={new[name]}' for name in changed if name not in KEY),
    )
    return [*words, *flags], config, row


def shares(bench, batch, gpus):
    """Images a step of each GPU, and steps of an update."""
    most, wanted = batch.batch_size, batch.global_batch_size or gpus * batch.batch_size
    if batch.grad_accum_steps > 1:
        raise UserError(
            f'--grad-accum-steps {batch.grad_accum_steps}: weak is one step, and strong as many as --global-batch-size '
            f'needs; leave it out'
        )
    if bench == 'weak':
        return most, 1
    share = max(1, min(most, wanted // gpus))
    if wanted % (gpus * share):
        raise UserError(
            f'--global-batch-size {wanted}: {gpus} GPUs with {share} images each do not share it evenly; give a '
            f'multiple of {gpus * share}, other --gpus, or --bench weak'
        )
    return share, wanted // (gpus * share)


class Clock:
    """Times calls that several processes make together."""

    def __init__(self, device, control, seconds):
        self.device, self.control, self.seconds, self.began = device, control, seconds, time.perf_counter()

    def agreed(self, value, op=dist.ReduceOp.MAX):
        """The largest of the processes' numbers."""
        number = torch.tensor(float(value), dtype=torch.float64)
        dist.all_reduce(number, op, group=self.control)
        return number.item()

    def span(self, call, times):
        """Seconds of so many calls; of the slowest process."""
        self.synchronize()
        dist.barrier(group=self.control)
        start = time.perf_counter()
        for _ in range(times):
            call()
        self.synchronize()
        return self.agreed(time.perf_counter() - start)

    def synchronize(self):
        if self.device.type == 'cuda':
            torch.cuda.synchronize(self.device)

    def milliseconds(self, *calls):
        """Of each call: the median of five passes, which take turns, each a fifth of the time or two calls."""
        each = max(self.span(call, 2) / 2 for call in calls)
        times = max(2, min(300, round(self.seconds / 5 / max(each, 1e-6))))
        spans = [[self.span(call, times) for call in calls] for _ in range(5)]
        return [1e3 * statistics.median(kept) / times for kept in zip(*spans, strict=True)]


class Update:
    """One update of train.py without its loader, on images of noise."""

    def __init__(self, config, process, batch, group, ddp):
        gc.collect()  # a model, its compiled code and its graphs refer to each other
        torch.compiler.reset()
        torch.manual_seed(0)
        self.group, self.process = group, process
        model = build.build_model(config.model, config.model.num_classes).to(process.device)
        self.size = data.resolve_input(config.model, model)['input_size']
        task = build.build_task(model.train(), config.loss, process.device, config.ema)
        compilation = choose_compilation(config.machine.torchcompile, None, process.device)
        self.run = loop.Run(
            task=task,
            optimizer=build.build_optimizer(model, config.optim, 1e-4),
            stepper=loop.Stepper(config.machine, config.optim, process.device),
            schedule=None,
            mixup=build.build_mixup(config.loss, model.num_classes),
            process=process,
            bad=None,
            machine=config.machine,
            config=config.run,
            updates_per_epoch=1,
            epochs=1,
            images_per_update=batch * process.world_size,
            compilation=compilation,
        )
        self.gradient_bytes = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
        build.compile_and_distribute(task, compilation, process, process_group=group, **ddp)
        self.parameters = list(model.parameters())
        self.images = torch.randn(batch, *self.size, device=process.device)
        self.target = torch.randint(model.num_classes, (batch,), device=process.device)

    def __call__(self, exchange=True):
        run, loss = self.run, torch.zeros((), device=self.process.device)
        alone = contextlib.nullcontext() if exchange else run.task.no_sync()
        with alone:
            for step in range(run.grad_accum_steps):
                # Mixup writes into the images.
                images, target = (
                    (self.images, self.target) if run.mixup is None else run.mixup(self.images.clone(), self.target)
                )
                loss += loop.micro_step(run, images, target, step)[0]
        if exchange and run.exchanges:
            loop.exchange(run.task.get_trainable_module(), run.process, self.group)
        if exchange and self.process.distributed:
            dist.all_reduce(loss, group=self.group)
        clipped = run.task.get_clip_parameters(exclude_head='agc' in run.stepper.clip_mode)
        run.stepper.step(run.optimizer, loss, self.parameters, clipped)
        run.task.update_ema(step=1)


def measure(update, steps, clock, group):
    """Columns of a row: updates of so many steps, on the processes of a group."""
    process, images = update.process, len(update.images)
    update.run.grad_accum_steps = steps
    if process.device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats(process.device)
    for _ in range(4):  # compiles, finds kernels, records graphs, replays them
        update()
    clock.synchronize()
    row = dict(
        img_size=update.size[-1],
        gradient_mb=round(update.gradient_bytes / 1e6, 1),
        start_s=round(time.perf_counter() - clock.began, 1),
    )
    if process.distributed:
        buffer = torch.zeros(update.gradient_bytes // 4, device=process.device)
        (reduce,) = clock.milliseconds(functools.partial(dist.all_reduce, buffer, group=group))
        row['ms'], alone = clock.milliseconds(update, functools.partial(update, exchange=False))
        row['all_reduce_ms'], row['no_sync_ms'] = round(reduce, 3), round(alone, 2)
        row['communication'] = round(100 * (1 - alone / row['ms']), 1)
    else:
        (row['ms'],) = clock.milliseconds(update)
    row['img_per_s'] = round(1e3 * images * steps * process.world_size / row['ms'], 1)
    row['ms'] = round(row['ms'], 2)
    # What a graph allocates it keeps, and no peak shows it.
    if process.device.type == 'cuda' and not update.run.compilation.graphs:
        row['peak_memory_mib'] = round(torch.cuda.max_memory_allocated(process.device) / 2**20)
    return row


def fault_of_all(fault, process, group):
    """What a measurement failed of in any of its processes, '' where it went well. LocalError where the others do not
    answer: they wait within the measurement, or have ended."""
    faults = [fault] * process.world_size
    try:
        dist.all_gather_object(faults, fault, group=group)
    except RuntimeError as error:
        raise LocalError(
            f'rank {process.rank}: {fault or first_line(error)[:200]}; the other processes of this measurement do not '
            f'answer, so that it ends here'
        ) from error
    return next(filter(None, faults), '')


def steps(args, flags, process, store, everyone, over):
    """weak and strong: every process measures with the first k of all, the others wait."""
    gpus = args.gpus or [process.world_size]
    if max(gpus) > process.world_size:
        raise UserError(f'--gpus {max(gpus)}: torchrun started {process.world_size}; raise --nproc-per-node')
    benches = [bench for bench in args.bench if bench != 'train']
    jobs = [
        (k, ddp, *settings_of(args, flags, model, mode, k, process.device.type)[1:])
        for mode, model, k, ddp in itertools.product(args.modes, args.models, gpus, args.ddp)
        if k > 1 or ddp == args.ddp[0]  # one process has no DistributedDataParallel
    ]
    for bench, (k, _, config, _) in itertools.product(benches, jobs):
        shares(bench, config.batch, k)  # refuses before anything is measured
    patience = datetime.timedelta(seconds=ALONE)
    groups = {
        k: (
            dist.new_group(range(k)),
            dist.new_group(range(k), backend='gloo'),
            dist.new_group(range(k), timeout=patience, backend='gloo'),
        )
        for k in gpus
    }
    for k, ddp, config, common in jobs:
        late = torch.tensor(float(over()))
        dist.all_reduce(late, group=everyone)  # also where the processes beyond k wait
        if late:
            if process.primary:
                what = f'{common["torchcompile"]} {common["model"]} on {k}'
                print(f'{args.seconds:g} s are over: {what} and what follows are not measured', flush=True)
            return
        if process.rank >= k:
            continue
        part = Process(process.device, process.rank, process.local_rank, k)
        group, control, verdict = groups[k]
        made = {}  # the updates by their images: the memory of one at a time
        for bench in benches:
            share, count = shares(bench, config.batch, k)
            row = dict(bench=bench, **common, ddp='' if k == 1 or ddp == 'default' else ddp)
            row |= dict(batch_size=share, grad_accum_steps=count, global_batch_size=k * share * count)
            clock, fault = Clock(process.device, control, args.row_seconds), ''
            try:
                if share not in made:
                    made.clear()
                    made[share] = Update(config, part, share, group, ddp_arguments(ddp))
                row |= dict(status='ok', **measure(made[share], count, clock, group))
            except UserError:
                raise
            except Exception as error:  # the next measurement may go well, and a row says that this one did not
                made.clear()
                fault = first_line(error)[:300]
                store([row | dict(status='failed', error=fault)])
            told = fault_of_all(fault, part, verdict)
            if not fault:
                store([row | dict(status='failed', error=told) if told else row])


def outside_torchrun():
    """The environment without what torchrun gave this process."""
    mine = (
        'RANK',
        'LOCAL_RANK',
        'WORLD_SIZE',
        'LOCAL_WORLD_SIZE',
        'GROUP_RANK',
        'ROLE_RANK',
        'MASTER_ADDR',
        'MASTER_PORT',
    )
    kept = {
        k: v for k, v in os.environ.items() if k not in mine and not k.startswith(('TORCHELASTIC_', 'GROUP_', 'ROLE_'))
    }
    return kept | {'PYTHONPATH': os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))}


def make_photos(folder, images):
    """The images to train on, and their classes, of a folder that is made if it is not there."""
    if not folder.exists():
        builder = [sys.executable, 'tools/build_photos.py', str(folder.resolve()), '--images', str(images)]
        done = subprocess.run(builder, cwd=ROOT, env=outside_torchrun(), stderr=subprocess.PIPE, text=True)
        if done.returncode:
            told = (done.stderr.splitlines() or [f'exit code {done.returncode}'])[-1].removeprefix('error: ')
            raise UserError(f'--data-dir {folder}: tools/build_photos.py does not make it ({told})')
    if not (folder / 'train').is_dir():
        raise UserError(f'--data-dir {folder}: no folder train in it; name a new folder, or one of photographs')
    classes = [inner for inner in (folder / 'train').iterdir() if inner.is_dir()]
    return sum(len(list(inner.iterdir())) for inner in classes), len(classes)


def train(args, flags, process, store, over):
    """train.py through torchrun, on photographs."""
    if not args.data_dir:
        raise UserError('--bench train needs --data-dir: photographs, or where to make them')
    images, classes = make_photos(args.data_dir, args.images)
    jobs = []
    for mode, model, k in itertools.product(args.modes, args.models, args.gpus or [process.world_size]):
        batch, workers = args.batch_size or BATCHES.get(model, 128), min(16, len(os.sched_getaffinity(0)) // k)
        own = f'--num-classes {classes} --global-batch-size {k * batch} --grad-accum-steps 1 --workers {workers}'
        own += ' --epochs 2 --warmup-epochs 0 --lr 1e-4 --min-lr 0 --log-interval 10'
        jobs.append((k, *settings_of(args, flags, model, mode, k, process.device.type, own.split())))
        config = jobs[-1][2]
        global_batch(config.batch, config.schedule, k)  # refuses before anything is run
    for k, words, config, row in jobs:
        if over():
            what = f'{row["torchcompile"]} {row["model"]} on {k}'
            print(f'{args.seconds:g} s are over: train.py {what} and what follows are not run', flush=True)
            return
        row |= dict(bench='train', workers=config.machine.workers, augment_device=config.machine.augment_device)
        row |= {name: getattr(config.batch, name) for name in ('batch_size', 'grad_accum_steps')}
        row |= dict(global_batch_size=k * row['batch_size'] * row['grad_accum_steps'], images=images)
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(k)]
            command += [str(ROOT / 'train.py'), '--data-dir', str(args.data_dir.resolve()), '--output', folder]
            command += ['--experiment', 'run', *words]
            began = time.monotonic()
            done = subprocess.run(command, env=outside_torchrun(), capture_output=True, text=True)
            row['run_s'] = round(time.monotonic() - began, 1)
            run = Path(folder, 'run')
            written = all((run / name).exists() for name in ('last.pth.tar', 'model_best.pth.tar', 'summary.csv'))
            if done.returncode or not written:
                lines = [line for line in done.stderr.splitlines() if 'rror' in line] or ['no checkpoint was written']
                row |= dict(status='failed', error=lines[0][:300])
                print(done.stdout[-2000:], done.stderr[-3000:], sep='\n', flush=True)
            else:
                with open(run / 'summary.csv', newline='') as stream:
                    last = list(csv.DictReader(stream))[-1]
                rate, wait = float(last['train_images_per_second']), float(last['train_data_wait'])
                row |= dict(status='ok', img_per_s=round(rate, 1), data_wait=round(wait, 3))
                print(done.stdout[-1500:], flush=True)
            store([row])


def main(argv=None):
    args, flags = parse(argv)
    for text in args.ddp:
        ddp_arguments(text)
    if args.results_file:
        check_writable(args.results_file)
        read_rows(args.results_file, COLUMNS)
    process, started = start_process(args.device), time.monotonic()
    where = origin(process.device)

    def over():
        return time.monotonic() - started > args.seconds

    def store(rows):
        if not process.primary:
            return
        for row in rows:
            row |= where
            print('  '.join(f'{name} {row[name]}' for name in COLUMNS if row.get(name, '') != ''), flush=True)
        if args.results_file:
            store_rows(args.results_file, rows, COLUMNS, KEY)

    everyone = dist.new_group(backend='gloo')  # waits without holding a GPU
    if set(args.bench) - {'train'}:
        steps(args, flags, process, store, everyone, over)
    if 'train' in args.bench and process.primary:
        train(args, flags, process, store, over)
    dist.barrier(group=everyone)
    dist.destroy_process_group()


if __name__ == '__main__':
    sys.exit(run_script(main, no_memory='lower the batch size (-b)'))
