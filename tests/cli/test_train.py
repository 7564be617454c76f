"""train.py on tiny image folders: what it writes, that it repeats, resumes, accumulates, averages and distributes."""

import functools
import json
import shutil

import pytest
import timm
import torch
import torch._dynamo
import yaml
from runs import (
    CLASSES,
    DRAWN,
    KWARGS,
    MODEL,
    PLAIN,
    QUICK,
    SOFTMAX,
    assert_same_run,
    rows,
    scalars,
    weights,
    words,
    write_images,
)
from timm.utils import load_checkpoint_metadata

import evavit
from evavit.errors import INTERRUPTED
from evavit.hub import save_folder
from evavit.training import build, checkpoint, dry_run
from evavit.training.config import parse_settings

LONGER = ['--epochs', '4', '--warmup-epochs', '1']


def test_a_run_leaves_what_the_docs_promise(train):
    folder = train('run')
    names = {path.name for path in folder.iterdir()}
    assert {
        'args.yaml',
        'summary.csv',
        'last.pth.tar',
        'last.safetensors',
        'model_best.pth.tar',
        'model_best.safetensors',
        'checkpoint-0.pth.tar',
        'checkpoint-1.pth.tar',
    } <= names
    assert not [name for name in names if 'tmp' in name or 'partial' in name]
    assert [row['epoch'] for row in rows(folder)] == ['0', '1']
    assert set(rows(folder)[0]) >= {'train_loss', 'eval_loss', 'eval_top1', 'eval_top5', 'lr'}
    for name in ('loss', 'lr', 'grad_norm', 'images_per_second', 'data_wait', 'memory_gib', 'skipped'):
        assert list(scalars(folder, f'train/{name}')) == list(range(1, 13))
    for name in ('loss', 'top1', 'top5'):
        assert list(scalars(folder, f'eval/{name}')) == [6, 12]
    assert (folder / 'last.safetensors').stat().st_mode == (folder / 'last.pth.tar').stat().st_mode


@pytest.mark.parametrize('flag, classes', [('--initial-checkpoint', 3), ('--pretrained-path', 1000)])
def test_a_run_starts_from_softmax_weights(train, tmp_path, capfd, flag, classes):
    source = timm.create_model('deit_tiny_patch16_224', num_classes=classes, **SOFTMAX)
    torch.save(source.state_dict(), tmp_path / 'deit.pth')
    folder = train('run', flag, tmp_path / 'deit.pth', '--lr', '1e-9', '--epochs', '1', '--warmup-lr', '0')
    for name, value in weights(folder / 'last.safetensors').items():
        if name in source.state_dict() and name != 'pos_embed' and not (classes == 1000 and name.startswith('head.')):
            torch.testing.assert_close(value, source.state_dict()[name], atol=1e-6, rtol=0)


@pytest.mark.parametrize('classes', [[], ['--num-classes', '3']], ids=['counted', 'known'])
def test_the_log_tells_once_what_became_of_the_weights(call, images, tmp_path, classes):
    torch.save(timm.create_model('deit_tiny_patch16_224', num_classes=3, **SOFTMAX).state_dict(), tmp_path / 'deit.pth')
    place = ['--data-dir', images, '--output', tmp_path, '--experiment', 'run', '--epochs', '1']
    code, out, err = call('train', *MODEL, *QUICK, *place, '--initial-checkpoint', tmp_path / 'deit.pth', *classes)
    assert code == 0 and out.count('weights from a file:') == 1 and 'weights from a file' not in err, out + err


VIT = ['--model', 'vit_tiny_patch16_224', '--model-kwargs', 'patch_size=4', 'embed_dim=16', 'depth=2', 'num_heads=2']


