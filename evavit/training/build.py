"""From settings to what is trained: model, task, optimizer, learning rate, mixup."""

import logging
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import timm
import torch
from timm.data import Mixup
from timm.models import get_model_input_config, resolve_model_input_args
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers, optimizer_kwargs
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler_factory import scheduler_kwargs
from timm.task import ClassificationTask

from evavit import models
from evavit.errors import UserError, first_line
from evavit.models import GridPyramidVisionTransformerV2, GridVisionTransformer, fit_strictly

from .config import nearest
from .signals import Requests

log = logging.getLogger(__name__)


def check_settings(settings):
    """Contradictions between settings, found before data or devices are touched."""
    s = settings
    if not s.model:
        raise UserError('no model: give --model NAME or a config file with -c')
    if s.opt.lower() not in list_optimizers():
        raise UserError(f'unknown optimizer {s.opt}{nearest(s.opt.lower(), list_optimizers())}')
    starts = [name for name in ('pretrained', 'pretrained_path', 'initial_checkpoint') if getattr(s, name)]
    if len(starts) > 1:
        raise UserError(f'{" and ".join(starts)} both name the weights to start from: give one of them')
    if s.linear_probe and not starts:
        raise UserError('linear_probe trains the classifier alone: say with --pretrained-path what gives the features')
    if s.linear_probe and s.layer_decay:
        raise UserError(
            f'layer_decay {s.layer_decay:g} does nothing with linear_probe, which trains one layer; leave '
            f'one of them out'
        )
    if s.warmup_epochs >= s.epochs and not s.warmup_prefix and s.sched != 'none':
        raise UserError(
            f'warmup_epochs {s.warmup_epochs} must be less than epochs {s.epochs}; lower --warmup-epochs, '
            f'or add the warm-up to the epochs with --warmup-prefix'
        )
    if mixes(s) and s.batch_size % 2:
        raise UserError(f'mixup and cutmix pair the images of a batch: batch_size {s.batch_size} must be even')
    if s.resume == 'auto' and not s.experiment:
        raise UserError("--resume auto looks in this run's folder: name it with --experiment")
    Requests(s.checkpoint_interval)
    if s.smoothing >= 1:
        raise UserError(f'smoothing {s.smoothing:g} leaves nothing of the label: it must be less than 1')
    if s.clip_grad == 0:
        raise UserError('clip_grad 0 lets no gradient through: give a bound above 0, or leave it out for no clipping')
    if s.ratio and s.ratio[0] == 0:
        raise UserError(f'ratio {s.ratio}: an aspect ratio must be above 0')
    if s.scale and s.scale[1] == 0:
        raise UserError(f"scale {s.scale}: the crop's area must be above 0")
    if s.layer_decay == 0:
        raise UserError('layer_decay 0 trains nothing but the head: give a factor above 0, or leave it out')
    _check_schedule(s)
    _check_idle(s)
    if not s.train_split or not s.val_split:
        raise UserError('train_split and val_split name splits: they must not be empty')
    if s.experiment and '..' in Path(s.experiment).parts:
        raise UserError(f'experiment {s.experiment}: a folder inside of --output, so without ..')
    if s.torchcompile:
        check_compile_backend(s.torchcompile)
    image_channels(s)
    optimizer = get_optimizer_info(s.opt.lower())
    if optimizer.second_order:
        raise UserError(f'opt {s.opt} needs second derivatives, which train.py does not compute; choose another --opt')
    if s.opt_betas and not optimizer.has_betas:
        raise UserError(f'opt_betas {s.opt_betas}: {s.opt} has none; leave them out, or choose another --opt')
    if s.opt_betas and len(s.opt_betas) != optimizer.num_betas:
        raise UserError(f'opt_betas {s.opt_betas}: {s.opt} takes {optimizer.num_betas} numbers')
    for name in ('scale', 'ratio'):
        bounds = getattr(s, name)
        if bounds and bounds[0] > bounds[1]:
            raise UserError(f'{name} {bounds}: the first number is the smaller one')


def _check_schedule(s):
    if s.sched == 'step' and not s.decay_epochs:
        raise UserError(
            f'decay_epochs {s.decay_epochs}: the step schedule needs a number of epochs above 0 between steps'
        )
    if s.sched == 'multistep':
        milestones = s.decay_milestones
        if any(a >= b for a, b in pairwise(milestones)):
            raise UserError(f'decay_milestones {milestones} must rise')
        if milestones[-1] >= s.epochs:
            raise UserError(
                f'decay_milestones {milestones}: the run ends after {s.epochs} epochs, before the last of them'
            )


