"""The functions that users call: arguments are checked here, once, in words, and nowhere below.

Each begins as torch's own functions do, so that whatever overrides those (``torch.fx`` and its proxies, tensor subclasses,
modes) sees ours too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from bcos_kernels import dispatch, norm_ops, ops, reference, registration  # noqa: F401 - norm_ops: registered by the import
from bcos_kernels.contract import Options, accumulator, conv_output_size

Pair = int | Sequence[int]


def bcos_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    b: float | Tensor = 2.0,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
    groups: int = 1,
    max_out: int = 1,
    normalize_weight: bool = False,
    detach_scale: bool = False,
    squares: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """B-cos convolution: ``y = |cos(patch, w)|^(B-1) * conv2d(x, w, bias)``.

    The linear part is an ordinary convolution, of which MaxOut keeps the largest of every ``max_out`` neighbouring
    channels. It is scaled by ``|l| / n`` to the power B-1, where ``n = sqrt(sum over the patch of x^2 + 1e-6)``.

    Args:
        x: input ``[N, C, H, W]``, any floating dtype; channels-last or contiguous. ``N`` may be 0.
        weight: ``[O*M, C/G, Kh, Kw]`` in the dtype of ``x`` (under autocast: any floating dtype).
        bias: ``[O*M]``, added before everything else.
        b: exponent B >= 1, a number or a scalar tensor. A tensor may need a gradient; it always takes the general formula
            ``(|l| / n + 1e-6)^(B-1)``, and its value is not checked.
        stride, padding, dilation: an int, or a pair ``(vertical, horizontal)``; ``padding`` may be ``"same"`` (stride 1) or
            ``"valid"``. Padding counts as zeros.
        groups: group g sees channels ``g*C/G ..`` and serves ``O/G`` outputs; each group has its own norm.
        max_out: M; output channel o is the largest of rows ``o*M .. o*M+M-1``.
        normalize_weight: use ``w / ||w||`` per output row (B-cos v2) instead of ``w`` (B-cosification).
        detach_scale: explanation mode: the first derivative takes |cos| as a constant, so that ``y`` is linear in ``x``.
        squares: ``x.square().sum(1, keepdim=True)`` in float32 (float64 for float64), where it is known already; for one
            group only. It must be that: it saves a pass over ``x`` and changes nothing else, no gradient either. Where
            autocast rounds ``x``, it is not used.
        backend: one name of :func:`bcos_kernels.available_backends`, ``"auto"``, or None for what ``use_backend`` set.

    Returns:
        ``[N, O, Ho, Wo]`` in the dtype of ``x`` (under autocast: the autocast dtype), channels-last as soon as ``x`` or
        ``weight`` is.

    Raises:
        TypeError: an argument is no tensor, or of a dtype that does not fit.
        ValueError: shapes, devices, or option values that do not fit; an unknown backend.
        RuntimeError: the named backend cannot run this call; the message says why.

    Source: B-cos Networks (arXiv 2205.10268); B-cos v2 (arXiv 2306.10898); B-cosification
    (arXiv 2411.00715).
    """
    if has_torch_function((x, weight, bias, b, squares)):
        return handle_torch_function(bcos_conv2d, (x, weight, bias, b, squares), **locals())
    _check_tensors("x", x, weight=weight, bias=bias)
    stride, dilation = _pair("stride", stride, 1), _pair("dilation", dilation, 1)
    _check_rank(x, "x", 4, "[N, C, H, W]")
    _check_rank(weight, "weight", 4, "[O*max_out, C/groups, Kh, Kw]")
    _check_positive("groups", groups)
    rows = _check_max_out(weight, max_out)
    if x.shape[1] % groups:
        raise ValueError(f"groups={groups} does not divide the {x.shape[1]} channels of x {_shape(x)}")
    if weight.shape[1] * groups != x.shape[1]:
        raise ValueError(
            f"weight {_shape(weight)} with groups={groups} expects {weight.shape[1] * groups} input channels, "
            f"but x {_shape(x)} has {x.shape[1]}"
        )
    if (rows // max_out) % groups:
        raise ValueError(
            f"groups={groups} does not divide the {rows // max_out} output channels (weight {_shape(weight)}, "
            f"max_out={max_out})"
        )
    _check_bias(bias, rows)
    b = check_exponent(b, x)
    if squares is not None:
        _check_squares(squares, x, [x.shape[0], 1, *x.shape[2:]])
        if groups != 1:
            raise ValueError(f"squares: with groups={groups} there is a norm for each; it is for groups=1")
    kernel_size = (weight.shape[2], weight.shape[3])
    x, squares, padding = _resolve_padding(x, squares, padding, kernel_size, stride, dilation)
    size = conv_output_size((x.shape[2], x.shape[3]), kernel_size, stride, padding, dilation)
    if min(size) < 1 or min(kernel_size) < 1:
        raise ValueError(
            f"the window of kernel {kernel_size} with dilation {dilation} does not fit into x {_shape(x)} with padding "
            f"{padding}: the output would be {size[0]} x {size[1]}"
        )
    backend = dispatch.requested(backend)
    if backend == dispatch.REFERENCE:
        options = Options(b, stride, padding, dilation, groups, max_out, normalize_weight, detach_scale)
        return _define(ops.conv2d_definition, x, weight, bias, options)
    value, b_tensor = _split_exponent(b)
    y: Tensor = torch.ops.bcos.conv2d(
        x,
        weight,
        bias,
        b_tensor,
        value,
        stride,
        padding,
        dilation,
        groups,
        max_out,
        normalize_weight,
        detach_scale,
        squares,
        False,  # for_backward: the operator decides
        backend,
    )[0]
    return y


def bcos_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    b: float | Tensor = 2.0,
    max_out: int = 1,
    normalize_weight: bool = False,
    detach_scale: bool = False,
    squares: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """B-cos linear layer: ``y = |cos(x, w)|^(B-1) * (x @ w.T + bias)``, with ``n = ||x|| + 1e-12`` per row.

    Args:
        x: ``[..., C]``, any floating dtype.
        weight: ``[O*M, C]`` in the dtype of ``x`` (under autocast: any floating dtype).
        bias: ``[O*M]``, added before everything else.
        b, max_out, normalize_weight, detach_scale, backend: as for :func:`bcos_conv2d`.
        squares: ``x.square().sum(-1, keepdim=True)``, as for :func:`bcos_conv2d`.

    Returns:
        ``[..., O]`` in the dtype of ``x`` (under autocast: the autocast dtype).

    Raises:
        TypeError, ValueError, RuntimeError: as for :func:`bcos_conv2d`.
    """
    if has_torch_function((x, weight, bias, b, squares)):
        return handle_torch_function(bcos_linear, (x, weight, bias, b, squares), **locals())
    _check_tensors("x", x, weight=weight, bias=bias)
    if x.dim() < 1:
        raise ValueError("x must be [..., C]; got a scalar")
    _check_rank(weight, "weight", 2, "[O*max_out, C]")
    rows = _check_max_out(weight, max_out)
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"weight {_shape(weight)} expects {weight.shape[1]} input features, but x {_shape(x)} has {x.shape[-1]}"
        )
    _check_bias(bias, rows)
    b = check_exponent(b, x)
    if squares is not None:
        _check_squares(squares, x, [*x.shape[:-1], 1])
    backend = dispatch.requested(backend)
    if backend == dispatch.REFERENCE:
        options = Options(b, max_out=max_out, normalize_weight=normalize_weight, detach_scale=detach_scale)
        return _define(ops.linear_definition, x, weight, bias, options)
    value, b_tensor = _split_exponent(b)
    y: Tensor = torch.ops.bcos.linear(
        x,
        weight,
        bias,
        b_tensor,
        value,
        max_out,
        normalize_weight,
        detach_scale,
        squares,
        False,  # for_backward: the operator decides
        backend,
    )[0]
    return y


def batch_norm_uncentered2d(
    x: Tensor,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    training: bool,
    residual: Tensor | None = None,
    relu: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    detach_var: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Batch norm that divides by the standard deviation but does not subtract the mean: ``x / sqrt(var + eps) * weight``.

    What usually follows can be done in the same pass over memory: the sum with a residual, and after that ReLU.

    Args:
        x: ``[N, C, H, W]``, any floating dtype.
        running_var: ``[C]``. In training updated in place to ``(1-momentum)*running_var + momentum*var`` with the biased
            variance (about the mean) of the batch; in evaluation it is the variance that is used. May be None in training.
        weight, bias: ``[C]``, or None. May be of a wider dtype than ``x``.
        training: use the batch's variance.
        residual: ``[N, C, H, W]`` in the dtype of ``x``, added to the result. In another memory format it is copied.
        relu: ReLU of the result, residual included.
        detach_var: explanation mode: the first derivative takes the variance as a constant.
        backend: as for :func:`bcos_conv2d`.

    Returns:
        ``[N, C, H, W]`` in the dtype and memory format of ``x``.

    Raises:
        TypeError, ValueError: arguments that do not fit.

    Source: B-cos v2 (arXiv 2306.10898).
    """
    return batch_norm_with_squares(
        x,
        running_var,
        weight,
        bias,
        training=training,
        residual=residual,
        relu=relu,
        momentum=momentum,
        eps=eps,
        detach_var=detach_var,
        squares=False,
        backend=backend,
    )[0]


