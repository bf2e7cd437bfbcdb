"""Figures of explanations. The only module of the library that needs matplotlib, and the only one that imports it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from bcos_kernels.explain import quantile

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
    limit = float(quantile(values.abs().view(1, -1), percentile / 100)) or 1.0
    ax.imshow(values.numpy(), cmap="bwr", vmin=-limit, vmax=limit)
    ax.set_axis_off()


def plot_explanation(
    explanation: Explanation, *, smooth: int, class_names: Sequence[str] | Mapping[int, str] | None
) -> Figure:
    """See :meth:`bcos_kernels.explain.Explanation.plot`."""
    plt = _pyplot()
    names = [_name(class_names, target) for target in explanation.targets.tolist()]
    images = explanation.images.float().clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()
    shown = 3 if images.shape[-1] in (3, 6) else 1  # RGB, or the first channel
    columns = [images[..., :shown]]
    if explanation.has_colours:
        columns.append(explanation.rgba(smooth=smooth).float().cpu().numpy())
    n = len(names)
    if n == 0:
        return plt.figure()
    wide = len(columns) + 1
    figure, axes = plt.subplots(n, wide, figsize=(2.2 * wide, 2.2 * n), squeeze=False, layout="constrained")
    for row, name, contributions, *pictures in zip(axes, names, explanation.contributions, *columns, strict=True):
        for ax, picture in zip(row, pictures, strict=False):  # the last place is the map's
            ax.imshow(picture, cmap="gray", vmin=0, vmax=1)
            ax.set_axis_off()
        plot_contribution_map(contributions, row[-1])
        row[0].set_title(name, fontsize=9, parse_math=False)
    return figure


def _name(class_names: Sequence[str] | Mapping[int, str] | None, target: int) -> str:
    if class_names is None:
        return f"class {target}"
    try:
        return str(class_names[target])
    except (IndexError, KeyError):
        raise ValueError(
            f"class_names has {len(class_names)} names, and none for class {target}, which is explained"
        ) from None
