"""Layers that follow each other, run in fewer passes over memory.

Where a layer is not the one that is known here, or has hooks (somebody wants to see or change what passes between the two),
or where ``torch.fx`` records what is called, the layers are called one after another, as if this file did not exist.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from bcos_kernels.modules.bcos import BcosConv2d, BcosLinear
from bcos_kernels.modules.detachable import has_hooks, runs
from bcos_kernels.modules.norm import BatchNormUncentered2d, DetachableLayerNorm, is_plain_relu


def norm_relu(norm: nn.Module, relu: nn.Module, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """``relu(norm(x) + residual)``."""
    if not isinstance(x, Proxy) and _fuses(norm, relu) and (residual is None or _alike(residual, x)):
        return norm.followed(x, residual, relu=True)[0]
    z = norm(x)
    y: Tensor = relu(z if residual is None else z + residual)
    return y


def norm_relu_conv(norm: nn.Module, relu: nn.Module, conv: nn.Module, x: Tensor) -> Tensor:
    """``conv(relu(norm(x)))``: the norm's pass also makes the sums of squares for the patch norm of a B-cos convolution."""
    if not isinstance(x, Proxy) and _fuses(norm, relu) and _takes_squares(conv):
        return conv.with_squares(*norm.followed(x, relu=True, squares=True))
    y: Tensor = conv(norm_relu(norm, relu, x))
    return y


def norm_linear(norm: nn.Module, linear: nn.Module, x: Tensor) -> Tensor:
    """``linear(norm(x))``: on a GPU the layer norm's pass also makes the sums of squares for the B-cos linear layer.

    On a CPU there is nothing to gain: the linear layer adds them up while the row is in the cache. Nor under autocast, which
    rounds what the norm writes.
    """
    if not isinstance(x, Proxy) and _feeds(norm, linear) and _gains(x):
        fed: Tensor = linear.with_squares(*norm.with_squares(x))  # type: ignore[operator]  # says `Tensor | Module`
        return fed
    y: Tensor = linear(norm(x))
    return y


class FusedSequential(nn.Sequential):
    """``nn.Sequential`` that runs batch norms together with the ReLU behind them, layer norms with the linear layer."""

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        """Whether there is anything to run together."""
        return any(_fuses(first, second) or _feeds(first, second) for first, second in pairwise(module.children()))

    def forward(self, input: Tensor) -> Tensor:
        layers = list(self)
        while layers:
            layer, *rest = layers
            if len(rest) > 1 and _fuses(layer, rest[0]):
                input, layers = norm_relu_conv(layer, rest[0], rest[1], input), rest[2:]
            elif rest and _fuses(layer, rest[0]):
                input, layers = norm_relu(layer, rest[0], input), rest[1:]
            elif rest and _feeds(layer, rest[0]):
                input, layers = norm_linear(layer, rest[0], input), rest[1:]
            else:
                input, layers = layer(input), rest
        return input


def _fuses(norm: nn.Module, relu: nn.Module) -> TypeGuard[BatchNormUncentered2d]:
    return runs(norm, BatchNormUncentered2d.forward) and not has_hooks(norm) and is_plain_relu(relu)


def _feeds(norm: nn.Module, linear: nn.Module) -> bool:
    return (
        isinstance(norm, DetachableLayerNorm)
        and runs(norm, DetachableLayerNorm.forward)
        and len(norm.normalized_shape) == 1
        and runs(linear, BcosLinear.forward)
        and not has_hooks(norm)
        and not has_hooks(linear)
    )


def _gains(x: Tensor) -> bool:
    return x.is_cuda and not torch.is_autocast_enabled("cuda")


def _alike(residual: Tensor, x: Tensor) -> bool:
    """Otherwise the sum of the two would be broadcast, or of another dtype."""
    return residual.shape == x.shape and residual.dtype == x.dtype


def _takes_squares(conv: nn.Module) -> TypeGuard[BcosConv2d]:
    return runs(conv, BcosConv2d.forward) and not has_hooks(conv) and bool(conv.takes_squares)