def test_a_start_from_a_file_of_another_model_is_told(train, call, images, tmp_path):
    own = [*VIT, *words('--convert eva --convert-kwargs window_size=2 partition_grid=2 --img-size 16')]
    converted = train('converted', '--epochs', '1', model=own)
    file = converted / 'model_best.safetensors'
    place = ['--data-dir', images, '--output', tmp_path, '--experiment', 'next', '--epochs', '1']
    for given in (file, converted, converted / 'last.pth.tar'):  # a folder stands for its best weights
        code, out, err = call('train', *MODEL, *QUICK, *place, '--pretrained-path', given, '--dry-run')
        assert code == 0 and 'holds weights of another model than this run makes, eva_deit_tiny' in out, out + err
        assert f'to go on with its own, give {" ".join(own)}' in out
    code, out, err = call('train', *MODEL, *QUICK, *place, '--pretrained-path', converted)
    assert code == 0 and f'warning: {file} holds weights of another model' in out + err, out + err
    for dry in ([], ['--dry-run']):  # weights that do not fit
        flags = [*MODEL, '--model-kwargs', 'embed_dim=24', *QUICK, *place, '--pretrained-path', converted, *dry]
        code, out, err = call('train', *flags)
        assert code == 2 and err.count('\n') == 1 and f'to go on with its own, give {" ".join(own)}' in err, err
    for flags in (own, [*VIT, *words('--convert eva --convert-kwargs partition_grid=2 --img-size 16')]):
        call_flags = [*flags, *QUICK, '--data-dir', images, '--pretrained-path', converted]
        code, out, err = call('train', *call_flags, '--dry-run')
        assert code == 0 and ('another model' in out) == (flags != own), out + err


def test_a_conversion_of_a_runs_own_model_is_no_other_model(train, call, images, tmp_path):
    before = train('before', '--epochs', '1', '--img-size', '16', model=VIT)
    flags = words('--convert eva --convert-kwargs window_size=2 partition_grid=2 --img-size 16 --dry-run')
    code, out, err = call('train', *VIT, *flags, *QUICK, '--data-dir', images, '--pretrained-path', before)
    assert code == 0 and 'another model' not in out, out + err


def test_a_start_from_a_run_with_other_arguments_of_the_model_is_told(train, call, images):
    """Those that change no tensor's shape. Sizes, and what acts in training alone, may be others."""
    file = train('own', *words('--epochs 1 --num-classes 3')) / 'last.safetensors'
    free = words('window_size=4 partition_grid=1 patch_size=8 img_size=32 proj_drop_rate=0.1 noise_std=0')
    for kwargs, told in (([], False), (free, False), (['proposal_scale=0.5'], True), (['count_cells=all'], True)):
        flags = [*MODEL, *['--model-kwargs', *kwargs] * bool(kwargs), *QUICK]
        flags += ['--data-dir', images, '--pretrained-path', file, '--dry-run']
        code, out, err = call('train', *flags)
        line = f'{file} holds weights of another model than this run makes, eva_deit_tiny'
        assert code == 0 and (line in out) == told, (kwargs, out + err)
        own = ' '.join(MODEL)
        assert (f'to go on with its own, give {own}' in out) == told, out


def test_a_start_from_a_file_of_a_folder_keeps_what_its_config_says(call, images, tmp_path):
    """As from a run's file: of a conversion it makes no softmax model, and other arguments of the model are told."""
    vit = [*VIT, 'img_size=16']
    kwargs = dict(patch_size=4, embed_dim=16, depth=2, num_heads=2, img_size=16, num_classes=3)
    local = evavit.convert_vit(timm.create_model(VIT[1], **kwargs), attention='local', window_size=2)
    scaled = timm.create_model(MODEL[1], num_classes=3, **KWARGS, proposal_scale=0.5)
    cases = [
        (local, [*vit, '--convert', 'local', '--convert-kwargs', 'window_size=2'], False),
        (local, [*vit, '--convert', 'local', '--convert-kwargs', 'window_size=3'], True),
        (scaled, MODEL, True),
        (scaled, [*MODEL, 'proposal_scale=0.5', 'global_pool=avg', 'qkv_bias=true'], False),  # which are the defaults
    ]
    for model, flags, told in cases:
        file = save_folder(model, tmp_path / 'hub', data='fruit', licence='mit') / 'model.safetensors'
        config, _ = parse_settings('train', [*flags, '--pretrained-path', str(file)])
        lines = dry_run.other_start(config, 3, None)
        assert [f'give --pretrained --model local-dir:{tmp_path}/hub in place of' in line for line in lines] == [
            True
        ] * told
        given = ['--pretrained', '--model', f'local-dir:{file.parent}']
        config, _ = parse_settings('train', given)
        build.name_converted(config.model, softmax_too=True)
        assert not dry_run.other_start(config, 3, None)
    save_folder(local, tmp_path / 'hub', data='fruit', licence='mit')
    for start in ('--pretrained-path', '--initial-checkpoint'):
        code, _, err = call('train', *vit, *QUICK, '--data-dir', images, start, file, '--dry-run')
        assert code == 2 and f'{file} is of a converted model' in err and err.count('\n') == 1, err


