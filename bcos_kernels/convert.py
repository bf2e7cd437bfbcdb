"""B-cosification: a standard network becomes a B-cos network that starts from the same weights.

Source: B-cosification (arXiv 2411.00715); the keys of the converted state dicts are those of its public
checkpoints.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from bcos_kernels.backbones import BACKBONES, Backbone, SimpleViT
from bcos_kernels.conversions import Recipe, convert, not_in_place, remove_biases, renumber, unknown_layers
from bcos_kernels.functional import check_exponent
from bcos_kernels.identity import class_name, has_any_hook, known_class
from bcos_kernels.modules import BcosConv2d, BcosLinear, BcosMapClassifier, LogitLayer, Normalize
from bcos_kernels.structure import analyse
from bcos_kernels.verification import (
    difference,
    full_copy,
    images_for,
    incompleteness,
    is_runnable,
    set_mode,
    shared_copy,
)

_Statistics = tuple[tuple[float, ...], tuple[float, ...]]

_RGB_STATISTICS: dict[str, _Statistics] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}

#: The steps of the conversion that change the function even at B = 1, and that ``keep`` switches off.
Lossy = Literal["biases", "max_pooling", "head_order"]

#: As many things as an error names, of those that cannot be converted.
_NAMED = 20


#: Modules that normalise an image by ``mean`` and ``std``.
_NORMALISATIONS = ("torchvision.transforms.transforms.Normalize", "torchvision.transforms.v2._misc.Normalize")

#: Modules that only call another one, and the name of that one.
_WRAPPERS = {
    class_name(nn.DataParallel): "module",
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
    "torch.optim.swa_utils.AveragedModel": "module",
    "torch._dynamo.eval_frame.OptimizedModule": "_orig_mod",
}


class BcosNetwork(nn.Module):
    """Normalisation, the converted network (``model``) and the logit layer. Only ``model`` has state.

    Input ``[N, 6, H, W]``: (r, g, b, 1-r, 1-g, 1-b) in [0, 1]. Output: logits ``[N, classes]``.

    ``constants`` names what the network adds to the contributions of the image, besides the logit layer's bias and the means
    of its normalisation: positions and class tokens, and with ``keep=["biases"]`` other constants (not the biases of layers).
    Where it is empty, and no bias was kept, the contributions make up the whole logit.
    """

    def __init__(
        self, model: nn.Module, normalize: nn.Module, logit_layer: nn.Module, constants: tuple[str, ...] = ()
    ) -> None:
        super().__init__()
        self.normalize = normalize
        self.model = model
        self.logit_layer = logit_layer
        self.constants = constants

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
    keep: Collection[Lossy] = (),
) -> BcosNetwork:
    """A B-cos network made of a standard one, weights and all. ``model`` itself is not touched.

    Convolutions and linear layers become B-cos layers with the same weights, the first one on six channels; batch norms lose
    their mean; max pooling becomes average pooling; the classifier moves before the global average pooling, where there is
    one; every bias is removed. What makes queries, keys and gates stays as it is: explanations take those as constants.
    The result is meant to be fine-tuned: with B = 2 it is another function than ``model``.

    Args:
        model: one of these, with any number of classes; or one made of the same layers:
            torchvision's ResNet, DenseNet, VGG, ConvNeXt, EfficientNet, RegNet, ViT; timm's ResNet, DenseNet, ConvNeXt,
            EfficientNet, ViT, DeiT; the simple ViTs of B-cos v2; OpenAI's CLIP ResNet (``normalize="clip"``). DataParallel,
            DistributedDataParallel, AveragedModel and ``torch.compile`` around it are unwrapped first.
        num_classes: None keeps the classifier. Another number than the classifier has replaces it by a new, random one.
        b: exponent of every layer, a number >= 1. A tensor gives every layer a learnable exponent that starts there.
        normalize: with whose mean and standard deviation the network normalises its own input; None: not at all. An
            ``nn.Sequential`` that begins with torchvision's ``Normalize`` has its own, which is used instead.
        logit_bias: added to the logits; "auto" is -log(classes - 1), and nothing for a network without classifier; None
            nothing.
        keep: steps to leave out. "biases": they stay, and the batch norms' take over what their means were for (exact in
            evaluation mode); so do CLIP's positions. "max_pooling" stays. "head_order": the classifier stays behind the
            pooling. Without all three steps, the network at B = 1 is the same function as ``model``.

    Returns:
        The converted network, in the mode, dtype and device of ``model``.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: ``model`` has layers or a forward pass that cannot be converted exactly (all of them are named), or is a
            B-cos network already; other values do not fit.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    while (inner := _WRAPPERS.get(class_name(type(model)))) is not None:
        _refuse_hooks(model, "model")
        model = getattr(model, inner)
    for name, module in model.named_modules():
        if isinstance(module, (BcosConv2d, BcosLinear, BcosNetwork)):
            raise ValueError(f"model is a B-cos network already: {name or 'model'} is a {type(module).__name__}")
    if normalize is not None and (not isinstance(normalize, str) or normalize not in _RGB_STATISTICS):
        raise ValueError(f'normalize must be "imagenet", "clip" or None; got {normalize!r}')
    is_number = isinstance(logit_bias, (int, float)) and not isinstance(logit_bias, bool) and math.isfinite(logit_bias)
    if logit_bias is not None and logit_bias != "auto" and not is_number:
        raise ValueError(f'logit_bias must be a number, "auto" or None; got {logit_bias!r}')
    keep = _checked_steps(keep)
    if num_classes is not None and (not isinstance(num_classes, int) or isinstance(num_classes, bool)):
        raise TypeError(f"num_classes must be an int or None; got {num_classes!r}")
    recipe = Recipe(check_exponent(b), biases="biases" in keep, max_pooling="max_pooling" in keep)
    model, statistics = _without_normalisation(model)
    _refuse(model, list(unknown_layers(model, recipe)))
    first = _first_layer(model)
    plan = _plan(model, recipe, first, reorder="head_order" not in keep)
    if num_classes is not None and plan.head is None:
        raise ValueError(
            f"num_classes={num_classes}: a {type(model).__name__} has no classifier that could be replaced"
        )
    if num_classes is not None and num_classes < 2:
        raise ValueError(f"num_classes must be at least 2; got {num_classes}")
    _verify(model, plan, recipe)

    like = next(model.parameters())
    network = full_copy(model)
    classes = None if plan.head is None else _resize(network, plan.head, num_classes)
    network = plan.build(network, recipe)
    if logit_bias == "auto":
        logit_bias = -math.log(classes - 1) if classes is not None and classes > 1 else None
    if statistics is None and normalize is not None:
        statistics = _RGB_STATISTICS[normalize]
    whole = BcosNetwork(network, _normalization(statistics), LogitLayer(None, logit_bias), plan.constants)
    for module in (whole, whole.normalize, whole.logit_layer):
        module.training = model.training  # the layers have the modes of those that they were made of
    return whole.to(device=like.device, dtype=like.dtype)


