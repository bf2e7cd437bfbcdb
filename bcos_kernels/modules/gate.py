"""Squeeze-and-excitation: a layer that multiplies its input by a gate, which explanation mode takes as a constant."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from bcos_kernels import reference
from bcos_kernels.identity import averages_all, known_class
from bcos_kernels.modules.detachable import DetachableModule


class DetachableSqueezeExcitation(DetachableModule):
    """``x * gate`` with ``gate = sigmoid(expand(act(squeeze(mean of x))))`` (arXiv 1709.01507).

    Takes over the layers of ``source`` under their own names, torchvision's or timm's, and leaves them as they are, biases
    too: they only make the gate, which is a constant of the linear map that is explained, as queries and keys are.

    Shapes: ``[N, C, H, W]`` to the same.

    Raises:
        ValueError: ``source`` is of no class that is known, or has another forward pass.
    """

    if TYPE_CHECKING:  # nn.Module says `Tensor | Module`; the children are modules

        def __getattr__(self, name: str) -> Any: ...

    #: the children that lead from the mean to the gate, in order, by class
    paths: ClassVar[dict[str, tuple[str, ...]]] = {
        "torchvision.ops.misc.SqueezeExcitation": ("fc1", "activation", "fc2", "scale_activation"),
        "timm.models._efficientnet_blocks.SqueezeExcite": ("conv_reduce", "act1", "conv_expand", "gate"),
        "timm.layers.squeeze_excite.SEModule": ("fc1", "bn", "act", "fc2", "gate"),
    }

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        if not self.fits(source):
            raise ValueError(f"source: a {type(source).__name__} is no squeeze-and-excitation layer that is known")
        name = known_class(source, self.paths)
        assert name is not None
        self.path = self.paths[name]
        for name, child in source._modules.items():
            self.add_module(name, child)
        self.training = source.training

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        name = known_class(module, cls.paths)
        if name is None or getattr(module, "add_maxpool", False):
            return False
        # torchvision's, which is not called in the converted layer
        if (pool := module._modules.get("avgpool")) is not None and not averages_all(pool):
            return False
        # a further child would do something that is not known here
        return set(cls.paths[name]) <= set(module._modules) <= {*cls.paths[name], "avgpool"}

    def forward(self, x: Tensor) -> Tensor:
        gate = x.mean((2, 3), keepdim=True)
        for name in self.path:
            gate = self.get_submodule(name)(gate)
        return reference.scaled(x, gate, detach=self.detach)
