"""Somebody else's B-cos network with our layers in it: ``accelerate``, and ``deaccelerate`` to undo it.

Layers are recognised by what they have (``linear``, ``b``, ``detach``), and swapped only after both computed the same on a
random input: output, gradients, and explanation. A layer of ours stands in for one of theirs: it uses the very tensors,
children and hooks of that one, and its explanation mode is that one's, so that optimisers, state dicts and context managers
made before stay valid.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bcos_kernels.modules import (
    AttentionPool2d,
    BatchNormUncentered2d,
    BcosConv2d,
    BcosLinear,
    DetachableGELU,
    DetachableGroupNorm2d,
    DetachableLayerNorm,
    DetachableLayerNorm2d,
    DetachableModule,
)
from bcos_kernels.modules.attention import SimpleViTAttention
from bcos_kernels.modules.detachable import has_hooks, has_switch, switch

log = logging.getLogger("bcos_kernels")

#: Largest difference over the largest magnitude at which two layers count as the same; sums of up to 10^4 products.
_AGREEMENT = {torch.float64: 1e-9, torch.float32: 2e-4, torch.float16: 3e-2, torch.bfloat16: 1e-1}


@dataclass
class Acceleration:
    """What :func:`accelerate` did; its attribute ``acceleration`` on the model.

    ``swapped``: path of each swapped layer, and the names of the two classes. ``left``: path of each layer that has an
    explanation mode but was not swapped, and why. ``not_in_place``: paths of activations that no longer overwrite their
    input, because the backward pass of our layers may need it.
    """

    swapped: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    not_in_place: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{len(self.swapped)} layers swapped, {len(self.left)} left"]
        lines += [f"  swapped {path}: {what}" for path, what in self.swapped.items()]
        lines += [f"  left {path}: {why}" for path, why in self.left.items()]
        lines += [f"  no longer in place: {path}" for path in self.not_in_place]
        return "\n".join(lines)


def accelerate(model: nn.Module, *, channels_last: bool = True) -> nn.Module:
    """Swaps the B-cos layers of another package for ours, in place; what the model computes stays the same.

    Takes models of the public packages ``bcos`` (B-cos v2) and B-cosification, of B-cos v2's single-file ResNet, and of
    look-alikes: B-cos convolutions and linear layers, uncentered batch norms, layer, position and group norms, GELU, and
    attention. Parameters, buffers, state-dict keys and hooks stay the same objects; ``model.explanation_mode()`` and
    ``model.explain()`` go on working. What was swapped, what was not and why is in ``model.acceleration``, and logged.

    In explanation mode the parameters that make queries and keys have no gradient here, unlike in B-cosification's pool.

    Args:
        model: in any mode, dtype and on any device but "meta".
        channels_last: convolutions bring their input into that memory format; the rest of a network usually keeps it. It
            halves the time of a ResNet-50 on a CPU, but makes ``.view`` fail where it is used instead of ``.flatten``. False:
            they compute in the format that comes in.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: it has no layer that could be swapped; the message says why for each candidate.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    report = getattr(model, "acceleration", None) or Acceleration()
    report.left.clear()
    found: dict[nn.Module, nn.Module | None] = {}  # each layer once, however often it is used
    for parent_path, parent in list(model.named_modules()):
        for name, child in parent._modules.items():
            path = f"{parent_path}.{name}" if parent_path else name
            if child is None:
                continue
            if child not in found:
                found[child] = _stand_in(child, path, report)
            new = found[child]
            if new is not None:
                parent._modules[name] = new
    if _is_foreign(model):
        report.left[""] = f"the model is a {type(model).__name__} itself; put it into an nn.Sequential"
    if not report.swapped:
        reasons = "; ".join(f"{path or 'model'}: {why}" for path, why in report.left.items())
        raise ValueError(
            f"model: a {type(model).__name__} has no B-cos layer that could be swapped: "
            + (reasons or "no module has `b` and `detach`, the marks of one")
        )
    for path, module in model.named_modules():
        if isinstance(module, _Conv2d):
            module.channels_last = channels_last
        if getattr(module, "inplace", False):
            module.inplace = False  # type: ignore[assignment]
            report.not_in_place.append(path)
    model.acceleration = report  # type: ignore[assignment]
    log.info("accelerate: %d layers of %s swapped", len(report.swapped), type(model).__name__)
    for path, why in report.left.items():
        log.warning("accelerate: %s stays as it is: %s", path or "model", why)
    return model


