"""Files that are whole or not there at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from models.errors import UserError

_TEMPORARY = ".tmp"


def replace_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Calls `write` with a temporary path in the same folder, syncs that to disk and renames it to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}{_TEMPORARY}")
    temporary.unlink(missing_ok=True)
    write(temporary)
    _sync(temporary)
    os.replace(temporary, path)
    _sync(path.parent)


@contextmanager
def writing(option: str, path: Path) -> Iterator[None]:
    """Around the writing of what an option names.

    Raises:
        models.errors.UserError: the system refuses it: no permission, no space, a file where a folder should be.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch.save reports what the system says as RuntimeError
        reason = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
        raise UserError(f"{option}: {path} cannot be written ({reason}); choose another place.") from error


def link_atomically(source: Path, path: Path) -> None:
    """Gives `source` the second name `path`; copies it where the file system has no hard links."""

    def write(temporary: Path) -> None:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)

    replace_atomically(path, write)


def remove_temporary(directory: Path) -> None:
    """Deletes what a killed process left half-written in this folder."""
    for path in directory.glob(f".*{_TEMPORARY}"):
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
