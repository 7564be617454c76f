"""What can be said of settings before anything is built: whether they fit together and name things that are there."""

import importlib.util
import os
import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Dict, Iterable, Optional, Tuple

from timm.data import create_transform
from timm.optim import get_optimizer_info, list_optimizers

from evavit.arguments import check_device, nearest, shown
from evavit.errors import UserError, first_line
from evavit.files import WEIGHTS, why_no_file
from evavit.hub import saved_config, source_folder, source_of
from evavit.training import data
from evavit.training.compilation import check_compilation
from evavit.training.config import (
    PARENT,
    USED_BY,
    AugmentConfig,
    BatchConfig,
    DataConfig,
    DistilConfig,
    LossConfig,
    MachineConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
)
from evavit.training.data.decode import LONGEST
from evavit.training.signals import parse_interval

HUBS = ('hfds', 'hfids', 'tfds')  # kinds of data sets that are found by their name alone
LEAST_ALPHA = 1e-3  # of mixup and cutmix: numpy draws NaN at far less, and here one of two images is already all
MOST_OPERATIONS = 20  # that an augmentation policy may apply one after another, each to a whole image
PACKAGES = dict(wds='webdataset', hfds='datasets', hfids='datasets', tfds='tensorflow_datasets')


def check_settings(config: TrainConfig) -> None:
    """Settings of train.py that contradict each other or do nothing, each a UserError. No file is looked at."""
    _check_model(config.model, config.run.dry_run)
    _check_optimizer(config.optim, config.model)
    _check_schedule(config.schedule)
    _check_augmentation(config.augment)
    if mixes(config.loss) and config.batch.batch_size % 2:
        raise UserError(
            f'mixup and cutmix pair the images of a batch: batch_size {config.batch.batch_size} must be even'
        )
    for name in ('mixup', 'cutmix'):
        if 0 < (alpha := getattr(config.loss, name)) < LEAST_ALPHA:
            raise UserError(f'{name} {alpha:g}: must be 0, which is off, or {LEAST_ALPHA:g} or more')
    if config.loss.smoothing >= 1:
        raise UserError(f'smoothing {config.loss.smoothing:g} leaves nothing of the label: it must be less than 1')
    if config.model.drop == 1:
        raise UserError('drop 1 leaves nothing to classify: it must be less than 1')
    _check_run(config.run)
    _check_distillation(config.distil, config.model)
    if config.loss.mixup_off_epoch and not mixes(config.loss):
        raise UserError('mixup_off_epoch does nothing without mixup or cutmix; leave it out')
    _check_needed(
        ('bce_target_thresh', config.loss.bce_target_thresh is not None, 'bce_loss', config.loss.bce_loss),
        ('no_resume_opt', config.run.no_resume_opt, 'resume', config.run.resume),
        ('cache_device', config.machine.cache_device, 'augment_device cuda', config.machine.augment_device != 'cpu'),
        ('model_ema_warmup', config.ema.model_ema_warmup, 'model_ema', config.ema.model_ema),
    )
    data.check_division(config.data)
    if not config.data.train_split or not config.data.val_split:
        raise UserError('train_split and val_split name splits: they must not be empty')
    check_compilation(config.machine.torchcompile, config.machine.torchcompile_mode)
    check_device(config.machine.device)


def _check_model(config: ModelConfig, dry_run: bool) -> None:
    if not config.model:
        raise UserError('no model: give --model NAME or a config file with -c')
    starts = [name for name in ('pretrained', 'pretrained_path', 'initial_checkpoint') if getattr(config, name)]
    if len(starts) > 1:
        raise UserError(f'{" and ".join(starts)} both name the weights to start from: give one of them')
    if config.linear_probe and not starts:
        raise UserError('linear_probe trains the classifier alone: say with --pretrained-path what gives the features')
    check_source(config, dry_run)
    check_conversion(config)
    given_channels(config)


