"""Weights of the published EVA code and of softmax models: the public names of `evavit/models/_foreign.py`."""

from evavit.models._foreign import (
    PUBLISHED_EVA_KWARGS,
    PUBLISHED_PERFORMER_KWARGS,
    Change,
    changes_table,
    convert_published_eva,
    convert_softmax,
    is_published_eva,
    linear_summary,
    weight_sources,
)

__all__ = [
    'PUBLISHED_EVA_KWARGS',
    'PUBLISHED_PERFORMER_KWARGS',
    'Change',
    'changes_table',
    'convert_published_eva',
    'convert_softmax',
    'is_published_eva',
    'linear_summary',
    'weight_sources',
]
