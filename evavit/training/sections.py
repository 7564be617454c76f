"""The settings of the scripts, in sections by what uses them.

A section is a dataclass whose fields are the one table of settings: flags, YAML keys, checks of types and ranges, and
the saved `args.yaml` follow from them (see `config`). Names are timm's.
"""
# ruff: noqa: RUF009 (what `option` returns is a dataclass's field)

import math
import os
import re
import sys
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, List, Optional, Tuple, Union

from evavit.arguments import CROP_MODES, NUMBER, shown
from evavit.errors import UserError

MODES = ('default', 'reduce-overhead', 'max-autotune', 'max-autotune-no-cudagraphs')  # of torch.compile's Inductor
BREAKS = re.compile('[\x00-\x1f\x7f-\x9f\u2028\u2029]')  # what would break a line in two, or not be seen
WITHOUT_POINT = re.compile(r'[+-]?\d{1,9}[eE][+-]?\d{1,9}', re.ASCII)  # a number, which YAML reads as a text
LONGEST_SIDE = 10**5  # pixels of an image
LONGEST = 4096  # characters of a text: Linux takes no longer path
MOST_VALUES = 1_000_000  # in a checkpoint's settings; each counts as often as it is referred to
MOST_LEVELS = 100  # of lists in lists: what compares or writes them goes down one by one
MOST_LR = 1e30  # float32 holds it, times the factors of schedules and optimizers
MOST_WORKERS = max(32, 8 * (os.cpu_count() or 1))

BOTH = ('train', 'validate')
RUN = ('train', 'validate', 'inference')  # a model on images
ALL = ('train', 'validate', 'export', 'inference')
LOADED = ('validate', 'export', 'inference')


def is_whole(value: Any, low: int = 0, high: int = 2**63 - 1) -> bool:
    return type(value) is int and low <= value <= high


def is_number(value: Any) -> bool:
    """A finite number."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def is_plain(value: Any, other: Callable[[Any], bool] = lambda item: False) -> bool:
    """Nothing, truth values, numbers, texts, and lists and dictionaries of these, as JSON has them, or of what `other`
    says; few enough, and not too deep."""
    rest, left = [(value, 0)], MOST_VALUES
    while rest:
        item, level = rest.pop()
        left -= 1
        if isinstance(item, dict) and all(isinstance(key, str) for key in item):
            parts = [*item.values()]
        elif isinstance(item, (list, tuple)):
            parts = [*item]
        elif item is None or type(item) in (bool, float, str) or is_whole(item, -(2**63)) or other(item):
            continue
        else:
            return False
        if level == MOST_LEVELS or len(parts) + len(rest) > left:
            return False
        rest += [(part, level + 1) for part in parts]
    return True


@dataclass(frozen=True)
class Option:
    """One setting. `count` is None for one value, '+' for a list, an int for a list of that length."""

    name: str
    type: type
    default: Any
    help: str
    section: str
    short: str = ''
    choices: Tuple[str, ...] = ()
    count: Union[int, str, None] = None
    low: Optional[float] = None  # smallest and largest value allowed
    high: Optional[float] = None
    bare: Optional[str] = None  # the value of a flag that is given without one
    scripts: Tuple[str, ...] = ('train',)

    @property
    def flag(self) -> str:
        return '--' + self.name.replace('_', '-')

    def expects(self) -> str:
        names = {bool: 'true or false', int: 'a whole number', float: 'a number', str: 'a line', dict: 'key: value'}
        name = names[self.type]
        if self.count is not None:
            items = 'words' if self.type is str else 'numbers'
            name = f'a list of {items}' if self.count == '+' else f'a list of {self.count} {items}'
        if self.choices:
            name = 'one of ' + ', '.join(map(str, self.choices))
        bounds = ((sign, bound) for sign, bound in (('≥', self.low), ('≤', self.high)) if bound is not None)
        return name + ' and'.join(f' {sign} {bound:g}' for sign, bound in bounds)

    def parse(self, value: Any, where: object) -> Any:
        """The value in this option's type, or a UserError that names it. Texts from flags and YAML go the same way."""
        if value is None and self.default is None:
            return None
        try:
            if self.count is None:
                return self._parse_one(value)
            if not isinstance(value, (list, tuple)) or (self.count != '+' and len(value) != self.count) or not value:
                raise ValueError
            return [self._parse_one(item) for item in value]
        except (ValueError, TypeError):
            told = f'{where}: {shown(value)} does not fit {self.name}, which takes {self.expects()}'
            items = value if isinstance(value, (list, tuple)) else [value]
            if self.type is str and not all(isinstance(item, str) for item in items):  # YAML reads 1.10 as 1.1
                told += '; put a text that YAML reads as something else in quotes'
            raise UserError(told) from None

    def _parse_one(self, value: Any) -> Any:
        if self.type is dict:
            if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
                raise ValueError
            for key, item in value.items():
                if not is_plain({self.name: {key: item}}):  # as deep as it lies in a checkpoint's settings
                    raise UserError(
                        f'{self.name}: {key}={shown(item)} is nothing that a checkpoint keeps; give true, false, null, '
                        f'a number below 2^63, a text, or a list or dictionary of these'
                    )
            return {key: float(item) if WITHOUT_POINT.fullmatch(str(item)) else item for key, item in value.items()}
        if self.type is bool:
            if not isinstance(value, bool):
                raise ValueError
            return value
        if isinstance(value, (bool, dict, list)) or value is None:
            raise ValueError
        if self.type is str and not isinstance(value, (str, int)):
            raise ValueError
        if self.type is int and isinstance(value, float):
            raise ValueError
        if self.type in NUMBER and isinstance(value, str) and not NUMBER[self.type].fullmatch(value):
            raise ValueError
        value = self.type(value)
        if self.type is str and (len(value) > LONGEST or BREAKS.search(value)):
            raise ValueError
        if self.type is str:
            os.fsencode(value)  # a ValueError where no file can be called so
        if self.type is float and not math.isfinite(value):
            raise ValueError
        if self.choices and value not in self.choices:
            raise ValueError
        if (self.low is not None and value < self.low) or (self.high is not None and value > self.high):
            raise ValueError
        return value


