"""What is in a checkpoint is believed only where a run can have written it; each fault is one line."""

import argparse
import functools
import json
import math
import random
import zipfile

import pytest
import safetensors.torch
import torch
from training.small_run import run_of, saver_of, settings_of

from evavit.errors import UserError, one_line
from evavit.files import is_stamped, stamp
from evavit.training import checkpoint, contents, run_folder
from evavit.training.config import parse_settings
from evavit.training.loop import Position


@pytest.fixture
def written(tmp_path):
    """The folder of a run after its second epoch."""
    (tmp_path / 'run').mkdir()
    saver = saver_of(run_of(), tmp_path / 'run')
    for epoch, metric in enumerate((10.0, 30.0)):
        saver.save_epoch(Position(epoch + 1), metric)
    return tmp_path / 'run'


def rewritten(path, change):
    """The checkpoint after `change(content)`, as somebody else would write it: without a digest."""
    content = torch.load(path, weights_only=False)
    change(content)
    torch.save(content, path)
    return content


def at(*keys, value):
    """A change that puts a value at a place in the content."""

    def change(content):
        for key in keys[:-1]:
            content = content[key]
        if value is DELETED:
            del content[keys[-1]]
        else:
            content[keys[-1]] = value

    change.words = keys[0]
    return change


DELETED = object()
GENERATOR = random.Random(0).getstate()
NESTED = [0]
for _ in range(60):  # a list of a few kilobytes that nobody can write out
    NESTED = [NESTED, NESTED]


def of_position(name, *values):
    return [at('saver', 'position', name, value=value) for value in values]


def setting(name, value, words='its args is'):
    def change(content):
        setattr(content['args'], name, value)

    change.words = words
    return change


CHANGES = [
    *of_position('epoch', -5, '1', math.nan, 10**9, 10**400, True, 1.0, None, 1),
    *of_position('update', -3, '1', 11, math.nan),
    *of_position('bad', 5, [1], {'a': 'b'}, {1: 2}, {-1: 'a'}),
    *of_position('lr', 'x', math.inf, None, -1.0),
    *of_position('seconds', -5.0),
    *of_position('loss', math.nan, torch.ones(2)),
    *of_position('skipped', -1, 3),
    *of_position('streak', '0'),
    *of_position('place', 6),
    *of_position('parts', 5, {'kd_loss': math.nan}, {'kd_loss': 'x'}),
    at('saver', 'position', 'bad', value=DELETED),
    at('saver', 'position', value=[1]),
    at('saver', 'plan', value=None),
    at('saver', 'plan', 'processes', value=0),
    at('saver', value=[1]),
    at('saver', 'best_metric', value=math.nan),
    at('saver', 'best_epoch', value='x'),
    at('metric', value='x'),
    at('metric', value=math.nan),
    at('epoch', value=7),
    at('epoch', value='1'),
    at('optimizer', value=[1, 2]),
    at('optimizer', value={}),
    at('optimizer', 'param_groups', value=None),
    at('optimizer', 'param_groups', value=[]),
    at('optimizer', 'param_groups', value=[dict(lr=1.0)]),
    at('optimizer', 'param_groups', 0, 'params', value=[0, 0]),
    at('optimizer', 'state', value=[]),
    at('optimizer', 'state', 7, value={}),
    at('optimizer', 'state', 0, value=5),
    at('task_state', value=[1]),
    at('task_state', value=dict(projection=dict(weight='x'))),
    at('task_state_ema', value=dict(projection=1)),
    at('amp_scaler', value=dict(scale='x')),
    at('amp_scaler', value=[1]),
    at('state_dict_ema', value=[1]),
    at('state_dict', value={}),
    at('state_dict', value=[1]),
    at('state_dict', 'weight', value='x'),
    at('state_dict', 'weight', value=torch.empty(2, 4, device='meta')),
    at('state_dict', 'weight', value=torch.eye(2, 4).to_sparse()),
    at('state_dict', 'weight', value=torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])),
    at('state_dict', 'weight', value=torch.zeros(1).expand(2, 4)),
    at('optimizer', 'state', 0, 'exp_avg', value=[torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])]),
    at('optimizer', 'state', 0, 'exp_avg', value=[dict(a=torch.full((2, 4), math.nan))]),
    *(
        at('optimizer', 'rng_state', value=value)
        for value in (
            *(None, 5, (3,), (3, (), None), [3, [*GENERATOR[1]], None], (2, *GENERATOR[1:])),
            *((3, (*GENERATOR[1][:-1], place), None) for place in (-1, 625, 1.5, 'a', True)),
            *((3, (word, *GENERATOR[1][1:]), None) for word in (-1, 2**32, 1.5, 'a')),
            *((3, GENERATOR[1][1:], None), (3, (0,) * 625, None)),
            *((3, GENERATOR[1], left) for left in (1, 'a', math.nan)),
        )
    ),
    at('args', value=[1, 2]),
    at('args', value=dict(model='tiny')),
    setting('model_ema', torch.ones(2)),
    setting('model_kwargs', NESTED),
    setting('model_kwargs', dict(depth=functools.reduce(lambda inner, _: [inner], range(150)))),
    setting('epochs', 10**400),
    *(setting('class_names', value, 'its class_names is') for value in (5, 3.5, True, ['a', 1, None], 'ab', {'a': 1})),
    *(setting('held_out_sha256', value, 'its held_out_sha256 is') for value in ([1], {}, 5)),
    setting('held_out_of', [1], 'its held_out_of is'),
]


