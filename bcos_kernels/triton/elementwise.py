# mypy: ignore-errors
"""The passes around a matrix product: patch and row norm, the scale behind it, its backward pass, ``dx += x * s``.

Tensors are seen as rows (pixels of all images) and channels, in either memory format; ``norm`` and everything of its shape
is contiguous ``[N, G, P, Q]``. A program takes a block of rows of one group and goes over the group's channels. Where a
group has one channel (depthwise), a program takes a block of rows and of channels instead (``DEPTHWISE``).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bcos_kernels import reference
from bcos_kernels.contract import Options, Saved, accumulator, winner_dtype
from bcos_kernels.triton import epilogue, tiles
from bcos_kernels.triton.common import Layout, exponent, layout, rounded, split_rows

# ---- norm


@triton.jit
def _squares(
    p_x, p_out, rows, pixels, groups, group_channels, s_n, s_p, s_c,
    ROOT: tl.constexpr, NORM: tl.constexpr, DEPTHWISE: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """``out[n, g, p] = sum over the channels of group g of x[n, c, p]^2``; with ROOT the norm of it (window of one pixel).

    ``x``: rows x channels with strides; ``out [N, G, pixels]``, accumulator's dtype.
    """
    ACC: tl.constexpr = p_out.dtype.element_ty
    o_r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_r = o_r < rows
    b_n, b_p, o_x = split_rows(o_r, pixels, s_n, s_p)
    if DEPTHWISE:
        o_c = tl.program_id(1).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
        m_x = m_r[:, None] & (o_c < groups)[None, :]
        b_x = tl.load(p_x + o_x[:, None] + (o_c * s_c)[None, :], mask=m_x, other=0).to(ACC)
        b_out = b_x * b_x
        o_out = (b_n[:, None] * groups + o_c[None, :]) * pixels + b_p[:, None]
        if ROOT:
            b_out = epilogue.root(b_out, NORM)
        tl.store(p_out + o_out, b_out, mask=m_x)
    else:
        g = tl.program_id(1).to(tl.int64)
        b_out = tl.zeros((ROWS,), ACC)
        for c in range(0, group_channels, CHANNELS):
            o_c = c + tl.arange(0, CHANNELS)
            m_x = m_r[:, None] & (o_c < group_channels)[None, :]
            o_channel = (g * group_channels + o_c) * s_c
            b_x = tl.load(p_x + o_x[:, None] + o_channel[None, :], mask=m_x, other=0).to(ACC)
            b_out += tl.sum(b_x * b_x, 1)
        if ROOT:
            b_out = epilogue.root(b_out, NORM)
        tl.store(p_out + (b_n * groups + g) * pixels + b_p, b_out, mask=m_r)


@triton.jit
def _window_root(
    p_s, p_norm, total, H, W, P, Q, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w,
    KH: tl.constexpr, KW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``norm[m, p, q] = sqrt(sum over the window of s[m, h, w] + 1e-6)``, padding counts as zeros.

    ``s [N*G, H, W]``, ``norm [N*G, P, Q]``, both in the accumulator's dtype.
    """
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < total
    b_map, b_pq, _ = split_rows(o, P * Q, 0, 0)
    o_map = b_map * H * W
    b_p = b_pq // Q
    b_q = b_pq - b_p * Q
    b_sum = tl.zeros((BLOCK,), p_norm.dtype.element_ty)
    for i in range(KH):
        b_h = b_p * stride_h - pad_h + i * dil_h
        for j in range(KW):
            b_w = b_q * stride_w - pad_w + j * dil_w
            m_tap = m & (b_h >= 0) & (b_h < H) & (b_w >= 0) & (b_w < W)
            b_sum += tl.load(p_s + o_map + b_h * W + b_w, mask=m_tap, other=0)
    tl.store(p_norm + o, epilogue.root(b_sum, epilogue.PATCH), mask=m)


def _channel_grid(tensor: Tensor, at: Layout, groups: int, group_channels: int, depthwise: bool):
    """Tile and grid of a pass over ``at``: programs over (rows, groups), or over (rows, channels) where ``depthwise``."""
    tile = tiles.patch(tensor, groups if depthwise else group_channels, channels_last=at.channel_stride == 1)
    second = triton.cdiv(groups, tile.channels) if depthwise else groups
    return tile, (triton.cdiv(at.rows, tile.rows), second)


