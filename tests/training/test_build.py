"""The published recipe: numbers, global batch, learning rate over 300 epochs, augmentation, sampling."""

import argparse
import json
import logging
import math

import pytest
import timm
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from timm.data import create_dataset
from timm.models import save_for_hf
from torch import nn

from evavit import convert_vit, load_converted
from evavit.errors import UserError
from evavit.hub import save_folder
from evavit.models import write_weights
from evavit.training import build, checks, data
from evavit.training.config import parse_settings
from evavit.training.contents import complete_from_checkpoint
from evavit.training.data.augment import repair_posterize
from evavit.training.data.loader import SeededSampler
from evavit.training.sections import ModelConfig

PUBLISHED = dict(
    opt='adamw',
    opt_betas=[0.9, 0.999],
    opt_eps=1e-8,
    weight_decay=0.05,
    clip_grad=5.0,
    clip_mode='norm',
    epochs=300,
    sched='cosine',
    warmup_epochs=10,
    warmup_prefix=False,
    warmup_lr=1e-6,
    min_lr=1e-5,
    cooldown_epochs=0,
    global_batch_size=1024,
    aa='rand-m9-mstd0.5-inc1',
    train_interpolation='bicubic',
    interpolation='bicubic',
    mixup=0.8,
    cutmix=1.0,
    mixup_prob=1.0,
    mixup_switch_prob=0.5,
    mixup_mode='batch',
    smoothing=0.1,
    reprob=0.25,
    remode='pixel',
    recount=1,
    model_ema=False,
    crop_pct=0.875,
    num_classes=1000,
)
CONFIGS = dict(
    eva_deit_tiny=dict(drop_path=0.1, aug_repeats=0),
    eva_deit_small=dict(drop_path=0.1, aug_repeats=0),
    eva_deit_tiny_784=dict(drop_path=0.1, aug_repeats=0),
    eva_pvt_v2_b3=dict(drop_path=0.3, aug_repeats=3),
)


@pytest.fixture
def config(request):
    def config(name, *flags):
        settings, _ = parse_settings('train', ['-c', str(request.config.rootpath / 'configs' / f'{name}.yaml'), *flags])
        checks.check_settings(settings)
        return settings

    return config


def global_batch(settings, processes):
    return checks.global_batch(settings.batch, settings.schedule, processes)


@pytest.mark.parametrize('name', CONFIGS)
def test_published_numbers(config, name):
    settings = config(name)
    for key, value in {**PUBLISHED, **CONFIGS[name], 'model': name}.items():
        assert settings.flat()[key] == value, key


@pytest.mark.parametrize('processes, batch, steps', [(8, 128, 1), (4, 256, 1), (1, 256, 4), (16, 64, 1), (2, 64, 8)])
def test_global_batch_and_rate_for_any_number_of_processes(config, processes, batch, steps):
    batches = global_batch(config('eva_deit_tiny', '-b', str(batch), '--grad-accum-steps', str(steps)), processes)
    assert batches.total == 1024 and batches.lr == pytest.approx(1e-3)
    assert f'{batch} per process × {processes} processes × {steps} accumulated' in str(batches)


def test_wrong_global_batch_comes_with_a_remedy_that_works(config):
    for processes, batch in ((1, 128), (2, 96), (4, 1000), (8, 256)):
        with pytest.raises(UserError, match='-b ') as error:
            global_batch(config('eva_deit_tiny', '-b', str(batch)), processes)
        flags = str(error.value).split('; use ')[1].split(',')[0].split(';')[0].split()
        assert global_batch(config('eva_deit_tiny', *flags), processes).total == 1024
    for few, rest in (('eva_deit_tiny', ['--global-batch-size', '16']), ('finetune_small', [])):
        with pytest.raises(
            UserError, match='on few pictures lower it, to --global-batch-size 16, or take -c finetune_'
        ):
            global_batch(config('eva_deit_tiny', '-b', '16'), 1)
        assert global_batch(config(few, '-b', '16', *rest), 1).total == 16
    with pytest.raises(UserError, match='does not divide among 3 processes'):
        global_batch(config('eva_deit_tiny'), 3)


@pytest.mark.parametrize('scale, factor', [('linear', 0.25), ('sqrt', 0.5)])
def test_rate_follows_the_batch(config, scale, factor):
    settings = config('eva_deit_tiny', '-b', '256', '--global-batch-size', '256', '--lr-base-scale', scale)
    assert global_batch(settings, 1).lr == pytest.approx(1e-3 * factor)
    settings.schedule.lr = 0.02
    assert global_batch(settings, 1).lr == 0.02


