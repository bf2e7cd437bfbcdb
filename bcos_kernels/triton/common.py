# mypy: ignore-errors
"""What the kernels and their launchers share: layouts, the device guard, tile order, the matrix product of two tiles."""

from __future__ import annotations

import logging
import os
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from bcos_kernels.contract import Options, accumulator

log = logging.getLogger("bcos_kernels")

#: Read when the kernels are defined, as Triton does. Two things about bfloat16 are wrong in the interpreter (Triton 3.9): it
#: multiplies tiles as if they were integers, and it truncates instead of rounding. There, and only there, `dot` converts
#: its operands first and `rounded` rounds by hand.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_INTERPRETED: tl.constexpr = tl.constexpr(INTERPRETED)


class Layout(NamedTuple):
    """A dense tensor as rows and channels: row ``r`` is pixel ``r % pixels`` of image ``r // pixels``.

    A linear layer's tensor has one pixel an image.
    """

    rows: int
    pixels: int
    channels: int
    image_stride: int
    pixel_stride: int
    channel_stride: int

    @property
    def strides(self) -> tuple[int, int, int]:
        return self.image_stride, self.pixel_stride, self.channel_stride


def layout(t: Tensor, fmt: torch.memory_format | None = None) -> Layout:
    """Of a ``[N, C, H, W]`` that is dense in ``fmt`` (None: in either format).

    Taken from the shape, because the strides of axes of size 1 are arbitrary; ``fmt`` matters where such an axis makes both
    formats the same, but a tensor with more channels is to follow.
    """
    n, c, h, w = t.shape
    if fmt is None:
        fmt = torch.channels_last if t.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    if fmt is torch.channels_last:
        return Layout(n * h * w, h * w, c, h * w * c, c, 1)
    return Layout(n * h * w, h * w, c, c * h * w, 1, h * w)


def row_layout(t: Tensor) -> Layout:
    """Of a contiguous ``[rows, C]``."""
    return Layout(t.shape[0], 1, t.shape[1], t.shape[1], 0, 1)


def dense(t: Tensor, fmt: torch.memory_format) -> Tensor:
    """``t`` where it is dense in either format, else a copy in ``fmt``: the one place where strided views are converted."""
    if t.is_contiguous() or t.is_contiguous(memory_format=torch.channels_last):
        return t
    return t.contiguous(memory_format=fmt)


def channels_last(x: Tensor) -> Tensor:
    """The one place where a fused kernel's NCHW input is converted."""
    if x.is_contiguous(memory_format=torch.channels_last):
        return x
    log_once("triton: fused convolution wants channels_last; an NCHW input is converted on every call")
    return x.contiguous(memory_format=torch.channels_last)


def aligned(*operands: Tensor) -> bool:
    """Whether rows (axis 1 runs along memory) and base of these operands start at multiples of 16 bytes."""
    return all(t.shape[1] * t.dtype.itemsize % 16 == 0 and t.data_ptr() % 16 == 0 for t in operands)


_logged: set[str] = set()


def log_once(sentence: str) -> None:
    if sentence not in _logged:
        _logged.add(sentence)
        log.info(sentence)


def guard(t: Tensor) -> AbstractContextManager[object]:
    """Launches go to the current stream of the current device, which has to be the tensor's."""
    return torch.cuda.device(t.device) if t.is_cuda else nullcontext()


def exponent(options: Options, like: Tensor) -> Tensor | None:
    """B as the kernels take it: a scalar on the device, or None for B = 1 and B = 2. No synchronisation."""
    if options.is_linear or options.is_quadratic:
        return None
    if isinstance(options.b, Tensor):
        return options.b
    return torch.full((), options.b, dtype=accumulator(like.dtype), device=like.device)


def precision(dtype: torch.dtype, *, conv: bool) -> str:
    """``input_precision`` of the matrix product: TF32 only where torch allows it for the same operation."""
    if dtype != torch.float32:
        return "ieee"
    allowed = torch.backends.cudnn.conv.fp32_precision if conv else torch.backends.cuda.matmul.fp32_precision
    return "tf32" if allowed == "tf32" else "ieee"


@triton.jit
def split_rows(o_r, pixels, s_n, s_p):
    """Of the rows ``o_r`` (int64): image, pixel in the image, offset of their first channel.

    The pixel is int32 (an image has fewer than 2^31), so that further divisions are not 64 bits wide.
    """
    b_n = o_r // pixels
    b_p = (o_r - b_n * pixels).to(tl.int32)
    return b_n, b_p, b_n * s_n + b_p.to(tl.int64) * s_p


@triton.jit
def tile_order(t, tiles_m, tiles_n):
    """Tile ``t`` to (row tile, column tile), eight row tiles at a time, so that neighbours share both operands in L2."""
    GROUP: tl.constexpr = 8
    per_group = GROUP * tiles_n
    first = (t // per_group) * GROUP
    size = tl.minimum(tiles_m - first, GROUP)
    within = t % per_group
    return first + within % size, within // size


@triton.jit
def dot(b_a, b_b, b_acc, PRECISION: tl.constexpr):
    """``b_acc + b_a @ b_b``, accumulated in the dtype of ``b_acc``."""
    if _INTERPRETED:
        b_a = b_a.to(b_acc.dtype)
        b_b = b_b.to(b_acc.dtype)
    return tl.dot(b_a, b_b, b_acc, input_precision=PRECISION, out_dtype=b_acc.dtype)


@triton.jit
def rounded(b_value, DTYPE: tl.constexpr):
    """``b_value`` in the dtype of the tensor that it is stored to, to nearest even."""
    if _INTERPRETED and DTYPE == tl.bfloat16:
        b_bits = b_value.to(tl.uint32, bitcast=True)
        b_bits = (b_bits + 0x7FFF + ((b_bits >> 16) & 1)) & 0xFFFF0000
        b_value = tl.where(b_value == b_value, b_bits.to(tl.float32, bitcast=True), b_value)
    return b_value.to(DTYPE)
