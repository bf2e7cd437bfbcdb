"""The tensors of a TorchScript archive, such as OpenAI's CLIP, without its code.

`torch.jit.load` compiles the archive's code and runs its `__setstate__` methods in this process, so it is not used: a
TorchScript file is a program. The tensors lie beside it: `data.pkl` says which module has which, and pickle reads it here
with nothing that it may call but the functions below.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from models.errors import CheckpointError

_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class ForbiddenGlobal(pickle.UnpicklingError):
    """The archive asks for more than TorchScript's own modules; the message is the name of that."""


def is_torchscript(archive: zipfile.ZipFile) -> bool:
    """Whether the zip archive is one of TorchScript: it has constants beside its data."""
    return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Parameters, buffers and other tensor attributes, by the names that they have in a state dict.

    Raises:
        models.errors.CheckpointError: damaged.
        ForbiddenGlobal: the archive asks for more than TorchScript's own modules.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            [root] = {name.split("/")[0] for name in archive.namelist() if name.endswith("/constants.pkl")}
            data = archive.read(f"{root}/data.pkl")
            _check_memo(data)
            module = _Unpickler(io.BytesIO(data), archive, root).load()
            return _tensors(module)
    except ForbiddenGlobal:
        raise
    except Exception as error:  # pickle and zipfile report damage as almost anything
        raise CheckpointError(f"{path} is a damaged TorchScript archive. ({error})") from error


def _check_memo(data: bytes) -> None:
    """Refuses a pickle that numbers its objects higher than it can have any: memory is taken for all numbers below."""
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in ("PUT", "LONG_BINPUT") and int(str(argument)) > len(data):
            raise ValueError(f"it has {len(data):,} bytes and an object number {int(str(argument)):,}")


class _Module:
    """A module, an object or a class of the archive: its attributes, and nothing that it could do."""

    def __init__(self) -> None:
        self.attributes: dict[str, Any] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.attributes = state


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: IO[bytes], archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(file)
        self._archive = archive
        self._root = root
        self._storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__"):
            return _Module
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        found = _FUNCTIONS.get(f"{module}.{name}")
        if found is None:
            raise ForbiddenGlobal(f"{module}.{name}")
        return found

    def persistent_load(self, pid: Any) -> Tensor:
        _, dtype, key, _, _ = pid
        if key not in self._storages:
            data = bytearray(self._archive.read(f"{self._root}/data/{key}"))
            self._storages[key] = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return self._storages[key]


def _rebuild(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *rest: object) -> Tensor:
    return torch.as_strided(storage, size, stride, offset)


def _same(value: Any, *rest: object) -> Any:
    return value


_FUNCTIONS: dict[str, Any] = {
    "torch._utils._rebuild_tensor_v2": _rebuild,
    "collections.OrderedDict": OrderedDict,
    "torch.device": _same,
    **{
        f"torch.jit._pickle.{name}": _same
        for name in ("build_intlist", "build_doublelist", "build_boollist", "build_tensorlist", "restore_type_tag")
    },
}


def _tensors(module: Any) -> dict[str, Tensor]:
    """Each module is entered once, so that one that holds itself cannot keep the walk going."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    to_visit: list[tuple[str, Any]] = [("", module)]
    while to_visit:
        prefix, current = to_visit.pop()
        if not isinstance(current, _Module) or id(current) in seen:
            continue
        seen.add(id(current))
        for name, value in current.attributes.items():
            if isinstance(value, Tensor):
                found[f"{prefix}{name}"] = value
            else:
                to_visit.append((f"{prefix}{name}.", value))
    return found
