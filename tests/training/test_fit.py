"""What a checkpoint holds must fit the run that reads it; what does not is named."""

import re

import pytest
import torch
from training.small_run import resume, rewritten, run_of, saver_of, settings_of, state

from evavit.errors import UserError
from evavit.training import build, checkpoint
from evavit.training.data.images import BadImages
from evavit.training.loop import Position


@pytest.fixture
def saver(tmp_path):
    return saver_of(run_of(), tmp_path)


def group(**values):
    return lambda content: content['optimizer']['param_groups'][0].update(values)


def weight(value):
    return lambda content: content['state_dict'].update(weight=value)


@pytest.mark.parametrize('value', [-1.0, 1e30])
@pytest.mark.parametrize('own', [None, 0.5])
def test_no_checkpoint_scales_the_learning_rate(saver, tmp_path, value, own):
    """timm's schedulers multiply by lr_scale, which --layer-decay alone gives: here it is this run's, or none."""
    path = tmp_path / 'last.pth.tar'
    saver.save_position(Position(0, 3))
    rewritten(path, group(lr_scale=value, of_another_version=3.0))
    run = run_of()
    if own:
        run.optimizer.param_groups[0]['lr_scale'] = own
    resume([path], run)
    assert run.optimizer.param_groups[0].get('lr_scale') == own
    assert 'of_another_version' not in run.optimizer.param_groups[0]


def test_the_optimizer_s_tensors_share_no_memory(saver, tmp_path):
    saver.save_position(Position(0, 3))
    rewritten(
        tmp_path / 'last.pth.tar',
        lambda content: state('exp_avg', content['optimizer']['state'][0]['exp_avg_sq'])(content),
    )
    run = run_of()
    resume([tmp_path / 'last.pth.tar'], run)
    loaded = run.optimizer.state_dict()['state'][0]
    assert torch.equal(loaded['exp_avg'], loaded['exp_avg_sq'])
    assert loaded['exp_avg'].data_ptr() != loaded['exp_avg_sq'].data_ptr()


def test_bad_images_that_the_data_set_does_not_have(saver, tmp_path):
    path, run = tmp_path / 'last.pth.tar', run_of()
    saver.save_position(Position(0, 3, bad={7: 'a.png\nempty', 31: 'b.png\nempty'}))
    run.bad = BadImages(32, 1.0)
    assert resume([path], run).bad.keys() == {7, 31}
    run.bad = BadImages(31, 1.0)
    with pytest.raises(UserError, match='tells of bad image 31, and this data set has 31'):
        resume([path], run)


@pytest.mark.parametrize(
    'change, words',
    [
        (state('exp_avg', torch.ones(3, 4)), 'its exp_avg of parameter 0 is 3×4 of float32, not 2×4 of float32'),
        (state('exp_avg', torch.ones(2, 4, dtype=torch.complex64)), 'exp_avg of parameter 0 is 2×4 of complex64'),
        (state('exp_avg', 5), 'exp_avg of parameter 0 is a number'),
        (state('exp_avg', None), 'exp_avg of parameter 0 is missing'),
        *(
            (state(name, value), f'its optimizer.state[0].{name} is ')
            for name, value in (
                ('step', torch.tensor(float('nan'))),
                ('step', torch.tensor(-5.0)),
                ('exp_avg', torch.full((2, 4), float('nan'))),
                ('exp_avg', torch.zeros(1).expand(2, 4)),
                ('exp_avg', torch.zeros(8)[:1].expand(2, 4)),
                ('exp_avg', torch.zeros(1).expand(10**9, 10**9)),
                ('exp_avg', torch.zeros(2, 4).to(torch.float8_e4m3fn)),
                ('exp_avg_sq', torch.full((2, 4), -1e-3)),
            )
        ),
        (group(lr_scale=float('nan')), 'its optimizer.param_groups[0].lr_scale is nan'),
        (group(another='x'), 'its another is str, not a number'),
        (
            lambda content: content['optimizer']['state'][0].pop('exp_avg_sq'),
            'its exp_avg_sq of parameter 0 is missing',
        ),
        (lambda content: content['optimizer']['state'].clear(), 'lacks the state of the optimizer after 3 updates'),
        (weight(torch.ones(2, 4, dtype=torch.complex64)), 'has in another type of number weight'),
        (weight(torch.ones(2, 4, dtype=torch.int8)), 'has in another type of number weight'),
        (weight(torch.ones(2, 4).to(torch.float8_e4m3fn)), 'its state_dict.weight is of float8_e4m3fn, another type'),
        (weight(torch.ones(2, 5)), 'has in another shape weight'),
        (weight(torch.ones(1).expand(10**9, 10**9)), 'its state_dict.weight is of 1000000000×1000000000 numbers'),
        (weight(torch.full((2, 4), float('inf'))), 'its weights are not finite'),
        (
            lambda content: content.update(state_dict_ema=dict(content['state_dict'], weight=torch.ones(5))),
            'has in another shape weight',
        ),
    ],
)
def test_what_does_not_fit_the_run_is_named(saver, tmp_path, change, words):
    saver.save_position(Position(0, 3))
    last = tmp_path / 'last.pth.tar'
    rewritten(last, change)
    run = run_of()
    run.optimizer.param_groups[0]['lr_scale'] = 1.0
    before = run.optimizer.state_dict()['state'][0]['exp_avg'].clone()
    with pytest.raises(UserError, match=re.escape(words)) as error:
        resume([last], run)
    assert str(last) in str(error.value)
    assert torch.equal(run.optimizer.state_dict()['state'][0]['exp_avg'], before)