@pytest.mark.parametrize('by_update', [False, True])
def test_rate_over_the_epochs(config, by_update):
    settings = config('eva_deit_tiny', *['--sched-on-updates'] * by_update)
    optimizer = build.build_optimizer(nn.Linear(3, 3), settings.optim, 1e-3)
    schedule, epochs = build.build_schedule(optimizer, settings.schedule, updates_per_epoch=20)
    assert epochs == 300  # warm-up inside, no cool-down

    def rate(epoch):
        schedule.step_update(epoch * 20)
        schedule.step(epoch)
        return optimizer.param_groups[0]['lr']

    def cosine(epoch):
        return 1e-5 + (1e-3 - 1e-5) * (1 + math.cos(math.pi * epoch / 300)) / 2

    assert rate(0) == pytest.approx(1e-6)
    assert rate(5) == pytest.approx(1e-6 + (1e-3 - 1e-6) / 2)
    assert rate(9) == pytest.approx(1e-6 + (1e-3 - 1e-6) * 9 / 10)
    assert rate(10) == pytest.approx(cosine(10)) and rate(10) == pytest.approx(9.973e-4, rel=1e-4)
    assert rate(150) == pytest.approx((1e-3 + 1e-5) / 2)
    assert rate(299) == pytest.approx(1.0027e-5, rel=1e-4)  # the last epoch that is trained
    assert rate(300) == pytest.approx(1e-5)


@pytest.mark.parametrize('name', ['eva_deit_tiny', 'eva_pvt_v2_b3'])
def test_no_decay_on_biases_norms_and_what_the_model_excludes(config, name):
    settings = config(name)
    model = build.build_model(settings.model, 10)
    optimizer = build.build_optimizer(model, settings.optim, 1e-3)
    decayed = {id(p) for group in optimizer.param_groups if group['weight_decay'] for p in group['params']}
    excluded = set(model.no_weight_decay())
    for key, parameter in model.named_parameters():
        assert (id(parameter) in decayed) == (parameter.ndim > 1 and key not in excluded), key
    assert {tuple(group['betas']) for group in optimizer.param_groups} == {(0.9, 0.999)}


def test_drop_path_reaches_the_model(config):
    model = build.build_model(config('eva_deit_tiny').model, 10)
    assert model.blocks[-1].drop_path1.drop_prob == pytest.approx(0.1)


def small_vit(name, side, **kwargs):
    model = timm.create_model(name, img_size=side, depth=1, embed_dim=64, num_heads=2, num_classes=3)
    return convert_vit(model, window_size=2, **kwargs) if kwargs else model


@pytest.mark.parametrize('name', ['vit_tiny_patch16_224', 'eva02_tiny_patch14_224'])
def test_weights_of_a_converted_model_come_to_another_image_size(name, tmp_path):
    small, large = (small_vit(name, 56 * side, partition_grid=2).eval() for side in (2, 4))
    write_weights(small.state_dict(), tmp_path / 'small.safetensors')
    build.load_weights(large, tmp_path / 'small.safetensors')
    for key, value in small.state_dict().items():
        if key == 'pos_embed':
            assert value.shape != large.pos_embed.shape
        else:
            assert torch.equal(value, large.state_dict()[key])
    assert large(torch.randn(1, 3, 224, 224)).shape == (1, 3)


def test_weights_of_a_converted_model_for_one_that_is_not(config, tmp_path):
    file = tmp_path / 'mine.safetensors'
    write_weights(small_vit('vit_tiny_patch16_224', 64, partition_grid=2).state_dict(), file)
    flags = ['--model', 'vit_tiny_patch16_224', '--img-size', '64']
    flags += ['--model-kwargs', 'depth=1', 'embed_dim=64', 'num_heads=2']
    for given, message in (
        ('--initial-checkpoint', r'is of a converted model \(it has blocks\.0\.attn\.summary_.*: add --convert'),
        ('--pretrained-path', r'is of a converted model: add --convert and its --convert-kwargs'),
    ):
        with pytest.raises(UserError, match=message) as caught:
            build.build_model(config('eva_deit_tiny', *flags, given, str(file)).model, 3)
        assert '\n' not in str(caught.value)


def run_file(folder, model, **settings):
    """A file as train.py writes it."""
    name = '-'.join(map(str, settings.values())) or 'plain'
    args = json.dumps(dict(model='vit_tiny_patch16_224', **settings))
    write_weights(model.state_dict(), folder / f'{name}.safetensors', dict(args=args))
    return folder / f'{name}.safetensors'


