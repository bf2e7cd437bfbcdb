"""From an RGB image to what a B-cos network sees."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from bcos_kernels.modules.detachable import leaf


class AddInverse(nn.Module):
    """``[..., C, H, W]`` in [0, 1] to ``[..., 2C, H, W]``: the image and one minus it (B-cos Networks).

    With both, a colour and its opposite have input vectors of the same brightness, and black is no zero vector.

    Raises:
        ValueError: fewer than three axes.
        TypeError: an integer dtype, whose 0 .. 255 has no such inverse.
    """

    @leaf
    def forward(self, image: Tensor) -> Tensor:
        if image.dim() < 3:
            raise ValueError(f"image must be [..., C, H, W]; got {list(image.shape)}")
        if not image.is_floating_point():
            raise TypeError(
                f"image must be of a floating dtype with values in [0, 1]; got {image.dtype}; divide by 255"
            )
        return torch.cat([image, 1 - image], dim=-3)


#: By values, device and dtype: made once, since a copy to a GPU takes longer than what is computed with it.
_constants: dict[tuple[tuple[float, ...], torch.device, torch.dtype], Tensor] = {}


def _constant(values: tuple[float, ...], like: Tensor) -> Tensor:
    """``values``, to be broadcast over ``[N, C, H, W]``, on the device and in the dtype of ``like``."""
    # what a compiler, a fake tensor mode or a transform of torch.func makes is its own
    own = torch.compiler.is_compiling() or type(like) is not Tensor or torch._C._are_functorch_transforms_active()
    key = (values, like.device, like.dtype)
    if own or key not in _constants:
        with torch.inference_mode(False):
            made = torch.tensor(values, dtype=like.dtype, device=like.device)[:, None, None]
        if own or type(made) is not Tensor:
            return made
        _constants[key] = made
    return _constants[key]


class Normalize(nn.Module):
    """``(x - mean) / std`` per channel of ``[N, C, H, W]``, as part of the network. Not part of its state dict.

    It computes with constants that are made of the exact values for the device and dtype of the input. There is no tensor to
    be moved, converted or loaded: ``model.double()`` is exact in float64, and a network that is made on the meta device and
    gets its weights by ``load_state_dict(assign=True)`` is complete.

    Attributes:
        mean, std: ``[C, 1, 1]``, on the device and in the dtype that the module was moved to.

    Raises:
        ValueError: ``mean`` and ``std`` of different lengths, or an input with another number of channels.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std):
            raise ValueError(f"mean has {len(mean)} values, but std has {len(std)}")
        self._values = {"mean": tuple(map(float, mean)), "std": tuple(map(float, std))}
        self._like = torch.empty(0, device="cpu" if torch.get_default_device().type == "meta" else None)

    @property
    def channels(self) -> int:
        return len(self._values["mean"])

    @property
    def mean(self) -> Tensor:
        return _constant(self._values["mean"], self._like)

    @property
    def std(self) -> Tensor:
        return _constant(self._values["std"], self._like)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Normalize:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._like = fn(self._like)
        return self

    @leaf
    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[1] != self.channels:
            raise ValueError(
                f"input must be [N, {self.channels}, H, W] with the channels (r, g, b, 1-r, 1-g, 1-b) in [0, 1]; got "
                f"{list(x.shape)}; bcos_kernels.AddInverse makes six channels of three"
            )
        return (x - _constant(self._values["mean"], x)) / _constant(self._values["std"], x)

    def extra_repr(self) -> str:
        return "mean={mean}, std={std}".format(**self._values)
