"""Optimiser and learning-rate schedule from the recipe."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from models.recipes import WARMUP_START, OptimiserRecipe


def build_optimiser(
    recipe: OptimiserRecipe, parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]]
) -> torch.optim.Optimizer:
    """The recipe's optimiser over these parameters, or groups of them."""
    kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[recipe.name]
    return kind(parameters, lr=recipe.lr, weight_decay=recipe.weight_decay)


def build_schedule(
    optimiser: torch.optim.Optimizer, length: int, warmup: int = 0, restart_every: int | None = None
) -> LambdaLR:
    """Warm-up, then cosine, over `length` moves together (steps or epochs, as the recipe's `interval` says).

    Args:
        restart_every: after the warm-up, so many moves make up one cosine, and then comes the next.
    """

    def factor(move: int) -> float:
        if restart_every is None or move < warmup:
            return warmup_factor(move, length, warmup)
        return cosine_factor((move - warmup) % restart_every, restart_every)

    return LambdaLR(optimiser, factor)


def warmup_factor(move: int, length: int, warmup: int) -> float:
    """As `cosine_factor`, but from `WARMUP_START` at move 0 in a straight line to 1 at move `warmup`; cosine after it.

    A training that is not longer than the warm-up ends on that line.
    """
    if move < warmup:
        return WARMUP_START + (1.0 - WARMUP_START) * move / warmup
    return cosine_factor(move - warmup, max(length - warmup, 1))


def cosine_factor(move: int, length: int) -> float:
    """What the learning rate is multiplied with: 1 at move 0, 0 at move `length` and after.

    A function of the move alone: a run that goes on with another number of epochs follows the new curve at once, where
    `CosineAnnealingLR` would go on along the stored one and rise again after its end.
    """
    return 0.5 * (1.0 + math.cos(math.pi * min(move / length, 1.0)))
