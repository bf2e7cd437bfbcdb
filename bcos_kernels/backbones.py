"""Image classifiers whose head comes before the pooling: the classifier is a 1x1 convolution on the feature map.

Averaging after the (non-linear) B-cos classifier instead of before it gives every location its own logits (B-cosification,
arXiv 2411.00715, section 3). A backbone takes over the children of a network of a known structure, under their own names,
and replaces only the network's ``forward``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn


class Backbone(nn.Module):
    """The children of ``source``, run in another order."""

    if TYPE_CHECKING:  # nn.Module says `Tensor | Module`; here all are modules

        def __getattr__(self, name: str) -> Any: ...

    #: children by which the structure is recognised
    structure: tuple[str, ...]
    #: name of the classifier, a linear layer
    head: str

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        for name, child in source.named_children():
            self.add_module(name, child)

    @classmethod
    def fits(cls, model: nn.Module) -> bool:
        children = dict(model.named_children())
        return all(name in children for name in cls.structure) and isinstance(children[cls.head], nn.Linear)


class ResNet(Backbone):
    """torchvision's ResNet, ResNeXt and Wide ResNet (arXiv 1512.03385)."""

    structure = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4", "avgpool", "fc")
    head = "fc"

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.avgpool(self.fc(x)).flatten(1)


class DenseNet(Backbone):
    """torchvision's DenseNet (arXiv 1608.06993)."""

    structure = ("features", "classifier")
    head = "classifier"

    @classmethod
    def fits(cls, model: nn.Module) -> bool:
        # other networks have children of these names too, but no dense blocks
        return super().fits(model) and any(
            n.startswith("denseblock") for n, _ in model.get_submodule("features").named_children()
        )

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.features(x), inplace=True)
        return F.adaptive_avg_pool2d(self.classifier(x), 1).flatten(1)


BACKBONES: tuple[type[Backbone], ...] = (ResNet, DenseNet)
