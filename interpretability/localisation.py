"""GridPG: how much of an explanation lies on the image that it should explain.

Images of distinct classes are put into one n x n grid; the attribution of a class should then lie on that class's own
cell. The score is the share of positive attribution that does: 1 is perfect, 1/n^2 is what a uniform map gets.

Computes what the public B-cosification code computes (``interpretability/analyses/localisation.py``), except for two
details there: it drops one image after every grid, and it stops one class early. Here each drawn set of classes is one
grid, and drawing goes on while n^2 classes are left.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from interpretability.attribution import Attribution, default_attribution, evaluating, is_bcos

Confidence = Callable[[Tensor], Tensor]


class ImageDataset(Sized, Protocol):
    """A map-style data set of ``(image [C, H, W], class)``."""

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True)
class Candidate:
    """A correctly classified image: its place in the data set, and the confidence in its class (0 to 1)."""

    index: int
    confidence: float


@dataclass(frozen=True)
class Localisation:
    """The result of :func:`localise`.

    ``scores [G, n*n]`` (float32, 0 to 1): for every grid, the score of every cell's class, row by row. ``indices`` and
    ``targets`` (int64, the same shape): the images in the cells, and their classes.
    """

    scores: Tensor
    indices: Tensor
    targets: Tensor

    @property
    def mean(self) -> float:
        """The mean over all grids and cells."""
        return float(self.scores.mean())


def sigmoid_confidence(logits: Tensor) -> Tensor:
    """``[N, K] -> [N, K]``, for networks trained with binary cross-entropy: each class has its own yes or no."""
    return logits.sigmoid()


def softmax_confidence(logits: Tensor) -> Tensor:
    """``[N, K] -> [N, K]``, for networks trained with the cross-entropy over classes."""
    return logits.softmax(1)


def default_confidence(model: nn.Module) -> Confidence:
    """:func:`sigmoid_confidence` for B-cos networks, :func:`softmax_confidence` for conventional ones."""
    return sigmoid_confidence if is_bcos(model) else softmax_confidence


def default_smooth(size: int) -> int:
    """The box size that is to ``size`` what 15 is to 224 pixels: the nearest odd number, at least 1."""
    return max(1, 2 * round((15 * size / 224 - 1) / 2) + 1)


def rank_by_confidence(
    model: nn.Module,
    dataset: ImageDataset,
    *,
    confidence: Confidence | None = None,
    batch_size: int = 64,
    progress: bool = True,
) -> dict[int, list[Candidate]]:
    """Classify ``dataset`` and return, for each class, its correctly classified images, most confident first.

    ``confidence`` maps logits ``[N, K]`` to confidences ``[N, K]``; None takes :func:`default_confidence`. Classes
    without a correctly classified image are left out. Raises ValueError for an empty data set.
    """
    if len(dataset) == 0:
        raise ValueError("dataset: it is empty, so there is nothing to build grids from")
    confidence = confidence or default_confidence(model)
    device = _device_of(model)
    ranked: dict[int, list[Candidate]] = {}
    index = 0
    loader: DataLoader[Any] = DataLoader(cast("Dataset[Any]", dataset), batch_size=batch_size)
    with evaluating(model), torch.inference_mode():
        for images, targets in tqdm(loader, desc="Confidences", disable=not progress, leave=False):
            logits = model(images.to(device))
            predicted = logits.argmax(1)
            chosen = confidence(logits).gather(1, predicted[:, None])[:, 0]
            for target, guess, value in zip(targets.tolist(), predicted.tolist(), chosen.tolist(), strict=True):
                if guess == target:
                    ranked.setdefault(target, []).append(Candidate(index, value))
                index += 1
    for candidates in ranked.values():
        candidates.sort(key=lambda candidate: -candidate.confidence)
    return dict(sorted(ranked.items()))


def draw_grids(
    ranked: Mapping[int, Sequence[Candidate]],
    *,
    n: int = 2,
    max_grids: int = 500,
    threshold: float = 0.5,
    seed: int = 42,
) -> list[list[tuple[int, int]]]:
    """Draw grids of n x n images of distinct classes: ``[(index, class), ...]`` for each, row by row.

    The classes of a grid are drawn at random from those that still have an image of confidence over ``threshold``; each
    class gives its most confident image that was not used yet. Raises ValueError if not a single grid can be made.
    """
    if n < 2:
        raise ValueError(f"n: a grid needs at least 2 x 2 cells, got n={n}")
    if max_grids < 1:
        raise ValueError(f"max_grids: expected at least 1, got {max_grids}")
    left = {
        target: [candidate.index for candidate in candidates if candidate.confidence > threshold]
        for target, candidates in sorted(ranked.items())
    }
    generator = np.random.RandomState(seed)  # the legacy generator: the same classes as the public code draws
    grids: list[list[tuple[int, int]]] = []
    while len(grids) < max_grids:
        classes = [target for target, indices in left.items() if indices]
        if len(classes) < n * n:
            break
        drawn = generator.choice(classes, size=n * n, replace=False).tolist()
        grids.append([(left[target].pop(0), target) for target in drawn])
    if not grids:
        usable = sum(bool(indices) for indices in left.values())
        raise ValueError(
            f"ranked: a {n}x{n} grid needs {n * n} classes with a correctly classified image of confidence over "
            f"{threshold}, but only {usable} of {len(left)} have one; take a smaller n, a lower threshold, more images "
            "or a model that is trained further"
        )
    return grids


def tile(images: Tensor, n: int) -> Tensor:
    """Put ``images [n*n, C, H, W]`` into one picture ``[C, n*H, n*W]``, row by row."""
    if images.ndim != 4 or len(images) != n * n:
        raise ValueError(f"images: a {n}x{n} grid needs [{n * n}, C, H, W], got shape {list(images.shape)}")
    _, channels, height, width = images.shape
    rows = images.reshape(n, n, channels, height, width).permute(2, 0, 3, 1, 4)
    return rows.reshape(channels, n * height, n * width)


def attribute_grids(
    attribution: Attribution, pictures: Tensor, targets: Tensor, cell: tuple[int, int], stride: int | None = None
) -> Tensor:
    """Attribute ``pictures [M, C, n*H, n*W]`` to ``targets [M]``: a map ``[M, n*H, n*W]``.

    With ``stride``, a window of the size of one cell slides over the picture (padded with zeros) and the maps are summed:
    for networks with a fixed input size, such as ViTs. The stride has to divide the cell's ``(H, W)``, or pixels would
    be covered unevenly; else ValueError.
    """
    if stride is None:
        return attribution(pictures, targets)
    height, width = cell
    if stride < 1 or height % stride or width % stride:
        raise ValueError(f"stride: expected a positive divisor of the image size {height}x{width}, got {stride}")
    padding = (height - stride, width - stride)
    channels = pictures.shape[1]
    windows = F.unfold(pictures, cell, stride=stride, padding=padding)
    windows = windows.unflatten(1, (channels, height, width))
    maps = [attribution(window.contiguous(), targets).flatten(1) for window in windows.unbind(-1)]
    summed = F.fold(
        torch.stack(maps, -1), (pictures.shape[-2], pictures.shape[-1]), cell, stride=stride, padding=padding
    )
    return summed[:, 0]


def share_in_cells(maps: Tensor, n: int, smooth: int) -> Tensor:
    """The share of each map's positive attribution in each cell: ``[M, n*H, n*W] -> [M, n*n]``, rows of cells first.

    Maps are smoothed with a box of ``smooth`` pixels first (the picture's border counts as zeros). A map without any
    positive value gets 0 everywhere. Raises ValueError for an even ``smooth`` and for maps that are not finite.
    """
    if smooth < 1 or smooth % 2 == 0:
        raise ValueError(f"smooth: expected a positive odd number of pixels, got {smooth}")
    if not bool(torch.isfinite(maps).all()):
        raise ValueError("maps: the attribution holds NaN or inf, so there is no share to take")
    smoothed = F.avg_pool2d(maps[:, None], smooth, stride=1, padding=smooth // 2)[:, 0].clamp(min=0)
    cells = smoothed.unflatten(2, (n, -1)).unflatten(1, (n, -1)).sum((2, 4)).flatten(1)
    total = cells.sum(1, keepdim=True)
    return torch.where(total > 0, cells / total, torch.zeros_like(cells))


def score_grids(
    attribution: Attribution,
    dataset: ImageDataset,
    grids: Sequence[Sequence[tuple[int, int]]],
    *,
    smooth: int | None = None,
    stride: int | None = None,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> Localisation:
    """Score ``attribution`` on ``grids`` (of :func:`draw_grids`) of images from ``dataset``.

    ``smooth``: the box size in pixels; None scales 15 of 224 pixels to the images (:func:`default_smooth`).
    ``batch_size``: how many single images to have in memory at once (at least one grid, once for each of its classes).
    """
    if not grids:
        raise ValueError("grids: there are none; draw_grids makes them")
    cells = len(grids[0])
    n = round(cells**0.5)
    at_once = max(1, batch_size // cells**2)  # a grid of n*n images is attributed n*n times
    scores = []
    with tqdm(total=len(grids), desc="Localisation", disable=not progress, leave=False) as bar:
        for start in range(0, len(grids), at_once):
            batch = grids[start : start + at_once]
            images = [torch.stack([torch.as_tensor(dataset[index][0]) for index, _ in grid]) for grid in batch]
            height, width = images[0].shape[-2:]
            pictures = torch.stack([tile(members, n) for members in images]).repeat_interleave(cells, 0).to(device)
            targets = torch.tensor([target for grid in batch for _, target in grid], device=device)
            maps = attribute_grids(attribution, pictures, targets, (height, width), stride).detach()
            shares = share_in_cells(maps, n, default_smooth(min(height, width)) if smooth is None else smooth)
            scores.append(shares.unflatten(0, (-1, cells)).diagonal(dim1=1, dim2=2).float().cpu())
            bar.update(len(batch))
    return Localisation(
        scores=torch.cat(scores),
        indices=torch.tensor([[index for index, _ in grid] for grid in grids]),
        targets=torch.tensor([[target for _, target in grid] for grid in grids]),
    )


def localise(
    model: nn.Module,
    dataset: ImageDataset,
    *,
    attribution: Attribution | None = None,
    confidence: Confidence | None = None,
    n: int = 2,
    max_grids: int = 500,
    threshold: float = 0.5,
    seed: int = 42,
    smooth: int | None = None,
    stride: int | None = None,
    batch_size: int = 64,
    progress: bool = True,
) -> Localisation:
    """The localisation score of ``model`` on ``dataset``, whose images have to be in the form that the model takes.

    ``attribution`` None takes the model's own contribution map (B-cos networks) or Input x Gradient; the other
    arguments are those of :func:`rank_by_confidence`, :func:`draw_grids` and :func:`score_grids`. The spec's settings:
    CNNs 500 grids of 3 x 3; ViTs 2 x 2 with a stride of 112, both with smooth 15 on 224 pixels.
    """
    ranked = rank_by_confidence(model, dataset, confidence=confidence, batch_size=batch_size, progress=progress)
    grids = draw_grids(ranked, n=n, max_grids=max_grids, threshold=threshold, seed=seed)
    return score_grids(
        attribution or default_attribution(model),
        dataset,
        grids,
        smooth=smooth,
        stride=stride,
        batch_size=batch_size,
        device=_device_of(model),
        progress=progress,
    )


def _device_of(model: nn.Module) -> torch.device:
    tensor = next(iter([*model.parameters(), *model.buffers()]), None)
    return torch.device("cpu") if tensor is None else tensor.device
