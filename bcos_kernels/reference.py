"""The definition of every operation, in plain PyTorch.

Everything else in this package is tested against these functions. They run on any device and in any floating dtype, are
differentiable as often as one likes, and are written to be read, not to be fast.

float16 is computed in float32, and so is bfloat16 but for the linear part of a layer, which PyTorch rounds; the result is
rounded once. Where float32 is too narrow, see :func:`_float64_where_needed`.

Explanation mode (``detach_*=True``) treats the input-dependent factor of a layer as a constant, so that the layer becomes
the linear map that it actually applied. See :class:`_Freeze` for what that means for second derivatives.

Sources: B-cos Networks (arXiv 2205.10268), B-cos v2 (arXiv 2306.10898), B-cosification (arXiv 2411.00715).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from bcos_kernels import convolution
from bcos_kernels.ranges import readable, wide

_P = ParamSpec("_P")

#: Inside the root of the convolution's patch norm.
PATCH_NORM_EPS = 1e-6
#: Added to the linear layer's norm, outside the root.
ROW_NORM_EPS = 1e-12
#: Added to |cos| where the exponent is neither 1 nor 2.
COS_EPS = 1e-6


#: Whether the definitions look at the values of their arguments; see :func:`_float64_where_needed`.
watches_values = True


def _float64_where_needed(*, axis: int) -> Callable[[Callable[_P, Tensor]], Callable[_P, Tensor]]:
    """Makes a definition compute in float64 where float32 may not hold its squares and products, and round the result.

    That is where a part of an argument, which is what lies along ``axis`` and those behind it, is nowhere larger than 1e-4
    (``x`` alone may be zero there), or somewhere larger than 1e4. Values are looked at on a CPU alone: elsewhere that would
    wait for the device. Looking takes a pass over every argument; benchmarks, which compare with what the definition costs in
    plain PyTorch, switch it off (``watches_values``). float16 is computed in float32 throughout: it may not even hold the
    linear part of a layer.
    """

    def is_extreme(t: Tensor, *, zero: bool) -> bool:
        if t.numel() == 0:
            return False
        largest = t.detach().abs().amax(tuple(range(min(axis, t.dim() - 1) % t.dim(), t.dim())))
        return bool(((largest > 1e4) | ((largest < 1e-4) & ((largest > 0) | zero))).any())

    def decorate(definition: Callable[_P, Tensor]) -> Callable[_P, Tensor]:
        @functools.wraps(definition)
        def anywhere(*args: _P.args, **kwargs: _P.kwargs) -> Tensor:
            tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.dim() > 0]
            dtype = tensors[0].dtype
            if dtype == torch.float16:
                wider = torch.float32
            elif (
                watches_values
                and dtype != torch.float64
                and all(map(readable, tensors))
                and any(is_extreme(t, zero=t is tensors[0]) for t in tensors)
            ):
                wider = torch.float64
            else:
                return definition(*args, **kwargs)
            wide_args: Any = (v.to(wider) if isinstance(v, Tensor) else v for v in args)
            wide_kwargs: Any = {k: v.to(wider) if isinstance(v, Tensor) else v for k, v in kwargs.items()}
            return definition(*wide_args, **wide_kwargs).to(dtype)

        return anywhere

    return decorate


class _Freeze(torch.autograd.Function):
    """``value * factor`` whose first derivative does not look into ``factor``.

    ``factor.detach()`` would do the same to the first derivative, but its second derivative would be wrong: the gradient
    of ``value`` is ``grad * factor``, and a loss on that gradient (training on the explanation) does depend on ``factor``.
    For that to be exact, nothing of the same layer may be multiplied to the result: parameters go into ``value``.
    It has no ``jvp``: ``torch.compile`` refuses every Function that has one.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, factor: Tensor) -> Tensor:
        return value * factor

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (factor,) = ctx.saved_tensors
        return grads[0] * factor, None


