"""Whether a module computes what its class is known for: a subclass counts as its base only while both compute the same.

Conversion and fused blocks replace forward passes that they know by the name of their class, so that no other package has to
be imported. A class of the same name elsewhere, a subclass with another forward pass, and a method that was replaced on the
instance are not the known class.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Container
from types import CodeType
from typing import Any

from torch import nn

#: What runs around every forward pass, or in it without being named there.
_CALL = ("__call__", "_call_impl", "_wrapped_call_impl", "__getattr__", "__getattribute__", "__iter__", "__getitem__")
_ABSENT = object()


def class_name(kind: type) -> str:
    """Module and qualified name, such as ``torch.nn.modules.conv.Conv2d``."""
    return f"{kind.__module__}.{kind.__qualname__}"


def known_class(module: nn.Module, names: Container[str]) -> str | None:
    """The name of the nearest of the module's classes that is in ``names``, if the module computes what that class computes.

    None where no class is in ``names``, or where something that the forward pass of the class uses was overridden by a
    subclass or on the instance.
    """
    for kind in type(module).__mro__:
        if (name := class_name(kind)) in names:
            return name if _computes_as(module, kind) else None
    return None


def _computes_as(module: nn.Module, base: type) -> bool:
    own, kind = vars(module), type(module)
    for name in _used_by_forward(base):
        known = inspect.getattr_static(base, name, _ABSENT)
        if inspect.getattr_static(kind, name, _ABSENT) is not known:
            return False
        if name in own and callable(known):
            return False
    return True


@functools.cache
def _used_by_forward(base: type) -> tuple[str, ...]:
    """Every name that ``base.forward``, and the methods that it calls, may look up on the class.

    Names of functions and of attributes are among them; comparing those too does no harm.
    """
    found, todo = set(_CALL), ["forward"]
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            todo += _names(inspect.getattr_static(base, name, None))
    return tuple(sorted(found))


def _names(attribute: Any) -> list[str]:
    """The names in the code of a method or property."""
    function = attribute.fget if isinstance(attribute, property) else getattr(attribute, "__func__", attribute)
    if not inspect.isfunction(function):
        return []
    codes, names = [inspect.unwrap(function).__code__], []
    while codes:
        code = codes.pop()
        names += code.co_names
        codes += [c for c in code.co_consts if isinstance(c, CodeType)]  # lambdas and comprehensions
    return names


def has_any_hook(module: nn.Module) -> bool:
    """Whether the module has a hook that would be lost with it: on its passes, or on its state dict."""
    return any(hooks for name, hooks in vars(module).items() if name.endswith("_hooks") and isinstance(hooks, dict))
