"""From flags and a YAML file to the settings of a script, and back to a file.

Flags win over YAML, YAML wins over the defaults. YAML keys are the flags with underscores, without the sections.
"""

import argparse
import ast
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import (
    Any,
    ClassVar,
    Container,
    Dict,
    Iterator,
    List,
    Literal,
    Optional,
    Sequence,
    Set,
    Tuple,
    Type,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    overload,
)

import yaml

from evavit.arguments import NUMBER, Parser, nearest, program, shown
from evavit.errors import UserError, reason_of
from evavit.files import open_regular, replacing, why_no_file
from evavit.training.sections import (
    LONGEST,
    AugmentConfig,
    BatchConfig,
    DataConfig,
    DistilConfig,
    EmaConfig,
    FormatConfig,
    LossConfig,
    MachineConfig,
    ModelConfig,
    OptimConfig,
    Option,
    ResultsConfig,
    RunConfig,
    ScheduleConfig,
    WeightsConfig,
)

LARGEST_FILE = 2**20  # bytes of a file of settings
MOST_VALUES = 10_000  # in such a file, each counted as often as aliases repeat it
MOST = 10**12  # of a whole number without a bound of its own
PARENT, NO_TEACHER = 'parent', 'none'  # as a teacher: the model before its conversion, and none though a file names one
USED_BY = {  # settings of distillation that not all of its kinds use
    'kd_temperature': ('logit', 'logit+feature', 'token'),
    'kd_feature_level': ('feature', 'logit+feature'),
    'kd_feature_weight': ('logit+feature',),
    'kd_student_feature_dim': ('feature', 'logit+feature'),
    'kd_teacher_feature_dim': ('feature', 'logit+feature'),
    'kd_token_distill_type': ('token',),
}


def _section_options(name: str, section: type) -> Iterator[Option]:
    """The options of a section's fields, whose types follow from the annotations."""
    hints, default = get_type_hints(section), section()
    for item in fields(section):
        about, kind = dict(item.metadata), hints[item.name]
        if get_origin(kind) is Union:  # Optional
            kind = get_args(kind)[0]
        if get_origin(kind) is list:
            about, kind = dict(count='+') | about, get_args(kind)[0]
        if kind is int and 'choices' not in about:
            about = dict(high=MOST) | about
        yield Option(item.name, get_origin(kind) or kind, getattr(default, item.name), section=name, **about)


class Config:
    """The settings of a script, each in its section. A section's fields that the script has no flag for keep their
    defaults."""

    script: ClassVar[str]

    @classmethod
    def options(cls) -> Dict[str, Option]:
        """The options of the script by their names, in the order of `args.yaml`."""
        return options_of(cls.script)

    def flat(self) -> Dict[str, Any]:
        """{name: value} without the sections, as a YAML file and a checkpoint hold the settings."""
        return {name: getattr(getattr(self, option.section), name) for name, option in self.options().items()}

    def update(self, values: Dict[str, Any]) -> None:
        """Set options by their names, each in its section."""
        for name, value in values.items():
            setattr(getattr(self, self.options()[name].section), name, value)

    def save(self, path: Union[str, Path], remarks: Sequence[str] = ()) -> None:
        """Write the settings as a YAML file that `-c` reads back, under `remarks` as comments."""
        text = ''.join(f'# {remark}\n' for remark in remarks) + yaml.safe_dump(self.flat(), sort_keys=False)
        with replacing(path) as partial:
            partial.write_text(text, encoding='utf-8')


