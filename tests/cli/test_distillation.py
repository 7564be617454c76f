"""Runs of train.py with a teacher: the model before its conversion, or another one; resumes; what is refused."""

import json
import re
import signal

import pytest
import safetensors.torch
import timm
import torch
import yaml
from runs import (
    CLASSES,
    MODEL,
    QUICK,
    SOFTMAX,
    assert_same_run,
    command,
    rows,
    scalars,
    signal_at,
    weights,
    words,
    write_images,
)

from evavit import convert_vit
from evavit.errors import PREEMPTED, UserError
from evavit.hub import save_folder
from evavit.models import write_weights
from evavit.training import distillation
from evavit.training.checks import check_settings
from evavit.training.config import parse_settings
from evavit.training.contents import complete_from_checkpoint

PARENT = ['--model', 'deit_tiny_patch16_224', '--model-kwargs', *(f'{key}={value}' for key, value in SOFTMAX.items())]
CONVERT = words('--convert eva --convert-kwargs window_size=2 partition_grid=2')
BOTH = words('--kd-model-name parent --kd-distill-type logit+feature --kd-feature-level tokens')


@pytest.fixture(scope='module')
def parent(tmp_path_factory):
    """A file as train.py leaves it, of a softmax model with a class token."""
    return write_parent(tmp_path_factory.mktemp('parent') / 'parent.safetensors')


def write_parent(path, seed=0, classes=CLASSES, name=PARENT[1]):
    torch.manual_seed(seed)
    model = timm.create_model(name, num_classes=3, **SOFTMAX)
    for parameter in model.parameters():  # as if trained: attentions and answers are not near uniform
        torch.nn.init.normal_(parameter, std=0.3)
    settings = dict(model=name, model_kwargs=SOFTMAX, num_classes=3, class_names=classes)
    write_weights(model.state_dict(), path, dict(epoch='0', metric='0', args=json.dumps(settings)))
    return path


def assert_loss_of_parts(folder, task_weight, kd_weight):
    """In each update, and in the mean of each epoch."""
    loss, task, kd = (scalars(folder, f'train/{name}') for name in ('loss', 'task_loss', 'kd_loss'))
    assert loss.keys() == task.keys() == kd.keys() and min(task.values()) > 0 < min(kd.values())
    for update, value in loss.items():
        assert task_weight * task[update] + kd_weight * kd[update] == pytest.approx(value, rel=1e-5)
    for number, row in enumerate(rows(folder)):
        loss, task, kd = (float(row[f'train_{name}']) for name in ('loss', 'task_loss', 'kd_loss'))
        assert task_weight * task + kd_weight * kd == pytest.approx(loss, rel=1e-5)
        values = list(scalars(folder, 'train/kd_loss').values())
        updates = len(values) // len(rows(folder))
        assert kd == pytest.approx(sum(values[number * updates :][:updates]) / updates, rel=1e-5)


def test_a_stop_changes_nothing(train, call, images, tmp_path, monkeypatch, parent):
    """With average, accumulation, mixup and everything that draws; a stop within an epoch and at the end of one."""
    flags = [*CONVERT, *BOTH, '--initial-checkpoint', parent, '--model-ema', '--model-ema-decay', '0.9']
    flags += words('--drop-path 0.2 --mixup 0.8 --cutmix 1 -b 2 --grad-accum-steps 2 --clip-grad 1 --resume auto')
    flags += words('--task-loss-weight 0.75 --distill-loss-weight 0.5')
    whole = train('whole', *flags, model=PARENT)
    assert_loss_of_parts(whole, 0.75, 0.5)
    place = ['--data-dir', images, '--output', tmp_path, '--experiment', 'parts']
    for moment in (2, 6):
        signal_at(monkeypatch, [moment], signal.SIGTERM)
        code, _, err = call('train', *PARENT, *QUICK, *place, *flags)
        monkeypatch.undo()
        assert code == PREEMPTED and '--resume auto' in err
    parts = train('parts', *flags, model=PARENT)
    assert_same_run(whole, parts)
    assert scalars(whole, 'train/kd_loss') == scalars(parts, 'train/kd_loss')
    # The checkpoint knows the teacher and has none of its weights; the weights alone are those of the student.
    checkpoint = torch.load(parts / 'last.pth.tar', weights_only=False)
    assert checkpoint['args'].kd_teacher['model'] == 'deit_tiny_patch16_224'
    assert re.fullmatch(r'sha256:[0-9a-f]{64}', checkpoint['args'].kd_teacher['weights'])
    assert not [name for name in checkpoint['state_dict'] if 'teacher' in name or name.startswith('student')]
    assert 'task_state' not in checkpoint  # no projection
    code, out, err = call(
        'validate', '--checkpoint', parts / 'last.safetensors', '--data-dir', images, *words('--workers 0 --device cpu')
    )
    assert code == 0, err
    assert f'top-1 {float(rows(parts)[-1]["eval_top1"]):.2f} %' in out


