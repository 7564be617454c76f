"""Every fault of the user's is one line that names it, and exit code 2."""

import errno
import multiprocessing
import shutil

import pytest
import timm
import torch
from runs import (
    KWARGS,
    MODEL,
    QUICK,
    SOFTMAX,
    Code,
    command,
    load_script,
    together,
    weights,
    write_bad_weights,
    write_images,
)

from evavit.errors import UserError
from evavit.training.data import read_class_map
from evavit.training.data.folders import find_split, find_undivided

# flags beside --data-dir, and what the line must say
TRAIN = {
    'unknown flag': (['--epoch', '3'], ['--epoch', 'did you mean --epochs']),
    'stray word': (['sometimes'], ['sometimes']),
    'wrong type': (['--lr', 'fast'], ['--lr', 'fast', 'a number']),
    'out of range': (['--epochs', '0'], ['--epochs', '0', '≥ 1']),
    'not a choice': (['--sched', 'cosin'], ['--sched', 'cosin', 'cosine']),
    'not key=value': (['--model-kwargs', 'depth'], ['depth', 'key=value']),
    'unknown model': (['--model', 'eva_deit_tin'], ['eva_deit_tin', 'eva_deit_tiny']),
    'unknown argument of the model': (['--model-kwargs', 'windows=3'], ['windows']),
    'no window and no cells': (['--model-kwargs', 'window_size=0', 'partition_grid=0'], ['window_size=0']),
    'heads that do not divide': (['--model-kwargs', 'num_heads=5'], ['5', '16']),
    'unknown dataset': (['--dataset', 'torch/fashion_mnits'], ['torch/fashion_mnits', 'mean fashion_mnist']),
    'unknown kind of dataset': (['--dataset', 'folder'], ['folder']),
    'dataset that is not there': (['--dataset', 'torch/fashion_mnist'], ['torch/fashion_mnist']),
    'unknown optimizer': (['--opt', 'adamv'], ['adamv', 'adam']),
    'more classes than the data': (['--num-classes', '7'], ['7', '3 classes']),
    'fewer classes than the data': (['--num-classes', '2'], ['2', '3 classes']),
    'global batch': (['--global-batch-size', '1024'], ['1024', '-b 4 --grad-accum-steps 256']),
    'batch above the data': (['-b', '32'], ['24 images', '32']),
    'a mixup that gives NaN': (['--mixup', '1e-320'], ['mixup 9.99989e-321', '0.001 or more']),
    'a cutmix that gives NaN': (['--cutmix', '1e-320'], ['cutmix 9.99989e-321', '0.001 or more']),
    'a learning rate that is no float32': (['--lr', '1e38'], ['--lr', '1e38', '1e+30']),
    'odd batch with mixup': (['--mixup', '0.5', '-b', '3'], ['batch_size 3', 'even']),
    'warm-up longer than the run': (['--warmup-epochs', '2'], ['warmup_epochs 2', 'epochs 2']),
    'no such config': (['-c', 'nowhere.yaml'], ['nowhere.yaml']),
    'no such checkpoint to resume': (['--resume', 'nowhere.pth.tar'], ['nowhere.pth.tar']),
    'no such checkpoint to start from': (['--initial-checkpoint', 'nowhere.pth'], ['nowhere.pth']),
    'a folder to resume': (['--resume', 'RUN'], ['is a folder', 'last.pth.tar']),
    'a folder to start from': (['--initial-checkpoint', '.'], ['--initial-checkpoint', 'is a folder']),
    'a run whose weights are empty': (['--pretrained-path', 'RUN'], ['RUN/model_best.safetensors', 'is empty']),
    'a folder as the settings': (['-c', 'RUN'], ['is a folder', 'args.yaml']),
    'a model that is a run': (['--model', 'local-dir:RUN'], ['--pretrained-path RUN/model_best', '--checkpoint RUN']),
    'a model that is nowhere': (['--model', 'local-dir:nowhere'], ['local-dir:nowhere', 'no such folder']),
    'no such device': (['--device', 'gpu'], ['gpu', 'cuda']),
    'unknown policy': (['--aa', 'random'], ['random']),
    'unknown compiler': (['--torchcompile', 'inductr'], ['inductr', 'inductor']),
    'three means for one channel': (
        ['--in-chans', '1', '--mean', '0.5', '0.5', '0.5'],
        ['mean', '1 channels; give one for each'],
    ),
    'image size that does not fit the model': (['--img-size', '32'], ['32']),
    'patch of no pixels': (['--model-kwargs', 'patch_size=0'], ['patch_size=0']),
    'patch above the image': (['--model-kwargs', 'patch_size=32'], ['patch_size=32']),
    'no pooling': (['--model-kwargs', "global_pool=''"], ['global_pool=']),
    'device as an argument of the model': (['--model-kwargs', 'device=meta'], ['--device']),
    'checkpoint as an argument of the model': (['--model-kwargs', 'checkpoint_path=/nope'], ['--initial-checkpoint']),
    'four channels': (['--model-kwargs', 'in_chans=4'], ['4 image channels', '1 or 3']),
    'four channels of input': (['--input-size', '4', '16', '16'], ['4 image channels', '1 or 3']),
    'smoothing away the label': (['--smoothing', '1'], ['smoothing 1', 'less than 1']),
    'dropping all features': (['--drop', '1'], ['drop 1', 'less than 1']),
    'one beta': (['--opt-betas', '0.9'], ['opt_betas [0.9]', '2 numbers']),
    'three betas': (['--opt-betas', '0.9', '0.99', '0.999'], ['opt_betas', '2 numbers']),
    'second-order optimizer': (['--opt', 'adahessian'], ['adahessian', '--opt']),
    'ratio of nothing': (['--ratio', '0', '1'], ['ratio [0.0, 1.0]', '0.01 to 100']),
    'ratio of a line': (['--ratio', '1e-9', '1e-8'], ['ratio [1e-09, 1e-08]', '0.01 to 100']),
    'ratio of a row': (['--ratio', '1', '1e9'], ['ratio', '0.01 to 100']),
    'steps that fall': (['--sched', 'multistep', '--decay-milestones', '2', '1'], ['[2, 1]', 'give them in order']),
    'steps after the end': (['--sched', 'multistep', '--decay-milestones', '5'], ['[5]', '2 epochs', 'lower it']),
    'scale that falls': (['--scale', '1', '0.5'], ['scale [1.0, 0.5]', 'give the smaller number first']),
    'steps of no epochs': (['--sched', 'step', '--decay-epochs', '0'], ['decay_epochs 0']),
    'clipping to nothing': (['--clip-grad', '0'], ['clip_grad 0', 'leave it out']),
    'no such body to start from': (['--pretrained-path', 'nowhere.pth'], ['nowhere.pth']),
    'probe of nothing': (['--linear-probe'], ['linear_probe', '--pretrained-path']),
    'probe with layer decay': (
        ['--linear-probe', '--layer-decay', '0.75', '--pretrained-path', 'x.pth'],
        ['layer_decay 0.75', 'linear_probe'],
    ),
    'class map of another kind': (['--class-map', 'classes.pkl'], ['classes.pkl', '.txt']),
}


