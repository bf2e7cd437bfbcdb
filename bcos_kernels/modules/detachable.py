"""What all layers with an explanation mode have in common."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules.module import _has_any_global_hook  # there is no public name for it

from bcos_kernels.context import Stack


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody wants to see, or change, what goes into the module or comes out of it; or into every module."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or _has_any_global_hook()
    )


def runs(module: nn.Module, forward: Callable[..., Tensor]) -> bool:
    """Whether that is the module's forward pass: not one of a subclass, nor one that was put onto the module itself."""
    return getattr(module.forward, "__func__", None) is forward


@dataclass(frozen=True, eq=False)
class _Explained:
    """The layers that are in explanation mode in this thread or task.

    They are told by their ids: torch.compile guards a tuple of numbers, but not what is in a set of modules. ``layers`` keeps
    them alive, so that no other layer gets such an id. ``input_only``: parameters get no gradient.
    """

    ids: tuple[int, ...]
    layers: tuple[nn.Module, ...]
    input_only: bool


_explained: Stack[_Explained] = Stack("explained", in_backward=True)


@contextmanager
def explained(layers: tuple[nn.Module, ...], *, input_only: bool) -> Iterator[None]:
    """Inside the block these layers are in explanation mode, for the calling thread or asyncio task alone."""
    entry = _Explained(tuple(map(id, layers)), layers, input_only)
    _explained.push(entry)
    try:
        yield
    finally:
        _explained.remove(entry)


def constants(*parameters: Tensor | None) -> tuple[Any, ...]:
    """The parameters without a gradient."""
    return tuple(None if p is None else p.detach() for p in parameters)


def has_switch(module: nn.Module) -> bool:
    """Whether explanation mode is a setting of the module, as in other packages, and not only of the call."""
    if isinstance(module, DetachableModule):
        return type(module).set_explanation_mode is not DetachableModule.set_explanation_mode
    # Layers of the first B-cos code have `explanation_mode(detach)`; models of the later ones have a context manager of
    # that name, but no `detach`.
    return hasattr(module, "set_explanation_mode") or (
        callable(getattr(module, "explanation_mode", None)) and hasattr(module, "detach")
    )


def switch(module: Any, on: bool) -> None:
    """Sets the explanation mode of a module that :func:`has_switch`."""
    (module.set_explanation_mode if hasattr(module, "set_explanation_mode") else module.explanation_mode)(on)


def leaf(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward pass, which ``torch.fx`` records as one call of the module; but for one that is traced all by itself."""

    @functools.wraps(forward)
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        for argument in (*args, *kwargs.values()) if kwargs else args:
            if isinstance(argument, Proxy):
                tracer: Any = argument.tracer
                if self is not tracer.root:
                    return tracer.create_proxy("call_module", tracer.path_of_module(self), args, kwargs)
        return forward(self, *args, **kwargs)

    return call


class DetachableModule(nn.Module):
    """A layer whose input-dependent factor can be taken as a constant by the backward pass: explanation mode.

    :func:`bcos_kernels.explanation_mode` switches it for the calling thread or asyncio task. ``set_explanation_mode`` is for
    good and for all threads; it and ``detach`` are names of the public B-cos code, whose tools look for them.
    """

    _detach = False

    def __init_subclass__(cls, **more: Any) -> None:
        """A layer is a leaf for ``torch.fx``, whatever the tracer thinks: its mode and its statistics stay its own."""
        super().__init_subclass__(**more)
        if "forward" in vars(cls):
            cls.forward = leaf(cls.forward)  # type: ignore[method-assign]

    @property
    def detach(self) -> bool:
        """Whether the layer is in explanation mode, here and now. Assigning is :meth:`set_explanation_mode`."""
        return self.modes()[0]

    @detach.setter
    def detach(self, value: bool) -> None:
        self._detach = bool(value)

    def set_explanation_mode(self, activate: bool = True) -> None:
        self.detach = activate

    def modes(self) -> tuple[bool, bool]:
        """``detach``, and whether parameters are constants too, since :func:`bcos_kernels.explain` wants no gradient of them.

        ``torch.autograd.grad`` tells torch's own operations what it wants, but not a Python function, which ours are.
        One look-up for both: every layer asks at every call.
        """
        entries = _explained.get()
        if not entries:
            return self._detach, False
        mine = [entry.input_only for entry in entries if id(self) in entry.ids]
        return self._detach or bool(mine), True in mine

    def _replicate_for_data_parallel(self) -> nn.Module:
        """A replica of ``nn.DataParallel`` is another object and runs in another thread: it keeps the mode itself."""
        replica: DetachableModule = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        vars(replica)["_detach"] = self.detach  # its own, where the attribute is a property
        return replica