def scaled(value: Tensor, factor: Tensor, *, detach: bool) -> Tensor:
    """``value * factor``, ``factor`` taken as a constant by the first derivative where ``detach``.

    ``factor`` must broadcast to the shape of ``value``.
    """
    if has_torch_function((value, factor)):  # a trace of the operations inside would lose the constant
        return handle_torch_function(scaled, (value, factor), value, factor, detach=detach)
    return _Freeze.apply(value, factor.expand_as(value)) if detach else value * factor


class _FreezeWeights(torch.autograd.Function):
    """``weights @ value`` whose first derivative does not look into ``weights``; see :class:`_Freeze`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, weights: Tensor) -> Tensor:
        return weights @ value

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (weights,) = ctx.saved_tensors
        return weights.mT @ grads[0], None


def window_sum(
    x: Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """Sum over every convolution window of each channel of ``x`` ``[N, G, H, W]``; padding counts as zeros.

    One axis after the other, as sums of shifted slices: exact in any dtype (a convolution with ones could run in TF32).
    """
    x = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    for axis, k, s, d in zip((2, 3), kernel_size, stride, dilation, strict=True):
        length = (x.shape[axis] - d * (k - 1) - 1) // s + 1
        taps = [x.narrow(axis, i * d, s * (length - 1) + 1) for i in range(k)]
        x = sum(taps[1:], start=taps[0])
        if s > 1:
            x = x[:, :, ::s] if axis == 2 else x[:, :, :, ::s]
    return x


def patch_norm(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """``sqrt(sum over the patch of x^2 + 1e-6)``: ``[N, C, H, W]`` to ``[N, G, Ho, Wo]``."""
    return norm_of_squares(channel_squares(x, groups), kernel_size, stride, padding, dilation)


def channel_squares(x: Tensor, groups: int) -> Tensor:
    """The sum of the squares of each group's channels: ``[N, C, H, W]`` to ``[N, G, H, W]``."""
    return wide(x).square().unflatten(1, (groups, -1)).sum(2)


def norm_of_squares(
    squares: Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """The patch norm from :func:`channel_squares`."""
    return (window_sum(squares, kernel_size, stride, padding, dilation) + PATCH_NORM_EPS).sqrt()


def row_norm(x: Tensor) -> Tensor:
    """``||x||_2 + 1e-12`` over the last axis, which is kept with size 1."""
    return torch.linalg.vector_norm(wide(x), dim=-1, keepdim=True) + ROW_NORM_EPS


def unit_rows(weight: Tensor) -> Tensor:
    """``w / ||w||`` for every output row, without an epsilon (B-cos v2)."""
    rows = wide(weight)
    norm = torch.linalg.vector_norm(rows.flatten(1), dim=1)
    return (rows / norm.view(-1, *[1] * (weight.dim() - 1))).to(weight.dtype)


def max_out_channels(u: Tensor, max_out: int, dim: int) -> Tensor:
    """The largest of every ``max_out`` neighbours along ``dim``; a tie sends its gradient where ``torch.max`` does."""
    return u if max_out == 1 else u.unflatten(dim, (-1, max_out)).max(dim if dim < 0 else dim + 1).values


def scale(linear: Tensor, norm: Tensor, b: float | Tensor) -> Tensor:
    """``|cos|^(B-1)``, with ``cos = linear / norm``.

    For B = 2, given as a number, there is no epsilon. A tensor always takes the general formula: its value is not looked
    at, so that it has a gradient everywhere and costs no synchronisation.
    """
    if not isinstance(b, Tensor) and b == 2:
        return linear.abs() / norm
    return (linear.abs() / norm + COS_EPS) ** (b - 1)


def apply_scale(linear: Tensor, norm: Tensor, b: float | Tensor, *, detach: bool) -> Tensor:
    """``l * |cos|^(B-1)``. ``detach`` makes |cos| a constant; B keeps its gradient."""
    y = scaled(linear, scale(linear, norm, b), detach=detach)
    if detach and isinstance(b, Tensor):
        # adds exactly nothing to the value, and dy/dB = l |cos|^(B-1) log|cos| to the gradient
        slope = linear * scale(linear, norm, b) * (linear.abs() / norm + COS_EPS).log()
        y = y + scaled((b - b.detach()).expand_as(y), slope, detach=True)
    return y


@_float64_where_needed(axis=1)
def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    b: float | Tensor = 2.0,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    max_out: int = 1,
    normalize_weight: bool = False,
    detach_scale: bool = False,
) -> Tensor:
    """B-cos convolution (arXiv 2306.10898, sections 3 and 4).

    ``x [N, C, H, W]``, ``weight [O*M, C/G, Kh, Kw]``, ``bias [O*M]``, result ``[N, O, Ho, Wo]`` with ``M = max_out``.
    """
    weight = unit_rows(weight) if normalize_weight else weight
    u = convolution.forward(x, weight, bias, stride, padding, dilation, groups)
    return conv2d_scaled(
        u,
        x,
        weight.shape[2:],
        b=b,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        max_out=max_out,
        detach_scale=detach_scale,
    )