def option(default: Any, help: str, **about: Any) -> Any:
    """A field of a section; what it says besides type and default are fields of `Option`."""
    metadata = dict(help=help, **about)
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class DataConfig:
    """Which images there are, and their classes."""

    data_dir: Optional[str] = option(
        None,
        'folder of the data set; for inference.py pictures, in folders or not, a tar file, or one picture',
        scripts=RUN,
    )
    dataset: str = option(
        '',
        "data set in timm's form: empty for an image folder or tar, else torch/NAME, hfds/NAME, wds/NAME, …",
        scripts=BOTH,
    )
    dataset_download: bool = option(False, "let the data set's library download it", scripts=BOTH)
    train_split: str = option('train', 'name of the training split')
    val_split: str = option('validation', 'name of the split to validate on')
    split: str = option('validation', 'name of the split to validate on', scripts=('validate',))
    val_fraction: Optional[float] = option(
        None,
        'share of each class that is held out for validation, for a folder without a validation split; which images '
        'follows from their names and the seed',
        low=0.001,
        high=0.999,
        scripts=BOTH,
    )
    class_map: Optional[str] = option(
        None, 'text file with one class name a line, in the order of their indices', scripts=RUN
    )
    train_num_samples: Optional[int] = option(None, 'training images in an iterable data set that does not say', low=1)
    val_num_samples: Optional[int] = option(None, 'validation images in an iterable data set that does not say', low=1)
    num_samples: Optional[int] = option(
        None, 'images in an iterable data set that does not say', low=1, scripts=('validate',)
    )
    max_bad_images: float = option(
        0.001,
        'unreadable images that an epoch may have, as a share of the data set; more stop the run',
        low=0,
        high=1,
        scripts=BOTH,
    )