def _check_idle(s):
    """Settings that do nothing without another one, or beside it."""
    for name, given, other in (
        ('torchcompile_mode', s.torchcompile_mode, 'torchcompile'),
        ('bce_target_thresh', s.bce_target_thresh is not None, 'bce_loss'),
        ('no_resume_opt', s.no_resume_opt, 'resume'),
        ('model_ema_warmup', s.model_ema_warmup, 'model_ema'),
    ):
        if given and not getattr(s, other):
            raise UserError(f'{name} does nothing without {other}; add --{other.replace("_", "-")}')
    if s.mixup_off_epoch and not mixes(s):
        raise UserError('mixup_off_epoch does nothing without mixup or cutmix; leave it out')
    if s.no_aug and (s.aa or s.reprob):
        raise UserError(
            f'no_aug turns augmentation off: {f"aa {s.aa}" if s.aa else f"reprob {s.reprob:g}"} would do '
            f'nothing; leave one of them out'
        )


def mixes(settings):
    return settings.mixup > 0 or settings.cutmix > 0


@dataclass(frozen=True)
class BatchPlan:
    """How the images of one update come together, and the learning rate that follows."""

    per_process: int
    processes: int
    accumulated: int
    lr: float
    lr_rule: str

    @property
    def total(self):
        return self.per_process * self.processes * self.accumulated

    def __str__(self):
        return (
            f'global batch {self.total} = {self.per_process} per process × {self.processes} processes × '
            f'{self.accumulated} accumulated; lr {self.lr:g} ({self.lr_rule})'
        )


def plan_batch(settings, processes):
    """Check batch per process × processes × accumulation against global_batch_size, and scale the learning rate."""
    per_process, accumulated, wanted = settings.batch_size, settings.grad_accum_steps, settings.global_batch_size
    total = per_process * processes * accumulated
    if wanted is not None and total != wanted:
        raise UserError(
            f'global_batch_size {wanted} is not {per_process} (-b) × {processes} (processes) × {accumulated} '
            f'(--grad-accum-steps) = {total}; {_batch_advice(wanted, per_process, processes)}'
        )
    lr, rule = settings.lr, 'as given'
    if lr is None:
        ratio = total / settings.lr_base_size
        lr = settings.lr_base * (ratio if settings.lr_base_scale == 'linear' else ratio**0.5)
        rule = f'{settings.lr_base:g} at {settings.lr_base_size}, {settings.lr_base_scale}'
    return BatchPlan(per_process, processes, accumulated, lr, rule)