def test_a_projection_is_trained_and_resumed(train, call, images, tmp_path, monkeypatch):
    """A wider teacher of the same kind, whose own settings come from its file."""
    wide = [word.replace('embed_dim=16', 'embed_dim=32') for word in MODEL]
    teacher = train('teacher', '--epochs', '1', '--mean', '0.2', '0.3', '0.4', model=wide) / 'last.safetensors'
    flags = ['--kd-model-name', 'eva_deit_tiny', '--kd-pretrained-path', teacher, '--kd-distill-type', 'feature']
    flags += words('--model-ema --resume auto')
    whole = train('whole', *flags)
    signal_at(monkeypatch, [8], signal.SIGTERM)
    code, _, err = call(
        'train', *MODEL, *QUICK, '--data-dir', images, '--output', tmp_path, '--experiment', 'parts', *flags
    )
    monkeypatch.undo()
    assert code == PREEMPTED, err
    assert_same_run(whole, train('parts', *flags))
    one, other = (torch.load(tmp_path / name / 'last.pth.tar', weights_only=False) for name in ('whole', 'parts'))
    for key in ('task_state', 'task_state_ema'):
        assert one[key]['projection']['weight'].shape == (32, 16)
        assert torch.equal(one[key]['projection']['weight'], other[key]['projection']['weight'])


def test_a_resume_with_another_teacher(train, call, images, tmp_path, parent):
    other = write_parent(tmp_path / 'other.safetensors', seed=1)
    flags = [*CONVERT, '--kd-model-name', 'parent', '--resume', 'auto']
    train('run', *flags, '--epochs', '1', '--initial-checkpoint', parent, model=PARENT)
    place = ['--data-dir', images, '--output', tmp_path, '--experiment', 'run', *CONVERT, '--resume', 'auto']
    for teacher in (['--kd-model-name', 'parent', '--initial-checkpoint', other], []):
        for dry in ([], ['--dry-run']):
            code, _, err = call('train', *PARENT, *QUICK, *place, *teacher, *dry)
            assert code == 2 and err.count('\n') == 1 and 'another teacher' in err and '--no-resume-opt' in err
    train('run', *flags, '--no-resume-opt', '--epochs', '1', '--initial-checkpoint', other, model=PARENT)


@pytest.mark.slow
def test_two_processes_equal_one(train, images, tmp_path, parent):
    flags = [
        *CONVERT,
        'noise_std=0',
        *BOTH,
        '--initial-checkpoint',
        parent,
        '--global-batch-size',
        '4',
        '--epochs',
        '1',
    ]
    one = train('one', *flags, model=PARENT)
    place = ['--data-dir', images, '--output', tmp_path, '--experiment', 'two']
    done = command('train', *PARENT, *QUICK, *flags, *place, '-b', '2', processes=2)
    assert done.returncode == 0, done.stderr
    for name in ('train/loss', 'train/grad_norm', 'eval/loss'):
        a, b = scalars(one, name), scalars(tmp_path / 'two', name)
        torch.testing.assert_close(list(a.values()), list(b.values()), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['logit', 'logit+feature'])
