"""evavit.list_models: ours alone, with timm's patterns."""

import timm

import evavit
from evavit.models import model_names


def test_all_of_ours_and_none_of_timms():
    ours = evavit.list_models()
    assert sorted(ours) == sorted(model_names()) and ours == [name for name in timm.list_models() if name in ours]
    assert timm.list_models('eva02_*') and not evavit.list_models('eva02_*')
    assert 'eva_large_patch14_196' in timm.list_models('eva_*') and 'eva_large_patch14_196' not in ours


def test_patterns_are_those_of_timm():
    assert evavit.list_models('eva_deit_t*') == ['eva_deit_tiny', 'eva_deit_tiny_784']
    assert evavit.list_models('eva_deit_tiny') == ['eva_deit_tiny'] and evavit.list_models('deit_tiny') == []
    both = evavit.list_models(['lara_deit_t*', 'eva_deit_t*'], exclude_filters='*_784')
    assert both == ['eva_deit_tiny', 'lara_deit_tiny']
    assert both == evavit.list_models('*_deit_tiny', exclude_filters=['[!el]*', 'l[io]*'])
