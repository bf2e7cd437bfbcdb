"""B-cosification: a standard network becomes a B-cos network that starts from the same weights.

Source: B-cosification (arXiv 2411.00715, section 3); the keys of the converted state dicts are those of its public
checkpoints.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from bcos_kernels.backbones import BACKBONES, Backbone
from bcos_kernels.functional import check_exponent
from bcos_kernels.modules import (
    BatchNormUncentered2d,
    BcosConv2d,
    BcosLinear,
    DetachableGELU,
    DetachableGroupNorm2d,
    DetachableLayerNorm,
    LogitLayer,
    Normalize,
)

_RGB_STATISTICS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}


class BcosNetwork(nn.Module):
    """Normalisation, the converted network (``model``) and the logit layer. Only ``model`` has state.

    Input ``[N, 6, H, W]``: (r, g, b, 1-r, 1-g, 1-b) in [0, 1]. Output: logits ``[N, classes]``.
    """

    def __init__(self, model: nn.Module, normalize: nn.Module, logit_layer: nn.Module) -> None:
        super().__init__()
        self.normalize = normalize
        self.model = model
        self.logit_layer = logit_layer

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.logit_layer(self.model(self.normalize(x)))
        return logits


def bcosify(
    model: nn.Module,
    *,
    num_classes: int | None = None,
    b: float | Tensor = 2.0,
    normalize: Literal["imagenet", "clip"] | None = "imagenet",
    logit_bias: float | Literal["auto"] | None = "auto",
) -> BcosNetwork:
    """A B-cos network made of a standard one, weights and all. ``model`` itself is not touched.

    Convolutions and linear layers become B-cos layers with the same weights, the first one on six channels; batch norms lose
    their mean; max pooling becomes average pooling; the classifier moves before the global pooling; every bias is removed.
    The result is meant to be fine-tuned: with B = 2 it is another function than ``model``.

    Args:
        model: a torchvision ResNet (18 to 152, ResNeXt, Wide) or DenseNet, or a network with the same structure; any number
            of classes and any input size.
        num_classes: None keeps the classifier. Another number than the classifier has replaces it by a new, random one.
        b: exponent of every layer, a number >= 1. A tensor gives every layer a learnable exponent that starts there.
        normalize: with whose mean and standard deviation the network normalises its own input; None: not at all.
        logit_bias: added to the logits; "auto" is -log(classes - 1), None nothing.

    Returns:
        The converted network, in the mode, dtype and device of ``model``.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: ``model`` has no structure that can be converted; it is already a B-cos network; other values that do not
            fit.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    for name, module in model.named_modules():
        if isinstance(module, (BcosConv2d, BcosLinear, BcosNetwork)):
            raise ValueError(f"model is a B-cos network already: {name or 'model'} is a {type(module).__name__}")
    if normalize is not None and normalize not in _RGB_STATISTICS:
        raise ValueError(f'normalize must be "imagenet", "clip" or None; got {normalize!r}')
    if isinstance(logit_bias, str) and logit_bias != "auto":
        raise ValueError(f'logit_bias must be a number, "auto" or None; got {logit_bias!r}')
    exponent = check_exponent(b)
    kind = _backbone_for(model)
    _check_first_layer(model)

    network = kind(copy.deepcopy(model))
    network.train(model.training)
    head = getattr(network, kind.head)
    if num_classes is not None and num_classes != head.out_features:
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2; got {num_classes}")
        head = nn.Linear(head.in_features, num_classes, device=head.weight.device, dtype=head.weight.dtype)
    classes = head.out_features
    setattr(network, kind.head, _pointwise_convolution(head))
    _double_first_layer(network)
    _convert_children(network, exponent)
    _remove_biases(network)

    if logit_bias == "auto":
        logit_bias = -math.log(classes - 1) if classes > 1 else None
    like = head.weight
    return (
        BcosNetwork(network, _normalization(normalize), LogitLayer(None, logit_bias))
        .to(device=like.device, dtype=like.dtype)
        .train(model.training)
    )


def _normalization(name: str | None) -> nn.Module:
    if name is None:
        return nn.Identity()
    mean, std = _RGB_STATISTICS[name]
    return Normalize((*mean, *(1 - m for m in mean)), std * 2)


def _backbone_for(model: nn.Module) -> type[Backbone]:
    for kind in BACKBONES:
        if kind.fits(model):
            return kind
    raise ValueError(
        f"model: cannot convert a {type(model).__name__}: its structure is none of "
        f"{', '.join(k.__name__ for k in BACKBONES)} (children {[n for n, _ in model.named_children()]})"
    )