def _batch_advice(wanted, per_process, processes):
    if wanted % processes:
        return f'{wanted} does not divide among {processes} processes: change their number or --global-batch-size'
    share = wanted // processes
    steps = next(n for n in range(1, share + 1) if share % n == 0 and share // n <= per_process)
    advice = f'use -b {share // steps} --grad-accum-steps {steps}'
    return advice if steps == 1 else f'{advice}, or -b {share} --grad-accum-steps 1 if memory allows'


def image_channels(settings):
    """Channels that images are loaded with: those of grey or of colour images."""
    said = dict(
        input_size=settings.input_size[0] if settings.input_size else None,
        in_chans=settings.in_chans,
        model_kwargs=(settings.model_kwargs or {}).get('in_chans'),
    )
    for name, channels in said.items():
        if channels is not None and channels not in (1, 3):
            raise UserError(f'{name}: {channels} image channels; images are loaded with 1 or 3')
    return next((channels for channels in said.values() if channels is not None), 3)


# arguments of timm.create_model that are not the model's own → the option to use
OWN_OPTIONS = dict(
    num_classes='--num-classes',
    drop_rate='--drop',
    drop_path_rate='--drop-path',
    device='--device',
    dtype='--amp',
    pretrained='--pretrained',
    checkpoint_path='--initial-checkpoint in train.py, --checkpoint in validate.py',
)
FUSED = ('adam', 'adamw', 'sgd', 'nesterov', 'momentum')  # timm's names of optimizers that PyTorch fuses
OURS = (GridVisionTransformer, GridPyramidVisionTransformerV2)
LARGE = 200e6  # parameters above which no trial pass is made on the CPU


def build_model(settings, num_classes, device=None):
    """The model by its name, with the weights it starts from; whatever timm or the model refuses is a UserError.

    With a device, such as meta, it is built there without those weights: to look at, not to train.
    """
    train = vars(settings)
    kwargs = dict(settings.model_kwargs or {})
    for name, instead in OWN_OPTIONS.items():
        if name in kwargs:
            raise UserError(f'model_kwargs: {name} has an option of its own, {instead}')
    if ':' not in settings.model and not timm.is_model(settings.model.split('.')[0]):
        raise UserError(f'unknown model {settings.model}{nearest(settings.model, timm.list_models())}')
    try:
        arguments = resolve_model_input_args(
            settings.model,
            args={name: train[name] for name in ('in_chans', 'img_size', 'input_size')},
            num_classes=num_classes,
            drop_rate=train.get('drop'),
            drop_path_rate=train.get('drop_path'),
            **(dict(device=device) if device else _pretrained_file(settings, num_classes)),
            **kwargs,
        )
        model = timm.create_model(**arguments)
        if train.get('grad_checkpointing'):
            model.set_grad_checkpointing(True)
    except UserError:
        raise
    except Exception as error:  # each model has its own errors for arguments that do not fit
        file = f', weights {train["pretrained_path"]}' if train.get('pretrained_path') and not device else ''
        raise UserError(f'model {settings.model} {_shown(kwargs)}{file}: {first_line(error)[:400]}') from error
    if train.get('initial_checkpoint') and not device:
        load_weights(model, settings.initial_checkpoint)
    if train.get('linear_probe'):
        freeze_body(model)
    return model


def freeze_body(model):
    """Leave the classifier alone to be trained. (timm.utils.freeze leaves out parameters of the model itself, such as
    the position embedding, and puts other modules in place of batch norms, with other names in the state dict.)"""
    model.requires_grad_(False)
    classifier = model.get_classifier()
    for part in classifier if isinstance(classifier, tuple) else (classifier,):
        part.requires_grad_(True)
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError('linear_probe: the model has no classifier to train')


@torch.no_grad()
def try_model(model, input_size, settings):
    """Pass two empty images through the model where it is: arguments that only fail then are a UserError as well."""
    if sum(p.numel() for p in model.parameters()) > LARGE:
        return
    training = model.training
    model.eval()
    about = f'model {settings.model} {_shown(settings.model_kwargs or {})}, images {"×".join(map(str, input_size))}'
    try:
        with torch.random.fork_rng(devices=[]):
            logits = model(torch.zeros(2, *input_size, device=next(model.parameters()).device))
    except Exception as error:  # each model has its own errors for images that do not fit
        raise UserError(f'{about}: {first_line(error)[:400]}') from error
    model.train(training)
    shape = tuple(getattr(logits, 'shape', ()))
    if shape != (2, model.num_classes):
        raise UserError(
            f"{about}: its output for 2 images has shape {shape}, a classifier's is "
            f'{(2, model.num_classes)}; check --model-kwargs'
        )


def _shown(kwargs):
    return 'with ' + ' '.join(f'{key}={value}' for key, value in kwargs.items()) if kwargs else 'as it is'


def _pretrained_file(settings, num_classes):
    """timm loads a file as the model's pretrained weights: positions and channels adapt, another head is made anew."""
    path = getattr(settings, 'pretrained_path', None)
    if not path:
        return dict(pretrained=settings.pretrained)
    state = read_weights(path)
    head = timm.get_pretrained_cfg_value(settings.model, 'classifier') or 'head'
    weight = state.get(f'{head}.weight') if isinstance(head, str) else None
    classes = weight.shape[0] if weight is not None else -1
    return dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(path), num_classes=classes))


def read_weights(path, use_ema=True):
    """The weights of a checkpoint or safetensors file. Files that carry code are refused (weights_only)."""
    try:
        return models.read_weights(path, use_ema)
    except RuntimeError as error:
        raise UserError(str(error)) from error


def load_weights(model, path, use_ema=True):
    """Load the weights of a file with the model's classes, for train.py, validate.py and export.py alike. Models of
    evavit fit files of other sizes and softmax models to themselves, see `evavit.models.fit_checkpoint`; timm's take
    their own weights of other sizes. The log says what was changed, an error what does not fit."""
    state = read_weights(path, use_ema=use_ema)
    check_classes(model, state, path)
    try:
        state = fit_strictly(state, model) if isinstance(model, OURS) else _resampled(model, state)
    except Exception as error:  # each model has its own errors for weights that do not fit
        raise UserError(f'{path}: {first_line(error)[:400]}') from error
    check_fit(model, state, path)
    model.load_state_dict(state)


