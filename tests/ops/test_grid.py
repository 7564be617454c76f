import pytest
import torch
from helpers import grid_cells, grid_windows

from evavit.ops import eva_num_cells
from evavit.ops.grid import band_cells, block_mask, cell_shape, from_blocks, to_bands, to_blocks


@pytest.mark.parametrize('tokens, cells, size', [(14, 7, 2), (28, 7, 4), (56, 7, 8), (24, 6, 4), (13, 7, 2), (1, 1, 1)])
def test_cells_along_an_axis(tokens, cells, size):
    assert cell_shape((tokens, 1), 7) == (size, 1)
    assert eva_num_cells((tokens, 1), 7) == cells == len(grid_cells((tokens, 1), 7))


@pytest.mark.parametrize('feat_size', [(14, 14), (13, 9), (7, 50), (1, 1), (5, 3)])
@pytest.mark.parametrize('block', [(1, 1), (4, 4), (7, 7), (2, 5)])
def test_blocks_and_back(feat_size, block):
    H, W = feat_size
    x = torch.arange(1.0, 1 + 2 * 3 * H * W * 4).view(2, H * W, 3, 4).transpose(1, 2)
    blocks = to_blocks(x, feat_size, block)
    mask = block_mask(feat_size, block, x.device)
    if mask is None:
        assert blocks.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()  # a view
    else:
        assert mask.sum() == H * W
        assert (blocks.movedim((0, 1), (-3, -2))[~mask] == 0).all()
    assert torch.equal(from_blocks(blocks, feat_size), x)


@pytest.mark.parametrize('feat_size', [(14, 14), (13, 9), (5, 3)])
def test_blocks_hold_the_tokens_of_the_definition(feat_size):
    H, W = feat_size
    x = torch.arange(H * W).view(1, 1, -1, 1)
    blocks = to_blocks(x, feat_size, (4, 4))[0, 0, ..., 0].transpose(1, 2).flatten(2).flatten(0, 1)
    mask = block_mask(feat_size, (4, 4), x.device)
    is_token = torch.ones_like(blocks).bool() if mask is None else mask.transpose(1, 2).flatten(2).flatten(0, 1)
    windows = [block[real].tolist() for block, real in zip(blocks, is_token, strict=True)]
    assert windows == grid_windows(feat_size, 4)


@pytest.mark.parametrize('feat_size', [(14, 14), (13, 9), (5, 3), (1, 1)])
@pytest.mark.parametrize('partition_grid', [1, 3, 7])
def test_bands_hold_the_cells_of_the_definition(feat_size, partition_grid):
    H, W = feat_size
    cell = cell_shape(feat_size, partition_grid)
    x = torch.arange(1.0, 1 + 2 * 3 * H * W * 4).view(2, H * W, 3, 4).transpose(1, 2)
    bands = to_bands(x, feat_size, cell)
    if H % cell[0] == 0:
        assert bands.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()  # a view
    in_cell = band_cells(feat_size, cell, x.device)
    in_cell = in_cell.expand(bands.shape[0] // 2, -1, -1)
    places = torch.arange(in_cell.shape[0] * in_cell.shape[2]).view(in_cell.shape[0], 1, -1).expand_as(in_cell)
    cells = [place[member].tolist() for place, member in zip(places.flatten(0, 1), in_cell.flatten(0, 1), strict=True)]
    assert cells == grid_cells(feat_size, partition_grid)
    tokens = bands.view(2, -1, 12)
    assert torch.equal(tokens[:, : H * W], x.transpose(1, 2).flatten(2))
    assert (tokens[:, H * W :] == 0).all()
