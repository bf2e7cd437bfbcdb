"""Reads files of weights that nobody vouches for. Nothing in them is ever executed.

Four formats, told apart by their first bytes and not by their names: what `torch.save` writes today (a zip archive) and wrote
before 2020 (pickles one behind the other), safetensors, and TorchScript archives.
"""

from __future__ import annotations

import pathlib
import re
import zipfile
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.errors import CheckpointError
from models.torchscript import ForbiddenGlobal, is_torchscript, read_torchscript

# Weights hardly compress; what `torch.save` writes is not compressed at all.
_MAX_EXPANSION = 4
_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")
_ZIP, _PICKLE = b"PK\x03\x04", b"\x80\x02"


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a file of weights, tensors on the CPU; of safetensors and TorchScript files, tensors by name.

    What Lightning stores besides tensors comes as plain values: paths as pure paths, numpy's scalars as Python's,
    attribute dictionaries as ordered ones, OmegaConf containers as empty stand-ins.

    Raises:
        models.errors.CheckpointError: no such file, a file of another kind, damaged or cut short, one that unpacks to
            several times its size, or one that asks for Python objects besides these; the message says which.
    """
    start = _start_of(path)
    if start.startswith(_ZIP):
        return _read_zip(path)
    if start.startswith(_PICKLE):
        return _read_pickles(path)
    _refuse_text(path, start)
    if path.suffix == ".safetensors" or start[8:9] == b"{":
        return _read_safetensors(path)
    raise CheckpointError(
        f"{path} is no checkpoint: it begins with the bytes {start[:8].hex(' ')}, as neither torch nor safetensors do."
    )


def check_finite(state: Mapping[str, Any], path: Path) -> None:
    """Refuses weights that are NaN or infinite.

    Raises:
        models.errors.CheckpointError: the message names the first ones.
    """
    bad = []
    for key, value in state.items():
        if isinstance(value, Tensor) and (count := int((~torch.isfinite(value)).sum())):
            bad.append(f"'{key}': {count:,} of {value.numel():,} values")
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise CheckpointError(f"{path} holds weights that are NaN or infinite: {'; '.join(bad[:3])}{more}.")


def check_tensors(state: Mapping[str, Any], path: Path) -> None:
    """Refuses what is no plain tensor with all its values: sparse, quantised or empty ones (of the "meta" device), and
    those that claim more values than the file holds, by repeating a few over and over.

    Raises:
        models.errors.CheckpointError: the message names the first one.
    """
    for key, value in state.items():
        if not isinstance(value, Tensor):
            continue
        if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
            raise CheckpointError(
                f"{path}: '{key}' is no plain tensor ({value.dtype}, {value.layout}, {value.device})."
            )
        claimed, held = value.numel() * value.element_size(), value.untyped_storage().nbytes()
        if claimed > held:
            raise CheckpointError(
                f"{path}: '{key}' is {tuple(value.shape)}, {claimed:,} bytes, of which the file holds {held:,}."
            )


def _start_of(path: Path) -> bytes:
    if path.is_dir():
        inside = ", ".join(sorted(file.name for file in path.iterdir() if file.is_file())[:5])
        raise CheckpointError(f"{path} is a folder; name a file in it ({inside or 'it holds none'}).")
    if not path.is_file():
        raise CheckpointError(f"There is no checkpoint {path}.")
    try:
        with path.open("rb") as file:
            start = file.read(256)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be opened: {error.strerror}.") from error
    if not start:
        raise CheckpointError(f"{path} is empty: 0 bytes.")
    return start


def _refuse_text(path: Path, start: bytes) -> None:
    text = start.decode("utf-8", errors="ignore")
    if len(text.encode()) < len(start) - 3 or not all(c.isprintable() or c.isspace() for c in text):
        return
    if text.startswith("version https://git-lfs"):
        raise CheckpointError(f"{path} is a Git LFS pointer, not the file that it stands for: run git lfs pull.")
    what = "a web page" if text.lstrip().startswith("<") else "text"
    raise CheckpointError(
        f"{path} is {what}, not a checkpoint ({' '.join(text.split())[:60]!r}): its download went wrong?"
    )


def _read_zip(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
            script = is_torchscript(archive)
    except (zipfile.BadZipFile, ValueError, NotImplementedError, UnicodeError) as error:
        raise _damaged(path, error) from error
    if unpacked > _MAX_EXPANSION * size:
        raise CheckpointError(
            f"{path} has {size:,} bytes and would unpack to {unpacked:,}. Checkpoints are not compressed: it is refused "
            "before it fills the memory."
        )
    try:
        return dict(read_torchscript(path)) if script else _read_pickles(path)
    except ForbiddenGlobal as error:
        raise _asks_for(path, [str(error)]) from error


def _read_pickles(path: Path) -> dict[str, Any]:
    with torch.serialization.safe_globals(_ALLOWED):
        try:
            with path.open("rb") as file:  # torch would judge a path by its name
                content = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch reports damage as RuntimeError, EOFError, UnpicklingError, KeyError, ...
            if wanted := _refused_globals(path) or _GLOBAL.findall(str(error)):
                raise _asks_for(path, wanted) from error
            raise _damaged(path, error) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a checkpoint: it holds a {type(content).__name__}, not a dictionary.")
    return content


def _refused_globals(path: Path) -> list[str]:
    """What a zip archive wants to import beyond torch's list and ours; empty where that cannot be found out."""
    try:
        with path.open("rb") as file:
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file))  # type: ignore[arg-type]
    except Exception:  # damaged, or of the format before 2020, of which torch names the first in its error
        return []


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise CheckpointError(f"{path} needs safetensors: pip install 'bcos_kernels[train]'.") from error
    try:
        return dict(load_file(path))
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> CheckpointError:
    reason = str(error).rpartition("WeightsUnpickler error: ")[2].split("\n")[0] or type(error).__name__
    return CheckpointError(
        f"{path} ({path.stat().st_size:,} bytes) cannot be read as a checkpoint; it is damaged or cut short. ({reason})"
    )


