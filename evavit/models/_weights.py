"""What the families share when weights come in."""
from typing import Dict

import torch
from timm.layers import RelPosBias, resize_rel_pos_bias_table
from torch import nn

from evavit.layers.linformer import TokenProjection, resize_token_projection

__all__ = ['fit_bias_tables', 'fit_token_projections']


def fit_bias_tables(state_dict: Dict[str, torch.Tensor], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Resize the relative position bias tables of a checkpoint to the windows of a model."""
    fitted = dict(state_dict)
    for name, module in model.named_modules():
        key = f'{name}.relative_position_bias_table'
        if isinstance(module, RelPosBias) and key in fitted:
            fitted[key] = resize_rel_pos_bias_table(
                fitted[key],
                new_window_size=module.window_size,
                new_bias_shape=module.relative_position_bias_table.shape,
            )
    return fitted


def fit_token_projections(state_dict: Dict[str, torch.Tensor], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Resample Linformer's projections of a checkpoint to the grids of a model."""
    fitted = dict(state_dict)
    for name, module in model.named_modules():
        key = f'{name}.weight'
        if isinstance(module, TokenProjection) and key in fitted:
            fitted[key] = resize_token_projection(fitted[key], module.weight.shape[1:])
    return fitted
