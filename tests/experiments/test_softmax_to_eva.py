"""The converted network is nearer to the softmax network than any other start that the experiment tries."""

import argparse
import math

import pytest
import timm
import torch

pytest.importorskip('sklearn')
from programs import load_program

import evavit
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
        models = example.starts(softmax, SMALL, example.WINDOW)
        rows = {row['start']: row for row in example.table(args, softmax, models.items(), images[-40:], labels[-40:])}
    ours = rows[example.AS_CONVERTED]
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
        models = example.starts(softmax, sizes, example.WINDOW).items()
        rows = {row['start']: row for row in example.table(args, softmax, models, images, labels)}
    # What timm's convolutions on keys and values did is lost to softmax attention too.
    assert rows['softmax, keys and values not shortened']['attention'] > 0.1
    assert len(rows) == 13 and all(row['attention'] < 2 for row in rows.values())


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('kind', example.CONVERTED)
def test_networks_with_a_class_token(kind, tmp_path):
    torch.manual_seed(0)
    name, more, label = example.CONVERTED[kind]
    vit = timm.create_model(name, **SMALL, **more)
    images, labels = example.digits()
    example.train(vit, images[:480], labels[:480], epochs=2)
    assert vit.num_prefix_tokens == 1 and (kind == 'eva02') == (getattr(vit, 'rope', None) is not None)
    args = argparse.Namespace(results_file=tmp_path / 'rows.csv', label=label, seed=0)
    images, labels = images[-40:], labels[-40:]
    with torch.no_grad():
        softmax = evavit.convert_vit(vit, attention='softmax')
        torch.testing.assert_close(softmax(images), vit(images), rtol=1e-4, atol=1e-4)
        models = example.conversions(vit, example.WINDOW)
        whole = evavit.convert_vit(vit, window_size=8, partition_grid=4)  # is the network itself
        models.append(('whole', whole))
        rows = {(row['start'], row['count_cells']): row for row in example.table(args, softmax, models, images, labels)}
    assert rows['softmax', '']['top1'] == 100 * (vit(images).argmax(1) == labels).float().mean()
    assert rows['whole', 'outside']['attention'] < 1e-4 > rows['whole', 'outside']['output']
    ours = rows[example.AS_CONVERTED, 'outside']
    assert 0.01 < ours['attention'] < rows['as from nothing', 'outside']['attention']
    assert ours['attention'] < rows[example.AS_CONVERTED, 'one']['attention']
    stored = example.read_rows(tmp_path / 'rows.csv', example.COLUMNS)
    assert len(stored) == len(rows) == 2 + 3 * 6 and {row['weights'] for row in stored} == {label}
    assert all(row[column] for row in stored for column in example.ORIGIN)


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


def test_two_networks_at_once_are_a_line(capsys):
    assert 'give one of them' in told(capsys, '--pyramid', '--convert', 'vit')


def test_rows_of_other_columns_stay(tmp_path, capsys):
    (tmp_path / 'mine.csv').write_text('name,age\nA,3\n')
    assert 'has other columns' in told(capsys, '--results-file', tmp_path / 'mine.csv')
    assert (tmp_path / 'mine.csv').read_text() == 'name,age\nA,3\n'