def test_compiled_runs(train, parent, kind):
    """With Dynamo alone, which leaves the arithmetic as it is; in low precision, with an average."""
    flags = [*CONVERT, 'noise_std=0', '--kd-model-name', 'parent', '--kd-distill-type', kind]
    flags += ['--initial-checkpoint', parent, *words('--amp --epochs 1 --model-ema')]
    plain = train('plain', *flags, model=PARENT)
    compiled = train('compiled', *flags, '--torchcompile', 'eager', model=PARENT)
    names = [weights(folder / 'last.safetensors') for folder in (compiled, plain)]
    torch.testing.assert_close(*names, rtol=1e-2, atol=1e-3)


def test_a_distillation_token(train, parent):
    student = ['--model', 'deit_tiny_distilled_patch16_224', *PARENT[2:]]
    flags = ['--kd-model-name', 'deit_tiny_patch16_224', '--kd-pretrained-path', parent]
    for kind in ('soft', 'hard'):
        flags += ['--kd-distill-type', 'token', '--kd-token-distill-type', kind, '--epochs', '1']
        assert_loss_of_parts(train(kind, *flags, model=student), 1, 1)


def test_weights_from_before_the_conversion_are_judged(call, images, tmp_path, parent):
    """At a window of the whole grid the converted model is its parent."""
    losses, flags = [], words('--workers 0 --device cpu')
    for convert in ([], words('--convert eva --convert-kwargs window_size=4 partition_grid=0'), CONVERT):
        place = ['--checkpoint', parent, '--data-dir', images, '--results-file', tmp_path / 'val.json']
        code, _, err = call('validate', *place, *flags, *convert)
        assert code == 0, err
        losses.append(json.loads((tmp_path / 'val.json').read_text())['loss'])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5) and abs(losses[2] - losses[0]) > 1e-4


@pytest.mark.parametrize(
    'flags, line',
    [
        ('--kd-model-name parent', 'kd_model_name parent is the model before its conversion: add --convert'),
        ('--kd-model-name parent --convert eva', 'weights that nothing has trained: say with --initial-checkpoint'),
        ('--kd-model-name no_such_model', 'unknown model no_such_model'),
        ('--kd-model-name eva_deit_tiny', 'timm publishes no weights for it; give --kd-pretrained-path'),
        ('--kd-model-name hf-hub:x/y --dry-run', 'x/y lies on the Hugging Face Hub, and a dry run fetches nothing'),
        ('--kd-temperature 2', 'kd_temperature does nothing without kd_model_name'),
        ('--task-loss-weight 0.5', 'task_loss_weight does nothing without kd_model_name'),
        ('--kd-model-name resnet18 --kd-pretrained-path none.pth', '--kd-pretrained-path none.pth: no such file'),
        (
            '--kd-model-name resnet18 --kd-feature-level tokens',
            'kd_feature_level does nothing with kd_distill_type logit',
        ),
        ('--kd-model-name resnet18 --kd-distill-type features', 'does not fit kd_distill_type'),
        ('--kd-model-name resnet18 --kd-temperature 1e300', 'kd_temperature'),
        ('--kd-model-name resnet18 --distill-loss-weight 0 --task-loss-weight 0', 'leave nothing to train on'),
        ('--convert-kwargs window_size=2', 'convert_kwargs does nothing without convert'),
        ('--convert eva --convert-kwargs attention=local', 'convert_kwargs: leave attention out'),
        ('--convert evil', "unknown attention 'evil'"),
        ('--model eva_deit_tiny --convert eva', 'is a model of this package'),
    ],
)
def test_what_does_not_fit_is_a_line(call, images, tmp_path, flags, line):
    code, _, err = call('train', *PARENT, *QUICK, '--data-dir', images, '--output', tmp_path, *words(flags))
    assert code == 2 and err.count('\n') == 1 and line in err, err