@pytest.mark.parametrize('options', [dict(attention='local'), dict(partition_grid=0)])
def test_a_conversion_without_parameters_is_known_by_the_settings_of_its_file(config, tmp_path, caplog, options):
    """Names do not tell: no line about weights from before, and no softmax model of them."""
    caplog.set_level(logging.INFO, 'evavit')
    converted = small_vit('vit_tiny_patch16_224', 64, **options)
    convert = options.pop('attention', 'eva')
    file = run_file(tmp_path, converted, convert=convert)
    before = run_file(tmp_path, small_vit('vit_tiny_patch16_224', 64))
    archive = tmp_path / 'last.pth.tar'
    args = argparse.Namespace(model='vit_tiny_patch16_224', convert=convert)
    torch.save(dict(state_dict=converted.state_dict(), args=args), archive)
    flags = ['--model', 'vit_tiny_patch16_224', '--img-size', '64']
    flags += ['--model-kwargs', 'depth=1', 'embed_dim=64', 'num_heads=2']
    own = ['--convert', convert, '--convert-kwargs', 'window_size=2', *(f'{k}={v}' for k, v in options.items())]
    for path, told in ((file, False), (archive, False), (before, True)):
        for way in ('--initial-checkpoint', '--pretrained-path'):
            if way == '--pretrained-path' and told:
                continue  # timm loads it
            caplog.clear()
            model = build.build_model(config('finetune_small', *flags, *own, way, str(path)).model, 3)
            assert ('from before the conversion' in caplog.text) == told
            assert told or torch.equal(model.head.weight, converted.head.weight)
    for path in (file, archive):
        for way in ('--initial-checkpoint', '--pretrained-path'):
            with pytest.raises(UserError, match='is of a converted model') as caught:
                build.build_model(config('finetune_small', *flags, way, str(path)).model, 3)
            assert '\n' not in str(caught.value) and 'kd-model-name' not in str(caught.value)
    caplog.clear()
    cells = ['--convert', 'eva', '--convert-kwargs', 'window_size=2', '--initial-checkpoint', str(file)]
    build.build_model(config('finetune_small', *flags, *cells).model, 3)
    assert f'weights of a conversion to {convert}, to which this one adds its own' in caplog.text


def test_bias_tables_that_a_converted_file_lacks_start_at_zero(config, tmp_path, caplog):
    caplog.set_level(logging.INFO, 'evavit')
    converted = small_vit('vit_tiny_patch16_224', 64, partition_grid=2)
    file = run_file(tmp_path, converted, convert='eva')
    flags = ['--model', 'vit_tiny_patch16_224', '--img-size', '64', '--convert', 'eva']
    flags += ['--model-kwargs', 'depth=1', 'embed_dim=64', 'num_heads=2']
    options = ['--convert-kwargs', 'window_size=3', 'partition_grid=2', 'rel_pos_bias=true']
    model = build.build_model(config('finetune_small', *flags, *options, '--pretrained-path', str(file)).model, 3)
    assert 'has no tables of relative position biases; they start at 0' in caplog.text
    assert not model.blocks[0].attn.rel_pos.relative_position_bias_table.any()
    own = model.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in converted.state_dict().items())
    for name in ('model', 'inplace', 'attention'):
        settings = config('finetune_small', *flags, *options, '--pretrained-path', str(file)).model
        settings.convert_kwargs[name] = 1
        with pytest.raises(UserError, match=f'convert_kwargs: leave {name} out'):
            build.build_model(settings, 3)


def test_a_conversion_of_ones_own_for_a_converted_folder(config, tmp_path):
    """--model local-dir:FOLDER --convert: what is given goes before what config.json says, which fills in the rest."""
    parent = small_vit('vit_tiny_patch16_224', 64, partition_grid=2)
    folder = save_folder(parent, tmp_path / 'mine', data='x', licence='mit')
    flags = ['--model', f'local-dir:{folder}', '--pretrained', '--convert']
    settings = config('finetune_small', *flags, 'eva', '--convert-kwargs', 'window_size=3').model
    model = build.build_model(settings, 3)
    assert model.conversion == {**parent.conversion, 'window_size': 3}
    assert torch.equal(model.blocks[0].attn.summary_k.proj.weight, parent.blocks[0].attn.summary_k.proj.weight)
    with pytest.raises(
        UserError, match=r'does not fit the model: it has, .*summary_.* check .*--convert-kwargs'
    ) as caught:
        build.build_model(config('finetune_small', *flags, 'local').model, 3)
    assert '\n' not in str(caught.value)
    parsed, given = parse_settings(
        'inference', ['--model', f'local-dir:{folder}', '--convert', 'eva', '--data-dir', 'x']
    )
    complete_from_checkpoint(parsed, given)
    assert parsed.model.convert_kwargs == {k: v for k, v in parent.conversion.items() if k != 'attention'}


@pytest.mark.parametrize('convert, converted', [(False, False), (True, False), (True, True)])
def test_both_classifiers_of_a_distilled_deit(config, tmp_path, convert, converted):
    """Of the same classes they are kept, by every flag; of others they are made anew, or refused in a line."""
    name, sizes = 'deit_tiny_distilled_patch16_224', dict(img_size=64, depth=1, embed_dim=64, num_heads=2)
    parent = timm.create_model(name, num_classes=3, **sizes)
    if converted:
        parent = convert_vit(parent, window_size=2, partition_grid=2)
    file = tmp_path / 'mine.safetensors'
    write_weights(parent.state_dict(), file)
    flags = ['--model', name, '--model-kwargs', *(f'{key}={value}' for key, value in sizes.items())]
    if convert:
        flags += ['--convert', 'eva', '--convert-kwargs', 'window_size=2', 'partition_grid=2']
    for way in ('--pretrained-path', '--initial-checkpoint'):
        kept = build.build_model(config('finetune_small', *flags, way, str(file)).model, 3)
        for key, value in parent.state_dict().items():
            assert torch.equal(kept.state_dict()[key], value), key
    other = build.build_model(config('finetune_small', *flags, '--pretrained-path', str(file)).model, 5)
    assert [head.out_features for head in other.get_classifier()] == [5, 5]
    assert torch.equal(other.dist_token, parent.dist_token)
    with pytest.raises(UserError, match='has 3 classes, the model or data set has 5'):
        build.build_model(config('finetune_small', *flags, '--initial-checkpoint', str(file)).model, 5)
    assert build.head_classes(name, parent.state_dict()) == 3
    del parent.head_dist
    assert build.head_classes(name, parent.state_dict()) is None


