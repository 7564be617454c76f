"""examples/knn.py on images whose classes differ in colour."""

import argparse
import re
import shutil

import pytest
import timm
import torch
from safetensors.torch import save_file

pytest.importorskip('sklearn')
from programs import load_program
from runs import CLASSES, write_images

from evavit.errors import UserError, run_script
from evavit.hub import save_folder

MODEL = dict(img_size=16, patch_size=4, embed_dim=16, depth=1, num_heads=2)


def test_neighbours_of_features(tmp_path, capsys):
    example = load_program('examples/knn.py')
    for split in ('train', 'validation'):
        write_images(tmp_path / split, dict.fromkeys(CLASSES, 6))
    flags = [
        '--model',
        'eva_deit_tiny',
        '--model-kwargs',
        *(f'{name}={value}' for name, value in MODEL.items()),
        '--data-dir',
        str(tmp_path),
        '--device',
        'cpu',
        '--workers',
        '0',
        '-k',
        '3',
    ]
    assert run_script(example.main, flags) == 0
    out = capsys.readouterr().out
    # The classes differ in colour, which features of random weights tell as well.
    found = re.search(r'3 nearest of 18 images, 18 judged: top-1 (\S+)  balanced accuracy (\S+)  macro F1 (\S+)', out)
    assert found and float(found[1]) > 80, out
    assert run_script(example.main, [*flags, '--checkpoint', 'last.pth.tar']) == 2
    assert '--checkpoint: knn.py does not take it; weights are given with --weights' in capsys.readouterr().err
    assert run_script(example.main, [*flags[:-1], '19']) == 2
    assert '18 images' in capsys.readouterr().err
    assert run_script(example.main, [*flags, '--weights', str(tmp_path)]) == 2
    assert f'{tmp_path}: is a folder; give a file' in capsys.readouterr().err
    run = tmp_path / 'run'
    run.mkdir()
    save_file(timm.create_model('eva_deit_tiny', **MODEL).state_dict(), run / 'last.safetensors')
    assert run_script(example.main, [*flags, '--weights', str(run)]) == 0
    out = capsys.readouterr().out
    assert f'{run}: last.safetensors of this run' in out and '3 nearest of 18 images' in out
    other = argparse.Namespace(model='eva_deit_tiny', model_kwargs={**MODEL, 'count_cells': 'all'})
    for name, args in (('other', other), ('own', argparse.Namespace(model='eva_deit_tiny', model_kwargs=MODEL))):
        state = timm.create_model('eva_deit_tiny', **args.model_kwargs).state_dict()
        torch.save(dict(state_dict=state, args=args), file := tmp_path / f'{name}.pth.tar')
        assert run_script(example.main, [*flags, '--weights', str(file)]) == 0
        said = ''.join(capsys.readouterr())
        line = f'warning: {file} holds weights of another model than this run makes, eva_deit_tiny'
        assert (line in said) == ('count_cells=all' in said) == (name == 'other'), said
    small = dict(img_size=16, patch_size=4, depth=1, embed_dim=12, num_heads=2)
    vit = timm.create_model('vit_base_patch16_siglip_gap_224', **small).state_dict()
    for name, lacks in (
        ('vit_base_patch16_siglip_gap_224', 'pos_embed'),
        ('vit_base_patch16_siglip_224', 'attn_pool.'),
    ):
        state = {key: value for key, value in vit.items() if key != lacks}
        torch.save(state, file := tmp_path / 'part.pth')
        given = [*flags, '--weights', str(file), '--model', name, '--model-kwargs']
        assert run_script(example.main, [*given, *(f'{key}={value}' for key, value in small.items())]) == 2
        assert f'{file} does not fit the model: it lacks {lacks}' in capsys.readouterr().err
    folder = save_folder(timm.create_model('eva_deit_tiny', **MODEL), tmp_path / 'mine', data='x', licence='mit')
    place = ['--model', f'local-dir:{folder}', *flags[-8:]]
    assert run_script(example.main, [*place, '--weights', str(folder / 'model.safetensors')]) == 0
    assert '3 nearest of 18 images' in capsys.readouterr().out
    for split in ('train', 'training'):
        assert run_script(example.main, [*flags, '--split', split]) == 2
        assert f'--split {split}: each picture would be its own nearest' in capsys.readouterr().err
    for split in ('train', 'validation'):
        (tmp_path / split / CLASSES[0] / '0.png').write_text('x')
    assert run_script(example.main, flags) == 2
    assert 'is not a readable image' in capsys.readouterr().err
    assert run_script(example.main, [*flags, '--max-bad-images', '0.1']) == 0
    assert '3 nearest of 17 images, 17 judged' in capsys.readouterr().out


def test_a_split_without_an_image_and_features_that_are_not_finite_are_a_line(tmp_path, capsys):
    write_images(tmp_path / 'train', dict.fromkeys(CLASSES, 2))
    write_images(tmp_path / 'validation', dict.fromkeys(CLASSES, 1))
    for path in (tmp_path / 'validation').glob('*/*'):
        path.write_bytes(b'no image')
    flags = ['--model', 'eva_deit_tiny', '--model-kwargs', *(f'{name}={value}' for name, value in MODEL.items())]
    flags += ['--data-dir', str(tmp_path), '--device', 'cpu', '--workers', '0', '-k', '3', '--max-bad-images', '1']
    assert run_script(load_program('examples/knn.py').main, flags) == 2
    err = capsys.readouterr().err
    assert 'error: --split validation: none of its images can be read; give another' in err
    shutil.copytree(tmp_path / 'train', tmp_path / 'validation', dirs_exist_ok=True)
    state = timm.create_model('eva_deit_tiny', **MODEL).state_dict()
    save_file({key: value * 1e30 for key, value in state.items()}, tmp_path / 'w.safetensors')
    assert run_script(load_program('examples/knn.py').main, [*flags, '--weights', str(tmp_path / 'w.safetensors')]) == 2
    assert 'the features of the model are not finite; check its weights' in capsys.readouterr().err


def test_the_seed_divides_a_folder_without_splits(tmp_path, monkeypatch):
    example, seeds = load_program('examples/knn.py'), []
    write_images(tmp_path, dict.fromkeys(CLASSES, 6))

    def judged(settings, *_, seed, **__):
        seeds.append((settings.val_fraction, seed))
        raise UserError('enough')

    monkeypatch.setattr(example.data, 'open_dataset', judged)
    flags = ['--model', 'eva_deit_tiny', '--data-dir', str(tmp_path), '--device', 'cpu', '--val-fraction', '0.5']
    assert run_script(example.main, [*flags, '--seed', '3']) == 2
    assert seeds == [(0.5, 3)]