def test_a_start_from_a_file_whose_labels_mean_other_classes(train, call, images, tmp_path):
    """The same ones in another order are refused where the classifier is kept; others are told of."""
    (tmp_path / 'map.txt').write_text('\n'.join(reversed(CLASSES)))
    turned = train('turned', '--epochs', '1', '--class-map', tmp_path / 'map.txt')
    write_images(tmp_path / 'other' / 'train', {'apple': 4, 'plum': 4, 'quince': 4})
    write_images(tmp_path / 'other' / 'val', {'apple': 1, 'plum': 1, 'quince': 1})
    write_images(tmp_path / 'more' / 'train', dict.fromkeys((*CLASSES, 'quince'), 4))
    write_images(tmp_path / 'more' / 'val', dict.fromkeys((*CLASSES, 'quince'), 1))
    file = turned / 'model_best.safetensors'
    for more in (['--dry-run'], []):
        for start in ('--initial-checkpoint', '--pretrained-path'):
            flags = [*MODEL, *QUICK, '--output', tmp_path, '--epochs', '1', start, file, *more]
            code, out, err = call('train', *flags, '--experiment', f'a{start}', '--data-dir', images)
            assert code == 2 and f'apple is class 0 of this data, and class 2 of {file}; give' in err, err
            assert err.count('\n') == 1 and 'warning' not in out
            code, out, err = call('train', *flags, '--experiment', f'b{start}', '--data-dir', tmp_path / 'other')
            line = f'{file} has learnt other classes: class 0 was called plum, and is apple in this data'
            assert code == 0 and out.count(line) == 1, out + err
        code, out, err = call('train', *flags, '--experiment', 'c', '--data-dir', tmp_path / 'more')
        assert code == 0 and 'other classes' not in out, out + err  # the classifier is new


def test_a_start_from_a_classifier_without_names_is_told(call, images, tmp_path):
    """Where it is kept, and the data has names."""
    folder = save_folder(timm.create_model(MODEL[1], num_classes=3, **KWARGS), tmp_path, data='fruit', licence='mit')
    start = [*MODEL, *QUICK, '--data-dir', images, '--pretrained-path', folder / 'model.safetensors', '--dry-run']
    (tmp_path / 'map.txt').write_text('\n'.join(CLASSES))
    (tmp_path / 'more.txt').write_text('\n'.join((*CLASSES, 'quince')))
    for more, told in (([], True), (['map.txt'], False), (['more.txt'], False)):
        code, out, err = call('train', *start, *(f'--class-map={tmp_path / name}' for name in more))
        assert code == 0 and ('model.safetensors are called; labels are taken as numbers, 0 for' in out) == told, (
            out + err
        )
    config, _ = parse_settings('train', list(map(str, start)))
    assert not dry_run.other_start(config, 3, None) and len(dry_run.other_start(config, 3, CLASSES)) == 1


