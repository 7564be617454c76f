"""What can be known of a run before it starts: whether its parts can be built, and what they come to.

Where the weights are not needed, the model is built on the meta device, where tensors have shapes and no content: no
data is read, no device is touched, no memory is filled.
"""

import inspect
import logging
import shlex
import weakref
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from timm.data.distributed_sampler import RepeatAugSampler
from timm.models import clean_state_dict, get_model_args
from timm.utils import random_seed
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DistributedSampler
from torch.utils.flop_counter import FlopCounterMode

from evavit.arguments import shown
from evavit.errors import UserError, first_line
from evavit.hub import folder_digest, held_out
from evavit.models._saved import config_beside
from evavit.training import build, checkpoint, checks, contents, data, distillation, loop, run_folder
from evavit.training.config import ModelConfig, TrainConfig

FEW_UPDATES = 10  # of an epoch, below which a warning says so
ROUND = 512  # bytes: PyTorch's CUDA allocator gives memory in multiples of it

# Arguments of models that may be others than in training: weights are fitted to them, or they act in training alone.
FREE_KWARGS = {
    'img_size',
    'patch_size',
    'window_size',
    'partition_grid',
    'in_chans',
    'num_classes',
    'dynamic_img_size',
    'dynamic_img_pad',
    'strict_img_size',
    'noise_std',
    'init_values',
}


@dataclass(frozen=True)
class CheckedRun:
    """A run whose settings fit together.

    `model` has the run's initial weights if `ready`. Else it has shapes alone, and a number of classes that is a
    stand-in where only the data can tell. A dry run leaves its model at the shapes where it starts from no file.
    """

    batch: checks.GlobalBatch
    model: Any
    data_config: Dict[str, Any]
    optimizer: torch.optim.Optimizer
    ready: bool
    teacher: Optional[distillation.Teacher]  # without its weights


def check_run(config: TrainConfig, processes: int) -> CheckedRun:
    """Build all that a run is made of except its data. Raises UserError for whatever does not fit together.

    Args:
        config: The settings.
        processes: Number of processes of the run.
    """
    contents.enter_run_folders(config)
    checks.check_settings(config)
    batch = checks.global_batch(config.batch, config.schedule, processes)
    checks.check_files(config)
    classes = config.model.num_classes
    ready = classes is not None and not (config.run.dry_run and starting_file(config) is None)
    if ready:
        model, data_config = initial_model(config, classes or 0)
    else:
        try:
            model, data_config = _make(config, classes or 2, 'meta')
        except UserError:
            # Either a fault of the settings or a model that needs real tensors: on the CPU the first shows again.
            model, data_config = _make(config, classes or 2, 'cpu')
    optimizer = build.build_optimizer(model, config.optim, batch.lr)
    build.build_schedule(optimizer, config.schedule, updates_per_epoch=1000)
    if classes:
        build.build_mixup(config.loss, classes)
    teacher = _shape_of_teacher(config, model, data_config)
    build.build_task(model, config.loss, torch.device('cpu'), kind=distillation.task_kind(config.distil, teacher))
    checks.check_transform(config.augment, data_config, config.machine)
    return CheckedRun(batch, model, data_config, optimizer, ready, teacher)


def _shape_of_teacher(config: TrainConfig, model: Any, data_config: Dict[str, Any]) -> Optional[distillation.Teacher]:
    parent = config.distil.kd_model_name == distillation.PARENT
    if config.run.dry_run and (starting_file(config) if parent else config.distil.kd_pretrained_path):
        distillation.build_teacher(config, model, data_config)  # with its weights: the run refuses those that do not do
    try:
        return distillation.build_teacher(config, model, data_config, 'meta')
    except UserError:
        return distillation.build_teacher(config, model, data_config, 'cpu')


def starting_file(config: TrainConfig) -> Optional[str]:
    """The file with the weights that the run starts from, if there is one."""
    return config.model.pretrained_path or config.model.initial_checkpoint