def _sum_of_squares(x: Tensor, out: Tensor, at: Layout, groups: int, root: bool, norm: int) -> None:
    group_channels = at.channels // groups
    depthwise = group_channels == 1 and groups > 1
    tile, grid = _channel_grid(x, at, groups, group_channels, depthwise)
    _squares[grid](
        x, out, at.rows, at.pixels, groups, group_channels, *at.strides,
        ROOT=root, NORM=norm, DEPTHWISE=depthwise, ROWS=tile.rows, CHANNELS=tile.channels, num_warps=tile.warps,
    )  # fmt: skip


def row_norm(x: Tensor, at: Layout, squares: Tensor | None = None) -> Tensor:
    """``[rows]``: ``||x|| + 1e-12`` of every row of a contiguous ``[rows, C]``; ``squares``: their sums, where known."""
    if squares is not None:
        return squares.reshape(-1).sqrt().add_(reference.ROW_NORM_EPS)
    norm = x.new_empty(at.rows, dtype=accumulator(x.dtype))
    _sum_of_squares(x, norm, at, 1, True, epilogue.ROW.value)
    return norm


def patch_norm(
    x: Tensor, kernel: tuple[int, int], size: tuple[int, int], options: Options, squares: Tensor | None = None
) -> Tensor:
    """``[N, G, P, Q]`` of a dense ``x [N, C, H, W]``: one pass over ``x``, one over the small map of its squares.

    ``squares [N, G, H, W]``: that map, where it is known; then ``x`` is not read.
    """
    o = options
    at, (n, _, h, w) = layout(x), x.shape
    norm = x.new_empty((n, o.groups, *size), dtype=accumulator(x.dtype))
    if squares is not None:
        squares = squares.contiguous()
    elif kernel == (1, 1) and o.stride == (1, 1) and o.padding == (0, 0):
        _sum_of_squares(x, norm, at, o.groups, True, epilogue.PATCH.value)
        return norm
    else:
        squares = x.new_empty((n, o.groups, h, w), dtype=norm.dtype)
        _sum_of_squares(x, squares, at, o.groups, False, epilogue.PATCH.value)
    block = 512
    _window_root[(triton.cdiv(norm.numel(), block),)](
        squares, norm, norm.numel(), h, w, *size, *o.stride, *o.padding, *o.dilation,
        KH=kernel[0], KW=kernel[1], BLOCK=block,
    )  # fmt: skip
    return norm


# ---- the scale behind a convolution or matrix product


