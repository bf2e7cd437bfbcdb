"""Small standard networks of every family that ``bcosify`` takes, with random weights and statistics."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable

import timm.models.convnext
import timm.models.densenet
import timm.models.resnet
import timm.models.vision_transformer
import torch
from torch import nn
from torchvision.models import convnext, densenet, efficientnet, regnet, resnet, vgg, vision_transformer

from models.clip import ClipResNet
from models.vit import SimpleViT, Size

CLASSES = 5
#: pixels of a side of the image that all of them take
SIDE = 64


def _vgg(batch_norm: bool) -> nn.Module:
    with torch.device("meta"):  # the classifier alone has a hundred million weights
        model = vgg.VGG(nn.Sequential(), num_classes=CLASSES)
    model.features = vgg.make_layers([8, "M", 16, 16, "M"], batch_norm=batch_norm)
    model.classifier = nn.Sequential(
        nn.Linear(16 * 49, 12), nn.ReLU(True), nn.Dropout(), nn.Linear(12, 12), nn.ReLU(True), nn.Linear(12, CLASSES)
    )
    return model


def _convnext() -> nn.Module:
    blocks = [convnext.CNBlockConfig(8, 16, 1), convnext.CNBlockConfig(16, None, 2)]
    return convnext.ConvNeXt(blocks, stochastic_depth_prob=0.1, layer_scale=0.5, num_classes=CLASSES)


def _efficientnet() -> nn.Module:
    blocks = [
        efficientnet.FusedMBConvConfig(2, 3, 2, 8, 8, 1),
        efficientnet.MBConvConfig(2, 3, 2, 8, 16, 2, width_mult=1.0, depth_mult=1.0),
    ]
    return efficientnet.EfficientNet(blocks, dropout=0.2, num_classes=CLASSES, last_channel=24)


def _regnet(se_ratio: float | None) -> nn.Module:
    blocks = regnet.BlockParams([1, 2], [8, 16], [4, 4], [1.0, 1.0], [2, 2], se_ratio)
    return regnet.RegNet(blocks, num_classes=CLASSES, stem_width=8)


def _timm_resnet(**more: object) -> nn.Module:
    kinds = timm.models.resnet
    return kinds.ResNet(kinds.Bottleneck, (1, 1, 1, 1), CLASSES, channels=(4, 4, 8, 8), stem_width=4, **more)


def _timm_vit(**more: object) -> nn.Module:
    return timm.models.vision_transformer.VisionTransformer(
        img_size=SIDE, patch_size=8, num_classes=CLASSES, embed_dim=16, depth=2, num_heads=2, **more
    )


def _bcos_package_vit(**more: object) -> nn.Module:
    """The conventional form in the public package ``bcos``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it prefers its own entry points, which are full size
        vit = importlib.import_module("bcos.models.vit")
        norms = importlib.import_module("bcos.modules.norms")
        return vit.SimpleViT(
            image_size=SIDE,
            num_classes=CLASSES,
            dim=16,
            depth=2,
            heads=2,
            mlp_dim=32,
            channels=3,
            linear_layer=nn.Linear,
            conv2d_layer=nn.Conv2d,
            norm_layer=nn.LayerNorm,
            norm2d_layer=norms.DetachableGNLayerNorm2d,
            act_layer=nn.GELU,
            **more,
        )


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet": lambda: resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=CLASSES, width_per_group=64),
    "densenet": lambda: densenet.DenseNet(4, (1, 2), 8, num_classes=CLASSES),
    "vgg": lambda: _vgg(batch_norm=False),
    "vgg_bn": lambda: _vgg(batch_norm=True),
    "convnext": _convnext,
    "efficientnet": _efficientnet,
    "regnet_x": lambda: _regnet(None),
    "regnet_y": lambda: _regnet(0.25),
    "vit": lambda: vision_transformer.VisionTransformer(SIDE, 8, 2, 2, 16, 32, num_classes=CLASSES),
    "simple_vit": lambda: SimpleViT(Size(16, 2, 2, 8), CLASSES),
    "vitc": lambda: SimpleViT(Size(16, 2, 2, 1, (4, 8)), CLASSES),
    "bcos_simple_vit": lambda: _bcos_package_vit(patch_size=8),
    "bcos_vitc": lambda: _bcos_package_vit(patch_size=1, conv_stem=[4, 8]),
    "clip_resnet": lambda: ClipResNet((1, 1, 1, 1), output_dim=8, heads=4, resolution=SIDE, width=8),
    "timm_resnet": _timm_resnet,
    "timm_resnet_d": lambda: _timm_resnet(stem_type="deep", avg_down=True),
    "timm_seresnet": lambda: _timm_resnet(block_args={"attn_layer": "se"}),
    "timm_convnext": lambda: timm.models.convnext.ConvNeXt(
        num_classes=CLASSES, depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), ls_init_value=0.5
    ),
    "timm_vit": _timm_vit,
    "timm_deit3": lambda: _timm_vit(init_values=0.5, no_embed_class=True, qk_norm=True, global_pool="avg"),
    "timm_densenet": lambda: timm.models.densenet.DenseNet(4, (1, 2), CLASSES),
    "timm_efficientnet": lambda: timm.create_model("efficientnet_b0", num_classes=CLASSES),
}


def make(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The network in evaluation mode; no parameter or statistic of it is zero, so that nothing hides."""
    torch.manual_seed(0)
    return filled(NETWORKS[name]().to(dtype))


def filled(model: nn.Module) -> nn.Module:
    """The model in evaluation mode, with random parameters and statistics none of which is zero."""
    rng = torch.Generator().manual_seed(0)
    for key, tensor in model.state_dict().items():
        if key.endswith("running_var"):
            tensor.uniform_(0.5, 1.5, generator=rng)
        elif tensor.is_floating_point() and tensor.dim() < 2:
            tensor.add_(torch.randn(tensor.shape, generator=rng, dtype=tensor.dtype), alpha=0.1)
        elif tensor.is_floating_point():
            tensor.normal_(std=tensor[0].numel() ** -0.5, generator=rng)
    return model.eval()
