"""Recipes out of text: single fields from the command line, and whole experiments from `config.json`."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, Union

from models.atomic import replace_atomically
from models.checkpoints import CONFIG
from models.errors import CheckpointError, UserError, suggestion
from models.recipes import Experiment

#: What finds an experiment, or follows from that, and so cannot be changed about it; and the option that does.
_FIXED = {
    "dataset": "dataset",
    "base_network": "base_network",
    "name": "experiment_name",
    "data.dataset": "dataset",
    "model.converted": "base_network",
    "data.six_channels": "base_network",
}


def fields() -> dict[str, object]:
    """Type of every field of an experiment that can be changed, by its path, such as `optimiser.lr`."""
    return {path: hint for path, hint in _fields(Experiment).items() if path not in _FIXED}


def override(experiment: Experiment, assignments: Iterable[str]) -> Experiment:
    """The experiment with some fields changed.

    Args:
        assignments: such as `optimiser.lr=3e-4`, `optimiser.agc=none`, `model.keep=biases,head_order`.

    Raises:
        models.errors.UserError: no such field, a value of another type or out of range, or one that contradicts another.
    """
    known = fields()
    changes: dict[str, Any] = {}
    for assignment in assignments:
        path, separator, text = assignment.partition("=")
        path = path.strip()
        if not separator:
            raise UserError(f"--set {assignment}: must be FIELD=VALUE, such as optimiser.lr=3e-4.")
        if path in _FIXED:
            raise UserError(f"--set {path}: it belongs to what finds the experiment; use --{_FIXED[path]}.")
        if path not in known:
            raise UserError(
                f"--set {path}: a recipe has no such field.{suggestion(path, known)} Known: {', '.join(known)}."
            )
        changes[path] = _from_text(path, text.strip(), known[path])
    try:
        return _changed(experiment, changes)
    except ValueError as error:
        raise UserError(f"--set {' '.join(changes)}: {error}.") from error


def record(experiment: Experiment, directory: Path) -> None:
    """Writes `config.json` into this folder, which is made where it does not exist."""
    text = json.dumps(experiment.to_dict(), indent=2) + "\n"

    def write(temporary: Path) -> None:
        temporary.write_text(text)

    replace_atomically(directory / CONFIG, write)


def recorded_experiment(directory: Path) -> Experiment | None:
    """What `config.json` in this folder says was trained there; None where there is no such file.

    A field that the recipes did not have yet when it was written has its default.

    Raises:
        models.errors.CheckpointError: the file is none that train.py writes.
    """
    path = directory / CONFIG
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    try:
        return typing.cast(Experiment, _from_json(content, Experiment, ""))
    except ValueError as error:
        raise CheckpointError(f"{path} is no record of an experiment: {error}.") from error


def _fields(kind: type, prefix: str = "") -> dict[str, object]:
    found: dict[str, object] = {}
    for name, hint in typing.get_type_hints(kind).items():
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            found |= _fields(hint, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = hint
    return found


def _changed(recipe: Any, changes: dict[str, Any]) -> Any:
    """`dataclasses.replace` with paths; all at once, because single changes may contradict each other."""
    own = {path: value for path, value in changes.items() if "." not in path}
    for part in {path.partition(".")[0] for path in changes if "." in path}:
        inner = {path.partition(".")[2]: value for path, value in changes.items() if path.startswith(f"{part}.")}
        own[part] = _changed(getattr(recipe, part), inner)
    return dataclasses.replace(recipe, **own)


def _from_text(path: str, text: str, hint: object) -> Any:
    try:
        value: Any = json.loads(text)
    except ValueError:
        value = None if text.lower() == "none" else text
        if typing.get_origin(hint) is tuple:
            value = [part.strip() for part in text.split(",") if part.strip()]
        elif text.lower() in ("true", "false"):
            value = text.lower() == "true"
    try:
        return _typed(value, hint)
    except ValueError:
        pass
    try:
        return _typed(text, hint)  # a name that looks like a number
    except ValueError:
        raise UserError(f"--set {path}={text}: must be {_describe(hint)}.") from None


def _from_json(value: Any, hint: Any, path: str) -> Any:
    if not (isinstance(hint, type) and dataclasses.is_dataclass(hint)):
        try:
            return _typed(value, hint)
        except ValueError:
            raise ValueError(f"{path} must be {_describe(hint)}, got {value!r}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path or 'it'} must be an object, got {value!r}")
    hints = typing.get_type_hints(hint)
    prefix = f"{path}." if path else ""
    strange = [name for name in value if name not in hints]
    if strange:
        raise ValueError(f"{prefix}{strange[0]} is no field of a recipe")
    given = {name: _from_json(value[name], hints[name], f"{prefix}{name}") for name in value}
    missing = [f.name for f in dataclasses.fields(hint) if f.name not in given and f.default is dataclasses.MISSING]
    if missing:
        raise ValueError(f"{prefix}{missing[0]} is missing")
    return hint(**given)


def _typed(value: Any, hint: Any) -> Any:
    """The value as a field of this type holds it.

    Raises:
        ValueError: it is of another type.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        for kind in arguments:
            try:
                return _typed(value, kind)
            except ValueError:
                continue
    elif origin is Literal:
        if value in arguments:
            return value
    elif origin is tuple:
        if isinstance(value, (list, tuple)):
            return tuple(_typed(part, arguments[0]) for part in value)
    elif hint is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    elif type(value) is hint:  # a bool is no int here
        return value
    raise ValueError(value)


def _describe(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(kind) for kind in arguments)
    if origin is Literal:
        return " or ".join(repr(value) for value in arguments)
    if origin is tuple:
        return f"a list, divided by commas, of {_describe(arguments[0])}"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a name", types.NoneType: "none"}
    return names[hint]
