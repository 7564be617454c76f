"""Every setting of train.py and validate.py, in one table.

The flags, the keys a YAML file may hold, the checks of types and ranges, and the saved `args.yaml` all follow from the
table. Names are timm's, YAML keys are the same with underscores. Flags win over YAML, YAML wins over the defaults.
"""

import argparse
import ast
import difflib
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Tuple

import yaml

from evavit.errors import UserError


@dataclass(frozen=True)
class Option:
    """One setting. `count` is None for one value, '+' for a list, an int for a list of that length."""

    name: str
    type: type
    default: Any
    help: str
    short: str = ''
    choices: Tuple = ()
    count: Any = None
    low: Optional[float] = None  # smallest and largest value allowed
    high: Optional[float] = None
    bare: Optional[str] = None  # the value of a flag that is given without one
    scripts: Tuple[str, ...] = field(default=('train',))

    @property
    def flag(self):
        return '--' + self.name.replace('_', '-')

    def expects(self):
        name = {bool: 'true or false', int: 'a whole number', float: 'a number', str: 'text', dict: 'key: value'}
        name = name[self.type]
        if self.count is not None:
            name = 'a list of numbers' if self.count == '+' else f'a list of {self.count} numbers'
        if self.choices:
            name = 'one of ' + ', '.join(map(str, self.choices))
        bounds = ((sign, bound) for sign, bound in (('≥', self.low), ('≤', self.high)) if bound is not None)
        return name + ' and'.join(f' {sign} {bound:g}' for sign, bound in bounds)

    def parse(self, value, where):
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
            raise UserError(f'{where}: {value!r} does not fit {self.name}, which takes {self.expects()}') from None

    def _parse_one(self, value):
        if self.type is dict:
            if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
                raise ValueError
            return dict(value)
        if self.type is bool:
            if not isinstance(value, bool):
                raise ValueError
            return value
        if isinstance(value, (bool, dict, list)) or value is None:
            raise ValueError
        if self.type is str and not isinstance(value, (str, int, float)):
            raise ValueError
        if self.type is int and isinstance(value, float):
            raise ValueError
        value = self.type(value)
        if self.type is float and not math.isfinite(value):
            raise ValueError
        if self.choices and value not in self.choices:
            raise ValueError
        if (self.low is not None and value < self.low) or (self.high is not None and value > self.high):
            raise ValueError
        return value


BOTH = ('train', 'validate')
ALL = (*BOTH, 'export')