def check_conversion(config: ModelConfig) -> None:
    """UserError where there are arguments of no conversion, or such as `evavit.convert_vit` is given otherwise."""
    _check_needed(('convert_kwargs', config.convert_kwargs, 'convert', config.convert))
    instead = dict(model='give it as --model', attention='give it as --convert', inplace='it changes nothing here')
    for name in instead:
        if name in (config.convert_kwargs or {}):
            raise UserError(f'convert_kwargs: leave {name} out, {instead[name]}')


def check_source(config: ModelConfig, dry_run: bool = False) -> None:
    """A model of the Hub, whose settings come over the network too, only where the user lets it: not in a dry run."""
    name = config.model or ''
    if source_of(name)[0] != 'hf-hub':
        return
    if not config.pretrained:
        raise UserError(f'model {name} lies on the Hugging Face Hub: allow the download with --pretrained')
    if dry_run:
        raise UserError(
            f'model {name} lies on the Hugging Face Hub, and a dry run fetches nothing; name the architecture with '
            f'--model, or a folder as local-dir:FOLDER'
        )


def _check_optimizer(config: OptimConfig, model: ModelConfig) -> None:
    name = config.opt.lower()
    if name not in list_optimizers():
        raise UserError(f'unknown optimizer {config.opt}{nearest(name, map(str, list_optimizers()))}')
    if model.linear_probe and config.layer_decay:
        raise UserError(
            f'layer_decay {config.layer_decay:g} does nothing with linear_probe, which trains one layer; leave '
            f'one of them out'
        )
    if config.layer_decay == 0:
        raise UserError('layer_decay 0 trains nothing but the head: give a factor above 0, or leave it out')
    if config.clip_grad == 0:
        raise UserError('clip_grad 0 lets no gradient through: give a bound above 0, or leave it out for no clipping')
    optimizer = get_optimizer_info(name)
    if optimizer.second_order:
        raise UserError(
            f'opt {config.opt} needs second derivatives, which train.py does not compute; choose another --opt'
        )
    if config.opt_betas and not optimizer.has_betas:
        raise UserError(f'opt_betas {config.opt_betas}: {config.opt} has none; leave them out, or choose another --opt')
    if config.opt_betas and len(config.opt_betas) != optimizer.num_betas:
        raise UserError(f'opt_betas {config.opt_betas}: {config.opt} takes {optimizer.num_betas} numbers')


def _check_schedule(config: ScheduleConfig) -> None:
    if config.warmup_epochs >= config.epochs and not config.warmup_prefix and config.sched != 'none':
        raise UserError(
            f'warmup_epochs {config.warmup_epochs} must be less than epochs {config.epochs}; lower --warmup-epochs, '
            f'or add the warm-up to the epochs with --warmup-prefix'
        )
    if config.sched == 'step' and not config.decay_epochs:
        raise UserError(
            f'decay_epochs {config.decay_epochs}: the step schedule needs a number of epochs above 0 between steps'
        )
    if config.sched == 'multistep':
        milestones = config.decay_milestones
        if any(a >= b for a, b in pairwise(milestones)):
            raise UserError(f'decay_milestones {milestones}: each must be above the one before; give them in order')
        if milestones[-1] >= config.epochs:
            raise UserError(
                f'decay_milestones {milestones}: the run ends after {config.epochs} epochs, before the last of them; '
                f'lower it, or raise --epochs'
            )


def _check_augmentation(config: AugmentConfig) -> None:
    if config.ratio and not 1 / LONGEST <= min(config.ratio) <= max(config.ratio) <= LONGEST:
        raise UserError(f'ratio {config.ratio}: a crop has an aspect ratio of {1 / LONGEST:g} to {LONGEST}')
    if config.scale and config.scale[1] == 0:
        raise UserError(f"scale {config.scale}: the crop's area must be above 0")
    for name in ('scale', 'ratio'):
        bounds = getattr(config, name)
        if bounds and bounds[0] > bounds[1]:
            raise UserError(f'{name} {bounds}: give the smaller number first')
    _check_policy(config.aa or '')
    if config.no_aug and (config.aa or config.reprob):
        raise UserError(
            f'no_aug turns augmentation off: '
            f'{f"aa {config.aa}" if config.aa else f"reprob {config.reprob:g}"} would do nothing; leave one of them out'
        )


