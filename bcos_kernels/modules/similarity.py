"""Similarity of embeddings to fixed directions, as the last layer of a B-cos network."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bcos_kernels import reference
from bcos_kernels.functional import bcos_linear, check_exponent
from bcos_kernels.modules.detachable import DetachableModule


class CosineLogits(DetachableModule):
    """``scale * cos |cos|^(power-1)`` of an embedding and each of K directions, such as those of texts (zero-shot
    classification with CLIP). Of an embedding for each location (attention unpooling): the mean over the locations.

    In explanation mode the length of the embedding and ``|cos|`` are constants, so that the logit is linear in the
    embedding: :func:`bcos_kernels.explain` then explains the similarity of an image and a text.

    Args:
        directions: ``[K, E]``, floating, of any length but 0.
        power: at least 1; above 1, locations that are most similar count for more.
        scale: what a cosine is multiplied with.

    Shapes: ``[N, E]`` or ``[N, L, E]`` to ``[N, K]``. Buffer: ``directions``, of length 1.

    Raises:
        ValueError: directions of another shape, or of length 0; a power below 1.

    Source: B-cosification (arXiv 2411.00715).
    """

    directions: Tensor

    def __init__(self, directions: Tensor, *, power: float = 1.0, scale: float = 100.0) -> None:
        super().__init__()
        if directions.dim() != 2 or not directions.is_floating_point():
            raise ValueError(f"directions must be [K, E], floating; got {list(directions.shape)}, {directions.dtype}")
        if not (torch.linalg.vector_norm(directions, dim=1) > 0).all():
            raise ValueError("directions must not have length 0")
        self.power = float(check_exponent(power))
        self.scale = scale
        self.register_buffer("directions", F.normalize(directions.detach(), dim=1))

    def forward(self, x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(1e-12)
        x = reference.scaled(x, length.reciprocal(), detach=self.detach)
        logits = self.scale * bcos_linear(x, self.directions, b=self.power, detach_scale=self.detach)
        return logits if logits.dim() == 2 else logits.mean(1)

    def extra_repr(self) -> str:
        return f"{len(self.directions)} directions, power={self.power:g}, scale={self.scale:g}"