def only_line(err):
    lines = [line for line in err.splitlines() if line]
    assert len(lines) == 1 and lines[0].startswith('error: '), err
    return lines[0]


@pytest.mark.parametrize('fault', TRAIN)
def test_train_refuses(fault, call, images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'RUN').mkdir()
    for name in ('model_best.safetensors', 'last.pth.tar', 'args.yaml'):
        (tmp_path / 'RUN' / name).touch()
    flags, words = TRAIN[fault]
    kwargs = flags if flags[0] == '--model-kwargs' else []
    rest = [] if kwargs else flags
    code, _, err = call('train', *MODEL, *kwargs, *QUICK, '--data-dir', images, '--output', tmp_path / 'out', *rest)
    line = only_line(err)
    assert code == 2 and all(word in line for word in words), line
    assert not (tmp_path / 'out').exists() or not list((tmp_path / 'out').rglob('*.pth.tar'))


@pytest.fixture
def folder(images, tmp_path):
    return shutil.copytree(images, tmp_path / 'folder')


@pytest.fixture
def refused(call, folder):
    def refused(*flags, script='train'):
        place = [*QUICK, '--output', folder.parent, '--experiment', 'run'] if script == 'train' else []
        code, out, err = call(script, *MODEL, '--data-dir', folder, *place, *flags)
        assert 'this must not run' not in out
        assert code == 2
        return only_line(err)

    return refused


def test_missing_folder(refused, folder):
    assert 'nowhere' in refused('--data-dir', folder / 'nowhere')