def batch_norm_with_squares(
    x: Tensor,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    training: bool,
    residual: Tensor | None,
    relu: bool,
    momentum: float,
    eps: float,
    detach_var: bool,
    squares: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """:func:`batch_norm_uncentered2d`, and what :func:`bcos_conv2d` takes as ``squares``: of the result, not differentiable.

    For the layers of this package, which know that the one is followed by the other.
    """
    if has_torch_function((x, running_var, weight, bias, residual)):
        return handle_torch_function(batch_norm_with_squares, (x, running_var, weight, bias, residual), **locals())
    _check_floating("x", x)
    _check_rank(x, "x", 4, "[N, C, H, W]")
    for name, t in (("running_var", running_var), ("weight", weight), ("bias", bias)):
        if t is None:
            continue
        _check_floating(name, t)
        _check_device(name, t, x)
        if t.shape != (x.shape[1],):
            raise ValueError(f"{name} must be [{x.shape[1]}], one value per channel of x {_shape(x)}; got {_shape(t)}")
    if residual is not None:
        _check_floating("residual", residual)
        _check_device("residual", residual, x)
        if residual.dtype != x.dtype:
            raise TypeError(f"residual is {residual.dtype}, but x is {x.dtype}; convert one")
        if residual.shape != x.shape:
            raise ValueError(f"residual must have the shape of x, {_shape(x)}; got {_shape(residual)}")
    if running_var is None and not training:
        raise ValueError("running_var is None: evaluation needs it; pass it, or training=True for the batch's variance")
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum must be between 0 and 1; got {momentum}")
    if eps < 0:
        raise ValueError(f"eps must not be negative; got {eps}")
    backend = dispatch.requested(backend)
    var = None if training else running_var
    if backend == dispatch.REFERENCE:
        z = reference.batch_norm_uncentered2d(
            x, var, weight, bias, residual=residual, relu=relu, eps=eps, detach_var=detach_var
        ).to(x.dtype)
        batch_var = x.detach().var((0, 2, 3), unbiased=False) if training else None
        sums = None
    else:
        z, _, batch_var, sums = torch.ops.bcos.batch_norm_uncentered2d(
            x, var, weight, bias, residual, eps, relu, detach_var, squares, backend
        )
    if training and running_var is not None and batch_var is not None and x.numel():
        _update(running_var, batch_var.to(running_var.dtype), momentum)
    return z, sums if squares else None


@torch.no_grad()
def _update(running_var: Tensor, batch_var: Tensor, momentum: float) -> None:
    if not torch._C._are_functorch_transforms_active():
        running_var.lerp_(batch_var, momentum)
        return
    updated = torch.lerp(running_var, batch_var, momentum)
    try:
        running_var.copy_(updated)
    except RuntimeError as error:
        raise RuntimeError(
            "running_var cannot be updated inside torch.func's transforms where it is not an argument of the transformed"
            " function, or is shared by the members of a vmap, which have a variance each; evaluate with model.eval(),"
            " pass a running_var for each member, or track none (track_running_stats=False, running_var=None)"
        ) from error


def layer_norm(
    x: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    detach_var: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Layer norm, ``(x - mean) / sqrt(var + eps) * weight + bias``, with an explanation mode.

    Args:
        x: ``[..., *normalized_shape]``, any floating dtype.
        normalized_shape: the last axes, over which mean and variance are taken; an int is one axis.
        weight, bias: of that shape, or None. May be of a wider dtype than ``x``.
        detach_var: explanation mode: the first derivative takes the variance as a constant; the mean is none.
        backend: as for :func:`bcos_conv2d`, but a backend without a kernel for it leaves it to the next one.

    Returns:
        The shape and dtype of ``x`` (under CUDA's autocast float32, as torch's own).

    Raises:
        TypeError, ValueError: arguments that do not fit.

    Source: B-cos v2 (arXiv 2306.10898), for the explanation mode.
    """
    return layer_norm_with_squares(
        x, normalized_shape, weight, bias, eps=eps, detach_var=detach_var, squares=False, backend=backend
    )[0]


def layer_norm_with_squares(
    x: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float,
    detach_var: bool,
    squares: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """:func:`layer_norm` over one axis, and what :func:`bcos_linear` takes as ``squares``: of the result."""
    if has_torch_function((x, weight, bias)):
        return handle_torch_function(layer_norm_with_squares, (x, weight, bias), **locals())
    _check_floating("x", x)
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    if not shape or x.shape[max(x.dim() - len(shape), 0) :] != shape:
        raise ValueError(f"normalized_shape must be the last axes of x {_shape(x)}; got {list(shape)}")
    for name, t in (("weight", weight), ("bias", bias)):
        if t is None:
            continue
        _check_floating(name, t)
        _check_device(name, t, x)
        if t.shape != shape:
            raise ValueError(f"{name} must be of normalized_shape {list(shape)}; got {_shape(t)}")
    if eps < 0:
        raise ValueError(f"eps must not be negative; got {eps}")
    if x.is_cuda and torch.is_autocast_enabled("cuda"):
        x = x.to(accumulator(x.dtype))
    backend = dispatch.requested(backend)
    if backend == dispatch.REFERENCE:
        z = reference.layer_norm(x, shape, weight, bias, eps=eps, detach_var=detach_var).to(x.dtype)
        return z, None
    z, _, _, sums = torch.ops.bcos.layer_norm(x, weight, bias, len(shape), eps, detach_var, squares, backend)
    return z, sums if squares else None


def conv2d_scaled(
    u: Tensor,
    x: Tensor,
    kernel_size: Sequence[int],
    *,
    b: float | Tensor,
    stride: Pair,
    padding: Pair | str,
    dilation: Pair,
    groups: int,
    max_out: int,
    out_channels: int,
    detach_scale: bool,
) -> Tensor:
    """What :func:`bcos_conv2d` makes of the result ``u [N, O*M, Ho, Wo]`` of an ordinary convolution of ``x``.

    For the layers of this package, whose inner layer may compute ``u`` in its own way. The result is in the dtype of ``u``.
    """
    _check_floating("x", x)
    _check_rank(x, "x", 4, "[N, C, H, W]")
    kernel, step, spacing = (kernel_size[0], kernel_size[1]), _pair("stride", stride, 1), _pair("dilation", dilation, 1)
    norm_of, _, pad = _resolve_padding(x, None, padding, kernel, step, spacing)
    size = conv_output_size((norm_of.shape[2], norm_of.shape[3]), kernel, step, pad, spacing)
    _check_output(u, [x.shape[0], out_channels * max_out, *size], x)
    acc = accumulator(u.dtype)
    y = reference.conv2d_scaled(
        u.to(acc),
        norm_of.to(acc),
        kernel,
        b=b,
        stride=step,
        padding=pad,
        dilation=spacing,
        groups=groups,
        max_out=max_out,
        detach_scale=detach_scale,
    )
    return y.to(u.dtype)


def linear_scaled(
    u: Tensor, x: Tensor, *, b: float | Tensor, max_out: int, out_features: int, detach_scale: bool
) -> Tensor:
    """What :func:`bcos_linear` makes of the result ``u [..., O*M]`` of an ordinary linear layer of ``x``."""
    _check_floating("x", x)
    _check_output(u, [*x.shape[:-1], out_features * max_out], x)
    acc = accumulator(u.dtype)
    return reference.linear_scaled(u.to(acc), x.to(acc), b=b, max_out=max_out, detach_scale=detach_scale).to(u.dtype)


# ---- checks


def is_special(weight: Tensor) -> bool:
    """Whether the tensor is of a class that computes in its own way, as quantised weights do."""
    if type(weight) in (Tensor, nn.Parameter) or isinstance(weight, torch.fx.Proxy):
        return False
    own = type(weight).__torch_function__  # usually a class method, but a static method works too
    plain: Any = Tensor.__torch_function__
    return own is not torch._C._disabled_torch_function_impl and getattr(own, "__func__", own) is not plain.__func__


def _check_output(u: Tensor, shape: list[int], x: Tensor) -> None:
    if not isinstance(u, Tensor) or list(u.shape) != shape:
        got = _shape(u) if isinstance(u, Tensor) else type(u).__name__
        raise ValueError(f"linear: the layer inside must give {shape} for x {_shape(x)}; got {got}")


def _shape(t: Tensor) -> str:
    return str(list(t.shape))


def _check_floating(name: str, t: Tensor) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(t).__name__}")
    if not t.is_floating_point():
        raise TypeError(f"{name} must be of a floating dtype; got {t.dtype}; convert it, for images x.float() / 255")


def _check_device(name: str, t: Tensor, x: Tensor) -> None:
    if t.device != x.device:
        raise ValueError(f"{name} is on {t.device}, but x is on {x.device}; move one to the other with .to(device)")


def _check_tensors(first: str, x: Tensor, **others: Tensor | None) -> None:
    _check_floating(first, x)
    for name, t in others.items():
        if t is None:
            continue
        _check_floating(name, t)
        _check_device(name, t, x)
        if t.dtype != x.dtype and not _autocasts(x.device.type):
            raise TypeError(f"{name} is {t.dtype}, but x is {x.dtype}; convert one, or use torch.autocast")


def _autocasts(device_type: str) -> bool:
    """Not every device has autocast to ask for: the meta device has none."""
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def _check_rank(t: Tensor, name: str, rank: int, layout: str) -> None:
    if t.dim() != rank:
        hint = "; add the batch axis with x.unsqueeze(0)" if name == "x" and t.dim() == rank - 1 else ""
        raise ValueError(f"{name} must have {rank} axes, {layout}; got {_shape(t)}{hint}")


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} must be at least 1; got {value}")


def _check_max_out(weight: Tensor, max_out: int) -> int:
    _check_positive("max_out", max_out)
    rows = weight.shape[0]
    if rows < 1 or rows % max_out:
        raise ValueError(f"max_out={max_out} does not divide the {rows} rows of weight {_shape(weight)}")
    return rows


def _check_squares(squares: Tensor, x: Tensor, shape: list[int]) -> None:
    _check_floating("squares", squares)
    _check_device("squares", squares, x)
    dtype = accumulator(x.dtype)
    if squares.dtype != dtype:
        raise TypeError(f"squares must be {dtype} for x of {x.dtype}; got {squares.dtype}")
    if list(squares.shape) != shape:
        raise ValueError(f"squares must be {shape}, the sums of the squares of x {_shape(x)}; got {_shape(squares)}")


def _check_bias(bias: Tensor | None, rows: int) -> None:
    if bias is not None and bias.shape != (rows,):
        raise ValueError(f"bias must be [{rows}], one value per row of weight; got {_shape(bias)}")


def check_exponent(b: float | Tensor, x: Tensor | None = None) -> float | Tensor:
    """``b`` as a float, or the scalar tensor that it is."""
    if isinstance(b, Tensor):
        _check_floating("b", b)
        if b.numel() != 1:
            raise ValueError(f"b must be a number or a scalar tensor; got shape {_shape(b)}")
        if x is not None:
            _check_device("b", b, x)
        return b
    if isinstance(b, bool) or not isinstance(b, (int, float)):
        raise TypeError(f"b must be a number or a scalar tensor; got {type(b).__name__}")
    if not 1 <= b < math.inf:
        raise ValueError(f"b must be a finite number of at least 1; got {b}")
    return float(b)


def _pair(name: str, value: Pair, least: int) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2:
        raise ValueError(f"{name} must be an int or a pair (vertical, horizontal); got {value}")
    if min(pair) < least:
        raise ValueError(f"{name} must be at least {least}; got {value}")
    return pair[0], pair[1]


def _resolve_padding(
    x: Tensor,
    squares: Tensor | None,
    padding: Pair | str,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
) -> tuple[Tensor, Tensor | None, tuple[int, int]]:
    """Padding in numbers. An even window under ``"same"`` needs one more at the far end: ``x`` is padded for it here."""
    if not isinstance(padding, str):
        return x, squares, _pair("padding", padding, 0)
    if padding == "valid":
        return x, squares, (0, 0)
    if padding != "same":
        raise ValueError(f'padding must be an int, a pair, "same" or "valid"; got {padding!r}')
    if stride != (1, 1):
        raise ValueError(f'padding="same" needs stride 1; got stride {stride}')
    vertical, horizontal = (d * (k - 1) for k, d in zip(kernel_size, dilation, strict=True))
    if vertical % 2 or horizontal % 2:
        more = (0, horizontal % 2, 0, vertical % 2)
        x, squares = F.pad(x, more), None if squares is None else F.pad(squares, more)
    return x, squares, (vertical // 2, horizontal // 2)


def _split_exponent(b: float | Tensor) -> tuple[float, Tensor | None]:
    """B as the operators take it: a number, or the tensor that stands in for it."""
    return (2.0, b) if isinstance(b, Tensor) else (b, None)


def _define(
    definition: Callable[[Tensor, Tensor, Tensor | None, Options], Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    options: Options,
) -> Tensor:
    """The reference, with what autocast does to a convolution; the operators do that themselves."""
    kind = x.device.type
    if _autocasts(kind):
        x, weight, bias = registration.autocast(kind, x, weight, bias)  # type: ignore[assignment]  # bias alone may be None
    return definition(x, weight, bias, options).to(x.dtype)
