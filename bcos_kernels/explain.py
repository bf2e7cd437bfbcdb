"""Explanations: the linear map that a B-cos network applied to an image, as numbers and as pictures.

Source: B-cos Networks (arXiv 2205.10268); the colour picture is the one of its public code.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bcos_kernels.contract import accumulator
from bcos_kernels.modules import AddInverse, BcosConv2d, DetachableModule, Normalize
from bcos_kernels.modules.detachable import explained, has_switch, switch

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: How far images may leave [0, 1]: what resizing them overshoots.
_EXCESS = 0.1
#: As many classes as `repr` names.
_SHOWN = 8


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
                changed = []
                for module in taken:
                    _, calls, before = self._held.pop(id(module))
                    if calls > 1:
                        self._held[id(module)] = (module, calls - 1, before)
                    elif before != self._wanted:
                        changed.append((module, before))
                errors = []
                for module, before in changed:
                    try:
                        self._write(module, before)
                    except Exception as error:  # whatever it is: the others must be put back all the same
                        errors.append(error)
                if errors:
                    raise errors[0]


def _set_training(module: nn.Module, training: bool) -> None:
    module.training = training


_switched = _Held(lambda layer: bool(getattr(layer, "detach", False)), switch, True)
#: The attribute alone: a `train` or `eval` of a module's own may do more (LoRA merges its weights), and is not undone by it.
_evaluated = _Held(lambda module: module.training, _set_training, False)


@contextmanager
def explanation_mode(model: nn.Module) -> Iterator[nn.Module]:
    """Inside the block the model's backward pass sees the linear map that its forward pass applied.

    The mode belongs to the calling thread or asyncio task: elsewhere the same model can be trained meanwhile. Blocks may be
    nested, and may end in any order. The backward pass of a forward pass made inside the block may be called after it, unless
    the model has checkpoints (``torch.utils.checkpoint``): these compute layers again in the backward pass, so call that
    inside the block too, and in an asyncio task without an ``await`` between the two. A copy of the model that is made inside
    is not in explanation mode, and threads that are started inside are not.

    Layers of other packages have a switch that all threads share: it is on while any block is open, and then put back. Such a
    model must not be trained in another thread meanwhile; explain a copy of it.

    Raises:
        ValueError: the model has no such layer: it is no B-cos network.
    """
    with _explaining(model, input_only=False):
        yield model


@contextmanager
def _explaining(model: nn.Module, *, input_only: bool) -> Iterator[None]:
    ours = tuple(m for m in model.modules() if isinstance(m, DetachableModule))
    switched = [m for m in model.modules() if has_switch(m)]
    if not ours and not switched:
        raise ValueError(
            f"model: {type(model).__name__} has no layer with an explanation mode; convert it with bcosify"
        )
    with explained(ours, input_only=input_only), _switched(switched):
        yield


@dataclass(frozen=True, eq=False, repr=False)
class Explanation:
    """What :func:`explain` returns. All tensors are detached and on the model's device."""

    #: what the network saw, ``[N, C, H, W]``; 6 channels: an RGB image and one minus it
    images: Tensor
    #: the model's output, ``[N, K]``
    logits: Tensor
    #: the explained class of each image, ``[N]``, int64
    targets: Tensor
    #: W(x): the dynamic linear weights of the explained logit, ``[N, C, H, W]``
    weights: Tensor

    def __repr__(self) -> str:
        targets = self.targets[:_SHOWN].tolist()
        more = f", and {n} more" if (n := len(self.targets) - _SHOWN) > 0 else ""
        dtype = str(self.weights.dtype).removeprefix("torch.")
        return (
            f"Explanation(images={list(self.images.shape)}, logits={list(self.logits.shape)}, targets={targets}{more}, "
            f"{dtype}, {self.weights.device})"
        )

    @property
    def contributions(self) -> Tensor:
        """Contribution of every location to the explained logit, ``[N, H, W]``.

        They sum to the logit less its bias. Where the network normalises its input (as ``bcosify`` networks do), what the
        subtracted mean contributes is missing from the sum: the map is linear in the normalised image. The same holds for
        the constant one of the inverse channels, where the network adds them itself.
        """
        return (self.images * self.weights).sum(1)

    def rgba(self, *, smooth: int = 15, percentile: float = 99.5) -> Tensor:
        """The colour pictures, ``[N, H, W, 4]`` in [0, 1], in the dtype of the weights.

        Colour: the direction of the weights; opacity: their length, where they contribute positively; 0 where all weights of
        an image are. An image of one channel (two with its inverse) has a grey picture.

        Args:
            smooth: side of the box that smooths the opacity; odd, 1 for none.
            percentile: in [0, 100]; the opacity of each image reaches 1 at this percentile.

        Raises:
            ValueError: ``smooth`` is even or below 1, or ``percentile`` outside [0, 100]; the network sees something else
                than a grey or RGB image and its inverse.
        """
        if not isinstance(smooth, int) or smooth < 1 or smooth % 2 == 0:
            raise ValueError(f"smooth must be odd and at least 1; got {smooth}")
        if not 0 <= percentile <= 100:
            raise ValueError(f"percentile must be between 0 and 100; got {percentile}")
        if not self.has_colours:
            raise ValueError(
                f"rgba() needs 6 channels, an RGB image and its inverse, or 2; the network saw {self.weights.shape[1]}; use "
                "the contributions"
            )
        w = self.weights.to(accumulator(self.weights.dtype))
        colour = (w / (w.abs().amax(1, keepdim=True) + 1e-12)).clamp(min=0)
        rgb, inverse = colour.chunk(2, dim=1)
        rgb = (rgb / (rgb + inverse + 1e-12)).expand(-1, 3, -1, -1)
        alpha = torch.linalg.vector_norm(w, dim=1, keepdim=True)
        alpha = torch.where((self.images * w).sum(1, keepdim=True) < 0, 1e-12, alpha)
        if alpha.numel():
            alpha = F.avg_pool2d(alpha, smooth, stride=1, padding=smooth // 2)
            cut = quantile(alpha.flatten(1), percentile / 100)
            alpha = torch.where(alpha > 0, alpha / cut[:, None, None, None], 0).clamp(0, 1)
        return torch.cat([rgb, alpha], dim=1).permute(0, 2, 3, 1).to(self.weights.dtype)

    @property
    def has_colours(self) -> bool:
        """Whether the network saw an image and its inverse, which :meth:`rgba` makes colours of."""
        return self.weights.shape[1] in (2, 6)

    def plot(self, *, smooth: int = 15, class_names: Sequence[str] | Mapping[int, str] | None = None) -> Figure:
        """A matplotlib figure: a row per image with the image, its colour picture and its contribution map.

        Without the colour picture where there is none; see :meth:`rgba`. ``class_names``: by class, a sequence or mapping.

        Raises:
            ValueError: ``class_names`` has none for an explained class.
            ModuleNotFoundError: matplotlib is not installed; the message says how to get it.
        """
        from bcos_kernels.plotting import plot_explanation

        return plot_explanation(self, smooth=smooth, class_names=class_names)


def explain(
    model: nn.Module,
    images: Tensor,
    targets: Tensor | Sequence[int] | int | None = None,
    *,
    add_inverse: bool | Literal["auto"] = "auto",
) -> Explanation:
    """Explain one logit for each image of a batch, in one forward and one backward pass.

    The model is explained in evaluation mode. Its mode, its parameters' gradients and ``requires_grad`` are left as found.
    Threads may explain one model at the same time, and compute gradients with it meanwhile if it is in evaluation mode; an
    optimiser's step in the middle of an explanation makes that raise. A model in training mode is put into evaluation mode
    while any explanation of it is computed: to train it meanwhile, explain a copy.

    Args:
        model: a B-cos network with logits ``[N, K]``.
        images: ``[N, C, H, W]`` in [0, 1], with or without their inverse channels (for RGB, 6 or 3 channels); in the dtype
            and on the device of the model. Not normalised: networks made by ``bcosify`` do that themselves.
        targets: the class to explain: one for all, one for each image, or None for the predicted ones.
        add_inverse: whether the network gets the inverse channels ``1 - images`` too. "auto": where it has twice as many
            channels as the images, unless it adds them itself. False: the network gets the images as they are, which then
            may have any finite values, such as normalised ones.

    Raises:
        TypeError, ValueError: images or targets that do not fit; no B-cos network.
    """
    if add_inverse not in (True, False, "auto"):
        raise ValueError(f'add_inverse must be True, False or "auto"; got {add_inverse!r}')
    _check_images(images, any_value=add_inverse is False)
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        _evaluated(model.modules()),
        _explaining(model, input_only=True),
    ):
        x, logits = _run(model, _inputs(model, images.detach().clone(), add_inverse))
        if not isinstance(logits, Tensor) or logits.dim() != 2:
            shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"model must return logits [N, K]; got {shape}")
        chosen = _targets(targets, logits)
        weights = torch.autograd.grad(logits.gather(1, chosen[:, None]).sum(), x)[0]
    return Explanation(x.detach(), logits.detach(), chosen, weights.detach())