@pytest.mark.parametrize('flags', [[], ['--val-fraction', '0.2']])
def test_a_class_or_a_split_in_place_of_the_folder(refused, folder, flags, monkeypatch):
    monkeypatch.chdir(folder.parent)
    line = refused('--data-dir', 'folder/val/apple', *flags)
    assert line == 'error: folder/val/apple: holds images and no class folders; give the folder around it, ' + (
        '--data-dir folder/val'
    )
    if not flags:
        assert 'is itself a split; give the folder around it' in refused('--data-dir', 'folder/train')


@pytest.mark.parametrize('name', ['train', 'val'])
def test_a_class_may_be_called_as_a_split(images, tmp_path, name):
    """Beside classes of other names, in a folder without splits."""
    for source, target in zip(('apple', 'pear', 'plum'), ('car', name, 'bus'), strict=True):
        shutil.copytree(images / 'train' / source, tmp_path / target)
    assert find_split(tmp_path, 'validation') == find_undivided(tmp_path, 'train', 'validation') == tmp_path
    for other in ('car', 'bus'):  # else it is a split with its classes forgotten
        shutil.rmtree(tmp_path / other)
    with pytest.raises(UserError, match=r'has val to validate on|holds images and no'):
        find_undivided(tmp_path, 'train', 'validation')


def test_folders_without_permission(refused, folder, monkeypatch):
    def closed(place):
        raise PermissionError(errno.EACCES, 'Permission denied', str(place))

    monkeypatch.setattr('evavit.training.data.folders.os.listdir', closed)
    for flags in ([], ['--dry-run'], ['--val-fraction', '0.2']):
        assert refused(*flags) == 'error: folder: cannot be read (Permission denied)'.replace('folder', str(folder), 1)


@pytest.mark.parametrize('where', ['x' * 300, 'file'], ids=['too long', 'in a file'])
@pytest.mark.parametrize(
    'program, flag',
    [
        *(('train', flag) for flag in ('--data-dir', '--output', '--initial-checkpoint', '--pretrained-path')),
        *(('train', flag) for flag in ('--resume', '--class-map', '-c')),
        *(('validate', flag) for flag in ('--checkpoint', '--data-dir', '--results-file', '--report-dir')),
        *(('inference', flag) for flag in ('--checkpoint', '--results-file')),
    ],
)
def test_a_path_that_cannot_be_followed_is_a_line(call, images, tmp_path, program, flag, where):
    """As one through a folder of somebody else's, for which a test of root's has no means."""
    (tmp_path / 'file').touch()
    flags = dict(
        train=[*MODEL, *QUICK, '--data-dir', images, '--output', tmp_path / 'output', '--experiment', 'run'],
        validate=[*MODEL, '--data-dir', images, '--workers', '0', '--device', 'cpu', '--num-classes', '3'],
        inference=[*MODEL, '--data-dir', images, '--workers', '0', '--device', 'cpu', '--num-classes', '3'],
    )
    code, _, err = call(program, *flags[program], flag, tmp_path / where / 'name.txt')
    assert code == 2 and err.startswith('error: ') and err.count('\n') == 1, err


def test_a_tar_file_is_not_divided(refused, folder):
    for data in (folder / 'train.tar', folder):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / 'train.tar').write_bytes(b'')
        assert f'{folder / "train.tar"} is a tar file; unpack it' in refused(
            '--data-dir', data, '--val-fraction', '0.2'
        )


def test_a_picture_is_not_divided(refused, folder):
    picture = next(folder.rglob('*.png'))
    line = refused('--data-dir', picture, '--val-fraction', '0.2')
    assert line == f'error: --val-fraction divides a folder of class folders, and {picture} is a file'


def test_missing_split(refused, folder):
    shutil.rmtree(folder / 'val')
    assert 'validation' in refused()  # and not a silent validation on the training images


def test_empty_class(refused, folder):
    for image in (folder / 'train' / 'pear').iterdir():
        image.unlink()
    assert str(folder / 'train' / 'pear') in refused()