def initial_model(config: TrainConfig, num_classes: int) -> Tuple[Any, Dict[str, Any]]:
    """The model on the CPU with the weights it starts from, the same in every process, and its data settings."""
    random_seed(config.run.seed)
    try:
        return _make(config, num_classes)
    except UserError as error:
        path, line = starting_file(config), None
        if path and path in str(error):  # its weights do not fit, or cannot be read
            with suppress(UserError):
                line = other_model(path, contents.origin(path), config.model)
        if not line:
            raise
        raise type(error)(f'{error}. {line}') from error


def _make(config: TrainConfig, num_classes: int, device: Any = None) -> Tuple[Any, Dict[str, Any]]:
    checks.image_channels(config.model)
    build.name_converted(config.model, softmax_too=True)
    model = build.build_model(config.model, num_classes, device)
    data_config = data.resolve_input(config.model, model)
    build.try_model(model, data_config['input_size'], config.model)
    return model, data_config


def output_folder(config: TrainConfig, data_config: Dict[str, Any]) -> Path:
    """Where the run writes: output/experiment, or a name of time, model and image size."""
    name = config.run.experiment or (
        f'{datetime.now():%Y%m%d-%H%M%S}-{(config.model.model or "").replace("/", "_")}-{data_config["input_size"][-1]}'
    )
    return Path(config.run.output, name)


@contextmanager
def _counted(config: ModelConfig) -> Iterator[None]:
    """Sizes that are beyond PyTorch's numbers together, allowed as each of them is, are a UserError."""
    fake = logging.getLogger('torch._subclasses.fake_tensor')  # which would tell of them with a traceback
    fake.disabled = True
    try:
        yield
    except RuntimeError as error:
        if 'overflow' not in str(error):
            raise
        kwargs = {**(config.model_kwargs or {}), **(config.convert_kwargs or {})}
        asked = ', '.join(f'{name}={shown(value)}' for name, value in kwargs.items())
        raise UserError(f'model {config.model} with {asked[:400]}: {first_line(error)}; lower some of them') from error
    finally:
        fake.disabled = False


