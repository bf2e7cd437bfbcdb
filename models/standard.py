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
from models.errors import CheckpointError, UnknownNameError
from models.recipes import ModelRecipe
from models.vit import SIZES, SimpleViT, simple_vit

_SMALL_WIDTH = 32
_SMALL_CLIP = re.compile(r"clip_resnet10_w(?P<width>[1-9]\d{0,2})")


def build(architecture: str, num_classes: int) -> nn.Module:
    """A conventional network with random weights.

    Args:
        architecture: a torchvision name; one of `models.vit.SIZES`; "resnet10", "resnet10_w{width}": one basic block in
            each of the four stages, for small images (see `_small_resnet`); "clip_resnet50", CLIP's image encoder, or
            "clip_resnet10_w{width}": the same with one bottleneck in each stage, for 64 x 64 images.
        num_classes: of no meaning to CLIP's encoders, which give embeddings.

    Raises:
        models.errors.UnknownNameError: none of these.
    """
    if architecture in SIZES:
        return simple_vit(architecture, num_classes)
    if architecture == "clip_resnet50":
        return clip_resnet50()
    if (small := _SMALL_CLIP.fullmatch(architecture)) is not None:
        width = int(small["width"])
        return ClipResNet((1, 1, 1, 1), output_dim=16 * width, heads=width // 2, resolution=64, width=width)
    if architecture.startswith("resnet10_w"):
        return _small_resnet(int(architecture.removeprefix("resnet10_w")), num_classes)
    if architecture == "resnet10":
        return _small_resnet(_SMALL_WIDTH, num_classes)
    if architecture not in torchvision.models.list_models(module=torchvision.models):
        raise UnknownNameError(f"Unknown architecture '{architecture}'.")
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
    """Path of the last linear layer: "fc" in a ResNet, "classifier" in a DenseNet, "linear_head.linear" in a ViT; CLIP's
    encoders have none."""
    if isinstance(model, ClipResNet):
        return None
    if isinstance(model, SimpleViT):
        return "linear_head.linear"
    return "fc" if isinstance(model, ResNet) else "classifier"


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
