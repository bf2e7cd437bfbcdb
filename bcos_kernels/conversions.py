"""Layer by layer: what each standard layer becomes in a B-cos network, and which layers nothing is known about.

Layers are recognised by the name of their class (:mod:`bcos_kernels.identity`), so that no other package has to be imported.
A layer that has another forward pass than its class is not recognised.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bcos_kernels.blocks import fused
from bcos_kernels.identity import class_name, has_any_hook, known_class
from bcos_kernels.modules import (
    ATTENTIONS,
    AttentionPool2d,
    BatchNormActUncentered2d,
    BatchNormUncentered2d,
    BcosConv2d,
    BcosLinear,
    DetachableActivation,
    DetachableAttention,
    DetachableGELU,
    DetachableGroupNorm2d,
    DetachableHardswish,
    DetachableLayerNorm,
    DetachableLayerNorm2d,
    DetachableSiLU,
    DetachableSqueezeExcitation,
    FrozenBatchNormUncentered2d,
    FusedSequential,
)


@dataclass(frozen=True)
class Recipe:
    """How layers are converted. ``biases`` and ``max_pooling``: they are kept, against the paper."""

    b: float | Tensor = 2.0
    biases: bool = False
    max_pooling: bool = False
    #: what each module became, so that a module with two names stays one module
    done: dict[nn.Module, nn.Module] = dataclasses.field(default_factory=dict, compare=False, repr=False)

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


def _batch_norm(
    norm: nn.BatchNorm2d, recipe: Recipe, kind: type[BatchNormUncentered2d] = BatchNormUncentered2d
) -> nn.Module:
    new = kind(
        norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats, bias=False, device="meta"
    )
    new.weight = norm.weight
    for buffer in ("running_mean", "running_var", "num_batches_tracked"):
        setattr(new, buffer, getattr(norm, buffer))
    if recipe.biases:
        new.bias = nn.Parameter(_shift(norm), norm.bias is None or norm.bias.requires_grad)
    return new


def _batch_norm_act(norm: nn.BatchNorm2d, recipe: Recipe) -> nn.Module:
    new = _batch_norm(norm, recipe, BatchNormActUncentered2d)
    new.add_module("act", convert(norm.get_submodule("act"), recipe))
    return new


def _frozen_batch_norm(norm: nn.Module, recipe: Recipe) -> nn.Module:
    act = norm._modules.get("act")
    act = None if act is None else convert(act, recipe)
    new = FrozenBatchNormUncentered2d(len(norm.running_var), norm.eps, act=act, device="meta")  # type: ignore[arg-type]
    for buffer in ("weight", "running_mean", "running_var"):
        setattr(new, buffer, getattr(norm, buffer))
    new.bias = _shift(norm) if recipe.biases else None
    return new


def _shift(norm: nn.Module) -> Tensor:
    """The bias that makes up for the mean that is no longer subtracted: ``bias - mean / std * weight``."""
    mean, var, weight, bias = (getattr(norm, name) for name in ("running_mean", "running_var", "weight", "bias"))
    with torch.no_grad():
        shift = -mean / (var + norm.eps).sqrt()
        if weight is not None:
            shift = shift * weight
        return shift if bias is None else shift + bias


def _max_pool(pool: nn.MaxPool2d, recipe: Recipe) -> nn.Module:
    if recipe.max_pooling:
        return pool
    return nn.AvgPool2d(pool.kernel_size, pool.stride, pool.padding, pool.ceil_mode)


def _layer_norm(norm: nn.LayerNorm, recipe: Recipe, kind: type[DetachableLayerNorm] = DetachableLayerNorm) -> nn.Module:
    new = kind(norm.normalized_shape, norm.eps, norm.elementwise_affine, bias=False, device="meta")  # type: ignore[arg-type]
    new.weight = norm.weight
    new.bias = recipe.bias(norm)  # type: ignore[assignment]
    return new


def _layer_norm2d(norm: nn.LayerNorm, recipe: Recipe) -> nn.Module:
    return _layer_norm(norm, recipe, DetachableLayerNorm2d)


def _group_norm(norm: nn.GroupNorm, recipe: Recipe) -> nn.Module:
    new = DetachableGroupNorm2d(norm.num_groups, norm.num_channels, norm.eps, norm.affine, device="meta")
    new.weight = norm.weight
    new.bias = recipe.bias(norm)  # type: ignore[assignment]
    return new


def _attention(attention: nn.Module, recipe: Recipe) -> nn.Module:
    kind = attention_kind(attention)
    assert kind is not None
    keep = {"keep_positions": recipe.biases} if kind is AttentionPool2d else {}
    if kind is AttentionPool2d and isinstance(recipe.b, Tensor):
        # B-cos in name only: there would be nothing to learn from
        recipe = dataclasses.replace(recipe, b=2.0, done={})
    new = kind(attention, **keep)
    for name, child in new._modules.items():
        if name not in new.plain and child is not None:
            new._modules[name] = convert(child, recipe)
    return new


def _makes_weights_only(module: nn.Module, name: str) -> bool:
    """Whether the child only makes attention weights, which are constants of an explanation."""
    kind = attention_kind(module)
    return kind is not None and name in kind.weights_only


def attention_kind(module: nn.Module) -> type[DetachableAttention] | None:
    return next((kind for kind in ATTENTIONS if kind.fits(module)), None)


def _squeeze_excitation(layer: nn.Module, recipe: Recipe) -> nn.Module:
    return DetachableSqueezeExcitation(layer)


def _activation(act: nn.Module, recipe: Recipe) -> nn.Module:
    return DetachableActivation(act)


def _gelu(gelu: nn.Module, recipe: Recipe) -> nn.Module:
    return DetachableGELU(getattr(gelu, "approximate", "none"))


def _torch(*names: str) -> list[str]:
    return [class_name(getattr(nn, name)) for name in names]


_TIMM_ACTIVATIONS = "timm.layers.activations"

#: What makes the counterpart of ``(layer, recipe)``, by the class of the layer.
_LAYERS: dict[str, Callable[..., nn.Module]] = {
    **dict.fromkeys(_torch("Conv2d"), _conv2d),
    **dict.fromkeys(_torch("Linear"), _linear),
    **dict.fromkeys(_torch("BatchNorm2d"), _batch_norm),
    **dict.fromkeys(_torch("MaxPool2d"), _max_pool),
    **dict.fromkeys(_torch("LayerNorm"), _layer_norm),
    **dict.fromkeys(_torch("GroupNorm"), _group_norm),
    **dict.fromkeys(_torch("GELU"), _gelu),
    **dict.fromkeys(_torch("SiLU"), lambda act, recipe: DetachableSiLU()),
    **dict.fromkeys(_torch("Hardswish"), lambda act, recipe: DetachableHardswish()),
    **dict.fromkeys(
        _torch("ReLU6", "Hardtanh", "Mish", "Tanh", "ELU", "CELU", "SELU", "Softsign", "Softshrink", "Tanhshrink"),
        _activation,
    ),
    "timm.layers.linear.Linear": _linear,
    "bcos.modules.norms.centered_norms.DetachableGroupNorm2d": _group_norm,
    "timm.layers.norm.GroupNorm": _group_norm,
    "timm.layers.norm.GroupNorm1": _group_norm,
    "timm.layers.norm.LayerNorm": _layer_norm,
    "timm.layers.norm.LayerNorm2d": _layer_norm2d,
    "torchvision.models.convnext.LayerNorm2d": _layer_norm2d,
    "timm.layers.norm_act.BatchNormAct2d": _batch_norm_act,
    "timm.layers.norm_act.FrozenBatchNormAct2d": _frozen_batch_norm,
    "torchvision.ops.misc.FrozenBatchNorm2d": _frozen_batch_norm,
    f"{_TIMM_ACTIVATIONS}.GELU": _gelu,
    f"{_TIMM_ACTIVATIONS}.GELUTanh": lambda act, recipe: DetachableGELU("tanh"),
    **{
        f"{_TIMM_ACTIVATIONS}{name}": _activation
        for kind in ("Swish", "Mish", "HardSwish", "HardMish")
        for name in (f".{kind}", f"_me.{kind}Me")
    },
    f"{_TIMM_ACTIVATIONS}.Tanh": _activation,
    f"{_TIMM_ACTIVATIONS}.QuickGELU": _activation,
}

#: Layers that stay: linear, or linear wherever they have a gradient, or doing nothing outside of training.
# fmt: off
_STAY = frozenset((
    *_torch(
        "Identity", "ReLU", "LeakyReLU", "PReLU", "Hardshrink", "Dropout", "Dropout1d", "Dropout2d", "AvgPool2d",
        "AdaptiveAvgPool2d", "Flatten", "Unflatten", "ZeroPad2d", "ConstantPad2d", "ReflectionPad2d",
        "ReplicationPad2d", "CircularPad2d", "Upsample", "UpsamplingNearest2d", "UpsamplingBilinear2d", "PixelShuffle",
        "PixelUnshuffle", "ChannelShuffle",
    ),
    "torchvision.ops.stochastic_depth.StochasticDepth", "torchvision.ops.misc.Permute", "timm.layers.drop.DropPath",
    "timm.layers.activations.PReLU", "timm.layers.adaptive_avgmax_pool.FastAdaptiveAvgPool",
    "einops.layers.torch.Rearrange",
))
# fmt: on

#: Layers whose forward pass works without a bias. For any other module with one, :mod:`structure` names the addition.
_BIASED = frozenset(
    (*_torch("Conv2d", "Linear", "LayerNorm", "GroupNorm"), "timm.layers.linear.Linear", "timm.layers.norm.LayerNorm")
)


def is_linear_layer(module: nn.Module) -> bool:
    """Whether the module computes what ``nn.Linear`` computes."""
    return (name := known_class(module, _LAYERS)) is not None and _LAYERS[name] is _linear


def converter(module: nn.Module) -> Callable[..., nn.Module] | None:
    """The function that makes the B-cos counterpart of ``(module, recipe)``, or None where there is none."""
    if attention_kind(module) is not None:
        return _attention
    if DetachableSqueezeExcitation.fits(module):
        return _squeeze_excitation
    name = known_class(module, _LAYERS)
    return None if name is None else _LAYERS[name]


def stays(module: nn.Module) -> bool:
    """Whether the layer belongs into a B-cos network as it is."""
    return known_class(module, _STAY) is not None


def unknown_layers(model: nn.Module, recipe: Recipe) -> Iterator[str]:
    """``path: class`` of every layer that cannot be converted, with the reason; each layer once."""
    for path, module in model.named_modules():
        if (why := _peculiarity(module, root=module is model)) is not None:
            yield f"{_named(path, module)} {why}"
    yield from _unknown_layers(model, recipe, "", set())


def _named(path: str, module: nn.Module) -> str:
    return f"{path or 'model'}: {type(module).__name__}"


def _unknown_layers(model: nn.Module, recipe: Recipe, path: str, seen: set[nn.Module]) -> Iterator[str]:
    for name, child in model.named_children():
        where = f"{path}.{name}" if path else name
        if child in seen:
            continue
        seen.add(child)
        make, inner = converter(child), next(child.children(), None) is not None
        known = make is not None or stays(child)
        if known and has_any_hook(child):
            yield (
                f"{_named(where, child)} with a hook, which may change what it computes (remove it before the conversion, "
                "and register it on the converted network; prune.remove and remove_weight_norm remove those of torch)"
            )
        if known and (why := _refusal(child, recipe)) is not None:
            yield f"{_named(where, child)} with {why}"
        if inner and make is not _squeeze_excitation:
            yield from _unknown_layers(child, recipe, where, seen)
        # torch.fx looks at other packages' layers, but not at those inside of a layer that is converted as a whole
        elif not known and (_is_layer(child) or converter(model) is not None) and not _makes_weights_only(model, name):
            yield _named(where, child)


def _peculiarity(module: nn.Module, root: bool) -> str | None:
    """Why the calls of a module of any class cannot be read from its class and its children."""
    if isinstance(module, torch.jit.ScriptModule):
        return "in TorchScript (pass the nn.Module that it was made from)"
    if parametrize.is_parametrized(module):
        return "with parametrised weights (torch.nn.utils.parametrize.remove_parametrizations makes them plain)"
    if module._backward_hooks or module._backward_pre_hooks:
        return "with a backward hook, which would change explanations (register it on the converted network)"
    if root and has_any_hook(module):
        return "with a hook, which torch.fx does not see on the whole network (register it on the converted network)"
    forward = vars(module).get("forward")
    # torch.fx ignores one on the root, and a function that is not bound to the module keeps the modules that it was made with
    if forward is not None and (root or getattr(forward, "__self__", None) is not module):
        return "with a forward pass of its own that was put on the instance (make it a method of a subclass)"
    for name, value in vars(module).items():
        hidden = next((m for m in _modules_in(value) if m is not module), None)
        if name != "_modules" and not name.endswith("_hooks") and hidden is not None:
            return f"with a {type(hidden).__name__} in `{name}`, where a conversion does not find it (register it as a child)"
    return None


def _modules_in(value: Any, depth: int = 3) -> Iterator[nn.Module]:
    """The modules that a plain attribute holds: itself, in containers, or as what a method or a partial is bound to."""
    if isinstance(value, nn.Module):
        yield value
    elif depth and isinstance(value, (list, tuple, set, frozenset, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _modules_in(item, depth - 1)
    elif isinstance(value, functools.partial):
        yield from _modules_in((value.func, *value.args, *value.keywords.values()), depth)
    elif isinstance(value, MethodType):
        yield from _modules_in(value.__self__, depth)


def _refusal(module: nn.Module, recipe: Recipe) -> str | None:
    """Why a layer of a known class cannot be converted, or cannot stay, all the same; None if it can."""
    if isinstance(module, nn.MaxPool2d):
        if not recipe.max_pooling and module.dilation not in (1, (1, 1)):
            return f"dilation {module.dilation}, which average pooling does not have"
        if module.return_indices:
            return "return_indices=True; a converted network has no indices to return"
    if isinstance(module, nn.BatchNorm2d) and module.running_mean is None and recipe.biases:
        return "no running statistics to make its bias from"
    if isinstance(module, (nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm)):
        for name in ("weight", "bias"):
            if name not in module._parameters:
                return f"a {name} that is not an nn.Parameter"
    drop = module._modules.get("drop")
    if drop is not None and known_class(drop, _STAY) != "torch.nn.modules.linear.Identity":
        return f"a {type(drop).__name__} inside"
    value = getattr(module, "value", 0) if isinstance(module, nn.modules.padding._ConstantPadNd) else 0
    if value != 0:
        return f"value={value!r}, a constant that it adds to the image's contributions"
    if converter(module) is _activation and DetachableActivation.at_zero(module) != 0:
        return "another value than 0 at 0"
    return None


def _is_layer(module: nn.Module) -> bool:
    """One of torch's layers or a variety of one; not an empty container, and not another package's own layer."""
    if isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        return False
    return any(class_name(kind).startswith("torch.") for kind in type(module).__mro__ if kind is not nn.Module)


def convert(module: nn.Module, recipe: Recipe) -> nn.Module:
    """The counterpart of ``module``; where there is none, ``module`` itself with its children converted.

    Parameters and buffers are shared, not copied. A module that is found twice is converted once.
    """
    if module not in recipe.done:
        make = converter(module)
        if make is None:
            for name, child in module._modules.items():
                if child is not None:
                    module._modules[name] = convert(child, recipe)
            recipe.done[module] = fused(module)
        else:
            new = recipe.done[module] = make(module, recipe)
            new.training = module.training
            if isinstance(new, (BcosConv2d, BcosLinear)):
                new.linear.training = module.training
    return recipe.done[module]


def renumber(module: nn.Module) -> None:
    """Names the children of every ``nn.Sequential`` 0, 1, .., as the public code's conversion of CNNs does."""
    for child in module.modules():
        if type(child) in (nn.Sequential, FusedSequential):
            child._modules = {str(i): c for i, c in enumerate(child._modules.values())}


def remove_biases(module: nn.Module) -> None:
    """Every bias of a layer that does without, but for those that only make a gate."""
    if isinstance(module, DetachableSqueezeExcitation):
        return
    if isinstance(module, DetachableAttention) or known_class(module, _BIASED) is not None:
        for name in ("bias", "in_proj_bias"):
            if module._parameters.get(name) is not None:
                module.register_parameter(name, None)
    for child in module.children():
        remove_biases(child)


def not_in_place(module: nn.Module, aliased: Collection[str]) -> None:
    """Activations leave their input alone, but for those in ``aliased``: the backward pass of a B-cos layer needs its output
    as it was, and has to compute it again otherwise.
    """
    kept = {module.get_submodule(path) for path in aliased}
    for child in module.modules():
        if getattr(child, "inplace", False) and child not in kept:
            child.inplace = False  # type: ignore[assignment]
