"""Checkpoint files that are whole or not there at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO

from models.checkpoints import read_checkpoint

_TEMPORARY = ".tmp"


class AtomicCheckpointIO(CheckpointIO):
    """Writes to a temporary file beside the target, makes sure that it is on disk, and renames it into place.

    A process that is killed at any moment leaves the previous file, or the new one; at worst a `*.tmp` that nothing
    reads (`remove_temporary` clears it at the next start).
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Writes `checkpoint` to `path`."""

        def write(temporary: Path) -> None:
            torch.save(checkpoint, temporary)

        replace_atomically(Path(path), write)

    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Reads `path` onto the CPU; never executes anything from the file.

        Raises:
            models.errors.CheckpointError: missing or damaged.
        """
        return read_checkpoint(Path(path))

    def remove_checkpoint(self, path: str | Path) -> None:
        """Deletes the file, if it is there."""
        Path(path).unlink(missing_ok=True)


def replace_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Calls `write` with a temporary path in the same folder, syncs that to disk and renames it to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}{_TEMPORARY}")
    temporary.unlink(missing_ok=True)
    write(temporary)
    _sync(temporary)
    os.replace(temporary, path)
    _sync(path.parent)


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
