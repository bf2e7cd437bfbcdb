"""A moving average of the weights, kept and validated beside them."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from models.checkpoints import EMA
from training.module import Trained


class MovingAverage(Callback):
    """After every step `average = decay * average + (1 - decay) * weights`, running statistics included.

    The average is the attribute `ema` of the module, so that its keys in a checkpoint start with `ema.module.`, as in the
    public code, and a resumed run goes on with it. Validation logs what it gives with `_ema` behind every name.

    Args:
        decay: between 0 and 1. The first step's weights are where the average starts.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Before a checkpoint is restored."""
        assert isinstance(pl_module, Trained)
        average = AveragedModel(pl_module.model, multi_avg_fn=get_ema_multi_avg_fn(self.decay), use_buffers=True)
        pl_module.ema = average.requires_grad_(False)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *arguments: Any) -> None:
        """After the optimiser's step."""
        assert isinstance(pl_module, Trained)
        assert pl_module.ema is not None
        pl_module.ema.update_parameters(pl_module.model)

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, *arguments: Any
    ) -> None:
        """The same batch again."""
        assert isinstance(pl_module, Trained)
        assert pl_module.ema is not None
        pl_module.validate(pl_module.ema.module, batch, EMA)