def conv2d_scaled(
    u: Tensor,
    x: Tensor,
    kernel_size: Sequence[int],
    *,
    b: float | Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    max_out: int,
    detach_scale: bool,
) -> Tensor:
    """:func:`conv2d` from the result ``u [N, O*M, Ho, Wo]`` of the ordinary convolution: MaxOut and the scale."""
    linear = max_out_channels(u, max_out, 1)
    if not isinstance(b, Tensor) and b == 1:
        return linear
    norm = patch_norm(x, kernel_size, stride, padding, dilation, groups)
    norm = norm.repeat_interleave(linear.shape[1] // groups, dim=1) if groups > 1 else norm
    return apply_scale(wide(linear), norm, b, detach=detach_scale).to(u.dtype)


@_float64_where_needed(axis=-1)
def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    b: float | Tensor = 2.0,
    max_out: int = 1,
    normalize_weight: bool = False,
    detach_scale: bool = False,
) -> Tensor:
    """B-cos linear layer: ``x [..., C]``, ``weight [O*M, C]``, ``bias [O*M]``, result ``[..., O]``."""
    weight = unit_rows(weight) if normalize_weight else weight
    return linear_scaled(F.linear(x, weight, bias), x, b=b, max_out=max_out, detach_scale=detach_scale)


def linear_scaled(u: Tensor, x: Tensor, *, b: float | Tensor, max_out: int, detach_scale: bool) -> Tensor:
    """:func:`linear` from the result ``u [..., O*M]`` of the ordinary linear layer: MaxOut and the scale."""
    out = max_out_channels(u, max_out, -1)
    if not isinstance(b, Tensor) and b == 1:
        return out
    return apply_scale(wide(out), row_norm(x), b, detach=detach_scale).to(u.dtype)


@_float64_where_needed(axis=1)
def batch_norm_uncentered2d(
    x: Tensor,
    var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    relu: bool = False,
    eps: float = 1e-5,
    detach_var: bool = False,
) -> Tensor:
    """``x / sqrt(var + eps) * weight + bias`` per channel of ``x [N, C, H, W]`` (arXiv 2306.10898).

    ``var`` is the running variance (evaluation), or None for the batch's own biased variance about the mean (training).
    The mean is not subtracted either way. ``residual [N, C, H, W]`` is added to the result; ReLU comes last.
    """
    dtype, x = x.dtype, wide(x)
    if var is None:
        var = x.var((0, 2, 3), unbiased=False)
    if weight is not None:
        x = x * weight[:, None, None]
    z = scaled(x, (wide(var) + eps).rsqrt()[:, None, None], detach=detach_var)
    z = z if bias is None else z + bias[:, None, None]
    z = z if residual is None else z + residual
    return (z.relu() if relu else z).to(dtype)


