"""Checkpoints appear whole or not at all, and only whole ones of our own are read."""

import argparse
import contextlib
import errno
import io
import multiprocessing
import os
import re
import resource
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask
from training.small_run import resume, rewritten, run_of, saver_of, settings_of, state

from evavit.errors import LocalError, UserError
from evavit.training import checkpoint, contents, dry_run, loop, run_folder
from evavit.training.agreement import code_version
from evavit.training.build import build_optimizer
from evavit.training.checkpoint import remove_checkpoints
from evavit.training.data.images import BadImages
from evavit.training.loop import Position
from evavit.training.optimizer_state import fit_state


@pytest.fixture
def saver(tmp_path):
    return saver_of(run_of(), tmp_path)


def test_best_and_last(saver, tmp_path):
    for epoch, metric in enumerate((10.0, 30.0, 20.0)):
        with torch.no_grad():
            saver.model.bias.fill_(epoch)
        best = saver.save_epoch(Position(epoch + 1), metric)
    assert best == (30.0, 1)
    assert torch.load(tmp_path / 'model_best.pth.tar', weights_only=False)['epoch'] == 1
    assert torch.load(tmp_path / 'last.pth.tar', weights_only=False)['epoch'] == 2
    assert {path.name for path in tmp_path.glob('checkpoint-*')} == {'checkpoint-1.pth.tar', 'checkpoint-2.pth.tar'}
    assert load_file(tmp_path / 'model_best.safetensors')['bias'].tolist() == [1, 1]
    assert load_file(tmp_path / 'last.safetensors')['bias'].tolist() == [2, 2]


@pytest.mark.parametrize('broken', ['torch.save', 'safetensors.torch.save_file'])
def test_a_failed_write_leaves_the_last_checkpoint_whole(saver, tmp_path, monkeypatch, broken):
    saver.save_epoch(Position(1), 10.0)
    names = ('last.pth.tar', 'model_best.pth.tar', 'last.safetensors', 'model_best.safetensors')
    before = {name: (tmp_path / name).read_bytes() for name in names}

    def write_half(_, file, *args, **kwargs):
        with file if hasattr(file, 'write') else open(file, 'wb') as half:
            half.write(b'half')
        raise OSError('disk full')

    monkeypatch.setattr(broken, write_half)
    with pytest.raises(LocalError, match='disk full'):
        saver.save_epoch(Position(2), 20.0)
    kept = names if broken == 'torch.save' else names[2:]
    assert all((tmp_path / name).read_bytes() == before[name] for name in kept)


@pytest.mark.parametrize('name', ['last.pth.tar', 'last.safetensors'])
def test_settings_travel_with_the_weights(saver, tmp_path, name):
    saver.save_epoch(Position(1), 10.0)
    saved = contents.saved_settings(tmp_path / name)
    assert saved['model'] == 'tiny' and saved['class_names'] == ['a', 'b']
    assert list(saved) == [*settings_of().flat(), 'class_names']


def test_a_file_of_other_origin_has_no_settings(tmp_path):
    torch.save(dict(args=argparse.Namespace(model='x')), tmp_path / 'ours.pth')
    torch.save(dict(weight=torch.ones(1)), tmp_path / 'plain.pth')
    assert contents.saved_settings(tmp_path / 'ours.pth') == dict(model='x')
    assert contents.saved_settings(tmp_path / 'plain.pth') == {}


def test_a_full_disk_leaves_the_last_checkpoint_whole(saver, tmp_path):
    """A process whose files may hold 5,000 bytes, less than a checkpoint needs."""

    def fill():
        saver.save_epoch(Position(1), 10.0)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))
        for save in (lambda: saver.save_epoch(Position(2), 20.0), lambda: saver.save_position(Position(1, 5))):
            with pytest.raises(LocalError, match=r'tmp\.pth\.tar: cannot be written .* what was saved before is whole'):
                save()

    child = multiprocessing.get_context('fork').Process(target=fill)  # of its own, the limit cannot be taken back
    child.start()
    child.join()
    assert child.exitcode == 0
    assert contents.read_checkpoint(tmp_path / 'last.pth.tar')['epoch'] == 0
    assert not list(tmp_path.glob('*.partial'))