def test_a_start_from_what_was_trained_on_the_images_to_validate_on(call, images, tmp_path):
    """Another share or seed of the same folder."""
    flags = [*MODEL, *QUICK, '--output', tmp_path, '--data-dir', images / 'train', '--epochs', '1']
    code, out, err = call('train', *flags, '--experiment', 'first', '--val-fraction', '0.5', '--seed', '3')
    assert code == 0, err
    start = [*flags, '--pretrained-path', tmp_path / 'first' / 'last.safetensors', '--dry-run']
    line = 'held out 0.5 of this folder, with seed 3: of the images that this run validates on it has learnt some; give'
    for more, told in (('0.5 --seed 3', False), ('0.5 --seed 4', True), ('0.3 --seed 3', True)):
        code, out, err = call('train', *start, '--val-fraction', *words(more))
        assert code == 0 and (line in out) == told, out + err
    (tmp_path / 'copy').mkdir()
    write_images(tmp_path / 'copy', dict.fromkeys(CLASSES, 4))
    code, out, err = call('train', *start, '--data-dir', tmp_path / 'copy', '--val-fraction', '0.3')
    assert code == 0 and line not in out, out + err


def test_a_start_from_a_folder_for_the_hub_whose_labels_mean_other_classes(call, images, tmp_path):
    """Its config.json tells the classes, of the folder and of the file in it."""
    folder, flags = tmp_path / 'hub', ['--output', tmp_path, '--data-dir', images, '--epochs', '1']
    model = timm.create_model('eva_deit_tiny', num_classes=3, **KWARGS)
    from_folder = ['--model', f'local-dir:{folder}', '--pretrained']
    starts = [
        from_folder,
        *([*MODEL, start, folder / 'model.safetensors'] for start in ('--initial-checkpoint', '--pretrained-path')),
    ]
    for number, start in enumerate([*starts, [*from_folder, '--dry-run']]):
        save_folder(model, folder, label_names=[*reversed(CLASSES)], data='fruit', licence='mit')
        code, out, err = call('train', *QUICK, *flags, *start, '--experiment', f'a{number}')
        assert code == 2 and 'apple is class 0 of this data, and class 2 of ' in err and err.count('\n') == 1, out + err
        save_folder(model, folder, label_names=['x', *CLASSES[1:]], data='fruit', licence='mit')
        code, out, err = call('train', *QUICK, *flags, *start, '--experiment', f'b{number}')
        assert code == 0 and out.count('learnt other classes: class 0 was called x, and is apple in') == 1, out + err


def test_a_start_from_a_folder_with_damaged_names_of_its_classes_is_a_line(call, images, tmp_path):
    """As validate.py refuses them, where the classifier is kept: labels might mean other classes."""
    model = timm.create_model('eva_deit_tiny', num_classes=3, **KWARGS)
    folder = save_folder(model, tmp_path / 'hub', data='fruit', licence='mit')
    (tmp_path / 'map.txt').write_text('\n'.join(CLASSES))
    start, content = (
        ['--model', f'local-dir:{folder}', '--pretrained'],
        json.loads((folder / 'config.json').read_text()),
    )
    teacher = [*MODEL, '--kd-model-name', f'local-dir:{folder}']
    for names in (['plum', 'pear', 'plum'], ['plum', 'pear']):
        (folder / 'config.json').write_text(json.dumps({**content, 'label_names': names}))
        for flags in (start, teacher):
            code, out, err = call('train', *flags, *QUICK, '--data-dir', images, '--dry-run')
            line = err.splitlines()[-1]
            assert code == 2 and 'label_names in its config.json: 2 different names for 3 classes' in line, out + err
    for more in (['--class-map', tmp_path / 'map.txt'], ['--num-classes', '4']):  # of 4 classes the classifier is new
        code, out, err = call('train', *start, *QUICK, '--data-dir', images, *more, '--dry-run')
        assert (code == 0 or '--num-classes' in more) and 'label_names' not in err, out + err


