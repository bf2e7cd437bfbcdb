"""Exponents that change during training: annealed by the number of steps, or learnt and kept in their range."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from models.factory import exponents
from models.recipes import ModelRecipe

#: The logged metric: the mean over the layers, and over the epoch's steps.
MEAN_EXPONENT = "b"


class VariableExponent(Callback):
    """Sets (`anneal_b`) or bounds (`learn_b`) the exponent B of every layer, and logs their mean.

    Annealing is a function of the step alone, so a resumed run goes on as one that was never stopped.

    Source: ablations of B-cosification (arXiv 2411.00715). There a learnt B may also be kept above 1 by a clamp.
    """

    def __init__(self, recipe: ModelRecipe) -> None:
        self.recipe = recipe

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Sets an annealed B; logs either."""
        values = exponents(_model(pl_module))
        if self.recipe.anneal_b:
            steps = self.recipe.anneal_b * int(trainer.num_training_batches)
            b = annealed(trainer.global_step, steps, self.recipe.b)
            with torch.no_grad():
                for value in values:
                    value.fill_(b)
        mean = torch.stack([value.detach() for value in values]).mean()
        pl_module.log(MEAN_EXPONENT, mean, on_step=False, on_epoch=True, batch_size=1, sync_dist=True)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keeps a learnt B at 1 or above."""
        if self.recipe.learn_b:
            with torch.no_grad():
                for value in exponents(_model(pl_module)):
                    value.clamp_(min=1.0)


def annealed(step: int, steps: int, b: float) -> float:
    """From 1 at step 0 to `b` at step `steps`, in a straight line, and `b` from there on."""
    return 1.0 + (b - 1.0) * min(step / steps, 1.0)


def _model(pl_module: pl.LightningModule) -> nn.Module:
    assert isinstance(pl_module.model, nn.Module)
    return pl_module.model
