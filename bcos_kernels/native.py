"""The compiled backend: the extension that ``setup.py`` builds from ``csrc/``, for the CPU and, where nvcc was found, CUDA.

What it fuses on each, docs/backends.md says. Loaded on the first use, and only if it was built for the torch that is
running, from the sources that this module belongs to.
"""

from __future__ import annotations

import functools
import os
import re
from typing import Any

import torch
from torch import Tensor

from bcos_kernels import build_record
from bcos_kernels.contract import (
    Call,
    Forward,
    Gradients,
    Needs,
    NormForward,
    NormGradients,
    NormNeeds,
    NormOptions,
    Options,
    Saved,
)

_LIBRARY = build_record.PACKAGE / build_record.LIBRARY
_DTYPES = {
    "cpu": (torch.float32, torch.float64, torch.bfloat16),
    "cuda": (torch.float32, torch.float64, torch.bfloat16, torch.float16),
}
#: From benchmarks/results/networks-cpu.csv, in docs/performance.md; nothing was measured on a GPU yet.
_COST = (
    "In our measurements (docs/performance.md) a CPU step of ResNet-50 takes 1.65 times as long as the conventional "
    "network's without the extension, and 1.04 times as long with it."
)

_LINEAR, _QUADRATIC, _GENERAL = range(3)


@functools.cache
def build_info() -> dict[str, str] | None:
    """What the extension was built with, None if there is none.

    ``torch``, ``compiler``, ``flags``, ``cuda_archs`` (empty: without CUDA, for the reason in ``no_cuda``), and ``sources``,
    the hash of what was compiled.
    """
    return build_record.info_of(_LIBRARY)


def _refused(info: dict[str, str] | None) -> str | None:
    """Why an extension with this description is not loaded, without the command that changes it."""
    if info is None:
        return f"the compiled extension is missing: {build_record.left_out()}"
    running = str(torch.__version__)
    if info.get("torch") != running:
        return f"the compiled extension was built for torch {info.get('torch')}, this is torch {running}"
    expected = build_record.expected_sources()
    if expected is not None and info.get("sources") != expected:
        return "the compiled extension was built from other sources than these Python modules belong to"
    return None


@functools.cache
def unavailable() -> str | None:
    sentence = _refused(build_info())
    if sentence is None:
        try:
            torch.ops.load_library(_LIBRARY)
        except (OSError, RuntimeError) as error:  # RuntimeError: operators that another copy has registered
            sentence = f"the compiled extension cannot be loaded ({error})"
    return sentence and f"native: {sentence}; `{build_record.rebuild_command()}` builds it"


@functools.cache
def _gpu_not_covered(index: int) -> str | None:
    info = build_info() or {}
    capability = torch.cuda.get_device_capability(index)
    major, minor = capability
    if capability < build_record.LEAST_CAPABILITY:
        return f"native: kernels need compute capability 8.0 or higher; this GPU has {major}.{minor}"
    archs = info.get("cuda_archs", "")
    if not archs:
        why = info.get("no_cuda") or build_record.NO_NVCC
        return f"native: built without CUDA: {why}; with nvcc, `{build_record.rebuild_command()}` builds the kernels"
    if not covers(archs, capability):
        command = build_record.rebuild_command([f"TORCH_CUDA_ARCH_LIST={archs};{major}.{minor}"])
        return f"native: compiled for {archs}, this GPU is sm_{major}{minor}; `{command}` adds it"
    return None


def slow_path(call: Call) -> str | None:
    """The warning that is due where ``call`` runs in plain PyTorch for want of this extension; None if it is not.

    None as well where the extension has no kernel for the call, or was left out on purpose.
    """
    if build_record.left_out_on_purpose() or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    missing, reason = unavailable(), why_not(call)
    if call.x.device.type == "cuda":
        index = call.x.device.index
        can_be_mended = torch.cuda.get_device_capability(index) >= build_record.LEAST_CAPABILITY
        if not can_be_mended or reason != _gpu_not_covered(index):
            return None
        return f"bcos_kernels runs its slow path: layers in plain PyTorch. {missing or reason}"
    return (
        None
        if missing is None or reason
        else f"bcos_kernels runs its slow path: layers in plain PyTorch. {_COST} {missing}"
    )