def test_weights_of_a_teacher_that_do_not_do(call, images, tmp_path, parent):
    """They are a line of the dry run, too."""
    state = safetensors.torch.load_file(parent)
    names = dict(nan='blocks.0.norm1.weight', lacking='blocks.1.norm1.weight')
    torch.save({**state, names['nan']: state[names['nan']] * float('nan')}, tmp_path / 'nan.pth')
    torch.save({key: value for key, value in state.items() if key != names['lacking']}, tmp_path / 'lacking.pth')
    flags = [*PARENT, *QUICK, '--data-dir', images, '--output', tmp_path, '--kd-model-name', 'deit_tiny_patch16_224']
    flags += ['--kd-model-kwargs', *PARENT[3:]]
    for name in names:
        for dry in ([], ['--dry-run']):
            code, _, err = call('train', *flags, '--kd-pretrained-path', tmp_path / f'{name}.pth', *dry)
            assert code == 2 and err.count('\n') == 1 and f'{name}.pth' in err and names[name] in err, (dry, err)


def test_a_converted_model_holds_no_parent(call, images, tmp_path, parent):
    model = timm.create_model(PARENT[1], num_classes=3, **SOFTMAX)
    settings = dict(model=PARENT[1], model_kwargs=SOFTMAX, convert='eva', convert_kwargs=dict(window_size=2))
    path = tmp_path / 'converted.safetensors'
    state = convert_vit(model, window_size=2).state_dict()
    write_weights(state, path, dict(epoch='0', metric='0', args=json.dumps(settings)))
    flags = [*PARENT, *QUICK, *CONVERT, '--data-dir', images, '--output', tmp_path, '--dry-run']
    flags += ['--kd-model-name', 'parent']
    for name in ('--pretrained-path', '--initial-checkpoint'):
        code, _, err = call('train', *flags, name, path)
        assert code == 2 and err.count('\n') == 1, err
        assert f'kd_model_name parent: {path} is of a converted model, and holds no parent; give that one by' in err


def test_another_attention_than_the_run_s_has_none_of_its_options(tmp_path):
    model = timm.create_model(PARENT[1], num_classes=3, **SOFTMAX)
    settings = dict(model=PARENT[1], model_kwargs=SOFTMAX, convert='eva', convert_kwargs=dict(window_size=2))
    path = tmp_path / 'converted.safetensors'
    write_weights(convert_vit(model, window_size=2).state_dict(), path, dict(args=json.dumps(settings)))
    for attention, options in (('softmax', None), ('local', None), ('eva', dict(window_size=2))):
        flags = ['--checkpoint', str(path), '--data-dir', 'x', '--convert', attention]
        config, given = parse_settings('validate', flags)
        complete_from_checkpoint(config, given)
        assert config.model.convert_kwargs == options, attention


def test_a_teacher_of_other_classes(train, call, images, tmp_path, parent):
    """Its logits are of no use, its features are."""
    write_images(tmp_path / 'more' / 'train', dict.fromkeys((*CLASSES, 'quince'), 4))
    write_images(tmp_path / 'more' / 'val', dict.fromkeys((*CLASSES, 'quince'), 1))
    flags = [*PARENT, *QUICK, '--data-dir', tmp_path / 'more', '--output', tmp_path, '--experiment', 'run']
    flags += ['--kd-model-name', 'deit_tiny_patch16_224', '--kd-pretrained-path', parent, '--epochs', '1']
    code, _, err = call('train', *flags)
    assert code == 2 and 'has 3 classes, the run 4: their logits cannot be compared' in err and err.count('\n') == 1
    code, _, err = call('train', *flags, '--kd-distill-type', 'feature')
    assert code == 0, err


def test_a_teacher_whose_labels_mean_other_classes(train, call, images, tmp_path):
    (tmp_path / 'map.txt').write_text('\n'.join(reversed(CLASSES)))
    teacher = train('teacher', '--epochs', '1', '--class-map', tmp_path / 'map.txt') / 'last.safetensors'
    flags = ['--kd-model-name', 'eva_deit_tiny', '--kd-pretrained-path', teacher, '--epochs', '1']
    place = ['--data-dir', images, '--output', tmp_path, '--experiment', 'run']
    code, _, err = call('train', *MODEL, *QUICK, *place, *flags)
    assert code == 2 and 'is class 0 of this data, and class 2 of the teacher' in err and err.count('\n') == 1
    train('run', *flags, '--kd-distill-type', 'feature')  # which compares no logits


