"""Squeeze-and-excitation: a layer that multiplies its input by a gate, which explanation mode takes as a constant."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from bcos_kernels import reference
from bcos_kernels.modules.detachable import DetachableModule


class DetachableSqueezeExcitation(DetachableModule):
    """``x * gate`` with ``gate = sigmoid(expand(act(squeeze(mean of x))))`` (arXiv 1709.01507).

    Takes over the layers of ``source`` under their own names, torchvision's or timm's, and leaves them as they are, biases
    too: they only make the gate, which is a constant of the linear map that is explained, as queries and keys are.

    Shapes: ``[N, C, H, W]`` to the same.

    Raises:
        ValueError: ``source`` has no structure that is known.
    """

    if TYPE_CHECKING:  # nn.Module says `Tensor | Module`; the children are modules

        def __getattr__(self, name: str) -> Any: ...

    #: the children that lead from the mean to the gate, in order, by package; the first ones are what identifies it
    structures: ClassVar[tuple[tuple[str, ...], ...]] = (
        ("fc1", "activation", "fc2", "scale_activation"),  # torchvision
        ("conv_reduce", "act1", "conv_expand", "gate"),  # timm, EfficientNet
        ("fc1", "bn", "act", "fc2", "gate"),  # timm, others
    )

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        path = self._path(source)
        if path is None:
            raise ValueError(
                f"source: a {type(source).__name__} is no squeeze-and-excitation layer of a known structure"
            )
        self.path = path
        for name, child in source.named_children():
            self.add_module(name, child)
        self.train(source.training)

    @classmethod
    def _path(cls, module: nn.Module) -> tuple[str, ...] | None:
        children = {name for name, _ in module.named_children()}
        # `avgpool` is torchvision's; a further child would do something that is not known here
        return next((p for p in cls.structures if set(p) <= children <= {*p, "avgpool"}), None)

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        return cls._path(module) is not None and not getattr(module, "add_maxpool", False)

    def forward(self, x: Tensor) -> Tensor:
        gate = x.mean((2, 3), keepdim=True)
        for name in self.path:
            gate = self.get_submodule(name)(gate)
        return reference.scaled(x, gate, detach=self.detach)
