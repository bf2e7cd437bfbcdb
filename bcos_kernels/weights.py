"""Weights of unit length (``normalize_weight``), for the backends that have no kernel of their own for them."""

from __future__ import annotations

import torch
from torch import Tensor

from bcos_kernels.contract import Options
from bcos_kernels.ranges import wide


def row_lengths(weight: Tensor) -> Tensor:
    """``||w||`` of every row ``[O, ...]`` of a weight, ``[O, 1]`` in the accumulator's dtype, however long or short.

    Squares of the row's entries over its largest one neither over- nor underflow.
    """
    rows = wide(weight).flatten(1)
    if rows.shape[1] == 0:
        return rows.new_zeros(rows.shape[0], 1)
    largest = rows.abs().amax(1, keepdim=True)
    finite = torch.where(largest > 0, largest, 1)
    return finite * torch.linalg.vector_norm(rows / finite, dim=1, keepdim=True)


def unit_rows(weight: Tensor, options: Options) -> Tensor:
    """``weight``, or ``w / ||w||`` for every output row; computed in the accumulator's dtype and rounded once."""
    if not options.normalize_weight:
        return weight
    return (wide(weight).flatten(1) / row_lengths(weight)).view_as(weight).to(weight.dtype)


def unit_rows_backward(dunit: Tensor, weight: Tensor, options: Options) -> Tensor:
    """Through ``w / ||w||``: what is orthogonal to the unit row, divided by its length."""
    if not options.normalize_weight:
        return dunit
    rows, drows, lengths = wide(weight).flatten(1), wide(dunit).flatten(1), row_lengths(weight)
    unit = rows / lengths
    return ((drows - unit * (drows * unit).sum(1, keepdim=True)) / lengths).view_as(weight).to(weight.dtype)
