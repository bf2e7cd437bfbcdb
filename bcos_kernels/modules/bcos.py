"""B-cos convolution and linear layer as modules."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bcos_kernels.functional import Pair, bcos_conv2d, bcos_linear, check_exponent
from bcos_kernels.modules.detachable import DetachableModule


class _BcosLayer(DetachableModule):
    """``b``, ``max_out`` and ``normalize_weight``, and the plain layer ``linear`` that holds weight and bias.

    The plain layer is never called: it is there because public checkpoints name their weights ``<layer>.linear.weight``.
    """

    linear: nn.Module

    def __init__(self, b: float | nn.Parameter, max_out: int, normalize_weight: bool) -> None:
        super().__init__()
        self.b = check_exponent(b)
        if max_out < 1:
            raise ValueError(f"max_out must be at least 1; got {max_out}")
        self.max_out = max_out
        self.normalize_weight = normalize_weight

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

    @property
    def takes_squares(self) -> bool:
        """Whether :meth:`with_squares` can use them: there is one norm, and of the input as it is."""
        return self.linear.groups == 1 and self.linear.padding_mode == "zeros"

    def forward(self, x: Tensor) -> Tensor:
        return self.with_squares(x, None)

    def with_squares(self, x: Tensor, squares: Tensor | None) -> Tensor:
        """:meth:`forward` of an input whose sums of squares are known; see :func:`bcos_kernels.bcos_conv2d`."""
        conv = self.linear
        padding = conv.padding
        if conv.padding_mode != "zeros":
            x = F.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode)
            padding = (0, 0)
        return bcos_conv2d(
            x,
            conv.weight,
            conv.bias,
            b=self.b,
            stride=conv.stride,
            padding=padding,
            dilation=conv.dilation,
            groups=conv.groups,
            max_out=self.max_out,
            normalize_weight=self.normalize_weight,
            detach_scale=self.detach,
            squares=squares,
        )


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
        return bcos_linear(
            x,
            self.linear.weight,
            self.linear.bias,
            b=self.b,
            max_out=self.max_out,
            normalize_weight=self.normalize_weight,
            detach_scale=self.detach,
            squares=squares,
        )
