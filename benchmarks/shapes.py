"""The layers that are measured: every distinct one of a network at 224 x 224, by name of the network; and their relatives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Layer:
    """A convolution over ``size x size`` pixels, or, with ``tokens``, a linear layer."""

    network: str
    channels: int
    out: int
    kernel: int = 1
    stride: int = 1
    size: int = 1
    tokens: int = 0
    groups: int = 1
    max_out: int = 1
    b: float = 2.0

    @property
    def name(self) -> str:
        special = {
            f" g{self.groups}": self.groups > 1,
            f" M{self.max_out}": self.max_out > 1,
            f" B{self.b}": self.b != 2,
        }
        suffix = "".join(text for text, wanted in special.items() if wanted)
        if self.tokens:
            return f"linear {self.channels}-{self.out} on {self.tokens} tokens{suffix}"
        stride = f" s{self.stride}" if self.stride > 1 else ""
        return f"{self.kernel}x{self.kernel}{stride} {self.channels}-{self.out} at {self.size}{suffix}"

    @property
    def weight_shape(self) -> tuple[int, ...]:
        rows = self.out * self.max_out
        return (rows, self.channels) if self.tokens else (rows, self.channels // self.groups, self.kernel, self.kernel)

    @property
    def padding(self) -> int:
        return self.kernel // 2


def resnet50() -> Iterator[Layer]:
    """25: the 24 of the converted network, and the conventional network's own first layer, of three channels."""
    net = "resnet50"
    yield Layer(net, 3, 64, 7, 2, 224)
    yield Layer(net, 6, 64, 7, 2, 224)
    size, channels = 56, 64
    for width, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        small = size // stride
        yield Layer(net, channels, width, size=size)
        yield Layer(net, width, width, 3, stride, size)
        yield Layer(net, width, 4 * width, size=small)
        if stride > 1:
            yield Layer(net, channels, 4 * width, stride=stride, size=size)
            yield Layer(net, width, width, 3, size=small)
        yield Layer(net, 4 * width, width, size=small)
        channels, size = 4 * width, small
    yield Layer(net, 2048, 1000, size=7)


def densenet121() -> Iterator[Layer]:
    net = "densenet121"
    yield Layer(net, 6, 64, 7, 2, 224)
    channels, size = 64, 56
    for block, layers in enumerate((6, 12, 24, 16)):
        for _ in range(layers):
            yield Layer(net, channels, 128, size=size)
            yield Layer(net, 128, 32, 3, size=size)
            channels += 32
        if block < 3:
            yield Layer(net, channels, channels // 2, size=size)
            channels, size = channels // 2, size // 2
    yield Layer(net, channels, 1000, size=7)


def _vit(net: str, width: int) -> Iterator[Layer]:
    tokens = 14 * 14
    yield Layer(net, 6 * 16 * 16, width, tokens=tokens)
    yield Layer(net, width, width, tokens=tokens)
    yield Layer(net, width, 4 * width, tokens=tokens)
    yield Layer(net, 4 * width, width, tokens=tokens)
    yield Layer(net, width, 1000, tokens=tokens)


def relatives() -> Iterator[Layer]:
    """One of each kind that the networks do not have: depthwise (ConvNeXt, EfficientNet), grouped, MaxOut, another B."""
    net = "relatives"
    yield Layer(net, 384, 384, 7, size=14, groups=384)
    yield Layer(net, 96, 96, 3, size=56, groups=96)
    yield Layer(net, 256, 256, 3, size=14, groups=32)
    yield Layer(net, 128, 128, 3, size=28, max_out=2)
    yield Layer(net, 256, 256, size=14, max_out=2)
    yield Layer(net, 128, 128, 3, size=28, b=1.5)
    yield Layer(net, 256, 1024, size=14, b=1.5)
    yield Layer(net, 384, 1536, tokens=196, b=1.5)


SETS: dict[str, Callable[[], Iterator[Layer]]] = {
    "resnet50": resnet50,
    "densenet121": densenet121,
    "vit_s": lambda: _vit("vit_s", 384),
    "vit_b": lambda: _vit("vit_b", 768),
    "relatives": relatives,
}


def layers(network: str) -> list[Layer]:
    """The distinct ones, in the order of the network."""
    return list(dict.fromkeys(SETS[network]()))