def _first_convolutions(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.in_channels == 3 and m.groups == 1]


def _check_first_layer(model: nn.Module) -> None:
    found = _first_convolutions(model)
    if len(found) != 1:
        where = f"at {', '.join(found)}" if found else "nowhere"
        raise ValueError(f"model must have one convolution with three input channels, its first layer; found {where}")


def _double_first_layer(model: nn.Module) -> None:
    """Six channels for three: ``cat(w, -w) / 2`` gives the same function of (x, 1 - x), normalised, as ``w`` of x."""
    conv = model.get_submodule(_first_convolutions(model)[0])
    assert isinstance(conv, nn.Conv2d)
    conv.in_channels = 6
    with torch.no_grad():
        conv.weight = nn.Parameter(torch.cat([conv.weight, -conv.weight], dim=1) / 2, conv.weight.requires_grad)


def _pointwise_convolution(linear: nn.Linear) -> nn.Conv2d:
    conv = nn.Conv2d(linear.in_features, linear.out_features, 1, bias=False, device="meta")
    conv.weight = nn.Parameter(linear.weight.detach()[:, :, None, None], linear.weight.requires_grad)
    return conv.train(linear.training)


def _exponent_for_layer(b: float | Tensor, weight: Tensor) -> float | nn.Parameter:
    """A learnable exponent is each layer's own."""
    return nn.Parameter(b.detach().clone().reshape(()).to(weight)) if isinstance(b, Tensor) else b


def _bcos_conv2d(conv: nn.Conv2d, b: float | Tensor) -> nn.Module:
    new = BcosConv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        conv.stride,
        conv.padding,
        conv.dilation,
        conv.groups,
        padding_mode=conv.padding_mode,
        b=_exponent_for_layer(b, conv.weight),
        device="meta",
    )
    new.linear.weight = conv.weight
    return new


def _bcos_linear(linear: nn.Linear, b: float | Tensor) -> nn.Module:
    new = BcosLinear(linear.in_features, linear.out_features, b=_exponent_for_layer(b, linear.weight), device="meta")
    new.linear.weight = linear.weight
    return new


def _uncentered_batch_norm(norm: nn.BatchNorm2d, b: float | Tensor) -> nn.Module:
    # the bias would become bias - mean / std * weight, but no bias survives the conversion
    new = BatchNormUncentered2d(
        norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats, bias=False, device="meta"
    )
    new.weight = norm.weight
    for buffer in ("running_mean", "running_var", "num_batches_tracked"):
        setattr(new, buffer, getattr(norm, buffer))
    return new


def _average_pool(pool: nn.MaxPool2d, b: float | Tensor) -> nn.Module:
    return nn.AvgPool2d(pool.kernel_size, pool.stride, pool.padding, pool.ceil_mode)


def _layer_norm(norm: nn.LayerNorm, b: float | Tensor) -> nn.Module:
    new = DetachableLayerNorm(norm.normalized_shape, norm.eps, norm.elementwise_affine, bias=False, device="meta")
    new.weight = norm.weight
    return new


def _group_norm(norm: nn.GroupNorm, b: float | Tensor) -> nn.Module:
    new = DetachableGroupNorm2d(norm.num_groups, norm.num_channels, norm.eps, norm.affine, device="meta")
    new.weight = norm.weight
    new.register_parameter("bias", None)
    return new


def _gelu(gelu: nn.GELU, b: float | Tensor) -> nn.Module:
    return DetachableGELU()


#: What becomes of a layer; ReLU and everything that is not here stays.
_CONVERSIONS: dict[type[nn.Module], Callable[..., nn.Module]] = {
    nn.Conv2d: _bcos_conv2d,
    nn.Linear: _bcos_linear,
    nn.BatchNorm2d: _uncentered_batch_norm,
    nn.MaxPool2d: _average_pool,
    nn.LayerNorm: _layer_norm,
    nn.GroupNorm: _group_norm,
    nn.GELU: _gelu,
}


def _convert_children(module: nn.Module, b: float | Tensor) -> None:
    for name, child in module.named_children():
        conversion = _CONVERSIONS.get(type(child))
        if conversion is not None:
            new = conversion(child, b).train(child.training)
            setattr(module, name, new)
            continue
        _convert_children(child, b)
        if isinstance(child, nn.Sequential):
            # children numbered anew, as in the public checkpoints (DenseNet's `features.conv0` is their `features.0`)
            setattr(module, name, nn.Sequential(*child.children()).train(child.training))


def _remove_biases(module: nn.Module) -> None:
    for child in module.modules():
        if child._parameters.get("bias") is not None:
            child.register_parameter("bias", None)
