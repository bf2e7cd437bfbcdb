"""Finds the checkpoint of an experiment, and puts the weights of a file into a network."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from models.checkpoint_files import check_finite, check_tensors, read_checkpoint
from models.errors import CheckpointError
from models.recipes import Experiment

LAST = "last.ckpt"
CONFIG = "config.json"

# Inside the `state_dict` of a Lightning checkpoint, ours and the public code's.
PREFIX, EMA_PREFIX = "model.", "ema.module."
ACCURACY, LOSS, EMA = "val_acc1", "val_loss", "_ema"

_EPOCH_FILE = re.compile(r"epoch=(?P<epoch>\d+)-(?P<scores>.+?)(?:-v\d+)?\.ckpt")
_SCORE = re.compile(r"(?P<name>val_\w+?)=(?P<value>\d+(?:\.\d+)?|nan|inf)(?:-|$)")
# torchvision's DenseNet files still call `norm1` by its name of 2017, `norm.1`.
_OLD_DENSENET_KEY = re.compile(r"(.*\bdenselayer\d+\.(?:norm|conv))\.([12]\.\w+)")
_BCOS_LAYER = re.compile(r"\d\.linear\.weight$")


@dataclass(frozen=True)
class EpochCheckpoint:
    """A checkpoint whose name says its epoch and what validation gave: `val_acc1`, or `val_loss` where there are no
    classes, and the same with `_ema` behind it for the moving average of the weights."""

    path: Path
    epoch: int
    scores: Mapping[str, float] = field(hash=False)

    def validated(self, ema: bool = False) -> bool:
        """Whether the name says how good the weights, or their moving average, are."""
        suffix = EMA if ema else ""
        return not self.scores.keys().isdisjoint((ACCURACY + suffix, LOSS + suffix))

    def rank(self, ema: bool = False) -> float:
        """The higher, the better; NaN is below everything."""
        suffix = EMA if ema else ""
        rank = self.scores[ACCURACY + suffix] if ACCURACY + suffix in self.scores else -self.scores[LOSS + suffix]
        return -math.inf if math.isnan(rank) else rank


def epoch_filename(epoch: int, scores: Mapping[str, float]) -> str:
    """Such as `epoch=3-val_acc1=0.98125.ckpt`; five places tell single images of ImageNet's 50,000 apart."""
    return f"epoch={epoch}{''.join(f'-{name}={value:.5f}' for name, value in scores.items())}.ckpt"


def epoch_checkpoints(directory: Path, *, ema: bool = False) -> list[EpochCheckpoint]:
    """The epoch checkpoints of an experiment, the best first; of equals, the later one.

    Args:
        ema: those whose name says how good the moving average is, ordered by that.
    """
    found = []
    for path in directory.glob("epoch=*.ckpt"):
        match = _EPOCH_FILE.fullmatch(path.name)
        if match is not None:
            scores = {score["name"]: float(score["value"]) for score in _SCORE.finditer(match["scores"])}
            found.append(EpochCheckpoint(path, int(match["epoch"]), scores))
    validated = [checkpoint for checkpoint in found if checkpoint.validated(ema)]
    return sorted(validated, key=lambda checkpoint: (checkpoint.rank(ema), checkpoint.epoch), reverse=True)


def experiment_directory(experiment: Experiment, typed_name: str, base_directory: str | Path) -> Path:
    """The experiment's folder; where only one of the name as it was typed exists, that one.

    Published checkpoints lie in a folder that is called as the public code writes the name, such as `resnet18`.
    """
    directory = experiment.directory(base_directory)
    typed = directory.with_name(typed_name)
    return typed if typed.is_dir() and not directory.is_dir() else directory


def chosen_checkpoint(
    experiment: Experiment,
    typed_name: str,
    base_directory: str | Path,
    *,
    reload: str = "last",
    weights: str | Path | None = None,
    ema: bool = False,
) -> tuple[Path, bool]:
    """The file that `--weights`, or else `--reload`, names, and whether its moving average is meant.

    Raises:
        models.errors.CheckpointError: as `find_checkpoint`.
    """
    if weights is not None:
        return Path(weights), ema
    return find_checkpoint(experiment_directory(experiment, typed_name, base_directory), reload, ema=ema)


