# mypy: ignore-errors
"""Uncentered batch norm: statistics, apply (with residual, ReLU and the next layer's squares), backward.

Sums over rows are made in two stages, without atomics, so that they are deterministic: every program reduces its rows and
writes one value a channel, and one more pass adds those up in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bcos_kernels.contract import (
    NormForward,
    NormGradients,
    NormNeeds,
    NormOptions,
    accumulator,
    memory_format,
)
from bcos_kernels.triton import tiles
from bcos_kernels.triton.common import Layout, dense, guard, layout, rounded, split_rows


@triton.jit
def _statistics(
    p_x, p_mean, p_squares, rows, pixels, channels, s_n, s_p, s_c, per_program,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """``mean[i, c]`` and ``squares[i, c] = sum (x - mean)^2`` over the rows ``i*per_program ..`` of ``x``.

    Chan's update, a block of rows at a time: the variance about the mean is what is wanted, and ``E x^2 - (E x)^2`` loses
    all digits where the mean is large. ``x``: rows x channels; partial results ``[programs, channels]``.
    """
    ACC: tl.constexpr = p_mean.dtype.element_ty
    first = tl.program_id(0).to(tl.int64) * per_program
    last = tl.minimum(first + per_program, rows)
    o_c = tl.program_id(1).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    m_c = o_c < channels
    b_mean = tl.zeros((CHANNELS,), ACC)
    b_squares = tl.zeros((CHANNELS,), ACC)
    for r in range(0, per_program, ROWS):
        o_r = first + r + tl.arange(0, ROWS)
        m_r = o_r < last
        m = m_r[:, None] & m_c[None, :]
        _, _, o_x = split_rows(o_r, pixels, s_n, s_p)
        b_x = tl.load(p_x + o_x[:, None] + (o_c * s_c)[None, :], mask=m, other=0).to(ACC)
        before = tl.minimum(first + r, last) - first
        count = tl.minimum(last - first - before, ROWS).to(ACC)
        b_new = tl.sum(b_x, 0) / tl.maximum(count, 1)
        b_off = tl.where(m, b_x - b_new[None, :], 0)
        # a block past the end has count 0 and changes nothing
        share = count / tl.maximum(before.to(ACC) + count, 1)
        b_delta = tl.where(count > 0, b_new - b_mean, 0)
        b_squares += tl.sum(b_off * b_off, 0) + b_delta * b_delta * (before.to(ACC) * share)
        b_mean += b_delta * share
    o = tl.program_id(0).to(tl.int64) * channels + o_c
    tl.store(p_mean + o, b_mean, mask=m_c)
    tl.store(p_squares + o, b_squares, mask=m_c)


@triton.jit
def _merge_statistics(
    p_means, p_squares, p_mean, p_var, parts, rows, per_program, channels, PARTS: tl.constexpr, CHANNELS: tl.constexpr
):
    """``mean[c]`` and the biased variance ``var[c]`` from partial means and sums of squares ``[parts, channels]``.

    ``mean = sum count_i mean_i / rows``, ``var = sum (squares_i + count_i (mean_i - mean)^2) / rows``.
    """
    ACC: tl.constexpr = p_mean.dtype.element_ty
    o_c = tl.program_id(0).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    m_c = o_c < channels
    b_sum = tl.zeros((CHANNELS,), ACC)
    for i in range(0, parts, PARTS):
        o_i = i + tl.arange(0, PARTS)
        m = (o_i < parts)[:, None] & m_c[None, :]
        b_count = tl.minimum(rows - o_i.to(tl.int64) * per_program, per_program).to(ACC)
        b_means = tl.load(p_means + o_i.to(tl.int64)[:, None] * channels + o_c[None, :], mask=m, other=0)
        b_sum += tl.sum(b_means * b_count[:, None], 0)
    b_mean = b_sum / rows
    b_var = tl.zeros((CHANNELS,), ACC)
    for i in range(0, parts, PARTS):
        o_i = i + tl.arange(0, PARTS)
        m = (o_i < parts)[:, None] & m_c[None, :]
        o = o_i.to(tl.int64)[:, None] * channels + o_c[None, :]
        b_count = tl.minimum(rows - o_i.to(tl.int64) * per_program, per_program).to(ACC)
        b_off = tl.load(p_means + o, mask=m, other=0) - b_mean[None, :]
        b_part = tl.load(p_squares + o, mask=m, other=0) + b_off * b_off * b_count[:, None]
        b_var += tl.sum(tl.where(m, b_part, 0), 0)
    tl.store(p_mean + o_c, b_mean, mask=m_c)
    tl.store(p_var + o_c, b_var / rows, mask=m_c)


@triton.jit
def _gain(p_var, p_weight, o_c, m_c, EPS: tl.constexpr, ACC: tl.constexpr):
    """``(1 / sqrt(var + eps), weight / sqrt(var + eps))`` of some channels."""
    b_var = tl.load(p_var + o_c, mask=m_c, other=1).to(ACC)
    b_inverse = 1 / tl.sqrt(b_var + tl.full((), EPS, ACC))
    b_gain = b_inverse
    if p_weight is not None:
        b_gain = b_inverse * tl.load(p_weight + o_c, mask=m_c, other=0).to(ACC)
    return b_inverse, b_gain


@triton.jit
def _apply(
    p_x, p_var, p_weight, p_bias, p_residual, p_z, p_squares, rows, pixels, channels, s_n, s_p, s_c,
    EPS: tl.constexpr, RELU: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """``z = x / sqrt(var + eps) * weight + bias (+ residual) (then ReLU)``; ``squares[r] = sum over channels of z^2``.

    ``x``, ``residual``, ``z``: rows x channels, same strides; ``var``, ``weight``, ``bias [channels]``; ``squares [rows]`` is
    what the next 1x1 layer's norm is the root of. ``p_weight``, ``p_bias``, ``p_residual`` and ``p_squares`` may be None.
    """
    ACC: tl.constexpr = tl.float64 if p_z.dtype.element_ty == tl.float64 else tl.float32
    o_r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_r = o_r < rows
    _, _, o_x = split_rows(o_r, pixels, s_n, s_p)
    b_squares = tl.zeros((ROWS,), ACC)
    for c in range(0, channels, CHANNELS):
        o_c = c + tl.arange(0, CHANNELS)
        m_c = o_c < channels
        m = m_r[:, None] & m_c[None, :]
        o = o_x[:, None] + (o_c.to(tl.int64) * s_c)[None, :]
        b_gain = _gain(p_var, p_weight, o_c, m_c, EPS, ACC)[1]
        b_z = tl.load(p_x + o, mask=m, other=0).to(ACC) * b_gain[None, :]
        if p_bias is not None:
            b_z += tl.load(p_bias + o_c, mask=m_c, other=0).to(ACC)[None, :]
        if p_residual is not None:
            b_z += tl.load(p_residual + o, mask=m, other=0).to(ACC)
        if RELU:
            b_z = tl.where(b_z < 0, 0, b_z)
        b_rounded = rounded(b_z, p_z.dtype.element_ty)
        tl.store(p_z + o, b_rounded, mask=m)
        if p_squares is not None:
            # of the rounded value: that is what the next layer reads
            b_next = tl.where(m, b_rounded.to(ACC), 0)
            b_squares += tl.sum(b_next * b_next, 1)
    if p_squares is not None:
        tl.store(p_squares + o_r, b_squares, mask=m_r)


@triton.jit
def _passed(b_grad, p_x, p_z, p_bias, o, m, o_c, m_c, b_gain, MASK: tl.constexpr):
    """The part of a gradient ``[rows, channels]`` that passed the ReLU.

    MASK 0: there is none. 1: what it let through is found again from ``x``. 2: it is where its output ``z`` is positive.
    """
    if MASK == 1:
        b_z = tl.load(p_x + o, mask=m, other=0).to(b_grad.dtype) * b_gain[None, :]
        if p_bias is not None:
            b_z += tl.load(p_bias + o_c, mask=m_c, other=0).to(b_grad.dtype)[None, :]
        b_grad = tl.where(b_z <= 0, 0, b_grad)
    if MASK == 2:
        b_grad = tl.where(tl.load(p_z + o, mask=m, other=0) <= 0, 0, b_grad)
    return b_grad


@triton.jit
def _sums(
    p_grad, p_x, p_z, p_var, p_weight, p_bias, p_masked, p_dot, p_sum,
    rows, pixels, channels, s_n, s_p, s_c, per_program,
    EPS: tl.constexpr, MASK: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """``dot[i, c] = sum h x`` and ``sum[i, c] = sum h`` over the rows ``i*per_program ..``; ``h``: what of g passed the ReLU.

    ``grad``, ``x``, ``z``, ``masked`` (where ``h`` is written): rows x channels, same strides; partial results ``[programs,
    channels]``. ``p_masked``, ``p_dot`` and ``p_sum`` may be None.
    """
    ACC: tl.constexpr = tl.float64 if p_grad.dtype.element_ty == tl.float64 else tl.float32
    first = tl.program_id(0).to(tl.int64) * per_program
    last = tl.minimum(first + per_program, rows)
    o_c = tl.program_id(1).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    m_c = o_c < channels
    b_gain = _gain(p_var, p_weight, o_c, m_c, EPS, ACC)[1]
    b_dot = tl.zeros((CHANNELS,), ACC)
    b_sum = tl.zeros((CHANNELS,), ACC)
    for r in range(0, per_program, ROWS):
        o_r = first + r + tl.arange(0, ROWS)
        m = (o_r < last)[:, None] & m_c[None, :]
        _, _, o_x = split_rows(o_r, pixels, s_n, s_p)
        o = o_x[:, None] + (o_c * s_c)[None, :]
        b_grad = tl.load(p_grad + o, mask=m, other=0).to(ACC)
        b_grad = _passed(b_grad, p_x, p_z, p_bias, o, m, o_c, m_c, b_gain, MASK)
        if p_masked is not None:
            tl.store(p_masked + o, rounded(b_grad, p_masked.dtype.element_ty), mask=m)
        if p_dot is not None:
            b_dot += tl.sum(b_grad * tl.load(p_x + o, mask=m, other=0).to(ACC), 0)
        if p_sum is not None:
            b_sum += tl.sum(b_grad, 0)
    o_out = tl.program_id(0).to(tl.int64) * channels + o_c
    if p_dot is not None:
        tl.store(p_dot + o_out, b_dot, mask=m_c)
    if p_sum is not None:
        tl.store(p_sum + o_out, b_sum, mask=m_c)


@triton.jit
def _input_gradient(
    p_grad, p_x, p_z, p_mean, p_var, p_weight, p_bias, p_dot, p_dx, rows, pixels, channels, s_n, s_p, s_c,
    EPS: tl.constexpr, MASK: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """``dx = h gain - (x - mean) dot gain / ((var + eps) rows)``, ``gain = weight / sqrt(var + eps)``; ``h``: as above.

    The second term is there where ``p_dot`` is: dL/dvar = -dot gain / (2 (var + eps)) and dvar/dx = 2 (x - mean) / rows.
    """
    ACC: tl.constexpr = tl.float64 if p_grad.dtype.element_ty == tl.float64 else tl.float32
    o_r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_c = tl.program_id(1).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    m_c = o_c < channels
    m = (o_r < rows)[:, None] & m_c[None, :]
    _, _, o_x = split_rows(o_r, pixels, s_n, s_p)
    o = o_x[:, None] + (o_c * s_c)[None, :]
    b_inverse, b_gain = _gain(p_var, p_weight, o_c, m_c, EPS, ACC)
    b_grad = tl.load(p_grad + o, mask=m, other=0).to(ACC)
    b_dx = _passed(b_grad, p_x, p_z, p_bias, o, m, o_c, m_c, b_gain, MASK) * b_gain[None, :]
    if p_dot is not None:
        b_pull = tl.load(p_dot + o_c, mask=m_c, other=0) * b_gain * b_inverse * b_inverse / rows
        b_mean = tl.load(p_mean + o_c, mask=m_c, other=0)
        b_dx -= (tl.load(p_x + o, mask=m, other=0).to(ACC) - b_mean[None, :]) * b_pull[None, :]
    tl.store(p_dx + o, rounded(b_dx, p_dx.dtype.element_ty), mask=m)


#: Programs of the first stage of a sum over rows: enough for every multiprocessor of an H100 several times over.
_PARTS = 1024


def parts_of(at: Layout, tile: tiles.Patch) -> tuple[int, int]:
    """``(programs, rows of each)`` of the first stage; the rows are a multiple of the tile's."""
    column_blocks = triton.cdiv(at.channels, tile.channels)
    wanted = max(1, _PARTS // column_blocks)
    per_program = triton.cdiv(triton.cdiv(at.rows, wanted), tile.rows) * tile.rows
    return triton.cdiv(at.rows, per_program), per_program


def _tile(x: Tensor, at: Layout) -> tiles.Patch:
    return tiles.patch(x, at.channels, channels_last=at.channel_stride == 1)


def statistics(x: Tensor, at: Layout) -> tuple[Tensor, Tensor]:
    """``(mean, biased variance)`` by channel, in the accumulator's dtype."""
    tile = _tile(x, at)
    parts, per_program = parts_of(at, tile)
    acc = accumulator(x.dtype)
    means, squares = x.new_empty((2, parts, at.channels), dtype=acc)
    blocks = triton.cdiv(at.channels, tile.channels)
    _statistics[(parts, blocks)](
        x, means, squares, at.rows, at.pixels, at.channels, *at.strides, per_program,
        ROWS=tile.rows, CHANNELS=tile.channels, num_warps=tile.warps,
    )  # fmt: skip
    mean, var = (x.new_empty(at.channels, dtype=acc) for _ in range(2))  # an operator's outputs must not share storage
    _merge_statistics[(triton.cdiv(at.channels, 16),)](
        means, squares, mean, var, parts, at.rows, per_program, at.channels, PARTS=64, CHANNELS=16, num_warps=4
    )
    return mean, var


def batch_norm_uncentered2d(
    x: Tensor,
    var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    options: NormOptions,
) -> NormForward:
    acc = accumulator(x.dtype)
    n, channels, h, w = x.shape
    mean, batch_var = (x.new_empty(0, dtype=acc) for _ in range(2))
    squares = x.new_empty((n, 1, h, w) if options.squares else 0, dtype=acc)
    if x.numel() == 0:
        if var is None:  # an empty batch has variance 0
            mean, batch_var = (x.new_zeros(channels, dtype=acc) for _ in range(2))
        return NormForward(torch.empty_like(x), mean, batch_var, squares)
    with guard(x):
        x = dense(x, memory_format(x))
        at = layout(x)
        if var is None:
            mean, batch_var = statistics(x, at)
        known = batch_var if var is None else var.contiguous()
        tile, z = _tile(x, at), torch.empty_like(x)
        _apply[(triton.cdiv(at.rows, tile.rows),)](
            x, known, *_contiguous(weight, bias), None if residual is None else _laid_out(residual, at), z,
            squares if options.squares else None, at.rows, at.pixels, at.channels, *at.strides,
            EPS=options.eps, RELU=options.relu, ROWS=tile.rows, CHANNELS=tile.channels, num_warps=tile.warps,
        )  # fmt: skip
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
    acc, eps = accumulator(x.dtype), options.eps
    needs_weight = needs.weight and weight is not None
    dx = dweight = dbias = dresidual = grad.new_empty(0)
    if x.numel() == 0:
        channels = x.new_zeros(x.shape[1], dtype=acc)
        return NormGradients(
            torch.empty_like(x) if needs.x else dx,
            channels.to(weight.dtype) if needs_weight else dweight,
            channels if needs.bias else dbias,
            torch.empty_like(x) if needs.residual else dresidual,
        )
    with guard(x):
        x = dense(x, memory_format(x))
        at = layout(x)
        # the gradient takes the format of x, in one copy at most
        grad, z = _laid_out(grad, at), None if z is None else _laid_out(z, at)
        tile = _tile(x, at)
        columns = triton.cdiv(at.channels, tile.channels)
        through_var = needs.x and mean.numel() > 0 and not options.detach_var
        mask = 0 if not options.relu else 1 if z is None else 2
        dot = None
        var, weight, bias = _contiguous(var, weight, bias)
        if needs_weight or through_var or needs.bias or needs.residual:
            parts, per_program = parts_of(at, tile)
            wants = (needs_weight or through_var, needs.bias)
            dots, sums = (x.new_empty((parts, at.channels), dtype=acc) if want else None for want in wants)
            masked = torch.empty_like(x) if needs.residual else None
            _sums[(parts, columns)](
                grad, x, z, var, weight, bias, masked, dots, sums,
                at.rows, at.pixels, at.channels, *at.strides, per_program,
                EPS=eps, MASK=mask, ROWS=tile.rows, CHANNELS=tile.channels, num_warps=tile.warps,
            )  # fmt: skip
            dot = None if dots is None else dots.sum(0)
            dbias = dbias if sums is None else sums.sum(0)
            if masked is not None:
                # what the residual gets is what passed the ReLU: the second pass reads it, and need not mask again
                dresidual = grad = masked
                mask, z = 0, None
        if needs_weight:
            dweight = (dot * (var.to(acc) + eps).rsqrt()).to(weight.dtype)
        if needs.x:
            dx = torch.empty_like(x)
            _input_gradient[(triton.cdiv(at.rows, tile.rows), columns)](
                grad, x, z, mean, var, weight, bias, dot if through_var else None, dx,
                at.rows, at.pixels, at.channels, *at.strides,
                EPS=eps, MASK=mask, ROWS=tile.rows, CHANNELS=tile.channels, num_warps=tile.warps,
            )  # fmt: skip
    return NormGradients(dx, dweight, dbias, dresidual)


def _laid_out(t: Tensor, at: Layout) -> Tensor:
    """``t`` in the layout ``at``, which another tensor of its shape has."""
    last = at.channel_stride == 1
    return t.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def _contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if t is None else t.contiguous() for t in tensors)