@dataclass
class TrainConfig(Config):
    """The settings of train.py, and `notes`: lines for the log on what was made of them."""

    script = 'train'
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    distil: DistilConfig = field(default_factory=DistilConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    machine: MachineConfig = field(default_factory=MachineConfig)
    run: RunConfig = field(default_factory=RunConfig)
    notes: List[str] = field(default_factory=list)

    def fit_warmup(self, file: Container[str], flags: Container[str]) -> None:
        """Shorten a warm-up of more than half the epochs to a fifth of them, where the epochs were given and it was
        not: by a flag over a file or the defaults, or by a file over the defaults."""
        schedule = self.schedule
        given = {name: 2 if name in flags else int(name in file) for name in ('epochs', 'warmup_epochs')}
        among = schedule.sched != 'none' and not schedule.warmup_prefix
        if among and given['warmup_epochs'] < given['epochs'] and 2 * schedule.warmup_epochs > schedule.epochs:
            self.notes.append(
                f'warm-up shortened from {schedule.warmup_epochs} to {schedule.epochs // 5} of the {schedule.epochs} '
                f'epochs; --warmup-epochs N sets it'
            )
            schedule.warmup_epochs = schedule.epochs // 5

    def drop_unused(self, file: Container[str], flags: Container[str]) -> None:
        """Leave out, with a note, what a file says of a teacher and a flag has made meaningless. What flags say so is
        for `checks` to refuse, as is a file that contradicts itself."""
        distil, untouched = self.distil, DistilConfig()
        if distil.kd_model_name == NO_TEACHER:
            distil.kd_model_name = None
        teacher, kind = distil.kd_model_name, distil.kd_distill_type
        left_out = []
        for name, default in vars(untouched).items():
            own = name in ('kd_model_kwargs', 'kd_pretrained_path') and teacher == PARENT
            idle = 'kd_model_name' in flags and (teacher is None or own)
            idle = idle or ('kd_distill_type' in flags and kind not in USED_BY.get(name, (kind,)))
            if idle and name in file and name not in flags and getattr(distil, name) != default:
                left_out.append(f'{name} {shown(getattr(distil, name))}')
                setattr(distil, name, default)
        if left_out:
            self.notes.append(f'left out of the file, as the flags have no use for it: {", ".join(left_out)}')

    def note_unused(self, flags: Container[str]) -> None:
        """Add a note on each flag that does nothing beside the other settings. In a file it may be part of a recipe."""
        optim, schedule, augment, loss = self.optim, self.schedule, self.augment, self.loss
        mixed, plain, sched = bool(loss.mixup or loss.cutmix), augment.no_aug, schedule.sched
        rules = (  # the flags, whether they are used, what else they need
            (('amp_dtype',), self.machine.amp, '--amp'),
            (('model_ema_decay',), self.ema.model_ema, '--model-ema'),
            (('clip_mode',), optim.clip_grad, '--clip-grad'),
            (('mixup_prob', 'mixup_switch_prob', 'mixup_mode'), mixed, '--mixup or --cutmix'),
            (('remode', 'recount'), augment.reprob, '--reprob'),
            (('scale', 'ratio', 'hflip', 'vflip', 'color_jitter', 'train_interpolation'), not plain, 'augmentation'),
            (('lr_base', 'lr_base_size', 'lr_base_scale'), schedule.lr is None, '--lr left out'),
            (('decay_epochs',), sched in ('step', 'wsd'), '--sched step or wsd'),
            (('decay_milestones',), sched == 'multistep', '--sched multistep'),
            (('decay_rate',), sched in ('step', 'multistep', 'poly'), '--sched step, multistep or poly'),
            (('train_num_samples', 'val_num_samples', 'dataset_download'), self.data.dataset, '--dataset'),
        )
        values, table = self.flat(), self.options()
        for names, used, needed in rules:
            idle = [table[name].flag for name in names if name in flags and values[name] and not used]
            if idle:
                self.notes.append(
                    f'{", ".join(idle)}: without effect, {"needs" if len(idle) == 1 else "need"} {needed}'
                )
        if schedule.lr == 0:
            self.notes.append('warning: lr 0 trains nothing')
        if self.data.train_split == self.data.val_split:
            self.notes.append(
                f'warning: train_split and val_split are both {self.data.val_split}: the run is judged by images that '
                f'it learns from'
            )


@dataclass
class ValidateConfig(Config):
    """The settings of validate.py, and `held_out`: what the run of the weights held out (`evavit.hub.held_out`)."""

    script = 'validate'
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    machine: MachineConfig = field(default_factory=MachineConfig)
    run: RunConfig = field(default_factory=RunConfig)
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    held_out: Dict[str, Any] = field(default_factory=dict)


@dataclass
class ExportConfig(Config):
    """The settings of export.py."""

    script = 'export'
    model: ModelConfig = field(default_factory=ModelConfig)
    machine: MachineConfig = field(default_factory=MachineConfig)
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    export: FormatConfig = field(default_factory=FormatConfig)


@dataclass
class InferenceConfig(Config):
    """The settings of inference.py."""

    script = 'inference'
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    machine: MachineConfig = field(default_factory=MachineConfig)
    run: RunConfig = field(default_factory=RunConfig)
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    results: ResultsConfig = field(default_factory=ResultsConfig)


CONFIGS: Dict[str, Type[Config]] = dict(
    train=TrainConfig, validate=ValidateConfig, export=ExportConfig, inference=InferenceConfig
)
SECTIONS = dict(
    data=DataConfig,
    model=ModelConfig,
    batch=BatchConfig,
    optim=OptimConfig,
    schedule=ScheduleConfig,
    augment=AugmentConfig,
    loss=LossConfig,
    distil=DistilConfig,
    ema=EmaConfig,
    machine=MachineConfig,
    run=RunConfig,
    weights=WeightsConfig,
    results=ResultsConfig,
    export=FormatConfig,
)
OPTIONS = tuple(option for name, section in SECTIONS.items() for option in _section_options(name, section))


def options_of(script: str) -> Dict[str, Option]:
    return {option.name: option for option in OPTIONS if script in option.scripts}


@overload
def parse_settings(
    script: Literal['train'], argv: Optional[Sequence[str]] = None, description: Optional[str] = None
) -> Tuple[TrainConfig, Set[str]]: ...
@overload
def parse_settings(
    script: Literal['validate'], argv: Optional[Sequence[str]] = None, description: Optional[str] = None
) -> Tuple[ValidateConfig, Set[str]]: ...
@overload
def parse_settings(
    script: Literal['export'], argv: Optional[Sequence[str]] = None, description: Optional[str] = None
) -> Tuple[ExportConfig, Set[str]]: ...
@overload
def parse_settings(
    script: Literal['inference'], argv: Optional[Sequence[str]] = None, description: Optional[str] = None
) -> Tuple[InferenceConfig, Set[str]]: ...
def parse_settings(
    script: str, argv: Optional[Sequence[str]] = None, description: Optional[str] = None
) -> Tuple[Any, Set[str]]:
    """Flags and the YAML file of `-c` as the settings of a script, and the names of those that flag or YAML gave.

    Raises UserError on an unknown name or a value that does not fit.
    """
    config = CONFIGS[script]()
    table = config.options()
    file, flags = _parse_flags(table, argv, program(script), description)
    given = _read_yaml(file, table) if file else {}
    given_in_file = set(given)
    for name, value in flags.items():
        if table[name].type is dict:
            value = {**(given.get(name) or {}), **value}
        given[name] = value
    config.update(given)
    if isinstance(config, TrainConfig):
        config.fit_warmup(given_in_file, flags)
        config.drop_unused(given_in_file, flags)
        config.note_unused(flags)
    return config, set(given)


def _parse_flags(
    table: Dict[str, Option], argv: Optional[Sequence[str]], prog: str, description: Optional[str]
) -> Tuple[Optional[str], Dict[str, Any]]:
    parser = Parser(
        prog=prog,
        description=description,
        argument_default=argparse.SUPPRESS,
        usage='%(prog)s [-c FILE] [--FLAG VALUE ...]',
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=32, width=120),
    )
    parser.add_argument(
        '-c',
        '--config',
        metavar='FILE',
        default=[],
        action='append',
        help=f'YAML file with settings, or one of {", ".join(recipes())}',
    )
    groups: Dict[str, Any] = {}
    for option in table.values():
        if option.section not in groups:
            groups[option.section] = parser.add_argument_group(*_heading(option.section))
        _add_flag(groups[option.section], option)
    flags = vars(parser.parse_args(argv))
    files = flags.pop('config')
    if len(files) > 1:
        raise UserError(f'-c {shown(files[0])}, -c {shown(files[1])}: takes one file; put the settings of both into it')
    return files[0] if files else None, {
        name: table[name].parse(value, table[name].flag) for name, value in flags.items()
    }