def test_a_folder_with_a_converted_network_as_the_model(config, tmp_path):
    """--model local-dir:FOLDER --pretrained: converted as it was, a new head for other classes, another size; the
    settings name its parts, so that a checkpoint of the run needs no folder."""
    parent = small_vit('vit_tiny_patch16_224', 64, partition_grid=2)
    folder = save_folder(parent, tmp_path / 'mine', data='x', licence='mit', data_config=dict(mean=(0.1, 0.2, 0.3)))
    for flags, classes in (([], 3), (['--img-size', '128'], 5)):
        flags += ['--model', f'local-dir:{folder}', '--pretrained']
        settings = config('finetune_small', *flags).model
        model = build.build_model(settings, classes)
        assert model.conversion == parent.conversion and model.num_classes == classes
        assert torch.equal(model.blocks[0].attn.qkv.weight, parent.blocks[0].attn.qkv.weight)
        assert torch.equal(model.head.weight, parent.head.weight) == (classes == 3)
        assert (settings.model, settings.convert, settings.pretrained) == ('vit_tiny_patch16_224', 'eva', False)
        assert settings.mean == [0.1, 0.2, 0.3] and settings.convert_kwargs['partition_grid'] == 2
        again = build.build_model(settings, classes)  # as `-c args.yaml` does
        assert again.state_dict().keys() == model.state_dict().keys()
        assert model.patch_embed.img_size == again.patch_embed.img_size == ((64, 64) if classes == 3 else (128, 128))


def test_mixed_targets_carry_the_smoothing(config):
    settings = config('eva_deit_tiny')
    mixup = build.build_mixup(settings.loss, 10)
    images, targets = mixup(torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 3]))
    assert images.shape == (4, 3, 8, 8) and targets.shape == (4, 10)
    torch.testing.assert_close(targets.sum(1), torch.ones(4))
    assert targets.min() == pytest.approx(0.01)
    with pytest.raises(UserError, match='two classes'):
        build.build_mixup(settings.loss, 1)


@pytest.fixture
def group_of_one():
    from evavit.training.distributed import start_process

    yield start_process('cpu')
    torch.distributed.destroy_process_group()


def write_images(root, count):
    from PIL import Image

    for index in range(count):
        folder = root / 'train' / str(index % 2)
        folder.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (8, 8), (index, 0, 0)).save(folder / f'{index}.png')


def loader_of(config, root, group_of_one, *flags):
    settings = config('eva_pvt_v2_b3', '-b', '4', '--workers', '0', *flags)
    dataset = create_dataset('', str(root / 'train'), search_split=False)
    input_config = dict(input_size=(3, 8, 8), interpolation='bicubic', mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=0.875)
    machine, seed = settings.machine, settings.run.seed
    loader = data.train_loader(
        dataset, settings.augment, input_config, batch_size=4, machine=machine, seed=seed, process=group_of_one
    )
    return settings, loader


def epoch_batches(loader, settings, process, epoch, first=0):
    return data.epoch_batches(loader, settings.batch, seed=settings.run.seed, process=process, epoch=epoch, first=first)


def test_repeated_augmentation_shows_each_image_three_times(config, tmp_path, group_of_one):
    write_images(tmp_path, 12)
    settings, loader = loader_of(config, tmp_path, group_of_one)
    epoch_batches(loader, settings, group_of_one, 0)
    order = list(loader.sampler)
    assert len(order) == 12 and all(order.count(index) == 3 for index in set(order))


def test_order_depends_on_seed_and_epoch_alone(config, tmp_path, group_of_one):
    write_images(tmp_path, 12)
    settings, loader = loader_of(config, tmp_path, group_of_one, '--aug-repeats', '0')

    def order(epoch, seed):
        settings.run.seed = seed
        epoch_batches(loader, settings, group_of_one, epoch)
        torch.rand(3)
        return list(loader.sampler)

    assert order(0, 0) == order(0, 0) and sorted(order(0, 0)) == list(range(12))
    assert order(0, 0) != order(1, 0) and order(0, 0) != order(0, 1)


