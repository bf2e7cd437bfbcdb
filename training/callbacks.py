"""What happens after an epoch: `metrics.csv`, checkpoints, pictures of explanations."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from torch import Tensor, nn
from torchvision.utils import make_grid, save_image

import bcos_kernels as bk
from models.atomic import link_atomically, replace_atomically
from models.checkpoints import ACCURACY, EMA, LAST, LOSS, epoch_checkpoints, epoch_filename

METRICS = "metrics.csv"
COLUMNS = ["epoch", "train_loss", "train_acc1", "val_loss", "val_acc1"]


class MetricsFile(Callback):
    """Keeps `metrics.csv`: a header and one row for every finished epoch; rows that a resumed run repeats are replaced.

    Args:
        directory: where the file lies.
        extra: columns besides `COLUMNS`, names of logged metrics.
    """

    def __init__(self, directory: Path, extra: list[str] | None = None) -> None:
        self.path = directory / METRICS
        self.columns = COLUMNS + (extra or [])

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Adds the epoch's row."""
        if not trainer.is_global_zero or _is_dev_run(trainer):
            return
        metrics = trainer.callback_metrics
        row = {"epoch": str(trainer.current_epoch)}
        row |= {name: f"{float(metrics[name]):.6g}" for name in self.columns[1:] if name in metrics}
        rows = [old for old in self._rows() if int(old["epoch"]) < trainer.current_epoch] + [row]

        def write(temporary: Path) -> None:
            with temporary.open("w", newline="") as file:
                writer = csv.DictWriter(file, self.columns, restval="", extrasaction="ignore")
                writer.writeheader()
                writer.writerows(rows)

        replace_atomically(self.path, write)

    def _rows(self) -> list[dict[str, str]]:
        if not self.path.is_file():
            return []
        with self.path.open(newline="") as file:
            return list(csv.DictReader(file))


class KeepCheckpoints(Checkpoint):
    """After every epoch: `epoch=N-val_acc1=X.ckpt`, `last.ckpt` as a second name of it, and only the best few kept.

    The name says `val_loss` where there is no accuracy, and likewise what the moving average of the weights reaches where
    there is one; the best few of both stay. What is kept is decided by the names in the folder alone, so it does not
    matter where an earlier run was killed.

    Args:
        directory: of the experiment.
        keep: how many epoch checkpoints stay.
    """

    def __init__(self, directory: Path, keep: int = 3) -> None:
        self.directory = directory
        self.keep = keep

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called by Lightning after validation and after all other callbacks."""
        if _is_dev_run(trainer):
            return
        metrics = trainer.callback_metrics
        measure = ACCURACY if ACCURACY in metrics else LOSS
        scores = {name: float(metrics[name]) for name in (measure, measure + EMA) if name in metrics}
        path = self.directory / epoch_filename(trainer.current_epoch, scores)
        trainer.save_checkpoint(path, weights_only=False)
        if not trainer.is_global_zero:
            return
        link_atomically(path, self.directory / LAST)
        plain, averaged = epoch_checkpoints(self.directory), epoch_checkpoints(self.directory, ema=True)
        for checkpoint in set(plain + averaged) - set(plain[: self.keep] + averaged[: self.keep]):
            checkpoint.path.unlink()


class ExplanationLogger(Callback):
    """Draws the explanations of a few validation images: `explanations/epoch=N.png`, and to TensorBoard and W&B.

    Args:
        directory: of the experiment.
        every_n_epochs: at the end of epochs n-1, 2n-1, ...
        count: number of images, spread evenly over the validation images.

    The upper row shows the images, the lower one the explanations of the predicted classes on white.
    """

    def __init__(self, directory: Path, every_n_epochs: int = 1, count: int = 8) -> None:
        self.directory = directory / "explanations"
        self.every_n_epochs = every_n_epochs
        self.count = count

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draws and logs."""
        assert isinstance(pl_module.model, nn.Module)
        if not trainer.is_global_zero or (trainer.current_epoch + 1) % self.every_n_epochs:
            return
        images = self._images(trainer).to(pl_module.device)
        # Validation runs in inference mode; an explanation is a gradient.
        with torch.inference_mode(False), torch.enable_grad():
            rgba = bk.explain(pl_module.model, images.clone()).rgba().permute(0, 3, 1, 2).to(images)
        pictures = rgba[:, :3] * rgba[:, 3:] + 1.0 - rgba[:, 3:]
        grid = make_grid(torch.cat([images[:, :3], pictures]), nrow=len(images)).cpu()
        if not _is_dev_run(trainer):
            self.directory.mkdir(parents=True, exist_ok=True)
            save_image(grid, self.directory / f"epoch={trainer.current_epoch}.png")
        for logger in trainer.loggers:
            _log_image(logger, grid, trainer)

    def _images(self, trainer: pl.Trainer) -> Tensor:
        loaders: Any = trainer.val_dataloaders
        dataset = loaders.dataset
        indices = torch.linspace(0, len(dataset) - 1, min(self.count, len(dataset))).long().tolist()
        return torch.stack([dataset[index][0] for index in indices])


def _is_dev_run(trainer: pl.Trainer) -> bool:
    return bool(getattr(trainer, "fast_dev_run", False))


def _log_image(logger: object, grid: Tensor, trainer: pl.Trainer) -> None:
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_image("explanations", grid, trainer.current_epoch)
    elif isinstance(logger, WandbLogger):
        logger.log_image("explanations", [grid], step=trainer.global_step)
