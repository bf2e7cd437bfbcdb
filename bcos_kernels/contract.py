"""What every backend promises, in one place: which tensors a forward pass keeps, in which dtype and memory format.

A backend is a module with these functions (``dispatch`` finds it by name)::

    unavailable() -> str | None                  # None, or one sentence saying why it cannot be used at all
    why_not(call: Call) -> str | None            # None, or one sentence saying why it cannot run this call

    conv2d(x, weight, bias, options, for_backward, squares) -> Forward
    conv2d_backward(grad, x, weight, bias, saved, options, needs) -> Gradients
    linear(x, weight, bias, options, for_backward, squares) -> Forward
    linear_backward(grad, x, weight, bias, saved, options, needs) -> Gradients
    batch_norm_uncentered2d(x, var, weight, bias, residual, options) -> NormForward
    batch_norm_uncentered2d_backward(grad, x, z, mean, var, weight, bias, options, needs) -> NormGradients
    layer_norm(x, weight, bias, options) -> LayerNormForward
    layer_norm_backward(grad, x, mean, rstd, weight, bias, options, needs) -> LayerNormGradients

``squares``, or None: the sum of the squares of ``x``, ``[N, 1, H, W]`` or ``[..., 1]`` in the accumulator's dtype, for a
single group. A backend need not look at it.

Results may be views, but share memory with no argument and with no other result.

A function may be missing where ``why_not`` refuses its calls.

Options and calls are named tuples, not dataclasses: five of them are made for a forward and a backward pass of a layer, in
0.2 instead of 1 microsecond each.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bcos_kernels.ranges import accumulator as accumulator


class Options(NamedTuple):
    """All that a B-cos convolution or linear layer is told besides its tensors; a linear layer keeps the defaults.

    ``b`` is a float, or a scalar tensor that may need a gradient.
    """

    b: float | Tensor = 2.0
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    max_out: int = 1
    normalize_weight: bool = False
    detach_scale: bool = False

    @property
    def is_linear(self) -> bool:
        """B = 1: the layer is its linear part, there is neither norm nor scale."""
        return not isinstance(self.b, Tensor) and self.b == 1

    @property
    def is_quadratic(self) -> bool:
        """B = 2 as a number: the scale is ``|l| / n``, without an epsilon."""
        return not isinstance(self.b, Tensor) and self.b == 2

    def keeps_linear(self, dtype: torch.dtype) -> bool:
        """Whether backward needs the linear output ``l``, or can do with ``y``.

        For B = 2, ``|l| = sqrt(|y| n)``, and ``y`` is kept by the next layer anyway. In float16 ``y`` underflows where
        ``l`` does not, and for general B the root is neither exact nor cheap.
        """
        return not self.is_linear and not (self.is_quadratic and dtype != torch.float16)


class Forward(NamedTuple):
    """Result of a B-cos forward pass and what its backward pass needs. What does not apply is an empty tensor."""

    y: Tensor
    #: conv2d ``[N, G, Ho, Wo]``, linear ``[..., 1]``; dtype ``accumulator(x.dtype)``; empty for B = 1
    norm: Tensor
    #: shape and dtype of ``y``; only where ``keeps_linear`` and a backward pass may follow
    linear: Tensor
    #: shape of ``y``, ``winner_dtype``: index 0..M-1 of the winning MaxOut row; only for M > 1 and backward
    winner: Tensor


class Saved(NamedTuple):
    """What backward gets back from forward: ``kept`` is ``linear`` where ``keeps_linear``, else ``y``."""

    kept: Tensor
    norm: Tensor
    winner: Tensor


class Needs(NamedTuple):
    """Which gradients are wanted."""

    x: bool
    weight: bool
    bias: bool
    b: bool


class Gradients(NamedTuple):
    """One tensor for every field of :class:`Needs`; empty where it is not wanted."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    b: Tensor


class NormOptions(NamedTuple):
    """All that an uncentered batch norm is told besides its tensors.

    A ReLU behind a residual keeps ``z``, whose sign is its mask; without a residual backward finds the mask from ``x``, which
    it reads anyway. ``squares``: the sums of squares that the next layer's norm is made of are wanted.
    """

    eps: float
    relu: bool = False
    detach_var: bool = False
    squares: bool = False


class NormForward(NamedTuple):
    """Result of an uncentered batch norm; ``z`` in the dtype of ``x``, the others in the accumulator's.

    What does not apply is an empty tensor.
    """

    z: Tensor
    #: ``[C]``; empty where the variance was given
    mean: Tensor
    #: ``[C]``; empty where the variance was given
    var: Tensor
    #: ``[N, 1, H, W]``, the sum over the channels of the square of ``z`` as it is rounded; only where it is wanted
    squares: Tensor


class NormNeeds(NamedTuple):
    """Which gradients are wanted. ``residual``: only behind a ReLU; otherwise it is the gradient that came in."""

    x: bool
    weight: bool
    bias: bool
    residual: bool


class NormGradients(NamedTuple):
    """One tensor for every field of :class:`NormNeeds`; empty where it is not wanted."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    residual: Tensor


class LayerNormOptions(NamedTuple):
    """Of a layer norm over the last ``axes`` axes; ``squares`` are wanted for the next layer's norm (one axis only)."""

    axes: int
    eps: float
    detach_var: bool = False
    squares: bool = False


class LayerNormForward(NamedTuple):
    """Result of a layer norm; ``z`` in the dtype of ``x``, the others in the accumulator's."""

    z: Tensor
    #: the shape of ``x`` with 1 for every normalised axis, as ``rstd = 1 / sqrt(var + eps)``
    mean: Tensor
    rstd: Tensor
    #: ``[..., 1]``, the sum of the square of ``z`` as it is rounded; empty unless wanted
    squares: Tensor


class LayerNormNeeds(NamedTuple):
    """Which gradients are wanted."""

    x: bool
    weight: bool
    bias: bool


class LayerNormGradients(NamedTuple):
    """One tensor for every field of :class:`LayerNormNeeds`, in any floating dtype; empty where it is not wanted."""

    x: Tensor
    weight: Tensor
    bias: Tensor


class Call(NamedTuple):
    """One call of one operation, as the choice of a backend sees it.

    ``explicit``: the caller named this backend. Some run where the automatic choice never takes them (an interpreter).
    ``bias``, ``for_backward``: of a forward pass; the graph compilers need them to say whether they have a kernel.
    """

    op: str
    x: Tensor
    weight: Tensor | None = None
    options: Options = Options()
    bias: bool = False
    for_backward: bool = False
    explicit: bool = False


def winner_dtype(max_out: int) -> torch.dtype:
    return torch.uint8 if max_out <= 256 else torch.int64


def _prefers_channels_last(t: Tensor) -> bool:
    return t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous()


def memory_format(*tensors: Tensor) -> torch.memory_format:
    """``channels_last`` as soon as one of the tensors is: PyTorch's own rule for convolutions.

    ``y`` and ``dx`` have the format of ``(x, weight)``, ``dweight`` that of ``(weight,)``, on every backend.
    """
    return torch.channels_last if any(map(_prefers_channels_last, tensors)) else torch.contiguous_format


def conv_output_size(
    size: tuple[int, int],
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> tuple[int, int]:
    """``(Ho, Wo)`` of a convolution over ``(H, W)``."""
    ho, wo = (
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(size, kernel_size, stride, padding, dilation, strict=True)
    )
    return ho, wo