def _heading(section: str) -> Tuple[str, str]:
    """Title and description of a section's flags: its name and the first paragraph of its docstring."""
    return section, ' '.join((SECTIONS[section].__doc__ or '').partition('\n\n')[0].split())


def _add_flag(parser: Any, option: Option) -> None:
    names = [option.short] * bool(option.short) + [option.flag]
    value = ' '.join(map(str, option.default)) if isinstance(option.default, list) else option.default
    default = '' if value in (None, '', False) else f' [{value}]'
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

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        pairs: Dict[str, Any] = {}
        for text in values:
            key, equals, value = text.partition('=')
            if not (key and equals) or len(text) > LONGEST:
                raise UserError(f'{option_string}: {shown(text)} is not of the form key=value')
            if key in pairs:
                raise UserError(f'{option_string}: key {shown(key)} is given twice')
            try:
                tree = ast.parse(value, mode='eval')
                pairs[key] = ast.literal_eval(tree)
            except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
                pairs[key] = {'true': True, 'false': False}.get(value, value)
            else:
                self._check_numbers(tree, value, option_string)
        setattr(namespace, self.dest, {**getattr(namespace, self.dest, {}), **pairs})  # the later flag wins

    @staticmethod
    def _check_numbers(tree: ast.AST, text: str, where: Any) -> None:
        for node in ast.walk(tree):
            kind = type(node.value) if isinstance(node, ast.Constant) else None
            if kind in NUMBER and not NUMBER[kind].fullmatch(ast.get_source_segment(text, node) or ''):
                raise UserError(f'{where}: {shown(text)} holds a number that is not in plain digits')