def _checked_steps(keep: Collection[Lossy]) -> tuple[Lossy, ...]:
    names = ", ".join(get_args(Lossy))
    if isinstance(keep, (str, Mapping)) or not isinstance(keep, Iterable):
        raise ValueError(f"keep must be a collection of names out of {names}; got {keep!r}")
    steps = tuple(keep)
    if any(step not in get_args(Lossy) for step in steps):
        raise ValueError(f"keep must be a collection of names out of {names}; got {steps!r}")
    return steps


def _verify(model: nn.Module, plan: _Plan, recipe: Recipe) -> None:
    """Runs ``model`` and what it becomes at B = 1, with the same weights, on the same images.

    Raises:
        ValueError: they do not compute the same, or what has no constants does not explain itself completely.
    """
    if any(isinstance(m, nn.BatchNorm2d) and m.running_mean is None for m in model.modules()) or not is_runnable(model):
        return
    like = next(model.parameters())
    if like.device.type == "cpu" and like.dtype in (torch.float32, torch.float64):
        model = shared_copy(model)
    else:  # on a GPU, TF32 would make more of a difference than what is looked for
        model = full_copy(model).to("cpu", torch.float32)
    set_mode(model, False)
    with torch.random.fork_rng([]), torch.inference_mode(False), torch.autocast("cpu", enabled=False):
        given = images_for(model)
        if given is None:
            return
        x, expected = given
        same = dataclasses.replace(plan, backbone=None, pool=None)
        why = difference(same.build(shared_copy(model), Recipe(1.0, biases=True, max_pooling=True)), x, expected)
        if why is not None:
            raise ValueError(
                f"model: cannot convert a {type(model).__name__}: at B = 1, with everything kept, the converted network "
                f"would not be the same function: {why}. No single layer is to blame: the forward pass makes use of the "
                "class, the weights or the settings of a layer, or of its input's memory"
            )
        if not plan.constants and not recipe.biases:
            network = plan.build(shared_copy(model), Recipe(1.0, max_pooling=recipe.max_pooling))
            if (why := incompleteness(network, x)) is not None:
                raise ValueError(
                    f"model: cannot convert a {type(model).__name__}: its explanations would not be complete: {why}. Its "
                    "forward pass does more than its layers and what torch.fx shows of it"
                )