@dataclass
class ModelConfig:
    """The model, the weights it starts from, and how it takes its images."""

    model: Optional[str] = option(
        None, 'name of a model of evavit or timm, local-dir:FOLDER or hf-hub:OWNER/NAME', short='-m', scripts=ALL
    )
    model_kwargs: Optional[Dict[str, Any]] = option(
        None, "arguments of the model, key=value …, joined key by key with the YAML file's", scripts=ALL
    )
    convert: Optional[str] = option(
        None,
        "convert timm's vision transformer, with the weights it starts from, to this attention, such as eva",
        scripts=ALL,
    )
    convert_kwargs: Optional[Dict[str, Any]] = option(
        None, 'arguments of evavit.convert_vit, key=value …, such as window_size=7', scripts=ALL
    )
    pretrained: bool = option(False, 'start from the weights that timm publishes for the model', scripts=ALL)
    pretrained_path: Optional[str] = option(
        None, "start from the weights in this file, or a run's best; a head with other classes is made anew"
    )
    initial_checkpoint: Optional[str] = option(
        None, "start from the weights in this file, or a run's best, with its classifier: of as many classes"
    )
    linear_probe: bool = option(False, 'train the classifier alone, on the features of the weights to start from')
    num_classes: Optional[int] = option(
        None, 'classes of the model; default: those of the data set', low=1, high=10**6, scripts=ALL
    )
    in_chans: Optional[int] = option(None, 'image channels, 3 (default) or 1', choices=(1, 3), scripts=ALL)
    img_size: Optional[int] = option(
        None, "image side in pixels; default: the model's", low=1, high=LONGEST_SIDE, scripts=ALL
    )
    input_size: Optional[List[int]] = option(
        None,
        'channels, height and width, for images that are not square',
        count=3,
        low=1,
        high=LONGEST_SIDE,
        scripts=ALL,
    )
    crop_pct: Optional[float] = option(
        None, 'share of the image that the centre crop of validation keeps', low=0.01, high=1, scripts=ALL
    )
    crop_mode: Optional[str] = option(
        None, "how validation makes other shapes of images fit; default: the model's", choices=CROP_MODES, scripts=ALL
    )
    mean: Optional[List[float]] = option(None, 'mean of each channel, of values in 0…1', low=0, high=1, scripts=ALL)
    std: Optional[List[float]] = option(
        None, 'standard deviation of each channel, of values in 0…1', low=0.0001, high=1, scripts=ALL
    )
    interpolation: Optional[str] = option(
        None,
        'resizing in validation, and in training unless train_interpolation is set',
        choices=('bilinear', 'bicubic', 'nearest', 'lanczos'),
        scripts=ALL,
    )
    drop: Optional[float] = option(None, 'dropout before the classifier', low=0, high=1)
    drop_path: Optional[float] = option(
        None, 'stochastic depth of the last block, growing linearly from the first', low=0, high=1
    )
    grad_checkpointing: bool = option(False, 'recompute activations in the backward pass, to save memory')


@dataclass
class BatchConfig:
    """How many images make an update."""

    batch_size: int = option(128, 'images per process and step', short='-b', low=1, scripts=RUN)
    validation_batch_size: Optional[int] = option(
        None, 'images per process in validation; default: batch_size', short='-vb', low=1
    )
    grad_accum_steps: int = option(1, 'steps whose gradients are added up before an update', low=1)
    global_batch_size: Optional[int] = option(
        None, 'images per update over all processes, checked against batch_size × processes × grad_accum_steps', low=1
    )


@dataclass
class OptimConfig:
    """The optimizer, and what bounds the gradient."""

    opt: str = option('adamw', 'optimizer, any of timm.optim.list_optimizers()')
    opt_eps: Optional[float] = option(None, 'epsilon of the optimizer', low=0)
    opt_betas: Optional[List[float]] = option(None, 'betas of the optimizer', low=0, high=1)
    momentum: float = option(0.9, 'momentum, for optimizers that have it', low=0, high=1)
    weight_decay: float = option(0.05, 'weight decay; none on biases, norms and what the model excludes', low=0)
    layer_decay: Optional[float] = option(
        None, 'learning rate factor from layer to layer, towards the input', low=0, high=1
    )
    clip_grad: Optional[float] = option(None, 'bound on the gradient, see clip_mode', low=0)
    clip_mode: str = option('norm', 'what clip_grad bounds', choices=('norm', 'value', 'agc'))


@dataclass
class ScheduleConfig:
    """The learning rate over the epochs."""

    sched: str = option(
        'cosine',
        'learning rate schedule',
        choices=('cosine', 'tanh', 'poly', 'step', 'multistep', 'wsd', 'constant', 'none'),
    )
    sched_on_updates: bool = option(False, 'move the learning rate at each update, not at each epoch')
    epochs: int = option(300, 'epochs to train, warm-up included unless warmup_prefix', low=1)
    lr: Optional[float] = option(
        None, 'learning rate; default: lr_base scaled to the global batch', low=0, high=MOST_LR
    )
    lr_base: float = option(0.001, 'learning rate at a global batch of lr_base_size', low=0, high=MOST_LR)
    lr_base_size: int = option(1024, 'global batch that lr_base is meant for', low=1)
    lr_base_scale: str = option('linear', 'how lr grows with the global batch', choices=('linear', 'sqrt'))
    min_lr: float = option(0.0, 'learning rate at the end', low=0, high=MOST_LR)
    warmup_lr: float = option(1e-06, 'learning rate at the start of the warm-up', low=0, high=MOST_LR)
    warmup_epochs: int = option(5, 'epochs of linear warm-up', low=0)
    warmup_prefix: bool = option(False, 'add the warm-up to the epochs, instead of counting it among them')
    cooldown_epochs: int = option(0, 'epochs at min_lr after the schedule', low=0)
    decay_epochs: Optional[float] = option(None, 'epochs between steps (step), length of the decay (wsd)', low=0)
    decay_milestones: List[int] = option([90, 180, 270], 'epochs at which the rate steps down (multistep)', low=1)
    decay_rate: float = option(0.1, 'factor of a step, power of poly', low=0, high=100)


