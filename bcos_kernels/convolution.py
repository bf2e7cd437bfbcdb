"""PyTorch's convolution and its derivative, around what PyTorch 2.14.1 does wrong on a CPU.

Every convolution of this package but the compiled ones goes through here; ``csrc/layer.cpp`` does the same for those. Three
things are wrong (x86, oneDNN 3.12; ``tests/test_convolution.py`` has examples):

- The stride of an axis of size 1 means nothing, but a channels-last tensor or weight whose stride there is not the one of
  its format gives wrong results, and in the derivative an error.
- bfloat16, channels-last: where the image is narrower than its padding or the horizontal stride, or the output has one
  column, memory that is not the tensor's is read and written. Results are wrong, NaN, or the process dies.
- bfloat16, channels-last, 1x1 with a horizontal stride and up to four channels: the derivative writes past the end.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bcos_kernels.ranges import readable

Window = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


def _plain(t: Tensor) -> Tensor:
    """``t`` with the strides of its memory format, also along axes of size 1."""
    if not readable(t) or 1 not in t.shape:
        return t
    _, c, h, w = t.shape
    if t.stride() in ((c * h * w, h * w, w, 1), (c * h * w, 1, w * c, c)):
        return t
    for fmt in (torch.contiguous_format, torch.channels_last):
        if t.is_contiguous(memory_format=fmt):
            return t.clone(memory_format=fmt)
    return t


def _safe(x: Tensor, weight: Tensor, window: Window) -> tuple[Tensor, Tensor, Window, tuple[int, int]]:
    """A call with the same result that PyTorch does right, and how many columns were put left and right of ``x`` for it.

    Those are the columns of the padding that windows see, or, less than none, columns that none sees. A single window needs
    no stride.
    """
    x, weight, unchanged = _plain(x), _plain(weight), (0, 0)
    if not readable(x) or x.numel() == 0:
        return x, weight, window, unchanged
    (down, right), (vertical, horizontal), dilation = window
    width, seen = x.shape[3], dilation[1] * (weight.shape[3] - 1) + 1
    columns = (width + 2 * horizontal - seen) // right + 1
    if width <= horizontal or width < right or (columns == 1 and right > 1):
        added = horizontal, (columns - 1) * right + seen - width - horizontal
        stride = (down, 1 if columns == 1 else right)
        return _plain(F.pad(x, added)), weight, (stride, (vertical, 0), dilation), added
    if x.dtype == torch.bfloat16 and weight.shape[2:] == (1, 1) and right > 1 and weight.shape[1] <= 4:
        fmt = torch.contiguous_format
        return x.contiguous(memory_format=fmt), weight.clone(memory_format=fmt), window, unchanged
    return x, weight, window, unchanged


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """:func:`torch.nn.functional.conv2d`."""
    x, weight, window, _ = _safe(x, weight, (tuple(stride), tuple(padding), tuple(dilation)))
    return F.conv2d(x, weight, bias, *window, groups)


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of ``x``, ``weight`` and ``bias`` from that of the output; undefined where they are not needed."""
    x, weight, window, added = _safe(x, weight, (tuple(stride), tuple(padding), tuple(dilation)))
    sizes = None if bias is None else list(bias.shape)
    dx, dweight, dbias = torch.ops.aten.convolution_backward(
        _plain(grad), x, weight, sizes, *map(list, window), False, [0, 0], groups, list(needs)
    )
    if needs[0] and added != (0, 0):
        dx = F.pad(dx, [-columns for columns in added])
    return dx, dweight, dbias
