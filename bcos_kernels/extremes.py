"""Calls whose numbers float32 cannot hold, on a CPU: they are computed in float64, and the results are rounded.

Kernels take sums in float32 (``contract.accumulator``). Squares of numbers above 1e19 overflow there and those below 1e-19
vanish, and so do products of gradients and outputs, although the result would be an ordinary number. So each operation is
watched: a norm, a variance, and of a backward pass's large tensors the largest number say whether float32 was enough. If not,
the portable backend computes the call again, in float64. A backward pass needs nothing but its inputs for that.

Looking at a value costs nothing on a CPU. On other devices it would wait for the device: their kernels do what they can
(docs/backends.md, "Very large and very small numbers").

float16 on a CPU: PyTorch's convolution of it takes twenty times as long as that of float32, so the portable backend
computes in float32 throughout.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bcos_kernels import portable, reference
from bcos_kernels.contract import (
    Forward,
    Gradients,
    LayerNormForward,
    LayerNormGradients,
    LayerNormNeeds,
    LayerNormOptions,
    Needs,
    NormForward,
    NormGradients,
    NormNeeds,
    NormOptions,
    Options,
    Saved,
    accumulator,
)
from bcos_kernels.ranges import extent, magnitude, readable

#: Squares of larger norms overflow soon.
_LARGEST_NORM = 1e18
#: Rows of a linear layer below this are looked at: 1e-12 is no longer small next to them, and 1 / ||x|| is large.
_SHORT_ROW = 1e-5
#: The same for images, whose patch norm is never smaller than the root of 1e-6: they hold no number above 1.4e-5.
_FAINT_IMAGE = math.sqrt(reference.PATCH_NORM_EPS) * (1 + 1e-4)
#: The largest number of a weight: above, squares of cosines overflow soon, below, y = l |l| / n vanishes.
_LARGEST_WEIGHT, _SMALLEST_WEIGHT = 1e6, 1e-8
#: Products of the largest numbers that may be intermediate results in float32.
_LEAST, _MOST = 1e-33, 1e33


def _in(dtype: torch.dtype, *values: Any) -> list[Any]:
    return [v.to(dtype) if isinstance(v, Tensor) else v for v in values]


# ---- layers


def forward(
    backend: ModuleType,
    name: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    options: Options,
    for_backward: bool,
    squares: Tensor | None,
) -> Forward:
    """``backend.<name>``, where float32 is enough."""
    if _is_slow_half(backend, x):
        return _forward_in(torch.float32, name, x, weight, bias, options, for_backward)
    result: Forward = getattr(backend, name)(x, weight, bias, options, for_backward, squares)
    if not _watched(x) or result.y.numel() == 0:
        return result
    overflows = result.norm.numel() > 0 and result.norm.amax().item() > _LARGEST_NORM
    if overflows or (options.max_out > 1 and _may_tie(name, x, result.y)):
        return _forward_in(torch.float64, name, x, weight, bias, options, for_backward)
    return result


def backward(
    backend: ModuleType,
    name: str,
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    saved: Saved,
    options: Options,
    needs: Needs,
) -> Gradients:
    """``backend.<name>_backward``, where float32 is enough."""
    if _is_slow_half(backend, x):
        return _backward_in(torch.float32, name, grad, x, weight, bias, saved, options, needs)
    if readable(x) and _is_beyond(name, grad, x, weight, bias, saved, options):
        return _backward_in(torch.float64, name, grad, x, weight, bias, saved, options, needs)
    result: Gradients = getattr(backend, f"{name}_backward")(grad, x, weight, bias, saved, options, needs)
    return result


def _may_tie(name: str, x: Tensor, y: Tensor) -> bool:
    """Whether the linear output may have underflowed where the input is not zero, or overflowed: MaxOut chose blindly."""
    if name == "conv2d":
        x, y = x.flatten(1), y.flatten(1)
    largest = y.abs().amax(-1)
    return bool(x[(largest < 1e-20) | largest.isinf()].any())


def _is_slow_half(backend: ModuleType, x: Tensor) -> bool:
    return x.dtype == torch.float16 and backend is portable and x.device.type == "cpu"


def _is_beyond(
    name: str, grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, saved: Saved, options: Options
) -> bool:
    """Whether float32 may not hold what lies between ``(grad, saved)`` and the gradients. Comparisons with NaN are false."""
    norm, like_conv = saved.norm, name == "conv2d"
    if grad.numel() == 0 or x.numel() == 0:
        return False
    if options.normalize_weight and x.dtype != torch.float64:
        size = magnitude(weight)
        if size > _LARGEST_WEIGHT or 0 < size < _SMALLEST_WEIGHT:
            return True  # its gradient is that of the unit rows over their length
    if norm.numel() == 0:
        return False
    shortest, longest = extent(norm)
    small = _FAINT_IMAGE if like_conv else _SHORT_ROW
    if shortest <= small and _has_faint_part(x, norm, small, options.groups if like_conv else None):
        return True
    if x.dtype == torch.float64:
        return False
    largest_weight = 1.0 if options.normalize_weight else magnitude(weight)
    if options.is_quadratic and not options.keeps_linear(x.dtype) and 0 < largest_weight < _SMALLEST_WEIGHT:
        return True  # y = l |l| / n underflows where l does not
    if longest > _LARGEST_NORM or largest_weight > _LARGEST_WEIGHT:
        return True
    # |cos| is at most ||w||, but where the bias is larger than what the patch gives
    by_bias = 0.0 if bias is None else magnitude(bias) / shortest
    if longest <= 1e3 and 1e-4 <= largest_weight <= 4 and by_bias <= 10:
        return False  # an ordinary layer: no gradient from 1e-30 to 1e30 is too much for it
    upstream = magnitude(grad)
    power = max(2.0, float(options.b))
    cos = max(1.0, largest_weight * math.sqrt(weight[0].numel()), by_bias)
    least = upstream * min(1.0, largest_weight) ** power / max(1.0, longest)
    most = upstream * cos**power * max(1.0, longest, 1 / max(shortest, small))
    return 0 < least < _LEAST or most > _MOST


def _has_faint_part(x: Tensor, norm: Tensor, small: float, groups: int | None) -> bool:
    """Whether a row, or a group of an image, is so small that its norm says nothing about it, but not zero."""
    if groups is None:
        return bool(x[norm.squeeze(-1) <= small].any())
    return bool(x.unflatten(1, (groups, -1))[norm.flatten(2).amax(2) <= small].any())


def _forward_in(
    dtype: torch.dtype,
    name: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    options: Options,
    for_backward: bool,
) -> Forward:
    f: Forward = getattr(portable, name)(*_in(dtype, x, weight, bias), options, for_backward)
    linear = f.linear
    if for_backward and options.keeps_linear(x.dtype) and not options.keeps_linear(dtype):
        linear = portable.recovered_linear(f.y, f.norm, options, channels=1 if name == "conv2d" else -1)
    return Forward(f.y.to(x.dtype), f.norm.to(accumulator(x.dtype)), linear.to(x.dtype), f.winner)


def _backward_in(
    dtype: torch.dtype,
    name: str,
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    saved: Saved,
    options: Options,
    needs: Needs,
) -> Gradients:
    grad_, x_, weight_, bias_ = _in(dtype, grad, x, weight, bias)
    f: Forward = getattr(portable, name)(x_, weight_, bias_, options, True)
    kept = f.linear if options.keeps_linear(dtype) else f.y
    again = Saved(kept, f.norm, saved.winner)
    g: Gradients = getattr(portable, f"{name}_backward")(grad_, x_, weight_, bias_, again, options, needs)
    return Gradients(g.x.to(x.dtype), g.weight.to(weight.dtype), g.bias.to(weight.dtype), g.b)


# ---- norms


def _is_within(statistic: Tensor, bounds: tuple[float, float], x: Tensor) -> bool:
    """Whether all of ``statistic`` lies within ``bounds``. It may be NaN where ``x`` is not: sums in float32 overflowed."""
    least, largest = extent(statistic)
    if math.isnan(least):
        return not x.isfinite().all()
    return least >= bounds[0] and largest <= bounds[1]


def _is_ordinary(var: Tensor, eps: float, x: Tensor) -> bool:
    """Whether float32 holds sums of squares with this variance, and everything that a backward pass divides by it."""
    return _is_within(var, (1e-8 - eps, 1e8), x)


def batch_norm(
    backend: ModuleType,
    x: Tensor,
    var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    options: NormOptions,
) -> NormForward:
    """``backend.batch_norm_uncentered2d``, where float32 is enough."""
    f: NormForward = backend.batch_norm_uncentered2d(x, var, weight, bias, residual, options)
    if var is not None or f.var.numel() == 0 or not _watched(x) or _is_ordinary(f.var, options.eps, x):
        return f
    x_, var_, weight_, bias_, residual_ = _in(torch.float64, x, var, weight, bias, residual)
    f = portable.batch_norm_uncentered2d(x_, var_, weight_, bias_, residual_, options)
    return NormForward(f.z.to(x.dtype), f.mean.float(), f.var.float(), f.squares.float())


def batch_norm_backward(
    backend: ModuleType,
    grad: Tensor,
    x: Tensor,
    z: Tensor | None,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    options: NormOptions,
    needs: NormNeeds,
) -> NormGradients:
    """``backend.batch_norm_uncentered2d_backward``, where float32 is enough."""
    if var.numel() == 0 or not _watched(x) or _is_ordinary(var, options.eps, x):
        result: NormGradients = backend.batch_norm_uncentered2d_backward(
            grad, x, z, mean, var, weight, bias, options, needs
        )
        return result
    grad_, x_, z_, mean_, var_, weight_, bias_ = _in(torch.float64, grad, x, z, mean, var, weight, bias)
    if mean.numel():
        _, mean_, var_, _ = portable.batch_norm_uncentered2d(x_, None, None, None, None, NormOptions(options.eps))
    g = portable.batch_norm_uncentered2d_backward(grad_, x_, z_, mean_, var_, weight_, bias_, options, needs)
    return NormGradients(
        g.x.to(x.dtype), g.weight if weight is None else g.weight.to(weight.dtype), g.bias, g.residual.to(x.dtype)
    )


def layer_norm(
    backend: ModuleType, x: Tensor, weight: Tensor | None, bias: Tensor | None, options: LayerNormOptions
) -> LayerNormForward:
    """``backend.layer_norm``, where float32 is enough."""
    f: LayerNormForward = backend.layer_norm(x, weight, bias, options)
    if f.rstd.numel() == 0 or not _watched(x) or _is_moderate(f.rstd, x):
        return f
    x_, weight_, bias_ = _in(torch.float64, x, weight, bias)
    f = portable.layer_norm(x_, weight_, bias_, options)
    return LayerNormForward(f.z.to(x.dtype), f.mean.float(), f.rstd.float(), f.squares.float())


def layer_norm_backward(
    backend: ModuleType,
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    options: LayerNormOptions,
    needs: LayerNormNeeds,
) -> LayerNormGradients:
    """``backend.layer_norm_backward``, where float32 is enough."""
    if rstd.numel() == 0 or not _watched(x) or _is_moderate(rstd, x):
        result: LayerNormGradients = backend.layer_norm_backward(grad, x, mean, rstd, weight, bias, options, needs)
        return result
    grad_, x_, weight_, bias_ = _in(torch.float64, grad, x, weight, bias)
    again = portable.layer_norm(x_, weight_, bias_, options._replace(squares=False))
    g = portable.layer_norm_backward(grad_, x_, again.mean, again.rstd, weight_, bias_, options, needs)
    return g._replace(x=g.x.to(x.dtype))


def _is_moderate(rstd: Tensor, x: Tensor) -> bool:
    return _is_within(rstd, (1e-4, 1e4), x)


def _watched(x: Tensor) -> bool:
    return x.dtype != torch.float64 and readable(x)
