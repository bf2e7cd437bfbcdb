"""B-cos convolution and linear layer as modules."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bcos_kernels.functional import (
    Pair,
    bcos_conv2d,
    bcos_linear,
    check_exponent,
    conv2d_scaled,
    is_special,
    linear_scaled,
)
from bcos_kernels.modules.detachable import DetachableModule, constants, has_hooks

#: What a convolution is told besides its weights.
_GEOMETRY = (
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "groups",
    "padding_mode",
    "_reversed_padding_repeated_twice",
)


#: The methods that make torch's layers what they are; from now on, a method that is put in their place shows.
_CONV2D, _CONVOLVE, _LINEAR = nn.Conv2d.forward, nn.Conv2d._conv_forward, nn.Linear.forward


def _runs_as_torch(linear: nn.Module) -> bool:
    """Whether the layer's output is that of torch's own for its weight and bias.

    A parametrised layer is a subclass with the same forward pass, whose weight and bias are what they should be when read.
    """
    kind, own = type(linear), vars(linear)
    if "forward" in own:
        return False
    if issubclass(kind, nn.Conv2d):
        return kind.forward is _CONV2D and kind._conv_forward is _CONVOLVE and "_conv_forward" not in own
    return issubclass(kind, nn.Linear) and kind.forward is _LINEAR


class _BcosLayer(DetachableModule):
    """``b``, ``max_out`` and ``normalize_weight``, and the plain layer ``linear`` that holds weight and bias.

    Public checkpoints name their weights ``<layer>.linear.weight``. The plain layer need not be called: its weight and bias
    are all that a fused operation needs. It is called where it is more than a plain layer: replaced (LoRA), a subclass, with
    hooks (pruning, weight norm, observers) or with weights of another class. Then its output is scaled.
    """

    linear: nn.Module

    def __init__(self, b: float | nn.Parameter, max_out: int, normalize_weight: bool) -> None:
        super().__init__()
        self.b = check_exponent(b)
        if max_out < 1:
            raise ValueError(f"max_out must be at least 1; got {max_out}")
        self.max_out = max_out
        self.normalize_weight = normalize_weight

    def _is_plain(self, linear: nn.Module) -> bool:
        """Whether the output of ``linear`` is that of torch's layer for its weight and bias, and nobody listens."""
        return _runs_as_torch(linear) and not has_hooks(linear)

    def _called(self, x: Tensor) -> Tensor:
        """The output of ``linear``, divided by the length of its rows of weights where that is wanted."""
        linear = self.linear
        u: Tensor = linear(x)
        if not self.normalize_weight:
            return u
        weight, bias = getattr(linear, "weight", None), getattr(linear, "bias", None)
        if not isinstance(weight, Tensor) or not _runs_as_torch(linear) or is_special(weight):
            raise ValueError(
                f"normalize_weight=True: linear is a {type(linear).__name__}, and it is not known how its output depends on "
                "the length of its weights; wrap or shard the whole B-cos layer, or use normalize_weight=False"
            )
        axes = [1] * (weight.dim() - 2)  # of the output, behind its channels
        length = torch.linalg.vector_norm(weight.flatten(1), dim=1).view(-1, *axes)
        return u / length if bias is None else (u - (shift := bias.view(-1, *axes))) / length + shift

    @property
    def weight(self) -> nn.Parameter:
        return self.linear.weight  # type: ignore[return-value]

    @property
    def bias(self) -> nn.Parameter | None:
        return self.linear.bias  # type: ignore[return-value]

    def extra_repr(self) -> str:
        b = f"learnable, now {self.b.item():g}" if isinstance(self.b, Tensor) else f"{self.b:g}"
        parts = [f"B={b}"]
        if self.max_out > 1:
            parts.append(f"max_out={self.max_out}")
        if self.normalize_weight:
            parts.append("normalize_weight=True")
        return ", ".join(parts)


