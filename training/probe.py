"""Linear probe: how well a linear classifier does on the embeddings of a frozen encoder."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from tqdm.auto import tqdm

#: OpenAI's value for CLIP; the inverse of the penalty's weight.
DEFAULT_C = 0.316

Batches = Iterable[tuple[Tensor, Tensor]]


def linear_probe(
    encoder: nn.Module, train: Batches, test: Batches, device: torch.device, c: float = DEFAULT_C
) -> dict[str, float]:
    """Fits logistic regression to the embeddings of one part of the images and tests it on those of the other.

    Args:
        encoder: on `device`; gives embeddings `[N, E]`, or `[N, L, E]`, whose mean is taken. It is not changed.
        train, test: images and class indices `[N]`.
        c: inverse of the penalty's weight.

    Returns:
        "acc1" and "acc5", shares between 0 and 1; "images", how many were tested.

    Source: CLIP (arXiv 2103.00020, appendix A.3); scikit-learn's L-BFGS.
    """
    inputs, targets = embeddings(encoder, train, device)
    fitted = LogisticRegression(C=c, max_iter=1000).fit(inputs, targets)
    inputs, targets = embeddings(encoder, test, device)
    scores = fitted.decision_function(inputs)
    if scores.ndim == 1:  # of two classes scikit-learn scores the second
        scores = np.stack([-scores, scores], axis=1)
    best = fitted.classes_[np.argsort(-scores, axis=1)[:, :5]]
    hits = best == targets[:, None]
    return {"acc1": float(hits[:, 0].mean()), "acc5": float(hits.any(axis=1).mean()), "images": float(len(targets))}


@torch.inference_mode()
def embeddings(encoder: nn.Module, batches: Batches, device: torch.device) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings of length 1, `[N, E]`, and classes `[N]`, of all images, from the encoder in evaluation mode."""
    encoder.eval()
    found, classes = [], []
    for images, targets in tqdm(batches, desc="embed", unit="batch", leave=False):
        out = encoder(images.to(device, non_blocking=True))
        out = out if out.dim() == 2 else out.mean(1)
        found.append(F.normalize(out, dim=1).float().cpu())
        classes.append(targets)
    return torch.cat(found).numpy(), torch.cat(classes).numpy()
