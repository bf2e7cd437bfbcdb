"""Figures of explanations. The only module of the library that needs matplotlib, and the only one that imports it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from bcos_kernels.explain import Explanation


def _pyplot() -> Any:
    try:
        from matplotlib import pyplot
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("plotting needs matplotlib: pip install 'bcos_kernels[plot]'") from error
    return pyplot


def plot_contribution_map(contributions: Tensor, ax: Axes, *, percentile: float = 99.5) -> None:
    """Draw a map ``[H, W]``: red speaks for the class, blue against it, clipped at the percentile of the magnitude."""
    if contributions.dim() != 2:
        raise ValueError(f"contributions must be one map [H, W]; got {list(contributions.shape)}")
    values = contributions.detach().float().cpu()
    limit = float(torch.quantile(values.abs().flatten(), percentile / 100)) or 1.0
    ax.imshow(values.numpy(), cmap="bwr", vmin=-limit, vmax=limit)
    ax.set_axis_off()


def plot_explanation(explanation: Explanation, *, smooth: int, class_names: Sequence[str] | None) -> Figure:
    """See :meth:`bcos_kernels.explain.Explanation.plot`."""
    plt = _pyplot()
    images = explanation.images[:, :3].float().clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()
    pictures = explanation.rgba(smooth=smooth).float().cpu().numpy()
    n = len(images)
    figure, axes = plt.subplots(n, 3, figsize=(6.6, 2.2 * n), squeeze=False, layout="constrained")
    for row, image, picture, contributions, target in zip(
        axes, images, pictures, explanation.contributions, explanation.targets.tolist(), strict=True
    ):
        row[0].imshow(image)
        row[1].imshow(picture)
        for ax in row[:2]:
            ax.set_axis_off()
        plot_contribution_map(contributions, row[2])
        row[0].set_title(class_names[target] if class_names else f"class {target}", fontsize=9)
    return figure