def _resampled(model, weights):
    """Weights brought to the image size of a model of timm's, by the `checkpoint_filter_fn` of its file."""
    own = model.state_dict()
    fit = getattr(sys.modules[type(model).__module__], 'checkpoint_filter_fn', None)
    if fit is None or own.keys() != weights.keys():
        return weights  # `check_fit` says what is wrong with it
    other = [name for name in own if own[name].shape != weights[name].shape]
    if not other:
        return weights
    fitted = fit(dict(weights), model)
    for name in other:
        if name in fitted and fitted[name].shape == own[name].shape:
            log.warning(
                f'{name} resampled from {"×".join(map(str, weights[name].shape))} to '
                f'{"×".join(map(str, own[name].shape))}'
            )
    return fitted


def check_classes(model, state, path):
    own = model.state_dict()
    head = (getattr(model, 'pretrained_cfg', None) or {}).get('classifier')
    name = f'{head}.weight'
    if name in own and name in state and own[name].shape[0] != state[name].shape[0]:
        raise UserError(
            f'{path} has {state[name].shape[0]} classes, the model or data set has {own[name].shape[0]}; '
            f'give --num-classes {state[name].shape[0]} or data with as many, or start from its body with '
            f'--pretrained-path'
        )


def check_fit(model, state, path):
    check_classes(model, state, path)
    own = model.state_dict()
    missing, surplus = [key for key in own if key not in state], [key for key in state if key not in own]
    other = [key for key in own if key in state and own[key].shape != state[key].shape]
    for keys, what in ((missing, 'lacks'), (surplus, 'has, unlike the model,'), (other, 'has in another shape')):
        if keys:
            raise UserError(
                f'{path} does not fit the model: it {what} {keys[0]}'
                + (f' and {len(keys) - 1} more' if len(keys) > 1 else '')
                + '; check --model, --model-kwargs and --img-size'
            )


def build_task(model, settings, device):
    """timm's classification task, which holds model, loss and moving average."""
    try:
        task = ClassificationTask(
            model,
            criterion_kwargs=dict(
                loss_type='bce' if settings.bce_loss else 'ce',
                smoothing=settings.smoothing,
                soft_targets=mixes(settings),
                bce_target_thresh=settings.bce_target_thresh,
            ),
            device=device,
            verbose=False,
        )
    except ValueError as error:
        raise UserError(first_line(error)) from error
    if settings.model_ema:
        task.setup_ema(decay=settings.model_ema_decay, use_warmup=settings.model_ema_warmup)
    return task


def compile_and_distribute(task, settings, process):
    if settings.torchcompile:
        check_compile_backend(settings.torchcompile)
        task.compile(backend=settings.torchcompile, mode=settings.torchcompile_mode)
    if process.distributed:
        task.prepare_distributed(device_ids=[process.local_rank] if process.device.type == 'cuda' else None)


def check_compile_backend(backend):
    known = torch.compiler.list_backends(exclude_tags=())
    if backend not in known:
        raise UserError(f'unknown backend of torch.compile {backend}{nearest(backend, known)}')


def build_mixup(settings, num_classes):
    if not mixes(settings):
        return None
    if num_classes < 2:
        raise UserError(f'mixup and cutmix need two classes or more, not {num_classes}; set --mixup 0 --cutmix 0')
    return Mixup(
        mixup_alpha=settings.mixup,
        cutmix_alpha=settings.cutmix,
        prob=settings.mixup_prob,
        switch_prob=settings.mixup_switch_prob,
        mode=settings.mixup_mode,
        label_smoothing=settings.smoothing,
        num_classes=num_classes,
    )


def build_optimizer(model, settings, lr):
    """timm's optimizer; on a GPU the fused one of PyTorch's, which skips a step without the host having to wait."""
    fused = settings.opt.lower() in FUSED and next(model.parameters()).is_cuda
    try:
        return create_optimizer_v2(
            model, **{**optimizer_kwargs(settings), 'lr': lr}, **(dict(fused=True) if fused else {})
        )
    except (AssertionError, AttributeError, RuntimeError, TypeError, ValueError, ImportError) as error:
        raise UserError(f'optimizer {settings.opt}: {first_line(error)}') from error


def build_schedule(optimizer, settings, updates_per_epoch):
    """timm's schedule and the number of epochs to train, cool-down and prefixed warm-up included."""
    kwargs = {**scheduler_kwargs(settings), 'decay_epochs': settings.decay_epochs}
    try:
        return create_scheduler_v2(optimizer, **kwargs, updates_per_epoch=updates_per_epoch)
    except (AssertionError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f'schedule {settings.sched}: {first_line(error)}') from error


def model_line(model):
    parameters = sum(p.numel() for p in model.parameters())
    size = '×'.join(map(str, get_model_input_config(model)['input_size']))
    return f'{parameters / 1e6:.2f} M parameters, input {size}, {model.num_classes} classes'
