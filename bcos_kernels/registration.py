"""What makes an operation an operator ``torch.ops.bcos.*``: schema, fake, autograd, vmap, second derivatives, autocast."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._functorch.eager_transforms import enable_inplace_requires_grad
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

from bcos_kernels.contract import accumulator

_LIBRARY = torch.library.Library("bcos", "DEF")

Maybe = Tensor | None


def define(name: str, schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    _LIBRARY.define(name + schema)
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"bcos::{name}", fake, lib=_LIBRARY)


def register_autograd(name: str, setup_context: Callable[..., None], backward: Callable[..., Any]) -> None:
    """What ``torch.library.register_autograd`` does, for schemas without defaults and keyword-only arguments, and more.

    Without its search for omitted defaults a tiny convolution takes 125 instead of 167 microseconds, forward and backward
    (timeit, one thread of an AMD EPYC, torch 2.15). Besides:

    - The argument ``for_backward``, where the schema has it, becomes True here when a derivative may follow. Only the call
      itself can know: a trace, an exported graph or a ``vmap`` is made once and run with other tensors. It never becomes
      False: an outer transform, or the graph that a compiler made for a later backward pass, may have asked for it.
    - The result may be modified in place, whatever the backend returns: see ``redispatch``.
    - ``torch.func.grad`` and ``vjp`` work. Forward mode is refused.
    """
    op = getattr(torch.ops.bcos, name).default
    arguments = [a.name for a in op._schema.arguments]
    flag = arguments.index("for_backward") if "for_backward" in arguments else None
    below = torch._C._after_ADInplaceOrView_keyset

    def redispatch(keyset: torch._C.DispatchKeySet, args: tuple[Any, ...]) -> Any:
        # Below ADInplaceOrView no view is recorded. What a backend returns, ``u.view(shape)`` for instance, is a tensor like
        # any other then; PyTorch forbids modifying a view that an autograd.Function returns.
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return op.redispatch(keyset & below, *args)

    class Rule:
        @staticmethod
        def forward(ctx: Any, keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
            result = redispatch(keyset, args)
            setup_context(ctx, args, result)
            return result

        @staticmethod
        def backward(ctx: Any, *grads: Maybe) -> tuple[Maybe, ...]:
            return (None, *backward(ctx, ctx.needs_input_grad[1:], *grads))

    class OneLevelRule(Rule):
        """For one of several nested transforms: those further out differentiate what its forward pass runs."""

        @staticmethod
        def forward(ctx: Any, keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
            with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
                return Rule.forward(ctx, keyset, *args)

    Derivative: Any = type(f"bcos_{name}", (Rule, torch.autograd.Function), {})
    # torch.func calls a kernel once for each nested transform. autograd.Function would handle all of them in one call, which
    # is for code above the dispatcher. The class that it makes for a single one of them is what a kernel needs; it has no
    # public name.
    OneLevel: Any = type(f"bcos_{name}", (OneLevelRule, torch.autograd.function._SingleLevelFunction), {})

    def kernel(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        if forward_ad._current_level >= 0:
            _refuse_tangents(name, args)
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
            return redispatch(keyset, args)
        if flag is not None and not args[flag]:
            args = (*args[:flag], True, *args[flag + 1 :])
        if torch._C._are_functorch_transforms_active():
            with enable_single_level_autograd_function():
                return OneLevel.apply(keyset, *args)
        return Derivative.apply(keyset, *args)

    _LIBRARY.impl(name, kernel, "Autograd", with_keyset=True)


def _refuse_tangents(name: str, args: tuple[Any, ...]) -> None:
    """Without this a tangent would silently become zero."""
    if any(isinstance(t, Tensor) and forward_ad.unpack_dual(t).tangent is not None for t in args):
        raise NotImplementedError(
            f"torch.ops.bcos.{name} has no derivative in forward mode (torch.func.jvp, jacfwd, hessian, forward_ad); use"
            " reverse mode (torch.func.vjp, jacrev, jacrev(jacrev(f)) for a Hessian), or, except in explanation mode, the"
            ' definition in plain PyTorch, which has both: bk.use_backend("reference")'
        )


class Watch:
    """Notices that a tensor was modified in place, itself or through a view, and holds none of its memory.

    Some backward passes need the output of their operation, as sigmoid's does. Where the output can be computed anew, users
    may modify it: what is saved is :func:`unversioned`, which autograd's own check lets pass, and backward asks
    ``modified()`` before it uses that. Both together take 2 of the 190 microseconds of a tiny linear layer, forward and
    backward (timeit, one thread of an AMD EPYC, torch 2.14).
    """

    def __init__(self, t: Tensor, empty: Tensor) -> None:
        """``empty``: any tensor of no elements on the same device."""
        self._alias = t.detach()  # shares the version counter, and until the next line the memory
        if type(t) is Tensor and not torch._C._are_functorch_transforms_active():  # which refuse this, as compilers do
            self._alias.data = empty
        self._version = self._alias._version

    def modified(self) -> bool:
        return self._alias._version != self._version


def unversioned(t: Tensor) -> Tensor:
    """The same memory with a version counter of its own."""
    with torch._C._AutoDispatchBelowADInplaceOrView():
        return t.detach()


def register_vmap(name: str, samples: Sequence[str], leading: bool, together: Callable[[dict[str, Any]], bool]) -> None:
    """``torch.func.vmap``: all members in one call where they are but more samples for the operation, else one by one.

    ``samples``: the tensors with an entry for every sample; every output has one too. Members that differ in these alone
    are computed together if ``together(arguments)``: no output is a sum over the samples, of which each member has its own.
    ``leading``: any number of leading axes counts the samples, and the members are one axis more; otherwise the first axis
    does, and the members are folded into it.
    """
    op = getattr(torch.ops.bcos, name)
    names = [a.name for a in op.default._schema.arguments]

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[list[Tensor], list[int | None]]:
        size = info.batch_size
        batched = [isinstance(d, int) for d in in_dims]  # a list argument has a list

        def fold(n: str, t: Any, d: Any, b: bool) -> Any:
            if n not in samples or t is None or (not b and _is_placeholder(t)):
                return t
            t = t.movedim(d, 0) if b else _joined([t] * size) if size else t.new_empty((0, *t.shape))
            return t if leading else t.flatten(0, 1)

        differ = {n for n, b in zip(names, batched, strict=True) if b}
        if differ <= set(samples) and together(dict(zip(names, args, strict=True))):
            results = list(op(*map(fold, names, args, in_dims, batched)))
            if not leading:
                some = batched.index(True)
                count = args[some].movedim(in_dims[some], 0).shape[1]
                results = [t if _is_placeholder(t) else t.unflatten(0, (size, count)) for t in results]
            return results, [None if _is_placeholder(t) else 0 for t in results]
        if size == 0:
            raise ValueError(f"torch.ops.bcos.{name}: vmap over no members; its axis of {sorted(differ)} has size 0")
        members = [op(*map(lambda a, d, b: a.select(d, i) if b else a, args, in_dims, batched)) for i in range(size)]
        results = [_joined(ts) for ts in zip(*members, strict=True)]
        return results, [0] * len(results)

    torch.library.register_vmap(f"bcos::{name}", rule, lib=_LIBRARY)


def _is_placeholder(t: Tensor) -> bool:
    """Whether it is :func:`empty`, which stands for a result that there is none of."""
    return t.shape == (0,)


def _joined(members: Sequence[Tensor]) -> Tensor:
    """``torch.stack`` that keeps each member's memory format, which the operators rely on."""
    if members[0].dim() == 0:
        return torch.stack(list(members))
    return torch.cat(list(members)).unflatten(0, (len(members), members[0].shape[0]))


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
        t = t.to(acc, copy=True)
        return t if again and t.requires_grad else t.detach().requires_grad_()

    # torch.func forbids requires_grad_() to those who differentiate through its transforms; here nobody else sees the leaves
    with torch.enable_grad(), torch.autocast(grad.device.type, enabled=False), enable_inplace_requires_grad(True):
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


def when_imported(module: str, then: str) -> None:
    """Import ``then`` as soon as somebody imports ``module``, or at once if somebody has."""
    if module in sys.modules:
        importlib.import_module(then)
        return

    class Finder:
        """Stays until the module is imported: somebody may only ask whether it is there."""

        @staticmethod
        def find_spec(name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
            if name != module:
                return None
            spec = PathFinder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                execute = spec.loader.exec_module

                def exec_module(m: ModuleType) -> None:
                    execute(m)
                    if Finder in sys.meta_path:
                        sys.meta_path.remove(Finder)
                    importlib.import_module(then)

                spec.loader.exec_module = exec_module  # type: ignore[method-assign, assignment]
            return spec

    sys.meta_path.insert(0, Finder)