def describe(config: TrainConfig, checked: CheckedRun) -> List[str]:
    """The lines of --dry-run. The number of images needs a look at the data set's listing; no image is read.

    The model is left without content.
    """
    batch, model, size = checked.batch, checked.model, checked.data_config['input_size']
    folder, file, classes = output_folder(config, checked.data_config), starting_file(config), config.model.num_classes
    lines = [('note', note) for note in config.notes]
    lines += [('model', f'{config.model.model}, input {"×".join(map(str, size))}')]
    if checked.teacher is not None:
        lines.append(('teacher', distillation.teacher_line(checked.teacher)))
    train_set, names = None, None
    opened, missing = None, 'not given (--data-dir)'
    if config.data.data_dir or data.check_name(config.data.dataset) in checks.HUBS:
        try:
            opened = data.open_training_sets(
                data.without_download(config.data),
                in_chans=checks.image_channels(config.model),
                batch_size=config.batch.batch_size,
                seed=config.run.seed,
            )
        except UserError as error:
            if not data.may_download(config.data):
                raise
            missing = f'not looked at, since a dry run downloads nothing ({error})'
    if opened is not None:
        train_set, eval_set, names = opened
        classes = data.class_count(config.data, config.model.num_classes, names)
        check_metric(config, classes)
        if file and not checked.ready:
            initial_model(config, classes)
        if classes != model.num_classes:
            build.build_mixup(config.loss, classes)
            with next(model.parameters()).device:
                model.reset_classifier(classes)
        lines.append(
            ('data', f'{len(train_set):,} images to train on, {len(eval_set):,} to validate on, {classes} classes')
        )
        if config.machine.cache_device:
            cache = sum(map(data.cache_size, (train_set, eval_set))) / 2**30
            lines.append(
                (
                    'cache',
                    f'{cache:.2f} GiB of images on each GPU, by the sizes of some of them; it has to fit beside memory',
                )
            )
    elif classes:
        lines.append(('data', f'{missing}, {classes} classes'))
    else:
        if file:
            build.read_weights(file)
        lines.append(('data', f'{missing}, counted as 2 classes'))
    distillation.check_classes(checked.teacher, names)
    held = {} if train_set is None else data.held_out(train_set)
    resumed = check_resume(config, folder, model if classes else None, checked.teacher, names, held)
    if not resumed:
        lines += [('warning', line) for line in other_start(config, classes, names, train_set is not None)]
    schedule = config.schedule
    parameters = sum(p.numel() for p in model.parameters())
    with _counted(config.model):
        operations = multiply_adds(model, size)
    lines += [
        ('parameters', f'{parameters / 1e6:.2f} M'),
        ('multiply-adds', f'{operations / 1e9:.3g} G for one image, forward'),
        ('global batch', batch.sizes()),
        ('learning rate', f'{batch.lr:g} ({batch.lr_rule}), {config.optim.opt}, {schedule.sched}'),
    ]
    _, epochs = build.build_schedule(checked.optimizer, schedule, updates_per_epoch=1)
    if train_set is None:
        lines.append(('steps', f'unknown without data; {epochs} epochs'))
    else:
        updates = _batches(train_set, config.augment.aug_repeats, batch) // batch.accumulated
        if not updates:
            raise UserError(
                f"the training split has {len(train_set)} images, less than one update's {batch.total}; lower -b "
                f'or --grad-accum-steps, and --global-batch-size where a recipe sets it'
            )
        steps = f'{epochs} epochs of {updates:,} updates, {epochs * updates:,} in all'
        if config.run.val_interval > 1:
            steps += f'; validation after every {config.run.val_interval} epochs, and after the last'
        lines.append(('steps', steps))
        if few := few_updates(updates, len(train_set), batch):
            lines.append(('warning', few))
        if single := one_class(classes, names):
            lines.append(('warning', single))
    if not schedule.warmup_epochs or schedule.sched == 'none':
        warmup = 'none'
    else:
        place = 'before' if schedule.warmup_prefix else 'among'
        warmup = f'{schedule.warmup_epochs} epochs from {schedule.warmup_lr:g}, {place} the {schedule.epochs}'
    with _counted(config.model):
        memory, stepped = step_memory(config, checked)
    simulated = f'by a simulated step{"" if config.machine.amp else " in float32"}'
    if not stepped:
        simulated += f', but without the state of {config.optim.opt}, which asks for values that such a step has not'
    lines += [
        ('warm-up', warmup),
        ('output', str(folder)),
        (
            'memory',
            f'{memory / 2**30:.2f} GiB of tensors on each device at the peak of a training step, {simulated}; the CUDA '
            f"context and the allocator's gaps come on top",
        ),
    ]
    return [f'{name:<14} {text}' for name, text in lines]


def check_metric(config: TrainConfig, classes: Optional[int]) -> None:
    """UserError where the metric that epochs are ranked by is the same for all."""
    if config.run.eval_metric == 'top5' and classes is not None and classes <= 5:
        raise UserError(f'--eval-metric top5 says nothing of {classes} classes: it is always 100; give top1 or loss')


def one_class(classes: Optional[int], names: Optional[Sequence[str]]) -> Optional[str]:
    """A line where all images are of one class."""
    if classes != 1:
        return None
    return f'one class{f", {names[0]}" if names else ""}: there is nothing to tell apart; give a folder for each class'