@pytest.mark.parametrize('workers', ['0', '2'])
def test_an_epoch_goes_on_at_any_batch(config, tmp_path, group_of_one, workers):
    write_images(tmp_path, 24)
    flags = ['--scale', '0.2', '1', '--reprob', '1', '--workers', workers]
    settings, loader = loader_of(config, tmp_path, group_of_one, *flags)
    whole = [images.clone() for images, _ in epoch_batches(loader, settings, group_of_one, 3)]
    torch.rand(5)
    rest = [images.clone() for images, _ in epoch_batches(loader, settings, group_of_one, 3, first=2)]
    assert len(whole) == 6 and len(rest) == 4
    assert all(torch.equal(a, b) for a, b in zip(whole[2:], rest, strict=True))
    assert len({image.sum().item() for images in whole for image in images}) == 24  # no two draws alike


def test_augmentation_does_not_depend_on_the_number_of_processes(config, tmp_path, group_of_one):
    """Erasing is drawn for a batch, so it is off."""
    write_images(tmp_path, 24)
    flags = ['--scale', '0.2', '1', '--reprob', '0']
    settings, loader = loader_of(config, tmp_path, group_of_one, *flags)
    whole = torch.cat([images for images, _ in epoch_batches(loader, settings, group_of_one, 1)])
    order = list(loader.sampler)
    for rank in range(2):
        draws = SeededSampler(order[rank::2], settings.run.seed, rank, 2)
        draws.epoch = 1
        share = torch.stack([loader.dataset[draw][0] for draw in draws])
        assert torch.equal((share.float() - 127.5) / 127.5, whole[rank::2])


@pytest.mark.parametrize('interval', ['0', 'm', '10s', '1.5', '-3', '0m'])
def test_checkpoint_interval_of_another_form(config, interval):
    with pytest.raises(UserError, match='checkpoint_interval'):
        config('eva_deit_tiny', f'--checkpoint-interval={interval}')


def test_no_bits_to_keep_is_black():
    """RandAugment at magnitude 9 with deviation 0.5 draws the strongest posterization for one image in about 1,000."""
    from PIL import Image
    from timm.data.auto_augment import NAME_TO_OP, AugmentOp, RandAugment
    from torchvision.transforms import Compose

    def extrema(magnitude):
        op = AugmentOp('PosterizeIncreasing', prob=1.0, magnitude=magnitude, hparams=dict(img_mean=(0, 0, 0)))
        repair_posterize(Compose([RandAugment([op])]))
        return op(Image.new('RGB', (4, 4), (255, 9, 40))).getextrema()

    assert extrema(10) == ((0, 0),) * 3
    assert extrema(5)[0][0] > 0
    assert NAME_TO_OP['PosterizeIncreasing'].__module__.startswith('timm.')  # timm's own table is as it was


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    'name, kwargs',
    [
        ('eva_deit_tiny', dict(depth=10**9)),
        ('eva_deit_tiny', dict(depth=float('inf'))),
        ('resnet18', dict(layers=[1, float('nan'), 10**8, 1])),
        ('resnet18', dict(layers=[1] * 10**4)),
        ('mixer_s16_224', dict(num_blocks=10**8)),
        ('crossvit_tiny_240', dict(depth=[[1, 1, 0], [1, 10**8, 0], [1, 4, 0]])),
        ('densenet121', dict(block_config=(10**8, 1, 1, 1))),
        ('resnet50', dict(block_args=dict(num_scales=10**8))),
    ],
)
def test_more_blocks_than_can_be_built_are_a_line(name, kwargs):
    with pytest.raises(UserError, match=f'model_kwargs: {next(iter(kwargs))} asks for .*more than 1,000; lower it'):
        build.build_model(ModelConfig(model=name, model_kwargs=kwargs), 3)


@pytest.mark.parametrize('device', [None, 'meta'])  # the second in a dry run
def test_a_folder_without_the_weights_that_are_asked_for(tmp_path, device):
    save_for_hf(timm.create_model('resnet18', num_classes=3), str(tmp_path))
    for path in tmp_path.iterdir():
        if path.name != 'config.json':
            path.unlink()
    config = ModelConfig(model=f'local-dir:{tmp_path}', pretrained=True)
    with pytest.raises(UserError, match=f'--pretrained: {tmp_path} has no weights; leave it out'):
        build.build_model(config, 3, device)


@pytest.mark.timeout(60)
def test_a_folder_asks_for_no_more_blocks_than_can_be_built(tmp_path):
    arguments = dict(layers=[10**8, 1, 1, 1])
    save_for_hf(timm.create_model('resnet18', num_classes=3), str(tmp_path / 'model'), model_args=arguments)
    with pytest.raises(UserError, match='makes no model: layers asks for 100000000, more than'):
        build.build_model(ModelConfig(model=f'local-dir:{tmp_path / "model"}'), 3)


