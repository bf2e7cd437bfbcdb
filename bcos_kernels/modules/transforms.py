"""From an RGB image to what a B-cos network sees."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


class AddInverse(nn.Module):
    """``[..., C, H, W]`` in [0, 1] to ``[..., 2C, H, W]``: the image and one minus it (B-cos Networks).

    With both, a colour and its opposite have input vectors of the same brightness, and black is no zero vector.

    Raises:
        ValueError: fewer than three axes.
        TypeError: an integer dtype, whose 0 .. 255 has no such inverse.
    """

    def forward(self, image: Tensor) -> Tensor:
        if image.dim() < 3:
            raise ValueError(f"image must be [..., C, H, W]; got {list(image.shape)}")
        if not image.is_floating_point():
            raise TypeError(
                f"image must be of a floating dtype with values in [0, 1]; got {image.dtype}; divide by 255"
            )
        return torch.cat([image, 1 - image], dim=-3)


class Normalize(nn.Module):
    """``(x - mean) / std`` per channel of ``[N, C, H, W]``, as part of the network. Not part of its state dict.

    Raises:
        ValueError: ``mean`` and ``std`` of different lengths, or an input with another number of channels.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std):
            raise ValueError(f"mean has {len(mean)} values, but std has {len(std)}")
        self._values = {"mean": tuple(mean), "std": tuple(std)}
        for name, values in self._values.items():
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Normalize:
        """A change of dtype starts from the exact values again: ``model.double()`` is exact in float64."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, values in self._values.items():
            now = getattr(self, name)
            setattr(self, name, torch.tensor(values, dtype=now.dtype, device=now.device)[:, None, None])
        return self

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[1] != len(self.mean):
            raise ValueError(
                f"input must be [N, {len(self.mean)}, H, W] with the channels (r, g, b, 1-r, 1-g, 1-b) in [0, 1]; got "
                f"{list(x.shape)}; bcos_kernels.AddInverse makes six channels of three"
            )
        return (x - self.mean.to(x.dtype)) / self.std.to(x.dtype)

    def extra_repr(self) -> str:
        return "mean={mean}, std={std}".format(**self._values)