OPTIONS = (
    # data
    Option('data_dir', str, None, 'folder of the data set', scripts=BOTH),
    Option(
        'dataset',
        str,
        '',
        "data set in timm's form: empty for an image folder or tar, else torch/NAME, hfds/NAME, wds/NAME, …",
        scripts=BOTH,
    ),
    Option('dataset_download', bool, False, "let the data set's library download it", scripts=BOTH),
    Option('train_split', str, 'train', 'name of the training split'),
    Option('val_split', str, 'validation', 'name of the split to validate on'),
    Option('split', str, 'validation', 'name of the split to validate on', scripts=('validate',)),
    Option('class_map', str, None, 'text file with one class name a line, in the order of their indices', scripts=BOTH),
    Option('train_num_samples', int, None, 'training images in an iterable data set that does not say', low=1),
    Option('val_num_samples', int, None, 'validation images in an iterable data set that does not say', low=1),
    Option('num_samples', int, None, 'images in an iterable data set that does not say', low=1, scripts=('validate',)),
    Option(
        'max_bad_images',
        float,
        0.001,
        'unreadable images that an epoch may have, as a share of the data set; more stop the run',
        low=0,
        high=1,
        scripts=BOTH,
    ),
    # model
    Option('model', str, None, 'name of a model of evavit or timm', short='-m', scripts=ALL),
    Option(
        'model_kwargs',
        dict,
        None,
        "arguments of the model, key=value …, joined key by key with the YAML file's",
        scripts=ALL,
    ),
    Option('pretrained', bool, False, 'start from the weights that timm publishes for the model', scripts=ALL),
    Option('pretrained_path', str, None, 'start from the weights in this file; a head with other classes is made anew'),
    Option('initial_checkpoint', str, None, 'start from the weights in this file, with as many classes'),
    Option('linear_probe', bool, False, 'train the classifier alone, on the features of the weights to start from'),
    Option('num_classes', int, None, 'classes of the model; default: those of the data set', low=1, scripts=ALL),
    Option('in_chans', int, None, 'image channels, 3 (default) or 1', choices=(1, 3), scripts=ALL),
    Option('img_size', int, None, "image side in pixels; default: the model's", low=1, scripts=ALL),
    Option(
        'input_size',
        int,
        None,
        'channels, height and width, for images that are not square',
        count=3,
        low=1,
        scripts=ALL,
    ),
    Option(
        'crop_pct',
        float,
        None,
        'share of the image that the centre crop of validation keeps',
        low=0.01,
        high=1,
        scripts=ALL,
    ),
    Option('mean', float, None, 'mean of each channel, of values in 0…1', count='+', low=0, high=1, scripts=ALL),
    Option(
        'std',
        float,
        None,
        'standard deviation of each channel, of values in 0…1',
        count='+',
        low=1e-4,
        high=1,
        scripts=ALL,
    ),
    Option(
        'interpolation',
        str,
        None,
        'resizing in validation, and in training unless train_interpolation is set',
        choices=('bilinear', 'bicubic', 'nearest', 'lanczos'),
        scripts=ALL,
    ),
    Option('drop', float, None, 'dropout before the classifier', low=0, high=1),
    Option(
        'drop_path', float, None, 'stochastic depth of the last block, growing linearly from the first', low=0, high=1
    ),
    Option('grad_checkpointing', bool, False, 'recompute activations in the backward pass, to save memory'),
    # batch, optimizer
    Option('batch_size', int, 128, 'images per process and step', short='-b', low=1, scripts=BOTH),
    Option(
        'validation_batch_size', int, None, 'images per process in validation; default: batch_size', short='-vb', low=1
    ),
    Option('grad_accum_steps', int, 1, 'steps whose gradients are added up before an update', low=1),
    Option(
        'global_batch_size',
        int,
        None,
        'images per update over all processes, checked against batch_size × processes × grad_accum_steps',
        low=1,
    ),
    Option('opt', str, 'adamw', 'optimizer, any of timm.optim.list_optimizers()'),
    Option('opt_eps', float, None, 'epsilon of the optimizer', low=0),
    Option('opt_betas', float, None, 'betas of the optimizer', count='+', low=0, high=1),
    Option('momentum', float, 0.9, 'momentum, for optimizers that have it', low=0, high=1),
    Option('weight_decay', float, 0.05, 'weight decay; none on biases, norms and what the model excludes', low=0),
    Option('layer_decay', float, None, 'learning rate factor from layer to layer, towards the input', low=0, high=1),
    Option('clip_grad', float, None, 'bound on the gradient, see clip_mode', low=0),
    Option('clip_mode', str, 'norm', 'what clip_grad bounds', choices=('norm', 'value', 'agc')),
    # learning rate
    Option(
        'sched',
        str,
        'cosine',
        'learning rate schedule',
        choices=('cosine', 'tanh', 'poly', 'step', 'multistep', 'wsd', 'constant', 'none'),
    ),
    Option('sched_on_updates', bool, False, 'move the learning rate at each update, not at each epoch'),
    Option('epochs', int, 300, 'epochs to train, warm-up included unless warmup_prefix', low=1),
    Option('lr', float, None, 'learning rate; default: lr_base scaled to the global batch', low=0),
    Option('lr_base', float, 1e-3, 'learning rate at a global batch of lr_base_size', low=0),
    Option('lr_base_size', int, 1024, 'global batch that lr_base is meant for', low=1),
    Option('lr_base_scale', str, 'linear', 'how lr grows with the global batch', choices=('linear', 'sqrt')),
    Option('min_lr', float, 0.0, 'learning rate at the end', low=0),
    Option('warmup_lr', float, 1e-6, 'learning rate at the start of the warm-up', low=0),
    Option('warmup_epochs', int, 5, 'epochs of linear warm-up', low=0),
    Option('warmup_prefix', bool, False, 'add the warm-up to the epochs, instead of counting it among them'),
    Option('cooldown_epochs', int, 0, 'epochs at min_lr after the schedule', low=0),
    Option('decay_epochs', float, None, 'epochs between steps (step), length of the decay (wsd)', low=0),
    Option(
        'decay_milestones', int, [90, 180, 270], 'epochs at which the rate steps down (multistep)', count='+', low=1
    ),
    Option('decay_rate', float, 0.1, 'factor of a step, power of poly', low=0),
    # augmentation, regularization
    Option('no_aug', bool, False, 'training images are resized and cropped like those of validation'),
    Option(
        'train_interpolation',
        str,
        None,
        'resizing in training',
        choices=('random', 'bilinear', 'bicubic', 'nearest', 'lanczos'),
    ),
    Option('scale', float, None, "range of the random crop's area; default 0.08 1.0", count=2, low=0, high=1),
    Option('ratio', float, None, "range of the random crop's aspect ratio; default 0.75 1.333", count=2, low=0),
    Option('hflip', float, 0.5, 'probability of a horizontal flip', low=0, high=1),
    Option('vflip', float, 0.0, 'probability of a vertical flip', low=0, high=1),
    Option('color_jitter', float, 0.4, 'colour jitter; off where aa is set, as in timm', low=0),
    Option('aa', str, None, 'AutoAugment or RandAugment policy, such as rand-m9-mstd0.5-inc1'),
    Option(
        'aug_repeats',
        int,
        0,
        'augmented copies of an image in an epoch (repeated augmentation); an epoch then '
        'shows 1/aug_repeats of the images',
        low=0,
    ),
    Option('reprob', float, 0.0, 'probability of random erasing', low=0, high=1),
    Option('remode', str, 'pixel', 'what random erasing fills with', choices=('const', 'rand', 'pixel')),
    Option('recount', int, 1, 'largest number of erased boxes in an image', low=1),
    Option('mixup', float, 0.0, "mixup's alpha; 0 is off", low=0),
    Option('cutmix', float, 0.0, "cutmix's alpha; 0 is off", low=0),
    Option('mixup_prob', float, 1.0, 'probability of mixup or cutmix', low=0, high=1),
    Option('mixup_switch_prob', float, 0.5, 'probability of cutmix where both are on', low=0, high=1),
    Option('mixup_mode', str, 'batch', 'what shares a mixing weight', choices=('batch', 'pair', 'elem')),
    Option('mixup_off_epoch', int, 0, 'epoch at which mixup and cutmix stop; 0 is never', low=0),
    Option('smoothing', float, 0.1, 'label smoothing', low=0, high=1),
    Option('bce_loss', bool, False, 'binary cross-entropy over the classes instead of softmax cross-entropy'),
    Option(
        'bce_target_thresh', float, None, 'with bce_loss: targets above this count as 1, others as 0', low=0, high=1
    ),
    # EMA
    Option('model_ema', bool, False, 'keep an exponential moving average of the weights, and judge the run by it'),
    Option('model_ema_decay', float, 0.9998, 'decay of the average', low=0, high=1),
    Option('model_ema_warmup', bool, False, 'let the decay grow from 0'),
    # machine
    Option('device', str, None, 'cpu, cuda or cuda:N; default: cuda where there is one, else cpu', scripts=ALL),
    Option('amp', bool, False, 'automatic mixed precision', scripts=BOTH),
    Option('amp_dtype', str, 'bfloat16', 'low precision of amp', choices=('bfloat16', 'float16'), scripts=BOTH),
    Option('torchcompile', str, None, 'compile the model, with this backend', bare='inductor', scripts=BOTH),
    Option(
        'torchcompile_mode',
        str,
        None,
        'mode of torch.compile',
        choices=('default', 'reduce-overhead', 'max-autotune', 'max-autotune-no-cudagraphs'),
        scripts=BOTH,
    ),
    Option('channels_last', bool, False, 'keep images in channels-last memory order', scripts=BOTH),
    Option('workers', int, 4, 'data loading processes, for each training process', short='-j', low=0, scripts=BOTH),
    Option('pin_mem', bool, False, 'page-locked memory for the copies to a GPU', scripts=BOTH),
    Option('seed', int, 42, 'seed of weights, sample order, augmentation and noise', low=0, high=2**31 - 1),
    Option('dry_run', bool, False, 'print what the run would be, and stop; no image is read, no GPU touched'),
    # output
    Option('output', str, 'output', 'folder of the runs'),
    Option('experiment', str, None, "name of this run's folder in output; default: time, model, image size"),
    Option(
        'resume', str, None, "checkpoint to continue, or auto: the last whole one in this run's folder, if there is one"
    ),
    Option('no_resume_opt', bool, False, 'resume the weights alone, with a new optimizer'),
    Option('eval_metric', str, 'top1', 'what makes the best checkpoint', choices=('top1', 'top5', 'loss')),
    Option('checkpoint_hist', int, 3, 'best checkpoints to keep', low=1),
    Option('checkpoint_interval', str, None, 'save within the epoch too: every so many updates (500) or minutes (10m)'),
    Option(
        'max_skipped', int, 10, 'updates in a row without a finite loss and gradient, at which the run stops', low=1
    ),
    Option('log_interval', int, 50, 'updates between lines of the log', low=1, scripts=BOTH),
    Option(
        'checkpoint',
        str,
        None,
        'weights: a checkpoint of train.py (.pth.tar, .safetensors) or any file that fits the model',
        scripts=('validate', 'export'),
    ),
    Option(
        'use_ema', bool, False, 'take the averaged weights of a .pth.tar checkpoint', scripts=('validate', 'export')
    ),
    # export
    Option(
        'batch_size',
        int,
        1,
        'images in the check of the forward pass; the file takes any number',
        short='-b',
        low=1,
        scripts=('export',),
    ),
    Option('opset', int, None, "version of ONNX's operators; default: the exporter's", low=18, scripts=('export',)),
    Option('keep_init', bool, False, 'weights are inputs of the ONNX graph as well', scripts=('export',)),
    Option('aten_fallback', bool, False, 'refused: the exporter that had it is not used', scripts=('export',)),
    Option('dynamic_size', bool, False, 'any height and width, for models without windows', scripts=('export',)),
    Option('check_forward', bool, False, "compare the file's output with PyTorch's", scripts=('export',)),
    Option('reparam', bool, False, 'merge what a model only needs in training', scripts=('export',)),
    Option('training', bool, False, 'refused: graphs are for inference', scripts=('export',)),
    Option(
        'precision',
        str,
        'float32',
        'of the weights: ONNX float32 or float16, packages any',
        choices=('float32', 'bfloat16', 'float16', 'int8'),
        scripts=('export',),
    ),
    Option('verbose', bool, False, 'pass on what the exporter says', scripts=('export',)),
    Option('results_file', str, None, 'write the figures here, as .csv or .json', scripts=('validate',)),
)