def _check_policy(aa: str) -> None:
    """Bounds that timm does not set; whether it knows the policy is for `check_transform`."""
    if not re.fullmatch('[A-Za-z0-9.-]{0,100}', aa):
        raise UserError(f'aa {shown(aa)}: takes letters, plain digits, points and dashes, such as rand-m9-mstd0.5-inc1')
    for section in aa.split('-')[1:]:
        number = re.fullmatch(r'([a-z]+)([0-9.]+)', section)
        if not number:
            continue
        name, text = number.groups()
        most = MOST_OPERATIONS if name in ('n', 'w', 'd') else 1000
        positive = aa.startswith('augmix') and name in ('a', 'w')  # its widths and shares of chains
        plain = re.fullmatch(r'[0-9]+\.?[0-9]*', text)
        if not plain or float(text) > most or (positive and float(text) == 0):
            raise UserError(f'aa {aa}: {section} takes a number {"> 0 and " * positive}≤ {most}')


def _check_run(config: RunConfig) -> None:
    if config.resume == 'auto' and not config.experiment:
        raise UserError("--resume auto looks in this run's folder: name it with --experiment")
    place = Path(config.experiment or 'default')
    if '..' in place.parts or place.anchor or not place.parts:
        raise UserError(
            f'experiment {config.experiment}: names a folder inside of --output, so it has no .. and does not begin '
            f'with {os.sep}; say with --output where the runs lie'
        )
    parse_interval(config.checkpoint_interval)
    names = ('wandb_project', 'wandb_tags', 'wandb_resume_id')
    _check_needed(*((name, getattr(config, name) is not None, 'log_wandb', config.log_wandb) for name in names))
    if config.wandb_resume_id and not config.resume:
        raise UserError(f'wandb_resume_id {config.wandb_resume_id}: goes on with a run that is resumed; add --resume')


def _check_distillation(config: DistilConfig, model: ModelConfig) -> None:
    teacher, kind, untouched = config.kd_model_name, config.kd_distill_type, DistilConfig()
    _check_needed(
        *(
            (name, value != getattr(untouched, name), 'kd_model_name', teacher)
            for name, value in vars(config).items()
            if name != 'kd_model_name'
        )
    )
    for name, kinds in USED_BY.items():
        if getattr(config, name) != getattr(untouched, name) and kind not in kinds:
            raise UserError(
                f'{name} does nothing with kd_distill_type {kind}; leave it out, or choose {" or ".join(kinds)}'
            )
    if config.distill_loss_weight == config.task_loss_weight == 0:
        raise UserError('distill_loss_weight 0 and task_loss_weight 0 leave nothing to train on: give one above 0')
    if teacher != PARENT:
        return
    if not model.convert:
        raise UserError('kd_model_name parent is the model before its conversion: add --convert, or name a model')
    for name in ('kd_model_kwargs', 'kd_pretrained_path'):
        if getattr(config, name):
            raise UserError(f'{name}: kd_model_name parent has the arguments and weights of --model; leave it out')
    if not (model.pretrained or model.pretrained_path or model.initial_checkpoint):
        raise UserError(
            'kd_model_name parent has weights that nothing has trained: say with --initial-checkpoint, '
            '--pretrained-path or --pretrained where the model starts'
        )


def _check_needed(*rules: Tuple[str, Any, str, Any]) -> None:
    """Each rule: a setting and whether it is given, the one it needs and whether that is given."""
    for name, given, needed, there in rules:
        if given and not there:
            raise UserError(f'{name} does nothing without {needed}; add --{needed.replace("_", "-")}')


def mixes(config: LossConfig) -> bool:
    """Whether images and labels are mixed."""
    return config.mixup > 0 or config.cutmix > 0


