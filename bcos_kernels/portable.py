"""The portable backend: PyTorch's own convolution and matrix product, with hand-written gradients around them.

It runs wherever PyTorch runs. Norms, scales and sums are computed in float32 (float64 for float64 input).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bcos_kernels import convolution, reference
from bcos_kernels.contract import (
    Call,
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
    winner_dtype,
)
from bcos_kernels.weights import unit_rows, unit_rows_backward


def unavailable() -> str | None:
    return None


def why_not(call: Call) -> str | None:
    return None


# ---- the scale, shared by convolution and linear layer. Shapes: `linear` and `norm` broadcast against each other.


def _scale_backward(grad: Tensor, linear: Tensor, norm: Tensor, options: Options, needs: Needs) -> tuple[Tensor, ...]:
    """Gradients of ``y = l * scale(l, n)`` with respect to ``l``, and, where wanted, to ``n`` and ``b`` by element."""
    empty = grad.new_empty(0)
    cos = linear / norm  # with its sign; products of cosines overflow later than those of `linear` or `norm`
    size = cos.abs()
    needs_norm = needs.x and not options.detach_scale
    if options.is_quadratic:
        dlinear = grad * size
        dnorm = -dlinear * cos if needs_norm else empty
        return dlinear if options.detach_scale else 2 * dlinear, dnorm, empty
    b = options.b
    base = size + reference.COS_EPS
    factor = base ** (b - 1)
    slope = (b - 1) * base ** (b - 2) * size  # d factor / d ln|cos|
    dlinear = grad * (factor if options.detach_scale else factor + slope)
    dnorm = -grad * slope * cos if needs_norm else empty
    db = grad * linear * factor * base.log() if needs.b else empty
    return dlinear, dnorm, db


def _recover_linear(saved: Saved, norm: Tensor, options: Options, dtype: torch.dtype) -> Tensor:
    """The linear output ``l``, kept or, for B = 2, recovered as ``sign(y) sqrt(|y| n)``. Two roots: the product overflows."""
    kept = saved.kept.to(accumulator(dtype))
    if options.keeps_linear(dtype):
        return kept
    return torch.copysign(kept.abs().sqrt() * norm.sqrt(), kept)


def recovered_linear(y: Tensor, norm: Tensor, options: Options, channels: int) -> Tensor:
    """The linear output of a B = 2 layer whose ``y`` is exact enough to give it back."""
    split = y.unflatten(channels, (options.groups, -1))
    saved = Saved(split, norm, norm)
    return _recover_linear(saved, _by_group(norm, channels), options, y.dtype).flatten(*_group_axes(channels))


def _pick_winner(u: Tensor, max_out: int, dim: int) -> tuple[Tensor, Tensor]:
    if max_out == 1:
        return u, u.new_empty(0, dtype=winner_dtype(max_out))
    best = u.unflatten(dim, (-1, max_out)).max(dim if dim < 0 else dim + 1)
    return best.values, best.indices.to(winner_dtype(max_out))


def _scatter_to_winner(dlinear: Tensor, winner: Tensor, max_out: int, dim: int) -> Tensor:
    if max_out == 1:
        return dlinear
    at = dim if dim < 0 else dim + 1
    shape = list(dlinear.shape)
    shape.insert(at % (dlinear.dim() + 1), max_out)
    rows = dlinear.new_zeros(shape).scatter_(at, winner.long().unsqueeze(at), dlinear.unsqueeze(at))
    return rows.flatten(at - 1, at)


def _forward(u: Tensor, norm: Tensor, options: Options, for_backward: bool, channels: int) -> Forward:
    """MaxOut and scale behind the linear part; ``channels`` is the channel axis of ``u``, ``norm`` has one per group."""
    linear, winner = _pick_winner(u, options.max_out, channels)
    winner = winner if for_backward else winner.new_empty(0)
    if options.is_linear:
        return Forward(linear, norm, linear.new_empty(0), winner)
    grouped = linear.to(norm.dtype).unflatten(channels, (options.groups, -1))
    y = grouped * reference.scale(grouped, _by_group(norm, channels), options.b)
    y = y.flatten(*_group_axes(channels)).to(linear.dtype)
    keep = for_backward and options.keeps_linear(linear.dtype)
    return Forward(y, norm, linear if keep else linear.new_empty(0), winner)


def _group_axes(channels: int) -> tuple[int, int]:
    """The axes (group, channel of the group) after the channel axis was split."""
    return (channels, channels + 1) if channels >= 0 else (channels - 1, channels)


def _by_group(norm: Tensor, channels: int) -> Tensor:
    return norm.unsqueeze(_group_axes(channels)[1])


def _backward(
    grad: Tensor, saved: Saved, options: Options, needs: Needs, dtype: torch.dtype, channels: int
) -> tuple[Tensor, Tensor, Tensor]:
    """``(du, dL/dn summed by group, db)`` from the gradient of ``y``."""
    if options.is_linear:
        empty = grad.new_empty(0)
        return _scatter_to_winner(grad, saved.winner, options.max_out, channels), empty, empty
    group_axes = _group_axes(channels)
    norm = _by_group(saved.norm, channels)
    split = (options.groups, -1)
    grouped = Saved(saved.kept.unflatten(channels, split), norm, saved.winner)
    linear = _recover_linear(grouped, norm, options, dtype)
    dlinear, dnorm, db = _scale_backward(grad.to(norm.dtype).unflatten(channels, split), linear, norm, options, needs)
    du = _scatter_to_winner(dlinear.flatten(*group_axes).to(dtype), saved.winner, options.max_out, channels)
    dnorm = dnorm.sum(group_axes[1]) if dnorm.numel() else dnorm
    return du, dnorm, db.sum() if needs.b else db


# ---- convolution


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    options: Options,
    for_backward: bool,
    squares: Tensor | None = None,
) -> Forward:
    o = options
    u = convolution.forward(x, unit_rows(weight, o), bias, o.stride, o.padding, o.dilation, o.groups)
    acc = accumulator(x.dtype)
    norm = x.new_empty(0, dtype=acc)
    if not o.is_linear:
        squares = reference.channel_squares(x, o.groups) if squares is None else squares
        norm = reference.norm_of_squares(squares, weight.shape[2:], o.stride, o.padding, o.dilation)
    return _forward(u, norm, o, for_backward, channels=1)


def conv2d_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, saved: Saved, options: Options, needs: Needs
) -> Gradients:
    o = options
    du, dnorm, db = _backward(grad, saved, o, needs, x.dtype, channels=1)
    dx, dunit, dbias = convolution.backward(
        du, x, unit_rows(weight, o), bias, o.stride, o.padding, o.dilation, o.groups, needs[:3]
    )
    empty = grad.new_empty(0)
    if dnorm.numel():
        spread = window_sum_transposed(dnorm / saved.norm, x.shape, weight.shape[2:], o)
        pulled = x.to(spread.dtype).unflatten(1, (o.groups, -1)) * spread.unsqueeze(2)
        dx = (dx.to(spread.dtype) + pulled.flatten(1, 2)).to(x.dtype)
    return Gradients(
        dx if needs.x else empty,
        unit_rows_backward(dunit, weight, o) if needs.weight else empty,
        dbias if needs.bias else empty,
        db,
    )


def window_sum_transposed(q: Tensor, x_shape: torch.Size, kernel_size: torch.Size, options: Options) -> Tensor:
    """The adjoint of :func:`reference.window_sum`: ``q [N, G, Ho, Wo]`` spread over its windows, ``[N, G, H, W]``."""
    o = options
    for axis, k, s, p, d in zip(
        (3, 2), reversed(kernel_size), o.stride[::-1], o.padding[::-1], o.dilation[::-1], strict=True
    ):
        size = list(q.shape)
        size[axis] = x_shape[axis] + 2 * p
        reach = s * (q.shape[axis] - 1) + 1
        out = q.new_zeros(size)
        for i in range(k):
            taps = out.narrow(axis, i * d, reach)
            taps = taps[:, :, ::s] if axis == 2 else taps[:, :, :, ::s]
            taps += q
        q = out.narrow(axis, p, x_shape[axis])
    return q


# ---- linear layer


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    options: Options,
    for_backward: bool,
    squares: Tensor | None = None,
) -> Forward:
    u = F.linear(x, unit_rows(weight, options), bias)
    acc = accumulator(x.dtype)
    norm = x.new_empty(0, dtype=acc)
    if not options.is_linear:
        norm = reference.row_norm(x) if squares is None else squares.sqrt() + reference.ROW_NORM_EPS
    return _forward(u, norm, options, for_backward, channels=-1)


def linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, saved: Saved, options: Options, needs: Needs
) -> Gradients:
    du, dnorm, db = _backward(grad, saved, options, needs, x.dtype, channels=-1)
    empty = grad.new_empty(0)
    rows = du.reshape(-1, du.shape[-1])
    dx = dweight = dbias = empty
    if needs.x:
        dx = du @ unit_rows(weight, options)
    if dnorm.numel():
        # dn/dx = x / ||x||, and 0 at the origin as for torch's own norm. Of a short row n - 1e-12 leaves next to nothing
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dnorm.dtype)
        dx = (dx.to(length.dtype) + x * torch.where(length > 0, dnorm / length, 0)).to(x.dtype)
    if needs.weight:
        dweight = unit_rows_backward(rows.t() @ x.reshape(-1, x.shape[-1]), weight, options)
    if needs.bias:
        dbias = rows.sum(0)
    return Gradients(dx, dweight, dbias, db)


# ---- uncentered batch norm


def _gain(var: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """``(1 / sqrt(var + eps), weight / sqrt(var + eps))``."""
    inverse = (var + eps).rsqrt()
    return inverse, inverse if weight is None else inverse * weight.to(inverse.dtype)


def _affine(value: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
    z = value * gain[:, None, None]
    return z if bias is None else z.add_(bias.to(z.dtype)[:, None, None])


def batch_norm_uncentered2d(
    x: Tensor,
    var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    options: NormOptions,
) -> NormForward:
    acc = accumulator(x.dtype)
    value = x.to(acc)
    mean, batch_var, squares = (x.new_empty(0, dtype=acc) for _ in range(3))  # outputs must not share storage
    if var is None:
        count = max(x.numel() // x.shape[1], 1)  # an empty batch has variance 0, and gradient 0
        mean = value.sum((0, 2, 3)) / count
        batch_var = (value - mean[:, None, None]).square().sum((0, 2, 3)) / count
    _, gain = _gain(batch_var if var is None else var.to(acc), weight, options.eps)
    z = _affine(value, gain, bias)
    z = z if residual is None else z.add_(residual)
    z = (z.relu_() if options.relu else z).to(x.dtype)
    if options.squares:
        squares = z.to(acc).square().sum(1, keepdim=True)
    return NormForward(z, mean, batch_var, squares)


def batch_norm_uncentered2d_backward(
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
    acc = accumulator(x.dtype)
    empty = grad.new_empty(0)
    g, value = grad.to(acc), x.to(acc)
    inv_std, gain = _gain(var.to(acc), weight, options.eps)
    if options.relu:
        g = torch.ops.aten.threshold_backward(g, _affine(value, gain, bias) if z is None else z.to(acc), 0)
    through_var = needs.x and mean.numel() > 0 and not options.detach_var
    dot = (g * value).sum((0, 2, 3)) if needs.weight or through_var else empty
    dx = empty
    if needs.x:
        if through_var:
            # dL/dvar = -dot * gain * inv_std^2 / 2 and dvar/dx = 2 (x - mean) / count
            pull = -dot * gain * inv_std.square() * (x.shape[1] / max(x.numel(), 1))
            dx = (value - mean[:, None, None]).mul_(pull[:, None, None]).addcmul_(g, gain[:, None, None])
        else:
            dx = g * gain[:, None, None]
        dx = dx.to(x.dtype)
    return NormGradients(
        dx,
        (dot * inv_std).to(weight.dtype) if needs.weight and weight is not None else empty,
        g.sum((0, 2, 3)) if needs.bias else empty,
        g.to(x.dtype) if needs.residual else empty,
    )


# ---- layer norm: PyTorch's own, whose variance is a constant where that is wanted


def _wide(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if t is None else t.to(dtype)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, options: LayerNormOptions) -> LayerNormForward:
    acc = accumulator(x.dtype)
    shape = x.shape[x.dim() - options.axes :]
    z, mean, rstd = torch.native_layer_norm(x.to(acc), shape, _wide(weight, acc), _wide(bias, acc), options.eps)
    z = z.to(x.dtype)
    squares = z.to(acc).square().sum(-1, keepdim=True) if options.squares else z.new_empty(0, dtype=acc)
    return LayerNormForward(z, mean, rstd, squares)


def layer_norm_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    options: LayerNormOptions,
    needs: LayerNormNeeds,
) -> LayerNormGradients:
    acc, empty = mean.dtype, grad.new_empty(0)
    shape = x.shape[x.dim() - options.axes :]
    g, weight = grad.to(acc), _wide(weight, acc)
    own = needs.x and options.detach_var
    mask = [needs.x and not own, needs.weight, needs.bias]
    dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        g, x.to(acc), shape, mean, rstd, weight, _wide(bias, acc), mask
    )
    if own:
        h = g if weight is None else g * weight
        dx = (h - h.mean(tuple(range(-options.axes, 0)), keepdim=True)) * rstd
    return LayerNormGradients(
        dx.to(x.dtype) if needs.x else empty, dweight if needs.weight else empty, dbias if needs.bias else empty
    )
