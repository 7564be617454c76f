"""What every command line has in common: faults in one line, the nearest name for a misspelt one, `--device`."""

import argparse
import difflib
import functools
import math
import re
import reprlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Iterable, Iterator, Mapping, Optional, Sequence

from evavit.errors import UserError
from evavit.version import __version__

if TYPE_CHECKING:  # --help does without it
    import torch

__all__ = [
    'CROP_MODES',
    'NUMBER',
    'PREPARATION',
    'Parser',
    'asks_for_help',
    'check_device',
    'check_type',
    'find_device',
    'nearest',
    'per_channel',
    'program',
    'running',
    'shown',
    'to_number',
    'too_large',
    'wrong_preparation',
]

PROGRAMS = ('train', 'validate', 'inference', 'benchmark', 'export')
LISTED = ('train', 'validate', 'export')  # programs whose flags are the table of `evavit.training.sections`
MOST_BLOCKS = 1000  # of a model: more only take a day to build
MOST_NUMBER = 10**6  # of anything else: tokens, channels, a window, or times as many
CROP_MODES = ('center', 'squash', 'border')
INTERPOLATIONS = ('nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos')
_BLOCKS = re.compile(
    '(?:^|_)(?:block|branch|depth|expert|layer|level|rep|scale|sec|stage)'
)  # what timm calls their number

NUMBER = {  # how a number is written: Python's int and float also take 2_4, ２４ and spaces around
    int: re.compile(r'[+-]?[0-9]{1,20}'),
    float: re.compile(r'[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?'),
}

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 3, 100, 100


def to_number(kind: Any, text: str) -> Any:
    """A finite number, int or float, as `NUMBER` has it; ValueError of another text."""
    if not NUMBER[kind].fullmatch(text) or not math.isfinite(value := kind(text)):
        raise ValueError(f'{shown(text)} is no number')
    return value


class Parser(argparse.ArgumentParser):
    """argparse's, with other manners: a fault is a `UserError` of one line, an unknown flag comes with the nearest
    known one, no flag can be shortened, and numbers are those of `NUMBER`, finite."""

    def __init__(self, **kwargs: Any):
        super().__init__(**{'allow_abbrev': False, **kwargs})
        for kind in NUMBER:
            self.register('type', kind, functools.partial(to_number, kind))
        if self.add_help:
            version = f'evavit {__version__}'
            self.add_argument('--version', action='version', version=version, help='print the version and end')

    def error(self, message: str) -> Any:
        raise UserError(message)

    # argparse declares overloads for the type of `namespace`, of which only the default is used here
    def parse_args(  # type: ignore[override]
        self, args: Optional[Sequence[str]] = None, namespace: None = None
    ) -> argparse.Namespace:
        known, unknown = self.parse_known_args(args, namespace)
        if unknown:
            word = unknown[0].split('=')[0]
            flags = [flag for action in self._actions for flag in action.option_strings]
            what = 'unknown flag' if word.startswith('-') else 'unexpected word'
            raise UserError(f'{what} {unknown[0][:100]}{nearest(word, flags)}; {self.prog} --help lists the flags')
        return known


def shown(value: object) -> str:
    """A value for a message, in a few words however much there is of it."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python writes no number of more than 4300 digits
        return 'a number too long to show'


def program(script: str) -> str:
    """A script's name as it was called: train.py in a clone, evavit-train where the package is installed."""
    return f'evavit-{script}' if Path(sys.argv[0]).stem == f'evavit-{script}' else f'{script}.py'


def running() -> Optional[str]:
    """Which of our programs this process is, in a clone or as an installed command; None of another one."""
    if getattr(sys, 'argv', [])[:1] == ['-m'] and 'evavit.compare' in sys.orig_argv:
        return 'compare'
    script = Path((getattr(sys, 'argv', []) or [''])[0])  # which a program around Python may lack
    in_clone = script.suffix == '.py' and script.resolve().parent == Path(__file__).resolve().parents[1]
    name = script.stem if in_clone else script.stem.removeprefix('evavit-')
    return name if name in PROGRAMS and (in_clone or name != script.stem) else None


def asks_for_help() -> bool:
    """Whether this process is one of our programs and only to list its flags. That takes no model, and PyTorch and timm
    take seconds to load: `import evavit` then leaves them out."""
    return running() in LISTED and bool({'-h', '--help'} & set(sys.argv[1:]))


