"""Layer by layer: what each standard layer becomes in a B-cos network, and which layers nothing is known about.

Layers are recognised by their class where it is torch's own, otherwise by structure or name, so that no other package has to
be imported.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bcos_kernels.blocks import fused
from bcos_kernels.modules import (
    ATTENTIONS,
    AttentionPool2d,
    BatchNormActUncentered2d,
    BatchNormUncentered2d,
    BcosConv2d,
    BcosLinear,
    DetachableAttention,
    DetachableGELU,
    DetachableGroupNorm2d,
    DetachableHardswish,
    DetachableLayerNorm,
    DetachableLayerNorm2d,
    DetachableSiLU,
    DetachableSqueezeExcitation,
    FusedSequential,
)


@dataclass(frozen=True)
class Recipe:
    """How layers are converted. ``biases`` and ``max_pooling``: they are kept, against the paper."""

    b: float | Tensor = 2.0
    biases: bool = False
    max_pooling: bool = False

    def bias(self, layer: nn.Module) -> nn.Parameter | None:
        """The layer's bias, if it has one and it is kept."""
        return layer._parameters.get("bias") if self.biases else None

    def exponent(self, like: Tensor) -> float | nn.Parameter:
        """A learnable exponent is each layer's own."""
        return nn.Parameter(self.b.detach().clone().reshape(()).to(like)) if isinstance(self.b, Tensor) else self.b


def _conv2d(conv: nn.Conv2d, recipe: Recipe) -> nn.Module:
    new = BcosConv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        conv.stride,
        conv.padding,
        conv.dilation,
        conv.groups,
        padding_mode=conv.padding_mode,
        b=recipe.exponent(conv.weight),
        device="meta",
    )
    new.linear.weight = conv.weight
    new.linear.bias = recipe.bias(conv)
    return new


def _linear(linear: nn.Linear, recipe: Recipe) -> nn.Module:
    new = BcosLinear(linear.in_features, linear.out_features, b=recipe.exponent(linear.weight), device="meta")
    new.linear.weight = linear.weight
    new.linear.bias = recipe.bias(linear)  # type: ignore[assignment]
    return new


def _batch_norm(norm: nn.BatchNorm2d, recipe: Recipe) -> nn.Module:
    acts = "act" in norm._modules
    kind = BatchNormActUncentered2d if acts else BatchNormUncentered2d
    new = kind(
        norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats, bias=False, device="meta"
    )
    new.weight = norm.weight
    for buffer in ("running_mean", "running_var", "num_batches_tracked"):
        setattr(new, buffer, getattr(norm, buffer))
    if recipe.biases:
        new.bias = nn.Parameter(_shift(norm), norm.bias is None or norm.bias.requires_grad)
    if acts:
        new.add_module("act", convert(norm.get_submodule("act"), recipe))
    return new


def _shift(norm: nn.BatchNorm2d) -> Tensor:
    """The bias that makes up for the mean that is no longer subtracted: ``bias - mean / std * weight``."""
    assert norm.running_mean is not None  # refused beforehand
    assert norm.running_var is not None
    with torch.no_grad():
        shift = -norm.running_mean / (norm.running_var + norm.eps).sqrt()
        if norm.weight is not None:
            shift = shift * norm.weight
        return shift if norm.bias is None else shift + norm.bias


def _max_pool(pool: nn.MaxPool2d, recipe: Recipe) -> nn.Module:
    if recipe.max_pooling:
        return pool
    return nn.AvgPool2d(pool.kernel_size, pool.stride, pool.padding, pool.ceil_mode)


def _layer_norm(norm: nn.LayerNorm, recipe: Recipe) -> nn.Module:
    kind = DetachableLayerNorm2d if type(norm).__name__ == "LayerNorm2d" else DetachableLayerNorm
    new = kind(norm.normalized_shape, norm.eps, norm.elementwise_affine, bias=False, device="meta")  # type: ignore[arg-type]
    new.weight = norm.weight
    new.bias = recipe.bias(norm)  # type: ignore[assignment]
    return new


def _group_norm(norm: nn.GroupNorm, recipe: Recipe) -> nn.Module:
    new = DetachableGroupNorm2d(norm.num_groups, norm.num_channels, norm.eps, norm.affine, device="meta")
    new.weight = norm.weight
    new.bias = recipe.bias(norm)  # type: ignore[assignment]
    return new


def _attention(attention: nn.Module, recipe: Recipe) -> nn.Module:
    kind = _attention_kind(attention)
    assert kind is not None
    keep = {"keep_positions": recipe.biases} if kind is AttentionPool2d else {}
    if kind is AttentionPool2d and isinstance(recipe.b, Tensor):
        recipe = dataclasses.replace(recipe, b=2.0)  # B-cos in name only: there would be nothing to learn from
    new = kind(attention, **keep)
    for name, child in new.named_children():
        if name not in new.plain:
            setattr(new, name, convert(child, recipe))
    return new


def _attention_kind(module: nn.Module) -> type[DetachableAttention] | None:
    return next((kind for kind in ATTENTIONS if kind.fits(module)), None)