def test_a_teacher_of_a_folder_for_the_hub_or_a_run_with_other_classes(train, call, images, tmp_path):
    """Both say which classes they have learnt, and a run stops where they are others, a dry one too."""
    model, folder = timm.create_model(PARENT[1], num_classes=3, **SOFTMAX), tmp_path / 'hub'
    run = write_parent(tmp_path / 'run.safetensors', classes=['apple', 'pear', 'x'])
    place = [*MODEL, *QUICK, '--data-dir', images, '--output', tmp_path, '--experiment', 'run', '--epochs', '1']
    for names, line in (([*reversed(CLASSES)], 'and class 2 of the teacher'), (['x', *CLASSES[1:]], 'was called x')):
        save_folder(model, folder, label_names=names, data='fruit', licence='mit')
        for more in ([], ['--dry-run']):
            code, _, err = call('train', *place, '--kd-model-name', f'local-dir:{folder}', *more)
            assert code == 2 and line in err and err.count('\n') == 1, err
    code, _, err = call('train', *place, '--kd-model-name', PARENT[1], '--kd-pretrained-path', run)
    assert code == 2 and 'the teacher has learnt other classes: class 2 was called x' in err, err
    save_folder(model, folder, label_names=CLASSES, data='fruit', licence='mit')
    train('run', '--epochs', '1', '--kd-model-name', f'local-dir:{folder}')
    other = timm.create_model(PARENT[1], num_classes=3, **SOFTMAX)
    save_folder(other, folder, label_names=CLASSES, data='fruit', licence='mit')
    for more in ([], ['--dry-run']):
        code, _, err = call('train', *place, '--kd-model-name', f'local-dir:{folder}', '--resume', 'auto', *more)
        assert code == 2 and 'another teacher' in err and err.count('\n') == 1, err


def test_a_teacher_of_a_folders_file_is_converted_as_its_config_says(call, images, tmp_path, monkeypatch):
    """No softmax model of weights that a local attention has trained."""
    teachers, build = [], distillation.build_teacher
    monkeypatch.setattr(distillation, 'build_teacher', lambda *args: teachers.append(build(*args)) or teachers[-1])
    model = timm.create_model(PARENT[1], num_classes=3, **SOFTMAX)
    local = convert_vit(model, attention='local', window_size=2)
    file = save_folder(local, tmp_path / 'hub', data='fruit', licence='mit') / 'model.safetensors'
    flags = [*MODEL, *QUICK, '--data-dir', images, '--num-classes', '3', '--dry-run']
    teacher = ['--kd-model-name', PARENT[1], '--kd-model-kwargs', *PARENT[3:], '--kd-pretrained-path', file]
    code, out, err = call('train', *flags, *teacher)
    assert code == 0, out + err
    assert teachers and all(teacher.identity.get('convert') == 'local' for teacher in teachers)


@pytest.mark.parametrize('grey', ['--in-chans 1', '--input-size 1 16 16'])
def test_a_teacher_of_grey_images(call, images, tmp_path, grey):
    """Its run had no input_size; that of this run says how many channels there are."""
    model = timm.create_model(PARENT[1], num_classes=3, in_chans=1, **SOFTMAX)
    settings = dict(model=PARENT[1], model_kwargs=SOFTMAX, num_classes=3, class_names=CLASSES, in_chans=1)
    write_weights(model.state_dict(), path := tmp_path / 'grey.safetensors', dict(args=json.dumps(settings)))
    flags = [*MODEL, *QUICK, *grey.split(), '--data-dir', images, '--num-classes', '3', '--dry-run']
    teacher = ['--kd-model-name', PARENT[1], '--kd-pretrained-path', path]
    code, out, err = call('train', *flags, *teacher)
    assert code == 0, out + err
    other = [f'{key}={value}' for key, value in {**SOFTMAX, 'img_size': 32}.items()]
    code, _, err = call('train', *flags, *teacher, '--kd-model-kwargs', *other)
    assert code == 2 and f'error: kd_model_name {PARENT[1]}, the teacher: ' in err, err


