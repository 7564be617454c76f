"""The converted network is nearer to the softmax network than any other start that the experiment tries."""

import argparse
import math

import pytest
import timm
import torch

pytest.importorskip('sklearn')
from programs import load_program

from evavit.errors import run_script

example = load_program('experiments/softmax_to_eva/run.py')

SMALL = {**example.DIGITS, 'embed_dim': 48, 'depth': 2, 'num_heads': 2}


@pytest.mark.filterwarnings('ignore')
def test_the_table_at_a_small_size(tmp_path):
    images, labels = example.digits()
    assert images.shape == (1797, 1, 32, 32) and labels.max() == 9
    softmax = timm.create_model('softmax_deit_tiny', **SMALL)
    example.train(softmax, images[:480], labels[:480], epochs=2)
    args = argparse.Namespace(results_file=tmp_path / 'rows.csv', label='small', seed=0)
    with torch.no_grad():
        rows = {
            row['start']: row for row in example.table(args, softmax, SMALL, example.WINDOW, images[-40:], labels[-40:])
        }
    ours = rows['**linear summary, as converted**']
    for other in ('as from nothing', 'the same, no count of tokens in the bias'):
        assert ours['attention'] < rows[other]['attention'], other
    assert len((tmp_path / 'rows.csv').read_text().splitlines()) == len(rows) + 1
    assert rows['softmax']['attention'] == 0 < ours['attention']


def test_a_file_of_a_softmax_vit(tmp_path):
    model = timm.create_model(
        'vit_tiny_patch16_224',
        embed_dim=64,
        num_heads=1,
        depth=1,
        img_size=64,
        patch_size=8,
        num_classes=0,
        init_values=0.1,
    )
    torch.save(model.state_dict(), tmp_path / 'vit.pth')
    softmax, sizes, photographs = example.from_file(str(tmp_path / 'vit.pth'))
    assert sizes['depth'] == 1 and photographs.shape == (8, 3, 112, 112)
    assert torch.equal(softmax.blocks[0].ls1.gamma, model.blocks[0].ls1.gamma)


@pytest.mark.filterwarnings('ignore')
def test_a_pyramid():
    sizes = {**example.PYRAMID, 'embed_dims': (16, 32, 48, 64), 'mlp_ratios': (2, 2, 2, 2)}
    softmax = timm.create_model('pvt_v2_b3', **sizes).eval()
    args = argparse.Namespace(results_file=None)
    images, labels = torch.randn(4, 1, 64, 64), torch.arange(4)
    with torch.no_grad():
        rows = {row['start']: row for row in example.table(args, softmax, sizes, example.WINDOW, images, labels)}
    # What timm's convolutions on keys and values did is lost to softmax attention too.
    assert rows['softmax, keys and values not shortened']['attention'] > 0.1
    assert len(rows) == 13 and all(row['attention'] < 2 for row in rows.values())


def told(capsys, *flags):
    assert run_script(example.main, list(map(str, flags))) == 2
    err = capsys.readouterr().err
    assert err.startswith('error: ') and err.count('\n') == 1
    return err


def test_weights_that_are_none_are_a_line(tmp_path, capsys):
    torch.save(dict(weight=torch.ones(2)), tmp_path / 'other.pth')
    assert 'no softmax ViT' in told(capsys, '--weights', tmp_path / 'other.pth')
    (tmp_path / 'cut.pth').write_bytes((tmp_path / 'other.pth').read_bytes()[:300])
    assert 'not a readable checkpoint' in told(capsys, '--weights', tmp_path / 'cut.pth')
    sizes = dict(embed_dim=64, num_heads=1, depth=1, img_size=64, patch_size=8, num_classes=0)
    state = timm.create_model('vit_tiny_patch16_224', **sizes).state_dict()
    torch.save(state | {'norm.weight': state['norm.weight'] * math.nan}, tmp_path / 'nan.pth')
    assert 'its weights are not finite (norm.weight' in told(capsys, '--weights', tmp_path / 'nan.pth')
    # a name of the file asks for no more blocks than it has
    torch.save(state | {'blocks.900000.norm1.bias': state['norm.bias']}, tmp_path / 'blocks.pth')
    assert 'no softmax ViT' in told(capsys, '--weights', tmp_path / 'blocks.pth')


def test_rows_of_other_columns_stay(tmp_path, capsys):
    (tmp_path / 'mine.csv').write_text('name,age\nA,3\n')
    assert 'has other columns' in told(capsys, '--results-file', tmp_path / 'mine.csv')
    assert (tmp_path / 'mine.csv').read_text() == 'name,age\nA,3\n'
