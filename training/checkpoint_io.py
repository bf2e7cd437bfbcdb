"""How Lightning writes and reads checkpoints here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO

from models.atomic import replace_atomically
from models.checkpoints import read_run


class AtomicCheckpointIO(CheckpointIO):
    """Writes to a temporary file beside the target, makes sure that it is on disk, and renames it into place.

    A process that is killed at any moment leaves the previous file, or the new one; at worst a `*.tmp` that nothing
    reads (`models.atomic.remove_temporary` clears it at the next start).
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
            models.errors.CheckpointError: missing, damaged, or with weights that are NaN or infinite.
        """
        return read_run(Path(path))

    def remove_checkpoint(self, path: str | Path) -> None:
        """Deletes the file, if it is there."""
        Path(path).unlink(missing_ok=True)