@dataclass
class AugmentConfig:
    """What is done to the images of training."""

    no_aug: bool = option(
        False, 'training images are brought to the size as a whole, whatever their shape, and not augmented'
    )
    train_interpolation: Optional[str] = option(
        None, 'resizing in training', choices=('random', 'bilinear', 'bicubic', 'nearest', 'lanczos')
    )
    scale: Optional[List[float]] = option(
        None, "range of the random crop's area; default 0.08 1.0", count=2, low=0, high=1
    )
    ratio: Optional[List[float]] = option(
        None, "range of the random crop's aspect ratio; default 0.75 1.333", count=2, low=0
    )
    hflip: float = option(0.5, 'probability of a horizontal flip', low=0, high=1)
    vflip: float = option(0.0, 'probability of a vertical flip', low=0, high=1)
    color_jitter: float = option(0.4, 'colour jitter; off where aa is set, as in timm', low=0, high=1000)
    aa: Optional[str] = option(None, 'AutoAugment or RandAugment policy, such as rand-m9-mstd0.5-inc1')
    aug_repeats: int = option(
        0,
        'augmented copies of an image in an epoch (repeated augmentation); an epoch then '
        'shows 1/aug_repeats of the images',
        low=0,
        high=100,
    )
    reprob: float = option(0.0, 'probability of random erasing', low=0, high=1)
    remode: str = option('pixel', 'what random erasing fills with', choices=('const', 'rand', 'pixel'))
    recount: int = option(1, 'largest number of erased boxes in an image', low=1, high=100)


@dataclass
class LossConfig:
    """Mixing of images and labels, and the loss."""

    mixup: float = option(0.0, "mixup's alpha; 0 is off", low=0)
    cutmix: float = option(0.0, "cutmix's alpha; 0 is off", low=0)
    mixup_prob: float = option(1.0, 'probability of mixup or cutmix', low=0, high=1)
    mixup_switch_prob: float = option(0.5, 'probability of cutmix where both are on', low=0, high=1)
    mixup_mode: str = option('batch', 'what shares a mixing weight', choices=('batch', 'pair', 'elem'))
    mixup_off_epoch: int = option(0, 'epoch at which mixup and cutmix stop; 0 is never', low=0)
    smoothing: float = option(0.1, 'label smoothing', low=0, high=1)
    bce_loss: bool = option(False, 'binary cross-entropy over the classes instead of softmax cross-entropy')
    bce_target_thresh: Optional[float] = option(
        None, 'with bce_loss: targets above this count as 1, others as 0', low=0, high=1
    )


@dataclass
class DistilConfig:
    """The teacher of knowledge distillation, and what is compared with it."""

    kd_model_name: Optional[str] = option(
        None,
        'distil from this model of evavit or timm; parent: from the model before its conversion (--convert); none: '
        'from none, though the file names one',
    )
    kd_model_kwargs: Optional[Dict[str, Any]] = option(None, 'arguments of the teacher, key=value …')
    kd_pretrained_path: Optional[str] = option(
        None, "file with the teacher's weights; default: those that timm publishes for it"
    )
    kd_distill_type: str = option(
        'logit',
        "what is compared: logits, features, both, or the logits of the model's own distillation head (token)",
        choices=('logit', 'feature', 'logit+feature', 'token'),
    )
    kd_loss_type: str = option('kl', 'loss between logits', choices=('kl',))
    distill_loss_weight: Optional[float] = option(
        None, 'weight of the distillation loss; default: 1, or 1 - task_loss_weight where that is given alone', low=0
    )
    task_loss_weight: Optional[float] = option(None, 'weight of the loss against the labels; default: 1', low=0)
    kd_temperature: float = option(4.0, 'temperature of the softmax over logits', low=0.01, high=1000)
    kd_feature_level: str = option(
        'pooled',
        'features that are compared: those before the classifier, or every token of the last block',
        choices=('pooled', 'tokens'),
    )
    kd_feature_weight: float = option(1.0, 'with logit+feature: weight of the features beside the logits', low=0)
    kd_student_feature_dim: Optional[int] = option(None, 'width of the features; default: asked of the model', low=1)
    kd_teacher_feature_dim: Optional[int] = option(
        None, "width of the teacher's features; default: asked of the teacher", low=1
    )
    kd_token_distill_type: str = option(
        'soft', "with token: the teacher's distribution, or its first choice", choices=('soft', 'hard')
    )


