"""``torch.ops.bcos.batch_norm_uncentered2d`` and ``layer_norm``, registered as the layers in :mod:`bcos_kernels.ops` are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bcos_kernels import dispatch, extremes, reference
from bcos_kernels.contract import (
    Call,
    LayerNormForward,
    LayerNormGradients,
    LayerNormNeeds,
    LayerNormOptions,
    NormForward,
    NormGradients,
    NormNeeds,
    NormOptions,
    accumulator,
    memory_format,
)
from bcos_kernels.registration import (
    Maybe,
    apart,
    define,
    differentiate_backward,
    empty,
    register_autograd,
    register_vmap,
)

# ---- uncentered batch norm, residual, ReLU


def _batch_norm(
    x: Tensor,
    var: Maybe,
    weight: Maybe,
    bias: Maybe,
    residual: Maybe,
    eps: float,
    relu: bool,
    detach_var: bool,
    squares: bool,
    backend: str,
) -> NormForward:
    module = dispatch.choose(backend, Call("batch_norm_uncentered2d", x, weight))
    options = NormOptions(eps, relu, detach_var, squares)
    f = extremes.batch_norm(module, x, var, weight, bias, residual, options)
    return f._replace(z=f.z.contiguous(memory_format=memory_format(x)))


def _batch_norm_fake(
    x: Tensor,
    var: Maybe,
    weight: Maybe,
    bias: Maybe,
    residual: Maybe,
    eps: float,
    relu: bool,
    detach_var: bool,
    squares: bool,
    backend: str,
) -> NormForward:
    stats = x.shape[1] if var is None else 0
    acc = accumulator(x.dtype)
    return NormForward(
        x.new_empty(x.shape).contiguous(memory_format=memory_format(x)),
        x.new_empty(stats, dtype=acc),
        x.new_empty(stats, dtype=acc),
        x.new_empty((x.shape[0], 1, *x.shape[2:]) if squares else 0, dtype=acc),
    )


def _batch_norm_save(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
    x, var, weight, bias, residual, ctx.eps, ctx.relu, ctx.detach_var, _, ctx.backend = inputs
    z, mean, batch_var, squares = output
    masks = z if ctx.relu and residual is not None else None
    ctx.save_for_backward(x, masks, mean, batch_var if var is None else var, weight, bias)
    ctx.mark_non_differentiable(mean, batch_var, squares)
    ctx.set_materialize_grads(False)


def _batch_norm_differentiate(ctx: Any, wanted: Sequence[bool], grad: Maybe, *_: Any) -> tuple[Maybe, ...]:
    if grad is None:
        return (None,) * 10
    x, z, mean, var, weight, bias = ctx.saved_tensors
    needs_x, needs_weight, needs_bias, needs_residual = (wanted[i] for i in (0, 2, 3, 4))
    needs = [needs_x, needs_weight, needs_bias, needs_residual and ctx.relu]
    grads = torch.ops.bcos.batch_norm_uncentered2d_backward(
        grad, x, z, mean, var, weight, bias, needs, ctx.eps, ctx.relu, ctx.detach_var, ctx.backend
    )
    dx, dweight, dbias, dresidual = (g if need else None for g, need in zip(grads, needs, strict=True))
    if needs_residual and not ctx.relu:
        dresidual = grad
    return (dx, None, dweight, dbias, dresidual, None, None, None, None, None)


def _batch_norm_backward(
    grad: Tensor,
    x: Tensor,
    z: Maybe,
    mean: Tensor,
    var: Tensor,
    weight: Maybe,
    bias: Maybe,
    needs: Sequence[bool],
    eps: float,
    relu: bool,
    detach_var: bool,
    backend: str,
) -> NormGradients:
    module = dispatch.choose(backend, Call("batch_norm_uncentered2d_backward", x, weight), strict=False)
    grads = extremes.batch_norm_backward(
        module, grad, x, z, mean, var, weight, bias, NormOptions(eps, relu, detach_var), NormNeeds(*needs)
    )
    dx, dweight, dbias, dresidual = apart(grads, needs, grad)
    fmt = memory_format(x)
    return NormGradients(
        dx.contiguous(memory_format=fmt) if needs[0] else dx,
        dweight,
        dbias.to(bias.dtype) if needs[2] and bias is not None else dbias,
        dresidual.contiguous(memory_format=fmt) if needs[3] else dresidual,
    )


def _batch_norm_backward_fake(
    grad: Tensor,
    x: Tensor,
    z: Maybe,
    mean: Tensor,
    var: Tensor,
    weight: Maybe,
    bias: Maybe,
    needs: Sequence[bool],
    *_: Any,
) -> NormGradients:
    def like_x(wanted: bool) -> Tensor:
        return x.new_empty(x.shape).contiguous(memory_format=memory_format(x)) if wanted else empty(grad)

    return NormGradients(
        like_x(needs[0]),
        weight.new_empty(weight.shape) if needs[1] and weight is not None else empty(grad),
        bias.new_empty(bias.shape) if needs[2] and bias is not None else empty(grad),
        like_x(needs[3]),
    )


def _batch_norm_save_backward(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
    grad, x, z, mean, var, weight, bias, ctx.first_needs, ctx.eps, ctx.relu, ctx.detach_var, _ = inputs
    ctx.save_for_backward(grad, x, z, var, weight, bias)
    ctx.batch_stats = mean.numel() > 0
    ctx.set_materialize_grads(False)


def _batch_norm_differentiate_twice(ctx: Any, wanted: Sequence[bool], *cotangents: Maybe) -> tuple[Maybe, ...]:
    grad, x, z, var, weight, bias = ctx.saved_tensors
    # a residual has no part in any gradient but through the mask of the ReLU, which is constant: any tensor can stand in
    passed = None if z is None else ~(z <= 0)

    def definition(x: Tensor, weight: Maybe, bias: Maybe, residual: Maybe) -> Tensor:
        y = reference.batch_norm_uncentered2d(
            x,
            None if ctx.batch_stats else var,
            weight,
            bias,
            relu=ctx.relu and residual is None,
            eps=ctx.eps,
            detach_var=ctx.detach_var,
        )
        return y if residual is None or passed is None else (y + residual) * passed

    dgrad, dx, dweight, dbias, _ = differentiate_backward(
        definition,
        grad,
        (x, weight, bias, z),
        ctx.first_needs,
        cotangents,
        [*(wanted[i] for i in (0, 1, 5, 6)), False],
    )
    return (dgrad, dx, None, None, None, dweight, dbias, None, None, None, None, None)


define(
    "batch_norm_uncentered2d",
    "(Tensor x, Tensor? var, Tensor? weight, Tensor? bias, Tensor? residual, float eps, bool relu, bool detach_var,"
    " bool squares, str backend) -> (Tensor z, Tensor mean, Tensor batch_var, Tensor squares)",
    _batch_norm,
    _batch_norm_fake,
)
define(
    "batch_norm_uncentered2d_backward",
    "(Tensor grad, Tensor x, Tensor? z, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, bool[] needs, float eps,"
    " bool relu, bool detach_var, str backend) -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dresidual)",
    _batch_norm_backward,
    _batch_norm_backward_fake,
)
register_autograd("batch_norm_uncentered2d", _batch_norm_save, _batch_norm_differentiate)
register_autograd("batch_norm_uncentered2d_backward", _batch_norm_save_backward, _batch_norm_differentiate_twice)
register_vmap("batch_norm_uncentered2d", ("x", "residual"), False, lambda arguments: arguments["var"] is not None)
register_vmap(
    "batch_norm_uncentered2d_backward",
    ("grad", "x", "z"),
    False,
    lambda arguments: arguments["mean"].numel() == 0 and not (arguments["needs"][1] or arguments["needs"][2]),
)


# ---- layer norm


def _layer_norm(
    x: Tensor,
    weight: Maybe,
    bias: Maybe,
    axes: int,
    eps: float,
    detach_var: bool,
    squares: bool,
    backend: str,
) -> LayerNormForward:
    # not strict: only some backends have a kernel of their own for what torch does well
    module = dispatch.choose(backend, Call("layer_norm", x), strict=False)
    result = extremes.layer_norm(module, x, weight, bias, LayerNormOptions(axes, eps, detach_var, squares))
    return result._replace(z=result.z.contiguous())


def _layer_norm_fake(
    x: Tensor,
    weight: Maybe,
    bias: Maybe,
    axes: int,
    eps: float,
    detach_var: bool,
    squares: bool,
    backend: str,
) -> LayerNormForward:
    acc, leading = accumulator(x.dtype), x.shape[: x.dim() - axes]
    return LayerNormForward(
        x.new_empty(x.shape),
        x.new_empty((*leading, *[1] * axes), dtype=acc),
        x.new_empty((*leading, *[1] * axes), dtype=acc),
        x.new_empty((*leading, 1) if squares else 0, dtype=acc),
    )


def _layer_norm_save(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
    x, weight, bias, ctx.axes, ctx.eps, ctx.detach_var, _, ctx.backend = inputs
    _, mean, rstd, squares = output
    ctx.save_for_backward(x, mean, rstd, weight, bias)
    ctx.mark_non_differentiable(mean, rstd, squares)
    ctx.set_materialize_grads(False)


def _layer_norm_differentiate(ctx: Any, wanted: Sequence[bool], grad: Maybe, *_: Any) -> tuple[Maybe, ...]:
    nothing = (None,) * 5
    if grad is None:
        return (None, None, None, *nothing)
    x, mean, rstd, weight, bias = ctx.saved_tensors
    needs = list(wanted[:3])
    grads = torch.ops.bcos.layer_norm_backward(
        grad, x, mean, rstd, weight, bias, needs, ctx.axes, ctx.eps, ctx.detach_var, ctx.backend
    )
    return (*(g if need else None for g, need in zip(grads, needs, strict=True)), *nothing)


def _layer_norm_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Maybe,
    bias: Maybe,
    needs: Sequence[bool],
    axes: int,
    eps: float,
    detach_var: bool,
    backend: str,
) -> LayerNormGradients:
    module = dispatch.choose(backend, Call("layer_norm_backward", x), strict=False)
    grads = extremes.layer_norm_backward(
        module, grad, x, mean, rstd, weight, bias, LayerNormOptions(axes, eps, detach_var), LayerNormNeeds(*needs)
    )
    dx, dweight, dbias = apart(grads, needs, grad)
    return LayerNormGradients(
        dx.contiguous(),
        dweight.to(weight.dtype) if needs[1] and weight is not None else dweight,
        dbias.to(bias.dtype) if needs[2] and bias is not None else dbias,
    )


def _layer_norm_backward_fake(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Maybe,
    bias: Maybe,
    needs: Sequence[bool],
    *_: Any,
) -> LayerNormGradients:
    return LayerNormGradients(
        x.new_empty(x.shape) if needs[0] else empty(grad),
        weight.new_empty(weight.shape) if needs[1] and weight is not None else empty(grad),
        bias.new_empty(bias.shape) if needs[2] and bias is not None else empty(grad),
    )


def _layer_norm_save_backward(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
    grad, x, _, _, weight, bias, ctx.first_needs, ctx.axes, ctx.eps, ctx.detach_var, _ = inputs
    ctx.save_for_backward(grad, x, weight, bias)
    ctx.set_materialize_grads(False)


def _layer_norm_differentiate_twice(ctx: Any, wanted: Sequence[bool], *cotangents: Maybe) -> tuple[Maybe, ...]:
    grad, x, weight, bias = ctx.saved_tensors

    def definition(x: Tensor, weight: Maybe, bias: Maybe) -> Tensor:
        shape = x.shape[x.dim() - ctx.axes :]
        return reference.layer_norm(x, shape, weight, bias, eps=ctx.eps, detach_var=ctx.detach_var)

    dgrad, dx, dweight, dbias = differentiate_backward(
        definition, grad, (x, weight, bias), ctx.first_needs, cotangents, [wanted[i] for i in (0, 1, 4, 5)]
    )
    return (dgrad, dx, None, None, dweight, dbias, None, None, None, None, None)


define(
    "layer_norm",
    "(Tensor x, Tensor? weight, Tensor? bias, int axes, float eps, bool detach_var, bool squares, str backend)"
    " -> (Tensor z, Tensor mean, Tensor rstd, Tensor squares)",
    _layer_norm,
    _layer_norm_fake,
)
define(
    "layer_norm_backward",
    "(Tensor grad, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, bool[] needs, int axes, float eps,"
    " bool detach_var, str backend) -> (Tensor dx, Tensor dweight, Tensor dbias)",
    _layer_norm_backward,
    _layer_norm_backward_fake,
)
register_autograd("layer_norm", _layer_norm_save, _layer_norm_differentiate)
register_autograd("layer_norm_backward", _layer_norm_save_backward, _layer_norm_differentiate_twice)
register_vmap("layer_norm", ("x",), True, lambda arguments: True)
register_vmap(
    "layer_norm_backward", ("grad", "x", "mean", "rstd"), True, lambda arguments: not any(arguments["needs"][1:])
)
