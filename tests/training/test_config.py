"""Flags over YAML over defaults; every option survives the way to a file and back."""

import os
import re
import subprocess
import sys

import pytest
import yaml
from runs import ROOT

import evavit
from evavit.arguments import asks_for_help
from evavit.errors import UserError
from evavit.training.config import OPTIONS, options_of, parse_settings, recipes


def settings_of(*argv, script='train'):
    """{name: value}, without the sections."""
    return parse_settings(script, list(argv))[0].flat()


@pytest.fixture
def config(tmp_path):
    def config(text):
        path = tmp_path / 'config.yaml'
        path.write_text(text)
        return str(path)

    return config


def test_flags_win_over_yaml_and_yaml_over_defaults(config):
    path = config('epochs: 7\nlr: 0.5\namp: true\nno_aug: true\n')
    settings, given = parse_settings('train', ['-c', path, '--lr', '0.25', '--no-amp', '--aug'])
    assert (settings.schedule.epochs, settings.schedule.lr) == (7, 0.25)
    assert (settings.machine.amp, settings.augment.no_aug) == (False, False)
    assert settings.batch.batch_size == options_of('train')['batch_size'].default
    assert given == {'epochs', 'lr', 'amp', 'no_aug'}


def test_model_kwargs_join_key_by_key(config):
    path = config('model_kwargs: {window_size: 7, depth: 3}\n')
    settings = settings_of('-c', path, '--model-kwargs', 'depth=4', 'act_layer=gelu', 'qkv_bias=false')
    assert settings['model_kwargs'] == dict(window_size=7, depth=4, act_layer='gelu', qkv_bias=False)


def test_a_number_without_a_point_is_one_for_the_model(config):
    """As a flag gives it; YAML 1.1 reads a text. A run may be called so."""
    settings = settings_of('-c', config('experiment: 1e5\nmodel_kwargs: {init_values: 1e-5, act_layer: gelu}\n'))
    assert settings['model_kwargs'] == dict(init_values=1e-5, act_layer='gelu') and settings['experiment'] == '1e5'


def test_yaml_takes_what_flags_take(config):
    # YAML 1.1 reads 3e-4 as text
    text = "lr: 3e-4\nepochs: '10'\nmean: ['0.5', 1, 0.25]\nlr_base: 1\nmodel: resnet18\n"
    settings = settings_of('-c', config(text))
    assert settings['lr'] == 3e-4 and settings['epochs'] == 10 and settings['mean'] == [0.5, 1.0, 0.25]
    assert isinstance(settings['lr_base'], float)


@pytest.mark.parametrize('text', ['1e5', '08', '010', '1:30', '0x10', '2_4', '1.50', '.inf', 'yes', 'null', '２４'])
def test_a_name_that_looks_like_a_number_stays_a_name(text, tmp_path):
    settings, _ = parse_settings('train', ['--experiment', text])
    settings.save(tmp_path / 'args.yaml')
    assert settings_of('-c', str(tmp_path / 'args.yaml'))['experiment'] == text


@pytest.mark.parametrize(
    'line', ['experiment: 1.10', 'output: .5', 'experiment: 2026-12-01', 'experiment: no', 'wandb_tags: [a, 1.10]']
)
def test_a_text_that_yaml_reads_as_something_else_wants_quotes(line, config):
    """1.10 would be the folder of the experiment 1.1."""
    name, _, text = line.partition(': ')
    with pytest.raises(UserError, match=f'does not fit {name}, which takes .*; put a text .* in quotes'):
        settings_of('-c', config(line))
    quoted = text.replace('1.10', "'1.10'") if text.startswith('[') else f"'{text}'"
    assert settings_of('-c', config(f'{name}: {quoted}'))[name] == (['a', '1.10'] if text.startswith('[') else text)


@pytest.mark.parametrize('text', ['２４', '2_4', ' 24', '24 ', '1:30', '0x18', '0b1', '1e3', '9' * 30])
def test_numbers_are_plain_digits(text, config):
    for flags in (['--epochs', text], ['-c', config(f'epochs: "{text}"')]):
        with pytest.raises(UserError, match='does not fit epochs'):
            settings_of(*flags)
    assert settings_of('--epochs', '024')['epochs'] == 24 and settings_of('-c', config('epochs: 024'))['epochs'] == 24


def test_aliases_are_read_and_bounded(config):
    path = config('epochs: &n 3\nwarmup_epochs: *n\nmodel_kwargs: {a: &a {b: 1}, c: {<<: *a}}\n')
    settings = settings_of('-c', path)
    assert settings['warmup_epochs'] == 3 and settings['model_kwargs']['c'] == dict(b=1)
    with pytest.raises(UserError, match='aliases repeat more than 10,000 values'):
        settings_of('-c', config(f'model_kwargs: {{a: &a [{"1, " * 100}], b: [{"*a, " * 100}]}}'))


