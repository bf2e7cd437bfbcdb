# mypy: ignore-errors
"""Convolution with any kernel size, channels-last: an implicit matrix product, and a direct sum for depthwise layers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bcos_kernels.contract import Options, accumulator, winner_dtype
from bcos_kernels.triton import epilogue, tiles
from bcos_kernels.triton.common import aligned, dot, exponent, precision, rounded, split_rows, tile_order


@triton.jit
def _forward(
    p_x, p_w, p_gain, p_bias, p_b, p_norm, p_y, p_linear, p_winner, rows, groups, group_columns, group_channels,
    H, W, P, Q, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w,
    KH: tl.constexpr, KW: tl.constexpr, KIND: tl.constexpr, NORM_GIVEN: tl.constexpr, M: tl.constexpr, PACKED: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``u = conv2d(x, w) * gain + bias``, ``l = max over M of u``, ``n = norm of the patch``, ``y = l |cos|^(B-1)``.

    ``x [N, H, W, G*Cg]``, ``w [G*Og*M, KH, KW, Cg]``, ``gain`` (1/||w||) and ``bias [G*Og*M]``; ``y``, ``linear``, ``winner
    [N*P*Q, G*Og]``, ``norm [N, G, P, Q]``. ``p_gain``, ``p_bias``, ``p_linear`` and ``p_winner`` may be None. A program
    computes a tile of one group. The sum of squares is taken from the tiles of ``x`` on their way to the product, unless
    NORM_GIVEN.

    The sum runs over filter taps and, within a tap, over channels; PACKED: over both at once, so that few channels (the stem
    has 6) still fill a tile, at the price of an address and a mask for every element.
    """
    ACC: tl.constexpr = tl.float64 if p_y.dtype.element_ty == tl.float64 else tl.float32
    tile_m, tile_n = tile_order(tl.program_id(0), tl.cdiv(rows, ROWS), tl.cdiv(group_columns, COLUMNS))
    g = tl.program_id(1).to(tl.int64)
    depth = KH * KW * group_channels
    o_r = tile_m.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_c = tile_n * COLUMNS + tl.arange(0, COLUMNS)
    m_r = o_r < rows
    m_c = o_c < group_columns
    b_n, b_pq, _ = split_rows(o_r, P * Q, 0, 0)
    b_p = b_pq // Q
    b_h = b_p * stride_h - pad_h
    b_w0 = (b_pq - b_p * Q) * stride_w - pad_w
    o_pixel = (b_n * H + b_h) * W + b_w0
    b_squares = tl.zeros((ROWS,), ACC)
    if PACKED:
        steps = tl.cdiv(depth, DEPTH)
    else:
        blocks = tl.cdiv(group_channels, DEPTH)
        steps = KH * KW * blocks
    for i in tl.static_range(M):
        o_w = (g * group_columns + o_c) * M + i
        b_acc = tl.zeros((ROWS, COLUMNS), ACC)
        for step in tl.range(0, steps, num_stages=STAGES):
            if PACKED:
                o_k = step * DEPTH + tl.arange(0, DEPTH)
                m_k = o_k < depth
                b_tap = o_k // group_channels
                o_in = o_k - b_tap * group_channels
                b_dh = (b_tap // KW * dil_h)[None, :]
                b_dw = (b_tap % KW * dil_w)[None, :]
            else:
                tap = step // blocks
                o_in = (step - tap * blocks) * DEPTH + tl.arange(0, DEPTH)
                m_k = o_in < group_channels
                o_k = tap * group_channels + o_in
                b_dh = tap // KW * dil_h
                b_dw = tap % KW * dil_w
            b_y = b_h[:, None] + b_dh
            b_xw = b_w0[:, None] + b_dw
            m_x = (m_r[:, None] & m_k[None, :]) & ((b_y >= 0) & (b_y < H) & (b_xw >= 0) & (b_xw < W))
            o_x = (o_pixel[:, None] + (b_dh * W + b_dw)) * groups * group_channels + g * group_channels
            b_x = tl.load(p_x + o_x + o_in[None, :], mask=m_x, other=0)
            b_w = tl.load(p_w + (o_w * depth)[:, None] + o_k[None, :], mask=m_c[:, None] & m_k[None, :], other=0)
            if (i == 0) and (KIND != epilogue.LINEAR) and (not NORM_GIVEN):
                b_wide = b_x.to(ACC)
                b_squares += tl.sum(b_wide * b_wide, 1)
            b_acc = dot(b_x, b_w.T, b_acc, PRECISION)
        if p_gain is not None:
            b_acc *= tl.load(p_gain + o_w, mask=m_c, other=0).to(ACC)[None, :]
        if p_bias is not None:
            b_acc += tl.load(p_bias + o_w, mask=m_c, other=0).to(ACC)[None, :]
        if i == 0:
            b_linear = b_acc
            b_winner = tl.zeros((ROWS, COLUMNS), tl.int32)
        else:
            b_linear, b_winner = epilogue.larger(b_linear, b_winner, b_acc, i)
    b_out = b_linear
    if KIND != epilogue.LINEAR:
        o_norm = (b_n * groups + g) * (P * Q) + b_pq
        if NORM_GIVEN:
            b_norm = tl.load(p_norm + o_norm, mask=m_r, other=1)
        else:
            b_norm = epilogue.root(b_squares, epilogue.PATCH)
            if tile_n == 0:
                tl.store(p_norm + o_norm, b_norm, mask=m_r)
        b_out = epilogue.scaled(b_linear, b_norm[:, None], p_b, KIND)
    m_y = m_r[:, None] & m_c[None, :]
    o_y = (o_r * groups * group_columns)[:, None] + (g * group_columns + o_c)[None, :]
    tl.store(p_y + o_y, rounded(b_out, p_y.dtype.element_ty), mask=m_y)
    if p_linear is not None:
        tl.store(p_linear + o_y, rounded(b_linear, p_linear.dtype.element_ty), mask=m_y)
    if p_winner is not None:
        tl.store(p_winner + o_y, b_winner.to(p_winner.dtype.element_ty), mask=m_y)


@triton.jit
def _depthwise(
    p_x, p_w, p_gain, p_bias, p_b, p_norm, p_y, p_linear, p_winner, rows, groups, group_columns,
    H, W, P, Q, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w,
    KH: tl.constexpr, KW: tl.constexpr, KIND: tl.constexpr, M: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """As ``_forward`` with one input channel a group: ``x [N, H, W, G]``, ``w [G*Og*M, KH, KW]``, ``y [N*P*Q, G*Og]``.

    A program takes a block of rows and of output channels; there is nothing to share among channels but the window.
    """
    ACC: tl.constexpr = tl.float64 if p_y.dtype.element_ty == tl.float64 else tl.float32
    columns = groups * group_columns
    o_r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_c = tl.program_id(1).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    m_r = o_r < rows
    m_c = o_c < columns
    m_y = m_r[:, None] & m_c[None, :]
    o_g = o_c // group_columns
    b_n, b_pq, _ = split_rows(o_r, P * Q, 0, 0)
    b_p = b_pq // Q
    b_h = b_p * stride_h - pad_h
    b_w0 = (b_pq - b_p * Q) * stride_w - pad_w
    o_pixel = (b_n * H + b_h) * W + b_w0
    b_squares = tl.zeros((ROWS, CHANNELS), ACC)
    for i in tl.static_range(M):
        o_w = o_c * M + i
        b_acc = tl.zeros((ROWS, CHANNELS), ACC)
        for tap in range(KH * KW):
            b_dh = tap // KW * dil_h
            b_dw = tap % KW * dil_w
            m_tap = (b_h + b_dh >= 0) & (b_h + b_dh < H) & (b_w0 + b_dw >= 0) & (b_w0 + b_dw < W)
            o_x = ((o_pixel + (b_dh * W + b_dw)) * groups)[:, None] + o_g[None, :]
            b_x = tl.load(p_x + o_x, mask=m_y & m_tap[:, None], other=0).to(ACC)
            b_acc += b_x * tl.load(p_w + o_w * (KH * KW) + tap, mask=m_c, other=0).to(ACC)[None, :]
            if (i == 0) and (KIND != epilogue.LINEAR):
                b_squares += b_x * b_x
        if p_gain is not None:
            b_acc *= tl.load(p_gain + o_w, mask=m_c, other=0).to(ACC)[None, :]
        if p_bias is not None:
            b_acc += tl.load(p_bias + o_w, mask=m_c, other=0).to(ACC)[None, :]
        if i == 0:
            b_linear = b_acc
            b_winner = tl.zeros((ROWS, CHANNELS), tl.int32)
        else:
            b_linear, b_winner = epilogue.larger(b_linear, b_winner, b_acc, i)
    b_out = b_linear
    if KIND != epilogue.LINEAR:
        b_norm = epilogue.root(b_squares, epilogue.PATCH)
        o_norm = (b_n[:, None] * groups + o_g[None, :]) * (P * Q) + b_pq[:, None]
        tl.store(p_norm + o_norm, b_norm, mask=m_y & (o_g * group_columns == o_c)[None, :])
        b_out = epilogue.scaled(b_linear, b_norm, p_b, KIND)
    o_y = (o_r * columns)[:, None] + o_c[None, :]
    tl.store(p_y + o_y, rounded(b_out, p_y.dtype.element_ty), mask=m_y)
    if p_linear is not None:
        tl.store(p_linear + o_y, rounded(b_linear, p_linear.dtype.element_ty), mask=m_y)
    if p_winner is not None:
        tl.store(p_winner + o_y, b_winner.to(p_winner.dtype.element_ty), mask=m_y)


def forward(
    x: Tensor,
    weight: Tensor,
    gain: Tensor | None,
    bias: Tensor | None,
    options: Options,
    for_backward: bool,
    size: tuple[int, int],
    norm: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(y, norm, linear, winner)`` of a channels-last ``x [N, C, H, W]``. ``norm``: where known already, not computed."""
    o = options
    n, channels, h, w = x.shape
    kh, kw = weight.shape[2:]
    # one copy of the weights where they are not channels-last: the taps have to be outside, the channels inside
    weight = weight.contiguous(memory_format=torch.channels_last)
    columns = weight.shape[0] // o.max_out
    shape = (n, columns, *size)
    like = {"device": x.device, "memory_format": torch.channels_last}
    keep = for_backward and o.keeps_linear(x.dtype)
    pick = for_backward and o.max_out > 1
    y = torch.empty(shape, dtype=x.dtype, **like)
    linear = torch.empty_like(y) if keep else x.new_empty(0)
    winner_type = winner_dtype(o.max_out)
    winner = torch.empty(shape, dtype=winner_type, **like) if pick else x.new_empty(0, dtype=winner_type)
    given = norm is not None
    if norm is None:
        norm = x.new_empty(0 if o.is_linear else (n, o.groups, *size), dtype=accumulator(x.dtype))
    rows = n * size[0] * size[1]
    tensors = (gain, bias, exponent(o, x), norm, y, linear if keep else None, winner if pick else None)
    numbers = (h, w, *size, *o.stride, *o.padding, *o.dilation)
    if weight.shape[1] == 1 and not given:
        patch = tiles.patch(x, columns, channels_last=True)
        _depthwise[(triton.cdiv(rows, patch.rows), triton.cdiv(columns, patch.channels))](
            x, weight, *tensors, rows, o.groups, columns // o.groups, *numbers,
            KH=kh, KW=kw, KIND=epilogue.kind(o), M=o.max_out, ROWS=patch.rows, CHANNELS=patch.channels,
            num_warps=patch.warps,
        )  # fmt: skip
        return y, norm, linear, winner
    group_columns, group_channels = columns // o.groups, channels // o.groups
    how = precision(x.dtype, conv=True)
    # fewer would leave more than half of a tile of depth 64 empty
    packed = group_channels < 32

    def run(tile: tiles.Tile) -> None:
        grid = (triton.cdiv(rows, tile.rows) * triton.cdiv(group_columns, tile.columns), o.groups)
        _forward[grid](
            x, weight, *tensors, rows, o.groups, group_columns, group_channels, *numbers,
            KH=kh, KW=kw, KIND=epilogue.kind(o), NORM_GIVEN=given, M=o.max_out,
            PACKED=packed,
            PRECISION=how, ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth, STAGES=tile.stages,
            num_warps=tile.warps,
        )  # fmt: skip

    run(
        tiles.tuned(
            x,
            f"conv2d {str(x.dtype)[6:]} {how} {list(x.shape)} {list(weight.shape)} {o.stride} {o.padding} {o.dilation} "
            f"G={o.groups} M={o.max_out} B={epilogue.kind(o)}",
            tiles.gemm(x, rows, group_columns, how, o.max_out, scattered=packed or not aligned(x, weight)),
            tiles.gemm_candidates(x, how),
            lambda tile: triton.testing.do_bench(lambda: run(tile)),
        )
    )
    return y, norm, linear, winner