def test_a_hub_that_is_away_names_the_flags_that_take_a_file(monkeypatch):
    def away(*_, **__):
        raise LocalEntryNotFoundError('no connection')

    monkeypatch.setattr('timm.create_model', away)
    for flags, about in (([], ''), (['--model-kwargs', 'depth=2'], ' with depth=2')):
        settings, _ = parse_settings('train', ['--model', 'vit_tiny_patch16_224', '--pretrained', *flags])
        with pytest.raises(UserError) as error:
            build.build_model(settings.model, 3)
        assert str(error.value).startswith(f'model vit_tiny_patch16_224{about}: the Hugging Face Hub cannot be reached')
        assert '--pretrained-path FILE in train.py, --checkpoint FILE in the other programs' in str(error.value)


@pytest.mark.parametrize('given', [{}, dict(img_size=96), dict(in_chans=1)])
def test_a_run_from_a_folder_takes_its_size_of_images(tmp_path, given):
    """Also that of a model of any size, which its arguments do not say."""
    kwargs = dict(depths=(1, 1, 1, 1), embed_dims=(16, 16, 16, 16), num_heads=(1, 1, 1, 1))
    model = timm.create_model('eva_pvt_v2_b3', num_classes=2, **kwargs)
    folder = save_folder(model, tmp_path / 'mine', data='x', licence='mit', data_config=dict(input_size=(3, 64, 64)))
    config = ModelConfig(model=f'local-dir:{folder}', pretrained=True, **given)
    build.name_converted(config, softmax_too=True)
    assert config.model == 'eva_pvt_v2_b3' and config.pretrained_path == str(folder / 'model.safetensors')
    assert data.resolve_input(config, build.build_model(config, 2))['input_size'] == (
        given.get('in_chans', 3),
        *[given.get('img_size', 64)] * 2,
    )


@pytest.mark.parametrize('name', ['eva_deit_tiny', 'vit_tiny_patch16_224'])
def test_one_of_several_files_is_not_taken_for_the_weights(tmp_path, name):
    """As transformers writes large ones: what lies in the others would begin at random."""
    model = timm.create_model(name, img_size=32, patch_size=8, embed_dim=12, depth=1, num_heads=2, num_classes=2)
    folder = save_folder(model, tmp_path / 'mine', data='x', licence='mit')
    (folder / 'model.safetensors').unlink()
    body, head = (folder / f'model-0000{number}-of-00002.safetensors' for number in (1, 2))
    state = model.state_dict()
    write_weights({key: value for key, value in state.items() if not key.startswith('head.')}, body)
    write_weights({key: value for key, value in state.items() if key.startswith('head.')}, head)
    told = r'00001-of-00002\.safetensors: one of 2 files that are the weights together; save them as one'
    for about in (
        dict(model=f'local-dir:{folder}', pretrained=True),
        dict(model=name, model_kwargs=dict(img_size=32), pretrained_path=str(body)),
    ):
        config = ModelConfig(**about)
        with pytest.raises(UserError, match=told):
            build.build_model(ModelConfig(**about), 2)  # as validate.py
        with pytest.raises(UserError, match=told):
            build.name_converted(config, softmax_too=True)  # as train.py
            build.build_model(config, 2)
    write_weights(state, whole := tmp_path / 'model-00001-of-00001.safetensors')
    assert build.read_weights(whole).keys() == state.keys()


@pytest.mark.parametrize('source', ['local-dir', 'hf-hub'])
@pytest.mark.parametrize('convert', [None, 'eva', 'ours'])
@pytest.mark.parametrize('classes', [2, 3])
def test_images_are_prepared_as_a_folder_says(tmp_path, monkeypatch, source, convert, classes):
    """By the run that starts from it, and by whoever reads that run's file, which needs neither it nor the Hub."""
    name = 'eva_deit_tiny' if convert == 'ours' else 'vit_tiny_patch16_224'
    model = timm.create_model(name, img_size=32, patch_size=8, embed_dim=12, depth=1, num_heads=2, num_classes=2)
    model = convert_vit(model, window_size=2, partition_grid=0) if convert == 'eva' else model
    about = dict(mean=(0.1, 0.2, 0.3), std=(0.3, 0.2, 0.1), interpolation='nearest', crop_pct=0.7, crop_mode='squash')
    folder = save_folder(model, tmp_path / 'mine', data='x', licence='mit', data_config=about)
    monkeypatch.setattr('evavit.hub.download_from_hf', lambda name, file: str(folder / file))
    config = ModelConfig(model=f'local-dir:{folder}' if source == 'local-dir' else 'hf-hub:me/mine', pretrained=True)
    build.name_converted(config, softmax_too=True)
    assert config.model == name and config.pretrained_path == str(folder / 'model.safetensors')
    made = build.build_model(config, classes)
    write_weights(made.state_dict(), run := tmp_path / 'run.safetensors', dict(args=json.dumps(vars(config))))
    validated, given = parse_settings('validate', ['--checkpoint', str(run), '--num-classes', str(classes)])
    complete_from_checkpoint(validated, given)
    for settings in (config, validated.model):
        found = data.resolve_input(settings, made)
        assert {key: tuple(value) if isinstance(value, list) else value for key, value in found.items()} == {
            **about,
            'input_size': (3, 32, 32),
        }