def test_a_tag_that_its_value_does_not_fit(config):
    with pytest.raises(UserError, match='cannot be read as YAML'):
        settings_of('-c', config('lr: !!bool foo'))


@pytest.mark.timeout(30)
def test_a_file_of_settings_is_a_small_file(tmp_path):
    os.mkfifo(tmp_path / 'pipe.yaml')
    (tmp_path / 'link.yaml').symlink_to(tmp_path / 'pipe.yaml')
    (tmp_path / 'large.yaml').write_text('epochs: 3' + '\n' * 2**20)
    (tmp_path / 'folder.yaml').mkdir()
    told = dict(
        pipe='not a regular file', link='not a regular file', large='more than 1,048,576 bytes', folder='folder'
    )
    if os.path.exists('/proc/kmsg'):  # the kernel's log, which has no end, and of the kernel's files one that has
        (tmp_path / 'kmsg.yaml').symlink_to('/proc/kmsg')
        (tmp_path / 'mounts.yaml').symlink_to('/proc/self/mounts')
        told |= dict(kmsg='not a regular file', mounts='not a regular file')
    for name, words in told.items():
        with pytest.raises(UserError, match=words) as error:
            settings_of('-c', str(tmp_path / f'{name}.yaml'))
        assert '\n' not in str(error.value) and name in str(error.value)


def sample(option):
    if option.choices:
        value = option.choices[-1]
    else:
        value = {
            bool: not option.default,
            int: max(3, int(option.low or 0)),
            float: 0.5,
            str: 'text',
            dict: dict(depth=2),
        }[option.type]
    return value if option.count is None else [value] * (2 if option.count == '+' else option.count)


@pytest.mark.parametrize('script', ['train', 'validate', 'export'])
def test_every_option_survives_flag_and_file(script, tmp_path):
    for name, option in options_of(script).items():
        value = sample(option)
        if option.type is bool:
            flags = [option.flag if value else '--no-' + option.flag[2:]]
        elif option.type is dict:
            flags = [option.flag, 'depth=2']
        else:
            flags = [option.flag, *map(str, value if isinstance(value, list) else [value])]
        settings, _ = parse_settings(script, flags)
        assert settings.flat()[name] == value == getattr(getattr(settings, option.section), name)
        settings.save(tmp_path / 'args.yaml', ['a remark'])
        assert settings_of('-c', str(tmp_path / 'args.yaml'), script=script) == settings.flat()


def test_a_second_file_of_settings_is_refused():
    with pytest.raises(UserError, match=r"-c 'eva_deit_tiny', -c 'quickstart': takes one file; put the settings of"):
        parse_settings('validate', ['-c', 'eva_deit_tiny', '--config', 'quickstart'])


def test_a_key_given_twice_is_refused():
    """In one flag: a second flag wins over the first, as elsewhere."""
    for flag in ('--model-kwargs', '--convert-kwargs', '--kd-model-kwargs'):
        with pytest.raises(UserError, match=f"{flag}: key 'depth' is given twice"):
            settings_of(flag, 'depth=2', 'heads=1', 'depth=3')
        values = settings_of(flag, 'depth=2', 'heads=1', flag, 'depth=3')[flag[2:].replace('-', '_')]
        assert values == dict(depth=3, heads=1)


def test_defaults_fit_their_own_options():
    for option in OPTIONS:
        assert option.parse(option.default, 'default') == option.default


def test_defaults_are_not_shared():
    settings_of()['decay_milestones'].append(5)
    assert settings_of()['decay_milestones'] == [90, 180, 270]


@pytest.mark.parametrize('flag, value', [('--torchcompile', 'inductor'), ('--torchcompile=eager', 'eager')])
def test_flag_with_and_without_value(flag, value):
    assert settings_of(flag)['torchcompile'] == value


def test_nearest_name(config):
    with pytest.raises(UserError, match=r'unknown key wieght_decay \(did you mean weight_decay\?\)'):
        settings_of('-c', config('wieght_decay: 1'))
    with pytest.raises(UserError, match=r'--wieght-decay \(did you mean --weight-decay\?\)'):
        settings_of('--wieght-decay', '1')


def test_help_lists_every_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        settings_of('--help')
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(option.flag in text for option in options_of('train').values())
    groups = re.findall(r'^([a-z]+):$', text, re.M)
    assert '(multistep) [90 180 270]' in text
    assert groups == ['options', *dict.fromkeys(option.section for option in options_of('train').values())]


