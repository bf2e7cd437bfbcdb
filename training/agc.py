"""Adaptive gradient clipping (Brock et al., arXiv 2102.06171)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def unit_norm(tensor: Tensor) -> Tensor:
    """Euclidean norm of every unit, in a shape that broadcasts against the tensor.

    A unit is what feeds one output: a row of a `[O, I]` matrix or a filter of a `[O, I, Kh, Kw]` convolution. Tensors
    with at most one dimension longer than 1 (scales, biases) are a single unit.
    """
    one_unit = sum(size > 1 for size in tensor.shape) <= 1
    dims = tuple(range(tensor.ndim)) if one_unit else tuple(range(1, tensor.ndim))
    return torch.linalg.vector_norm(tensor, dim=dims, keepdim=True) if dims else tensor.abs()


@torch.no_grad()
def adaptive_clip_grad_(parameters: Iterable[nn.Parameter], factor: float = 0.01, eps: float = 1e-3) -> None:
    """Scales each unit's gradient down to `factor * max(||weight||, eps)` where it is longer than that, in place.

    Args:
        parameters: those without a gradient are passed over.
        factor: longest gradient allowed, in units of the weight's norm; positive.
        eps: lower bound of the weight's norm, so that zero weights can leave zero.

    Raises:
        ValueError: `factor` or `eps` is not positive.
    """
    if not factor > 0 or not eps > 0:
        raise ValueError(f"factor and eps must be positive, got factor={factor}, eps={eps}.")
    for parameter in parameters:
        if parameter.grad is None:
            continue
        longest = unit_norm(parameter).clamp(min=eps).mul(factor)
        length = unit_norm(parameter.grad)
        parameter.grad.mul_((longest / length.clamp(min=1e-6)).clamp(max=1.0))