@pytest.mark.parametrize('way', ['pretrained_path', 'initial_checkpoint'])
@pytest.mark.parametrize('convert', [None, 'eva', 'ours'])
def test_a_start_from_a_file_prepares_images_as_its_run(tmp_path, convert, way):
    name, flags = 'eva_deit_tiny' if convert == 'ours' else 'vit_tiny_patch16_224', dict(crop_pct=0.5)
    kwargs = dict(img_size=32, patch_size=8, embed_dim=12, depth=1, num_heads=2)
    settings = dict(model=name, model_kwargs=kwargs, convert=None if convert == 'ours' else convert)
    made = build.build_model(ModelConfig(**settings), 2)
    about = dict(mean=[0.1, 0.2, 0.3], std=[0.3, 0.2, 0.1], crop_pct=0.7, crop_mode='squash')
    write_weights(
        made.state_dict(), path := tmp_path / 'last.safetensors', dict(args=json.dumps({**settings, **about}))
    )
    config = ModelConfig(**settings, **flags, **{way: str(path)})
    found = data.resolve_input(config, build.build_model(config, 2))
    assert {key: found[key] for key in ('mean', 'crop_pct', 'crop_mode')} == dict(
        mean=(0.1, 0.2, 0.3), crop_pct=0.5, crop_mode='squash'
    )
    assert config.mean == about['mean']  # which its checkpoints say then


@pytest.mark.parametrize(
    ('transformers', 'options'),
    [(False, {}), (True, {}), (True, dict(partition_grid=0)), (True, dict(attention='local'))],
    ids=str,
)
def test_a_conversion_that_another_program_saved_anew_is_a_line(tmp_path, transformers, options):
    """Such as transformers, which makes the model with softmax, leaves the summaries out and says its version."""
    converted = convert_vit(small_vit('vit_tiny_patch16_224', 64), window_size=2, **options)
    folder = save_folder(converted, tmp_path / 'mine', data='x', licence='mit')
    load_converted(folder)  # as we wrote it, whether it has summaries or not
    if transformers:
        content = json.loads((folder / 'config.json').read_text())
        (folder / 'config.json').write_text(json.dumps({**content, 'transformers_version': '5.24.0'}))
    if not options:
        load_converted(folder)  # whoever wrote it, its summaries are there
    softmax = {name: value for name, value in converted.state_dict().items() if '.attn.summary_' not in name}
    write_weights(softmax, file := folder / 'model.safetensors')
    config, given = parse_settings('validate', ['--checkpoint', str(folder)])
    complete_from_checkpoint(config, given)
    model = build.build_model(config.model, config.model.num_classes, new_head=False)
    line = f"it was converted to '{options.get('attention', 'eva')}', .* saved it anew, with softmax; give"
    with pytest.raises(UserError, match=line):
        build.load_weights(model, config.weights.checkpoint)
    with pytest.raises(RuntimeError, match=line):
        load_converted(folder)
    start = ModelConfig(model='vit_tiny_patch16_224', pretrained_path=str(file))
    with pytest.raises(UserError, match=line):
        build.build_model(start, 2)


@pytest.mark.parametrize('convert', [None, 'eva', 'ours'])
@pytest.mark.parametrize('size', [(48, 16), (24, 24), (16, 16)], ids=str)  # the last has as many patches as before
def test_positions_of_images_that_are_no_square(tmp_path, caplog, convert, size):
    """They come to another size as the model's own `set_input_size` brings them there."""
    name = 'eva_deit_tiny' if convert == 'ours' else 'vit_tiny_patch16_224'
    convert = None if convert == 'ours' else convert
    kwargs = dict(patch_size=4, embed_dim=12, depth=1, num_heads=2)

    def config(height, width):
        return ModelConfig(model=name, input_size=(3, height, width), convert=convert, model_kwargs=kwargs)

    trained = build.build_model(config(32, 8), 2)
    settings = dict(model=name, input_size=[3, 32, 8], model_kwargs=kwargs, convert=convert)
    path = tmp_path / 'last.safetensors'
    write_weights(trained.state_dict(), path, dict(args=json.dumps(settings)))
    trained.set_input_size(size)
    expected = trained.state_dict()
    model = build.build_model(config(*size), 2)
    with caplog.at_level('WARNING'):
        build.load_weights(model, path)
    assert 'positions resampled from 8×2 patches to ' in caplog.text
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
    started = config(*size)
    started.pretrained_path = str(path)
    started = build.build_model(started, 3).state_dict()
    assert torch.equal(started['pos_embed'], expected['pos_embed']) and started['head.weight'].shape[0] == 3


