"""Finds and reads checkpoints. Files are read with `weights_only=True`: nothing in them is ever executed."""

from __future__ import annotations

import pickle
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.errors import CheckpointError

LAST = "last.ckpt"
CONFIG = "config.json"

_EPOCH_FILE = re.compile(r"epoch=(?P<epoch>\d+)-.*acc1=(?P<acc1>\d+(?:\.\d+)?)\.ckpt")
# torchvision's DenseNet files still call `norm1` by its name of 2017, `norm.1`.
_OLD_DENSENET_KEY = re.compile(r"(.*\bdenselayer\d+\.(?:norm|conv))\.([12]\.\w+)")
_PREFIX = "model."
_EMA_PREFIX = "ema.module."


@dataclass(frozen=True)
class EpochCheckpoint:
    """A checkpoint whose name says its epoch and its validation accuracy."""

    path: Path
    epoch: int
    acc1: float


def epoch_filename(epoch: int, acc1: float) -> str:
    """Such as `epoch=3-val_acc1=0.98125.ckpt`; five places tell single images of ImageNet's 50,000 apart."""
    return f"epoch={epoch}-val_acc1={acc1:.5f}.ckpt"


def epoch_checkpoints(directory: Path) -> list[EpochCheckpoint]:
    """The epoch checkpoints of an experiment, the best first; of equals, the later one."""
    found = []
    for path in directory.glob("epoch=*.ckpt"):
        match = _EPOCH_FILE.fullmatch(path.name)
        if match is not None:
            found.append(EpochCheckpoint(path, int(match["epoch"]), float(match["acc1"])))
    return sorted(found, key=lambda checkpoint: (checkpoint.acc1, checkpoint.epoch), reverse=True)


def checkpoint_path(directory: Path, reload: str) -> Path:
    """The file that `--reload` names.

    Args:
        directory: of the experiment. Where it has no `last.ckpt` but exactly one folder in it has, that one is taken:
            the published checkpoints are laid out like this.
        reload: "last", "best" or "epoch_N".

    Raises:
        models.errors.CheckpointError: no such file, or `reload` is none of these.
    """
    if reload == "last":
        candidates = [directory / LAST, *sorted(directory.glob(f"*/{LAST}"))]
        existing = [path for path in candidates if path.is_file()]
        if not existing:
            raise CheckpointError(f"There is no checkpoint {directory / LAST}.")
        if existing[0].parent != directory and len(existing) > 1:
            raise CheckpointError(f"{directory} has several {LAST}; choose one with --weights: {_names(existing)}.")
        return existing[0]
    found = epoch_checkpoints(directory)
    kept = f"kept are {_names([checkpoint.path for checkpoint in found])}" if found else "there are none"
    if reload == "best":
        if not found:
            raise CheckpointError(f"There is no epoch=N-val_acc1=X.ckpt in {directory} to take the best of.")
        return found[0].path
    match = re.fullmatch(r"epoch_(\d+)", reload)
    if match is None:
        raise CheckpointError(f"--reload must be 'last', 'best' or 'epoch_N' with a number N, got '{reload}'.")
    for checkpoint in found:
        if checkpoint.epoch == int(match[1]):
            return checkpoint.path
    raise CheckpointError(f"There is no checkpoint of epoch {match[1]} in {directory}: {kept}.")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a checkpoint file, tensors on the CPU.

    Raises:
        models.errors.CheckpointError: missing, truncated, or holding more than tensors and plain values.
    """
    if not path.is_file():
        raise CheckpointError(f"There is no checkpoint {path}.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch reports damage as RuntimeError, EOFError, UnpicklingError, OSError, ...
        reason = str(error).split("\n")[0]
        # A damaged file is no zip archive, or fails before anything is unpickled.
        if isinstance(error, pickle.UnpicklingError) and zipfile.is_zipfile(path):
            raise CheckpointError(
                f"{path} holds Python objects besides tensors, which are not loaded because they could run code. "
                f"Where you trust the file, load it with torch.load(..., weights_only=False) and save its "
                f"'state_dict' alone. ({error})"
            ) from error
        raise CheckpointError(
            f"{path} cannot be read as a checkpoint; it is damaged or cut short. ({reason})"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a checkpoint: it holds a {type(content).__name__}, not a dictionary.")
    return content


def read_state_dict(path: Path, *, ema: bool = False) -> dict[str, Tensor]:
    """The network's state dict out of a Lightning checkpoint, a `model_state_dict`, or a file that is a state dict
    itself.

    Args:
        ema: the moving average of the weights, where the file has one.

    Raises:
        models.errors.CheckpointError: unreadable file, no network in it, or no moving average.
    """
    content = read_checkpoint(path)
    if "model_state_dict" in content:
        state = content["model_state_dict"]
    elif "state_dict" in content:
        prefix = _EMA_PREFIX if ema else _PREFIX
        state = {
            key.removeprefix(prefix): value for key, value in content["state_dict"].items() if key.startswith(prefix)
        }
        if not state:
            what = "moving average of the weights" if ema else "network"
            raise CheckpointError(f"{path} holds no {what}: no key of its 'state_dict' starts with '{prefix}'.")
        return state
    else:
        state = content
    if ema:
        raise CheckpointError(f"{path} holds no moving average of the weights (--ema): it is a plain state dict.")
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(
            f"{path} holds no network: neither 'state_dict' nor 'model_state_dict', nor tensors alone."
        )
    return {_OLD_DENSENET_KEY.sub(r"\1\2", key): value for key, value in state.items()}


def load_weights(model: nn.Module, path: Path, *, ema: bool = False) -> None:
    """Puts a checkpoint's weights into the network, all of them or none.

    Raises:
        models.errors.CheckpointError: unreadable, or keys or shapes that do not fit; the message names the first ones.
    """
    state = read_state_dict(path, ema=ema)
    own = model.state_dict()
    # Counted by torch since 1.0 and used by none of these networks; older files of torchvision lack it.
    state = {key: value for key, value in own.items() if key.endswith("num_batches_tracked")} | state
    problems = []
    for label, keys in (("missing", own.keys() - state.keys()), ("unexpected", state.keys() - own.keys())):
        if keys:
            problems.append(f"{len(keys)} {label} ({_first(keys)})")
    for key in own.keys() & state.keys():
        if own[key].shape != state[key].shape:
            problems.append(
                f"'{key}' is {tuple(state[key].shape)} in the file and {tuple(own[key].shape)} in the network"
            )
    if problems:
        raise CheckpointError(f"{path} does not fit the network {type(model).__name__}: {'; '.join(problems[:5])}.")
    model.load_state_dict(state)


def _first(keys: set[str], count: int = 3) -> str:
    shown = ", ".join(f"'{key}'" for key in sorted(keys)[:count])
    return f"{shown}, ..." if len(keys) > count else shown


def _names(paths: list[Path]) -> str:
    return ", ".join(str(path) for path in paths)
