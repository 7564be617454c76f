"""The weight of each token's value in what a query gets, of any attention that is linear in its values."""

from typing import Callable, Optional

import torch

__all__ = ['attention_rows']


def attention_rows(
    attend: Callable[[torch.Tensor], torch.Tensor], v: torch.Tensor, queries: Optional[torch.Tensor] = None
) -> torch.Tensor:
    """Rows of the matrix A of an attention with `attend(v) = A v` in each head.

    EVA gives the weight w_c of a cell to its tokens as its control variate weighs their values:

        y_n = Σ_m w_nm v_m + Σ_c w_nc β_c,  β_c = Σ_m softmax_m(log ξ_cm) v_m
        A_nm = w_nm + Σ_c w_nc softmax_m(log ξ_cm)

    A is read off as a derivative and not put together again from such terms, so that it is the one that the code
    computes, of every attention alike: channel j of the output for query n is Σ_m A_nm v_mj, and its gradient by
    channel j of the values is row n. One backward pass gives as many rows as a head has channels.

    Args:
        attend: From values to output, both `(B, h, T, d)`, differentiable. Heads, images and channels do not mix.
        v: Values `(B, h, T, d)`; A does not depend on what they are.
        queries: Numbers of the tokens to give rows for, int64 `(Q)`; or weights `(Q, T)` with which rows are added up,
            as for a mean, at the price of one row each; None for all T.

    Returns:
        `(B, h, Q, T)` in v's dtype, without a gradient.
    """
    if queries is None:
        queries = torch.arange(v.shape[2])
    rows = []
    with torch.inference_mode(False), torch.enable_grad():
        v = v.detach().clone().requires_grad_()
        out = attend(v)
        for some in queries.to(v.device).split(v.shape[3]):
            one_each = torch.zeros_like(out)
            if some.dim() == 2:
                one_each[..., : len(some)] = some.T.to(out.dtype)
            else:
                one_each[:, :, some, torch.arange(len(some), device=v.device)] = 1.0
            (grad,) = torch.autograd.grad(out, v, one_each, retain_graph=True)
            rows.append(grad[..., : len(some)].transpose(-2, -1))
    return torch.cat(rows, 2)
