"""Optional loggers; each is imported only when it is asked for."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger

from models.errors import UserError


def csv_logger(directory: Path) -> Logger:
    """Every logged value by step, in `csv_logs/version_N/metrics.csv`."""
    return CSVLogger(directory, name="csv_logs")


def tensorboard_logger(directory: Path) -> Logger:
    """Event files in `tensorboard_logs/version_N`.

    Raises:
        models.errors.UserError: the package is not installed.
    """
    _require("--tensorboard_logger", "tensorboard")
    return TensorBoardLogger(directory, name="tensorboard_logs")


def wandb_logger(directory: Path, name: str, project: str | None, run_id: str | None) -> Logger:
    """Weights & Biases.

    Args:
        name: shown for the run.
        project: default: the environment variable WANDB_PROJECT.
        run_id: default: the environment variable WANDB_ID; without either, W&B makes one.

    Raises:
        models.errors.UserError: the package is not installed, or no project is named.
    """
    _require("--wandb_logger", "wandb")
    project = project or os.environ.get("WANDB_PROJECT")
    if not project:
        raise UserError("--wandb_logger needs a project: give --wandb_project or set WANDB_PROJECT.")
    return WandbLogger(
        name=name,
        project=project,
        id=run_id or os.environ.get("WANDB_ID"),
        save_dir=directory,
        resume="allow",
    )


def _require(option: str, package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{option} needs the package '{package}', which is not installed: pip install {package}")
