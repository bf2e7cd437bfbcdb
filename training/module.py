"""The LightningModules: one training step, one evaluation step, and what is logged."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel
from torchmetrics.classification import MulticlassAccuracy

import bcos_kernels as bk
from models.checkpoints import ACCURACY, EMA, LOSS
from models.factory import exponents
from models.recipes import Experiment
from training.agc import adaptive_clip_grad_
from training.losses import get_loss
from training.mixup import MixUp
from training.optim import build_optimiser, build_schedule


class Trained(pl.LightningModule):
    """A network, and the experiment's optimiser, schedule and clipping for it. What is learnt is up to the subclasses.

    Args:
        model: it is the attribute `model`, so its keys in a checkpoint start with `model.`.
        experiment: the recipe.
        track_grad_norm: also log the Euclidean norm of the whole gradient, before clipping.
    """

    def __init__(self, model: nn.Module, experiment: Experiment, track_grad_norm: bool = False) -> None:
        super().__init__()
        self.model = model
        self.experiment = experiment
        self.track_grad_norm = track_grad_norm
        self.ema: AveragedModel | None = None  # set by training.ema.MovingAverage
        self.train_loss = get_loss(experiment.trainer.train_loss)
        self.eval_loss = get_loss(experiment.trainer.eval_loss)

    def forward(self, images: Tensor) -> Tensor:
        """The network's output."""
        out: Tensor = self.model(images)
        return out

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        """One batch of validation images."""
        self.validate(self.model, batch)

    def validate(self, network: nn.Module, batch: tuple[Tensor, Tensor], suffix: str = "") -> None:
        """Logs what `network`, the model or its moving average, does with a batch; `suffix` ends the names."""
        raise NotImplementedError

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Optimiser and schedule of the recipe. Weight decay leaves learnt exponents alone."""
        recipe = self.experiment.optimiser
        learnt = {id(exponent) for exponent in exponents(self.model)}
        groups: list[dict[str, Any]] = [{"params": [p for p in self.model.parameters() if id(p) not in learnt]}]
        if self.experiment.model.learn_b:
            groups.append({"params": exponents(self.model), "weight_decay": 0.0})
        optimiser = build_optimiser(recipe, groups)
        per_step = recipe.interval == "step"
        length = int(self.trainer.estimated_stepping_batches) if per_step else self.experiment.trainer.max_epochs
        schedule = build_schedule(optimiser, length, recipe.warmup_steps, recipe.restart_every)
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": recipe.interval}}

    def on_train_start(self) -> None:
        """A checkpoint brings its learning rate along, of a schedule that may have been shorter: this one's is taken."""
        schedule = self.lr_schedulers()
        assert isinstance(schedule, LambdaLR)
        for group, lr, factor in zip(
            schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True
        ):
            group["lr"] = lr * factor(schedule.last_epoch)

    def configure_gradient_clipping(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> None:
        """Clipping, of either kind, where the recipe has it. Lightning has taken off the loss scale of mixed precision
        before."""
        if self.track_grad_norm:
            norms = [torch.linalg.vector_norm(p.grad) for p in self.parameters() if p.grad is not None]
            norm = torch.linalg.vector_norm(torch.stack(norms))
            self.log("grad_norm", norm, on_step=False, on_epoch=True, prog_bar=True, sync_dist=True)
        if self.experiment.optimiser.max_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.experiment.optimiser.max_norm)
        if self.experiment.optimiser.agc is not None:
            adaptive_clip_grad_(self.model.parameters(), self.experiment.optimiser.agc)

    def _log_train_loss(self, loss: Tensor, batch_size: int) -> None:
        self.log("train_loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=batch_size, sync_dist=True)

    def _log_val_loss(self, loss: Tensor, batch_size: int, suffix: str) -> None:
        self.log(LOSS + suffix, loss, prog_bar=True, batch_size=batch_size, sync_dist=True)


class Classifier(Trained):
    """Trains a network that gives logits `[N, K]`; logs loss and accuracy of every epoch.

    Args:
        num_classes: K.
    """

    def __init__(
        self, model: nn.Module, experiment: Experiment, num_classes: int, track_grad_norm: bool = False
    ) -> None:
        super().__init__(model, experiment, track_grad_norm)
        alpha = experiment.data.mixup
        self.mixup = None if alpha is None else MixUp(alpha, num_classes, experiment.seed)
        self.train_acc1 = MulticlassAccuracy(num_classes, average="micro")
        for suffix in ("", EMA) if experiment.trainer.ema is not None else ("",):
            self.add_module(ACCURACY + suffix, MulticlassAccuracy(num_classes, average="micro"))
            self.add_module(
                f"val_acc5{suffix}", MulticlassAccuracy(num_classes, average="micro", top_k=min(5, num_classes))
            )

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
        self._log_train_loss(loss, len(targets))
        self.log("train_acc1", self.train_acc1, on_step=False, on_epoch=True)
        return loss

    def validate(self, network: nn.Module, batch: tuple[Tensor, Tensor], suffix: str = "") -> None:
        """Logs loss and accuracy."""
        images, targets = batch
        logits = network(images)
        self._log_val_loss(self.eval_loss(logits, targets), len(targets), suffix)
        for name in (ACCURACY, "val_acc5"):
            accuracy: Any = self.get_submodule(name + suffix)
            accuracy(logits, targets)
            self.log(name + suffix, accuracy, prog_bar=name == ACCURACY)


class Distillation(Trained):
    """Trains a B-cosified network to point where the conventional one points that it was made of; logs the losses.

    Both see the same images; the classes of the dataset are not used.

    Args:
        model: gives embeddings `[N, E]`.
        teacher: gives embeddings `[N, E]` of `[N, 3, H, W]`, normalised as `model` normalises; it is frozen. It is the
            attribute `clip_model`, as in the public checkpoints, so a resumed run needs no other file.

    Source: B-cosification (arXiv 2411.00715, section 4).
    """

    def __init__(
        self, model: bk.BcosNetwork, teacher: nn.Module, experiment: Experiment, track_grad_norm: bool = False
    ) -> None:
        super().__init__(model, experiment, track_grad_norm)
        self.normalize = model.normalize
        self.clip_model = teacher.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Distillation:
        """As for every module, but the teacher stays in evaluation mode."""
        super().train(mode)
        self.clip_model.eval()
        return self

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        """The training loss of one batch."""
        images, _ = batch
        loss = self.train_loss(self(images), self._taught(images))
        self._log_train_loss(loss, len(images))
        return loss

    def validate(self, network: nn.Module, batch: tuple[Tensor, Tensor], suffix: str = "") -> None:
        """Logs the loss."""
        images, _ = batch
        self._log_val_loss(self.eval_loss(network(images), self._taught(images)), len(images), suffix)

    def _taught(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            embeddings: Tensor = self.clip_model(self.normalize(images)[:, :3])
        return embeddings