def test_a_teacher_without_a_classifier(train, call, images, tmp_path, parent):
    """Of features it is one; the student's classifier is new, and without a loss on the labels it stays as it is."""
    body = {name: value for name, value in weights(parent).items() if not name.startswith('head.')}
    write_weights(body, tmp_path / 'body.safetensors')
    flags = [*CONVERT, '--kd-model-name', 'parent', '--pretrained-path', tmp_path / 'body.safetensors']
    features = words('--kd-distill-type feature --kd-feature-level tokens --task-loss-weight 0 --weight-decay 0')
    heads = []
    for epochs in ('1', '2'):
        folder = train(epochs, *flags, *features, '--epochs', epochs, model=PARENT)
        found = weights(folder / 'last.safetensors')
        heads.append(found['head.weight'])
        assert not torch.equal(found['blocks.0.attn.qkv.weight'], body['blocks.0.attn.qkv.weight'])
    assert torch.equal(*heads)
    code, _, err = call('train', *PARENT, *QUICK, '--data-dir', images, '--output', tmp_path, *flags)
    assert code == 2 and err.count('\n') == 1 and 'weights without a classifier, so no logits to compare' in err, err
    start = [*flags[:-2], '--initial-checkpoint', tmp_path / 'body.safetensors', *features]
    for way in (start, start[len(CONVERT) + 2 : -len(features)]):  # which asks for a classifier; without conversion too
        code, _, err = call('train', *PARENT, *QUICK, '--data-dir', images, '--output', tmp_path, *way)
        assert code == 2 and 'without a classifier; train.py starts from them with --pretrained-path' in err, err


def test_a_teacher_with_other_tokens(call, images, tmp_path, parent):
    code, _, err = call(
        'train', *MODEL, *QUICK, '--data-dir', images, '--output', tmp_path, '--kd-model-name', 'deit_tiny_patch16_224',
        '--kd-pretrained-path', parent, *words('--kd-distill-type feature --kd-feature-level tokens'),
    )  # fmt: skip
    assert code == 2 and 'kd_feature_level tokens' in err and err.count('\n') == 1, err


@pytest.mark.parametrize('level, dry', [('pooled', []), ('tokens', ['--dry-run'])])
def test_features_of_another_width(call, images, tmp_path, parent, level, dry):
    flags = [*PARENT, *QUICK, *CONVERT, '--initial-checkpoint', parent, '--data-dir', images, '--output', tmp_path]
    flags += [*words(f'--kd-model-name parent --kd-distill-type feature --kd-feature-level {level}'), *dry]
    for name, width in (('teacher', 7), ('student', 10**12)):
        code, _, err = call('train', *flags, f'--kd-{name}-feature-dim', width)
        assert code == 2 and f'kd_{name}_feature_dim {width}: the features are 16 wide' in err, err
        assert err.count('\n') == 1
    if dry:
        code, _, err = call('train', *flags, *words('--kd-teacher-feature-dim 16 --kd-student-feature-dim 16'))
        assert code == 0, err


def test_processes_compare_their_teachers(call, images, tmp_path, parent, monkeypatch):
    """The weights, whatever the file is called."""

    def check_agreement(*_, teacher, **__):
        raise UserError(f'teacher {teacher}')

    monkeypatch.setattr('evavit.cli.train.check_agreement', check_agreement)
    flags = [*PARENT, *QUICK, '--data-dir', images, '--output', tmp_path]
    code, _, err = call('train', *flags, '--kd-model-name', PARENT[1], '--kd-pretrained-path', parent)
    assert code == 2 and re.search(r'teacher deit_tiny_patch16_224 .* sha256:[0-9a-f]{64}$', err.strip()), err


@pytest.fixture
def recipe(call, images, tmp_path):
    """recipe(*flags) → exit code, output and error lines of configs/convert.yaml but for sizes and device."""

    def recipe(*flags, model=PARENT):
        small = words('--convert-kwargs window_size=2 --device cpu --no-amp -b 4 --grad-accum-steps 2 --workers 0')
        small += words('--global-batch-size 8 --epochs 1 --warmup-epochs 0 --experiment run')
        return call('train', '-c', 'convert', *model, '--data-dir', images, '--output', tmp_path, *small, *flags)

    return recipe


