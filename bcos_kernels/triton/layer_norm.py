# mypy: ignore-errors
"""Layer norm: forward (with the sums of squares for the next layer's norm), backward in both modes.

A program takes some rows and goes over their columns, twice: the second reading comes from the cache. The gradients of weight
and bias are sums over rows in two stages, as in ``batch_norm.py``: deterministic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bcos_kernels.contract import LayerNormForward, LayerNormGradients, LayerNormNeeds, LayerNormOptions, accumulator
from bcos_kernels.triton import tiles
from bcos_kernels.triton.batch_norm import parts_of
from bcos_kernels.triton.common import guard, rounded, row_layout


@triton.jit
def _apply(
    p_x, p_weight, p_bias, p_z, p_mean, p_rstd, p_squares, rows, columns,
    EPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """``z = (x - mean) rstd weight + bias``, ``rstd = 1 / sqrt(var + eps)``; ``squares = sum over the row of z^2``.

    ``x``, ``z [rows, columns]``; ``mean``, ``rstd``, ``squares [rows]``; ``weight``, ``bias [columns]``. ``p_weight``,
    ``p_bias`` and ``p_squares`` may be None. The variance is about the mean, by Chan's update, as for the batch norm.
    """
    ACC: tl.constexpr = p_mean.dtype.element_ty
    o_r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_r = o_r < rows
    b_mean = tl.zeros((ROWS,), ACC)
    b_off2 = tl.zeros((ROWS,), ACC)
    for c in range(0, columns, COLUMNS):
        o_c = c + tl.arange(0, COLUMNS)
        m = m_r[:, None] & (o_c < columns)[None, :]
        b_x = tl.load(p_x + (o_r * columns)[:, None] + o_c[None, :], mask=m, other=0).to(ACC)
        count = tl.minimum(columns - c, COLUMNS).to(ACC)
        b_new = tl.sum(b_x, 1) / count
        b_off = tl.where(m, b_x - b_new[:, None], 0)
        b_delta = b_new - b_mean
        share = count / (c + count)
        b_off2 += tl.sum(b_off * b_off, 1) + b_delta * b_delta * (share * c)
        b_mean += b_delta * share
    b_rstd = 1 / tl.sqrt(b_off2 / columns + tl.full((), EPS, ACC))
    b_squares = tl.zeros((ROWS,), ACC)
    for c in range(0, columns, COLUMNS):
        o_c = c + tl.arange(0, COLUMNS)
        m_c = o_c < columns
        m = m_r[:, None] & m_c[None, :]
        o = (o_r * columns)[:, None] + o_c[None, :]
        b_z = (tl.load(p_x + o, mask=m, other=0).to(ACC) - b_mean[:, None]) * b_rstd[:, None]
        if p_weight is not None:
            b_z *= tl.load(p_weight + o_c, mask=m_c, other=0).to(ACC)[None, :]
        if p_bias is not None:
            b_z += tl.load(p_bias + o_c, mask=m_c, other=0).to(ACC)[None, :]
        b_rounded = rounded(b_z, p_z.dtype.element_ty)
        tl.store(p_z + o, b_rounded, mask=m)
        if p_squares is not None:
            b_next = tl.where(m, b_rounded.to(ACC), 0)
            b_squares += tl.sum(b_next * b_next, 1)
    tl.store(p_mean + o_r, b_mean, mask=m_r)
    tl.store(p_rstd + o_r, b_rstd, mask=m_r)
    if p_squares is not None:
        tl.store(p_squares + o_r, b_squares, mask=m_r)


@triton.jit
def _input_gradient(
    p_grad, p_x, p_mean, p_rstd, p_weight, p_dx, rows, columns,
    DETACH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """``dx = (h - mean of h - xhat (mean of h xhat)) rstd``, ``h = g weight``, ``xhat = (x - mean) rstd``.

    Without the last term where DETACH: the variance is a constant, the mean is not.
    """
    ACC: tl.constexpr = p_mean.dtype.element_ty
    o_r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_r = o_r < rows
    b_mean = tl.load(p_mean + o_r, mask=m_r, other=0)
    b_rstd = tl.load(p_rstd + o_r, mask=m_r, other=0)
    b_sum = tl.zeros((ROWS,), ACC)
    b_dot = tl.zeros((ROWS,), ACC)
    for c in range(0, columns, COLUMNS):
        o_c = c + tl.arange(0, COLUMNS)
        m_c = o_c < columns
        m = m_r[:, None] & m_c[None, :]
        o = (o_r * columns)[:, None] + o_c[None, :]
        b_h = tl.load(p_grad + o, mask=m, other=0).to(ACC)
        if p_weight is not None:
            b_h *= tl.load(p_weight + o_c, mask=m_c, other=0).to(ACC)[None, :]
        b_sum += tl.sum(b_h, 1)
        if not DETACH:
            b_hat = (tl.load(p_x + o, mask=m, other=0).to(ACC) - b_mean[:, None]) * b_rstd[:, None]
            b_dot += tl.sum(b_h * b_hat, 1)
    b_sum /= columns
    b_dot /= columns
    for c in range(0, columns, COLUMNS):
        o_c = c + tl.arange(0, COLUMNS)
        m_c = o_c < columns
        m = m_r[:, None] & m_c[None, :]
        o = (o_r * columns)[:, None] + o_c[None, :]
        b_dx = tl.load(p_grad + o, mask=m, other=0).to(ACC)
        if p_weight is not None:
            b_dx *= tl.load(p_weight + o_c, mask=m_c, other=0).to(ACC)[None, :]
        b_dx -= b_sum[:, None]
        if not DETACH:
            b_hat = (tl.load(p_x + o, mask=m, other=0).to(ACC) - b_mean[:, None]) * b_rstd[:, None]
            b_dx -= b_hat * b_dot[:, None]
        tl.store(p_dx + o, rounded(b_dx * b_rstd[:, None], p_dx.dtype.element_ty), mask=m)


@triton.jit
def _parameter_gradients(
    p_grad, p_x, p_mean, p_rstd, p_dweight, p_dbias, rows, columns, per_program,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """``dweight[i, c] = sum g xhat`` and ``dbias[i, c] = sum g`` over the rows ``i*per_program ..``; either may be None."""
    ACC: tl.constexpr = p_mean.dtype.element_ty
    first = tl.program_id(0).to(tl.int64) * per_program
    last = tl.minimum(first + per_program, rows)
    o_c = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    m_c = o_c < columns
    b_dweight = tl.zeros((COLUMNS,), ACC)
    b_dbias = tl.zeros((COLUMNS,), ACC)
    for r in range(0, per_program, ROWS):
        o_r = first + r + tl.arange(0, ROWS)
        m_r = o_r < last
        m = m_r[:, None] & m_c[None, :]
        o = (o_r * columns)[:, None] + o_c[None, :]
        b_grad = tl.load(p_grad + o, mask=m, other=0).to(ACC)
        if p_dweight is not None:
            b_mean = tl.load(p_mean + o_r, mask=m_r, other=0)
            b_rstd = tl.load(p_rstd + o_r, mask=m_r, other=0)
            b_off = tl.load(p_x + o, mask=m, other=0).to(ACC) - b_mean[:, None]
            b_dweight += tl.sum(b_grad * b_off * b_rstd[:, None], 0)
        if p_dbias is not None:
            b_dbias += tl.sum(b_grad, 0)
    o_out = tl.program_id(0).to(tl.int64) * columns + o_c
    if p_dweight is not None:
        tl.store(p_dweight + o_out, b_dweight, mask=m_c)
    if p_dbias is not None:
        tl.store(p_dbias + o_out, b_dbias, mask=m_c)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, options: LayerNormOptions) -> LayerNormForward:
    acc, shape = accumulator(x.dtype), x.shape[: x.dim() - options.axes]
    # contiguous, as the sums of squares of one row of the next layer are
    x = x.contiguous()
    z = torch.empty_like(x)
    mean, rstd = (x.new_empty((*shape, *[1] * options.axes), dtype=acc) for _ in range(2))
    squares = x.new_empty((*shape, 1) if options.squares else 0, dtype=acc)
    if x.numel():
        with guard(x):
            rows, columns, tile = _rows(x, mean)
            _apply[(triton.cdiv(rows, tile.rows),)](
                x, *_contiguous(weight, bias), z, mean, rstd, squares if options.squares else None, rows, columns,
                EPS=options.eps, ROWS=tile.rows, COLUMNS=tile.channels, num_warps=tile.warps,
            )  # fmt: skip
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
    grad, x, weight = _contiguous(grad, x, weight)
    parameters = x.shape[x.dim() - options.axes :]
    dx = dweight = dbias = grad.new_empty(0)
    if x.numel() == 0:
        zeros = x.new_zeros(parameters, dtype=mean.dtype)
        return LayerNormGradients(
            torch.empty_like(x) if needs.x else dx, zeros if needs.weight else dweight, zeros if needs.bias else dbias
        )
    with guard(x):
        rows, columns, tile = _rows(x, mean)
        if needs.x:
            dx = torch.empty_like(x)
            _input_gradient[(triton.cdiv(rows, tile.rows),)](
                grad, x, mean, rstd, weight, dx, rows, columns,
                DETACH=options.detach_var, ROWS=tile.rows, COLUMNS=tile.channels, num_warps=tile.warps,
            )  # fmt: skip
        if needs.weight or needs.bias:
            parts, per_program = parts_of(row_layout(x.view(rows, columns)), tile)
            sums = (x.new_empty((parts, columns), dtype=mean.dtype) if want else None for want in needs[1:])
            dweights, dbiases = sums
            _parameter_gradients[(parts, triton.cdiv(columns, tile.channels))](
                grad, x, mean, rstd, dweights, dbiases, rows, columns, per_program,
                ROWS=tile.rows, COLUMNS=tile.channels, num_warps=tile.warps,
            )  # fmt: skip
            dweight = dweight if dweights is None else dweights.sum(0).view(parameters)
            dbias = dbias if dbiases is None else dbiases.sum(0).view(parameters)
    return LayerNormGradients(dx, dweight, dbias)


def _rows(x: Tensor, mean: Tensor) -> tuple[int, int, tiles.Patch]:
    """``(rows, columns)`` of ``x``, and the tile of a pass over it."""
    rows, columns = mean.numel(), x.numel() // mean.numel()
    return rows, columns, tiles.patch(x, columns, channels_last=True)


def _contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if t is None else t.contiguous() for t in tensors)