def options_of(script):
    return {option.name: option for option in OPTIONS if script in option.scripts}


def nearest(name, names):
    """' (did you mean X?)' where a known name is near, else nothing."""
    near = difflib.get_close_matches(name, list(names), n=1)
    return f' (did you mean {near[0]}?)' if near else ''


def parse_settings(script, argv=None, description=None):
    """Flags and the YAML file of `-c` to one namespace with every option of `script`.

    Returns the settings and the set of the names that flag or YAML gave. Raises UserError on an unknown name or a value
    that does not fit.
    """
    table = options_of(script)
    config, flags = _parse_flags(table, argv, f'{script}.py', description)
    given = _read_yaml(config, table) if config else {}
    for name, value in flags.items():
        if table[name].type is dict:
            value = {**(given.get(name) or {}), **value}
        given[name] = value
    defaults = {
        name: list(option.default) if isinstance(option.default, list) else option.default
        for name, option in table.items()
    }
    return argparse.Namespace(**{**defaults, **given}), set(given)


def save_settings(settings, path, remarks=()):
    """Write the settings as a YAML file that `-c` reads back, under `remarks` as comments."""
    text = ''.join(f'# {remark}\n' for remark in remarks) + yaml.safe_dump(vars(settings), sort_keys=False)
    Path(path).write_text(text, encoding='utf-8')


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message)


