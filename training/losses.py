"""The losses of the recipes, by name."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from models.recipes import LossName

Loss = Callable[[Tensor, Tensor], Tensor]

# Fixed in B-cosification (arXiv 2411.00715); SigLIP itself starts there and learns them.
SIGLIP_SCALE, SIGLIP_BIAS = 10.0, -10.0


def bce(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy of every class against its share of the target, the mean over all entries.

    Args:
        logits: `[N, K]`, floating.
        targets: `[N]`, class indices, int64; or `[N, K]`, floating, the share of every class, as mixup makes them.

    Returns:
        A scalar.

    Raises:
        ValueError: shapes or dtype other than these.
    """
    return F.binary_cross_entropy_with_logits(logits, _shares(logits, targets))


def bce_uniform_off_labels(logits: Tensor, targets: Tensor) -> Tensor:
    """As `bce`, but no share is below `1 / K`: that is what every wrong class gets instead of 0."""
    labels = _shares(logits, targets).clamp(min=1.0 / logits.shape[1])
    return F.binary_cross_entropy_with_logits(logits, labels)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Softmax cross-entropy, the mean over the batch. Arguments as for `bce`."""
    _check(logits, targets)
    return F.cross_entropy(logits, targets if targets.ndim == 1 else targets.to(logits.dtype))


def siglip(embeddings: Tensor, targets: Tensor) -> Tensor:
    """Sigmoid loss of all pairs: of the same image, where the cosine should be large, and of two, where it should not.

    `-sum of log sigmoid(+-(SIGLIP_SCALE * cos + SIGLIP_BIAS)) / N`, with + on the diagonal of the `[N, N]` pairs. Each
    process has the pairs of its own batch.

    Args:
        embeddings: `[N, E]`, floating, of any length.
        targets: `[N, E]`, what the embeddings should point to.

    Returns:
        A scalar.

    Raises:
        ValueError: other shapes.

    Source: SigLIP (arXiv 2303.15343).
    """
    if embeddings.ndim != 2 or embeddings.shape != targets.shape:
        raise ValueError(
            f"embeddings and targets must be [N, E] both, got shapes {tuple(embeddings.shape)} and "
            f"{tuple(targets.shape)}."
        )
    cosines = F.normalize(embeddings, dim=1) @ F.normalize(targets, dim=1).T
    signs = 2.0 * torch.eye(len(cosines), device=cosines.device, dtype=cosines.dtype) - 1.0
    return -F.logsigmoid(signs * (SIGLIP_SCALE * cosines + SIGLIP_BIAS)).sum() / len(cosines)


def get_loss(name: LossName) -> Loss:
    """The loss of this name in a recipe."""
    losses: dict[LossName, Loss] = {
        "bce": bce,
        "bce_uniform_off_labels": bce_uniform_off_labels,
        "cross_entropy": cross_entropy,
        "siglip": siglip,
    }
    return losses[name]


def _shares(logits: Tensor, targets: Tensor) -> Tensor:
    _check(logits, targets)
    return (F.one_hot(targets, logits.shape[1]) if targets.ndim == 1 else targets).to(logits.dtype)


def _check(logits: Tensor, targets: Tensor) -> None:
    if logits.ndim != 2:
        raise ValueError(f"logits must be [N, K], got shape {tuple(logits.shape)}.")
    soft = targets.is_floating_point()
    if targets.shape != (logits.shape if soft else logits.shape[:1]):
        raise ValueError(
            f"targets must be [{logits.shape[0]}] class indices for logits {tuple(logits.shape)}, or "
            f"{list(logits.shape)} shares in floating point, got shape {tuple(targets.shape)}, dtype {targets.dtype}."
        )