def find_checkpoint(directory: Path, reload: str, *, ema: bool = False) -> tuple[Path, bool]:
    """The file that `--reload` names, and whether its moving average is meant.

    Args:
        directory: of the experiment. Where it has no `last.ckpt` but exactly one folder in it has, that one is taken:
            the published checkpoints are laid out like this.
        reload: "last"; "best": with the best validation; "best_any": likewise, of the weights or of their moving
            average, whichever is better; or "epoch_N".
        ema: the moving average is asked for; decides what "best" compares, and nothing for "best_any".

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
        return existing[0], ema
    plain, averaged = epoch_checkpoints(directory), epoch_checkpoints(directory, ema=True)
    if reload == "best_any":
        # Of equals the weights themselves, as in the public code.
        ema = bool(averaged) and (not plain or averaged[0].rank(ema=True) > plain[0].rank())
    if reload in ("best", "best_any"):
        found = averaged if ema else plain
        if not found:
            name = f"epoch=N-{ACCURACY}{EMA if ema else ''}=X.ckpt"
            raise CheckpointError(f"There is no {name} in {directory} to take the best of.")
        return found[0].path, ema
    match = re.fullmatch(r"epoch_(\d+)", reload)
    if match is None:
        raise CheckpointError(
            f"--reload must be 'last', 'best', 'best_any' or 'epoch_N' with a number N, got '{reload}'."
        )
    kept = {checkpoint.path: checkpoint for checkpoint in plain + averaged}
    for checkpoint in kept.values():
        if checkpoint.epoch == int(match[1]):
            return checkpoint.path, ema
    there = f"kept are {_names(kept)}" if kept else "there are none"
    raise CheckpointError(f"There is no checkpoint of epoch {match[1]} in {directory}: {there}.")


def read_run(path: Path) -> dict[str, Any]:
    """A checkpoint to go on from: the whole content, and the weights in it are finite.

    Raises:
        models.errors.CheckpointError: unreadable, or weights that are NaN or infinite.
    """
    content = read_checkpoint(path)
    state = content.get("state_dict")
    if isinstance(state, dict):
        check_tensors(state, path)
        check_finite(state, path)
    return content


def read_state_dict(path: Path, *, ema: bool = False) -> dict[str, Tensor]:
    """The network's state dict out of any file that `models.checkpoint_files` reads.

    That is: of a Lightning checkpoint what is the network's; a dictionary's "model_state_dict", "state_dict" or "model";
    of OpenAI's CLIP the image encoder; or a file that is a state dict itself.

    Args:
        ema: the moving average of the weights, where the file has one.

    Raises:
        models.errors.CheckpointError: unreadable file, no network in it, or no moving average.
    """
    content = read_checkpoint(path)
    state = _state_dict(content)
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(
            f"{path} holds no network: neither 'state_dict', 'model_state_dict' or 'model', nor tensors alone."
        )
    if "state_dict" in content:
        state = _of_lightning(state, path, ema)
    elif ema:
        raise CheckpointError(f"{path} holds no moving average of the weights (--ema): it is a plain state dict.")
    for prefix in ("module.", "visual."):  # a network in DataParallel; the image encoder of CLIP
        state = _under(state, prefix) or state
    check_tensors(state, path)
    return {_OLD_DENSENET_KEY.sub(r"\1\2", key): value for key, value in state.items()}


def has_average(content: Mapping[str, Any]) -> bool:
    """Whether this checkpoint holds a moving average beside the weights."""
    state = content.get("state_dict")
    return isinstance(state, dict) and any(str(key).startswith(EMA_PREFIX) for key in state)


def load_weights(model: nn.Module, path: Path, *, ema: bool = False) -> None:
    """Puts a checkpoint's weights into the network, all of them or none, in the network's own dtypes.

    Raises:
        models.errors.CheckpointError: unreadable, keys or shapes that do not fit, or weights that are NaN or infinite;
            the message names the first ones.
    """
    state = read_state_dict(path, ema=ema)
    own = model.state_dict()
    # Counted by torch since 1.0 and used by none of these networks; older files of torchvision lack it.
    state = {key: value for key, value in own.items() if key.endswith("num_batches_tracked")} | state
    problems = []
    for label, keys in (("missing", own.keys() - state.keys()), ("unexpected", state.keys() - own.keys())):
        if keys:
            problems.append(f"{len(keys)} {label} ({_first(keys)})")
    for key in own:
        if key in state and _kind(own[key]) != _kind(state[key]):
            problems.append(f"'{key}' is {_kind(state[key])} in the file and {_kind(own[key])} in the network")
    if problems:
        more = f"; and {len(problems) - 5} more like it" if len(problems) > 5 else ""
        hint = _hint(own, state.keys() - own.keys())
        raise CheckpointError(
            f"{path} does not fit the network {type(model).__name__}: {'; '.join(problems[:5])}{more}.{hint}"
        )
    check_finite(state, path)
    model.load_state_dict(state)


def _state_dict(content: dict[str, Any]) -> dict[str, Any]:
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(content.get(key), dict):
            return content[key]
    return content


def _of_lightning(state: dict[str, Tensor], path: Path, ema: bool) -> dict[str, Tensor]:
    """The network's part, or the moving average's; all of it where a plain state dict lies under "state_dict"."""
    found = _under(state, EMA_PREFIX if ema else PREFIX)
    if not found and ema:
        raise CheckpointError(
            f"{path} holds no moving average of the weights: no key of its 'state_dict' starts with '{EMA_PREFIX}'."
        )
    return found or state


def _under(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _kind(tensor: Tensor) -> str:
    """What has to agree: the shape, and that weights are no integers; precision is converted."""
    return f"{tuple(tensor.shape)}{'' if tensor.is_floating_point() else ' of integers'}"


def _hint(own: Iterable[str], unexpected: set[str]) -> str:
    """What the file probably is, where its keys tell."""
    wanted, converted = (any(_BCOS_LAYER.search(key) for key in keys) for keys in (own, unexpected))
    if wanted and unexpected and not converted:
        return " The file seems to be a conventional network's: --init_weights starts from one."
    if wanted and converted and not any(key.startswith(PREFIX) for key in unexpected):
        return (
            " The file seems to be a B-cos network of B-cos v2, whose weights and input are normalised in another way: "
            "build it with the package bcos, load the file with models.checkpoints.load_weights, and accelerate it."
        )
    if converted and not wanted:
        return " The file seems to be a B-cosified network's, this one is conventional."
    return ""


def _first(keys: set[str], count: int = 3) -> str:
    shown = ", ".join(f"'{key}'" for key in sorted(keys)[:count])
    return f"{shown}, ..." if len(keys) > count else shown


def _names(paths: Iterable[Path]) -> str:
    return ", ".join(str(path) for path in paths)