@pytest.mark.parametrize('split', ['train', 'val'])
@pytest.mark.parametrize(
    'place, words',
    [('0.png', ['0.png', 'outside']), ('pear/sub/0.png', ['pear', 'sub']), ('pear/0.TIFF', ['0.TIFF', 'JPEG'])],
)
def test_images_that_timm_would_misplace_or_drop(refused, folder, split, place, words):
    target = folder / split / place
    target.parent.mkdir(exist_ok=True)
    shutil.copy(folder / split / 'apple' / '0.png', target)
    line = refused()
    assert str(folder / split) in line and all(word in line for word in words), line


def test_class_of_validation_that_training_lacks(refused, folder):
    (folder / 'val' / 'pear').rename(folder / 'val' / 'peach')
    assert 'peach' in refused()


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('content', [b'', b'no image', 'half', 'link'], ids=['empty', 'text', 'truncated', 'dangling'])
def test_unreadable_image(refused, folder, content, workers):
    image = folder / 'train' / 'plum' / '3.png'
    if content == 'link':
        image.unlink()
        image.symlink_to(folder / 'nowhere.png')
    else:
        image.write_bytes(image.read_bytes()[:200] if content == 'half' else content)
    before = set(multiprocessing.active_children())
    assert str(image) in refused('--workers', workers)
    assert set(multiprocessing.active_children()) <= before  # no loading process is left


@pytest.mark.parametrize(
    'text, words',
    [
        ('lerning_rate: 3', ['lerning_rate']),
        ('warmup_epoch: 3', ['warmup_epoch', 'warmup_epochs']),
        ('lr: fast', ['lr', "'fast'", 'a number']),
        ('amp: 1', ['amp', 'true or false']),
        ('epochs: 2.5', ['epochs', '2.5', 'whole number']),
        ('epochs: null', ['epochs', 'None']),
        ('scale: 0.5', ['scale', '0.5', '2 numbers']),
        ('scale: [0.9, 0.1]', ['scale', 'smaller']),
        ('model_kwargs: 3', ['model_kwargs', '3']),
        ('- 1\n- 2', ['list']),
        ('a: [', ['YAML']),
        ('lr: 1\nepochs: 3\nlr: 2', ['lr', 'twice', 'line 3']),
        ('model_kwargs:\n  depth: 1\n  depth: 2', ['depth', 'twice']),
    ],
)
def test_bad_yaml(refused, tmp_path, text, words):
    path = tmp_path / 'bad.yaml'
    path.write_text(text)
    line = refused('-c', path)
    assert str(path) in line or 'smaller' in line
    assert all(word in line for word in words), line


def test_class_count_of_the_checkpoint(train, call, refused, folder, tmp_path):
    run = train('three')
    write_images(tmp_path / 'two' / 'train', dict(apple=4, pear=4))
    write_images(tmp_path / 'two' / 'validation', dict(apple=4, pear=4))
    line = refused('--data-dir', tmp_path / 'two', '--initial-checkpoint', run / 'last.safetensors')
    assert '3 classes' in line and 'has 2' in line
    line = refused('--data-dir', tmp_path / 'two', '--resume', run / 'last.pth.tar')
    assert '3 classes' in line and 'has 2' in line
    for name in ('last.safetensors', 'last.pth.tar'):
        write_images(tmp_path / name, dict(apple=4, pear=4, plum=4, quince=4))
        code, _, err = call('validate', '--checkpoint', run / name, '--data-dir', tmp_path / name, '--workers', '0')
        assert code == 2 and 'quince' in only_line(err)
        code, _, err = call(
            'validate',
            '--checkpoint',
            run / name,
            '--data-dir',
            tmp_path / 'two',
            '--workers',
            '0',
            '--num-classes',
            '2',
        )
        assert code == 2 and '3 classes' in only_line(err)


def test_checkpoint_of_another_model(train, refused):
    run = train('run')
    assert 'does not fit' in refused(
        '--model-kwargs', 'depth=3', '--initial-checkpoint', run / 'last.safetensors', '--experiment', 'other'
    )


def test_checkpoint_of_other_classes(refused, tmp_path):
    model = timm.create_model('deit_tiny_patch16_224', **SOFTMAX)
    torch.save(model.state_dict(), tmp_path / 'deit.pth')
    line = refused('--initial-checkpoint', tmp_path / 'deit.pth')
    assert '1000 classes' in line and '3' in line and '--pretrained-path' in line