@pytest.mark.parametrize('model', [MODEL, ['--model', 'resnet10t']], ids=['eva', 'batch norm'])
def test_a_linear_probe_trains_the_classifier_alone(train, tmp_path, model):
    kwargs = KWARGS if model is MODEL else {}
    source = timm.create_model(model[1], num_classes=7, **kwargs)
    torch.save(source.state_dict(), tmp_path / 'source.pth')
    folder = train(
        'run',
        '--linear-probe',
        '--pretrained-path',
        tmp_path / 'source.pth',
        '--epochs',
        '1',
        '--img-size',
        '16',
        '--drop-path',
        '0.1',
        model=model,
    )
    head = source.pretrained_cfg['classifier']
    after, before = weights(folder / 'last.safetensors'), source.state_dict()
    assert after.keys() == before.keys()
    for name, value in before.items():
        if not name.startswith(f'{head}.'):
            assert torch.equal(after[name], value), name
    start = timm.create_model(model[1], num_classes=3, **kwargs).get_classifier()
    assert after[f'{head}.weight'].shape == start.weight.shape and after[f'{head}.bias'].abs().max() > 0


def test_weights_load_into_timm(train):
    folder = train('run')
    models = [
        timm.create_model('eva_deit_tiny', checkpoint_path=str(folder / name), num_classes=3, **KWARGS).eval()
        for name in ('last.safetensors', 'last.pth.tar')
    ]
    image = torch.randn(2, 3, 16, 16)
    assert torch.equal(models[0](image), models[1](image))


def test_saved_settings_repeat_the_run(train, call, tmp_path):
    first = train('first', *DRAWN)
    code, _, err = call('train', '-c', first / 'args.yaml', '--experiment', 'second')
    assert code == 0, err
    second = tmp_path / 'second'
    assert rows(first) == rows(second)
    a, b = weights(first / 'last.safetensors'), weights(second / 'last.safetensors')
    assert all(torch.equal(a[key], b[key]) for key in a)
    settings = [yaml.safe_load((folder / 'args.yaml').read_text()) for folder in (first, second)]
    assert {key for key in settings[0] if settings[0][key] != settings[1][key]} == {'experiment'}


def test_resume_auto_equals_the_uninterrupted_run(train, call, images, tmp_path, monkeypatch):
    whole = train('whole', *DRAWN, *LONGER)
    save_epoch = checkpoint.Saver.save_epoch

    def stop_after_two(saver, position, metric):
        best = save_epoch(saver, position, metric)
        if position.epoch == 2:
            raise KeyboardInterrupt
        return best

    monkeypatch.setattr(checkpoint.Saver, 'save_epoch', stop_after_two)
    place = ['--data-dir', images, '--output', tmp_path, '--experiment', 'parts']
    assert call('train', *MODEL, *QUICK, *place, *DRAWN, *LONGER, '--resume', 'auto')[0] == INTERRUPTED
    monkeypatch.undo()
    torch.rand(7)  # whatever the process draws before it resumes is of no effect
    parts = train('parts', *DRAWN, *LONGER, '--resume', 'auto')

    assert_same_run(whole, parts)


def test_resume_auto_starts_fresh_and_says_so(call, images, tmp_path):
    flags = [*MODEL, '--data-dir', images, *QUICK, '--output', tmp_path, '--experiment', 'new', '--resume', 'auto']
    code, out, _ = call('train', *flags)
    assert code == 0 and 'starting fresh' in out
    code, out, _ = call('train', *flags)  # finished: nothing left to do
    assert code == 0 and 'resuming from' in out and 'epoch 0 ' not in out


def test_a_finished_run_is_not_overwritten(train, call, images, tmp_path):
    folder = train('run')
    before = (folder / 'last.pth.tar').read_bytes()
    code, _, err = call('train', *MODEL, '--data-dir', images, *QUICK, '--output', tmp_path, '--experiment', 'run')
    assert code == 2 and err.count('\n') == 1 and '--resume auto' in err
    assert (folder / 'last.pth.tar').read_bytes() == before


