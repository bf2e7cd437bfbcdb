"""The LightningModule: one training step, one evaluation step, and what is logged."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from models.experiments import Experiment
from training.agc import adaptive_clip_grad_
from training.losses import get_loss
from training.mixup import MixUp
from training.optim import build_optimiser, build_schedule


class Classifier(pl.LightningModule):
    """Trains `model` by the experiment's recipe; logs loss and accuracy of every epoch.

    Args:
        model: gives logits `[N, K]`. It is the attribute `model`, so its keys in a checkpoint start with `model.`.
        experiment: the recipe.
        num_classes: K.
        track_grad_norm: also log the Euclidean norm of the whole gradient, before clipping.
    """

    def __init__(
        self, model: nn.Module, experiment: Experiment, num_classes: int, track_grad_norm: bool = False
    ) -> None:
        super().__init__()
        self.model = model
        self.experiment = experiment
        self.track_grad_norm = track_grad_norm
        self.train_loss = get_loss(experiment.trainer.train_loss)
        self.eval_loss = get_loss(experiment.trainer.eval_loss)
        alpha = experiment.data.mixup
        self.mixup = None if alpha is None else MixUp(alpha, num_classes, experiment.seed)
        self.train_acc1 = MulticlassAccuracy(num_classes, average="micro")
        self.val_acc1 = MulticlassAccuracy(num_classes, average="micro")
        self.val_acc5 = MulticlassAccuracy(num_classes, average="micro", top_k=min(5, num_classes))

    def forward(self, images: Tensor) -> Tensor:
        """Logits `[N, K]`."""
        logits: Tensor = self.model(images)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        """The training loss of one batch. Where it is mixed, the accuracy asks for the class with the larger share."""
        images, targets = batch
        labels = targets
        if self.mixup is not None:
            images, targets = self.mixup(images, targets, (self.current_epoch, batch_index, self.global_rank))
            labels = targets.argmax(dim=1)
        logits = self(images)
        loss = self.train_loss(logits, targets)
        self.train_acc1(logits, labels)
        self.log(
            "train_loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(targets), sync_dist=True
        )
        self.log("train_acc1", self.train_acc1, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        """Loss and accuracy of one batch of validation images."""
        images, targets = batch
        logits = self(images)
        loss = self.eval_loss(logits, targets)
        self.val_acc1(logits, targets)
        self.val_acc5(logits, targets)
        self.log("val_loss", loss, prog_bar=True, batch_size=len(targets), sync_dist=True)
        self.log("val_acc1", self.val_acc1, prog_bar=True)
        self.log("val_acc5", self.val_acc5)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Optimiser and schedule of the recipe."""
        recipe = self.experiment.optimiser
        optimiser = build_optimiser(recipe, self.model.parameters())
        per_step = recipe.interval == "step"
        length = int(self.trainer.estimated_stepping_batches) if per_step else self.experiment.trainer.max_epochs
        schedule = build_schedule(optimiser, length, recipe.warmup_steps)
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": recipe.interval}}

    def configure_gradient_clipping(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> None:
        """Clipping, of either kind, where the recipe has it. Lightning has taken off the loss scale of mixed precision
        before."""
        if self.track_grad_norm:
            norms = [torch.linalg.vector_norm(p.grad) for p in self.parameters() if p.grad is not None]
            norm = torch.linalg.vector_norm(torch.stack(norms))
            self.log("grad_norm", norm, on_step=False, on_epoch=True, prog_bar=True)
        if self.experiment.optimiser.max_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.experiment.optimiser.max_norm)
        if self.experiment.optimiser.agc is not None:
            adaptive_clip_grad_(self.model.parameters(), self.experiment.optimiser.agc)