def covers(archs: str, capability: tuple[int, int]) -> bool:
    """Whether code for ``archs``, as in TORCH_CUDA_ARCH_LIST, runs on a GPU of this compute capability.

    Machine code runs on its own major version from its minor version on (``9.0a``: on exactly that), PTX on all later ones.
    """
    for arch in re.split(r"[;, ]+", archs.strip()):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", arch)
        if match is None:
            continue
        major, minor, exact, ptx = match.groups()
        version = (int(major), int(minor))
        same_family = version[0] == capability[0] and version <= capability
        if version == capability or (same_family and exact != "a") or (ptx and not exact and version <= capability):
            return True
    return False


def why_not(call: Call) -> str | None:
    device = call.x.device.type
    if device not in _DTYPES:
        return f"native: kernels need the CPU or CUDA; the tensor is on {device}"
    if call.x.dtype not in _DTYPES[device]:
        names = ", ".join(str(dtype)[6:] for dtype in _DTYPES[device])
        return f"native: kernels for {device} take {names}; the tensor is {str(call.x.dtype)[6:]}"
    if call.op.startswith("layer_norm"):
        return "native: layer_norm has no kernel of its own, since torch's is as good"
    if device == "cuda" and (sentence := _gpu_not_covered(call.x.device.index)) is not None:
        return sentence
    if call.weight is not None and not call.op.startswith("batch_norm") and call.weight.dtype != call.x.dtype:
        return "native: kernels need x and weight in one dtype"
    if call.options.max_out > 256:
        return f"native: kernels take max_out up to 256; it is {call.options.max_out}"
    return None


def _ops() -> Any:
    if (sentence := unavailable()) is not None:
        raise RuntimeError(sentence)
    return torch.ops.bcos_native


def _exponent(options: Options) -> tuple[float, Tensor | None, int]:
    """B as a number or a tensor, and which form of the scale it takes; a tensor takes the general one, whatever its value."""
    if isinstance(options.b, Tensor):
        return 0.0, options.b, _GENERAL
    form = _LINEAR if options.is_linear else _QUADRATIC if options.is_quadratic else _GENERAL
    return options.b, None, form


def _conv_arguments(o: Options) -> tuple[Any, ...]:
    return (o.stride, o.padding, o.dilation, o.groups, o.max_out, o.normalize_weight)


def _keeps(options: Options, dtype: torch.dtype, for_backward: bool) -> tuple[bool, bool]:
    """Whether forward keeps the linear output, and the winners of MaxOut."""
    return for_backward and options.keeps_linear(dtype), for_backward and options.max_out > 1


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    options: Options,
    for_backward: bool,
    squares: Tensor | None = None,
) -> Forward:
    keeps = _keeps(options, x.dtype, for_backward)
    return Forward(*_ops().conv2d(x, weight, bias, *_exponent(options), *_conv_arguments(options), *keeps, squares))


def conv2d_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, saved: Saved, options: Options, needs: Needs
) -> Gradients:
    kept, norm, winner = saved
    return Gradients(
        *_ops().conv2d_backward(
            grad,
            x,
            weight,
            bias,
            kept,
            norm,
            winner,
            list(needs),
            *_exponent(options),
            *_conv_arguments(options),
            options.detach_scale,
        )
    )


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    options: Options,
    for_backward: bool,
    squares: Tensor | None = None,
) -> Forward:
    o = options
    keeps = _keeps(o, x.dtype, for_backward)
    return Forward(*_ops().linear(x, weight, bias, *_exponent(o), o.max_out, o.normalize_weight, *keeps))


def linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, saved: Saved, options: Options, needs: Needs
) -> Gradients:
    o = options
    kept, norm, winner = saved
    return Gradients(
        *_ops().linear_backward(
            grad,
            x,
            weight,
            bias,
            kept,
            norm,
            winner,
            list(needs),
            *_exponent(o),
            o.max_out,
            o.normalize_weight,
            o.detach_scale,
        )
    )


def batch_norm_uncentered2d(
    x: Tensor,
    var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    options: NormOptions,
) -> NormForward:
    o = options
    return NormForward(*_ops().batch_norm(x, var, weight, bias, residual, o.eps, o.relu, o.squares))


def batch_norm_uncentered2d_backward(
    grad: Tensor,
    x: Tensor,
    z: Tensor | None,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    options: NormOptions,
    needs: NormNeeds,
) -> NormGradients:
    o = options
    return NormGradients(
        *_ops().batch_norm_backward(grad, x, z, mean, var, weight, bias, o.eps, o.relu, o.detach_var, list(needs))
    )
