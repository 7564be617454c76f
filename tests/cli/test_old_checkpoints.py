"""What the code before the sections of settings wrote (tests/data/run_before) is read, and gone on from, alike.

The old code ran `FLAGS`, was stopped in epoch 1 after update 4 of 6 (stopped/), and resumed to the end (finished/).
`logits.safetensors` holds images and what its `timm.create_model` made of them with the averaged weights of finished/.
"""

import shutil
from pathlib import Path

import pytest
import safetensors
import timm
import torch
from runs import CLASSES, rows, weights, words, write_images

from evavit.training import contents
from evavit.training.config import parse_settings

DATA = Path(__file__).parents[1] / 'data' / 'run_before'
KWARGS = dict(
    img_size=16, patch_size=4, embed_dim=8, depth=1, num_heads=2, window_size=2, partition_grid=2, mlp_ratio=2
)
FLAGS = [
    *('--model', 'eva_deit_tiny', '--model-kwargs', *(f'{key}={value}' for key, value in KWARGS.items())),
    *words('-b 4 --epochs 3 --warmup-epochs 1 --lr 1e-3 --workers 0 --device cpu --log-interval 1 --mixup 0.8'),
    *words('--cutmix 1 --reprob 0.25 --drop-path 0.2 --model-ema --model-ema-decay 0.9 --sched-on-updates'),
    *words('--clip-grad 1 --seed 7 --data-dir images --output runs --experiment old --resume auto'),
]


def same_machine():
    """Whether arithmetic here rounds as where the files were written: the same PyTorch on the same kind of CPU."""
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        return False
    vendor = next((line.split(':')[1].strip() for line in lines if line.startswith('vendor_id')), '')
    with safetensors.safe_open(DATA / 'logits.safetensors', 'pt') as file:
        about = file.metadata()
    return about == dict(torch=torch.__version__, cpu=f'{torch.backends.cpu.get_cpu_capability()} {vendor}')


def assert_same(ours, theirs, exact):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if exact:
            assert ours[name].dtype == value.dtype and torch.equal(ours[name], value), name
        else:
            torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-4)


def content(path):
    """The tensors of a checkpoint under flat names, and what else it holds, without what tells of time."""
    saved = torch.load(path, weights_only=False)
    tensors = {f'weights {name}': value for name, value in saved.pop('state_dict').items()}
    tensors |= {f'average {name}': value for name, value in saved.pop('state_dict_ema').items()}
    for number, state in saved['optimizer'].pop('state').items():
        tensors |= {f'optimizer {number} {name}': value for name, value in state.items()}
    for timed in ('seconds', 'waited'):
        del saved['saver']['position'][timed]
    return tensors, saved


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The folder that the run was made in, with its images."""
    write_images(tmp_path / 'images' / 'train', dict.fromkeys(CLASSES, 8))
    write_images(tmp_path / 'images' / 'val', dict(zip(CLASSES, (5, 4, 4), strict=True)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    'begun, flags',
    [(True, []), (False, []), (False, ['--num-classes', '3'])],
    ids=['resumed', 'from the seed', 'classes given'],
)
def test_a_run_ends_as_it_did(place, call, begun, flags):
    """The initial weights for a seed are the same too: the run from the start ends where the old one ended. With the
    classes given the model is built before the data is opened."""
    folder = place / 'runs' / 'old'
    if begun:
        shutil.copytree(DATA / 'stopped', folder)
    code, out, err = call('train', *FLAGS, *flags)
    assert code == 0 and ('resuming from runs/old/last.pth.tar: epoch 1, update 4 of 6' in out) == begun, out + err
    exact = same_machine()
    (ours, other), (theirs, before) = (content(path / 'last.pth.tar') for path in (folder, DATA / 'finished'))
    assert_same(ours, theirs, exact)
    assert_same(weights(folder / 'last.safetensors'), weights(DATA / 'finished' / 'last.safetensors'), exact)
    settings, known = vars(other.pop('args')), vars(before.pop('args'))
    assert settings | known == settings, 'settings that have come since are all that may differ'
    assert other['saver']['plan'].pop('images') == 24  # this too
    assert list(other) == list(before)
    ours, theirs = rows(folder), rows(DATA / 'finished')
    assert [list(row) for row in ours] == [list(row) for row in theirs]
    if exact:
        assert ours == theirs and other == before
    for one, old in zip(ours, theirs, strict=True):
        assert [float(value) for value in one.values()] == pytest.approx(
            [float(value) for value in old.values()], rel=1e-3
        )
    now, then = ((path / 'args.yaml').read_text().splitlines() for path in (folder, DATA / 'stopped'))
    assert [line for line in now if line in then] == then


def test_every_file_loads_as_it_was_written():
    for path in (*DATA.glob('*/*.pth.tar'), *DATA.glob('*/*.safetensors')):
        model = timm.create_model('eva_deit_tiny', num_classes=3, **KWARGS)
        settings, given = parse_settings('validate', ['--checkpoint', str(path)])
        assert contents.complete_from_checkpoint(settings, given) == sorted(CLASSES)
        contents.load_checkpoint(model, settings.weights)
        saved = weights(path) if path.suffix == '.safetensors' else torch.load(path, weights_only=False)['state_dict']
        assert_same(model.state_dict(), saved, exact=True)


def test_the_logits_are_those_before():
    with safetensors.safe_open(DATA / 'logits.safetensors', 'pt') as file:
        images, logits = file.get_tensor('images'), file.get_tensor('logits')
    model = timm.create_model('eva_deit_tiny', num_classes=3, **KWARGS).eval()
    model.load_state_dict(weights(DATA / 'finished' / 'last.safetensors'))
    with torch.no_grad():
        torch.testing.assert_close(model(images), logits)
        for module in model.modules():
            if hasattr(module, 'fused_attn'):
                module.fused_attn = False  # as before: inference on a CPU has a path of its own
        assert_same(dict(logits=model(images)), dict(logits=logits), same_machine())
