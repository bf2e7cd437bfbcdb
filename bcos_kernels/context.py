"""Choices that belong to the running thread or asyncio task: which backend, and which layers are being explained."""

from __future__ import annotations

import threading
import weakref
from contextvars import ContextVar
from typing import Any, Generic, TypeVar

import torch
from torch import _C

T = TypeVar("T")

#: torch.compile reads a context variable, and guards its value, since this version (pytorch/pytorch#186965).
_TRACEABLE = torch.__version__ >= "2.14"


class Stack(Generic[T]):
    """The entries that are in force in this thread or asyncio task, the latest last.

    They are an immutable tuple in a context variable. Whoever pushes an entry removes it by its identity, so that blocks may
    end in any order. An entry must be an object that allows weak references.

    Args:
        in_backward: threads of the autograd engine, where checkpoints compute layers again on a GPU, see the entries of the
            latest call of :meth:`get` in the thread that called backward. An asyncio task must therefore not await between
            the forward and the backward pass of a checkpoint.
    """

    def __init__(self, name: str, *, in_backward: bool = False) -> None:
        self._name = f"bcos_kernels.{name}"
        # None where there is nothing: a compiler would tell it from an empty tuple, and compile again
        self._variable: ContextVar[tuple[T, ...] | None] = ContextVar(self._name, default=None)
        self._in_backward = in_backward
        self._lock = threading.RLock()
        self._alive = 0
        #: whether any thread or task holds an entry; a plain attribute, for compilers that cannot read the variable
        self._anywhere = False

    def get(self) -> tuple[T, ...]:
        # Before 2.14 the compiler breaks the graph at the variable (and raises with fullgraph=True). It need not come to that
        # while nobody holds an entry, which the guard on `_anywhere` checks at every call.
        if not _TRACEABLE and not self._anywhere:
            return ()
        entries = self._variable.get()
        # the compiler is asked first: it would guard `_anywhere`, and compile again when another thread enters a block
        if self._in_backward and not torch.compiler.is_dynamo_compiling() and self._anywhere:
            if _C._current_graph_task_id() != -1:
                return entries or self._of_caller() or ()
            self._leave_for_backward(entries or ())  # another task of this thread may have left its own
        return entries or ()

    def push(self, entry: T) -> None:
        self.set((*self.get(), entry), entry)

    def remove(self, entry: T) -> None:
        self.set(tuple(e for e in self.get() if e is not entry))

    def set(self, entries: tuple[T, ...], new: T | None = None) -> None:
        """Replaces all entries; ``new`` is the one among them that was not there before."""
        if new is not None:
            # until no context holds it any more: a task that was started inside a block may outlive it
            self._count(1)
            weakref.finalize(new, self._count, -1).atexit = False
        self._variable.set(entries or None)
        if self._in_backward:
            self._leave_for_backward(entries)

    # Nothing public hands a context to the threads of the autograd engine. Torch's thread-local storage reaches them, also
    # where they call backward themselves (a checkpoint in a checkpoint), which torch's own copy of the context does not.
    # The asyncio tasks of one thread share that storage: what counts there is the latest forward pass in the thread.

    def _leave_for_backward(self, entries: tuple[T, ...]) -> None:
        if entries or not hasattr(_C, "_remove_obj_from_tls"):  # torch 2.11 has not
            _C._stash_obj_in_tls(self._name, entries)
        elif _C._is_key_in_tls(self._name):
            _C._remove_obj_from_tls(self._name)

    def _of_caller(self) -> Any:
        # only in a thread that Python has not started; in others the variable says what holds
        if not isinstance(threading.current_thread(), threading._DummyThread) or not _C._is_key_in_tls(self._name):
            return None
        return _C._get_obj_in_tls(self._name)

    def _count(self, change: int) -> None:
        with self._lock:
            self._alive += change
            self._anywhere = self._alive > 0