@pytest.mark.parametrize('change', CHANGES)
def test_what_no_run_writes_is_named(written, change):
    last = written / 'last.pth.tar'
    rewritten(last, change)
    with pytest.raises(UserError, match=r'last\.pth\.tar: not a checkpoint of') as error:
        contents.read_checkpoint(last)
    assert change.words in str(error.value) and len(one_line(error.value)) < 400
    found = checkpoint.resume(run_folder.find_resume('auto', written), run_of(), settings_of().flat(), None)
    assert found.epoch == 1  # of the checkpoint before


def test_the_state_of_a_generator_in_an_optimizer(written):
    """Of timm's Kron, which draws when it brings its factors up to date."""
    last = written / 'last.pth.tar'
    for state in (GENERATOR, (*GENERATOR[:2], 0.5)):
        rewritten(last, at('optimizer', 'rng_state', value=state))
        assert contents.read_checkpoint(last)['optimizer']['rng_state'] == state


def test_a_compressed_archive_is_not_unpacked(written, tmp_path, monkeypatch):
    """A right digest is easily made."""
    last, packed = written / 'last.pth.tar', tmp_path / 'packed.pth.tar'
    with zipfile.ZipFile(last) as source, zipfile.ZipFile(packed, 'w', zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    stamp(packed)
    assert is_stamped(packed)
    monkeypatch.setattr(torch, 'load', None)
    with pytest.raises(UserError, match=r'packed\.pth\.tar: not a readable checkpoint \(the entry of its part'):
        contents.read_checkpoint(packed)


def test_a_ranking_names_only_files_that_the_saver_writes(written, tmp_path):
    """Its worst files are deleted: a checkpoint could choose which."""
    victim = tmp_path / 'victim.txt'
    victim.write_text('mine')
    (written / 'notes.txt').write_text('mine')
    names = ('../victim.txt', str(victim), 'notes.txt', '../run/checkpoint-0.pth.tar', 'checkpoint-٣.pth.tar')
    rankings = [[(name, 0.0)] * 3 for name in names]
    rankings += [[('checkpoint-0.pth.tar', 0.0)] * 2, [('checkpoint-0.pth.tar', math.nan)], [('a',)], [5], 5, {'a': 1}]
    rankings += [[('checkpoint-0.pth.tar', None)], [(b'checkpoint-0.pth.tar', 0.0)]]
    before = {path.name for path in written.iterdir()}
    for ranking in rankings:
        for name in ('last.pth.tar', 'previous.pth.tar', *(f'checkpoint-{epoch}.pth.tar' for epoch in range(2))):
            rewritten(written / name, at('saver', 'checkpoint_files', value=ranking))
        run = run_of()
        saver = saver_of(run, written)
        with pytest.raises(UserError, match=r'its saver\.checkpoint_files is'):
            checkpoint.resume(run_folder.find_resume('auto', written), run, settings_of().flat(), saver)
        assert {path.name for path in written.iterdir()} == before and victim.read_text() == 'mine', ranking


def test_a_tensor_that_the_directory_calls_a_folder_is_noticed(written):
    """`testzip` finds nothing to check in it, and PyTorch gives memory that was never written."""
    last = written / 'last.pth.tar'
    digested = last.read_bytes()
    rewritten(last, lambda content: None)
    for whole in (digested, last.read_bytes()):
        place = whole.find(b'PK\x01\x02')
        while place != -1:
            changed = bytearray(whole)
            changed[place + 38] ^= 0x10
            last.write_bytes(changed)
            with pytest.raises(UserError, match=r'last\.pth\.tar: not a readable checkpoint \(.*damaged'):
                contents.read_checkpoint(last)
            place = whole.find(b'PK\x01\x02', place + 1)


def test_one_flipped_bit_of_a_checkpoint_is_noticed(written):
    """Some of each of its parts, and of what is between them; test_files.py has all of a small file."""
    last = written / 'last.pth.tar'
    whole = last.read_bytes()
    for bit in range(0, 8 * len(whole), 1009):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        last.write_bytes(changed)
        with pytest.raises(UserError, match=r'last\.pth\.tar: not a readable checkpoint'):
            contents.read_checkpoint(last)
    assert checkpoint.resume(run_folder.find_resume('auto', written), run_of(), settings_of().flat(), None).epoch == 1


@pytest.mark.parametrize('name', ['last.pth.tar', 'last.safetensors'])
def test_settings_of_a_damaged_file_are_not_believed(written, name):
    path = written / name
    content = path.read_bytes()
    path.write_bytes(content.replace(b'tiny', b'tinz'))
    for read in (contents.saved_settings, contents.stored_metric):
        with pytest.raises(UserError, match='not a readable checkpoint'):
            read(path)


def with_settings(path, settings):
    safetensors.torch.save_file({'weight': torch.ones(2)}, path, dict(args=settings))
    return str(path)


@pytest.mark.parametrize(
    'settings, words',
    [
        ('[1,2]', 'its settings are not names with plain values'),
        ('null', 'its settings are not names'),
        ('{', 'its settings are no JSON'),
        ('[' * 100_000, 'its settings are no JSON'),
        (json.dumps(dict(model='tiny', class_names=5)), 'its class_names is 5'),
        (json.dumps(dict(model='tiny', class_names=['a', 5])), 'its class_names is of the kind list'),
        (json.dumps(dict(model='tiny', evavit_held_out=5)), 'its evavit_held_out is 5'),
        (json.dumps(dict(model='tiny', held_out_sha256=[1])), 'its held_out_sha256 is of the kind list'),
        (json.dumps(dict(model=['a'])), 'does not fit model'),
        (json.dumps(dict(model='tiny', num_classes=-1)), 'does not fit num_classes'),
        (json.dumps(dict(model='tiny', num_classes='x')), 'does not fit num_classes'),
        (json.dumps(dict(model='tiny', mean=3)), 'does not fit mean'),
        (json.dumps(dict(model='tiny', input_size=[3, 16])), 'does not fit input_size'),
        (json.dumps(dict(model='tiny', interpolation='x')), 'does not fit interpolation'),
        (json.dumps(dict(model='tiny', model_kwargs=[1])), 'does not fit model_kwargs'),
        ('{"model": "tiny", "crop_pct": NaN}', 'does not fit crop_pct'),
    ],
)
def test_settings_that_no_run_has_are_named(tmp_path, settings, words):
    path = with_settings(tmp_path / 'file.safetensors', settings)
    for script in ('validate', 'export'):
        config, given = parse_settings(script, ['--checkpoint', path])
        with pytest.raises(UserError, match=words) as error:
            contents.complete_from_checkpoint(config, given)
        assert path in str(error.value) and len(one_line(error.value)) < 400


@pytest.mark.parametrize('model', ['hf-hub:x/y', 'hf_hub:x/y', 'local-dir:/x'])
def test_a_checkpoint_names_no_model_of_the_network(tmp_path, model):
    path = with_settings(tmp_path / 'file.safetensors', json.dumps(dict(model=model, num_classes=3)))
    torch.save(dict(state_dict={}, args=argparse.Namespace(model=model)), tmp_path / 'file.pth')
    for name in (path, str(tmp_path / 'file.pth')):
        config, given = parse_settings('validate', ['--checkpoint', name])
        with pytest.raises(
            UserError, match='lies elsewhere, where it may be another by now; if it is not, add --model '
        ):
            contents.complete_from_checkpoint(config, given)
        config, given = parse_settings('validate', ['--checkpoint', name, '--model', 'eva_deit_tiny'])
        contents.complete_from_checkpoint(config, given)
        assert config.model.model == 'eva_deit_tiny'


@pytest.mark.parametrize('metric', ['x', 'nan', '[1]', ''])
def test_a_metric_that_is_none_is_named(tmp_path, metric):
    safetensors.torch.save_file({'weight': torch.ones(2)}, tmp_path / 'a.safetensors', dict(metric=metric))
    torch.save(dict(state_dict={}, metric=metric), tmp_path / 'a.pth')
    for name in ('a.safetensors', 'a.pth'):
        with pytest.raises(UserError, match='its metric is'):
            contents.stored_metric(tmp_path / name)


def test_a_metric_is_read(written):
    for name in ('last.pth.tar', 'last.safetensors'):
        assert contents.stored_metric(written / name) == 30


def test_settings_of_deit_s_own_program_are_another_program_s(tmp_path):
    """Its `input_size` is one number."""
    weights = {'weight': torch.zeros(1)}
    for other in (
        dict(input_size=224),
        dict(input_size=[32, 32]),
        dict(interpolation=3),
        dict(device=torch.device('cpu')),
    ):
        args = argparse.Namespace(model='deit_tiny_patch16_224', lr=5e-4, epochs=300, data_path='/x', **other)
        torch.save(dict(model=weights, model_ema=weights, args=args, epoch=5), tmp_path / 'deit.pth')
        assert contents.saved_settings(tmp_path / 'deit.pth') == {} and contents.has_average(tmp_path / 'deit.pth')
