"""Whether a converted network computes what it has to: both are run on random images before ``bcosify`` returns.

The rules of the conversion know layers by their class and read forward passes with ``torch.fx``. What a forward pass makes
of the classes, weights or settings of its layers, they cannot see: it shows in the numbers.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from bcos_kernels.explain import explain

#: Sides of images that are tried, after the one that the network names.
_SIDES = (64, 96, 224, 32, 128, 256, 384)
#: The largest difference that is rounding, over the largest output; and over what the image changes in the output.
_ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-9}
_AGREEMENT = 1e-3


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy with the same parameters, and modes, settings and buffers of its own.

    Raises:
        ValueError: PyTorch cannot copy the model.
    """
    return _copied(model, {id(p): p for p in model.parameters()})


def full_copy(model: nn.Module) -> nn.Module:
    """A copy with parameters of its own.

    Raises:
        ValueError: PyTorch cannot copy the model.
    """
    return _copied(model, {})


def _copied(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:  # whatever the objects raise that a module may hold
        raise ValueError(
            f"model: a {type(model).__name__} cannot be copied: {error}; if its forward pass stores tensors, let it store "
            "them detached"
        ) from error


def set_mode(model: nn.Module, training: bool) -> None:
    """As ``model.train(training)``, without what modules do there besides (some merge weights)."""
    for module in model.modules():
        module.training = training


def is_runnable(model: nn.Module) -> bool:
    """Whether there is something to compare: the model has values, in one place and dtype."""
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    plain = all(type(t) in (Tensor, nn.Parameter) and not (t.is_meta or t.is_inference()) for t in tensors)
    return plain and len({(t.device, t.dtype) for t in tensors}) == 1


def images_for(model: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Two random images and what the model, in evaluation mode, makes of them; None if it takes no size that is tried."""
    like = next(model.parameters())
    config = getattr(model, "pretrained_cfg", None) or {}
    named = [getattr(model, n, None) for n in ("image_size", "img_size", "input_resolution")]
    sides = [s for s in (*named, (config.get("input_size") or [None])[-1], *_SIDES) if isinstance(s, int)]
    rng = torch.Generator().manual_seed(0)
    for side in dict.fromkeys(sides):
        x = torch.randn(2, 3, side, side, generator=rng, dtype=torch.float64, device="cpu").to(like)
        try:
            with torch.no_grad():
                y = model(x)
        except Exception:  # it takes images of another size
            continue
        if isinstance(y, Tensor) and y.dim() > 0 and len(y) == 2 and y.isfinite().all():
            return x, y
    return None


def difference(network: nn.Module, x: Tensor, expected: Tensor) -> str | None:
    """What is wrong with a network of six channels that has to compute ``expected``; None if nothing is."""
    try:
        with torch.no_grad():
            actual = network(torch.cat([x, -x], 1))
    except Exception as error:
        return f"it fails: {type(error).__name__}: {error}"
    if not isinstance(actual, Tensor) or actual.shape != expected.shape:
        return f"its output has the shape {list(getattr(actual, 'shape', []))} instead of {list(expected.shape)}"
    off = (actual - expected).abs().max()
    varies, size = (expected[0] - expected[1]).abs().max(), expected.abs().max()
    if off <= _AGREEMENT * varies + _ROUNDING[expected.dtype] * size:
        return None
    return f"its output is off by {float(off):.2g}, where the images make a difference of {float(varies):.2g}"


def incompleteness(network: nn.Module, x: Tensor) -> str | None:
    """What is wrong with the explanations of a network without constants; None if contributions make up the logits."""
    try:
        explanation = explain(network, torch.cat([x, -x], 1), add_inverse=False)
    except Exception as error:
        return f"it cannot be explained: {type(error).__name__}: {error}"
    logits = explanation.logits.gather(1, explanation.targets[:, None])[:, 0]
    total = explanation.contributions.sum((1, 2))
    missing, size = (total - logits).abs().max(), logits.abs().max()
    if missing <= 1e-3 * size or not size.isfinite():
        return None
    return f"contributions make up {float(total.abs().max()):.2g} of logits of {float(size):.2g}"