@triton.jit
def _scale(
    p_u, p_norm, p_b, p_y, p_linear, p_winner, rows, pixels, channels, groups, group_channels,
    u_n, u_p, u_c, s_n, s_p, s_c,
    KIND: tl.constexpr, M: tl.constexpr, GROUPED: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """``l = max over M of u``, ``y = l |cos|^(B-1)``.

    ``u``: rows x O*M; ``y``, ``linear``, ``winner``: rows x O; ``norm [N, G, pixels]``.
    ``p_linear`` and ``p_winner`` may be None.
    """
    ACC: tl.constexpr = tl.float64 if p_u.dtype.element_ty == tl.float64 else tl.float32
    o_r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_c = tl.program_id(1).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    m_r = o_r < rows
    m = m_r[:, None] & (o_c < channels)[None, :]
    b_n, b_p, o_u = split_rows(o_r, pixels, u_n, u_p)
    b_linear = tl.load(p_u + o_u[:, None] + (o_c * M * u_c)[None, :], mask=m, other=0).to(ACC)
    b_winner = tl.zeros((ROWS, CHANNELS), tl.int32)
    for i in tl.static_range(1, M):
        b_u = tl.load(p_u + o_u[:, None] + ((o_c * M + i) * u_c)[None, :], mask=m, other=0).to(ACC)
        b_linear, b_winner = epilogue.larger(b_linear, b_winner, b_u, i)
    o_y = (b_n * s_n + b_p.to(tl.int64) * s_p)[:, None] + (o_c * s_c)[None, :]
    b_y = b_linear
    if KIND != epilogue.LINEAR:
        if GROUPED:
            o_norm = (b_n[:, None] * groups + (o_c // group_channels)[None, :]) * pixels + b_p[:, None]
            b_norm = tl.load(p_norm + o_norm, mask=m, other=1)
        else:
            b_norm = tl.load(p_norm + o_r, mask=m_r, other=1)[:, None]
        b_y = epilogue.scaled(b_linear, b_norm, p_b, KIND)
    tl.store(p_y + o_y, rounded(b_y, p_y.dtype.element_ty), mask=m)
    if p_linear is not None:
        tl.store(p_linear + o_y, rounded(b_linear, p_linear.dtype.element_ty), mask=m)
    if p_winner is not None:
        tl.store(p_winner + o_y, b_winner.to(p_winner.dtype.element_ty), mask=m)


def scale(
    u: Tensor,
    u_at: Layout,
    norm: Tensor,
    y_shape: torch.Size,
    options: Options,
    for_backward: bool,
    fmt: torch.memory_format,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(y, linear, winner)`` from a linear output that nobody else holds: it becomes ``y`` or ``linear`` where it can."""
    o = options
    keep = for_backward and o.keeps_linear(u.dtype)
    pick = for_backward and o.max_out > 1
    empty = u.new_empty(0)
    if o.max_out == 1:
        if o.is_linear:
            return u, empty, u.new_empty(0, dtype=winner_dtype(1))
        y = torch.empty_like(u) if keep else u
        linear, writes_linear = (u, False) if keep else (empty, False)
    else:
        y = torch.empty(y_shape, dtype=u.dtype, device=u.device, memory_format=fmt)
        linear, writes_linear = (torch.empty_like(y), True) if keep else (empty, False)
    winner = torch.empty(
        y_shape if pick else 0,
        dtype=winner_dtype(o.max_out),
        device=u.device,
        **({"memory_format": fmt} if pick else {}),
    )
    at = _narrowed(u_at, o.max_out)
    group_channels = at.channels // o.groups
    tile = tiles.patch(u, at.channels, channels_last=at.channel_stride == 1)
    _scale[(triton.cdiv(at.rows, tile.rows), triton.cdiv(at.channels, tile.channels))](
        u, norm, exponent(o, u), y, linear if writes_linear else None, winner if pick else None,
        at.rows, at.pixels, at.channels, o.groups, group_channels, *u_at.strides, *at.strides,
        KIND=epilogue.kind(o), M=o.max_out, GROUPED=o.groups > 1, ROWS=tile.rows, CHANNELS=tile.channels,
        num_warps=tile.warps,
    )  # fmt: skip
    return y, linear, winner


def _narrowed(at: Layout, max_out: int) -> Layout:
    """The layout of the MaxOut result of a tensor in layout ``at``."""
    if at.channel_stride == 1:
        image, pixel = at.image_stride // max_out, at.pixel_stride // max_out
    else:
        image, pixel = at.image_stride // max_out, at.pixel_stride
    return Layout(at.rows, at.pixels, at.channels // max_out, image, pixel, at.channel_stride)


# ---- its backward pass


@triton.jit
def _scale_backward(
    p_grad, p_kept, p_norm, p_b, p_winner, p_du, p_pull, p_db, rows, pixels, groups, group_channels,
    u_n, u_p, u_c, s_n, s_p, s_c,
    KIND: tl.constexpr, NORM: tl.constexpr, M: tl.constexpr, KEEPS_LINEAR: tl.constexpr, DETACH: tl.constexpr,
    DEPTHWISE: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """``du = dL/dl`` at the winning MaxOut row, else 0; ``pull = (sum over the group's channels of dL/dn) / n``; ``db``.

    ``grad``, ``kept``, ``winner``: rows x O; ``du``: rows x O*M; ``pull [N, G, pixels]``; ``db``: one partial sum a program.
    Each of ``p_winner``, ``p_du``, ``p_pull`` and ``p_db`` may be None.
    """
    ACC: tl.constexpr = tl.float64 if p_grad.dtype.element_ty == tl.float64 else tl.float32
    o_r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_r = o_r < rows
    b_n, b_p, o_y = split_rows(o_r, pixels, s_n, s_p)
    o_u = b_n * u_n + b_p.to(tl.int64) * u_p
    second = tl.program_id(1).to(tl.int64)
    if DEPTHWISE:
        start = second * CHANNELS
        end = groups
        stop = start + CHANNELS
    else:
        start = second * group_channels
        end = start + group_channels
        stop = end
        if KIND != epilogue.LINEAR:
            o_norm = (b_n * groups + second) * pixels + b_p
            b_norm = tl.load(p_norm + o_norm, mask=m_r, other=1)[:, None]
            b_pull = tl.zeros((ROWS,), ACC)
    b_db = tl.zeros((ROWS,), ACC)
    for c in range(start, stop, CHANNELS):
        o_c = c + tl.arange(0, CHANNELS)
        m = m_r[:, None] & (o_c < end)[None, :]
        o_element = o_y[:, None] + (o_c * s_c)[None, :]
        b_dlinear = tl.load(p_grad + o_element, mask=m, other=0).to(ACC)
        if KIND != epilogue.LINEAR:
            if DEPTHWISE:
                o_norm = (b_n[:, None] * groups + o_c[None, :]) * pixels + b_p[:, None]
                b_norm = tl.load(p_norm + o_norm, mask=m, other=1)
            b_kept = tl.load(p_kept + o_element, mask=m, other=0).to(ACC)
            b_linear = epilogue.recovered(b_kept, b_norm, KEEPS_LINEAR)
            b_dlinear, b_dnorm, b_db_element = epilogue.scaled_backward(
                b_dlinear, b_linear, b_norm, p_b, KIND, DETACH, p_db is not None
            )
            if p_db is not None:
                b_db += tl.sum(b_db_element, 1)
            if p_pull is not None:
                if DEPTHWISE:
                    tl.store(p_pull + o_norm, epilogue.pull(b_dnorm, b_norm, NORM), mask=m)
                else:
                    b_pull += tl.sum(b_dnorm, 1)
        if p_du is not None:
            b_du = rounded(b_dlinear, p_du.dtype.element_ty)
            if M == 1:
                tl.store(p_du + o_u[:, None] + (o_c * u_c)[None, :], b_du, mask=m)
            else:
                b_winner = tl.load(p_winner + o_element, mask=m, other=0).to(tl.int32)
                for i in tl.static_range(M):
                    b_row = tl.where(b_winner == i, b_du, tl.zeros_like(b_du))
                    tl.store(p_du + o_u[:, None] + ((o_c * M + i) * u_c)[None, :], b_row, mask=m)
    if (KIND != epilogue.LINEAR) and (not DEPTHWISE) and (p_pull is not None):
        b_norm = tl.load(p_norm + o_norm, mask=m_r, other=1)
        tl.store(p_pull + o_norm, epilogue.pull(b_pull, b_norm, NORM), mask=m_r)
    if p_db is not None:
        o_program = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
        tl.store(p_db + o_program, tl.sum(b_db, 0))


def scale_backward(
    grad: Tensor,
    at: Layout,
    saved: Saved,
    options: Options,
    norm_kind: int,
    fmt: torch.memory_format,
    *,
    needs_u: bool,
    needs_pull: bool,
    needs_b: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(du, pull, db)``; ``grad`` and ``saved.kept`` are in layout ``at``. What is not wanted is empty.

    Deterministic: partial sums of ``db`` are added up by ``torch.sum``.
    """
    o = options
    empty = grad.new_empty(0)
    if o.is_linear and o.max_out == 1:
        return grad, empty, empty
    acc = accumulator(grad.dtype)
    groups = 1 if o.is_linear else o.groups
    group_channels = at.channels // groups
    depthwise = group_channels == 1 and groups > 1
    tile, grid = _channel_grid(grad, at, groups, group_channels, depthwise)
    du = empty
    if needs_u:
        shape = (*grad.shape[:1], at.channels * o.max_out, *grad.shape[2:])
        du = torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=fmt)
    pull = torch.empty_like(saved.norm) if needs_pull else empty
    partial = grad.new_empty(grid[0] * grid[1], dtype=acc) if needs_b else empty
    u_at = _widened(at, o.max_out)
    _scale_backward[grid](
        grad, saved.kept, saved.norm, exponent(o, grad), saved.winner if o.max_out > 1 else None,
        du if needs_u else None, pull if needs_pull else None, partial if needs_b else None,
        at.rows, at.pixels, groups, group_channels, *u_at.strides, *at.strides,
        KIND=epilogue.kind(o), NORM=norm_kind, M=o.max_out, KEEPS_LINEAR=o.keeps_linear(grad.dtype),
        DETACH=o.detach_scale, DEPTHWISE=depthwise, ROWS=tile.rows, CHANNELS=tile.channels, num_warps=tile.warps,
    )  # fmt: skip
    return du, pull, partial.sum() if needs_b else empty


def _widened(at: Layout, max_out: int) -> Layout:
    """The layout of the linear output whose MaxOut result is in layout ``at``."""
    pixel = at.pixel_stride * max_out if at.channel_stride == 1 else at.pixel_stride
    return Layout(at.rows, at.pixels, at.channels * max_out, at.image_stride * max_out, pixel, at.channel_stride)


# ---- dx += x * s


@triton.jit
def _add_pull(
    p_dx, p_x, p_pull, rows, pixels, groups, group_channels, s_n, s_p, s_c, x_n, x_p, x_c,
    W, P, Q, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w,
    KH: tl.constexpr, KW: tl.constexpr, DEPTHWISE: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """``dx[n, c, h, w] += x[n, c, h, w] * sum over the windows (p, q) that hold (h, w) of pull[n, g, p, q]``, in place.

    ``dx``, ``x``: rows x C, each with its strides; ``pull [N, G, P, Q]``.
    """
    ACC: tl.constexpr = p_pull.dtype.element_ty
    o_r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_r = o_r < rows
    b_n, b_pixel, o_dx = split_rows(o_r, pixels, s_n, s_p)
    o_x = b_n * x_n + b_pixel.to(tl.int64) * x_p
    b_h = b_pixel // W
    b_w = b_pixel - b_h * W
    second = tl.program_id(1).to(tl.int64)
    if DEPTHWISE:
        start = second * CHANNELS
        end = groups
        stop = start + CHANNELS
        o_g = start + tl.arange(0, CHANNELS)
        o_map = (b_n[:, None] * groups + o_g[None, :]) * (P * Q)
        m_map = m_r[:, None] & (o_g < groups)[None, :]
        b_s = tl.zeros((ROWS, CHANNELS), ACC)
    else:
        start = second * group_channels
        end = start + group_channels
        stop = end
        o_map = (b_n * groups + second)[:, None] * (P * Q)
        m_map = m_r[:, None]
        b_s = tl.zeros((ROWS, 1), ACC)
    for i in range(KH):
        b_up = b_h + pad_h - i * dil_h
        b_p = b_up // stride_h
        m_h = (b_up >= 0) & (b_p * stride_h == b_up) & (b_p < P)
        for j in range(KW):
            b_left = b_w + pad_w - j * dil_w
            b_q = b_left // stride_w
            m_tap = m_h & (b_left >= 0) & (b_q * stride_w == b_left) & (b_q < Q)
            b_s += tl.load(p_pull + o_map + (b_p * Q + b_q)[:, None], mask=m_map & m_tap[:, None], other=0)
    for c in range(start, stop, CHANNELS):
        o_c = c + tl.arange(0, CHANNELS)
        m = m_r[:, None] & (o_c < end)[None, :]
        p_out = p_dx + o_dx[:, None] + (o_c * s_c)[None, :]
        b_x = tl.load(p_x + o_x[:, None] + (o_c * x_c)[None, :], mask=m, other=0).to(ACC)
        b_dx = tl.load(p_out, mask=m, other=0).to(ACC) + b_x * b_s
        tl.store(p_out, rounded(b_dx, p_dx.dtype.element_ty), mask=m)


def add_pull(
    dx: Tensor, dx_at: Layout, x: Tensor, x_at: Layout, pull: Tensor, kernel: tuple[int, int], options: Options
) -> None:
    """In place on ``dx``, which the backward pass made itself."""
    o = options
    width, size = (x.shape[3], pull.shape[2:]) if x.dim() == 4 else (1, (1, 1))
    group_channels = x_at.channels // o.groups
    depthwise = group_channels == 1 and o.groups > 1
    tile, grid = _channel_grid(x, x_at, o.groups, group_channels, depthwise)
    _add_pull[grid](
        dx, x, pull, x_at.rows, x_at.pixels, o.groups, group_channels, *dx_at.strides, *x_at.strides,
        width, *size, *o.stride, *o.padding, *o.dilation,
        KH=kernel[0], KW=kernel[1], DEPTHWISE=depthwise, ROWS=tile.rows, CHANNELS=tile.channels, num_warps=tile.warps,
    )  # fmt: skip