def test_checkpoint_that_is_none_or_carries_code(refused, tmp_path):
    for name in ('broken.pth.tar', 'broken.safetensors'):
        (tmp_path / name).write_bytes(b'broken')
        assert name in refused('--initial-checkpoint', tmp_path / name)
        assert name in refused('--resume', tmp_path / name)

    torch.save(dict(state_dict=dict(weight=Code())), tmp_path / 'code.pth.tar')
    for flag in ('--initial-checkpoint', '--pretrained-path', '--resume'):
        assert 'code.pth.tar' in refused(flag, tmp_path / 'code.pth.tar')
    assert 'code.pth.tar' in refused('--checkpoint', tmp_path / 'code.pth.tar', script='validate')


def test_bad_weights_are_one_line_that_says_why(refused, tmp_path):
    for path, words in write_bad_weights(tmp_path).items():
        for flag, script in (
            ('--initial-checkpoint', 'train'),
            ('--pretrained-path', 'train'),
            ('--checkpoint', 'validate'),
        ):
            line = refused(flag, path, '--num-classes', '3', script=script)
            assert all(word in line for word in words), line


def test_weights_of_another_architecture(refused, tmp_path):
    torch.save(timm.create_model('resnet10t', num_classes=3).state_dict(), tmp_path / 'resnet.pth')
    for flag, script, words in (
        ('--initial-checkpoint', 'train', ['resnet.pth', 'not the weights of a Grid', 'conv1.0.weight']),
        ('--pretrained-path', 'train', ['resnet.pth', 'not the weights of a Grid', 'conv1.0.weight']),
        ('--checkpoint', 'validate', ['resnet.pth', 'not the weights of a Grid', 'conv1.0.weight']),
    ):
        line = refused(flag, tmp_path / 'resnet.pth', '--num-classes', '3', script=script)
        assert all(word in line for word in words), line


def test_weights_in_the_format_of_old_releases(call, images, tmp_path):
    """DeiT's own files were written before torch.save made zip archives."""
    model = timm.create_model('eva_deit_tiny', num_classes=3, **KWARGS)
    torch.save(dict(model=model.state_dict()), tmp_path / 'old.pth', _use_new_zipfile_serialization=False)
    code, _, err = call(
        'validate',
        *MODEL,
        '--num-classes',
        '3',
        '--checkpoint',
        tmp_path / 'old.pth',
        '--data-dir',
        images,
        '--workers',
        '0',
        '--device',
        'cpu',
    )
    assert code == 0, err


def test_a_loss_that_is_not_finite_stops_the_run(train, call, images, tmp_path):
    # The first epoch trains at a rate of 0 and is saved, the second at one that no weight survives.
    flags = ['--epochs', '3', '--warmup-epochs', '1', '--warmup-lr', '0', '--lr', '1e30', '--max-skipped', '4']
    place = ['--data-dir', images, '--output', tmp_path, '--experiment', 'nan']
    code, out, err = call('train', *MODEL, *QUICK, *place, *flags)
    line = only_line(err)
    assert code == 2 and all(
        word in line
        for word in ('update 4 of epoch 1', 'update 10 of the run', 'lr 7.5e+29', 'gradient norm nan', '4 in a row')
    ), line
    assert line.endswith('; try a lower --lr, --clip-grad 1'), line
    assert [f'{number} in a row' in out for number in (1, 2, 3, 4)] == [True, True, True, False]
    checkpoint = torch.load(tmp_path / 'nan' / 'last.pth.tar', weights_only=False)
    assert checkpoint['epoch'] == 0
    assert all(value.isfinite().all() for value in checkpoint['state_dict'].values())
    assert all(value.isfinite().all() for value in weights(tmp_path / 'nan' / 'last.safetensors').values())


@pytest.mark.parametrize('average', [[], ['--model-ema']], ids=['plain', 'ema'])
def test_weights_that_break_in_the_last_update_are_not_saved(average, call, images, tmp_path):
    # One update an epoch: no later loss shows what the update did.
    flags = ['-b', '24', '--epochs', '3', '--warmup-epochs', '1', '--warmup-lr', '0', '--lr', '1e30', *average]
    place = ['--data-dir', images, '--output', tmp_path, '--experiment', 'nan']
    code, _, err = call('train', *MODEL, *QUICK, *place, *flags)
    line = only_line(err)
    assert code == 2 and 'after epoch 1' in line and 'is saved; try a lower --lr, --clip-grad 1' in line, line
    for name in ('last', 'model_best'):
        assert torch.load(tmp_path / 'nan' / f'{name}.pth.tar', weights_only=False)['epoch'] == 0
        assert all(value.isfinite().all() for value in weights(tmp_path / 'nan' / f'{name}.safetensors').values())
    assert len((tmp_path / 'nan' / 'summary.csv').read_text().splitlines()) == 2  # heading and epoch 0


