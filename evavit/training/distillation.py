"""Knowledge distillation: the teacher, and timm's tasks that compare a model with it.

A checkpoint holds no weights of the teacher, but its identity, so that a run goes on with the same one.
"""

import functools
import logging
from dataclasses import replace
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import timm
import torch
import torch.nn.functional as F
from timm.task import (
    ClassificationTask,
    FeatureDistillationTask,
    LogitDistillationTask,
    TokenDistillationTask,
    TrainingTask,
)
from timm.task.distillation import DistillationTeacher, FeatureDistillationTrainableModule
from torch import nn

from evavit.arguments import shown
from evavit.errors import UserError
from evavit.files import file_digest
from evavit.hub import source_of, source_weights
from evavit.training import build, data
from evavit.training.config import PARENT, DistilConfig, ExportConfig, ModelConfig, TrainConfig
from evavit.training.contents import complete_from_checkpoint, learnt_classes

log = logging.getLogger(__name__)

Normalisation = Tuple[Sequence[float], Sequence[float]]  # mean and standard deviation of each channel


class Teacher(DistillationTeacher):
    """timm's teacher, frozen, whose images are normalised as it knows them.

    timm compares the two normalisations at every step, for which the host waits on a GPU, and takes them from the
    models' defaults; here those of the run and of the teacher's own run count.

    Args:
        model: The teacher, with its weights, on any device.
        identity: What a checkpoint says of it.
        own: Normalisation that the teacher was trained with.
        given: Normalisation of the images of the run.
        tokens: Its features are all tokens of the last block, [B, N, C], not what comes before the classifier, [B, C].
        logits: Together with the features it gives the logits.
    """

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(
        self,
        model: nn.Module,
        identity: Dict[str, Any],
        own: Normalisation,
        given: Normalisation,
        tokens: bool = False,
        logits: bool = False,
    ):
        super().__init__(model)
        self.requires_grad_(False)
        self.identity, self.tokens, self.logits = identity, tokens, logits
        self.class_names: Optional[List[str]] = None  # of its logits, where they are known and compared
        (mean, std), (mean_given, std_given) = (
            [torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1) for values in pair] for pair in (own, given)
        )
        self.same = bool(torch.equal(mean, mean_given) and torch.equal(std, std_given))
        self.register_buffer('scale', (std_given / std).float(), persistent=False)
        self.register_buffer('shift', ((mean_given - mean) / std).float(), persistent=False)

    def normalize_input(self, input: torch.Tensor, student_mean: Any = None, student_std: Any = None) -> torch.Tensor:
        """The run's images as the teacher knows them."""
        return input if self.same else input * self.scale + self.shift

    def _forward_features(self, input: torch.Tensor) -> Any:
        model: Any = self.model
        tokens = model.forward_features(input)
        features = tokens if self.tokens else model.forward_head(tokens, pre_logits=True)
        return (model.forward_head(tokens), features) if self.logits else features