@dataclass
class EmaConfig:
    """The exponential moving average of the weights."""

    model_ema: bool = option(False, 'keep an exponential moving average of the weights, and judge the run by it')
    model_ema_decay: float = option(0.9998, 'decay of the average', low=0, high=1)
    model_ema_warmup: bool = option(False, 'let the decay grow from 0')


@dataclass
class MachineConfig:
    """Device, precision, compilation, loading processes."""

    device: Optional[str] = option(None, 'cpu, cuda or cuda:N; default: cuda where there is one, else cpu', scripts=ALL)
    amp: bool = option(False, 'automatic mixed precision', scripts=RUN)
    amp_dtype: str = option('bfloat16', 'low precision of amp', choices=('bfloat16', 'float16'), scripts=RUN)
    torchcompile: Optional[str] = option(
        None,
        'compile the model: with a backend, or with Inductor in the mode named (default: the fastest mode); auto: on '
        'CUDA alone; none: not at all',
        bare='inductor',
        scripts=RUN,
    )
    torchcompile_mode: Optional[str] = option(
        None,
        "mode of torch.compile's Inductor; default: CUDA graphs (reduce-overhead) on CUDA",
        choices=MODES,
        scripts=RUN,
    )
    channels_last: bool = option(False, 'keep images in channels-last memory order', scripts=RUN)
    workers: int = option(
        4,
        'data loading processes, for each training process; at most 32, or 8 a core where that is more',
        short='-j',
        low=0,
        high=MOST_WORKERS,
        scripts=RUN,
    )
    pin_mem: bool = option(False, 'page-locked memory for the copies to a GPU', scripts=RUN)
    augment_device: str = option(
        'cpu',
        'what decodes and augments the images: the loading processes, or the GPU',
        choices=('cpu', 'cuda'),
        scripts=BOTH,
    )
    cache_device: bool = option(
        False, 'decode the data set once and keep it on the GPU, with augment_device cuda', scripts=BOTH
    )


@dataclass
class RunConfig:
    """Seed, folder, checkpoints and log of a run, and what validation writes."""

    seed: int = option(
        42,
        'seed of weights, sample order, augmentation and noise, and of the images that val_fraction holds out',
        low=0,
        high=2147483647,
        scripts=BOTH,
    )
    dry_run: bool = option(False, 'print what the run would be, and stop; no image is read, no GPU touched')
    output: str = option('output', 'folder of the runs')
    experiment: Optional[str] = option(None, "name of this run's folder in output; default: time, model, image size")
    resume: Optional[str] = option(
        None, "checkpoint to continue, or auto: the last whole one in this run's folder, if there is one"
    )
    no_resume_opt: bool = option(False, 'resume the weights alone, with a new optimizer')
    eval_metric: str = option('top1', 'what makes the best checkpoint', choices=('top1', 'top5', 'loss'))
    val_interval: int = option(1, 'epochs from one validation to the next; the last epoch is always validated', low=1)
    checkpoint_hist: int = option(3, 'best checkpoints to keep', low=1)
    checkpoint_interval: Optional[str] = option(
        None, 'save within the epoch too: every so many updates (500) or minutes (10m)'
    )
    max_skipped: int = option(10, 'updates in a row without a finite loss and gradient, at which the run stops', low=1)
    log_interval: int = option(
        50, 'updates between lines of the log, which come sooner where they take long', low=1, scripts=RUN
    )
    log_wandb: bool = option(False, 'send the settings and the metrics of each epoch to Weights & Biases, too')
    wandb_project: Optional[str] = option(None, 'its project')
    wandb_tags: Optional[List[str]] = option(None, 'tags of the run there')
    wandb_resume_id: Optional[str] = option(None, 'id of the run there that a resumed run goes on with')
    stall_timeout: float = option(
        600.0,
        'seconds without data or without an answer of the other processes after which the run ends; 0 waits for ever',
        low=0,
        high=1e6,
        scripts=RUN,
    )
    results_file: Optional[str] = option(
        None,
        'write the metrics here, as .csv or .json; inference.py: the results, in results_dir, also as .parquet',
        scripts=('validate', 'inference'),
    )
    metrics_avg: Optional[str] = option(
        None,
        'add precision, recall and F1 to the metrics: the mean of the classes, over all images, or the mean weighted '
        'by images',
        choices=('macro', 'micro', 'weighted'),
        scripts=('validate',),
    )
    report_dir: Optional[str] = option(
        None,
        'write here accuracy, precision, recall and F1 of each class, the confusion matrix as CSV and picture, and '
        'the calibration',
        scripts=('validate',),
    )
    latency: bool = option(
        False, 'add the median milliseconds of a forward pass, of one image and of a batch (-b)', scripts=('validate',)
    )