@dataclass(frozen=True)
class _Plan:
    """What is known about a network before anything is done to it.

    ``first``: path of the layer that sees the image. ``backbone``: what replaces the forward pass, or None. ``head``: path of
    the classifier. ``pool``: path of the pooling that the classifier moves before. ``constants``: see :class:`BcosNetwork`.
    ``aliased``: paths of layers that have to go on working in place.
    """

    first: str
    backbone: type[Backbone] | None
    head: str | None
    pool: str | None
    constants: tuple[str, ...]
    aliased: tuple[str, ...]
    renumbered: bool = False

    def build(self, network: nn.Module, recipe: Recipe) -> nn.Module:
        """The network, converted; ``network`` is used up."""
        _double_channels(network, self.first)
        if self.backbone is not None:
            network = self.backbone(network)
            if self.backbone.convolves and self.head is not None:
                _replace(network, self.head, _pointwise_convolution(network.get_submodule(self.head), recipe))
        else:
            not_in_place(network, self.aliased)
        linear = None if self.head is None else network.get_submodule(self.head)
        network = convert(network, recipe)
        if linear is not None and self.head is not None and self.pool is not None:
            _replace(network, self.pool, nn.Identity())
            _replace(network, self.head, _map_classifier(linear, recipe))
        if self.renumbered:
            renumber(network)
        if not recipe.biases:
            remove_biases(network)
        return network


def _plan(model: nn.Module, recipe: Recipe, first: str, reorder: bool) -> _Plan:
    """Everything that could be wrong with the network is found here.

    Raises:
        ValueError: something of the network cannot be converted exactly.
    """
    kind = next((k for k in BACKBONES if k.fits(model)), None)
    # a backbone's forward pass, which is known, on blocks that need not be
    structure = analyse(model if kind is None else kind(model), first, recipe, patches=kind is SimpleViT)
    head = structure.head if kind is None else kind.head
    replaced = [first] if head is None else [first, head]
    _refuse(model, [*structure.problems, *(other for path in replaced for other in _shared_weights(model, path))])
    found = structure.constants, structure.aliased
    if kind is not None:
        return _Plan(first, kind if reorder else None, head, None, *found, kind.renumbered)
    return _Plan(first, None, head, structure.pool if reorder else None, *found)


def _shared_weights(model: nn.Module, path: str) -> Iterator[str]:
    """Who else uses the weights of the layer, which gets new ones."""
    layer = model.get_submodule(path)
    for name, module in model.named_modules():
        if module is not layer and any(p is layer.weight for p in module._parameters.values()):
            yield f"{path}: {type(layer).__name__}, which shares its weight with {name}"


def _refuse(model: nn.Module, problems: list[str]) -> None:
    if problems:
        named = "; ".join(problems[:_NAMED]) + (f"; and {more} more" if (more := len(problems) - _NAMED) > 0 else "")
        raise ValueError(
            f"model: cannot convert a {type(model).__name__} exactly; no B-cos counterpart is known for {named}"
        )


