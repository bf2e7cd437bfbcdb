"""Weights of unit length (``normalize_weight``), for the backends that have no kernel of their own for them."""

from __future__ import annotations

import torch
from torch import Tensor

from bcos_kernels import reference
from bcos_kernels.contract import Options, accumulator


def unit_rows(weight: Tensor, options: Options) -> Tensor:
    """``weight``, or ``w / ||w||`` for every output row; computed in the accumulator's dtype and rounded once."""
    if not options.normalize_weight:
        return weight
    return reference.unit_rows(weight.to(accumulator(weight.dtype))).to(weight.dtype)


def unit_rows_backward(dunit: Tensor, weight: Tensor, options: Options) -> Tensor:
    """Through ``w / ||w||``: what is orthogonal to the unit row, divided by its length."""
    if not options.normalize_weight:
        return dunit
    rows, drows = (t.to(accumulator(weight.dtype)).flatten(1) for t in (weight, dunit))
    lengths = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    unit = rows / lengths
    return ((drows - unit * (drows * unit).sum(1, keepdim=True)) / lengths).view_as(weight).to(weight.dtype)
