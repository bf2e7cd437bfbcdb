"""What makes an operation an operator ``torch.ops.bcos.*``: schema, fake, autograd, second derivatives, autocast."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from bcos_kernels.contract import accumulator

_LIBRARY = torch.library.Library("bcos", "DEF")

Maybe = Tensor | None


def define(name: str, schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    _LIBRARY.define(name + schema)
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"bcos::{name}", fake, lib=_LIBRARY)


def register_autograd(name: str, setup_context: Callable[..., None], backward: Callable[..., Any]) -> None:
    """What ``torch.library.register_autograd`` does, for schemas without defaults and keyword-only arguments.

    Without its search for omitted defaults a tiny convolution takes 125 instead of 167 microseconds, forward and backward
    (timeit, one thread of an AMD EPYC, torch 2.15).
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
        def backward(ctx: Any, *grads: Maybe) -> tuple[Maybe, ...]:
            return (None, *backward(ctx, ctx.needs_input_grad[1:], *grads))

    def kernel(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        # forward-mode AD too: the Function refuses its tangents in a sentence, below they would silently become zero
        dual = forward_ad._current_level >= 0
        if dual or (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
            return Derivative.apply(keyset, *args)
        return redispatch(keyset, args)

    _LIBRARY.impl(name, kernel, "Autograd", with_keyset=True)


def autocast(device: str, *tensors: Maybe) -> list[Maybe]:
    """What autocast does to the arguments of ``torch.nn.functional.conv2d``: all but float64 get its dtype."""
    dtype = torch.get_autocast_dtype(device)
    return [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors]


def register_autocast(name: str) -> None:
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

    def forward(device: str, x: Tensor, weight: Tensor, bias: Maybe, *rest: Any) -> tuple[Any, ...]:
        *options, squares, for_backward, backend = rest
        cast = autocast(device, x, weight, bias)
        # what was summed before `x` was rounded is not its sum of squares any more
        return (*cast, *options, squares if cast[0] is x else None, for_backward, backend)

    for device in ("cpu", "cuda"):
        register(device, name, forward)
        # backward of a layer that ran outside may be called inside: its matrix products are not to be cast
        register(device, f"{name}_backward", lambda device, *args: args)


def empty(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return like.new_empty(0, dtype=dtype)


def apart(grads: Sequence[Tensor], needs: Sequence[bool], like: Tensor) -> list[Tensor]:
    """A backend's gradients, with an empty tensor of its own in the place of each that is not wanted.

    Backends put the same one everywhere, but the outputs of an operator must not share storage.
    """
    return [g if need else empty(like) for g, need in zip(grads, needs, strict=True)]


def differentiate_backward(
    forward: Callable[..., Tensor],
    grad: Tensor,
    inputs: Sequence[Maybe],
    first_needs: Sequence[bool],
    cotangents: Sequence[Maybe],
    needs: Sequence[bool],
) -> list[Maybe]:
    """Vector-Jacobian product of the map ``(grad, *inputs) -> gradients of inputs``, for the double backward pass.

    ``forward(*inputs)`` is the definition. Results are in the order ``(grad, *inputs)``, None where not in ``needs``.
    Works on copies in the accumulator's dtype that are tied to the arguments, so that a gradient of the result exists too.
    """
    again = torch.is_grad_enabled()
    acc = accumulator(grad.dtype)

    def tied(t: Maybe) -> Maybe:
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
        results: list[Maybe] = [None] * len(tensors)
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
