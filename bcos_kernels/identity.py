"""Whether a module computes what its class is known for: a subclass counts as its base only while both compute the same.

Conversion and fused blocks replace forward passes that they know by the name of their class, so that no other package has to
be imported. A class of the same name elsewhere, a subclass with another forward pass, and a method that was replaced on the
instance are not the known class.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Container
from types import CodeType, FunctionType
from typing import Any

from torch import nn

#: What runs around every forward pass, or in it without being named there.
_CALL = ("__call__", "_call_impl", "_wrapped_call_impl", "__getattr__", "__getattribute__", "__iter__", "__getitem__")
_ABSENT = object()


def class_name(kind: type) -> str:
    """Module and qualified name, such as ``torch.nn.modules.conv.Conv2d``.

    A class that is to be known although its module has a name that any project may use, such as ``models.vit``, says its name
    itself, in an attribute ``bcos_kernels_class`` of its own.
    """
    return vars(kind).get("bcos_kernels_class") or f"{kind.__module__}.{kind.__qualname__}"


def known_class(module: nn.Module, names: Container[str]) -> str | None:
    """The name of the nearest of the module's classes that is in ``names``, if the module computes what that class computes.

    None where no class is in ``names``, or where something that the forward pass of the class uses was overridden by a
    subclass, on the instance, or on the class itself by another module's code.
    """
    for kind in type(module).__mro__:
        if (name := class_name(kind)) in names:
            return name if _computes_as(module, kind) else None
    return None


def averages_all(pool: nn.Module) -> bool:
    """Whether the module is the average over all locations, as torch computes it."""
    return known_class(pool, (class_name(nn.AdaptiveAvgPool2d),)) is not None and pool.output_size in (1, (1, 1))


def has_any_hook(module: nn.Module) -> bool:
    """Whether the module has any hook, on forward, backward or its state dict; a module in its place would not have it."""
    return any(hooks for name, hooks in vars(module).items() if name.endswith("_hooks") and isinstance(hooks, dict))


def _computes_as(module: nn.Module, base: type) -> bool:
    own, kind = vars(module), type(module)
    for name in _used_by_forward(base):
        known = inspect.getattr_static(base, name, _ABSENT)
        if inspect.getattr_static(kind, name, _ABSENT) is not known or (name in own and callable(known)):
            return False
        if name not in _CALL and not _is_original(base, name):
            return False
    return True


def _is_original(base: type, name: str) -> bool:
    """Whether a method is from the module that defines its class: nobody has put another one there since."""
    owner = next((kind for kind in base.__mro__ if name in vars(kind)), None)
    function = None if owner is None else _function(vars(owner)[name])
    return owner is None or function is None or inspect.unwrap(function).__module__ == owner.__module__


def _used_by_forward(base: type) -> set[str]:
    """Every name that ``base.forward``, and the methods that it calls, may look up on the class.

    Names of functions and of attributes are among them; comparing those too does no harm.
    """
    found, todo = set(_CALL), ["forward"]
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            function = _function(inspect.getattr_static(base, name, None))
            todo += () if function is None else _names(inspect.unwrap(function).__code__)
    return found


def _function(attribute: Any) -> FunctionType | None:
    """The function of a method or property."""
    function = attribute.fget if isinstance(attribute, property) else getattr(attribute, "__func__", attribute)
    return function if isinstance(function, FunctionType) else None


@functools.cache
def _names(code: CodeType) -> tuple[str, ...]:
    """The names in the code, and in that of the lambdas and comprehensions inside."""
    inner = (_names(c) for c in code.co_consts if isinstance(c, CodeType))
    return (*code.co_names, *(name for names in inner for name in names))
