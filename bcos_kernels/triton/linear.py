# mypy: ignore-errors
"""Linear layer and 1x1 convolution: one persistent matrix product forward, one for the input's gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bcos_kernels.contract import Options, accumulator, winner_dtype
from bcos_kernels.triton import epilogue, tiles
from bcos_kernels.triton.common import aligned, dot, exponent, precision, rounded, tile_order


@triton.jit
def _forward(
    p_x, p_w, p_gain, p_bias, p_b, p_norm, p_y, p_linear, p_winner, rows, columns, depth,
    H, W, P, Q, stride_h, stride_w,
    KIND: tl.constexpr, NORM: tl.constexpr, NORM_GIVEN: tl.constexpr, M: tl.constexpr, STRIDED: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """``u = x w^T * gain + bias``, ``l = max over M of u``, ``n = norm of the rows of x``, ``y = l |cos|^(B-1)``.

    ``x [rows, depth]`` (STRIDED: every stride-th pixel of ``[N, H, W, depth]``), ``w [columns*M, depth]``, ``gain`` (1/||w||)
    and ``bias [columns*M]``; ``norm [rows]``, ``y``, ``linear``, ``winner [rows, columns]``. ``p_x`` and ``p_w`` are tensor
    descriptors where TMA. ``p_gain``, ``p_bias``, ``p_linear`` and ``p_winner`` may be None. The sum of squares is taken from
    the tiles of ``x`` on their way to the product (by every column tile, written by the first), unless NORM_GIVEN.

    MaxOut goes over the product M times, with one accumulator: M of them would not fit into the registers, and the second
    reading of ``x`` comes from L2.
    """
    ACC: tl.constexpr = tl.float64 if p_y.dtype.element_ty == tl.float64 else tl.float32
    tiles_m = tl.cdiv(rows, ROWS)
    tiles_n = tl.cdiv(columns, COLUMNS)
    for t in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = tile_order(t, tiles_m, tiles_n)
        o_r = tile_m.to(tl.int64) * ROWS + tl.arange(0, ROWS)
        o_c = tile_n * COLUMNS + tl.arange(0, COLUMNS)
        m_r = o_r < rows
        m_c = o_c < columns
        if STRIDED:
            b_n = o_r // (P * Q)
            b_pq = o_r - b_n * (P * Q)
            b_p = b_pq // Q
            o_x = ((b_n * H + b_p * stride_h) * W + (b_pq - b_p * Q) * stride_w) * depth
        else:
            o_x = o_r * depth
        b_squares = tl.zeros((ROWS,), ACC)
        for i in tl.static_range(M):
            o_w = o_c.to(tl.int64) * M + i
            b_acc = tl.zeros((ROWS, COLUMNS), ACC)
            for k in tl.range(0, depth, DEPTH, num_stages=STAGES):
                if TMA:
                    b_x = p_x.load([tile_m * ROWS, k])
                    b_w = p_w.load([tile_n * COLUMNS, k])
                else:
                    o_k = k + tl.arange(0, DEPTH)
                    m_k = (o_k < depth)[None, :]
                    b_x = tl.load(p_x + o_x[:, None] + o_k[None, :], mask=m_r[:, None] & m_k, other=0)
                    b_w = tl.load(p_w + (o_w * depth)[:, None] + o_k[None, :], mask=m_c[:, None] & m_k, other=0)
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
        b_y = b_linear
        if KIND != epilogue.LINEAR:
            if NORM_GIVEN:
                b_norm = tl.load(p_norm + o_r, mask=m_r, other=1)
            else:
                b_norm = epilogue.root(b_squares, NORM)
                if tile_n == 0:
                    tl.store(p_norm + o_r, b_norm, mask=m_r)
            b_y = epilogue.scaled(b_linear, b_norm[:, None], p_b, KIND)
        m_y = m_r[:, None] & m_c[None, :]
        o_y = (o_r * columns)[:, None] + o_c[None, :]
        tl.store(p_y + o_y, rounded(b_y, p_y.dtype.element_ty), mask=m_y)
        if p_linear is not None:
            tl.store(p_linear + o_y, rounded(b_linear, p_linear.dtype.element_ty), mask=m_y)
        if p_winner is not None:
            tl.store(p_winner + o_y, b_winner.to(p_winner.dtype.element_ty), mask=m_y)


@triton.jit
def _input_gradient(
    p_du, p_w, p_x, p_pull, p_dx, rows, columns, depth,
    TMA: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """``dx = du w + x * pull``: ``du [rows, depth]``, ``w [depth, columns]``, ``x``, ``dx [rows, columns]``, ``pull [rows]``.

    ``p_pull`` may be None. ``p_du`` and ``p_w`` are tensor descriptors where TMA.
    """
    ACC: tl.constexpr = tl.float64 if p_dx.dtype.element_ty == tl.float64 else tl.float32
    tiles_m = tl.cdiv(rows, ROWS)
    tiles_n = tl.cdiv(columns, COLUMNS)
    for t in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = tile_order(t, tiles_m, tiles_n)
        o_r = tile_m.to(tl.int64) * ROWS + tl.arange(0, ROWS)
        o_c = tile_n * COLUMNS + tl.arange(0, COLUMNS)
        m_r = o_r < rows
        m_c = o_c < columns
        b_acc = tl.zeros((ROWS, COLUMNS), ACC)
        for k in tl.range(0, depth, DEPTH, num_stages=STAGES):
            if TMA:
                b_du = p_du.load([tile_m * ROWS, k])
                b_w = p_w.load([k, tile_n * COLUMNS])
            else:
                o_k = k + tl.arange(0, DEPTH)
                m_k = o_k < depth
                o_w = (o_k.to(tl.int64) * columns)[:, None] + o_c[None, :]
                b_du = tl.load(p_du + (o_r * depth)[:, None] + o_k[None, :], mask=m_r[:, None] & m_k[None, :], other=0)
                b_w = tl.load(p_w + o_w, mask=m_k[:, None] & m_c[None, :], other=0)
            b_acc = dot(b_du, b_w, b_acc, PRECISION)
        m_dx = m_r[:, None] & m_c[None, :]
        o_dx = (o_r * columns)[:, None] + o_c[None, :]
        if p_pull is not None:
            b_pull = tl.load(p_pull + o_r, mask=m_r, other=0)
            b_acc += tl.load(p_x + o_dx, mask=m_dx, other=0).to(ACC) * b_pull[:, None]
        tl.store(p_dx + o_dx, rounded(b_acc, p_dx.dtype.element_ty), mask=m_dx)


def _descriptors(*operands: Tensor) -> bool:
    """Whether the copy engine can read these matrices: Hopper or later, rows and base aligned to 16 bytes."""
    if tiles.device_class(operands[0]) == "sm80":
        return False
    return aligned(*operands) and all(t.numel() > 0 for t in operands)


def _descriptor(t: Tensor, rows: int, columns: int):
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(t, list(t.shape), [t.shape[1], 1], [rows, columns])


def _launch(like: Tensor, key: str, rows: int, columns: int, how: str, max_out: int, scattered: bool, run) -> None:
    """``run(tile, programs)`` with the table's tile, or with the measured one."""

    def with_tile(tile: tiles.Tile) -> None:
        count = triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns)
        run(tile, min(count, tiles.programs(like)))

    default = tiles.gemm(like, rows, columns, how, max_out, scattered=scattered)
    with_tile(
        tiles.tuned(
            like,
            f"{key} {str(like.dtype)[6:]} {how} {rows}x{columns}",
            default,
            tiles.gemm_candidates(like, how),
            lambda tile: triton.testing.do_bench(lambda: with_tile(tile)),
        )
    )


