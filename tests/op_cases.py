"""The matrix of layer configurations that every backend is tested on."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import bcos_kernels as bk
from bcos_kernels import reference

LEARNABLE = "learnable"


@contextmanager
def reference_of_kernels() -> Iterator[None]:
    """The reference with a linear part in the dtype of its input, as kernels have it; in float16 it is wider otherwise."""
    plain = {name: inspect.unwrap(getattr(reference, name)) for name in ("conv2d", "linear")}
    with mock.patch.multiple(reference, **plain):
        yield


@dataclass(frozen=True)
class Case:
    """A call of ``bcos_conv2d`` (``weight`` of rank 4) or ``bcos_linear`` (rank 2)."""

    name: str
    x: tuple[int, ...]
    weight: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)
    bias: bool = False

    @property
    def is_conv(self) -> bool:
        return len(self.weight) == 4

    def inputs(self, dtype: torch.dtype = torch.float64, seed: int = 0, device: str = "cpu") -> dict[str, Tensor]:
        """Leaf tensors that need gradients: x, weight, and where the case has them bias and b."""
        rng = torch.Generator().manual_seed(seed)

        def leaf(*shape: int) -> Tensor:
            values = torch.randn(shape, generator=rng, dtype=torch.float64)
            return values.to(device, dtype).requires_grad_()

        tensors = {"x": leaf(*self.x), "weight": leaf(*self.weight)}
        if self.bias:
            tensors["bias"] = leaf(self.weight[0])
        if self.options.get("b") == LEARNABLE:
            tensors["b"] = torch.tensor(1.7, dtype=dtype, device=device, requires_grad=True)
        return tensors

    def run(self, tensors: dict[str, Tensor], **more: Any) -> Tensor:
        options = {**self.options, **more}
        if "b" in tensors:
            options["b"] = tensors["b"]
        layer = bk.bcos_conv2d if self.is_conv else bk.bcos_linear
        return layer(tensors["x"], tensors["weight"], tensors.get("bias"), **options)

    def with_options(self, **options: Any) -> Case:
        suffix = ",".join(f"{k}={v}" for k, v in options.items())
        return replace(self, name=f"{self.name}[{suffix}]", options={**self.options, **options})


SHAPES = (
    Case("3x3", (2, 6, 7, 5), (8, 6, 3, 3), {"padding": 1}),
    Case("3x3 stride 2", (2, 4, 8, 7), (8, 4, 3, 3), {"padding": 1, "stride": 2}, bias=True),
    Case("7x7 stem", (1, 6, 11, 10), (4, 6, 7, 7), {"padding": 3, "stride": 2}),
    Case("1x1", (2, 5, 4, 3), (8, 5, 1, 1), {}, bias=True),
    Case("1x1 stride 2", (2, 5, 5, 4), (4, 5, 1, 1), {"stride": 2}),
    Case("1x1 padded", (1, 3, 3, 3), (4, 3, 1, 1), {"padding": 1}),
    Case("3x5 pairs", (2, 4, 9, 8), (8, 4, 3, 5), {"padding": (1, 3), "stride": (2, 1), "dilation": (1, 2)}),
    Case("dilation", (1, 4, 9, 9), (4, 4, 3, 3), {"padding": 2, "dilation": 2}, bias=True),
    Case("groups", (2, 8, 6, 6), (8, 2, 3, 3), {"padding": 1, "groups": 4}),
    Case("depthwise", (1, 4, 5, 6), (4, 1, 3, 3), {"padding": 1, "groups": 4}, bias=True),
    Case("2x2 no overlap", (1, 3, 6, 7), (4, 3, 2, 2), {"stride": 2}),
    Case("linear", (4, 3, 7), (8, 7), {}, bias=True),
    Case("linear 2d", (5, 12), (4, 12), {}),
    Case("linear 1d", (12,), (4, 12), {}),
)


def matrix() -> Iterator[Case]:
    """Every shape with every exponent, and every other option with some of them.

    The inner loops are of odd length, so that every second case still has every shape, exponent and option.
    """
    exponents = (1, 1.5, 2, 2.5, LEARNABLE)
    for shape, b in itertools.product(SHAPES, exponents):
        yield shape.with_options(b=b)
    for i, (b, shape) in enumerate(itertools.product((1, 2, 1.25, LEARNABLE), SHAPES[::2])):
        max_out = 2 + i // 2 % 2
        rows = (shape.weight[0] * max_out, *shape.weight[1:])
        yield replace(shape, weight=rows).with_options(b=b, max_out=max_out)
    for b, shape in itertools.product((2, 1.5), SHAPES[1::2]):
        yield shape.with_options(b=b, normalize_weight=True)


def modes(cases: Iterator[Case]) -> Iterator[Case]:
    """Each case as it is, and in explanation mode."""
    for case in cases:
        yield case
        yield case.with_options(detach_scale=True)


def halves() -> tuple[list[Case], list[Case]]:
    """The matrix in both modes, in two halves; each has every shape, exponent and option, with either mode."""
    pairs = [tuple(modes(iter([case]))) for case in matrix()]
    return [pair[i % 2] for i, pair in enumerate(pairs)], [pair[1 - i % 2] for i, pair in enumerate(pairs)]
