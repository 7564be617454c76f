import pytest
import timm
import torch

import evavit  # noqa: F401
from evavit.convert import PUBLISHED_EVA_KWARGS, convert_published_eva, is_published_eva
from evavit.models import eva_deit, eva_pvt_v2


def test_bias_rows_follow_the_published_index():
    window = 7
    old = torch.randn(2 * window**2 - 1, 3)
    new = convert_published_eva({'attn.local_relative_position_bias_table': old})
    new = new['attn.rel_pos.relative_position_bias_table'].view(2 * window - 1, 2 * window - 1, 3)
    for dy in range(1 - window, window):
        for dx in range(1 - window, window):
            row = (dy + window - 1) * window + dx + window - 1
            assert torch.equal(new[dy + window - 1, dx + window - 1], old[row])


def test_a_table_of_another_length_is_refused():
    with pytest.raises(ValueError, match='this one has 96'):
        convert_published_eva({'local_relative_position_bias_table': torch.zeros(96, 3)})


def test_our_own_names_are_not_mistaken_for_published_ones():
    for name in ('eva_deit_tiny', 'eva_pvt_v2_b3'):
        model = timm.create_model(name, device='meta')
        assert not is_published_eva(model.state_dict())


def check(model, filter_fn, tensors, state):
    model.eval()
    model.load_state_dict(filter_fn(state, model))
    with torch.no_grad():
        output = model(tensors['input'])
    assert (output - tensors['output']).norm() <= 1e-5 * tensors['output'].norm()


def test_published_deit(golden):
    tensors, state, metadata = golden('evit_tiny_p16_depth2')
    model = timm.create_model(
        'eva_deit_tiny', depth=int(metadata['depth']), num_classes=int(metadata['num_classes']), **PUBLISHED_EVA_KWARGS
    )
    check(model, eva_deit.checkpoint_filter_fn, tensors, state)


def test_published_pvt(golden):
    tensors, state, metadata = golden('pvt_v2_depth1')
    stages = {
        key: tuple(map(int, metadata[key].split(','))) for key in ('depths', 'embed_dims', 'num_heads', 'mlp_ratios')
    }
    model = timm.create_model(
        'eva_pvt_v2_b3', num_classes=int(metadata['num_classes']), **stages, **PUBLISHED_EVA_KWARGS
    )
    check(model, eva_pvt_v2.checkpoint_filter_fn, tensors, state)


def test_published_weights_come_in_through_create_model(golden, tmp_path):
    from safetensors.torch import save_file

    tensors, state, _ = golden('evit_tiny_p16_depth2')
    save_file(state, tmp_path / 'published.safetensors')
    model = timm.create_model(
        'eva_deit_tiny',
        depth=2,
        num_classes=10,
        pretrained=True,
        **PUBLISHED_EVA_KWARGS,
        pretrained_cfg_overlay=dict(file=str(tmp_path / 'published.safetensors'), num_classes=10),
    )
    with torch.no_grad():
        output = model.eval()(tensors['input'])
    assert (output - tensors['output']).norm() <= 1e-5 * tensors['output'].norm()