def deaccelerate(model: nn.Module) -> nn.Module:
    """Puts the layers back that :func:`accelerate` swapped, with the weights that they have now; in place.

    Returns:
        ``model`` itself; a model that was not accelerated is left as it is.
    """
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if isinstance(child, _StandIn):
                child.source.training = child.training
                parent._modules[name] = child.source
    report = getattr(model, "acceleration", None)
    if isinstance(report, Acceleration):
        for path in report.not_in_place:
            model.get_submodule(path).inplace = True  # type: ignore[assignment]
        del model.acceleration
    return model


# ---- layers of ours that stand in for others


class _StandIn(DetachableModule):
    """Has no state of its own: tensors, children, hooks and settings are those of ``source``."""

    source: Any

    def __init__(self, source: nn.Module) -> None:
        nn.Module.__init__(self)
        # `source` is not registered as a child, and what is registered is the same dictionary on both sides: a change of
        # dtype or device, or a load, changes both
        shared = {k: v for k, v in vars(source).items() if not (callable(v) and not isinstance(v, nn.Module))}
        self.__dict__.update(shared)
        for name in ("b", "detach", "_detach"):
            self.__dict__.pop(name, None)
        self.__dict__["source"] = source

    @property
    def _detach(self) -> bool:  # type: ignore[override]
        return bool(self.source.detach or vars(self).get("_detach"))  # the latter in a replica of `nn.DataParallel`

    @_detach.setter
    def _detach(self, value: bool) -> None:
        self.source.detach = value

    def _theirs(self, x: Tensor) -> Tensor:
        """The forward pass of ``source``, in the mode of this layer."""
        source, detach = self.source, self.detach
        if bool(source.detach) != detach:  # of this call alone: a twin with the same tensors and children
            source = copy.copy(source)
            source.detach = detach
        y: Tensor = source.forward(x)
        return y

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.source._load_from_state_dict(*args, **kwargs)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.source._save_to_state_dict(*args, **kwargs)


class _BcosStandIn(_StandIn):
    """A B-cos layer; ``normalize_weight`` is what the comparison found out."""

    def __init__(self, source: nn.Module, *, normalize_weight: bool) -> None:
        super().__init__(source)
        self.normalize_weight = normalize_weight
        self.max_out = getattr(source, "max_out", 1)
        self._compared = type(self.linear)

    def _is_plain(self, linear: nn.Module) -> bool:
        """Whether the inner layer still is what it was when both layers were compared."""
        return linear is self.source or (
            type(linear) is self._compared and "forward" not in vars(linear) and not has_hooks(linear)
        )

    def with_squares(self, x: Tensor, squares: Tensor | None) -> Tensor:
        linear: Any = self.linear
        if not self._is_plain(linear):
            return self._theirs(x)
        return super().with_squares(x, squares)  # type: ignore[misc]  # of the class that this one is mixed into

    @property
    def b(self) -> float | Tensor:
        """As their forward pass reads it: an offset or a bound in B-cosification's ablations, and 1 and 2 are special."""
        b = self.source.b
        if getattr(self.source, "b_loss", False):
            return b + 2
        if isinstance(b, Tensor) and (value := b.detach().item()) in (1.0, 2.0):
            return value
        return b.clamp(1 + 1e-6) if getattr(self.source, "clamping", False) else b

    @b.setter
    def b(self, value: Any) -> None:
        self.source.b = value


class _Conv2d(_BcosStandIn, BcosConv2d):  # type: ignore[misc]
    channels_last = False

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.contiguous(memory_format=torch.channels_last) if self.channels_last else x)


class _Linear(_BcosStandIn, BcosLinear):  # type: ignore[misc]
    pass