def other_start(
    config: TrainConfig, num_classes: Optional[int], class_names: Optional[Sequence[str]], opened: bool = True
) -> List[str]:
    """Lines, mostly none, on what is other in the weights that a run starts from than in the run.

    Args:
        config: The run's settings.
        num_classes: Of the run, where that is known.
        class_names: Of the run by label, where they are known.
        opened: Whether the data is there, which without names then has none.

    Raises:
        UserError: The run keeps the classifier of the file, and has its classes in another order, or cannot know it.
    """
    path, model = starting_file(config), config.model
    if not path and not model.pretrained:
        return []
    try:
        content = contents.origin(path, model.model if model.pretrained else None)
    except UserError:  # what is wrong with it is told where it is read
        return []
    saved = content if path else {}
    lines = [line] if (line := other_model(path, saved, model)) else []
    held, here = held_out(saved), (config.data.val_fraction, config.run.seed)
    same = held.get('data_dir_sha256') == folder_digest(config.data.data_dir or '')
    if here[0] and same and here != (before := (held.get('val_fraction'), held.get('seed'))):
        lines.append(
            f'{path} held out {before[0]} of this folder, with seed {before[1]}: of the images that this run validates '
            f'on it has learnt some; give --val-fraction {before[0]} --seed {before[1]} to judge by the others'
        )
    if path and not model.initial_checkpoint:
        kept = build.head_classes(model.model or '', build.read_weights(path)) == num_classes
    else:
        kept = bool(path) or content.get('num_classes') == num_classes
    learnt = contents.learnt_classes(model, config.data.class_map) if kept else None
    whose, kept_as = str(path or model.model), 'the run starts with its classifier'
    if other := data.other_classes(learnt, class_names, whose):
        lines.append(f'{whose} has learnt other classes: {other}; {kept_as}')
    elif kept and opened and (line := data.unnamed(learnt, class_names, whose, config.data.class_map)):
        lines.append(f'{line}; {kept_as}')
    return lines


def other_model(path: Optional[str], saved: Dict[str, Any], config: ModelConfig) -> Optional[str]:
    """A line where what `contents.origin` says of a file is of another model than `config`, or of one converted in
    another way. Weights from before a conversion are meant."""
    own, named = vars(config), saved.get('model') in (config.model, (config.model or '').split('.')[0])
    same = named and (_alike(saved, own) or _alike(_completed(saved, saved), _completed(own, saved)))
    if same or not saved.get('model'):
        return None
    if beside := config_beside(path or ''):
        flags = '--pretrained', '--model', f'local-dir:{beside.parent}'
        advice = f'{shlex.join(flags)} in place of the file, and leave --model-kwargs and --convert out'
    else:
        advice = shlex.join(_model_flags(saved))[:400]
    return (
        f'{path} holds weights of another model than this run makes, {config.model}, to which they are fitted; to '
        f'go on with its own, give {advice}'
    )


def _alike(saved: Dict[str, Any], own: Dict[str, Any]) -> bool:
    convert = saved.get('convert')
    return (
        _lasting(saved.get('model_kwargs')) == _lasting(own.get('model_kwargs'))
        and convert in (None, own.get('convert'))
        and not (convert and (saved.get('convert_kwargs') or {}) != (own.get('convert_kwargs') or {}))
    )


def _completed(settings: Dict[str, Any], saved: Dict[str, Any]) -> Dict[str, Any]:
    """Settings of a model with the arguments that they leave out, for images of the size in `saved`; as they are where
    they make none. A config.json has all arguments, and flags few."""
    size = (saved.get('model_kwargs') or {}).get('img_size')
    kwargs = {name: value for name, value in (settings.get('model_kwargs') or {}).items() if name != 'img_size'}
    about: Dict[str, Any] = {name: settings.get(name) for name in ('model', 'convert', 'convert_kwargs')}
    about |= {name: saved.get(name) for name in ('img_size', 'input_size', 'in_chans')}
    about['model_kwargs'] = kwargs if size is None else {**kwargs, 'img_size': size}
    try:
        model: Any = build.build_model(ModelConfig(**about), 2, 'meta')
    except UserError:
        return settings
    parents = [kind for kind in reversed(type(model).__mro__) if issubclass(kind, torch.nn.Module)]
    arguments = [one for kind in parents for one in inspect.signature(kind.__init__).parameters.values()]
    defaults = {one.name: one.default for one in arguments if one.default is not one.empty}
    kwargs = {**defaults, **get_model_args(model)}
    return {**settings, 'model_kwargs': kwargs, 'convert_kwargs': getattr(model, 'conversion', None)}