#: torch's layers, and those of other packages that only share the name, by class name
_LAYERS: dict[str, Callable[..., nn.Module]] = {
    "Conv2d": _conv2d,
    "Linear": _linear,
    "NonDynamicallyQuantizableLinear": _linear,  # the output of nn.MultiheadAttention
    "BatchNorm2d": _batch_norm,
    "BatchNormAct2d": _batch_norm,
    "MaxPool2d": _max_pool,
    "LayerNorm": _layer_norm,
    "LayerNorm2d": _layer_norm,
    "GroupNorm": _group_norm,
    "DetachableGNLayerNorm2d": _group_norm,  # B-cos v2's name for a group norm of one group
    "GELU": lambda gelu, recipe: DetachableGELU(getattr(gelu, "approximate", "none")),
    "GELUTanh": lambda gelu, recipe: DetachableGELU("tanh"),
    "SiLU": lambda silu, recipe: DetachableSiLU(),
    "Hardswish": lambda hardswish, recipe: DetachableHardswish(),
}

#: What a subclass or namesake must be for its entry to hold: it has the settings that the conversion reads.
_BASES: dict[str, type[nn.Module]] = {
    "Conv2d": nn.Conv2d,
    "Linear": nn.Linear,
    "NonDynamicallyQuantizableLinear": nn.Linear,
    "BatchNorm2d": nn.BatchNorm2d,
    "BatchNormAct2d": nn.BatchNorm2d,
    "MaxPool2d": nn.MaxPool2d,
    "LayerNorm": nn.LayerNorm,
    "LayerNorm2d": nn.LayerNorm,
    "GroupNorm": nn.GroupNorm,
    "DetachableGNLayerNorm2d": nn.GroupNorm,
}

#: Layers that stay: linear, or linear wherever they have a gradient, or doing nothing outside of training.
# fmt: off
_STAY = frozenset((
    "Identity", "ReLU", "LeakyReLU", "PReLU", "Dropout", "Dropout2d", "AvgPool2d", "AdaptiveAvgPool2d", "Flatten",
    "Unflatten", "ZeroPad2d", "ConstantPad2d", "ReflectionPad2d", "ReplicationPad2d", "Upsample", "PixelShuffle",
    "PixelUnshuffle", "ChannelShuffle", "StochasticDepth", "DropPath", "Permute", "Rearrange",
    "FastAdaptiveAvgPool",
))
# fmt: on


def converter(module: nn.Module) -> Callable[..., nn.Module] | None:
    """The function that makes the B-cos counterpart of ``(module, recipe)``, or None where there is none."""
    if _attention_kind(module) is not None:
        return _attention
    if DetachableSqueezeExcitation.fits(module):
        return lambda module, recipe: DetachableSqueezeExcitation(module)
    name = type(module).__name__
    return _LAYERS.get(name) if isinstance(module, _BASES.get(name, nn.Module)) else None


def stays(module: nn.Module) -> bool:
    """Whether the layer belongs into a B-cos network as it is."""
    return type(module).__name__ in _STAY


def refusal(module: nn.Module, recipe: Recipe) -> str | None:
    """Why a layer that has a converter cannot be converted all the same; None if it can."""
    if isinstance(module, nn.MaxPool2d) and not recipe.max_pooling and module.dilation not in (1, (1, 1)):
        return f"dilation {module.dilation}, which average pooling has not"
    if isinstance(module, nn.BatchNorm2d):
        if module.running_mean is None and recipe.biases:
            return "no running statistics to make its bias from"
        drop = module._modules.get("drop")
        if drop is not None and type(drop) is not nn.Identity:
            return f"a {type(drop).__name__} inside"
    return None


def unknown_layers(model: nn.Module, recipe: Recipe, path: str = "") -> Iterator[str]:
    """``path: class`` of every layer that would be left neither converted nor known to be harmless."""
    for name, child in model.named_children():
        where = f"{path}.{name}" if path else name
        if converter(child) is not None:
            reason = refusal(child, recipe)
            if reason is not None:
                yield f"{where}: {type(child).__name__} with {reason}"
        elif next(child.children(), None) is not None:
            yield from unknown_layers(child, recipe, where)
        elif _is_layer(child) and not stays(child):
            yield f"{where}: {type(child).__name__}"


def _is_layer(module: nn.Module) -> bool:
    """One of torch's layers or a variety of one; not an empty container, and not another package's own layer."""
    if isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        return False
    return type(module).__module__.startswith("torch.") or isinstance(module, tuple(set(_BASES.values())))


def convert(module: nn.Module, recipe: Recipe) -> nn.Module:
    """The counterpart of ``module``; where there is none, ``module`` itself with its children converted.

    Parameters and buffers are shared, not copied.
    """
    make = converter(module)
    if make is None:
        for name, child in module.named_children():
            setattr(module, name, convert(child, recipe))
        return fused(module)
    return make(module, recipe)


def renumber(module: nn.Module) -> None:
    """Names the children of every ``nn.Sequential`` 0, 1, .., as the public code's conversion of CNNs does."""
    for name, child in module.named_children():
        renumber(child)
        if isinstance(child, nn.Sequential):
            kind = FusedSequential if isinstance(child, FusedSequential) else nn.Sequential
            setattr(module, name, kind(*child.children()).train(child.training))


def remove_biases(module: nn.Module) -> None:
    """Every bias, but for those that only make a gate."""
    if isinstance(module, DetachableSqueezeExcitation):
        return
    for name in ("bias", "in_proj_bias"):
        if module._parameters.get(name) is not None:
            module.register_parameter(name, None)
    for child in module.children():
        remove_biases(child)


def not_in_place(module: nn.Module) -> None:
    """Activations leave their input alone: the backward pass of a B-cos layer needs its output as it was."""
    for child in module.modules():
        if getattr(child, "inplace", False):
            child.inplace = False  # type: ignore[assignment]
