"""Attribution methods behind one signature: ``(images [N, C, H, W], targets [N]) -> map [N, H, W]``.

``map[i]`` says how much every pixel of ``images[i]`` speaks for (positive) or against (negative) class ``targets[i]``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

import bcos_kernels as bk

Attribution = Callable[[Tensor, Tensor], Tensor]


def is_bcos(model: nn.Module) -> bool:
    """Whether ``model`` has a layer with an explanation mode: ours, or one of the public B-cos packages."""
    return any(hasattr(module, "set_explanation_mode") for module in model.modules())


def default_attribution(model: nn.Module) -> Attribution:
    """The method that fits ``model``: its own contribution map if it is a B-cos network, else Input x Gradient."""
    return bcos_contributions(model) if is_bcos(model) else input_x_gradient(model)


def bcos_contributions(model: nn.Module) -> Attribution:
    """The contribution map of a B-cos network, ``(x * W(x)).sum(channels)`` (B-cos Networks, arXiv 2205.10268).

    Raises ValueError if ``model`` is no B-cos network: for such a network the map would be a plain Input x Gradient under
    the wrong name.
    """
    if not is_bcos(model):
        raise ValueError(
            f"model: {type(model).__name__} has no B-cos layer, so it has no B-cos contribution map; "
            "convert it with bcos_kernels.bcosify, or use input_x_gradient"
        )

    def attribute(images: Tensor, targets: Tensor) -> Tensor:
        check_batch(images, targets)
        return bk.explain(model, images, targets).contributions

    return attribute


def input_x_gradient(model: nn.Module) -> Attribution:
    """Input x Gradient of the target's logit, summed over channels, for any differentiable classifier.

    The network runs in eval mode and is put back as it was; gradients of its parameters are not touched.
    """

    def attribute(images: Tensor, targets: Tensor) -> Tensor:
        check_batch(images, targets)
        inputs = images.detach().clone().requires_grad_()
        with evaluating(model), torch.enable_grad():
            logits = model(inputs)
            check_targets(targets, logits)
            chosen = logits.gather(1, targets.to(logits.device)[:, None])
            (gradient,) = torch.autograd.grad(chosen.sum(), inputs)
        return (inputs.detach() * gradient).sum(1)

    return attribute


def check_batch(images: Tensor, targets: Tensor) -> None:
    """Raise ValueError unless ``images`` is ``[N, C, H, W]`` and ``targets`` holds N integers."""
    if images.ndim != 4:
        raise ValueError(f"images: expected [N, C, H, W], got shape {list(images.shape)}")
    if targets.ndim != 1 or len(targets) != len(images):
        raise ValueError(f"targets: expected one class for each of {len(images)} images, got {list(targets.shape)}")
    if targets.is_floating_point() or targets.dtype == torch.bool:
        raise ValueError(f"targets: expected class numbers of an integer type, got {targets.dtype}")


def check_targets(targets: Tensor, logits: Tensor) -> None:
    """Raise ValueError unless ``logits`` is ``[N, K]`` and every target lies in ``0 .. K-1``."""
    if logits.ndim != 2:
        raise ValueError(f"model: expected logits [N, K], got shape {list(logits.shape)}")
    if len(targets) and not (0 <= int(targets.min()) and int(targets.max()) < logits.shape[1]):
        raise ValueError(
            f"targets: classes {int(targets.min())} to {int(targets.max())} do not fit a model with {logits.shape[1]} "
            f"classes (0 to {logits.shape[1] - 1})"
        )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put ``model`` in eval mode, and every module back to the mode that it was in."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
