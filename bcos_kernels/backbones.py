"""Networks of the paper whose ``forward`` is replaced, so that the classifier comes before the pooling.

Averaging after the (non-linear) B-cos classifier instead of before it gives every location its own logits (B-cosification,
arXiv 2411.00715). A backbone takes over the children of a network of a known structure, under their own names,
and replaces only the network's ``forward``. Networks that are none of these keep theirs; see :mod:`bcos_kernels.structure`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from bcos_kernels.modules.fused import norm_relu, norm_relu_conv


class Backbone(nn.Module):
    """The children of ``source``, run in another order."""

    if TYPE_CHECKING:  # nn.Module says `Tensor | Module`; here all are modules

        def __getattr__(self, name: str) -> Any: ...

    #: paths of the children by which the structure is recognised
    structure: ClassVar[tuple[str, ...]]
    #: path of the classifier, a linear layer; None where the network has none
    head: ClassVar[str | None]
    #: the classifier becomes a 1x1 convolution on the feature map
    convolves: ClassVar[bool] = True
    #: children of nn.Sequential are numbered anew, as in the public checkpoints (DenseNet's `features.conv0` is `features.0`)
    renumbered: ClassVar[bool] = True

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        for name, child in source.named_children():
            self.add_module(name, child)

    @classmethod
    def fits(cls, model: nn.Module) -> bool:
        paths = dict(model.named_modules())
        if not all(path in paths for path in cls.structure):
            return False
        return cls.head is None or isinstance(paths.get(cls.head), nn.Linear)


class ResNet(Backbone):
    """torchvision's ResNet, ResNeXt and Wide ResNet (arXiv 1512.03385)."""

    structure = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4", "avgpool", "fc")
    head = "fc"

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(norm_relu(self.bn1, self.relu, self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.avgpool(self.fc(x)).flatten(1)


class DenseNet(Backbone):
    """torchvision's DenseNet (arXiv 1608.06993)."""

    structure = ("features.denseblock1.denselayer1.norm1", "features.norm5", "classifier")
    head = "classifier"

    @classmethod
    def fits(cls, model: nn.Module) -> bool:
        # timm's has a pooling layer, and its norms have the activation inside
        return super().fits(model) and "global_pool" not in model._modules

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.features(x), inplace=True)
        return F.adaptive_avg_pool2d(self.classifier(x), 1).flatten(1)


class SimpleViT(Backbone):
    """Simple vision transformers with patches (arXiv 2205.01580) or a stem of convolutions (arXiv 2106.14881).

    The head, a norm and a linear layer, sees every token; the mean over tokens comes last ("gapReorder").
    """

    structure = ("to_patch_embedding.linear", "positional_embedding", "transformer", "linear_head.norm")
    head = "linear_head.linear"
    convolves = False
    renumbered = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.to_patch_embedding(x)
        x = x.flatten(1, 2) + self.positional_embedding(x)
        return self.linear_head(self.transformer(x)).mean(1)


class ClipResNet(Backbone):
    """OpenAI's CLIP ResNet (arXiv 2103.00020): an image encoder with an attention pool and no classifier."""

    structure = ("conv1", "conv2", "conv3", "relu3", "avgpool", "layer1", "layer4", "attnpool.c_proj")
    head = None

    def forward(self, x: Tensor) -> Tensor:
        x = norm_relu_conv(self.bn1, self.relu1, self.conv2, self.conv1(x))
        x = norm_relu_conv(self.bn2, self.relu2, self.conv3, x)
        x = norm_relu(self.bn3, self.relu3, x)
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.avgpool(x)))))
        return self.attnpool(x)


BACKBONES: tuple[type[Backbone], ...] = (ResNet, DenseNet, SimpleViT, ClipResNet)
