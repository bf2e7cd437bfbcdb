"""``torch.ops.bcos.conv2d`` and ``linear``: each B-cos layer and its backward pass as a registered operator.

Each has a schema, an implementation that hands the call to the chosen backend, a fake implementation (shapes only, for
``torch.compile``) and autograd. A backward operator is differentiable too: its gradient is taken through
:mod:`bcos_kernels.reference`, which is slower but exact to any order. :mod:`bcos_kernels.norm_ops` has the norms.

Users call :mod:`bcos_kernels.functional`, which checks the arguments; nothing here does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bcos_kernels import dispatch, extremes, reference
from bcos_kernels.contract import (
    Call,
    Forward,
    Gradients,
    Needs,
    Options,
    Saved,
    accumulator,
    conv_output_size,
    memory_format,
    winner_dtype,
)
from bcos_kernels.registration import (
    Maybe,
    Watch,
    apart,
    define,
    differentiate_backward,
    empty,
    register_autocast,
    register_autograd,
    register_vmap,
    unversioned,
    when_imported,
)

# The options travel as plain arguments; `_options` puts them together again. `b` holds where `b_tensor` is None.
_CONV_OPTIONS = (
    "float b, int[] stride, int[] padding, int[] dilation, int groups, int max_out,"
    " bool normalize_weight, bool detach_scale"
)
_LINEAR_OPTIONS = "float b, int max_out, bool normalize_weight, bool detach_scale"


def _options(
    b_tensor: Maybe,
    b: float,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    max_out: int,
    normalize_weight: bool,
    detach_scale: bool,
) -> Options:
    return Options(
        b if b_tensor is None else b_tensor,
        (stride[0], stride[1]),
        (padding[0], padding[1]),
        (dilation[0], dilation[1]),
        groups,
        max_out,
        normalize_weight,
        detach_scale,
    )


def _linear_options(b_tensor: Maybe, b: float, max_out: int, normalize_weight: bool, detach_scale: bool) -> Options:
    return Options(
        b if b_tensor is None else b_tensor,
        max_out=max_out,
        normalize_weight=normalize_weight,
        detach_scale=detach_scale,
    )


def _forward_fake(x: Tensor, y: Tensor, norm_shape: Sequence[int], options: Options, for_backward: bool) -> Forward:
    """``y`` is the output, empty of values but of the right shape and format."""
    norm = x.new_empty(0 if options.is_linear else norm_shape, dtype=accumulator(x.dtype))
    keep = for_backward and options.keeps_linear(x.dtype)
    pick = for_backward and options.max_out > 1
    winner = winner_dtype(options.max_out)
    return Forward(
        y,
        norm,
        torch.empty_like(y) if keep else empty(y),
        torch.empty_like(y, dtype=winner) if pick else empty(y, winner),
    )


def _backward_fake(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Maybe, b_tensor: Maybe, needs: Needs, like_conv: bool
) -> Gradients:
    def format_of(*tensors: Tensor) -> torch.memory_format:
        return memory_format(*tensors) if like_conv else torch.contiguous_format

    return Gradients(
        x.new_empty(x.shape).contiguous(memory_format=format_of(x, weight)) if needs.x else empty(grad),
        weight.new_empty(weight.shape).contiguous(memory_format=format_of(weight)) if needs.weight else empty(grad),
        weight.new_empty(bias.shape) if needs.bias and bias is not None else empty(grad),
        b_tensor.new_empty(b_tensor.shape) if needs.b and b_tensor is not None else empty(grad),
    )


def _in_formats(g: Gradients, x: Tensor, weight: Tensor, b_tensor: Maybe, needs: Needs, like_conv: bool) -> Gradients:
    """Gradients in the memory formats and dtypes of the contract (nothing happens where they are already)."""
    dx, dweight, dbias, db = g
    if needs.x:
        dx = dx.contiguous(memory_format=memory_format(x, weight)) if like_conv else dx.contiguous()
    if needs.weight and like_conv:
        dweight = dweight.contiguous(memory_format=memory_format(weight))
    if needs.b and b_tensor is not None:
        db = db.to(b_tensor.dtype).view_as(b_tensor)
    return Gradients(dx, dweight, dbias, db)


class _Layer:
    """Registers ``bcos::<name>`` and ``bcos::<name>_backward`` for a B-cos layer."""

    def __init__(
        self,
        name: str,
        option_schema: str,
        make_options: Callable[..., Options],
        definition: Callable[..., Tensor],
        output: Callable[[Tensor, Tensor, Options], tuple[Tensor, list[int]]],
        like_conv: bool,
    ) -> None:
        self.name = name
        self.make_options = make_options
        self.definition = definition
        self.output = output
        self.like_conv = like_conv
        define(
            name,
            f"(Tensor x, Tensor weight, Tensor? bias, Tensor? b_tensor, {option_schema}, Tensor? squares,"
            " bool for_backward, str backend) -> (Tensor y, Tensor norm, Tensor linear, Tensor winner)",
            self.forward,
            self.forward_fake,
        )
        define(
            f"{name}_backward",
            "(Tensor grad, Tensor x, Tensor weight, Tensor? bias, Tensor? b_tensor, Tensor kept, Tensor norm,"
            f" Tensor winner, bool[] needs, {option_schema}, str backend)"
            " -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor db)",
            self.backward,
            self.backward_fake,
        )
        self.forward_op = getattr(torch.ops.bcos, name).default
        self.backward_op = getattr(torch.ops.bcos, f"{name}_backward").default
        register_autograd(name, self.save_for_backward, self.differentiate)
        register_autograd(f"{name}_backward", self.save_for_double_backward, self.differentiate_twice)
        register_autocast(name)
        leading = not like_conv
        register_vmap(name, ("x", "squares"), leading, lambda arguments: True)
        samples = ("grad", "x", "kept", "norm", "winner")
        register_vmap(f"{name}_backward", samples, leading, lambda arguments: not any(arguments["needs"][1:]))

    # -- forward

    def forward(self, x: Tensor, weight: Tensor, bias: Maybe, b_tensor: Maybe, *rest: Any) -> Forward:
        *plain, squares, for_backward, backend = rest
        options = self.make_options(b_tensor, *plain)
        module = dispatch.choose(backend, Call(self.name, x, weight, options, bias is not None, for_backward))
        result = extremes.forward(module, self.name, x, weight, bias, options, for_backward, squares)
        if self.like_conv:
            fmt = memory_format(x, weight)
            y, norm, linear, winner = result
            return Forward(
                y.contiguous(memory_format=fmt),
                norm,
                linear.contiguous(memory_format=fmt) if linear.dim() == 4 else linear,
                winner.contiguous(memory_format=fmt) if winner.dim() == 4 else winner,
            )
        return result

    def forward_fake(self, x: Tensor, weight: Tensor, bias: Maybe, b_tensor: Maybe, *rest: Any) -> Forward:
        *plain, _, for_backward, _ = rest
        options = self.make_options(b_tensor, *plain)
        y, norm_shape = self.output(x, weight, options)
        return _forward_fake(x, y, norm_shape, options, for_backward)

    def save_for_backward(self, ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
        x, weight, bias, b_tensor, *rest = inputs
        *plain, _, _, backend = rest
        ctx.plain, ctx.backend, ctx.watch = plain, backend, None
        y, norm, linear, winner = output
        options = self.make_options(b_tensor, *plain)
        kept = linear if options.keeps_linear(x.dtype) else empty(y) if options.is_linear else y
        if kept is y:
            ctx.watch, kept = Watch(y, linear), unversioned(y)
        ctx.save_for_backward(x, weight, bias, b_tensor, kept, norm, winner)
        ctx.mark_non_differentiable(norm, linear, winner)
        ctx.set_materialize_grads(False)

    def differentiate(self, ctx: Any, wanted: Sequence[bool], grad: Maybe, *_: Any) -> tuple[Maybe, ...]:
        nothing = [None] * (len(ctx.plain) + 3)
        if grad is None:
            return (None, None, None, None, *nothing)
        x, weight, bias, b_tensor, kept, norm, winner = ctx.saved_tensors
        if ctx.watch is not None and ctx.watch.modified():
            # for_backward=True though nothing more is kept: to a compiler this is the same call as in forward, and free
            with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
                kept = self.forward_op(x, weight, bias, b_tensor, *ctx.plain, None, True, ctx.backend)[0]
        needs = wanted[:4]
        grads = self.backward_op(
            grad, x, weight, bias, b_tensor, kept, norm, winner, list(needs), *ctx.plain, ctx.backend
        )
        return (*(g if need else None for g, need in zip(grads, needs, strict=True)), *nothing)

    # -- backward

    def backward(
        self,
        grad: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Maybe,
        b_tensor: Maybe,
        kept: Tensor,
        norm: Tensor,
        winner: Tensor,
        needs: Sequence[bool],
        *rest: Any,
    ) -> Gradients:
        *plain, backend = rest
        options, wanted = self.make_options(b_tensor, *plain), Needs(*needs)
        size = grad.numel()
        if (not options.is_linear and kept.numel() != size) or (options.max_out > 1 and winner.numel() != size):
            raise ValueError(
                f"torch.ops.bcos.{self.name}_backward: kept and winner must have the shape of grad {list(grad.shape)}; the"
                " forward operator returns them if it is called with for_backward=True"
            )
        module = dispatch.choose(backend, Call(f"{self.name}_backward", x, weight, options), strict=False)
        saved = Saved(kept, norm, winner)
        grads = extremes.backward(module, self.name, grad, x, weight, bias, saved, options, wanted)
        return _in_formats(Gradients(*apart(grads, needs, grad)), x, weight, b_tensor, wanted, self.like_conv)

    def backward_fake(
        self, grad: Tensor, x: Tensor, weight: Tensor, bias: Maybe, b_tensor: Maybe, *rest: Any
    ) -> Gradients:
        needs = Needs(*rest[3])
        return _backward_fake(grad, x, weight, bias, b_tensor, needs, self.like_conv)

    def save_for_double_backward(self, ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
        grad, x, weight, bias, b_tensor, _kept, _norm, _winner, needs, *rest = inputs
        ctx.save_for_backward(grad, x, weight, bias, b_tensor)
        ctx.first_needs, ctx.plain = needs, rest[:-1]
        ctx.set_materialize_grads(False)

    def differentiate_twice(self, ctx: Any, wanted: Sequence[bool], *cotangents: Maybe) -> tuple[Maybe, ...]:
        grad, *inputs = ctx.saved_tensors

        def definition(x: Tensor, weight: Tensor, bias: Maybe, b_tensor: Maybe) -> Tensor:
            options = self.make_options(b_tensor, *ctx.plain)
            return self.definition(x, weight, bias, options)

        results = differentiate_backward(definition, grad, inputs, ctx.first_needs, cotangents, wanted[:5])
        return (*results, *[None] * (len(ctx.plain) + 5))


def _conv2d_output(x: Tensor, weight: Tensor, options: Options) -> tuple[Tensor, list[int]]:
    o = options
    size = conv_output_size(
        (x.shape[2], x.shape[3]), (weight.shape[2], weight.shape[3]), o.stride, o.padding, o.dilation
    )
    y = x.new_empty((x.shape[0], weight.shape[0] // o.max_out, *size))
    return y.contiguous(memory_format=memory_format(x, weight)), [x.shape[0], o.groups, *size]


def _linear_output(x: Tensor, weight: Tensor, options: Options) -> tuple[Tensor, list[int]]:
    return x.new_empty((*x.shape[:-1], weight.shape[0] // options.max_out)), [*x.shape[:-1], 1]


def conv2d_definition(x: Tensor, weight: Tensor, bias: Maybe, o: Options) -> Tensor:
    return reference.conv2d(
        x,
        weight,
        bias,
        b=o.b,
        stride=o.stride,
        padding=o.padding,
        dilation=o.dilation,
        groups=o.groups,
        max_out=o.max_out,
        normalize_weight=o.normalize_weight,
        detach_scale=o.detach_scale,
    )


def linear_definition(x: Tensor, weight: Tensor, bias: Maybe, o: Options) -> Tensor:
    return reference.linear(
        x,
        weight,
        bias,
        b=o.b,
        max_out=o.max_out,
        normalize_weight=o.normalize_weight,
        detach_scale=o.detach_scale,
    )


_CONV2D = _Layer("conv2d", _CONV_OPTIONS, _options, conv2d_definition, _conv2d_output, like_conv=True)
_LINEAR = _Layer("linear", _LINEAR_OPTIONS, _linear_options, linear_definition, _linear_output, like_conv=False)

# not at once: that module imports Triton, which takes 0.2 seconds
when_imported("torch.utils.flop_counter", "bcos_kernels.flops")