@pytest.mark.parametrize(
    'architecture, words', [('hf-hub:evil/x', 'is no name of a model'), ('vit_of_2040', 'timm does')]
)
@pytest.mark.parametrize('convert', [None, 'eva'])
def test_the_config_of_a_folder_names_a_model_of_timm(monkeypatch, tmp_path, architecture, words, convert):
    """Another source in it would be asked, over the network or in a folder that nobody named."""
    vit = timm.create_model('vit_tiny_patch16_224', img_size=32, depth=1, embed_dim=24, num_heads=1)
    save_folder(convert_vit(vit, window_size=2, partition_grid=0), tmp_path / 'mine', data='x', licence='mit')
    config = json.loads((tmp_path / 'mine' / 'config.json').read_text())
    (tmp_path / 'mine' / 'config.json').write_text(json.dumps({**config, 'architecture': architecture}))
    monkeypatch.setattr(timm, 'create_model', lambda *args, **kwargs: pytest.fail('a model is made'))
    with pytest.raises(UserError, match=words):
        build.build_model(ModelConfig(model=f'local-dir:{tmp_path / "mine"}', convert=convert), 3)


@pytest.mark.parametrize('name', ['pretrained_cfg', 'pretrained_cfg_overlay', 'pretrained_strict', 'cache_dir'])
def test_where_weights_are_is_no_argument_of_a_model(name):
    with pytest.raises(UserError, match=f'^model_kwargs: {name} has an option of its own'):
        build.build_model(ModelConfig(model='eva_deit_tiny', model_kwargs={name: {}}), 3)


@pytest.mark.parametrize('lacks', ['blocks.1.', 'mlp', 'prefix', 'pos_embed', 'cls_token', 'norm.', ''])
@pytest.mark.parametrize('classes', [5, 0])
def test_a_start_from_a_file_that_lacks_the_body_is_a_line(tmp_path, caplog, lacks, classes):
    """With other classes timm takes what it finds, and leaves the rest random without a word that is seen."""
    small = dict(img_size=32, patch_size=8, depth=2, embed_dim=24, num_heads=1)
    torch.manual_seed(0)
    state = timm.create_model('vit_tiny_patch16_224', num_classes=classes, **small).state_dict()
    if lacks == 'prefix':
        state = {f'encoder.{name}': value for name, value in state.items()}
    else:
        state = {name: value for name, value in state.items() if not lacks or lacks not in name}
    torch.save(state, tmp_path / 'file.pth')
    config = ModelConfig(model='vit_tiny_patch16_224', model_kwargs=small, pretrained_path=str(tmp_path / 'file.pth'))
    if lacks in ('', 'norm.'):
        model = build.build_model(config, 3)
        torch.testing.assert_close(model.state_dict()['blocks.0.mlp.fc1.weight'], state['blocks.0.mlp.fc1.weight'])
        assert ('file.pth lacks norm.weight and 1 more: they begin anew' in caplog.text) == (lacks == 'norm.')
    else:
        with pytest.raises(UserError, match=r'file\.pth does not fit the model: it lacks .*; check --model'):
            build.build_model(config, 3)


def test_a_pooling_that_a_file_lacks_begins_anew_where_it_is_trained(tmp_path, caplog):
    small = dict(img_size=32, patch_size=8, depth=1, embed_dim=24, num_heads=2)
    torch.save(timm.create_model('vit_base_patch16_siglip_gap_224', **small).state_dict(), file := tmp_path / 'gap.pth')
    about = dict(model='vit_base_patch16_siglip_224', model_kwargs=small, pretrained_path=str(file))
    build.build_model(ModelConfig(**about), 3)
    assert f'warning: {file} lacks attn_pool.' in caplog.text and 'they begin anew' in caplog.text
    for config, new_head in ((ModelConfig(**about, linear_probe=True), True), (ModelConfig(**about), False)):
        with pytest.raises(UserError, match=r'gap\.pth does not fit the model: it lacks attn_pool\.'):
            build.build_model(config, 3, new_head=new_head)


def test_a_converted_network_of_another_program_keeps_its_summaries(tmp_path):
    """Its settings are not train.py's: they do not say that nothing was converted."""
    small = dict(img_size=32, patch_size=8, depth=1, embed_dim=24, num_heads=1)
    vit = timm.create_model('vit_tiny_patch16_224', num_classes=5, **small)
    state = convert_vit(vit, window_size=2, partition_grid=2).state_dict()
    state = {name: value + 0.1 for name, value in state.items()}
    args = argparse.Namespace(model='vit_tiny_patch16_224', input_size=32, lr=1e-3)
    torch.save(dict(model=state, epoch=1, args=args), tmp_path / 'mine.pth')
    config = ModelConfig(model='vit_tiny_patch16_224', model_kwargs=small, pretrained_path=str(tmp_path / 'mine.pth'))
    config.convert, config.convert_kwargs = 'eva', dict(window_size=2, partition_grid=2)
    made = build.build_model(config, 3).state_dict()
    names = [name for name in state if '.summary_' in name]
    assert len(names) == 8 and all(torch.equal(made[name], state[name]) for name in names)
