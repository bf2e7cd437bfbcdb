"""Convolution and linear layer, forward and backward: which kernels each call takes, in what order, on which layouts."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bcos_kernels import convolution
from bcos_kernels.contract import (
    Forward,
    Gradients,
    Needs,
    Options,
    Saved,
    accumulator,
    conv_output_size,
    memory_format,
    winner_dtype,
)
from bcos_kernels.triton import conv2d as direct
from bcos_kernels.triton import elementwise, epilogue, tiles
from bcos_kernels.triton import linear as pointwise
from bcos_kernels.triton.common import channels_last, dense, guard, layout, row_layout
from bcos_kernels.weights import row_lengths, unit_rows, unit_rows_backward

_P = ParamSpec("_P")
_R = TypeVar("_R")


def _on_device_of_first(operation: Callable[_P, _R]) -> Callable[_P, _R]:
    """Launches go to the current stream of the first argument's device."""

    @functools.wraps(operation)
    def guarded(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        first = args[0]
        assert isinstance(first, Tensor)
        with guard(first):
            return operation(*args, **kwargs)

    return guarded


# ---- weights of unit length


def _gain(weight: Tensor, options: Options) -> Tensor | None:
    """``1 / ||w||`` for the epilogue of a fused kernel: unlike a rounded ``w / ||w||`` it costs no precision."""
    return row_lengths(weight).flatten().reciprocal() if options.normalize_weight else None


# ---- convolution


@_on_device_of_first
def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    options: Options,
    for_backward: bool,
    squares: Tensor | None = None,
) -> Forward:
    o = options
    kernel = (weight.shape[2], weight.shape[3])
    size = conv_output_size((x.shape[2], x.shape[3]), kernel, o.stride, o.padding, o.dilation)
    fmt = memory_format(x, weight)
    if x.numel() == 0:
        return _empty_forward(x, (x.shape[0], weight.shape[0] // o.max_out, *size), (o.groups, *size), o, for_backward)
    x = dense(x, fmt)
    if not tiles.fused_conv2d(x, weight, o):
        u = convolution.forward(x, unit_rows(weight, o), bias, o.stride, o.padding, o.dilation, o.groups)
        u = u.contiguous(memory_format=fmt)
        norm = x.new_empty(0, dtype=accumulator(x.dtype))
        if not o.is_linear:
            norm = elementwise.patch_norm(x, kernel, size, o, squares)
        shape = torch.Size((u.shape[0], u.shape[1] // o.max_out, *size))
        y, linear, winner = elementwise.scale(u, layout(u, fmt), norm, shape, o, for_backward, fmt)
        return Forward(y, norm, linear, winner)
    x = channels_last(x)
    gain, bias = _gain(weight, o), None if bias is None else bias.contiguous()
    known = None if squares is None or o.is_linear else elementwise.patch_norm(x, kernel, size, o, squares)
    if not tiles.is_pointwise(weight, o):
        return Forward(*direct.forward(x, weight, gain, bias, o, for_backward, size, known))
    n, c, h, w = x.shape
    strided = None if o.stride == (1, 1) else (n, h, w, *size)
    rows, matrix = _as_rows(x), weight.reshape(-1, c).contiguous()
    y, norm, linear, winner = pointwise.forward(
        rows, matrix, gain, bias, o, for_backward, epilogue.PATCH.value, strided, known
    )
    return Forward(
        _as_image(y, n, size),
        norm if o.is_linear else norm.view(n, 1, *size),
        _as_image(linear, n, size) if linear.numel() else linear,
        _as_image(winner, n, size) if winner.numel() else winner,
    )


@_on_device_of_first
def conv2d_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, saved: Saved, options: Options, needs: Needs
) -> Gradients:
    o = options
    if x.numel() == 0:
        return _empty_backward(x, weight, bias, needs)
    fmt = memory_format(x, weight)
    kernel = (weight.shape[2], weight.shape[3])
    # whatever the gradient's strides: one copy here at most, in the format of what forward kept
    grad, saved = _in_format(grad, fmt), Saved(*(_in_format(t, fmt) if t is not saved.norm else t for t in saved))
    x = dense(x, fmt)
    pulls = needs.x and not o.detach_scale and not o.is_linear
    du, pull, db = elementwise.scale_backward(
        grad,
        layout(grad, fmt),
        saved,
        o,
        epilogue.PATCH.value,
        fmt,
        needs_u=needs.x or needs.weight or needs.bias,
        needs_pull=pulls,
        needs_b=needs.b,
    )
    unit = unit_rows(weight, o)
    dx = dweight = dbias = empty = grad.new_empty(0)
    own = needs.x and tiles.fused_conv2d(x, weight, o) and tiles.is_pointwise(weight, o) and o.stride == (1, 1)
    if own:
        # stride 1 only: otherwise most of dx is zero, and the product is a quarter of the pass over dx
        x = channels_last(x)
        rows = _as_rows(channels_last(du))
        matrix = unit.reshape(rows.shape[1], -1).contiguous()
        dx = pointwise.input_gradient(rows, matrix, _as_rows(x), pull if pulls else None, conv=True)
        dx = _as_image(dx, x.shape[0], (x.shape[2], x.shape[3]))
    mask = [needs.x and not own, needs.weight, needs.bias]
    if any(mask):
        by_aten, dunit, dbias = convolution.backward(du, x, unit, bias, o.stride, o.padding, o.dilation, o.groups, mask)
        dx = by_aten if mask[0] else dx
        dweight = unit_rows_backward(dunit, weight, o) if needs.weight else empty
        dbias = dbias if needs.bias else empty
    if pulls and not own:
        dx = _in_format(dx, fmt)
        elementwise.add_pull(dx, layout(dx, fmt), x, layout(x), pull, kernel, o)
    return Gradients(dx, dweight, dbias, db)


def _in_format(t: Tensor, fmt: torch.memory_format) -> Tensor:
    return t.contiguous(memory_format=fmt) if t.dim() == 4 else t


def _as_rows(x: Tensor) -> Tensor:
    """A channels-last ``[N, C, H, W]`` as ``[N*H*W, C]``, without a copy."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _as_image(rows: Tensor, n: int, size: tuple[int, int]) -> Tensor:
    """``[N*P*Q, O]`` as a channels-last ``[N, O, P, Q]``, without a copy."""
    return rows.view(n, *size, -1).permute(0, 3, 1, 2)


# ---- linear layer


@_on_device_of_first
def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    options: Options,
    for_backward: bool,
    squares: Tensor | None = None,
) -> Forward:
    o = options
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    leading, columns = x.shape[:-1], weight.shape[0] // o.max_out
    if rows.shape[0] == 0:
        return _empty_forward(x, (*leading, columns), (1,), o, for_backward)
    if tiles.fused_linear(x, o):
        matrix, bias = weight.contiguous(), None if bias is None else bias.contiguous()
        known = None if squares is None or o.is_linear else elementwise.row_norm(rows, row_layout(rows), squares)
        y, norm, linear, winner = pointwise.forward(
            rows, matrix, _gain(weight, o), bias, o, for_backward, epilogue.ROW.value, norm=known
        )
    else:
        u = F.linear(rows, unit_rows(weight, o), bias)
        norm = x.new_empty(0, dtype=accumulator(x.dtype))
        if not o.is_linear:
            norm = elementwise.row_norm(rows, row_layout(rows), squares)
        shape = torch.Size((rows.shape[0], columns))
        y, linear, winner = elementwise.scale(u, row_layout(u), norm, shape, o, for_backward, torch.contiguous_format)
    return Forward(
        y.view(*leading, columns),
        norm if o.is_linear else norm.view(*leading, 1),
        linear.view(*leading, columns) if linear.numel() else linear,
        winner.view(*leading, columns) if winner.numel() else winner,
    )


@_on_device_of_first
def linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, saved: Saved, options: Options, needs: Needs
) -> Gradients:
    o = options
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    if rows.shape[0] == 0:
        return _empty_backward(x, weight, bias, needs)
    g, kept, winner = (
        t.reshape(rows.shape[0], -1).contiguous() if t.numel() else t for t in (grad, saved.kept, saved.winner)
    )
    pulls = needs.x and not o.detach_scale and not o.is_linear
    du, pull, db = elementwise.scale_backward(
        g,
        row_layout(g),
        Saved(kept, saved.norm.reshape(-1), winner),
        o,
        epilogue.ROW.value,
        torch.contiguous_format,
        needs_u=needs.x or needs.weight or needs.bias,
        needs_pull=pulls,
        needs_b=needs.b,
    )
    dx = dweight = dbias = grad.new_empty(0)
    if needs.x:
        unit = unit_rows(weight, o)
        if tiles.fused_linear(x, o):
            dx = pointwise.input_gradient(du, unit.contiguous(), rows, pull if pulls else None, conv=False)
        else:
            dx = du @ unit
            if pulls:
                at = row_layout(rows)
                elementwise.add_pull(dx, at, rows, at, pull.view(-1, 1, 1, 1), (1, 1), Options())
        dx = dx.view(x.shape)
    if needs.weight:
        dweight = unit_rows_backward(du.t() @ rows, weight, o)
    if needs.bias:
        dbias = du.sum(0)
    return Gradients(dx, dweight, dbias, db)


# ---- nothing to do


def _empty_forward(
    x: Tensor, y_shape: tuple[int, ...], norm_tail: tuple[int, ...], options: Options, for_backward: bool
) -> Forward:
    o = options
    norm_shape = (*x.shape[: len(y_shape) - len(norm_tail)], *norm_tail)
    pick = for_backward and o.max_out > 1
    keep = for_backward and o.keeps_linear(x.dtype)
    return Forward(
        x.new_empty(y_shape),
        x.new_empty(0 if o.is_linear else norm_shape, dtype=accumulator(x.dtype)),
        x.new_empty(y_shape if keep else 0),
        x.new_empty(y_shape if pick else 0, dtype=winner_dtype(o.max_out)),
    )


def _empty_backward(x: Tensor, weight: Tensor, bias: Tensor | None, needs: Needs) -> Gradients:
    empty = x.new_empty(0)
    return Gradients(
        torch.empty_like(x) if needs.x else empty,
        torch.zeros_like(weight) if needs.weight else empty,
        torch.zeros_like(bias) if needs.bias and bias is not None else empty,
        x.new_zeros((), dtype=accumulator(x.dtype)) if needs.b else empty,
    )
