"""Explanations: the linear map that a B-cos network applied to an image, as numbers and as pictures.

Source: B-cos Networks (arXiv 2205.10268); the colour picture is the one of its public code.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bcos_kernels.modules import AddInverse, DetachableModule
from bcos_kernels.modules.detachable import explained

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class _Held:
    """A setting of modules that several calls may need at once: the first one changes it, the last one puts it back.

    For what can only be set on the modules themselves, which all threads share.
    """

    def __init__(self, read: Callable[[Any], bool], write: Callable[[Any, bool], None], wanted: bool) -> None:
        self._read, self._write, self._wanted = read, write, wanted
        self._lock = threading.RLock()
        #: by id: the module, how many calls hold it, and its setting before the first
        self._held: dict[int, tuple[nn.Module, int, bool]] = {}

    @contextmanager
    def __call__(self, modules: Iterable[nn.Module]) -> Iterator[None]:
        taken: list[nn.Module] = []
        try:
            with self._lock:
                for module in modules:
                    _, calls, before = self._held.get(id(module)) or (module, 0, self._read(module))
                    if not calls and before != self._wanted:
                        self._write(module, self._wanted)
                    self._held[id(module)] = (module, calls + 1, before)
                    taken.append(module)
            yield
        finally:
            with self._lock:
                for module in taken:
                    _, calls, before = self._held.pop(id(module))
                    if calls > 1:
                        self._held[id(module)] = (module, calls - 1, before)
                    elif before != self._wanted:
                        self._write(module, before)


def _switch(layer: Any, on: bool) -> None:
    # B-cos v2 and later; the first B-cos code
    (layer.set_explanation_mode if hasattr(layer, "set_explanation_mode") else layer.explanation_mode)(on)


def _set_training(module: nn.Module, training: bool) -> None:
    module.training = training


_switched = _Held(lambda layer: bool(getattr(layer, "detach", False)), _switch, True)
#: The attribute alone: a `train` or `eval` of a module's own may do more (LoRA merges its weights), and is not undone by it.
_evaluated = _Held(lambda module: module.training, _set_training, False)


def _has_switch(module: nn.Module) -> bool:
    """Whether explanation mode is a setting of the module, as in the public packages, and not only of the call."""
    if isinstance(module, DetachableModule):
        return type(module).set_explanation_mode is not DetachableModule.set_explanation_mode
    # the models of B-cos v2 have an `explanation_mode` too, a context manager; only layers have `detach`
    return hasattr(module, "set_explanation_mode") or (
        callable(getattr(module, "explanation_mode", None)) and hasattr(module, "detach")
    )


@contextmanager
def explanation_mode(model: nn.Module) -> Iterator[nn.Module]:
    """Inside the block the model's backward pass sees the linear map that its forward pass applied.

    The mode belongs to the calling thread or asyncio task: elsewhere the same model can be trained meanwhile. Blocks may be
    nested, and may end in any order. Gradients of a forward pass made inside the block stay what they are after it. A copy of
    the model that is made inside is not in explanation mode, and threads that are started inside are not.

    Layers of other packages (``set_explanation_mode``) have a switch that all threads share: it is on while any block
    is open, and then put back. Such a model must not be trained in another thread meanwhile; explain a copy of it.

    Raises:
        ValueError: the model has no such layer: it is no B-cos network.
    """
    with _explaining(model, input_only=False):
        yield model


@contextmanager
def _explaining(model: nn.Module, *, input_only: bool) -> Iterator[None]:
    ours = tuple(m for m in model.modules() if isinstance(m, DetachableModule))
    switched = [m for m in model.modules() if _has_switch(m)]
    if not ours and not switched:
        raise ValueError(
            f"model: {type(model).__name__} has no layer with an explanation mode; convert it with bcosify"
        )
    with explained(ours, input_only=input_only), _switched(switched):
        yield


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
    Threads may explain one model at the same time, and train it meanwhile if it is in evaluation mode. A model in training
    mode is put into evaluation mode while any explanation of it is computed: to train it meanwhile, explain a copy.

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
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        _evaluated(model.modules()),
        _explaining(model, input_only=True),
    ):
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