@_float64_where_needed(axis=-1)
def layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    detach_var: bool = False,
) -> Tensor:
    """Layer norm over the last ``len(normalized_shape)`` axes; ``detach_var`` makes the variance a constant, not the mean."""
    dtype, x = x.dtype, wide(x)
    axes = tuple(range(-len(normalized_shape), 0))
    var, mean = torch.var_mean(x, axes, unbiased=False, keepdim=True)
    centred = x - mean
    if weight is not None:
        centred = centred * weight
    z = scaled(centred, (var + eps).rsqrt(), detach=detach_var)
    return (z if bias is None else z + bias).to(dtype)


@_float64_where_needed(axis=1)
def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    detach_var: bool = False,
) -> Tensor:
    """Group norm of ``x [N, C, H, W]``; ``detach_var`` makes the variance a constant, not the mean."""
    grouped = wide(x).unflatten(1, (num_groups, -1))
    axes = tuple(range(2, grouped.dim()))
    var, mean = torch.var_mean(grouped, axes, unbiased=False, keepdim=True)
    centred = grouped - mean
    if weight is not None:
        centred = centred * weight.view(num_groups, -1, 1, 1)
    z = scaled(centred, (var + eps).rsqrt(), detach=detach_var).flatten(1, 2)
    return (z if bias is None else z + bias[:, None, None]).to(x.dtype)


def gelu(x: Tensor, *, approximate: str = "none", detach_gate: bool = False) -> Tensor:
    """``x * gate`` with ``gate = 0.5 (1 + erf(x / sqrt 2))``; ``detach_gate`` makes the gate a constant.

    ``approximate="tanh"``: torch's other GELU, ``gate = 0.5 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))``.
    """
    if has_torch_function((x,)):  # see `scaled`
        return handle_torch_function(gelu, (x,), x, approximate=approximate, detach_gate=detach_gate)
    dtype, x = x.dtype, wide(x)
    if approximate == "tanh":
        gate = 0.5 * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)))
    else:
        gate = 0.5 * (1 + torch.erf(x * 0.5**0.5))
    return scaled(x, gate, detach=detach_gate).to(dtype)


def silu(x: Tensor, *, detach_gate: bool = False) -> Tensor:
    """``x * sigmoid(x)``; ``detach_gate`` makes the sigmoid a constant."""
    if has_torch_function((x,)):  # see `scaled`
        return handle_torch_function(silu, (x,), x, detach_gate=detach_gate)
    return scaled(wide(x), wide(x).sigmoid(), detach=detach_gate).to(x.dtype)


def hardswish(x: Tensor, *, detach_gate: bool = False) -> Tensor:
    """``x * gate`` with ``gate = clamp(x + 3, 0, 6) / 6``; ``detach_gate`` makes the gate a constant."""
    if has_torch_function((x,)):  # see `scaled`
        return handle_torch_function(hardswish, (x,), x, detach_gate=detach_gate)
    return scaled(wide(x), (wide(x) + 3).clamp(0, 6) / 6, detach=detach_gate).to(x.dtype)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    dropout: float = 0.0,
    detach_weights: bool = False,
) -> Tensor:
    """``softmax(query key^T * scale) value``; ``detach_weights`` makes the softmax, and so query and key, constants.

    ``query [..., T, D]``, ``key [..., S, D]``, ``value [..., S, V]``, result ``[..., T, V]``. ``scale`` is ``D**-0.5`` where
    it is None; ``dropout`` is the share of the softmax's entries that are dropped.
    """
    if has_torch_function(tensors := (query, key, value)):  # see `scaled`
        options: dict[str, Any] = {"scale": scale, "dropout": dropout, "detach_weights": detach_weights}
        return handle_torch_function(attention, tensors, *tensors, **options)
    dtype = query.dtype
    query, key, value = wide(query), wide(key), wide(value)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    weights = (query @ key.mT * scale).softmax(-1)
    weights = F.dropout(weights, dropout) if dropout else weights
    return (_FreezeWeights.apply(value, weights) if detach_weights else weights @ value).to(dtype)