class BcosConv2d(_BcosLayer):
    """B-cos convolution; arguments as for ``torch.nn.Conv2d``, and those of :func:`bcos_kernels.bcos_conv2d`.

    Args:
        bias: off by default, unlike ``nn.Conv2d``: a bias is no part of the explanation.
        padding_mode: as for ``nn.Conv2d``; what is padded counts in the patch norm, as it does in the dot product.
        b: exponent, a number >= 1, or an ``nn.Parameter`` with one element to learn it.
        max_out: M; the layer has ``out_channels * M`` rows of weights.
        normalize_weight: unit norm per row of weights (B-cos v2).

    Shapes: ``[N, in_channels, H, W]`` to ``[N, out_channels, Ho, Wo]``. Parameters: ``linear.weight`` and ``linear.bias``.

    Raises:
        ValueError: B below 1, ``max_out`` below 1; what ``nn.Conv2d`` refuses.
    """

    linear: nn.Conv2d

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: Pair | str = 0,
        dilation: Pair = 1,
        groups: int = 1,
        bias: bool = False,
        padding_mode: str = "zeros",
        *,
        b: float | nn.Parameter = 2.0,
        max_out: int = 1,
        normalize_weight: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(b, max_out, normalize_weight)
        self.linear = nn.Conv2d(
            in_channels,
            out_channels * max_out,
            kernel_size,  # type: ignore[arg-type]  # nn.Conv2d takes any pair
            stride,  # type: ignore[arg-type]
            padding,  # type: ignore[arg-type]
            dilation,  # type: ignore[arg-type]
            groups,
            bias,
            padding_mode,  # type: ignore[arg-type]
            device,
            dtype,
        )
        self.in_channels, self.out_channels = in_channels, out_channels
        #: for an inner layer that will be replaced by one that does not say
        self._geometry = SimpleNamespace(**{name: getattr(self.linear, name) for name in _GEOMETRY})

    @property
    def takes_squares(self) -> bool:
        """Whether :meth:`with_squares` takes them: there is one norm, and of the input as it is."""
        linear = self.linear
        return getattr(linear, "groups", 0) == 1 and getattr(linear, "padding_mode", "") == "zeros"

    def _geometry_of(self, linear: nn.Module) -> Any:
        """What has kernel size, stride, and so on: the inner layer, or the only convolution in it that could be it, or else
        the settings that this layer was made with.
        """
        if isinstance(linear, nn.Conv2d):
            return linear
        sizes = (self.in_channels, self.out_channels * self.max_out)
        inside = [m for m in linear.modules() if isinstance(m, nn.Conv2d) and (m.in_channels, m.out_channels) == sizes]
        return inside[0] if len(inside) == 1 else self._geometry

    def forward(self, x: Tensor) -> Tensor:
        return self.with_squares(x, None)

    def with_squares(self, x: Tensor, squares: Tensor | None) -> Tensor:
        """:meth:`forward` of an input whose sums of squares are known; see :func:`bcos_kernels.bcos_conv2d`.

        They are not used where the inner layer is called.
        """
        conv = self.linear
        detach, constant = self.modes()
        if not self._is_plain(conv) or is_special(weight := conv.weight):
            u, conv = self._called(x), self._geometry_of(conv)
            x, padding = _padded(x, conv)
            return conv2d_scaled(
                u,
                x,
                conv.kernel_size,
                b=self.b,
                stride=conv.stride,
                padding=padding,
                dilation=conv.dilation,
                groups=conv.groups,
                max_out=self.max_out,
                out_channels=self.out_channels,
                detach_scale=detach,
            )
        bias = conv.bias
        if constant:
            weight, bias = constants(weight, bias)
        x, padding = _padded(x, conv)
        return bcos_conv2d(
            x,
            weight,
            bias,
            b=self.b,
            stride=conv.stride,
            padding=padding,
            dilation=conv.dilation,
            groups=conv.groups,
            max_out=self.max_out,
            normalize_weight=self.normalize_weight,
            detach_scale=detach,
            squares=squares,
        )


def _padded(x: Tensor, conv: Any) -> tuple[Tensor, Any]:
    """``x`` with the padding of another mode than zeros, and what is left to be padded with zeros."""
    if conv.padding_mode == "zeros":
        return x, conv.padding
    return F.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode), (0, 0)


class BcosMapClassifier(BcosConv2d):
    """A 1x1 B-cos convolution on the feature map, and the mean of its logits over all locations.

    Stands in the place of a linear classifier behind global average pooling, when the pooling is left out. The feature map
    may arrive flattened, as the pooled one did.

    Shapes: ``[N, C, H, W]`` or ``[N, C * H * W]`` to ``[N, out_channels]``.

    Source: B-cosification (arXiv 2411.00715).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        bias: bool = False,
        *,
        b: float | nn.Parameter = 2.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, 1, bias=bias, b=b, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 2:
            x = x.unflatten(1, (self.in_channels, -1, 1))
        return super().forward(x).mean((2, 3))


class BcosLinear(_BcosLayer):
    """B-cos linear layer; arguments as for ``torch.nn.Linear``, and those of :func:`bcos_kernels.bcos_linear`.

    Args:
        bias: off by default, unlike ``nn.Linear``: a bias is no part of the explanation.
        b, max_out, normalize_weight: as for :class:`BcosConv2d`.

    Shapes: ``[..., in_features]`` to ``[..., out_features]``. Parameters: ``linear.weight`` and ``linear.bias``.
    """

    linear: nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        b: float | nn.Parameter = 2.0,
        max_out: int = 1,
        normalize_weight: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(b, max_out, normalize_weight)
        self.linear = nn.Linear(in_features, out_features * max_out, bias, device, dtype)
        self.in_features, self.out_features = in_features, out_features

    def forward(self, x: Tensor) -> Tensor:
        return self.with_squares(x, None)

    def with_squares(self, x: Tensor, squares: Tensor | None) -> Tensor:
        """:meth:`forward` of an input whose sums of squares are known; see :func:`bcos_kernels.bcos_linear`."""
        linear = self.linear
        detach, constant = self.modes()
        if not self._is_plain(linear) or is_special(weight := linear.weight):
            return linear_scaled(
                self._called(x),
                x,
                b=self.b,
                max_out=self.max_out,
                out_features=self.out_features,
                detach_scale=detach,
            )
        bias = linear.bias
        if constant:
            weight, bias = constants(weight, bias)
        return bcos_linear(
            x,
            weight,
            bias,
            b=self.b,
            max_out=self.max_out,
            normalize_weight=self.normalize_weight,
            detach_scale=detach,
            squares=squares,
        )