class _ScaledConv2d(_Conv2d):
    """The first B-cos code's: the result is divided by a constant, ``scale``."""

    def with_squares(self, x: Tensor, squares: Tensor | None) -> Tensor:
        if not self._is_plain(self.linear):
            return self._theirs(x)
        y: Tensor = super().with_squares(x, squares) / self.source.scale
        return y

    def explanation_mode(self, detach: bool = True) -> None:
        """That code's name for ``set_explanation_mode``."""
        self.detach = detach


class _FlatConv2d(_Conv2d):
    """For a B-cos layer that is a convolution, instead of having one."""

    @property
    def linear(self) -> nn.Conv2d:  # type: ignore[override]
        return self.source


class _FlatLinear(_Linear):
    @property
    def linear(self) -> nn.Linear:  # type: ignore[override]
        return self.source


class _BatchNorm(_StandIn, BatchNormUncentered2d):  # type: ignore[misc]
    pass


class _LayerNorm(_StandIn, DetachableLayerNorm):  # type: ignore[misc]
    pass


class _LayerNorm2d(_StandIn, DetachableLayerNorm2d):  # type: ignore[misc]
    pass


class _GroupNorm(_StandIn, DetachableGroupNorm2d):  # type: ignore[misc]
    pass


class _GELU(_StandIn, DetachableGELU):  # type: ignore[misc]
    approximate = "none"


class _Attention(_StandIn, SimpleViTAttention):  # type: ignore[misc]
    pass


class _AttentionPool(_StandIn, AttentionPool2d):  # type: ignore[misc]
    #: theirs has the parameter, but no use for it
    positional_embedding = None


# ---- which stand-in, if any


@dataclass(frozen=True)
class _Candidate:
    """A stand-in to try, and the shape of an input to try it on."""

    make: Callable[[Any], _StandIn]
    shape: tuple[int, ...]


def _is_foreign(module: nn.Module) -> bool:
    """Whether the module has an explanation mode and is not ours."""
    return has_switch(module) and not type(module).__module__.startswith("bcos_kernels.")


def _stand_in(module: nn.Module, path: str, report: Acceleration) -> nn.Module | None:
    if not _is_foreign(module):
        return None
    why = _refusal(module)
    if why is None:
        why = "no layer of ours has its structure"
        for candidate in _candidates(module):
            new = candidate.make(module)
            why = _difference(module, new, candidate.shape)
            if why is None:
                report.swapped[path] = f"{type(module).__name__} -> {_ours(new).__name__}"
                return new
    report.left[path] = f"{type(module).__name__}: {why}"
    return None


def _ours(stand_in: _StandIn) -> type:
    """The public class that a stand-in is of."""
    return next(t for t in type(stand_in).__mro__ if not t.__name__.startswith("_"))


def _refusal(module: Any) -> str | None:
    if not hasattr(module, "detach"):
        return "it has no `detach`, the switch of its explanation mode"
    linear = getattr(module, "linear", module)
    if isinstance(linear, nn.Conv2d) and linear.padding_mode != "zeros":
        return f"padding_mode={linear.padding_mode!r}: their patch norm pads with zeros all the same, ours does not"
    if isinstance(module, nn.BatchNorm2d) and "AllNorm" in type(module).__name__:
        return "one variance for all channels; ours has one for each"
    tensor = next((t for t in (*module.parameters(), *module.buffers())), None)
    if tensor is not None and tensor.is_meta:
        return "it is on the meta device, where nothing can be compared; give it weights first"
    return None