@pytest.mark.parametrize(
    'name, others', [('args.yaml', []), ('tmp.pth.tar', []), ('train.log', ['args.yaml', 'tmp.pth.tar']), ('.lock', [])]
)
def test_a_file_of_the_users_is_not_written_over(train, call, images, tmp_path, name, others):
    """But what a run leaves that was stopped before its first checkpoint is."""
    (tmp_path / 'mine').mkdir()
    for file in (name, *others):
        (tmp_path / 'mine' / file).write_text('# my remarks\nseed: 3\n')
    flags = [*MODEL, '--data-dir', images, *QUICK, '--output', tmp_path, '--experiment', 'mine']
    for more in ([], ['--resume', 'auto'], ['--dry-run'], ['-c', tmp_path / 'mine' / name] * name.endswith('yaml')):
        code, _, err = call('train', *flags, *more)
        assert code == 2 and f'holds {name}, which no run has left there' in err and err.count('\n') == 1, err
    for file in (name, *others):
        assert (tmp_path / 'mine' / file).read_text() == '# my remarks\nseed: 3\n'
    folder = train('run', '--epochs', '1')
    code, _, err = call('train', *flags, '--resume', folder / 'last.pth.tar')
    assert code == 2 and f'holds {name}, which no run has left there' in err, err
    for path in folder.glob('*.pth.tar'):
        path.unlink()
    for path in folder.glob('*.safetensors'):
        path.unlink()
    train('run', '--resume', 'auto', '--epochs', '1')


def test_accumulation_equals_the_bigger_batch(train):
    model = [*MODEL, 'noise_std=0']
    big = train('big', '-b', '4', *PLAIN, model=model)
    small = train('small', '-b', '2', '--grad-accum-steps', '2', '--global-batch-size', '4', *PLAIN, model=model)
    for name in ('loss', 'grad_norm'):
        a, b = scalars(big, f'train/{name}'), scalars(small, f'train/{name}')
        assert a.keys() == b.keys()
        torch.testing.assert_close(list(a.values()), list(b.values()), rtol=1e-4, atol=1e-6)


def test_average_is_kept_judged_and_saved(train, call, images, tmp_path):
    folder = train('ema', '--model-ema', '--model-ema-decay', '0.8')
    checkpoint = torch.load(folder / 'last.pth.tar', weights_only=False)
    plain, average = checkpoint['state_dict'], checkpoint['state_dict_ema']
    assert any(not torch.equal(plain[key], average[key]) for key in plain)
    saved = weights(folder / 'last.safetensors')
    assert all(torch.equal(saved[key], average[key]) for key in saved)
    last = rows(folder)[-1]
    for flags, column in (([], 'eval_raw_loss'), (['--use-ema'], 'eval_loss')):
        code, _, err = call(
            'validate',
            '--checkpoint',
            folder / 'last.pth.tar',
            '--data-dir',
            images,
            '--workers',
            '0',
            '--results-file',
            tmp_path / 'r.json',
            *flags,
        )
        assert code == 0, err
        assert json.loads((tmp_path / 'r.json').read_text())['loss'] == pytest.approx(float(last[column]), abs=1e-5)


def test_repeated_augmentation_needs_no_second_process(train):
    assert len(rows(train('repeats', '--aug-repeats', '3'))) == 2


@pytest.mark.parametrize(
    'flags',
    [
        ['--amp'],
        ['--amp', '--amp-dtype', 'float16'],
        ['--grad-checkpointing'],
        ['--channels-last'],
        ['--bce-loss', '--mixup', '0.2'],
        ['--layer-decay', '0.8'],
        ['--opt', 'lamb'],
        ['--sched-on-updates', '--sched', 'wsd'],
        ['--clip-grad', '1', '--clip-mode', 'agc'],
        ['--cooldown-epochs', '1'],
        ['--in-chans', '1'],
        pytest.param(
            words('--torchcompile aot_eager --grad-checkpointing -b 2 --grad-accum-steps 2 --model-ema'),
            marks=pytest.mark.slow,
        ),
    ],
    ids=' '.join,
)
def test_options_that_change_the_machinery(train, flags):
    folder = train('run', '--epochs', '1', *flags)
    assert len(rows(folder)) == (2 if '--cooldown-epochs' in flags else 1)
    assert load_checkpoint_metadata(str(folder / 'last.pth.tar'))['args'].class_names == ['apple', 'pear', 'plum']