def _without_normalisation(model: nn.Module) -> tuple[nn.Module, _Statistics | None]:
    """A network without the normalisation that it begins with, and the mean and standard deviation of that, if any."""
    first = next(iter(model._modules.values()), None)
    if known_class(model, (class_name(nn.Sequential),)) is None or first is None:
        return model, None
    if known_class(first, _NORMALISATIONS) is None:
        return model, None
    _refuse_hooks(first, next(iter(model._modules)))
    mean, std = (tuple(float(v) for v in getattr(first, name)) for name in ("mean", "std"))
    if len(mean) != 3 or len(std) != 3:
        raise ValueError(f"model begins with a {type(first).__name__} of {len(mean)} channels; it must have three")
    if has_any_hook(model):
        raise ValueError("model: the nn.Sequential around the network has a hook; remove it before the conversion")
    network = copy.copy(model)
    network._modules = {**model._modules, next(iter(model._modules)): nn.Identity().train(model.training)}
    return network, (mean, std)


def _refuse_hooks(module: nn.Module, path: str) -> None:
    if has_any_hook(module):
        raise ValueError(
            f"model: {path}, a {type(module).__name__}, has a hook that would be lost; remove it before the conversion"
        )


def _normalization(statistics: _Statistics | None) -> nn.Module:
    if statistics is None:
        return nn.Identity()
    mean, std = statistics
    return Normalize((*mean, *(1 - m for m in mean)), std * 2)


def _first_layer(model: nn.Module) -> str:
    """Path of the layer that sees the image: the convolution of three channels, or the linear layer on patches."""
    found = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.in_channels == 3 and m.groups == 1]
    if not found:
        found = [n for n, m in model.named_modules() if n == "to_patch_embedding.linear" and isinstance(m, nn.Linear)]
    if len(found) != 1:
        where = f"at {', '.join(found)}" if found else "nowhere"
        raise ValueError(f"model must have one convolution with three input channels, its first layer; found {where}")
    return found[0]


def _double_channels(network: nn.Module, first: str) -> None:
    """Six channels for three: ``(w, -w) / 2`` gives the same function of (x, 1 - x), normalised, as ``w`` of x.

    In the linear layer on patches the channels of each pixel are neighbours, so each group of three is doubled.
    """
    layer = network.get_submodule(first)
    with torch.no_grad():
        if isinstance(layer, nn.Conv2d):
            layer.in_channels = 6
            weight = torch.cat([layer.weight, -layer.weight], dim=1) / 2
        else:
            assert isinstance(layer, nn.Linear)
            layer.in_features *= 2
            pixels = layer.weight.unflatten(1, (-1, 3))
            weight = torch.cat([pixels, -pixels], dim=2).flatten(1) / 2
        layer.weight = nn.Parameter(weight, layer.weight.requires_grad)


def _resize(network: nn.Module, head: str, num_classes: int | None) -> int:
    """The number of classes, after a new classifier is put in the old one's place where it has another number."""
    old = network.get_submodule(head)
    assert isinstance(old, nn.Linear)
    if num_classes is None or num_classes == old.out_features:
        return old.out_features
    like = old.weight
    _replace(network, head, nn.Linear(old.in_features, num_classes, old.bias is not None, like.device, like.dtype))
    return num_classes


def _replace(network: nn.Module, path: str, new: nn.Module) -> None:
    """Puts ``new`` in the place of the module at ``path``, under each of its names."""
    old = network.get_submodule(path)
    for parent in list(network.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new
    new.train(old.training)


def _pointwise_convolution(linear: nn.Module, recipe: Recipe) -> nn.Conv2d:
    assert isinstance(linear, nn.Linear)
    conv = nn.Conv2d(linear.in_features, linear.out_features, 1, bias=False, device="meta")
    conv.weight = nn.Parameter(linear.weight.detach()[:, :, None, None], linear.weight.requires_grad)
    conv.bias = recipe.bias(linear)
    return conv


def _map_classifier(linear: nn.Module, recipe: Recipe) -> nn.Module:
    conv = _pointwise_convolution(linear, recipe)
    new = BcosMapClassifier(conv.in_channels, conv.out_channels, b=recipe.exponent(conv.weight), device="meta")
    new.linear.weight = conv.weight
    new.linear.bias = conv.bias
    return new