def image_channels(config: ModelConfig) -> int:
    """Channels that images are loaded with: 1 for grey, 3 for colour, as the settings say, or the `config.json` of a
    folder or repository that is the model. Another number is a UserError."""
    name, channels = config.model or '', given_channels(config)
    if channels is None and (source_of(name)[0] == 'local-dir' or config.pretrained):
        try:
            folder = source_folder(name)
            arguments = (saved_config(folder)[0] if folder else {}).get('model_args') or {}
        except ValueError as error:
            raise UserError(f'model {error}') from error
        channels = arguments.get('in_chans')
        if channels is not None and channels not in (1, 3):
            raise UserError(
                f'model {name}: its config.json asks for images of {shown(channels)} channels; they are loaded with 1 '
                f'or 3, give another model'
            )
    return 3 if channels is None else channels


def given_channels(config: ModelConfig) -> Optional[int]:
    """What the settings alone say of `image_channels`, None where they do not."""
    given = dict(
        input_size=config.input_size[0] if config.input_size else None,
        in_chans=config.in_chans,
        model_kwargs=(config.model_kwargs or {}).get('in_chans'),
    )
    for name, channels in given.items():
        if channels is not None and channels not in (1, 3):
            raise UserError(f'{name}: {channels} image channels; images are loaded with 1 or 3, give one of these')
    return next((channels for channels in given.values() if channels is not None), None)


@dataclass(frozen=True)
class GlobalBatch:
    """How the images of one update come together, and the learning rate that follows."""

    per_process: int
    processes: int
    accumulated: int
    lr: float
    lr_rule: str

    @property
    def total(self) -> int:
        return self.per_process * self.processes * self.accumulated

    def __str__(self) -> str:
        return f'global batch {self.sizes()}; lr {self.lr:g} ({self.lr_rule})'

    def sizes(self) -> str:
        return (
            f'{self.total} = {self.per_process} per process × {self.processes} processes × '
            f'{self.accumulated} accumulated'
        )


def global_batch(config: BatchConfig, schedule: ScheduleConfig, processes: int) -> GlobalBatch:
    """Check batch per process × processes × accumulation against global_batch_size, and scale the learning rate."""
    per_process, accumulated, wanted = config.batch_size, config.grad_accum_steps, config.global_batch_size
    total = per_process * processes * accumulated
    if wanted is not None and total != wanted:
        raise UserError(
            f'global_batch_size {wanted} is not {per_process} (-b) × {processes} (processes) × {accumulated} '
            f'(--grad-accum-steps) = {total}; {_batch_advice(wanted, per_process, processes)}; on few pictures lower '
            f'it, to --global-batch-size {total}, or take -c finetune_small'
        )
    lr, rule = schedule.lr, 'as given'
    if lr is None:
        ratio = total / schedule.lr_base_size
        lr = schedule.lr_base * (ratio if schedule.lr_base_scale == 'linear' else ratio**0.5)
        rule = f'{schedule.lr_base:g} at {schedule.lr_base_size}, {schedule.lr_base_scale}'
    if schedule.warmup_epochs and schedule.warmup_lr > lr and schedule.sched != 'none':
        raise UserError(
            f'warmup_lr {schedule.warmup_lr:g} is above the learning rate {lr:g} ({rule}), to which the warm-up '
            f'rises; lower --warmup-lr'
        )
    if schedule.min_lr > lr and schedule.sched not in ('none', 'constant'):
        raise UserError(f'min_lr {schedule.min_lr:g} is above the learning rate {lr:g} ({rule}); lower --min-lr')
    return GlobalBatch(per_process, processes, accumulated, lr, rule)


