"""The one place that decides which backend runs a call, and that can say why another one does not."""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch

from bcos_kernels import choice
from bcos_kernels.contract import Call

log = logging.getLogger("bcos_kernels")

#: Modules by backend name, in the order in which the automatic choice tries them where nothing was measured.
BACKENDS: dict[str, str] = {
    "triton": "bcos_kernels.triton.backend",
    "cudnn": "bcos_kernels.cudnn",
    "native": "bcos_kernels.native",
    "portable": "bcos_kernels.portable",
}

#: Not a backend that runs operations: the definition itself, differentiated by autograd.
REFERENCE = "reference"
AUTO = "auto"

_active = AUTO
_logged: set[str] = set()
_warned = False
#: What was found out about each kind of call: the backends that can be used on this machine, the fastest first.
_orders: dict[tuple[str, torch.device, torch.dtype, str], tuple[ModuleType, ...]] = {}


class SlowPathWarning(UserWarning):
    """Layers run in plain PyTorch, since no backend with kernels of its own can be used here; the message says why."""


def names() -> tuple[str, ...]:
    """What ``backend=`` and :func:`use_backend` accept."""
    return (AUTO, REFERENCE, *BACKENDS)


def check_name(backend: str) -> str:
    if backend not in names():
        raise ValueError(f"backend: unknown name {backend!r}; choose one of {', '.join(names())}")
    return backend


def requested(backend: str | None) -> str:
    """The backend that a call asks for: its own argument, or else what :func:`use_backend` set."""
    return _active if backend is None else check_name(backend)


class use_backend:  # noqa: N801 - used like a function
    """Choose the backend for the whole process, as a switch or for the length of a ``with`` block.

    >>> use_backend("reference")            # from now on
    >>> with use_backend("portable"):       # here only
    ...     model(images)

    ``"auto"`` takes the fastest backend that can run each call. Any other name runs that backend or raises the sentence
    that says why it cannot.

    Raises:
        ValueError: the name is unknown.
    """

    def __init__(self, backend: str) -> None:
        global _active
        self._before = _active
        _active = check_name(backend)

    def __enter__(self) -> use_backend:
        return self

    def __exit__(self, *exc: object) -> None:
        global _active
        _active = self._before


def load(name: str) -> ModuleType:
    return importlib.import_module(BACKENDS[name])


def unavailable(name: str) -> str | None:
    """None if the backend can be used on this machine, otherwise the sentence that says why not."""
    try:
        sentence: str | None = load(name).unavailable()
    except ImportError as error:
        sentence = f"{name}: cannot be imported: {error}"
    return sentence


def why_not(name: str, call: Call) -> str | None:
    """None if the backend can run the call, otherwise the sentence that says why not."""
    sentence = unavailable(name)
    if sentence is None:
        sentence = load(name).why_not(call)
    return sentence


def available_backends() -> dict[str, str | None]:
    """Every backend by name: None where it is usable on this machine, else the sentence that says why not."""
    return {REFERENCE: None, **{name: unavailable(name) for name in BACKENDS}}


def choose(backend: str, call: Call, *, strict: bool = True) -> ModuleType:
    """The module that runs ``call``.

    ``backend`` is a name or ``"auto"``: the fastest that can run the call, by the measurements in ``choices.json``, and in
    the order of ``BACKENDS`` where there are none. A named backend that cannot run the call raises, unless not ``strict``
    (a backward pass, whose forward pass was already done): then, as with ``"auto"``, the next one that can takes over,
    which is logged once.

    Raises:
        RuntimeError: the named backend cannot run the call; the message is the sentence that says why.
    """
    if backend != AUTO:
        sentence = why_not(backend, call._replace(explicit=True))
        if sentence is None:
            return load(backend)
        if strict:
            raise RuntimeError(sentence)
        _log_once(sentence)
    x = call.x
    kind = (call.op, x.device, x.dtype, choice.shape_class(call))
    if (modules := _orders.get(kind)) is None:
        modules = _orders[kind] = tuple(_usable(choice.order(*kind, BACKENDS)))
        if backend == AUTO and not any(m is not load("portable") and m.why_not(call) is None for m in modules):
            _warn_of_slow_path(call)
    for module in modules:
        sentence = module.why_not(call)
        if sentence is None:
            return module
        _log_once(sentence)
    raise AssertionError("the portable backend runs everything")


def _warn_of_slow_path(call: Call) -> None:
    """Once in a process, where layers run on plain PyTorch that the compiled extension would run."""
    global _warned
    if not _warned and (message := load("native").slow_path(call)) is not None:
        _warned = True
        warnings.warn(message, SlowPathWarning, stacklevel=3)


def _usable(order: list[str]) -> Iterator[ModuleType]:
    for name in order:
        sentence = unavailable(name)
        if sentence is None:
            yield load(name)
        else:
            _log_once(sentence)


def forget() -> None:
    """For tests: what can be used is found out anew."""
    _orders.clear()


def _log_once(sentence: str) -> None:
    if sentence not in _logged:
        _logged.add(sentence)
        log.info("%s; the next backend takes over", sentence)


@contextmanager
def forget_logged() -> Iterator[None]:
    """For tests: every sentence is logged anew inside."""
    before = set(_logged)
    _logged.clear()
    try:
        yield
    finally:
        _logged.clear()
        _logged.update(before)