class _Features(FeatureDistillationTrainableModule):
    """timm's module of a student and its projection, whose features may be all tokens of the last block."""

    def __init__(self, student_model: nn.Module, projection: Optional[nn.Module], tokens: bool):
        super().__init__(student_model, projection)
        self.tokens = tokens

    def forward(self, input: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        if not self.tokens:
            return super().forward(input)
        student: Any = self.student
        features = student.forward_features(input)
        logits = student.forward_head(features)
        return logits, features if self.projection is None else self.projection(features)


class FeatureTask(FeatureDistillationTask):
    """timm's task of features, which also compares all tokens, and the logits as `LogitDistillationTask` does.

    The distillation loss is KL(teacher ‖ student) T² + feature_weight · MSE with the logits, else MSE alone, where T
    is the temperature.
    """

    def __init__(
        self,
        student_model: nn.Module,
        teacher_model: Teacher,
        temperature: float = 1.0,
        feature_weight: float = 1.0,
        **kwargs: Any,
    ):
        super().__init__(student_model, teacher_model, **kwargs)
        self.temperature, self.feature_weight, self.logits = temperature, feature_weight, teacher_model.logits
        module = self.trainable_module
        self.trainable_module = _Features(module.student, module.projection, teacher_model.tokens)

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> Dict[str, torch.Tensor]:
        """`loss`, `output` (the student's logits), `task_loss`, `kd_loss` of images [B, C, H, W] and their target."""
        logits, features = self.trainable_module(input)
        task_loss = self.criterion(logits, target)
        # After the student: a CUDA graph's output lasts until a graph begins that no backward of another waits for.
        with torch.no_grad():
            known = self.teacher(self.teacher.normalize_input(input).detach(), return_features=True)
        if self.logits:
            known_logits, known = known
            share, known_share = (F.log_softmax(values / self.temperature, -1) for values in (logits, known_logits))
            kl = F.kl_div(share, known_share, reduction='batchmean', log_target=True) * self.temperature**2
            kd_loss = kl + self.feature_weight * F.mse_loss(features, known)
        else:
            kd_loss = F.mse_loss(features, known)
        loss = self.task_loss_weight * task_loss + self.distill_loss_weight * kd_loss
        return dict(loss=loss, output=logits, task_loss=task_loss, kd_loss=kd_loss)


def task_kind(config: DistilConfig, teacher: Optional[Teacher]) -> Callable[..., TrainingTask]:
    """What makes the task of a run, as `build.build_task` takes it."""
    if teacher is None:
        return ClassificationTask
    kind = config.kd_distill_type
    shared: Dict[str, Any] = dict(
        teacher_model=teacher,
        distill_loss_weight=config.distill_loss_weight,
        task_loss_weight=config.task_loss_weight,
    )
    if kind == 'logit':
        return functools.partial(
            LogitDistillationTask, loss_type=config.kd_loss_type, temperature=config.kd_temperature, **shared
        )
    if kind == 'token':
        return functools.partial(
            TokenDistillationTask,
            distill_type=config.kd_token_distill_type,
            temperature=config.kd_temperature,
            **shared,
        )
    return functools.partial(
        FeatureTask,
        temperature=config.kd_temperature,
        feature_weight=config.kd_feature_weight,
        student_feature_dim=config.kd_student_feature_dim,
        teacher_feature_dim=config.kd_teacher_feature_dim,
        **shared,
    )


def loss_parts(config: DistilConfig, teacher: Optional[Teacher]) -> Dict[str, str]:
    """Of the loss with a teacher: the name of each in the curves → in what the task of `task_kind` returns."""
    if teacher is None:
        return {}
    return dict(task_loss='task_loss', kd_loss='distill_loss' if config.kd_distill_type == 'token' else 'kd_loss')


def build_teacher(
    config: TrainConfig, student: Any, data_config: Dict[str, Any], device: Optional[str] = None
) -> Optional[Teacher]:
    """The teacher that the settings name, in evaluation mode on the CPU; None where they name none.

    Args:
        config: The settings of the run.
        student: The model that is trained, on any device.
        data_config: The run's input: size, mean, standard deviation.
        device: As for `build.build_model`: with one, the teacher is built there without weights, to look at.

    Raises:
        UserError: There is no such model, it has no weights, or it does not fit the images, classes or features.
    """
    settings = config.distil
    name, kind = settings.kd_model_name, settings.kd_distill_type
    if name is None:
        return None
    _check_hub(settings, config.run.dry_run)
    source = _source(config)
    build.name_converted(source)
    path = source.initial_checkpoint or source.pretrained_path
    if not path and timm.is_model((source.model or '').split('.')[0]) and not build.has_weights(source.model or ''):
        raise UserError(f'kd_model_name {name}: timm publishes no weights for it; give --kd-pretrained-path FILE')
    classes = build.head_classes(source.model or '', build.read_weights(path)) if path else None
    if path and classes is None and kind != 'feature':
        raise UserError(f'{path}: weights without a classifier, so no logits to compare; use --kd-distill-type feature')
    model: Any = build.build_model(source, classes, device, new_head=kind == 'feature')
    if kind != 'feature' and config.model.num_classes and model.num_classes != student.num_classes:
        raise UserError(
            f'kd_model_name {name} has {model.num_classes} classes, the run {student.num_classes}: their logits cannot '
            f'be compared; give a teacher with as many, or --kd-distill-type feature'
        )
    known = data.resolve_input(source, model)
    try:
        build.try_model(model, data_config['input_size'], source, classifier=kind != 'feature')
    except UserError as error:
        raise UserError(f'kd_model_name {name}, the teacher: {error}') from error
    tokens = settings.kd_feature_level == 'tokens'
    _check_features(settings, student, model, data_config['input_size'])
    file = path or source_weights(source.model or '')  # of a folder too, whose weights may be others the next time
    identity = dict(
        model=source.model,
        model_kwargs=source.model_kwargs or {},
        weights=f'sha256:{file_digest(file)}' if file else _tag(model),
    )
    if source.convert:
        identity |= dict(convert=source.convert, convert_kwargs=source.convert_kwargs or {})
    own, given = ((found['mean'], found['std']) for found in (known, data_config))
    teacher = Teacher(model, identity, own, given, tokens=tokens, logits=kind == 'logit+feature')
    if kind != 'feature':
        teacher.class_names = learnt_classes(source, config.data.class_map)
    return teacher


def check_classes(teacher: Optional[Teacher], class_names: Optional[Sequence[str]]) -> None:
    """UserError where the labels of the run's data mean other classes than the logits of its teacher."""
    learnt = teacher.class_names if teacher else None
    if other := data.other_classes(learnt, class_names, 'the teacher'):
        raise UserError(
            f'the teacher has learnt other classes: {other}; give another --kd-pretrained-path, or compare features '
            f'alone with --kd-distill-type feature'
        )


def _source(config: TrainConfig) -> ModelConfig:
    """The teacher as the settings of a model. A file of train.py says how its model was made."""
    settings = config.distil
    if settings.kd_model_name == PARENT:
        start = config.model.initial_checkpoint or config.model.pretrained_path
        if start and build.is_converted(start, config.model.model or ''):
            raise UserError(
                f'kd_model_name {PARENT}: {start} is of a converted model, and holds no parent; give that one by '
                f'--kd-model-name and --kd-pretrained-path'
            )
        return replace(
            config.model,
            convert=None,
            convert_kwargs=None,
            drop=None,
            drop_path=None,
            grad_checkpointing=False,
            linear_probe=False,
        )
    found = ExportConfig()
    found.model.model, found.model.model_kwargs = settings.kd_model_name, settings.kd_model_kwargs
    found.weights.checkpoint = settings.kd_pretrained_path
    size = config.model.input_size
    found.model.in_chans = size[0] if size else config.model.in_chans
    if settings.kd_pretrained_path:
        complete_from_checkpoint(found, {'model', 'in_chans'})
    return replace(
        found.model, pretrained=not settings.kd_pretrained_path, initial_checkpoint=settings.kd_pretrained_path
    )


def _check_hub(config: DistilConfig, dry_run: bool) -> None:
    """A teacher of the Hub, whose settings come over the network: not in a dry run, nor with weights of a file."""
    name = config.kd_model_name or ''
    if source_of(name)[0] == 'hf-hub' and (dry_run or config.kd_pretrained_path):
        reason = 'a dry run fetches nothing' if dry_run else '--kd-pretrained-path is to replace what lies there'
        raise UserError(
            f'kd_model_name {name} lies on the Hugging Face Hub, and {reason}; name the architecture and its file with '
            f'--kd-pretrained-path'
        )


def _check_features(config: DistilConfig, student: Any, teacher: Any, input_size: Sequence[int]) -> None:
    """The features that are compared must have as many tokens, and the widths that the settings say, if they do."""
    tokens, given = config.kd_feature_level == 'tokens', (config.kd_student_feature_dim, config.kd_teacher_feature_dim)
    if not tokens and given == (None, None):
        return
    shapes = [_feature_shape(model, input_size, tokens) for model in (student, teacher)]
    if tokens and (any(len(shape) != 2 for shape in shapes) or shapes[0][0] != shapes[1][0]):
        raise UserError(
            f'kd_feature_level tokens: the model gives features {shown(shapes[0])}, the teacher '
            f'{shown(shapes[1])}, not as many tokens each; leave it out, or choose another teacher'
        )
    for name, width, shape in zip(('student', 'teacher'), given, shapes, strict=True):
        if width not in (None, shape[-1]):
            raise UserError(f'kd_{name}_feature_dim {width}: the features are {shape[-1]} wide; leave it out')


@torch.no_grad()
def _feature_shape(model: Any, input_size: Sequence[int], tokens: bool) -> List[int]:
    training = model.training
    model.eval()
    features = model.forward_features(torch.zeros(1, *input_size, device=next(model.parameters()).device))
    features = features if tokens else model.forward_head(features, pre_logits=True)
    model.train(training)
    return list(features.shape[1:])


def _tag(model: Any) -> str:
    """Which published weights a model has."""
    published = model.pretrained_cfg
    return f'published:{published.get("architecture")}.{published.get("tag")}'.rstrip('.')


def teacher_line(teacher: Teacher) -> str:
    """The teacher for the log."""
    parameters = sum(p.numel() for p in teacher.parameters())
    return ' '.join(
        (f'{teacher.identity["model"]}, {parameters / 1e6:.2f} M parameters,', str(teacher.identity['weights'])[:19])
    )