def test_a_compiled_model_sees_one_size(train, call, images, record_compiled):
    """Of 13 images in batches of 4 the last is one: it is filled up, so that nothing is compiled for its size."""
    as_is = train('as_is', *PLAIN, '--validation-batch-size', '4')
    compiled = train('compiled', *PLAIN, '--validation-batch-size', '4', '--torchcompile', 'recording')
    assert record_compiled == [4, 4]  # in training, in validation
    for a, b in zip(rows(as_is), rows(compiled), strict=True):
        for name in ('train_loss', 'eval_loss', 'eval_top1', 'eval_top5'):
            assert float(a[name]) == pytest.approx(float(b[name]), rel=1e-5)
    judge = ['--checkpoint', compiled / 'last.safetensors', '--data-dir', images, '--device', 'cpu', '-b', '5']
    code, out, err = call('validate', *judge, '--workers', '0', '--torchcompile', 'recording')
    assert code == 0 and record_compiled == [4, 4, 5], err
    assert f'loss {float(rows(compiled)[-1]["eval_loss"]):.4f}  (13 images)' in out


@functools.cache  # PyTorch takes a name once
def recording_sizes():
    """A backend of torch.compile that is called recording; the list to which it adds the images of a batch."""
    sizes = []

    def recording(graph, inputs):
        sizes.extend(value.shape[0] for value in inputs if value.ndim == 4 and not value.requires_grad)
        return graph.forward

    torch._dynamo.register_backend(recording, name='recording')
    return sizes


@pytest.fixture
def record_compiled():
    sizes = recording_sizes()
    yield sizes
    sizes.clear()
    torch.compiler.reset()


def test_fine_tuning_starts_from_a_body_with_other_classes(train, call, images, tmp_path):
    folder = train('pretrain')
    write_images(tmp_path / 'two' / 'train', dict(left=6, right=6))
    write_images(tmp_path / 'two' / 'validation', dict(left=3, right=3))
    code, _, err = call(
        'train',
        *MODEL,
        *QUICK,
        '--data-dir',
        tmp_path / 'two',
        '--output',
        tmp_path,
        '--experiment',
        'tuned',
        '--pretrained-path',
        folder / 'last.safetensors',
        '--lr',
        '0',
    )
    assert code == 0, err
    body, tuned = weights(folder / 'last.safetensors'), weights(tmp_path / 'tuned' / 'last.safetensors')
    assert tuned['head.weight'].shape[0] == 2
    assert all(torch.equal(body[key], tuned[key]) for key in body if not key.startswith('head.'))


@pytest.mark.parametrize('name', [MODEL[1], 'vit_tiny_patch16_224'])
def test_a_run_from_a_folder_needs_it_no_more(train, call, images, tmp_path, name):
    """Its checkpoints say architecture and image settings: the folder may be gone, or hold others."""
    kwargs = KWARGS if name == MODEL[1] else SOFTMAX
    model = timm.create_model(name, num_classes=3, **kwargs)
    folder = save_folder(model, tmp_path / 'mine', data='x', licence='mit', data_config=dict(mean=(0.1, 0.2, 0.3)))
    tuned = train('tuned', '--lr', '0', model=['--model', f'local-dir:{folder}', '--pretrained'])
    saved = yaml.safe_load((tuned / 'args.yaml').read_text())
    assert (saved['model'], saved['mean']) == (name, [0.1, 0.2, 0.3])
    other = timm.create_model(name, num_classes=3, **kwargs)
    save_folder(other, folder, data='x', licence='mit', data_config=dict(mean=(0.9, 0.9, 0.9)), overwrite=True)
    flags = ['--data-dir', images, '--workers', '0', '--device', 'cpu', '--results-file', tmp_path / 'val.json']
    code, out, err = call('validate', '--checkpoint', tuned, *flags)
    assert code == 0, out + err
    assert json.loads((tmp_path / 'val.json').read_text())['loss'] == pytest.approx(float(rows(tuned)[0]['eval_loss']))
    code, out, err = call('inference', '--checkpoint', tuned, *flags[:-2], '--results-file', tmp_path / 'inf.csv')
    assert code == 0, out + err


