"""The tasks of distillation against their formulas, and what becomes of the teacher."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F

from evavit import convert_vit
from evavit.training import build, distillation
from evavit.training.config import parse_settings

SIZES = dict(img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=5)


@pytest.fixture
def parent():
    return timm.create_model('deit_tiny_patch16_224', **SIZES)


def task_of(parent, flags, own=None):
    """A task in training with a teacher like `parent`, its converted student, images and target."""
    settings, _ = parse_settings('train', ['--kd-model-name', 'parent', '--smoothing', '0', *flags.split()])
    kind = settings.distil.kd_distill_type
    given = ([0.5] * 3, [0.5] * 3)
    teacher = distillation.Teacher(
        copy.deepcopy(parent),
        {},
        own or given,
        given,
        tokens=settings.distil.kd_feature_level == 'tokens',
        logits=kind == 'logit+feature',
    )
    student = convert_vit(parent, window_size=2, partition_grid=2)
    make = distillation.task_kind(settings.distil, teacher)
    task = build.build_task(student, settings.loss, torch.device('cpu'), kind=make)
    return task.train(), student, torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 3])


def kl(student, teacher, temperature):
    p, q = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)
    return (p * (p.log() - q.log())).sum() / len(p) * temperature**2


@pytest.mark.parametrize(
    'flags, weights',
    [
        ('', (1, 1)),
        ('--task-loss-weight 0.3', (0.3, 0.7)),
        ('--distill-loss-weight 2', (1, 2)),
        ('--distill-loss-weight 2 --task-loss-weight 0.5', (0.5, 2)),
    ],
)
@pytest.mark.parametrize(
    'kind', ['logit', 'feature', 'logit+feature', 'feature tokens', 'logit+feature tokens'], ids=lambda kind: kind
)
def test_the_loss_is_its_formula(parent, kind, flags, weights):
    name, *level = kind.split()
    flags += f' --kd-distill-type {name}' + ' --kd-feature-level tokens' * bool(level)
    flags += ' --kd-temperature 3' * ('logit' in name) + ' --kd-feature-weight 0.25' * (name == 'logit+feature')
    task, student, images, target = task_of(parent, flags)
    found = task(images, target)
    parent.eval()
    with torch.no_grad():
        tokens = parent.forward_features(images)
        own = student.forward_features(images)
    features = (own, tokens) if level else (own[:, 0], tokens[:, 0])
    mse, logits = (features[0] - features[1]).square().mean(), kl(student(images), parent(images), 3)
    distance = dict(logit=logits, feature=mse).get(name, logits + 0.25 * mse)
    expected = weights[0] * F.cross_entropy(student(images), target) + weights[1] * distance
    torch.testing.assert_close(found['loss'], expected, rtol=1e-5, atol=1e-6)


def test_pooled_features_are_timm_s(parent):
    """The same loss as timm's own task, projection and all, where that has a teacher to compare with."""
    task, student, images, target = task_of(parent, '--kd-distill-type feature')
    theirs = timm.task.FeatureDistillationTask(student, copy.deepcopy(parent), verbose=False)
    torch.testing.assert_close(task(images, target)['loss'], theirs(images, target)['loss'])


@pytest.mark.parametrize('kind', ['logit', 'feature', 'logit+feature'])
def test_the_teacher_stays_as_it_is(parent, kind):
    task, student, images, target = task_of(parent, f'--kd-distill-type {kind}')
    before = copy.deepcopy(task.teacher.state_dict())
    optimizer = torch.optim.AdamW(task.get_trainable_module().parameters(), lr=0.1)
    for _ in range(2):
        task(images, target)['loss'].backward()
        optimizer.step()
    assert not task.teacher.training and not task.teacher.model.training and student.training
    assert all(p.grad is None and not p.requires_grad for p in task.teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in task.teacher.state_dict().items())
    assert all(p.grad is not None for p in student.parameters())


def test_images_are_normalised_as_the_teacher_knows_them(parent):
    mean, std = [0.2, 0.3, 0.4], [0.25, 0.3, 0.35]
    task, _, images, _ = task_of(parent, '', own=(mean, std))
    pixels = images * 0.5 + 0.5
    expected = (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(task.teacher.normalize_input(images), expected)
    assert task_of(parent, '')[0].teacher.normalize_input(images) is images
