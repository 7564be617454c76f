import json
import logging

import pytest
import timm
import torch

import evavit  # noqa: F401
from evavit.convert import (
    PUBLISHED_EVA_KWARGS,
    PUBLISHED_PERFORMER_KWARGS,
    convert_published_eva,
    is_published_eva,
)
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


# Arguments of our models for the settings in the files' metadata.
PUBLISHED = {
    'softmax': {},
    'local': dict(window_size=4),
    'lara': dict(landmark_grid=4),  # all else is the default
    'scatterbrain': dict(window_size=4, num_features=32),
    'performer': dict(num_features=32, **PUBLISHED_PERFORMER_KWARGS),
}


def published_model(metadata, **kwargs):
    name = json.loads(metadata['attention'])['name']
    return timm.create_model(f'{name}_deit_tiny', **json.loads(metadata['model']), **PUBLISHED[name], **kwargs)


@pytest.mark.parametrize('name', PUBLISHED)
def test_published_attentions(golden, name):
    tensors, state, metadata = golden(f'published_{name}_tiny_p8_depth2')
    check(published_model(metadata), eva_deit.checkpoint_filter_fn, tensors, state)


def test_lara_as_launched_is_the_default(golden):
    """The settings in the file, of which each one counts."""
    tensors, state, metadata = golden('published_lara_tiny_p8_depth2')
    settings = json.loads(metadata['attention'])
    assert (settings['proposal_gen'], settings['alpha_coeff']) == ('pool-mixed', 2.0)
    for other in (dict(alpha_coeff=1.0), dict(landmark_mixing=False), dict(weighting='balance')):
        model = published_model(metadata, **other).eval()
        model.load_state_dict(state)
        with torch.no_grad():
            error = (model(tensors['input']) - tensors['output']).norm() / tensors['output'].norm()
        assert error > 1e-4, other


@pytest.mark.parametrize('name', ['scatterbrain', 'performer'])
def test_published_directions_are_used_and_kept(golden, name, tmp_path):
    _, state, metadata = golden(f'published_{name}_tiny_p8_depth2')
    model = published_model(metadata).eval()
    seeds = {key: value.clone() for key, value in model.named_buffers() if key.endswith('directions.fixed')}
    own = {key: value.clone() for key, value in model.state_dict().items()}
    model.load_state_dict(state)
    for i in range(2):
        assert torch.equal(model.blocks[i].attn.directions.fixed, state[f'blocks.{i}.attn.eval_proj'])
    torch.save(model.state_dict(), tmp_path / 'ours.pth')
    again = published_model(metadata, checkpoint_path=str(tmp_path / 'ours.pth')).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
    again.load_state_dict(own)  # of a run of ours, which evaluates with the seed's
    for key, value in seeds.items():
        assert torch.equal(again.get_buffer(key), value)


def test_another_number_of_directions_is_one_line(golden):
    _, state, metadata = golden('published_scatterbrain_tiny_p8_depth2')
    model = timm.create_model('scatterbrain_deit_tiny', **json.loads(metadata['model']), window_size=4)
    with pytest.raises(RuntimeError, match=r'directions.fixed of 2×32×32, the model 2×96×32; .*features') as error:
        model.load_state_dict(state)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('kwargs, warned', [({}, True), (PUBLISHED_EVA_KWARGS, False)])
def test_published_eva_weights_ask_for_their_proposal(kwargs, warned, caplog):
    model = timm.create_model('eva_deit_tiny', depth=1, embed_dim=32, num_heads=2, **kwargs)
    state = {
        name.replace('summary_q.proj.', 'adaptive_mu_q.0.')
        .replace('summary_q.norm.', 'adaptive_mu_q.1.')
        .replace('summary_k.proj.', 'adaptive_mu_k.0.')
        .replace('summary_k.norm.', 'adaptive_mu_k.1.')
        .replace('rel_pos.relative', 'local_relative'): torch.zeros(97, 2) if 'table' in name else value
        for name, value in model.state_dict().items()
    }
    with caplog.at_level(logging.WARNING, 'evavit'):
        model.load_state_dict(state)
    asked = [record.getMessage() for record in caplog.records if 'create it with that' in record.getMessage()]
    assert bool(asked) == warned
    assert not warned or 'proposal_scale=0.5, this model has 1.0' in asked[0]


@pytest.mark.parametrize('kwargs, warned', [({}, True), (PUBLISHED_PERFORMER_KWARGS, False)])
def test_published_performer_weights_ask_for_their_features(golden, kwargs, warned, caplog):
    _, state, metadata = golden('published_performer_tiny_p8_depth2')
    with caplog.at_level(logging.WARNING, 'evavit'):
        timm.create_model(
            'performer_deit_tiny', **json.loads(metadata['model']), num_features=32, **kwargs
        ).load_state_dict(state)
    assert ('feature_kind=stabilised, this model has positive' in caplog.text) == warned