def change(path, how):
    content = path.read_bytes()
    if how == 'one bit':
        middle = content.index(b'data/0') + 200
        content = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    path.write_bytes(dict(empty=b'', half=content[: len(content) // 2], text=b'no checkpoint').get(how, content))
    if how == "another program's":
        torch.save(dict(weight=torch.ones(2)), path)
    if how == "another version's":
        saved = torch.load(path, weights_only=False)
        saved['saver']['position']['place'] = saved['saver']['position'].pop('update')
        torch.save(saved, path)
    if how == 'moments that are not finite':
        rewritten(path, state('exp_avg', torch.full((2, 4), float('nan'))))
    if how == 'with code':

        class Code:
            def __reduce__(self):
                return (open, (str(path.with_name('it ran')), 'w'))

        torch.save(dict(state_dict=Code(), optimizer={}, epoch=3), path)


DAMAGES = (
    'empty',
    'half',
    'one bit',
    'text',
    "another program's",
    "another version's",
    'with code',
    'moments that are not finite',
)


@pytest.mark.parametrize('how', DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(saver, tmp_path, caplog, how):
    for update in (3, 6):
        with torch.no_grad():
            saver.model.bias.fill_(update)
        saver.save_position(Position(0, update))
    last = tmp_path / 'last.pth.tar'
    change(last, how)
    with pytest.raises(UserError, match=r'last\.pth\.tar: not a'):
        contents.read_checkpoint(last)
    with pytest.raises(UserError, match=r'last\.pth\.tar: not a'):  # a file that was asked for by name has no stand-in
        resume(run_folder.find_resume(str(last), tmp_path), run_of(), None)

    candidates = run_folder.find_resume('auto', tmp_path)
    run = run_of()
    with caplog.at_level('WARNING', 'evavit'):
        position = resume(candidates, run, None)
    assert contents.read_checkpoint(tmp_path / 'previous.pth.tar')['saver']['position']['update'] == 3
    assert position.update == 3 and run.task.get_trainable_module().bias.tolist() == [3, 3]
    assert 'last.pth.tar' in caplog.text and 'going back to previous.pth.tar' in caplog.text
    assert not (tmp_path / 'it ran').exists()

    change(tmp_path / 'previous.pth.tar', how)
    with pytest.raises(UserError, match=r'previous\.pth\.tar: not a'):  # and no silent start from nothing
        resume(candidates, run, None)


@pytest.mark.parametrize('missing', [False, True])
def test_the_whole_checkpoint_that_comes_furthest_is_taken(saver, tmp_path, caplog, missing):
    """In a copied folder the best few share no bytes with the last one, and may be later than `previous`."""
    saver.save_position(Position(0, 3))
    saver.save_epoch(Position(epoch=1), 10.0)
    kept = tmp_path / 'checkpoint-0.pth.tar'
    shutil.copy(kept, tmp_path / 'copy')
    (tmp_path / 'copy').replace(kept)
    change(tmp_path / 'last.pth.tar', 'half')
    if missing:
        (tmp_path / 'last.pth.tar').unlink()
    run = run_of()
    with caplog.at_level('WARNING', 'evavit'):
        assert resume(run_folder.find_resume('auto', tmp_path), run, saver_of(run, tmp_path)).epoch == 1
    assert 'going back to checkpoint-0.pth.tar' in caplog.text  # of the damaged model_best


@pytest.mark.parametrize('cut', ['last.pth.tar', 'checkpoint-1.pth.tar'])
def test_a_damaged_file_beside_the_one_that_is_gone_on_from(saver, tmp_path, caplog, cut):
    """A run that was asked to go on from a whole one does, and a damaged `last` replaces no whole `previous`."""
    for epoch in (1, 2):
        saver.save_epoch(Position(epoch), 10.0)
    for path in [*tmp_path.iterdir()]:  # a copied folder: no file is another's name
        shutil.copy(path, tmp_path / 'copy')
        (tmp_path / 'copy').replace(path)
    change(tmp_path / cut, 'half')
    kept = tmp_path / 'checkpoint-1.pth.tar'
    found = [kept] if cut == 'last.pth.tar' else run_folder.find_resume('auto', tmp_path)
    run = run_of()
    assert resume(found, run, saver_of(run, tmp_path)).epoch == 2
    assert contents.read_checkpoint(tmp_path / 'previous.pth.tar')['epoch'] == 0
    assert contents.read_checkpoint(tmp_path / 'last.pth.tar')['epoch'] == 1
    assert (tmp_path / 'last.pth.tar.damaged').exists() == (cut == 'last.pth.tar')
    assert ('last.pth.tar: not a readable checkpoint' in caplog.text) == (cut == 'last.pth.tar')


def test_a_checkpoint_that_may_not_be_read_stays_where_it_is(saver, tmp_path, monkeypatch):
    """It may be whole: its owner can let the run read it."""
    for update in (3, 6):
        saver.save_position(Position(0, update))
    last, stamped = tmp_path / 'last.pth.tar', contents.is_stamped

    def refused(path):
        if path == last:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return stamped(path)

    monkeypatch.setattr(contents, 'is_stamped', refused)
    with pytest.raises(UserError, match=r'last\.pth\.tar: cannot be read \(Permission denied\)'):
        resume(run_folder.find_resume('auto', tmp_path), run_of(), saver)
    assert last.is_file() and not (tmp_path / 'last.pth.tar.damaged').exists()


def test_a_kill_between_the_files_of_an_epoch_is_made_good(tmp_path, monkeypatch):
    """Each moment after last.pth.tar is in place: the resumed saver ends with the files and ranks of one not killed."""

    class Killed(BaseException):
        pass

    def play(folder, killed_at):
        folder.mkdir()
        (folder / 'train.log').write_text(f'2026-11-30 12:00:00,000 {code_version()}; train.py\n')  # as a run begins
        run = run_of()
        saver, calls = saver_of(run, folder), 0
        replace = checkpoint.os.replace

        def count(src, dst):
            nonlocal calls
            calls += 1
            if calls == killed_at:
                raise Killed
            replace(src, dst)

        monkeypatch.setattr(checkpoint.os, 'replace', count)
        for epoch, metric in enumerate((10.0, 30.0, 20.0, 40.0)):
            with torch.no_grad():
                saver.model.bias.fill_(epoch)
            try:
                saver.save_epoch(Position(epoch + 1), metric)
            except Killed:
                run = run_of()
                saver = saver_of(run, folder)
                candidates = run_folder.find_resume('auto', folder)
                done = resume(candidates, run, saver).epoch if candidates else 0
                if done == epoch:  # the epoch was not yet saved: it comes again
                    with torch.no_grad():
                        saver.model.bias.fill_(epoch)
                    saver.save_epoch(Position(epoch + 1), metric)
        monkeypatch.undo()
        return saver, calls

    def content(folder, saver):
        files = {path.name: torch.load(path, weights_only=False) for path in folder.glob('*.pth.tar')}
        files.pop('previous.pth.tar', None)
        return (
            {name: (file['epoch'], file['state_dict']['bias'].tolist()) for name, file in files.items()},
            [(path.rsplit('/', 1)[1], metric) for path, metric in saver.checkpoint_files],
            saver.best_metric,
            {path.name: load_file(path)['bias'].tolist() for path in folder.glob('*.safetensors')},
        )

    saver, calls = play(tmp_path / 'whole', 0)
    whole = content(tmp_path / 'whole', saver)
    assert calls > 20
    for moment in range(1, calls + 1):
        saver, _ = play(tmp_path / str(moment), moment)
        assert content(tmp_path / str(moment), saver) == whole, moment


def test_processes_that_see_different_checkpoints_stop(saver, tmp_path):
    """As where a folder is not shared: the other process found none."""
    saver.save_position(Position(2, 5))
    run = run_of()
    other = ('', (0,))

    def agree(value, remark):
        if value != other:
            raise UserError(remark([value, other]))

    run.process = argparse.Namespace(
        world_size=2, check_equal=agree, gather=lambda item: [item, 'another'], primary=False
    )
    for candidates, told in (
        ([tmp_path / 'last.pth.tar'], r'last\.pth\.tar, [0-9a-f]{8} and another'),
        ([], 'another and none'),
    ):
        with pytest.raises(UserError, match=rf'{told}\): --output must be one folder that all machines see'):
            resume(candidates, run, None)


@pytest.mark.parametrize('digest', [True, False])
def test_processes_that_see_one_folder_by_two_names_go_on(saver, tmp_path, digest):
    """As where it is mounted at another place on each machine."""
    saver.save_position(Position(2, 5))
    if not digest:
        rewritten(tmp_path / 'last.pth.tar', lambda content: None)
    (tmp_path / 'other name').symlink_to(tmp_path)
    run, seen = run_of(), []
    run.process = argparse.Namespace(world_size=1, check_equal=lambda value, _: seen.append(value), primary=False)
    for folder in (tmp_path, tmp_path / 'other name'):
        resume([folder / 'last.pth.tar'], run)
    assert seen[0] == seen[1]


@pytest.mark.parametrize('digest', [True, False])
def test_processes_that_see_other_bytes_stop(tmp_path, monkeypatch, digest):
    """Checkpoints of one path and place on two disks; earlier versions wrote no digest into them."""
    seen = []
    for name in ('here', 'there'):
        (tmp_path / name).mkdir()
        run = run_of()
        saver = saver_of(run, tmp_path / name)
        with torch.no_grad():
            saver.model.bias.fill_(len(seen))
        saver.save_position(Position(2, 5))
        if not digest:
            rewritten(tmp_path / name / 'last.pth.tar', lambda content: None)
        run.process = argparse.Namespace(world_size=1, check_equal=lambda value, _: seen.append(value), primary=False)
        monkeypatch.chdir(tmp_path / name)
        resume([Path('last.pth.tar')], run)
    assert seen[0] != seen[1] and seen[0][1] == seen[1][1]


def test_the_learning_rate_that_is_told_is_the_schedule_s():
    """Not that of the first layers, which --layer-decay lowers."""
    run = run_of()
    run.optimizer.add_param_group(dict(params=[torch.nn.Parameter(torch.ones(1))], lr=0.5))
    assert run.learning_rate() == 0.5


def test_a_position_whose_weights_are_bad_is_not_saved(saver, tmp_path):
    saver.save_position(Position(0, 3))
    with torch.no_grad():
        saver.model.bias.fill_(float('nan'))
    saver.save_position(Position(0, 7))
    assert contents.read_checkpoint(tmp_path / 'last.pth.tar')['saver']['position']['update'] == 3


@pytest.mark.parametrize(
    'processes, images, updates, expected',
    [(1, 4, 10, Position(2, 5)), (2, 4, 10, Position(2, 5)), (2, 8, 5, Position(2)), (2, 8, 10, Position(2))],
)
def test_another_number_of_processes(saver, tmp_path, caplog, processes, images, updates, expected):
    saver.save_position(Position(2, 5))
    run = run_of()
    run.process = argparse.Namespace(world_size=processes, check_equal=lambda *_: None, primary=True)
    run.images_per_update, run.updates_per_epoch = images, updates
    with caplog.at_level('INFO', 'evavit'):
        assert resume([tmp_path / 'last.pth.tar'], run, None) == expected
    assert ('restarts at epoch 2' in caplog.text) == (expected.update == 0)
    assert ('go on in the same order' in caplog.text) == (processes == 2 and expected.update > 0)


@pytest.mark.parametrize('before, update, expected', [(40, 5, 0), (43, 5, 5), (None, 5, 5), (40, 0, 0)])
def test_another_number_of_images(tmp_path, caplog, before, update, expected):
    """Within an epoch their order is another one; earlier versions did not write the number."""
    run = run_of()
    run.bad = BadImages(before, 1.0) if before else None
    saver_of(run, tmp_path).save_position(Position(2, update, bad={7: 'a.png\nempty'} if update else {}))
    run = run_of()
    run.bad = BadImages(43, 1.0)
    run.updates_per_epoch += before == 40  # more images are more updates
    with caplog.at_level('INFO', 'evavit'):
        position = resume([tmp_path / 'last.pth.tar'], run, None)
    assert (position.epoch, position.update, list(position.bad)) == (2, expected, [7] * (expected > 0))
    line = 'was written with 40 images to train on, here there are 43: their order restarts at epoch 2'
    assert (line in caplog.text) == (update > 0 and not expected)


def test_a_damaged_checkpoint_never_takes_the_place_of_a_whole_one(saver, tmp_path, monkeypatch):
    """Resumed from the one before, and killed at any moment of the next save: a whole checkpoint is still there."""

    class Killed(BaseException):
        pass

    for moment in range(1, 5):
        for update in (3, 6):
            saver.save_position(Position(0, update))
        change(tmp_path / 'last.pth.tar', 'half')
        run = run_of()
        resumed = saver_of(run, tmp_path)
        assert resume(run_folder.find_resume('auto', tmp_path), run, resumed).update == 3
        replace, calls = checkpoint.os.replace, []

        def killed(src, dst, moment=moment, calls=calls, replace=replace):
            calls.append(dst)
            if len(calls) == moment:
                raise Killed
            replace(src, dst)

        with monkeypatch.context() as patch:
            patch.setattr(checkpoint.os, 'replace', killed)
            with contextlib.suppress(Killed):
                resumed.save_position(Position(0, 9))
        assert resume(run_folder.find_resume('auto', tmp_path), run_of(), None).update in (3, 9), moment
    kept = [tmp_path / f'last.pth.tar.damaged{number}' for number in ('', 1, 2, 3)]
    assert [path.is_file() for path in kept] == [True] * 4  # none in another's place


def test_a_checkpoint_of_another_name_is_left(saver, tmp_path):
    """Also where it is newer than the run's own, and not one that can be read."""
    mine = tmp_path / 'checkpoint-mine.pth.tar'
    mine.write_text('mine')
    assert run_folder.find_resume('auto', tmp_path) == []
    for update in (3, 6):
        saver.save_position(Position(0, update))
    change(tmp_path / 'last.pth.tar', 'half')
    change(tmp_path / 'previous.pth.tar', 'half')
    run = run_of()
    with pytest.raises(UserError, match=r'previous\.pth\.tar: not a'):
        resume(run_folder.find_resume('auto', tmp_path), run, saver_of(run, tmp_path))
    assert mine.read_text() == 'mine'


@pytest.mark.parametrize('linked', ['last', 'all', 'the folder'])
def test_a_link_is_a_checkpoint_of_the_folder_that_it_lies_in(saver, tmp_path, linked):
    """To another disk, say: the ranking goes on, and a worse epoch does not become the best one."""
    folder, disk = tmp_path / 'run', tmp_path / 'disk'
    folder.mkdir()
    disk.mkdir()
    saver = saver_of(run_of(), folder)
    for epoch, metric in enumerate((10.0, 30.0)):
        saver.save_epoch(Position(epoch + 1), metric)
    if linked == 'the folder':
        folder = tmp_path / 'link'
        folder.symlink_to(tmp_path / 'run')
    for path in [] if linked == 'the folder' else list(folder.iterdir()):
        if linked == 'all' or path.name == 'last.pth.tar':
            path.rename(disk / path.name)
            path.symlink_to(disk / path.name)
    before = contents_of(disk)
    run = run_of()
    again = saver_of(run, folder)
    assert resume(run_folder.find_resume('auto', folder), run, again).epoch == 2
    assert (again.best_epoch, again.best_metric) == (1, 30.0) and len(again.checkpoint_files) == 2
    again.save_epoch(Position(3), 5.0)
    for name, epoch in dict(last=2, previous=1, model_best=1).items():
        assert contents.read_checkpoint(folder / f'{name}.pth.tar')['epoch'] == epoch
    assert contents_of(disk) == before
    assert contents.stored_metric(folder / 'model_best.safetensors') == 30


def test_a_link_to_a_disk_that_is_not_there_is_told(saver, tmp_path, caplog):
    """No run starts from nothing in its place."""
    saver.save_position(Position(0, 3))
    last = tmp_path / 'last.pth.tar'
    last.rename(tmp_path / 'elsewhere')
    last.symlink_to(tmp_path / 'nowhere')
    with pytest.raises(UserError, match='already holds a run'):
        run_folder.find_resume(None, tmp_path)
    with pytest.raises(UserError, match='no such checkpoint'):
        resume(run_folder.find_resume('auto', tmp_path), run_of())
    (tmp_path / 'elsewhere').rename(tmp_path / 'previous.pth.tar')
    run = run_of()
    with caplog.at_level('WARNING', 'evavit'):
        assert resume(run_folder.find_resume('auto', tmp_path), run, saver_of(run, tmp_path)).update == 3
    assert 'last.pth.tar: not a readable checkpoint (no such checkpoint): going back to previous' in caplog.text


def test_the_flags_of_a_resumed_run_hold(saver, tmp_path, caplog):
    """The optimizer's state brings its own rates and decays: those of the flags win, and the log says what changed."""
    saver.save_position(Position(0, 3))
    flags = ('--lr', '0.5', '--weight-decay', '0.3', '--workers', '9')
    run = run_of(*flags)
    for group in run.optimizer.param_groups:
        group.update(lr=0.5, weight_decay=0.3)
    with caplog.at_level('WARNING', 'evavit'):
        resume([tmp_path / 'last.pth.tar'], run, flags=flags)
    assert {(group['lr'], group['weight_decay']) for group in run.optimizer.param_groups} == {(0.5, 0.3)}
    assert run.optimizer.state  # its moments are the checkpoint's
    assert 'lr None → 0.5, weight_decay 0.05 → 0.3' in caplog.text.replace(
        'weight_decay 0.05 → 0.3, lr None → 0.5', 'lr None → 0.5, weight_decay 0.05 → 0.3'
    )
    assert 'workers' not in caplog.text
    run.optimizer.add_param_group(dict(params=[torch.nn.Parameter(torch.ones(1))]))
    with pytest.raises(UserError, match='1 groups of parameters, this run 2'):
        resume([tmp_path / 'last.pth.tar'], run, None)


@pytest.mark.parametrize(
    'flags, change, told',
    [
        ((), None, None),
        (('--weight-decay', '0'), None, 'it has 2 groups of parameters, this run 1'),
        (('--layer-decay', '0.5', '--no-resume-opt'), None, None),
        ((), state('exp_avg', torch.ones(3)), 'its exp_avg of parameter 0 is 3 of float32, not 2 of float32'),
        ((), lambda content: content['optimizer'].update(state={}), 'it lacks the state of the optimizer after 5 up'),
    ],
)
def test_a_dry_run_refuses_what_does_not_fit_the_optimizer(saver, tmp_path, flags, change, told):
    run = run_of()
    run.optimizer = build_optimizer(run.task.get_trainable_module(), settings_of().optim, 0.1)
    run.task.get_trainable_module()(torch.ones(1, 4)).sum().backward()
    run.optimizer.step()
    saver_of(run, tmp_path).save_position(Position(0, 5))
    if change:
        rewritten(tmp_path / 'last.pth.tar', change)
    config = settings_of(*flags, '--resume', 'auto')
    model = torch.nn.Linear(4, 2, device='meta')
    with pytest.raises(UserError, match=told) if told else contextlib.nullcontext():
        assert dry_run.check_resume(config, tmp_path, model)


def test_another_run_s_folder_is_not_overwritten(saver, tmp_path):
    saver.save_position(Position(0, 3))
    (tmp_path / 'other').mkdir()
    elsewhere = shutil.copy(tmp_path / 'last.pth.tar', tmp_path / 'other')
    saver.save_epoch(Position(1), 0.5)
    for name in ('last.pth.tar', 'previous.pth.tar', 'checkpoint-0.pth.tar', 'model_best.pth.tar', 'last.safetensors'):
        with pytest.raises(UserError, match='holds another run than --resume'):
            run_folder.find_resume(str(elsewhere), tmp_path)
        (tmp_path / name).unlink()


def test_what_is_left_of_a_run_is_not_overwritten(saver, tmp_path):
    """A user who needs room keeps the best checkpoint, or the weights alone."""
    saver.save_epoch(Position(1), 0.5)
    for name in ('last', 'previous', 'checkpoint-0'):
        (tmp_path / f'{name}.pth.tar').unlink(missing_ok=True)
    (tmp_path / 'checkpoint-1.pth.tar').symlink_to('nowhere')
    best = tmp_path / 'model_best.pth.tar'
    assert run_folder.find_resume('auto', tmp_path) == run_folder.find_resume(str(best), tmp_path) == [best]
    with pytest.raises(UserError, match='already holds a run: continue it with --resume auto'):
        run_folder.find_resume(None, tmp_path)
    assert resume([best], run := run_of(), other := saver_of(run, tmp_path)).epoch == 1
    assert other.best_metric == 0.5 and (tmp_path / 'last.pth.tar').is_file()
    for path in tmp_path.glob('*.pth.tar'):
        path.unlink()
    (tmp_path / 'checkpoint-1.pth.tar').symlink_to('elsewhere')
    for name in ('last.safetensors', 'model_best.safetensors', 'checkpoint-1.pth.tar'):
        for there in (True, False):  # or is a link to a disk that is not there
            for resumed in (None, 'auto'):
                with pytest.raises(UserError, match=f'holds {name} of a run, and no checkpoint to continue from: choo'):
                    run_folder.find_resume(resumed, tmp_path)
            (tmp_path / name).unlink()
            if there:
                (tmp_path / name).symlink_to('nowhere')
    assert run_folder.find_resume('auto', tmp_path) == []


def test_a_disk_without_room_for_the_lock(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        with pytest.raises(LocalError) as error, run_folder.locked_folder(tmp_path):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert re.search('cannot be written .*; nothing was saved before', str(error.value))


@pytest.mark.parametrize('before, after', [('top5', 'top1'), ('top1', 'loss'), ('loss', 'top5')])
def test_epochs_are_compared_by_one_metric(before, after, tmp_path):
    """Going on in the same folder with another one would rank its epochs among those that the first has judged."""
    flags = ['--eval-metric', after]
    settings = settings_of('--eval-metric', before)
    saver = checkpoint.Saver(run_of('--eval-metric', before), settings.flat(), ['a', 'b'], tmp_path)
    saver.save_epoch(Position(1), 0.5)
    run = run_of(*flags)
    last = tmp_path / 'last.pth.tar'
    with pytest.raises(UserError, match=f'judged by {before}, this run has --eval-metric {after}; continue with'):
        resume([last], run, saver_of(run, tmp_path), flags)
    with pytest.raises(UserError, match=f'judged by {before}'):
        dry_run.check_resume(settings_of(*flags, '--resume', 'auto', '--experiment', 'x'), tmp_path, None)
    (tmp_path / 'elsewhere').mkdir()
    saver = saver_of(run, tmp_path / 'elsewhere')
    assert resume([last], run, saver, flags).epoch == 1 and saver.best_metric is None


def test_two_runs_do_not_write_into_one_folder(tmp_path):
    """The lock goes with its process, however that ends."""

    def second(expected):
        try:
            with run_folder.locked_folder(tmp_path):
                os._exit(0)
        except LocalError as error:
            os._exit(1 if f'another run is writing there (process {expected} on' in str(error) else 2)

    def outcome():
        child = multiprocessing.get_context('fork').Process(target=second, args=(os.getpid(),))
        child.start()
        child.join()
        return child.exitcode

    with run_folder.locked_folder(tmp_path):
        assert outcome() == 1
    assert outcome() == 0
    with run_folder.locked_folder(tmp_path):
        assert outcome() == 1


def test_statistics_that_are_not_finite_are_not_saved(tmp_path):
    """A batch norm keeps what an image of infinities did to it, though the update was skipped."""
    run = run_of()
    model = torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.BatchNorm1d(2))
    run.task = ClassificationTask(model, verbose=False)
    assert loop.weights_are_finite(run.task)
    model[1].running_var.fill_(float('inf'))
    assert not loop.weights_are_finite(run.task)


def contents_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.exists()}


def test_a_resume_at_an_epoch_s_start_changes_no_file(tmp_path):
    """Other settings or a learning rate that is not yet that of the epoch must not get into files that are whole."""
    saver = saver_of(run_of(), tmp_path)
    for epoch, metric in enumerate((10.0, 30.0, 20.0, 40.0)):
        saver.save_epoch(Position(epoch + 1), metric)
        before = contents_of(tmp_path)
        for flags in ((), ('--epochs', '400', '--lr', '3')):
            run = run_of(*flags)
            again = checkpoint.Saver(run, settings_of(*flags).flat(), None, tmp_path)
            resume(run_folder.find_resume('auto', tmp_path), run, again, flags)
            assert contents_of(tmp_path) == before
            assert again.checkpoint_files == saver.checkpoint_files
            assert (again.best_epoch, again.best_metric) == (saver.best_epoch, saver.best_metric)


@pytest.mark.parametrize('flags', [(), ('--no-resume-opt',)])
@pytest.mark.parametrize('last', ['whole', 'damaged', 'a link that leads nowhere', 'gone'])
def test_a_run_does_not_go_back_in_its_folder(tmp_path, tmp_path_factory, last, flags):
    """Its files would be of two histories. What `--resume auto` would go on from has its other names."""
    saver = saver_of(run_of(), tmp_path)
    saver.save_position(Position(0, 3))
    shutil.copy(tmp_path / 'last.pth.tar', tmp_path / 'early.pth.tar')
    for epoch, metric in enumerate((30.0, 20.0, 25.0)):
        saver.save_epoch(Position(epoch + 1), metric)
    path = tmp_path / 'last.pth.tar'
    saver_of(run_of(), tmp_path_factory.mktemp('branch')).save_epoch(Position(5), 50.0)
    shutil.copy(tmp_path_factory.getbasetemp() / 'branch0' / path.name, tmp_path / 'a further one.pth.tar')
    shutil.copy(path, tmp_path / 'a copy.pth.tar')
    shutil.copy(path, tmp_path / 'copy')
    (tmp_path / 'copy').replace(tmp_path / 'checkpoint-2.pth.tar')  # no link to the last one
    if last != 'whole':
        path.unlink()
    if last == 'damaged':
        path.write_bytes(b'cut')
    if last == 'a link that leads nowhere':
        path.symlink_to(tmp_path / 'gone' / 'last.pth.tar')
    before, run = contents_of(tmp_path), run_of(*flags)
    for name, epoch in {'early': 0, 'previous': 2, 'model_best': 1, 'checkpoint-0': 1, 'a further one': 5}.items():
        chosen = tmp_path / f'{name}.pth.tar'
        line = r'goes on from \S+ \(3 epochs\); do so with --resume auto, or go on from this file in a folder'
        with pytest.raises(UserError, match=line):
            resume([chosen], run, saver_of(run, tmp_path))
        with pytest.raises(UserError, match=line):  # as a dry run
            run_folder.check_furthest(chosen, contents.read_checkpoint(chosen), tmp_path)
        assert contents_of(tmp_path) == before
        assert resume([chosen], run, saver_of(run, tmp_path_factory.mktemp('other'))).epoch == epoch
    for name in ('a copy.pth.tar', 'checkpoint-2.pth.tar'):
        assert resume([tmp_path / name], run, saver_of(run, tmp_path)).epoch == 3
        assert contents.read_checkpoint(path)['metric'] == 25
        assert os.path.lexists(tmp_path / 'last.pth.tar.damaged') == (last in ('damaged', 'a link that leads nowhere'))
        assert not [*tmp_path.glob('*.before')]


@pytest.mark.parametrize('how', ['restored', 'damaged', 'within an epoch', 'gone', 'none ranked'])
def test_files_of_later_epochs_than_the_last_are_set_aside(tmp_path, caplog, how):
    """As where every later checkpoint is damaged, or an older one was put back. `model_best` becomes that of the
    ranking's best epoch. Where nothing is left of that one, the best of what is left takes its place."""
    flags = ('--checkpoint-hist', '4')
    saver = saver_of(run_of(*flags), tmp_path)
    last, early = tmp_path / 'last.pth.tar', tmp_path / 'early'
    if how == 'none ranked':
        saver.save_position(Position(0, 5))
        shutil.copy(last, early)
    for epoch, metric in enumerate((30.0, 10.0, 40.0)):
        saver.save_epoch(Position(epoch + 1), metric)
        if epoch == 1 and how != 'none ranked':
            if how == 'within an epoch':
                saver.save_position(Position(2, 5))
            shutil.copy(last, early)
    best = [tmp_path / f'model_best.{form}' for form in ('pth.tar', 'safetensors')]
    abandoned, exported = [path.read_bytes() for path in best], (tmp_path / 'last.safetensors').read_bytes()
    first = (tmp_path / 'checkpoint-0.pth.tar').read_bytes()
    if how == 'damaged':  # the last, which is `model_best` and checkpoint-2 too
        change(last, 'half')
    else:
        early.replace(last)
    if how == 'gone':
        (tmp_path / 'checkpoint-0.pth.tar').unlink()
    again = saver_of(run := run_of(*flags), tmp_path)
    resume(run_folder.find_resume('auto', tmp_path), run, again)
    assert again.best_epoch == {'none ranked': None, 'gone': 1}.get(how, 0)
    said = [record.getMessage() for record in caplog.records if 'no part of what this run goes on from' in record.msg]
    behind = range(0 if how == 'none ranked' else 2, 3)
    names = ('model_best', *(f'checkpoint-{epoch}' for epoch in behind), *['previous'] * (how == 'none ranked'))
    ending = 'damaged' if how == 'damaged' else 'before'
    assert {path.name for path in tmp_path.glob(f'*.{ending}')} >= {f'{name}.pth.tar.{ending}' for name in names}
    assert len(said) == 2 + (how != 'damaged') * len(names)  # the weights alone of the last and the best epoch
    assert (tmp_path / 'last.safetensors.before').read_bytes() == exported
    assert (tmp_path / 'last.safetensors').exists() == (how not in ('within an epoch', 'none ranked'))
    assert best[1].with_name(f'{best[1].name}.before').read_bytes() == abandoned[1]
    if how != 'damaged':
        assert best[0].with_name(f'{best[0].name}.before').read_bytes() == abandoned[0]
    if how == 'none ranked':
        assert not any(path.exists() for path in best)
    elif how == 'gone':
        assert best[0].samefile(tmp_path / 'checkpoint-1.pth.tar') and contents.stored_metric(best[1]) == 10
    else:
        assert best[0].read_bytes() == first
        assert contents.stored_metric(best[1]) == 30 and load_file(best[1]).keys() == {'weight', 'bias'}
    resume(run_folder.find_resume('auto', tmp_path), run := run_of(*flags), saver_of(run, tmp_path))
    assert [path.exists() for path in best] == [how != 'none ranked'] * 2
    assert sum('no part of' in record.getMessage() for record in caplog.records) == len(said)  # once


def test_a_ranking_that_begins_anew_replaces_nothing_of_the_one_before(tmp_path, caplog):
    """With other classes the run takes the weights alone: the best of the classes before is not that of these."""
    saver = saver_of(run_of(), tmp_path)
    for epoch, metric in enumerate((10.0, 30.0)):
        saver.save_epoch(Position(epoch + 1), metric)
    names = [f'model_best.{form}' for form in ('pth.tar', 'safetensors')]
    before = {name: (tmp_path / name).read_bytes() for name in names}
    first = (tmp_path / 'checkpoint-0.pth.tar').read_bytes()
    run = run_of('--no-resume-opt')
    run.epochs = 3
    again = checkpoint.Saver(run, settings_of().flat(), ['a', 'zz'], tmp_path)
    found = run_folder.find_resume('auto', tmp_path)
    position = checkpoint.resume(found, run, settings_of().flat(), again, ['a', 'zz'])
    assert again.best_epoch is None and position.epoch == 2
    assert sum(' it is ' in record.getMessage() for record in caplog.records) == len(names)
    again.save_epoch(position.next_epoch(), 5.0)
    assert contents.read_checkpoint(tmp_path / 'model_best.pth.tar')['metric'] == 5
    assert {path.name for path in tmp_path.glob('*.before')} == {f'{name}.before' for name in names}
    assert {name: (tmp_path / f'{name}.before').read_bytes() for name in before} == before
    assert (tmp_path / 'checkpoint-0.pth.tar').read_bytes() == first


def test_a_resume_where_one_side_alone_names_its_classes_is_told(tmp_path, caplog):
    saver_of(run_of(), tmp_path).save_epoch(Position(1), 10.0)
    for here, told in ((['a', 'b'], 0), (None, 1)):
        caplog.clear()
        checkpoint.resume([tmp_path / 'last.pth.tar'], run_of(), settings_of().flat(), None, here)
        assert caplog.text.count('nothing says what the classes of this data are called') == told


def test_a_ranking_that_has_no_epoch_to_come_leaves_the_best_of_the_one_before(tmp_path):
    saver_of(run_of(), tmp_path).save_epoch(Position(3), 10.0)
    before = contents_of(tmp_path)
    run = run_of('--no-resume-opt')
    again = checkpoint.Saver(run, settings_of().flat(), ['a', 'zz'], tmp_path)
    checkpoint.resume([tmp_path / 'last.pth.tar'], run, settings_of().flat(), again, ['a', 'zz'])
    assert contents_of(tmp_path) == before


@pytest.mark.parametrize('left', ['checkpoint-0', 'previous', 'weights', 'last', 'within'])
def test_a_best_checkpoint_that_is_missing_is_made_of_what_is_left(tmp_path, caplog, left):
    """A folder to which only some files were copied ends with a `model_best`, the one that the run names."""
    first = saver_of(run_of(), tmp_path)
    for epoch, metric in enumerate((30.0, 10.0)):
        first.save_epoch(Position(epoch + 1), metric)
    if left == 'within':
        first.save_position(Position(2, 5))
    folder = tmp_path / 'copy'
    folder.mkdir()
    best, weights_alone = folder / 'model_best.pth.tar', folder / 'model_best.safetensors'
    names = dict(weights=weights_alone.name, last='last.pth.tar', within='last.pth.tar')
    for name in {'last.pth.tar', names.get(left, f'{left}.pth.tar')}:
        shutil.copy(tmp_path / name, folder)

    run = run_of()
    saver = saver_of(run, folder)
    resume([folder / 'last.pth.tar'], run, saver)
    if left in ('checkpoint-0', 'previous'):
        assert saver.best_epoch == 0 == contents.read_checkpoint(best)['epoch']
        assert 'model_best.pth.tar is missing: epoch 0, its best, takes its place' in caplog.text
    else:
        assert 'no checkpoint of epoch 0, its best, is left: ' in caplog.text
        assert saver.best_epoch == dict(weights=0, last=1, within=None)[left]
    if left != 'within':
        assert contents.stored_metric(weights_alone) == saver.best_metric
    saver.save_epoch(Position(3), 5.0)
    if left == 'weights':
        assert saver.best_metric == 30 == contents.stored_metric(weights_alone)
    else:
        assert contents.read_checkpoint(best)['metric'] == saver.best_metric == dict(last=10, within=5).get(left, 30)


def test_a_full_disk_is_called_so(saver, tmp_path, monkeypatch):
    """Also where PyTorch or safetensors put an error of their own over the system's. And what was saved before."""

    class Full(io.FileIO):
        def write(self, data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    full = dict(open=lambda name, mode: Full(name, mode))
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, 'open', full['open'], raising=False)
        with pytest.raises(LocalError) as error:
            saver.save_position(Position(0, 3))
    line = f'{tmp_path / "tmp.pth.tar"}: cannot be written (the disk is full: {os.strerror(errno.ENOSPC)}); '
    assert str(error.value) == f'{line}nothing was saved before: make room and start again'
    assert not list(tmp_path.iterdir())

    saver.save_epoch(Position(1), 10.0)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, 'open', full['open'], raising=False)
        with pytest.raises(LocalError) as error:
            saver.save_position(Position(1, 3))
    assert str(error.value) == f'{line}what was saved before is whole: make room and go on with --resume auto'

    def full_safetensors(*args):
        raise SafetensorError('Error while serializing: I/O error: No space left on device (os error 28)')

    monkeypatch.setattr('safetensors.torch.save_file', full_safetensors)
    with pytest.raises(LocalError, match=r'last\.safetensors: cannot be written \(the disk is full: '):
        saver.save_epoch(Position(2), 20.0)


def test_a_folder_that_is_gone_is_called_so(saver, tmp_path):
    folder = tmp_path / 'run'
    folder.mkdir()
    saver = saver_of(run_of(), folder)
    saver.save_epoch(Position(1), 10.0)
    folder.rename(tmp_path / 'renamed')
    with pytest.raises(LocalError, match='; the folder is gone: bring it back with what was saved in it'):
        saver.save_epoch(Position(2), 20.0)
    assert not folder.exists() and contents.read_checkpoint(tmp_path / 'renamed' / 'last.pth.tar')['epoch'] == 0


def test_too_many_open_files_while_a_run_saves(saver, tmp_path):
    """A process that can open no more, not even the folder to look what was saved."""

    def save():
        saver.save_epoch(Position(1), 10.0)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
        with pytest.raises(LocalError) as error:
            saver.save_epoch(Position(2), 20.0)
        line = 'Too many open files, see ulimit -n); what was saved before is whole: raise the number of open files'
        os._exit(line not in str(error.value))

    child = multiprocessing.get_context('fork').Process(target=save)
    child.start()
    child.join()
    assert child.exitcode == 0
    assert contents.read_checkpoint(tmp_path / 'last.pth.tar')['epoch'] == 0


def test_what_a_run_did_not_write_is_not_removed(tmp_path):
    own = ['mine.pth.tar', 'checkpoint-mine.pth.tar', 'teacher.safetensors', 'args.yaml']
    written = ['last.pth.tar', 'previous.pth.tar', 'model_best.pth.tar', 'checkpoint-7.pth.tar']
    exported = ['last.safetensors', 'model_best.safetensors']
    for name in (*own, *written, *exported):
        (tmp_path / name).touch()
    (tmp_path / 'checkpoint-8.pth.tar').mkdir()
    remove_checkpoints(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*own, *exported, 'checkpoint-8.pth.tar'}
    remove_checkpoints(tmp_path, weights=True)
    assert {path.name for path in tmp_path.iterdir()} == {*own, 'checkpoint-8.pth.tar'}


def test_fewer_kept_checkpoints_cost_no_better_one(tmp_path):
    """A resumed run that keeps one ranks by the best alone; timm would make room for a worse one."""
    saver = saver_of(run_of('--checkpoint-hist', '4'), tmp_path)
    for epoch, metric in enumerate((40.0, 30.0, 20.0)):
        saver.save_epoch(Position(epoch + 1), metric)
    run = run_of('--checkpoint-hist', '1')
    saver = saver_of(run, tmp_path)
    assert resume([tmp_path / 'last.pth.tar'], run, saver).epoch == 3
    saver.save_epoch(Position(4), 35.0)
    assert {path.name for path in tmp_path.glob('checkpoint-*')} == {
        f'checkpoint-{epoch}.pth.tar' for epoch in range(3)
    }
    saver.save_epoch(Position(5), 50.0)
    assert {path.name for path in tmp_path.glob('checkpoint-*')} == {
        f'checkpoint-{epoch}.pth.tar' for epoch in (1, 2, 4)
    }


def test_the_best_that_is_left_may_be_the_one_before_the_last(tmp_path):
    first = saver_of(run_of(), tmp_path)
    for epoch, metric in enumerate((30.0, 20.0, 10.0)):
        first.save_epoch(Position(epoch + 1), metric)
    folder = tmp_path / 'copy'
    folder.mkdir()
    for name in ('last.pth.tar', 'previous.pth.tar'):
        shutil.copy(tmp_path / name, folder)
    run = run_of()
    saver = saver_of(run, folder)
    resume([folder / 'last.pth.tar'], run, saver)
    assert (saver.best_epoch, saver.best_metric) == (1, 20)
    assert contents.read_checkpoint(folder / 'model_best.pth.tar')['metric'] == 20


@pytest.mark.parametrize('name', ['lamb', 'adan', 'adamw'])
def test_an_optimizer_of_which_each_update_was_skipped_has_no_state(name):
    """As at the beginning of float16. With --no-resume-opt an optimizer begins after other updates."""
    optimizer = create_optimizer_v2(torch.nn.Linear(2, 2), name)
    for updates in (1, 7):
        fit_state(optimizer.state_dict(), optimizer, updates, 1)
    with pytest.raises(ValueError, match=r'its step is missing|it lacks the state of the optimizer'):
        fit_state(optimizer.state_dict(), optimizer, 1, 0)


def test_fewer_kept_checkpoints_cost_none_of_before(tmp_path):
    """The last epoch of before is ranked as it was."""
    saver = checkpoint.Saver(run_of(), settings_of().flat(), None, tmp_path)
    for epoch, metric in enumerate((10.0, 30.0)):
        saver.save_epoch(Position(epoch + 1), metric)
    before = contents_of(tmp_path)
    run = run_of('--checkpoint-hist', '1')
    saver = saver_of(run, tmp_path)
    resume([tmp_path / 'last.pth.tar'], run, saver)
    assert contents_of(tmp_path) == before and saver.max_history == len(saver.checkpoint_files) == 1


def test_a_checkpoint_that_cannot_take_its_place_is_a_line(saver, tmp_path, monkeypatch):
    """As where the file that is there is protected."""
    saver.save_epoch(Position(1), 10.0)
    replace = os.replace

    def refused(source, place):
        if str(place).endswith('last.pth.tar'):
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        replace(source, place)

    monkeypatch.setattr(checkpoint.os, 'replace', refused)
    with pytest.raises(LocalError, match=r'last\.pth\.tar: cannot be written \(Operation not permitted\); what'):
        saver.save_epoch(Position(2), 20.0)


def test_a_run_whose_lock_was_removed_leaves_the_folder_to_the_next(saver, tmp_path):
    lock = tmp_path / 'run' / '.lock'
    with run_folder.locked_folder(lock.parent):
        first = saver_of(run_of(), lock.parent)
        about = lock.stat()
        lock.unlink()
        first.check_folder()
        lock.write_bytes(b'')
        os.utime(lock, ns=(about.st_atime_ns, about.st_mtime_ns))
        first.check_folder()  # as a network disk that has numbered its files anew
        with run_folder.locked_folder(lock.parent), pytest.raises(LocalError, match='lock of this run was removed'):
            first.check_folder()


def test_a_run_leaves_the_folder_alone_that_took_the_place_of_its_own(saver, tmp_path):
    """Somebody moved the folder of a run that goes on, and began another run of that name."""
    folder = tmp_path / 'run'
    with run_folder.locked_folder(folder):
        moved = saver_of(run_of(), folder)
    moved.check_folder()
    folder.rename(tmp_path / 'old')
    moved.check_folder()  # that nothing can be written says the write
    folder.mkdir()
    again = saver_of(run_of(), folder)
    again.place = moved.place
    again.check_folder()  # nothing is there
    (folder / 'summary.csv').touch()
    again.check_folder()  # it may be what this run has written since
    with pytest.raises(LocalError, match='this run began in another folder'):
        moved.check_folder()
    shutil.copy2(tmp_path / 'old' / '.lock', folder)
    moved.check_folder()  # as a network disk that was mounted anew
    os.utime(folder / '.lock', (1, 1))
    with pytest.raises(LocalError, match='this run began in another folder of that name, which was moved or removed'):
        moved.check_folder()


def test_kept_checkpoints_are_tried_from_the_newest_epoch_on(tmp_path):
    """Whatever times a copy gave them."""
    for age, epoch in enumerate((9, 10, 2)):
        path = tmp_path / f'checkpoint-{epoch}.pth.tar'
        path.touch()
        os.utime(path, (1e9 - age, 1e9 - age))
    assert [path.name for path in run_folder.checkpoints_in(tmp_path)] == [
        f'checkpoint-{epoch}.pth.tar' for epoch in (10, 9, 2)
    ]