def _lasting(kwargs: Optional[Dict[str, Any]]) -> Dict[str, Any]:
    """The arguments of a model that its weights were trained for: without sizes to which weights are resampled, and
    what acts in training alone."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in (kwargs or {}).items()
        if name not in FREE_KWARGS and 'drop' not in name
    }


def _model_flags(saved: Dict[str, Any]) -> Iterator[str]:
    """The flags of train.py that make the model of a checkpoint's settings, with its image size and channels."""
    for name in ('model', 'model_kwargs', 'convert', 'convert_kwargs', 'img_size', 'input_size', 'in_chans'):
        value = saved.get(name)
        if value not in (None, '', {}):
            yield f'--{name.replace("_", "-")}'
            if isinstance(value, dict):
                yield from (f'{key}={of_key}' for key, of_key in value.items())
            else:
                yield from map(str, value if isinstance(value, list) else [value])


def few_updates(updates: int, images: int, batch: checks.GlobalBatch) -> Optional[str]:
    """A line where an epoch has so few updates that a run of usual length hardly learns."""
    if updates >= FEW_UPDATES:
        return None
    return (
        f'{updates} updates an epoch ({images:,} images, global batch {batch.total}), less than {FEW_UPDATES}: lower '
        f'-b or --grad-accum-steps, or train for more epochs'
    )


def check_resume(
    config: TrainConfig,
    folder: Path,
    model: Any,
    teacher: Optional[distillation.Teacher] = None,
    class_names: Optional[Sequence[str]] = None,
    held_out: Optional[Dict[str, Any]] = None,
) -> bool:
    """Whether a run would find something of itself to go on from, in its folder or as the file of --resume. UserError
    where it could not go on.

    The file is read, its weights and optimizer's state are compared with the shapes of `model` unless that is None; the
    images that are held out (`data.held_out`) where the data is there; classes, optimizer and teacher with the run's
    where it would go on with them.
    """
    run_folder.check_lock(folder)
    candidates = run_folder.find_resume(config.run.resume, folder)
    if not candidates:
        return False
    path, content, _ = run_folder.furthest_whole(candidates)
    checkpoint.check_division(path, content, {**config.flat(), **(held_out or {})})
    if model is not None:
        build.check_fit(model, clean_state_dict(content['state_dict']), path)
    checkpoint.check_ranking(path, content, config.run.eval_metric, folder)
    run_folder.check_furthest(path, content, folder)
    checkpoint.check_classes(path, content, class_names, weights_alone=config.run.no_resume_opt)
    if not config.run.no_resume_opt:
        checkpoint.check_training(path, content, config.optim.opt, teacher.identity if teacher else None)
        if model is not None:
            _check_states(path, content, config, model, teacher)
    return True


def _check_states(path: Path, content: Any, config: TrainConfig, model: Any, teacher: Any) -> None:
    """UserError where a checkpoint's states of optimizer and scaler are not the run's."""
    cpu = torch.device('cpu')
    task = build.build_task(model, config.loss, cpu, kind=distillation.task_kind(config.distil, teacher))
    # No rate is compared: the flags decide on it.
    optimizer = build.build_optimizer(task.get_trainable_module() or model, config.optim, lr=1.0)
    with checkpoint.fitting(path):
        checkpoint.check_states(content, optimizer, loop.Stepper(config.machine, config.optim, cpu))


