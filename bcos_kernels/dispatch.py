"""The one place that decides which backend runs a call, and that can say why another one does not."""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

import torch

from bcos_kernels import choice
from bcos_kernels.context import Stack
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

#: What contexts use that have not chosen for themselves; see :func:`set_default_backend`.
_default = AUTO
_logged: set[str] = set()
_warned = False
#: What was found out about each kind of call: the backends that can be used on this machine, the fastest first.
_orders: dict[tuple[str, torch.device, torch.dtype, str], tuple[ModuleType, ...]] = {}


class SlowPathWarning(UserWarning):
    """Layers run in plain PyTorch because no backend with compiled kernels can run the call; the message says why."""


def names() -> tuple[str, ...]:
    """What ``backend=`` and :func:`use_backend` accept."""
    return (AUTO, REFERENCE, *BACKENDS)


def check_name(backend: str) -> str:
    if backend not in names():
        raise ValueError(f"backend: unknown name {backend!r}; choose one of {', '.join(names())}")
    return backend


@dataclass(frozen=True, eq=False)
class _Choice:
    """A backend chosen by a ``with`` block (``is_block``) or by a bare call (a switch).

    A later switch in the same block replaces it; leaving the block ends it. ``key``: of the :class:`use_backend` that made
    it. Not that object itself, which knows the choices before its own.
    """

    backend: str
    key: object
    is_block: bool


_choices: Stack[_Choice] = Stack("backend")


def requested(backend: str | None) -> str:
    """The backend that a call asks for: its own argument, or what :func:`use_backend` chose here, or the default."""
    if backend is not None:
        return check_name(backend)
    choices = _choices.get()
    return choices[-1].backend if choices else _default


def set_default_backend(backend: str) -> None:
    """Choose the backend of the whole process: what every thread and asyncio task uses that has not chosen for itself.

    ``use_backend`` chooses for the calling thread or task alone, and wins; so does the argument ``backend=`` of a function.

    Raises:
        ValueError: the name is unknown.
    """
    global _default
    _default = check_name(backend)


class use_backend:  # noqa: N801 - used like a function
    """Choose the backend for the calling thread or asyncio task, as a switch or for the length of a ``with`` block.

    >>> use_backend("reference")            # from now on, or to the end of the block that this is in
    >>> with use_backend("portable"):       # here only
    ...     model(images)

    Other threads are not affected, nor those started later; :func:`set_default_backend` chooses for all of them. A task
    inherits what was chosen where it is started, as it does every context variable. A backward pass runs on the backend of
    its forward pass, wherever it is called.

    ``"auto"`` takes the fastest backend that can run each call. Any other name runs that backend or raises the sentence
    that says why it cannot.

    Raises:
        ValueError: the name is unknown.
    """

    def __init__(self, backend: str) -> None:
        self.backend, self._key = check_name(backend), object()
        choices = _choices.get()
        self._replaced = choices[-1:] if choices and not choices[-1].is_block else ()
        switch = _Choice(backend, self._key, is_block=False)
        _choices.set((*choices[: len(choices) - len(self._replaced)], switch), switch)

    def __enter__(self) -> use_backend:
        self._end(is_block=False)  # it was not a switch after all
        _choices.push(_Choice(self.backend, self._key, is_block=True))
        return self

    def __exit__(self, *exc: object) -> None:
        self._end(is_block=True) or self._end(is_block=False)

    def _end(self, *, is_block: bool) -> bool:
        """Takes the latest block out, with a switch inside, or the switch, for which the one before comes back."""
        choices = _choices.get()
        mine = [i for i, c in enumerate(choices) if c.key is self._key and c.is_block == is_block]
        if not mine:  # another context's, or a switch that another one replaced
            return False
        start, stop = mine[-1], mine[-1] + 1
        if is_block and stop < len(choices) and not choices[stop].is_block:
            stop += 1
        _choices.set((*choices[:start], *(() if is_block else self._replaced), *choices[stop:]))
        return True


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
