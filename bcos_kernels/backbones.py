"""Networks of the paper whose ``forward`` is replaced, so that the classifier comes before the pooling.

Averaging after the (non-linear) B-cos classifier instead of before it gives every location its own logits (B-cosification,
arXiv 2411.00715). A backbone takes over the children of a network of a known class, under their own names, and replaces only
the network's ``forward``. Networks with another forward pass keep theirs; see :mod:`bcos_kernels.structure`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from bcos_kernels.identity import averages_all, class_name, has_any_hook, known_class
from bcos_kernels.modules.fused import norm_relu, norm_relu_conv

_LINEAR = class_name(nn.Linear)
_IDENTITY = class_name(nn.Identity)


class Backbone(nn.Module):
    """The children of ``source``, run in another order."""

    if TYPE_CHECKING:  # nn.Module says `Tensor | Module`; here all are modules

        def __getattr__(self, name: str) -> Any: ...

    #: the classes whose forward pass is replaced, by name
    classes: ClassVar[tuple[str, ...]]
    #: path of the classifier, a linear layer; None where the network has none
    head: ClassVar[str | None]
    #: the classifier becomes a 1x1 convolution on the feature map
    convolves: ClassVar[bool] = True
    #: children of nn.Sequential are numbered anew, as in the public checkpoints (DenseNet's `features.conv0` is `features.0`)
    renumbered: ClassVar[bool] = True

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        for name, child in source._modules.items():
            self.add_module(name, child)
        self.training = source.training

    @classmethod
    def fits(cls, model: nn.Module) -> bool:
        """Whether the model's forward pass is one that this class replaces, on the layers that it expects."""
        if known_class(model, cls.classes) is None or has_any_hook(model):
            return False
        head = dict(model.named_modules(remove_duplicate=False)).get(cls.head or "")
        return cls.head is None or (head is not None and known_class(head, (_LINEAR,)) is not None)


class ResNet(Backbone):
    """torchvision's ResNet, ResNeXt and Wide ResNet (arXiv 1512.03385)."""

    classes = ("torchvision.models.resnet.ResNet",)
    head = "fc"

    @classmethod
    def fits(cls, model: nn.Module) -> bool:
        return super().fits(model) and averages_all(model.get_submodule("avgpool"))

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(norm_relu(self.bn1, self.relu, self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.avgpool(self.fc(x)).flatten(1)


class DenseNet(Backbone):
    """torchvision's DenseNet (arXiv 1608.06993)."""

    classes = ("torchvision.models.densenet.DenseNet",)
    head = "classifier"

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.features(x), inplace=True)
        return F.adaptive_avg_pool2d(self.classifier(x), 1).flatten(1)


class SimpleViT(Backbone):
    """Simple vision transformers with patches (arXiv 2205.01580) or a stem of convolutions (arXiv 2106.14881).

    The head, a norm and a linear layer, sees every token; the mean over tokens comes last ("gapReorder").
    """

    classes = ("bcos.models.vit.SimpleViT", "bcos_kernels/SimpleViT")
    head = "linear_head.linear"
    convolves = False
    renumbered = False

    @classmethod
    def fits(cls, model: nn.Module) -> bool:
        latent = model._modules.get("to_latent")
        return super().fits(model) and (latent is None or known_class(latent, (_IDENTITY,)) is not None)

    def forward(self, x: Tensor) -> Tensor:
        x = self.to_patch_embedding(x)
        x = x.flatten(1, 2) + self.positional_embedding(x)
        return self.linear_head(self.transformer(x)).mean(1)


class ClipResNet(Backbone):
    """OpenAI's CLIP ResNet (arXiv 2103.00020): an image encoder with an attention pool and no classifier."""

    classes = ("clip.model.ModifiedResNet", "bcos_kernels/ClipResNet")
    head = None

    @classmethod
    def fits(cls, model: nn.Module) -> bool:
        return super().fits(model) and "relu3" in model._modules  # an early release of CLIP had one ReLU for all

    def forward(self, x: Tensor) -> Tensor:
        x = norm_relu_conv(self.bn1, self.relu1, self.conv2, self.conv1(x))
        x = norm_relu_conv(self.bn2, self.relu2, self.conv3, x)
        x = norm_relu(self.bn3, self.relu3, x)
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.avgpool(x)))))
        return self.attnpool(x)


BACKBONES: tuple[type[Backbone], ...] = (ResNet, DenseNet, SimpleViT, ClipResNet)
