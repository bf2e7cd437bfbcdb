"""Optimiser and learning-rate schedule from the recipe."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from models.experiments import OptimiserRecipe


def build_optimiser(recipe: OptimiserRecipe, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The recipe's optimiser over these parameters."""
    return torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=recipe.weight_decay)


def build_schedule(optimiser: torch.optim.Optimizer, length: int) -> LambdaLR:
    """The cosine schedule over `length` moves (steps or epochs, as the recipe's `interval` says)."""
    return LambdaLR(optimiser, lambda move: cosine_factor(move, length))


def cosine_factor(move: int, length: int) -> float:
    """What the learning rate is multiplied with: 1 at move 0, 0 at move `length` and after.

    A function of the move alone: a run that goes on with another number of epochs follows the new curve at once, where
    `CosineAnnealingLR` would go on along the stored one and rise again after its end.
    """
    return 0.5 * (1.0 + math.cos(math.pi * min(move / length, 1.0)))