INT_TAG, FLOAT_TAG = 'tag:yaml.org,2002:int', 'tag:yaml.org,2002:float'


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, less what can be meant otherwise or without end.

    The last of two equal keys would win without a word: here they are an error. Of numbers it takes plain ones, and
    leaves 1:30, 2_4, 010 and 0x10, which YAML 1.1 reads as 90, 24, 8 and 16, as text. Aliases may repeat `MOST_VALUES`.
    """

    yaml_implicit_resolvers: ClassVar = {  # type: ignore[misc]  # the stubs take it for an instance variable
        first: [(tag, pattern) for tag, pattern in known if tag not in (INT_TAG, FLOAT_TAG)]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        self._count(node, {})
        return node

    def _count(self, node: Any, known: Dict[int, int]) -> int:
        """The values below a node. `known` has those of the nodes already seen: an alias is the node that it names."""
        if not isinstance(node, yaml.CollectionNode):
            return 1
        if id(node) not in known:
            known[id(node)] = MOST_VALUES  # until it is counted: an alias of itself has no end
            parts = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
            known[id(node)] = 1 + sum(self._count(part, known) for part in parts)
        if known[id(node)] > MOST_VALUES:
            raise yaml.constructor.ConstructorError(
                problem=f'its aliases repeat more than {MOST_VALUES:,} values', problem_mark=node.start_mark
            )
        return known[id(node)]

    def _number(self, node: Any) -> Any:
        kind, text = float if node.tag == FLOAT_TAG else int, self.construct_scalar(node)
        if not NUMBER[kind].fullmatch(text):
            raise yaml.constructor.ConstructorError(
                problem=f'{shown(text)} is no number in plain digits', problem_mark=node.start_mark
            )
        return kind(text)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f'key {key.value} is given twice', problem_mark=key.start_mark
                )
            if isinstance(key, yaml.ScalarNode):
                seen.add(key.value)
        return super().construct_mapping(node, deep)


# What YAML 1.1 and 1.2 both read as a number.
_Loader.add_implicit_resolver(INT_TAG, re.compile(r'[+-]?(0|[1-9][0-9]*)\Z'), list('+-0123456789'))
_Loader.add_implicit_resolver(
    FLOAT_TAG, re.compile(r'([+-]?[0-9]+\.[0-9]*|\.[0-9]+)([eE][+-][0-9]+)?\Z'), list('+-.0123456789')
)
_Loader.add_constructor(INT_TAG, _Loader._number)
_Loader.add_constructor(FLOAT_TAG, _Loader._number)


def recipes() -> Dict[str, Path]:
    """The YAML files that come with the package, by name: in evavit/configs of a wheel, in configs of a clone."""
    package = Path(__file__).parents[1]
    folder = package / 'configs' if (package / 'configs').is_dir() else package.parent / 'configs'
    return {path.stem: path for path in sorted(folder.glob('*.yaml'))}


def _find_config(name: str) -> Path:
    """The file that `-c` names: by its path, or by the name of one that comes with the package."""
    path, known = Path(name), recipes()
    if path.suffix in ('.yaml', '.yml') or path.name != name or path.exists():
        return path
    if name not in known:
        raise UserError(
            f'-c {name}: no such file, nor settings of that name{nearest(name, known)}: there are {", ".join(known)}'
        )
    return known[name]


def _read_text(path: Path) -> str:
    """A file of settings. What is no file, such as a pipe or a device, would never end: it is not opened."""
    try:
        if path.is_dir():
            raise UserError(f'-c {path}: cannot be read ({why_no_file(path, ["args.yaml"])})')
        with open_regular(path) as file:
            content = file.read(LARGEST_FILE + 1)
        if len(content) > LARGEST_FILE:
            raise UserError(f'-c {path}: more than {LARGEST_FILE:,} bytes, so no file of settings')
        return content.decode('utf-8')
    except (OSError, ValueError) as error:
        raise UserError(f'-c {path}: cannot be read ({reason_of(error)})') from None


def read_mapping(path: Path) -> Dict[str, Any]:
    """The key: value lines of a YAML file. UserError, one line, where it is none."""
    text = _read_text(path)
    try:
        content = yaml.load(text, Loader=_Loader)
    except (
        yaml.YAMLError,
        ArithmeticError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        # PyYAML's own, and what it lets through of a value that is not of its type, such as the date 2026-13-45.
        raise UserError(f'-c {path}: cannot be read as YAML: {" ".join(str(error).split())[:300]}') from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f'-c {path}: holds {type(content).__name__}, not key: value lines')
    return content


def _read_yaml(name: str, table: Dict[str, Option]) -> Dict[str, Any]:
    path = _find_config(name)
    content = read_mapping(path)
    for key in content:
        if key not in table:
            raise UserError(f'{path}: unknown key {str(key)[:100]}{nearest(str(key), table)}')
    return {key: table[key].parse(value, path) for key, value in content.items()}
