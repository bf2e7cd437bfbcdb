"""Explanations: the linear map that a B-cos network applied to an image, as numbers and as pictures.

Source: B-cos Networks (arXiv 2205.10268); the colour picture is the one of its public code.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bcos_kernels.modules import AddInverse

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@contextmanager
def explanation_mode(model: nn.Module) -> Iterator[nn.Module]:
    """Inside the block the model's backward pass sees the linear map that its forward pass applied.

    Every module with ``set_explanation_mode`` (ours, and those of the public B-cos packages) is switched, and put back as it
    was. Blocks may be nested. Gradients of a forward pass made inside the block stay what they are after it.

    Raises:
        ValueError: the model has no such module: it is no B-cos network.
    """
    layers: list[Any] = [m for m in model.modules() if hasattr(m, "set_explanation_mode")]
    if not layers:
        raise ValueError(
            f"model: {type(model).__name__} has no layer with an explanation mode; convert it with bcosify"
        )
    before = [bool(getattr(m, "detach", False)) for m in layers]
    try:
        for layer in layers:
            layer.set_explanation_mode(True)
        yield model
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer.set_explanation_mode(was)


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` returns. All tensors are detached and on the model's device."""

    #: the input, ``[N, 6, H, W]``
    images: Tensor
    #: the model's output, ``[N, K]``
    logits: Tensor
    #: the explained class of each image, ``[N]``, int64
    targets: Tensor
    #: W(x): the dynamic linear weights of the explained logit, ``[N, 6, H, W]``
    weights: Tensor

    @property
    def contributions(self) -> Tensor:
        """Contribution of every location to the explained logit, ``[N, H, W]``.

        They sum to the logit less its bias. Where the network normalises its input (as ``bcosify`` networks do), what the
        subtracted mean contributes is missing from the sum: the map is linear in the normalised image.
        """
        return (self.images * self.weights).sum(1)

    def rgba(self, *, smooth: int = 15, percentile: float = 99.5) -> Tensor:
        """The colour pictures, ``[N, H, W, 4]`` in [0, 1], in the dtype of the weights.

        Colour: the direction of the weights; opacity: their length, where they contribute positively.

        Args:
            smooth: side of the box that smooths the opacity; odd, 1 for none.
            percentile: in [0, 100]; the opacity of each image reaches 1 at this percentile.

        Raises:
            ValueError: ``smooth`` is even or below 1, or ``percentile`` outside [0, 100].
        """
        if smooth < 1 or smooth % 2 == 0:
            raise ValueError(f"smooth must be odd and at least 1; got {smooth}")
        if not 0 <= percentile <= 100:
            raise ValueError(f"percentile must be between 0 and 100; got {percentile}")
        w = self.weights
        colour = (w / (w.abs().amax(1, keepdim=True) + 1e-12)).clamp(min=0)
        rgb, inverse = colour.chunk(2, dim=1)
        rgb = rgb / (rgb + inverse + 1e-12)
        alpha = torch.linalg.vector_norm(w, dim=1, keepdim=True)
        alpha = torch.where(self.contributions[:, None] < 0, 1e-12, alpha)
        alpha = F.avg_pool2d(alpha, smooth, stride=1, padding=smooth // 2)
        cut = torch.quantile(alpha.flatten(1), percentile / 100, dim=1)
        alpha = (alpha / cut[:, None, None, None]).clamp(0, 1)
        return torch.cat([rgb, alpha], dim=1).permute(0, 2, 3, 1)

    def plot(self, *, smooth: int = 15, class_names: Sequence[str] | None = None) -> Figure:
        """A matplotlib figure: a row per image with the image, its colour picture and its contribution map.

        Raises:
            ModuleNotFoundError: matplotlib is not installed; the message says how to get it.
        """
        from bcos_kernels.plotting import plot_explanation

        return plot_explanation(self, smooth=smooth, class_names=class_names)


def explain(model: nn.Module, images: Tensor, targets: Tensor | Sequence[int] | int | None = None) -> Explanation:
    """Explain one logit for each image of a batch, in one forward and one backward pass.

    The model is explained in evaluation mode. Its mode, its parameters' gradients and ``requires_grad`` are left as found.

    Args:
        model: a B-cos network with logits ``[N, K]``.
        images: ``[N, 6, H, W]`` in [0, 1], or ``[N, 3, H, W]``, which gets its inverse channels; in the dtype and on the
            device of the model.
        targets: the class to explain: one for all, one for each image, or None for the predicted ones.

    Raises:
        TypeError, ValueError: images or targets that do not fit; no B-cos network.
    """
    if not isinstance(images, Tensor) or not images.is_floating_point():
        got = str(images.dtype) if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"images must be a tensor of a floating dtype with values in [0, 1]; got {got}")
    if images.dim() != 4 or images.shape[1] not in (3, 6):
        raise ValueError(f"images must be [N, 6, H, W] or [N, 3, H, W]; got {list(images.shape)}")
    with torch.inference_mode(False), torch.enable_grad(), explanation_mode(model), _frozen(model):
        x = (AddInverse()(images.detach()) if images.shape[1] == 3 else images.detach().clone()).requires_grad_()
        logits = model(x)
        if not isinstance(logits, Tensor) or logits.dim() != 2:
            shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"model must return logits [N, K]; got {shape}")
        chosen = _targets(targets, logits)
        weights = torch.autograd.grad(logits.gather(1, chosen[:, None]).sum(), x)[0]
    return Explanation(x.detach(), logits.detach(), chosen, weights.detach())


def _targets(targets: Tensor | Sequence[int] | int | None, logits: Tensor) -> Tensor:
    n, classes = logits.shape
    if targets is None:
        return logits.detach().argmax(1)
    chosen = torch.as_tensor(targets, device=logits.device)
    if chosen.is_floating_point() or chosen.dtype == torch.bool:
        raise TypeError(f"targets must be integers, the indices of classes; got {chosen.dtype}")
    if chosen.dim() == 0:
        chosen = chosen.expand(n)
    if chosen.shape != (n,):
        raise ValueError(
            f"targets must be one class, or one for each of the {n} images; got shape {list(chosen.shape)}"
        )
    if n and not (0 <= int(chosen.min()) and int(chosen.max()) < classes):
        raise ValueError(f"targets must be between 0 and {classes - 1}; got {chosen.tolist()}")
    return chosen.long()


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and no gradients for parameters: the backward pass then computes the input's alone."""
    modes = [(m, m.training) for m in model.modules()]
    wanted: list[Any] = [p for p in model.parameters() if p.requires_grad]
    try:
        model.eval()
        for p in wanted:
            p.requires_grad_(False)
        yield
    finally:
        for p in wanted:
            p.requires_grad_(True)
        for module, training in modes:
            module.training = training