@pytest.mark.parametrize('classes', [3, 5])
def test_a_folder_whose_network_is_converted(train, call, images, tmp_path, classes):
    """--model local-dir:FOLDER --pretrained --convert: checkpoints carry the conversion and need the folder no more."""
    parent = timm.create_model('vit_tiny_patch16_224', num_classes=classes, **SOFTMAX)
    folder = save_folder(parent, tmp_path / 'mine', data='x', licence='mit', data_config=dict(mean=(0.1, 0.2, 0.3)))
    flags = words('--lr 0 --convert eva --convert-kwargs window_size=2') + ['--kd-model-name', 'parent'] * (
        classes == 3
    )
    tuned = train('tuned', *flags, model=['--model', f'local-dir:{folder}', '--pretrained'])
    saved = yaml.safe_load((tuned / 'args.yaml').read_text())
    assert (saved['model'], saved['convert'], saved['mean']) == ('vit_tiny_patch16_224', 'eva', [0.1, 0.2, 0.3])
    shutil.rmtree(folder)
    model = evavit.load_converted(tuned)
    assert torch.equal(model.blocks[0].attn.qkv.weight, parent.blocks[0].attn.qkv.weight) and model.num_classes == 3
    assert torch.equal(model.head.weight, parent.head.weight) == (classes == 3)
    code, out, err = call('validate', '--checkpoint', tuned, '--data-dir', images, '--workers', '0', '--device', 'cpu')
    assert code == 0, out + err


@pytest.mark.parametrize('source', ['local-dir:', 'hf-hub:'])
def test_a_converted_network_as_the_model(train, call, images, tmp_path, monkeypatch, source):
    """--model FOLDER --pretrained: a run goes on from it, and its checkpoints need the folder no more."""
    parent = timm.create_model('vit_tiny_patch16_224', num_classes=5, in_chans=1, **SOFTMAX)
    folder = save_folder(evavit.convert_vit(parent, window_size=2), tmp_path / 'mine', data='x', licence='mit')
    teacher = evavit.convert_vit(timm.create_model('vit_tiny_patch16_224', num_classes=3, in_chans=1, **SOFTMAX))
    save_folder(teacher, tmp_path / 'teacher', data='x', licence='mit')
    monkeypatch.setattr('evavit.hub.download_from_hf', lambda name, file: str(folder / file))
    name = f'{source}{folder}' if source == 'local-dir:' else 'hf-hub:me/mine'
    tuned = train('tuned', '--lr', '0', model=['--model', name, '--pretrained'])
    saved = yaml.safe_load((tuned / 'args.yaml').read_text())
    assert (saved['model'], saved['convert'], saved['model_kwargs']['in_chans']) == ('vit_tiny_patch16_224', 'eva', 1)
    save_folder(parent, folder, data='x', licence='mit', overwrite=True)  # what it was no longer matters
    model = evavit.load_converted(tuned)
    assert torch.equal(model.blocks[0].attn.qkv.weight, parent.blocks[0].attn.qkv.weight) and model.num_classes == 3
    taught = train('taught', '--kd-model-name', f'local-dir:{tmp_path / "teacher"}', '--in-chans', '1')
    about = yaml.safe_load((taught / 'args.yaml').read_text())
    assert about['kd_model_name'].endswith('teacher')
    code, out, err = call('validate', '--checkpoint', tuned, '--data-dir', images, '--workers', '0', '--device', 'cpu')
    assert code == 0, out + err