def nearest(name: str, names: Iterable[str]) -> str:
    """' (did you mean X?)' where a known name is near, else nothing."""
    near = difflib.get_close_matches(name[:100], list(names), n=1)
    return f' (did you mean {near[0]}?)' if near else ''


def check_type(value: object, kind: Any, rule: str) -> None:
    """TypeError of one line unless a value is of a kind; `rule` says which argument must be what."""
    if not isinstance(value, kind):
        raise TypeError(f'{rule}, got {type(value).__name__}')


def check_device(name: Optional[str]) -> None:
    """UserError unless the name has the form of a device; whether there is one is not asked."""
    if name and not re.fullmatch(r'cpu|cuda(:\d+)?', name):
        raise UserError(f'--device {name}: takes cpu, cuda or cuda:N')


def find_device(name: Optional[str] = None) -> 'torch.device':
    """The device of this name, by default the GPU where there is one, else the CPU. UserError where it is missing."""
    import torch

    check_device(name)
    device = torch.device(name or ('cuda' if torch.cuda.is_available() else 'cpu'))
    if device.type == 'cuda':
        if not torch.cuda.is_available():
            raise UserError(f'--device {name}: PyTorch sees no CUDA device here; use --device cpu')
        if (device.index or 0) >= torch.cuda.device_count():
            raise UserError(f'--device {name}: PyTorch sees {torch.cuda.device_count()} CUDA devices here')
    return device


def too_large(kwargs: Mapping[str, Any]) -> Optional[str]:
    """A few words where arguments of a model ask for more blocks than `MOST_BLOCKS`, or for another number beyond
    `MOST_NUMBER`, else None."""
    for name, value in kwargs.items():
        bound = MOST_BLOCKS if _BLOCKS.search(str(name)) else MOST_NUMBER
        if (most := max(map(abs, _numbers(value)), default=0)) > bound:
            return f'{name} asks for {shown(most)}, more than {bound:,}'
    return None


PREPARATION = ('mean', 'std', 'interpolation', 'crop_pct', 'crop_mode')  # settings of train.py: how images are prepared


def per_channel(values: Sequence[float], channels: int) -> Sequence[float]:
    """The numbers of a mean or standard deviation for images of so many channels: where they are not as many, as
    ImageNet's three for grey images, their average for each."""
    return values if len(values) == channels else (sum(values) / len(values),) * channels


def wrong_preparation(about: Any, in_chans: Optional[int] = None) -> Optional[str]:
    """A few words on settings of images, as read from JSON, by which no image can be prepared, else None."""
    if not isinstance(about, dict):
        return 'holds no entries'

    def numbers(value: Any, low: float, high: float) -> bool:
        return isinstance(value, list) and all(
            isinstance(x, (int, float)) and not isinstance(x, bool) and low <= x <= high for x in value
        )

    size = about.get('input_size')
    if size is not None and not (numbers(size, 1, 10**6) and len(size) == 3 and all(isinstance(x, int) for x in size)):
        return f'input_size {shown(size)} is not three whole numbers'
    channels = (1, 3, in_chans, size[0] if size else None)  # ImageNet's three do for any channels
    for name, low in (('mean', 0.0), ('std', 0.0001)):
        value = about.get(name)
        if value is not None and not (numbers(value, low, 1) and len(value) in channels):
            return f'{name} {shown(value)} is not a number of {low:g} to 1 for each channel'
    crop_pct = about.get('crop_pct')
    if crop_pct is not None and not numbers([crop_pct], 0.01, 2):  # timm has models of 1.15
        return f'crop_pct {shown(crop_pct)} is no number of 0.01 to 2'
    for name, choices in (('interpolation', INTERPOLATIONS), ('crop_mode', CROP_MODES)):
        if about.get(name) is not None and about[name] not in choices:
            return f'{name} {shown(about[name])} is none of {", ".join(choices)}'
    return None


def _numbers(value: object, levels: int = 2) -> Iterator[float]:
    """The numbers in an argument, and in lists the lengths of these."""
    if isinstance(value, (int, float)) and value == value:
        yield value
    parts = list(value.values()) if isinstance(value, dict) else value
    if isinstance(parts, (list, tuple)) and levels:
        yield len(parts)
        for part in parts[:MOST_BLOCKS]:
            yield from _numbers(part, levels - 1)