def _parse_flags(table, argv, prog, description):
    parser = _Parser(
        prog=prog,
        description=description,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=120),
    )
    parser.add_argument('-c', '--config', metavar='FILE', default=None, help='YAML file with settings')
    for option in table.values():
        _add_flag(parser, option)
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        word = unknown[0].split('=')[0]
        flags = [flag for action in parser._actions for flag in action.option_strings]
        what = 'unknown flag' if word.startswith('-') else 'unexpected word'
        raise UserError(f'{what} {unknown[0]}{nearest(word, flags)}; {prog} --help lists the flags')
    flags = vars(known)
    config = flags.pop('config')
    return config, {name: table[name].parse(value, table[name].flag) for name, value in flags.items()}


def _add_flag(parser, option):
    names = [option.short] * bool(option.short) + [option.flag]
    default = '' if option.default in (None, '', False) else f' [{option.default}]'
    text = (option.help + default).replace('%', '%%')
    if option.type is bool:
        # --no-aug and --aug, --amp and --no-amp: either side of a YAML file's true or false can be said.
        yes, no = option.flag, '--no-' + option.flag[2:]
        if option.name.startswith('no_'):
            no = '--' + option.flag[5:]
        parser.add_argument(yes, dest=option.name, action='store_true', help=text)
        parser.add_argument(no, dest=option.name, action='store_false', help=argparse.SUPPRESS)
    elif option.type is dict:
        parser.add_argument(*names, dest=option.name, nargs='+', action=_KeyValues, metavar='KEY=VALUE', help=text)
    else:
        metavar = {int: 'N', float: 'X', str: 'TEXT'}[option.type]
        metavar = '{' + ','.join(map(str, option.choices)) + '}' if option.choices else metavar
        nargs = option.count if option.bare is None else '?'
        parser.add_argument(*names, dest=option.name, nargs=nargs, const=option.bare, metavar=metavar, help=text)


