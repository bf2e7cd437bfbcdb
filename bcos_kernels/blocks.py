"""Blocks of well-known networks whose ``forward`` is replaced by one that runs their layers in fewer passes over memory.

A block is recognised by the forward pass that it has: a look-alike or a subclass with another one stays as it is. What a
block computes does not change, nor does its state dict; when its layers are run together is said in ``modules/fused.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bcos_kernels.identity import class_name, known_class
from bcos_kernels.modules.fused import FusedSequential, norm_relu, norm_relu_conv

_Module = TypeVar("_Module", bound=nn.Module)


def _take_over(new: _Module, source: nn.Module) -> _Module:
    """Everything that ``source`` has: layers, settings, mode, hooks."""
    vars(new).update(vars(source))
    return new


class Block(nn.Module):
    """The layers of ``source``, run in another way."""

    if TYPE_CHECKING:  # nn.Module says `Tensor | Module`; here all are modules

        def __getattr__(self, name: str) -> Any: ...

    #: the class whose forward pass is replaced, by name
    replaces: ClassVar[str]

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        _take_over(self, source)

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        return True


class BasicBlock(Block):
    """torchvision's residual block of two convolutions (arXiv 1512.03385)."""

    replaces = "torchvision.models.resnet.BasicBlock"

    def forward(self, x: Tensor) -> Tensor:
        out = norm_relu_conv(self.bn1, self.relu, self.conv2, self.conv1(x))
        return norm_relu(self.bn2, self.relu, out, x if self.downsample is None else self.downsample(x))


class Bottleneck(Block):
    """torchvision's residual block of three convolutions (arXiv 1512.03385)."""

    replaces = "torchvision.models.resnet.Bottleneck"

    def forward(self, x: Tensor) -> Tensor:
        out = norm_relu_conv(self.bn1, self.relu, self.conv2, self.conv1(x))
        out = norm_relu_conv(self.bn2, self.relu, self.conv3, out)
        return norm_relu(self.bn3, self.relu, out, x if self.downsample is None else self.downsample(x))


class DenseLayer(Block):
    """torchvision's layer of a dense block (arXiv 1608.06993)."""

    replaces = "torchvision.models.densenet._DenseLayer"

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        return not module.memory_efficient  # which recomputes the first half in the backward pass

    def forward(self, x: Tensor | list[Tensor]) -> Tensor:
        x = x if isinstance(x, Tensor) else torch.cat(x, 1)
        x = norm_relu_conv(self.norm1, self.relu1, self.conv1, x)
        x = norm_relu_conv(self.norm2, self.relu2, self.conv2, x)
        return F.dropout(x, self.drop_rate, self.training) if self.drop_rate > 0 else x


_BLOCKS: dict[str, type[Block]] = {kind.replaces: kind for kind in (BasicBlock, Bottleneck, DenseLayer)}


_SEQUENTIAL = class_name(nn.Sequential)


def fused(module: nn.Module) -> nn.Module:
    """``module``, whose layers are converted; or, where its forward pass is known, what runs the same layers together."""
    name = known_class(module, {_SEQUENTIAL, *_BLOCKS})
    if name == _SEQUENTIAL:
        if type(module) is not nn.Sequential and not class_name(type(module)).startswith("torchvision."):
            return module  # it may have methods that its parent calls
        return _take_over(FusedSequential(), module) if FusedSequential.fits(module) else module
    kind = None if name is None else _BLOCKS[name]
    return module if kind is None or not kind.fits(module) else kind(module)