@pytest.mark.parametrize('script', ['train', 'validate', 'inference', 'export'])
def test_the_version(script, capsys):
    with pytest.raises(SystemExit) as done:
        parse_settings(script, ['--version'])
    assert done.value.code == 0 and capsys.readouterr().out == f'evavit {evavit.__version__}\n'


@pytest.mark.parametrize('script', ['train', 'validate', 'export'])
def test_help_does_not_wait_for_pytorch(script):
    words = [sys.executable, '-X', 'importtime', ROOT / f'{script}.py', '--help']
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, 'PYTHONPATH': str(ROOT)})
    assert done.returncode == 0 and done.stdout.startswith(f'usage: {script}.py ')
    loaded = {line.split('|')[-1].strip() for line in done.stderr.splitlines()}
    assert 'evavit.training.sections' in loaded and loaded.isdisjoint(('torch', 'timm', 'numpy'))


def test_another_program_gets_the_whole_package(monkeypatch):
    for words, expected in (
        ([str(ROOT / 'train.py'), '--help'], True),
        (['/usr/bin/evavit-export', 'model.onnx', '-h'], True),
        ([str(ROOT / 'train.py'), '--epochs', '3'], False),
        (['/home/me/train.py', '--help'], False),
        ([str(ROOT / 'benchmark.py'), '--help'], False),
    ):
        monkeypatch.setattr(sys, 'argv', words)
        assert asks_for_help() == expected, words


def test_an_unknown_config_comes_with_the_known_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match=r'-c eva_deit_tinny: .*\(did you mean eva_deit_tiny\?\): there are convert, eva_deit_small'
    ):
        settings_of('-c', 'eva_deit_tinny')
    with pytest.raises(UserError, match='cannot be read'):
        settings_of('-c', 'eva_deit_tiny.yaml')
    (tmp_path / 'eva_deit_tiny').write_text('epochs: 7')  # a file of the user's own
    assert settings_of('-c', 'eva_deit_tiny')['epochs'] == 7


@pytest.mark.parametrize('name', recipes())
def test_every_config_is_valid_and_has_no_key_twice(name, request):
    path = request.config.rootpath / 'configs' / f'{name}.yaml'
    settings = settings_of('-c', str(path))
    assert settings['model'] and settings == settings_of('-c', name)
    keys = [line.split(':')[0] for line in path.read_text().splitlines() if line[:1].isalpha()]
    assert len(keys) == len(set(keys)) and set(keys) == set(yaml.safe_load(path.read_text()))


@pytest.mark.parametrize('script', ['train', 'validate', 'inference'])
def test_text_that_no_file_can_be_called(script, config):
    path = config('results_file: "a\\ud800b.csv"\n' if script != 'train' else 'experiment: "a\\ud800b"\n')
    with pytest.raises(UserError, match='does not fit'):
        parse_settings(script, ['-c', path])
    parse_settings(
        script, ['--experiment' if script == 'train' else '--results-file', 'a\udcffb.csv']
    )  # bytes of a name


@pytest.mark.parametrize(
    'flags, line',
    [
        ('--amp-dtype float16', '--amp-dtype: without effect, needs --amp'),
        ('--amp-dtype float16 --amp', None),
        ('--model-ema-decay 0.9', '--model-ema-decay: without effect, needs --model-ema'),
        ('--clip-mode agc', '--clip-mode: without effect, needs --clip-grad'),
        ('--mixup-prob 0.5 --mixup-mode elem', '--mixup-prob, --mixup-mode: without effect, need --mixup or --cutmix'),
        ('--mixup-prob 0.5 --cutmix 1', None),
        ('--recount 2', '--recount: without effect, needs --reprob'),
        ('--no-aug --scale 0.5 1', '--scale: without effect, needs augmentation'),
        ('--no-aug --hflip 0', None),
        ('--lr 1 --lr-base 1', '--lr-base: without effect, needs --lr left out'),
        ('--decay-epochs 3 --decay-rate 0.5', '--decay-epochs: without effect, needs --sched step or wsd'),
        ('--sched step --decay-epochs 3 --decay-rate 0.5', None),
        ('--train-num-samples 3 --dataset-download', '--train-num-samples, --dataset-download: without effect, need'),
        ('--lr 0', 'warning: lr 0 trains nothing'),
        ('--train-split a --val-split a', 'warning: train_split and val_split are both a'),
    ],
)
def test_a_flag_without_effect_is_told(flags, line, tmp_path):
    """Of a file it may be a part of a recipe."""
    config, _ = parse_settings('train', flags.split())
    assert any(note.startswith(line) for note in config.notes) if line else not config.notes, config.notes
    config.save(tmp_path / 'args.yaml')
    config, _ = parse_settings('train', ['-c', str(tmp_path / 'args.yaml')])
    assert not any('effect' in note for note in config.notes)