def test_an_optimizer_without_its_generator_is_named(saver, tmp_path):
    saver.save_position(Position(0, 3))
    run = run_of()
    own = run.optimizer.state_dict
    run.optimizer.state_dict = lambda: {**own(), 'rng_state': 5}
    with pytest.raises(UserError, match='its optimizer lacks rng_state'):
        resume([tmp_path / 'last.pth.tar'], run)


def test_a_projection_of_another_kind_of_number_is_named(saver, tmp_path):
    saver.save_position(Position(0, 3))
    run = run_of()
    run.task.get_task_state = lambda: dict(projection=dict(weight=torch.ones(2, 3)))
    for name in ('task_state', 'task_state_ema'):
        rewritten(
            tmp_path / 'last.pth.tar',
            lambda content, name=name: content.update({name: dict(projection=dict(weight=torch.ones(2, 3) > 0))}),
        )
        with pytest.raises(UserError, match=r'in another type of number projection\.weight'):
            resume([tmp_path / 'last.pth.tar'], run)


def test_a_missing_average_is_named(tmp_path):
    """A run that kept one does not go on without; one that begins to keep one starts it from the weights."""

    def run_with(average):
        run = run_of()
        if average:
            run.task.setup_ema(decay=0.5)
        return run

    for kept in (True, False):
        folder = tmp_path / str(kept)
        folder.mkdir()
        flags = ['--model-ema'] if kept else []
        settings = settings_of(*flags).flat()
        checkpoint.Saver(run_with(kept), settings, None, folder).save_position(Position(0, 3))
        last = folder / 'last.pth.tar'
        assert resume([last], run_with(True), flags=['--model-ema']).update == 3
        if kept:
            rewritten(last, lambda content: content.pop('state_dict_ema'))
            with pytest.raises(UserError, match='its state_dict_ema is None'):
                resume([last], run_with(True), flags=['--model-ema'])


OPTIMIZERS = (
    'adamw',
    'sgd',
    'momentum',
    'adafactor',
    'adagrad',
    'lamb',
    'lion',
    'adafactorbv',
    'muon',
    'rmsproptf',
    'sgdp',
)


@pytest.mark.parametrize('opt', OPTIMIZERS)
def test_the_state_of_any_optimizer_fits_its_own_run(tmp_path, opt):
    def run_with(steps):
        run = run_of()
        model = run.task.get_trainable_module()
        run.optimizer = build.build_optimizer(model, settings_of('--opt', opt).optim, 1e-3)
        for _ in range(steps):
            model(torch.ones(1, 4)).sum().backward()
            run.optimizer.step()
        return run

    settings, fresh = settings_of('--opt', opt).flat(), run_with(0)
    run = run_with(3)
    checkpoint.Saver(run, settings, None, tmp_path).save_position(Position(0, 3))
    checkpoint.resume([tmp_path / 'last.pth.tar'], fresh, settings, None)
    before, after = run.optimizer.state_dict(), fresh.optimizer.state_dict()
    assert before['state'].keys() == after['state'].keys()
    for number, entry in before['state'].items():
        for name, value in entry.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(after['state'][number][name])), name
    for group in (*before['param_groups'], *after['param_groups']):
        group['params'] = [int(number) for number in group['params']]
    assert before['param_groups'] == after['param_groups']


def test_no_flag_of_the_optimizer_comes_from_a_checkpoint(saver, tmp_path):
    """One of them lets it climb instead of descend."""
    saver.save_position(Position(0, 3))
    rewritten(tmp_path / 'last.pth.tar', lambda content: content['optimizer']['param_groups'][0].update(maximize=True))
    run = run_of()
    resume([tmp_path / 'last.pth.tar'], run)
    assert run.optimizer.param_groups[0]['maximize'] is False


@pytest.mark.parametrize(
    'scaler',
    [
        None,
        dict(scale=0.0),
        dict(scale=float('nan'), _growth_tracker=0),
        dict(scale=8.0, _growth_tracker=-1),
        dict(scale=8.0, _growth_tracker=2**31),
        dict(scale=1e39, _growth_tracker=0),
    ],
)
def test_a_scale_that_is_none_is_named(tmp_path, scaler):
    flags = ['--amp', '--amp-dtype', 'float16']
    run = run_of(*flags)
    checkpoint.Saver(run, settings_of(*flags).flat(), None, tmp_path).save_position(Position(0, 3))
    last = tmp_path / 'last.pth.tar'
    assert resume([last], run_of(*flags), flags=flags).update == 3
    rewritten(last, lambda content: content.update(amp_scaler=scaler))
    with pytest.raises(UserError, match=r'scale of float16|its amp_scaler is'):
        resume([last], run_of(*flags), flags=flags)