def _candidates(module: Any) -> Iterator[_Candidate]:
    linear = getattr(module, "linear", module)
    if hasattr(module, "b") and isinstance(linear, (nn.Conv2d, nn.Linear)):
        flat = linear is module
        if isinstance(linear, nn.Conv2d):
            scaled = isinstance(getattr(module, "scale", None), (int, float))
            kind: type[_BcosStandIn] = _FlatConv2d if flat else _ScaledConv2d if scaled else _Conv2d
            padding = (0, 0) if isinstance(linear.padding, str) else linear.padding
            sides = (  # two windows each way, padding among them, so that a large layer costs little
                max(d * (k - 1) + 1 + s - p, 1)
                for d, k, s, p in zip(linear.dilation, linear.kernel_size, linear.stride, padding, strict=True)
            )
            shape: tuple[int, ...] = (1, linear.in_channels, *sides)
        else:
            kind = _FlatLinear if flat else _Linear
            shape = (3, linear.in_features)
        plain = type(linear) in (nn.Conv2d, nn.Linear)
        for normalize in (False,) if plain else (True, False):
            yield _Candidate(partial(kind, normalize_weight=normalize), shape)
    elif isinstance(module, nn.BatchNorm2d):
        yield _Candidate(_BatchNorm, (3, module.num_features, 2, 2))
    elif isinstance(module, nn.LayerNorm):
        yield _Candidate(_LayerNorm, (2, 3, *module.normalized_shape))
        yield _Candidate(_LayerNorm2d, (2, module.normalized_shape[0], 2, 3))
    elif isinstance(module, nn.GroupNorm):
        yield _Candidate(_GroupNorm, (2, module.num_channels, 2, 3))
    elif SimpleViTAttention.resembles(module):
        yield _Candidate(_Attention, (2, 3, module.to_qkv.in_features))
    elif AttentionPool2d.resembles(module):
        yield _Candidate(_AttentionPool, (2, module.v_proj.in_features, 2, 2))
    elif "GELU" in type(module).__name__ and not list(module.children()):
        yield _Candidate(_GELU, (2, 3, 4))


def _difference(theirs: Any, ours: _StandIn, shape: tuple[int, ...]) -> str | None:
    """None where both layers compute the same in both modes, else what differs. Leaves no trace on either."""
    tensors = [t for t in (*theirs.parameters(), *theirs.buffers()) if t.is_floating_point()]
    device, dtype = (tensors[0].device, tensors[0].dtype) if tensors else (torch.device("cpu"), torch.float64)
    # on a device of its own: the default one may be another, even one without values
    generator = torch.Generator("cpu").manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(device, dtype)
    buffers = {name: b.clone() for name, b in theirs.named_buffers()}
    modes = [(training, detach) for training in ((False, True) if buffers else (False,)) for detach in (False, True)]
    detached, trained = bool(theirs.detach), [(m, m.training) for m in theirs.modules()]
    try:
        for training, detach in modes:
            results = []
            for layer in (theirs, ours):
                _restore(theirs, buffers)
                layer.train(training)
                switch(theirs, detach)
                results.append(_run(layer, x) + [b.clone() for b in theirs.buffers() if b.is_floating_point()])
            if [r.shape for r in results[0]] != [r.shape for r in results[1]]:
                return "its output has another shape than ours"
            errors = [_relative_error(a, e) for e, a in zip(*results, strict=True)]
            error = torch.tensor(errors, dtype=torch.float64, device="cpu").max().item()  # Python's max may lose a NaN
            if not error <= _AGREEMENT.get(dtype, 0.0):
                mode = f"{'training' if training else 'evaluation'}, explanation mode {'on' if detach else 'off'}"
                return f"it does not compute what ours computes (relative difference {error:.1e} in {mode})"
    except Exception as error:  # whatever a layer that only looks like one raises
        return f"it could not be compared with ours: {type(error).__name__}: {error}"
    finally:
        _restore(theirs, buffers)
        switch(theirs, detached)
        for module, training in trained:
            module.training = training
        ours.training = theirs.training
    return None


def _restore(module: nn.Module, buffers: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, b in module.named_buffers():
            b.copy_(buffers[name])


def _run(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, and gradient of the input; hooks are not called."""
    leaf = x.clone().requires_grad_()
    with torch.enable_grad(), torch.inference_mode(False), torch.autocast(x.device.type, enabled=False):
        y = layer.forward(leaf)
        upstream = torch.linspace(-1, 2, y.numel(), dtype=torch.float64, device=y.device).to(y).view(y.shape)
        grad = torch.autograd.grad(y, leaf, upstream)[0]
    return [y.detach(), grad]


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    if not actual.numel() or bool((actual.isnan() & expected.isnan()).all()):
        return 0.0
    scale = expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny)
    return float((actual - expected).abs().max() / scale)