@pytest.mark.parametrize('name', ['deit_tiny_patch16_224', 'deit_tiny_distilled_patch16_224'])
def test_the_recipe_runs(recipe, tmp_path, name):
    file = write_parent(tmp_path / 'parent.safetensors', name=name)
    code, out, err = recipe('--initial-checkpoint', file, model=['--model', name, *PARENT[2:]])
    assert code == 0 and f'teacher {name}' in out, err


def test_the_recipe_takes_another_attention(recipe, parent):
    code, _, err = recipe('--initial-checkpoint', parent, '--convert', 'local', '--dry-run')
    assert code == 0, err


FEATURES = words('--kd-distill-type feature --kd-feature-level tokens --task-loss-weight 0')


@pytest.mark.parametrize(
    'flags, teacher, left_out',
    [
        (['--kd-model-name', 'none'], None, ['kd_temperature 2.0']),
        (['--kd-distill-type', 'logit'], 'parent', []),
        (BOTH, 'parent', []),
        (FEATURES, 'parent', ['kd_temperature 2.0']),
    ],
    ids=['labels', 'logits', 'logits and tokens', 'features'],
)
def test_the_recipe_takes_every_way_of_teaching(recipe, tmp_path, parent, flags, teacher, left_out):
    """What its file says and a flag makes meaningless is left out, the log says so, and args.yaml fits together. That
    of features takes weights without a classifier."""
    start = ['--initial-checkpoint', parent]
    if flags is FEATURES:
        body = {name: value for name, value in weights(parent).items() if not name.startswith('head.')}
        write_weights(body, tmp_path / 'body.safetensors')
        start = ['--pretrained-path', tmp_path / 'body.safetensors']
    code, _, err = recipe(*start, *flags, '--dry-run')
    assert code == 0, err
    code, out, err = recipe(*start, *flags)
    assert code == 0 and ('teacher ' in out) == bool(teacher), err
    note = ''.join(line for line in out.splitlines() if 'left out of the file' in line)
    assert all(text in note for text in left_out), out
    saved = yaml.safe_load((tmp_path / 'run' / 'args.yaml').read_text())
    assert saved['kd_model_name'] == teacher
    check_settings(parse_settings('train', ['-c', str(tmp_path / 'run' / 'args.yaml')])[0])


def test_what_a_file_says_of_a_teacher_and_a_flag_does_not_change(call, images, tmp_path, parent):
    """A file that contradicts itself is refused, as flags are; a teacher's own arguments give way to `parent`."""
    (tmp_path / 'own.yaml').write_text('kd_model_name: parent\nkd_temperature: 2\nkd_distill_type: feature\n')
    (tmp_path / 'other.yaml').write_text('kd_model_name: resnet18\nkd_model_kwargs: {depth: 9}\nkd_temperature: 2\n')
    place = [*PARENT, *QUICK, *CONVERT, '--initial-checkpoint', parent, '--data-dir', images, '--output', tmp_path]
    for file, flags, line in (
        ('own', [], 'kd_temperature does nothing with kd_distill_type feature'),
        ('other', ['--kd-model-name', 'none', '--kd-temperature', '3'], 'kd_temperature does nothing without'),
        (
            'other',
            ['--kd-model-name', 'parent', '--kd-model-kwargs', 'depth=2'],
            'kd_model_kwargs: kd_model_name parent',
        ),
    ):
        code, _, err = call('train', '-c', tmp_path / f'{file}.yaml', *place, *flags)
        assert code == 2 and line in err and err.count('\n') == 1, err
    code, _, err = call('train', '-c', tmp_path / 'other.yaml', *place, '--kd-model-name', 'parent', '--dry-run')
    assert code == 0, err


def test_a_dry_run_names_the_teacher(call, images, tmp_path, parent):
    flags = [*PARENT, *QUICK, *CONVERT, *BOTH, '--initial-checkpoint', parent, '--data-dir', images, '--dry-run']
    code, out, err = call('train', *flags, '--output', tmp_path)
    assert code == 0, err
    assert re.search(r'^teacher +deit_tiny_patch16_224, 0.01 M parameters, sha256:', out, re.M)