def _asks_for(path: Path, wanted: Iterable[str]) -> CheckpointError:
    return CheckpointError(
        f"{path} asks for Python objects besides tensors, which are not loaded because they could run code: "
        f"{', '.join(wanted)}. Where you trust the file, load it with torch.load(..., weights_only=False) and save "
        "{'state_dict': content['state_dict']}."
    )


class _Unread:
    """Takes the place of an object whose content is of no interest, and keeps nothing of it."""

    def __init__(self, *arguments: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


class _NumpyType:
    """Takes the place of `numpy.dtype` in a pickle."""

    def __init__(self, code: str, *flags: object) -> None:
        self.code = code

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1]


def _numpy_scalar(kind: _NumpyType, data: bytes) -> object:
    return np.frombuffer(data, np.dtype(kind.code).newbyteorder(kind.order))[0].item()


def _default_dict(factory: object = None) -> OrderedDict[Any, Any]:
    return OrderedDict()


# Name in the file, and what is taken instead. Lightning 1.9 stores the folder of `ModelCheckpoint` as a path; the rest
# is what training scripts hand to `save_hyperparameters`.
_ALLOWED: list[Any] = [
    *((pathlib.PurePosixPath, f"{module}.PosixPath") for module in ("pathlib", "pathlib._local")),
    *((pathlib.PureWindowsPath, f"{module}.WindowsPath") for module in ("pathlib", "pathlib._local")),
    (Namespace, "argparse.Namespace"),
    *(
        (OrderedDict, f"{module}.AttributeDict")
        for module in (
            "pytorch_lightning.utilities.parsing",
            "lightning.pytorch.utilities.parsing",
            "lightning_fabric.utilities.data",
            "lightning.fabric.utilities.data",
        )
    ),
    *((_numpy_scalar, f"{module}.scalar") for module in ("numpy.core.multiarray", "numpy._core.multiarray")),
    (_NumpyType, "numpy.dtype"),
    *(
        (_Unread, f"omegaconf.{name}")
        for name in (
            *("dictconfig.DictConfig", "listconfig.ListConfig", "base.ContainerMetadata", "base.Metadata"),
            *("nodes.AnyNode", "nodes.BooleanNode", "nodes.FloatNode", "nodes.IntegerNode", "nodes.StringNode"),
        )
    ),
    *((_Unread, name) for name in ("typing.Any", "builtins.dict", "builtins.int", "builtins.list")),
    (_default_dict, "collections.defaultdict"),
]