def _check_images(images: Tensor, *, any_value: bool) -> None:
    if not isinstance(images, Tensor) or not images.is_floating_point():
        got = str(images.dtype) if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"images must be a tensor of a floating dtype with values in [0, 1]; got {got}")
    if images.dim() != 4:
        raise ValueError(f"images must be [N, 6, H, W] or [N, 3, H, W]; got {list(images.shape)}")
    if not images.numel():
        return
    low, high = (float(v) for v in images.detach().aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("images must be finite; they hold NaN or infinity")
    if not any_value and not (-_EXCESS <= low and high <= 1 + _EXCESS):
        raise ValueError(
            f"images must be in [0, 1]; they are in [{low:.4g}, {high:.4g}]; divide those of 0 .. 255 by 255, and do not "
            "normalise them (add_inverse=False is for networks that see other values)"
        )


def _inputs(model: nn.Module, images: Tensor, add_inverse: bool | Literal["auto"]) -> Iterator[Tensor]:
    """What to give to the network; further ones are for when it does not take the first."""
    if add_inverse != "auto":
        yield AddInverse()(images) if add_inverse else images
        return
    got, seen = images.shape[1], list(_channels(model))
    fitting = [channels for channels in seen if channels in (got, 2 * got)]
    if seen and not fitting:
        layouts = f"[N, {seen[0]}, H, W]" + (f" or [N, {seen[0] // 2}, H, W]" if seen[0] % 2 == 0 else "")
        raise ValueError(
            f"images must be {layouts}; got {list(images.shape)} (add_inverse=True or False: whatever the first layer takes)"
        )
    adds_itself = any(isinstance(module, AddInverse) for module in model.modules())
    likely: nn.Module = nn.Identity()
    other: nn.Module = AddInverse()
    if not adds_itself and (fitting[0] == 2 * got if fitting else got == 3):
        likely, other = other, likely
    yield likely(images)
    yield other(images.detach())


def _channels(model: nn.Module) -> Iterator[int]:
    """How many channels the network may see: those of its normalisation, or else of any convolution, as registered."""
    for module in model.modules():
        if isinstance(module, Normalize):
            yield module.channels
            return
        if isinstance(module, (nn.Conv2d, BcosConv2d)) and isinstance(getattr(module, "in_channels", None), int):
            yield module.in_channels


def _run(model: nn.Module, inputs: Iterator[Tensor]) -> tuple[Tensor, Any]:
    """Input and output, of the first input that the network takes."""
    x = next(inputs).requires_grad_()
    try:
        return x, model(x)
    except (RuntimeError, ValueError):
        other = next(inputs, None)
        if other is None:
            raise
        try:
            return (x := other.requires_grad_()), model(x)
        except (RuntimeError, ValueError):
            pass  # the first one says what is wrong
        raise


def _targets(targets: Tensor | Sequence[int] | int | None, logits: Tensor) -> Tensor:
    n, classes = logits.shape
    if targets is None:
        return logits.detach().argmax(1)
    try:
        chosen = torch.as_tensor(targets, device=logits.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"targets must be integers, the indices of classes; got {targets!r}") from error
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


def quantile(x: Tensor, q: float) -> Tensor:
    """``torch.quantile(x, q, dim=1)`` of ``[N, L]``, which takes no more than 16 million numbers."""
    place = q * (x.shape[1] - 1)
    below, above = (x.kthvalue(int(i) + 1, dim=1).values for i in (math.floor(place), math.ceil(place)))
    return below.lerp(above, place - math.floor(place))