class _KeyValues(argparse.Action):
    """key=value …, values as Python literals where they are such, else as text (as timm reads them)."""

    def __call__(self, parser, namespace, values, option_string=None):
        pairs = dict(getattr(namespace, self.dest, {}))
        for text in values:
            key, equals, value = text.partition('=')
            if not (key and equals):
                raise UserError(f'{option_string}: {text!r} is not of the form key=value')
            try:
                pairs[key] = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                pairs[key] = {'true': True, 'false': False}.get(value, value)
        setattr(namespace, self.dest, pairs)


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, which would let the last of two equal keys win without a word: here they are an error."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f'key {key.value} is given twice', problem_mark=key.start_mark
                )
            if isinstance(key, yaml.ScalarNode):
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _read_yaml(path, table):
    try:
        content = yaml.load(Path(path).read_text(encoding='utf-8'), Loader=_Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'-c {path}: cannot be read ({getattr(error, "strerror", None) or error})') from None
    except (yaml.YAMLError, ArithmeticError, AttributeError, RecursionError, TypeError, ValueError) as error:
        # PyYAML's own, and what it lets through of a value that is not of its type, such as the date 2026-13-45.
        raise UserError(f'-c {path}: cannot be read as YAML: {" ".join(str(error).split())[:300]}') from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f'-c {path}: holds {type(content).__name__}, not key: value lines')
    for key in content:
        if key not in table:
            raise UserError(f'{path}: unknown key {key}{nearest(str(key), table)}')
    return {key: table[key].parse(value, path) for key, value in content.items()}