def test_a_loss_that_is_not_finite_stops_all_processes(images, tmp_path):
    place = ['--data-dir', images, '--output', tmp_path, '--experiment', 'nan']
    train = load_script('train').main
    done = together(train, *MODEL, *QUICK, *place, '-b', '2', '--lr', '1e30', '--max-skipped', '3')
    assert done.returncodes == [2, 2] and done.stderr.count('error: loss') == 1, done.stderr
    assert not (tmp_path / 'nan' / 'last.pth.tar').exists()


@pytest.mark.parametrize('flag', ['--initial-checkpoint', '--pretrained-path'])
def test_a_missing_file_is_one_line_in_all(flag, call, images, tmp_path):
    code, out, err = call('train', *MODEL, *QUICK, '--data-dir', images, '--output', tmp_path, flag, 'nowhere.pth')
    assert code == 2 and out == '' and 'nowhere.pth' in only_line(err)


@pytest.mark.parametrize(
    'text, words', [('apple\npear\napple\n', ['line 3', 'apple']), ('a\n\nb', ['line 2', 'empty'])]
)
def test_class_map_that_is_ambiguous(refused, tmp_path, text, words):
    (tmp_path / 'classes.txt').write_text(text)
    line = refused('--class-map', tmp_path / 'classes.txt')
    assert all(word in line for word in ['classes.txt', *words]), line


def test_class_map_with_a_mark_of_byte_order(train, tmp_path):
    """Programs of Windows begin a text with one. Of the streams timm would read the file by itself."""
    (tmp_path / 'classes.txt').write_text('plum\napple\npear\n', encoding='utf-8-sig')
    run = train('run', '--epochs', '1', '--class-map', tmp_path / 'classes.txt')
    saved = torch.load(run / 'last.pth.tar', weights_only=False)['args']
    assert saved.class_names == ['plum', 'apple', 'pear']
    assert read_class_map(str(tmp_path / 'classes.txt'), None) == dict(plum=0, apple=1, pear=2)


def test_resume_wants_all_of_its_own_run(train, refused):
    run = train('whole', '--epochs', '1')
    assert '--initial-checkpoint' in refused('--resume', run / 'last.safetensors')
    for other in ('sgd', 'lion'):
        line = refused('--resume', run / 'last.pth.tar', '--opt', other)
        assert 'adamw' in line and other in line and '--no-resume-opt' in line


def test_as_a_command(images):
    done = command('train', *MODEL, '--data-dir', images, '--epoch', '3')
    assert done.returncode == 2 and done.stdout == ''
    assert 'did you mean --epochs' in only_line(done.stderr)


VALIDATE = {
    'no model': ([], ['--model']),
    'no weights': (['--model', 'eva_deit_tiny'], ['--checkpoint']),
    'unknown flag': (['--pretrain'], ['--pretrain', '--pretrained']),
    'training flag': (['--epochs', '3'], ['--epochs']),
    'no such checkpoint': (['--checkpoint', 'nowhere.safetensors'], ['nowhere.safetensors']),
    'a log as the checkpoint': (['--checkpoint', 'train.log'], ['train.log: not a readable checkpoint']),
    'weights of an unknown model': (['--checkpoint', 'w.pth'], ['w.pth: does not say of which model', '--model']),
    'weights timm does not have': (['--model', 'eva_deit_tiny', '--pretrained'], ['eva_deit_tiny']),
    'results in an unknown form': (['--model', 'x', '--checkpoint', 'y.pth', '--results-file', 'r.txt'], ['.csv']),
}


@pytest.mark.parametrize('fault', VALIDATE)
def test_validate_refuses(fault, call, images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags, words = VALIDATE[fault]
    torch.save({}, tmp_path / 'y.pth')
    torch.save({'weight': torch.ones(1)}, tmp_path / 'w.pth')
    (tmp_path / 'train.log').write_text('2026-11-30 a line\n')
    code, _, err = call('validate', '--data-dir', images, '--device', 'cpu', *flags)
    assert code == 2 and all(word in only_line(err) for word in words), err
