"""``torch.ops.bcos.*``: every operation and its backward pass as a registered operator.

Each has a schema, an implementation that hands the call to the chosen backend, a fake implementation (shapes only, for
``torch.compile``) and autograd. A backward operator is differentiable too: its gradient is taken through
:mod:`bcos_kernels.reference`, which is slower but exact to any order.

Users call :mod:`bcos_kernels.functional`, which checks the arguments; nothing here does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from bcos_kernels import dispatch, reference
from bcos_kernels.contract import (
    Call,
    Forward,
    Gradients,
    LayerNormForward,
    LayerNormGradients,
    LayerNormNeeds,
    LayerNormOptions,
    Needs,
    NormForward,
    NormGradients,
    NormNeeds,
    NormOptions,
    Options,
    Saved,
    accumulator,
    conv_output_size,
    memory_format,
    winner_dtype,
)

_LIBRARY = torch.library.Library("bcos", "DEF")

# The options travel as plain arguments; `_options` puts them together again. `b` holds where `b_tensor` is None.
_CONV_OPTIONS = (
    "float b, int[] stride, int[] padding, int[] dilation, int groups, int max_out,"
    " bool normalize_weight, bool detach_scale"
)
_LINEAR_OPTIONS = "float b, int max_out, bool normalize_weight, bool detach_scale"

_Maybe = Tensor | None


def _define(name: str, schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    _LIBRARY.define(name + schema)
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"bcos::{name}", fake, lib=_LIBRARY)


def _register_autograd(name: str, setup_context: Callable[..., None], backward: Callable[..., Any]) -> None:
    """What ``torch.library.register_autograd`` does, for schemas without defaults and keyword-only arguments.

    Its search for omitted defaults is a third of all that a call costs besides its kernels (41 of 134 microseconds forward
    and backward of a tiny convolution, one thread): with 53 convolutions, 1 % of a training step of ResNet-50 on two cores.
    """
    op = getattr(torch.ops.bcos, name).default
    below = torch._C._after_autograd_keyset

    def redispatch(keyset: torch._C.DispatchKeySet, args: tuple[Any, ...]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & below, *args)

    class Derivative(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
            result = redispatch(keyset, args)
            setup_context(ctx, args, result)
            return result

        @staticmethod
        def backward(ctx: Any, *grads: _Maybe) -> tuple[_Maybe, ...]:
            return (None, *backward(ctx, ctx.needs_input_grad[1:], *grads))

    def kernel(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        # forward-mode AD too: the Function refuses its tangents in a sentence, below they would silently become zero
        dual = forward_ad._current_level >= 0
        if dual or (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
            return Derivative.apply(keyset, *args)
        return redispatch(keyset, args)

    _LIBRARY.impl(name, kernel, "Autograd", with_keyset=True)


def autocast(device: str, *tensors: _Maybe) -> list[_Maybe]:
    """What autocast does to the arguments of ``torch.nn.functional.conv2d``: all but float64 get its dtype."""
    dtype = torch.get_autocast_dtype(device)
    return [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors]


def _register_autocast(name: str) -> None:
    """The rule of ``torch.nn.functional.conv2d`` for ``x``, ``weight`` and ``bias``; gradients are in their dtypes.

    Norms and scales are computed in float32 anyway, and B is not cast.
    """

    def register(device: str, op: str, prepare: Callable[..., tuple[Any, ...]]) -> None:
        key = f"Autocast{device.upper()}"
        excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
        packet = getattr(torch.ops.bcos, op)

        def kernel(*args: Any) -> Any:
            with torch._C._ExcludeDispatchKeyGuard(excluded):
                return packet(*prepare(device, *args))

        _LIBRARY.impl(op, kernel, key)

    def forward(device: str, x: Tensor, weight: Tensor, bias: _Maybe, *rest: Any) -> tuple[Any, ...]:
        *options, squares, for_backward, backend = rest
        cast = autocast(device, x, weight, bias)
        # what was summed before `x` was rounded is not its sum of squares any more
        return (*cast, *options, squares if cast[0] is x else None, for_backward, backend)

    for device in ("cpu", "cuda"):
        register(device, name, forward)
        # backward of a layer that ran outside may be called inside: its matrix products are not to be cast
        register(device, f"{name}_backward", lambda device, *args: args)


def _options(
    b_tensor: _Maybe,
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


def _linear_options(b_tensor: _Maybe, b: float, max_out: int, normalize_weight: bool, detach_scale: bool) -> Options:
    return Options(
        b if b_tensor is None else b_tensor,
        max_out=max_out,
        normalize_weight=normalize_weight,
        detach_scale=detach_scale,
    )


def _differentiate_backward(
    forward: Callable[..., Tensor],
    grad: Tensor,
    inputs: Sequence[_Maybe],
    first_needs: Sequence[bool],
    cotangents: Sequence[_Maybe],
    needs: Sequence[bool],
) -> list[_Maybe]:
    """Vector-Jacobian product of the map ``(grad, *inputs) -> gradients of inputs``, for the double backward pass.

    ``forward(*inputs)`` is the definition. Results are in the order ``(grad, *inputs)``, None where not in ``needs``.
    Works on copies in the accumulator's dtype that are tied to the arguments, so that a gradient of the result exists too.
    """
    again = torch.is_grad_enabled()
    acc = accumulator(grad.dtype)

    def tied(t: _Maybe) -> _Maybe:
        if t is None:
            return None
        return t.to(acc, copy=True) if again and t.requires_grad else t.detach().to(acc, copy=True).requires_grad_()

    with torch.enable_grad(), torch.autocast(grad.device.type, enabled=False):
        tensors: list[Any] = [tied(t) for t in (grad, *inputs)]
        y = forward(*tensors[1:])
        wanted = [
            i for i, c in enumerate(cotangents) if c is not None and first_needs[i] and tensors[i + 1] is not None
        ]
        sources = [i for i, n in enumerate(needs) if n and tensors[i] is not None]
        if not wanted or not sources:
            return [None] * len(tensors)
        first = torch.autograd.grad(
            y,
            [tensors[i + 1] for i in wanted],
            tensors[0],
            create_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        pairs = [(f, cotangents[i]) for f, i in zip(first, wanted, strict=True) if f.requires_grad]
        results: list[_Maybe] = [None] * len(tensors)
        if pairs:
            outputs, weights = zip(*pairs, strict=True)
            second = torch.autograd.grad(
                outputs,
                [tensors[i] for i in sources],
                [w.to(acc) for w in weights],
                create_graph=again,
                allow_unused=True,
            )
            for i, s in zip(sources, second, strict=True):
                original = (grad, *inputs)[i]
                results[i] = None if s is None or original is None else s.to(original.dtype)
    return results


# ---- convolution and linear layer: one pair of operators each, alike but for the options


def _empty(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return like.new_empty(0, dtype=dtype)


def _forward_fake(x: Tensor, y: Tensor, norm_shape: Sequence[int], options: Options, for_backward: bool) -> Forward:
    """``y`` is the output, empty of values but of the right shape and format."""
    norm = x.new_empty(0 if options.is_linear else norm_shape, dtype=accumulator(x.dtype))
    keep = for_backward and options.keeps_linear(x.dtype)
    pick = for_backward and options.max_out > 1
    winner = winner_dtype(options.max_out)
    return Forward(
        y,
        norm,
        torch.empty_like(y) if keep else _empty(y),
        torch.empty_like(y, dtype=winner) if pick else _empty(y, winner),
    )


def _backward_fake(
    grad: Tensor, x: Tensor, weight: Tensor, bias: _Maybe, b_tensor: _Maybe, needs: Needs, like_conv: bool
) -> Gradients:
    def format_of(*tensors: Tensor) -> torch.memory_format:
        return memory_format(*tensors) if like_conv else torch.contiguous_format

    return Gradients(
        x.new_empty(x.shape).contiguous(memory_format=format_of(x, weight)) if needs.x else _empty(grad),
        weight.new_empty(weight.shape).contiguous(memory_format=format_of(weight)) if needs.weight else _empty(grad),
        weight.new_empty(bias.shape) if needs.bias and bias is not None else _empty(grad),
        b_tensor.new_empty(b_tensor.shape) if needs.b and b_tensor is not None else _empty(grad),
    )


def _apart(grads: Sequence[Tensor], needs: Sequence[bool], like: Tensor) -> list[Tensor]:
    """A backend's gradients, with an empty tensor of its own in the place of each that is not wanted.

    Backends put the same one everywhere, but the outputs of an operator must not share storage.
    """
    return [g if need else _empty(like) for g, need in zip(grads, needs, strict=True)]


def _in_formats(g: Gradients, x: Tensor, weight: Tensor, b_tensor: _Maybe, needs: Needs, like_conv: bool) -> Gradients:
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
        _define(
            name,
            f"(Tensor x, Tensor weight, Tensor? bias, Tensor? b_tensor, {option_schema}, Tensor? squares,"
            " bool for_backward, str backend) -> (Tensor y, Tensor norm, Tensor linear, Tensor winner)",
            self.forward,
            self.forward_fake,
        )
        _define(
            f"{name}_backward",
            "(Tensor grad, Tensor x, Tensor weight, Tensor? bias, Tensor? b_tensor, Tensor kept, Tensor norm,"
            f" Tensor winner, bool[] needs, {option_schema}, str backend)"
            " -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor db)",
            self.backward,
            self.backward_fake,
        )
        self.backward_op = getattr(torch.ops.bcos, f"{name}_backward").default
        _register_autograd(name, self.save_for_backward, self.differentiate)
        _register_autograd(f"{name}_backward", self.save_for_double_backward, self.differentiate_twice)
        _register_autocast(name)

    # -- forward

    def forward(self, x: Tensor, weight: Tensor, bias: _Maybe, b_tensor: _Maybe, *rest: Any) -> Forward:
        *plain, squares, for_backward, backend = rest
        options = self.make_options(b_tensor, *plain)
        module = dispatch.choose(backend, Call(self.name, x, weight, options, bias is not None, for_backward))
        result: Forward = getattr(module, self.name)(x, weight, bias, options, for_backward, squares)
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

    def forward_fake(self, x: Tensor, weight: Tensor, bias: _Maybe, b_tensor: _Maybe, *rest: Any) -> Forward:
        *plain, _, for_backward, _ = rest
        options = self.make_options(b_tensor, *plain)
        y, norm_shape = self.output(x, weight, options)
        return _forward_fake(x, y, norm_shape, options, for_backward)

    def save_for_backward(self, ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
        x, weight, bias, b_tensor, *rest = inputs
        *plain, _, for_backward, backend = rest
        ctx.plain, ctx.backend, ctx.for_backward = plain, backend, for_backward
        y, norm, linear, winner = output
        options = self.make_options(b_tensor, *plain)
        kept = linear if options.keeps_linear(x.dtype) else _empty(y) if options.is_linear else y
        ctx.save_for_backward(x, weight, bias, b_tensor, kept, norm, winner)
        ctx.mark_non_differentiable(norm, linear, winner)
        ctx.set_materialize_grads(False)

    def differentiate(self, ctx: Any, wanted: Sequence[bool], grad: _Maybe, *_: Any) -> tuple[_Maybe, ...]:
        nothing = [None] * (len(ctx.plain) + 3)
        if grad is None:
            return (None, None, None, None, *nothing)
        if not ctx.for_backward:
            raise RuntimeError(
                f"torch.ops.bcos.{self.name} was called with for_backward=False: it kept nothing to go back"
            )
        x, weight, bias, b_tensor, kept, norm, winner = ctx.saved_tensors
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
        bias: _Maybe,
        b_tensor: _Maybe,
        kept: Tensor,
        norm: Tensor,
        winner: Tensor,
        needs: Sequence[bool],
        *rest: Any,
    ) -> Gradients:
        *plain, backend = rest
        options, wanted = self.make_options(b_tensor, *plain), Needs(*needs)
        module = dispatch.choose(backend, Call(f"{self.name}_backward", x, weight, options), strict=False)
        grads = getattr(module, f"{self.name}_backward")(
            grad, x, weight, bias, Saved(kept, norm, winner), options, wanted
        )
        return _in_formats(Gradients(*_apart(grads, needs, grad)), x, weight, b_tensor, wanted, self.like_conv)

    def backward_fake(
        self, grad: Tensor, x: Tensor, weight: Tensor, bias: _Maybe, b_tensor: _Maybe, *rest: Any
    ) -> Gradients:
        needs = Needs(*rest[3])
        return _backward_fake(grad, x, weight, bias, b_tensor, needs, self.like_conv)

    def save_for_double_backward(self, ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
        grad, x, weight, bias, b_tensor, _kept, _norm, _winner, needs, *rest = inputs
        ctx.save_for_backward(grad, x, weight, bias, b_tensor)
        ctx.first_needs, ctx.plain = needs, rest[:-1]
        ctx.set_materialize_grads(False)

    def differentiate_twice(self, ctx: Any, wanted: Sequence[bool], *cotangents: _Maybe) -> tuple[_Maybe, ...]:
        grad, *inputs = ctx.saved_tensors

        def definition(x: Tensor, weight: Tensor, bias: _Maybe, b_tensor: _Maybe) -> Tensor:
            options = self.make_options(b_tensor, *ctx.plain)
            return self.definition(x, weight, bias, options)

        results = _differentiate_backward(definition, grad, inputs, ctx.first_needs, cotangents, wanted[:5])
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


def conv2d_definition(x: Tensor, weight: Tensor, bias: _Maybe, o: Options) -> Tensor:
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


def linear_definition(x: Tensor, weight: Tensor, bias: _Maybe, o: Options) -> Tensor:
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


# ---- uncentered batch norm, residual, ReLU


def _batch_norm(
    x: Tensor,
    var: _Maybe,
    weight: _Maybe,
    bias: _Maybe,
    residual: _Maybe,
    eps: float,
    relu: bool,
    detach_var: bool,
    squares: bool,
    backend: str,
) -> NormForward:
    module = dispatch.choose(backend, Call("batch_norm_uncentered2d", x, weight))
    options = NormOptions(eps, relu, detach_var, squares)
    f: NormForward = module.batch_norm_uncentered2d(x, var, weight, bias, residual, options)
    return f._replace(z=f.z.contiguous(memory_format=memory_format(x)))


def _batch_norm_fake(
    x: Tensor,
    var: _Maybe,
    weight: _Maybe,
    bias: _Maybe,
    residual: _Maybe,
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


def _batch_norm_differentiate(ctx: Any, wanted: Sequence[bool], grad: _Maybe, *_: Any) -> tuple[_Maybe, ...]:
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
    z: _Maybe,
    mean: Tensor,
    var: Tensor,
    weight: _Maybe,
    bias: _Maybe,
    needs: Sequence[bool],
    eps: float,
    relu: bool,
    detach_var: bool,
    backend: str,
) -> NormGradients:
    module = dispatch.choose(backend, Call("batch_norm_uncentered2d_backward", x, weight), strict=False)
    grads = module.batch_norm_uncentered2d_backward(
        grad, x, z, mean, var, weight, bias, NormOptions(eps, relu, detach_var), NormNeeds(*needs)
    )
    dx, dweight, dbias, dresidual = _apart(grads, needs, grad)
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
    z: _Maybe,
    mean: Tensor,
    var: Tensor,
    weight: _Maybe,
    bias: _Maybe,
    needs: Sequence[bool],
    *_: Any,
) -> NormGradients:
    def like_x(wanted: bool) -> Tensor:
        return x.new_empty(x.shape).contiguous(memory_format=memory_format(x)) if wanted else _empty(grad)

    return NormGradients(
        like_x(needs[0]),
        weight.new_empty(weight.shape) if needs[1] and weight is not None else _empty(grad),
        bias.new_empty(bias.shape) if needs[2] and bias is not None else _empty(grad),
        like_x(needs[3]),
    )


def _batch_norm_save_backward(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
    grad, x, z, mean, var, weight, bias, ctx.first_needs, ctx.eps, ctx.relu, ctx.detach_var, _ = inputs
    ctx.save_for_backward(grad, x, z, var, weight, bias)
    ctx.batch_stats = mean.numel() > 0
    ctx.set_materialize_grads(False)


def _batch_norm_differentiate_twice(ctx: Any, wanted: Sequence[bool], *cotangents: _Maybe) -> tuple[_Maybe, ...]:
    grad, x, z, var, weight, bias = ctx.saved_tensors
    # a residual has no part in any gradient but through the mask of the ReLU, which is constant: any tensor can stand in
    passed = None if z is None else ~(z <= 0)

    def definition(x: Tensor, weight: _Maybe, bias: _Maybe, residual: _Maybe) -> Tensor:
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

    dgrad, dx, dweight, dbias, _ = _differentiate_backward(
        definition,
        grad,
        (x, weight, bias, z),
        ctx.first_needs,
        cotangents,
        [*(wanted[i] for i in (0, 1, 5, 6)), False],
    )
    return (dgrad, dx, None, None, None, dweight, dbias, None, None, None, None, None)


_define(
    "batch_norm_uncentered2d",
    "(Tensor x, Tensor? var, Tensor? weight, Tensor? bias, Tensor? residual, float eps, bool relu, bool detach_var,"
    " bool squares, str backend) -> (Tensor z, Tensor mean, Tensor batch_var, Tensor squares)",
    _batch_norm,
    _batch_norm_fake,
)
_define(
    "batch_norm_uncentered2d_backward",
    "(Tensor grad, Tensor x, Tensor? z, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, bool[] needs, float eps,"
    " bool relu, bool detach_var, str backend) -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dresidual)",
    _batch_norm_backward,
    _batch_norm_backward_fake,
)
_register_autograd("batch_norm_uncentered2d", _batch_norm_save, _batch_norm_differentiate)
_register_autograd("batch_norm_uncentered2d_backward", _batch_norm_save_backward, _batch_norm_differentiate_twice)


# ---- layer norm


def _layer_norm(
    x: Tensor,
    weight: _Maybe,
    bias: _Maybe,
    axes: int,
    eps: float,
    detach_var: bool,
    squares: bool,
    backend: str,
) -> LayerNormForward:
    # not strict: only some backends have a kernel of their own for what torch does well
    module = dispatch.choose(backend, Call("layer_norm", x), strict=False)
    result: LayerNormForward = module.layer_norm(x, weight, bias, LayerNormOptions(axes, eps, detach_var, squares))
    return result._replace(z=result.z.contiguous())


def _layer_norm_fake(
    x: Tensor,
    weight: _Maybe,
    bias: _Maybe,
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


def _layer_norm_differentiate(ctx: Any, wanted: Sequence[bool], grad: _Maybe, *_: Any) -> tuple[_Maybe, ...]:
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
    weight: _Maybe,
    bias: _Maybe,
    needs: Sequence[bool],
    axes: int,
    eps: float,
    detach_var: bool,
    backend: str,
) -> LayerNormGradients:
    module = dispatch.choose(backend, Call("layer_norm_backward", x), strict=False)
    grads = module.layer_norm_backward(
        grad, x, mean, rstd, weight, bias, LayerNormOptions(axes, eps, detach_var), LayerNormNeeds(*needs)
    )
    dx, dweight, dbias = _apart(grads, needs, grad)
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
    weight: _Maybe,
    bias: _Maybe,
    needs: Sequence[bool],
    *_: Any,
) -> LayerNormGradients:
    return LayerNormGradients(
        x.new_empty(x.shape) if needs[0] else _empty(grad),
        weight.new_empty(weight.shape) if needs[1] and weight is not None else _empty(grad),
        bias.new_empty(bias.shape) if needs[2] and bias is not None else _empty(grad),
    )


def _layer_norm_save_backward(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
    grad, x, _, _, weight, bias, ctx.first_needs, ctx.axes, ctx.eps, ctx.detach_var, _ = inputs
    ctx.save_for_backward(grad, x, weight, bias)
    ctx.set_materialize_grads(False)


def _layer_norm_differentiate_twice(ctx: Any, wanted: Sequence[bool], *cotangents: _Maybe) -> tuple[_Maybe, ...]:
    grad, x, weight, bias = ctx.saved_tensors

    def definition(x: Tensor, weight: _Maybe, bias: _Maybe) -> Tensor:
        shape = x.shape[x.dim() - ctx.axes :]
        return reference.layer_norm(x, shape, weight, bias, eps=ctx.eps, detach_var=ctx.detach_var)

    dgrad, dx, dweight, dbias = _differentiate_backward(
        definition, grad, (x, weight, bias), ctx.first_needs, cotangents, [wanted[i] for i in (0, 1, 4, 5)]
    )
    return (dgrad, dx, None, None, dweight, dbias, None, None, None, None, None)


_define(
    "layer_norm",
    "(Tensor x, Tensor? weight, Tensor? bias, int axes, float eps, bool detach_var, bool squares, str backend)"
    " -> (Tensor z, Tensor mean, Tensor rstd, Tensor squares)",
    _layer_norm,
    _layer_norm_fake,
)
_define(
    "layer_norm_backward",
    "(Tensor grad, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, bool[] needs, int axes, float eps,"
    " bool detach_var, str backend) -> (Tensor dx, Tensor dweight, Tensor dbias)",
    _layer_norm_backward,
    _layer_norm_backward_fake,
)
_register_autograd("layer_norm", _layer_norm_save, _layer_norm_differentiate)
_register_autograd("layer_norm_backward", _layer_norm_save_backward, _layer_norm_differentiate_twice)
