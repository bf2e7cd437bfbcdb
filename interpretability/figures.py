"""The pictures: explanations, contribution maps, localisation grids and training curves. Needs matplotlib.

Every function returns a ``matplotlib.figure.Figure`` that belongs to no window, so it works without a display.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ORANGE, BLUE, GREEN = "#c2500a", "#1c5fa8", "#2a7d3f"


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of ``width x height`` inches. Raises ImportError that names the extra if matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "interpretability.figures needs matplotlib; install it with: pip install 'bcos_kernels[train]'"
        ) from error
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def on_background(rgba: Tensor, background: float = 1.0) -> Tensor:
    """Lay ``rgba [..., 4]`` over a plain grey ``background`` (1: white, 0: black): ``[..., 3]``, all values in [0, 1]."""
    if rgba.shape[-1] != 4:
        raise ValueError(f"rgba: expected red, green, blue and alpha in the last dimension, got {list(rgba.shape)}")
    colour, alpha = rgba[..., :3], rgba[..., 3:]
    return colour * alpha + background * (1 - alpha)


def clip_range(values: Tensor, percentile: float = 99.5) -> float:
    """The ``percentile`` of ``|values|``: colours run from minus to plus this. Never 0, so that zeros show as neutral."""
    limit = float(np.percentile(values.detach().abs().float().cpu().numpy(), percentile))
    return limit or 1.0


def draw_contributions(axes: Axes, contributions: Tensor, percentile: float = 99.5) -> None:
    """Draw a map ``[H, W]``: red speaks for the class, blue against it, white is neutral (symmetric "bwr" range)."""
    if contributions.ndim != 2:
        raise ValueError(f"contributions: expected one map [H, W], got shape {list(contributions.shape)}")
    limit = clip_range(contributions, percentile)
    axes.imshow(contributions.detach().cpu().numpy(), cmap="bwr", vmin=-limit, vmax=limit)
    hide_ticks(axes)


def draw_image(axes: Axes, image: Tensor) -> None:
    """Draw an image ``[3, H, W]`` with values in [0, 1]."""
    axes.imshow(image.detach().permute(1, 2, 0).clamp(0, 1).cpu().numpy())
    hide_ticks(axes)


def hide_ticks(axes: Axes) -> None:
    """Leave only a thin frame around a picture."""
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color("#bbbbbb")


def explanation_figure(
    images: Tensor,
    rgba: Tensor,
    contributions: Tensor,
    titles: Sequence[str],
    columns: int = 6,
    background: float = 1.0,
) -> Figure:
    """For each of N images, one under the other: the image, the explanation in colour, the contribution map.

    ``images [N, 3, H, W]`` in [0, 1] (further channels are ignored), ``rgba [N, H, W, 4]``, ``contributions [N, H, W]``,
    ``titles`` N texts. Blocks of ``columns`` images follow one another. ``background`` of the explanations: 1 is white.
    """
    count = len(images)
    if not count or not (len(rgba) == len(contributions) == len(titles) == count):
        raise ValueError(
            f"images: expected as many images, explanations, maps and titles (at least one), got {count}, {len(rgba)}, "
            f"{len(contributions)} and {len(titles)}"
        )
    blocks = -(-count // columns)
    figure = new_figure(1.5 * columns + 1.1, 5.0 * blocks)
    axes = figure.subplots(3 * blocks, columns, squeeze=False)
    for block in range(blocks):
        for column in range(columns):
            index = block * columns + column
            picture, colour, bars = axes[3 * block : 3 * block + 3, column]
            if index >= count:
                for unused in (picture, colour, bars):
                    unused.set_axis_off()
                continue
            picture.set_title(titles[index], fontsize=11)
            draw_image(picture, images[index, :3])
            draw_image(colour, on_background(rgba[index], background).permute(2, 0, 1))
            draw_contributions(bars, contributions[index])
        for row, label in enumerate(("image", "explanation", "contributions")):
            axes[3 * block + row, 0].set_ylabel(label, fontsize=11)
    return figure


def localisation_figure(picture: Tensor, rows: Mapping[str, Tensor], targets: Sequence[str], n: int) -> Figure:
    """A grid ``picture [3, n*H, n*W]``, and for each method of ``rows`` the maps ``[n*n, n*H, n*W]`` of its classes.

    The cell in which a map should lie is framed.
    """
    from matplotlib.patches import Rectangle

    figure = new_figure(2.0 * (n * n + 1), 2.15 * len(rows))
    axes = figure.subplots(len(rows), n * n + 1, squeeze=False)
    height, width = picture.shape[-2] / n, picture.shape[-1] / n
    for row, (name, maps) in enumerate(rows.items()):
        if len(maps) != n * n or len(targets) != n * n:
            raise ValueError(f"rows: {name!r} needs {n * n} maps and classes, got {len(maps)} and {len(targets)}")
        draw_image(axes[row, 0], picture[:3])
        axes[row, 0].set_ylabel(name, fontsize=11)
        for cell in range(n * n):
            draw_contributions(axes[row, cell + 1], maps[cell])
            axes[row, cell + 1].add_patch(
                Rectangle(
                    (cell % n * width - 0.5, cell // n * height - 0.5), width, height, fill=False, color=GREEN, lw=2.5
                )
            )
            if row == 0:
                axes[row, cell + 1].set_title(f"what speaks for {targets[cell]}?", fontsize=11)
    axes[0, 0].set_title("the network sees", fontsize=11)
    return figure


def training_curves(histories: Mapping[str, Sequence[Mapping[str, float]]]) -> Figure:
    """Accuracy and loss over epochs; ``histories`` gives for each network its rows of ``metrics.csv``.

    Rows have ``epoch, train_loss, train_acc1, val_loss, val_acc1``; missing values (NaN) are left out.
    """
    figure = new_figure(9.5, 3.6)
    accuracy, loss = figure.subplots(1, 2)
    for (name, rows), colour in zip(histories.items(), itertools.cycle((ORANGE, BLUE, GREEN)), strict=False):
        for axes, kind in ((accuracy, "acc1"), (loss, "loss")):
            for split, style in (("train", ":"), ("val", "-")):
                values = [(row["epoch"] + 1, row[f"{split}_{kind}"]) for row in rows]
                points = torch.tensor([pair for pair in values if not np.isnan(pair[1])]).reshape(-1, 2)
                label = f"{name}, {'training' if split == 'train' else 'test'}"
                marker = "o" if len(points) == 1 else None
                axes.plot(points[:, 0], points[:, 1], style, color=colour, label=label, marker=marker)
    accuracy.set(xlabel="epoch", title="accuracy", ylim=(None, 1.01))
    loss.set(xlabel="epoch", title="loss (each network its own)", yscale="log")
    for axes in (accuracy, loss):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    accuracy.legend(fontsize=9, frameon=False)
    return figure