def forward(
    x: Tensor,
    weight: Tensor,
    gain: Tensor | None,
    bias: Tensor | None,
    options: Options,
    for_backward: bool,
    norm_kind: int,
    strided: tuple[int, int, int, int, int] | None = None,
    norm: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(y, norm, linear, winner)`` of a contiguous ``x [rows, C]``, all ``[rows, O]`` but ``norm [rows]``.

    ``strided = (N, H, W, P, Q)``: the rows of ``x`` are pixels of ``[N, H, W]``, and every stride-th is taken.
    ``norm``: where it is known already, it is not computed.
    """
    o = options
    depth = x.shape[1]
    n, h, w, p, q = strided or (x.shape[0], 1, 1, 1, 1)
    rows, columns = n * p * q, weight.shape[0] // o.max_out
    keep = for_backward and o.keeps_linear(x.dtype)
    pick = for_backward and o.max_out > 1
    y = x.new_empty(rows, columns)
    linear = x.new_empty((rows, columns) if keep else 0)
    winner = x.new_empty((rows, columns) if pick else 0, dtype=winner_dtype(o.max_out))
    given = norm is not None
    if norm is None:
        norm = x.new_empty(0 if o.is_linear else rows, dtype=accumulator(x.dtype))
    how = precision(x.dtype, conv=norm_kind == epilogue.PATCH.value)
    # MaxOut's rows of w are M apart, which a descriptor of [rows, depth] cannot say
    tma = strided is None and o.max_out == 1 and _descriptors(x, weight)

    def run(tile: tiles.Tile, programs: int) -> None:
        _forward[(programs,)](
            _descriptor(x, tile.rows, tile.depth) if tma else x,
            _descriptor(weight, tile.columns, tile.depth) if tma else weight,
            gain, bias, exponent(o, x), norm, y, linear if keep else None, winner if pick else None,
            rows, columns, depth, h, w, p, q, *o.stride,
            KIND=epilogue.kind(o), NORM=norm_kind, NORM_GIVEN=given, M=o.max_out, STRIDED=strided is not None, TMA=tma,
            PRECISION=how, ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth, STAGES=tile.stages,
            num_warps=tile.warps,
        )  # fmt: skip

    _launch(
        x,
        f"linear K={depth} M={o.max_out} B={epilogue.kind(o)}",
        rows,
        columns,
        how,
        o.max_out,
        not aligned(x, weight),
        run,
    )
    return y, norm, linear, winner


def input_gradient(du: Tensor, weight: Tensor, x: Tensor, pull: Tensor | None, *, conv: bool) -> Tensor:
    """``du [rows, O*M] @ weight [O*M, C] + x * pull``, all contiguous."""
    rows, depth = du.shape
    columns = weight.shape[1]
    dx = torch.empty_like(x)
    how = precision(x.dtype, conv=conv)
    tma = _descriptors(du, weight)

    def run(tile: tiles.Tile, programs: int) -> None:
        _input_gradient[(programs,)](
            _descriptor(du, tile.rows, tile.depth) if tma else du,
            _descriptor(weight, tile.depth, tile.columns) if tma else weight,
            x, pull, dx, rows, columns, depth,
            TMA=tma, PRECISION=how, ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth, STAGES=tile.stages,
            num_warps=tile.warps,
        )  # fmt: skip

    _launch(x, f"input_gradient K={depth}", rows, columns, how, 1, not aligned(du, weight), run)
    return dx