def _batch_advice(wanted: int, per_process: int, processes: int) -> str:
    if wanted % processes:
        return f'{wanted} does not divide among {processes} processes: change their number or --global-batch-size'
    share = wanted // processes
    steps = next(n for n in range(1, share + 1) if share % n == 0 and share // n <= per_process)
    advice = f'use -b {share // steps} --grad-accum-steps {steps}'
    return advice if steps == 1 else f'{advice}, or -b {share} --grad-accum-steps 1 if memory allows'


def check_files(config: TrainConfig) -> None:
    """Files and folders that the settings name are there, and the output can be written. No image is read."""
    named = {name: getattr(config.run, name) for name in ('output', 'experiment', 'resume')}
    named |= {name: getattr(config.model, name) for name in ('pretrained_path', 'initial_checkpoint')}
    named['kd_pretrained_path'] = config.distil.kd_pretrained_path
    named |= {name: getattr(config.data, name) for name in ('data_dir', 'class_map', 'train_split', 'val_split')}
    _check_names(named.items())
    for name in ('pretrained_path', 'initial_checkpoint', 'kd_pretrained_path', 'resume'):
        path = named[name]
        if path and not (name == 'resume' and path == 'auto') and not Path(path).is_file():
            names = ('last.pth.tar',) if name == 'resume' else WEIGHTS
            raise UserError(f'--{name.replace("_", "-")} {path}: {why_no_file(path, names)}')
    place = folder = Path(config.run.output, config.run.experiment or '')
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise UserError(
            f'--output {folder}: cannot be written, {place} is {"not writable" if place.is_dir() else "no folder"}'
        )
    if config.data.class_map:
        for path in (Path(config.data.class_map), Path(config.data.data_dir or '', config.data.class_map)):
            if path.exists() and not path.is_file():
                raise UserError(f'--class-map {path}: is no file')
        data.read_class_map(config.data.class_map, config.data.data_dir)
    _check_source(config.data, config.augment.aug_repeats, config.run.dry_run)
    if config.run.log_wandb and importlib.util.find_spec('wandb') is None:
        raise UserError('log_wandb needs the package wandb, which is not installed: pip install wandb')


def _check_names(named: Iterable[Tuple[str, Optional[str]]]) -> None:
    """Names that no file system takes; the other checks can then ask for them."""
    for name, path in named:
        try:
            if name in ('output', 'experiment'):
                (path or '').encode()  # TensorBoard takes no other
            os.lstat(path or '.')
        except FileNotFoundError:  # what comes after a missing folder has not been looked at
            longest = max(len(os.fsencode(part)) for part in Path(path or '.').parts)
            fault = 'a name of more than 255 bytes' if longest > 255 else None
        except (NotADirectoryError, PermissionError):
            continue
        except (OSError, ValueError) as error:
            fault = getattr(error, 'strerror', None) or first_line(error)
        else:
            continue
        if fault:
            raise UserError(f'{name} {str(path)[:100]!r}: not a path ({fault})')


def _check_source(config: DataConfig, aug_repeats: int, dry_run: bool) -> None:
    """The data set's name, and that something is there; nothing of it is read."""
    prefix = data.check_name(config.dataset)
    package = PACKAGES.get(prefix)
    if package and importlib.util.find_spec(package) is None:
        raise UserError(
            f'dataset {config.dataset} needs the package {package}, which is not installed: pip install {package}'
        )
    if not config.data_dir:
        if prefix not in HUBS and not dry_run:
            raise UserError(
                'no data: give --data-dir DIR, a folder of images sorted into class folders'
                if not prefix
                else f'dataset {config.dataset}: say with --data-dir where it lies'
            )
    elif prefix in ('hfds', 'hfids') or '://' in config.data_dir or config.dataset_download:
        pass  # a cache, which is made; a place on the network; what is fetched
    elif not Path(config.data_dir).exists():
        raise UserError(f'{config.data_dir}: no such folder (--data-dir)')
    if aug_repeats and prefix in ('wds', 'hfids', 'tfds'):
        raise UserError(
            f'aug_repeats {aug_repeats} needs a data set with an index; {config.dataset} is '
            f'read as a stream: set --aug-repeats 0'
        )


def check_transform(config: AugmentConfig, data_config: Dict[str, Any], machine: MachineConfig) -> None:
    """timm takes these settings of augmentation for images of this size, and so does what augments them."""
    try:
        transform = create_transform(
            data_config['input_size'],
            is_training=True,
            no_aug=config.no_aug,
            use_prefetcher=True,
            **data.transform_arguments(config, data_config),
        )
    except (AssertionError, IndexError, KeyError, TypeError, ValueError) as error:
        raise UserError(f'augmentation (aa {config.aa}): timm does not take it, {first_line(error)}') from error
    for operation in data.operations(transform):
        data.check_filter(operation)
    if machine.augment_device != 'cpu':
        data.Draws(transform, data_config['input_size'])
