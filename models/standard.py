"""Builds the conventional networks, with random or with published weights."""

from __future__ import annotations

import re
import urllib.error
from pathlib import Path

import torch
import torchvision.models
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

from models import open_clip_files
from models.checkpoints import load_weights
from models.clip import ClipResNet, clip_resnet50
from models.errors import CheckpointError, UnknownNameError, suggestion
from models.recipes import ModelRecipe
from models.vit import SIZES, simple_vit

_SMALL = re.compile(r"(?P<clip>clip_)?resnet10(?:_w(?P<width>[1-9]\d{0,2}))?")
_SMALL_WIDTH = 32
# Of torchvision's: what `bcos_kernels.bcosify` converts, and what gives logits and nothing else in training.
_FAMILIES = ("convnext", "densenet", "efficientnet", "regnet", "resnet", "resnext", "vgg", "vit_", "wide_resnet")


def build(architecture: str, num_classes: int) -> nn.Module:
    """A conventional network with random weights.

    Args:
        architecture: torchvision's name of a ConvNeXt, DenseNet, EfficientNet, RegNet, ResNet, VGG or ViT; one of
            `models.vit.SIZES`; "resnet10", "resnet10_w{width}": one basic block in each of the four stages, for small
            images (see `_small_resnet`); "clip_resnet50", CLIP's image encoder; or "clip_resnet10", "clip_resnet10_w{width}":
            the same with one bottleneck in each stage, for 64 x 64 images; the width is even.
        num_classes: of no meaning to CLIP's encoders, which give embeddings.

    Raises:
        models.errors.UnknownNameError: none of these.
    """
    if architecture in SIZES:
        return simple_vit(architecture, num_classes)
    if architecture == "clip_resnet50":
        return clip_resnet50()
    if (small := _SMALL.fullmatch(architecture)) is not None:
        width = int(small["width"] or _SMALL_WIDTH)
        if small["clip"] is None:
            return _small_resnet(width, num_classes)
        if width % 2:
            raise UnknownNameError(f"Unknown architecture '{architecture}': its width must be even.")
        return ClipResNet((1, 1, 1, 1), output_dim=16 * width, heads=width // 2, resolution=64, width=width)
    known = [name for name in torchvision.models.list_models(torchvision.models) if name.startswith(_FAMILIES)]
    if architecture not in known:
        raise UnknownNameError(
            f"Unknown architecture '{architecture}'.{suggestion(architecture, [*known, *SIZES, 'clip_resnet50'])} Known: "
            f"torchvision's names that begin with {', '.join(_FAMILIES)}; {', '.join(SIZES)}; clip_resnet50; resnet10 and "
            "clip_resnet10, also with _w and a width."
        )
    return torchvision.models.get_model(architecture, weights=None, num_classes=num_classes)


def load_pretrained(recipe: ModelRecipe, num_classes: int) -> nn.Module:
    """The conventional network with published weights; a classifier of another size starts at random.

    Raises:
        models.errors.CheckpointError: the file is not in its cache and cannot be downloaded, or is damaged.
        models.errors.UserError: CLIP's weights are asked for, and open_clip is not installed.
    """
    if recipe.pretrained is None:
        raise CheckpointError(f"There are no pretrained weights for '{recipe.architecture}'.")
    if recipe.architecture == "clip_resnet50":
        model = build(recipe.architecture, num_classes)
        load_weights(model, open_clip_files.weights("RN50-quickgelu", recipe.pretrained))
        return model
    try:
        known = torchvision.models.get_model_weights(recipe.architecture)
    except ValueError as error:
        raise CheckpointError(f"There are no pretrained weights for '{recipe.architecture}'.") from error
    if recipe.pretrained not in known.__members__:
        raise CheckpointError(
            f"torchvision has no weights '{recipe.pretrained}' for {recipe.architecture}. Known: "
            f"{', '.join(known.__members__)}."
        )
    weights = known[recipe.pretrained]
    try:
        model = torchvision.models.get_model(recipe.architecture, weights=weights)
    except (urllib.error.URLError, OSError, RuntimeError) as error:
        cache = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rsplit("/", 1)[-1]
        raise CheckpointError(
            f"The pretrained weights {weights} could not be loaded: {error}. Put the file from {weights.url} at "
            f"{cache} (the environment variable TORCH_HOME moves that folder), or give your own with --init_weights "
            "PATH."
        ) from error
    resize_classifier(model, num_classes)
    return model


def classifier_name(model: nn.Module) -> str | None:
    """Path of the last linear layer, such as "fc" in a ResNet; CLIP's encoders have no classifier."""
    if isinstance(model, ClipResNet):
        return None
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1]


def resize_classifier(model: nn.Module, num_classes: int) -> None:
    """Puts a new linear layer with random weights at the end where the number of classes is another one."""
    name = classifier_name(model)
    if name is None:
        return
    classifier = model.get_submodule(name)
    assert isinstance(classifier, nn.Linear)
    if classifier.out_features != num_classes:
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, nn.Linear(classifier.in_features, num_classes))


def _small_resnet(width: int, num_classes: int) -> ResNet:
    """A torchvision ResNet of four basic blocks for 32x32 images.

    Stem: 3x3, stride 1. The last stage keeps the resolution of the third, so that 32x32 images end in 4x4 features:
    measured on Digits, that localises better than the usual 2x2 at the same accuracy.
    """
    model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=num_classes)
    model.inplanes = width
    model.conv1 = nn.Conv2d(3, width, kernel_size=3, padding=1, bias=False)
    model.bn1 = nn.BatchNorm2d(width)
    for index, stride in enumerate((1, 2, 2, 1)):
        setattr(model, f"layer{index + 1}", model._make_layer(BasicBlock, width * 2**index, 1, stride=stride))
    model.fc = nn.Linear(width * 8, num_classes)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model