def _batches(train_set: Any, aug_repeats: int, batch: checks.GlobalBatch) -> int:
    """Batches of one process in an epoch, as the loader's sampler counts them."""
    if isinstance(train_set, torch.utils.data.IterableDataset):
        return len(train_set) // (batch.per_process * batch.processes)  # type: ignore[arg-type]  # timm's have a length
    sampler: Any
    if aug_repeats:
        sampler = RepeatAugSampler(train_set, batch.processes, 0, num_repeats=aug_repeats)
    else:
        sampler = DistributedSampler(train_set, batch.processes, 0)
    return len(sampler) // batch.per_process


def multiply_adds(model: Any, input_size: Tuple[int, ...]) -> int:
    """Multiply-adds of the forward pass of one image (torch.utils.flop_counter)."""
    device = next(model.parameters()).device
    training, trained = model.training, [value for value in model.parameters() if value.requires_grad]
    # The counter looks for the gradient of whatever requires one, which under no_grad a pooling's latent has not.
    model.eval().requires_grad_(False)
    with torch.no_grad(), FlopCounterMode(display=False) as flops:
        model(torch.zeros(1, *input_size, device=device))
    model.train(training)
    for value in trained:
        value.requires_grad_()
    return flops.get_total_flops() // 2


class LiveMemory(TorchDispatchMode):
    """Adds up the storages that live while it is on, and keeps the largest sum (`peak`, bytes).

    PyTorch's `torch.distributed._tools.mem_tracker.MemTracker` finds the same peaks, in about eleven times the time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: Dict[int, Any] = {}

    def note(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.known:
            size = -(-storage.nbytes() // ROUND) * ROUND
            self.known[key] = weakref.finalize(storage, self._drop, key, size)
            self.live += size
            self.peak = max(self.peak, self.live)

    def _drop(self, key: int, size: int) -> None:
        self.known.pop(key, None)
        self.live -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for item in tree_leaves(out):
            if isinstance(item, torch.Tensor):
                self.note(item)
        return out


def step_memory(config: TrainConfig, checked: CheckedRun) -> Tuple[int, bool]:
    """Bytes of tensors at the peak of a training step on one device: weights, gradients, the optimizer's state, moving
    average, activations and what the kernels' inputs and outputs need in between. And whether the optimizer's is known.

    One step is run on fake tensors, which have shapes and no content, and the storages alive are added up. Autocast is
    the CPU's, whose choice of low precision is nearly CUDA's. What a kernel allocates inside itself is not seen. The
    model is left without content.
    """
    size = (config.batch.batch_size, *checked.data_config['input_size'])
    model = checked.model.to('meta').train()
    with ExitStack() as modes:
        modes.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        model = model.to_empty(device='cpu')
        weights = sum(t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers()))
        gradients = sum(p.untyped_storage().nbytes() for p in model.parameters() if p.requires_grad)
        optimizer = build.build_optimizer(model, config.optim, checked.batch.lr)
        images = torch.empty(size)
        mixed = checks.mixes(config.loss)
        target = torch.empty(size[0], model.num_classes) if mixed else torch.zeros(size[0], dtype=torch.long)
        memory = LiveMemory()
        for tensor in (*model.parameters(), *model.buffers(), images, target):
            memory.note(tensor)
        with memory:
            with torch.autocast('cpu', getattr(torch, config.machine.amp_dtype), enabled=config.machine.amp):
                logits = model(images)
                if isinstance(logits, tuple):  # with a distillation head: its logits beside them
                    logits = logits[0]
                loss = F.cross_entropy(logits, target)
            loss.backward()
            before = memory.live
            stepped = True
            try:
                optimizer.step()
            except RuntimeError:  # of those that ask for a value, or compile a part of theirs
                stepped = False
        state = max(0, memory.live - before)  # made by the first step, there from the beginning of the next
    copies = (weights if config.ema.model_ema else 0) + (gradients if config.batch.grad_accum_steps > 1 else 0)
    buckets = gradients if checked.batch.processes > 1 else 0  # DistributedDataParallel sends copies
    teacher = sum(p.numel() * p.element_size() for p in checked.teacher.parameters()) if checked.teacher else 0
    return memory.peak + state + copies + buckets + teacher, stepped