@dataclass
class WeightsConfig:
    """The weights to judge or to export."""

    checkpoint: Optional[str] = option(
        None,
        'weights: a checkpoint of train.py (.pth.tar, .safetensors), the folder of its run, one of save_folder, or any '
        'file that fits the model',
        scripts=LOADED,
    )
    use_ema: bool = option(False, 'take the averaged weights of a .pth.tar checkpoint', scripts=LOADED)


@dataclass
class ResultsConfig:
    """What inference.py says of each picture, and where."""

    results_dir: Optional[str] = option(None, 'folder of the results; default: this one', scripts=('inference',))
    results_format: Optional[List[str]] = option(
        None,
        "forms of the results; default: that of results_file's name, else csv",
        choices=('csv', 'json', 'json-records', 'json-split', 'parquet'),
        scripts=('inference',),
    )
    results_separate_col: bool = option(
        False, 'a column for each of the topk classes in JSON and Parquet too, not lists', scripts=('inference',)
    )
    topk: int = option(1, 'most likely classes to name', low=1, scripts=('inference',))
    fullname: bool = option(
        False, "a picture's whole name within data_dir, not the last part alone", scripts=('inference',)
    )
    filename_col: str = option('filename', "name of the column of pictures' names", scripts=('inference',))
    index_col: str = option('index', 'name of the column of class numbers', scripts=('inference',))
    label_col: str = option('label', 'name of the column of class names', scripts=('inference',))
    output_col: Optional[str] = option(
        None, 'name of the column of outputs; default: prob or logit', scripts=('inference',)
    )
    output_type: str = option('prob', 'probabilities or logits', choices=('prob', 'logit'), scripts=('inference',))
    label_type: str = option(
        'description',
        "classes by their names or, where these are ImageNet's, in words",
        choices=('none', 'name', 'description', 'detailed'),
        scripts=('inference',),
    )
    include_index: bool = option(False, 'class numbers too', scripts=('inference',))
    exclude_output: bool = option(False, 'no probabilities or logits', scripts=('inference',))
    include_attention: Optional[str] = option(
        None,
        'a picture of where the model looks for each picture, in RESULTS.csv.attention: by the last layer '
        '(default), or through all layers',
        choices=('last', 'rollout'),
        bare='last',
        scripts=('inference',),
    )
    no_console_results: bool = option(False, 'do not print the results', scripts=('inference',))


@dataclass
class FormatConfig:
    """The file that export.py writes."""

    batch_size: int = option(
        1, 'images in the check of the forward pass; the file takes any number', short='-b', low=1, scripts=('export',)
    )
    opset: Optional[int] = option(  # 18 to 25 is what onnxscript converts to, which publishes no names for the two
        None, "version of ONNX's operators; default: the exporter's", low=18, high=25, scripts=('export',)
    )
    keep_init: bool = option(False, 'weights are inputs of the ONNX graph as well', scripts=('export',))
    dynamic_size: bool = option(False, 'any height and width, for models without windows', scripts=('export',))
    check_forward: bool = option(False, "compare the file's output with PyTorch's", scripts=('export',))
    reparam: bool = option(False, 'merge what a model only needs in training', scripts=('export',))
    precision: str = option(
        'float32',
        'of the weights: ONNX float32 or float16, packages any',
        choices=('float32', 'bfloat16', 'float16', 'int8'),
        scripts=('export',),
    )
    verbose: bool = option(False, 'pass on what the exporter says', scripts=('export',))
