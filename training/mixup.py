"""Mixup whose random numbers depend on seed and position alone, so that a resumed run mixes as one never stopped."""

from __future__ import annotations

from torch import Tensor
from torchvision.transforms import v2

from training.randomness import drawn_by


class MixUp:
    """Every image becomes a mixture of itself and its neighbour in the batch, and so does its target.

    Source: mixup (arXiv 1710.09412); torchvision mixes.

    Args:
        alpha: the share of the image itself is drawn from Beta(alpha, alpha), once for the whole batch.
        num_classes: K.
        seed: of the experiment.
    """

    def __init__(self, alpha: float, num_classes: int, seed: int) -> None:
        self.seed = seed
        self._mix = v2.MixUp(alpha=alpha, num_classes=num_classes)

    def __call__(self, images: Tensor, targets: Tensor, position: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Mixes one batch.

        Args:
            images: `[N, C, H, W]`, floating.
            targets: `[N]`, class indices.
            position: which batch of the training this is: epoch, index, rank.

        Returns:
            Images as before, and targets `[N, K]`, float32, whose rows sum to 1.
        """
        with drawn_by(self.seed, *position):
            mixed, shares = self._mix(images, targets)
        return mixed, shares
